"""transformers' logits processors in softar's loops."""

import pytest
import torch
from tiny import BOS, END, EOS, PROMPTS, VOCAB, left_padded, model_of
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import softar
from softar import SoftConfig
from softar.decoders.beam_collapse import BeamCollapse, beam_collapse
from softar.decoders.soft_beam import SoftBeam, soft_beam
from softar.processors import asked_of

N = 6
LOOPS = {
    "hard": dict(mixer="hard"),
    "soft": dict(mixer="soft", budget=3, top_k=5, answer_temperature=0.0),
    "drawn": dict(mixer="hard", mixer_args={"sample": True}),
    "an answer that is drawn": dict(mixer="soft", budget=0, answer_temperature=1.0),
    "soft beams": SoftBeam(3, 0.4),
    "collapsed beams": BeamCollapse(3, 2),
}


def decoded(model, ids, mask, loop, **more):
    """What each row read, its tokens and weights."""
    if isinstance(how := LOOPS[loop], dict):
        config = SoftConfig(max_new_tokens=N, **how)
        draws = [torch.Generator().manual_seed(7) for _ in ids]
        out = softar.generate(model, ids, mask, config=config, rng=draws, **more)
    else:
        search = soft_beam if isinstance(how, SoftBeam) else beam_collapse
        out, _ = search(model, ids, mask, SoftConfig(max_new_tokens=N), how)
    return [
        (row.tolist(), w.sort(-1).values) for row, w in zip(out.completions, out.record.weights)
    ]


