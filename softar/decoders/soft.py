"""Autoregressive decoders for `softar.compare`: hard, sampled, soft with every mixer, beam search,
self-consistency.

A row's forwards are its own, up to its last token; positions and seconds are its equal share of its
batch's, padding and waiting included. The seconds run from text to text, tokenisation included.
"""

import functools
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from transformers import BatchEncoding

from ..config import CONFIG_FILE, SoftConfig
from ..decode import SoftOutput, generate
from ..evaluate import evaluating, read_prompts, resolve
from ..mixers import MIXERS, mk_mixer
from ..models import folder_of, load
from ..show.trace import Trace, thought
from ..thought import Kind
from .answer import Decoded, Decoder
from .beam import BeamDecoder
from .kinds import check_model, columns_of, open_model
from .options import check_options, format_options


class SoftDecoder:
    """Answers by `softar.generate`, softly or not, as the configuration says. The answer is what
    follows the thought.

    Args:
        model, tokenizer: a causal LM, from softar.load or transformers.
        name: for tables; the decoder's name in DECODERS where None.
        seed: of what it draws. It keeps its generator, so that a second call draws other numbers.
        trace: also give each answer's softar.show.trace.Trace; making it does not count as decoding
            time.
        columns: decoder, model, setting, ... for a table's rows, beside those known from model and
            config.
    """

    def __init__(
        self, model, tokenizer, config: SoftConfig, *, name=None, seed=0, trace=False, columns=None
    ):
        decoder = _name_of(config)
        check_model(model, "autoregressive", name or decoder)
        self.model, self.tokenizer, self.config, self.trace = (
            model,
            tokenizer,
            resolve(config, tokenizer),
            trace,
        )
        self.columns = columns_of(decoder, model, "autoregressive") | (columns or {})
        self.name = name or decoder
        self.rng = torch.Generator().manual_seed(seed)

    @property
    def draws(self) -> bool:
        """May the same prompt give another answer?"""
        return self.config.draws

    def decode(
        self, prompts: list, callback: Callable[[dict], None] | None = None
    ) -> list[Decoded]:
        """callback: that of `softar.generate`, told of each step."""
        if not prompts:
            return []
        started = time.perf_counter()
        inputs = read_prompts(self.tokenizer, prompts).to(self.model.device)
        with evaluating(self.model):
            out = generate(
                self.model,
                inputs["input_ids"],
                inputs["attention_mask"],
                config=self.config,
                rng=self.rng,
                callback=callback,
                tokenizer=self.tokenizer,
            )
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.answers]
        real = out.record.kind != Kind.PAD
        tokens = [
            tuple(ids[keep].tolist()) for ids, keep in zip(out.completions, real, strict=True)
        ]
        entropy = (out.record.entropy.masked_fill(~real, 0.0).sum(1) / real.sum(1)).tolist()
        seconds = (time.perf_counter() - started) / len(prompts)
        cost = out.token_forwards / len(prompts), seconds
        prefill = out.num_forwards - real.shape[1]  # forwards before the first token, but one
        traces = self._traces(out, inputs) if self.trace else [None] * len(prompts)
        return [
            Decoded(text, row, float(prefill + len(row)), *cost, h, t)
            for text, row, h, t in zip(texts, tokens, entropy, traces, strict=True)
        ]

    def _traces(self, out: SoftOutput, inputs: BatchEncoding) -> list[Trace]:
        given = [
            ids[mask.bool()]
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        traces = [thought(out, self.tokenizer, row, title=self.name) for row in range(len(given))]
        return [
            replace(t, prompt=self.tokenizer.decode(ids))
            for t, ids in zip(traces, given, strict=True)
        ]


class SelfConsistency:
    """The commonest of several sampled answers (arXiv:2203.11171). The votes of a prompt are
    decoded in one batch, with those of the other prompts; costs are those of all votes, entropy
    their mean; tokens and trace the winner's.

    `agreement` has, for each prompt of the last decode, the share of its votes that went to the
    winner.

    Args:
        decoder: any that samples.
        votes: samples per prompt. Of equally common answers the one seen first wins.
        normalise: text -> what is voted on. None: the text without differences of white space.
    """

    def __init__(
        self,
        decoder: Decoder,
        votes: int,
        normalise: Callable[[str], str] | None = None,
        *,
        name=None,
        columns=None,
    ):
        if votes < 2:
            raise ValueError(f"votes={votes} must be at least 2: one is the decoder itself")
        if isinstance(decoder, SoftDecoder) and not decoder.draws:
            raise ValueError(
                f"decoder {decoder.name!r} draws nothing, so that all votes would agree: take 'sampled'"
            )
        self.decoder, self.votes, self.normalise = decoder, votes, normalise or squeezed
        self.columns = (
            decoder.columns
            | {"decoder": "self-consistency", "setting": f"votes={votes}"}
            | (columns or {})
        )
        self.name = name or f"self-consistency {self.columns['setting']}"
        self.agreement: list[float] = []

    def decode(self, prompts: list) -> list[Decoded]:
        found = self.decoder.decode([prompt for prompt in prompts for _ in range(self.votes)])
        groups = [found[i : i + self.votes] for i in range(0, len(found), self.votes)]
        elected = [elect(group, self.normalise) for group in groups]
        self.agreement = [share for _, share in elected]
        return [winner for winner, _ in elected]


def elect(votes: list[Decoded], normalise: Callable[[str], str]) -> tuple[Decoded, float]:
    """The first of the votes whose normalised text is the commonest, at the cost of all; and the
    share it got."""
    texts = [normalise(vote.text) for vote in votes]
    best, count = Counter(texts).most_common(1)[0]  # of equals the first seen
    entropies = [vote.entropy for vote in votes if vote.entropy is not None]
    winner = replace(
        votes[texts.index(best)],
        num_forwards=sum(vote.num_forwards for vote in votes),
        token_forwards=sum(vote.token_forwards for vote in votes),
        seconds=sum(vote.seconds for vote in votes),
        entropy=statistics.mean(entropies) if entropies else None,
    )
    return winner, count / len(votes)


def squeezed(text: str) -> str:
    return " ".join(text.split())


def last_match(pattern: str) -> Callable[[str], str]:
    """Text -> what of it the regular expression matches last, without differences of white space;
    all if nothing."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from None
    return lambda text: squeezed([text, *(match.group() for match in compiled.finditer(text))][-1])


def _name_of(config: SoftConfig) -> str:
    if callable(config.mixer):
        return config.mixer.__name__
    if mk_mixer(config.mixer).single:
        return "sampled" if config.mixer_draws else "discrete"
    return config.mixer


# -- by name

# decoders that feed back one token, and the mixer's knobs
HARD = {"discrete": {}, "sampled": {"sample": True}}


@functools.cache
def _open(model: str, dtype: str, device: str | None):
    return load(model, dtype=dtype, device=device)


def _opened(decoder: str, model: str, dtype: str, device: str | None):
    return open_model(model, "autoregressive", decoder, lambda: _open(model, dtype, device))


def own_config(model: str) -> SoftConfig:
    """What a model's soft_config.json says; SoftConfig's defaults where it has none."""
    folder = folder_of(model)
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return SoftConfig()
    try:
        return SoftConfig.load(folder)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model={model!r}: its {CONFIG_FILE} cannot be read: {error}") from error


def soft_config(model: str, decoder: str, options: dict) -> SoftConfig:
    """The model's own configuration with the decoder's mixer, changed by the options; the mixer's
    knobs are options, too. Raises ValueError for options that are unknown or do not fit."""
    base = own_config(model)
    if decoder in HARD:
        changes = check_options(
            SoftConfig, decoder, options, fixed=("mixer", "mixer_args", "alpha", "rescale")
        )
        return replace(base, mixer="hard", mixer_args=HARD[decoder], alpha=0.0, **changes)
    knobs = [*mk_mixer(decoder).knobs]
    changes = check_options(SoftConfig, decoder, options, also=knobs, fixed=("mixer",))
    args = (base.mixer_args if base.mixer == decoder else {}) | changes.pop("mixer_args", {})
    args |= {knob: changes.pop(knob) for knob in knobs if knob in changes}
    # A model's own configuration may be hard; a decoder that is asked for by the name of a mixer is
    # not
    alpha = {"alpha": base.alpha or 1.0}
    return replace(base, **(alpha | changes), mixer=decoder, mixer_args=args)


def _make_soft(
    decoder, model, *, max_new_tokens, seed=0, trace=False, dtype="float32", device=None, **options
):
    """A SoftDecoder; options: fields of SoftConfig and knobs of the mixer."""
    config = soft_config(model, decoder, options | {"max_new_tokens": max_new_tokens})
    net, tokenizer = _opened(decoder, model, dtype, device)
    setting = format_options(options, " ")
    columns = {"decoder": decoder, "model": model, "setting": setting}
    name = " ".join(filter(None, [decoder, setting]))
    return SoftDecoder(net, tokenizer, config, name=name, seed=seed, trace=trace, columns=columns)


@dataclass(frozen=True)
class BeamOptions:
    max_new_tokens: int
    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    think_start: int | str | tuple[int, ...] | None = None
    think_end: int | str | tuple[int, ...] | None = None
    budget: int | None = None


def _make_beam(
    model, *, max_new_tokens, seed=0, trace=False, dtype="float32", device=None, **options
):
    """A BeamDecoder; options: those of BeamOptions. Nothing is drawn, so seed says nothing."""
    given = check_options(BeamOptions, "beam", options | {"max_new_tokens": max_new_tokens})
    where = {
        name: given.pop(name) for name in ("think_start", "think_end", "budget") if name in given
    }
    config = replace(own_config(model), **where)
    given = {"num_beams": BeamOptions.num_beams} | given
    net, tokenizer = _opened("beam", model, dtype, device)
    setting = format_options({"num_beams": given["num_beams"]} | options, " ")
    columns = {"model": model, "setting": setting}
    return BeamDecoder(
        net, tokenizer, **given, config=config, name=f"beam {setting}", trace=trace, columns=columns
    )


@dataclass(frozen=True)
class VoteOptions:
    votes: int = 8
    of: str = "sampled"  # the decoder that votes; it takes the other options
    pattern: str | None = None  # regular expression: its last match in the text is what is voted on


def _make_self_consistency(model, *, max_new_tokens, **options):
    """A SelfConsistency; options: those of VoteOptions and of the decoder that votes."""
    own = [field.name for field in fields(VoteOptions)]
    chosen = check_options(
        VoteOptions, "self-consistency", {k: options.pop(k) for k in own if k in options}
    )
    o = VoteOptions(**chosen)
    if o.of not in VOTERS:
        raise ValueError(f"of={o.of!r} is no decoder that draws: choose one of {VOTERS}")
    try:
        voter = DECODERS[o.of](model, max_new_tokens=max_new_tokens, **options)
    except ValueError as error:
        raise ValueError(f"self-consistency of {o.of!r}: {error}") from None
    normalise = None if o.pattern is None else last_match(o.pattern)
    shown = {"votes": o.votes} | chosen
    setting = " ".join(filter(None, [format_options(shown, " "), voter.columns["setting"]]))
    name = f"self-consistency {setting}"
    return SelfConsistency(voter, o.votes, normalise, name=name, columns={"setting": setting})


DECODERS: dict[str, Callable[..., Decoder]] = {
    **{
        name: functools.partial(_make_soft, name)
        for name in [*HARD, *(name for name in MIXERS if not mk_mixer(name).single)]
    },
    "beam": _make_beam,
    "self-consistency": _make_self_consistency,
}
VOTERS = [name for name in DECODERS if name not in ("discrete", "soft", "beam", "self-consistency")]
