"""The tasks: nothing held out is seen in training, gold is gold, and the traces are the oracle's
distribution."""

import builtins
import hashlib
import itertools
import json
from collections import Counter
from fractions import Fraction

import pytest
import torch

from softar.models import load
from softar.sft.data import frontier
from softar.soft import dense
from softar.tasks import MODELS, freeze, latin, load_task, mnns, no_thought, thaw


@pytest.fixture(scope="module")
def task():
    return load_task("mnns")


@pytest.fixture(scope="module")
def tokenizer():
    return load("mnns-tiny")[1]


def row_of(task, digits):
    return next(r for rows in (task.train, task.test) for r in rows if r["digits"] == digits)


# MNNS


def test_mnns_split_is_by_multiset_and_pinned(task):
    bags = [{tuple(sorted(d)) for d in rows["digits"]} for rows in (task.train, task.test)]
    assert not bags[0] & bags[1]
    assert [len(b) for b in bags] == [396, 99]
    sequences = [tuple(d) for rows in (task.train, task.test) for d in rows["digits"]]
    assert sorted(sequences) == sorted(itertools.product(range(1, 10), repeat=4))
    # The same rows on every machine and Python: results of different runs are comparable
    assert (len(task.train), len(task.test)) == (5158, 1403)
    assert (
        hashlib.sha256("\n".join(task.test["prompt"]).encode()).hexdigest()[:16]
        == "85cec7a132d52a66"
    )


def test_mnns_seed_selects_the_split(task):
    again, other = mnns(seed=0), mnns(seed=1)
    assert again.train["prompt"] == task.train["prompt"]
    assert set(other.test["prompt"]) != set(task.test["prompt"])


def test_mnns_gold_is_the_first_smallest_non_negative_sum(task):
    for row in task.test:
        d = row["digits"]
        totals = [sum(s * x for s, x in zip(sg, d)) for sg in itertools.product((1, -1), repeat=4)]
        best = min(t for t in totals if t >= 0)
        signs = next(sg for sg, t in zip(itertools.product((1, -1), repeat=4), totals) if t == best)
        assert row["completion"] == "".join(
            f" S{s}" for s in itertools.accumulate(a * b for a, b in zip(signs, d))
        )
        assert row["answer"] == row["completion"].split()[-1] == f"S{best}"


def test_mnns_labels_are_as_in_the_paper(task):
    share = Counter(a for rows in (task.train, task.test) for a in rows["answer"])
    assert [round(share[f"S{s}"] / 65.61, 1) for s in range(4)] == pytest.approx(
        [23.9, 37.25, 20.2, 10.1], abs=0.06
    )


def test_mnns_marginals_are_the_oracle_of_the_worked_example(task, tokenizer):
    row = row_of(task, [5, 3, 2, 4])
    assert (row["prompt"], row["completion"], row["answer"]) == (
        "<bos> D5 D3 D2 D4 ->",
        " S5 S2 S4 S0",
        "S0",
    )
    assert len(row["traces"]) == 8
    soft = frontier(torch.tensor(tokenizer(row["traces"])["input_ids"]))
    assert soft.ids.shape == soft.weights.shape == (4, 8)
    table = dense(soft, len(tokenizer))
    named = [
        {tokenizer.convert_ids_to_tokens(i): p[i].item() for i in p.nonzero()[:, 0].tolist()}
        for p in table
    ]
    e = 1 / 8
    assert named == [
        {"S5": 0.5, "S-5": 0.5},
        {"S8": 0.25, "S2": 0.25, "S-2": 0.25, "S-8": 0.25},
        {"S10": e, "S6": e, "S4": e, "S0": 2 * e, "S-4": e, "S-6": e, "S-10": e},
        {"S0": 1.0},
    ]


