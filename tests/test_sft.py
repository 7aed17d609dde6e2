"""Guided soft SFT: its loss, its masks and draws, and training runs of a few steps on tiny
models."""

import copy
import json
import math
import random
import re
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file
from tiny import BOS, EOS, PAD, QUIET, model_of, tokenizer_of
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    HfArgumentParser,
    LlamaForCausalLM,
    LogitsProcessor,
    MixtralConfig,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

import softar
import softar.sft.trainer
from softar.config import SoftConfig
from softar.evaluate import evaluate
from softar.files import read_dataset
from softar.sft.config import SoftSFTConfig
from softar.sft.data import SoftCollator, spelled, thought_mask, thought_of
from softar.sft.forward import soft_forward
from softar.sft.guidance import mk_alpha
from softar.sft.preflight import check_tokens
from softar.sft.trainer import SoftSFTTrainer, soft_loss
from softar.soft import Soft, entropy, mk_proba_dist
from softar.tags import moves_of_ids
from softar.tasks import load_task
from softar.texts import check_data
from softar.thought import Kind
from softar.training import no_interrupt

OFF = -100
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<bos> {{ m['content'] }} {% else %}{{ m['content'] }} <eos>"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ADAM = dict(optim="adamw_torch", learning_rate=1e-2)


def calm():
    """The tiny model with narrower weights: a step of training leaves it where losses can be
    compared."""
    return model_of(initializer_range=0.1)


def words(rng, n):
    return "".join(f" w{rng.randrange(5, 64)}" for _ in range(n))


def data(n=8, seed=0, traces=(), tags=False):
    """Rows of unequal lengths. traces: numbers of traces, taken in turn; tags: the thought ends in
    </think>."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        completion = words(rng, 2 + i % 4) + " </think>" * tags + words(rng, 1)
        row = {
            "prompt": "<bos>" + words(rng, 1 + i % 3),
            "completion": completion,
            "answer": completion.split()[-1],
        }
        if traces:
            length = len(completion.split()) - 1
            row["traces"] = [
                words(rng, length) + " " + row["answer"] for _ in range(traces[i % len(traces)])
            ]
        rows.append(row)
    return Dataset.from_list(rows)


def config_of(folder, cls=SoftSFTConfig, **settings):
    exact = settings.get("soft_mode") != "sequential" and settings.get("targets") != "oracle"
    gold = settings.get("alpha_schedule") == "constant" and settings.get("alpha_start", 1.0) == 1
    whole = dict(soft_top_k=None) | (dict(soft_passes=99) if exact and not gold else {})
    common = dict(
        **whole if issubclass(cls, SoftSFTConfig) else {},
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        optim="sgd",  # Adam would turn rounding errors of vanishing gradients into whole steps
        lr_scheduler_type="constant",
        **QUIET,
    )
    return cls(**{**common, **settings})


def trainer_of(
    folder,
    train=None,
    *,
    model=None,
    tokenizer=None,
    eval_dataset=None,
    score=None,
    peft_config=None,
    **kw,
):
    return SoftSFTTrainer(
        calm() if model is None else model,
        config_of(folder, **kw),
        train_dataset=data() if train is None else train,
        eval_dataset=eval_dataset,
        processing_class=tokenizer or tokenizer_of(),
        score=score,
        peft_config=peft_config,
    )


def trained(folder, train=None, resume=None, **kw):
    trainer = trainer_of(folder, train, **kw)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def same(a, b, **kw):
    torch.testing.assert_close(weights(a), weights(b), **{"rtol": 1e-4, "atol": 1e-5, **kw})


@pytest.fixture
def spy(monkeypatch):
    """Collects what every forward of a trainer reads and what its loss is taken of."""
    seen, inputs, plain_forward, plain_loss = (
        [],
        {},
        softar.sft.trainer.soft_forward,
        softar.sft.trainer.soft_loss,
    )

    def forward(model, ids, mask, soft_mask, feed, **kw):
        inputs.update(ids=ids, attention=mask, soft=soft_mask)
        return plain_forward(model, ids, mask, soft_mask, feed, **kw)

    def loss(logits, labels, thought, **kw):
        seen.append(inputs | dict(labels=labels, thought=thought, **kw))
        inputs.clear()
        return plain_loss(logits, labels, thought, **kw)

    monkeypatch.setattr(softar.sft.trainer, "soft_forward", forward)
    monkeypatch.setattr(softar.sft.trainer, "soft_loss", loss)
    return seen


# -- the loss


@pytest.mark.parametrize("with_soft_labels", [False, True])
def test_loss_equals_a_loop_over_positions(with_soft_labels):
    torch.manual_seed(0)
    B, T, V, M = 3, 6, 11, 4
    logits = torch.randn(B, T, V)
    labels = torch.randint(V, (B, T))
    labels[torch.rand(B, T) < 0.4] = OFF
    labels[0, 0] = 3  # a text without a prompt: nothing predicts its first token
    thought = torch.rand(B, T) < 0.5
    soft = (
        Soft(torch.randint(V, (B, T, M)), torch.rand(B, T, M).softmax(-1))
        if with_soft_labels
        else None
    )
    loss, h = soft_loss(logits, labels, thought, thought_weight=0.3, soft_labels=soft)

    expected, entropies = 0.0, []
    for b in range(B):
        for t in range(1, T):
            if labels[b, t] == OFF:
                continue
            logp = logits[b, t - 1].double().log_softmax(-1)
            if soft is None:
                ce = -logp[labels[b, t]]
            else:
                ce = -sum(w * logp[i] for i, w in zip(soft.ids[b, t], soft.weights[b, t]))
            expected += ce * (0.3 if thought[b, t] else 1.0)
            if thought[b, t]:
                entropies.append(-(logp.exp() * logp).sum())
    assert len(entropies) > 2
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(h, torch.stack(entropies).float(), rtol=1e-5, atol=1e-6)


def test_loss_without_targets_is_a_clean_zero():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss, h = soft_loss(logits, torch.full((2, 3), OFF), torch.zeros(2, 3, dtype=torch.bool))
    (loss + h.sum()).backward()
    assert loss == 0 and len(h) == 0 and not logits.grad.any()


@pytest.mark.parametrize("with_soft_labels", [False, True])
def test_loss_in_pieces_is_the_loss(monkeypatch, with_soft_labels):
    """Its gradient too; and no float32 is kept for the way back that is as large as the logits."""
    torch.manual_seed(0)
    B, T, V, M = 3, 9, 50, 4
    logits = torch.randn(B, T, V, dtype=torch.bfloat16)
    labels = torch.randint(V, (B, T)).where(torch.rand(B, T) < 0.8, OFF)
    thought, soft = torch.rand(B, T) < 0.5, None
    if with_soft_labels:
        soft = Soft(torch.randint(V, (B, T, M)), torch.rand(B, T, M).softmax(-1))
    found, stored = {}, []

    def keep(x):
        stored.append(x.numel() if x.dtype == torch.float32 else 0)
        return x

    for piece in (2**25, 4 * V, 1):
        monkeypatch.setattr(softar.sft.loss, "PIECE", piece)
        x = logits.clone().requires_grad_()
        stored.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, h = soft_loss(x, labels, thought, thought_weight=0.3, soft_labels=soft)
        (loss + h.sum()).backward()
        found[piece] = loss.detach(), h.detach(), x.grad
        assert (max(stored) >= 10 * V) == (piece == 2**25)
    for piece in (4 * V, 1):
        torch.testing.assert_close(found[piece], found[2**25])


def test_loss_is_of_the_raw_logits_and_takes_low_precision():
    logits = torch.randn(1, 4, 7, dtype=torch.bfloat16)
    labels = torch.tensor([[OFF, 1, 2, 3]])
    loss, _ = soft_loss(logits, labels, labels > 0)
    expected = torch.nn.functional.cross_entropy(
        logits[0, :-1].float(), labels[0, 1:], reduction="sum"
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


# -- which positions are thought


def mask_of(rows, **span):
    """With tags as ids; each row a prompt and a completion."""
    span = {k: v if k in ("steps", "space") else moves_of_ids(tuple(v)) for k, v in span.items()}
    longest = max(len(prompt + new) for prompt, new in rows)
    rest = [longest - len(prompt + new) for prompt, new in rows]
    ids = [prompt + new + [PAD] * n for (prompt, new), n in zip(rows, rest, strict=True)]
    labels = [
        [OFF] * len(prompt) + new + [OFF] * n for (prompt, new), n in zip(rows, rest, strict=True)
    ]
    mask = thought_mask(torch.tensor(ids), torch.tensor(labels), **span)
    return [[t for t, on in enumerate(row) if on] for row in mask.tolist()]


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (dict(), [[2, 3, 4, 5, 6, 7], [1, 2, 3], [0, 1, 2, 3], [2, 3]]),
        (dict(steps=0), [[], [], [], []]),
        (dict(steps=3), [[2, 3, 4], [1, 2, 3], [0, 1, 2], [2, 3]]),
        (dict(steps=9), [[2, 3, 4, 5, 6, 7], [1, 2, 3], [0, 1, 2, 3], [2, 3]]),
        # row 1 has no end: thought throughout; the prompt of row 3 ends with it
        (dict(end=[9]), [[2, 3, 4], [1, 2, 3], [0], []]),
        (dict(end=[9, 6]), [[2, 3, 4, 5], [1, 2, 3], [0, 1, 2, 3], [2, 3]]),
        # row 1: the tag stands in the prompt; row 2: nowhere
        (dict(start=[8], end=[9]), [[3, 4], [1, 2, 3], [], []]),
        (dict(start=[8, 7], end=[9, 6]), [[4, 5], [], [], []]),
    ],
)
def test_thought_mask(span, expected):
    rows = [([5, 5], [8, 7, 5, 9, 6, 9]), ([8], [5, 5, 5]), ([], [5, 9, 5, 7]), ([8, 9], [5, 5])]
    assert mask_of(rows, **span) == expected


def test_thought_mask_at_the_edges():
    # A start tag in the middle: what stands before it is no thought. The last token, or half a tag,
    # opens nothing more.
    assert mask_of([([1], [5, 5, 8, 7, 5, 9, 5])], start=[8, 7], end=[9]) == [[5]]
    assert mask_of([([1], [5, 8])], start=[8], end=[9]) == [[]]
    assert mask_of([([1], [5, 8])], start=[8, 7], end=[9]) == [[]]
    # Only the first end of what is open counts.
    assert mask_of([([1], [9, 8, 5])], start=[8], end=[9]) == [[3]]
    assert mask_of([([1], [5, 9, 5, 9, 5])], end=[9]) == [[1]]
    assert mask_of([([], [9, 5])], end=[9]) == [[]]
    # A tag may begin in the prompt. Half a tag at the end of a row does not match across the padding.
    assert mask_of([([8], [7, 5])], start=[8, 7], end=[9]) == [[2]]
    assert mask_of([([1], [5, 9]), ([1], [5, 9, 6])], end=[9, 6]) == [[1, 2], [1, 2]]
    # What is not learnt in the middle of a row is nothing that the model has said.
    ids, labels = torch.tensor([[1, 5, 9, 8, 5]]), torch.tensor([[OFF, 5, OFF, OFF, 5]])
    ends = dict(end=moves_of_ids((9,)))
    assert thought_mask(ids, labels, **ends).tolist() == [[False, True, False, False, True]]


@pytest.mark.parametrize("tags", [dict(end=(4,)), dict(start=(3,), end=(4,)), dict(end=(4, 3)),
                                  dict(start=(3, 4), end=(4, 4))], ids=str)  # fmt: skip
def test_what_is_thought_is_what_decoding_reads_as_mixtures(tags):
    """Of rows in which tags, white space and words stand anywhere."""
    rng, space, n = random.Random(0), (6,), 6
    lengths = [rng.randrange(1, 6) for _ in range(400)]
    rows = [
        ([BOS, *rng.choices([3, 4, 6, 7], k=k)], rng.choices([3, 4, 6, 7], k=n)) for k in lengths
    ]
    ids, mask = tiny.left_padded([prompt for prompt, _ in rows])
    out = softar.generate(
        model_of(eos_token_id=None),
        ids,
        mask,
        config=SoftConfig(
            **{f"think_{name}": tag for name, tag in tags.items()},
            spelling=((), (), space),
            max_new_tokens=n,
        ),
        logits_processor=[tiny.Forced(ids.shape[1], [new for _, new in rows])],
    )
    assert out.completions.tolist() == [new for _, new in rows]
    read = (out.record.kind == Kind.SOFT).tolist()
    expected = [
        [len(prompt) + t for t, is_soft in enumerate(row) if is_soft]
        for (prompt, _), row in zip(rows, read, strict=True)
    ]
    assert mask_of(rows, space=space, **tags) == expected
    assert 40 < sum(map(bool, expected)) < 360


# -- batches


def test_collator_pads_on_the_right():
    batch = SoftCollator(PAD)(
        [{"input_ids": [1, 2, 3], "labels": [OFF, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, PAD, PAD]],
        "labels": [[OFF, 2, 3], [4, OFF, OFF]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert all(v.dtype == torch.int64 for v in batch.values())
    equal = SoftCollator(PAD)([{"input_ids": [1, 2], "labels": [1, 2]}] * 2)
    assert equal["attention_mask"].all() and equal["input_ids"].tolist() == [[1, 2]] * 2
    assert SoftCollator(PAD, pad_to_multiple_of=8)([{"input_ids": [1] * 9}])["labels"].shape == (
        1,
        16,
    )


def test_collator_with_traces_of_unequal_number_and_length():
    batch = SoftCollator(PAD)(
        [
            {"input_ids": [1, 2], "labels": [OFF, 2], "trace_ids": [[1, 5, 6, 7], [1, 8]]},
            {"input_ids": [3, 4, 5], "labels": [OFF, 4, 5], "trace_ids": [[3, 9, 9]]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, PAD, PAD], [3, 4, 5, PAD]]
    assert batch["labels"].tolist() == [[OFF, 2, OFF, OFF], [OFF, 4, 5, OFF]]
    assert batch["trace_ids"].tolist() == [
        [[1, 5, 6, 7], [1, 8, PAD, PAD]],
        [[3, 9, 9, PAD], [PAD] * 4],
    ]
    assert batch["trace_mask"].tolist() == [[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 1, 0], [0] * 4]]


# -- against TRL


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["prompt-completion", "text", "chat"])
def test_teacher_forcing_equals_trls_trainer_step_by_step(tmp_path, kind, accumulate):
    train, tokenizer = data(16), tokenizer_of()
    if kind == "text":
        train = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in train])
    if kind == "chat":
        train, tokenizer.chat_template = chat_data(16), CHAT
    kw = dict(gradient_accumulation_steps=accumulate, max_steps=5)
    ours = trained(
        tmp_path / "ours",
        train,
        tokenizer=tokenizer,
        alpha_schedule="constant",
        alpha_start=1.0,
        **kw,
    )
    plain = dict(use_cpu=True, bf16=False, gradient_checkpointing=False)
    args = config_of(tmp_path / "trl", SFTConfig, **plain, **kw)
    theirs = SFTTrainer(calm(), args, train_dataset=train, processing_class=tokenizer)
    theirs.train()
    assert logged(ours) == pytest.approx(logged(theirs), rel=1e-5)
    assert len(set(logged(ours))) == 5
    same(ours, theirs)


@pytest.mark.parametrize(
    "settings", [{}, {"targets": "traces"}, {"targets": "oracle"}], ids=["gold", "traces", "oracle"]
)
@pytest.mark.parametrize("takes_counts", [True, False])  # Gemma 4's with pictures does not
def test_the_loss_is_normalised_over_the_whole_accumulated_batch(
    tmp_path, monkeypatch, settings, takes_counts
):
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", takes_counts, raising=False)
    train = data(16, traces=(3, 1))
    fixed = dict(alpha_schedule="constant", alpha_start=0.3, thought_loss="alpha", **settings)
    one = trained(tmp_path / "1", train, per_device_train_batch_size=4, **fixed)
    two = trained(
        tmp_path / "2", train, per_device_train_batch_size=2, gradient_accumulation_steps=2, **fixed
    )
    four = trained(
        tmp_path / "4", train, per_device_train_batch_size=1, gradient_accumulation_steps=4, **fixed
    )
    assert logged(two) == pytest.approx(logged(one), rel=1e-4)
    assert logged(four) == pytest.approx(logged(one), rel=1e-4)
    same(one, two, atol=1e-4)


# -- what is fed back


def test_sequential_and_parallel_train_alike(tmp_path):
    kw = dict(alpha_schedule="linear", alpha_span=0.5, think_end="</think>")
    runs = [
        trained(tmp_path / m, data(tags=True), soft_mode=m, **kw)
        for m in ("parallel", "sequential")
    ]
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), rel=1e-4)
    assert logged(runs[0], "alpha") == [1.0, 0.5, 0.0, 0.0]
    same(*runs, atol=1e-3)
    # Fewer refreshes, or no guidance, are something else.
    for i, other in enumerate((dict(soft_passes=1), dict(alpha_span=0.0))):
        run = trained(tmp_path / str(i), data(tags=True), **{**kw, **other})
        assert logged(run) != pytest.approx(logged(runs[0]), rel=1e-3)


def test_noise_belongs_to_the_position_and_changes_with_the_step(tmp_path):
    kw = dict(
        alpha_schedule="constant",
        alpha_start=0.0,
        soft_mixer="gumbel",
        soft_mixer_args={"tau": 0.7},
    )
    kw |= dict(train=data(4), learning_rate=0.0, max_steps=3)
    exact = trained(tmp_path / "a", soft_passes=7, **kw)  # thoughts of 4..7 tokens
    longer = trained(tmp_path / "b", soft_passes=12, **kw)
    assert logged(exact) == pytest.approx(logged(longer), rel=1e-5)
    assert len({round(x, 4) for x in logged(exact)}) == 3
    assert logged(trained(tmp_path / "c", soft_passes=7, **kw)) == logged(exact)
    assert logged(trained(tmp_path / "d", soft_passes=7, seed=1, **kw)) != pytest.approx(
        logged(exact), rel=1e-3
    )


def test_thoughts_are_marked_where_the_tags_say(tmp_path, spy):
    train, tokenizer = chat_data(4), tokenizer_of()
    tokenizer.chat_template = CHAT
    kw = dict(
        alpha_schedule="constant",
        alpha_start=0.0,
        max_steps=1,
        think_start="<think>",
        think_end="</think>",
    )
    trained(tmp_path, train, tokenizer=tokenizer, **kw)
    texts = {tokenizer.decode(ids[soft]) for ids, soft in zip(spy[0]["ids"], spy[0]["soft"])}
    assert texts == {
        row["completion"][0]["content"].split(" </think>")[0].removeprefix("<think> ")
        for row in train
    }
    for ids, labels in zip(spy[0]["ids"], spy[0]["labels"]):
        target = tokenizer.decode(ids[labels != OFF])
        assert target.startswith("<think> w") and target.endswith("<eos>")


def test_text_without_a_prompt_is_thought_from_its_second_token_on(tmp_path, spy):
    train = Dataset.from_list([{"text": "w7 w8 w9"}, {"text": "w5 w6"}] * 2)
    trainer = trained(tmp_path, train, alpha_schedule="constant", alpha_start=0.0, max_steps=2)
    for seen in spy:
        assert torch.equal(
            seen["soft"], (seen["labels"] != OFF) & (torch.arange(seen["ids"].shape[1]) > 0)
        )
    assert all(map(math.isfinite, logged(trainer)))


TOOLS = '[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]'
ASKED = "{% for tool in tools or [] %}w60 {% endfor %}{{ more or '' }}" + CHAT


@pytest.mark.parametrize(
    "columns", [{}, dict(tools=TOOLS), dict(chat_template_kwargs={"more": "w61 "})]
)
def test_a_rows_columns_for_the_chat_template_are_heard_as_by_trl(tmp_path, monkeypatch, columns):
    """In traces, whose labels begin where the gold path's do, and in prompts that are decoded."""
    train, tokenizer = chat_data(4), tokenizer_of()
    tokenizer.chat_template = ASKED
    train = Dataset.from_list([row | {"traces": [row["completion"]]} | columns for row in train])
    kw = dict(tokenizer=tokenizer, eval_dataset=train, score=lambda text, row: 0.0)
    trainer = trainer_of(tmp_path, train, targets="traces", **kw)
    for row in trainer.train_dataset:
        assert row["trace_ids"] == [row["input_ids"]]
    asked, real = [], softar.evaluate.generate
    monkeypatch.setattr(
        softar.evaluate,
        "generate",
        lambda model, ids, mask, **kw: asked.extend(zip(ids, mask)) or real(model, ids, mask, **kw),
    )
    trainer.accuracy(train, "soft")
    trained_on = [
        [t for t, label in zip(row["input_ids"], row["labels"]) if label == OFF]
        for row in trainer.train_dataset
    ]
    assert [ids[mask.bool()].tolist() for ids, mask in asked] == trained_on


