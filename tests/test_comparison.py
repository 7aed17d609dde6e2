"""compare: who is better, how sure that is, what is left after a failure or Ctrl-C. All decoders
here are made up."""

import csv
import itertools
import json
import math
import time
from dataclasses import dataclass, field, replace
from io import StringIO

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from softar.decoders.answer import Decoded, Unfinished
from softar.evals.chart import comparison_table, frontier, legend_label, plot_frontier
from softar.evals.compare import Comparison, Failure, NoAnswers, compare
from softar.evals.intervals import (
    bootstrap_means,
    gain_interval,
    interval,
    number_groups,
    share_interval,
)

QUIET = dict(bootstrap=200, console=Console(file=StringIO()))
TOLD = (
    "n",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "gain",
    "gain_low",
    "gain_high",
    "agreement",
)


def questions(n, **columns):
    return Dataset.from_dict(
        {"prompt": [f"q{i}" for i in range(n)], "answer": [f"a{i}" for i in range(n)]} | columns
    )


def score(text, row):
    return float(text == row["answer"])


@dataclass
class Fake:
    """Answers q3 by a3, or by "wrong" where `right` says so; every batch is noted in `calls`."""

    name: str = "fake"
    # bool, or a function of the row's index and of how often it was asked before
    right: object = True
    nfe: float = 4.0
    seconds: float = 0.001
    columns: dict = field(default_factory=dict)
    entropy: float | None = None
    calls: list = field(default_factory=list)
    act: object = None  # called with the number of the call, before it answers
    seen: dict = field(default_factory=dict)

    def decode(self, prompts):
        self.calls.append(list(prompts))
        if self.act is not None:
            self.act(len(self.calls))
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt):
        i, asked = int(prompt[1:]), self.seen.get(prompt, 0)
        self.seen[prompt] = asked + 1
        right = self.right(i, asked) if callable(self.right) else self.right
        return Decoded(
            f"a{i}" if right else "wrong",
            (1, 2),
            self.nfe,
            self.nfe * 10,
            self.seconds,
            self.entropy,
        )


def fail_at(call, error):
    def act(count):
        if count == call:
            raise error

    return act


def by_name(found):
    return {row["name"]: row for row in found.rows}


# What is measured


def test_rows():
    half = Fake(
        "half",
        lambda i, _: i % 2 == 0,
        nfe=2,
        columns=dict(
            decoder="soft", model="m", setting="steps=2", family="diffusion", training="hard"
        ),
        entropy=0.5,
    )
    full = Fake("full", nfe=8, seconds=0.004)
    found = compare([half, full], questions(10), score, task="toy", seed=3, **QUIET)
    first, second = found.rows
    labels = dict(
        task="toy",
        model="m",
        decoder="soft",
        setting="steps=2",
        family="diffusion",
        training="hard",
        name="half",
        stage=None,
    )
    assert {key: first[key] for key in labels} == labels
    assert {k: second[k] for k in ("model", "decoder", "setting", "family", "seed")} == dict(
        model=None, decoder="full", setting="", family=None, seed=3
    )
    assert first["accuracy"] == 0.5 and second["accuracy"] == second["accuracy_high"] == 1
    assert second["accuracy_low"] == pytest.approx(10 / (10 + 1.96**2), abs=1e-4)  # Wilson's
    assert first["groups"] == 10
    assert first["accuracy_low"] < 0.5 < first["accuracy_high"]
    assert first["gain"] is first["gain_low"] is first["gain_high"] is None
    assert second["gain"] == 0.5 and 0 < second["gain_low"] < 0.5 < second["gain_high"] < 1
    assert (first["agreement"], second["agreement"]) == (1, 0.5)
    assert (
        first["nfe"],
        first["token_forwards"],
        first["entropy"],
        first["n"],
        first["repeats"],
    ) == (2, 20, 0.5, 10, 1)
    assert (second["nfe"], second["entropy"]) == (8, None)
    assert second["seconds"] == pytest.approx(0.04) and second["seconds_per_row"] == pytest.approx(
        0.004
    )
    assert second["tokens_per_s"] == pytest.approx(20 / 0.04)
    assert (first["tpf"], second["tpf"]) == (1, 0.25)  # two tokens in 2 and in 8 forwards
    assert first["aup"] == pytest.approx(50) and second["aup"] == pytest.approx(25)
    assert first["accuracy_sd"] is first["seconds_sd"] is None and first["complete"] is True
    assert (
        found.baseline == "half"
        and not found.interrupted
        and found.failures == []
        and found.left_out == []
    )


def test_repeats_have_a_spread_and_their_mean_counts():
    """Right on even rows, and in the second of three passes on all."""
    drawn = Fake("drawn", lambda i, asked: i % 2 == 0 or asked == 1)
    found = compare(
        {"drawn": drawn, "sure": Fake()}, questions(4), score, repeats=3, warmup=0, **QUIET
    )
    row, sure = found.rows
    passes = [0.5, 1.0, 0.5]
    assert row["accuracy"] == pytest.approx(np.mean(passes)) and row[
        "accuracy_sd"
    ] == pytest.approx(np.std(passes, ddof=1))
    assert row["repeats"] == 3 and row["n"] == 4 and sure["accuracy_sd"] == 0
    assert row["seconds"] == pytest.approx(0.004) and row["seconds_sd"] == pytest.approx(0)
    assert sure["agreement"] == pytest.approx(8 / 12) and sure["gain"] == pytest.approx(1 / 3)


def test_seconds_spread():
    slow = Fake(act=lambda count: setattr(slow, "seconds", count * 1.0))
    row = compare([slow], questions(2), score, repeats=3, warmup=0, **QUIET).rows[0]
    assert (row["seconds"], row["seconds_sd"], row["seconds_per_row"]) == (4, 2, 2)
    assert row["tokens_per_s"] == pytest.approx(12 / 12)


def test_turns_batches_and_warm_up():
    order = []
    a, b = (Fake(name, act=lambda _, name=name: order.append(name)) for name in "ab")
    found = compare([a, b], questions(5), score, batch_size=2, repeats=2, warmup=3, **QUIET)
    whole = [["q0", "q1"], ["q2", "q3"], ["q4"]]
    assert a.calls == b.calls == [["q0", "q1"], ["q2"], *whole, *whole]
    # each warms up right before its own first pass
    assert order == [*"aa", *"aaa", *"bb", *"bbb", *"aaabbb"]
    assert found.rows[0]["seconds"] == pytest.approx(0.005)
    cold = Fake()
    compare([cold], questions(3), score, warmup=0, **QUIET)
    assert cold.calls == [["q0", "q1", "q2"]]


