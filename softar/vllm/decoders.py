"""The decoders on vLLM, by name."""

from collections.abc import Callable

import torch
from transformers import AutoTokenizer

from ..decoders.options import format_options
from ..mixers import mk_mixer
from ..models import folder_of, load
from .client import CONNECTION, ServerDecoder
from .completions import MODES, ends_unseen
from .engine import ENGINE, VLLMDecoder
from .machine import on_cpu
from .request import LIMIT, fields_of


def _factory(mode: str) -> Callable[..., VLLMDecoder | ServerDecoder]:
    def make(
        model,
        *,
        max_new_tokens,
        seed=0,
        trace=False,
        dtype="auto",
        device=None,
        url=None,
        **options,
    ):
        """A vLLM decoder; with url= over HTTP, else with an engine here. options: Sampling's
        fields, and the engine's (ENGINE) or ServerDecoder's (timeout, connect, retries,
        concurrency, api_key)."""
        if "mode" in options:
            raise ValueError(
                f"mode={options['mode']!r} is not an option: name the decoder, one of {sorted(DECODERS)}"
            )
        options |= dict(mode=mode, max_new_tokens=max_new_tokens, seed=seed, trace=trace)
        if url is not None:
            return ServerDecoder(url, model, tokenizer=_tokenizer(model), **options)
        here = "cpu" if on_cpu() else "cuda"
        if device is not None and torch.device(device).type != here:
            raise ValueError(f"device={device!r}: vLLM here runs on {here!r}")
        return VLLMDecoder(model, dtype=dtype, **options)

    return make


def _make_soft(
    model, *, max_new_tokens, seed=0, trace=False, dtype="auto", device=None, url=None, **options
):
    """Soft decoding inside the engine; options: fields of SoftConfig and knobs of its mixer (the
    answer is greedy), and the engine's or the client's."""
    from ..decoders.soft import own_config, soft_config

    others = {name: options.pop(name) for name in (*ENGINE, *CONNECTION) if name in options}
    trained = own_config(model).mixer  # on its own single tokens, it gets its belief
    mixer = options.pop("mixer", "soft" if mk_mixer(trained).single else trained)
    config = soft_config(model, mixer, options)
    if idle := [
        f"{k}={v!r}" for k, v in options.items() if k.startswith("answer_") and v not in (0, None)
    ]:
        raise ValueError(
            f"{', '.join(idle)}: answers of vllm-soft are greedy; take decoder {mixer!r} for others"
        )
    soft = fields_of(config)
    # all of a small vocabulary
    if config.top_k is None and len(tokenizer := _tokenizer(model)) <= LIMIT:
        records = trace or ends_unseen(soft)  # which have room for all but one
        soft["top_k"] = len(tokenizer) - (1 + (config.alpha < 1) if records else 0)
    others |= {"soft": soft} if url is not None else {"soft": soft, "enable_prompt_embeds": True}
    decoder = _factory("soft")(
        model,
        max_new_tokens=max_new_tokens,
        seed=seed,
        trace=trace,
        dtype=dtype,
        device=device,
        url=url,
        **others,
    )
    setting = format_options(({} if mixer == "soft" else {"mixer": mixer}) | options, " ")
    decoder.columns["setting"] = setting
    decoder.name = " ".join(filter(None, ["vllm-soft", setting]))
    return decoder


def _tokenizer(model: str):
    """Without the weights where the model is a folder."""
    folder = folder_of(model)
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return load(model, device="cpu")[1]


DECODERS = {f"vllm-{mode}": _factory(mode) for mode in MODES if mode != "soft"} | {
    "vllm-soft": _make_soft
}
