"""The rows that think inside vLLM, under a toy that schedules them as it likes."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from engine_script import KINDS
from tiny import BOS, EOS, VOCAB
from transformers import AddedToken

import softar
from softar.defaults import THINK_TAGS
from softar.mixers import Mixed, Mixer
from softar.soft import hard
from softar.vllm.completions import Completion, CompletionDecoder, Sampling
from softar.vllm.plugin import from_new_request
from softar.vllm.request import OWN
from softar.vllm.rows import CHUNK, Rows
from softar.vllm.runners import admit


class Engine:
    """A recurrent toy in vLLM's place, which schedules as it likes: some requests, some of their
    positions."""

    def __init__(self, seed, unruly):
        torch.manual_seed(0)
        self.table, self.inner, self.out = (
            torch.randn(VOCAB, 8),
            torch.randn(8, 8) * 0.3,
            torch.randn(VOCAB, 8),
        )
        self.rows = Rows(lambda ids: self.table[ids], torch.device("cpu"), 0)
        self.draw, self.unruly, self.state, self.tokens, self.done = (
            random.Random(seed),
            unruly,
            {},
            {},
            {},
        )

    def add(self, name, prompt, fields, seed):
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        config = softar.SoftConfig(**fields).resolve(tiny.tokenizer_of())
        self.rows.add(name, config, prompt, seed, (EOS,), False)
        self.tokens[name], self.done[name], self.state[name] = list(prompt), 0, torch.zeros(8)

    def forget(self, name):
        """As when it is thrown out of the cache."""
        self.done[name], self.state[name] = 0, torch.zeros(8)

    def step(self):
        names, draw = list(self.tokens), self.draw
        if self.unruly:
            names = draw.sample(names, draw.randint(1, len(names)))
            for name in names:
                prompt = len(self.rows.rows[name].prompt)
                if draw.random() < 0.05:
                    self.forget(name)
                # sampled for nothing
                if draw.random() < 0.05 and len(self.tokens[name]) - prompt > 3:
                    del self.tokens[name][-draw.randint(1, 2) :]
                    self.forget(name)
        left = [len(self.tokens[name]) - self.done[name] for name in names]
        counts = [draw.randint(1, n) if self.unruly and draw.random() < 0.5 else n for n in left]
        computed = [self.done[name] for name in names]
        ids = [self.tokens[name][c : c + n] for name, c, n in zip(names, computed, counts)]
        embeds = self.table[torch.tensor([i for part in ids for i in part])].clone()
        self.rows.feed(embeds, names, computed, counts)
        for name, part, count in zip(names, embeds.split(counts), counts):
            for x in part:
                self.state[name] = torch.tanh(self.inner @ self.state[name] + x)
            self.done[name] += count
        logits = torch.stack([self.out @ self.state[name] for name in names])
        ends = [self.done[name] for name in names]
        skipped = [self.done[name] < len(self.tokens[name]) for name in names]
        turns = self.rows.think(logits, names, ends, skipped)
        sampled = logits.argmax(-1, keepdim=True).int()
        self.rows.choose(turns, sampled)
        for name, skip, token in zip(names, skipped, sampled[:, 0].tolist()):
            if not skip:
                self.tokens[name].append(token)


@pytest.mark.parametrize("seed", range(4))
def test_however_they_are_scheduled_rows_do_the_same(seed):
    draw = random.Random(seed)
    wanted = [
        (
            f"r{i}",
            [BOS, *draw.choices(range(3, VOCAB), k=draw.randint(1, 7))],
            *draw.choice(KINDS),
            i,
        )
        for i in range(9)
    ]
    lengths = {name: draw.choice([5, 20, 60]) for name, *_ in wanted}
    lengths["r0"] = 2 * CHUNK + 30
    together = Engine(seed, unruly=True)
    waiting, found = list(wanted), {}
    while len(found) < len(wanted):
        if waiting and draw.random() < 0.3:
            name, prompt, fields, draws, own = waiting.pop()
            together.add(name, prompt, fields, own if draws else None)
        if together.tokens:
            together.step()
        for name in list(together.tokens):
            new = together.tokens[name][len(together.rows.rows[name].prompt) :]
            if len(new) >= lengths[name]:
                found[name] = new
                together.rows.drop([name])
                del together.tokens[name]
    assert not together.rows.rows and not together.rows.groups
    for name, prompt, fields, draws, own in wanted:
        alone = Engine(0, unruly=False)
        alone.add(name, prompt, fields, own if draws else None)
        while len(alone.tokens[name]) < len(prompt) + lengths[name]:
            alone.step()
        assert found[name] == alone.tokens[name][len(prompt) :], (name, fields)


def test_mixtures_gathered_a_few_rows_at_a_time_are_the_same(monkeypatch):
    made = []
    for piece in (4096, 20):  # of three mixtures of ten tokens: all, two and one
        monkeypatch.setattr("softar.vllm.rows.PIECE", piece)
        engine = Engine(0, unruly=False)
        for i in range(3):
            engine.add(f"r{i}", [BOS, 9 + i], dict(top_k=10), None)
        for _ in range(12):
            engine.step()
        made.append(engine.tokens)
    assert made[0] == made[1] and len({tuple(t[2:]) for t in made[0].values()}) == 3


START, END = 7, 8


@pytest.mark.parametrize(
    ("prompts", "rows", "warns"),
    [
        ([[BOS, 9], [BOS, 10]], [(4, 5, EOS), (END, 5)], True),
        ([[BOS, 9]], [()], True),
        ([[BOS, 9], [BOS, START]], [(4, 5, EOS), (4, END, 5)], False),
        ([[BOS, 9]], [(4, START, 5, END, 6)], False),
        ([[BOS, START, END]], [(4, EOS)], False),  # a thought that is not wanted
        ([], [], False),
    ],
)
def test_a_thought_that_never_begins_is_warned_of(recwarn, prompts, rows, warns):
    """As softar.generate does: all was decoded discretely, and nothing else would say so."""
    soft = dict(think_start=[START], think_end=[END])
    decoder = CompletionDecoder("toy", Sampling("soft", soft=soft), seed=0, trace=False)
    decoder.tokenizer = tiny.tokenizer_of()
    answers = [[Completion("", row, None)] for row in rows]
    assert len(decoder.rows(["a"] * len(prompts), prompts, answers, 0.0)) == len(prompts)
    said = [str(w.message) for w in recwarn if "no thought began" in str(w.message)]
    assert len(said) == warns and (not warns or f"think_start=({START},)" in said[0])


def strict(dist, *, rng=None):
    """A user's mixer, whose draw raises for what is not finite."""
    slot = torch.multinomial(dist.weights, 1)
    return Mixed(hard(dist.ids.gather(-1, slot)[:, 0]), dist.ids[:, 0], None)


