"""The weight of the context term over the run (docs/method.md section 5, lambda)."""


def context_weight(step: int, full: float, ramp: tuple[int, int] | None) -> float:
    """0 up to `ramp[0]`, linear to `full` at `ramp[1]`, constant after; always `full` without a
    ramp."""
    if ramp is None or step >= ramp[1]:
        return full
    if step < ramp[0]:
        return 0.0
    return full * (step - ramp[0]) / (ramp[1] - ramp[0])
