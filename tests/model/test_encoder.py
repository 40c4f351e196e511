"""The encoder: released names and sizes, visible tokens only, levels, any grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.model import Encoder, build_encoder
from fastjepa.presets import PRESETS, default_levels


def small(**changes: object) -> Encoder:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "width": 16, "depth": 4, "heads": 2, "mlp_width": 24, "levels": (0, 1, 2, 3), "patch": 8,
    }  # fmt: skip
    return Encoder(**{**sizes, **changes})  # type: ignore[arg-type]


RELEASED = {
    "vit_base": (158, 86_833_152),
    "vit_large": (302, 304_680_960),
    "vit_giant": (494, 1_013_267_968),
    "vit_gigantic": (590, 1_845_216_768),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_encoders_have_their_keys_and_sizes(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name)
    keys, count = RELEASED[name]
    assert len(encoder.state_dict()) == keys
    assert sum(p.numel() for p in encoder.parameters()) == count


def test_names_are_the_released_ones() -> None:
    block = [
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    expected = {"img_mod_embed", "video_mod_embed"}
    for part in (
        "patch_embed.proj",
        "patch_embed_img.proj",
        *(f"norms_block.{i}" for i in range(4)),
    ):
        expected |= {f"{part}.weight", f"{part}.bias"}
    expected |= {f"blocks.{i}.{name}" for i in range(4) for name in block}
    state = small().state_dict()
    assert set(state) == expected
    assert state["patch_embed.proj.weight"].shape == (16, 3, 2, 8, 8)
    assert state["patch_embed_img.proj.weight"].shape == (16, 3, 1, 8, 8)
    assert state["img_mod_embed"].shape == (1, 1, 16)


def test_levels_by_depth_are_the_released_choice() -> None:
    assert default_levels(12) == (2, 5, 8, 11)
    assert default_levels(24) == (5, 11, 17, 23)
    assert default_levels(40) == (9, 19, 29, 39)
    assert default_levels(48) == (11, 23, 37, 47)
    for depth in range(1, 60):
        levels = default_levels(depth)
        assert len(levels) == min(4, depth)
        assert levels[-1] == depth - 1
        assert list(levels) == sorted(set(levels))
        assert levels[0] >= 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_zoo_builds_by_name(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name)
    size = PRESETS[name]
    assert (encoder.width, len(encoder.blocks), encoder.levels) == (
        size.width,
        size.depth,
        size.levels,
    )


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected one of vit_tiny.*'vit_titan'"):
        build_encoder("vit_titan")


def clip(batch: int = 2, frames: int = 4, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, frames, height, width, generator=generator)


def test_levels_are_given_shallowest_first_each_through_its_norm() -> None:
    encoder = small()
    outputs = encoder(clip())
    assert [tuple(o.shape) for o in outputs] == [(2 * 32, 16)] * 4
    for i, output in enumerate(outputs):
        norm = encoder.norms_block[i]
        assert isinstance(norm, torch.nn.LayerNorm)
        raw = (output - norm.bias) / norm.weight
        torch.testing.assert_close(raw.mean(-1), torch.zeros(64), rtol=0, atol=1e-5)
    some = encoder(clip(), levels=(1, 3))
    torch.testing.assert_close(some[0], outputs[1])
    torch.testing.assert_close(some[1], outputs[3])


def test_blocks_beyond_the_last_wanted_level_do_not_run() -> None:
    encoder = small()
    before = encoder(clip(), levels=(1,))
    for block in encoder.blocks[2:]:
        for parameter in block.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
    assert torch.equal(encoder(clip(), levels=(1,))[0], before[0])


def test_dense_features_are_the_last_level_on_its_grid() -> None:
    encoder = small()
    features = encoder.features(clip(height=24))
    assert features.shape == (2, 2, 3, 4, 16)
    last = encoder(clip(height=24))[-1]
    torch.testing.assert_close(features.flatten(0, 3), last)
    both = encoder.features(clip(), levels=(0, 3))
    assert [tuple(f.shape) for f in both] == [(2, 2, 4, 4, 16)] * 2


def test_features_of_images_and_pooled_features() -> None:
    encoder = small()
    image = clip(frames=1)
    torch.testing.assert_close(encoder.features(image[:, :, 0]), encoder.features(image))
    grid = encoder.features(clip(), levels=(0, 3))
    pooled = encoder.features(clip(), levels=(0, 3), pool="mean")
    for one, whole in zip(pooled, grid, strict=True):
        torch.testing.assert_close(one, whole.flatten(1, 3).mean(1))
    assert encoder.features(clip(), pool="mean").shape == (2, 16)
    with pytest.raises(ValueError, match="pool: expected None or 'mean', got 'max'"):
        encoder.features(clip(), pool="max")  # type: ignore[call-overload]


def test_features_are_taken_in_the_weights_type() -> None:
    assert small().features(clip().double()).dtype == torch.float32
    encoder = small().double()
    torch.testing.assert_close(encoder.features(clip()), encoder.features(clip().double()))


SECOND: dict[str, object] = {"generation": "2", "rope": "tiled", "interpolate_rope": False}


def test_v_jepa_2_has_one_tokenizer_and_one_norm() -> None:
    encoder = small(**SECOND)
    state = encoder.state_dict()
    assert {name for name in state if not name.startswith("blocks.")} == {
        "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
    }  # fmt: skip
    torch.nn.init.normal_(encoder.norm.weight)
    first, last = encoder(clip(), levels=(0, 3))
    for level in (first, last):
        assert level.shape == (64, 16)
    with torch.no_grad():
        encoder.norm.weight.mul_(2.0)
    torch.testing.assert_close(encoder(clip(), levels=(0, 3)), [2 * first, 2 * last])


def test_v_jepa_2_reads_an_image_as_a_still_clip() -> None:
    encoder = small(**SECOND)
    image = clip(frames=1)
    still = encoder.features(image.expand(-1, -1, 2, -1, -1))
    assert torch.equal(encoder.features(image), still)
    assert still.shape == (2, 1, 4, 4, 16)


@pytest.mark.parametrize("option", [{"rope": "spiral"}, {"generation": "3"}])
def test_unknown_layouts_are_refused(option: dict[str, object]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: expected one of .*, got "):
        small(**option)


@pytest.mark.parametrize("attention", ["auto", "math"])
def test_tiled_positions_are_other_positions_and_train(attention: str) -> None:
    # In heads of 8 channels an axis has one frequency, and both layouts are one.
    tiled = small(rope="tiled", attention=attention, width=32).double()
    plain = small(attention=attention, width=32).double()
    assert tiled.state_dict().keys() == plain.state_dict().keys()
    found = tiled(clip().double())[-1]
    assert not torch.allclose(found, plain(clip().double())[-1])
    torch.testing.assert_close(
        found, small(rope="tiled", attention="math", width=32).double()(clip().double())[-1]
    )
    found.square().mean().backward()
    assert all(block.attn.qkv.weight.grad.any() for block in tiled.blocks)  # type: ignore[union-attr]


def test_visible_tokens_see_one_another_alone() -> None:
    encoder = small()
    index = torch.tensor([[1, 4, 30], [0, 7, 9]])
    rows = encoder(clip(), [index])[-1]
    changed = clip()
    # Token 31, seen by neither clip: time 1, row 3, column 3.
    changed[:, :, 2:, 24:, 24:] += 5.0
    assert torch.equal(encoder(changed, [index])[-1], rows)
    changed[1, :, :2, :8, :8] += 5.0
    again = encoder(changed, [index])[-1]
    assert torch.equal(again[:3], rows[:3])
    assert not torch.allclose(again[3:], rows[3:])


def test_all_tokens_by_index_are_all_tokens() -> None:
    encoder = small().double()
    every = torch.arange(32).expand(2, -1)
    whole = encoder(clip().double())
    torch.testing.assert_close(encoder(clip().double(), [every]), whole)
    order = torch.randperm(32)
    mixed = encoder(clip().double(), [order.expand(2, -1)])[-1].view(2, 32, -1)
    torch.testing.assert_close(mixed, whole[-1].view(2, 32, -1)[:, order])


def test_mask_groups_packed_together_equal_separate_passes() -> None:
    encoder = small().double()
    groups = [torch.tensor([[0, 3, 9], [1, 2, 31]]), torch.tensor([[5], [6]])]
    packed = encoder(clip().double(), groups)
    apart = [encoder(clip().double(), [group]) for group in groups]
    for level, pair in zip(packed, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(level, torch.cat(pair))


def test_one_frame_is_an_image_with_weights_of_its_own() -> None:
    encoder = small()
    image = encoder(clip(frames=1))[-1]
    for weight in (encoder.patch_embed.proj.weight, encoder.video_mod_embed):
        torch.nn.init.constant_(weight, torch.nan)
    assert torch.equal(encoder(clip(frames=1))[-1], image)
    assert encoder(clip())[-1].isnan().all()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_any_grid_runs(frames: int, height: int, width: int, image: bool) -> None:
    t = 1 if image else 2 * frames
    features = small().features(clip(1, t, 8 * height, 8 * width))
    assert features.shape == (1, 1 if image else frames, height, width, 16)
    assert features.isfinite().all()


def test_384_px_runs() -> None:
    encoder = small(patch=16)
    features = encoder.features(clip(1, 2, 384, 384))
    assert features.shape == (1, 1, 24, 24, 16)


@pytest.mark.parametrize("depth", [1, 3, 7, 32])
def test_any_depth_has_levels(depth: int) -> None:
    encoder = small(depth=depth, levels=default_levels(depth))
    assert len(encoder(clip(1))) == min(4, depth)


def test_activation_checkpointing_changes_no_bit() -> None:
    grads = []
    for checkpointing in (False, True):
        encoder = small(checkpointing=checkpointing)
        sum(level.square().mean() for level in encoder(clip())).backward()  # type: ignore[union-attr]
        grads.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.parametrize("levels", [(), (0, 1), (3, 2), (0, 0, 3), (-1, 3), (0, 4)])
def test_levels_that_cannot_be_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match="levels: expected ascending block indices that end with 3"
    ):
        small(levels=levels)


def test_bad_calls_are_named() -> None:
    with pytest.raises(ValueError, match=r"levels: expected some of \[0, 1, 2, 3\], got \[5\]"):
        small()(clip(), levels=(5,))
    with pytest.raises(ValueError, match=r"clip: expected \[B, 3, T, H, W\]"):
        small()(torch.zeros(2, 4, 32, 32))
    with pytest.raises(ValueError, match=r"clip: expected \[B, 3, T, H, W\]"):
        small()(torch.zeros(2, 1, 4, 32, 32))
    with pytest.raises(ValueError, match="height 33"):
        small()(clip(height=33))


def test_initial_weights_have_the_released_scale() -> None:
    torch.manual_seed(0)
    encoder = Encoder(width=96, depth=4, heads=3, mlp_width=384, levels=(0, 1, 2, 3))
    for number, block in enumerate(encoder.blocks, start=1):
        for name, std in (("attn.qkv", 1.0), ("mlp.fc1", 1.0), ("attn.proj", (2 * number) ** -0.5)):
            weight = block.get_parameter(f"{name}.weight")
            assert weight.std().item() == pytest.approx(0.02 * std, rel=0.03)
            assert not block.get_parameter(f"{name}.bias").any()
        fc2 = block.get_parameter("mlp.fc2.weight")
        assert fc2.std().item() == pytest.approx(0.02 * (2 * number) ** -0.5, rel=0.03)
    assert encoder.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert encoder.video_mod_embed.abs().max().item() < 1e-5
    assert encoder.video_mod_embed.std().item() > 1e-7
    assert torch.equal(encoder.norms_block[0].weight, torch.ones(96))  # type: ignore[arg-type]


@pytest.mark.parametrize("rope", ["interleaved", "tiled"])
def test_a_network_trains_on_a_size_that_it_first_saw_in_inference_mode(rope: str) -> None:
    encoder, clip = small(rope=rope), torch.randn(1, 3, 4, 40, 56)
    with torch.inference_mode():
        encoder(clip)
    encoder(clip)[0].sum().backward()
