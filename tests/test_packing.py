"""Soft SFT with several examples in a row: what it trains is what rows of their own would."""

import random
import re

import pytest
import torch
from datasets import Dataset
from tiny import PAD, QUIET, VOCAB, model_of, seeded, tokenizer_of, with_lora
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, MambaConfig, MistralConfig

from softar.mixers import guide
from softar.models import check_keeps_apart
from softar.sft.config import SoftSFTConfig
from softar.sft.data import PackedCollator, packed
from softar.sft.forward import soft_forward
from softar.sft.loss import soft_loss
from softar.sft.trainer import SoftSFTTrainer
from softar.soft import mk_proba_dist

LENGTHS = (9, 7, 4, 6, 3)
ROWS = ((0, 4, 2), (1, 3))  # which examples stand in each row


def of_config(config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1) if parameter.dim() > 1 else None
    return model


# narrow, so that what is read again does not make much of rounding
CALM = dict(initializer_range=0.1)
SMALL = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
MODELS = {
    "llama": lambda: model_of(**CALM),
    "with LoRA": lambda: with_lora(model_of(**CALM)),
    "positions in a table": lambda: of_config(
        GPT2Config(n_positions=12, n_embd=32, n_layer=2, n_head=4, **SMALL)
    ),
    "sliding and whole windows": lambda: model_of("gemma3", **CALM),
    "sliding windows": lambda: of_config(
        MistralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=4,
            **SMALL,
        )
    ),
    "eager attention": lambda: model_of(attn_implementation="eager", **CALM),
}


def examples():
    """Ids and whether they are thought, of each example: a prompt, a thought, an answer."""
    rng = seeded(1)
    for n in LENGTHS:
        at, begin = torch.arange(n), 1 + n // 3
        yield torch.randint(5, VOCAB, (n,), generator=rng), (at >= begin) & (at < n - 1)


