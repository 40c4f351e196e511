"""The wiring diagram: a validated recipe to every object of a run, top to bottom. Only this file
reads it, with build_data.py.

    trainer = build(load_recipe("configs/demo.yaml"))
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch

import fastjepa
from fastjepa.build_data import Datasets, datasets_of, loaders_of, quarantine_of
from fastjepa.checkpoint import claim_run_folder
from fastjepa.config.key_ledger import flat_keys
from fastjepa.config.load import dump_recipe
from fastjepa.config.resolve import Resolved, resolve
from fastjepa.config.schema import Recipe
from fastjepa.config.streams import Stream
from fastjepa.data.loader import Loader
from fastjepa.data.mixture import Mixture
from fastjepa.distillation import check_teacher, load_teacher
from fastjepa.durable import write_text
from fastjepa.evaluation import MOST_FRAMES, ClassProbe, DigitProbe, OnlineEvaluation, Probe
from fastjepa.freed_memory import keep_freed_memory
from fastjepa.model import Encoder, Predictor
from fastjepa.model.block import compile_blocks
from fastjepa.model.float8 import target_linear
from fastjepa.objective.dense_loss import Objective
from fastjepa.observe.console import Console
from fastjepa.observe.product_rate import product_rate
from fastjepa.observe.profile import StepProfile
from fastjepa.planning.gpus import board_peak
from fastjepa.presets import EncoderSize
from fastjepa.probes.feature_store import weights_digest
from fastjepa.recipe_parts import encoder_sizes, network_numbers
from fastjepa.roles import RankShare, share_of
from fastjepa.train.engine import Engine, TorchEngine
from fastjepa.train.engine_deepspeed import DeepSpeedEngine
from fastjepa.train.guard import LossGuard
from fastjepa.train.loop import Trainer
from fastjepa.train.plan import StepPlan
from fastjepa.train.ranks import ALONE, Ranks, RanksError
from fastjepa.train.returns import Returns
from fastjepa.train.saver import Saver
from fastjepa.train.state import check_samples, load_initial, resume
from fastjepa.train.step import Jepa
from fastjepa.train.work import Work

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(recipe: Recipe, console: Console | None = None, ranks: Ranks = ALONE) -> Trainer:
    """A trainer ready to run, resumed from the run folder's newest checkpoint if it has one.

    On many ranks, joined, each builds its own. Raises RecipeError, ManifestError, CheckpointError,
    RanksError (all ValueErrors) before any work is lost.
    """
    console = console or Console()
    _check_ranks(recipe, ranks)
    resolved, device, share, datasets, loaders = ranks.together(
        lambda: _prepared(recipe, console, ranks)
    )
    # Clips of all lengths come from the same files; those of other ranks count, too.
    num_files = {share.streams[name].modality: one.num_files for name, one in loaders.items()}
    num_files |= {m: Mixture(d).num_files for m, d in datasets.items() if m not in num_files}
    manifests = [files for named in datasets.values() for files, _ in named]
    quarantine = quarantine_of(recipe, manifests, sum(num_files.values()), console, ranks)

    torch.manual_seed(recipe.run.seed)
    sharded = recipe.engine.kind == "deepspeed"
    # DeepSpeed moves the networks itself, once they are in the working precision.
    jepa = build_jepa(recipe, resolved, torch.device("cpu") if sharded else device)
    facts: dict[str, Any] = {
        "model": encoder_sizes(recipe, resolved),
        "predictor": asdict(resolved.predictor),
    }
    if recipe.distill is not None:
        jepa.source.to(device)
        facts["teacher"] = weights_digest(jepa.source)
        console.say(f"teacher from {recipe.distill.teacher}: {jepa.source.origin}")
    engine = build_engine(recipe, jepa, device, ranks)
    guard = LossGuard(
        sigma=recipe.guard.sigma, window=recipe.guard.window, start=resolved.guard_start,
        device=device,
    )  # fmt: skip
    folder = recipe.run.folder
    returns = Returns(recipe.guard.return_after, recipe.guard.max_returns)
    checkpoint = resume(folder, engine, guard)
    if checkpoint is not None:
        check_samples(checkpoint, share.samples_per_step)
        returns.load(checkpoint.state)
        if recipe.distill is not None:
            check_teacher(checkpoint, recipe.distill.teacher, facts["teacher"])
        console.say(f"resumed from {checkpoint.path}, step {checkpoint.step}")
    elif recipe.train.init_from is not None:
        parts = load_initial(recipe.train.init_from, engine, recipe.train.init_with)
        console.say(f"initial {', '.join(parts)} from {recipe.train.init_from}")
    return Trainer(
        jepa=jepa,
        engine=engine,
        guard=guard,
        plan=plan_of(recipe, resolved, share),
        loaders=loaders,
        quarantine=quarantine,
        tokens={name: stream.tokens for name, stream in resolved.streams.items()},
        work=Work(*network_numbers(recipe, resolved), _peak(device, DTYPES[recipe.engine.dtype])),
        folder=folder,
        facts=facts | {"samples_per_step": share.samples_per_step},
        console=console,
        log_every=recipe.train.log_every,
        checkpoint_every=recipe.train.checkpoint_every,
        saver=Saver(folder, ranks, keep=recipe.train.keep_checkpoints),
        max_skips=recipe.guard.max_skips,
        returns=returns,
        packed=recipe.engine.micro_batches == "packed",
        step=0 if checkpoint is None else checkpoint.step,
        wandb_project=recipe.observe.wandb_project if recipe.observe.wandb else None,
        evaluation=_evaluation(recipe, next(iter(resolved.streams.values()))),
        profile=_profile(recipe, device, ranks),
    )


def _prepared(
    recipe: Recipe, console: Console, ranks: Ranks
) -> tuple[Resolved, torch.device, RankShare, Datasets, dict[str, Loader]]:
    """Numbers, data and the run folder: where mistakes of recipe and data show."""
    resolved = resolve(recipe)
    for note in resolved.notes:
        console.say(f"note: {note}")
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    device = device_of(recipe.engine.device)
    if device.type == "cpu":
        keep_freed_memory()
    share = share_of(recipe, resolved, rank=ranks.rank, ranks=ranks.size)
    datasets = datasets_of(recipe, resolved)
    loaders = loaders_of(recipe, share, datasets, device)
    if ranks.first:
        _claim(recipe, resolved, console)
    return resolved, device, share, datasets, loaders


def _check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """All ranks must have the same recipe and the same versions, and an engine for many."""
    versions = {"fastjepa": fastjepa.__version__, "torch": torch.__version__}
    if recipe.engine.kind == "torch" and ranks.size > 1:
        raise RanksError(
            f"engine.kind: torch is one process, {ranks.size} ranks were started; "
            "engine.kind=deepspeed trains on them"
        )
    ranks.check_same(versions | dict(flat_keys(recipe.model_dump(mode="json"))))


def build_engine(recipe: Recipe, jepa: Jepa, device: torch.device, ranks: Ranks = ALONE) -> Engine:
    """The recipe's engine around the networks."""
    own = recipe.engine
    shared: dict[str, Any] = {
        "encoder": jepa.encoder,
        "predictor": jepa.predictor,
        "target": jepa.target,
        "dtype": DTYPES[own.dtype],
        "weight_decay": recipe.optim.weight_decay,
        "betas": recipe.optim.betas,
        "eps": recipe.optim.eps,
        "clip": recipe.optim.clip,
    }
    if own.kind == "torch":
        in_turn = {"auto": None, "packed": False, "in_turn": True}[own.mask_groups]
        if own.micro_batches == "packed":
            in_turn = False
        return TorchEngine(**shared, in_turn=in_turn)
    travels = own.communication_dtype
    return DeepSpeedEngine(
        **shared,
        ranks=ranks,
        device=device,
        stage=own.zero_stage,
        communication_dtype=None if travels is None else DTYPES[travels],
        offload=own.offload,
        adamw=own.adamw,
        roles=recipe.ranks.rank_ratio is not None,
    )


