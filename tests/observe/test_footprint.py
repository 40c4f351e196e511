"""The estimate against what autograd keeps for a plain PyTorch block, and its bookkeeping."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.observe.flops import EncoderNumbers, PredictorNumbers, TokenNumbers
from fastjepa.observe.footprint import Footprint, block_activations, step_footprint

ENCODER = EncoderNumbers(64, 4, 2, 256, 2)
PREDICTOR = PredictorNumbers(32, 3, 2, 128, 64, 2, 128)
TOKENS = TokenNumbers(128, (40, 10), (60, 100))


def footprint(tokens: TokenNumbers = TOKENS, **more: bool) -> Footprint:
    return step_footprint(ENCODER, PREDICTOR, tokens, batch=2, **more)


@pytest.mark.parametrize("scores", [False, True])
def test_a_blocks_activations_are_what_autograd_keeps(scores: bool) -> None:
    width, mlp_width, heads, tokens = 64, 256, 2, 96
    norm1, norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    qkv, proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
    fc1, fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
    weights = {
        p.untyped_storage().data_ptr()
        for m in (norm1, norm2, qkv, proj, fc1, fc2)
        for p in m.parameters()
    }
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    x = torch.randn(1, tokens, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        q, k, v = qkv(norm1(x)).view(1, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        if scores:
            y = ((q @ k.transpose(-1, -2)) * (width // heads) ** -0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        x = x + proj(y.transpose(1, 2).reshape(1, tokens, width))
        x = x + fc2(F.gelu(fc1(norm2(x))))
    estimate = block_activations(width, mlp_width, heads, tokens, 4, scores=scores)
    assert estimate == pytest.approx(sum(kept.values()), rel=0.15)


def test_states_are_counted_in_float32() -> None:
    memory = footprint()
    assert memory.gradients == memory.weights
    assert memory.optimizer == 2 * memory.weights
    assert memory.target < memory.weights
    assert memory.total == 4 * memory.weights + memory.target + memory.activations


def test_checkpointing_and_a_narrower_dtype_save_and_scores_cost() -> None:
    plain = footprint()
    assert footprint(checkpointing=True).context_activations < plain.context_activations
    assert footprint(scores=True).predictor_activations > plain.predictor_activations
    wide = step_footprint(ENCODER, PREDICTOR, TOKENS, batch=2, value_bytes=4)
    assert plain.activations < wide.activations < 2 * plain.activations


def test_groups_are_alive_together() -> None:
    first = footprint(TokenNumbers(128, (40,), (60,)))
    second = footprint(TokenNumbers(128, (10,), (100,)))
    both = footprint()
    assert both.context_activations == first.context_activations + second.context_activations
    assert both.predictor_activations == first.predictor_activations + second.predictor_activations
