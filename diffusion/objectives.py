"""What diffusion SFT minimises, by name: masked tokens predicted, hard, with soft masks or after the
model's own guesses, or uniformly random ones undone.

Shapes: B rows, T positions, P of a prefix, C columns of a canvas, V vocabulary; n positions that are
asked about, flat, row by row.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from softar.placement import evaluating
from softar.soft import soft_embed
from softar.training import inside_forward

from .duo import tau_at
from .head import SoftMaskHead, mix_belief
from .losses import (
    divisor,
    forward_masked,
    masked_ce,
    normal_rows,
    own_guesses,
    uniform_rows,
    weights_of,
)
from .masking import NOISES, at_least_one, even_levels, units_of
from .net import Facts, parts
from .noise import UniformNoise
from .sft_config import DiffusionSFTConfig
from .uniform import Noisy, alphabet, draw_hard, draw_soft, uniform_loss
from .unmasked import CanvasReader

REPLACEMENT, GAUSSIAN, LEVEL, GUESS, CANVAS = 1, 2, 3, 4, 5  # streams of random numbers


class Rows(NamedTuple):
    """A batch as the objectives see it."""

    ids: Tensor  # [B, T]
    maskable: Tensor  # [B, T] bool, the tokens that are trained
    mask: Tensor | None  # [B, T], as `forward_masked` takes it; None: no padding, a document a row
    documents: Tensor  # [B, T], as `doubled` takes them


class Place(NamedTuple):
    """Where a micro-batch lies: what is drawn for it depends on this and the seed alone, so that a
    resumed run, other micro-batches or another number of processes draw the same."""

    step: int
    rows: list[int]  # of the step's global batch
    of: int  # rows in it
    training: bool
    progress: float  # share of the training that is done


class Loss(NamedTuple):
    total: Tensor  # [], to be divided by what `count` counts
    share: Tensor  # [], of the positions that are noisy
    logits: Tensor
    nothing: Tensor | float = 0.0  # added for DDP, which wants every parameter


def levels_of(
    args: DiffusionSFTConfig, place: Place, own: Tensor, units: Tensor, maskable: Tensor
) -> Tensor:
    """The level in [0, 1) of each token's unit: own [B, 1], that of the first one of a row where
    they are drawn one by one, units [B, T] and maskable [B, T] bool -> [B, T]."""
    if args.antithetic and place.training:
        common = float(uniform_rows(args.seed, place.step, [2**31 - 2], 1))
        level = even_levels(common, place.rows, place.of, units, maskable)
    elif args.packing or args.noise_level == "block":
        more = uniform_rows(args.seed, place.step, place.rows, units.shape[1] - 1, stream=LEVEL)
        level = torch.cat([own, more.to(own.device)], 1)
    else:
        return own.expand(units.shape)
    return level.gather(1, units)


def rates_of(args: DiffusionSFTConfig, levels: Tensor) -> Tensor:
    """How likely a token is noise: (1 - eps) t + eps, t between the ends of the configuration."""
    time = args.time_low + (args.time_high - args.time_low) * levels
    return (1 - args.noise_eps) * time + args.noise_eps


class Masked:
    """Tokens are masked and predicted (LLaDA, arXiv:2502.09992). With a head a share of the steps
    reads the rows twice, the second time with masks that show the belief of the first pass
    (arXiv:2510.17206, section 4.2); with on-policy guesses a share of the rows shows the most likely
    tokens of a first pass in their place (DMax's OPUT, arXiv:2604.08302)."""

    share = "masked"  # what the noisy positions are called in logs

    def __init__(self, args: DiffusionSFTConfig, facts: Facts, head: SoftMaskHead | None):
        self.args, self.facts, self.head = args, facts, head

    def draw(self, rows: Rows, place: Place) -> dict[str, Tensor]:
        """The noise of a batch: `rate` [B, T] and `masked` [B, T]; and `guesses` [B], the rows whose
        masks show what the model takes them for."""
        args, maskable = self.args, rows.maskable
        numbers = uniform_rows(args.seed, place.step, place.rows, maskable.shape[1] + 1)
        numbers = numbers.to(maskable.device)
        length = self.facts.block_length if args.noise_level == "block" else None
        units = units_of(rows.documents, length)
        rate = rates_of(args, levels_of(args, place, numbers[:, :1], units, maskable))
        masked = NOISES[args.noise](maskable, rate, numbers[:, 1:], units)
        if args.normalise == "masks":
            masked = at_least_one(masked, maskable, numbers[:, 1:], rows.documents)
        # an evaluation is about masks
        share = args.on_policy_prob if place.training else 0.0
        coins = uniform_rows(args.seed, place.step, place.rows, 1, stream=GUESS)[:, 0]
        return {"rate": rate, "masked": masked, "guesses": (coins < share).to(maskable.device)}

    def count(self, rows: Rows, drawn: dict[str, Tensor]) -> Tensor:
        asked = self._read(rows.maskable, drawn["masked"])[1]
        return divisor(rows.maskable, asked, rows.documents, self.args.normalise)

    def _read(self, maskable: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The masks of what is read, and what of it is asked about, each [B, T], or [2 B, T]: with
        complementary masks each row is read again, with the masks where there were none
        (Fast-dLLM v2, arXiv:2509.26328)."""
        if self.args.complementary:
            masked = torch.cat([masked, maskable & ~masked])
        every = maskable.repeat(len(masked) // len(maskable), 1)
        return masked, every if self.args.whole_answer else masked

    def loss(
        self, model: nn.Module, unwrapped: nn.Module, rows: Rows, drawn: dict, place: Place
    ) -> Loss:
        args, facts, guesses = self.args, self.facts, drawn["guesses"]
        weights = weights_of(drawn["rate"], rows.maskable, rows.documents, args.normalise)
        masked, asked = self._read(rows.maskable, drawn["masked"])
        ids, mask = rows.ids, rows.mask
        if args.complementary:
            ids, weights, guesses = (torch.cat([x, x]) for x in (ids, weights, guesses))
            mask = None if mask is None else torch.cat([mask, mask])
        twice = self._reads_twice(place)

        # PEFT hands its argument on by the name that a model has for it, with others beside.
        def forward(input_ids: Tensor, **_) -> tuple[Tensor, Tensor | float]:
            """Inside the wrapper's forward, where DDP and FSDP have the parameters at hand."""
            net = parts(unwrapped)
            embeds = net.embedding(input_ids)
            if twice:
                with evaluating(unwrapped):  # as decoding believes
                    mixed = mix_belief(self.head, net, facts, embeds, mask, masked, ids)
                embeds = embeds.masked_scatter(masked[..., None], mixed.to(embeds.dtype))
            elif args.on_policy_prob and place.training:
                with evaluating(unwrapped):
                    tokens = own_guesses(net, facts, embeds, mask, masked, ids)
                shown = input_ids.masked_scatter(masked, tokens)
                embeds = net.embedding(torch.where(guesses[:, None], shown, input_ids))
            _, logits = forward_masked(net, facts, embeds, mask, asked, ids)
            # DDP wants each parameter in what the forward returns, the head's in a hard step too.
            nothing = 0.0 if self.head is None else sum(0.0 * p for p in self.head.parameters())
            return logits, nothing

        noisy = ids.masked_fill(masked, facts.mask_id)
        logits, nothing = inside_forward(model, unwrapped, forward, noisy)
        total = (masked_ce(logits, ids[asked]) * weights[asked]).sum()
        return Loss(total, masked.float().mean(), logits, nothing)

    def _reads_twice(self, place: Place) -> bool:
        """Does this step read its rows twice? All of its micro-batches do, or none."""
        if self.head is None or not place.training:
            return self.head is not None
        coin = uniform_rows(self.args.seed, place.step, [2**31 - 1], 1)
        return float(coin) < self.args.softmasking_prob


class Uniform:
    """Tokens are replaced by random ones, and every token of the answer is predicted: the right ones
    do not show (arXiv:2506.10892)."""

    share = "replaced"

    def __init__(self, args: DiffusionSFTConfig, facts: Facts, noise: UniformNoise, device):
        self.args, self.facts, self.noise = args, facts, noise
        self.letters = alphabet(noise, facts.vocab_size, device)

    def draw(self, rows: Rows, place: Place) -> dict[str, Tensor]:
        """Nothing before the loss, whose count does not depend on it."""
        return {}

    def count(self, rows: Rows, drawn: dict[str, Tensor]) -> Tensor:
        return divisor(rows.maskable, rows.maskable, rows.documents, self.args.normalise)

    def loss(
        self, model: nn.Module, unwrapped: nn.Module, rows: Rows, drawn: dict, place: Place
    ) -> Loss:
        """About every maskable position, each of weight 1."""
        (ids, maskable, mask, documents), letters = rows, self.letters
        if bool((wrong := letters.number[ids].lt(0) & maskable).any()):
            raise ValueError(
                f"a completion holds token {int(ids[wrong][0])}, which objective='uniform' leaves out (the mask, or "
                f"padding): take it out of the data, or pad with another token"
            )
        noisy = self.corrupt(ids, maskable, place)

        def forward(input_ids: Tensor, **_) -> tuple[Tensor, Tensor]:
            net = parts(unwrapped)
            embeds = net.embedding(input_ids)
            if noisy.soft is not None:
                mixed = soft_embed(noisy.soft, net.embedding).to(embeds.dtype)
                embeds = embeds.masked_scatter(maskable[..., None], mixed)
            return forward_masked(net, self.facts, embeds, mask, maskable)

        which, logits = inside_forward(model, unwrapped, forward, noisy.ids)
        each = uniform_loss(
            self.args.uniform_loss,
            logits,
            ids[maskable],
            noisy.ids[maskable],
            noisy.alpha[which],
            noisy.dalpha[which],
            letters,
            scaled=self.args.view_scale,
        )
        ones = torch.ones_like(ids, dtype=torch.float32)
        weights = weights_of(ones, maskable, documents, self.args.normalise)
        total = (each * weights[maskable]).sum()
        return Loss(total, (noisy.ids != ids).float().mean(), logits)

    def corrupt(self, ids: Tensor, maskable: Tensor, place: Place) -> Noisy:
        """An evaluation is always about hard tokens: its losses can be compared over the
        training."""
        args, step, rows = self.args, place.step, place.rows
        numbers = uniform_rows(args.seed, step, rows, ids.shape[1] + 1).to(ids.device)
        level = levels_of(args, place, numbers[:, :1], torch.zeros_like(ids), maskable)[:, 0]
        t = args.time_low + (args.time_high - args.time_low) * level
        tau = 0.0
        if place.training and args.curriculum:
            done = min(1.0, place.progress)
            tau = tau_at(done, args.tau_start, args.tau_end, args.curriculum)
        if tau:
            U = len(self.letters.ids)
            noise = normal_rows(args.seed, step, rows, maskable, U, stream=GAUSSIAN).to(ids.device)
            return draw_soft(ids, maskable, t, noise, tau, args.gaussian(U), self.letters)
        tokens = uniform_rows(args.seed, step, rows, ids.shape[1], stream=REPLACEMENT)
        return draw_hard(
            ids, maskable, t, numbers[:, 1:], tokens.to(ids.device), self.letters, self.noise.eps
        )


class Canvases:
    """DiffusionGemma's: of each answer one canvas, drawn evenly, under uniformly random tokens and
    behind all that stands before it. Every token of the canvas is predicted, those that show
    themselves and the end tokens behind the answer too, in the mean of all. A share of the rows
    reads what a first pass without gradient believed (self-conditioning, arXiv:2208.04202)."""

    share = "replaced"

    def __init__(self, args: DiffusionSFTConfig, facts: Facts):
        self.args, self.facts = args, facts

    def draw(self, rows: Rows, place: Place) -> dict[str, Tensor]:
        """Nothing before the loss, whose count does not depend on it."""
        return {}

    def count(self, rows: Rows, drawn: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(rows.ids), device=rows.ids.device)

    def loss(
        self, model: nn.Module, unwrapped: nn.Module, rows: Rows, drawn: dict, place: Place
    ) -> Loss:
        args, (V, C) = self.args, (self.facts.vocab_size, self.facts.block_length)
        which, told = self._numbers(place, 2, rows, stream=CANVAS).unbind(1)
        prefix, real, clean = canvases_of(rows, C, which, self.facts.eos_id)
        numbers = self._numbers(place, C + 1, rows)
        unit, all_of_it = torch.zeros_like(clean), torch.ones_like(clean, dtype=torch.bool)
        rate = rates_of(args, levels_of(args, place, numbers[:, :1], unit, all_of_it))
        tokens = (self._numbers(place, C, rows, stream=REPLACEMENT) * V).long().clamp_max(V - 1)
        noisy = torch.where(numbers[:, 1:] < rate, tokens, clean)
        every = torch.ones(len(clean), dtype=torch.bool, device=clean.device)

        def forward(input_ids: Tensor, **_) -> Tensor:
            net, P = parts(unwrapped), prefix.shape[1]
            reader, belief = CanvasReader(net, real, P + C, by_column=False), None
            reader.store(prefix, P)
            reader.open(P + C)
            if args.self_conditioning_prob:
                with torch.no_grad(), evaluating(unwrapped):
                    belief = reader(input_ids, None, every).view(-1, C, V)
                belief = belief.to(net.body.dtype)
            return reader(input_ids, belief, every, told < args.self_conditioning_prob)

        logits = inside_forward(model, unwrapped, forward, noisy)
        total = masked_ce(logits, clean.flatten()).sum() / C
        return Loss(total, (noisy != clean).float().mean(), logits)

    def _numbers(self, place: Place, columns: int, rows: Rows, *, stream: int = 0) -> Tensor:
        numbers = uniform_rows(self.args.seed, place.step, place.rows, columns, stream=stream)
        return numbers.to(rows.ids.device)


def canvases_of(rows: Rows, C: int, which: Tensor, end_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """A canvas of each answer, the share `which` [B] in [0, 1) of the way through it -> what stands
    before it [B, P], padded on the left, what of that is no padding [B, P] bool, and the canvas
    [B, C], with end tokens behind the answer. The first token of a row is always before it.

    Raises ValueError for a row whose trained tokens are not its last ones.
    """
    lengths = (rows.documents >= 0).sum(1)
    first = rows.maskable.long().argmax(1)
    if bool((several := first + rows.maskable.sum(1) != lengths).any()):
        raise ValueError(
            f"row {int(several.nonzero()[0])} of the batch goes on behind its answer, and objective='canvas' trains "
            f"the end of a row: give prompt and completion"
        )
    first = first.clamp_min(1)
    number = ((lengths - first + C - 1) // C).clamp_min(1)
    start = first + torch.minimum((which * number).long(), number - 1) * C
    P, column = int(start.max()), torch.arange(rows.ids.shape[1] + C, device=rows.ids.device)
    before = column[:P] - (P - start)[:, None]
    prefix = rows.ids.gather(1, before.clamp_min(0))
    inside = start[:, None] + column[:C]
    tokens = rows.ids.gather(1, inside.clamp_max(rows.ids.shape[1] - 1))
    return prefix, before >= 0, torch.where(inside < lengths[:, None], tokens, end_id)
