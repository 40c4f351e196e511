"""The moving average: the formula, its half-precision copies, its vetoes, in kernel and twin."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import ema_update
from fastjepa_kernels.ema import reference
from fastjepa_kernels.ema.op import _ema_update, _mix_on_device, _mix_on_host

SHAPES = ((3, 48), (5,), (1, 1, 2), (4096,), (0, 3), (2, 4099), ())


def tensors(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def cloned(many: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in many]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    as_bytes = (
        (a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )
    return all(torch.equal(a, b) for a, b in as_bytes)


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    errors = (
        (f.double() - e).abs().max().item() if f.numel() else 0.0
        for f, e in zip(found, exact, strict=True)
    )
    return max(errors)


def rounded(many: list[Tensor], half: torch.dtype) -> list[Tensor]:
    """What the copies must hold: the nearest."""
    return [t.to(half) for t in many]


@st.composite
def updates(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], float]:
    """Tensors of every kind of length, some of them at odd addresses."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    sizes = draw(
        st.lists(st.sampled_from((1, 7, 48, 1408, 4096, 4097, 9000)), min_size=1, max_size=4)
    )
    dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
    scale = draw(st.sampled_from((1e-3, 1.0, 1e3)))

    def make(size: int, dtype: torch.dtype, scale: float) -> Tensor:
        skipped = draw(st.integers(0, 1))
        return (scale * torch.randn(size + 1)).to(dtype)[skipped : size + skipped]

    targets = [make(size, torch.float32, 1.0) for size in sizes]
    sources = [make(size, draw(dtypes), scale) for size in sizes]
    momentum = st.one_of(st.floats(0.0, 1.0), st.sampled_from((0.0, 0.5, 0.99925, 1.0)))
    return targets, sources, draw(momentum)


@settings(max_examples=40, deadline=None)
@given(case=updates(), half=st.sampled_from((None, torch.bfloat16, torch.float16)))
def test_error_is_at_most_twice_that_of_the_formula(
    case: tuple[list[Tensor], list[Tensor], float],
    half: torch.dtype | None,
    backend: str,
    device: torch.device,
) -> None:
    targets, sources, momentum = case
    exact, formula = [t.double() for t in targets], cloned(targets)
    reference.ema_update(exact, sources, momentum)
    reference.ema_update(formula, sources, momentum)
    found = [t.to(device) for t in targets]
    copies = None if half is None else [torch.full_like(t, torch.nan, dtype=half) for t in found]
    there = [s.to(device) for s in sources]
    before = cloned(there)
    assert not ema_update(found, there, momentum, copies=copies, backend=backend)
    assert same_bits(there, before)
    # Of few elements the formula may round none: half a unit in the last place is always allowed.
    luck = 2.0**-24 * max(t.abs().max().item() for t in exact)
    assert worst([f.cpu() for f in found], exact) <= 2 * max(worst(formula, exact), luck)
    if copies is not None:
        assert same_bits(copies, rounded(found, half))


@settings(max_examples=20, deadline=None)
@given(momentum=st.floats(0.0, 1.0))
def test_float64_is_for_the_twin(momentum: float, device: torch.device) -> None:
    targets, sources = tensors(device, torch.float64), tensors(device, torch.float64)
    expected = cloned(targets)
    reference.ema_update(expected, sources, momentum)
    ema_update(targets, sources, momentum)
    torch.testing.assert_close(targets, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="the kernel takes float32, got float64"):
        ema_update(targets, sources, momentum, backend="triton")


def test_called_as_a_step_calls_it(
    backend: str, device: torch.device, called: Callable[[Any], Any]
) -> None:
    """Everything at once, and m from a schedule: one graph for all its values."""
    targets, sources = tensors(device), [*tensors(device)[:-1], torch.randn((), device=device)]
    copies = [t.bfloat16() for t in targets]
    veto = torch.zeros((), device=device)
    expected = cloned(targets)

    def step(momentum: Tensor) -> Tensor:
        return ema_update(
            targets, sources, momentum, copies=copies, veto=veto, veto_nonfinite=True,
            backend=backend,
        )  # fmt: skip

    run = called(step)
    for momentum in (0.9, 0.99, 0.5, 1.0, 0.0):
        assert not run(torch.tensor(momentum, dtype=torch.float64, device=device))
        reference.ema_update(expected, sources, momentum)
        torch.testing.assert_close(targets, expected, rtol=1e-6, atol=1e-6)
        assert same_bits(copies, rounded(targets, torch.bfloat16))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.99925, 1.0])
