"""A run from the start in a folder that an earlier run has used: it is the new run's alone."""

import re

import pytest
from launched import argv, recipe, run_here
from peft import PeftModel

import softar
from softar.rows import EARLIER

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
