"""Soft decoding inside vLLM's engine, as a plug-in: `pip install softar` is all that a vLLM needs for it.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). From then on a request with
`SamplingParams(extra_args={"soft": {...}})`, over HTTP `"vllm_xargs": {"soft": "{...}"}` with the object as JSON text,
thinks as `softar.generate` does with a SoftConfig of these fields, beside requests that do not. SamplingParams decides
on what is softar's answer: its temperature, top_k, ... and max_tokens. The engine has to take embeddings
(`--enable-prompt-embeds`). With `"record": true` the output tells what was read: `record_of`, over HTTP
the field "soft" of each choice (softar.vllm.http).
"""

import contextlib
import functools
import json
import math
import secrets
from collections.abc import Callable
from typing import NamedTuple

VERSIONS = ("0.32",)  # of vLLM, tested
LIMIT = 256  # tokens in a mixture
LONGEST = 64  # tokens of think_start and think_end
MOST = 2**31  # steps
OWN = "softar"  # what a request's "soft" becomes on its way to the workers
ENABLE = "start it with --enable-prompt-embeds (softar serve --soft; LLM(enable_prompt_embeds=True))"

# The fields of SoftConfig that a request may set, and their types; the rest is SamplingParams'.
NUMBER, COUNT, IDS = (int, float), (int, type(None)), (list, tuple)
FIELDS = {
    "mixer": (str,),
    "mixer_args": (dict,),
    "alpha": NUMBER,
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
    "cold_stop_steps": (int,),
    "record": (bool,),
}


def register() -> None:
    """Teach the vLLM of this process. Patches nothing in a version that was not tested."""
    from vllm import __version__
    from vllm.logger import init_logger

    if not any(__version__ == v or __version__.startswith(f"{v}.") for v in VERSIONS):
        message = "softar: no soft decoding, vLLM %s is not among the versions it knows: %s.*"
        init_logger("vllm.softar").warning(message, __version__, ".*, ".join(VERSIONS))
        return
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from .http import init_processor

    patch(InputProcessor, "__init__", init_processor)
    patch(InputProcessor, "process_inputs", process_inputs)
    patch(EngineCore, "preprocess_add_request", preprocess_add_request)
    patch(WorkerWrapperBase, "init_device", init_device)


def patch(owner, name: str, around: Callable) -> None:
    """Replace a method, or a module's function, by around(method, ...), once."""
    method = getattr(owner, name)
    if "softar" in vars(method):
        return

    @functools.wraps(method)
    def patched(*args, **kwargs):
        return around(method, *args, **kwargs)

    patched.softar = True
    setattr(owner, name, patched)


# --- where requests come in: the process of the API server or of vllm.LLM ---


def process_inputs(method, self, request_id, prompt, params, *args, lora_request=None, resumable=False, **kwargs):
    given = getattr(params, "extra_args", None) or {}  # pooling has none
    asked = given.get("soft")
    with refusing():
        if OWN in given:
            raise ValueError(f"soft: {OWN} is no argument of a request; soft is")
        if asked is not None:
            soft = checked(asked, params, self.vllm_config, self.tokenizer)
            if lora_request is not None:
                raise ValueError("soft: not with a LoRA adapter; merge it into the model")
            if resumable:
                raise ValueError("soft: not in a session whose prompt grows; send the whole prompt")
    request = method(self, request_id, prompt, params, *args, lora_request=lora_request, resumable=resumable, **kwargs)
    if asked is not None:
        with refusing():
            if request.prompt_embeds is not None or request.mm_features:
                raise ValueError("soft: not with prompt_embeds, images or sound; send text or token ids")
        own = request.sampling_params
        own.extra_args = {**own.extra_args, OWN: soft}
        if soft["record"]:  # travels as log-probabilities; the columns are those of log_columns
            own.flat_logprobs = True
            own.logprobs = 1 + kept(mk_config(soft["config"]))
    return request


@contextlib.contextmanager
def refusing():
    """A ValueError, for those who call vLLM from Python, is vLLM's error of the client too: the server answers 400."""
    from vllm.exceptions import VLLMValidationError

    class SoftError(VLLMValidationError, ValueError):
        pass

    try:
        yield
    except ValueError as error:
        raise SoftError(str(error)) from None


