"""Masked-diffusion training: noise and losses against brute force, the head, the trainer."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import QUIET

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.architectures import LladaConfig, LladaForMaskedDiffusion
from softar.diffusion.evaluate import evaluate, nll_bound
from softar.diffusion.head import HEAD_FILE, SoftMaskHead, load_head, save_head
from softar.diffusion.losses import (
    divisor,
    forward_masked,
    log_likelihood,
    mask_counts,
    masked_ce,
    uniform_rows,
    weights_of,
)
from softar.diffusion.masking import at_least_one, mask_at_rate, mask_share
from softar.diffusion.models import load
from softar.diffusion.net import facts, parts
from softar.diffusion.select import Belief
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.diffusion.soften import Slots, soft_mask
from softar.diffusion.uniform import noise_for
from softar.tasks import load_task


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# -- noise


def one_unit(maskable):
    """Of rows that are a document each."""
    return torch.zeros_like(maskable, dtype=torch.long)


def test_masks_at_a_rate():
    maskable = torch.ones(2000, 20, dtype=torch.bool)
    maskable[:, :5] = False
    rate = torch.linspace(0.1, 0.9, 2000)[:, None]
    masked = mask_at_rate(maskable, rate, uniform(2000, 20), one_unit(maskable))
    assert not masked[:, :5].any()
    # 30,000 draws of mean rate .5: five standard errors are .0145
    assert abs(masked[:, 5:].float().mean() - 0.5) < 0.0145
    assert masked[:200].float().mean() < masked[-200:].float().mean() - 0.4


def test_at_least_one():
    maskable = torch.tensor([[False, True, True], [False, True, True]])
    numbers = torch.tensor([[0.1, 0.7, 0.4], [0.1, 0.7, 0.8]])
    masked = mask_at_rate(maskable, torch.tensor([[0.0], [0.75]]), numbers, one_unit(maskable))
    assert masked.tolist() == [[False, False, False], [False, True, False]]
    masked = at_least_one(masked, maskable, numbers, one_unit(maskable))
    assert masked.tolist() == [[False, False, True], [False, True, False]]


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.26, 2), (0.5, 4), (1.0, 8)])
def test_masks_a_share(share, count):
    maskable = torch.ones(50, 11, dtype=torch.bool)
    maskable[:, :3] = False
    rate = torch.full((50, 1), share)
    masked = mask_share(maskable, rate, uniform(50, 11), one_unit(maskable))
    assert (masked.sum(1) == count).all() and not masked[:, :3].any()


def test_numbers_of_a_row_depend_on_nothing_else():
    numbers = uniform_rows(7, 3, [0, 1, 2, 3], 12)
    assert torch.equal(uniform_rows(7, 3, [2], 12)[0], numbers[2])
    assert torch.equal(uniform_rows(7, 3, [2], 5)[0], numbers[2, :5])  # padding more or less
    for other in (
        uniform_rows(8, 3, [2], 12),
        uniform_rows(7, 4, [2], 12),
        uniform_rows(7, 3, [1], 12),
    ):
        assert not torch.equal(other[0], numbers[2])
    assert 0 <= numbers.min() and numbers.max() < 1


# -- losses


def tiny(vocab=4, seed=0, **changes):
    """A random model of a tiny vocabulary, whose last token is the mask."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fields = dict(
            vocab_size=vocab + 1,
            d_model=16,
            mlp_hidden_size=16,
            n_layers=1,
            n_heads=2,
            n_kv_heads=2,
            max_sequence_length=32,
            mask_token_id=vocab,
            initializer_range=0.5,
        )
        return LladaForMaskedDiffusion(LladaConfig(**(fields | changes))).eval()


def ce_of(model, ids, masked):
    net, known = parts(model), facts(model)
    embeds = net.embedding(ids.masked_fill(masked, known.mask_id))
    rows, logits = forward_masked(net, known, embeds, None, masked)
    return rows, masked_ce(logits, ids[masked])


@torch.no_grad()
def brute_force_bound(model, ids, answer):
    """E_t of the 1/t-weighted loss, by its sum over all subsets: every k of A is as likely, and
    weighs A / k."""
    places = answer.nonzero()[:, 0].tolist()
    A, total = len(places), 0.0
    for k in range(1, A + 1):
        sums = []
        for chosen in itertools.combinations(places, k):
            masked = torch.zeros(1, len(ids), dtype=torch.bool)
            masked[0, list(chosen)] = True
            sums.append(float(ce_of(model, ids[None], masked)[1].sum()))
        total += A / k * sum(sums) / len(sums) / A
    return -total


def test_likelihood_is_the_brute_force_sum():
    model, ids = tiny(), torch.tensor([0, 1, 3, 2, 1, 0])
    answer = torch.tensor([False, False, True, True, True, True])
    exact = brute_force_bound(model, ids, answer)
    rng = torch.Generator().manual_seed(0)
    runs = [
        log_likelihood(model, ids, answer, samples=64, batch_size=16, rng=rng) for _ in range(24)
    ]
    mean, error = sum(runs) / 24, torch.tensor(runs).std().item() / math.sqrt(24)
    assert abs(mean - exact) < 5 * error and error < 0.02 * abs(exact)


