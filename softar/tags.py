"""How tokens spell a tag such as </think>: as its own ids, or as a text that the tokenizer cuts in
other ways beside other text (".</" and "think" and ">\n\n").

A tag is an automaton over tokens. Its state says how much of the tag the last tokens have spelled;
`moves` are the steps that do not lead to state 0. So a decode follows it on its device, without
waiting, and vLLM's workers need no tokenizer.

Shapes: B batch, P prompt length, M moves."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# (state, token, next state); where the tag is whole, plus WHOLE, and once more for each character
# of the token that stands behind the tag
Moves = tuple[tuple[int, int, int], ...]
WHOLE = 2**20
SHIFT = 2**40  # beyond any token
KINDS = {"BPE", "Unigram"}  # tokenizers whose tokens stand one behind the other
WHITE = [c for c in map(chr, range(0x3001)) if c.isspace()]  # white space, U+3000 the last of it
SPACES = {"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"}  # how vocabularies write most of it
FALLBACKS = {f"<0x{ord(c):02X}>" for c in WHITE if c.isascii()}


def ids_of_text(tokenizer, name: str, text: str) -> tuple[int, ...]:
    """The tokens of a text that a field of a configuration, `name`, gives. Raises ValueError without a
    tokenizer, and for a text that it cannot read."""
    if tokenizer is None:
        raise ValueError(f"{name}={text!r} is text: pass tokenizer=, or its token ids")
    try:
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # tokenizers raises no class of its own
        raise ValueError(
            f"{name}={text!r} cannot be read by the tokenizer ({error}): give words of its "
            "vocabulary, or token ids"
        ) from error
    if not ids:
        raise ValueError(f"{name}={text!r} is empty for this tokenizer")
    return ids


def moves_of_ids(ids: tuple[int, ...]) -> Moves:
    """Of a tag that is these ids and no others (Knuth, Morris, Pratt 1977)."""
    moves = []
    for state in range(len(ids)):
        for token in dict.fromkeys(ids):
            step = _step(ids[:state], (token,), ids)
            moves += [(state, token, step)] if step else []
    return tuple(moves)


@functools.lru_cache(maxsize=8)
def _moves_of_text(tokenizer, size: int, text: str) -> Moves:
    moves, n = [], len(text)
    for piece, token in tokenizer.get_vocab().items():
        piece = _unmarked(piece)
        # begins the tag, or goes on with it: nothing else leads anywhere
        if text[0] not in piece and not any(
            piece == text[k : k + len(piece)] or piece.startswith(text[k:]) for k in range(1, n)
        ):
            continue
        for state in range(n):
            if step := _step(text[:state], piece, text):
                moves.append((state, token, step))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tuple(sorted(moves)) if scan(moves, [ids])[0] == [len(ids) - 1] else ()


def moves_of_text(tokenizer, text: str) -> Moves:
    """Of a tag that is this text, whatever tokens spell it; none where tokens do not simply stand
    one behind the other, or where the text is an added token, which nothing merges with."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    is_joined = tokenizer.is_fast and KINDS >= {type(tokenizer.backend_tokenizer.model).__name__}
    if text in added or not is_joined:
        return ()
    return _moves_of_text(tokenizer, len(tokenizer), text)


