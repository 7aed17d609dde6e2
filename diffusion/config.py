"""How to denoise, as data: checked when it is made."""

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

from transformers import LogitsProcessorList

from softar.checks import Idle, as_ids, check_choice, check_idle, check_least, check_types
from softar.soft import RESCALES, check_dist

from .knobs import check_allowed, check_knobs
from .net import Facts
from .own_schedule import checked
from .parity import PARITY
from .quirks import DEFAULT, Quirks
from .remask import REMASKED, REMASKS, check_remask
from .schedules import SCHEDULE_KNOBS, SCHEDULES, Schedule, mk_schedule
from .select import SELECTORS, mk_selector
from .soften import Softener, mk_softener
from .stops import STOPS, mk_stop

GRIDS = ("start", "end")
CACHES = (None, "off", "exact", "prefix", "dual")
# options that a schedule of their name, with hyphens, compares scores with, and an example of each
SHORTHANDS = {"threshold": 0.9, "factor": 1.0, "entropy_bound": 0.1}

IDLE = (
    Idle(
        "top_k top_p",
        lambda c: not c.temperature,
        "at temperature=0, where nothing is drawn",
        "give a temperature",
    ),
    Idle(
        "alg_temp",
        lambda c: mk_selector(c.select).is_random,
        "with a select that scores at random",
        "choose another select",
    ),
    Idle(
        "alg_temp",
        lambda c: mk_selector(c.select) == SELECTORS["leftmost"],
        "but shuffle with select='leftmost', whose scores are all alike",
        "choose another select",
    ),
    Idle(
        "alg_temp",
        lambda c: c.steps == 1 or c.block_length == 1,
        "where a forward commits all that is open",
        "give more steps, or longer blocks",
    ),
    Idle("cfg_keep_ids", lambda c: c.cfg_scale == 0, "without guidance", "give a cfg_scale"),
    Idle(
        "cache",
        lambda c: (
            c.cache in ("prefix", "dual")
            and not c.gen_length
            and c.block_length is c.sub_block_length is None
        ),
        "where the block is the whole canvas",
        "give a block_length",
    ),
)


