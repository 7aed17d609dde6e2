"""Soft decoding and training for masked-diffusion language models: LLaDA, Dream and BERT-like ones.

A name is loaded when it is first used.
"""

from softar._lazy import lazy

# A public name must not be the name of a submodule: importing the submodule would put the module in
# its place.
_HOME = {
    "load": "softar.diffusion.models",
    "DenoiseConfig": "softar.diffusion.config",
    "DenoiseOutput": "softar.diffusion.loop",
    "denoise": "softar.diffusion.loop",
    "log_probs": "softar.diffusion.replay",
    "label_probs": "softar.diffusion.constraints",
    "SCHEDULES": "softar.diffusion.schedules",
    "SELECTORS": "softar.diffusion.select",
    "SOFTENERS": "softar.diffusion.soften",
    "PARITY": "softar.diffusion.parity",
}
__all__ = [*_HOME]

__getattr__, __dir__ = lazy(__name__, _HOME)
