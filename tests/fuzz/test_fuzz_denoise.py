"""Random canvases of random models: what must hold whatever is asked of `denoise`."""

import functools

import pytest
import tiny
import torch
from harness import fuzz, generators, padded, same
from hypothesis import strategies as st
from tiny import EOS, PAD
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.architectures import (
    DreamConfig,
    DreamForMaskedDiffusion,
    LladaConfig,
    LladaForMaskedDiffusion,
)
from softar.diffusion.families import (
    Fast_dLLM_QwenForCausalLM,
    FastDllmConfig,
    SdarConfig,
    SDARForCausalLM,
)
from softar.diffusion.remask import REMASKED, REMASKS
from softar.diffusion.schedules import SCHEDULES
from softar.diffusion.select import SELECTORS
from softar.diffusion.soften import SOFTENERS

pytestmark = pytest.mark.rest

VOCAB, MASK = 61, 7
SIZES = dict(
    tiny.SIZES,
    hidden_size=24,
    vocab_size=VOCAB,
    max_position_embeddings=96,
    mask_token_id=MASK,
    bos_token_id=None,
)
BERT = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=96,
    pad_token_id=PAD,
    eos_token_id=EOS,
    initializer_range=0.3,
)
MODERN = dict(BERT, bos_token_id=None, cls_token_id=3, sep_token_id=EOS)
MODELS = {  # the last three have no cache
    "llada": lambda: LladaForMaskedDiffusion(LladaConfig(**SIZES, tie_word_embeddings=False)),
    "shifted": lambda: LladaForMaskedDiffusion(
        LladaConfig(**SIZES, logits_shift=1, tie_word_embeddings=True)
    ),
    "dream": lambda: DreamForMaskedDiffusion(DreamConfig(**SIZES, tie_word_embeddings=True)),
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**BERT, type_vocab_size=1)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**MODERN, local_attention=8, global_attn_every_n_layers=2)
    ),
}


def block_causal(shift, block_length):
    kinds = ((SDARForCausalLM, SdarConfig), (Fast_dLLM_QwenForCausalLM, FastDllmConfig))
    make, config = kinds[shift]
    own = dict(eos_token_id=EOS, tie_word_embeddings=False, block_length=block_length)
    return make(config(**SIZES | own | ({} if shift else {"head_dim": 6})))


BLOCKS = {
    (shift, b): f"{kind}, {b}" for shift, kind in enumerate(["sdar", "fast"]) for b in (1, 4, 6)
}
MODELS |= {name: functools.partial(block_causal, *key) for key, name in BLOCKS.items()}
FIELDS = dict(  # and values that each takes
    select=[*SELECTORS],
    cache=["prefix", "dual"],
    temperature=[0.3, 1.0, 2.0],
    top_k=[1, 3, 20, VOCAB],
    top_p=[0.01, 0.5, 0.95, 1.0],
    alg_temp=[0.2, 5.0],
    cfg_scale=[0.7, 1.5],
    cfg_keep_ids=[tuple(range(3, 30))],
    rescale=["l2", "norm"],
    ban_eos=[True],
    ends_last=[True],
    early_stop=[True],
    end_ids=[(EOS,), tuple(range(10, 40)), (EOS, 33)],
)
LONGER = (
    "linear",
    "ancestral",
    "p2",
    "refine",
    "edit",
    "overwrite",
)  # may take more forwards than there are masks
SOFT_MASK = [{}, {"scheduling": "linear"}, {"algorithm": "temperature", "temperature": 0.5}]


@functools.cache
def model_of(name, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]()
    model.config.mask_token_id = MASK
    return model.double().eval()


@st.composite
def cases(draw):
    """(model, prompts, fields, the row to be decoded alone, more padding)."""

    def one(values):
        return draw(st.sampled_from([*values]))

    schedule, length, name = one(SCHEDULES), one([0, 0, 1, 6, 9, 12]), one(MODELS)
    sizes = [d for d in (1, 2, 3, 5, 6) if length % d == 0]
    fields = {"gen_length": length, "schedule": schedule}
    fields |= {name: one(FIELDS[name]) for name in draw(st.sets(st.sampled_from([*FIELDS])))}
    if name in BLOCKS.values():
        b = int(name.split()[1])
        fields["sub_block_length"] = one([None, *(d for d in (1, 2, 3, 4, 6) if b % d == 0)])
        fields["grid"] = one(["start", "end"])
        if fields["sub_block_length"] in (None, b):
            fields.pop("cache", None)
    else:
        fields["block_length"] = one([None, *sizes])
    fields["soften"] = one(SOFTENERS)
    if fields["soften"] == "hard":
        fields.pop("rescale", None)
    if "cfg_scale" not in fields:
        fields.pop("cfg_keep_ids", None)
    if fields["soften"] == "soft-mask":
        fields["soften_args"] = one([*SOFT_MASK, {"k": 5, "scale": 1.0}, {"k": VOCAB}])
    if SCHEDULES[schedule].takes_steps:
        fields["steps"] = one([None, 1, 2, 3, 6, 12])
        if fields["steps"] and schedule in REMASKED and draw(st.booleans()):
            fields["remask"] = one(REMASKS)
            if fields["remask"] != "conf":
                fields["remask_args"] = one([{}, {"eta": 0.3}, {"eta": 1.0}])
    if schedule == "linear":
        fields["schedule_args"] = {"eps": one([1e-3, 0.0, 0.3, 0.9])}
    if schedule == "p2":
        fields["schedule_args"] = {"eta": one([0.0, 1.0, 3.0])}
    if schedule == "wino":
        fields["schedule_args"] = {"back": one([0.0, 0.3, 1.0])}
    if schedule == "refine":
        fields["schedule_args"] = {"kl": one([0.0, 0.1, 3.0]), "most": one([1, 3])}
    if schedule == "pyramid":
        fields["schedule_args"] = {"dilation": one([1, 2, 3, 7])}
    if compares := SCHEDULES[schedule].compares:
        fields[compares] = one([1e-6, 0.1, 0.5, 1.0])
    word = st.integers(3, VOCAB - 1).filter(lambda i: i != MASK)
    token = st.one_of(word, st.just(MASK)) if length == 0 or draw(st.booleans()) else word
    rows = draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=4))
    which = (name, draw(st.integers(0, 1)))
    return which, rows, fields, draw(st.integers(0, len(rows) - 1)), draw(st.integers(1, 8))


