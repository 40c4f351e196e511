"""An official training YAML becomes a recipe of the same meaning; every key is accounted for."""

import pytest

from fastjepa.config.from_vjepa2 import import_official
from fastjepa.config.load import RecipeError, dump_recipe, load_recipe
from fastjepa.config.resolve import resolve

MASKS = """
mask:
- {aspect_ratio: [0.75, 1.5], full_complement: false, max_keep: null, max_temporal_keep: 1.0,
   num_blocks: 8, spatial_scale: [0.15, 0.15], temporal_scale: [1.0, 1.0]}
- {aspect_ratio: [0.75, 1.5], num_blocks: 2, spatial_scale: [0.7, 0.7], temporal_scale: [1.0, 1.0]}
"""
COMMON = f"""
nodes: 16
tasks_per_node: 8
mem_per_gpu: 220G
folder: /runs/vitg
data:
  dataset_type: VideoDataset
  datasets: [/data/a.csv, /data/b.csv]
  datasets_weights: [0.4, 0.6]
  batch_size: 24
  crop_size: 256
  patch_size: 16
  dataset_fpcs: [16, 16]
  tubelet_size: 2
  fps: 4
  num_workers: 8
  pin_mem: true
data_aug:
  auto_augment: false
  random_resize_aspect_ratio: [0.75, 1.35]
  random_resize_scale: [0.3, 1.0]
{MASKS}
meta: {{dtype: bfloat16, eval_freq: 100, seed: 239, use_sdpa: true}}
"""
V21 = (
    f"app: vjepa_2_1{COMMON}"
    """
loss: {loss_exp: 1.0, predict_all: true, reg_coeff: 0.0, weight_distance_loss: true}
img_data:
  batch_size: 72
  crop_size: 256
  dataset_fpcs: [1]
  datasets: [/data/in1k.csv]
  datasets_weights: [1.0]
  rank_ratio: 0.5
img_mask:
- {aspect_ratio: [0.75, 1.5], num_blocks: 10, spatial_scale: [0.15, 0.15], temporal_scale: [1, 1]}
model:
  interpolate_rope: true
  lambda_value_img: 0.7
  lambda_value_vid: 0.5
  model_name: vit_giant_xformers
  pred_depth: 24
  pred_embed_dim: 384
  pred_num_heads: 12
  use_activation_checkpointing: true
  use_mask_tokens: true
  use_rope: true
optimization:
  ema: [0.99925, 0.99925]
  epochs: 1000
  final_lr: 0.0006
  final_weight_decay: 0.04
  ipe: 300
  ipe_scale: 1.25
  lr: 0.0006
  start_lr: 0.0001
  warmup: 40
  weight_decay: 0.04
"""
)
V20 = (
    f"app: vjepa{COMMON}"
    """
loss: {loss_exp: 1.0}
model: {model_name: vit_huge, pred_depth: 12, pred_embed_dim: 384, pred_num_heads: 12,
        use_mask_tokens: true, use_rope: true, uniform_power: true}
optimization: {ema: [0.998, 1.0], epochs: 100, final_lr: 1.0e-6, final_weight_decay: 0.4, ipe: 300,
               ipe_scale: 1.25, lr: 0.0005, start_lr: 0.0001, warmup: 40, weight_decay: 0.04}
"""
)


@pytest.fixture
def imported(tmp_path):
    """Import a text with `old -> new` changes made to it."""

    def _imported(text, changes=()):
        for old, new in dict(changes).items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "official.yaml"
        path.write_text(text)
        recipe, reports = import_official(path)
        return recipe, {report.key: report for report in reports}

    return _imported


def test_pretraining(imported):
    recipe, reports = imported(V21)
    r = resolve(recipe)
    assert (recipe.model.name, r.encoder.levels) == ("vit_giant", (9, 19, 29, 39))
    assert recipe.model.checkpointing
    assert [(s.path, s.weight) for s in recipe.data.video] == [
        ("/data/a.csv", 0.4),
        ("/data/b.csv", 0.6),
    ]
    assert (r.steps, r.warmup, r.ramp) == (300_000, 12_000, (15_000, 30_000))
    assert (recipe.optim.schedule, recipe.optim.lr, recipe.optim.horizon) == (
        "constant",
        6e-4,
        "125%",
    )
    assert (r.video.clips, r.image.clips, r.image_share) == (48, 72, 0.5)
    assert recipe.ranks.rank_ratio == 0.5
    assert (r.video.context_weight, r.image.context_weight) == (0.5, 0.7)
    assert [g.num_blocks for g in recipe.masks.video] == [8, 2]
    assert [g.num_blocks for g in recipe.masks.image] == [10]
    assert recipe.model.predictor.mask_tokens == 4
    assert (recipe.objective.dense, recipe.objective.deep) == (True, True)
    assert recipe.objective.distance_weights
    assert (recipe.run.seed, recipe.engine.dtype) == (239, "bfloat16")

    batch = reports["data.batch_size"]
    assert (batch.status, batch.value, batch.ours, batch.ours_value) == (
        "renamed",
        24,
        "data.batch",
        48,
    )
    assert reports["data.fps"].status == "kept"
    assert reports["model.use_rope"].status == "kept"
    assert (reports["mem_per_gpu"].status, reports["mem_per_gpu"].reason) == (
        "ignored",
        "cluster key",
    )
    assert reports["meta.eval_freq"].reason == "has no effect in the official code"


