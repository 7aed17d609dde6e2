"""Guidance: how much of the gold token a soft input holds.

alpha = 1 is teacher forcing: the model reads the gold tokens. alpha = 0 is what it will meet at
inference: its own mixtures. Training anneals alpha from 1 down.
"""

import math
from collections.abc import Callable

from ..checks import check_choice


def mk_alpha(
    schedule: str = "linear",
    *,
    start: float = 1.0,
    end: float = 0.0,
    hold: float = 0.0,
    span: float = 0.6,
) -> Callable[[float], float]:
    """A schedule progress -> alpha: `start` while progress < hold, then down to `end` over the next
    `span`, then `end`.

    Args:
        schedule: "constant" (start throughout), "linear", "cosine", or "step" (start, then end
            after hold + span).
        start, end: alpha in [0, 1]; 1 is teacher forcing.
        hold, span: fractions of the training in [0, 1], hold + span <= 1.
    """
    check_choice("alpha_schedule", schedule, sorted(SCHEDULES))
    for name, value in (
        ("alpha_start", start),
        ("alpha_end", end),
        ("alpha_hold", hold),
        ("alpha_span", span),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in [0, 1]")
    if hold + span > 1:
        raise ValueError(
            f"alpha_hold={hold} + alpha_span={span} must be at most 1, the whole training"
        )
    shape = SCHEDULES[schedule]

    def alpha(progress: float) -> float:
        x = 0.0 if progress < hold else 1.0 if span == 0 else min(1.0, (progress - hold) / span)
        return start + (end - start) * shape(x)

    return alpha


SCHEDULES = {
    "constant": lambda x: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "step": lambda x: float(x >= 1 - 1e-9),
}
