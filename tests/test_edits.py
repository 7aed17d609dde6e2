"""Rules that write over what is decoded: LLaDA2.1's editing and DMax's overwriting, with its softener;
on block-causal models and on those that read both ways."""

import itertools

import pytest
import torch
from test_block_causal import block_model, decode
from test_denoise import HOLED, MASK, VOCAB, denoiser, read, run
from tiny import seeded

from softar.diffusion import DenoiseConfig, block_parity
from softar.diffusion.schedules import SCHEDULES, Block, Schedule, Step
from softar.diffusion.select import Draws
from softar.diffusion.soften import SOFTENERS

EDIT = dict(schedule="edit", threshold=0.2, schedule_args={"editing_threshold": 0.1})
DMAX = dict(schedule="overwrite", soften="soft-decoded", rescale="norm")
ROWS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16, 17, 18]]
MODELS = {"block-causal": block_model, "shifted": lambda: block_model(1), "both ways": denoiser}
# blocks of 4 columns that are all decoded, in each of them
BLOCKS = {name: dict(early_stop=False) for name in MODELS} | {"both ways": dict(block_length=4)}
each_model = pytest.mark.parametrize("name", [*MODELS])


def changes(out):
    """How many tokens that stood were replaced, step by step."""
    pairs = itertools.pairwise(out.states)
    return [int(((a != MASK) & (a != b)).sum()) for a, b in pairs]


# -- rules, against their definitions, row by row


def steps_of(seed, number=12):
    """A block of 12 columns of 3 rows, and steps that a model without a memory could lead to."""
    draw = seeded(seed)
    mine = torch.rand(3, 12, generator=draw) < 0.7
    state = {"mine": mine, "masks": mine.clone()}

    def step(index, waits):
        """waits: [3] bool, rows of which nothing is asked."""
        is_open = state["masks"] & ~waits[:, None]
        asked = mine & ~waits[:, None]
        prob = torch.rand(3, 12, generator=draw).masked_fill(~asked, -torch.inf)
        differs = asked & ((torch.rand(3, 12, generator=draw) < 0.3) | is_open)
        decoded = mine & ~state["masks"]
        return Step(index, prob, is_open, decoded, prob, prob, prob, differs)

    return state, step


def followed(config, seed, steps=None):
    """Run a rule on such a block -> in each step: what it was told, what it wrote, who goes on."""
    state, step = steps_of(seed)
    count = state["mine"].sum(1)
    block = Block(0, 12, count, count if steps is None else torch.full_like(count, steps))
    rule = config.scheduler(block, config, Draws(None, 3, count.device), **config.schedule_args)
    told = []
    while rule.more(len(told), bool(state["masks"].any())):
        busy = rule.busy
        one = step(len(told), ~busy)
        wrote, drop = rule(one)
        assert drop is None and not (wrote & ~state["mine"]).any() and not wrote[~busy].any()
        state["masks"] = state["masks"] & ~wrote
        told.append((one, wrote, busy, rule.busy))
    assert not state["masks"].any()
    return count, told


