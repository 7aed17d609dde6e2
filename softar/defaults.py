"""How a model is decoded where nobody says how, decided once for Python, the command line,
comparisons, lm-eval and vLLM.

As its soft_config.json says; without one softly between its think tags, where its tokenizer or chat
template has them; else in narrow, noisy mixtures for the first half of the text, which a model can
read without training, and one token at a time from there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .checks import made
from .config import CONFIG_FILE, SoftConfig, renamed
from .mixers import mk_mixer
from .models.beside import file_of, is_hub_id
from .models.origin import origin_of
from .names import note_named

# Half of the length at most is thought, so that an answer follows
NARROW = dict(mixer="gumbel", temperature=0.6, top_k=10, top_p=0.95)
TAGGED_LENGTH = 1024  # thought and answer of a model that was trained to think
PLAIN_LENGTH = 128
# What opens and closes a thought: Qwen3, DeepSeek-R1, SmolLM3, ...; Seed-OSS; Magistral; Command A;
# OpenThinker; Kimi-VL
THINK_TAGS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
    ("<thinking>", "</thinking>"),
)


class Default(NamedTuple):
    """How a model is decoded where nobody says how."""

    config: SoftConfig
    why: str  # for people
    kind: str  # "own", "tags" or "plain": where it comes from

    def changed(self, fields: dict[str, Any]) -> SoftConfig:
        """With these fields in place of its own. A budget of its own is half of the length that
        comes of it; a plain model that is given tags thinks apart from its answer; one that is
        decoded in single tokens needs nothing that makes mixtures readable; of one that was
        trained on vectors, tokens have a budget of their own."""
        fields, config = renamed(fields), self.config
        if config.is_latent and not mk_mixer(fields.get("mixer", config.mixer)).latent:
            fields = {"budget": config.token_budget} | fields
        if self.kind == "plain" and mk_mixer(fields.get("mixer", config.mixer)).single:
            return SoftConfig(max_new_tokens=config.max_new_tokens).changed(**fields)
        if self.kind == "plain" and fields.get("think_end") is not None:
            fields = {"hide_thought": True} | fields
        if self.kind != "own" and "budget" not in fields:
            length = SoftConfig(max_new_tokens=fields.get("max_new_tokens", config.max_new_tokens))
            fields = fields | {"budget": length.max_new_tokens // 2}
        return config.changed(**fields)


def default_of(own: SoftConfig | None, tokenizer=None) -> Default:
    """own: of the model's soft_config.json, None where it has none. tokenizer: None where it is not
    at hand, so that nobody can look for tags."""
    if own is not None:
        return Default(own, f"as its {CONFIG_FILE} says", "own")
    tags = None if tokenizer is None else think_tags(tokenizer)
    if tags is not None:
        return _tagged(*tags)
    config = SoftConfig(
        **NARROW, max_new_tokens=PLAIN_LENGTH, budget=PLAIN_LENGTH // 2, hide_thought=False
    )
    unknown = (
        ", and no tokenizer= that may have think tags" if tokenizer is None else " or think tags"
    )
    why = f"in narrow, noisy mixtures, then discretely: it has no {CONFIG_FILE}{unknown}"
    return Default(config, why, "plain")


def check_options_fit(own: SoftConfig | None, check: Callable[[Default], Any]) -> None:
    """Call `check`, which raises ValueError for options that do not fit a default, with what the
    model's may be: before its tokenizer is at hand nobody knows whether it has tags."""
    try:
        check(default_of(own))
    except ValueError as error:
        if own is not None:
            raise
        try:
            check(_tagged(*THINK_TAGS[0]))
        except ValueError:
            raise error from None


def _tagged(start: str, end: str) -> Default:
    length = dict(max_new_tokens=TAGGED_LENGTH, budget=TAGGED_LENGTH // 2)
    config = SoftConfig(**NARROW, **length, think_start=start, think_end=end)
    return Default(config, f"softly between {start} and {end}, then discretely", "tags")


def recall(model, tokenizer=None, mixer=None) -> Default:
    """How an open model, plain or wrapped by PEFT, is decoded by default. tokenizer: where
    `softar.load` did not open the model. mixer: the caller's, so that the one which the model's file
    names counts no more: it may be code that nobody has asked for."""
    return default_of(config_of(model, mixer), tokenizer or origin_of(model).tokenizer)


def config_of(model, mixer: str | Callable | None = None) -> SoftConfig | None:
    """`own_config` of an open model: of a hub id that of the revision which `softar.load` opened."""
    origin = origin_of(model)
    name = "" if is_hub_id(origin.name) else origin.name  # not what else is in the cache
    return own_config(name, mixer, origin.folder)


def own_config(
    name: str | Path, mixer: str | Callable | None = None, folder: Path | None = None
) -> SoftConfig | None:
    """What the soft_config.json says of a model in a folder, of one that the package brings, or of
    a hub id as far as it is in the cache; None where there is none. mixer: as SoftConfig.load takes
    it. folder: where the file lies, of a model that is open.

    Raises:
        ValueError: naming `name`, for one that cannot be read.
    """
    file = file_of(name, CONFIG_FILE) if name and folder is None else None
    folder = folder if file is None else file.parent
    if folder is None:
        return None
    try:
        return SoftConfig.load(folder, mixer=mixer)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"model={str(name)!r}: its {CONFIG_FILE} cannot be read: {error}"
        ) from error


def think_tags(tokenizer) -> tuple[str, str] | None:
    """What opens and closes a thought for this tokenizer: tags that are tokens of its own, or that
    stand in its chat template; None where it has none."""
    templates = tokenizer.chat_template or ""
    text = templates if isinstance(templates, str) else " ".join(map(str, templates.values()))
    for tags in THINK_TAGS:
        if all(_is_token(tokenizer, tag) or tag in text for tag in tags):
            return tags
    return None


def _is_token(tokenizer, text: str) -> bool:
    return tokenizer.convert_tokens_to_ids(text) not in (None, tokenizer.unk_token_id)


def chosen(
    config, fields: dict[str, Any], default: Callable[[], Default]
) -> tuple[SoftConfig, str]:
    """The configuration that counts, and for people why.

    config: a SoftConfig, a dict of its fields, or None, which is what `default` makes: nobody else
    asks for it, so that a file that cannot be read harms nobody else. fields: those that override
    it.
    """
    if config is None:
        note_named("mixer", fields.get("mixer"))
        known = default()
        return known.changed(fields), known.why
    config = made(SoftConfig, renamed(config) if isinstance(config, dict) else config)
    return config.changed(**fields), "as configured"
