"""The estimate against what autograd keeps for a plain PyTorch block, and its bookkeeping; a whole
step's is in tests/test_estimate.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.observe.flops import EncoderNumbers, PredictorNumbers, TokenNumbers
from fastjepa.observe.footprint import Activations, block_activations, step_activations

ENCODER = EncoderNumbers(64, 4, 2, 256, 2)
PREDICTOR = PredictorNumbers(32, 3, 2, 128, 64, 2, 128)
TOKENS = TokenNumbers(128, (40, 10), (60, 100))


def held(tokens: TokenNumbers = TOKENS, **more: Any) -> Activations:
    return step_activations(ENCODER, PREDICTOR, tokens, batch=2, **more)


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


def test_checkpointing_and_a_narrower_dtype_save_and_scores_cost() -> None:
    plain = held()
    saved = held(checkpointing=True)
    assert saved.context < plain.context
    assert saved.predictor < plain.predictor
    assert plain.recomputed == 0 < saved.recomputed
    encoder = held(checkpointing="encoder")
    assert (encoder.context, encoder.predictor) == (saved.context, plain.predictor)
    assert 0 < encoder.recomputed <= saved.recomputed
    assert held(scores=True).predictor > plain.predictor
    assert plain.total < held(value_bytes=4).total < 2 * plain.total
    assert held(checkpointing=True, stream_bytes=2).predictor < saved.predictor


def test_a_clip_is_float32_pixels() -> None:
    # 128 tokens of 2 frames x 16 x 16 pixels in 3 colours.
    assert held().clip == 2 * 128 * 2 * 16 * 16 * 3 * 4
    assert held(TokenNumbers(128, (40,), (60,), image=True)).clip == held().clip // 2


def test_all_but_the_heads_gradients_grows_with_the_batch() -> None:
    one, three, five = (
        step_activations(ENCODER, PREDICTOR, TOKENS, batch=batch).total for batch in (1, 3, 5)
    )
    assert five - three == three - one
    assert one - (three - one) // 2 == 2 * (32 + 1) * 128 * 4


def test_groups_are_alive_together_unless_they_take_turns() -> None:
    first = held(TokenNumbers(128, (40,), (60,)))
    second = held(TokenNumbers(128, (10,), (100,)))
    both, turns = held(), held(in_turn=True)
    # Packed into one pass, both groups' attention outputs are copied behind one another.
    copies = 2 * 4 * (40 + 10) * 64 * 2
    assert both.context == first.context + second.context + copies
    assert both.predictor > first.predictor + second.predictor
    # Two clips: both of the first group, then one by one.
    assert turns.predictor == max(first.predictor, second.predictor // 2)
    assert turns.context == both.context
    assert turns.total < both.total
