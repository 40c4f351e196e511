"""What a step asks of the arithmetic below it, and the engine of one process.

`engine_deepspeed.py` holds the engine of many.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from fastjepa.checkpoint import load_strict, pack_optimizer, unpack_optimizer
from fastjepa.checkpoint.pieces import Shares, host_copy, wait_for_copies, whole
from fastjepa.objective.health import gradient_norms
from fastjepa.observe.stages import stage
from fastjepa.optim.param_groups import param_groups
from fastjepa.train.ranks import Ranks
from fastjepa_kernels import ema_update

Parts = Mapping[str, Mapping[str, Tensor]]


class Engine(Protocol):
    """Forward, backward, optimizer and EMA, over one rank or many.

    `dtype` is the products' dtype; `in_turn` says that mask groups go through the predictor one
    after the other.
    """

    device: torch.device
    dtype: torch.dtype
    in_turn: bool
    ranks: Ranks

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which the networks run."""

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """`run()`, which calls the networks and returns the loss, under `autocast`."""

    def measure(self, run: Callable[[], None]) -> None:
        """`run()`, which calls the networks, without gradients, as exactly as the weights are."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the loss's gradients; with `last` they are the step's whole gradients, the mean over
        the ranks."""

    def part_norms(self) -> dict[str, Tensor]:
        """0-d norms of the step's gradients as `gradient_norms` names them, before clipping."""

    def grad_norm(self) -> Tensor:
        """0-d global norm of the step's gradients; they are clipped by it if asked for."""

    def ema_distance(self) -> Tensor:
        """0-d norm of the context encoder minus its EMA, over the EMA's norm."""

    def step(self, *, lr: float, weight_decay: float, momentum: float, veto: Tensor) -> None:
        """AdamW, then the EMA of the result; where `veto` is 1 neither changes anything."""

    def snapshot(self) -> Shares:
        """This rank's share of weights and moments as a checkpoint's parts, copied to the host:
        `encoder`, `predictor`, `target_encoder` and `optimizer`; all ranks' are everything."""

    def load(self, parts: Parts, what: str) -> None:
        """Take over those parts of a checkpoint that are given; a rank reads its share of them.

        `what` names the file in errors. Raises CheckpointError naming each tensor that does not
        fit.
        """


def named_parameters(encoder: nn.Module, predictor: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter that the optimizer moves, named `encoder.*` and `predictor.*`."""
    return [
        (f"{part}.{name}", parameter)
        for part, module in (("encoder", encoder), ("predictor", predictor))
        for name, parameter in module.named_parameters()
    ]


class TorchEngine:
    """One process on a CPU or one GPU.

    Parameters, gradients, moments and the EMA target are float32; with `dtype` bfloat16 the
    products run in bfloat16 by autocast. `dtype` float64 is for tests.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        predictor: nn.Module,
        target: nn.Module,
        dtype: torch.dtype = torch.float32,
        weight_decay: float = 0.04,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float | None = None,
        in_turn: bool | None = None,
    ) -> None:
        """`target` becomes the encoder's EMA, whoever gives the targets.

        `in_turn`: mask groups one after the other through the predictor, in less memory, rather
        than packed into one pass, in fewer launches; None takes turns on a CPU.
        """
        self.device = next(encoder.parameters()).device
        self.in_turn = self.device.type == "cpu" if in_turn is None else in_turn
        self.dtype, self.clip, self.ranks = dtype, clip, Ranks()
        self.named = named_parameters(encoder, predictor)
        self.optimizer = torch.optim.AdamW(
            param_groups((encoder, predictor), weight_decay),
            lr=0.0,
            betas=betas,
            eps=eps,
            fused=True,
        )
        self.networks = {"encoder": encoder, "predictor": predictor, "target_encoder": target}
        self.ema_pairs = list(target.parameters()), list(encoder.parameters())
        target.requires_grad_(False)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        with self.autocast():
            return run()

    @torch.no_grad()
    def measure(self, run: Callable[[], None]) -> None:
        run()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        loss.backward()

    def part_norms(self) -> dict[str, Tensor]:
        return gradient_norms(self.named)

    def grad_norm(self) -> Tensor:
        grads = self.gradients()
        norm = torch.nn.utils.get_total_norm(grads)
        if self.clip is not None:
            torch._foreach_mul_(grads, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def ema_distance(self) -> Tensor:
        return relative_distance(squares(*self.ema_pairs))

    def gradients(self) -> list[Tensor]:
        """Those of all parameters that have one."""
        return [p.grad for _, p in self.named if p.grad is not None]

    def step(self, *, lr: float, weight_decay: float, momentum: float, veto: Tensor) -> None:
        set_schedule(self.optimizer, lr=lr, weight_decay=weight_decay)
        with stage("optimizer"):
            self.optimizer.found_inf = veto  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with stage("EMA"):
            ema_update(*self.ema_pairs, momentum, veto=veto)

    def snapshot(self) -> Shares:
        parts: dict[str, Mapping[str, Tensor]] = {
            name: module.state_dict() for name, module in self.networks.items()
        }
        parts["optimizer"] = pack_optimizer(self.optimizer, self.named)
        copies = {
            part: whole({name: host_copy(tensor) for name, tensor in tensors.items()})
            for part, tensors in parts.items()
        }
        wait_for_copies(self.device)
        return copies

    def load(self, parts: Parts, what: str) -> None:
        for name, module in self.networks.items():
            if name in parts:
                load_strict(module, parts[name], f"{what}: {name}")
        if "optimizer" in parts:
            unpack_optimizer(self.optimizer, self.named, parts["optimizer"], f"{what}: optimizer")


@torch.no_grad()
def squares(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """[2] float32: sums of squares of the differences and of the targets, one tensor at a time."""
    total = torch.zeros(2, device=targets[0].device)
    for target, source in zip(targets, sources, strict=True):
        total[0] += torch.linalg.vector_norm(source - target).square()
        total[1] += torch.linalg.vector_norm(target).square()
    return total


def relative_distance(squares_2: Tensor) -> Tensor:
    """0-d norm of the differences over that of the targets, from `squares`."""
    return (squares_2[0] / squares_2[1]).sqrt()


def set_schedule(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """This step's learning rate in all groups, its weight decay in those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay
