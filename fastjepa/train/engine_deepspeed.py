"""The engine of many ranks: DeepSpeed ZeRO, with the EMA target in float32 shards.

    engine = DeepSpeedEngine(encoder=..., predictor=..., target=..., ranks=ranks, stage=2)

The networks come in float32, with the weights of the first rank, and go into one DeepSpeed engine.
Working weights and gradients are of `dtype`; masters, moments and EMA are float32 shards.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastjepa.checkpoint.pieces import Shares, wait_for_copies
from fastjepa.model.block import Block, blocks_of
from fastjepa.model.tokenizer import Tokenizer
from fastjepa.observe.stages import stage
from fastjepa.optim.param_groups import param_groups
from fastjepa.train.engine import (
    Parts,
    named_parameters,
    relative_distance,
    set_schedule,
    squares,
)
from fastjepa.train.ranks import Ranks
from fastjepa.train.zero_layout import check_version, layout_of
from fastjepa.train.zero_shards import ZeroShards

AdamW = Literal["torch", "deepspeed", "apex"]
# Gradients and weights travel in buckets of at most so many elements.
BUCKET = 200_000_000
# AdamW's groups hold at most this share of the parameters: while one is at work its gradients are
# there in float32 too, and the target's weights travel one after another.
LARGEST_GROUP = 1 / 8


class DeepSpeedEngine:
    """ZeRO stage 0 (data parallel), 1 (shards the float32 state), 2 (and gradients), 3 (and all
    weights)."""

    in_turn = False

    def __init__(
        self,
        *,
        encoder: nn.Module,
        predictor: nn.Module,
        target: nn.Module,
        ranks: Ranks,
        device: torch.device,
        stage: int = 2,
        dtype: torch.dtype = torch.bfloat16,
        communication_dtype: torch.dtype | None = None,
        offload: bool = False,
        adamw: AdamW = "torch",
        weight_decay: float = 0.04,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float | None = None,
        roles: bool = False,
    ) -> None:
        """`communication_dtype`: what gradients are reduced in, `dtype` if None. `offload`:
        masters, moments and EMA in the host's memory. `adamw`: whose implementation. `roles`:
        some ranks take images and others videos.

        All ranks must call it, joined (`ranks.join` with `alone`). Raises ValueError for a
        DeepSpeed that is missing or of another version, an AdamW that cannot be imported, and
        shards that do not lie as expected.
        """
        deepspeed = _import_deepspeed(device)
        self.device, self.dtype, self.ranks = device, dtype, ranks
        self._norms: dict[str, Tensor] | None = None
        self._whole_gradients = False
        named = named_parameters(encoder, predictor)
        shapes = {name: parameter.shape for name, parameter in named}
        parts = {"encoder": encoder, "predictor": predictor, "target_encoder": target}
        # DeepSpeed rounds the weights to `dtype` before it makes the masters.
        exact = {
            part: {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
            for part, module in parts.items()
        }
        ranks.share([tensor for tensors in exact.values() for tensor in tensors.values()])
        target.requires_grad_(False)
        networks = _Networks(encoder, predictor, target)
        if stage == 3:
            deepspeed.utils.set_z3_leaf_modules(networks, [Block])
        self._loose = _outside_blocks(encoder, predictor)
        self._roles = roles
        if roles:
            # Stage 2 reduces gradients as they come, so they have to come in one order on all
            # ranks: behind the patches of either tokenizer, which a backward reaches last.
            for module in encoder.modules():
                if isinstance(module, Tokenizer):
                    module.gate = partial(_with_all, parameters=self._loose)
        total = sum(shape.numel() for shape in shapes.values())
        groups = list(_pieces(param_groups((encoder, predictor), weight_decay), total))
        optimizer = _adamw(
            adamw, groups, betas, eps, device=torch.device("cpu") if offload else device
        )
        self._engine, *_ = deepspeed.initialize(
            model=networks,
            optimizer=optimizer,
            config=_config(
                networks, stage, dtype, communication_dtype or dtype, offload, clip, device
            ),
            dist_init_required=False,
        )
        if stage == 3:
            # They are gathered ahead of the forward, on all ranks alike.
            for parameter in (*self._loose, *(_outside_blocks(target) if roles else ())):
                deepspeed.zero.register_external_parameter(networks, parameter)
            if roles:
                _call_unseen([m for m in networks.modules() if isinstance(m, Tokenizer)])
        self._layout = layout_of(self._engine, stage, {p: name for name, p in named})
        targets = {f"encoder.{name}": p for name, p in target.named_parameters()}
        self.shards = ZeroShards(self._layout, shapes, targets)
        self.load(exact, "the initial weights")
        self._layout.check(dict(named))
        target.register_forward_pre_hook(lambda *_: self._layout.wait())

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        def loss() -> Tensor:
            with self.autocast():
                return run() if self._roles else _with_all(run(), self._loose)

        found: Tensor = self._engine(loss)
        return found

    @torch.no_grad()
    def measure(self, run: Callable[[], None]) -> None:
        def nothing() -> Tensor:
            with self.autocast():
                run()
            return torch.zeros((), device=self.device)

        self._engine(nothing)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        assert not self._whole_gradients, "a micro-batch after the step's last"
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)
        self._whole_gradients = last

    def part_norms(self) -> dict[str, Tensor]:
        assert self._whole_gradients, "the step's last micro-batch has not come"
        if self._norms is None:
            self._norms = self.shards.norms()
        return self._norms

    def grad_norm(self) -> Tensor:
        return self.part_norms()["grad_norm"]

    def step(self, *, lr: float, weight_decay: float, momentum: float, veto: Tensor) -> None:
        assert self._whole_gradients, "the step's last micro-batch has not come"
        set_schedule(self._layout.client, lr=lr, weight_decay=weight_decay)
        vetoed = bool(veto)
        with stage("optimizer"):
            self._layout.step(veto=vetoed)
        if not vetoed:
            with stage("EMA"):
                self.shards.update_ema(momentum)
        self._norms, self._whole_gradients = None, False

    def ema_distance(self) -> Tensor:
        masters, ema = self._layout.masters(), self.shards.ema
        # Shards of the encoder's alone; their padding holds zeros in both.
        found = squares(list(ema.values()), [masters[shard] for shard in ema]).to(self.device)
        return relative_distance(self.ranks.mean(found))

    def snapshot(self) -> Shares:
        copies = self.shards.snapshot()
        wait_for_copies(self.device)
        return copies

    def load(self, parts: Parts, what: str) -> None:
        self.shards.load(parts, what)


class _Networks(nn.Module):
    """All three networks as DeepSpeed wants them: one module; its forward runs what it is given."""

    def __init__(self, encoder: nn.Module, predictor: nn.Module, target: nn.Module) -> None:
        super().__init__()
        self.encoder, self.predictor, self.target = encoder, predictor, target

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        return run()


class _WithAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.like)
        return grad, *zeros


def _with_all(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The loss (or another tensor), with a gradient of zero for each parameter that the loss may
    not depend on.

    DeepSpeed's stages reduce what a backward brings. An image step brings nothing for the video
    tokenizer: ranks would wait for one another, and stage 3 would add to an older step's gradient.
    """
    if not torch.is_grad_enabled():
        return loss
    found: Tensor = _WithAll.apply(loss, *parameters)  # type: ignore[no-untyped-call]
    return found


