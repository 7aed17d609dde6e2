"""Masked-diffusion language models on stock transformers: LLaDA, Dream, BERT-like ones, from their
original folders.

LLaDA is Llama and Dream is Qwen2, read bidirectionally, so no remote code is needed; only names of
parameters and of configuration fields differ. What the loop has to know of a model stands in
`facts`, how to run its parts in `parts`.

Shapes: B batch, T positions of the forward, L length of the canvas, D width, V vocabulary.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from fastcore.meta import delegates
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from softar.checks import check_least, check_values
from softar.models import (
    FETCH,
    MNNS_WORDS,
    base_of,
    cached_if_offline,
    check_fit,
    check_fixed,
    opening,
    settings_of,
    word_tokenizer,
    wrap,
)
from softar.models import MODELS as AUTOREGRESSIVE
from softar.placement import to_device, to_dtype, to_machine
from softar.progress import without_bars

from . import gemma
from .architectures import LLADA_NAMES, LladaConfig, LladaForMaskedDiffusion, check_settings
from .families import FAMILIES, family_of
from .folder import GENERATION, Stated, complete, find_file, read_fields
from .head import HEAD_FILE, learn_head, load_head
from .net import CANVASES, end_tokens, facts
from .noise import NOISE_FILE, load_noise

LLADA_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
REMEDY = (
    " -- give a folder with a LLaDA, Dream or BERT-like model in safetensors, or a hub id that can be "
    "reached"
)
# For BERT-like models, as tommyp111/modernbert-dllm-tulu was trained: "User: q [SEP] Assistant: a".
BERT_CHAT = (
    "{{ cls_token }}{% for message in messages %}{{ '' if loop.first else ' ' }}{{ message['role'] | capitalize }}: "
    "{{ message['content'] | trim }}{{ '' if message['role'] == 'assistant' else ' ' }}{{ sep_token }}{% endfor %}"
    "{% if add_generation_prompt %} Assistant:{% endif %}"
)
TURN_ENDS = ("<|eot_id|>", "<|im_end|>")  # end an answer as the end-of-text token does


# Also for a model made from a configuration: it is saved under the original names.
register_checkpoint_conversion_mapping(
    "LladaForMaskedDiffusion",
    [WeightRenaming(llada, llama) for llada, llama in LLADA_NAMES.items()],
    overwrite=True,
)


# Wide because each is something that only the caller may know of a folder.
@delegates(
    PreTrainedModel.from_pretrained,
    keep=True,
    but=["config", "ignore_mismatched_sizes", "use_safetensors", "weights_only"],
)
def load(
    name: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    seed: int | None = None,
    kind: str | None = None,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    block_length: int | None = None,
    shift: int | None = None,
    **kwargs,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A masked-diffusion language model and its tokenizer, in eval mode.

    Args:
        name: one of MODELS ("mnns-diffusion-tiny"), or a local folder or a hub id: LLaDA, LLaDA2.0
            and 2.1, Dream (or DiffuCoder, Dream-Coder), SDAR, Fast-dLLM v2, A2D (MDLM and BD3LM of
            dllm), Open-dCoder, DiffusionGemma (its text part), any masked language model of
            transformers (ModernBERT, BERT, RoBERTa, ...), a PEFT adapter. Weights are read as
            safetensors, shard by shard.
        dtype: of the weights; as for softar.load.
        device: None is this process's CUDA device where there is one, else the CPU.
        seed: None gives an embedded model as the package brings it, trained; a number draws
            untrained weights.
        kind: the family, as `facts(model).family` names it, of a folder that says no more than the
            causal model that it was made from: "open_dcoder" where generation_config.json names no
            mask token, "a2d", ...
        mask_token_id, eos_token_id, block_length, shift: what the folder does not say; None is what
            it says, else the released models'. LLaDA2 names no mask (156895) and no end token
            (its pad token), and its blocks are of 32; a BD3LM's block length is said nowhere, and an
            A2D is unshifted unless shift=1 says that logits are about the next position.
        kwargs: for `from_pretrained` (revision=, device_map=, attn_implementation=, ...).

    Returns:
        The model; `facts(model)` tells its mask token and the like, and the soft-mask head that its
        transparency_config.json holds, with which `denoise` decodes it by itself. The tokenizer,
            which pads on the
        left, with mask_token and chat_template set; None where a local folder holds none.

    Raises:
        ValueError: naming `name` and, where the model is of a kind that is not supported, the field
            that says so; a statement that contradicts the folder.
    """
    check_values(load, name=name, seed=seed)
    check_least({"seed": seed}, seed=0)
    name = os.fspath(name)
    dtype, device = to_dtype(dtype, kwargs), to_device(device, kwargs)
    check_fixed(kwargs)
    stated = Stated(kind, mask_token_id, eos_token_id, block_length, shift)
    with opening(name, REMEDY, kwargs):
        if name in AUTOREGRESSIVE or name.endswith(".gguf"):
            raise ValueError("it is an autoregressive model: use softar.load")
        if name in MODELS:
            if any(value is not None for value in stated):
                raise ValueError(f"it is embedded and known: it takes none of {Stated._fields}")
            model, tokenizer = MODELS[name](dtype=dtype, seed=seed, **kwargs)
        elif seed is not None:
            raise ValueError(f"seed={seed} draws the weights of {[*MODELS]}, these are stored")
        elif Path(name, "adapter_config.json").is_file():
            model, tokenizer = _adapter(Path(name), stated, dtype=dtype, device=device, **kwargs)
        else:
            model, tokenizer = _open(name, stated, dtype=dtype, **kwargs)
        if name not in MODELS:  # an embedded one, trained, came through here by its folder
            learn_head(model, _head_file(name, kwargs))
    return to_machine(model, dtype, device).eval(), tokenizer


