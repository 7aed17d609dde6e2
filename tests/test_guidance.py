"""Guidance: the blends against their formulas, and soft teacher forcing against a loop of full,
uncached forwards."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import BOS, PAD, VOCAB, counted, model_of, seeded, with_lora
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from softar.mixers import GUIDES, guide
from softar.models.reading import reads_moved_rows
from softar.sft.forward import soft_forward
from softar.sft.guidance import SCHEDULES, mk_alpha
from softar.soft import Soft, dense, mk_proba_dist, soft_embed

light = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SIX_SIGMA = 6.0  # of a normal deviate: 2e-9


# -- guide


def blended(p, target, alpha, how):
    """The formulas on dense distributions [..., V]."""
    one = torch.nn.functional.one_hot(target, p.shape[-1]).to(p)
    had = p.gather(-1, target[..., None])
    if how == "mix":
        return alpha * one + (1 - alpha) * p
    low = one * alpha + (1 - one) * p * (1 - alpha) / (1 - had)
    return torch.where(had >= alpha, p, low)


@light
@given(
    seed=st.integers(0, 10_000),
    shape=st.lists(st.integers(1, 3), max_size=2),
    top_k=st.none() | st.integers(1, 12),
    alpha=st.floats(0, 1),
    how=st.sampled_from(["mix", "clamp"]),
)
def test_guide_is_its_formula_for_targets_inside_and_outside(seed, shape, top_k, alpha, how):
    soft = mk_proba_dist(torch.randn(*shape, 12, generator=seeded(seed)) * 2, top_k=top_k)
    target = torch.randint(12, shape, generator=seeded(seed + 1))
    guided = guide(soft, target, alpha, how)
    p = dense(soft, 12)
    q = dense(guided, 12)
    expected = p if alpha == 0 else blended(p.double(), target, alpha, how).float()
    torch.testing.assert_close(q, torch.nan_to_num(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(guided.weights.sum(-1), torch.ones(shape))
    assert (guided.weights >= 0).all()
    assert guided.weights.dtype == torch.float32 and guided.ids.dtype == torch.int64
    if how == "clamp":
        assert (q.gather(-1, target[..., None]) >= alpha - 1e-6).all()
    if 0 < alpha < 1:
        assert torch.equal(guided.ids[..., -1], target)
        assert (guided.weights[..., :-1][guided.ids[..., :-1] == target[..., None]] == 0).all()


def test_clamp_changes_nothing_where_the_target_has_enough_and_keeps_the_ratios_elsewhere():
    soft = Soft(torch.tensor([[1, 2, 3]] * 2), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]))
    q = dense(guide(soft, torch.tensor([1, 1]), 0.5, "clamp"), 5)
    torch.testing.assert_close(
        q, torch.tensor([[0, 0.7, 0.2, 0.1, 0], [0, 0.5, 0.5 * 6 / 9, 0.5 * 3 / 9, 0]])
    )


@pytest.mark.parametrize("how", ["mix", "clamp"])
def test_repeated_targets_in_the_mixture_add_up(how):
    soft = Soft(torch.tensor([4, 9, 4]), torch.tensor([0.2, 0.5, 0.3]))
    q = dense(guide(soft, torch.tensor(4), 0.6, how), 10)
    expected = 0.6 + 0.4 * 0.5 if how == "mix" else 0.6
    torch.testing.assert_close(q[[4, 9]], torch.tensor([expected, 1 - expected]))


@pytest.mark.parametrize("how", GUIDES)
def test_alpha_0_is_the_mixture_itself_and_alpha_1_the_target_alone(how):
    soft = mk_proba_dist(torch.randn(3, 8, generator=seeded()), top_k=4)
    assert guide(soft, torch.tensor([1, 2, 3]), 0.0, how) is soft
    broken = Soft(soft.ids, torch.full_like(soft.weights, math.nan).requires_grad_())
    gold = guide(broken, torch.tensor([1, 2, 3]), 1.0, how)
    assert gold.ids.tolist() == [[1], [2], [3]] and gold.weights.tolist() == [[1.0]] * 3
    assert gold.weights.dtype == torch.float32 and not gold.weights.requires_grad


def test_coin_is_the_target_as_often_as_alpha_says_and_else_the_mixture():
    n = 40_000
    soft = mk_proba_dist(torch.randn(8, generator=seeded(2)), top_k=4)
    p = dense(soft, 8)
    wide = Soft(soft.ids.expand(n, -1), soft.weights.expand(n, -1))
    outside = int((p == 0).nonzero()[0])
    for target in (outside, int(soft.ids[1])):
        for alpha in (0.1, 0.75):
            q = dense(guide(wide, torch.full((n,), target), alpha, "coin", rng=seeded(3)), 8)
            gold = q[:, target] == 1
            assert abs(gold.double().mean() - alpha) < SIX_SIGMA * math.sqrt(
                alpha * (1 - alpha) / n
            )
            torch.testing.assert_close(q[~gold], p.expand(int((~gold).sum()), -1))
            assert (q[gold].sum(-1) == 1).all()


def test_coin_tosses_by_row_and_repeatably():
    soft = Soft(torch.tensor([[1, 2]] * 6), torch.full((6, 2), 0.5))
    toss = lambda rng: guide(soft, torch.full((6,), 3), 0.5, "coin", rng=rng).weights  # noqa: E731
    assert torch.equal(toss(seeded(4)), toss(seeded(4)))
    rows = toss([seeded(s) for s in range(6)])
    assert len(set(map(tuple, rows.tolist()))) == 2
    row = guide(
        Soft(soft.ids[:1], soft.weights[:1]), torch.tensor([3]), 0.5, "coin", rng=[seeded(5)]
    )
    assert torch.equal(row.weights[0], rows[5])


@pytest.mark.parametrize("how", ["mix", "clamp"])
@pytest.mark.parametrize("alpha", [0.3, 0.9])
def test_guide_gradient_is_that_of_the_formula(how, alpha):
    logits = torch.randn(6, 7, generator=seeded(5)).double().requires_grad_()
    target = torch.randint(7, (6,), generator=seeded(6))
    score = torch.randn(6, 7, generator=seeded(7))
    guided = dense(guide(mk_proba_dist(logits), target, alpha, how), 7)
    ours = torch.autograd.grad((guided * score).sum(), logits)[0]
    theirs = torch.autograd.grad(
        (blended(logits.softmax(-1), target, alpha, how) * score).sum(), logits
    )[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("how", GUIDES)
def test_guide_gradient_is_finite_when_the_model_is_sure(how):
    logits = torch.tensor([[80.0, 0, 0], [0, 80.0, 0]], requires_grad=True)
    weights = guide(mk_proba_dist(logits), torch.tensor([0, 0]), 0.4, how, rng=seeded()).weights
    (weights**2).sum().backward()
    assert weights.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_alpha_out_of_range_is_named(alpha):
    soft = Soft(torch.tensor([1]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        guide(soft, torch.tensor(1), alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_unknown_guidance_is_named(alpha):
    with pytest.raises(ValueError, match=r"'klamp'.*clamp.*coin.*mix"):
        guide(Soft(torch.tensor([1]), torch.tensor([1.0])), torch.tensor(1), alpha, "klamp")


# -- schedules


@light
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
    hold=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_schedules_go_one_way_from_start_to_end_and_stay_between(schedule, start, end, hold, share):
    alpha = mk_alpha(schedule, start=start, end=end, hold=hold, span=share * (1 - hold))
    values = [alpha(i / 50) for i in range(51)]
    low, high = min(start, end), max(start, end)
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in values)
    steps = [b - a for a, b in pairwise(values)]
    assert all(s <= 1e-12 for s in steps) or all(s >= -1e-12 for s in steps)
    assert all(alpha(x) == start for x in (0.0, hold / 2, math.nextafter(hold, 0)) if x < hold)
    if schedule == "constant":
        assert set(values) == {start}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step"])
def test_schedules_hold_fall_and_end(schedule):
    alpha = mk_alpha(schedule, start=0.9, end=0.2, hold=0.25, span=0.5)
    assert [alpha(x) for x in (0.0, 0.2, 0.25)] == [0.9] * 3
    assert [alpha(x) for x in (0.75, 0.8, 1.0)] == pytest.approx([0.2] * 3)
    middle = {"linear": (0.725, 0.55, 0.375), "cosine": None, "step": (0.9, 0.9, 0.9)}[schedule]
    if middle is None:
        middle = tuple(0.9 - 0.7 * (1 - math.cos(math.pi * x)) / 2 for x in (0.25, 0.5, 0.75))
    assert [alpha(x) for x in (0.375, 0.5, 0.625)] == pytest.approx(middle)


def test_defaults_anneal_down_from_teacher_forcing():
    alpha = mk_alpha()
    assert (
        alpha(0.0) == 1.0 and alpha(0.3) == pytest.approx(0.5) and alpha(0.6) == alpha(1.0) == 0.0
    )


def test_a_schedule_without_span_drops_at_once():
    alpha = mk_alpha("linear", hold=0.4, span=0.0)
    assert alpha(0.39) == 1.0 and alpha(0.4) == 0.0


@pytest.mark.parametrize(
    "knobs, told",
    [
        ({"schedule": "cosin"}, "alpha_schedule='cosin'.*constant.*cosine.*linear.*step"),
        ({"start": 1.2}, r"alpha_start=1\.2"),
        ({"end": -0.1}, r"alpha_end=-0\.1"),
        ({"hold": -1}, "alpha_hold=-1"),
        ({"span": 2}, "alpha_span=2"),
        ({"start": math.nan}, "alpha_start=nan"),
        ({"hold": 0.7, "span": 0.4}, r"alpha_hold=0\.7 \+ alpha_span=0\.4"),
    ],
)
def test_bad_schedules_are_named(knobs, told):
    with pytest.raises(ValueError, match=told):
        mk_alpha(**knobs)


# -- soft_forward

LENGTHS, SPANS = (12, 9, 10, 6), ((3, 9), (2, 5), (4, 8), (0, 0))  # the last row thinks nothing


def batch(padding):
    """ids, mask, soft_mask [4, 12]: ragged rows, ragged spans (row 2 with a gap), padded on one
    side."""
    g = seeded(11)
    ids = torch.full((4, 12), PAD)
    mask = torch.zeros(4, 12, dtype=torch.long)
    marked = torch.zeros(4, 12, dtype=torch.bool)
    for row, (n, (begin, end)) in enumerate(zip(LENGTHS, SPANS, strict=True)):
        first = 12 - n if padding == "left" else 0
        ids[row, first : first + n] = torch.randint(5, VOCAB, (n,), generator=g)
        ids[row, first] = BOS
        mask[row, first : first + n] = 1
        marked[row, first + begin : first + end] = True
        if row == 2:
            marked[row, first + begin + 1] = False
    return ids, mask, marked


def feeder(alpha=0.0, how="mix", **knobs):
    def feed(logits, gold):
        return guide(mk_proba_dist(logits, **{"temperature": 0.8, **knobs}), gold, alpha, how)

    return feed


def uncached(model, ids, mask, marked, feed):
    """The definition: every marked column, left to right, reads the logits of a full forward of
    what is before it."""
    table = model.get_input_embeddings()
    inputs, positions = table(ids), (mask.cumsum(1) - 1).clamp_min(0)

    def run(x):
        t = x.shape[1]
        out = model(
            inputs_embeds=x,
            attention_mask=mask[:, :t],
            position_ids=positions[:, :t],
            use_cache=False,
        )
        return out.logits

    for t in marked.any(0).nonzero()[:, 0].tolist():
        mixed = soft_embed(feed(run(inputs[:, :t])[:, -1], ids[:, t]), table)
        column = torch.where(marked[:, t, None], mixed, inputs[:, t])
        inputs = torch.cat([inputs[:, :t], column[:, None], inputs[:, t + 1 :]], 1)
    return run(inputs)


def grads_of(model, logits, mask):
    """Gradients of a fixed function of the real positions' logits, by parameter name."""
    model.zero_grad()
    probe = torch.randn(logits.shape, generator=seeded(12)) * mask[..., None]
    (logits.float() * probe).sum().div(mask.sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tol=2e-4):
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        scale = theirs[name].abs().max().clamp_min(1e-3)
        assert ((ours[name] - theirs[name]).abs().max() / scale) < tol, name


