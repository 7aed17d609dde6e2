"""Surrogate, normalisations, advantages and value loss against their definitions, step by step."""

import math

import pytest
import torch

from softar.rl.losses import (
    LOSS_TYPES,
    aggregate,
    gae,
    is_level,
    leave_one_out,
    surrogate,
    value_loss,
)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


# -- surrogate


def clipped(log_ratio, advantage, low, high):
    r = torch.tensor(log_ratio).exp().item()
    return -min(r * advantage, min(max(r, 1 - low), 1 + high) * advantage)


@pytest.mark.parametrize("ratio", ["per_draw", "joint"])
def test_surrogate_step_by_step(ratio):
    new, old, advantages = (
        numbers(2, 3, 4) * 0.3,
        numbers(2, 3, 4, seed=1) * 0.3,
        numbers(2, seed=2),
    )
    found = surrogate(new, old, advantages, 0.1, 0.3, ratio=ratio)
    for b in range(2):
        for c in range(3):
            moves = (new - old)[b, c].tolist()
            moves = moves if ratio == "per_draw" else [sum(moves)]
            expected = sum(clipped(move, advantages[b].item(), 0.1, 0.3) for move in moves)
            assert found[b, c].item() == pytest.approx(expected, abs=1e-6)


def test_one_draw_makes_them_the_same():
    new, old, advantages = numbers(2, 3, 1), numbers(2, 3, 1, seed=1), numbers(2, 3, seed=2)
    both = [surrogate(new, old, advantages, 0.2, 0.2, ratio=r) for r in ("per_draw", "joint")]
    assert torch.equal(*both)


def test_at_ratio_one_both_have_the_policy_gradient():
    advantages = numbers(2, 3, seed=2)
    for ratio in ("per_draw", "joint"):
        new = numbers(2, 3, 4).requires_grad_()
        surrogate(new, new.detach(), advantages, 0.2, 0.2, ratio=ratio).sum().backward()
        assert torch.allclose(new.grad, -advantages[..., None].expand(2, 3, 4))


def test_slots_without_a_draw_add_nothing():
    new, old, advantages = numbers(2, 3, 2), numbers(2, 3, 2, seed=1), numbers(2)
    padded = [torch.cat([x, torch.zeros(2, 3, 1)], -1) for x in (new, old)]
    drawn = torch.tensor([True, True, False]).expand(2, 3, 3)
    for ratio in ("per_draw", "joint"):
        found = surrogate(*padded, advantages, 0.2, 0.2, ratio=ratio, draws=drawn)
        assert torch.allclose(found, surrogate(new, old, advantages, 0.2, 0.2, ratio=ratio))


def test_unknown_names():
    with pytest.raises(ValueError, match="ratio='both' is unknown"):
        surrogate(MASK[..., None], MASK[..., None], MASK, 0.2, 0.2, ratio="both")
    with pytest.raises(ValueError, match="must both be"):
        surrogate(MASK[..., None], MASK[:, :2, None], MASK, 0.2, 0.2)
    with pytest.raises(ValueError, match="loss_type='sapo' is not supported"):
        aggregate(MASK, MASK, "sapo")
    for name in ("dr_grpo", "dapo"):
        with pytest.raises(ValueError, match=name):
            aggregate(MASK, MASK, name)


# -- normalisations


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_aggregate_by_hand(loss_type):
    x = numbers(3, 4)
    rows = [x[0].tolist(), x[1, :2].tolist(), x[2, :1].tolist()]
    total = sum(map(sum, rows))
    expected = {
        "grpo": sum(sum(row) / len(row) for row in rows) / 3,
        "bnpo": total / 7,
        "dr_grpo": total / (3 * 10),
        "dapo": total / 20,
    }[loss_type]
    found = aggregate(x, MASK, loss_type, max_length=10, num_items=torch.tensor(20.0))
    assert found.item() == pytest.approx(expected, abs=1e-6)
    # Three micro-batches, two processes, a rollout of twelve micro-batches
    found = aggregate(
        x,
        MASK,
        loss_type,
        accumulation=3,
        max_length=10,
        num_items=20.0,
        num_processes=2,
        steps_per_generation=12,
    )
    assert found.item() == pytest.approx(
        expected * (2 * 12 / 3 if loss_type == "dapo" else 1 / 3), abs=1e-5
    )


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_nothing_in_the_loss_is_no_nan(loss_type):
    assert aggregate(numbers(3, 4), torch.zeros(3, 4), loss_type) == 0


