"""Soft decoding inside vLLM's engine, as a plug-in: `pip install softar` is all that a vLLM needs
for it.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). From then on a
request with `SamplingParams(extra_args={"soft": {...}})`, over HTTP `"vllm_xargs": {"soft":
"{...}"}` with the object as JSON text, thinks as `softar.generate` does with a SoftConfig of these
fields, beside requests that do not. SamplingParams decides on what is softar's answer: its
temperature, top_k, ... and max_tokens. The engine has to be told to (softar.vllm.switches). With
`"record": true` the output tells what was read: `record_of`, over HTTP the field "soft" of each
choice (softar.vllm.http).
"""

import secrets

from ..config import SoftConfig
from .finite import check_embeds, schedule, update_from_output
from .hooks import VERSIONS, patch, refusing
from .request import OWN, check_request, soft_of
from .runners import init_device


def register() -> None:
    """Teach the vLLM of this process. Patches nothing in a version that was not tested."""
    from vllm import __version__
    from vllm.logger import init_logger

    if not any(__version__ == v or __version__.startswith(f"{v}.") for v in VERSIONS):
        message = (
            "softar: no soft decoding, vLLM %s is not among the versions it knows: %s.*; "
            "`pip install 'softar[vllm]'` takes one that was tried"
        )
        init_logger("vllm.softar").warning(message, __version__, ".*, ".join(VERSIONS))
        return
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from .http import init_processor

    patch(BaseRenderer, "_tokenize_prompt", tokenize_prompt)
    patch(InputProcessor, "__init__", init_processor)
    patch(InputProcessor, "process_inputs", process_inputs)
    patch(LogprobsProcessor, "from_new_request", from_new_request)
    patch(EngineCore, "preprocess_add_request", preprocess_add_request)
    Scheduler.softar_blocks = ()  # to be set to zero
    patch(Scheduler, "schedule", schedule)
    patch(Scheduler, "update_from_output", update_from_output)
    patch(WorkerWrapperBase, "init_device", init_device)


# --- where requests come in: the process of the API server or of vllm.LLM ---


def tokenize_prompt(method, self, prompt, params):
    """A word that a closed vocabulary does not have is the client's mistake, and no failure of the
    server's: tokenizers raises a bare Exception."""
    try:
        return method(self, prompt, params)
    except Exception as error:
        if type(error) is not Exception:
            raise
        with refusing():
            raise ValueError(f"the model's tokenizer cannot read the prompt: {error}") from None


def process_inputs(
    method, self, request_id, prompt, params, *args, lora_request=None, resumable=False, **kwargs
):
    extra_args = getattr(params, "extra_args", None) or {}  # pooling has none
    asked = extra_args.get("soft")
    with refusing():
        if OWN in extra_args:
            raise ValueError(f"soft: {OWN} is no argument of a request; soft is")
        if asked is not None:
            soft = check_request(asked, params, self.vllm_config, self.tokenizer)
            if lora_request is not None:
                raise ValueError("soft: not with a LoRA adapter; merge it into the model")
            if resumable:
                raise ValueError("soft: not in a session whose prompt grows; send the whole prompt")
    kwargs |= dict(lora_request=lora_request, resumable=resumable)
    request = method(self, request_id, prompt, params, *args, **kwargs)
    with refusing():
        check_embeds(request.prompt_embeds, self.vllm_config.model_config)
        if asked is not None and (request.prompt_embeds is not None or request.mm_features):
            raise ValueError(
                "soft: not with prompt_embeds, images or sound; send text or token ids"
            )
    if asked is not None:
        params = request.sampling_params  # the engine's copy
        params.extra_args = {**params.extra_args, OWN: soft}
        if soft["record"]:  # travels as log-probabilities; the columns are those of log_columns
            params.flat_logprobs = True
            params.logprobs = 1 + SoftConfig(**soft["config"]).width
    return request


def from_new_request(method, tokenizer, request):
    """The tokens of a record are read as ids: vLLM would make a text of each, one by one."""
    soft = soft_of(request.sampling_params)
    has_record = soft is not None and soft["record"]
    return method(tokenizer=None if has_record else tokenizer, request=request)


# --- the engine's core: its scheduler and cache of prefixes ---


def preprocess_add_request(method, self, request):
    """What a soft request computes depends on more than its tokens: nobody else may find it in the
    cache."""
    if soft_of(request.sampling_params) is not None:
        request.cache_salt = f"{request.cache_salt or ''}softar-{secrets.token_hex(16)}"
    return method(self, request)
