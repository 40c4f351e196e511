"""Attention in bfloat16 on a CPU as plain matrix products with one pass between them.

Flash attention on a CPU multiplies bfloat16 no faster than float32 (without AMX); oneDNN's batched
products do. So the scores of a few queries, or of a few short sequences, are written out, made
exponentials in place, and multiplied again. No maximum is subtracted: the softmax does not need it
while scores are small, and what the softmax divides by is folded into its neighbours. Scores are
rounded to bfloat16 on their way, as by the formula in bfloat16, whose error this keeps; flash
attention's is smaller where scores are large (benchmarks/cpu_choices.py prints both).

Shapes: B sequences, H heads, K tokens, C head channels; h heads, of one or more sequences, and k
tokens at once.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# With the backward's two buffers 8 MiB; a core has one head of a long sequence.
SCORES_AT_ONCE, FEWEST_HEADS = 2**21, 2
SUMS_APART, SHORTEST_PART = 16, 64
# exp(60) times any number of tokens is far from the largest float, exp(-60) from the smallest.
LARGEST_SCORE = 60.0


def scores_are_small(q_BHKC: Tensor, k_BHKC: Tensor) -> bool:
    """Whether no score can overflow, by Cauchy and Schwarz."""
    longest = [torch.linalg.vector_norm(t, dim=-1).amax().float() for t in (q_BHKC, k_BHKC)]
    return bool(longest[0] * longest[1] * q_BHKC.shape[-1] ** -0.5 < LARGEST_SCORE)


def _at_once(x_BHKC: Tensor) -> tuple[int, int, int]:
    """Sequences, heads and tokens: all heads before a second sequence, all tokens before a third
    head, and tokens in even cuts."""
    batch, heads, length, _ = x_BHKC.shape
    matrices = max(1, SCORES_AT_ONCE // length**2)
    some = min(heads, max(FEWEST_HEADS, matrices))
    most = max(1, SCORES_AT_ONCE // (some * length))
    return min(batch, max(1, matrices // heads)), some, math.ceil(length / math.ceil(length / most))


def _parts(x_BHKC: Tensor) -> Iterator[tuple[tuple[slice, slice], list[slice]]]:
    """(sequences and heads, cuts of the tokens)."""
    sequences, heads, tokens = (
        [slice(low, low + size) for low in range(0, whole, size)]
        for whole, size in zip(x_BHKC.shape, _at_once(x_BHKC), strict=False)
    )
    for b in sequences:
        for h in heads:
            yield (b, h), tokens


def _room(x_BHKC: Tensor) -> Tensor:
    return x_BHKC.new_empty(math.prod(_at_once(x_BHKC)) * x_BHKC.shape[2])


def _of(room: Tensor, some_hkC: Tensor, all_hKC: Tensor) -> Tensor:
    """The scores' place [h, k, K] in it, without gaps: a product into one with gaps is copied."""
    shape = *some_hkC.shape[:2], all_hKC.shape[1]
    return room[: math.prod(shape)].view(shape)


def _exponentials(some_hkC: Tensor, all_hKC: Tensor, room: Tensor) -> Tensor:
    """Of the scores of some tokens' queries with all keys, or of some keys with all queries, in
    `room`; powers of two, which are the faster ones."""
    out_hkK = _of(room, some_hkC, all_hKC)
    in_bits = some_hkC.shape[-1] ** -0.5 * math.log2(math.e)
    torch.baddbmm(out_hkK, some_hkC, all_hKC.mT, beta=0.0, alpha=in_bits, out=out_hkK)
    return out_hkK.exp2_()


def _sums(e_hkK: Tensor) -> Tensor:
    """Sums over the keys [h, k] in float32, of long rows by partial sums: a sum comes out rounded
    to bfloat16, 16 partial ones hardly, and one in float32 has all that it adds made float32."""
    length = e_hkK.shape[-1] // SUMS_APART
    if length < SHORTEST_PART:
        return e_hkK.sum(-1, dtype=torch.float32)
    even = length * SUMS_APART
    parts = e_hkK[..., :even].unflatten(-1, (SUMS_APART, length)).sum(-1)
    total_hk: Tensor = parts.sum(-1, dtype=torch.float32)
    if even < e_hkK.shape[-1]:
        total_hk += e_hkK[..., even:].sum(-1)
    return total_hk


@torch.library.custom_op("fastjepa::attention_by_products", mutates_args=())
def forward(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, K, C] (tokens before heads in memory) and float32 log-sum-exp [B,
    H, K].

    One operation with attention in its name, so that checkpointing can keep what it gave.
    """
    out_BHKC = torch.empty_like(q_BHKC.transpose(1, 2)).transpose(1, 2)
    sum_BHK = torch.empty(q_BHKC.shape[:-1])
    room = _room(q_BHKC)
    for part, cuts in _parts(q_BHKC):
        q_hKC, k_hKC, v_hKC = (t[part].flatten(0, 1) for t in (q_BHKC, k_BHKC, v_BHKC))
        heads = out_BHKC[part].shape[:2]
        for cut in cuts:
            e_hkK = _exponentials(q_hKC[:, cut], k_hKC, room)
            sum_hk = _sums(e_hkK)
            sum_BHK[part][:, :, cut] = sum_hk.unflatten(0, heads)
            out_hkC = (e_hkK @ v_hKC) / sum_hk[..., None]
            out_BHKC[part][:, :, cut] = out_hkC.unflatten(0, heads)
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
    scale = q_BHKC.shape[-1] ** -0.5
    dq_BHKC, dk_BHKC, dv_BHKC = (torch.empty_like(t) for t in (q_BHKC, k_BHKC, v_BHKC))
    room, other_room = _room(q_BHKC), _room(q_BHKC)
    for part, cuts in _parts(q_BHKC):
        q_hKC, k_hKC, v_hKC, grad_hKC, out_hKC = (
            t[part].contiguous().flatten(0, 1)
            for t in (q_BHKC, k_BHKC, v_BHKC, grad_BHKC, out_BHKC)
        )
        dq_hKC, dk_hKC, dv_hKC = (t[part].flatten(0, 1) for t in (dq_BHKC, dk_BHKC, dv_BHKC))
        wide_hKC = grad_hKC * lse_BHK[part].flatten(0, 1).neg().exp_()[..., None]
        shift_hK1 = -(wide_hKC * out_hKC).sum(-1, keepdim=True)
        high_hK1 = shift_hK1.to(v_hKC.dtype)
        shared_hKC = wide_hKC.to(v_hKC.dtype)
        grads_hKE = torch.cat((shared_hKC, high_hK1, (shift_hK1 - high_hK1).to(v_hKC.dtype)), -1)
        v_hKE = torch.cat((v_hKC, v_hKC.new_ones((*v_hKC.shape[:-1], 2))), -1)
        sum_hCK = torch.zeros(q_hKC.mT.shape)
        for cut in cuts:
            k_hkC = k_hKC[:, cut]
            e_hkK = _exponentials(k_hkC, q_hKC, room)
            dv_hKC[:, cut] = e_hkK @ shared_hKC
            ds_hkK = _of(other_room, k_hkC, q_hKC)
            torch.bmm(v_hKE[:, cut], grads_hKE.mT, out=ds_hkK).mul_(e_hkK)
            torch.mul(ds_hkK @ q_hKC, scale, out=dk_hKC[:, cut])
            sum_hCK += k_hkC.mT @ ds_hkK
        torch.mul(sum_hCK.mT, scale, out=dq_hKC)
    return dq_BHKC, dk_BHKC, dv_BHKC
