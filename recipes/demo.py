# /// script
# dependencies = ["softar"]
# ///
"""The whole picture on a laptop: discrete and soft thought, votes, beams, vLLM, and masked
diffusion beside them, block-causal too.

Examples:

# With the models that the package brings
softar demo --output_dir runs/quick --limit 300
# `make demo` trains three tiny models first and compares those
softar sft --output_dir runs/demo
softar demo --trained runs/demo --output_dir runs/demo

Leaves under --output_dir the folders mnns/, latin/ and latin-prompt/ (results.json, results.csv,
rows.jsonl, plot.png) and page.html, in which every step of a few decodes can be looked at.
"""

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path

from rich.console import Console

from softar.checks import check_least
from softar.recipe import one_line_errors

PROGRAM = Path(sys.argv[0]).name  # demo.py, or softar demo
LENGTH = 6  # tokens of an MNNS answer: three partial sums, the answer, the end, and one to spare
STEPS = (4, 8, 12, 20)  # forwards for the 20 open cells of a Latin square
# the same for 25 cells in five blocks, each of which takes one more that stores what stands before it
BLOCK_STEPS = (10, 15, 20, 25)
VOTES, BEAMS, DRAWS = 8, 4, 3
# decoders whose answer to the first row of each task is on the page
ON_PAGE = (
    "trace-soft",
    "discrete",
    "trace-soft, gumbel",
    "trace-soft, switching",
    "diffusion soft masks, 5",
    "soft masks, 8",
    "hard, 8",
    "soft masks, 15",
)


def thoughts(trained: Path | None, seed: int) -> dict[str, str]:
    """Label -> decoder of the MNNS table. The first is the baseline of the others."""
    from softar.tasks import MODELS

    shipped = MODELS["mnns"]
    models = {"discrete": shipped["discrete"], "trace-soft": shipped["soft"]}
    if trained is not None:
        models = {row: trained / f"{row}-seed{seed}" for row in ("no-cot", *models)}
        if missing := [
            str(folder) for folder in models.values() if not (folder / "config.json").is_file()
        ]:
            raise ValueError(
                f"trained={str(trained)!r}: there is no {missing[0]}; softar sft --rows demo makes it"
            )
    discrete, soft = models["discrete"], models["trace-soft"]
    specs = {"discrete": f"{discrete}=discrete"}
    if trained is not None:
        specs["no-cot"] = f"{models['no-cot']}=discrete"
    if importlib.util.find_spec("vllm") is not None:
        specs["discrete, vLLM"] = f"{discrete}=vllm-greedy"
        specs["trace-soft, vLLM"] = f"{soft}=vllm-soft"
    return (
        specs
        | {
            f"beam search, {BEAMS}": f"{discrete}=beam:num_beams={BEAMS}",
            f"self-consistency, {VOTES}": f"{discrete}=self-consistency:votes={VOTES}",
            "trace-soft": f"{soft}=soft",
            "trace-soft, gumbel": f"{soft}=gumbel",
            "trace-soft, switching": f"{soft}=swi:switch_dwell=1",
            f"trace-soft, {DRAWS} samples": f"{soft}=k-samples:k={DRAWS}",
            f"trace-soft, {BEAMS} soft beams": f"{soft}=soft-beam:num_beams={BEAMS},anchor=0.25",
            f"trace-soft, {2 * BEAMS} beams collapsed": f"{soft}=beam-collapse:num_beams={2 * BEAMS}",
            "trace-soft, read discretely": f"{soft}=discrete",
        }
        | masked("diffusion ", shipped["diffusion"], (1, 2, 5))
    )


def masked(prefix: str, model: str, steps: tuple[int, ...]) -> dict[str, str]:
    """The same for a diffusion model, by number of forwards."""
    names = {"hard": "hard", "soft masks": "soft-mask"}
    return {
        f"{prefix}{name}, {n}": f"{model}={decoder}:steps={n}"
        for name, decoder in names.items()
        for n in steps
    }


def run(args, console: Console) -> None:
    import torch
    from transformers.utils import logging

    from softar.decoders.registry import make_decoder
    from softar.evals.compare import compare
    from softar.show.page import write_page
    from softar.tasks import MODELS, load_task

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # threads only get in each other's way on nets this small
    folder = Path(args.output_dir)
    with one_line_errors(PROGRAM):
        check_least(args, limit=1)
        specs = thoughts(args.trained and Path(args.trained), args.seed)
    squares = masked("", MODELS["latin"]["diffusion"], STEPS)
    blocks = masked("", MODELS["latin-prompt"]["diffusion"], BLOCK_STEPS)
    tables = (
        ("mnns", specs, "discrete", LENGTH),
        ("latin", squares, "hard, 12", 0),
        ("latin-prompt", blocks, "hard, 15", 25),
    )
    traces = []
    for name, decoders, baseline, length in tables:
        task = load_task(name)
        rows = task.test.select(range(min(args.limit or len(task.test), len(task.test))))

        how = dict(max_new_tokens=length, seed=args.seed, extract=task.extract)

        def made(spec: str, how=how, **options):
            return make_decoder(spec, **how, **options)

        comparison = compare(
            {label: made(spec) for label, spec in decoders.items()},
            rows,
            task.score,
            batch_size=500,
            baseline=baseline,
            task=name,
            extract=task.extract,
            console=console,
        )
        comparison.save(folder / name)
        console.print(comparison.table())
        plot = comparison.plot(folder / name / "plot.png", title=name)
        console.print(f"results: {folder / name}   plot: {plot}", soft_wrap=True)
        if comparison.interrupted:
            raise KeyboardInterrupt
        for label in (label for label in ON_PAGE if label in decoders):
            (answer,) = made(decoders[label], trace=True).decode(
                [rows[0]["template" if length == 0 else "prompt"]]
            )
            traces.append(dataclasses.replace(answer.trace, title=f"{name}: {label}"))
    page = write_page(folder / "page.html", traces, title="softar: what the demo's models believed")
    console.print(f"every step of a few decodes: {page}", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trained",
        help="folder that softar sft --rows demo wrote; default: the models of the package",
    )
    parser.add_argument(
        "--output_dir", default="runs/demo", help="folder for tables, plots and page"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        help="seed of the trained rows, and of everything that is drawn",
    )
    parser.add_argument(
        "--limit", type=int, default=None, help="number of held-out rows of each task; default: all"
    )
    try:
        # A pipe has no width of its own
        run(parser.parse_args(), Console(width=None if sys.stdout.isatty() else 100))
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; what was decoded is written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
