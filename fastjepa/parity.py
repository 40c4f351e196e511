"""One recorded training step of the official code, run again by ours and compared tensor by tensor.

A golden file (safetensors; tests/golden/README.md lists its tensors) holds the weights, the clip
and the masks of a step, and everything that comes out of it. `check` builds the networks from the
file, runs `train.step.forward` and the engine on them, and compares every tensor of the file:

    report = check("tests/golden/video.safetensors")
    print("\\n".join(report.lines()), report.passed)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from fastjepa.golden import GoldenStep, micro_batch, networks, read_golden
from fastjepa.train.engine import TorchEngine
from fastjepa.train.step import Jepa, MicroBatch, forward
from fastjepa_kernels import dense_l1

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

# The update that golden files record.
LR, WEIGHT_DECAY, MOMENTUM = 1e-3, 0.04, 0.99925

FAMILIES = (
    "inputs", "targets", "context features", "predictions", "distance weights", "loss_pred",
    "loss_context", "loss_context_unweighted", "loss", "gradients", "AdamW", "EMA",
    "inference features",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The `count` tensors of one kind: the largest relative error among them, and whose it is."""

    name: str
    count: int
    error: float
    tensor: str


@dataclass(frozen=True)
class Report:
    """Outcome of a comparison.

    `uncompared`: tensors of the file that nothing was compared with, which fail it. `unused`:
    weights no result of this step depends on (the image tokenizer of a video step), of which only
    names, shapes and finiteness can be checked.
    """

    path: Path
    tolerance: float
    families: tuple[Family, ...]
    uncompared: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.uncompared and all(f.error <= self.tolerance for f in self.families)

    def lines(self) -> list[str]:
        """The report as plain lines: families, what was left out, the verdict."""
        table = [
            f"{f.name:<24} {f.error:8.1e}  {f.count:4d} tensors, worst {f.tensor}"
            + ("" if f.error <= self.tolerance else f"  ABOVE {self.tolerance:g}")
            for f in self.families
        ]
        if self.uncompared:
            table.append(f"not compared: {', '.join(self.uncompared)}")
        if self.unused:
            table.append(f"no result depends on {len(self.unused)}: {', '.join(self.unused)}")
        return [*table, f"{self.path}: {'passed' if self.passed else 'FAILED'}"]


def check(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "auto",
    tolerance: float = 1e-5,
) -> Report:
    """Run the step recorded in `path` with our code and compare every tensor of the file.

    dtype: float32, float64, or bfloat16 (autocast; needs a tolerance of its own). attention: a
    backend of model/attention.py. An error is max|ours - recorded| / max|recorded| over a tensor,
    infinite where either is not finite; max|ours| where all of the recorded tensor is 0. Raises
    ValueError, in one line, for a file that is not such a step, and for options that do not exist.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 0.0 < tolerance < inf:
        raise ValueError(f"tolerance: expected a positive number, got {tolerance}")
    golden = read_golden(Path(path), _device(device), DTYPES[dtype])
    jepa = networks(golden, attention)
    batch = micro_batch(golden, jepa.encoder)
    engine = TorchEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target,
        follows=not golden.distilled, dtype=DTYPES[dtype], weight_decay=WEIGHT_DECAY,
    )  # fmt: skip
    ledger = _Ledger(golden)
    _inputs(jepa, batch, ledger)
    _forward_and_backward(jepa, batch, engine, ledger)
    _gradients(jepa, ledger)
    _update(jepa, engine, ledger)
    return ledger.report(tolerance, _unused(jepa, batch))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here: {reason}") from error
    return device


class _Ledger:
    """Compares results with the file's tensors and remembers which of them had their turn."""

    def __init__(self, golden: GoldenStep) -> None:
        self.golden = golden
        self.errors: dict[str, dict[str, float]] = {name: {} for name in FAMILIES}

    def compare(self, family: str, name: str, ours: Tensor) -> None:
        """Compare with the file's tensor `name`; sides of 1 may be missing in either."""
        recorded = self.golden[name]
        if _sides(ours) != _sides(recorded):
            raise ValueError(
                f"{self.golden.path}: {name}: expected shape {list(ours.shape)}, "
                f"found {list(recorded.shape)}"
            )
        self.errors[family][name] = _relative_error(ours.detach().flatten(), recorded.flatten())

    def note(self, family: str, name: str, *, fits: bool) -> None:
        """A comparison without degrees: no error, or an infinite one."""
        self.errors[family][name] = 0.0 if fits else inf

    def report(self, tolerance: float, unused: tuple[str, ...]) -> Report:
        families = []
        for name, errors in self.errors.items():
            if errors:
                worst = max(errors, key=lambda tensor: errors[tensor])
                families.append(Family(name, len(errors), errors[worst], worst))
        compared = {tensor for errors in self.errors.values() for tensor in errors}
        uncompared = tuple(name for name in self.golden.tensors if name not in compared)
        return Report(self.golden.path, tolerance, tuple(families), uncompared, unused)


