"""What a recipe may say: typed, frozen, unknown keys refused. Values in, no behaviour.

Durations are whole steps (`15000`) or a share of the run (`5%`); resolve.py turns them into steps.
Defaults are the released V-JEPA 2.1 pretraining (paper section 4 and the released configuration).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fastjepa.presets import Rope


class Section(BaseModel):
    """A part of the recipe: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _duration(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("expected whole steps (15000) or a share of the run (5%)")
    if isinstance(value, int):
        if value < 0:
            raise ValueError("expected a number of steps that is not negative")
        return value
    number = value.removesuffix("%")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if number == value or not 0.0 <= share <= 1000.0:
        raise ValueError("expected whole steps (15000) or a share of the run (5%)")
    return value


Duration = Annotated[int | str, BeforeValidator(_duration)]
Range = tuple[float, float]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _ordered(name: str, value: Range, low: float, high: float) -> None:
    if not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name}: expected low <= high within [{low:g}, {high:g}], got {value}")


class Run(Section):
    folder: Path = Path("runs/fastjepa")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Predictor(Section):
    width: Positive = 384
    depth: Positive = 24
    heads: Positive = 12
    mask_tokens: Positive = 8

    @model_validator(mode="after")
    def _fits(self) -> "Predictor":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} over {self.heads} heads leaves no even whole head width"
            )
        return self


class Sizes(Section):
    """An encoder of the zoo, with other sizes where they are given."""

    name: Literal[
        "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant", "vit_gigantic"
    ] = "vit_large"
    width: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    mlp_width: Positive | None = None


class Model(Sizes):
    levels: tuple[int, ...] | None = None
    patch: Positive = 16
    tubelet: Positive = 2
    interpolate_rope: bool = True
    rope: Rope = "interleaved"
    checkpointing: bool | Literal["encoder"] = False
    keep_attention: bool = False
    attention: Literal[
        "auto",
        "avx512",
        "sdpa",
        "cudnn",
        "triton",
        "varlen",
        "flash2",
        "flash3",
        "flash4",
        "xformers",
        "math",
    ] = "auto"
    predictor: Predictor = Predictor()

    @model_validator(mode="after")
    def _fits(self) -> "Model":
        if self.keep_attention and not self.checkpointing:
            raise ValueError("keep_attention: true goes with checkpointing; expected false")
        return self


class Source(Section):
    """One data set: whatever data/manifest.py can list."""

    path: str
    weight: Annotated[float, Field(gt=0.0)] = 1.0


def _sources(value: object) -> object:
    """One path, or a list of paths and sources, for a list of sources."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, list | tuple):
        return tuple({"path": entry} if isinstance(entry, str) else entry for entry in value)
    return value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources)]


class Augment(Section):
    scale: Range = (0.3, 1.0)
    aspect: Range = (0.75, 1.35)
    flip: Share = 0.5

    @model_validator(mode="after")
    def _fits(self) -> "Augment":
        _ordered("scale", self.scale, 1e-3, 1.0)
        _ordered("aspect", self.aspect, 1e-2, 1e2)
        return self


class Length(Section):
    """Clips of another length: `share` is their part of the videos' weight in an update."""

    frames: Positive
    batch: Positive
    share: Annotated[float, Field(gt=0.0, lt=1.0)]
    fps: Annotated[float, Field(gt=0.0)] | None = None
    crop: Positive | None = None


class MediaCache(Section):
    """Where copies of remote files are kept (null: the user's cache folder), and how many GiB."""

    folder: Path | None = None
    gib: Annotated[float, Field(ge=0.0)] = 16.0


class Data(Section):
    video: Sources = ()
    image: Sources = ()
    frames: Positive = 16
    fps: Annotated[float, Field(gt=0.0)] = 4.0
    crop: Positive = 256
    image_crop: Positive | None = None
    batch: Positive = 24
    lengths: tuple[Length, ...] = ()
    image_batch: Positive = 72
    image_share: Share = 0.5
    mix: Literal["alternate", "accumulate"] = "accumulate"
    decoder: Literal["auto", "pyav", "dali", "dali_cpu"] = "auto"
    workers: Annotated[int, Field(ge=0)] = 8
    prefetch: Positive = 4
    pin_memory: bool = True
    max_bad_share: Share = 0.5
    cache: MediaCache = MediaCache()
    augment: Augment = Augment()