def mild(arch="llama", **changes):
    return model_of(arch, initializer_range=0.1, **changes)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_both_modes_equal_the_definition_in_logits_and_gradients(arch, padding):
    model = mild(arch)
    ids, mask, marked = batch(padding)
    feed = feeder(0.3, top_k=None if padding == "left" else 8)
    expected = uncached(model, ids, mask, marked, feed)
    reference = grads_of(model, expected, mask)
    real = mask.bool()
    for mode in ("sequential", "parallel"):
        logits = soft_forward(model, ids, mask, marked, feed, mode=mode)
        assert logits.shape == (4, 12, VOCAB)
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=1e-5)
        assert_same_gradients(grads_of(model, logits, mask), reference)
    # Guard: thinking does change the logits.
    plain = model(input_ids=ids, attention_mask=mask).logits
    assert (plain - expected)[real].abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_positions_follow_the_mask_where_they_are_absolute(mode):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wpe.weight.data.normal_(0, 0.5)
    ids, mask, marked = batch("left")
    expected = uncached(model, ids, mask, marked, feeder())
    logits = soft_forward(model, ids, mask, marked, feeder(), mode=mode)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_without_a_mask_there_is_no_padding(mode):
    model, (ids, _, marked) = mild(), batch("right")
    ids, marked = ids[:1], marked[:1]
    a = soft_forward(model, ids, None, marked, feeder(), mode=mode)
    b = soft_forward(model, ids, torch.ones_like(ids), marked, feeder(), mode=mode)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_without_a_mask_is_no_text(padding):
    model, (ids, _, marked) = mild(), batch(padding)
    with counted(model) as calls:
        with pytest.raises(
            ValueError, match=r"rows \[1, 2, 3\] of .* with the pad token 0, and wi"
        ):
            soft_forward(model, ids, None, marked, feeder())
    assert not calls


