"""Models by name: what opens them, which ones have a name, and what kind of model one is.

A name is loaded when it is first used.
"""

from .._lazy import lazy

_HOME = {
    "load": "softar.models.opener",
    "MODELS": "softar.models.embedded",
    "add_think_tokens": "softar.models.think_tokens",
    "CHECKPOINTS": "softar.models.embedded",
    "MNNS_WORDS": "softar.models.embedded",
    "latin_tiny": "softar.models.embedded",
    "kept": "softar.models.stamp",
    "stamp_of": "softar.models.stamp",
    "folder_of": "softar.models.embedded",
    "word_tokenizer": "softar.models.embedded",
    "FETCH": "softar.models.source",
    "fetch_config": "softar.models.beside",
    "file_of": "softar.models.beside",
    "check_fit": "softar.models.errors",
    "opening": "softar.models.errors",
    "base_of": "softar.models.adapter",
    "wrap": "softar.models.adapter",
    "cached_if_offline": "softar.models.source",
    "settings_of": "softar.models.source",
    "check_fixed": "softar.models.source",
    "check_there": "softar.models.there",
    "check_autoregressive": "softar.models.kind",
    "check_keeps_apart": "softar.models.reading",
    "check_ragged": "softar.models.reading",
    "check_reads_mixtures": "softar.models.reading",
    "diffusion_sign": "softar.models.kind",
    "plain": "softar.models.kind",
    "Origin": "softar.models.origin",
    "origin_of": "softar.models.origin",
    "layers_of": "softar.models.room",
    "room_of": "softar.models.room",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
