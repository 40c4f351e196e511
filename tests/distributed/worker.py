"""What each rank runs, under torchrun: the cases of test_zero.py one after another in one process
group. The first rank writes their findings: worker.py OUT.json, or worker.py OUT.json STEPS for
longer loss curves alone."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import other_adamw
import torch
from problem import CPU, alone, guard, networks, state, train
from sent import Sent
from torch import Tensor

from fastjepa.train.engine_deepspeed import DeepSpeedEngine
from fastjepa.train.ranks import Ranks, join, leave
from fastjepa.train.step import Jepa
from fastjepa_kernels import ema_update

Findings = dict[str, Any]
STEPS, SPOILT = 4, 2
MOMENTUM = 0.9
FULL = {"dtype": torch.float32, "communication_dtype": torch.float32}
HALF = {"dtype": torch.bfloat16, "communication_dtype": torch.float32}


def engine(jepa: Jepa, ranks: Ranks, stage: int, **options: Any) -> DeepSpeedEngine:
    return DeepSpeedEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target, ranks=ranks,
        device=CPU, stage=stage, weight_decay=0.1, **options,
    )  # fmt: skip


def error(found: list[float], wanted: list[float]) -> float:
    """The largest relative error over the steps that count."""
    pairs = [(f, w) for i, (f, w) in enumerate(zip(found, wanted, strict=True)) if i != SPOILT]
    return max(abs(f - w) / abs(w) for f, w in pairs)


def task(size: int) -> dict[str, Any]:
    """The clips of so many ranks, and the step that is spoilt."""
    return {"ranks": size, "num": 2, "momentum": MOMENTUM, "spoilt": (SPOILT,)}


@functools.cache
def one_process(size: int, dtype: torch.dtype, steps: int) -> tuple[list[float], list[float], Any]:
    """Losses, norms and state of one process that takes all ranks' clips."""
    single = networks()
    one = alone(single, dtype=dtype, clip=0.5)
    losses, norms, _ = train(single, one, steps=range(steps), **task(size))
    return losses, norms, state(one)


def against_one_process(
    ranks: Ranks, stage: int, *, steps: int = STEPS, checkpointing: bool = False,
    packed: bool = False, by_hand: str = "auto", **options: Any,
) -> Findings:  # fmt: skip
    """Steps of videos and images, clipped, one of them spoilt on the last rank alone; `packed`
    into one sequence on the ranks, one after the other in the one process."""
    seed = ranks.rank if stage else 0
    jepa = networks(seed=seed, checkpointing=checkpointing, by_hand=by_hand)
    made = engine(jepa, ranks, stage, clip=0.5, **options)
    losses, norms, vetoes = train(jepa, made, steps=range(steps), packed=packed, **task(ranks.size))
    found, everyone = state(made), ranks.gather(vetoes)
    if not ranks.first:
        return {}
    wanted_losses, wanted_norms, wanted = one_process(ranks.size, options["dtype"], steps)
    return {
        "losses": losses,
        "losses_of_one_process": wanted_losses,
        "loss_error": error(losses, wanted_losses),
        "norm_error": error(norms, wanted_norms),
        "weight_error": max(
            float((found[part][name] - tensor).abs().max())
            for part in ("encoder", "predictor", "target_encoder")
            for name, tensor in wanted[part].items()
        ),
        "vetoes": everyone,
        "steps_counted": counted(found) == [steps - 1],
    }


def counted(found: dict[str, dict[str, Tensor]]) -> list[float]:
    """The numbers of steps in a state."""
    return sorted({float(t) for n, t in found["optimizer"].items() if n.endswith(".step")})


