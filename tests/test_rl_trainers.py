"""RL on a soft policy: TRL's loss at one draw, exact replay, resuming, PPO and RLOO, and what is
refused."""

import copy
import inspect
import json
import math
import shutil
import types

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from tiny import BOS, END, EOS, THINK, Forced, left_padded, model_of, tokenizer_of, with_lora
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import softar
from softar.config import SoftConfig
from softar.resume import changes
from softar.rl import (
    SoftGRPOConfig,
    SoftGRPOTrainer,
    SoftPPOConfig,
    SoftPPOTrainer,
    SoftRLOOConfig,
    SoftRLOOTrainer,
)
from softar.rl.actions import mixture
from softar.rl.losses import LOSS_TYPES
from softar.rl.metrics import statistics, thought_steps
from softar.thought import Kind
from softar.training import WatchedLosses

ROWS = Dataset.from_list(
    [{"prompt": f"<bos> w{i} w{i + 1}" if i % 3 else f"<bos> w{i}"} for i in range(6, 30)]
)
QUICK = dict(
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=8,
    max_steps=2,
    logging_steps=1,
    learning_rate=1e-2,
    save_strategy="no",
    disable_tqdm=True,
    think_steps=3,
    think_end="</think>",
)
CONFIGS = {"grpo": SoftGRPOConfig, "ppo": SoftPPOConfig, "rloo": SoftRLOOConfig}
TRAINERS = {"grpo": SoftGRPOTrainer, "ppo": SoftPPOTrainer, "rloo": SoftRLOOTrainer}


def lora(dropout=0.0):
    return LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="CAUSAL_LM"
    )


def words(completions, **columns):
    """The share of even words: differs between completions, and is 0 for an empty one."""
    texts = [[w for w in text.split() if w.startswith("w")] for text in completions]
    return [sum(int(w[1:]) % 2 == 0 for w in ws) / max(len(ws), 1) for ws in texts]


def config(folder, kind="grpo", **options):
    return CONFIGS[kind](str(folder), **{**QUICK, **options})


def trainer(
    folder,
    kind="grpo",
    *,
    reward=words,
    model=None,
    peft=None,
    rows=ROWS,
    eval_rows=None,
    tokenizer=None,
    **options,
):
    return TRAINERS[kind](
        model or model_of(),
        reward,
        config(folder, kind, **options),
        rows,
        eval_rows,
        tokenizer or tokenizer_of(),
        peft_config=peft,
    )


def logged(done, key):
    return [entry[key] for entry in done.state.log_history if key in entry]


