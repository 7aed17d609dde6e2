"""vLLM: the plug-in that thinks softly inside its engine, and decoders, server and client beside
it."""

from importlib import import_module

_HOME = {
    "VLLMDecoder": "softar.vllm.engine",
    "ServerDecoder": "softar.vllm.client",
    "Server": "softar.vllm.server",
    "ServerError": "softar.vllm.server",
    "serve": "softar.vllm.server",
    "record_of": "softar.vllm.record",
    "to_record": "softar.vllm.record",
}
__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'softar.vllm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
