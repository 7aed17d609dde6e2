"""THE autoregressive loop: a language model that reads back what a mixer makes of its own
distribution.

`generate` is the front door; `soft_decode` is the loop itself in the form that transformers'
`model.generate` takes as `custom_generate=`. Soft everywhere or only in the thinking span, then a
discrete answer; hard decoding is the case of one token of weight 1. transformers prepares inputs,
cache, processors and stopping criteria, so whatever works with `model.generate` works here.

Shapes: B batch, P prompt length, T steps, V vocabulary, K tokens kept, D embedding width.
"""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from fastcore.meta import delegates
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .checks import override
from .config import TAGS, SoftConfig, renamed
from .mixers import Rng, mk_mixer
from .models.reading import check_reads_mixtures, check_rows
from .soft import Soft, check_dist, entropy, soft_inputs
from .thought import Draws, Kind, Record, begin, decide, look, mk_propose, mk_rules, stack

# What generate's own settings must not decide: `SoftConfig` does. Sampling is switched on, with
# neutral values: what is None generate fills from the model's configuration, and without do_sample
# it warns of it; the loop drops the warpers.
SAMPLING = (
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)
OVERRIDES = dict(
    max_length=None,
    min_length=None,
    do_sample=True,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    typical_p=1.0,
    epsilon_cutoff=0.0,
    eta_cutoff=0.0,
    num_beams=1,
    num_return_sequences=1,
    use_cache=True,
    return_dict_in_generate=True,
)


@dataclass(frozen=True)
class SoftOutput:
    sequences: Tensor  # [B, P + T] int64: the prompt and the tokens that stand for the steps
    record: Record
    prompt_length: int
    # [B] int64, steps before the answer begins; 0 where the configuration has no separate thought
    answer_start: Tensor
    num_forwards: int  # NFE: forward passes of the model, the prompt's included
    token_forwards: int  # positions computed in them, over all rows, padding included
    seconds: float

    @property
    def completions(self) -> Tensor:
        """[B, T] the generated part of `sequences`."""
        return self.sequences[:, self.prompt_length :]

    @property
    def answers(self) -> list[Tensor]:
        """Per row the tokens after the thought, without padding."""
        rows = zip(self.completions, self.record.kind, self.answer_start.tolist(), strict=True)
        return [tokens[start:][kind[start:] != Kind.PAD] for tokens, kind, start in rows]


@delegates(SoftConfig)
# Wide because five of these are those of model.generate, passed on.
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    config: SoftConfig | None = None,
    rng: Rng = None,
    callback: Callable[[dict], None] | None = None,
    tokenizer=None,
    streamer=None,
    logits_processor: Sequence | None = None,
    stopping_criteria: Sequence | None = None,
    generation_config: GenerationConfig | None = None,
    **kwargs,
) -> SoftOutput:
    """Decode softly.

    Args:
        model: a causal LM of transformers, plain or wrapped by PEFT.
        input_ids: [B, P] prompts, padded on the left. attention_mask: [B, P]; None means no
            padding.
        config: what is fed back, where, and for how long. Default: SoftConfig().
        rng: torch.Generator for every draw, or one per row; a row with its own generator decodes
            the same alone and in a batch. None uses torch's global one.
        callback: called after each step with {"step", "record" (Record of [B, ...]), "sequences"
            ([B, P + step + 1])}.
        tokenizer: needed only where config names think_start or think_end as text, or for stop
            strings.
        streamer: a transformers streamer; gets the tokens that stand for the steps.
        logits_processor, stopping_criteria: lists of transformers', applied as in `model.generate`.
        generation_config: end-of-sequence and pad ids, penalties, cache implementation; default the
            model's own. Its sampling settings and lengths do not count: `config` alone says how a
            step is chosen.
        kwargs: fields of SoftConfig by name, which override those of `config`:
            generate(model, **inputs, mixer="gumbel", top_k=10).

    Returns:
        SoftOutput. Rows end at their EOS token and are padded to the longest.

    Raises:
        ValueError, TypeError: bad configuration or inputs, before the first forward.
        FloatingPointError: NaN or infinite logits; names the step and the rows.
    """
    config = override(config or SoftConfig(), renamed(kwargs), generate).resolve(tokenizer)
    _check_inputs(input_ids, attention_mask)
    if attention_mask is not None:
        check_rows(model, attention_mask)  # the loop below sees nothing of PEFT's wrapper
    settings = copy.deepcopy(generation_config or model.generation_config)
    settings.update(**OVERRIDES, max_new_tokens=config.max_new_tokens)
    stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
    if settings.stop_strings is not None:  # generate keeps the tokenizer from a custom loop
        stopping_criteria.append(StopStringCriteria(tokenizer, settings.stop_strings))
        settings.stop_strings = None
    return model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList(logits_processor or []),
        stopping_criteria=stopping_criteria,
        custom_generate=functools.partial(
            soft_decode, soft_config=config, rng=rng, callback=callback, soft_streamer=streamer
        ),
    )


