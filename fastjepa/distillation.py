"""The frozen teacher of a distillation: read, compared with the recipe, and known again later.

teacher = load_teacher(Path("vjepa2_1_vitG_384.pt"), size, patch=16, tubelet=2, device=device)
"""

from pathlib import Path

import torch

from fastjepa.checkpoint import Checkpoint, CheckpointError
from fastjepa.model import Encoder
from fastjepa.presets import EncoderSize
from fastjepa.pretrained import load


def load_teacher(
    path: Path,
    size: EncoderSize,
    *,
    patch: int,
    tubelet: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """The encoder in `path`, whatever `fastjepa.load` takes: in eval mode, without gradients.

    Raises ValueError naming what differs from the recipe's `size` and the student's tokens.
    """
    teacher = load(path, device=device, dtype=dtype)
    mlp_width = teacher.state_dict()["blocks.0.mlp.fc1.weight"].shape[0]
    found = {
        "distill.width": (teacher.width, size.width),
        "distill.depth": (len(teacher.blocks), size.depth),
        "distill.heads": (teacher.width // teacher.head_dim, size.heads),
        "distill.mlp_width": (mlp_width, size.mlp_width),
        "model.patch": (teacher.patch, patch),
        "model.tubelet": (teacher.tubelet, tubelet),
    }
    wrong = [
        f"{key} {here} ({there} there)" for key, (there, here) in found.items() if here != there
    ]
    if wrong:
        raise ValueError(
            f"distill.teacher {path}: {teacher.origin}; the recipe says other than the file: "
            f"{', '.join(wrong)}"
        )
    return teacher


def check_teacher(checkpoint: Checkpoint, path: Path, now: str) -> None:
    """Raise CheckpointError where a run would go on with another teacher than it began with.

    `now` is the digest of its weights, the run's first one stands in the checkpoint's state.
    """
    if checkpoint.state.get("teacher") != now:
        raise CheckpointError(
            f"{checkpoint.path}: trained by another teacher than {path} holds now; "
            "give the first one as distill.teacher, or another run.folder"
        )
