"""A soft request: what it may ask, the checks, and the configuration it becomes."""

import json
from collections.abc import Sequence

from ..checks import did_you_mean, shorten
from ..config import TAGS, SoftConfig, renamed
from ..mixers import GROUP, MIXERS, mk_mixer
from ..names import registered
from ..soft import check_dist
from .switches import switches_of, thinks

LIMIT = 256  # tokens in a mixture
LONGEST = 64  # tokens of think_start and think_end
# characters, as JSON: of a request's "soft", of one of its fields, of its banned ids
SIZES = {"soft": 2**16, "field": 1000, "banned": 2**15}
MOST = 2**31  # steps
OWN = "softar"  # what a request's "soft" becomes on its way to the workers
ENABLE = (
    "start it so: softar serve --soft, vllm serve --enable-prompt-embeds, "
    "LLM(enable_prompt_embeds=True)"
)

# The fields of SoftConfig that a request may set, and their types; the rest is SamplingParams'.
NUMBER, COUNT, IDS = (int, float), (int, type(None)), (list, tuple)
FIELDS = {
    "mixer": (str,),
    "mixer_args": (dict,),
    "softness": NUMBER,
    "temperature": NUMBER,
    "top_k": COUNT,
    "top_p": (*NUMBER, type(None)),
    "min_p": (*NUMBER, type(None)),
    "keep": COUNT,
    "banned": IDS,
    "rescale": (str, type(None)),
    "think_start": (int, str, *IDS, type(None)),
    "think_end": (int, str, *IDS, type(None)),
    "budget": COUNT,
    "cold_stop_entropy": (*NUMBER, type(None)),
    "cold_stop_steps": COUNT,
    "switch": (str, *NUMBER, type(None)),
    "switch_dwell": COUNT,
    "switch_open": NUMBER,
    "switch_close": (*NUMBER, type(None)),
    "switch_budget": COUNT,
    "switch_final": (int, str, *IDS, type(None)),
    "switch_answer": COUNT,
    "hide_thought": (bool,),
    "record": (bool,),
}


def check_request(asked, params, vllm_config, tokenizer) -> dict:
    """The request's own words -> {"config": fields of SoftConfig, "record": bool}; ValueError of
    one line."""
    check_engine(vllm_config)
    fields = parse(asked)
    record = fields.pop("record", False)
    check_params(params)
    check_mixer(fields.get("mixer", SoftConfig.mixer), switches_of(vllm_config).mixers)
    vocab = vllm_config.model_config.get_vocab_size()
    length = params.max_tokens or vllm_config.model_config.max_model_len
    config = _resolve(fields | {"max_new_tokens": length}, vocab, tokenizer)
    limit = min(LIMIT, vocab - 1) if record else LIMIT
    if not config.width <= limit:
        name = "k" if "k" in config.mixer_args else "top_k or keep"
        raise ValueError(
            f"soft: a mixture of {config.width} tokens is too wide: set {name} to at most {limit}"
        )
    for name in (*TAGS, "switch_final"):
        ids = getattr(config, name) or ()
        if len(ids) > LONGEST:
            raise ValueError(f"soft: {name} has {len(ids)} tokens, more than {LONGEST}")
        if any(not 0 <= i < vocab for i in ids):
            raise ValueError(
                f"soft: {name}={_quote(ids)} must be token ids below {vocab}, the model's vocabulary"
            )
    # a length that no thought waits for: requests of any length step together
    own = fields_of(config) | {"spelling": config.spelling, "max_new_tokens": MOST}
    if config.switch is not None:
        if config.switch_budget is not None and params.ignore_eos:
            raise ValueError(
                "soft: switch_budget ends an answer by the end token: not with ignore_eos"
            )
        own["max_new_tokens"] = length  # over which its tags fade
    return {"config": own, "record": record}


def check_mixer(name: str, allow: Sequence[str]) -> None:
    """Raise ValueError for a mixer that a request may not name: what it says must never decide which
    code is imported. allow: those of its owner's own that the engine was started with."""
    known = sorted({*MIXERS, *registered(GROUP), *allow})
    if name not in known:
        raise ValueError(
            f"soft: mixer={_quote(name)} is unknown here{did_you_mean(name[:80], known)}: choose one of "
            f"{known} (the server's --allow-mixer lets in others)"
        )
    check_read(name, {})


def check_read(name: str, knobs: dict) -> None:
    """Raise ValueError for a mixer, a known one, whose steps vLLM cannot read."""
    mixer = mk_mixer(name)
    if mixer.hidden:
        raise ValueError(
            f"soft: mixer={_quote(name)} asks for hidden states, which vLLM does not hand out: decode "
            "with softar.generate"
        )
    if mixer.gated and knobs.get("gate") is not None:
        raise ValueError(
            "soft: mixer_args names a gate, a file, which vLLM does not read: decode with softar.generate"
        )


