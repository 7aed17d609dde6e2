"""Uniform-state models in the trainer and in the loop: the tokens that their process runs over, the
noise and the loss of a training step, the redraw of a decoding step. The mathematics is in `duo`
(arXiv:2506.10892).

Shapes: B rows, T positions, L columns of the canvas, V the model's vocabulary, U <= V tokens of the
process; n positions, flat, row by row.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softar.soft import Soft, mk_proba_dist

from .canvas import Canvas
from .config import DenoiseConfig
from .constraints import Constraints
from .duo import (
    GaussianToDiscrete,
    ancestral_step,
    corrupt,
    gaussian_corrupt,
    log_linear,
    nelbo,
    symmetric_kl,
    view_scale,
)
from .net import Facts, Parts
from .noise import UniformNoise
from .process import check_options, report
from .reader import Reader, with_answer
from .schedules import Block
from .select import Draws

UNIFORM_LOSSES = ("nelbo", "symmetric_kl")
# Options that mean something to a uniform-state model, and their values; None allows every value.
OPTIONS = {
    "gen_length": None,
    "steps": None,
    "temperature": None,  # a pair is refused in `denoise`
    "top_k": None,
    "top_p": None,
    "schedule": ("uniform",),
    "soften": ("hard",),
    "allowed": None,
    "logits_processor": None,
}


class Alphabet(NamedTuple):
    """The tokens of a uniform process, numbered from 0 as the functions in `duo` want them."""

    ids: Tensor  # [U] token id of each
    number: Tensor  # [V] number of each token id; -1 for those left out


def alphabet(noise: UniformNoise, vocab_size: int, device: torch.device) -> Alphabet:
    inside = torch.ones(vocab_size, dtype=torch.bool)
    inside[list(noise.left_out)] = False
    number = torch.where(inside, inside.cumsum(0) - 1, -1)
    return Alphabet(inside.nonzero()[:, 0].to(device), number.to(device))


# -- training


def noise_for(facts: Facts, tokenizer: PreTrainedTokenizerBase, eps: float) -> UniformNoise:
    """The noise to train a model with. It leaves out the mask, padding, and rows of the embedding
    that belong to no token."""
    if facts.block_length is not None:
        raise ValueError(
            f"objective='uniform' does not go with a model of blocks, of {facts.block_length} here: leave it at "
            f"'masked'"
        )
    left_out = {facts.mask_id, *range(len(tokenizer), facts.vocab_size)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in facts.end_ids:
        left_out.add(tokenizer.pad_token_id)
    if facts.vocab_size - len(left_out) < 2:
        raise ValueError(
            f"objective='uniform' needs 2 tokens or more beside {sorted(left_out)}, mask and padding"
        )
    return UniformNoise(eps, tuple(sorted(left_out)))


class Noisy(NamedTuple):
    """A batch under noise."""

    ids: Tensor  # [B, T] token ids
    alpha: Tensor  # [B]
    dalpha: Tensor  # [B] slope in t
    soft: Soft | None  # [n, V] what the maskable positions show instead of `ids`


def draw_hard(
    ids: Tensor,
    maskable: Tensor,
    t: Tensor,
    uniform: Tensor,
    replacement: Tensor,
    letters: Alphabet,
    eps: float,
) -> Noisy:
    """Tokens replaced at rate 1 - alpha of `log_linear` at t [B]; `uniform` and `replacement` as
    `corrupt` has them."""
    alpha, dalpha = log_linear(t, eps)
    z = corrupt(letters.number[ids], alpha, maskable, uniform, replacement, len(letters.ids))
    return Noisy(torch.where(maskable, letters.ids[z.clamp_min(0)], ids), alpha, dalpha, None)


def draw_soft(
    ids: Tensor,
    maskable: Tensor,
    t: Tensor,
    noise: Tensor,
    tau: float,
    schedule: GaussianToDiscrete,
    letters: Alphabet,
) -> Noisy:
    """Soft tokens at temperature tau, and the hard ones that they stand for, off the same Gaussian
    noise [n, U]."""
    rows = maskable.nonzero()[:, 0]
    z, soft = gaussian_corrupt(letters.number[ids[maskable]], schedule.gamma(t)[rows], noise, tau)
    # In the order of the model's vocabulary, so that the mixture is one product with the table.
    weights = soft.weights.new_zeros(len(rows), len(letters.number)).scatter_(
        1, letters.ids[soft.ids], soft.weights
    )
    everything = torch.arange(len(letters.number), device=ids.device).expand_as(weights)
    alpha, dalpha = schedule(t)
    return Noisy(
        ids.masked_scatter(maskable, letters.ids[z]), alpha, dalpha, Soft(everything, weights)
    )


def uniform_loss(
    kind: str,
    logits: Tensor,
    x: Tensor,
    z: Tensor,
    alpha: Tensor,
    dalpha: Tensor,
    letters: Alphabet,
    *,
    scaled: bool = False,
) -> Tensor:
    """Nats [n]: logits [n, V] at the maskable positions, x and z [n] token ids, alpha and dalpha
    [n]. scaled: the symmetric KL times `view_scale`."""
    log_probs = logits.index_select(-1, letters.ids).float().log_softmax(-1)
    if kind == "symmetric_kl":
        each = symmetric_kl(log_probs, letters.number[x])
        return each * view_scale(alpha, len(letters.ids)) if scaled else each
    return nelbo(log_probs, letters.number[x], letters.number[z], alpha, dalpha)


# -- decoding


def check_uniform(config: DenoiseConfig) -> None:
    """Raise ValueError for options that mean nothing where every slot is redrawn in each of a fixed
    number of steps."""
    options = OPTIONS | {"block_length": (config.gen_length,)}
    why = "a uniform-state model, whose forwards redraw all slots at once, `steps` times"
    check_options(config, options, why)


def random_tokens(
    ids: Tensor, slots: Tensor, noise: UniformNoise, vocab_size: int, draws: Draws
) -> Tensor:
    """[B, L], [B, L] bool -> [B, L] with uniformly random tokens in the slots: the process at t =
    1."""
    letters = alphabet(noise, vocab_size, ids.device).ids
    return ids.masked_scatter(slots, letters[(draws.at(slots) * len(letters)).long()])


class Uniform:
    """The process of a uniform-state model: every slot is drawn anew in each step, in the rows that
    have a step left."""

    def __init__(
        self,
        config: DenoiseConfig,
        net: Parts,
        facts: Facts,
        input_ids: Tensor,
        real: Tensor,
        draws: Draws,
    ):
        """input_ids: [B, P]; real: [B, P] bool, what is not padding. Fills the canvas with random
        tokens."""
        check_uniform(config)
        canvas = Canvas(input_ids, config.gen_length, facts.mask_id)
        self.config, self.facts, self.canvas, self.draws = config, facts, canvas, draws
        self.row_forwards = torch.zeros_like(canvas.at_start)
        self.reader = Reader(net, facts, config, with_answer(real, config), canvas.fixed)
        self.constrain = Constraints(config.allowed, config.logits_processor, canvas, facts)
        canvas.ids = random_tokens(
            canvas.ids, canvas.masked, facts.uniform, facts.vocab_size, draws
        )

    def blocks(self) -> Iterable[Block]:
        """The whole canvas."""
        count = self.canvas.masked.sum(-1).clamp_min(1)
        steps = self.config.steps
        steps = count if steps is None else torch.full_like(count, steps)
        return [self.canvas.block(0, self.canvas.ids.shape[1], steps)]

    def begin(self, block: Block) -> None:
        self.redraw = Redraw(block, self.config, self.facts.uniform, self.facts.vocab_size)

    def more(self, block: Block, index: int) -> bool:
        return self.canvas.has_masks(block, self.reader.forwards) and index < self.redraw.last

    def step(self, block: Block, index: int) -> dict:
        canvas, reader = self.canvas, self.reader
        asked = canvas.masked & (index < block.steps)[:, None]
        self.row_forwards = self.row_forwards + asked.any(-1)
        rows, cols = asked.nonzero(as_tuple=True)
        logits = reader(canvas.ids, reader.columns(block.start, block.end), rows, cols)
        logits = self.constrain(logits, canvas.ids, rows, cols)
        uniform = self.draws.at(asked)
        token, prob = self.redraw(index, logits, canvas.ids[rows, cols], rows, uniform)
        proposal = canvas.ids.index_put((rows, cols), token)
        certain = canvas.spread(prob, rows, cols)
        changed = asked if index == 0 else asked & (proposal != canvas.ids)
        canvas.put(changed, proposal, certain, reader.forwards - 1)
        canvas.watch(prob, rows)
        letters = self.redraw.letters.ids
        believed = asked, lambda here: logits[here].index_select(-1, letters)
        return report(self, block, asked, changed, certain, believed=believed)

    def end(self, block: Block) -> None:
        """Nothing: the last step left no slot open."""

    @property
    def row_stores(self) -> Tensor:
        """[B] none."""
        return torch.zeros_like(self.canvas.at_start)


class Redraw:
    """A step of the reverse process. Each row has its times: t = 1 - i / steps before its step i,
    and its last step is greedy."""

    def __init__(self, block: Block, config: DenoiseConfig, noise: UniformNoise, vocab_size: int):
        self.config, self.noise, self.steps = config, noise, block.steps
        self.letters = alphabet(noise, vocab_size, block.steps.device)
        self.last = int(block.steps.max())

    def __call__(
        self, index: int, logits: Tensor, z: Tensor, rows: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """logits [n, V] float32, z [n] the slots' token ids, rows [n], uniform [n] in [0, 1) -> [n]
        the next token ids, and [n] their probabilities."""
        c, letters = self.config, self.letters
        logits, z = logits.index_select(-1, letters.ids), letters.number[z]
        dist = mk_proba_dist(logits, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)
        probs = torch.zeros_like(logits).scatter_add(-1, dist.ids, dist.weights)
        steps = self.steps.double()
        (alpha_t, _), (alpha_s, _) = (
            log_linear((1 - i / steps).clamp_min(0), self.noise.eps) for i in (index, index + 1)
        )
        drawn = ancestral_step(probs, z, alpha_s[rows], alpha_t[rows], uniform)
        token = torch.where((index + 1 == self.steps)[rows], logits.argmax(-1), drawn)
        prob = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
        return letters.ids[token], prob