def test_what_a_row_tells_the_template_depends_on_no_other_row(tmp_path):
    """It read None where a row of a file does not say what another does."""
    told, tokenizer = [{"more": "w61 "}, {}, {"less": "w60 "}], tokenizer_of()
    tokenizer.chat_template = (
        "{% if more is defined %}{{ more }}{% endif %}{% if less is defined %}{{ less }}{% endif %}"
    )
    tokenizer.chat_template += CHAT
    rows = [
        row | {"traces": [row["completion"]], "chat_template_kwargs": more}
        for row, more in zip(chat_data(3), told, strict=True)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = trainer_of(tmp_path, read_dataset(file), tokenizer=tokenizer, targets="traces")
    for row, made in zip(rows, trainer.train_dataset, strict=True):
        ids = tokenizer.apply_chat_template(
            row["prompt"] + row["completion"], **row["chat_template_kwargs"]
        )["input_ids"]
        assert made["input_ids"] == ids and made["trace_ids"] == [ids]


@pytest.mark.parametrize("chats", [("prompt", "completion"), ("traces",)])
def test_traces_are_of_the_prompts_kind(tmp_path, chats):
    """Of chats with traces of text a row of numbers ended in a TypeError."""
    said = [{"role": "user", "content": "w5"}]
    row = dict(prompt="w5", completion=" w6", traces=[" w6"])
    row |= {name: [said] if name == "traces" else said for name in chats}
    tokenizer = tokenizer_of()
    tokenizer.chat_template = CHAT
    with pytest.raises(
        ValueError, match=r"the prompts are (chats|texts) and the traces (texts|chats): give"
    ):
        trainer_of(tmp_path, Dataset.from_list([row] * 4), tokenizer=tokenizer, targets="traces")


def chat_data(n):
    rng = random.Random(0)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": words(rng, 1 + i % 3).strip()}],
                "completion": [
                    {
                        "role": "assistant",
                        "content": f"<think>{words(rng, 2 + i % 2)} </think>{words(rng, 1)}",
                    }
                ],
            }
            for i in range(n)
        ]
    )


