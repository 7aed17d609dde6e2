"""Which of transformers' caches a decode takes, and the forward compiled over one of a fixed size."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable

import torch
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.configuration_utils import (
    ALL_STATIC_CACHE_IMPLEMENTATIONS,
    DYNAMIC_CACHE_IMPLEMENTATIONS,
    STATIC_CACHE_IMPLEMENTATIONS,
)
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from .models.kind import plain, uncompiled
from .models.reading import cache_in

STATIC = ALL_STATIC_CACHE_IMPLEMENTATIONS  # the old names included
CACHES = (*DYNAMIC_CACHE_IMPLEMENTATIONS, *STATIC_CACHE_IMPLEMENTATIONS)
# transformers' own `generate` answers otherwise, or fails, where these have a static cache; as in
# softar.models.reading, tests/test_architectures.py tries every architecture
NEVER_STATIC = ("gpt_neo", "llama4", "llama4_text", "prophetnet", "recurrent_gemma")
BACKENDS = {"quanto": is_optimum_quanto_available, "hqq": is_hqq_available}  # of quantised ones


def set_cache(model, settings: GenerationConfig, name: str | None, compile: bool) -> None:
    """Change settings of a decode with this model: the cache's name, where there is one, and whether a
    step is compiled. Raises ValueError for what it cannot be decoded with."""
    if name is not None:
        settings.cache_implementation = name
    if compile:
        settings.compile_config = settings.compile_config or compiling(plain(model).device)
        settings.disable_compile = False
    check_cache(model, settings)
    if settings.compile_config is not None and not settings.disable_compile:
        asked = "compile=True" if compile else "compile_config="
        check_one_size(asked, settings.cache_implementation in STATIC)


def check_one_size(asked: str, is_static: bool) -> None:
    """Raise ValueError where the cache grows: a compiled forward would be another each step."""
    if not is_static:
        raise ValueError(
            f"{asked} needs a cache of one size: give cache_implementation='static', or leave it out"
        )


def check_cache(model, settings: GenerationConfig) -> None:
    """Raise ValueError for a cache that transformers does not make for this model, plain or wrapped
    by PEFT, here: it would fail on its way, or take another one without a word."""
    base, name = plain(model), settings.cache_implementation
    model, is_static = uncompiled(model), name in STATIC
    if name in (None, "dynamic"):
        return
    asked, kind = f"cache_implementation={name!r}", type(base).__name__
    # a model's own file may have one of the old names
    if name not in CACHES and name != base.generation_config.cache_implementation:
        raise ValueError(
            f"{asked} is not decoded with: choose one of {[*CACHES]}; layers that slide or keep a "
            "state get their own kind in each"
        )
    if not base._supports_default_dynamic_cache():
        raise ValueError(f"{asked}: {kind} has a cache of its own; leave it out")
    if is_static and base.config.model_type in NEVER_STATIC:
        raise ValueError(f"{asked}: {kind} is not decoded rightly with it; give 'dynamic'")
    if "offloaded" in name and base.device.type == "cpu":
        raise ValueError(
            f"{asked} moves keys and values to the host, where {kind} is already: give 'dynamic' or 'static'"
        )
    if is_static and model is not base and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{asked} has no room for the virtual tokens of {model.active_peft_config.peft_type.value}: leave it out"
        )
    backend = (settings.cache_config or {}).get("backend", "quanto")
    if name == "quantized" and not BACKENDS.get(backend, bool)():
        raise ValueError(
            f"{asked} needs {' or '.join(BACKENDS)}, and {backend!r} is not installed here: install "
            "optimum-quanto, or give 'dynamic'"
        )


def check_room(cache, positions: int) -> None:
    """Raise ValueError for a static cache with fewer positions than a decode writes: those of the
    prompt and of all new tokens but the last."""
    if not isinstance(cache, StaticCache):
        return
    whole = [x for x in cache.layers if isinstance(x, StaticLayer) and not x.is_sliding]
    room = min((layer.max_cache_len for layer in whole), default=positions)
    if room < positions:
        raise ValueError(
            f"the static cache has room for {room} positions, too few for {positions}, the prompt's and those of "
            f"all new tokens but the last: give generate max_new_tokens=, or a cache of max_cache_len={positions}"
        )


def unread_by(cache, prompt_length: int, chunk_size: int | None) -> int:
    """Columns of a prompt that a cache of the caller's, None for none, does not hold. chunk_size: the
    setting prefill_chunk_size. Raises ValueError where it holds all, or any and the prompt is read in
    chunks: transformers would read others once more."""
    held = 0 if cache is None else int(cache.get_seq_length())
    if held >= prompt_length:
        raise ValueError(
            f"the cache holds {held} positions and the prompt has {prompt_length}: give the text from its beginning, "
            "what is new at its end, or crop the cache"
        )
    if held and chunk_size is not None:
        raise ValueError(
            f"prefill_chunk_size={chunk_size} reads the whole prompt, and the cache holds {held} positions of it "
            "already: leave it out, or give an empty cache"
        )
    return prompt_length - held


def compiling(device: torch.device) -> CompileConfig:
    """How a forward is compiled where nobody says how: as one graph, with CUDA graphs on a GPU."""
    return CompileConfig(
        fullgraph=True, mode="default" if device.type == "cpu" else "reduce-overhead"
    )


def forward_of(model, settings: GenerationConfig, model_kwargs: dict) -> Callable:
    """What takes a step of one token: the model, or with compile_config its compiled call. Of a model
    that does not compile, which is warned of once, the model again.

    Raises:
        ValueError: where the cache grows.
    """
    if settings.compile_config is None or settings.disable_compile:
        return model
    check_one_size("compile_config=", isinstance(cache_in(model_kwargs), StaticCache))
    settings = copy.copy(settings)
    how = settings.compile_config = copy.copy(settings.compile_config)
    how._compile_all_devices = True  # on a CPU too, as it was asked for
    if not model._valid_auto_compile_criteria(model_kwargs, settings):
        return _given_up(model, "its weights are quantised, or lie on several devices")
    # a deep copy has the original's, which would run the original's weights
    compiled = vars(model).get("_compiled_call")
    if compiled is not None and inspect.unwrap(compiled).__self__ is not model:
        del model._compiled_call
    give_up = functools.partial(_given_up, model)
    return or_given_up(model.get_compiled_call(how), give_up, how.fullgraph)


def or_given_up(
    compiled: Callable, give_up: Callable[[str], Callable], is_one_graph: bool = True
) -> Callable:
    """What torch.compile gave, or from where it does not compile on what give_up makes of the
    reason."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # slow to import

    def call(*args, **inputs):
        nonlocal compiled
        try:
            return compiled(*args, **inputs)
        except FailOnRecompileLimitHit:
            why = "it met more shapes or settings than torch._dynamo.config.recompile_limit"
        except TorchDynamoException as error:
            if not is_one_graph:  # a part of it may have written to the cache
                raise
            why = " ".join(str(error).split())
        compiled = give_up(why)
        return compiled(*args, **inputs)

    return call


def _given_up(model, why: str) -> Callable:
    """The call that is not compiled, from now on: transformers keeps it as the compiled one."""
    warnings.warn(
        f"{type(model).__name__} does not compile ({why:.200}): it decodes uncompiled", stacklevel=2
    )
    model._compiled_call = model.__call__
    return model._compiled_call
