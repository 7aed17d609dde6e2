"""RL on masked-diffusion policies: the ratio at the first update, the loss beside one that holds all
of its graph, pieces, accumulation, resuming, and what is refused."""

import copy
import dataclasses
import math
import re
import shlex

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_block_causal import block_model
from test_denoise import MASK, VOCAB, denoiser
from test_diffusion_rows import KINDS as ROW_KINDS
from test_diffusion_rows import write as write_bert
from test_renoised import gemma
from tiny import QUIET, tokenizer_of, with_lora
from tiny import model_of as causal
from transformers import BertConfig, BertForMaskedLM

from softar.diffusion import denoise
from softar.diffusion.config import SHORTHANDS
from softar.diffusion.decoders import denoise_config
from softar.diffusion.head import SoftMaskHead, save_head
from softar.diffusion.models import load
from softar.diffusion.net import facts
from softar.diffusion.record import Trajectory
from softar.diffusion.replay import log_probs, replay
from softar.evaluate import encode
from softar.model_card import command_of
from softar.rl import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionRLOOConfig,
    DiffusionRLOOTrainer,
)
from softar.rl.losses import aggregate, surrogate
from softar.rl.neutral import NEUTRAL
from softar.rl.pieces import summed
from softar.specs import parse_options

PROMPTS = [f"w{i} w{i + 1}" if i % 3 else f"w{i}" for i in range(6, 30)]
TEMPLATES = [f"w{i} w{MASK} w{MASK} w{i + 1} w{MASK}" for i in range(6, 30)]
QUICK = dict(
    per_device_train_batch_size=4,
    num_generations=4,
    gen_length=6,
    steps=3,
    max_steps=2,
    **QUIET,
    learning_rate=1e-2,
    replay_chunk=5,
)
SOFT = dict(soften="soft-mask", soften_args=dict(scale=0.8, centre=-4.0))
KINDS = {"grpo": (DiffusionGRPOConfig, DiffusionGRPOTrainer)}
KINDS["rloo"] = (DiffusionRLOOConfig, DiffusionRLOOTrainer)


def words(completions, **columns):
    """The share of even words."""
    texts = [[w for w in text.split() if w.startswith("w")] for text in completions]
    return [sum(int(w[1:]) % 2 == 0 for w in ws) / max(len(ws), 1) for ws in texts]


def net(kind="llada"):
    blocks = {"sdar": 0, "fast_dllm": 1}
    # both are shared by all tests: the copy is what changes
    return copy.deepcopy(block_model(blocks[kind]) if kind in blocks else denoiser(kind)).float()


def trainer(
    folder, kind="grpo", *, model=None, reward=words, prompts=PROMPTS, peft=None, **options
):
    make_config, make = KINDS[kind]
    config = make_config(str(folder), **{**QUICK, **options})
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    model = net() if model is None else model
    return make(model, reward, config, rows, None, tokenizer_of(VOCAB), peft_config=peft)


def logged(done, key):
    return [entry[key] for entry in done.state.log_history if key in entry]


