"""What the evidence is made of: answers after edited thoughts, intervals over seeds, units that resume."""

import copy
import json
import subprocess

import numpy as np
import pytest
import torch

import softar
import softar.diffusion
from softar import results
from softar.config import SoftConfig
from softar.evals.edited import answers_after, cut, of_another, thoughts_of
from softar.evals.seeds import Gain, gain_of, t_interval, t_quantile
from softar.evaluate import encode
from softar.feedback import Gate
from softar.recipes import evidence, evidence_latin, evidence_methods, evidence_mnns, evidence_rl
from softar.recipes.evidence_claims import EVIDENCE
from softar.recipes.evidence_gains import reads_of
from softar.recipes.evidence_units import readouts, scores_in, scores_of
from softar.soft import Soft
from softar.tasks import load_task

STEPS = 3


@pytest.fixture(scope="module")
def shipped():
    model, tokenizer = softar.load("mnns-soft-tiny")
    prompts = [*load_task("mnns").test["prompt"][:40]]
    return model, encode(tokenizer, prompts)["input_ids"]


def config(**changes):
    return SoftConfig(**dict(top_k=None, budget=STEPS, max_new_tokens=STEPS + 1) | changes)


def test_after_its_own_thought_a_row_answers_as_it_does(shipped):
    model, ids = shipped
    thought = thoughts_of(model, ids, config())
    assert thought.ids.shape[:2] == (len(ids), STEPS)
    decoded = softar.generate(model, ids, config=config()).completions[:, STEPS]
    assert torch.equal(answers_after(model, ids, thought), decoded)
    assert torch.equal(answers_after(model, ids, cut(thought, 10**6)), decoded)


def test_whatever_is_read_a_row_answers_as_it_does_or_is_refused(shipped, tmp_path):
    model, ids = shipped
    gate = tmp_path / "gate.safetensors"
    Gate(model.config.hidden_size).save(gate)
    ways = [dict(mixer=name) for name in softar.MIXERS]
    ways += [dict(rescale="norm"), dict(rescale="l2"), dict(softness=0.5), dict(top_k=3)]
    ways += [
        dict(mixer="hybrid", mixer_args={"gate": str(gate)}),
        dict(mixer="hidden", rescale="norm"),
    ]
    refused = []
    for way in ways:
        settings = config(**way)
        try:
            torch.manual_seed(0)
            thought = thoughts_of(model, ids, settings)
        except ValueError as error:
            assert "read more than tokens and their weights" in str(error)
            refused.append(way)
            continue
        torch.manual_seed(0)
        endless = copy.deepcopy(model.generation_config)
        endless.eos_token_id = model.config.vocab_size
        out = softar.generate(model, ids, config=settings, generation_config=endless)
        assert torch.equal(answers_after(model, ids, thought), out.completions[:, STEPS]), way
    assert refused == [dict(mixer="hidden"), dict(rescale="norm"), dict(rescale="l2"), *ways[-2:]]


def test_after_anothers_thought_a_row_answers_by_itself_as_in_a_batch(shipped):
    model, ids = shipped
    thought = of_another(thoughts_of(model, ids, config()))
    every = answers_after(model, ids, thought)
    one = answers_after(model, ids[3:4], thoughts_of(model, ids[4:5], config()))
    assert one.item() == every[3].item()
    last = answers_after(model, ids[-1:], thoughts_of(model, ids[:1], config()))
    assert last.item() == every[-1].item()
    # the thought is what these answers come from
    assert (
        every != answers_after(model, ids, thoughts_of(model, ids, config()))
    ).float().mean() > 0.3


@pytest.mark.parametrize("k", [1, 2, 5])
def test_cut_leaves_the_likeliest_at_a_sum_of_one(k):
    weights = torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    ids = torch.arange(6).expand(4, 3, 6)
    kept = cut(Soft(ids, weights), k)
    assert kept.ids.shape == (4, 3, k)
    assert torch.allclose(kept.weights.sum(-1), torch.ones(4, 3))
    assert torch.equal(kept.ids, weights.topk(k).indices)
    assert torch.allclose(
        kept.weights, weights.topk(k).values / weights.topk(k).values.sum(-1, keepdim=True)
    )


