"""Autoregressive decoders for `softar.compare`: hard, sampled, soft with every mixer, beam search,
self-consistency.

A row's forwards are its own, up to its last token; positions and seconds are its equal share of its
batch's, padding and waiting included. The seconds run from text to text, tokenisation included.
"""

import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

import torch
from transformers import BatchEncoding

from ..caches import CACHES, STATIC, check_one_size, set_cache
from ..checks import check_choice
from ..config import BLOCK, SoftConfig, renamed
from ..decode import generate
from ..defaults import Default, check_options_fit, default_of
from ..evaluate import evaluating, read_prompts, resolve
from ..mixers import GROUP, MIXERS, mk_mixer, name_of
from ..models import kept, load, plain
from ..names import is_code
from ..names import registered as registered_names
from ..specs import format_options
from .answer import Decoded, Decoder, known_sum
from .beam import SHARED, BeamDecoder, BeamOptions
from .card import Card, check_of_kind, columns_of, open_model
from .options import Common, check_options
from .read import read_out
from .search import SEARCHES, SearchDecoder, search_config
from .stop import StopStrings
from .votes import commonest, reader, squeezed


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
        stop: strings with which an answer ends, too; a thought is not searched.
        why: where the configuration comes from, for people.
        cache_implementation, compile: as for `softar.generate`.
    """

    # Wide because each is an option of the decoder
    def __init__(
        self,
        model,
        tokenizer,
        config: SoftConfig,
        *,
        name=None,
        seed=0,
        trace=False,
        columns=None,
        stop: tuple[str, ...] = (),
        why="as configured",
        cache_implementation: str | None = None,
        compile: bool = False,
    ):
        decoder = decoder_name(config)
        check_of_kind(model, "autoregressive", name or decoder)
        self.model, self.tokenizer, self.trace = model, tokenizer, trace
        self.config = resolve(config, tokenizer)
        self.columns = columns_of(decoder, model, "autoregressive") | (columns or {})
        self.name, self.stop = name or decoder, [*stop]
        self.rng, self.why = torch.Generator().manual_seed(seed), why
        self.how = dict(cache_implementation=cache_implementation, compile=compile)
        own = copy.deepcopy(plain(model).generation_config)
        set_cache(model, own, cache_implementation, compile)  # it says what is not decoded with

    @property
    def draws(self) -> bool:
        """May the same prompt give another answer?"""
        return self.config.draws

    def read(self, prompts: list) -> BatchEncoding:
        """input_ids and attention_mask [B, P] of the prompts."""
        return read_prompts(self.tokenizer, prompts, self.config.prompt_prefix)

    def decode(
        self, prompts: list, callback: Callable[[dict], None] | None = None
    ) -> list[Decoded]:
        """callback: as for `softar.generate`, called with each step."""
        if not prompts:
            return []
        started = time.perf_counter()
        inputs = self.read(prompts).to(self.model.device)
        width = inputs["input_ids"].shape[1]
        criteria = (
            [StopStrings(self.tokenizer, self.stop, width, self.config)] if self.stop else None
        )
        with evaluating(self.model):
            out = generate(
                self.model,
                inputs["input_ids"],
                inputs["attention_mask"],
                config=self.config.changed(prompt_prefix=None),  # the ids have it
                rng=self.rng,
                callback=callback,
                tokenizer=self.tokenizer,
                stopping_criteria=criteria,
                **self.how,
            )
        title = self.name if self.trace else None
        return read_out(out, self.tokenizer, inputs, started=started, title=title)


class SelfConsistency:
    """The commonest of several sampled answers (arXiv:2203.11171). The votes of a prompt are
    decoded in one batch, with those of the other prompts; costs are those of all votes, entropy
    their mean; tokens and trace the winner's.

    `agreement` has, for each prompt of the last decode, the share of its votes that went to the
    winner.

    Args:
        decoder: any that samples.
        votes: samples per prompt. Of equally common answers the one seen first wins.
        normalise: text -> what is voted on, "" for no vote; a Task's `extract`, say. None: the whole
            text without differences of white space, so that thoughts before an answer must agree
            to the word. `softar.decoders.votes.reader` makes one.
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
            raise ValueError(f"votes={votes} must be at least 2: one vote is the decoder itself")
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
        votes = self.decoder.decode([prompt for prompt in prompts for _ in range(self.votes)])
        ballots = [votes[i : i + self.votes] for i in range(0, len(votes), self.votes)]
        elected = [elect(ballot, self.normalise) for ballot in ballots]
        self.agreement = [share for _, share in elected]
        return [winner for winner, _ in elected]