# -- traces and oracle


def test_traces_are_drawn_uniformly_from_each_rows_own(tmp_path, spy):
    train, tokenizer = data(6, traces=(1, 2, 3)), tokenizer_of()
    kw = dict(targets="traces", per_device_train_batch_size=6, learning_rate=0.0, max_steps=100)
    trained(tmp_path, train, alpha_schedule="constant", alpha_start=1.0, **kw)
    drawn = Counter()
    for seen in spy:
        for ids, labels, mask in zip(seen["ids"], seen["labels"], seen["attention"]):
            drawn[tokenizer.decode(ids[mask.bool()])] += 1
            target = labels != OFF
            assert torch.equal(labels[target], ids[target]) and ids[target][-1] == EOS
            assert tokenizer.decode(ids[mask.bool() & ~target]) in train["prompt"]
    by_row = [
        [drawn.pop(row["prompt"] + t + "<eos>".rjust(6), 0) for t in row["traces"]] for row in train
    ]
    assert not drawn  # nothing but the traces, the gold completions included
    for counts in by_row:
        assert sum(counts) == 100
        # Each count is binomial(100, 1/M): 4.5 standard deviations, odds of a false failure below
        # 1e-4.
        M = len(counts)
        assert all(abs(c - 100 / M) <= 4.5 * math.sqrt(100 / M * (1 - 1 / M)) for c in counts), (
            counts
        )


def test_the_draws_depend_on_the_seed_and_the_step_alone(tmp_path, spy):
    def draws(name, **kw):
        spy.clear()
        fixed = dict(
            targets="traces",
            alpha_schedule="constant",
            alpha_start=1.0,
            learning_rate=0.0,
            data_seed=3,
        )
        trained(tmp_path / name, data(16, traces=(6,)), **fixed, **kw)
        return [tuple(i for i in row.tolist() if i != PAD) for seen in spy for row in seen["ids"]]

    whole = draws("a")
    assert whole == draws("b") and len(whole) == 16
    assert whole == draws("c", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert whole != draws("d", seed=1)


def test_a_trace_of_another_length_keeps_its_own_labels(tmp_path, spy):
    row = {"prompt": "<bos> w5", "completion": " w6 w7 w8", "traces": [" w9 w9 w9 w9 w8"]}
    trained(tmp_path, Dataset.from_list([row] * 4), targets="traces", max_steps=1)
    assert spy[0]["labels"].tolist() == [[OFF, OFF, 9, 9, 9, 9, 8, EOS]] * 4
    spy.clear()
    row["traces"] = [" w9 w8"]
    trained(tmp_path, Dataset.from_list([row] * 4), targets="traces", max_steps=1)
    assert spy[0]["labels"].tolist() == [[OFF, OFF, 9, 8, EOS, OFF]] * 4
    assert spy[0]["attention"].tolist() == [[1, 1, 1, 1, 1, 0]] * 4
    spy.clear()
    trained(tmp_path, Dataset.from_list([row] * 4), targets="traces", max_steps=1, max_length=3)
    assert spy[0]["labels"].tolist() == [[OFF, OFF, 9]] * 4


def test_traces_of_mnns_keep_the_gold_answer(tmp_path, spy):
    task = load_task("mnns", size=8)
    model, tokenizer = softar.load("mnns-tiny")
    trained(
        tmp_path,
        task.train,
        model=model,
        tokenizer=tokenizer,
        targets="traces",
        think_steps=3,
        max_steps=3,
    )
    gold = {
        p.split()[1:5].__repr__(): a for p, a in zip(task.train["prompt"], task.train["answer"])
    }
    for ids, labels in ((i, x) for seen in spy for i, x in zip(seen["ids"], seen["labels"])):
        target = tokenizer.decode(ids[labels != OFF]).split()
        assert (
            target[-2:] == [gold[repr(tokenizer.decode(ids).split()[1:5])], "<eos>"]
            and len(target) == 5
        )


def test_oracle_equals_a_hand_computation(tmp_path):
    train, tokenizer, model = data(4, traces=(3, 1, 2)), tokenizer_of(), calm()
    total, count = 0.0, 0
    table = model.get_input_embeddings().weight
    for row in train:
        prompt = tokenizer(row["prompt"])["input_ids"]
        # [M, t]
        traces = torch.tensor(tokenizer([t + " <eos>" for t in row["traces"]])["input_ids"])
        n = traces.shape[1]
        p = torch.nn.functional.one_hot(traces, 64).float().mean(0)  # [t, V]
        # thought, answer, eos
        inputs = torch.cat([table[prompt], (p @ table)[: n - 2], table[traces[0, n - 2 :]]])
        logits = model(inputs_embeds=inputs[None]).logits[0]
        ce = -(p * logits[len(prompt) - 1 : -1].log_softmax(-1)).sum(-1)
        total, count = total + ce.sum().item(), count + n
    rows = [row | {"completion": row["traces"][0]} for row in train]
    for row in rows:
        row["steps"] = len(row["completion"].split()) - 1
    # Thoughts of 2..5 tokens: one run for each length, since think_steps is one number.
    loss = 0.0
    for i, row in enumerate(rows):
        kw = dict(
            targets="oracle", think_steps=row["steps"], max_steps=1, per_device_train_batch_size=1
        )
        trainer = trained(tmp_path / str(i), Dataset.from_list([row]), **kw)
        loss += logged(trainer)[0] * (row["steps"] + 2)
    assert loss / count == pytest.approx(total / count, rel=1e-4)


def test_oracle_weighs_unequal_rows_in_one_batch_as_alone(tmp_path, spy):
    train = Dataset.from_list(
        [
            {
                "prompt": "<bos> w5",
                "completion": " w6 w7",
                "traces": [" w6 w7", " w8 w7", " w6 w9 w7"],
            },
            {"prompt": "<bos> w5", "completion": " w6 w6 w7", "traces": [" w8"]},
        ]
    )
    trained(tmp_path, train, targets="oracle", max_steps=1, per_device_train_batch_size=2)
    labels, soft = spy[0]["labels"], spy[0]["soft_labels"]
    row, other = (0, 1) if labels[0, 3] == 7 else (1, 0)

    def shares(b, t):
        found = Counter()
        for i, w in zip(soft.ids[b, t].tolist(), soft.weights[b, t].tolist()):
            found[i] += w
        return {i: pytest.approx(w) for i, w in found.items() if w}

    assert shares(row, 2) == {6: 2 / 3, 8: 1 / 3}
    assert shares(row, 3) == {7: 2 / 3, 9: 1 / 3}
    assert shares(row, 4) == {EOS: 2 / 3, 7: 1 / 3}
    assert shares(other, 2) == {8: 1.0} and shares(other, 3) == {EOS: 1.0}
    assert shares(other, 4) == {7: 1.0}  # past every trace the gold completion is left


# -- options


def test_entropy_term_sharpens_for_positive_coefficients(tmp_path):
    kw = dict(
        alpha_schedule="constant",
        alpha_start=0.5,
        max_steps=12,
        train=data(4),
        **ADAM | {"learning_rate": 3e-3},
    )
    runs = {c: trained(tmp_path / str(c), entropy_coef=c, **kw) for c in (-1.0, 0.0, 1.0)}
    last = {c: logged(run, "thought_entropy")[-1] for c, run in runs.items()}
    assert last[1.0] < last[0.0] - 0.05 < last[-1.0] - 0.1
    # The first losses, of the same weights, differ by the coefficient times the mean entropy: all
    # targets are thought.
    first = {c: logged(run)[0] for c, run in runs.items()}
    mean = logged(runs[0.0], "thought_entropy")[0]
    assert first[1.0] - first[0.0] == pytest.approx(mean, rel=1e-4)
    assert first[-1.0] - first[0.0] == pytest.approx(-mean, rel=1e-4)


@pytest.mark.parametrize("peft", [False, True])
def test_temperature_is_learnt_logged_and_kept_out_of_the_model(tmp_path, peft):
    kw = dict(
        learn_temperature=True,
        soft_temperature=2.0,
        alpha_schedule="constant",
        alpha_start=0.2,
        max_steps=6,
        **ADAM,
    )
    kw |= dict(
        save_strategy="steps", save_steps=3, peft_config=lora() if peft else None, think_steps=2
    )
    trainer = trained(tmp_path, **kw)
    seen = logged(trainer, "soft_temperature")
    assert seen[0] == pytest.approx(2.0) and len(set(seen)) == 6
    temperature = trainer.decoding().temperature
    assert SoftConfig.load(tmp_path / "checkpoint-6").temperature == pytest.approx(
        temperature, rel=1e-6
    )
    assert SoftConfig.load(tmp_path / "checkpoint-3").temperature == pytest.approx(
        seen[3], rel=1e-6
    )
    file = (
        tmp_path / "checkpoint-6" / ("adapter_model.safetensors" if peft else "model.safetensors")
    )
    assert not [name for name in load_file(file) if "temperature" in name]
    loaded, _ = softar.load(str(tmp_path / "checkpoint-6")) if not peft else (None, None)
    assert loaded is None or set(loaded.state_dict()) == set(trainer.model.state_dict())

    resumed = trained(tmp_path / "again", resume=str(tmp_path / "checkpoint-3"), **kw)
    assert logged(resumed) == pytest.approx(logged(trainer), rel=1e-5)
    assert logged(resumed, "soft_temperature") == pytest.approx(seen, rel=1e-5)


@pytest.mark.parametrize("gradient", ["straight", "soft"])
def test_filters_are_learnt_logged_and_kept_as_plain_numbers(tmp_path, gradient):
    kw = dict(
        learn_min_p=True,
        soft_min_p=0.02,
        learn_top_k=True,
        soft_top_k=5,
        gate_gradient=gradient,
        filter_learning_rate=0.3,
        alpha_schedule="constant",
        alpha_start=0.2,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        think_steps=2,
        **ADAM,
    )
    trainer = trained(tmp_path, **kw)
    seen = {name: logged(trainer, f"soft_{name}") for name in ("min_p", "top_k")}
    assert seen["min_p"][0] == pytest.approx(0.02) and seen["top_k"][0] == pytest.approx(5)
    assert all(len(set(values)) == 4 for values in seen.values())
    found = SoftConfig.load(tmp_path / "checkpoint-2")
    assert found.min_p == pytest.approx(seen["min_p"][2], rel=1e-5)
    assert found.top_k == math.floor(seen["top_k"][2] + 0.5)
    last = trainer.decoding()
    assert type(last.top_k) is int and 1 <= last.top_k <= 10 and 0 < last.min_p < 1
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    assert not [name for name in load_file(file) if "soft_" in name]
    # the part of top-k that decoding rounds away is kept beside
    resumed = trained(tmp_path / "again", resume=str(tmp_path / "checkpoint-2"), **kw)
    assert logged(resumed) == pytest.approx(logged(trainer), rel=1e-5)
    for name, values in seen.items():
        assert logged(resumed, f"soft_{name}") == pytest.approx(values, rel=1e-4)


def test_the_best_weights_come_with_the_numbers_learnt_with_them(tmp_path):
    trainer = trainer_of(
        tmp_path,
        eval_dataset=data(4),
        learn_temperature=True,
        learn_min_p=True,
        soft_min_p=0.02,
        temperature_learning_rate=0.3,
        filter_learning_rate=0.3,
        alpha_schedule="constant",
        alpha_start=0.2,
        max_steps=4,
        think_steps=2,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_soft_min_p",  # which falls: the first is the best
        greater_is_better=True,
        **ADAM,
    )
    trainer.train()
    seen = {each: logged(trainer, f"eval_soft_{each}") for each in ("temperature", "min_p")}
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-1"
    found = trainer.decoding()
    for each, values in seen.items():
        assert len({*values}) == 4
        assert getattr(found, each) == pytest.approx(values[0], rel=1e-4)
    trainer.save_model(tmp_path / "best")
    assert SoftConfig.load(tmp_path / "best") == found


@pytest.mark.parametrize("peft", [False, True])
def test_weight_decay_leaves_the_temperature_alone(tmp_path, peft):
    kw = dict(
        learn_temperature=True,
        soft_temperature=2.0,
        weight_decay=0.5,
        peft_config=lora() if peft else None,
    )
    trainer = trained(tmp_path, **kw, temperature_learning_rate=0.0, **ADAM)
    assert logged(trainer, "soft_temperature") == [pytest.approx(2.0, abs=1e-6)] * 4
    (group,) = [
        group
        for group in trainer.optimizer.param_groups
        if any(p is trainer._learnt.parameter("temperature") for p in group["params"])
    ]
    assert len(group["params"]) == 1 and group["weight_decay"] == 0.0
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert any(
        name.endswith("lora_A.default.weight" if peft else "q_proj.weight") for name in decayed
    )


def test_freezing(tmp_path):
    before = calm().state_dict()
    trainer = trained(
        tmp_path,
        freeze_embeddings=True,
        freeze_layers=1,
        alpha_schedule="constant",
        alpha_start=0.3,
        **ADAM,
    )
    changed = {
        name for name, w in trainer.model.state_dict().items() if not torch.equal(w, before[name])
    }
    frozen = {name for name in before if "embed_tokens" in name or "layers.0." in name}
    assert len(frozen) > 5 and changed == set(before) - frozen
    every = trained(tmp_path, **ADAM)
    assert all(not torch.equal(w, before[name]) for name, w in every.model.state_dict().items())


def lora(**kw):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kw)


