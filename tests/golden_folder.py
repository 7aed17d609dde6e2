"""Reading a folder of recorded cases: its checkpoints, opened as users open them, and its tensors."""

import json
import re
from functools import cache

from safetensors import safe_open

from softar.diffusion.models import load


@cache
def checkpoint(folder, name, **said):
    return load(folder / "checkpoints" / name, **unsaid(folder, name) | said)[0]


def unsaid(folder, name):
    """What a user has to say to `load`, because the original folders don't: LLaDA2's mask token,
    which the folder's README names."""
    config = json.loads((folder / "checkpoints" / name / "config.json").read_text())
    if config["model_type"] != "llada2_moe":
        return {}
    return {"mask_token_id": int(re.search(r"mask id\W+(\d+)", readme(folder))[1])}


@cache
def readme(folder):
    file = folder / "README.md"
    return file.read_text() if file.is_file() else ""


@cache
def tensor_file(folder, family):
    file = folder / "tensors" / f"{family}.safetensors"
    return safe_open(file, "pt") if file.is_file() else None


@cache
def tensor_names(folder, family):
    file = tensor_file(folder, family)
    return frozenset(() if file is None else file.keys())


def tensor(folder, family, name):
    """None where none of that name was recorded."""
    if name not in tensor_names(folder, family):
        return None
    return tensor_file(folder, family).get_tensor(name)