def test_thoughts_without_a_length_are_named(shipped):
    model, ids = shipped
    with pytest.raises(ValueError, match="budget=None"):
        thoughts_of(model, ids, config(budget=None))
    with pytest.raises(ValueError, match="k=0"):
        cut(thoughts_of(model, ids[:1], config()), 0)
    with pytest.raises(ValueError, match="max_new_tokens=3"):
        thoughts_of(model, ids, config(max_new_tokens=STEPS))
    with pytest.raises(ValueError, match="cold_stop_entropy=1"):
        thoughts_of(model, ids, config(cold_stop_entropy=1.0))


def test_an_end_token_ends_no_thought(shipped):
    model, ids = shipped
    whole, (other, _) = thoughts_of(model, ids, config()), softar.load("mnns-soft-tiny")
    other.generation_config.eos_token_id = int(whole.ids[0, 0, whole.weights[0, 0].argmax()])
    assert (softar.generate(other, ids, config=config()).answer_start < STEPS).any()
    for part, same in zip(thoughts_of(other, ids, config()), whole):
        assert torch.equal(part, same)


# Gains over seeds


def crossed(S, n, gain, sd_seeds, sd_rows, seed):
    """[S, n] gains with parts that belong to the seed and to the row."""
    rng = np.random.default_rng(seed)
    return gain + sd_seeds * rng.normal(size=(S, 1)) + sd_rows * rng.normal(size=(1, n))


@pytest.mark.parametrize("sd_seeds, sd_rows", [(0.05, 0.0), (0.0, 0.5), (0.04, 0.3)])
def test_intervals_hold_the_gain_about_as_often_as_they_say(sd_seeds, sd_rows):
    tries, holds = 40, 0
    for seed in range(tries):
        gains = crossed(12, 60, 0.05, sd_seeds, sd_rows, seed)
        gain = gain_of(gains, np.zeros_like(gains), draws=200)
        holds += gain.low <= 0.05 <= gain.high
    assert holds / tries > 0.8  # 95 % less what 12 seeds and 40 tries take away


@pytest.mark.parametrize(
    "freedom, p95, p975",
    [
        (1, 6.3138, 12.7062),
        (2, 2.9200, 4.3027),
        (3, 2.3534, 3.1824),
        (7, 1.8946, 2.3646),
        (15, 1.7531, 2.1314),
        (30, 1.6973, 2.0423),
        (120, 1.6577, 1.9799),
    ],
)
def test_quantiles_of_t_are_those_of_the_tables(freedom, p95, p975):
    assert t_quantile(0.95, freedom) == pytest.approx(p95, abs=1e-4)
    assert t_quantile(0.975, freedom) == pytest.approx(p975, abs=1e-4)


def test_t_over_few_seeds_holds_the_gain_as_often_as_it_says_and_percentiles_do_not():
    """3 seeds, whose gains are normal about .05."""
    tries, by_t, by_draws = 200, 0, 0
    for seed in range(tries):
        gains = crossed(3, 5, 0.05, 0.05, 0.0, seed)
        gain = gain_of(gains, np.zeros_like(gains), draws=100)
        by_t += gain.t_low <= 0.05 <= gain.t_high
        by_draws += gain.low <= 0.05 <= gain.high
    assert by_t / tries == pytest.approx(0.95, abs=0.05)  # 3.2 standard deviations
    assert by_draws / tries < 0.85
    # t.test(c(1, 2, 4)) of R: -1.461 to 6.128
    assert t_interval(np.array([1.0, 2.0, 4.0])) == pytest.approx((-1.4612, 6.1279), abs=1e-3)
    assert gain_of(gains[:1], np.zeros((1, 5)), draws=10).t_high == np.inf