def test_adapters_on_weights_that_lie_nowhere_are_refused(tmp_path):
    """Those of a model that has been trained itself; it may be saved and opened, or named."""
    for part in (calm(), tokenizer_of()):
        part.save_pretrained(tmp_path / "base")
    model, _ = softar.load(tmp_path / "base")
    whole = trained(tmp_path / "whole", model=model, max_steps=1)
    with pytest.raises(ValueError, match=r"trained, merged.* lies nowhere: save model"):
        trainer_of(tmp_path / "run", model=whole.model, peft_config=lora())
    whole.save_model()
    base = str(tmp_path / "whole")
    opened = dict(model_init_kwargs={"revision": "v1"})  # which a folder takes no notice of
    trainer = trainer_of(tmp_path / "run", model=base, peft_config=lora(), **opened)
    trainer.save_model()
    config = PeftConfig.from_pretrained(tmp_path / "run")
    assert (config.base_model_name_or_path, config.revision) == (base, "v1")


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_train_and_carry_their_decoding(tmp_path, use_dora):
    kw = dict(
        peft_config=lora(use_dora=use_dora),
        save_strategy="steps",
        save_steps=4,
        max_steps=4,
        **ADAM,
    )
    calm().save_pretrained(tmp_path / "base")
    tokenizer_of().save_pretrained(tmp_path / "base")
    model, tokenizer = softar.load(str(tmp_path / "base"))
    trainer = trained(
        tmp_path / "run", model=model, tokenizer=tokenizer, soft_top_k=5, think_steps=2, **kw
    )
    base = calm().state_dict()
    found = {
        k.removeprefix("base_model.model.").replace(".base_layer", ""): v
        for k, v in weights(trainer).items()
    }
    for name, w in base.items():
        assert torch.equal(found[name], w), name
    adapters = {k: v for k, v in found.items() if "lora_" in k}
    assert any(v.any() for k, v in adapters.items() if "lora_B" in k)
    assert any("magnitude" in k for k in adapters) == use_dora
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert (checkpoint / "adapter_config.json").is_file() and not (
        checkpoint / "model.safetensors"
    ).exists()
    config = SoftConfig.load(checkpoint)
    assert (config.mixer, config.top_k, config.budget) == ("soft", 5, 2)
    loaded, tokenizer = softar.load(str(checkpoint))
    prompt = tokenizer(["<bos> w5 w6"], return_tensors="pt")
    outs = [
        softar.generate(m.eval(), **prompt, config=config).record for m in (loaded, trainer.model)
    ]
    torch.testing.assert_close(outs[0], outs[1], equal_nan=True)


def test_thought_weight_follows_alpha(tmp_path, spy):
    kw = dict(thought_loss="alpha", alpha_schedule="linear", alpha_span=1.0, think_steps=2)
    trainer = trained(
        tmp_path, data(), eval_dataset=data(4), eval_strategy="steps", eval_steps=2, **kw
    )
    # evaluations: 1, and once more on gold inputs
    weights = [seen.get("thought_weight") for seen in spy]
    assert weights == [1.0, 0.75, 1.0, None, 0.5, 0.25, 1.0, None]
    assert logged(trainer, "alpha") == [1.0, 0.75, 0.5, 0.25]
    assert logged(trainer, "eval_alpha") == [0.5, 0.0]  # on what it is trained to read by then


@pytest.mark.parametrize(
    "settings",
    [dict(alpha_schedule="constant", alpha_start=alpha) for alpha in (1.0, 0.4, 0.0)]
    + [dict(targets="oracle"), dict(soft_mode="sequential", alpha_span=1.0)],
)
def test_eval_loss_is_of_what_it_is_trained_to_read_and_gold_stands_beside_it(tmp_path, settings):
    rows = data(4, traces=(3,))
    trainer = trainer_of(
        tmp_path, rows, eval_dataset=rows, think_steps=2, per_device_eval_batch_size=4, **settings
    )
    trainer.state.global_step, trainer.state.max_steps = 1, 4  # a quarter of the training is done
    found = trainer.evaluate()
    gold = trainer_of(
        tmp_path,
        rows,
        eval_dataset=rows,
        per_device_eval_batch_size=4,
        alpha_schedule="constant",
        alpha_start=1.0,
    ).evaluate()
    assert gold["eval_loss"] == pytest.approx(gold["eval_gold_loss"], rel=1e-6)
    assert found["eval_gold_loss"] == pytest.approx(gold["eval_loss"], rel=1e-6)
    same_inputs = settings.get("alpha_start") == 1.0
    assert (found["eval_loss"] == pytest.approx(gold["eval_loss"], rel=1e-6)) == same_inputs
    trainer.model.train()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(4)])
    if "soft_mixer" not in settings and settings.get("targets") != "oracle":
        loss = trainer.compute_loss(trainer.model, batch).item()
        assert found["eval_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [dict(alpha_schedule="constant", alpha_start=0.4), dict(targets="oracle", entropy_coef=0.1)],
)
def test_losses_of_an_evaluation_do_not_depend_on_its_batches(tmp_path, settings):
    """The rows are of unequal lengths, and the last batch is smaller."""
    rows, found = data(5, traces=(2, 3)), []
    for size in (1, 2, 5):
        how = dict(eval_dataset=rows, think_steps=2, per_device_eval_batch_size=size)
        metrics = trainer_of(tmp_path, rows, **how, **settings).evaluate()
        found.append([metrics["eval_loss"], metrics["eval_gold_loss"]])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    assert found[0][0] != pytest.approx(found[0][1], rel=1e-3)


def test_gradients_reach_the_thought_through_the_answer_alone(tmp_path):
    """With weight 0 on the thought the answer's loss still moves the logits of the thought:
    gradient through inputs."""
    kw = dict(alpha_schedule="constant", alpha_start=0.0, think_steps=2, max_steps=1, train=data(4))
    full = trained(tmp_path / "a", **kw)
    cut = trained(tmp_path / "b", soft_grad_passes=1, **kw)
    assert logged(full) == pytest.approx(logged(cut), rel=1e-6)
    assert logged(full, "grad_norm") != pytest.approx(logged(cut, "grad_norm"), rel=1e-3)


# -- evaluation and checkpoints


def score(answer, row):
    return float(answer.split()[:1] == row["answer"].split())


def test_evaluation_logs_both_accuracies(tmp_path):
    kw = dict(eval_strategy="steps", eval_steps=30, max_steps=60, think_steps=2, eval_new_tokens=5)
    kw |= ADAM | dict(alpha_schedule="constant", alpha_start=0.0, eval_decode_rows=6)
    rows = Dataset.from_list([row | {"completion": " w9 w9 w7", "answer": "w7"} for row in data(8)])
    trainer = trained(tmp_path, rows, eval_dataset=rows, score=score, **kw)
    soft, discrete = (
        logged(trainer, "eval_soft_accuracy"),
        logged(trainer, "eval_discrete_accuracy"),
    )
    assert len(soft) == len(discrete) == 2 and soft[-1] == 1.0
    for readout, found in (("soft", soft), ("discrete", discrete)):
        config = trainer.decoding(readout)
        own = evaluate(
            trainer.model, trainer.processing_class, rows.select(range(6)), score, config
        )
        assert own["accuracy"] == found[-1] and own["n"] == 6
    assert trainer.decoding("soft").mixer == "soft" and trainer.decoding("discrete").mixer == "hard"
    metrics = trainer.evaluate(metric_key_prefix="test")
    assert metrics["test_soft_accuracy"] == 1.0 and "test_loss" in metrics
    # logits can be asked for
    assert trainer.predict(trainer.eval_dataset).predictions.shape[:1] == (8,)


