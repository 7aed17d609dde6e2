"""What is proposed for each open position, and how sure of it the model is.

`Belief` holds the logits of the positions that matter and computes what is asked of them once, in
tiles that stay in the processor's cache: at V = 126,464 a pass through memory costs as much as a
transformer layer.

Shapes: n positions (flat, row by row), V vocabulary, K kept; B rows, L columns of the canvas.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from softar.largest import CHUNKS, Largest, chunk_of
from softar.mixers import Rng
from softar.soft import TILE, Soft, mk_proba_dist


class Belief:
    """The model's distributions over n positions. logits: [n, V] float32, owned by the caller,
    never written to."""

    def __init__(self, logits: Tensor, *, with_entropy: bool = False):
        self.logits = logits
        self.with_entropy = with_entropy  # computed along with the normaliser then, nearly for free

    @cached_property
    def _peaks(self) -> Largest:
        return Largest(self.logits)

    @property
    def top_token(self) -> Tensor:
        """[n] the most likely token; of equal ones the lowest id."""
        return self._peaks.id

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """-> logits and ids [n, k] of the k most likely tokens, most likely first; `top_token`
        leads."""
        ids = self._peaks.ids(k)
        return self.logits.gather(-1, ids), ids

    def prob(self, ids: Tensor) -> Tensor:
        """[n, K] ids -> their probabilities [n, K]."""
        return self.weigh(self.logits.gather(-1, ids))

    def weigh(self, logits: Tensor) -> Tensor:
        """[n, K] some of the logits -> their probabilities [n, K]."""
        # Not exp(z - log Z): near 1, where the surest are told apart, the rounding of log Z would
        # decide.
        return (logits - self.largest).exp() / self._moments[0]

    def draw(self, uniform: Tensor) -> Tensor:
        """[n] numbers in [0, 1) -> [n] tokens, drawn from the belief: first a chunk of the
        vocabulary, then a token of it."""
        n, V = self.logits.shape
        width = chunk_of(V) or V
        chunks = self.logits.view(n, V // width, width)
        at = 0
        if V > width:
            tiles = self.logits.split(_columns(n), -1)
            sums = [(t - self.largest).exp_().view(n, -1, width).sum(-1) for t in tiles]
            mass = torch.cat(sums, -1).double()
            cumulative = mass.cumsum(-1)
            target = uniform[:, None] * cumulative[:, -1:]
            at = torch.searchsorted(cumulative, target, right=True).clamp_max(V // width - 1)
            rest = target - (cumulative.gather(-1, at) - mass.gather(-1, at))
            uniform, at = (rest / mass.gather(-1, at)).clamp(0, 1)[:, 0], at[:, 0]
        inside = (chunks[torch.arange(n, device=uniform.device), at] - self.largest).exp()
        cumulative = inside.double().cumsum(-1)
        slot = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        return at * width + slot.clamp_max(width - 1)[:, 0]

    @cached_property
    def negative_entropy(self) -> Tensor:
        """[n] sum of p log p, nats, in [-log V, 0]."""
        total, weighted = (
            self._moments if self.with_entropy else _moments(self.logits, self.largest, True)
        )
        return (weighted / total - total.log())[:, 0]

    @cached_property
    def largest(self) -> Tensor:
        """[n, 1] the logit of the most likely token."""
        return self.logits.gather(-1, self.top_token[:, None])

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return _moments(self.logits, self.largest, self.with_entropy)


def _columns(n: int) -> int:
    """How many columns of n positions are a tile, whole chunks."""
    return max(TILE // max(n, 1) // CHUNKS[0], 1) * CHUNKS[0]


def _moments(logits: Tensor, largest: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """[n, V], [n, 1] -> sums of exp(z - largest) and, if asked for, of that times (z - largest):
    [n, 1]."""
    n, V = logits.shape
    if logits.requires_grad and torch.is_grad_enabled():
        shifted = logits - largest
        e = shifted.exp()
        if not with_entropy:
            return e.sum(-1, True), e.new_zeros(n, 1)
        # a token without a share has none in the gradient: its logit times 0 would be NaN there
        return e.sum(-1, True), (shifted.where(e > 0, 0.0) * e).sum(-1, True)
    width = V if logits.is_cuda else min(_columns(n), V)
    total, weighted = logits.new_zeros(n), logits.new_zeros(n)
    buffers = logits.new_empty(2, n, width)
    for tile in logits.split(width, -1):
        shifted, e = buffers[:, :, : tile.shape[1]]
        torch.sub(tile, largest, out=shifted)
        torch.exp(shifted, out=e)
        total += e.sum(-1)
        if with_entropy:
            weighted += shifted.mul_(e).sum(-1)
    if with_entropy and bool(weighted.isnan().any()) and bool((logits == -torch.inf).any()):
        # The clamp is a pass that the usual case, without -inf, is spared.
        return total[:, None], _moments(
            logits.clamp_min(torch.finfo(logits.dtype).min), largest, True
        )[1]
    return total[:, None], weighted[:, None]


def divergence(now: Belief, before: Belief) -> Tensor:
    """[n] nats, KL(now || before) of each position's distribution."""
    p, q = now.logits.log_softmax(-1), before.logits.log_softmax(-1)
    share = p.exp()
    return torch.where(share > 0, share * (p - q), 0.0).sum(-1).clamp_min(0)


