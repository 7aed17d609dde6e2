"""Uniform-state diffusion in the trainer and in the loop: loss, noise, checkpoints, redraws,
repair."""

import dataclasses
import itertools
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import QUIET, seeded

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.architectures import LladaConfig, LladaForMaskedDiffusion
from softar.diffusion.duo import GaussianToDiscrete, log_linear, posterior
from softar.diffusion.losses import forward_masked, log_likelihood, normal_rows, uniform_rows
from softar.diffusion.models import load
from softar.diffusion.net import facts, parts
from softar.diffusion.noise import NOISE_FILE, UniformNoise
from softar.diffusion.objectives import Place
from softar.diffusion.schedules import Block
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.diffusion.uniform import Redraw, alphabet, draw_soft, uniform_loss
from softar.models import word_tokenizer
from softar.recipe import read
from softar.tasks import load_task

# The mask stands in the middle, so that a number of the process is no token id.
WORDS = ["<pad>", "<bos>", "a", "b", "<mask>", "c", "d", "e", "f", "<eos>"]
PAD, BOS, MASK, EOS = 0, 1, 4, 9
LETTERS = [2, 3, 5, 6, 7, 8]
LENGTH = 6
UNIFORM = dict(objective="uniform", normalise="tokens")


def tiny(folder, seed=0):
    """An untrained model in a folder of its own, loaded from there."""
    sizes = dict(
        vocab_size=len(WORDS),
        d_model=32,
        mlp_hidden_size=64,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        max_sequence_length=32,
        mask_token_id=MASK,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.2,
        rope_theta=20.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LladaForMaskedDiffusion(LladaConfig(**sizes)).save_pretrained(folder)
    word_tokenizer(WORDS, mask_token="<mask>", model_max_length=32).save_pretrained(folder)
    return load(folder)


def run_of(first, length=LENGTH):
    """Letters in the order of the alphabet, from one on and round: each of them tells all
    others."""
    return [LETTERS[(first + i) % len(LETTERS)] for i in range(length)]


def words(ids):
    return " ".join(WORDS[i] for i in ids)


@pytest.fixture(scope="module")
def runs():
    firsts = [i % len(LETTERS) for i in range(384)]
    return Dataset.from_list(
        [{"prompt": "<bos>", "completion": " " + words(run_of(i, 4 + i % 3))} for i in firsts]
    )


def trainer_of(model, tokenizer, rows, folder, **changes):
    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        max_steps=6,
        learning_rate=3e-3,
        **QUIET,
        seed=3,
    )
    args = DiffusionSFTConfig(**(options | UNIFORM | changes))
    return DiffusionSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model trained on whole runs, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": "<bos>", "completion": " " + words(run_of(i))} for i in range(len(LETTERS))]
    model, tokenizer = tiny(folder / "base")
    trainer = trainer_of(
        model,
        tokenizer,
        Dataset.from_list(rows * 32),
        folder,
        max_steps=300,
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        logging_steps=50,
    )
    trainer.train()
    trainer.save_model()
    return load(folder)[0], folder


def untrained(folder):
    model, _ = tiny(folder)
    model.config.diffusion_process = {"kind": "uniform", "eps": 1e-3, "left_out": [PAD, MASK]}
    return model


# -- the loss


def papers_nelbo(probs, x, z, alpha, dalpha):
    """arXiv:2412.10193, eq. 16, word by word in float64: over lists of U probabilities."""
    U = len(probs)
    bar = [U * alpha * (j == x) + 1 - alpha for j in range(U)]
    theta = [U * alpha * p + 1 - alpha for p in probs]
    inner = sum(
        bar[j] / bar[z] * math.log(theta[z] * bar[j] / (theta[j] * bar[z])) for j in range(U)
    )
    return dalpha / (U * alpha) * (U / bar[z] - U / theta[z] - inner)