def test_ids_and_masks_that_do_not_fit_are_named():
    model, (ids, mask, marked) = mild(), batch("right")
    for inputs, said in (
        ((ids - 9 * marked, mask, marked), "input_ids holds the id -"),
        ((ids + 999, None, marked), "input_ids holds the id .*, and the model's vocabulary has"),
        ((ids.float(), mask, marked), r"input_ids of shape .*, torch.float32: need \[B, P\]"),
        ((ids, mask[:1], marked), "attention_mask of shape .* does not fit input_ids of"),
        ((ids, mask, marked[:, :-1]), "soft_mask of shape .* does not fit input_ids of"),
    ):
        with counted(model) as calls, pytest.raises(ValueError, match=said):
            soft_forward(model, *inputs, feeder())
        assert not calls


@pytest.mark.parametrize("padding", ["left", "right"])
def test_after_r_refreshes_the_first_r_marked_positions_are_exact(padding):
    model = mild()
    ids, mask, marked = batch(padding)
    order = marked.cumsum(1)  # 1 at the first marked position
    with torch.no_grad():
        exact = uncached(model, ids, mask, marked, feeder())
        for r in range(7):
            logits = soft_forward(model, ids, mask, marked, feeder(), passes=r)
            error = (logits - exact).abs().amax(-1)
            first = mask.bool() & (order <= r)
            assert error[first].max() < 1e-5
            # the first position that is not exact yet differs, so that the claim is sharp
            if r < 5:
                assert error[marked & (order == r + 1)].max() > 1e-4


