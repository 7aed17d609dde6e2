"""THE masked-diffusion loop: a model fills the masks of a canvas, a few in each forward.

A canvas is a batch of sequences that hold mask tokens: prompts with `gen_length` masks behind them,
templates with masks anywhere, or both. How it is decoded is a process of the model's kind
(`process.py`): blocks one after the other, and forwards in each until it is done. Logits are
computed for the positions that something is asked of, and no others.

Shapes: B rows, P prompt length, L columns of the canvas, V vocabulary, D width; n positions, flat,
row by row.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from fastcore.meta import delegates
from torch import Tensor, nn
from transformers.generation.streamers import TextDiffusionStreamer

from softar.checks import check_fields, check_values, made
from softar.guard import Streamer, check_ids, check_unpadded
from softar.mixers import Rng
from softar.models import room_of
from softar.placement import evaluating
from softar.soft import check_dist

from .block_causal import BlockCausal
from .canvas import Canvas
from .config import DenoiseConfig
from .inputs import real_of, warn_of_ends
from .masked import Masked
from .net import Facts, Parts, facts, parts, plain
from .process import Process
from .record import Recorder, Trajectory, check_recordable
from .renoised import PARITY as RENOISED
from .renoised import Renoised
from .schedules import Block
from .select import Draws
from .uniform import Uniform


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
    store_forwards: int  # those of them that store keys and values and decide nothing
    # [B] int64: of each row those that it needed, which are those of the row alone, and those of them
    # that store. With parity= those that there were until it needed none: public rows do not wait
    row_forwards: Tensor
    row_stores: Tensor
    # positions computed in them, over the rows that something was asked of, padding included
    token_forwards: int
    seconds: float
    # canvases [B, L] before each forward, and the last; with history=True
    states: list[Tensor] | None
    trajectory: Trajectory | None = None  # with record=True

    @property
    def completions(self) -> Tensor:
        """[B, L - P] the generated part of `sequences`."""
        return self.sequences[:, self.prompt_length :]


def first_end(ids: Sequence[int], end_ids: Collection[int]) -> int:
    """Where the first end token stands, behind which nothing belongs to an answer, whatever was
    decided there; their number where none does."""
    return next((i for i, token in enumerate(ids) if token in end_ids), len(ids))


# Wide because a caller may want each of four things beside what is decoded, and none is of the others
@delegates(DenoiseConfig, but=["dilation", "eps"])
@torch.no_grad()
def denoise(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    config: DenoiseConfig | dict | None = None,
    rng: Rng = None,
    callback: Callable[[dict], None] | None = None,
    streamer: Streamer | None = None,
    history: bool = False,
    record: bool = False,
    **kwargs,
) -> DenoiseOutput:
    """Fill masks.

    Args:
        model: from `softar.diffusion.load`, plain or wrapped by PEFT; in eval mode for the call,
            so that no dropout takes part. A uniform-state model (Duo,
            arXiv:2506.10892) begins with random tokens in place of the masks and redraws them all
            in each of `steps` forwards, the last time greedily; `temperature` is that of its belief
            about the clean token, 1 the process itself. DiffusionGemma has no mask either: see
            renoised.py.
        input_ids: [B, P] prompts, padded on the left; mask tokens in them are filled, too.
        attention_mask: [B, P]; None means no padding, and what looks like it is an error, or of a pad
            token that texts hold, too, a warning.
        config: a DenoiseConfig, or a dict of its fields. Default: DenoiseConfig().
        rng: torch.Generator for every draw, or one per row; a row with its own generator decodes
            the same alone and in a batch. None uses torch's global one.
        callback: called after each forward with {"step" (from 0), "block" (start, end), "sequences"
            [B, L], "committed" [B, L] bool, "confidence" [B, L] (NaN where nothing was asked),
            "entropy" (a function -> [B, L] nats, of the model's belief about what was committed,
            NaN elsewhere, to be called at once: it holds the logits, and is taken away), "where"
            [B, L] bool and "soft" (Soft [n, K]): which slots were given a mixture for the next
            forward, and which, None for none}.
        streamer: a transformers streamer, for one row: finished blocks are put; a
            TextDiffusionStreamer gets the canvas of each forward as a draft.
        history: keep the canvas before each forward.
        record: keep what `softar.diffusion.replay` needs to score what was drawn: which forward
            decided each token, and the mixtures that it read. Refused for decodes whose draws have
            no probability of their own (`record.check_recordable`).
        kwargs: fields of DenoiseConfig by name, which override those of `config`:
            denoise(model, **inputs, steps=8, soften="soft-token").

    Returns:
        DenoiseOutput.

    Raises:
        ValueError, TypeError: bad configuration or inputs, before the first forward.
        FloatingPointError: logits that are NaN, or -inf for every token; names the forward and the
            rows.
    """
    started = time.perf_counter()
    model_facts, net = facts(model), parts(model)
    check_ids("input_ids", input_ids, 2, model_facts.vocab_size, "softar.diffusion.denoise")
    check_values(denoise, callback=callback, streamer=streamer, history=history, record=record)
    fields = check_fields(DenoiseConfig, kwargs, denoise)
    config = DenoiseConfig() if config is None else made(DenoiseConfig, config)
    config = replace(config, **fields)
    config = config.as_trained(model_facts)
    _check(model, model_facts, net, config, input_ids)
    if attention_mask is None:
        check_unpadded(model, input_ids)
    real = real_of(model, model_facts, input_ids, attention_mask)
    _check_padding(model_facts, real)
    if not config.gen_length:
        warn_of_ends(model, model_facts, input_ids, real)
    draws = Draws(rng, len(input_ids), input_ids.device)
    how = dict(record=True) if record else {}
    if record:
        check_recordable(config, model_facts)
    mk_process = _process_of(model_facts, config)
    process = mk_process(config, net, model_facts, input_ids, real, draws, **how)
    blocks = process.blocks()

    audience = Audience(process.canvas, callback, streamer, history)
    audience.begin(input_ids)
    with evaluating(model):
        for block in blocks:
            process.begin(block)
            audience.before_forwards(process.reader.forwards)
            index = 0
            while process.more(block, index):
                audience.before_forwards(process.reader.forwards + 1)
                audience.after_step(process.step(block, index))
                index += 1
            process.end(block)
            audience.before_forwards(process.reader.forwards)
            audience.after_block(block)
    audience.before_forwards(process.reader.forwards + 1)
    audience.end()
    recorder = process.recorder if record else None
    return _output(process, audience.states, recorder, time.perf_counter() - started)


def _output(
    process: Process, states: list[Tensor] | None, recorder: Recorder | None, seconds: float
) -> DenoiseOutput:
    canvas = process.canvas
    width = canvas.width
    return DenoiseOutput(
        canvas.ids[:, :width],
        canvas.prompt_length,
        canvas.committed_at[:, :width],
        canvas.confidence[:, :width],
        process.reader.forwards,
        len(process.reader.stores),
        process.row_forwards,
        process.row_stores,
        process.reader.positions,
        seconds,
        states and [ids[:, :width] for ids in states],
        recorder and recorder.trajectory(),
    )


class Audience:
    """Those who are told what happens on the canvas: a callback, a streamer, and the history."""

    def __init__(self, canvas: Canvas, callback: Callable | None, streamer, history: bool):
        self.canvas, self.callback, self.streamer = canvas, callback, streamer
        # what is left of it is not streamed as generated
        self.tail = self.streamed = canvas.prompt_length
        self.states = [] if history else None

    def begin(self, input_ids: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())

    def before_forwards(self, forwards: int) -> None:
        """So many forwards will have been made on the canvas as it is."""
        while self.states is not None and len(self.states) < forwards:
            self.states.append(self.canvas.ids)

    def after_step(self, report: dict) -> None:
        if self.callback is not None:  # whatever it writes into, the canvas stays as it is
            told = report | {"sequences": report["sequences"].clone()}
            self.callback(told)
            told["entropy"] = None  # whoever keeps what was told keeps no logits
        if isinstance(self.streamer, TextDiffusionStreamer):
            self.streamer.put_draft(self.canvas.ids[:, self.tail : self.canvas.width].clone().cpu())

    def after_block(self, block: Block) -> None:
        end = min(block.end, self.canvas.width)
        if self.streamer is not None and end > self.streamed:
            new = self.canvas.ids[:, max(block.start, self.streamed) : end]
            self.streamer.put(new.clone().cpu())
            self.streamed = end

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _process_of(facts: Facts, config: DenoiseConfig) -> Callable[..., Process]:
    if facts.mask_id is None:
        return Renoised
    if facts.uniform is not None:
        return Uniform
    by_blocks = facts.block_length is not None or config.quirks.blocks
    return BlockCausal if by_blocks else Masked


def _check(model, facts: Facts, net: Parts, config: DenoiseConfig, input_ids: Tensor) -> None:
    """Raise ValueError for what the model cannot do with these inputs."""
    shape = tuple(input_ids.shape)
    has_mask = facts.mask_id is not None
    if has_mask:
        _check_masked(config)
    elif (input_ids == (image := plain(model).config.image_token_id)).any():
        raise ValueError(
            f"input_ids hold the image token (id {image}), and softar reads text alone: leave it out"
        )
    if has_mask and not config.gen_length and not (input_ids == facts.mask_id).any():
        raise ValueError(
            f"gen_length=0 and no mask in input_ids: put the mask token (id {facts.mask_id}) where text is wanted"
        )
    if shape[1] == 0 and (facts.shift or not has_mask):
        raise ValueError(f"input_ids of shape {shape} is an empty prompt: start from a BOS token")
    _check_room(model, facts, config, shape[1])
    check_dist(facts.vocab_size, 1.0, config.top_k, config.top_p)
    if config.cache not in (None, "off") and not net.can_cache:
        raise ValueError(
            f"cache={config.cache!r}: {type(model).__name__} keeps no keys and values; leave it out"
        )
    if config.sub_block_length and facts.block_length is None and not config.quirks.blocks:
        raise ValueError(
            f"sub_block_length={config.sub_block_length} is for block-causal models, and {type(model).__name__} reads "
            f"the whole canvas: give a block_length"
        )
    if config.cache == "exact" and facts.block_length is None:
        raise ValueError(
            f"cache='exact' is for block-causal models, and {type(model).__name__} reads the whole canvas: choose "
            f"'prefix' or 'dual', which are approximate"
        )
    if config.grid == "end" and (facts.block_length is None or not has_mask):
        raise ValueError(
            f"grid='end' is for block-causal models, and {type(model).__name__} has no blocks of its own: leave it out"
        )
    k = config.soften_args.get("k", 1)
    if isinstance(config.soften, str) and k > facts.vocab_size:
        raise ValueError(f"soften_args k={k} must be at most {facts.vocab_size}, the vocabulary")
    if not config.quirks.lenient:
        known = facts.end_ids if config.end_ids is None else config.end_ids
        for name, has in (("ban_eos", facts.eos_id), ("ends_last", known), ("early_stop", known)):
            if getattr(config, name) and not has and has != 0:
                raise ValueError(
                    f"{name}=True does nothing: {type(model).__name__} names no end token, give end_ids or set "
                    f"model.config.eos_token_id"
                )
    if any(not 0 <= i < facts.vocab_size for i in config.cfg_keep_ids or ()):
        raise ValueError(
            f"cfg_keep_ids={config.cfg_keep_ids} must be ids below {facts.vocab_size}, the vocabulary"
        )
    ends = config.end_ids or ()
    if any(not 0 <= i < facts.vocab_size or i == facts.mask_id for i in ends):
        raise ValueError(
            f"end_ids={ends} must be ids below {facts.vocab_size}, the vocabulary, and not the mask's"
        )


def _check_masked(config: DenoiseConfig) -> None:
    """Raise ValueError for what only a model without a mask can do."""
    if isinstance(config.temperature, (tuple, list)):
        raise ValueError(
            f"temperature={config.temperature} is for models that redraw every slot: give one number"
        )
    if config.stop is not None:
        raise ValueError(
            f"stop={config.stop!r} does not go with a model of masks, which is done when none is left: leave it out"
        )
    if config.parity == RENOISED:
        raise ValueError(f"parity={config.parity!r} is of a model without a mask: leave it out")


def _check_room(model, facts: Facts, config: DenoiseConfig, width: int) -> None:
    """Raise ValueError for prompts, of so many columns, that leave no room for the answer."""
    most, b = room_of(model, trained=True), facts.block_length or 1
    if most is not None and width > longest_prompt(facts, config, most):
        blocks = f" in blocks of {b}" if b > 1 else ""
        raise ValueError(
            f"a prompt of {width} and gen_length={config.gen_length} do not fit into the model's {most} "
            f"positions{blocks}"
        )


def longest_prompt(facts: Facts, config: DenoiseConfig, most: int) -> int:
    """Tokens that a prompt may have before gen_length others, in a model of `most` positions."""
    b = facts.block_length or 1
    # the grid begins with the prompt unless it is asked for behind it, canvases always behind it
    if facts.mask_id is not None and config.grid == "start":
        return most // b * b - config.gen_length
    return most + -config.gen_length // b * b


def _check_padding(facts: Facts, real: Tensor) -> None:
    """Raise ValueError for rows [B, P] that are all padding, where nothing can be said of their
    first slot, and that have it on the right. real: bool, what is not padding."""
    has_mask = facts.mask_id is not None
    if (facts.shift or not has_mask) and (empty := (~real.any(1)).nonzero()[:, 0].tolist()):
        raise ValueError(
            f"attention_mask leaves rows {empty} an empty prompt: start from a BOS token"
        )
    if holed := (real[:, :-1] & ~real[:, 1:]).any(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"attention_mask has padding on the right in rows {holed}: pad on the left"
        )
