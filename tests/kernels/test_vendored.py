"""The package copied under another name: its ops are its own, and give the same numbers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastjepa_kernels

PACKAGE = Path(fastjepa_kernels.__file__).parent

# Both packages in one process, the same inputs through both.
COMPARE = """
import json, sys
import torch
import fastjepa_kernels as ours
import {name} as theirs

def results(ops, backend):
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(24)[:7] for _ in range(2)])
    z = torch.randn(14, 32, requires_grad=True)
    targets = [torch.randn(48, 16) for _ in range(2)]
    total, terms = ops.dense_l1(z, targets, ops.packed_rows([index], 24), [14], backend=backend)
    total.backward()
    average, source = torch.zeros(5000), torch.randn(5000)
    ops.ema_update([average], [source], 0.9, backend=backend)
    distance = ops.mask_distance(index, index.flip(1)[:, :3], (2, 3, 4), backend=backend)
    table = torch.randn(6, 4, 2)
    turned = ops.rope3d(torch.randn(6, 3, 2, 8), table, backend=backend)
    return [total.detach(), terms, z.grad, average, distance, turned]

def namespaces(package):
    found = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space == package.__name__.replace(".", "_"):
            found.add(name)
    return sorted(found)

same = [
    torch.equal(a, b)
    for backend in ("reference", "triton")
    for a, b in zip(results(ours, backend), results(theirs, backend), strict=True)
]
loaded = [m.__file__ for n, m in sys.modules.items() if n.startswith("{name}") and m.__file__]
ops = [namespaces(ours), namespaces(theirs)]
json.dump({{"same": same, "ops": ops, "files": loaded}}, sys.stdout)
"""


@pytest.mark.parametrize("name", ["kept_ops", "someones.third_party.ops"])
def test_a_copy_under_another_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*name.split("."))
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)]),
    }
    script = COMPARE.format(name=name)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(found["same"])
    ours, theirs = found["ops"]
    assert ours == theirs
    assert {"ema_update", "mask_distance"} <= set(theirs)
    assert found["files"]
    assert all(Path(file).is_relative_to(folder.parent.parent) for file in found["files"])
