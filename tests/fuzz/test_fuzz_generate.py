"""Random decodes of random models: what must hold whatever is asked of `softar.generate`."""

import functools

import pytest
import tiny
import torch
import transformers
from harness import fuzz, generators, padded, same
from hypothesis import strategies as st
from tiny import BOS, END, EOS, PAD, THINK

import softar
from softar import Kind

pytestmark = pytest.mark.rest

VOCAB = 53
SIZES = dict(tiny.SIZES, hidden_size=24, vocab_size=VOCAB, max_position_embeddings=128)
OLD = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
GPT = dict(OLD, n_embd=24, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=6),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=6,
        query_pre_attn_scalar=6,
        sliding_window=4,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "granite": lambda: transformers.GraniteConfig(
        **SIZES, embedding_multiplier=3.0, logits_scaling=2.0
    ),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=1.0),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(**GPT),
    "gptj": lambda: transformers.GPTJConfig(**GPT, rotary_dim=4),
    "opt": lambda: transformers.OPTConfig(
        **OLD,
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.3,
        word_embed_proj_dim=24,
    ),
}
MIXERS = {
    "hard": [{}, {"sample": True}],
    "soft": [{}],
    "gumbel": [{}, {"tau": 0.3}, {"tau": 2.0}],
    "k-samples": [{}, {"k": 2}, {"k": 3, "weighting": "probability"}],
    "mixture-of-inputs": [{}, {"beta": 0.0}, {"beta": 8.0}],
    "dirichlet": [{}, {"gamma": 0.1}, {"gamma": 30.0}],
    "hybrid": [{}, {"share": 0.0}, {"share": 0.9}],
    "hidden": [{}],
}
FIELDS = dict(  # and values that each takes; the first where it is not drawn
    softness=[1.0, 0.5, 0.0, 0.01],
    temperature=[1.0, 0.5, 3.0, 0.0, 0.05],
    top_k=[10, None, 1, 2, VOCAB],
    top_p=[None, 0.5, 0.9, 0.0, 1.0],
    min_p=[None, 0.1, 1.0, 0.0],
    keep=[None, 1, 3],
    banned=[(), (PAD, BOS), tuple(range(10, 20))],
    rescale=[None, "l2", "norm"],
    max_new_tokens=[9, 1, 2, 5, 13],
    budget=[None, 0, 1, 3, 6],
    cold_stop_entropy=[None, 0.0, 0.5, 2.5, 10.0],
    cold_stop_steps=[256, 1, 2, 3],
    answer_temperature=[0.0, 0.5, 1.0],
    answer_top_k=[None, 3],
    answer_top_p=[None, 0.7],
    answer_min_p=[None, 0.1],
)
TAGS = [None, (None, END), (None, (END, 9)), (None, (11, 12, 13)), (None, EOS), (THINK, END)]
TAGS += [((THINK, 8), (11, 12, 13))]


@functools.cache
def model_of(name, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).double().eval()
    if seed:  # some answers of every second model end by themselves
        model.get_output_embeddings().weight.data[EOS] *= 2
    return model


@st.composite
def cases(draw):
    """(model, prompts, fields, the row to be decoded alone, more padding)."""
    mixer = draw(st.sampled_from([*MIXERS, "soft"]))
    fields = {"mixer": mixer, "mixer_args": draw(st.sampled_from(MIXERS[mixer]))}
    fields["max_new_tokens"] = FIELDS["max_new_tokens"][0]
    for name in draw(st.sets(st.sampled_from([*FIELDS]), max_size=6)):
        fields[name] = draw(st.sampled_from(FIELDS[name][1:]))
    if mixer in ("hard", "hidden"):  # they do nothing there, and are refused
        fields.pop("softness", None)
    if mixer == "hidden":
        fields.setdefault("budget", 3)
    if "cold_stop_entropy" not in fields:
        fields.pop("cold_stop_steps", None)
    start, end = draw(st.sampled_from(TAGS)) or (None, None)
    fields |= {"think_start": start, "think_end": end} if end is not None else {}
    word = st.integers(1, VOCAB - 1)
    rows = draw(st.lists(st.lists(word, min_size=1, max_size=9), min_size=1, max_size=4))
    if start is not None:
        opens = [start] if isinstance(start, int) else [*start]
        rows = [row + opens * draw(st.booleans()) for row in rows]
    name, seed = draw(st.sampled_from([*MODELS])), draw(st.integers(0, 1))
    return (name, seed), rows, fields, draw(st.integers(0, len(rows) - 1)), draw(st.integers(1, 8))


