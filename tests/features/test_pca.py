"""Colours show what varies in the features and nothing where nothing varies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fastjepa.features.pca import Palette, colour_spread, picture, sheet


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clip(frames: int, height: int = 32, width: int = 32) -> Tensor:
    shade = torch.arange(frames, dtype=torch.uint8) * 20
    return shade[None, :, None, None].expand(3, frames, height, width)


def colours(x: Tensor) -> Tensor:
    return Palette.fit(x).colours(x)


def test_channels_are_the_components_in_order_of_variance() -> None:
    steps = torch.linspace(-1, 1, 101)
    x_ND = torch.zeros(303, 7)
    x_ND[:101, 4], x_ND[101:202, 1], x_ND[202:, 6] = 9 * steps, 3 * steps, steps
    palette = Palette.fit(x_ND)
    assert palette.axes_D3.argmax(0).tolist() == [4, 1, 6]
    red = palette.colours(x_ND)[:101, 0].int()
    assert red[0] == 0
    assert red[-1] == 255
    assert red[50] == 128
    assert (red.diff() >= 0).all()


@settings(deadline=None)
@given(st.integers(0, 50))
def test_colours_do_not_depend_on_the_axes_the_features_came_in(seed: int) -> None:
    x = features(2, 4, 4, 6, seed=seed) * torch.logspace(0, -2, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    # One weight is the largest whatever the order, so the signs agree as well.
    assert (colours(x).int() - colours(x[..., order]).int()).abs().max() <= 1


def test_the_same_features_give_the_same_picture() -> None:
    x = features(4, 3, 5, 8)
    assert torch.equal(colours(x), colours(x.clone()))
    assert colours(x).shape == (4, 3, 5, 3)
    assert colours(x).dtype == torch.uint8
    moved = 3.0 * x + 100.0
    assert (colours(x).int() - colours(moved).int()).abs().max() <= 1


def test_a_few_odd_tokens_do_not_wash_out_the_rest() -> None:
    x_ND = features(1000, 8)
    odd = x_ND.clone()
    odd[0] = 1e3 * x_ND[0]
    assert colour_spread(colours(odd)[1:]) > 0.5 * colour_spread(colours(x_ND))


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_uniform_features_are_uniform_grey(noise: float) -> None:
    x = torch.full((2, 4, 4, 8), 5.0) + noise * features(2, 4, 4, 8)
    assert (colours(x) == 128).all()
    assert colour_spread(colours(x)) == 0.0


def test_structure_spreads_colours() -> None:
    assert 0.15 < colour_spread(colours(features(8, 8, 8, 16))) < 0.35
    assert colour_spread(torch.tensor([[0, 0, 0], [255, 255, 255]])) == 0.5


def test_one_token_or_two_channels_are_enough() -> None:
    assert (colours(features(1, 1, 1, 8)) == 128).all()
    two = colours(features(2, 4, 4, 2))
    assert (two[..., 2] == 128).all()
    assert two[..., 0].unique().numel() > 2


def test_clips_and_images_can_share_a_palette() -> None:
    video, image = features(4, 2, 2, 8), features(1, 3, 3, 8, seed=1)
    palette = Palette.fit(video, image)
    assert torch.equal(palette.colours(torch.cat([video, video]))[:4], palette.colours(video))
    assert palette.colours(image).shape == (1, 3, 3, 3)


def test_features_that_make_no_palette_are_refused() -> None:
    with pytest.raises(ValueError, match="one width"):
        Palette.fit(features(2, 8), features(2, 9))
    with pytest.raises(ValueError, match="one width"):
        Palette.fit(torch.zeros(0, 8))
    with pytest.raises(ValueError, match="NaN"):
        Palette.fit(torch.full((4, 8), torch.nan))
    with pytest.raises(ValueError, match="width 8"):
        Palette.fit(features(4, 8)).colours(features(4, 9))


def test_a_picture_shows_each_step_over_its_colours() -> None:
    x_THWD = features(4, 2, 3, 8)
    image = picture(clip(8, 32, 48), x_THWD, cell=30)
    pixels = np.asarray(image)
    expected = colours(x_THWD)
    for step in range(4):
        left = 6 + step * 36
        assert (pixels[6 + 10, left + 15] == step * 2 * 20).all()
        for row in range(2):
            for column in range(3):
                cell = pixels[6 + 26 + row * 10 :, left + column * 10 :][:10, :10]
                assert (cell == expected[step, row, column].numpy()).all()


def test_a_long_clip_shows_evenly_spaced_steps() -> None:
    image = picture(clip(12), features(12, 2, 2, 8), cell=20, columns=3)
    pixels = np.asarray(image)
    assert image.width == 6 + 3 * 26
    assert [int(pixels[16, 16 + 26 * i, 0]) for i in range(3)] == [0, 80, 160]


def test_an_image_is_one_column_and_a_title_takes_a_line() -> None:
    plain = picture(clip(1), features(1, 2, 2, 8), cell=20)
    titled = picture(clip(1), features(1, 2, 2, 8), cell=20, title="a")
    assert plain.width == titled.width == 6 + 26
    assert titled.height > plain.height


def test_a_sheet_puts_pictures_side_by_side_while_they_fit() -> None:
    wide = Image.new("RGB", (100, 10), (255, 0, 0))
    small = [Image.new("RGB", (40, 20), (0, 255, i)) for i in range(3)]
    one = sheet([wide, *small])
    assert one.size == (100, 50)
    assert one.getpixel((99, 9)) == (255, 0, 0)
    assert one.getpixel((0, 10)) == (0, 255, 0)
    assert one.getpixel((40, 29)) == (0, 255, 1)
    assert one.getpixel((0, 30)) == (0, 255, 2)
    assert one.getpixel((90, 20)) == (255, 255, 255)
    with pytest.raises(ValueError, match="at least one"):
        sheet([])


@pytest.mark.parametrize(
    ("frames", "shape", "words"),
    [(8, (3, 2, 2, 8), "divides 8 frames"), (8, (2, 2, 8), r"\(2, 2, 8\)")],
)
def test_features_that_do_not_fit_the_clip_are_refused(
    frames: int, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        picture(clip(frames), features(*shape))


def test_a_clip_of_floats_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[3, T, H, W\], found torch.float32"):
        picture(clip(2).float(), features(2, 2, 2, 8))


def test_levels_are_rows_of_their_own_colours_with_their_names_aside() -> None:
    levels = {"block 2": features(4, 2, 2, 8), "block 5": features(4, 2, 2, 6, seed=1)}
    image = picture(clip(8), levels, cell=20)
    plain = picture(clip(8), levels["block 2"], cell=20)
    pixels, aside = np.asarray(image), image.width - plain.width
    assert image.height == plain.height + 26
    assert (pixels[58:78, :aside] < 128).any()  # a name, in ink
    for row, x_THWD in enumerate(levels.values(), start=1):
        expected = colours(x_THWD)
        for step in range(4):
            place = pixels[6 + 26 * row :, aside + 6 + 26 * step :][:20:10, :20:10]
            assert (place == expected[step].numpy()).all()


def test_levels_of_different_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="divides"):
        picture(clip(8), {"a": features(4, 2, 2, 8), "b": features(4, 3, 2, 8)})
