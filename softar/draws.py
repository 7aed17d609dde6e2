"""Random numbers of a batch of rows, which draw the same alone and together."""

from collections.abc import Iterable

import numpy as np
import torch

from .mixers import Rng

# What a random number is drawn for: a row's thought and its answer do not share one
THOUGHT, ANSWER = range(2)


def generators(rows: Iterable[int], *key: int) -> list[torch.Generator]:
    """A CPU generator for each row by its number, whoever decodes it and beside which others. key: what
    else the draws depend on, a seed say."""
    seeds = (np.random.SeedSequence([*key, row]) for row in rows)
    return [
        torch.Generator().manual_seed(int(s.generate_state(1, np.uint64)[0] >> 1)) for s in seeds
    ]


class RowDraws:
    """A row's random numbers, by (step, purpose): neither its neighbours nor what they do (thinking
    longer, say) change them.

    generator: gives the seed, and is used no further.
    """

    def __init__(self, generator: torch.Generator):
        self.seed = int(torch.randint(2**48, (), generator=generator, device=generator.device))
        self.generator = torch.Generator(generator.device)

    def at(self, step: int, purpose: int) -> torch.Generator:
        return self.generator.manual_seed(self.seed + 2 * step + purpose)


class Draws:
    """Random numbers of a batch: rows with generators of their own draw by (row, step, purpose),
    others share one as it comes."""

    def __init__(self, rng: Rng, rows: int):
        self.shared, self.rows = rng, None
        if rng is not None and not isinstance(rng, torch.Generator):
            if len(rng) != rows:
                raise ValueError(
                    f"rng holds {len(rng)} generators for {rows} rows: pass one per row, or a single one"
                )
            self.rows = [RowDraws(generator) for generator in rng]

    def at(self, step: int, purpose: int) -> Rng:
        if self.rows is None:
            return self.shared
        return [row.at(step, purpose) for row in self.rows]
