"""Clips by NVIDIA DALI: one graph from compressed pictures to the model's input, CPU or GPU.

The workers have chosen the pictures (cut.py), so the graph only decodes, crops, resizes, mirrors,
lays out and normalises. Samples that came as pixels join it after the resizing. Its output is the
batch, handed to torch where it lies.

One sample that does not decode makes DALI give up the whole pipeline object. Then the samples under
way are tried one by one, PyAV has a go at those that fail, and a new pipeline goes on from there.

Only this file imports DALI.
"""

import importlib.util
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastjepa.data.augment import IMAGENET_MEAN, IMAGENET_STD
from fastjepa.data.batch import Batch, ClipCutter, Redraw, Sample, unpack
from fastjepa.data.cache import DEFAULT, Cache
from fastjepa.data.cut import Operators, cut_clip

# What DALI's FFmpeg decodes (DALI 2.4).
ON_CPU = Operators(frozenset({"vp8", "vp9", "mjpeg"}))
# NVDEC decodes VP9 and AV1 too, but DALI takes a timestamp for one picture, and theirs may hold
# hidden ones; its conversion to RGB is for pictures of 8 bits and even sides.
ON_GPU = Operators(frozenset({"h264", "hevc", "mjpeg"}), frozenset({"yuv420p", "yuvj420p"}))

_SOURCES: dict[str, tuple[str, int]] = {
    "file": ("UINT8", 1),
    "numbers": ("INT32", 1),
    "places": ("INT32", 1),
    "first_corner": ("FLOAT", 1),
    "second_corner": ("FLOAT", 1),
    "transposed": ("BOOL", 0),
    "colours": ("FLOAT", 2),
    "is_pixels": ("BOOL", 0),
    "pixels": ("UINT8", 4),
}
# What DALI raises for a pipeline that failed.
_PIPELINE_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)

Arrays = tuple[list[np.ndarray], ...]
# (source, batch, ahead) to a pipeline.
_Build = Callable[[Callable[[], Arrays], int, int], Any]


def why_not() -> str | None:
    """Why DALI cannot decode videos here, or None where it can. Imports it."""
    if importlib.util.find_spec("nvidia") is None or not importlib.util.find_spec("nvidia.dali"):
        return "DALI is not installed (pip install 'fastjepa[dali]')"
    try:
        from nvidia.dali import fn
    except (ImportError, OSError) as error:
        return f"DALI cannot be imported ({error})"
    return None if hasattr(fn.decoders, "video") else "this DALI is older than fn.decoders.video"


class Choice(NamedTuple):
    """Which decoder a run uses, and why."""

    name: str
    reason: str


def choose_decoder(wanted: str, device: torch.device) -> Choice:
    """What `wanted` (auto, pyav, dali or dali_cpu) comes to for a model on `device`.

    Raises ValueError for DALI where it cannot work.
    """
    if wanted == "pyav":
        return Choice("pyav", "it is asked for")
    if wanted == "auto" and device.type != "cuda":
        return Choice("pyav", "the device is a CPU, on which DALI decodes only VP8, VP9 and MJPEG")
    missing = why_not()
    if wanted == "auto":
        if missing is None:
            return Choice("dali", "the device is CUDA and DALI is installed")
        return Choice("pyav", missing)
    if missing is not None:
        raise ValueError(f"data.decoder: {wanted} asked for, but {missing}; auto and pyav fit")
    if wanted == "dali" and device.type != "cuda":
        raise ValueError(
            "data.decoder: dali decodes on a CUDA device, but the model is on a CPU; "
            "auto, pyav and dali_cpu fit"
        )
    return Choice(wanted, "it is asked for")


