"""Soft beams and collapsed beams: their limits are decoders that are known, and what lies between is
what a search without a cache, one sequence at a time, finds."""

import copy
import math

import pytest
import torch
from tiny import (
    BOS,
    END,
    EOS,
    PROMPTS,
    counted,
    edited_logits,
    left_padded,
    model_of,
    tokenizer_of,
    with_lora,
)
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import softar
from softar import Kind, SoftConfig
from softar.decoders.beam import BeamDecoder, BeamOptions
from softar.decoders.beam_collapse import BeamCollapse, beam_collapse, collapse
from softar.decoders.registry import make_decoder
from softar.decoders.search import SEARCHES, SearchDecoder
from softar.decoders.soft_beam import SoftBeam, soft_beam
from softar.mixers import guide
from softar.sft.forward import mixed_forward
from softar.soft import Soft, entropy, mk_proba_dist, soft_embed
from softar.soft import hard as one_token

N = 9  # new tokens
IDS, MASK = left_padded(PROMPTS)
TEXTS = ["<bos> w11 w12 w13 w14", "<bos> w21", "<bos> w31 w32"]
THOUGHTS = [
    dict(budget=4, think_end="</think>"),
    dict(budget=4, think_end=(40, END)),
    dict(budget=5),
    dict(think_end="</think>", cold_stop_entropy=3.5, cold_stop_steps=2),
    dict(cold_stop_entropy=3.5, cold_stop_steps=3),
]
SEARCHED = [
    SoftBeam(3, 0.4),
    SoftBeam(2, 0.0, length_penalty=0.0),
    BeamCollapse(3, 2),
    BeamCollapse(4, 3, 0.5),
]


@pytest.fixture(scope="module")
def tiny():
    return model_of(), tokenizer_of()


def run(model, config, search, ids=IDS, mask=MASK):
    method = soft_beam if isinstance(search, SoftBeam) else beam_collapse
    return method(model, ids, mask, config, search)


def likelier(token, by):
    return lambda step, logits: logits + by * (torch.arange(logits.shape[-1]) == token)


def steps_of(out, row):
    return [column[row][out.record.kind[row] != Kind.PAD] for column in out.record]


# -- the limits


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_one_beam_is_greedy_or_soft_decoding(arch):
    model, config = model_of(arch), SoftConfig(max_new_tokens=N, budget=6, think_end=END)
    greedy = softar.generate(model, IDS, MASK, config=config.changed(mixer="hard", top_k=None))
    soft = softar.generate(model, IDS, MASK, config=config)
    one, _ = run(model, config, SoftBeam(1, 1.0))
    assert torch.equal(one.sequences, greedy.sequences) and (one.record.kind != Kind.SOFT).all()
    belief, _ = run(model, config, SoftBeam(1, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(belief.record[:4], soft.record[:4], strict=True))
    for every in (1, 2, 5):
        best, forwards = run(model, config, BeamCollapse(1, every))
        assert torch.equal(best.sequences, greedy.sequences)
        assert max(forwards) == best.num_forwards >= greedy.num_forwards


@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=2),
        dict(num_beams=4, length_penalty=3.0),
        dict(num_beams=3, early_stopping=True),
        dict(num_beams=3, early_stopping="never", length_penalty=-4.0),
    ],
)
def test_anchors_alone_are_beam_search(how, tiny):
    model, tokenizer = tiny
    with edited_logits(model, likelier(EOS, 3)):
        known = BeamDecoder(model, tokenizer, BeamOptions(N, **how)).decode(TEXTS)
        config = SoftConfig(max_new_tokens=N)
        found = SearchDecoder(model, tokenizer, config, SoftBeam(anchor=1.0, **how)).decode(TEXTS)
    for one, other in zip(found, known, strict=True):
        assert (one.tokens, one.text, one.num_forwards, one.token_forwards) == (
            other.tokens,
            other.text,
            other.num_forwards,
            pytest.approx(other.token_forwards),
        )
    assert {d.soft_steps for d in found} == {0}


