"""What denoise, log_likelihood and diffusion SFT refuse before the first forward, and what cannot
make them go on without an end."""

import math
import re

import pytest
import torch
from datasets import Dataset
from test_block_causal import block_model
from test_denoise import EOS, MASK, PROMPTS, VOCAB, bert, denoiser, run
from tiny import counted, left_padded, seeded, tokenizer_of
from transformers import AutoConfig, AutoModelForMaskedLM, BertModel

from softar.diffusion import DenoiseConfig, denoise, label_probs, load
from softar.diffusion.evaluate import check_steps
from softar.diffusion.losses import log_likelihood
from softar.diffusion.net import READS_PADDING, parts
from softar.diffusion.parity import PARITY
from softar.diffusion.renoised import PARITY as RENOISED
from softar.diffusion.schedules import SCHEDULES
from softar.diffusion.select import SELECTORS
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.diffusion.soften import SOFTENERS
from softar.models import room_of

# -- logits that say nothing

SETTINGS = [
    *(dict(select=name) for name in SELECTORS),
    *(dict(soften=name) for name in SOFTENERS),
    *(dict(cache=name, block_length=4) for name in ("prefix", "dual")),
    *(dict(remask=name, steps=8) for name in ("cap", "rescale", "conf", "loop")),
    *(dict(parity=name) for name in ("llada", "fast_dllm", "evotoken")),
    dict(threshold=0.9),
    dict(factor=1.0),
    dict(entropy_bound=1.0, select="entropy"),
    dict(schedule="pyramid"),
    dict(schedule="ancestral", steps=8),
    dict(schedule="p2"),
    dict(schedule="edit", threshold=0.9),
    dict(schedule="overwrite"),
    dict(schedule="wino", threshold=0.9),
    dict(schedule="refine", threshold=0.9, soften="soft-token"),
    dict(temperature=1.0),
    dict(temperature=1.0, top_k=3, top_p=0.9),
    dict(cfg_scale=1.0),
    dict(ban_eos=True, ends_last=True, early_stop=True, block_length=4),
    dict(alg_temp=1.0),
]


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("at", [0, 2], ids=["always", "once"])
@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_a_forward_that_says_nothing_ends_the_decode(knobs, at, value):
    model, forwards = denoiser(), []

    def silence(module, args, output):
        forwards.append(None)
        assert len(forwards) < 40, "it goes on without an end"
        here = len(forwards) - 1
        return torch.full_like(output, value) if (here == at or (at == 0 and here > 0)) else output

    handle = model.lm_head.register_forward_hook(silence)
    try:
        with pytest.raises(
            FloatingPointError, match=rf"logits of forward {at} are NaN, or -inf.*rows \[0, 1, 2\]"
        ):
            run(model, rng=seeded(), **knobs)
    finally:
        handle.remove()


@pytest.mark.parametrize("row", [0, 2])
def test_the_rows_that_say_nothing_are_named(row):
    model = denoiser()

    def silence(module, args, output):
        output = output.clone()
        output[8 * row + 3] = -math.inf  # of the 8 slots of each row
        return output

    handle = model.lm_head.register_forward_hook(silence)
    try:
        with pytest.raises(FloatingPointError, match=rf"forward 0 .* in rows \[{row}\]"):
            run(model)
    finally:
        handle.remove()


# -- what is given

