"""The masked-diffusion loop: what holds for every combination of its parts, what equals what,
draws, record, errors."""

import functools
import io
import itertools
import math
import random
import re
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import Largest, chi_square, counted, left_padded, seeded, tokenizer_of, with_lora
from transformers import BertConfig, BertForMaskedLM, TextStreamer
from transformers.generation.streamers import BaseStreamer, TextDiffusionStreamer

from softar.diffusion import DenoiseConfig, DenoiseOutput, denoise, load
from softar.diffusion.architectures import (
    DreamConfig,
    DreamForMaskedDiffusion,
    LladaConfig,
    LladaForMaskedDiffusion,
)
from softar.diffusion.decoders import denoise_config
from softar.diffusion.net import parts
from softar.diffusion.reader import Reader
from softar.diffusion.remask import REMASKED, REMASKS, remask
from softar.diffusion.schedules import SCHEDULES, Block, Quota, Step
from softar.diffusion.select import SELECTORS, Belief, Draws, mk_selector
from softar.diffusion.soften import SOFTENERS, Softener, evolving
from softar.soft import Soft, dense

VOCAB, EOS, MASK = 48, 45, 46
FAMILIES = ("llada", "dream")
CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
PROMPTS = ([5, 11, 12, 13, 14], [5, 21], [5, 31, 32])
HOLED = ([5, MASK, 12, MASK, MASK, 15, MASK], [MASK, 22, MASK, MASK], [5, 31, MASK, 33, 34, MASK])


SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    mask_token_id=MASK,
    eos_token_id=EOS,
    tie_word_embeddings=False,
    initializer_range=0.4,
)


@functools.cache
def denoiser(family="llada", dtype=torch.float32, **changes):
    """A tiny random masked-diffusion model in eval mode; the same weights for the same
    arguments."""
    sizes = SIZES | dict(bos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "llada":
            model = LladaForMaskedDiffusion(LladaConfig(**sizes | changes))
        else:
            model = DreamForMaskedDiffusion(DreamConfig(**sizes | changes))
    return model.to(dtype).eval()


def run(model, rows=PROMPTS, **knobs) -> DenoiseOutput:
    """denoise() on left-padded rows; settings of DenoiseConfig and of denoise side by side."""
    settings = {k: knobs.pop(k) for k in [*knobs] if k in DenoiseConfig.__dataclass_fields__}
    config = DenoiseConfig(**{"gen_length": 8, **settings})
    return denoise(model, *left_padded(rows), config=config, **knobs)


# -- every combination of the parts

COMBINATIONS = 130


def combination(seed):
    """-> family, rows, knobs: any of the loop's parts together, most of which go together."""
    r = random.Random(seed)
    schedule = r.choice([*SCHEDULES])
    gen_length = r.choice([0, 4, 8, 8])
    knobs = dict(
        gen_length=gen_length,
        schedule=schedule,
        block_length=r.choice([None, 1, 2, 4, 4]) if gen_length else r.choice([None, 2, 3]),
        steps=r.choice([None, 4, 8, 16])
        if SCHEDULES[schedule].takes_steps is not False or r.random() < 0.1
        else None,
        select=r.choice([*SELECTORS]),
        cache=r.choice([None, "prefix", "dual"]),
        soften=r.choice([*SOFTENERS]),
        rescale=r.choice([None, None, "l2", "norm"]),
        schedule_args={"dilation": r.choice([1, 2])}
        if schedule == "pyramid"
        else {"eps": r.choice([1e-3, 0.1]), "rounding": r.choice(["down", "even"])}
        if schedule == "linear"
        else {"eta": r.choice([0.0, 1.0, 2.0])}
        if schedule == "p2" and r.random() < 0.5
        else {},
        temperature=r.choice([0.0, 0.0, 0.7, 1.5]),
        top_k=r.choice([None, None, 5]),
        top_p=r.choice([None, None, 0.8]),
        alg_temp=r.choice([0.0, 0.0, 0.5]),
        cfg_scale=r.choice([0.0, 0.0, 1.5]),
        cfg_keep_ids=r.choice([None, tuple(range(1, 30))]),
        ban_eos=r.random() < 0.2,
        ends_last=r.random() < 0.2,
        early_stop=r.random() < 0.3,
        end_ids=r.choice([None, None, tuple(range(8))]),  # many ends, so that rows do end
    )
    if schedule == "refine":
        knobs["schedule_args"] = r.choice([{}, {"kl": 1.0, "most": 3}])
        if r.random() < 0.9:
            knobs["soften"] = r.choice([name for name in SOFTENERS if name != "hard"])
    if knobs["soften"] == "hard" and r.random() < 0.9:
        knobs["rescale"] = None
    if SCHEDULES[schedule].compares == "threshold":
        knobs["threshold"] = r.choice([0.2, 0.9])
    if schedule == "factor":
        knobs["factor"] = r.choice([0.8, 2.0])
    if SCHEDULES[schedule].compares in ("threshold", "factor") and r.random() < 0.9:
        knobs |= dict(select=r.choice(["confidence", "margin"]), alg_temp=0.0)
    if schedule == "entropy-bound":
        knobs |= dict(entropy_bound=r.choice([0.1, 4.0]), select="entropy", alg_temp=0.0)
    if schedule == "ancestral":
        knobs |= dict(select=r.choice(["confidence", "random"]), alg_temp=0.0)
    if knobs["soften"] == "soft-mask":
        knobs["soften_args"] = r.choice(
            [{}, dict(scheduling="linear"), dict(algorithm="temperature", temperature=0.5)]
        )
    shares_out = SCHEDULES[schedule].takes_steps and not SCHEDULES[schedule].revises
    if shares_out and knobs["steps"] and r.random() < 0.6:
        knobs["remask"] = r.choice([*REMASKS])
        knobs["remask_args"] = {} if knobs["remask"] == "conf" else r.choice([{}, {"eta": 0.5}])
        if schedule not in REMASKED:
            knobs |= dict(schedule="uniform", schedule_args={})
    # what does nothing is refused
    if knobs["cfg_scale"] == 0:
        knobs["cfg_keep_ids"] = None
    if knobs["temperature"] == 0:
        knobs |= dict(top_k=None, top_p=None)
    if mk_selector(knobs["select"]).is_random:
        knobs["alg_temp"] = 0.0
    if knobs["block_length"] is None:
        knobs["early_stop"] = False
        if not gen_length:
            knobs["cache"] = None
    rows = [[r.randrange(1, EOS) for _ in range(r.randint(1, 7))] for _ in range(3)]
    if gen_length == 0 or r.random() < 0.4:
        rows = [[MASK if r.random() < 0.5 else token for token in row] for row in rows]
    return r.choice(FAMILIES), rows, knobs


class Combined(NamedTuple):
    """One combination, run: what was asked, and what came of it."""

    family: str
    rows: list[list[int]]
    knobs: dict
    canvas: torch.Tensor  # [B, L] before the first forward
    out: DenoiseOutput
    calls: list[dict]  # of the callback
    sizes: list[tuple[int, int]]  # rows and columns of each forward

    @property
    def fixed(self):
        return self.canvas != MASK

    @property
    def decided(self):
        return self.out.committed_at >= 0


@functools.cache
def combined(seed) -> Combined | None:
    """None where the combination is refused: by a ValueError that names a value, before the first
    forward. The caller's tensors are never written to."""
    family, rows, knobs = combination(seed)
    model = denoiser(family, torch.float64)
    ids, mask = left_padded(rows)
    before, calls = (ids.clone(), mask.clone()), []
    try:
        with counted(model.model) as sizes:
            out = denoise(
                model,
                ids,
                mask,
                config=DenoiseConfig(**knobs),
                rng=[seeded(s) for s in range(3)],
                callback=calls.append,
                history=True,
            )
    except ValueError as refusal:
        assert "=" in str(refusal) and not sizes, refusal
        return None
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])
    canvas = torch.cat([ids, torch.full((3, knobs["gen_length"]), MASK)], 1)
    return Combined(family, rows, knobs, canvas, out, calls, sizes)


def every_combination(check):
    """A test of what holds for whatever is combined: check(Combined)."""

    @pytest.mark.parametrize("seed", range(COMBINATIONS))
    def test(seed):
        if (combination := combined(seed)) is not None:
            check(combination)

    return test


@every_combination
def test_what_was_given_stays_and_no_mask_is_left(c):
    out = c.out
    assert out.sequences.dtype == torch.int64 and (out.sequences != MASK).all()
    assert torch.equal(out.sequences[c.fixed], c.canvas[c.fixed])
    assert torch.equal(out.completions, out.sequences[:, max(map(len, c.rows)) :])
    if c.knobs["ban_eos"] and not c.knobs["early_stop"]:
        assert (out.sequences[~c.fixed] != EOS).all()
    assert torch.equal(out.states[0], c.canvas) and torch.equal(out.states[-1], out.sequences)


@every_combination
def test_the_record_is_what_the_callback_saw(c):
    out = c.out
    decided_at, certain = torch.full_like(c.canvas, -1), torch.full(c.canvas.shape, torch.nan)
    for n, call in enumerate(c.calls):
        assert call["step"] == n
        decided_at[call["committed"]] = n
        certain[call["committed"]] = call["confidence"][call["committed"]]
    assert torch.equal(out.committed_at, decided_at)
    assert torch.equal(out.confidence.nan_to_num(-1), certain.nan_to_num(-1))
    assert not (c.decided & c.fixed).any()
    assert ((out.confidence[c.decided] > 0) & (out.confidence[c.decided] <= 1.001)).all()
    assert len(out.states) == len(c.calls) + 1


@every_combination
def test_undecided_is_only_what_lies_behind_an_end(c):
    ends = c.knobs["end_ids"] or (EOS,)
    rest = ~c.decided & ~c.fixed
    assert c.knobs["early_stop"] or not rest.any()
    assert (c.out.sequences[rest] == ends[0]).all()
    ended = (torch.isin(c.out.sequences, torch.tensor(ends)) & c.decided).any(1)
    assert (~rest.any(1) | ended).all()


