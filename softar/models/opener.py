"""`softar.load`: embedded models, local folders, GGUF files, adapters and hub ids, by one
function."""

import os
from pathlib import Path

import torch
from fastcore.meta import delegates
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_least, check_values, did_you_mean
from ..placement import to_device, to_dtype, to_machine
from .adapter import base_of, remember_base, wrap
from .beside import WHERE, fetch_config
from .embedded import DRAWN, MODELS, named
from .errors import opening
from .gguf_file import load_gguf
from .kind import ELSEWHERE
from .origin import again, note_origin
from .source import check_fixed, pretrained

REMEDY = (
    f" -- give one of {sorted(MODELS)}, a folder with a model in safetensors or a PEFT adapter, "
    f"a .gguf file, or a hub id that can be reached"
)


@delegates(
    PreTrainedModel.from_pretrained,
    keep=True,
    but=["ignore_mismatched_sizes", "use_safetensors", "weights_only"],
)
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
            loaded by the name and the revision recorded in it), a .gguf file, or a hub id.
        dtype: of the weights: "float32", "bfloat16", "float16", "float64", or "auto": as stored,
            but float32 where they are made or de-quantised here, and on a CPU that computes the
            stored one slowly (`computed_in`). torch_dtype, transformers' old name, is the same.
        device: None is this process's CUDA device where there is one, else the CPU.
        seed: of the weights of "mnns-tiny" and "latin-tiny", which come untrained, an adapter's base
            as its folder records it; the global random state stays as it is.
        kwargs: for `from_pretrained` (revision=, attn_implementation=, device_map=,
            gguf_file=, ...); for "mnns-tiny" largest_sum=, and for it and
            "latin-tiny" fields of their LlamaConfig.

    Raises:
        ValueError: naming `name`, where it is none of these or cannot be read; what transformers
            said is the cause. For keywords that contradict each other or are not to be changed.
    """
    check_values(load, name=name, seed=seed)
    check_least({"seed": seed}, seed=0)
    name = os.fspath(name)
    dtype, device = to_dtype(dtype, kwargs), to_device(device, kwargs)
    check_fixed(kwargs)
    with opening(name, "" if name in MODELS else REMEDY, kwargs):
        if name in MODELS:
            model, tokenizer = MODELS[name](dtype=dtype, seed=seed, **kwargs)
        else:
            model, tokenizer = _open(name, dtype=dtype, device=device, seed=seed, **kwargs)
        _check_tokenizer(tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model={name!r}: its tokenizer has neither a pad nor an end-of-sequence token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model = to_machine(model, dtype, device).eval()
    folder = fetch_config(name, **{key: kwargs[key] for key in WHERE if key in kwargs})
    is_drawn = name in DRAWN
    how = again(kwargs | ({"seed": seed} if is_drawn else {}), is_drawn=is_drawn)
    note_origin(model, name, tokenizer, folder, how)
    return model, tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where it has no tokens but special ones: of some models (Qwen's, GPT-2's,
    Gemma's) transformers makes such a one where the folder has no files of a tokenizer, and every
    text is then empty or unknown."""
    special = {*tokenizer.all_special_tokens} | tokenizer.get_added_vocab().keys()
    if len(tokenizer) <= len(special):
        raise ValueError(
            f"it comes without a tokenizer (transformers made an empty {type(tokenizer).__name__}): save the one "
            "it was trained with beside it, tokenizer.save_pretrained(FOLDER)"
        )


def _open(name: str, *, dtype, device, seed: int, **model_kwargs):
    """Dispatch on what `name` is: a GGUF file, an adapter folder, or a model folder or hub id."""
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name}")
        if "gguf_file" in model_kwargs:
            raise ValueError(f"gguf_file={model_kwargs['gguf_file']!r}: the name is a file itself")
        model, tokenizer = load_gguf(path.parent, dtype=dtype, gguf_file=path.name, **model_kwargs)
        return named(name, model, tokenizer)
    if "gguf_file" in model_kwargs:
        return load_gguf(name, dtype=dtype, **model_kwargs)
    if (path / "adapter_config.json").is_file():
        return _adapter(path, dtype=dtype, device=device, seed=seed, **model_kwargs)
    if path.is_dir() and not (path / model_kwargs.get("subfolder", "") / "config.json").is_file():
        raise FileNotFoundError("the folder holds no config.json, so no model")
    words = ("diffusion", "block")  # in the names of softar's own
    if not path.is_dir() and "/" not in name and any(word in name for word in words):
        raise FileNotFoundError(f"if it is a masked-diffusion model, {ELSEWHERE}")
    if not path.is_dir() and (name.startswith(".") or path.is_absolute() or len(path.parts) > 2):
        raise FileNotFoundError("there is no such folder, and a hub id has the form owner/name")
    close = did_you_mean(name, MODELS)
    # offline, the hub's retries take most of a minute
    if close and "/" not in name and not path.is_dir():
        raise FileNotFoundError(f"there is no such model{close}")
    return pretrained(name, dtype=dtype, **model_kwargs)


def _adapter(folder: Path, *, dtype, device, seed: int, **model_kwargs):
    """The base that an adapter folder names, wrapped as a PeftModel; the folder's own tokenizer
    where it has one."""
    base = base_of(folder)
    how = {"seed": seed} | base.how | model_kwargs
    model, tokenizer = load(base.name, dtype=dtype, device=device, **how)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    wrapped = wrap(model, folder)
    remember_base(wrapped)  # where more was said of it here
    return wrapped, tokenizer
