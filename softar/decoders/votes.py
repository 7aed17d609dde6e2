"""Which of several answers is the commonest, and what of a text is voted on."""

from collections import Counter
from collections.abc import Callable, Sequence

from ..specs import regular_expression


def commonest(ballots: Sequence[str]) -> tuple[int, float]:
    """Of n votes the index of the first with the commonest text, and the share of the n that it got.
    Of equally common ones the first seen wins. An empty vote, as of a thought that did not end or a
    text in which no answer can be read, counts only where all are empty."""
    counts = Counter(filter(None, ballots)) or Counter(ballots)
    best, count = counts.most_common(1)[0]  # of equals the first seen
    return ballots.index(best), count / len(ballots)


def reader(
    pattern: str | None = None, extract: Callable[[str], str] | None = None
) -> Callable[[str], str]:
    """Text -> what of it is voted on, without differences of white space: the last match of the
    pattern, else what the task's `extract` reads, else all of it.

    Raises:
        ValueError: for a pattern that is no regular expression.
    """
    if pattern is not None:
        return last_match(pattern)
    return squeezed if extract is None else lambda text: squeezed(_read(extract, text))


def _read(extract: Callable[[str], str], text: str) -> str:
    try:
        return str(extract(text))
    except Exception:  # of the winner the comparison says it; the other votes go on
        return ""


def squeezed(text: str) -> str:
    return " ".join(text.split())


def last_match(pattern: str) -> Callable[[str], str]:
    """Text -> what of it the regular expression matches last, without differences of white space;
    all if nothing."""
    compiled = regular_expression(pattern)
    return lambda text: squeezed([text, *(match.group() for match in compiled.finditer(text))][-1])