def _evaluation(recipe: Recipe, stream: Stream) -> OnlineEvaluation | None:
    """On clips as the first of the run's streams has them, but not long ones."""
    own = recipe.evaluate
    if own.every is None:
        return None
    patch, tubelet = recipe.model.patch, recipe.model.tubelet
    frames = min(stream.frames, max(tubelet, MOST_FRAMES // tubelet * tubelet))
    seen: dict[str, Any] = {"frames": frames, "fps": stream.fps, "size": stream.crop}
    if own.clips is None:
        probe: Probe = DigitProbe(own.count, **seen, patch=patch, tubelet=tubelet)
    else:
        probe = ClassProbe(own.clips, own.count, **seen, patch=patch)
    return OnlineEvaluation(own.every, probe)


def _profile(recipe: Recipe, device: torch.device, ranks: Ranks) -> StepProfile | None:
    if recipe.profile.steps is None:
        return None
    folder = recipe.run.folder / "profile"
    return StepProfile(recipe.profile.steps, folder, rank=ranks.rank, device=device)


def _peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the run's utilisation is a share of: a GPU's data sheet in bf16, a CPU's rate now."""
    if device.type == "cpu":
        return product_rate(dtype)
    return board_peak(torch.cuda.get_device_name(device)) if dtype == torch.bfloat16 else None


def device_of(name: str) -> torch.device:
    """`auto` is CUDA where there is a device; ValueError for `cuda` without one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "engine.device: cuda asked for, but PyTorch finds no CUDA device; auto fits"
        )
    return torch.device(name)


def build_jepa(recipe: Recipe, resolved: Resolved, device: torch.device) -> Jepa:
    """Context encoder, predictor, target encoder (a copy of the first) and the teacher, if there
    is one, with their objective."""
    shared: dict[str, Any] = {
        "keep_attention": recipe.model.keep_attention,
        "attention": recipe.model.attention,
    }
    sizes = encoder_sizes(recipe, resolved)
    levels = resolved.encoder.levels
    checkpointing = recipe.model.checkpointing
    encoder = Encoder(**sizes, **shared, checkpointing=bool(checkpointing)).to(device)
    predictor = Predictor(
        encoder_width=encoder.width,
        num_levels=len(levels),
        width=resolved.predictor.width,
        depth=resolved.predictor.depth,
        heads=resolved.predictor.heads,
        mlp_width=resolved.predictor.mlp_width,
        out_width=None if resolved.teacher is None else resolved.teacher.width,
        num_mask_tokens=recipe.model.predictor.mask_tokens,
        patch=recipe.model.patch,
        interpolate_rope=recipe.model.interpolate_rope,
        rope=recipe.model.rope,
        residual=torch.bfloat16 if recipe.engine.residual == "bfloat16" else None,
        checkpointing=checkpointing is True,
        **shared,
    ).to(device)
    linear = target_linear(recipe.engine.target_dtype, device, sizes["width"], sizes["mlp_width"])
    target = Encoder(**sizes, **shared, linear=linear).to(device)
    target.load_state_dict(encoder.state_dict())
    objective = Objective(
        level_weights=resolved.level_weights,
        exponent=recipe.objective.loss_exp,
        normalize_prediction=recipe.objective.normalize_predictor,
    )
    teacher, target_levels = None, levels
    if resolved.teacher is not None:
        teacher, target_levels = _teacher(recipe, resolved.teacher, device), resolved.teacher.levels
    if recipe.engine.compile == "blocks":
        compile_blocks(encoder, predictor, target if teacher is None else teacher)
    return Jepa(encoder, predictor, target, objective, levels, target_levels, teacher)


def _teacher(recipe: Recipe, size: EncoderSize, device: torch.device) -> Encoder:
    """Whole on every rank; in float32 where the target is, else in the working dtype."""
    assert recipe.distill is not None
    sharded = recipe.engine.kind == "deepspeed"
    return load_teacher(
        recipe.distill.teacher, size, patch=recipe.model.patch, tubelet=recipe.model.tubelet,
        device=device, dtype=DTYPES[recipe.engine.dtype] if sharded else torch.float32,
    )  # fmt: skip


def _claim(recipe: Recipe, resolved: Resolved, console: Console) -> None:
    """Take the run folder for this recipe and record what it comes to."""
    text = dump_recipe(recipe)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    changed = claim_run_folder(recipe.run.folder, fingerprint, text)
    if changed:
        console.say(f"note: other than in the folder's recipe: {', '.join(changed)}")
    text = json.dumps(asdict(resolved), indent=1) + "\n"
    write_text(recipe.run.folder / "resolved.json", text)


def plan_of(recipe: Recipe, resolved: Resolved, share: RankShare) -> StepPlan:
    """A rank's steps as functions of their number."""
    optim = recipe.optim
    return StepPlan(
        steps=resolved.steps,
        accumulate=optim.accumulate,
        mix=share.mix,
        shares={name: stream.share for name, stream in share.streams.items()},
        weight=share.weight,
        context_weights={name: one.context_weight for name, one in share.streams.items()},
        ramp=resolved.ramp,
        shape=optim.schedule,
        start_lr=optim.start_lr,
        peak_lr=optim.lr,
        final_lr=optim.final_lr,
        warmup=resolved.warmup,
        horizon=resolved.horizon,
        start_decay=optim.weight_decay,
        final_decay=optim.final_weight_decay,
        start_momentum=resolved.momentum,
        final_momentum=resolved.final_momentum,
    )
