"""
How far each path is from what the machine allows, and whether soft is as fast as hard: tokens per second over their
limit, in one run. A table, and in the folder --output speed.json, speed.png and page.html.

Examples:

# This machine's CPU, and its GPU where it has one: minutes on one core
softar speed

# Decoding compiled, too, which takes a minute first; inside vLLM
softar speed --paths decode --caches dynamic static compiled
softar speed --paths vllm

# On a busy machine: processor time, one thread
OMP_NUM_THREADS=1 softar speed --devices cpu --threads 1 --cpu_time

# On a GPU in minutes; then one page of both machines, from what they wrote
python recipes/gpu.py --parts speed --minutes 8
softar speed --rows runs/speed/speed.json runs/gpu/results.json --output runs/both

A limit is counted, not fitted: what a path's forwards have to read (weights, keys and values) over the bandwidth of a
large copy, or their products with the weights (two operations a weight and position, six with the gradient) over the
rate of a large matrix product, whichever takes longer. It is no bound: a copy's rate counts bytes read and written,
and with ordinary stores a CPU also reads the lines it writes over, so that reading can be up to 1.5 times faster.
Copy, product and the paths of a table are taken in turn, so
that what else the machine does hits all alike: shares are of pairs, their median with the lowest and the highest.
Weights are random, in float32 on a CPU and bfloat16 on a GPU: SmolLM2-135M's shape and Qwen3-0.6B's for decoding and
training; for denoising a small net with LLaDA's vocabulary and LLaDA-8B's shape, and small ones that fill block by
block. The first run of each path, which compiles, is not among the repeats.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from softar.checks import check_least, check_writable, one_line_errors
from softar.recipes import bench_cache, speed_limits
from softar.recipes import gpu_parts as parts
from softar.recipes.bench_tools import (
    clock_of,
    console,
    interleaved,
    parser_of,
    run_bench,
    show,
    spread,
    timed,
)
from softar.recipes.speed_limits import Rates, probes, size_of
from softar.recipes.speed_page import cells_of, heading, rates_of, write_page
from softar.recipes.speed_paths import SMOLLM2, TABLES, Table, Timed, dtype_of
from softar.results import device as name_of
from softar.results import write_results
from softar.vllm.machine import on_cpu, require_vllm

PROGRAM = Path(sys.argv[0]).name
LEAST_SECONDS = 60.0  # that a table of the GPU part needs


def vllm(args, device: torch.device) -> list[dict]:
    """As decoding: a prompt at once, then a forward for each token of all requests. The engine runs by
    itself, on all cores that it finds; copy and product are measured before it starts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from softar.recipes import bench_vllm

    n, dtype = max(args.batch), dtype_of(device)
    options = dict(concurrency=n, tokens=args.new_tokens, prompt_tokens=args.prompt)
    options |= dict(repeats=args.repeats, output=args.output, dtype=words_of(dtype))
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--modes", "plugin", "soft", "record"]
    rates = [speed_limits.measured(device, dtype)] * args.repeats
    found = bench_vllm.throughput(bench_vllm.parse(words))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(dtype)
    works = speed_limits.decoding(size_of(model), n, args.prompt, args.new_tokens)
    tokens = n * args.new_tokens
    names = {"plugin": "discrete", "soft": "soft", "record": "soft, with record"}
    paths, seconds = {}, {}
    for row in found:  # which have run already
        name, is_soft = names[row["mode"]], row["mode"] != "plugin"
        paths[name] = Timed(dict, tokens, works, is_soft, names.get(row["over"]))
        seconds[name] = [tokens / speed for speed in row["runs"]]
    table = Table("vllm", f"Inside vLLM, {n} requests", "SmolLM2-135M", device, paths)
    return rows_of(args, table, seconds, rates)


# -- measuring


def measured(args, table: Table) -> list[dict]:
    """Rows of paths that are taken in turn with the machine's copy and product."""
    rulers = probes(table.device, dtype_of(table.device), args.dry_run)
    clock, first, why = clock_of(args), {}, None
    for name, path in [*table.paths.items()]:
        try:
            first[name] = timed(path.run, clock)
        except Exception as error:  # of a compiler's many: the paths beside it go on
            if not path.compiles:
                raise
            why = error
            says = f"{name} is left out: {type(error).__name__}: {error}"
            console.print(says, soft_wrap=True, markup=False)
            del table.paths[name]
    if not table.paths:
        raise RuntimeError(f"{table.title}: nothing compiles here, add --caches static") from why
    runs = {name: ruler.run for name, ruler in rulers.items()}
    for run in runs.values():
        run()
    runs |= {name: path.run for name, path in table.paths.items()}
    seconds = interleaved(runs, args.repeats, warm_up=False, clock=clock)
    amounts = [ruler.amount for ruler in rulers.values()]
    took = zip(*(seconds.pop(name) for name in rulers), strict=True)
    rates = [Rates(*(a / s for a, s in zip(amounts, pair, strict=True))) for pair in took]
    return rows_of(args, table, seconds, rates, first)


