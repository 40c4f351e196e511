"""The dense loss without its copies, in plain PyTorch: a few rows at a time, so that every pass
but the first finds them in the cache, and the gradient is written while the difference is at hand.

Normalising a target row and subtracting it are one pass: `z - (y - mean) rstd`.

Shapes: R all rows, r some of them, E = L D channels, L levels, D width, G mask groups, M target
rows.
"""

import torch
from torch import Tensor

from .comparison import Comparison

# Numbers handled at once: few enough for a core's cache, many enough to hide what a call costs.
BLOCK_NUMBERS = 2**18


def compare(
    comparison: Comparison,
    z_rE: Tensor,
    first: int,
    sums_RL: Tensor,
    dz_rE: Tensor | None,
    scale: float,
) -> None:
    """Compare rows `first`, `first + 1`, ... of all: their losses, summed over a level's channels
    but not yet weighed, go into `sums_RL`, and `scale` times the total's gradient into `dz_rE`,
    which may be `z_rE` itself."""
    levels = len(comparison.targets_MD)
    slope_r = slopes(comparison, first, len(z_rE), sums_RL).mul_(scale)
    beta_L = sums_RL.new_tensor(comparison.level_weights)
    step = max(1, BLOCK_NUMBERS // z_rE.shape[1])
    shape = (min(step, len(z_rE)), levels, comparison.width)
    y_rLD, spare_rLD = (sums_RL.new_empty(shape) for _ in range(2))
    for low in range(0, len(z_rE), step):
        block_rE = z_rE[low : low + step]
        rows = slice(first + low, first + low + len(block_rE))
        _compare_block(
            comparison, block_rE, comparison.row_R[rows], y_rLD[: len(block_rE)],
            spare_rLD[: len(block_rE)], sums_RL[rows],
            None if dz_rE is None else dz_rE[low : low + step],
            torch.outer(slope_r[low : low + step], beta_L)[..., None],
        )  # fmt: skip


def slopes(comparison: Comparison, first: int, rows: int, like: Tensor) -> Tensor:
    """What the gradient of rows `first`, ... of all is weighed by, level weights apart: [r]."""
    slope_r = like.new_empty(rows)
    start = 0
    for group, (size, slope) in enumerate(
        zip(comparison.group_sizes, comparison.group_slopes(), strict=True)
    ):
        own_r = slope_r[max(start - first, 0) : max(start + size - first, 0)]
        own_r.fill_(slope)
        if comparison.group_factor_G is not None:
            own_r *= comparison.group_factor_G[group]
        start += size
    if comparison.token_weight_R is not None:
        slope_r *= comparison.token_weight_R[first : first + rows]
    return slope_r


def _compare_block(
    comparison: Comparison,
    z_rE: Tensor,
    index_r: Tensor,
    y_rLD: Tensor,
    spare_rLD: Tensor,
    sums_rL: Tensor,
    dz_rE: Tensor | None,
    slope_rL1: Tensor,
) -> None:
    levels, width = len(comparison.targets_MD), comparison.width
    for level, target_MD in enumerate(comparison.targets_MD):
        if target_MD.dtype == y_rLD.dtype:
            torch.index_select(target_MD, 0, index_r, out=y_rLD[:, level])
        else:
            y_rLD[:, level] = target_MD.index_select(0, index_r)
    z_rLD = z_rE.to(y_rLD.dtype).unflatten(-1, (levels, width))
    if comparison.normalize_prediction:
        raw_rLD = z_rLD.contiguous()
        z_rLD, mean, rstd = torch.native_layer_norm(raw_rLD, [width], None, None, comparison.eps)
    if comparison.normalize_target:
        y_rLD -= y_rLD.mean(-1, keepdim=True)
        variance_rL1 = torch.linalg.vector_norm(y_rLD, dim=-1, keepdim=True).square_().div_(width)
        torch.addcmul(z_rLD, y_rLD, variance_rL1.add_(comparison.eps).rsqrt_().neg_(), out=y_rLD)
    else:
        torch.sub(z_rLD, y_rLD, out=y_rLD)
    if dz_rE is None:
        _loss_and_slope(comparison, y_rLD, spare_rLD, sums_rL, grad=False)
        return
    straight = dz_rE.dtype == y_rLD.dtype and not comparison.normalize_prediction
    dz_rLD = dz_rE.unflatten(-1, (levels, width))
    out_rLD = dz_rLD if straight else spare_rLD
    _loss_and_slope(comparison, y_rLD, out_rLD, sums_rL, grad=True)
    out_rLD *= slope_rL1
    if comparison.normalize_prediction:
        out_rLD = torch.ops.aten.native_layer_norm_backward(
            out_rLD, raw_rLD, [width], mean, rstd, None, None, [True, False, False]
        )[0]
    if not straight:
        dz_rLD.copy_(out_rLD)


def _loss_and_slope(
    comparison: Comparison, diff_rLD: Tensor, slope_rLD: Tensor, sums_rL: Tensor, *, grad: bool
) -> None:
    """Sums of f(diff) over the channels, and if asked f'(diff); `diff_rLD` is used up.

    Without `grad`, `slope_rLD` is scratch.
    """
    exponent, smooth = comparison.exponent, comparison.smooth
    if smooth:
        # With c = diff cut to -smooth..smooth the loss is c (diff - c / 2) / smooth on both sides.
        torch.clamp(diff_rLD, -smooth, smooth, out=slope_rLD)
        diff_rLD.sub_(slope_rLD, alpha=0.5).mul_(slope_rLD)
        torch.sum(diff_rLD, -1, out=sums_rL)
        sums_rL /= smooth
        slope_rLD /= smooth
        return
    if grad:
        torch.sign(diff_rLD, out=slope_rLD)
    size_rLD = diff_rLD.abs_()
    if exponent == 1.0:
        torch.sum(size_rLD, -1, out=sums_rL)
        return
    torch.sum(size_rLD.pow(exponent), -1, out=sums_rL)
    if grad:
        size_rLD.pow_(exponent - 1.0)
        if exponent < 1.0:
            # The slope is infinite where prediction and target meet; its sign there is 0.
            size_rLD.nan_to_num_(posinf=0.0)
        slope_rLD *= size_rLD


def finish(comparison: Comparison, sums_RL: Tensor) -> tuple[Tensor, Tensor]:
    """Total and terms [G, L] from the losses of all rows."""
    if comparison.token_weight_R is not None:
        sums_RL = sums_RL * comparison.token_weight_R[:, None].to(sums_RL.dtype)
    terms_GL = torch.stack([part_rL.sum(0) for part_rL in sums_RL.split(comparison.group_sizes)])
    terms_GL *= sums_RL.new_tensor(comparison.group_means())[:, None]
    weight_G = sums_RL.new_tensor(comparison.group_weights)
    if comparison.group_factor_G is not None:
        weight_G *= comparison.group_factor_G
    return (weight_G @ terms_GL) @ sums_RL.new_tensor(comparison.level_weights), terms_GL