@pytest.mark.parametrize(
    "asked",
    [
        dict(repetition_penalty=3.0),
        dict(no_repeat_ngram_size=1),
        dict(encoder_repetition_penalty=3.0),
        dict(encoder_no_repeat_ngram_size=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("loop", LOOPS)
def test_processors_do_not_count_padding_as_said(loop, asked):
    """Padded with the token that the shortest row says first."""
    model = model_of(eos_token_id=None).double()
    short = min(PROMPTS, key=len)
    (first, *_), _ = decoded(model, torch.tensor([short]), None, "hard")[0]
    ids, mask = left_padded(PROMPTS)
    ids[mask == 0] = first
    model.generation_config.update(**asked)
    for prompt, (tokens, weights) in zip(PROMPTS, decoded(model, ids, mask, loop), strict=True):
        alone = torch.tensor([prompt])
        ((expected, same),) = decoded(model, alone, torch.ones_like(alone), loop)
        assert tokens == expected
        torch.testing.assert_close(weights, same, atol=1e-6, rtol=0)
    assert decoded(model, torch.tensor([short]), None, "hard")[0][0][0] == first


def test_beams_of_one_prompt_may_be_as_many_as_the_prompts():
    """A group of collapsed beams is of some of the rows, which the count does not tell."""
    ids, mask = left_padded(PROMPTS)
    (penalty,) = asked_of([RepetitionPenaltyLogitsProcessor(2.0)], ids, mask)
    for row in range(len(ids)):
        beams = ids[row].expand(len(ids), -1)
        penalised = (penalty(beams, torch.ones(len(ids), VOCAB)) != 1).nonzero()[:, 1]
        assert {*penalised.tolist()} == {*PROMPTS[row]}


class Seen(LogitsProcessor):
    """Keeps the scores [B, V] of each step."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


READING = {  # by the token of latent steps and the length of the prompt
    "repetition": lambda pad, length: RepetitionPenaltyLogitsProcessor(3.0),
    "of answers": lambda pad, length: RepetitionPenaltyLogitsProcessor(3.0, length),
    "1-grams": lambda pad, length: NoRepeatNGramLogitsProcessor(1),
    "2-grams": lambda pad, length: NoRepeatNGramLogitsProcessor(2),
    "bad words": lambda pad, length: NoBadWordsLogitsProcessor([[pad, t] for t in range(9, 64)]),
}


@pytest.mark.parametrize("pad", [EOS, 11, 32, 50])
@pytest.mark.parametrize("reading", READING.values(), ids=READING)
def test_processors_see_what_a_row_has_said_and_no_latent_steps(reading, pad):
    """Whatever token stands for them: an end, one of a prompt. The last row has none of them, as its
    prompt closes the thought."""
    model, prompts = model_of(eos_token_id=None), [*PROMPTS, [BOS, 41, END]]
    model.generation_config.pad_token_id = pad
    ids, mask = left_padded(prompts)
    ids[mask == 0] = pad
    config = SoftConfig(mixer="hidden", budget=2, think_end=END, max_new_tokens=N)
    before, after = Seen(), Seen()
    asked = [before, reading(pad, ids.shape[1]), after]
    out = softar.generate(model, ids, mask, config=config, logits_processor=asked)
    latent = out.record.kind == softar.Kind.LATENT
    assert latent.sum(1).tolist() == [2, 2, 2, 0]
    for row, prompt in enumerate(prompts):
        alone = reading(pad, len(prompt))
        for t in range(N):
            said = out.completions[row, :t][~latent[row, :t]].tolist()
            expected = alone(torch.tensor([prompt + said]), before.scores[t][row : row + 1])
            torch.testing.assert_close(after.scores[t][row : row + 1], expected)


class Nothing(LogitsProcessor):
    """No token is left in the second row, from the third step on."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] < self.length + 2:
            return scores
        return scores.index_fill(0, torch.tensor([1]), -torch.inf)


@pytest.mark.parametrize("loop", [name for name, how in LOOPS.items() if isinstance(how, dict)])
def test_processors_that_leave_no_token_are_named_at_their_step(loop):
    ids, mask = left_padded(PROMPTS)
    with pytest.raises(FloatingPointError, match=r"leave no token, at step 2, rows \[1\]"):
        decoded(
            model_of(eos_token_id=None), ids, mask, loop, logits_processor=[Nothing(ids.shape[1])]
        )


THINKING = {
    "greedy": dict(mixer="hard"),
    "drawn": dict(mixer="hard", temperature=1.0, top_k=4, mixer_args={"sample": True}),
    "soft": dict(mixer="soft", top_k=4, budget=2),
    "narrowed to a token": dict(mixer="gumbel", top_k=4, softness=0.0),
    "soft beams": SoftBeam(3, 0.4),
    "collapsed beams": BeamCollapse(3, 2),
}


@pytest.mark.parametrize("way", THINKING)
def test_where_nothing_but_banned_tokens_is_left_the_step_is_named(way):
    """Greedy thoughts said token 0."""
    (ids, mask), model, how = left_padded(PROMPTS), model_of(eos_token_id=None), THINKING[way]
    model.generation_config.suppress_tokens = [i for i in range(VOCAB) if i not in (40, 41)]

    def decode(*banned):
        knobs = dict(max_new_tokens=3, banned=banned)
        if isinstance(how, dict):
            rng = torch.Generator().manual_seed(7)
            return softar.generate(model, ids, mask, config=SoftConfig(**knobs | how), rng=rng)
        search = soft_beam if isinstance(how, SoftBeam) else beam_collapse
        return search(model, ids, mask, SoftConfig(**knobs), how)[0]

    assert (decode(40).completions[:, 0] == 41).all()
    with pytest.raises(FloatingPointError, match=r"leave no token, at step 0, rows .* `banned`"):
        decode(40, 41)


def test_an_answer_may_say_banned_tokens_where_no_other_is_left():
    (ids, mask), model = left_padded(PROMPTS), model_of(eos_token_id=None)
    model.generation_config.suppress_tokens = [i for i in range(VOCAB) if i != 40]
    how = dict(mixer="soft", top_k=4, think_start=30, think_end=END, banned=(40,))
    with pytest.warns(UserWarning, match="no thought began"):
        out = softar.generate(model, ids, mask, config=SoftConfig(max_new_tokens=3, **how))
    assert (out.completions == 40).all()


@pytest.mark.parametrize(
    "given", [TopKLogitsWarper(5), TemperatureLogitsWarper(0.5), MinPLogitsWarper(0.1)], ids=type
)
def test_a_processor_that_chooses_tokens_is_refused(given):
    """It did nothing."""
    ids, mask = left_padded(PROMPTS)
    others = [RepetitionPenaltyLogitsProcessor(1.2), given]
    with pytest.raises(
        ValueError, match=rf"a {type(given).__name__}, which is not followed.*top_k="
    ):
        decoded(model_of(), ids, mask, "soft", logits_processor=others)
    model = model_of()  # in a model's own settings it is no wish of the caller's
    model.generation_config.update(do_sample=True, top_k=5)
    decoded(model, ids, mask, "soft")
