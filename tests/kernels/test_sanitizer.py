"""Every op under NVIDIA's compute-sanitizer: no access out of bounds, nothing read before it is
written, no race."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

TOOL = shutil.which("compute-sanitizer")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not on the path")
@pytest.mark.parametrize("check", ["memcheck", "initcheck", "racecheck"])
def test_ops_are_clean(check: str) -> None:
    assert TOOL is not None
    program = "from fastjepa.selftest import ops_equal_formulas; print(ops_equal_formulas('cuda'))"
    done = subprocess.run(
        [TOOL, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", program],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
