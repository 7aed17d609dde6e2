"""White space over tokenizers of every kind.

SOFTAR_TOKENIZERS names folders of more of them, as published ones lie, between os.pathsep."""

import functools
import os

import pytest
from tiny import model_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import softar
from softar import Kind, SoftConfig
from softar.tags import blanks

TAG = "</think>"
MERGES = ["t h", "i n", "th in", "thin k", "< /", ". </", "> -", "> \\", "> <", "> $", "</ think"]


def byte_level(*merges):
    """As GPT-2's: white space and letters beyond ASCII are written by other letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*MERGES, *merges]
    vocab = {p: i for i, p in enumerate([*letters, *(m.replace(" ", "") for m in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return wrapped(core, "~")


def metaspace(scheme, *more):
    """As Llama 2's: a space is ▁, which a text may begin with, and what has no token is bytes."""
    vocab = {"<eos>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    letters = [*"▁ok.,<>/-5$\\tinhĊč", "▁▁"]
    merges = [*MERGES, *more, "▁ ▁"]
    for piece in dict.fromkeys([*letters, *(m.replace(" ", "") for m in merges)]):
        vocab[piece] = len(vocab)
    pairs = [tuple(m.split(" ")) for m in merges]
    core = Tokenizer(models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return wrapped(core, "<eos>")


def wrapped(core, end):
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token=end, padding_side="left"
    )


TOKENIZERS = {
    "bytes": byte_level,
    "bytes, white space": functools.partial(byte_level, "> Ċ", "Ċ Ċ", "> ĊĊ", "Ġ Ġ"),
    "bytes, half a letter": functools.partial(byte_level, "> Ã"),  # the first byte of é
    "bytes, the tag within": functools.partial(byte_level, "</think >-", ".</ think"),
    "pieces, first": functools.partial(metaspace, "first", ">- 5"),
    "pieces, always": functools.partial(metaspace, "always"),
    "pieces, never": functools.partial(metaspace, "never"),
}
for path in filter(None, os.environ.get("SOFTAR_TOKENIZERS", "").split(os.pathsep)):
    TOKENIZERS[os.path.basename(path)] = functools.partial(AutoTokenizer.from_pretrained, path)


@functools.cache
def made(name):
    return TOKENIZERS[name]()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_white_space_is_what_decodes_to_it(name):
    """Of pieces the line break was missed, which is a byte, and so a closed thought."""
    tokenizer = made(name)
    ids = {*range(len(tokenizer))} - {*tokenizer.all_special_ids}
    texts = tokenizer.batch_decode([[i] for i in ids])
    white = {i for i, text in zip(ids, texts, strict=True) if not text.strip()}
    assert {*blanks(tokenizer)} == white and len(white) > 5
    for space in ("\n", "\n\n", " ", "\t", " \n\n ", "\r\n"):
        assert white.issuperset(tokenizer.encode(space, add_special_tokens=False)), space


@pytest.mark.parametrize("tags", [("think_end",), ("think_start", "think_end")])
@pytest.mark.parametrize("name", ["pieces, first", "pieces, always", "pieces, never", "bytes"])
def test_a_prompt_that_closes_its_thought_is_answered_discretely(name, tags):
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens(["<think>", TAG])
    model = model_of("llama", vocab_size=len(tokenizer), eos_token_id=None)
    config = SoftConfig(**{tag: {"think_start": "<think>", "think_end": TAG}[tag] for tag in tags})
    config = config.changed(max_new_tokens=2)
    for text in ("ok<think>\n\n</think>\n\n", "ok<think>\n</think> \n"):
        inputs = tokenizer(text, return_tensors="pt")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        out = softar.generate(model, ids, mask, config=config, tokenizer=tokenizer)
        assert (out.record.kind == Kind.HARD).all() and out.answer_start.tolist() == [0]