def padded():
    """The examples as rows of their own: ids, labels, marks and mask [N, T]."""
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, True, value)  # noqa: E731
    ids, thoughts = zip(*examples(), strict=True)
    answers = [torch.where(torch.arange(len(x)) > len(x) // 3, x, -100) for x in ids]
    mask = pad([torch.ones_like(x) for x in ids], 0)
    return pad(ids, PAD), pad(answers, -100), pad(thoughts, False), mask


def in_rows():
    """The same in the rows of ROWS: ids, labels, marks and positions, by the collator."""
    ids, labels, thoughts, mask = padded()
    cut = lambda values: [row[m.bool()].tolist() for row, m in zip(values, mask, strict=True)]  # noqa: E731
    columns = dict(input_ids=cut(ids), labels=cut(labels), thought=cut(thoughts))
    rows = [
        {name: [x for i in row for x in values[i]] for name, values in columns.items()}
        | {"seq_lengths": [LENGTHS[i] for i in row]}
        for row in ROWS
    ]
    batch = PackedCollator(PAD)(rows)
    return (batch[name] for name in ("input_ids", "labels", "thought", "position_ids"))


def loss_and_gradients(model, ids, labels, marks, mask=None, **how):
    model.zero_grad()

    def feed(logits, gold, hidden=None):
        scale = 1.0 if hidden is None else hidden[..., :1].sigmoid() + 0.5
        return guide(mk_proba_dist(logits * scale), gold, 0.3)

    logits = soft_forward(model, ids, mask, marks, feed, **how)
    loss, entropies = soft_loss(logits, labels, marks, thought_weight=0.5)
    (loss / 10 + entropies.mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, entropies.sort().values, gradients


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "how",
    [
        dict(passes=0),
        dict(passes=1),
        dict(passes=2),
        dict(),
        dict(passes=2, grad_passes=1),
        dict(passes=1, hidden=True),
    ],
    ids=str,
)
def test_packed_examples_have_the_loss_and_gradients_of_rows_of_their_own(kind, how):
    model = MODELS[kind]()
    ids, labels, marks, mask = padded()
    alone = loss_and_gradients(model, ids, labels, marks, mask, **how)
    ids, labels, marks, positions = in_rows()
    assert len(ids) == len(ROWS)
    together = loss_and_gradients(model, ids, labels, marks, position_ids=positions, **how)
    assert len(alone[2]) > 3
    for name, gradient in alone[2].items():
        scale = max(1.0, gradient.abs().max().item())
        assert_close(
            together[2][name],
            gradient,
            rtol=0,
            atol=1e-5 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert_close(together[:2], alone[:2], rtol=1e-5, atol=1e-5)


def test_no_more_passes_are_made_than_an_example_thinks():
    model, (ids, _, marks, positions) = model_of(), in_rows()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    feed = lambda logits, gold: mk_proba_dist(logits, top_k=3)  # noqa: E731
    soft_forward(model, ids, None, marks, feed, position_ids=positions, passes=99)
    assert len(calls) == 1 + max(int(thought.sum()) for _, thought in examples())


def test_rows_of_the_collator():
    row = dict(input_ids=[5, 6, 7, 8, 9], labels=[-100, 6, 7, -100, 9], seq_lengths=[3, 2])
    row["thought"] = [False, True, False, False, False]
    short = dict(input_ids=[5, 6], labels=[-100, 6], seq_lengths=[2], thought=[False, True])
    batch = PackedCollator(PAD)([row, short])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["thought"].tolist() == [row["thought"], [False, True, False, False, False]]
    assert batch["labels"].tolist() == [row["labels"], [-100, 6, -100, -100, -100]]
    held_out = PackedCollator(PAD)([dict(input_ids=[5, 6], labels=[-100, 6])])
    assert {*held_out} == {"input_ids", "labels", "attention_mask"}


def test_an_examples_first_token_is_neither_target_nor_thought():
    texts = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 5, 6], [7]]})
    rows = packed(texts, 7, dict(start=(), end=(), steps=2))
    assert sorted(map(sum, rows["seq_lengths"])) == [1, 7]
    full = rows[0]
    assert full["labels"] == [-100, 6, 7, 8, -100, 5, 6] and full["seq_lengths"] == [4, 3]
    # as of a row of its own: the first of two steps has no belief before it
    assert full["thought"] == [False, True, False, False, False, True, False]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (dict(position_ids=torch.tensor([[0, 1, 0]])), "marks a token at position 0"),
        (dict(position_ids=torch.tensor([[0, 1, 2]]), mode="sequential"), "mode='sequential'"),
    ],
)
def test_marks_and_modes_that_packed_rows_cannot_have(how, says):
    ids, marks = torch.tensor([[5, 6, 7]]), torch.tensor([[False, False, True]])
    with pytest.raises(ValueError, match=says):
        soft_forward(
            model_of(), ids, None, marks, lambda logits, gold: mk_proba_dist(logits), **how
        )


# -- the trainer


def words(rng, n):
    return " ".join(f"w{rng.randrange(5, VOCAB)}" for _ in range(n))


def data(n=8, text=False):
    rng, rows = random.Random(0), []
    for i in range(n):
        prompt, thought = "<bos> " + words(rng, 1 + i % 3), " " + words(rng, 1 + i % 5)
        completion = thought + " </think> " + words(rng, 1)
        rows.append(
            {"text": prompt + completion}
            if text
            else {"prompt": prompt, "completion": completion, "answer": completion.split()[-1]}
        )
    return Dataset.from_list(rows)


def trainer_of(folder, model=None, train=None, **settings):
    common = dict(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        alpha_span=1.0,
        think_end="</think>",
        soft_top_k=None,
        **QUIET,
    )
    return SoftSFTTrainer(
        model_of(**CALM) if model is None else model,
        SoftSFTConfig(**common | settings),
        train_dataset=data() if train is None else train,
        eval_dataset=data(3),
        processing_class=tokenizer_of(),
    )