# -- advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_its_sum(gamma, lam):
    rewards, values = numbers(3, 4) * MASK, numbers(3, 4, seed=1)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for b, length in enumerate((4, 2, 1)):
        r, v = rewards[b].tolist(), [*values[b, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-5)
        assert not advantages[b, length:].any() and not returns[b, length:].any()


def test_gae_passes_through_steps_that_are_no_action():
    """They take no time, and a reward on one goes to the step before."""
    rewards, values = numbers(1, 3), numbers(1, 3, seed=1)
    holed = [
        torch.stack([x[0, 0], x[0, 1], torch.tensor(9.0), x[0, 2]])[None] for x in (rewards, values)
    ]
    holed[0][0, 2] = 0.25
    found = gae(*holed, torch.tensor([[1.0, 1, 0, 1]]), 0.9, 0.8)
    rewards[0, 1] += 0.25
    for ours, plain in zip(found, gae(rewards, values, torch.ones(1, 3), 0.9, 0.8), strict=True):
        assert torch.allclose(ours[:, [0, 1, 3]], plain) and ours[0, 2] == 0


def test_gae_of_lambda_one_is_the_return_to_go():
    rewards = torch.zeros(3, 4)
    rewards[0, 3], rewards[1, 1], rewards[2, 0] = 1.0, -2.0, 3.0
    _, returns = gae(rewards, numbers(3, 4), MASK, 1.0, 1.0)
    assert torch.allclose(returns, torch.tensor([[1.0], [-2], [3]]) * MASK, atol=1e-6)


def test_leave_one_out():
    found = leave_one_out(torch.tensor([1.0, 2, 6, 0, 0, 3]), 3)
    assert found.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3])
    for n, group in ((5, 3), (4, 1)):
        with pytest.raises(ValueError, match=f"group={group}"):
            leave_one_out(torch.zeros(n), group)


@pytest.mark.parametrize("group", range(2, 17))
def test_equal_rewards_have_no_advantage(group):
    """To the bit, whatever the mean is rounded to; others keep theirs."""
    other = torch.arange(group, dtype=torch.float)
    for reward in (0.0, 0.1, 0.3, 0.6, 0.7, 1 / 3, -0.9, 1e4 / 3, 1e-8):
        rewards = torch.cat([torch.full((group,), reward), other])
        advantages = leave_one_out(rewards, group)
        assert not advantages[:group].any() and (advantages[group:] != 0).sum() >= group - 1


def test_which_groups_are_level():
    nan = math.nan
    rewards = [[1.0, nan], [1, 2], [nan, nan], [1, 2], [1, 2], [1, 3]]
    assert is_level(torch.tensor(rewards), 3).tolist() == [True] * 3 + [False] * 3
    assert is_level(torch.tensor(rewards)[:, :1], 3).all()
    assert is_level(torch.full((3, 1), nan), 3).all()


def test_value_loss_takes_the_worse():
    values, old = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    returns, mask = torch.tensor([[1.0, 1.0, 7.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    # unclipped errors 1 and 0; held to .2 the second is .8 away
    assert value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(0.5 * (1 + 0.64) / 2)
    assert value_loss(values, old, returns, mask, 2.0).item() == pytest.approx(0.5 * 1 / 2)


def test_dr_grpo_alone_has_the_policy_gradient_in_expectation():
    """All pairs of rows of a two-step problem whose first token may end the row, exactly: RLOO's
    expected gradient is the policy gradient times a constant with dr_grpo, and with no other."""
    table = numbers(3, 3).double().requires_grad_()  # logits of step 1, and of step 2 after 0 or 1
    rows = [(2, None)] + [(a, b) for a in (0, 1) for b in range(3)]  # 2 ends the row
    rewards = torch.tensor([0.3, 1.0, -0.5, 0.2, 0.0, 2.0, -1.0], dtype=torch.float64)
    logp = table.log_softmax(-1)
    steps = [[logp[0, a], logp[a + 1, b] if b is not None else 0 * logp[0, 0]] for a, b in rows]
    new = torch.stack([torch.stack(row) for row in steps])[..., None]  # [7, 2, 1]
    mask = torch.tensor([[1.0, b is not None] for _, b in rows])
    chance = (new[..., 0] * mask).sum(1).exp()
    exact = torch.autograd.grad((chance * rewards).sum(), table, retain_graph=True)[0]
    angle = {}
    for loss_type in LOSS_TYPES:
        total = 0.0
        for i in range(len(rows)):
            for j in range(len(rows)):
                pair = torch.tensor([i, j])
                loss = aggregate(
                    surrogate(new[pair], new[pair].detach(), leave_one_out(rewards[pair], 2)),
                    mask[pair],
                    loss_type,
                    max_length=2,
                    num_items=mask[pair].sum(),
                )
                total = total - (chance[i] * chance[j]).detach() * loss
        gradient = torch.autograd.grad(total, table, retain_graph=True)[0]
        angle[loss_type] = torch.cosine_similarity(
            gradient.flatten(), exact.flatten(), dim=0
        ).item()
    assert 1 - angle.pop("dr_grpo") < 1e-9
    assert all(1 - value > 1e-4 for value in angle.values()), angle