class MaskGroup(Section):
    """One way to split a clip's tokens into context and predicted (paper section 3)."""

    num_blocks: Positive
    spatial_scale: Range
    temporal_scale: Range = (1.0, 1.0)
    aspect_ratio: Range = (0.75, 1.5)
    max_temporal_keep: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_keep: Positive | None = None
    full_complement: bool = False
    pred_full_complement: bool = False
    inv_block: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "MaskGroup":
        _ordered("spatial_scale", self.spatial_scale, 0.0, 1.0)
        _ordered("temporal_scale", self.temporal_scale, 0.0, 1.0)
        _ordered("aspect_ratio", self.aspect_ratio, 1e-2, 1e2)
        if self.full_complement and self.pred_full_complement:
            raise ValueError("full_complement and pred_full_complement exclude each other")
        return self


class Masks(Section):
    """`truncate` cuts the index sets of a batch to its smallest, as the reference does."""

    truncate: bool = True
    video: Annotated[tuple[MaskGroup, ...], Field(min_length=1)] = (
        MaskGroup(num_blocks=8, spatial_scale=(0.15, 0.15)),
        MaskGroup(num_blocks=2, spatial_scale=(0.7, 0.7)),
    )
    image: Annotated[tuple[MaskGroup, ...], Field(min_length=1)] = (
        MaskGroup(num_blocks=10, spatial_scale=(0.15, 0.15)),
    )


class PerModality(Section):
    video: Annotated[float, Field(ge=0.0)] = 0.5
    image: Annotated[float, Field(ge=0.0)] = 0.5


class Ramp(Section):
    """Context weight: 0 up to `start`, linear to its full value at `end`."""

    start: Duration = 15_000
    end: Duration = 30_000


class Objective(Section):
    """`dense` supervises context tokens too, `deep` all levels; both off is V-JEPA 2."""

    dense: bool = True
    deep: bool = True
    level_weights: tuple[Annotated[float, Field(ge=0.0)], ...] | None = None
    context_weight: PerModality = PerModality()
    ramp: Ramp | None = Ramp()
    distance_weights: bool = True
    offset: bool = False
    loss_exp: Annotated[float, Field(ge=1.0)] = 1.0
    normalize_predictor: bool = False


class Distill(Sizes):
    """A frozen teacher, whose last level is the target: weights from `teacher`, of these sizes."""

    teacher: Path


class Ema(Section):
    """Momentum of the target encoder, or the half-life it stands for; linear to the final one."""

    momentum: Annotated[float, Field(ge=0.0, le=1.0)] | None = 0.99925
    final_momentum: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    half_life: Duration | None = None

    @model_validator(mode="before")
    @classmethod
    def _half_life_alone(cls, value: object) -> object:
        """A half-life given by itself replaces the default momentum."""
        if isinstance(value, dict) and value.get("half_life") is not None:
            return {"momentum": None, **value}
        return value

    @model_validator(mode="after")
    def _fits(self) -> "Ema":
        if (self.momentum is None) == (self.half_life is None):
            raise ValueError("give one of momentum and half_life, and null for the other")
        return self


