"""Coconut's curriculum: the rows of its stages, what they read, and that a run goes on exactly."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from test_sft import ADAM, config_of, logged, same, trained, trainer_of
from tiny import BOS, END, PAD, model_of, seeded, tokenizer_of
from transformers import GPT2Config, GPT2LMHeadModel

import softar
from softar import Kind, SoftConfig
from softar.sft.forward import soft_forward
from softar.sft.latent import Curriculum, steps_of
from softar.tags import moves_of_ids

OFF = -100
DOT = 9  # ends a step


def curriculum_of(stages, latents, *, step_end=(), **span):
    return Curriculum(stages, latents, dict(start=(), end=(), steps=None) | span, step_end, PAD)


IDS = [BOS, 11, 21, DOT, 22, 23, DOT, 24, END, 41, 2]
INSIDE = [2 <= i < 8 for i in range(len(IDS))]
LABELS = [OFF, OFF, *IDS[2:]]


@pytest.mark.parametrize(
    "stage, latents, step_end, behind",
    [
        (0, 2, (DOT,), IDS[2:]),
        (1, 2, (DOT,), [22, 23, DOT, 24, END, 41, 2]),
        (2, 1, (DOT,), [24, END, 41, 2]),
        (3, 1, (DOT,), [END, 41, 2]),
        (4, 2, (DOT,), [END, 41, 2]),
        (5, 3, (DOT,), [END, 41, 2]),  # the last one
        (1, 1, (), IDS[3:]),
        (4, 3, (), IDS[6:]),
        (5, 1, (), [END, 41, 2]),  # the last one, though a sixth token would be left
    ],
)
def test_rows_by_hand(stage, latents, step_end, behind):
    curriculum = curriculum_of(5, latents, step_end=moves_of_ids(step_end))
    n = stage * latents
    ids, labels, start = curriculum.row(IDS, LABELS, INSIDE, stage)
    assert (ids, start) == ([BOS, 11] + [PAD] * n + behind, 2)
    assert labels == [OFF] * (2 + n) + behind


def test_a_batch_has_its_first_latents_in_one_column():
    curriculum = curriculum_of(2, 2, end=moves_of_ids((END,)))
    rows = [([BOS, 11, 12, 21, 22, END, 41], 3), ([BOS, 13, 14, 15, 23, 24, 25, END, 42], 4)]
    width = 9
    batch = dict(
        input_ids=torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in rows]),
        labels=torch.tensor([[OFF] * n + ids[n:] + [OFF] * (width - len(ids)) for ids, n in rows]),
        attention_mask=torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
    )
    made = curriculum.batch(batch, [2, 1])
    assert made["input_ids"].tolist() == [
        [PAD, BOS, 11, 12, *[PAD] * 4, END, 41],
        [BOS, 13, 14, 15, PAD, PAD, 24, 25, END, 42],
    ]
    assert made["attention_mask"].tolist() == [[0, *[1] * 9], [1] * 10]
    assert made["latent_mask"].tolist() == [
        [False] * 4 + [True] * n + [False] * (6 - n) for n in (4, 2)
    ]
    assert made["labels"].tolist() == [[OFF] * 8 + [END, 41], [OFF] * 6 + [24, 25, END, 42]]
    text = curriculum.batch(batch, [0, 0])
    assert not text["latent_mask"].any()
    assert text["input_ids"][1].tolist() == rows[1][0]


def test_a_batch_at_a_stage_is_padded_to_a_multiple(tmp_path):
    trainer = trainer_of(tmp_path, rows_of(), pad_to_multiple_of=8, max_steps=4, **KNOBS)
    (batch, *_) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape[1] % 8 == 0
    made = trainer._curriculum.batch(batch, [1] * len(batch["input_ids"]))
    assert {part.shape[1] % 8 for part in made.values()} == {0}


def hand(model, ids, latent, mask):
    """Logits of one row, whose latents are appended one by one without a cache, [T, V]."""
    embed = model.get_input_embeddings()(ids[mask])
    marks = latent[mask].tolist()
    inputs = embed[:0]
    for column, is_latent in enumerate(marks):
        own = embed[column]
        if is_latent:
            own = model(inputs_embeds=inputs[None], output_hidden_states=True).hidden_states[-1][
                0, -1
            ]
        inputs = torch.cat([inputs, own[None]])
    return model(inputs_embeds=inputs[None]).logits[0]


def batch_of(latents=3):
    """Two rows of unequal length, with padding on both sides."""
    ids = torch.tensor(
        [[PAD, BOS, 11, *[PAD] * latents, 12, 13, PAD], [BOS, 5, 6, *[PAD] * latents, 7, 8, 9]]
    )
    mask = torch.tensor([[0, *[1] * (latents + 4), 0], [1] * (latents + 6)]).bool()
    latent = torch.zeros_like(mask)
    latent[:, 3 : 3 + latents] = True
    return ids, mask, latent


def wide(arch):
    """A tiny model in float64; llama and gemma keep their norms in float32."""
    if arch != "gpt2":
        return model_of(arch, dtype=torch.float64, initializer_range=0.15)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes)).double().eval()


@pytest.mark.parametrize("arch, far", [("gpt2", 1e-9), ("gemma3", 1e-3)])
def test_latents_are_read_as_by_hand_and_in_parallel_after_as_many_passes(arch, far):
    model, near = wide(arch), dict(rtol=far, atol=far)
    ids, mask, latent = batch_of()
    found = {}
    for name, how in {
        "sequential": dict(mode="sequential"),
        "parallel": dict(passes=3),
        "more": dict(passes=7),
        "all": dict(passes=None),
        "few": dict(passes=2),
    }.items():
        model.zero_grad()
        logits = soft_forward(model, ids, mask.long(), latent, None, **how)
        rest = mask & ~latent
        (logits[rest] * torch.linspace(-1, 1, 64)).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[name] = logits.detach(), grads
        if name == "sequential":
            for row in range(2):
                wanted = hand(model, ids[row], latent[row], mask[row])
                torch.testing.assert_close(logits[row][mask[row]], wanted, **near)
    for name in ("parallel", "more", "all"):
        for a, b in zip(found[name], found["sequential"], strict=True):
            torch.testing.assert_close(
                a[mask] if a.dim() == 3 else a, b[mask] if b.dim() == 3 else b, **near
            )
    # r passes make the first r latents exact, and no more
    few, exact = found["few"][0], found["sequential"][0]
    torch.testing.assert_close(few[:, 3:5], exact[:, 3:5], **near)
    assert (few[:, 5:8] - exact[:, 5:8]).abs().max() > 1e-3


@pytest.mark.parametrize("how", [dict(mode="sequential"), dict(passes=3)])
def test_gradients_reach_through_the_latents(how):
    """Against finite differences, of a loss behind the latents alone, in the direction of the
    embedding of a token before them."""
    model = wide("gpt2")
    ids, mask, latent = batch_of()
    ids[:, 6:] = 7  # what comes behind holds not that token
    table = model.get_input_embeddings().weight

    def loss():
        logits = soft_forward(model, ids, mask.long(), latent, None, **how)
        return logits[:, 5:7].log_softmax(-1)[..., 20].sum()

    loss().backward()
    token = 11
    direction = torch.randn(32, generator=seeded(1), dtype=torch.float64)
    slope, h = float(table.grad[token] @ direction), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            table[token] += sign * h * direction
            values.append(float(loss()))
            table[token] -= sign * h * direction
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)
    assert abs(slope) > 1e-4
    # cut at every latent nothing of it comes through them but what attention sees
    if how.get("mode") == "sequential":
        model.zero_grad()
        logits = soft_forward(model, ids, mask.long(), latent, None, **how, window=1)
        logits[:, 5:7].log_softmax(-1)[..., 20].sum().backward()
        assert abs(float(table.grad[token] @ direction) - slope) > 1e-6


def rows_of(n=6, steps=3):
    rng = torch.Generator().manual_seed(0)

    def words(k):
        return "".join(f" w{i}" for i in torch.randint(10, 60, (k,), generator=rng).tolist())

    rows = [
        {"prompt": "<bos>" + words(1 + i % 3), "completion": words(steps) + " </think>" + words(1)}
        for i in range(n)
    ]
    return Dataset.from_list(rows)


KNOBS = dict(
    latent_stages=2, think_end="</think>", soft_mode="sequential", soft_passes=None, soft_top_k=10
)


def test_training_follows_the_stages_and_forgets_the_optimiser(tmp_path, monkeypatch):
    from softar.sft import trainer as module

    seen = []

    def spied(model, ids, mask, marked, feed, **how):
        seen.append((int(marked.sum(1).max()), feed))
        return soft_forward(model, ids, mask, marked, feed, **how)

    monkeypatch.setattr(module, "soft_forward", spied)
    trainer = trainer_of(
        tmp_path, rows_of(), max_steps=7, latents_per_step=2, latent_stage_steps=2, **KNOBS | ADAM
    )
    ages, plain = [], trainer.training_step

    def step(*args, **kwargs):
        ages.append(len(trainer.optimizer.state))
        return plain(*args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", step)
    trainer.train()
    assert seen == [(n, None) for n in (0, 0, 2, 2, 4, 4, 4)]
    assert [age > 0 for age in ages] == [False, True, False, True, False, True, True]
    assert logged(trainer, "latent_stage") == [0, 0, 1, 1, 2, 2, 2]
    assert not logged(trainer, "alpha")
    most = trainer.decoding("discrete").max_new_tokens  # tests/test_sft.py
    config = SoftConfig(mixer="hidden", budget=4, think_end="</think>", max_new_tokens=most)
    trainer.save_model(str(tmp_path / "saved"))
    assert SoftConfig.load(tmp_path / "saved") == config == trainer.decoding()
    assert trainer.decoding("discrete").mixer == "hard"


@pytest.mark.parametrize("stages", [None, 2])
@pytest.mark.parametrize("span", [dict(think_steps=3), dict(think_end="</think>"), dict()])
def test_a_saved_folder_is_decoded_in_tokens_as_the_trainer_does(tmp_path, stages, span):
    """Whatever the trained model reads; so many latents are not so many tokens."""
    latent = {} if stages is None else dict(latent_stages=stages, latents_per_step=2)
    args = config_of(tmp_path, **KNOBS | dict(think_end=None, latent_stages=None) | latent | span)
    model_of().save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    args.decoding().save(tmp_path)
    trained = args.decoding("discrete").resolve(tokenizer_of())
    name = str(tmp_path)
    made = {s: softar.make_decoder(s, model=name) for s in "discrete sampled soft beam".split()}
    made["votes"] = softar.make_decoder("self-consistency:votes=2", model=name).decoder
    assert made["discrete"].config.changed(top_k=None) == trained
    for decoder in made.values():
        config = decoder.thought if decoder is made["beam"] else decoder.config
        assert (config.budget, config.think_end) == (trained.budget, trained.think_end)
    model, _ = softar.load(name, device="cpu")
    out = softar.generate(model, torch.tensor([[BOS, 11]]), mixer="hard", max_new_tokens=5)
    assert out.config.budget == trained.budget
    assert softar.make_decoder("discrete:budget=1", model=name).config.budget == 1
    if stages is not None:
        assert softar.make_decoder("hidden", model=name).config.budget == 4
        assert softar.generate(model, torch.tensor([[BOS, 11]])).config.budget == 4


def test_a_resumed_run_goes_on_exactly_across_stages(tmp_path):
    kw = (
        KNOBS
        | ADAM
        | dict(max_steps=6, latent_stage_steps=2, latent_uniform_prob=0.5, train=rows_of(10))
    )
    kw |= dict(save_strategy="steps", save_steps=1, lr_scheduler_type="cosine")
    unbroken = trained(tmp_path / "a", **kw)
    for step in (1, 2):  # inside a stage, and where one ends
        resumed = trained(
            tmp_path / f"b{step}", resume=str(tmp_path / "a" / f"checkpoint-{step}"), **kw
        )
        assert logged(resumed) == logged(unbroken) and len({*logged(unbroken)}) == 6
        same(resumed, unbroken, rtol=0, atol=0)


def test_the_log_says_how_evaluations_decode(tmp_path, capsys):
    trained(tmp_path, rows_of(), max_steps=3, **KNOBS)
    said = " ".join(capsys.readouterr().out.split())
    assert "evaluations and checkpoints decode as the last stage from the start" in said


def test_rows_at_a_stage_drawn_uniformly(tmp_path):
    trainer = trainer_of(
        tmp_path,
        rows_of(),
        max_steps=9,
        latent_uniform_prob=0.5,
        per_device_train_batch_size=500,
        **KNOBS,
    )
    trainer.state.max_steps, trainer.state.global_step = 9, 4  # stage 1
    row = dict(
        input_ids=[[BOS, 11, 21, 22, 23, END, 41]],
        labels=[[OFF, OFF, 21, 22, 23, END, 41]],
        attention_mask=[[1] * 7],
    )
    batches = [{name: torch.tensor(x * 500) for name, x in row.items()}]
    again = [dict(batches[0])]
    for each in (batches, again):
        trainer.stage_batches(each)
    counts = Counter(batches[0]["latent_mask"].sum(1).tolist())
    wanted = {0: 500 / 6, 1: 500 * (1 / 2 + 1 / 6), 2: 500 / 6}
    assert (
        all(abs(counts[n] - wanted[n]) < 5 * wanted[n] ** 0.5 for n in wanted) and len(counts) == 3
    )
    assert torch.equal(batches[0]["latent_mask"], again[0]["latent_mask"])


def test_training_reads_what_decoding_reads(tmp_path):
    rows, tokenizer = rows_of(), tokenizer_of()
    trainer = trained(tmp_path, rows, max_steps=3, latents_per_step=2, **KNOBS)
    model, config = trainer.model.eval(), trainer.decoding()
    feature = trainer.train_dataset[1]
    batch = trainer.data_collator([feature])
    staged = trainer.staged(batch)
    logits = soft_forward(
        model, staged["input_ids"], None, staged["latent_mask"], None, mode="sequential"
    )
    start = staged["latent_mask"][0].tolist().index(True)
    out = softar.generate(model, staged["input_ids"][:, :start], config=config, tokenizer=tokenizer)
    assert out.record.kind[0, :5].tolist() == [Kind.LATENT] * 4 + [Kind.FORCED]
    assert int(logits[0, start + 4].argmax()) == int(out.completions[0, 5])
    metrics = trainer_of(
        tmp_path, rows, eval_dataset=rows, score=lambda a, r: 1.0, max_steps=3, **KNOBS
    ).evaluate()
    assert (
        metrics["eval_soft_accuracy"] == 1.0 and metrics["eval_gold_loss"] != metrics["eval_loss"]
    )


@pytest.mark.parametrize(
    "mode",
    [
        dict(soft_mode="sequential"),
        dict(soft_mode="parallel"),
        dict(soft_mode="parallel", soft_passes=2),
    ],
)
def test_both_modes_train_alike_where_passes_are_latents(tmp_path, mode):
    trainer = trained(tmp_path / "a", rows_of(), max_steps=3, **KNOBS | mode)
    assert trainer.args.soft_passes == (2 if mode["soft_mode"] == "parallel" else None)
    other = trained(tmp_path / "b", rows_of(), max_steps=3, **KNOBS | dict(soft_mode="sequential"))
    same(trainer, other)


@pytest.mark.parametrize("rows", [1, 7, 12])
@pytest.mark.parametrize("epochs", [1, 2.5])
def test_steps_are_counted_as_the_trainer_counts_them(tmp_path, rows, epochs):
    settings = dict(max_steps=-1, num_train_epochs=epochs, gradient_accumulation_steps=2)
    trainer = trainer_of(
        tmp_path, rows_of(rows), per_device_train_batch_size=2, **settings, think_end="</think>"
    )
    counts = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert steps_of(rows, trainer.args) == counts[-1]


@pytest.mark.parametrize("latents, passes", [(1, 3), (2, 6)])
def test_parallel_passes_are_all_the_latents(tmp_path, latents, passes):
    settings = KNOBS | dict(latent_stages=3, latents_per_step=latents, soft_mode="parallel")
    assert config_of(tmp_path, **settings).soft_passes == passes


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(latent_stages=0), "latent_stages=0 must be at least 1"),
        (dict(latents_per_step=0), "latents_per_step=0 must be at least 1"),
        (dict(latent_uniform_prob=1.5), r"latent_uniform_prob=1.5 must lie in \[0, 1\]"),
        (
            dict(latent_stage_steps=2, max_steps=4),
            "stages of 2 steps the last is not reached in 4: raise",
        ),
        (dict(max_steps=2), "latent_stages=2: .* not reached in 2"),
        (dict(targets="oracle"), "targets='oracle' reads the traces' mixtures"),
        (dict(soft_mixer="gumbel"), "soft_mixer='gumbel' does nothing with latent_stages"),
        (dict(alpha_start=0.5), "alpha_start=0.5 does nothing with latent_stages"),
        (dict(learn_temperature=True), "learn_temperature=True does nothing with latent_stages"),
        (
            dict(latent_stages=None, latents_per_step=2),
            "latents_per_step=2 does nothing without latent_stages",
        ),
        (dict(latent_stages=None, latent_step_end="."), "latent_step_end='.' does nothing without"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, told):
    with pytest.raises(ValueError, match=told):
        config_of(tmp_path, **KNOBS | settings)


def test_rows_and_models_that_cannot_be(tmp_path):
    def refused(told, train=None, **settings):
        with pytest.raises(ValueError, match=told):
            trainer_of(tmp_path, train or rows_of(), **KNOBS | settings)

    nothing = Dataset.from_list([{"prompt": "<bos> w11", "completion": " </think> w12"}])
    refused("row 0 of the data: a row has no thought", nothing)
    text = Dataset.from_list([{"text": "w11 w12 </think> w13"}])
    refused("row 0 of the data: a row begins with its thought.*give a prompt", text)
    learned = wide("gpt2").float()
    unclosed = Dataset.from_list([*rows_of(3), {"prompt": "<bos>", "completion": " w21 w22"}])
    refused("row 3 of the data has no answer behind its thought.*give think_end", unclosed)
    refused("row 0 of the data has no answer behind its thought", think_end=None)
    refused("latent_step_end='w9' stands in no thought", latent_step_end="w9")
    behind = Dataset.from_list([{"prompt": "<bos>", "completion": " w21 w22 </think> w9 w9"}])
    refused("latent_step_end='w9' stands in no thought", behind, latent_step_end="w9")
    epochs = dict(max_steps=-1, num_train_epochs=1)
    refused("after stages of 1000 steps the last is not reached", latent_stage_steps=1000, **epochs)
    traces = [" w21 </think> w22", " </think> w22"]
    row = {"prompt": "<bos>", "completion": traces[0], "traces": traces}
    refused("row 0 of the data: a row has no thought", Dataset.from_list([row]), targets="traces")
    refused("row 0 of the data has .* the model's end at 64", latents_per_step=40, model=learned)
    refused(
        "needs a think_end of one token",
        think_end="w11 w12",
        train=Dataset.from_list([{"prompt": "<bos>", "completion": "w9 w11 w12 w13"}]),
    )
