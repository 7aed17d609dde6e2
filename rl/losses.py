"""Losses and advantages of policy-gradient training, as pure functions of tensors.

Shapes: B rows of a batch, C completion steps, J components of an action, N rewards.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from softar.checks import check_choice

RATIOS = ("per_draw", "joint")


def surrogate(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    ratio: str = "per_draw",
    *,
    draws: Tensor | None = None,
    delta: float | None = None,
) -> Tensor:
    """PPO's clipped objective per step (arXiv:1707.06347, eq. 7), with the sign of a loss to
    minimise, [B, C].

    "per_draw" clips the ratio of each component and adds the terms up (Multiplex Thinking,
    arXiv:2601.08808), "joint" clips the ratio of the whole action, exp of the summed difference.
    Both have the same gradient at ratio 1, and are PPO's for J = 1. Only the joint ratio is the
    action's importance weight; its spread grows with J.

    Args:
        new, old: [B, C, J] log-probabilities; gradient flows through `new` alone.
        advantages: [B], one per row, or [B, C].
        eps_low, eps_high: the ratio is clipped to 1 - eps_low .. 1 + eps_high.
        draws: [B, C, J] bool, the components that exist (`soft.weights > 0`). None: all. One that
            does not would add the constant -advantage to a per-draw sum.
        delta: bound of the unclipped ratio (two-sided clipping, TRL's `delta`); None is PPO's.
    """
    check_choice("ratio", ratio, RATIOS)
    if new.dim() != 3 or new.shape != old.shape:
        raise ValueError(
            f"new {tuple(new.shape)} and old {tuple(old.shape)} must both be [B, C, J]: pass log-probabilities "
            f"per component, J = 1 for single tokens"
        )
    if advantages.shape not in (new.shape[:1], new.shape[:2]):
        raise ValueError(
            f"advantages {tuple(advantages.shape)} must be {tuple(new.shape[:1])} or {tuple(new.shape[:2])}"
        )
    if not (0 <= eps_low and 0 <= eps_high):
        raise ValueError(f"eps_low={eps_low} and eps_high={eps_high} must be >= 0; 0.2 is PPO's")
    difference = new - old.detach()
    if draws is not None:
        difference = difference.masked_fill(~draws, 0.0)
    if ratio == "joint":
        difference = difference.sum(-1, keepdim=True)
    r = difference.exp()
    a = advantages.view(*advantages.shape, *[1] * (3 - advantages.dim()))
    free = r if delta is None else r.clamp(max=delta)
    terms = -torch.min(free * a, r.clamp(1 - eps_low, 1 + eps_high) * a)
    if ratio == "per_draw" and draws is not None:
        terms = terms.masked_fill(~draws, 0.0)
    return terms.sum(-1)


def aggregate(
    per_step: Tensor,
    mask: Tensor,
    loss_type: str = "dapo",
    *,
    accumulation: int = 1,
    max_length: int | None = None,
    num_items: Tensor | float | None = None,
    num_processes: int = 1,
    steps_per_generation: int = 1,
) -> Tensor:
    """One number from per-step losses, normalised as TRL 1.16's GRPOTrainer does for that
    loss_type.

    Args:
        per_step: [B, C]. mask: [B, C], nonzero for the steps that count; what stands elsewhere,
            even NaN, does not.
        loss_type: "grpo", mean of the rows' means; "bnpo", mean over the steps of the batch;
            "dr_grpo", sum over B x max_length (arXiv:2503.20783); "dapo", sum over the steps of the
            accumulated batch (arXiv:2503.14476).
        accumulation: micro-batches of this optimiser step (`current_gradient_accumulation_steps`);
            1 in evaluation.
        max_length: of a completion, in steps; for "dr_grpo".
        num_items: counting steps in the generation batch over all processes; for "dapo".
        num_processes, steps_per_generation: for "dapo"; steps_per_generation is 1 in evaluation.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(
            f"loss_type={loss_type!r} is not supported: choose one of {sorted(LOSS_TYPES)}"
        )
    if per_step.dim() != 2 or per_step.shape != mask.shape:
        raise ValueError(
            f"per_step {tuple(per_step.shape)} and mask {tuple(mask.shape)} must both be [B, C]"
        )
    if loss_type == "dr_grpo" and max_length is None:
        raise ValueError(
            "max_length=None: 'dr_grpo' divides by it, give the configuration's max_completion_length"
        )
    if loss_type == "dapo" and num_items is None:
        raise ValueError(
            "num_items=None: 'dapo' divides by it, give the counting steps of the generation batch"
        )
    counts = mask != 0
    losses = per_step.masked_fill(~counts, 0.0)
    if loss_type == "dapo":
        items = torch.as_tensor(num_items, dtype=losses.dtype, device=losses.device).clamp(min=1.0)
        return losses.sum() / (items / num_processes * accumulation / steps_per_generation)
    return LOSS_TYPES[loss_type](losses, counts, max_length) / accumulation


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16): -> advantages and returns, both
    [B, C].

    A step outside the mask (forced by a rule, padding) is no action: the environment passes through
    it. It takes no time, so neither gamma nor lam counts it and its value is never read; a reward
    on it goes to the last real step before (with none before it is dropped), so rewards have to be
    0 on padding. After the last real step the value is 0: a completion that ran out of budget
    counts as ended. Advantages and returns are 0 outside the mask; returns are advantages + values
    elsewhere, the target of `value_loss`. No gradient flows.

    Args:
        rewards, values: [B, C]; values[:, t] is about the state that step t was chosen in.
        mask: [B, C], nonzero for real steps.
    """
    if not rewards.shape == values.shape == mask.shape or rewards.dim() != 2:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and mask {tuple(mask.shape)} must all be "
            f"[B, C]: spread one reward per row over its steps first"
        )
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in [0, 1]")
    real = mask != 0
    rewards, values = rewards.detach().float(), values.detach().float()
    advantages = torch.zeros_like(values)
    following = values.new_zeros(len(values))  # the value and the advantage of the next real step
    advantage, waiting = torch.zeros_like(following), torch.zeros_like(following)
    for t in reversed(range(values.shape[1])):
        here, reward = real[:, t], rewards[:, t] + waiting
        now = reward + gamma * following - values[:, t] + gamma * lam * advantage
        advantages[:, t] = torch.where(here, now, 0.0)
        advantage = torch.where(here, now, advantage)
        following = torch.where(here, values[:, t], following)
        waiting = torch.where(here, 0.0, reward)
    return advantages, torch.where(real, advantages + values, 0.0)


def leave_one_out(rewards: Tensor, group: int) -> Tensor:
    """Each reward less the mean of the others in its group (RLOO, arXiv:2402.14740, eq. 8), [N];
    exactly 0 where all are equal.

    rewards: [N], groups of `group` answers to one prompt standing together.
    """
    if rewards.dim() != 1 or group < 2 or len(rewards) % group:
        raise ValueError(
            f"group={group} must be at least 2 and divide the rewards, shape {tuple(rewards.shape)}: an answer is "
            f"compared with the others to its prompt"
        )
    grouped = rewards.view(-1, group)
    advantages = (grouped - (grouped.sum(1, keepdim=True) - grouped) / (group - 1)).view(-1)
    return advantages.masked_fill(is_level(rewards[:, None], group), 0.0)


def is_level(rewards: Tensor, group: int) -> Tensor:
    """[N] bool: have all answers to the same prompt equal rewards? Their advantages are 0, and what
    comes out of a mean of them is rounding, which an optimiser that scales gradients would train on.

    rewards: [N, n], n of each answer, NaN for one that is not given, which is left aside.
    """
    grouped = rewards.view(-1, group, rewards.shape[1])
    missing = grouped.isnan()
    least, most = (grouped.masked_fill(missing, end) for end in (torch.inf, -torch.inf))
    return (most.amax(1) <= least.amin(1)).all(1).repeat_interleave(group)


def value_loss(
    new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, cliprange: float | None = 0.2
) -> Tensor:
    """Half the mean squared error over the masked steps, the worse of the value and the value
    clipped to within `cliprange` of the old one (PPO's code; arXiv:2005.12729, section 3); None
    does not clip. All [B, C] -> scalar."""
    if not new.shape == old.shape == returns.shape == mask.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (new, old, returns, mask))
        raise ValueError(f"new, old, returns and mask must all be [B, C], not {shapes}")
    if cliprange is not None and not cliprange > 0:
        raise ValueError(f"cliprange={cliprange} must be > 0; None switches the clipping off")
    returns, old = returns.detach().float(), old.detach().float()
    new = new.float()
    error = (new - returns).square()
    if cliprange is not None:
        clipped = old + (new - old).clamp(-cliprange, cliprange)
        error = torch.max(error, (clipped - returns).square())
    return 0.5 * _mean(error, mask != 0)


def whiten(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Shift to mean 0 and scale to variance 1 over the masked entries (elsewhere 0); same shape.

    total: sums a tensor over processes, for statistics of all of them. The variance divides by the
    number of entries and has 1e-8 added: equal entries become 0.
    """
    if values.shape != mask.shape:
        raise ValueError(
            f"values {tuple(values.shape)} and mask {tuple(mask.shape)} must have the same shape"
        )
    counts = mask != 0
    count, summed = total(torch.stack([counts.sum(), values.masked_fill(~counts, 0.0).sum()]))
    centred = (values - summed / count.clamp(min=1)).masked_fill(~counts, 0.0)
    variance = total(centred.square().sum()) / count.clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)


def clipped(
    new: Tensor, old: Tensor, advantages: Tensor, eps_low: float, eps_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The ratio of each component, and whether the clip of `surrogate` holds it from below and from
    above; each [B, C, J]. Arguments are those of `surrogate`."""
    ratio = (new - old).exp()
    sign = advantages.view(len(ratio), -1, 1)
    return ratio, (ratio < 1 - eps_low) & (sign < 0), (ratio > 1 + eps_high) & (sign > 0)


def _mean(x: Tensor, counts: Tensor) -> Tensor:
    return x.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)


def _grpo(losses: Tensor, counts: Tensor, max_length: int | None) -> Tensor:
    return (losses.sum(-1) / counts.sum(-1).clamp(min=1)).mean()


def _dr_grpo(losses: Tensor, counts: Tensor, max_length: int | None) -> Tensor:
    return losses.sum() / (len(losses) * max_length)


LOSS_TYPES: dict[str, Callable | None] = {
    "grpo": _grpo,
    "bnpo": lambda losses, counts, max_length: _mean(losses, counts),
    "dr_grpo": _dr_grpo,
    "dapo": None,  # its normaliser is not a function of the micro-batch
}
