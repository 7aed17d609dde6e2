"""Recorded decodes of masked-diffusion models, and their replay: what was drawn has the probability
that it was drawn with, whatever a slot showed."""

import copy
import itertools
from importlib import import_module

import pytest
import torch
from test_block_causal import block_model
from test_denoise import MASK, denoiser, left_padded
from test_renoised import gemma
from tiny import counted, seeded, with_lora

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.net import facts
from softar.diffusion.proposals import Proposer
from softar.diffusion.reader import same_rows
from softar.diffusion.record import UNFIT, check_recordable
from softar.diffusion.replay import log_probs, prompt_masks, replay
from softar.diffusion.select import Belief, Selector, mk_selector
from softar.diffusion.soften import SOFTENERS

ROWS = ([5, 11, 12, 13, 14], [5, 21], [5, 31, 32])
TEMPLATES = ([5, MASK, 12, MASK, MASK, 15, MASK], [7, 22, MASK, MASK], [5, 31, MASK, 33, 34, MASK])
KINDS = ("llada", "dream", "sdar", "fast_dllm")
SHOWN = [name for name, softener in SOFTENERS.items() if not softener.revises]


# of nets that are never sure
ARGS = {"soft-mask": dict(scale=0.8, centre=-4.0)}


def model_of(kind):
    if kind in ("llada", "dream"):
        return denoiser(kind)
    return copy.deepcopy(block_model(KINDS.index(kind) - 2)).float()


def decoded(model, rows=ROWS, seed=0, **knobs):
    """-> the configuration, and what it gave."""
    config = DenoiseConfig(
        **dict(gen_length=8, steps=8, temperature=1.0, select="max-prob", soften="hard") | knobs
    )
    return config, denoise(model, *left_padded(rows), config=config, rng=seeded(seed), record=True)


def same_draws(model, config, out, **how):
    """Is each draw as likely in the replay as it was in the rollout?"""
    logp = log_probs(model, out.trajectory, config, **how)
    width = out.sequences.shape[1]
    committed = out.trajectory.committed_at >= 0
    assert committed.any() and (logp[~committed] == 0).all()
    then = out.confidence.nan_to_num(1.0).log()
    torch.testing.assert_close(logp[:, :width].exp(), then.exp(), atol=0, rtol=1e-5)
    return logp


# -- the ratio of a policy to itself


@pytest.mark.parametrize("soften", SHOWN)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_at_the_first_update_is_1(kind, soften):
    """Of every committed token, to 1e-5 in float32, in batches of unlike prompts; under adapters too."""
    model = model_of(kind)
    with torch.no_grad():
        config, out = decoded(model, soften=soften, soften_args=ARGS.get(soften, {}))
        own = same_draws(model, config, out, chunk=5)
        if soften != "hard":
            assert (out.trajectory.soft_at >= 0).any()
            bare = out.trajectory._replace(soft_at=out.trajectory.soft_at[:, :0])
            assert not torch.allclose(log_probs(model, bare, config), own, atol=1e-3)
        if kind in ("sdar", "fast_dllm"):
            same_draws(model, config, out, method="grouped", chunk=3)
        if soften in ("hard", "soft-mask"):
            adapted = with_lora(copy.deepcopy(model))
            config, out = decoded(adapted, soften=soften, soften_args=ARGS.get(soften, {}))
            assert not torch.allclose(same_draws(adapted, config, out), own, atol=1e-2)


