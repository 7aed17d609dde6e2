"""How to decode, as data: checked when it is made, saved beside a checkpoint as
soft_config.json."""

import dataclasses
import functools
import json
import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checks import as_ids, check_choice, check_idle, check_least, check_types, fill, idle_options
from .feedback import StepTemperature, check_feedback, load_step_temperature
from .idle import IDLE, warn_of_no_answer
from .mixers import MIXERS, Mixed, mk_mixer
from .names import CONFIG_FILE, STEP_TEMPERATURE_FILE, check_not_code
from .soft import RESCALES, check_dist
from .tags import Moves, blanks, ids_of_text, moves_of_ids, moves_of_text

Ids = int | str | tuple[int, ...] | None
TAGS = ("think_start", "think_end")
BLOCK = "block"
SWITCHES = tuple(
    f"switch{end}" for end in ("", *"_dwell _open _close _budget _final _answer".split())
)
LEFT_OUT = {
    "cold_stop_steps": 256,
    "switch_dwell": 512,
    "switch_close": 0.3,
    "switch_final": "\n\nThe final answer is",
    "switch_answer": 32,
}
RENAMED = {"alpha": "softness"}  # SFT has an alpha too: there it is the gold token's share


def renamed(fields: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Fields of SoftConfig with their names of today; old ones are taken for a release, and warned
    of. where: how the warning begins."""
    for old, new in RENAMED.items():
        if old in fields:
            message = (
                f"{where}{old}={fields[old]!r} is called {new} now: write {new}={fields[old]!r}"
            )
            warnings.warn(message, FutureWarning, stacklevel=3)
            fields = {**fields, new: fields[old]}
            del fields[old]
    return fields


def takes_old_names(config: type) -> type:
    """The dataclass, whose constructor takes the names of RENAMED as well."""
    init = config.__init__

    @functools.wraps(init)
    def __init__(self, *args, **fields):
        init(self, *args, **renamed(fields))

    config.__init__ = __init__
    return config


@takes_old_names
@dataclass(frozen=True)
class SoftConfig:
    """How to decode. The defaults think softly, deterministically, in the whole completion."""

    # name in softar.MIXERS, "module:function", or a function of its signature
    mixer: str | Callable[..., Mixed] = "soft"
    mixer_args: dict[str, Any] = field(default_factory=dict)  # its knobs, e.g. {"tau": 0.5}
    # share of the mixture in what is fed back, the rest is its token. 0 feeds the token alone: the
    # likeliest of "soft", an ordinary sample of the mixers that draw (gumbel, k-samples, ...;
    # of "dirichlet" the heaviest token of the mixture that it draws)
    softness: float = 1.0
    temperature: float = 1.0  # of the thought; 0 is the argmax
    # times what this makes of the step's last hidden state: a file of softar.feedback.StepTemperature,
    # as soft SFT writes it beside a checkpoint, or one
    step_temperature: str | StepTemperature | None = None
    top_k: int | None = 10  # tokens kept in a mixture; None keeps the vocabulary
    top_p: float | None = None
    min_p: float | None = None
    keep: int | None = None  # cap on the mixture after the filters
    banned: tuple[int, ...] = ()  # ids that never enter a mixture; a list becomes a tuple
    # see soft_embed; of a vector "norm" is the mean length of the model's embeddings
    rescale: str | None = None
    max_new_tokens: int = 64  # thought and answer together
    # stands before a prompt of text that does not hold it yet (`softar.evaluate.read_prompts`); in
    # chats the template puts it there. See softar.models.add_think_tokens
    prompt_prefix: str | None = None
    # Where it is soft. Without any of these: in the whole completion. An id or a list of ids becomes
    # a tuple; text stays text until `resolve`.
    think_start: Ids = None  # opens the thought; None: the completion starts inside it
    think_end: Ids = None  # closes it for good
    # made by `resolve`: how tokens spell the two where they are texts (softar.tags), and which
    # tokens are white space, also where they are ids
    spelling: tuple = field(default=(), repr=False, compare=False)
    # soft steps at most, then think_end is put in (or, without one, the answer starts)
    budget: int | None = None
    # of a model that was trained on vectors: the budget of decoders that read tokens in their place
    token_budget: int | None = None
    # nats; the same after `cold_stop_steps` consecutive steps below it
    cold_stop_entropy: float | None = None
    cold_stop_steps: int | None = None  # 256 with a cold stop
    # Blocks of soft and of single tokens by turns within the thought, told by its entropy
    # (softar.switch): below the reference single tokens, above it mixtures. "block": the reference is
    # the entropy at which the block began; a number: so many nats. Single tokens are chosen as the
    # answer's are
    switch: str | float | None = None
    switch_dwell: int | None = None  # steps at least since the switch, that one included; 512
    # share of think_start in what is read at a switch to mixtures, and of think_end at one to single
    # tokens; they fade to 0 at max_new_tokens
    switch_open: float = 0.0
    switch_close: float | None = None  # 0.3 where there is a think_end
    # switches to single tokens: from half of them on each puts think_end in; one more puts
    # switch_final behind it, and at most switch_answer tokens follow
    switch_budget: int | None = None
    switch_final: Ids = None  # "\n\nThe final answer is"; () is nothing
    switch_answer: int | None = None  # 32
    # The answer is what follows the thought; False: the text of both, as of a model that begins its
    # reply at once
    hide_thought: bool = True
    # The answer, always discrete.
    answer_temperature: float = 0.0  # 0 is greedy
    answer_top_k: int | None = None
    answer_top_p: float | None = None
    answer_min_p: float | None = None

    def __post_init__(self):
        _settle_types(self)
        left_out = fill(self, LEFT_OUT)
        check_dist(None, **self.filters)
        check_dist(None, **self.answer_filters, prefix="answer_")
        mk_mixer(self.mixer, **self.mixer_args)
        if not 0 <= self.softness <= 1:
            raise ValueError(
                f"softness={self.softness} must lie in [0, 1]: 0 feeds the token alone, 1 the mixture alone"
            )
        check_choice("rescale", self.rescale, RESCALES)
        check_feedback(self, mk_mixer(self.mixer))
        check_least(self, max_new_tokens=1, cold_stop_steps=1, budget=0, token_budget=0)
        _check_switch(self)
        if self.cold_stop_entropy is not None and not self.cold_stop_entropy >= 0:
            raise ValueError(
                f"cold_stop_entropy={self.cold_stop_entropy} must be >= 0 nats; None switches it off"
            )
        if self.think_start in ("", ()) or self.think_end in ("", ()):
            raise ValueError(
                f"think_start={self.think_start!r}, think_end={self.think_end!r}: empty; None is for none"
            )
        if self.prompt_prefix == "":
            raise ValueError("prompt_prefix='' is empty; None is for none")
        if self.think_start is not None and self.think_end is None:
            raise ValueError(
                f"think_start={self.think_start!r} needs a think_end that closes the thought"
            )
        if self.think_start is not None and self.think_start == self.think_end:
            raise ValueError(
                f"think_start={self.think_start!r} closes the thought as well: give another think_end"
            )
        check_idle(self, IDLE, left_out)
        warn_of_no_answer(self)

    def changed(self, **changes) -> "SoftConfig":
        """With these fields in place of its own; fields of its own that would say nothing beside
        them go back to their defaults. Raises ValueError for changes that say nothing."""
        if not changes:
            return self
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | changes
        if "mixer" in changes and "mixer_args" not in changes and changes["mixer"] != self.mixer:
            values["mixer_args"] = {}  # knobs of the other
        if changes.keys() & {*TAGS}:
            values["spelling"] = ()  # of the others
        for name in _idle(values) - changes.keys():
            del values[name]
        return type(self)(**values)

    @property
    def shown(self) -> str:
        """For people: the fields that are not at their defaults."""
        plain, names = _defaults(), [f.name for f in dataclasses.fields(self) if f.repr]
        own = [n for n in names if getattr(self, n) != getattr(plain, n)]
        return f"SoftConfig({', '.join(f'{n}={getattr(self, n)!r}' for n in own)})"

    @property
    def filters(self) -> dict[str, Any]:
        """What shapes a thought's distribution, as mk_proba_dist and check_dist take it."""
        names = ("temperature", "top_k", "top_p", "min_p", "keep", "banned")
        return {name: getattr(self, name) for name in names}

    @property
    def answer_filters(self) -> dict[str, Any]:
        """The same of the answer's."""
        names = ("temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self, f"answer_{name}") for name in names}

    @property
    def is_single(self) -> bool:
        """Does its mixer give one token, so that no embedding is ever mixed?"""
        return mk_mixer(self.mixer).single

    @property
    def is_latent(self) -> bool:
        """Does it feed back vectors that no token stands for?"""
        return mk_mixer(self.mixer).latent

    @property
    def gate(self) -> str | None:
        """The file of the gate through which a mixture is read (softar.feedback)."""
        mixer = mk_mixer(self.mixer, **self.mixer_args)
        return mixer.knobs["gate"] if mixer.gated else None

    @property
    def has_answer(self) -> bool:
        """Does something end the thought, so that an answer follows?"""
        ends = (self.think_end, self.budget, self.cold_stop_entropy)
        return any(end is not None for end in ends)

    @property
    def has_single(self) -> bool:
        """Are single tokens chosen too, beside what a thought reads?"""
        return self.has_answer or self.switch is not None

    @property
    def entropy_temperature(self) -> float:
        """Of the entropy in the record: the thought's, which a step_temperature multiplies; 1 where
        that is 0, and with a switch, whatever the step."""
        return 1.0 if self.switch is not None else self.temperature or 1.0

    @property
    def is_soft(self) -> bool:
        """Is an embedding ever mixed? A thought of single tokens is an ordinary chain of
        thought."""
        return self.softness > 0 and self.temperature > 0 and not self.is_single

    @property
    def draws(self) -> bool:
        """Are random numbers drawn, so that the same prompt may get another answer?"""
        if self.has_single and self.answer_temperature > 0:
            return True
        return self.temperature > 0 and self.mixer_draws

    @property
    def mixer_draws(self) -> bool:
        """Does the mixer, with these knobs?"""
        mixer = mk_mixer(self.mixer, **self.mixer_args)
        return mixer.draws(mixer.knobs)

    @property
    def filtered(self) -> float:
        """Tokens that the filters keep for a mixture; inf where that is the vocabulary."""
        limits = [k for k in (self.top_k, self.keep, math.inf) if k is not None]
        return 1 if self.temperature == 0 else min(limits)

    @property
    def width(self) -> float:
        """Tokens in a mixture, K; inf where that is the vocabulary."""
        mixer = mk_mixer(self.mixer, **self.mixer_args)
        width = mixer.width(mixer.knobs, self.filtered) + (self.softness < 1)
        if self.switch is None:
            return width
        tags = zip((self.think_start, self.think_end), (self.switch_open, self.switch_close))
        # a text is of one token or more
        return width + sum(len(t) if isinstance(t, tuple) else 1 for t, share in tags if share)

    def resolve(self, tokenizer) -> "SoftConfig":
        """The same configuration with what is given as text (think_start, think_end, switch_final)
        turned into token ids; and, with think_end, what of the tokenizer is white space, which may
        follow a thought that a prompt closes. tokenizer: None knows no text, and no white space."""
        names = [n for n in (*TAGS, "switch_final") if isinstance(getattr(self, n), str)]
        ids = {name: ids_of_text(tokenizer, name, getattr(self, name)) for name in names}
        fields: dict[str, Any] = dict(ids)
        if tokenizer is not None and self.think_end is not None:
            moves = [*self.spelling[:2]] or [(), ()]
            for i, name in enumerate(TAGS):
                if name in ids:
                    moves[i] = moves_of_text(tokenizer, getattr(self, name))
            fields["spelling"] = (*moves, blanks(tokenizer))
        return dataclasses.replace(self, **fields) if fields else self

    @property
    def moves(self) -> tuple[Moves | None, Moves | None]:
        """How think_start and think_end are spelled, see softar.tags; None for none. Of a resolved
        configuration."""
        ids = [getattr(self, name) for name in TAGS]
        texts = self.spelling[:2] or ((), ())
        pairs = zip(texts, ids, strict=True)
        return tuple(None if own is None else text or moves_of_ids(own) for text, own in pairs)

    def save(self, folder: str | Path) -> None:
        """Write soft_config.json beside a checkpoint, and the step temperature's file beside that."""
        if callable(self.mixer):
            raise ValueError(
                f"mixer={self.mixer!r} is a function and cannot be saved: name it, 'module:function'"
            )
        values = self.as_dict()
        if self.step_temperature is not None:
            values["step_temperature"] = STEP_TEMPERATURE_FILE
            own = load_step_temperature(self.step_temperature)
            own.save(Path(folder, STEP_TEMPERATURE_FILE))
        Path(folder, CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """Its fields as a user gives them, without what `resolve` makes of the tags' texts."""
        values = dataclasses.asdict(self)
        del values["spelling"]
        return values

    @classmethod
    def load(cls, folder: str | Path, *, mixer: str | Callable | None = None) -> "SoftConfig":
        """Read the soft_config.json of a checkpoint. Fields that say nothing, as earlier versions
        wrote them, go back to their defaults with a warning. mixer: the caller's, which goes in place
        of another in the file and its knobs."""
        values = json.loads(Path(folder, CONFIG_FILE).read_text())
        values = renamed(values, f"{CONFIG_FILE} in {folder}: ")
        fields = {f.name for f in dataclasses.fields(cls) if f.repr}
        if unknown := sorted(set(values) - fields):
            raise ValueError(
                f"{CONFIG_FILE} in {folder} has unknown fields {unknown}; known: {sorted(fields)}"
            )
        if mixer is not None and mixer != values.get("mixer"):
            theirs = MIXERS.get(values.get("mixer"))  # maybe code that nobody has asked for
            if theirs is not None and theirs.latent and not mk_mixer(mixer).latent:
                values["budget"] = values.pop("token_budget", None)
            values = {k: v for k, v in values.items() if k != "mixer_args"} | {"mixer": mixer}
        check_not_code("mixer", values.get("mixer"), f"{CONFIG_FILE} in {folder}")
        if isinstance(file := values.get("step_temperature"), str):  # of the folder
            values["step_temperature"] = str(Path(folder, file))
        idle = {name: values.pop(name) for name in sorted(_idle(values))}
        # earlier versions wrote them always
        if idle := {k: v for k, v in idle.items() if (k, v) not in LEFT_OUT.items()}:
            message = f"{CONFIG_FILE} in {folder}: {idle} say nothing beside its other fields"
            warnings.warn(f"{message} and are left out", stacklevel=2)
        return cls(**values)


def _check_switch(config: SoftConfig) -> None:
    at, is_number = config.switch, isinstance(config.switch, numbers.Real)
    if is_number and not 0 <= at < math.inf:
        raise ValueError(f"switch={at} must be >= 0 nats and finite, or {BLOCK!r}")
    if at is not None and not is_number and at != BLOCK:
        raise ValueError(
            f"switch={at!r} is unknown: give {BLOCK!r}, the entropy at which a block began, or so many nats"
        )
    for name in ("switch_open", "switch_close"):
        share = getattr(config, name)
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must lie in [0, 1]: the tag's share in what is read")
    check_least(config, switch_dwell=0, switch_budget=0, switch_answer=1)
    lengths = {"budget": config.budget, "max_new_tokens": config.max_new_tokens}
    length, name = min((n, name) for name, n in lengths.items() if n is not None)
    if at is not None and config.switch_dwell >= length:
        warnings.warn(
            f"switch_dwell={config.switch_dwell} is not below {name}={length}: what goes on in "
            "single tokens never mixes again; lower it, or raise the other",
            stacklevel=5,
        )


def _settle_types(config: SoftConfig) -> None:
    """Lists as tuples, one id as several; raises ValueError for values of another type."""
    for name in (*TAGS, "banned", "switch_final"):
        object.__setattr__(config, name, as_ids(getattr(config, name)))
    if config.switch_final == "":
        object.__setattr__(config, "switch_final", ())
    object.__setattr__(config, "spelling", _as_tuples(config.spelling))
    check_types(config)


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _idle(values: dict[str, Any]) -> set[str]:
    """Fields of SoftConfig, not checked yet, that say nothing beside the others: without those that
    say nothing others may say nothing either."""
    draft, idle = object.__new__(SoftConfig), set()
    while True:
        own = {name: value for name, value in values.items() if name not in idle}
        vars(draft).update(vars(_defaults()) | own)
        _settle_types(draft)  # the rules below take them for granted
        more = {name for name, *_ in idle_options(draft, IDLE)}
        if not more:
            return idle
        idle |= more


@functools.cache
def _defaults() -> SoftConfig:
    return SoftConfig()
