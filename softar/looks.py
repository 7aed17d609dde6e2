"""When the host looks at a batch that is decoded on a device, and what it knows of it until then.

A look waits for the device. Between two looks a batch counts as one that may still think, which
costs work and changes nothing: what is chosen stands on the device, and steps after the last row
has ended are dropped.

Shapes: B batch, K tokens kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_least
from .config import SoftConfig
from .mixers import Rng
from .thought import Kind, Progress, Record, check_finite, is_bad

EVERY = 8  # steps from look to look on an accelerator, where nothing needs each


class Flags(NamedTuple):
    """What the host has to know of a batch before its next step."""

    finished: bool  # every row is done
    any_soft: bool  # some row feeds a mixture or a vector
    any_thinking: bool  # some row goes on thinking


class Looks:
    """The looks of one decode.

    Args:
        config: what is decoded.
        any_thinking: of the prompts.
        every: steps from look to look.
    """

    def __init__(self, config: SoftConfig, any_thinking: bool, every: int):
        self.every, self.thinks = every, [any_thinking]  # does somebody, at each step seen
        self.mixes, self.opens = config.is_soft or config.is_latent, config.think_start is not None
        self.waiting: list[tuple[Tensor, Record]] = []
        self.now, self.steps = Flags(False, False, any_thinking), 0

    def __call__(self, flags: Tensor, record: Record, is_last: bool) -> Flags:
        """After a step. flags: of it, `flags_of`. is_last: all rows end with it, whatever they say.

        Raises:
            FloatingPointError: NaN or infinite logits; names the step and the rows.
        """
        self.waiting.append((flags, record))
        if len(self.waiting) < self.every and not is_last:
            soft = self.now.any_thinking and self.mixes
            self.now = Flags(False, soft, self.now.any_thinking or self.opens)
            return self.now
        waiting, records = zip(*self.waiting, strict=True)
        for row, step in zip(torch.stack(waiting).tolist(), records, strict=True):
            any_alive, any_soft, any_thinking, any_bad = row
            if any_bad:
                check_finite(step, self.steps)
            self.now, self.steps = Flags(not any_alive, any_soft, any_thinking), self.steps + 1
            self.thinks.append(any_thinking)
            if self.now.finished:
                break
        self.waiting.clear()
        if is_last:
            self.now = self.now._replace(finished=True)
        return self.now

    def taken(self, records: list[Record], noisy: list) -> tuple[list[Record], list]:
        """The steps until the last row had ended: the record, of one token where nobody thought, and
        what a mixer drew there, if anything."""
        steps = [*zip(records, noisy, self.thinks, strict=False)][: self.steps]
        single = [r._replace(ids=r.ids[:, :1], weights=r.weights[:, :1]) for r, *_ in steps]
        records = [r if thinks else one for (r, _, thinks), one in zip(steps, single, strict=True)]
        return records, [noise if thinks else None for _, noise, thinks in steps]


def need_of_each_step(
    config: SoftConfig,
    rng: Rng,
    callback: Callable | None,
    streamers: list,
    criteria: list,
    gives_cache: bool,
) -> str | None:
    """What has to know each step when it is made; None where the host may look less often. criteria:
    those beside length, time and end tokens. gives_cache: is the cache the caller's?"""
    is_shared = rng is None or isinstance(rng, torch.Generator)
    needs = {
        "callback=": callback is not None,
        "a streamer": bool(streamers),
        f"mixer={config.mixer!r}, whose vectors the host keeps,": config.is_latent,
        "a generator that rows share": config.draws and is_shared,
        "a cache of the caller's, which would keep steps that are dropped,": gives_cache,
        **{type(criterion).__name__: True for criterion in criteria},
    }
    return next((name for name, is_there in needs.items() if is_there), None)


def every_of(asked: int | None, device: torch.device, need: str | None) -> int:
    """Steps from look to look. asked: None is EVERY on an accelerator. need: what needs each step.
    Raises ValueError where more is asked for than that allows."""
    if asked is None:
        return 1 if need or device.type == "cpu" else EVERY
    check_least({"look_every": asked}, look_every=1)
    if asked > 1 and need:
        raise ValueError(f"look_every={asked}: {need} needs every step; leave look_every out")
    return asked


def flags_of(progress: Progress, record: Record) -> Tensor:
    """[4] bool, on the device: is a row alive, does one mix, does one think, is one bad. progress:
    after the step of the record, with the rows done that it ended."""
    alive = ~progress.done
    # int: to a compiler no tensor is equal to a member of an enumeration
    mixes = (record.kind == int(Kind.SOFT)) | (record.kind == int(Kind.LATENT))
    each = [alive, mixes & alive, progress.thinking & alive, is_bad(record)]
    return torch.stack(each).any(1)
