"""Masked-diffusion decoders for `softar.compare`: every softener, by name; schedules and the rest
are options.

Costs are as in `softar.decoders.soft`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from softar.checks import check_values
from softar.decoders.answer import Decoded, Decoder
from softar.decoders.card import Card, check_of_kind, columns_of, open_model
from softar.decoders.options import Common, check_options
from softar.evaluate import evaluating, read_prompts
from softar.models import kept
from softar.names import registered as registered_names
from softar.specs import format_options

from .config import DenoiseConfig
from .folder import STATED, split_stated
from .knobs import gather_knobs
from .loop import DenoiseOutput, denoise, first_end
from .models import load
from .net import Facts, facts
from .renoised import check_renoised
from .schedules import SCHEDULE_KNOBS
from .soften import GROUP, SOFTENERS, mk_softener
from .stops import STOP_KNOBS
from .trace import Tracer
from .uniform import check_uniform

ANY = "denoise"  # the decoder that takes any softener, as an option


class DiffusionDecoder:
    """Answers by `softar.diffusion.denoise`. Masks in a prompt are filled, too, and the text is the
    whole then; else it is what stands behind the prompt, up to an end token. With gen_length 0
    prompts are templates, which hold masks. `tokens` are those that were decided, an end token
    included and what stands behind it left out.

    Args:
        model, tokenizer: from softar.diffusion.load.
        name: for tables; that of the softener where None.
        seed: of what it draws. It keeps its generator, so that a second call draws other numbers.
        trace: also give each answer's softar.show.trace.Canvas; making it does not count as
            decoding time.
        columns: decoder, model, setting, ... for a table's rows, beside those that follow from
            model and config.
    """

    def __init__(
        self,
        model,
        tokenizer,
        config: DenoiseConfig,
        *,
        name=None,
        seed=0,
        trace=False,
        columns=None,
    ):
        try:
            self.facts = facts(model)
        except ValueError:
            check_of_kind(model, "diffusion", name or "hard")
            raise
        decided = config.as_trained(self.facts)
        if self.facts.mask_id is None:
            check_renoised(decided, self.facts)
        elif self.facts.uniform is not None:
            check_uniform(decided)
        self.model, self.tokenizer, self.config, self.trace = model, tokenizer, config, trace
        self.ends = self.facts.end_ids if config.end_ids is None else config.end_ids
        decoder = name_of(decided)
        self.columns = columns_of(decoder, model, "diffusion")
        self.columns |= {"training": training_of(self.facts)} | (columns or {})
        self.name = name or decoder
        self.rng = torch.Generator().manual_seed(seed)

    def decode(self, prompts: list) -> list[Decoded]:
        if not prompts:
            return []
        started = time.perf_counter()
        inputs = read_prompts(self.tokenizer, prompts).to(self.model.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        hole = -1 if self.facts.mask_id is None else self.facts.mask_id
        has_holes = ((ids == hole) & mask.bool()).any(1).tolist()
        if self.config.gen_length == 0 and (bare := [i for i, x in enumerate(has_holes) if not x]):
            raise ValueError(
                f"prompt {bare[0]} holds no {self.tokenizer.mask_token} and no masks follow it (gen_length=0): give "
                f"max_new_tokens >= 1, or templates"
            )
        tracer, nats = None, Nats()
        if self.trace:
            tracer = Tracer(
                self.tokenizer, self.facts, ids, mask, gen_length=self.config.gen_length
            )

        def look(seen: dict) -> None:
            nats(seen)
            if tracer is not None:
                tracer(seen)

        with evaluating(self.model):
            out = denoise(self.model, ids, mask, config=self.config, rng=self.rng, callback=look)
        forwards = forwards_of(out)
        # of prompts with holes the text begins behind the padding, a token that may not be special
        begins = [
            pad if is_whole else out.prompt_length
            for pad, is_whole in zip((mask == 0).sum(1).tolist(), has_holes, strict=True)
        ]
        texts, tokens, decided = zip(
            *(self._read(out, row, begin) for row, begin in enumerate(begins)), strict=True
        )
        seconds = (time.perf_counter() - started) / len(prompts)
        return [
            Decoded(
                text=texts[row],
                tokens=tokens[row],
                num_forwards=forwards[row],
                token_forwards=out.token_forwards / len(prompts),
                seconds=seconds,
                entropy=nats.mean(row, decided[row]),
                trace=tracer and tracer.canvas(row, out, title=self.name),
            )
            for row in range(len(prompts))
        ]

    def _read(
        self, out: DenoiseOutput, row: int, begin: int
    ) -> tuple[str, tuple[int, ...], list[int]]:
        """Text and tokens of a row, and the columns of these. begin: column of the text's first."""
        ids, decided = out.sequences[row].tolist(), (out.committed_at[row] >= 0).tolist()
        behind = out.prompt_length  # of all columns with gen_length=0
        stop = behind + first_end(ids[behind:], self.ends)
        text = self.tokenizer.decode(ids[begin:stop], skip_special_tokens=True)
        columns = [i for i in range(min(stop + 1, len(ids))) if decided[i]]
        return text, tuple(ids[i] for i in columns), columns


