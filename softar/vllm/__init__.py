"""vLLM: the plug-in that thinks softly inside its engine, and decoders, server and client beside
it."""

from .._lazy import lazy

_HOME = {
    "VLLMDecoder": "softar.vllm.engine",
    "ServerDecoder": "softar.vllm.client",
    "Server": "softar.vllm.server",
    "ServerError": "softar.decoders.link",
    "serve": "softar.vllm.server",
    "record_of": "softar.vllm.record",
    "to_record": "softar.vllm.record",
    "from_json": "softar.vllm.record",
}
__all__ = [*_HOME]

__getattr__, __dir__ = lazy(__name__, _HOME)