def checked(asked, params, vllm_config, tokenizer) -> dict:
    """The request's own words -> {"config": fields of SoftConfig, "record": bool}; ValueError of one line."""
    from ..config import SoftConfig
    from ..soft import check_dist

    check_engine(vllm_config)
    if isinstance(asked, str):  # as HTTP has it
        try:
            asked = json.loads(asked)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"soft: {shown(asked)} is not JSON ({error})") from None
    if not isinstance(asked, dict):
        raise ValueError(f"soft: {shown(asked)} must be an object of fields, e.g. {{}} or {{'mixer': 'gumbel'}}")
    if unknown := [name for name in asked if name not in FIELDS]:
        raise ValueError(f"soft: unknown fields {shown(unknown)}; known are {', '.join(FIELDS)}")
    for name, value in asked.items():
        kinds = FIELDS[name]
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
        if isinstance(value, IDS):
            fits = fits and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
        if not fits:
            raise ValueError(f"soft: {name}={shown(value)} must be {' or '.join(words(kinds))}")
        if isinstance(value, int) and abs(value) >= MOST:
            raise ValueError(f"soft: {name}={shown(value)} must be less than {MOST}")
    record = asked.get("record", False)
    check_params(params)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items() if k != "record"}
    count = fields.get("mixer_args", {}).get("k", 1)
    if isinstance(count, NUMBER) and count > LIMIT:
        raise ValueError(f"soft: k={shown(count)} must be at most {LIMIT}")
    try:
        config = SoftConfig(**fields)
        vocab = vllm_config.model_config.get_vocab_size()
        check_dist(vocab, config.temperature, config.top_k, config.top_p, config.min_p, config.keep, config.banned)
        config = config.resolve(tokenizer)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"soft: {str(error).splitlines()[0]}") from None
    limit = min(LIMIT, vocab - 1) if record else LIMIT
    if not kept(config) <= limit:
        raise ValueError(f"soft: a mixture of {kept(config)} tokens is too wide: set top_k or keep to at most {limit}")
    for name in ("think_start", "think_end"):
        ids = getattr(config, name)
        ids = () if ids is None else (ids,) if isinstance(ids, int) else ids
        if len(ids) > LONGEST:
            raise ValueError(f"soft: {name} has {len(ids)} tokens, more than {LONGEST}")
        if any(not 0 <= i < vocab for i in ids):
            raise ValueError(f"soft: {name}={shown(ids)} must be token ids below {vocab}, the model's vocabulary")
    given = {name: getattr(config, name) for name in FIELDS if name != "record"}
    return {"config": given, "record": record}


def check_engine(vllm_config) -> None:
    parallel = vllm_config.parallel_config
    if not vllm_config.model_config.enable_prompt_embeds:
        raise ValueError(f"soft: this engine takes no embeddings; {ENABLE}")
    for is_on, what in (
        (vllm_config.speculative_config is not None, "speculative decoding"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.prefill_context_parallel_size > 1, "prefills split among devices"),
        (parallel.enable_batch_sharded_sampling, "batch-sharded sampling"),
        (vllm_config.kv_transfer_config is not None, "a KV cache that comes from elsewhere"),
        (vllm_config.model_config.is_encoder_decoder, "an encoder-decoder model"),
        (bool(vllm_config.model_config.logits_processors), "logits processors, which a thought would not pass"),
        (vllm_config.model_config.return_sampling_mask, "sampling masks"),
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
        (any(penalties), "penalties (the model's generation_config may set them: repetition_penalty=1 unsets)"),
        (params.logit_bias, "logit_bias"),
        (params.allowed_token_ids, "allowed_token_ids"),
        (params.bad_words, "bad_words"),
        (params.min_tokens > 0, "min_tokens"),
        (params.thinking_token_budget is not None, "thinking_token_budget (soft has its own: budget)"),
        (params.trace_decode_token_ids, "trace_decode_token_ids"),
    ):
        if is_set:
            raise ValueError(f"soft: not together with {what}")


def kept(config) -> float:
    """Tokens in a mixture, K."""
    if config.mixer == "k-samples":
        width = config.mixer_args.get("k", 3)
    elif config.mixer == "hard" or config.temperature == 0:
        width = 1
    else:
        width = min(k for k in (config.top_k, config.keep, math.inf) if k is not None)
    return width + (config.alpha < 1)


def mk_config(fields: dict):
    from ..config import SoftConfig

    return SoftConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def words(kinds: tuple[type, ...]) -> list[str]:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object"}
    names |= {list: "a list of token ids", tuple: "a list of token ids", type(None): "null"}
    return list(dict.fromkeys(names[k] for k in kinds if not (k is int and float in kinds)))


def shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- the engine's core: its scheduler and cache of prefixes ---


def preprocess_add_request(method, self, request):
    """What a soft request computes depends on more than its tokens: nobody else may find it in the cache."""
    if soft_of(request.sampling_params) is not None:
        request.cache_salt = f"{request.cache_salt or ''}softar-{secrets.token_hex(16)}"
    return method(self, request)