class Optim(Section):
    """AdamW. `horizon` is the step at which cosine or linear decay reaches `final_lr`."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    start_lr: Annotated[float, Field(ge=0.0)] = 1e-4
    lr: Annotated[float, Field(gt=0.0)] = 5.25e-4
    final_lr: Annotated[float, Field(ge=0.0)] = 1e-6
    warmup: Duration = 12_000
    horizon: Duration = "100%"
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.04
    final_weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    clip: Annotated[float, Field(gt=0.0)] | None = None
    accumulate: Positive = 1
    ema: Ema = Ema()


class Guard(Section):
    """Skip a step whose loss is not finite, or above mean + `sigma` std of the last `window`.

    `return_after` of them in a row: back to the last good checkpoint, past the data since then.
    """

    sigma: Annotated[float, Field(gt=0.0)] | None = None
    window: Annotated[int, Field(ge=4)] = 300
    start: Duration = 15_000
    max_skips: Positive = 10
    return_after: Positive | None = None
    max_returns: Positive = 3

    @model_validator(mode="after")
    def _fits(self) -> "Guard":
        if self.return_after is not None and self.return_after > self.max_skips:
            raise ValueError(
                f"return_after: {self.return_after} never comes, the run stops at more than "
                f"max_skips = {self.max_skips} skipped steps in a row"
            )
        return self


class Train(Section):
    steps: Positive = 135_000
    log_every: Positive = 10
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 3
    init_from: Path | None = None
    init_with: Literal["weights", "optimizer", "average"] = "weights"


class Engine(Section):
    """`torch` is one process, `deepspeed` one or many ranks; the keys from `zero_stage` on are its.

    `timeout` in seconds is how long ranks wait for one another, `heartbeat` how long for a sign
    of life.
    """

    kind: Literal["torch", "deepspeed"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    residual: Literal["reference", "bfloat16"] = "reference"
    compile: Literal["blocks"] | None = None
    target_dtype: Literal["float8"] | None = None
    threads: Positive | None = None
    mask_groups: Literal["auto", "packed", "in_turn"] = "auto"
    micro_batches: Literal["in_turn", "packed"] = "in_turn"
    zero_stage: Literal[0, 1, 2, 3] = 2
    communication_dtype: Literal["float32", "bfloat16"] | None = None
    offload: bool = False
    adamw: Literal["torch", "deepspeed", "apex"] = "torch"
    timeout: Positive = 600
    heartbeat: Annotated[int, Field(ge=5)] = 30

    @model_validator(mode="after")
    def _fits(self) -> "Engine":
        if self.residual == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError("residual: bfloat16 goes with dtype bfloat16; expected reference")
        if self.compile is not None and self.kind == "deepspeed" and self.zero_stage == 3:
            raise ValueError("compile: blocks needs whole weights; zero_stage 0, 1 or 2 has them")
        if self.kind == "deepspeed" and self.mask_groups == "in_turn":
            raise ValueError("mask_groups: in_turn is for kind torch; DeepSpeed's backward is one")
        if self.micro_batches == "packed" and self.mask_groups == "in_turn":
            raise ValueError("mask_groups: in_turn; micro_batches packed packs the groups, too")
        if self.kind == "torch" and (self.offload or self.adamw != "torch"):
            raise ValueError("offload and adamw are for kind deepspeed")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload: true needs zero_stage 1, 2 or 3, which shard what it moves")
        return self


class Evaluate(Section):
    """A small probe and a PCA picture on fixed clips, every so many steps (null: never)."""

    every: Positive | None = None
    clips: str | None = None
    count: Annotated[int, Field(ge=20)] = 128


class RankRoles(Section):
    """Ranks of images and ranks of videos: `rank_ratio` is the share of ranks on images alone."""

    rank_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    balance: Literal["ratio", "work"] = "ratio"

    @model_validator(mode="after")
    def _fits(self) -> "RankRoles":
        if self.balance == "work" and self.rank_ratio is None:
            raise ValueError("balance: work needs a rank_ratio, such as 0.5")
        return self


class Observe(Section):
    wandb: bool = False
    wandb_project: str = "fastjepa"
    pictures: bool = True


class Profile(Section):
    """A Chrome trace of the steps from the first of `steps` to the second, counted from 1."""

    steps: tuple[Positive, Positive] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Profile":
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps: expected [first, last], got {list(self.steps)}")
        return self


class Recipe(Section):
    """Everything a run needs; `fastjepa config show` prints what follows from it."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    masks: Masks = Masks()
    objective: Objective = Objective()
    distill: Distill | None = None
    optim: Optim = Optim()
    guard: Guard = Guard()
    train: Train = Train()
    engine: Engine = Engine()
    ranks: RankRoles = RankRoles()
    evaluate: Evaluate = Evaluate()
    observe: Observe = Observe()
    profile: Profile = Profile()
