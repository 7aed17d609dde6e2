"""Soft-token decoding, fine-tuning and RL for language models: see README.md.

A name is loaded when it is first used, so `import softar` costs nothing and needs neither torch nor
transformers.
"""

from pathlib import Path

from ._lazy import lazy

__version__ = "0.1.0"

# A public name must not be the name of a submodule: importing the submodule would put the module in
# its place.
_HOME = {
    "Soft": "softar.soft",
    "mk_proba_dist": "softar.soft",
    "soft_embed": "softar.soft",
    "entropy": "softar.soft",
    "MIXERS": "softar.mixers",
    "Mixed": "softar.mixers",
    "Mixer": "softar.mixers",
    "SoftConfig": "softar.config",
    "SoftOutput": "softar.decode",
    "Kind": "softar.thought",
    "generate": "softar.decode",
    "answer_texts": "softar.evaluate",
    "soft_decode": "softar.decode",
    "load": "softar.models.opener",
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

__getattr__, __dir__ = lazy(__name__, _HOME)


def _checkout():
    """The root of softar's own checkout if this file lies in one, else None."""
    root = Path(__file__).resolve().parent.parent
    project = root / "pyproject.toml"
    lines = project.read_text(encoding="utf-8").splitlines() if project.is_file() else []
    return root if 'name = "softar"' in lines else None


# Started from the root of a checkout, Python finds this folder before any installed softar, and
# softar.diffusion and softar.rl lie beside it, not in it.
if _root := _checkout():
    __path__.append(str(_root))
