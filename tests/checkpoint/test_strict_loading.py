"""Loading is strict: all fits, or every difference is named and the module is as before."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastjepa.checkpoint import CheckpointError, load_strict


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, tensors: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, tensors[name]) for name, value in module.state_dict().items())


def test_weights_and_buffers_are_copied_into_the_module_that_the_optimizer_holds() -> None:
    module, source = Small(), Small()
    source.count += 7
    parameter = module.first.weight
    load_strict(module, source.state_dict(), "encoder")
    assert same(module, tensors_of(source))
    assert module.first.weight is parameter
    assert parameter.requires_grad


def test_each_missing_extra_misshaped_and_mistyped_key_is_named_in_one_error() -> None:
    module = Small()
    before = tensors_of(module)
    wrong = {name: torch.full_like(tensor, 9) for name, tensor in before.items()}
    del wrong["first.bias"], wrong["second.bias"]
    wrong["third.weight"] = wrong["fourth.weight"] = torch.zeros(1)
    wrong["first.weight"] = torch.zeros(4, 5)
    wrong["second.weight"] = torch.zeros(2, 4, dtype=torch.float64)
    wrong["count"] = torch.zeros(())
    with pytest.raises(CheckpointError) as caught:
        load_strict(module, wrong, "encoder in run/encoder.safetensors")
    assert str(caught.value) == (
        "encoder in run/encoder.safetensors does not fit: 2 missing: first.bias, second.bias; "
        "2 extra: third.weight, fourth.weight; "
        "1 of another shape: first.weight [4, 5] where [4, 3] is expected; "
        "2 of another type: count float32 where int64 is expected, "
        "second.weight float64 where float32 is expected"
    )
    assert same(module, before)


@given(
    st.sets(st.sampled_from(sorted(Small().state_dict())), min_size=1),
    st.sampled_from(["drop", "add", "reshape"]),
)
@settings(max_examples=40, deadline=None)
def test_any_set_of_offending_keys_is_named_in_full(names: set[str], damage: str) -> None:
    module = Small()
    before = tensors_of(module)
    tensors = copy.copy(before)
    for name in names:
        if damage == "drop":
            del tensors[name]
        elif damage == "add":
            tensors[f"{name}.more"] = torch.zeros(1)
        else:
            tensors[name] = torch.zeros(*tensors[name].shape, 1, dtype=tensors[name].dtype)
    with pytest.raises(CheckpointError) as caught:
        load_strict(module, tensors, "encoder")
    assert all(name in str(caught.value) for name in names)
    assert same(module, before)


def test_a_narrower_float_is_widened_and_a_wider_one_refused() -> None:
    module = nn.Linear(2, 2)
    narrow = {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    load_strict(module, narrow, "encoder")
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, narrow["weight"].float())
    with pytest.raises(CheckpointError, match="weight float32 where bfloat16 is expected"):
        load_strict(nn.Linear(2, 2).bfloat16(), module.state_dict(), "encoder")


def test_a_module_without_memory_is_not_loaded_in_appearance_only() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"no memory behind weight, bias \(meta device\)"):
        load_strict(module, nn.Linear(2, 2).state_dict(), "encoder")


def test_tied_weights_load_and_a_file_that_disagrees_about_them_does_not() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    module["b"].weight = module["a"].weight
    tensors = {name: torch.ones_like(tensor) for name, tensor in module.state_dict().items()}
    load_strict(module, tensors, "encoder")
    tensors["b.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"different values there: a\.weight and b\.weight"):
        load_strict(module, tensors, "encoder")
    assert torch.equal(module["a"].weight, torch.ones(2, 2))


def test_a_weight_that_is_not_contiguous_is_filled() -> None:
    module = nn.Linear(3, 2)
    module.weight = nn.Parameter(torch.zeros(3, 2).t())
    load_strict(
        module, {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}, "encoder"
    )
    assert module.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
