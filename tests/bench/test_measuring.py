"""Clocks, memory and launches: what they say of calls whose cost is known."""

import time

import pytest
import torch

from fastjepa.bench.launches import count_interpreted, count_on_device
from fastjepa.bench.memory import peak_extra
from fastjepa.bench.shapes import TINY
from fastjepa.bench.timing import copy_bandwidth, in_turn, seconds, sets_to_rotate
from fastjepa.bench.ways import CASES

CPU = torch.device("cpu")


def test_memory_is_the_peak_of_what_lives_at_once() -> None:
    x = torch.ones(1000)

    def call() -> torch.Tensor:
        y = x + 1  # 4000 bytes
        z = y + x  # with y, 8000
        del y
        return z + z  # with z, 8000 again

    assert peak_extra(call, CPU) == 8000
    assert peak_extra(lambda: x.mul_(x), CPU) == 0
    assert peak_extra(lambda: None, CPU) == 0


def test_a_calls_duration_is_the_mean_of_its_repeats() -> None:
    assert seconds([lambda: time.sleep(0.01)], 3, CPU) == pytest.approx(0.01, rel=0.3)


def test_calls_on_rotating_inputs_take_their_turn() -> None:
    heard: list[str] = []
    seconds([lambda: heard.append("a"), lambda: heard.append("b")], 5, CPU)
    assert heard == ["a", "b", "a", "b", "a"]


def test_every_round_times_every_way_once() -> None:
    heard: list[str] = []

    def slow(name: str) -> None:
        heard.append(name)
        time.sleep(0.006)

    rounds = in_turn({"x": [lambda: slow("x")], "y": [lambda: slow("y")]}, CPU, repeats=3)
    assert [len(values) for values in rounds.values()] == [3, 3]
    assert heard[-6:] == ["x", "y", "x", "y", "x", "y"]


def test_a_way_that_runs_out_of_memory_is_left_out() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("too large")

    rounds = in_turn({"x": [too_large], "y": [lambda: None]}, CPU, repeats=2)
    assert rounds.keys() == {"y"}


def test_nothing_rotates_on_a_cpu() -> None:
    assert sets_to_rotate(1, CPU) == 1


def test_launches_of_ours_are_counted_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    counts = count_interpreted(["mask_distance", "rope3d", "rope3d_", "ema_update"])
    # A launch for each of two mask groups; one forward and one backward; one in place; one for all
    # weights.
    triton = {name: found["triton"] for name, found in counts.items()}
    assert triton["mask_distance"] == 2
    assert triton["rope3d"] == 2
    assert triton["rope3d_"] == triton["ema_update"] == 1
    assert counts["rope3d"]["torch"] == counts["rope3d_"]["torch"] == 0
    # Where the groups' segments begin: a range and a product each, for two groups of two sides.
    assert counts["mask_distance"]["torch"] == 8


def test_a_count_that_fails_says_why() -> None:
    with pytest.raises(ValueError, match="launches: KeyError: 'no_such_op'"):
        count_interpreted(["no_such_op"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_clock_memory_and_launches() -> None:
    device = torch.device("cuda")
    x = torch.ones(2**26, device=device)
    assert peak_extra(lambda: x + 1, device) == 4 * 2**26
    assert count_on_device(lambda: x.add_(1).mul_(2)) == 2
    assert 1e10 < copy_bandwidth(device) < 1e14
    took = seconds([lambda: x.add_(1)], 20, device)
    assert 8 * 2**26 / took < 1.3 * copy_bandwidth(device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    for case in (CASES["dense_l1"], CASES["ema_update"]):
        size = case.work(TINY).bytes
        assert sets_to_rotate(size, device) * size > 2 * cache