@pytest.mark.parametrize("A", [1, 2, 3, 5, 6, 8, 16])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 32, 33])
def test_the_likelihoods_numbers_of_masks_are_all_as_likely(A, n):
    counts = torch.stack([mask_counts(A, n, first) for first in range(1, A + 1)])  # [A, n]
    assert (counts.sort(0).values == torch.arange(1, A + 1)[:, None]).all()
    each = torch.stack([counts == k for k in range(1, A + 1)]).sum(-1)  # [A counts, A firsts]
    # and they are spread evenly within a batch
    assert (each >= n // A).all() and (each <= -(-n // A)).all()


def test_likelihood_with_parity_rounds_as_llada_does():
    counts = [
        [int(round(first + i * 3 / 6) - 1) % 3 + 1 for i in range(6)] for first in range(1, 4)
    ]
    assert [mask_counts(3, 6, first, "llada").tolist() for first in range(1, 4)] == counts
    model, ids = tiny(), torch.tensor([0, 1, 3, 2])
    answer = torch.tensor([False, True, True, True])
    one, other = (
        log_likelihood(
            model, ids, answer, samples=6, rng=torch.Generator().manual_seed(2), parity=p
        )
        for p in (None, "llada")
    )
    assert one != other
    with pytest.raises(ValueError, match="parity='dream' is unknown"):
        log_likelihood(model, ids, answer, parity="dream")


def test_likelihood_of_one_token_is_exact():
    model, ids = tiny(), torch.tensor([0, 1, 3, 2])
    answer = torch.tensor([False, False, True, False])
    masked = answer[None]
    exact = -ce_of(model, ids[None], masked)[1].item()
    assert log_likelihood(model, ids, answer, samples=1) == pytest.approx(exact, rel=1e-5)


def test_the_bound_of_a_dataset_is_the_mean_per_token():
    model, tokenizer = load("mnns-diffusion-tiny")
    rows = load_task("mnns").test.select(range(3))
    found = nll_bound(model, tokenizer, rows, samples=400)
    exact, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor(tokenizer(row["prompt"] + row["completion"] + " <eos>")["input_ids"])
        answer = torch.arange(len(ids)) >= 6
        exact, tokens = exact - brute_force_bound(model, ids, answer), tokens + int(answer.sum())
    assert tokens == 15 and found == pytest.approx(exact / tokens, rel=0.1)
    ended = rows.map(lambda row: {"completion": row["completion"] + "<eos>"})
    assert nll_bound(model, tokenizer, ended, samples=400) == found  # counted once
    with pytest.raises(ValueError, match="prompt and completion of text"):
        nll_bound(model, tokenizer, Dataset.from_list([{"text": "D1"}]))


@pytest.mark.parametrize("normalise", ["answer", "tokens"])
@pytest.mark.parametrize("A", [1, 2, 3, 5, 7])
def test_expected_loss_is_the_bound_per_token(normalise, A):
    """By the sum over all masks and the exact integral over the rates, of which the loss is a
    polynomial of degree A - 1."""
    model, ids = tiny(), torch.tensor([[0, 1, *([3, 2, 1, 0, 2, 2, 1][:A])]])
    maskable = torch.arange(2 + A)[None] >= 2
    chosen = torch.tensor([*itertools.product([False, True], repeat=A)])  # [2^A, A]
    rows, documents = len(chosen), one_unit(maskable)
    k, expected = chosen.sum(1), 0.0
    points, weights = np.polynomial.legendre.leggauss(A)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        # numbers whose draw at this rate is each mask in turn
        numbers = torch.cat([torch.zeros(rows, 2), torch.where(chosen, 0.0, 1.0)], 1)
        rate = torch.full((rows, 2 + A), float(point), dtype=torch.float64)
        masked = mask_at_rate(maskable.expand(rows, -1), rate, numbers, documents)
        weights = weights_of(rate[:1], maskable, documents, normalise).expand(rows, -1)[masked]
        with torch.no_grad():
            which, ce = ce_of(model, ids.expand(rows, -1), masked)
        for row in range(rows):
            here = which == row
            total = (ce[here] * weights[here]).sum()
            loss = total / divisor(maskable, masked[row : row + 1], documents, normalise)
            expected += weight * point ** int(k[row]) * (1 - point) ** int(A - k[row]) * float(loss)
    exact = -brute_force_bound(model, ids[0], maskable[0]) / A
    assert expected == pytest.approx(exact, rel=1e-5)


def test_plain_mean_of_masked_tokens():
    ce, masked = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([[True, True], [False, True]])
    maskable, documents = torch.ones_like(masked), one_unit(masked)
    weights = weights_of(torch.tensor([[0.1], [0.9]]), maskable, documents, "masks")
    total = (ce * weights.expand(2, 2)[masked]).sum()
    assert float(total / divisor(maskable, masked, documents, "masks")) == 3.0


def test_shifted_logits():
    """With Dream's shift position i is predicted at i - 1."""
    model, _ = load("tests/golden/checkpoints/dream_gqa")
    ids = torch.tensor([[5, 9, 300, 7, 300]])
    masked = ids == 300
    net = parts(model)
    with torch.no_grad():
        _, got = forward_masked(net, facts(model), net.embedding(ids), None, masked)
        whole = model(input_ids=ids, is_causal=False, use_cache=False).logits
    torch.testing.assert_close(got, whole[0, [1, 3]])


# -- the head


def slots_of(logits, mask_id):
    n = len(logits)
    ids = torch.full((n,), mask_id)
    return Slots(
        Belief(logits, with_entropy=True),
        ids,
        torch.ones(n, dtype=torch.bool),
        torch.ones(n),
        mask_id,
        None,
    )


@pytest.mark.parametrize("algorithm", ["top-k", "temperature"])
def test_head_starts_where_told_and_learns(algorithm):
    head = SoftMaskHead(
        k=2, scale=0.3, centre=-1.2, steepness=4.0, temperature=1.5, algorithm=algorithm
    )
    settings = head.settings()
    want = dict(scale=0.3, centre=-1.2, steepness=4.0, temperature=1.5)
    assert {k: settings[k] for k in want} == pytest.approx(want, abs=1e-5)
    slots = slots_of(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 2, 7)
    soft = head(slots)
    plain = soft_mask(slots, **settings)
    torch.testing.assert_close(soft.weights, plain.weights, atol=1e-5, rtol=0)
    torch.testing.assert_close(soft.weights.sum(-1), torch.ones(5))
    (soft.weights[:, 0] ** 2).sum().backward()
    learnt = {name for name, p in head.raw.items() if p.grad is not None and p.grad != 0}
    assert learnt == {"scale", "centre", "steepness"} | (
        {"temperature"} if algorithm == "temperature" else set()
    )


@pytest.mark.parametrize(
    "temperature", [1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0, 1.01, 1.5, 4.0, 10.0]
)
@pytest.mark.parametrize("forbidden", ["least", "-inf"])
def test_gradients_of_the_temperature_head_are_those_of_finite_differences(temperature, forbidden):
    """The mask is never believed in: its logit is the least number, divided by any temperature."""
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double() * 2
    logits[:, 7] = -torch.inf if forbidden == "-inf" else torch.finfo(torch.float32).min
    made = dict(scale=0.3, centre=-1.2, steepness=4.0, temperature=temperature)
    probe = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double() * 50

    def loss_of(head, logits):
        slots = slots_of(logits, 7)._replace(share=torch.ones(5, dtype=logits.dtype))
        return (head(slots).weights * probe.to(logits.dtype)).sum()

    head = SoftMaskHead(algorithm="temperature", **made).double()
    loss_of(head, logits).backward()
    for name, raw in head.raw.items():
        values, h = [], 1e-6
        for sign in (1, -1):
            with torch.no_grad():
                raw += sign * h
                values.append(float(loss_of(head, logits)))
                raw -= sign * h
        slope = (values[0] - values[1]) / (2 * h)
        assert float(raw.grad) == pytest.approx(slope, rel=1e-4, abs=1e-6), name
    single = SoftMaskHead(algorithm="temperature", **made)
    loss_of(single, logits.float().clamp_min(torch.finfo(torch.float32).min)).backward()
    for name, raw in single.raw.items():
        assert float(raw.grad) == pytest.approx(float(head.raw[name].grad), rel=1e-3, abs=1e-3)


def test_head_near_zero_is_the_hard_model():
    soft = SoftMaskHead()(slots_of(torch.randn(3, 8), 7))
    assert soft.ids[:, -1].tolist() == [7, 7, 7] and (soft.weights[:, -1] > 1 - 1e-5).all()


def test_head_file_round_trip(tmp_path):
    settings = SoftMaskHead(scale=0.4, k=5).settings()
    save_head(settings, tmp_path)
    named = json.loads((tmp_path / HEAD_FILE).read_text())
    assert named["transparency_alg"] == "mixinputs_with_topk" and named["mixinputs_k"] == 5
    assert load_head(tmp_path) == settings | {"scheduling": "none"}
    DenoiseConfig(soften="soft-mask", soften_args=load_head(tmp_path))
    assert load_head(tmp_path / "nowhere") is None


def test_a_head_file_that_says_none_overrules_the_configuration(tmp_path):
    model, _ = load("latin-diffusion-tiny")
    model.save_pretrained(tmp_path)
    assert facts(load(tmp_path)[0]).soft_mask == facts(model).soft_mask is not None
    for numbers in ({}, {"transparency_scale": 0.1, "transparency_centre": -1}):
        (tmp_path / HEAD_FILE).write_text(json.dumps({"transparency_alg": "none"} | numbers))
        assert load_head(tmp_path) == {} and facts(load(tmp_path)[0]).soft_mask is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transparency_scale": None}, "transparency_scale=None must be a number"),
        ({"transparency_alg": "mixed"}, "transparency_alg='mixed'"),
        ({"transparency_slope": 1}, "transparency_slope"),
        ({"transparency_scheduling": "cosine"}, "transparency_scheduling='cosine'"),
    ],
)
def test_bad_head_file(tmp_path, change, message):
    save_head(SoftMaskHead().settings(), tmp_path)
    named = json.loads((tmp_path / HEAD_FILE).read_text())
    (tmp_path / HEAD_FILE).write_text(json.dumps(named | change))
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)


