"""Soft and single tokens by turns within a thought (SwiReasoning), against the rule in plain Python."""

import itertools
import math
import random
import re
import warnings

import pytest
import torch
from tiny import BOS, END, EOS, PAD, PROMPTS, THINK, VOCAB, left_padded, model_of, tokenizer_of
from tiny import seeded as rng
from torch.utils._python_dispatch import TorchDispatchMode

import softar
from softar import Kind, SoftConfig
from softar.decoders.stop import StopStrings
from softar.mixers import MIXERS, Mixed
from softar.soft import Soft
from softar.thought import begin, decide, mk_rules, stack

SOFT, HARD, FORCED, ENDED = Kind.SOFT, Kind.HARD, Kind.FORCED, Kind.PAD
N = 14
NEVER = 2**31 - 1
ENDLESS = dict(think_end=END, switch="block", max_new_tokens=100)


@pytest.fixture(scope="module")
def endless():
    # narrow, so that the rounding which padding changes does not grow from step to step
    return model_of(eos_token_id=None, initializer_range=0.15)


def decode(model, rows=PROMPTS, **knobs):
    more = {k: knobs.pop(k) for k in ("rng", "tokenizer", "callback") if k in knobs}
    return softar.generate(
        model, *left_padded(rows), config=SoftConfig(**{"max_new_tokens": N} | knobs), **more
    )


def drive(config, entropies, tokens=None, eos=(EOS,)):
    """The record of rows whose beliefs have these entropies [B][T] and say these tokens, with the
    progress after each step. Thoughts read 20 and 21, answers say 30."""
    h = torch.tensor(entropies)
    B, T = h.shape
    tokens = torch.tensor(tokens) if tokens else torch.full((B, T), 20)
    rules = mk_rules(config, h.device, torch.tensor(PAD), torch.tensor(eos))
    progress, records, states = begin(config, torch.full((B, 1), BOS)), [], []
    for t in range(T):
        mixed = Soft(torch.tensor([[20, 21]] * B), torch.tensor([[0.75, 0.25]] * B))
        thought = Mixed(mixed, tokens[:, t], torch.zeros(B))
        said = torch.where(tokens[:, t] == 20, 30, tokens[:, t])
        progress, record = decide(
            rules, progress, h[:, t], thought, Mixed(None, said, torch.ones(B))
        )
        ended = (record.token[:, None] == torch.tensor(eos)).any(1)
        progress = progress._replace(done=progress.done | ended)
        records.append(record)
        states.append(progress)
    return stack(records), states


def by_the_rule(entropies, dwell, reference=None):
    """Is each step's mode soft, as the paper has it: one row, nothing but numbers."""
    soft, kept, mark, modes = True, 0, reference, []
    for t, h in enumerate(entropies):
        if t == 0:
            mark, soft = (h, True) if reference is None else (reference, h >= reference)
        else:
            kept += 1
            if soft and h < mark:
                soft, kept, mark = False, 0, h if reference is None else mark
            elif not soft and h > mark and kept >= dwell:
                soft, kept, mark = True, 0, h if reference is None else mark
        modes.append(soft)
    return modes


def test_a_hand_made_sequence_of_entropies():
    # reference 2; 1.5 falls below it and is the next one; 1.8 rises, too early, 1.7 in time
    h = [[2.0, 2.1, 1.5, 1.8, 1.7, 1.6, 1.9, 1.5, 1.4, 1.6]]
    record, states = drive(SoftConfig(switch="block", switch_dwell=2), h)
    S, H = int(SOFT), int(HARD)
    assert record.kind[0].tolist() == [S, S, H, H, S, H, H, H, H, H]
    assert [round(float(s.turns[0, 2]), 3) for s in states] == [
        2,
        2,
        1.5,
        1.5,
        1.7,
        1.6,
        *[1.6] * 4,
    ]
    assert record.token[0].tolist() == [20, 20, 30, 30, 20, *[30] * 5]  # the answer's choice
    assert record.logp[0].tolist() == [0, 0, 1, 1, 0, *[1] * 5]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("reference", [None, 1.0])
