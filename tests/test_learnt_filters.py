"""Filters that are learnt: gates that are the filters at scale 0, their gradients, and a training that
keeps plain numbers."""

import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from softar.relaxed import relaxed_dist
from softar.sft.config import SoftSFTConfig
from softar.sft.learnt import LearntFilters
from softar.sft.preflight import forecast
from softar.soft import dense, mk_proba_dist
from tests.tiny import model_of

V = 24


def logits_of(seed, rows=3):
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def number(value):
    return torch.tensor(value, requires_grad=True)


def gated(x, name, value, **how):
    how = how | ({"most": 16} if name == "top_k" else {})
    return relaxed_dist(x, **{name: value}, **how)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from([("min_p", 0.003), ("min_p", 0.05), ("min_p", 0.6), ("min_p", 1.0)])
    | st.tuples(st.just("top_k"), st.floats(1, 15.4).filter(lambda k: abs(k % 1 - 0.5) > 1e-3)),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([(), (3, 5)]),
)
def test_the_filter_is_that_of_mk_proba_dist(seed, threshold, temperature, banned):
    """In the forward pass of "straight" at any scale, of "soft" as the scale goes to 0."""
    x, (name, value) = logits_of(seed), threshold
    plain = value if name == "min_p" else math.floor(value + 0.5)
    how = dict(temperature=temperature, banned=banned)
    wanted = dense(mk_proba_dist(x, **{name: plain}, **how), V)
    for gradient, scale in (("straight", 1.0), ("straight", 0.05), ("soft", 1e-6)):
        found = gated(x, name, torch.tensor(value), scale=scale, gradient=gradient, **how)
        assert dense(found, V) == pytest.approx(wanted, abs=2e-6)


def test_it_goes_with_the_other_filters():
    x = logits_of(1)
    both = relaxed_dist(x, min_p=torch.tensor(0.1), top_k=torch.tensor(4.2), most=9)
    assert dense(both, V) == pytest.approx(dense(mk_proba_dist(x, min_p=0.1, top_k=4), V), abs=1e-6)
    for others in (dict(top_k=6), dict(top_p=0.8), dict(top_k=6, top_p=0.9, keep=3)):
        found = relaxed_dist(x, min_p=torch.tensor(0.1), **others)
        if "keep" not in others:
            wanted = mk_proba_dist(x, min_p=0.1, **others)
            assert dense(found, V) == pytest.approx(dense(wanted, V), abs=1e-6)
    found = relaxed_dist(x, top_k=torch.tensor(4.0), min_p=None, most=9)
    assert found.ids.shape == (3, 9) and ((found.weights > 0).sum(-1) == 4).all()


@pytest.mark.parametrize("scale", [0.2, 1.0])
@pytest.mark.parametrize("name, value", [("min_p", 0.05), ("min_p", 0.4), ("top_k", 4.3)])
def test_gradients_are_those_of_finite_differences(name, value, scale):
    """Of the thresholds and of the logits; "straight" passes the same."""
    worth = torch.linspace(0, 1, V).square()

    def total(x, threshold, gradient="soft"):
        dist = gated(x, name, threshold, scale=scale, gradient=gradient)
        return (dist.weights * worth[dist.ids]).sum()

    x, threshold, step = logits_of(4, rows=2).requires_grad_(), number(value), 2e-3
    slopes = torch.autograd.grad(total(x, threshold), [x, threshold])
    with torch.no_grad():
        apart = value * step
        up, down = (total(x, torch.tensor(value + sign * apart)) for sign in (1, -1))
        assert slopes[1].item() == pytest.approx(
            (up - down).item() / (2 * apart), rel=0.03, abs=2e-4
        )
        assert abs(slopes[1].item()) > 1e-4
        for token in range(0, V, 5):
            one = torch.zeros_like(x)
            one[0, token] = 5e-3
            slope = (total(x + one, threshold) - total(x - one, threshold)).item() / 1e-2
            assert slopes[0][0, token].item() == pytest.approx(slope, rel=0.05, abs=5e-4)
    passed = torch.autograd.grad(total(x, threshold, "straight"), [x, threshold])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(slopes, passed, strict=True))