def rollout(made):
    """One batch of a trainer that has not started: {name: tensor}; made.seen is its Rollout."""
    finish = type(made)._with_advantages.__get__(made)
    made._with_advantages = lambda batch, seen: setattr(made, "seen", seen) or finish(batch, seen)
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    made.model.train()
    rows = [
        made.train_dataset[i // made.num_generations]
        for i in range(made.args.generation_batch_size)
    ]
    return made._generate_and_score_completions(rows)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- the loss


# knobs with which a step of these mixers is one token
SINGLE = {
    "k-samples": dict(soft_k=1),
    "hard": {},
    "gumbel": dict(soft_candidates=1),
    "mixture-of-inputs": dict(soft_beta=math.inf),
    "hybrid": dict(soft_share=1.0),
}


@pytest.mark.parametrize(
    "loss_type, mixer",
    [(loss, mixer) for loss in LOSS_TYPES for mixer in ("k-samples", "hard")]
    + [("dapo", mixer) for mixer in SINGLE if mixer not in ("k-samples", "hard")],
)
def test_one_draw_is_trls_grpo(tmp_path, loss_type, mixer):
    options = dict(
        loss_type=loss_type,
        temperature=0.7,
        epsilon=0.1,
        epsilon_high=0.3,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
    )
    span = dict(think_steps=None, think_end=None, soft_mixer=mixer, entropy_coef=0.01)
    span |= SINGLE[mixer]
    ours = trainer(tmp_path, **options, **span)
    plain = {k: v for k, v in (QUICK | options).items() if not k.startswith("think")}
    plain |= dict(use_cpu=True, bf16=False, entropy_coef=0.01, gradient_checkpointing=False)
    theirs = trl.GRPOTrainer(
        model_of(),
        words,
        trl.GRPOConfig(str(tmp_path), **plain),
        ROWS,
        processing_class=tokenizer_of(),
    )
    batch = rollout(ours)
    theirs.current_gradient_accumulation_steps = 2
    theirs.model.train()
    inputs = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    with torch.no_grad():
        old = theirs._get_per_token_logps_and_entropies(theirs.model, inputs, mask, length)[0]
    # some clip, some do not
    old = old + 0.4 * torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    batch["advantages"] = torch.randn(len(old), generator=torch.Generator().manual_seed(1))
    loss = {}
    for name, made, logps in (("ours", ours, old[..., None]), ("theirs", theirs, old)):
        loss[name] = made._compute_loss(made.model, batch | {"old_per_token_logps": logps})
        loss[name].backward()
    assert loss["ours"].item() == pytest.approx(loss["theirs"].item(), abs=1e-6)
    for (name, p), (_, q) in zip(
        ours.model.named_parameters(), theirs.model.named_parameters(), strict=True
    ):
        assert (p.grad - q.grad).abs().max() < 1e-5 * q.grad.abs().max() + 1e-6, name
    for key in ("clip_ratio/region_mean", "entropy"):
        assert ours._metrics["train"][key] == pytest.approx(theirs._metrics["train"][key], abs=1e-6)


@pytest.mark.parametrize("peft", [None, lora(0.3)], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_first_ratio_is_one_then_moves(tmp_path, peft, checkpointing):
    """Two passes over a rollout: the old log-probabilities are a replay's, and dropout is off in
    both."""
    model = model_of(attention_dropout=0.2)
    done = trainer(
        tmp_path,
        model=model,
        peft=peft,
        num_iterations=2,
        max_steps=4,
        gradient_checkpointing=checkpointing,
    )
    done.train()
    first, second, third, fourth = logged(done, "ratio/max_deviation")
    assert max(first, third) < 1e-6
    assert min(second, fourth) > 1e-3


def test_rollout_does_not_see_dropout(tmp_path):
    outs = []
    for dropout in (0.0, 0.5):
        made = trainer(tmp_path, model=model_of(attention_dropout=dropout), peft=lora(dropout))
        rollout(made)
        assert made.model.training
        outs.append(made.seen.out.sequences)
    assert torch.equal(*outs)


def test_gradient_of_a_checkpointed_replay_is_the_same(tmp_path):
    grads = []
    for checkpointing in (False, True):
        made = trainer(
            tmp_path, model=model_of(attention_dropout=0.2), gradient_checkpointing=checkpointing
        )
        made._compute_loss(made.model, rollout(made)).backward()
        grads.append([p.grad for p in made.model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_forced_and_padding_are_out_of_the_loss(tmp_path):
    made = trainer(tmp_path, soft_k=2)
    batch, record = rollout(made), made.seen.out.record
    mine = (record.kind == Kind.SOFT) | (record.kind == Kind.HARD)
    assert (record.kind == Kind.FORCED).any() and (record.kind == Kind.HARD).any()
    assert torch.equal(batch["loss_mask"].bool(), mine)
    assert batch["num_items_in_batch"] == mine.sum()
    loss = made._compute_loss(made.model, batch)
    grad = torch.autograd.grad(loss, made.model.lm_head.weight)[0]
    old = torch.zeros(*mine.shape, 2).masked_fill(~mine[..., None], 5.0)
    with torch.no_grad():
        old = old + made._replay_rows(made.model, batch, 4)[0]
    again = made._compute_loss(made.model, batch | {"old_per_token_logps": old})
    assert torch.allclose(torch.autograd.grad(again, made.model.lm_head.weight)[0], grad, atol=1e-7)


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_a_soft_step_scores_its_draws(tmp_path, peft):
    """The replay finds what the step-by-step decode recorded, whatever the model's own generation
    settings are."""
    model = model_of()
    model.generation_config.repetition_penalty = 3.0
    made = trainer(tmp_path, model=model, peft=peft, temperature=0.8, per_device_train_batch_size=8)
    batch, record = rollout(made), made.seen.out.record
    logps = made._replay_rows(made.model, batch, 3)[0]
    chosen = (record.kind == Kind.SOFT) | (record.kind == Kind.HARD)
    # A closing token's recorded log-probability is that of all draws: it closed by its first alone
    plain = chosen & ~((record.kind == Kind.HARD) & (record.token == END))
    open_end = (record.token == EOS) & (
        torch.arange(record.token.shape[1]) < made.seen.out.answer_start[:, None]
    )
    plain &= ~open_end
    assert torch.allclose(logps.sum(-1)[plain], record.logp[plain], atol=1e-4)
    assert plain.sum() > 16
    assert model.generation_config.repetition_penalty == 3


def test_padding_to_a_multiple_changes_nothing(tmp_path):
    losses = []
    for multiple in (None, 8):
        made = trainer(
            tmp_path,
            per_device_train_batch_size=8,
            pad_to_multiple_of=multiple,
            max_completion_length=6,
        )
        batch = rollout(made)
        assert multiple is None or batch["soft_ids"].shape[1] == batch["prompt_ids"].shape[1] == 8
        batch["advantages"] = torch.arange(8.0)
        losses.append(made._compute_loss(made.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("embedding_grad", [True, False])
def test_embedding_grad(tmp_path, embedding_grad):
    """Tokens that occur in mixtures only: does their embedding learn?"""
    made = trainer(tmp_path, embedding_grad=embedding_grad, think_end=None, think_steps=None)
    batch = rollout(made)
    made._compute_loss(made.model, batch).backward()
    outside = torch.ones(64, dtype=torch.bool)
    outside[batch["prompt_ids"]] = False
    grad = made.model.get_input_embeddings().weight.grad
    assert bool(grad[outside].any()) == embedding_grad
    assert grad[~outside].any()


# -- training


def test_accumulated_is_one_batch(tmp_path):
    after = []
    for size, steps in ((8, 1), (4, 2)):
        done = trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            loss_type="grpo",
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        done.train()
        after.append(weights(done.model))
    assert all(torch.allclose(after[0][name], after[1][name], atol=1e-6) for name in after[0])
    assert not torch.equal(after[0]["lm_head.weight"], model_of().lm_head.weight)


@pytest.mark.parametrize(
    "kind, peft, stop, options",
    [
        ("grpo", False, 2, {}),
        (
            "grpo",
            True,
            3,
            {"num_iterations": 2, "beta": 0.1, "soft_ratio": "joint"},
        ),  # stops between two passes over a rollout
        ("ppo", True, 2, {"num_ppo_epochs": 2, "num_mini_batches": 2}),
        ("ppo", False, 2, {"num_ppo_epochs": 1, "kl_coef": 0.0, "value_learning_rate": 0.1}),
    ],
)
def test_resume_is_exact(tmp_path, kind, peft, stop, options):
    options |= dict(max_steps=4, save_strategy="steps", save_steps=stop)
    straight = trainer(tmp_path / "a", kind, peft=lora(0.1) if peft else None, **options)
    straight.train()
    shutil.copytree(tmp_path / "a" / f"checkpoint-{stop}", tmp_path / "b" / f"checkpoint-{stop}")
    resumed = trainer(
        tmp_path / "b", kind, peft=lora(0.1) if peft else None, model=model_of(seed=0), **options
    )
    checkpoint = tmp_path / "b" / f"checkpoint-{stop}"
    assert changes(checkpoint, resumed.args) is None
    (other := copy.copy(resumed.args)).reward_weights = [0.5]
    assert "reward_weights=[0.5], not None (from here on)" in changes(checkpoint, other)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    before, after = weights(straight.model), weights(resumed.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert logged(straight, "loss")[stop:] == logged(resumed, "loss")[stop:]


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_value_head_learns_and_is_saved(tmp_path, peft):
    def one(completions, **columns):
        return [1.0] * len(completions)

    done = trainer(
        tmp_path,
        "ppo",
        reward=one,
        peft=peft,
        max_steps=40,
        vf_coef=1.0,
        kl_coef=0.0,
        cliprange_value=9.0,
        value_learning_rate=0.03,
    )
    done.train()
    lost = logged(done, "value_loss")
    assert sum(lost[-4:]) < 0.3 * sum(lost[:4])
    assert sum(logged(done, "value")[-4:]) / 4 == pytest.approx(1, abs=0.3)
    done.save_model(str(tmp_path / "m"))
    head = load_file(tmp_path / "m" / "v_head.safetensors")
    assert torch.equal(head["weight"], done.model.v_head.weight) and head["weight"].abs().max() > 0
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    assert not [key for key in load_file(tmp_path / "m" / name) if "v_head" in key]


def test_value_head_has_its_own_learning_rate(tmp_path):
    done = trainer(
        tmp_path, "ppo", learning_rate=0.0, value_learning_rate=0.1, optim="sgd", max_steps=1
    )
    done.train()
    assert torch.equal(done.model.lm_head.weight, model_of().lm_head.weight)
    assert done.model.v_head.weight.abs().max() > 0


def test_ppo_advantages_by_hand(tmp_path):
    """With a value head of zero, gamma 1 and lambda 1, each step's advantage is the row's reward,
    whitened."""
    made = trainer(tmp_path, "ppo", lam=1.0, whiten_advantages=False)
    batch = rollout(made)
    alive = batch["soft_alive"]
    assert torch.allclose(
        batch["advantages"][alive], made.seen.rewards[:, None].expand_as(alive)[alive]
    )
    white = trainer(tmp_path, "ppo", lam=1.0)
    batch = rollout(white)
    steps = batch["advantages"][batch["loss_mask"].bool()]
    assert steps.mean().item() == pytest.approx(0, abs=1e-5)
    assert steps.square().mean().item() == pytest.approx(1, abs=1e-3)


def test_value_reads_the_replayed_inputs(tmp_path):
    """The value of a step comes from the position that predicts it: from what came before, mixtures
    included."""
    made = trainer(tmp_path, "ppo", think_end=None, think_steps=None, soft_k=2)
    nn.init.normal_(made.model.v_head.weight)
    batch = rollout(made)
    values = made._replay_rows(made.model, batch, 4)[1]
    other = {k: v.clone() for k, v in batch.items()}
    # the second draw only: no token changes
    other["soft_ids"][:, 3, 1] = (other["soft_ids"][:, 3, 1] + 1) % 64
    moved = (made._replay_rows(made.model, other, 4)[1] - values).abs() > 1e-6
    alive = batch["soft_alive"]
    assert not moved[:, :4].any() and moved[:, 4:][alive[:, 4:]].all()


def test_leave_one_out(tmp_path):
    made = trainer(tmp_path, "rloo", per_device_train_batch_size=8)
    batch = rollout(made)
    for rewards, advantages in zip(
        made.seen.rewards.view(2, 4), batch["advantages"].view(2, 4), strict=True
    ):
        by_hand = [r - (rewards.sum() - r) / 3 for r in rewards]
        assert torch.allclose(advantages, torch.stack(by_hand), atol=1e-6)
    assert list(made._logs["advantages"])[-8:] == batch["advantages"].tolist()


@pytest.mark.parametrize("adapter", ["none", "new", "given"])
def test_reference_is_where_training_started(tmp_path, adapter):
    model = with_lora(model_of(), lora_dropout=0.2) if adapter == "given" else model_of()
    done = trainer(
        tmp_path, model=model, peft=lora() if adapter == "new" else None, beta=0.5, max_steps=3
    )
    batch = rollout(done)
    started = done._reference(done.model, batch)
    done.train()
    kl = logged(done, "kl")
    assert abs(kl[0]) < 1e-6 and kl[2] > 1e-5
    assert torch.allclose(done._reference(done.model, batch), started, atol=1e-6)
    done.model.train()
    with torch.no_grad():
        logits, mask = done._replay(done.model, batch)[0], batch["loss_mask"]
    p, q = logits.log_softmax(-1), started.log_softmax(-1)
    by_hand = (p.exp() * (p - q)).sum(-1) * (batch["soft_weights"] > 0).sum(-1)
    done._metrics["train"].clear()
    loss = {}
    for done.args.beta in (0.5, 0.0):
        loss[done.args.beta] = done._compute_loss(done.model, batch).item()
    mean = ((by_hand * mask).sum() / mask.sum()).item()
    assert done._metrics["train"]["kl"] == pytest.approx([mean], rel=1e-4)
    # "dapo", in one process: the mean over steps
    assert loss[0.5] - loss[0.0] == pytest.approx(0.5 * mean, rel=1e-3)


def test_evaluation_and_metrics(tmp_path):
    done = trainer(
        tmp_path,
        eval_rows=ROWS.select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.0,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        log_completions=True,
    )
    done.train()
    entry = done.state.log_history[0]
    for name in (
        "thought_entropy",
        "answer_entropy",
        "draws_agree",
        "stream_is_argmax",
        "thought_length",
        "unclosed",
    ):
        assert f"soft/{name}" in entry and f"eval_soft/{name}" in {
            k for e in done.state.log_history for k in e
        }
    assert (
        entry["reward/min"] <= entry["reward/p25"] <= entry["reward/median"] <= entry["reward/max"]
    )
    assert 0 <= entry["soft/draws_agree"] <= 1
    assert 0 < entry["soft/thought_length"] <= 4  # with the end that is put in
    # the same draws
    assert len(set(logged(done, "eval_reward"))) == 1 and len(logged(done, "eval_reward")) == 2
    assert len(done._logs["extra"]["reward_saw"]) == len(done._logs["completion"])


def test_conversations(tmp_path):
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [float(len(messages[0]["content"])) for messages in completions]

    tokenizer = tokenizer_of()
    tokenizer.chat_template = "<bos>{% for m in messages %} {{ m['content'] }}{% endfor %} <think>"
    rows = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(6, 20)]
    )
    made = SoftGRPOTrainer(model_of(), reward, config(tmp_path), rows, processing_class=tokenizer)
    batch = rollout(made)
    assert tokenizer.batch_decode(batch["prompt_ids"])[0].split() == ["<bos>", "w6", "<think>"]
    texts = tokenizer.batch_decode(made.seen.out.answers, skip_special_tokens=True)
    assert seen == [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("mixer", ["k-samples", "hard"])
def test_statistics_by_hand(tmp_path, mixer):
    made = trainer(tmp_path, soft_mixer=mixer, per_device_train_batch_size=8, think_steps=None)
    rollout(made)
    record, starts = made.seen.out.record, made.seen.out.answer_start.tolist()
    seen = {
        name: values[0]
        for name, values in made._metrics["train"].items()
        if name.startswith("soft/")
    }
    thoughts = [
        h for row, start in zip(record.entropy, starts, strict=True) for h in row[:start].tolist()
    ]
    assert seen["soft/thought_length"] == len(thoughts) / 8
    assert seen["soft/thought_entropy"] == pytest.approx(sum(thoughts) / len(thoughts), rel=1e-5)
    mixed = record.ids[record.kind == Kind.SOFT]
    assert ("soft/draws_agree" in seen) == (mixer == "k-samples")
    if mixer == "k-samples":
        agree = (mixed == mixed[:, :1]).all(1).float().mean().item()
        assert seen["soft/draws_agree"] == pytest.approx(agree, rel=1e-5)


def test_a_thought_is_counted_from_its_opening():
    """What comes before it, and what opens it, are none of its steps; what closes it is, chosen or put
    in."""
    ids, mask = left_padded([[BOS, 11, 12], [BOS, THINK], [BOS, 13], [BOS, END]])
    script = [
        [20, 21, THINK, None, None, None, 24, EOS],
        [None, END, 20, EOS],
        [20, 21, EOS],
        [20, EOS],
    ]
    policy = SoftConfig(
        mixer="k-samples",
        top_k=None,
        max_new_tokens=8,
        think_start=THINK,
        think_end=END,
        budget=2,
        answer_temperature=1.0,
    )
    force = [Forced(ids.shape[1], script)]
    out = softar.generate(
        model_of(), ids, mask, config=policy, rng=torch.Generator(), logits_processor=force
    )
    kinds = [[Kind.HARD] * 3 + [Kind.SOFT] * 2 + [Kind.FORCED], [Kind.SOFT, Kind.HARD]]
    assert [out.record.kind[b, : len(row)].tolist() for b, row in enumerate(kinds)] == kinds
    steps = thought_steps(out, policy).tolist()
    assert steps == [[3 <= t < 6 for t in range(8)], [t < 2 for t in range(8)], *[[False] * 8] * 2]
    sums, h = statistics(out, policy), out.record.entropy
    assert [int(x) for x in sums["thought_length"]] == [5, 4]
    chosen = torch.cat([h[0, 3:5], h[1, :2]])
    assert sums["thought_entropy"][1] == 4
    assert sums["thought_entropy"][0].item() == pytest.approx(chosen.sum().item(), rel=1e-5)
    answers = torch.cat([h[0, 6:], h[1, 2:4], h[2, :3], h[3, :2]])
    assert sums["answer_entropy"][0].item() == pytest.approx(answers.sum().item(), rel=1e-5)
    assert sums["answer_entropy"][1] == len(answers)


# -- what the reward sees


def test_a_thought_that_never_ends_has_no_answer(tmp_path):
    seen = []

    def reward(completions, completion_ids, **columns):
        seen.append((completions, completion_ids))
        return words(completions)

    made = trainer(tmp_path, reward=reward, think_steps=None)
    batch, out = rollout(made), made.seen.out
    (texts, ids), kinds = seen[0], out.record.kind
    unclosed = out.answer_start >= (kinds != Kind.PAD).sum(1)
    assert unclosed.any() and made._metrics["train"]["soft/unclosed"] == [
        unclosed.float().mean().item()
    ]
    assert [text == "" for text in texts] == [not answer for answer in ids]
    assert all(texts[row] == "" for row in unclosed.nonzero()[:, 0].tolist())
    assert batch["loss_mask"][unclosed].any()


@pytest.mark.parametrize("sees", ["answer", "stream", "argmax"])
def test_reward_sees(tmp_path, sees):
    seen = []

    def reward(completions, completion_ids, **columns):
        seen.extend(completion_ids)
        # special tokens are in the ids alone, as with TRL
        plain = [tokenizer_of().decode(ids, skip_special_tokens=True) for ids in completion_ids]
        assert completions == plain
        return words(completions)

    made = trainer(tmp_path, reward=reward, reward_sees=sees)
    rollout(made)
    record = made.seen.out.record
    for row, ids in enumerate(seen):
        stream = record.token[row][record.kind[row] != Kind.PAD].tolist()
        assert (
            ids == stream[made.seen.out.answer_start[row] :]
            if sees == "answer"
            else len(ids) == len(stream)
        )
        if sees == "stream":
            assert ids == stream


# -- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 5}, "top_k=5"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"generation_kwargs": {"top_p": 0.5}}, "generation_kwargs"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"use_vllm": True}, "use_vllm=True"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        (
            {"use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching=True",
        ),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True"),
        ({"loss_type": "cispo"}, "loss_type='cispo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model=True"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"beta": math.nan}, "beta=nan"),
        ({"beta": math.inf}, "beta=inf must be a finite"),
        ({"entropy_coef": math.nan}, "entropy_coef=nan"),
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"epsilon": "0.1"}, "epsilon='0.1' must be a number"),
        ({"epsilon_high": -1.0}, "epsilon_high=-1.0"),
        ({"reward_weights": [1.0, math.nan]}, "reward_weights=nan"),
        ({"num_iterations": 0}, "num_iterations=0 must be at least 1"),
        ({"num_iterations": 1.5}, "num_iterations=1.5 must be a whole number"),
        ({"steps_per_generation": 0}, "steps_per_generation=0"),
        ({"generation_batch_size": 0}, "generation_batch_size=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
        ({"num_generations_eval": 0}, "num_generations_eval=0"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"scale_rewards": "foo"}, "scale_rewards='foo' is unknown"),
        ({"multi_objective_aggregation": "x"}, "multi_objective_aggregation='x' is unknown"),
        ({"num_generations": 1}, "num_generations=1"),
        ({"soft_k": 0}, "k=0"),
        ({"soft_mixer": "dirichlet"}, "soft_mixer='dirichlet'"),
        ({"soft_mixer": "sogt"}, "soft_mixer='sogt' is unknown"),
        ({"soft_ratio": "all"}, "soft_ratio='all'"),
        ({"reward_sees": "fresh"}, "reward_sees='fresh'"),
        ({"think_steps": 8}, "think_steps=8"),
        ({"think_start": "<think>", "think_end": None}, "think_start='<think>'"),
        ({"max_completion_length": None}, "max_completion_length=None"),
        ({"cache_implementation": "nonsense"}, "cache_implementation='nonsense'"),
        ({"compile_rollout": True}, "compile_rollout=True needs a cache of one size"),
        (
            {"rollout": "vllm", "cache_implementation": "static"},
            "cache_implementation='static' does nothing where vLLM decodes",
        ),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_ppo_epochs": 2, "num_iterations": 3}, "num_ppo_epochs=2 and num_iterations=3"),
        (
            {"num_mini_batches": 2, "steps_per_generation": 1},
            "num_mini_batches=2 and steps_per_generation=1",
        ),
        ({"cliprange": 0.1, "epsilon": 0.2}, "cliprange=0.1 and epsilon=0.2"),
        ({"kl_coef": 0.1, "beta": 0.2}, "kl_coef=0.1 and beta=0.2"),
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"vf_coef": -1.0}, "vf_coef=-1.0"),
        ({"vf_coef": math.inf}, "vf_coef=inf"),
        ({"value_learning_rate": math.nan}, "value_learning_rate=nan"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs=0"),
        ({"num_mini_batches": 0}, "num_mini_batches=0"),
        ({"cliprange": -0.1}, "cliprange=-0.1"),
        ({"kl_coef": math.nan}, "kl_coef=nan"),
        ({"value_learning_rate": -1.0}, "value_learning_rate=-1.0"),
        ({"cliprange_value": 0.0}, "cliprange_value=0.0"),
        (
            {"cliprange_value": 0.3, "vf_coef": 0.0},
            "cliprange_value=0.3 does nothing with vf_coef=0",
        ),
    ],
)
def test_bad_ppo_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, "ppo", **options)