def test_column():
    """A template is for those that fill masks: any column of that name was decoded by all."""
    data = questions(2, template=["q1", "q0"], other=["q1", "q1"])
    for column, prompts, filled in (
        (None, ["q0", "q1"], ["q1", "q0"]),
        ("prompt", ["q0", "q1"], ["q0", "q1"]),
        ("other", ["q1", "q1"], ["q1", "q1"]),
    ):
        fake, fills = Fake(), Fake("fills", columns=dict(family="diffusion"))
        compare([fake, fills], data, score, column=column, warmup=0, **QUIET)
        assert (fake.calls, fills.calls) == ([prompts], [filled])


def test_rows_as_a_list_of_dicts():
    data = questions(4)
    from_list, from_dataset = (
        compare([Fake("a", lambda i, _: i < 3)], rows, score, **QUIET)
        for rows in (data.to_list(), data)
    )
    assert from_list.rows == from_dataset.rows and from_list.rows[0]["accuracy"] == 0.75
    templates = Fake()
    compare([templates], [{"template": "q1", "answer": "a1"}], score, warmup=0, **QUIET)
    assert templates.calls == [["q1"]]


def test_a_scorer_that_writes_into_its_row():
    def pop(text, row):
        return float(text == row.pop("answer"))

    assert [
        row["accuracy"]
        for row in compare({"a": Fake(), "b": Fake()}, questions(3), pop, **QUIET).rows
    ] == [1, 1]


def test_entropy_of_the_rows_that_know_it():
    class Some(Fake):
        def answer(self, prompt):
            known = {"q0": 1.0, "q1": None, "q2": math.nan, "q3": 3.0}
            return replace(super().answer(prompt), entropy=known[prompt])

    assert compare([Some()], questions(4), score, **QUIET).rows[0]["entropy"] == 2


def test_agreement_is_of_texts_and_not_of_the_space_around_them():
    class Spaced(Fake):
        def answer(self, prompt):
            return replace(
                super().answer(prompt), text={"q0": " a0\n", "q1": "a 1", "q2": "a2"}[prompt]
            )

    assert compare([Fake("a"), Spaced("b")], questions(3), score, **QUIET).rows[1][
        "agreement"
    ] == pytest.approx(2 / 3)


def test_seconds_unknown():
    row = compare([Fake(seconds=0)], questions(4), score, **QUIET).rows[0]
    assert row["tokens_per_s"] is None and row["seconds"] == 0


# Intervals


def test_identical_decoders_gain_exactly_nothing():
    """And how sure that is depends on the number of rows: nobody won or lost a pair, as yet."""
    for repeats, n in itertools.product((1, 3), (5, 50)):
        draw = np.random.default_rng(0).random((50, 3))
        a, b = (Fake(name, lambda i, asked, draw=draw: draw[i, asked] < 0.3) for name in "ab")
        row = compare([a, b], questions(n), score, repeats=repeats, warmup=0, **QUIET).rows[1]
        assert (row["gain"], row["agreement"]) == (0, 1)
        assert row["gain_high"] == -row["gain_low"] == pytest.approx(1.96 * 2**0.5 / (n + 2), 1e-3)


def test_pairs_see_what_two_samples_cannot():
    """b is right wherever a is and on 8 more of 200 rows: far within either's own interval, and yet
    sure."""
    a, b = Fake("a", lambda i, _: i < 100), Fake("b", lambda i, _: i < 108)
    a_row, b_row = compare(
        [a, b], questions(200), score, bootstrap=2000, console=QUIET["console"]
    ).rows
    assert b_row["accuracy"] < a_row["accuracy_high"] and a_row["accuracy"] > b_row["accuracy_low"]
    assert (
        b_row["gain"] == pytest.approx(0.04)
        and 0.008 < b_row["gain_low"] < 0.022
        and 0.058 < b_row["gain_high"] < 0.075
    )
    swapped = by_name(compare([a, b], questions(200), score, baseline="b", **QUIET))["a"]
    assert swapped["gain"] == pytest.approx(-0.04) and swapped["gain_high"] < 0


def test_interval_of_a_known_case():
    """The mean of n fair coins: 1.96 standard errors on either side."""
    n = 400
    low, high = interval(bootstrap_means(np.arange(n)[:, None] % 2 * 1.0, 20_000)[:, 0], 0.5)
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / math.sqrt(n), abs=0.003)
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / math.sqrt(n), abs=0.003)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 120), st.integers(1, 3))
def test_every_interval_holds_its_mean(data, n, repeats):
    """To the last digit, or a plot has bars of negative length."""
    kind = data.draw(
        st.sampled_from([st.just(0.01), st.just(1 / 3), st.floats(0, 1), st.booleans()])
    )
    drawn = data.draw(st.lists(kind, min_size=n, max_size=n))
    which = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    rows = [row | dict(group=group) for row, group in zip(questions(n), which)]
    each = dict(zip((row["answer"] for row in rows), drawn))
    found = compare(
        [Fake("a"), Fake("b", lambda i, _: i % 2 == 0)],
        rows if data.draw(st.booleans()) else questions(n),
        lambda text, row: each[row["answer"]] if score(text, row) else drawn[0],
        repeats=repeats,
        **QUIET,
    )
    for row in found.rows:
        for key in ("accuracy", "gain"):
            if row[key] is not None:
                assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]


@pytest.mark.parametrize("n", [50, 100])
def test_a_plot_of_scores_that_are_all_alike(tmp_path, n):
    found = compare([Fake("a")], questions(n), lambda *_: 0.01, **QUIET)
    assert found.plot(tmp_path / "plot.png").is_file()


def test_coverage():
    """On simulated pairs the interval of the gain holds the true one about 95 times in 100, by
    resampling and by the formula for scores of 0 and 1."""
    rng, trials, n = np.random.default_rng(1), 600, 120
    hits = {"bootstrap": 0, "formula": 0}
    for trial in range(trials):
        hard = rng.random(n)  # a row's difficulty is shared, so the two are correlated
        a, b = (
            (hard + rng.normal(0, 0.1, n) < 0.5) * 1.0,
            (hard + rng.normal(0, 0.1, n) < 0.6) * 1.0,
        )
        low, high = interval(
            bootstrap_means((b - a)[:, None], 400, seed=trial)[:, 0], (b - a).mean()
        )
        hits["bootstrap"] += low <= 0.1 <= high
        low, high = gain_interval(b - a, np.arange(n))
        hits["formula"] += low <= 0.1 <= high
    assert all(0.92 < hit / trials < 0.975 for hit in hits.values()), hits