@pytest.mark.parametrize("normalise", ["tokens", "answer"])
def test_the_loss_of_a_batch_is_the_papers_sum(tmp_path, runs, normalise):
    model, tokenizer = tiny(tmp_path)
    trainer = trainer_of(model, tokenizer, runs, tmp_path, normalise=normalise, noise_eps=0.01)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    model.train()
    got = trainer.compute_loss(model, batch)
    hook.remove()
    ids, noisy, asked = batch["input_ids"], seen[0], batch["labels"] != -100
    assert torch.equal(noisy[~asked], ids[~asked]) and (noisy != ids).any()
    t = uniform_rows(3, 0, list(range(16)), 1)[:, 0]  # of the first step
    inside = [i for i in range(len(WORDS)) if i not in (PAD, MASK)]
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        hidden = parts(model).body(
            parts(model).embedding(noisy), batch["attention_mask"], positions
        )
        probs = model.lm_head(hidden)[..., inside].double().softmax(-1)
    total, lengths = [0.0] * 16, asked.sum(1).tolist()
    for b, i in asked.nonzero().tolist():
        x, z, alpha = inside.index(ids[b, i]), inside.index(noisy[b, i]), 1 - 0.99 * t[b].item()
        total[b] += papers_nelbo(probs[b, i].tolist(), x, z, alpha, -0.99)
    rows = [s / n for s, n in zip(total, lengths)]
    want = sum(total) / sum(lengths) if normalise == "tokens" else sum(rows) / 16
    assert len(set(lengths)) > 1 and got.item() == pytest.approx(want, rel=1e-4)


def test_the_best_prediction_is_the_belief_of_the_others():
    """One token of known frequencies and nothing beside it: over all x, z and times the loss wants
    the frequencies, whatever z shows, and a cross-entropy would not."""
    noise = UniformNoise(1e-3, (0, 2))
    letters = alphabet(noise, 5, torch.device("cpu"))
    ids, frequency = letters.ids.tolist(), torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    alpha, dalpha = log_linear((torch.arange(16, dtype=torch.float64) + 0.5) / 16)
    assert ids == [1, 3, 4] and letters.number.tolist() == [-1, 0, -1, 1, 2]
    cases = list(itertools.product(range(3), range(3), range(16)))
    x, z, s = (torch.tensor(column) for column in zip(*cases))
    weight = frequency[x] * (alpha[s] * (x == z) + (1 - alpha[s]) / 3)
    raw = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)  # one prediction for each z
    optimiser = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        each = uniform_loss(
            "nelbo", raw[z], letters.ids[x], letters.ids[z], alpha[s], dalpha[s], letters
        )
        (total := (weight * each).sum()).backward()
        return total

    optimiser.step(loss)
    found = raw.detach()[:, ids].softmax(-1)
    torch.testing.assert_close(found, frequency.expand(3, 3), atol=2e-3, rtol=0)
    assert not raw.grad[:, list(noise.left_out)].any()


def test_noise_leaves_prompts_mask_and_padding_alone(tmp_path, runs):
    model, tokenizer = tiny(tmp_path)
    trainer = trainer_of(model, tokenizer, runs, tmp_path, max_steps=12)
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    trainer.train()
    hook.remove()
    assert len(seen) == 12 and all((ids[:, 0] == BOS).all() for ids in seen)
    tokens = torch.cat([ids[:, 1:5].flatten() for ids in seen])  # the shortest answer has 4 letters
    assert set(tokens.tolist()) == {BOS, *LETTERS, EOS}
    # a share 1/2 of the 768 tokens is drawn, 1/4 of that from bos and eos: five standard errors
    assert abs(float(((tokens == BOS) | (tokens == EOS)).float().mean()) - 0.125) < 5 * math.sqrt(
        0.11 / 768
    )


def test_normal_numbers_of_a_position_depend_on_nothing_else():
    asked = torch.tensor([[False, True, True], [True, False, True]])
    numbers = normal_rows(7, 3, [4, 5], asked, 6, stream=2)
    assert numbers.shape == (4, 6)
    wider = torch.cat([asked[1:], torch.zeros(1, 2, dtype=torch.bool)], 1)
    assert torch.equal(normal_rows(7, 3, [5], wider, 6, stream=2), numbers[2:])
    assert not torch.equal(normal_rows(7, 3, [5], wider, 6, stream=1), numbers[2:])
    assert not torch.equal(uniform_rows(7, 3, [5], 6, stream=1), uniform_rows(7, 3, [5], 6))


CURRICULUM = dict(curriculum=0.7, tau_start=0.5, tau_end=0.1, gamma_min=-3.0, gamma_max=6.0)


