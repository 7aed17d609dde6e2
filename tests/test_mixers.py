"""The mixers: exact samples, limits that equal each other, gradients, and random numbers row by
row.

Statistical tests run on fixed seeds. Their thresholds would fail a correct mixer with another seed
once in a million.
"""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import chi_square, seeded

from softar.config import SoftConfig
from softar.mixers import MIXERS, Mixed, mk_mixer
from softar.soft import Soft, dense, mk_proba_dist

ODDS = 1e-6  # of a false failure, for each statistical test
SIX_SIGMA = 6.0  # a normal deviate beyond it: 2e-9
P = torch.tensor([0.42, 0.25, 0.0, 0.17, 0.1, 0.06])
IDS = torch.tensor([40, 7, 3, 12, 0, 25])  # id 3 was dropped by a filter, id 0 is an ordinary token
# Every mixer with settings that make it draw, and two that do not.
SETTINGS = {
    "hard": ("hard", {}),
    "sample": ("hard", {"sample": True}),
    "soft": ("soft", {}),
    "gumbel": ("gumbel", {"tau": 0.4}),
    "k-samples": ("k-samples", {"k": 3}),
    "k-samples by probability": ("k-samples", {"k": 4, "weighting": "probability"}),
    "mixture-of-inputs": ("mixture-of-inputs", {"beta": 0.8}),
    "dirichlet": ("dirichlet", {"gamma": 2.0}),
    "hybrid": ("hybrid", {"share": 0.3}),
    "gumbel, two": ("gumbel", {"tau": 0.4, "candidates": 2}),
    "mixture-of-inputs, two": ("mixture-of-inputs", {"beta": 0.8, "candidates": 2}),
    "hybrid, two": ("hybrid", {"share": 0.3, "candidates": 2}),
}
DRAWING = [name for name in SETTINGS if name not in ("hard", "soft")]
light = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def mixer_of(name):
    mixer, knobs = SETTINGS[name]
    return mk_mixer(mixer, **knobs)


def dist_of(*shape, p=P, ids=IDS):
    return Soft(ids.expand(*shape, -1), p.expand(*shape, -1))


def random_dist(*shape, V=30, seed=0, **knobs):
    return mk_proba_dist(torch.randn(*shape, V, generator=seeded(seed)) * 2, **knobs)


def assert_drawn_from(tokens, p=P, ids=IDS):
    counts = torch.stack([(tokens == i).sum() for i in ids]).double()
    assert counts.sum() == tokens.numel(), "a token outside the distribution"
    assert (counts[p == 0] == 0).all(), "a token of weight 0 was drawn"
    assert chi_square(counts, p) > ODDS


def test_the_chi_square_of_this_test_can_fail():
    tokens = IDS[torch.multinomial(P, 200_000, True, generator=seeded())]
    assert_drawn_from(tokens)
    with pytest.raises(AssertionError):
        assert_drawn_from(tokens, p=torch.tensor([0.43, 0.24, 0.0, 0.17, 0.1, 0.06]))


# -- what all share


def test_one_signature():
    names = "hard soft gumbel k-samples mixture-of-inputs dirichlet hybrid hidden"
    assert [*MIXERS] == names.split()
    for name, mixer in MIXERS.items():
        parameters = list(inspect.signature(mixer).parameters.values())
        assert [p.name for p in parameters[:2]] == ["dist", "rng"], name
        assert parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        for p in parameters[1:]:
            assert (
                p.kind is inspect.Parameter.KEYWORD_ONLY
                and p.default is not inspect.Parameter.empty
            ), (name, p)


