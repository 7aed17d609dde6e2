"""The corners of soft actions and their losses: chunks, rows of mixed kinds, replay's inputs, masks
over NaN."""

import math

import pytest
import torch
from tiny import VOCAB, model_of

from softar.rl import chunked
from softar.rl.actions import (
    concrete_logp,
    gumbel_kl,
    gumbel_logp,
    k_samples_logp,
    replay,
    token_kl,
    token_logp,
)
from softar.rl.losses import aggregate, gae, surrogate, whiten
from softar.soft import Soft, soft_embed


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grads(f, *tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    value = f(*tensors)
    return value.detach(), *torch.autograd.grad(
        (value * numbers(*value.shape, seed=9)).sum(), tensors
    )


@pytest.mark.parametrize("chunk", [1, 14, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_the_gradients_of_log_softmax(monkeypatch, chunk, dtype):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    a, b, ids = numbers(5, 7).to(dtype), numbers(5, 7, seed=1).to(dtype), torch.randint(7, (5, 3))
    soft, tolerance = Soft(ids, torch.full((5, 3), 1 / 3)), 1e-6 if dtype == torch.float32 else 1e-2
    plain = lambda x: x.float().log_softmax(-1)  # noqa: E731
    for ours, theirs, inputs in (
        (lambda x: k_samples_logp(x, soft), lambda x: plain(x).gather(-1, ids), (a,)),
        (token_kl, lambda x, y: (plain(x).exp() * (plain(x) - plain(y))).sum(-1), (a, b)),
    ):
        found, expected = grads(ours, *inputs), grads(theirs, *inputs)
        assert torch.allclose(found[0], expected[0], atol=1e-6)
        for x, y in zip(found[1:], expected[1:]):
            assert x.dtype == dtype and torch.allclose(x.float(), y.float(), atol=tolerance)


def test_a_large_offset_and_a_small_difference_cost_no_precision():
    logits = numbers(3, 6)
    soft = Soft(torch.tensor([[0], [1], [2]]), torch.ones(3, 1))
    moved = (64 * logits).round() / 64  # exactly representable beside the offset
    assert torch.allclose(
        k_samples_logp(moved + 2.0**16, soft), k_samples_logp(moved, soft), atol=1e-5
    )
    near = logits.double() + 1e-4 * numbers(3, 6, seed=1)
    assert torch.allclose(
        token_kl(logits, near.float()).double(), token_kl(logits.double(), near), rtol=0.02, atol=0
    )
    assert torch.equal(token_kl(logits, logits), torch.zeros(3))


def test_single_tokens_among_soft_steps():
    """A step with the one draw in slot 0, or is_soft=False, scores that token; a soft step is as if
    alone; nothing there makes a gradient NaN."""
    logits, ref = numbers(2, 6).requires_grad_(), numbers(2, 6, seed=1)
    soft = Soft(
        torch.tensor([[0, 2, 3], [4, 4, 4]]), torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    )
    g = torch.tensor([[1.2, 0.1, -0.4], [0.0, -torch.inf, -torch.inf]])
    is_soft, first = torch.tensor([True, False]), Soft(soft.ids[:1], soft.weights[:1])
    for found, alone in (
        (gumbel_logp(logits, soft, perturbed=g), gumbel_logp(logits[:1], first, perturbed=g[:1])),
        (
            concrete_logp(logits, soft, tau=0.5, is_soft=is_soft),
            concrete_logp(logits[:1], first, tau=0.5),
        ),
    ):
        assert torch.equal(found[:1], alone)
        assert torch.equal(found[1, :1], token_logp(logits, soft)[1]) and not found[1, 1:].any()
        (grad,) = torch.autograd.grad(found.sum(), logits)
        assert grad.isfinite().all() and grad[1].any()
    kl = gumbel_kl(logits, ref, soft, perturbed=g)
    assert torch.equal(kl[:1], gumbel_kl(logits[:1], ref[:1], first, perturbed=g[:1]))
    assert torch.allclose(kl[1], token_kl(logits, ref)[1], atol=1e-6)
    # a row without a draw
    nothing = g.masked_fill(g != 1.2, -torch.inf)
    for found in (
        gumbel_logp(logits, soft, perturbed=nothing),
        gumbel_kl(logits, ref, soft, perturbed=nothing),
    ):
        (grad,) = torch.autograd.grad(found.sum(), logits)
        assert grad.isfinite().all() and grad[0].any() and not grad[1].any()
        assert not found[1].any()


PROMPTS, PROMPT_MASK = torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]])
MIXTURES = Soft(
    torch.tensor([[[8, 9], [10, 10], [11, 11]], [[12, 13], [14, 15], [16, 16]]]),
    torch.tensor([[[0.5, 0.5], [1, 0], [1, 0]], [[0.5, 0.5], [0.5, 0.5], [1, 0]]]),
)
ALIVE = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_what_replay_feeds():
    model, seen = model_of("llama"), []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    logits = replay(model, PROMPTS, PROMPT_MASK, MIXTURES, ALIVE, rescale="norm")
    hook.remove()
    (fed,) = seen
    assert (
        fed["position_ids"].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]] and fed["use_cache"] is False
    )
    assert fed["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]] and logits.shape == (
        2,
        3,
        VOCAB,
    )
    first = Soft(MIXTURES.ids[:, :2], MIXTURES.weights[:, :2])
    expected = soft_embed(first, model.get_input_embeddings(), rescale="norm")
    assert torch.equal(fed["inputs_embeds"][:, 2:], expected)