def simulated(rng, groups, size, p, correlation):
    """Rows of 0 and 1 in groups of about `size`: values [n], the number of each row's group [n].
    The share of rows that are right is p, and rows of a group are correlated so much."""
    sizes = rng.integers(size - size // 2, size + size // 2 + 1, groups)
    share = np.full(groups, p)
    if correlation:
        known = (1 - correlation) / correlation
        share = rng.beta(p * known, (1 - p) * known, groups)
    of_row = np.repeat(np.arange(groups), sizes)
    return (rng.random(len(of_row)) < share[of_row]) * 1.0, of_row


@pytest.mark.parametrize("correlation", [0, 0.3, 0.8])
@pytest.mark.parametrize("p", [0.5, 0.87, 0.97, 0.995])
@pytest.mark.parametrize("groups, size", [(99, 14), (20, 10), (60, 1)])
def test_groups_are_covered(groups, size, p, correlation):
    """Whatever rows of a group have in common, the intervals of an accuracy and of a paired gain
    hold the truth 95 times in 100, and seldom less often near 1, where a bootstrap of 20 rows that
    are all right says (1, 1)."""
    rng, trials, hits = np.random.default_rng(7), 400, np.zeros(3)
    for _ in range(trials):
        values, of_row = simulated(rng, groups, size, p, correlation)
        low, high = share_interval(values, of_row, len(values))
        hits[0] += low <= p <= high
        assert low < 1 and high > 0 and low < high
        # the other decoder is right on half of what this one is right on, and nowhere else
        other = values * (rng.random(groups) < 0.5)[of_row]
        low, high = gain_interval(other - values, of_row)
        hits[1] += low <= -p / 2 <= high
        hits[2] += share_interval(values, np.arange(len(values)), len(values))[0] <= p
    assert (hits[:2] / trials > 0.9).all(), hits / trials
    if size > 1 and correlation == 0.8 and p == 0.87:  # and taken one by one they are not covered
        assert hits[2] / trials < 0.9


@pytest.mark.parametrize("n", [1, 4, 20, 200])
def test_all_right_is_not_certain(n):
    """Wilson's interval of n of n, and the same of n groups however many rows they have: 20 of 20
    is (.83, 1), not (1, 1)."""
    low = n / (n + 1.959964**2)
    for p in (0.0, 1.0):
        ends = share_interval(np.full(n, p), np.arange(n), n)
        assert ends == pytest.approx((low, 1) if p else (0, 1 - low), abs=1e-6)
        if n > 1:
            groups = np.repeat(np.arange(n), 12)
            wide = share_interval(np.full(12 * n, p), groups, 12 * n)
            inner = abs(wide[0] - wide[1])
            assert 1 - low - 1e-9 <= inner < min(1, 1.4 * (1 - low) + 1.2 * (n == 4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40), st.data())
def test_intervals_of_groups(rows, data):
    """Copies of a row in its group tell nothing new; a group of its own for each row is Wilson's;
    neither the order of the rows nor the groups' names count; wrong for right mirrors it all."""
    groups, right = np.array([g for g, _ in rows]), np.array([r for _, r in rows]) * 1.0
    n = len(rows)
    of = share_interval(right, groups, n)
    order = np.array(data.draw(st.permutations(range(n))))
    assert share_interval(right[order], 9 - groups[order], n) == pytest.approx(of)
    assert share_interval(1 - right, groups, n) == pytest.approx((1 - of[1], 1 - of[0]))
    doubled = share_interval(np.tile(right, 2), np.tile(groups, 2), 2 * n)
    assert doubled == pytest.approx(share_interval(np.tile(right, 3), np.tile(groups, 3), 3 * n))
    gain = gain_interval(right, groups)
    assert gain_interval(-right, groups) == pytest.approx((-gain[1], -gain[0]))
    assert gain[0] <= right.mean() or gain[1] >= right.mean()


def test_groups_of_rows():
    """Of Task and of own rows: drawn together in every interval, also when decoders are matched;
    a row without one stands alone."""
    assert number_groups(["a", None, "b", "a", None]).tolist() == [0, 1, 2, 0, 3]
    decoders = [Fake("a", lambda i, _: i % 12 < 6), Fake("b", lambda i, _: i % 12 < 9)]
    rows = {
        name: compare(decoders, questions(120, **columns), score, group=group, **QUIET)
        for name, columns, group in (
            ("alone", {}, None),
            ("together", {"group": [i % 12 for i in range(120)]}, None),
            ("named", {"multiset": [[i % 12] for i in range(120)]}, "multiset"),
        )
    }
    assert [found.rows[0]["groups"] for found in rows.values()] == [120, 12, 12]
    assert rows["together"].rows == rows["named"].rows

    def width(row, key):
        return row[f"{key}_high"] - row[f"{key}_low"]

    for key, i in (("accuracy", 0), ("accuracy", 1), ("gain", 1)):
        assert width(rows["together"].rows[i], key) > 2 * width(rows["alone"].rows[i], key)
    matched = rows["together"].matched()
    assert [row["accuracy_low"] for row in matched.rows] == [
        row["accuracy_low"] for row in rows["together"].rows
    ]
    graded = compare(
        decoders, questions(120, group=[i % 12 for i in range(120)]), graded_score, **QUIET
    )
    alone = compare(decoders, questions(120), graded_score, **QUIET)
    assert width(graded.rows[0], "accuracy") > 2 * width(alone.rows[0], "accuracy")
    text = StringIO()
    Console(file=text, width=100).print(rows["together"].table())
    assert "120 rows in 12 groups" in text.getvalue()
    with pytest.raises(ValueError, match="group='nobody' is no column: row 0 has"):
        compare(decoders, questions(4), score, group="nobody", **QUIET)


def graded_score(text, row):
    return 0.75 if text == row["answer"] else 0.25


def test_repeats_count_as_verdicts():
    """Asking the same rows again tells less than new rows, and no less than asking once."""
    draw = np.random.default_rng(0).random((100, 8))
    widths = {}
    for repeats in (1, 8):
        fake = Fake("a", lambda i, asked: draw[i, asked] < 0.5)
        row = compare([fake], questions(100), score, repeats=repeats, warmup=0, **QUIET).rows[0]
        widths[repeats] = row["accuracy_high"] - row["accuracy_low"]
    assert widths[8] < 0.6 * widths[1] and widths[8] > widths[1] / 8


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, math.nan]), st.sampled_from([0.0, 0.5, 1.0])),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 5),
)
def test_bootstrap_means_are_means_of_the_known(rows, seed):
    values = np.array(rows)
    means = bootstrap_means(values, 50, seed)
    assert means.shape == (50, 2) and np.isfinite(means[:, 1]).all()
    known = means[np.isfinite(means)]
    assert ((known >= 0) & (known <= 1)).all()
    assert np.array_equal(means, bootstrap_means(values, 50, seed), equal_nan=True)
    # the columns share their draws
    again = bootstrap_means(np.concatenate([values, values], 1), 50, seed)
    assert np.allclose(again[:, :2], again[:, 2:], equal_nan=True)
    if np.isnan(values[:, 0]).all():
        assert interval(means[:, 0], None) == (None, None)