def test_evaluating_twice_gives_the_same(tmp_path):
    kw = dict(
        soft_mixer="gumbel", eval_dataset=data(6), think_steps=2, max_steps=2, eval_decode_rows=0
    )
    trainer = trained(tmp_path, **kw)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_evaluation_leaves_the_training_as_it_is(tmp_path):
    kw = dict(
        targets="traces",
        alpha_schedule="constant",
        alpha_start=0.0,
        soft_mixer="gumbel",
        think_steps=2,
    )
    plain = trained(tmp_path / "a", data(traces=(4,)), **kw)
    watched = trained(
        tmp_path / "b",
        data(traces=(4,)),
        eval_dataset=data(4),
        score=score,
        eval_strategy="steps",
        eval_steps=1,
        **kw,
    )
    assert logged(plain) == logged(watched)
    same(plain, watched, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            dict(soft_top_k=7, soft_temperature=0.5),
            dict(mixer="soft", top_k=7, temperature=0.5, budget=2),
        ),
        (
            dict(soft_mixer="gumbel", soft_mixer_args={"tau": 0.3}),
            dict(mixer="gumbel", mixer_args={"tau": 0.3}),
        ),
        # teacher forcing: discrete
        (dict(alpha_schedule="constant"), dict(mixer="hard", budget=2)),
        # scheduled sampling: discrete
        (dict(soft_mixer="hard", guidance="coin"), dict(mixer="hard")),
        (dict(targets="oracle"), dict(mixer="soft")),
        (
            dict(think_steps=None, think_start="<bos>", think_end="</think>"),
            dict(think_start="<bos>", think_end="</think>", budget=None),
        ),
    ],
)
def test_every_checkpoint_says_how_it_is_decoded(tmp_path, settings, expected):
    kw = {"think_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, **settings}
    trainer = trained(tmp_path, data(traces=(2,), tags=True), **kw)
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-1", "checkpoint-2", "final"):
        config = SoftConfig.load(tmp_path / folder)
        assert {name: getattr(config, name) for name in expected} == expected
    tokenizer = tokenizer_of()
    model, _ = softar.load(str(tmp_path / "final"))
    out = softar.generate(model, torch.tensor([[BOS, 7]]), config=config, tokenizer=tokenizer)
    assert out.sequences.shape[1] > 2


RESUMED = {
    "trace-soft": dict(targets="traces", alpha_schedule="constant", alpha_start=0.0),
    "gumbel": dict(soft_mixer="gumbel", alpha_span=1.0),
    "coin": dict(soft_mixer="hard", guidance="coin", thought_loss="alpha", alpha_span=1.0),
    "packed rows": dict(packing=True, max_length=16, alpha_span=1.0),
    "lora with dropout": dict(peft_config=lora(lora_dropout=0.3), alpha_span=1.0),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_exactly(tmp_path, name):
    kw = RESUMED[name] | dict(
        save_strategy="steps", save_steps=3, max_steps=6, warmup_steps=2, think_steps=2
    )
    # 3 batches an epoch: into the next one
    kw |= ADAM | dict(lr_scheduler_type="cosine", train=data(10, traces=(4,)))
    unbroken = trained(tmp_path / "a", **kw)
    resumed = trained(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"), **kw)
    assert resumed.state.global_step == 6
    assert logged(resumed) == logged(unbroken) and len(set(logged(unbroken))) == 6
    assert logged(resumed, "grad_norm") == logged(unbroken, "grad_norm")
    same(resumed, unbroken, rtol=0, atol=0)


# -- bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(padding_free=True), "padding_free=True"),
        (dict(soft_mode="sequential", gradient_checkpointing=True), "gradient_checkpointing=True"),
        (dict(soft_mode="both"), "soft_mode='both'.*parallel"),
        (dict(soft_mixer="sofft"), "sofft.*mixture-of-inputs"),
        (dict(soft_mixer="gumbel", soft_mixer_args={"tua": 1}), "tua"),
        (dict(soft_mixer="gumbel", soft_mixer_args={"tau": 0}), "tau=0"),
        (dict(soft_mixer="gumbel", soft_mixer_args="tau=1"), "tau=1"),
        (dict(soft_mixer=softar.mixers.soft), "soft_mixer=<function"),
        (dict(guidance="blend"), "blend.*clamp"),
        (dict(targets="silver"), "silver.*oracle"),
        (dict(thought_loss="beta"), "beta.*alpha"),
        (dict(alpha_schedule="sine"), "sine.*cosine"),
        (dict(alpha_start=1.5), r"alpha_start=1\.5"),
        (dict(alpha_end=-0.1), r"alpha_end=-0\.1"),
        (dict(alpha_hold=0.6, alpha_span=0.6), r"alpha_hold=0\.6"),
        (dict(soft_top_k=-1), "soft_top_k=-1"),
        (dict(soft_top_p=1.1), r"top_p=1\.1"),
        (dict(soft_min_p=-0.1), r"min_p=-0\.1"),
        (dict(soft_min_p=2.0), r"min_p=2\.0"),
        (dict(soft_temperature=-1.0), r"temperature=-1\.0"),
        (dict(soft_passes=-1), "soft_passes=-1"),
        (dict(soft_grad_passes=0), "soft_grad_passes=0"),
        (dict(soft_window=0), "soft_window=0"),
        (dict(think_steps=-2), "think_steps=-2"),
        (dict(freeze_layers=-1), "freeze_layers=-1"),
        (dict(eval_new_tokens=0), "eval_new_tokens=0"),
        (dict(think_end="</think>", think_steps=3), "think_steps=3"),
        (dict(think_start="<think>"), "think_start='<think>'"),
        (dict(loss_type="dft"), "loss_type='dft'"),
        (dict(label_smoothing_factor=0.1), r"label_smoothing_factor=0\.1"),
        (dict(learn_temperature=True, soft_temperature=0.0), "soft_temperature=0"),
    ],
)
def test_bad_settings_are_named(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        config_of(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(soft_top_k=65), "top_k=65"),
        (dict(targets="traces"), "'traces'"),
        (dict(targets="oracle"), "'traces'"),
        (dict(think_end="</thnk>"), "</thnk>"),
        (dict(think_start="<thnk>", think_end="</think>"), "<thnk>"),
        (dict(freeze_layers=3), "freeze_layers=3.*2 layers"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_data(tmp_path, settings, says):
    tokenizer = tokenizer_of()
    tokenizer.unk_token = "<pad>"  # what its vocabulary takes an unknown word for
    with pytest.raises(ValueError, match=says):
        trainer_of(tmp_path, tokenizer=tokenizer, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(alpha_start=0.3, alpha_end=0.3),
        dict(alpha_start=0.0, alpha_schedule="constant", soft_mode="sequential", targets="traces"),
        dict(targets="oracle"),
    ],
)
def test_without_the_prompts_logits_training_is_the_same(tmp_path, settings):
    """Rows of unequal prompts, evaluation included; and the prompts' logits are not computed."""
    rows, runs = data(traces=(2, 3)), []
    for fewer in (False, True):
        how = dict(think_steps=2, completion_logits=fewer, max_steps=2, eval_dataset=rows)
        trainer, widths = trainer_of(tmp_path, rows, **how, **settings), []
        trainer.model.lm_head.register_forward_hook(
            lambda _, __, out, widths=widths: widths.append(out.shape[1])
        )
        trainer.train()
        losses = [*logged(trainer), trainer.evaluate()["eval_loss"]]
        runs.append((trainer, losses + logged(trainer, "eval_gold_loss"), sum(widths)))
    (whole, losses, width), (some, same_losses, less) = runs
    assert same_losses == pytest.approx(losses, rel=1e-4) and less < width
    same(whole, some)


class AllLogits(type(calm())):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask, labels=labels)


def test_logits_that_cannot_be_left_out_are_named(tmp_path):
    model = AllLogits(calm().config)
    with pytest.raises(ValueError, match="completion_logits=True: AllLogits takes no"):
        trainer_of(tmp_path, model=model, completion_logits=True)
    texts = Dataset.from_list([{"text": "<bos> w6 w7"}] * 4)
    with pytest.raises(ValueError, match=r"completion_logits=True.*\['text'\] and no prompts"):
        trainer_of(tmp_path, texts, completion_logits=True)


@pytest.mark.parametrize(
    ("row", "settings", "says"),
    [
        ((" w6", " w7 w8"), dict(), r"think_end='</think>', tokens \[4\], stands in no completion"),
        # a prompt's end tag closes nothing
        ((" </think>", " w7 w8"), dict(), "think_end='</think>'"),
        ((" w6", " w7 </think> w8"), dict(max_length=3), "think_end='</think>'.*max_length"),
        (
            (" w6", " w7 </think> w8"),
            dict(think_end="</think> w9"),
            r"think_end='</think> w9', tokens \[4, 9\]",
        ),
        (
            (" w6", " w7 </think> w8"),
            dict(think_start="<think>"),
            "think_start='<think>'.*no prompt or completion",
        ),
        # not in the traces
        ((" w6 </think>", " w7 </think> w8"), dict(targets="traces"), "think_end='</think>'"),
        ((" w6", " w7 </think> w8"), dict(), None),
        ((" w6 <think>", " w7 </think> w8"), dict(think_start="<think>"), None),
        ((" w6", " w9 <think> w7 </think> w8"), dict(think_start="<think>"), None),
        (
            (" w6 <think>", " w9", " w7 </think> w8"),
            dict(think_start="<think>", targets="traces"),
            None,
        ),
    ],
)
def test_tags_that_stand_nowhere_in_the_data_are_named(tmp_path, row, settings, says):
    prompt, completion, *traces = row
    one = {"prompt": f"<bos>{prompt}", "completion": completion, "traces": traces or [" w7 w8"]}
    plain = {"prompt": "<bos> w5", "completion": " w7 w8", "traces": [" w7 w8"]}
    train = Dataset.from_list([plain, plain, one])  # one row with the tag is enough
    settings = {"think_end": "</think>", **settings}
    if says is None:
        trainer_of(tmp_path, train, **settings)
    else:
        with pytest.raises(ValueError, match=says):
            trainer_of(tmp_path, train, **settings)


def test_a_stream_is_not_searched_for_tags(tmp_path):
    stream = data(8).to_iterable_dataset()
    trained(tmp_path, stream, think_end="</think>", max_steps=1)


def test_a_closed_vocabulary_without_unknown_token_names_the_tag(tmp_path):
    core = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "w": 2}))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    train = Dataset.from_list([{"prompt": "w", "completion": " w"}] * 2)
    with pytest.raises(ValueError, match="</think>"):
        trainer_of(tmp_path, train, tokenizer=tokenizer, think_end="</think>")


def test_data_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="row 1 has no traces"):
        rows = [{"prompt": "w5", "completion": " w6", "traces": t} for t in ([" w6"], [])]
        trainer_of(tmp_path, Dataset.from_list(rows), targets="traces")
    with pytest.raises(ValueError, match="'prompt'"):
        trainer_of(
            tmp_path, Dataset.from_list([{"text": "w5 w6", "traces": [" w6"]}]), targets="traces"
        )
    with pytest.raises(ValueError, match="'traces'"):
        trainer_of(tmp_path, data(traces=(2,)), targets="oracle", eval_dataset=data())
    with pytest.raises(ValueError, match="'prompt'"):
        trainer_of(tmp_path, eval_dataset=Dataset.from_list([{"text": "w5 w6"}]), score=score)
    with pytest.raises(ValueError, match="processing_class=None"):
        SoftSFTTrainer(model_of(), config_of(tmp_path), train_dataset=data())
    tokenizer = tokenizer_of()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad token"):
        trainer_of(tmp_path, tokenizer=tokenizer)


def test_streams_and_dicts_of_datasets_where_rows_are_picked(tmp_path):
    traces = data(traces=(2,))
    stream = data().to_iterable_dataset()
    for rows in (stream, {"a": data(), "b": stream}):
        with pytest.raises(ValueError, match=r"score= needs a datasets.Dataset.*IterableDataset"):
            trainer_of(tmp_path, eval_dataset=rows, score=score)
        trainer_of(tmp_path, eval_dataset=rows, score=score, eval_decode_rows=0)
        with pytest.raises(ValueError, match=r"targets='oracle' needs .*(IterableDataset|columns)"):
            trainer_of(tmp_path, traces, targets="oracle", eval_dataset=rows)
    with pytest.raises(ValueError, match=r"targets='traces' needs.*not IterableDataset"):
        trainer_of(tmp_path, traces.to_iterable_dataset(), targets="traces")
    # For the loss alone both do.
    assert (
        trainer_of(tmp_path, eval_dataset=data().to_iterable_dataset()).evaluate()["eval_loss"] > 0
    )
    metrics = trainer_of(tmp_path, eval_dataset={"a": data(), "b": data(seed=1)}).evaluate()
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"]