@pytest.mark.parametrize(
    "rows, says",
    [
        ({"question": ["<bos> w5"]}, "has the columns .*needs 'prompt'"),
        ({"prompt": []}, "is empty: give at least one row"),
        ({"prompt": [5]}, "holds int64 in column 'prompt'"),
        ({"prompt": ["<bos> w5", None]}, "holds None in column 'prompt'"),
        ({"prompt": ["<bos> w5", ""]}, "has an empty prompt"),
        ({"prompt": [[{"role": "user", "content": "w5"}]]}, "holds chats, .* no chat template"),
        ({"prompt": ["<bos>" + " w5" * 63]}, "has 64 tokens, and with max_completion"),
    ],
)
def test_held_out_rows_by_name_are_looked_at(tmp_path, rows, says):
    """As those of a single data set are: training went on until the first evaluation."""
    rows = Dataset.from_dict(rows)
    sizes = dict(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    for given, said in ((rows, "eval_dataset"), ({"own": rows}, r"eval_dataset\['own'\]")):
        with pytest.raises(ValueError, match=f"{said} {says}"):
            trainer(tmp_path, model=model, eval_rows=given)
    made = trainer(tmp_path, model=model)
    for given, said in ((rows, says), ({"own": rows}, says), ([*rows], "is a list: give")):
        with pytest.raises(ValueError, match=f"eval_dataset {said}"):
            made.evaluate(given)


def test_the_value_learns_nothing_of_rows_left_out(tmp_path):
    """As the policy does not, where mask_truncated_completions leaves them out; without a row both
    losses are 0."""
    cutting = dict(mask_truncated_completions=True, max_completion_length=4)
    made = trainer(tmp_path, "ppo", per_device_train_batch_size=8, **cutting)
    batch, cut = rollout(made), torch.arange(8) < 4
    assert not batch["completion_mask"].any()  # no end in so few steps
    for name, counts in (("completion_mask", "soft_alive"), ("loss_mask", "soft_action")):
        batch[name] = batch[counts].to(batch[name].dtype) * ~cut[:, None]
    made.model.v_head.weight.data.fill_(0.1)

    def grads(batch):
        made.model.zero_grad()
        loss = made._compute_loss(made.model, batch)
        loss.backward()
        return [loss.detach()] + [p.grad for p in made.model.parameters() if p.grad is not None]

    far = batch["returns"] + 5.0 * cut[:, None]
    for found, expected in zip(grads(batch | {"returns": far}), grads(batch), strict=True):
        assert torch.equal(found, expected)
    none = {name: torch.zeros_like(batch[name]) for name in ("completion_mask", "loss_mask")}
    assert not any(map(torch.any, grads(batch | none)))


def test_the_best_checkpoint_is_taken_up_with_its_value_head(tmp_path):
    keeping = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    keeping |= dict(load_best_model_at_end=True, metric_for_best_model="loss", max_steps=2)
    made = trainer(tmp_path, "ppo", eval_rows=ROWS, **keeping)
    made.evaluate = lambda **options: {"eval_loss": float(made.state.global_step)}
    made.train()
    learnt = made.model.v_head.state_dict()
    for step, here in ((1, True), (2, False)):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "v_head.safetensors")
        assert all(torch.equal(saved[name], learnt[name]) for name in learnt) == here


