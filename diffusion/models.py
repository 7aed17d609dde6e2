"""Masked-diffusion language models on stock transformers: LLaDA, Dream, BERT-like ones, from their
original folders.

LLaDA is Llama and Dream is Qwen2, read bidirectionally, so no remote code is needed; only names of
parameters and of configuration fields differ. What the loop has to know of a model stands in
`facts`, how to run its parts in `parts`.

Shapes: B batch, T positions of the forward, L length of the canvas, D width, V vocabulary.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from fastcore.meta import delegates
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from softar.checks import check_least, check_values
from softar.models import (
    FETCH,
    MNNS_WORDS,
    base_of,
    cached_if_offline,
    check_fit,
    check_fixed,
    diffusion_sign,
    latin_tiny,
    opening,
    settings_of,
    word_tokenizer,
    wrap,
)
from softar.models import MODELS as AUTOREGRESSIVE
from softar.models.adapter import remember_base
from softar.models.origin import again, note_origin
from softar.placement import to_device, to_dtype, to_machine
from softar.progress import without_bars

from . import gemma
from .architectures import LLADA_NAMES, LladaConfig, LladaForMaskedDiffusion, check_settings
from .convert import convert
from .experts import LLADA2_NAMES, check_experts
from .families import FAMILIES, family_of, is_converted, kinds_on
from .folder import (
    GENERATION,
    Stated,
    check_id,
    check_reading,
    check_sizes,
    complete,
    find_file,
    mask_ids,
    read_fields,
    weight_names,
)
from .head import HEAD_FILE, learn_head, load_head
from .net import CANVASES, facts
from .noise import NOISE_FILE, load_noise
from .tokenizer import introduce, name_mask, open_tokenizer

REMEDY = (
    " -- give a folder with a diffusion language model in safetensors (LLaDA, Dream, SDAR, BERT-like, "
    "...), or a hub id that can be reached"
)


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
    stated = Stated(kind, mask_token_id, eos_token_id, block_length, shift)
    check_values(load, name=name, seed=seed, **stated._asdict())
    check_least({"seed": seed}, seed=0)
    name = os.fspath(name)
    dtype, device = to_dtype(dtype, kwargs), to_device(device, kwargs)
    check_fixed(kwargs, config="it is read from the folder")
    with opening(name, REMEDY, kwargs):
        if name in AUTOREGRESSIVE or name.endswith(".gguf") or "gguf_file" in kwargs:
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
    model = to_machine(model, dtype, device).eval()
    how = again({"seed": seed, **stated._asdict(), **kwargs}, is_drawn=name in MODELS)
    note_origin(model, name, tokenizer, how=how)
    return model, tokenizer


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
    generation = read_fields(name, GENERATION, fetch)
    is_canvases = settings["model_type"] == CANVASES
    family = None if is_canvases else family_of(settings, stated.kind, generation)
    if is_canvases:
        config = gemma.read_config(name, settings, stated, fetch)
        tokenizer, opener = open_tokenizer(name, config, fetch), gemma.OPENER
    elif family is None and is_converted(settings):
        # of `convert`, which leaves the layout of a base that has no name here
        if any(value is not None for value in stated):
            raise ValueError(f"it was converted and says all, and takes none of {Stated._fields}")
        check_reading(settings["logits_shift"], settings.get("block_length"))
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **fetch)
        check_id("mask_token_id", config.mask_token_id, config.vocab_size)
        tokenizer, opener = open_tokenizer(name, config, fetch), AutoModelForCausalLM
    elif family is None:
        _check_masked_lm(settings, stated)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **fetch)
        if config.is_encoder_decoder:
            raise ValueError(
                f"its config.json says model_type={config.model_type!r}, which is an encoder with a decoder"
            )
        tokenizer = open_tokenizer(name, config, fetch)
        model_kwargs, opener = model_kwargs | {"trust_remote_code": False}, AutoModelForMaskedLM
    else:
        check_settings(settings, family.config.needs)
        check_sizes(family.config, settings)
        config = family.config.from_pretrained(name, **fetch)
        # SDAR's folders ask for kernels of their training
        config._attn_implementation = model_kwargs.pop("attn_implementation", None)
        tokenizer, opener = open_tokenizer(name, config, fetch), family.model
        masks = mask_ids(name, config, settings, generation, tokenizer, fetch)
        complete(config, masks, settings, generation, tokenizer, stated)
        name_mask(config, tokenizer)
        if family.has_experts:
            check_experts(config, weight_names(name, fetch, model_kwargs.get("variant")))
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
    if opener is not AutoModelForMaskedLM:
        _check_tied(model)
    introduce(model, tokenizer)
    return model, tokenizer


def _check_tied(model: PreTrainedModel) -> None:
    """Raise ValueError where embedding and head are to be one, and the weights hold two: then
    transformers takes two, and the original code one."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head.weight is not table.weight:
        raise ValueError(
            "its config.json says that the embedding is the head, too (tie_word_embeddings), and its weights hold a "
            "head of another kind: correct the one or the other"
        )


