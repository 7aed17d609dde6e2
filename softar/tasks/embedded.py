"""The tasks that come with the package, made here and now: MNNS and Latin squares."""

import itertools
import random
import re
from collections.abc import Callable

from datasets import Dataset

from ..checks import check_least
from .task import Task

LATIN_SIZE, LATIN_TEST = 40_000, 1000


def mnns(
    digits: int = 4,
    low: int = 1,
    high: int = 9,
    *,
    held_out: int | None = None,
    orders: int | None = None,
    seed: int = 0,
    size: int | None = None,
) -> Task:
    """Minimum non-negative sum (CoT2, arXiv:2505.23648): sign each digit so that the sum is the
    smallest one >= 0.

    All (high - low + 1) ** digits sequences. A fifth of the multisets is held out, so that no test
    row is a permutation of a training row. Held-out rows stand in the order of their sequences, or
    with `orders` multiset by multiset, in the order in which these were drawn.

    The prompt is `<bos> D5 D3 D2 D4 ->`, the completion the partial sums along the best signs,
    ` S5 S2 S4 S0`; the last is the answer. Of equal totals the first sign tuple in the order of
    itertools.product((1, -1), repeat=digits) is gold. `traces` holds one completion for each
    signing of all digits but the last: its partial sums, then the gold answer. Their marginals are
    the exact frontier of the search. Every whitespace-separated word is one token of the model's
    vocabulary. `digits` is a column too; rows of a multiset are a `group`.

    Args:
        digits: how many, at least 2.   low, high: the range of a digit, 0 <= low < high.
        held_out: multisets held out; None is a fifth of them.   orders: at most this many
            permutations of each (a fixed random choice); None is all.
        seed: selects the multisets held out.   size: at most this many training rows (a fixed
            random choice).

    Raises:
        ValueError: for a range without two digits, or more multisets held out than leave one to
            train on.
    """
    if digits < 2 or not 0 <= low < high:
        raise ValueError(
            f"digits={digits}, low={low}, high={high}: needs digits >= 2 and 0 <= low < high"
        )
    span = range(low, high + 1)
    rng = random.Random(seed)  # Python keeps its stream across versions
    bags = list(itertools.combinations_with_replacement(span, digits))
    check_least({"held_out": held_out, "orders": orders}, held_out=1, orders=1)
    if held_out is not None and held_out >= len(bags):
        raise ValueError(
            f"held_out={held_out}: there are {len(bags)} multisets, and one at least is to train on"
        )
    rng.shuffle(bags)
    tested = dict.fromkeys(bags[: held_out or max(1, len(bags) // 5)])
    train, test = [], []
    for sequence in itertools.product(span, repeat=digits):
        (test if tuple(sorted(sequence)) in tested else train).append(sequence)
    rng.shuffle(train)  # so that the first `size` are a fair choice
    if orders is not None:
        test = [order for bag in tested for order in _some_orders(bag, orders, rng)]
    fits = high <= 9 and digits * high <= 36  # its vocabulary: D0..D9, S-36..S36
    return Task(
        name="mnns",
        train=Dataset.from_list([_mnns_row(s) for s in train[:size]]),
        test=Dataset.from_list([_mnns_row(s) for s in test]),
        score=_score_mnns,
        think_steps=digits - 1,
        models=MODELS["mnns"] if fits else {},
        extract=_last_sum,
        max_new_tokens=digits + 1,
    )


def _some_orders(bag: tuple[int, ...], count: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Permutations of a multiset, at most so many, none twice."""
    orders = sorted({*itertools.permutations(bag)})
    return rng.sample(orders, min(count, len(orders)))


def _mnns_row(sequence: tuple[int, ...]) -> dict:
    paths = [
        list(itertools.accumulate(sign * d for sign, d in zip(signs, sequence, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(sequence))
    ]
    # min keeps the first of equals
    gold = min((p for p in paths if p[-1] >= 0), key=lambda p: p[-1])

    def say(sums):
        return "".join(f" S{s}" for s in sums)

    return {
        "prompt": " ".join(["<bos>", *(f"D{d}" for d in sequence), "->"]),
        "completion": say(gold),
        "answer": f"S{gold[-1]}",
        # Paths come in pairs that differ in the last sign alone: every other one is each signing of
        # the rest.
        "traces": [say([*p[:-1], gold[-1]]) for p in paths[::2]],
        "digits": list(sequence),
        "group": " ".join(map(str, sorted(sequence))),  # the orders of one multiset
    }


def _score_mnns(answer: str, row: dict) -> float:
    """1 if the last sum named before the end of the sequence is the gold one."""
    return float(_last_sum(answer) == row["answer"])


def _last_sum(text: str) -> str:
    sums = [word for word in text.split("<eos>")[0].split() if re.fullmatch(r"S-?\d+", word)]
    return sums[-1] if sums else ""


def latin(
    n: int = 5,
    givens: int = 5,
    *,
    held_out: int = LATIN_TEST,
    seed: int = 0,
    size: int | None = None,
) -> Task:
    """Complete an n x n Latin square: every symbol once in each row and each column. Any valid
    completion counts.

    Squares are the cyclic one with rows, columns and symbols shuffled. The prompt is `<bos>`, the
    completion the whole square, row by row, ` 3 1 2 5 4 ...`, and the `template` that text with all
    but `givens` cells masked, and the end token that training puts behind it. For models that fill
    masks; every cell is one token. Supervised training does not look at templates, RL and
    evaluations fill them.

    Args:
        n: 2 to 9.   givens: cells of a template that are shown.
        held_out: templates, each of a square drawn for it; small squares repeat.
        seed: selects the squares; no training square is a held-out one.   size: training rows,
            default 40000.

    Raises:
        ValueError: for a size out of range, or so many held out that no square is left to train on.
    """

    def row(cells, at) -> dict:
        shown = _say(c if i in at else "<mask>" for i, c in enumerate(cells))
        return {"prompt": "<bos>", **_latin_row(cells), "template": f"<bos>{shown} <eos>"}

    return _latin_task("latin", row, n, givens, held_out, seed, size, n * n + 1)


def latin_prompt(
    n: int = 5,
    givens: int = 5,
    *,
    held_out: int = LATIN_TEST,
    seed: int = 0,
    size: int | None = None,
) -> Task:
    """The squares and templates of `latin`, for models that read from left to right, token by token
    or block by block: the template is the prompt, ` . . 3 . 1 ...` with a dot for an open cell, and
    the completion the whole square. Filled in place, a template would show such models the givens
    of a block only when all before it is decided.

    Args as of `latin`; training rows have templates of their own, of as many givens.
    """

    def row(cells, at) -> dict:
        prompt = _say(c if i in at else "." for i, c in enumerate(cells)).strip()
        return {"prompt": prompt, **_latin_row(cells)}

    return _latin_task("latin-prompt", row, n, givens, held_out, seed, size, n * n)


def _latin_task(
    name: str,
    row: Callable[[list[int], set[int]], dict],
    n: int,
    givens: int,
    held_out: int,
    seed: int,
    size: int | None,
    max_new_tokens: int,
) -> Task:
    """row: of a square's cells, row by row, and which of them are shown, makes what a data set
    holds."""
    check_least({"held_out": held_out}, held_out=1)
    if not 2 <= n <= 9 or not 0 <= givens < n * n:
        raise ValueError(f"n={n}, givens={givens}: needs 2 <= n <= 9 and 0 <= givens < n * n")
    rng = random.Random(seed)
    tested = [_latin_square(n, rng) for _ in range(held_out)]
    excluded = set(map(tuple, tested))
    squares = [_latin_square(n, rng) for _ in range(LATIN_SIZE if size is None else size)]
    test = [row(cells, {*rng.sample(range(n * n), givens)}) for cells in tested]
    train = [square for square in squares if tuple(square) not in excluded]
    if not train and size != 0:
        raise ValueError(f"held_out={held_out}: every square of n={n} is held out, take fewer")
    rng = random.Random(seed + 1)
    train = [row(cells, {*rng.sample(range(n * n), givens)}) for cells in train]
    return Task(
        name,
        Dataset.from_list(train),
        Dataset.from_list(test),
        _score_latin,
        think_steps=None,
        models=MODELS[name],
        max_new_tokens=max_new_tokens,
    )


def _latin_row(cells: list[int]) -> dict:
    return {"completion": _say(cells), "answer": _say(cells).strip()}


def _say(cells) -> str:
    return "".join(f" {c}" for c in cells)


def _latin_square(n: int, rng: random.Random) -> list[int]:
    rows, cols, symbols = (rng.sample(range(n), n) for _ in range(3))
    return [symbols[(r + c) % n] + 1 for r in rows for c in cols]


def _score_latin(text: str, row: dict) -> float:
    """1 where the text is a Latin square that agrees with the template, which may be the prompt."""
    given = row["template" if "template" in row else "prompt"]
    cells, template = text.split(), given.removeprefix("<bos>").removesuffix("<eos>").split()
    n = round(len(template) ** 0.5)
    if len(cells) != len(template) or any(
        t not in ("<mask>", ".", c) for c, t in zip(cells, template, strict=True)
    ):
        return 0.0
    lines = [cells[r * n : (r + 1) * n] for r in range(n)] + [cells[c::n] for c in range(n)]
    symbols = {str(s) for s in range(1, n + 1)}
    return float(all(set(line) == symbols for line in lines))


# Which embedded model is for which task. `untrained` is what causal training starts from; `discrete`
# and `soft` are causal models trained on discrete thoughts and to think in soft tokens; `diffusion`
# fills masks, trained.
MODELS = {
    "mnns": {
        "untrained": "mnns-tiny",
        "discrete": "mnns-discrete-tiny",
        "soft": "mnns-soft-tiny",
        "diffusion": "mnns-diffusion-tiny",
    },
    "latin": {"diffusion": "latin-diffusion-tiny"},
    "latin-prompt": {"untrained": "latin-tiny", "diffusion": "latin-block-tiny"},
}
