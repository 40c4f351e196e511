"""An official V-JEPA 2 or 2.1 training YAML to a recipe, with a report on each of its keys.

    recipe, reports = import_official("configs/train_2_1/vitl16/pretrain-256px-16f.yaml")

A missing key gets the official script's default where that differs from ours.
"""

from pathlib import Path
from typing import Any

from fastjepa.config.key_ledger import MISSING, KeyLedger, KeyReport
from fastjepa.config.schema import Recipe
from fastjepa.config.vjepa2_keys import (
    BUILT_IN,
    ENCODERS,
    IGNORED,
    MASK_KEYS,
    SAME_VALUE,
    SAME_VALUE_21,
)

__all__ = ["KeyReport", "import_official"]

RAMP = {"start": 15_000, "end": 30_000}  # fixed in the official script
GUARD_EPOCH = 50  # the official default of loss_reg_min_epoch


def import_official(path: str | Path) -> tuple[Recipe, list[KeyReport]]:
    """Recipe of the official YAML `path`, and a report on each of its keys in the file's order.

    V-JEPA 2 files give a recipe with `objective.dense` and `objective.deep` off. Raises RecipeError
    (file, key, value, what fits) for the YAML of another script and for what no recipe expresses,
    such as clips of several lengths.
    """
    official = KeyLedger(path)
    is_21 = _is_21(official)
    for key, (ours, default) in (SAME_VALUE | (SAME_VALUE_21 if is_21 else {})).items():
        official.move(key, ours, official.values.get(key, default))
    _model(official)
    _masks(official, "mask", "video")
    _videos(official)
    if is_21:
        _images(official)
        _ramp(official)
    _optimization(official)
    for key, value in BUILT_IN.items():
        official.built_in(key, value)
    for key, reason in IGNORED.items():
        official.ignore(key, reason)
    return official.recipe(), official.reports()


def _is_21(official: KeyLedger) -> bool:
    """Whether the file is for V-JEPA 2.1, which added the dense and deep objective."""
    app = official.values.get("app")
    if app == "vjepa_2_1":
        official.move("app", "objective.deep", True, "all levels are supervised")
    elif app == "vjepa":
        official.set("objective.dense", False)
        official.set("objective.ramp", None)
        official.move(
            "app",
            "objective.deep",
            False,
            "V-JEPA 2 predicts the last level of hidden tokens: objective.dense is false too; "
            "its rotary channels were laid out differently from those of 2.1",
        )
    else:
        raise official.error("app", "expected vjepa_2_1 or vjepa")
    return bool(app == "vjepa_2_1")


def _model(official: KeyLedger) -> None:
    key = "model.model_name"
    name = str(official.values.get(key)).removesuffix("_rope")
    if name not in ENCODERS:
        raise official.error(key, f"expected one of {', '.join(ENCODERS)}")
    ours, heads = ENCODERS[name]
    official.move(key, "model.name", ours, f"model.heads is {heads}" if heads else "")
    if heads:
        official.set("model.heads", heads)
    key = "model.pred_num_heads"
    heads_of_predictor = official.values.get(key, MISSING)
    if heads_of_predictor is None:
        raise official.error(key, "expected the predictor's number of heads")
    official.move(key, "model.predictor.heads", heads_of_predictor)
    attention = "auto" if official.flag("meta.use_sdpa", False) else "math"
    official.move("meta.use_sdpa", "model.attention", attention)
    dtype = str(official.values.get("meta.dtype", "float32")).lower()
    offered = "bfloat16" if dtype == "float16" else dtype
    remark = "float16 is not offered" if dtype == "float16" else ""
    official.move(
        "meta.dtype", "engine.dtype", "bfloat16" if offered == "bfloat16" else "float32", remark
    )


def _masks(official: KeyLedger, key: str, ours: str) -> None:
    prefix = f"{key}."
    indices = {k.split(".")[1] for k in official.values if k.startswith(prefix)}
    if not indices:
        raise official.error(key, "expected a list of mask groups")
    groups: list[dict[str, Any]] = [{} for _ in indices]
    for index, group in enumerate(groups):
        for name in MASK_KEYS:
            official_key = f"{prefix}{index}.{name}"
            if official_key in official.values:
                group[name] = official.values[official_key]
                official.moved(official_key, f"masks.{ours}.{index}.{name}", group[name])
    official.set(f"masks.{ours}", groups)
    if key == "mask":
        official.set("masks.image", groups)  # for images too, unless they have their own
        tokens = len(groups) * len(official.many("data.dataset_fpcs"))
        if official.flag("model.use_mask_tokens", True):
            official.move("model.use_mask_tokens", "model.predictor.mask_tokens", tokens)
        else:
            official.built_in("model.use_mask_tokens", True)


def _videos(official: KeyLedger) -> None:
    _sources(official, "data", "data.video")
    lengths = official.many("data.dataset_fpcs")
    if len(set(map(str, lengths))) > 1:
        raise official.error("data.dataset_fpcs", "expected one clip length for all data sets")
    official.move("data.dataset_fpcs", "data.frames", lengths[0])
    official.move("data.batch_size", "data.batch", official.whole("data.batch_size"))