def test_the_number_of_forwards():
    model, (ids, mask, marked) = mild(), batch("right")
    # marks from column 2 to 8: what is before them is read once, what is behind them at the end
    for passes, refreshes in ((1, 1), (3, 3), (None, 6)):  # the longest span has 6 positions
        with counted(model) as calls, torch.no_grad():
            soft_forward(model, ids, mask, marked, feeder(), passes=passes)
        assert calls == [(4, 1), *[(4, 7)] * refreshes, (4, 11)]
    with counted(model) as calls, torch.no_grad():
        soft_forward(model, ids, mask, marked, feeder(), passes=0)
    assert calls == [(4, 12)]
    with counted(model) as calls, torch.no_grad():  # rows moved by 1, 2, 0 and 0 columns
        soft_forward(model, ids, mask, marked, feeder(), mode="sequential")
    assert sum(t for _, t in calls) == 13 and len(calls) == 6 + 1
    with counted(model) as calls, torch.no_grad():
        soft_forward(model, ids, mask, torch.zeros_like(marked), feeder(), passes=5)
    assert len(calls) == 1


@pytest.mark.parametrize("how", GUIDES)
def test_alpha_1_is_teacher_forcing_for_any_number_of_passes(how):
    model, (ids, mask, marked) = mild(), batch("right")
    plain = model(input_ids=ids, attention_mask=mask).logits
    reference = grads_of(model, plain, mask)
    for knobs in (
        {"passes": 0},
        {"passes": 1},
        {"passes": 3},
        {},
        {"mode": "sequential"},
        {"passes": 2, "grad_passes": 3},
    ):
        logits = soft_forward(model, ids, mask, marked, feeder(1.0, how), **knobs)
        torch.testing.assert_close(logits[mask.bool()], plain[mask.bool()], rtol=1e-5, atol=1e-5)
        assert_same_gradients(grads_of(model, logits, mask), reference)
    bare = model(input_ids=ids).logits
    # bit for bit where the same forward runs
    ones = torch.ones_like(ids)
    assert torch.equal(soft_forward(model, ids, ones, marked, feeder(1.0, how), passes=0), bare)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grad_passes", [1, 2, 3, 4, None])
