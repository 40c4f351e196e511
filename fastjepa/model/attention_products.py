"""Attention in bfloat16 on a CPU as plain matrix products with one pass between them.

Flash attention on a CPU multiplies bfloat16 no faster than float32 (without AMX); oneDNN's batched
products do. So the scores of some queries of two heads are written out, made exponentials in
place, and multiplied again. No maximum is subtracted: the softmax does not need it while scores are
small, and what the softmax divides by is folded into its neighbours. Scores are rounded to bfloat16
on their way, as by the formula in bfloat16, whose error this keeps; flash attention's is smaller
where scores are large (benchmarks/cpu_choices.py prints both).

Shapes: B sequences, H heads, K tokens, C head channels, h heads and k tokens at once.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Scores of a head at once: with two heads and the backward's two buffers 8 MiB.
HEADS_AT_ONCE, SCORES_AT_ONCE, SUMS_APART = 2, 2**20, 16
# exp(60) times any number of tokens is far from the largest float, exp(-60) from the smallest.
LARGEST_SCORE = 60.0


def scores_are_small(q_BHKC: Tensor, k_BHKC: Tensor) -> bool:
    """Whether no score can overflow, by Cauchy and Schwarz."""
    longest = [torch.linalg.vector_norm(t, dim=-1).amax().float() for t in (q_BHKC, k_BHKC)]
    return bool(longest[0] * longest[1] * q_BHKC.shape[-1] ** -0.5 < LARGEST_SCORE)


def _at_once(length: int) -> int:
    most = max(1, SCORES_AT_ONCE // length)
    return math.ceil(length / math.ceil(length / most))


def _parts(x_BHKC: Tensor) -> Iterator[tuple[int, slice, list[slice]]]:
    """(sequence, heads, even cuts of the tokens)."""
    batch, heads, length, _ = x_BHKC.shape
    size = _at_once(length)
    cuts = [slice(low, low + size) for low in range(0, length, size)]
    for b in range(batch):
        for low in range(0, heads, HEADS_AT_ONCE):
            yield b, slice(low, low + HEADS_AT_ONCE), cuts


def _exponentials(some_hkC: Tensor, all_hKC: Tensor, room: Tensor) -> Tensor:
    """Of the scores of some tokens' queries with all keys, or of some keys with all queries; in
    `room`, which the last heads and tokens do not fill."""
    scale, out_hkK = some_hkC.shape[-1] ** -0.5, room[: some_hkC.shape[0], : some_hkC.shape[1]]
    torch.baddbmm(out_hkK, some_hkC, all_hKC.mT, beta=0.0, alpha=scale, out=out_hkK)
    return out_hkK.exp_()


def _sums(e_hkK: Tensor) -> Tensor:
    """Sums over the keys [h, k] in float32: a sum comes out rounded to bfloat16, 16 partial ones
    hardly."""
    length = e_hkK.shape[-1] // SUMS_APART
    even = length * SUMS_APART
    parts = e_hkK[..., :even].unflatten(-1, (SUMS_APART, length)).sum(-1)
    total_hk: Tensor = parts.sum(-1, dtype=torch.float32)
    if even < e_hkK.shape[-1]:
        total_hk += e_hkK[..., even:].sum(-1)
    return total_hk


def _room(x_BHKC: Tensor) -> Tensor:
    _, heads, length, _ = x_BHKC.shape
    sizes = min(heads, HEADS_AT_ONCE), _at_once(length), length
    return torch.empty(sizes, dtype=x_BHKC.dtype)


@torch.library.custom_op("fastjepa::attention_by_products", mutates_args=())
def forward(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, K, C] (tokens before heads in memory) and float32 log-sum-exp [B,
    H, K].

    One operation with attention in its name, so that checkpointing can keep what it gave.
    """
    out_BHKC = torch.empty_like(q_BHKC.transpose(1, 2)).transpose(1, 2)
    sum_BHK = torch.empty(q_BHKC.shape[:-1])
    room = _room(q_BHKC)
    for b, heads, cuts in _parts(q_BHKC):
        q_hKC, k_hKC, v_hKC = (t[b, heads] for t in (q_BHKC, k_BHKC, v_BHKC))
        for cut in cuts:
            e_hkK = _exponentials(q_hKC[:, cut], k_hKC, room)
            sum_hk = _sums(e_hkK)
            sum_BHK[b, heads, cut] = sum_hk
            torch.div(e_hkK @ v_hKC, sum_hk[..., None], out=out_BHKC[b, heads, cut])
    return out_BHKC, sum_BHK.log_()


def backward(
    grad_BHKC: Tensor,
    q_BHKC: Tensor,
    k_BHKC: Tensor,
    v_BHKC: Tensor,
    out_BHKC: Tensor,
    lse_BHK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [B, H, K, C].

    With e the exponentials, s their sum and d = sum_c(grad out): dv = e^T (grad / s) and the
    scores' gradient is e (grad v^T - d) / s, where both - d and 1 / s ride in the product: grad
    gets two more channels, the halves of - d in bfloat16, and v two of ones.
    """
    scale, dtype = q_BHKC.shape[-1] ** -0.5, q_BHKC.dtype
    share_BHK1 = lse_BHK.neg().exp_()[..., None]
    wide_BHKC = grad_BHKC.float() * share_BHK1
    shift_BHK1 = -(wide_BHKC * out_BHKC.float()).sum(-1, keepdim=True)
    high_BHK1 = shift_BHK1.to(dtype)
    low_BHK1 = (shift_BHK1 - high_BHK1).to(dtype)
    shared_BHKC = wide_BHKC.to(dtype, memory_format=torch.contiguous_format)
    del wide_BHKC
    grads_BHKE = torch.cat((shared_BHKC, high_BHK1, low_BHK1), dim=-1)
    v_BHKE = torch.cat((v_BHKC, v_BHKC.new_ones((*v_BHKC.shape[:-1], 2))), dim=-1)

    dq_BHKC, dk_BHKC, dv_BHKC = (torch.empty_like(t) for t in (q_BHKC, k_BHKC, v_BHKC))
    room, other_room = _room(q_BHKC), _room(q_BHKC)
    for b, heads, cuts in _parts(q_BHKC):
        q_hKC, shared_hKC, grads_hKE = (t[b, heads] for t in (q_BHKC, shared_BHKC, grads_BHKE))
        dq_hCK = torch.zeros(q_hKC.mT.shape)
        for cut in cuts:
            k_hkC = k_BHKC[b, heads, cut]
            e_hkK = _exponentials(k_hkC, q_hKC, room)
            dv_BHKC[b, heads, cut] = e_hkK @ shared_hKC
            ds_hkK = other_room[: e_hkK.shape[0], : e_hkK.shape[1]]
            torch.bmm(v_BHKE[b, heads, cut], grads_hKE.mT, out=ds_hkK).mul_(e_hkK)
            torch.mul(ds_hkK @ q_hKC, scale, out=dk_BHKC[b, heads, cut])
            dq_hCK += k_hkC.mT @ ds_hkK
        torch.mul(dq_hCK.mT, scale, out=dq_BHKC[b, heads])
    return dq_BHKC, dk_BHKC, dv_BHKC
