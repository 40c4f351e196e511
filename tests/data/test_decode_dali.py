"""Clips by DALI on the CPU: the frames asked for, the pixels of PyAV, and bad files survived."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastjepa.data.augment import normalise
from fastjepa.data.batch import Batch
from fastjepa.data.clip_plan import Box, plan_clip
from fastjepa.data.cut import Operators, cut_clip
from fastjepa.data.decode_dali import DaliDecoder, define_pipeline, why_not
from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.encode import encodable
from fastjepa.data.files import Entry
from fastjepa.data.frame_identity import count_wrong_frames
from fastjepa.data.loader import Loader
from fastjepa.data.manifest import read_manifest
from fastjepa.data.numbered import write_numbered
from fastjepa.data.quarantine import TooManyBadFiles

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

CPU = torch.device("cpu")
DALI = DaliDecoder(CPU, threads=1, normalised=False)


def _loader(files: list[Path], **changes: Any) -> Loader:
    arguments: dict[str, Any] = {
        "datasets": [([Entry(str(path), "video") for path in files], 1.0)],
        "batch": 4,
        "frames": 4,
        "fps": 8.0,
        "crop": 64,
        "scale": (0.3, 1.0),
        "aspect": (0.75, 1.35),
        "flip": 0.5,
        "seed": 3,
        "device_decoder": DALI,
    }
    return Loader(**{**arguments, **changes})


def _all(loader: Loader, start: int, stop: int) -> list[Batch]:
    """Batches whose clips are their own, once DALI goes on to the next."""
    return [b._replace(clip=b.clip.clone()) for b in loader.batches(start, stop)]


@pytest.fixture(scope="module")
def vp9(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("vp9")
    return [write_numbered(folder, number, codec="vp9").path for number in range(4)]


def _natural(number: int, height: int, width: int) -> np.ndarray:
    """A smooth moving picture in colours, with some texture."""
    y, x = np.mgrid[:height, :width] / 40.0
    waves = [np.sin((1 + k) * x + y * (2 - k) + 0.2 * number + k) for k in range(3)]
    noise = np.random.default_rng(number).normal(0.0, 0.04, (height, width, 1))
    return np.clip((np.stack(waves, 2) * 0.35 + 0.5 + noise) * 255, 0, 255).astype(np.uint8)


def _by_float64(frame: np.ndarray, box: Box, flip: bool, size: int) -> torch.Tensor:
    """Crop, resize and mirror a picture uint8 [H, W, 3] in float64: [3, S, S]."""
    cut = frame[box.top : box.top + box.height, box.left : box.left + box.width]
    pixels = torch.from_numpy(cut.copy()).permute(2, 0, 1)[None].double()
    square = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear")[0]
    return square.flip(2) if flip else square


@pytest.mark.parametrize(
    ("name", "codec", "settings"),
    [
        ("a.webm", "libvpx-vp9", {}),
        ("a.webm", "libvpx", {}),
        ("a.mkv", "mjpeg", {"pix_fmt": "yuvj420p", "options": {"q": "2"}}),
        ("odd.webm", "libvpx-vp9", {"height": 131, "width": 177}),
        ("dense.webm", "libvpx-vp9", {"pix_fmt": "yuv444p"}),
        ("turned.mkv", "libvpx-vp9", {"rotation": 90}),
        ("pixels.mp4", "libx264", {}),
        ("turned.mp4", "mjpeg", {"pix_fmt": "yuvj420p", "rotation": 270}),
    ],
)
def test_close_to_a_float64_resize_of_the_same_frames(
    tmp_path: Path, write_video: Callable, name: str, codec: str, settings: dict[str, Any]
) -> None:
    """Mean difference under 2 of 255 for every sample, whether DALI decodes it or a worker does."""
    fast = {"b": "4M", "deadline": "realtime", "cpu-used": "8"} if "vpx" in codec else {}
    settings = {"height": 132, "width": 178, "options": fast} | settings
    path = write_video(tmp_path / name, codec, pts=range(24), picture=_natural, **settings)
    for batch in _loader([path]).batches(0, 2):
        assert batch.bad == []
        for slot, clip in enumerate(batch.clip):
            plan = plan_clip(
                3, batch.step * 4 + slot, 0, scale=(0.3, 1.0), aspect=(0.75, 1.35), flip=0.5
            )
            frames = decode_clip(str(path), plan.start, 4, 8.0)
            box = plan.box(*frames.shape[1:3])
            wanted = torch.stack([_by_float64(f, box, plan.flip, 64) for f in frames], 1)
            assert (clip.double() - wanted).abs().mean() < 2.0


def test_no_wrong_frame_in_any_codec(tmp_path: Path) -> None:
    """Those that DALI decodes on a CPU, and those that reach its graph as pixels."""
    videos = [
        write_numbered(tmp_path, number, codec=codec) for number, codec in enumerate(encodable())
    ]
    count = count_wrong_frames(
        videos, partial(Loader, device_decoder=DALI), batches=(1, 24), clips=48
    )
    assert count.wrong == [], str(count)


def test_variable_frame_rate_and_a_clip_longer_than_its_file(
    tmp_path: Path, write_video: Callable, read_numbers: Callable
) -> None:
    pts = [0, 3, 4, 20, 21, 22, 40, 41, 60]
    path = write_video(tmp_path / "a.webm", "libvpx-vp9", pts=pts, height=64)
    clip = _whole_clip(path, frames=16, fps=6.0)
    assert read_numbers(clip) == [0, 2, 2, 2, 2, 3, 5, 5, 5, 5, 6, 7, 7, 7, 7, 8]
    short = write_video(tmp_path / "b.webm", "libvpx-vp9", pts=range(9), height=64)
    assert read_numbers(_whole_clip(short, frames=5, fps=6.0)) == [0, 4, 8, 8, 8]


def _whole_clip(path: Path, **changes: Any) -> np.ndarray:
    """The file's first clip, uncropped: uint8 [T, S, S, 3]."""
    whole = {"scale": (1.0, 1.0), "aspect": (1.0, 1.0), "flip": 0.0, "batch": 1}
    batch = next(_loader([path], **whole, **changes).batches(0, 1))
    return batch.clip[0].permute(1, 2, 3, 0).numpy()