def test_seed_of_the_bootstrap(monkeypatch):
    def gain(seed):
        a, b = Fake("a", lambda i, _: i % 3 == 0), Fake("b", lambda i, _: i % 4 > 0)
        row = compare([a, b], questions(37), graded_score, seed=seed, **QUIET).rows[1]
        return row["gain_low"], row["gain_high"], row["accuracy_low"]

    assert gain(1) == gain(1) != gain(2)
    values = np.random.default_rng(0).random((2000, 1))  # takes several chunks of draws
    means = bootstrap_means(values, 3000)[:, 0]
    assert len(set(means)) == 3000 and means.std() == pytest.approx(
        values.std() / math.sqrt(2000), rel=0.1
    )


# Failures


def test_scorer_failures():
    def picky(text, row):
        bad = {
            "a1": lambda: 1 / 0,
            "a3": lambda: math.nan,
            "a4": lambda: None,
            "a5": lambda: "1",
            "a6": lambda: math.inf,
            "a8": lambda: -1e308,
        }
        return bad.get(row["answer"], lambda: text == row["answer"])()

    err = StringIO()
    a, b = Fake("a", lambda i, _: i % 2 == 0), Fake("b")
    found = compare(
        [a, b], questions(9), picky, repeats=2, bootstrap=200, console=Console(file=err, width=200)
    )
    failures = found.scorer_failures
    assert [(f.row, f.decoder) for f in failures] == [
        (i, name) for name in "ab" for i in (1, 3, 4, 5, 6, 8)
    ]
    assert failures[0] == Failure(1, "a", "ZeroDivisionError: division by zero")
    assert "nan" in failures[1].message and "'1'" in failures[3].message
    row_a, row_b = found.rows
    # right are rows 0 and 2, and with b row 7
    assert (row_a["n"], row_a["accuracy"]) == (9, pytest.approx(2 / 9))
    assert row_b["gain"] == pytest.approx(1 / 9) and row_a["complete"] and row_b["complete"]
    assert found.failures == [] and err.getvalue().count("failed") == 1
    said = "the scorer failed on 12 answers, which count 0"
    assert f"{said}; first a, row 1: ZeroDivisionError" in err.getvalue() and said in str(found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_a_scorer_that_fails_where_others_say_0_gives_the_same_rows(right):
    """As `float(text.split()[-1]) == row["answer"]` does on an answer that ends in no number."""

    def strict(text, row):
        if not score(text, row):
            raise ValueError("no number in it")
        return 1

    made = [
        compare([Fake("a"), Fake("b", lambda i, _: right[i])], questions(len(right)), each, **QUIET)
        for each in (score, strict)
    ]
    plain, failing = ([{k: row[k] for k in TOLD} for row in found.rows] for found in made)
    assert plain == failing and len(made[1].scorer_failures) == right.count(False)


def test_gain_is_over_the_rows_that_both_have():
    """b answers where a is right, and fails elsewhere, so that the accuracies differ by more than the
    gain."""

    class Fails(Fake):
        def decode(self, prompts):
            found = super().decode(prompts)
            raise Unfinished("gone", {i: found[i] for i in (1, 3)})

    a, b = Fake("a", lambda i, _: i % 2 == 1), Fails("b")
    found = compare([a, b], questions(4), score, warmup=0, console=QUIET["console"])
    row_a, row_b = found.rows
    assert (row_a["accuracy"], row_b["accuracy"], row_b["n"]) == (0.5, 1, 2)
    assert row_b["gain"] == 0 and len(found.failures) == 1


def test_every_score_fails():
    with pytest.raises(
        ValueError, match=r"scorer failed on every row, first: a, row 0: KeyError: 'gold'"
    ):
        compare([Fake("a"), Fake("b")], questions(3), lambda _, row: row["gold"], **QUIET)


def test_all_scores_of_one_decoder_fail(tmp_path):
    found = compare(
        [Fake("a"), Fake("b", False)],
        questions(3),
        lambda t, _: {"wrong": math.nan}.get(t, 1.0),
        **QUIET,
    )
    row = found.rows[1]
    assert [row[k] for k in ("n", "accuracy", "accuracy_low", "gain")] == [3, 0, 0, -1]
    assert {f.decoder for f in found.scorer_failures} == {"b"}
    found.save(tmp_path)
    strict_json((tmp_path / "results.json").read_text())
    found.plot(tmp_path / "plot.png")
    assert "b" in shown(found)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r: r[:-1],
        lambda r: [*r, r[0]],
        lambda r: [],
        lambda r: None,
        lambda r: [d.text for d in r],
    ],
)
def test_decoder_that_gives_something_else(wrong):
    class Wrong(Fake):
        def decode(self, prompts):
            return wrong(super().decode(prompts))

    found = compare([Wrong("bad"), Fake("good")], questions(5), score, **QUIET)
    assert [f.decoder for f in found.failures] == ["bad"] and found.failures[0].row is None
    assert [row["name"] for row in found.rows] == ["good"] and found.left_out == ["bad"]
    assert (
        found.baseline is None
        and found.rows[0]["gain"] is None
        and found.rows[0]["agreement"] is None
    )


def test_wrong_number_names_both():
    class Short(Fake):
        def decode(self, prompts):
            return super().decode(prompts)[:-1]

    message = compare([Short("bad"), Fake()], questions(5), score, **QUIET).failures[0].message
    assert "4 results for 5 prompts" in message


