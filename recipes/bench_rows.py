"""
Part of bench.py: what soft requests add to a step of vLLM's, measured without vLLM.

softar.vllm.rows does all of it, and wants of vLLM only the columns of a record, which are made here. So it
is driven by logits as the engine would: the rows think, the engine's own sampler is left out, they choose, and
their mixtures go into the next inputs.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from softar import SoftConfig
from softar.recipes.bench_decode import least
from softar.recipes.bench_tools import clock_of, show
from softar.vllm.rows import Rows

V, D, PROMPT = 49_152, 576, 32  # SmolLM2-135M's
COLUMNS = ("rows", "record", "step_ms", "feed_ms")


class Output(SimpleNamespace):
    """vLLM's log-probabilities of a step, which a record is written into."""

    def _replace(self, **fields):
        return Output(**vars(self) | fields)


def rows(args) -> list[dict]:
    """Milliseconds of a step, each at its least over the repeats."""
    found = [measured(n, record, args) for n in (16, 64) for record in (False, True)]
    show(f"soft requests in a step of vLLM's, {V} logits each, without its sampler", found, COLUMNS)
    return found


def measured(n: int, record: bool, args) -> dict:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(V, D, generator=generator)
    logits = torch.randn(n, V, generator=generator)
    repeats = [run(logits, embeddings, record, args) for _ in range(args.repeats)]
    step, feed = (1e3 * least([each[i] for each in repeats]) for i in range(2))
    return dict(
        bench="rows", rows=n, record=record, step_ms=step, feed_ms=feed, repeats=args.repeats
    )


def run(logits: Tensor, embeddings: Tensor, record: bool, args) -> tuple[list[float], list[float]]:
    """-> seconds of each step, thinking and choosing, and of each writing of inputs."""
    n, new, clock = len(logits), args.new_tokens, clock_of(args)
    thinking = Rows(lambda ids: embeddings[ids], torch.device("cpu"), 0)
    names = [str(row) for row in range(n)]
    config = SoftConfig(top_k=10, budget=new, max_new_tokens=new)
    for name in names:
        thinking.add(name, config, [0] * PROMPT, 0, [1], record)
    inputs, tokens = torch.empty(n, D), torch.zeros(n, 1, dtype=torch.long)
    steps, feeds = [], []
    for position in range(PROMPT, PROMPT + new):
        logs = Output(
            logprob_token_ids=torch.zeros(n, 12, dtype=torch.int32),
            logprobs=torch.zeros(n, 12),
            selected_token_ranks=torch.zeros(n, dtype=torch.int32),
        )
        out = SimpleNamespace(sampled_token_ids=tokens, logprobs_tensors=logs)
        started = clock()
        thinking.step(logits, names, [position] * n, [False] * n, lambda out=out: out)
        thought = clock()
        thinking.feed(inputs, names, [position] * n, [1] * n)
        steps.append(thought - started)
        feeds.append(clock() - thought)
    return steps, feeds
