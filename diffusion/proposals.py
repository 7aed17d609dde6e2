"""From logits to proposals: which token each open position would take, its probability, and the
score by which positions are chosen.

Shapes: B rows, L columns of the canvas; n positions, flat, row by row; V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from softar.soft import Soft

from .config import DenoiseConfig
from .net import Facts
from .parity import gumbel_scores
from .schedules import Block
from .select import Belief, Draws, believed, filtered, mk_selector, perturb, propose


class Proposals(NamedTuple):
    belief: Belief  # of the model, about each of n positions
    token: Tensor  # [n]
    score: Tensor  # [n] float32, of the selector
    # [n] float32, the belief's probability of each token; NaN where it has none to propose
    prob: Tensor


def never_proposed(config: DenoiseConfig, facts: Facts) -> list[int]:
    """The tokens that are left out of every belief."""
    ids = [] if config.quirks.proposes_mask else [facts.mask_id]
    return ids + [facts.eos_id] * (config.ban_eos and facts.eos_id is not None)


class Proposer:
    """Makes proposals as a configuration says. with_entropy: somebody will ask for the belief's;
    record: the decode is kept for a replay."""

    def __init__(
        self,
        config: DenoiseConfig,
        facts: Facts,
        end_ids: tuple[int, ...],
        draws: Draws,
        *,
        with_entropy: bool,
        record: bool = False,
    ):
        self.config, self.facts, self.end_ids, self.draws = config, facts, end_ids, draws
        self.quirks, self.select = config.quirks, mk_selector(config.select)
        if self.quirks.noise != "slots" and (config.temperature > 0 or self.select.is_random):
            draws.check_one(config.parity)
        # whose draws a replay would not know
        self.only_scores = record and config.alg_temp > 0
        self.with_entropy = with_entropy or self.select.wants_entropy
        self.is_filtered = (
            config.temperature > 0 or config.top_k is not None or config.top_p is not None
        )

    def __call__(self, logits: Tensor, asked: Tensor, block: Block) -> Proposals:
        """logits: [n, V] of the positions `asked` [B, L] bool, changed in place."""
        config, quirks = self.config, self.quirks
        for token in never_proposed(config, self.facts):
            logits[:, token] = torch.finfo(logits.dtype).min
        belief = scored = Belief(logits, with_entropy=self.with_entropy)
        token, dist = self._propose(belief, asked, block)
        if quirks.filtered_score and self.is_filtered:
            dist = self._filtered(logits) if dist is None else dist
            scored = believed(dist, self.facts.vocab_size)
        orders_ends = config.ends_last and self.end_ids
        if orders_ends and (since := quirks.renormalised_ends) is not None:
            ends = self.end_ids if config.temperature == 0 else self.end_ids[since:]
            scored = Belief(logits.index_fill(-1, token.new_tensor(ends), -torch.inf))
        score = self.select(scored, token, lambda: self._uniform(asked)).float()
        prob = score if self.select.is_confidence else belief.prob(token[:, None])[:, 0]
        # where nothing can be proposed the most likely token is one that was forbidden
        prob = prob.masked_fill(belief.largest[:, 0] <= torch.finfo(logits.dtype).min, torch.nan)
        if orders_ends and quirks.renormalised_ends is None:
            is_end = torch.isin(token, token.new_tensor(self.end_ids))
            score = score.masked_fill(is_end, torch.finfo(score.dtype).min)
        return Proposals(belief, token, score, prob)

    def _propose(self, belief: Belief, asked: Tensor, block: Block) -> tuple[Tensor, Soft | None]:
        """-> tokens [n], and the distribution that they were drawn from, None where it is the
        belief's own."""
        logits, temperature = belief.logits, self.config.temperature
        if self.quirks.noise == "canvas" and temperature > 0:
            uniform = self.draws.whole((*asked.shape, logits.shape[-1]))[asked]
            return gumbel_scores(logits, uniform, temperature).argmax(-1), None
        dist = self._filtered(logits) if temperature > 0 else None
        if self.quirks.noise == "block" and dist is not None:
            inside = block.inside.expand_as(asked)
            noise = self.draws.exponential((int(inside.sum()), logits.shape[-1]))[asked[inside]]
            return believed(dist, logits.shape[-1]).logits.exp().div(noise).argmax(-1), dist
        return propose(belief, dist, lambda: self.draws.at(asked)), dist

    def _filtered(self, logits: Tensor) -> Soft:
        c = self.config
        return filtered(
            logits, c.temperature or 1.0, c.top_k, c.top_p, top_p_first=self.quirks.top_p_first
        )

    def _uniform(self, asked: Tensor) -> Tensor:
        if self.only_scores:
            raise ValueError(
                f"select={self.config.select!r:.80} draws numbers, and with alg_temp={self.config.alg_temp} a replay "
                f"needs its scores: give alg_temp=0, or another select"
            )
        if self.quirks.noise == "canvas":
            return self.draws.whole(tuple(asked.shape), torch.float32)[asked]
        return self.draws.at(asked)

    def reorder(self, score: Tensor, is_open: Tensor) -> Tensor:
        """[B, L] scores -> the same, or with alg_temp such that the best are a draw."""
        alg_temp = self.config.alg_temp
        if alg_temp == 0:
            return score
        return perturb(score, is_open, alg_temp, self.draws).masked_fill(~is_open, -torch.inf)
