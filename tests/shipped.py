"""What the tests of the trained models that the package brings share: train one again by the
command that its training.json names, for the first hundred steps."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

ROOT = Path(__file__).parent.parent
STEPS = 100  # up to the first entry of the log


def made_by(folder):
    return json.loads((folder / "training.json").read_text())


def open_recipe(name, told, monkeypatch, output):
    """A recipe as a module, and the arguments that made a model, writing into `output`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, recipe)
    spec.loader.exec_module(recipe)
    words = told["command"].split()
    assert words[:3] == ["accelerate", "launch", f"recipes/{name}.py"]
    return recipe, [*words[3:], "--output_dir", str(output), "--save_strategy", "no"]


class Stop(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= STEPS


def check_first_steps(trainer, told, keys):
    """Trained with the recorded number of steps and seed, it logs the same numbers."""
    assert trainer.args.max_steps == told["train_steps"] and trainer.args.seed == told["seed"]
    trainer.add_callback(Stop())
    trainer.train()
    again, first = next(h for h in trainer.state.log_history if "loss" in h), told["log"][0]
    assert again["step"] == first["step"] == STEPS
    for key in keys:
        assert float(again[key]) == pytest.approx(first[key], rel=0.02), key
