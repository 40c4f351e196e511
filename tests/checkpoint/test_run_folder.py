"""A run's folder belongs to one recipe; another is refused with the keys that differ."""

from pathlib import Path

import pytest
import torch

from fastjepa.checkpoint import CheckpointError, check_writable, claim_run_folder, save_checkpoint
from fastjepa.checkpoint.run_folder import _FREE_KEYS, _FREE_SECTIONS, given_back_unused

RECIPE = """
run: {folder: runs/a, seed: 0}
model: {name: vit_tiny, checkpointing: false, levels: null, predictor: {depth: 4}}
data:
  video: [{path: a.csv, weight: 1.0}]
  workers: 2
  prefetch: 4
  pin_memory: true
  cache: {gib: 16.0}
optim: {accumulate: 1}
objective: {ramp: {start: 15000, end: 30000}}
train: {steps: 100, log_every: 10, checkpoint_every: 50, keep_checkpoints: 3}
engine: {threads: null, dtype: float32, kind: deepspeed}
observe: {wandb: false, pictures: true}
"""


def test_a_new_folder_is_made_and_records_the_recipe(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    assert claim_run_folder(run, "f1", RECIPE) == ()
    assert (run / "recipe.yaml").read_text() == f"# fingerprint: f1\n{RECIPE}"
    assert claim_run_folder(run, "f1", RECIPE) == ()
    assert [file.name for file in run.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("train.steps", "steps: 100", "steps: 400"),
        ("train.log_every", "log_every: 10", "log_every: 1"),
        ("train.checkpoint_every", "checkpoint_every: 50", "checkpoint_every: 5"),
        ("train.keep_checkpoints", "keep_checkpoints: 3", "keep_checkpoints: 1"),
        ("data.workers", "workers: 2", "workers: 0"),
        ("data.prefetch", "prefetch: 4", "prefetch: 1"),
        ("data.pin_memory", "pin_memory: true", "pin_memory: false"),
        ("optim.accumulate", "accumulate: 1", "accumulate: 2"),
        ("run.folder", "folder: runs/a", "folder: ./runs/a"),
        ("engine.threads", "threads: null", "threads: 2"),
        ("engine.kind", "kind: deepspeed", "kind: torch"),
        ("model.checkpointing", "checkpointing: false", "checkpointing: true"),
        ("data.cache.gib", "gib: 16.0", "gib: 32.0"),
        ("observe.wandb", "wandb: false", "wandb: true"),
    ],
)
def test_what_changes_no_number_may_differ_and_is_told(
    tmp_path: Path, key: str, old: str, new: str
) -> None:
    claim_run_folder(tmp_path, "f1", RECIPE)
    changed = RECIPE.replace(old, new)
    assert claim_run_folder(tmp_path, "f2", changed) == (key,)
    # The folder holds the recipe that the run goes on with.
    assert claim_run_folder(tmp_path, "f2", changed) == ()


def test_another_recipe_is_refused_in_one_line_that_names_every_key(tmp_path: Path) -> None:
    claim_run_folder(tmp_path, "f1", RECIPE)
    other = (
        RECIPE.replace("vit_tiny", "vit_base")
        .replace("depth: 4", "depth: 12")
        .replace("a.csv", "b.csv")
        .replace("steps: 100", "steps: 200")
        .replace("ramp: {start: 15000, end: 30000}", "ramp: null")
    )
    recorded = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        claim_run_folder(tmp_path, "f2", other)
    said = str(caught.value)
    assert said.startswith(f"run.folder {tmp_path} belongs to another recipe: ")
    assert "\n" not in said
    for told in [
        "model.name (vit_tiny there, vit_base now)",
        "model.predictor.depth (4 there, 12 now)",
        "data.video ([{'path': 'a.csv', 'weight': 1.0}] there, [{'path': 'b.csv'",
        "objective.ramp (absent there, None now)",
        "objective.ramp.start (15000 there, absent now)",
    ]:
        assert told in said
    assert "train.steps" not in said
    assert (tmp_path / "recipe.yaml").read_bytes() == recorded


def test_equal_recipes_of_unequal_fingerprint_are_refused(tmp_path: Path) -> None:
    claim_run_folder(tmp_path, "f1", RECIPE)
    with pytest.raises(CheckpointError, match="fingerprint 'f1', the same recipe now 'f2': edited"):
        claim_run_folder(tmp_path, "f2", RECIPE)


def test_a_run_that_fails_before_its_first_step_gives_the_folder_back(tmp_path: Path) -> None:
    other = RECIPE.replace("vit_tiny", "vit_base")

    def fails(text: str) -> None:
        with pytest.raises(RuntimeError), given_back_unused(tmp_path, text):
            raise RuntimeError

    claim_run_folder(tmp_path, "f1", RECIPE)
    (tmp_path / "metrics.jsonl").touch()  # opened, and nothing logged
    fails(other)  # the folder is not that one's to give back
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        claim_run_folder(tmp_path, "f2", other)
    fails(RECIPE)
    claim_run_folder(tmp_path, "f2", other)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    fails(other)
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        claim_run_folder(tmp_path, "f1", RECIPE)


def test_the_docs_name_every_key_that_may_differ() -> None:
    page = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text(encoding="utf-8")
    free = {*_FREE_KEYS, *(section.rstrip(".") for section in _FREE_SECTIONS)}
    assert not [key for key in free if f"`{key}`" not in page]


def test_checkpoints_of_an_unknown_recipe_are_not_taken_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, {"encoder": {"x": torch.ones(1)}}, {}, keep=1)
    with pytest.raises(CheckpointError, match=r"holds step-00000003 but no recipe\.yaml"):
        claim_run_folder(tmp_path, "f1", RECIPE)


@pytest.mark.parametrize(
    "content", [b"model: [", b"- a\n- b\n", b"\xff\xfe\x00", b"a: !!python/object:os.system x"]
)
def test_a_recorded_recipe_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"recipe\.yaml: (not a recipe|cannot be read)"
    ) as caught:
        claim_run_folder(tmp_path, "f1", RECIPE)
    assert "\n" not in str(caught.value)


def test_checking_leaves_nothing_behind_and_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    check_writable(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"run\.folder .*file: cannot be written: File exists"
    ):
        check_writable(tmp_path / "file")
