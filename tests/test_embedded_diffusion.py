"""The trained models that the package brings: they do what their training.json says, and come from its command."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from softar.diffusion import DenoiseConfig, load
from softar.diffusion.evaluate import evaluate
from softar.diffusion.head import load_head
from softar.diffusion.models import CHECKPOINTS, facts
from softar.tasks import load_task

ROOT = Path(__file__).parent.parent
NAMES = sorted(p.name for p in CHECKPOINTS.iterdir())
CONFIGS = {"latin": "latin.yaml", "mnns": "mnns_diffusion.yaml"}


def made_by(name):
    return json.loads((CHECKPOINTS / name / "training.json").read_text())


def test_what_is_shipped():
    assert "latin-diffusion-tiny" in NAMES
    for name in NAMES:
        assert sum(p.stat().st_size for p in (CHECKPOINTS / name).iterdir()) < 2e6
        model, tokenizer = load(name)
        assert facts(model).soft_mask == load_head(CHECKPOINTS / name)
        assert tokenizer.mask_token_id == facts(model).mask_id and model.name_or_path == name
        drawn, _ = load(name, seed=0)  # with a seed the same net, untrained and hard
        assert facts(drawn).soft_mask is None
        shapes = {k: v.shape for k, v in model.state_dict().items()}
        assert shapes == {k: v.shape for k, v in drawn.state_dict().items()}
        assert not torch.equal(drawn.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_solves_its_task_as_recorded(name):
    model, tokenizer = load(name)
    task = load_task(name.split("-")[0])
    recorded = [r for r in made_by(name)["decoded"] if r["schedule"] == "uniform"]
    for row in recorded:
        config = DenoiseConfig(steps=row["budget"], soften="hard" if row["decoder"] == "hard" else None)
        found = evaluate(model, tokenizer, task.test, task.score, config)
        assert found["n"] == row["n"] and found["accuracy"] == pytest.approx(row["accuracy"], abs=0.01), row
    assert max(r["accuracy"] for r in recorded) > 0.6


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_that_is_named_makes_it(tmp_path, monkeypatch, name):
    """The first hundred steps again, out of two thousand: the same loss and the same head."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("sft_diffusion", ROOT / "recipes" / "sft_diffusion.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sft_diffusion", recipe)
    spec.loader.exec_module(recipe)
    from softar.diffusion.sft import DiffusionSFTTrainer

    told = made_by(name)
    words = told["command"].split()
    assert words[:3] == ["accelerate", "launch", "recipes/sft_diffusion.py"]
    parser = recipe.TrlParser(
        (recipe.DiffusionScriptArguments, recipe.RecipeConfig, recipe.ModelConfig, recipe.DatasetMixtureConfig)
    )
    argv = recipe.with_demo_config([*words[3:], "--output_dir", str(tmp_path), "--save_strategy", "no"])
    script, training, model_args, _ = parser.parse_args_and_config(argv)
    args = recipe.row_config(training, script.rows, training.seed, tmp_path)
    assert args.max_steps == told["train_steps"] and args.seed == told["seed"]
    task = load_task(script.task)
    model, tokenizer = recipe.open_model(model_args, task, args.seed, False)
    trainer = DiffusionSFTTrainer(model, args, train_dataset=task.train, processing_class=tokenizer,
                                  callbacks=[StopAt(100)])  # fmt: skip
    trainer.train()
    again, first = next(h for h in trainer.state.log_history if "loss" in h), told["log"][0]
    assert again["step"] == first["step"] == 100
    for key in ("loss", "head_scale", "head_centre", "head_steepness"):
        assert float(again[key]) == pytest.approx(first[key], rel=0.02), key