def rows_of(args, table: Table, seconds, rates: list[Rates], first=None) -> list[dict]:
    """A row for each path; of a pair of repeats each share and each ratio."""
    middle = Rates(*(spread(values)[0] for values in zip(*rates, strict=True)))
    load, rows = os.getloadavg()[0], []
    for name, took in seconds.items():
        path = table.paths[name]
        shares = [rate.least(path.works) / s for rate, s in zip(rates, took, strict=True)]
        row = dict(bench="speed", kind=table.kind, table=table.title, model=table.model)
        row |= dict(device=name_of(table.device.type), dtype=words_of(dtype_of(table.device)))
        row |= dict(path=name, is_soft=path.is_soft, tokens_per_s=path.tokens / spread(took)[0])
        row |= dict(limit=path.tokens / middle.least(path.works), bound=middle.bound(path.works))
        row |= dict(zip(("share", "share_low", "share_high"), spread(shares)))
        row |= dict.fromkeys(("beside", *RATIO))
        if path.beside in seconds:
            ratios = [a / b for a, b in zip(seconds[path.beside], took, strict=True)]
            row |= dict(zip(("beside", *RATIO), (path.beside, *spread(ratios))))
        row |= dict(read_per_s=middle.read, operations_per_s=middle.operations, seconds=took)
        row |= dict(first_s=first[name] if path.compiles else None, load=load)
        row |= dict(repeats=args.repeats, clock="processor" if args.cpu_time else "wall")
        rows.append(row)
    return rows


def words_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


RATIO = ("ratio", "ratio_low", "ratio_high")
PATHS = (*TABLES, "vllm")


def tables(args) -> Iterator[list[dict]]:
    """The rows of each table, which is printed."""
    for device in map(torch.device, args.devices):
        for name in args.paths:
            if name == "vllm":
                every = [vllm(args, device)] if on_cpu() == (device.type == "cpu") else []
            else:
                every = (measured(args, table) for table in TABLES[name](args, device))
            for rows in every:
                cells = cells_of(rows)
                show(heading(rows[0]), cells, tuple(cells[0]), on=rates_of(rows[0]))
                yield rows


def speeds(args) -> list[dict]:
    """All rows, written after each table: what fails later leaves them."""
    every = []
    for rows in tables(args):
        every += rows
        write_results(Path(args.output) / "speed.json", every)
    return every


def part(record: parts.Record, is_dry: bool, left: parts.Left) -> None:
    """The part of gpu.py: its device's tables, as many as there is time for."""
    args = parse(["--devices", parts.DEVICE.type, *["--dry_run"][:is_dry]])
    for rows in tables(args):
        for row in rows:
            record(dict(what=row["path"]) | row)
        if left() < (0 if is_dry else LEAST_SECONDS):
            break


# -- the program


def parse(argv: list[str] | None = None) -> Namespace:
    devices = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    parser = parser_of(__doc__, repeats=5)
    parser.set_defaults(output="runs/speed")
    parser.add_argument(
        "--paths", choices=PATHS, nargs="+", default=["decode", "denoise", "train"], help="which"
    )
    parser.add_argument(
        "--devices", choices=("cpu", "cuda"), nargs="+", default=devices, help="default: all here"
    )
    parser.add_argument(
        "--caches",
        choices=bench_cache.CACHES,
        nargs="+",
        help="decode: default: all; on a CPU, or without a C compiler, not compiled",
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], help="decode, vllm: rows decoded at once"
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument(
        "--new_tokens", type=int, default=16, help="tokens to decode; denoise: two such blocks"
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="FILE", help="draw the page of these, and measure nothing"
    )
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, to see that it runs")
    if parser.parse_known_args(argv)[0].dry_run:
        parser.set_defaults(batch=[1, 2], prompt=6, new_tokens=4, repeats=2)
    args = parser.parse_args(argv)
    for name in ("paths", "devices", "caches", "batch"):
        values = getattr(args, name)
        setattr(args, name, values and [*dict.fromkeys(values)])
    with one_line_errors(PROGRAM, (ValueError, ImportError, OSError)):
        if args.rows:
            check_rows(args, parser)
        check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def check_rows(args, parser) -> None:
    """Raises ValueError for an option that measures, beside --rows."""
    for name, value in vars(args).items():
        if name not in ("rows", "output") and value != parser.get_default(name):
            raise ValueError(f"--{name} does nothing beside --rows, which measures nothing")


def check(args) -> None:
    """Raises ValueError, or ImportError without vLLM, for what cannot be measured here."""
    check_least(args, prompt=2, new_tokens=2, repeats=1, threads=1)
    check_least(dict(batch=min(args.batch)), batch=1)
    if "cuda" in args.devices and not torch.cuda.is_available():
        raise ValueError("--devices cuda: there is no CUDA device here, leave it out")
    if "cuda" in args.devices and args.cpu_time:
        raise ValueError(
            "--cpu_time: a GPU computes on while its processor waits, add --devices cpu"
        )
    if args.caches and "decode" not in args.paths:
        raise ValueError("--caches is of decoding: add --paths decode, or leave it out")
    if "denoise" in args.paths and args.new_tokens % 2:
        raise ValueError(
            f"new_tokens={args.new_tokens} must be even for --paths denoise: it decides twice as many, "
            "in blocks of 4"
        )
    if "vllm" in args.paths:
        for name in ("cpu_time", "threads", "dry_run"):
            if getattr(args, name):
                raise ValueError(
                    f"--{name} does nothing for an engine of vLLM: leave it out beside --paths vllm"
                )
        require_vllm()
        if (here := "cpu" if on_cpu() else "cuda") not in args.devices:
            raise ValueError(f"--paths vllm: vLLM runs on {here} here, add --devices {here}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = Path(args.output)
    with one_line_errors(PROGRAM):
        check_writable(folder, "output")
    if not args.rows:
        run_bench("speed", speeds, args)
    with one_line_errors(PROGRAM):
        says = {name: each.__doc__ for name, each in (TABLES | {"vllm": vllm}).items()}
        page = write_page(args.rows or [folder / "speed.json"], folder, says)
    console.print(f"written: {page}", soft_wrap=True)


if __name__ == "__main__":
    main()
