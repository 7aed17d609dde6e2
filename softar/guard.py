"""What softar.generate and soft_decode refuse, and say, before the first forward.

Shapes: B batch, P prompt length.
"""

import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .checks import as_ids, check_least, check_value, shorten
from .config import TAGS, SoftConfig
from .feedback import check_reads_vectors
from .models.kind import check_autoregressive, plain
from .models.origin import origin_of
from .models.reading import cache_in, check_ragged, check_reads_mixtures, check_virtual_tokens
from .models.room import room_of
from .soft import check_dist

# What generate's own settings must not decide: `SoftConfig` does. Sampling is switched on, with
# neutral values: what is None generate fills from the model's configuration, and without do_sample
# it warns of it; the loop drops the warpers.
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
_SAMPLING = "SoftConfig says how tokens are chosen (temperature=, answer_temperature=, ...)"
_BEAMS = "there are no beams here: softar.make_decoder('beam:num_beams=4', ...) searches"
_ASSISTED = "tokens are decoded one after the other here, by one model"
_OUTPUTS = "callback= and the record of SoftOutput have what each step chose"
_CFG = "its second prompt would read tokens where the thought reads mixtures"
# The settings of transformers' generate that the loop does not follow -> why. What a model's own
# file says of them is no wish of the user's.
NOT_FOLLOWED: dict[str, str] = {
    **dict.fromkeys(
        "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split(), _SAMPLING
    ),
    **dict.fromkeys(
        "num_beams num_beam_groups diversity_penalty length_penalty early_stopping constraints "
        "force_words_ids low_memory".split(),
        _BEAMS,
    ),
    **dict.fromkeys(
        "penalty_alpha dola_layers use_mtp prompt_lookup_num_tokens max_matching_ngram_size "
        "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_early_exit "
        "assistant_confidence_threshold assistant_lookbehind target_lookbehind "
        "assistant_ensemble_weight speculation_type continuous_batching_config".split(),
        _ASSISTED,
    ),
    **dict.fromkeys(
        "output_scores output_logits output_attentions output_hidden_states".split(), _OUTPUTS
    ),
    "guidance_scale": _CFG,
    "remove_invalid_values": "logits that are no numbers end a decode, with their step and rows",
    "decoder_start_token_id": "a causal LM begins with its prompt",
}
# In softar.generate, which sets them itself, these as well
LENGTHS = dict.fromkeys(["max_length", "max_new_tokens", "min_length"], "give max_new_tokens=")
ALONE = LENGTHS | {"num_return_sequences": "repeat the prompt, with a generator for each row"}

PAD, OF_TEXTS = "pad_token_id", ("bos_token_id", "eos_token_id", "unk_token_id")


@runtime_checkable
class Streamer(Protocol):
    """What transformers' streamers are."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def check_followed(settings: GenerationConfig, own: GenerationConfig, also: Mapping = {}) -> None:
    """Raise ValueError for a setting of generate's that the loop would drop without a word.

    own: the model's. also: further names -> why.
    """
    usual = GenerationConfig._get_default_generation_params()
    theirs, wishes = own.to_dict(), settings.to_dict()
    for name, why in (NOT_FOLLOWED | also).items():
        value = wishes.get(name)
        known = [None, usual.get(name), OVERRIDES.get(name), theirs.get(name)]
        if not any(value is each or value == each for each in known):
            raise ValueError(f"{name}={value!r} is not followed in soft decoding: {why}")


def callers_arguments(model) -> dict[str, Any]:
    """Arguments of this model's `model.generate` around the function that calls this, whatever stands
    between the two; {} where there is none. transformers keeps the named ones from a custom loop, which could
    then only drop them, and has no other way to them."""
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, sys._getframe(2)
    while frame and not (frame.f_code is code and frame.f_locals["self"] is model):
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals)


def gives_cache(asked: dict) -> bool:
    """Does the call have a cache of the caller's, who may go on from it? asked: from
    `callers_arguments`."""
    return cache_in(asked.get("kwargs", {})) is not None


def check_call(
    model, input_ids, settings: GenerationConfig, model_kwargs: dict, asked: dict
) -> None:
    """Raise ValueError for what a call of model.generate asks of the loop that it does not do.

    asked: from `callers_arguments`.
    """
    if asked.get("assistant_model") is not None:
        raise ValueError(f"assistant_model= is not followed in soft decoding: {_ASSISTED}")
    if asked.get("synced_gpus"):
        raise ValueError(
            "synced_gpus=True is not followed in soft decoding: give each process a whole model"
        )
    check_causal(model)
    check_prompts(input_ids, model_kwargs.get("attention_mask"))
    check_followed(settings, model.generation_config)
    check_value("prefill_chunk_size", settings.prefill_chunk_size, int | None)
    check_least(settings, prefill_chunk_size=1)
    if settings.num_beams not in (None, 1):  # the model's own, and generate has multiplied the rows
        raise ValueError(
            f"num_beams={settings.num_beams} of the model: give num_beams=1 ({_BEAMS})"
        )


def check_prompts(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError for prompts that are no [B, P] integers, empty, or not padded on the left."""
    check_ids("input_ids", input_ids)
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask, "[B, P]", "softar.generate")
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


