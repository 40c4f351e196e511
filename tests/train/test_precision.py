"""Reduced precision against float64, beside the reference's own, on the golden step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastjepa.golden import micro_batch, networks, read_golden
from fastjepa.train.engine import TorchEngine, named_parameters
from fastjepa.train.step import forward_backward

GOLDEN = Path(__file__).parents[1] / "golden/video.safetensors"
CPU = torch.device("cpu")


def step(
    dtype: torch.dtype, *, attention: str = "math", residual: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Loss, and all gradients as one vector, in float64. Plain blocks and float32 where autocast
    leaves it are what the reference runs."""
    golden = read_golden(GOLDEN, CPU, dtype)
    jepa = networks(golden, attention)
    jepa.predictor.residual = residual
    engine = TorchEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target, dtype=dtype
    )
    (terms,) = forward_backward(jepa, engine, [micro_batch(golden, jepa.encoder)])
    grads = [p.grad for _, p in named_parameters(jepa.encoder, jepa.predictor)]
    return terms.total.double(), torch.cat([g.flatten().double() for g in grads if g is not None])


@pytest.mark.parametrize("residual", [None, torch.bfloat16])
@pytest.mark.parametrize("attention", ["auto", "math"])
def test_bfloat16_is_at_most_twice_as_far_off_as_the_references(
    attention: str, residual: torch.dtype | None
) -> None:
    loss, grads = step(torch.float64)
    their_loss, theirs = step(torch.bfloat16)
    our_loss, ours = step(torch.bfloat16, attention=attention, residual=residual)
    assert (ours - grads).norm() <= 2 * (theirs - grads).norm()
    # A loss is one number, whose error may happen to be none: it has the mean's rounding, too.
    assert (our_loss - loss).abs() <= 2 * (their_loss - loss).abs() + 2.0**-9 * loss
    if residual is not None:
        assert not torch.equal(ours, step(torch.bfloat16, attention=attention)[1])