@pytest.mark.parametrize("call,left", [(1, None), (2, None), (3, 2), (4, 4)])
def test_decoder_fails_midway(call, left):
    """warm-up, first batch, second batch, second pass: the rows that are left; the good one is
    never disturbed."""
    bad, good = Fake("bad", act=fail_at(call, RuntimeError("boom\nat once"))), Fake("good")
    found = compare(
        [bad, good],
        questions(4),
        score,
        batch_size=2,
        warmup=1,
        repeats=2,
        baseline="good",
        **QUIET,
    )
    rows = by_name(found)
    assert (
        found.failures == [Failure(None, "bad", "RuntimeError: boom at once")]
        and not found.interrupted
    )
    assert rows["good"]["repeats"] == 2 and rows["good"]["complete"] and len(good.calls) == 5
    assert len(bad.calls) == call
    if left is None:
        assert "bad" not in rows and found.left_out == ["bad"]
    else:
        assert (rows["bad"]["n"], rows["bad"]["complete"], rows["bad"]["repeats"]) == (
            left,
            left == 4,
            1,
        )
        assert rows["bad"]["gain"] == 0


def test_all_decoders_fail():
    """An error that names the first, not an empty table; what Ctrl-C leaves is one."""
    decoders = [Fake(name, act=fail_at(1, OSError(f"{name} gone"))) for name in "ab"]
    with pytest.raises(NoAnswers, match="every decoder failed, first: a: OSError: a gone"):
        compare(decoders, questions(4), score, **QUIET)


# Ctrl-C


def test_interrupted_midway():
    """After b's first batch of its first pass: a is whole, b has its rows, c was never asked."""
    a, b, c = (
        Fake("a"),
        Fake("b", lambda i, _: i > 0, act=fail_at(3, KeyboardInterrupt())),
        Fake("c"),
    )
    found = compare([a, b, c], questions(6), score, batch_size=2, warmup=1, **QUIET)
    assert found.interrupted and found.left_out == ["c"] and found.failures == []
    rows = by_name(found)
    assert list(rows) == ["a", "b"]
    assert (rows["a"]["n"], rows["a"]["complete"], rows["b"]["n"], rows["b"]["complete"]) == (
        6,
        True,
        2,
        False,
    )
    assert (
        rows["b"]["gain"] == -0.5
        and rows["b"]["agreement"] == 0.5
        and rows["b"]["seconds"] == pytest.approx(0.002)
    )
    assert "interrupted" in shown(found) and "cut short" in shown(found)


def test_interrupted_in_a_later_repeat_counts_the_whole_ones():
    """b gets all wrong in its second pass, which is cut short: its accuracy is that of the
    first."""
    a, b = Fake("a"), Fake("b", lambda _, asked: asked == 0, act=fail_at(6, KeyboardInterrupt()))
    found = compare([a, b], questions(6), score, batch_size=2, warmup=0, repeats=2, **QUIET)
    rows = by_name(found)
    assert found.interrupted and (rows["a"]["repeats"], rows["b"]["repeats"]) == (2, 1)
    assert rows["b"]["accuracy"] == 1 and rows["b"]["complete"] and rows["b"]["accuracy_sd"] is None
    assert (
        len(found.passes["b"]) == 2
        and sum(a is not None for a in found.passes["b"][1].answers) == 4
    )


def test_interrupted_while_scoring(tmp_path):
    """In row 2 of 4: two have a score, and the texts of all four are kept."""
    asked = itertools.count()

    def slow(text, row):
        if next(asked) == 2:
            raise KeyboardInterrupt
        return score(text, row)

    found = compare([Fake("a"), Fake("b")], questions(4), slow, **QUIET)
    (row,) = found.rows
    assert (
        found.interrupted
        and (row["name"], row["n"], row["complete"]) == ("a", 2, False)
        and found.failures == []
    )
    found.save(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [1, 1, None, None] and lines[3]["text"] == "a3"


def test_interrupted_in_the_warm_up_of_a_later_decoder():
    """What those before it did is kept: none warms up before its turn."""
    found = compare(
        [Fake("a"), Fake("b", act=fail_at(1, KeyboardInterrupt()))], questions(4), score, **QUIET
    )
    assert found.interrupted and found.left_out == ["b"]
    assert [(row["name"], row["n"], row["complete"]) for row in found.rows] == [("a", 4, True)]


def test_interrupted_in_the_warm_up():
    found = compare([Fake("a", act=fail_at(1, KeyboardInterrupt()))], questions(4), score, **QUIET)
    assert found.interrupted and found.rows == [] and found.left_out == ["a"]


def test_interrupted_before_any_score_succeeded():
    """Not the error of a scorer that fails on every row: the rest was not tried."""
    bad = Fake("a", act=fail_at(3, KeyboardInterrupt()))
    found = compare([bad], questions(4), lambda *_: 1 / 0, batch_size=2, warmup=1, **QUIET)
    assert (
        found.interrupted
        and [f.row for f in found.scorer_failures] == [0, 1]
        and found.rows[0]["accuracy"] == 0
    )


def test_interrupted_before_the_first_score():
    def stop(text, row):
        raise KeyboardInterrupt

    found = compare([Fake("a")], questions(4), stop, **QUIET)
    assert found.interrupted and found.rows == [] and len(found.passes["a"][0].answers) == 4
    assert found.matched().rows == []


# Bad input


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(decoders={}), "decoders is empty"),
        (dict(decoders=[Fake("x"), Fake("x")]), "two decoders are called 'x'"),
        (dict(decoders=[Fake("x"), object()]), r"decoders\[1\] has no name"),
        (dict(rows=questions(0)), "the dataset is empty"),
        (dict(baseline="nobody"), r"baseline='nobody' is unknown: choose one of \['a'\]"),
        (dict(column="text"), r"column='text' is missing: row 0 has \['prompt', 'answer'\]"),
        (
            dict(rows=[{"prompt": "q0"}, {"text": "q1"}]),
            r"column='prompt' is missing: row 1 has \['text'\]",
        ),
        (dict(rows=[]), "the dataset is empty"),
        (dict(rows=["q0"]), r"rows\[0\]='q0' must be a dict, column -> value"),
        (dict(rows="q0"), "rows is a str: give a datasets.Dataset or a list of dicts"),
        (dict(rows=Dataset.from_dict({"question": ["q1"]})), "column='prompt' is missing"),
        (dict(repeats=0), "repeats=0 must be at least 1"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
        (dict(warmup=-1), "warmup=-1 must be at least 0"),
        (dict(bootstrap=0), "bootstrap=0 must be at least 1"),
    ],
)
def test_bad_input(change, message):
    fake = Fake("a")
    with pytest.raises(ValueError, match=message):
        compare(**dict(decoders=[fake], rows=questions(2), score=score, **QUIET) | change)
    assert fake.calls == []


