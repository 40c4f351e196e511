"""All ways of a case give the same numbers, and a wrong one is found before it is timed."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa.bench.official import RESTATED, Official, from_checkout
from fastjepa.bench.shapes import TINY
from fastjepa.bench.ways import CASES, check_agreement, ways

CPU = torch.device("cpu")
CHECKOUT = "VJEPA2_CHECKOUT"


@pytest.mark.parametrize("name", CASES)
def test_ours_and_the_restated_way_agree_with_the_formula(name: str) -> None:
    check_agreement(CASES[name], RESTATED, CPU, compiled=False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_the_compiled_formula_agrees() -> None:
    check_agreement(CASES["rope3d"], RESTATED, CPU, compiled=True)


@pytest.mark.skipif(CHECKOUT not in os.environ, reason=f"{CHECKOUT} names no official checkout")
def test_the_functions_of_a_checkout_agree() -> None:
    official = from_checkout(Path(os.environ[CHECKOUT]))
    assert official.source.startswith("checkout ")
    for case in CASES.values():
        check_agreement(case, official, CPU, compiled=False)


def _gather_shifted(x: Tensor, groups: Any) -> list[Tensor]:
    return RESTATED.gather(x, [index.roll(1, dims=1) for index in groups])


def _a_percent_off(function: Callable[..., Any]) -> Callable[..., Any]:
    def altered(*args: Any) -> Any:
        found = function(*args)
        return [1.01 * x for x in found] if isinstance(found, list) else 1.01 * found

    return altered


WRONG = {
    "dense_l1": replace(RESTATED, gather=_gather_shifted),
    "linear_dense_l1": replace(RESTATED, gather=_gather_shifted),
    "gather_tokens": replace(RESTATED, gather=_gather_shifted),
    "assemble_tokens": replace(RESTATED, gather=_a_percent_off(RESTATED.gather)),
    "mask_distance": replace(RESTATED, mask_distance=_a_percent_off(RESTATED.mask_distance)),
    "rope3d": replace(RESTATED, rotate=_a_percent_off(RESTATED.rotate)),
    "rope3d_": replace(RESTATED, rotate=_a_percent_off(RESTATED.rotate)),
}


@pytest.mark.parametrize(("name", "official"), WRONG.items())
def test_a_wrong_official_way_is_refused(name: str, official: Official) -> None:
    with pytest.raises(ValueError, match=f"{name}: official differs .* nothing was timed"):
        check_agreement(CASES[name], official, CPU, compiled=False)


@pytest.mark.parametrize("name", CASES)
def test_an_op_that_is_a_percent_off_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(case, "ours", _a_percent_off(case.ours))
    with pytest.raises(ValueError, match=f"{name}: ours differs"):
        check_agreement(case, RESTATED, CPU, compiled=False)


def test_a_wrong_gradient_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["dense_l1"]
    ours = case.ours

    def steeper(self: Any) -> list[Tensor]:
        (total,) = ours(self)
        return [1.01 * total - 0.01 * total.detach()]

    monkeypatch.setattr(case, "ours", steeper)
    with pytest.raises(ValueError, match="dense_l1: ours differs"):
        check_agreement(case, RESTATED, CPU, compiled=False)


def test_a_gradient_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["dense_l1"]
    ours = case.ours

    def spoilt(self: Any) -> list[Tensor]:
        (total,) = ours(self)
        total.register_hook(lambda slope: slope * torch.nan)
        return [total]

    monkeypatch.setattr(case, "ours", spoilt)
    with pytest.raises(ValueError, match="dense_l1: ours differs from the formula by nan"):
        check_agreement(case, RESTATED, CPU, compiled=False)


def test_inputs_are_the_same_for_a_seed_and_others_for_another() -> None:
    one, same, other = (CASES["dense_l1"](TINY, CPU, seed).leaves[0] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_run_gives_outputs_or_gradients_and_leaves_nothing_on_the_leaves() -> None:
    case = CASES["gather_tokens"](TINY, CPU)
    grads = case.run(ways(case, RESTATED, compiled=False)["ours"])
    assert [g.shape for g in grads] == [leaf.shape for leaf in case.leaves]
    assert all(leaf.grad is None for leaf in case.leaves)
    assert not any(output.requires_grad for output in _run("mask_distance"))


def _run(name: str) -> list[Tensor]:
    case = CASES[name](TINY, CPU)
    return case.run(case.ours)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--reference {tmp_path}: expected an official"):
        from_checkout(tmp_path)