still = Mixer(strict, draws=lambda knobs: False)  # says that it draws nothing


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", range(len(KINDS) + 2))
def test_logits_that_are_not_finite_end_no_step(place, value):
    """vLLM ends their request after it; its neighbour does as it does alone."""
    users = [dict(mixer=f"test_vllm_rows:{name}", top_k=1) for name in ("strict", "still")]
    fields, draws = [*KINDS, *((fields, False) for fields in users)][place]
    records = []
    for names in (["a", "broken"], ["a"]):
        engine = Engine(0, unruly=False)
        for number, name in enumerate(names):
            engine.add(name, [BOS, 5], fields, number if draws else None)
        logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
        logits[1, 7] = value
        logits = logits[: len(names)]
        turns = engine.rows.think(logits, names, [2] * len(names), [False] * len(names))
        engine.rows.choose(turns, torch.tensor([[4], [4]][: len(names)]))
        (group,) = engine.rows.groups.values()
        records.append(group.record)
    beside, alone = records
    for both, one in zip(beside, alone, strict=True):
        torch.testing.assert_close(both[:1], one, equal_nan=True)


@pytest.mark.parametrize("mixer", ["hard", "k-samples", "soft", "test_vllm_rows:strict"])
def test_a_thought_that_has_only_banned_tokens_left_ends_its_request(mixer):
    """It reads what is no number, whereupon vLLM ends it, and not token 0."""
    engine = Engine(0, unruly=False)
    for name in ("a", "lost"):
        engine.add(name, [BOS, 5], dict(mixer=mixer, banned=[7, 8]), None)
    logits = torch.zeros(2, VOCAB)
    logits[1] = torch.where(torch.arange(VOCAB) == 8, 0.0, -torch.inf)
    turns = engine.rows.think(logits, ["a", "lost"], [2, 2], [False, False])
    engine.rows.choose(turns, torch.tensor([[4], [4]]))
    embeds = torch.zeros(2, 8)
    engine.rows.feed(embeds, ["a", "lost"], [2, 2], [1, 1])
    assert embeds.isnan().all(1).tolist() == [False, True]


