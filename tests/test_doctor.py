"""`fastjepa doctor`: true findings, no crash on a broken machine, self-tests that can fail."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastjepa_kernels
from fastjepa import selftest
from fastjepa.doctor import Finding, as_table, as_text, examine, healthy
from fastjepa_kernels.packed_attention import avx512


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return examine()


def named(findings: list[Finding], name: str) -> Finding:
    (found,) = (finding for finding in findings if finding.name == name)
    return found


def test_a_machine_that_passes_these_tests_is_healthy(findings: list[Finding]) -> None:
    assert [f for f in findings if f.state == "problem"] == []
    assert healthy(findings)
    assert named(findings, "torch").detail.startswith(torch.__version__)
    assert "decodes h264" in named(findings, "video codecs").detail


def test_every_backend_is_given_with_its_reason(findings: list[Finding]) -> None:
    backends = {f.name: f.detail for f in findings if f.group == "backends"}
    ops = {name.removeprefix("op ") for name in backends if name.startswith("op ")}
    assert ops == set(fastjepa_kernels.__all__) & ops
    assert ops >= {"dense_l1", "linear_dense_l1", "mask_distance", "rope3d", "ema_update"}
    assert backends.keys() - {f"op {op}" for op in ops} == {
        "device", "attention", "matrix products", "passes between them", "decoder",
        "compiled blocks", "engine",
    }  # fmt: skip
    kernel = "Triton" if torch.cuda.is_available() else "PyTorch twin"
    assert kernel in backends["op linear_dense_l1"]
    assert "PyTorch twin" in backends["op mask_distance"]
    assert all("because" in detail for detail in backends.values())
    able = avx512.refusal(torch.device("cpu"), torch.float32, 64) is None
    if not torch.cuda.is_available():
        assert ("avx512" if able else "PyTorch's flash kernel") in backends["attention"]
        assert ("avx512" if able else "PyTorch's operations") in backends["passes between them"]


def test_every_self_test_was_run(findings: list[Finding]) -> None:
    done = {f.name for f in findings if f.group == "self-tests"}
    assert done >= selftest.SELF_TESTS.keys()
    assert ("DALI decoding" in done) == (named(findings, "DALI").state == "ok")


def test_text_and_table_show_every_finding(findings: list[Finding]) -> None:
    lines = as_text(findings).splitlines()
    groups = {f.group for f in findings}
    assert len(lines) == len(findings) + len(groups)
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(as_table([*findings, Finding("odd", "problem", "[bold]", "stack")]))
    shown = console.export_text()
    assert all(f.detail in shown for f in findings)
    assert "[bold]" in shown


def test_a_problem_is_not_healthy_and_an_absent_package_is(findings: list[Finding]) -> None:
    problem = Finding("masks", "problem", "they differ", "self-tests")
    absent = Finding("wandb", "absent", "not installed", "stack")
    assert not healthy([*findings, problem])
    assert healthy([*findings, absent])


def _in_process(prelude: str, path: Path | None = None) -> list[list[str]]:
    """Rows (name, state, detail) of an examination in a fresh process after `prelude`."""
    script = (
        f"{prelude}\nfrom fastjepa.doctor import examine, healthy\nfindings = examine()\n"
        "for f in findings: print(f.name, f.state, f.detail, sep='\\t')\n"
        "raise SystemExit(0 if healthy(findings) else 1)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join((str(path), environment.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows, done.stderr
    assert (done.returncode == 1) == any(state == "problem" for _, state, _ in rows)
    return rows


def test_broken_packages_are_reported_and_hurt_nothing(tmp_path: Path) -> None:
    """One raises on import, one takes its whole process down."""
    for module, code in (
        ("wandb", "raise ImportError('libodd.so: cannot open')"),
        ("deepspeed", "import os; os.abort()"),
        ("xformers", "VALUE = 1"),
    ):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(code)
    rows = {name: (state, detail) for name, state, detail in _in_process("", tmp_path)}
    assert rows["wandb"][0] == "problem"
    assert "libodd.so: cannot open" in rows["wandb"][1]
    assert rows["deepspeed"][0] == "problem"
    assert "cannot be imported" in rows["deepspeed"][1]
    assert rows["xformers"][0] == "ok"
    assert rows["training step"][0] == "ok"


def test_a_missing_decoder_is_a_problem_and_no_crash() -> None:
    rows = {name: state for name, state, _ in _in_process("import sys; sys.modules['av'] = None")}
    assert rows["video codecs"] == rows["video decoding"] == "problem"
    assert rows["training step"] == "ok"


def test_missing_weights_format_is_a_problem_and_no_crash() -> None:
    prelude = "import sys; sys.modules['safetensors'] = None"
    rows = {name: state for name, state, _ in _in_process(prelude)}
    assert rows["self-tests"] == "problem"


def _still(*_: object, **__: object) -> None:
    """An engine's step that changes nothing."""


def _backwards(decode: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: decode(*args, **kwargs)[::-1].copy()


def _flipped(load: Callable[..., Any]) -> Callable[..., Any]:
    def altered(path: Path) -> Any:
        checkpoint = load(path)
        name, tensor = next(iter(checkpoint.tensors["encoder"].items()))
        checkpoint.tensors["encoder"] = {**checkpoint.tensors["encoder"], name: tensor + 1.0}
        return checkpoint

    return altered


def _sabotage(name: str, patch: pytest.MonkeyPatch) -> None:
    from fastjepa.checkpoint import load_checkpoint
    from fastjepa.data import media
    from fastjepa.model import block
    from fastjepa.model.block_cpu import mlp_half
    from fastjepa.train.engine import TorchEngine
    from fastjepa_kernels import mask_distance

    if name == "training step":
        patch.setattr(TorchEngine, "step", _still)
    elif name == "CPU block":
        patch.setattr(block, "mlp_half", lambda *args, **more: mlp_half(*args, **more) * 1.01)
    elif name == "ops":
        patch.setattr(selftest, "mask_distance", lambda *args: 1.01 * mask_distance(*args))
    elif name == "video decoding":
        patch.setattr(media, "decode_clip", _backwards(media.decode_clip))
    elif name == "checkpoint":
        patch.setattr(selftest, "load_checkpoint", _flipped(load_checkpoint))
    elif name == "masks":
        makers = iter([replace(selftest._masks(), seed=seed) for seed in (0, 1)])
        patch.setattr(selftest, "_masks", lambda: next(makers))


@pytest.mark.parametrize("name", selftest.SELF_TESTS)
def test_each_self_test_notices_what_it_is_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test = selftest.SELF_TESTS[name]
    assert selftest.failure(test)[0] is False
    _sabotage(name, monkeypatch)
    failed, why = selftest.failure(test)
    assert failed
    assert why
    assert "Error: " not in why


def test_a_self_test_does_not_pass_over_what_is_no_number() -> None:
    sound, spoilt = torch.ones(2), torch.full((2,), torch.nan)
    with pytest.raises(AssertionError, match="relative error nan"):
        selftest._same([sound, spoilt], [sound, sound])


def test_self_tests_leave_the_random_generators_alone() -> None:
    before = torch.get_rng_state()
    for test in selftest.SELF_TESTS.values():
        test()
    assert torch.equal(torch.get_rng_state(), before)
