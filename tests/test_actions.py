"""Log-probabilities, KLs and scores of soft actions against integration, enumeration and finite
differences."""

import itertools
import math

import pytest
import torch
from tiny import VOCAB, model_of
from torch.autograd import gradcheck

import softar
from softar.mixers import gumbel, k_samples
from softar.rl.actions import (
    ACTIONS,
    concrete_logp,
    gumbel_kl,
    gumbel_logp,
    k_samples_entropy,
    k_samples_kl,
    k_samples_logp,
    replay,
    token_kl,
    token_logp,
)
from softar.soft import Soft, entropy, hard, mk_proba_dist
from softar.thought import Kind


def logits_of(*shape, seed=0, scale=1.5):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(*ids):
    ids = torch.tensor(ids)
    return Soft(ids, torch.full(ids.shape, 1 / ids.shape[-1]))


# -- k samples


def test_one_draw_is_the_categorical():
    logits, ref, token = logits_of(2, 3, 7), logits_of(2, 3, 7, seed=1), torch.randint(7, (2, 3))
    expected = torch.distributions.Categorical(logits=logits)
    for logp, kl, *_ in (ACTIONS["k-samples"], ACTIONS["hard"], (token_logp, token_kl)):
        assert torch.allclose(
            logp(logits, hard(token))[..., 0], expected.log_prob(token), atol=1e-6
        )
        theirs = torch.distributions.kl_divergence(
            expected, torch.distributions.Categorical(logits=ref)
        )
        assert torch.allclose(kl(logits, ref, hard(token)), theirs, atol=1e-6)


def test_probabilities_of_all_outcomes_sum_to_one_and_give_kl_and_entropy():
    logits, ref, K = logits_of(4), logits_of(4, seed=1), 3
    outcomes = draws(*itertools.product(range(4), repeat=K))
    every, other = (
        k_samples_logp(x.expand(len(outcomes.ids), 4), outcomes).sum(-1) for x in (logits, ref)
    )
    assert every.exp().sum() == pytest.approx(1, abs=1e-6)
    one = Soft(outcomes.ids[0], outcomes.weights[0])
    assert k_samples_kl(logits, ref, one) == pytest.approx(
        (every.exp() * (every - other)).sum().item(), abs=1e-5
    )
    assert k_samples_kl(logits, ref, one) == pytest.approx(
        K * token_kl(logits, ref).item(), rel=1e-6
    )
    assert k_samples_entropy(logits, one) == pytest.approx(
        -(every.exp() * every).sum().item(), abs=1e-5
    )


def test_the_mixer_says_the_same():
    logits = logits_of(5, 9)
    mixed = k_samples(mk_proba_dist(logits), k=4, rng=torch.Generator().manual_seed(0))
    assert torch.allclose(k_samples_logp(logits, mixed.soft).sum(-1), mixed.logp, atol=1e-5)


def test_slots_without_a_draw_count_nothing():
    logits, ref = logits_of(7), logits_of(7, seed=1)
    padded = Soft(torch.tensor([2, 5, 5]), torch.tensor([0.5, 0.5, 0.0]))
    assert k_samples_logp(logits, padded).tolist() == [
        *k_samples_logp(logits, draws(2, 5)).tolist(),
        0.0,
    ]
    assert torch.equal(k_samples_kl(logits, ref, padded), k_samples_kl(logits, ref, draws(2, 5)))
    assert k_samples_entropy(logits, padded) == pytest.approx(2 * entropy(logits).item())


def test_the_score_is_unbiased_on_a_bandit():
    """Expected score times reward over all outcomes = the gradient of the expected reward, also
    with a baseline."""
    K, outcomes = 2, draws(*itertools.product(range(3), repeat=2))
    reward = torch.tensor([math.sin(1 + 3 * a + 5 * b) for a, b in outcomes.ids.tolist()])

    def joint(logits):
        return k_samples_logp(logits.expand(len(outcomes.ids), 3), outcomes).sum(-1)

    logits = logits_of(3).requires_grad_()
    (exact,) = torch.autograd.grad((joint(logits).exp() * reward).sum(), logits)
    for baseline in (0.0, 0.7):
        weight = (joint(logits).exp() * (reward - baseline)).detach()
        (score,) = torch.autograd.grad((weight * joint(logits)).sum(), logits)
        assert torch.allclose(score, exact, atol=1e-6)
    assert exact.abs().max() > 0.01 and K == outcomes.ids.shape[-1]


