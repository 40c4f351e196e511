"""Dense features to files: a `.safetensors` or `.zarr` an input, or a `.npy` an input and level.

Every file is written under a temporary name, fsynced and renamed: it is whole or not there.
"""

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from fastjepa.durable import atomic_file

Form = Literal["safetensors", "npy", "zarr"]


class FeatureWriter:
    """Writes features `[T', H', W', D]` by level into `folder`, which it creates.

    Files are `NAME.safetensors` with tensors `level5`, `level11`, ... and the metadata given,
    `NAME.zarr`, a folder with arrays of these names and the metadata as attributes, or
    `NAME.level5.npy`. safetensors keep the dtype; the others have no bfloat16 and store it as
    float32.
    """

    def __init__(
        self, folder: Path, form: Form = "safetensors", *, overwrite: bool = False
    ) -> None:
        if form not in get_args(Form):
            raise ValueError(
                f"features: expected the form {' or '.join(get_args(Form))}, found {form!r}"
            )
        if form == "zarr" and find_spec("zarr") is None:
            raise ValueError("features: zarr is not installed: pip install 'fastjepa[zarr]'")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._form, self._overwrite = folder, form, overwrite

    def paths(self, name: str, levels: list[int]) -> list[Path]:
        """The files that `write` makes. `name` may hold folders (`cats/one`), not leave
        `folder`."""
        place = self._folder / f"{name}.safetensors"
        if not name or self._folder.resolve() not in place.resolve().parents:
            raise ValueError(f"features: {name!r} is no name for a file inside {self._folder}")
        if self._form != "npy":
            return [place.with_name(f"{place.name.removesuffix('.safetensors')}.{self._form}")]
        return [self._folder / f"{name}.level{level}.npy" for level in levels]

    def check(self, name: str, levels: list[int]) -> None:
        """Raise ValueError naming a file of `name` that exists, unless overwriting was asked
        for."""
        for path in self.paths(name, levels):
            self.check_file(path)

    def check_file(self, path: Path) -> None:
        """Raise ValueError if a file exists, unless overwriting was asked for."""
        if path.exists() and not self._overwrite:
            raise ValueError(
                f"{path} exists already; ask to overwrite it, or choose another folder"
            )

    def write(
        self,
        name: str,
        features: Mapping[int, Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> list[Path]:
        """Write one input's features by level and return the files.

        `metadata` (source file, model, ...) goes into the safetensors header. Raises ValueError
        on a tensor that is not `[T', H', W', D]` and on a file that exists; OSError when the disk
        refuses.
        """
        if not features:
            raise ValueError(f"features of {name!r}: no level given")
        for level, x_THWD in features.items():
            if x_THWD.ndim != 4:
                raise ValueError(
                    f"features of {name!r}, level {level}: expected [T', H', W', D], found "
                    f"{tuple(x_THWD.shape)}"
                )
        self.check(name, list(features))
        paths = self.paths(name, list(features))
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        if self._form == "safetensors":
            tensors = {f"level{n}": x.detach().cpu().contiguous() for n, x in features.items()}
            with atomic_file(paths[0]) as handle:
                handle.write(save(tensors, dict(metadata or {})))
        elif self._form == "zarr":
            _write_zarr(paths[0], features, dict(metadata or {}))
        else:
            for path, x_THWD in zip(paths, features.values(), strict=True):
                with atomic_file(path) as handle:
                    np.save(handle, _array(x_THWD))
        return paths


def _write_zarr(path: Path, features: Mapping[int, Tensor], metadata: dict[str, str]) -> None:
    import zarr

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        group = zarr.open_group(temporary, mode="w", attributes={**metadata})
        for level, x_THWD in features.items():
            # One step a chunk: reading a time reads little more.
            array = _array(x_THWD)
            group.create_array(f"level{level}", data=array, chunks=(1, *array.shape[1:]))
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _array(x_THWD: Tensor) -> np.ndarray:
    x_THWD = x_THWD.detach().cpu()
    array: np.ndarray = (x_THWD.float() if x_THWD.dtype == torch.bfloat16 else x_THWD).numpy()
    return array