class DaliDecoder:
    """A DeviceDecoder on `device`, a CPU or a CUDA device.

    `threads` decode on a CPU; `ahead` batches are under way at a time. Clips are uint8, or float32
    by ImageNet's mean and deviation if `normalised`. Remote files go through `cache`.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        threads: int,
        normalised: bool,
        ahead: int = 2,
        cache: Cache = DEFAULT,
    ) -> None:
        operators = ON_GPU if device.type == "cuda" else ON_CPU
        self.cutter: ClipCutter = partial(cut_clip, operators=operators, cache=cache)
        self._device = device
        self._threads = threads
        self._normalised = normalised
        self._ahead = ahead

    def finish(
        self, batches: Iterator[Batch], redraw: Redraw, *, batch: int, crop: int
    ) -> Generator[Batch, None, None]:
        """Decode packed batches, in order; see `DeviceDecoder`. Raises what `batches` raises."""
        flow = _Flow(batches)
        build = partial(self._build, crop=crop)
        pipeline = build(flow.next_arrays, batch, self._ahead)
        while True:
            try:
                pipeline.schedule_run()
                if pipeline.empty():
                    break
                clip = self._take(pipeline)
            except _PIPELINE_ERRORS:
                del pipeline
                if not _mend(flow, redraw, build):
                    raise
                pipeline = build(flow.next_arrays, batch, self._ahead)
                continue
            yield flow.finished(clip)
        if flow.failure is not None:
            raise flow.failure

    def _build(self, source: Callable[[], Arrays], batch: int, ahead: int, *, crop: int) -> Any:
        gpu = self._device.type == "cuda"
        pipeline = define_pipeline(
            source,
            device="gpu" if gpu else "cpu",
            crop=crop,
            normalised=self._normalised,
            batch_size=batch,
            num_threads=self._threads,
            device_id=torch.cuda.current_device() if gpu else None,
            prefetch_queue_depth=ahead,
        )
        pipeline.build()
        return pipeline

    def _take(self, pipeline: Any) -> Tensor:
        """The oldest batch under way, as a tensor over DALI's own memory."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (clips,) = pipeline.outputs(cuda_stream=stream)
        return from_dlpack(clips.as_tensor())


def _mend(flow: "_Flow", redraw: Redraw, build: _Build) -> bool:
    """Replace every sample under way that does not decode; False if all of them do."""
    mended = False
    for batch, samples in flow.under_way:
        bad = dict(batch.bad)
        for slot, reason in _failures(samples, build).items():
            path, attempt, *_ = samples[slot]
            bad[path] = reason
            samples[slot] = redraw(batch.step, slot, attempt, bad)
            mended = True
        batch.bad[:] = bad.items()
    flow.start_again()
    return mended


def _failures(samples: Sequence[Sample], build: _Build) -> dict[int, str]:
    """Which of the samples do not decode, and why: each is run alone."""
    found: dict[int, str] = {}
    at = 0
    while at < len(samples):
        pipeline = build(_one_by_one(samples[at:]), 1, 1)
        try:
            while at < len(samples):
                pipeline.run()
                at += 1
        except _PIPELINE_ERRORS as error:
            found[at] = _reason(str(error))
            at += 1
    return found


class _Flow:
    """Batches on their way through a pipeline: those handed in and not yet out are kept."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._again: deque[tuple[Batch, list[Sample]]] = deque()
        self.under_way: deque[tuple[Batch, list[Sample]]] = deque()
        self.failure: OSError | ValueError | None = None

    def next_arrays(self) -> Arrays:
        """DALI's source. What stops the batches is kept until those under way are out."""
        if self._again:
            entry = self._again.popleft()
        else:
            try:
                batch = next(self._batches)
            except (OSError, ValueError) as error:
                self.failure = error
                raise StopIteration from None
            entry = (batch, unpack(batch))
        self.under_way.append(entry)
        return _arrays(entry[1])

    def start_again(self) -> None:
        self._again.extendleft(reversed(self.under_way))
        self.under_way.clear()

    def finished(self, clip: Tensor) -> Batch:
        batch, samples = self.under_way.popleft()
        assert len(clip) == len(samples), f"DALI gave {len(clip)} of {len(samples)} clips"
        return batch._replace(clip=clip, parts=())


