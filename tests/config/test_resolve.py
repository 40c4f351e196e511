"""What a recipe comes to: every derived number, and the combinations that cannot work."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.config.load import RecipeError, load_recipe
from fastjepa.config.resolve import in_steps, resolve

CONFIGS = Path(__file__).parents[2] / "configs"
LEVELS = {
    "vitb16": (2, 5, 8, 11),
    "vitl16": (5, 11, 17, 23),
    "vitg16": (9, 19, 29, 39),
    "vitG16": (11, 23, 37, 47),
}
WIDTHS = {
    "vitb16": (768, 12, 12, 3072),
    "vitl16": (1024, 24, 16, 4096),
    "vitg16": (1408, 40, 22, 6144),
    "vitG16": (1664, 48, 26, 8192),
}
CLIPS = {"vitb16": (96, 144), "vitl16": (48, 72), "vitg16": (48, 72), "vitG16": (24, 36)}


@pytest.fixture
def resolved(tmp_path):
    """Resolve a recipe of one video source and the given overrides."""
    path = tmp_path / "r.yaml"
    path.write_text("data: {video: clips}")
    return lambda *overrides: resolve(load_recipe(path, overrides))


@pytest.mark.parametrize("size", LEVELS)
def test_released_pretraining(size):
    r = resolve(load_recipe(CONFIGS / size / "pretrain-256px-16f.yaml"))
    assert (r.video.grid, r.video.tokens) == ((8, 16, 16), 2048)
    assert (r.image.grid, r.image.tokens) == ((1, 16, 16), 256)
    assert (r.video.clips, r.image.clips) == CLIPS[size]
    assert r.encoder.levels == LEVELS[size]
    e = r.encoder
    assert (e.width, e.depth, e.heads, e.mlp_width) == WIDTHS[size]
    assert (r.predictor.width, r.predictor.heads, r.predictor.mlp_width) == (384, 12, 1536)
    assert r.predictor.depth == (12 if size == "vitb16" else 24)
    assert r.level_weights == (0.25,) * 4
    assert (r.steps, r.warmup, r.ramp) == (300_000, 12_000, (15_000, 30_000))
    assert (r.momentum, r.final_momentum) == (0.99925, 0.99925)
    assert (r.image_share, r.video.share, r.image.share) == (0.5, 0.5, 0.5)
    assert (r.video.context_weight, r.image.context_weight) == (0.5, 0.5)
    assert r.notes == ()


@pytest.mark.parametrize("size", LEVELS)
def test_released_cooldown(size):
    recipe = load_recipe(CONFIGS / size / "cooldown-256px-64f.yaml")
    r = resolve(recipe)
    assert (r.video.frames, r.video.grid, r.video.tokens) == (64, (32, 16, 16), 8192)
    assert (r.video.clips, r.image.clips) == (CLIPS[size][0] // 2, CLIPS[size][1])
    assert (r.steps, r.warmup, r.horizon, r.ramp) == (12_000, 0, 15_000, None)
    assert (recipe.optim.schedule, recipe.objective.distance_weights) == ("linear", False)
    assert r.encoder.levels == LEVELS[size]


def test_the_demo_is_small_and_uses_both_modalities():
    recipe = load_recipe(CONFIGS / "demo.yaml")
    r = resolve(recipe)
    assert (r.encoder.width, r.predictor.width // r.predictor.heads) == (192, 32)
    assert r.video.tokens <= 200
    assert r.image_share == 0.25
    assert r.warmup == r.steps // 10
    assert r.ramp is None
    assert r.momentum == pytest.approx(0.5 ** (1 / in_steps("3%", r.steps)))
    assert r.notes == ()
    assert (recipe.engine.dtype, recipe.run.folder) == ("float32", Path("runs/demo"))


@given(share=st.integers(0, 100), steps=st.integers(1, 10**6))
def test_a_share_of_a_run_is_the_nearest_step(share, steps):
    assert abs(in_steps(f"{share}%", steps) - share * steps / 100) <= 0.5
    assert in_steps(share, steps) == share


def test_without_deep_only_the_last_level_is_supervised(resolved):
    r = resolved("objective.deep=false")
    assert (r.encoder.levels, r.level_weights) == ((23,), (1.0,))


def test_without_dense_context_tokens_weigh_nothing(resolved):
    r = resolved("objective.dense=false")
    assert (r.video.context_weight, r.ramp) == (0.0, None)


def test_level_weights_sum_to_one(resolved):
    assert resolved("objective.level_weights=[1, 1, 2, 4]").level_weights == (
        0.125,
        0.125,
        0.25,
        0.5,
    )


def test_sizes_of_ones_own(resolved):
    e = resolved("model.name=vit_tiny", "model.width=96", "model.depth=5").encoder
    assert (e.width, e.depth, e.heads, e.mlp_width, e.levels) == (96, 5, 3, 384, (0, 1, 3, 4))


def test_one_modality_takes_the_whole_update(resolved):
    r = resolved()
    assert (r.image, r.image_share, r.video.share, r.clips_per_step) == (None, 0.0, 1.0, 24.0)
    assert r.notes == ("only videos: data.image is empty, so data.image_share has no effect",)
    r = resolved("data.video=[]", "data.image=stills")
    assert (r.video, r.image_share, r.image.share) == (None, 1.0, 1.0)
    assert r.notes == ("only images: data.video is empty, so data.image_share has no effect",)
    r = resolved("data.image=stills", "data.image_share=0")
    assert r.image is None
    assert r.notes == ("data.image is not read: data.image_share is 0",)


def test_clips_of_an_optimizer_step(resolved):
    both = ("data.image=stills", "data.batch=8", "data.image_batch=16", "data.image_share=0.25")
    assert resolved(*both, "data.mix=accumulate").clips_per_step == 24
    assert resolved(*both, "data.mix=alternate").clips_per_step == 0.75 * 8 + 0.25 * 16
    assert resolved(*both, "data.mix=accumulate", "optim.accumulate=3").clips_per_step == 72


def test_images_may_have_their_own_crop(resolved):
    r = resolved("data.image=stills", "data.image_crop=512")
    assert (r.video.grid[1:], r.image.grid) == ((16, 16), (1, 32, 32))


def test_half_life_gives_the_momentum(resolved):
    assert resolved("optim.ema.half_life=100").momentum ** 100 == pytest.approx(0.5)
    r = resolved("train.steps=12000", "optim.ema.half_life=1%")
    assert r.momentum**120 == pytest.approx(0.5)


def test_short_runs_are_told_what_never_happens(resolved):
    short = ("data.image=stills", "train.steps=2000", "optim.warmup=0")
    assert resolved(*short).notes == (
        "the context loss never starts: objective.ramp is at step 15000 of 2000",
    )
    assert resolved(*short, "objective.ramp.start=1000").notes == (
        "the context loss never has its full weight: objective.ramp is at step 30000 of 2000",
    )
    assert resolved(*short, "objective.ramp=null", "guard.sigma=3").notes == (
        "the guard's sigma never acts: guard.start is step 15000 of 2000",
    )
    assert resolved(*short, "objective.ramp=null", "train.checkpoint_every=3000").notes == (
        "one checkpoint, at the end: train.checkpoint_every is 3000 of 2000 steps",
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["data.crop=250"],
            "data.crop: 250 is no multiple of model.patch 16; 240 or 256 would be",
        ),
        (["data.crop=7"], "data.crop: 7 is no multiple of model.patch 16; 16 would be"),
        (
            ["data.image_crop=100"],
            "data.image_crop: 100 is no multiple of model.patch 16; 96 or 112 would be",
        ),
        (
            ["data.frames=15"],
            "data.frames: 15 is no multiple of model.tubelet 2; 14 or 16 would be",
        ),
        (
            ["data.frames=1", "model.tubelet=1"],
            "data.frames: 1 is an image to the tokenizer; expected at least 2",
        ),
        (
            ["data.video=[]"],
            "data.video: no data: data.video and data.image are both empty; give a path to one",
        ),
        (
            ["model.levels=[5, 24]"],
            "model.levels: [5, 24] does not end with 23, the last of 24 blocks, "
            "whose norm gives the features",
        ),
        (
            ["model.levels=[11, 5, 23]"],
            "model.levels: [11, 5, 23] does not fit; expected block indices from 0 "
            "in rising order, for example [5, 11, 17, 23]",
        ),
        (
            ["model.levels=[-1, 23]"],
            "model.levels: [-1, 23] does not fit; expected block indices from 0 "
            "in rising order, for example [5, 11, 17, 23]",
        ),
        (
            ["objective.level_weights=[1, 2]"],
            "objective.level_weights: [1.0, 2.0] does not fit; expected 4 weights, "
            "one for each supervised level, not all zero",
        ),
        (
            ["objective.ramp.start=200", "objective.ramp.end=100"],
            "objective.ramp.end: 100 is step 100, expected a step from objective.ramp.start's 200",
        ),
        (
            ["model.width=1000"],
            "model.heads: 16 do not divide a width of 1000; 10 or 20 would",
        ),
        (
            ["model.width=48"],
            "model.heads: 16 heads of a width of 48 have 3 channels each; "
            "expected an even number of at least 6",
        ),
        (
            ["model.predictor.width=48"],
            "model.predictor.heads: 12 heads of a width of 48 have 4 channels each; "
            "expected an even number of at least 6",
        ),
        (
            ["optim.ema.half_life=0"],
            "optim.ema.half_life: 0 is no step of 135000; expected at least 1",
        ),
        (
            ["train.steps=300"],
            "optim.warmup: 12000 is longer than the run; "
            "expected at most train.steps 300, or a share such as 10%",
        ),
        (
            ["optim.schedule=cosine", "optim.horizon=5%"],
            "optim.horizon: 5% is step 6750, expected a step after optim.warmup's end at 12000",
        ),
        (["optim.horizon=0"], "optim.horizon: 0 is no step of 135000; expected at least 1"),
        (
            ["data.crop=32"],
            "masks.video.0.spatial_scale: [0.15, 0.15] of 2x2 tokens can be none; "
            "expected at least 0.25",
        ),
        (
            ["masks.video.1.max_temporal_keep=0.1"],
            "masks.video.1.max_temporal_keep: 0.1 of 8 steps in time keeps none; "
            "expected at least 0.125",
        ),
    ],
)
def test_impossible_combinations_are_one_line(resolved, overrides, line):
    with pytest.raises(RecipeError) as caught:
        resolved(*overrides)
    assert str(caught.value) == line
