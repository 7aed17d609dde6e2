"""What the recipes of masked diffusion (recipes/sft_diffusion.py, grpo_diffusion.py) share: what is said
of a model whose folder does not say it."""

from dataclasses import dataclass

from softar.training import opt

from .models import MODELS


@dataclass
class FolderArguments:
    """Options of `softar.diffusion.load`; a recipe adds the length of blocks."""

    shift: int | None = opt(
        None, "Where the model's folder does not say it: 1, logits are about the next token."
    )
    kind: str | None = opt(
        None,
        "Family of a folder that says no more than the causal model it was made from: open_dcoder, a2d, ...",
    )
    mask_token_id: int | None = opt(
        None, "Where the model's folder does not say it. Default: the family's."
    )
    eos_token_id: int | None = opt(None, "The same of the token that ends a text.")


FOLDER = ("kind", "mask_token_id", "eos_token_id", "shift")


def check_folder_options(said: dict, model: str, remedy: str = "leave it out") -> None:
    """Raise ValueError for what is said of a model of which all is known. said: as the options are
    called."""
    for name, value in said.items():
        if model in MODELS:
            raise ValueError(f"{name}={value} does nothing for {model!r}, which is known: {remedy}")
