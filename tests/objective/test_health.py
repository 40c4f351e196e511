"""Indicators on tensors whose answer is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastjepa.model import Encoder, Predictor
from fastjepa.objective.health import (
    effective_rank,
    feature_norm,
    feature_std,
    gradient_norms,
    part_of,
    target_drift,
)


def test_feature_std_is_taken_over_tokens_and_averaged_over_channels() -> None:
    x_BND = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[0.0, 1.0], [2.0, 1.0]]], requires_grad=True)
    std = feature_std(x_BND)
    assert std.shape == ()
    assert std.dtype == torch.float32
    assert not std.requires_grad
    assert std.item() == 0.5
    assert feature_std(torch.ones(2, 5, 7, dtype=torch.bfloat16)).item() == 0.0


def test_feature_norm_is_a_tokens_length_on_average() -> None:
    x_BND = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [6.0, 8.0]]], requires_grad=True)
    norm = feature_norm(x_BND)
    assert norm.shape == ()
    assert not norm.requires_grad
    assert norm.item() == 4.0
    with pytest.raises(ValueError, match="tokens, channels"):
        feature_norm(torch.zeros(0, 3))


@given(st.integers(1, 12))
def test_effective_rank_counts_equal_directions(rank: int) -> None:
    x_ND = torch.eye(12)[:rank].repeat(5, 1)
    assert effective_rank(x_ND).item() == pytest.approx(rank, rel=1e-4)


def test_effective_rank_is_rankmes_formula() -> None:
    x_ND = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        0, -3, 16
    )
    share = torch.linalg.svdvals(x_ND.double())
    share = share / share.sum()
    expected = torch.exp(-(share * share.log()).sum()).item()
    assert effective_rank(x_ND).item() == pytest.approx(expected, rel=1e-4)
    assert effective_rank(x_ND.reshape(3, 100, 16)).item() == pytest.approx(expected, rel=1e-4)
    assert effective_rank(7.0 * x_ND).item() == pytest.approx(expected, rel=1e-4)


def test_effective_rank_looks_at_a_bounded_evenly_spaced_sample() -> None:
    x_ND = torch.zeros(4000, 8)
    x_ND[::10] = torch.eye(8).repeat(50, 1)
    assert effective_rank(x_ND, rows=400).item() == pytest.approx(8.0, rel=1e-4)


def test_effective_rank_of_nothing_is_one() -> None:
    assert effective_rank(torch.zeros(10, 4)).item() == 1.0
    assert effective_rank(torch.ones(10, 4)).item() == pytest.approx(1.0, abs=1e-4)


def test_indicators_refuse_tensors_without_tokens() -> None:
    for indicator in (feature_std, effective_rank):
        with pytest.raises(ValueError, match=r"\(0, 4\)"):
            indicator(torch.zeros(0, 4))


def test_target_drift_is_a_relative_distance() -> None:
    reference = torch.tensor([[3.0, 4.0]])
    assert target_drift(reference, reference).item() == 0.0
    assert target_drift(1.5 * reference, reference).item() == pytest.approx(0.5)
    small = reference + torch.tensor([[0.0, 5e-6]])
    assert target_drift(small, reference).item() == pytest.approx(1e-6, rel=0.1)
    with pytest.raises(ValueError, match="differ in shape"):
        target_drift(reference, reference[0])


NAMES = {
    "encoder.patch_embed.proj.weight": "tokenizer",
    "encoder.patch_embed_img.proj.bias": "tokenizer",
    "encoder.video_mod_embed": "tokenizer",
    "img_mod_embed": "tokenizer",
    "encoder.blocks.0.attn.qkv.weight": "encoder_blocks",
    "blocks.11.norm1.bias": "encoder_blocks",
    "encoder.norms_block.3.weight": "encoder_norms",
    "predictor.predictor_embed.0.weight": "predictor_embed",
    "predictor.predictor_embed.weight": "predictor_embed",
    "predictor.mask_tokens.0": "predictor_embed",
    "predictor.video_mod_embed": "predictor_embed",
    "predictor_blocks.3.mlp.fc1.weight": "predictor_blocks",
    "predictor.predictor_blocks.0.attn.proj.weight": "predictor_blocks",
    "predictor.predictor_norm.weight": "predictor_heads",
    "predictor.predictor_proj.weight": "predictor_heads",
    "predictor.predictor_proj_context.bias": "predictor_heads",
}


@pytest.mark.parametrize(("name", "part"), NAMES.items())
def test_every_released_name_has_its_part(name: str, part: str) -> None:
    assert part_of(name) == part


def test_every_parameter_of_the_model_has_a_part() -> None:
    with torch.device("meta"):
        encoder = Encoder(width=32, depth=2, heads=2, mlp_width=64, levels=(0, 1))
        predictor = Predictor(encoder_width=32, num_levels=2, width=24, depth=1, heads=2)
    parts = {part_of(f"encoder.{name}") for name, _ in encoder.named_parameters()}
    assert parts == {"tokenizer", "encoder_blocks", "encoder_norms"}
    parts = {part_of(f"predictor.{name}") for name, _ in predictor.named_parameters()}
    assert parts == {"predictor_embed", "predictor_blocks", "predictor_heads"}


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(ValueError, match=r"'encoder\.register'"):
        part_of("encoder.register")


def test_gradient_norms_by_part_and_in_all() -> None:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in NAMES}
    for parameter in parameters.values():
        parameter.grad = torch.full((2,), 3.0)
    parameters["encoder.norms_block.3.weight"].grad = None
    norms = gradient_norms(parameters.items())
    assert "grad_norm/encoder_norms" not in norms
    assert norms["grad_norm/encoder_blocks"].item() == pytest.approx(6.0)
    assert norms["grad_norm"].item() == pytest.approx(3.0 * math.sqrt(30))
    parts = [v.item() ** 2 for k, v in norms.items() if k != "grad_norm"]
    assert sum(parts) == pytest.approx(norms["grad_norm"].item() ** 2)
    parameters["img_mod_embed"].grad = torch.tensor([math.inf, 0.0])
    assert gradient_norms(parameters.items())["grad_norm"].item() == math.inf


def test_gradient_norms_before_backward_are_refused() -> None:
    with pytest.raises(ValueError, match="after backward"):
        gradient_norms([("blocks.0.norm1.weight", nn.Parameter(torch.ones(2)))])
