"""The loop: hard decoding against transformers' own, the thinking span against scripts, and the
record by replay."""

import copy
import dataclasses
import inspect
import json
import logging
import math
import warnings

import pytest
import torch
from tiny import (
    ARCHS,
    BOS,
    END,
    EOS,
    PAD,
    PROMPTS,
    THINK,
    VOCAB,
    WIDTH,
    Forced,
    Largest,
    counted,
    edited_logits,
    left_padded,
    model_of,
    seeded,
    tokenizer_of,
    with_lora,
)
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    TextStreamer,
)

import softar
from softar import Kind, SoftConfig, soft_embed
from softar.decoders.stop import StopStrings, Thoughts
from softar.mixers import MIXERS
from softar.soft import Soft, entropy, mk_proba_dist
from softar.thought import Record, begin, join, mk_rules, replay

N = 12  # new tokens
HARD_WAYS = {
    "softness 0": dict(softness=0.0),
    "mixer hard": dict(mixer="hard"),
    "temperature 0": dict(temperature=0.0),
    "full vocabulary": dict(mixer="hard", top_k=None),
}
MIXER_ARGS = {
    "hard": {"sample": True},
    "soft": {},
    "gumbel": {"tau": 0.4},
    "k-samples": {"k": 3},
    "mixture-of-inputs": {"beta": 1.0},
    "dirichlet": {"gamma": 2.0},
    "hybrid": {"share": 0.4},
    "hidden": {},
}
SOFT, HARD, FORCED, ENDED = Kind.SOFT, Kind.HARD, Kind.FORCED, Kind.PAD


def greedy(model, ids, mask, **knobs):
    return model.generate(
        input_ids=ids, attention_mask=mask, **{"do_sample": False, "max_new_tokens": N, **knobs}
    )


def decode(model, rows=PROMPTS, *, config=None, **knobs):
    """softar.generate on left-padded rows; settings of SoftConfig and of generate side by side."""
    own = {k: knobs.pop(k) for k in [*knobs] if k in SoftConfig.__dataclass_fields__}
    config = config or SoftConfig(**{"max_new_tokens": N, **own})
    return softar.generate(model, *left_padded(rows), config=config, **knobs)


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


@pytest.fixture(scope="module")
def endless():
    """The same weights without an end-of-sequence token: every row uses all its steps."""
    return model_of("llama", eos_token_id=None)


# -- hard is transformers


@pytest.mark.parametrize("arch", ARCHS)
def test_hard_decoding_is_greedy_decoding_of_transformers(arch):
    ids, mask = left_padded(PROMPTS)
    plain = model_of(arch)
    for model in (plain, with_lora(plain)):
        expected = greedy(model, ids, mask)
        for name, knobs in HARD_WAYS.items():
            out = decode(model, **knobs)
            assert torch.equal(out.sequences, expected), name
            assert set(out.record.kind.unique().tolist()) <= {HARD, ENDED}
        config = SoftConfig(softness=0.0)
        plugged = greedy(model, ids, mask, custom_generate=softar.soft_decode, soft_config=config)
        assert torch.equal(plugged, expected)
    assert len(expected[:, ids.shape[1] :].unique()) > 4  # guards against a test on repeated tokens