@pytest.mark.parametrize("name", SETTINGS)
@light
@given(
    seed=st.integers(0, 1000),
    shape=st.lists(st.integers(1, 3), max_size=3),
    top_k=st.none() | st.integers(1, 30),
    min_p=st.none() | st.floats(0, 0.5),
)
def test_what_every_mixer_returns(name, seed, shape, top_k, min_p):
    dist = random_dist(*shape, seed=seed, top_k=top_k, min_p=min_p)
    before = dist.ids.clone(), dist.weights.clone()
    mixed = mixer_of(name)(dist, rng=seeded(seed))
    assert isinstance(mixed, Mixed)
    soft, token, logp, vector, perturbed = mixed
    assert vector is None and (perturbed is None or perturbed.shape == soft.ids.shape)
    assert torch.equal(dist.ids, before[0]) and torch.equal(dist.weights, before[1])
    assert soft.ids.shape == soft.weights.shape and soft.ids.shape[:-1] == token.shape == tuple(
        shape
    )
    assert soft.ids.dtype == token.dtype == torch.int64 and soft.weights.dtype == torch.float32
    if not name.startswith("hybrid"):
        torch.testing.assert_close(soft.weights.sum(-1), torch.ones(shape))
    assert (soft.weights >= 0).all()
    support = torch.zeros(*shape, 30).scatter(-1, dist.ids, dist.weights)
    assert (support.gather(-1, token[..., None]) > 0).all()
    fed = torch.zeros(*shape, 30).scatter_add(-1, soft.ids, soft.weights)
    assert (fed[support == 0] == 0).all()
    if name in ("soft", "dirichlet"):
        assert logp is None
        assert torch.equal(
            token, soft.ids.gather(-1, soft.weights.argmax(-1, keepdim=True))[..., 0]
        )
    elif not name.startswith("k-samples"):
        torch.testing.assert_close(logp, support.gather(-1, token[..., None])[..., 0].log())
    if name == "gumbel":
        assert torch.equal(
            token, soft.ids.gather(-1, soft.weights.argmax(-1, keepdim=True))[..., 0]
        )


@pytest.mark.parametrize("name", DRAWING)
def test_same_rng_same_result_and_the_global_one_is_left_alone(name):
    dist, mixer = random_dist(20), mixer_of(name)
    state = torch.random.get_rng_state()
    first, again, other = (mixer(dist, rng=seeded(s)) for s in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.token, again.token) and torch.equal(
        first.soft.weights, again.soft.weights
    )
    assert not torch.equal(first.soft.weights, other.soft.weights) or not torch.equal(
        first.soft.ids, other.soft.ids
    )
    # Without one the global generator is used, and moves on.
    torch.manual_seed(3)
    a, b = mixer(dist), mixer(dist)
    torch.manual_seed(3)
    c = mixer(dist)
    assert torch.equal(a.token, c.token) and not torch.equal(a.token, b.token)


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_what_draws_nothing_touches_no_generator(name):
    rng = seeded(1)
    state = rng.get_state()
    mixer_of(name)(random_dist(3), rng=rng)
    assert torch.equal(rng.get_state(), state)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_with_a_generator_each_a_row_alone_is_the_row_in_the_batch(name, shape):
    dist, mixer = random_dist(*shape, top_k=9), mixer_of(name)
    batch = mixer(dist, rng=[seeded(s) for s in range(4)])
    for row in range(4):
        alone = mixer(Soft(dist.ids[row : row + 1], dist.weights[row : row + 1]), rng=[seeded(row)])
        assert torch.equal(alone.token[0], batch.token[row])
        assert torch.equal(alone.soft.ids[0], batch.soft.ids[row])
        torch.testing.assert_close(alone.soft.weights[0], batch.soft.weights[row], rtol=0, atol=0)
        if alone.logp is not None:
            torch.testing.assert_close(alone.logp[0], batch.logp[row], rtol=0, atol=0)


def test_rows_with_generators_of_one_seed_draw_alike():
    mixed = MIXERS["gumbel"](dist_of(2), rng=[seeded(1), seeded(1)])
    assert torch.equal(mixed.soft.weights[0], mixed.soft.weights[1])
    with pytest.raises(ValueError):
        MIXERS["gumbel"](dist_of(3), rng=[seeded(1), seeded(1)])


# -- exact samples


@pytest.mark.parametrize("name", [n for n in DRAWING if n != "dirichlet"])
def test_the_token_is_an_exact_sample(name):
    assert_drawn_from(mixer_of(name)(dist_of(400, 500), rng=seeded(1)).token)


@pytest.mark.parametrize("name", [n for n in DRAWING if n != "dirichlet"])
def test_the_token_is_an_exact_sample_with_a_generator_each(name):
    rows = mixer_of(name)(dist_of(50, 2000), rng=[seeded(s) for s in range(50)])
    assert_drawn_from(rows.token)


def test_draws_of_k_samples_are_independent():
    ids = mk_mixer("k-samples", k=2)(dist_of(200_000), rng=seeded(2)).soft.ids
    positive = P > 0
    pairs = (P[positive, None] * P[positive]).flatten().double()
    index = {int(i): n for n, i in enumerate(IDS[positive])}
    slot = torch.tensor([index.get(i, -1) for i in range(41)])[ids]
    counts = (slot[:, 0] * int(positive.sum()) + slot[:, 1]).bincount(minlength=len(pairs)).double()
    assert chi_square(counts, pairs) > ODDS


