# /// script
# dependencies = ["softar"]
# ///
"""
A grid of tasks x decoders x settings x seeds, soft beside baseline; several processes share its runs.

# The demo: the shipped diffusion models on Latin squares and MNNS, four confidence thresholds, soft masks and hard
accelerate launch recipes/sweep.py

# Autoregressive: trained to think softly beside trained on discrete thoughts, over temperatures and seeds
accelerate launch recipes/sweep.py --config recipes/configs/sweep_mnns.yaml

# Any models and options, on two processes (GPUs, or CPUs); every option of `vary` is one of all decoders named
torchrun --standalone --nproc_per_node 2 recipes/sweep.py --tasks reasoning_gym:chain_sum --max_new_tokens 64 \
    --soft Qwen/Qwen2.5-0.5B-Instruct=gumbel:budget=32 --baseline Qwen/Qwen2.5-0.5B-Instruct=sampled \
    --vary temperature=0.3,0.6,1.0 --seeds 0 1 2 --limit 100 --output_dir runs/sweep-qwen

Interrupted, the same command goes on: a run that is whole is not run again. Each leaves runs/NAME/results.json in the
output folder, all of them summary.json, summary.csv and sweep.png. Another grid needs another folder.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from softar.recipe import one_line_errors
from softar.specs import json_or_text, lists_by_key
from softar.training import opt

PROGRAM = "sweep.py"
DEMO = dict(
    tasks=["latin", "mnns"],
    soft=["soft-mask"],
    baseline=["hard"],
    vary=["threshold=0.5,0.7,0.9,0.98"],
)


def many(text: str, *default):
    return field(default_factory=lambda: [*default], metadata={"help": text})


@dataclass
class SweepArguments:
    tasks: list[str] = many(
        "Tasks: latin, mnns, reasoning_gym:NAME, lm_eval:NAME, rows.jsonl:score=number, module:function."
    )
    soft: list[str] = many(
        "Decoders, [MODEL=]NAME[:key=value,key=value]; `softar compare --help` lists the names."
    )
    baseline: list[str] = many("Decoders that those of --soft are compared with, in the same form.")
    vary: list[str] = many(
        "key=value,value: each decoder runs with every combination. In YAML key: [value, value]."
    )
    models: list[str] = many(
        "TASK=MODEL, the model of decoders that name none. Latin squares and MNNS have diffusion models of their own."
    )
    seeds: list[int] = many("Seeds of everything that the decoders draw.", 0)
    limit: int | None = opt(None, "Number of held-out rows of each task. Default: all.")
    max_new_tokens: int | None = opt(
        None, "Number of tokens to generate. Default: what the task says, else the model's default."
    )
    chat: bool | None = opt(
        None, "Use the models' chat templates. Default: of those that have one."
    )
    batch_size: int = opt(256, "Number of rows decoded together.")
    repeats: int = opt(1, "Passes over the rows in each run, for the spread of the times.")
    dtype: str = opt("auto", "Type of the weights: auto (as stored), float32, bfloat16, float16.")
    device: str | None = opt(
        None, "Device of the models. Default: each process's GPU where there is one."
    )
    output_dir: str = opt("runs/sweep", "Folder for the runs, summary and plot of this grid.")


def main(args):
    from accelerate import PartialState
    from rich.console import Console

    from softar.evals.sweep import read_grid, sweep
    from softar.evals.sweep_summary import aggregate, plot_sweep, sweep_table

    with one_line_errors(PROGRAM):
        values = {k: v for k, v in dataclasses.asdict(args).items() if k != "output_dir"}
        values["vary"] = {
            k: [json_or_text(v) for v in vs] for k, vs in mapping("vary", args.vary).items()
        }
        values["models"] = {k: ",".join(vs) for k, vs in mapping("models", args.models).items()}
        rows = sweep(read_grid(values), args.output_dir)
    if rows:
        folder = Path(args.output_dir)
        Console().print(sweep_table(aggregate(rows)))
        print(
            f"results: {folder / 'summary.json'}   table: {folder / 'summary.csv'}   plot: {plot_sweep(folder)}"
        )
    PartialState().destroy_process_group()


def mapping(name: str, items: list[str] | dict) -> dict[str, list]:
    """["key=a,b"], or what YAML says, {"key": ["a", "b"]} -> the latter."""
    if isinstance(items, dict):
        return {k: v if isinstance(v, list) else [v] for k, v in items.items()}
    return lists_by_key(f"{name}=", items)


def with_demo(argv: list[str]) -> list[str]:
    """The demo's grid where none is named."""
    if "--config" in argv[:-1] and not Path(file := argv[argv.index("--config") + 1]).is_file():
        raise ValueError(f"config={file!r}: there is no such file")
    if any(
        arg.split("=")[0] in ("--config", "--tasks", "--soft", "--baseline", "--vary")
        for arg in argv
    ):
        return argv
    return [*(part for name, values in DEMO.items() for part in (f"--{name}", *values)), *argv]


if __name__ == "__main__":
    try:
        with one_line_errors(PROGRAM):
            (args,) = TrlParser(SweepArguments).parse_args_and_config(with_demo(sys.argv[1:]))
        main(args)
    except KeyboardInterrupt:  # sweep has said how to go on
        sys.exit(130)
