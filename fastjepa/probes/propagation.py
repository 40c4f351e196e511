"""Label propagation: the masks of a video's first frame carried on by features alone, nothing
trained.

Each patch takes the labels of the patches most like it among the first and the last frames, near
its place. Defaults are the field's: 15 frames, a circle of 12 patches, 5 neighbours, temperature
0.2.

Shapes: N patches of a frame, D channels, O objects with the background first, H' and W' grid.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize, one_hot


def propagate(
    frames_HWD: Iterable[Tensor],
    first_HW: Tensor,
    num_objects: int,
    *,
    context: int = 15,
    radius: float = 12.0,
    neighbours: int = 5,
    temperature: float = 0.2,
) -> Iterator[Tensor]:
    """Chances [O, H', W'] of each object on every frame after the first.

    frames_HWD: features float [H', W', D] of all frames in order, of one shape. first_HW: the first
    frame's mask in pixels, integers from 0 (background) to `num_objects`; its share of each patch
    is the patch's label. Raises ValueError, before any frame is asked for, for a mask with other
    numbers, a radius below 0 and a temperature that is not above 0; and for a first frame missing.
    """
    if not radius >= 0.0:
        raise ValueError(f"radius: {radius:g}, expected 0 or more")
    if not temperature > 0.0:
        raise ValueError(f"temperature: {temperature:g}, expected a number above 0")
    if int(first_HW.min()) < 0 or int(first_HW.max()) > num_objects:
        raise ValueError(
            f"mask: expected 0 to {num_objects}, found {int(first_HW.min())} to "
            f"{int(first_HW.max())}"
        )
    stream = iter(frames_HWD)
    first = next(stream, None)
    if first is None:
        raise ValueError("propagate: no frame came")
    grid = first.shape[0], first.shape[1]
    pixels_OHW = one_hot(first_HW.long(), num_objects + 1).permute(2, 0, 1).float()
    labels_NO = adaptive_avg_pool2d(pixels_OHW, grid).flatten(1).T.to(first.device)
    far_NN = _apart(grid, first.device) > radius
    start = (_directions(first), labels_NO)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=context)
    for frame_HWD in stream:
        x_ND = _directions(frame_HWD)
        labels_NO = _carried(x_ND, [start, *recent], far_NN, neighbours, temperature)
        recent.append((x_ND, labels_NO))
        yield labels_NO.T.unflatten(1, grid)


def _directions(x_HWD: Tensor) -> Tensor:
    return normalize(x_HWD.flatten(0, 1).float(), dim=1)


def _apart(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Distance of every two patches in patches, float [N, N]."""
    rows, columns = torch.arange(grid[0]), torch.arange(grid[1])
    places_N2 = torch.cartesian_prod(rows, columns).float().to(device).view(-1, 2)
    return torch.cdist(places_N2, places_N2)


def _carried(
    x_ND: Tensor,
    known: Iterable[tuple[Tensor, Tensor]],
    far_NN: Tensor,
    neighbours: int,
    temperature: float,
) -> Tensor:
    """Labels [N, O] from the frames known: each frame's best patches first, then the best of
    these."""
    likeness, labels = [], []
    for other_ND, labels_NO in known:
        alike_NN = (x_ND @ other_ND.T).masked_fill(far_NN, -torch.inf)
        best_NK, index_NK = alike_NN.topk(min(neighbours, len(other_ND)), dim=1)
        likeness.append(best_NK)
        labels.append(labels_NO[index_NK])
    alike = torch.cat(likeness, 1)
    best_NK, index_NK = alike.topk(min(neighbours, alike.shape[1]), dim=1)
    chosen_NKO = torch.cat(labels, 1).gather(
        1, index_NK[:, :, None].expand(-1, -1, labels[0].shape[-1])
    )
    weight_NK = (best_NK / temperature).softmax(1)
    return torch.einsum("nk,nko->no", weight_NK, chosen_NKO)