def _open(name: str, stated: Stated, *, dtype, **model_kwargs):
    """A folder or a hub id; raises what transformers raises, and ValueError for weights that do not
    fit."""
    model_kwargs = cached_if_offline(name, model_kwargs)
    fetch = {key: model_kwargs[key] for key in FETCH if key in model_kwargs}
    if Path(name).is_dir() and not Path(name, fetch.get("subfolder", ""), "config.json").is_file():
        raise FileNotFoundError("the folder holds no config.json, so no model")
    if not Path(name).is_dir() and (name.startswith(".") or Path(name).is_absolute()):
        raise FileNotFoundError("there is no such folder, and a hub id has the form owner/name")
    settings = settings_of(name, **fetch)
    family = family_of(settings, stated.kind, read_fields(name, GENERATION, fetch))
    if settings["model_type"] == CANVASES:
        config = gemma.read_config(name, settings, stated, fetch)
        opener = gemma.OPENER
    elif family is None:
        _check_masked_lm(settings, stated)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **fetch)
        if config.is_encoder_decoder:
            raise ValueError(
                f"its config.json says model_type={config.model_type!r}, which is an encoder with a decoder"
            )
        model_kwargs, opener = model_kwargs | {"trust_remote_code": False}, AutoModelForMaskedLM
    else:
        check_settings(settings, family.config.needs)
        how = model_kwargs.pop("attn_implementation", None)
        config, model_kwargs = family.config.from_pretrained(
            name, return_unused_kwargs=True, **model_kwargs
        )
        config._attn_implementation = how  # SDAR's folders ask for kernels of their training
        complete(config, name, settings, stated, fetch)
        model_kwargs, opener = model_kwargs | fetch, family.model
    model, info = opener.from_pretrained(
        name,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **model_kwargs,
    )
    # A masked LM's checkpoint may carry other heads; for it only what is missing counts.
    check_fit(info, model, is_head_of_many=opener is AutoModelForMaskedLM)
    tokenizer = _tokenizer(name, config.model_type, fetch)
    introduce(model, tokenizer)
    return model, tokenizer


def _check_masked_lm(settings: dict, stated: Stated) -> None:
    """Raise ValueError for the config.json of a model that no family and no AutoModelForMaskedLM
    opens."""
    kind, classes = settings["model_type"], settings["architectures"]
    if any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in classes):
        raise ValueError(
            f"its config.json says model_type={kind!r}, architectures={classes}, which is not a masked-diffusion "
            f"model: use softar.load"
        )
    if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ValueError(
            f"its config.json says model_type={kind!r}, which is not a masked-diffusion model: neither "
            f"{' nor '.join([*FAMILIES, CANVASES])} nor a masked language model of transformers"
        )
    if any(value is not None for value in stated):
        raise ValueError(
            f"a masked language model of transformers says all by itself, and takes none of {Stated._fields}"
        )


