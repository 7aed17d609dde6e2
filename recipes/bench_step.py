"""
What a decode does around a forward (entropy, filters, mixer, rules of thought, record), as it is and compiled: on
random logits, without a model. A table and a step.json.

# The vocabulary of SmolLM2, one row, softly; and 16 rows of a rollout, which draw
python recipes/bench_step.py

# On a busy machine: processor time, one thread
OMP_NUM_THREADS=1 python recipes/bench_step.py --cpu_time --threads 1 --repeats 9
"""

import functools
import resource
import time

import torch
from transformers import CompileConfig

from softar import SoftConfig
from softar.draws import Draws
from softar.recipes.bench_tools import clock_of, interleaved, parser_of, run_bench, show, spread
from softar.step import compiled, mk_step, separate
from softar.thought import begin, mk_rules

KINDS = {
    "soft, top-k 10": (1, 49_152, dict(top_k=10)),
    "k-samples, three draws": (16, 512, dict(mixer="k-samples", mixer_args={"k": 3}, top_k=None)),
}
COLUMNS = ("rows", "vocabulary", "kind", "us", "compiled_us", "ratio", "ratio_low", "ratio_high")


def spent() -> float:
    """Seconds of processor time so far, a compiler's included."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, who))


@torch.no_grad()
def measured(kind: str, args) -> dict:
    B, V, knobs = KINDS[kind]
    config, device = SoftConfig(**knobs), torch.device("cpu")
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(0)).mul_(3)
    draws = Draws([torch.Generator().manual_seed(row) for row in range(B)], B)
    step = mk_step(config, mk_rules(config, device, None, torch.tensor([0])), (), None, None)
    progress = separate(begin(config, torch.ones(B, 4, dtype=torch.long)))

    def run(step):
        for number in range(args.steps):
            step(progress, logits, logits, functools.partial(draws.at, number), True, None)

    runs = {"us": lambda: run(step), "compiled_us": lambda: run(fast)}
    fast, before = compiled(step, config, CompileConfig()), (spent(), time.perf_counter())
    fast(progress, logits, logits, functools.partial(draws.at, 0), True, None)
    row = dict(compile_s=spent() - before[0], compile_wall_s=time.perf_counter() - before[1])
    took = interleaved(runs, args.repeats, clock=clock_of(args))
    ratio, low, high = spread(b / a for a, b in zip(*took.values(), strict=True))
    us = {name: 1e6 * spread(seconds)[0] / args.steps for name, seconds in took.items()}
    row |= us | dict(bench="step", rows=B, vocabulary=V, kind=kind, repeats=args.repeats)
    return row | dict(ratio=ratio, ratio_low=low, ratio_high=high)


def cost(args) -> list[dict]:
    rows = [measured(kind, args) for kind in args.kinds]
    show("a step around the forward, in microseconds", rows, (*COLUMNS, "compile_s"))
    return rows


def main() -> None:
    parser = parser_of(__doc__, repeats=9)
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS, help="which")
    parser.add_argument("--steps", type=int, default=100, help="steps of a repeat")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    run_bench("step", cost, args)


if __name__ == "__main__":
    main()
