"""Fields of a SoftConfig that do nothing beside its others: they are refused, at the edge."""

import warnings

from .checks import Idle
from .mixers import mk_mixer


def _draws(c) -> bool:
    mixer = mk_mixer(c.mixer, **c.mixer_args)
    return mixer.draws(mixer.knobs)


def _is_endless(c) -> bool:
    return (c.think_end, c.budget, c.cold_stop_entropy) == (None, None, None)


def warn_of_no_answer(c) -> None:
    """Of a budget that alone ends the thought, where the text ends before. It is allowed:
    benchmarks time thoughts alone."""
    if c.budget is None or not c.hide_thought or c.budget < c.max_new_tokens:
        return
    if (c.think_end, c.cold_stop_entropy) == (None, None):
        warnings.warn(
            f"budget={c.budget} is not below max_new_tokens={c.max_new_tokens}, thought and answer "
            "together: no answer follows; raise max_new_tokens, or lower budget",
            stacklevel=2,  # always the same line, so that it is said once
        )


IDLE = (
    Idle(
        "switch",
        lambda c: c.softness == 0 or c.temperature == 0 or mk_mixer(c.mixer).single,
        "where every thought is of single tokens",
        "raise softness and temperature, and choose a mixer that mixes",
    ),
    Idle(
        "switch_dwell switch_open switch_close switch_budget switch_final switch_answer",
        lambda c: c.switch is None,
        "without a switch",
        "give switch='block', or nats",
    ),
    Idle(
        "switch_open",
        lambda c: c.think_start is None,
        "without a think_start, which it mixes in",
        "give think_start",
    ),
    Idle(
        "switch_close",
        lambda c: c.think_end is None and c.switch_close != 0,
        "without a think_end, which it mixes in",
        "give think_end",
    ),
    Idle(
        "switch_open switch_close",
        lambda c: mk_mixer(c.mixer).latent,
        "with a mixer of vectors, which mixes no tokens",
        "choose another mixer",
    ),
    Idle(
        "switch_budget",
        lambda c: c.think_end is None,
        "without a think_end, which it puts in",
        "give think_end",
    ),
    Idle(
        "switch_final switch_answer",
        lambda c: c.switch_budget is None,
        "without a switch_budget",
        "give one",
    ),
    Idle(
        "hide_thought",
        _is_endless,
        "where nothing ends the thought",
        "give think_end, budget or cold_stop_entropy",
    ),
    Idle(
        "answer_temperature answer_top_k answer_top_p answer_min_p",
        lambda c: _is_endless(c) and c.switch is None,
        "where nothing ends the thought",
        "give think_end, budget or cold_stop_entropy",
    ),
    Idle(
        "answer_top_k answer_top_p answer_min_p",
        lambda c: c.answer_temperature == 0,
        "at answer_temperature=0, which is greedy",
        "give another",
    ),
    Idle(
        "cold_stop_steps",
        lambda c: c.cold_stop_entropy is None,
        "without a cold stop",
        "set cold_stop_entropy",
    ),
    Idle(
        "softness rescale",
        lambda c: mk_mixer(c.mixer).single,
        "with a mixer of single tokens, which mixes nothing",
        "choose another mixer",
    ),
    Idle(
        "top_p min_p keep",
        lambda c: mk_mixer(c.mixer).single and not _draws(c),
        "with mixer='hard', which is greedy",
        "choose another mixer",
    ),
    Idle(
        "top_k",  # None is no filter
        lambda c: c.top_k is not None and mk_mixer(c.mixer).single and not _draws(c),
        "with mixer='hard', which is greedy",
        "choose another mixer",
    ),
    Idle(
        "softness top_p min_p keep banned",
        lambda c: mk_mixer(c.mixer).latent,
        "with a mixer of vectors, which mixes no tokens",
        "choose another mixer",
    ),
    Idle(
        "token_budget",
        lambda c: not mk_mixer(c.mixer).latent,
        "with a mixer of tokens, whose budget it would be",
        "give budget",
    ),
    Idle(
        "step_temperature",
        lambda c: mk_mixer(c.mixer).latent or not (c.is_soft or (c.temperature and c.mixer_draws)),
        "where a thought's steps have no temperature: the likeliest tokens, or vectors, are read",
        "choose a mixer that mixes or draws, and a temperature above 0",
    ),
    Idle(
        "rescale",
        lambda c: c.gate is not None,
        "with a gate, which reads the mixture at the length of its l2 norm",
        "leave the gate out",
    ),
    Idle(
        "rescale", lambda c: c.softness == 0, "at softness=0, which mixes nothing", "raise softness"
    ),
    Idle(
        "mixer_args",
        lambda c: c.softness == 0 and mk_mixer(c.mixer).only_mixes,
        "at softness=0, where its token alone is read, which they do not change",
        "raise softness",
    ),
    Idle(
        "softness rescale mixer_args top_p min_p keep",
        lambda c: c.temperature == 0,
        "at temperature=0, which leaves one token",
        "raise temperature",
    ),
    Idle(
        "top_k",
        lambda c: c.temperature == 0 and c.top_k is not None,
        "at temperature=0, which leaves one token",
        "raise temperature",
    ),
    Idle(
        "mixer",
        lambda c: c.temperature == 0 and not mk_mixer(c.mixer).single,
        "at temperature=0, which leaves one token",
        "raise temperature",
    ),
)
