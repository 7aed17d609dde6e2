"""The soft token: filters against transformers' warpers, mixtures against dense formulas, and the
memory of both."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, Largest, model_of, seeded, with_lora
from torch import nn
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softar.soft import Soft, check_dist, dense, entropy, hard, mk_proba_dist, soft_embed

INF = float("inf")
light = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def logits_of(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=seeded(seed)) * scale


# -- filters


def filtered(row, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Brute force in double precision, as the definitions say: the kept weights of one row of
    logits, largest first, and how near any decision was to going the other way."""
    kept = sorted((x / temperature for x in row.double().tolist()), reverse=True)[:top_k]
    total = sum(math.exp(x - kept[0]) for x in kept)
    probs = [math.exp(x - kept[0]) / total for x in kept]
    margin, mass, out = 1.0, 0.0, []
    for p in probs:
        if top_p is not None and top_p < 1 and out:  # the first always stays
            margin = min(margin, abs(mass - top_p))
            if mass >= top_p:
                break
        mass += p
        out.append(p)
    if min_p is not None and out[1:]:
        margin = min([margin, *(abs(p - min_p * out[0]) for p in out[1:] if min_p < 1)])
        out = [p for p in out if p >= min_p * out[0]]
    return [p / sum(out) for p in out], margin


params = dict(
    seed=st.integers(0, 10_000),
    V=st.integers(2, 40),
    temperature=st.floats(0.05, 4),
    top_p=st.none() | st.floats(0, 1),
    min_p=st.none() | st.floats(0, 1),
    data=st.data(),
)