def define_pipeline(
    source: Callable[[], Arrays], *, device: str, crop: int, normalised: bool, **options: Any
) -> Any:
    """The graph on `device`, "cpu" or "gpu", yet to be built: clips [3, T, S, S], uint8 or float32.

    `source` gives a batch's arrays in the order of `_SOURCES`; `options` are those of a DALI
    pipeline.
    """
    from nvidia.dali import fn, pipeline_def, types

    def graph() -> Any:
        (
            file, numbers, places, first_corner, second_corner, transposed, colours, is_pixels,
            pixels,
        ) = fn.external_source(
            source=source,
            num_outputs=len(_SOURCES),
            dtype=[getattr(types, kind) for kind, _ in _SOURCES.values()],
            ndim=[ndim for _, ndim in _SOURCES.values()],
            layout=["CFHW" if name == "pixels" else "" for name in _SOURCES],
        )  # fmt: skip
        if is_pixels:
            clip = pixels.gpu() if device == "gpu" else pixels
        else:
            pictures = fn.decoders.video(
                file,
                frames=numbers,
                pad_mode="none",  # a missing picture is an error, not a black one
                device="mixed" if device == "gpu" else "cpu",
            )
            squares = fn.resize(
                pictures,
                size=[crop, crop],
                roi_start=first_corner,
                roi_end=second_corner,
                interp_type=types.INTERP_LINEAR,
                antialias=False,
            )
            squares = fn.coord_transform(squares, M=colours, dtype=types.UINT8)
            squares = fn.sequence_rearrange(squares, new_order=places)
            if transposed:
                clip = fn.transpose(squares, perm=[3, 0, 2, 1])
            else:
                clip = fn.transpose(squares, perm=[3, 0, 1, 2])
        if normalised:
            mean, deviation = (
                np.array(values, np.float32).reshape(3, 1, 1, 1) * 255.0
                for values in (IMAGENET_MEAN, IMAGENET_STD)
            )
            clip = fn.normalize(clip, axes=[1, 2, 3], mean=mean, stddev=deviation)
        return clip

    return pipeline_def(enable_conditionals=True)(graph)(exec_dynamic=True, **options)


def _arrays(samples: Sequence[Sample]) -> Arrays:
    """One list of arrays for each of `_SOURCES`."""
    rows = [_of_pixels(sample) if sample.cut is None else _of_cut(sample) for sample in samples]
    return tuple([row[name] for row in rows] for name in _SOURCES)


def _one_by_one(samples: Sequence[Sample]) -> Callable[[], Arrays]:
    """A source of batches of one."""
    todo = iter(samples)
    return lambda: _arrays([next(todo)])


def _of_pixels(sample: Sample) -> dict[str, np.ndarray]:
    empty = {name: np.zeros([0] * ndim, _dtype(kind)) for name, (kind, ndim) in _SOURCES.items()}
    return empty | {"is_pixels": np.array(True), "pixels": np.ascontiguousarray(sample.data)}


def _of_cut(sample: Sample) -> dict[str, np.ndarray]:
    cut = sample.cut
    assert cut is not None
    return {
        "file": sample.data.numpy(),
        "numbers": np.array(cut.numbers, np.int32),
        "places": np.array(cut.places, np.int32),
        "first_corner": np.array(cut.corners[:2], np.float32),
        "second_corner": np.array(cut.corners[2:], np.float32),
        "transposed": np.array(cut.transposed),
        "colours": np.array(cut.colours, np.float32).reshape(3, 3),
        "is_pixels": np.array(False),
        "pixels": np.zeros((0, 0, 0, 0), np.uint8),
    }


def _dtype(kind: str) -> Any:
    return {"UINT8": np.uint8, "INT32": np.int32, "FLOAT": np.float32, "BOOL": np.bool_}[kind]


def _reason(message: str) -> str:
    """DALI's complaint without its traceback."""
    text = message.partition("encountered:")[2].strip() or message.strip()
    line = text.splitlines()[0] if text else "no reason given"
    return f"cannot be decoded by DALI ({line.rpartition('failed: ')[2]})"