@pytest.mark.parametrize("arch, tau", [("llama", 1.0), ("llama", 3.0), ("gemma3", 0.4)])
def test_collapsing_every_token_is_the_mixture_of_the_likeliest(arch, tau):
    model = model_of(arch)
    for K, thought in [(1, {}), (3, dict(budget=4)), (10, dict(budget=4, think_end=END)), (64, {})]:
        # a row that ends leaves the batch, and other batches round in other ways
        config = SoftConfig(max_new_tokens=N, temperature=tau, banned=(EOS,), **thought)
        with edited_logits(model, lambda step, x: x.index_fill(-1, torch.tensor(EOS), -50.0)):
            soft = softar.generate(model, IDS, MASK, config=config.changed(top_k=K))
            found, forwards = run(model, config.changed(temperature=1.0), BeamCollapse(K, 1, tau))
        for name, one, other in zip(soft.record._fields, found.record, soft.record, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()) or name == "logp"
        assert torch.equal(found.answer_start, soft.answer_start)
        assert forwards == [soft.num_forwards] * 3
        assert found.token_forwards == soft.token_forwards


# -- what lies between, on a vocabulary of few tokens


def small(V=6):
    return model_of(vocab_size=V, eos_token_id=None, pad_token_id=0, bos_token_id=1)


def belief_after(model, prompt, read):
    """Logits [V] after a prompt and mixtures [(ids, weights), ...], without a cache."""
    table = model.get_input_embeddings()
    vectors = [table(torch.tensor(prompt))]
    vectors += [soft_embed(Soft(*mixture), table)[None] for mixture in read]
    with torch.no_grad():
        return model(inputs_embeds=torch.cat(vectors)[None]).logits[0, -1].float()


def anchored(logits, token, anchor):
    return guide(mk_proba_dist(logits), torch.tensor(token), anchor)


