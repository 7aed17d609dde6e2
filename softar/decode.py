"""THE autoregressive loop: a language model that reads back what a mixer makes of its own
distribution.

`generate` is the front door; `soft_decode` is the loop itself in the form that transformers'
`model.generate` takes as `custom_generate=`. Soft everywhere or only in the thinking span, then a
discrete answer; hard decoding is the case of one token of weight 1. transformers prepares inputs,
cache, processors and stopping criteria, so whatever works with `model.generate` works here.

Shapes: B batch, P prompt length, T steps, V vocabulary, K tokens kept, D embedding width.
"""

import copy
import dataclasses
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
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from . import guard
from .caches import check_cache, check_room, forward_of, set_cache, unread_by
from .checks import check_fields, check_values
from .config import SoftConfig, renamed
from .defaults import chosen, recall
from .draws import Draws
from .feedback import (
    feed_gated,
    feed_vectors,
    load_gate,
    mean_length,
    stack_vectors,
    step_temperature_of,
    to_host,
    width_of,
)
from .looks import Looks, every_of, flags_of, need_of_each_step
from .loops import run_loop
from .mixers import Rng, mk_mixer
from .models.kind import plain, uncompiled
from .models.origin import origin_of
from .models.reading import cache_in, check_ragged
from .placement import evaluating
from .processors import asked_of, check_given, leaves_none
from .soft import Soft, soft_inputs
from .step import KNOWN, compiled, is_over, mk_step, separate
from .thought import Kind, Record, begin, mk_rules, stack, warn_unopened


@dataclass(frozen=True, repr=False)
class SoftOutput:
    """What was decoded, and what each step read."""

    sequences: Tensor  # [B, P + T] int64: the prompt and the tokens that stand for the steps
    record: Record
    prompt_length: int
    # [B] int64, steps before the answer begins; 0 where the configuration has no separate thought
    answer_start: Tensor
    num_forwards: int  # NFE: forward passes of the model, the prompt's included
    token_forwards: int  # positions computed in them, over all rows, padding included
    seconds: float
    config: SoftConfig | None = None  # by which it was decoded; None: not known
    why: str = ""  # this one, for people
    # [B, T, D] float16 on the host: what steps of kind LATENT read, 0 elsewhere; None without any
    vectors: Tensor | None = None
    # [B, T, K] float32, Mixed.perturbed of the first K slots of steps of kind SOFT, -inf elsewhere;
    # None of mixers without
    perturbed: Tensor | None = None

    def __repr__(self) -> str:
        """Short: shapes and counts, not the tensors."""
        kinds = {kind.name: int((self.record.kind == kind).sum()) for kind in Kind}
        counts = ", ".join(f"{n} {name}" for name, n in kinds.items() if n)
        rows, width = self.sequences.shape
        how = None if self.config is None else self.config.shown
        return (
            f"SoftOutput({rows} x {width} ids, the prompt's {self.prompt_length} included; "
            f"steps: {counts}; answers from step {self.answer_start.tolist()}; {self.num_forwards} "
            f"forwards, {self.seconds:.2f} s; {self.why}: {how})"
        )

    @property
    def completions(self) -> Tensor:
        """[B, T] the generated part of `sequences`."""
        return self.sequences[:, self.prompt_length :]

    @property
    def answers(self) -> list[Tensor]:
        """Per row the tokens after the thought, without those of PAD and LATENT steps: whole ones.
        softar.answer_texts also has what the last token of a tag that is text holds behind the tag."""
        rows = zip(self.completions, self.record.is_token, self.answer_start.tolist(), strict=True)
        return [tokens[start:][said[start:]] for tokens, said, start in rows]

    @property
    def num_tokens(self) -> Tensor:
        """[B] int64, tokens generated: steps of kind LATENT are none."""
        return self.record.is_token.sum(1)

    @property
    def row_forwards(self) -> Tensor:
        """[B] int64, forwards up to the last step of each row by itself. Not of beams, which are
        counted where they are searched."""
        # forwards before the first token, but one
        prefill = self.num_forwards - self.record.kind.shape[1]
        return prefill + (self.record.kind != Kind.PAD).sum(1)


