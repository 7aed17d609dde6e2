"""Eight rows in one forward, in accumulated micro-batches, and in two gloo processes are one and the
same step of diffusion SFT. This file is also the program of the processes."""

import os
import sys
from pathlib import Path

import pytest
import torch
import warm
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import QUIET

import softar
from softar.diffusion.convert import convert
from softar.diffusion.models import load
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer

# Plain gradient descent: Adam's first update is the sign of a gradient that may be rounding noise,
# and clipping would hide a gradient of the wrong size.
SGD = dict(
    optim="sgd",
    learning_rate=0.05,
    max_grad_norm=0.0,
    max_steps=2,
    lr_scheduler_type="constant",
    **QUIET,
    eval_decode_rows=0,
    seed=1,
)
SOFT = dict(softmasking_prob=0.5, head_scale=0.3, head_learning_rate=0.05)
UNIFORM = dict(objective="uniform")
GAUSS = dict(curriculum=1.0, tau_start=0.5, tau_end=0.1, gamma_min=-3.0, gamma_max=4.0)
PACKED = dict(packing=True, max_length=24)
CASES = {
    "answer": dict(normalise="answer"),
    "tokens": dict(normalise="tokens"),
    "masks": dict(normalise="masks"),
    "share": dict(normalise="masks", noise="share"),
    "soft answer": dict(normalise="answer", **SOFT),
    "soft masks": dict(normalise="masks", head_algorithm="temperature", **SOFT),
    "uniform answer": dict(normalise="answer", **UNIFORM),
    "uniform tokens": dict(normalise="tokens", **UNIFORM),
    "curriculum": dict(normalise="tokens", **UNIFORM, **GAUSS),
    "on policy": dict(normalise="masks", on_policy_prob=0.5, whole_answer=True),
    "packed soft masks": dict(normalise="masks", antithetic=True, **PACKED, **SOFT),
    "blocks with levels": dict(normalise="tokens", noise_level="block", antithetic=True),
    "blocks, complementary": dict(normalise="masks", noise_level="block", complementary=True),
    "blocks, filled": dict(normalise="tokens", train_padding=True),
    "blocks, packed": dict(normalise="answer", **PACKED),
}


def ragged(n=16):
    """Answers of 1 to 12 tokens."""
    answers = [" ".join(f"S{(row + i) % 7}" for i in range(1 + 5 * row % 12)) for row in range(n)]
    return Dataset.from_list(
        [
            {"prompt": f"<bos> D{row % 10} ->", "completion": f" {a}"}
            for row, a in enumerate(answers)
        ]
    )


def trainer_of(folder, name, rows, accumulated=1, **changes):
    if name.startswith("blocks"):
        model, tokenizer = convert(*softar.load("mnns-tiny", seed=0), block_length=4)
    else:
        model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    batches = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated)
    args = DiffusionSFTConfig(
        output_dir=str(folder / name.replace(" ", "-")), **batches, **SGD, **CASES[name], **changes
    )
    rows = ragged(64 if args.packing else 16)  # two steps of whole batches
    return DiffusionSFTTrainer(
        model, args, train_dataset=rows, eval_dataset=ragged(11), processing_class=tokenizer
    )


def train(folder, name, rows, accumulated=1):
    """-> the weights after two steps, the logged losses, and those of evaluations: the second of two
    processes has three rows of its own at 8 a batch, the others stood before, and none at 11."""
    trainer = trainer_of(folder, name, rows, accumulated)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {key: value.detach() for key, value in trainer.model.named_parameters()}
    for size in (8, 11):
        trainer.args.per_device_eval_batch_size = size
        losses.append(trainer.evaluate()["eval_loss"])
    return weights | {"losses": torch.tensor(losses)}


def same(found, whole):
    assert found.keys() == whole.keys()
    for key in whole:
        torch.testing.assert_close(found[key], whole[key], atol=1e-5, rtol=1e-5, msg=key)


def main(folder):
    for name in CASES:
        found = train(folder, name, 4)
        if os.environ["RANK"] == "0":
            save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{name}.safetensors")
    PartialState().wait_for_everyone()
    # a process that leaves while gloo's threads run may abort
    PartialState().destroy_process_group()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each case with its eight rows in one forward."""
    return {name: train(tmp_path_factory.mktemp("whole"), name, 8) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_accumulated_batches_are_one(tmp_path, whole, name):
    same(train(tmp_path, name, 2, 4), whole[name])


def test_micro_batches_may_be_of_any_size(tmp_path):
    same(train(tmp_path, "soft masks", 3, 2), train(tmp_path, "soft masks", 6))


def test_two_processes_are_one(tmp_path, whole):
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = warm.run(__file__, [tmp_path], env, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in CASES:
        try:
            same(load_file(tmp_path / f"{name}.safetensors"), whole[name])
        except AssertionError as error:
            error.add_note(name)
            raise


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_an_evaluation_is_that_of_all_rows(tmp_path, name):
    losses = [
        trainer_of(tmp_path, name, 8, per_device_eval_batch_size=rows).evaluate()["eval_loss"]
        for rows in (11, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("soft", [{}, SOFT], ids=["hard", "soft"])
def test_a_batch_without_a_mask_counts_nothing(tmp_path, soft):
    """At a rate near 0 hardly a token is masked: no loss, and gradients of 0, not NaN."""
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    args = DiffusionSFTConfig(
        output_dir=str(tmp_path),
        **SGD | soft | dict(noise_eps=1e-6, time_high=0.0, per_device_train_batch_size=8),
    )
    trainer = DiffusionSFTTrainer(model, args, train_dataset=ragged(), processing_class=tokenizer)
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    assert [e["loss"] for e in trainer.state.log_history if "loss" in e] == [0, 0]
    for key, value in trainer.model.named_parameters():
        assert torch.equal(value, before[key]), key
        assert value.grad is None or not value.grad.any()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