class Selector(NamedTuple):
    """A score of positions, `fn(belief, token, uniform) -> [n]`, and what can be done with it.

    token: [n] the proposals; uniform() draws n numbers in [0, 1).
    """

    fn: Callable[[Belief, Tensor, Callable[[], Tensor]], Tensor]
    is_confidence: bool = False  # the probability of the proposal
    is_probability: bool = False  # in [0, 1], so that it can be compared with a threshold
    is_random: bool = False  # of nothing that the model says
    wants_entropy: bool = False  # reads the belief's entropy
    # the score depends on which token is proposed, so that draws decide what commits; a function of
    # which nothing is known may
    looks_at_token: bool = True

    def __call__(self, belief: Belief, token: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        score = self.fn(belief, token, uniform)
        if not torch.is_tensor(score) or score.shape != token.shape:
            raise ValueError(
                f"select={self.fn!r:.80} gave {shape_of(score)}: give scores [n] of the n={len(token)} positions"
            )
        return score


def shape_of(value) -> str:
    """What a method of the user's gave, for an error."""
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return f"a value of type {type(value).__name__}"


def confidence(belief: Belief, token: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Probability of the proposal (LLaDA's low_confidence remasking, arXiv:2502.09992;
    maskgit_plus)."""
    return belief.prob(token[:, None])[:, 0]


def max_prob(belief: Belief, token: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Probability of the most likely token, whichever is proposed: `confidence` without the luck of
    the draw."""
    return belief.prob(belief.top_token[:, None])[:, 0]


def margin(belief: Belief, token: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Probability of the most likely token less that of the second (Dream's topk_margin)."""
    values, _ = belief.top(2)
    probs = belief.weigh(values)
    return probs[:, 0] - probs[:, 1]


def entropy(belief: Belief, token: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Negative entropy (Dream's entropy)."""
    return belief.negative_entropy


def random(belief: Belief, token: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Any order (LLaDA's random remasking)."""
    return uniform().float()


def leftmost(belief: Belief, token: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """From left to right: all alike, and of equal ones the leftmost is the best."""
    return torch.zeros_like(token, dtype=torch.float32)


def propose(belief: Belief, dist: Soft | None, uniform: Callable[[], Tensor]) -> Tensor:
    """[n] tokens: the most likely ones, or with a distribution (`filtered`) draws from it."""
    if dist is None:
        return belief.top_token
    cumulative = dist.weights.double().cumsum(-1)
    slot = torch.searchsorted(cumulative, uniform()[:, None] * cumulative[:, -1:], right=True)
    return dist.ids.gather(-1, slot.clamp_max(dist.weights.shape[-1] - 1))[:, 0]


def filtered(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    *,
    top_p_first: bool = False,
) -> Soft:
    """What a proposal is drawn from: temperature, then top-k, then top-p; or, as Dream has it,
    top-p first."""
    if not (top_p_first and top_p is not None):
        return mk_proba_dist(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    nucleus = mk_proba_dist(logits, temperature=temperature, top_p=top_p)
    return mk_proba_dist(_logits(nucleus, logits.shape[-1]), top_k=top_k)


def believed(dist: Soft, vocab_size: int) -> Belief:
    """The belief of a filtered distribution."""
    return Belief(_logits(dist, vocab_size))


def _logits(dist: Soft, vocab_size: int) -> Tensor:
    out = dist.weights.new_full((*dist.weights.shape[:-1], vocab_size), -torch.inf)
    return out.scatter(-1, dist.ids, dist.weights.log())


def best(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` highest-scored of the positions `among` in each row; of equal ones the leftmost.

    score: [B, L] float; among: [B, L] bool; count: [B] int64 -> [B, L] bool, at most `count` a row.
    """
    score = score.clamp_min(torch.finfo(score.dtype).min).masked_fill(~among, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return among & (torch.empty_like(order).scatter_(-1, order, ranks) < count[:, None])


def perturb(score: Tensor, among: Tensor, temperature: float, draws: "Draws") -> Tensor:
    """Scores whose order is a draw without replacement from softmax(score / temperature) (Gumbel
    top-k, arXiv:1903.06059; Dream's alg_temp)."""
    noise = torch.zeros_like(score)
    noise[among] = -torch.log(
        -torch.log(draws.at(among).clamp_min(torch.finfo(torch.float64).tiny))
    ).float()
    return score / temperature + noise


class Draws:
    """Uniform numbers for positions of a canvas. Rows with generators of their own draw the same
    alone as batched."""

    def __init__(self, rng: Rng, rows: int, device: torch.device):
        one_each = isinstance(rng, (list, tuple)) and all(
            isinstance(one, torch.Generator) for one in rng
        )
        if rng is not None and not isinstance(rng, torch.Generator) and not one_each:
            raise ValueError(
                f"rng={rng!r:.80} is no torch.Generator and no list of them: give "
                f"torch.Generator().manual_seed(0), or one for each row"
            )
        if one_each and len(rng) != rows:
            raise ValueError(
                f"rng holds {len(rng)} generators for {rows} rows: pass one per row, or a single one"
            )
        self.rng, self.device = rng, device

    def check_one(self, parity: str) -> None:
        """Raise ValueError for one generator per row beside a public sampler that draws for the
        whole batch."""
        if isinstance(self.rng, (list, tuple)):
            raise ValueError(
                f"parity={parity!r} draws for all rows at once: give one generator, not one for each row"
            )

    def at(self, where: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """[B, L] bool -> [n] in [0, 1), row by row."""
        if self.rng is None or isinstance(self.rng, torch.Generator):
            return self.whole((int(where.sum()),), dtype)
        counts = where.sum(-1).tolist()
        numbers = [
            torch.rand(c, generator=g, device=g.device, dtype=dtype)
            for c, g in zip(counts, self.rng)
        ]
        return torch.cat([n.to(self.device) for n in numbers])

    def exponential(self, shape: tuple[int, ...]) -> Tensor:
        """Exponential numbers, float32, as torch.multinomial draws them."""
        source = self.device if self.rng is None else self.rng.device
        return torch.empty(shape, device=source).exponential_(generator=self.rng).to(self.device)

    def whole(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.rand(shape, generator=self.rng, device=self.source, dtype=dtype).to(
            self.device
        )

    @property
    def source(self) -> torch.device:
        """Where the one generator draws."""
        return self.device if self.rng is None else self.rng.device


def mk_selector(select: "str | Callable | Selector") -> Selector:
    """The selector of that name, or a function as one of which nothing more is known."""
    if isinstance(select, Selector):
        return select
    return SELECTORS[select] if isinstance(select, str) else Selector(select)


SELECTORS: dict[str, Selector] = {
    "confidence": Selector(confidence, is_confidence=True, is_probability=True),
    "max-prob": Selector(max_prob, is_probability=True, looks_at_token=False),
    "margin": Selector(margin, is_probability=True, looks_at_token=False),
    "entropy": Selector(entropy, wants_entropy=True, looks_at_token=False),
    "random": Selector(random, is_random=True, looks_at_token=False),
    "leftmost": Selector(leftmost, looks_at_token=False),
}
