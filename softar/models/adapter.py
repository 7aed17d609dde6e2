"""An adapter of PEFT on its base, whose vocabulary is made the one that the adapter was trained on."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from transformers import PreTrainedModel

from .kind import plain
from .origin import AGAIN, again, origin_of

# How the tensors of an embedding are called in an adapter, and along which of their axes the tokens
# lie; those of WHOLE are the table itself.
WHOLE = {"weight": 0, "base_layer.weight": 0}
TOKENS = WHOLE | {"lora_embedding_A": 1, "lora_B.weight": 0}
# PEFT makes these of others when it loads.
DERIVED = ("prompt_encoder", "vector_bank", ".tinylora_v.", "unilora_theta_d")
# Beside a table that it saves for its size PEFT lays copies, which it does not read.
COPIES = (".modules_to_save.weight", ".original_module.weight", ".trainable_tokens_delta")


class Base(NamedTuple):
    name: str
    how: dict  # keywords of `load`, out of AGAIN


def base_of(folder: Path) -> Base:
    """The base that an adapter's folder records. Raises ValueError where it has none, or says of it
    what `load` is not told."""
    from peft import PeftConfig  # slow to import

    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"there is no adapter_model.safetensors in {folder}")
    config = PeftConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    if not base:
        raise ValueError("its adapter_config.json does not name a base model")
    if Path(base, "adapter_config.json").is_file():
        raise ValueError(f"its base model {base!r} is an adapter too: merge that one first")
    return Base(base, _read(config.revision))


def remember_base(model, opened: dict | None = None) -> None:
    """Let a PeftModel record how its base was opened, where the name does not say it: in the revision
    that PEFT has a field for; more than that, as JSON there, as PEFT saves no others.

    Args:
        opened: keywords of its loading, of a base that `load` has not opened.

    Raises:
        ValueError: nothing opens that base again, so that the adapter would be of no use.
    """
    how = origin_of(model).how
    if how is None:
        raise ValueError(
            f"an adapter on this {type(plain(model)).__name__} would be of no use, as its base was made in memory "
            "(converted, trained, merged, or drawn with fields of its own) and lies nowhere: save model and tokenizer "
            "to a folder and open that, or train without PEFT"
        )
    how = again(opened or {}) | how
    if how:
        is_plain = [*how] == ["revision"]
        for config in model.peft_config.values():
            config.revision = how["revision"] if is_plain else json.dumps(how)


def _read(revision: str | None) -> dict:
    """What `remember_base` wrote."""
    if not revision or not revision.startswith("{"):
        return {"revision": revision} if revision else {}
    how = json.loads(revision)
    if other := sorted(how.keys() - {*AGAIN}):
        raise ValueError(
            f"its adapter_config.json says {other} of its base, which is none of {AGAIN}"
        )
    return how


def wrap(model: PreTrainedModel, folder: Path, key_mapping: dict[str, str] | None = None):
    """The base with the adapter of a folder, as a PeftModel.

    A vocabulary that was grown (think tags) or cut before the adapter was trained is so here, too.

    Args:
        key_mapping: regular expressions of parameter names in the adapter -> the model's own.

    Raises:
        ValueError: naming tensors, where the adapter is of another base, and where it leaves open
            what the rows are that it added.
    """
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(folder))
    _fit_vocabulary(model, folder, config, key_mapping or {})
    wrapped = get_peft_model(model, config)
    keys = wrapped.load_adapter(str(folder), "default", key_mapping=key_mapping)
    # PEFT drops the one and draws the other without a word
    if foreign := [key for key in keys.unexpected_keys if not key.endswith(COPIES)]:
        raise ValueError(f"the adapter's {sorted(foreign)[:3]} are not in the model")
    missing = [key for key in keys.missing_keys if not any(part in key for part in DERIVED)]
    if missing:
        raise ValueError(
            f"the adapter lacks {sorted(missing)[:3]} of the model: it was trained on another base"
        )
    return wrapped


def _fit_vocabulary(model: PreTrainedModel, folder: Path, config, renamed: dict[str, str]) -> None:
    """Give the base as many rows as the adapter's tensors have. Where they are more, the adapter
    has to hold them, of either embedding."""
    rows, held = _rows(model, folder, config, renamed)
    before, trained = model.get_input_embeddings().weight.shape[0], _trained_tokens(config, model)
    most = max((index for indices in trained.values() for index in indices), default=-1)
    if not rows and most >= before:
        rows = {"trainable_token_indices": most + 1}
    if {*rows.values()} <= {before}:
        return
    told = ", ".join(f"{count} in {key}" for key, count in rows.items())
    if len({*rows.values()}) > 1:
        raise ValueError(f"the adapter's vocabulary has several sizes: {told}")
    after = rows.popitem()[1]
    ends = {end for end, indices in trained.items() if indices >= {*range(before, after)}}
    held |= ends | ({"both"} if ends else set())  # of a tied model PEFT trains both
    if model.config.get_text_config(decoder=True).tie_word_embeddings and "both" in held:
        held |= {"input", "output"}
    if after > before and (lacking := {"input", "output"} - held):
        raise ValueError(
            f"the adapter was trained on {after} tokens ({told}), its base has {before}, and it holds nothing of "
            f"the rows added to its {' and '.join(sorted(lacking))} embedding: save it with save_embedding_layers=True"
        )
    model.resize_token_embeddings(after, mean_resizing=False)


def _rows(model, folder: Path, config, renamed: dict[str, str]) -> tuple[dict[str, int], set[str]]:
    """The number of tokens by each tensor of the adapter's that has one, and of which embedding it
    holds the table: "input", "output", and "both" where a tied model has it twice."""
    names = _names(model)
    # of these PEFT trains a copy, which is tied to nothing
    copied = config.to_dict().get("modules_to_save") or []
    rows, held = {}, set()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():
            own = key
            for pattern, name in renamed.items():
                own = re.sub(pattern, name, own)
            for name, end in names.items():
                part = own.rpartition(f".{name}.")[2]
                if part in TOKENS and part != own:
                    rows[key] = file.get_slice(key).get_shape()[TOKENS[part]]
                if part in WHOLE and part != own:
                    is_copy = any(name.endswith(module) for module in copied)
                    held |= {end} if is_copy else {end, "both"}
    return rows, held


def _names(model: PreTrainedModel) -> dict[str, str]:
    """How the embeddings are called -> "input" or "output"."""
    ends = (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings()))
    return {n: end for end, module in ends for n, m in model.named_modules() if m is module}


def _trained_tokens(config, model: PreTrainedModel) -> dict[str, set[int]]:
    """The rows of either embedding, "input" and "output", that a config of PEFT trains one by
    one."""
    fields = config.to_dict()
    listed = fields.get("trainable_token_indices") or fields.get("token_indices") or []
    names = _names(model)
    if not isinstance(listed, dict):
        # TrainableTokensConfig lists them for all of its modules, LoRA's for the input
        places = fields.get("target_modules") if "token_indices" in fields else None
        if isinstance(places, str):  # a regular expression
            places = [name for name in names if re.fullmatch(places, name)]
        inner = [name for name, end in names.items() if end == "input"]
        listed = dict.fromkeys(places or inner, listed)
    trained: dict[str, set[int]] = {"input": set(), "output": set()}
    for place, indices in listed.items():
        for name, end in names.items():
            trained[end] |= {*indices} if f".{name}".endswith(f".{place}") else set()
    return trained
