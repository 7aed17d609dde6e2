"""What the fuzzers share: random cases from hypothesis, a few dozen in an ordinary run of the tests
and as many as there is time for with --fuzz-seconds.

Everything is float64 on the CPU, so that two ways to the same answer differ by 1e-16 and a choice
hangs on less than that once in a million cases. Where they do part, the case is run once more with
weights wrong by 1e-6 of themselves: if that changes the answer too, rounding may have.
"""

import time

import tiny
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

ROUND = 50  # cases between two looks at the clock
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)


def fuzz(check, cases, examples: int, seconds: float | None) -> None:
    """check(case) for cases of a strategy: always the same `examples`, or other ones for so many
    seconds. A failure is shrunk, and its case printed."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    common = dict(deadline=None, database=None, phases=PHASES, suppress_health_check=quiet)
    if seconds is None:
        settings(max_examples=examples, derandomize=True, **common)(given(cases)(check))()
        return
    end, first = time.monotonic() + seconds, time.time_ns()
    while time.monotonic() < end:
        run = settings(max_examples=ROUND, print_blob=True, **common)(given(cases)(check))
        seed(first)(run)()
        first += 1


def padded(rows, extra=0):
    """Lists of ids -> input_ids and attention_mask, padded on the left by `extra` more."""
    ids, mask = tiny.left_padded(rows)
    return (
        torch.nn.functional.pad(x, (extra, 0), value=value)
        for x, value in ((ids, tiny.PAD), (mask, 0))
    )


def generators(rows):
    """One for each row, by its number."""
    return [tiny.seeded(row) for row in rows]


def same(model, run, others, expected) -> None:
    """What each of `others`, functions of a model, gives equals `expected`, what `run` gives: tensors
    of whole numbers by name; unless the case hangs on rounding."""
    for name, other in others.items():
        found, wanted = other(model), expected[name]
        if all(torch.equal(found[key], wanted[key]) for key in wanted):
            continue
        wrong = run(tiny.perturbed(model, size=1e-6))
        whole = run(model)
        if all(torch.equal(wrong[key], whole[key]) for key in whole):
            raise AssertionError(f"{name}: {found} instead of {wanted}")