def test_lora_of_these_tests_matters(llama):
    ids, mask = left_padded(PROMPTS)
    assert not torch.equal(
        greedy(llama, ids, mask), greedy(with_lora(model_of("llama")), ids, mask)
    )


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_hard_decoding_with_a_static_cache(arch):
    model, (ids, mask) = model_of(arch), left_padded(PROMPTS)
    settings = copy.deepcopy(model.generation_config)
    settings.cache_implementation = "static"
    expected = greedy(model, ids, mask)
    assert torch.equal(decode(model, softness=0.0, generation_config=settings).sequences, expected)
    # Soft decoding does not mind the kind of cache either.
    a, b = (
        decode(model, generation_config=settings, max_new_tokens=4),
        decode(model, max_new_tokens=4),
    )
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(a.record.entropy, b.record.entropy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_hard_decoding_in_bfloat16_where_logits_tie(seed):
    model = model_of("llama", seed=seed, dtype=torch.bfloat16, vocab_size=512)
    ids, mask = left_padded(PROMPTS)
    expected = greedy(model, ids, mask, max_new_tokens=20)
    for knobs in HARD_WAYS.values():
        assert torch.equal(decode(model, max_new_tokens=20, **knobs).sequences, expected)


class Coarse(LogitsProcessor):
    """Rounds the scores, so that many tokens share the first place."""

    def __call__(self, input_ids, scores):
        return (scores / 4).round()


def test_hard_decoding_where_many_tokens_share_the_first_place(llama):
    ids, mask = left_padded(PROMPTS)
    expected = greedy(llama, ids, mask, logits_processor=[Coarse()])
    for name, knobs in HARD_WAYS.items():
        assert torch.equal(
            decode(llama, logits_processor=[Coarse()], **knobs).sequences, expected
        ), name


def test_plugged_into_generate_it_is_the_same_loop(llama):
    ids, mask = left_padded(PROMPTS)
    for model in (llama, with_lora(model_of("llama"))):
        config = SoftConfig(mixer="gumbel", think_end=END, budget=4, max_new_tokens=N)
        ours = softar.generate(model, ids, mask, config=config, rng=seeded(1))
        knobs = dict(custom_generate=softar.soft_decode, soft_config=config, max_new_tokens=N)
        theirs = model.generate(
            input_ids=ids, attention_mask=mask, rng=seeded(1), return_dict_in_generate=True, **knobs
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        for a, b in zip(ours.record, theirs.record, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
        plain = model.generate(input_ids=ids, attention_mask=mask, rng=seeded(1), **knobs)
        assert torch.equal(plain, ours.sequences)


def test_the_default_configuration_is_soft_throughout(endless):
    a = softar.generate(endless, *left_padded(PROMPTS), config=SoftConfig())
    assert (a.record.kind == SOFT).all() and a.record.token.shape == (3, 64)
    assert a.record.ids.shape == (3, 64, 10)
    assert not torch.equal(a.completions[:, :N], greedy(endless, *left_padded(PROMPTS))[:, -N:])


# -- a row of a batch is the row


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_row_of_a_batch_is_the_row_alone(mixer, arch):
    # A narrow model: in a wide one the rounding that padding changes grows from step to step.
    model = model_of(arch, initializer_range=0.15)
    knobs = dict(
        mixer=mixer, mixer_args=MIXER_ARGS[mixer], answer_temperature=0.8, think_end=END, budget=6
    )
    batch = decode(model, rng=[seeded(s) for s in range(3)], max_new_tokens=10, **knobs)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(model, [prompt], rng=[seeded(row)], max_new_tokens=10, **knobs)
        T = alone.record.token.shape[1]
        for name, a, b in zip(alone.record._fields, alone.record, batch.record, strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(
                    a[0], b[row, :T], rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
                )
            else:
                assert torch.equal(a[0], b[row, :T]), name
        assert (batch.record.kind[row, T:] == ENDED).all()


def test_what_a_neighbour_does_changes_no_draw(llama):
    """Rows with generators of their own draw by step: what a neighbour is or does leaves them
    alone."""
    knobs = dict(
        mixer="k-samples", think_start=THINK, think_end=END, budget=5, answer_temperature=1.0
    )
    first = [BOS, 11, 12, THINK]
    a = decode(llama, [first, [BOS, 21]], rng=[seeded(1), seeded(2)], **knobs)
    b = decode(llama, [first, [BOS, 31, THINK]], rng=[seeded(1), seeded(3)], **knobs)
    T = min(a.record.token.shape[1], b.record.token.shape[1])
    assert torch.equal(a.record.token[0, :T], b.record.token[0, :T])
    assert torch.equal(a.record.ids[0, :T], b.record.ids[0, :T])


def test_seeds(llama):
    knobs = dict(mixer="gumbel", answer_temperature=1.0, think_end=END, budget=4)
    state = torch.random.get_rng_state()
    a, b, c = (decode(llama, rng=seeded(s), **knobs) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state), (
        "a given rng leaves the global one alone"
    )
    assert torch.equal(a.sequences, b.sequences) and torch.equal(a.record.weights, b.record.weights)
    assert not torch.equal(a.sequences, c.sequences)
    rows = [
        decode(llama, rng=[seeded(s) for s in seeds], **knobs).sequences
        for seeds in ((1, 2, 3), (1, 2, 4))
    ]
    n = min(r.shape[1] for r in rows)
    assert torch.equal(rows[0][:2, :n], rows[1][:2, :n]) and not torch.equal(
        rows[0][2, :n], rows[1][2, :n]
    )
    torch.manual_seed(5)
    d = decode(llama, **knobs)
    torch.manual_seed(5)
    assert torch.equal(d.sequences, decode(llama, **knobs).sequences)
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        decode(llama, rng=[seeded(), seeded()], **knobs)


def test_a_generator_moves_on_between_calls(llama):
    for make in (seeded, lambda s: [seeded(s), seeded(s + 1), seeded(s + 2)]):
        rng = make(1)
        a, b = (decode(llama, mixer="gumbel", rng=rng) for _ in range(2))
        assert not torch.equal(a.sequences, b.sequences)


# -- the thinking span


def script(*rows, peak=60.0):
    """Logits that make row i say rows[i][step] with near certainty; where that is None or past, the
    model's own."""

    def edit(step, logits):
        out = logits.clone()
        for row, tokens in enumerate(rows):
            if step < len(tokens) and tokens[step] is not None:
                out[row] = 0.0
                out[row, tokens[step]] = peak
        return out

    return edit


def kinds(out, row=0):
    return out.record.kind[row].tolist()


def never(model, *tokens):
    """Processors under which the model itself says none of these."""
    return [SuppressTokensLogitsProcessor([EOS, *tokens])]


@pytest.mark.parametrize("end", [END, (END,), (END, 40), (END, 40, 41)])
def test_budget_puts_the_end_in_and_the_answer_follows(llama, end):
    tokens = [end] if isinstance(end, int) else list(end)
    out = decode(llama, think_end=end, budget=5, logits_processor=never(llama, END))
    n = len(tokens)
    for row in range(3):
        assert kinds(out, row) == [SOFT] * 5 + [FORCED] * n + [HARD] * (N - 5 - n)
        assert out.record.token[row, 5 : 5 + n].tolist() == tokens
    assert out.record.logp[:, 5 : 5 + n].isnan().all()
    forced = out.record.weights[:, 5 : 5 + n]
    assert (forced[..., 0] == 1).all() and (forced[..., 1:] == 0).all()


def test_the_answer_is_what_transformers_says_after_the_same_tokens(endless):
    """With a hard thought the forced tokens and the greedy answer are an ordinary continuation."""
    out = decode(endless, softness=0.0, think_end=(END, 40), budget=3)
    ids, mask = left_padded(PROMPTS)
    thought = out.sequences[:, : ids.shape[1] + 5]
    assert torch.equal(thought[:, -5:-2], greedy(endless, ids, mask, max_new_tokens=3)[:, -3:])
    longer = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    expected = greedy(endless, thought, longer, max_new_tokens=N - 5)
    assert torch.equal(out.sequences, expected)


def test_budget_without_an_end_goes_over_to_the_answer(endless):
    out = decode(endless, budget=4)
    assert kinds(out) == [SOFT] * 4 + [HARD] * (N - 4)
    assert decode(endless, budget=0).record.kind.eq(HARD).all()
    assert torch.equal(decode(endless, budget=0).sequences, greedy(endless, *left_padded(PROMPTS)))


def test_budget_0_with_an_end_forces_it_first(endless):
    out = decode(endless, think_end=(END, 40), budget=0)
    assert kinds(out) == [FORCED] * 2 + [HARD] * (N - 2)


@pytest.mark.parametrize("end", [END, (40, END)])
def test_the_model_ends_its_thought_itself(endless, end):
    tokens = [END] if end == END else [40, END]
    rows = ([11, 12, *tokens], [None] * 2 + [11, 12, 13, *tokens], tokens)
    with edited_logits(endless, script(*rows)):
        out = decode(endless, think_end=end)
    for row, spoken in enumerate(rows):
        n = len(spoken)
        # The last token of the end is the model's own choice, fed hard; after it nothing is soft.
        assert kinds(out, row) == [SOFT] * (n - 1) + [HARD] * (N - n + 1), row
        assert out.record.token[row, n - 1] == END
        assert out.record.weights[row, n - 1].tolist() == [1.0] + [0.0] * 9


def test_never_soft_again_after_the_end(endless):
    """Neither a second start nor a second end reopens a thought, and the budget does not fire in
    the answer."""
    spoken = [11, END, 12, THINK, 13, END, 14, THINK]
    with edited_logits(endless, script(spoken, spoken, spoken)):
        out = decode(endless, think_end=END, budget=5)
    with edited_logits(endless, script(spoken)):
        again = decode(endless, [[BOS, THINK]], think_start=THINK, think_end=END, budget=5)
    for o in (out, again):
        assert kinds(o)[:8] == [SOFT] + [HARD] * 7
        assert o.record.token[0, :8].tolist() == spoken
        assert FORCED not in kinds(o)


START = {
    "id": THINK,
    "tuple": (THINK,),
    "two": (THINK, 40),
    "text": "<think>",
    "two texts": "<think> w40",
}


@pytest.mark.parametrize("start", START.values(), ids=START)
def test_a_prompt_may_be_open_closed_or_not_opened(llama, start):
    end = "</think>" if isinstance(start, str) else END
    ids = [THINK, 40] if start in (START["two"], START["two texts"]) else [THINK]
    prompts = (
        [BOS, 11, *ids],  # open
        [BOS, *ids, 12, END, 13],  # opened and closed
        [BOS, 11, 12],  # never opened
        [BOS, *ids, 12, END, 13, *ids, 14],  # opened again
        [*ids],
    )
    out = decode(
        llama,
        prompts,
        think_start=start,
        think_end=end,
        budget=3,
        tokenizer=tokenizer_of(),
        logits_processor=never(llama, THINK, END),
    )
    thinks = [SOFT] * 3 + [FORCED] + [HARD] * (N - 4)
    assert [kinds(out, row) == thinks for row in range(5)] == [True, False, False, True, True]
    for row in (1, 2):
        assert kinds(out, row) == [HARD] * N


@pytest.mark.parametrize("ids", [[THINK], [THINK, 40]])
def test_the_model_opens_a_thought_itself(llama, ids):
    rows = ([11, 12, *ids], ids, [])
    out = decode(
        llama,
        think_start=tuple(ids),
        think_end=END,
        budget=2,
        logits_processor=[*never(llama, THINK), Forced(5, [[*r, 50, 51] for r in rows])],
    )
    for row, spoken in enumerate(rows[:2]):
        m = len(spoken)
        assert out.record.token[row, :m].tolist() == spoken
        expected = [HARD] * m + [SOFT] * 2 + [FORCED]
        assert kinds(out, row) == (expected + [HARD] * N)[:N]
    assert SOFT not in kinds(out, 2)


def test_a_later_turn_may_think_again_though_the_prompt_closed_a_thought(llama):
    prompt = [BOS, THINK, 11, END, 12]
    out = decode(
        llama,
        [prompt],
        think_start=THINK,
        think_end=END,
        budget=2,
        logits_processor=[*never(llama), Forced(5, [[THINK, 50, 51, 52]])],
    )
    assert kinds(out)[:4] == [HARD, SOFT, SOFT, FORCED]


def sharp(certain):
    """Raw logits that are certain (entropy 0) at the steps named for each row, else flat (entropy
    log V)."""

    def edit(step, logits):
        out = torch.zeros_like(logits)
        out[:, 20] = 0.5  # so that the flat ones have a greedy token, and it is neither EOS nor END
        for row, steps in enumerate(certain):
            if step in steps:
                out[row, 30] = 100.0
        return out

    return edit


@pytest.mark.parametrize("end", [END, (END, 40), None])
def test_cold_stop_counts_consecutive_steps(llama, end):
    n = {END: 1, (END, 40): 2, None: 0}[end]
    # the third low step in a row: 5, 2, never
    certain = ({1, 3, 4, 5}, {0, 1, 2}, {2, 3, 5, 6, 8, 9})
    with edited_logits(llama, sharp(certain)):
        out = decode(llama, think_end=end, cold_stop_entropy=0.5, cold_stop_steps=3)
    for row, step in ((0, 5), (1, 2)):
        assert kinds(out, row) == [SOFT] * step + [FORCED] * n + [HARD] * (N - step - n)
    assert kinds(out, 2) == [SOFT] * N
    assert out.record.entropy[0, 1] < 1e-3 and out.record.entropy[0, 0] > 4


def test_cold_stop_looks_at_the_unfiltered_entropy(llama):
    """One token kept, filtered entropy 0 at every step, and still it is warm; and the other way
    round."""
    with edited_logits(llama, sharp((set(), set(), set()))):
        for filters in (dict(top_k=1), dict(top_p=0.0), dict(min_p=1.0), dict(keep=1)):
            warm = decode(llama, think_end=END, cold_stop_entropy=0.5, cold_stop_steps=1, **filters)
            assert FORCED not in kinds(warm) and (warm.record.entropy > 4).all()
    with edited_logits(llama, sharp(({3},) * 3)):
        cold = decode(llama, think_end=END, cold_stop_entropy=0.5, cold_stop_steps=1, top_k=None)
    assert kinds(cold)[:5] == [SOFT] * 3 + [FORCED, HARD]


def test_cold_stop_sees_the_raw_logits_at_the_temperature_of_the_thought(endless):
    out = decode(endless, temperature=0.5, logits_processor=[Coarse()])
    with torch.no_grad():
        logits = endless(
            input_ids=left_padded(PROMPTS)[0], attention_mask=left_padded(PROMPTS)[1]
        ).logits[:, -1]
    torch.testing.assert_close(out.record.entropy[:, 0], entropy(logits, 0.5), rtol=1e-4, atol=1e-5)


def test_cold_stop_does_not_count_outside_the_thought(llama):
    """A row that opens late starts its count then; an answer is never stopped."""
    with edited_logits(llama, sharp(({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11},) * 2)):
        out = decode(
            llama,
            [[BOS, 11], [BOS, THINK]],
            think_start=THINK,
            think_end=END,
            cold_stop_entropy=0.5,
            cold_stop_steps=3,
            logits_processor=[Forced(2, [[12, 13, THINK], []])],
        )
    assert kinds(out, 0) == [HARD] * 3 + [SOFT] * 2 + [FORCED] + [HARD] * 6
    assert kinds(out, 1) == [SOFT] * 2 + [FORCED] + [HARD] * 9


def test_budget_and_cold_stop_whichever_is_first(llama):
    with edited_logits(llama, sharp(({2, 3}, {6, 7}, set()))):
        out = decode(llama, think_end=END, budget=5, cold_stop_entropy=0.5, cold_stop_steps=2)
    assert [kinds(out, row).index(FORCED) for row in range(3)] == [3, 5, 5]


def test_text_ends_of_one_and_of_several_tokens(llama):
    tokenizer = tokenizer_of()
    for text, ids in (("</think>", [END]), ("</think> w40 w41", [END, 40, 41])):
        out = decode(
            llama, think_end=text, budget=2, tokenizer=tokenizer, logits_processor=never(llama, END)
        )
        same = decode(llama, think_end=tuple(ids), budget=2, logits_processor=never(llama, END))
        assert torch.equal(out.sequences, same.sequences)
        assert out.record.token[0, 2 : 2 + len(ids)].tolist() == ids


def test_where_the_answers_start(llama):
    rows = ([11, 12, END, 13, EOS], [11, 12, 13, 14, 15, 16, 17], [11, EOS])
    with edited_logits(llama, script(*rows)):
        out = decode(llama, think_end=(END,), max_new_tokens=7)
    assert out.answer_start.tolist() == [3, 7, 2]
    assert [a.tolist() for a in out.answers] == [[13, EOS], [], []]
    with edited_logits(llama, script(*rows)):
        out = decode(llama, think_end=(END, 40), budget=2, max_new_tokens=7)
    assert out.answer_start.tolist() == [4, 4, 2]
    assert [a.tolist() for a in out.answers] == [[EOS], [15, 16, 17], []]
    with edited_logits(llama, script(*rows)):
        out = decode(llama, max_new_tokens=7)
    assert out.answer_start.tolist() == [0, 0, 0]
    assert [a.tolist() for a in out.answers] == [list(r) for r in rows]


# -- the answer


def test_a_sampled_answer_is_an_exact_sample(llama):
    n = 6000
    config = SoftConfig(
        budget=0, max_new_tokens=1, answer_temperature=0.7, answer_top_k=5, answer_min_p=0.01
    )
    ids = torch.tensor([PROMPTS[0]]).expand(n, -1)
    out = softar.generate(llama, ids, config=config, rng=seeded(7))
    with torch.no_grad():
        logits = llama(input_ids=ids[:1]).logits[0, -1]
    dist = mk_proba_dist(logits, temperature=0.7, top_k=5, min_p=0.01)
    p = torch.zeros(VOCAB).scatter(0, dist.ids, dist.weights)
    counts = out.completions[:, 0].bincount(minlength=VOCAB)
    assert (counts[p == 0] == 0).all() and (p > 0).sum() > 2
    expected = n * p[p > 0]
    stat = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), stat / 2) > 1e-6
    torch.testing.assert_close(out.record.logp[:, 0], p[out.completions[:, 0]].log())
    assert (out.record.kind == HARD).all()


def test_greedy_answers_after_a_sampled_thought_and_the_reverse(endless):
    knobs = dict(mixer="k-samples", think_end=END, budget=4)
    a, b = (decode(endless, rng=seeded(s), **knobs) for s in (1, 2))
    assert a.record.logp[:, :4].isfinite().all()
    assert not torch.equal(a.sequences, b.sequences)
    knobs |= dict(mixer="soft", answer_temperature=1.5)
    a, b = (decode(endless, rng=seeded(s), **knobs) for s in (1, 2))
    assert torch.equal(a.record.token[:, :5], b.record.token[:, :5])
    assert not torch.equal(a.record.token[:, 5:], b.record.token[:, 5:])


def test_rows_end_at_their_eos_and_are_padded(llama):
    rows = ([11, 12, EOS, 13, 14], [11, END, 12, 13, EOS, 14], [11, 12, 13, 14, 15, 16, 17, EOS])
    with edited_logits(llama, script(*rows)):
        out = decode(llama, think_end=END)
    assert out.record.token.shape == (3, 8)  # no step after the last row has ended
    for row, n in enumerate((3, 5, 8)):
        assert out.record.token[row].tolist() == [*rows[row][:n], *[PAD] * (8 - n)]
        assert kinds(out, row)[n:] == [ENDED] * (8 - n) and ENDED not in kinds(out, row)[:n]
        assert out.record.entropy[row, n:].eq(0).all() and out.record.logp[row, n:].isnan().all()
    assert torch.equal(out.completions, out.record.token)
    assert out.prompt_length == 5 and torch.equal(out.sequences[:, :5], left_padded(PROMPTS)[0])


@pytest.mark.parametrize("mixer", ["soft", "gumbel"])
def test_the_eos_of_a_soft_step_is_one_hard_token(llama, mixer):
    settings = GenerationConfig(eos_token_id=[EOS, 33], pad_token_id=PAD)
    with edited_logits(llama, script([11, 33], [12, 13, EOS], [14, 15, 16, 17])):
        out = decode(llama, mixer=mixer, generation_config=settings, max_new_tokens=4)
    assert [kinds(out, row) for row in range(3)] == [
        [SOFT, HARD, ENDED, ENDED],
        [SOFT, SOFT, HARD, ENDED],
        [SOFT] * 4,
    ]
    for row, step, token in ((0, 1, 33), (1, 2, EOS)):
        ids, weights = out.record.ids[row, step], out.record.weights[row, step]
        assert (
            weights.tolist() == [1.0] + [0.0] * (len(weights) - 1)
            and ids[0] == out.completions[row, step] == token
        )
    free = decode(
        model_of("llama", eos_token_id=None), max_new_tokens=4, generation_config=GenerationConfig()
    )
    assert kinds(free, 0) == [SOFT] * 4  # without an EOS token nothing ends


def test_several_end_of_sequence_tokens_and_another_pad(llama):
    settings = GenerationConfig(eos_token_id=[EOS, 33], pad_token_id=7)
    rows = ([11, 33], [12, 13, EOS], [14, 15, 16, 17])
    with edited_logits(llama, script(*rows)):
        out = decode(llama, generation_config=settings, max_new_tokens=4)
    assert out.completions.tolist() == [[11, 33, 7, 7], [12, 13, EOS, 7], [14, 15, 16, 17]]


# -- processors, criteria, generate's settings


def test_logits_processors_act_on_thought_and_answer(endless):
    free = decode(endless, think_end=END, budget=4)
    used = sorted({*free.record.ids[free.record.weights > 0].tolist()} - {END})
    banned = used[: len(used) // 2]
    out = decode(
        endless, think_end=END, budget=4, logits_processor=[SuppressTokensLogitsProcessor(banned)]
    )
    fed = out.record.ids[out.record.weights > 0].tolist()
    assert not set(fed) & set(banned) and not set(out.completions.flatten().tolist()) & set(banned)


def test_penalties_of_the_generation_configuration_are_honoured(llama):
    ids, mask = left_padded(PROMPTS)
    settings = GenerationConfig(
        eos_token_id=EOS,
        pad_token_id=PAD,
        repetition_penalty=3.0,
        no_repeat_ngram_size=2,
        min_new_tokens=6,
    )
    knobs = dict(repetition_penalty=3.0, no_repeat_ngram_size=2, min_new_tokens=6)
    expected = greedy(llama, ids, mask, **knobs)
    assert not torch.equal(expected, greedy(llama, ids, mask))
    assert torch.equal(decode(llama, softness=0.0, generation_config=settings).sequences, expected)
    plugged = greedy(
        llama,
        ids,
        mask,
        custom_generate=softar.soft_decode,
        soft_config=SoftConfig(softness=0),
        **knobs,
    )
    assert torch.equal(plugged, expected)


def test_the_models_own_generation_configuration_counts_when_none_is_given():
    model = model_of("llama")
    ids, mask = left_padded(PROMPTS)
    model.generation_config.repetition_penalty = 3.0
    assert torch.equal(decode(model, softness=0.0).sequences, greedy(model, ids, mask))
    assert (
        model.generation_config.max_new_tokens is None and model.generation_config.use_cache is True
    )


class Noted(logging.Handler):
    """Everything that transformers logs."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def noted():
    """Warnings are errors, and what transformers logs is kept."""
    handler, logger = Noted(), logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield handler.lines
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "sampling",
    [
        dict(temperature=0.6, top_k=3, top_p=0.5),
        dict(min_p=0.3, typical_p=0.5, epsilon_cutoff=0.01, eta_cutoff=0.01),
        dict(temperature=5.0, top_h=0.5),
        dict(num_return_sequences=2, max_length=7),
    ],
)
def test_sampling_settings_of_the_model_do_not_count_and_warn_of_nothing(sampling, noted):
    model = model_of("llama")
    ids, mask = left_padded(PROMPTS)
    expected, soft = greedy(model, ids, mask), decode(model, top_k=20)
    model.generation_config.update(do_sample=True, **sampling)
    for _ in range(2):
        assert torch.equal(decode(model, softness=0.0).sequences, expected)
    out = decode(model, top_k=20)
    assert torch.equal(out.sequences, soft.sequences) and torch.equal(
        out.record.weights, soft.record.weights
    )
    # transformers itself tells of a model's max_length whenever max_new_tokens is given.
    assert not [line for line in noted if "max_length" not in line]
    if "num_return_sequences" not in sampling:
        plugged = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=N,
            custom_generate=softar.soft_decode,
            soft_config=SoftConfig(softness=0.0),
        )
        assert torch.equal(plugged, expected)
    assert model.generation_config.do_sample is True  # the caller's settings are as they were


class StopsAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_end_rows_one_by_one(endless):
    rows = ([11, 33, 12], [11, 12, 13, 33], [14, 15, 16, 17, 18, 19])
    with edited_logits(endless, script(*rows)):
        out = decode(endless, max_new_tokens=6, stopping_criteria=[StopsAt(33)])
    assert out.completions.tolist() == [[11, 33, *[PAD] * 4], [11, 12, 13, 33, PAD, PAD], rows[2]]


# -- the record


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("softness", [1.0, 0.4])
def test_the_record(llama, mixer, softness):
    if mixer == "hidden" or (mixer == "hard" and softness < 1):
        return  # refused: there is no mixture to be a share; for "hidden" see test_feedback.py
    with edited_logits(llama, script([None, None, EOS], [None] * 3 + [END])):
        out = decode(
            llama,
            mixer=mixer,
            mixer_args=MIXER_ARGS[mixer],
            softness=softness,
            think_end=(END, 40),
            budget=6,
            top_p=0.95,
            rng=seeded(3),
            logits_processor=[SuppressTokensLogitsProcessor([END])],
        )
    r = out.record
    B, T = out.completions.shape
    K = r.ids.shape[2]
    assert r.ids.shape == r.weights.shape == (B, T, K) and r.ids.dtype == torch.int64
    assert r.token.shape == r.kind.shape == r.logp.shape == r.entropy.shape == (B, T)
    assert r.weights.dtype == r.logp.dtype == r.entropy.dtype == torch.float32
    assert r.kind.dtype == torch.int8 and r.token.dtype == torch.int64
    totals = r.weights.sum(-1)[(r.kind != ENDED) & ((r.kind == HARD) | (mixer != "hybrid"))]
    torch.testing.assert_close(totals, torch.ones_like(totals))
    assert (
        (r.weights >= 0).all()
        and (r.entropy >= 0).all()
        and (r.entropy <= math.log(VOCAB) + 1e-4).all()
    )
    single = (r.kind == HARD) | (r.kind == FORCED)
    assert (r.weights[single].amax(-1) == 1).all()
    assert torch.equal(
        r.ids[single].gather(1, r.weights[single].argmax(-1, keepdim=True))[:, 0], r.token[single]
    )
    assert r.logp[(r.kind == FORCED) | (r.kind == ENDED)].isnan().all()
    thought = r.logp[:, :2]
    assert (
        thought.isnan().all()
        if mixer in ("soft", "dirichlet")
        else (thought.isfinite() & (thought <= 0)).all()
    )
    assert (r.kind == FORCED).any() and ((r.kind == SOFT).any() == (mixer != "hard"))
    # The token that stands for a step is among what was fed.
    fed = torch.zeros(B, T, VOCAB).scatter_add(-1, r.ids, r.weights)
    assert (fed.gather(-1, r.token[..., None])[r.kind != ENDED] > 0).all()
    if softness < 1 and mixer in ("soft", "gumbel", "dirichlet"):
        assert (fed.gather(-1, r.token[..., None])[r.kind == SOFT] >= 1 - softness - 1e-5).all()


@pytest.mark.parametrize("mixer", ["soft", "gumbel", "k-samples", "mixture-of-inputs"])
def test_softness_0_thinks_in_the_likeliest_tokens_or_in_ordinary_samples(llama, mixer):
    n, how = 2000, dict(mixer=mixer, softness=0.0, temperature=0.7, top_k=4)
    out = decode(llama, PROMPTS[:1] * n, **how, max_new_tokens=2, rng=seeded())
    assert (out.record.kind == HARD).all() and (out.record.weights[..., 0] == 1).all()
    ids, p = mk_proba_dist(llama(*left_padded(PROMPTS[:1])).logits[0, -1], temperature=0.7, top_k=4)
    share = (out.record.token[:, :1] == ids).float().mean(0)
    if mixer == "soft":
        assert share[p.argmax()] == 1
    else:
        assert p.max() < 0.9 and ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_softness_between_is_the_mixture_and_its_token(llama):
    a, b = decode(llama, softness=0.25, max_new_tokens=1), decode(llama, max_new_tokens=1)
    fed = lambda r: torch.zeros(3, VOCAB).scatter_add(-1, r.ids[:, 0], r.weights[:, 0])  # noqa: E731
    one = torch.nn.functional.one_hot(b.record.token[:, 0], VOCAB)
    torch.testing.assert_close(fed(a.record), 0.25 * fed(b.record) + 0.75 * one)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mixer", ["soft", "k-samples"])
def test_the_record_replays_in_one_forward(arch, mixer):
    model = model_of(arch)
    ids, mask = left_padded(PROMPTS)
    seen = []

    def note(step, logits):
        seen.append(logits.clone())
        return logits

    with edited_logits(model, note):
        out = decode(
            model,
            mixer=mixer,
            think_end=(END, 40),
            budget=5,
            rng=seeded(4),
            rescale="norm",
            temperature=0.7,
        )
    table, T = model.get_input_embeddings(), out.completions.shape[1]
    fed = soft_embed(Soft(out.record.ids, out.record.weights), table, rescale="norm")
    inputs = torch.cat([table(ids), fed], 1)
    longer = torch.cat([mask, torch.ones(3, T, dtype=torch.long)], 1)
    positions = (longer.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(inputs_embeds=inputs, attention_mask=longer, position_ids=positions).logits
    logits = logits[:, ids.shape[1] - 1 : -1]
    alive = out.record.kind != ENDED
    torch.testing.assert_close(logits[alive], torch.stack(seen, 1)[alive], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        entropy(logits, 0.7)[alive], out.record.entropy[alive], rtol=1e-3, atol=1e-4
    )


def test_forwards_are_counted(llama):
    for knobs in (
        dict(),
        dict(softness=0.0),
        dict(think_end=END, budget=3),
        dict(max_new_tokens=1),
    ):
        with counted(llama) as calls:
            out = decode(llama, **knobs)
        assert out.num_forwards == len(calls) == out.completions.shape[1]
        assert out.token_forwards == sum(b * t for b, t in calls)
        # one position at a time, from the cache
        assert calls[0] == (3, 5) and set(calls[1:]) <= {(3, 1)}
        assert 0 < out.seconds < 60


def test_callback_sees_every_step(llama):
    seen = []
    out = decode(llama, think_end=END, budget=3, callback=seen.append)
    assert [s["step"] for s in seen] == list(range(out.completions.shape[1]))
    for t, s in enumerate(seen):
        assert set(s) == {"step", "record", "sequences", "vector"} and s["vector"] is None
        assert torch.equal(s["sequences"], out.sequences[:, : 5 + t + 1])
        assert torch.equal(s["record"].token, out.record.token[:, t])
        assert torch.equal(s["record"].kind, out.record.kind[:, t])
        K = s["record"].ids.shape[1]
        assert torch.equal(s["record"].weights, out.record.weights[:, t, :K])


class Heard(TextStreamer):
    def __init__(self, tokenizer, **kwargs):
        super().__init__(tokenizer, **kwargs)
        self.text, self.ended, self.puts = "", False, []

    def put(self, value):
        self.puts.append(value.tolist())
        super().put(value)

    def on_finalized_text(self, text, stream_end=False):
        self.text, self.ended = self.text + text, stream_end


def test_streaming(llama):
    tokenizer, prompt = tokenizer_of(), [BOS, 11, 12]
    heard = Heard(tokenizer, skip_prompt=True)
    out = decode(llama, [prompt], think_end=END, budget=3, streamer=heard)
    assert (
        heard.puts[0] == [prompt] and [p[0] for p in heard.puts[1:]] == out.completions[0].tolist()
    )
    assert heard.ended and heard.text.split() == tokenizer.decode(out.completions[0]).split()
    plugged = Heard(tokenizer, skip_prompt=True)
    llama.generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=N,
        custom_generate=softar.soft_decode,
        soft_config=SoftConfig(think_end=END, budget=3),
        soft_streamer=plugged,
    )
    assert plugged.puts == heard.puts and plugged.ended


def test_rescaling_reaches_what_is_fed(endless):
    plain, scaled = (decode(endless, rescale=r) for r in (None, "norm"))
    assert torch.equal(plain.record.weights[:, 0], scaled.record.weights[:, 0])
    assert not torch.allclose(plain.record.entropy[:, 1], scaled.record.entropy[:, 1], rtol=1e-3)


def test_banned_ids_never_enter_a_thought_but_may_be_said_in_the_answer(endless):
    free = decode(endless, think_end=END, budget=4)
    banned = tuple(
        {*free.record.token[:, :4].flatten().tolist(), *free.record.token[:, 5:].flatten().tolist()}
        - {END}
    )
    out = decode(endless, think_end=END, budget=4, banned=banned)
    thought = out.record.ids[:, :4][out.record.weights[:, :4] > 0]
    assert not set(thought.tolist()) & set(banned)
    assert set(out.record.token[:, 5:].flatten().tolist()) & set(banned)


def test_a_mixer_of_ones_own(endless):
    def second(dist, *, rng=None, slot=1):
        mixed = MIXERS["soft"](dist)
        return mixed._replace(token=dist.ids[..., slot])

    out = decode(endless, mixer=second)
    assert torch.equal(out.record.token, out.record.ids[..., 1]) and (out.record.kind == SOFT).all()
    first = decode(endless, mixer=second, mixer_args={"slot": 0}, max_new_tokens=1)
    assert torch.equal(first.record.token, first.record.ids[..., 0])


def test_one_new_token_and_one_row(llama):
    out = decode(llama, [[BOS]], max_new_tokens=1)
    assert out.sequences.shape == (1, 2) and out.num_forwards == 1 and out.token_forwards == 1


def test_no_gradient_and_no_change_of_mode(llama):
    out = decode(llama)
    assert not out.record.weights.requires_grad and not llama.training
    model = model_of("llama").train()
    decode(model)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mixer", ["soft", "gumbel"])
def test_a_step_writes_nothing_of_the_tables_size(mixer):
    V = 8192
    model = model_of("llama", vocab_size=V, tie_word_embeddings=True)
    with Largest() as largest:
        decode(
            model, mixer=mixer, max_new_tokens=4, answer_temperature=0.7, think_end=END, budget=2
        )
    # the prompt's logits may be kept for each position
    assert 3 * V <= largest.numel <= 5 * 3 * V < V * WIDTH


# -- bad input


@pytest.mark.parametrize(
    "knobs, told",
    [
        ({"temperature": -0.1}, r"temperature=-0\.1"),
        ({"answer_temperature": -1}, "temperature=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"answer_top_k": 0}, "top_k=0"),
        ({"keep": 0}, "keep=0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"min_p": -0.5}, r"min_p=-0\.5"),
        ({"answer_top_p": 2}, "top_p=2"),
        ({"answer_min_p": 2}, "min_p=2"),
        ({"banned": (-1,)}, r"banned=\(-1,\)"),
        ({"softness": 1.1}, r"softness=1\.1"),
        ({"softness": 0.5, "mixer": "hard"}, r"softness=0\.5 does nothing with a mixer of single"),
        (
            {"cold_stop_steps": 3},
            "cold_stop_steps=3 does nothing without a cold stop: set cold_stop_e",
        ),
        ({"softness": -0.1}, r"softness=-0\.1"),
        ({"softness": math.nan}, "softness=nan"),
        ({"mixer": "gumble"}, "mixer='gumble'.*gumbel"),
        ({"mixer": "gumbel", "mixer_args": {"taw": 1}}, "taw"),
        ({"mixer": "gumbel", "mixer_args": {"tau": -1}}, "tau=-1"),
        ({"rescale": "L1"}, "rescale='L1'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"budget": -1}, "budget=-1"),
        ({"cold_stop_steps": 0}, "cold_stop_steps=0"),
        ({"cold_stop_entropy": -1.0}, r"cold_stop_entropy=-1\.0"),
        ({"think_start": "<think>"}, "think_start='<think>'.*think_end"),
        ({"think_end": ()}, "think_end"),
    ],
)
def test_configurations_out_of_range_are_named(knobs, told):
    with pytest.raises(ValueError, match=told):
        SoftConfig(**knobs)


def test_a_misspelt_field_is_an_error():
    with pytest.raises(TypeError, match="temprature"):
        SoftConfig(temprature=1)


@pytest.mark.parametrize(
    "knobs, told",
    [
        ({"top_k": VOCAB + 1}, "top_k=65"),
        ({"keep": VOCAB + 1, "top_k": None}, "keep=65"),
        ({"answer_top_k": VOCAB + 1, "answer_temperature": 1.0, "budget": 2}, "top_k=65"),
        ({"banned": (VOCAB,)}, r"banned=\(64,\)"),
        ({"think_end": VOCAB}, r"think_end=\(64,\)"),
        ({"think_end": END, "think_start": (THINK, 99)}, r"think_start=\(3, 99\)"),
        ({"think_end": "</think>"}, "think_end='</think>'.*tokenizer"),
        ({"think_end": END, "think_start": "<think>"}, "think_start='<think>'.*tokenizer"),
    ],
)
def test_what_does_not_fit_the_model_is_named_before_any_forward(llama, knobs, told):
    with counted(llama) as calls:
        with pytest.raises(ValueError, match=told):
            decode(llama, **knobs)
        with pytest.raises(ValueError, match=told):
            greedy(
                llama,
                *left_padded(PROMPTS),
                custom_generate=softar.soft_decode,
                soft_config=SoftConfig(**knobs),
            )
    assert not calls


def test_a_text_that_is_empty_for_the_tokenizer(llama):
    with pytest.raises(ValueError, match="think_end"), counted(llama) as calls:
        decode(llama, think_end="  ", tokenizer=tokenizer_of())
    assert not calls


IDS, MASK = left_padded(PROMPTS)


@pytest.mark.parametrize(
    "ids, mask, told",
    [
        (IDS[:, :0], None, r"\(3, 0\).*empty prompt"),
        (IDS[:0], MASK[:0], r"\(0, 5\).*empty prompt"),
        (IDS, MASK * torch.tensor([[1], [0], [1]]), r"rows \[1\].*empty prompt"),
        (IDS, MASK[:, 1:], r"\(3, 4\).*\(3, 5\)"),
        (IDS, MASK[0], r"\(5,\).*\(3, 5\)"),
        (IDS, MASK.flip(1), r"right.*rows \[1, 2\].*left"),
        (IDS, torch.tensor([[1, 1, 0, 1, 1]] * 3), r"rows \[0, 1, 2\]"),
        (IDS[0], None, r"\(5,\)"),
        (IDS.float(), None, "float32"),
    ],
)
def test_bad_prompts_are_named_before_any_forward(llama, ids, mask, told):
    with pytest.raises(ValueError, match=told), counted(llama) as calls:
        softar.generate(llama, ids, mask)
    assert not calls


def test_right_padding_is_an_error_when_plugged_into_generate_too(llama):
    with pytest.raises(ValueError, match="right"), counted(llama) as calls:
        greedy(llama, IDS.flip(1), MASK.flip(1), custom_generate=softar.soft_decode)
    assert not calls


class Blind(LlamaForCausalLM):
    """A model that has no embeddings to mix."""

    def get_input_embeddings(self):
        raise NotImplementedError


class Nothing(LlamaForCausalLM):
    def get_input_embeddings(self):
        return None


@pytest.mark.parametrize("kind", [Blind, Nothing])
def test_a_model_without_input_embeddings(llama, kind):
    model = kind(llama.config).eval()
    with (
        pytest.raises(ValueError, match=f"{kind.__name__}.*input embeddings"),
        counted(model) as calls,
    ):
        decode(model)
    assert not calls


def test_without_a_cache_it_cannot_work_and_checkpointing_does_not_matter():
    model = model_of("llama")
    with counted(model) as calls:
        with pytest.raises(ValueError, match="use_cache=False"):
            greedy(
                model, *left_padded(PROMPTS), custom_generate=softar.soft_decode, use_cache=False
            )
    assert not calls
    model.gradient_checkpointing_enable()  # of training alone, and so is dropout
    model.train()
    expected = decode(model_of("llama"))
    assert torch.equal(decode(model).sequences, expected.sequences) and model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("knobs", [{}, {"softness": 0.0}, {"budget": 2}])
def test_broken_logits_stop_the_decode_and_the_step_is_named(endless, value, step, knobs):
    def edit(at, logits):
        out = logits.clone()
        if at == step:
            out[1, 7] = value
        return out

    heard = []
    with edited_logits(endless, edit), counted(endless) as calls:
        with pytest.raises(FloatingPointError, match=rf"step {step}, rows \[1\]"):
            decode(endless, callback=heard.append, **knobs)
    assert len(calls) == step + 1 and len(heard) == step


def test_broken_logits_of_a_row_that_has_ended_do_not_matter(llama):
    def edit(at, logits):
        out = script([None], [EOS])(at, logits)
        if at > 0:
            out[1] = math.nan
        return out

    settings = copy.deepcopy(llama.generation_config)
    with edited_logits(llama, edit):
        out = decode(llama, generation_config=settings)
    assert (
        kinds(out, 1)[1:] == [ENDED] * (out.completions.shape[1] - 1) and kinds(out, 0)[1] == SOFT
    )
    assert out.record.weights[0].isfinite().all()


# -- save, load


def test_configurations_are_saved_and_loaded(tmp_path):
    config = SoftConfig(
        mixer="mixture-of-inputs",
        mixer_args={"beta": math.inf},
        softness=0.7,
        top_k=None,
        top_p=0.9,
        min_p=0.01,
        keep=3,
        banned=(0, 1),
        rescale="norm",
        think_start="<think>",
        think_end=(4, 40),
        budget=9,
        cold_stop_entropy=0.01,
        answer_temperature=0.5,
        answer_top_k=4,
    )
    for c in (config, SoftConfig()):
        c.save(tmp_path)
        assert SoftConfig.load(tmp_path) == c
    saved = json.loads((tmp_path / "soft_config.json").read_text())
    (tmp_path / "soft_config.json").write_text(json.dumps(saved | {"tempature": 1}))
    with pytest.raises(ValueError, match=r"unknown fields.*tempature"):
        SoftConfig.load(tmp_path)
    (tmp_path / "soft_config.json").write_text(json.dumps(saved | {"softness": 3}))
    with pytest.raises(ValueError, match="softness=3"):
        SoftConfig.load(tmp_path)
    with pytest.raises(ValueError, match="function"):
        SoftConfig(mixer=MIXERS["soft"]).save(tmp_path)


def test_resolve_turns_text_into_ids():
    config = SoftConfig(think_start="<think>", think_end="</think> w9").resolve(tokenizer_of())
    assert (config.think_start, config.think_end) == ((THINK,), (END, 9))
    assert SoftConfig(think_end=END).resolve(None) == SoftConfig(think_end=END)


def test_ids_are_tuples_however_they_are_given(tmp_path):
    config = SoftConfig(think_start=[THINK, 9], think_end=END, banned=[7, 8])
    assert (config.think_start, config.think_end) == ((THINK, 9), (END,))
    assert config == SoftConfig(think_start=(THINK, 9), think_end=(END,), banned=(7, 8))
    config.save(tmp_path)
    saved = json.loads((tmp_path / "soft_config.json").read_text())
    assert saved["think_end"] == [END]
    older = saved | {"think_end": END}  # as it was written before
    (tmp_path / "soft_config.json").write_text(json.dumps(older))
    assert SoftConfig.load(tmp_path) == config
    with pytest.raises(ValueError, match="empty; None is for none"):
        SoftConfig(think_end=[])


@pytest.mark.parametrize(
    "knobs, has_answer, is_soft, draws, width",
    [
        ({}, False, True, False, 10),
        ({"budget": 0}, True, True, False, 10),
        ({"think_end": END, "answer_temperature": 0.5}, True, True, True, 10),
        ({"cold_stop_entropy": 0.0, "softness": 0.5, "keep": 4}, True, True, False, 5),
        ({"mixer": "gumbel", "softness": 0.0, "top_k": None}, False, False, True, math.inf),
        ({"temperature": 0.0}, False, False, False, 1),
        ({"mixer": "hard"}, False, False, False, 1),
        ({"mixer": "hard", "mixer_args": {"sample": True}}, False, False, True, 1),
        ({"mixer": "k-samples", "mixer_args": {"k": 5}}, False, True, True, 5),
    ],
)
def test_what_a_configuration_says(knobs, has_answer, is_soft, draws, width):
    config = SoftConfig(**knobs)
    facts = (config.has_answer, config.is_soft, config.draws, config.width)
    assert facts == (has_answer, is_soft, draws, width)


def test_configurations_are_frozen():
    with pytest.raises(AttributeError):
        SoftConfig().softness = 0.5


SPANS = [
    dict(think_end=(END, 9), budget=3),
    dict(think_start=(THINK, 11), think_end=END),
    dict(cold_stop_entropy=3.3, cold_stop_steps=2, answer_temperature=1.0),
    dict(mixer="k-samples", budget=4),
    dict(switch="block", switch_dwell=1, think_end=END)
    | dict(switch_budget=1, switch_final=(9, 10), switch_answer=2),
]


@pytest.mark.parametrize("span", SPANS)
def test_a_decode_replays_by_its_own_rules(llama, span):
    ids, mask = left_padded(PROMPTS)
    config = SoftConfig(max_new_tokens=N, **span)
    out = softar.generate(llama, ids, mask, config=config, rng=seeded(1))
    rules = mk_rules(config, ids.device, torch.tensor(PAD), torch.tensor([EOS]))
    progress, record = replay(rules, begin(config, ids), out.record, out.record.kind == Kind.PAD)
    assert torch.equal(progress.answer_start, out.answer_start)
    for ours, theirs in zip(record, out.record, strict=True):
        assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1))


@pytest.mark.parametrize("span", SPANS)
def test_rows_that_part_and_meet_again_go_on_as_they_would(llama, span):
    """The state is a value: to decide in two halves, in another order, is to decide at once."""
    ids, mask = left_padded(PROMPTS)
    config = SoftConfig(max_new_tokens=N, **span)
    record = softar.generate(llama, ids, mask, config=config, rng=seeded(1)).record
    rules, done = mk_rules(config, ids.device, None, None), record.kind == Kind.PAD
    order, half = torch.tensor([2, 0, 1]), 4  # where the first span is putting its end in

    def part(rows, steps):
        return Record(*(column[rows][:, steps] for column in record)), done[rows][:, steps]

    every, early, late = slice(None), slice(None, half), slice(half, None)
    at_once, _ = replay(rules, begin(config, ids), *part(every, every))
    start, _ = replay(rules, begin(config, ids), *part(every, early))
    before = [column.clone() for column in start]
    pieces = [
        replay(rules, start.select(rows), *part(rows, late))[0] for rows in order.split([1, 2])
    ]
    whole, _ = replay(rules, start, *part(every, late))
    assert all(map(torch.equal, start, before)), "nothing is written into a progress"
    assert all(map(torch.equal, whole, at_once))
    assert all(map(torch.equal, join(pieces), at_once.select(order)))


def test_stop_strings_end_a_row(endless, monkeypatch):
    """transformers' own criterion cannot read a vocabulary of whole words, so a stand-in reads the
    last token."""

    class EndsIn(StoppingCriteria):
        def __init__(self, tokenizer, strings):
            self.ids = tokenizer.convert_tokens_to_ids(strings)

        def __call__(self, input_ids, scores, **kwargs):
            return torch.isin(input_ids[:, -1], torch.tensor(self.ids))

    monkeypatch.setattr("softar.loops.StopStringCriteria", EndsIn)
    ids, mask = left_padded(PROMPTS[:1])
    config = SoftConfig(mixer="hard", top_k=None, max_new_tokens=N)
    free = softar.generate(endless, ids, mask, config=config).completions[0].tolist()
    settings = copy.deepcopy(endless.generation_config)
    settings.stop_strings = tokenizer_of().convert_ids_to_tokens(free[3:4])
    out = softar.generate(
        endless, ids, mask, config=config, generation_config=settings, tokenizer=tokenizer_of()
    )
    assert out.completions[0].tolist() == free[: free.index(free[3]) + 1]


def test_a_prompt_of_embeddings_alone_is_refused(llama):
    embeds = llama.get_input_embeddings()(torch.tensor([[BOS, 9, 10]]))
    with pytest.raises(ValueError, match="empty prompt"):
        llama.generate(inputs_embeds=embeds, max_new_tokens=2, custom_generate=softar.soft_decode)


def test_softness_is_taken_by_its_old_name(tmp_path, llama):
    with pytest.warns(FutureWarning, match="alpha=0.5 is called softness now"):
        config = SoftConfig(alpha=0.5)
    assert config == SoftConfig(softness=0.5)
    config.save(tmp_path)
    file = tmp_path / "soft_config.json"
    assert "alpha" not in json.loads(file.read_text())
    file.write_text(file.read_text().replace("softness", "alpha"))
    with pytest.warns(FutureWarning, match=f"soft_config.json in {tmp_path}: alpha=0.5"):
        assert SoftConfig.load(tmp_path) == config
    with pytest.warns(FutureWarning, match="softness"):
        out = decode(llama, alpha=0.0)
    assert torch.equal(out.sequences, decode(llama, softness=0.0).sequences)
    assert "alpha" not in {f.name for f in dataclasses.fields(SoftConfig)}
    assert list(inspect.signature(SoftConfig).parameters)[:3] == ["mixer", "mixer_args", "softness"]


@pytest.mark.parametrize(
    "saved, idle",
    [
        (dict(mixer="hard", softness=0.0), ["softness"]),
        (dict(mixer="soft", answer_temperature=1.0, answer_top_k=3), ["answer_t", "answer_top_k"]),
        (dict(temperature=0.0, mixer="gumbel", mixer_args={"tau": 2.0}), ["mixer", "mixer_args"]),
        (dict(think_end=[END], cold_stop_steps=3), ["cold_stop_steps"]),
    ],
)
def test_a_file_of_before_may_hold_what_says_nothing(tmp_path, saved, idle):
    """What a caller writes is refused; a checkpoint is none the worse for it."""
    with pytest.raises(ValueError, match="does nothing"):
        SoftConfig(**saved)
    (tmp_path / "soft_config.json").write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match=f"{tmp_path}: .*{idle[0]}.*say nothing") as caught:
        config = SoftConfig.load(tmp_path)
    assert len(caught) == 1 and all(name in str(caught[0].message) for name in idle)
    acting = {k: v for k, v in saved.items() if not any(k.startswith(name) for name in idle)}
    assert config == SoftConfig(**acting)


STOP = 9  # the word w9


@pytest.mark.parametrize(
    "prompt, answer, first",  # first: the tokens read when the row stops; None: it does not
    [
        ([7, 8], [6, STOP, 6], 2),  # never thinks
        ([THINK, 7, END], [6, STOP, 6], 2),  # the prompt closed its thought
        ([THINK, 7, END], [THINK, STOP, 6], 2),  # and none opens again
        ([7, THINK], [STOP, END, 6, STOP], 4),
        ([7, THINK], [STOP, STOP, 6], None),
        ([7, 8], [6, THINK, STOP, END, STOP, 6], 5),  # opens one by itself
        ([7, 8], [STOP, THINK, 6, END], 1),
    ],
)
def test_stop_strings_are_looked_for_outside_of_thoughts(prompt, answer, first):
    config = SoftConfig(think_start=(THINK,), think_end=(END,))
    stop = StopStrings(tokenizer_of(), ["w9"], len(prompt), config)
    row = torch.tensor([prompt + answer])
    ended = [stop(row[:, : len(prompt) + t], None).item() for t in range(1, len(answer) + 1)]
    assert (ended.index(True) + 1 if True in ended else None) == first


@pytest.mark.parametrize(
    "start, end, budget",
    [((THINK,), (END,), None), ((THINK,), (END, 7), 4), (None, (END,), 4), (None, None, 3)],
)
def test_where_a_thought_ends_is_told_by_its_tokens(start, end, budget):
    model, prompts = model_of(), torch.tensor([[5, THINK], [THINK, END], [7, 8]] * 4)
    prompts = torch.cat([torch.arange(5, 17)[:, None], prompts], 1)
    settings = dict(temperature=3.0, answer_temperature=3.0, mixer="hard", max_new_tokens=24)
    config = SoftConfig(think_start=start, think_end=end, budget=budget, **settings)
    model.generation_config.eos_token_id = None
    out = softar.generate(model, prompts, config=config, rng=seeded(0))
    thoughts = Thoughts(config, prompts)
    for steps in range(1, out.record.token.shape[1] + 1):
        thoughts.read(out.record.token[:, :steps])
    answers = [row[start:] for row, start in zip(out.completions.tolist(), thoughts.ends.tolist())]
    assert answers == [answer.tolist() for answer in out.answers]


def test_stop_strings_read_a_token_once(monkeypatch):
    reads, read = [], Thoughts.read
    monkeypatch.setattr(Thoughts, "read", lambda *args: (reads.append(None), read(*args)))
    stop = StopStrings(tokenizer_of(), ["w9"], 1, SoftConfig(think_end=(END,)))
    row = torch.full((1, 50), 7)
    for t in range(2, 51):
        stop(row[:, :t], None)
    assert len(reads) == 49


TOLD = "no thought began, so all was decoded discretely: think_start=.3,. came neither"


def test_a_thought_that_never_begins_is_told_of(endless):
    """Not where a row thinks, and not where a prompt has closed its thought, as a template does
    that wants none."""
    tags = dict(think_start=THINK, think_end=END)
    with pytest.warns(UserWarning, match=TOLD):
        out = decode(endless, [[BOS, 11], [BOS, 12]], **tags)
    assert not (out.record.kind == Kind.SOFT).any()
    for rows in ([[BOS, 11], [BOS, THINK]], [[BOS, 11], [BOS, THINK, END]]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decode(endless, rows, **tags)
