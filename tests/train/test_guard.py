"""The guard's decision, and that a refused step leaves no trace in it but its count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.train.guard import LossGuard

CPU = torch.device("cpu")


def guard(sigma: float | None = None, window: int = 4, start: int = 0) -> LossGuard:
    return LossGuard(sigma=sigma, window=window, start=start, device=CPU)


def ask(of: LossGuard, loss: float, *, step: int = 0, grad_norm: float = 1.0) -> bool:
    veto = of.veto(step, torch.tensor(loss), torch.tensor(grad_norm))
    assert veto.shape == ()
    assert veto.dtype == torch.float32
    return bool(veto)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_or_gradient_that_is_not_finite_is_refused_and_counted(bad: float) -> None:
    watch = guard()
    assert not ask(watch, 1.0)
    assert ask(watch, bad)
    assert ask(watch, 1.0, grad_norm=bad)
    assert int(watch.skipped) == 2
    assert int(watch.skipped_in_a_row) == 2
    assert not ask(watch, 1.0)
    assert int(watch.skipped) == 2
    assert int(watch.skipped_in_a_row) == 0
    assert int(watch.accepted) == 2
    assert watch.losses[:2].tolist() == [1.0, 1.0]
    assert watch.losses[2:].isnan().all()


def test_without_sigma_any_finite_loss_counts() -> None:
    watch = guard()
    assert not any(ask(watch, loss) for loss in (1.0, 1.0, 1.0, 1e30))


def test_a_jump_beyond_mean_and_k_deviations_is_refused() -> None:
    watch = guard(sigma=2.0, window=4)
    for loss in (1.0, 2.0, 1.0, 2.0):
        assert not ask(watch, loss)
    # Mean 1.5, deviation 0.5: the bound is 2.5.
    assert ask(watch, 2.51)
    assert not ask(watch, 2.49)


def test_jumps_need_more_than_half_a_window_of_losses() -> None:
    watch = guard(sigma=1.0, window=4)
    for loss in (1.0, 1.0):
        assert not ask(watch, loss)
    assert not ask(watch, 5.0)
    assert ask(watch, 50.0)


def test_jumps_are_not_tested_before_the_start() -> None:
    watch = guard(sigma=1.0, window=2, start=10)
    for step, loss in enumerate((1.0, 1.0, 100.0, 1.0, 1.0)):
        assert not ask(watch, loss, step=step)
    assert ask(watch, 100.0, step=10)


def test_the_window_slides_over_accepted_losses_alone() -> None:
    watch = guard(sigma=3.0, window=2)
    for loss in (1.0, 1.1, 1.05, 1.0):
        assert not ask(watch, loss)
    assert ask(watch, 9.0)
    assert sorted(watch.losses.tolist()) == pytest.approx([1.0, 1.05])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 3.0) | st.just(float("nan")), min_size=1, max_size=12))
def test_a_restored_guard_goes_on_as_if_nothing_happened(losses: list[float]) -> None:
    one, first = guard(sigma=1.5, window=3), guard(sigma=1.5, window=3)
    half = len(losses) // 2
    for step, loss in enumerate(losses[:half]):
        assert ask(one, loss, step=step) == ask(first, loss, step=step)
    second = guard(sigma=1.5, window=3)
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    for step, loss in enumerate(losses[half:], start=half):
        assert ask(one, loss, step=step) == ask(second, loss, step=step)
    for name, tensor in one.state().items():
        assert torch.equal(tensor.nan_to_num(), second.state()[name].nan_to_num())


def test_a_state_that_does_not_fit_is_named() -> None:
    state = guard(window=4).state()
    with pytest.raises(ValueError, match=r"guard.losses: expected \(5,\), found \(4,\)"):
        guard(window=5).load(state)
    del state["skipped"]
    with pytest.raises(ValueError, match=r"guard.skipped: expected \(\), found nothing"):
        guard(window=4).load(state)