def test_rows_of_a_group_count_once():
    rng = np.random.default_rng(0)
    few = rng.normal(size=(6, 20))
    many, groups = np.repeat(few, 7, axis=1), np.repeat(np.arange(20), 7)
    one = gain_of(few, np.zeros_like(few), draws=2000)
    whole = gain_of(many, np.zeros_like(many), groups, draws=2000)
    alone = gain_of(many, np.zeros_like(many), draws=2000)
    assert whole.mean == pytest.approx(one.mean) and whole.groups == 20
    assert whole.high - whole.low == pytest.approx(one.high - one.low, rel=0.1)
    assert alone.high - alone.low < 0.8 * (whole.high - whole.low)


@pytest.mark.parametrize(
    "mean, low, high, verdict, same",
    [
        (0.05, 0.01, 0.09, "supported", False),
        (0.05, -0.01, 0.11, "open", False),
        (0.02, 0.005, 0.035, "open", False),
        (0.01, 0.005, 0.015, "refuted", True),
        (-0.05, -0.08, -0.02, "refuted", False),
        (0.0, -0.01, 0.01, "refuted", True),
    ],
)
def test_verdicts(mean, low, high, verdict, same):
    gain = Gain(mean, low, high, low, high, low, high, 8, 600)
    assert gain.verdict(0.03) == verdict and gain.is_equivalent(0.02) == same
    alone = gain._replace(seeds=1)
    assert alone.verdict(0.03) == "open" and not alone.is_equivalent(0.02)


def test_scores_that_do_not_pair_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        gain_of(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="missing"):
        gain_of(np.full((2, 3), np.nan), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="groups of 2 rows"):
        gain_of(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2, int), draws=1)


# Units


@pytest.fixture
def tiny(monkeypatch):
    """Both experiments, in sizes that take seconds."""
    monkeypatch.setattr(evidence_mnns, "HELD_OUT", {3: (4, 9)})
    monkeypatch.setattr(evidence_mnns, "TRAIN", 40)
    small = dict(per_device_train_batch_size=8)
    monkeypatch.setattr(evidence_mnns, "TRAINING", evidence_mnns.TRAINING | small)
    arms = {
        f"{arm}-3": dict(arm=arm, digits=3, steps=2) for arm in ("discrete-traces", "trace-soft")
    }
    monkeypatch.setattr(evidence_mnns, "SETTINGS", arms)
    monkeypatch.setattr(evidence_mnns, "SEEDS", range(2))
    for name, value in dict(DEV=3, TEST=12, CURVE=4, SPARE=5, OTHERS=(4,), TRAIN=60).items():
        monkeypatch.setattr(evidence_latin, name, value)
    monkeypatch.setattr(evidence_latin, "TRAINING", evidence_latin.TRAINING | small)
    few = {arm: fields | dict(max_steps=2) for arm, fields in evidence_latin.ARMS.items()}
    monkeypatch.setattr(evidence_latin, "ARMS", few)
    evidence_mnns.data.cache_clear(), evidence_latin.data.cache_clear()
    yield
    evidence_mnns.data.cache_clear(), evidence_latin.data.cache_clear()


def run(*arguments, folder):
    evidence.main([*arguments, "--output", str(folder)])
    return {file.name: json.loads(file.read_text()) for file in folder.rglob("*.json")}


def test_a_grid_resumes_where_it_was_and_does_the_same_again(tiny, tmp_path, monkeypatch, capsys):
    whole = run("--experiment", "X1", folder=tmp_path / "whole")
    assert [*sorted(whole)] == [
        f"{arm}-3-seed{s}.json" for arm in ("discrete-traces", "trace-soft") for s in (0, 1)
    ]
    done, measure = [], evidence_mnns.measure

    def dies(unit):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(unit.name)
        return measure(unit)

    monkeypatch.setattr(evidence_mnns, "measure", dies)
    with pytest.raises(SystemExit):
        run("--experiment", "X1", folder=tmp_path / "parts")
    monkeypatch.setattr(evidence_mnns, "measure", measure)
    capsys.readouterr()
    assert len([*(tmp_path / "parts").rglob("*")]) == 2  # a folder and a whole file, no half of one
    parts = run("--experiment", "X1", folder=tmp_path / "parts")
    assert "3 of 4 units left" in capsys.readouterr().out
    for name, log in whole.items():
        first, *rest = log["rows"]
        again, *others = parts[name]["rows"]
        assert rest == others and first["arguments"] == again["arguments"]
        assert first["train_loss"] == again["train_loss"]
    run("--experiment", "X1", "--list", folder=tmp_path / "parts")
    assert "0 of 4 units left" in capsys.readouterr().out