def test_grad_passes_cuts_the_gradient_through_the_soft_inputs_alone(grad_passes, tied):
    """Soft inputs made by a forward without a graph are constants; the gold embeddings beside them
    are not."""
    model = mild(tie_word_embeddings=tied)
    ids, mask, marked = batch("right")
    passes, feed = 3, feeder(0.2)
    table = model.get_input_embeddings()
    rows, cols = marked.nonzero(as_tuple=True)
    run = lambda x: model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits  # noqa: E731
    inputs = table(ids)
    for r in range(passes):
        mixed = soft_embed(feed(run(inputs)[rows, cols - 1], ids[rows, cols]), table)
        if r < passes + 1 - (grad_passes or passes + 1):
            mixed = mixed.detach()
        inputs = table(ids).index_put((rows, cols), mixed)
    expected = run(inputs)
    reference = grads_of(model, expected, mask)
    logits = soft_forward(model, ids, mask, marked, feed, passes=passes, grad_passes=grad_passes)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()])
    ours = grads_of(model, logits, mask)
    assert_same_gradients(ours, reference)
    assert ours["model.embed_tokens.weight"][BOS].abs().max() > 0


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_last_logits_are_those_of_all(mode, padding):
    model, (ids, mask, marked) = mild(), batch(padding)
    most = 13 - int(marked.any(0).nonzero()[0])  # from the position before the first mixture
    whole = soft_forward(model, ids, mask, marked, feeder(), mode=mode)
    for last in (most, 12, 40):
        some = soft_forward(model, ids, mask, marked, feeder(), mode=mode, last=last)
        real = mask[:, -last:].bool()
        assert some.shape == whole[:, -last:].shape
        torch.testing.assert_close(some[real], whole[:, -last:][real], rtol=1e-5, atol=1e-5)
        ends = mask[:, -last:]
        reference = grads_of(model, whole[:, -last:], ends)
        assert_same_gradients(grads_of(model, some, ends), reference)
        whole = soft_forward(model, ids, mask, marked, feeder(), mode=mode)
    with pytest.raises(ValueError, match=f"last={most - 1} of 12"):
        soft_forward(model, ids, mask, marked, feeder(), mode=mode, last=most - 1)