@delegates(SoftConfig)
# Wide because five of these are those of model.generate, passed on.
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    config: SoftConfig | dict | None = None,
    rng: Rng = None,
    callback: Callable[[dict], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: guard.Streamer | None = None,
    logits_processor: Sequence[Callable] | None = None,
    stopping_criteria: Sequence[Callable] | None = None,
    generation_config: GenerationConfig | None = None,
    cache_implementation: str | None = None,
    compile: bool = False,
    look_every: int | None = None,
    **kwargs,
) -> SoftOutput:
    """Decode softly.

    Args:
        model: a causal LM of transformers, plain or wrapped by PEFT. As in transformers, what
            torch.compile(model) wraps is run uncompiled; model.forward may be compiled.
        input_ids: [B, P] prompts, padded on the left, each with the configuration's prompt_prefix
            in it, where it has one. attention_mask: [B, P]; None means no padding, and what looks
            like it is an error, or of a pad token that texts hold, too, a warning.
        config: what is fed back, where, and for how long, as a SoftConfig or a dict of its fields.
            Default: as the model's soft_config.json says; without one softly between its think
            tags; else in narrow, noisy mixtures for the first half, then discretely
            (softar.defaults). `config` and `why` of the output say which it was.
        rng: torch.Generator for every draw, or one per row; a row with its own generator decodes
            the same alone and in a batch. None uses torch's global one.
        callback: called after each step with {"step", "record" (Record of [B, ...]), "sequences"
            ([B, P + step + 1]), "vector" ([B, D], or None: what rows of kind LATENT read next)}.
        tokenizer: for think_start and think_end as text, for stop strings, and to find think tags;
            only of a model that `softar.load` did not open, which remembers its own.
        streamer: a transformers streamer; gets the tokens that stand for the steps.
        logits_processor, stopping_criteria: lists of transformers', applied as in `model.generate`,
            but that those which penalise or ban what was said (a repetition penalty, n-grams, bad
            words) see neither the padding before a prompt nor the pad tokens of latent steps.
        generation_config: end-of-sequence and pad ids, penalties, the cache's settings; default the
            model's own. What is set there and not followed (beams, sampling, lengths, scores, ...)
            is an error; of the model's own, `config` alone says how a step is chosen.
        cache_implementation: transformers' name of the cache: "dynamic", "static" (of one size
            from the beginning), "offloaded", "offloaded_static", "quantized"; default as
            generation_config says.
        compile: compile the forward of a step by torch.compile, over a cache of one size
            (cache_implementation="static"); the prompt is read uncompiled, in parts too. It takes a
            minute or so, once for a model, a width of the batch and a size of the cache. What is
            around the forward (filters, mixer, rules, record) is compiled with it, once for a
            configuration and a width; not of "dirichlet", of mixers that are not softar's, and with
            a step_temperature. generation_config may say how (compile_config). What does not compile
            is warned of, and decodes all the same.
        look_every: steps after which the host looks at the batch, waiting for the device. More than
            1 decodes the same (up to that many forwards too many, which are dropped and not
            counted), where no callback, streamer, stopping criterion of its own, vector or generator
            of several rows needs each step. Default: 8 on an accelerator where nothing does, else 1.
        kwargs: fields of SoftConfig by name, which override those of `config` or of the default:
            generate(model, **inputs, mixer="gumbel", top_k=10).

    Returns:
        SoftOutput. Rows end at their EOS token and are padded to the longest. The model decodes
        without dropout, whatever mode it is in.

    Raises:
        ValueError, TypeError: bad configuration or inputs, before the first forward.
        FloatingPointError: NaN or infinite logits; names the step and the rows.
    """
    model = uncompiled(model)
    guard.check_causal(model)
    guard.check_prompts(input_ids, attention_mask)
    check_values(generate, callback=callback, tokenizer=tokenizer, streamer=streamer)
    check_values(generate, logits_processor=logits_processor, stopping_criteria=stopping_criteria)
    check_given(logits_processor)
    check_values(generate, generation_config=generation_config, compile=compile)
    check_values(generate, cache_implementation=cache_implementation, look_every=look_every)
    if attention_mask is None:
        guard.check_unpadded(model, input_ids, tokenizer)
    else:
        check_ragged(model, attention_mask)
    own, tokenizer = plain(model).generation_config, tokenizer or origin_of(model).tokenizer
    fields = check_fields(SoftConfig, renamed(kwargs), generate)
    config, why = chosen(config, fields, lambda: recall(model, tokenizer, fields.get("mixer")))
    config = config.resolve(tokenizer)
    guard.check_prefix(input_ids, config, tokenizer)
    settings = copy.deepcopy(generation_config or own)
    guard.check_followed(settings, own, also=guard.ALONE)
    name = cache_implementation or settings.cache_implementation or own.cache_implementation
    set_cache(model, settings, name, compile)
    settings.update(**guard.OVERRIDES, max_new_tokens=config.max_new_tokens)
    loop = functools.partial(
        soft_decode,
        soft_config=config,
        rng=rng,
        callback=callback,
        soft_streamer=streamer,
        look_every=look_every,
        why=why,
    )
    return run_loop(
        model,
        loop,
        input_ids,
        torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        settings,
        tokenizer=tokenizer,
        processors=logits_processor or (),
        stops=stopping_criteria or (),
    )


