"""Memory a training step needs, estimated from plain numbers before anything is allocated.

Bytes of weights, gradients, optimizer state and EMA are exact for float32 states. Activations are
an estimate of what autograd keeps: values in the compute dtype, attention without its score matrix
(flash, or the CPU's fused kernel) unless `scores` says otherwise. Workspace and the allocator's
slack are not in it.
"""

from dataclasses import dataclass

from fastjepa.observe.flops import (
    EncoderNumbers,
    PredictorNumbers,
    TokenNumbers,
    encoder_parameters,
    predictor_parameters,
)

_FLOAT32 = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes of what is trained and its states, of the target encoder, and of activations."""

    weights: int
    gradients: int
    optimizer: int
    target: int
    context_activations: int
    predictor_activations: int
    loss_activations: int

    @property
    def activations(self) -> int:
        return self.context_activations + self.predictor_activations + self.loss_activations

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.target + self.activations


def step_footprint(
    encoder: EncoderNumbers,
    predictor: PredictorNumbers,
    tokens: TokenNumbers,
    *,
    batch: int,
    value_bytes: int = 2,
    target: EncoderNumbers | None = None,
    checkpointing: bool = False,
    scores: bool = False,
) -> Footprint:
    """Bytes held at the height of one step: all mask groups' graphs alive, backward about to start.

    `value_bytes` is 2 for bf16 and 4 for float32 compute. With `checkpointing` a block keeps its
    input alone, and the one block that is being recomputed is added.
    """
    trained = encoder_parameters(encoder) + predictor_parameters(predictor)
    keep = _Keep(value_bytes, checkpointing, scores)
    context = guessed = supervised = 0
    pixels = 3 * (1 if tokens.image else encoder.tubelet) * encoder.patch**2
    for kept, predicted in zip(tokens.context, tokens.predicted, strict=True):
        # Blocks, patches into the tokenizer, and the level norms' outputs.
        context += _stack_bytes(encoder, kept, keep)
        context += kept * value_bytes * (pixels + encoder.levels * encoder.width)
        # Blocks, the norm's input and output, and the wide embedding around its GELU.
        guessed += _stack_bytes(predictor, kept + predicted, keep)
        guessed += 2 * (kept + predicted) * predictor.width * value_bytes
        if predictor.in_levels > 1:
            guessed += 2 * kept * predictor.in_width * value_bytes
        supervised += kept + predicted
    # Targets of the whole grid in float32, predictions in the compute dtype.
    loss = predictor.out_width * (tokens.grid * _FLOAT32 + supervised * value_bytes)
    return Footprint(
        weights=_FLOAT32 * trained,
        gradients=_FLOAT32 * trained,
        optimizer=2 * _FLOAT32 * trained,
        target=_FLOAT32 * encoder_parameters(target or encoder),
        context_activations=batch * context,
        predictor_activations=batch * guessed,
        loss_activations=batch * loss,
    )


def block_activations(
    width: int, mlp_width: int, heads: int, tokens: int, value_bytes: int, *, scores: bool = False
) -> int:
    """Bytes one block keeps for its backward on one sequence.

    A token keeps 8 rows of `width` (two residuals, two normed inputs, q, k, v, attention's output)
    and two of `mlp_width` (around the GELU); attention keeps a float32 log-sum-exp per head, or
    with `scores` its `heads x tokens x tokens` probabilities; a norm its mean and deviation.
    """
    rows = tokens * value_bytes * (8 * width + 2 * mlp_width)
    attention = heads * tokens * (tokens * value_bytes if scores else _FLOAT32)
    return rows + attention + 4 * _FLOAT32 * tokens


@dataclass(frozen=True)
class _Keep:
    """How a forward keeps values for its backward."""

    value_bytes: int
    checkpointing: bool
    scores: bool


def _stack_bytes(shape: EncoderNumbers | PredictorNumbers, tokens: int, keep: _Keep) -> int:
    block = block_activations(
        shape.width, shape.mlp_width, shape.heads, tokens, keep.value_bytes, scores=keep.scores
    )
    if keep.checkpointing:
        return shape.depth * tokens * shape.width * keep.value_bytes + block
    return shape.depth * block
