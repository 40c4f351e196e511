import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.data.decode_image import decode_image
from fastjepa.data.decoder import DecodeError


def _gradient(height: int = 20, width: int = 30) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 8, y * 12, x + y], axis=2).astype(np.uint8)


def test_rgb_as_a_clip_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(_gradient()).save(tmp_path / "a.png")
    clip = decode_image(str(tmp_path / "a.png"))
    assert clip.shape == (1, 20, 30, 3)
    assert clip.dtype == np.uint8
    assert (clip[0] == _gradient()).all()


@pytest.mark.parametrize(
    ("orientation", "seen"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, seen: Callable) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(_gradient()).save(tmp_path / "a.png", exif=exif)
    assert (decode_image(str(tmp_path / "a.png"))[0] == seen(_gradient())).all()


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.dstack([_gradient(), np.full((20, 30), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    frame = decode_image(str(tmp_path / "a.png"))[0]
    assert (frame[:10] == 255).all()
    assert (frame[10:] == _gradient()[10:]).all()


def test_grey_grey_with_alpha_and_one_bit(tmp_path: Path) -> None:
    grey = _gradient()[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.merge("LA", [Image.fromarray(grey), Image.new("L", (30, 20), 255)]).save(
        tmp_path / "la.png"
    )
    for name in ("l.png", "la.png"):
        assert (decode_image(str(tmp_path / name))[0] == grey[..., None]).all()
    Image.fromarray(grey > 99).save(tmp_path / "1.png")
    assert (decode_image(str(tmp_path / "1.png"))[0, ..., 1] == 255 * (grey > 99)).all()


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (30, 20), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "p.png")
    image.save(tmp_path / "t.png", transparency=0)
    plain, clear = (decode_image(str(tmp_path / name))[0] for name in ("p.png", "t.png"))
    assert plain[5, 5].tolist() == clear[5, 5].tolist() == [200, 100, 50]
    assert plain[0, 0].tolist() == [0, 0, 0]
    assert clear[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    deep = (np.arange(600, dtype=np.uint16) * 109).reshape(20, 30)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert (decode_image(str(tmp_path / name))[0, ..., 2] == deep >> 8).all()


def test_cmyk_and_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert decode_image(str(tmp_path / "a.jpg")).shape == (1, 20, 30, 3)


def test_real_photographs() -> None:
    from fastjepa.data.manifest import read_manifest

    shapes = [decode_image(e.path).shape for e in read_manifest("package:sklearn/datasets/images")]
    assert shapes == [(1, 427, 640, 3), (1, 427, 640, 3)]


def _png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99))


def _truncated_jpeg(path: Path) -> None:
    Image.fromarray(_gradient(200, 300)).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def _float_tiff(path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)).save(path)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("missing.png", lambda path: None, "no such file"),
        ("empty.png", Path.touch, "not an image"),
        ("folder.png", Path.mkdir, "Is a directory"),
        ("random.jpg", lambda path: path.write_bytes(bytes(range(256)) * 9), "not an image"),
        ("cut.jpg", _truncated_jpeg, "truncated"),
        ("bomb.png", lambda path: path.write_bytes(_png_header(9000, 9000)), "9000x9000 pixels"),
        ("bigger.png", lambda path: path.write_bytes(_png_header(60000, 60000)), "pixels"),
        ("short.png", lambda path: path.write_bytes(_png_header(900, 900)), "cannot be decoded"),
        ("float.tif", _float_tiff, "32-bit pixels"),
    ],
)
def test_a_broken_image_is_one_clear_error(
    tmp_path: Path, name: str, make: Callable, words: str, recwarn: pytest.WarningsRecorder
) -> None:
    make(tmp_path / name)
    with pytest.raises(DecodeError, match=words) as caught:
        decode_image(str(tmp_path / name))
    assert caught.value.path == str(tmp_path / name)
    assert caught.value.whole_file
    assert not recwarn