@pytest.mark.parametrize("anchor", [0.0, 0.3, 1.0])
def test_the_scores_of_soft_beams_are_those_of_all_sequences(anchor):
    """Every pair of tokens, read as it would be: V beams miss none of them."""
    model, prompt = small(), [1, 4, 2]
    best = {}
    first = belief_after(model, prompt, [])
    for a in range(6):
        read = [anchored(first, a, anchor)]
        second = belief_after(model, prompt, read)
        for b in range(6):
            best[a, b] = (first.log_softmax(-1)[a] + second.log_softmax(-1)[b]).item()
    config = SoftConfig(max_new_tokens=2, top_k=None)
    out, _ = run(model, config, SoftBeam(6, anchor), torch.tensor([prompt]), torch.ones(1, 3))
    top = max(best, key=best.get)
    assert tuple(out.completions[0].tolist()) == top
    assert out.record.logp.sum().item() == pytest.approx(best[top], abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_soft_beams_are_those_of_a_search_without_a_cache(seed):
    model, width, anchor = small(), 3, 0.35
    prompts = torch.randint(2, 6, (2, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    out, _ = run(
        model,
        SoftConfig(max_new_tokens=5, top_k=4),
        SoftBeam(width, anchor, length_penalty=0.0),
        torch.tensor(prompts),
        torch.ones(2, 4, dtype=torch.long),
    )
    for row, prompt in enumerate(prompts):
        beams = [(0.0, [], [])]
        for _ in range(5):
            more = []
            for score, tokens, read in beams:
                logits = belief_after(model, prompt, read)
                belief = mk_proba_dist(logits, top_k=4)
                for token, logp in enumerate(logits.log_softmax(-1).tolist()):
                    mixture = guide(belief, torch.tensor(token), anchor)
                    more.append((score + logp, [*tokens, token], [*read, mixture]))
            beams = sorted(more, key=lambda beam: -beam[0])[:width]
        score, tokens, read = beams[0]
        assert out.completions[row].tolist() == tokens
        assert out.record.logp[row].sum().item() == pytest.approx(score, abs=1e-3)
        for step, mixture in enumerate(read[:-1]):
            wide = Soft(out.record.ids[row, step], out.record.weights[row, step])
            assert softar.soft.dense(wide, 6) == pytest.approx(
                softar.soft.dense(Soft(*mixture), 6), abs=1e-4
            )


@pytest.mark.parametrize("width, every, tau", [(6, 2, 1.0), (6, 2, 0.5), (3, 3, 1.0), (2, 4, 2.0)])
def test_collapsed_beams_are_those_of_a_search_without_a_cache(width, every, tau):
    """With V beams and blocks of two tokens, the best V of all V^2 pairs."""
    model, prompt, V, read = small(), [1, 3, 5], 6, []
    out, forwards = run(
        model,
        SoftConfig(max_new_tokens=2 * every),
        BeamCollapse(width, every, tau),
        torch.tensor([prompt]),
        torch.ones(1, 3),
    )
    assert forwards == [1 + 2 * (every - 1) * width + 1]
    for block in range(2):
        beams = [(0.0, [])]
        for _ in range(every):
            more = []
            for score, tokens in beams:
                logits = belief_after(
                    model, prompt, [*read, *(one_token(torch.tensor(t)) for t in tokens)]
                )
                logp = logits.log_softmax(-1).tolist()
                more += [(score + logp[token], [*tokens, token]) for token in range(V)]
            beams = sorted(more, key=lambda beam: -beam[0])[:width]
        weights = (torch.tensor([score for score, _ in beams]) / tau).softmax(-1)
        for j in range(every):
            mixture = Soft(torch.tensor([tokens[j] for _, tokens in beams]), weights)
            at = block * every + j
            found = Soft(out.record.ids[0, at], out.record.weights[0, at])
            wide = softar.soft.dense(mixture, V)
            assert softar.soft.dense(found, V) == pytest.approx(wide, abs=1e-4)
            assert out.record.token[0, at] == wide.argmax()
            read.append(mixture)


def test_a_beam_that_has_ended_is_in_no_later_mixture():
    """Three beams of weights 4 : 2 : 1, of which the first ends after one token and the others after
    two; the entropies are weighed alike."""
    scores = torch.tensor([[4.0, 2.0, 1.0]]).log()
    tokens = torch.tensor([[[7, 0, 0], [8, 9, 0], [8, 5, 0]]])
    alive = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 1, 0]]]).bool()
    h = torch.tensor([[[1.0, 8.0, 8.0], [1.0, 3.0, 8.0], [1.0, 0.0, 8.0]]])
    block = collapse(scores, tokens, alive, h, 1.0)
    assert block.lengths.tolist() == [2] and block.token[0, :2].tolist() == [7, 9]
    assert block.mixtures.weights[0, 0] == pytest.approx(torch.tensor([4, 2, 1]) / 7)
    assert block.mixtures.weights[0, 1] == pytest.approx(torch.tensor([0, 2, 1]) / 3)
    assert block.h[0, :2].tolist() == pytest.approx([1, 2])
    equal = collapse(torch.zeros(1, 3), tokens, alive, h, 1.0)
    assert equal.token[0, 0] == 8, "what several beams say counts together"


# -- thoughts and answers