def test_over_a_large_vocabulary_the_tail_is_drawn_as_often_as_it_should():
    p = torch.full((20_000,), 2e-6)
    p[0] = 1 - 2e-6 * (len(p) - 1)  # about .96
    dist = Soft(torch.arange(len(p)).expand(400, -1), p.expand(200, -1))
    rng, tail = seeded(3), 0
    for _ in range(5):
        tail += int((MIXERS["hard"](dist, rng=rng, sample=True).token > 0).sum())
    n, q = 1000, 1 - p[0].item()
    assert abs(tail - n * q) < SIX_SIGMA * math.sqrt(n * q * (1 - q))


# -- gumbel


@pytest.mark.parametrize(
    ("small", "large"), [(1e-6, 1e6), (1e-40, 1e38), (1e-300, 1e300), (1e-323, math.inf)]
)
def test_gumbel_ends_small_tau_is_sampling_large_tau_is_uniform(small, large):
    cold = MIXERS["gumbel"](dist_of(500), rng=seeded(4), tau=small)
    assert torch.equal(cold.soft.weights.max(-1).values > 0.999, torch.ones(500, dtype=torch.bool))
    hot = MIXERS["gumbel"](dist_of(500), rng=seeded(4), tau=large)
    torch.testing.assert_close(
        hot.soft.weights[:, P > 0], torch.full((500, 5), 0.2), rtol=1e-3, atol=0
    )
    assert (hot.soft.weights[:, 2] == 0).all()
    assert torch.equal(cold.token, hot.token)  # the token does not depend on tau


def test_gumbel_is_softmax_of_log_p_plus_noise_over_tau():
    dist = random_dist(6, top_k=8)
    one, other = (
        MIXERS["gumbel"](dist, rng=seeded(5), tau=t).soft.weights.double() for t in (1.0, 0.5)
    )
    # The same noise: log w = (log p + g) / tau up to a constant.
    torch.testing.assert_close((2 * one.log()).softmax(-1), other, rtol=1e-4, atol=1e-7)
    noise = one.log() - dist.weights.double().log()
    torch.testing.assert_close(
        (dist.weights.log().double() + noise).softmax(-1), one, rtol=1e-5, atol=1e-7
    )
    # At tau = 1 the noise is standard Gumbel up to the constant: differences of two are logistic,
    # variance pi^2 / 3.
    flat = MIXERS["gumbel"](
        dist_of(100_000, p=torch.ones(2) / 2, ids=torch.arange(2)), rng=seeded(6), tau=1.0
    )
    delta = (flat.soft.weights[:, 0] / flat.soft.weights[:, 1]).log().double()
    sd = math.pi / math.sqrt(3)
    assert abs(delta.mean()) < SIX_SIGMA * sd / math.sqrt(len(delta))
    # A logistic has kurtosis 4.2: the variance of its square is 3.2 var^2.
    assert abs(delta.var() / sd**2 - 1) < SIX_SIGMA * math.sqrt(3.2 / len(delta))


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5])
def test_gumbel_gradient_reaches_the_logits_at_low_tau(tau):
    logits, score = torch.randn(40, 6, generator=seeded(7)), torch.randn(40, 6, generator=seeded(8))

    def f(x):
        dist = mk_proba_dist(x)
        return (MIXERS["gumbel"](dist, rng=seeded(9), tau=tau).soft.weights * score).double().sum()

    logits.requires_grad_()
    f(logits).backward()
    assert (logits.grad.abs().sum(-1) > 1e-4).float().mean() > 0.3
    direction = torch.randn(40, 6, generator=seeded(10))
    h = 2e-3 * tau
    with torch.no_grad():
        numeric = (f(logits + h * direction) - f(logits - h * direction)) / (2 * h)
    assert (logits.grad * direction).sum().item() == pytest.approx(
        numeric.item(), rel=2e-2, abs=2e-2
    )


def test_gumbel_gradient_is_finite_beside_dropped_tokens():
    w = P.clone().requires_grad_()
    mixed = MIXERS["gumbel"](Soft(IDS, w), rng=seeded(1), tau=0.1)
    (mixed.soft.weights**2).sum().backward()
    assert w.grad.isfinite().all() and w.grad[2] == 0 and w.grad.abs().max() > 0


# -- k samples