@pytest.mark.parametrize("kind", CONFIGS)
def test_options_that_do_nothing_are_refused(tmp_path, kind):
    """What they go with makes them act."""
    for options, says in (
        (dict(vllm_max_model_length=64), "vllm_max_model_length=64 .*rollout='vllm'"),
        (dict(soft_mixer="hard", soft_k=2), "soft_k=2 does nothing"),
        (
            dict(reward_sees="stream", think_end=None, think_steps=None),
            "reward_sees='stream' does nothing where nothing ends",
        ),
        (dict(soft_k=1, soft_ratio="joint"), "soft_ratio='joint' does nothing with one draw"),
        (dict(soft_mixer="hard", embedding_grad=False), "embedding_grad=False does nothing"),
        (dict(num_completions_to_print=2), "num_completions_to_print=2 .*log_completions"),
    ):
        with pytest.raises(ValueError, match=says):
            config(tmp_path, kind, **options)
    config(tmp_path, kind, soft_k=2, soft_ratio="joint", embedding_grad=False)
    config(tmp_path, kind, log_completions=True, num_completions_to_print=2)
    if kind == "grpo":
        config(tmp_path, kind, scale_rewards="none")
    else:
        with pytest.raises(ValueError, match="scale_rewards='none' does nothing with"):
            config(tmp_path, kind, scale_rewards="none")


