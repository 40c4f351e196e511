"""AdamW's state as named tensors: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`, bit for bit.

Learning rate and weight decay are not stored: they follow from the recipe and the step. A parameter
that no gradient has reached yet (image steps leave the video tokenizer alone) has no moments; it is
stored as `.step` = 0 only.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastjepa.checkpoint.strict import check_fit
from fastjepa.checkpoint.tensor_file import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq")
NamedParameters = Iterable[tuple[str, nn.Parameter]]


def pack_optimizer(optimizer: Optimizer, named_parameters: NamedParameters) -> dict[str, Tensor]:
    """The state of `optimizer` under the parameters' names; the tensors themselves, not copies.

    `named_parameters` names each parameter of the optimizer (others are passed over). Raises
    CheckpointError: a parameter without a name, state that is not plain AdamW's.
    """
    packed: dict[str, Tensor] = {}
    for name, parameter, _ in _named(optimizer, named_parameters):
        state = optimizer.state.get(parameter, {})
        if not state:
            packed[f"{name}.step"] = torch.zeros(())
            continue
        if set(state) != {"step", *_MOMENTS}:
            raise CheckpointError(
                f"optimizer state of {name}: found {', '.join(sorted(state))}; "
                "expected AdamW's exp_avg, exp_avg_sq, step (without amsgrad)"
            )
        packed |= {f"{name}.{key}": value for key, value in state.items()}
    return packed


def unpack_optimizer(
    optimizer: Optimizer,
    named_parameters: NamedParameters,
    tensors: Mapping[str, Tensor],
    what: str = "optimizer",
) -> None:
    """Put what `pack_optimizer` gave back into `optimizer`, each moment on its parameter's device.

    Raises CheckpointError that names each missing, extra, mis-shaped or mistyped tensor; the
    optimizer is then untouched.
    """
    named = _named(optimizer, named_parameters)
    fresh = {name for name, _, _ in named if _is_fresh(name, tensors)}
    wanted: dict[str, Tensor] = {}
    for name, parameter, _ in named:
        # A counter is float32, or float64 where that is PyTorch's default type.
        wanted[f"{name}.step"] = torch.zeros((), dtype=torch.float64)
        if name not in fresh:
            wanted |= {f"{name}.{key}": parameter for key in _MOMENTS}
    check_fit(wanted, tensors, what)
    for name, parameter, counts_on_device in named:
        optimizer.state.pop(parameter, None)
        if name in fresh:
            continue
        step = tensors[f"{name}.step"].to(
            parameter.device if counts_on_device else "cpu", copy=True
        )
        optimizer.state[parameter] = {"step": step} | {
            key: torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"{name}.{key}"])
            for key in _MOMENTS
        }


def _is_fresh(name: str, tensors: Mapping[str, Tensor]) -> bool:
    step = tensors.get(f"{name}.step")
    moments = any(f"{name}.{key}" in tensors for key in _MOMENTS)
    return step is not None and step.numel() == 1 and not step.any() and not moments


def _named(
    optimizer: Optimizer, named_parameters: NamedParameters
) -> list[tuple[str, nn.Parameter, bool]]:
    """Each parameter with its name, and whether its step counter lives on its device."""
    names = {parameter: name for name, parameter in named_parameters}
    named: list[tuple[str, nn.Parameter, bool]] = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise CheckpointError(
                    f"optimizer: a parameter of shape {list(parameter.shape)} "
                    f"in group {number} has no name"
                )
            on_device = bool(group.get("fused") or group.get("capturable"))
            named.append((names[parameter], parameter, on_device))
    return named
