"""Watches `denoise` and keeps what each forward did: pass a `Tracer` as its callback, then ask for
`canvas(row)`. During the decode tensors are kept and nothing else is done, so that its time is
hardly the tracer's.

Shapes: B rows, P prompt length, L columns of the canvas, K tokens of a mixture.
"""

from torch import Tensor

from softar.show.trace import MANY, TOP, Canvas, Forward, Words
from softar.soft import Soft

from .loop import DenoiseOutput
from .net import Facts

NOTHING = "<any>"  # the word for what stands for a mask where there is none: every token alike


class Tracer:
    """The forwards of every row of one call of `denoise`."""

    def __init__(
        self,
        tokenizer,
        facts: Facts,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        gen_length: int,
        top: int = TOP,
    ):
        """facts: `facts(model)`. input_ids, attention_mask [B, P] and gen_length: as `denoise` gets
        them."""
        self.words, self.mask_id, self.top = Words(tokenizer), facts.mask_id, top
        self.has_mask = facts.mask_id is not None
        if not self.has_mask:  # what softeners mix in its place
            self.mask_id = facts.vocab_size
            self.words.texts[self.mask_id] = NOTHING
        tail = [self.mask_id] * gen_length
        self.start = [row + tail for row in input_ids.tolist()]  # B lists of L ids
        # The column where each row begins: padding is on the left
        self.first = (
            [0] * len(input_ids)
            if attention_mask is None
            else (attention_mask == 0).sum(-1).tolist()
        )
        self.seen: list[dict] = []

    def __call__(self, seen: dict) -> None:
        """Take note of one forward: what `denoise` tells its callback, which it does not write to
        again."""
        soft = seen["soft"]
        # whole distributions, without repeats: too much to keep
        if soft is not None and soft.ids.shape[-1] > MANY:
            weights, order = soft.weights.topk(self.top)
            soft = Soft(soft.ids.gather(-1, order), weights)
        part = {key: seen[key] for key in ("sequences", "committed", "confidence", "where")}
        self.seen.append(part | {"soft": soft})

    def canvas(self, row: int = 0, output: DenoiseOutput | None = None, title: str = "") -> Canvas:
        """What was seen of one row, padding left out. With `denoise`'s output also what was filled
        in behind an end token after the last forward."""
        first, start, forwards = self.first[row], self.start[row], []
        width = self.seen[0]["sequences"].shape[1] if self.seen else len(start)
        start = start + [self.mask_id] * (width - len(start))  # whole canvases may be more
        now = start

        def fill(tokens: list[int]) -> None:
            """Take note of tokens that a rule filled in after the last forward."""
            for column, (token, before) in enumerate(zip(tokens, now, strict=True)):
                if token not in (before, self.mask_id):
                    forwards[-1].committed[column - first] = (self.words[token], None)

        for seen in self.seen:
            tokens, committed, sure = (
                seen[key][row].tolist() for key in ("sequences", "committed", "confidence")
            )
            if not self.has_mask:  # what stands where nothing was decided yet is padding
                is_open = zip(tokens, now, committed, strict=True)
                tokens = [
                    old if old == self.mask_id and not new else token for token, old, new in is_open
                ]
            fill([old if new else token for token, old, new in zip(tokens, now, committed)])
            decided, dropped = {}, []
            for column, token in enumerate(tokens):
                if token == self.mask_id and now[column] != self.mask_id:
                    dropped.append(column - first)
                elif token != self.mask_id and committed[column]:
                    decided[column - first] = (self.words[token], sure[column])
            forwards.append(Forward(decided, self._soft(seen, row), dropped))
            now = tokens
        if output is not None:
            fill(output.sequences[row].tolist())
        cells = [None if token == self.mask_id else self.words[token] for token in start[first:]]
        return Canvas(cells, forwards, title, self.words[self.mask_id])

    def _soft(self, seen: dict, row: int) -> dict:
        """The mixtures of a row by column."""
        if seen["soft"] is None:
            return {}
        rows, columns = seen["where"].nonzero(as_tuple=True)
        ids, weights = (part[rows == row] for part in seen["soft"])
        mixtures = self.words.mixtures(ids, weights, self.top)
        return {
            column - self.first[row]: mixture
            for column, (mixture, _, _) in zip(columns[rows == row].tolist(), mixtures, strict=True)
        }
