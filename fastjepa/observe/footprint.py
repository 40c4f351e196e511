"""Memory a training step needs, estimated from plain numbers before anything is allocated.

States are exact (states.py). Activations are an estimate of what autograd keeps on a GPU: products
in the compute dtype, norms' inputs, levels and targets in float32, attention without its score
matrix (flash kernels) unless `scores` says otherwise. A CPU's hand-written blocks keep less.
Workspace and the allocator's slack are not in it. docs/planning.md has the formulas.
"""

from dataclasses import dataclass

from fastjepa.observe.flops import Checkpointing, EncoderNumbers, PredictorNumbers, TokenNumbers
from fastjepa.observe.states import StateBytes

_FLOAT32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes held at the height of a step by part; `recomputed` is the one block that checkpointing
    brings back, `clip` the batch itself."""

    context: int
    predictor: int
    loss: int
    recomputed: int
    clip: int

    @property
    def total(self) -> int:
        return self.context + self.predictor + self.loss + self.recomputed + self.clip


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process's step: what stays from step to step, and what a step adds."""

    states: StateBytes
    activations: Activations

    @property
    def total(self) -> int:
        return self.states.total + self.activations.total


def step_activations(
    encoder: EncoderNumbers,
    predictor: PredictorNumbers,
    tokens: TokenNumbers,
    *,
    batch: int,
    value_bytes: int = 2,
    stream_bytes: int = _FLOAT32,
    checkpointing: Checkpointing = False,
    keep_attention: bool = False,
    scores: bool = False,
    in_turn: bool = False,
) -> Activations:
    """Bytes held as the backward starts: the graphs of all mask groups, or with `in_turn` the
    predictor's and the loss's of the largest pass alone, of the first group or of half the clips
    of another.

    `value_bytes` is 2 for bf16 and 4 for float32 products, `stream_bytes` the width of the
    predictor's residual stream, float32 unless `engine.residual` says otherwise. With
    `checkpointing` a block, or one of the `encoder` alone, keeps its input only, with
    `keep_attention` attention's output and float32 log-sum-exp too, and the largest single block
    comes on top.
    """
    groups = list(zip(tokens.context, tokens.predicted, strict=True))
    visible = sum(tokens.context)
    pixels = 3 * (1 if tokens.image else encoder.tubelet) * encoder.patch**2
    # Patches into the tokenizer; the level norms' float32 inputs, where the blocks' own are bf16,
    # and outputs; all levels side by side into the predictor.
    level = value_bytes + _FLOAT32 + (_FLOAT32 if value_bytes < _FLOAT32 else 0)
    context = visible * (pixels * value_bytes + encoder.levels * encoder.width * level)
    block, recomputed = _block(encoder, list(tokens.context), value_bytes, scores), 0
    if checkpointing:
        kept_rows = encoder.width * value_bytes
        if keep_attention:
            kept_rows += encoder.width * value_bytes + encoder.heads * _FLOAT32
        context += encoder.depth * visible * kept_rows
        recomputed = block
    else:
        context += encoder.depth * block

    recomputed *= batch
    passes = [(batch, groups)]
    if in_turn:
        first, *others = groups
        passes = [(batch, [first]), *(((batch + 1) // 2, [group]) for group in others)]
    guessed = supervised = 0
    for clips, some in passes:
        lengths = [kept + predicted for kept, predicted in some]
        block = _block(predictor, lengths, value_bytes, scores)
        # The last norm's input, and the wide embedding around its GELU.
        size = sum(lengths) * predictor.width * stream_bytes
        if predictor.in_levels > 1:
            size += 2 * sum(kept for kept, _ in some) * predictor.in_width * value_bytes
        if checkpointing is True:
            kept_rows = predictor.width * stream_bytes
            if keep_attention:
                kept_rows += predictor.width * value_bytes + predictor.heads * _FLOAT32
            size += predictor.depth * sum(lengths) * kept_rows
            recomputed = max(recomputed, clips * block)
        else:
            size += predictor.depth * block
        guessed = max(guessed, clips * size)
        supervised = max(supervised, clips * sum(lengths))
    # Raw targets of the whole grid; the gradients of the predictor's rows and of the two heads.
    loss = batch * tokens.grid * predictor.out_width * _FLOAT32
    loss += supervised * predictor.width * value_bytes
    heads = 2 * (predictor.width + 1) * predictor.out_width * _FLOAT32
    clip = tokens.grid * pixels * _FLOAT32
    return Activations(batch * context, guessed, loss + heads, recomputed, batch * clip)


def block_activations(
    width: int, mlp_width: int, heads: int, tokens: int, value_bytes: int, *, scores: bool = False
) -> int:
    """Bytes one block keeps for its backward on one sequence.

    A token keeps two rows of `width` in float32 (the norms' inputs), six in the compute dtype (two
    normed inputs, q, k, v, attention's output) and two of `mlp_width` (around the GELU). Attention
    keeps a float32 log-sum-exp per head, or with `scores` its `heads x tokens x tokens`
    probabilities; a norm its mean and deviation.
    """
    rows = tokens * (2 * width * _FLOAT32 + (6 * width + 2 * mlp_width) * value_bytes)
    attention = heads * tokens * (tokens * value_bytes if scores else _FLOAT32)
    return rows + attention + 4 * _FLOAT32 * tokens


def _block(
    shape: EncoderNumbers | PredictorNumbers, lengths: list[int], value_bytes: int, scores: bool
) -> int:
    """What one block keeps for one sequence of each length."""
    alone = sum(
        block_activations(
            shape.width, shape.mlp_width, shape.heads, tokens, value_bytes, scores=scores
        )
        for tokens in lengths
    )
    if len(lengths) == 1 or scores:
        return alone
    # Flash kernels keep each group's output, and the packed rows of all groups come beside them.
    return alone + sum(lengths) * shape.width * value_bytes