def test_a_truncated_file_never_gives_an_empty_picture(
    tmp_path: Path, write_video: Callable
) -> None:
    """DALI by itself fills up with black, which here is nowhere else."""
    path = write_video(
        tmp_path / "a.webm",
        "libvpx-vp9",
        pts=range(96),
        options={"g": "8"},
        picture=lambda number, height, width: np.full((height, width, 3), 100 + number, np.uint8),
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.5)])
    for batch in _loader([path]).batches(0, 6):
        assert batch.clip.min() > 90
        means = batch.clip.float().mean((1, 3, 4))
        assert (means.diff(dim=1)[:, :-1] > 1.0).all()


def test_images_join_the_graph_as_pixels(vp9: list[Path]) -> None:
    images = read_manifest("package:sklearn/datasets/images")
    data = [([Entry(str(path), "video") for path in vp9], 0.5), (images, 0.5)]
    plain = _loader(vp9, datasets=data, device_decoder=None)
    for ours, theirs in zip(
        _loader(vp9, datasets=data).batches(0, 4), plain.batches(0, 4), strict=True
    ):
        same = [torch.equal(a, b) for a, b in zip(ours.clip, theirs.clip, strict=True)]
        still = [bool((clip == clip[:, :1]).all()) for clip in theirs.clip]
        assert same == still


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_from_any_start(
    vp9: list[Path], write_video: Callable, tmp_path: Path, workers: int
) -> None:
    files = [*vp9, write_video(tmp_path / "a.mp4")]
    straight = _all(_loader(files), 0, 7)
    later = _all(_loader(files, workers=workers), 3, 7)
    assert [batch.step for batch in later] == [3, 4, 5, 6]
    for batch, wanted in zip(later, straight[3:], strict=True):
        assert torch.equal(batch.clip, wanted.clip)


def test_normalised_in_the_graph(vp9: list[Path]) -> None:
    plain = next(_loader(vp9).batches(0, 1)).clip
    decoder = DaliDecoder(CPU, threads=2, normalised=True)
    clip = next(_loader(vp9, device_decoder=decoder).batches(0, 1)).clip
    assert clip.dtype == torch.float32
    assert (clip - normalise(plain)).abs().max() < 1e-5
    assert normalise(clip) is clip


def test_a_clip_lies_in_dalis_memory_for_as_long_as_it_is_held(vp9: list[Path]) -> None:
    batches = list(_loader(vp9).batches(0, 8))
    for batch, wanted in zip(batches, _all(_loader(vp9), 0, 8), strict=True):
        assert torch.equal(batch.clip, wanted.clip)


# --- files that are not as they should be ---


def _damaged(path: Path, target: Path) -> Path:
    """Every picture but the keyframe made invalid: only decoding shows it."""
    import av

    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.size and not packet.is_keyframe:
                at = data.index(bytes(packet))
                data[at + 1 : at + packet.size] = b"\xff" * (packet.size - 1)
    target.write_bytes(data)
    return target


