"""Embedded tasks: what to train on, what to hold out, and how to score an answer.

A task is two datasets in TRL's prompt-completion format and a scorer. `load_task("mnns")` makes the
embedded one, `load_task("reasoning_gym:chain_sum")` wraps any dataset of reasoning-gym with its own
scorer. Nothing is downloaded.
"""

import dataclasses
import difflib
import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset

from .checks import check_choice, check_least

GYM = "reasoning_gym:"
GYM_SIZE = 1000  # rows generated where the caller names no size
LATIN_SIZE, LATIN_TEST = 40_000, 1000


@dataclass(frozen=True)
class Task:
    """Data and scorer of one task. Prompt and completion are plain strings, to be tokenised as
    their concatenation; the completion does not hold the end-of-sequence token (TRL's SFTTrainer
    appends the tokenizer's)."""

    name: str
    # columns prompt, completion, answer (str); maybe traces (list[str], alternatives to the
    # completion), and group (str): rows of one group succeed and fail together, so that intervals
    # count groups
    train: Dataset
    test: Dataset  # the same columns, held out
    # (text generated after the thought, row) -> [0, 1]; special tokens stripped
    score: Callable[[str, dict], float]
    # the thought is the first n tokens of the completion; None: there is no thought
    think_steps: int | None
    # the embedded models made for it, by what they are: see MODELS
    models: dict[str, str] = field(default_factory=dict)
    extract: Callable[[str], str] = str.strip  # what of a generated text the scorer looks at

    @property
    def model(self) -> str | None:
        """The embedded model that training starts from, for softar.load, or None."""
        return self.models.get("untrained")


def load_task(name: str, *, seed: int = 0, size: int | None = None) -> Task:
    """The task of that name.

    Args:
        name: one of TASKS, or "reasoning_gym:NAME" for any dataset of reasoning-gym (`pip install
            softar[rewards]`).
        seed: selects what is held out (mnns) or what is generated (reasoning-gym); same seed, same
            rows.
        size: at most this many training rows; for reasoning-gym the number generated. None: all, or
            1000 generated.

    Raises:
        ValueError: for an unknown name (the message lists the known ones) or a size below 1.
        ImportError: where reasoning-gym is asked for and not installed.
    """
    check_least({"size": size}, size=1)
    if name.startswith(GYM):
        return _gym(name.removeprefix(GYM), seed=seed, size=size)
    check_choice("task", name, TASKS, hint=f" or '{GYM}NAME'")
    return TASKS[name](seed=seed, size=size)


def no_thought(task: Task) -> Task:
    """The same task answered at once: the completion is the answer alone. A task without a thought
    comes back as is."""
    if task.think_steps is None:
        return task

    def strip(rows: Dataset) -> Dataset:
        rows = rows.remove_columns([c for c in ("completion", "traces") if c in rows.column_names])
        return rows.add_column("completion", [" " + answer for answer in rows["answer"]])

    return dataclasses.replace(
        task, train=strip(task.train), test=strip(task.test), think_steps=None
    )


