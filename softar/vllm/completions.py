"""What the decoders on vLLM share: how tokens are chosen, what a row costs, which of its
completions counts."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch

from ..checks import check_choice, check_least, check_value, kinds_of
from ..config import SoftConfig
from ..decode import SoftOutput
from ..decoders.answer import Decoded
from ..decoders.votes import commonest, reader
from ..defaults import THINK_TAGS
from ..evaluate import chat_text, prefixed
from ..show.trace import Step, Trace, thought
from ..tags import Answers
from ..thought import Progress, Record, begin, mk_rules, replay, warn_unopened
from .request import parse

# What a mode reads of Sampling, beside its length
MODES = {
    "greedy": ("logprobs",),
    "sampled": ("logprobs", "temperature", "top_p", "top_k"),
    "self-consistency": (
        "logprobs",
        "temperature",
        "top_p",
        "top_k",
        "votes",
        "pattern",
        "extract",
    ),
    "beam": ("logprobs", "num_beams"),
    "soft": ("soft",),
}


@dataclass(frozen=True)
class Sampling:
    """How vLLM chooses tokens."""

    mode: str = "greedy"
    max_new_tokens: int = 64
    temperature: float = 1.0  # of sampled and self-consistency
    top_p: float | None = None
    top_k: int | None = None
    # samples of self-consistency; the commonest answer behind the thoughts wins, of equals the first
    votes: int = 8
    # regular expression: its last match in an answer is what is voted on
    pattern: str | None = None
    # without one: what of an answer is voted on, a Task's; None: all of it
    extract: Callable[[str], str] | None = field(default=None, repr=False)
    num_beams: int = 4
    soft: dict | None = None  # of mode soft: what softar.vllm.plugin takes; the answer is greedy
    prompt_prefix: str | None = None  # as in SoftConfig
    # likeliest tokens whose log-probability is kept, beside that of the token itself
    logprobs: int | None = None

    def __post_init__(self):
        check_choice("mode", self.mode, MODES)
        if (self.mode == "soft") != (self.soft is not None):
            raise ValueError(
                f"mode={self.mode!r}, soft={self.soft!r}: mode 'soft' needs soft=, and no other takes it"
            )
        used = ("max_new_tokens", *MODES[self.mode])  # of others None says nothing
        for name, kind in kinds_of(type(self)).items():
            if (value := getattr(self, name)) is not None or name in used:
                check_value(name, value, kind)
        reader(self.pattern)  # what is no regular expression is said now
        if self.prompt_prefix == "":
            raise ValueError("prompt_prefix='' is empty; None is for none")
        check_least(self, max_new_tokens=1, votes=1, num_beams=1, top_k=1, logprobs=0)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.draws and not 0 < self.temperature <= 2:
            raise ValueError(
                f"temperature={self.temperature} must lie in (0, 2] for vLLM; mode='greedy' is the argmax"
            )

    @property
    def thinking(self) -> SoftConfig | None:
        """The configuration that `soft` asks for, its texts as they are."""
        if self.soft is None:
            return None
        fields = {k: v for k, v in parse(self.soft).items() if k != "record"}
        return SoftConfig(**fields, max_new_tokens=self.max_new_tokens)

    @property
    def draws(self) -> bool:
        return self.mode in ("sampled", "self-consistency")

    @property
    def count(self) -> int:
        """Sequences per prompt."""
        return {"self-consistency": self.votes, "beam": self.num_beams}.get(self.mode, 1)

    @property
    def choice(self) -> dict[str, float]:
        """vLLM's own names and neutral values; greedy and the steps of a beam know no filters."""
        if not self.draws:
            return {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
        return {
            "temperature": self.temperature,
            "top_p": self.top_p or 1.0,
            "top_k": self.top_k or 0,
        }

    @property
    def setting(self) -> str:
        """What tells it from others of its mode."""
        names = {
            "sampled": ["temperature"],
            "self-consistency": ["votes", "temperature"],
            "beam": ["num_beams"],
        }
        filters = ("top_p", "top_k", "pattern")
        filters = [name for name in filters if self.draws and getattr(self, name)]
        names = [*names.get(self.mode, []), *filters]
        return " ".join(f"{name}={getattr(self, name)}" for name in names)

    def cost(self, prompt: int, lengths: list[int]) -> tuple[int, int]:
        """num_forwards and token_forwards of a row: its prompt's length, and those of its
        completions."""
        # one row at first, then one per beam, each with the prompt and all tokens so far
        if self.mode == "beam":
            later = range(1, self.max_new_tokens)
            return self.count * self.max_new_tokens, prompt + self.count * sum(
                prompt + t for t in later
            )
        return sum(lengths), sum(prompt + n - 1 for n in lengths)


@dataclass(frozen=True)
class Completion:
    """One sequence that vLLM gave for a prompt."""

    text: str
    tokens: tuple[int, ...]
    # Per token: id -> log-probability, raw (before temperature and filters); None where not asked
    # for
    logprobs: tuple[dict[int, float], ...] | None
    record: Record | None = None  # [1, T, ...] of mode soft, where a trace is asked for


class CompletionDecoder:
    """What the decoder with an engine here and the one over HTTP share: prompts to ids, completions
    to the row that counts."""

    def __init__(
        self, model: str, sampling: Sampling, *, seed: int, trace: bool, name=None, columns=None
    ):
        self.model, self.sampling, self.trace = model, sampling, trace
        self.rng = random.Random(seed)
        self.tokenizer = None
        # of other modes than soft: how its model's thoughts are told from answers, which a text is
        # then; None: a text is all that was generated
        self.thought: SoftConfig | None = None
        self.stop: tuple[str, ...] = ()  # strings with which an answer ends
        # of the last decode: every vote or beam, with its logprobs
        self.completions: list[list[Completion]] = []
        decoder = f"vllm-{sampling.mode}"
        self.columns = {
            "decoder": decoder,
            "model": model,
            "setting": sampling.setting,
            "family": "vllm",
        } | (columns or {})
        self.name = name or " ".join(filter(None, [decoder, sampling.setting]))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def seeds(self, n: int) -> list[int]:
        """One per prompt, so that what a prompt draws does not depend on its batch; vote i adds i
        to it."""
        return [self.rng.randrange(2**31) for _ in range(n)]

    @property
    def soft(self) -> dict:
        """What is asked of the plug-in. The record is slower than the answer alone."""
        return self.sampling.soft | {"record": self.trace or ends_unseen(self.sampling.soft)}

    @property
    def stop_strings(self) -> list[str]:
        """That vLLM is told. It would search a thought, too, and its beams know none."""
        thinks = self.sampling.soft is not None or self._hides
        return [] if thinks or self.sampling.mode == "beam" else [*self.stop]

    @property
    def _hides(self) -> bool:
        c = self.thought
        return c is not None and c.has_answer and c.hide_thought

    def rows(
        self, prompts: list, ids: list[list[int]], answers: list[list[Completion]], seconds: float
    ) -> list[Decoded]:
        """The row that counts, of each prompt, its token ids and its completions. seconds: of one
        row."""
        starts, moves = [[0] * len(completions) for completions in answers], None
        config = self.sampling.thinking or self.thought
        if prompts and config is not None and config.has_answer:
            config = config.resolve(self.tokenizer)
            pairs = [(row, c) for row, each in zip(ids, answers, strict=True) for c in each]
            progress, moves = followed(config, *zip(*pairs, strict=True)), config.moves[1]
            counts = iter(progress.answer_start.tolist())
            starts = [[next(counts) for _ in completions] for completions in answers]
            if self.sampling.soft is not None and config.think_start is not None:
                warn_unopened(config, progress)
        answer = Answers(moves, self.tokenizer)
        rows = zip(prompts, ids, answers, starts, strict=True)
        return [self._row(*row, answer, seconds) for row in rows]

    def _row(
        self,
        prompt,
        ids: list[int],
        completions: list[Completion],
        starts: list[int],
        answer: Answers,
        seconds: float,
    ) -> Decoded:
        def text_of(c: Completion, start: int) -> str:
            if not start:
                return c.text
            tokens = answer(ids, [*c.tokens], start)
            return self.tokenizer.decode(tokens, skip_special_tokens=True)

        texts, at = [text_of(*pair) for pair in zip(completions, starts, strict=True)], 0
        if self.sampling.mode == "self-consistency":
            read = reader(self.sampling.pattern, self.sampling.extract)
            behind = (behind_thought(c, ids, self.tokenizer) for c in completions)
            at, _ = commonest([read(text) for text in (texts if self._hides else behind)])
        chosen, text, start = completions[at], texts[at], starts[at]
        forwards, positions = self.sampling.cost(len(ids), [len(c.tokens) for c in completions])
        entropy = None if chosen.record is None else float(chosen.record.entropy.mean())
        trace = self._trace(prompt, ids, chosen, start) if self.trace else None
        return Decoded(
            text, chosen.tokens, float(forwards), float(positions), seconds, entropy, trace
        )

    def _trace(self, prompt, ids: list[int], chosen: Completion, start: int) -> Trace:
        tokenizer = self.tokenizer or _Numbers()
        if chosen.record is not None:
            sequence = torch.tensor([[*ids, *chosen.tokens]])
            costs = dict(num_forwards=0, token_forwards=0, seconds=0.0)
            out = SoftOutput(sequence, chosen.record, len(ids), torch.tensor([start]), **costs)
            return thought(out, tokenizer, title=self.name)
        text = (
            prompt
            if isinstance(prompt, str)
            else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        )
        words = [tokenizer.decode([token]) for token in chosen.tokens]
        return Trace(
            text, [Step("hard", word, None, [(word, 1.0)]) for word in words], title=self.name
        )


def behind_thought(completion: Completion, prompt: list[int], tokenizer) -> str:
    """What stands behind the thought, special tokens stripped: "" where that does not end, all of
    the text where there is none. A thought is what stands between two of softar.defaults.THINK_TAGS;
    the prompt's token ids may open it. tokenizer: None looks at the completion's text alone."""
    text, before, special = completion.text, "", ()
    if tokenizer is not None:  # tags may be special tokens, which the text does not have
        text, before = tokenizer.decode(completion.tokens), tokenizer.decode(prompt)
        special = tokenizer.all_special_tokens
    for start, end in THINK_TAGS:
        if end in text:
            answer = text.rpartition(end)[2]
            for token in special:
                answer = answer.replace(token, "")
            return answer
        if start in text or before.rfind(start) > before.rfind(end):
            return ""
    return completion.text


class _Numbers:
    """Stands for a tokenizer where there is none: a text of numbers."""

    def decode(self, ids, **_) -> str:
        return " ".join(str(int(i)) for i in ids)


def ends_unseen(soft: dict) -> bool:
    """Can the answer begin where neither a token nor a count of steps tells? With a budget too, as
    a cold stop just before it begins to put think_end in, which the count would begin anew. A budget
    of switches puts in ends behind which the thought may go on."""
    if soft.get("switch_budget") is not None:
        return True
    is_counted = soft.get("budget") is not None
    return soft.get("cold_stop_entropy") is not None and (
        soft.get("think_end") is None or is_counted
    )


def followed(
    config: SoftConfig, prompts: Sequence[list[int]], rows: Sequence[Completion]
) -> Progress:
    """How far each completion came, by the loop's own rules.

    config: resolved. A cold stop without think_end needs the records.
    """
    width, steps = max(map(len, prompts)), max(len(c.tokens) for c in rows)
    # no token, so that no rule takes padding for one
    ids = torch.full((len(rows), width + steps), -1)
    entropy = torch.full((len(rows), steps), torch.inf)
    for i, (prompt, c) in enumerate(zip(prompts, rows, strict=True)):
        ids[i, width - len(prompt) : width + len(c.tokens)] = torch.tensor([*prompt, *c.tokens])
        if c.record is not None:
            entropy[i, : len(c.tokens)] = c.record.entropy[0]
    progress = begin(config, ids[:, :width])
    if steps == 0:
        return progress
    tokens, nothing = ids[:, width:], torch.zeros(entropy.shape)
    weights = torch.ones((*entropy.shape, 1))
    record = Record(tokens[..., None], weights, tokens, nothing, nothing, entropy)
    lengths = torch.tensor([len(c.tokens) for c in rows])
    rules = mk_rules(config, ids.device, None, None)
    done = torch.arange(steps) >= lengths[:, None]
    return replay(rules, progress, record, done)[0]


def token_ids(tokenizer, prompt, prefix: str | None = None) -> list[int]:
    """Token ids of a prompt, text or chat messages, as softar.evaluate.encode makes them."""
    prompt = prefixed(prompt, prefix)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer(chat_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]


def split_options(options: dict, others: tuple[str, ...]) -> tuple[dict, dict]:
    """The fields of Sampling, and the others. Raises ValueError for what is neither, or has no use
    in the mode."""
    known = [each.name for each in fields(Sampling)]
    if unknown := sorted(set(options) - {*known, *others}):
        raise ValueError(
            f"unknown options {unknown} of a vLLM decoder; known: {sorted({*known, *others})}"
        )
    sampling = {k: v for k, v in options.items() if k in known}
    mode = sampling.get("mode", Sampling.mode)
    if mode in MODES:  # Sampling says what is wrong with another
        # Sampling looks after soft
        used = ("mode", "max_new_tokens", "prompt_prefix", *MODES[mode], "soft")
        if idle := [f"{k}={v!r}" for k, v in sampling.items() if k not in used and v is not None]:
            takes = ", ".join(("max_new_tokens", *MODES[mode]))
            raise ValueError(
                f"{', '.join(idle)}: mode {mode!r} has no use for that; it takes {takes}"
            )
    return sampling, {k: v for k, v in options.items() if k in others}
