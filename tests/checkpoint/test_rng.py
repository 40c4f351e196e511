"""The random generators go on where they were, whichever draws came before the save."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.checkpoint import CheckpointError, pack_rng, unpack_rng
from fastjepa.checkpoint.tensor_file import read_tensors, write_tensors


def draws() -> list[object]:
    return [
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.standard_normal(3).tolist(),
    ]


@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_all_generators_go_on_where_they_were(
    tmp_path: Path, seed: int, python: int, numpy: int, pytorch: int
) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    # An odd number of normal draws leaves a second one waiting.
    [random.gauss(0, 1) for _ in range(python)]
    [np.random.standard_normal() for _ in range(numpy)]
    torch.randn(pytorch)
    write_tensors(tmp_path / "rng.safetensors", pack_rng())
    expected = draws()
    draws()
    assert unpack_rng(read_tensors(tmp_path / "rng.safetensors")[0]) == ()
    assert draws() == expected


def test_a_missing_or_misshaped_state_is_named_and_no_generator_moves() -> None:
    tensors = pack_rng()
    del tensors["numpy"]
    tensors["python"] = tensors["python"][:-1]
    before = pack_rng()
    with pytest.raises(CheckpointError, match=r"1 missing: numpy; .*python \[624\] where \[625\]"):
        unpack_rng(tensors)
    after = pack_rng()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_gpu_that_only_the_checkpoint_knows_is_reported() -> None:
    absent = f"torch.cuda.{torch.cuda.device_count()}"
    tensors = pack_rng() | {absent: torch.zeros(16, dtype=torch.uint8)}
    assert unpack_rng(tensors) == (absent,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_generator_goes_on_where_it_was() -> None:
    packed = pack_rng()
    expected = torch.rand(4, device="cuda").tolist()
    assert unpack_rng(packed) == ()
    assert torch.rand(4, device="cuda").tolist() == expected