def check_unpadded(model, input_ids: Tensor, tokenizer=None, *, takes_mask: bool = True) -> None:
    """Of ids [B, T] without attention_mask: raise ValueError where rows begin or end with the pad
    token, which they would read as text. Where it is a token of texts, too (GPT-2's is its eos and
    bos), warn where rows have unlike numbers of it there. tokenizer: None is the one that `load`
    opened with the model; without one the pad token is the model's. takes_mask: can a mask be given?"""
    pad, texts = _pad_and_texts(plain(model), tokenizer or origin_of(model).tokenizer)
    if pad is None:
        return
    is_pad = (input_ids == pad).long()
    ends = torch.stack([each.cumprod(1).sum(1) for each in (is_pad, is_pad.flip(1))])
    if not ends.any():
        return
    rows = ends.any(0).nonzero()[:, 0].tolist()
    said = f"rows {rows[:8]} of input_ids begin or end with the pad token {pad}, and "
    if not takes_mask:
        if pad not in texts:
            raise ValueError(f"{said}it would be read as text: cut it off")
        return
    said += "without attention_mask it is read as text"
    remedy = "attention_mask=, as tokenizer(texts, padding=True) makes it"
    if pad not in texts:
        raise ValueError(f"{said}: give {remedy}, or torch.ones_like(input_ids) where it is meant")
    if (ends != ends[:, :1]).any():
        warnings.warn(f"{said}; where it is padding, give {remedy}", stacklevel=3)


def _pad_and_texts(model, tokenizer) -> tuple[int | None, set[int]]:
    """The pad token, where it is known, and special tokens that begin, end or stand in texts."""
    known = [model.generation_config.to_dict()] if model.can_generate() else []
    known += [model.config.get_text_config(decoder=True).to_dict()]
    if tokenizer is not None:
        known.insert(0, {name: getattr(tokenizer, name) for name in (PAD, *OF_TEXTS)})
    pads = [ids[PAD] for ids in known if ids.get(PAD) is not None]
    texts = {i for ids in known for name in OF_TEXTS for i in as_ids(ids.get(name)) or ()}
    return pads[0] if pads else None, texts


def check_prefix(input_ids: Tensor, config: SoftConfig, tokenizer) -> None:
    """Raise ValueError for a row of prompts [B, P] that lacks what the configuration says stands in
    each."""
    text = config.prompt_prefix
    if text is None:
        return
    if tokenizer is None:
        raise ValueError(
            f"prompt_prefix={text!r} is text: pass tokenizer=, or prompt_prefix=None where the ids hold it"
        )
    if rows := lacking(input_ids, text, tokenizer):
        raise ValueError(
            f"prompt_prefix={text!r} stands nowhere in rows {rows} of input_ids: put it before the prompts "
            "(softar.evaluate.read_prompts does), or decode without it, prompt_prefix=None"
        )