def elect(votes: list[Decoded], normalise: Callable[[str], str]) -> tuple[Decoded, float]:
    """The first of the votes whose normalised text is the commonest, at the cost of all; and the
    share it got."""
    first, share = commonest([normalise(vote.text) for vote in votes])
    entropies = [vote.entropy for vote in votes if vote.entropy is not None]
    winner = replace(
        votes[first],
        num_forwards=known_sum(vote.num_forwards for vote in votes),
        token_forwards=known_sum(vote.token_forwards for vote in votes),
        seconds=sum(vote.seconds for vote in votes),
        entropy=statistics.mean(entropies) if entropies else None,
    )
    return winner, share


def decoder_name(config: SoftConfig) -> str:
    """The decoder in DECODERS, or the function, that decodes like this."""
    if mk_mixer(config.mixer).single:
        return "sampled" if config.mixer_draws else "discrete"
    return name_of(config.mixer) if config.switch is None else SWITCHING


# -- by name

# decoders that feed back one token, and the mixer's knobs
HARD = {"discrete": {}, "sampled": {"sample": True}}
SWITCHING = "swi"  # the belief, and single tokens, by turns


_load = kept(load)


def _open(decoder: str, card: Card, common: Common):
    opener = functools.partial(_load, card.name, dtype=common.dtype, device=common.device)
    return open_model(card, "autoregressive", decoder, opener)


def own_decoder(card: Card, dtype: str, device: str | None, options: dict) -> str:
    """As its soft_config.json says, see softar.defaults."""
    mixer = default_of(card.config).config.mixer
    return "discrete" if mk_mixer(mixer).single else mixer


def soft_config(default: Default, decoder: str, options: dict) -> SoftConfig:
    """The model's default with the decoder's mixer, changed by the options; the mixer's knobs are
    options, too. Decoders `soft` and `swi` take another mixer as an option,
    `soft:mixer=module:function`. Raises ValueError for options that are unknown or do not fit."""
    base, options = default.config, renamed(options)
    if decoder in HARD:
        changes = check_options(
            SoftConfig, decoder, options, fixed=("mixer", "mixer_args", "softness", "rescale")
        )
        return default.changed({"mixer": "hard", "mixer_args": HARD[decoder]} | changes)
    mixer = decoder
    if decoder in ("soft", SWITCHING):
        mixer = options.get("mixer", "soft")
        options = {k: v for k, v in options.items() if k != "mixer"}
    knobs = [*mk_mixer(mixer).knobs]
    changes = check_options(SoftConfig, decoder, options, also=knobs, fixed=("mixer",))
    args = (base.mixer_args if base.mixer == mixer else {}) | changes.pop("mixer_args", {})
    args |= {knob: changes.pop(knob) for knob in knobs if knob in changes}
    # A model's own configuration may be hard; a decoder that is named after a mixer is not
    own = {} if base.softness else {"softness": 1.0}
    if decoder == SWITCHING:
        own["switch"] = BLOCK if base.switch is None else base.switch
    return default.changed(own | changes | {"mixer": mixer, "mixer_args": args})


@dataclass(frozen=True)
class CacheOptions:
    cache_implementation: str | None = None  # as for `softar.generate`
    compile: bool = False

    def __post_init__(self):
        check_choice("cache_implementation", self.cache_implementation, (None, *CACHES))
        if self.compile and self.cache_implementation is not None:  # else the model's own says it
            check_one_size("compile=true", self.cache_implementation in STATIC)


def _make_soft(decoder: str, card: Card, common: Common, /, **options) -> SoftDecoder:
    """options: fields of SoftConfig, knobs of the mixer, and those of CacheOptions."""
    setting = format_options(options, " ")
    cache = {f.name: options.pop(f.name) for f in fields(CacheOptions) if f.name in options}
    cache = asdict(CacheOptions(**check_options(CacheOptions, decoder, cache)))
    length = common.max_new_tokens
    asked = options | ({} if length is None else {"max_new_tokens": length})
    # what is wrong is said before it is opened
    _check_named(decoder, card, options)
    check_options_fit(card.config, lambda default: soft_config(default, decoder, asked))
    model, tokenizer = _open(decoder, card, common)
    default = default_of(card.config, tokenizer)
    config = soft_config(default, decoder, asked)
    labels = common.labels(decoder, card.name, setting)
    how = dict(seed=common.seed, trace=common.trace, stop=common.stop, why=default.why)
    return SoftDecoder(model, tokenizer, config, **how, **cache, **labels)


