"""Soft-token decoding, fine-tuning and RL for language models: see README.md.

A name is loaded when it is first used, so `import softar` costs nothing and needs neither torch nor
transformers.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# A public name must not be the name of a submodule: importing the submodule would put the module in
# its place.
_HOME = {
    "Soft": "softar.soft",
    "mk_proba_dist": "softar.soft",
    "soft_embed": "softar.soft",
    "entropy": "softar.soft",
    "MIXERS": "softar.mixers",
    "SoftConfig": "softar.config",
    "SoftOutput": "softar.decode",
    "Kind": "softar.thought",
    "generate": "softar.decode",
    "soft_decode": "softar.decode",
    "load": "softar.models",
    "load_task": "softar.tasks",
    "compare": "softar.evals.compare",
    "Comparison": "softar.evals.compare",
    "Decoded": "softar.decoders.answer",
    "make_decoder": "softar.decoders.registry",
    "guide": "softar.mixers",
    "SoftSFTConfig": "softar.sft.config",
    "SoftSFTTrainer": "softar.sft.trainer",
}
__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'softar' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})


def _checkout():
    """The root of softar's own checkout if this file lies in one, else None."""
    root = Path(__file__).resolve().parent.parent
    project = root / "pyproject.toml"
    return (
        root
        if project.is_file()
        and 'name = "softar"' in project.read_text(encoding="utf-8").splitlines()
        else None
    )


# Started from the root of a checkout, Python finds this folder before any installed softar, and
# softar.diffusion and softar.rl lie beside it, not in it.
if _root := _checkout():
    __path__.append(str(_root))