def test_excluded_tokens():
    logits = torch.tensor([0.0, 1.0, -torch.inf]).requires_grad_()
    logp = k_samples_logp(logits, draws(0, 1))
    assert logp.detach().exp().sum() == pytest.approx(1)
    logp.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[2] == 0
    assert token_kl(logits.detach(), torch.zeros(3)).isfinite()
    assert token_kl(torch.zeros(3), logits.detach()) == torch.inf


def test_bfloat16_logits_are_read_in_float32():
    logits = logits_of(4, 50).bfloat16()
    found = k_samples_logp(logits, draws(*[[1, 2]] * 4))
    assert found.dtype == torch.float32
    assert torch.allclose(found, logits.float().log_softmax(-1)[:, 1:3], atol=1e-6)


# -- Gumbel and Concrete


def grid(low, high, n=4001):
    x = torch.linspace(low, high, n, dtype=torch.float64)
    return x, x[1] - x[0]


def at_times(*times):
    """Perturbed log-probabilities of arrivals at these times, earliest first."""
    return -torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in times], -1).log()


def picks(V, K):
    return [torch.tensor(ids) for ids in itertools.permutations(range(V), K)]


def gumbels(logits, ids, perturbed):
    """gumbel_logp of one choice of ids at many points, in float64, [N, K]."""
    N, K = perturbed.shape
    many = Soft(ids.expand(N, K), torch.ones(N, K))
    return gumbel_logp(logits.double().expand(N, -1), many, perturbed=perturbed)


@pytest.mark.parametrize("K", [2, 3])
def test_gumbel_density_integrates_to_one_and_gives_the_kl(K):
    """Over the ids, and over the times that follow the first: by quadrature, in one and two
    dimensions."""
    logits, ref = logits_of(4), logits_of(4, seed=1)
    x, step = grid(-14, 9, 700 if K == 2 else 100)
    gaps = torch.cartesian_prod(*[x.exp()] * (K - 1)).view(-1, K - 1)
    times = torch.cat([torch.full((len(gaps), 1), 0.7, dtype=torch.float64), gaps], 1).cumsum(1)
    points, volume = at_times(*times.T), gaps.prod(1) * step ** (K - 1)
    total, kl, expected = 0.0, 0.0, 0.0
    for ids in picks(4, K):
        p, q = (gumbels(x, ids, points).sum(-1) for x in (logits, ref))
        weight = p.exp() * volume
        total, kl = total + weight.sum(), kl + (weight * (p - q)).sum()
        ours = gumbel_kl(logits, ref, Soft(ids, torch.ones(K)), perturbed=points[0].float())
        expected = expected + weight.sum() * ours
    assert total.item() == pytest.approx(1, abs=1e-3)
    assert expected.item() == pytest.approx(kl.item(), rel=2e-3) and kl > 0.1


def test_of_the_whole_vocabulary_it_is_the_product_of_gumbels():
    """SofT-GRPO's density and its divergence, up to what no policy changes."""
    logits, ref = logits_of(3, seed=4).double(), logits_of(3, seed=5).double()
    g = (logits.log_softmax(-1) + logits_of(50, 3, seed=6)).double()
    points, order = g.sort(dim=-1, descending=True)
    logp = lambda x: gumbel_logp(  # noqa: E731
        x.expand(50, 3), Soft(order, torch.ones(50, 3)), perturbed=points
    ).sum(-1)

    def product(x):
        u = g - x.log_softmax(-1)
        return (-u - (-u).exp()).sum(-1)

    assert torch.allclose(logp(logits) - logp(ref), product(logits) - product(ref), atol=1e-9)
    mean, rates = 0.0, logits.softmax(-1)
    for ids in picks(3, 3):
        chance = rates[ids[0]] * rates[ids[1]] / (1 - rates[ids[0]])
        one = Soft(ids, torch.ones(3))
        mean = mean + chance * gumbel_kl(logits, ref, one, perturbed=points[0])
    difference = logits.log_softmax(-1) - ref.log_softmax(-1)
    assert mean.item() == pytest.approx((difference + torch.expm1(-difference)).sum().item())


