"""The trained causal models that the package brings: they do what their training.json says, and come from its command.
The diffusion models' own tests are in test_embedded_diffusion.py."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from softar import SoftConfig, load
from softar.evaluate import evaluate
from softar.models import CHECKPOINTS, folder_of
from softar.tasks import load_task

ROOT = Path(__file__).parent.parent
NAMES = ["mnns-discrete-tiny", "mnns-soft-tiny"]


def made_by(name):
    return json.loads((CHECKPOINTS / name / "training.json").read_text())


def test_what_is_shipped(tmp_path):
    assert sorted(p.name for p in CHECKPOINTS.iterdir()) == NAMES
    untrained = load("mnns-tiny")[0].state_dict()
    for name in NAMES:
        assert folder_of(name) == CHECKPOINTS / name
        assert sum(p.stat().st_size for p in folder_of(name).iterdir()) < 2e6
        model, tokenizer = load(name, dtype="float64")
        assert model.name_or_path == tokenizer.name_or_path == name and model.dtype == torch.float64
        weights = load(name)[0].state_dict()
        assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in untrained.items()}
        assert not torch.equal(weights["lm_head.weight"], untrained["lm_head.weight"])
        SoftConfig.load(folder_of(name))
    assert folder_of("mnns-tiny") is None and folder_of("owner/name") is None and folder_of(tmp_path) == tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_solves_its_task_as_recorded(name):
    model, tokenizer = load(name)
    task = load_task("mnns")
    config = SoftConfig.load(folder_of(name))
    configs = {readout: dataclasses.replace(config, mixer=m) for readout, m in (("soft", "soft"), ("discrete", "hard"))}
    found = {}
    for row in made_by(name)["decoded"]:
        got = evaluate(model, tokenizer, task.test, task.score, configs[row["readout"]])
        assert got["n"] == row["n"] and got["nfe"] == pytest.approx(row["nfe"], abs=1)
        assert got["accuracy"] == pytest.approx(row["accuracy"], abs=0.01), row
        found[row["readout"]] = got["accuracy"]
    gain = found["soft"] - found["discrete"]
    assert found["soft"] > 0.85 and (gain > 0.2 if name == "mnns-soft-tiny" else abs(gain) < 0.05)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_that_is_named_makes_it(tmp_path, monkeypatch, name):
    """The first hundred steps again, out of four thousand: the same loss and the same entropy of the thoughts."""
    spec = importlib.util.spec_from_file_location("sft_soft", ROOT / "recipes" / "sft_soft.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sft_soft", recipe)
    spec.loader.exec_module(recipe)
    from softar.sft import SoftSFTTrainer

    told = made_by(name)
    words = told["command"].split()
    assert words[:3] == ["accelerate", "launch", "recipes/sft_soft.py"]
    monkeypatch.chdir(ROOT)
    argv = [*words[3:], "--output_dir", str(tmp_path), "--save_strategy", "no"]
    script, training, model_args, mixture = recipe.make_parser().parse_args_and_config(argv)
    names, task = recipe.check_input(script, training, mixture)
    args = recipe.row_config(training, names[0], training.seed, tmp_path, task)
    assert args.max_steps == told["train_steps"] and args.seed == told["seed"]
    model, tokenizer = recipe.open_model(model_args, task, args.seed)
    trainer = SoftSFTTrainer(model, args, train_dataset=task.train, processing_class=tokenizer, score=task.score,
                             callbacks=[StopAt(100)])  # fmt: skip
    trainer.train()
    again, first = next(h for h in trainer.state.log_history if "loss" in h), told["log"][0]
    assert again["step"] == first["step"] == 100
    for key in ("loss", "thought_entropy"):
        assert float(again[key]) == pytest.approx(first[key], rel=0.02), key