def test_entropy_and_kl_count_the_same_draws(tmp_path):
    """The gradient of loss(entropy_coef) and of loss(beta), per nat: with a uniform reference KL is
    K log V less the joint entropy."""
    made = trainer(tmp_path, think_end=None, think_steps=None, loss_type="bnpo", soft_k=3)
    batch = rollout(made)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    logits, _ = made._replay(made.model, batch)
    made.args.entropy_coef = 1.0
    entropy = -made._policy_loss(logits, None, batch)
    made.args.entropy_coef, made.args.beta = 0.0, 1.0
    kl = made._policy_loss(logits, torch.zeros_like(logits), batch)
    draws = (batch["soft_weights"] > 0).sum(-1)
    most = (draws * math.log(logits.shape[-1]))[batch["loss_mask"].bool()].mean()
    assert (draws == 3).any() and (entropy + kl).item() == pytest.approx(most.item(), rel=1e-5)


def test_delta_bounds_the_ratio(tmp_path):
    made = trainer(tmp_path, delta=1.5, loss_type="bnpo", soft_ratio="joint")
    batch = rollout(made)
    logits, _ = made._replay(made.model, batch)
    new = made._action.logp(logits, mixture(batch)).detach()
    batch["advantages"] = -torch.ones_like(batch["advantages"])
    far = batch | {"old_per_token_logps": new - 10.0}
    assert made._policy_loss(logits, None, far).item() == pytest.approx(1.5)