def test_a_mixture_of_experts_trains_without_its_auxiliary_loss_only_if_told_so(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = MixtralConfig(
        vocab_size=64,
        num_key_value_heads=1,
        num_local_experts=2,
        router_aux_loss_coef=0.02,
        **sizes,
    )
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.02"):
        trainer_of(tmp_path, model=AutoModelForCausalLM.from_config(config))
    trainer = trained(
        tmp_path,
        model=AutoModelForCausalLM.from_config(config),
        router_aux_loss_coef=0.0,
        max_steps=2,
    )
    assert not trainer.model.config.output_router_logits and all(
        map(math.isfinite, logged(trainer))
    )


def test_an_unwritable_folder_is_named_before_anything_else(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "runs"
    with pytest.raises(ValueError, match=f"output_dir='{folder}'"):
        trainer_of(folder)


def test_mixer_arguments_may_be_json_on_the_command_line(tmp_path):
    argv = [
        "--output_dir",
        str(tmp_path),
        "--soft_mixer",
        "gumbel",
        "--soft_mixer_args",
        '{"tau": 0.3}',
    ]
    (args,) = HfArgumentParser(SoftSFTConfig).parse_args_into_dataclasses(argv)
    assert args.soft_mixer_args == {"tau": 0.3}


# -- Ctrl-C
# -------------------------------------------------------------------------------------------------------


def test_interrupts_wait_for_the_end_of_the_block():
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        with no_interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append(True)
        done.append("never")
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is before
    with no_interrupt():
        pass
    with pytest.raises(OSError), no_interrupt():  # an error of the block itself goes through
        raise OSError
    assert signal.getsignal(signal.SIGINT) is before
    # signals are the main thread's
    thread = threading.Thread(target=lambda: done.append(no_interrupt().__enter__()))
    thread.start()
    thread.join()
    assert len(done) == 2


def test_ctrl_c_during_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    kw = dict(
        save_strategy="steps", save_steps=2, max_steps=4, targets="traces", train=data(traces=(3,))
    )
    unbroken = trained(tmp_path / "a", **kw)
    plain = SoftConfig.save

    def slow(self, folder):
        # in the middle: the optimizer and the state are still to come
        signal.raise_signal(signal.SIGINT)
        plain(self, folder)

    monkeypatch.setattr(SoftConfig, "save", slow)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", **kw)
    monkeypatch.setattr(SoftConfig, "save", plain)
    assert [p.name for p in Path(tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-2"]
    files = {p.name for p in (tmp_path / "a" / "checkpoint-2").iterdir()}
    assert {p.name for p in (tmp_path / "b" / "checkpoint-2").iterdir()} == files
    assert {"trainer_state.json", "optimizer.pt", "soft_config.json", "model.safetensors"} <= files
    resumed = trained(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-2"), **kw)
    assert logged(resumed) == logged(unbroken)


def test_entropy_of_the_log_is_that_of_the_thoughts_steps(tmp_path):
    """Of all steps, also where micro-batches have unlike numbers of them."""
    model, train = calm(), data(4)
    more = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer = trained(tmp_path, train, model=copy.deepcopy(model), max_steps=1, **more)
    tokenizer, found = tokenizer_of(), []
    for row in train:
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"]])
        begin = len(tokenizer(row["prompt"])["input_ids"])
        # alpha = 1 at step 0: gold inputs
        found += entropy(model(ids).logits[0, begin - 1 :]).tolist()
    assert logged(trainer, "thought_entropy")[0] == pytest.approx(sum(found) / len(found), rel=1e-5)


@pytest.mark.parametrize(
    ("how", "steps"),
    [
        (dict(logging_steps=3, logging_first_step=True), [1, 3]),
        (dict(logging_strategy="epoch", logging_steps=99), [2, 4]),  # of two steps each
    ],
    ids=["first", "epochs"],
)
def test_each_log_has_what_is_noted_of_its_steps(tmp_path, how, steps):
    log = trained(tmp_path, **how).state.log_history
    assert [entry["step"] for entry in log if "thought_entropy" in entry] == steps
    assert [entry["step"] for entry in log if "alpha" in entry] == steps


# -- options that do nothing, defaults, and what is said before the first step

SETTINGS = {
    "soft_passes": 3,
    "soft_grad_passes": 1,
    "soft_window": 4,
    "soft_mixer": "gumbel",
    "soft_temperature": 0.5,
    "guidance": "clamp",
    "alpha_start": 0.5,
    "alpha_end": 0.5,
    "alpha_hold": 0.1,
    "alpha_span": 0.2,
    "thought_loss": "alpha",
    "entropy_coef": 0.5,
    "temperature_learning_rate": 0.1,
}
CASES = [
    (dict(soft_mode="sequential"), "soft_passes soft_grad_passes temperature_learning_rate"),
    (dict(soft_mode="parallel"), "soft_window temperature_learning_rate"),
    (
        dict(alpha_schedule="constant", alpha_start=0.5),
        "alpha_end alpha_hold alpha_span soft_window temperature_learning_rate",
    ),
    (
        dict(alpha_schedule="constant", alpha_start=0.0),
        "alpha_end alpha_hold alpha_span guidance soft_window temperature_learning_rate",
    ),
    (
        dict(alpha_schedule="constant"),
        "alpha_end alpha_hold alpha_span guidance soft_passes soft_grad_passes soft_window thought_loss "
        "temperature_learning_rate",
    ),
    (
        dict(soft_passes=0),
        "soft_grad_passes guidance alpha_start alpha_end alpha_hold alpha_span soft_window "
        "temperature_learning_rate",
    ),
    (
        dict(soft_passes=0, thought_loss="alpha"),
        "soft_grad_passes guidance soft_window temperature_learning_rate",
    ),
    (dict(think_steps=0), " ".join(SETTINGS.keys() - {"soft_mixer", "soft_temperature"})),
    (dict(targets="oracle"), " ".join(SETTINGS.keys() - {"thought_loss", "entropy_coef"})),
]


@pytest.mark.parametrize(("settings", "idle"), CASES)
def test_an_option_that_does_nothing_is_refused_and_every_other_is_taken(tmp_path, settings, idle):
    for name, value in SETTINGS.items():
        if name in settings:
            continue
        make = lambda n=name, v=value: SoftSFTConfig(str(tmp_path), **settings | {n: v})  # noqa: E731
        if name in idle.split():
            with pytest.raises(ValueError, match=rf"{name}={value!r} does nothing w.*leave it at"):
                make()
        else:
            make()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (dict(soft_mixer="hard"), "no mixture is ever read"),
        (dict(soft_mixer="k-samples"), "mixtures of soft_mixer='k-samples'"),
        (dict(alpha_schedule="constant"), "alpha stays 1"),
        (dict(targets="oracle"), "targets='oracle'"),
        (dict(soft_grad_passes=1), "as constants"),
        (dict(soft_passes=0), "as constants"),
        (dict(think_steps=0), "nothing is thought"),
        (dict(soft_top_k=1), "with these filters"),
        (dict(soft_min_p=1.0), "with these filters"),
    ],
)
def test_a_temperature_without_gradient_is_refused(tmp_path, settings, why):
    with pytest.raises(ValueError, match=rf"learn_temperature=True gets no gradient: .*{why}"):
        SoftSFTConfig(str(tmp_path), learn_temperature=True, **settings)


@pytest.mark.parametrize("hold", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "step"])
def test_soft_is_what_some_step_reads(tmp_path, schedule, hold):
    """At every length of a training, and of one whose length its rows will say."""
    for n in (2, 3, 5, 10, 50, None):
        for span in (0.0, 0.2, 0.7, 1 - hold):
            if hold + span > 1:
                continue
            own = mk_alpha(schedule, hold=hold, span=span)
            steps = n or 200
            is_soft = any(own(step / steps) < 1 for step in range(steps))
            given = dict(alpha_schedule=schedule, alpha_hold=hold, alpha_span=span)
            given |= {} if n is None else dict(max_steps=n)
            if is_soft:
                args = SoftSFTConfig(str(tmp_path), **given)
                assert args.is_soft and args.decoding().mixer == "soft"
                continue
            with pytest.raises(ValueError, match="does nothing where alpha would move behind the"):
                SoftSFTConfig(str(tmp_path), **given)
    assert not SoftSFTConfig(str(tmp_path), think_steps=0).is_soft


@pytest.mark.parametrize("mixer", ["soft", "gumbel", "mixture-of-inputs"])
def test_the_temperature_moves_at_a_rate_of_its_own(tmp_path, mixer):
    options = dict(learn_temperature=True, soft_mixer=mixer, think_steps=2, alpha_start=0.0)
    options |= dict(ADAM, learning_rate=1e-7, alpha_schedule="constant")
    trainer = trained(tmp_path, **options)
    assert abs(math.log(trainer.decoding().temperature)) > 5e-3
    # log T moves by about the rate in each of Adam's steps
    slow = trained(tmp_path, **options, temperature_learning_rate=1e-5)
    assert 0 < abs(math.log(slow.decoding().temperature)) < 5e-5


def test_the_defaults_are_two_refreshes_of_narrow_mixtures(tmp_path):
    args = SoftSFTConfig(str(tmp_path))
    assert (args.soft_mode, args.soft_passes, args.filters["top_k"]) == ("parallel", 2, 10)
    assert SoftSFTConfig(str(tmp_path), soft_top_k=0).filters["top_k"] is None
    assert args.decoding().top_k == 10


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            dict(soft_mode="sequential"),
            "5 forwards or more, one for each column of thought, of about 4 x 10 tokens",
        ),
        (dict(soft_passes=2), "3 forwards of 4 x 10 tokens, or one more that reads the prompts"),
        (dict(soft_passes=99), "5 forwards of 4 x 10 tokens"),
        (dict(targets="oracle"), "1 forward of 4 x 10 tokens"),
        (dict(think_steps=None, soft_passes=1), r"whole completion is soft\).*2 forwards"),
        (dict(alpha_schedule="constant"), None),
    ],
)
def test_what_a_step_costs_is_said_before_the_first(tmp_path, capsys, settings, says):
    train = data(8, traces=(2,))
    with tiny.counted(model := calm()) as calls:
        trainer_of(
            tmp_path, train, model=model, **dict(think_steps=4, max_steps=1) | settings
        ).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("soft SFT")]
    assert len(lines) == (says is not None)
    if says is not None:
        assert re.search(says, lines[0]), lines[0]
        most = int(re.search(r"(\d+) forward", lines[0])[1])
        assert 1 <= len(calls) - 1 <= most  # the trainer's call is a forward around them


def test_a_compiled_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model is compiled, and SoftSFTTrainer .* model itself"):
        trainer_of(tmp_path, data(4), model=torch.compile(model_of()))