def mnns(
    digits: int = 4, low: int = 1, high: int = 9, *, seed: int = 0, size: int | None = None
) -> Task:
    """Minimum non-negative sum (CoT2, arXiv:2505.23648): sign each digit so that the sum is the
    smallest one >= 0.

    All (high - low + 1) ** digits sequences. A fifth of the multisets is held out, so that no test
    row is a permutation of a training row. The prompt is `<bos> D5 D3 D2 D4 ->`, the completion the
    partial sums along the best signs, ` S5 S2 S4 S0`; the last is the answer. Of equal totals the
    first sign tuple in the order of itertools.product((1, -1), repeat=digits) is gold. `traces`
    holds one completion for each signing of all digits but the last: its partial sums, then the
    gold answer. Their marginals are the exact frontier of the search. Every whitespace-separated
    word is one token of the model's vocabulary. `digits` is a column too; rows of a multiset are a
    `group`.

    Args:
        digits: how many, at least 2.   low, high: the range of a digit, 0 <= low < high.
        seed: selects the multisets held out.   size: at most this many training rows (a fixed
            random choice).
    """
    if digits < 2 or not 0 <= low < high:
        raise ValueError(
            f"digits={digits}, low={low}, high={high}: needs digits >= 2 and 0 <= low < high"
        )
    span = range(low, high + 1)
    rng = random.Random(seed)  # Python keeps its stream across versions
    bags = list(itertools.combinations_with_replacement(span, digits))
    rng.shuffle(bags)
    held_out = set(bags[: max(1, len(bags) // 5)])
    train, test = [], []
    for sequence in itertools.product(span, repeat=digits):
        (test if tuple(sorted(sequence)) in held_out else train).append(sequence)
    rng.shuffle(train)  # so that the first `size` are a fair choice
    fits = high <= 9 and digits * high <= 36  # its vocabulary: D0..D9, S-36..S36
    return Task(
        name="mnns",
        train=Dataset.from_list([_mnns_row(s) for s in train[:size]]),
        test=Dataset.from_list([_mnns_row(s) for s in test]),
        score=_score_mnns,
        think_steps=digits - 1,
        models=MODELS["mnns"] if fits else {},
        extract=_last_sum,
    )


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


def latin(n: int = 5, givens: int = 5, *, seed: int = 0, size: int | None = None) -> Task:
    """Complete an n x n Latin square: every symbol once in each row and each column. Any valid
    completion counts.

    Squares are the cyclic one with rows, columns and symbols shuffled. The prompt is `<bos>`, the
    completion the whole square, row by row, ` 3 1 2 5 4 ...`; held-out rows also have a `template`,
    the text with all but `givens` cells masked. For models that fill masks; every cell is one
    token.

    Args:
        n: 2 to 9.   givens: cells of a template that are shown.
        seed: selects the squares; no training square is a held-out one.   size: training rows,
            default 40000.
    """
    if not 2 <= n <= 9 or not 0 <= givens < n * n:
        raise ValueError(f"n={n}, givens={givens}: needs 2 <= n <= 9 and 0 <= givens < n * n")
    rng = random.Random(seed)
    held_out = [_latin_square(n, rng) for _ in range(LATIN_TEST)]
    excluded = set(map(tuple, held_out))
    squares = (_latin_square(n, rng) for _ in range(LATIN_SIZE if size is None else size))

    def say(cells) -> str:
        return "".join(f" {c}" for c in cells)

    def template(cells) -> str:
        givens_at = set(rng.sample(range(n * n), givens))
        return "<bos>" + say(c if i in givens_at else "<mask>" for i, c in enumerate(cells))

    train = [
        {"prompt": "<bos>", "completion": say(s), "answer": say(s).strip()}
        for s in squares
        if tuple(s) not in excluded
    ]
    test = [
        {"prompt": "<bos>", "completion": say(s), "answer": say(s).strip(), "template": template(s)}
        for s in held_out
    ]
    return Task(
        "latin",
        Dataset.from_list(train),
        Dataset.from_list(test),
        _score_latin,
        think_steps=None,
        models=MODELS["latin"],
    )


def _latin_square(n: int, rng: random.Random) -> list[int]:
    rows, cols, symbols = (rng.sample(range(n), n) for _ in range(3))
    return [symbols[(r + c) % n] + 1 for r in rows for c in cols]


def _score_latin(text: str, row: dict) -> float:
    """1 where the text is a Latin square that agrees with the template."""
    cells, template = text.split(), row["template"].removeprefix("<bos>").split()
    n = round(len(template) ** 0.5)
    if len(cells) != len(template) or any(
        t not in ("<mask>", c) for c, t in zip(cells, template, strict=True)
    ):
        return 0.0
    lines = [cells[r * n : (r + 1) * n] for r in range(n)] + [cells[c::n] for c in range(n)]
    symbols = {str(s) for s in range(1, n + 1)}
    return float(all(set(line) == symbols for line in lines))


def _gym(name: str, *, seed: int, size: int | None) -> Task:
    """A reasoning-gym dataset: prompt = question and a newline, completion = answer, `entry` = the
    whole item as JSON.

    A few of its datasets (boxnet, graph_color, rubiks_cube, ...) accept many answers and name none:
    there answer and completion are empty, so they can be scored and used for RL but not for
    supervised training.
    """
    try:
        import reasoning_gym  # an extra, and slow to import
        from reasoning_gym.factory import DATASETS
        from reasoning_gym.utils import extract_answer
    except ImportError as error:
        raise ImportError(
            f"task='{GYM}{name}' needs reasoning-gym: pip install softar[rewards]"
        ) from error
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.3) or sorted(DATASETS)[:5]
        raise ValueError(f"task='{GYM}{name}' is unknown to reasoning-gym; close names: {close}")
    size = GYM_SIZE if size is None else size

    def generate(part: str, count: int):
        # Item i is generated from seed + i: neighbouring seeds would overlap, so each part hashes
        # its own.
        start = random.Random(f"{part}/{seed}").randrange(2**31)
        try:
            items = reasoning_gym.create_dataset(name, seed=start, size=count)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"task='{GYM}{name}' cannot be generated from its name alone: {error}"
            ) from error
        return items, [_gym_row(items[i]) for i in range(count)]

    items, train = generate("train", size)
    seen = {row["prompt"] for row in train}
    test = [row for row in generate("test", max(50, size // 10))[1] if row["prompt"] not in seen]
    if not test:
        raise ValueError(
            f"task='{GYM}{name}', size={size}: no question is left to hold out; take a smaller size"
        )

    def score(answer: str, row: dict) -> float:
        """The dataset's own score; what stands in <answer> tags counts, without tags the whole
        text."""
        entry = thaw(json.loads(row["entry"]))
        tagged = extract_answer(answer)
        try:
            return float(items.score_answer(answer.strip() if tagged is None else tagged, entry))
        except (
            Exception
        ):  # several scorers parse the model's text without a guard: unreadable is wrong
            return 0.0

    return Task(
        GYM + name, Dataset.from_list(train), Dataset.from_list(test), score, think_steps=None
    )


def _gym_row(item: dict) -> dict:
    answer = "" if item["answer"] is None else str(item["answer"])
    entry = json.dumps(freeze(item))
    return {
        "prompt": item["question"] + "\n",
        "completion": answer,
        "answer": answer,
        "entry": entry,
    }


def freeze(x):
    """Tuples and keys that are not strings, tagged: JSON has neither, and scorers (arc_agi, rearc,
    ...) need them."""
    if isinstance(x, tuple):
        return {"__tuple__": [freeze(v) for v in x]}
    if isinstance(x, list):
        return [freeze(v) for v in x]
    if isinstance(x, dict):
        if all(isinstance(k, str) for k in x):
            return {k: freeze(v) for k, v in x.items()}
        return {"__dict__": [[freeze(k), freeze(v)] for k, v in x.items()]}
    return x


def thaw(x):
    """Undo `freeze`."""
    if isinstance(x, list):
        return [thaw(v) for v in x]
    if isinstance(x, dict):
        if "__tuple__" in x:
            return tuple(thaw(v) for v in x["__tuple__"])
        if "__dict__" in x:
            return {thaw(k): thaw(v) for k, v in x["__dict__"]}
        return {k: thaw(v) for k, v in x.items()}
    return x


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
}
TASKS: dict[str, Callable[..., Task]] = {"mnns": mnns, "latin": latin}
