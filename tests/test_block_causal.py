"""Block-causal models: a grid of blocks from each row's own first token, an exact cache of those that
are finished, and every softener, rule and selector inside of the current one."""

import functools
import random

import pytest
import torch
from test_denoise import EOS, MASK, SIZES, denoiser, left_padded, seeded
from tiny import Largest, counted
from transformers import RepetitionPenaltyLogitsProcessor

from softar.diffusion import DenoiseConfig, block_reader, denoise
from softar.diffusion.block_causal import BlockCausal
from softar.diffusion.block_reader import PrefixCache
from softar.diffusion.families import (
    Fast_dLLM_QwenForCausalLM,
    FastDllmConfig,
    SdarConfig,
    SDARForCausalLM,
)
from softar.diffusion.grid import Grid
from softar.diffusion.net import parts
from softar.diffusion.soften import SOFTENERS


@functools.cache
def block_model(shift=0, block_length=4):
    """A tiny random one in float64, where two ways to compute the same agree in every decision."""
    kinds = ((SDARForCausalLM, SdarConfig), (Fast_dLLM_QwenForCausalLM, FastDllmConfig))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make, config = kinds[shift]
        head_dim = {} if shift else {"head_dim": 8}
        return make(config(**SIZES, block_length=block_length, **head_dim)).double().eval()


TAKE_BACK = ("p2", "wino", "ancestral")  # the last with remask
WRITE_OVER = ("edit", "overwrite")


def setting(seed):
    """Rows, options and model of one case."""
    r = random.Random(seed)
    rows = [[r.randrange(1, EOS) for _ in range(r.randint(1, 9))] for _ in range(3)]
    knobs = dict(gen_length=r.choice([1, 5, 8, 14]))
    if r.random() < 0.4:  # holes, in the middle of a prompt too
        for row in rows:
            row[r.randrange(len(row))] = MASK
        knobs["gen_length"] = r.choice([0, 6])
    knobs |= r.choice(
        [
            {},
            dict(threshold=0.3),
            dict(schedule="dynamic", threshold=0.3),
            dict(select="entropy", entropy_bound=1.0),
            dict(select="leftmost"),
            dict(temperature=1.0, top_k=9),
            dict(schedule="pyramid", alg_temp=0.5),
            dict(schedule="p2"),
            dict(schedule="wino", threshold=0.2),
            dict(schedule="refine", threshold=0.3, schedule_args={"kl": 0.5, "most": 4}),
            dict(schedule="edit", threshold=0.3, schedule_args={"editing_threshold": 0.2}),
            dict(
                schedule="edit", threshold=0.3, temperature=1.0, schedule_args={"max_post_steps": 2}
            ),
            dict(schedule="overwrite", rescale=r.choice([None, "norm"])),
            dict(schedule="overwrite", threshold=0.2),
            dict(schedule="ancestral", steps=30, remask="cap", remask_args={"eta": 0.5}),
            dict(factor=2.0),
            dict(schedule="linear", steps=30, select="margin"),
            dict(schedule="cosine", steps=30, select="random"),
            dict(steps=30, remask="conf", select="entropy"),
            dict(steps=30, ends_last=True, alg_temp=0.2),
        ]
    )
    soft = [name for name in SOFTENERS if name != "hard"]
    if (
        knobs.get("schedule") in TAKE_BACK or "remask" in knobs
    ):  # evolving revises too, which goes with no remask
        soft.remove("evolving")
    if knobs.get("schedule") != "refine" and knobs.get("rescale") is None:
        soft.append("hard")
    knobs |= dict(
        soften=r.choice(soft),
        cfg_scale=r.choice([0.0, 0.0, 1.5]),
        grid=r.choice(["start", "end"]),
        early_stop=r.choice([None, False]),
        end_ids=tuple(range(r.choice([1, 6]))),
    )
    b = r.choice([1, 3, 4, 8])
    knobs["sub_block_length"] = r.choice([None] + [s for s in range(1, b + 1) if b % s == 0])
    return rows, knobs, block_model(r.choice([0, 1]), b)