def test_rows_switch_by_the_rule_whatever_their_entropies(seed, reference):
    draw = random.Random(seed)
    dwell = draw.choice([0, 1, 2, 5, NEVER])
    rows = [
        [draw.choice([0.0, 0.5, 1.0, 1.0, 1.5, draw.random()]) for _ in range(40)] for _ in range(6)
    ]
    config = SoftConfig(switch=reference or "block", switch_dwell=dwell)
    record, _ = drive(config, rows)
    modes = [by_the_rule(row, dwell, reference) for row in rows]
    assert (record.kind == SOFT).tolist() == modes
    assert (record.kind == HARD).tolist() == [[not soft for soft in row] for row in modes]
    if dwell == NEVER:  # the first switch is the last
        assert all(list(itertools.dropwhile(bool, row)).count(True) == 0 for row in modes)


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        (dict(), "switch_dwell=512 is not below max_new_tokens=64: .* never mixes again"),
        (dict(budget=3, max_new_tokens=600), "switch_dwell=512 is not below budget=3"),
        (dict(budget=600, think_end=END), "switch_dwell=512 is not below max_new_tokens=64"),
        (dict(switch_dwell=3, budget=3), "switch_dwell=3 is not below budget=3"),
        (dict(switch_dwell=2, budget=3), None),
        (dict(max_new_tokens=513), None),
    ],
)
def test_a_dwell_as_long_as_the_thought_is_warned_of(lengths, told):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        SoftConfig(switch="block", **lengths)
        SoftConfig()
    assert len(heard) == (told is not None)
    assert told is None or re.match(told, str(heard[0].message))


def test_the_tags_are_mixed_in_at_switches_and_fade():
    h = [[2.0, 1.0, 3.0, 1.0, 3.0, 1.0]]
    tags = dict(think_start=THINK, think_end=(END, 9), switch_open=0.4, switch_close=0.3)
    config = SoftConfig(switch="block", switch_dwell=0, max_new_tokens=10, **tags)
    rules = mk_rules(config, torch.device("cpu"), None, None)
    progress, read = begin(config, torch.tensor([[BOS, THINK]])), []
    for x in h[0]:
        thought = Mixed(
            Soft(torch.tensor([[20, 21]]), torch.tensor([[0.75, 0.25]])),
            torch.tensor([20]),
            torch.zeros(1),
        )
        progress, record = decide(rules, progress, torch.tensor([x]), thought, thought)
        assert record.ids.shape[1] == config.width - 8 and record.kind.item() == SOFT
        read.append(torch.zeros(VOCAB).scatter_add(0, record.ids[0], record.weights[0]))
    for t, weights in enumerate(read):
        share = (0, 0.3, 0.4)[0 if t == 0 else 1 + (t % 2 == 0)] * (1 - t / 10)
        tag = torch.zeros(VOCAB)
        if t and t % 2:
            tag[END] = tag[9] = share / 2
        elif t:
            tag[THINK] = share
        belief = torch.zeros(VOCAB)
        belief[20], belief[21] = 0.75, 0.25
        torch.testing.assert_close(weights, (1 - share) * belief + tag)


def kinds(record, row=0):
    return "".join(Kind(k).name[0] for k in record.kind[row].tolist())


UP, DOWN = 3.0, 1.0


def budgeted(**knobs):
    final = dict(switch_final=(40, 41), switch_answer=3)
    return SoftConfig(
        **ENDLESS | dict(switch_dwell=0, switch_budget=2, switch_close=0.0) | final | knobs
    )


def test_the_budget_asks_for_an_end_and_then_for_an_answer():
    h = [[2.0] + [DOWN, UP] * 12]
    record, states = drive(budgeted(), h)
    # every switch to single tokens from the first on puts the end in; the third the answer's beginning
    assert kinds(record) == "SHFHSHFHSHFFFHHHF" + "P" * 8
    token = record.token[0].tolist()
    assert [token[t] for t in (2, 6, 10, 11, 12, 16)] == [END, END, END, 40, 41, EOS]
    assert states[-1].answer_start.item() == 11  # what begins the answer is of it
    assert states[2].thinking.item() and not states[12].thinking.item()
    # between the first end and the next mixture the answer may have begun
    assert [s.answer_start.item() for s in states[:9]] == [1, 2, 3, 3, 5, 6, 7, 7, 9]


