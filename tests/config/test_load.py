"""A recipe is YAML plus overrides; each mistake is one line that names key, value and what fits."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.config.load import RecipeError, dump_recipe, load_recipe
from fastjepa.config.schema import Data, Ema, MaskGroup, Masks, Model, Optim, Recipe, Run, Source


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a YAML text to `r.yaml` in the working directory."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str | bytes) -> str:
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "r.yaml"

    return _write


def mistake(path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_an_empty_file_is_the_default_recipe(write):
    assert load_recipe(write("")) == Recipe()
    assert load_recipe(write("# nothing\n")) == Recipe()


def test_overrides_win_over_the_file_and_keep_the_rest(write):
    path = write("train: {steps: 50, log_every: 5}\noptim: {lr: 1e-3}\n")
    recipe = load_recipe(path, ["train.steps=100", "optim.warmup=5%", "optim.betas=[0.9, 0.95]"])
    assert (recipe.train.steps, recipe.train.log_every) == (100, 5)
    assert (recipe.optim.lr, recipe.optim.warmup, recipe.optim.betas) == (1e-3, "5%", (0.9, 0.95))


def test_a_later_override_wins(write):
    assert load_recipe(write(""), ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    "override",
    [
        "data.video=/clips",
        "data.video=[/clips]",
        "data.video=[{path: /clips}]",
        "data.video.0.path=/clips",
        "data.video[0].path=/clips",
    ],
)
def test_ways_to_name_one_source(write, override):
    assert load_recipe(write(""), [override]).data.video == (Source(path="/clips"),)


def test_list_entries_change_by_index(write):
    path = write("data:\n  video:\n  - {path: a, weight: 2}\n  - b\n")
    recipe = load_recipe(path, ["data.video.0.weight=3", "data.video.2.path=c"])
    assert [(s.path, s.weight) for s in recipe.data.video] == [("a", 3.0), ("b", 1.0), ("c", 1.0)]


def test_an_index_reaches_into_a_default_list(write):
    groups = load_recipe(write(""), ["masks.video.1.num_blocks=4"]).masks.video
    assert groups == (
        Recipe().masks.video[0],
        Recipe().masks.video[1].model_copy(update={"num_blocks": 4}),
    )


def test_interpolation_fills_in_keys_and_the_environment(write, monkeypatch):
    monkeypatch.setenv("CLIPS", "/clips")
    path = write("data: {video: '${oc.env:CLIPS}', image: '${data.video}/stills'}")
    data = load_recipe(path).data
    assert (data.video[0].path, data.image[0].path) == ("/clips", "/clips/stills")


def test_a_half_life_alone_replaces_the_default_momentum(write):
    ema = load_recipe(write(""), ["optim.ema.half_life=3%"]).optim.ema
    assert (ema.momentum, ema.half_life) == (None, "3%")
    assert "give one of momentum and half_life" in mistake(
        write("optim: {ema: {momentum: 0.99}}"), "optim.ema.half_life=3%"
    )


NAMES = (
    "run, model, data, masks, objective, distill, optim, guard, train, engine, ranks, evaluate, "
    "observe, profile"
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: {stps: 3}", "r.yaml: train.stps: unknown key; did you mean train.steps?"),
        ("steps: 3", "r.yaml: steps: unknown key; did you mean train.steps?"),
        ("train: {lr: 3}", "r.yaml: train.lr: unknown key; did you mean optim.lr?"),
        ("trian: {steps: 3}", "r.yaml: trian: unknown key; did you mean train?"),
        ("zzz: 3", f"r.yaml: zzz: unknown key; a recipe has {NAMES}"),
        ("run: {zzz: 3}", "r.yaml: run.zzz: unknown key; run has folder, seed"),
        (
            "data: {video: [{path: a, wieght: 3}]}",
            "r.yaml: data.video.0.wieght: unknown key; did you mean data.video.0.weight?",
        ),
        ("train: {steps: many}", "r.yaml: train.steps: found 'many', expected a whole number"),
        ("train: {steps: true}", "r.yaml: train.steps: found True, expected a whole number"),
        ("train: {steps: 2.5}", "r.yaml: train.steps: found 2.5, expected a whole number"),
        ("train: {steps: 0}", "r.yaml: train.steps: found 0, expected a number above 0"),
        ("train: 3", "r.yaml: train: found 3, expected a mapping of keys to values"),
        ("optim: {lr: .nan}", "r.yaml: optim.lr: found nan, expected a finite number"),
        ("observe: {wandb: 3}", "r.yaml: observe.wandb: found 3, expected true or false"),
        (
            "run: {folder: 3}",
            "r.yaml: run.folder: found 3, expected text (quote it if it is meant so)",
        ),
        (
            "optim: {warmup: 5 percent}",
            "r.yaml: optim.warmup: found '5 percent', "
            "expected whole steps (15000) or a share of the run (5%)",
        ),
        (
            "engine: {dtype: bfloat}",
            "r.yaml: engine.dtype: found 'bfloat', expected 'float32' or 'bfloat16'; "
            "did you mean bfloat16?",
        ),
        (
            "data: {video: [{weight: 1}]}",
            "r.yaml: data.video.0.path: missing; data.video.0 needs it",
        ),
        (
            "masks: {video: []}",
            "r.yaml: masks.video: found [], expected a list of at least 1 entries",
        ),
        ("train: {steps: 1}\ntrain: {}", "r.yaml: line 2, column 1: found duplicate key train"),
        ("- 1", "r.yaml: expected a mapping of keys to values, found a list"),
        ("hello", "r.yaml: expected a mapping of keys to values, found 'hello'"),
        ("a: b: c", "r.yaml: line 1, column 5: mapping values are not allowed here"),
        ("run: {folder: '${no.x}'}", "r.yaml: run.folder: Interpolation key 'no.x' not found"),
        (b"a: \xff", "r.yaml: expected UTF-8 text, byte 3 is not"),
        ("a: " + "[" * 5000, "r.yaml: nested too deeply"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(write, text, line):
    assert mistake(write(text)) == line


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stps=3", "override: train.stps: unknown key; did you mean train.steps?"),
        ("data.fps=0", "override: data.fps: found 0, expected a number above 0"),
        ("train.steps=", "override: train.steps: found None, expected a whole number"),
        ("train.steps", "override: found 'train.steps', expected key=value"),
        ("a..b=3", "override: found 'a..b=3', expected key=value"),
        ("data.video=3", "override: data.video: found 3, expected a list"),
        (
            "data.video.2.path=a",
            "override: data.video.2.path: data.video is a list of 0, found '2', "
            "expected an index from 0 to 0",
        ),
        (
            "run.folder=[a",
            "override: run.folder: found '[a', "
            "line 1, column 3: expected ',' or ']', but got '<stream end>'",
        ),
        ("run.seed.x=1", "override: run.seed: found {'x': 1}, expected a whole number"),
    ],
)
def test_a_mistake_in_an_override_is_one_line(write, override, line):
    assert mistake(write(""), override) == line


def test_every_mistake_is_told_with_its_source(write):
    text = "model: {name: vit_lage}\ntrain: {steps: x}"
    lines = mistake(write(text), "data.fps=0").splitlines()
    assert len(lines) == 3
    assert [line.split(":")[0] for line in lines] == ["r.yaml", "override", "r.yaml"]
    assert lines[0].endswith("did you mean vit_large?")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [touch owned]",
        "!!python/object/new:os.system [touch owned]",
        "!!python/object/apply:pathlib.PosixPath [owned]",
        "!!python/name:os.system",
        "!!binary aGVsbG8=",
        "!custom 3",
    ],
)
def test_yaml_that_constructs_objects_is_refused(write, tag):
    for line in (
        mistake(write(f"run:\n  folder: {tag}")),
        mistake(write(""), f"run.folder={tag}"),
    ):
        assert ": found the tag " in line
        assert line.endswith("expected plain values: a recipe constructs no objects")
        assert "\n" not in line
    assert os.listdir() == ["r.yaml"]


def test_missing_and_unreadable_files(tmp_path):
    assert mistake(str(tmp_path / "no.yaml")).endswith("cannot be read: No such file or directory")
    assert mistake(str(tmp_path)).endswith("cannot be read: Is a directory")


texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).filter(
    lambda text: text != "???"  # OmegaConf's own word for a missing value
)
durations = st.integers(0, 10**6) | st.floats(0, 1000, allow_nan=False).map(lambda x: f"{x:g}%")
floats = st.floats(1e-12, 1e6)
recipes = st.builds(
    Recipe,
    run=st.builds(Run, folder=texts.map(Path), seed=st.integers(0, 2**32 - 1)),
    model=st.builds(
        Model,
        name=st.sampled_from(["vit_tiny", "vit_gigantic"]),
        levels=st.none() | st.lists(st.integers(0, 40), max_size=4).map(tuple),
        checkpointing=st.sampled_from([False, True, "encoder"]),
    ),
    data=st.builds(
        Data,
        video=st.lists(st.builds(Source, path=texts, weight=floats), max_size=3).map(tuple),
        image_crop=st.none() | st.integers(1, 1000),
        fps=floats,
        image_share=st.floats(0, 1),
    ),
    masks=st.builds(
        Masks,
        video=st.lists(
            st.builds(
                MaskGroup,
                num_blocks=st.integers(1, 20),
                spatial_scale=st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
                max_keep=st.none() | st.integers(1, 99),
            ),
            min_size=1,
            max_size=3,
        ).map(tuple),
    ),
    optim=st.builds(
        Optim,
        lr=floats,
        warmup=durations,
        ema=st.builds(Ema, half_life=durations) | st.builds(Ema, momentum=st.floats(0, 1)),
    ),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes)
def test_a_dumped_recipe_loads_back_equal(recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    "name", ["1e-4", "2024-01-01", "yes", "${x}", r"\${x}", "a\\", "null", "5%"]
)
def test_text_that_looks_like_something_else_survives_a_dump(write, name):
    recipe = Recipe(data=Data(video=(Source(path=name),)))
    assert load_recipe(write(dump_recipe(recipe))) == recipe
