"""The public samplers, defects included, as substitutions in the loop's places.

Nothing here is needed to denoise: it is for the conformance tests, and for those who want the
published numbers. Each entry of PARITY names the implementation and what it does otherwise than the default.

Shapes: B rows, L columns of the canvas.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from softar.checks import check_choice

from .block_parity import BLOCK_PARITY
from .quirks import Quirks
from .revise import PathPlanning
from .schedules import (
    MASKED,
    Block,
    Factor,
    Quota,
    Rule,
    Schedule,
    Step,
    Threshold,
    linear,
    plan,
    share_out,
)
from .select import Draws, best


def gumbel_scores(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """LLaDA's exp(z) / (-log u)^T, whose argmax is a draw at temperature T, in logarithms and
    float64."""
    return logits.double() - temperature * (-uniform.double().log()).log()


class Fixed:
    """So many forwards in each block, whatever happens; counts by step."""

    def __init__(self, steps: int, count: Callable[[int], Tensor]):
        self.steps, self.count = steps, count

    def more(self, index: int, left: bool) -> bool:
        return index < self.steps

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        return best(step.score, step.open, self.count(step.index)), None


def llada(block: Block, config, draws: Draws) -> Rule:
    steps = int(block.steps.max())
    return Fixed(steps, lambda i: share_out(block.count, steps, i))


class Pyramid:
    """The blog's: forwards from the whole gen_length, and a surplus that spills on masks of later
    blocks."""

    def __init__(self, gen_length: int, dilation: int):
        self.dilation = dilation
        self.steps = min(
            int(dilation * math.sqrt(1 + 8 * gen_length / dilation) / 2), gen_length + 1
        )

    def more(self, index: int, left: bool) -> bool:
        return index < self.steps

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        score = step.score.masked_fill(~step.open, -torch.inf)
        k = min(step.index // self.dilation + 1, score.shape[1])
        commit = torch.zeros_like(step.open)
        for row in range(len(score)):
            commit[row, score[row].topk(k).indices] = True
        return commit, None


def pyramid(block: Block, config, draws: Draws, *, dilation: int = 1) -> Rule:
    return Pyramid(config.gen_length, dilation)


class FactorToTheLast(Factor):
    """Takes the last rank too where it is the only one that fails."""

    def accepted(self, ranked: Tensor, n: Tensor) -> Tensor:
        rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        passes = (ranked >= 1 - self.factor / (rank + 1)) | (rank == 1)
        accepted = torch.minimum(passes.long().cumprod(-1).sum(-1), n)
        return torch.where(accepted == n - 1, n, accepted)


def fast_dllm(block: Block, config, draws: Draws) -> Rule:
    if config.factor is not None:
        return FactorToTheLast(config.factor)
    if config.threshold is not None:
        return Threshold(config.threshold)
    return Quota(
        lambda i, n: share_out(block.count, block.steps, min(i, int(block.steps.max()) - 1))
    )


class Until:
    """Another rule, asked for forwards by other criteria: at least `least`, at most `most` of
    them."""

    def __init__(self, rule: Rule, least: int = 0, most: float = math.inf):
        self.rule, self.least, self.most = rule, least, most

    def more(self, index: int, left: bool) -> bool:
        return index < self.least or (left and index < self.most)

    def __call__(self, step: Step) -> tuple[Tensor, Tensor | None]:
        return self.rule(step)


def fast_dllm_june(block: Block, config, draws: Draws) -> Rule:
    return Until(fast_dllm(block, config, draws), least=2 if config.cache else 0)


def fast_dllm_2026(block: Block, config, draws: Draws) -> Rule:
    return Until(
        fast_dllm(block, config, draws),
        most=int(block.steps.max()) if config.cache == "dual" else math.inf,
    )


def due(masks: float | Tensor, index: int, steps: int, eps: float) -> int:
    """Positions that Dream's time schedule commits at a step."""
    t = torch.linspace(1, eps, steps + 1)
    masks = torch.as_tensor(masks, dtype=torch.float32)
    return int(masks * (1 - t[index + 1] / t[index])) if index < steps - 1 else int(masks)