@pytest.mark.parametrize("digits, low, high", [(4, 1, 9), (3, 0, 5), (2, 5, 14)])
def test_mnns_traces_are_every_signing(digits, low, high):
    made = mnns(digits, low, high)
    assert made.think_steps == digits - 1
    assert made.model == ("mnns-tiny" if high <= 9 else None)
    assert made.models == (MODELS["mnns"] if high <= 9 else {})
    for row in made.test.select(range(min(50, len(made.test)))):
        assert len(row["traces"]) == 2 ** (digits - 1)
        columns = list(zip(*(t.split() for t in row["traces"])))
        assert set(columns[-1]) == {row["answer"]}
        for i, column in enumerate(columns[:-1], start=1):
            sums = Counter(
                f"S{sum(a * b for a, b in zip(sg, row['digits']))}"
                for sg in itertools.product((1, -1), repeat=i)
            )
            assert {k: Fraction(v, 2**i) for k, v in sums.items()} == {
                k: Fraction(v, len(column)) for k, v in Counter(column).items()
            }


def test_mnns_words_are_tokens_and_the_prompt_is_a_prefix(task, tokenizer):
    for row in task.test.select(range(200)):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        assert (len(prompt), len(whole)) == (6, 11)
        assert whole[:6] == prompt
        assert whole[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(whole) == f"{row['prompt']}{row['completion']} <eos>"
        assert "<eos>" not in row["completion"]


@pytest.mark.parametrize(
    "text, score",
    [
        ("S0", 1),
        (" S0 <eos> <pad> <pad>", 1),
        ("S5 S2 S4 S0", 1),
        ("D3 -> S0\n junk", 1),
        ("S0 <eos> S4", 1),
        ("S-0", 0),
        ("S0 S4", 0),
        ("S00", 0),
        ("xS0 S0x", 0),
        ("", 0),
        ("<eos> S0", 0),
        ("S", 0),
    ],
)
def test_mnns_score(task, text, score):
    assert task.score(text, row_of(task, [5, 3, 2, 4])) == score


def test_mnns_size_takes_a_part_of_the_same_training_rows(task):
    small = load_task("mnns", size=100)
    assert small.train["prompt"] == task.train["prompt"][:100]
    assert small.test["prompt"] == task.test["prompt"]
    # a fair choice, not one corner of the table
    assert len({tuple(sorted(d)) for d in small.train["digits"]}) > 50
    assert len(load_task("mnns", size=10**6).train) == len(task.train)


def test_no_thought(task):
    bare = no_thought(task)
    assert bare.think_steps is None and "traces" not in bare.train.column_names
    assert bare.test["completion"] == [" " + a for a in task.test["answer"]]
    assert bare.test["prompt"] == task.test["prompt"] and "traces" in task.test.column_names
    assert no_thought(bare) is bare


def test_marginals_of_any_shape():
    ids = torch.randint(7, (2, 3, 5, 4))  # [..., M=5, T=4]
    soft = frontier(ids)
    assert soft.ids.shape == (2, 3, 4, 5) and soft.weights.dtype == torch.float32
    expected = torch.nn.functional.one_hot(ids, 7).float().mean(-3)
    torch.testing.assert_close(dense(soft, 7), expected)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: load_task("mns"), "'mns'.*mnns.*reasoning_gym:NAME"),
        (lambda: load_task("mnns", size=0), "size=0"),
        (lambda: load_task("reasoning_gym:chain_sum", size=-1), "size=-1"),
        (lambda: load_task("reasoning_gym:chainsum"), "chainsum.*chain_sum"),
        (lambda: load_task("reasoning_gym:"), "close names"),
        (lambda: load_task("reasoning_gym:composite"), "composite.*from its name alone"),
        (lambda: load_task("reasoning_gym:coin_flip", size=3000), "coin_flip.*smaller size"),
        (lambda: mnns(1), "digits=1"),
        (lambda: mnns(4, 5, 5), "low=5"),
        (lambda: mnns(4, -1, 5), "low=-1"),
    ],
)
def test_bad_input_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# reasoning-gym


@pytest.mark.parametrize(
    "name", ["chain_sum", "arc_agi", "basic_arithmetic", "prime_factorization"]
)
def test_gym_gold_scores_one_and_nothing_leaks(name):
    made = load_task(f"reasoning_gym:{name}", size=20)
    assert len(made.train) == 20 and 0 < len(made.test) <= 50
    assert not set(made.train["prompt"]) & set(made.test["prompt"])
    for row in made.test.select(range(10)):
        assert row["completion"] == row["answer"]
        assert made.score(row["answer"], row) == 1.0
        assert made.score(f"So <answer>{row['answer']}</answer>, I think", row) == 1.0
        for junk in ("", "junk", "<answer></answer>", "<answer>\n"):
            assert 0 <= made.score(junk, row) < 1