@pytest.mark.parametrize("thought", THOUGHTS)
@pytest.mark.parametrize("search", SEARCHED)
def test_thoughts_end_by_the_rules_and_answers_are_greedy(search, thought, tiny):
    """Replayed in one forward, by the rules of thought.decide."""
    model, tokenizer = tiny
    config = SoftConfig(max_new_tokens=N, **thought).resolve(tokenizer)
    with edited_logits(model, likelier(END, 2)):
        out, _ = run(model, config, search)
    soft = out.record.kind == Kind.SOFT
    assert soft.any() and (soft.sum(1) <= thought.get("budget", N)).all()
    if "cold_stop_entropy" in thought and "think_end" not in thought:
        assert (out.answer_start < N).any()
    whole = torch.cat([MASK, (out.record.kind != Kind.PAD).long()], 1)
    reads = torch.cat([torch.zeros_like(IDS, dtype=torch.bool), soft], 1)
    K = out.record.ids.shape[-1]
    pad = torch.zeros(*IDS.shape, K)
    mixtures = Soft(
        torch.cat([pad.long(), out.record.ids], 1), torch.cat([pad, out.record.weights], 1)
    )
    with torch.no_grad():
        logits = mixed_forward(model, out.sequences, whole, reads, mixtures)
    logits[..., END] += 2
    for row in range(3):
        _, _, tokens, kinds, logp, _ = steps_of(out, row)
        start = int(out.answer_start[row])
        assert not soft[row, start:].any() and (kinds[:start] != Kind.PAD).all()
        if "think_end" in thought and start < len(tokens):
            end = config.think_end
            assert tuple(tokens[start - len(end) : start].tolist()) == end
        if isinstance(search, BeamCollapse):
            chosen = logits[row, IDS.shape[1] - 1 :].argmax(-1)[: len(tokens)]
            assert torch.equal(tokens[start:], chosen[start:])
        else:  # by what each token was worth where the path stood
            worth = logits[row, IDS.shape[1] - 1 :].log_softmax(-1)[: len(tokens)]
            worth = worth.gather(-1, tokens[:, None])[:, 0]
            free = kinds != Kind.FORCED
            assert logp[free] == pytest.approx(worth[free], abs=2e-3)
            assert logp[~free].isnan().all()


@pytest.mark.parametrize("search", SEARCHED[:3])
def test_the_cold_stop_asks_the_model_and_not_the_processors(search):
    """As softar.generate: eight tokens that are left of 64 make no step sure."""
    model = model_of()
    model.generation_config.suppress_tokens = [*range(8, 64)]
    with torch.no_grad():
        logits = model(IDS, attention_mask=MASK).logits[:, -1]
    config = SoftConfig(max_new_tokens=4, cold_stop_entropy=2.1, cold_stop_steps=1)
    out, _ = run(model, config, search)
    assert out.record.token[:, 0].max() < 8
    assert out.record.entropy[:, 0].tolist() == pytest.approx(entropy(logits).tolist(), abs=1e-4)
    assert (out.record.kind[:, 0] == Kind.SOFT).all()


def reads_bytes():
    bpe = Tokenizer(BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, []))
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="!", eos_token="?")


@pytest.mark.parametrize("search", [*SEARCHED, SoftBeam(1), None])
def test_an_answer_ends_with_a_stop_string(search):
    tokenizer = reads_bytes()
    (a,), model = tokenizer.encode("a"), model_of(vocab_size=256)
    made = (BeamDecoder, BeamOptions(N, num_beams=2, budget=3)) if search is None else None
    decoder, *args = made or (SearchDecoder, SoftConfig(max_new_tokens=N, budget=3), search)
    with edited_logits(model, likelier(a, 20)):
        (found,) = decoder(model, tokenizer, *args, stop=("a",)).decode(["it"])
    assert found.tokens == (a,) * 4 and found.text == "a"  # a thought of three is not searched


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora])
@pytest.mark.parametrize("strings", ["aaa", ["zz", "aaa"]])
def test_a_models_own_stop_strings_end_a_text(wrap, strings):
    tokenizer, inner = reads_bytes(), model_of(vocab_size=256)
    (a,), model, config = tokenizer.encode("a"), wrap(inner), SoftConfig(max_new_tokens=N, budget=1)
    inner.generation_config.stop_strings = strings
    ids = tokenizer("it", return_tensors="pt")
    made = [BeamDecoder(model, tokenizer, BeamOptions(N, num_beams=2))]
    made += [SearchDecoder(model, tokenizer, config, each) for each in (*SEARCHED, SoftBeam(1))]
    with edited_logits(inner, likelier(a, 20)):
        found = {each.name: each.decode(["it"])[0].tokens for each in made}
        out = softar.generate(model, **ids, config=config, tokenizer=tokenizer)
        assert found | {"generate": (*out.completions[0].tolist(),)} == dict.fromkeys(
            [*found, "generate"], (a,) * 3
        )
        other = copy.deepcopy(inner.generation_config)
        other.stop_strings = ["aaaaa"]  # in place of the model's own
        how = dict(tokenizer=tokenizer, generation_config=other)
        assert softar.generate(model, **ids, config=config, **how).completions.shape == (1, 5)
    assert inner.generation_config.stop_strings == strings


