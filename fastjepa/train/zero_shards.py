"""A rank's share of the float32 state under DeepSpeed ZeRO: masters, moments, gradients, the EMA.

The EMA is the twin of the encoder's float32 masters: a tensor of the same shape on the same rank,
so it follows them without communication. Only the target's working weights, which its forward runs
with, travel. A shard is a flat tensor of this rank, one for each of the optimizer's groups (ZeRO
stages 1 and 2), their sub-groups (3) or parameters (0); a fragment is the stretch of a parameter
that a shard holds. `zero_layout.py` knows where DeepSpeed keeps them.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastjepa.checkpoint.pieces import Piece, host_copy, stretch
from fastjepa.checkpoint.strict import check_fit
from fastjepa.objective.health import part_of
from fastjepa.train.zero_layout import Layout
from fastjepa_kernels import ema_update

MOMENTS = ("exp_avg", "exp_avg_sq")
Tensors = Mapping[str, Tensor]


class ZeroShards:
    """The shards of one rank, by the names of the parameters.

    `shapes` names every trained parameter; `targets` is the target's parameter for each of the
    encoder's names.
    """

    def __init__(
        self,
        layout: Layout,
        shapes: Mapping[str, torch.Size],
        targets: Mapping[str, nn.Parameter],
    ) -> None:
        self._layout, self._shapes, self._targets = layout, shapes, targets
        self._parts = sorted({part_of(name) for name in shapes})
        every = (f for rank in range(layout.size) for f in layout.fragments(rank))
        followed = {fragment.shard for fragment in every if fragment.name in targets}
        masters = layout.masters()
        self.ema = {shard: masters[shard].detach().clone() for shard in sorted(followed)}
        layout.lay_out_target(targets, self.ema)

    def update_ema(self, momentum: float) -> None:
        """Move the EMA towards the masters; the target's working weights begin to travel."""
        masters = self._layout.masters()
        sources = [masters[shard].detach() for shard in self.ema]
        ema_update(list(self.ema.values()), sources, momentum)
        self._layout.publish(self._targets, self.ema)

    def norms(self) -> dict[str, Tensor]:
        """Norms of the step's gradients, all and by part, as `gradient_norms` names them."""
        squares = torch.zeros(len(self._parts), device=self._layout.device)
        for fragment, gradient in self._layout.gradients():
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            squares[self._parts.index(part_of(fragment.name))] += norm.square().to(squares.device)
        if self._layout.sharded:
            dist.all_reduce(squares)
        parts = dict(zip(self._parts, squares.sqrt().unbind(), strict=True))
        return {"grad_norm": squares.sum().sqrt()} | {f"grad_norm/{n}": x for n, x in parts.items()}

    def snapshot(self) -> dict[str, dict[str, Piece]]:
        """This rank's pieces of a checkpoint's parts, being copied to the host."""
        masters = dict(enumerate(self._layout.masters()))
        optimizer = self._layout.client.state
        moments = {
            key: {s: optimizer[master][key] for s, master in masters.items()}
            for key in (MOMENTS if all(master in optimizer for master in masters.values()) else ())
        }
        steps = torch.tensor(self._steps_counted() if moments else 0.0)
        weights = self._pieces(masters)
        packed = {
            f"{fragment.name}.step": Piece(steps.clone(), ())
            for fragment in self._layout.saved
            if fragment.start == 0
        }
        for key, shards in moments.items():
            packed |= {f"{name}.{key}": piece for name, piece in self._pieces(shards).items()}
        return {
            "encoder": _under("encoder.", weights),
            "predictor": _under("predictor.", weights),
            "target_encoder": _under("encoder.", self._pieces(self.ema)),
            "optimizer": packed,
        }

    def load(self, parts: Mapping[str, Tensors], what: str) -> None:
        """Take over those of a checkpoint's parts that are given; of stored ones only this rank's
        stretches are read.

        Raises CheckpointError naming each tensor that does not fit, before anything is changed.
        """
        for part in ("encoder", "predictor", "target_encoder"):
            if part in parts:
                own = "encoder." if part == "target_encoder" else f"{part}."
                check_fit(self._empty(own), parts[part], f"{what}: {part}")
        if "optimizer" in parts:
            self._check_moments(parts["optimizer"], f"{what}: optimizer")
            self._load_moments(parts["optimizer"])
        masters = dict(enumerate(self._layout.masters()))
        for part in ("encoder", "predictor"):
            self._fill(masters, parts.get(part, {}), f"{part}.")
        self._fill(self.ema, parts.get("target_encoder", {}), "encoder.")
        self._layout.refresh()
        self._layout.publish(self._targets, self.ema)

    def bytes(self) -> dict[str, int]:
        """Bytes of this rank by kind, communication buckets apart: `masters`, `moments`, `ema`,
        and the layout's `weights`, `gradients` and `target`."""
        masters = self._layout.masters()
        state = self._layout.client.state
        moments = [state[m][key] for m in masters if m in state for key in MOMENTS]
        kinds = {"masters": masters, "moments": moments, "ema": list(self.ema.values())}
        kinds |= self._layout.working(self._targets)
        return {kind: _storage_bytes(tensors) for kind, tensors in kinds.items()}

    def _pieces(self, shards: Mapping[int, Tensor]) -> dict[str, Piece]:
        """What this rank writes of shards of one kind, each copied once."""
        saved = [fragment for fragment in self._layout.saved if fragment.shard in shards]
        copies = {number: host_copy(shards[number]) for number in {f.shard for f in saved}}
        pieces: dict[str, Piece] = {}
        for fragment in saved:
            data, shape = fragment.of(copies[fragment.shard]), self._shapes[fragment.name]
            complete = fragment.numel == shape.numel()
            pieces[fragment.name] = Piece(
                data.view(shape) if complete else data, tuple(shape), fragment.start
            )
        return pieces

    @torch.no_grad()
    def _fill(
        self, shards: Mapping[int, Tensor], tensors: Tensors, prefix: str, suffix: str = ""
    ) -> None:
        """This rank's stretches of whole tensors into its shards of one kind.

        A parameter's tensor has its name without `prefix` and with `suffix`; those that are not
        there leave the shards as they are.
        """
        for fragment in self._layout.own:
            name = f"{fragment.name.removeprefix(prefix)}{suffix}"
            if fragment.shard in shards and fragment.name.startswith(prefix) and name in tensors:
                found = stretch(tensors, name, fragment.start, fragment.numel)
                fragment.of(shards[fragment.shard]).copy_(found)

    def _check_moments(self, found: Tensors, what: str) -> None:
        wanted: dict[str, Tensor] = {}
        for name, empty in self._empty("").items():
            wanted[f"{name}.step"] = torch.zeros((), dtype=torch.float64)
            if any(f"{name}.{key}" in found for key in MOMENTS):
                wanted |= {f"{name}.{key}": empty for key in MOMENTS}
        check_fit(wanted, found, what)

    def _steps_counted(self) -> float:
        """AdamW's own count: torch's keeps it in a tensor of each master, DeepSpeed's as a number
        of a group's last one, Apex's as a number of the group."""
        client = self._layout.client
        counts = [
            one["step"] for one in (*client.state.values(), *client.param_groups) if "step" in one
        ]
        return max(float(count) for count in counts)

    def _load_moments(self, found: Tensors) -> None:
        """A parameter that no gradient has reached has no moments in a file, and zeros here."""
        steps = max(float(found[f"{name}.step"]) for name in self._shapes)
        masters = dict(enumerate(self._layout.masters()))
        client = self._layout.client
        state, in_tensors = client.state, isinstance(client, torch.optim.AdamW)
        for master in masters.values():
            state.pop(master, None)
        for group in () if in_tensors else client.param_groups:
            group["step"] = int(steps)
        if not steps:
            return
        for master in masters.values():
            count = torch.tensor(steps, device=master.device) if in_tensors else int(steps)
            state[master] = {"step": count} | {
                key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS
            }
        for key in MOMENTS:
            moments = {shard: state[master][key] for shard, master in masters.items()}
            self._fill(moments, found, "", f".{key}")

    def _empty(self, part: str) -> dict[str, Tensor]:
        """The parameters of a part as tensors without memory."""
        return {
            name.removeprefix(part): torch.empty(shape, device="meta")
            for name, shape in self._shapes.items()
            if name.startswith(part)
        }


def _under(part: str, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    return {
        name.removeprefix(part): piece for name, piece in pieces.items() if name.startswith(part)
    }


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory behind the tensors, each piece once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