def test_a_decoder_need_not_have_a_name():
    class Bare:
        def decode(self, prompts):
            return Fake().decode(prompts)

    for bare in (Bare(), Bare().decode, lambda prompts: Fake().decode(prompts)):
        (row,) = compare({"bare": bare}, questions(2), score, **QUIET).rows
        assert (row["name"], row["decoder"], row["accuracy"]) == ("bare", "bare", 1)


@pytest.mark.parametrize("wrong", ["soft", None, Fake, {"decode": 1}])
def test_what_decodes_nothing_is_named(wrong):
    with pytest.raises(ValueError, match=r"decoders\['mine'\]=.* give decode\(prompts\)"):
        compare({"mine": wrong}, questions(2), score, **QUIET)


# Matched budgets


def grid(**accuracies):
    """Decoders "hard" and "soft" at 2, 4 and 8 forwards; soft is right on one more row in ten at
    each."""
    made = []
    for decoder, extra in (("hard", 0), ("soft", 1)):
        # the middle one is the best: it must not be picked for that
        for steps, right in ((8, 6), (2, 2), (4, 9)):
            columns = dict(decoder=decoder, model="m", setting=f"steps={steps}")
            made.append(
                Fake(
                    f"{decoder} {steps}",
                    lambda i, _, k=right + extra: i % 10 < k,
                    nfe=steps,
                    columns=columns,
                )
            )
    return made


def test_matched():
    found = compare(
        [*grid(), Fake("beam", nfe=30, columns=dict(decoder="beam", model="m"))],
        questions(20),
        score,
        warmup=0,
        **QUIET,
    )
    assert found.baseline == "hard 8"

    def picks(**how):
        return [row["name"] for row in found.matched(**how).rows]

    assert picks(by="nfe", budget=8) == ["hard 8", "soft 8"] and picks(budget=7.9) == [
        "hard 4",
        "soft 4",
    ]
    assert picks(by="token_forwards", budget=79) == ["hard 4", "soft 4"] and picks() == [
        "hard 8",
        "soft 8",
        "beam",
    ]
    four = found.matched("nfe", 5)
    assert (
        isinstance(four, Comparison) and four.left_out == ["m=beam"] and four.baseline == "hard 4"
    )
    hard, soft = four.rows  # over the baseline's decoder at this budget, not over "hard 8"
    assert (
        hard["gain"] is None
        and soft["gain"] == pytest.approx(0.1)
        and soft["gain_low"] <= 0.1 <= soft["gain_high"]
    )
    assert by_name(found)["soft 4"]["gain"] == pytest.approx(0.4)
    assert (soft["accuracy"], soft["nfe"], soft["setting"]) == (1, 4, "steps=4")
    nothing = found.matched("nfe", 1)
    assert (
        nothing.rows == []
        and nothing.left_out == ["m=hard", "m=soft", "m=beam"]
        and nothing.baseline is None
    )
    assert len(found.rows) == 7 and found.left_out == []  # itself unchanged


def test_matched_without_the_baseline():
    cheap = Fake("cheap", nfe=1, columns=dict(decoder="cheap", model=None))
    broken = Fake("broken", act=fail_at(1, RuntimeError("x")))
    found = compare([Fake("dear", nfe=9), cheap, broken], questions(4), score, **QUIET).matched(
        "nfe", 3
    )
    assert [row["name"] for row in found.rows] == ["cheap"] and found.left_out == ["broken", "dear"]
    assert (
        found.baseline is None
        and found.rows[0]["gain"] is None
        and found.rows[0]["agreement"] is None
    )


def test_matched_tells_models_apart_and_skips_what_was_cut_short():
    def of(model, steps, act=None):
        return Fake(
            f"{model} {steps}", nfe=steps, act=act, columns=dict(decoder="hard", model=model)
        )

    made = [of("m", 2), of("n", 2), of("m", 3), of("n", 4, fail_at(3, RuntimeError("x")))]
    found = compare(made, questions(4), score, warmup=1, batch_size=2, **QUIET)
    assert [row["name"] for row in found.matched("nfe", 4).rows] == ["n 2", "m 3"]
    assert len(found.rows) == 4 and not by_name(found)["n 4"]["complete"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=6), st.floats(0.1, 120))
def test_matched_picks_the_dearest_inside(costs, budget):
    made = [Fake(str(i), nfe=cost, columns=dict(decoder="d")) for i, cost in enumerate(costs)]
    found = compare(made, questions(2), score, bootstrap=10, console=QUIET["console"]).matched(
        "nfe", budget
    )
    inside = [cost for cost in costs if cost <= budget]
    assert [row["nfe"] for row in found.rows] == ([max(inside)] if inside else [])
    assert found.left_out == ([] if inside else ["d"])


@pytest.mark.parametrize("how", [dict(by="seconds"), dict(budget=0), dict(budget=math.nan)])
def test_matched_bad_input(how):
    with pytest.raises(ValueError, match=r"by='seconds' is unknown|budget="):
        compare([Fake()], questions(2), score, **QUIET).matched(**how)


# What it costs


def test_overhead_of_200_rows():
    """10 ms a row; SmolLM2-135M takes about a second on a CPU. A second and third try on a busy
    machine."""

    def overhead():
        waiting = Fake(act=lambda _: time.sleep(0.5))
        return compare(
            [waiting], questions(200), score, batch_size=50, warmup=0, console=QUIET["console"]
        ).overhead

    assert any(0 < overhead() < 0.02 for _ in range(3))


def test_overhead_is_what_is_not_decoding():
    def slow(text, row):
        time.sleep(0.01)
        return 1.0

    # 4 x 10 ms of scoring beside 40 ms of decoding; the warm-up, 200 ms, is on neither side
    fake = Fake(act=lambda count: time.sleep(0.2 if count == 1 else 0.04))
    assert 0.4 < compare([fake], questions(4), slow, **QUIET).overhead < 0.75


# What is left behind


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def shown(found, width=200):
    console = Console(width=width, file=StringIO())
    console.print(found.table())
    return console.file.getvalue()


