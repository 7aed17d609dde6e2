"""Evaluations of the SFT trainers: rows that are handed over are read and answered as the constructor's."""

import copy
import json
import pkgutil

import pytest
import test_diffusion_rows
import test_sft
import torch
from datasets import Dataset, DatasetDict
from test_renoised import VOCAB, gemma
from tiny import QUIET, tokenizer_of
from transformers import EarlyStoppingCallback

import softar
from softar.diffusion.config import DenoiseConfig
from softar.diffusion.convert import convert
from softar.diffusion.decoders import DiffusionDecoder
from softar.diffusion.evaluate import evaluate, most_blocks, slots_of_row, steps_for
from softar.diffusion.models import load
from softar.diffusion.net import facts
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.evaluate import encode
from softar.recipes.sft_soft import BaseConfig
from softar.sft.config import SoftSFTConfig
from softar.tasks import MODELS, TASKS, load_task

FIRST, SECOND = (
    [dict(row) for row in load_task("mnns", size=8).test.select(at)]
    for at in (range(3), range(3, 8))
)


def soft(folder, rows, score=None, **kw):
    if kw.get("targets") != "oracle":
        kw |= dict(alpha_schedule="constant", alpha_start=0.0)
    kw |= dict(think_steps=2, eval_new_tokens=3)
    train = test_sft.data(8, traces=(2,))
    return test_sft.trainer_of(folder, train, eval_dataset=rows, score=score, **kw)


def diffusion(folder, rows, score=None, **kw):
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    if kw.get("train_padding"):
        model, tokenizer = convert(*softar.load("mnns-tiny", seed=0), block_length=4)
    train = rows["a"] if isinstance(rows, dict) else rows
    return diffusion_trainer(folder, model, tokenizer, rows, score, train=train, **kw)


def closing(folder, rows, score=None, **kw):
    test_diffusion_rows.write(folder, "bert")
    return diffusion_trainer(folder, *load(folder), rows, score, train=rows, **kw)


def diffusion_trainer(folder, model, tokenizer, rows, score, train, **kw):
    args = DiffusionSFTConfig(output_dir=str(folder / "out"), **{**QUIET, "max_steps": 1} | kw)
    parts = dict(train_dataset=train, eval_dataset=rows, processing_class=tokenizer, score=score)
    return DiffusionSFTTrainer(model, args, **parts)


def mnns(rows):
    return Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in rows])