def test_the_curriculum_goes_from_soft_to_hard(tmp_path, runs):
    model, tokenizer = tiny(tmp_path)
    trainer = trainer_of(model, tokenizer, runs, tmp_path, max_steps=10, **CURRICULUM)
    drawn, corrupt = [], trainer.objective.corrupt

    def recorded(ids, maskable, place):
        drawn.append((corrupt(ids, maskable, place), maskable))
        return drawn[-1][0]

    trainer.objective.corrupt = recorded
    trainer.train()
    assert [noisy.soft is not None for noisy, _ in drawn] == [True] * 7 + [False] * 3
    surest = []
    for noisy, maskable in drawn[:7]:
        weights = noisy.soft.weights
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
        assert not weights[:, [PAD, MASK]].any()
        # the token that the loss is told is the likeliest
        assert torch.equal(weights.argmax(-1), noisy.ids[maskable])
        surest.append(weights.amax(-1).mean().item())
    assert surest[-1] > surest[0] + 0.1  # colder
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("normalise", ["answer", "tokens"])
@pytest.mark.parametrize("view_scale", [False, True])
def test_the_symmetric_kl_goes_with_soft_tokens_and_weights_of_rows(
    tmp_path, runs, normalise, view_scale
):
    """Both KLs against the smoothed clean token, term by term; soft tokens down to a temperature of
    1e-8."""
    model, tokenizer = tiny(tmp_path)
    options = CURRICULUM | dict(curriculum=1.0, tau_start=1e-3, tau_end=1e-8, normalise=normalise)
    options |= dict(uniform_loss="symmetric_kl", view_scale=view_scale, learning_rate=1e-2)
    trainer = trainer_of(model, tokenizer, runs, tmp_path, max_steps=40, **options)
    objective, losses, told = trainer.objective, [], []
    corrupt, compute, letters = objective.corrupt, objective.loss, objective.letters

    def recorded(ids, maskable, place):
        told.append((corrupt(ids, maskable, place), ids, maskable))
        return told[-1][0]

    def computed(*args):
        losses.append(compute(*args))
        return losses[-1]

    objective.corrupt, objective.loss = recorded, computed
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(logged[-5:]) < 0.8 * sum(logged[:5])
    for loss, (noisy, ids, maskable), (_, _, logits, _) in zip(logged, told, losses, strict=True):
        assert noisy.soft is not None
        rows = maskable.nonzero()[:, 0]
        p, U = logits[:, letters.ids].double().softmax(-1).detach(), len(letters.ids)
        y = torch.full_like(p, 1e-3 / U)
        y[torch.arange(len(p)), letters.number[ids[maskable]]] += 1 - 1e-3
        each = (y * (y / p).log()).sum(-1) + (p * (p / y).log()).sum(-1)
        if view_scale:
            alpha = noisy.alpha.double()
            each = each * ((1 - alpha) / (U * alpha + 1 - alpha))[rows]
        count = maskable.sum(1)
        if normalise == "answer":
            want = (each / count[rows]).sum() / len(ids)
        else:
            want = each.mean()
        assert float(loss) == pytest.approx(float(want), rel=1e-3)


def test_soft_tokens_keep_what_their_alpha_says():
    """Off the Gaussian, a token is its own with chance alpha + (1 - alpha) / U of the alpha that
    the loss is told."""
    letters = alphabet(UniformNoise(1e-3, (PAD, MASK)), len(WORDS), torch.device("cpu"))
    schedule, t = GaussianToDiscrete(len(letters.ids), -3.0, 6.0), torch.tensor([0.2, 0.6])
    ids = torch.tensor(LETTERS * 500).expand(2, -1)
    maskable = torch.ones_like(ids, dtype=torch.bool)
    noise = torch.randn(ids.numel(), 8, generator=seeded())
    noisy = draw_soft(ids, maskable, t, noise, 0.1, schedule, letters)
    want = noisy.alpha + (1 - noisy.alpha) / 8
    error = (want * (1 - want) / ids.shape[1]).sqrt()
    assert (((noisy.ids == ids).float().mean(1) - want).abs() < 5 * error).all()
    torch.testing.assert_close((noisy.alpha, noisy.dalpha), schedule(t))
    assert noisy.alpha[0] > noisy.alpha[1] + 0.3


