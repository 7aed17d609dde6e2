"""Rules that look at decoded tokens again, and schedules in time: what they are told, what they
decide, and that it is what their papers say."""

import itertools
import math

import pytest
import torch
from test_denoise import HOLED, MASK, PROMPTS, denoiser, logits_of, read, run
from tiny import seeded

from softar.diffusion import DenoiseConfig
from softar.diffusion.revise import Refine
from softar.diffusion.schedules import MASKED, Block, Schedule, Step, Threshold, plan
from softar.diffusion.select import SELECTORS, Draws
from softar.diffusion.soften import soft_token
from softar.soft import soft_embed

CPU = torch.device("cpu")


def rule_of(config, count, steps):
    block = Block(0, 12, torch.tensor(count), torch.tensor(steps))
    return config.scheduler(block, config, Draws(None, len(count), CPU), **config.schedule_args)


# -- path planning


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 3.0])
def test_p2_masks_the_lowest_scored_of_all(eta):
    """Against the definition, row by row, over random canvases."""
    config = DenoiseConfig(gen_length=12, schedule="p2", schedule_args={"eta": eta})
    draw = seeded()
    for _ in range(40):
        count, steps = torch.randint(0, 13, (2, 3), generator=draw).tolist()
        rule, index = rule_of(config, count, [s + 1 for s in steps]), 2
        mine = torch.arange(12) < torch.tensor(count)[:, None]
        decoded = mine & (torch.rand(3, 12, generator=draw) < 0.5)
        score = torch.rand(3, 12, generator=draw).masked_fill(~mine, -torch.inf)
        commit, drop = rule(Step(index, score, mine & ~decoded, decoded, score))
        for r in range(3):
            n, S = count[r], steps[r] + 1
            left = max(math.floor(n * (S - index - 1) / S + 1e-9), 0)
            value = [
                math.log(score[r, c]) * (eta if decoded[r, c] else 1) if mine[r, c] else None
                for c in range(n)
            ]
            masks = sorted(range(n), key=lambda c: (value[c], -c))[:left]
            after = (mine[r] & ~decoded[r] & ~commit[r]) | drop[r]
            assert after.nonzero()[:, 0].tolist() == sorted(masks)
            assert not (drop[r] & ~decoded[r]).any() and not (commit[r] & decoded[r]).any()