# Long and wide because transformers calls it with these, and it is the loop.
def soft_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    soft_config: SoftConfig | dict | None = None,
    rng: Rng = None,
    callback: Callable[[dict], None] | None = None,
    soft_streamer: guard.Streamer | None = None,
    look_every: int | None = None,
    why: str | None = None,
    **model_kwargs,
) -> SoftOutput | Tensor:
    """The loop, for `model.generate(**inputs, custom_generate=softar.soft_decode,
    soft_config=SoftConfig(...))`.

    Length, EOS, processors and criteria come from generate's own arguments; where these give no
    length, soft_config's counts. What of them is not followed (beams, an assistant, scores, ...) is
    an error; stop strings are for `generate`. Returns the sequences, or the SoftOutput with
    return_dict_in_generate=True. Without soft_config it is the model's default, see `generate`; a
    streamer may be soft_streamer's, too. The caller's own cache then holds the prompt and
    all new tokens but the last, so that each step is looked at.
    """
    started = time.perf_counter()
    asked = guard.callers_arguments(model)
    guard.check_call(model, input_ids, generation_config, model_kwargs, asked)
    check_cache(model, generation_config)
    guard.check_rng(rng)
    check_values(soft_decode, callback=callback, soft_streamer=soft_streamer)
    check_values(soft_decode, look_every=look_every)
    config, reason = chosen(soft_config, {}, lambda: recall(model))
    config = config.resolve(origin_of(model).tokenizer)
    if why is None:  # else `generate` has looked
        guard.check_prefix(input_ids, config, origin_of(model).tokenizer)
    guard.check_reads(model, config, input_ids, model_kwargs)
    # nobody gave generate a length
    if asked.get("has_default_max_length") and generation_config.max_new_tokens is None:
        length = generation_config.max_length = input_ids.shape[1] + config.max_new_tokens
        others = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria)]
        stopping_criteria = StoppingCriteriaList([*others, MaxLengthCriteria(length)])
    guard.check_positions(model, input_ids, generation_config, model_kwargs)
    check_room(cache_in(model_kwargs), generation_config.max_length - 1)
    forward = forward_of(model, generation_config, model_kwargs)
    # one graph for all steps: where mixtures may come, tokens are read as such, which is the same
    always_mixes = forward is not model and (config.is_soft or config.is_latent)
    if config.switch is not None:  # the shares of its tags fade over the whole length
        length = generation_config.max_length - input_ids.shape[1]
        config = dataclasses.replace(config, max_new_tokens=length)
    step_temperature = step_temperature_of(config, model)
    if wants_hidden := mk_mixer(config.mixer).hidden or step_temperature is not None:
        model_kwargs["output_hidden_states"] = True
    read_next, length = _mk_reader(model, config), None
    if config.is_latent and config.rescale is not None:
        length = mean_length(
            model.get_input_embeddings(),
            model.config.get_text_config(decoder=True).vocab_size,
            input_ids.device,
        )
    silent: list[Tensor] = []  # of each step the rows [B] of which no token stands for it
    mask = model_kwargs.get("attention_mask")
    processors = asked_of(logits_processor, input_ids, mask, silent if config.is_latent else None)
    others = StoppingCriteriaList(c for c in stopping_criteria if type(c) not in KNOWN)
    pad, eos = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    rules, progress = mk_rules(config, input_ids.device, pad, eos), begin(config, input_ids)
    draws, progress = Draws(rng, len(input_ids)), separate(progress)
    take_step = mk_step(config, rules, stopping_criteria, step_temperature, length)
    if forward is not model:
        take_step = compiled(take_step, config, generation_config.compile_config)
    streamers = [each for each in (soft_streamer, asked.get("streamer")) if each is not None]
    keeps = guard.gives_cache(asked)
    need = need_of_each_step(config, rng, callback, streamers, others, keeps)
    every = every_of(look_every, input_ids.device, need)
    looks = Looks(config, bool(progress.thinking.any()), every)
    if soft_streamer is not None:  # generate has put the prompt into its own
        soft_streamer.put(input_ids.cpu())

    prompt_length = input_ids.shape[1]
    given, chunk_size = model_kwargs.get("past_key_values"), generation_config.prefill_chunk_size
    unread = unread_by(given if keeps else None, prompt_length, chunk_size)
    positions, forwards = len(input_ids) * unread, -(-unread // (chunk_size or unread))
    records: list[Record] = []
    vectors, noisy = [], []  # of each step a tensor, or None
    # transformers compiles the reading of a prompt in parts: a graph for each of their sizes
    as_prompt = copy.copy(generation_config)
    as_prompt.disable_compile = True
    # The underscored methods are how transformers' own loops prefill and go on
    with evaluating(model):
        outputs = model._prefill(input_ids, as_prompt, model_kwargs)
        while True:
            step = len(records)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            logits = outputs.logits[:, -1].to(
                copy=True,
                dtype=torch.float32,
                device=input_ids.device,
                memory_format=torch.contiguous_format,
            )
            # copied like the logits: the next step of a CUDA graph writes to where they are
            hidden = outputs.hidden_states[-1][:, -1].clone() if wants_hidden else None
            # a processor may write to what it gets, of which the entropy is another
            scores = logits
            if processors:
                scores = processors(input_ids, logits.clone())
                logits = logits.masked_fill(leaves_none(scores)[:, None], torch.nan)  # named later
            draw = functools.partial(draws.at, step)
            stepped = take_step(progress, logits, scores, draw, looks.now.any_thinking, hidden)
            progress, record, flags, vector, perturbed = stepped
            records.append(record)
            silent.append(record.kind == Kind.LATENT)
            input_ids = torch.cat([input_ids, record.token[:, None]], 1)
            if others:  # they judge tokens, which a step of kind LATENT does not have
                ended = others(input_ids, None) & ~silent[-1]
                progress = progress._replace(done=progress.done | ended)
                flags = flags_of(progress, record)
            looks(flags, record, is_over(stopping_criteria, input_ids.shape[1]))
            vectors.append(to_host(vector, silent[-1]))
            noisy.append(perturbed)
            has_token = vector is None or not bool(silent[-1].all())
            for each in streamers if has_token else ():
                each.put(record.token.cpu())
            if callback is not None:
                told = {"step": step, "record": record, "sequences": input_ids, "vector": vector}
                callback(told)
            if looks.now.finished:
                break
            mixed = read_next(record, vector) if always_mixes or looks.now.any_soft else None
            outputs = forward(**_inputs(model, input_ids, mixed, model_kwargs), return_dict=True)
    records, noisy = looks.taken(records, noisy)
    input_ids = input_ids[:, : prompt_length + len(records)]
    forwards += len(records) - 1
    positions += (len(records) - 1) * len(input_ids)
    for each in streamers:
        each.end()
    if config.think_start is not None:
        warn_unopened(config, progress)
    if not generation_config.return_dict_in_generate:
        return input_ids
    counts = progress.answer_start, forwards, positions, time.perf_counter() - started
    how, read = (config, why or reason), (stack_vectors(vectors), stack_vectors(noisy, -torch.inf))
    return SoftOutput(input_ids, stack(records), prompt_length, *counts, *how, *read)


def _mk_reader(model, config: SoftConfig) -> Callable[..., dict[str, Tensor]]:
    """A function of a step's record and vectors [B, D]: what it reads next, as arguments of the
    forward, [B, 1, ...]."""
    if config.gate is not None:
        gate = load_gate(config.gate, width_of(model), model.device)

    def read(record: Record, vector: Tensor | None) -> dict[str, Tensor]:
        soft = Soft(record.ids, record.weights)
        if vector is not None:
            return feed_vectors(model, record.token, vector, record.kind == Kind.LATENT)
        if config.gate is not None:
            return feed_gated(model, soft, record.token, gate, record.kind == Kind.SOFT)
        return soft_inputs(model, Soft(*(x[:, None] for x in soft)), rescale=config.rescale)

    return read


def _inputs(model, input_ids: Tensor, mixed: dict[str, Tensor] | None, model_kwargs: dict) -> dict:
    """Arguments of a forward of the last token or, where there are any, of mixtures [B, 1, ...] in
    its place."""
    inputs = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=1, is_first_iteration=False, **model_kwargs
    )
    if mixed is not None:  # the step is prepared as one of a token: Mamba's cache is told by it
        inputs = inputs | {"input_ids": None} | mixed
    return inputs