def test_head_file_with_a_field_missing(tmp_path):
    (tmp_path / HEAD_FILE).write_text(
        '{"transparency_alg": "mixinputs_with_topk", "transparency_scale": 0.1}'
    )
    with pytest.raises(
        ValueError, match=r"lacks \['transparency_centre', 'transparency_steepness'\]"
    ):
        load_head(tmp_path)


# -- the trainer


@pytest.fixture(scope="module")
def task():
    return load_task("mnns", size=256)


def trainer_of(folder, task, eval_dataset=None, **changes):
    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=32,
        max_steps=6,
        learning_rate=3e-3,
        **QUIET,
        eval_decode_rows=0,
        seed=3,
    )
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    args = DiffusionSFTConfig(**(options | changes))
    rows = dict(train_dataset=task.train, eval_dataset=eval_dataset)
    return DiffusionSFTTrainer(model, args, **rows, processing_class=tokenizer), tokenizer


def losses_of(trainer):
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


SOFT = dict(softmasking_prob=0.8, head_scale=0.3, head_centre=-1.0, head_steepness=3.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        SOFT,
        dict(SOFT, head_algorithm="temperature"),
        dict(noise="share", normalise="masks"),
        dict(train_padding=True),
    ],
)
def test_training_learns(tmp_path, task, options):
    trainer, _ = trainer_of(tmp_path, task, max_steps=30, learning_rate=1e-2, **options)
    # on the same noise, of which a step's few masks hold too much
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.8 * before
    if options.get("softmasking_prob"):
        assert trainer.head.settings()["scale"] != pytest.approx(0.3, abs=1e-4)