def test_all_passes_with_gradient_differ_from_the_last_alone():
    model, (ids, mask, marked) = mild(), batch("right")
    a, b = (
        grads_of(
            model, soft_forward(model, ids, mask, marked, feeder(), passes=2, grad_passes=g), mask
        )
        for g in (None, 1)
    )
    assert max((a[n] - b[n]).abs().max() for n in a) > 1e-3


def test_no_gradient_is_recorded_under_no_grad():
    model, (ids, mask, marked) = mild(), batch("right")
    for mode in ("parallel", "sequential"):
        with torch.no_grad():
            assert not soft_forward(model, ids, mask, marked, feeder(), mode=mode).requires_grad


@pytest.mark.parametrize("window", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_window_leaves_the_forward_exact_and_from_the_span_on_the_gradient_too(window, arch):
    model, (ids, mask, marked) = mild(arch), batch("right")
    marked[:, :3] = marked[:, 9:] = False
    full = soft_forward(model, ids, mask, marked, feeder(), mode="sequential")
    cut = soft_forward(model, ids, mask, marked, feeder(), mode="sequential", window=window)
    torch.testing.assert_close(cut, full, rtol=0, atol=0)
    reference, ours = grads_of(model, full, mask), grads_of(model, cut, mask)
    if window >= 6:  # six marked columns
        assert_same_gradients(ours, reference)
    else:
        assert max((ours[n] - reference[n]).abs().max() for n in ours) > 1e-4


@pytest.mark.parametrize("last", [None, 7])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prompts_of_any_length_cost_as_many_steps_as_the_thought_has(padding, last, monkeypatch):
    """Moved rows have the logits and gradients of rows that are not, which take a step a column."""
    model, (T, steps) = mild(), (20, 3)
    ids = torch.randint(5, VOCAB, (6, T), generator=seeded(3))
    mask, marked = torch.zeros(2, 6, T, dtype=torch.long)
    prompts = torch.randint(T - 6, T - steps, (6,), generator=seeded(4)).tolist()
    for row, prompt in enumerate(prompts):
        begin = 0 if padding == "right" else T - prompt - steps - 1
        mask[row, begin : begin + prompt + steps + 1] = 1
        marked[row, begin + prompt : begin + prompt + steps] = 1
    how = dict(mode="sequential", last=last)
    with counted(model) as calls:
        ours = soft_forward(model, ids, mask, marked.bool(), feeder(0.2), **how)
    assert len(calls) == steps + 1
    real = mask if last is None else mask[:, -last:]
    gradients = grads_of(model, ours, real)
    monkeypatch.setattr("softar.sft.forward.reads_moved_rows", lambda model: False)
    with counted(model) as calls:
        theirs = soft_forward(model, ids, mask, marked.bool(), feeder(0.2), **how)
    assert len(calls) == int(marked.any(0).sum()) + 1
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours[real.bool()], theirs[real.bool()], rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients, grads_of(model, theirs, real))


