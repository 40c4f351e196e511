"""Runs, healthy and not, told apart in words."""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.objective.diagnosis import HealthWatch, Thresholds, diagnose

Run = list[dict[str, float]]


def healthy(count: int = 100, **more: float) -> Run:
    """Loss falls, then rises while features spread; gradients settle; the target keeps moving."""
    run = []
    for i in range(count):
        t = i / 100
        wobble = 1.0 + 0.05 * math.sin(7.0 * i)
        run.append(
            {
                "step": 10 * (i + 1),
                "loss": wobble * (0.8 - 0.5 * t + 0.45 * t * t),
                "loss_predict": wobble * (0.7 - 0.5 * t + 0.45 * t * t),
                "feature_std/level5": wobble * (0.3 + 0.4 * t),
                "feature_std/level11": wobble * (0.3 + 0.5 * t),
                "effective_rank/level11": wobble * (20 + 100 * t),
                "target_std/level11": wobble * (0.4 + 0.3 * t),
                "grad_norm": wobble * (2.0 - t),
                "grad_norm/encoder_blocks": wobble * (1.0 - 0.5 * t),
                "grad_norm/predictor_heads": wobble * 0.5,
                "target_drift": 1e-3,
                "lr": 1e-4,
                "ema_momentum": 0.99925,
                "image_share": 0.5,
                **more,
            }
        )
    return run


def ending(run: Run, count: int, **factors: float) -> Run:
    """The same run with its last `count` logged steps multiplied key by key."""
    for row in run[-count:]:
        for key, factor in factors.items():
            for name in row:
                if name == key or name.startswith(f"{key}/"):
                    row[name] *= factor
    return run


def test_a_healthy_run_is_left_in_peace_at_every_length() -> None:
    run = healthy()
    assert all(diagnose(run[:length]) == [] for length in range(len(run) + 1))


def test_a_loss_that_falls_fast_while_the_rank_grows_is_progress() -> None:
    assert diagnose(ending(healthy(), 10, loss=0.3, loss_predict=0.3)) == []


def test_a_full_collapse() -> None:
    run = ending(
        healthy(),
        10,
        feature_std=0.02,
        target_std=0.01,
        effective_rank=0.01,
        loss=0.05,
        loss_predict=0.05,
    )
    words = diagnose(run)
    assert any(w.startswith("feature std of level 11 fell to 5% of its start") for w in words)
    assert any(w.startswith("feature std of level 5 fell") for w in words)
    assert any("effective rank of level 11 is 1." in w for w in words)
    assert any("every token has the same target" in w for w in words)
    assert any("partial collapse" in w for w in words)


def test_a_partial_collapse_is_a_sudden_drop_of_loss_and_rank() -> None:
    words = diagnose(ending(healthy(), 8, loss=0.5, loss_predict=0.5, effective_rank=0.5))
    assert len(words) == 1
    assert words[0].startswith("the loss dropped to")
    assert "rank of level 11 fell: a partial collapse" in words[0]


def test_a_rank_that_fades_slowly_is_seen_too() -> None:
    run = healthy()
    for i, row in enumerate(run):
        row["effective_rank/level11"] = 100.0 * math.exp(-i / 40)
    words = diagnose(run)
    assert len(words) == 1
    assert "fell to 9 from 95" in words[0]


def test_the_first_things_learned_may_lower_loss_and_rank_together() -> None:
    run = healthy(50)
    for i, row in enumerate(run):
        for key in ("loss", "loss_predict", "effective_rank/level11"):
            row[key] *= 0.2 + 0.8 * math.exp(-i / 6)
    assert all(diagnose(run[:length]) == [] for length in range(len(run) + 1))


def test_exploding_gradients_name_the_part_that_grew_most() -> None:
    run = ending(healthy(), 8, grad_norm=30.0)
    run = ending(run, 8, **{"grad_norm/predictor_heads": 2.0})
    words = diagnose(run)
    assert len(words) == 1
    assert words[0].startswith("gradients grew 2")
    assert "most in predictor heads" in words[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_said_at_once(value: float) -> None:
    run = healthy(2)
    run[-1]["loss"] = value
    assert diagnose(run)[0].startswith("loss at step 20 is not a finite number")
    assert len(diagnose([*healthy()[:-1], healthy()[-1] | {"grad_norm": value}])) == 1


def test_a_dead_target() -> None:
    words = diagnose(healthy(target_drift=0.0))
    assert len(words) == 1
    assert words[0].startswith("the target has not moved for 5 logged steps")


def test_a_target_that_is_meant_to_stand_still_is_not_dead() -> None:
    assert diagnose(healthy(target_drift=0.0, ema_momentum=1.0)) == []
    assert diagnose(healthy(target_drift=0.0, lr=0.0)) == []


def test_images_and_videos_in_turn_are_not_compared_with_each_other() -> None:
    run = healthy()
    for row in run[::2]:
        row["loss/image"] = row["loss"]
        for key in ("loss", "loss_predict", "effective_rank/level11", "feature_std/level11"):
            row[key] *= 0.04 if key.startswith("feature") else 0.15
    for row in run[1::2]:
        row["loss/video"] = row["loss"]
    assert all(diagnose(run[:length]) == [] for length in range(len(run) + 1))
    blind = [{k: v for k, v in row.items() if not k.startswith("loss/")} for row in run]
    assert any(diagnose(blind[:length]) for length in range(len(run) + 1))


def test_what_was_not_logged_is_not_judged() -> None:
    run = ending(healthy(), 10, feature_std=0.0, effective_rank=0.0, grad_norm=1e6)
    bare = [{"step": row["step"], "loss": row["loss"]} for row in run]
    assert diagnose(bare) == []
    assert diagnose([]) == []


def test_thresholds_move_the_line() -> None:
    run = ending(healthy(), 10, feature_std=0.3)
    assert diagnose(run) == []
    assert len(diagnose(run, Thresholds(std_share=0.9))) == 2


def test_thresholds_need_something_to_compare_with() -> None:
    with pytest.raises(ValueError, match="recent < window"):
        Thresholds(recent=30)


def test_the_page_states_the_thresholds_as_they_are() -> None:
    page = Path(__file__).parents[2] / "docs" / "reading-the-curves.md"
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d.e-]+) \|", page.read_text(), re.MULTILINE))
    assert table == {f.name: str(f.default) for f in fields(Thresholds)}


def test_a_watch_speaks_once_and_again_after_a_recovery() -> None:
    run = ending(healthy(), 60, grad_norm=1.0)
    for row in [*run[40:48], *run[80:88]]:
        row["grad_norm"] *= 40.0
    watch = HealthWatch()
    said = [words for row in run for words in watch.update(row)]
    assert len(said) == 2
    assert all(words.startswith("gradients grew") for words in said)


@given(st.integers(0, 100))
def test_a_watch_agrees_with_diagnose(length: int) -> None:
    run = ending(healthy(), 12, feature_std=0.02)
    watch = HealthWatch()
    said = [words for row in run[:length] for words in watch.update(row)]
    standing = diagnose(run[:length])
    assert len(said) == len(standing)