def test_one_sample_is_sampling_bit_for_bit():
    dist = random_dist(50, top_k=12)
    drawn = MIXERS["hard"](dist, rng=seeded(11), sample=True)
    for weighting in ("uniform", "probability"):
        one = MIXERS["k-samples"](dist, rng=seeded(11), k=1, weighting=weighting)
        for a, b in zip(
            (one.token, one.logp, *one.soft), (drawn.token, drawn.logp, *drawn.soft), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("k", [2, 5])
def test_k_samples_weights_and_joint_logp(k):
    dist = random_dist(30, top_k=6)
    uniform = MIXERS["k-samples"](dist, rng=seeded(12), k=k)
    by_p = MIXERS["k-samples"](dist, rng=seeded(12), k=k, weighting="probability")
    assert torch.equal(uniform.soft.ids, by_p.soft.ids) and uniform.soft.ids.shape == (30, k)
    assert (uniform.soft.ids[:, 0] == uniform.token).all()
    assert any(len(set(row)) < k for row in uniform.soft.ids.tolist()), "drawn with replacement"
    p = torch.zeros(30, 30).scatter(-1, dist.ids, dist.weights).gather(-1, uniform.soft.ids)
    torch.testing.assert_close(uniform.soft.weights, torch.full((30, k), 1 / k))
    torch.testing.assert_close(by_p.soft.weights, p / p.sum(-1, keepdim=True))
    for mixed in (uniform, by_p):
        torch.testing.assert_close(mixed.logp, p.log().sum(-1))


def test_k_samples_converges_to_the_distribution():
    fed = MIXERS["k-samples"](dist_of(1), rng=seeded(13), k=20_000).soft
    share = torch.zeros(41).scatter_add(0, fed.ids[0], fed.weights[0])[IDS]
    assert ((share - P).abs() <= SIX_SIGMA * (P * (1 - P) / 20_000).sqrt()).all()


# -- mixture of inputs


def brute_mixture(p, drawn, beta):
    h = sum(-x * math.log(x) for x in p if x > 0) / math.log(len(p))
    return [(h * x + (beta + 1 - h) * (i == drawn)) / (beta + 1) for i, x in enumerate(p)]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0, 100.0])
def test_mixture_of_inputs_is_the_formula_of_the_paper(beta):
    dist = random_dist(20, top_k=7, min_p=0.05)
    mixed = MIXERS["mixture-of-inputs"](dist, rng=seeded(14), beta=beta)
    drawn = MIXERS["hard"](dist, rng=seeded(14), sample=True)
    assert torch.equal(mixed.token, drawn.token) and torch.equal(mixed.logp, drawn.logp)
    assert torch.equal(mixed.soft.ids, dist.ids)
    slots = (dist.ids == drawn.token[:, None]).float().argmax(-1).tolist()
    rows = [
        brute_mixture(p, slot, beta) for p, slot in zip(dist.weights.tolist(), slots, strict=True)
    ]
    torch.testing.assert_close(mixed.soft.weights, torch.tensor(rows), rtol=1e-5, atol=1e-6)


def test_mixture_of_inputs_with_beta_to_infinity_is_sampling():
    dist = random_dist(30, top_k=8)
    drawn = MIXERS["hard"](dist, rng=seeded(15), sample=True)
    one_hot = (dist.ids == drawn.token[:, None]).float()
    limit = MIXERS["mixture-of-inputs"](dist, rng=seeded(15), beta=math.inf)
    assert torch.equal(limit.token, drawn.token) and torch.equal(limit.soft.weights, one_hot)
    near = MIXERS["mixture-of-inputs"](dist, rng=seeded(15), beta=1e6)
    torch.testing.assert_close(near.soft.weights, one_hot, rtol=0, atol=1e-5)


@pytest.mark.parametrize("K", [1, 2, 3, 7, 1000, 5003])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_mixture_of_inputs_of_a_flat_or_single_distribution(K, beta):
    dist = mk_proba_dist(torch.zeros(4, K))
    w = MIXERS["mixture-of-inputs"](dist, rng=seeded(1), beta=beta).soft.weights
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(4))
    if K > 1:  # entropy 1: the share of the draw itself is beta / (beta + 1) plus its p
        expected = (beta + 1 / K) / (beta + 1)
        torch.testing.assert_close(w.amax(-1), torch.full((4,), expected), rtol=1e-4, atol=1e-6)


# -- dirichlet


