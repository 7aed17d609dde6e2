"""The commands that run a program of recipes/, which reads its options itself."""

import os
import sys
from importlib import import_module
from typing import NamedTuple

import typer

PACKAGE = "softar.recipes"
# Read when the libraries are imported: no threads that a fork would warn of, no remarks on what TRL
# calls experimental
QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}


class Entry(NamedTuple):
    module: str  # in PACKAGE
    about: str
    examples: list[str]  # its arguments


def add_programs(app: typer.Typer) -> None:
    """For the list of commands; `main` runs them by `run_program`, without typer."""
    for name, entry in PROGRAMS.items():
        examples = "\n".join(f"  softar {name} {words}".rstrip() for words in entry.examples)

        def command(context: typer.Context, name: str = name) -> None:
            run_program(name, context.args)

        app.command(
            name,
            help=f"{entry.about}\n\n\b\nExamples:\n{examples}",
            add_help_option=False,
            rich_help_panel="Training" if name in TRAINING else None,
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(command)


def run_program(name: str, argv: list[str]) -> None:
    """To its end, or to its SystemExit. What it says and writes names the command, not a file."""
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    sys.argv = [f"softar {name}", *argv]
    module = import_module(f"{PACKAGE}.{PROGRAMS[name].module}")
    if name in TRAINING:
        from ..launch import Program
        from ..recipe import run

        run(module.RECIPE, Program(f"softar {name}", ["-m", "softar.cli.app", name]))
    else:
        module.main()


TRAINING = {
    "sft": Entry(
        "sft_soft",
        "Train a causal language model to think in its own mixtures of tokens.",
        [
            "",
            "--model_name_or_path smollm2-135m --dataset_name my/rows.jsonl --think_end '</think>'",
            "--rows all --num_seeds 5 --num_processes 2",
        ],
    ),
    "diffusion-sft": Entry(
        "sft_diffusion",
        "Train a masked-diffusion model, hard or with soft masks.",
        ["", "--task mnns", "--model_name_or_path my/bert --dataset_name my/rows.jsonl"],
    ),
    "grpo": Entry(
        "grpo_soft",
        "Train a policy that thinks softly by GRPO.",
        ["", "--rows soft,hard --num_seeds 3"],
    ),
    "diffusion-grpo": Entry(
        "grpo_diffusion",
        "Train a policy that fills masks, hard or soft, by GRPO.",
        ["", "--rows soft-mask --num_seeds 3"],
    ),
    "ppo": Entry("ppo_soft", "The same by PPO.", ["", "--rows soft,hard --num_seeds 3"]),
    "rloo": Entry("rloo_soft", "The same by RLOO.", ["", "--rows soft,hard --num_seeds 3"]),
}
PROGRAMS = TRAINING | {
    "demo": Entry(
        "demo",
        "Compare every way of decoding on both tasks, with plots and a page of beliefs.",
        ["--limit 100 --output_dir runs/quick"],
    ),
    "bench": Entry("bench", "Measure speed and memory.", ["decode --model smollm2-135m", "memory"]),
    "speed": Entry(
        "speed",
        "Measure how far each path is from what the machine allows, and draw a page.",
        ["", "--paths decode --caches dynamic static compiled"],
    ),
    "estimate": Entry(
        "estimate",
        "Compute what a model takes on GPUs, on paper: memory, tokens per second, seconds a step.",
        ["", "--model Qwen/Qwen3-32B --gpu a100 --gpus 4", "--measure smollm2-135m"],
    ),
}
