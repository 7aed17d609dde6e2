"""What is read besides mixtures of tokens: hidden states (Coconut) and gated sums (HRPO)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import decode
from tiny import (
    BOS,
    END,
    EOS,
    PAD,
    THINK,
    VOCAB,
    WIDTH,
    left_padded,
    model_of,
    seeded,
    tokenizer_of,
    with_lora,
)

import softar
from softar import Kind, SoftConfig
from softar.evaluate import answer_ids
from softar.feedback import Gate, mean_length
from softar.mixers import MIXERS
from softar.show.trace import from_json, thought, to_json
from softar.soft import Soft, mk_proba_dist, soft_embed


@pytest.fixture(scope="module")
def llama():
    return model_of()


PROMPT = [BOS, 11, 12, 13]
LATENT, HARD, FORCED = Kind.LATENT, Kind.HARD, Kind.FORCED


@torch.no_grad()
def by_hand(model, prompt, latents, end, new, length=None):
    """Coconut with inputs_embeds of the whole sequence and no cache -> latents and greedy tokens."""
    embed, ids = model.get_input_embeddings(), torch.tensor([prompt])
    inputs, vectors, tokens = embed(ids), [], []
    while len(vectors) + len(tokens) < new:
        outputs = model(inputs_embeds=inputs, output_hidden_states=True)
        if len(vectors) < latents:
            read = outputs.hidden_states[-1][:, -1:]
            if length is not None:
                read = read * length / read.norm(dim=-1, keepdim=True)
            vectors.append(read[0, 0])
        else:
            step = len(tokens)
            token = end[step] if step < len(end) else int(outputs.logits[0, -1].argmax())
            tokens.append(token)
            read = embed(torch.tensor([[token]]))
        inputs = torch.cat([inputs, read], 1)
    return torch.stack(vectors), tokens


@pytest.mark.parametrize("arch", ["llama", "gemma", "qwen3"])
@pytest.mark.parametrize("rescale", [None, "norm"])
@torch.no_grad()
def test_hidden_states_are_read_as_by_hand(arch, rescale):
    model = model_of(arch, eos_token_id=None, initializer_range=0.15)
    embedding = model.get_input_embeddings()
    length = float(embedding(torch.arange(VOCAB)).norm(dim=-1).mean()) if rescale else None
    for tuned in (model, with_lora(model)):
        for latents, end in ((1, []), (4, []), (3, [END, 9])):
            knobs = dict(mixer="hidden", rescale=rescale, budget=latents, max_new_tokens=8)
            out = decode(tuned, [PROMPT], think_end=tuple(end) or None, **knobs)
            vectors, tokens = by_hand(tuned, PROMPT, latents, end, 8, length)
            kinds = [LATENT] * latents + [FORCED] * len(end) + [HARD] * (8 - latents - len(end))
            assert out.record.kind.tolist() == [kinds]
            assert out.completions.tolist() == [[PAD] * latents + tokens]
            assert out.answers[0].tolist() == tokens[0 if not end else len(end) :]
            assert out.vectors.dtype == torch.float16 and out.vectors.device.type == "cpu"
            torch.testing.assert_close(
                out.vectors[0, :latents].float(), vectors, rtol=2e-3, atol=1e-3
            )
            assert (out.vectors[0, latents:] == 0).all()
            assert (out.record.weights.sum(-1) == torch.tensor([k != LATENT for k in kinds])).all()
            assert out.record.logp[0, :latents].isnan().all()


def test_nothing_but_the_budget_ends_a_thought_without_tokens(llama):
    """Whatever the head would say: not EOS, not the closing tag, no stop string, no criterion."""

    class Says(torch.nn.Module):
        def __init__(self, *tokens):
            super().__init__()
            self.tokens = tokens

        def __call__(self, ids, scores):
            step = ids.shape[1] - len(PROMPT)
            return torch.full_like(scores, -9.0).index_fill(
                1, torch.tensor(self.tokens[min(step, len(self.tokens) - 1)]), 9.0
            )

    settings = dict(mixer="hidden", budget=4, think_end=END, max_new_tokens=8)
    seen = []

    def anything(ids, scores):
        seen.append(ids.shape[1])
        return torch.ones(len(ids), dtype=torch.bool)

    knobs = dict(logits_processor=[Says(EOS, END, EOS, 7, 8, 9, EOS)])
    out = decode(llama, [PROMPT], **settings, **knobs)
    assert out.record.kind.tolist() == [[LATENT] * 4 + [FORCED, HARD, HARD]]
    assert out.completions.tolist() == [[PAD] * 4 + [END, 9, EOS]]
    shown = decode(llama, [PROMPT], **settings, **knobs, hide_thought=False)
    assert torch.equal(shown.completions, out.completions)
    assert [a.tolist() for a in shown.answers] == answer_ids(shown, None) == [[END, 9, EOS]]
    out = decode(llama, [PROMPT], **settings, **knobs, stopping_criteria=[anything])
    assert out.record.kind.tolist() == [[LATENT] * 4 + [FORCED]]
    # length counts in vectors, too
    out = decode(llama, [PROMPT], mixer="hidden", budget=40, max_new_tokens=3)
    assert out.record.kind.tolist() == [[LATENT] * 3] and out.vectors.shape == (1, 3, WIDTH)
    # a cold stop is one of the model's belief
    out = decode(llama, [PROMPT], mixer="hidden", cold_stop_entropy=99.0, cold_stop_steps=2)
    assert out.record.kind[0, :3].tolist() == [LATENT, HARD, HARD]


def test_rows_that_think_beside_rows_that_answer():
    model = model_of(eos_token_id=None, initializer_range=0.15)
    knobs = dict(mixer="hidden", budget=3, think_start=THINK, think_end=END, max_new_tokens=7)
    rows = [[BOS, 11, THINK], [BOS, 12, 13, 14], [BOS, THINK, 5, END, 9, 9]]
    batch = decode(model, rows, **knobs)
    assert batch.record.kind[:, 0].tolist() == [LATENT, HARD, HARD]
    for row, prompt in enumerate(rows):
        alone = (
            decode(model, [prompt], **knobs)
            if row == 0
            else decode(model, [prompt], mixer="hard", top_k=None, max_new_tokens=7)
        )
        T = alone.completions.shape[1]
        assert torch.equal(alone.completions[0], batch.completions[row, :T])
    assert (batch.vectors[1:] == 0).all() and (batch.vectors[0, :3] != 0).any(-1).all()


@pytest.mark.parametrize("pad", [EOS, None])
def test_an_end_token_that_pads_ends_no_thought(pad):
    """The token of a step without one is the pad token, here the end token too."""
    rows = [PROMPT, [BOS, 20], [BOS, 31, 32, 33, 34]]

    def says_end(ids, scores):
        """All through the thought in each row, and in the first once more behind it."""
        step, (first, *others) = ids.shape[1] - 5, scores + 99.0 * (torch.arange(VOCAB) == EOS)
        some = [first, *(others if step < 3 else scores[1:])]
        return torch.stack(some) if step != 3 else scores

    knobs = dict(mixer="hidden", budget=3, max_new_tokens=8, logits_processor=[says_end])
    apart, same = model_of(initializer_range=0.15), model_of(initializer_range=0.15)
    same.generation_config.pad_token_id = pad  # None: transformers takes the end token
    ends, out = (decode(model, rows, **knobs) for model in (apart, same))
    assert torch.equal(out.record.kind, ends.record.kind)
    assert (out.record.kind[0] == Kind.PAD).sum() == 3
    assert (out.record.kind[:, :3] == LATENT).all() and out.answer_start.tolist() == [3] * 3
    latent, padded = out.record.kind == LATENT, out.record.kind == Kind.PAD
    assert (out.completions[latent | padded] == EOS).all()
    assert torch.equal(out.completions[~latent & ~padded], ends.completions[~latent & ~padded])
    assert torch.equal(out.vectors, ends.vectors)
    assert [a.tolist() for a in out.answers] == [a.tolist() for a in ends.answers]


def test_a_callback_and_a_streamer_see_vectors_and_no_tokens(llama):
    steps, put = [], []

    class Streamer:
        def put(self, value):
            put.append(value.tolist())

        def end(self):
            pass

    out = decode(
        llama,
        [PROMPT],
        mixer="hidden",
        budget=2,
        max_new_tokens=4,
        callback=lambda s: steps.append(s),
        streamer=Streamer(),
    )
    assert [s["vector"] is not None for s in steps] == [True, True, True, False]
    torch.testing.assert_close(steps[1]["vector"][0].half(), out.vectors[0, 1])
    assert put == [[PROMPT], *([t] for t in out.completions[0, 2:].tolist())]


def test_a_trace_says_that_no_token_stands_for_a_latent_step(llama):
    out = decode(llama, [PROMPT], mixer="hidden", budget=2, max_new_tokens=4)
    trace = thought(out, tokenizer_of())
    assert [(s.kind, s.token == "", s.mixture == []) for s in trace.steps[:3]] == [
        ("latent", True, True),
        ("latent", True, True),
        ("hard", False, False),
    ]
    assert from_json(to_json(trace)) == trace


# -- the hybrid


shares = st.floats(0, 1)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 99), share=shares, top_k=st.none() | st.integers(1, 20))
def test_a_share_of_the_token_and_the_rest_of_the_normalised_belief(seed, share, top_k):
    table = torch.nn.Embedding(30, 8)
    dist = mk_proba_dist(torch.randn(4, 30, generator=seeded(seed)) * 2, top_k=top_k)
    mixed = MIXERS["hybrid"](dist, rng=seeded(seed), share=share)
    drawn = MIXERS["hard"](dist, rng=seeded(seed), sample=True)
    assert torch.equal(mixed.token, drawn.token) and torch.equal(mixed.logp, drawn.logp)
    wanted = share * table(drawn.token) + (1 - share) * soft_embed(dist, table, rescale="l2")
    torch.testing.assert_close(soft_embed(mixed.soft, table), wanted, rtol=1e-4, atol=1e-5)


def gate_of(width=8, **changes):
    """A gate with weights that are not its first ones; changes: parameters by name, one number."""
    gate = Gate(width)
    with torch.no_grad():
        for name, p in gate.named_parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(len(name))))
            if name in changes:
                p.fill_(changes[name])
    return gate


def test_the_gate_at_its_two_ends_is_the_token_or_the_normalised_mixture():
    token, mixture = torch.randn(2, 5, 8, generator=seeded(1))
    opened = gate_of(strength=200.0)
    assert torch.equal(opened(token, mixture), token)
    open_ = {
        "input.weight": 0.0,
        "input.bias": 200.0,
        "recurrence.weight": 0.0,
        "recurrence.bias": 200.0,
    }
    shut = gate_of(strength=-200.0, **open_)
    torch.testing.assert_close(shut(token, mixture), mixture, rtol=0, atol=0)


def test_a_new_gate_reads_nearly_the_token_and_its_variance_stays():
    torch.manual_seed(0)
    gate = Gate(64)
    with torch.no_grad():
        for layer in (gate.recurrence, gate.input):
            layer.weight.zero_(), layer.bias.fill_(200.0)
    zero, one = torch.zeros(1, 64), torch.ones(1, 64)
    a, rest = gate(one, zero), gate(zero, one)
    assert a.min() >= 0.98 - 1e-5 and a.max() <= 0.999 + 1e-5 and a.std() > 1e-3
    torch.testing.assert_close(a.square() + rest.square(), one, rtol=0, atol=1e-5)
    first = Gate(64)(one, zero)
    assert first.min() > 0.9


def test_a_gate_gets_gradients_at_its_end_too():
    gate = gate_of(strength=200.0)
    gate(torch.randn(3, 8), torch.randn(3, 8)).sum().backward()
    assert all(p.grad.isfinite().all() for p in gate.parameters())
    gate = gate_of().double()
    inputs = [torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(gate, inputs)


def test_a_gated_decode_reads_what_the_gate_makes(tmp_path):
    model, file = model_of(eos_token_id=None), str(tmp_path / "gate.safetensors")
    gate = gate_of(WIDTH, strength=-1.0)
    gate.save(file)
    read = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs.get("inputs_embeds")), with_kwargs=True
    )
    config = SoftConfig(
        mixer="hybrid", mixer_args={"gate": file}, top_k=4, budget=3, max_new_tokens=6
    )
    state = torch.random.get_rng_state()
    out = softar.generate(model, *left_padded([PROMPT]), config=config, rng=seeded(3))
    hook.remove()
    assert torch.equal(state, torch.random.get_rng_state())
    table, record = model.get_input_embeddings(), out.record
    assert out.vectors is None and record.kind.tolist() == [[Kind.SOFT] * 3 + [HARD] * 3]
    for step in range(3):  # the record and the gate are all that a replay needs
        soft = Soft(record.ids[:, step], record.weights[:, step])
        wanted = gate(table(record.token[:, step]), soft_embed(soft, table, rescale="l2"))
        torch.testing.assert_close(read[1 + step][:, 0], wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(record.weights[0, :3].sum(-1), torch.ones(3))


def test_the_share_at_its_ends_is_sampling_and_the_l2_mixture():
    model = model_of(eos_token_id=None)
    knobs = dict(top_k=6, max_new_tokens=6)
    token = decode(model, mixer="hybrid", mixer_args={"share": 1.0}, rng=seeded(1), **knobs)
    sampled = decode(model, mixer="hard", mixer_args={"sample": True}, rng=seeded(1), **knobs)
    assert torch.equal(token.sequences, sampled.sequences)
    belief = decode(model, mixer="hybrid", mixer_args={"share": 0.0}, rng=seeded(1), **knobs)
    soft = decode(model, rescale="l2", **knobs)
    torch.testing.assert_close(belief.record.entropy, soft.record.entropy, rtol=1e-4, atol=1e-4)
    trace = thought(decode(model, mixer="hybrid", rng=seeded(1), **knobs), tokenizer_of())
    for step in trace.steps:
        assert math.fsum(w for _, w in step.mixture) + step.rest <= 1 + 1e-5


# -- bad input


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(mixer="hidden"), "'hidden' feeds back vectors .*: give budget"),
        (dict(mixer="hidden", think_end=END), "none can end the thought: give budget"),
        (
            dict(mixer="hidden", budget=2, rescale="l2"),
            "rescale='l2' .*'hidden' has none: give 'norm'",
        ),
        (
            dict(mixer="hidden", budget=2, softness=0.5),
            "softness=0.5 does nothing with a mixer of vectors",
        ),
        (dict(mixer="hidden", budget=2, min_p=0.1), "min_p=0.1 does nothing"),
        (dict(mixer="hidden", budget=2, mixer_args={"tau": 1}), "tau"),
        (
            dict(mixer="hidden", budget=2, temperature=0.0),
            "mixer='hidden' does nothing at temperature=0",
        ),
        (dict(mixer="hybrid", mixer_args={"share": 1.5}), r"share=1.5 must lie in \[0, 1\]"),
        (dict(mixer="hybrid", mixer_args={"share": float("nan")}), "share=nan must lie"),
        (
            dict(mixer="hybrid", mixer_args={"share": 0.5, "gate": "x"}),
            "share=0.5 does nothing beside gate",
        ),
        (dict(mixer="hybrid", mixer_args={"gate": 5}), "gate=5 is no file: give one"),
        (
            dict(mixer="hybrid", mixer_args={"gate": "/no/such"}),
            "gate='/no/such' is no file: give one",
        ),
    ],
)
def test_settings_that_cannot_be(fields, told):
    with pytest.raises(ValueError, match=told):
        SoftConfig(**fields)


def test_models_that_cannot_read_their_hidden_states(tmp_path):
    from transformers import AutoModelForCausalLM, ElectraConfig, OPTConfig

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    narrow = ElectraConfig(**sizes, embedding_size=8, intermediate_size=16, is_decoder=True)
    with pytest.raises(ValueError, match="hidden states of width 16 and embeddings of 8"):
        decode(AutoModelForCausalLM.from_config(narrow), [PROMPT], mixer="hidden", budget=2)
    # its last one is as narrow as its embeddings
    opt = AutoModelForCausalLM.from_config(OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=8))
    assert decode(opt, [PROMPT], mixer="hidden", budget=2).vectors.shape[-1] == 8
    file = tmp_path / "gate.safetensors"
    gate_of(WIDTH + 1).save(file)
    for content in (None, b"not one"):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"is no gate for embeddings of width 32 .*: give a file"
        ):
            decode(model_of(), [PROMPT], mixer="hybrid", mixer_args={"gate": str(file)})


def test_the_mean_length_is_taken_in_parts(monkeypatch):
    monkeypatch.setattr(softar.feedback, "ROWS", 7)
    table = torch.nn.Embedding(30, 8)
    wanted = float(table.weight.norm(dim=-1).mean())
    assert math.isclose(mean_length(table, 30, torch.device("cpu")), wanted, rel_tol=1e-6)
