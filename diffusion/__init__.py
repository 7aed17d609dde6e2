"""Soft decoding and training for masked-diffusion language models: LLaDA, Dream and BERT-like ones.

A name is loaded when it is first used.
"""

from importlib import import_module

# A public name must not be the name of a submodule: importing the submodule would put the module in
# its place.
_HOME = {
    "load": "softar.diffusion.models",
    "DenoiseConfig": "softar.diffusion.config",
    "DenoiseOutput": "softar.diffusion.loop",
    "denoise": "softar.diffusion.loop",
    "SCHEDULES": "softar.diffusion.schedules",
    "SELECTORS": "softar.diffusion.select",
    "SOFTENERS": "softar.diffusion.soften",
    "PARITY": "softar.diffusion.parity",
}
__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'softar.diffusion' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
