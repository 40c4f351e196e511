"""The least work of each case against numbers counted by hand, and the shapes they come from."""

import pytest
import torch

from fastjepa.bench.shapes import SETS, SHAPES, TINY, Shape, named
from fastjepa.bench.ways import CASES, cases_named
from fastjepa.model import build_encoder

# The tiny shape, by hand: ViT-tiny has 192 channels, 3 heads of 64, 4 levels, so 768 channels of
# prediction; 2 clips of 2 x 4 x 4 = 32 tokens; kept in each clip: context 8 and 8, predicted 22 and
# 24. Rows of all: context 2 * 16 = 32, predicted 2 * 46 = 92, together 124. float32.
BY_HAND = {
    # z, gradient and target of 768 floats, an int64 index and a float weight a row
    "dense_l1": 124 * (3 * 768 * 4 + 8 + 4),
    "dense_l1_overwriting": 124 * (3 * 768 * 4 + 8 + 4),
    # rows of 384 and their gradients, target, index; weights of context rows; two heads and theirs
    "linear_dense_l1": 124 * (2 * 384 * 4 + 768 * 4 + 8) + 32 * 4 + 2 * 2 * (768 * 384 + 768) * 4,
    "mask_distance": 124 * 8 + 32 * 4,
    # forward and backward read and write q, k and v; an index a row; cos and sin of 32 tokens
    "rope3d": 2 * (2 * 32 * 3 * 192 * 4 + 32 * 8 + 32 * 64 * 4),
    # q and k of 64 tokens
    "rope3d_": 2 * 64 * 2 * 192 * 4 + 32 * 64 * 4,
    # 32 rows read, written, their gradients read; that of 64 tokens written; indices and embedding
    # forward and backward
    "gather_tokens": (3 * 32 + 64) * 192 * 4 + 2 * 32 * 8 + 2 * 192 * 4,
    # context rows and sequences, forward and backward; indices; mask token and embedding, with
    # gradients
    "assemble_tokens": 2 * (32 + 124) * 384 * 4 + 124 * 8 + 4 * 384 * 4,
    # forward q, k, v and the output; backward these, its gradient and three more
    "packed_attention": (4 + 8) * 124 * 384 * 4,
    "ema_update": 3 * 4 * sum(p.numel() for p in build_encoder("vit_tiny").parameters()),
}


def test_the_tiny_shape_is_as_counted_by_hand() -> None:
    counts = [
        [index.shape for index in groups] for groups in (TINY.masks.context, TINY.masks.predict)
    ]
    assert counts == [[(2, 8), (2, 8)], [(2, 22), (2, 24)]]
    assert (TINY.context_rows, TINY.predict_rows, TINY.num_tokens) == (32, 92, 32)


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_counted_by_hand(name: str) -> None:
    assert CASES[name].work(TINY).bytes == BY_HAND[name]


def test_operations_are_those_of_three_products() -> None:
    """Predictions, and the gradients of rows and weights: two operations a multiply-add."""
    assert CASES["linear_dense_l1"].work(TINY).flops == 3 * 2 * 124 * 768 * 384
    assert CASES["dense_l1"].work(TINY).flops == 0


def test_operations_of_attention_are_those_of_seven_products() -> None:
    """Two clips with sequences of 8 + 22 and of 8 + 24 tokens, 384 channels."""
    squares = 2 * (30**2 + 32**2)
    assert CASES["packed_attention"].work(TINY).flops == 7 * 2 * squares * 384


def test_bytes_of_activations_follow_their_dtype() -> None:
    half = Shape("half", TINY.model, TINY.pixels, TINY.frames, TINY.batch, torch.bfloat16)
    # Predictions and gradients shrink, targets, indices and weights stay.
    saved = BY_HAND["dense_l1"] - CASES["dense_l1"].work(half).bytes
    assert saved == 124 * 2 * 768 * 2
    assert CASES["ema_update"].work(half) == CASES["ema_update"].work(TINY)


def test_the_loss_of_the_released_batch_moves_what_the_official_code_could() -> None:
    """At ViT-L and batch 48 the ideal is 4.3 GiB; masks of another batch keep a few tokens more or
    less."""
    released = Shape("released", "vit_large", 256, 16, 48, torch.bfloat16)
    assert CASES["dense_l1"].work(released).bytes / 2**30 == pytest.approx(4.3, rel=0.1)


def test_inputs_hold_the_rows_that_are_counted() -> None:
    case = CASES["dense_l1"](TINY, torch.device("cpu"))
    (z_RE,) = case.leaves
    assert z_RE.shape == (TINY.num_rows, 768)


def test_shapes_are_those_to_be_measured() -> None:
    gpu = {(s.model, s.pixels, s.frames, s.batch) for s in SETS["gpu"]}
    assert gpu >= {
        ("vit_large", 256, 16, 24), ("vit_giant", 256, 16, 24), ("vit_gigantic", 256, 16, 12),
    }  # fmt: skip
    assert any(frames == 64 for _, _, frames, _ in gpu)
    assert all(shape.dtype == torch.bfloat16 for shape in SETS["gpu"])
    assert any((s.pixels, s.frames, s.batch) == (256, 16, 8) for s in SETS["cpu"])


def test_names_are_shapes_or_sets_and_count_once() -> None:
    first = SETS["cpu"][0].name
    assert named([first, "cpu"]) == list(SETS["cpu"])
    assert named(list(SHAPES)) == list(SHAPES.values())
    assert cases_named([]) == list(CASES.values())
    assert cases_named(["rope3d", "rope3d"]) == [CASES["rope3d"]]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"--shape vitl-256px-16f-b25: did you mean .*-b24"):
        named(["vitl-256px-16f-b25"])
    with pytest.raises(ValueError, match=r"--op mask_distanse: did you mean mask_distance"):
        cases_named(["mask_distanse"])
    with pytest.raises(ValueError, match=r"--op zzz: expected one of dense_l1"):
        cases_named(["zzz"])
