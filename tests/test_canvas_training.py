"""Training DiffusionGemma: the loss beside transformers' own forward on each row alone, and the
trainer's promises."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_denoise import denoiser
from test_renoised import CANVAS, VOCAB, gemma
from tiny import EOS, QUIET, tokenizer_of

import softar
from softar.diffusion import load
from softar.diffusion.convert import convert
from softar.diffusion.doubled import documents_of
from softar.diffusion.net import facts
from softar.diffusion.objectives import Canvases, Place, Rows, canvases_of
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer

PLACE = Place(step=0, rows=[0, 1, 2], of=3, training=True, progress=0.0)
LENGTHS, FIRST = (25, 6, 13), (4, 3, 0)  # tokens of a row, and the first that is trained


def rows_of(lengths=LENGTHS, first=FIRST):
    column = torch.arange(max(lengths))
    mask = (column < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, VOCAB, mask.shape, generator=torch.Generator().manual_seed(0))
    maskable = (column >= torch.tensor(first)[:, None]) & mask.bool()
    return Rows(ids * mask, maskable, mask, documents_of(mask))


@pytest.mark.parametrize("which", [0.0, 0.4, 0.999])
def test_a_canvas_of_each_answer_and_what_stands_before_it(which):
    rows = rows_of()
    prefix, real, clean = canvases_of(rows, CANVAS, torch.full((3,), which), EOS)
    for r, (length, first) in enumerate(zip(LENGTHS, FIRST, strict=True)):
        begins = max(first, 1)
        starts = [*range(begins, length, CANVAS)]
        start = starts[int(which * len(starts))]
        row = rows.ids[r, :length].tolist()
        assert prefix[r][real[r]].tolist() == row[:start]
        assert real[r].tolist() == sorted(real[r].tolist())  # padded on the left
        assert clean[r].tolist() == (row[start : start + CANVAS] + [EOS] * CANVAS)[:CANVAS]


def test_a_row_that_goes_on_behind_its_answer_is_named():
    rows = rows_of()
    rows.maskable[1, 5] = False
    with pytest.raises(ValueError, match="row 1 of the batch goes on behind its answer"):
        canvases_of(rows, CANVAS, torch.zeros(3), EOS)


def gradients(model):
    each = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return each


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_transformers_own_forward_of_each_row(prob):
    """In float64, gradients through encoder and decoder included, without padding; a sliding layer
    forgets what lies far behind."""
    model, rows = gemma(dtype=torch.float64), rows_of()
    model.train()
    args = DiffusionSFTConfig(
        output_dir="runs", objective="canvas", self_conditioning_prob=prob, report_to="none"
    )
    objective, seen = Canvases(args, facts(model)), []
    decoder = model.model.decoder
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    loss = objective.loss(model, model, rows, {}, PLACE)
    hook.remove()
    loss.total.backward()
    got, last = gradients(model), seen[-1]
    assert len(seen) == (2 if prob else 1)
    told = last["self_conditioning_mask"]
    assert {0.0: not told.any(), 0.5: 0 < told.sum() < 3, 1.0: told.all()}[prob]
    numbers = objective._numbers(PLACE, 2, rows, stream=5)
    prefix, real, clean = canvases_of(rows, CANVAS, numbers[:, 0], EOS)
    want = 0.0
    for r in range(3):
        noisy, ids = last["decoder_input_ids"][r : r + 1], prefix[r : r + 1, real[r]]
        belief = None
        if told[r]:
            with torch.no_grad():
                belief = model(input_ids=ids, decoder_input_ids=noisy).logits.double()
        out = model(input_ids=ids, decoder_input_ids=noisy, self_conditioning_logits=belief)
        want = want + torch.nn.functional.cross_entropy(out.logits[0], clean[r])
    want.backward()
    assert float(loss.total) == pytest.approx(float(want), rel=1e-5)
    torch.testing.assert_close(got, gradients(model), atol=1e-6, rtol=1e-5)
    assert int(objective.count(rows, {})) == 3


def test_noise_is_uniform_over_the_vocabulary_at_its_rate():
    model = gemma()
    args = DiffusionSFTConfig(
        output_dir="runs", objective="canvas", time_low=0.4, time_high=0.4, report_to="none"
    )
    seen, rows = [], rows_of((9,) * 600, (1,) * 600)
    hook = model.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["decoder_input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        Canvases(args, facts(model)).loss(
            model, model, rows, {}, PLACE._replace(rows=[*range(600)])
        )
    hook.remove()
    changed = seen[-1] != rows.ids[:, 1:]
    share, n = 0.4006 * (VOCAB - 1) / VOCAB, changed.numel()
    assert abs(float(changed.float().mean()) - share) < 5 * math.sqrt(share * (1 - share) / n)
    counts = torch.bincount(seen[-1][changed], minlength=VOCAB).float()
    assert counts.min() > 0 and counts.std() < 3 * counts.mean().sqrt()


# -- the trainer


def data(n=32):
    rows = [[5 + i % 7, 20 + i % 5, *range(30, 30 + 3 + i % 9)] for i in range(n)]
    return Dataset.from_list([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows])


def trainer_of(folder, peft_config=None, model=None, **changes):
    options = dict(
        output_dir=str(folder),
        objective="canvas",
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=3e-3,
        **QUIET,
        eval_decode_rows=0,
    )
    args = DiffusionSFTConfig(**(options | changes))
    return DiffusionSFTTrainer(
        copy.deepcopy(gemma()) if model is None else model,
        args,
        train_dataset=data(),
        processing_class=tokenizer_of(VOCAB),
        peft_config=peft_config,
    )


def losses_of(trainer):
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


@pytest.mark.parametrize("adapter", [False, True])
def test_it_learns_resumes_to_the_bit_and_opens_again(tmp_path, adapter):
    layers = r"model\.(encoder\.language_model|decoder)\.layers\.\d+\.self_attn\.[qo]_proj"
    lora = LoraConfig(r=4, target_modules=layers, task_type="CAUSAL_LM") if adapter else None
    saving = dict(save_strategy="steps", save_steps=4, max_steps=8)
    if adapter:
        gemma().save_pretrained(tmp_path / "base")
        tokenizer_of(VOCAB).save_pretrained(tmp_path / "base")
    opened = lambda: load(tmp_path / "base")[0] if adapter else None  # noqa: E731
    whole = trainer_of(tmp_path, lora, opened(), **saving)
    before = whole.evaluate(whole.train_dataset)["eval_loss"]
    whole.train()
    assert whole.evaluate(whole.train_dataset)["eval_loss"] < before
    again = trainer_of(tmp_path, lora, opened(), max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses_of(again) == losses_of(whole)
    model, _ = load(tmp_path / "checkpoint-8")
    saved, known = whole.model.state_dict(), model.state_dict()
    for name in saved:
        assert torch.equal(saved[name], known[name]), name
    assert facts(model).block_length == CANVAS


def test_accumulated_batches_are_one(tmp_path):
    sgd = dict(optim="sgd", max_grad_norm=0.0, max_steps=2, lr_scheduler_type="constant")
    one = trainer_of(tmp_path, per_device_train_batch_size=8, **sgd)
    four = trainer_of(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **sgd)
    for trainer in (one, four):
        trainer.train()
    assert losses_of(four) == pytest.approx(losses_of(one), rel=1e-4)
    torch.testing.assert_close(
        dict(four.model.named_parameters()),
        dict(one.model.named_parameters()),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(objective="masked"), "objective='masked' needs a mask token.*'canvas'"),
        (dict(objective="uniform", normalise="tokens"), "objective='uniform' needs a mask token"),
        (dict(model=denoiser), "objective='canvas' needs canvases.*set it to 'masked'"),
        (dict(normalise="tokens"), "normalise='tokens' does not go with objective='canvas'"),
        (dict(train_padding=True), "train_padding=True does not go with"),
        (dict(gradient_checkpointing=True), "gradient_checkpointing=True does not go with"),
        (dict(softmasking_prob=0.5), "softmasking_prob=0.5 does not go with"),
        (dict(packing=True), "packing=True does not go with"),
        (dict(self_conditioning_prob=2.0), r"self_conditioning_prob=2.0 must lie in \[0, 1\]"),
        (
            dict(objective="masked", self_conditioning_prob=0.5),
            "self_conditioning_prob=0.5 does nothing without a canvas",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_work(tmp_path, options, words):
    if "model" in options:
        options = options | {"model": options["model"]()}
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, **options)


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("kind", ["canvas", "blocks"])
def test_an_evaluation_has_steps_for_all_canvases_and_blocks(tmp_path, kind, steps):
    """Three canvases of 8, or up to 6 blocks of 4, whatever `eval_steps_decoded` is."""
    if kind == "canvas":
        model, tokenizer = copy.deepcopy(gemma()), tokenizer_of(VOCAB)
        objective, word = "canvas", " w20"
    else:
        model, tokenizer = convert(*softar.load("mnns-tiny", seed=0), block_length=4)
        objective, word = "masked", " S1"
    rows = Dataset.from_list([{"prompt": word, "completion": word * 20}] * 2)
    args = DiffusionSFTConfig(
        output_dir=str(tmp_path), objective=objective, eval_steps_decoded=steps, report_to="none"
    )
    trainer = DiffusionSFTTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        score=lambda answer, row: 1.0,
    )
    assert trainer.evaluate()["eval_accuracy"] == 1.0