def _pieces(groups: list[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """The groups cut into smaller ones, each parameter whole."""
    for group in groups:
        piece: list[nn.Parameter] = []
        for parameter in group["params"]:
            size = sum(p.numel() for p in piece) + parameter.numel()
            if piece and size > total * LARGEST_GROUP:
                yield {**group, "params": piece}
                piece = []
            piece.append(parameter)
        yield {**group, "params": piece}


def _call_unseen(modules: list[nn.Module]) -> None:
    """Take stage 3's hooks off these modules, whose parameters are gathered already.

    It records the modules that a rank calls, and wants all ranks to call the same ones. Ranks of
    images and of videos have tokenizers of their own.
    """
    for module in modules:
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()


def _outside_blocks(*networks: nn.Module) -> list[nn.Parameter]:
    """The parameters that a micro-batch may leave out: all but those of the transformer blocks."""
    inside = {parameter for block in blocks_of(*networks) for parameter in block.parameters()}
    return [p for network in networks for p in network.parameters() if p not in inside]


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for one even where there is one rank
    # Collectives that it, and torch before 2.12, know by their older names only.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"engine.kind: deepspeed cannot be imported ({error}); "
            'pip install "fastjepa[zero]", or engine.kind=torch'
        ) from error
    check_version(deepspeed.__version__.partition("+")[0])
    # Its warnings of skipped steps are the guard's to give.
    deepspeed.utils.logger.setLevel("ERROR")
    # Would be compiled on first use; gloo does on a CPU what it does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _adamw(
    kind: AdamW,
    groups: list[dict[str, Any]],
    betas: tuple[float, float],
    eps: float,
    *,
    device: torch.device,
) -> torch.optim.Optimizer:
    if kind == "torch":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    try:
        if kind == "apex":
            from apex.optimizers import FusedAdam
        elif device.type == "cpu":
            from deepspeed.ops.adam import DeepSpeedCPUAdam as FusedAdam
        else:
            from deepspeed.ops.adam import FusedAdam
    except ImportError as error:
        raise ValueError(
            f"engine.adamw: {kind} cannot be imported ({error}); engine.adamw=torch needs nothing"
        ) from error
    made: torch.optim.Optimizer = FusedAdam(groups, lr=0.0, betas=betas, eps=eps)
    return made


def _config(
    networks: _Networks,
    stage: int,
    dtype: torch.dtype,
    communication_dtype: torch.dtype,
    offload: bool,
    clip: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """DeepSpeed's settings. The micro-batches of a step and its veto are ours to decide."""
    parameters = list(networks.parameters())
    total = sum(p.numel() for p in parameters if p.requires_grad)
    bucket = min(BUCKET, total + total % 2)
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks_of(networks))
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        # At stage 1 it would reduce only what the last micro-batch touched.
        "overlap_comm": stage > 1 and device.type == "cuda",
        "round_robin_gradients": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if stage == 3:
        # Vectors stay whole on every rank; of the blocks, one is at work and one on its way.
        zero |= {
            "stage3_param_persistence_threshold": max(p.numel() for p in parameters if p.ndim == 1),
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": 3 * block,
            "stage3_max_reuse_distance": 0,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": clip or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "communication_data_type": {torch.float32: "fp32", torch.bfloat16: "bf16"}[
            communication_dtype
        ],
        "zero_optimization": zero,
    }