TEXTS = Dataset.from_list([{"prompt": f"why {i}?", "completion": f" so {i}"} for i in range(3)])
CASES = {
    "gold": (soft, test_sft.data(5), {}),
    "draws": (soft, test_sft.data(5), dict(soft_mixer="gumbel")),
    "think tokens": (soft, test_sft.data(5), dict(think_tokens=2)),
    "oracle": (soft, test_sft.data(5, traces=(2,)), dict(targets="oracle")),
    "masks": (diffusion, mnns(SECOND), {}),
    "filled blocks": (diffusion, mnns(SECOND), dict(train_padding=True)),
    "filled and packed": (
        diffusion,
        mnns(SECOND),
        dict(train_padding=True, packing=True, max_length=32),
    ),
    "a tokenizer that closes texts": (closing, TEXTS, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_handed_over_are_read_as_the_constructors(tmp_path, case):
    make, rows, kw = CASES[case]
    trainer = make(tmp_path, rows, **kw)
    own = trainer.evaluate()["eval_loss"]
    for given in (rows, trainer.eval_dataset):  # prepared before, too
        assert trainer.evaluate(given)["eval_loss"] == own
    for _ in range(2):
        assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == own
    found = trainer.evaluate({"a": rows, "b": rows.select([0])})
    assert found["eval_a_loss"] == own != found["eval_b_loss"]


@pytest.mark.parametrize(
    "kw",
    [
        {},
        dict(completion_logits=True),
        dict(targets="oracle"),
        dict(latent_stages=2, soft_top_k=10),
    ],
    ids=lambda kw: next(iter(kw), "gold"),
)
def test_what_is_predicted_has_the_loss_of_the_evaluation(tmp_path, kw):
    """Logits stand over the tokens that follow them, in batches of other widths, too."""
    rows, seen = test_sft.data(5, traces=(2,)), {}

    def loss_of(logits, labels):
        pairs = torch.tensor(logits)[:, :-1].flatten(0, 1), torch.tensor(labels)[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(*pairs).item()

    def metrics(found):
        seen["loss"] = loss_of(found.predictions, found.label_ids)
        return {}

    moves = {} if {"targets", "latent_stages"} & {*kw} else MOVING | dict(alpha_start=0.5)
    kw = moves | dict(think_steps=2, per_device_eval_batch_size=2) | kw
    trainer = test_sft.trainer_of(tmp_path, test_sft.data(8, traces=(2,)), eval_dataset=rows, **kw)
    found = trainer.predict(trainer.eval_dataset)
    trainer.compute_metrics = metrics
    own = trainer.evaluate()["eval_loss"]
    if "targets" not in kw:  # whose labels are distributions
        assert seen["loss"] == pytest.approx(own, rel=1e-5)
    assert loss_of(found.predictions, found.label_ids) == pytest.approx(seen["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "rows", "others", "names"),
    [
        (soft, test_sft.data(3), test_sft.data(4, seed=1), ["soft_accuracy", "discrete_accuracy"]),
        (diffusion, mnns(FIRST), mnns(SECOND), ["accuracy"]),
    ],
)
def test_accuracies_are_of_the_rows_that_are_evaluated(tmp_path, make, rows, others, names):
    asked = []

    def score(answer, row):
        asked.append(row["prompt"])
        return float(row["prompt"] in others["prompt"])

    def check(expected, given=None):
        asked.clear()
        found = trainer.evaluate(given)
        for prefix, (value, _) in expected.items():
            assert all(found[f"{prefix}_{name}"] == value for name in names)
        assert asked == [p for _, of in expected.values() for _ in names for p in of["prompt"]]

    trainer = make(tmp_path / "one", rows, score)
    check({"eval": (0.0, rows)})
    check({"eval": (1.0, others)}, others)
    check({"eval_x": (0.0, rows), "eval_y": (1.0, others)}, DatasetDict(x=rows, y=others))
    trainer = make(tmp_path / "two", {"a": rows, "b": others}, score)
    check({"eval_a": (0.0, rows), "eval_b": (1.0, others)})
    check({"eval": (1.0, others)}, others)


@pytest.mark.parametrize(
    ("make", "rows", "metric"),
    [(soft, test_sft.data(3), "soft_accuracy"), (diffusion, mnns(FIRST), "accuracy")],
)
def test_callbacks_see_accuracies(tmp_path, make, rows, metric):
    """The second evaluation is no better, and the first step's model is kept."""
    every = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    best = dict(metric_for_best_model=metric, greater_is_better=True, load_best_model_at_end=True)
    trainer = make(tmp_path, rows, lambda answer, row: 0.5, **every, **best, max_steps=4)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    state = trainer.state
    assert (state.global_step, state.best_metric, state.best_global_step) == (2, 0.5, 1)
    logged = [entry for entry in state.log_history if f"eval_{metric}" in entry]
    assert len(logged) == 2 and all("eval_loss" in entry for entry in logged)


@pytest.mark.parametrize(
    ("module", "make", "rows"),
    [
        ("softar.evaluate.generate", soft, test_sft.data(5)),
        ("softar.diffusion.evaluate.denoise", diffusion, mnns(SECOND)),
    ],
)
def test_as_many_rows_are_decoded_at_once_as_the_options_say(
    tmp_path, monkeypatch, module, make, rows
):
    decode, sizes = pkgutil.resolve_name(module.replace(".evaluate.", ".evaluate:")), []
    monkeypatch.setattr(
        module, lambda m, ids, *a, **k: sizes.append(len(ids)) or decode(m, ids, *a, **k)
    )
    found = {}
    for size in (2, 8):
        sizes.clear()
        trainer = make(
            tmp_path, rows, lambda text, row: len(text) / 100, per_device_eval_batch_size=size
        )
        found[size] = trainer.evaluate()
        assert set(sizes) == ({2, 1} if size == 2 else {5})
    same = {name: value for name, value in found[2].items() if name.endswith("accuracy")}
    assert same == {name: pytest.approx(found[8][name]) for name in same} != {}


MOVING = dict(alpha_schedule="linear", alpha_start=1.0)
STAGES = dict(latent_stages=2, think_steps=2)


@pytest.mark.parametrize(
    ("what", "settings"),
    [("alpha", MOVING), ("alpha", MOVING | dict(soft_mixer="hard")), ("the latent stage", STAGES)],
)
def test_the_best_model_is_not_chosen_by_how_it_is_trained(tmp_path, what, settings):
    every = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)

    def config(**options):
        return SoftSFTConfig(output_dir=str(tmp_path), **{**QUIET} | every | options)

    keep = dict(load_best_model_at_end=True)
    for options in (
        keep,
        keep | dict(metric_for_best_model="eval_loss"),
        keep | dict(metric_for_best_model="a_loss"),  # of a data set by name
        dict(save_strategy="best", metric_for_best_model="loss"),
        dict(lr_scheduler_type="reduce_lr_on_plateau"),
    ):
        with pytest.raises(ValueError, match=f"loss' changes with {what}.*eval_gold_loss.*eval_so"):
            config(**settings, **options)
    for metric in ("gold_loss", "eval_a_gold_loss", "eval_soft_accuracy"):
        config(**settings, **keep, metric_for_best_model=metric)
    config(**settings)
    config(**keep, alpha_schedule="constant", alpha_start=0.5)
    config(**keep, targets="oracle")
    BaseConfig(output_dir=str(tmp_path), **{**QUIET} | every | settings, **keep)  # of all rows


def as_chat(row):
    sides = (("prompt", "user"), ("completion", "assistant"))
    return {name: [{"role": role, "content": row[name].strip()}] for name, role in sides}


@pytest.mark.parametrize(
    "template", ["{{ m['content'] }} ", "{{ '<bos> ' + m['content'] + ' <eos>' }} "]
)
def test_chats_are_decoded_in_as_many_slots_as_they_are_learnt_in(tmp_path, template):
    rows = mnns(SECOND).map(as_chat)
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    trainer = diffusion_trainer(tmp_path, model, tokenizer, rows, lambda *_: 1.0, train=rows)
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    for row, read in zip(rows, trainer.train_dataset, strict=True):
        assert slots_of_row(row, tokenizer) == sum(label != -100 for label in read["labels"]) > 3


def test_every_row_gets_the_slots_of_the_longest(tmp_path):
    """A short first row would leave no room for the others' answers."""
    short, long = {"prompt": "<bos> D1", "completion": " S1"}, {"prompt": "<bos> D2"}
    rows = Dataset.from_list([short, long | {"completion": " S1 S2 S3 S4"}])
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    seen = []
    score = lambda answer, row, ids: float(seen.append(len(ids)) is None)  # noqa: E731
    config = DenoiseConfig(steps=2, end_ids=())
    evaluate(model, tokenizer, rows, score, config, with_ids=True)
    assert seen == [5, 5]
    rows = Dataset.from_list([short, long | {"completion": " S1" * 11}])
    blocks, _ = convert(*softar.load("mnns-tiny", seed=0), block_length=4)
    steps = steps_for(facts(blocks), rows, tokenizer, 1)
    evaluate(blocks, tokenizer, rows, lambda *_: 1.0, DenoiseConfig(steps=steps, end_ids=()))


def test_tokens_behind_the_end_are_none_of_an_answer():
    rows, (model, tokenizer) = mnns(SECOND), load("mnns-diffusion-tiny")
    made, score = [], lambda *_: 1.0
    for length in (5, 30):  # with 30 slots the model writes ends behind the end
        found = evaluate(model, tokenizer, rows, score, DenoiseConfig(), gen_length=length)
        made.append(round(found["tokens_per_s"] * found["seconds"]))
    decoder = DiffusionDecoder(model, tokenizer, DenoiseConfig(gen_length=30))
    assert made[1] == sum(len(answer.tokens) for answer in decoder.decode(rows["prompt"]))
    assert made[1] < 2 * made[0] and made[0] <= 5 * len(rows)


@pytest.mark.parametrize("column", ["template", "prompt"])
def test_a_template_is_answered_by_its_tokens_without_padding(column):
    """As a row alone; prompts that hold masks are templates where none follow them."""
    texts = ["<bos> D4 D8 D1 D3 -> <mask> <mask> <mask> S0 <eos>", "<bos> D4 D8 -> <mask> S4"]
    rows, (model, tokenizer) = (
        Dataset.from_list([{column: text} for text in texts]),
        load("mnns-diffusion-tiny"),
    )
    seen = {1: [], 2: []}
    for size, kept in seen.items():
        score = lambda text, row, ids: float(kept.append((text, ids)) is None)  # noqa: B023, E731
        how = dict(gen_length=0, batch_size=size, with_ids=True)
        evaluate(model, tokenizer, rows, score, DenoiseConfig(soften="hard"), **how)
    assert seen[1] == seen[2] and all(text for text, _ in seen[2])
    for (_, ids), text in zip(seen[2], texts, strict=True):
        given = tokenizer(text)["input_ids"]
        assert [a for a, b in zip(ids, given, strict=True) if b != tokenizer.mask_token_id] == [
            b for b in given if b != tokenizer.mask_token_id
        ]


def holed(mask):
    """Templates whose masks or words are no words between blanks."""
    return ["<bos> D1" + mask * 24, f"D1 {mask}. S1", f"S1{mask}S2 {mask}"]


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_masks_of_templates_are_counted_in_tokens(tmp_path, kind):
    """So that there is a step for each of their blocks, and no training ends at its evaluation."""
    if kind == "bytes":
        test_diffusion_rows.write(tmp_path, "bert")
    else:
        mnns_tiny = convert(*softar.load("mnns-tiny", seed=0), block_length=2)
    model, tokenizer = load(tmp_path) if kind == "bytes" else mnns_tiny
    for template in holed(tokenizer.mask_token)[: 1 if kind == "words" else 3]:
        row = {"template": template}
        ids = encode(tokenizer, [template])["input_ids"][0]
        places = (ids == tokenizer.mask_token_id).nonzero()[:, 0]
        assert slots_of_row(row, tokenizer) == len(places) == template.count(tokenizer.mask_token)
        for length in (1, 2, 3, 8, 30):
            blocks = [len({*((places + at) // length).tolist()}) for at in range(length)]
            assert max(blocks) <= most_blocks(row, tokenizer, length) <= len(places)
    if kind == "words":
        rows = Dataset.from_list([{"template": holed(tokenizer.mask_token)[0]}] * 2)
        config = DenoiseConfig(steps=steps_for(facts(model), rows, tokenizer, 8))
        assert config.steps > 8
        evaluate(model, tokenizer, rows, lambda *_: 1.0, config)


def test_templates_for_a_model_without_a_mask_are_named_before_the_training(tmp_path):
    rows = Dataset.from_list([row | {"template": row["prompt"]} for row in mnns(SECOND)])
    model, tokenizer = copy.deepcopy(gemma()), tokenizer_of(VOCAB)
    with pytest.raises(ValueError, match="a column template holds masks, and the tokenizer has no"):
        how = dict(train=mnns(SECOND), objective="canvas")
        diffusion_trainer(tmp_path, model, tokenizer, rows, lambda *_: 1.0, **how)


@pytest.mark.parametrize("name", [name for name in TASKS if "diffusion" in MODELS.get(name, {})])
def test_what_a_task_asks_is_what_training_reads(tmp_path, name):
    """Filled as they were written, templates are the rows that are trained on, their end token, too: a
    net that never saw a text without it completed .04 of the Latin squares, and .58 with it."""
    task, (model, tokenizer) = load_task(name, size=8), load(MODELS[name]["diffusion"])
    rows = task.test.select(range(4))
    texts = Dataset.from_list([{c: row[c] for c in ("prompt", "completion")} for row in rows])
    trainer = diffusion_trainer(tmp_path, model, tokenizer, None, None, train=texts)
    mask = tokenizer.mask_token_id
    for row, learnt in zip(rows, trainer.train_dataset["input_ids"], strict=True):
        column = "template" if "template" in row else "prompt"
        asked = encode(tokenizer, [row[column]])["input_ids"][0].tolist()
        if column == "prompt":
            asked += [mask] * slots_of_row(row, tokenizer)
        assert len(asked) == len(learnt) and mask in asked
        assert all(a in (b, mask) for a, b in zip(asked, learnt, strict=True))


def test_templates_that_end_otherwise_than_what_is_trained_on_are_named(tmp_path):
    text = "<bos> D1 D2 D3 D4 -> S1 <mask> <mask> S2"
    open_ones, closed = (
        Dataset.from_list([dict(prompt="", completion="S1", template=each)] * 2)
        for each in (text, f"{text} <eos>")
    )
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    said = "template 0 of the held-out rows ends in 'S2', and .* in '<eos>': write it behind"

    def make(rows, score=lambda *_: 1.0):
        return diffusion_trainer(tmp_path, model, tokenizer, rows, score, mnns(SECOND))

    for wrong in (open_ones, {"b": closed, "a": open_ones}):
        with pytest.raises(ValueError, match=said):
            make(wrong)
    trainer = make(closed)
    with pytest.raises(ValueError, match=said):
        trainer.evaluate(open_ones)
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    make(open_ones, score=None)  # nothing is decoded
    # block by block, what stands behind is not read, or masks that may become the end
    model, tokenizer = convert(
        *softar.load("mnns-tiny", seed=0), mask_token="<mask>", block_length=4
    )
    assert make(open_ones).evaluate()["eval_accuracy"] == 1.0


@pytest.mark.parametrize("arch", ["bert", "roberta"])
@pytest.mark.parametrize("kind", test_diffusion_rows.KINDS)
def test_slots_are_the_tokens_of_the_completion_and_its_end(tmp_path, arch, kind):
    _, last = test_diffusion_rows.write(tmp_path, arch)
    row = json.loads(json.dumps(test_diffusion_rows.KINDS[kind]).replace("<END>", last))
    trainer, tokenizer = test_diffusion_rows.trainer_of(tmp_path, row)
    for given in (row, trainer.train_dataset[0]):
        labels = trainer.train_dataset[0]["labels"]
        assert slots_of_row(given, tokenizer) == sum(label != -100 for label in labels)


@pytest.mark.parametrize("make", [soft, diffusion])
def test_rows_of_a_later_evaluation_are_looked_at_as_the_constructors(tmp_path, make):
    trainer = make(tmp_path, mnns(SECOND) if make is diffusion else test_sft.data(2))
    ids = {"input_ids": [1, 5, 999, 2], "labels": [-100, 5, 999, 2]}
    for given, says in (([ids], "eval_dataset is a list"), (Dataset.from_list([ids]), "id 999")):
        with pytest.raises(ValueError, match=says):
            trainer.evaluate(given)


def test_rows_that_cannot_be_decoded_are_named_before_the_training(tmp_path):
    rows, score = mnns(SECOND), lambda *_: 1.0
    texts = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows])
    stream = rows.to_iterable_dataset()
    no_columns = r"score= needs columns 'prompt' and 'completion'.*\['text'\].*eval_decode_rows=0"
    no_stream = r"score= needs a datasets.Dataset that is no stream"
    unread = r"eval_dataset.* has the columns \['prompt', 'answer'\]: name yours 'prompt' and 'co"
    asked = Dataset.from_list([{"prompt": row["prompt"], "answer": "S0"} for row in rows])
    for given, says in ((texts, no_columns), (stream, no_stream), (asked, unread)):
        for held_out in (given, {"a": rows, "b": given}):
            parts = dict(rows=held_out, train=rows)
            model, tokenizer = load("mnns-diffusion-tiny", seed=0)
            with pytest.raises(ValueError, match=says):
                diffusion_trainer(tmp_path, model, tokenizer, **parts, score=score)
            trainer = diffusion_trainer(tmp_path, model, tokenizer, rows, score, train=rows)
            with pytest.raises(ValueError, match=says):
                trainer.evaluate(held_out)
            if given is not asked:  # the loss alone
                diffusion_trainer(
                    tmp_path, model, tokenizer, **parts, score=score, eval_decode_rows=0
                )
    with pytest.raises(ValueError, match=r"eval_dataset has the columns \['prompt', 'answer'\]"):
        soft(tmp_path, asked)
