"""
Part of bench.py: what decoders cost, in whole runs and in their steps.

A run of many steps takes what its neighbours on the machine leave it, and a ratio of whole runs is as
uncertain as that. The least time over the repeats of step t is less so, and that of its part outside of
the model, which is all that decoders of the same number of forwards differ in, much less.
"""

import statistics
from collections.abc import Callable

import torch
from torch import nn

import softar
from softar.checks import check_choice
from softar.recipes.bench_tools import clock_of, interleaved, show, spread, synchronise

COLUMNS = (
    "batch",
    "decoder",
    "tokens_per_s",
    "ratio",
    "ratio_low",
    "ratio_high",
    "step_ratio",
    "outside_ms",
)
CHAT = [{"role": "user", "content": "Tell me a long story about a fox and a crane."}]
DECODERS = {  # fields of SoftConfig
    "hard": dict(mixer="hard", top_k=None),
    "soft, top-k 10": dict(top_k=10),
    "gumbel, top-k 10": dict(mixer="gumbel", top_k=10),
    "switching": dict(switch="block", switch_dwell=4),
    "3 samples": dict(mixer="k-samples", top_k=None),
    "hybrid, top-k 10": dict(mixer="hybrid", top_k=10),
    "hidden states": dict(mixer="hidden"),
}
SEARCHES = ("beam", "soft-beam", "beam-collapse")


def fields(name: str, new: int) -> dict:
    """Of SoftConfig; no token ends a thought of hidden states."""
    return DECODERS[name] | (dict(budget=new) if name == "hidden states" else {})


def chosen(args, names) -> list[str]:
    """The first of `names`, which the others are checked against, and those asked for."""
    for name in args.decoders or ():
        check_choice("decoders", name, names)
    return list(dict.fromkeys([next(iter(names)), *(args.decoders or names)]))


def check_names(args) -> None:
    """Raises ValueError for what is no decoder of this bench."""
    if args.bench == "decode":
        check_choice("beside", args.beside, ["model.generate", *chosen(args, DECODERS)])
    elif args.bench == "beams":
        chosen(args, SEARCHES)


def decode(args) -> list[dict]:
    """Tokens/s of softar.generate over those of model.generate(do_sample=False)."""
    names, new = chosen(args, DECODERS), args.new_tokens
    model, tokenizer = softar.load(args.model, dtype=args.dtype)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    configs = {name: softar.SoftConfig(max_new_tokens=new, **fields(name, new)) for name in names}
    rows = []
    for batch in args.batch:
        inputs = tokenizer([text] * batch, return_tensors="pt").to(model.device)

        def hf(inputs=inputs):
            return model.generate(**inputs, do_sample=False, max_new_tokens=new)

        def ours(config, inputs=inputs):
            return softar.generate(model, **inputs, config=config)

        assert torch.equal(hf(), ours(configs["hard"]).sequences), "not model.generate's tokens"
        # a row that ended early would be compared at another length
        for name, config in configs.items():
            assert ours(config).num_forwards == new, f"{name} ended early: take fewer tokens"
        runs = {"model.generate": hf} | {name: (lambda c=c: ours(c)) for name, c in configs.items()}
        rows += compared("decode", model, {args.beside: runs[args.beside]} | runs, batch, args)
    show(f"decoding: tokens/s, and their ratio to {args.beside}", rows, COLUMNS)
    return rows


def beams(args) -> list[dict]:
    """Search overhead: tokens/s of soft beams over those of beam search of the same width."""
    from softar.decoders.beam import BeamDecoder, BeamOptions
    from softar.decoders.beam_collapse import BeamCollapse
    from softar.decoders.search import SearchDecoder
    from softar.decoders.soft_beam import SoftBeam

    names, B = chosen(args, SEARCHES), args.num_beams
    model, tokenizer = softar.load(args.model, dtype=args.dtype)
    model.generation_config.eos_token_id = None  # a search that ended early would be shorter
    config = softar.SoftConfig(max_new_tokens=args.new_tokens)
    decoders = {"beam": BeamDecoder(model, tokenizer, BeamOptions(args.new_tokens, B))}
    for name, search in {"soft-beam": SoftBeam(B), "beam-collapse": BeamCollapse(B)}.items():
        decoders[name] = SearchDecoder(model, tokenizer, config, search)
    rows = []
    for batch in args.batch:
        runs = {
            name: (lambda decoder=decoders[name], batch=batch: decoder.decode([CHAT] * batch))
            for name in names
        }
        rows += compared("beams", model, runs, batch, args)
    show(f"{B} beams: tokens/s, and their ratio to beam search", rows, COLUMNS)
    return rows


def compared(bench: str, model, runs: dict, batch: int, args) -> list[dict]:
    """Tokens per second of each run, and their ratio to those of the first: of whole runs, and of
    their steps, each at its least; and milliseconds of a step outside of the model."""
    steps = Steps(model, clock_of(args))
    watched = {name: steps.watch(name, run) for name, run in runs.items()}
    seconds = interleaved(watched, args.repeats, clock=clock_of(args))
    rows, first = [], next(iter(runs))
    for name, took in seconds.items():
        ratio, low, high = spread(a / b for a, b in zip(seconds[first], took, strict=True))
        rows.append(
            dict(
                bench=bench,
                model=args.model,
                batch=batch,
                new_tokens=args.new_tokens,
                decoder=name,
                tokens_per_s=batch * args.new_tokens / spread(took)[0],
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                outside_ms=1e3 * least(steps.outside[name]),
                step_ratio=least(steps.whole[first]) / least(steps.whole[name]),
                repeats=args.repeats,
                clock="processor" if args.cpu_time else "wall",
            )
        )
    return rows


class Steps:
    """Seconds of each step of each run: from a forward of the model to the next one, so with all
    that a decoder does between them. The first, which reads the prompt, and the last are left out."""

    def __init__(self, model: nn.Module, clock: Callable[[], float]):
        self.model, self.clock = model, clock
        self.whole: dict[str, list[list[float]]] = {}
        # from the head's logits to the next forward
        self.outside: dict[str, list[list[float]]] = {}

    def now(self) -> float:
        """A GPU computes on while its processor goes ahead: waited for, at each reading."""
        synchronise()
        return self.clock()

    def watch(self, name: str, run: Callable[[], object]) -> Callable[[], object]:
        """`run` with its steps timed."""

        def watched():
            starts, ends = [], []
            # some loops call the body and the head one after the other, so neither is in the other
            hooks = [
                self.model.get_decoder().register_forward_pre_hook(
                    lambda *_: starts.append(self.now())
                ),
                self.model.get_output_embeddings().register_forward_hook(
                    lambda *_: ends.append(self.now())
                ),
            ]
            try:
                run()
            finally:
                for hook in hooks:
                    hook.remove()
            assert len(starts) == len(ends), f"{name}: the body and the head ran unlike often"
            steps = list(zip(starts[1:-1], ends[1:-1], starts[2:], strict=True))
            self.whole.setdefault(name, []).append([then - start for start, _, then in steps])
            self.outside.setdefault(name, []).append([then - end for _, end, then in steps])

        return watched


def least(repeats: list[list[float]]) -> float:
    """Seconds of a step, the mean of all, each at its least over the repeats."""
    return statistics.mean(min(step) for step in zip(*repeats, strict=True))
