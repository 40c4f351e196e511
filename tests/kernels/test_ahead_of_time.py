"""Every kernel compiles for the GPUs it is meant for, without one, and keeps to its registers."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastjepa_kernels
from fastjepa_kernels import ahead_of_time

PACKAGE = Path(fastjepa_kernels.__file__).parent
# Every signature for Hopper, one of each kernel for older GPUs: compiling takes a minute.
WORDS = {"80": ["--once"], "90": []}


@pytest.fixture(scope="module", params=WORDS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the command prints, compiled anew in a process that knows no interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [
        sys.executable, "-m", "fastjepa_kernels.ahead_of_time", "--capability", request.param,
        *WORDS[request.param],
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert compiled
    for row in compiled:
        assert row["spilled_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= 163 * 1024, row


@pytest.mark.parametrize("op", [path.parent.name for path in PACKAGE.glob("*/kernel.py")])
def test_every_kernel_that_is_launched_is_compiled(op: str) -> None:
    source = (PACKAGE / op / "kernel.py").read_text()
    launched = {
        node.func.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }
    named = {case.kernel.fn.__name__ for name, case in ahead_of_time.cases() if name == op}
    assert launched
    assert launched == named
