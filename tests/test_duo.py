"""Uniform-state diffusion: the Gaussian under it, Bayes' rule by enumeration, the loss against what
it bounds."""

import itertools
import math

import pytest
import torch
from tiny import chi_square

from softar.diffusion.duo import (
    GaussianToDiscrete,
    ancestral_step,
    corrupt,
    discrete_alpha,
    gaussian_alpha,
    gaussian_corrupt,
    log_linear,
    nelbo,
    posterior,
    prior_kl,
    symmetric_kl,
    tau_at,
)
from softar.soft import dense


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def onehot(x, V):
    return torch.nn.functional.one_hot(x, V).double()


def forward(x, alpha, V):
    """q_t(. | x) from its definition, [V]."""
    return alpha * onehot(torch.tensor(x), V) + (1 - alpha) / V


def pairs(V):
    """Every (x, z): two [V V]."""
    return torch.tensor(list(itertools.product(range(V), repeat=2))).unbind(1)


# The Gaussian


def test_gaussian_alpha_is_variance_preserving():
    alpha, sigma = gaussian_alpha(f64(-3.5, 0, 2))
    assert torch.allclose(alpha**2 + sigma**2, f64(1, 1, 1))
    assert torch.allclose((sigma / alpha).log() * 2, f64(-3.5, 0, 2))


def test_two_tokens_have_a_closed_form():
    gamma = torch.linspace(-6, 6, 25, dtype=torch.float64)
    # P(argmax = x) = Phi(a / sqrt 2), and Phi(y) = (1 + erf(y / sqrt 2)) / 2
    a = (-gamma / 2).exp()
    alpha, slope = discrete_alpha(gamma, 2)
    assert torch.allclose(alpha, torch.erf(a / 2), atol=1e-13, rtol=0)
    assert torch.allclose(
        slope, -a / 2 / math.sqrt(math.pi) * (-(a**2) / 4).exp(), atol=1e-13, rtol=0
    )