def test_a_log_says_what_it_was_made_of(tiny, tmp_path):
    logs = run("--experiment", "X1", "--seeds", "1", folder=tmp_path)
    log = logs["trace-soft-3-seed1.json"]
    first, *lines = log["rows"]
    assert log["commit"] is None or len(log["commit"].rstrip("+")) == 40
    assert {"torch", "trl"} <= {*log["versions"]} and first["steps"] == 2 and first["seed"] == 1
    assert first["processor_seconds"] > 0 and first["arguments"]["learning_rate"] > 0
    by = {(line["split"], line["readout"]): line for line in lines}
    doses = {f"after top {k}" for k in evidence_mnns.DOSES} | {"after own", "after another row's"}
    assert {name for _, name in by} == {"soft", "discrete"} | doses
    for (split, _), line in by.items():
        assert line["n"] == {"dev": 4, "test": 9}[split]
        assert scores_of(line).mean() == pytest.approx(line["accuracy"])
        assert (scores_in(log, line["readout"], split, line["n"]) == scores_of(line)).all()
    with pytest.raises(ValueError, match="readout='votes', split='test', rows=9"):
        scores_in(log, "votes", "test", 9)
    votes = next(
        x for x in logs["discrete-traces-3-seed1.json"]["rows"] if x.get("readout") == "votes"
    )
    assert votes["nfe"] > 8  # those of all votes


def test_a_training_that_fails_is_logged_and_not_run_again(tiny, tmp_path, monkeypatch, capsys):
    def fails(unit):
        raise FloatingPointError("step 2: the loss is nan")

    monkeypatch.setattr(evidence_mnns, "measure", fails)
    logs = run("--experiment", "X1", folder=tmp_path)
    assert len(logs) == 4 and all(
        "loss is nan" in log["rows"][0]["failed"] for log in logs.values()
    )
    run("--experiment", "X1", "--list", folder=tmp_path)
    assert "0 of 4 units left" in capsys.readouterr().out


def test_the_rows_of_a_split_are_of_their_own(tiny):
    for _, rows in (evidence_mnns.data(3), evidence_latin.data()):
        groups = {split: {*each["group"]} for split, each in rows.items()}
        assert not groups["dev"] & groups["test"]
    task, rows = evidence_latin.data()
    learnt = {square.strip() for square in task.train["completion"]}
    assert not learnt & {*rows["dev"]["group"], *rows["test"]["group"]}
    assert (len(rows["dev"]), len(rows["test"])) == (3, 12)


def test_latin_arms_are_what_they_say(tiny, tmp_path):
    evidence.main(["--experiment", "X3", "--seeds", "100", "--output", str(tmp_path)])
    heads, hashes = {}, set()
    for file in tmp_path.rglob("*.json"):
        first, *lines = json.loads(file.read_text())["rows"]
        heads[first["setting"]] = first["arguments"]["head"]
        hashes.add((first["dev_rows_hash"], first["test_rows_hash"]))
        ways = {line["readout"].split(",")[0] for line in lines}
        assert ways == ({"hard"} if heads[first["setting"]] is None else {"hard", "soft"})
        assert {line["n"] for line in lines if line["split"] == "test"} == {4, 12}
    assert {arm: head and head["k"] for arm, head in heads.items()} == {
        "hard": None,
        "hard-long": None,
        "soft-mask": 5,
        "soft-mask-1": 1,
        "shuffled": 5,
    }
    assert len(hashes) == 1 and len({*next(iter(hashes))}) == 2


