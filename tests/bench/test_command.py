"""`fastjepa bench kernels` as a person types it: tables, files, comparison, one line for a
mistake."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.bench.chart import draw
from fastjepa.bench.report import as_text, comparison
from fastjepa.bench.results import Figure, Results, load_results
from fastjepa.bench.shapes import SETS, TINY
from fastjepa.bench.ways import CASES
from fastjepa.cli import main

OPS = ("mask_distance", "dense_l1")


def command(*words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in ("bench", "kernels", *words)])
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    """The file of one run on two ops."""
    threads = torch.get_num_threads()
    chosen = [word for op in OPS for word in ("--op", op)]
    command(
        *chosen, "--shape", "tiny", "--device", "cpu", "--repeats", 3, "--threads", 2,
        "--json", folder / "run.json", "--chart", folder / "run.png",
    )  # fmt: skip
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    return folder / "run.json"


@pytest.fixture
def results(written: Path) -> Results:
    return load_results(written)


def test_the_file_holds_every_figure_and_where_it_is_from(written: Path) -> None:
    found: dict[str, Any] = json.loads(written.read_text())
    assert found["command"] == (
        "fastjepa bench kernels --op mask_distance --op dense_l1 --shape tiny "
        "--device cpu --threads 2 --repeats 3"
    )
    assert found["device"]["type"] == "cpu"
    assert found["device"]["threads"] == 2
    assert found["versions"]["torch"] == torch.__version__
    assert found["official"] == "restated"
    assert found["copy_bytes_per_second"] > 1e8
    assert found["counted"]["mask_distance"]["triton"] == 2
    assert 1 <= found["counted"]["dense_l1"]["triton"] <= 6
    row = found["rows"][0]
    assert (row["op"], row["shape"], row["dtype"]) == ("mask_distance", TINY.name, "float32")
    assert row["bytes"] == CASES["mask_distance"].work(TINY).bytes
    assert row["ways"].keys() == {"ours", "formula", "official"}
    for way in row["ways"].values():
        assert way["seconds"] == sorted(way["rounds"])[1]
        assert way["peak_extra_bytes"] > 0
        assert way["bytes_per_second"] == pytest.approx(row["bytes"] / way["seconds"])
    ours, other = row["ways"]["ours"], row["ways"]["official"]
    ratios = sorted(a / b for a, b in zip(ours["rounds"], other["rounds"], strict=True))
    assert other["ours_over_this_time"] == pytest.approx(ratios[1])
    memory = ours["peak_extra_bytes"] / other["peak_extra_bytes"]
    assert other["ours_over_this_memory"] == pytest.approx(memory)


def test_gpu_shapes_have_their_bytes_and_no_figure(results: Results) -> None:
    for op in OPS:
        rows = {row.shape: row for row in results.rows if row.op == op and row.shape != TINY.name}
        assert rows.keys() == {shape.name for shape in SETS["gpu"]}
        for shape in SETS["gpu"]:
            assert rows[shape.name].bytes == CASES[op].work(shape).bytes
            assert rows[shape.name].ways == {}
    lines = as_text(results).splitlines()
    for shape in SETS["gpu"]:
        shown = [line for line in lines if line.startswith(shape.name)]
        assert len(shown) == 2
        assert all("not measured" in line for line in shown)


def test_the_table_shows_times_ratios_memory_and_launches(results: Results) -> None:
    text = as_text(results)
    assert "copy bandwidth" in text
    assert "official way: restated" in text
    assert "about 8,000 a step" in text
    (row, *_) = results.rows
    ratio = row.time_ratio("official")
    assert ratio is not None
    assert f"{ratio:.3f}" in text


def test_the_chart_is_a_picture(written: Path, results: Results, tmp_path: Path) -> None:
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    on_gpu = replace(results, device={"type": "cuda", "name": "a GPU"})
    draw(on_gpu, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    empty = replace(results, rows=[row for row in results.rows if not row.ways])
    with pytest.raises(ValueError, match=r"none\.png: nothing was measured"):
        draw(empty, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_comparison_says_how_many_times_faster_and_smaller(results: Results) -> None:
    def slower(figure: Figure) -> Figure:
        assert figure.seconds
        assert figure.peak_extra_bytes
        return replace(
            figure, seconds=4 * figure.seconds, peak_extra_bytes=2 * figure.peak_extra_bytes
        )

    rows = [
        replace(row, ways={way: slower(figure) for way, figure in row.ways.items()})
        for row in results.rows
    ]
    lines = comparison(replace(results, rows=rows), results).splitlines()
    assert len(lines) == 1 + 2 * 3
    assert all(line.split()[-2:] == ["4.000", "2.000"] for line in lines[1:])
    elsewhere = replace(results, device={**results.device, "name": "another"})
    assert comparison(elsewhere, results).startswith("warning: another device")


def test_a_run_is_compared_with_an_older_one(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("--op", "mask_distance", "--shape", "tiny", "--device", "cpu", "--repeats", 1,
            "--compare", written)  # fmt: skip
    assert "old/new: time" in capsys.readouterr().out


def test_what_ran_out_of_memory_says_so(results: Results) -> None:
    row = results.rows[0]
    ways = {**row.ways, "official": Figure(None, [], None, note="out of memory")}
    text = as_text(replace(results, rows=[replace(row, ways=ways)]))
    assert "out of memory" in text
    assert replace(row, ways=ways).time_ratio("official") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--op", "rope"], "--op rope: did you mean rope3d?"),
        (["--shape", "cpus"], "--shape cpus: did you mean cpu?"),
        (["--reference", "no-such-folder"], "--reference no-such-folder: expected an official"),
        (["--json", "no-such-folder/x.json"], "--json no-such-folder/x.json: the folder"),
        (["--compare", __file__], "expected a file that `fastjepa bench kernels --json` wrote"),
        (["--compare", "no-such.json"], "no-such.json"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_timed(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "kernels", *words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
