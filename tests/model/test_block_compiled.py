"""Compiled blocks: the same numbers, few compilations, and one line where nothing can compile."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastjepa.golden import micro_batch, networks, read_golden
from fastjepa.model.block import Block, compile_blocks
from fastjepa.model.block_compiled import compile_refusal
from fastjepa.model.segments import segments_of
from fastjepa.train.engine import TorchEngine, named_parameters
from fastjepa.train.step import forward_backward

GOLDEN = Path(__file__).parents[1] / "golden/video.safetensors"
CPU = torch.device("cpu")
# What docs/step.md states for 1,000 steps.
MOST_GRAPHS = 12

pytestmark = pytest.mark.skipif(
    compile_refusal(CPU) is not None, reason="nothing can be compiled on this machine"
)


def golden_step(dtype: torch.dtype, *, compiled: bool) -> tuple[Tensor, Tensor]:
    """Loss, and all gradients as one vector, in float64."""
    golden = read_golden(GOLDEN, CPU, dtype)
    jepa = networks(golden, "auto")
    if compiled:
        compile_blocks(jepa.encoder, jepa.predictor, jepa.target)
    engine = TorchEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target, dtype=dtype
    )
    (terms,) = forward_backward(jepa, engine, [micro_batch(golden, jepa.encoder)])
    grads = [p.grad for _, p in named_parameters(jepa.encoder, jepa.predictor)]
    return terms.total.double(), torch.cat([g.flatten().double() for g in grads if g is not None])


@pytest.mark.slow
def test_a_compiled_step_is_the_golden_one() -> None:
    loss, grads = golden_step(torch.float64, compiled=False)
    before = counters["stats"]["unique_graphs"]
    our_loss, ours = golden_step(torch.float32, compiled=True)
    assert float((our_loss - loss).abs() / loss) < 1e-5
    _, plain = golden_step(torch.float32, compiled=False)
    assert (ours - grads).norm() <= 2 * (plain - grads).norm() + 1e-5 * grads.norm()
    assert counters["stats"]["unique_graphs"] - before <= 7


def test_a_thousand_steps_of_changing_masks_compile_a_stated_number_of_graphs() -> None:
    """Blocks of an encoder and of a predictor, with gradients and without.

    Graphs are traced as ever and then run as they are: the counting needs no machine code.
    """

    def run(block: Block, width: int, sizes: Sequence[tuple[int, int]], *, grad: bool) -> None:
        angle = torch.zeros(1, max(length for _, length in sizes), width // 4)
        table = torch.stack((angle.cos(), angle.sin()), -1)
        rows = sum(count * length for count, length in sizes)
        x = torch.zeros(rows, width, requires_grad=grad)
        with torch.set_grad_enabled(grad):
            block(x, [table[:, :length] for _, length in sizes], segments_of(sizes))

    encoder, predictor = Block(24, 2, 32), Block(16, 2, 32)
    compile_blocks(encoder, predictor)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    lengths = torch.randint(1, 40, (1000, 3), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.compiler.set_stance(force_backend="eager"):
        for first, second, clips in lengths:
            sizes = [(clips, first + 1), (clips, second)][: 1 + clips % 2]
            run(encoder, 24, sizes, grad=True)
            run(predictor, 16, sizes, grad=True)
            run(encoder, 24, sizes[:1], grad=False)
    assert 0 < counters["stats"]["unique_graphs"] - before <= MOST_GRAPHS
    torch._dynamo.reset()


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="blocks cannot be compiled here: it needs a C\\+\\+ comp"):
        compile_blocks(Block(24, 2, 32))