class Nats:
    """The entropy of the model's belief about each token, when it was decided for good."""

    def __init__(self):
        self.nats: torch.Tensor | None = None  # [B, L]

    def __call__(self, seen: dict) -> None:
        new = seen["entropy"]()
        self.nats = new if self.nats is None else torch.where(new.isnan(), self.nats, new)

    def mean(self, row: int, columns: list[int]) -> float | None:
        """None where no forward decided anything."""
        if self.nats is None or not columns:
            return None
        return float(self.nats[row, columns].nanmean())


_load = kept(load)


def _open(decoder: str, card: Card, dtype: str, device: str | None, stated: dict):
    """stated: of the model, by its caller (`split_stated`)."""
    check_values(load, **stated)
    if stated.get("kind") is not None:  # whatever its folder looks like
        card = dataclasses.replace(card, kind="diffusion")
    opener = functools.partial(_load, card.name, dtype=dtype, device=device, **stated)
    return open_model(card, "diffusion", decoder, opener)


def forwards_of(out: DenoiseOutput) -> list[float]:
    """Of each row, those that store included."""
    return out.row_forwards.float().tolist()


def name_of(config: DenoiseConfig) -> str:
    """What a decoder is called; config: decided (`as_trained`)."""
    if config.soften is None:
        return ANY
    return config.soften if isinstance(config.soften, str) else "softener"


def training_of(model_facts: Facts) -> str:
    """What a model was trained with, for a table's rows."""
    if model_facts.mask_id is None:
        return "self-conditioned"
    if model_facts.uniform is not None:
        return "duo"
    return "soft-mask" if model_facts.soft_mask else "hard"


def own_decoder(card: Card, dtype: str, device: str | None, options: dict) -> str:
    """The model is opened, once for all decoders: its configuration can say so, a file beside it,
    or its base's."""
    model, _ = _open("hard", card, dtype, device, split_stated(options)[0])
    own = {"soft-mask": "soft-mask", "self-conditioned": ANY}
    return own.get(training_of(facts(model)), "hard")


def denoise_config(decoder: str, options: dict) -> DenoiseConfig:
    """The softener of that name and the options: fields of DenoiseConfig, and the knobs of the
    softener and of schedules where no field has their name. `denoise` takes the softener as an
    option, `denoise:soften=module:function`, and is without it as the model was trained. Raises
    ValueError for options that are unknown or do not fit."""
    soften = decoder
    if decoder == ANY:
        soften = options.get("soften")
        options = {name: value for name, value in options.items() if name != "soften"}
    fn = None if soften is None else mk_softener(soften).fn
    fields = {field.name for field in dataclasses.fields(DenoiseConfig)}
    knobs = [knob for knob in (fn.__kwdefaults__ or () if fn else ()) if knob not in fields]
    also = [*knobs, *SCHEDULE_KNOBS, *STOP_KNOBS, *STATED]
    options = check_options(DenoiseConfig, decoder, options, also=also, fixed=("soften",))
    options = gather_knobs(options, "soften_args", knobs)
    options = gather_knobs(options, "schedule_args", SCHEDULE_KNOBS)
    options = gather_knobs(options, "stop_args", STOP_KNOBS)
    return DenoiseConfig(**options, soften=soften)


def _make(decoder: str, card: Card, common: Common, /, **options) -> DiffusionDecoder:
    """options: fields of DenoiseConfig, knobs of the softener, and what is said of the model
    (STATED). gen_length is max_new_tokens."""
    stated, others = split_stated(options)
    config = denoise_config(decoder, {"gen_length": common.max_new_tokens} | others)
    model, tokenizer = _open(decoder, card, common.dtype, common.device, stated)
    labels = common.labels(decoder, card.name, format_options(options, " "))
    return DiffusionDecoder(
        model, tokenizer, config, seed=common.seed, trace=common.trace, **labels
    )


def registered(name: str) -> Callable[..., Decoder] | None:
    """The decoder of a softener that is not softar's own: put into SOFTENERS, or registered by a
    package."""
    known = name in SOFTENERS or name in registered_names(GROUP)
    return functools.partial(_make, name) if known else None


DECODERS: dict[str, Callable[..., Decoder]] = {
    name: functools.partial(_make, name) for name in (*SOFTENERS, ANY)
}