WAYS = {
    "weighed": dict(thought_loss="alpha", entropy_coef=0.1),
    "texts": dict(train=data(text=True), think_end=None, think_steps=3, alpha_start=0.2),
    "learnt filters": dict(learn_step_temperature=True, learn_min_p=True, soft_min_p=0.1),
    "tokens before the prompts": dict(think_tokens=2),
    "LoRA, accumulated": dict(gradient_accumulation_steps=2, soft_passes=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_training_on_packed_rows_is_training_on_their_examples(tmp_path, way):
    """All in one step, so that both see the same examples."""
    runs, parts = [], WAYS[way].get("gradient_accumulation_steps", 1)
    for rows, packing in ((8, {}), (3, dict(packing=True, max_length=30))):
        how = dict(per_device_train_batch_size=-(-rows // parts), eval_strategy="steps")
        model = with_lora(model_of(**CALM)) if "LoRA" in way else None
        runs.append(trainer_of(tmp_path, model, **WAYS[way], **how, **packing, eval_steps=3))
        assert len(runs[-1].train_dataset) == rows
        runs[-1].train()
    logs = [run.state.log_history for run in runs]
    for name in "loss grad_norm alpha eval_loss eval_gold_loss thought_entropy".split():
        alone, together = ([x[name] for x in log if name in x] for log in logs)
        assert alone and together == pytest.approx(alone, rel=1e-4, abs=1e-5), name
    alone, together = (run.model.state_dict() for run in runs)
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shuffled", [False, True])
def test_packed_rows_are_shuffled_where_that_is_asked_for(tmp_path, shuffled):
    """They come with the longest example first."""
    rows = trainer_of(
        tmp_path, train=data(40), packing=True, max_length=12, shuffle_dataset=shuffled
    ).train_dataset
    first = [lengths[0] for lengths in rows["seq_lengths"]]
    assert (first == sorted(first, reverse=True)) is not shuffled


def test_what_is_drawn_is_drawn_for_packed_rows_too(tmp_path):
    losses = []
    for seed in (0, 1):
        how = dict(soft_mixer="gumbel", guidance="coin", seed=seed, data_seed=0, max_steps=2)
        trainer = trainer_of(tmp_path, packing=True, max_length=30, alpha_start=0.5, **how)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] != losses[1]


def test_held_out_rows_stay_apart_and_rows_of_packs_are_counted(tmp_path, capsys):
    settings = dict(packing=True, max_length=30, max_steps=-1, num_train_epochs=2)
    trainer = trainer_of(tmp_path, per_device_train_batch_size=1, **settings)
    rows = len(trainer.train_dataset)
    trainer.train()
    said = capsys.readouterr().out
    assert re.search(rf"8 training examples in {rows} rows, \d\d% of their 30 tokens", said)
    assert "up to 3 forwards of 1 x 30 tokens, mixtures" in said
    assert trainer.state.max_steps == 2 * rows
    assert "seq_lengths" not in trainer.eval_dataset.column_names
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: seen.extend(rows) or collate(rows)
    trainer.evaluate(data(4))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(soft_mode="sequential"), "soft_mode='sequential' does not go with packing=True"),
        (dict(targets="traces"), "targets='traces' does not go with packing=True"),
        (dict(targets="oracle"), "targets='oracle' does not go with packing=True"),
        (dict(latent_stages=2), "latent_stages=2 does not go with packing=True"),
        (dict(completion_logits=True), "completion_logits=True does nothing with packing"),
        (dict(packing_strategy="wrapped"), "packing_strategy='wrapped' cuts examples in two"),
        (dict(eval_packing=True), "eval_packing=True does nothing here"),
        (dict(padding_free=True), "padding_free=True"),
        (dict(max_length=None), "packing=True needs a max_length"),
        (dict(packing=False, packing_strategy="wrapped"), "'wrapped' does nothing without packing"),
    ],
    ids=str,
)
def test_options_that_packed_rows_cannot_have_are_named(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        SoftSFTConfig(str(tmp_path), **dict(packing=True, **QUIET) | settings)


def test_streams_are_not_packed(tmp_path):
    with pytest.raises(ValueError, match=r"packing=True needs a datasets.Dataset"):
        trainer_of(tmp_path, train=data().to_iterable_dataset(), packing=True)


MIX = {
    "positions by distance": lambda: of_config(
        BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL)
    ),
    "a state": lambda: of_config(
        MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **SMALL)
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MIX)
def test_a_model_that_would_mix_the_examples_is_refused_before_training(tmp_path, kind):
    model = MIX[kind]()
    says = f"packing=True: {type(model).__name__} reads the examples of a row into each other"
    with pytest.raises(ValueError, match=says):
        trainer_of(tmp_path, model, packing=True, max_length=30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_rounding_is_not_taken_for_mixing(kind, dtype):
    model, ids = MODELS[kind]().to(dtype).train(), torch.cat([ids for ids, _ in examples()])
    check_keeps_apart(model, ids, [*LENGTHS], rows=2)
    assert model.training