@pytest.mark.parametrize("V", [2, 10, 1000])
def test_alpha_is_the_chance_of_the_argmax(V, rng):
    n, t = 20_000, 0.6
    schedule = GaussianToDiscrete(V, -3.0, 1.0)
    alpha, _ = schedule(f64(t))
    gamma = schedule.gamma(torch.full((1,), t)).expand(4000)
    x = torch.randint(V, (4000,), generator=rng)
    hits, first = 0, 0
    for _ in range(n // 4000):
        z, _soft = gaussian_corrupt(x, gamma, torch.randn(4000, V, generator=rng), 0.0)
        hits += int((z == x).sum())
        first += int((z == (x + 1) % V).sum())
    chance = float(alpha + (1 - alpha) / V)
    assert abs(hits / n - chance) < 4 * math.sqrt(chance * (1 - chance) / n)
    other = float((1 - alpha) / V)
    assert abs(first / n - other) < 4 * math.sqrt(other / n) + 1e-9


@pytest.mark.parametrize("V", [2, 10, 1000, 152_064])
def test_schedule_and_its_derivative(V):
    schedule = GaussianToDiscrete(V)
    t = torch.linspace(0.001, 0.999, 173, dtype=torch.float64)
    alpha, slope = schedule(t)
    exact, by_gamma = discrete_alpha(schedule.gamma(t), V)
    assert torch.allclose(alpha, exact, atol=1e-9, rtol=0)
    assert torch.allclose(slope, by_gamma * 1.75, atol=1e-6, rtol=0)
    h = 1e-5
    both = discrete_alpha(schedule.gamma(torch.cat([t + h, t - h])), V)[0].view(2, -1)
    assert torch.allclose(slope, (both[0] - both[1]) / (2 * h), atol=1e-6, rtol=1e-6)
    assert (slope < 0).all() and (alpha > 0).all() and (alpha < 1).all()
    ends = schedule(f64(0, 1))[0]
    assert torch.allclose(ends, discrete_alpha(f64(-3.5, -1.75), V)[0], atol=1e-14, rtol=0)
    assert schedule(torch.tensor([0.5]))[0].dtype == torch.float32


@pytest.mark.parametrize("V", [2, 1000, 152_064])
def test_limits_of_the_transformation(V):
    alpha, slope = discrete_alpha(f64(-40, 40), V)  # alpha~ = 1 and 0
    assert torch.allclose(alpha, f64(1, 0), atol=1e-8, rtol=0) and torch.allclose(
        slope, f64(0, 0), atol=1e-8
    )


def test_log_linear():
    alpha, slope = log_linear(f64(0, 0.5, 1), eps=0.1)
    assert torch.allclose(alpha, f64(1, 0.55, 0.1)) and torch.allclose(slope, f64(-0.9, -0.9, -0.9))


def test_gaussian_corrupt_gives_z_and_its_tempered_softmax(rng):
    ids, gamma = torch.randint(7, (2, 3), generator=rng), torch.tensor([-3.0, 0.5])
    noise = torch.randn(2, 3, 7, generator=rng)
    alpha, sigma = gaussian_alpha(gamma)
    w = alpha[:, None, None] * onehot(ids, 7).float() + sigma[:, None, None] * noise
    z, soft = gaussian_corrupt(ids, gamma, noise, 0.3)
    assert torch.equal(z, w.argmax(-1))
    assert torch.allclose(dense(soft, 7), (w / 0.3).softmax(-1), atol=1e-6)
    _, few = gaussian_corrupt(ids, gamma, noise, 0.3, k=2)
    assert few.ids.shape == (2, 3, 2) and torch.equal(few.ids[..., 0], z)
    top = (w / 0.3).softmax(-1).topk(2).values
    assert torch.allclose(few.weights, top / top.sum(-1, keepdim=True), atol=1e-6)
    _, one = gaussian_corrupt(ids, gamma, noise, 0.0)
    assert torch.equal(one.ids, z[..., None]) and torch.equal(one.weights, torch.ones(2, 3, 1))


def test_tau_is_even_in_its_logarithm_then_zero():
    assert tau_at(0) == pytest.approx(0.1) and tau_at(0.25) == pytest.approx(10**-1.5)
    assert tau_at(0.4999999) == pytest.approx(0.01, rel=1e-4)
    assert tau_at(0.5) == 0 and tau_at(1) == 0 and tau_at(0, span=0) == 0


# The tokens


def test_corrupt_draws_from_the_forward_process(rng):
    B, T, V = 2, 40_000, 5
    ids = torch.full((B, T), 2)
    maskable = torch.arange(T).expand(B, T) >= 1000
    z = corrupt(ids, f64(0.7, 0.0), maskable, *torch.rand(2, B, T, generator=rng), V)
    assert (z[:, :1000] == 2).all()
    for row, alpha in enumerate((0.7, 0.0)):
        freq = z[row, 1000:].bincount(minlength=V).double() / (T - 1000)
        assert freq.shape == (V,) and torch.allclose(freq, forward(2, alpha, V), atol=0.01)


def test_corrupt_is_exact_at_the_ends_of_its_numbers():
    ids, most = torch.full((1, 2), 3), torch.full((1, 2), 1 - 2**-24)
    every = torch.ones(1, 2, dtype=torch.bool)
    assert corrupt(ids, torch.zeros(1), every, torch.zeros(1, 2), most, 152_063).tolist() == [
        [152_062] * 2
    ]
    assert corrupt(ids, torch.ones(1), every, most, torch.zeros(1, 2), 9).tolist() == [[3, 3]]


def test_posterior_is_bayes_rule_and_the_papers_formula():
    V, a_s, a_t = 4, 0.8, 0.3
    x, z = pairs(V)
    got = posterior(onehot(x, V), z, f64(a_s), f64(a_t))
    for row, (i, j) in enumerate(zip(x.tolist(), z.tolist())):
        joint = f64(*[forward(i, a_s, V)[y] * forward(y, a_t / a_s, V)[j] for y in range(V)])
        assert torch.allclose(got[row], joint / forward(i, a_t, V)[j])
    p = torch.rand(len(z), V, dtype=torch.float64).softmax(-1)
    hot, kept = onehot(z, V), a_t / a_s
    top = a_t * V * p * hot + (kept - a_t) * hot + (a_s - a_t) * p + (1 - kept) * (1 - a_s) / V
    paper = top / (a_t * V * p.gather(1, z[:, None]) + 1 - a_t)
    assert torch.allclose(posterior(p, z, f64(a_s), f64(a_t)), paper)


def test_posterior_rows_sum_to_one_at_every_end(rng):
    p = torch.randn(6, 11, generator=rng).mul(5).softmax(-1)
    z = torch.randint(11, (6,), generator=rng)
    for a_s, a_t in ((1.0, 0.5), (0.0, 0.0), (0.4, 0.4), (1.0, 0.0), (0.5, 1e-30)):
        got = posterior(p, z, torch.tensor(a_s), torch.tensor(a_t))
        assert (got >= 0).all() and torch.allclose(got.sum(-1), torch.ones(6))
    same = posterior(p, z, torch.tensor(0.4), torch.tensor(0.4))
    assert torch.allclose(same, onehot(z, 11).float(), atol=1e-6)
    assert torch.allclose(posterior(p, z, torch.tensor(1.0), torch.tensor(0.0)), p)


def test_posterior_averages_to_the_forward_process():
    V, a_s, a_t, x = 5, 0.6, 0.2, 3
    got = posterior(onehot(torch.full((V,), x), V), torch.arange(V), f64(a_s), f64(a_t))
    assert torch.allclose(forward(x, a_t, V) @ got, forward(x, a_s, V))


def test_ancestral_step_draws_from_the_posterior(rng):
    n, V = 20_000, 5
    p = f64(0.5, 0.2, 0.2, 0.1, 0.0).expand(n, V)
    z = torch.full((n,), 3)
    chances = posterior(p[:1], z[:1], f64(0.7), f64(0.2))[0]
    drawn = ancestral_step(p, z, f64(0.7), f64(0.2), torch.rand(n, generator=rng)).bincount(
        minlength=V
    )
    assert chi_square(drawn, chances) > 1e-4


def test_ancestral_step_never_draws_a_token_of_probability_zero(rng):
    p = torch.rand(1000, 20, generator=rng)
    p[:, [0, -1]] = 0
    z, most = (
        torch.zeros(1000, dtype=torch.long),
        torch.full((1000,), 1 - 2**-53, dtype=torch.float64),
    )
    p /= p.sum(-1, keepdim=True)
    assert (ancestral_step(p, z, f64(1), f64(0), torch.zeros(1000)) == 1).all()
    assert (ancestral_step(p, z, f64(1), f64(0), most) == 18).all()


def test_ancestral_step_tells_rare_tokens_of_a_large_vocabulary_apart():
    V, n = 2**18, 16
    p = torch.full((n, V), 1e-3 / V)
    p[:, 0] = 0.999
    u = 0.9995 + torch.arange(n, dtype=torch.float64) * 1e-3 / V  # one token further each
    drawn = ancestral_step(p, torch.zeros(n, dtype=torch.long), f64(1), f64(0), u)
    assert len(drawn.unique()) >= n - 1


@pytest.mark.parametrize(("oracle", "low", "high"), [(True, 0.95, 1.0), (False, 0.0, 0.3)])
def test_a_wrong_token_is_repaired(oracle, low, high, rng):
    n, V = 500, 10
    x = torch.randint(V, (n,), generator=rng)
    z = (x + 1) % V
    p = 0.99 * onehot(x, V) + 0.01 / V if oracle else torch.full((n, V), 1 / V, dtype=torch.float64)
    alphas = torch.linspace(0.5, 1, 21, dtype=torch.float64)
    for a_t, a_s in itertools.pairwise(alphas):
        z = ancestral_step(p, z, a_s, a_t, torch.rand(n, generator=rng))
    assert low <= float((z == x).double().mean()) <= high


# The losses


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_nelbo_is_the_limit_of_the_discrete_kl(t, rng):
    V, dt = 4, 1e-6
    x, z = pairs(V)
    p = torch.randn(len(x), V, generator=rng, dtype=torch.float64).mul(2).softmax(-1)
    (a_s, _), (a_t, slope) = log_linear(f64(t - dt)), log_linear(f64(t))
    q = posterior(onehot(x, V), z, a_s, a_t)
    kl = (q * (q / posterior(p, z, a_s, a_t)).log()).sum(-1)
    got = nelbo(p.log(), x, z, a_t, slope)
    assert torch.allclose(kl / dt, got, rtol=1e-3, atol=0) and got.min() > 1e-4


def two_token_nelbo(data, eps, own):
    """The exact bound, nats per pair, for pairs x ~ data [V, V]. The denoiser is the belief about a
    token given the other one's z and, if `own`, its own z too."""
    V, n = len(data), 4000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    alpha, slope = log_linear(u**2, eps)  # dt = 2 u du: more points where alpha is near 1
    q = alpha[:, None, None] * torch.eye(V) + (1 - alpha[:, None, None]) / V  # [n, x, z]
    total = 2 * float(prior_kl(f64(eps), V))
    for table, (x, z, other) in itertools.product(
        (data, data.T), itertools.product(range(V), repeat=3)
    ):
        joint = q[:, :, other] @ table.T  # p(x_i, z_j) [n, V]
        belief = joint * q[:, :, z] if own else joint
        log_probs = (belief / belief.sum(-1, keepdim=True)).log()
        loss = nelbo(log_probs, torch.full((n,), x), torch.full((n,), z), alpha, slope)
        total += float((joint[:, x] * q[:, x, z] * loss * 2 * u).mean())
    return total


@pytest.mark.parametrize("eps", [1e-4, 0.2])
def test_nelbo_of_the_optimal_denoiser_is_the_entropy(eps):
    """Bound = H(x) + KL(q_1 || uniform), exactly: the reverse process then only errs in where it
    starts."""
    data = f64(30, 1, 2, 4, 20, 3, 10, 5, 25).view(3, 3) / 100
    entropy = float(-(data * data.log()).sum())
    kernel = torch.stack([forward(x, eps, 3) for x in range(3)])
    start = kernel.T @ data @ kernel
    gap = float((start * (9 * start).log()).sum())
    assert eps < 0.1 or gap > 1e-3  # else the equality would not see the prior's side
    assert two_token_nelbo(data, eps, own=False) == pytest.approx(entropy + gap, abs=1e-4)
    assert two_token_nelbo(data, eps, own=True) > entropy + gap + 0.1


def test_prior_kl():
    q = forward(1, 0.3, 6)
    assert torch.allclose(
        prior_kl(f64(0.3, 0, 1), 6), f64(float((q * (q * 6).log()).sum()), 0, math.log(6))
    )


def test_nelbo_is_zero_at_the_truth_and_positive_elsewhere(rng):
    x, z = pairs(6)
    alpha, slope = torch.tensor(0.3), torch.tensor(-1.0)
    truth = torch.full((len(x), 6), -torch.inf).scatter(1, x[:, None], 0.0)
    assert torch.equal(nelbo(truth, x, z, alpha, slope), torch.zeros(len(x)))
    near = (truth.clamp_min(-12) + 1e-3 * torch.rand(len(x), 6, generator=rng)).log_softmax(-1)
    assert (nelbo(near, x, z, alpha, slope) >= 0).all()
    far = torch.randn(len(x), 6, generator=rng).log_softmax(-1)
    assert (nelbo(far, x, z, alpha, slope) > 1e-4).all()


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.5, 1 - 1e-6])
def test_nelbo_is_finite_for_a_sure_and_wrong_model(alpha):
    logits = torch.tensor(
        [[0.0, -1e4, -300.0], [-torch.inf, 0.0, -1e9], [5.0, 5.0, -1e4]], requires_grad=True
    )
    loss = nelbo(
        logits.log_softmax(-1),
        torch.tensor([1, 0, 2]),
        torch.tensor([0, 0, 2]),
        torch.tensor(alpha),
        torch.tensor(-1.0),
    )
    loss.sum().backward()
    assert loss.isfinite().all() and (loss >= 0).all() and logits.grad.isfinite().all()
    assert alpha < 0.1 or (loss > 0.1).all()