@pytest.fixture(scope="module")
def broken(vp9: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _damaged(vp9[0], tmp_path_factory.mktemp("broken") / "broken.webm")


def test_a_sample_that_does_not_decode_is_replaced_and_no_other_is_lost(
    vp9: list[Path], broken: Path
) -> None:
    """All other samples are bit-equal to those of a run in which the file is whole."""
    seen = 0
    files = [vp9[1], broken, vp9[2], vp9[3]]
    good = _all(_loader([vp9[1], vp9[0], vp9[2], vp9[3]]), 0, 8)
    by_pyav = list(_loader(files, device_decoder=None).batches(0, 8))
    with_bad = _all(_loader(files), 0, 8)
    assert [batch.step for batch in with_bad] == list(range(8))
    for batch, whole, plain in zip(with_bad, good, by_pyav, strict=True):
        hit = [int(u * 4) == 1 for u in _file_draws(batch.step)]
        for slot, bad in enumerate(hit):
            wanted = plain.clip[slot] if bad else whole.clip[slot]
            assert torch.equal(batch.clip[slot], wanted)
        assert batch.bad == plain.bad
        assert {path for path, _ in batch.bad} == ({str(broken)} if any(hit) else set())
        seen += sum(hit)
    assert seen > 3


def test_a_file_that_only_dali_cannot_decode_is_read_by_pyav_and_named(
    tmp_path: Path, write_video: Callable
) -> None:
    path = write_video(tmp_path / "a.mp4")
    decoder = DaliDecoder(CPU, threads=1, normalised=False)
    decoder.cutter = partial(cut_clip, operators=Operators(frozenset({"h264"})))
    batch = next(_loader([path], device_decoder=decoder, max_bad_share=1.0).batches(0, 1))
    assert torch.equal(batch.clip, next(_loader([path], device_decoder=None).batches(0, 1)).clip)
    ((named, reason),) = batch.bad
    assert named == str(path)
    assert reason.startswith("cannot be decoded by DALI (Failed to create video decoder")
    assert "\n" not in reason


def _file_draws(step: int) -> list[float]:
    plans = [
        plan_clip(3, step * 4 + slot, 0, scale=(0.3, 1.0), aspect=(0.75, 1.35), flip=0.5)
        for slot in range(4)
    ]
    return [plan.file for plan in plans]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_replacement_is_the_same_from_any_start(
    vp9: list[Path], broken: Path, workers: int
) -> None:
    straight = _all(_loader([*vp9[1:], broken]), 0, 6)
    later = _all(_loader([*vp9[1:], broken], workers=workers), 2, 6)
    for batch, wanted in zip(later, straight[2:], strict=True):
        assert torch.equal(batch.clip, wanted.clip)
        assert batch.bad == wanted.bad


def test_nothing_but_broken_files(broken: Path) -> None:
    with pytest.raises(TooManyBadFiles) as caught:
        next(_loader([broken], max_bad_share=1.0).batches(0, 1))
    assert [path for path, _ in caught.value.bad] == [str(broken)]


def test_too_many_bad_files_stop_after_the_batch_that_shows_it(
    vp9: list[Path], broken: Path
) -> None:
    seen: list[Batch] = []
    with pytest.raises(TooManyBadFiles, match=r"1 of 3 files cannot be read, above"):
        seen.extend(_loader([*vp9[1:3], broken], max_bad_share=0.2).batches(0, 100))
    assert [batch.step for batch in seen] == list(range(len(seen)))
    assert seen[-1].bad


def test_a_pipeline_that_fails_on_good_files_is_an_error(vp9: list[Path]) -> None:
    """As when memory is short for all of a batch, but not for its samples one by one."""

    class Short(DaliDecoder):
        def _take(self, pipeline: Any) -> torch.Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        next(_loader(vp9, device_decoder=Short(CPU, threads=1, normalised=False)).batches(0, 1))


def test_closing_frees_the_pipeline(vp9: list[Path]) -> None:
    import psutil

    next(_loader(vp9).batches(0, 1))
    threads = psutil.Process().num_threads()
    for _ in range(3):
        loader = _loader(vp9, device_decoder=DaliDecoder(CPU, threads=3, normalised=False))
        batches = loader.batches(0, 100)
        next(batches)
        assert psutil.Process().num_threads() > threads
        loader.close()
        deadline = time.monotonic() + 30.0
        while psutil.Process().num_threads() > threads and time.monotonic() < deadline:
            time.sleep(0.01)
        assert psutil.Process().num_threads() <= threads
        assert next(batches, None) is None


def test_the_first_clip_is_that_of_the_first_batch(vp9: list[Path]) -> None:
    loader = _loader(vp9)
    assert torch.equal(loader.first_clip().clip[0], next(loader.batches(0, 1)).clip[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_what_the_cpu_gives(tmp_path: Path, write_video: Callable) -> None:
    device = torch.device("cuda")
    names = [("a.mp4", "libx264", {}), ("b.mp4", "libx265", {"x265-params": "log-level=none"})]
    files = [
        write_video(
            tmp_path / name, codec, pts=range(48), height=256, width=320, picture=_natural,
            options=options,
        )
        for name, codec, options in names
    ]  # fmt: skip
    decoder = DaliDecoder(device, threads=2, normalised=True)
    ours = _all(_loader(files, device_decoder=decoder), 0, 4)
    plain = _loader(files, device_decoder=None)
    for batch, wanted in zip(ours, plain.batches(0, 4), strict=True):
        assert batch.clip.device.type == "cuda"
        difference = (batch.clip.cpu() - normalise(wanted.clip)).abs().mean()
        assert difference < 2.0 / 255.0 / 0.225


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_graph_is_the_same_on_either_device(device: str) -> None:
    """As far as it goes without a GPU: the operators exist there, and the graph is written down."""
    pipeline = define_pipeline(
        lambda: (), device=device, crop=64, normalised=True, batch_size=2, num_threads=1,
        device_id=None, prefetch_queue_depth=2,
    )  # fmt: skip
    text = pipeline.serialize()
    for operator in (b"resize", b"coord_transform", b"sequence_rearrange", b"transpose"):
        assert operator in text
    assert (b"mixed" in text) == (device == "gpu")