def decode(model, rows, seeds=None, **knobs):
    rng = [seeded(s) for s in (range(len(rows)) if seeds is None else seeds)]
    return denoise(model, *left_padded(rows), rng=rng, **knobs)


@pytest.mark.parametrize("seed", range(70))
def test_a_row_of_a_batch_is_the_row_alone_and_the_cache_is_exact(seed):
    rows, knobs, model = setting(seed)
    out = decode(model, rows, history=True, **knobs)
    width = max(map(len, rows))
    assert out.sequences.shape == (3, width + knobs["gen_length"])
    assert not (out.sequences == MASK).any()
    assert len(out.states) == out.num_forwards + 1
    assert torch.equal(out.states[-1], out.sequences)
    for before, after in zip(out.states, out.states[1:], strict=False):
        taken_back = (after == MASK) & (knobs.get("schedule") in TAKE_BACK or "remask" in knobs)
        stands = before.where((before == MASK) | taken_back, after)
        # nothing that stands is changed, but by what revises
        revises = knobs["soften"] == "evolving" or knobs.get("schedule") in WRITE_OVER
        assert torch.equal(stands, before) or revises
    again = decode(model, rows, cache="off", **knobs)
    assert torch.equal(again.sequences, out.sequences)
    torch.testing.assert_close(again.confidence, out.confidence, atol=1e-6, rtol=0, equal_nan=True)
    assert again.num_forwards <= out.num_forwards  # which are store forwards more
    for r, row in enumerate(rows):
        if knobs["gen_length"] or MASK in row:
            alone = decode(model, [row], [r], **knobs)
            T = alone.sequences.shape[1]
            assert torch.equal(alone.sequences[0], out.sequences[r, -T:]), r
            assert alone.num_forwards <= out.num_forwards
            assert alone.row_forwards[0] == alone.num_forwards
            assert alone.row_stores[0] == alone.store_forwards
            assert alone.row_forwards[0] == out.row_forwards[r]
            assert alone.row_stores[0] == out.row_stores[r]


@pytest.mark.parametrize("seed", range(0, 70, 3))
def test_rows_that_wait_leave_the_batch(seed, monkeypatch):
    """Whether keys and values are moved for that or not: the same decode, of no more positions."""
    rows, knobs, model = setting(seed)
    outs = []
    for least in (1, 99):
        monkeypatch.setattr(block_reader, "LONG", least)
        with counted(model.model) as sizes:
            outs.append(decode(model, rows, history=True, **knobs))
        assert outs[-1].token_forwards == sum(b * t for b, t in sizes)
    moved, stay = outs
    for name in ("sequences", "committed_at", "row_forwards", "row_stores"):
        assert torch.equal(getattr(moved, name), getattr(stay, name)), name
    torch.testing.assert_close(moved.confidence, stay.confidence, equal_nan=True)
    most = len(rows) * sum(t for _, t in sizes) * (2 if knobs["cfg_scale"] else 1)
    assert moved.token_forwards <= stay.token_forwards <= most


@pytest.mark.parametrize("threshold", [0.05, 0.3])
@pytest.mark.parametrize("least", [1, 99])
def test_a_batch_computes_what_its_rows_do_alone(threshold, least, monkeypatch):
    """Of rows that fit the grid alike, also where one ends early: no position more, if keys and values
    are moved."""
    monkeypatch.setattr(block_reader, "LONG", least)
    model, rows = block_model(), torch.randint(1, EOS, (4, 8), generator=seeded()).tolist()
    ends = decode(model, rows, gen_length=16).completions[:2, 3].tolist()
    knobs = dict(gen_length=16, threshold=threshold, end_ids=tuple(ends))
    out = decode(model, rows, **knobs)
    alone = [decode(model, [row], [r], **knobs) for r, row in enumerate(rows)]
    assert [out.sequences[r].tolist() for r in range(4)] == [a.sequences[0].tolist() for a in alone]
    most = sum(a.token_forwards for a in alone)
    assert out.token_forwards == most if least == 1 else most <= out.token_forwards
    assert out.token_forwards < 4 * max(a.token_forwards for a in alone)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("soften", [*SOFTENERS])
