"""Runs whose clips DALI decodes: they train, and refuse what cannot work."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastjepa.data.decode_dali import why_not
from fastjepa.data.numbered import write_numbered
from fastjepa.observe.sinks import read_metrics

from .conftest import run

NO_DALI = why_not()


@pytest.mark.skipif(NO_DALI is not None, reason=str(NO_DALI))
def test_a_run_on_dali(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Videos that DALI decodes, one that it is given as pixels, and images beside them."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, codec in enumerate(("vp9", "h264")):
        write_numbered(videos, number, codec=codec)
    recipe = write_recipe()
    code, out = run(recipe, f"data.video={videos}", "data.decoder=dali_cpu", "train.steps=3")
    assert code == 0, out
    assert "skipped" not in out
    rows = read_metrics(recipe.with_suffix("") / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0.0 < row["loss/video"] < 10.0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine could do it")
def test_nvdec_without_a_gpu_is_one_error_before_any_work(
    write_recipe: Callable[..., Path],
) -> None:
    recipe = write_recipe()
    code, out = run(recipe, "data.decoder=dali")
    assert code == 2
    (line,) = out.strip().splitlines()
    assert line.startswith("error: data.decoder: dali")
    assert "pyav" in line
    assert not recipe.with_suffix("").exists()


def test_without_dali_auto_is_pyav_and_dali_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastjepa.data.decode_dali import choose_decoder

    monkeypatch.setitem(sys.modules, "nvidia", None)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_decoder("auto", cuda).name == "pyav"
    assert "pip install 'fastjepa[dali]'" in choose_decoder("auto", cuda).reason
    assert choose_decoder("pyav", cuda).name == choose_decoder("auto", cpu).name == "pyav"
    for wanted in ("dali", "dali_cpu"):
        with pytest.raises(ValueError, match=f"data.decoder: {wanted} asked for, but DALI is not"):
            choose_decoder(wanted, cuda)


@pytest.mark.skipif(NO_DALI is not None, reason=str(NO_DALI))
def test_with_dali_auto_takes_it_on_a_gpu_alone() -> None:
    from fastjepa.data.decode_dali import choose_decoder

    assert choose_decoder("auto", torch.device("cuda")).name == "dali"
    assert choose_decoder("auto", torch.device("cpu")).name == "pyav"
    assert choose_decoder("dali_cpu", torch.device("cpu")).name == "dali_cpu"
    with pytest.raises(ValueError, match="the model is on a CPU"):
        choose_decoder("dali", torch.device("cpu"))