@pytest.mark.parametrize("gamma", [0.05, 1.0, 4.0, 50.0])
def test_dirichlet_has_the_mean_and_variance_of_dirichlet(gamma):
    n = 60_000
    w = MIXERS["dirichlet"](dist_of(n), rng=seeded(16), gamma=gamma).soft.weights.double()
    assert (w[:, 2] == 0).all()
    positive = P > 0
    theirs = torch.distributions.Dirichlet(gamma * P[positive].double())
    w = w[:, positive]
    se = (theirs.variance / n).sqrt()
    assert ((w.mean(0) - theirs.mean).abs() < SIX_SIGMA * se).all()
    # |w - p| <= 1, so the variance of (w - p)^2 is at most E (w - p)^4 <= Var w.
    spread = ((w - theirs.mean) ** 2).mean(0)
    assert ((spread - theirs.variance).abs() < SIX_SIGMA * se).all()


@pytest.mark.parametrize("gamma", [1e-4, 1e-10, 1e-30, 1e-38, 1e-300])
def test_dirichlet_of_tiny_concentration_is_sampling_without_nan(gamma):
    mixed = MIXERS["dirichlet"](dist_of(100_000), rng=seeded(17), gamma=gamma)
    assert mixed.soft.weights.isfinite().all()
    assert (mixed.soft.weights.amax(-1) > 0.999).float().mean() > 0.99
    if gamma < 1e-6:  # so near the limit that the token is a sample of p
        assert_drawn_from(mixed.token)


@pytest.mark.parametrize("gamma", [1e7, 1e38, 1e300, math.inf])
def test_dirichlet_of_large_concentration_is_the_distribution(gamma):
    w = MIXERS["dirichlet"](dist_of(100), rng=seeded(18), gamma=gamma).soft.weights
    torch.testing.assert_close(w, P.expand(100, -1), rtol=0, atol=2e-3)


def test_dirichlet_gradient_is_finite():
    w = P.clone().requires_grad_()
    score = torch.arange(6.0)
    (
        MIXERS["dirichlet"](dist_of(50, p=w), rng=seeded(19), gamma=2.0).soft.weights @ score
    ).sum().backward()
    assert w.grad[P > 0].isfinite().all() and w.grad[P > 0].abs().max() > 0


# -- soft, hard


def test_soft_feeds_back_the_belief_itself():
    dist = random_dist(5, top_k=4)
    mixed = MIXERS["soft"](dist)
    assert mixed.soft is dist and torch.equal(mixed.token, dist.ids[:, 0]) and mixed.logp is None


def test_hard_is_the_most_likely_token():
    dist = random_dist(5)
    mixed = MIXERS["hard"](dist)
    assert torch.equal(mixed.token, dist.weights.argmax(-1))
    assert torch.equal(mixed.soft.ids, mixed.token[:, None]) and torch.equal(
        mixed.soft.weights, torch.ones(5, 1)
    )
    torch.testing.assert_close(mixed.logp, dist.weights.amax(-1).log())


def test_weights_gradients_pass_where_the_method_has_them():
    for name in (
        "soft",
        "gumbel",
        "k-samples by probability",
        "mixture-of-inputs",
        "dirichlet",
        "hybrid",
    ):
        for min_p in (None, 0.3):  # with it, some weights are 0
            logits = torch.randn(30, 6, generator=seeded(20), requires_grad=True)
            soft = mixer_of(name)(mk_proba_dist(logits, min_p=min_p), rng=seeded(21)).soft
            (soft.weights * soft.ids).sum().backward()
            assert logits.grad.isfinite().all() and logits.grad.abs().max() > 1e-3, (name, min_p)


# -- candidates


@pytest.mark.parametrize("name", ["gumbel", "mixture-of-inputs", "hybrid"])
def test_candidates_narrow_the_mixture_and_not_the_draw(name):
    """All of them are the mixer without; fewer leave the token and its log-probability as they are."""
    dist = random_dist(40, V=12, seed=3)
    whole, every, two = (MIXERS[name](dist, rng=seeded(4), candidates=n) for n in (None, 12, 2))
    assert torch.equal(whole.token, every.token) and torch.equal(whole.token, two.token)
    assert torch.equal(whole.logp, two.logp)
    torch.testing.assert_close(dense(whole.soft, 12), dense(every.soft, 12))
    kept = dense(two.soft, 12) > 0
    assert (kept.sum(-1) <= 3).all() and kept.gather(-1, two.token[:, None]).all()
    top = dist.weights.topk(2, -1)[1]
    if name != "gumbel":  # the two likeliest beside the token
        assert kept.gather(-1, top).all()
    else:  # the first two of the others' order, by the same noise
        assert torch.equal(two.soft.ids, every.soft.ids[:, :2])
        assert torch.equal(two.perturbed, every.perturbed[:, :2])
        torch.testing.assert_close(two.soft.weights, (two.perturbed / 0.5).softmax(-1))
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"candidates={wrong} must be a whole number from 1"):
            mk_mixer(name, candidates=wrong)