@pytest.mark.parametrize("above", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_edit_is_its_definition(above, most):
    args = {"editing_threshold": above, "max_post_steps": most}
    config = DenoiseConfig(schedule="edit", threshold=0.5, schedule_args=args)
    for seed in range(20):
        count, told = followed(config, seed)
        assert len(told) <= count.max() + most
        posts = [0, 0, 0]
        for r, (step, wrote, busy, goes_on) in itertools.product(range(3), told):
            if not busy[r]:
                continue
            masks = [c for c in range(12) if step.open[r, c]]
            surest = sorted(masks, key=lambda c: (-float(step.prob[r, c]), c))
            fill = [c for c in masks if step.prob[r, c] > 0.5] or surest[:1]
            edit = [
                c
                for c in range(12)
                if step.decoded[r, c] and step.differs[r, c] and step.prob[r, c] > above
            ]
            assert wrote[r].nonzero()[:, 0].tolist() == sorted(fill + edit)
            posts[r] += not masks
            settled = (not masks and not edit) or posts[r] >= most
            assert bool(goes_on[r]) == (len(fill) < len(masks) or not settled)


@pytest.mark.parametrize("threshold", [None, 0.5, 0.95])
@pytest.mark.parametrize("steps", [None, 1, 3])
def test_overwrite_is_its_definition(threshold, steps):
    config = DenoiseConfig(
        schedule="overwrite", threshold=threshold, schedule_args={"sure": 0.3}, steps=steps
    )
    for seed in range(20):
        count, told = followed(config, seed, steps)
        assert len(told) <= (count.max() if steps is None else steps)
        for r, (step, wrote, busy, goes_on) in itertools.product(range(3), told):
            if not busy[r]:
                continue
            masks = [c for c in range(12) if step.open[r, c]]
            is_last = step.index + 1 >= (count[r] if steps is None else steps)
            promoted = [
                c
                for i, c in enumerate(masks)
                if i == 0
                or is_last
                or all(step.prob[r, other] >= (threshold or 0) for other in masks[: i + 1])
            ]
            over = [c for c in range(12) if step.decoded[r, c] and step.differs[r, c]]
            assert wrote[r].nonzero()[:, 0].tolist() == sorted(promoted + over)
            unsure = any(0 <= p < 0.3 for p in step.prob[r].tolist())
            stops = not unsure or not (promoted or over) or is_last
            assert bool(goes_on[r]) == (len(promoted) < len(masks) or not stops)


# -- whole decodes


@each_model
@pytest.mark.parametrize("knobs", [EDIT, DMAX], ids=["edit", "overwrite"])
def test_the_blocks_own_tokens_give_way_and_no_others(name, knobs):
    """Never the caller's, nor those of a block that is done; and what was written last is told."""
    rows = [[*row[:-1], MASK] for row in ROWS] if name == "both ways" else ROWS
    calls = []
    out = decode(
        MODELS[name](),
        rows,
        gen_length=12,
        history=True,
        callback=calls.append,
        **knobs,
        **BLOCKS[name],
    )
    assert sum(changes(out)) > 0 and not (out.sequences == MASK).any()
    given = out.states[0] != MASK
    assert torch.equal(out.sequences[given], out.states[0][given])
    for call in calls:
        now = call["sequences"][:, : call["block"][0]]
        if name == "both ways":  # whose blocks have the same columns in all rows
            done = now != MASK
            assert torch.equal(out.sequences[:, : call["block"][0]][done], now[done])
    for n, (a, b) in enumerate(itertools.pairwise(out.states)):
        gone = (a != b) & (out.committed_at <= n)
        assert torch.equal(out.sequences[gone], b[gone])


@each_model
@pytest.mark.parametrize("knobs", [EDIT, DMAX], ids=["edit", "overwrite"])
def test_a_forward_that_finds_nothing_to_change_is_the_rows_too(name, knobs):
    for row in ROWS:
        out = decode(MODELS[name](), [row], gen_length=8, **knobs, **BLOCKS[name])
        assert out.row_forwards.tolist() == [out.num_forwards]
        assert out.row_stores.tolist() == [out.store_forwards]


@pytest.mark.parametrize("knobs", [EDIT, DMAX], ids=["edit", "overwrite"])
@pytest.mark.parametrize("shift", [0, 1])
def test_sub_blocks_before_and_first_tokens_of_shifted_blocks_stay(shift, knobs):
    """As the docstrings say; the other tokens of a sub-block do give way."""
    model, rows = block_model(shift, 8), [list(range(1, 9)), list(range(11, 19))]
    out = decode(
        model, rows, gen_length=16, sub_block_length=4, early_stop=False, history=True, **knobs
    )
    states = torch.stack(out.states)[:, :, 8:]
    changed = (states[:-1] != states[1:]) & (states[:-1] != MASK)
    assert changed.any() and not (shift and changed[..., [0, 8]].any())
    for lo in range(4, 16, 4):
        begun = (states[:, :, lo:] != MASK).any(-1)[1:]
        assert not changed[..., :lo][begun].any()


@each_model
def test_nothing_is_edited_at_1_nor_in_zero_forwards_more(name):
    """Then it is "dynamic", but for the forward that finds nothing to change."""
    knobs = dict(gen_length=8, threshold=0.2, history=True) | BLOCKS[name]
    plain = decode(MODELS[name](), ROWS, schedule="dynamic", **knobs)
    for args, more in (({"max_post_steps": 0}, 0), ({}, len({*range(2)}))):
        args |= {"editing_threshold": 1.0}
        out = decode(MODELS[name](), ROWS, schedule="edit", schedule_args=args, **knobs)
        assert torch.equal(out.sequences, plain.sequences) and not any(changes(out))
        assert out.num_forwards >= plain.num_forwards + more


class Fickle:
    """Changes the logits of a model, which never thinks the same twice, or proposes the mask."""

    def __init__(self, model, proposes_mask):
        self.model, self.proposes_mask, self.calls = model, proposes_mask, 0

    def __enter__(self):
        self.hook = self.model.lm_head.register_forward_hook(self.change)
        return self

    def __exit__(self, *error):
        self.hook.remove()

    def change(self, module, args, logits):
        self.calls += 1
        assert self.calls < 1000, "it goes on without an end"
        logits = logits.roll(7 * self.calls, -1)
        if self.proposes_mask:
            logits[..., MASK] = 1e4
        return logits


@each_model
@pytest.mark.parametrize("proposes_mask", [False, True])
def test_it_ends_whatever_the_model_says(name, proposes_mask):
    """After so many forwards: of each mask and max_post_steps; or of each mask."""
    edit = dict(threshold=1.0, schedule_args={"editing_threshold": 0.0, "max_post_steps": 5})
    for knobs, post in ((dict(schedule="edit", **edit), 5), (DMAX | dict(threshold=1.0), 0)):
        with Fickle(MODELS[name](), proposes_mask) as fickle:
            out = decode(
                fickle.model, [[3, 4, 5, 6]], gen_length=8, cache="off", **knobs, **BLOCKS[name]
            )
        assert not (out.sequences == MASK).any()
        assert out.num_forwards == 8 + 2 * post == fickle.calls


def test_the_original_ends_as_well_where_it_had_no_end(monkeypatch):
    monkeypatch.setattr(block_parity, "ENDLESS", 20)
    with Fickle(block_model(), proposes_mask=True) as fickle:
        out = decode(fickle.model, [[3, 4, 5, 6]], gen_length=4, parity="llada21", block_length=4)
    assert (out.completions == MASK).all() and out.num_forwards == 21  # one of the prompt


@each_model
def test_dmax_reads_what_it_has_decoded_softly_and_masks_bare(name):
    """sum p_k E_k + (1 - sum p_k) E_mask, at the length sum p_k |E_k| + (1 - sum p_k) |E_mask|."""
    model, calls = MODELS[name](), []
    settings = DMAX | dict(threshold=0.1, soften_args={"k": 2}, cache="off") | BLOCKS[name]
    table = model.model.embed_tokens.weight
    with read(model) as reads:
        decode(model, [[3, 4, 5, 6]], gen_length=4, callback=calls.append, **settings)
    seen = 0
    for call, following, inputs in zip(calls, calls[1:], reads[1:], strict=False):
        if following["block"] != call["block"]:  # the first token of a shifted block is on its own
            continue
        where = call["where"][0]
        is_token = call["sequences"][0] != MASK
        assert where[5:].all() and not where[:4].any()
        expected = table[call["sequences"][0]].clone()
        for column, ids, weights in zip(where.nonzero()[:, 0].tolist(), *call["soft"], strict=True):
            assert ids.tolist()[-1] == MASK and len(ids) == 3
            assert is_token[column] or weights.tolist() == [0, 0, 1]
            parts = weights[:, None].to(table.dtype) * table[ids]
            length = parts.norm(dim=1).sum()
            expected[column] = parts.sum(0) / parts.sum(0).norm() * length
            seen += int(is_token[column])
        torch.testing.assert_close(inputs[0, :8], expected, atol=1e-5, rtol=1e-4)
    assert seen >= 3


@each_model
def test_what_was_soft_is_gone_after_its_block(name):
    """Two blocks are one, and one behind its result."""
    knobs = DMAX | BLOCKS[name]
    rows = [[3, 4, 5, 6], [7, 8, 9, 10]]
    model = MODELS[name]()
    if name == "both ways":  # whose first block sees masks behind it
        with read(model) as reads:
            out = decode(model, rows, gen_length=8, history=True, **knobs)
        begin = int((out.committed_at[:, :8].amax()) + 1)
        assert torch.equal(reads[begin], model.model.embed_tokens(out.states[begin]))
        return
    two = decode(model, rows, gen_length=8, **knobs).sequences
    one = decode(model, rows, gen_length=4, **knobs).sequences
    assert torch.equal(two[:, :8], one)
    assert torch.equal(decode(model, one.tolist(), gen_length=4, **knobs).sequences, two)


@pytest.mark.parametrize("length", [3, 9])
def test_a_joined_forward_stores_the_block_before(length):
    """DMax's own: as without a cache, and a forward for the prompt, which needs no whole block."""
    row, model = [list(range(1, length + 1))], block_model()
    knobs = DMAX | dict(schedule=None, parity="dmax", block_length=4, gen_length=14, threshold=0.1)
    out = decode(model, row, early_stop=False, **knobs)
    again = decode(model, row, early_stop=False, cache="off", **knobs)
    assert torch.equal(out.sequences, again.sequences)
    assert out.num_forwards == again.num_forwards + 1


@pytest.mark.parametrize("schedule", ["edit", "overwrite"])
def test_both_go_with_the_rest(schedule):
    """Holes, guidance, few allowed tokens, drawn proposals, and softeners of every kind."""
    for soften in SOFTENERS:
        knobs = dict(schedule=schedule, threshold=0.3, soften=soften)
        out = run(denoiser(), HOLED, gen_length=0, cfg_scale=1.0, **knobs)
        assert not (out.sequences == MASK).any()
        allowed = {column: [4, 5, 6] for column in range(-8, 0)}
        out = run(denoiser(), allowed=allowed, temperature=1.0, rng=seeded(), **knobs)
        assert torch.isin(out.completions, torch.tensor([4, 5, 6])).all()
        assert (out.sequences < VOCAB).all()


BAD = {
    "above 1": (dict(EDIT, schedule_args={"editing_threshold": 1.5}), "editing_threshold=1.5 must"),
    "below 0": (dict(EDIT, schedule_args={"max_post_steps": -1}), "max_post_steps=-1 must be"),
    "not whole": (dict(EDIT, schedule_args={"max_post_steps": 1.5}), "max_post_steps=1.5 must be"),
    "no threshold": (dict(schedule="edit"), "schedule='edit' needs threshold="),
    "another's": (dict(EDIT, schedule_args={"sure": 0.5}), "schedule='edit' does not take"),
    "no probability": (dict(DMAX, schedule_args={"sure": 2}), "sure=2 must lie in"),
    "not compared": (dict(DMAX, select="entropy"), "compares probabilities"),
    "k": (dict(DMAX, soften_args={"k": 0}), "k=0 must be a whole number"),
    "remask": (dict(DMAX, remask="cap", steps=8), "remask='cap'"),
}


@pytest.mark.parametrize("name", [*BAD])
def test_is_refused(name):
    knobs, told = BAD[name]
    with pytest.raises(ValueError, match=told):
        DenoiseConfig(gen_length=8, **knobs)


def test_a_rule_of_ones_own_may_go_on_without_masks():
    """With `busy`; the built-in ones do so by any way to name them."""
    plain = run(denoiser(), **EDIT)
    again = run(denoiser(), **EDIT | dict(schedule=SCHEDULES["edit"]))
    assert torch.equal(plain.sequences, again.sequences)
    assert plain.num_forwards == again.num_forwards
    fn = SCHEDULES["pyramid"].fn
    with pytest.raises(ValueError, match="has no busy"):
        run(denoiser(), schedule=Schedule(fn, revises=True, outlasts=True))