def rollout(made):
    """One batch of a trainer that has not started: {name: tensor}."""
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    made.model.train()
    number = made.args.generation_batch_size
    rows = [made.train_dataset[i // made.num_generations] for i in range(number)]
    return made._generate_and_score_completions(rows)


def steps_of(batch):
    return Trajectory(*(batch[f"trajectory_{name}"] for name in Trajectory._fields))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llada", dict(soften="hard", factor=1.2, steps=None)),
        ("llada", SOFT),
        ("dream", dict(soften="soft-token", temperature=0.7)),
        ("sdar", SOFT | dict(replay="grouped", gen_length=8, steps=9)),
        ("fast_dllm", SOFT | dict(replay="exact", gen_length=8, steps=9)),
        ("llada", dict(soften="hard", alg_temp=0.3)),
        ("sdar", SOFT | dict(replay="grouped", gen_length=8, steps=9, alg_temp=0.3)),
    ],
)
def test_the_policy_is_scored_as_it_was_rolled_out(kind, options, tmp_path):
    """Before the weights change, on every pass; dropout is off in rollout and replay."""
    model = net(kind)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    made, seen = trainer(tmp_path, model=model, num_iterations=2, learning_rate=0.0, **options), []
    metrics = made._rollout_metrics
    made._rollout_metrics = lambda rollout: seen.append(rollout.out) or metrics(rollout)
    made.train()
    assert max(logged(made, "ratio/max_deviation")) < 1e-5
    assert all(map(math.isfinite, logged(made, "loss"))) and min(logged(made, "grad_norm")) > 0
    (out,) = seen
    model.train()
    logp = made._log_probs(model, out.trajectory, None)[:, : out.sequences.shape[1]]
    tokens_alone = made.args.temperature == 1 and not made.args.alg_temp
    if made.args.alg_temp:
        assert (out.trajectory.drawn_as > 0).any()
    if tokens_alone:
        then = out.confidence.nan_to_num(1.0)
        torch.testing.assert_close(logp.exp(), then, atol=0, rtol=1e-5)
    off = logged(made, "ratio/replay_deviation")
    assert len(off) == 2 * tokens_alone and max(off, default=0) < 1e-5
    assert logged(made, "diffusion/nfe") == [out.row_forwards.float().mean()]
    if kind in ("llada", "dream"):  # in blocks an end token that is drawn ends a row early
        # are there rows of unequal steps?
        assert (len({*out.row_forwards.tolist()}) > 1) == ("factor" in options)


def test_masked_language_models_of_transformers(tmp_path):
    """Which have no settings of a generation, where TRL writes."""
    sizes = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    bert = BertForMaskedLM(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=64))
    bert.config.mask_token_id = MASK
    options = dict(gen_length=0, num_iterations=2, learning_rate=0.0, save_strategy="steps")
    made = trainer(tmp_path, model=bert, prompts=TEMPLATES, save_steps=2, **options, **SOFT)
    made.train()
    assert max(logged(made, "ratio/max_deviation")) < 1e-5 < min(logged(made, "grad_norm"))
    assert (tmp_path / "checkpoint-2" / "denoise_config.json").is_file()


def dense(made, batch, old):
    """The loss with the graph of all steps at once."""
    logp = log_probs(
        made.model, steps_of(batch), made.decoding, hidden=batch.get("hidden"), **made._how
    )
    mask, clip = batch["loss_mask"], (made.epsilon_low, made.epsilon_high)
    old = logp.detach() if old is None else old
    if made.args.ratio == "trajectory":
        new, before = logp.sum(1)[:, None, None], old.sum(1)[:, None, None]
        per_slot = surrogate(new, before, batch["advantages"], *clip) / mask.sum(1, keepdim=True)
        per_slot = per_slot.expand_as(mask)
    else:
        per_slot = surrogate(logp[..., None], old[..., None], batch["advantages"], *clip)
    items = batch["num_items_in_batch"]
    how = dict(max_length=made.max_completion_length, num_items=items, accumulation=1)
    return aggregate(per_slot, mask, made.args.loss_type, **how)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("ratio", ["token", "trajectory"])