def blanks(tokenizer) -> tuple[int, ...]:
    """The tokens of white space, which a chat template may put behind a thought that it closes."""
    return _blanks(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _blanks(tokenizer, size: int) -> tuple[int, ...]:
    # to decode a whole vocabulary takes seconds: only what may be white space
    letters = {*SPACES, *WHITE, *_byte_letters("".join(WHITE).encode())}
    vocab = tokenizer.get_vocab().items()
    may_be = [i for piece, i in vocab if piece in FALLBACKS or letters.issuperset(piece)]
    return tuple(sorted(i for i in may_be if not tokenizer.decode([i]).strip()))


def _byte_letters(text: bytes) -> set[str]:
    """How byte-level vocabularies write these bytes: GPT-2's letters, a printable one as it is."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte if byte in plain else 0x100 + others.index(byte)) for byte in text}


def _unmarked(piece: str) -> str:
    """A piece of a vocabulary with its marks as the white space that they write."""
    for mark, space in SPACES.items():
        piece = piece.replace(mark, space)
    return piece


def _step(done, piece, tag) -> int:
    """From the part of the tag that is done, by one token's piece. All three are texts, or tuples of
    ids."""
    whole, n = done + piece, len(tag)
    rest = next(
        k for k in range(min(n - 1, len(whole)), -1, -1) if whole[len(whole) - k :] == tag[:k]
    )
    ends = range(max(n, len(done) + 1), len(whole) + 1)
    behind = next((len(whole) - end for end in ends if whole[end - n : end] == tag), -1)
    return rest + WHOLE * (1 + behind)


def matches(moves: Iterable[tuple[int, int, int]], row: Iterable[int]) -> list[int]:
    """Columns of a row of tokens at which the tag is whole."""
    table, state, found = {(s, t): n for s, t, n in moves}, 0, []
    for column, token in enumerate(row):
        state = table.get((state, token), 0)
        if state >= WHOLE:
            found.append(column)
            state %= WHOLE
    return found


class Answers:
    """The answers of a tokenizer's rows, as tokens whose text they are. The token that closes the tag
    may hold their beginning: in "</", "think", ">-", "5" it is "-", which no token of the row is."""

    def __init__(self, moves: Moves | None, tokenizer, *, space: bool = True):
        """moves: of the tag that closes thoughts, None for none. space: white space begins an answer,
        too, where its token holds nothing else behind the tag."""
        self.tokenizer, self.space = tokenizer, space
        self.table = {(state, token): step for state, token, step in moves or ()}
        self.merged = {token for (_, token), step in self.table.items() if step >= 2 * WHOLE}
        # tokens before the last that spell a tag: each a character of it, or more
        self.reach = max((state for state, _ in self.table), default=0)

    def __call__(self, prompt: list[int], tokens: list[int], start: int) -> list[int]:
        """prompt: its last `reach` tokens will do. tokens: of the completion. start: as many of them
        stand before the answer."""
        if start == 0 or tokens[start - 1] not in self.merged:
            return tokens[start:]
        *before, last = [*prompt, *tokens[:start]][-self.reach - 1 :]
        state = 0
        for token in before:
            state = self.table.get((state, token), 0) % WHOLE
        behind = self.table.get((state, last), 0) // WHOLE - 1
        return [*(self._ids(last, behind) if behind > 0 else ()), *tokens[start:]]

    def _ids(self, token: int, behind: int) -> list[int]:
        """Of the token's last so many characters. One by one, as the vocabulary writes them: they may
        be bytes, and parts of a letter."""
        piece = self.tokenizer.convert_ids_to_tokens(token)[-behind:]
        ids = self.tokenizer.convert_tokens_to_ids([*piece])
        if not {None, self.tokenizer.unk_token_id}.isdisjoint(ids):
            ids = self.tokenizer.encode(_unmarked(piece), add_special_tokens=False)
        return ids if self.space or self.tokenizer.decode(ids).strip() else []


def single(moves: Moves) -> int | None:
    """The token that alone is the tag, None for a tag of several."""
    return moves[0][1] if len(moves) == 1 and moves[0][2] == WHOLE else None


class Speller(NamedTuple):
    """A tag's moves on the batch's device, sorted."""

    keys: Tensor  # [M] int64, state and token
    steps: Tensor  # [M] int64

    def __call__(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """[B] int64 and [B] -> the next state, and whether the tag is whole now, [B] bool."""
        key = state * SHIFT + token
        at = torch.searchsorted(self.keys, key).clamp_max(len(self.keys) - 1)
        step = torch.where(self.keys[at] == key, self.steps[at], 0)
        return step % WHOLE, step >= WHOLE


def mk_speller(moves: Moves, device: torch.device) -> Speller:
    keys = [state * SHIFT + token for state, token, _ in moves]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    columns = ([keys[i] for i in order], [moves[i][2] for i in order])
    return Speller(
        *(torch.tensor(c, dtype=torch.long).to(device, non_blocking=True) for c in columns)
    )


def scan(moves: Moves, rows: list[list[int]]) -> tuple[list[int], list[int]]:
    """Of each row of tokens the column at which the tag was last whole (-1: never), and the state
    behind it."""
    table, columns, states = {(s, t): n for s, t, n in moves}, [], []
    tokens = {token for _, token, _ in moves}
    for row in rows:
        state, last, before = 0, -1, -2
        for column in (c for c, token in enumerate(row) if token in tokens):
            state = table.get((state if column == before + 1 else 0, row[column]), 0)
            if state >= WHOLE:
                last, state = column, state % WHOLE
            before = column
        columns.append(last)
        states.append(state if before == len(row) - 1 else 0)
    return columns, states