def decode(model, rows, config, numbers, extra=0, dtype=torch.int64, **how):
    ids, mask = padded(rows, extra)
    return denoise(model, ids.to(dtype), mask, config=config, rng=generators(numbers), **how)


def parts(out, rows, length=None):
    """The whole numbers of an output: its last `length` columns."""
    columns = dict(tokens=out.sequences, committed_at=out.committed_at)
    return {name: column[rows, -(length or 0) :] for name, column in columns.items()}


def check(case):
    (name, seed), rows, fields, alone, extra = case
    model, calls, every = model_of(name, seed), [], range(len(rows))
    try:
        config = DenoiseConfig(**fields)
        out = decode(model, rows, config, every, callback=calls.append)
    except ValueError as error:
        assert "=" in str(error) and "\n" not in str(error), f"unclear: {error}"
        assert calls == [], "refused when it had begun"
        return
    ids, _ = padded(rows)
    canvas = torch.cat([ids, torch.full((len(rows), config.gen_length), MASK)], 1)
    check_output(out, canvas, config, name in BLOCKS.values())
    for call in calls:
        check_step(call, canvas != MASK, config)
    assert out.num_forwards == len(calls) + out.store_forwards
    assert (out.row_forwards <= out.num_forwards).all()
    length, order = canvas.shape[1], [*every][::-1]
    others = {
        "more padding, int32": lambda m: parts(
            decode(m, rows, config, every, extra, torch.int32), [*every], length
        ),
        "another order": lambda m: parts(
            decode(m, [rows[i] for i in order], config, order), [*every]
        ),
    }
    expected = {"more padding, int32": parts(out, [*every]), "another order": parts(out, order)}
    if config.gen_length or MASK in rows[alone]:
        others["a row alone"] = lambda m: parts(decode(m, [rows[alone]], config, [alone]), [0])
        own = len(rows[alone]) + config.gen_length
        # not when: of a template, blocks of others count as well
        expected["a row alone"] = {"tokens": parts(out, [alone], own)["tokens"]}
    if name in BLOCKS.values() and config.cache is None:
        config_off = DenoiseConfig(**fields | {"cache": "off"})
        others["without a cache"] = lambda m: {
            "tokens": decode(m, rows, config_off, every).sequences
        }
        expected["without a cache"] = {"tokens": out.sequences}
    same(model, lambda m: parts(decode(m, rows, config, every), [*every]), others, expected)


def check_output(out, canvas, config, by_blocks):
    is_given = canvas != MASK
    assert (out.sequences != MASK).all(), "a mask is left"
    assert torch.equal(out.sequences[is_given], canvas[is_given]), "a given token changed"
    assert (out.committed_at < out.num_forwards).all() and (out.committed_at[is_given] == -1).all()
    masks = int((~is_given).any(0).sum())
    if config.remask is None and config.schedule not in LONGER and not by_blocks:
        assert out.num_forwards <= masks
    if config.steps and config.gen_length and int((~is_given).sum()) == masks * len(canvas):
        assert out.num_forwards - out.store_forwards <= config.steps or by_blocks
    stops = by_blocks and config.gen_length if config.early_stop is None else config.early_stop
    if not stops:
        confidence = out.confidence[~is_given]
        assert (out.committed_at[~is_given] >= 0).all()
        assert ((confidence >= 0) & (confidence <= 1.0001)).all()
        assert not config.ban_eos or (out.sequences[~is_given] != EOS).all()


def check_step(call, is_given, config):
    soft, where = call["soft"], call["where"]
    if soft is None or not soft.weights.numel():
        return
    assert int(where.sum()) == len(soft.weights) and not (where & is_given).any()
    assert ((0 <= soft.ids) & (soft.ids < VOCAB)).all() and (soft.weights >= -1e-7).all()
    if config.soften != "slerp":  # which keeps a length, not a sum
        assert ((soft.weights.sum(-1) - 1).abs() < 1e-4).all()
    if config.soften not in ("evolving", "soft-decoded"):  # which show what is decoded, too
        assert (call["sequences"][where] == MASK).all()


def test_canvases(fuzz_seconds):
    fuzz(check, cases(), 80, fuzz_seconds)
