"""Autoregressive, or a masked-diffusion model: told from what a configuration says."""

import re

from torch import nn
from transformers import PreTrainedModel

ELSEWHERE = "use softar.diffusion.load"  # what opens the other kind of models
# Types and classes of masked-diffusion models, also of those that softar does not open yet.
# of speech, one's part is a net that denoises sound
TYPES = re.compile(
    r"(?!vibevoice)(llada|dream|sdar|a2d-|mdlm|bd3lm|.*dllm|.*diffusion)", re.IGNORECASE
)
CLASSES = re.compile(r"\w+For(MaskedLM|MaskedDiffusion|BlockDiffusion)")
# Their classes have a mask token in any case, of the time when one net was for both.
MASK_OF_OLD = ("xlm", "flaubert")


def diffusion_sign(settings: dict) -> str | None:
    """What says that the model fills masks, as in "model_type='llada'"; None where nothing does.

    Args:
        settings: fields of config.json, damaged or not, and mask_token_id of
            generation_config.json where it is there.
    """
    kind, classes = settings.get("model_type"), settings.get("architectures")
    classes = classes if isinstance(classes, list) else []
    signs = {
        "model_type": TYPES.match(str(kind)),
        "architectures": classes and all(CLASSES.fullmatch(str(name)) for name in classes),
        "is_causal": settings.get("is_causal") is False,
        "use_bidirectional_attention": settings.get("use_bidirectional_attention") in (True, "all"),
        "mask_token_id": settings.get("mask_token_id") is not None and kind not in MASK_OF_OLD,
    }
    return next((f"{field}={settings[field]!r}" for field, says in signs.items() if says), None)


def check_autoregressive(model, remedy: str = "decode it with softar.diffusion.denoise") -> None:
    """Raise ValueError for a masked-diffusion model, plain or wrapped by PEFT.

    Decoded from left to right it answers, but no position reads what it was trained to read.
    """
    model = plain(model)
    generation = model.generation_config.to_dict() if model.can_generate() else {}
    settings = {
        "mask_token_id": generation.get("mask_token_id"),
        **{k: v for k, v in model.config.to_dict().items() if v is not None},
        "architectures": [type(model).__name__],
    }
    if sign := diffusion_sign(settings):
        raise ValueError(
            f"{type(model).__name__} is a masked-diffusion model ({sign}), and this needs one that "
            f"reads from left to right: {remedy}"
        )


def plain(model) -> PreTrainedModel:
    """The model itself; the wrappers of PEFT and of torch.compile hold it."""
    model = uncompiled(model)
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def recomputes(model: PreTrainedModel) -> bool:
    """Are activations made again in the backward pass? transformers 5.24 warns of the old name."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return getattr(model, next(name for name in names if hasattr(type(model), name)))


def uncompiled(model):
    """What torch.compile wrapped, which `generate` of the wrapper runs as well; else the same."""
    is_wrapper = isinstance(model, nn.Module) and "_orig_mod" in model._modules
    return model._orig_mod if is_wrapper else model