def test_stop_strings_that_nothing_can_look_for_are_named():
    """transformers asks a tokenizer for a word that a closed vocabulary does not have."""
    model, words = model_of(), softar.load("mnns-tiny", seed=0)[1]
    model.generation_config.stop_strings = ["w5"]
    config, says = SoftConfig(max_new_tokens=N), "stop_strings=.'w5'.: transformers cannot look"
    with pytest.raises(ValueError, match=r"stop_strings=.'w5'. are text: pass tokenizer="):
        softar.generate(model, IDS, MASK, config=config)
    with pytest.raises(ValueError, match=says):
        softar.generate(model, IDS, MASK, config=config, tokenizer=words)
    for search in SEARCHED:
        with pytest.raises(ValueError, match=says):
            SearchDecoder(model, words, config, search).decode(["<bos> D1"])
    with pytest.raises(ValueError, match=says) as caught:
        BeamDecoder(model, words, BeamOptions(N))
    assert "\n" not in str(caught.value)
    assert model.generation_config.stop_strings == ["w5"]


def test_a_tag_that_opens_the_thought(tiny):
    model, tokenizer = tiny
    where = dict(think_start="<think>", think_end="</think>", max_new_tokens=N)
    config = SoftConfig(**where).resolve(tokenizer)
    opened = torch.tensor([[BOS, 3], [BOS, 20]])  # 3 is <think>
    for search in SEARCHED:
        out, _ = run(model, config, search, opened, torch.ones_like(opened))
        soft = out.record.kind == Kind.SOFT
        assert soft[0].any() and not soft[1].any() and out.answer_start[1] == 0


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("search", SEARCHED)
def test_a_row_of_a_batch_is_the_row_alone(arch, search):
    """Sliding windows shorter than the sequences among them, and thoughts that end apart."""
    model = model_of(arch, initializer_range=0.2)
    for thought in [dict(think_end=END, budget=6)]:
        config = SoftConfig(max_new_tokens=N, **thought)
        with edited_logits(model, likelier(END, 1.5)):
            together, forwards = run(model, config, search)
            for row, prompt in enumerate(PROMPTS):
                ids = torch.tensor([prompt])
                alone, cost = run(model, config, search, ids, torch.ones_like(ids))
                for name, one, other in zip(
                    alone.record._fields, steps_of(alone, 0), steps_of(together, row), strict=True
                ):
                    one, other = one.double().nan_to_num(), other.double().nan_to_num()
                    assert one == pytest.approx(other, abs=2e-3), name
                assert alone.answer_start[0] == together.answer_start[row]
                if isinstance(search, BeamCollapse):
                    assert cost == [forwards[row]]


@pytest.mark.parametrize("search", [SoftBeam(3), BeamCollapse(3, 2), BeamCollapse(4, 4)])
def test_costs_count_every_beam(search, tiny):
    model, tokenizer = tiny
    with counted(model) as calls:
        found = SearchDecoder(model, tokenizer, SoftConfig(max_new_tokens=N), search).decode(TEXTS)
    assert sum(d.token_forwards for d in found) == pytest.approx(sum(r * c for r, c in calls))
    if isinstance(search, SoftBeam):
        assert {d.num_forwards for d in found} == {3.0 * len(calls)}
        return
    whole = [d for d in found if len(d.tokens) == N]
    assert whole
    blocks, rest = divmod(N - 1, search.every)
    # each block looks ahead with every beam, then reads once; the last token is not read
    cost = 1 + blocks * ((search.every - 1) * search.num_beams + 1)
    cost += rest * search.num_beams
    assert {d.num_forwards for d in whole} == {float(cost)}


