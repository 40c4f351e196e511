"""The guard: a step whose loss or gradient is not finite, or whose loss jumps, must leave no trace.

All on the device: the decision is a 0-d tensor that vetoes the optimizer and the EMA, and nobody
waits for it.
"""

import torch
from torch import Tensor


class LossGuard:
    """Decides whether a step may count, from its loss and the last accepted losses.

    `sigma` None leaves the jump test out. Jumps are tested from step `start`, once half of
    `window` losses are known (the reference's rule, docs/method.md section 6).
    """

    def __init__(
        self, *, sigma: float | None, window: int, start: int, device: torch.device
    ) -> None:
        self.sigma, self.start = sigma, start
        self.losses = torch.full((window,), torch.nan, dtype=torch.float64, device=device)
        self.accepted = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def veto(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """0-d float32: 1 if the step must be skipped, 0 if it counts; remembers the loss if it
        does."""
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        if self.sigma is not None and step >= self.start:
            known = self.losses.isfinite()
            count = known.sum()
            mean = self.losses.nanmean()
            std = torch.where(known, self.losses - mean, 0.0).square().sum().div(count).sqrt()
            jumped = loss.double() > mean + self.sigma * std
            bad = bad | (jumped & (count > len(self.losses) // 2))
        place = (self.accepted % len(self.losses))[None]  # indexed by a 0-d tensor, the host waits
        kept = torch.where(bad, self.losses.index_select(0, place), loss.double())
        self.losses.index_copy_(0, place, kept)
        self.accepted += ~bad
        self.skipped += bad
        self.skipped_in_a_row.add_(1).mul_(bad)
        return bad.float()

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        return {
            "losses": self.losses,
            "accepted": self.accepted,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state()`; ValueError if its window is another."""
        for name, own in self.state().items():
            if name not in state or state[name].shape != own.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"guard.{name}: expected {tuple(own.shape)}, found {found}")
            own.copy_(state[name])
