"""Watches `denoise` and keeps what each forward did: pass a `Tracer` as its callback, then ask for `canvas(row)`.

Shapes: B rows, P prompt length, L columns of the canvas, K tokens of a mixture.
"""

from torch import Tensor

from softar.trace import TOP, Canvas, Forward, Words

from .loop import DenoiseOutput
from .models import Facts


class Tracer:
    """The forwards of every row of one call of `denoise`, as text."""

    def __init__(
        self,
        tokenizer,
        known: Facts,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        gen_length: int,
        top: int = TOP,
    ):
        """known: `facts(model)`. input_ids, attention_mask [B, P] and gen_length: as `denoise` gets them."""
        self.words, self.mask_id, self.top = Words(tokenizer), known.mask_id, top
        tail = [known.mask_id] * gen_length
        self.start = [row + tail for row in input_ids.tolist()]  # B lists of L ids
        # The column where each row begins: padding is on the left
        self.first = [0] * len(input_ids) if attention_mask is None else (attention_mask == 0).sum(-1).tolist()
        self.now = [list(row) for row in self.start]
        self.forwards: list[list[Forward]] = [[] for _ in self.start]

    def __call__(self, seen: dict) -> None:
        """Take note of one forward: what `denoise` tells its callback."""
        tokens, committed, sure = (seen[key].tolist() for key in ("sequences", "committed", "confidence"))
        soft = self._soft(seen)
        for row, before in enumerate(self.now):
            self._fill(row, [old if new else token for token, old, new in zip(tokens[row], before, committed[row])])
            decided, dropped, first = {}, [], self.first[row]
            for column, token in enumerate(tokens[row]):
                if token == self.mask_id and before[column] != self.mask_id:
                    dropped.append(column - first)
                elif token != self.mask_id and committed[row][column]:
                    decided[column - first] = (self.words[token], sure[row][column])
            self.forwards[row].append(Forward(decided, soft[row], dropped))
        self.now = tokens

    def _fill(self, row: int, tokens: list[int]) -> None:
        """What no forward decided was filled in by a rule, when the last forward had been told of."""
        for column, (token, before) in enumerate(zip(tokens, self.now[row], strict=True)):
            if token not in (before, self.mask_id):
                self.forwards[row][-1].committed[column - self.first[row]] = (self.words[token], None)

    def _soft(self, seen: dict) -> list[dict]:
        """Per row the mixtures by column."""
        out: list[dict] = [{} for _ in self.start]
        if seen["soft"] is None:
            return out
        mixtures = self.words.mixtures(*seen["soft"], self.top)
        for (row, column), (mixture, _, _) in zip(seen["where"].nonzero().tolist(), mixtures, strict=True):
            out[row][column - self.first[row]] = mixture
        return out

    def canvas(self, row: int = 0, output: DenoiseOutput | None = None, title: str = "") -> Canvas:
        """What was seen of one row, padding left out. With `denoise`'s output also what was filled in behind an end
        token after the last forward."""
        if output is not None:
            self._fill(row, output.sequences[row].tolist())
        cells = [None if token == self.mask_id else self.words[token] for token in self.start[row][self.first[row] :]]
        return Canvas(cells, list(self.forwards[row]), title, self.words[self.mask_id])