def _sides(tensor: Tensor) -> list[int]:
    return [side for side in tensor.shape if side != 1]


def _relative_error(ours: Tensor, recorded: Tensor) -> float:
    if not (ours.isfinite().all() and recorded.isfinite().all()):
        return inf
    scale = float(recorded.abs().max())
    error = float((ours.to(recorded.dtype) - recorded).abs().max())
    return error / scale if scale else error


def _parts(jepa: Jepa) -> dict[str, nn.Module]:
    return {"encoder": jepa.encoder, "target": jepa.target, "predictor": jepa.predictor}


def _inputs(jepa: Jepa, batch: MicroBatch, ledger: _Ledger) -> None:
    """Inputs are compared through all that comes out of them; here only that they are finite."""
    names = ["clip"]
    for group in range(len(batch.masks.context)):
        names += [f"context_index.{group}", f"predict_index.{group}"]
    for part, network in _parts(jepa).items():
        names += [f"{part}.{name}" for name, _ in network.named_parameters()]
    for name in names:
        ledger.note("inputs", name, fits=bool(ledger.golden[name].isfinite().all()))


@contextmanager
def _outputs(jepa: Jepa) -> Iterator[dict[str, list[Tensor]]]:
    """What each network returns while a step runs, by the network's name."""
    seen: dict[str, list[Tensor]] = {}

    def keep(part: str, outputs: Sequence[Tensor]) -> None:
        seen[part] = [output.detach() for output in outputs]

    handles = [
        network.register_forward_hook(
            lambda _module, _inputs, outputs, part=part: keep(part, outputs)
        )
        for part, network in _parts(jepa).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _forward_and_backward(
    jepa: Jepa, batch: MicroBatch, engine: TorchEngine, ledger: _Ledger
) -> None:
    masks = batch.masks

    def context_loss(weights: tuple[Tensor, ...] | None) -> Tensor | None:
        whole = replace(batch, masks=replace(masks, weights=weights), context_weight=1.0)
        return forward(jepa, whole, engine.dtype).context

    with engine.autocast():
        with _outputs(jepa) as seen:
            terms = forward(jepa, batch, engine.dtype)
        with torch.no_grad():
            losses = {"loss_context": context_loss(masks.weights)}
            losses["loss_context_unweighted"] = context_loss(None)
            predicted, context = (rows.to(engine.dtype) for rows in seen["predictor"])
            z_predict = jepa.predictor.predictor_proj(predicted)
            z_context = jepa.predictor.predictor_proj_context(context)
            inference = jepa.encoder.features(batch.clip)[0].flatten(1, 3)
    engine.backward(terms.total)

    whole = (len(batch.clip), -1)
    target = torch.cat(seen["target"], -1).unflatten(0, whole)
    ledger.compare("targets", "target_features", target)
    normalised = _normalised(seen["target"]).unflatten(0, whole)
    ledger.compare("targets", "targets_normalised", normalised)
    for family, key, rows, groups in (
        ("context features", "context_features", torch.cat(seen["encoder"], -1), masks.context),
        ("predictions", "z_pred", z_predict, masks.predict),
        ("predictions", "z_context", z_context, masks.context),
    ):
        parts = rows.split([index.numel() for index in groups])
        for group, (index, part) in enumerate(zip(groups, parts, strict=True)):
            ledger.compare(family, f"{key}.{group}", part.unflatten(0, index.shape))
    for group, weight in enumerate(masks.weights or ()):
        ledger.compare("distance weights", f"distance_sqrt.{group}", weight.reciprocal())
    for name, loss in {"loss_pred": terms.predict, **losses, "loss": terms.total}.items():
        assert loss is not None, "a context weight of 1 keeps the context term"
        ledger.compare(name, name, loss)
    ledger.compare("inference features", "inference_features", inference)


def _normalised(targets_MD: Sequence[Tensor]) -> Tensor:
    """The targets as the loss normalises them, [M, L*D].

    It never shows them: they are the gradient of its squared form at a prediction of 0.
    """
    rows = len(targets_MD[0])
    zero = torch.zeros_like(torch.cat(tuple(targets_MD), -1)).requires_grad_()
    row_R = torch.arange(rows, device=zero.device)
    loss, _ = dense_l1(zero, targets_MD, row_R, [rows], exponent=2.0)
    (gradient,) = torch.autograd.grad(loss, zero)
    return -gradient * zero.numel()


def _trained(jepa: Jepa) -> Iterator[tuple[str, nn.Parameter]]:
    for part, network in (("encoder", jepa.encoder), ("predictor", jepa.predictor)):
        for name, parameter in network.named_parameters():
            yield f"{part}.{name}", parameter


def _gradients(jepa: Jepa, ledger: _Ledger) -> None:
    """A gradient may be missing on one side only where the other one is all 0."""
    for name, parameter in _trained(jepa):
        key, ours = f"grad.{name}", parameter.grad
        recorded = ledger.golden.tensors.get(key)
        if ours is not None and recorded is not None:
            ledger.compare("gradients", key, ours)
            continue
        for alone in (ours, recorded):
            if alone is not None:
                ledger.note("gradients", key, fits=not alone.any())


def _update(jepa: Jepa, engine: TorchEngine, ledger: _Ledger) -> None:
    """AdamW and the EMA, from the recorded gradients.

    The first step of AdamW divides a gradient by its own size: from our gradients, the rounding of
    a sum that should be 0 could become a whole step.
    """
    golden = ledger.golden
    for name, parameter in _trained(jepa):
        parameter.grad = golden.tensors.get(f"grad.{name}")
    engine.step(
        lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM,
        veto=torch.zeros((), device=engine.device),
    )  # fmt: skip
    results = {f"after_adamw.{name}": ("AdamW", parameter) for name, parameter in _trained(jepa)}
    if not golden.distilled:
        for name, parameter in jepa.target.named_parameters():
            results[f"after_ema.target.{name}"] = ("EMA", parameter)
    recorded = [name for name in results if name in golden.tensors]
    for kind in ("after_adamw.", "after_ema.")[: 1 if golden.distilled else 2]:
        if not any(name.startswith(kind) for name in recorded):
            raise ValueError(f"{golden.path}: no tensor {kind}*; expected some in a golden step")
    for name in recorded:
        ledger.compare(results[name][0], name, results[name][1])


def _unused(jepa: Jepa, batch: MicroBatch) -> tuple[str, ...]:
    """Weights without influence on any result: the other modality's, levels that are not
    supervised, mask tokens but the first."""
    image = batch.clip.shape[2] == 1
    idle = {
        "predictor": ["video_mod_embed" if image else "img_mod_embed"]
        + [f"mask_tokens.{i}" for i in range(1, len(jepa.predictor.mask_tokens))]
    }
    for part, network, levels in (
        ("encoder", jepa.encoder, jepa.levels),
        ("target", jepa.target, jepa.target_levels),
    ):
        other = (
            ("video_mod_embed", "patch_embed") if image else ("img_mod_embed", "patch_embed_img")
        )
        norms = [f"norms_block.{i}" for i, n in enumerate(network.levels) if n not in levels]
        idle[part] = [*other, *norms]
    return tuple(
        f"{part}.{name}"
        for part, network in _parts(jepa).items()
        for name, _ in network.named_parameters()
        if any(name == start or name.startswith(f"{start}.") for start in idle[part])
    )
