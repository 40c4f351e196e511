"""Tensor files: any tensors come out bit for bit; what is not sound is one clear error."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastjepa.checkpoint.tensor_file import CheckpointError, read_tensors, write_tensors

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.booleans(),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_tensor_comes_back_bit_for_bit(
    tmp_path: Path, shape: list[int], dtype: torch.dtype, seed: int, transposed: bool
) -> None:
    raw = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    tensor = (raw * 1.1).to(dtype)
    if transposed and tensor.ndim >= 2:
        tensor = tensor.transpose(0, 1)
    write_tensors(tmp_path / "a.safetensors", {"x": tensor}, {"note": "kept"})
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"note": "kept"}
    assert tensors["x"].dtype == dtype
    assert tensors["x"].shape == tensor.shape
    assert bits(tensors["x"]) == bits(tensor)


def test_nan_payloads_infinities_and_negative_zero_survive(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    write_tensors(tmp_path / "a.safetensors", {"odd": odd})
    assert bits(read_tensors(tmp_path / "a.safetensors")[0]["odd"]) == bits(odd)


def test_tied_weights_and_views_of_one_buffer_are_written_under_each_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    buffer = torch.arange(12.0)
    tensors = {**model.state_dict(), "head": buffer[:8], "tail": buffer[4:], "odd": buffer[::2]}
    write_tensors(tmp_path / "a.safetensors", tensors)
    back, _ = read_tensors(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_plain_tensors_are_written_without_a_second_copy_in_memory(tmp_path: Path) -> None:
    program = """
import resource, sys, torch
from pathlib import Path
from fastjepa.checkpoint.tensor_file import write_tensors
folder = Path(sys.argv[1])
write_tensors(folder / "warm.safetensors", {"x": torch.ones(1)})
tensors = {str(i): torch.ones(16 << 18) for i in range(4)}  # 4 x 16 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_tensors(folder / "a.safetensors", tensors)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    grown_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "a.safetensors").stat().st_size > 64 << 20
    assert grown_kib < 8 << 10


@pytest.mark.parametrize("tensor", [torch.zeros(2, device="meta"), torch.eye(3).to_sparse()])
def test_a_tensor_without_plain_memory_is_refused_by_name(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: blocks\.0 is .*expected a dense tensor"
    ):
        write_tensors(tmp_path / "a.safetensors", {"blocks.0": tensor})


def test_a_missing_file_a_folder_and_an_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(tmp_path)
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(
        CheckpointError, match=r"empty\.safetensors: not a whole safetensors file \(0 bytes\)"
    ):
        read_tensors(tmp_path / "empty.safetensors")


@pytest.mark.parametrize("left", [3, 8, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, left: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a whole safetensors file"):
        read_tensors(path)


@given(st.binary(max_size=200))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_bytes_are_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "random.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"random\.safetensors"):
        read_tensors(path)


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "plain"])
def test_a_pickle_posing_as_safetensors_is_refused_and_never_run(
    tmp_path: Path, writer: str
) -> None:
    path, trace = tmp_path / "a.safetensors", tmp_path / "trace"
    if writer == "torch":
        torch.save({"x": torch.ones(2), "y": Touch(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Touch(trace)}))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: refused: a pickle"):
        read_tensors(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Touch(trace)))
    assert trace.exists(), "the pickle of this test would not have done harm"