def test_prompts_are_never_masked_and_masks_never_proposed(tmp_path, task):
    trainer, tokenizer = trainer_of(tmp_path, task)
    seen = []
    embedding = trainer.model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    trainer.train()
    hook.remove()
    arrow = tokenizer.convert_tokens_to_ids("->")
    for ids in (s for s in seen if s.dim() == 2):
        place = (ids == arrow).int().argmax(1, keepdim=True)
        masked = ids == tokenizer.mask_token_id
        assert masked.any() and not (masked & (torch.arange(ids.shape[1]) <= place)).any()


def test_resume_is_exact(tmp_path, task):
    whole, _ = trainer_of(tmp_path / "whole", task, **SOFT)
    whole.train()
    half, _ = trainer_of(tmp_path / "half", task, save_strategy="steps", save_steps=3, **SOFT)
    half.train()
    again, _ = trainer_of(tmp_path / "half", task, **SOFT)
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert losses_of(again) == losses_of(whole)
    assert again.head.settings() == whole.head.settings()


def test_the_best_checkpoint_is_taken_up_with_its_head(tmp_path, task):
    keeping = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    keeping |= dict(load_best_model_at_end=True, metric_for_best_model="loss", max_steps=2)
    trainer, _ = trainer_of(
        tmp_path, task, eval_dataset=task.train.select(range(2)), **keeping, **SOFT
    )
    trainer.evaluate = lambda **options: {"eval_loss": float(trainer.state.global_step)}
    trainer.train()
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    for folder, here in ((best, True), (tmp_path / "checkpoint-2", False)):
        settings = json.loads((folder / HEAD_FILE).read_text())
        is_same = settings["transparency_scale"] == trainer.head.settings()["scale"]
        weights, learnt = load(str(folder))[0].state_dict(), trainer.model.state_dict()
        assert is_same == here
        assert all(torch.equal(weights[name], learnt[name]) for name in learnt) == here
    assert trainer.model.config.soft_mask == trainer.head.settings()


def further(folder, task, learnt, **changes):
    """The head at the start of a training of a model that knows this one."""
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    model.config.soft_mask = learnt
    options = dict(output_dir=str(folder), softmasking_prob=0.5, report_to="none") | changes
    rows = task.train.select(range(2))
    args = DiffusionSFTConfig(**options)
    made = DiffusionSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    return made.head.settings()


NUMBERS = dict(scale=0.9, centre=-0.3, steepness=2.5)
LEARNT = {
    "top-k": NUMBERS | dict(k=2, algorithm="top-k", scheduling="none"),
    "temperature": NUMBERS | dict(temperature=0.7, algorithm="temperature"),
}


