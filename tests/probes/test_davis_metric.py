"""J and F: cases worked out by hand."""

import math

import pytest
import torch

from fastjepa.probes.davis_metric import boundary, outline, region, widened


def box(top: int, left: int, bottom: int, right: int, size: int = 100) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_region_is_intersection_over_union() -> None:
    # Two squares of 20 x 20, one moved by 10: 200 shared, 600 in all.
    assert region(box(40, 40, 60, 60), box(40, 50, 60, 70)) == pytest.approx(200 / 600)
    assert region(box(0, 0, 9, 9), box(50, 50, 60, 60)) == 0.0
    assert region(box(0, 0, 0, 0), box(0, 0, 0, 0)) == 1.0


def test_the_outline_lies_up_and_left_of_the_change() -> None:
    mask = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    expected = [
        # (0,0): below right differs; (0,1), (0,2): below differs; (0,3): nothing below right.
        [1, 1, 1, 0],
        # (1,0): right differs; (1,1): below differs; (1,2): right and below differ.
        [1, 1, 1, 0],
        # The last row compares with its right neighbour only.
        [0, 0, 0, 0],
    ]
    assert outline(mask).int().tolist() == expected


def test_an_object_that_leaves_the_picture_has_no_outline_there() -> None:
    assert not outline(torch.ones(5, 7, dtype=torch.bool)).any()
    half = box(0, 0, 5, 3, size=5)
    assert outline(half).int().tolist() == [[0, 0, 1, 0, 0]] * 5


def test_a_pixel_is_widened_to_a_disk() -> None:
    grown = widened(box(5, 5, 6, 6, size=11), 2).int()
    assert grown.sum() == 13  # x^2 + y^2 <= 4
    assert grown[5].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert grown[3].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_a_boundary_within_reach_is_right_and_one_beyond_is_not() -> None:
    # At 100 x 100 pixels the reach is ceil(0.008 * 141.4) = 2 pixels. Two upright edges over the
    # whole height, moved together.
    assert math.ceil(0.008 * math.hypot(100, 100)) == 2
    true = box(0, 40, 100, 60)
    assert boundary(true, true) == 1.0
    assert boundary(box(0, 42, 100, 62), true) == 1.0
    assert boundary(box(0, 43, 100, 63), true) == 0.0
    # One edge moved by 2, the other by 3: half of either outline is right.
    assert boundary(box(0, 42, 100, 63), true) == pytest.approx(0.5)


def test_half_of_a_boundary_gives_precision_one_and_recall_less() -> None:
    # True: upright edges at columns 20 and 70 over the whole height. Found: the one at 20 alone.
    true, found = box(0, 20, 100, 70), box(0, 20, 100, 100)
    # Outlines: 100 pixels at column 19, and for the true mask 100 more at column 69.
    assert int(outline(true).sum()) == 200
    assert int(outline(found).sum()) == 100
    assert boundary(found, true) == pytest.approx(2 * 1.0 * 0.5 / 1.5)


def test_without_a_boundary_on_one_side_f_is_0_and_on_both_1() -> None:
    none, some = box(0, 0, 0, 0), box(10, 10, 20, 20)
    assert boundary(none, none) == 1.0
    assert boundary(some, none) == 0.0
    assert boundary(none, some) == 0.0
