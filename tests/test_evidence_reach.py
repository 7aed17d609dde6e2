"""X2 of the evidence, reachability: one warm-up a seed, rows of their own, arms that are what they say."""

import json
from pathlib import Path

import pytest
import torch

from softar.recipes import evidence, evidence_reach, evidence_smollm2
from softar.recipes.evidence_units import Unit, rows_hash
from softar.sft.config import SoftSFTConfig
from softar.tasks import reach

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, folder):
    evidence.main([*arguments, "--output", str(folder)])
    return {file.name: json.loads(file.read_text()) for file in folder.rglob("*.json")}


@pytest.fixture
def graphs(monkeypatch, tmp_path):
    """X2 in sizes that take seconds; its weights in a folder of the test's own."""
    net, few = evidence_reach.NETS["small"], dict.fromkeys(evidence_reach.TRAINED, 2)
    stages = tuple(stage._replace(rows=24, steps=2) for stage in net.stages)
    training = net.training | dict(per_device_train_batch_size=8)
    net = net._replace(rows=40, dev=4, test=6, stages=stages, training=training, steps=few)
    monkeypatch.setitem(evidence_reach.NETS, "small", net)
    monkeypatch.setattr(evidence_reach, "WARM_UPS", tmp_path / "weights")
    monkeypatch.setattr(evidence_reach, "SEEDS", range(1))
    for cached in (evidence_reach.data, evidence_reach.pauses):
        cached.cache_clear()
    yield
    for cached in (evidence_reach.data, evidence_reach.pauses):
        cached.cache_clear()


def test_arms_of_a_seed_start_from_one_warm_up(graphs, tmp_path, monkeypatch):
    trained, warm_up = [], evidence_reach.warm_up
    monkeypatch.setattr(evidence_reach, "warm_up", lambda *a: trained.append(a) or warm_up(*a))
    logs = run("--experiment", "X2", folder=tmp_path / "logs")
    assert {*logs} == {f"{arm}-seed0.json" for arm in evidence_reach.ARMS} and len(trained) == 1
    firsts = {log["rows"][0]["setting"]: log["rows"][0] for log in logs.values()}
    assert len({first["warm_up"]["weights_hash"] for first in firsts.values()}) == 1
    assert {arm: first["steps"] for arm, first in firsts.items()} == (
        dict.fromkeys(evidence_reach.TRAINED, 2) | {"warm": 0}
    )
    parity = {arm for arm in firsts if arm.endswith("parity")}
    hashes = [
        {firsts[arm]["test_rows_hash"] for arm in some} for some in (parity, {*firsts} - parity)
    ]
    assert [*map(len, hashes)] == [1, 1] and hashes[0] != hashes[1]
    for arm in firsts:
        lines = logs[f"{arm}-seed0.json"]["rows"][1:]
        ways = {line["readout"] for line in lines if "after" not in line["readout"]}
        assert ways == {"soft", "discrete"} | ({"votes"} if "discrete-traces" in arm else set())
        assert ("after another row's" in {x["readout"] for x in lines}) == (arm == "trace-soft")
        assert {(x["split"], x["n"]) for x in lines} == {("dev", 4), ("test", 6)}
    # trained anew, weights and answers are the same
    for file in [*(tmp_path / "weights").iterdir(), tmp_path / "logs/X2/pause-seed0.json"]:
        file.unlink()
    again = run("--experiment", "X2", folder=tmp_path / "logs")["pause-seed0.json"]["rows"]
    assert len(trained) == 2 and again[1:] == logs["pause-seed0.json"]["rows"][1:]
    assert again[0]["warm_up"]["weights_hash"] == firsts["pause"]["warm_up"]["weights_hash"]


def test_another_way_to_warm_up_is_another_file(graphs):
    unit = Unit("X2", "warm", {}, 0)
    net = evidence_reach.NETS["small"]
    evidence_reach.warm("small", unit)
    evidence_reach.NETS["small"] = net._replace(stages=net.stages[1:])  # the fixture puts it back
    *_, about = evidence_reach.warm("small", unit)
    assert about["steps"] == 2 and len([*evidence_reach.WARM_UPS.iterdir()]) == 2


@pytest.mark.parametrize("parity", [False, True])
def test_no_graph_is_read_twice_or_trained_on(graphs, parity):
    task, rows = evidence_reach.data("small", parity)
    facts = evidence_reach.facts()["parity" if parity else "reachability"]
    assert facts == dict(n=6, hash=rows_hash({"test": rows["test"]})["test_rows_hash"])
    parts = [[*map(evidence_reach.graph_of, r["prompt"])] for r in (*rows.values(), task.train)]
    assert [len({*part}) for part in parts[:2]] == [4, 6]
    assert not {*parts[0]} & {*parts[1]} and not ({*parts[0]} | {*parts[1]}) & {*parts[2]}
    prompt = rows["dev"][0]["prompt"]
    links, dot, rest = prompt.removeprefix("Links: ").partition(". ")
    shuffled = f"Links: {', '.join(reversed(links.split(', ')))}{dot}{rest}"
    assert shuffled != prompt
    assert evidence_reach.graph_of(shuffled) == evidence_reach.graph_of(prompt)


