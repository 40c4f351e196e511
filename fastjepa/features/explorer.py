"""A page to explore dense features: click a patch, see how similar every patch of every frame is.

One HTML file with pictures, features and script inside: it works from a disk, without a server and
without a network. Features are kept as 8-bit numbers with a scale for each token.
Shapes: T frames, T' feature steps, H and W pixels, H' and W' grid cells, D channels.
"""

import base64
import html
import json
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastjepa.durable import write_text

# Pixels of the page for the longer side of a frame.
_SIDE = 336


def write_page(
    path: Path, clip_u8_3THW: Tensor, features_THWD: Tensor, *, title: str, about: str
) -> None:
    """Write the page of a clip uint8 [3, T, H, W] and its features [T', H', W', D], whole.

    `title` and `about` are shown as plain text. Cosine similarities of the page are those of the
    features within 0.01. Raises ValueError where T' does not divide T or a feature is not finite.
    """
    frames, (steps, rows, columns, channels) = clip_u8_3THW.shape[1], features_THWD.shape
    if frames % steps:
        raise ValueError(f"explorer: {steps} steps of features do not divide {frames} frames")
    if not features_THWD.isfinite().all():
        raise ValueError("explorer: the features hold NaN or infinite values")
    stride = frames // steps
    levels_ND, scales_N = quantised(features_THWD.flatten(0, 2))
    shown = [clip_u8_3THW[:, step * stride] for step in range(steps)]
    data = {
        "steps": steps,
        "rows": rows,
        "columns": columns,
        "channels": channels,
        "cell": max(4, _SIDE // max(rows, columns)),
        "captions": ["image"] if frames == 1 else [f"frame {s * stride}" for s in range(steps)],
        "frames": [_jpeg(frame) for frame in shown],
        "features": _base64(levels_ND.numpy().tobytes()),
        "scales": _base64(scales_N.numpy().astype("<f4").tobytes()),
    }
    page = files("fastjepa.features").joinpath("explorer.html").read_text(encoding="utf-8")
    for mark, text in (
        ("@TITLE@", html.escape(title)),
        ("@ABOUT@", html.escape(about)),
        ("@DATA@", json.dumps(data)),
    ):
        page = page.replace(mark, text)
    write_text(path, page)


def quantised(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as int8 [N, D] and float32 [N]: the largest channel of each becomes 127."""
    x_ND = x_ND.detach().cpu().float()
    scale_N = x_ND.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
    return (x_ND / scale_N[:, None]).round().to(torch.int8), scale_N


def _jpeg(frame_u8_3HW: Tensor) -> str:
    file = BytesIO()
    picture = Image.fromarray(frame_u8_3HW.permute(1, 2, 0).contiguous().cpu().numpy())
    picture.save(file, format="jpeg", quality=88)
    return f"data:image/jpeg;base64,{_base64(file.getvalue())}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
