"""Videos, clips of other lengths and images: what each is, and how an update is shared out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.config.errors import RecipeError
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import Resolved, resolve
from fastjepa.config.schema import Data, Length, Recipe

LONG = "{frames: 64, batch: 6, share: 0.2}"


@pytest.fixture
def resolved(tmp_path: Path):
    """The resolved numbers of a recipe with videos and images, changed by overrides."""
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {video: clips, image: stills}")

    def made(*overrides: str) -> Resolved:
        return resolve(load_recipe(path, overrides))

    return made


def test_a_length_is_a_stream_of_its_own(resolved) -> None:
    r = resolved(f"data.lengths=[{LONG}]")
    assert list(r.streams) == ["video", "video_64f", "image"]
    long = r.streams["video_64f"]
    assert (long.frames, long.fps, long.crop, long.clips) == (64, 4.0, 256, 6)
    assert (long.grid, long.tokens) == ((32, 16, 16), 8192)
    assert long.context_weight == r.video.context_weight
    assert r.clips_per_step == 24 + 6 + 72
    assert resolved(f"data.lengths=[{LONG}]", "data.mix=alternate").clips_per_step == pytest.approx(
        0.4 * 24 + 0.1 * 6 + 0.5 * 72
    )


def test_a_length_may_have_its_own_crop_and_frame_rate(resolved) -> None:
    r = resolved("data.lengths=[{frames: 8, batch: 4, share: 0.5, crop: 384, fps: 2}]")
    short = r.streams["video_8f"]
    assert (short.crop, short.grid, short.fps) == (384, (4, 24, 24), 2.0)
    assert (r.video.crop, r.video.fps, r.image.crop) == (256, 4.0, 256)


def test_the_share_is_a_part_of_the_videos_weight(resolved) -> None:
    shares = {n: s.share for n, s in resolved(f"data.lengths=[{LONG}]").streams.items()}
    assert shares == pytest.approx({"video": 0.4, "video_64f": 0.1, "image": 0.5})
    alone = resolved(f"data.lengths=[{LONG}]", "data.image=[]")
    assert {n: s.share for n, s in alone.streams.items()} == {"video": 0.8, "video_64f": 0.2}


def test_no_length_leaves_everything_as_it_was(resolved) -> None:
    r = resolved("data.image_share=0.3")
    assert list(r.streams) == ["video", "image"]
    assert (r.video.share, r.image.share) == (1.0 - 0.3, 0.3)


def test_videos_and_images_keep_their_random_numbers_beside_any_length(resolved) -> None:
    r = resolved(f"data.lengths=[{LONG}, {{frames: 32, batch: 6, share: 0.2}}]")
    numbers = {name: stream.number for name, stream in r.streams.items()}
    assert numbers == {"video": 0, "image": 1, "video_64f": 2, "video_32f": 3}


def test_lengths_without_videos_are_told(resolved) -> None:
    r = resolved("data.video=[]", f"data.lengths=[{LONG}]")
    assert list(r.streams) == ["image"]
    assert "no videos are read, so data.lengths has no effect" in r.notes


@given(st.lists(st.integers(1, 100), max_size=4), st.integers(1, 100), st.floats(0.0, 1.0))
def test_shares_add_up_to_one(parts: list[int], rest: int, images: float) -> None:
    total = sum(parts) + rest
    lengths = tuple(
        Length(frames=18 + 2 * number, batch=1, share=part / total)
        for number, part in enumerate(parts)
    )
    data = Data(video="clips", image="stills", image_share=images, lengths=lengths)
    found = resolve(Recipe(data=data)).streams
    assert sum(stream.share for stream in found.values()) == pytest.approx(1.0)
    assert all(stream.share > 0.0 for stream in found.values())


@pytest.mark.parametrize(
    ("lengths", "line"),
    [
        (
            "[{frames: 64, batch: 6, share: 0.6}, {frames: 32, batch: 6, share: 0.4}]",
            "data.lengths: shares add up to 1, which leaves nothing to clips of data.frames 16; "
            "expected a sum below 1",
        ),
        (
            "[{frames: 16, batch: 6, share: 0.5}]",
            "data.lengths.0.frames: 16 is data.frames already; give each length once",
        ),
        (
            f"[{LONG}, {LONG}]",
            "data.lengths.1.frames: 64 is data.lengths.0.frames already; give each length once",
        ),
        (
            "[{frames: 63, batch: 6, share: 0.5}]",
            "data.lengths.0.frames: 63 is no multiple of model.tubelet 2; 62 or 64 would be",
        ),
        (
            "[{frames: 64, batch: 6, share: 0.5, crop: 250}]",
            "data.lengths.0.crop: 250 is no multiple of model.patch 16; 240 or 256 would be",
        ),
        (
            "[{frames: 64, batch: 6, share: 0.5, crop: 32}]",
            "masks.video.0.spatial_scale: [0.15, 0.15] of 2x2 tokens can be none; "
            "expected at least 0.25",
        ),
    ],
)
def test_lengths_that_cannot_be(resolved, lengths: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolved(f"data.lengths={lengths}")
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ("[{frames: 64, batch: 6, share: 1.0}]", "data.lengths.0.share: found 1.0, expected a nu"),
        ("[{frames: 64, batch: 6}]", "data.lengths.0.share: missing"),
        ("[{frame: 64, batch: 6, share: 0.1}]", "did you mean data.lengths.0.frames?"),
        ("{frames: 64}", "data.lengths: found {'frames': 64}, expected a list"),
    ],
)
def test_lengths_are_checked_key_by_key(resolved, lengths: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolved(f"data.lengths={lengths}")
    assert words in str(caught.value)