def test_rloos_default_is_the_exact_gradient(tmp_path):
    assert config(tmp_path, "rloo").loss_type == "dr_grpo"
    with pytest.raises(ValueError, match="SoftRLOOTrainer needs a SoftRLOOConfig"):
        SoftRLOOTrainer(model_of(), words, config(tmp_path), ROWS, None, tokenizer_of())


def test_ppo_names(tmp_path):
    made = config(tmp_path, "ppo", num_ppo_epochs=3, num_mini_batches=2, cliprange=0.1, kl_coef=0.2)
    assert (made.num_iterations, made.steps_per_generation, made.epsilon, made.beta) == (
        3,
        2,
        0.1,
        0.2,
    )
    made = config(tmp_path, "ppo", num_iterations=3, steps_per_generation=2, epsilon=0.1, beta=0.2)
    assert (made.num_ppo_epochs, made.num_mini_batches, made.cliprange, made.kl_coef) == (
        3,
        2,
        0.1,
        0.2,
    )
    made = config(tmp_path, "ppo", num_iterations=1)
    assert (made.num_ppo_epochs, made.cliprange, made.kl_coef) == (1, 0.2, 0.05)


def broken(completions, **columns):
    raise KeyError("gold")


async def broken_async(completions, **columns):
    raise KeyError("gold")