def test_the_reports_name_each_key_once_in_the_files_order(imported):
    _, reports = imported(V21, {"pin_mem: true": "pin_mem: true\n  wormholes: 3"})
    keys = list(reports)
    assert keys[:5] == ["app", "nodes", "tasks_per_node", "mem_per_gpu", "folder"]
    assert "mask.1.num_blocks" in keys
    unknown = [report.key for report in reports.values() if report.reason == "unknown"]
    assert unknown == ["data.wormholes"]
    assert all(report.ours for report in reports.values() if report.status == "renamed")
    assert all(report.reason for report in reports.values() if report.status == "ignored")


def test_an_imported_recipe_survives_a_dump(imported, tmp_path):
    recipe, _ = imported(V21)
    path = tmp_path / "ours.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_cooldown_is_a_linear_decay_without_warmup(imported):
    recipe, reports = imported(
        V21,
        {
            "epochs: 1000": "epochs: 40\n  is_anneal: true\n  anneal_ckpt: /runs/latest.pth.tar",
            "final_lr: 0.0006": "final_lr: 1.0e-06",
            "interpolate_rope: true": "interpolate_rope: true\n  lambda_progressive: false",
            "weight_distance_loss: true": "weight_distance_loss: false",
            "dataset_fpcs: [16, 16]": "dataset_fpcs: [64, 64]",
        },
    )
    r = resolve(recipe)
    assert (recipe.optim.schedule, r.steps, r.warmup, r.horizon) == ("linear", 12_000, 0, 15_000)
    assert recipe.optim.final_lr == 1e-6
    assert (r.ramp, r.video.tokens) == (None, 8192)
    assert not recipe.objective.distance_weights
    assert str(recipe.train.init_from) == "/runs/latest.pth.tar"
    assert reports["optimization.warmup"].status == "ignored"
    assert reports["model.lambda_progressive"].ours == "objective.ramp"


def test_vjepa2_has_neither_dense_nor_deep(imported):
    recipe, reports = imported(V20)
    r = resolve(recipe)
    assert (recipe.objective.dense, recipe.objective.deep) == (False, False)
    assert (r.encoder.levels, r.image, r.video.clips) == ((31,), None, 24)
    assert (recipe.optim.schedule, r.momentum, r.final_momentum) == ("cosine", 0.998, 1.0)
    assert recipe.optim.final_weight_decay == 0.4
    assert not recipe.model.interpolate_rope
    assert (reports["app"].ours, reports["app"].ours_value) == ("objective.deep", False)
    assert "objective.dense is false" in reports["app"].reason


def test_official_defaults_apply_to_missing_keys(imported):
    recipe, _ = imported(
        V21,
        {
            "  interpolate_rope: true\n": "",
            ", weight_distance_loss: true": "",
            "  lambda_value_vid: 0.5\n": "",
            "  rank_ratio: 0.5\n": "",
            "  ipe_scale: 1.25\n": "",
        },
    )
    assert not recipe.model.interpolate_rope
    assert not recipe.objective.distance_weights
    assert recipe.objective.context_weight.video == 0.0
    assert (recipe.ranks.rank_ratio, recipe.data.batch) == (0.25, 32)
    assert recipe.optim.horizon == "100%"


def test_video_masks_serve_images_without_their_own(imported):
    start = V21.index("img_mask:")
    recipe, _ = imported(V21[:start] + V21[V21.index("model:") :])
    assert recipe.masks.image == recipe.masks.video


def test_the_loss_guard_counts_epochs_from_the_next(imported):
    recipe, reports = imported(V21, {"  ipe: 300": "  ipe: 300\n  loss_reg_std_mult: 3.0"})
    assert (recipe.guard.sigma, recipe.guard.start, recipe.guard.window) == (3.0, 51 * 300, 300)
    assert reports["optimization.loss_reg_std_mult"].ours == "guard.sigma"


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model.use_rope", {"use_rope: true": "use_rope: false"}),
        ("model.n_registers", {"use_rope: true": "use_rope: true\n  n_registers: 4"}),
        ("data_aug.auto_augment", {"auto_augment: false": "auto_augment: true"}),
    ],
)
def test_what_is_not_offered_is_said(imported, key, change):
    report = imported(V21, change)[1][key]
    assert report.status == "ignored"
    assert report.reason.startswith("not offered: ")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"app: vjepa_2_1": "app: droid"}, "app: found 'droid', expected vjepa_2_1 or vjepa"),
        ({"epochs: 1000": "epochs: x"}, "optimization.epochs: found 'x', expected a number that"),
        ({"  ipe: 300\n": ""}, "optimization.ipe: missing, expected a number that"),
        ({"[0.4, 0.6]": "[0.4]"}, "data.datasets_weights: found [0.4], expected 2 weights"),
        (
            {"fpcs: [16, 16]": "fpcs: [16, 64]"},
            "data.dataset_fpcs: found [16, 64], expected one clip",
        ),
        (
            {"vit_giant_xformers": "vit_enormous"},
            "model.model_name: found 'vit_enormous', expected one",
        ),
        (
            {"rank_ratio: 0.5": "rank_ratio: 1.0"},
            "img_data.rank_ratio: found 1.0, expected a ratio",
        ),
        (
            {"[0.99925, 0.99925]": "[0.99925]"},
            "optimization.ema: found [0.99925], expected two numbers",
        ),
        ({"app: vjepa_2_1": "app: vjepa_2_1\nx: !!python/name:os.system"}, "line 2: found the tag"),
    ],
)
def test_files_that_cannot_be_imported_say_why_in_one_line(imported, change, line):
    with pytest.raises(RecipeError) as caught:
        imported(V21, change)
    text = str(caught.value)
    assert f"official.yaml: {line}" in text
    assert "\n" not in text


def test_a_wrong_type_names_the_official_key_and_ours(imported):
    with pytest.raises(RecipeError, match=r"official.yaml \(data.fps\): data.fps: found 'four', "):
        imported(V21, {"fps: 4": "fps: four"})
