"""Models in a form that vLLM can read."""

import contextlib
import tempfile
from collections.abc import Iterator

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from ..checks import did_you_mean, shorten
from ..decoders.card import describe
from ..models import MODELS, folder_of, load
from ..placement import computed_in
from .machine import on_cpu

# vLLM's attention on CPU has kernels for heads of these widths alone; asked for another, its engine
# dies at the first prompt.
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
LLAMA_HEADS = 32  # what narrower heads of a Llama are widened to


def check_served(name: str) -> None:
    """Raise ValueError, before anything is read or started, for what vLLM cannot serve: a
    masked-diffusion model, and a hub id that is neither in the cache nor to be reached."""
    card = describe(name)
    if card.kind == "diffusion":
        raise ValueError(
            f"model={name!r} is a masked-diffusion model, and vLLM serves none: decode it here, by "
            f"`softar fill -m {name}`, `softar compare` or softar.diffusion.denoise"
        )
    if card.kind is not None or card.folder is not None:
        return
    try:
        validate_repo_id(name)
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        # one question, where a download would ask for most of a minute
        HfApi().model_info(name, timeout=5)
    except HFValidationError:
        return  # a path: `load` says what is wrong with it
    except Exception as error:  # those of the hub, of its HTTP library, of the machine
        raise ValueError(
            f"model={name!r} is no folder and not in the hub's cache, and the hub does not give it "
            f"({shorten(str(error), 80)}){did_you_mean(name, MODELS)}: give a folder, a .gguf file, "
            f"a hub id that can be reached or one of {sorted(MODELS)}"
        ) from error


@contextlib.contextmanager
def exported(name: str, dtype: str = "auto") -> Iterator[str]:
    """A folder that vLLM can read: `name` itself where it is one (or a hub id), else a copy, gone
    after the block.

    Embedded models, GGUF files and adapters (merged) are written with save_pretrained. Heads that
    are too narrow for vLLM are widened, which leaves the model's function as it is.

    Raises:
        ValueError: naming `name`, where it cannot be served or loaded, or its heads have a width that vLLM has
            no kernel for.
    """
    check_served(name)
    folder = folder_of(name)
    adapter = folder is not None and (folder / "adapter_config.json").is_file()
    if (
        folder is None
        and name not in MODELS
        and not name.endswith(".gguf")
        and name.count("/") == 1
    ):
        yield name  # a hub id
        return
    if folder is not None and not adapter and (folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not is_narrow(config):
            check_heads(name, config)
            yield str(folder)
            return
    model, tokenizer = load(name, dtype=dtype, device="cpu")
    model = model.merge_and_unload() if adapter else model
    model = widened(model) if is_narrow(model.config) else model
    check_heads(name, model.config)
    with tempfile.TemporaryDirectory(prefix="softar-vllm-") as copy:
        model.save_pretrained(copy)
        tokenizer.save_pretrained(copy)
        yield copy


def served_dtype(folder: str, dtype: str) -> str:
    """By vLLM's names. "auto" is settled as softar.load does: vLLM's own serves float32 weights in
    half precision."""
    if dtype != "auto":
        return dtype
    stored = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype
    if stored is None:  # its weights alone say it, and vLLM reads them
        return "auto"
    device = torch.device("cpu" if on_cpu() else "cuda")
    return str(computed_in(stored, device)).removeprefix("torch.")


def _head_dim(config) -> int:
    text = config.get_text_config().to_dict()
    return text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]


def is_narrow(config) -> bool:
    """Can its heads, and must they, be widened?"""
    plain = config.model_type == "llama" and config.rope_parameters["rope_type"] == "default"
    return plain and _head_dim(config) < LLAMA_HEADS and LLAMA_HEADS % _head_dim(config) == 0


def check_heads(name: str, config) -> None:
    if on_cpu() and _head_dim(config) not in CPU_HEADS:
        raise ValueError(
            f"model={name!r} has attention heads {_head_dim(config)} wide: vLLM on CPU serves {CPU_HEADS} only"
        )


def widened(model: LlamaForCausalLM) -> PreTrainedModel:
    """The same function with heads LLAMA_HEADS wide, most of it zeros: for kernels that want no
    narrower ones.

    With heads r times as wide, the rotation of coordinate r i turns as coordinate i did: theta^(-2
    r i / (r d)). The queries grow by sqrt(r), as attention now divides by sqrt(r d).
    """
    config, d, wide = model.config, _head_dim(model.config), LLAMA_HEADS
    r = wide // d
    half = torch.arange(d // 2) * r
    target = torch.cat([half, half + wide // 2])  # [d], where coordinates go

    def spread(rows):  # [heads * d, ...] -> [heads * wide, ...]
        out = rows.new_zeros(rows.shape[0] // d, wide, *rows.shape[1:])
        out[:, target] = rows.view(-1, d, *rows.shape[1:])
        return out.flatten(0, 1)

    weights = dict(model.state_dict())
    for key, value in weights.items():
        part = key.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj"):
            weights[key] = spread(value) * (r**0.5 if part == "q_proj" else 1)
        elif part == "o_proj" and key.endswith("weight"):
            weights[key] = spread(value.T).T.contiguous()
    settings = type(config).from_dict({**config.to_dict(), "head_dim": wide})
    out = LlamaForCausalLM._from_config(settings, dtype=model.dtype)
    out.load_state_dict(weights)
    out.generation_config = model.generation_config
    return out.eval()
