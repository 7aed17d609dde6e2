"""The parts of gpu.py that test and train; see gpu_parts.py for what a part is."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_parts import DEVICE, LLADA, SMALL, SMALL_LLADA, Left, Record, build, peak_gb, reset_peak
from transformers import TrainerCallback

HERE = Path(__file__).resolve().parent
SIZE_1B = dict(  # Llama-3.2-1B
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    tie_word_embeddings=True,
)


def gpu_tests(record: Record, is_dry: bool, left: Left) -> None:
    """pytest -m gpu: a row a test, with what the test measured. Exits with pytest's code."""
    import pytest

    class Recorder:
        def pytest_runtest_logreport(self, report):
            if report.when != "call" and report.outcome == "passed":
                return  # what came before and after the test itself went well
            numbers = [
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in report.user_properties
            ]
            row = dict(what=report.nodeid.split("::")[-1], outcome=report.outcome)
            row |= dict(seconds=report.duration, measured=", ".join(numbers))
            record(row | (dict(error=str(report.longrepr)[-2000:]) if report.failed else {}))

    os.environ["SOFTAR_GPU_DRY"] = "1" if is_dry else ""
    tests = HERE.parent / "tests"
    files = [str(tests / name) for name in ("test_gpu.py", "test_gpu_train.py")]
    options = [
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--tb",
        "short",
        "--rootdir",
        str(tests.parent),
    ]
    sys.exit(int(pytest.main([*options, *files], plugins=[Recorder()])))


# -- a step of each trainer


class Clock(TrainerCallback):
    """Seconds of each step, from its first forward to the update."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now() - self.began)


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training(record: Record, is_dry: bool, left: Left) -> None:
    """Seconds and peak memory of a step of each trainer with LoRA; the first step warms up."""
    for what, make in TRAINERS.items():
        if left() < (0 if is_dry else 10):
            break
        reset_peak()
        with tempfile.TemporaryDirectory() as folder:
            trainer, batch, length = make(folder, is_dry)
            clock = Clock()
            trainer.add_callback(clock)
            trainer.train()
        seconds = clock.seconds[1:]
        row = dict(what=what, batch=batch, length=length, seconds=statistics.median(seconds))
        row |= dict(low=min(seconds), high=max(seconds), repeats=len(seconds), peak_gb=peak_gb())
        record(row)
        del trainer


def soft_sft(folder: str, is_dry: bool):
    """Guided soft SFT, two parallel refreshes, of rows whose second half is thought."""
    from softar.sft.config import SoftSFTConfig
    from softar.sft.trainer import SoftSFTTrainer

    model, tokenizer = causal(is_dry)
    batch, length = (2, 16) if is_dry else (4, 512)
    options = common(folder, batch) | dict(max_length=length, alpha_schedule="constant")
    soft = dict(alpha_start=0.3, soft_passes=2, soft_top_k=10, think_steps=length // 2)
    args = SoftSFTConfig(**options, **soft)
    rows = data(8 * batch, length // 4, length - length // 4 - 1)
    return with_lora(SoftSFTTrainer, model, args, tokenizer, train_dataset=rows), batch, length


def grpo(folder: str, is_dry: bool):
    """Soft GRPO, three draws a think step; rollout by softar.generate, replay, update."""
    from softar.rl import SoftGRPOConfig, SoftGRPOTrainer

    model, tokenizer = causal(is_dry)
    batch, length = (2, 6) if is_dry else (8, 64)
    options = dict(num_generations=batch, max_completion_length=length, think_steps=length // 2)
    args = SoftGRPOConfig(**common(folder, batch), **options)

    def reward(completions, **columns):
        return [float(len(set(text.split()))) for text in completions]

    rows = data(8, 4 if is_dry else 64, None)
    trainer = with_lora(
        SoftGRPOTrainer, model, args, tokenizer, reward_funcs=reward, train_dataset=rows
    )
    return trainer, batch, length


def diffusion_sft(folder: str, is_dry: bool):
    """Soft-mask training of a LLaDA, every row read twice."""
    from softar.diffusion.architectures import LladaConfig, LladaForMaskedDiffusion
    from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer

    shape = SMALL_LLADA if is_dry else SIZE_1B | LLADA
    model = build(LladaForMaskedDiffusion, LladaConfig(**shape))
    batch, length = (2, 16) if is_dry else (4, 512)
    args = DiffusionSFTConfig(**common(folder, batch), max_length=length, softmasking_prob=1.0)
    rows = data(8 * batch, length // 4, length - length // 4 - 1)
    tokenizer = words(model.config.vocab_size, mask_token="<mask>")
    trainer = with_lora(DiffusionSFTTrainer, model, args, tokenizer, train_dataset=rows)
    return trainer, batch, length


def causal(is_dry: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SMALL if is_dry else SIZE_1B | dict(vocab_size=128_256)
    return build(LlamaForCausalLM, LlamaConfig(**shape)), words(shape["vocab_size"])


def words(vocab_size: int, **special):
    """One word, one token: <pad>, <bos>, <eos>, w3, w4, ...; a mask token is the last."""
    from softar.models import word_tokenizer

    last = list(special.values())
    plain = [f"w{i}" for i in range(3, vocab_size - len(last))]
    return word_tokenizer(["<pad>", "<bos>", "<eos>", *plain, *last], **special)


def data(rows: int, prompt: int, completion: int | None):
    """Rows of so many words; without a completion, prompts alone."""
    from datasets import Dataset

    def text(row, first, n):
        return " ".join(f"w{3 + (7 * row + first + 11 * i) % 400}" for i in range(n))

    made = [{"prompt": text(row, 0, prompt)} for row in range(rows)]
    if completion is not None:
        for row, columns in enumerate(made):
            columns["completion"] = " " + text(row, 100, completion)
    return Dataset.from_list(made)


def common(folder: str, batch: int) -> dict:
    return dict(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_steps=5,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def with_lora(trainer: type, model, args, tokenizer, **kwargs):
    from peft import LoraConfig

    lora = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return trainer(model=model, args=args, processing_class=tokenizer, peft_config=lora, **kwargs)


# -- the demo


def mnns(record: Record, is_dry: bool, left: Left) -> None:
    """recipes/sft_soft.py for a bounded number of steps; the rows it has finished when the time is
    over."""
    with tempfile.TemporaryDirectory() as folder:
        options = dict(output_dir=folder, rows="trace-soft,discrete,no-cot", jobs=1, seed=42)
        options |= dict(max_steps=MNNS_STEPS, warmup_steps=MNNS_STEPS // 20, save_strategy="no")
        if is_dry:
            options |= dict(rows="trace-soft", max_steps=2, warmup_steps=1, task_size=64)
            options |= dict(eval_rows=4, per_device_train_batch_size=4)
        flags = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        command = [sys.executable, str(HERE / "sft_soft.py"), *flags, "--disable_tqdm", "true"]
        child = subprocess.Popen(command)
        try:
            code = child.wait(timeout=None if is_dry else max(1.0, left()))
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        file = Path(folder, "results.json")
        rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    for row in rows:
        record({"what": row["decoder"]} | row)
    sys.exit(code)


MNNS_STEPS = 800
TRAINERS = {"soft SFT": soft_sft, "soft GRPO": grpo, "diffusion SFT": diffusion_sft}
