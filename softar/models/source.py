"""A folder or a hub id of transformers, opened safely: no remote code is run and no pickle is read."""

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .kind import ELSEWHERE, check_autoregressive, diffusion_sign

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
FIXED_BECAUSE = (
    "softar runs no remote code, reads no pickle and returns the model and its tokenizer"
)


def pretrained(source, **model_kwargs):
    """A folder or a hub id. Raises OSError where there is none or its weights are pickled."""
    fetch = {key: model_kwargs[key] for key in FETCH if key in model_kwargs}
    if "gguf_file" not in model_kwargs:
        _check_causal(PreTrainedConfig.get_config_dict(source, **fetch)[0])
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **fetch)
    # A GGUF is not looked for as safetensors
    safe = {} if "gguf_file" in model_kwargs else {"use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(
        source, trust_remote_code=False, **safe, **model_kwargs
    )
    check_autoregressive(model, ELSEWHERE)  # generation_config.json may name a mask token too
    return model, tokenizer


def _check_causal(settings: dict) -> None:
    """Raise ValueError for the config.json of anything but a causal language model."""
    if sign := diffusion_sign(settings):
        raise ValueError(
            f"its config.json says {sign}, so it is a masked-diffusion model: {ELSEWHERE}"
        )
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"its config.json says model_type={kind!r}, which is not a causal language model of transformers: if it is "
            f"a masked-diffusion model, {ELSEWHERE}"
        )


def check_fixed(model_kwargs: dict) -> None:
    """Raise ValueError for what `from_pretrained` takes and softar decides."""
    if fixed := sorted(FIXED & model_kwargs.keys()):
        raise ValueError(
            f"{fixed[0]}={model_kwargs[fixed[0]]!r} is not to be changed: {FIXED_BECAUSE}"
        )
