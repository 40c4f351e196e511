"""Rows of several mask groups in one matrix."""

import torch

from fastjepa_kernels import packed_rows
from fastjepa_kernels.packing import by_group


def test_groups_follow_one_another_and_clips_within_them() -> None:
    first, second = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[3], [0]])
    assert packed_rows([first, second], 4).tolist() == [0, 2, 5, 7, 3, 4]


def test_a_group_may_start_with_a_later_clip() -> None:
    groups = [torch.tensor([[0, 2]]), torch.tensor([[1, 2, 3]])]
    assert packed_rows(groups, 4, [2, 0]).tolist() == [8, 10, 1, 2, 3]


def test_rows_gather_each_clips_own_tokens() -> None:
    tokens = torch.randn(3, 7, 2)
    index = torch.stack([torch.randperm(7)[:4] for _ in range(3)])
    rows = packed_rows([index], 7)
    expected = tokens.take_along_dim(index[..., None], 1)
    assert torch.equal(tokens.flatten(0, 1)[rows].view(3, 4, 2), expected)


def test_rows_come_back_by_group_without_a_copy() -> None:
    groups = [torch.tensor([[0, 2], [1, 3]]), torch.tensor([[3], [0]])]
    rows = packed_rows(groups, 4)
    parts = by_group(rows, groups)
    assert [part.tolist() for part in parts] == [[[0, 2], [5, 7]], [[3], [4]]]
    assert parts[1].data_ptr() == rows[4:].data_ptr()
    assert [p.shape for p in by_group(torch.zeros(6, 5), groups)] == [(2, 2, 5), (2, 1, 5)]
