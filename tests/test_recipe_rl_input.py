"""The RL recipes with bad input: one line that names it, before any training."""

import dataclasses
import json
import runpy

import pytest
from datasets import Dataset
from launched import PYTHON, assert_fails, run
from test_recipe_rl import RECIPES, options

from softar.recipe import read, row_config
from softar.rl.policies import KNOBS
from softar.rl.rewards import as_chats
from softar.tasks import Task


def test_bad_input_ends_with_one_line_and_code_2(tmp_path):
    done = run(*PYTHON, RECIPES["grpo"], *options(tmp_path / "out", num_generations=1), code=2)
    lines = [
        line for line in done.stderr.splitlines() if "error" in line.lower() or "Traceback" in line
    ]
    assert len(lines) == 1 and lines[0].startswith("grpo_soft.py: error: num_generations=1"), (
        done.stderr
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(rows="soft,hrad"), "'hrad' is unknown.*hard"),
        (dict(task="mnnns"), "task='mnnns' is unknown.*'mnns'"),
        (dict(task="reasoning_gym:chain_summ"), "chain_sum'"),
        (dict(task="mnns", task_size=0), "size=0"),
        (dict(task="reasoning_gym:chain_sum"), "has no model of its own"),
        (dict(task="latin"), "has no model of its own"),
        (dict(model_name_or_path="mnns-tinny", task="mnns"), "model='mnns-tinny'.*'mnns-tiny'"),
        (dict(dataset_name="/no/such", model_name_or_path="mnns-tiny"), "/no/such"),
        (dict(config="/no/such.yaml"), "config='/no/such.yaml'"),
        (dict(bogus=1), "'--bogus'"),
        (dict(num_seeds=0), "num_seeds=0"),
        (dict(sft_steps=-1), "sft_steps=-1"),
        (dict(eval_rows=0), "eval_rows=0"),
        (dict(eval_draws=0), "eval_draws=0"),
        (dict(num_generations=1), "num_generations=1"),
        (dict(soft_k=1), "soft_k=1.*'soft'"),
        (dict(rows="hybrid", soft_k=5), "soft_k=5 does nothing with the rows hybrid"),
        (dict(rows="hybrid,hard", soft_ratio="joint"), "soft_ratio='joint' does nothing with the"),
        (dict(rows="hard,gumbel", soft_candidates=500), "soft_candidates=500 must be at most"),
        (dict(soft_k=0), "k=0"),
        (dict(rows="soft", task="mnns", think_steps=6, max_completion_length=6), "think_steps=6"),
        (dict(top_p=0.9), r"top_p=0\.9"),
        (dict(temperature=0), "temperature=0"),
        (dict(reward_funcs="acuracy_reward"), "'acuracy_reward'.*accuracy_reward"),
        (dict(reward_funcs="json.dumpz"), "dumpz"),
        (dict(reward_funcs="json:dumpz"), "reward_funcs='json:dumpz': there is no 'dumpz'"),
        (dict(reward_funcs="os:sep"), "reward_funcs='os:sep' is a str, and no function"),
        (dict(reward_funcs="think_format_reward"), "reads chats"),
        (dict(reward_funcs="accuracy_reward"), r"needs the columns \['solution'\]"),
        (dict(load_in_4bit="true"), "load_in_4bit"),
        (dict(resume_from_checkpoint="/no/such"), "resume_from_checkpoint='/no/such'"),
    ],
)
def test_bad_input_is_named_before_any_training(
    tmp_path, monkeypatch, capsys, algorithm, changes, says
):
    if changes.get("task", "").startswith("reasoning_gym"):
        pytest.importorskip("reasoning_gym")
    if "dataset_name" in changes:
        changes = changes | {"task_size": None}
    assert_fails(
        monkeypatch, capsys, RECIPES[algorithm], options(tmp_path / "out", **changes), says
    )
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("results.json"))


def test_data_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    lines = {"train": {"question": "1"}, "asked": {"prompt": "D1"}}
    for split, line in lines.items():
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
        changes = dict(
            task_size=None,
            eval_rows=None,
            model_name_or_path="mnns-tiny",
            dataset_name=tmp_path / "data",
        )
        says = "and rows need prompt" if split == "train" else "--reward_funcs"
        assert_fails(
            monkeypatch, capsys, RECIPES["grpo"], options(tmp_path / "out", **changes), says
        )
        (tmp_path / "data" / "train.jsonl").unlink()
        (tmp_path / "data" / "train.jsonl").write_text(json.dumps(lines["asked"]) + "\n")
    chat = {"prompt": [{"role": "user", "content": "1 + 1"}], "solution": "2"}
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(chat))
    changes |= dict(reward_funcs="accuracy_reward")
    for name, says in {
        "sft_steps": "sft_steps=60 does nothing to a model that is named, 'mnns-tiny': leave it out",
        "eval_draws": "eval_draws=2 does nothing without held-out rows: leave it out, or give some",
    }.items():
        args = options(tmp_path / "out", **changes)
        assert_fails(monkeypatch, capsys, RECIPES["rloo"], args, says)
        changes |= {name: None}
    (tmp_path / "file").write_text("")
    args = options(tmp_path / "file" / "out")
    assert_fails(
        monkeypatch, capsys, RECIPES["ppo"], args, "output_dir='.*/file/out' cannot be written"
    )
    (tmp_path / "c.yaml").write_text("task: mnns\nmax_stepz: 3\n")
    assert_fails(
        monkeypatch, capsys, RECIPES["grpo"], ["--config", str(tmp_path / "c.yaml")], "max_stepz"
    )


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "rloo"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(rows="gumbel", soft_tau=0.3, soft_ratio="joint"),
        dict(rows="gumbel,soft", soft_candidates=4, soft_k=2),
        dict(rows="mixture-of-inputs,hard", soft_beta=2.0),
        dict(rows="hybrid", soft_share=0.25),
    ],
    ids=lambda value: value["rows"],
)
def test_rows_take_options_of_their_own(tmp_path, algorithm, changes):
    """Each reaches the rows whose mixer has it."""
    made = runpy.run_path(RECIPES[algorithm])["RECIPE"]
    inputs = read(made, options(tmp_path, **changes))
    configs = {name: row_config(made, inputs, name, 1, tmp_path) for name in inputs.names}
    for option, value in changes.items():
        if option != "rows":
            assert value in {getattr(args, option) for args in configs.values()}, option
    for args in configs.values():
        told = [option for option in KNOBS[args.soft_mixer] if option in changes]
        assert all(getattr(args, option) == changes[option] for option in told)


def test_a_second_system_message_is_refused():
    """Rows that have one got another before it."""
    user = {"role": "user", "content": "w5"}
    chats = Dataset.from_list([{"prompt": [user]}, {"prompt": [{**user, "role": "system"}, user]}])
    task = Task("own", chats.select([0]), chats, None, None)
    with pytest.raises(
        ValueError, match=r"system_prompt='Be brief\.': row 1 of 'own' has a system mes"
    ):
        as_chats(task, "Be brief.")
    one = as_chats(dataclasses.replace(task, test=None), "Be brief.").train[0]["prompt"]
    assert [message["role"] for message in one] == ["system", "user"]
