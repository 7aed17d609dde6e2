"""Options that act in some modes only: named where they do nothing they are refused, at their default
too; left out they are None there, and the default where they act."""

import dataclasses
import json
from functools import partial

import pytest

from softar import SoftConfig
from softar import config as decoding
from softar.diffusion import sft_config as diffusion
from softar.diffusion.sft_config import DiffusionSFTConfig
from softar.rl import config as rl
from softar.rl.config import SoftGRPOConfig, SoftPPOConfig, SoftRLOOConfig
from softar.sft import config as sft
from softar.sft.config import SoftSFTConfig

SFT, DIFFUSION = partial(SoftSFTConfig, "unused"), partial(DiffusionSFTConfig, "unused")
RL = [partial(kind, "unused") for kind in (SoftGRPOConfig, SoftRLOOConfig, SoftPPOConfig)]
MOVE = "alpha_end alpha_hold alpha_span"
GATES = "gate_gradient gate_scale_start gate_scale_end"
GAUSS = "tau_start tau_end gamma_min gamma_max"
# configuration, where the options do nothing, where they act, the options, what they are there
CASES = [
    (SoftConfig, {}, dict(cold_stop_entropy=0.1), "cold_stop_steps", decoding.LEFT_OUT),
    (SFT, dict(soft_mode="sequential"), {}, "soft_passes", sft.LEFT_OUT),
    (SFT, dict(targets="oracle"), {}, f"soft_passes {MOVE}", sft.LEFT_OUT),
    (SFT, dict(alpha_schedule="constant"), {}, f"soft_passes {MOVE}", sft.LEFT_OUT),
    (SFT, {}, dict(learn_temperature=True), "temperature_learning_rate", sft.LEFT_OUT),
    (SFT, {}, dict(learn_step_temperature=True), "temperature_learning_rate", sft.LEFT_OUT),
    (SFT, {}, dict(learn_top_k=True), f"filter_learning_rate {GATES}", sft.LEFT_OUT),
    (DIFFUSION, {}, dict(objective="uniform", normalise="tokens", curriculum=0.5), GAUSS, None),
    (DIFFUSION, dict(eval_decode_rows=0), {}, "eval_steps_decoded", None),
    *[(kind, dict(soft_mixer="hard"), {}, "soft_k", rl.LEFT_OUT) for kind in RL],
    *[
        (RL[0], {}, dict(soft_mixer=mixer), f"soft_candidates soft_{knob}", rl.LEFT_OUT)
        for mixer, knob in (("gumbel", "tau"), ("mixture-of-inputs", "beta"), ("hybrid", "share"))
    ],
    (RL[2], dict(vf_coef=0.0), {}, "cliprange_value", {"cliprange_value": 0.2}),
]


@pytest.mark.parametrize("make, idle, acts, options, values", CASES)
def test_an_option_named_at_its_default_where_it_does_nothing_is_refused(
    make, idle, acts, options, values
):
    values = diffusion.LEFT_OUT if values is None else values
    config = make(**idle)
    for option in options.split():
        assert getattr(config, option) is None
        with pytest.raises(ValueError, match=rf"{option}={values[option]!r} does nothing w.*None"):
            make(**idle, **{option: values[option]})
        assert getattr(make(**acts), option) == values[option]
        assert getattr(make(**acts, **{option: values[option]}), option) == values[option]
    for known, where in ((config, idle), (make(**acts), acts)):
        fields = {f.name: getattr(known, f.name) for f in dataclasses.fields(known) if f.init}
        again = make(**where, **{option: fields[option] for option in options.split()})
        assert [getattr(again, o) for o in options.split()] == [fields[o] for o in options.split()]


def test_a_soft_config_of_before_is_read_without_a_word(tmp_path, recwarn):
    """It named the steps of a cold stop that there was not, always."""
    values = SoftConfig(mixer="gumbel").as_dict() | {"cold_stop_steps": 256}
    (tmp_path / "soft_config.json").write_text(json.dumps(values))
    assert SoftConfig.load(tmp_path) == SoftConfig(mixer="gumbel") and not recwarn
    colder = SoftConfig(mixer="gumbel").changed(cold_stop_entropy=0.5)
    assert colder.cold_stop_steps == 256
    assert colder.changed(cold_stop_entropy=None) == SoftConfig(mixer="gumbel")