def test_nelbo_at_no_noise_has_its_limit():
    p = f64(0.2, 0.5, 0.3)
    got = nelbo(p.log()[None], torch.tensor([1]), torch.tensor([1]), f64(1), f64(-2))
    assert torch.allclose(got, f64(2 / 3 * (1 / 0.5 - 1)))


def test_nelbo_in_float32_agrees_with_float64_for_a_large_vocabulary(rng):
    n, V = 8, 30_000
    log_probs = torch.randn(n, V, generator=rng, dtype=torch.float64).mul(3).log_softmax(-1)
    x = torch.randint(V, (n,), generator=rng)
    z = torch.cat([x[:4], torch.randint(V, (4,), generator=rng)])
    alpha = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    wide = nelbo(log_probs, x, z, alpha, f64(-1))
    assert torch.allclose(nelbo(log_probs.float(), x, z, alpha, f64(-1)).double(), wide, rtol=1e-3)


def test_nelbo_gradient(rng):
    x, z = torch.tensor([0, 1]), torch.tensor([0, 2])
    logits = torch.randn(2, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y: nelbo(y.log_softmax(-1), x, z, f64(0.4, 0.6), f64(-1)), logits
    )


def test_symmetric_kl_is_both_divergences(rng):
    x = torch.tensor([0, 3])
    target = 0.9 * onehot(x, 5) + 0.1 / 5
    log_p = torch.randn(2, 5, generator=rng, dtype=torch.float64).log_softmax(-1)
    both = (target * (target.log() - log_p)).sum(-1) + (log_p.exp() * (log_p - target.log())).sum(
        -1
    )
    assert torch.allclose(symmetric_kl(log_p, x, 0.1), both)
    assert torch.allclose(symmetric_kl(target.log(), x, 0.1), f64(0, 0), atol=1e-12)
    sure = torch.tensor([[0.0, -1e4, 0, 0, 0], [0, 1e4, 0, 0, 0]], requires_grad=True)
    loss = symmetric_kl(sure.log_softmax(-1), x)
    loss.sum().backward()
    assert (
        loss.isfinite().all()
        and (loss > 1).all()
        and sure.grad.isfinite().all()
        and (sure.grad != 0).any()
    )


