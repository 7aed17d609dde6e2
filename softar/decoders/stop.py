"""Strings at which a discrete answer ends."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from ..config import SoftConfig
from ..tags import matches


class StopStrings(StoppingCriteria):
    """Ends each row by itself as soon as its answer holds one of the strings; a thought is not
    searched."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: list[str],
        prompt_length: int,
        config: SoftConfig,
    ):
        """config: resolved. Where its thought may end at any step (cold stop without think_end),
        rows run on to the budget or to the end: HFLM cuts the text at the string anyway."""
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.stop = [text for text in stop if text]
        # Tokens that are looked at: no token but the added ones is shorter than a byte
        self.window = max((len(text.encode()) for text in self.stop), default=0) + 2
        self.end = config.moves[1] if config.hide_thought else None
        # step at which an answer without think_end begins
        apart = config.has_answer and config.hide_thought
        self.first = config.budget if apart else 0
        self.starts: dict[int, int] = {}  # row -> step at which its answer begins

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        """[B, P + t] -> [B] bool."""
        tails = map(self._tail, range(len(input_ids)), input_ids[:, self.prompt_length :].tolist())
        ends = [any(text in tail for text in self.stop) for tail in tails]
        return torch.tensor(ends, device=input_ids.device)

    def _tail(self, row: int, tokens: list[int]) -> str:
        """The last few tokens of the answer as text."""
        if self.end is not None:
            if row not in self.starts and len(tokens) - 1 in matches(self.end, tokens):
                self.starts[row] = len(tokens)
            start = self.starts.get(row)
        else:
            start = self.first
        if start is None or start >= len(tokens):
            return ""
        return self.tokenizer.decode(tokens[max(start, len(tokens) - self.window) :])