def _check_masked_lm(settings: dict, stated: Stated) -> None:
    """Raise ValueError for the config.json of a model that no family and no AutoModelForMaskedLM
    opens."""
    kind, classes = settings["model_type"], settings["architectures"]
    fills_masks = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    is_causal = any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in classes) or (
        kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not fills_masks
    )
    kinds = kinds_on(kind)
    if is_causal and kinds and diffusion_sign(settings):
        raise ValueError(
            f"its config.json says {diffusion_sign(settings)}, and not of which family it is: say kind=, one of {kinds}"
        )
    if is_causal and not diffusion_sign(settings):
        or_kind = f", or say of which family it is: kind=, one of {kinds}" if kinds else ""
        raise ValueError(
            f"its config.json says model_type={kind!r}, architectures={classes}, which is not a masked-diffusion "
            f"model: use softar.load{or_kind}"
        )
    if not fills_masks:
        raise ValueError(
            f"its config.json says model_type={kind!r}, which is not a masked-diffusion model that softar "
            f"opens: neither {' nor '.join([*FAMILIES, CANVASES])} nor a masked language model of transformers"
        )
    if any(value is not None for value in stated):
        raise ValueError(
            f"a masked language model of transformers says all by itself, and takes none of {Stated._fields}"
        )


def load_original(model: PreTrainedModel, folder: str | Path) -> None:
    """The weights of a checkpoint of the trainer, which is under the original names: the trainer
    would take them for unknown ones, and go on with what the model has. Raises ValueError for what
    does not fit."""
    try:
        saved, info = type(model).from_pretrained(
            folder,
            config=model.config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        check_fit(info, saved)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} does not fit the model: {error}"
        ) from None
    # what the trainer put into the model, as a head, is not in its checkpoint
    model.load_state_dict(saved.state_dict(), strict=False)


def _adapter(folder: Path, stated: Stated, *, dtype, device, **model_kwargs):
    """The base that an adapter folder names, wrapped as a PeftModel; the folder's own tokenizer
    where it has one."""
    base = base_of(folder)
    said = {k: v for k, v in stated._asdict().items() if v is not None} | model_kwargs
    model, tokenizer = load(base.name, dtype=dtype, device=device, **(base.how | said))
    kind = model.config.model_type
    if (of_adapter := open_tokenizer(str(folder), model.config, {})) is not None:
        tokenizer = of_adapter
        name_mask(model.config, tokenizer)
        introduce(model, tokenizer)
    # An adapter trained on the remote code has the names of its base.
    wrapped = wrap(model, folder, RENAMED.get(kind))
    remember_base(wrapped)
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


def mnns_diffusion_tiny(**options):
    """The 2-layer LLaDA of the MNNS task: `mnns-tiny` read in both directions, with a mask
    token."""
    size = dict(d_model=32, mlp_hidden_size=128, n_layers=2, n_heads=2, n_kv_heads=2)
    draw = functools.partial(_draw_llada, [*MNNS_WORDS, "<mask>"], size)
    return _embedded("mnns-diffusion-tiny", draw, **options)


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
    draw = functools.partial(_draw_llada, LATIN_WORDS, size)
    return _embedded("latin-diffusion-tiny", draw, **options)


def latin_block_tiny(**options):
    """Latin squares behind their clues: `latin-tiny` read in blocks of five cells, a row of the
    square."""
    return _embedded("latin-block-tiny", _draw_blocks, **options)


def _embedded(name: str, draw: Callable, *, dtype, seed: int | None, **config):
    """Untrained with a seed, as `draw` makes it; without one the checkpoint that lies beside this
    file."""
    folder = CHECKPOINTS / name
    if seed is None and not config and folder.is_dir():
        with without_bars():
            model, tokenizer = load(folder, dtype=dtype, device="cpu")
    else:
        model, tokenizer = draw(int(seed or 0), config)
    model.name_or_path = model.config._name_or_path = name
    return model.to(torch.float32 if dtype == "auto" else dtype), tokenizer


def _draw_blocks(seed: int, config: dict):
    return convert(*latin_tiny(seed=seed, **config), shift=0, block_length=5)


def _draw_llada(words: list[str], size: dict, seed: int, config: dict):
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
        torch.random.default_generator.manual_seed(seed)
        model = LladaForMaskedDiffusion(settings)
    tokenizer = word_tokenizer(
        words, mask_token="<mask>", model_max_length=settings.max_position_embeddings
    )
    return model, tokenizer


RENAMED = {"llada": LLADA_NAMES, "llada2_moe": LLADA2_NAMES}
CHECKPOINTS = Path(__file__).parent / "checkpoints"
LATIN_WORDS = ["<pad>", "<bos>", "<eos>", *"123456789", "<mask>"]
MODELS: dict[str, Callable] = {
    "mnns-diffusion-tiny": mnns_diffusion_tiny,
    "latin-diffusion-tiny": latin_diffusion_tiny,
    "latin-block-tiny": latin_block_tiny,
}