@light
@given(**params, scale=st.sampled_from([0.3, 2.0, 8.0]))
def test_filters_are_the_warpers_of_transformers(seed, V, temperature, top_p, min_p, data, scale):
    top_k = data.draw(st.none() | st.integers(1, V))
    logits = logits_of(3, V, seed=seed, scale=scale)
    assume(all(filtered(r, temperature, top_k, top_p, min_p)[1] > 1e-5 for r in logits))
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p is not None:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    if min_p is not None:
        theirs = MinPLogitsWarper(min_p)(None, theirs)
    dist = mk_proba_dist(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert dist.ids.shape == dist.weights.shape == (3, top_k or V)
    torch.testing.assert_close(dense(dist, V), theirs.softmax(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(dense(dist, V) > 0, theirs.softmax(-1) > 0)


@light
@given(**params)
def test_filters_under_ties_keep_what_the_definitions_say(seed, V, temperature, top_p, min_p, data):
    """Which of equal tokens stays is open, how many and how much is not (transformers' top-k keeps
    all that tie)."""
    top_k = data.draw(st.none() | st.integers(1, V))
    logits = torch.randint(-2, 3, (2, V), generator=seeded(seed)).float()
    reference = [filtered(r, temperature, top_k, top_p, min_p) for r in logits]
    assume(all(margin > 1e-5 for _, margin in reference))
    dist = mk_proba_dist(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for row, ids, weights, (expected, _) in zip(
        logits, dist.ids, dist.weights, reference, strict=True
    ):
        kept = sorted(weights[weights > 0].tolist(), reverse=True)
        assert kept == pytest.approx(expected, rel=1e-4)
        mine = ids[weights > 0]
        assert len(set(mine.tolist())) == len(mine)
        # Weights belong to their ids: in proportion to exp(logit / T).
        torch.testing.assert_close(
            weights[weights > 0], (row[mine] / temperature).softmax(-1), rtol=1e-4, atol=1e-6
        )
        if top_k is None and top_p is None and min_p is not None:
            theirs = MinPLogitsWarper(min_p)(None, (row / temperature)[None])[0].softmax(-1)
            torch.testing.assert_close(dense(Soft(ids, weights), V), theirs, rtol=1e-4, atol=1e-6)


@light
@given(
    seed=st.integers(0, 10_000),
    shape=st.lists(st.integers(1, 3), max_size=3),
    V=st.integers(2, 20),
    temperature=st.floats(0, 3),
    data=st.data(),
)
def test_any_leading_shape_sums_to_one_and_leaves_the_logits_alone(
    seed, shape, V, temperature, data
):
    top_k, keep = data.draw(st.none() | st.integers(1, V)), data.draw(st.none() | st.integers(1, V))
    top_p, min_p = data.draw(st.none() | st.floats(0, 1)), data.draw(st.none() | st.floats(0, 1))
    banned = data.draw(st.lists(st.integers(0, V - 1), max_size=V - 1))
    assume(len(set(banned)) < V)
    logits = logits_of(*shape, V, seed=seed)
    before = logits.clone()
    dist = mk_proba_dist(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        keep=keep,
        banned=banned,
    )
    assert torch.equal(logits, before)
    assert dist.ids.dtype == torch.int64 and dist.weights.dtype == torch.float32
    assert dist.ids.shape == dist.weights.shape and dist.ids.shape[:-1] == tuple(shape)
    K = 1 if temperature == 0 else min(top_k or V, keep or V)
    assert dist.ids.shape[-1] == K
    assert (dist.weights >= 0).all()
    torch.testing.assert_close(dist.weights.sum(-1), torch.ones(shape))
    mass = dense(dist, V)
    assert all((mass[..., i] == 0).all() for i in banned)
    # No id stands twice, and a row computed alone is the same.
    assert (dist.ids.sort(-1).values.diff(dim=-1) > 0).all()
    flat = logits.reshape(-1, V)[0]
    alone = mk_proba_dist(
        flat,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        keep=keep,
        banned=banned,
    )
    torch.testing.assert_close(dense(alone, V), mass.reshape(-1, V)[0], rtol=1e-6, atol=1e-7)


def test_filters_off_and_at_their_ends():
    logits = logits_of(4, 12)
    plain = logits.softmax(-1)
    for off in ({}, {"top_k": 12}, {"top_p": 1.0}, {"min_p": 0.0}, {"keep": 12}):
        dist = mk_proba_dist(logits, **off)
        torch.testing.assert_close(dense(dist, 12), plain)
    for most in (
        {"top_k": 1},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"keep": 1},
        {"temperature": 0},
        {"temperature": 0.0},
    ):
        dist = mk_proba_dist(logits, **most)
        assert torch.equal(dense(dist, 12), nn.functional.one_hot(logits.argmax(-1), 12).float()), (
            most
        )


def test_keep_takes_the_largest_after_the_filters():
    logits = logits_of(5, 30)
    dist = mk_proba_dist(logits, top_p=0.99, keep=4)
    filtered_first = dense(mk_proba_dist(logits, top_p=0.99), 30)
    weights, ids = filtered_first.topk(4, -1)
    assert torch.equal(dist.ids, ids)
    torch.testing.assert_close(dist.weights, weights / weights.sum(-1, keepdim=True))


def test_keep_acts_after_top_p_not_before():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    # Top-p .75 on everything keeps two tokens (.5, .8); on the best three, .5 / .95 + .3 / .95 also
    # two, but .55 + ...
    assert mk_proba_dist(logits, top_p=0.81, keep=2).weights.tolist() == pytest.approx(
        [0.625, 0.375]
    )
    # while top-k, before it, changes what top-p sees: .5 / .8 = .625 >= .6 already.
    assert mk_proba_dist(logits, top_p=0.6, top_k=2).weights.tolist() == pytest.approx([1.0, 0.0])
    assert mk_proba_dist(logits, top_p=0.6, keep=2).weights.tolist() == pytest.approx(
        [0.625, 0.375]
    )


@light
@given(
    seed=st.integers(0, 10_000), V=st.integers(20, 300), levels=st.integers(1, 4), data=st.data()
)
def test_the_leading_token_is_the_argmax_under_ties_too(seed, V, levels, data):
    """Low-precision logits tie often; the greedy token must then be the one that argmax gives."""
    logits = torch.randint(levels, (3, V), generator=seeded(seed)).float()
    top_k, top_p = (
        data.draw(st.none() | st.integers(1, V - 1)),
        data.draw(st.none() | st.floats(0, 0.5)),
    )
    dist = mk_proba_dist(logits, top_k=top_k, top_p=top_p)
    leading = dist.ids.gather(-1, dist.weights.argmax(-1, keepdim=True))[:, 0]
    assert torch.equal(leading, logits.argmax(-1))
    assert (dist.ids.sort(-1).values.diff(dim=-1) > 0).all()
    if top_k is not None:
        torch.testing.assert_close(logits.gather(-1, dist.ids), logits.topk(top_k, -1).values)


def test_a_dropped_entry_keeps_its_own_id_with_weight_0():
    """Defect 3: not token 0, and no NaN from it."""
    logits = torch.tensor([[-INF, 1.0, 4.0, 3.9, -2.0]])
    dist = mk_proba_dist(logits, top_k=4, min_p=0.5)
    assert dist.ids[0, :3].tolist() == [2, 3, 1] and dist.ids[0, 3] == 4
    assert (dist.weights[0] > 0).tolist() == [True, True, False, False]
    torch.testing.assert_close(dist.weights[0, :2], torch.tensor([4.0, 3.9]).softmax(-1))


@pytest.mark.parametrize("top_k", [None, 8, 4])
def test_banned_ids_have_no_weight_even_when_they_are_the_most_likely(top_k):
    logits = logits_of(6, 16)
    logits[:, [0, 7]] += 50
    for knobs in (
        {},
        {"temperature": 0},
        {"top_p": 0.3},
        {"min_p": 1.0},
        {"keep": 2},
        {"temperature": 1e-30},
    ):
        dist = mk_proba_dist(logits, top_k=top_k, banned=(0, 7), **knobs)
        assert dense(dist, 16)[:, [0, 7]].abs().max() == 0, knobs
        torch.testing.assert_close(dist.weights.sum(-1), torch.ones(6))
    rest = logits.clone()
    rest[:, [0, 7]] = -INF
    assert torch.equal(mk_proba_dist(logits, banned=(0, 7)).weights, rest.softmax(-1))


def test_banning_all_but_one():
    dist = mk_proba_dist(logits_of(2, 5), top_k=3, banned=(0, 1, 2, 4))
    assert torch.equal(dense(dist, 5), nn.functional.one_hot(torch.tensor([3, 3]), 5).float())


def test_vocabulary_order_writes_no_ids():
    """Defect 8: without top-k the ids are a view of one arange."""
    dist = mk_proba_dist(logits_of(7, 100))
    assert dist.ids.shape == (7, 100) and dist.ids.untyped_storage().nbytes() == 100 * 8


# -- temperature


def test_temperature_goes_before_the_filters():
    """Defect 4: with T first, the min-p cut widens with T."""
    logits = torch.tensor([0.0, -1.0, -2.0, -3.0])
    kept = lambda **kw: int((mk_proba_dist(logits, min_p=math.exp(-1.5), **kw).weights > 0).sum())  # noqa: E731
    assert (kept(temperature=1.0), kept(temperature=2.0), kept(temperature=0.5)) == (2, 4, 1)
    # Temperature last: what survives does not depend on T, the weights do.
    assert (
        kept(temperature=2.0, temperature_last=True),
        kept(temperature=0.5, temperature_last=True),
    ) == (2, 2)
    dist = mk_proba_dist(logits, min_p=math.exp(-1.5), temperature=2.0, temperature_last=True)
    torch.testing.assert_close(dist.weights, torch.tensor([0.0, -0.5, -INF, -INF]).softmax(-1))


@pytest.mark.parametrize(
    "knobs", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9, "min_p": 0.05}]
)
def test_temperature_last_equals_filtering_and_then_scaling(knobs):
    logits = logits_of(4, 20)
    kept = dense(mk_proba_dist(logits, **knobs), 20) > 0
    expected = (logits / 0.3).masked_fill(~kept, -INF).softmax(-1)
    torch.testing.assert_close(
        dense(mk_proba_dist(logits, temperature=0.3, temperature_last=True, **knobs), 20), expected
    )


def test_temperature_last_with_a_zero_in_it_and_ties():
    logits = torch.zeros(2, 40)
    T = torch.tensor([[0.0], [1.0]])
    dist = mk_proba_dist(logits, temperature=T, temperature_last=True, top_p=0.01)
    torch.testing.assert_close(dist.weights.sum(-1), torch.ones(2))
    assert dist.weights.max(-1).values.tolist() == [1, 1]


@pytest.mark.parametrize("tiny", [1e-5, 1e-10, 1e-30, 1e-38])
@pytest.mark.parametrize("top_k", [None, 3])
def test_tiny_temperatures_are_the_argmax_without_nan(tiny, top_k):
    logits = logits_of(5, 10, scale=30)
    expected = nn.functional.one_hot(logits.argmax(-1), 10).float()
    for T in (tiny, torch.tensor(tiny), torch.full((5, 1), tiny)):
        assert torch.equal(dense(mk_proba_dist(logits, temperature=T, top_k=top_k), 10), expected)


@pytest.mark.parametrize("T", [0.0, 0.7, torch.tensor([[0.0], [0.7]]), torch.zeros(2, 1)], ids=str)
@pytest.mark.parametrize("knobs", [{}, dict(top_k=2), dict(top_p=0.9), dict(keep=2)], ids=str)
def test_where_no_token_is_left_weights_are_nan_at_any_temperature(T, knobs):
    """At 0 it was token 0, of weight 1."""
    logits = torch.tensor([[-torch.inf, -torch.inf, 2.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
    soft = mk_proba_dist(logits, temperature=T, banned=(2, 3), **knobs)
    assert soft.weights.isnan().all(1).tolist() == [True, False]
    if not isinstance(T, float):
        assert entropy(torch.full((2, 4), -torch.inf), T).isnan().all()


def test_temperature_tensor_with_zeros_for_some_rows():
    logits = logits_of(4, 10)
    T = torch.tensor([0.0, 0.7, 0.0, 2.0])
    for top_k in (None, 10, 6):
        dist = mk_proba_dist(logits, temperature=T[:, None], top_k=top_k)
        for row in range(4):
            alone = mk_proba_dist(logits[row], temperature=T[row].item(), top_k=top_k)
            torch.testing.assert_close(
                dense(Soft(dist.ids[row], dist.weights[row]), 10), dense(alone, 10)
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_float32_weights(dtype):
    """Defect 9: the softmax is taken in float32, not in the logits' dtype."""
    logits = logits_of(3, 500).to(dtype)
    for knobs in ({}, {"top_k": 50}, {"temperature": 0.7, "top_p": 0.9}):
        low, high = mk_proba_dist(logits, **knobs), mk_proba_dist(logits.float(), **knobs)
        assert low.weights.dtype == torch.float32
        assert torch.equal(low.weights, high.weights) and torch.equal(low.ids, high.ids)
    assert entropy(logits).dtype == torch.float32
    assert torch.equal(entropy(logits), entropy(logits.float()))


@pytest.mark.parametrize(
    "knobs, told",
    [
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": INF}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": -3}, "top_k=-3"),
        ({"top_k": 9}, "top_k=9"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 9}, "keep=9"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"banned": (8,)}, r"banned=\(8,\)"),
        ({"banned": (-1,)}, r"banned=\(-1,\)"),
        ({"banned": range(8)}, "leave at least one token"),
    ],
)
def test_knobs_out_of_range_are_errors_that_name_the_value(knobs, told):
    with pytest.raises(ValueError, match=told):
        mk_proba_dist(torch.zeros(2, 8), **knobs)
    with pytest.raises(ValueError, match=told):
        check_dist(8, **knobs)


def test_without_a_vocabulary_only_what_can_be_told_is_checked():
    check_dist(None, top_k=10**9, banned=(10**9,))
    with pytest.raises(ValueError, match="top_k=0"):
        check_dist(None, top_k=0)


# -- gradients


def embedded(logits, T, W, **knobs):
    """The dense reference in the dtype of its inputs: softmax over what is kept, times the
    table."""
    with torch.no_grad():
        kept = dense(mk_proba_dist(logits, temperature=T, **knobs), logits.shape[-1]) > 0
    return (logits / T).masked_fill(~kept, -INF).softmax(-1) @ W


@pytest.mark.parametrize(
    "knobs",
    [{}, {"top_k": 4}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 7, "keep": 3}],
)
def test_gradients_reach_logits_temperature_and_table(knobs):
    V, D = 12, 6
    table = nn.Embedding(V, D)
    nn.init.normal_(table.weight, generator=seeded(1))
    logits, T = logits_of(3, V).requires_grad_(), torch.tensor(0.7, requires_grad=True)
    probe = torch.randn(3, D, generator=seeded(2))
    (soft_embed(mk_proba_dist(logits, temperature=T, **knobs), table) * probe).sum().backward()

    ref = [x.detach().double().requires_grad_() for x in (logits, T, table.weight)]
    (embedded(*ref, **knobs) * probe).sum().backward()
    for ours, theirs in zip((logits, T, table.weight), ref, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
        assert ours.grad.abs().max() > 1e-3


def test_temperature_gradient_is_the_finite_difference():
    logits = logits_of(5, 9)
    score = torch.randn(9, generator=seeded(3))
    f = lambda T: (dense(mk_proba_dist(logits, temperature=T, top_k=6), 9) @ score).sum()  # noqa: E731
    T = torch.tensor(0.9, requires_grad=True)
    f(T).backward()
    assert T.grad.item() == pytest.approx((f(0.902) - f(0.898)).item() / 0.004, rel=1e-2)


def test_dropped_tokens_get_no_gradient_and_kept_ones_do():
    """Defects 11 and 35: the filters select; only what stays, and the temperature, learns."""
    logits = logits_of(2, 10).requires_grad_()
    dist = mk_proba_dist(logits, top_k=4, min_p=0.01)
    (dense(dist, 10) ** 2).sum().backward()
    kept = dense(dist.__class__(dist.ids, dist.weights.detach()), 10) > 0
    assert (logits.grad[~kept] == 0).all() and (logits.grad[kept] != 0).all()


@pytest.mark.parametrize(
    "knobs", [{"banned": (3,)}, {"banned": (3,), "top_k": 5}, {"top_p": 0.95, "banned": (0, 1)}]
)
@pytest.mark.parametrize("T", [0.7, [[0.7], [0.0]]])
def test_a_learnable_temperature_stays_finite_beside_banned_tokens_and_zeros(knobs, T):
    logits, T = logits_of(2, 8).requires_grad_(), torch.tensor(T, requires_grad=True)
    (dense(mk_proba_dist(logits, temperature=T, **knobs), 8) ** 2).sum().backward()
    assert T.grad.isfinite().all() and T.grad.flatten()[0] != 0
    assert logits.grad.isfinite().all()


def test_a_tiny_temperature_gives_no_nan_gradient():
    logits = logits_of(2, 8).requires_grad_()
    (dense(mk_proba_dist(logits, temperature=1e-30), 8) ** 2).sum().backward()
    assert logits.grad.isfinite().all()


# -- soft_embed


def table_of(V=20, D=8, seed=0, dtype=torch.float32):
    table = nn.Embedding(V, D)
    nn.init.normal_(table.weight, generator=seeded(seed))
    return table.to(dtype)


def gemma():
    return model_of("gemma3").get_input_embeddings()


def lora_embedding():
    return with_lora(
        model_of("llama"), target_modules=["embed_tokens", "q_proj"]
    ).get_input_embeddings()


def retrained_tokens():
    return with_lora(model_of("llama"), trainable_token_indices=[5, 6, 7]).get_input_embeddings()


def lora_on_gemma():
    return with_lora(model_of("gemma"), target_modules=["embed_tokens"]).get_input_embeddings()


class Scaled(nn.Module):
    """An embedding of somebody's own: a table, then a scale and a shift."""

    def __init__(self):
        super().__init__()
        self.table = table_of(VOCAB, 16)

    def forward(self, ids):
        return self.table(ids) * 3 + 1


EMBEDDINGS = {
    "plain": lambda: table_of(VOCAB, 16),
    "gemma": gemma,
    "lora": lora_embedding,
    "tokens": retrained_tokens,
    "gemma-lora": lora_on_gemma,
    "own": Scaled,
}


@pytest.fixture(params=EMBEDDINGS)
def embedding(request):
    """Each kind of module that may stand where the input embedding does; all change what the bare
    table holds."""
    return EMBEDDINGS[request.param]()


def random_soft(kind, V, seed=0):
    g = seeded(seed)
    weights = lambda *shape: torch.rand(*shape, generator=g).softmax(-1)  # noqa: E731
    if kind == "few":
        return Soft(
            torch.stack([torch.randperm(V, generator=g)[:5] for _ in range(3)]), weights(3, 5)
        )
    if kind == "duplicates":
        return Soft(torch.tensor([[4, 4, 9], [7, 7, 7]]), weights(2, 3))
    if kind == "all":
        return Soft(torch.arange(V).expand(3, V), weights(3, V))
    if kind == "all permuted":
        return Soft(torch.stack([torch.randperm(V, generator=g) for _ in range(3)]), weights(3, V))
    # a guided mixture over the whole vocabulary: the target comes on top
    if kind == "more than all":
        return Soft(
            torch.cat([torch.arange(V).expand(3, V), torch.tensor([[5], [6], [5]])], 1),
            weights(3, V + 1),
        )
    if kind == "one dimension":
        return Soft(torch.tensor([3, 1, 2]), weights(3))
    assert kind == "deep"
    return Soft(torch.randint(V, (2, 3, 4, 6), generator=g), weights(2, 3, 4, 6))


KINDS = ("few", "duplicates", "all", "all permuted", "more than all", "one dimension", "deep")


@pytest.mark.parametrize("kind", KINDS)
def test_soft_embed_is_the_weighted_sum_of_what_the_module_gives(embedding, kind):
    """Defects 2, 13, 22: the ids count, and the module is asked, whatever it does to its table."""
    soft = random_soft(kind, VOCAB)
    whole = embedding(torch.arange(VOCAB)).detach().double()
    expected = dense(Soft(soft.ids, soft.weights), VOCAB).double() @ whole
    got = soft_embed(soft, embedding).detach()
    assert got.dtype == torch.float32 and got.shape == (*soft.ids.shape[:-1], whole.shape[1])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_modules_of_this_test_do_change_the_table():
    for name, make in EMBEDDINGS.items():
        module = make()
        table = next(m for m in module.modules() if isinstance(m, nn.Embedding))
        same = torch.allclose(module(torch.arange(VOCAB)), table.weight)
        assert same == (name == "plain"), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_one_token_of_weight_1_is_its_embedding_bit_for_bit(make, dtype):
    module = make().to(dtype)
    ids = torch.arange(VOCAB).reshape(4, 16)
    expected = module(ids)
    assert expected.dtype == dtype
    assert torch.equal(soft_embed(hard(ids), module), expected)
    # Also as a row of a wider mixture, as in a batch where others think.
    wide = Soft(ids[..., None].expand(4, 16, 3), torch.tensor([1.0, 0, 0]).expand(4, 16, 3))
    assert torch.equal(soft_embed(wide, module), expected)


@pytest.mark.parametrize("K", [3, 20])
def test_low_precision_tables_are_mixed_in_float32(K):
    """Defect 23: only the result is rounded, once."""
    table = table_of(dtype=torch.bfloat16)
    soft = Soft(torch.arange(K).expand(4, K), logits_of(4, K).softmax(-1))
    got = soft_embed(soft, table)
    assert got.dtype == torch.bfloat16
    exact = soft.weights.double() @ table.weight[:K].double()
    assert torch.equal(got, exact.float().to(torch.bfloat16))


@pytest.mark.parametrize("rescale", [None, "l2", "norm"])
@pytest.mark.parametrize("kind", ["few", "all"])
@pytest.mark.parametrize("wide", ["weights", "table", "both"])
def test_float64_is_mixed_in_float64_and_returned_in_the_tables_dtype(wide, kind, rescale):
    ids, weights = random_soft(kind, VOCAB)
    exact, table = Soft(ids, weights.double()), table_of(VOCAB, dtype=torch.float64)
    expected = soft_embed(exact, table, rescale=rescale)
    whole = dense(exact, VOCAB) @ table.weight
    if rescale is None:
        torch.testing.assert_close(expected, whole, rtol=1e-14, atol=1e-14)
    soft = exact if wide != "table" else Soft(exact.ids, exact.weights.float())
    got = soft_embed(soft, table if wide != "weights" else table.float(), rescale=rescale)
    assert got.dtype == (torch.float32 if wide == "weights" else torch.float64)
    tolerance = 1e-14 if wide == "both" else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["top_p", "min_p"])
