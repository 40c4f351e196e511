"""Tensors in pieces: cut anywhere, by any number of ranks, any stretch is read back bit for bit."""

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastjepa.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from fastjepa.checkpoint.layout import begin, publish, state_text
from fastjepa.checkpoint.manifest import write_shares
from fastjepa.checkpoint.pieces import Piece, Shares, stretch, whole
from fastjepa.checkpoint.tensor_file import described

SHAPE = (4, 3, 5)
WEIGHT = torch.arange(60.0).view(SHAPE)


def write(run: Path, shares: list[Shares], step: int = 1) -> Path:
    """A checkpoint of so many ranks' shares."""
    temporary = begin(run, step, 0)
    written = [
        write_shares(temporary, share, rank, len(shares)) for rank, share in enumerate(shares)
    ]
    return publish(temporary, written, state_text(step, {}), keep=3)


def cut(places: list[int]) -> list[Shares]:
    """The weight cut at these places, a piece for each rank."""
    ends = [0, *sorted(places), WEIGHT.numel()]
    return [
        {"encoder": {"w": Piece(WEIGHT.view(-1)[start:stop], SHAPE, start)} if stop > start else {}}
        for start, stop in pairwise(ends)
    ]


@given(
    st.lists(st.integers(0, 60), max_size=5), st.integers(0, 60), st.integers(0, 60), st.booleans()
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_stretch_of_any_cut_is_read_back(
    tmp_path: Path, places: list[int], a: int, b: int, whole_too: bool
) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shares = cut(places)
    if whole_too:
        shares[-1] = {**shares[-1], "guard": whole({"seen": torch.tensor(7)})}
    tensors = load_checkpoint(write(tmp_path / "run", shares)).tensors
    found = tensors["encoder"]
    assert torch.equal(found["w"], WEIGHT)
    start, stop = min(a, b), max(a, b)
    assert torch.equal(stretch(found, "w", start, stop - start), WEIGHT.view(-1)[start:stop])
    assert {name: tensor.shape for name, tensor in described(found).items()} == {"w": SHAPE}
    assert tensors.keys() == ({"encoder", "guard"} if whole_too else {"encoder"})


def test_a_share_is_a_plain_safetensors_file_of_its_rank(tmp_path: Path) -> None:
    path = write(tmp_path, cut([20, 50]))
    names = [f"encoder-0000{rank}-of-00003.safetensors" for rank in (1, 2, 3)]
    assert sorted(file.name for file in path.iterdir()) == [*names, "manifest.json", "state.json"]
    assert torch.equal(load_file(path / names[1])["w"], WEIGHT.view(-1)[20:50])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert manifest["tensors"]["encoder"]["w"] == {
        "dtype": "float32",
        "shape": [4, 3, 5],
        "pieces": [[names[0], 0, 20], [names[1], 20, 30], [names[2], 50, 10]],
    }


@pytest.mark.parametrize("damage", ["truncated", "damaged", "missing"])
def test_the_share_that_is_not_sound_is_named_with_both_sums(tmp_path: Path, damage: str) -> None:
    good = write(tmp_path, cut([20, 40]), step=1)
    path = write(tmp_path, cut([20, 40]), step=2)
    share = path / "encoder-00002-of-00003.safetensors"
    content = share.read_bytes()
    expected = hashlib.sha256(content).hexdigest()
    if damage == "missing":
        share.unlink()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 2])
        share.write_bytes(content[:-1] if damage == "truncated" else flipped)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    said = str(caught.value)
    assert f"{share}: {damage}" in said
    assert f"the previous complete checkpoint is {good}" in said
    if damage == "damaged":
        assert f"{hashlib.sha256(flipped).hexdigest()} where the manifest says {expected}" in said
    # Each rank compares some of the files; together they find it.
    found = []
    for rank in range(2):
        try:
            load_checkpoint(path, turn=(rank, 2))
        except CheckpointError as error:
            found.append(str(error))
    assert found == [said]


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system counts no bytes read")
def test_a_rank_reads_its_stretch_and_no_more(tmp_path: Path) -> None:
    """4 of 32 MiB, across two files."""
    data = torch.zeros(8 << 20)
    ends = [0, 7 << 19, 8 << 20]
    shares: list[Shares] = [
        {"encoder": {"w": Piece(data[start:stop], (8 << 20,), start)}}
        for start, stop in pairwise(ends)
    ]
    tensors = load_checkpoint(write(tmp_path, shares)).tensors["encoder"]
    before = bytes_read()
    stretch(tensors, "w", 3 << 20, 1 << 20)
    assert 4 << 20 <= bytes_read() - before < (4 << 20) + (1 << 17)


def as_format_1(path: Path) -> None:
    """Write the manifest as it was before there were pieces."""
    files = {
        file.name: {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(path.iterdir())
        if file.name != "manifest.json"
    }
    seal = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"files": files, "sha256": seal}, indent=1))


def test_a_checkpoint_from_before_there_were_pieces_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, [{"encoder": whole({"w": WEIGHT}), "rng": {}}])
    save_file({"w": WEIGHT + 1.0}, path / "encoder.safetensors")
    as_format_1(path)
    assert latest_checkpoint(tmp_path) == path
    tensors = load_checkpoint(path).tensors
    assert tensors.keys() == {"encoder", "rng"}
    assert torch.equal(tensors["encoder"]["w"], WEIGHT + 1.0)
    assert torch.equal(stretch(tensors["encoder"], "w", 30, 4), torch.arange(31.0, 35.0))
    assert not tensors["rng"]


def test_a_checkpoint_of_a_later_version_is_refused_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, [{"encoder": whole({"w": WEIGHT})}])
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["format"] = 3
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": seal}))
    with pytest.raises(CheckpointError, match="format 3, of a later fastjepa; this one reads up"):
        load_checkpoint(path)
