"""What only a GPU shows, training: a step of each trainer in float32 and bfloat16.

Skipped without one; with SOFTAR_GPU_DRY=1 they run on the CPU, as `recipes/gpu.py --dry_run` does.
"""

import pytest
import torch
from datasets import Dataset
from tiny import QUIET, model_of, tokenizer_of

from softar.diffusion import load as load_denoiser
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.rl import SoftGRPOConfig, SoftGRPOTrainer
from softar.sft.config import SoftSFTConfig
from softar.sft.trainer import SoftSFTTrainer

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def options(folder, dtype):
    return dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=1,
        **QUIET,
        learning_rate=1e-2,
        bf16=dtype == torch.bfloat16,
        tf32=False if DEVICE.type == "cuda" else None,  # the reference is computed in float32
    )


def soft_sft(folder, dtype, mixer="soft"):
    words = [" ".join(f"w{5 + (3 * row + i) % 50}" for i in range(8)) for row in range(8)]
    rows = [{"prompt": f"<bos> w{9 + row}", "completion": " " + t} for row, t in enumerate(words)]
    span = dict(think_steps=5, soft_passes=2, soft_top_k=10, soft_mixer=mixer)
    guide = dict(alpha_schedule="constant", alpha_start=0.3)
    args = SoftSFTConfig(**options(folder, dtype), **span, **guide)
    return SoftSFTTrainer(
        model_of(initializer_range=0.1, dtype=dtype),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(),
    )


def gumbel_sft(folder, dtype):
    return soft_sft(folder, dtype, mixer="gumbel")


def grpo(folder, dtype):
    def reward(completions, **columns):
        return [float(len(set(text.split()))) for text in completions]

    span = dict(think_steps=3, think_end="</think>", max_completion_length=8, num_generations=4)
    args = SoftGRPOConfig(**options(folder, dtype), **span)
    rows = Dataset.from_list([{"prompt": f"<bos> w{i}"} for i in range(6, 14)])
    return SoftGRPOTrainer(
        model_of(dtype=dtype), reward, args, rows, processing_class=tokenizer_of()
    )


def diffusion_sft(folder, dtype):
    model, tokenizer = load_denoiser("latin-diffusion-tiny", seed=0, dtype=dtype, device="cpu")
    rows = [
        {"prompt": "<bos>", "completion": "".join(f" {1 + (row + i) % 5}" for i in range(10))}
        for row in range(8)
    ]
    args = DiffusionSFTConfig(**options(folder, dtype), softmasking_prob=1.0)
    return DiffusionSFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


TRAINERS = {
    "soft SFT": soft_sft,
    "soft SFT, gumbel": gumbel_sft,
    "soft GRPO": grpo,
    "diffusion SFT": diffusion_sft,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_trains(name, dtype, tmp_path, record_property):
    trainer = TRAINERS[name](tmp_path, DTYPES[dtype])
    assert trainer.accelerator.device.type == trainer.model.device.type == DEVICE.type
    before = {k: p.detach().clone() for k, p in trainer.model.named_parameters()}
    trainer.train()
    moved = [k for k, p in trainer.model.named_parameters() if not torch.equal(p, before[k])]
    assert len(moved) > len(before) / 2
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    loss = next(entry for entry in trainer.state.log_history if "loss" in entry)["loss"]
    record_property("loss", float(loss))
    assert loss == loss and abs(float(loss)) < 100


@pytest.mark.parametrize("name", TRAINERS)
def test_the_loss_is_that_of_a_cpu(name, tmp_path, record_property):
    """In float32: the same batch, noise and model, moved."""
    trainer = TRAINERS[name](tmp_path, torch.float32)
    trainer.model.train()
    batch = batch_of(trainer)
    there = loss_of(trainer, batch)
    trainer.model.to("cpu")
    batch = {k: v.cpu() if torch.is_tensor(v) else v for k, v in batch.items()}
    here = loss_of(trainer, batch)
    record_property("relative difference", abs(there - here) / max(abs(here), 1e-3))
    assert there == pytest.approx(here, rel=1e-3, abs=1e-5)


def batch_of(trainer):
    if not isinstance(trainer, SoftGRPOTrainer):
        return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)


def loss_of(trainer, batch):
    trainer._micro = 0  # what SFT draws its noise by
    if isinstance(trainer, SoftGRPOTrainer):
        return trainer._compute_loss(trainer.model, batch).item()
    return trainer.compute_loss(trainer.model, dict(batch)).item()
