"""What training shows of its rollouts and of its updates.

Shapes: B rows, C completion steps, J ratios of a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from softar.config import SoftConfig
from softar.decode import SoftOutput
from softar.thought import Kind, begin, mk_rules, replay

from .discretise import heaviest
from .losses import clipped
from .rollout import Rollout

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}


def rollout_metrics(
    rollout: Rollout, config: SoftConfig, total: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Means of `statistics`, as soft/... . total: sums a tensor over processes."""
    sums = statistics(rollout.out, config)
    pairs = total(torch.stack([torch.stack([x.float() for x in pair]) for pair in sums.values()]))
    means = zip(sums, pairs.tolist(), strict=True)
    return {f"soft/{name}": value / count for name, (value, count) in means if count}


def reward_metrics(rewards: Tensor) -> dict[str, float]:
    """Quantiles of the rewards of all processes, NaN for a row without."""
    return {f"reward/{name}": rewards.nanquantile(at).item() for name, at in QUANTILES.items()}


def ratio_metrics(
    new: Tensor,
    old: Tensor,
    clip: tuple[Tensor, float, float],
    mask: Tensor,
    mean: Callable[[Tensor, Tensor], float],
    gather: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Share of ratios that the clip holds, and how far one is from 1: on the first pass it is not.

    new, old: [B, C, J] log-probabilities. clip: advantages, eps_low, eps_high of `surrogate`.
    mask: [B, C, J]. mean: of values where a mask is 1, over all processes.
    """
    ratio, low, high = clipped(new, old, *clip)
    held = {"low_mean": low, "high_mean": high, "region_mean": low | high}
    furthest = ((ratio - 1).abs() * mask).amax()
    return {f"clip_ratio/{name}": mean(where.float(), mask) for name, where in held.items()} | {
        "ratio/max_deviation": gather(furthest).amax().item()
    }


def statistics(out: SoftOutput, config: SoftConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and count of each metric of a rollout, for a mean over all processes.

    thought_entropy, answer_entropy: nats a step that the policy chose, at its temperature.
    thought_length: steps from behind think_start on, with the closing token, chosen or put in.
    draws_agree: share of mixtures whose draws are all one token, where soft and discrete thinking
    read the same. stream_is_argmax: share of rows whose recorded tokens are the heaviest of their
    mixtures. unclosed: share of rows whose thought never ended, so that they have no answer.

    config: what the rollout was decoded with, resolved.
    """
    record = out.record
    soft, single = record.kind == Kind.SOFT, record.kind == Kind.HARD
    late = torch.arange(single.shape[1], device=single.device) >= out.answer_start[:, None]
    within = thought_steps(out, config)
    thought, answer = within & (soft | single), single & late
    drawn = record.weights > 0
    agree = ((record.ids == record.ids[..., :1]) | ~drawn).all(-1)
    same = (heaviest(record) == record.token) | ~soft
    rows = torch.ones(len(thought), device=thought.device)
    sums = {
        "thought_entropy": (record.entropy[thought].sum(), thought.sum()),
        "answer_entropy": (record.entropy[answer].sum(), answer.sum()),
        "draws_agree": (agree[soft].sum(), soft.sum()),
        "stream_is_argmax": (same.all(1).sum(), rows.sum()),
        "thought_length": (within.sum(), rows.sum()),
    }
    if config.has_answer:
        alive = (record.kind != Kind.PAD).sum(1)
        sums["unclosed"] = ((out.answer_start >= alive).sum(), rows.sum())
    return sums


def thought_steps(out: SoftOutput, config: SoftConfig) -> Tensor:
    """[B, C] bool: steps of the thought, what closes it among them. config: resolved."""
    record, over = out.record, out.record.kind == Kind.PAD
    if not config.has_answer:
        return record.kind == Kind.SOFT
    opened = torch.zeros_like(out.answer_start)
    if (
        config.think_start is not None
    ):  # which tokens may spell in several ways: as the decode read it
        progress = begin(config, out.sequences[:, : out.prompt_length])
        rules = mk_rules(config, over.device, None, None)
        opened = out.answer_start - replay(rules, progress, record, over)[0].thoughts
    step = torch.arange(over.shape[1], device=over.device)
    return (step >= opened[:, None]) & (step < out.answer_start[:, None]) & ~over
