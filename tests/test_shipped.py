"""The trained causal models that the package brings: they do what their training.json says, and
come from its command. The diffusion models' own tests are in test_embedded_diffusion.py."""

import dataclasses

import pytest
import torch
from shipped import ROOT, check_first_steps, made_by, open_recipe

from softar import SoftConfig, load
from softar.evaluate import evaluate
from softar.models import CHECKPOINTS, folder_of
from softar.recipe import read, row_config
from softar.tasks import load_task

NAMES = ["mnns-discrete-tiny", "mnns-soft-tiny"]


def test_what_is_shipped(tmp_path):
    assert sorted(p.name for p in CHECKPOINTS.iterdir()) == NAMES
    untrained = load("mnns-tiny")[0].state_dict()
    for name in NAMES:
        assert folder_of(name) == CHECKPOINTS / name
        assert sum(p.stat().st_size for p in folder_of(name).iterdir()) < 2e6
        model, tokenizer = load(name, dtype="float64")
        assert model.name_or_path == tokenizer.name_or_path == name and model.dtype == torch.float64
        weights = load(name)[0].state_dict()
        assert {k: v.shape for k, v in weights.items()} == {
            k: v.shape for k, v in untrained.items()
        }
        assert not torch.equal(weights["lm_head.weight"], untrained["lm_head.weight"])
        SoftConfig.load(folder_of(name))
    assert (
        folder_of("mnns-tiny") is None
        and folder_of("owner/name") is None
        and folder_of(tmp_path) == tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_solves_its_task_as_recorded(name):
    model, tokenizer = load(name)
    task = load_task("mnns")
    config = SoftConfig.load(folder_of(name))
    configs = {
        readout: dataclasses.replace(config, mixer=m)
        for readout, m in (("soft", "soft"), ("discrete", "hard"))
    }
    accuracy = {}
    for row in made_by(CHECKPOINTS / name)["decoded"]:
        measured = evaluate(model, tokenizer, task.test, task.score, configs[row["readout"]])
        assert measured["n"] == row["n"] and measured["nfe"] == pytest.approx(row["nfe"], abs=1)
        assert measured["accuracy"] == pytest.approx(row["accuracy"], abs=0.01), row
        accuracy[row["readout"]] = measured["accuracy"]
    gain = accuracy["soft"] - accuracy["discrete"]
    assert accuracy["soft"] > 0.85 and (
        gain > 0.2 if name == "mnns-soft-tiny" else abs(gain) < 0.05
    )


@pytest.mark.rest
@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_that_is_named_makes_it(tmp_path, monkeypatch, name):
    """The first hundred steps again, out of four thousand: the same loss and the same entropy of
    the thoughts."""
    from softar.sft.trainer import SoftSFTTrainer

    record = made_by(CHECKPOINTS / name)
    recipe, argv = open_recipe("sft_soft", record, monkeypatch, tmp_path)
    monkeypatch.chdir(ROOT)
    inputs = read(recipe.RECIPE, argv)
    args = row_config(recipe.RECIPE, inputs, inputs.names[0], inputs.training.seed, tmp_path)
    model, tokenizer = recipe.open_model(inputs, args.seed)
    task = inputs.task
    trainer = SoftSFTTrainer(
        model, args, train_dataset=task.train, processing_class=tokenizer, score=task.score
    )
    check_first_steps(trainer, record, ("loss", "thought_entropy"))