class Dream:
    """One number for all rows, from their mean number of masks."""

    def __init__(self, steps: int, eps: float):
        self.steps, self.eps = steps, eps

    def more(self, index: int, left: bool) -> bool:
        return index < self.steps

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        n = due(step.open.sum() / len(step.open), step.index, self.steps, self.eps)
        return best(step.score, step.open, step.open.sum(-1).clamp_max(n)), None


def dream(block: Block, config, draws: Draws, *, eps: float = 1e-3) -> Rule:
    check_said(config, "steps")
    return Dream(config.steps, eps)


def check_said(config, *names: str) -> None:
    """Raise ValueError for what a public sampler has to be told, and is not."""
    if missing := [name for name in names if getattr(config, name) is None]:
        raise ValueError(f"parity={config.parity!r} needs {'= and '.join(missing)}=: give them")


class Candidates:
    """Fast-dLLM's Dream without a cache: each step looks at masks / steps candidates and those it
    refused before, and takes those above the threshold. A refusal in the last step buys another
    one."""

    def __init__(self, count: int, steps: int, threshold: float):
        self.share, self.steps, self.threshold, self.refused = count // steps, steps, threshold, 0

    def more(self, index: int, left: bool) -> bool:
        return index < self.steps

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        n = step.open.new_full(step.open.shape[:1], self.share + self.refused, dtype=torch.long)
        looked_at = best(step.score, step.open, n)
        commit = looked_at & (
            (step.score >= self.threshold) | best(step.score, step.open, n.clamp_max(1))
        )
        self.refused = int(looked_at.sum() - commit.sum())
        if step.index == self.steps - 1 and self.refused:
            self.steps, self.share = self.steps + 1, 0
        return commit, None


def dream_threshold(block: Block, config, draws: Draws) -> Rule:
    check_said(config, "steps", "threshold")
    return Candidates(int(block.count.max()), config.steps, config.threshold)


class DreamBlock:
    """Fast-dLLM's Dream with a cache: the first forward of a block commits its first position,
    whatever it is."""

    def __init__(self, block: Block, threshold: float | None, eps: float):
        self.start, self.steps, self.eps = block.start, int(block.steps.max()), eps
        self.threshold = threshold

    def more(self, index: int, left: bool) -> bool:
        if self.threshold is not None:
            return index < 2 or left
        return index < max(self.steps, 2)

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        if step.index == 0:
            first = torch.zeros_like(step.open)
            first[:, self.start] = True
            return first, None
        if self.threshold is not None:
            return Threshold(self.threshold)(step)
        n = (
            due(step.open.sum() / len(step.open), step.index, self.steps, self.eps)
            if self.steps > 1
            else 0
        )
        return best(step.score, step.open, step.open.sum(-1).clamp_max(n)), None


def dream_block(block: Block, config, draws: Draws, *, eps: float = 1e-3) -> Rule:
    return DreamBlock(block, config.threshold, eps)


