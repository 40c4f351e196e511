"""Parameters and floating-point operations of a training step, from plain numbers.

Counted: matrix products at 2 operations per multiply-add, attention at 4 N^2 D a block, and the
loss element by element. Not counted: norms, GELU, rotary positions and the optimizer, which are
bound by memory. Sizes follow docs/method.md, sections 2 and 4; footprint.py estimates bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

# Operations a supervised value: 5 of the target's LayerNorm, then difference, power, weight, sum.
_LOSS_FORWARD = 9
# Its gradient: sign (or power), weight.
_LOSS_BACKWARD = 2

# Which blocks run again in the backward: all, none, or the context encoder's alone.
Checkpointing = bool | Literal["encoder"]


@dataclass(frozen=True)
class EncoderNumbers:
    """Sizes of a ViT with `levels` supervised depths and both tokenizers (RGB in)."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    levels: int
    patch: int = 16
    tubelet: int = 2


@dataclass(frozen=True)
class PredictorNumbers:
    """Sizes of a predictor from `in_levels` x `in_width` channels a token to `out_width`, twice.

    `out_width` (of each head) is levels times width of the target encoder, or the teacher's width
    when distilling.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    in_width: int
    in_levels: int
    out_width: int
    mask_tokens: int = 8


@dataclass(frozen=True)
class TokenNumbers:
    """Tokens of one sample: the whole grid, and what each mask group keeps as context and predicts.

    Raises ValueError when the groups do not pair up or exceed the grid.
    """

    grid: int
    context: tuple[int, ...]
    predicted: tuple[int, ...]
    image: bool = False

    def __post_init__(self) -> None:
        if len(self.context) != len(self.predicted):
            raise ValueError(
                f"tokens: {len(self.context)} context groups for "
                f"{len(self.predicted)} predicted ones"
            )
        for context, predicted in zip(self.context, self.predicted, strict=True):
            if context < 1 or predicted < 1 or context + predicted > self.grid:
                raise ValueError(
                    f"tokens: {context} context and {predicted} predicted tokens do not split "
                    f"a grid of {self.grid}"
                )


@dataclass(frozen=True)
class Flops:
    """Operations of one part of a step; `recompute` is the forward that checkpointing repeats."""

    forward: int
    backward: int = 0
    recompute: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recompute


@dataclass(frozen=True)
class StepFlops:
    """Operations of one training step on `batch` samples, part by part."""

    target: Flops
    context: Flops
    predictor: Flops
    loss: Flops

    @property
    def total(self) -> int:
        return self.target.total + self.context.total + self.predictor.total + self.loss.total

    @property
    def recompute(self) -> int:
        """Operations among them that checkpointing repeats."""
        return self.context.recompute + self.predictor.recompute


def mean_flops(steps: Sequence[StepFlops]) -> StepFlops:
    """The mean of several steps, kind by kind, to whole operations."""

    def part(name: str) -> Flops:
        parts: list[Flops] = [getattr(step, name) for step in steps]
        forward, backward, recompute = (
            round(fmean(getattr(one, kind) for one in parts))
            for kind in ("forward", "backward", "recompute")
        )
        return Flops(forward, backward, recompute)

    return StepFlops(part("target"), part("context"), part("predictor"), part("loss"))


def encoder_parameters(encoder: EncoderNumbers) -> int:
    """Weights of one encoder: both tokenizers, modality embeddings, blocks, level norms."""
    width, pixels = encoder.width, 3 * encoder.patch**2
    tokenizers = _linear(pixels * encoder.tubelet, width) + _linear(pixels, width)
    blocks = encoder.depth * block_parameters(width, encoder.mlp_width)
    return tokenizers + 2 * width + blocks + 2 * width * encoder.levels


def predictor_parameters(predictor: PredictorNumbers) -> int:
    """Weights of one predictor: embeddings, mask tokens, blocks, norm, two heads."""
    width, inner = predictor.width, predictor.in_width
    embed = _linear(inner, width)
    if predictor.in_levels > 1:
        embed += _linear(inner * predictor.in_levels, inner)
    vectors = (predictor.mask_tokens + 2) * width
    blocks = predictor.depth * block_parameters(width, predictor.mlp_width)
    return embed + vectors + blocks + 2 * width + 2 * _linear(width, predictor.out_width)


def block_parameters(width: int, mlp_width: int) -> int:
    """Weights of one pre-norm block with biases."""
    attention = _linear(width, 3 * width) + _linear(width, width)
    return 4 * width + attention + _linear(width, mlp_width) + _linear(mlp_width, width)


def block_flops(width: int, mlp_width: int, tokens: int) -> int:
    """Forward operations of one block on one sequence of `tokens`."""
    products = 2 * tokens * (4 * width * width + 2 * width * mlp_width)
    return products + 4 * tokens * tokens * width


def encoder_flops(encoder: EncoderNumbers, tokens: int, *, image: bool = False) -> int:
    """Forward operations of the encoder on one sample of `tokens` tokens, tokenizer included."""
    return _tokenizer_flops(encoder, tokens, image=image) + encoder.depth * block_flops(
        encoder.width, encoder.mlp_width, tokens
    )


def predictor_flops(predictor: PredictorNumbers, context: int, predicted: int) -> int:
    """Forward operations of the predictor on one sample; each head runs on its own tokens only."""
    inner, width, tokens = predictor.in_width, predictor.width, context + predicted
    embed = 2 * context * inner * width
    if predictor.in_levels > 1:
        embed += 2 * context * inner * predictor.in_levels * inner
    heads = 2 * tokens * width * predictor.out_width
    return embed + predictor.depth * block_flops(width, predictor.mlp_width, tokens) + heads


def step_flops(
    encoder: EncoderNumbers,
    predictor: PredictorNumbers,
    tokens: TokenNumbers,
    *,
    batch: int,
    target: EncoderNumbers | None = None,
    checkpointing: Checkpointing = False,
    keep_attention: bool = False,
) -> StepFlops:
    """Operations of one step (docs/method.md, sections 2 to 5).

    The target encoder (`target`, by default of the encoder's size) runs once, forward only, on the
    whole grid. Context encoder and predictor run once per mask group; backward costs twice the
    forward (once for the tokenizer, whose input needs no gradient). `checkpointing` repeats the
    forward of the blocks, or of the `encoder`'s alone, with `keep_attention` all but attention.
    """
    groups = list(zip(tokens.context, tokens.predicted, strict=True))
    whole = encoder_flops(target or encoder, tokens.grid, image=tokens.image)
    seen = sum(encoder_flops(encoder, context, image=tokens.image) for context, _ in groups)
    embedded = sum(_tokenizer_flops(encoder, context, image=tokens.image) for context, _ in groups)
    guessed = sum(predictor_flops(predictor, context, predicted) for context, predicted in groups)
    guessed_blocks = predictor.depth * sum(
        block_flops(predictor.width, predictor.mlp_width, context + predicted)
        for context, predicted in groups
    )
    again, guessed_again = seen - embedded, guessed_blocks
    if keep_attention:
        again -= encoder.depth * sum(4 * kept * kept * encoder.width for kept, _ in groups)
        squares = sum((kept + predicted) ** 2 for kept, predicted in groups)
        guessed_again -= predictor.depth * 4 * squares * predictor.width
    values = predictor.out_width * sum(context + predicted for context, predicted in groups)
    return StepFlops(
        target=Flops(batch * whole),
        context=Flops(
            batch * seen,
            batch * (2 * seen - embedded),
            batch * again if checkpointing else 0,
        ),
        predictor=Flops(
            batch * guessed,
            2 * batch * guessed,
            batch * guessed_again if checkpointing is True else 0,
        ),
        loss=Flops(_LOSS_FORWARD * batch * values, _LOSS_BACKWARD * batch * values),
    )


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _tokenizer_flops(encoder: EncoderNumbers, tokens: int, *, image: bool) -> int:
    frames = 1 if image else encoder.tubelet
    return 2 * tokens * 3 * frames * encoder.patch**2 * encoder.width
