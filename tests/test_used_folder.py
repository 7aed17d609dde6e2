"""A run from the start in a folder that an earlier run has used: it is the new run's alone."""

import json
import re
from importlib import import_module

import pytest
from datasets import Dataset
from launched import argv, recipe, run_here
from peft import LoraConfig, PeftModel

import softar
from softar.recipe import read
from softar.recipe_data import made_with
from softar.resume import ARGUMENTS, EARLIER, FIXED
from softar.rows import TOLD
from softar.sft.config import SoftSFTConfig
from softar.sft.trainer import SoftSFTTrainer

SFT, MASKED = recipe("sft_soft"), recipe("sft_diffusion")
RL, MASKED_RL = recipe("ppo_soft"), recipe("grpo_diffusion")
LINE = '{"prompt": "<bos> D4 D8 D1 D3 ->", "completion": " S4 S-4 S-3 S0"}\n'
REWARD = dict(reward_funcs="test_used_folder.reward", max_completion_length=6)
OF = {SFT: dict(think_steps=3), RL: dict(think_steps=3, **REWARD), MASKED_RL: REWARD}


def reward(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(program, folder, ...) trains a step on rows without held-out ones."""
    (data := tmp_path / "rows.jsonl").write_text(8 * LINE)
    common = dict(dataset_name=data, max_steps=1, per_device_train_batch_size=4, report_to="none")
    causal = dict.fromkeys((SFT, RL), "mnns-discrete-tiny")

    def run(program, folder, **changes):
        model = causal.get(program, "mnns-diffusion-tiny")
        options = dict(model_name_or_path=model, output_dir=folder, disable_tqdm="true")
        run_here(monkeypatch, program, *argv(common | options | OF.get(program, {}) | changes))
        return folder

    return run


def test_whole_weights_answer_where_an_adapter_lay(start, tmp_path, capsys):
    folder = start(SFT, tmp_path / "s", use_peft="true")
    assert isinstance(softar.load(folder)[0], PeftModel)
    start(SFT, folder)
    assert not isinstance(softar.load(folder)[0], PeftModel)
    assert f"an earlier run are now in {folder / EARLIER}" in capsys.readouterr().out
    assert isinstance(softar.load(folder / EARLIER)[0], PeftModel)  # nothing is lost


def test_whole_weights_of_a_trainer_answer_where_an_adapter_lay(tmp_path, capsys):
    """In checkpoints, too."""
    rows = Dataset.from_list(8 * [json.loads(LINE)])
    how = dict(max_steps=1, save_steps=1, think_steps=3, report_to="none", disable_tqdm=True)
    for adapter in (LoraConfig(target_modules=["q_proj"]), None):
        model, tokenizer = softar.load("mnns-tiny")
        args = SoftSFTConfig(output_dir=str(tmp_path), **how)
        parts = dict(train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
        trainer = SoftSFTTrainer(model, args, **parts)
        trainer.train()
        trainer.save_model()
        for folder in (tmp_path, tmp_path / "checkpoint-1"):
            assert isinstance(softar.load(folder)[0], PeftModel) == (adapter is not None)
        assert ("an adapter of an earlier" in capsys.readouterr().out) == (adapter is None)
    assert isinstance(softar.load(tmp_path / EARLIER)[0], PeftModel)  # nothing is lost


FIRST = {
    "adapter": (SFT, dict(use_peft="true")),
    "step temperature": (SFT, dict(learn_step_temperature="true", soft_mode="sequential")),
    "soft masks": (MASKED, dict(softmasking_prob=0.8)),
    "uniform adapter": (
        MASKED,
        dict(use_peft="true", lora_target_modules="all-linear", objective="uniform"),
    ),
    "value head": (RL, dict(num_generations=4)),
    "policy of masks": (MASKED_RL, dict(num_generations=4)),
}


@pytest.mark.parametrize(
    ("name", "resume"), [*((name, None) for name in FIRST), ("adapter", "true")]
)
def test_nothing_of_an_earlier_run_stays_to_be_decoded(start, tmp_path, name, resume):
    """Of none that a trainer saves; a resume that finds no checkpoint is a run from the start, too."""
    program, options = FIRST[name]
    folder = start(program, tmp_path / "s", save_strategy="no", **options)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) > 5
    last = SFT if program in (SFT, RL) else MASKED
    if resume:
        (folder / "row.json").unlink()  # ended before it was finished
    start(last, folder, max_steps=2, resume_from_checkpoint=resume)
    old = {
        path.name
        for path, time in before.items()
        if path.exists() and path.stat().st_mtime_ns == time
    }
    assert old <= {"rewards.png"}


def test_a_model_is_not_set_apart_before_it_is_opened(start, tmp_path, capsys):
    folder = start(SFT, tmp_path / "s", save_steps=1)
    for model in (folder, f"{folder}/", folder / "checkpoint-1"):
        with pytest.raises(SystemExit) as end:
            start(SFT, folder, model_name_or_path=model)
        says = rf"error: model_name_or_path='{model}' lies in the folder.*give another output_dir"
        assert end.value.code == 2 and re.search(says, capsys.readouterr().err)
        assert (folder / "model.safetensors").exists() and not (folder / EARLIER).exists()
    start(SFT, tmp_path / "other", model_name_or_path=folder)


# -- a run that goes on in its folder

RECORD = {*FIXED, "data", "think_steps", "soft_top_k"}


@pytest.fixture
def first(start, tmp_path):
    """A finished row of two steps, which may go on from its checkpoint."""
    return start(SFT, tmp_path / "s", max_steps=2, save_steps=2)


FOREIGN = {
    "model": dict(model_name_or_path="mnns-tiny"),
    "use_peft": dict(use_peft="true", lora_target_modules="q_proj"),
    "program": dict(reward_funcs="test_used_folder.reward", num_generations=4),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("max_steps", [2, 3], ids=["finished", "unfinished"])
def test_a_resume_is_of_the_same_model_and_program(start, first, capsys, name, max_steps):
    """The card and the results would name what the weights have never seen."""
    program = RL if name == "program" else SFT
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    how = dict(max_steps=max_steps, resume_from_checkpoint="true")
    with pytest.raises(SystemExit) as end:
        start(program, first, **how | FOREIGN[name])
    says = rf"error: {name}=.*is of a training with .*: give the same, or start anew"
    assert end.value.code == 2 and re.search(says, capsys.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before


@pytest.mark.parametrize("max_steps", [2, 3], ids=["finished", "unfinished"])
def test_a_resume_names_what_else_is_not_the_same(start, first, tmp_path, capsys, max_steps):
    how = dict(max_steps=max_steps, resume_from_checkpoint="true", save_steps=2)
    (other := tmp_path / "others.jsonl").write_text(6 * LINE)
    now = dict(dataset_name=other, think_steps=2, soft_top_k=4, soft_mixer="gumbel")
    start(SFT, first, **how | now)
    said = capsys.readouterr().out
    for rows in ("others.jsonl, 6 rows", "/rows.jsonl, 8 rows"):
        assert re.search(rf"data='.*{rows} \(\w+\)'", said)
    for name in ("think_steps", "soft_top_k", "soft_mixer"):
        assert f"{name}=" in said


@pytest.mark.parametrize("is_old", [False, True])
def test_a_resume_with_the_same_options_names_nothing(start, first, capsys, is_old):
    """Nor one of a folder that does not know what it was made with, whatever the options."""
    now = {}
    if is_old:
        state = first / "checkpoint-2" / "trainer_state.json"
        content = json.loads(state.read_text())
        told = content["stateful_callbacks"][ARGUMENTS]
        assert {"program", "model", "data", "think_steps"} <= told.keys()
        assert told == json.loads((first / TOLD).read_text())
        for record, file in ((told, state), (json.loads((first / TOLD).read_text()), first / TOLD)):
            for name in RECORD & record.keys():
                del record[name]
            file.write_text(json.dumps(content if record is told else record))
        now = dict(think_steps=2, soft_top_k=4, model_name_or_path="mnns-tiny")
    start(SFT, first, resume_from_checkpoint="true", max_steps=2, save_steps=2, **now)
    assert "kept as it is\n" in capsys.readouterr().out
    start(SFT, first, resume_from_checkpoint="true", max_steps=3, save_steps=2, **now)
    assert re.search(r"with max_steps=3, not 2 \([^;]*\)\n", capsys.readouterr().out)


def test_a_run_tells_what_its_arguments_do_not_know(tmp_path):
    made = import_module("softar.recipes.grpo_soft").RECIPE
    inputs = read(made, argv(dict(task="mnns", output_dir=tmp_path, sft_steps=3, eval_rows=8)))
    told = made_with("grpo_soft", inputs)
    expected = dict(program="grpo_soft", model="mnns-tiny", sft_steps=3, eval_rows=8)
    assert told | expected == told == made_with("grpo_soft", inputs)
    assert told["data"].startswith("mnns, ") and "output_dir" not in told
