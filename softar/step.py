"""A step between two forwards, entropy to flags: a function of tensors of fixed shapes, which
compiles.

What it cannot hold stays outside: processors and stopping criteria read ids that grow, and random
numbers come from generators. Numbers whose count is known are drawn ahead and handed in.

Shapes: B batch, V vocabulary, K tokens kept, D embedding width.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CompileConfig, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from .caches import or_given_up
from .config import SoftConfig
from .draws import ANSWER, THOUGHT
from .feedback import StepTemperature, stretched, where_read
from .looks import flags_of
from .mixers import BUILT_IN, Rng, mk_mixer
from .noise import exponential, uniform
from .soft import entropy
from .thought import Kind, Progress, Record, Rules, decide, mk_propose

LIMITS = (MaxLengthCriteria, MaxTimeCriteria)  # of all rows together: the host alone sees to them
KNOWN = (*LIMITS, EosTokenCriteria)  # stopping criteria that nothing else has to ask
GIVEN_UP: set[str] = set()  # configurations whose step did not compile


class Stepped(NamedTuple):
    """What a step makes of the logits."""

    progress: Progress  # with the rows done whose token ends them
    record: Record
    flags: Tensor  # [4] bool, softar.looks.flags_of
    vector: Tensor | None  # [B, D], what rows of kind LATENT read next
    perturbed: Tensor | None  # [B, K], Mixed.perturbed of those of kind SOFT


def mk_step(
    config: SoftConfig,
    rules: Rules,
    criteria: Sequence[Callable],
    step_temperature: StepTemperature | None,
    length: float | None,
) -> Callable[..., Stepped]:
    """A function of progress, logits [B, V] float32 and what processors made of them, a function that
    gives the random numbers of a purpose, whether anybody is thinking, and the last hidden state
    [B, D] or None.

    Args:
        criteria: a decode's; the tokens of EosTokenCriteria end a row.
        length: of vectors that are fed back; None leaves them.
    """
    propose, temperature = mk_propose(config, step_temperature), config.entropy_temperature
    varies = step_temperature is not None and config.switch is None
    ends = [c.eos_token_id.to(rules.pad.device) for c in criteria if type(c) is EosTokenCriteria]
    ends = torch.cat([*ends, rules.eos[:0]])

    def step(progress, logits, scores, draw, any_thinking, hidden) -> Stepped:
        factor = step_temperature(hidden).to(logits.device) if varies else 1.0
        h = entropy(logits, temperature * factor)
        thought, answer = propose(scores, draw, any_thinking, hidden)
        progress, record = decide(rules, progress, h, thought, answer)
        has_token = record.kind != int(Kind.LATENT)
        ended = (record.token[:, None] == ends).any(1) & has_token
        progress = progress._replace(done=progress.done | ended)
        vector = None if thought.vector is None else stretched(thought.vector, length)
        perturbed = where_read(thought.perturbed, record.kind == int(Kind.SOFT))
        return Stepped(progress, record, flags_of(progress, record), vector, perturbed)

    return step


def compiled(step: Callable[..., Stepped], config: SoftConfig, how: CompileConfig) -> Callable:
    """`step` as one graph while somebody thinks, and another afterwards. They are kept by what a
    configuration makes of them: another decode of the same batch and configuration has them already.
    `step` itself for a mixer of somebody else, for one whose numbers cannot be drawn ahead, and with
    a step_temperature, whose values are looked at."""
    numbers = _numbers_ahead(config)
    if numbers is None or config.step_temperature is not None or config.shown in GIVEN_UP:
        return step

    def pure(progress, logits, scores, numbers, any_thinking, hidden) -> Stepped:
        return step(progress, logits, scores, numbers.__getitem__, any_thinking, hidden)

    def give_up(why: str) -> Callable[..., Stepped]:
        GIVEN_UP.add(config.shown)
        warnings.warn(
            f"the step around the forward does not compile ({why:.200}): it runs uncompiled",
            stacklevel=2,
        )
        return pure

    # Not the CUDA graphs that the forward has: each replay writes over what the last one gave, and
    # records are kept
    graph = torch.compile(pure, fullgraph=True, dynamic=False, backend=how.backend)
    graph = or_given_up(graph, give_up)

    def take(progress, logits, scores, draw, any_thinking, hidden) -> Stepped:
        drawn = numbers(draw, any_thinking, scores)
        return graph(progress, logits, scores, drawn, any_thinking, hidden)

    return take


def is_over(criteria: Sequence[Callable], length: int) -> bool:
    """Does one of a decode's, of length or time, end all rows after so many ids? On the host alone."""
    return any(
        (type(c) is MaxLengthCriteria and length >= c.max_length)
        or (type(c) is MaxTimeCriteria and time.time() - c.initial_timestamp > c.max_time)
        for c in criteria
    )


def separate(progress: Progress) -> Progress:
    """Each column a tensor of its own: a graph is of tensors that are the same, or of ones that are
    not."""
    return Progress(*(column.clone(memory_format=torch.contiguous_format) for column in progress))


def _numbers_ahead(config: SoftConfig) -> Callable[..., tuple[Tensor | None, ...]] | None:
    """A function that draws a step's random numbers in the order in which the step would, by purpose;
    None where that cannot be told."""
    if not (isinstance(config.mixer, str) and config.mixer in BUILT_IN):
        return None
    mixes, knobs = config.mixer_draws, mk_mixer(config.mixer, **config.mixer_args).knobs
    answers, has_single = config.answer_temperature > 0, config.has_single
    if mixes and config.mixer not in NUMBERS:
        return None

    def numbers(draw: Callable[[int], Rng], any_thinking: bool, scores: Tensor):
        (B, V), drawn = scores.shape, [None, None]
        if answers and (has_single or not any_thinking):
            drawn[ANSWER] = uniform((B, 1), draw(ANSWER), scores.device)
        if mixes and any_thinking:
            how, n = NUMBERS[config.mixer](knobs, int(min(config.filtered, V)))
            drawn[THOUGHT] = how((B, n), draw(THOUGHT), scores.device)
        return tuple(drawn)

    return numbers


def _exponential(shape: tuple[int, ...], rng: Rng, device: torch.device) -> Tensor:
    return exponential(torch.empty(shape, device=device), rng)


# Mixers that draw: their knobs, tokens that the filters keep -> how a row's numbers are drawn, and
# how many. What `dirichlet` draws depends on what it drew
NUMBERS: dict[str, Callable[[dict, int], tuple[Callable, int]]] = {
    "hard": lambda knobs, n: (uniform, 1),
    "gumbel": lambda knobs, n: (_exponential, n),
    "k-samples": lambda knobs, n: (uniform, knobs["k"]),
    "mixture-of-inputs": lambda knobs, n: (uniform, 1),
    "hybrid": lambda knobs, n: (uniform, 1),
}
