"""How many of a block's open positions commit in each forward, and which.

A schedule is a function `fn(block, config, draws, **knobs) -> Rule`, called when a block begins. The rule is
then asked, forward by forward, whether another one is wanted and which positions commit. "Best" is
by the selector's score.

Shapes: B rows, L columns of the canvas, S steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from softar.names import lookup

from .revise import Edit, Refine, Wino, overwrite, p2
from .rules import Block, Rule, Step
from .select import Draws, best


class Quota:
    """A rule from numbers alone: count(index, number open) [B] positions commit, the best ones."""

    def __init__(self, count: Callable[[int, Tensor], Tensor]):
        self.count = count

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        return best(step.score, step.open, self.count(step.index, step.open.sum(-1))), None


def share_out(count: Tensor, steps: Tensor | int, index: int) -> Tensor:
    """Masks to commit at step `index` when `count` are shared evenly over `steps`, the first steps
    taking the rest (LLaDA's get_num_transfer_tokens): [B], [B] -> [B]. Nothing after the last
    step."""
    steps = torch.as_tensor(steps, device=count.device)
    return torch.where(index < steps, count // steps + (index < count % steps), 0)


def uniform(block: Block, config, draws: Draws) -> Rule:
    """The same number every step (LLaDA, arXiv:2502.09992)."""
    # A forward after the last step is there to commit what is left.
    return Quota(
        lambda i, n: torch.where(i < block.steps - 1, share_out(block.count, block.steps, i), n)
    )


def linear(
    block: Block, config, draws: Draws, *, eps: float = 1e-3, rounding: str = "down"
) -> Rule:
    """Time from 1 to `eps` in equal steps t -> s: of n masks, n (1 - s / t), rounded; in the last
    step all (Dream, arXiv:2508.15487)."""

    time = _times(block.steps, eps)

    def count(i: int, n: Tensor) -> Tensor:
        if i + 1 >= time.shape[1]:
            return n
        due = n * (1 - time[:, i + 1] / time[:, i])
        return torch.where(i < block.steps - 1, ROUND[rounding](due).long(), n)

    return Quota(count)


def cosine(block: Block, config, draws: Draws, *, rounding: str = "even") -> Rule:
    """A share cos(pi/2 (1 - t)) is masked at time t: few commit at first, more and more later
    (MaskGIT, arXiv:2202.04200). Steps in which none would are left out."""
    counts = plan(block.count, block.steps, MASKED["cosine"], rounding)
    return Quota(lambda i, n: counts[:, i] if i < counts.shape[1] else n)


def plan(count: Tensor, steps: Tensor, masked: Callable[[Tensor], Tensor], rounding: str) -> Tensor:
    """[B], [B] -> [B, S], what commits in each step when time runs from 1 to 0 in equal ones and
    masked(t) of a row are masks at t; without the steps of a row in which nothing does, zeros at
    the end."""
    rows = [
        _counts(n, s, masked, ROUND[rounding])
        for n, s in zip(count.tolist(), steps.tolist(), strict=True)
    ]
    width = max(map(len, rows), default=0)
    padded = [row + [0] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=count.device)


def _counts(left: int, steps: int, masked: Callable, rounded: Callable) -> list[int]:
    """The numbers of one row, as github.com/ZHZisZZ/dllm computes them: shares of float32,
    products of float64."""
    share = masked((torch.arange(steps, -1, -1, dtype=torch.float64) / steps).float())
    counts = []
    for stays in (share[1:] / share[:-1]).double():
        counts.append(min(int(rounded(left * (1 - stays))), left))
        left -= counts[-1]
    if counts:
        counts[-1] += left
    return [k for k in counts if k]


def pyramid(block: Block, config, draws: Draws, *, dilation: int = 1) -> Rule:
    """1, 2, 3, ... positions, each number `dilation` times, until the block is full: sqrt(2
    dilation n) forwards."""
    return Quota(lambda i, n: torch.full_like(n, i // dilation + 1))


class Threshold:
    """Commit what is at least this sure, and the best in any case (Fast-dLLM, arXiv:2505.22618,
    section 3.3)."""

    def __init__(self, threshold: float):
        self.threshold = threshold

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        first = best(step.score, step.open, step.open.any(-1).long())
        return first | (step.open & (step.score >= self.threshold)), None


class Dynamic:
    """Commit what is surer than a threshold if that is at least what is due, else the best that are
    due (SDAR's low_confidence_dynamic, arXiv:2510.06303)."""

    def __init__(self, count: Tensor, steps: Tensor, threshold: float):
        self.count, self.steps, self.threshold = count, steps, threshold

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        due = share_out(self.count, self.steps, index=step.index).clamp_min(1)
        return surest(step, due, self.threshold), None


def surest(step: Step, due: Tensor, threshold: float | None) -> Tensor:
    """[B, L] bool: the best `due` [B] open positions, or all above the threshold if those are at
    least as many."""
    commit = best(step.score, step.open, due)
    if threshold is None:
        return commit
    above = step.open & (step.score > threshold)
    return torch.where((above.sum(-1) >= due)[:, None], above, commit)


def dynamic(block: Block, config, draws: Draws) -> Rule:
    return Dynamic(block.count, block.steps, config.threshold)


def edit(
    block: Block, config, draws: Draws, *, editing_threshold: float = 0.5, max_post_steps: int = 16
) -> Rule:
    """Masks as by "dynamic", and tokens that the block has decoded give way to a new proposal whose
    probability is above `editing_threshold` (LLaDA2.1, arXiv:2602.08676). When no mask is left so
    many forwards more are made at most, while they change something. Not edited are tokens of
    earlier sub-blocks and, with shifted logits, the first of a block, about which all forwards say
    the same."""
    masks = dynamic(block, config, draws)
    return Edit(masks, block.count, editing_threshold, max_post_steps)


def threshold(block: Block, config, draws: Draws) -> Rule:
    return Threshold(config.threshold)


def wino(block: Block, config, draws: Draws, *, back: float = 0.9) -> Rule:
    """Draft widely, verify strictly (WINO, arXiv:2507.18578, section 3): a token that was committed
    at `threshold` is masked again where the model, which now sees more, gives it less than `back`.
    It is verified by the same forward, in which it sees itself; the paper has masks in its place
    for that."""
    return Wino(config.threshold, back)


def refine(block: Block, config, draws: Draws, *, kl: float = 0.1, most: int = 16) -> Rule:
    """Latent refinement (LRD, arXiv:2510.11052): first all masks of the block are read softly and
    none commits, until the model's beliefs change by less than `kl` from step to step, or `most`
    times; then as by "threshold", while the rest stays soft."""
    return Refine(Threshold(config.threshold), kl, most)


class Factor:
    """Commit the n surest as long as (n + 1)(1 - c_n) < factor, c_n the n-th confidence, and the
    best in any case (Fast-dLLM, arXiv:2505.22618, section 3.3)."""

    def __init__(self, factor: float):
        self.factor = factor

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        return best(step.score, step.open, self.accepted(*self.ranked(step))), None

    def ranked(self, step: Step) -> tuple[Tensor, Tensor]:
        """-> confidences of the open positions, largest first [B, L] (then -inf), and their number
        [B]."""
        return step.score.masked_fill(~step.open, -torch.inf).sort(
            dim=-1, descending=True
        ).values, step.open.sum(-1)

    def accepted(self, ranked: Tensor, n: Tensor) -> Tensor:
        rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        passes = ((rank + 1) * (1 - ranked) < self.factor) | (rank == 1)
        return torch.minimum(passes.long().cumprod(-1).sum(-1), n)


def factor(block: Block, config, draws: Draws) -> Rule:
    return Factor(config.factor)


class EntropyBound:
    """Commit the surest, one more as long as the entropies of those before it sum to no more than
    `bound`; in the last step all. That sum bounds what the tokens that are drawn at once could
    still tell about each other (EB-Sampler, arXiv:2505.24857, section 3)."""

    def __init__(self, bound: float, steps: Tensor):
        self.bound, self.steps = bound, steps

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        entropy, order = (-step.score).masked_fill(~step.open, torch.inf).sort(-1)
        # not the whole sum less the last term: an end token that is to wait has the largest number,
        # in which the others are lost
        before = torch.nn.functional.pad(entropy[:, :-1].cumsum(-1), (1, 0))
        first = before <= self.bound
        commit = torch.zeros_like(first).scatter(-1, order, first)
        return step.open & (commit | (step.index >= self.steps - 1)[:, None]), None


def entropy_bound(block: Block, config, draws: Draws) -> Rule:
    return EntropyBound(config.entropy_bound, block.steps)


class Ancestral:
    """Commit each open position by itself with the probability that keeps the clock."""

    def __init__(self, steps: Tensor, draws: Draws):
        self.steps, self.draws = steps, draws

    def more(self, index: int, left: bool) -> bool:
        return left

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        now, then = (1 - time_left(i, self.steps) for i in (step.index, step.index + 1))
        return drawn(step.open, now, then, self.draws), None


def ancestral(block: Block, config, draws: Draws) -> Rule:
    """Each open position commits by itself with probability 1 - s / t, in the last step all
    (absorbing-state diffusion, arXiv:2406.07524; Dream's origin)."""
    return Ancestral(block.steps, draws)


def time_left(index: int, steps: Tensor) -> Tensor:
    """[B] from 1 at step 0 to 0 after the last of `steps` [B]."""
    return (1 - index / steps).clamp(0, 1)


def drawn(is_open: Tensor, now: Tensor, then: Tensor, draws: Draws, back: Tensor | float = 0.0):
    """[B, L] bool: open positions, each drawn with the chance that leads from a share `now` decoded
    to `then` [B], if decoded ones are masked again with chance `back` [B, L]; all at the end."""
    now, then = now[:, None], then[:, None]
    chance = ((then - now + back * now) / (1 - now).clamp_min(1e-9)).expand(is_open.shape)
    chance = chance.masked_fill(then >= 1, 1.0)
    commit = torch.zeros_like(is_open)
    commit[is_open] = draws.at(is_open) < chance[is_open]
    return commit


def _times(steps: Tensor, eps: float) -> Tensor:
    """[B] -> [B, most steps + 1], linspace(1, eps, steps + 1) of each row in float32, and its last
    point as often as it takes. A synchronisation."""
    rows = [torch.linspace(1, eps, s + 1) for s in steps.tolist()]
    width = max(map(len, rows))
    padded = [torch.cat([row, row[-1:].expand(width - len(row))]) for row in rows]
    return torch.stack(padded).to(steps.device)


class Schedule(NamedTuple):
    """A schedule, and what goes with it."""

    fn: Callable[..., Rule]
    # makes as many forwards as `steps` says, else as many as it needs; None: not known, or no more
    takes_steps: bool | None = False
    compares: str | None = None  # the field of DenoiseConfig that it compares scores with
    has_to_compare: bool = True  # that field must be said
    scores: str = "probabilities"  # what those are: "probabilities", or "entropies" in nats
    is_random: bool = False  # draws each position by itself, whatever its score
    # looks at what is decoded in the block again, and may overwrite or mask it: its rules are told
    # `prob`, `standing` and `differs` of those positions too
    revises: bool = False
    # reads beliefs for a while before anything commits: its rules are told their `change`, and masks
    # have to show something
    refines: bool = False
    # makes forwards when no mask is left, too: its rules say in `busy` [B] bool in which rows
    outlasts: bool = False
    from_left: bool = False  # in each forward the leftmost mask commits, whatever its score

    def __call__(self, block: Block, config, draws: Draws, **knobs) -> Rule:
        return self.fn(block, config, draws, **knobs)


def mk_schedule(schedule: str | Callable | Schedule) -> Schedule:
    """The schedule of that name (of SCHEDULES, of an entry point in the group softar.schedules, or
    "module:function"), or a function as one of which nothing more is known."""
    method = schedule
    if isinstance(schedule, str):
        method = lookup("schedule", schedule, SCHEDULES, "softar.schedules")
    if not isinstance(method, Schedule) and not callable(method):
        raise ValueError(f"schedule={schedule!r} is a {type(method).__name__}, and no function")
    return method if isinstance(method, Schedule) else Schedule(method, takes_steps=None)


# masks at time t, as a share of those at time 1; by the share decoded, as dllm rounds it
MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: 1 - (1 - t),
    "cosine": lambda t: 1 - (1 - torch.cos(torch.pi / 2 * (1 - t))),
}
ROUND: dict[str, Callable[[Tensor], Tensor]] = {"down": torch.floor, "even": torch.round}
# what the knobs of schedules may be, and how that is said
SCHEDULE_KNOBS = {
    "dilation": (
        lambda x: isinstance(x, int) and x >= 1,
        "must be a whole number, at least 1: how often each number of tokens comes",
    ),
    "eps": (lambda x: 0 <= x < 1, "must lie in [0, 1): the time at which the schedule ends"),
    "rounding": (lambda x: x in ROUND, f"is unknown: choose one of {[*ROUND]}"),
    "back": (lambda x: 0 <= x <= 1, "must lie in [0, 1]: a probability"),
    "kl": (lambda x: 0 <= x < float("inf"), "must be >= 0 and finite, in nats"),
    "most": (
        lambda x: isinstance(x, int) and x >= 1,
        "must be a whole number, at least 1: of forwards that commit nothing",
    ),
    "editing_threshold": (
        lambda x: 0 <= x <= 1,
        "must lie in [0, 1]: a probability; at 1 nothing is edited",
    ),
    "sure": (lambda x: 0 <= x <= 1, "must lie in [0, 1]: a probability"),
    "max_post_steps": (
        lambda x: isinstance(x, int) and x >= 0,
        "must be a whole number, at least 0: of forwards without masks",
    ),
    "num_to_transfer": (
        lambda x: isinstance(x, int) and x >= 1,
        "must be a whole number, at least 1: of masks in a forward",
    ),
    "eta": (lambda x: 0 <= x < float("inf"), "must be >= 0; 0 masks nothing again"),
}
SCHEDULES: dict[str, Schedule] = {
    "uniform": Schedule(uniform, takes_steps=True),
    "linear": Schedule(linear, takes_steps=True),
    "pyramid": Schedule(pyramid),
    "threshold": Schedule(threshold, compares="threshold"),
    "dynamic": Schedule(dynamic, compares="threshold", takes_steps=None),
    "factor": Schedule(factor, compares="factor"),
    "entropy-bound": Schedule(
        entropy_bound, takes_steps=None, compares="entropy_bound", scores="entropies"
    ),
    "ancestral": Schedule(ancestral, takes_steps=True, is_random=True),
    "cosine": Schedule(cosine, takes_steps=True),
    "p2": Schedule(p2, takes_steps=True, revises=True),
    "edit": Schedule(edit, takes_steps=None, compares="threshold", revises=True, outlasts=True),
    "overwrite": Schedule(
        overwrite,
        takes_steps=None,
        compares="threshold",
        has_to_compare=False,
        revises=True,
        outlasts=True,
        from_left=True,
    ),
    "wino": Schedule(wino, compares="threshold", revises=True),
    "refine": Schedule(refine, compares="threshold", refines=True),
}
