"""ZeRO against one process, by real ranks over gloo: losses, weights, the EMA's shards, vetoes.

The ranks of a size start once and work through the cases of worker.py; each test reads what they
found.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastjepa.observe.states import LAYOUTS
from fastjepa.planning.communication import step_traffic

from ..processes import run_ranks

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

STAGES = (0, 1, 2, 3)
# Clips, masks and weights are the same: what is left is the order in which sums are taken.
FULL, HALF = 1e-5, 1e-3
OTHER_WAYS = (
    "offload/1", "offload/2", "offload/3", "checkpointing/3", "packed/0", "packed/1", "packed/2",
    "packed/3", "gpu/2", "gpu/3",
)  # fmt: skip

Findings = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"{size} ranks")
def findings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Findings]:
    """The number of ranks, and what they found."""
    out = tmp_path_factory.mktemp("ranks") / "findings.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launch, str(request.param), str(Path(__file__).with_name("worker.py")), str(out)]
    run_ranks(command)
    return request.param, json.loads(out.read_text())


def cases(found: tuple[int, Findings], kind: str) -> Findings:
    """Those of one kind."""
    return {name: case for name, case in found[1].items() if name.split("/")[0] == kind}


def test_float32_equals_one_process(findings: tuple[int, Findings]) -> None:
    found = cases(findings, "full")
    assert len(found) == (3 if findings[0] == 4 else 4)
    for name, case in found.items():
        assert case["loss_error"] <= FULL, name
        assert case["norm_error"] <= FULL, name
        assert case["weight_error"] <= FULL, name


def test_the_ema_in_shards_is_the_whole_ema_bit_for_bit(findings: tuple[int, Findings]) -> None:
    found = cases(findings, "ema")
    assert {"ema/1", "ema/2", "ema/3"} <= found.keys()
    for name, case in found.items():
        assert case["equal"], name
        assert case["published"] == [True] * findings[0], f"{name}: the target's working weights"


def test_an_infinity_on_one_rank_skips_the_step_on_all(findings: tuple[int, Findings]) -> None:
    for name, case in cases(findings, "full").items():
        assert case["vetoes"] == [[0.0, 0.0, 1.0, 0.0]] * findings[0], name
        assert case["steps_counted"], name


@pytest.mark.parametrize("findings", [1], indirect=True)
def test_another_adamw_goes_on_from_its_state(findings: tuple[int, Findings]) -> None:
    found = cases(findings, "adamw")
    assert len(found) == 2 * 3
    for name, case in found.items():
        own = name.split("/")[1]
        for other in (own, "torch"):
            assert case[f"then {other}"] == pytest.approx(case["straight"], rel=FULL), name
            assert case[f"steps {other}"] == [4.0], name
        assert case["torch"] == pytest.approx(case["straight"], rel=FULL), name


@pytest.mark.parametrize("findings", [2], indirect=True)
class TestTwoRanks:
    """What two ranks show for all."""

    def test_bfloat16_follows_one_process(self, findings: tuple[int, Findings]) -> None:
        found = cases(findings, "half")
        assert len(found) == len(STAGES)
        for name, case in found.items():
            assert case["loss_error"] <= HALF, name
            # A weight moves by its learning rate of 1e-3 a step, whichever way its sign points.
            assert case["weight_error"] <= 2 * 3 * 1e-3, name

    @pytest.mark.parametrize("way", OTHER_WAYS)
    def test_offload_checkpointing_packing_and_a_gpus_blocks_change_no_number(
        self, findings: tuple[int, Findings], way: str
    ) -> None:
        case = findings[1][way]
        assert case["loss_error"] <= FULL
        assert case["norm_error"] <= FULL
        assert case["weight_error"] <= FULL

    @pytest.mark.parametrize("way", ["resumed/1", "resumed/3"])
    def test_a_state_goes_on_at_another_stage(
        self, findings: tuple[int, Findings], way: str
    ) -> None:
        case = findings[1][way]
        assert case["cut"] == pytest.approx(case["straight"], rel=FULL)
        assert case["cut"] != pytest.approx(case["first"], rel=FULL)

    def test_a_jump_of_the_mean_loss_is_everyones(self, findings: tuple[int, Findings]) -> None:
        case = findings[1]["jumps"]
        assert case["vetoes"] == [[1.0], [1.0]]
        assert case["unchanged"]


def test_a_step_sends_what_is_planned(findings: tuple[int, Findings]) -> None:
    """At stage 3 vectors stay whole on every rank: in so small a model, a twentieth of all."""
    found = cases(findings, "sent")
    assert len(found) == (4 if findings[0] == 2 else 0)
    for name, case in found.items():
        stage = int(name[-1])
        for passes in (1, 2):
            planned = step_traffic(
                *case["parameters"], layout=LAYOUTS[1 + stage], ranks=2, passes=passes
            )
            gathered = planned.weights + planned.target
            assert case[f"gradients/{passes}"] == pytest.approx(planned.gradients, rel=0.02), name
            if stage < 3:
                assert case[f"weights/{passes}"] == pytest.approx(gathered, rel=0.02), name
            else:
                assert 0.9 * gathered < case[f"weights/{passes}"] <= gathered, name