def test_pauses_say_nothing_and_answer(graphs):
    task, _ = evidence_reach.data("small")
    rows = evidence_reach.pauses("small")
    assert rows["prompt"] == task.train["prompt"]
    for row in rows:
        assert row["completion"].split() == [evidence_reach.PAUSE] * 2 + [row["answer"]]


def test_names_and_commas_are_the_tokens_of_links(graphs):
    task, rows = evidence_reach.data("small")
    _, tokenizer = evidence_reach.small(0, "cpu")
    row = rows["dev"][0]
    names = [w.strip(",.:?>") for w in row["prompt"].split()]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(row["prompt"])["input_ids"])
    assert [t for t in tokens if t != ","] == [*filter(None, names)]
    assert tokens.count(",") == row["prompt"].count(",")
    thought = tokenizer(row["completion"])["input_ids"]
    assert len(thought) == task.think_steps + 1 == task.max_new_tokens - 1


@pytest.mark.parametrize("net", evidence_reach.NETS)
@pytest.mark.parametrize("arm", evidence_reach.ARMS)
def test_the_fields_of_an_arm_are_training_arguments(net, arm):
    fields = evidence_reach.fields_of(evidence_reach.NETS[net], arm)
    args = SoftSFTConfig("", **fields, report_to="none")
    assert args.is_soft == (arm.removesuffix("-parity") in ("warm", "trace-soft", "guided-soft"))
    modules = (evidence_reach, evidence_smollm2)
    assert {each["net"] for m in modules for each in m.SETTINGS.values()} == {*evidence_reach.NETS}


def test_before_any_training_the_small_net_looks_links_up():
    """Behind a name, one of the likeliest tokens is what its link leads to."""
    model, tokenizer = evidence_reach.small(3, "cpu")
    task = reach(3, 4, 1, tokenizer=tokenizer, held_out=40, size=1)
    right = []
    for row in task.test:
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likeliest = model(ids).logits[0, -3:-1].topk(4).indices
        right += (likeliest == ids[0, -2:, None]).any(-1).tolist()
    assert sum(right) / len(right) > 0.6  # .11 by chance


def test_the_part_for_a_gpu_goes_through_its_arms(graphs, monkeypatch):
    """In the sizes of a dry run: what it records, and that it stops where no time is left."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import gpu_reach

    # it runs in a process of its own, this one puts back what it leaves
    monkeypatch.setattr(evidence_reach, "WARM_UPS", None)
    monkeypatch.setitem(evidence_reach.NETS, gpu_reach.NET, evidence_reach.NETS["small"])
    monkeypatch.setattr(gpu_reach, "SEEDS", (0,))
    every, some = gpu_reach.ARMS, ("warm", "discrete", "trace-soft")
    assert {*some} <= {*every} <= {*evidence_reach.ARMS}
    monkeypatch.setattr(gpu_reach, "ARMS", some)
    pilot = gpu_reach.pilot

    def by_pilot(arm, seed, split):
        assert (arm, seed, split) == ("discrete-traces", 999, "dev")
        return [dict(readout="soft", accuracy=0.7), dict(readout="discrete", accuracy=0.95)]

    rows = []
    gpu_reach.reach(rows.append, True, lambda: 60.0)
    timed, tried, *rows = rows
    assert (tried["what"], tried["seed"]) == ("pilot", 999) and 0 <= tried["accuracy"] <= 1
    assert all(name in timed["note"] for name in gpu_reach.ARMS[1:])
    assert [*dict.fromkeys(row["what"] for row in rows)] == [*gpu_reach.ARMS]
    assert {row["n"] for row in rows} == {6} and len({row["test_rows_hash"] for row in rows}) == 1
    assert {row["steps"] for row in rows if row["what"] != "warm"} == {2}
    assert len({row["warm_up"]["weights_hash"] for row in rows}) == 1
    steps = dict.fromkeys(gpu_reach.ARMS[1:], 0.5) | {"trace-soft": 1.0}
    gpu_reach.set_steps(steps, 600.0)
    made = evidence_reach.NETS[gpu_reach.NET]
    assert made.steps["trace-soft"] * 2 == made.steps["discrete"] == 132
    assert made.stages[0].steps == 180
    left = iter([60.0, 60.0, 0.0])
    monkeypatch.setattr(gpu_reach, "net", lambda is_dry: made)
    monkeypatch.setattr(gpu_reach, "seconds_a_step", lambda: steps)
    monkeypatch.setattr(gpu_reach, "pilot", lambda record: 0.7)
    late = []
    gpu_reach.reach(late.append, False, lambda: next(left))
    assert late[-1]["note"] == "no time left" and len(late) == 2
    monkeypatch.setattr(gpu_reach, "rows_of", by_pilot)
    monkeypatch.setattr(gpu_reach, "pilot", pilot)
    stopped = []
    gpu_reach.reach(stopped.append, False, lambda: 60.0)
    assert stopped[-1]["note"].endswith("outside 0.55 to 0.9, so no test row is read")
    assert len(stopped) == 2
