"""The trained models that the package brings: they do what their training.json says, and come from
its command."""

import pytest
import torch
from shipped import check_first_steps, made_by, open_recipe

from softar.diffusion import DenoiseConfig, load
from softar.diffusion.evaluate import evaluate
from softar.diffusion.head import load_head
from softar.diffusion.models import CHECKPOINTS
from softar.diffusion.net import facts
from softar.recipe import read, row_config
from softar.tasks import MODELS as OF_TASKS
from softar.tasks import load_task

TASKS = {models["diffusion"]: task for task, models in OF_TASKS.items()}
NAMES = sorted(p.name for p in CHECKPOINTS.iterdir())


def test_what_is_shipped():
    assert [*TASKS] == ["mnns-diffusion-tiny", "latin-diffusion-tiny", "latin-block-tiny"]
    assert sorted(TASKS) == NAMES
    for name in NAMES:
        assert sum(p.stat().st_size for p in (CHECKPOINTS / name).iterdir()) < 2e6
        model, tokenizer = load(name)
        assert facts(model).soft_mask == load_head(CHECKPOINTS / name)
        assert tokenizer.mask_token_id == facts(model).mask_id and model.name_or_path == name
        drawn, _ = load(name, seed=0)  # with a seed the same net, untrained and hard
        assert facts(drawn).soft_mask is None
        shapes = {k: v.shape for k, v in model.state_dict().items()}
        assert shapes == {k: v.shape for k, v in drawn.state_dict().items()}
        assert not torch.equal(
            drawn.get_input_embeddings().weight, model.get_input_embeddings().weight
        )


@pytest.mark.parametrize(("decoding", "least"), [("hard", 0.4), (None, 0.4)])
def test_blocks_complete_squares(decoding, least):
    """Cell by cell, far above what its record says it must be; a net that sees no clue completes
    next to none. In batches, over the cache, as alone."""
    model, tokenizer = load("latin-block-tiny")
    assert facts(model).block_length == 5 and facts(model).shift == 0
    task = load_task("latin-prompt", size=1)
    rows, config = task.test.select(range(60)), DenoiseConfig(soften=decoding)
    found = evaluate(model, tokenizer, rows, task.score, config, gen_length=25)
    assert found["accuracy"] > least and 29 < found["nfe"] <= 30, found
    blind = rows.map(lambda row: {"prompt": " ".join("." * 25), "clues": row["prompt"]})
    clues = evaluate(
        model,
        tokenizer,
        blind,
        lambda text, row: task.score(text, {"prompt": row["clues"]}),
        config,
        gen_length=25,
    )
    assert clues["accuracy"] < 0.05


@pytest.mark.rest
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_solves_its_task_as_recorded(name):
    model, tokenizer = load(name)
    task = load_task(TASKS[name])
    recorded = [r for r in made_by(CHECKPOINTS / name)["decoded"] if r["schedule"] == "uniform"]
    for row in recorded:
        config = DenoiseConfig(
            steps=row["budget"], soften="hard" if row["decoder"] == "hard" else None
        )
        length = task.max_new_tokens
        found = evaluate(model, tokenizer, task.test, task.score, config, gen_length=length)
        assert found["n"] == row["n"] and found["accuracy"] == pytest.approx(
            row["accuracy"], abs=0.01
        ), row
    assert max(r["accuracy"] for r in recorded) > 0.6


@pytest.mark.rest
@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_that_is_named_makes_it(tmp_path, monkeypatch, name):
    """The first hundred steps again, out of two thousand: the same loss and the same head."""
    from softar.diffusion.sft import DiffusionSFTTrainer

    told = made_by(CHECKPOINTS / name)
    recipe, argv = open_recipe("sft_diffusion", told, monkeypatch, tmp_path)
    inputs = read(recipe.RECIPE, argv)
    args = row_config(recipe.RECIPE, inputs, inputs.names[0], inputs.training.seed, tmp_path)
    model, tokenizer = recipe.open_model(inputs, args.seed)
    task = inputs.task
    trainer = DiffusionSFTTrainer(model, args, train_dataset=task.train, processing_class=tokenizer)
    check_first_steps(trainer, told, ("loss", "head_scale", "head_centre", "head_steepness"))