@pytest.mark.parametrize("algorithm", LEARNT)
def test_training_goes_on_with_the_head_that_the_model_has(tmp_path, task, algorithm):
    """Its numbers where no option says another; another algorithm begins anew, as a hard model does."""
    learnt = LEARNT[algorithm]
    known = {name: value for name, value in learnt.items() if name != "scheduling"}
    anew = pytest.approx(SoftMaskHead(algorithm=algorithm).settings())
    other = {"top-k": "temperature", "temperature": "top-k"}[algorithm]
    assert further(tmp_path, task, None, head_algorithm=algorithm) == anew
    assert further(tmp_path, task, LEARNT[other], head_algorithm=algorithm) == anew
    for changes in ({}, dict(head_scale=0.2), dict(head_algorithm=algorithm, head_centre=-2.0)):
        said = {name.removeprefix("head_"): value for name, value in changes.items()}
        head = further(tmp_path, task, learnt, **changes)
        assert {name: head[name] for name in known} == pytest.approx(known | said, abs=1e-5)
    with pytest.raises(ValueError, match=r"scale=1.0, .*trained with {'scale': 1.0.*head_scale="):
        further(tmp_path, task, learnt | dict(scale=1.0))
    assert further(tmp_path, task, learnt | dict(scale=1.0), head_scale=0.5)[
        "scale"
    ] == pytest.approx(0.5)


def test_a_trainer_that_has_not_trained_leaves_the_model_the_head_that_it_has(tmp_path, task):
    """One that fails, or another before the one that trains; a training that is not saved counts."""
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    model.config.soft_mask = learnt = dict(LEARNT["top-k"])
    quick = dict(softmasking_prob=0.9, max_steps=2, save_strategy="no", head_learning_rate=0.1)

    def make(**changes):
        options = quick | dict(report_to="none", eval_decode_rows=0) | changes
        args = DiffusionSFTConfig(str(tmp_path), **options)
        rows = task.train.select(range(8))
        return DiffusionSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    with pytest.raises(ValueError, match="head_temperature=2"):
        make(head_temperature=2.0)
    assert facts(model).soft_mask == learnt
    starts = [make().head.settings() for _ in range(2)]
    assert starts[0] == starts[1] and starts[0]["scale"] == pytest.approx(0.9)
    trained = make()
    trained.train()
    assert trained.head.settings() != pytest.approx(starts[0], abs=1e-3)
    assert make().head.settings() == pytest.approx(trained.head.settings(), abs=1e-5)


@pytest.mark.parametrize("stops", [False, True])
def test_a_head_is_of_its_training_alone(tmp_path, task, stops):
    """What is made of the model later has the model's weights: hard checkpoints, for one."""
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    names = {*model.state_dict()}

    def make(**changes):
        options = dict(max_steps=1, save_steps=1, report_to="none", eval_decode_rows=0) | changes
        args = DiffusionSFTConfig(str(tmp_path), **options)
        rows = task.train.select(range(2))
        return DiffusionSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    soft = make(**SOFT | dict(softmasking_prob=1.0, head_learning_rate=0.1))
    if stops:
        soft.log = None
        with pytest.raises(TypeError):
            soft.train()
        del soft.log
    else:
        soft.train()
    assert {*model.state_dict()} == names
    if not stops:
        make().train()
        saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
        assert not [name for name in saved if "mask" in name]
    head = soft.head.settings()
    soft.train()  # again
    assert soft.head.settings() != head and {*model.state_dict()} == names


def test_a_head_is_refused_where_weights_are_split(tmp_path, task, monkeypatch):
    monkeypatch.setattr("softar.split.is_split", lambda accelerator: True)
    with pytest.raises(ValueError, match=r"softmasking_prob=0\.5 under FSDP or ZeRO-3: the head's"):
        further(tmp_path, task, None)
    trainer_of(tmp_path, task)


def test_an_option_that_the_algorithm_of_the_model_leaves_idle_is_refused(tmp_path, task):
    with pytest.raises(ValueError, match=r"head_k=4 does nothing with .* 'temperature'"):
        further(tmp_path, task, LEARNT["temperature"], head_k=4)
    for learnt in (LEARNT["top-k"], None):
        with pytest.raises(ValueError, match=r"head_temperature=0.4 does nothing with .* 'top-k'"):
            further(tmp_path, task, learnt, head_temperature=0.4)
    head = further(tmp_path, task, LEARNT["temperature"], head_temperature=0.4)
    assert head == pytest.approx(LEARNT["temperature"] | dict(temperature=0.4, k=3), abs=1e-5)
    with pytest.raises(ValueError, match=r"head_temperature=0\.4 does nothing beside head_k"):
        DiffusionSFTConfig(softmasking_prob=0.5, head_k=2, head_temperature=0.4)
    with pytest.raises(ValueError, match=r"temperature=-1.*: start inside") as caught:
        DiffusionSFTConfig(softmasking_prob=0.5, head_temperature=-1.0)
    assert "trained with" not in str(caught.value)
    for named, algorithm in (("head_k", "temperature"), ("head_temperature", "top-k")):
        with pytest.raises(ValueError, match=rf"{named}=1 does nothing w.*{algorithm}.*None"):
            DiffusionSFTConfig(softmasking_prob=0.5, head_algorithm=algorithm, **{named: 1})


