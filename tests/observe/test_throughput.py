"""Rates come from the clock alone, interval by interval."""

import time

import pytest

from fastjepa.observe.throughput import Throughput


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_of_an_interval() -> None:
    clock = Clock()
    meter = Throughput(clock)
    for _ in range(2):
        with meter.waiting():
            clock.now += 1.0
        clock.now += 3.0
        meter.step(clips=4, tokens=40, flops=40)
    assert meter.read() == {
        "clips_per_second": 1.0,
        "tokens_per_second": 10.0,
        "flops_per_second": 10.0,
        "step_seconds": 4.0,
        "step_flops": 40.0,
        "data_wait": 0.25,
    }


def test_each_read_starts_anew() -> None:
    clock = Clock()
    meter = Throughput(clock)
    clock.now += 50.0
    meter.step(clips=1, tokens=1, flops=1)
    meter.read()
    clock.now += 1.0
    assert meter.read() == {}
    clock.now += 1.0
    meter.step(clips=4, tokens=8, flops=8)
    assert meter.read()["clips_per_second"] == 2.0


def test_pauses_do_not_count() -> None:
    clock = Clock()
    meter = Throughput(clock)
    with meter.paused():
        clock.now += 30.0
    clock.now += 2.0
    meter.step(clips=2, tokens=2, flops=2)
    assert meter.read()["step_seconds"] == 2.0


def test_a_wait_that_fails_still_counts() -> None:
    clock = Clock()
    meter = Throughput(clock)

    def late() -> None:
        clock.now += 1.0
        raise StopIteration

    with pytest.raises(StopIteration), meter.waiting():
        late()
    clock.now += 1.0
    meter.step(clips=1, tokens=1, flops=1)
    assert meter.read()["data_wait"] == 0.5


def test_the_real_clock() -> None:
    meter = Throughput()
    with meter.waiting():
        time.sleep(0.05)
    meter.step(clips=1, tokens=1, flops=1)
    rates = meter.read()
    assert rates["step_seconds"] >= 0.05
    assert 0.5 < rates["data_wait"] <= 1.0