@pytest.mark.parametrize("stop", [False, True])
def test_the_twin_need_not_look_at_the_veto(
    momentum: float, stop: bool, device: torch.device
) -> None:
    """On a GPU it may not; there it chooses element by element, to the same bits."""
    targets, sources = tensors(device), tensors(device, torch.bfloat16)
    sources[0][0, 0] = torch.nan if stop or momentum == 1.0 else 1.0
    copies = [t.bfloat16() for t in targets]
    on_host, on_device = (cloned(targets), cloned(copies)), (cloned(targets), cloned(copies))
    _mix_on_host(on_host[0], sources, on_host[1], momentum, stop)
    exact = torch.tensor(momentum, dtype=torch.float64, device=device)
    _mix_on_device(on_device[0], sources, on_device[1], exact, torch.tensor(stop, device=device))
    for one, other in zip(on_host, on_device, strict=True):
        assert same_bits(one, other)
    assert same_bits(on_host[0], targets) == (stop or momentum == 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_may_be_a_tensor(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    targets, sources = tensors(device), tensors(device)
    by_number, by_tensor = cloned(targets), cloned(targets)
    ema_update(by_number, sources, 0.75, backend=backend)
    ema_update(by_tensor, sources, torch.tensor(0.75, dtype=dtype, device=device), backend=backend)
    assert same_bits(by_number, by_tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_a_veto_leaves_every_bit(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    targets, sources = tensors(device), tensors(device)
    copies = [torch.full_like(t, 7.0, dtype=torch.bfloat16) for t in targets]
    before = cloned(targets), cloned(copies)
    veto = torch.ones((), dtype=dtype, device=device)
    assert ema_update(targets, sources, 0.9, copies=copies, veto=veto, backend=backend)
    assert same_bits(targets, before[0])
    assert same_bits(copies, before[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 4098, -1])
def test_a_source_that_is_not_finite_vetoes_all(
    backend: str, value: float, dtype: torch.dtype, place: int, device: torch.device
) -> None:
    targets, sources = tensors(device), tensors(device, dtype)
    before = cloned(targets)
    largest = torch.finfo(dtype).max
    sources[5].view(-1)[7] = largest
    assert not ema_update(cloned(targets), sources, 0.9, veto_nonfinite=True, backend=backend)
    sources[5].view(-1)[place] = value
    assert ema_update(targets, sources, 0.9, veto_nonfinite=True, backend=backend)
    assert same_bits(targets, before)
    # Unasked, it is a source like any other.
    assert not ema_update(targets, sources, 0.9, backend=backend)
    assert not targets[5].isfinite().all()


def test_a_momentum_of_one_leaves_every_bit(backend: str, device: torch.device) -> None:
    targets, sources = tensors(device), tensors(device)
    targets[0][0, :2] = torch.tensor([-0.0, 1e-42])  # the second is subnormal
    sources[0][0, :3] = torch.tensor([1.0, 1.0, torch.nan])
    before = cloned(targets)
    for momentum in (1.0, torch.ones((), device=device)):
        ema_update(targets, sources, momentum, backend=backend)
        assert same_bits(targets, before)


def test_a_momentum_of_zero_gives_the_source(backend: str, device: torch.device) -> None:
    targets, sources = [1e4 * t for t in tensors(device)], tensors(device)
    ema_update(targets, sources, 0.0, backend=backend)
    assert same_bits(targets, sources)


def test_a_thousand_small_steps_do_not_drift(backend: str, device: torch.device) -> None:
    """Towards a far source they arrive where they should; at the source they stay.

    Triton's interpreter, slow as it is, takes some of them.
    """
    steps = 150 if backend == "triton" and device.type == "cpu" else 1000
    far, near = torch.zeros(8, device=device), torch.randn(8, device=device)
    sources = [torch.ones(8, device=device), near.clone()]
    for _ in range(steps):
        ema_update([far, near], sources, 0.99925, backend=backend)
    torch.testing.assert_close(far, torch.full_like(far, 1 - 0.99925**steps), rtol=1e-5, atol=0)
    assert torch.equal(near, sources[1])


def layouts(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets without gaps and sources of other layouts."""
    yield torch.randn(6, 8, device=device).t(), torch.randn(8, 6, device=device)
    yield torch.randn(8, 6, device=device), torch.randn(8, 12, device=device)[:, ::2]
    yield torch.randn(8, 6, device=device), torch.randn(6, device=device).expand(8, 6)
    image = torch.randn(2, 3, 4, 5, device=device)
    yield image.to(memory_format=torch.channels_last), image.clone()


def test_other_strides(backend: str, device: torch.device) -> None:
    for target, source in layouts(device):
        expected = [target.clone()]
        reference.ema_update(expected, [source], 0.7)
        copy = target.bfloat16()
        ema_update([target], [source], 0.7, copies=[copy], backend=backend)
        torch.testing.assert_close(target, expected[0], rtol=1e-6, atol=1e-6)
        assert same_bits([copy], rounded([target], torch.bfloat16))


def test_memory_that_changes_hands_is_not_confused(backend: str, device: torch.device) -> None:
    """The kernel's table is kept by address: other tensors in the same memory, other sizes."""
    pool, source = torch.zeros(9000, device=device), torch.ones(9000, device=device)
    for cut in (9000, 5, 4096, 5, 9000):
        pool.zero_()
        ema_update([pool[:cut]], [source[:cut]], 0.25, backend=backend)
        assert torch.equal(pool, 0.75 * (torch.arange(9000, device=device) < cut))


def test_nothing_to_move(backend: str, device: torch.device) -> None:
    none = [torch.zeros(0, 3, device=device)]
    assert not ema_update(none, none, 0.9, veto_nonfinite=True, backend=backend)
    veto = torch.ones((), device=device)
    assert ema_update(none, none, 0.9, veto=veto, backend=backend)


def test_two_runs_give_the_same_bits(backend: str, device: torch.device) -> None:
    targets, sources = tensors(device), tensors(device, torch.bfloat16)
    one, other = cloned(targets), cloned(targets)
    for run in (one, other):
        ema_update(run, sources, 0.99925, veto_nonfinite=True, backend=backend)
    assert same_bits(one, other)


def test_it_is_a_well_behaved_op(backend: str, device: torch.device) -> None:
    targets, sources = tensors(device), tensors(device)
    copies = [t.bfloat16() for t in targets]
    momentum = torch.tensor(0.9, device=device)
    veto = torch.zeros(1, device=device)
    for extra in (
        (copies, 1.0, momentum, veto, True, backend),
        ([], 0.9, None, None, False, backend),
    ):
        torch.library.opcheck(_ema_update, (targets, sources, *extra))


def test_parameters_are_updated_in_place(backend: str, device: torch.device) -> None:
    """As a training step calls it: frozen targets, and sources that require gradients."""
    target, source = torch.nn.Linear(3, 2, device=device), torch.nn.Linear(3, 2, device=device)
    expected = [
        0.5 * (t + s) for t, s in zip(target.parameters(), source.parameters(), strict=True)
    ]
    ema_update(list(target.parameters()), list(source.parameters()), 0.5, backend=backend)
    for found, wanted in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.requires_grad
        assert found.is_leaf


@pytest.mark.parametrize(
    ("targets", "sources", "options", "words"),
    [
        ([torch.zeros(2)], [torch.zeros(2)], {"momentum": 1.5}, "momentum: expected a value in"),
        (
            [torch.zeros(2)], [torch.zeros(2)], {"momentum": torch.tensor(-0.5)},
            r"momentum: expected a value in \[0, 1\], got -0\.5",
        ),
        (
            [torch.zeros(2)], [torch.zeros(2)], {"momentum": torch.tensor([0.5])},
            "momentum: expected a 0-d float32 or float64 tensor",
        ),
        ([], [], {}, "targets: expected at least one"),
        ([torch.zeros(2)], [], {}, "sources: expected 1 tensors, got 0"),
        ([torch.zeros(2)], [torch.zeros(3)], {}, r"sources\[0\]: expected shape \(2,\)"),
        ([torch.zeros(2)], [torch.zeros(2).double()], {}, r"sources\[0\]: .* no wider than"),
        ([torch.zeros(2)], [torch.zeros(2, device="meta")], {}, r"sources\[0\]: .* on meta"),
        ([torch.zeros(2).bfloat16()], [torch.zeros(2)], {}, r"targets\[0\]: expected float32"),
        ([torch.zeros(4)[::2]], [torch.zeros(2)], {}, r"targets\[0\]: .* without gaps"),
        ([torch.zeros(1).expand(2)], [torch.zeros(2)], {}, r"targets\[0\]: .* without gaps"),
        ([torch.zeros(2)], [torch.zeros(2)], {"copies": []}, "copies: expected 1 tensors, got 0"),
        (
            [torch.zeros(2)], [torch.zeros(2)], {"copies": [torch.zeros(2)]},
            r"copies\[0\]: expected bfloat16 or float16",
        ),
        (
            [torch.zeros(2)], [torch.zeros(2)], {"copies": [torch.zeros(4).half()[::2]]},
            r"copies\[0\]: .* strides \(1,\)",
        ),
        (
            [torch.zeros(2)], [torch.zeros(2)], {"veto": torch.zeros(2)},
            "veto: expected one element",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    targets: list[Tensor], sources: list[Tensor], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ema_update(targets, sources, **{"momentum": 0.9, **options})


@pytest.mark.gpu
def test_hundred_runs_on_a_gpu_give_the_same_bits(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    shapes = ((1024, 4096), (4096,), (1023, 1001))
    targets, sources = tensors(device, shapes=shapes), tensors(device, torch.bfloat16, shapes)
    first = cloned(targets)
    ema_update(first, sources, 0.99925, veto_nonfinite=True)
    for _ in range(100):
        again = cloned(targets)
        ema_update(again, sources, 0.99925, veto_nonfinite=True)
        assert same_bits(first, again)


@pytest.mark.gpu
def test_it_takes_no_memory_but_its_table(device: torch.device) -> None:
    """32 bytes for 4096 elements, and the flag."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    targets, sources = ([torch.randn(4096, 4097, device=device)] for _ in range(2))
    ema_update(targets, sources, 0.99925)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ema_update(targets, sources, 0.99925)
    assert torch.cuda.max_memory_allocated() - before <= 512
