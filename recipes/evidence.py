# /// script
# dependencies = ["softar"]
# ///
"""
Does it help? The experiments whose rules stand in RESULTS.md, unit by unit.

# What is left, and how long it will take; nothing is run
python recipes/evidence.py --list

# All that is left of one experiment; interrupted, the same command goes on
python recipes/evidence.py --experiment X1

# A second process takes other seeds; on a GPU, into a folder of its own
python recipes/evidence.py --experiment X3 --seeds 108-115
python recipes/evidence.py --experiment X3 --device cuda --output runs/evidence-gpu

# Before the runs: an arm on a seed that is not of the grid, development rows only
python recipes/evidence.py --experiment X1 --pilot trace-soft-4 --fields '{"max_steps": 50}'
# and the processor time of a step of each arm, from which the numbers of steps follow
python recipes/evidence.py --experiment X1 --calibrate 100

A unit is one arm with one seed: trained, read out, written as one JSON file. It is there whole or not at all, so that
units with a file are done. One whose loss or answers are not finite leaves a file that says so.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from softar.checks import check_choice, check_least, one_line_errors
from softar.progress import duration
from softar.recipe import quiet
from softar.recipes.evidence_units import Unit, Watch, is_not_finite
from softar.results import commit, write_results

ROOT, PROGRAM = Path(__file__).resolve().parent.parent, Path(sys.argv[0]).name
LOGS = "tests/evidence"  # in a checkout
PILOT_SEED = 999  # of none of the grids
ROUNDS = 3


class Experiment(NamedTuple):
    about: str
    module: str  # with SETTINGS, SEEDS and measure(unit) -> the lines of its log


def units_of(name: str, seeds: range | None, device: str) -> list[Unit]:
    """All units, the arms of a seed together."""
    module = importlib.import_module(EXPERIMENTS[name].module)
    some = module.SEEDS if seeds is None else [seed for seed in module.SEEDS if seed in seeds]
    if not some:
        raise ValueError(
            f"seeds={seeds}: {name} has those from {module.SEEDS[0]} to {module.SEEDS[-1]}"
        )
    return [
        Unit(name, setting, options, seed, device)
        for seed in some
        for setting, options in module.SETTINGS.items()
    ]


def file_of(unit: Unit, folder: Path) -> Path:
    return folder / unit.experiment / f"{unit.name}.json"


def run_unit(unit: Unit, folder: Path, made_at: str | None) -> Path:
    """Train and read out a unit, and write its log."""
    measure = importlib.import_module(EXPERIMENTS[unit.experiment].module).measure
    with Watch() as watch:
        try:
            lines = measure(unit)
        except (ArithmeticError, RuntimeError, ValueError) as error:
            if not is_not_finite(error):
                raise
            lines = [dict(setting=unit.setting, seed=unit.seed, failed=str(error))]
    lines[0] |= dict(unit_processor_seconds=watch.processor, unit_seconds=watch.wall)
    file = file_of(unit, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    command = f"python recipes/evidence.py --experiment {unit.experiment} --device {unit.device}"
    return write_results(file, lines, command=command, made_at=made_at)


def seconds_of(units: list[Unit], folder: Path) -> float | None:
    """How long these take, by those of the same settings that are done, else by all; None where none
    is."""
    known: dict[str, list[float]] = {}
    for name in {unit.experiment for unit in units}:
        for file in (folder / name).glob("*.json"):
            first = json.loads(file.read_text(encoding="utf-8"))["rows"][0]
            known.setdefault(first["setting"], []).append(first["unit_seconds"])
    if not known:
        return None
    means = {setting: statistics.fmean(seconds) for setting, seconds in known.items()}
    usual = statistics.fmean(means.values())
    return sum(means.get(unit.setting, usual) for unit in units)


def say_left(name: str, units: list[Unit], folder: Path) -> list[Unit]:
    """Print what is left of an experiment -> it."""
    left = [unit for unit in units if not file_of(unit, folder).exists()]
    seconds = seconds_of(left, folder) if left else 0.0
    time_left = "time not known before the first" if seconds is None else duration(seconds)
    print(
        f"{name}, {EXPERIMENTS[name].about}: {len(left)} of {len(units)} units left, {time_left}",
        flush=True,
    )
    return left


def run(args) -> None:
    with one_line_errors(PROGRAM):
        names = [*EXPERIMENTS] if args.experiment is None else [args.experiment]
        for name in names:
            check_choice("experiment", name, EXPERIMENTS)
        seeds, folder = parse_seeds(args.seeds), Path(args.output)
        check_least({"threads": args.threads, "calibrate": args.calibrate}, threads=1, calibrate=1)
        if args.pilot is not None:
            return pilot(names[0], args)
        if args.calibrate is not None:
            return calibrate(names[0], args)
        units = {name: units_of(name, seeds, args.device) for name in names}
    made_at = commit(besides=LOGS)
    for name in names:
        left = say_left(name, units[name], folder)
        for number, unit in enumerate([] if args.list else left, 1):
            begin = time.perf_counter()
            run_unit(unit, folder, made_at)
            took = duration(time.perf_counter() - begin)
            rest = duration(seconds_of(left[number:], folder) or 0.0)
            print(f"{unit.name}: {took}; {len(left) - number} left, {rest}", flush=True)


def pilot(name: str, args) -> None:
    """One arm on development rows, nothing written: what it came to, as JSON."""
    module = importlib.import_module(EXPERIMENTS[name].module)
    check_choice("pilot", args.pilot, module.SETTINGS)
    fields = json.loads(args.fields)
    how = dict(device=args.device, splits=("dev",), fields=fields)
    options = module.SETTINGS[args.pilot]
    lines = module.measure(Unit(name, args.pilot, options, PILOT_SEED, **how))
    for line in lines:
        shown = {key: value for key, value in line.items() if key not in ("scores", "arguments")}
        print(json.dumps(shown))


def calibrate(name: str, args) -> None:
    """Print the processor time of a step of each setting, those of a round in turn, as JSON."""
    module, rounds = importlib.import_module(EXPERIMENTS[name].module), {}
    fields = {"max_steps": args.calibrate, "warmup_steps": 1}
    for _ in range(ROUNDS):
        for setting, options in module.SETTINGS.items():
            how = dict(device=args.device, splits=(), fields=fields)
            first = module.measure(Unit(name, setting, options, PILOT_SEED, **how))[0]
            rounds.setdefault(setting, []).append(first["processor_seconds"] / args.calibrate)
    for setting, seconds in rounds.items():
        print(json.dumps(dict(setting=setting, ms=[round(1000 * each, 2) for each in seconds])))


def parse_seeds(text: str | None) -> range | None:
    """ "3" or "0-7" """
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first)):
        raise ValueError(f"seeds={text!r}: give one, 3, or a range, 0-7")
    return range(int(first), int(last or first) + 1)


def main(argv: list[str] | None = None) -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", help=f"one of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--seeds", help="only these of the experiment's, 3 or 0-7")
    parser.add_argument("--list", action="store_true", help="say what is left, run nothing")
    parser.add_argument("--output", default=str(ROOT / LOGS), help="folder of the logs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--pilot", metavar="SETTING", help="try this arm on development rows")
    parser.add_argument("--calibrate", type=int, metavar="STEPS", help="time a step of each arm")
    parser.add_argument("--fields", default="{}", help="of a pilot: training arguments, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    quiet(bars=False)
    try:
        run(args)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


EXPERIMENTS = {
    "X1": Experiment("MNNS with 4, 5 and 6 digits", "softar.recipes.evidence_mnns"),
    "X2": Experiment("reachability, a net trained here", "softar.recipes.evidence_reach"),
    "X2-smollm2": Experiment("reachability, SmolLM2-135M", "softar.recipes.evidence_smollm2"),
    "X3": Experiment("Latin squares by masked diffusion", "softar.recipes.evidence_latin"),
    "X4": Experiment("Soft RL on MNNS, 2 x 2", "softar.recipes.evidence_rl"),
    "methods": Experiment("every method on MNNS", "softar.recipes.evidence_methods"),
    "diffusion-rl": Experiment(
        "RL of masked diffusion, Latin squares", "softar.recipes.evidence_diffusion_rl"
    ),
}

if __name__ == "__main__":
    main()