RULES = {
    "threshold": dict(schedule="threshold", threshold=0.3, steps=None, soften="soft-mask"),
    "bound": dict(select="entropy", entropy_bound=2.0, steps=None, soften="soft-token"),
    "random": dict(select="random", soften="slerp", rescale="norm", ban_eos=True),
    "ancestral": dict(schedule="ancestral", select="confidence"),
    "refine": dict(
        select="margin", schedule="refine", threshold=0.2, steps=None, soften="soft-mask"
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_so_it_is_of_every_rule(kind, rule):
    """In prompts with an answer behind them and in templates."""
    model = model_of(kind)
    with torch.no_grad():
        for rows, gen_length in ((ROWS, 8), (TEMPLATES, 0)):
            same_draws(model, *decoded(model, rows, gen_length=gen_length, **RULES[rule]), chunk=7)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_stop_early(kind):
    """What was filled for them is no draw, and in other rows others read it as it was."""
    blocks = {} if kind in KINDS[2:] else dict(block_length=4)
    knobs = dict(early_stop=True, end_ids=tuple(range(24)), soften="soft-token", **blocks)
    model = model_of(kind)
    with torch.no_grad():
        for seed in range(4):
            config, out = decoded(model, seed=seed, **knobs)
            same_draws(model, config, out, **dict(method="grouped") if not blocks else {})
            filled = (out.committed_at < 0)[:, out.prompt_length :]
            if filled.any():
                return
    raise AssertionError("no row has stopped")


# -- the pieces


@pytest.mark.parametrize("kind", ["dream", "fast_dllm"])
def test_pieces_do_not_matter(kind):
    """Neither to the values nor, piece by piece, to the gradient; rows stand for themselves."""
    model = copy.deepcopy(model_of(kind)).double()
    config, out = decoded(model, soften="soft-token")
    steps, weights = out.trajectory, torch.randn(3, 40, generator=seeded(1))
    weights = weights[:, : steps.after.shape[1]]
    whole = log_probs(model, steps, config, chunk=1000)
    alone = torch.cat([log_probs(model, steps.rows(slice(r, r + 1)), config) for r in range(3)])
    torch.testing.assert_close(alone, whole)
    grads = {"whole": torch.autograd.grad((whole * weights).sum(), [*model.parameters()])}
    for method in ("exact", "grouped") if kind == "fast_dllm" else ("exact",):
        model.zero_grad()
        for rows, cols, logits, _ in replay(model, steps, config, method=method, chunk=4):
            token = steps.after[rows, cols][:, None]
            logp = logits.log_softmax(-1).gather(-1, token)[:, 0]
            torch.testing.assert_close(logp, whole[rows, cols])
            (logp * weights[rows, cols]).sum().backward()
        grads[method] = [p.grad.clone() for p in model.parameters()]
    for got in grads.values():
        torch.testing.assert_close([*got], [*grads["whole"]], atol=1e-6, rtol=1e-4)
    frozen = log_probs(model, steps, config, embedding_grad=False)
    table = model.get_input_embeddings().weight
    (other,) = torch.autograd.grad((frozen * weights).sum(), table)
    assert torch.equal(frozen, log_probs(model, steps, config))
    assert not torch.allclose(other, grads["whole"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_canvases_at_a_time_than_the_chunk(kind):
    """And as many forwards in all as have committed something in a row."""
    model, sizes = model_of(kind), []
    config, out = decoded(model, soften="soft-token")
    hook = model.model.register_forward_hook(
        lambda module, args, got: sizes.append(got.last_hidden_state.shape[0])
    )
    with torch.no_grad():
        log_probs(model, out.trajectory, config, chunk=4)
    hook.remove()
    at = out.trajectory.committed_at
    assert max(sizes) <= 4 and sum(sizes) == sum(len(row[row >= 0].unique()) for row in at)


@pytest.mark.parametrize("soften", ["hard", "soft-mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_the_same_is_read_once(kind, soften):
    """As answers to one prompt do until they part, in the rollout of a whole canvas and in its replay;
    their values and gradients are those of each alone."""
    model, sizes = copy.deepcopy(model_of(kind)).double(), []
    hook = model.model.register_forward_hook(
        lambda module, args, got: sizes.append(got.last_hidden_state.shape[0])
    )
    rows, knobs = (
        [ROWS[0]] * 3 + [ROWS[2]] * 3,
        dict(soften=soften, soften_args=ARGS.get(soften, {})),
    )
    config, out = decoded(model, rows, **knobs)
    steps = out.trajectory
    every = set()
    for r, order in enumerate(steps.committed_at):
        for at in order[order >= 0].unique():
            known = (order >= 0) & (order < at)
            shown = steps.soft_at[r] == at
            parts = (torch.where(known, steps.after[r], steps.before[r]), steps.block[r])
            parts += tuple(part[r][shown] for part in steps[5:8])
            every.add(str([part.tolist() for part in parts]))
    pairs = sum(len(row[row >= 0].unique()) for row in steps.committed_at)
    assert 2 < len(every) <= pairs - 4  # the first forwards are the same
    assert sum(sizes) == len(every) or kind not in KINDS[:2]
    sizes.clear()
    together = log_probs(model, steps, config, chunk=1000)
    assert sizes == [len(every)]
    sizes.clear()
    log_probs(model, steps, config, method="one-step", chunk=1000)
    firsts = 2 if kind in KINDS[:2] else sizes[0]  # where the last block may be an answer's own
    assert sizes == [firsts]
    hook.remove()
    alone = [log_probs(model, steps.rows(slice(r, r + 1)), config) for r in range(6)]
    torch.testing.assert_close(together, torch.cat(alone))
    then = out.confidence.nan_to_num(1.0).double()
    torch.testing.assert_close(then, together[:, : then.shape[1]].exp(), atol=1e-6, rtol=1e-5)
    weights = torch.randn(together.shape, generator=seeded(1)).double()
    both = [
        torch.autograd.grad((values * weights).sum(), [*model.parameters()])
        for values in (together, torch.cat(alone))
    ]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-4)  # norms are in float32
    if soften == "hard":
        return
    twins = steps.rows(torch.tensor([0, 0]))  # which read other mixtures in the same slots
    twins.soft_weights[1] = twins.soft_weights[1].flip(-1)
    first, second = log_probs(model, twins, config)
    assert torch.allclose(first, alone[0][0]) and not torch.allclose(first, second, atol=1e-3)


# -- estimates


@pytest.mark.parametrize("kind", KINDS[:2])
def test_estimates_are_exact_where_they_say_what_happened(kind):
    model = model_of(kind)
    with torch.no_grad():
        config, out = decoded(model, steps=1)
        same_draws(model, config, out, method="one-step")
        config, out = decoded(model, select="leftmost", steps=8)
        own = same_draws(model, config, out, method="left-to-right")
        assert not torch.allclose(own, log_probs(model, out.trajectory, config, method="one-step"))
        config, out = decoded(model, steps=3)
        for method in ("one-step", "left-to-right"):
            other = log_probs(model, out.trajectory, config, method=method)
            assert not torch.allclose(other, log_probs(model, out.trajectory, config), atol=1e-2)


def test_a_share_of_the_prompt_is_hidden():
    model = model_of("llada")
    config, out = decoded(model, ROWS * 40)
    hidden = prompt_masks(out.trajectory, 0.15, seeded(3))
    given = out.trajectory.block >= 0
    given[:, out.prompt_length :] = False
    assert not (hidden & ~given).any() and 0.1 < hidden.sum() / given.sum() < 0.2
    with torch.no_grad():
        how = dict(method="one-step", hidden=hidden)
        # in batches of other sizes, whose sums other kernels may make
        same = torch.isclose(
            log_probs(model, out.trajectory, config, **how),
            log_probs(model, out.trajectory, config, method="one-step"),
            atol=1e-5,
        )
    whole = ~hidden.any(1)
    assert whole.any() and same[whole].all() and not same[~whole].all()


def test_what_is_hidden_does_not_hang_on_the_padding():
    """Nor on how many processes share the rows: a row with numbers of its own is hidden as alone."""
    _, out = decoded(model_of("llada"), ROWS)
    _, alone = decoded(model_of("llada"), ROWS[1:2])
    assert out.trajectory.after.shape[1] > alone.trajectory.after.shape[1]
    for seed in range(20):
        wide = prompt_masks(out.trajectory.rows(slice(1, 2)), 0.5, seeded(seed))[0]
        hidden = prompt_masks(alone.trajectory, 0.5, seeded(seed))[0]
        assert torch.equal(wide[-len(hidden) :], hidden) and not wide[: -len(hidden)].any()


# -- all trajectories of a net of three tokens and three slots

bench = import_module("softar.recipes.bench_replay")


def enumerated(model, config, monkeypatch, ways=None, **knobs):
    """denoise() on a row for each way to fill the slots, whose tokens it is made to draw."""
    ways = ways or [*itertools.product(range(bench.WORDS), repeat=bench.SLOTS)]
    ways = torch.tensor(ways)
    rows = [torch.Generator().manual_seed(5) for _ in ways]

    def scripted(self, belief, asked, block):
        cols = asked.nonzero()[:, 1] - len(bench.PROMPT)
        return ways[asked.nonzero()[:, 0], cols], None

    monkeypatch.setattr(Proposer, "_propose", scripted)
    prompts = torch.tensor([bench.PROMPT] * len(ways))
    out = denoise(model, prompts, config=config, rng=rows, record=True, **knobs)
    assert torch.equal(out.completions, ways)
    return out.trajectory


@pytest.mark.parametrize("select", ["max-prob", "margin", "entropy", "leftmost", "random"])
@pytest.mark.parametrize("soften", ["hard", "soft-token", "soft-mask"])
def test_probabilities_of_all_trajectories_sum_to_1(soften, select, monkeypatch):
    model, config = bench.net(0), bench.policy(2)
    args = dict(k=2) | ARGS.get(soften, {}) if soften != "hard" else {}
    knobs = dict(select=select, soften=soften, soften_args=args)
    steps = enumerated(model, config, monkeypatch, **knobs)
    config = DenoiseConfig(**vars(config) | knobs)
    with torch.no_grad():
        prob = log_probs(model, steps, config).sum(1).exp()
        assert prob.min() > 0 and prob.max() < 1 and prob.sum().item() == pytest.approx(1, abs=1e-6)
        for method in ("one-step", "left-to-right"):
            likely = log_probs(model, steps, config, method=method).sum(1).exp().sum().item()
            assert likely == pytest.approx(1, abs=1e-6)  # but of other trajectories


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("soften", ["hard", "soft-token"])
def test_the_estimator_expects_the_policy_gradient(soften, steps, monkeypatch):
    """That of the expected reward, which is differentiated as it stands: the definition beside the
    loop's record. What a slot shows is a transition."""
    model, config = bench.net(1), bench.policy(steps, soften)
    found = bench.leaves(model, config)
    prob, value = torch.stack([leaf.prob for leaf in found]), bench.reward(found)
    truth = bench.gradient(model, (prob * value).sum())
    recorded = enumerated(model, config, monkeypatch)
    order = {tuple(leaf.ids): i for i, leaf in enumerate(found)}
    which = torch.tensor([order[tuple(row)] for row in recorded.after.tolist()])
    logp = log_probs(model, recorded, config).sum(1)
    p, reward = logp.detach().exp(), value[which]
    torch.testing.assert_close(p, prob.detach()[which], atol=1e-6, rtol=1e-5)
    for baseline in (0.0, (p * reward).sum()):
        estimate = bench.gradient(model, (p * (reward - baseline) * logp).sum())
        assert (estimate - truth).norm() < 1e-5 * truth.norm()


# -- slots that are drawn, too


@pytest.mark.parametrize("soften", ["hard", "soft-mask"])
@pytest.mark.parametrize("select", ["max-prob", "margin", "entropy"])
@pytest.mark.parametrize("kind", KINDS)
def test_drawn_slots_are_scored_as_they_were_drawn(kind, select, soften, monkeypatch):
    """Of each slot that the loop took, its share among those that were left, by the loop's own scores."""
    seen, reorder = [], Proposer.reorder

    def watched(self, score, is_open):
        seen.append((score, is_open, drawn := reorder(self, score, is_open)))
        return drawn

    monkeypatch.setattr(Proposer, "reorder", watched)
    model = model_of(kind)
    knobs = dict(soften=soften, soften_args=ARGS.get(soften, {}), select=select, alg_temp=0.3)
    blocks = dict(block_length=4, steps=4) if kind in ("llada", "dream") else dict(steps=9)
    config, out = decoded(model, **knobs, **blocks)
    width = out.sequences.shape[1]
    at, wanted = out.trajectory.committed_at, torch.zeros(out.trajectory.after.shape)
    wanted[:, :width] = out.confidence.nan_to_num(1.0).log()
    commits = {int(forward) for forward in at.unique() if forward >= 0}
    # forwards that store a finished block decide nothing
    assert len(seen) == len(commits)
    drawn = 0
    for forward, (score, is_open, drawn_order) in zip(sorted(commits), seen, strict=True):
        for r in range(len(at)):
            left = is_open[r].nonzero()[:, 0].tolist()
            now = (at[r] == forward).nonzero()[:, 0].tolist()
            if len(now) == len(left):
                continue
            for c in sorted(now, key=lambda c: -drawn_order[r, c]):
                wanted[r, c] += (score[r, left] / 0.3).log_softmax(-1)[left.index(c)]
                left.remove(c)
                drawn += 1
    assert drawn > 3
    with torch.no_grad():
        whole = log_probs(model, out.trajectory, config, chunk=1000)
        torch.testing.assert_close(whole[:, :width], wanted[:, :width], atol=2e-5, rtol=1e-5)
        ways = [dict(chunk=5)]
        if kind in ("sdar", "fast_dllm"):
            ways += [dict(method="grouped", chunk=3), dict(method="grouped", chunk=50)]
        for how in ways:
            own = log_probs(model, out.trajectory, config, **how)
            torch.testing.assert_close(own, whole, atol=2e-5, rtol=1e-5)
    for method in ("one-step", "left-to-right"):
        with pytest.raises(ValueError, match=r"alg_temp=0\.3 draws the slots, and method="):
            log_probs(model, out.trajectory, config, method=method)


def drawn_orders(monkeypatch):
    """denoise() from now on takes the slots of row r in the order of the r-th permutation, of as many
    as there are, over and over."""
    orders = [*itertools.permutations(range(bench.SLOTS))]

    def scripted(self, score, is_open):
        places = torch.full(score.shape, -torch.inf)
        for r in range(len(score)):
            for place, slot in enumerate(orders[r % len(orders)]):
                places[r, len(bench.PROMPT) + slot] = -place
        return places.masked_fill(~is_open, -torch.inf)

    monkeypatch.setattr(Proposer, "reorder", scripted)
    return len(orders)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("select", ["max-prob", "margin", "entropy"])
@pytest.mark.parametrize("soften", ["hard", "soft-token"])
def test_the_estimator_expects_the_policy_gradient_of_drawn_slots(
    soften, select, steps, monkeypatch
):
    """All tokens in all orders: their probabilities add up to 1, and for the score that the bench writes
    down anew the gradient is that of the expected reward."""
    model, config = bench.net(1), bench.policy(steps, soften, alg_temp=0.3)
    config = DenoiseConfig(**vars(config) | dict(select=select))
    number = drawn_orders(monkeypatch)
    ways = [*itertools.product(range(bench.WORDS), repeat=bench.SLOTS)]
    recorded = enumerated(model, config, monkeypatch, [way for way in ways for _ in range(number)])
    monkeypatch.undo()
    logp = log_probs(model, recorded, config).sum(1)
    p = logp.detach().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    if select != "max-prob":
        return
    found = bench.leaves(model, config)
    prob, value = torch.stack([leaf.prob for leaf in found]), bench.reward(found)
    assert prob.sum().item() == pytest.approx(1, abs=1e-9) and len(found) == len(p)
    truth = bench.gradient(model, (prob * value).sum())
    keys = {(*leaf.ids, *leaf.order, *leaf.drawn): i for i, leaf in enumerate(found)}
    kept = recorded.after, recorded.committed_at, recorded.drawn_as
    which = torch.tensor([keys[tuple(row)] for row in torch.cat(kept, 1).tolist()])
    torch.testing.assert_close(p, prob.detach()[which], atol=1e-6, rtol=1e-5)
    estimate = bench.gradient(model, (p * (value[which] - 0.3) * logp).sum())
    assert (estimate - truth).norm() < 1e-5 * truth.norm()
    fixed = recorded._replace(drawn_as=torch.full_like(recorded.drawn_as, -1))
    blind = log_probs(model, fixed, config).sum(1)
    estimate = bench.gradient(model, (p * (value[which] - 0.3) * blind).sum())
    assert (estimate - truth).norm() > 0.05 * truth.norm()


@pytest.mark.parametrize("select", ["max-prob", "margin", "entropy"])
@pytest.mark.parametrize("kind", ["llada", "fast_dllm"])
def test_gradients_of_drawn_slots_are_finite(kind, select):
    """At low temperatures too, of models that are sure and never propose the mask: its logit is the
    lowest number, and times 0 it was NaN. The scores add to the gradient."""
    model = copy.deepcopy(model_of(kind))  # all tests share it
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    config, out = decoded(model, steps=4 if kind == "llada" else 9, select=select, alg_temp=0.01)
    steps = out.trajectory
    logp = log_probs(model, steps, config)
    grads = torch.autograd.grad(logp.sum(), [*model.parameters()])
    assert all(grad.isfinite().all() for grad in grads)
    without = steps._replace(drawn_as=torch.full_like(steps.drawn_as, -1))
    tokens = torch.autograd.grad(log_probs(model, without, config).sum(), [*model.parameters()])
    moved = max((a - b).abs().max() for a, b in zip(grads, tokens, strict=True))
    assert moved > 1e-3


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_differentiable_scores_are_those_of_the_loop(scale):
    """And have the gradient that torch's softmax gives them."""
    logits = scale * torch.randn(5, 300, generator=seeded(0), dtype=torch.float64)
    logits[:, 7] = torch.finfo(logits.dtype).min
    leaf, by_hand = (logits.clone().requires_grad_() for _ in range(2))
    p = by_hand.softmax(-1)
    top = p.topk(2, -1).values
    wanted = {
        "max-prob": top[:, 0],
        "margin": top[:, 0] - top[:, 1],
        "entropy": (p * p.clamp_min(1e-300).log()).sum(-1),
    }
    for name, value in wanted.items():
        score = mk_selector(name)(Belief(leaf), logits.argmax(-1), None)
        plain = mk_selector(name)(Belief(logits), logits.argmax(-1), None)
        torch.testing.assert_close(score, plain)
        torch.testing.assert_close(score, value)
        pairs = (score, leaf), (value, by_hand)
        found, right = (torch.autograd.grad(s.sum(), x, retain_graph=True)[0] for s, x in pairs)
        torch.testing.assert_close(found, right)
        assert right.abs().max() > 1e-4 or scale > 1


def test_a_selector_that_draws_is_refused_where_slots_are_drawn():
    def noisy(belief, token, uniform):
        return belief.prob(belief.top_token[:, None])[:, 0] + 0.01 * uniform().float()

    knobs = dict(select=Selector(noisy, looks_at_token=False), steps=4)
    assert decoded(model_of("llada"), **knobs)[1].trajectory is not None
    with pytest.raises(ValueError, match="draws numbers, and with alg"):
        decoded(model_of("llada"), **knobs, alg_temp=0.5)


def test_whole_numbers_are_scores():
    model = model_of("llada")
    select = Selector(lambda belief, token, uniform: belief.top_token % 3, looks_at_token=False)
    config, out = decoded(model, steps=4, select=select, alg_temp=0.5)
    assert log_probs(model, out.trajectory, config).isfinite().all()


# -- what is refused


REFUSED = {
    "select": (dict(select="confidence"), "which slots commit depends on the tokens drawn"),
    "function": (dict(select=lambda belief, token, uniform: token), "looks_at_token=False"),
    "greedy": (dict(temperature=0.0), "temperature=0.0 cannot be replayed: nothing is drawn"),
    "top_k": (dict(top_k=5), "top_k=5 cannot be replayed: draws are scored under the whole belief"),
    "top_p": (dict(top_p=0.9), "top_p=0.9 cannot"),
    "alg_temp": (
        dict(alg_temp=0.5, schedule=lambda block, config, draws: None),
        "alg_temp=0.5 cannot be replayed: what a schedule of yours makes of drawn scores is not known",
    ),
    "cfg_scale": (dict(cfg_scale=1.0), "cfg_scale=1.0 cannot"),
    "cache": (dict(cache="dual", block_length=4), "cache='dual' cannot be replayed: its keys"),
    "whole": (
        dict(soften="soft-mask", soften_args=dict(algorithm="temperature")),
        "soften_args={'algorithm': 'temperature'} cannot be replayed: its mixtures hold the whole vocabulary",
    ),
    "remask": (dict(remask="cap"), "remask='cap' cannot be replayed: it takes decoded tokens back"),
    "schedule": (dict(schedule="p2"), "schedule='p2' cannot be replayed: it takes"),
    "soften": (dict(soften="evolving"), "soften='evolving' cannot be replayed: it takes"),
    "ends_last": (dict(ends_last=True), "ends_last=True cannot"),
    "parity": (dict(parity="llada"), "parity='llada' cannot be replayed: defects"),
    "allowed": (dict(allowed={-1: (5, 6)}), "allowed={-1: (5, 6)} cannot"),
    "processor": (dict(logits_processor=lambda ids, scores: scores), "logits_processor="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_decode_without_probabilities_is_refused(case):
    """By name, before the first forward, and by the replay too."""
    knobs, says = REFUSED[case]
    model, good = model_of("llada"), decoded(model_of("llada"))
    with counted(model) as calls, pytest.raises(ValueError) as caught:
        decoded(model, **knobs)
    assert says in str(caught.value) and "\n" not in str(caught.value) and not calls
    with pytest.raises(ValueError, match="cannot be replayed"):
        replay(model, good[1].trajectory, DenoiseConfig(**vars(good[0]) | knobs))


def test_every_refusal_is_tested():
    names = {name for name, *_ in UNFIT}
    assert names == {key for knobs, _ in REFUSED.values() for key in knobs} - {"block_length"}


def test_a_selector_of_the_users_that_says_so_is_taken():
    model = model_of("llada")
    own = Selector(lambda belief, token, uniform: belief.largest[:, 0], looks_at_token=False)
    with torch.no_grad():
        same_draws(model, *decoded(model, select=own))


def test_what_does_not_fit_is_said():
    model = model_of("llada")
    config, out = decoded(model)
    for how, says in (
        (dict(method="exactly"), "method='exactly' is unknown"),
        (dict(method="grouped"), "for block-causal models"),
        (dict(chunk=0), "chunk=0 must be at least 1"),
        (dict(hidden=out.trajectory.block > 0), "hidden does not go with method='exact'"),
    ):
        with pytest.raises(ValueError, match=says):
            replay(model, out.trajectory, config, **how)
    with pytest.raises(ValueError, match="family diffusion_gemma redraws its slots"):
        check_recordable(DenoiseConfig(), facts(gemma()))


# -- selectors


def test_max_prob_is_confidence_without_the_draw():
    """The same where nothing is drawn; elsewhere the same whatever is drawn."""
    model, rows = model_of("llada"), left_padded(ROWS)
    by = [
        denoise(model, *rows, gen_length=8, steps=3, select=s) for s in ("confidence", "max-prob")
    ]
    for name in ("sequences", "committed_at"):
        assert torch.equal(*(getattr(out, name) for out in by))
    first = [decoded(model, seed=seed)[1].committed_at == 0 for seed in range(5)]
    assert all(torch.equal(first[0], other) for other in first)
    knobs = dict(gen_length=8, steps=8, temperature=1.0)
    first = [
        denoise(model, *rows, **knobs, rng=seeded(seed)).committed_at == 0 for seed in range(5)
    ]
    assert not all(torch.equal(first[0], other) for other in first)


def test_rows_are_the_same_where_all_their_parts_are():
    """Mixtures alike behind other padding are other rows; so are numbers that differ by a bit."""
    embeds = torch.zeros(6, 2, 3)
    embeds[2, 1, 1] = torch.finfo(torch.float32).tiny
    embeds[5] = embeds[2]
    mask = torch.ones(6, 2, dtype=torch.long)
    mask[1, 0] = mask[4, 0] = 0
    first, which = same_rows(embeds, mask)
    assert first.tolist() == [0, 1, 2] and which.tolist() == [0, 1, 2, 0, 1, 2]
    first, which = same_rows(embeds, None)
    assert first.tolist() == [0, 2] and which.tolist() == [0, 0, 1, 0, 0, 1]


def test_the_bench_of_costs_says_each_policy(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROWS", 1)
    monkeypatch.setattr(bench, "GROUP", 2)
    bench.cost(1)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and sum("drawn at 0.05" in row for row in rows) == 2
    assert all(float(row.split("|")[2].split()[0]) > 0 for row in rows)
