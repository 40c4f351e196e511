"""Linear regression with a penalty, from sums alone: no sample is kept, however many there are.

fit, test = Moments(width), Moments(width)
fit.add(features, numbers)
explained(ridge(fit), test)

Shapes: N samples, D channels; D1 = D + 1, a constant behind the channels.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


class Moments:
    """Sums of products of samples with one another and with the number that belongs to each."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.xx_D1D1 = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self.xy_D1 = torch.zeros(width + 1, dtype=torch.float64, device=device)
        self.yy = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x_ND: Tensor, y_N: Tensor) -> None:
        """Take samples [N, D] and their numbers [N]."""
        x_ND1, y_N = pad(x_ND.double(), (0, 1), value=1.0), y_N.double()
        self.xx_D1D1 += x_ND1.T @ x_ND1
        self.xy_D1 += x_ND1.T @ y_N
        self.yy += y_N @ y_N


def ridge(fit: Moments, penalty: float = 1e-2) -> Tensor:
    """The map [D1] of least squared error plus `penalty` times its weights' squares, for channels
    of deviation 1; the constant is free. A channel that never changes has no weight."""
    count = fit.xx_D1D1[-1, -1]
    mean_D1 = fit.xx_D1D1[-1] / count
    variance_D1 = (fit.xx_D1D1.diagonal() / count - mean_D1.square()).clamp_min(0.0)
    # Of channels that hardly change the rounding is what is left.
    variance_D1 = torch.where(variance_D1 < 1e-10 * (1.0 + mean_D1.square()), 0.0, variance_D1)
    free = torch.zeros_like(mean_D1)
    free[-1] = 1.0
    held_D1 = torch.where(variance_D1 > 0.0, penalty * count * variance_D1, count)
    found: Tensor = torch.linalg.solve(fit.xx_D1D1 + torch.diag(held_D1 * (1.0 - free)), fit.xy_D1)
    return found


def explained(map_D1: Tensor, test: Moments) -> float:
    """R^2: the share of the numbers' variance that the map explains; 0 is as good as their mean."""
    error = test.yy - 2.0 * (map_D1 @ test.xy_D1) + map_D1 @ test.xx_D1D1 @ map_D1
    variance = test.yy - test.xy_D1[-1].square() / test.xx_D1D1[-1, -1]
    return float(1.0 - error / variance)