@pytest.mark.parametrize("replay", ["exact", "slots drawn", "one-step"])
def test_the_loss_is_that_of_all_steps_at_once(replay, ratio, loss_type, tmp_path):
    """In value and gradient, where the policy has moved so far that the clip holds some."""
    options = dict(ratio=ratio, loss_type=loss_type, epsilon=0.05)
    options |= dict(replay=replay, hide_prompt=0.3) if replay == "one-step" else SOFT
    options |= dict(alg_temp=0.3) if replay == "slots drawn" else {}
    made = trainer(tmp_path, **options)
    batch = rollout(made)
    made.model.eval()
    logp = made._log_probs(made.model, steps_of(batch), batch.get("hidden"))
    moved = logp + 0.1 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    made.model.train()
    grads, losses = [], []
    for old in (None, moved):
        batch = batch | ({} if old is None else {"old_per_token_logps": old})
        for loss in (made._compute_loss(made.model, batch), dense(made, batch, old)):
            made.model.zero_grad()
            loss.backward()
            losses.append(loss.item())
            grads.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
    assert grads[0].norm() > 1e-3 and not torch.allclose(grads[0], grads[2], rtol=1e-2)
    for i in (0, 2):
        assert losses[i] == pytest.approx(losses[i + 1], abs=1e-5)
        torch.testing.assert_close(grads[i], grads[i + 1], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("ratio", ["token", "trajectory"])
@pytest.mark.parametrize("advantages", [[0.5, 0, 0, -0.5], [0, 0, 0.1, 0], [0, 0, 0, 0]])
def test_rows_without_an_advantage_are_not_replayed(advantages, ratio, tmp_path):
    """The loss and its gradient are those of all rows, as every loss_type divides; a KL or an entropy in
    the loss is of all of them."""
    advantages, seen = torch.tensor(advantages).float(), []
    every, zeros = torch.ones(4, dtype=torch.bool), advantages == 0
    teach = ~zeros if not zeros.all() else torch.arange(4) == 0
    for changes in (dict(loss_type="grpo"), dict(loss_type="dapo"), dict(entropy_coef=0.1)):
        made = trainer(tmp_path, ratio=ratio, steps=4, **changes, **SOFT)
        batch = rollout(made) | {"advantages": advantages}
        body = made.model.model
        body.register_forward_hook(lambda module, args, got: seen.append(len(got[0])))
        steps, rows = steps_of(batch), every if "entropy_coef" in changes else teach
        seen.clear()
        log_probs(made.model, steps.rows(rows), made.decoding, **made._how)
        forwards = sum(seen)
        logp = made._log_probs(made.model, steps, None)
        moved = logp + 0.1 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
        for old in (None, moved):
            batch["old_per_token_logps"] = old
            seen.clear()
            loss = made._compute_loss(made.model, batch)
            assert sum(seen) == forwards * (1 if ratio == "token" or old is None else 2)
            if "entropy_coef" in changes:
                continue
            grads = []
            for value in (loss, expected := dense(made, batch, old)):
                made.model.zero_grad()
                value.backward()
                grads.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
            assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
            torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
            assert bool(grads[0].any()) == (not zeros.all())


@pytest.mark.parametrize("ratio", ["token", "trajectory"])
def test_a_row_that_stands_in_for_none_is_not_logged(ratio, tmp_path):
    """Alone it logs nothing; beside another process, which waits for its sums, it adds 0 to them."""
    made = trainer(tmp_path, ratio=ratio, steps=4, **SOFT)
    batch = rollout(made) | {"advantages": torch.zeros(4)}
    metrics = made._metrics["train"]
    metrics.clear()
    made._compute_loss(made.model, batch)
    assert not metrics
    made.accelerator.reduce = lambda sums: sums + torch.tensor([3.0, 4.0])
    made._compute_loss(made.model, batch)
    names = {"entropy", "agreement/greedy", "ratio/replay_deviation", "clip_ratio/low_mean"}
    assert {name: metrics[name] for name in names} == {name: [0.75] for name in names}


def test_an_evaluation_reads_all_rows(tmp_path):
    made, seen = trainer(tmp_path, steps=4, **SOFT), []
    batch, body = rollout(made), made.model.model
    body.register_forward_hook(lambda module, args, got: seen.append(len(got[0])))
    log_probs(made.model, steps_of(batch), made.decoding, **made._how)
    forwards = sum(seen)
    made.model.eval()
    logged = []
    for advantages in (torch.ones(4), torch.zeros(4), torch.tensor([0, 0, 1.0, 0])):
        seen.clear()
        with torch.no_grad():
            made._compute_loss(made.model, batch | {"advantages": advantages})
        assert sum(seen) == forwards
        logged.append(made._metrics["eval"]["entropy"][-1])
    assert len({*logged}) == 1 and logged[0] > 0


@pytest.mark.parametrize("reward", [0.6, 0.7])
@pytest.mark.parametrize(
    "options",
    [
        *(dict(scale_rewards=scale) for scale in ("group", "batch", "none")),
        dict(multi_objective_aggregation="normalize_then_sum"),
        dict(kind="rloo"),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_a_group_of_equal_rewards_has_no_advantage(options, reward, tmp_path):
    def equal_then_not(completions, **columns):
        return [reward] * 6 + [0.0, 0.2, 0.4, 0.6, 0.8, 0.9]

    sizes = dict(per_device_train_batch_size=12, num_generations=6)
    made = trainer(tmp_path, reward=equal_then_not, **sizes, **options)
    advantages = rollout(made)["advantages"]
    assert not advantages[:6].any() and advantages[6:].all()
    assert list(made._logs["advantages"])[-12:] == advantages.tolist()


def test_equal_totals_of_unlike_rewards_keep_the_advantages_of_each(tmp_path):
    """Where TRL compares each reward function's by itself, and weighs only then."""
    one = lambda completions, **columns: [0.0, 0.0, 0.0, 1.0]  # noqa: E731
    other = lambda completions, **columns: [2.0, 2.0, 2.0, 0.0]  # noqa: E731
    options = dict(multi_objective_aggregation="normalize_then_sum", reward_weights=[1.0, 0.5])
    options |= dict(reward=[one, other])
    assert rollout(trainer(tmp_path, **options))["advantages"].all()


def test_a_piece_is_gone_before_the_next_is_made(tmp_path):
    """A forward and a backward of each, one after the other, whatever the number of steps."""
    made, seen = trainer(tmp_path, steps=6, **SOFT), []
    batch = rollout(made)
    body = made.model.model
    body.register_forward_hook(lambda *_: seen.append("forward"))
    body.layers[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    made._compute_loss(made.model, batch).backward()
    pairs = 4 * 6
    assert seen == ["forward", "backward"] * math.ceil(pairs / 5)


def test_a_sum_of_losses_is_a_loss():
    weight, other = (torch.randn(3, requires_grad=True) for _ in range(2))
    loss = summed(lambda: ((weight * i).square().sum() for i in range(4)), [weight, other])
    (3 * loss).backward()
    torch.testing.assert_close(weight.grad, 3 * 2 * 14 * weight.detach())
    assert other.grad is None
    with torch.no_grad():
        assert summed(lambda: iter([weight.sum()]), [weight]).requires_grad is False


def test_rollouts_of_older_checkpoints_are_taken_up(tmp_path):
    """They do not say which slots were drawn, as none were."""
    made = trainer(tmp_path, **SOFT)
    batch = rollout(made)
    names = ("trajectory_opened_at", "trajectory_drawn_as")
    old = {name: part for name, part in batch.items() if name not in names}
    assert len(old) == len(batch) - 2
    assert made._compute_loss(made.model, old).item() == pytest.approx(
        made._compute_loss(made.model, batch).item(), abs=1e-9
    )


def test_kl_and_entropy(tmp_path):
    """The reference is the model as it was: no KL at first, then some; adapters are taken off for it."""
    made = trainer(tmp_path, beta=0.5, entropy_coef=0.01, max_steps=3, **SOFT)
    made.train()
    kl = logged(made, "kl")
    assert abs(kl[0]) < 1e-6 < kl[2] and 0 < logged(made, "entropy")[0] < math.log(VOCAB)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = trainer(tmp_path, beta=0.5, peft=adapter, max_steps=3)
    made.train()
    assert abs(logged(made, "kl")[0]) < 1e-6 < logged(made, "kl")[2]


@pytest.mark.parametrize("alg_temp", [0.0, 0.3])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_kl_is_that_of_the_whole_beliefs(adapted, alg_temp, tmp_path):
    """To the model as it was, of every committed token and of the draw of its slot, weighed like its
    surrogate; no row is left out."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapted else None
    made = trainer(tmp_path, beta=0.3, loss_type="grpo", peft=adapter, alg_temp=alg_temp, **SOFT)
    reference = net()  # the tests' model before the trainer had it
    batch = rollout(made) | {"advantages": torch.zeros(4)}
    with torch.no_grad():
        for number, weight in enumerate(p for p in made.model.parameters() if p.requires_grad):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            weight.add_(0.1 * noise)
    loss, steps, how = made._compute_loss(made.model, batch), steps_of(batch), made._how
    kl = torch.zeros(batch["loss_mask"].shape)
    with torch.no_grad():
        inner = made.model.eval()
        both = (replay(model, steps, made.decoding, **how) for model in (inner, reference))
        for new, old in zip(*both, strict=True):
            pairs = [(new.logits.log_softmax(-1), old.logits.log_softmax(-1))]
            if alg_temp:
                pairs.append((new.choices, old.choices))
            for p, q in pairs:
                kl[new.rows, new.cols] += (p.exp() * (p - q)).nan_to_num().sum(-1)
    mask = batch["loss_mask"]
    expected = 0.3 * ((kl * mask).sum(1) / mask.sum(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-3


def test_it_learns(tmp_path):
    made = trainer(
        tmp_path, "rloo", max_steps=15, learning_rate=3e-2, per_device_train_batch_size=8, **SOFT
    )
    made.train()
    rewards = logged(made, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulated_batches_are_one(tmp_path):
    """The same rows in one micro-batch or four, of unlike widths."""
    ends = []
    for size, accumulated in ((8, 1), (2, 4)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        made = trainer(tmp_path, max_steps=1, max_grad_norm=0, optim="sgd", **options, **SOFT)
        made.train()
        ends.append(weights(made.model))
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_resumed_training_is_the_same(adapted, tmp_path):
    """To the bit, in the middle of a rollout's passes."""
    options = dict(max_steps=4, save_steps=1, num_iterations=3, save_strategy="steps", **SOFT)
    mk = lambda: with_lora(net()) if adapted else net()  # noqa: E731
    whole = trainer(tmp_path / "whole", model=mk(), **options)
    whole.train()
    again = trainer(tmp_path / "whole", model=mk(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(whole.model))
    other = trainer(tmp_path / "whole", model=mk(), **options | dict(steps=2))
    with pytest.raises(ValueError, match="another policy: now steps=2, not 3"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_folder_keeps_the_soft_masks_of_its_model_alone(adapted, tmp_path):
    """Those that an adapter learnt are in no configuration, and those of a run before are there."""
    settings = SoftMaskHead(scale=0.4).settings()
    for soft_mask in (settings, None):
        base, again = net(), tmp_path / "again"
        base.config.soft_mask = None if soft_mask else settings
        base.save_pretrained(tmp_path / "base")
        model = load(tmp_path / "base")[0]
        if adapted:
            with_lora(model).save_pretrained(tmp_path / "adapter")
            save_head(soft_mask or {}, tmp_path / "adapter")
            model = load(tmp_path / "adapter")[0]
        else:
            model.config.soft_mask = soft_mask
        made = trainer(again, model=model, max_steps=1, soften="hard")
        made.train()
        made.save_model()
        known = facts(load(again)[0]).soft_mask
        assert known == (soft_mask and soft_mask | {"scheduling": "none"})


def test_the_best_checkpoint_is_taken_up(tmp_path):
    """Its weights have the names of the published models."""
    keeping = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    keeping |= dict(load_best_model_at_end=True, metric_for_best_model="loss", **SOFT)
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    config = DiffusionGRPOConfig(str(tmp_path), **QUICK | keeping)
    made = DiffusionGRPOTrainer(net(), words, config, rows, rows, tokenizer_of(VOCAB))
    made.evaluate = lambda **options: {"eval_loss": float(made.state.global_step)}
    made.train()
    learnt = made.model.state_dict()
    for step, here in ((1, True), (2, False)):
        saved = load(str(tmp_path / f"checkpoint-{step}"))[0].state_dict()
        assert all(torch.equal(saved[name], learnt[name]) for name in learnt) == here


def test_bfloat16_rolls_out_what_it_scores(tmp_path, monkeypatch):
    """Both under autocast; where one is not, the log says so."""
    made, seen = trainer(tmp_path, bf16=True, max_steps=1, learning_rate=0.0, **SOFT), []
    made._rollout_metrics = lambda rollout: seen.append(rollout.out) or {}
    made.train()
    logp = made._log_probs(made.model, seen[0].trajectory, None)
    off = (logp - seen[0].confidence.nan_to_num(1.0).log()).abs().max()
    assert 0 < off < 0.1

    def full(*args, **how):
        with torch.autocast("cpu", enabled=False):
            return denoise(*args, **how)

    monkeypatch.setattr("softar.rl.diffusion_grpo.denoise", full)
    other = trainer(tmp_path, bf16=True, max_steps=1, learning_rate=0.0, **SOFT)
    other.train()
    then, now = (logged(each, "ratio/replay_deviation")[0] for each in (made, other))
    assert then < 1e-4 < now < 0.1 and logged(other, "ratio/max_deviation") == [0]


@pytest.mark.parametrize("ratio", ["token", "trajectory"])
def test_the_replay_is_held_against_the_rollout_itself(ratio, tmp_path):
    """On a later pass, when the policy has moved, too; of an estimate it is the error."""
    made = trainer(tmp_path, num_iterations=2, ratio=ratio, **SOFT)
    made.train()
    assert logged(made, "ratio/max_deviation")[1] > 1e-3
    assert max(logged(made, "ratio/replay_deviation")) < 1e-5
    made = trainer(tmp_path, replay="one-step", max_steps=1, ratio=ratio)
    made.train()
    assert logged(made, "ratio/replay_deviation")[0] > 1e-2


@pytest.mark.parametrize("make", [DiffusionGRPOConfig, DiffusionRLOOConfig])
def test_the_length_of_answers_has_two_names(make, tmp_path):
    """TRL's drives ours and ours TRL's; of a template it is what dr_grpo divides by."""
    for options, expected in (
        ({}, (128, 128)),
        (dict(max_completion_length=64), (64, 64)),
        (dict(gen_length=32), (32, 32)),
        (dict(gen_length=32, max_completion_length=32), (32, 32)),
        (dict(gen_length=0, max_completion_length=7, loss_type="dr_grpo"), (0, 7)),
    ):
        config = make(str(tmp_path), **options)
        assert (config.gen_length, config.max_completion_length) == expected
        assert config.decoding().gen_length == expected[0]
    with pytest.raises(ValueError, match="gen_length=32, which is the length of answers"):
        make(str(tmp_path), gen_length=32, max_completion_length=64)
    for loss_type in ("grpo", "bnpo", "dapo"):
        with pytest.raises(ValueError, match="max_completion_length=7 does nothing with gen_leng"):
            make(str(tmp_path), gen_length=0, max_completion_length=7, loss_type=loss_type)


@pytest.mark.parametrize("option", SHORTHANDS)
def test_what_a_schedule_needs_can_be_given(option, tmp_path):
    select = "entropy" if option == "entropy_bound" else "max-prob"
    needs = {option: SHORTHANDS[option], "select": select}
    how = DiffusionGRPOConfig(str(tmp_path), schedule=option.replace("_", "-"), **needs).decoding()
    assert getattr(how, option) == SHORTHANDS[option]


@pytest.mark.parametrize("make", [DiffusionGRPOConfig, DiffusionRLOOConfig])
def test_refusals_name_options_that_are_there(make, tmp_path):
    names = {field.name for field in dataclasses.fields(make)}
    for name, _, why in NEUTRAL:
        named = re.findall(r"(\w+)=", make._reasons.get(name, why))
        assert {*named} <= names and "soft_ratio" not in make._reasons.get(name, why), name
    rules = [rule for rule in make._idle if "scale_rewards" in rule.options]
    assert all("use DiffusionGRPOConfig" in rule.remedy for rule in rules)
    assert len(rules) == (make is DiffusionRLOOConfig)


def test_checkpoints_of_activations_change_nothing(tmp_path):
    grads = []
    for options in ({}, dict(gradient_checkpointing=True)):
        made = trainer(tmp_path, max_steps=1, **options, **SOFT)
        made.train()
        grads += logged(made, "grad_norm")
    assert grads[0] == pytest.approx(grads[1], rel=1e-4)


def test_a_prompt_that_leaves_no_room_is_said(tmp_path):
    sizes = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    bert = BertForMaskedLM(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=7))
    bert.config.mask_token_id = MASK
    with pytest.raises(ValueError, match=r"has 2 tokens, and with gen_length=6 .* room for 1:"):
        trainer(tmp_path, model=bert)
    says = r"prompt 1 of train_dataset has 59 tokens, and with gen_length=6 .* room for 58:"
    with pytest.raises(ValueError, match=says):  # one without a table, that `denoise` would refuse
        trainer(tmp_path, prompts=["w6 " * 58, "w6 " * 59])


@pytest.mark.parametrize("at", [0, 3, 23])
def test_each_template_holds_a_mask(at, tmp_path):
    """One without would be a rollout of nothing; which of them is said."""
    prompts = [*TEMPLATES]
    prompts[at] = "w5 w6"
    with pytest.raises(ValueError, match=f"gen_length=0 .* prompt {at}, 'w5 w6', has none"):
        trainer(tmp_path, prompts=prompts, gen_length=0)
    trainer(tmp_path, prompts=prompts)  # masks stand behind them


def test_an_evaluation_and_the_command_of_the_card(tmp_path):
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, **SOFT)
    made.eval_dataset = made.train_dataset.select(range(4))
    first, again = made.evaluate(), made.evaluate()
    assert 0 <= first["eval_reward"] <= 1 and first["eval_reward"] == again["eval_reward"]
    assert first["eval_loss"] == again["eval_loss"] and first["eval_diffusion/nfe"] == 3
    made.train()
    words = shlex.split(command_of(tmp_path / "checkpoint-1"))
    length, spec = words[words.index("--gen-length") + 1], words[words.index("-d") + 1]
    name, _, options = spec.partition(":")
    how = denoise_config(name, parse_options(options) | {"gen_length": int(length)})
    assert how == made.args.decoding()


def test_templates_and_what_rewards_see(tmp_path):
    """A filled template, and an answer up to its end token."""
    seen = []

    def reward(completions, completion_ids, prompts, **columns):
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return [0.0 for _ in completions]

    trainer(tmp_path, prompts=TEMPLATES, reward=reward, gen_length=0, max_steps=1).train()
    for prompt, text, ids in seen:
        assert len(ids) == 5 and MASK not in ids
        kept = [w if w != f"w{MASK}" else None for w in prompt.split()]
        assert all(k in (None, w) for k, w in zip(kept, text.split(), strict=True))
    seen.clear()
    made = trainer(tmp_path, reward=reward, end_ids=list(range(20)), max_steps=1)
    made.train()
    lengths = [len(ids) for *_, ids in seen]
    assert min(lengths) < 6 and all(i >= 20 for *_, ids in seen for i in ids)
    told = logged(made, "diffusion/tokens_per_forward")[0] * logged(made, "diffusion/nfe")[0]
    assert told * len(lengths) == pytest.approx(sum(min(n + 1, 6) for n in lengths))


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_prompts_that_the_tokenizer_closes_are_read_as_decoded(kind, tmp_path):
    """[CLS] prompt [SEP], or a chat, and the masks: the context of evaluations and of SFT."""
    write_bert(tmp_path / "bert", "modernbert")
    model, tokenizer = load(tmp_path / "bert")
    prompt = ROW_KINDS[kind]["prompt"]
    config = DiffusionGRPOConfig(str(tmp_path / "out"), **QUICK)
    rows = Dataset.from_list([{"prompt": prompt}] * 4)
    reward = lambda completions, **columns: [1.0 * i for i in range(len(completions))]  # noqa: E731
    made = DiffusionGRPOTrainer(model, reward, config, rows, processing_class=tokenizer)
    before = steps_of(rollout(made)).before
    asked = encode(tokenizer, [prompt])["input_ids"][0].tolist()
    assert before[0].tolist() == asked + [tokenizer.mask_token_id] * 6
    made.train()
    assert max(logged(made, "ratio/replay_deviation")) < 1e-5


@pytest.mark.parametrize("soften", ["hard", "soft-mask", "soft-token"])
def test_agreement_of_draws_with_greedy_decoding_and_of_slots_with_what_they_showed(
    soften, tmp_path
):
    options = SOFT if soften == "soft-mask" else dict(soften=soften)
    options = options | dict(max_steps=1, learning_rate=0.0, steps=4)

    def unlike(completions, **columns):  # every row has an advantage, and is replayed
        return [float(i) for i in range(len(completions))]

    made, seen = trainer(tmp_path, reward=unlike, **options), []
    metrics = made._rollout_metrics
    made._rollout_metrics = lambda rollout: seen.append(rollout.out.trajectory) or metrics(rollout)
    made.train()
    (steps,) = seen
    top = [
        (piece.logits.argmax(-1) == steps.after[piece.rows, piece.cols]).float()
        for piece in replay(made.model, steps, made.decoding)
    ]
    share = torch.cat(top).mean().item()
    assert logged(made, "agreement/greedy") == [pytest.approx(share)] and 0 < share < 1
    same = []
    for r, row in enumerate(steps.after.tolist()):
        for at, col, ids, weights in zip(*(part[r].tolist() for part in steps[4:8]), strict=True):
            if 0 <= at == steps.committed_at[r, col]:
                pairs = [(w, i) for i, w in zip(ids, weights, strict=True) if i != MASK]
                same.append(max(pairs)[1] == row[col])
    if soften == "hard":
        assert not same and not logged(made, "agreement/soft")
    else:
        assert 0 < len(same) < steps.after.numel()
        assert logged(made, "agreement/soft") == [pytest.approx(sum(same) / len(same))]


def test_cold_draws_agree_with_greedy_decoding(tmp_path):
    # answers and rewards of a group are alike, and such rows are replayed for their entropy alone
    made = trainer(tmp_path, max_steps=1, temperature=1e-4, entropy_coef=1e-3, **SOFT)
    made.train()
    assert logged(made, "agreement/greedy") == [1.0]


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    made.train()
    folder = tmp_path / "checkpoint-1"
    (folder / "denoise_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"holds no denoise_config\.json: it is of another trainer"
    ):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(select="confidence"), "select='confidence' cannot be replayed"),
        (dict(schedule="p2"), "schedule='p2' cannot be replayed"),
        (dict(schedule="edit", threshold=0.5), "schedule='edit' cannot be replayed"),
        (dict(schedule="wino", threshold=0.5, steps=None), "schedule='wino' cannot be replayed"),
        (dict(soften="evolving"), "soften='evolving' cannot be replayed"),
        (dict(replay="grouped"), "for block-causal models"),
        (dict(replay="some"), "replay='some' is unknown"),
        (dict(ratio="row"), "ratio='row' is unknown"),
        (dict(hide_prompt=0.2), "hide_prompt=0.2 does nothing"),
        (dict(soften="hard", embedding_grad=False), "embedding_grad=False does nothing"),
        (dict(temperature=0.0), "temperature=0.0 must be > 0"),
        (dict(top_k=5), "top_k=5 is not supported"),
        (dict(use_vllm=True), "it fills no masks"),
        (
            dict(
                gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)
            ),
            "reentrant checkpoints refuse, leave use_reentrant at False",
        ),
        (SOFT | dict(soften_args=dict(algorithm="temperature")), "hold the whole vocabulary"),
        (dict(vllm_tensor_parallel_size=2), "the rollout is softar's own loop"),
        (dict(gen_length=0, loss_type="dr_grpo"), "the most masks that a template has"),
        (dict(reward=lambda completions, **columns: [1.0]), "returned 1 rewards for 4"),
        (
            dict(reward=lambda completions, **columns: [math.nan] * 4),
            "returned nan for the completion",
        ),
        (
            dict(alg_temp=0.3, replay="one-step"),
            r"alg_temp=0\.3 draws the slots, and replay='one-step'",
        ),
        (dict(alg_temp=-1.0, replay="one-step"), r"alg_temp=-1\.0 must be >= 0"),
        (dict(alg_temp=0.3, threshold=0.9, steps=None), "compares probabilities: alg_temp"),
        (dict(alg_temp=0.3, steps=1), r"alg_temp=0\.3 does nothing where a forward commits all"),
        (dict(model=causal()), "names no mask token"),
        (dict(model=gemma()), "redraws its slots"),
        (dict(model="a/name"), "needs one from softar.diffusion.load"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_is_refused(options, says, tmp_path):
    with pytest.raises(ValueError, match="(?i)" + says.replace("(", r"\(")) as caught:
        trainer(tmp_path, **options).train()
    assert "\n" not in str(caught.value)
