"""Tags that are text, and white space, over tokenizers of every kind: what is behind a tag is the
answer, whatever tokens spell it.

SOFTAR_TOKENIZERS names folders of more of them, as published ones lie, between os.pathsep."""

import functools
import os
import random

import pytest
import torch
from datasets import Dataset
from tiny import Forced, model_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import softar
from softar import Kind, SoftConfig
from softar.decoders.beam import BeamDecoder, BeamOptions
from softar.decoders.soft import SoftDecoder
from softar.decoders.stop import StopStrings
from softar.evaluate import evaluate
from softar.rl.discretise import seen
from softar.rl.vllm_rollout import output_of
from softar.tags import Answers, blanks, matches, moves_of_text
from softar.vllm.completions import Completion, CompletionDecoder, Sampling
from softar.vllm.record import Read

TAG = "</think>"
# of which a text is put together; é is two bytes
PARTS = [*"ok .,<>/-5$\\é\n", TAG, "</", "think", "\n\n", ">-", "<think>"]
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


def is_spelled(tokenizer):
    """Is the tag a text to it, and no token?"""
    return moves_of_text(tokenizer, TAG) != ()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_answer_is_all_text_behind_the_tag(name):
    """What merged with the tag's last token was lost: a minus sign, say."""
    tokenizer, rng, merged = made(name), random.Random(0), 0
    if not is_spelled(tokenizer):
        pytest.skip("the tag is a token")
    moves = moves_of_text(tokenizer, TAG)
    answer = Answers(moves, tokenizer)
    for _ in range(300):
        thought, rest = ("".join(rng.choices(PARTS, k=rng.randint(0, 6))) for _ in range(2))
        text = thought + TAG + rest
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(ids)
        behind = whole.partition(TAG)[2]
        if behind.startswith(" "):  # which pieces lose
            continue
        (end, *_) = matches(moves, ids)
        cut = rng.randint(0, end)  # the tag may begin in the prompt
        tokens = answer(ids[:cut], ids[cut:], end + 1 - cut)
        assert tokenizer.decode(tokens) == behind, (text, cut)
        merged += len(tokens) > len(ids) - end - 1
        near = ids[max(0, cut - answer.reach) : cut]
        assert answer(near, ids[cut:], end + 1 - cut) == tokens
        assert answer(ids[:cut], ids[cut:], 0) == ids[cut:]
    assert merged > 10


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


CASES = [
    "ok.</think>-5",
    "ok</think><answer>5</answer>",
    "</think>\\ok",
    "o.</think>-",
    "</think>5",
]


def forced(monkeypatch, where, script):
    """Lets what calls `generate` in the module `where` write the script."""
    real = where.generate

    def generate(model, ids, mask, **options):
        options["logits_processor"] = [Forced(ids.shape[1], [script] * len(ids))]
        return real(model, ids, mask, **options)

    monkeypatch.setattr(where, "generate", generate)


@pytest.mark.parametrize("text", CASES)
def test_every_read_out_has_it(text, monkeypatch):
    tokenizer = made("bytes")
    script = [*tokenizer.encode(text), tokenizer.eos_token_id]
    behind, n = text.partition(TAG)[2], len(script)
    sizes = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = model_of("llama", **sizes, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    config = SoftConfig("k-samples", {"k": 2}, think_end=TAG, max_new_tokens=n)
    told = dict(config=config, tokenizer=tokenizer)
    inputs = tokenizer(["ok"], return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    P = ids.shape[1]

    out = softar.generate(model, ids, mask, **told, logits_processor=[Forced(P, [script])])
    assert softar.answer_texts(out, tokenizer) == [behind]
    # whole tokens, of those that the model wrote
    answer = out.answers[0].tolist()
    assert answer == script[n - len(answer) :] and behind.endswith(tokenizer.decode(answer[:-1]))

    assert seen(out, tokenizer, "answer") == ([answer], [behind])
    assert seen(out, tokenizer, "stream") == ([script], [text])
    fed = zip(out.record.ids[0], out.record.weights[0], strict=True)
    steps = [
        Read(token, tuple(i.tolist()), tuple(w.tolist()), int(kind), 0.0, 0.0)
        for token, kind, (i, w) in zip(script, out.record.kind[0], fed, strict=True)
    ]
    resolved, end = config.resolve(tokenizer), tokenizer.eos_token_id
    there = output_of(ids.tolist(), [steps], resolved, [end], tokenizer.pad_token_id)
    assert seen(there, tokenizer, "answer") == ([answer], [behind])

    forced(monkeypatch, softar.decoders.soft, script)
    (decoded,) = SoftDecoder(model, tokenizer, config).decode(["ok"])
    assert decoded.text == behind and decoded.tokens == (*script,)

    forced(monkeypatch, softar.evaluate, script)
    texts, rows = [], Dataset.from_list([{"prompt": "ok"}])
    evaluate(model, tokenizer, rows, lambda text, row: texts.append(text) or 0.0, config)
    assert texts == [behind]

    beam = BeamDecoder(model, tokenizer, BeamOptions(n, num_beams=2, think_end=TAG))
    found = torch.tensor([[*ids[0], *script]])
    monkeypatch.setattr(model, "generate", lambda **options: found)
    (decoded,) = beam.decode(["ok"])
    assert decoded.text == behind and decoded.tokens == (*script,)

    sampling = Sampling("soft", max_new_tokens=n, soft={"think_end": TAG})
    there = CompletionDecoder("m", sampling, seed=0, trace=False)
    there.tokenizer = tokenizer
    completion = Completion(tokenizer.decode(script), (*script,), None)
    (decoded,) = there.rows(["ok"], ids.tolist(), [[completion]], 0.0)
    assert decoded.text == behind and decoded.tokens == (*script,)


@pytest.mark.parametrize(
    ("text", "stop", "ends"),
    [
        ("ok</think>-5k", "-5", "ok</think>-5"),
        ("-5</think>-k-5", "-5", "-5</think>-k-5"),
        ("ok</think>-", "-", "ok</think>-"),
        ("ok</think>\nok", "\n", None),  # nothing stands before it
        ("ok</think>\nok\n", "\n", "ok</think>\nok\n"),
        ("ok</think>5", ">", None),
        ("</think>-5k", "-5", "</think>-5"),
    ],
)
def test_stop_strings_see_what_merged_with_the_tag(text, stop, ends):
    tokenizer = made("bytes, white space")
    config = SoftConfig(think_end=TAG).resolve(tokenizer)
    script = tokenizer.encode(text)
    for prompt in ([78], [78] * 40):
        row, P = torch.tensor([[*prompt, *script]]), len(prompt)
        criterion = StopStrings(tokenizer, [stop], P, config)
        found = [criterion(row[:, : P + t], None).item() for t in range(1, len(script) + 1)]
        said = tokenizer.decode(script[: found.index(True) + 1]) if True in found else None
        assert said == ends


def test_stop_strings_know_a_tag_that_begins_in_the_prompt():
    tokenizer = made("bytes")
    row = torch.tensor([tokenizer.encode("ok</think>-5k")])
    for P in range(1, 4):  # up to "</think"
        criterion = StopStrings(tokenizer, ["-5"], P, SoftConfig(think_end=TAG).resolve(tokenizer))
        lengths = range(P + 1, row.shape[1] + 1)
        ended = [n for n in lengths if criterion(row[:, :n], None).item()]
        assert tokenizer.decode(row[0, : ended[0]]) == "ok</think>-5"