@dataclass(frozen=True)
class DenoiseConfig:
    """How to denoise. The defaults commit the surest token in each forward, greedily, hard."""

    gen_length: int = 128  # masks appended to each prompt; 0 fills the masks of a template
    # blocks are decoded from left to right; None is one block of all
    block_length: int | None = None
    # of block-causal models, whose blocks are the model's own: what of one is decoded together; to
    # rules and softeners each is a block
    sub_block_length: int | None = None
    steps: int | None = None  # forwards in all, shared by the blocks; None is one for each mask
    # name in SCHEDULES, or "module:function"; None is uniform, or what `threshold`, `factor` or
    # `entropy_bound` asks for
    schedule: str | Callable | None = None
    # dilation (pyramid), eps and rounding (linear), rounding (cosine), eta (p2), back (wino), kl and
    # most (refine), editing_threshold and max_post_steps (edit), sure (overwrite): see the function
    schedule_args: dict[str, Any] = field(default_factory=dict)
    threshold: float | None = None  # in (0, 1], of schedule "threshold"
    factor: float | None = None  # > 0, of schedule "factor"
    entropy_bound: float | None = None  # > 0, nats, of schedule "entropy-bound"
    select: str | Callable = "confidence"  # name in SELECTORS: which positions are the best
    alg_temp: float = 0.0  # > 0 draws the positions from softmax(score / alg_temp)
    # name in SOFTENERS, or "module:function": what a masked slot shows; None is as the model was
    # trained: its soft masks, or hard
    soften: str | Callable | Softener | None = None
    # the softener's knobs; of "soft-mask" they override what the model learnt
    soften_args: dict[str, Any] = field(default_factory=dict)
    rescale: str | None = None  # the length of what a softener shows, see softar.soft.soft_embed
    # keys and values kept: within a block "prefix" those left of it, "dual" of both sides; "exact"
    # those of finished blocks; of block-causal models the other two keep those too, and "within" is
    # within a block, around a sub-block. None: "exact" with block-causal models, which alone can, else "off"
    cache: str | None = None
    # of block-causal models: where their blocks are counted from, the "start" of a row, so that an
    # answer may begin inside a block, or the "end" of its prompt, whose first block is then short
    grid: str = "start"
    # ReMDM: "cap", "rescale", "conf" or "loop"; with the schedule uniform or ancestral
    remask: str | None = None
    remask_args: dict[str, Any] = field(default_factory=dict)  # eta, t_on, t_off, alpha_on
    # of the proposals; 0 is the argmax. (first, last) is one that goes from the first towards the
    # last, in equal steps. None is the model's own: 0, or of DiffusionGemma (0.8, 0.4)
    temperature: float | tuple[float, ...] | None = None
    top_k: int | None = None  # of the proposals
    top_p: float | None = None
    # guidance away from the model without the prompt (arXiv:2410.18514); 0 is none
    cfg_scale: float = 0.0
    # tokens of the prompt that the model without it sees all the same, as those of a chat template
    cfg_keep_ids: tuple[int, ...] | None = None
    ban_eos: bool = False  # never propose the end-of-text token
    ends_last: bool = False  # commit end tokens when nothing else is left to commit
    end_ids: tuple[int, ...] | None = None  # the end tokens; None is the model's own
    # a row is over when a finished block holds an end token; the rest becomes end-of-text. None: so
    # with block-causal models only, and neither in templates (gen_length=0) nor beside `allowed`
    early_stop: bool | None = None
    # name in STOPS, or "module:function": when a row of a block is decoded though steps are left, of
    # a model that redraws its slots; None is the model's own
    stop: str | Callable | None = None
    stop_args: dict[str, Any] = field(default_factory=dict)  # stability, confidence (stable)
    # token ids that a slot may take: {column of the canvas: ids} for the masks there in all rows, or
    # {(row, column): ids}, which goes before; columns from -1 count from the end
    allowed: dict[int | tuple[int, int], Sequence[int]] | None = None
    # a LogitsProcessor of transformers, or a list of them: called in each forward with the canvas's
    # row of each slot [n, L] and its scores [n, V]
    logits_processor: Callable | Sequence[Callable] | None = None
    # name in PARITY: a public implementation to reproduce, defects included
    parity: str | None = None
    dilation: InitVar[None] = None  # no option any more; what to write instead is said
    eps: InitVar[None] = None

    def __post_init__(self, dilation, eps):
        for knob, value in (("dilation", dilation), ("eps", eps)):
            if value is not None:
                raise ValueError(
                    f"{knob}={value} belongs to one schedule: give schedule_args={{{knob!r}: {value}}}"
                )
        for name in ("end_ids", "cfg_keep_ids"):
            object.__setattr__(self, name, as_ids(getattr(self, name)))
        check_allowed(self.allowed)
        check_types(self)
        if isinstance(self.logits_processor, (list, tuple)):
            processors = LogitsProcessorList(self.logits_processor)
            object.__setattr__(self, "logits_processor", processors)
        check_least(self, gen_length=0, block_length=1, sub_block_length=1, steps=1)
        for name, known in (("select", SELECTORS), ("parity", PARITY)):
            if isinstance(getattr(self, name), str):
                check_choice(name, getattr(self, name), sorted(known))
        b = self.block_length
        if b and self.gen_length % b and self.quirks.grid is None and not self.quirks.blocks:
            raise ValueError(
                f"block_length={self.block_length} does not divide gen_length={self.gen_length}: choose a divisor"
            )
        check_choice("cache", self.cache, CACHES)
        check_choice("grid", self.grid, GRIDS)
        check_choice("rescale", self.rescale, RESCALES)
        blocks = self.gen_length // b if b else 1
        if self.steps is not None and self.steps % max(blocks, 1) and not self.quirks.lenient:
            raise ValueError(
                f"steps={self.steps} cannot be shared by {blocks} blocks: choose a multiple of {blocks}"
            )
        if self.allowed and self.early_stop:
            raise ValueError(
                "early_stop=True fills slots with an end token, and allowed says what they take: leave one out"
            )
        if not self.quirks.lenient:
            check_idle(self, IDLE)
        self._check_schedule()
        softener = mk_softener("hard" if self.soften is None else self.soften, **self.soften_args)
        if self.soften is not None:  # None is decided when the model is known
            self._check_softness(softener)
        self._check_remask(softener)
        self._check_stop()
        self._check_temperature()
        for name in ("alg_temp", "cfg_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}={getattr(self, name)} must be >= 0 and finite; 0 switches it off"
                )

    def _check_schedule(self):
        name, schedule = self.schedule_name, mk_schedule(self.schedule_name)
        lenient, selector = self.quirks.lenient, mk_selector(self.select)
        if self.threshold is not None:
            above = 0 <= self.threshold if lenient else 0 < self.threshold
            if not (above and self.threshold <= 1):
                raise ValueError(f"threshold={self.threshold} must lie in (0, 1]: a probability")
        for option in ("factor", "entropy_bound"):
            value = getattr(self, option)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{option}={value} must be > 0 and finite")
        for option, example in SHORTHANDS.items():
            value = getattr(self, option)
            if schedule.compares == option and schedule.has_to_compare and value is None:
                raise ValueError(f"schedule={name!r} needs {option}=, for example {example}")
            if schedule.compares != option and value is not None and not lenient:
                raise ValueError(
                    f"{option}={value} does not go with schedule={name!r}: leave one out"
                )
        if self.steps is not None and schedule.takes_steps is False and not lenient:
            raise ValueError(
                f"steps={self.steps} does not go with schedule={name!r}, which takes as many as it needs"
            )
        if schedule.is_random and not lenient:
            scores = selector.is_confidence or selector.is_random
            if self.alg_temp or self.ends_last or not scores:
                raise ValueError(
                    f"schedule={name!r} draws each position by itself: select={self.select!r}, "
                    f"alg_temp={self.alg_temp}, ends_last={self.ends_last} say nothing to it"
                )
        if schedule.from_left and self.ends_last and not lenient:
            raise ValueError(
                f"schedule={name!r} commits from the left, and ends_last={self.ends_last} lets end tokens wait: "
                f"leave one out"
            )
        fits = {"probabilities": selector.is_probability, "entropies": selector.wants_entropy}
        if schedule.compares and not (fits[schedule.scores] or lenient):
            remedy = {"probabilities": "confidence", "entropies": "entropy"}[schedule.scores]
            raise ValueError(
                f"schedule={name!r} compares {schedule.scores}, which select={self.select!r} does not give: give "
                f"select={remedy!r}"
            )
        if schedule.compares and self.alg_temp:
            raise ValueError(
                f"schedule={name!r} compares {schedule.scores}: alg_temp={self.alg_temp} must be 0"
            )
        # what a function of the user's takes is its own affair
        if self.quirks.rule is not None or name in SCHEDULES:
            option = "schedule" if self.quirks.rule is None else "parity"
            takes = self.scheduler.fn.__kwdefaults__ or {}
            method = name if self.quirks.rule is None else self.parity
            check_knobs(
                option, method, self.schedule_args, takes, SCHEDULE_KNOBS, args="schedule_args"
            )

    def _check_temperature(self):
        is_pair = isinstance(self.temperature, (tuple, list))
        ends = self.temperature if is_pair else [self.temperature or 0.0]
        if is_pair and not (len(ends) == 2 and all(0 < end < float("inf") for end in ends)):
            raise ValueError(
                f"temperature={self.temperature} must be a number, or (first, last), both > 0 and finite"
            )
        for end in ends:
            check_dist(None, end, self.top_k, self.top_p)

    def _check_stop(self):
        if self.stop is not None:
            mk_stop(self.stop, **self.stop_args)
        elif self.stop_args:
            raise ValueError(f"stop_args={self.stop_args} without stop: choose one of {[*STOPS]}")

    def _check_softness(self, softener: Softener):
        if softener.fn is not None:
            return
        if mk_schedule(self.schedule_name).refines:
            raise ValueError(
                f"schedule={self.schedule_name!r} reads soft masks until the model has settled, and "
                f"soften={self.soften!r} shows bare ones: choose another softener"
            )
        if self.rescale is not None:
            raise ValueError(
                f"rescale={self.rescale!r} is of mixtures, and soften={self.soften!r} shows none: leave one out"
            )

    def _check_remask(self, softener: Softener):
        if self.remask is None:
            if self.remask_args:
                raise ValueError(
                    f"remask_args={self.remask_args} without remask: choose one of {[*REMASKS]}"
                )
            return
        check_remask(self.remask, self.remask_args)
        if self.quirks.rule is not None:
            raise ValueError(
                f"parity={self.parity!r} has a rule of its own for what commits, and so has remask={self.remask!r}: "
                f"leave one out"
            )
        if mk_schedule(self.schedule_name) not in [SCHEDULES[name] for name in REMASKED]:
            raise ValueError(
                f"remask={self.remask!r} sets by itself how many commit, and schedule={self.schedule_name!r} does not "
                f"go with it: choose one of {[*REMASKED]}"
            )
        if self.ends_last and mk_selector(self.select).is_random:
            raise ValueError(
                f"ends_last={self.ends_last} says nothing to remask={self.remask!r} with select={self.select!r}, "
                f"which draw each position by itself: choose another select"
            )
        if self.steps is None:
            raise ValueError(f"remask={self.remask!r} needs steps=")
        if softener.revises:
            raise ValueError(
                f"soften={self.soften!r} revises decoded tokens itself: it does not go with remask"
            )

    def as_trained(self, facts: Facts) -> "DenoiseConfig":
        """With `soften` and `temperature` of a model of masks decided; its soft-mask settings are
        overruled by `soften_args`."""
        if facts.mask_id is None:
            return self
        how = replace(self, temperature=0.0) if self.temperature is None else self
        learnt = facts.soft_mask
        if how.soften is None:
            # The public samplers know nothing of a head.
            soft = learnt is not None and how.parity is None
            return replace(
                how, soften="soft-mask" if soft else "hard", soften_args=learnt if soft else {}
            )
        if how.soften == "soft-mask" and learnt is not None and how.parity is None:
            return replace(how, soften_args=learnt | how.soften_args)
        return how

    @property
    def quirks(self) -> Quirks:
        """What the public implementation `parity` does otherwise."""
        return DEFAULT if self.parity is None else PARITY[self.parity]

    @property
    def schedule_name(self) -> str | Callable:
        if self.schedule is not None:
            return self.schedule
        asked = [name for name in SHORTHANDS if getattr(self, name) is not None]
        return asked[0].replace("_", "-") if asked else "uniform"

    @property
    def scheduler(self) -> Schedule:
        """What makes the rules of blocks, by the schedule's name or by `parity`."""
        rule = self.quirks.rule
        name = self.schedule_name if rule is None else rule
        schedule = mk_schedule(name)
        if rule is not None or (isinstance(name, str) and name in SCHEDULES):
            return schedule
        return schedule._replace(fn=checked(schedule.fn, f"{name!r:.80}"))
