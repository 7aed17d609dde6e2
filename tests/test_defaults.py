"""How a model is decoded where nobody says how: one answer for Python, specs and the command line."""

import dataclasses
import json
import warnings

import pytest
import torch
from tiny import BOS, END, PROMPTS, THINK, Forced, left_padded, model_of, tokenizer_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import softar
from softar import Kind, SoftConfig
from softar.decoders.card import Card, describe
from softar.decoders.options import Common
from softar.decoders.registry import default_length, make_decoder
from softar.defaults import NARROW, default_of, recall, think_tags
from softar.models.origin import note_origin
from softar.tags import blanks, matches, moves_of_ids, moves_of_text


def byte_tokenizer(*, tags=(), template=None):
    """256 bytes and no merges, as a BPE of a thinking model begins; tags are tokens of their own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    core.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", chat_template=template
    )


@pytest.fixture(scope="module")
def endless():
    return model_of("llama", eos_token_id=None)


def test_a_plain_model_thinks_narrowly_for_half_and_the_text_is_all_of_it(endless):
    ids, mask = left_padded(PROMPTS)
    out = softar.generate(endless, ids, mask, max_new_tokens=12)
    assert out.config == SoftConfig(**NARROW, max_new_tokens=12, budget=6, hide_thought=False)
    assert out.record.kind.tolist() == [[Kind.SOFT] * 6 + [Kind.HARD] * 6] * 3
    assert [len(answer) for answer in out.answers] == [12] * 3
    assert "no soft_config.json" in out.why and out.why in repr(out) and len(repr(out)) < 900


@pytest.mark.parametrize(
    "tags, template, found",
    [
        ((), None, None),
        (("<think>", "</think>"), None, ("<think>", "</think>")),
        (("<think>",), None, None),
        ((), "{{ '<think>' }} ... </think>", ("<think>", "</think>")),
        (("[THINK]", "[/THINK]"), None, ("[THINK]", "[/THINK]")),
    ],
)
def test_think_tags_are_those_of_the_tokenizer_or_of_its_template(tags, template, found):
    assert think_tags(byte_tokenizer(tags=tags, template=template)) == found
    assert default_of(None, byte_tokenizer(tags=tags, template=template)).kind == (
        "tags" if found else "plain"
    )


@pytest.mark.parametrize(
    "prompt, kinds",
    [
        ([BOS, 11, THINK], [Kind.SOFT] * 3 + [Kind.FORCED] + [Kind.HARD] * 2),  # as R1's template
        ([BOS, 11, THINK, END], [Kind.HARD] * 6),  # as Qwen3's with enable_thinking=False
        ([BOS, 11], [Kind.HARD] * 6),
    ],
)
def test_a_thinking_model_is_soft_between_its_tags_alone(endless, prompt, kinds):
    out = softar.generate(
        endless,
        torch.tensor([prompt]),
        tokenizer=tokenizer_of(),
        max_new_tokens=6,
        logits_processor=[Forced(len(prompt), [[20] * 6])],
    )
    assert (out.config.think_start, out.config.think_end) == ((THINK,), (END,))
    assert out.record.kind[0].tolist() == kinds and "between <think> and </think>" in out.why


def test_without_think_start_a_prompt_that_closes_its_thought_is_answered_discretely(endless):
    ids, mask = left_padded([[BOS, 11, END], [BOS, END, 11], [BOS, 12, 11]])
    out = softar.generate(
        endless, ids, mask, config=SoftConfig(think_end=END, budget=2, max_new_tokens=4)
    )
    assert (out.record.kind[:, 0] == torch.tensor([Kind.HARD, Kind.SOFT, Kind.SOFT])).all()
    assert (out.record.kind[0] == Kind.HARD).all()


def test_a_models_own_configuration_is_found_however_it_is_opened(tmp_path, endless):
    own = SoftConfig(mixer="dirichlet", budget=2, max_new_tokens=5)
    endless.save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    own.save(tmp_path)
    ids, mask = left_padded(PROMPTS)
    for model in (
        softar.load(tmp_path, device="cpu")[0],
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        out = softar.generate(model, ids, mask)
        assert out.config == own and out.record.token.shape == (3, 5)
        assert softar.generate(model, ids, mask, budget=1).config == own.changed(budget=1)
        plugged = model.generate(
            ids,
            attention_mask=mask,
            custom_generate=softar.soft_decode,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
        assert plugged.config == own and plugged.record.token.shape == (3, 5)
    assert make_decoder("dirichlet", model=str(tmp_path), max_new_tokens=5).config == own


def test_a_configuration_counts_alone_beside_a_file_that_cannot_be_read(tmp_path):
    model = model_of("llama", eos_token_id=None)
    (tmp_path / "soft_config.json").write_text("{")
    note_origin(model, str(tmp_path), tokenizer_of())
    ids = torch.tensor([[BOS, 9]])
    with pytest.raises(ValueError, match="cannot be read"):
        softar.generate(model, ids, max_new_tokens=2)
    how = dict(mixer="hard", max_new_tokens=2)
    for config in (SoftConfig(**how), how):
        assert softar.generate(model, ids, config=config).config == SoftConfig(**how)
        plugged = dict(custom_generate=softar.soft_decode, soft_config=config)
        assert model.generate(ids, **plugged).shape == (1, 4)


def test_what_load_opened_needs_no_tokenizer_again(endless):
    model = model_of("llama", eos_token_id=None)
    note_origin(model, "nowhere", tokenizer_of())
    assert recall(model).kind == "tags"
    out = softar.generate(model, torch.tensor([[BOS, THINK]]), think_end="w9", max_new_tokens=3)
    assert out.config.think_end == (9,)
    assert recall(endless).kind == "plain" and recall(endless, tokenizer_of()).kind == "tags"


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(mixer="hard"), dict(mixer="hard", max_new_tokens=128)),
        (dict(temperature=0), dict(temperature=0, budget=64, hide_thought=False)),
        (dict(mixer="soft"), NARROW | dict(mixer="soft", budget=64, hide_thought=False)),
        (dict(budget=3), NARROW | dict(budget=3, hide_thought=False)),
        (dict(budget=None, think_end="x"), NARROW | dict(think_end="x")),
        (dict(max_new_tokens=1), NARROW | dict(max_new_tokens=1, budget=0, hide_thought=False)),
    ],
)
def test_keywords_override_the_default_and_what_they_silence_goes(fields, expected):
    assert default_of(None).changed(fields) == SoftConfig(**{"max_new_tokens": 128} | expected)


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(answer_temperature=1.0), "answer_temperature=1.0 does nothing where nothing ends"),
        (dict(cold_stop_steps=3), "cold_stop_steps=3 does nothing without a cold stop"),
        (dict(answer_top_p=0.5, budget=3), "answer_top_p=0.5 does nothing at answer_temperature=0"),
        (
            dict(mixer="hard", softness=0.5),
            "softness=0.5 does nothing with a mixer of single tokens",
        ),
        (
            dict(mixer="hard", top_p=0.5),
            "top_p=0.5 does nothing with mixer='hard', which is greedy",
        ),
        (dict(mixer="gumbel", temperature=0), "mixer='gumbel' does nothing at temperature=0"),
        (dict(softness=0, rescale="l2"), "rescale='l2' does nothing at softness=0"),
        (
            dict(mixer="gumbel", mixer_args={"tau": 2.0}, softness=0),
            "mixer_args={'tau': 2.0} does nothing at softness=0",
        ),
        (dict(hide_thought=False), "hide_thought=False does nothing where nothing ends"),
        (dict(max_new_tokens=2.5), "max_new_tokens=2.5 must be a whole number"),
        (dict(max_new_tokens=True), "max_new_tokens=True must be a whole number"),
        (dict(budget=1.5), "budget=1.5 must be a whole number or None"),
        (dict(top_k=True), "top_k=True must be a whole number or None"),
        (dict(top_k=5.0), "top_k=5.0 must be a whole number or None"),
        (dict(temperature="hot"), "temperature='hot' must be a number"),
        (dict(hide_thought=1, budget=2), "hide_thought=1 must be True or False"),
        (dict(think_start="a", think_end="a"), "think_start='a' closes the thought as well"),
    ],
)
def test_options_that_say_nothing_or_have_another_type_are_refused(fields, told):
    with pytest.raises(ValueError) as caught:
        SoftConfig(**fields)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", ["hide_thought=false", "answer_temperature=0.6"])
def test_options_of_a_thought_between_tags_fit_a_model_that_has_tags(options, tmp_path):
    """Which its tokenizer alone tells; of a model without, discrete decoders have no thought."""
    model_of().save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    name, _, value = options.partition("=")
    for decoder in ("discrete", "sampled", "soft", "gumbel", "beam", "soft-beam"):
        if decoder.endswith("beam") and name != "hide_thought":
            continue
        made = make_decoder(f"{decoder}:{options}", model=str(tmp_path), device="cpu")
        config = made.thought if decoder == "beam" else made.config
        assert getattr(config, name) == json.loads(value) and config.think_end == (END,)
    with pytest.raises(ValueError, match=r"answer_top_p=0\.9 does nothing"):  # whatever it has
        make_decoder("discrete:answer_top_p=0.9", model="not-there")
    model_of(vocab_size=300).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}=.* does nothing where nothing ends the thought"):
        make_decoder(f"discrete:{options}", model=str(tmp_path), device="cpu")


def test_a_decoder_says_how_it_was_chosen(monkeypatch, endless):
    monkeypatch.setattr("softar.decoders.soft._load", lambda *a, **kw: (endless, tokenizer_of()))
    made = []
    for length in (None, 40):
        from softar.decoders.soft import DECODERS

        card = Card("x", None, "autoregressive", None)
        made.append(DECODERS["gumbel"](card, Common(length)))
    assert "between <think> and </think>" in made[0].why
    assert (made[0].config.max_new_tokens, made[0].config.budget) == (1024, 512)
    assert (made[1].config.max_new_tokens, made[1].config.budget) == (40, 20)


def merging_tokenizer():
    """A BPE in which </think> is three tokens, and merges with what stands beside it: ".</", ">\\n"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["< /", ". </", "t h", "i n", "th in", "thin k", "> Ċ", "o k"]
    vocab = {piece: i for i, piece in enumerate([*letters, *(m.replace(" ", "") for m in merges)])}
    merges = [tuple(m.split(" ")) for m in merges]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="~", pad_token="~")


