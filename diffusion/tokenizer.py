"""The tokenizer of a masked-diffusion model, and what it and the model have to know of each other."""

from pathlib import Path

from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from . import gemma
from .architectures import LladaConfig, Published
from .experts import Llada2Config
from .folder import check_id, find_file
from .net import CANVASES, end_tokens

LLADA_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLADA2_CHAT = (
    "{% for message in messages %}{% set role = {'user': 'HUMAN'}.get(message['role'], message['role'] | upper) %}"
    "<role>{{ role }}</role>{{ message['content'] }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
# For BERT-like models, as tommyp111/modernbert-dllm-tulu was trained: "User: q [SEP] Assistant: a".
BERT_CHAT = (
    "{{ cls_token }}{% for message in messages %}{{ '' if loop.first else ' ' }}{{ message['role'] | capitalize }}: "
    "{{ message['content'] | trim }}{{ '' if message['role'] == 'assistant' else ' ' }}{{ sep_token }}{% endfor %}"
    "{% if add_generation_prompt %} Assistant:{% endif %}"
)
TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|role_end|>",
)  # end an answer as the end-of-text token does

# Before Qwen3's template: A2D models are trained without thoughts.
NO_THOUGHT = (
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}"
)


def open_tokenizer(
    name: str, config: PreTrainedConfig, fetch: dict
) -> PreTrainedTokenizerBase | None:
    """Of a folder or a hub id with this model's configuration; None where there is none."""
    kind = config.model_type
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    # of a family's, tokenizer_config.json alone names special tokens
    is_family = isinstance(config, Published)
    files = [file for file in files if not is_family or file != "tokenizer_config.json"]
    if Path(name).is_dir() and not any(find_file(name, file, fetch) for file in files):
        return None
    if kind == "Dream":  # its tokenizer_config.json names a class of its own, which is Qwen2's
        return Qwen2Tokenizer.from_pretrained(name, **fetch)
    if kind == "llada":  # AutoTokenizer would warn of a model_type that it does not know
        return PreTrainedTokenizerFast.from_pretrained(name, **fetch)
    if is_family:  # AutoTokenizer would look for a model_type that it does not know
        fetch = fetch | {"config": config}
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **fetch)


def name_mask(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Give a family's tokenizer a mask token where it has none, and it is the next id: A2D's and
    Open-dCoder's are registered when they are loaded. Raises ValueError where no row is left."""
    if not isinstance(config, Published) or not config.mask_tokens:
        return
    if tokenizer is None or tokenizer.mask_token_id is not None:
        return
    if config.mask_token_id in (None, len(tokenizer)):
        tokenizer.add_special_tokens({"mask_token": config.mask_tokens[0]})
        check_id("mask_token_id", tokenizer.mask_token_id, config.vocab_size)
        config.mask_token_id = tokenizer.mask_token_id


def introduce(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Let model and tokenizer know of each other's special tokens."""
    config = model.config
    if tokenizer is None:
        return
    if config.model_type == CANVASES:
        gemma.introduce(config, tokenizer)
        return
    tokenizer.padding_side = "left"
    if "mask_token_id" not in config or config.mask_token_id is None:
        config.mask_token_id = tokenizer.mask_token_id
    if tokenizer.mask_token_id not in (None, config.mask_token_id):
        raise ValueError(
            f"mask_token_id is contradictory: {config.mask_token_id} by the model's configuration, "
            f"{tokenizer.mask_token_id} by the tokenizer"
        )
    if tokenizer.mask_token is None and config.mask_token_id is not None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(config.mask_token_id)
    if "eos_token_id" not in config or config.eos_token_id is None:
        config.eos_token_id = (
            tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        )
    if tokenizer.eos_token is None:  # BERT's, which knows its end by another name
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    vocabulary = tokenizer.get_vocab()
    if tokenizer.chat_template is None:
        if isinstance(config, LladaConfig) and "<|start_header_id|>" in vocabulary:
            tokenizer.chat_template = LLADA_CHAT
        elif isinstance(config, Llada2Config) and "<|role_end|>" in vocabulary:
            tokenizer.chat_template = LLADA2_CHAT
        elif not isinstance(config, Published) and tokenizer.sep_token is not None:
            tokenizer.chat_template = BERT_CHAT
    template = tokenizer.chat_template
    if (
        isinstance(config, Published)
        and config.family == "a2d"
        and isinstance(template, str)
        and "enable_thinking" in template
    ):
        tokenizer.chat_template = NO_THOUGHT + template.removeprefix(NO_THOUGHT)
    if model.can_generate():
        turn_ends = [vocabulary[end] for end in TURN_ENDS if end in vocabulary]
        model.generation_config.eos_token_id = (
            list(dict.fromkeys([*end_tokens(model), *turn_ends])) or None
        )
