"""Checkpointed blocks give the same gradients; with attention kept it runs once, and is kept."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastjepa.bench.memory import peak_and_kept
from fastjepa.model import Encoder, Predictor, attention
from fastjepa.model.attention import backend_named
from fastjepa.model.block import blocks_of
from fastjepa.observe.flops import EncoderNumbers, PredictorNumbers, TokenNumbers, step_flops
from fastjepa.observe.footprint import step_activations
from fastjepa_kernels.packed_attention import avx512

CPU = torch.device("cpu")
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
KINDS = {
    "plain": {},
    "checkpointed": {"checkpointing": True},
    "attention kept": {"checkpointing": True, "keep_attention": True},
}


def encoder(kind: str, attention: str, width: int = 24) -> Encoder:
    torch.manual_seed(0)
    return Encoder(
        width=width, depth=3, heads=2, mlp_width=96, levels=[0, 2], patch=8, attention=attention,
        **KINDS[kind],  # type: ignore[arg-type]
    )  # fmt: skip


def gradients(network: Encoder, index: Tensor) -> list[Tensor]:
    clip = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    levels = network(clip, [index, index[:, :5]])
    torch.stack([level.square().sum() for level in levels]).sum().backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["auto", "math"])
@pytest.mark.parametrize("kind", ["checkpointed", "attention kept"])
def test_gradients_are_those_of_plain_blocks(kind: str, attention: str) -> None:
    index = torch.arange(20).expand(2, -1)
    ours, plain = (gradients(encoder(k, attention), index) for k in (kind, "plain"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["checkpointed", "attention kept"])
def test_what_is_measured_on_the_way_is_not_the_blocks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the first pass times the attention backends, inside a checkpointed block."""
    sdpa = backend_named("sdpa")
    monkeypatch.setattr(attention, "candidates", lambda *_: [sdpa, replace(sdpa, name="other")])
    monkeypatch.setattr(attention, "_fastest", {})
    index, found = torch.arange(20).expand(2, -1), []
    for each in (kind, "plain"):
        network = encoder(each, "auto")
        for block in blocks_of(network):
            block.by_hand = None
        found.append(gradients(network, index))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "runs"), [("checkpointed", 2), ("attention kept", 1)])
def test_kept_attention_runs_once(kind: str, runs: int) -> None:
    network, index = encoder(kind, "auto"), torch.arange(20).expand(2, -1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        gradients(network, index)
    # A call that is answered from what was kept allocates no output.
    calls = sum(
        event.name == FLASH and any("empty" in child.name for child in event.cpu_children)
        for event in record.events() or ()
    )
    assert calls == runs * 3 * 2  # blocks, mask groups


@pytest.mark.parametrize(("kind", "runs"), [("checkpointed", 2), ("attention kept", 1)])
@pytest.mark.parametrize("by_hand", ["auto", None])
def test_attention_by_our_kernels_is_kept_too(by_hand: str | None, kind: str, runs: int) -> None:
    refusal = avx512.refusal(CPU, torch.float32, 32)
    if refusal is not None:
        pytest.skip(refusal)
    network, index = encoder(kind, "auto", width=64), torch.arange(16).expand(1, -1)
    for block in blocks_of(network):
        block.by_hand = by_hand
    clip, calls = torch.randn(1, 3, 4, 32, 32), []
    run = avx512._run

    def counted(name: str, *arguments: object) -> None:
        calls.append(name)
        run(name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avx512, "_run", counted)
        network(clip, [index])[-1].sum().backward()
    assert calls.count("forward") == runs * 3  # blocks
    assert calls.count("backward") == 3


def test_the_predictor_takes_it_too() -> None:
    found = []
    for kind in KINDS.values():
        torch.manual_seed(0)
        predictor = Predictor(
            encoder_width=16, num_levels=1, width=24, depth=2, heads=2, patch=8,
            **kind,  # type: ignore[arg-type]
        )  # fmt: skip
        context, predict = torch.arange(6).expand(2, -1), torch.arange(6, 16).expand(2, -1)
        levels = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
        rows, _ = predictor([levels], [context], [predict], (1, 4, 4), image=True)
        rows.square().sum().backward()
        found.append([p.grad for p in predictor.parameters() if p.grad is not None])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_is_kept_lies_between_the_input_alone_and_everything() -> None:
    index, kept = torch.arange(128).expand(2, -1), {}
    clip = torch.randn(2, 3, 4, 64, 64)
    for kind in KINDS:
        network = encoder(kind, "auto")
        kept[kind] = peak_and_kept(lambda n=network: n(clip, [index]), CPU)[1]  # type: ignore[misc]
    assert kept["checkpointed"] < kept["attention kept"] < kept["plain"]


def test_planned_numbers_know_it() -> None:
    sizes = EncoderNumbers(24, 3, 2, 96, 2), PredictorNumbers(24, 2, 2, 96, 24, 2, 48)
    tokens = TokenNumbers(64, (20,), (40,))
    whole, less = (
        step_flops(*sizes, tokens, batch=2, checkpointing=True, keep_attention=kept)
        for kept in (False, True)
    )
    attention = 2 * (3 * 4 * 20**2 * 24 + 2 * 4 * 60**2 * 24)
    assert whole.recompute - less.recompute == attention
    held = [
        step_activations(*sizes, tokens, batch=2, **kind).total  # type: ignore[arg-type]
        for kind in KINDS.values()
    ]
    assert held[1] < held[2] < held[0]