def test_rows_that_cannot_be_trained_on_are_named_before_the_first_step(tmp_path):
    for columns, says in (
        ({"question": ["a"], "answer": ["b"]}, r"columns \['question', 'answer'\]: name yours"),
        ({"prompt": [], "completion": []}, "train_dataset is empty"),
        (
            {"prompt": ["a"] * 1200, "completion": ["b"] * 1100 + [None] * 100},
            "row 1100 of train_dataset holds None in column 'completion'",
        ),
        ({"prompt": [None], "completion": ["b"]}, "row 0 of train_dataset holds None .* 'prompt'"),
        ({"text": ["b", None]}, "row 1 of train_dataset holds None in column 'text'"),
        ({"prompt": ["a"], "completion": [5]}, "train_dataset holds int64 in column 'completion'"),
        ({"prompt": [["a"]], "completion": [["b"]]}, "holds lists of string in column 'prompt'"),
        ({"messages": [[]]}, "holds lists of null in column 'messages'"),
        (
            {"prompt": ["a"], "completion": [[{"role": "assistant", "content": "b"}]]},
            "train_dataset has text as prompt and a chat as completion: give both",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            trainer_of(tmp_path, Dataset.from_dict(columns))
    with pytest.raises(ValueError, match="max_length=3 leaves no row"):
        trainer_of(
            tmp_path,
            Dataset.from_list([{"prompt": "<bos> w5 w6 w7", "completion": " w8"}]),
            max_length=3,
        )


def test_rows_that_teach_no_more_than_an_end_are_counted(tmp_path, capsys):
    rows = data(8).to_list()
    rows[1]["completion"], rows[3]["completion"] = "", " \n"
    trainer_of(tmp_path, Dataset.from_list(rows))
    said = "train_dataset holds nothing but white space in column 'completion'"
    assert f"{said} in 2 of 8 rows" in capsys.readouterr().out
    nothing = [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": " "}]]
    called = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]
    args = config_of(tmp_path)
    for row in (
        {"prompt": "a", "completion": ""},
        {"text": " "},
        {"messages": [{"role": "user", "content": ""}]},
        dict(zip(("prompt", "completion"), nothing, strict=True)),
    ):
        with pytest.raises(
            ValueError, match=f"nothing but white space in column '{[*row][-1]}': give"
        ):
            check_data(args, tokenizer_of(), Dataset.from_list([row] * 3), None)
        with pytest.raises(ValueError, match="eval_dataset holds nothing"):
            check_data(args, tokenizer_of(), data(2), Dataset.from_list([row]))
    (tokenizer := tokenizer_of()).chat_template = CHAT
    check_data(
        args, tokenizer, Dataset.from_list([{"prompt": nothing[0], "completion": called}]), None
    )


@pytest.mark.parametrize("kind", ["texts", "traces", "a stream", "tokens", "chats"])
def test_texts_need_an_end_token_and_other_rows_do_not(tmp_path, kind):
    train, tokenizer = data(4, traces=(2,)), tokenizer_of()
    kw = dict(targets="traces") if kind == "traces" else {}
    if kind == "a stream":
        train = train.to_iterable_dataset()
    if kind == "tokens":
        train = Dataset.from_list([{"input_ids": [BOS, 5, 6], "labels": [OFF, 5, 6]}] * 4)
    if kind == "chats":
        train, tokenizer.chat_template = chat_data(4), CHAT
    trainer_of(tmp_path, train, tokenizer=copy.deepcopy(tokenizer), **kw)
    tokenizer.eos_token = None
    if kind in ("tokens", "chats"):
        made = trainer_of(tmp_path, train, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="eval_dataset holds texts, and the tokenizer has no"):
            made.evaluate(data(2))
        return
    with pytest.raises(ValueError, match=r"train_dataset holds .*set tokenizer\.eos_token"):
        trainer_of(tmp_path, train, tokenizer=tokenizer, **kw)


def test_chats_need_a_template(tmp_path):
    """Refused before anything is made; a template may come by a path."""
    says = r"train_dataset holds chats, .* no chat template: give chat_template_path, or texts"
    with pytest.raises(ValueError, match=says):
        trainer_of(tmp_path, chat_data(4))
    (tmp_path / "own.jinja").write_text(CHAT)
    trainer_of(tmp_path, chat_data(4), chat_template_path=str(tmp_path / "own.jinja"))


def test_a_column_of_conversations_is_learnt(tmp_path):
    chat = [{"from": "user", "value": "w5 w6"}, {"from": "assistant", "value": "w7"}]
    tokenizer = tokenizer_of()
    tokenizer.chat_template = CHAT
    rows, how = Dataset.from_list([{"conversations": chat}] * 4), dict(tokenizer=tokenizer)
    made = trainer_of(tmp_path, rows, alpha_schedule="constant", alpha_start=1.0, **how)
    assert made.train_dataset[0]["labels"] == [1, 5, 6, 7, 2]
    made = trainer_of(tmp_path, rows, alpha_schedule="constant", think_tokens=2, **how)
    assert made.train_dataset[0]["labels"] == [1, 64, 65, 5, 6, 7, 2]
    named = [{"role": m["from"], "content": m["value"]} for m in chat]
    for given in (
        rows := Dataset.from_list([{"conversations": named}]),
        rows.to_iterable_dataset(),
    ):
        with pytest.raises(ValueError, match=r"\['role', 'content'\] .*name it 'messages'"):
            trainer_of(tmp_path, given, tokenizer=tokenizer)
    said = [{"from": "user", "value": " "}, {"from": "assistant", "value": ""}]
    with pytest.raises(ValueError, match="nothing but white space in column 'conversations'"):
        trainer_of(tmp_path, Dataset.from_list([{"conversations": said}]), tokenizer=tokenizer)


TURNS = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}<bos> {{ m['content'] }} {% else %}"
    "{% generation %}{{ m['content'] }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
)
BOTH = dict(think_start="<think>", think_end="</think>")


@pytest.mark.parametrize(
    ("answers", "options", "thought"),
    [
        (["<think> w7 </think> w8"], {}, "what users say would be thought"),
        (["<think> w7 </think> w8"], dict(think_end="</think>"), "what users say would be thought"),
        (["<think> w7 </think> w8"], dict(think_steps=2), "what users say would be thought"),
        (["<think> w7 </think> w8"], BOTH, "w7"),
        (["w7 </think> w8"], dict(think_end="</think>", assistant_only_loss=True), "w7"),
        (["w7 </think> w8"], BOTH | dict(assistant_only_loss=True), "row 3.* no think_start='<think>'"),
        (["<think> w7 </think> w8 </think>"], BOTH | dict(assistant_only_loss=True), "w7"),
        (["w7", "<think> w8 </think> w9"], BOTH | dict(assistant_only_loss=True), "w8"),
        (["w7 w8"], dict(think_steps=1, assistant_only_loss=True), "w7"),
        (["w7", "<think> w8 </think> w9"], BOTH, "w8"),
        (["w7", "w8"], dict(assistant_only_loss=True), "w7 <eos> w8 <eos>"),
        (["<think> w7 </think>", "<think> w8 </think>"], BOTH, "row 3.* think_end='</think>' 2 times"),
        (["w7", "w8 </think> w9"], dict(think_end="</think>", assistant_only_loss=True), "of 2 answers"),
        (["w7", "w8"], dict(think_steps=1, assistant_only_loss=True), "of 2 answers"),
        (["w7", "w8"], BOTH, ""),
        (["w7", "w8 </think> w9"], BOTH, "row 3.* and no think_start='<think>' before it"),
    ],
)  # fmt: skip
def test_thoughts_of_whole_chats_are_found_or_refused(tmp_path, answers, options, thought):
    """What systems and users say was read as mixtures, and of several thoughts the first alone was one."""
    said = [{"role": "system", "content": "w40"}]
    for number, answer in enumerate(answers):
        said += [
            {"role": "user", "content": f"w5{number}"},
            {"role": "assistant", "content": answer},
        ]
    easy = [said[1], {"role": "assistant", "content": "<think> w30 </think> w31"}]
    rows = Dataset.from_list([{"messages": easy}] * 3 + [{"messages": said}])
    tokenizer = tokenizer_of()
    tokenizer.chat_template = TURNS
    if not re.fullmatch(r"(w7|w8|<eos>| )*", thought):
        with pytest.raises(ValueError, match=thought):
            trainer_of(tmp_path, rows, tokenizer=tokenizer, **options)
        # held-out rows as well, before the training that they are of
        pair = {"prompt": [said[0]], "completion": [easy[1]]}
        held = dict(eval_dataset={"a": rows.select(range(3)), "b": rows})
        held |= {} if "think_start" in options else dict(train=Dataset.from_list([pair] * 3))
        held.setdefault("train", rows.select(range(3)))
        for given in (held, held | dict(eval_dataset=rows)):
            key = "" if given["eval_dataset"] is rows else r"\['[ab]'\]"
            why = thought.removeprefix("row 3.*")
            with pytest.raises(ValueError, match=rf"eval_dataset{key} .*{why}"):
                trainer_of(tmp_path, tokenizer=tokenizer, **options, **given)
        return
    made = trainer_of(tmp_path, rows, tokenizer=tokenizer, **options, eval_dataset=rows)
    row = made.train_dataset[3]
    inside = thought_of(row["input_ids"], row["labels"], made._span)
    soft = [token for token, is_soft in zip(row["input_ids"], inside) if is_soft]
    assert tokenizer.decode(soft) == thought


def test_a_tag_that_the_tokenizer_merges_is_refused_by_row(tmp_path):
    core = Tokenizer(
        WordLevel(
            {w: i for i, w in enumerate(["<pad>", "<eos>", "a", "b", "</t>", "b</t>"])},
            unk_token="<pad>",
        )
    )
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    rows = [{"prompt": "a", "completion": text} for text in (" b </t> a", " b</t> a")]
    good, bad, how = (
        Dataset.from_list(rows[:1] * 2),
        Dataset.from_list(rows),
        dict(think_end="</t>"),
    )
    for data, train, held_out in (
        ("train_dataset", bad, None),
        ("eval_dataset", good, bad),
        (r"eval_dataset\['b'\]", good, {"a": good, "b": bad}),
    ):
        with pytest.raises(ValueError, match=f"row 1 of {data} holds think_end='</t>', but the to"):
            trainer_of(tmp_path, train, tokenizer=tokenizer, eval_dataset=held_out, **how)
    answers = Dataset.from_list([{"prompt": "a", "completion": " a"}])  # held-out rows may be
    trainer_of(tmp_path, good, tokenizer=tokenizer, eval_dataset=answers, **how)


