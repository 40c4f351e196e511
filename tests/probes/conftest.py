"""A small encoder and labelled data of real handwritten digits, as files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa.checkpoint import EncoderSizes, write_encoder
from fastjepa.data.encode import write_video
from fastjepa.data.moving_digits import MovingDigits, Split
from fastjepa.model import Encoder

SIZES = EncoderSizes(
    width=48, depth=3, heads=3, mlp_width=96, levels=(1, 2), patch=8, tubelet=2,
    interpolate_rope=True, rope="interleaved", generation="2.1",
)  # fmt: skip
SIDE = 32


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    write_encoder(path, Encoder(**SIZES).state_dict(), SIZES)
    return path


def digits(split: Split, count: int = 1) -> MovingDigits:
    return MovingDigits(
        frames=4, height=SIDE, width=SIDE, fps=8.0, num_digits=count, digit_size=24, split=split
    )


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one digit each: `train/CLASS/*.png` and `test/CLASS/*.png`, on plain ground."""
    from sklearn.datasets import load_digits

    found = load_digits()
    folder = tmp_path_factory.mktemp("classes")
    for number, (image, name) in enumerate(zip(found.images, found.target, strict=True)):
        if number < 420:
            part = "train" if number < 300 else "test"
            (folder / part / str(name)).mkdir(parents=True, exist_ok=True)
            pixels = (255 * image / 16).astype(np.uint8)
            picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            picture.save(folder / part / str(name) / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of digits as `train.csv` and `test.csv`, the label is the first one's half."""
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 8), ("test", 4)):
        rows = ["path,label"]
        source = digits(split)  # type: ignore[arg-type]
        for number in range(count):
            clip = source[number]
            name = f"{split}{number}.mp4"
            write_video(folder / name, clip.frames, "mpeg4", fps=8.0)
            rows.append(f"{name},{'low' if clip.digits[0] < 5 else 'high'}")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames with masks and depths: the digits are 1 m away, the ground 2 m. Pictures of two
    sizes."""
    folder = tmp_path_factory.mktemp("dense")
    for split, count in (("train", 24), ("test", 8)):
        for kind in ("images", "masks", "depths"):
            (folder / split / kind).mkdir(parents=True)
        source = digits(split)  # type: ignore[arg-type]
        for number in range(count):
            clip = source[number]
            cut = slice(None, None if number % 3 else 24)
            mask = (clip.mask[0, :, cut] > 0).astype(np.uint8)
            Image.fromarray(clip.frames[0, :, cut]).save(folder / split / f"images/{number}.png")
            Image.fromarray(mask).save(folder / split / f"masks/{number}.png")
            metres = np.where(mask > 0, 1000, 2000).astype(np.uint16)
            Image.fromarray(metres).save(folder / split / f"depths/{number}.png")
    return folder


@pytest.fixture(scope="session")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of two digits each in the layout of DAVIS."""
    folder = tmp_path_factory.mktemp("davis")
    source = MovingDigits(
        frames=5, height=SIDE, width=48, fps=8.0, num_digits=2, digit_size=16, speed=(2.0, 6.0)
    )
    for number, name in enumerate(("one", "two")):
        clip = source[number]
        for kind, pictures in (("JPEGImages", clip.frames), ("Annotations", clip.instance)):
            place = folder / kind / "480p" / name
            place.mkdir(parents=True)
            for time, picture in enumerate(pictures):
                ending = "jpg" if kind == "JPEGImages" else "png"
                Image.fromarray(picture).save(place / f"{time:05d}.{ending}")
    (folder / "ImageSets/2017").mkdir(parents=True)
    (folder / "ImageSets/2017/val.txt").write_text("one\ntwo\n")
    return folder
