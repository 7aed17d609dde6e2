"""DiffusionGemma as transformers has it: what its folder must say, and what the tokenizer must know."""

from transformers import (
    AutoConfig,
    DiffusionGemmaForBlockDiffusion,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .architectures import SIZES
from .folder import Stated

OPENER = DiffusionGemmaForBlockDiffusion


def read_config(name: str, settings: dict, stated: Stated, fetch: dict) -> PreTrainedConfig:
    """Its configuration. Raises ValueError for one that builds no model, or not the one that is
    stored, and for statements of the caller."""
    if any(value is not None for value in stated):
        raise ValueError(f"a DiffusionGemma says all by itself, and takes none of {Stated._fields}")
    for field in ("text_config", "vision_config"):
        if not isinstance(settings.get(field), dict):
            raise ValueError(f"its config.json says no {field}")
    if missing := [field for field in SIZES if settings["text_config"].get(field) is None]:
        raise ValueError(f"the text_config of its config.json says no {missing[0]}")
    length = settings.get("canvas_length")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(
            f"its config.json says canvas_length={length!r}: a whole number, 1 or more, is needed"
        )
    return AutoConfig.from_pretrained(name, trust_remote_code=False, **fetch)


def introduce(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let model and tokenizer know of each other's special tokens. The mask token of Gemma's
    tokenizers is none to this model."""
    text = config.get_text_config()
    tokenizer.padding_side = "left"
    if text.eos_token_id is None:
        text.eos_token_id = tokenizer.eos_token_id
    tokenizer.mask_token = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
