"""Slots that allow few tokens, logits processors, and labels looked at without a decode."""

import pytest
import torch
from test_denoise import EOS, HOLED, MASK, PROMPTS, VOCAB, bert, denoiser, run
from tiny import counted, left_padded, seeded
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from softar.diffusion import DenoiseConfig, denoise, label_probs, load
from softar.diffusion.losses import log_likelihood
from softar.diffusion.net import facts, parts
from softar.diffusion.soften import SOFTENERS
from softar.models import origin_of

SETTINGS = [
    *(dict(soften=name) for name in SOFTENERS),
    *(dict(cache=name, block_length=4) for name in ("prefix", "dual")),
    dict(parity="evotoken", block_length=4),  # others may propose the mask itself
    dict(temperature=2.0),
    dict(temperature=2.0, top_k=3, top_p=0.9),
    dict(threshold=0.9),
    dict(schedule="pyramid"),
    dict(remask="cap", remask_args={"eta": 0.5}, steps=12),
    dict(cfg_scale=2.0, alg_temp=1.0),
    dict(select="random"),
]
ALLOWED = {-8: [3], -7: [20, 21], -1: [5, 6, 7], (1, -7): [30], (2, 9): [8, 9]}


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_slots_take_what_they_allow(family, knobs):
    out = run(denoiser(family), rng=seeded(), allowed=ALLOWED, **knobs).sequences
    for row in range(3):
        assert out[row, -8] == 3 and out[row, -1] in (5, 6, 7)
        assert out[row, -7] in ([20, 21] if row != 1 else [30])
    assert out[2, 9] in (8, 9) and (out != MASK).all()


def test_confidences_are_of_what_is_left():
    """So that of a slot with one token is 1, and it is taken first."""
    model, allowed = denoiser(), [20, 21, 22]
    told = []
    out = run(model, PROMPTS[:1], allowed={-8: [3], -4: allowed}, callback=told.append)
    assert out.committed_at[0, -8] == 0 and out.confidence[0, -8] == 1
    ids = torch.tensor([[*PROMPTS[0], *[MASK] * 8]])
    net = parts(model)
    logits = net.head(net.body(net.embedding(ids), None, None))[0, -4, allowed].softmax(-1)
    assert float(told[0]["confidence"][0, -4]) == pytest.approx(float(logits.max()), rel=1e-5)
    probs = label_probs(model, ids, allowed)
    assert probs.shape == (8, 3)
    torch.testing.assert_close(probs[4], logits, rtol=1e-4, atol=1e-6)


def test_padding_without_a_mask_is_no_text():
    model, (ids, mask) = denoiser(pad_token_id=0), left_padded([[*row, MASK] for row in PROMPTS])
    for call in (
        lambda *mask: denoise(model, ids, *mask, gen_length=2),
        lambda *mask: label_probs(model, ids, [5], *mask),
    ):
        with pytest.raises(ValueError, match="begin or end with the pad token 0"):
            call()
        call(mask)
    short = int(mask.sum(1).argmin())
    row, real = ids[short], mask[short].bool()
    with pytest.raises(ValueError, match="the pad token 0, and it would be read as text: cut it o"):
        log_likelihood(model, row, real, samples=2)
    log_likelihood(model, row[real], real[real], samples=2)
    opened, tokenizer = load("mnns-diffusion-tiny")
    assert origin_of(opened).tokenizer is tokenizer  # which names the pad token


def test_slots_that_allow_everything_change_nothing():
    model, every = denoiser(), [i for i in range(VOCAB) if i != MASK]
    for knobs in (dict(temperature=1.0), dict(soften="evolving"), dict(soften="soft-mask")):
        free = run(model, HOLED, rng=seeded(), gen_length=0, **knobs)
        bound = run(model, HOLED, rng=seeded(), gen_length=0, allowed={-1: every}, **knobs)
        assert torch.equal(free.sequences, bound.sequences)


def test_a_row_with_slots_of_its_own_is_the_row_alone():
    allowed = {(r, -2): [10 + r, 20 + r] for r in range(3)}
    both = run(denoiser(), rng=[seeded(r) for r in range(3)], temperature=1.0, allowed=allowed)
    for r, row in enumerate(PROMPTS):
        own = {-2: allowed[(r, -2)]}
        alone = run(denoiser(), [row], rng=[seeded(r)], temperature=1.0, allowed=own)
        assert torch.equal(alone.sequences[0], both.sequences[r, -len(alone.sequences[0]) :])


