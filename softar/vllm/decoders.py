"""The decoders on vLLM, by name."""

from collections.abc import Callable

import torch
from transformers import AutoTokenizer

from ..config import SoftConfig
from ..decoders.card import Card
from ..decoders.options import Common
from ..decoders.soft import soft_config
from ..defaults import default_of
from ..guard import check_one_temperature
from ..mixers import mk_mixer
from ..models import MODELS, load
from ..specs import format_options
from .client import CONNECTION, ServerDecoder
from .completions import MODES, CompletionDecoder, Sampling, ends_unseen, split_options
from .engine import ENGINE, VLLMDecoder
from .machine import on_cpu
from .request import LIMIT, check_read, fields_of


def _factory(mode: str) -> Callable[..., CompletionDecoder]:
    def make(card: Card, common: Common, /, *, url=None, **options) -> CompletionDecoder:
        """options: Sampling's fields, and the engine's (ENGINE) or with url= the client's
        (CONNECTION)."""
        if "mode" in options:
            raise ValueError(
                f"mode={options['mode']!r} is not an option: name the decoder, one of {sorted(DECODERS)}"
            )
        options |= {"mode": mode, "max_new_tokens": common.max_new_tokens}
        if mode == "self-consistency":
            options.setdefault("extract", common.extract)
        options = {"prompt_prefix": default_of(card.config).config.prompt_prefix} | options
        sampling, _ = split_options(options, ENGINE if url is None else CONNECTION)
        labels = common.labels(f"vllm-{mode}", card.name, Sampling(**sampling).setting)
        decoder = _decoder(card, common, url, **labels, **options)
        decoder.thought, decoder.stop = _thought(card), common.stop
        return decoder

    return make


def _thought(card: Card) -> SoftConfig:
    """How thoughts are told from answers, as by `sampled`; but vLLM puts no end in."""
    default = default_of(card.config, _tokenizer(card) if card.config is None else None)
    config = soft_config(default, "sampled", {})
    return config if config.think_end is None else config.changed(budget=None)


def _make_soft(card: Card, common: Common, /, *, url=None, **options) -> CompletionDecoder:
    """Soft decoding inside the engine; options: fields of SoftConfig and knobs of its mixer (the
    answer is greedy), and the engine's or the client's."""
    others = {name: options.pop(name) for name in (*ENGINE, *CONNECTION) if name in options}
    # a model that was trained on its own single tokens gets its belief
    default = default_of(card.config, _tokenizer(card) if card.config is None else None)
    trained = "soft" if card.config is None else card.config.mixer
    mixer = options.pop("mixer", "soft" if mk_mixer(trained).single else trained)
    config = soft_config(default, mixer, options | {"max_new_tokens": common.max_new_tokens})
    if idle := [
        f"{k}={v!r}" for k, v in options.items() if k.startswith("answer_") and v not in (0, None)
    ]:
        raise ValueError(
            f"{', '.join(idle)}: answers of vllm-soft are greedy; take decoder {mixer!r} for others"
        )
    check_read(config.mixer, config.mixer_args)
    check_one_temperature(config, "vLLM")
    soft = fields_of(config)
    # as much of a small vocabulary as an engine mixes
    if config.top_k is None and (n := len(tokenizer := _tokenizer(card))) <= LIMIT:
        records = common.trace or ends_unseen(soft)  # which have room for all but one
        room, config = min(LIMIT, n - 1) if records else LIMIT, config.resolve(tokenizer)
        if config.width > room:
            whole = config.changed(top_k=n)
            soft["top_k"] = max(1, min(n, room - whole.width + whole.filtered))
    if url is None:
        others["enable_prompt_embeds"] = True
    setting = format_options(({} if mixer == "soft" else {"mixer": mixer}) | options, " ")
    others |= common.labels("vllm-soft", card.name, setting)
    others |= {"mode": "soft", "max_new_tokens": common.max_new_tokens, "soft": soft}
    others |= {"prompt_prefix": config.prompt_prefix}
    return _decoder(card, common, url, **others)


def _decoder(card: Card, common: Common, url: str | None, **options) -> CompletionDecoder:
    """With a url over HTTP, else with an engine here."""
    options |= {"seed": common.seed, "trace": common.trace}
    if url is not None:
        return ServerDecoder(url, card.name, tokenizer=_tokenizer(card), **options)
    here = "cpu" if on_cpu() else "cuda"
    if common.device is not None and torch.device(common.device).type != here:
        raise ValueError(f"device={common.device!r}: vLLM here runs on {here!r}")
    return VLLMDecoder(card.name, dtype=common.dtype, **options)


def tagged_length(card: Card) -> int:
    """Tokens of a model without a soft_config.json: as its think tags say, where it has any."""
    return default_of(None, _tokenizer(card)).config.max_new_tokens


def _tokenizer(card: Card):
    """Without the weights where the model is a folder."""
    if card.folder is not None and (card.folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(card.folder, trust_remote_code=False)
    if card.folder is None and card.name not in MODELS and not card.name.endswith(".gguf"):
        return AutoTokenizer.from_pretrained(card.name, trust_remote_code=False)  # a hub id
    return load(card.name, device="cpu")[1]


def registered(name: str) -> None:
    """A method that a package registered is a decoder of another family."""
    return None


DECODERS = {f"vllm-{mode}": _factory(mode) for mode in MODES if mode != "soft"} | {
    "vllm-soft": _make_soft
}