CLOSED = ["ok.</think>", "ok</think>", "ok.</think>\n", "a</think>ok", "<</think>ok", "</</think>"]
OPEN = ["ok.</thinkok", "ok.< /think>", "</th</ink>", "</thin.k>", ""]


@pytest.mark.parametrize("text", [*CLOSED, *OPEN])
def test_a_tag_closes_the_thought_however_the_tokenizer_cuts_it(text):
    tokenizer = merging_tokenizer()
    model = model_of("llama", vocab_size=len(tokenizer), eos_token_id=None)
    config = SoftConfig(think_end="</think>", max_new_tokens=20)
    ids = tokenizer.encode(text)
    script = [*ids, *[tokenizer.encode("o")[0]] * (20 - len(ids))]
    forced = [Forced(1, [script])]
    out = softar.generate(
        model, torch.tensor([[5]]), config=config, tokenizer=tokenizer, logits_processor=forced
    )
    spelled = tokenizer.batch_decode([ids[: i + 1] for i in range(len(ids))])
    end = next((i + 1 for i, part in enumerate(spelled) if "</think>" in part), 20)
    assert (end < 20) == (text in CLOSED) and out.answer_start.tolist() == [end]
    is_soft = [Kind.SOFT] * (end - (end < 20)) + [Kind.HARD] * (20 - end + (end < 20))
    assert out.record.kind[0].tolist() == is_soft
    # as vLLM's workers get it, which have no tokenizer; and begun in the prompt
    sent = SoftConfig(**json.loads(json.dumps(dataclasses.asdict(config.resolve(tokenizer)))))
    assert sent == config.resolve(tokenizer) and sent.moves == config.resolve(tokenizer).moves
    for cut in range(1, len(ids)):
        prompt = torch.tensor([[5, *ids[:cut]]])
        rest = [Forced(prompt.shape[1], [script[cut:]])]
        out = softar.generate(model, prompt, config=sent, logits_processor=rest)
        expected = 20 if end == 20 else max(end - cut, 0)
        assert out.answer_start.tolist() == [expected]


