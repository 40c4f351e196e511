"""The other implementations of AdamW, their arithmetic alone in Python: DeepSpeed's C++ takes
minutes to build, and Apex needs a GPU. Who counts the steps, and where, is as in the real ones."""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class AdamUpdate:
    """What DeepSpeedCPUAdam loads; like C++, it takes no tensor for a number of steps."""

    def create_adam(self, *_: object) -> None: ...

    def destroy_adam(self, *_: object) -> None: ...

    def adam_update(
        self, _: int, step: int, lr: float, beta1: float, beta2: float, eps: float, decay: float,
        __: bool, weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor,
    ) -> None:  # fmt: skip
        assert type(step) is int, step
        mean.lerp_(grad, 1 - beta1)
        square.lerp_(grad.square(), 1 - beta2)
        scale = (square / (1 - beta2**step)).sqrt_().add_(eps)
        weight.mul_(1 - lr * decay).addcdiv_(mean, scale, value=-lr / (1 - beta1**step))


class FusedAdam(torch.optim.Optimizer):
    """As Apex's: a group counts, and a master has its moments alone."""

    def __init__(self, groups: Any, **defaults: Any) -> None:
        super().__init__(groups, {"weight_decay": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state |= {
                        "exp_avg": torch.zeros_like(weight),
                        "exp_avg_sq": torch.zeros_like(weight),
                    }
                AdamUpdate().adam_update(
                    0, group["step"], group["lr"], *group["betas"], group["eps"],
                    group["weight_decay"], True, weight.data, weight.grad,
                    state["exp_avg"], state["exp_avg_sq"],
                )  # fmt: skip


class _Builder:
    def load(self) -> AdamUpdate:
        return AdamUpdate()


def install() -> None:
    """Put them where the engine looks for the real ones."""
    import deepspeed.ops.adam.cpu_adam as cpu_adam

    cpu_adam.CPUAdamBuilder = _Builder
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    sys.modules |= {"apex": apex, "apex.optimizers": optimizers}
