# /// script
# dependencies = ["softar"]
# ///
r"""
Latin squares by a block-causal model, by one that reads the whole canvas, and by one that fills the clues' own template
in place, hard and with soft masks.

# Train each kind, hard and with soft masks, five seeds of each, decode the held-out rows, write the table
python recipes/bench_latin.py --output_dir runs/bench_latin

# First one kind, then the other: the table has what is there
python recipes/bench_latin.py --kinds blocks
python recipes/bench_latin.py

# Fewer, and other training: what stands behind -- goes to recipes/sft_diffusion.py
python recipes/bench_latin.py --output_dir runs/short --num_seeds 2 --limit 100 -- --max_steps 200

Interrupted, the same command goes on, and a larger --num_seeds adds seeds. The folder holds decoded.json, a line for
each model and way of decoding, and table.md. Seconds are processor time, for a machine that does other work as well.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from softar.checks import check_choice, check_least, one_line_errors

PROGRAM, HERE = "bench_latin.py", Path(__file__).parent
WHOLE = ("--model_name_or_path", "latin-tiny", "--from_causal", "true", "--shift", "0")
KINDS = {  # the task, how many slots a row has, and what of recipes/configs/latin_prompt.yaml is other
    "blocks": ("latin-prompt", 25, ()),
    "whole": ("latin-prompt", 26, WHOLE),  # reads the end token that training puts behind a square
    "place": ("latin", 20, ("--task", "latin")),
}
ROWS = ("hard", "soft-mask")
BUDGETS = [dict(steps=n) for n in (5, 10, 15, 20, 25)] + [dict(threshold=0.9)]
KEY = ("kind", "training", "decoding", "budget")


def train(kind: str, args, num_seeds: int) -> None:
    """Those of the first seeds that are not trained yet."""
    command = [sys.executable, str(HERE / "sft_diffusion.py")]
    command += ["--config", str(HERE / "configs" / "latin_prompt.yaml"), *KINDS[kind][2]]
    command += ["--rows", ",".join(ROWS), "--seed", str(args.seed), "--num_seeds", str(num_seeds)]
    command += ["--jobs", "1", "--eval_rows", "100", "--resume_from_checkpoint", "true"]
    command += ["--output_dir", str(Path(args.output_dir, kind)), *args.training]
    subprocess.run(command, check=True)


def decode(kind: str, training: str, seed: int, args) -> list[dict]:
    """The held-out rows, decoded in every way."""
    from softar.diffusion import DenoiseConfig, load
    from softar.diffusion.evaluate import evaluate
    from softar.tasks import load_task

    name, slots, _ = KINDS[kind]
    task = load_task(name)
    rows = task.test.select(range(min(args.limit or len(task.test), len(task.test))))
    model, tokenizer = load(Path(args.output_dir, kind, f"{training}-seed{seed}"))
    lines = []
    for decoding in ROWS[: 1 + (training == "soft-mask")]:
        for budget in BUDGETS:
            config = DenoiseConfig(soften="hard" if decoding == "hard" else None, **budget)
            started = time.process_time()
            found = evaluate(model, tokenizer, rows, task.score, config, gen_length=slots)
            found["seconds"] = time.process_time() - started
            named = " ".join(f"{name} {value}" for name, value in budget.items())
            lines.append(
                dict(zip(KEY, (kind, training, decoding, named))) | dict(seed=seed) | found
            )
            print(f"{kind} {training} seed {seed}, {decoding}, {named}: {found['accuracy']:.3f}")
    return lines


def table(lines: list[dict]) -> str:
    """In Markdown, a row for each way over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in KEY), []).append(line)
    out = [
        "| reads | training | decoding | budget | seeds | accuracy | forwards | tokens per forward | "
        "positions | ms a row |",
        "|---" * 10 + "|",
    ]
    for key, group in groups.items():
        mean = {
            name: statistics.fmean(line[name] for line in group)
            for name in ("accuracy", "nfe", "token_forwards", "seconds")
        }
        spread = statistics.stdev(line["accuracy"] for line in group) if len(group) > 1 else 0.0
        cells = [*key, len(group), f"{mean['accuracy']:.3f} ± {spread:.3f}", f"{mean['nfe']:.1f}"]
        cells += [f"{KINDS[key[0]][1] / mean['nfe']:.2f}", f"{mean['token_forwards']:.0f}"]
        cells += [f"{1000 * mean['seconds'] / group[0]['n']:.2f}"]
        out.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(out)


def main(args) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # threads only get in each other's way on nets this small
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "decoded.json"
    lines = json.loads(file.read_text()) if file.is_file() else []
    done = {(line["kind"], line["training"], line["seed"]) for line in lines}
    for seed in range(args.seed, args.seed + args.num_seeds):
        for kind in args.kinds.split(","):
            left = [row for row in ROWS if (kind, row, seed) not in done]
            if left:
                train(kind, args, seed - args.seed + 1)
            for row in left:
                lines += decode(kind, row, seed, args)
                file.write_text(json.dumps(lines, indent=1) + "\n")
    (folder / "table.md").write_text(table(lines) + "\n")
    print(table(lines))


def parse(argv: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", default="runs/bench_latin", help="folder of all it makes")
    parser.add_argument("--seed", type=int, default=42, help="the first seed")
    parser.add_argument("--num_seeds", type=int, default=5, help="how many")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"out of {', '.join(KINDS)}")
    parser.add_argument("--limit", type=int, help="held-out rows to decode; default: all")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.training = argv[cut + 1 :]
    with one_line_errors(PROGRAM):
        check_least(args, seed=0, num_seeds=1, limit=1)
        for kind in args.kinds.split(","):
            check_choice("kinds", kind, KINDS)
    return args


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except subprocess.CalledProcessError as error:  # the recipe has said why
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
