"""A block: the hand-written ways of a CPU and of a GPU against the plain one, and packing.

On a CPU the GPU's way runs with the formulas of its kernels (tests/kernels/test_block_passes.py).
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastjepa.model.block import Block
from fastjepa.model.segments import SharedRow, segments_of

WIDTH, HEADS = 24, 2
BY_HAND = ("cpu", "gpu")


def make_block(way: str, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    block = Block(WIDTH, HEADS, 40, attention="math" if way == "plain" else "auto")
    block.by_hand = None if way == "plain" else way
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block


def make_input(shapes: Sequence[tuple[int, int]], seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(count * length for count, length in shapes)
    tables = []
    for i, (count, length) in enumerate(shapes):
        # The encoder shares one table among clips, the predictor has one a clip.
        angle = torch.rand(1 if i % 2 else count, length, WIDTH // HEADS // 2, generator=generator)
        tables.append(torch.stack((angle.cos(), angle.sin()), -1))
    return torch.randn(rows, WIDTH, generator=generator), tables


def run(
    way: str, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, *, autocast: bool = False
) -> list[Tensor]:
    """Output, gradient of the input, gradients of all weights, in float64."""
    block, (x, tables) = make_block(way).to(dtype), make_input(shapes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(x, [t.to(wide) for t in tables], segments_of(shapes))
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    grads = torch.autograd.grad(out, [x, *block.parameters()], upstream.to(out.dtype))
    return [t.detach().double() for t in (out, *grads)]


shapes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7)), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from(BY_HAND))
def test_in_float64_all_ways_are_one(sizes: list[tuple[int, int]], way: str) -> None:
    ours, plain = run(way, sizes, torch.float64), run("plain", sizes, torch.float64)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("sizes", [[(2, 9)], [(3, 5), (3, 11)], [(1, 800)]])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", BY_HAND)
def test_in_training_precision_it_is_at_most_twice_as_far_off_as_the_plain_way(
    sizes: list[tuple[int, int]], autocast: bool, way: str
) -> None:
    exact = run("plain", sizes, torch.float64)
    ours = run(way, sizes, torch.float32, autocast=autocast)
    plain = run("plain", sizes, torch.float32, autocast=autocast)
    unit = 2.0**-8 if autocast else 2.0**-23
    for a, b, truth in zip(ours, plain, exact, strict=True):
        error, error_plain = ((t - truth).norm() for t in (a, b))
        assert error <= 2 * error_plain + unit * truth.norm()


@pytest.mark.parametrize("sizes", [[(2, 9)], [(3, 5), (1, 11)]])
@pytest.mark.parametrize("way", [*BY_HAND, "plain"])
def test_a_row_that_sequences_share_need_only_be_given_once(
    sizes: list[tuple[int, int]], way: str
) -> None:
    block, (x, tables) = make_block(way).double(), make_input(sizes)
    tables = [table.double() for table in tables]
    segments = segments_of(sizes)
    shared = SharedRow(segments, own=tuple(2 + i for i in range(len(sizes))))
    differing = sum(s.count * own for s, own in zip(segments, shared.own, strict=True)) + 1
    x = x[:differing].double().requires_grad_()
    once = block(x, tables, segments, shared)
    each = block(shared.spread(x), tables, segments)
    torch.testing.assert_close(once, each)
    upstream = torch.randn_like(once)
    leaves = [x, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad(once, leaves, upstream),
        torch.autograd.grad(each, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("way", BY_HAND)
def test_it_is_the_specifications_formula(way: str) -> None:
    """x += attn(norm1(x)); x += mlp(norm2(x)), without positions (all angles 0)."""
    block = make_block(way).double()
    x, _ = make_input([(1, 6)])
    x = x.double()
    still = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 6, WIDTH // HEADS // 2, 2)
    out = block(x, [still.contiguous()], segments_of([(1, 6)]))
    y = F.layer_norm(x, (WIDTH,), block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = block.attn.qkv(y).view(1, 6, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[0]
    y = x + block.attn.proj(mixed)
    z = F.layer_norm(y, (WIDTH,), block.norm2.weight, block.norm2.bias, 1e-6)
    y = y + block.mlp.fc2(F.gelu(block.mlp.fc1(z)))
    torch.testing.assert_close(out, y)


@pytest.mark.parametrize("way", [*BY_HAND, "plain"])
def test_packed_sequences_equal_separate_passes(way: str) -> None:
    block = make_block(way).double()
    sizes = [(2, 5), (3, 4)]
    x, tables = make_input(sizes)
    x, tables = x.double(), [t.double() for t in tables]
    packed = block(x, tables, segments_of(sizes))
    bounds = [0, 10, 22]
    apart = [
        block(x[low:high], [table], segments_of([size]))
        for (low, high), table, size in zip(pairwise(bounds), tables, sizes, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(apart))


@pytest.mark.parametrize("way", [*BY_HAND, "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_block_may_leave_its_last_addition_to_the_next(way: str, dtype: torch.dtype) -> None:
    blocks = [make_block(way, seed).to(dtype) for seed in range(3)]
    leaves = [parameter for block in blocks for parameter in block.parameters()]
    sizes = [(2, 5), (1, 3)]
    x, tables = make_input(sizes)
    start, tables = x.to(dtype).requires_grad_(), [table.to(dtype) for table in tables]

    def chain(unsummed: bool) -> list[Tensor]:
        stream: tuple[Tensor, ...] = (start,)
        for block in blocks:
            leaves_it = unsummed and block is not blocks[-1]
            x, *added = stream
            out = block(x, tables, segments_of(sizes), None, *added, unsummed=leaves_it)
            assert isinstance(out, tuple) == (leaves_it and way == "gpu")
            stream = out if isinstance(out, tuple) else (out,)
        (end,) = stream
        upstream = torch.randn_like(end, generator=torch.Generator().manual_seed(1))
        return [end, *torch.autograd.grad(end, [start, *leaves], upstream)]

    tight = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {}
    for left, added in zip(chain(True), chain(False), strict=True):
        torch.testing.assert_close(left, added, **tight)


@pytest.mark.parametrize("way", BY_HAND)
def test_without_gradients_the_numbers_are_the_same(way: str) -> None:
    block, (x, tables) = make_block(way), make_input([(2, 9)])
    with torch.no_grad():
        silent = block(x, tables, segments_of([(2, 9)]))
    torch.testing.assert_close(
        silent, block(x, tables, segments_of([(2, 9)])), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("way", BY_HAND)
def test_the_input_stays_as_it_is(way: str) -> None:
    block, (x, tables) = make_block(way), make_input([(2, 9)])
    before = x.clone()
    x.requires_grad_()
    block(x, tables, segments_of([(2, 9)])).sum().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("way", BY_HAND)
def test_a_kept_graph_gives_the_same_gradients_again(way: str) -> None:
    block, (x, tables) = make_block(way), make_input([(2, 5)])
    out = block(x, tables, segments_of([(2, 5)])).square().sum()
    parameters = list(block.parameters())
    first = torch.autograd.grad(out, parameters, retain_graph=True)
    second = torch.autograd.grad(out, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("way", BY_HAND)
def test_frozen_weights_and_inputs_are_allowed(way: str) -> None:
    block, (x, tables) = make_block(way), make_input([(2, 9)])
    block.requires_grad_(False)
    x.requires_grad_()
    block(x, tables, segments_of([(2, 9)])).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in block.parameters())


def test_on_a_gpu_no_copy_of_a_weight_is_kept_for_the_backward() -> None:
    """Under autocast a step would hold a bfloat16 copy of every weight of the encoder."""
    block, (x, tables) = make_block("gpu"), make_input([(2, 9)])
    weights = [parameter for parameter in block.parameters() if parameter.ndim > 1]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        block(x.requires_grad_(), tables, segments_of([(2, 9)]))
    shapes = {weight.shape for weight in weights}
    like_weights = {tensor.data_ptr() for tensor in kept if tensor.shape in shapes}
    assert like_weights == {weight.data_ptr() for weight in weights}


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="heads: expected a divisor of width 24, got 5"):
        Block(24, 5, 40)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (384, 12), (1408, 22)])
def test_on_a_gpu_it_is_at_most_twice_as_far_off_as_the_plain_way(
    width: int, heads: int, stream: torch.dtype
) -> None:
    """The kernels at work, in bfloat16 under autocast, on mask groups of unequal lengths."""
    torch.manual_seed(0)
    block = Block(width, heads, 4 * width, attention="sdpa").cuda()
    sizes = [(3, 301), (2, 77)]
    segments = segments_of(sizes)
    angle = torch.rand(segments[-1].stop, width // heads // 2, device="cuda")
    table = torch.stack((angle.cos(), angle.sin()), -1)
    x = torch.randn(segments[-1].stop, width, device="cuda").to(stream)
    upstream = torch.randn_like(x)

    def step(way: str | None, dtype: torch.dtype) -> list[Tensor]:
        block.by_hand = way
        block.to(torch.float64 if dtype == torch.float64 else torch.float32)
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype != torch.float64):
            own = table.double() if dtype == torch.float64 else table
            out = block(leaf, [own], segments)
        grads = torch.autograd.grad(out, [leaf, *block.parameters()], upstream.to(out.dtype))
        return [t.detach().double() for t in (out, *grads)]

    ours, again, plain, exact = (
        step(way, dtype)
        for way, dtype in (
            ("auto", stream), ("auto", stream), (None, stream), (None, torch.float64),
        )
    )  # fmt: skip
    assert torch.equal(ours[0], again[0])
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm() + 2.0**-8 * truth.norm()
