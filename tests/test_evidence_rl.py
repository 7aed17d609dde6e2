"""X4 of the evidence: starts that all arms share, and read-outs that are the policies as they act."""

import json

import pytest

from softar.recipes import evidence, evidence_mnns, evidence_rl
from softar.recipes.evidence_units import Unit, scores_in
from softar.rl.config import SoftGRPOConfig

DEV, TEST = 4, 9


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(evidence_mnns, "HELD_OUT", {3: (DEV, TEST)})
    monkeypatch.setattr(evidence_mnns, "TRAIN", 40)
    small = dict(per_device_train_batch_size=8)
    monkeypatch.setattr(evidence_mnns, "TRAINING", evidence_mnns.TRAINING | small)
    monkeypatch.setattr(evidence_rl, "RL", evidence_rl.RL | small | dict(num_generations=4))
    monkeypatch.setattr(evidence_rl, "DIGITS", 3)
    monkeypatch.setattr(evidence_rl, "FOLDER", tmp_path / "starts")
    monkeypatch.setattr(evidence_rl, "SEEDS", range(1))
    starts = {name: made | dict(steps=2) for name, made in evidence_rl.STARTS.items()}
    monkeypatch.setattr(evidence_rl, "STARTS", starts)
    few = {
        name: options | dict(steps=2)
        for name, options in evidence_rl.SETTINGS.items()
        if options["start"] == "self-fed"
    }
    monkeypatch.setattr(evidence_rl, "SETTINGS", few)
    evidence_mnns.data.cache_clear()
    yield
    evidence_mnns.data.cache_clear()


def run(folder):
    evidence.main(["--experiment", "X4", "--output", str(folder)])
    return {file.stem: json.loads(file.read_text()) for file in folder.rglob("*.json")}


def test_arms_go_on_from_a_start_that_is_trained_once(tiny, tmp_path, monkeypatch):
    trained, fit = [], evidence_rl.fit

    def counts(unit, *rest):
        trained.append(unit.setting)
        return fit(unit, *rest)

    monkeypatch.setattr(evidence_rl, "fit", counts)
    logs = run(tmp_path / "whole")
    assert {*logs} == {f"self-fed-{how}-seed0" for how in ("start", "draws-1", "draws-3", "sft")}
    assert trained == ["self-fed-start", "self-fed-sft"]
    firsts = [log["rows"][0] for log in logs.values()]
    assert len({first["start_hash"] for first in firsts}) == 1
    assert {first["arguments"].get("soft_k") for first in firsts} == {None, 1, 3}
    (rows,) = evidence_rl.facts().values()
    names = {"1 draw", "3 draws", "votes", "soft", "discrete"}
    for log in logs.values():
        first, *lines = log["rows"]
        assert {(x["readout"], x["split"]) for x in lines} == {
            (name, split) for name in names for split in ("dev", "test")
        }
        assert first["test_rows_hash"] == rows["hash"] and rows["n"] == TEST * evidence_rl.REPEATS
        for name in names:
            passes = scores_in(log, name, "test", rows["n"]).reshape(evidence_rl.REPEATS, TEST)
            if name in ("soft", "discrete"):  # nothing is drawn
                assert (passes == passes[0]).all()

    # a start that is gone is made again, and makes the same of an arm
    for file in evidence_rl.FOLDER.iterdir():
        file.unlink()
    (tmp_path / "whole/X4/self-fed-draws-3-seed0.json").unlink()
    again = run(tmp_path / "whole")["self-fed-draws-3-seed0"]["rows"]
    assert again[1:] == logs["self-fed-draws-3-seed0"]["rows"][1:]
    assert again[0]["start_hash"] == logs["self-fed-draws-3-seed0"]["rows"][0]["start_hash"]


def test_arms_that_learn_nothing_answer_as_their_start(tiny):
    def lines_of(how, **fields):
        options = dict(start="teacher-forced", how=how, steps=2)
        return evidence_rl.measure(Unit("X4", how, options, 0, splits=("dev",), fields=fields))

    first = lines_of("draws-3", learning_rate=0.0)[1:]  # makes the start by itself
    assert first == lines_of("sft", learning_rate=0.0)[1:] == lines_of("start")[1:]


@pytest.mark.parametrize("draws", [1, 3])
def test_a_policy_is_read_as_it_acts_but_for_greedy_answers(draws, tiny, tmp_path):
    task, _ = evidence_mnns.data(evidence_rl.DIGITS)
    args = SoftGRPOConfig(
        output_dir=str(tmp_path),
        think_steps=task.think_steps,
        max_completion_length=task.max_new_tokens,
        **evidence_rl.RL | evidence_rl.OF_DRAWS[f"draws-{draws}"],
    )
    acts = args.decoding().changed(answer_temperature=0.0)
    assert evidence_rl.policy("k-samples", k=draws) == acts