def test_one_candidate_is_the_token():
    logits, ref, token = logits_of(5, 7), logits_of(5, 7, seed=1), torch.randint(7, (5,))
    one, alone = hard(token), hard(token)._replace(ids=token[:, None].expand(5, 3))
    padded = torch.tensor([0.3, -torch.inf, -torch.inf]).expand(5, 3)
    for soft, perturbed in ((one, torch.randn(5, 1)), (alone, padded)):
        found = gumbel_logp(logits, soft, perturbed=perturbed)
        assert torch.equal(found[:, :1], token_logp(logits, one)) and not found[:, 1:].any()
        kl = gumbel_kl(logits, ref, soft, perturbed=perturbed)
        assert torch.allclose(kl, token_kl(logits, ref), atol=1e-6)


def test_the_mixers_candidates_have_this_density():
    """Scores of what it draws have mean zero, and times a reward they have the gradient that moving
    the logits under the same noise shows."""
    V, n, of, step = 4, 50_000, torch.tensor([1.0, -0.5, 0.3, 2.0]), 0.05
    at = lambda logits: gumbel(  # noqa: E731
        mk_proba_dist(logits.expand(n, V)),
        tau=0.8,
        candidates=2,
        rng=torch.Generator().manual_seed(0),
    )
    reward = lambda mixed: (mixed.soft.weights * of[mixed.soft.ids]).sum(-1) ** 2  # noqa: E731
    logits = logits_of(V, scale=0.8)
    seen, point = at(logits), logits.clone().requires_grad_()
    logp = gumbel_logp(point.expand(n, V), seen.soft, perturbed=seen.perturbed).sum(-1)
    (zero,) = torch.autograd.grad(logp.mean(), point, retain_graph=True)
    assert zero.abs().max() < 6 / math.sqrt(n) and torch.equal(seen.token, seen.soft.ids[:, 0])
    (found,) = torch.autograd.grad(((reward(seen) - 1) * logp).mean(), point)
    moves = step * torch.eye(V)
    expected = torch.stack(
        [(reward(at(logits + m)) - reward(at(logits - m))).mean() / (2 * step) for m in moves]
    )
    assert (found - expected).abs().max() < 0.03 and expected.abs().max() > 0.2


@pytest.mark.parametrize("top", [5.0, 30.0, 95.0])
def test_a_certain_policy_keeps_its_density_and_divergence(top):
    """What the second draw has left may be 1e-40 of the whole: against float64."""
    rows = torch.tensor([[top, 0.0, -1.0, -2.0], [0.9 * top, 0.5, -1.0, -2.5]])
    soft = Soft(torch.tensor([0, 2]), torch.ones(2))
    perturbed = torch.tensor([0.4, -1.2 - top])
    seen = []
    for dtype in (torch.float32, torch.float64):
        a, b = rows.to(dtype).requires_grad_()
        logp = gumbel_logp(a, soft, perturbed=perturbed.to(dtype))
        kl = gumbel_kl(a, b, soft, perturbed=perturbed.to(dtype))
        grads = torch.autograd.grad(logp.sum() + kl, [a, b])
        seen.append([x.double() for x in (logp.detach(), kl.detach(), *grads)])
    for ours, exact in zip(*seen, strict=True):
        assert exact.isfinite().all() and torch.allclose(ours, exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_concrete_density_on_two_tokens_integrates_to_one(tau):
    logits = torch.tensor([0.3, 5.0, -0.4])
    x, step = grid(-60, 60, 24_001)  # of the log-odds s, y = sigmoid(s), dy = y (1 - y) ds
    log_y = torch.stack([torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)], -1)
    many = Soft(torch.tensor([0, 2]).expand(len(x), 2), torch.full((len(x), 2), 0.5))
    found = concrete_logp(logits.expand(len(x), 3), many, log_weights=log_y, tau=tau)[:, 0].double()
    assert ((found + log_y.sum(-1)).exp() * step).sum().item() == pytest.approx(1, abs=1e-3)


def test_concrete_is_torchs_relaxed_one_hot():
    logits = logits_of(8, 4)
    dist = torch.distributions.RelaxedOneHotCategorical(torch.tensor(0.7), logits=logits)
    y = gumbel(mk_proba_dist(logits), tau=0.7, rng=torch.Generator().manual_seed(0)).soft
    found = concrete_logp(logits, y, log_weights=y.weights.log(), tau=0.7)[:, 0]
    assert torch.allclose(found, dist.log_prob(y.weights), atol=1e-3)