def parse(asked) -> dict:
    """The fields of a request, an object or its JSON text; each of a type that it may have.

    Raises:
        ValueError: naming the field, its value and the types that fit.
    """
    if isinstance(asked, str):  # as HTTP has it
        _check_size("the object", len(asked), SIZES["soft"])
        try:
            asked = json.loads(asked)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"soft: {_quote(asked)} is not JSON ({error})") from None
    if not isinstance(asked, dict):
        raise ValueError(
            f"soft: {_quote(asked)} must be an object of fields, e.g. {{}} or {{'mixer': 'gumbel'}}"
        )
    for name, value in asked.items():
        size = len(repr(name)) + len(repr(value))
        _check_size(f"field {_quote(name)}", size, SIZES.get(name, SIZES["field"]))
    asked = renamed(asked, "soft: ")
    if "step_temperature" in asked:
        raise ValueError(
            "soft: step_temperature is made of hidden states, which vLLM does not hand out: give temperature, or "
            "decode with softar.generate"
        )
    if unknown := [name for name in asked if name not in FIELDS]:
        raise ValueError(f"soft: unknown fields {_quote(unknown)}; known are {', '.join(FIELDS)}")
    for name, value in asked.items():
        kinds = FIELDS[name]
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
        if isinstance(value, IDS):
            fits = fits and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
        if not fits:
            raise ValueError(f"soft: {name}={_quote(value)} must be {' or '.join(_words(kinds))}")
        if isinstance(value, int) and abs(value) >= MOST:
            raise ValueError(f"soft: {name}={_quote(value)} must be less than {MOST}")
    return dict(asked)


def _check_size(what: str, size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"soft: {what} has {size} characters, and at most {most} are read")


def _resolve(fields: dict, vocab: int, tokenizer) -> SoftConfig:
    # before a mixer tries it
    count = fields.get("mixer_args", {}).get("k", 1)
    if isinstance(count, NUMBER) and count > LIMIT:
        raise ValueError(f"soft: k={_quote(count)} must be at most {LIMIT}")
    check_read(fields.get("mixer", SoftConfig.mixer), fields.get("mixer_args", {}))
    try:
        config = SoftConfig(**fields)
        check_dist(vocab, **config.filters)
        return config.resolve(tokenizer)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"soft: {str(error).splitlines()[0]}") from None


def fields_of(config: SoftConfig) -> dict:
    """What of a configuration a request says."""
    return {name: getattr(config, name) for name in FIELDS if name != "record"}


def check_engine(vllm_config) -> None:
    parallel = vllm_config.parallel_config
    if not thinks(vllm_config):
        raise ValueError(f"soft: not in this engine; {ENABLE}")
    for is_on, what in (
        (vllm_config.speculative_config is not None, "speculative decoding"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.prefill_context_parallel_size > 1, "prefills split among devices"),
        (parallel.enable_batch_sharded_sampling, "batch-sharded sampling"),
        (vllm_config.kv_transfer_config is not None, "a KV cache that comes from elsewhere"),
        (vllm_config.model_config.is_encoder_decoder, "an encoder-decoder model"),
        (
            bool(vllm_config.model_config.logits_processors),
            "logits processors, which a thought would not pass",
        ),
        (vllm_config.model_config.return_sampling_mask, "sampling masks"),
        # looked up beside the embedding, in a buffer of the step: a mixture's would write over others'
        (
            vars(vllm_config.model_config.hf_text_config).get("hidden_size_per_layer_input"),
            "a model that reads tokens in every layer (Gemma 3n, 4): decode with softar.generate",
        ),
        (getattr(vllm_config, "watermark_config", None) is not None, "watermarks"),
    ):
        if is_on:
            raise ValueError(f"soft: not in an engine with {what}")


def check_params(params) -> None:
    """Refuse what would not act on a thought as its user expects."""
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1)
    for is_set, what in (
        (params.structured_outputs is not None, "structured output"),
        (params.logprobs is not None, 'logprobs (of a thought ask for the record: "record": true)'),
        (params.logprob_token_ids is not None, "logprob_token_ids"),
        (params.prompt_logprobs is not None, "prompt_logprobs"),
        (params.prompt_logprob_token_ids is not None, "prompt_logprob_token_ids"),
        (
            any(penalties),
            "penalties (the model's generation_config may set them: repetition_penalty=1 unsets)",
        ),
        (params.logit_bias, "logit_bias"),
        (params.allowed_token_ids, "allowed_token_ids"),
        (params.bad_words, "bad_words"),
        (params.min_tokens > 0, "min_tokens"),
        (
            params.thinking_token_budget is not None,
            "thinking_token_budget (soft has its own: budget)",
        ),
        (params.trace_decode_token_ids, "trace_decode_token_ids"),
    ):
        if is_set:
            raise ValueError(f"soft: not together with {what}")


def _words(kinds: tuple[type, ...]) -> list[str]:
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        dict: "an object",
    }
    names |= {list: "a list of token ids", tuple: "a list of token ids", type(None): "null"}
    return list(dict.fromkeys(names[k] for k in kinds if not (k is int and float in kinds)))


def _quote(value) -> str:
    return shorten(repr(value), 80)


def soft_of(params) -> dict | None:
    """What `check_request` made of it; None for a request that is not soft."""
    return params.extra_args.get(OWN) if params is not None and params.extra_args else None