def test_logs_do_not_make_a_tree_dirty(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(results, "__file__", str(tmp_path / "softar" / "results.py"))
    for folder in ("softar", evidence.LOGS):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / evidence.LOGS / "log.json").write_text("{}")
    assert results.commit().endswith("+") and len(results.commit(besides=evidence.LOGS)) == 40
    (tmp_path / "softar" / "new.py").write_text("")
    assert results.commit(besides=evidence.LOGS).endswith("+")


def test_units_of_the_table_answer_what_its_lines_read(tiny, tmp_path, monkeypatch):
    """With 3 digits in the place of 4, two steps each."""
    monkeypatch.setattr(evidence_mnns, "STEPS", {3: dict.fromkeys(evidence_mnns.ARMS, 2)})
    monkeypatch.setattr(evidence_methods, "FOLDER", tmp_path / "nets")
    arms = evidence_methods.ARMS
    few = {name: arm._replace(steps=4 if arm.row == "coconut" else 2) for name, arm in arms.items()}
    monkeypatch.setattr(evidence_methods, "ARMS", few)
    monkeypatch.setattr(evidence_methods, "RL_STEPS", 2)
    rl = evidence_rl.RL | dict(per_device_train_batch_size=8, num_generations=4)
    monkeypatch.setattr(evidence_rl, "RL", rl)
    of_4 = [name for name, o in evidence_methods.SETTINGS.items() if o["digits"] == 4]
    small = {name[:-1] + "3": evidence_methods.SETTINGS[name] | dict(digits=3) for name in of_4}
    monkeypatch.setattr(evidence_methods, "SETTINGS", small)
    logs = run("--experiment", "methods", "--seeds", "2", folder=tmp_path / "logs")
    assert {*logs} == {f"{name}-seed2.json" for name in small}
    of = {log["rows"][0]["setting"]: log["rows"] for log in logs.values()}
    for read in reads_of(EVIDENCE["methods"]):
        if read.setting in of_4:
            lines = of[read.setting[:-1] + "3"][1:]
            splits = {line["split"] for line in lines if line["readout"] == read.readout}
            assert splits == {"dev", "test"}, read
    first = {name: rows[0] for name, rows in of.items()}
    nets = {file.stem.rpartition("-seed")[0] for file in (tmp_path / "nets").iterdir()}
    assert nets == {"again-discrete-traces-3", "again-trace-soft-3"}
    for net, later in (
        ("again-discrete-traces", ("prefix-soft", "prefix-hard")),
        ("again-trace-soft", evidence_methods.REINFORCED),
    ):
        began = {first[f"{name}-3"]["net_hash"] for name in later}
        assert began == {first[f"{net}-3"]["net_hash"]}
    assert "min_p=0.05," in first["fixed-min-p-3"]["decodes"]
    assert "prompt_prefix=" in first["prefix-soft-3"]["decodes"]
    # X1's own arms, once more: the same arguments
    x1 = evidence_mnns.fields_of("trace-soft", evidence_mnns.data(3)[0], 2)
    assert first["again-trace-soft-3"]["arguments"] == x1
    nfe = {line["readout"]: line["nfe"] for line in of["again-trace-soft-3"][1:]}
    assert nfe["soft"] <= 4 and nfe["soft-beam, 0.5"] <= 4 * 4 and nfe["votes"] > nfe["soft"]