def test_concrete_score_does_not_depend_on_tau():
    """1 - K E_j / sum(E), E the exponential noise behind y."""
    logits = logits_of(4).requires_grad_()
    noise = torch.empty(4).exponential_(generator=torch.Generator().manual_seed(3))
    support = Soft(torch.arange(4), torch.full((4,), 0.25))
    for tau in (0.2, 1.0):
        log_y = ((logits.log_softmax(-1) - noise.log()) / tau).log_softmax(-1).detach()
        (score,) = torch.autograd.grad(
            concrete_logp(logits, support, log_weights=log_y, tau=tau).sum(), logits
        )
        assert torch.allclose(score, 1 - 4 * noise / noise.sum(), atol=1e-4)


def test_gradients_against_finite_differences():
    logits = logits_of(2, 5).requires_grad_()
    support = Soft(torch.tensor([[0, 2, 4], [1, 3, 4]]), torch.full((2, 3), 1 / 3))
    point = logits_of(2, 3, seed=2)
    for f in (
        lambda x: k_samples_logp(x, support),
        lambda x: gumbel_logp(x, support, perturbed=point.sort(descending=True)[0]),
        lambda x: concrete_logp(x, support, log_weights=point.log_softmax(-1), tau=0.5),
        lambda x: gumbel_kl(
            x, logits_of(2, 5, seed=4), support, perturbed=point.sort(descending=True)[0]
        ),
        lambda x: k_samples_kl(x, logits_of(2, 5, seed=4), support),
    ):
        # Steps and tolerances for float32, in which the functions work
        assert gradcheck(f, logits, eps=1e-2, atol=5e-3, rtol=5e-2, check_undefined_grad=False)


def test_bad_tau():
    with pytest.raises(ValueError, match="tau=0"):
        concrete_logp(torch.zeros(3), draws(0, 1), log_weights=torch.zeros(2), tau=0)


# -- replay


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma"])
def rolled(request):
    model = model_of(request.param)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    config = softar.SoftConfig(
        "k-samples", {"k": 3}, top_k=None, max_new_tokens=7, budget=4, answer_temperature=1.0
    )
    rng = [torch.Generator().manual_seed(i) for i in range(2)]
    return model, ids, mask, softar.generate(model, ids, mask, config=config, rng=rng)


def test_replay_gives_the_log_probabilities_of_the_rollout(rolled):
    model, ids, mask, out = rolled
    record = out.record
    alive = record.kind != Kind.PAD
    logits = replay(model, ids, mask, Soft(record.ids, record.weights), alive)
    assert logits.shape == (2, record.token.shape[1], VOCAB)
    found = k_samples_logp(logits, Soft(record.ids, record.weights)).sum(-1)
    assert (record.kind == Kind.SOFT).any() and torch.allclose(
        found[alive], record.logp[alive], atol=1e-4
    )


def test_replay_of_old_and_new_has_ratio_one(rolled):
    model, ids, mask, out = rolled
    soft = Soft(out.record.ids, out.record.weights)
    twice = [
        k_samples_logp(replay(model, ids, mask, soft, out.record.kind != Kind.PAD), soft)
        for _ in range(2)
    ]
    assert torch.equal((twice[0] - twice[1]).exp(), torch.ones_like(twice[0]))


# with a tied table the output head has a gradient too
@pytest.mark.parametrize("rolled", ["llama"], indirect=True)
def test_mixtures_pass_no_gradient_to_the_weights_and_to_the_table_only_if_asked(rolled):
    model, ids, mask, out = rolled
    weights = out.record.weights.clone().requires_grad_()
    table = model.get_input_embeddings().weight
    single = out.record.token[out.record.kind != Kind.SOFT].tolist()  # these give the table theirs
    unseen = torch.tensor(sorted(set(range(VOCAB)) - {*ids.flatten().tolist(), *single}))
    for asked in (True, False):
        model.zero_grad()
        logits = replay(
            model,
            ids,
            mask,
            Soft(out.record.ids, weights),
            out.record.kind != Kind.PAD,
            embedding_grad=asked,
        )
        logits.logsumexp(-1).sum().backward()
        assert weights.grad is None
        assert bool(table.grad[unseen].abs().sum() > 0) == asked


def test_replay_of_other_shapes(rolled):
    model, ids, mask, out = rolled
    with pytest.raises(ValueError, match=r"must be \[B, C, K\]"):
        replay(
            model,
            ids,
            mask,
            Soft(out.record.ids[:, :3], out.record.weights[:, :3]),
            out.record.kind != Kind.PAD,
        )