def test_a_record_makes_vllm_rank_no_log_probabilities():
    """Its sampler would order the vocabulary of every row for what the record then replaces."""
    vllm = pytest.importorskip("vllm")
    outputs = pytest.importorskip("vllm.v1.outputs")
    owner = SimpleNamespace(
        model=SimpleNamespace(embed_input_ids=torch.nn.Embedding(VOCAB, 8)),
        device=torch.device("cpu"),
        model_config=SimpleNamespace(seed=0),
    )
    rows, asked = None, {}
    for name, record in (("read", True), ("blind", False), ("wide", True)):
        own = {"config": dict(top_k=5 if name == "wide" else 3, budget=2), "record": record}
        asked[name] = vllm.SamplingParams(logprobs=4, extra_args={OWN: own})
        new = SimpleNamespace(req_id=name, prompt_token_ids=[BOS, 5], sampling_params=asked[name])
        rows = admit(rows, new, owner)
        assert new.sampling_params.logprobs == (None if record else 4)
    assert {params.logprobs for params in asked.values()} == {4}  # the scheduler's, who hands out
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    steps = []
    for given in (None, outputs.LogprobsTensors(*torch.full((2, 3, 9), 7.0), torch.full((3,), 7))):
        tokens = torch.zeros(3, 1, dtype=torch.long)
        out = SimpleNamespace(sampled_token_ids=tokens, logprobs_tensors=given)
        out = rows.step(logits, [*asked], [2 + len(steps)] * 3, [False] * 3, lambda out=out: out)
        steps.append(out.logprobs_tensors)
    made, over = steps
    assert made.logprob_token_ids.shape == made.logprobs.shape == (3, 7)
    assert over.logprobs.shape == (3, 9) and (over.logprobs[1] == 7).all()  # another's stay
    for row, width in ((0, 3), (2, 5)):
        best = logits[row].topk(width)
        assert made.logprob_token_ids[row, 2 : 2 + width].tolist() == best.indices.tolist()
        weights = made.logprobs[row, 2 : 2 + width].exp()
        torch.testing.assert_close(weights, best.values.softmax(-1))
        torch.testing.assert_close(over.logprobs[row, 2 : 2 + width].exp(), weights)


@pytest.mark.parametrize("soft", [None, {"record": False}, {"record": True}], ids=str)
def test_no_text_is_made_of_the_tokens_of_a_record(soft):
    """By vLLM's own way from a step's log-probabilities to those of the output."""
    logprobs = pytest.importorskip("vllm.v1.engine.logprobs")
    from vllm.v1.outputs import LogprobsLists

    params = SimpleNamespace(num_logprobs=2, prompt_logprobs=None, flat_logprobs=True)
    params.extra_args = None if soft is None else {OWN: soft}
    made = from_new_request(
        logprobs.LogprobsProcessor.from_new_request,
        tokenizer=tiny.tokenizer_of(),
        request=SimpleNamespace(sampling_params=params),
    )
    step = [[7, 8, 9]], [[-1.0, -2.0, -3.0]], [1]
    made._update_sample_logprobs(LogprobsLists(*map(np.array, step)))
    has_record = soft == {"record": True}
    assert made.logprobs.token_ids == [7, 8, 9]
    assert made.logprobs.decoded_tokens == ([None] * 3 if has_record else ["w7", "w8", "w9"])


