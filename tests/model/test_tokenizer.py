"""Tokens of gathered patches are those of a convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.model.tokenizer import Tokenizer


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2),
)  # fmt: skip
def test_tokens_are_the_convolutions(batch: int, t: int, h: int, w: int, tubelet: int) -> None:
    tokenizer = Tokenizer(5, 4, tubelet).double()
    clip = torch.randn(batch, 3, t * tubelet, h * 4, w * 4, dtype=torch.float64)
    assert tokenizer.grid(clip) == (t, h, w)
    # Raster order: time, then height, then width.
    expected = tokenizer.proj(clip).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(tokenizer(clip), expected)
    rows = torch.randperm(len(expected))[: max(1, len(expected) // 2)]
    torch.testing.assert_close(tokenizer(clip, rows), expected[rows])


def test_an_image_is_a_clip_of_one_frame() -> None:
    tokenizer = Tokenizer(6, 4, 1)
    image = torch.randn(2, 3, 8, 12)
    kernel = tokenizer.proj.weight.squeeze(2)
    expected = torch.nn.functional.conv2d(image, kernel, tokenizer.proj.bias, stride=4)
    tokens = tokenizer(image[:, :, None])
    torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2).flatten(0, 1))


def test_gathered_tokens_have_the_gradient_of_all() -> None:
    tokenizer = Tokenizer(5, 4, 2).double()
    clip = torch.randn(1, 3, 4, 8, 8, dtype=torch.float64)
    rows = torch.tensor([6, 1, 3])
    tokenizer(clip, rows).square().sum().backward()
    gathered = tokenizer.proj.weight.grad
    tokenizer.zero_grad()
    tokenizer(clip)[rows].square().sum().backward()
    assert gathered is not None
    torch.testing.assert_close(gathered, tokenizer.proj.weight.grad)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 3, 8, 8), "frames 3 is not a positive multiple of 2"),
        ((1, 3, 2, 9, 8), "height 9"),
        ((1, 3, 2, 8, 2), "width 2"),
        ((1, 3, 0, 8, 8), "frames 0"),
    ],
)
def test_sides_that_do_not_divide_are_named(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tokenizer(5, 4, 2)(torch.zeros(shape))