@pytest.mark.parametrize("budget, ends, last", [(0, 0, 1), (1, 1, 2), (3, 2, 4), (4, 3, 5)])
def test_bounds_of_the_budget(budget, ends, last):
    """From half of it on the end is put in, past it the answer begins."""
    record, _ = drive(budgeted(switch_budget=budget), [[2.0] + [DOWN, UP, UP] * 20])
    switches = [t for t in range(1, 61) if kinds(record)[t - 1 : t + 1] in ("SH",)]
    forced = [t for t in range(61) if record.kind[0, t] == FORCED and record.token[0, t] == END]
    assert len(switches) == last and len(forced) == ends + 1
    assert forced == [t + 1 for t in switches[-ends - 1 :]]
    assert record.token[0, forced[-1] : forced[-1] + 3].tolist() == [END, 40, 41]


def test_an_answer_that_was_begun_and_goes_on_is_the_answer():
    """With no return to mixtures after the end was put in, the answer is what follows it."""
    record, states = drive(budgeted(), [[2.0, DOWN, *[DOWN] * 6]])
    assert kinds(record) == "SHFHHHHH" and states[-1].answer_start.item() == 3


def test_an_end_that_the_model_says_locks():
    h = [[2.0, DOWN, UP, DOWN, UP, UP, UP]] * 3
    tokens = [[20] * 2 + [END] + [20] * 4, [20] * 3 + [END] + [20] * 3, [20] * 7]
    record, states = drive(SoftConfig(**ENDLESS, switch_dwell=0, switch_close=0.0), h, tokens)
    assert [kinds(record, row) for row in range(3)] == ["SHHHHHH", "SHSHHHH", "SHSHSSS"]
    assert states[-1].answer_start.tolist() == [3, 4, 7]
    # in what may be the answer already, too
    tokens = [[20, 20, 20, 20, END, 20, 20]]
    h = [[2.0, DOWN, DOWN, DOWN, DOWN, UP, UP]]
    record, states = drive(budgeted(), h, tokens)
    assert kinds(record) == "SHFHHHH" and states[-1].answer_start.item() == 5
    assert states[-1].closed.item()


def test_where_the_budget_of_steps_meets_that_of_switches():
    for budget, shown in ((1, "SFHHHHHH"), (2, "SHFHHHHH"), (4, "SHFSFHHH"), (5, "SHFSHFHH")):
        record, states = drive(budgeted(budget=budget), [[2.0, DOWN, UP, UP, DOWN, DOWN, UP, UP]])
        assert kinds(record) == shown, budget
        assert states[-1].closed.item()
    # an end that was put in is not put in again
    record, states = drive(budgeted(budget=5), [[2.0, DOWN, *[DOWN] * 8]])
    assert kinds(record) == "SHFHHHHHHH" and states[-1].answer_start.item() == 3


def test_without_an_end_token_a_last_answer_ends_the_row_too():
    record, states = drive(budgeted(switch_budget=0), [[2.0, *[DOWN] * 12]], eos=())
    assert kinds(record) == "SHFFFHHH" + "P" * 5 and states[-1].done.item()


MIXER_ARGS = {"k-samples": {"k": 3}, "hard": {"sample": True}}
SOFT_MIXERS = [name for name in MIXERS if name not in ("hard", "hidden")]


@pytest.mark.parametrize("mixer", SOFT_MIXERS)
def test_a_threshold_that_is_never_met_is_soft_thinking_and_one_always_met_hard_decoding(
    endless, mixer
):
    rows = dict(mixer=mixer, think_end=END, budget=9, answer_temperature=0.8)
    gens = lambda: [rng(s) for s in range(3)]  # noqa: E731
    plain = decode(endless, rng=gens(), **rows)
    never = decode(endless, rng=gens(), switch=0.0, **rows)
    for name, a, b in zip(plain.record._fields, plain.record, never.record, strict=True):
        if name in ("ids", "weights"):  # which have room for the tag
            b = b[..., : a.shape[-1]]
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
    always = dict(switch=math.log(VOCAB) + 1, mixer=mixer)
    greedy = decode(endless, **always)
    hard = decode(endless, mixer="hard")
    assert torch.equal(greedy.sequences, hard.sequences) and (greedy.record.kind == HARD).all()
    sampled = decode(endless, rng=gens(), answer_temperature=0.7, answer_top_k=5, **always)
    again = decode(endless, rng=gens(), budget=0, answer_temperature=0.7, answer_top_k=5)
    assert torch.equal(sampled.sequences, again.sequences)