def test_save(tmp_path):
    def picky(text, row):
        return math.nan if row["answer"] == "a1" else score(text, row)

    a, b = Fake("a"), Fake('b, "x"\n', lambda i, asked: asked == 1, entropy=0.25)
    found = compare([a, b], questions(3), picky, repeats=2, warmup=0, **QUIET)
    folder = found.save(tmp_path / "new" / "place")
    assert {f.name for f in folder.iterdir()} == {
        "results.json",
        "results.csv",
        "rows.jsonl",
        "failures.jsonl",
    }
    content = strict_json((folder / "results.json").read_text())
    assert content["rows"] == found.rows and content["schema"] == 1
    with open(folder / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["a", 'b, "x"\n'] and list(lines[0]) == list(
        found.rows[0]
    )
    assert float(lines[1]["accuracy"]) == found.rows[1]["accuracy"] and lines[0]["gain"] == ""
    answers = [strict_json(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [(x["decoder"], x["repeat"], x["row"]) for x in answers] == [
        (name, r, i) for name in ("a", b.name) for r in range(2) for i in range(3)
    ]
    assert [x["score"] for x in answers] == [1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0, 1]
    assert answers[6] == dict(
        row=0, decoder=b.name, repeat=0, text="wrong", score=0, num_forwards=4, seconds=0.001
    )
    failures = [strict_json(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert [(f["row"], f["decoder"]) for f in failures] == [(1, "a"), (1, b.name)]
    compare([a], questions(3), score, **QUIET).save(folder)
    assert not (folder / "failures.jsonl").exists()


def test_files_are_whole(tmp_path, monkeypatch):
    """What cannot be written leaves the earlier file as it was."""
    found = compare([Fake()], questions(3), score, **QUIET)
    found.save(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    found.passes["fake"][0].answers[2] = replace(
        found.passes["fake"][0].answers[2], text=b"no JSON"
    )
    with pytest.raises(TypeError):
        found.save(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_to_pandas():
    frame = compare([Fake("a"), Fake("b")], questions(3), score, **QUIET).to_pandas()
    assert list(frame["name"]) == ["a", "b"] and frame["accuracy"].tolist() == [1, 1]


def test_table():
    a = Fake("[red]a[/red]", lambda i, _: i % 2 == 0, nfe=12345, seconds=0.0123, entropy=1.234)
    found = compare([a, Fake("b")], questions(10), score, task="toy", **QUIET)
    text = shown(found)
    for part in (
        "[red]a[/red]",
        "toy, 10 rows",
        "0.500",
        "+0.500",
        "12345",
        "12.3",
        "1.23",
        "gain over [red]a[/red]",
        "agree",
    ):
        assert part in text, part
    row = found.rows[1]
    assert text.count("[red]a[/red]") == 2  # its line and the note below
    assert f"{row['gain_low']:+.3f}…{row['gain_high']:+.3f}" in text
    assert comparison_table([]).row_count == 0


def of_model(name, model, **more):
    decoder = name.rpartition("=")[2].split()[0]
    return Fake(name, columns=dict(decoder=decoder, model=model, setting=""), **more)


def test_a_table_says_the_model_once():
    """Beside each name where there are several models, in the title where all rows share one; the
    rows keep theirs."""
    names = ["m-tiny=hard steps=4", "m-tiny=soft", "n-tiny=soft", "free"]
    made = [of_model(name, "n-tiny" if name.startswith("n") else "m-tiny") for name in names]
    several = compare(made, questions(4), score, task="toy", **QUIET)
    assert [row["name"] for row in several.rows] == names
    text = shown(several)
    assert [line.split("  ")[0].strip() for line in text.splitlines()[5:-2]] == [
        "hard steps=4",
        "m-tiny",
        "soft",
        "m-tiny",
        "soft",
        "n-tiny",
        "free",
        "m-tiny",
    ]
    assert text.splitlines()[0].strip() == "toy, 4 rows" and "gain over m-tiny=hard steps=4" in text
    text = shown(compare(made[:2], questions(4), score, task="toy", **QUIET))
    assert text.splitlines()[0].strip() == "toy, m-tiny, 4 rows" and text.count("m-tiny") == 1
    assert "gain over hard steps=4" in text


def test_names_that_would_become_alike_stay_as_they_are():
    found = compare([of_model("m=soft", "m"), of_model("soft", "m")], questions(2), score, **QUIET)
    assert [row["name"] for row in found.shown()] == ["m=soft", "soft"]
    assert all("m=soft" in text for text in (shown(found), "; ".join(found.notes())))


def test_table_of_several_models_fits_84_columns():
    """Names wrap, numbers do not; the rows are counted one by one where they differ."""
    long = dict(
        accuracy=0.1234,
        gain=-0.1234,
        nfe=1234.5,
        token_forwards=123456,
        tokens_per_s=12345,
        entropy=1.5,
        seconds_per_row=1.2345,
        agreement=0.5,
        n=1000,
        task="",
        gain_low=-0.2,
        gain_high=-0.1,
    )
    rows = [
        point("self-consistency votes=8 temperature=1.0", 1, 0.5, model=name) | long
        for name in ("m", "other")
    ]
    table = comparison_table(rows)
    out = Console(width=84, file=StringIO())
    out.print(table)
    text = out.file.getvalue()
    for part in ("0.123", "-0.200…-0.100", "1234", "123456", "12345", "1.50", "other", "1000 rows"):
        assert part in text, part
    assert all(len(line) <= 84 for line in text.splitlines())
    out.print(comparison_table([rows[0], rows[1] | dict(n=7, complete=False)]))
    last = out.file.getvalue().removeprefix(text)
    assert " 7 " in last and "1000 rows" not in last and "cut" in last


def point(name, nfe, accuracy, **more):
    return (
        dict(
            name=name,
            decoder=name.split()[0],
            model=None,
            setting=" ".join(name.split()[1:]),
            nfe=nfe,
            seconds_per_row=nfe * 0.01,
            accuracy=accuracy,
            accuracy_low=accuracy and accuracy - 0.03,
            accuracy_high=accuracy and accuracy + 0.03,
            complete=True,
        )
        | more
    )


def test_frontier():
    rows = [
        point("a", 1, 0.2),
        point("b", 2, 0.1),
        point("c", 2, 0.5),
        point("d", 4, 0.5),
        point("e", 4, 0.9),
        point("twin", 4, 0.9),
        point("f", 3, None),
        point("g", 0, 1.0),
        point("h", 1, 0.95, complete=False),
        point("as good", 3, 0.5),
    ]
    assert [row["name"] for row in frontier(rows, "nfe")] == ["a", "c", "e", "twin"]


def test_the_frontier_knows_ties():
    """A row that ended a step earlier makes no decoder cheaper; of equals at equal cost both stay."""
    rows = [point("k-samples", 4.993, 0.767), point("soft", 5.0, 0.985), point("too", 5.01, 0.985)]
    assert [row["name"] for row in frontier(rows, "nfe")] == ["soft", "too"]
    best = frontier([point("cheap", 4.9, 0.7), *rows], "nfe")
    assert [row["name"] for row in best] == ["cheap", "soft", "too"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=12))
def test_frontier_climbs(points):
    best = frontier([point(str(i), x, y / 5) for i, (x, y) in enumerate(points)], "nfe")
    assert all(
        p["nfe"] <= q["nfe"] and p["accuracy"] <= q["accuracy"] for p, q in itertools.pairwise(best)
    )
    for x, y in points:
        assert any(p["nfe"] <= x and p["accuracy"] >= y / 5 for p in best)


def test_files_that_cannot_be_written_are_named(tmp_path):
    found = compare([Fake("a")], questions(3), score, **QUIET)
    (tmp_path / "taken").write_text("x")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(ValueError, match=f"folder='{folder}' cannot be written"):
            found.save(folder)
    for name in ("plot.zzz", "plot", "plot."):
        with pytest.raises(ValueError, match=rf"{name}': plots are written as .png, .pdf or .svg"):
            found.plot(tmp_path / name)
    with pytest.raises(ValueError, match=r"the folder of file='.*taken' cannot be written"):
        found.plot(tmp_path / "taken" / "plot.png")
    assert found.plot(tmp_path / "new" / "plot.SVG").is_file()
    assert not [*tmp_path.glob("plot*")]


def test_plot(tmp_path, monkeypatch):
    """What is drawn, read off the axes: a line for each decoder by cost, intervals, rings round the
    frontier."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    rows = [
        point("soft steps=8", 8, 0.9),
        point("soft steps=2", 2, 0.6),
        point("hard steps=8", 8, 0.7),
        point("hard steps=2", 2, 0.3),
        point("slow", 5, 0.2, seconds_per_row=0.0),
    ]
    file = plot_frontier(rows, tmp_path / "plot.png", "toy")
    assert file.read_bytes().startswith(b"\x89PNG")
    (figure,) = kept
    assert figure.get_suptitle() == "toy" and len(figure.axes) == 2
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "soft: steps=2, 8",
        "hard: steps=2, 8",
        "slow",
        "frontier: nothing as cheap is more accurate",
    ]
    forwards, seconds = figure.axes
    assert forwards.get_xscale() == seconds.get_xscale() == "log"
    soft = next(line for line in forwards.lines if list(line.get_ydata()) == [0.6, 0.9])
    assert list(soft.get_xdata()) == [2, 8]
    rings = [line for line in forwards.lines if line.get_markersize() == 12]
    assert [list(line.get_ydata()) for line in rings] == [[0.6, 0.9]] and len(
        forwards.collections
    ) == 3
    assert len(seconds.collections) == 2  # the third has no time, and a log axis no zero
    spans = [segment[:, 1].tolist() for segment in forwards.collections[0].get_segments()]
    assert np.allclose(spans, [[0.57, 0.63], [0.87, 0.93]])
    # no point is moved, and of two at one place the later is smaller
    assert {x for line in forwards.lines for x in line.get_xdata()} == {2, 5, 8}
    size = {tuple(line.get_ydata()): line.get_markersize() for line in forwards.lines}
    assert size[0.3, 0.7] == 6 and size[0.2,] == 4
    monkeypatch.undo()
    plt.close(figure)


def test_legend():
    def label(*settings, training=None, **more):
        rows = [
            point("d", i + 1, 0.5, setting=setting, **more) for i, setting in enumerate(settings)
        ]
        return legend_label("soft", "m", training, rows)

    assert label("") == "m=soft" and label("steps=8") == "m=soft: steps=8"
    assert (
        label("votes=2 temperature=1", "votes=4 temperature=1")
        == "m=soft: votes=2, 4, temperature=1"
    )
    assert label("a=1", "b=2") == "m=soft: a=1, b=2"
    assert label("steps=1", training="duo") == "m=soft (model trained for duo): steps=1"
    assert label(*(f"k={i}" for i in range(9))) == "m=soft: k=0, 1, 2, …, 7, 8"
    assert label("k=1", complete=False).endswith("(hollow: cut short)")


def test_a_legend_names_one_decoder_once(tmp_path, monkeypatch):
    """Not "hard, m-tiny, soft-mask" for a decoder and what its model was trained for."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    rows = [
        point("hard steps=2", 2, 0.3, model="m", training="soft-mask"),
        point("soft-mask steps=2", 2, 0.5, model="m", training="soft-mask"),
        point("discrete", 5, 0.9, model="n"),
    ]
    plot_frontier(rows, tmp_path / "plot.png")
    labels = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert labels[:3] == ["m=hard: steps=2", "m=soft-mask: steps=2", "n=discrete"]
    monkeypatch.undo()
    plt.close(kept[0])


def test_printed_it_is_its_table():
    found = compare([Fake("a"), Fake("b")], questions(10), score, task="toy", **QUIET)
    assert str(found) == repr(found) == f"{found}"
    assert "toy, 10 rows" in str(found) and "gain over a" in str(found) and "1.000" in str(found)
    assert max(map(len, str(found).splitlines())) <= 100


def test_what_a_decoder_finished_before_it_failed_counts():
    class Dies(Fake):
        def decode(self, prompts):
            found = super().decode(prompts)
            raise Unfinished("the server went away", {0: found[0], 2: found[2]})

    found = compare(
        {"a": Fake("a"), "b": Dies("b")}, questions(4), score, warmup=0, console=QUIET["console"]
    )
    rows = {row["name"]: row for row in found.rows}
    assert (rows["b"]["n"], rows["b"]["complete"], rows["a"]["n"]) == (2, False, 4)
    assert [f.decoder for f in found.failures] == ["b"] and "went away" in found.failures[0].message


def test_an_answer_that_cannot_be_read_out_of_one_text_leaves_the_rest():
    def extract(text):
        if text == "a1":
            raise IndexError("no answer in it")
        return text

    found = compare([Fake("a"), Fake("b")], questions(4), score, extract=extract, **QUIET)
    assert [row["n"] for row in found.rows] == [4, 4] and {f.row for f in found.failures} == {1}


@pytest.mark.parametrize("text", ["", " \n", "a0"])
def test_decoders_that_answer_nothing_are_named(text):
    def speak(prompts):
        return [Decoded(text, (1,), 1, 1, 0.001) for _ in prompts]

    found = compare({"speak": speak, "other": Fake()}, questions(3), score, **QUIET)
    assert ("all answers are empty: speak" in found.notes()) == (not text.strip())