def _images(official: KeyLedger) -> None:
    """Images have a share of the ranks; the video ranks share out the whole video batch."""
    if not any(key.startswith("img_data.") for key in official.values):
        return
    _sources(official, "img_data", "data.image")
    batch = official.whole("img_data.batch_size")
    official.move("img_data.batch_size", "data.image_batch", batch)
    crop = official.values.get("img_data.crop_size", 512)
    official.move("img_data.crop_size", "data.image_crop", crop)
    if any(key.startswith("img_mask.") for key in official.values):
        _masks(official, "img_mask", "image")

    key = "img_data.rank_ratio"
    ratio = share = official.number(key, 0.25)
    remark = "without nodes and tasks_per_node, the exact ratio"
    if "nodes" in official.values and "tasks_per_node" in official.values:
        ranks = official.whole("nodes") * official.whole("tasks_per_node")
        share = int(ranks * ratio) / ranks
        remark = f"of {ranks} ranks"
    if not 0.0 < share < 1.0:
        raise official.error(
            key, f"expected a ratio that leaves images and videos a rank, {remark}"
        )
    official.move(key, "ranks.rank_ratio", ratio, remark)
    official.set("data.image_share", ratio)  # the same on one rank
    video_batch = round(official.whole("data.batch_size") / (1.0 - share))
    official.move(
        "data.batch_size", "data.batch", video_batch, "the video ranks share the whole batch"
    )


def _sources(official: KeyLedger, section: str, ours: str) -> None:
    key, weights_key = f"{section}.datasets", f"{section}.datasets_weights"
    paths = official.many(key)
    weights = official.values.get(weights_key) or [1.0] * len(paths)
    if not isinstance(weights, list) or len(weights) != len(paths):
        raise official.error(weights_key, f"expected {len(paths)} weights, one for each data set")
    pairs = [(p, w) for p, w in zip(paths, weights, strict=True) if w != 0]
    official.set(ours, [{"path": path, "weight": weight} for path, weight in pairs])
    remark = ""
    if not official.values.get(weights_key) and len(paths) > 1:
        remark = "no weights: data sets are drawn equally often, not by their sizes"
    official.moved(key, ours, [path for path, _ in pairs], remark)
    official.moved(weights_key, f"{ours}.*.weight", [weight for _, weight in pairs])


def _ramp(official: KeyLedger) -> None:
    progressive = official.flag("model.lambda_progressive", True)
    official.move("model.lambda_progressive", "objective.ramp", RAMP if progressive else None)


def _optimization(official: KeyLedger) -> None:
    section = "optimization"
    epochs, ipe = official.whole(f"{section}.epochs"), official.whole(f"{section}.ipe")
    official.move(f"{section}.epochs", "train.steps", epochs * ipe, "epochs x ipe")
    official.moved(f"{section}.ipe", "train.steps", epochs * ipe, "epochs x ipe")
    horizon = f"{100.0 * official.number(f'{section}.ipe_scale', 1.0):g}%"
    official.move(f"{section}.ipe_scale", "optim.horizon", horizon)
    _momentum(official, f"{section}.ema")
    if official.values.get(f"{section}.loss_reg_std_mult") is not None:
        epoch = official.number(f"{section}.loss_reg_min_epoch", GUARD_EPOCH)
        official.move(f"{section}.loss_reg_min_epoch", "guard.start", int((epoch + 1) * ipe))
    else:
        official.ignore(f"{section}.loss_reg_min_epoch", "no effect without loss_reg_std_mult")

    final_lr = official.number(f"{section}.final_lr")
    official.move(f"{section}.final_lr", "optim.final_lr", final_lr)
    if official.flag(f"{section}.is_anneal", False):
        schedule = "linear"
        official.set("optim.warmup", 0)
        for name in ("start_lr", "warmup"):
            official.ignore(f"{section}.{name}", "no effect: the linear decay has no warm-up")
        checkpoint = official.values.get(f"{section}.anneal_ckpt")
        remark = (
            "a run or weights of fastjepa, or a released file; the official script takes the "
            "optimizer's moments too: with a run train.init_with=optimizer does"
        )
        official.move(f"{section}.anneal_ckpt", "train.init_from", checkpoint, remark)
    else:
        schedule = "constant" if final_lr == official.values.get(f"{section}.lr") else "cosine"
        start_lr = official.number(f"{section}.start_lr")
        official.move(f"{section}.start_lr", "optim.start_lr", start_lr)
        warmup = int(official.number(f"{section}.warmup") * ipe)
        remark = "warmup x ipe"
        if warmup > epochs * ipe:
            remark += f"; longer than the run of {epochs * ipe} steps, give a smaller one"
        official.move(f"{section}.warmup", "optim.warmup", warmup, remark)
        official.ignore(f"{section}.anneal_ckpt", "no effect without is_anneal")
        if schedule == "constant":
            remark = "final_lr equals lr: optim.schedule is constant"
            official.move(f"{section}.final_lr", "optim.final_lr", final_lr, remark)
    official.move(f"{section}.is_anneal", "optim.schedule", schedule)


def _momentum(official: KeyLedger, key: str) -> None:
    ema = official.many(key)
    if len(ema) != 2 or not all(isinstance(value, int | float) for value in ema):
        raise official.error(key, "expected two numbers, the first and the final momentum")
    momentum, final = min(ema), ema[1]  # the official script never goes above the final one
    official.move(key, "optim.ema.momentum", momentum)
    if final != momentum:
        official.set("optim.ema.final_momentum", final)
        official.moved(key, "optim.ema.momentum", momentum, f"optim.ema.final_momentum is {final}")
