"""Leaving out what no wanted frame needs changes no pixel, in any codec and order of pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.encode import Encoding, encodable, write_video
from fastjepa.data.frame_times import clip_times, seconds_of, shown_at

X264 = "no-scenecut=1:b-adapt=0"
KINDS = {
    "all-b.mp4": ("libx264", {"g": "250", "bf": "3", "x264-params": f"{X264}:b-pyramid=none"}),
    "pyramid.mp4": ("libx264", {"g": "48", "bf": "3", "x264-params": f"{X264}:b-pyramid=normal"}),
    "wide-pyramid.mkv": ("libx264", {"bf": "8", "x264-params": f"{X264}:keyint=60:ref=6"}),
    "p-only.mp4": ("libx264", {"g": "30", "bf": "0"}),
    "intra-only.mp4": ("libx264", {"g": "1"}),
    "short-groups.mp4": ("libx264", {"g": "5", "bf": "2"}),
    "open-groups.mp4": ("libx264", {"bf": "3", "x264-params": f"{X264}:open-gop=1:keyint=9"}),
    "open-groups.ts": ("libx264", {"bf": "3", "x264-params": f"{X264}:open-gop=1:keyint=9"}),
    "refresh.mp4": ("libx264", {"bf": "0", "x264-params": "intra-refresh=1:keyint=20"}),
    "fields.ts": ("libx264", {"bf": "2", "flags": "+ildct+ilme", "x264-params": "tff=1:keyint=20"}),
    "slices.mp4": (
        "libx264",
        {"bf": "2", "x264-params": f"{X264}:slices=3:keyint=24:weightp=2", "preset": "slow"},
    ),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:pools=1:keyint=24:bframes=4"}),
    "hevc-open.mkv": (
        "libx265",
        {"x265-params": "log-level=none:pools=1:keyint=8:open-gop=1:bframes=3:b-adapt=0"},
    ),
    "altref.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "40"}),
    "altref9.webm": ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "40"}),
    "av1.mp4": ("libsvtav1", {"preset": "10", "g": "24", "svtav1-params": "lp=1"}),
    "mpeg4.mp4": ("mpeg4", {"g": "24", "bf": "2"}),
    "mpeg4.avi": ("mpeg4", {"g": "24", "bf": "2"}),
    "mpeg2.ts": ("mpeg2video", {"g": "15", "bf": "2"}),
    "mjpeg.avi": ("mjpeg", {}),
    "ffv1.mkv": ("ffv1", {"g": "12"}),
}
FRAMES = 100


def _moving(number: int) -> np.ndarray:
    """Drifting texture with a square on it: a picture decoded from wrong neighbours looks wrong."""
    y, x = np.mgrid[0:64, 0:96]
    waves = np.sin((x + 2 * number) / 5.0) + np.sin((y - number) / 7.0)
    picture = np.repeat((60 * waves + 120).astype(np.uint8)[..., None], 3, axis=2)
    left = 3 * number % 80
    picture[20:36, left : left + 16] = (250, number % 200, 20)
    noise = np.random.default_rng(number).integers(0, 12, picture.shape)
    return np.clip(picture.astype(int) + noise, 0, 255).astype(np.uint8)


def _write(path: Path, kind: str) -> Path:
    encoder, options = KINDS[kind]
    pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
    encoding = Encoding(encoder, path.suffix, options, pix_fmt)
    return write_video(path, (_moving(number) for number in range(FRAMES)), encoding, fps=25)


def _all_frames(path: Path) -> tuple[list[float], np.ndarray, float]:
    """When each frame is shown, the frames, and the length in seconds, by decoding everything."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        length = float(
            stream.duration * stream.time_base if stream.duration else container.duration / 1e6
        )
        tick, start = float(stream.time_base), stream.start_time or 0
        frames = list(container.decode(stream))
        seconds = [seconds_of(frame.pts, start, tick) for frame in frames]
    return seconds, np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), length


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_decoding_everything(tmp_path: Path, kind: str) -> None:
    if KINDS[kind][0] not in av.codecs_available:
        pytest.skip(f"this PyAV has no {KINDS[kind][0]}")
    path = _write(tmp_path / kind, kind)
    seconds, pictures, length = _all_frames(path)
    for fps, frames in ((4.0, 8), (12.0, 8), (25.0, 16), (1.0, 4)):
        for fraction in (0.0, 0.23, 0.5, 0.71, 0.99):
            expected = shown_at(clip_times(length, fraction, frames, fps), seconds)
            clip = decode_clip(str(path), fraction, frames, fps)
            same = [bool((a == b).all()) for a, b in zip(clip, pictures[expected], strict=True)]
            assert all(same), (fps, fraction, expected, same)


def _destroy(path: Path, needless: Callable[[av.Packet], bool]) -> int:
    """Overwrite the pictures of all packets that are `needless`; says how many."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        hurt = [p for p in container.demux(video=0) if p.size and needless(p)]
    for packet in hurt:
        data[packet.pos + 4 : packet.pos + packet.size] = b"\xff" * (packet.size - 4)
    path.write_bytes(data)
    return len(hurt)


def _unhurt(path: Path, needless: Callable[[av.Packet], bool], at_least: int) -> None:
    before = decode_clip(str(path), 0.5, 8, 4.0)
    assert _destroy(path, needless) >= at_least
    assert (decode_clip(str(path), 0.5, 8, 4.0) == before).all()


def _wanted(path: Path) -> Sequence[int]:
    """Numbers of the frames in the clip that `_unhurt` reads."""
    seconds, _, length = _all_frames(path)
    return shown_at(clip_times(length, 0.5, 8, 4.0), seconds)


def test_of_pictures_that_stand_alone_only_those_wanted_are_read(tmp_path: Path) -> None:
    for kind in ("intra-only.mp4", "mjpeg.avi"):
        path = _write(tmp_path / kind, kind)
        wanted = _wanted(path)
        _unhurt(path, lambda p, w=wanted: round(p.pts * p.time_base * 25) not in w, at_least=85)


def test_unreferenced_pictures_are_left_out(tmp_path: Path) -> None:
    path = _write(tmp_path / "all-b.mp4", "all-b.mp4")
    wanted = _wanted(path)
    with av.open(str(path)) as container:
        types = [PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    assert types.count("B") > 60

    def needless(packet: av.Packet) -> bool:
        number = round(packet.pts * packet.time_base * 25)
        return types[number] == "B" and number not in wanted

    _unhurt(path, needless, at_least=60)


def test_nothing_after_the_last_wanted_picture_of_a_group_is_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "p-only.mp4", "p-only.mp4")
    wanted = _wanted(path)

    def needless(packet: av.Packet) -> bool:
        number = round(packet.pts * packet.time_base * 25)
        group = range(number // 30 * 30, number // 30 * 30 + 30)
        return number > max((w for w in wanted if w in group), default=-1)

    _unhurt(path, needless, at_least=20)


def test_every_codec_of_the_house_is_among_those_tried() -> None:
    from fastjepa.data.encode import CODECS

    tried = {encoder for encoder, _ in KINDS.values()}
    assert {CODECS[name].encoder for name in encodable()} <= tried