@pytest.mark.parametrize("mixer", SOFT_MIXERS)
def test_a_row_of_a_batch_is_the_row_alone_however_it_is_padded(endless, mixer):
    knobs = dict(
        mixer=mixer,
        switch="block",
        switch_dwell=2,
        think_end=END,
        answer_temperature=0.8,
        switch_budget=3,
    )
    knobs |= dict(switch_final=(7, 8), switch_answer=2, max_new_tokens=24)
    rows = (*PROMPTS, [BOS, *range(20, 29)])
    batch = decode(endless, rows, rng=[rng(s) for s in range(4)], **knobs)
    seen = {Kind(k) for k in batch.record.kind.unique().tolist()}
    assert seen >= {SOFT, HARD, FORCED}
    for row, prompt in enumerate(rows):
        alone = decode(endless, [prompt], rng=[rng(row)], **knobs)
        T = alone.record.token.shape[1]
        for name, a, b in zip(alone.record._fields, alone.record, batch.record, strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(a[0], b[row, :T], rtol=1e-3, atol=1e-4, equal_nan=True)
            else:
                assert torch.equal(a[0], b[row, :T]), name
        assert batch.answer_start[row] == alone.answer_start[0]


def test_hidden_states_and_single_tokens_by_turns(endless):
    knobs = dict(
        think_end=END, budget=10, switch="block", switch_dwell=2, mixer="hidden", max_new_tokens=16
    )
    out = decode(endless, **knobs)
    assert (out.record.kind == Kind.LATENT).any(1).all() and out.config.switch_close is None
    modes = [by_the_rule(row, 2) for row in out.record.entropy[:, :10].tolist()]
    assert (out.record.kind[:, :10] == Kind.LATENT).tolist() == modes
    assert (out.record.kind[:, :10] != Kind.LATENT).any()
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(
            decode(endless, [prompt], **knobs).record.token[0], out.record.token[row]
        )
    with pytest.raises(ValueError, match=r"switch_close=0.3 does nothing with a mixer of vectors"):
        SoftConfig(**knobs, switch_close=0.3)


def test_the_entropy_that_counts_is_of_the_whole_belief_at_temperature_1(endless):
    filters = dict(temperature=0.5, top_k=2, top_p=0.5)
    out = decode(endless, switch="block", switch_dwell=0, max_new_tokens=1, **filters)
    logits = endless(*left_padded(PROMPTS)).logits[:, -1]
    torch.testing.assert_close(
        out.record.entropy[:, 0], softar.soft.entropy(logits), rtol=1e-4, atol=1e-4
    )


def test_switches_cost_no_synchronisation(endless):
    class Looks(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names = ("_local_scalar_dense", "nonzero", "_to_copy", "is_nonzero")
            self.number += func.overloadpacket.__name__ in names[:2]
            return func(*args, **(kwargs or {}))

    counts = []
    for knobs in (dict(), dict(switch="block", switch_dwell=1, switch_budget=1, switch_final=())):
        for length in (6, 12):
            with Looks() as looks:
                decode(endless, think_end=END, max_new_tokens=length, **knobs)
            counts.append(looks.number)
    assert counts[1] - counts[0] == counts[3] - counts[2]


def test_the_length_over_which_tags_fade_is_that_of_the_call(endless):
    ids, mask = left_padded(PROMPTS)
    config = SoftConfig(think_end=END, switch="block", max_new_tokens=N)
    how = dict(custom_generate=softar.soft_decode, soft_config=config, max_new_tokens=30)
    theirs = endless.generate(ids, attention_mask=mask, return_dict_in_generate=True, **how)
    ours = decode(endless, think_end=END, switch="block", max_new_tokens=30)
    assert torch.equal(theirs.record.weights, ours.record.weights)


def test_texts_become_ids(endless):
    tags = dict(think_end="</think>", switch="block", switch_budget=2)
    config = SoftConfig(**tags, switch_final="w40 w41").resolve(tokenizer_of())
    assert config.switch_final == (40, 41) and config.think_end == (END,)
    assert SoftConfig(**tags, switch_final="").resolve(tokenizer_of()).switch_final == ()
    with pytest.raises(
        ValueError, match=r"switch_final='.*The final answer is' is text: pass tokenizer="
    ):
        SoftConfig(think_end=END, switch="block", switch_budget=2).resolve(None)
    with pytest.raises(ValueError, match=r"switch_final=.99,. must be token ids below 64"):
        decode(endless, think_end=END, switch="block", switch_budget=2, switch_final=99)


def test_stop_strings_are_not_looked_for_where_a_thought_may_go_on_behind_its_end():
    config = budgeted()
    stop = StopStrings(tokenizer_of(), ["w9"], 1, config)
    assert not stop(torch.tensor([[BOS, END, 9]]), None).any()


@pytest.mark.parametrize(
    "knobs, told",
    [
        (dict(switch="entropy"), "switch='entropy' is unknown: give 'block', the entropy at which"),
        (dict(switch=-1.0), "switch=-1.0 must be >= 0 nats and finite, or 'block'"),
        (dict(switch=math.inf), "switch=inf must be >= 0 nats and finite"),
        (dict(switch=True), "switch=True must be"),
        (dict(switch="block", switch_dwell=-1), "switch_dwell=-1 must be at least 0"),
        (dict(switch="block", switch_dwell=1.5), "switch_dwell=1.5 must be a whole number"),
        (
            dict(switch="block", think_end=4, switch_budget=-1),
            "switch_budget=-1 must be at least 0",
        ),
        (
            dict(switch="block", think_end=4, switch_close=1.5),
            "switch_close=1.5 must lie in [0, 1]",
        ),
        (
            dict(switch="block", switch_close=0.2),
            "switch_close=0.2 does nothing without a think_end",
        ),
        (
            dict(switch="block", think_end=4, switch_open=0.2),
            "switch_open=0.2 does nothing without a think_start, which it mixes in: give think_start",
        ),
        (
            dict(switch="block", switch_budget=2),
            "switch_budget=2 does nothing without a think_end, which it puts in: give think_end",
        ),
        (dict(switch_dwell=3), "switch_dwell=3 does nothing without a switch: give switch='block'"),
        (
            dict(switch="block", think_end=4, switch_answer=3),
            "switch_answer=3 does nothing without a sw",
        ),
        (
            dict(switch="block", mixer="hard"),
            "switch='block' does nothing where every thought is of",
        ),
        (
            dict(switch="block", softness=0.0),
            "switch='block' does nothing where every thought is of",
        ),
        (dict(switch="block", temperature=0.0), "switch='block' does nothing where every thought"),
    ],
)
def test_bad_input_is_named(knobs, told):
    with pytest.raises(ValueError) as error:
        SoftConfig(**knobs)
    assert told in str(error.value)


def test_what_is_left_out(tmp_path):
    config = SoftConfig(switch="block", think_end=4, switch_budget=2)
    assert (config.switch_dwell, config.switch_close, config.switch_answer) == (512, 0.3, 32)
    assert config.switch_final == "\n\nThe final answer is"
    config.save(tmp_path)
    assert SoftConfig.load(tmp_path) == config
    assert SoftConfig(switch="block").switch_close is None and SoftConfig().switch_dwell is None
    assert config.changed(mixer="hard") == SoftConfig(mixer="hard", think_end=4)
    assert SoftConfig(switch="block", answer_temperature=0.7).draws
    assert config.width == 11 and SoftConfig(switch="block").width == 10


def test_the_decoder_by_name():
    how = dict(max_new_tokens=6, seed=1)
    decoder = softar.make_decoder("mnns-soft-tiny=swi:switch_dwell=0", **how)
    assert decoder.config.switch == "block" and decoder.columns["decoder"] == "swi"
    prompts = list(softar.load_task("mnns").test.select(range(8))["prompt"])
    answers = decoder.decode(prompts)
    same = softar.make_decoder("mnns-soft-tiny=soft:switch=block,switch_dwell=0", **how)
    assert [a.tokens for a in answers] == [a.tokens for a in same.decode(prompts)]
    noisy = softar.make_decoder("mnns-soft-tiny=swi:mixer=gumbel,switch=0.3", **how).config
    assert (noisy.mixer, noisy.switch) == ("gumbel", 0.3)
    for name in ("discrete", "beam", "soft-beam", "beam-collapse"):
        with pytest.raises(ValueError, match="switch"):
            softar.make_decoder(f"mnns-soft-tiny={name}:switch=block", **how)