def test_what_a_token_becomes_says_nothing_of_its_neighbours(tmp_path, runs):
    """Whether to replace and by what are independent draws, of the neighbouring positions, too."""
    trainer = trainer_of(*tiny(tmp_path), runs, tmp_path)
    ids = torch.full((16, 1500), LETTERS[0])
    letters, place = trainer.objective.letters, Place(0, list(range(16)), 16, True, 0.0)
    z = trainer.objective.corrupt(ids, torch.ones_like(ids, dtype=torch.bool), place).ids
    number, left = letters.number[z][:, 1:].float(), (z != ids)[:, :-1]
    replaced = z[:, 1:] != LETTERS[0]
    one, other = number[replaced & left], number[replaced & ~left]
    error = math.sqrt(one.var() / len(one) + other.var() / len(other))
    assert min(len(one), len(other)) > 2000 and abs(one.mean() - other.mean()) < 5 * error


def test_rows_of_the_embedding_without_a_token_are_left_out(tmp_path, runs):
    model, tokenizer = tiny(tmp_path)
    model.resize_token_embeddings(len(WORDS) + 2)
    trainer = trainer_of(model, tokenizer, runs, tmp_path)
    assert (
        trainer.uniform.left_out == (PAD, MASK, 10, 11) and facts(model).uniform == trainer.uniform
    )


@pytest.mark.parametrize("options", [{}, CURRICULUM, dict(uniform_loss="symmetric_kl")])
def test_resume_is_exact(tmp_path, runs, options):
    def made(name, **changes):
        model, tokenizer = tiny(tmp_path / "base")
        return trainer_of(model, tokenizer, runs, tmp_path / name, **options | changes)

    whole, half, again = (
        made("whole"),
        made("half", save_strategy="steps", save_steps=3),
        made("half"),
    )
    whole.train()
    half.train()
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    losses = [
        [h["loss"] for h in trainer.state.log_history if "loss" in h] for trainer in (whole, again)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


# -- checkpoints


def test_a_checkpoint_says_what_it_is_until_it_is_trained_on_masks(tmp_path, runs):
    model, tokenizer = tiny(tmp_path / "base")
    assert facts(model).uniform is None
    trainer = trainer_of(model, tokenizer, runs, tmp_path / "uniform", max_steps=1, noise_eps=0.02)
    trainer.train()
    trainer.save_model()
    want = {"kind": "uniform", "eps": 0.02, "left_out": [PAD, MASK], "rows_end": EOS}
    assert (
        json.loads((tmp_path / "uniform" / "config.json").read_text())["diffusion_process"] == want
    )
    model, tokenizer = load(tmp_path / "uniform")
    assert facts(model).uniform == UniformNoise(0.02, (PAD, MASK))
    with pytest.raises(ValueError, match="diffusion_process is uniform"):
        log_likelihood(model, torch.tensor([BOS, 2]), torch.tensor([False, True]))
    masked = trainer_of(
        model, tokenizer, runs, tmp_path / "masked", objective="masked", max_steps=1
    )
    masked.train()
    masked.save_model()
    assert facts(load(tmp_path / "masked")[0]).uniform is None


def test_an_adapter_says_what_it_is(tmp_path, runs):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])

    def adapted(base, name, **options):
        args = DiffusionSFTConfig(
            output_dir=str(tmp_path / name),
            max_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        model, tokenizer = load(base)
        trainer = DiffusionSFTTrainer(
            model, args, train_dataset=runs, processing_class=tokenizer, peft_config=lora
        )
        trainer.train()
        trainer.save_model()
        return load(tmp_path / name)[0]

    tiny(tmp_path / "base")
    assert facts(adapted(tmp_path / "base", "adapter", **UNIFORM)).uniform == UniformNoise(
        1e-3, (PAD, MASK)
    )
    assert (tmp_path / "adapter" / NOISE_FILE).is_file()
    # the same folder, now of masks
    assert facts(adapted(tmp_path / "base", "adapter")).uniform is None
    want = {"kind": "masked", "rows_end": EOS}
    assert json.loads((tmp_path / "adapter" / NOISE_FILE).read_text()) == want
    # a base that is uniform, and an adapter that is not
    untrained(tmp_path / "base").save_pretrained(tmp_path / "base")
    assert facts(load(tmp_path / "base")[0]).uniform is not None
    assert facts(adapted(tmp_path / "base", "adapter")).uniform is None
    (tmp_path / "adapter" / NOISE_FILE).write_text(
        '{"kind": "uniform", "eps": 2, "left_out": [0, 4]}'
    )
    with pytest.raises(ValueError, match=r"eps must be in \[0, 1\)"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"kind": "gaussian"}, "is unknown"),
        ({"kind": "uniform", "eps": 0.1}, "is unknown"),
        ({"kind": "masked", "eps": 0.1}, "is unknown"),
        ({"rows_end": EOS}, "is unknown"),
        ("masked", "is unknown"),
        (
            {"kind": "uniform", "eps": 0.1, "left_out": [PAD]},
            f"must hold the mask token \\(id {MASK}\\)",
        ),
        ({"kind": "uniform", "eps": 0.1, "left_out": [MASK, 10]}, "ids below 10"),
        ({"kind": "uniform", "eps": 0.1, "left_out": [*range(9)]}, "leave 2 tokens"),
    ],
)
def test_a_process_that_does_not_fit(tmp_path, named, says):
    model, _ = tiny(tmp_path)
    model.config.diffusion_process = named
    with pytest.raises(ValueError, match=f"diffusion_process=.*{says}"):
        facts(model)