def test_embedding_grad_holds_back_mixtures_only():
    model = model_of("llama")
    table = model.get_input_embeddings().weight
    for asked in (True, False):
        model.zero_grad()
        replay(model, PROMPTS, PROMPT_MASK, MIXTURES, ALIVE, embedding_grad=asked).logsumexp(
            -1
        ).sum().backward()
        moved = table.grad.abs().sum(-1) > 0
        assert moved[[5, 6, 7, 10]].all()  # the prompts, and a single token of the completion
        assert bool(moved[[8, 9, 12, 13, 14, 15]].any()) == asked


def test_replay_under_gradient_checkpointing_is_the_same():
    model = model_of("llama")
    plain = grads(
        lambda e: replay(model, PROMPTS, PROMPT_MASK, MIXTURES, ALIVE) * e, torch.ones(1)
    )[0]
    model.train().gradient_checkpointing_enable()
    logits = replay(model, PROMPTS, PROMPT_MASK, MIXTURES, ALIVE)
    assert torch.allclose(logits.detach(), plain, atol=1e-6)
    logits.sum().backward()


def test_replay_refuses_a_loss_mask():
    with pytest.raises(ValueError, match="hole"):
        replay(
            model_of("llama"), PROMPTS, PROMPT_MASK, MIXTURES, torch.tensor([[1, 0, 1], [1, 1, 1]])
        )


def test_surrogate_bounds_the_unclipped_ratio_and_leaves_old_alone():
    new, old = (
        torch.full((1, 1, 1), math.log(9.0)).requires_grad_(),
        torch.zeros(1, 1, 1, requires_grad=True),
    )
    advantage = torch.tensor([-2.0])
    assert surrogate(new, old, advantage).item() == pytest.approx(18)
    assert surrogate(new, old, advantage, delta=4.0).item() == pytest.approx(8)
    surrogate(new, old, advantage).sum().backward()
    assert old.grad is None and new.grad.item() == pytest.approx(18)


def test_what_stands_outside_the_mask_may_be_nan():
    x, mask = torch.tensor([[1.0, torch.nan]]), torch.tensor([[1, 0]])
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        assert aggregate(x, mask, loss_type, max_length=2, num_items=2.0).isfinite()
    assert aggregate(x, torch.zeros(1, 2), "dapo", num_items=0) == 0


def test_gae_carries_no_gradient():
    values = numbers(2, 3).requires_grad_()
    assert not any(x.requires_grad for x in gae(numbers(2, 3), values, torch.ones(2, 3)))


def test_whiten_by_hand():
    x, mask = (
        torch.tensor([[1e-1, 3e-1, 9.0], [2e-1, 6e-1, 9.0]]),
        torch.tensor([[1, 1, 0], [1, 1, 0]]),
    )
    inside = x[:, :2]
    by_hand = (inside - inside.mean()) / inside.std(correction=0)
    white = whiten(x, mask)
    assert torch.allclose(white[:, :2], by_hand, atol=1e-4) and not white[:, 2].any()
    assert not whiten(torch.tensor([[5.0, 1.0]]), torch.tensor([[1, 0]])).any()
    # two processes with the same rows: twice the sums, the same statistics
    assert torch.allclose(whiten(x, mask, total=lambda sums: 2 * sums), white)