def test_a_filter_that_wants_a_gradient_is_refused(name):
    """It only selects: the weights would come without a graph, and nothing would be learnt."""
    logits, p = torch.randn(2, VOCAB), torch.tensor(0.5)
    same = mk_proba_dist(logits, **{name: p}), mk_proba_dist(logits, **{name: 0.5})
    assert torch.equal(same[0].weights, same[1].weights)
    with pytest.raises(ValueError, match=rf"{name}=0\.5 wants a gradient.*pass a number"):
        mk_proba_dist(logits, **{name: p.requires_grad_()})


@pytest.mark.parametrize("padding", [None, 0, 3])
def test_the_whole_vocabulary_learns_as_lookups_do(padding):
    """Every row of the table gets its weights' gradient, but for the padding index of a module."""
    weights = torch.rand(5, VOCAB, generator=seeded(0)).softmax(-1)
    ids = torch.arange(VOCAB).expand(5, -1)
    table = nn.Embedding(VOCAB, 4, padding_idx=padding)
    soft_embed(Soft(ids, weights), table).sum().backward()
    expected = weights.sum(0)[:, None].expand(-1, 4).clone()
    if padding is not None:
        expected[padding] = 0
    assert torch.allclose(table.weight.grad, expected, atol=1e-6)


def test_gradients_through_a_wrapped_embedding_equal_the_dense_formula():
    module = lora_embedding()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert trained
    for kind in ("few", "all"):
        soft = random_soft(kind, VOCAB)
        w = soft.weights.clone().requires_grad_()
        grads = torch.autograd.grad(
            soft_embed(Soft(soft.ids, w), module).pow(2).sum(), [w, *trained]
        )
        rows = dense(Soft(soft.ids, w), VOCAB) @ module(torch.arange(VOCAB))
        for ours, theirs in zip(
            grads, torch.autograd.grad(rows.pow(2).sum(), [w, *trained]), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert ours.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescale", ["l2", "norm"])
def test_rescale(rescale, kind):
    """Defect 30. l2 divides by the norm of the distribution; norm gives the weighted mean length.
    Off by default."""
    table, soft = table_of(VOCAB, 16), random_soft(kind, VOCAB)
    p = dense(soft, VOCAB)
    plain = p @ table.weight
    if rescale == "l2":
        expected = plain / p.norm(dim=-1, keepdim=True)
    else:
        length = p @ table.weight.norm(dim=-1)
        expected = plain * (length / plain.norm(dim=-1))[..., None]
    torch.testing.assert_close(
        soft_embed(soft, table, rescale=rescale), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(soft_embed(soft, table), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_gives_the_mean_length_whatever_the_weights_sum_to(kind):
    """Those of `hybrid` sum to more than 1: what was read was up to twice as long."""
    table, soft = table_of(VOCAB, 16), random_soft(kind, VOCAB)
    once = soft_embed(soft, table, rescale="norm")
    for share in (0.3, 1.9):
        scaled = Soft(soft.ids, soft.weights * share)
        torch.testing.assert_close(soft_embed(scaled, table, rescale="norm"), once)


@pytest.mark.parametrize("rescale", [None, "l2", "norm"])
def test_rescaling_leaves_a_single_token_alone(rescale):
    table = table_of()
    ids = torch.arange(20)
    torch.testing.assert_close(
        soft_embed(hard(ids), table, rescale=rescale), table(ids), rtol=1e-6, atol=1e-6
    )


def test_unknown_rescale_is_an_error():
    with pytest.raises(ValueError, match="rescale='L2'"):
        soft_embed(hard(torch.tensor([1])), table_of(), rescale="L2")


def test_hard_is_one_id_of_weight_1():
    soft = hard(torch.tensor([[3, 1]]))
    assert soft.ids.tolist() == [[[3], [1]]] and soft.weights.tolist() == [[[1.0], [1.0]]]
    assert soft.weights.dtype == torch.float32


# -- entropy


@pytest.mark.parametrize("T", [1.0, 0.3, 5.0, 1e-30])
def test_entropy_is_that_of_the_unfiltered_distribution(T):
    logits = logits_of(2, 3, 50, scale=3)
    p = (logits.double() / T).softmax(-1)
    expected = -(p * p.clamp_min(1e-300).log()).sum(-1)
    for given_T in (T, torch.tensor(T), torch.full((2, 1, 1), T)):
        got = entropy(logits, given_T)
        assert got.shape == (2, 3) and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_entropy_at_its_ends():
    assert entropy(torch.zeros(1000)).item() == pytest.approx(math.log(1000), rel=1e-6)
    assert entropy(torch.tensor([0.0, -INF, -INF])).item() == 0
    assert entropy(torch.tensor([1e4, 0.0, -1e4])).item() == 0
    # Logits far from zero must not cost precision or sign.
    far = (logits_of(4, 9) + 300).double()
    torch.testing.assert_close(
        entropy(far.float()),
        torch.distributions.Categorical(logits=far).entropy().float(),
        rtol=1e-5,
        atol=1e-5,
    )
    assert (entropy(torch.tensor([[300.0, 280.0], [-900.0, -925.0]])) >= 0).all()
    assert entropy(torch.tensor([0.3, 0.2, -INF])).item() == pytest.approx(
        entropy(torch.tensor([0.3, 0.2])).item()
    )


@pytest.mark.parametrize("T", [1.0, 0.5, "tensor"])
@pytest.mark.parametrize("never", [-INF, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("weight", [1.0, 50.0])
def test_entropy_gradient_is_finite_and_right_beside_minus_infinity(T, never, weight):
    T = torch.tensor(0.5, requires_grad=True) if T == "tensor" else T
    logits = torch.tensor([[1.0, never, 0.2, -3.0], [0.0, 0.0, never, never]], requires_grad=True)
    (weight * entropy(logits, T).sum()).backward()
    logits.grad /= weight
    if torch.is_tensor(T):
        T.grad /= weight
    finite = logits.detach() > never
    assert logits.grad.isfinite().all() and (logits.grad[~finite] == 0).all()
    x = logits.detach()[0, [0, 2, 3]].double().requires_grad_()
    t = 0.5 if torch.is_tensor(T) else T
    torch.distributions.Categorical(logits=x / t).entropy().backward()
    torch.testing.assert_close(logits.grad[0, [0, 2, 3]].double(), x.grad, rtol=1e-4, atol=1e-5)
    if torch.is_tensor(T):
        numeric = (entropy(logits.detach(), 0.501) - entropy(logits.detach(), 0.499)).sum() / 0.002
        assert T.grad.item() == pytest.approx(numeric.item(), rel=1e-2)


@pytest.mark.parametrize("T", [1.0, 0.6])
@pytest.mark.parametrize(
    "bad", [[math.nan, 0.0, 0.0], [INF, 0.0, 0.0], [-INF, -INF, -INF], [INF, INF, -INF]]
)
def test_rows_without_a_distribution_have_nan_entropy_and_others_none(bad, T):
    h = entropy(torch.tensor([[0.0, 1.0, 2.0], bad]), T)
    assert h.isnan().tolist() == [False, True]


# -- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_step_writes_nothing_larger_than_its_logits(dtype):
    B, V, D, K = 4, 50_000, 512, 10
    table = nn.Embedding(V, D, dtype=dtype)
    logits = logits_of(B, V).to(dtype)
    with torch.no_grad(), Largest() as largest:
        out = soft_embed(
            mk_proba_dist(logits, temperature=0.7, top_k=K, top_p=0.9, min_p=0.01), table
        )
        entropy(logits, 0.7)
    assert out.shape == (B, D)
    assert B * V <= largest.numel < 2 * B * V  # O(B V + B K D); a [V, D] would be 25.6 million
    with torch.no_grad(), Largest() as largest:
        soft_embed(mk_proba_dist(logits, top_k=K), table)
    assert largest.numel < V * D / 100
    with torch.no_grad(), Largest() as control:
        logits.float().softmax(-1) @ table.weight.float() + table.weight.sum()
        table.weight + 1
    assert control.numel >= V * D  # the measurement would notice