def _check_named(decoder: str, card: Card, options: dict) -> None:
    """Raise ValueError for `soft` of a model whose own mixer is code: which of the two is meant?"""
    own = "" if card.config is None else str(card.config.mixer)
    if decoder in ("soft", SWITCHING) and "mixer" not in options and is_code(own):
        raise ValueError(
            f"decoder {decoder!r}: the model's own mixer is {own}, code of yours, and not soft: name one of them, "
            f"{decoder}:mixer={own} or {decoder}:mixer=soft"
        )


def _make_beam(card: Card, common: Common, /, **options) -> BeamDecoder:
    """options: those of BeamOptions. Nothing is drawn, so the seed has no effect."""
    length = common.max_new_tokens
    BeamOptions(max_new_tokens=length or 1, **check_options(BeamOptions, "beam", options))
    model, tokenizer = _open("beam", card, common)
    default = default_of(card.config, tokenizer)
    asked = check_options(BeamOptions, "beam", options)
    asked |= {} if length is None else {"max_new_tokens": length}
    own = soft_config(default, "discrete", {k: v for k, v in asked.items() if k in SHARED})
    own = own.changed(cold_stop_entropy=None)  # which beams do not heed
    search = BeamOptions(**{name: getattr(own, name) for name in SHARED} | asked)
    setting = format_options({"num_beams": search.num_beams} | options, " ")
    labels = common.labels("beam", card.name, setting)
    how = dict(trace=common.trace, stop=common.stop)
    return BeamDecoder(model, tokenizer, search, **how, **labels)


def _make_search(decoder: str, card: Card, common: Common, /, **options) -> SearchDecoder:
    """options: those of the search, and fields of SoftConfig that it does not set itself. Nothing is
    drawn, so the seed has no effect."""
    length = common.max_new_tokens
    asked = options | ({} if length is None else {"max_new_tokens": length})
    check_options_fit(card.config, lambda default: search_config(default, decoder, asked))
    model, tokenizer = _open(decoder, card, common)
    default = default_of(card.config, tokenizer)
    config, search = search_config(default, decoder, asked)
    setting = format_options({"num_beams": search.num_beams} | options, " ")
    labels = common.labels(decoder, card.name, setting)
    how = dict(trace=common.trace, stop=common.stop)
    return SearchDecoder(model, tokenizer, config, search, **how, **labels)


@dataclass(frozen=True)
class VoteOptions:
    votes: int = 8
    of: str = "sampled"  # the decoder that votes; it takes the other options
    # regular expression: its last match in the text is what is voted on; None: what the task reads
    pattern: str | None = None


def _make_self_consistency(card: Card, common: Common, /, **options) -> SelfConsistency:
    """options: those of VoteOptions and of the decoder that votes."""
    voting = {f.name: options.pop(f.name) for f in fields(VoteOptions) if f.name in options}
    voting = check_options(VoteOptions, "self-consistency", voting)
    vote = VoteOptions(**voting)
    if vote.of not in VOTERS:
        raise ValueError(f"of={vote.of!r} is not a decoder that draws: choose one of {VOTERS}")
    try:
        voter = DECODERS[vote.of](card, replace(common, prefix=""), **options)
    except ValueError as error:
        raise ValueError(f"self-consistency of {vote.of!r}: {error}") from None
    settings = [format_options({"votes": vote.votes} | voting, " "), voter.columns["setting"]]
    labels = common.labels("self-consistency", card.name, " ".join(filter(None, settings)))
    normalise = reader(vote.pattern, common.extract)
    return SelfConsistency(voter, vote.votes, normalise, **labels)


def registered(name: str) -> Callable[..., Decoder] | None:
    """The decoder of a mixer that is not softar's own: put into MIXERS, or registered by a
    package."""
    known = name in MIXERS or name in registered_names(GROUP)
    return functools.partial(_make_soft, name) if known else None


DECODERS: dict[str, Callable[..., Decoder]] = {
    **{
        name: functools.partial(_make_soft, name)
        for name in [*HARD, *(name for name in MIXERS if not mk_mixer(name).single)]
    },
    SWITCHING: functools.partial(_make_soft, SWITCHING),
    "beam": _make_beam,
    **{name: functools.partial(_make_search, name) for name in SEARCHES},
    "self-consistency": _make_self_consistency,
}
# all votes would be
ALIKE = ("discrete", "soft", "hidden", SWITCHING, "beam", *SEARCHES, "self-consistency")
VOTERS = [name for name in DECODERS if name not in ALIKE]