def test_processors_of_transformers_see_the_rows_of_the_slots():
    model, banned = denoiser(), list(range(20))
    for processor in (
        SuppressTokensLogitsProcessor(banned),
        LogitsProcessorList([SuppressTokensLogitsProcessor(banned)]),
        lambda ids, scores: scores.index_fill(-1, torch.tensor(banned), -torch.inf),
    ):
        out = run(model, logits_processor=processor, soften="soft-mask")
        assert (out.completions >= 20).all()
    seen = []

    def watch(ids, scores):
        seen.append((ids.clone(), scores.shape))
        return scores

    out = run(model, logits_processor=watch, history=True)
    assert torch.equal(out.sequences, run(model).sequences)
    assert seen[0][1] == (24, VOCAB) and torch.equal(seen[0][0][::8], out.states[0])
    run(model, logits_processor=RepetitionPenaltyLogitsProcessor(1.5))
    with pytest.raises(ValueError, match=r"logits_processor=.* must return scores"):
        run(model, logits_processor=lambda ids, scores: scores[0])


def test_a_uniform_state_model_ends_within_what_is_allowed(tmp_path):
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    mask = facts(model).mask_id
    model.config.diffusion_process = {"kind": "uniform", "eps": 1e-3, "left_out": [0, mask]}
    ids = tokenizer(["<bos> D1 D2 ->"], return_tensors="pt")["input_ids"]
    for seed in range(5):
        out = denoise(
            model, ids, gen_length=4, steps=3, allowed={4: [5], -1: [7, 8]}, rng=seeded(seed)
        )
        assert out.completions[0, 0] == 5 and out.completions[0, -1] in (7, 8)
    with pytest.raises(ValueError, match=r"allowed\[4\] holds \[0\]"):
        denoise(model, ids, gen_length=4, allowed={4: [0, 5]})
    with pytest.raises(ValueError, match="it has no masks to look at"):
        label_probs(model, ids, [5])


@pytest.mark.parametrize(
    ("allowed", "says"),
    [
        ([3], r"allowed=\[3\]: give {column: ids}"),
        ({"a": [3]}, "allowed has the slot 'a'"),
        ({(1, 2, 3): [3]}, r"allowed has the slot \(1, 2, 3\)"),
        ({True: [3]}, "allowed has the slot True"),
        ({-1: []}, r"allowed\[-1\]=\[\] must be token ids"),
        ({-1: ["yes"]}, r"allowed\[-1\]=\['yes'\] must be token ids"),
        ({-1: [VOCAB]}, rf"allowed\[-1\] holds \[{VOCAB}\]: give ids below {VOCAB}"),
        ({-1: [MASK]}, rf"allowed\[-1\] holds \[{MASK}\]"),
        ({13: [3]}, "allowed names the slot 13, and the canvas is of 3 rows and 13 columns"),
        ({(3, -1): [3]}, r"allowed names the slot \(3, -1\), and the canvas"),
        ({4: [3]}, "allowed names the slot 4, where there is no mask"),
    ],
)
def test_slots_that_are_none_are_named(allowed, says):
    model = denoiser()
    with counted(model.model) as calls, pytest.raises(ValueError, match=says):
        run(model, allowed=allowed)
    assert not calls


def test_what_does_not_go_together_is_said():
    with pytest.raises(ValueError, match="early_stop=True fills slots"):
        DenoiseConfig(allowed={-1: [3]}, early_stop=True)
    with pytest.raises(ValueError, match="logits_processor='greedy' must be a function"):
        DenoiseConfig(logits_processor="greedy")
    with pytest.raises(FloatingPointError, match="forward 0"):
        run(denoiser(), allowed={-1: [EOS]}, ban_eos=True)


# -- labels


@pytest.mark.parametrize("model", [denoiser(), denoiser("dream"), bert()], ids=type)
def test_labels_of_a_ragged_batch_are_those_of_each_row(model):
    ids, mask = left_padded(HOLED)
    labels = [3, 9, 27, 3]
    probs = label_probs(model, ids, labels, mask)
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
    alone = [label_probs(model, torch.tensor([row]), labels) for row in HOLED]
    torch.testing.assert_close(probs, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_labels_need_masks_and_ids():
    ids = torch.tensor([[5, MASK], [5, 6]])
    with pytest.raises(ValueError, match=r"rows \[1\] hold no mask"):
        label_probs(denoiser(), ids, [3, 4])
    with pytest.raises(ValueError, match=f"labels holds the id {VOCAB}"):
        label_probs(denoiser(), ids[:1], [3, VOCAB])
