"""Which number score=number reads in a text, and when two are the same one."""

import json
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from softar.decoders.answer import Decoded
from softar.decoders.soft import elect
from softar.decoders.votes import reader
from softar.tasks import load_task
from softar.tasks.number import is_clear, last_number

SIGNS = ["-", "\u2212", "\u2013", "$-", "-$", r"-\$"]
COMMAS = [",", "{,}", r"\,", r",\!"]


@st.composite
def spellings(draw):
    """(value, text): a number in one of its spellings, within a sentence."""
    whole, places = draw(st.integers(0, 10**40) | st.integers(0, 3000)), draw(st.integers(0, 3))
    value, digits = Fraction(whole, 10**places), str(whole)
    top, bottom = value.numerator * (more := draw(st.integers(1, 3))), value.denominator * more
    kind = draw(st.sampled_from(["plain", "grouped", "power", "slash", "latex"]))
    if kind in ("slash", "latex") and top < 10**30:
        text = f"{top}/{bottom}" if kind == "slash" else rf"\frac{{{top}}}{{{bottom}}}"
    elif kind == "grouped":
        text = f"{whole:,}".replace(",", draw(st.sampled_from(COMMAS)))
        value, text = Fraction(whole), text + draw(st.sampled_from(["", ".", ".00"]))
    elif kind == "plain" and places:
        digits = digits.zfill(places + 1)
        text = f"{digits[:-places]}.{digits[-places:]}"
    else:
        zeros = draw(st.integers(0, 2))
        text = f"{digits}{'0' * zeros}e-{places + zeros}"
    if draw(st.booleans()):
        value, text = -value, draw(st.sampled_from(SIGNS)) + text
    before, behind = draw(
        st.sampled_from([("", ""), ("10 of it = ", "."), ("(", ")"), ("**", "**")])
    )
    return value, before + text + behind


@settings(max_examples=400, deadline=None)
@given(spellings(), spellings())
@example(
    (Fraction(12345678901234567890), "12345678901234567890"),
    (Fraction(12345678901234567899), "12345678901234567899"),
)
@example((Fraction(1, 2), "1/2"), (Fraction(1, 2), "0.5"))
@example((Fraction(7, 2), "3 1/2"), (Fraction(7, 2), r"3\frac12"))
def test_equal_numbers_and_only_these_are_one_text(one, other):
    """So that scores, votes and agreement hold the same answers for the same."""
    assert (last_number(one[1]) == last_number(other[1])) == (one[0] == other[0])


SIZES = [
    "1e400",
    "1e500",
    "1e999999999",
    "1e-999999999",
    "1e" + "9" * 30,
    "9" * 10_000,
    "0e99999999",
]


def test_no_size_is_too_large():
    """As floats all were infinite, and equal; written out they would fill the memory."""
    assert len({last_number(text) for text in SIZES}) == len(SIZES)
    assert max(len(last_number(text)) for text in SIZES) < 10_100
    assert last_number("1" + "0" * 999) == last_number("1e999") == "1E+999"


def score_of(folder, gold):
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "q", "answer": gold}))
    task = load_task(f"{file}:score=number")
    return task, lambda text: task.score(text, task.test[0])


@pytest.mark.parametrize(
    "between",
    [
        ", ",
        ",",
        "-",
        "\u2013",
        ":",
        "^",
        " x 10^",
        "/1/",
        " or ",
        "; ",
        "_",
        "\n",
        " + 2 = ",
        "/0/",
    ],
)
def test_a_gold_answer_of_several_numbers_is_refused(tmp_path, between):
    """It was scored by its last: (1, 2) was right for (3, 2), a date for any day of its number."""
    for gold in (f"1{between}2", f"({7}{between}12)"):
        with pytest.raises(ValueError, match=r"line 1: answer=.* is no single number") as error:
            score_of(tmp_path, gold)
        assert "write the one meant behind '####', or choose another score" in str(error.value)
        for marked in ("#### 12", "The answer is 12.", "**Answer:** $12", r"so \boxed{12} km"):
            assert score_of(tmp_path, f"{gold}\n{marked}")[1]("12") == 1


@pytest.mark.parametrize(
    "gold", [r"\sqrt{2}", r"\frac{\pi}{2}", "x^2", "2π", "x-2", "- 2", "\u2212 2", "x^{2}"]
)
def test_a_gold_answer_of_which_the_number_is_a_part_is_refused(tmp_path, gold):
    with pytest.raises(ValueError, match="is no single number"):
        score_of(tmp_path, gold)


@pytest.mark.parametrize(
    "gold", ["72", "$72", "72%", "72 km", r"90^\circ", "-7", "#### 7", "so 7."]
)
def test_a_gold_answer_of_one_number_is_clear(gold):
    assert is_clear(gold)


def test_votes_for_one_number_are_one_vote(tmp_path):
    """$18.00, 18 and 18.0 were three, and lost against two of 20. What wins is a text that was given."""
    task, score = score_of(tmp_path, "18")
    texts = ["It is $18.00", "so 20", "18", "20", "18.0"]
    votes = [Decoded(text, (1,), 1, 1, 1.0) for text in texts]
    winner, share = elect(votes, reader(None, task.extract))
    assert (winner.text, share, score(winner.text)) == (texts[0], 3 / 5, 1)