TAGS = ["<think>", "</think>"]
PLAIN = [f"<think>way {i}</think> The answer is {v}" for i, v in enumerate([3, 7, 7, 3, 7])]


def voter(**options):
    return CompletionDecoder("toy", Sampling("self-consistency", **options), seed=0, trace=False)


def test_votes_count_what_stands_behind_the_thoughts():
    """Under every pair of tags; without them the whole text."""
    for start, end in THINK_TAGS:
        texts = [text.replace(TAGS[0], start).replace(TAGS[1], end) for text in PLAIN]
        answers = [[Completion(text, (1, 2), None) for text in texts]]
        (row,) = voter(votes=5).rows(["q"], [[1]], answers, 0.1)
        assert row.text == texts[1]
    bare = [Completion(text, (), None) for text in ("a 7", "b 3", "b  3", "c 7")]
    assert voter(votes=4).rows(["q"], [[1]], [bare], 0.1)[0].text == "b 3"
    assert voter(votes=4, pattern=r"\d").rows(["q"], [[1]], [bare], 0.1)[0].text == "a 7"


@pytest.mark.parametrize(
    "how, kept",
    [
        (dict(think_start=TAGS[0], think_end=TAGS[1]), ["w6", "w9", ""]),
        (dict(budget=2), ["</think> w6", "w9", "w9"]),
        (dict(budget=2, hide_thought=False), None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("mode", ["sampled", "self-consistency"])
def test_a_text_is_the_answer_behind_the_thought(mode, how, kept):
    """As the decoder sampled tells it. Strings that end answers are searched where none is thought."""
    tokenizer = tiny.tokenizer_of()
    start, end = tokenizer.convert_tokens_to_ids(TAGS)
    decoder = CompletionDecoder("toy", Sampling(mode), seed=0, trace=False)
    decoder.tokenizer, decoder.thought = tokenizer, softar.SoftConfig(mixer="hard", **how)
    decoder.stop = ("w9",)
    made = [(start, 5, end, 6), (start, end, 9), (start, 7, 9)]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in made]
    answers = [[Completion(text, row, None)] for text, row in zip(texts, made, strict=True)]
    rows = decoder.rows(["q"] * 3, [[BOS]] * 3, answers, 0.1)
    assert [row.text for row in rows] == (texts if kept is None else kept)
    assert [row.tokens for row in rows] == made
    assert decoder.stop_strings == (["w9"] if kept is None else [])


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("opened", [False, True])
def test_a_thought_that_does_not_end_is_no_vote(special, opened):
    """Nor do special tokens behind an answer tell it from another, and the prompt may have opened
    the thought."""
    tokenizer = tiny.tokenizer_of()
    tokenizer.add_tokens([AddedToken(tag, special=special) for tag in TAGS])
    start, end = tokenizer.convert_tokens_to_ids(TAGS)
    prompt, begin = ([BOS, start], ()) if opened else ([BOS], (start,))
    ids = [(5, 6), (5, 7), (9, end, 11), (10, end, 8, EOS), (4, end, 8), (5, 6)]
    ids = [(*begin, *row) for row in ids]
    completions = [
        Completion(tokenizer.decode(row, skip_special_tokens=True), row, None) for row in ids
    ]
    decoder = voter(votes=6, extract=lambda text: text.split()[-1])
    decoder.tokenizer = tokenizer
    assert decoder.rows(["q"], [prompt], [completions], 0.1)[0].tokens == ids[3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(pattern="("), "pattern='\\(' is no regular expression"),
        (dict(pattern=3), "pattern=3 must be"),
        (dict(extract="f"), "extract='f' must be"),
    ],
)
def test_what_is_voted_on_is_checked_before(options, says):
    with pytest.raises(ValueError, match=says):
        voter(**options)