# Bad inputs


Z2, P23 = torch.zeros(2, dtype=torch.long), torch.full((2, 3), 1 / 3)
BAD = {
    "t=": lambda: log_linear(f64(0.5, 1.5)),
    "t=.*nan": lambda: GaussianToDiscrete(5)(f64(math.nan)),
    "t=.-0.1": lambda: GaussianToDiscrete(5).gamma(f64(-0.1)),
    "eps=1": lambda: log_linear(f64(0.5), 1.0),
    "vocab_size=1": lambda: GaussianToDiscrete(1),
    "vocab_size=0": lambda: corrupt(Z2[None], f64(1), Z2[None] == 0, P23[:1, :2], P23[:1, :2], 0),
    "gamma_min=2": lambda: GaussianToDiscrete(5, 2.0, 1.0),
    "points=1": lambda: GaussianToDiscrete(5, points=1),
    "shapes": lambda: corrupt(Z2[None], f64(1), Z2[None] == 0, P23[:1], P23[:1], 5),
    "noise": lambda: gaussian_corrupt(Z2, f64(0, 0), torch.zeros(3, 4), 0.1),
    "temperature=-1": lambda: gaussian_corrupt(Z2, f64(0, 0), torch.zeros(2, 4), -1.0),
    "progress=1.1": lambda: tau_at(1.1),
    "tau_start=0": lambda: tau_at(0.1, 0.0),
    "alpha_s=.0.2": lambda: posterior(P23, Z2, f64(0.2), f64(0.5)),
    "alpha_t < 1": lambda: posterior(P23, Z2, f64(1), f64(1)),
    "z of shape": lambda: nelbo(P23.log(), Z2[:1], Z2[:1], f64(0.5), f64(-1)),
    "x of shape": lambda: nelbo(P23.log(), Z2[:1], Z2, f64(0.5), f64(-1)),
    "alphas of .3.": lambda: nelbo(P23.log(), Z2, Z2, f64(0.5, 0.5, 0.5), f64(-1)),
    "smoothing=0": lambda: symmetric_kl(P23.log(), Z2, 0.0),
    "uniform of shape": lambda: ancestral_step(P23, Z2, f64(0.5), f64(0.2), f64(0.1)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_its_value(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