@pytest.mark.parametrize("last", [None, 24])
@pytest.mark.parametrize("grad_passes", [None, 1])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_refreshes_compute_the_thought_alone(arch, grad_passes, last, monkeypatch):
    """Prompts of 6 to 29 tokens, two refreshes: logits and gradients are those of whole forwards."""
    model, (T, steps) = mild(arch), (33, 3)
    ids = torch.randint(5, VOCAB, (4, T), generator=seeded(3))
    mask, marked = torch.zeros(2, 4, T, dtype=torch.long)
    for row, prompt in enumerate((29, 10, 20, 26)):
        mask[row, : prompt + steps + 1] = marked[row, prompt : prompt + steps] = 1
    how = dict(passes=2, grad_passes=grad_passes, last=last)
    with counted(model) as calls:
        ours = soft_forward(model, ids, mask, marked.bool(), feeder(0.2), **how)
    assert calls == [(4, 28), (4, 3), (4, 3), (4, 5)]  # moved, so that thoughts begin together
    real = mask if last is None else mask[:, -last:]
    gradients = grads_of(model, ours, real)
    monkeypatch.setattr("softar.sft.forward._keeps_prefix", lambda model: False)
    with counted(model) as calls:
        theirs = soft_forward(model, ids, mask, marked.bool(), feeder(0.2), **how)
    assert calls == [(4, T)] * 3 and ours.shape == theirs.shape
    torch.testing.assert_close(ours[real.bool()], theirs[real.bool()], rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients, grads_of(model, theirs, real))


