"""THE masked-diffusion loop: a model fills the masks of a canvas, a few in each forward.

A canvas is a batch of sequences that hold mask tokens: prompts with `gen_length` masks behind them,
templates with masks anywhere, or both. Blocks are decoded from left to right; in each forward the
model sees the canvas, the selector scores its proposals, the schedule says which of them commit,
and the softener what the remaining masks show next time. Caches narrow the forward to a window.
Logits are computed for the positions that something is asked of, and no others.

Shapes: B rows, P prompt length, L columns of the canvas, V vocabulary, D width; n positions, flat,
row by row.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastcore.meta import delegates
from torch import Tensor, nn
from transformers.generation.streamers import TextDiffusionStreamer

from softar.checks import override
from softar.mixers import Rng
from softar.soft import Soft, check_dist

from .config import DenoiseConfig
from .net import Facts, Parts, facts, parts
from .parity import DEFAULT, PARITY, Quirks, gumbel_scores
from .reader import Reader
from .schedules import SCHEDULES, Block, Rule, Step, remask
from .select import SELECTORS, Belief, Draws, believed, filtered, perturb, propose
from .soften import Slots, Softener, mk_softener
from .uniform import Redraw, check_uniform, one_block, random_tokens


@dataclass(frozen=True)
class DenoiseOutput:
    sequences: Tensor  # [B, L] int64
    prompt_length: int  # columns of input_ids; with gen_length = 0 all of them
    # [B, L] int64, the forward (from 0) that decided each token; -1 where none did. Of a
    # uniform-state model the last one that changed it, 0 where the token it began with was kept
    committed_at: Tensor
    confidence: Tensor  # [B, L] float32, the probability it had then; NaN where none decided it
    # NFE: forward passes; one over conditional and unconditional rows together counts once
    num_forwards: int
    token_forwards: int  # positions computed in them, over all rows, padding included
    seconds: float
    # canvases [B, L] before each forward, and the last; with history=True
    states: list[Tensor] | None

    @property
    def completions(self) -> Tensor:
        """[B, L - P] the generated part of `sequences`."""
        return self.sequences[:, self.prompt_length :]


@delegates(DenoiseConfig)
@torch.no_grad()
def denoise(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    config: DenoiseConfig | None = None,
    rng: Rng = None,
    callback: Callable[[dict], None] | None = None,
    streamer=None,
    history: bool = False,
    **kwargs,
) -> DenoiseOutput:
    """Fill masks.

    Args:
        model: from `softar.diffusion.load`, plain or wrapped by PEFT. A uniform-state model (Duo,
            arXiv:2506.10892) begins with random tokens in place of the masks and redraws them all
            in each of `steps` forwards, the last time greedily; `temperature` is that of its belief
            about the clean token, 1 the process itself.
        input_ids: [B, P] prompts, padded on the left; mask tokens in them are filled, too.
        attention_mask: [B, P]; None means no padding.
        config: Default: DenoiseConfig().
        rng: torch.Generator for every draw, or one per row; a row with its own generator decodes
            the same alone and in a batch. None uses torch's global one.
        callback: called after each forward with {"step" (from 0), "block" (start, end), "sequences"
            [B, L], "committed" [B, L] bool, "confidence" [B, L] (NaN where nothing was asked),
            "where" [B, L] bool and "soft" (Soft [n, K]): which slots were given a mixture for the
            next forward, and which, None for none}.
        streamer: a transformers streamer, for one row: finished blocks are put; a
            TextDiffusionStreamer gets the canvas of each forward as a draft.
        history: keep the canvas before each forward.
        kwargs: fields of DenoiseConfig by name, which override those of `config`:
            denoise(model, **inputs, steps=8, soften="soft-token").

    Returns:
        DenoiseOutput.

    Raises:
        ValueError, TypeError: bad configuration or inputs, before the first forward.
        FloatingPointError: NaN logits; names the forward.
    """
    started = time.perf_counter()
    known, net = facts(model), parts(model)
    config = override(config or DenoiseConfig(), kwargs, denoise).as_trained(known.soft_mask)
    quirks = DEFAULT if config.parity is None else PARITY[config.parity]
    if known.uniform is not None:
        check_uniform(config)
    real = _check(model, known, net, config, input_ids, attention_mask)
    end_ids = known.end_ids if config.end_ids is None else config.end_ids

    canvas = _Canvas(input_ids, config.gen_length, known.mask_id)
    reader = Reader(net, known, config, real, canvas.given)
    softener = mk_softener(config.soften, **config.soften_args)
    draws = Draws(rng, len(input_ids), input_ids.device)
    beliefs = _Beliefs(config, known, quirks, softener, end_ids, draws)
    if known.uniform is None:
        step, blocks = _step, _blocks(config, quirks, canvas.masked)
    else:
        step, blocks = _redraw, one_block(config, canvas.masked)
        canvas.ids = random_tokens(
            canvas.ids, canvas.masked, known.uniform, known.vocab_size, draws
        )
    # what is left of it is not streamed as generated
    tail = canvas.ids.shape[1] - config.gen_length
    if streamer is not None:
        streamer.put(input_ids.cpu())

    states = [canvas.ids] if history else None
    for start, end, steps in blocks:
        block = canvas.begin(start, end, steps)
        rule = beliefs.rule(block)
        if not softener.carries:
            reader.forget()
        for index in itertools.count():
            if not rule.more(index, canvas.look(reader.forwards)):
                break
            seen = step(canvas, reader, beliefs, softener, quirks, block, rule, index)
            if history:
                states.append(canvas.ids)
            if callback is not None:
                callback(seen)
            if isinstance(streamer, TextDiffusionStreamer):
                streamer.put_draft(canvas.ids[:, tail:].cpu())
        if config.early_stop and end_ids:
            canvas.stop(end_ids)
            if history:
                states[-1] = canvas.ids
        if streamer is not None and end > tail:
            streamer.put(canvas.ids[:, max(start, tail) : end].cpu())
    if streamer is not None:
        streamer.end()
    seconds = time.perf_counter() - started
    return DenoiseOutput(
        canvas.ids,
        tail,
        canvas.committed_at,
        canvas.confidence,
        reader.forwards,
        reader.positions,
        seconds,
        states,
    )


def _step(
    canvas: "_Canvas",
    reader: "Reader",
    beliefs: "_Beliefs",
    softener: Softener,
    quirks: Quirks,
    block: Block,
    rule: Rule,
    index: int,
) -> dict:
    """One forward and what follows from it -> what the callback is told."""
    lo, hi = reader.window(block.start, block.end, whole=index == 0, look_back=quirks.looks_back)
    reach = {"block": (block.start, block.end), "before": (lo, block.end), "canvas": (lo, hi)}[
        quirks.competes
    ]
    is_open = canvas.masked & canvas.columns(*reach)
    asked = is_open
    if beliefs.everywhere:
        asked = asked | (canvas.masked & canvas.columns(lo, hi))
    if softener.decoded:
        asked = asked | (canvas.decoded & canvas.columns(lo, hi))
    busy = is_open.any(-1) | (not quirks.waits)  # a row that waits for others stays as it is
    asked = asked & busy[:, None]
    rows, cols = asked.nonzero(as_tuple=True)
    belief, token, score, prob = beliefs(reader(canvas.ids, lo, hi, rows, cols), asked, is_open)

    proposal = canvas.ids.index_put((rows, cols), token)
    certain = canvas.spread(prob, rows, cols)
    order = beliefs.reorder(canvas.spread(score, rows, cols), is_open)
    commit, drop = rule(Step(index, order, is_open, canvas.decoded, canvas.confidence))
    if softener.revises:
        commit = commit | (
            canvas.decoded & (certain > canvas.confidence) & (proposal != canvas.mask_id)
        )
    canvas.commit(commit, drop, proposal, certain, reader.forwards - 1)
    canvas.bad = (score + prob).isnan().any()  # some selectors look at no logit

    where = soft = None
    if softener.fn is not None and len(rows):
        masked = canvas.masked[rows, cols]
        share = canvas.share_left(of_batch=quirks.batch_share)[rows]
        slots = Slots(
            belief, canvas.ids[rows, cols], masked, share, canvas.mask_id, reader.net.embedding
        )
        shows = masked | (softener.decoded & canvas.decoded[rows, cols])
        where, soft = reader.soften(softener.fn(slots), shows, rows, cols, (lo, hi), busy)
    return {
        "step": reader.forwards - 1,
        "block": (block.start, block.end),
        "sequences": canvas.ids,
        "committed": commit,
        "confidence": certain.masked_fill(~asked, torch.nan),
        "where": where,
        "soft": soft,
    }


def _redraw(
    canvas: "_Canvas",
    reader: "Reader",
    beliefs: "_Beliefs",
    softener: Softener,
    quirks: Quirks,
    block: Block,
    rule: Redraw,
    index: int,
) -> dict:
    """The same for a uniform-state model: every slot is drawn anew, in the rows that have a step
    left."""
    asked = canvas.masked & rule.busy(index)[:, None]
    rows, cols = asked.nonzero(as_tuple=True)
    logits = reader(canvas.ids, 0, canvas.ids.shape[1], rows, cols)
    token, prob = rule(index, logits, canvas.ids[rows, cols], rows, beliefs.draws.at(asked))
    proposal = canvas.ids.index_put((rows, cols), token)
    certain = canvas.spread(prob, rows, cols)
    changed = asked if index == 0 else asked & (proposal != canvas.ids)
    canvas.put(changed, proposal, certain, reader.forwards - 1)
    canvas.bad = prob.isnan().any()
    return {
        "step": reader.forwards - 1,
        "block": (block.start, block.end),
        "sequences": canvas.ids,
        "committed": changed,
        "confidence": certain.masked_fill(~asked, torch.nan),
        "where": None,
        "soft": None,
    }


class _Canvas:
    """The sequences, and what is known of each of their positions."""

    def __init__(self, input_ids: Tensor, gen_length: int, mask_id: int):
        tail = input_ids.new_full((len(input_ids), gen_length), mask_id)
        self.mask_id = mask_id
        # [B, L]; never written to, so that it can be handed out
        self.ids = torch.cat([input_ids, tail], 1).long()
        self.masked = self.ids == mask_id  # of a uniform-state model: what was a mask at the start
        self.given = ~self.masked
        self.at_start = self.masked.sum(-1)
        self.committed_at = torch.full_like(self.ids, -1)
        self.confidence = torch.full(self.ids.shape, torch.nan, device=self.ids.device)
        self.decoded = torch.zeros_like(self.masked)  # in the current block
        self.bad = self.masked.new_zeros(())  # the last forward gave NaN

    def begin(self, start: int, end: int, steps: Tensor) -> Block:
        self.block = start, end
        self.decoded = torch.zeros_like(self.masked)
        return Block(start, end, self.masked[:, start:end].sum(-1), steps)

    def look(self, forwards: int) -> bool:
        """Has the block masks? The synchronisation of a step."""
        left, bad = torch.stack([self.masked[:, slice(*self.block)].any(), self.bad]).tolist()
        if bad:
            raise FloatingPointError(
                f"the logits of forward {forwards - 1} are NaN: check the weights and the dtype, try float32"
            )
        return left

    def columns(self, lo: int, hi: int) -> Tensor:
        """[L] bool, true in [lo, hi)."""
        index = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (index >= lo) & (index < hi)

    def spread(self, values: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """[n] -> [B, L], -inf elsewhere."""
        return torch.full_like(self.confidence, -torch.inf).index_put((rows, cols), values)

    def put(self, where: Tensor, tokens: Tensor, certain: Tensor, forward: int) -> None:
        self.ids = torch.where(where, tokens, self.ids)
        self.confidence = torch.where(where, certain, self.confidence)
        self.committed_at = self.committed_at.masked_fill(where, forward)

    def commit(
        self, commit: Tensor, drop: Tensor | None, proposal: Tensor, certain: Tensor, forward: int
    ) -> None:
        self.put(commit, proposal, certain, forward)
        if drop is not None:
            self.ids = self.ids.masked_fill(drop, self.mask_id)
        self.masked = self.ids == self.mask_id
        self.decoded = (self.decoded | commit) & ~self.masked & self.columns(*self.block)

    def share_left(self, *, of_batch: bool) -> Tensor:
        """[B] masks left, as a share of those at the start."""
        if of_batch:
            return (self.masked.sum() / self.at_start.sum()).expand(len(self.ids))
        return self.masked.sum(-1) / self.at_start.clamp_min(1)

    def stop(self, end_ids: tuple[int, ...]) -> None:
        """Fill the rows that hold an end token of their own, up to the current block, with the
        first of those."""
        here = self.ids[:, : self.block[1]]
        ended = torch.isin(here, here.new_tensor(end_ids)) & ~self.given[:, : self.block[1]]
        rest = self.masked & ended.any(-1, keepdim=True)
        self.ids = self.ids.masked_fill(rest, end_ids[0])
        self.masked = self.masked & ~rest


class _Beliefs:
    """Turns logits into proposals and scores, and makes the rules that decide with them."""

    def __init__(
        self,
        config: DenoiseConfig,
        known: Facts,
        quirks: Quirks,
        softener: Softener,
        end_ids,
        draws: Draws,
    ):
        self.config, self.known, self.quirks, self.draws = config, known, quirks, draws
        self.end_ids = end_ids
        self.select = SELECTORS[config.select] if isinstance(config.select, str) else config.select
        # A surplus of the blog's pyramid spills on masks outside the block.
        self.everywhere = softener.everywhere or config.parity == "pyramid"
        self.with_entropy = config.select == "entropy" or config.soften == "soft-mask"
        self.is_filtered = (
            config.temperature > 0 or config.top_k is not None or config.top_p is not None
        )

    def rule(self, block: Block) -> Rule | Redraw:
        if self.known.uniform is not None:
            return Redraw(block, self.config, self.known.uniform, self.known.vocab_size)
        if self.quirks.rule is not None:
            make = self.quirks.rule
        elif self.config.remask is not None:
            make = remask
        else:
            name = self.config.schedule_name
            make = SCHEDULES[name] if isinstance(name, str) else name
        return make(block, self.config, self.draws)

    def __call__(
        self, logits: Tensor, asked: Tensor, is_open: Tensor
    ) -> tuple[Belief, Tensor, Tensor, Tensor]:
        """logits [n, V] of the positions `asked`, in place -> belief, proposals, scores and
        probabilities [n]."""
        config, known = self.config, self.known
        if not self.quirks.proposes_mask:
            logits[:, known.mask_id] = torch.finfo(logits.dtype).min
        if config.ban_eos and known.eos_id is not None:
            logits[:, known.eos_id] = torch.finfo(logits.dtype).min
        belief = scored = Belief(logits, with_entropy=self.with_entropy)
        dist = None
        if self.quirks.whole_noise and config.temperature > 0:
            uniform = self.draws.whole((*asked.shape, logits.shape[-1]))[asked]
            token = gumbel_scores(logits, uniform, config.temperature).argmax(-1)
        else:
            if self.is_filtered and config.temperature > 0:
                dist = self._filtered(logits)
            token = propose(belief, dist, lambda: self.draws.at(asked))
        if self.quirks.filtered_score and self.is_filtered:
            scored = believed(self._filtered(logits) if dist is None else dist, known.vocab_size)
        is_end = (
            torch.isin(token, token.new_tensor(self.end_ids))
            if config.ends_last and self.end_ids
            else None
        )
        if is_end is not None and self.quirks.renormalised_ends:
            at = list(self.end_ids) if config.temperature == 0 else list(self.end_ids[1:])
            scored = Belief(
                logits.index_fill(-1, torch.tensor(at, device=logits.device), -torch.inf)
            )
        score = self.select(scored, token, lambda: self._random(asked)).float()
        prob = (
            score if self.select is SELECTORS["confidence"] else belief.prob(token[:, None])[:, 0]
        )
        if is_end is not None and not self.quirks.renormalised_ends:
            score = score.masked_fill(is_end, torch.finfo(score.dtype).min)
        return belief, token, score, prob

    def _filtered(self, logits: Tensor) -> Soft:
        c = self.config
        return filtered(
            logits, c.temperature or 1.0, c.top_k, c.top_p, top_p_first=self.quirks.filtered_score
        )

    def reorder(self, score: Tensor, is_open: Tensor) -> Tensor:
        if self.config.alg_temp == 0:
            return score
        return perturb(score, is_open, self.config.alg_temp, self.draws).masked_fill(
            ~is_open, -torch.inf
        )

    def _random(self, asked: Tensor) -> Tensor:
        if self.quirks.whole_noise:
            return self.draws.whole(tuple(asked.shape), torch.float32)[asked]
        return self.draws.at(asked)


def _blocks(config: DenoiseConfig, quirks: Quirks, masked: Tensor) -> list[tuple[int, int, Tensor]]:
    """(start, end, steps [B]) of each block, from left to right.

    Blocks are counted from the right end, so that they lie where they would for a row alone, and
    those without a mask in any row are left out. A row shares its steps among the blocks that it
    has masks in.
    """
    L = masked.shape[1]
    if quirks.one_block:
        return [(0, L, masked.new_full((len(masked),), config.steps or 1, dtype=torch.long))]
    if config.parity is not None:
        b = config.block_length or config.gen_length
        n = config.gen_length // b
        steps = masked.new_full(
            (len(masked),), (config.steps or config.gen_length) // n, dtype=torch.long
        )
        return [(L - (n - k) * b, L - (n - k - 1) * b, steps) for k in range(n)]
    b = config.block_length or config.gen_length or L
    edges = [max(0, L - k * b) for k in range(-(-L // b), -1, -1)]
    # [B, blocks]
    counts = torch.stack([masked[:, lo:hi].sum(-1) for lo, hi in itertools.pairwise(edges)], -1)
    mine = (counts > 0).sum(-1).clamp_min(1)
    if config.steps is not None and (short := (config.steps < mine).nonzero()[:, 0].tolist()):
        raise ValueError(
            f"steps={config.steps} cannot be shared by the {int(mine.max())} blocks of rows {short}: give at least "
            f"{int(mine.max())}, or a larger block_length"
        )
    out = []
    for k, (lo, hi) in enumerate(itertools.pairwise(edges)):
        if counts[:, k].any():
            steps = counts[:, k].clamp_min(1) if config.steps is None else config.steps // mine
            out.append((lo, hi, steps))
    return out


def _check(
    model, known: Facts, net: Parts, config: DenoiseConfig, input_ids: Tensor, attention_mask
) -> Tensor:
    """Raise ValueError for inputs that don't fit; -> [B, L] bool, what is not padding."""
    shape = tuple(input_ids.shape)
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids of shape {shape}, {input_ids.dtype}: need [B, P] integers")
    if not config.gen_length and not (input_ids == known.mask_id).any():
        raise ValueError(
            f"gen_length=0 and no mask in input_ids: put the mask token (id {known.mask_id}) where text is wanted"
        )
    L = shape[1] + config.gen_length
    if shape[1] == 0 and known.shift:
        raise ValueError(f"input_ids of shape {shape} is an empty prompt: start from a BOS token")
    room = model.config.max_position_embeddings if "max_position_embeddings" in model.config else L
    if L > room:
        raise ValueError(
            f"a prompt of {shape[1]} and gen_length={config.gen_length} do not fit into the model's {room} positions"
        )
    check_dist(known.vocab_size, config.temperature, config.top_k, config.top_p)
    if config.cache is not None and not net.can_cache:
        raise ValueError(
            f"cache={config.cache!r}: {type(model).__name__} keeps no keys and values; use cache=None"
        )
    k = config.soften_args.get("k", 1)
    if isinstance(config.soften, str) and k > known.vocab_size:
        raise ValueError(f"soften_args k={k} must be at most {known.vocab_size}, the vocabulary")
    ends = config.end_ids or ()
    if any(not 0 <= i < known.vocab_size or i == known.mask_id for i in ends):
        raise ValueError(
            f"end_ids={ends} must be ids below {known.vocab_size}, the vocabulary, and not the mask's"
        )
    real = torch.ones((shape[0], L), dtype=torch.bool, device=input_ids.device)
    if attention_mask is None:
        return real
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit input_ids of {shape}"
        )
    mask = attention_mask.bool()
    if known.shift and (empty := (~mask.any(1)).nonzero()[:, 0].tolist()):
        raise ValueError(
            f"attention_mask leaves rows {empty} an empty prompt: start from a BOS token"
        )
    if holed := (mask[:, :-1] & ~mask[:, 1:]).any(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"attention_mask has padding on the right in rows {holed}: pad on the left"
        )
    if (input_ids == known.mask_id).logical_and(~mask).any():
        raise ValueError(
            f"padding holds the mask token (id {known.mask_id}): pad with another token"
        )
    real[:, : shape[1]] = mask
    return real