def merging():
    """A byte-level BPE without a token for "</think>", which it cuts in other ways beside a full stop
    or a line break."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["< /", ". </", "< <", "t h", "i n", "th in", "thin k", "> Ċ", "o k"]
    vocab = {p: i for i, p in enumerate([*letters, *(m.replace(" ", "") for m in merges)])}
    core = Tokenizer(BPE(vocab=vocab, merges=[tuple(m.split()) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="~", pad_token="~")


# completion -> the pieces that are thought; of a tag all but the last, which ends the thought
TAGGED = {
    "<think>ok.</think>\nok": ["ok", ".</", "think"],
    "ok</think>ok": ["ok", "</", "think"],
    "ok</</think>": ["ok", "</", "</", "think"],
    "ok.</thin": ["ok", ".</", "thin"],
    "ok<think>a<b</think>": ["a", "<", "b", "</", "think"],
}


def test_a_tag_is_told_by_its_text_however_the_tokenizer_cuts_it(tmp_path):
    tokenizer, tags = merging(), dict(think_start="<think>", think_end="</think>")
    rows = [
        {"prompt": "a" if "<think>" in text else "a<think>", "completion": text} for text in TAGGED
    ]
    model = model_of(vocab_size=len(tokenizer))
    trainer = trainer_of(
        tmp_path, Dataset.from_list(rows), model=model, tokenizer=tokenizer, eos_token="~", **tags
    )
    for row, expected in zip(trainer.train_dataset, TAGGED.values(), strict=True):
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        mask = thought_mask(ids, labels, **trainer._span)
        pieces = tokenizer.convert_ids_to_tokens(labels[mask].tolist())
        assert [p for p in pieces if p != "~"] == expected


@pytest.mark.parametrize("completion", TAGGED)
def test_training_reads_what_decoding_has_read(completion):
    """Step by step the same mixtures, and tokens where it reads tokens: around the tags, too."""
    tokenizer = merging()
    prompt, new = (tokenizer(text).input_ids for text in ("ab<think>", completion))
    if "<think>" in completion:
        prompt = tokenizer("ab").input_ids
    model = model_of(vocab_size=len(tokenizer))

    def led(logits, token):  # towards the completion, as a model would be that writes it
        return logits.scatter(-1, token[:, None], logits.amax(-1, keepdim=True) + 0.5)

    class Led(LogitsProcessor):
        def __call__(self, ids, scores):
            return led(scores, torch.tensor([new[ids.shape[1] - len(prompt)]]))

    out = softar.generate(
        model,
        torch.tensor([prompt]),
        tokenizer=tokenizer,
        logits_processor=[Led()],
        config=dict(think_start="<think>", think_end="</think>", max_new_tokens=len(new), top_k=4),
    )
    assert out.completions[0].tolist() == new
    fed = []

    def feed(logits, gold):
        fed.append(mk_proba_dist(led(logits.float(), gold), top_k=4))
        return fed[-1]

    labels = torch.tensor([[-100] * len(prompt) + new])
    span = dict(start=spelled(tokenizer, "<think>"), end=spelled(tokenizer, "</think>"))
    thought = thought_mask(out.sequences, labels, **span)
    soft_forward(model, out.sequences, None, thought, feed, mode="sequential")
    kinds = out.record.kind[0]
    assert thought[0, len(prompt) :].tolist() == (kinds == Kind.SOFT).tolist()
    steps = [t for t, on in enumerate(thought[0, len(prompt) :].tolist()) if on]
    for t, mixture in zip(steps, fed, strict=True):
        assert mixture.ids.tolist() == out.record.ids[:, t].tolist()
        torch.testing.assert_close(mixture.weights, out.record.weights[:, t])


@pytest.mark.parametrize("way", ["padded", "packed", "stream", "chats"])
def test_answers_behind_a_closed_or_unopened_thought_are_trained_as_they_are_decoded(
    tmp_path, spy, way
):
    """They read mixtures, and with thought_loss="alpha" had no weight in the end."""
    tokenizer, model = tokenizer_of(), model_of()
    asks = ["w11 <think>", "w12 <think> </think>", "w13"]
    replies = ["w20 w21 </think> w22", "w30 w31", "w40 w41"]
    rows = [{"prompt": f"<bos> {a}", "completion": f" {r}"} for a, r in zip(asks, replies)]
    if way == "chats":
        tokenizer.chat_template = CHAT.replace(
            "<bos> {{ m['content'] }} ",
            "<bos> {{ m['content'] }} {% if closed %}<think> </think> {% endif %}",
        )
        for i, row in enumerate(rows):
            ask = asks[i].replace("<think> </think>", "")
            row["prompt"] = [{"role": "user", "content": ask}]
            row["completion"] = [{"role": "assistant", "content": replies[i]}]
            row["chat_template_kwargs"] = {"closed": i == 1}
    data = Dataset.from_list(rows)
    trainer = trainer_of(
        tmp_path,
        data.to_iterable_dataset() if way == "stream" else data,
        model=copy.deepcopy(model),
        tokenizer=tokenizer,
        alpha_schedule="constant",
        alpha_start=0.0,
        thought_loss="alpha",
        max_steps=1,
        per_device_train_batch_size=3,
        **BOTH,
        **dict(packing=True, max_length=32) if way == "packed" else {},
    )
    trainer.train()
    (seen,) = spy
    assert torch.equal(seen["soft"], seen["thought"]) and seen["thought_weight"] == 0
    read = []
    for prompt, reply in zip(asks, replies, strict=True):
        ids, new = tokenizer(f"<bos> {prompt}", return_tensors="pt"), tokenizer(reply).input_ids
        out = softar.generate(
            model,
            **ids,
            config=trainer.decoding().changed(max_new_tokens=len(new)),
            logits_processor=[tiny.Forced(ids.input_ids.shape[1], [new])],
            tokenizer=tokenizer,
        )
        read += out.completions[out.record.kind == Kind.SOFT].tolist()
    assert tokenizer.decode(read) == "w20 w21"
    assert seen["ids"][seen["soft"]].tolist() == read


def test_rows_beyond_the_table_of_positions_are_refused(tmp_path):
    settings = dict(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(GPT2Config(**settings, bos_token_id=1, eos_token_id=2))
    long = Dataset.from_list([{"prompt": "<bos> w5", "completion": " w6" * n} for n in (3, 20)])
    with pytest.raises(
        ValueError, match="row 1 of the data has 23 tokens, and the model's positions end at 16"
    ):
        trainer_of(tmp_path, long, model=model)
    trainer_of(tmp_path, long, model=model, max_length=16)
    trainer_of(tmp_path, long)  # computed positions


def test_rows_that_max_length_takes_from_are_counted(tmp_path, capsys):
    """TRL cuts them, and drops what is prompt alone, without a word."""
    rows = [("<bos> w5", " w6 w7"), ("<bos> w5", " w6" * 9), ("<bos>" + " w5" * 9, " w6")]
    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in rows])
    trainer_of(tmp_path, data, max_length=8)
    said = "max_length=8: of 3 training rows 1 are as long or cut there and 1 are left out"
    assert said in capsys.readouterr().out
    trainer_of(tmp_path, data)
    assert "max_length" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [dict(think_start="<think>", think_end="</think>"), dict(think_steps=3)], ids=str
)
def test_rows_are_not_cut_behind_what_opens_their_thought(tmp_path, options):
    rows = [{"prompt": "<bos> w7 <think>", "completion": " w6 w9 </think> w5"}]
    rows += [{"prompt": "<bos> w8 <think>", "completion": " w6 w9 w8 </think> w5"}]
    how = options | dict(truncation_mode="keep_end")
    trainer_of(tmp_path, Dataset.from_list(rows), max_length=7, **how)
    with pytest.raises(ValueError, match=r"row 1 of train_dataset lacks .* max_length=6 by"):
        trainer_of(tmp_path, Dataset.from_list(rows), max_length=6, **how)
    if "think_steps" in options:  # a text that is as long, with its end
        text = Dataset.from_list([{"text": "<bos> w6 w9 w8 w5"}])
        made = trainer_of(tmp_path, text, max_length=6, **how)
        assert len(made.train_dataset[0]["input_ids"]) == 6


def test_completions_that_an_evaluation_would_cut_are_said(tmp_path, capsys):
    """The saved soft_config.json decodes no more tokens either."""
    data = Dataset.from_list([{"prompt": "<bos> w5", "completion": " w6" * n} for n in (2, 9)])
    trainer_of(tmp_path, data, eval_new_tokens=9)
    said = "eval_new_tokens=9: the longest completion has 10 tokens"  # its end among them
    assert said in capsys.readouterr().out
    trainer_of(tmp_path, data, eval_new_tokens=10)
    assert "eval_new_tokens" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "length"),
    [
        (dict(), 101),  # the longest completion and its end
        (dict(max_length=50), 48),  # what of it is trained on
        (dict(eval_new_tokens=7), 7),
        (dict(targets="traces"), 121),
        (dict(latent_stages=3, latents_per_step=2, soft_top_k=10), 107),  # beside hidden states
    ],
)
def test_a_folder_decodes_answers_as_long_as_those_it_was_trained_on(tmp_path, more, length):
    """64 tokens of them, whatever the data, which no page said: chains of thought were cut."""
    data = Dataset.from_list(
        [
            {"prompt": "<bos> w5", "completion": " w6" * n, "traces": [" w6" * n] * 2}
            for n in (2, 100)
        ]
        + [{"prompt": "<bos> w5", "completion": " w6", "traces": [" w6", " w7" * 120]}]
    )
    if "targets" not in more:
        data = data.remove_columns("traces")
    trainer = trainer_of(tmp_path, data, think_steps=1, **more)
    assert trainer.decoding("discrete").max_new_tokens == length
    trainer.save_model()
    assert SoftConfig.load(tmp_path).max_new_tokens == length


def test_a_stream_does_not_show_how_long_completions_are(tmp_path, capsys):
    data = Dataset.from_list([{"prompt": "<bos> w5", "completion": " w6" * 100}] * 4)
    trainer = trainer_of(tmp_path, data.to_iterable_dataset(), max_steps=1)
    most = SoftConfig.max_new_tokens
    assert f"eval_new_tokens={most}, as a stream" in capsys.readouterr().out
    assert trainer.decoding().max_new_tokens == most


def test_tokens_of_every_column_and_every_dataset_are_checked(tmp_path):
    args = SoftSFTConfig(str(tmp_path), max_length=8)
    rows = [{"input_ids": [1, 5]}] * 1500 + [{"input_ids": [1, 5, 6, 7]}, {"input_ids": [1]}]
    traces = [{"input_ids": [1], "trace_ids": ids} for ids in ([[1, 2]], [[3], [4, 63]], [])]
    rows, traces = Dataset.from_list(rows), Dataset.from_list(traces)
    check_tokens({"a": rows, "b": traces, "c": rows.to_iterable_dataset()}, args, 4, 64)
    with pytest.raises(
        ValueError, match=r"row 1500 of the data has 4 tokens.* end at 3: set max_l"
    ):
        check_tokens({"a": traces, "b": rows}, args, 3, 64)
    with pytest.raises(ValueError, match=r"row 0 of the data has 2 tokens.* end at 1: set max_l"):
        check_tokens(traces, args, 1, 64)
    with pytest.raises(ValueError, match=r"the data holds the id 63.* vocabulary has 63"):
        check_tokens(traces, args, None, 63)
    with pytest.raises(ValueError, match="max_length=8 leaves no row"):
        check_tokens({"a": rows, "b": rows.select([])}, args, None, 64)


@pytest.mark.parametrize("rows", [{}, dict(packing=True, max_length=10)], ids=str)
def test_batches_are_padded_to_a_multiple(tmp_path, rows):
    trainer = trainer_of(tmp_path, pad_to_multiple_of=7, **rows)
    for batch in trainer.get_train_dataloader():
        assert {part.shape[-1] % 7 for part in batch.values()} == {0}
    same(trained(tmp_path, pad_to_multiple_of=7, **rows), trained(tmp_path, **rows), atol=1e-4)


def test_what_no_batch_can_be_padded_to_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pad_to_multiple_of=0 must be at least 1"):
        config_of(tmp_path, pad_to_multiple_of=0)
    args = SoftSFTConfig(str(tmp_path), max_length=6, pad_to_multiple_of=4)
    rows = Dataset.from_list([{"input_ids": [1, 5, 6, 7, 8]}])
    check_tokens(rows, args, 8, 64)
    with pytest.raises(ValueError, match="pads 5 tokens to 8, and the model's positions end at 7"):
        check_tokens(rows, args, 7, 64)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_and_masked_diffusion_are_refused(tmp_path, kind):
    with pytest.raises(
        ValueError, match=r"peft_type=P\w+: SoftSFTTrainer feeds mixtures.*use LoRA"
    ):
        trainer_of(tmp_path, peft_config=kind(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model = calm()
    model.config.mask_token_id = 7
    with pytest.raises(ValueError, match="is a masked-diffusion model"):
        trainer_of(tmp_path, model=model)
