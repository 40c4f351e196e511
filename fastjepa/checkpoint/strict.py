"""Tensors into a module, strictly: all fits, or nothing is written and one error says why."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastjepa.checkpoint.tensor_file import CheckpointError, described


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy `tensors` into the parameters and buffers of `module`.

    `what` names the part and its file in errors. A floating-point type that the module's widens
    without loss (bfloat16 to float32) is accepted, any other difference is not. Raises
    CheckpointError that names each missing, extra, mis-shaped or mistyped tensor; the module is
    then untouched.
    """
    own: dict[str, Tensor] = module.state_dict()
    check_fit(own, tensors, what)
    _check_memory(own, tensors, what)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def check_fit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    """Compare names, shapes and dtypes. Raises CheckpointError that names every difference."""
    found = described(found)
    shared = [name for name in wanted if name in found]
    differences = {
        "missing": [name for name in wanted if name not in found],
        "extra": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {_shape(found[name])} where {_shape(wanted[name])} is expected"
            for name in shared
            if found[name].shape != wanted[name].shape
        ],
        "of another type": [
            f"{name} {_dtype(found[name])} where {_dtype(wanted[name])} is expected"
            for name in shared
            if not _widens(found[name].dtype, wanted[name].dtype)
        ],
    }
    told = [
        f"{len(names)} {kind}: {', '.join(names)}" for kind, names in differences.items() if names
    ]
    if told:
        raise CheckpointError(f"{what} does not fit: {'; '.join(told)}")


def _check_memory(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse what copying would lose: tensors without memory, tied ones that differ in the file."""
    meta = [name for name, tensor in own.items() if tensor.is_meta]
    if meta:
        raise CheckpointError(
            f"{what} cannot be loaded: no memory behind {', '.join(meta)} (meta device)"
        )
    tied: dict[tuple[torch.device, int, torch.Size], list[str]] = defaultdict(list)
    for name, tensor in own.items():
        if tensor.numel():
            tied[tensor.device, tensor.data_ptr(), tensor.shape].append(name)
    unequal = [
        f"{first} and {name}"
        for first, *others in tied.values()
        for name in others
        if not torch.equal(tensors[first], tensors[name])
    ]
    if unequal:
        raise CheckpointError(
            f"{what} does not fit: one tensor here, different values there: {', '.join(unequal)}"
        )


def _widens(found: torch.dtype, wanted: torch.dtype) -> bool:
    floats = found.is_floating_point and wanted.is_floating_point
    return found == wanted or (floats and torch.promote_types(found, wanted) == wanted)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
