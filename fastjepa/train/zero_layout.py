"""Where DeepSpeed keeps what: the only file that touches its internals, checked on start.

Known for the one version below (docs/distributed.md). `layout_of` gives the layout of an engine's
ZeRO stage:

- 0: every rank holds all; a shard is the float32 master of one parameter.
- 1, 2: a group's parameters lie in one flat buffer, cut into equal shares for the ranks.
- 3: every parameter is cut by itself; the pieces of a sub-group follow one another.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

VERSION = "0.19.8"
Ema = Mapping[int, Tensor]
Targets = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Fragment:
    """`numel` elements from `start` of the flattened parameter `name`, at `offset` of a shard."""

    name: str
    start: int
    numel: int
    shard: int
    offset: int

    def of(self, shard: Tensor) -> Tensor:
        """A view of its elements in the shard."""
        return shard.view(-1).narrow(0, self.offset, self.numel)

    def within(self, parameter: Tensor) -> Tensor:
        """Its elements in the whole parameter, a view where that is contiguous."""
        return parameter.reshape(-1).narrow(0, self.start, self.numel)


class Layout(ABC):
    """What the stages share. A step is vetoed by DeepSpeed's own way out of an overflow."""

    sharded = True

    def __init__(self, engine: Any, names: Mapping[nn.Parameter, str]) -> None:
        """`names` gives each trained parameter its name."""
        self.engine, self.optimizer, self.names = engine, engine.optimizer, names
        self.client: torch.optim.Optimizer = engine.basic_optimizer
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(engine.device)
        self._vetoed = False

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The float32 weights of every shard of this rank."""

    @abstractmethod
    def fragments(self, rank: int) -> Sequence[Fragment]:
        """What a rank's shards hold, in their order."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[Fragment, Tensor]]:
        """Each fragment with its gradient, the ranks' mean, after a step's last backward."""

    @abstractmethod
    def refresh(self) -> None:
        """Give the networks their working weights from the masters."""

    @abstractmethod
    def live(self, parameter: nn.Parameter, fragment: Fragment) -> Tensor:
        """A view of the fragment in a network's own parameter."""

    @abstractmethod
    def working(self, targets: Targets) -> dict[str, list[Tensor]]:
        """The tensors of this rank in the working precision: `weights`, `gradients`, `target`."""

    def lay_out_target(self, targets: Targets, ema: Ema) -> None:  # noqa: B027 (nothing to do)
        """Give the target's parameters their place, once."""

    def publish(self, targets: Targets, ema: Ema) -> None:
        """Give the target its working weights from the EMA; `wait` before they are read."""
        for fragment in self.own:
            if fragment.shard in ema:
                live = self.live(targets[fragment.name], fragment)
                live.copy_(fragment.of(ema[fragment.shard]), non_blocking=True)

    def wait(self) -> None:  # noqa: B027 (nothing travels)
        """Until the target's working weights are there."""

    def step(self, *, veto: bool) -> None:
        """DeepSpeed's optimizer step, or none and the gradients dropped."""
        self._vetoed = veto
        self.engine.step()

    @cached_property
    def own(self) -> Sequence[Fragment]:
        """The fragments of this rank."""
        return self.fragments(self.rank)

    @cached_property
    def saved(self) -> Sequence[Fragment]:
        """The fragments that this rank writes: all ranks' together are every parameter once."""
        return self.own if self.sharded else self.own[self.rank :: self.size]

    def check(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises ValueError unless each fragment of the masters is the live weight of its name."""
        masters = self.masters()
        fits = not getattr(self.optimizer, "round_robin_gradients", False)
        held = sum(fragment.numel for rank in range(self.size) for fragment in self.fragments(rank))
        total = sum(getattr(p, "ds_numel", p.numel()) for p in self.names)
        fits = fits and held == (total if self.sharded else total * self.size)
        for fragment in self.own if fits else ():
            live = self.live(parameters[fragment.name], fragment)
            fits = fits and torch.equal(live, fragment.of(masters[fragment.shard]).to(live))
        if not fits:
            raise ValueError(
                f"engine.zero_stage: DeepSpeed {VERSION} lays out its shards in another way than "
                "expected; engine.kind=torch trains without it"
            )

    def _discard_if_vetoed(self, **_: object) -> None:
        """Takes the place of DeepSpeed's own decision whether a step overflowed."""
        self.optimizer.overflow = self._vetoed


class WholeLayout(Layout):
    """Stage 0: plain data parallel."""

    sharded = False

    def __init__(self, engine: Any, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__(engine, names)
        # In bfloat16 its optimizer takes a first step on zeros, which would count.
        self.client.state.clear()
        for group in self.client.param_groups:
            group.pop("step", None)

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        groups = getattr(self.optimizer, "fp16_groups", None)
        if groups is None:
            groups = [group["params"] for group in self.client.param_groups]
        return [parameter for group in groups for parameter in group]

    def masters(self) -> list[Tensor]:
        return [master for group in self.client.param_groups for master in group["params"]]

    def fragments(self, rank: int) -> Sequence[Fragment]:
        return [
            Fragment(self.names[parameter], 0, parameter.numel(), shard, 0)
            for shard, parameter in enumerate(self._parameters)
        ]

    def gradients(self) -> Iterator[tuple[Fragment, Tensor]]:
        for fragment, parameter in zip(self.own, self._parameters, strict=True):
            assert parameter.grad is not None
            yield fragment, parameter.grad

    @torch.no_grad()
    def refresh(self) -> None:
        for parameter, master in zip(self._parameters, self.masters(), strict=True):
            parameter.copy_(master)

    def live(self, parameter: nn.Parameter, fragment: Fragment) -> Tensor:
        return parameter.detach().view(-1)

    def working(self, targets: Targets) -> dict[str, list[Tensor]]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        weights: list[Tensor] = [*self._parameters]
        return {"weights": weights, "gradients": gradients, "target": [*targets.values()]}

    def step(self, *, veto: bool) -> None:
        if veto:
            self.engine.zero_grad()
        else:
            self.engine.step()


class FlatLayout(Layout):
    """Stages 1 and 2: the target's working weights lie like the networks' and are gathered."""

    def __init__(self, engine: Any, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__(engine, names)
        self.optimizer.check_grad_overflow = True
        self.optimizer.check_overflow = self._discard_if_vetoed
        self._flat: dict[int, Tensor] = {}
        self._travelling: list[Any] = []

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _placed(self, shard: int) -> Iterator[tuple[nn.Parameter, int]]:
        """A group's parameters and their places in its flat buffer."""
        optimizer = self.optimizer
        return zip(
            optimizer.round_robin_bit16_groups[shard],
            optimizer.round_robin_bit16_offsets[shard],
            strict=True,
        )

    def fragments(self, rank: int) -> Sequence[Fragment]:
        found = []
        for shard, size in enumerate(map(int, self.optimizer.partition_size)):
            low, high = rank * size, (rank + 1) * size
            for parameter, place in self._placed(shard):
                start, stop = max(place, low), min(place + parameter.numel(), high)
                if start < stop:
                    name = self.names[parameter]
                    found.append(Fragment(name, start - place, stop - start, shard, start - low))
        return found

    def gradients(self) -> Iterator[tuple[Fragment, Tensor]]:
        if self.optimizer.cpu_offload:
            masters = self.masters()
            yield from ((f, f.of(masters[f.shard].grad)) for f in self.own)  # type: ignore[arg-type]
            return
        for shard, parts in self.optimizer.averaged_gradients.items():
            # A share without any parameter holds one part of zeros.
            own = [fragment for fragment in self.own if fragment.shard == shard]
            real = [part for part in parts if not getattr(part, "_zero_padding", False)]
            yield from zip(own, real if own else (), strict=True)

    def refresh(self) -> None:
        self.optimizer.update_lp_params()

    def live(self, parameter: nn.Parameter, fragment: Fragment) -> Tensor:
        return fragment.within(parameter.detach())

    def lay_out_target(self, targets: Targets, ema: Ema) -> None:
        for shard in ema:
            like = self.optimizer.bit16_groups_flat[shard]
            self._flat[shard] = flat = torch.zeros_like(like)
            for parameter, place in self._placed(shard):
                target = targets[self.names[parameter]]
                target.data = flat.narrow(0, place, target.numel()).view(target.shape)

    def publish(self, targets: Targets, ema: Ema) -> None:
        self.wait()
        for shard, flat in self._flat.items():
            own = flat.view(self.size, -1)[self.rank]
            own.copy_(ema[shard], non_blocking=True)
            self._travelling.append(dist.all_gather_into_tensor(flat, own, async_op=True))

    def wait(self) -> None:
        while self._travelling:
            self._travelling.pop().wait()

    def working(self, targets: Targets) -> dict[str, list[Tensor]]:
        optimizer = self.optimizer
        gradients = [p.grad for p in self.names if p.grad is not None]
        gradients += [g for parts in optimizer.averaged_gradients.values() for g in parts or ()]
        return {
            "weights": list(optimizer.bit16_groups_flat),
            "gradients": gradients,
            "target": list(self._flat.values()),
        }


class PartitionedLayout(Layout):
    """Stage 3: the target is partitioned like the networks, and gathered block by block."""

    def __init__(self, engine: Any, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__(engine, names)
        self.optimizer._overflow_check_and_loss_scale_update = self._discard_if_vetoed

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def fragments(self, rank: int) -> Sequence[Fragment]:
        found = []
        for shard, group in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                chunk = parameter.partition_numel()
                numel = min(chunk, parameter.ds_numel - rank * chunk)
                if numel > 0:
                    name = self.names[parameter]
                    found.append(Fragment(name, rank * chunk, numel, shard, offset))
                offset += chunk
        return found

    def gradients(self) -> Iterator[tuple[Fragment, Tensor]]:
        own = {fragment.name: fragment for fragment in self.own}
        masters = self.masters()
        for shard, group in enumerate(self.optimizer.fp16_groups):
            for place, parameter in enumerate(group):
                fragment = own.get(self.names[parameter])
                if fragment is None:
                    continue
                if self.optimizer.offload_optimizer:
                    grad = masters[shard].grad
                    assert grad is not None
                    yield fragment, fragment.of(grad)
                else:
                    grad = self.optimizer.averaged_gradients[shard][place]
                    yield fragment, grad[: fragment.numel]

    def refresh(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for shard in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(shard)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def live(self, parameter: nn.Parameter, fragment: Fragment) -> Tensor:
        return _piece(parameter).narrow(0, 0, fragment.numel)

    def lay_out_target(self, targets: Targets, ema: Ema) -> None:
        # Its pieces change behind DeepSpeed's back: none may stay gathered.
        frozen = set(targets.values())
        for target in frozen:
            target.ds_persist = False  # type: ignore[attr-defined]
        persistent = self.optimizer.persistent_parameters
        persistent[:] = [parameter for parameter in persistent if parameter not in frozen]

    def working(self, targets: Targets) -> dict[str, list[Tensor]]:
        optimizer = self.optimizer
        return {
            "weights": [*optimizer.fp16_partitioned_groups_flat, *self.names],
            "gradients": [optimizer.grad_partitions_flat_buffer],
            "target": [_piece(target) for target in targets.values()],
        }


def _piece(parameter: nn.Parameter) -> Tensor:
    """This rank's piece of a partitioned parameter."""
    piece: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return piece


def layout_of(engine: Any, stage: int, names: Mapping[nn.Parameter, str]) -> Layout:
    """The layout of an initialised engine at a ZeRO stage."""
    if stage == 0:
        return WholeLayout(engine, names)
    return PartitionedLayout(engine, names) if stage == 3 else FlatLayout(engine, names)


def check_version(found: str) -> None:
    """Raises ValueError unless DeepSpeed is the version whose layout this file knows."""
    if found != VERSION:
        raise ValueError(
            f"engine.kind: deepspeed needs DeepSpeed {VERSION}, the version whose shards fastjepa "
            f"knows, found {found}; pip install deepspeed=={VERSION}"
        )
