"""AdamW's state comes back bit for bit, and training goes on as if never interrupted."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastjepa.checkpoint import CheckpointError, pack_optimizer, unpack_optimizer
from fastjepa.checkpoint.tensor_file import read_tensors, write_tensors


class TwoDoors(nn.Module):
    """Like the tokenizers: an image leaves the video door without a gradient."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.video = nn.Linear(2, width)
        self.image = nn.Linear(2, width)
        self.head = nn.Linear(width, 1)


def train(model: TwoDoors, optimizer: torch.optim.Optimizer, doors: list[str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for door in doors:
        optimizer.zero_grad(set_to_none=True)
        clip = torch.randn(4, 2, generator=generator)
        model.head(getattr(model, door)(clip)).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module, **options: object) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.04, **options)  # type: ignore[arg-type]


OPTIONS: list[dict[str, object]] = [
    {"fused": True},
    {"foreach": True},
    {"foreach": False, "fused": False},
]


@given(
    st.sampled_from(OPTIONS),
    st.sampled_from(OPTIONS),
    st.lists(st.sampled_from(["video", "image"]), max_size=6),
    st.lists(st.sampled_from(["video", "image"]), min_size=1, max_size=4),
    st.integers(0, 1000),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_state_survives_the_disk_bit_for_bit_and_training_continues(
    tmp_path: Path,
    saved_with: dict[str, object],
    loaded_with: dict[str, object],
    before: list[str],
    after: list[str],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = TwoDoors()
    optimizer = adamw(model, **saved_with)
    train(model, optimizer, before, seed)
    packed = pack_optimizer(optimizer, model.named_parameters())
    write_tensors(tmp_path / "optimizer.safetensors", packed)
    back, _ = read_tensors(tmp_path / "optimizer.safetensors")

    resumed = TwoDoors()
    resumed.load_state_dict(model.state_dict())
    again = adamw(resumed, **loaded_with)
    train(resumed, again, ["video"], 99)  # traces of another life must go
    resumed.load_state_dict(model.state_dict())
    unpack_optimizer(again, resumed.named_parameters(), back)

    for (name, old), new in zip(model.named_parameters(), resumed.parameters(), strict=True):
        there, here = optimizer.state.get(old, {}), again.state.get(new, {})
        assert there.keys() == here.keys(), name
        assert all(torch.equal(there[key], here[key]) for key in there), name
        assert all(there[key].dtype == here[key].dtype for key in there), name
    if saved_with == loaded_with:
        train(model, optimizer, after, seed + 1)
        train(resumed, again, after, seed + 1)
        for old, new in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(old, new)


def trained() -> tuple[TwoDoors, torch.optim.AdamW, dict[str, Tensor]]:
    model = TwoDoors()
    optimizer = adamw(model)
    train(model, optimizer, ["video", "video"], 0)
    packed = pack_optimizer(optimizer, model.named_parameters())
    return model, optimizer, {name: tensor.clone() for name, tensor in packed.items()}


def test_keys_are_parameter_names_and_untouched_parameters_say_so() -> None:
    _, _, packed = trained()
    assert {name for name in packed if name.startswith("video.weight")} == {
        "video.weight.exp_avg",
        "video.weight.exp_avg_sq",
        "video.weight.step",
    }
    assert packed["video.weight.step"] == 2
    assert {name for name in packed if name.startswith("image.weight")} == {"image.weight.step"}
    assert packed["image.weight.step"] == 0


def test_each_wrong_tensor_is_named_and_the_optimizer_is_untouched() -> None:
    model, optimizer, packed = trained()
    good = dict(packed)
    del packed["video.weight.exp_avg"], packed["video.bias.step"], packed["image.bias.step"]
    packed["head.weight.exp_avg_sq"] = torch.zeros(2, 2)
    packed["head.bias.step"] = torch.zeros((), dtype=torch.int64)
    packed["tail.weight.step"] = torch.zeros(())
    with pytest.raises(CheckpointError) as caught:
        unpack_optimizer(optimizer, model.named_parameters(), packed, "optimizer of step 2")
    message = str(caught.value)
    assert message.startswith("optimizer of step 2 does not fit: ")
    for wrong in ["video.weight.exp_avg", "video.bias.step", "image.bias.step", "tail.weight.step"]:
        assert wrong in message
    assert "head.weight.exp_avg_sq [2, 2] where [1, 3] is expected" in message
    assert "head.bias.step int64" in message
    now = pack_optimizer(optimizer, model.named_parameters())
    assert all(torch.equal(now[name], good[name]) for name in good)


def test_lost_moments_of_a_trained_parameter_do_not_pass_for_an_untouched_one() -> None:
    model, optimizer, packed = trained()
    del packed["video.weight.exp_avg"], packed["video.weight.exp_avg_sq"]
    with pytest.raises(
        CheckpointError, match=r"2 missing: video\.weight\.exp_avg, video\.weight\.exp_avg_sq"
    ):
        unpack_optimizer(optimizer, model.named_parameters(), packed)


def test_unpacked_moments_are_copies_laid_out_as_their_parameter() -> None:
    parameter = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([parameter])
    parameter.square().sum().backward()
    optimizer.step()
    packed = pack_optimizer(optimizer, [("conv", parameter)])
    unpack_optimizer(
        optimizer, [("conv", parameter)], {k: v.contiguous() for k, v in packed.items()}
    )
    moment = optimizer.state[parameter]["exp_avg"]
    assert moment.stride() == parameter.stride()
    assert moment.data_ptr() != packed["conv.exp_avg"].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fused", [True, False])
def test_state_goes_back_to_the_gpu_with_its_counter_where_adamw_wants_it(
    tmp_path: Path, fused: bool
) -> None:
    parameter = nn.Parameter(torch.randn(8, device="cuda"))
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    there = dict(optimizer.state[parameter])
    write_tensors(tmp_path / "a.safetensors", pack_optimizer(optimizer, [("x", parameter)]))
    unpack_optimizer(optimizer, [("x", parameter)], read_tensors(tmp_path / "a.safetensors")[0])
    here = optimizer.state[parameter]
    for key, value in there.items():
        assert here[key].device == value.device
        assert torch.equal(here[key], value)
    optimizer.step()


def test_what_is_not_plain_adamw_is_refused() -> None:
    model = TwoDoors()
    for optimizer, found in [
        (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "momentum_buffer"),
        (torch.optim.AdamW(model.parameters(), amsgrad=True), "max_exp_avg_sq"),
    ]:
        train(model, optimizer, ["video"], 0)
        with pytest.raises(CheckpointError, match=f"video.weight: found .*{found}.*expected AdamW"):
            pack_optimizer(optimizer, model.named_parameters())


def test_a_parameter_without_a_name_is_refused() -> None:
    model = TwoDoors()
    names = [(name, p) for name, p in model.named_parameters() if name != "head.weight"]
    with pytest.raises(CheckpointError, match=r"shape \[1, 3\] in group 0 has no name"):
        pack_optimizer(adamw(model), names)