def blocks_of_rows(config, masked: Tensor, first: Tensor) -> list[tuple[Tensor, Tensor]]:
    """dllm's: from each row's own first mask, or without any to append from its first token; the
    steps of all are shared out upwards."""
    L = masked.shape[1]
    begin = first if config.gen_length == 0 else torch.full_like(first, L - config.gen_length)
    width = L - int(begin.min())
    b = min(config.block_length or width, width)
    n = -(-width // b)
    steps = torch.full_like(first, -(-(config.steps or width) // n))
    number = (torch.arange(L, device=first.device) - begin[:, None]).div(b, rounding_mode="floor")
    return [(number == k, steps) for k in range(n)]


def dllm(block: Block, config, draws: Draws) -> Rule:
    check_choice("schedule", name := config.schedule or "linear", sorted(MASKED))
    counts = plan(block.count, block.steps, MASKED[name], "even")
    return Fixed(counts.shape[1], lambda i: counts[:, i])


def dllm_bd3lm(block: Block, config, draws: Draws) -> Rule:
    rule = dllm(block, config, draws)
    return Until(rule, most=rule.steps)


def open_dcoder(block: Block, config, draws: Draws, *, eps: float = 1e-3) -> Rule:
    return Until(linear(block, config, draws, eps=eps), most=int(block.steps.max()))


class Origin:
    """Each mask by itself, by one number of float32 for each in the batch."""

    def __init__(self, steps: int, eps: float, draws: Draws):
        self.steps, self.draws, self.time = steps, draws, torch.linspace(1, eps, steps + 1)

    def more(self, index: int, left: bool) -> bool:
        return left and index < self.steps

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        i, commit = step.index, torch.zeros_like(step.open)
        chance = 1 - self.time[i + 1] / self.time[i] if i < self.steps - 1 else 1
        commit[step.open] = self.draws.at(step.open, torch.float32) < chance
        return commit, None


def open_dcoder_origin(block: Block, config, draws: Draws, *, eps: float = 1e-3) -> Rule:
    return Origin(int(block.steps.max()), eps, draws)


class AsSorted(PathPlanning):
    """Of equal scores, which with top-p are often 1, those fall that torch's unstable sort puts
    first in the whole row."""

    def stands(self, score: Tensor, among: Tensor, left: Tensor) -> Tensor:
        order = score.masked_fill(~among, torch.inf).argsort(dim=1)
        is_lowest = torch.arange(score.shape[1], device=score.device) < left[:, None]
        return among & ~torch.zeros_like(among).scatter(1, order, is_lowest)


def open_dcoder_p2(block: Block, config, draws: Draws) -> Rule:
    steps = int(block.steps.max())
    rule = AsSorted(lambda i: (block.count.float() * (1 - (i + 1) / steps)).floor().long())
    return Until(rule, most=steps)


# Dream's loop, and what has been made of it
OF_DREAM = dict(competes="canvas", one_block=True, filtered_score=True, top_p_first=True)
PARITY: dict[str, Quirks] = BLOCK_PARITY | {
    # ML-GSAI/LLaDA generate.py at b7e6c35
    "llada": Quirks(rule=llada, competes="before", noise="canvas", renormalised_ends=1),
    # the blog's pyramidal schedule, 2025-07-11
    "pyramid": Quirks(rule=pyramid, competes="before", spills=True),
    # NVlabs/Fast-dLLM's LLaDA at 0d6d48d, 24cc59e and a9b81e4
    "fast_dllm": Quirks(rule=fast_dllm, competes="before"),
    "fast_dllm_2025_06": Quirks(rule=fast_dllm_june, competes="before"),
    "fast_dllm_2026_05": Quirks(rule=fast_dllm_2026, competes="before"),
    # Les1a/SoftTokenForMaskedDLM at a4bb7dc
    "soft_token": Quirks(rule=fast_dllm, competes="before"),
    # aim-uofa/EvoTokenDLM at f80e9ac
    "evotoken": Quirks(rule=fast_dllm, competes="before", proposes_mask=False, stays_soft=True),
    # Dream's generation_utils.py, and IBM's soft masking on it at 091695d
    "dream": Quirks(rule=dream, **OF_DREAM),
    # NVlabs/Fast-dLLM's Dream at 24cc59e, without and with a cache
    "dream_threshold": Quirks(rule=dream_threshold, **OF_DREAM),
    "dream_block": Quirks(rule=dream_block, filtered_score=True, top_p_first=True),
    # ZHZisZZ/dllm at ca17675: MDLMSampler's sample, and its infill of templates
    "dllm": Quirks(
        rule=dllm, grid=blocks_of_rows, competes="before", noise="canvas", renormalised_ends=0
    ),
    "dllm_infill": Quirks(rule=dllm, grid=blocks_of_rows, noise="canvas", renormalised_ends=0),
    # its BD3LMSampler, of block-causal models
    "dllm_bd3lm": Quirks(
        rule=dllm_bd3lm,
        blocks=True,
        grid_from="end",
        short_last=True,
        stop="all",
        ends_are_gaps=True,
        renormalised_ends=0,
    ),
    # pengzhangzhi/Open-dLLM at 8b38787: alg maskgit_plus, entropy or topk_margin; origin; p2
    "open_dcoder": Quirks(rule=open_dcoder, **OF_DREAM),
    "open_dcoder_origin": Quirks(rule=open_dcoder_origin, **OF_DREAM),
    "open_dcoder_p2": Quirks(rule=Schedule(open_dcoder_p2, revises=True), **OF_DREAM),
    # DiffusionGemma's `generate` in transformers 5.19: its draws, its positions, and it decodes rows
    # on that have ended
    "diffusion_gemma": Quirks(lenient=False),
}
