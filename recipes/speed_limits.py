"""What a machine allows: how long forwards take at least, by what they have to read and to compute.

Two rates are measured on the device itself: bytes read and written by a large copy, and operations of
a large matrix product, both of random numbers. A forward takes at least as long as reading its weights
and the keys and values that it attends to at the one rate, and as its products with the weights at the
other, whichever is longer. Attention, norms, filters and draws are left out, so a path seldom reaches
all of its limit. But the limit is no bound: a copy's rate counts what is read and what is written, and
with ordinary stores a CPU also reads the lines that it writes over, so real reading can be up to 1.5
times faster; and what stays in a processor's cache is read faster still.
"""

import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from softar.recipes.bench_tools import timed

REPEATS = 10


class Work(NamedTuple):
    """What forwards have to do, each, and how many of them there are."""

    read: float  # bytes
    operations: float
    times: float = 1


class Rates(NamedTuple):
    """What a device does in a second."""

    read: float  # bytes
    operations: float

    def least(self, works: Iterable[Work]) -> float:
        """Seconds that these forwards take at least, one after the other."""
        return sum(
            work.times * max(work.read / self.read, work.operations / self.operations)
            for work in works
        )

    def bound(self, works: Iterable[Work]) -> str:
        """What most of that time goes into, "reading" or "computing"."""
        reading = [w for w in works if w.read / self.read >= w.operations / self.operations]
        return "reading" if 2 * self.least(reading) >= self.least(works) else "computing"


class Size(NamedTuple):
    """Of a dense decoder, or one that fills masks: its weights, as numbers."""

    body: int  # that each position is multiplied with
    head: int  # that each position whose logits are asked for is multiplied with
    bytes: int  # of a number
    per_key: float  # bytes of the keys and values of a position, in all layers

    def forward(self, positions: float, asked: float, keys: float = 0, times: float = 1) -> Work:
        """Of so many positions, of which logits are asked of some, after so many others in caches: two
        operations a weight. Of an input embedding that is no head a forward reads a few rows."""
        read = self.bytes * (self.body + self.head * (asked > 0)) + keys * self.per_key
        return Work(read, 2 * (positions * self.body + asked * self.head), times)


def size_of(model) -> Size:
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    apart = (head, embedding)
    # what is no matrix, norms and biases, is multiplied with nothing
    body = [p for p in model.parameters() if p.dim() > 1 and not any(p is each for each in apart)]
    c, width = model.config, model.dtype.itemsize
    per_key = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width
    return Size(sum(p.numel() for p in body), head.numel(), width, per_key)


def decoding(size: Size, batch: int, prompt: int, new: int) -> list[Work]:
    """Of a decode token by token over a cache: the prompts once, then a step for each further token."""
    steps = size.forward(batch, batch, keys=batch * (prompt + new / 2), times=new - 1)
    return [size.forward(batch * prompt, batch), steps]


def denoising(size: Size, out, block: int, new: int) -> list[Work]:
    """Of a DenoiseOutput that decided one token of `new` in each forward of a row, block by block: the
    logits of all masks of a block are asked for, the positions are those that its cache leaves."""
    asked = len(out.sequences) * new * (block + 1) / 2
    positions, deciding = (
        out.token_forwards / out.num_forwards,
        out.num_forwards - out.store_forwards,
    )
    stores = size.forward(positions, 0, times=out.store_forwards)
    return [size.forward(positions, asked / deciding, times=deciding), stores]


def training(size: Size, positions: int) -> list[Work]:
    """Of so many positions in all passes, forward and backward: three times a forward's operations, and
    weights that are read twice and whose gradient is written."""
    forward = size.forward(positions, positions)
    return [Work(3 * forward.read, 3 * forward.operations)]


class Probe(NamedTuple):
    amount: float  # bytes, or operations
    run: Callable[[], object]


def probes(device: torch.device, dtype: torch.dtype, is_dry: bool = False) -> dict[str, Probe]:
    """What the rates are measured by, a tenth of a second each or so; only the time is not yet taken."""
    is_gpu = device.type == "cuda"
    size, n, times = (2**31, 8192, 20) if is_gpu else (2**28, 2048, 1)
    if is_dry:
        size, n = 2**20, 128
    block = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return {
        "copy": Probe(2 * size * times, lambda: [target.copy_(block) for _ in range(times)]),
        "product": Probe(2 * n**3 * times, lambda: [a @ b for _ in range(times)]),
    }


def measured(device: torch.device, dtype: torch.dtype, is_dry: bool = False) -> Rates:
    """The rates, medians of a few repeats."""
    rates = []
    for probe in probes(device, dtype, is_dry).values():
        probe.run()
        rates.append(probe.amount / statistics.median(timed(probe.run) for _ in range(REPEATS)))
    return Rates(*rates)


def said(rates: Rates) -> str:
    return (
        f"{rates.read / 1e9:.4g} GB/s of a copy, {rates.operations / 1e9:.4g} GFLOP/s of a product"
    )