@pytest.mark.parametrize("soften", ["hard", "soft-token"])
@pytest.mark.parametrize("select", [*SELECTORS])
def test_p2_keeps_the_clock_and_takes_tokens_back(select, soften):
    out = run(
        denoiser(), schedule="p2", steps=6, select=select, soften=soften, history=True, rng=seeded()
    )
    masks = [(state == MASK).sum(1).tolist() for state in out.states]
    assert masks == [[8 * (6 - i) // 6] * 3 for i in range(7)] and out.num_forwards == 6
    back = sum(int(((a != MASK) & (b == MASK)).sum()) for a, b in itertools.pairwise(out.states))
    assert (back > 0) == (select != "leftmost")
    # a token that stands is never another one
    for a, b in itertools.pairwise(out.states):
        both = (a != MASK) & (b != MASK)
        assert torch.equal(a[both], b[both])


def test_p2_of_eta_0_takes_nothing_back():
    out = run(denoiser(), schedule="p2", schedule_args={"eta": 0.0}, history=True)
    for a, b in itertools.pairwise(out.states):
        assert torch.equal(a[a != MASK], b[a != MASK])


# -- what any rule that revises is told, and may do


def test_a_rule_is_told_what_the_model_thinks_now():
    """Of every decoded token of the block, none of the caller's, none of other blocks."""
    told, model = [], denoiser()

    class Watch:
        def more(self, index, left):
            return index < 4

        def __call__(self, step):
            told.append(step)
            return step.open & (step.open.cumsum(1) == 1), None

    watch = Schedule(lambda block, config, draws: Watch(), revises=True)
    out = run(model, [PROMPTS[0]], schedule=watch, block_length=4, history=True)
    assert len(told) == 8
    for i, (step, canvas) in enumerate(zip(told, out.states, strict=False)):
        asked = torch.zeros_like(canvas, dtype=torch.bool)
        asked[:, 5 + i // 4 * 4 : 9 + i // 4 * 4] = True
        probs = logits_of(model, canvas).softmax(-1)
        best, token = probs.max(-1)
        stands = probs.gather(-1, canvas[..., None])[..., 0]
        torch.testing.assert_close(step.prob[asked], best[asked], atol=1e-5, rtol=0)
        torch.testing.assert_close(step.standing[asked], stands[asked], atol=1e-5, rtol=0)
        assert torch.equal(step.differs, asked & (token != canvas))
        assert torch.equal(step.decoded | step.open, asked)
        assert (step.prob[~asked] == -torch.inf).all()


def test_a_rule_may_overwrite():
    """As LLaDA2.1's editing does: what the model thinks better of is replaced."""

    class Edit:
        def more(self, index, left):
            return index < 12

        def __call__(self, step):
            return (step.open & (step.open.cumsum(1) == 1)) | (step.decoded & step.differs), None

    model = denoiser()
    out = run(model, schedule=Schedule(lambda *a: Edit(), revises=True), history=True)
    assert any(((a != MASK) & (a != b)).any() for a, b in itertools.pairwise(out.states))
    for n, (a, b) in enumerate(itertools.pairwise(out.states)):
        gone = (a != b) & (out.committed_at <= n)
        assert torch.equal(out.sequences[gone], b[gone])  # the last one to write is recorded


# -- drafts that are verified


def test_wino_drafts_and_verifies():
    """Against the definition, row by row, over random canvases and two steps each."""
    config = DenoiseConfig(schedule="wino", threshold=0.6, schedule_args={"back": 0.7})
    draw = seeded()
    for _ in range(40):
        rule, gained = rule_of(config, [12] * 3, [12] * 3), [None] * 3
        for index in range(3):
            decoded = torch.rand(3, 12, generator=draw) < 0.5
            decoded[:, 0] = False  # something is open
            prob, standing = torch.rand(2, 3, 12, generator=draw)
            told = dict(prob=prob, standing=standing, differs=decoded)
            commit, drop = rule(Step(index, prob, ~decoded, decoded, prob, **told))
            for r in range(3):
                mine = (~decoded[r]).nonzero()[:, 0].tolist()
                sure = {c for c in mine if prob[r, c] >= 0.6} | {
                    max(mine, key=prob[r].tolist().__getitem__)
                }
                assert {*commit[r].nonzero()[:, 0].tolist()} == sure
                doubted = [c for c in range(12) if decoded[r, c] and standing[r, c] < 0.7]
                doubted.sort(key=standing[r].tolist().__getitem__)
                most = 0 if gained[r] is None or len(sure) == 1 else gained[r] - 1
                assert {*drop[r].nonzero()[:, 0].tolist()} == {*doubted[:most]}
                gained[r] = len(sure)


@pytest.mark.parametrize("soften", ["hard", "soft-token", "evolving"])
@pytest.mark.parametrize("length", [8, 16])
def test_wino_takes_no_more_forwards_than_there_are_masks(length, soften):
    how = dict(schedule="wino", threshold=0.2, schedule_args={"back": 1.0})
    out = run(denoiser(), gen_length=16, block_length=length, soften=soften, history=True, **how)
    back = sum(int(((a != MASK) & (b == MASK)).sum()) for a, b in itertools.pairwise(out.states))
    assert (
        (back > 0 or length == 8) and out.num_forwards <= 16 and not (out.sequences == MASK).any()
    )
    trusting = how | dict(schedule_args={"back": 0.0})
    same = run(denoiser(), gen_length=16, block_length=length, soften=soften, **trusting)
    drafts = run(denoiser(), gen_length=16, block_length=length, soften=soften, threshold=0.2)
    assert torch.equal(same.sequences, drafts.sequences)  # who doubts nothing takes nothing back


# -- beliefs that settle


def test_refining_waits_until_the_beliefs_have_settled():
    """The change that the rule is told is KL(new || old) by the callback's softener, row by row."""
    model, beliefs, changes = denoiser(dtype=torch.float64), [], []

    def softener(slots):
        beliefs.append(slots.belief.logits.log_softmax(-1))
        return soft_token(slots)

    class Watch(Refine):
        def __call__(self, step):
            changes.append(step.change())
            return super().__call__(step)

    make = lambda block, config, draws: Watch(Threshold(0.5), 0.05, 9)  # noqa: E731
    out = run(
        model, schedule=Schedule(make, refines=True), soften=softener, history=True, block_length=8
    )
    assert (changes[0] == torch.inf).all()
    opens = [state == MASK for state in out.states]
    held = torch.ones(3, dtype=torch.bool)
    for i in range(out.num_forwards):
        if i and torch.equal(opens[i], opens[0]):
            p, q = beliefs[i], beliefs[i - 1]
            kl = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
            told = changes[i][opens[i]]
            torch.testing.assert_close(told, kl.float(), atol=1e-5, rtol=1e-3)
        held &= changes[i].where(opens[i], 0.0).sum(1) >= 0.05 * opens[i].sum(1)
        committed = (opens[i] & ~opens[i + 1]).any(1)
        if i < 9:
            assert not (committed & held).any()
    assert out.num_forwards > 2 and not opens[-1].any()


def test_a_row_is_held_until_its_mean_change_is_small():
    """By definition, over random canvases: once it is let go it stays so, the others wait."""
    config = DenoiseConfig(schedule="refine", threshold=0.9, schedule_args={"kl": 0.5, "most": 4})
    draw = seeded()
    for _ in range(20):
        rule, held = rule_of(config, [12] * 3, [12] * 3), [True] * 3
        is_open = torch.rand(3, 12, generator=draw) < 0.6
        is_open[:, 0] = True
        for index in range(6):
            change = torch.rand(3, 12, generator=draw) * (torch.rand(3, 1, generator=draw) + 0.5)
            score = torch.rand(3, 12, generator=draw)
            told = dict(change=lambda change=change: change)
            commit, drop = rule(Step(index, score, is_open, ~is_open, score, **told))
            for r in range(3):
                settled = float(change[r][is_open[r]].mean()) < 0.5
                held[r] = held[r] and index < 4 and (index == 0 or not settled)
                assert bool(commit[r].any()) != held[r]
            assert drop is None


def test_refining_at_its_ends():
    """Whatever settles nothing is held for `most` forwards; then it is the rule that was held."""
    how = dict(soften="soft-mask", threshold=0.3, block_length=4)
    for most in (1, 3, 7):
        args = {"kl": 0.0, "most": most}
        out = run(denoiser(), schedule="refine", schedule_args=args, history=True, **how)
        assert out.num_forwards > 2 * most
        for i in range(most):
            assert torch.equal(out.states[i + 1], out.states[0])
        assert not torch.equal(out.states[most + 1], out.states[0])
    calm = run(denoiser(), schedule="refine", schedule_args={"kl": 1e9}, history=True, **how)
    assert torch.equal(calm.states[1], calm.states[0])  # the second has the first to compare with
    assert not torch.equal(calm.states[2], calm.states[0])


# -- the length of what a mask shows


@pytest.mark.parametrize("soften", ["soft-token", "soft-mask", "evolving"])
def test_rescaled_mixtures_have_the_length_that_is_asked_for(soften):
    model = denoiser()
    for rescale in ("l2", "norm"):
        calls = []
        with read(model) as inputs:
            run(model, PROMPTS[:1], soften=soften, rescale=rescale, callback=calls.append)
        for call, x in zip(calls, inputs[1:], strict=False):
            if call["where"] is None or not call["where"].any():
                continue
            expected = soft_embed(call["soft"], model.get_input_embeddings(), rescale=rescale)
            bare = soft_embed(call["soft"], model.get_input_embeddings())
            torch.testing.assert_close(x[call["where"]], expected)
            assert not torch.equal(expected, bare)


# -- schedules in time


def test_a_plan_is_its_definition():
    for name, n, S in itertools.product(MASKED, (1, 7, 24, 100), (1, 2, 5, 32)):
        got = plan(torch.tensor([n, 0]), torch.tensor([S, S]), MASKED[name], "even")
        assert got[1].sum() == 0 and got[0].sum() == n and (got[0] > 0).all()
        share, left, expected = {"linear": lambda t: t, "cosine": math.cos}[name], n, []
        for i in range(S):
            t, s = 1 - i / S, 1 - (i + 1) / S
            if name == "cosine":
                t, s = math.pi / 2 * (1 - t), math.pi / 2 * (1 - s)
            due = left * (1 - share(s) / share(t))
            if abs(due % 1 - 0.5) < 1e-3:
                break  # a tie, that rounding decides
            expected += [round(due)] if round(due) else []
            left -= round(due)
        assert got[0].tolist()[: len(expected)] == expected


def test_halves_round_to_the_even_number():
    def first(rounding, n):
        args = {"eps": 0.0, "rounding": rounding}
        out = run(denoiser(), gen_length=n, schedule="linear", steps=2, schedule_args=args)
        return int((out.committed_at == 0).sum(1)[0])

    assert [first("even", n) for n in (5, 7, 9)] == [2, 4, 4]
    assert [first("down", n) for n in (5, 7, 9)] == [2, 3, 4]


def test_cosine_begins_slowly_and_wastes_no_forward():
    out = run(denoiser(), gen_length=16, schedule="cosine", steps=12)
    counts = out.committed_at.flatten()[out.committed_at.flatten() >= 0].bincount() // 3
    assert (counts > 0).all() and out.num_forwards == len(counts) < 12
    assert counts[: len(counts) // 2].sum() <= 6 and counts[-1] >= 2


# -- what does not go together


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        (dict(schedule="p2", remask="cap", steps=8), "remask='cap'"),
        (dict(schedule="p2", schedule_args={"eta": -1.0}), "eta=-1.0 must be >= 0"),
        (dict(schedule="p2", schedule_args={"eta": 2.0}, alg_temp=1.0), "eta=2.0 weighs scores"),
        (dict(schedule="cosine", schedule_args={"rounding": "up"}), "rounding='up'"),
        (dict(schedule="wino"), "needs threshold=, for example 0.9"),
        (dict(schedule="wino", threshold=0.6, remask="cap", steps=8), "remask='cap'|steps=8"),
        (dict(schedule="wino", threshold=0.6, schedule_args={"back": 2.0}), "back=2.0 must lie"),
        (dict(schedule="refine", threshold=0.6), "soften='hard' shows bare ones"),
        (dict(schedule="refine", threshold=0.6, soften="hard"), "soften='hard' shows bare ones"),
        (dict(rescale="l2"), "rescale='l2' is of mixtures"),
        (dict(rescale="l1", soften="soft-token"), "rescale='l1' is unknown"),
    ],
)
def test_is_refused(knobs, says):
    with pytest.raises(ValueError, match=says):
        run(denoiser(), **knobs)


def test_dllm_asks_for_its_own_schedules():
    for parity, length in (("dllm", 8), ("dllm_infill", 0)):
        with pytest.raises(ValueError, match=r"schedule='pyramid' is unknown.*cosine"):
            run(denoiser(), HOLED, parity=parity, gen_length=length, schedule="pyramid")