def lacking(input_ids: Tensor, text: str, tokenizer) -> list[int]:
    """The rows [B, P] without the text."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), device=input_ids.device)
    holds = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    if len(ids) <= input_ids.shape[1]:
        holds = (input_ids.unfold(1, len(ids), 1) == ids).all(-1).any(1)
    # tokens may join across its edges: then the decoded text shows it
    rows = (~holds).nonzero()[:, 0].tolist()
    return [i for i in rows if text not in tokenizer.decode(input_ids[i])]


def check_ids(
    name: str,
    ids: Tensor,
    dims: int = 2,
    vocab_size: int | None = None,
    call: str = "softar.generate",
) -> None:
    """Raise ValueError unless it is a tensor of so many dimensions that holds integers, and where
    the vocabulary is known ids in it. call: what they are given to."""
    shape = "[B, P]" if dims == 2 else "[T]"
    _check_tensor(name, ids, shape, call)
    if ids.dim() != dims or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} of shape {tuple(ids.shape)}, {ids.dtype}: need {shape} integers, int64 or int32"
        )
    if vocab_size is not None and ids.numel():
        check_range(name, *torch.stack(ids.aminmax()).tolist(), vocab_size)


def _check_tensor(name: str, value, shape: str, call: str) -> None:
    if isinstance(value, Tensor):
        return
    if isinstance(value, Mapping):
        hint = f"write {call}(model, **inputs)"
    elif isinstance(value, str):
        hint = f"write {call}(model, **tokenizer(text, return_tensors='pt'))"
    else:
        hint = f"give a tensor of ids {shape}, as tokenizer(texts, return_tensors='pt') makes it"
    raise ValueError(f"{name}={shorten(repr(value), 60)} of type {type(value).__name__}: {hint}")


def check_rng(rng) -> None:
    """Raise ValueError unless it is None, a torch.Generator, or a sequence of them."""
    several = rng if isinstance(rng, Sequence) and not isinstance(rng, str) else [rng]
    if rng is not None and not all(isinstance(each, torch.Generator) for each in several):
        raise ValueError(
            f"rng={shorten(repr(rng), 60)} must be a torch.Generator, such as torch.Generator().manual_seed(0), "
            f"or one for each row"
        )


def check_causal(model) -> None:
    """Raise ValueError for what is no causal LM of transformers, plain or wrapped by PEFT, or one
    whose virtual tokens PEFT would leave out."""
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not isinstance(
        inner := model if isinstance(model, PreTrainedModel) else _base(model), PreTrainedModel
    ):
        raise ValueError(
            f"model is a {name}: give a causal LM of transformers, such as softar.load opens"
        )
    name = type(inner).__name__
    check_autoregressive(inner)
    if not inner.can_generate():
        raise ValueError(f"{name} cannot generate: give a causal LM (AutoModelForCausalLM)")
    check_virtual_tokens(model)


def _base(model: nn.Module):
    from peft import PeftModel  # slow to import

    return plain(model) if isinstance(model, PeftModel) else None


def check_reads(model, config: SoftConfig, input_ids: Tensor, model_kwargs: dict) -> None:
    """Raise ValueError for a model that cannot read mixtures, or these rows."""
    mask = model_kwargs.get("attention_mask")
    check_reads_mixtures(model)
    check_ragged(model, torch.ones_like(input_ids) if mask is None else mask)
    if not model_kwargs["use_cache"]:
        raise ValueError(
            "use_cache=False: soft inputs live in the KV cache only; set use_cache=True"
        )
    if config.is_latent or config.gate is not None:
        check_reads_vectors(model)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    check_dist(vocab, **config.filters)
    check_dist(vocab, **config.answer_filters, prefix="answer_")
    for name in (*TAGS, "switch_final"):
        ids = getattr(config, name)
        if any(not 0 <= i < vocab for i in ids or ()):
            raise ValueError(
                f"{name}={ids} must be token ids below {vocab}, the model's vocabulary"
            )
    check_vocabulary(input_ids, model.get_input_embeddings())


def check_one_temperature(config: SoftConfig, who: str) -> None:
    """Raise ValueError for a temperature of each step where no hidden states are at hand."""
    if config.step_temperature is not None:
        raise ValueError(
            f"step_temperature={config.step_temperature!r}: {who} hands out no hidden states to make a temperature "
            "of: give None, which decodes at one temperature, or take softar.generate"
        )


def check_vocabulary(input_ids: Tensor, embedding: nn.Module) -> None:
    """Raise ValueError for ids that the embedding does not have: on a GPU they would end the
    process. Looks once, before the first forward."""
    tables = [m.num_embeddings for m in embedding.modules() if isinstance(m, nn.Embedding)]
    if tables:
        check_range("input_ids", *(int(end) for end in input_ids.aminmax()), max(tables))


def check_range(name: str, low: int, high: int, vocab_size: int) -> None:
    """Raise ValueError unless ids from the lowest to the highest are inside the vocabulary."""
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{name} holds the id {wrong}, and the model's vocabulary has {vocab_size}: is the tokenizer its own?"
        )


def check_positions(
    model, input_ids: Tensor, settings: GenerationConfig, model_kwargs: dict
) -> None:
    """Raise ValueError for more positions than the model has: those of the longest prompt and of
    the new tokens, of which the last is not read."""
    positions = room_of(model)
    if positions is None:
        return
    width, mask = input_ids.shape[1], model_kwargs.get("attention_mask")
    prompt = width if mask is None else int(mask.sum(-1).max())
    left, new = positions - prompt + 1, settings.max_length - width
    if new > left:
        remedy = f"give max_new_tokens={left} at most" if left > 0 else "shorten the prompt"
        raise ValueError(
            f"{type(model).__name__} has {positions} positions, too few for {prompt} of the prompt "
            f"and {new} new tokens: {remedy}"
        )


def check_beams(model, num_beams: int) -> None:
    """Raise ValueError for more hypotheses than the model, plain or wrapped by PEFT, has tokens."""
    vocab = plain(model).config.get_text_config(decoder=True).vocab_size
    if num_beams > vocab:
        raise ValueError(
            f"num_beams={num_beams} must be at most {vocab}, the model's vocabulary: lower it"
        )