def test_the_model_is_left_as_it_was(tiny):
    tokenizer, model = tokenizer_of(), with_lora(model_of())
    model.train()
    config = SoftConfig(max_new_tokens=N)
    for search in SEARCHED:
        lora = SearchDecoder(model, tokenizer, config, search).decode(TEXTS)
        plain = SearchDecoder(tiny[0], tokenizer, config, search).decode(TEXTS)
        assert [d.tokens for d in lora] != [d.tokens for d in plain]
        assert model.training and "prepare_inputs_for_generation" not in vars(
            model.get_base_model()
        )
        with edited_logits(tiny[0], lambda step, x: x * math.nan if step == 2 else x):
            with pytest.raises(FloatingPointError, match="NaN or infinite"):
                SearchDecoder(*tiny, config, search).decode(TEXTS)
        assert "prepare_inputs_for_generation" not in vars(tiny[0])


@pytest.mark.parametrize(
    "spec, message",
    [
        ("soft-beam:num_beams=0", "num_beams=0 must be at least 1"),
        ("soft-beam:num_beams=9999", "must be at most .*, the model's vocabulary: lower it"),
        ("soft-beam:anchor=1.5", r"anchor=1.5 must lie in \[0, 1\]"),
        ("soft-beam:anchor=-0.1", r"anchor=-0.1 must lie in \[0, 1\]"),
        ("soft-beam:anchor=x", "decoder 'soft-beam': anchor='x' must be a number"),
        ("soft-beam:early_stopping=x", "early_stopping='x' is unknown"),
        ("soft-beam:softness=0.5", "decoder 'soft-beam' takes no 'softness'"),
        ("soft-beam:answer_temperature=1", "decoder 'soft-beam' takes no 'answer_temperature'"),
        ("soft-beam:every=2", "decoder 'soft-beam' takes no 'every'"),
        ("beam-collapse:num_beams=0", "num_beams=0 must be at least 1"),
        ("beam-collapse:num_beams=9999", "must be at most .*, the model's vocabulary: lower it"),
        ("beam-collapse:every=0", "every=0 must be at least 1"),
        ("beam-collapse:tau=0", "tau=0 must be > 0"),
        ("beam-collapse:tau=-1", "tau=-1 must be > 0"),
        ("beam-collapse:tau=Infinity", "tau=inf must be > 0 and finite"),
        ("beam-collapse:top_k=3", "decoder 'beam-collapse' takes no 'top_k'"),
        ("beam-collapse:anchor=0.5", "decoder 'beam-collapse' takes no 'anchor'"),
        ("self-consistency:of=soft-beam", "of='soft-beam' is not a decoder that draws"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_decoder(f"mnns-soft-tiny={spec}", max_new_tokens=4)
    assert "\n" not in str(caught.value)


def test_the_models_own_configuration_counts():
    """Where the thought is; its mixer and filters only as far as the search does not say."""
    for name in SEARCHES:
        decoder = make_decoder(f"mnns-soft-tiny={name}:num_beams=3,banned=[5]", max_new_tokens=6)
        assert decoder.name == f"mnns-soft-tiny={name} num_beams=3 banned=[5]"
        assert decoder.config.budget == 3 and decoder.config.banned == (5,)
        assert decoder.config.max_new_tokens == 6 and decoder.config.mixer == "soft"
        found = decoder.decode(softar.load_task("mnns").test["prompt"][:4])
        assert all(5 not in d.tokens[:3] and d.soft_steps == 3 for d in found)