def test_a_saved_head_is_where_the_next_training_begins(tmp_path, task):
    first, _ = trainer_of(tmp_path / "first", task, **SOFT)
    first.train()
    first.save_model()
    model, tokenizer = load(tmp_path / "first")
    args = DiffusionSFTConfig(str(tmp_path / "next"), softmasking_prob=0.8, report_to="none")
    made = DiffusionSFTTrainer(model, args, train_dataset=task.train, processing_class=tokenizer)
    assert made.head.settings() == pytest.approx(first.head.settings(), abs=1e-5)


SAVING = dict(save_strategy="steps", save_steps=1, max_steps=4)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(SOFT, head_algorithm="temperature", normalise="masks"),
        dict(objective="uniform", normalise="tokens"),
        dict(packing=True, max_length=40, per_device_train_batch_size=4, antithetic=True),
        dict(complementary=True, on_policy_prob=0.5, normalise="masks"),
    ],
)
def test_training_stops_before_a_bad_loss_reaches_the_weights(tmp_path, task, options, factor):
    trainer, _ = trainer_of(tmp_path, task, gradient_accumulation_steps=2, **SAVING, **options)
    compute, calls = trainer.compute_loss, []

    def poisoned(*args, **kwargs):
        calls.append(None)
        return compute(*args, **kwargs) * (factor if len(calls) == 6 else 1.0)

    trainer.compute_loss = poisoned
    with pytest.raises(
        FloatingPointError, match=r"^step 3: the loss is .*checkpoint-2' is the las"
    ):
        trainer.train()
    stopped, (saved, _) = trainer.model.state_dict(), load(tmp_path / "checkpoint-2")
    assert all(torch.equal(stopped[name], value) for name, value in saved.state_dict().items())


def test_a_learning_rate_out_of_all_measure_ends_training(tmp_path, task):
    options = dict(learning_rate=1e30, max_grad_norm=0.0, optim="sgd")
    with pytest.raises(FloatingPointError, match=r"^step \d: .*there is no checkpoint yet"):
        trainer_of(tmp_path, task, **options)[0].train()


def test_a_checkpoint_is_a_plain_model_with_a_head_file(tmp_path, task):
    trainer, tokenizer = trainer_of(tmp_path, task, **SOFT)
    trainer.train()
    trainer.save_model(str(tmp_path))
    model, _ = load(tmp_path)
    assert load_head(tmp_path) == trainer.head.settings() | {"scheduling": "none"}
    rows = task.test.select(range(20))
    found = [
        evaluate(m, tokenizer, rows, task.score, trainer.decoding(steps=2), gen_length=4)
        for m in (model, trainer.model)
    ]
    assert (
        found[0]["accuracy"] == found[1]["accuracy"]
        and found[0]["nfe"] == 2
        and found[0]["n"] == 20
    )


