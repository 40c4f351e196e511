"""The predictor: released names, grid told at each call, order without meaning."""

import pytest
import torch
from torch import Tensor

from fastjepa.model import Predictor

GRID = (2, 4, 4)


def small(**changes: object) -> Predictor:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "encoder_width": 8, "num_levels": 2, "width": 16, "depth": 2, "heads": 2,
        "num_mask_tokens": 3,
    }  # fmt: skip
    predictor = Predictor(**{**sizes, **changes})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return predictor


CONTEXT = torch.tensor([[0, 5, 9], [1, 2, 30]])
PREDICT = torch.tensor([[3, 31, 7, 12], [0, 4, 6, 29]])


def levels(count: int = 2, rows: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 8, generator=generator) for _ in range(count)]


def test_rows_come_back_by_kind_with_a_head_each() -> None:
    predictor = small()
    predicted, context = predictor(levels(), [CONTEXT], [PREDICT], GRID, image=False)
    assert predicted.shape == (8, 16)
    assert context.shape == (6, 16)
    z, z_context = predictor.predict(levels(), [CONTEXT], [PREDICT], GRID, image=False)
    torch.testing.assert_close(z, predictor.predictor_proj(predicted))
    torch.testing.assert_close(z_context, predictor.predictor_proj_context(context))
    assert z.shape == (8, 2 * 8)


def test_names_are_the_released_ones() -> None:
    state = small().state_dict()
    outside = {name for name in state if not name.startswith("predictor_blocks.")}
    expected = {"img_mod_embed", "video_mod_embed", *(f"mask_tokens.{i}" for i in range(3))}
    for part in ("predictor_embed.0", "predictor_embed.2", "predictor_norm", "predictor_proj",
                 "predictor_proj_context"):  # fmt: skip
        expected |= {f"{part}.weight", f"{part}.bias"}
    assert outside == expected
    assert state["predictor_embed.0.weight"].shape == (8, 16)
    assert state["predictor_embed.2.weight"].shape == (16, 8)
    assert {name.split(".", 2)[2] for name in state if name.startswith("predictor_blocks.")} == {
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("levels", "depth", "out", "keys"), [(4, 24, None, 308), (1, 12, 1664, 162)]
)
def test_released_predictors_have_their_key_counts(
    levels: int, depth: int, out: int | None, keys: int
) -> None:
    with torch.device("meta"):
        predictor = Predictor(encoder_width=1024, num_levels=levels, depth=depth, out_width=out)
    assert len(predictor.state_dict()) == keys
    assert predictor.predictor_proj.out_features == levels * (out or 1024)


def test_a_predictor_of_one_level_embeds_by_one_product() -> None:
    predictor = small(num_levels=1, out_width=20)
    state = predictor.state_dict()
    assert {n for n in state if n.startswith("predictor_embed")} == {
        "predictor_embed.weight", "predictor_embed.bias",
    }  # fmt: skip
    z, z_context = predictor.predict(levels(1), [CONTEXT], [PREDICT], GRID, image=False)
    assert z.shape == (8, 20)
    assert z_context.shape == (6, 20)


def test_the_order_of_predicted_tokens_means_nothing() -> None:
    predictor = small().double()
    rows = [level.double() for level in levels()]
    order = torch.tensor([2, 0, 3, 1])
    straight, context = predictor(rows, [CONTEXT], [PREDICT], GRID, image=False)
    mixed, same = predictor(rows, [CONTEXT], [PREDICT[:, order]], GRID, image=False)
    torch.testing.assert_close(mixed.view(2, 4, -1), straight.view(2, 4, -1)[:, order])
    torch.testing.assert_close(same, context)


def test_groups_packed_together_equal_separate_passes() -> None:
    predictor = small().double()
    rows = [level.double() for level in levels(rows=6 + 4)]
    others = (torch.tensor([[8, 9], [0, 31]]), torch.tensor([[1], [2]]))
    predicted, context = predictor(
        rows, [CONTEXT, others[0]], [PREDICT, others[1]], GRID, image=True
    )
    first = predictor([r[:6] for r in rows], [CONTEXT], [PREDICT], GRID, image=True)
    second = predictor([r[6:] for r in rows], [others[0]], [others[1]], GRID, image=True)
    torch.testing.assert_close(predicted, torch.cat((first[0], second[0])))
    torch.testing.assert_close(context, torch.cat((first[1], second[1])))


def test_the_grid_is_told_at_each_call() -> None:
    predictor = small()
    wide, _ = predictor(levels(), [CONTEXT], [PREDICT], (2, 4, 4), image=False)
    tall, _ = predictor(levels(), [CONTEXT], [PREDICT], (1, 2, 16), image=False)
    large, _ = predictor(levels(), [CONTEXT], [PREDICT], (4, 24, 24), image=False)
    assert not torch.allclose(wide, tall)
    assert not torch.allclose(wide, large)


def test_only_the_first_mask_token_and_the_modalitys_embedding_are_used() -> None:
    predictor = small()
    predicted, context = predictor(levels(), [CONTEXT], [PREDICT], GRID, image=True)
    (predicted.sum() + context.square().sum()).backward()
    unused = {name for name, p in predictor.named_parameters() if p.grad is None}
    assert unused == {
        "mask_tokens.1", "mask_tokens.2", "video_mod_embed", "predictor_proj.weight",
        "predictor_proj.bias", "predictor_proj_context.weight", "predictor_proj_context.bias",
    }  # fmt: skip


def test_activation_checkpointing_changes_no_bit() -> None:
    grads = []
    for checkpointing in (False, True):
        predictor = small(checkpointing=checkpointing)
        predicted, context = predictor(levels(), [CONTEXT], [PREDICT], GRID, image=False)
        (predicted.square().mean() + context.square().mean()).backward()
        grads.append({n: p.grad for n, p in predictor.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_initial_weights_have_the_released_scale() -> None:
    torch.manual_seed(0)
    predictor = Predictor(encoder_width=64, num_levels=4, width=96, depth=2, heads=3)
    assert len(predictor.mask_tokens) == 8
    assert not any(token.any() for token in predictor.mask_tokens)
    assert predictor.img_mod_embed.abs().max().item() < 1e-5
    assert predictor.predictor_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    last = predictor.predictor_blocks[1].get_parameter("mlp.fc2.weight")
    assert last.std().item() == pytest.approx(0.02 / 2, rel=0.03)