def test_a_tag_by_its_ids_alone_is_those_ids():
    assert matches(moves_of_ids((5, 5, 6)), [5, 5, 5, 6, 5, 6, 5, 5, 6]) == [3, 8]
    assert moves_of_text(tokenizer_of(), "w5") == ()  # words do not merge: w5 is no part of w55
    assert (
        moves_of_text(byte_tokenizer(tags=("</think>",)), "</think>") == ()
    )  # nor do added tokens


@pytest.mark.parametrize("by_ids", [False, True])
@pytest.mark.parametrize("tags", [("think_end",), ("think_start", "think_end")])
def test_white_space_may_follow_a_thought_that_the_prompt_closes(tags, by_ids, endless):
    """However the tags are given: ids did not see it."""
    tokenizer = byte_tokenizer(tags=("<think>", "</think>"))
    model = model_of("llama", vocab_size=len(tokenizer), eos_token_id=None)
    texts = {"think_start": "<think>", "think_end": "</think>"}
    given = {name: texts[name] for name in tags}
    if by_ids:
        given = {name: tokenizer.convert_tokens_to_ids(text) for name, text in given.items()}
    config = SoftConfig(**given, max_new_tokens=2)
    assert config.resolve(tokenizer).spelling == SoftConfig(**texts).resolve(tokenizer).spelling
    opened = Kind.SOFT if len(tags) == 1 else Kind.HARD
    for text, kind in (("a<think>\n</think>\n", Kind.HARD), ("a</think>\nb", opened)):
        ids = torch.tensor([tokenizer.encode(text)])
        out = softar.generate(model, ids, config=config, tokenizer=tokenizer)
        assert (out.record.kind == kind).all(), text


