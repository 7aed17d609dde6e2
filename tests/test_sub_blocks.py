"""Blocks of a block-causal model that are decoded in sub-blocks, with a cache around each, and the
first token of a block, which the forward that stored the one before it decides."""

from itertools import pairwise

import pytest
import torch
from test_block_causal import block_model, decode, setting
from test_denoise import MASK, VOCAB, seeded
from transformers import LogitsProcessor, SuppressTokensLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from softar.diffusion import block_parity
from softar.diffusion.net import parts
from softar.diffusion.soften import SOFTENERS
from softar.soft import soft_embed


def forwards_of(model, *args, **knobs):
    """-> the output, and of each forward its inputs [B, W, D] and their positions [B, W]."""
    calls = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (kwargs["inputs_embeds"], kwargs["position_ids"])
        ),
        with_kwargs=True,
    )
    try:
        return decode(model, *args, **knobs), calls
    finally:
        hook.remove()


@pytest.mark.parametrize("shift", [0, 1])
def test_sub_blocks_are_decoded_from_left_to_right(shift):
    model, rows = block_model(shift, 8), [[3, 4, 5], [7, 8, 9, 10, 11, 12]]
    out = decode(model, rows, gen_length=14, sub_block_length=2, early_stop=False)
    for r, row in enumerate(rows):
        when = out.committed_at[r, -14 - len(row) :].view(-1)
        parts_of_row = [w[w >= 0] for w in when[: len(when) // 2 * 2].split(2)]
        edges = [(int(w.min()), int(w.max())) for w in parts_of_row if len(w)]
        assert all(a[1] < b[0] for a, b in pairwise(edges))


@pytest.mark.parametrize("sub_block_length", [None, 2])
def test_no_forward_is_spent_behind_the_answer(sub_block_length):
    """The model reads a whole block, and once what is asked for is decoded nothing of the rest is."""
    knobs = dict(sub_block_length=sub_block_length, select="leftmost")
    out = decode(block_model(0, 8), [[*range(1, 9)]], gen_length=3, **knobs)
    assert out.num_forwards == 1 + 3 and out.row_forwards.tolist() == [1 + 3]
    template, knobs = (
        [1, MASK, *range(3, 11)],
        dict(gen_length=0, sub_block_length=sub_block_length),
    )
    for more in ({}, dict(soften="evolving"), dict(schedule="wino", threshold=0.5)):
        assert decode(block_model(0, 8), [template], **knobs | more).num_forwards == 1


@pytest.mark.parametrize("soften", [*SOFTENERS])
@pytest.mark.parametrize("rule", [{}, dict(schedule="wino", threshold=0.2), dict(threshold=0.3)])
def test_an_answer_is_that_of_its_whole_block(rule, soften):
    """Its first tokens are, however soon no more is asked for."""
    if rule.get("schedule") == "wino" and soften == "evolving":
        soften = "soft-token"
    knobs = dict(soften=soften, early_stop=False, **rule)
    whole, some = (decode(block_model(0, 8), [[3, 4]], gen_length=n, **knobs) for n in (6, 3))
    assert torch.equal(some.completions, whole.completions[:, :3])
    assert some.num_forwards <= whole.num_forwards


def test_sub_blocks_share_the_steps():
    model = block_model(0, 8)
    out = decode(
        model, [[*range(1, 9)]], gen_length=16, sub_block_length=4, steps=8, early_stop=False
    )
    assert out.num_forwards == 2 + 8
    counts = out.committed_at[0, 8:].unique(return_counts=True)[1]
    assert counts.tolist() == [2] * 8


@pytest.mark.parametrize("seed", range(12))
def test_a_row_alone_is_a_row_of_a_batch_with_an_approximate_cache(seed):
    rows, knobs, _ = setting(seed)
    model = block_model(seed % 2, 8)
    knobs |= dict(cache=["dual", "prefix"][seed // 2 % 2], sub_block_length=[1, 2, 4][seed % 3])
    out = decode(model, rows, **knobs)
    assert not (out.sequences == MASK).any()
    for r, row in enumerate(rows):
        if knobs["gen_length"] or MASK in row:
            alone = decode(model, [row], [r], **knobs)
            assert torch.equal(alone.sequences[0], out.sequences[r, -alone.sequences.shape[1] :]), r
            assert alone.row_forwards[0] == out.row_forwards[r], r
            assert alone.row_stores[0] == out.row_stores[r], r


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_a_window_is_what_the_cache_does_not_hold(cache, shift):
    """First the block, then the sub-block, or all from there on; with shifted logits the position
    before it too, which says what comes first. Where each sub-block is one forward, nothing is
    approximate."""
    model, row = block_model(shift, 8), [*range(1, 9)]
    knobs = dict(gen_length=8, sub_block_length=4, early_stop=False)
    out, calls = forwards_of(model, [row], cache=cache, **knobs)
    spans = [(int(at[0, 0]), int(at[0, -1]) + 1) for _, at in calls]
    second = (11 if shift else 12, 16)
    first = (8, 12 if cache == "dual" else 16)
    masks = [4 - shift, 4]  # the first token is the prefill's
    assert spans == [(0, 8), (8, 16)] + [first] * (masks[0] - 1) + [(8, 16)] + [second] * 3
    assert out.token_forwards == sum(hi - lo for lo, hi in spans)
    at_once = [
        decode(model, [row], cache=c, threshold=1e-9, **knobs).sequences for c in (cache, "exact")
    ]
    assert torch.equal(*at_once)


@pytest.mark.parametrize("soften", ["soft-token", "soft-mask", "evolving"])
@pytest.mark.parametrize(("cache", "rescale"), [("exact", None), ("exact", "l2"), ("dual", None)])
def test_the_next_window_shows_the_mixtures_that_were_reported(cache, rescale, soften):
    model, told = block_model(1, 8), []
    knobs = dict(
        gen_length=12,
        sub_block_length=4,
        early_stop=False,
        soften=soften,
        cache=cache,
        rescale=rescale,
    )
    _, calls = forwards_of(model, [[*range(1, 12)], [5, 6, 7]], callback=told.append, **knobs)
    begin, seen = torch.tensor([0, 8]), 0  # columns of the first tokens
    for one, then in pairwise(told):
        if one["where"] is None or one["block"] != then["block"]:
            continue
        embeds, positions = calls[then["step"]]
        mixtures = soft_embed(one["soft"], model.get_input_embeddings(), rescale=rescale)
        rows, cols = one["where"].nonzero(as_tuple=True)
        here = positions[rows] == (cols - begin[rows])[:, None]
        shown = embeds[rows][here & (here.cumsum(-1) == here.sum(-1, keepdim=True))]
        inside = here.any(-1)
        torch.testing.assert_close(shown, mixtures[inside], atol=1e-6, rtol=0)
        seen += len(shown)
    assert seen > 10


@pytest.mark.parametrize("prompt", [3, 8, 11])
def test_a_block_begins_with_what_its_prefix_says(prompt):
    """As an autoregressive model does, for no forward of its own."""
    model = block_model(1, 4)
    knobs = dict(gen_length=12, early_stop=False, select="leftmost")
    out = decode(model, [[*range(1, prompt + 1)]], **knobs)
    ids, net = out.sequences, parts(model)
    place = torch.arange(ids.shape[1])
    sees = (place // 4 <= place[:, None] // 4)[None, None]
    with torch.no_grad():
        logits = net.head(net.body(net.embedding(ids), sees, place[None], None))
    logits[..., MASK] = -torch.inf
    firsts = [c for c in range(-(-prompt // 4) * 4, prompt + 12, 4)]
    assert ids[0, firsts].tolist() == logits[0, [c - 1 for c in firsts]].argmax(-1).tolist()
    blocks = -(-(prompt + 12) // 4) - prompt // 4
    masks = 12 - len(firsts)
    assert out.num_forwards == bool(prompt // 4) + blocks - 1 + masks


@pytest.mark.parametrize("seed", range(6))
def test_as_the_published_sampler_where_that_has_no_defect(seed):
    """But for tokens behind the answer, of which it has a block and one more."""
    torch.manual_seed(seed)
    prompt = [1, 3, 7, 9, 14, 16][seed]
    row = torch.randint(1, MASK, (prompt,)).tolist()
    model = block_model(1, 8)
    no_mask = SuppressTokensLogitsProcessor([MASK])
    knobs = dict(threshold=0.3, sub_block_length=4, end_ids=(0,), logits_processor=no_mask)
    own = decode(model, [row], gen_length=16, **knobs)
    public = (
        decode(model, [row], gen_length=16, block_length=8, parity="fast_dllm_v2", **knobs)
        .sequences[0, prompt:]
        .tolist()
    )
    assert len(public) == 16 - prompt % 8 + 1
    stop = public.index(0) + 1 if 0 in public else min(16, len(public))
    assert own.completions[0, :stop].tolist() == public[:stop]


class MoreMasks(LogitsProcessor):
    """So much is added to the mask's logit."""

    def __init__(self, more):
        self.more = more

    def __call__(self, ids, scores):
        scores = scores.clone()
        scores[:, MASK] += self.more
        return scores


def published(model, row, processor, blocks, b, sub, threshold, most):
    """Fast-dLLM v2's loop by the words of its specification, without a cache and an end token -> ids,
    forwards, whether it has an end, and how many tokens before blocks were the mask and then decided. A
    sub-block gets `most` forwards."""
    net, forwards, ids, appended = parts(model), 0, [*row], []

    def outcome(has_end):
        return ids, forwards, has_end, sum(ids[c] != MASK for c in appended)

    def proposals():
        place = torch.arange(len(ids))
        sees = (place // b <= place[:, None] // b)[None, None]
        with torch.no_grad():
            hidden = net.body(net.embedding(torch.tensor([ids])), sees, place[None], None)
            return processor(None, net.head(hidden)[0].float()).softmax(-1).max(-1)

    if len(ids) > b:
        forwards += 1
        if len(ids) % b == 0:
            ids.append(int(proposals().indices[-1]))
    for _ in range(blocks):
        ids += [MASK] * (b - len(ids) % b)
        for lo in range(len(ids) - b, len(ids), sub):
            for _ in range(most):
                masks = [c for c in range(lo, lo + sub) if ids[c] == MASK]
                if not masks:
                    break
                forwards += 1
                prob, token = proposals()
                at = {c: c - 1 if c % b else c for c in masks}  # a first place reads its own
                best = max(masks, key=lambda c: (float(prob[at[c]]), -c))
                for c in masks:
                    if c == best or prob[at[c]] > threshold:
                        ids[c] = int(token[at[c]])
            if MASK in ids[lo : lo + sub]:
                return outcome(False)
        forwards += 1
        ids.append(int(proposals().indices[-1]))
        appended += [len(ids) - 1] * (ids[-1] == MASK)
    return outcome(True)


# prompt, seed, what is added to the mask's logit -> does it end, and how many tokens before a block
# were the mask first?
PROPOSES_MASKS = {
    (1, 0, -1.0): (True, 1),
    (3, 28, -1.0): (True, 1),
    (6, 31, -1.0): (True, 2),
    (8, 13, -1.0): (True, 1),
    (9, 14, -1.0): (False, 1),
    (8, 16, 0.5): (False, 2),
    (11, 0, 50.0): (False, 0),
    (12, 0, 50.0): (False, 0),
}


@pytest.mark.parametrize("case", PROPOSES_MASKS)
@pytest.mark.parametrize("parity", ["fast_dllm_v2", "fast_dllm_v2_batch"])
def test_masks_that_are_proposed_stay_until_there_is_no_end(parity, case, monkeypatch):
    """One that the forward before a block proposes as well: the block decides it by its own output,
    and behind the last block it stays."""
    monkeypatch.setattr(block_parity, "ENDLESS", 12)
    (prompt, seed, more), model = case, block_model(1, 4)
    row = torch.randint(1, MASK, (prompt,), generator=seeded(seed)).tolist()
    ids, forwards, *outcome = published(model, row, MoreMasks(more), 3, 4, 2, 0.4, 12)
    assert tuple(outcome) == PROPOSES_MASKS[case]
    knobs = dict(block_length=4, sub_block_length=2, threshold=0.4, end_ids=(VOCAB - 1,))
    processor = dict(logits_processor=MoreMasks(more))
    out = decode(model, [row], gen_length=12, parity=parity, **processor, **knobs)
    got = out.sequences[0].tolist()
    assert got[: len(ids)] == ids and {*got[len(ids) :]} <= {MASK}
    assert out.num_forwards == forwards


def published_batch(rows, gen_length, **knobs):
    no_mask = SuppressTokensLogitsProcessor([MASK])
    knobs |= dict(parity="fast_dllm_v2_batch", logits_processor=no_mask, block_length=4)
    return forwards_of(block_model(1, 4), rows, gen_length=gen_length, threshold=0.9, **knobs)


def test_the_published_batch_stores_blocks_one_by_one():
    """Where the row that was being decoded has stopped, and the others are in their prompts."""
    rows = [[3, 4], [*range(1, 11)]]
    free, _ = published_batch(rows, 4, end_ids=(0,))
    first = free.completions[0, :2].tolist()
    out, calls = published_batch(rows, 4, end_ids=(first[1],))
    assert first[0] != first[1] and first[1] not in rows[0]
    assert out.completions[0].unique().tolist() == sorted(first)
    assert [embeds.shape[1] for embeds, _ in calls] == [4] * len(calls)
    assert torch.equal(out.sequences[1], free.sequences[1])


@pytest.mark.parametrize("longest", [8, 9, 10])
def test_the_published_batch_forgets_first_tokens(longest):
    """That of a prompt of whole blocks, where another is longer by two: its own output decides it
    in the block. Where it is longer by one, that one loses its last token."""
    rows = [[1, 2, 3], [*range(1, 9)], [*range(11, 11 + longest)]]
    out, _ = published_batch(rows, 4, end_ids=(0,))
    width = max(map(len, rows))
    short, whole, last = (out.committed_at[r, width - len(row) + 8] for r, row in enumerate(rows))
    assert (whole > short) == (longest == 10) and whole >= short
    assert (last >= 0) == (longest < 10)


@pytest.mark.parametrize("sub_block_length", [None, 1, 2])
def test_a_streamer_gets_each_token_once(sub_block_length):
    class Recorder(BaseStreamer):
        values, ended = (), 0

        def put(self, value):
            self.values = (*self.values, *value[0].tolist())

        def end(self):
            self.ended += 1

    streamer, row = Recorder(), [*range(1, 7)]
    knobs = dict(gen_length=9, sub_block_length=sub_block_length, early_stop=False)
    out = decode(block_model(1, 4), [row], streamer=streamer, **knobs)
    assert [*streamer.values] == out.sequences[0].tolist() and streamer.ended == 1