def _adapter(folder: Path, stated: Stated, *, dtype, device, **model_kwargs):
    """The base that an adapter folder names, wrapped as a PeftModel; the folder's own tokenizer
    where it has one."""
    model, tokenizer = load(
        base_of(folder), dtype=dtype, device=device, **stated._asdict(), **model_kwargs
    )
    kind = model.config.model_type
    if (of_adapter := _tokenizer(str(folder), kind, {})) is not None:
        tokenizer = of_adapter
        introduce(model, tokenizer)
    # An adapter trained on the remote code has LLaDA's names.
    wrapped = wrap(model, folder, LLADA_NAMES if kind == "llada" else None)
    # without the file the process is that of the base
    if (named := load_noise(folder)) is not None:
        model.config.diffusion_process = named
        try:
            facts(model)
        except ValueError as error:
            raise ValueError(f"{NOISE_FILE}: {error}") from None
    return wrapped, tokenizer


def _head_file(name: str, model_kwargs: dict) -> dict | None:
    fetch = {key: model_kwargs[key] for key in FETCH if key in model_kwargs}
    file = find_file(name, HEAD_FILE, fetch)
    return None if file is None else load_head(file.parent)


def _tokenizer(name: str, kind: str, fetch: dict) -> PreTrainedTokenizerBase | None:
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    # of a family's, tokenizer_config.json alone names special tokens
    files = [file for file in files if kind not in FAMILIES or file != "tokenizer_config.json"]
    if Path(name).is_dir() and not any(find_file(name, file, fetch) for file in files):
        return None
    if kind == "Dream":  # its tokenizer_config.json names a class of its own, which is Qwen2's
        return Qwen2Tokenizer.from_pretrained(name, **fetch)
    if kind == "llada":  # AutoTokenizer would warn of a model_type that it does not know
        return PreTrainedTokenizerFast.from_pretrained(name, **fetch)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **fetch)


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
        elif config.model_type not in FAMILIES and tokenizer.sep_token is not None:
            tokenizer.chat_template = BERT_CHAT
    if model.can_generate():
        turn_ends = [vocabulary[end] for end in TURN_ENDS if end in vocabulary]
        model.generation_config.eos_token_id = (
            list(dict.fromkeys([*end_tokens(model), *turn_ends])) or None
        )


def mnns_diffusion_tiny(**options):
    """The 2-layer LLaDA of the MNNS task: `mnns-tiny` read in both directions, with a mask
    token."""
    size = dict(d_model=32, mlp_hidden_size=128, n_layers=2, n_heads=2, n_kv_heads=2)
    return _embedded("mnns-diffusion-tiny", [*MNNS_WORDS, "<mask>"], size, **options)


def latin_diffusion_tiny(**options):
    """The 3-layer LLaDA of the Latin squares. Its rotation is fast, so that a column and the next
    can be told apart, and its weights start large, as a net this small wants them."""
    size = dict(
        d_model=64,
        mlp_hidden_size=192,
        n_layers=3,
        n_heads=4,
        n_kv_heads=4,
        rope_theta=20.0,
        initializer_range=0.1,
    )
    return _embedded("latin-diffusion-tiny", LATIN_WORDS, size, **options)


def _embedded(name: str, words: list[str], size: dict, *, dtype, seed: int | None, **config):
    """Untrained with a seed; without one the checkpoint that lies beside this file."""
    folder = CHECKPOINTS / name
    if seed is None and not config and folder.is_dir():
        with without_bars():
            model, tokenizer = load(folder, dtype=dtype, device="cpu")
        model.name_or_path = model.config._name_or_path = name
        return model, tokenizer
    fields = size | dict(
        vocab_size=len(words),
        max_sequence_length=64,
        weight_tying=False,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mask_token_id=len(words) - 1,
    )
    names = {*LladaConfig().to_dict(), *LladaConfig.attribute_map.values()}
    if unknown := sorted(set(config) - names):
        raise ValueError(f"it does not take {unknown}: give fields of LladaConfig")
    settings = LladaConfig(**(fields | config))
    # weights are drawn on the CPU: the same on every device
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(seed or 0))
        model = LladaForMaskedDiffusion(settings)
    tokenizer = word_tokenizer(
        words, mask_token="<mask>", model_max_length=settings.max_position_embeddings
    )
    model.name_or_path = settings._name_or_path = name
    return model.to(torch.float32 if dtype == "auto" else dtype), tokenizer


CHECKPOINTS = Path(__file__).parent / "checkpoints"
LATIN_WORDS = ["<pad>", "<bos>", "<eos>", *"123456789", "<mask>"]
MODELS: dict[str, Callable] = {
    "mnns-diffusion-tiny": mnns_diffusion_tiny,
    "latin-diffusion-tiny": latin_diffusion_tiny,
}