# Wide because transformers calls it with these.
def soft_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    soft_config: SoftConfig | None = None,
    rng: Rng = None,
    callback: Callable[[dict], None] | None = None,
    soft_streamer=None,
    **model_kwargs,
) -> SoftOutput | Tensor:
    """The loop, for `model.generate(**inputs, custom_generate=softar.soft_decode,
    soft_config=SoftConfig(...))`.

    Length, EOS, processors and criteria come from generate's own arguments; sampling settings do
    not count. Returns the sequences, or the SoftOutput with return_dict_in_generate=True. A
    streamer has to be passed as soft_streamer: generate keeps the one named streamer from a custom
    loop.
    """
    started = time.perf_counter()
    config = (soft_config or SoftConfig()).resolve(None)
    _check_inputs(input_ids, model_kwargs.get("attention_mask"))
    _check_model(model, config, input_ids, model_kwargs)
    if wants_hidden := mk_mixer(config.mixer).hidden:
        model_kwargs["output_hidden_states"] = True
    processors = LogitsProcessorList(p for p in logits_processor if not isinstance(p, SAMPLING))
    propose = mk_propose(config, Draws(rng, len(input_ids)))
    pad, eos = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    rules, progress = mk_rules(config, input_ids.device, pad, eos), begin(config, input_ids)
    if soft_streamer is not None:
        soft_streamer.put(input_ids.cpu())

    prompt_length, positions = input_ids.shape[1], input_ids.numel()
    forwards = -(-prompt_length // (generation_config.prefill_chunk_size or prompt_length))
    records: list[Record] = []
    any_thinking = bool(progress.thinking.any())
    # The underscored methods are how transformers' own loops prefill and go on
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        step = len(records)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        h = entropy(logits, config.temperature or 1.0)
        scores = processors(input_ids, logits)
        hidden = outputs.hidden_states[-1][:, -1] if wants_hidden else None
        thought, answer = propose(scores, step, any_thinking, hidden)
        progress, record = decide(rules, progress, h, thought, answer)
        records.append(record)
        input_ids = torch.cat([input_ids, record.token[:, None]], 1)
        progress = progress._replace(done=progress.done | stopping_criteria(input_ids, None))
        finished, any_soft, any_thinking = look(progress, record, step)
        if soft_streamer is not None:
            soft_streamer.put(record.token.cpu())
        if callback is not None:
            callback({"step": step, "record": record, "sequences": input_ids})
        if finished:
            break
        mixed = _mix(model, record, config.rescale) if any_soft else None
        outputs = _forward(model, input_ids, mixed, model_kwargs)
        forwards, positions = forwards + 1, positions + len(input_ids)
    if soft_streamer is not None:
        soft_streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    cost = forwards, positions, time.perf_counter() - started
    return SoftOutput(input_ids, stack(records), prompt_length, progress.answer_start, *cost)


def _mix(model, record: Record, rescale: str | None) -> dict[str, Tensor]:
    """What a step reads next, as arguments of the forward, [B, 1, ...]."""
    soft = Soft(record.ids[:, None], record.weights[:, None])
    return soft_inputs(model, soft, rescale=rescale)


def _forward(model, input_ids: Tensor, mixed: dict[str, Tensor] | None, model_kwargs: dict):
    """Of the last token or, where there are any, of mixtures [B, 1, ...] in its place."""
    inputs = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=1, is_first_iteration=False, **model_kwargs
    )
    if mixed is not None:  # the step is prepared as one of a token: Mamba's cache is told by it
        inputs = inputs | {"input_ids": None} | mixed
    return model(**inputs, return_dict=True)


def _check_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)}, {input_ids.dtype}: need [B, P] integers"
        )
    if input_ids.numel() == 0:  # a prompt given as inputs_embeds alone looks the same
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)} is an empty prompt: start from a BOS token"
        )
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit input_ids of {tuple(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    if empty := (~mask.any(1)).nonzero()[:, 0].tolist():
        raise ValueError(
            f"attention_mask leaves rows {empty} an empty prompt: start from a BOS token"
        )
    if holed := (mask[:, :-1] & ~mask[:, 1:]).any(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"attention_mask has padding on the right in rows {holed}: set tokenizer.padding_side='left'"
        )


def _check_model(model, config: SoftConfig, input_ids: Tensor, model_kwargs: dict) -> None:
    """Raise ValueError for a model that cannot read mixtures, or these rows."""
    name, mask = type(model).__name__, model_kwargs.get("attention_mask")
    check_reads_mixtures(model)
    check_rows(model, torch.ones_like(input_ids) if mask is None else mask)
    if not model_kwargs["use_cache"]:
        raise ValueError(
            "use_cache=False: soft inputs live in the KV cache only; set use_cache=True"
        )
    if model.training and model.is_gradient_checkpointing:
        raise ValueError(
            f"{name} is in training mode with gradient checkpointing, which drops the cache: call eval()"
        )
    vocab = model.config.get_text_config(decoder=True).vocab_size
    check_dist(vocab, **config.filters)
    check_dist(vocab, **config.answer_filters)
    for name in TAGS:
        ids = getattr(config, name)
        if any(not 0 <= i < vocab for i in ids or ()):
            raise ValueError(
                f"{name}={ids} must be token ids below {vocab}, the model's vocabulary"
            )