# -- bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(objective="gaussian"), "objective='gaussian' is unknown"),
        (dict(softmasking_prob=0.5), "softmasking_prob=0.5 does not go with objective='uniform'"),
        (dict(noise="share"), "noise='share' does not go with objective='uniform'"),
        (dict(normalise="masks"), "normalise='masks' does not go .*'tokens' or 'answer'"),
        (dict(uniform_loss="kl"), "uniform_loss='kl' is unknown"),
        (dict(curriculum=1.5), r"curriculum=1.5 must lie in \[0, 1\]"),
        (dict(curriculum=0.5, tau_end=0.0), "tau_end=0.0"),
        (dict(curriculum=0.5, gamma_min=1.0), "gamma_min=1.0"),
        (dict(view_scale=True), "view_scale=True does not go with uniform_loss='nelbo'"),
        (
            dict(objective="masked", view_scale=True),
            "view_scale=True does not go with objective='masked'",
        ),
        (
            dict(objective="masked", curriculum=0.5),
            "curriculum=0.5 does not go with objective='masked'",
        ),
        (
            dict(objective="masked", uniform_loss="symmetric_kl"),
            "uniform_loss='symmetric_kl' does not go",
        ),
    ],
)
def test_bad_options(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        DiffusionSFTConfig(output_dir=str(tmp_path), **UNIFORM | options)


def test_a_completion_with_a_token_that_is_left_out(tmp_path):
    model, tokenizer = tiny(tmp_path)
    rows = Dataset.from_list([{"prompt": "<bos>", "completion": " a <mask> b"}] * 16)
    with pytest.raises(
        ValueError, match=f"holds token {MASK}, which objective='uniform' leaves out"
    ):
        trainer_of(model, tokenizer, rows, tmp_path).train()


@pytest.mark.parametrize(
    "options",
    [
        dict(cache="prefix"),
        dict(threshold=0.9),
        dict(factor=1.0),
        dict(schedule="linear"),
        dict(schedule="pyramid"),
        dict(block_length=3),
        dict(soften="soft-token"),
        dict(select="entropy"),
        dict(alg_temp=0.5),
        dict(remask="conf"),
        dict(cfg_scale=1.0),
        dict(ban_eos=True),
        dict(parity="llada"),
    ],
)
def test_decoding_options_that_mean_nothing(tmp_path, options):
    config = DenoiseConfig(gen_length=6, **({"steps": 2} if "remask" in options else {}) | options)
    with pytest.raises(
        ValueError, match=f"{next(iter(options))}=.* does not go with a uniform-state model"
    ):
        denoise(untrained(tmp_path), torch.tensor([[BOS]]), config=config)


def test_a_row_of_the_recipe_needs_its_schedule(tmp_path):
    recipe = runpy.run_path(str(Path(__file__).parent.parent / "recipes" / "sft_diffusion.py"))
    options = dict(task="mnns", task_size=20, rows="duo", schedules="pyramid", output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"schedules='pyramid'.*decodes with 'uniform' only"):
        read(recipe["RECIPE"], [f"--{name}={value}" for name, value in options.items()])


def test_the_recipe_decodes_a_uniform_model_hard_and_in_more_steps_than_slots(tmp_path):
    recipe = runpy.run_path(str(Path(__file__).parent.parent / "recipes" / "sft_diffusion.py"))
    task = load_task("mnns", size=32)
    task = dataclasses.replace(task, test=task.test.select(range(8)))
    trainer = trainer_of(*load("mnns-diffusion-tiny", seed=0), task.train, tmp_path, max_steps=1)
    rows = list(recipe["decode_all"](trainer, task, ["uniform", "pyramid"]))
    assert [(r["decoder"], r["schedule"], r["budget"], r["nfe"]) for r in rows] == [
        ("hard", "uniform", steps, steps) for steps in (4, 5, 8, 12)
    ]


# -- the loop

M = MASK
CANVAS = torch.tensor(
    [[BOS, 2, M, M, 6, M, M], [PAD, PAD, BOS, M, 5, M, 7], [BOS, M, M, M, M, M, M]]
)
REAL = (CANVAS != PAD).long()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [None, 1, 5])
def test_a_row_alone_is_the_row_in_a_batch(tmp_path, steps, temperature):
    model = untrained(tmp_path)
    config = DenoiseConfig(gen_length=2, steps=steps, temperature=temperature)
    whole = denoise(model, CANVAS, REAL, config=config, rng=[seeded(i) for i in range(3)])
    for i in range(3):
        own = slice(int((REAL[i] == 0).sum()), None)
        alone = denoise(model, CANVAS[i : i + 1, own], config=config, rng=[seeded(i)])
        assert torch.equal(alone.sequences[0], whole.sequences[i, own])
        assert torch.equal(alone.committed_at[0], whole.committed_at[i, own])
        torch.testing.assert_close(alone.confidence[0], whole.confidence[i, own], equal_nan=True)
        assert alone.num_forwards == (steps or int((CANVAS[i] == M).sum()) + 2)
        assert alone.row_forwards[0] == whole.row_forwards[i] == alone.num_forwards
    assert whole.num_forwards == (steps or 8)