def test_later_blocks_read_final_tokens_only(soften, shift):
    """What was decoded softly is read as the tokens that came of it: two blocks are one, and one
    behind its result."""
    model, rows = block_model(shift), [[3, 4, 5, 6], [7, 8, 9, 10]]
    knobs = dict(soften=soften, early_stop=False)
    two = decode(model, rows, gen_length=8, **knobs).sequences
    one = decode(model, rows, gen_length=4, **knobs).sequences
    assert torch.equal(two[:, :8], one)
    assert torch.equal(decode(model, one.tolist(), gen_length=4, **knobs).sequences, two)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("soften", [*SOFTENERS])
def test_a_template_is_read_as_tokens_behind_its_block(soften, shift):
    """Also where the next block, or its first sub-block, begins with the caller's tokens."""
    row = [3, 4, MASK, MASK, 5, 6, 7, MASK, 8, 9, 10, MASK]
    knobs = dict(soften=soften, gen_length=0, sub_block_length=2)
    out = decode(block_model(shift), [row], **knobs).sequences
    for seen in (4, 8):
        rest = [[*out[0, :seen].tolist(), *row[seen:]]]
        assert torch.equal(decode(block_model(shift), rest, **knobs).sequences, out)


@pytest.mark.parametrize("prompt", [3, 8, 40])
def test_a_forward_costs_the_block_whatever_the_prompt(prompt):
    """One forward that stores the prompt's whole blocks, one after each block but the last, and one
    for each mask: all of a block's length but the first."""
    model, widths = block_model(), []
    hook = model.model.register_forward_hook(
        lambda module, args, out: widths.append(out.last_hidden_state.shape[1])
    )
    try:
        row, knobs = [list(range(1, prompt + 1))], dict(early_stop=False, select="leftmost")
        out = decode(model, row, gen_length=12, **knobs)
    finally:
        hook.remove()
    before = prompt // 4 * 4
    blocks = -(-(prompt + 12) // 4) - prompt // 4
    assert widths[: bool(before)] == [before] * bool(before)
    assert set(widths[bool(before) :]) == {4}
    assert out.num_forwards == len(widths) == bool(before) + blocks - 1 + 12
    assert out.token_forwards == sum(widths)


@pytest.mark.parametrize("rows", [1, 3], ids=["alone", "ragged"])
@pytest.mark.parametrize("soften", ["hard", "soft-token", "evolving"])
def test_a_step_writes_nothing_of_the_prompts_length_but_numbers(soften, rows, monkeypatch):
    """A column of the canvas has some, one or a byte for each place of a block, and keys and values
    that stand already; nothing of the model's width, the vocabulary or a layer."""
    config = SdarConfig(**block_model().config.to_diff_dict() | dict(num_key_value_heads=2))
    config.max_position_embeddings = 512
    model = SDARForCausalLM(config).eval()
    seen, step = {}, BlockCausal.step

    def watched(self, block, index):
        with Largest() as largest:
            told = step(self, block, index)
        seen.setdefault(block.places, []).append(largest.numel)
        return told

    monkeypatch.setattr(BlockCausal, "step", watched)
    most = []
    for prompt in (41, 401):
        seen.clear()
        ids = [[*range(1, 42)] * (prompt // 41) + [7] * (prompt % 41)] * rows
        ids = [row[7 * r :] for r, row in enumerate(ids)]
        decode(model, ids, gen_length=12, soften=soften, early_stop=False)
        others = [*seen.values()][1:]  # the first makes room for keys and values
        most.append(max(map(max, others)))
    assert most[1] <= max(most[0], rows * (401 + 16) * (4 if rows > 1 else 1))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("how", [{}, dict(parity="dmax", block_length=4)], ids=["own", "dmax"])
def test_a_long_prompt_is_read_in_pieces_that_count_once(how, shift, monkeypatch):
    """Whatever they are, the tokens, the forwards and who decided what are the same."""
    knobs = dict(gen_length=6, history=True) | how
    whole = decode(block_model(shift), [[*range(1, 23)], [*range(1, 4)]], **knobs)
    monkeypatch.setattr(block_reader, "CHUNK", 8)
    pieces = decode(block_model(shift), [[*range(1, 23)], [*range(1, 4)]], **knobs)
    for name in ("sequences", "committed_at", "row_forwards", "row_stores"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name)), name
    assert whole.num_forwards == pieces.num_forwards and len(whole.states) == len(pieces.states)
    assert whole.store_forwards == pieces.store_forwards
    assert whole.token_forwards == pieces.token_forwards


def test_forwards_inside_a_block_leave_nothing():
    """Keys and values before the block are those of its prefix alone, after every forward."""
    model, row = block_model(), list(range(1, 9))
    kept = []
    update = PrefixCache.update

    def watched(self, keys, values, layer, *args, **kwargs):
        both = update(self, keys, values, layer, *args, **kwargs)
        if layer == 1 and self.lo >= 8:
            kept.append(both[0][:, :, :8].clone())
        return both

    PrefixCache.update = watched
    try:
        decode(model, [row], gen_length=8, soften="soft-token", early_stop=False)
    finally:
        PrefixCache.update = update
    assert len(kept) > 8 and all(torch.equal(one, kept[0]) for one in kept)


def test_a_row_that_has_ended_is_filled_and_others_go_on():
    model, rows = block_model(), [[3, 4, 5], [7, 8, 9, 10, 11]]
    free = decode(model, rows, gen_length=12, early_stop=False)
    first = free.completions[0, :4].tolist()
    end = next(i for i in first if i not in free.completions[1].tolist())
    out = decode(model, rows, gen_length=12, end_ids=(end,))
    stop = -(-(3 + first.index(end) + 1) // 4) * 4 - 3  # the end of its block
    assert out.completions[0, stop:].tolist() == [end] * (12 - stop)
    assert torch.equal(out.sequences[1], free.sequences[1])
    assert decode(model, rows[:1], gen_length=12, end_ids=(end,)).num_forwards < free.num_forwards


def test_places_and_columns():
    """By arithmetic of its own: each row's blocks from its first token, answers in one block."""
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    grid = Grid(real, 3, 2)
    assert (grid.first, grid.number, grid.length) == (2, 4, 8)
    columns, there = grid.places(0, 8)
    tokens = [
        [c for c, t in zip(cs, ts, strict=True) if t]
        for cs, ts in zip(columns.tolist(), there.tolist(), strict=True)
    ]
    assert tokens == [[2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert grid.inside(4, 6).nonzero().tolist() == [[0, 4], [0, 5], [1, 4], [1, 5]]
    ended = Grid(real, 3, 2, at="end")
    assert ended.inside(6, 8).nonzero().tolist() == [[0, 5], [0, 6], [1, 5], [1, 6]]


@pytest.mark.parametrize("n", range(1, 18))
def test_rows_that_the_head_gets_more_change_nothing(n):
    """Only where there are 4 to 15 of them, in float32 on a processor, many tokens and a wide head."""
    config = block_model().config.to_diff_dict() | dict(vocab_size=4096, hidden_size=256)
    model, got = SDARForCausalLM(SdarConfig(**config)), []
    hidden = torch.randn(n, 256, generator=seeded(n)) / 16
    wanted = model.lm_head(hidden)
    model.lm_head.register_forward_pre_hook(lambda module, args: got.append(len(args[0])))
    torch.testing.assert_close(parts(model).head(hidden), wanted, atol=1e-5, rtol=0)
    is_on_mkl = torch.backends.mkl.is_available()
    assert got == [16 if 4 <= n < 16 and is_on_mkl else n]
    parts(model).head(hidden[None]), parts(model.double()).head(hidden.double())
    assert got[1:] == [1, n] and parts(block_model()).head is block_model().lm_head


@pytest.mark.parametrize("shift", [0, 1])
def test_a_processor_sees_nothing_behind_the_answer(shift):
    """Where other rows make room that holds end tokens."""
    rows, penalty = [[3, 4, 5], [*range(6, 15)]], RepetitionPenaltyLogitsProcessor(3.0)
    seen = []

    def watched(ids, scores):
        seen.append(ids.shape[1])
        return penalty(ids, scores)

    knobs = dict(gen_length=6, early_stop=False, logits_processor=watched)
    out = decode(block_model(shift), rows, **knobs)
    assert {*seen} == {9 + 6}
    alone = decode(block_model(shift), rows[1:], [1], **knobs)
    assert torch.equal(alone.completions[0], out.completions[1])


ROW = [[3, 4, 5]]
BAD = {
    "another length": (dict(block_length=3, gen_length=6), "block_length=3 contradicts the model"),
    "an approximate cache": (dict(cache="dual", gen_length=4), "give a sub_block_length below 4"),
    "of one sub-block": (
        dict(cache="prefix", sub_block_length=4, gen_length=4),
        "cache='prefix' says nothing beyond the exact cache",
    ),
    "sub-blocks that don't fit": (dict(sub_block_length=3, gen_length=4), "blocks of 4: choose"),
    "no sub-blocks": (dict(sub_block_length=0, gen_length=4), "sub_block_length=0"),
    "too few steps": (dict(gen_length=8, steps=1), "steps=1 cannot be shared by the 3 blocks"),
    "steps of sub-blocks": (
        dict(gen_length=8, steps=4, sub_block_length=2),
        "steps=4 cannot be shared by the 5 blocks",
    ),
    "no room": (dict(gen_length=62), "do not fit into the model's 64 positions in blocks of 4"),
}


@pytest.mark.parametrize("name", [*BAD])
def test_what_a_block_causal_model_cannot_do(name):
    knobs, told = BAD[name]
    with pytest.raises(ValueError, match=told):
        decode(block_model(), ROW, **knobs)


@pytest.mark.parametrize("prompt", [1, 3, 4, 5])
def test_blocks_behind_the_prompt(prompt):
    """By a mask of its own: the prompt's first block is short, and the answer begins one."""
    model, row = block_model(), list(range(1, prompt + 1))
    out = decode(model, [row], gen_length=4, grid="end", steps=1, early_stop=False)
    ids = torch.tensor([row + [MASK] * 4])
    number = (torch.arange(prompt + 4) - prompt) // 4
    sees = (number[None] <= number[:, None])[None, None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=sees).logits[0, prompt:]
    logits[:, MASK] = -torch.inf
    assert out.completions[0].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("knobs", [dict(cache="exact"), dict(sub_block_length=2), dict(grid="end")])
def test_for_block_causal_models_alone(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}=.* is for block-causal models"):
        denoise(denoiser(), *left_padded(ROW), config=DenoiseConfig(gen_length=4, **knobs))


def test_an_end_token_fills_neither_the_blanks_of_a_template_nor_slots_with_a_say():
    """By default, though whatever is decoded is an end token here."""
    ends = dict(end_ids=tuple(range(MASK)))
    template = [[1, MASK, 3, 4, 5, 6, 7, 8, 9, 10, MASK, 11]]
    out = decode(block_model(), template, gen_length=0, **ends)
    assert (out.committed_at[0] >= 0).nonzero()[:, 0].tolist() == [1, 10]
    out = decode(
        block_model(), [[3, 2, 3, 4]], gen_length=12, allowed={12: [7, 8], 15: [7, 8]}, **ends
    )
    assert {out.sequences[0, c].item() for c in (12, 15)} <= {7, 8}