def test_gym_held_out_questions_never_come_up_in_training():
    made = load_task("reasoning_gym:coin_flip", size=100)  # a small domain: the two halves do meet
    assert 0 < len(made.test) < 50
    assert not set(made.train["prompt"]) & set(made.test["prompt"])


def test_gym_reads_what_it_scores():
    made = load_task("reasoning_gym:chain_sum", size=5)
    row = made.test[0]
    text = f"1 + 1, so <answer>{row['answer']}</answer>"
    assert made.extract(text) == row["answer"] == made.extract(f" {row['answer']} ")
    assert made.score(text, row) == 1


def test_gym_is_seeded():
    one, same, other = (load_task("reasoning_gym:chain_sum", size=50, seed=s) for s in (0, 0, 1))
    assert one.train["prompt"] == same.train["prompt"] and one.test["prompt"] == same.test["prompt"]
    # its own numbering (seed + index) would make neighbouring seeds share all rows but one
    assert len(set(one.train["prompt"]) & set(other.train["prompt"])) < 5


def test_gym_entries_survive_json():
    item = {"a": (1, [2, ("x",)]), "b": {0: 1, (1, 2): {"c": None}}, "d": 1.5, "e": {}}
    assert thaw(json.loads(json.dumps(freeze(item)))) == item
    made = load_task("reasoning_gym:graph_color", size=5)  # accepts many answers and names none
    row = made.test[0]
    colouring = thaw(json.loads(row["entry"]))["metadata"]["possible_answer"]
    assert row["answer"] == ""
    assert made.score(json.dumps(colouring), row) == 1.0
    assert made.score("{}", row) < 1


def test_gym_missing_names_the_extra(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("reasoning_gym"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install softar\[rewards\]"):
        load_task("reasoning_gym:chain_sum")


# Wider ones


@pytest.mark.parametrize(
    "digits, low, held_out, orders", [(3, 0, 7, 1), (3, 1, 20, 2), (2, 0, 5, 9)]
)
def test_mnns_holds_out_multisets_and_some_of_their_orders(digits, low, held_out, orders):
    task = mnns(digits, low, held_out=held_out, orders=orders, size=50)
    tested = [tuple(row) for row in task.test["digits"]]
    bags = Counter(tuple(sorted(row)) for row in tested)
    assert len(bags) == held_out and len({*tested}) == len(tested)
    for bag, count in bags.items():
        assert count == min(orders, len({*itertools.permutations(bag)}))
    assert not bags.keys() & {tuple(sorted(row)) for row in task.train["digits"]}
    assert task.test["prompt"] == mnns(digits, low, held_out=held_out, orders=orders).test["prompt"]


def test_mnns_net_knows_the_words_of_more_digits():
    task = mnns(3, 0, held_out=5, orders=1, size=5)
    model, tokenizer = load("mnns-tiny", largest_sum=54)
    assert model.config.vocab_size == len(tokenizer) == 16 + 109
    for row in [*task.train, *task.test, {"prompt": "S-54", "completion": " S54"}]:
        assert tokenizer.unk_token_id not in tokenizer(row["prompt"] + row["completion"]).input_ids


def test_latin_holds_out_as_many_as_asked():
    task = latin(3, 2, held_out=4, size=200)
    assert len(task.test) == 4 and not {*task.train["answer"]} & {*task.test["answer"]}
    assert all(task.score(row["answer"], row) for row in task.test)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mnns(2, held_out=45), "held_out=45.*45 multisets"),
        (lambda: mnns(2, held_out=0), "held_out=0"),
        (lambda: mnns(2, orders=0), "orders=0"),
        (lambda: latin(2, 1, held_out=50, size=5), "held_out=50"),
        (lambda: load("mnns-tiny", largest_sum=0), "largest_sum=0"),
    ],
)
def test_sizes_that_leave_nothing_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
