"""Label propagation: objects are followed by what they look like, and only from near by."""

import pytest
import torch

from fastjepa.probes.propagation import propagate


def scene(*places: tuple[int, int], grid: int = 8, noise: float = 0.05) -> list[torch.Tensor]:
    """Frames [8, 8, 16] in which one 2 x 2 thing with its own direction moves along `places`."""
    random = torch.Generator().manual_seed(0)
    frames = []
    for top, left in places:
        frame = torch.zeros(grid, grid, 16)
        frame[..., 0] = 1.0
        frame[top : top + 2, left : left + 2] = torch.eye(16)[1]
        frames.append(frame + noise * torch.randn(frame.shape, generator=random))
    return frames


def mask(top: int, left: int, grid: int = 8, patch: int = 4) -> torch.Tensor:
    first = torch.zeros(grid * patch, grid * patch, dtype=torch.int64)
    first[top * patch : (top + 2) * patch, left * patch : (left + 2) * patch] = 1
    return first


def test_a_moving_thing_keeps_its_label() -> None:
    places = [(0, 0), (1, 1), (2, 3), (4, 4), (6, 6)]
    maps = list(propagate(scene(*places), mask(0, 0), 1))
    assert len(maps) == 4
    for (top, left), chances in zip(places[1:], maps, strict=True):
        assert chances.shape == (2, 8, 8)
        torch.testing.assert_close(chances.sum(0), torch.ones(8, 8))
        expected = torch.zeros(8, 8, dtype=torch.int64)
        expected[top : top + 2, left : left + 2] = 1
        assert torch.equal(chances.argmax(0), expected)


def test_labels_come_from_within_the_radius_only() -> None:
    far = [(0, 0), (6, 6)]
    (near,) = propagate(scene(*far), mask(0, 0), 1, radius=12.0)
    assert near.argmax(0).sum() == 4
    (cut,) = propagate(scene(*far), mask(0, 0), 1, radius=3.0)
    assert not cut[1, 6:, 6:].any()


def test_the_last_frames_alone_are_remembered_beside_the_first() -> None:
    # A thing that shows no more for three frames, beyond the radius from its first place.
    places = [(0, 0), (3, 3), (6, 6)]
    hidden = torch.zeros(8, 8, 16)
    hidden[..., 0] = 1.0
    frames = [*scene(*places), hidden, hidden, hidden, scene((6, 6))[0]]
    *_, known = propagate(frames, mask(0, 0), 1, context=15, radius=4.5)
    assert known.argmax(0)[6:, 6:].sum() == 4
    *_, lost = propagate(frames, mask(0, 0), 1, context=3, radius=4.5)
    assert lost.argmax(0).sum() == 0


def test_a_case_by_hand() -> None:
    # Two patches of two channels. The second frame's first patch lies between both directions.
    first = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    second = torch.tensor([[[0.6, 0.8], [0.0, 2.0]]])
    labels = torch.tensor([[0, 1]])
    (chances,) = propagate([first, second], labels, 1, neighbours=2, temperature=0.2)
    share = torch.tensor([[0.6, 0.8], [0.0, 1.0]]).div(0.2).softmax(1)[:, 1]
    torch.testing.assert_close(chances[1, 0], share)
    (nearest,) = propagate([first, second], labels, 1, neighbours=1)
    assert nearest[1, 0].tolist() == [1.0, 1.0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 to 1, found 0 to 2"):
        list(propagate(scene((0, 0)), mask(0, 0) * 2, 1))
    with pytest.raises(ValueError, match="no frame came"):
        list(propagate([], mask(0, 0), 1))
