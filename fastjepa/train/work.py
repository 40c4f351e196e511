"""The model's operations in a step as it is taken: from the masks at hand, not from an average."""

from dataclasses import dataclass

from fastjepa.masking.batch import Masks, kept_tokens
from fastjepa.observe.flops import EncoderNumbers, PredictorNumbers, TokenNumbers, step_flops


@dataclass(frozen=True)
class Work:
    """`teacher` gives the targets where there is one. `peak` is the device's operations a second
    that a utilisation is of; None if not known."""

    encoder: EncoderNumbers
    predictor: PredictorNumbers
    teacher: EncoderNumbers | None
    peak: float | None

    def flops(self, masks: Masks, *, clips: int, tokens: int, image: bool) -> int:
        """Operations of a micro-batch of `clips` with `tokens` grid tokens each, the recompute of
        checkpointing not counted."""
        kept = TokenNumbers(tokens, *kept_tokens(masks), image=image)
        return step_flops(
            self.encoder, self.predictor, kept, batch=clips, target=self.teacher
        ).total