IDS = torch.tensor([[5, 11, 12]])
BAD_IDS = {
    "bools": (IDS.bool(), r"input_ids of shape \(1, 3\), torch.bool: need \[B, P\] integers"),
    "bytes": (IDS.to(torch.uint8), "torch.uint8: need"),
    "short": (IDS.to(torch.int16), "torch.int16: need"),
    "a list": (IDS.tolist(), "input_ids=.* of type list: give a tensor"),
    "nothing": (None, "input_ids=None of type NoneType: give a tensor"),
    "numpy": (IDS.numpy(), "input_ids=.* of type ndarray: give a tensor"),
    "too large": (
        IDS + VOCAB,
        f"holds the id {12 + VOCAB}, and the model's vocabulary has {VOCAB}",
    ),
    "negative": (IDS - 10, "input_ids holds the id -5"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_ids_that_are_none_are_named(name):
    ids, says = BAD_IDS[name]
    model = denoiser()
    with counted(model.model) as calls:
        with pytest.raises(ValueError, match=says):
            denoise(model, ids, gen_length=4)
        row = ids[0] if name not in ("nothing",) else ids
        with pytest.raises(ValueError, match=says.replace("B, P", "T").replace("1, 3", "3,")):
            log_likelihood(model, row, torch.tensor([False, True, True]))
    assert not calls


@pytest.mark.parametrize("answer", [torch.tensor([0, 1, 1]), [False, True, True], None], ids=str)
def test_an_answer_is_a_mask(answer):
    with pytest.raises(ValueError, match=r"answer of .* must mark tokens .*: give torch.bool"):
        log_likelihood(denoiser(), IDS[0], answer)


@pytest.mark.parametrize("mask", [[[1, 1, 1]], IDS[:, :2]], ids=["a list", "narrow"])
def test_a_mask_is_like_the_ids(mask):
    with pytest.raises(ValueError, match=r"attention_mask of shape .*: give a tensor like it"):
        denoise(denoiser(), IDS, mask, gen_length=4)


@pytest.mark.parametrize("rng", [0, [1], "seed"])
def test_a_generator_is_one(rng):
    with pytest.raises(ValueError, match=r"is no torch.Generator and no list of them"):
        denoise(denoiser(), IDS, gen_length=4, rng=rng)


@pytest.mark.parametrize("parity", [name for name in PARITY if name != RENOISED])
@pytest.mark.parametrize("knobs", [dict(temperature=1.0), dict(select="random")], ids=str)
def test_a_public_sampler_takes_a_generator_for_each_row_or_says_so(parity, knobs):
    """Before the first forward, where its rows share their draws; all of them take one generator."""
    by_blocks, rows = PARITY[parity].blocks, IDS[:1].repeat(2, 1)
    model = block_model() if by_blocks else denoiser()
    knobs = knobs | dict(gen_length=8, parity=parity, block_length=4 if by_blocks else None)
    if parity in ("dream", "dream_threshold"):
        with pytest.raises(ValueError, match=f"parity='{parity}' needs steps="):
            denoise(model, rows, rng=seeded(), **knobs)
        knobs |= dict(steps=8, threshold=0.9)
    denoise(model, rows, rng=seeded(), **knobs)
    with counted(model.model) as calls:
        try:
            denoise(model, rows, rng=[seeded(), seeded(1)], **knobs)
        except ValueError as error:
            assert f"parity={parity!r} draws for all rows at once: give one" in str(error)
            assert not calls


def test_models_that_fill_no_masks_are_named():
    headless = BertModel(bert().config)
    for model, says in (
        (torch.nn.Linear(2, 2), "Linear is no language model of transformers"),
        (headless, "BertModel has no head that predicts tokens"),
    ):
        with pytest.raises(ValueError, match=says):
            denoise(model, IDS, gen_length=4)
        with pytest.raises(ValueError, match=says):
            log_likelihood(model, IDS[0], torch.tensor([False, True, True]))


# -- the positions of a model

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
OTHER_SIZES = {
    "distilbert": dict(dim=16, n_layers=1, n_heads=2, hidden_dim=24),
    "funnel": dict(d_model=16, n_head=2, d_head=8, d_inner=24, block_sizes=[1]),
    "mobilebert": SIZES | dict(true_hidden_size=16, embedding_size=16, intra_bottleneck_size=16),
}
LEARNT = {
    "bert": 20,
    "distilbert": 20,
    "roberta": 18,
    "xlm-roberta": 18,
    "mpnet": 18,
    "nystromformer": 20,
    "yoso": 20,
    "albert": 20,
    "electra": 20,
}


def positioned(kind):
    """A tiny model of a kind, with 20 positions by its configuration."""
    names = OTHER_SIZES.get(kind, SIZES)
    config = AutoConfig.for_model(
        kind, **names, vocab_size=VOCAB, max_position_embeddings=20, pad_token_id=1
    )
    config.mask_token_id = MASK
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(config)
        for p in model.parameters():
            p.data.normal_(0, 0.3)
    if kind != "yoso" and kind != "nystromformer":
        return model.double().eval()
    return model.eval()


@pytest.mark.parametrize("kind", [*LEARNT, "llada", "dream", "convbert"])
def test_a_model_is_used_up_to_its_last_position_and_no_further(kind):
    most = LEARNT.get(kind, 20)
    if kind in ("llada", "dream"):
        model = denoiser(kind, max_position_embeddings=20)
    else:
        model = positioned(kind)
    assert room_of(model, trained=True) == most
    fits = denoise(model, IDS, gen_length=most - 3)
    assert (fits.sequences != MASK).all()
    row, answer = fits.sequences[0], torch.arange(most) >= 3
    assert math.isfinite(log_likelihood(model, row, answer, samples=2))
    with counted(model) as calls:
        with pytest.raises(ValueError, match=f"prompt of 3 .* do not fit .* {most} positions"):
            denoise(model, IDS, gen_length=most - 2)
        with pytest.raises(ValueError, match=f"a row of {most + 1} tokens .* {most} positions"):
            log_likelihood(model, torch.cat([row, row[-1:]]), torch.arange(most + 1) >= 3)
    assert not calls


@pytest.mark.parametrize("block_length", [None, 2, 4])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("text", ["D1 <mask> S0", "D1 S0", "<mask> D1 D2 D3 S0 <mask> S1 S2"])
def test_steps_are_checked_as_they_are_shared(text, steps, block_length):
    """Without a block_length, too: of the masks in a prompt gen_length makes blocks."""
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    how = dict(gen_length=4, steps=steps * (4 // (block_length or 4)), block_length=block_length)
    said = []
    for call in (
        lambda: denoise(model, **tokenizer(text, return_tensors="pt"), **how),
        lambda: check_steps(model, tokenizer, [text], DenoiseConfig(**how)),
    ):
        try:
            said.append(call() and None)
        except ValueError as error:
            said.append(re.match(r"steps=. cannot be shared by the . blocks", str(error))[0])
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", LEARNT)
def test_positions_are_those_that_the_model_counts_itself(kind):
    model = positioned(kind)
    net, ids = parts(model), torch.arange(5, 17)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits
        got = net.body(net.embedding(ids), None, torch.arange(12)[None])
    torch.testing.assert_close(got, own)


@pytest.mark.parametrize("kind", READS_PADDING)
def test_models_that_read_padding_get_rows_of_one_length(kind):
    model = positioned(kind)
    ids, mask = left_padded(PROMPTS)
    with pytest.raises(ValueError, match="reads padding as if it were text"):
        denoise(model, ids, mask, gen_length=4)
    assert denoise(model, ids[:1], mask[:1], gen_length=4).completions.shape == (1, 4)
    filled = torch.cat([ids, torch.full((len(ids), 1), MASK)], 1)
    real = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], 1)
    with pytest.raises(ValueError, match="reads padding as if it were text"):
        label_probs(model, filled, [5, 6], real)
    assert label_probs(model, filled[:1], [5, 6], real[:1]).shape == (1, 2)


@pytest.mark.parametrize("kind", READS_PADDING)
def test_models_that_read_padding_train_on_rows_of_one_length(kind, tmp_path):
    args = dict(output_dir=str(tmp_path), report_to="none", max_steps=1, disable_tqdm=True)
    rows = [{"input_ids": [4, 5, 6, 7][:n], "labels": [4, 5, 6, 7][:n]} for n in (3, 3, 4, 4)]

    def trainer(number, **options):
        config = DiffusionSFTConfig(**args, save_strategy="no", **options)
        data = Dataset.from_list(rows[:number])
        tokenizer = tokenizer_of(VOCAB)
        return DiffusionSFTTrainer(
            positioned(kind).float(), config, train_dataset=data, processing_class=tokenizer
        )

    with pytest.raises(ValueError, match="reads padding as if it were text"):
        trainer(4).train()
    trainer(2).train()
    trainer(4, per_device_train_batch_size=1).train()


def test_labels_are_of_masks_that_are_no_padding():
    ids = torch.tensor([[MASK, 5, MASK], [4, 5, MASK]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="padding holds the mask token"):
        label_probs(denoiser(), ids, [5, 6], mask)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 2\) does not fit"):
        label_probs(denoiser(), ids, [5, 6], mask[:, 1:])


def test_training_stays_within_the_positions_and_the_vocabulary(tmp_path):
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)  # of 64 positions
    args = dict(output_dir=str(tmp_path), report_to="none", max_steps=1, disable_tqdm=True)
    args = DiffusionSFTConfig(**args)

    def trainer(rows):
        return DiffusionSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    def of(length, token=5):
        row = {"input_ids": [1] + [token] * (length - 1), "labels": [-100] + [5] * (length - 1)}
        return [{"input_ids": [1, 5], "labels": [1, 5]}, row]

    rows = Dataset.from_list(of(65))
    with counted(model.model) as calls:
        with pytest.raises(ValueError, match=r"row 1 .* has 65 tokens, .* end at 64: set max_len"):
            trainer(rows)
        with pytest.raises(ValueError, match=r"the data holds the id 900, .* vocabulary has 90"):
            trainer(Dataset.from_list(of(4, token=900)))
        with pytest.raises(ValueError, match="a row of 65 tokens does not fit"):
            trainer(rows.to_iterable_dataset()).train()
        text = Dataset.from_list([{"prompt": "<bos> D1 D1 D1 ->", "completion": " D1"}])
        args.max_length = 3
        with pytest.raises(ValueError, match="max_length=3 leaves no row"):
            trainer(text)
    assert not calls
    args.max_length = 64
    trainer(Dataset.from_list(of(64))).train()


# -- what the caller does meanwhile


def test_a_model_in_training_mode_decodes_without_dropout():
    model = bert(hidden_dropout_prob=0.5)
    answer = torch.tensor([False, True, True])

    def both():
        out = run(model).confidence
        return out, log_likelihood(model, IDS[0], answer, samples=3, rng=seeded())

    calm = both()
    model.train()
    wild = both()
    assert model.training and torch.equal(calm[0].nan_to_num(), wild[0].nan_to_num())
    assert calm[1] == wild[1]


def test_a_model_that_torch_compile_wraps_decodes():
    model, row = denoiser(), torch.tensor([5, 6, 7, 8])
    same = torch.compile(model)
    assert torch.equal(
        denoise(same, IDS, gen_length=4).sequences, denoise(model, IDS, gen_length=4).sequences
    )
    answer = torch.tensor([False, True, True, True])
    likelihoods = [log_likelihood(each, row, answer, rng=seeded()) for each in (model, same)]
    assert likelihoods[0] == likelihoods[1]


def test_a_callback_may_write_into_what_it_is_told():
    def vandal(told):
        for value in told.values():
            if torch.is_tensor(value):
                value.fill_(MASK if value.dtype == torch.int64 else 1)

    for knobs in ({}, dict(soften="evolving"), dict(remask="cap", steps=8), dict(cache="dual")):
        knobs = dict(block_length=4, **knobs)
        left = run(denoiser(), callback=vandal, rng=seeded(), **knobs)
        alone = run(denoiser(), rng=seeded(), **knobs)
        assert torch.equal(left.sequences, alone.sequences)
        assert torch.equal(left.committed_at, alone.committed_at)


def test_no_schedule_of_softar_runs_without_an_end():
    for name in SCHEDULES:
        needs = {
            "threshold": dict(threshold=0.9),
            "dynamic": dict(threshold=0.9),
            "wino": dict(threshold=0.9),
            "edit": dict(threshold=0.9, schedule_args={"editing_threshold": 0.0}),
            "refine": dict(threshold=0.9, soften="soft-mask", schedule_args={"kl": 0.0}),
            "factor": dict(factor=1.0),
            "entropy-bound": dict(entropy_bound=1e-9, select="entropy"),
        }.get(name, {})
        config = DenoiseConfig(gen_length=8, schedule=name, end_ids=(EOS,), **needs)
        held = 16 if name in ("refine", "edit") else 0
        assert denoise(denoiser(), IDS, config=config, rng=seeded()).num_forwards <= 8 + held