def test_what_every_decoding_keeps(tmp_path):
    model = untrained(tmp_path)
    told = []
    config = DenoiseConfig(gen_length=3, steps=7, temperature=1.0)
    out = denoise(
        model, CANVAS, REAL, config=config, rng=seeded(), history=True, callback=told.append
    )
    slots = torch.cat([CANVAS == M, torch.ones(3, 3, dtype=torch.bool)], 1)
    assert (
        len(out.states) == 8
        and out.num_forwards == 7
        and torch.equal(out.states[-1], out.sequences)
    )
    for state in out.states:
        assert torch.equal(
            state[~slots], torch.cat([CANVAS, CANVAS.new_full((3, 3), M)], 1)[~slots]
        )
        assert not torch.isin(state[slots], torch.tensor([PAD, MASK])).any()
    assert len(set(out.states[0][slots].tolist())) > 4  # random ones
    # a token stands since the forward that is said to have decided it, and is another one before
    for b, i in slots.nonzero().tolist():
        at = int(out.committed_at[b, i])
        assert all(state[b, i] == out.sequences[b, i] for state in out.states[at + 1 :])
        assert at == 0 or out.states[at][b, i] != out.sequences[b, i]
        assert out.confidence[b, i] == told[at]["confidence"][b, i]
    assert (out.committed_at[~slots] == -1).all() and out.confidence[~slots].isnan().all()
    for k, (seen, before, after) in enumerate(zip(told, out.states, out.states[1:])):
        assert seen["step"] == k and torch.equal(
            seen["committed"], slots if k == 0 else before != after
        )
    again = denoise(model, CANVAS, REAL, config=config, rng=seeded())
    assert torch.equal(again.sequences, out.sequences)


def logits_of(model, ids, slots):
    net = parts(model)
    with torch.no_grad():
        return forward_masked(net, facts(model), net.embedding(ids), None, slots)[1]