def test_a_tokenizer_without_white_space_has_no_blanks():
    """Some fail at what they have no token for."""
    core = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}))
    assert blanks(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")) == ()


@pytest.mark.parametrize(
    ("fields", "silent"),
    [
        (dict(budget=64), True),
        (dict(budget=9, max_new_tokens=9), True),
        (dict(budget=8, max_new_tokens=9), False),
        (dict(budget=64, hide_thought=False), False),  # the thought is the text
        (dict(budget=64, think_end="</think>"), False),  # it may end the thought before
        (dict(budget=64, cold_stop_entropy=0.1), False),
        (dict(max_new_tokens=9), False),
    ],
)
def test_a_budget_that_leaves_no_answer_is_told(fields, silent):
    """The answers were empty, without a word."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        for _ in range(3):
            SoftConfig(**fields).changed(top_k=5)
    assert [str(each.message)[-48:] for each in heard] == [
        "answer follows; raise max_new_tokens, or lower budget"[-48:]
    ] * silent


@pytest.mark.parametrize(("tags", "length"), [([], 128), (["<think>", "</think>"], 1024)])
def test_decoders_of_one_model_are_as_long_on_vllm(tags, length, tmp_path):
    """Else a comparison of both would be one of lengths."""
    tokenizer = byte_tokenizer(tags=tags)
    model_of("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert default_length(describe(str(tmp_path)), "vllm") == length
    assert make_decoder("gumbel", model=str(tmp_path)).config.max_new_tokens == length