@every_combination
def test_forwards_are_as_wide_and_as_many_as_they_should(c):
    out, knobs = c.out, c.knobs
    L = c.canvas.shape[1]
    assert out.num_forwards == len(c.calls) == len(c.sizes)
    for call, (b, _) in zip(c.calls, c.sizes, strict=True):  # a row that waits is not computed
        asked = int((~call["confidence"].isnan()).any(1).sum())
        assert b == (2 if knobs["cfg_scale"] else 1) * asked or not asked
    assert out.token_forwards == sum(b * t for b, t in c.sizes)
    b = knobs["block_length"] or knobs["gen_length"] or L
    rows = [shares(row, b, knobs["steps"]) for row in (~c.fixed).tolist()]
    at_end = set()
    pairs = zip(c.calls, c.sizes, strict=True)
    for (start, end), group in itertools.groupby(pairs, key=lambda pair: pair[0]["block"]):
        widths = [t for _, (_, t) in group]
        lo, hi = max(start - (c.family == "dream"), 0), end if knobs["cache"] == "dual" else L
        later = hi - lo if knobs["cache"] else L
        assert widths == [L] + [later] * (len(widths) - 1)
        least, most = forwards_of(knobs, [row[L - end] for row in rows if L - end in row])
        assert len(widths) <= most and (knobs["early_stop"] or least <= len(widths))
        at_end.add(L - end)
    assert knobs["early_stop"] or at_end == {end for row in rows for end in row}