REWARDS = [
    (broken, "reward function 'broken' raised KeyError"),
    (broken_async, "reward function 'broken_async' raised KeyError"),
    (lambda completions, **c: [None] * len(completions), "returned None for all 4"),
    (lambda completions, **c: [float("nan")] * len(completions), "returned nan"),
    (lambda completions, **c: [float("inf")] * len(completions), "returned inf"),
    (lambda completions, **c: [1.0], "returned 1 rewards for 4"),
    (lambda completions, **c: 1.0, "returned 1.0: it has to be a list"),
    (lambda completions, **c: None, "returned None: it has to be a list"),
]


@pytest.mark.parametrize("reward, message", REWARDS, ids=[message for _, message in REWARDS])
def test_bad_rewards(tmp_path, reward, message):
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path, reward=reward).train()
    if "raised" in message:
        assert isinstance(caught.value.__cause__, KeyError)


def test_some_unscored(tmp_path):
    def some(completions, **columns):
        return [None, *words(completions)[1:]]

    made = trainer(tmp_path, reward=some)
    assert rollout(made)["advantages"][0] == 0
    for kind in ("ppo", "rloo"):
        with pytest.raises(ValueError, match=r"returned None for rows \[0\]"):
            trainer(tmp_path, kind, reward=some).train()