def test_no_gradient_is_lost_where_nothing_is_left():
    """Banned tokens, and one that is certain: finite gradients."""
    x = torch.full((1, V), -torch.inf)
    x[0, 3], x[0, 4] = 0.0, -200.0
    x, threshold = x.requires_grad_(), number(0.05)
    dist = relaxed_dist(x, min_p=threshold, banned=(7,))
    slopes = torch.autograd.grad(dist.weights[..., 3].sum(), [x, threshold])
    assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(scale=0), "scale=0 must be > 0"),
        (dict(gradient="hard"), "gradient='hard' is unknown"),
        (dict(top_k=torch.tensor(3.0), top_p=0.9), "top_p=0.9 is taken of what a learnt top_k"),
        (dict(min_p=torch.tensor(1.5)), "min_p=1.5 must lie in"),
        (dict(min_p=torch.tensor([0.1, 0.0, 0.2])[:, None]), r"min_p=\[\[0.1.*must lie in"),
        (dict(min_p=torch.tensor(torch.nan)), "min_p=nan must lie in"),
        (dict(top_k=torch.tensor(0.2)), "top_k=0.2.* must be at least 1"),
        (dict(min_p=torch.tensor(0.1), temperature_last=True), "temperature_last=True takes min_p"),
    ],
)
def test_what_is_wrong_is_named(how, message):
    with pytest.raises(ValueError, match=message):
        relaxed_dist(logits_of(0), **how)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(learn_min_p=True), "soft_min_p=None cannot be learnt from: start between 0 and 1"),
        (dict(learn_min_p=True, soft_min_p=1.0), "soft_min_p=1.0 cannot be learnt from"),
        (
            dict(learn_top_k=True, soft_top_k=0),
            "soft_top_k=None cannot be learnt from: start above 1",
        ),
        (dict(learn_top_k=True, soft_top_k=1), "soft_top_k=1 cannot be learnt from"),
        (dict(learn_top_k=True, soft_top_p=0.9), "soft_top_p=0.9 is taken of what a learnt top_k"),
        (dict(learn_top_k=True, soft_passes=0), "learn_top_k=True gets no gradient"),
        (dict(learn_min_p=True, soft_min_p=0.1, alpha_schedule="constant"), "gets no gradient"),
        (dict(learn_top_k=True, soft_mixer="k-samples"), "do not depend on it"),
        (dict(gate_gradient="soft"), "gate_gradient='soft' does nothing without a filter to learn"),
        (
            dict(filter_learning_rate=0.1, learn_temperature=True),
            "filter_learning_rate=0.1 does not",
        ),
        (dict(learn_top_k=True, gate_gradient="hard"), "gate_gradient='hard' is unknown"),
        (dict(learn_top_k=True, gate_scale_end=0.0), "gate_scale_end=0.0 must be > 0"),
    ],
)
def test_options_that_cannot_be(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SoftSFTConfig(str(tmp_path), **settings)


@pytest.mark.parametrize(
    "name, number", [("min_p", None), ("top_k", None), ("top_k", 40), ("temperature", 0.0)]
)
def test_a_checkpoint_that_did_not_learn_it_is_named(name, number, tmp_path):
    start = {"soft_min_p": 0.1, "soft_top_k": 7, "learn_" + name: True}
    learnt = LearntFilters(model_of(), SoftSFTConfig(str(tmp_path), **start), 64)
    with pytest.raises(ValueError, match=f"with {name}={number} and did not.*without learn_{name}"):
        learnt.restore({}, {name: number})


def test_the_forecast_counts_what_a_learnt_top_k_may_keep(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1, 5, 6, 7]], "labels": [[-100, 5, 6, 7]]})
    for learns, width in [(False, 7), (True, 14)]:
        args = SoftSFTConfig(str(tmp_path), learn_top_k=learns, soft_top_k=7, think_steps=2)
        line = forecast(args, rows, dict(start=None, end=None, steps=2))
        assert line.endswith(f"mixtures of {width} tokens")
