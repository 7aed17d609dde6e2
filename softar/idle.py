"""Fields of a SoftConfig that do nothing beside its others: they are refused, at the edge."""

from .checks import Idle
from .mixers import mk_mixer


def _draws(c) -> bool:
    mixer = mk_mixer(c.mixer, **c.mixer_args)
    return mixer.draws(mixer.knobs)


IDLE = (
    Idle(
        "hide_thought answer_temperature answer_top_k answer_top_p answer_min_p",
        lambda c: (c.think_end, c.budget, c.cold_stop_entropy) == (None, None, None),
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
