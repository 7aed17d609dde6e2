"""Training of block-causal models: the doubled row against the blocks one by one, and the trainer."""

import pytest
import torch
from test_block_causal import block_model
from test_denoise import MASK
from tiny import QUIET
from torch.utils._python_dispatch import TorchDispatchMode

from softar.diffusion import denoise
from softar.diffusion.convert import convert
from softar.diffusion.doubled import apart, doubled
from softar.diffusion.losses import forward_masked, log_likelihood
from softar.diffusion.models import load
from softar.diffusion.net import facts, parts
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.tasks import load_task


def logits_of_blocks(model, row, noisy, b):
    """[T, V] by the ordinary mask: each block with its noise, behind the row as it is."""
    shift, out = facts(model).shift, []
    for lo in range(0, len(row), b):
        ids = torch.cat([row[:lo], noisy[lo : lo + b]])[None]
        number = torch.arange(ids.shape[1]) // b
        sees = (number[None] <= number[:, None])[None, None]
        logits = model(input_ids=ids, attention_mask=sees).logits[0]
        places = torch.arange(lo, ids.shape[1])
        out.append(logits[(places - shift).clamp_min(0)])
    return torch.cat(out)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("b", [1, 3, 4, 8])
@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_one_forward_says_what_those_of_all_blocks_say(shift, b, side):
    """In float64, of ragged rows; the shifted output before a block is that of its clean prefix."""
    model, rng = block_model(shift, b), torch.Generator().manual_seed(b)
    lengths = torch.tensor([13, 8, 1])
    ids = torch.randint(3, 30, (3, 13), generator=rng)
    real = torch.arange(13) < lengths[:, None]
    real = real.flip(1) if side == "left" else real
    masked = (torch.rand(3, 13, generator=rng) < 0.6) & real
    net, noisy = parts(model), ids.masked_fill(masked, MASK)
    rows, got = forward_masked(net, facts(model), net.embedding(noisy), real, masked, ids)
    want = [
        logits_of_blocks(model, ids[r][real[r]], noisy[r][real[r]], b)[masked[r][real[r]]]
        for r in range(3)
    ]
    assert rows.tolist() == masked.nonzero()[:, 0].tolist()
    torch.testing.assert_close(got, torch.cat(want), atol=1e-9, rtol=0)


@pytest.mark.parametrize("first, last, columns", [(0, 11, 20), (5, 6, 12), (9, 11, 12), (3, 4, 16)])
@torch.no_grad()
def test_what_no_asked_block_sees_is_not_computed(first, last, columns):
    """Blocks of 4, 12 columns: the noisy copy from the first asked block on, the clean one up to the
    last. What is said stays, as of the whole doubled row (the test above has rows of all masks)."""
    model, ids, widths = block_model(0, 4), torch.arange(3, 15)[None], []
    masked = (torch.arange(12) == first) | (torch.arange(12) == last)
    net = parts(model)

    def body(embeds, *args):
        widths.append(embeds.shape[1])
        return net.body(embeds, *args)

    noisy = ids.masked_fill(masked, MASK)
    watched = net._replace(body=body)
    _, got = forward_masked(watched, facts(model), net.embedding(noisy), None, masked[None], ids)
    torch.testing.assert_close(
        got, logits_of_blocks(model, ids[0], noisy[0], 4)[masked], atol=1e-9, rtol=0
    )
    assert widths == [columns]


def test_documents_of_a_row_are_apart():
    """By the rule, token by token."""
    documents, b = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]]), 2
    positions, sees = doubled(documents, b)
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0] * 2]
    T = 8
    for i in range(2 * T):
        for j in range(2 * T):
            clean, other = i >= T, j >= T
            mine, its = (int(positions[0, k]) // b for k in (i, j))
            seen = (mine == its) if not (clean or other) else other and its < mine + clean
            same = documents[0, i % T] == documents[0, j % T] >= 0
            assert bool(sees[0, 0, i, j]) == (bool(same and seen) or i == j), (i, j)


class Largest(TorchDispatchMode):
    """How many bytes the largest tensor has that is made meanwhile."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("make", [lambda d: doubled(d, 32)[1], apart])
def test_no_tensor_is_larger_than_the_mask_that_is_made(make):
    with Largest() as made:
        mask = make(torch.zeros(2, 128, dtype=torch.long))
    assert made.bytes == mask.numel()


def test_the_likelihood_of_a_token_is_what_decoding_says():
    model, ids = block_model(1), torch.tensor([3, 4, 5, 6, 7, 8])
    answer = torch.arange(6) == 5
    out = denoise(model, ids[None, :5], gen_length=1, allowed={-1: [8]}, early_stop=False)
    with torch.no_grad():
        row = ids[None].masked_fill(answer, MASK)
        want = logits_of_blocks(model, ids, row[0], 4)[5].log_softmax(-1)[8]
    assert out.completions.tolist() == [[8]]
    assert log_likelihood(model, ids, answer, samples=1) == pytest.approx(float(want), rel=1e-6)


def trainer_of(folder, **changes):
    import softar

    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        max_steps=4,
        learning_rate=3e-3,
        **QUIET,
        eval_decode_rows=0,
    )
    model, tokenizer = convert(*softar.load("mnns-tiny", seed=0), block_length=4)
    args = DiffusionSFTConfig(**(options | changes))
    rows = load_task("mnns", size=128).train
    return DiffusionSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


def losses_of(trainer):
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


SOFT = dict(softmasking_prob=0.8, head_scale=0.3)


@pytest.mark.parametrize("options", [{}, SOFT, dict(train_padding=True)])
def test_a_model_of_blocks_learns(tmp_path, options):
    trainer = trainer_of(tmp_path, max_steps=15, learning_rate=1e-2, **options)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.9 * before


def test_accumulation_and_resume_change_nothing(tmp_path):
    whole = trainer_of(tmp_path / "whole", **SOFT)
    whole.train()
    parted = trainer_of(
        tmp_path / "parted",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        save_strategy="steps",
        save_steps=2,
        **SOFT,
    )
    parted.train()
    assert losses_of(parted) == pytest.approx(losses_of(whole), rel=1e-3)
    again = trainer_of(
        tmp_path / "parted", per_device_train_batch_size=4, gradient_accumulation_steps=4, **SOFT
    )
    again.train(resume_from_checkpoint=str(tmp_path / "parted" / "checkpoint-2"))
    assert losses_of(again) == losses_of(parted)
    model, _ = load(tmp_path / "parted" / "checkpoint-4")
    assert facts(model).block_length == 4 and facts(model).soft_mask is not None


def test_random_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="objective='uniform' does not go with a model of blocks"):
        trainer_of(tmp_path, objective="uniform", normalise="tokens")