def whole_target(jepa: Jepa, stage: int) -> dict[str, Tensor]:
    """The target's working weights as its forward sees them."""
    import deepspeed

    parameters = list(jepa.target.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        return {n: p.detach().clone().float() for n, p in jepa.target.named_parameters()}


def against_a_full_ema(ranks: Ranks, stage: int, **options: Any) -> Findings:
    """The shards put together beside an average of all weights in one piece, step by step."""
    jepa = networks()
    made = engine(jepa, ranks, stage, **options)
    full = state(made)["target_encoder"]
    equal = published = True
    for step in range(STEPS):
        spoilt = (step,) if step == SPOILT else ()
        _, _, (veto,) = train(
            jepa, made, ranks=ranks.size, steps=range(step, step + 1), momentum=MOMENTUM,
            spoilt=spoilt,
        )  # fmt: skip
        found = state(made)
        if not veto:
            sources = [found["encoder"][name] for name in full]
            ema_update(list(full.values()), sources, MOMENTUM)
        whole = {n: t.to(options["dtype"]).float() for n, t in full.items()}
        if stage < 3:
            made._layout.wait()
        seen = whole_target(jepa, stage)
        published &= all(torch.equal(seen[name], whole[name]) for name in seen)
        ema = found["target_encoder"]
        equal &= all(torch.equal(ema[name], tensor) for name, tensor in full.items())
    return {"equal": equal, "published": ranks.gather(published)}


def resumed_elsewhere(ranks: Ranks, stage: int, other: int) -> Findings:
    """Half of the steps at one stage, the other half at another, from the first one's state."""
    jepa = networks()
    made = engine(jepa, ranks, stage, **FULL)
    watch = guard()
    first = train(jepa, made, ranks=ranks.size, steps=range(2), watch=watch)
    saved = state(made)
    straight = train(jepa, made, ranks=ranks.size, steps=range(2, 4), watch=watch)
    again = networks(seed=1)
    second = engine(again, ranks, other, **FULL)
    second.load(saved, "the other stage")
    cut = train(again, second, ranks=ranks.size, steps=range(2, 4))
    return {"first": first[0], "straight": straight[0], "cut": cut[0]}


def another_adamw(ranks: Ranks, stage: int, kind: str) -> Findings:
    """Steps by another AdamW, and its state into an engine of the same kind and of torch's."""
    other_adamw.install()
    jepa, watched = networks(), networks()
    made = engine(jepa, ranks, stage, adamw=kind, **FULL)
    train(jepa, made, ranks=ranks.size, steps=range(2))
    saved = state(made)
    straight = train(jepa, made, ranks=ranks.size, steps=range(2, 4))
    found = {"straight": straight[0]}
    for name in (kind, "torch"):
        again = networks(seed=1)
        second = engine(again, ranks, stage, adamw=name, **FULL)
        second.load(saved, "the other AdamW")
        found[f"then {name}"] = train(again, second, ranks=ranks.size, steps=range(2, 4))[0]
        found[f"steps {name}"] = counted(state(second))
    one = alone(watched)
    train(watched, one, ranks=ranks.size, steps=range(2))
    found["torch"] = train(watched, one, ranks=ranks.size, steps=range(2, 4))[0]
    return found


def jumps(ranks: Ranks) -> Findings:
    """A loss that is large on one rank only jumps on all or on none."""
    jepa = networks()
    made = engine(jepa, ranks, 2, **FULL)
    watch = guard(sigma=4.0)
    train(jepa, made, ranks=ranks.size, steps=range(4), watch=watch)
    before = state(made)
    if ranks.rank == ranks.size - 1:
        with torch.no_grad():
            jepa.predictor.predictor_proj.bias += 100.0
    _, _, vetoes = train(jepa, made, ranks=ranks.size, steps=range(4, 5), watch=watch)
    after = state(made)
    same = all(
        torch.equal(before[part][name], tensor)
        for part in after
        for name, tensor in after[part].items()
    )
    return {"vetoes": ranks.gather(vetoes), "unchanged": same}


def sent_in_a_step(ranks: Ranks, stage: int) -> Findings:
    """Bytes that a rank sends in a step of one and of two micro-batches, in bfloat16."""
    found: Findings = {}
    for num in (1, 2):
        jepa = networks(checkpointing=True)
        sizes = [sum(p.numel() for p in net.parameters()) for net in (jepa.encoder, jepa.predictor)]
        made = engine(jepa, ranks, stage, dtype=torch.bfloat16)
        train(jepa, made, ranks=ranks.size, steps=range(2), num=num)
        with Sent(ranks.size) as sent:
            train(jepa, made, ranks=ranks.size, steps=range(2, 3), num=num)
        found |= {"parameters": sizes, f"gradients/{num}": sent.gradients}
        found[f"weights/{num}"] = sent.weights
    return found


def cases(size: int) -> dict[str, Callable[[Ranks], Findings]]:
    """By name; more of them where a step is cheap."""
    made: dict[str, Callable[[Ranks], Findings]] = {}
    for stage in range(4):
        if size == 4 and stage == 0:
            continue
        made[f"full/{stage}"] = lambda r, s=stage: against_one_process(r, s, **FULL)  # type: ignore[misc]
        if size == 2:
            made[f"half/{stage}"] = lambda r, s=stage: against_one_process(r, s, **HALF)  # type: ignore[misc]
        made[f"ema/{stage}"] = lambda r, s=stage: against_a_full_ema(r, s, **HALF)  # type: ignore[misc]
    if size == 1:
        for stage in (0, 2, 3):
            for kind in ("deepspeed", "apex"):
                made[f"adamw/{kind}/{stage}"] = lambda r, s=stage, k=kind: another_adamw(r, s, k)  # type: ignore[misc]
    if size == 2:
        for stage in (1, 2, 3):
            made[f"offload/{stage}"] = lambda r, s=stage: against_one_process(  # type: ignore[misc]
                r, s, offload=True, **FULL
            )
        for stage in range(4):
            made[f"sent/{stage}"] = lambda r, s=stage: sent_in_a_step(r, s)  # type: ignore[misc]
            made[f"packed/{stage}"] = lambda r, s=stage: against_one_process(  # type: ignore[misc]
                r, s, packed=True, **FULL
            )
        for stage in (2, 3):
            made[f"gpu/{stage}"] = lambda r, s=stage: against_one_process(  # type: ignore[misc]
                r, s, by_hand="gpu", **FULL
            )
        made["checkpointing/3"] = lambda r: against_one_process(r, 3, checkpointing=True, **FULL)
        made["resumed/1"] = lambda r: resumed_elsewhere(r, 1, 3)
        made["resumed/3"] = lambda r: resumed_elsewhere(r, 3, 0)
        made["jumps"] = jumps
    return made


def long_curves(steps: int) -> dict[str, Callable[[Ranks], Findings]]:
    """Every stage over many steps."""
    made: dict[str, Callable[[Ranks], Findings]] = {}
    for stage in range(4):
        for name, options in (("full", FULL), ("half", HALF)):
            made[f"{name}/{stage}"] = lambda r, s=stage, o=options: against_one_process(  # type: ignore[misc]
                r, s, steps=steps, **o
            )
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join(CPU, timeout=300, alone=True) as ranks:
        chosen = long_curves(int(sys.argv[2])) if sys.argv[2:] else cases(ranks.size)
        findings = {name: case(ranks) for name, case in chosen.items()}
        if ranks.first:
            Path(sys.argv[1]).write_text(json.dumps(findings, indent=1))
    leave(0)
