"""I-JEPA's and V-JEPA's losses through the drop-in, against their definition."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa_kernels.integrations import jepa

BATCH, TOKENS, WIDTH = 2, 20, 12
NEAR = {"rtol": 1e-5, "atol": 1e-6}


def masks(count: int, kept: int, device: torch.device) -> list[Tensor]:
    return [
        torch.stack([torch.randperm(TOKENS)[:kept] for _ in range(BATCH)]).to(device)
        for _ in range(count)
    ]


def rows_of(h: Tensor, mask: Tensor) -> Tensor:
    return F.layer_norm(h, (h.shape[-1],)).take_along_dim(mask[..., None], 1)


@pytest.mark.parametrize("context_masks", [1, 3])
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_smooth_l1_of_image_jepa(
    context_masks: int, beta: float, backend: str, device: torch.device
) -> None:
    h = torch.randn(BATCH, TOKENS, WIDTH, device=device)
    enc, pred = masks(context_masks, 9, device), masks(4, 5, device)
    z = torch.randn(4 * context_masks * BATCH, 5, WIDTH, device=device, requires_grad=True)
    y = torch.cat([rows_of(h, mask) for mask in pred for _ in enc])
    expected = F.smooth_l1_loss(z, y, beta=beta)
    found = jepa.smooth_l1_loss(z, h, enc, pred, beta=beta, backend=backend)
    torch.testing.assert_close(found, expected, **NEAR)
    grads = [torch.autograd.grad(loss, z)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads, **NEAR)
    normalised = F.layer_norm(h, (WIDTH,))
    again = jepa.smooth_l1_loss(
        z, normalised, enc, pred, beta=beta, normalize_target=False, backend=backend
    )
    torch.testing.assert_close(again, expected, **NEAR)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_l1_of_video_jepa(exponent: float, backend: str, device: torch.device) -> None:
    h = torch.randn(BATCH, TOKENS, WIDTH, device=device)
    pred = [masks(1, kept, device)[0] for kept in (3, 8)]
    z = [torch.randn(*m.shape, WIDTH, device=device, requires_grad=True) for m in pred]
    parts = [
        ((zi - rows_of(h, m)).abs() ** exponent).mean() / exponent
        for zi, m in zip(z, pred, strict=True)
    ]
    expected = torch.stack(parts).mean()
    one = jepa.l1_loss(z, h, pred, loss_exp=exponent, backend=backend)
    nested = jepa.l1_loss([z], [h], [pred], loss_exp=exponent, backend=backend)
    torch.testing.assert_close(one, expected, **NEAR)
    torch.testing.assert_close(nested, expected, **NEAR)
    grads = [torch.autograd.grad(loss, z) for loss in (one, expected)]
    torch.testing.assert_close(*grads, **NEAR)


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_tokens_by_masks(concat: bool, count: int, device: torch.device) -> None:
    x = torch.randn(BATCH, TOKENS, WIDTH, device=device, requires_grad=True)
    chosen = masks(count, 6, device)
    expected = [x.take_along_dim(mask[..., None], 1) for mask in chosen]
    found = jepa.apply_masks(x, chosen, concat)
    if concat:
        assert isinstance(found, Tensor)
        assert torch.equal(found, torch.cat(expected))
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    upstream = torch.randn(count * BATCH, 6, WIDTH, device=device)
    grads = [
        torch.autograd.grad((torch.cat(list(kept)) * upstream).sum(), x)[0]
        for kept in (found if not concat else [found], expected)
    ]
    torch.testing.assert_close(*grads)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    h = torch.randn(BATCH, TOKENS, WIDTH, device=device)
    pred = masks(2, 5, device)
    with pytest.raises(ValueError, match=r"z: expected \[4, K, D\] for predicted masks"):
        jepa.smooth_l1_loss(torch.zeros(3, 5, WIDTH), h, pred[:1], pred)
    with pytest.raises(ValueError, match="z: expected one entry a mask"):
        jepa.l1_loss([torch.zeros(BATCH, 5, WIDTH)], h, pred)


def test_patched_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """I-JEPA's function has no `concat`; V-JEPA's has."""

    def apply_masks(x: Any, masks: Any) -> Any:
        return None

    module, user = ModuleType("ijepa_masks"), ModuleType("ijepa_train")
    for each in (module, user):
        each.apply_masks = apply_masks  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, each.__name__, each)
    x, mask = torch.randn(BATCH, TOKENS, WIDTH), torch.tensor([[1, 0], [3, 2]])
    handle = jepa.patch("ijepa_masks")
    assert user.apply_masks(x, [mask]).shape == (BATCH, 2, WIDTH)
    handle.undo()
    assert user.apply_masks is module.apply_masks is apply_masks
    module.apply_masks = lambda x: None  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"ijepa_masks\.apply_masks: expected parameters x, masks"):
        jepa.patch("ijepa_masks")