def decode(model, rows, config, numbers, extra=0, dtype=torch.int64, **how):
    ids, mask = padded(rows, extra)
    return softar.generate(
        model, ids.to(dtype), mask, config=config, rng=generators(numbers), **how
    )


def parts(out, rows=None):
    """The whole numbers of an output; of rows as long as they decode alone."""
    columns = dict(tokens=out.completions, kind=out.record.kind, start=out.answer_start[:, None])
    if rows is None:
        return columns
    length = max(int((out.record.kind[row] != Kind.PAD).sum()) for row in rows)
    return {name: column[rows, :length] for name, column in columns.items()}


def check(case):
    (name, seed), rows, fields, alone, extra = case
    model, calls = model_of(name, seed), []
    try:
        config = softar.SoftConfig(**fields)
        out = decode(model, rows, config, range(len(rows)), callback=calls.append)
    except ValueError as error:
        assert "=" in str(error) and "\n" not in str(error), f"unclear: {error}"
        assert calls == [], "refused when it had begun"
        return
    check_record(out, rows, config)
    assert len(calls) == out.completions.shape[1] == out.num_forwards
    order = [*range(len(rows))[::-1]]
    others = {
        "more padding, int32": lambda m: parts(
            decode(m, rows, config, range(len(rows)), extra, torch.int32)
        ),
        "another order": lambda m: parts(decode(m, [rows[i] for i in order], config, order)),
        "a row alone": lambda m: parts(decode(m, [rows[alone]], config, [alone])),
    }
    expected = dict.fromkeys(others, parts(out))
    expected["another order"] = {key: x[order] for key, x in parts(out).items()}
    expected["a row alone"] = parts(out, [alone])
    is_plain = not config.has_answer and not config.banned
    if is_plain and (config.temperature == 0 or (config.top_k == 1 and config.mixer == "soft")):
        ids, mask = padded(rows)
        length = config.max_new_tokens
        others["transformers"] = lambda m: {
            "tokens": m.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=length)[
                :, ids.shape[1] :
            ]
        }
        expected["transformers"] = {"tokens": out.completions}
    same(model, lambda m: parts(decode(m, rows, config, range(len(rows)))), others, expected)


def check_record(out, rows, config):
    record, length = out.record, out.completions.shape[1]
    ids, _ = padded(rows)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids), "the prompt changed"
    assert length <= config.max_new_tokens and torch.equal(record.token, out.completions)
    is_latent = record.kind == Kind.LATENT
    total = record.weights.sum(-1)
    assert (record.weights >= 0).all() and (total[is_latent] == 0).all()
    is_whole = ((total - 1).abs() < 1e-4) | ((config.mixer == "hybrid") & (total > 1))
    assert is_whole[~is_latent].all()
    assert ((0 <= record.ids) & (record.ids < VOCAB)).all()
    assert (-1e-5 <= record.entropy).all() and (
        record.entropy < 1e-4 + torch.tensor(VOCAB).log()
    ).all()
    is_hard, largest = (record.kind != Kind.SOFT) & ~is_latent, record.weights.max(-1)
    assert ((largest.values[is_hard] - 1).abs() < 1e-6).all()
    read = record.ids.gather(-1, largest.indices[..., None])[..., 0]
    assert torch.equal(read[is_hard], record.token[is_hard])
    assert not (record.logp[record.kind != Kind.PAD] > 1e-5).any()
    banned = torch.isin(record.ids, torch.tensor(config.banned, dtype=torch.long))
    assert not (record.weights[banned & ~is_hard[..., None]] > 0).any(), "a banned token is read"
    if config.softness == 0 or config.temperature == 0 or config.mixer == "hard":
        assert is_hard.all()
    for row in range(len(rows)):
        tokens, kind = out.completions[row].tolist(), record.kind[row].tolist()
        assert (record.token[row][is_latent[row]] == PAD).all()
        end = tokens.index(EOS) + 1 if EOS in tokens else length
        assert kind[end:] == [Kind.PAD] * (length - end) and tokens[end:] == [PAD] * (length - end)
        assert Kind.PAD not in kind[:end] and (end == length or kind[end - 1] != Kind.SOFT)
        assert EOS in tokens or length == config.max_new_tokens
        thought = kind.count(Kind.SOFT) + kind.count(Kind.LATENT)
        assert config.budget is None or thought <= config.budget
        start = int(out.answer_start[row])
        assert start == 0 if not config.has_answer else Kind.SOFT not in kind[start:]
        assert out.answers[row].tolist() == tokens[start:end]


def test_decodes(fuzz_seconds):
    fuzz(check, cases(), 60, fuzz_seconds)
