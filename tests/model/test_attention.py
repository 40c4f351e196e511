"""Attention backends are exact and interchangeable; a sequence sees itself alone."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.bench.shapes import VIDEO_GROUPS
from fastjepa.config.schema import Model
from fastjepa.masking.batch import MaskMaker
from fastjepa.model import attention
from fastjepa.model.attention import BACKENDS, attend, backend_named, candidates, measured
from fastjepa.model.attention_backends import ALL, Backend, sequence_starts
from fastjepa.model.segments import Segment, segments_of
from fastjepa_kernels.packed_attention import avx512

CPU = torch.device("cpu")
HERE = [b.name for b in ALL if b.refusal(CPU, torch.float64, 8) is None]

shapes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3)


def formula(qkv_R3HC: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    out = torch.empty_like(qkv_R3HC[:, 0])
    start = 0
    for count, length in sizes:
        for _ in range(count):
            q, k, v = qkv_R3HC[start : start + length].transpose(0, 2).unbind(1)
            scores = (q @ k.mT) / qkv_R3HC.shape[-1] ** 0.5
            out[start : start + length] = (scores.softmax(-1) @ v).transpose(0, 1)
            start += length
    return out


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(["auto", *HERE]))
def test_every_backend_is_the_formula_on_each_sequence(
    sizes: list[tuple[int, int]], backend: str
) -> None:
    segments = segments_of(sizes)
    qkv = torch.randn(segments[-1].stop, 3, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(
        attend(*qkv.unbind(1), segments, backend=backend), formula(qkv, sizes)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels", [32, 64, 80, 128])
@pytest.mark.parametrize("name", [backend.name for backend in ALL])
def test_on_a_gpu_each_is_at_most_twice_as_far_off_as_the_formula(name: str, channels: int) -> None:
    """Output and gradient in bfloat16 against float64, with mask groups of unequal lengths."""
    refusal = backend_named(name).refusal(torch.device("cuda"), torch.bfloat16, channels)
    if refusal is not None:
        pytest.skip(refusal)
    sizes = [(3, 590), (3, 113), (1, 2048)]
    segments = segments_of(sizes)
    exact_in = torch.randn(segments[-1].stop, 3, 4, channels, device="cuda").bfloat16()
    upstream = torch.randn_like(exact_in[:, 0])

    def run(dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
        qkv = exact_in.to(dtype).requires_grad_()
        out = (
            formula(qkv, sizes)
            if backend == "exact"
            else attend(*qkv.unbind(1), segments, backend=backend)
        )
        (grad,) = torch.autograd.grad(out, qkv, upstream.to(dtype))
        return out.double(), grad.double()

    exact, plain = run(torch.float64, "exact"), run(torch.bfloat16, "math")
    for ours, theirs, truth in zip(run(torch.bfloat16, name), plain, exact, strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


@given(shapes)
def test_sequence_starts_mark_every_sequence(sizes: list[tuple[int, int]]) -> None:
    starts = sequence_starts(segments_of(sizes), CPU)
    assert starts.dtype == torch.int32
    lengths = [length for count, length in sizes for _ in range(count)]
    assert starts[0] == 0
    assert [int(b - a) for a, b in pairwise(starts)] == lengths


def test_segments_lie_behind_one_another() -> None:
    assert segments_of([(2, 3), (1, 4)]) == (Segment(0, 2, 3), Segment(6, 1, 4))
    rows = torch.arange(10)[:, None]
    assert segments_of([(2, 3), (1, 4)])[1].rows(rows).tolist() == [[[6], [7], [8], [9]]]


def test_the_faster_one_is_chosen() -> None:
    """The formula keeps 2 x 1024 x 1024 scores, which flash does not."""
    qkv = torch.randn(2048, 3, 8, 32, requires_grad=True)
    able = [backend_named("math"), backend_named("sdpa")]
    assert measured(able, qkv, segments_of([(2, 1024)])).name == "sdpa"


def broken(q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, segments: object) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this card")


def test_one_that_fails_is_left_out_with_a_warning() -> None:
    qkv, segments = torch.randn(8, 3, 2, 8, requires_grad=True), segments_of([(2, 4)])
    able = [replace(backend_named("math"), name="broken", run=broken), backend_named("sdpa")]
    with pytest.warns(UserWarning, match=r"broken is left out: no kernel image is available$"):
        assert measured(able, qkv, segments).name == "sdpa"
    with pytest.raises(RuntimeError, match="no kernel image"):
        measured(able[:1], qkv, segments)


@pytest.mark.parametrize("truncate", [True, False])
def test_a_run_measures_a_few_sizes(truncate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 steps of 24 clips, each with masks of its own."""
    measurements: list[Sequence[Segment]] = []

    def first(able: list[Backend], qkv: Tensor, segments: Sequence[Segment]) -> Backend:
        measurements.append(segments)
        return able[0]

    able = [backend_named("sdpa"), backend_named("math")]
    monkeypatch.setattr(attention, "candidates", lambda *_: able)
    monkeypatch.setattr(attention, "measured", first)
    monkeypatch.setattr(attention, "_fastest", {})
    monkeypatch.setattr(attention, "_lengths", {})
    masks = MaskMaker(VIDEO_GROUPS, (8, 16, 16), 24, seed=0, weigh=False, truncate=truncate)
    for step in range(50):
        segments = segments_of([tuple(index.shape) for index in masks(step).context])
        attention.fastest(torch.empty(segments[-1].stop, 1, 8), segments)
    assert 1 <= len(measurements) <= 8


def test_what_prepares_itself_for_every_length_is_for_lengths_that_recur(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = replace(backend_named("math"), name="slow", plans=True)
    monkeypatch.setattr(attention, "candidates", lambda *_: [slow, backend_named("sdpa")])
    monkeypatch.setattr(attention, "measured", lambda able, *_: able[0])
    monkeypatch.setattr(attention, "_fastest", {})
    monkeypatch.setattr(attention, "_lengths", {})

    def chosen(length: int) -> str:
        return attention.fastest(torch.empty(length, 1, 8), segments_of([(1, length)])).name

    assert {chosen(8 + step % 4) for step in range(50)} == {"slow"}
    assert {chosen(8 + step) for step in range(4, 50)} == {"sdpa"}
    assert chosen(8) == "sdpa"


def test_on_a_cpu_there_is_nothing_to_choose() -> None:
    able = avx512.refusal(CPU, torch.bfloat16, 64) is None
    assert [b.name for b in candidates(CPU, torch.bfloat16, 64)] == ["avx512" if able else "sdpa"]
    assert [b.name for b in candidates(CPU, torch.bfloat16, 24)] == ["sdpa"]


@pytest.mark.parametrize("name", [b.name for b in ALL if b.needs_cuda])
def test_one_that_cannot_run_says_why(name: str) -> None:
    qkv = torch.zeros(2, 3, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"attention: {name} cannot run here: .*(CUDA|installed)"):
        attend(*qkv.unbind(1), segments_of([(1, 2)]), backend=name)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected one of auto, avx512, sdpa, .*got 'quick'"):
        attend(*torch.zeros(3, 2, 1, 8), segments_of([(1, 2)]), backend="quick")


def test_the_recipe_knows_every_backend() -> None:
    assert get_args(Model.model_fields["attention"].annotation) == BACKENDS