def shares(is_mask, block_length, steps):
    """What one row may use: {block end, from the right: (masks, steps)}, by arithmetic of its
    own."""
    counts = {}
    for from_right, mask in enumerate(reversed(is_mask)):
        if mask:
            end = from_right // block_length * block_length
            counts[end] = counts.get(end, 0) + 1
    return {end: (n, n if steps is None else steps // len(counts)) for end, n in counts.items()}


def forwards_of(knobs, share):
    """The least and the most forwards of a block; share: (masks, steps) of each row in it."""
    masks, steps = max(n for n, _ in share), max(s for _, s in share)
    if "remask" in knobs:
        return 1, steps
    if knobs["schedule"] == "uniform":
        return (max(min(pair) for pair in share),) * 2
    if knobs["schedule"] == "pyramid":
        each = knobs["schedule_args"]["dilation"]
        exact = next(k for k in range(99) if sum(i // each + 1 for i in range(k)) >= masks)
        return exact, exact
    if knobs["schedule"] == "entropy-bound":
        return 1, max(min(pair) for pair in share)
    if knobs["schedule"] == "edit":
        return 1, max(min(pair) for pair in share) + 16
    if knobs["schedule"] == "refine":
        return 2, masks + knobs["schedule_args"].get("most", 16)
    return 1, masks if knobs["schedule"] in ("threshold", "factor", "wino") else steps


@every_combination
def test_a_row_decodes_alone_as_in_any_batch(c):
    """With generators of their own, in any order."""
    model, out = denoiser(c.family, torch.float64), c.out
    again = run(model, c.rows[::-1], **c.knobs, rng=[seeded(s) for s in (2, 1, 0)])
    assert torch.equal(again.sequences.flip(0), out.sequences)
    assert again.num_forwards == out.num_forwards
    for r, row in enumerate(c.rows):
        if not c.knobs["gen_length"] and MASK not in row:
            continue  # alone it is refused
        alone = run(model, [row], **c.knobs, rng=[seeded(r)])
        T = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], out.sequences[r, -T:]), r
        torch.testing.assert_close(
            alone.confidence[0], out.confidence[r, -T:], rtol=0, atol=1e-4, equal_nan=True
        )
        assert alone.row_forwards[0] == out.row_forwards[r], r  # not those that it waits for
        assert alone.row_forwards[0] == alone.num_forwards


def test_most_combinations_run():
    """Guards the sample: what it draws is for the most part not refused, and holds every part."""
    taken = []
    for seed in range(COMBINATIONS):
        family, _, knobs = combination(seed)
        try:
            DenoiseConfig(**knobs)
        except ValueError:
            continue
        taken.append({"remask": None} | knobs | {"family": family})
    assert len(taken) > 0.7 * COMBINATIONS
    for name, known in dict(
        schedule=SCHEDULES,
        select=SELECTORS,
        soften=SOFTENERS,
        remask=(None, *REMASKS),
        cache=(None, "prefix", "dual"),
        family=FAMILIES,
    ).items():
        assert {knobs[name] for knobs in taken} == {*known}, name


# -- what equals what


def same(a, b, **tolerance):
    """Tokens and the step of each bit for bit; confidences too, or within the tolerance."""
    assert torch.equal(a.sequences, b.sequences) and torch.equal(a.committed_at, b.committed_at)
    torch.testing.assert_close(
        a.confidence, b.confidence, equal_nan=True, **{"rtol": 0, "atol": 0, **tolerance}
    )


def logits_of(model, x):
    """[B, L] -> [B, L, V] about each position, by the model's own forward."""
    z = model(input_ids=x).logits.float()
    if isinstance(model, DreamForMaskedDiffusion):
        z = torch.cat([z[:, :1], z[:, :-1]], 1)
    z[..., model.config.mask_token_id] = -torch.inf
    return z


@torch.no_grad()
def by_hand(model, row, gen_length, block_length, quota):
    """LLaDA's greedy sampler, written out for one row."""
    mask_id = model.config.mask_token_id
    x = torch.tensor([row + [mask_id] * gen_length])
    for end in range(len(row) + block_length, x.shape[1] + 1, block_length):
        while left := int((x[0, :end] == mask_id).sum()):
            p, token = logits_of(model, x).softmax(-1).max(-1)
            p[x != mask_id] = -1
            first = p[0, :end].topk(min(quota, left)).indices
            x[0, first] = token[0, first]
    return x[0]


@pytest.mark.parametrize("name", ["llada_mha", "llada_gqa", "dream_gqa", "dream_tied"])
def test_the_default_is_the_plain_sampler(name):
    model, _ = load(CHECKPOINTS / name, dtype="float32", device="cpu")
    for block_length, quota in ((None, 1), (4, 1), (4, 2)):
        b = block_length or 8
        out = run(model, block_length=block_length, steps=8 // quota)
        for r, row in enumerate(PROMPTS):
            expected = by_hand(model, row, 8, b, quota)
            assert torch.equal(out.sequences[r, 5 - len(row) :], expected)
    assert out.completions.unique().numel() > 4  # guards against a test on repeated tokens


IS_HARD = {
    "soft-mask of scale 0": dict(soften="soft-mask", soften_args=dict(scale=0.0)),
    "soft-mask of scale 0 over the vocabulary": dict(
        soften="soft-mask", soften_args=dict(scale=0.0, k=VOCAB)
    ),
    "soft-mask when no mask counts": dict(soften="soft-mask", soften_args=dict(centre=1e4)),
    "slerp of strength 0": dict(soften="slerp", soften_args=dict(strength=0.0)),
    "guidance 0": dict(cfg_scale=0.0),
    "steps for each mask": dict(steps=8),
    "a slow pyramid": dict(schedule="pyramid", schedule_args={"dilation": 99}),
    "threshold 1": dict(threshold=1.0),
    "a small factor": dict(factor=1e-9),
    "remasking nothing": dict(remask="cap", remask_args=dict(eta=0.0), steps=8),
    "functions for names": dict(
        schedule=SCHEDULES["uniform"], select=SELECTORS["confidence"], soften=Softener(None)
    ),
    "a cache renewed at every token": dict(cache="dual", block_length=1),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", IS_HARD)
def test_is_hard_decoding(name, family):
    knobs, model = IS_HARD[name], denoiser(family)
    base = (
        {"block_length": knobs["block_length"]} if "block_length" in knobs else {"block_length": 4}
    )
    hard = run(model, **base)
    same(run(model, **base | knobs), hard)
    assert hard.num_forwards == 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [n for n in SOFTENERS if n != "hard"])
def test_softening_matters(name, family):
    assert not torch.equal(
        run(denoiser(family), soften=name).confidence, run(denoiser(family)).confidence
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_softening_at_its_ends(family):
    model = denoiser(family)
    hard = run(model)
    nearly = Softener(functools.partial(evolving, alpha=1 - 1e-9), everywhere=True)
    same(run(model, soften=nearly), hard, atol=1e-4)
    same(run(model, soften="soft-token", soften_args=dict(bias=1e9)), hard, atol=1e-4)
    same(run(model, soften="slerp", soften_args=dict(strength=1e-6)), hard, atol=1e-4)
    # All of the vocabulary by its most likely tokens, and as it is. The two ways differ by
    # float32's rounding, which this random net triples at each step: so tightly after the first
    # step, and less so at the end.
    shown = {}

    def softly(**knobs):
        note = shown.setdefault(knobs.get("algorithm"), [])
        return run(
            model,
            soften="soft-mask",
            soften_args=dict(scale=0.9, centre=-4.0, **knobs),
            callback=lambda seen: note.append(dense(seen["soft"], model.config.vocab_size)),
        )

    whole = softly(k=VOCAB)
    same(softly(algorithm="temperature"), whole, atol=5e-4)
    torch.testing.assert_close(shown["temperature"][0], shown[None][0], atol=1e-6, rtol=0)
    assert (whole.confidence - hard.confidence).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize(
    "schedule",
    ["uniform", "linear", "threshold", "factor", "pyramid", "ancestral", "entropy-bound"],
)
def test_one_seed_one_output(schedule):
    knobs = dict(schedule=schedule, temperature=1.0, threshold=0.5, factor=1.0)
    knobs = {k: v for k, v in knobs.items() if k not in ("threshold", "factor") or k == schedule}
    if schedule == "entropy-bound":
        knobs |= dict(entropy_bound=1.0, select="entropy")
    model = denoiser()
    state = torch.random.get_rng_state()
    a, b, c = (run(model, **knobs, rng=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state), (
        "a given rng leaves the global one alone"
    )
    same(a, b)
    assert not torch.equal(a.sequences, c.sequences)
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(run(model, **knobs).sequences)
    assert torch.equal(*drawn)
    rng = seeded(1)
    assert not torch.equal(
        run(model, **knobs, rng=rng).sequences, run(model, **knobs, rng=rng).sequences
    )


# Caches

CACHES = ("prefix", "dual")
# these change nothing outside their block
WITHIN_BLOCK = ("hard", "soft-token", "soft-mask", "slerp")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_exact_where_nothing_is_stale(family, cache):
    """Keys and values of one layer depend on the token alone, so renewing a block's is renewing
    all."""
    model = denoiser(family, torch.float64, num_hidden_layers=1)
    for rows, soften in itertools.product((PROMPTS, HOLED), WITHIN_BLOCK):
        knobs = dict(soften=soften, block_length=4, cfg_scale=0.5 if soften == "hard" else 0.0)
        same(run(model, rows, **knobs, cache=cache), run(model, rows, **knobs), atol=1e-6)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_renewed_at_each_forward_is_none(family, cache):
    model = denoiser(family)
    for knobs in (
        dict(block_length=2, steps=4),
        dict(block_length=4, threshold=1e-9),
        dict(block_length=1),
    ):
        a, b = run(model, **knobs, cache=cache), run(model, **knobs)
        same(a, b)
        assert a.num_forwards == b.num_forwards and a.token_forwards == b.token_forwards
    # So is one whose block is the whole canvas.
    holed = dict(rows=HOLED, gen_length=0, block_length=max(map(len, HOLED)))
    same(run(model, **holed, cache=cache), run(model, **holed), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_starts_from_the_same_forward_and_then_is_stale(family):
    first, outs = {}, {}
    for cache in (None, *CACHES):
        calls = []
        outs[cache] = run(denoiser(family), block_length=4, cache=cache, callback=calls.append)
        first[cache] = calls[0]["confidence"]
    for cache in CACHES:
        assert torch.equal(first[cache].nan_to_num(), first[None].nan_to_num())
        assert not torch.equal(outs[cache].confidence, outs[None].confidence)
        assert outs[cache].num_forwards == outs[None].num_forwards


def test_dream_reads_one_position_to_the_left_of_a_cached_block():
    """Without it nothing would be about the block's first position."""
    knobs = dict(block_length=4, cache="dual", steps=4)
    with counted(denoiser("dream").model) as calls:
        out = run(denoiser("dream"), **knobs)
    assert [t for _, t in calls] == [13, 5, 13, 5]
    assert out.token_forwards == 3 * (13 + 5 + 13 + 5) and out.num_forwards == 4
    with counted(denoiser("llada").model) as calls:
        run(denoiser("llada"), **knobs)
    assert [t for _, t in calls] == [13, 4, 13, 4]


def test_the_shift_of_dream_gives_a_rows_first_position_its_own_output():
    model = denoiser("dream")
    rows = ([MASK, MASK, 11, 12, MASK], [MASK, MASK, 13])
    for some in (rows, rows[:1], rows[1:]):
        calls = []
        run(model, some, gen_length=0, threshold=1e-9, callback=calls.append)
        for r, row in enumerate(some):
            at = calls[0]["sequences"].shape[1] - len(row)
            own = model(input_ids=torch.tensor([row])).logits.float()
            own[..., MASK] = -torch.inf
            assert calls[0]["sequences"][r, at : at + 2].tolist() == [own[0, 0].argmax()] * 2
            expected = own[0, 0].softmax(-1).max().expand(2)
            torch.testing.assert_close(calls[0]["confidence"][r, at : at + 2], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_leads_away_from_the_model_without_the_prompt(family):
    model, calls = denoiser(family), []
    out = run(model, PROMPTS[:1], cfg_scale=1.5, steps=1, callback=calls.append)
    x = torch.tensor([[*PROMPTS[0]] + [MASK] * 8])
    with_prompt, without = logits_of(model, x), logits_of(model, torch.full_like(x, MASK))
    z = torch.nan_to_num(without + 2.5 * (with_prompt - without), nan=-torch.inf)
    assert torch.equal(out.completions, z.argmax(-1)[:, 5:])
    torch.testing.assert_close(
        out.confidence[:, 5:], z.softmax(-1).amax(-1)[:, 5:], rtol=1e-4, atol=1e-5
    )
    assert (out.num_forwards, out.token_forwards) == (1, 2 * 13)
    assert (without - with_prompt).abs().nan_to_num().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_guidance_keeps_is_seen_without_the_prompt_too(family):
    """All of the prompt kept is no guidance; a part of it is guidance away from that part."""
    model, plain = denoiser(family), run(denoiser(family), HOLED)
    ids = tuple(range(MASK))
    same(run(model, HOLED, cfg_scale=1.5, cfg_keep_ids=ids), plain, atol=1e-4)
    calls = []
    run(model, PROMPTS[:1], cfg_scale=1.5, cfg_keep_ids=(5, 13), callback=calls.append)
    x = torch.tensor([[*PROMPTS[0]] + [MASK] * 8])
    with_prompt = logits_of(model, x)
    without = logits_of(model, torch.where(torch.isin(x, torch.tensor([5, 13])), x, MASK))
    z = torch.nan_to_num(without + 2.5 * (with_prompt - without), nan=-torch.inf)
    expected = z.softmax(-1).amax(-1)[:, 5:]
    torch.testing.assert_close(calls[0]["confidence"][:, 5:], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=f"cfg_keep_ids=.*below {VOCAB}"):
        run(model, cfg_scale=1.0, cfg_keep_ids=(VOCAB,))


def test_an_entropy_bound_commits_what_the_entropies_before_it_leave_room_for():
    """By one position after the other; in the last step everything that is open."""
    B, L, bound, generator = 50, 12, 0.7, seeded()
    entropy = torch.rand(B, L, generator=generator) ** 3
    is_open = torch.rand(B, L, generator=generator) < 0.7
    block = Block(0, L, is_open.sum(-1), torch.full((B,), 5))
    config = DenoiseConfig(entropy_bound=bound, select="entropy")
    rule, none = config.scheduler(block, config, None), torch.zeros_like(is_open)
    score = (-entropy).masked_fill(~is_open, -torch.inf)
    commit, drop = rule(Step(0, score, is_open, none, entropy))
    for row in range(B):
        spent, expected = 0.0, set()
        for col in sorted(
            is_open[row].nonzero()[:, 0].tolist(), key=entropy[row].tolist().__getitem__
        ):
            if spent <= bound:
                expected.add(col)
            spent += float(entropy[row, col])
        assert {*commit[row].nonzero()[:, 0].tolist()} == expected
    assert drop is None and 0 < (commit.sum(-1) < is_open.sum(-1)).sum() < B
    last, _ = rule(Step(4, score, is_open, none, entropy))
    assert torch.equal(last, is_open)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n not in ("ancestral", "overwrite")])
def test_end_tokens_wait_in_every_schedule(name):
    """Their score is the lowest of numbers: one commits in a step that commits all the others."""
    B, L, generator = 40, 12, seeded()
    compares, soften = SCHEDULES[name].compares, "hard" if name != "refine" else "soft-token"
    values = {"threshold": 0.5, "factor": 1.2, "entropy_bound": 0.4}
    select = "entropy" if compares == "entropy_bound" else "confidence"
    knobs = {compares: values[compares]} if compares else {}
    config = DenoiseConfig(schedule=name, select=select, soften=soften, ends_last=True, **knobs)
    is_open = torch.rand(B, L, generator=generator) < 0.8
    block = Block(0, L, is_open.sum(-1), torch.full((B,), 5))
    rule, decoded, waited = config.scheduler(block, config, None), torch.zeros_like(is_open), 0
    for index in range(4):  # in the fifth all commit
        score, standing, again = (torch.rand(B, L, generator=generator) for _ in range(3))
        is_end = torch.rand(B, L, generator=generator) < 0.4
        score = (-score if select == "entropy" else score).masked_fill(
            is_end, torch.finfo(score.dtype).min
        )
        among = is_open | decoded
        score, standing = (x.masked_fill(~among, -torch.inf) for x in (score, standing))
        change = lambda: torch.full((B, L), 0.2 - 0.1 * index)  # noqa: E731, B023
        step = Step(index, score, is_open, decoded, again, again, standing, again < 0.5, change)
        commit, drop = rule(step)
        ends, others = is_open & is_end, is_open & ~is_end
        early = (commit & ends).any(-1) & (others & ~commit).any(-1)
        assert not early.any()
        waited += int((ends.any(-1) & others.any(-1) & (commit & others).any(-1)).sum())
        is_open, decoded = is_open & ~commit, decoded | (commit & is_open)
        if drop is not None:
            is_open, decoded = is_open | drop, decoded & ~drop
    assert waited > B / 2


# -- forwards


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_length", [None, 4, 2])
def test_numbers_of_forwards(family, block_length):
    model, blocks = denoiser(family), 8 // (block_length or 8)

    def forwards(rows=PROMPTS, **knobs):
        return run(model, rows, block_length=block_length, **knobs).num_forwards

    assert forwards() == 8
    assert forwards(steps=blocks) == blocks
    assert forwards(steps=16) == 8  # a forward that has nothing left to commit is not made
    assert forwards(threshold=1e-9) == blocks
    assert forwards(threshold=1.0) == 8
    assert blocks <= forwards(threshold=0.4) <= 8
    assert forwards(factor=1e9) == blocks
    n = 8 // blocks
    assert forwards(schedule="pyramid") == blocks * math.ceil((math.sqrt(1 + 8 * n) - 1) / 2)
    assert forwards(steps=8, remask="cap") == 8
    # The longest row of each block counts, wherever its holes are.
    edges = range(0, 15, block_length or 8)
    canvas = torch.nn.functional.pad(left_padded(HOLED)[0], (0, 8), value=MASK).flip(1) == MASK
    assert forwards(HOLED) == sum(int(canvas[:, k : k + edges.step].sum(1).max()) for k in edges)


def test_templates_share_steps_among_the_blocks_that_they_have_masks_in():
    # blocks of 4: two masks, none, four
    row = [5, MASK, MASK, 6, 7, 8, 9, 10, MASK, MASK, MASK, MASK]
    calls = []
    out = run(denoiser(), [row], gen_length=0, block_length=4, steps=4, callback=calls.append)
    assert [call["block"] for call in calls] == [(0, 4)] * 2 + [(8, 12)] * 2
    assert [int(call["committed"].sum()) for call in calls] == [1, 1, 2, 2]
    assert out.prompt_length == 12 and out.completions.shape == (1, 0)
    with pytest.raises(ValueError, match=r"steps=1 cannot be shared by the 2 blocks of rows \[0\]"):
        run(denoiser(), [row], gen_length=0, block_length=4, steps=1)


def test_a_row_is_over_after_the_block_with_an_end():
    ends = (32, 41)
    out = run(
        denoiser(),
        PROMPTS[::2],
        gen_length=16,
        block_length=4,
        early_stop=True,
        end_ids=ends,
        history=True,
    )
    full = run(denoiser(), PROMPTS[::2], gen_length=16, block_length=4)
    for r, row in enumerate(full.completions.tolist()):
        first = next(i for i, token in enumerate(row) if token in ends)
        over = (first // 4 + 1) * 4
        assert out.completions[r].tolist() == row[:over] + [32] * (16 - over)
        assert (out.committed_at[r, 5 + over :] == -1).all() and out.confidence[
            r, 5 + over :
        ].isnan().all()
    assert torch.equal(out.states[-1], out.sequences) and out.num_forwards == 12 < full.num_forwards


def test_ends_come_last():
    ends, seen, calls = tuple(range(30)), [], []

    def spy(belief, token, uniform):
        seen.append(token.tolist())
        return SELECTORS["confidence"](belief, token, uniform)

    knobs = dict(ends_last=True, end_ids=ends, gen_length=12)
    run(denoiser(), PROMPTS[:1], select=spy, callback=calls.append, **knobs)
    went = [int(call["sequences"][call["committed"]]) for call in calls]
    for token, proposed in zip(went, seen):
        assert token not in ends or all(other in ends for other in proposed)
    waited = [
        token not in ends and any(t in ends for t in proposed)
        for token, proposed in zip(went, seen)
    ]
    assert sum(waited) > 2 and sum(token in ends for token in went) > 2
    # An end is none of the sure ones either: it commits alone, when nothing else is left.
    out = run(denoiser(), PROMPTS[:1], threshold=1e-9, **knobs)
    assert ((out.committed_at == 0).sum() > 1) and not torch.isin(
        out.sequences[out.committed_at == 0], torch.tensor(ends)
    ).any()


def test_the_end_of_text_can_be_banned():
    favourite = int(run(denoiser()).completions.flatten().mode().values)
    model = denoiser(eos_token_id=favourite)
    assert (run(model).completions == favourite).any()
    for knobs in ({}, dict(temperature=2.0)):
        assert (run(model, ban_eos=True, rng=seeded(), **knobs).completions != favourite).all()


# -- draws

ODDS = 1e-6  # that a right sampler would fail, had it drawn other numbers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "knobs",
    [
        dict(temperature=1.0),
        dict(temperature=0.6),
        dict(temperature=2.5),
        dict(temperature=1.0, top_k=4),
        dict(temperature=1.5, top_p=0.7),
        dict(temperature=2.0, top_k=6, top_p=0.8),
    ],
    ids=str,
)
def test_proposals_are_draws_at_the_temperature(family, knobs):
    model, row = denoiser(family), [5, 11, MASK, 12]
    out = run(model, [row] * 4000, gen_length=0, rng=seeded(), **knobs)
    z = logits_of(model, torch.tensor([row]))[0, 2] / knobs["temperature"]
    if "top_k" in knobs:
        z[z < z.topk(knobs["top_k"]).values[-1]] = -torch.inf
    if "top_p" in knobs:
        p, order = z.softmax(-1).sort(descending=True)
        z[order[p.cumsum(0) - p >= knobs["top_p"]]] = -torch.inf
    assert chi_square(out.sequences[:, 2].bincount(minlength=VOCAB), z.softmax(-1)) > ODDS
    # The recorded probability is the model's own, unfiltered.
    own = logits_of(model, torch.tensor([row]))[0, 2].softmax(-1)
    torch.testing.assert_close(out.confidence[:, 2], own[out.sequences[:, 2]])


def first_pairs(out, n):
    """How often each pair of n positions was what the first forward committed: [n, n], above the
    diagonal."""
    at = (out.committed_at == 0).nonzero()[:, 1].view(-1, 2)
    return (at[:, 0] * n + at[:, 1]).bincount(minlength=n * n).view(n, n)


@pytest.mark.parametrize("alg_temp", [0.02, 0.1, 5.0])
def test_positions_are_drawn_without_replacement(alg_temp):
    model, row = denoiser(), [MASK] * 4 + [11]
    calls = []
    out = run(
        model,
        [row] * 6000,
        gen_length=0,
        steps=2,
        alg_temp=alg_temp,
        rng=seeded(),
        callback=calls.append,
    )
    p = (calls[0]["confidence"][0, :4] / alg_temp).softmax(-1)
    ordered = p[:, None] * p[None, :] / (1 - p[:, None])  # first i, then j of the rest
    assert (
        chi_square(first_pairs(out, 5)[:4, :4].flatten(), (ordered + ordered.T).triu(1).flatten())
        > ODDS
    )
    sure = run(model, [row], gen_length=0, steps=2)
    nearly = run(model, [row] * 50, gen_length=0, steps=2, alg_temp=1e-5, rng=seeded())
    assert torch.equal(nearly.sequences, sure.sequences.expand(50, -1))


def test_the_random_order_is_uniform():
    out = run(
        denoiser(), [[MASK] * 4 + [11]] * 6000, gen_length=0, steps=2, select="random", rng=seeded()
    )
    assert (
        chi_square(first_pairs(out, 5)[:4, :4].flatten(), torch.ones(4, 4).triu(1).flatten() / 6)
        > ODDS
    )


def test_ancestral_positions_commit_by_themselves():
    """Of 5 masks in 4 equal steps, each with probability 1/4 in the first, and 1/3 of the rest in
    the second."""
    out = run(
        denoiser(),
        [[MASK] * 5 + [11]] * 6000,
        gen_length=0,
        steps=4,
        schedule="ancestral",
        rng=seeded(),
    )
    steps = out.committed_at[:, :5]
    assert chi_square(steps.flatten().bincount(minlength=4), torch.full((4,), 0.25)) > ODDS
    binomial = torch.tensor([math.comb(5, k) * 0.25**k * 0.75 ** (5 - k) for k in range(6)])
    assert chi_square((steps == 0).sum(1).bincount(minlength=6), binomial) > ODDS


# ReMDM

ETA = 0.1


@pytest.mark.parametrize("at_random", [False, True])
@pytest.mark.parametrize("strategy", REMASKS)
def test_remasking_has_the_probabilities_of_the_paper(strategy, at_random):
    B, n, S, index = 20_000, 10, 10, 7
    block = Block(2, 2 + n, torch.full((B,), n), torch.full((B,), S))
    args = {} if strategy == "conf" else {"eta": ETA}
    how = dict(schedule="ancestral" if at_random else "uniform", remask=strategy, remask_args=args)
    rule = remask(
        block, DenoiseConfig(gen_length=n, steps=S, **how), Draws(seeded(), B, torch.device("cpu"))
    )
    # decoded shares before the step and after it
    now, then = (0.9, 0.9) if strategy == "loop" else (0.7, 0.8)
    k = round(n * now)
    decoded, is_open = (
        torch.zeros(B, n + 2, dtype=torch.bool),
        torch.zeros(B, n + 2, dtype=torch.bool),
    )
    decoded[:, 2 : 2 + k], is_open[:, 2 + k :] = True, True
    confidence = torch.linspace(0.1, 0.9, n + 2).expand(B, -1)
    score = torch.rand(B, n + 2, generator=seeded(1)).masked_fill(~is_open, -torch.inf)
    commit, drop = rule(Step(index, score, is_open, decoded, confidence))

    most = min(1.0, (1 - then) / now)
    sigma = {
        "cap": torch.full((k,), min(ETA, most)),
        "rescale": torch.full((k,), ETA * most),
        "conf": (-confidence[0, 2 : 2 + k]).softmax(-1) * most,
        "loop": torch.full((k,), min(ETA, most)),
    }[strategy]
    spread = (sigma * (1 - sigma) / B).sqrt()
    # 9 tests of odds 4e-8
    assert ((drop[:, 2 : 2 + k].double().mean(0) - sigma).abs() < 5.5 * spread).all()
    assert not drop[:, :2].any() and not drop[:, 2 + k :].any()
    assert not (commit & ~is_open).any()
    left = (is_open & ~commit | drop).sum(1)
    if at_random:
        # at a mask the paper's sigma is the same, but of "conf" 0
        at_masks = 0 if strategy == "conf" else sigma.mean()
        chance = torch.as_tensor((then - (1 - at_masks) * now) / (1 - now))
        rate = commit.sum() / is_open.sum()
        assert abs(rate - chance) < 5.5 * (chance * (1 - chance) / is_open.sum()).sqrt()
    else:
        # So many commit that the clock is kept, as far as there are masks.
        assert torch.equal(left, drop.sum(1).clamp_min(round(n * (1 - then))))


@pytest.mark.parametrize("strategy", REMASKS)
def test_the_chances_at_a_mask_are_the_papers_at_every_step(strategy):
    """Also where nothing is decoded yet: alpha_s - (1 - sigma) alpha_t over 1 - alpha_t."""
    B, n, S = 4000, 5, 10
    block = Block(0, n, torch.full((B,), n), torch.full((B,), S))
    args = {} if strategy == "conf" else {"eta": ETA}
    config = DenoiseConfig(steps=S, schedule="ancestral", remask=strategy, remask_args=args)
    rule = remask(block, config, Draws(seeded(), B, torch.device("cpu")))
    is_open, none = torch.ones(B, n, dtype=torch.bool), torch.zeros(B, n, dtype=torch.bool)
    for index in range(S):
        now, then = float(rule.alpha(index)[0]), float(rule.alpha(index + 1)[0])
        most = min(1.0, (1 - then) / max(now, 1e-9))
        is_on = 0.05 - 1e-6 <= 1 - index / S <= 0.55
        eta = {"cap": min(ETA, most), "rescale": ETA * most, "conf": 0.0}
        eta["loop"] = min(ETA, most) if is_on else 0.0
        sigma = eta[strategy] if then < 1 else 0.0
        chance = 1.0 if then >= 1 else (then - (1 - sigma) * now) / (1 - now)
        step = Step(index, torch.zeros(B, n), is_open, none, torch.full((B, n), torch.nan))
        rate = float(rule(step)[0].float().mean())
        assert abs(rate - chance) < 5.5 * math.sqrt(chance * (1 - chance) / (B * n)) + 1e-9, index


def test_the_loop_of_remdm_rises_stays_and_ends():
    block = Block(0, 10, torch.tensor([10]), torch.tensor([20]))
    config = DenoiseConfig(steps=20, remask="loop")
    rule = remask(block, config, Draws(seeded(), 1, torch.device("cpu")))
    alpha = [float(rule.alpha(i)) for i in range(21)]
    assert alpha[0] == 0 and alpha[20] == 1 and alpha == sorted(alpha)
    assert alpha[9:20] == pytest.approx([0.9] * 11) and alpha[8] < 0.9
    decoded = torch.ones(1, 10, dtype=torch.bool)
    none = torch.zeros(1, 10, dtype=torch.bool)
    for index in range(20):
        step = Step(index, torch.full((1, 10), -torch.inf), none, decoded, torch.full((1, 10), 0.5))
        sigma = rule.sigma(step, rule.alpha(index), rule.alpha(index + 1))
        t = 1 - index / 20
        assert (float(sigma.max()) > 0) == (0.05 < round(t, 6) <= 0.55), index


@pytest.mark.parametrize("t_on", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t_off", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("alpha_on", [0.0, 0.5, 1.0])
def test_the_loop_of_remdm_fills_all_at_the_ends_of_its_ranges(t_on, t_off, alpha_on):
    if t_off <= t_on:
        knobs = dict(t_on=t_on, t_off=t_off, alpha_on=alpha_on, eta=0.5)
        out = run(denoiser(), gen_length=8, steps=5, remask="loop", remask_args=knobs)
        assert not (out.completions == MASK).any()


@pytest.mark.parametrize("select", ["confidence", "random"])
@pytest.mark.parametrize("strategy", REMASKS)
def test_remasking_fills_all_in_the_end(strategy, select):
    knobs = dict(
        remask=strategy, select=select, remask_args={} if strategy == "conf" else {"eta": 0.4}
    )
    told = []
    knobs |= dict(gen_length=16, block_length=8, history=True, callback=told.append)
    out = run(denoiser(), steps=48, rng=seeded(), **knobs)
    dropped = [int(((a != MASK) & (b == MASK)).sum()) for a, b in itertools.pairwise(out.states)]
    first = sum(step["block"] == (5, 13) for step in told)  # forwards of the first block
    assert sum(dropped) > 3 and dropped[first - 1] == dropped[-1] == 0
    assert (out.states[first][:, 5:13] != MASK).all() and (out.sequences != MASK).all()
    # no forward where no mask is left, which later steps may bring back
    assert len(told) == out.num_forwards <= 48
    for before, step in zip(out.states, told, strict=False):
        assert (before[:, slice(*step["block"])] == MASK).any()
    # A token that was masked again is recorded by when it came last.
    for n, (a, b) in enumerate(itertools.pairwise(out.states)):
        came = (a == MASK) & (b != MASK)
        assert (out.committed_at[came] >= n).all()


# -- the record


@contextmanager
def read(model):
    """Collects what the model's body reads in each forward, of all rows, those that wait too."""
    inputs, sit = [], Reader.sit
    Reader.sit = lambda self, rows, **how: None
    hook = model.model.register_forward_pre_hook(
        lambda m, a, kw: inputs.append(kw["inputs_embeds"]), with_kwargs=True
    )
    try:
        yield inputs
    finally:
        hook.remove()
        Reader.sit = sit


@functools.cache
def watched(soften, family, cache):
    """-> what the callback was told, what each forward read [B, T, D], and the output."""
    model, calls = denoiser(family), []
    with read(model) as reads:
        out = run(
            model,
            HOLED,
            block_length=4,
            soften=soften,
            cache=cache,
            callback=calls.append,
            history=True,
        )
    return calls, reads, out


def with_each(softeners):
    """A test of these softeners in each kind of model, with and without caches."""

    def parametrize(test):
        for name, values in dict(soften=softeners, family=FAMILIES, cache=(None, *CACHES)).items():
            test = pytest.mark.parametrize(name, values)(test)
        return test

    return parametrize


@with_each(SOFTENERS)
def test_the_callback_is_told_of_each_forward(soften, family, cache):
    calls, reads, out = watched(soften, family, cache)
    assert torch.equal(reads[0], denoiser(family).model.embed_tokens(out.states[0]))
    assert len(calls) == len(reads) == out.num_forwards
    for call, state in zip(calls, out.states[1:], strict=True):
        names = {"step", "block", "sequences", "committed", "confidence", "entropy"}
        assert {*call} == names | {"where", "soft"}
        assert call["entropy"] is None, "it would keep the logits of every forward"
        assert torch.equal(call["sequences"], state)


@with_each(["hard"])
def test_hard_decoding_tells_of_no_mixtures(soften, family, cache):
    calls, _, _ = watched(soften, family, cache)
    assert all(call["where"] is None and call["soft"] is None for call in calls)


@with_each([name for name in SOFTENERS if name != "hard"])
def test_mixtures_are_told_one_by_one(soften, family, cache):
    calls, _, _ = watched(soften, family, cache)
    for call in calls:
        where, soft = call["where"], call["soft"]
        assert soft.ids.shape == soft.weights.shape and len(soft.ids) == where.sum()
        if soften != "slerp":  # it turns a vector, which no weights that sum to 1 would
            torch.testing.assert_close(soft.weights.sum(-1), torch.ones(len(soft.ids)))
    assert sum(int(call["where"].sum()) for call in calls) > 20


@with_each([name for name, softener in SOFTENERS.items() if softener.fn and not softener.decoded])
def test_mixtures_stand_on_the_masks_of_the_block(soften, family, cache):
    for call in watched(soften, family, cache)[0]:
        start, end = call["block"]
        where, masked = call["where"], call["sequences"] == MASK
        assert not (where & ~masked).any()
        assert not where[:, :start].any() and not where[:, end:].any()


@with_each([name for name, softener in SOFTENERS.items() if softener.decoded])
def test_some_mixtures_stand_on_masks_and_on_what_the_block_decoded(soften, family, cache):
    for call in watched(soften, family, cache)[0]:
        start, end = call["block"]
        on_tokens = call["where"] & (call["sequences"] != MASK)
        assert not on_tokens[:, :start].any() and not on_tokens[:, end:].any()


@with_each([name for name in SOFTENERS if name != "hard"])
def test_the_next_forward_reads_the_mixtures(soften, family, cache):
    calls, reads, out = watched(soften, family, cache)
    embed, L = denoiser(family).model.embed_tokens, out.sequences.shape[1]
    for call, following, inputs in zip(calls, calls[1:], reads[1:]):
        start, end = call["block"]
        same_block = following["block"] == (start, end)
        if not (same_block or SOFTENERS[soften].carries):
            continue
        lo, hi = 0, L
        if cache is not None and same_block:
            lo, hi = max(start - (family == "dream"), 0), end if cache == "dual" else L
        where, soft = call["where"], call["soft"]
        if not same_block:  # what is decoded is tokens from now on
            is_mask = call["sequences"][where] == MASK
            where = where & (call["sequences"] == MASK)
            soft = Soft(soft.ids[is_mask], soft.weights[is_mask])
        expected = embed(call["sequences"])
        expected[where] = (soft.weights[..., None] * embed(soft.ids)).sum(-2)
        # what carries over is also read where this forward put nothing
        at = where[:, lo:hi] if SOFTENERS[soften].carries else torch.ones_like(where[:, lo:hi])
        torch.testing.assert_close(inputs[at], expected[:, lo:hi][at], rtol=1e-4, atol=1e-5)


def test_a_softened_block_starts_hard_unless_the_state_carries():
    fn = SOFTENERS["soft-mask"].fn
    for soften in (
        "soft-mask",
        "evolving",
        Softener(fn, everywhere=True),
        Softener(fn, everywhere=True, carries=True),
    ):
        model = denoiser()
        with read(model) as reads:
            out = run(model, block_length=4, soften=soften, history=True)
        is_hard = torch.equal(reads[4], model.model.embed_tokens(out.states[4]))
        assert is_hard != SOFTENERS.get(soften, soften).carries


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
def test_a_finished_block_is_read_as_tokens(family, cache, early_stop):
    """By every later forward, so that no cache keeps its mixtures, for any softener."""
    model = denoiser(family)
    embed = model.model.embed_tokens
    everything = dict(everywhere=True, decoded=True, carries=True)
    softeners = [*SOFTENERS, Softener(evolving, **everything, revises=True)]
    softeners += [Softener(SOFTENERS["soft-token"].fn, **everything)]
    ends = dict(early_stop=True, end_ids=tuple(range(12))) if early_stop else {}
    for soften in softeners:
        calls = []
        with read(model) as reads:
            out = run(
                model,
                block_length=4,
                gen_length=12,
                soften=soften,
                cache=cache,
                history=True,
                callback=calls.append,
                **ends,
            )
        for call, inputs, state in zip(calls, reads, out.states):
            start, end = call["block"]
            begin = next(i for i, c in enumerate(calls) if c["block"] == (start, end))
            tokens = out.states[begin] != MASK  # when the block began
            is_whole = inputs.shape[1] == out.sequences.shape[1]
            lo = 0 if is_whole else max(start - (family == "dream"), 0)
            hi = lo + inputs.shape[1]
            at = tokens[:, lo:hi]
            assert torch.equal(inputs[at], embed(state)[:, lo:hi][at]), soften


def test_evotoken_reads_them_softly_once_more():
    model, first = denoiser(), {}
    for parity in (None, "evotoken"):
        with read(model) as reads:
            out = run(
                model, block_length=4, soften="evolving", history=True, steps=8, parity=parity
            )
        embeds = model.model.embed_tokens(out.states[4])
        first[parity] = torch.equal(reads[4][:, 5:9], embeds[:, 5:9])
    assert first == {None: True, "evotoken": False}


def test_a_row_that_is_done_with_its_block_waits_as_it_is():
    """Its soft slots and its generator stay where they are while the others go on."""
    rows = [[5, MASK, 6, 7, 8, MASK], [MASK] * 4 + [9, MASK]]
    model = denoiser(dtype=torch.float64)
    for knobs in (
        dict(soften="evolving", temperature=1.0),
        dict(remask="cap", remask_args={"eta": 0.5}, steps=12),
    ):
        knobs |= dict(gen_length=8, block_length=4)
        calls = []
        both = run(model, rows, rng=[seeded(0), seeded(1)], callback=calls.append, **knobs)
        alone = run(model, rows[:1], rng=[seeded(0)], **knobs)
        assert torch.equal(both.sequences[:1], alone.sequences)
        if "soften" in knobs:
            waited = [call for call in calls if call["block"] == calls[0]["block"]][1:]
            assert waited and all(call["confidence"][0].isnan().all() for call in waited)


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        assert not self.ended and value.device.type == "cpu"
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_streamers_get_the_prompt_and_the_blocks_in_order():
    knobs = dict(gen_length=12, block_length=4)
    for more in ({}, dict(early_stop=True, end_ids=tuple(range(24)))):
        streamer = Recorder()
        out = run(denoiser(), PROMPTS[:1], streamer=streamer, **knobs, **more)
        answer = out.completions[0].tolist()
        assert (
            streamer.values == [[PROMPTS[0]], [answer[:4]], [answer[4:8]], [answer[8:]]]
            and streamer.ended == 1
        )
    tokenizer, printed = tokenizer_of(VOCAB), io.StringIO()
    with redirect_stdout(printed):
        out = run(denoiser(), PROMPTS[:1], streamer=TextStreamer(tokenizer), **knobs)
    assert printed.getvalue() == tokenizer.decode(out.sequences[0]) + "\n"
    with redirect_stdout(io.StringIO()), pytest.raises(ValueError, match="batch size 1"):
        run(denoiser(), streamer=TextStreamer(tokenizer))


def test_diffusion_streamers_get_drafts():
    class Drafts(TextDiffusionStreamer):
        def put_draft(self, value, **kwargs):
            drafts.append(value)
            super().put_draft(value, **kwargs)

    drafts, tokenizer, printed = [], tokenizer_of(VOCAB), io.StringIO()
    with redirect_stdout(printed):
        streamer = Drafts(tokenizer, skip_prompt=True)
        out = run(denoiser(), PROMPTS[:1], block_length=4, streamer=streamer, history=True)
    assert len(drafts) == out.num_forwards == 8
    for draft, state in zip(drafts, out.states[1:]):
        assert torch.equal(draft, state[:, 5:])
    assert tokenizer.decode(out.completions[0, :4]) in printed.getvalue()


def test_history_and_seconds():
    assert run(denoiser()).states is None
    out = run(denoiser(), history=True)
    assert [int((state == MASK).sum()) for state in out.states] == [3 * n for n in range(8, -1, -1)]
    assert 0 < out.seconds < 60


# -- memory


@pytest.mark.parametrize("name", [n for n, s in SCHEDULES.items() if s.takes_steps is not False])
def test_a_rule_does_not_wait_for_the_device(name, monkeypatch):
    """In a step the loop does, once."""
    waits, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: waits.append(t) or tolist(t))
    more = {option: 1e-6 for option in [SCHEDULES[name].compares] if option}
    if name == "entropy-bound":
        more["select"] = "entropy"
    counts = []
    for steps in (8, 16):
        waits.clear()
        out = run(denoiser(), gen_length=16, schedule=name, steps=steps, **more)
        counts.append((len(waits), out.num_forwards))
    (few, a), (many, b) = counts
    assert many - few == b - a


@pytest.mark.parametrize("cache", [None, "dual"])
@pytest.mark.parametrize("soften", ["hard", "soft-token", "soft-mask", "evolving", "slerp"])
def test_nothing_as_large_as_the_canvas_times_the_vocabulary_is_written(soften, cache):
    V, B, G, b = 50_000, 2, 32, 4  # what is summed in tiles is smaller
    model, asked = denoiser(vocab_size=V), []
    hook = model.lm_head.register_forward_pre_hook(
        lambda module, args: asked.append(tuple(args[0].shape))
    )
    calls = []
    try:
        with Largest() as largest:
            run(
                model,
                PROMPTS[:B],
                gen_length=G,
                block_length=b,
                steps=16,
                soften=soften,
                cache=cache,
                temperature=0.5,
                rng=seeded(),
                callback=calls.append,
            )
    finally:
        hook.remove()
    opened = [int((~call["confidence"].isnan()).sum()) for call in calls]
    # logits are of positions that something is asked of, and of no others
    assert asked == [(n, 16) for n in opened]
    everywhere = SOFTENERS[soften].everywhere
    assert max(opened) == B * (G if everywhere else b) and len(asked) == 16
    L = G + 5
    rows = max(n for n, _ in asked)
    assert rows * V <= largest.numel < min(B * L * V, 2 * rows * V)


def test_that_measurement_would_notice():
    with Largest() as largest:
        denoiser(vocab_size=50_000)(input_ids=torch.full((2, 37), MASK))
    assert largest.numel >= 2 * 37 * 50_000


# -- bad input

BAD_CONFIGS = [
    (dict(gen_length=-1), "gen_length=-1"),
    (dict(gen_length=2.5), "gen_length=2.5"),
    (dict(block_length=0), "block_length=0"),
    (dict(block_length=3), "block_length=3 does not divide gen_length=8"),
    (dict(block_length=16), "block_length=16 does not divide gen_length=8"),
    (dict(steps=0), "steps=0"),
    (dict(steps=5, block_length=4), "steps=5 cannot be shared by 2 blocks: choose a multiple of 2"),
    (dict(steps=1, block_length=4), "steps=1 cannot be shared by 2 blocks"),
    (dict(schedule="pyramid", schedule_args={"dilation": 0}), "schedule_args dilation=0 must be"),
    (dict(schedule="linear", schedule_args={"eps": 1.0}), "schedule_args eps=1.0 must lie in"),
    (dict(schedule="linear", schedule_args={"eps": -0.1}), "schedule_args eps=-0.1 must lie in"),
    (
        dict(schedule="sine"),
        r"schedule='sine' is unknown.*: choose one of \['ancestral', 'cosine', 'dynamic'",
    ),
    (dict(select="best"), r"select='best' is unknown.*: choose one of \['confidence', 'entropy'"),
    (dict(soften="blur"), r"soften='blur' is unknown: choose one of \['evolving', 'hard'"),
    (dict(parity="mine"), r"parity='mine' is unknown: choose one of \[.*'llada'"),
    (dict(cache="triple"), r"cache='triple' is unknown: choose one of .*'prefix', 'dual'"),
    (dict(remask="all", steps=8), r"remask='all' is unknown: choose one of .*'cap'"),
    (dict(threshold=0.0), "threshold=0.0 must lie in"),
    (dict(threshold=1.1), "threshold=1.1 must lie in"),
    (dict(threshold=math.nan), "threshold=nan must lie in"),
    (dict(factor=0.0), "factor=0.0"),
    (dict(factor=math.inf), "factor=inf"),
    (dict(schedule="threshold"), "schedule='threshold' needs threshold="),
    (dict(schedule="factor"), "schedule='factor' needs factor="),
    (dict(schedule="uniform", threshold=0.9), "threshold=0.9 does not go with schedule='uniform'"),
    (
        dict(schedule="threshold", threshold=0.9, factor=1.0),
        "factor=1.0 does not go with schedule='threshold'",
    ),
    (
        dict(threshold=0.9, select="entropy"),
        "schedule='threshold' compares probabilities.*select='entropy'.*give select='confidence'",
    ),
    (dict(factor=1.0, alg_temp=0.5), "schedule='factor' compares probabilities: alg_temp=0.5"),
    (dict(entropy_bound=0.1), "schedule='entropy-bound' compares entropies.*give select='entropy'"),
    (dict(entropy_bound=0.0, select="entropy"), "entropy_bound=0.0 must be > 0"),
    (dict(schedule="entropy-bound", select="entropy"), "'entropy-bound' needs entropy_bound="),
    (dict(alg_temp=-1.0), "alg_temp=-1.0"),
    (dict(alg_temp=math.nan), "alg_temp=nan"),
    (dict(cfg_scale=-0.5), "cfg_scale=-0.5"),
    (dict(cfg_keep_ids=(5,)), r"cfg_keep_ids=\(5,\) does nothing without guidance"),
    (dict(cfg_scale=math.inf), "cfg_scale=inf"),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(top_k=0), "top_k=0"),
    (dict(top_p=1.5), "top_p=1.5"),
    (dict(soften_args={"k": 3}), "soften='hard' takes no options.*'k': 3"),
    (
        dict(soften="soft-token", soften_args={"alpha": 0.5}),
        r"soften='soft-token' does not take \['alpha'\]: it takes",
    ),
    (dict(soften="soft-mask", soften_args={"k": 0}), "soften_args k=0"),
    (dict(soften="soft-mask", soften_args={"k": 2.0}), "soften_args k=2.0"),
    (dict(soften="soft-mask", soften_args={"scale": 1.5}), "soften_args scale=1.5"),
    (dict(soften="soft-mask", soften_args={"centre": math.nan}), "soften_args centre=nan"),
    (dict(soften="soft-mask", soften_args={"steepness": -1}), "soften_args steepness=-1"),
    (dict(soften="soft-mask", soften_args={"temperature": 0}), "soften_args temperature=0"),
    (
        dict(soften="soft-mask", soften_args={"algorithm": "max"}),
        "soften_args algorithm='max' is unknown",
    ),
    (
        dict(soften="soft-mask", soften_args={"scheduling": "up"}),
        "soften_args scheduling='up' is unknown",
    ),
    (dict(soften="soft-token", soften_args={"bias": -0.1}), "soften_args bias=-0.1"),
    (dict(soften="soft-token", soften_args={"renormalise": 1}), "soften_args renormalise=1"),
    (dict(soften="evolving", soften_args={"alpha": 1.0}), "soften_args alpha=1.0"),
    (dict(soften="slerp", soften_args={"strength": 2}), "soften_args strength=2"),
    (dict(remask="cap"), "remask='cap' needs steps="),
    (
        dict(remask="cap", threshold=0.9),
        "remask='cap' sets by itself how many commit, and schedule='threshold'",
    ),
    (
        dict(remask="cap", steps=8, schedule=lambda block, config, draws: None),
        "remask='cap' sets by itself how many commit, and schedule=<function",
    ),
    (
        dict(remask="cap", schedule="pyramid"),
        "remask='cap' sets.*schedule='pyramid' does not go with it: choose one of .*'ancestral'",
    ),
    *(
        (dict(remask="cap", steps=8, schedule=name), f"remask='cap' sets.*schedule='{name}'")
        for name in SCHEDULES
        if SCHEDULES[name].takes_steps and name not in REMASKED
    ),
    (
        dict(remask="cap", steps=8, select="random", ends_last=True),
        "ends_last=True says nothing to remask='cap' with select='random'",
    ),
    (dict(remask="cap", steps=8, parity="llada"), "parity='llada' has a rule.*remask='cap'"),
    (dict(remask="cap", steps=8, soften="evolving"), "soften='evolving' revises"),
    (
        dict(remask="cap", steps=8, remask_args={"sigma": 1}),
        r"remask='cap' does not take \['sigma'\]: it takes",
    ),
    (dict(remask="cap", steps=8, remask_args={"eta": 1.5}), "remask_args eta=1.5"),
    (
        dict(remask="conf", steps=8, remask_args={"eta": 0.1}),
        r"remask='conf' does not take \['eta'\]",
    ),
    (
        dict(remask="loop", steps=8, remask_args={"t_on": 0.1, "t_off": 0.2}),
        "t_off=0.2 must be at most t_on=0.1",
    ),
    (dict(steps=4, threshold=0.9), "steps=4 does not go with schedule='threshold'"),
    (dict(steps=4, schedule="pyramid"), "steps=4 does not go with schedule='pyramid'"),
    (
        dict(schedule_args={"dilation": 2}),
        r"schedule='uniform' does not take \['dilation'\]: it takes no options",
    ),
    (
        dict(schedule="pyramid", schedule_args={"eps": 0.1}),
        r"schedule='pyramid' does not take \['eps'\]: it takes \['dilation'\]",
    ),
    (
        dict(parity="llada", schedule_args={"eps": 0.1}),
        r"parity='llada' does not take \['eps'\]: it takes no options",
    ),
    (dict(dilation=2), r"dilation=2 belongs to one schedule: give schedule_args={'dilation': 2}"),
    (dict(eps=0.1), r"eps=0.1 belongs to one schedule: give schedule_args={'eps': 0.1}"),
    (dict(schedule="ancestral", alg_temp=0.1), "schedule='ancestral' draws.*alg_temp=0.1"),
    (dict(schedule="ancestral", select="margin"), "schedule='ancestral' draws.*select='margin'"),
    (dict(remask_args={"eta": 0.1}), "remask_args={'eta': 0.1} without remask"),
    (dict(schedule="ancestral", ends_last=True), "schedule='ancestral' draws.*ends_last=True"),
    (dict(schedule="overwrite", ends_last=True), "'overwrite' commits from the left.*ends_last"),
    # what changes nothing
    (dict(top_k=5), "top_k=5 does nothing at temperature=0"),
    (dict(top_p=0.9), "top_p=0.9 does nothing at temperature=0"),
    (
        dict(select="random", alg_temp=0.5),
        "alg_temp=0.5 does nothing with a select that scores at random",
    ),
    (
        dict(select="leftmost", alg_temp=0.5),
        "alg_temp=0.5 does nothing but shuffle with select='leftmost'",
    ),
    (dict(steps=1, alg_temp=0.5), "alg_temp=0.5 does nothing where a forward commits all"),
    (dict(block_length=1, alg_temp=0.5), "alg_temp=0.5 does nothing where a forward commits all"),
    (dict(gen_length=0, cache="dual"), "cache='dual' does nothing.*give a block_length"),
    (dict(gen_length=True), "gen_length=True must be a whole number"),
    (dict(top_k=2.0, temperature=1.0), "top_k=2.0 must be a whole number"),
    (dict(top_k=True, temperature=1.0), "top_k=True must be a whole number"),
]


@pytest.mark.parametrize(
    ("knobs", "told"),
    BAD_CONFIGS,
    ids=[re.sub(" at 0x[0-9a-f]+", "", str(knobs)) for knobs, _ in BAD_CONFIGS],
)
def test_bad_configurations_are_errors_that_name_the_value(knobs, told):
    with pytest.raises(ValueError, match=told):
        DenoiseConfig(**{"gen_length": 8, **knobs})


def test_a_decoders_options_reach_softener_and_schedule_by_name():
    got = denoise_config("soft-token", dict(k=3, schedule="pyramid", dilation=2, gen_length=4))
    pyramid = dict(schedule="pyramid", schedule_args={"dilation": 2})
    assert got == DenoiseConfig(gen_length=4, soften="soft-token", soften_args={"k": 3}, **pyramid)
    assert denoise_config("hard", pyramid) == DenoiseConfig(soften="hard", **pyramid)
    with pytest.raises(ValueError, match=r"schedule='uniform' does not take \['dilation'\]"):
        denoise_config("hard", dict(dilation=2))
    with pytest.raises(ValueError, match="decoder 'hard' takes no 'dilatoin', did you mean 'dilat"):
        denoise_config("hard", dict(dilatoin=2))


def test_a_misspelt_field_is_an_error():
    with pytest.raises(TypeError, match="treshold"):
        DenoiseConfig(treshold=0.9)


IDS = torch.tensor([[5, 11, 12]])
BAD_INPUTS = {
    "a vector": (dict(input_ids=IDS[0]), r"input_ids of shape \(3,\)"),
    "floats": (dict(input_ids=IDS.float()), "input_ids of shape .*float32"),
    "no room": (
        dict(gen_length=62),
        "a prompt of 3 and gen_length=62 do not fit into the model's 64 positions",
    ),
    "an end of one block": (
        dict(early_stop=True, gen_length=8),
        "early_stop=True does nothing in a single block",
    ),
    "an end of one block, by its length": (
        dict(early_stop=True, block_length=8, gen_length=8),
        "early_stop=True does nothing",
    ),
    "no mask": (dict(gen_length=0), "gen_length=0 and no mask in input_ids.*id 46"),
    "a wide filter": (dict(top_k=VOCAB + 1, temperature=1.0), "top_k=49"),
    "a wide mixture": (
        dict(soften="soft-mask", soften_args=dict(k=VOCAB + 1)),
        "k=49 must be at most 48",
    ),
    "another mask's shape": (dict(attention_mask=IDS[:, :2]), r"attention_mask of shape \(1, 2\)"),
    "padding on the right": (
        dict(attention_mask=torch.tensor([[1, 1, 0]])),
        r"padding on the right in rows \[0\]",
    ),
    "padding within": (
        dict(attention_mask=torch.tensor([[1, 0, 1]])),
        r"padding on the right in rows \[0\]",
    ),
    "masks as padding": (
        dict(input_ids=torch.tensor([[MASK, 11, 12]]), attention_mask=torch.tensor([[0, 1, 1]])),
        "padding holds the mask token .id 46",
    ),
    "generators": (dict(rng=[seeded(), seeded()]), "rng holds 2 generators for 1 rows"),
    "nothing for Dream": (
        dict(family="dream", input_ids=IDS[:, :0]),
        r"shape \(1, 0\) is an empty prompt",
    ),
    "padding alone for Dream": (
        dict(
            family="dream",
            input_ids=IDS.repeat(2, 1),
            attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]),
        ),
        r"attention_mask leaves rows \[1\] an empty prompt",
    ),
    "no end to ban": (dict(eos_token_id=None, ban_eos=True), "ban_eos=True does nothing"),
    "no end to wait for": (dict(eos_token_id=None, ends_last=True), "ends_last=True does"),
    "an end that is none": (dict(end_ids=(VOCAB,)), r"end_ids=\(48,\) must be ids below 48"),
    "the mask as an end": (dict(end_ids=(MASK,)), r"end_ids=\(46,\).*mask"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs_are_errors_that_name_the_value(name):
    knobs, told = BAD_INPUTS[name]
    knobs = {"gen_length": 8, "input_ids": IDS, **knobs}
    changes = {k: knobs.pop(k) for k in [*knobs] if k == "eos_token_id"}
    model = denoiser(knobs.pop("family", "llada"), **changes)
    inputs = {k: knobs.pop(k) for k in [*knobs] if k in ("input_ids", "attention_mask", "rng")}
    with counted(model.model) as calls, pytest.raises(ValueError, match=told):
        denoise(model, **inputs, config=DenoiseConfig(**knobs))
    assert not calls  # before the first forward


@pytest.mark.parametrize("mask_id", [None, -1, VOCAB])
def test_a_mask_token_that_is_none(mask_id):
    with pytest.raises(
        ValueError, match="names no mask token" if mask_id is None else f"mask_token_id={mask_id}"
    ):
        run(denoiser(mask_token_id=mask_id))


@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize(
    "knobs", [{}, dict(temperature=1.0), dict(soften="soft-mask"), dict(cache="dual")], ids=str
)
def test_nan_logits_name_their_forward(knobs, select):
    model = denoiser()
    calls = []

    def spoil(module, args, output):
        calls.append(None)
        return output * torch.nan if len(calls) == 4 else output

    hook = model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(FloatingPointError, match=r"logits of forward 3 are NaN.*float32"):
            run(model, select=select, rng=seeded(), **knobs)
    finally:
        hook.remove()


def test_more_shapes_of_input():
    model = denoiser()
    a = run(model, PROMPTS[:1])
    for ids in (torch.tensor(PROMPTS[:1], dtype=torch.int32), torch.tensor(PROMPTS[:1])):
        for mask in (
            None,
            torch.ones_like(ids),
            torch.ones(ids.shape, dtype=torch.bool),
            torch.ones(ids.shape),
        ):
            same(denoise(model, ids, mask, config=DenoiseConfig(gen_length=8)), a)
    # Without a prompt, as a row of padding, and a model that has more to say.
    empty = denoise(model, IDS[:, :0], config=DenoiseConfig(gen_length=8))
    padded = denoise(model, IDS, torch.zeros_like(IDS), config=DenoiseConfig(gen_length=8))
    assert torch.equal(empty.sequences, padded.completions) and empty.prompt_length == 0
    with torch.enable_grad():
        assert not run(model).confidence.requires_grad
    assert denoise(denoiser(max_position_embeddings=131), IDS).completions.shape == (1, 128)


# -- functions of the user


def test_a_schedule_of_ones_own():
    def leftmost(block, config, draws):
        class Rule:
            def more(self, index, left):
                return left

            def __call__(self, step):
                return step.open & (step.open.cumsum(-1) <= 2), None  # the two leftmost

        blocks.append((block.start, block.end, block.count.tolist()))
        return Rule()

    blocks = []
    out = run(denoiser(), schedule=leftmost, block_length=4)
    assert blocks == [(5, 9, [4] * 3), (9, 13, [4] * 3)]
    assert out.committed_at[:, 5:].tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 3
    doubled = lambda block, config, draws: Quota(lambda i, n: torch.full_like(n, 2))  # noqa: E731
    same(run(denoiser(), schedule=doubled), run(denoiser(), steps=4))


def test_a_selector_of_ones_own():
    def surest(belief, token, uniform):
        assert belief.logits.shape == (len(token), VOCAB) and (belief.logits[:, MASK] < -1e38).all()
        return belief.logits.softmax(-1).amax(-1)

    for precision in (torch.float32, torch.float64, torch.bfloat16):
        out = run(denoiser(), select=lambda *args, p=precision: surest(*args).to(p))
        if precision != torch.bfloat16:
            assert torch.equal(out.sequences, run(denoiser()).sequences)
    uniform = run(denoiser(), select=lambda belief, token, uniform: uniform(), rng=seeded(3))
    same(uniform, run(denoiser(), select="random", rng=seeded(3)))


def test_a_softener_of_ones_own():
    def top(slots, *, k=1, scale=0.5):
        assert (slots.masked == (slots.ids == MASK)).all() and slots.mask_id == MASK
        ids = slots.belief.top(k)[1]
        weights = torch.full(ids.shape, scale / k)
        return Soft(
            torch.cat([ids, slots.ids[:, None]], -1),
            torch.cat([weights, 1 - weights.sum(-1, True)], -1),
        )

    class Object:
        def __call__(self, slots, **knobs):
            return top(slots, **knobs)

    model = denoiser()
    a = run(model, soften=top)
    for same_thing in (
        Object(),
        functools.partial(top),
        Softener(top),
        lambda slots, **knobs: top(slots, **knobs),
    ):
        same(run(model, soften=same_thing), a)
        same(run(model, soften=same_thing, soften_args={"scale": 0.5, "k": 1}), a)
    assert not torch.equal(run(model, soften=top, soften_args={"k": 3}).confidence, a.confidence)
    # Its knobs are its own: ours of the same name have ranges that say nothing here.
    run(model, soften=top, soften_args={"scale": 1.5})
    same(
        run(model, soften=lambda slots: Soft(slots.ids[:, None], torch.ones(len(slots.ids), 1))),
        run(model),
    )
    same(run(model, soften=SOFTENERS["soft-mask"].fn), run(model, soften="soft-mask"), atol=1e-6)


# -- other models


def test_a_model_wrapped_by_peft():
    wrapped = with_lora(denoiser.__wrapped__("llada"))
    for knobs in (dict(), dict(soften="soft-mask"), dict(cache="dual", block_length=4)):
        adapted = run(wrapped, **knobs)
        with wrapped.disable_adapter():
            same(run(wrapped, **knobs), run(denoiser(), **knobs))
        assert not torch.equal(adapted.sequences, run(denoiser(), **knobs).sequences)
    assert torch.equal(
        run(wrapped.merge_and_unload()).sequences,
        run(with_lora(denoiser.__wrapped__("llada"))).sequences,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    model = denoiser(family, torch.bfloat16)
    for soften, cache in itertools.product(SOFTENERS, (None, *CACHES)):
        out = run(model, HOLED, soften=soften, cache=cache, block_length=4, cfg_scale=0.5)
        assert (out.sequences != MASK).all() and out.confidence.dtype == torch.float32
    same(run(model, soften="soft-mask", soften_args=dict(scale=0.0)), run(model))


def bert(**changes):
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(
            BertConfig(
                **sizes,
                max_position_embeddings=64,
                initializer_range=0.4,
                eos_token_id=EOS,
                **changes,
            )
        )
    model.config.mask_token_id = MASK
    return model.double().eval()


def test_a_masked_language_model():
    model = bert()
    for soften in SOFTENERS:
        knobs = dict(soften=soften, block_length=4, temperature=0.5)
        out = run(model, HOLED, **knobs, rng=[seeded(s) for s in range(3)])
        assert (out.sequences != MASK).all()
        for r, row in enumerate(HOLED):
            alone = run(model, [row], **knobs, rng=[seeded(r)]).sequences[0]
            assert torch.equal(alone, out.sequences[r, -len(alone) :])
    same(run(model, soften="soft-mask", soften_args=dict(scale=0.0)), run(model), atol=1e-6)
    for cache in CACHES:
        with pytest.raises(
            ValueError, match=f"cache='{cache}': BertForMaskedLM keeps no keys and values"
        ):
            run(model, cache=cache)


@pytest.mark.parametrize("V", [64 * 70, 64 * 70 + 1])
@pytest.mark.parametrize("is_watched", [False, True])
def test_the_head_of_few_positions(V, is_watched):
    """The head's logits for any number of positions, and its hooks see them; of a vocabulary that
    is whole pieces, or not."""
    model, seen = denoiser(vocab_size=V, hidden_size=256), []
    head, hidden = parts(model).head, torch.randn(33, 256, generator=seeded())
    see = lambda _, args, out: seen.append(out[: args[0].any(-1).sum()])  # noqa: E731
    hook = model.lm_head.register_forward_hook(see) if is_watched else None
    try:
        with torch.no_grad():
            for n in range(len(hidden)):
                logits, want = head(hidden[:n]), hidden[:n] @ model.lm_head.weight.T
                torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
                assert logits.is_contiguous() and (not is_watched or torch.equal(logits, seen[n]))
    finally:
        if hook is not None:
            hook.remove()


@pytest.mark.parametrize("V", [300, 4096 + 64, 37 * 128, 16384 * 8])
def test_belief_of_a_large_vocabulary(V):
    """The maxima by chunks and the sums by tiles, with and without forbidden tokens, beside
    float64."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0)) * 3
    logits[1, 7:90] = -torch.inf
    logits[2, [11, V - 1]] = 40.0  # a tie, of which the lower id leads
    belief = Belief(logits, with_entropy=True)
    assert (belief._peaks.chunks is None) == (
        V == 300
    )  # the sizes of SDAR and LLaDA are among the rest
    p = logits.double().softmax(-1)
    torch.testing.assert_close(
        belief.negative_entropy.double(), torch.special.xlogy(p, p).sum(-1), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(Belief(logits).negative_entropy, belief.negative_entropy)
    assert belief.top_token.tolist() == logits.argmax(-1).tolist() and belief.top_token[2] == 11
    values, ids = belief.top(5)
    torch.testing.assert_close(values, logits.topk(5).values)
    assert torch.equal(logits.gather(-1, ids), values) and ids[2, 0] == 11
    torch.testing.assert_close(belief.prob(ids).double(), p.gather(-1, ids), atol=1e-6, rtol=1e-4)
    logits[0, 3] = torch.nan
    assert Belief(logits, with_entropy=True).negative_entropy.isnan().tolist() == [
        True,
        False,
        False,
    ]