def test_rows_are_moved_where_a_batch_becomes_hardly_wider(monkeypatch):
    """An answer far longer than the others' would move the row's end out, and a table has an end."""
    model = mild()
    ids = torch.randint(5, VOCAB, (2, 40), generator=seeded(3))
    far, near = torch.zeros(2, 2, 40, dtype=torch.bool)
    far[0, 2:5] = far[1, 34:37] = True  # 32 columns wider
    near[0, 10:13] = near[1, 13:16] = True
    for marked, forwards in ((far, 7), (near, 4)):
        with counted(model) as calls, torch.no_grad():
            logits = soft_forward(model, ids, None, marked, feeder(), mode="sequential")
        assert len(calls) == forwards and logits.shape == (2, 40, VOCAB)
    for room, forwards in ((43, 4), (42, 7)):
        monkeypatch.setattr("softar.sft.forward.room_of", lambda model, trained, n=room: n)
        with counted(model) as calls, torch.no_grad():
            moved = soft_forward(model, ids, None, near, feeder(), mode="sequential")
        assert len(calls) == forwards
        torch.testing.assert_close(moved, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_through_moved_rows_are_finite(attention, dtype):
    model = mild().to(dtype)
    model.set_attn_implementation(attention)
    ids, mask, marked = batch("right")
    logits = soft_forward(model, ids, mask, marked, feeder(), mode="sequential")
    assert all(g.isfinite().all() for g in grads_of(model, logits, mask).values())


@pytest.mark.parametrize(
    "kind, sees", [("llama", True), ("rwkv", False), ("roformer", False), ("roberta", False)]
)
def test_rows_are_not_moved_behind_padding_that_a_model_would_read(kind, sees):
    model = mild()
    model.config.model_type = kind
    assert reads_moved_rows(model) is sees
    tuned = get_peft_model(mild(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert reads_moved_rows(get_peft_model(mild(), LoraConfig(task_type="CAUSAL_LM")))
    assert not reads_moved_rows(tuned)


def test_a_window_of_one_reaches_back_one_mixture_and_no_further():
    """From the second marked column on, each block (a mixture and the gold tokens up to the next)
    takes the weights of its mixture and all keys and values before it as constants."""
    model, (ids, mask, marked) = mild(), batch("right")
    marked[:, :3], marked[:3, 3] = False, True  # rows that begin together are not moved
    feed = feeder(0.2)
    columns = marked.any(0).nonzero()[:, 0].tolist()
    table, positions = model.get_input_embeddings(), (mask.cumsum(1) - 1).clamp_min(0)
    head = slice(None), slice(0, columns[1])
    blocks = [uncached(model, ids[head], mask[head], marked[head], feed)]
    with torch.no_grad():  # all soft inputs, as constants
        inputs, mixtures = table(ids), {}
        for t in columns:
            before = model(
                inputs_embeds=inputs[:, :t], attention_mask=mask[:, :t], use_cache=False
            ).logits[:, -1]
            mixtures[t] = feed(before, ids[:, t])
            inputs[:, t] = torch.where(
                marked[:, t, None], soft_embed(mixtures[t], table), inputs[:, t]
            )
    for begin, end in zip(columns[1:], [*columns[2:], 12], strict=True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(
                inputs_embeds=inputs[:, :begin],
                attention_mask=mask[:, :begin],
                past_key_values=cache,
            )
        block = table(ids[:, begin:end])
        first = torch.where(marked[:, begin, None], soft_embed(mixtures[begin], table), block[:, 0])
        block = torch.cat([first[:, None], block[:, 1:]], 1)
        out = model(
            inputs_embeds=block,
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
        )
        blocks.append(out.logits)
    reference = grads_of(model, torch.cat(blocks, 1), mask)
    logits = soft_forward(model, ids, mask, marked, feed, mode="sequential", window=1)
    assert_same_gradients(grads_of(model, logits, mask), reference)


def test_checkpointing_raises_in_sequential_and_changes_nothing_in_parallel():
    model, (ids, mask, marked) = mild(), batch("left")
    reference = grads_of(model, soft_forward(model, ids, mask, marked, feeder(), passes=2), mask)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient_checkpointing"), counted(model) as calls:
        soft_forward(model, ids, mask, marked, feeder(), mode="sequential")
    assert not calls
    assert_same_gradients(
        grads_of(model, soft_forward(model, ids, mask, marked, feeder(), passes=2), mask), reference
    )
    model.eval()  # without training mode nothing is checkpointed
    soft_forward(model, ids, mask, marked, feeder(), mode="sequential")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["embed_tokens", "q_proj"]])
def test_models_wrapped_by_peft(targets):
    model = with_lora(
        mild("gemma" if "embed_tokens" in targets else "llama"), target_modules=targets
    )
    ids, mask, marked = batch("left")
    expected = uncached(model, ids, mask, marked, feeder(0.1))
    reference = grads_of(model, expected, mask)
    assert all("lora" in n for n in reference)
    for mode in ("sequential", "parallel"):
        logits = soft_forward(model, ids, mask, marked, feeder(0.1), mode=mode)
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
        assert_same_gradients(grads_of(model, logits, mask), reference)
    with model.disable_adapter(), torch.no_grad():
        bare = soft_forward(model, ids, mask, marked, feeder(0.1))
    assert (bare - expected)[mask.bool()].abs().max() > 1e-3
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        soft_forward(model.train(), ids, mask, marked, feeder(), mode="sequential")


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_low_precision_models(mode):
    model, (ids, mask, marked) = mild(dtype=torch.bfloat16), batch("right")
    logits = soft_forward(model, ids, mask, marked, feeder(), mode=mode)
    assert logits.dtype == torch.bfloat16
    exact = soft_forward(mild(), ids, mask, marked, feeder(), mode=mode)
    torch.testing.assert_close(logits[mask.bool()].float(), exact[mask.bool()], rtol=0.1, atol=0.1)


def test_bad_input_is_named_before_any_forward():
    model, (ids, mask, marked) = mild(), batch("right")
    first = marked.clone()
    first[1, 0] = True
    with counted(model) as calls:
        with pytest.raises(ValueError, match="column 0"):
            soft_forward(model, ids, mask, first, feeder())
        with pytest.raises(ValueError, match=r"mode='jacobi'.*parallel.*sequential"):
            soft_forward(model, ids, mask, marked, feeder(), mode="jacobi")
    assert not calls


@pytest.mark.parametrize(
    "name, value", [("passes", -1), ("grad_passes", 0), ("window", 0), ("last", 0)]
)
def test_counts_out_of_range_are_named(name, value):
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=f"{name}={value}"):
        soft_forward(
            None, ids, None, torch.zeros_like(ids, dtype=torch.bool), None, **{name: value}
        )
