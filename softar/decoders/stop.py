"""Strings at which a discrete answer ends."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from ..config import SoftConfig
from ..tags import Answers
from ..thought import begin, mk_rules


class StopStrings(StoppingCriteria):
    """Ends each row by itself as soon as its answer holds one of the strings; a thought is not
    searched."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: list[str],
        prompt_length: int,
        config: SoftConfig,
        *,
        replay: bool = False,
    ):
        """config: resolved. Where its thought may end at any step (cold stop without think_end) or
        go on behind think_end (switch_budget), rows run on to the budget or to the end: HFLM cuts the
        text at the string anyway. replay: the rows of each call are others, as in a search."""
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.stop = [text for text in stop if text]
        # white space beside a tag ends no answer that has not begun
        self.answer = Answers(config.moves[1], tokenizer, space=False)
        # Tokens that are looked at: no token but the added ones is shorter than a byte
        self.window = max((len(text.encode()) for text in self.stop), default=0) + 2
        self.window += self.answer.reach
        self.config, self.replay = config, replay
        self.thoughts = None  # how far each row's thought is, after the prompt has been read

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        """[B, P + t] -> [B] bool. Asked at every step, from the first on."""
        tokens = input_ids[:, self.prompt_length :]
        starts, width = [0] * len(tokens), input_ids.shape[1]
        # of the prompt what may have begun a tag
        first = max(self.prompt_length - self.answer.reach, width - self.window, 0)
        unread = max(first - self.prompt_length, 0)
        if self.config.switch_budget is not None:
            return torch.zeros(len(tokens), dtype=torch.bool, device=input_ids.device)
        if self.config.has_answer and self.config.hide_thought:
            if self.thoughts is None or self.replay:
                self.thoughts = Thoughts(self.config, input_ids[:, : self.prompt_length])
            self.thoughts.read(tokens)
            starts = (self.thoughts.ends - unread).clamp_min(0).tolist()
        own = max(self.prompt_length - first, 0)
        rows = zip(input_ids[:, first:].tolist(), starts, strict=True)
        tails = (self.answer(row[:own], row[own:], start) for row, start in rows)
        tails = [self.tokenizer.decode(tail) for tail in tails]
        ends = [any(text in tail for text in self.stop) for tail in tails]
        return torch.tensor(ends, device=input_ids.device)


class Thoughts:
    """Where the thoughts of a batch end, told by the tokens alone: `thought.decide` without what
    only the logits say, the cold stop."""

    def __init__(self, config: SoftConfig, prompts: Tensor):
        progress = begin(config, prompts)
        self.rules, self.steps = mk_rules(config, prompts.device, None, None), 0
        self.thinking, self.closed = progress.thinking, progress.closed
        self.lengths = progress.thoughts
        self.ends = progress.answer_start  # [B] steps before the answer; all so far in a thought
        self.start, self.end = progress.spelled.unbind(1)

    def read(self, tokens: Tensor) -> None:
        """The tokens [B, t] of all steps, of which it has read some."""
        for step in range(self.steps, tokens.shape[1]):
            self._step(tokens[:, step])

    def _step(self, token: Tensor) -> None:
        rules, self.steps = self.rules, self.steps + 1
        if rules.end is None and rules.budget is not None:
            over = self.thinking & (self.lengths >= rules.budget)
            self.closed, self.thinking = self.closed | over, self.thinking & ~over
        self.lengths = self.lengths + self.thinking
        self.ends = torch.where(self.thinking, self.steps, self.ends)
        if rules.end is not None:
            self.end, is_whole = rules.end(self.end, token)
            closing = self.thinking & is_whole
            self.closed, self.thinking = self.closed | closing, self.thinking & ~closing
        if rules.start is not None:
            self.start, is_whole = rules.start(self.start, token)
            self.thinking = self.thinking | (is_whole & ~self.closed)


def answer_starts(config: SoftConfig, sequences: Tensor, prompt_length: int) -> list[int]:
    """Of each row [B, P + t] the tokens before its answer, as `softar.generate` counts them where
    nothing is forced; behind a text's end where its thought never ends. config: resolved."""
    if not (config.has_answer and config.hide_thought):
        return [0] * len(sequences)
    thoughts = Thoughts(config, sequences[:, :prompt_length])
    thoughts.read(sequences[:, prompt_length:])
    return thoughts.ends.tolist()


def stops_of(
    tokenizer, stop: list[str], prompt_length: int, config: SoftConfig
) -> list[StoppingCriteria]:
    """For a search: where an answer holds one of the strings."""
    return [StopStrings(tokenizer, stop, prompt_length, config, replay=True)] if stop else []
