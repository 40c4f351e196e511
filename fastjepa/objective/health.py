"""Indicators on tensors that show collapse where the loss does not; diagnosis.py judges them.

No gradient flows, and each answer is a 0-d tensor, so that a step can gather them and read all at
once. docs/reading-the-curves.md explains each. Shapes: B clips, N tokens, D channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def feature_std(x_BND: Tensor) -> Tensor:
    """Standard deviation over all tokens of each channel, averaged over channels: 0-d float32.

    Takes any shape that ends in channels. Zero when every token has the same features. Raises
    ValueError when there is no token.
    """
    std_D: Tensor = _rows(x_BND).std(dim=0, correction=0)
    return std_D.mean()


@torch.no_grad()
def feature_norm(x_BND: Tensor) -> Tensor:
    """L2 norm of a token's features, averaged over all tokens: 0-d float32.

    Takes any shape that ends in channels. Raises ValueError when there is no token.
    """
    norm: Tensor = torch.linalg.vector_norm(_rows(x_BND), dim=-1).mean()
    return norm


@torch.no_grad()
def effective_rank(x_ND: Tensor, rows: int = 2048) -> Tensor:
    """RankMe: exp of the entropy of the singular values' shares, between 1 and D: 0-d float32.

    Takes any shape that ends in channels; of more than `rows` tokens, `rows` evenly spaced ones are
    used. All-zero features have rank 1. On CUDA the decomposition itself waits for the device.
    Source: RankMe, arXiv 2210.02885, equation 1. Raises ValueError when there is no token.
    """
    x_ND = x_ND.flatten(0, -2)
    count = x_ND.shape[0]
    if count > rows:
        x_ND = x_ND[torch.arange(rows, device=x_ND.device) * count // rows]
    singular = torch.linalg.svdvals(_rows(x_ND))
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


@torch.no_grad()
def target_drift(current: Tensor, reference: Tensor) -> Tensor:
    """How far the targets of a fixed probe clip moved: |current - reference| / |reference|, 0-d.

    0 is a target that stands still. Distance rather than 1 - cosine, which float32 cannot tell from
    0 below a movement of about 3e-4. Raises ValueError when the shapes differ.
    """
    if current.shape != reference.shape:
        raise ValueError(
            f"target_drift: current {tuple(current.shape)} and reference "
            f"{tuple(reference.shape)} differ in shape"
        )
    moved: Tensor = torch.linalg.vector_norm(current.float() - reference.float())
    length: Tensor = torch.linalg.vector_norm(reference.float())
    return moved / length.clamp_min(1e-12)


# Tried in order: `predictor.img_mod_embed` is the predictor's, a bare `img_mod_embed` is not.
_PARTS = (
    ("predictor_blocks", ("predictor_blocks.",)),
    (
        "predictor_embed",
        (
            "predictor_embed.",
            "mask_tokens.",
            "predictor.img_mod_embed",
            "predictor.video_mod_embed",
        ),
    ),
    ("predictor_heads", ("predictor_norm.", "predictor_proj.", "predictor_proj_context.")),
    ("encoder_norms", ("norms_block.",)),
    ("encoder_blocks", ("blocks.",)),
    ("tokenizer", ("patch_embed.", "patch_embed_img.", "img_mod_embed", "video_mod_embed")),
)


def part_of(name: str) -> str:
    """The part a parameter counts to, from its dotted released name (docs/method.md section 7).

    One of tokenizer (with the encoder's modality embeddings), encoder_blocks, encoder_norms,
    predictor_embed (with mask tokens and modality embeddings), predictor_blocks, predictor_heads
    (with the norm before them). The predictor's modality embeddings are known by a `predictor.` in
    front. Raises ValueError for any other name.
    """
    for part, marks in _PARTS:
        if any(name.startswith(mark) or f".{mark}" in name for mark in marks):
            return part
    raise ValueError(f"gradient_norms: parameter {name!r} belongs to no known part of the model")


@torch.no_grad()
def gradient_norms(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """L2 norms of the gradients under their metric keys, `grad_norm` and `grad_norm/<part>`: 0-d.

    Parameters without a gradient are left out, and so is a part that has none at all (the video
    tokenizer in a step on images). Raises ValueError when nothing has a gradient or a name is
    unknown to `part_of`.
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            gradients.setdefault(part_of(name), []).append(parameter.grad)
    if not gradients:
        raise ValueError("gradient_norms: no parameter has a gradient; call it after backward")
    norms = {
        part: torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(grads)]))
        for part, grads in gradients.items()
    }
    total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return {"grad_norm": total} | {f"grad_norm/{part}": norm for part, norm in norms.items()}


def _rows(x: Tensor) -> Tensor:
    rows = x.flatten(0, -2).float()
    if rows.numel() == 0:
        raise ValueError(
            f"features: expected [..., tokens, channels], found shape {tuple(x.shape)}"
        )
    return rows