@pytest.mark.parametrize(
    "options", [dict(temperature=1.0), dict(temperature=0.0), dict(temperature=0.7, top_k=1)]
)
def test_the_last_step_is_greedy_and_the_others_draw_from_the_posterior(tmp_path, options):
    model = untrained(tmp_path)
    ids = CANVAS[2:].repeat(400, 1)
    config = DenoiseConfig(gen_length=0, steps=2, **options)
    out = denoise(model, ids, config=config, rng=seeded(), history=True)
    slots, inside = ids == M, torch.tensor([1, 2, 3, 5, 6, 7, 8, 9])
    start, middle, end = out.states
    best = logits_of(model, middle, slots)[:, inside].argmax(-1)
    assert torch.equal(end[slots], inside[best])
    # the mean of the posteriors is the share of each token: 2400 draws, five standard errors
    number = alphabet(facts(model).uniform, len(WORDS), torch.device("cpu")).number
    alphas = [log_linear(torch.tensor(t, dtype=torch.float64), 1e-3)[0] for t in (0.5, 1.0)]
    logits = logits_of(model, start, slots)[:, inside].double()
    if options["temperature"] == 0:
        probs = torch.nn.functional.one_hot(logits.argmax(-1), 8).double()
    else:
        least = logits.topk(options.get("top_k", 8)).values[:, -1:]
        probs = (logits.masked_fill(logits < least, -torch.inf) / options["temperature"]).softmax(
            -1
        )
    want = posterior(probs, number[start[slots]], *alphas)
    found = (middle[slots][:, None] == inside).double()
    error = (want * (1 - want)).sum(0).sqrt() / len(want)
    assert ((found.mean(0) - want.mean(0)).abs() < 5 * error).all()
    stays = want.gather(1, number[start[slots]][:, None]).mean()
    assert abs((middle == start)[slots].double().mean() - stays) < 5 * 0.5 / math.sqrt(len(want))


def test_nan_is_told(tmp_path):
    model = untrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="forward 0 are NaN"):
        denoise(model, torch.tensor([[BOS]]), config=DenoiseConfig(gen_length=4, steps=1))


# -- end to end


def valid(completions):
    """Share of rows that are a whole run."""
    right = {tuple(run_of(i)) for i in range(len(LETTERS))}
    return sum(tuple(row[:LENGTH]) in right for row in completions.tolist()) / len(completions)


def repaired(model, steps=8, left=2):
    """Share of the wrong tokens that the last `left` of `steps` redraws put right, each in a run of
    its own, and of the right tokens that they keep."""
    right = torch.tensor(
        [[BOS, *run_of(i), EOS] for i in range(len(LETTERS)) for _ in range(LENGTH * 5)]
    )
    ids, where = right.clone(), torch.zeros_like(right, dtype=torch.bool)
    for b in range(len(ids)):
        column, shift = 1 + b % LENGTH, 1 + b // LENGTH % 5
        where[b, column] = True
        ids[b, column] = LETTERS[(LETTERS.index(int(right[b, column])) + shift) % len(LETTERS)]
    assert (ids != right).sum(1).eq(1).all()
    slots = torch.ones_like(where)
    slots[:, 0] = False
    count = torch.full((len(ids),), steps)
    rule = Redraw(
        Block(0, ids.shape[1], count, count),
        DenoiseConfig(temperature=1.0),
        facts(model).uniform,
        len(WORDS),
    )
    rng, rows = seeded(), slots.nonzero()[:, 0]
    for index in range(steps - left, steps):
        uniform = torch.rand(len(rows), generator=rng, dtype=torch.float64)
        tokens, _ = rule(index, logits_of(model, ids, slots), ids[slots], rows, uniform)
        ids = ids.masked_scatter(slots, tokens)
    kept = (ids == right)[slots & ~where]
    return (ids == right)[where].float().mean().item(), kept.float().mean().item()


def test_a_trained_model_repairs_wrong_tokens_and_an_untrained_one_does_not(trained, tmp_path):
    model, _ = trained
    control = untrained(tmp_path)
    for left in (1, 2):
        put_right, kept = repaired(model, left=left)
        assert put_right > 0.9 and kept > 0.9
    put_right, kept = repaired(control)
    assert put_right < 0.4 and kept < 0.4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_trained_model_writes_runs_from_random_tokens(trained, tmp_path, temperature):
    model, _ = trained
    prompts = torch.full((200, 1), BOS)
    config = DenoiseConfig(gen_length=LENGTH + 1, steps=16, temperature=temperature)
    out = denoise(model, prompts, config=config, rng=seeded())
    assert valid(out.completions) > 0.5 and (out.completions[:, -1] == EOS).float().mean() > 0.9
    # and every kind of run
    assert len({tuple(row) for row in out.completions.tolist()}) >= len(LETTERS)
    assert (
        valid(denoise(untrained(tmp_path), prompts, config=config, rng=seeded()).completions) < 0.1
    )