def test_load_and_denoise_pick_the_head_up(tmp_path, task):
    trainer, tokenizer = trainer_of(tmp_path, task, max_steps=20, learning_rate=1e-2, **SOFT)
    trainer.train()
    trainer.save_model(str(tmp_path))
    model, _ = load(tmp_path)
    assert facts(model).soft_mask == load_head(tmp_path)
    ids = tokenizer(task.test["prompt"][:64], return_tensors="pt")["input_ids"]

    def decoded(**options):
        shown = []
        note = lambda seen: shown.append(seen["soft"])  # noqa: E731
        out = denoise(
            model, ids, config=DenoiseConfig(gen_length=4, steps=4, **options), callback=note
        )
        return out.completions, out.confidence[:, ids.shape[1] :], shown[0]

    told = decoded(soften="soft-mask", soften_args=load_head(tmp_path))
    for by_itself in (decoded(), decoded(soften="soft-mask")):
        assert torch.equal(by_itself[0], told[0]) and torch.equal(by_itself[1], told[1])
        assert torch.equal(by_itself[2].weights, told[2].weights)
    assert decoded(soften="hard")[2] is None
    assert not torch.equal(
        decoded(soften_args={"scale": 0.01}, soften="soft-mask")[2].weights, told[2].weights
    )
    # what a model learnt goes with it, file or no file, until it is trained hard
    model.save_pretrained(tmp_path / "copy")
    assert facts(load(tmp_path / "copy")[0]).soft_mask == load_head(tmp_path)
    quick = dict(max_steps=1, save_strategy="no", report_to="none", eval_decode_rows=0)
    args = DiffusionSFTConfig(output_dir=str(tmp_path / "hard"), **quick)
    hard = DiffusionSFTTrainer(model, args, train_dataset=task.train, processing_class=tokenizer)
    assert facts(model).soft_mask == load_head(tmp_path)
    hard.train()
    assert facts(model).soft_mask is None and decoded()[2] is None


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_brings_its_head(tmp_path, task, use_dora):
    base, tokenizer = load("mnns-diffusion-tiny", seed=5)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    options = dict(
        max_steps=8, learning_rate=1e-2, per_device_train_batch_size=32, save_strategy="no", **SOFT
    )
    args = DiffusionSFTConfig(
        output_dir=str(tmp_path / "adapter"), report_to="none", disable_tqdm=True, **options
    )
    lora = LoraConfig(
        r=4, use_dora=use_dora, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    trainer = DiffusionSFTTrainer(
        model, args, train_dataset=task.train, processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    trainer.save_model()
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", HEAD_FILE} <= names
    again, _ = load(tmp_path / "adapter")
    assert facts(again).soft_mask == trainer.head.settings() | {"scheduling": "none"}
    ids = tokenizer(task.test["prompt"][:32], return_tensors="pt")["input_ids"]
    config = DenoiseConfig(gen_length=4, steps=4)
    one, two = (denoise(m, ids, config=config) for m in (again, trainer.model.eval()))
    assert torch.equal(one.sequences, two.sequences) and torch.allclose(
        one.confidence, two.confidence, atol=1e-5, equal_nan=True
    )
    # and on another base, of more layers, it is refused
    other, _ = load("mnns-diffusion-tiny", n_layers=3)
    other.save_pretrained(tmp_path / "other")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(named | {"base_model_name_or_path": str(tmp_path / "other")})
    )
    with pytest.raises(ValueError, match="another base"):
        load(tmp_path / "adapter")


HARD = dict(softmasking_prob=0.0)
UNIFORM = dict(objective="uniform", normalise="tokens")


@pytest.mark.parametrize("adapted", [False, True])
def test_a_folder_is_decoded_as_it_was_trained_last(tmp_path, task, adapted):
    """Whatever the base was trained for, and an earlier training in the same folder."""
    folders = tmp_path / "out", tmp_path / "out" / "checkpoint-1"

    def check(options, base):
        model, tokenizer = load(base)
        wraps = adapted and not (base / "adapter_config.json").exists()
        peft = LoraConfig(r=2, target_modules=["q_proj"]) if wraps else None
        some = QUIET | dict(max_steps=1, save_strategy="steps", save_steps=1, eval_decode_rows=0)
        args = DiffusionSFTConfig(str(tmp_path / "out"), **some | options)
        rows = dict(train_dataset=task.train.select(range(8)), peft_config=peft)
        trainer = DiffusionSFTTrainer(model, args, **rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
        known = facts(trainer.model)
        assert (known.soft_mask is not None) == (options is SOFT)
        assert (known.uniform is not None) == (options is UNIFORM)
        for folder in folders:
            again, _ = load(folder)
            soft = known.soft_mask and known.soft_mask | {"scheduling": "none"}
            assert facts(again) == known._replace(soft_mask=soft)
            assert (folder / "soft_mask_head.safetensors").exists() == (options is SOFT)
            ids = tokenizer(task.test["prompt"][:1], return_tensors="pt")["input_ids"]
            denoise(again, ids, gen_length=3)

    for name, uniform in (("hard", False), ("soft", False), ("uniform", True)):
        model, tokenizer = load("mnns-diffusion-tiny", seed=5)
        model.config.soft_mask = SoftMaskHead(scale=0.4).settings() if name == "soft" else None
        if uniform:
            model.config.diffusion_process = noise_for(facts(model), tokenizer, 1e-3).settings()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        for options in (SOFT, HARD, UNIFORM, HARD):
            check(options, tmp_path / name)
        check(HARD, tmp_path / "out")  # a saved one, trained on


@pytest.mark.parametrize(("field", "value"), [("mixinputs_k", 5000), ("transparency_scale", 3.0)])
def test_a_head_file_that_does_not_fit_the_model(tmp_path, field, value):
    model, _ = load("mnns-diffusion-tiny", seed=0)
    model.save_pretrained(tmp_path)
    save_head(SoftMaskHead().settings(), tmp_path)
    named = json.loads((tmp_path / HEAD_FILE).read_text())
    (tmp_path / HEAD_FILE).write_text(json.dumps(named | {field: value}))
    with pytest.raises(ValueError, match=f"{field}=|{field.split('_')[1]}={value}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(noise="gaussian"), "noise='gaussian'"),
        (dict(time_low=0.5, time_high=0.2), "time_low=0.5, time_high=0.2"),
        (dict(softmasking_prob=1.5), "softmasking_prob=1.5"),
        (dict(softmasking_prob=0.5, head_scale=1.0), "scale=1.0"),
        (dict(normalise="rows"), "normalise='rows'"),
        (dict(softmasking_prob=0.5, head_k=0), "k=0"),
        (dict(noise="share"), "noise='share' does not go with normalise='answer'"),
        # what changes nothing
        (
            dict(SOFT, head_algorithm="top-k", head_temperature=2.0),
            "head_temperature=2.0 .* head_algorithm='top-k'",
        ),
        (dict(SOFT, head_algorithm="temperature", head_k=4), "head_k=4 .*'temperature'"),
        (dict(tau_start=0.1), "tau_start=0.1 does nothing without a curriculum"),
        (dict(gamma_max=0.0), "gamma_max=0.0 does nothing without a curriculum"),
        (
            dict(eval_decode_rows=0, eval_steps_decoded=4),
            "eval_steps_decoded=4 does nothing with eval_decode_rows=0",
        ),
        (dict(pad_token="<eos>"), "pad_token='<eos>' does nothing here"),
        (dict(average_tokens_across_devices=False), "average_tokens_across_devices=False does"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSFTConfig(output_dir=str(tmp_path), **options)


def test_options_of_a_head_that_is_not_there_are_told_of(tmp_path, task):
    with pytest.warns(UserWarning, match="^head_k, head_scale do nothing with softmasking_pr"):
        trainer_of(tmp_path, task, head_k=4, head_scale=0.1)


def test_batches_are_padded_to_a_multiple(tmp_path, task):
    trainer, _ = trainer_of(tmp_path, task, pad_to_multiple_of=16)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] == 16


def test_a_causal_model_is_refused(tmp_path, task):
    import softar

    model, tokenizer = softar.load("mnns-tiny")
    args = DiffusionSFTConfig(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="names no mask token"):
        DiffusionSFTTrainer(model, args, train_dataset=task.train, processing_class=tokenizer)


# -- the Latin squares


def test_latin_squares_and_their_score():
    task = load_task("latin", size=50)
    assert set(task.train.column_names) >= {"prompt", "completion"} and len(task.test) == 1000
    seen = set(task.train["completion"])
    for row in task.test.select(range(50)):
        assert task.score(row["completion"], row) == 1.0 and row["completion"] not in seen
        assert row["template"].split().count("<mask>") == 20
        cells = row["completion"].split()
        for i in (0, 7, 24):
            wrong = list(cells)
            wrong[i] = str(int(cells[i]) % 5 + 1)
            assert task.score(" ".join(wrong), row) == 0.0
        assert task.score(" ".join(cells[:-1]), row) == 0.0
        # a valid square that is not what the template shows
        swapped = [{"1": "2", "2": "1"}.get(c, c) for c in cells]
        shown = [t for t in row["template"].split() if t.isdigit()]
        assert task.score(" ".join(swapped), row) == float(not {"1", "2"} & set(shown))


def test_clues_as_a_prompt_are_those_of_the_template():
    task, filled = load_task("latin-prompt", size=50), load_task("latin", size=50)
    squares = task.train["completion"]
    assert squares == filled.train["completion"]
    assert [*task.test["completion"]] == [*filled.test["completion"]]
    for prompt, square in zip(task.train["prompt"], squares, strict=True):
        shown = [(clue, cell) for clue, cell in zip(prompt.split(), square.split(), strict=True)]
        assert sum(clue == cell for clue, cell in shown) == 5
        assert {clue for clue, cell in shown if clue != cell} == {"."}
    for row, other in zip(task.test, filled.test.select(range(50)), strict=False):
        cells = row["completion"].split()
        assert f"<bos> {row['prompt'].replace('.', '<mask>')} <eos>" == other["template"]
        for answer in (cells, cells[:-1], cells[::-1], ["1"] * 25):
            assert task.score(" ".join(answer), row) == task.score(" ".join(answer), other)
        assert task.score(" ".join(cells), row) == 1.0
    assert len({*task.train["prompt"]}) > 45


def test_rows_with_templates_are_filled():
    model, tokenizer = load("mnns-diffusion-tiny")
    rows = Dataset.from_list(
        [{"template": "<bos> D1 D2 D3 D4 -> S1 <mask> <mask> S2", "prompt": ""}] * 3
    )
    texts = []
    found = evaluate(
        model, tokenizer, rows, lambda text, row: texts.append(text) or 1.0, DenoiseConfig()
    )
    assert found["accuracy"] == 1.0 and found["nfe"] == 2
    assert all(
        t.startswith("D1 D2 D3 D4 -> S1") and t.endswith("S2") and "mask" not in t for t in texts
    )


@pytest.mark.parametrize("fills", [False, True])
def test_an_answer_is_scored_up_to_its_first_end_token(fills):
    """As the decoders and the rewards of RL read it; templates are whole."""
    model, tokenizer = load("mnns-diffusion-tiny")
    ends, texts = tuple(range(0, len(tokenizer), 2)), []  # half of all words: some stand anywhere
    rows = load_task("mnns", size=8).test.select(range(8))
    if fills:
        rows = rows.add_column("template", [f"{row['prompt']} <mask> <mask>" for row in rows])

    def score(text, row):
        texts[-1].append(text.split())
        return 1.0

    for end_ids in (None, ends):
        texts.append([])
        config, how = DenoiseConfig(end_ids=end_ids), dict(gen_length=6, batch_size=8)
        evaluate(model, tokenizer, rows, score, config, **how)
    at = {name: i for name, i in tokenizer.get_vocab().items()}
    cut = [[*itertools.takewhile(lambda w: at[w] not in ends, words)] for words in texts[0]]
    assert texts[1] == (texts[0] if fills else cut) and cut != texts[0]
