"""The arithmetic of one process: precision, gradients, AdamW with a veto, EMA."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fastjepa.optim.param_groups import param_groups
from fastjepa_kernels import ema_update


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
        follows: bool = True,
        dtype: torch.dtype = torch.float32,
        weight_decay: float = 0.04,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float | None = None,
        in_turn: bool | None = None,
    ) -> None:
        """`follows`: whether the target is the encoder's EMA (else it is a frozen teacher).

        `in_turn`: mask groups one after the other through the predictor, in less memory, rather
        than packed into one pass, in fewer launches; None takes turns on a CPU.
        """
        self.device = next(encoder.parameters()).device
        self.in_turn = self.device.type == "cpu" if in_turn is None else in_turn
        self.dtype, self.clip = dtype, clip
        self.parameters = [*encoder.parameters(), *predictor.parameters()]
        self.optimizer = torch.optim.AdamW(
            param_groups((encoder, predictor), weight_decay),
            lr=0.0,
            betas=betas,
            eps=eps,
            fused=True,
        )
        self.ema_pairs = (
            (list(target.parameters()), list(encoder.parameters())) if follows else None
        )
        target.requires_grad_(False)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forwards run."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def grad_norm(self) -> Tensor:
        """0-d global norm of all gradients; clips them to `clip` if that is set."""
        grads = self.gradients()
        norm = torch.nn.utils.get_total_norm(grads)
        if self.clip is not None:
            torch._foreach_mul_(grads, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def step(self, *, lr: float, weight_decay: float, momentum: float, veto: Tensor) -> None:
        """AdamW, then the EMA of the result; where `veto` is 1 neither changes anything."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if group["decay"]:
                group["weight_decay"] = weight_decay
        self.optimizer.found_inf = veto  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema_pairs is not None:
            ema_update(*self.ema_pairs, momentum, veto=veto)