class Judge(nn.Module):
    """A reward model of another vocabulary: scores the number of its tokens; NaN where `scale`
    is."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.config = types.SimpleNamespace(_name_or_path="judge", pad_token_id=0)

    def forward(self, input_ids, attention_mask, **ignored):
        return types.SimpleNamespace(
            logits=self.scale * attention_mask.sum(1, keepdim=True).float()
        )


@pytest.mark.parametrize("scale", [1.0, float("nan")])
def test_reward_model(tmp_path, scale):
    made = SoftGRPOTrainer(
        model_of(),
        [Judge(scale)],
        config(tmp_path),
        ROWS,
        processing_class=tokenizer_of(),
        reward_processing_classes=[tokenizer_of(80)],
    )
    if scale == 1:
        rollout(made)
        texts = tokenizer_of().batch_decode(made.seen.out.answers, skip_special_tokens=True)
        assert made.seen.rewards.tolist() == [len(("<bos> w6" + text).split()) for text in texts]
    else:
        with pytest.raises(ValueError, match="reward model 'judge' returned NaN"):
            rollout(made)


def test_another_k_is_refused(tmp_path):
    options = dict(save_strategy="steps", save_steps=1, max_steps=2)
    trainer(tmp_path, soft_k=2, **options).train()
    folder = tmp_path / "checkpoint-1"
    assert json.loads((folder / "soft_config.json").read_text())["mixer_args"] == {"k": 2}
    with pytest.raises(ValueError, match=r"mixer_args={'k': 3}, not {'k': 2}"):
        trainer(tmp_path, soft_k=3, **options).train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match=r"temperature=0.5, not 1.0"):
        trainer(tmp_path, soft_k=2, temperature=0.5, **options).train(
            resume_from_checkpoint=str(folder)
        )
    for model in (str(folder), type(model_of()).from_pretrained(folder)):
        with pytest.raises(ValueError, match=r"soft_k=3, but soft_config.json .* says k=2"):
            trainer(tmp_path / "c", model=model, soft_k=3)
    done = trainer(tmp_path / "d", model=str(folder), soft_k=2, beta=0.1, max_steps=1)
    done.train()
    assert abs(logged(done, "kl")[0]) < 1e-6


def test_virtual_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="peft_type=PROMPT_TUNING"):
        trainer(tmp_path, peft=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("given", ["args", "processing_class", "reward_funcs", "tools", "ppo"])
def test_bad_constructor(tmp_path, given):
    good = dict(
        model=model_of(),
        reward_funcs=words,
        args=config(tmp_path),
        train_dataset=ROWS,
        processing_class=tokenizer_of(),
    )
    if given == "ppo":
        with pytest.raises(ValueError, match="needs a SoftPPOConfig"):
            SoftPPOTrainer(**good)
        return
    bad = {"args": None, "processing_class": None, "reward_funcs": [], "tools": [words]}[given]
    with pytest.raises(ValueError, match=given):
        SoftGRPOTrainer(**good | {given: bad})


def test_rows_and_models_that_cannot_be_trained_are_named(tmp_path):
    for rows, says in (
        (
            Dataset.from_dict({"question": ["a"]}),
            r"columns \['question'\]: SoftGRPOTrainer needs 'prompt'",
        ),
        (Dataset.from_dict({"prompt": []}), "train_dataset is empty"),
        (Dataset.from_dict({"prompt": ["a", None]}), "row 1 of train_dataset holds None in column"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer(tmp_path, rows=rows)
    for full, empty in (("a", ""), ([{"role": "user", "content": "a"}], [])):
        rows = Dataset.from_dict({"prompt": [full, empty]})
        for name, part in (("train", dict(rows=rows)), ("eval", dict(eval_rows=rows))):
            says = f"row 1 of {name}_dataset has an empty prompt: begin it with a BOS token"
            with pytest.raises(ValueError, match=says):
                trainer(tmp_path, **part)
    settings = dict(vocab_size=64, n_positions=12, n_embd=32, n_layer=1, n_head=2)
    table = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=1, eos_token_id=2))
    long = Dataset.from_dict({"prompt": ["<bos> w5", "<bos>" + " w6" * 4]})
    says = "prompt 1 of {} has 5 tokens, and with max_completion_length=8"
    with pytest.raises(ValueError, match=says.format("train_dataset")):
        trainer(tmp_path, rows=long, model=table)
    short = long.select([0])
    with pytest.raises(ValueError, match=says.format(r"eval_dataset\['long'\]")):
        trainer(tmp_path, rows=short, eval_rows={"short": short, "long": long}, model=table)
    trainer(tmp_path, rows=short, model=table)
    tokenizer = tokenizer_of()
    tokenizer.chat_template = (
        "<bos>{% for m in messages %} {{ m['content'] }}{% endfor %}{{ more }}"
    )
    chat = Dataset.from_list([{"prompt": [{"role": "user", "content": "w5"}]}])
    parts = dict(rows=chat, model=table, tokenizer=tokenizer)
    trainer(tmp_path, **parts)
    with pytest.raises(ValueError, match="prompt 0 of train_dataset has 6 tokens"):
        trainer(tmp_path, **parts, chat_template_kwargs={"more": " w6" * 4})
    # what rows say of their template is not heard; it may be what the configuration says
    own, tools = [{"more": None}, {"more": " w6"}], [None, [{"name": "f"}]]
    for column, cells in (("chat_template_kwargs", own), ("tools", tools)):
        rows = Dataset.from_list([row | {column: cell} for row in chat for cell in cells])
        with pytest.raises(ValueError, match=f"row 1 of train_dataset has {column}=.*more|name.*"):
            trainer(tmp_path, **parts | {"rows": rows})
        trainer(tmp_path, **parts | {"rows": rows.select([0])})
        if column != "tools":
            trainer(tmp_path, **parts | {"rows": rows}, chat_template_kwargs={"more": " w6"})
    diffusion = model_of()
    diffusion.config.mask_token_id = 7
    for kind in TRAINERS:
        with pytest.raises(
            ValueError, match=r"is a masked-diffusion model .*use DiffusionGRPOTrainer"
        ):
            trainer(tmp_path, kind, model=diffusion)


# -- TRL

SIGNATURES = {
    "__init__": "model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes "
    "callbacks optimizers quantization_config peft_config tools rollout_func environment_factory",
    "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
    "_generate_and_score_completions": "inputs",
    "_get_per_token_logps_and_entropies": "model input_ids attention_mask logits_to_keep batch_size compute_entropy "
    "compute_aux_loss pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes "
    "token_type_ids mm_token_type_ids image_position_ids",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_compute_loss": "model inputs",
    "evaluation_loop": "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_best_model": "",
    "_log_completion_extra": "column values",
    "create_optimizer": "model",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "training_step": "model inputs num_items_in_batch",
    "_get_grad_norm": "model grad_norm",
    "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "_finalize_training": "trial num_train_samples start_time",
}


def test_what_is_overridden_is_trls():
    """TRL's internals drift from one minor version to the next: a new one needs a look at each of
    these."""
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17")
    for name, parameters in SIGNATURES.items():
        found = list(inspect.signature(inspect.getattr_static(trl.GRPOTrainer, name)).parameters)
        assert found == ["self", *parameters.split()], name
    for ours in (*TRAINERS.values(), WatchedLosses):
        for name, member in vars(ours).items():
            if inspect.isfunction(member) and name in dir(trl.GRPOTrainer):
                assert name in SIGNATURES, (
                    f"{ours.__name__}.{name} overrides a method that is not in SIGNATURES"
                )