def test_before_the_runs_arms_are_tried_and_timed(tiny, tmp_path, capsys):
    evidence.main(["--experiment", "X1", "--calibrate", "1", "--output", str(tmp_path)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["setting"] for line in lines} == {*evidence_mnns.SETTINGS}
    assert all(min(line["ms"]) > 0 for line in lines)
    fields = '{"max_steps": 1, "learning_rate": 0.5}'
    evidence.main(["--experiment", "X1", "--pilot", "trace-soft-3", "--fields", fields])
    first, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (first["steps"], first["seed"]) == (1, evidence.PILOT_SEED)
    assert {line["split"] for line in lines} == {"dev"} and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("rows, masks, others", [(2, 3, 0), (3, 4, 2), (7, 2, 5)])
def test_shuffled_beliefs_are_of_another_row(rows, masks, others):
    of = torch.arange(rows).repeat_interleave(masks + others)[:, None]
    masked = (torch.arange(len(of)) % (masks + others)) < masks
    other = evidence_latin.from_another_row(Soft(of, torch.ones(len(of), 1)), masked).ids
    assert (other != of)[masked].all() and torch.equal(other[~masked], of[~masked])
    assert sorted(other[:, 0].tolist()) == of[:, 0].tolist()


def test_decoding_shuffled_shows_masks_the_beliefs_about_masks_of_another_row(tiny, monkeypatch):
    """A slot that this step committed is a slot still, and its bare token is nobody's belief."""
    _, rows = evidence_latin.data()
    model, tokenizer = softar.diffusion.load("latin-diffusion-tiny")
    head, seen, fn = dict(k=5, scale=0.5, centre=-1.3, steepness=3.9), [], evidence_latin.shuffled

    def spy(slots, **knobs):
        seen.append((slots, fn(slots, **knobs)))
        return seen[-1][1]

    monkeypatch.setattr(evidence_latin, "shuffled", spy)
    made = evidence_latin.decoders(
        model, tokenizer, evidence_latin.how_soft("shuffled", head), (6,)
    )
    made["soft, 6"].decode([*rows["test"]["template"][:7]])
    committed = 0
    for slots, soft in seen:
        plain, masked = evidence_latin.soft_mask(slots, **head), slots.masked
        committed += (~masked).sum().item()
        for part, own in zip(soft, plain):
            assert torch.equal(part[~masked], own[~masked])
        at = masked.nonzero()[:, 0]
        assert (soft.ids[at, -1] == slots.mask_id).all()
        assert (soft.weights[at, -1] < 1).all() and (
            soft.weights[at, -1] >= 1 - head["scale"]
        ).all()
        row = torch.arange(len(at)) // max(1, len(at) // 7)  # as many masks in each
        source = at.roll(len(at) // 2)
        assert (row != row.roll(len(at) // 2)).all()
        for part, own in zip(soft, plain):
            assert torch.equal(part[at], own[source])
    assert committed and len(seen) == 6


def test_templates_are_not_of_squares_that_settings_were_chosen_on(tiny):
    _, rows = evidence_latin.data()
    section10 = {*load_task("latin", size=1).test["answer"]}
    assert not section10 & {*rows["dev"]["group"], *rows["test"]["group"]}


@pytest.mark.parametrize("name, module", [("X1", evidence_mnns), ("X3", evidence_latin)])
def test_answers_that_are_not_finite_are_logged_and_not_run_again(
    name, module, tiny, tmp_path, monkeypatch, capsys
):
    """Training went well, and what it left decodes to NaN or to an error of torch about it."""
    of_torch = "probability tensor contains either `inf`, `nan` or element < 0"

    def fails(decoders, rows, task, split):
        def decode(prompts):
            raise RuntimeError(of_torch)

        for decoder in decoders.values():
            monkeypatch.setattr(decoder, "decode", decode)
        return readouts(decoders, rows, task, split)

    monkeypatch.setattr(module, "readouts", fails)
    setting = next(iter(module.SETTINGS))
    monkeypatch.setattr(module, "SETTINGS", {setting: module.SETTINGS[setting]})
    monkeypatch.setattr(module, "SEEDS", module.SEEDS[:1])
    (log,) = run("--experiment", name, folder=tmp_path).values()
    assert of_torch in log["rows"][0]["failed"]
    assert not scores_in(log, "soft", "test", 9).any()  # wrong in every row
    run("--experiment", name, "--list", folder=tmp_path)
    assert "0 of 1 units left" in capsys.readouterr().out

    def other(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "readouts", other)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("--experiment", name, folder=tmp_path / "other")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--experiment", "X9"], "experiment='X9'"),
        (["--seeds", "7-3"], "seeds='7-3'"),
        (["--experiment", "X1", "--seeds", "50"], "X1 has those from 0 to"),
        (["--experiment", "X1", "--pilot", "nothing-4"], "pilot='nothing-4'"),
        (["--experiment", "X1", "--calibrate", "0"], "calibrate=0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evidence.main(arguments)
    assert message in capsys.readouterr().err