def test_one_candidate_is_sampling():
    dist = random_dist(30, seed=5)
    for name in ("gumbel", "mixture-of-inputs"):
        mixed = MIXERS[name](dist, rng=seeded(6), candidates=1)
        alone = torch.nn.functional.one_hot(mixed.token, 30).float()
        assert torch.equal(dense(mixed.soft, 30), alone)


# -- by name


def test_mk_mixer_binds_knobs_and_takes_functions():
    assert mk_mixer("gumbel") is MIXERS["gumbel"]

    def second(dist, *, rng=None, slot=1):
        token = dist.ids[..., slot]
        return Mixed(Soft(token[..., None], torch.ones_like(token[..., None]).float()), token, None)

    assert mk_mixer(second).fn is second
    assert mk_mixer(second, slot=0)(dist_of(2)).token.tolist() == [40, 40]
    a = mk_mixer("gumbel", tau=0.2)(dist_of(4), rng=seeded(1))
    b = MIXERS["gumbel"](dist_of(4), rng=seeded(1), tau=0.2)
    assert torch.equal(a.soft.weights, b.soft.weights)


def test_what_decoders_know_of_a_mixer():
    facts = {}
    for name, (mixer, knobs) in SETTINGS.items():
        made = mk_mixer(mixer, **knobs)
        facts[name] = made.single, made.draws(made.knobs), made.width(made.knobs, 9)
    assert facts == {
        "hard": (True, False, 1),
        "sample": (True, True, 1),
        "soft": (False, False, 9),
        "gumbel": (False, True, 9),
        "k-samples": (False, True, 3),
        "k-samples by probability": (False, True, 4),
        "mixture-of-inputs": (False, True, 9),
        "dirichlet": (False, True, 9),
        "hybrid": (False, True, 10),
        "gumbel, two": (False, True, 2),
        "mixture-of-inputs, two": (False, True, 3),
        "hybrid, two": (False, True, 3),
    }
    assert mk_mixer("k-samples").knobs == {"k": 3, "weighting": "uniform"}


def test_a_plain_function_may_be_registered(monkeypatch):
    def uniform(dist, *, rng=None, share=1.0):
        weights = torch.full_like(dist.weights, share / dist.weights.shape[-1])
        return Mixed(Soft(dist.ids, weights), dist.ids[..., 0], None)

    monkeypatch.setitem(MIXERS, "uniform", uniform)
    config = SoftConfig(mixer="uniform", mixer_args={"share": 0.5}, top_k=7, softness=0.5)
    assert config.is_soft and config.draws and config.width == 8
    assert mk_mixer("uniform", share=0.5)(dist_of(2)).soft.weights.sum(-1).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="mixer='uniform' does not take"):
        SoftConfig(mixer="uniform", mixer_args={"shame": 1})


@pytest.mark.parametrize(
    "name, knobs, told",
    [
        ("gumbell", {}, "mixer='gumbell'.*gumbel.*k-samples.*mixture-of-inputs"),
        ("gumbel", {"temperature": 1}, "mixer='gumbel'.*temperature"),
        ("soft", {"tau": 1}, "mixer='soft'.*tau"),
        ("gumbel", {"tau": 0.0}, r"tau=0\.0"),
        ("gumbel", {"tau": -1}, "tau=-1"),
        ("gumbel", {"tau": math.nan}, "tau=nan"),
        ("k-samples", {"k": 0}, "k=0"),
        ("k-samples", {"k": 2.5}, r"k-samples.*2\.5"),
        ("k-samples", {"weighting": "softmax"}, "weighting='softmax'"),
        ("mixture-of-inputs", {"beta": -0.1}, r"beta=-0\.1"),
        ("dirichlet", {"gamma": 0}, "gamma=0"),
        ("dirichlet", {"gamma": -2.0}, r"gamma=-2\.0"),
    ],
)
def test_unknown_names_and_impossible_knobs_are_named(name, knobs, told):
    with pytest.raises(ValueError, match=told):
        mk_mixer(name, **knobs)