def soft_of(params) -> dict | None:
    return params.extra_args.get(OWN) if params is not None and params.extra_args else None


# --- the worker ---


def init_device(method, self):
    method(self)  # before the runners are imported: on CPU it makes the second one fit for that
    if self.vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu import model_runner

        patch(model_runner, "init_model_state", init_model_state)
        patch(model_runner.GPUModelRunner, "finish_requests", finish_requests)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        GPUModelRunner.softar = None  # its Rows, from the first soft request on
        patch(GPUModelRunner, "_update_states", update_states)
        patch(GPUModelRunner, "_preprocess", preprocess)
        patch(GPUModelRunner, "_sample", sample)


def admit(rows, new, owner):
    """Take up a request if it is soft: a new one, or one that had been thrown out of the cache.

    Args: rows: Rows or None. owner: has the model, its device and its configuration. Returns rows, by then not None.
    """
    soft = soft_of(new.sampling_params)
    if soft is None:
        return rows
    if rows is None:
        from .rows import Rows

        rows = Rows(lambda ids: owner.model.embed_input_ids(ids), owner.device, owner.model_config.seed)
    if new.req_id not in rows.rows:
        params = new.sampling_params
        eos = {params.eos_token_id, *(params.stop_token_ids or ())} - {None}
        config = mk_config(soft["config"])
        rows.add(new.req_id, config, new.prompt_token_ids, params.seed, sorted(eos), soft["record"])
    return rows


# ... with vLLM's second runner


def init_model_state(method, vllm_config, model, *args, **kwargs):
    if vllm_config.model_config.enable_prompt_embeds:
        from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

        from .runners import soft_state

        base = resolve_model_state_cls(vllm_config, model)
        model.get_model_state_cls = lambda: soft_state(base)
    return method(vllm_config, model, *args, **kwargs)


def finish_requests(method, self, scheduler_output):
    if forget := getattr(self.model_state, "forget", None):
        forget(scheduler_output.finished_req_ids)
    return method(self, scheduler_output)


# ... with its first


def update_states(method, self, scheduler_output):
    if self.softar is not None:
        self.softar.drop(scheduler_output.finished_req_ids)
    for new in scheduler_output.scheduled_new_reqs:
        self.softar = admit(self.softar, new, self)
    return method(self, scheduler_output)


def preprocess(method, self, scheduler_output, *args, **kwargs):
    found = method(self, scheduler_output, *args, **kwargs)
    if self.softar is not None and self.softar.rows:
        batch = self.input_batch
        counts = [scheduler_output.num_scheduled_tokens[name] for name in batch.req_ids]
        self.softar.feed(found[1], batch.req_ids, batch.num_computed_tokens_cpu[: len(counts)].tolist(), counts)
    return found


def sample(method, self, logits, *args, **kwargs):
    if self.softar is None or not self.softar.rows or logits is None:
        return method(self, logits, *args, **kwargs)
    names = self.input_batch.req_ids
    ends = self.optimistic_seq_lens_cpu[: len(names)].tolist()
    skipped = self.discard_request_mask.np[: len(names)].tolist()
    turns = self.softar.think(logits, names, ends, skipped)
    out = method(self, logits, *args, **kwargs)
    self.softar.choose(turns, out.sampled_token_ids)
    for turn in turns:
        if turn.rows[0].wants_record:
            out.logprobs_tensors = self.softar.write(turn, out.logprobs_tensors)
    return out


# --- what came out ---


class Read(NamedTuple):
    """A step of the record: what the model read back, and why."""

    token: int  # that stands for it
    ids: tuple[int, ...]  # each once
    weights: tuple[float, ...]
    kind: int  # see softar.Kind
    logp: float  # as in softar's Record
    entropy: float  # nats


def record_of(output) -> list[Read]:
    """The steps of a CompletionOutput whose request asked for its record, or of a part of one that was streamed."""
    from vllm.logprobs import FlatLogprobs

    flat = output.logprobs
    if not isinstance(flat, FlatLogprobs):
        raise ValueError('no record: ask for it with extra_args={"soft": {"record": True}}')
    steps = []
    for start, end in zip(flat.start_indices, flat.end_indices):
        mixture = dict(zip(flat.token_ids[start + 2 : end], map(math.exp, flat.logprobs[start + 2 : end])))
        steps.append(
            Read(
                token=flat.token_ids[start],
                ids=tuple(mixture),
                weights=tuple(mixture.values()),
                kind=flat.ranks[start],
                logp=flat.logprobs[start],
                entropy=flat.logprobs[start + 1],
            )
        )
    return steps
