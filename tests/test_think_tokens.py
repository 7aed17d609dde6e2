"""New tokens that stand before prompts: their rows alone are trained, and whatever decodes puts them
where they were trained."""

import copy
import itertools
import re
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import trl
from datasets import Dataset
from jinja2 import TemplateError
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors import safe_open
from tiny import QUIET, model_of, tokenizer_of
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import softar
from softar.config import SoftConfig
from softar.decoders.beam import BeamDecoder, BeamOptions
from softar.decoders.search import SearchDecoder
from softar.decoders.soft import SoftDecoder
from softar.decoders.soft_beam import SoftBeam
from softar.evaluate import encode, evaluate, prefixed
from softar.models import add_think_tokens, word_tokenizer
from softar.models.think_tokens import before_users
from softar.rl import SoftGRPOConfig, SoftGRPOTrainer, SoftPPOConfig, SoftPPOTrainer
from softar.rl.rewards import UNPREFIXED
from softar.sft.config import SoftSFTConfig
from softar.sft.trainer import SoftSFTTrainer
from softar.tasks import load_task
from softar.vllm.completions import token_ids

WORDS = "<|think_1|><|think_2|>"
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos> {{ m.content }} {% else %}{{ m.content }} "
    "<eos>{% endif %}{% endfor %}"
)
TABLES = ("embed_tokens.weight", "lm_head.weight")
ROWS = [("<bos> w5 w6", " w7 w8 w9"), ("<bos> w10", " w11 w12"), ("<bos> w13 w14 w15", " w16")]
ROWS = Dataset.from_list([{"prompt": p, "completion": c} for p, c in ROWS * 2])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def base_of(folder, *, tied=False, spare=0):
    """A model in a folder of its own. spare: rows of its tables that no token has."""
    model_of(tie_word_embeddings=tied, vocab_size=tiny.VOCAB + spare).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def trainer_of(folder, base, rows=ROWS, peft_config=None, tokenizer=None, **settings):
    usual = dict(
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        weight_decay=0.5,
        alpha_schedule="constant",
        alpha_start=0.0,
        think_steps=2,
        think_tokens=2,
        **QUIET,
    )
    model, own = softar.load(base)
    return SoftSFTTrainer(
        model,
        SoftSFTConfig(output_dir=str(folder), **usual | settings),
        train_dataset=rows,
        processing_class=tokenizer or own,
        peft_config=peft_config,
    )


def trained(*args, resume=None, **settings):
    trainer = trainer_of(*args, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def flat(model):
    """Its weights by the names that they have without PEFT."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload().requires_grad_()
    return {name: w.detach().clone() for name, w in model.state_dict().items()}


# -- the vocabulary


@pytest.mark.parametrize(("tied", "spare"), [*itertools.product([False, True], [0, 16])])
def test_the_vocabulary_grows_and_the_rest_stays(tied, spare):
    before = model_of(tie_word_embeddings=tied, vocab_size=tiny.VOCAB + spare)
    model, tokenizer = model_of(tie_word_embeddings=tied, vocab_size=tiny.VOCAB + spare), None
    tokenizer, state = tokenizer_of(), torch.get_rng_state()
    text, ids = add_think_tokens(model, tokenizer, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert (text, ids) == (WORDS, (64, 65)) and tuple(tokenizer(f"{text}w5").input_ids[:2]) == ids
    assert model.config.vocab_size == max(66, tiny.VOCAB + spare)
    for name, w in model.state_dict().items():
        theirs = before.state_dict()[name]
        keep = min(64, len(w)) if name.endswith(TABLES) else len(w)
        assert torch.equal(w[:keep], theirs[:keep]), name
    assert tokenizer.decode([*ids, 5], skip_special_tokens=True) == "w5"


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_less_likely_than_the_average_one(tied):
    model, tokenizer = model_of(tie_word_embeddings=tied), tokenizer_of()
    text, ids = add_think_tokens(model, tokenizer, 3)
    with torch.no_grad():
        p = model(tokenizer(f"{text}<bos> w5 w9", return_tensors="pt").input_ids).logits.softmax(-1)
    assert (p[..., list(ids)] < 1 / 64).all()


def test_the_seed_chooses_the_rows():
    rows = []
    for seed in (0, 0, 1):
        model, tokenizer = model_of(), tokenizer_of()
        ids = add_think_tokens(model, tokenizer, 4, seed=seed).ids
        rows.append(model.get_input_embeddings().weight[list(ids)])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    words = model.get_input_embeddings().weight[3:64]
    assert all((row == words).all(1).any() for row in rows[2])


def test_what_the_vocabulary_has_already_is_named():
    model, tokenizer = model_of(), tokenizer_of()
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        add_think_tokens(model, tokenizer, 0)
    with pytest.raises(ValueError, match=r"think_tags=True.*<think> and </think> already"):
        add_think_tokens(model, tokenizer, 1, tags=True)
    add_think_tokens(model, tokenizer, 1)
    with pytest.raises(ValueError, match=r"'<\|think_1\|>' already.*load its folder without"):
        add_think_tokens(model, tokenizer, 2)


# -- where they stand


def test_a_text_gets_them_once_and_a_chat_from_its_template():
    chat = [{"role": "user", "content": "w5"}]
    assert prefixed("w5", WORDS) == f"{WORDS}w5" == prefixed(f"{WORDS}w5", WORDS)
    assert prefixed(f"w6 {WORDS}w5", WORDS) == f"w6 {WORDS}w5"
    assert prefixed("w5", None) == "w5" and prefixed(chat, WORDS) is chat


FOLDER = Path(trl.__file__).parent / "chat_templates"
SAYS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\nIt is 2."},
    {"role": "user", "content": " And twice that?\n"},
    {"role": "assistant", "content": "4."},
]
CHATS = [SAYS[1:2], SAYS[1:3], SAYS[:2], SAYS[1:4], SAYS[1:], SAYS]


def rendered(template, messages, **kwargs):
    """The text, or None where the template refuses the chat, or shows no texts."""
    try:
        text = SPEAKER.apply_chat_template(
            messages, chat_template=template, tokenize=False, **kwargs
        )
    except (TemplateError, TypeError, ValueError):
        return None
    return text if "1 + 1" in text else None


SPEAKER = tokenizer_of()


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.jinja")))
def test_real_templates_say_the_same_with_the_tokens_before_each_user(name):
    """Of the templates that TRL ships; what was a prefix of a longer chat is one still."""
    plain = (FOLDER / f"{name}.jinja").read_text()
    grown = before_users(plain, WORDS)
    for chat, prompts in itertools.product(CHATS, [False, True]):
        theirs = rendered(plain, chat, add_generation_prompt=prompts)
        ours = rendered(grown, chat, add_generation_prompt=prompts)
        if theirs is None:
            assert ours is None
            continue
        # some trim what a user says
        assert re.sub(r"\s", "", ours.replace(WORDS, "")) == re.sub(r"\s", "", theirs)
        assert ours.count(WORDS) == sum(message["role"] == "user" for message in chat)
        assert all(f"{WORDS}{m['content'].rstrip()}" in ours for m in chat if m["role"] == "user")
    asked, told = (
        [rendered(t, c, add_generation_prompt=g) or "" for t in (plain, grown)]
        for c, g in ((SAYS[1:2], True), (SAYS[1:3], False))
    )
    assert told[1].startswith(asked[1]) == told[0].startswith(asked[0])


def test_a_template_keeps_its_first_line_and_parts_of_a_message():
    parts = [{"role": "user", "content": [{"type": "text", "text": "w5"}]}]
    of_parts = (
        "\n  {% if true %}{% for p in messages[0].content %}[{{ p.text }}]{% endfor %}{% endif %}"
    )
    for template, chat, says in (
        (
            "\n  {% if true %}{{ messages[0].content }}{% endif %}",
            SAYS[1:2],
            f"\n{WORDS}What is 1 + 1?",
        ),
        (of_parts, parts, f"\n[{WORDS}][w5]"),
        ("{{ messages[0].role }}", [{"role": "user", "content": None}], "user"),
        ("{{ messages[0].role }}", [{"role": "user"}], "user"),
    ):
        grown = before_users(template, WORDS)
        said = SPEAKER.apply_chat_template(chat, chat_template=grown, tokenize=False)
        assert said == says
        again = before_users(grown, WORDS)  # a text that holds them gets them once
        if chat is SAYS[1:2]:
            assert SPEAKER.apply_chat_template(chat, chat_template=again, tokenize=False) == says


@pytest.mark.parametrize("chat", [False, True])
def test_training_and_every_decoder_read_the_same_prompt(tmp_path, chat):
    rows, tokenizer = ROWS, tokenizer_of()
    if chat:
        tokenizer.chat_template = CHAT
        rows = [
            {
                "prompt": [dict(role="user", content=r["prompt"][6:])],
                "completion": [dict(role="assistant", content=r["completion"])],
            }
            for r in ROWS
        ]
        rows = Dataset.from_list(rows)
    trainer = trainer_of(tmp_path / "run", base_of(tmp_path / "base"), rows, tokenizer=tokenizer)
    config, model = trainer.decoding(), trainer.model
    assert config.prompt_prefix == WORDS
    search = BeamOptions(2, num_beams=2, prompt_prefix=WORDS)
    for row, ids in zip(rows, trainer.train_dataset["input_ids"], strict=True):
        length = len(
            tokenizer(row["prompt"] if not chat else row["prompt"][0]["content"]).input_ids
        )
        prompt = ids[: length + 2 + chat]
        assert prompt.count(64) == prompt.count(65) == 1
        for decoder in (
            SoftDecoder(model, tokenizer, config),
            BeamDecoder(model, tokenizer, search),
            SearchDecoder(model, tokenizer, config, SoftBeam(num_beams=1)),
        ):
            assert decoder.read([row["prompt"]])["input_ids"].tolist() == [prompt]
        assert encode(tokenizer, [row["prompt"]], WORDS)["input_ids"].tolist() == [prompt]
        assert token_ids(tokenizer, row["prompt"], WORDS) == prompt
    out = softar.generate(model, torch.tensor([prompt]), config=config, tokenizer=tokenizer)
    for made in (SoftDecoder, partial(SearchDecoder, search=SoftBeam(num_beams=1, anchor=0.0))):
        (decoded,) = made(model, tokenizer, config).decode([row["prompt"]])
        assert decoded.tokens == tuple(out.completions[0].tolist())


def test_ids_that_lack_the_prefix_are_refused():
    model, tokenizer = model_of(), tokenizer_of()
    add_think_tokens(model, tokenizer, 2)
    config = SoftConfig(prompt_prefix=WORDS, max_new_tokens=2)
    inputs = encode(tokenizer, ["w5 w6", f"w5 {WORDS} w6", f"w6{WORDS}"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert softar.generate(model, ids[1:], mask[1:], config=config, tokenizer=tokenizer)
    for rows, why in (
        ((ids, mask), r"rows \[0\] of input_ids.*prompt_prefix=None"),
        ((ids[:1, -1:],), "rows"),
    ):
        with pytest.raises(ValueError, match=why):
            softar.generate(model, *rows, config=config, tokenizer=tokenizer)
    assert softar.generate(model, ids, mask, config=config, prompt_prefix=None, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="is text: pass tokenizer="):
        softar.generate(model, ids[1:], mask[1:], config=config)
    with pytest.raises(ValueError, match="prompt_prefix='' is empty"):
        SoftConfig(prompt_prefix="")


def test_a_prefix_of_words_may_join_the_prompt():
    """Byte-level BPE: the space at the end of the prefix is the beginning of a token."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(["Think softly: what is it", "Think softly: why is it"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="!", eos_token="!")
    model, prefix = model_of(vocab_size=300), "Think softly: "
    config = SoftConfig(prompt_prefix=prefix, max_new_tokens=2)
    inputs = encode(tokenizer, ["what is it", "it"], prefix)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    alone = tokenizer.encode(prefix)
    assert alone not in [row[i : i + len(alone)] for row in ids.tolist() for i in range(9)]
    for made in (SoftDecoder, partial(SearchDecoder, search=SoftBeam(num_beams=1))):
        assert len(made(model, tokenizer, config).decode(["what is it", "it"])) == 2
    rows = Dataset.from_list([{"prompt": "why is it"}])
    assert evaluate(model, tokenizer, rows, lambda text, row: 1, config)["n"] == 1
    assert softar.generate(model, ids, mask, config=config, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"rows \[0, 1\] of input_ids"):
        softar.generate(model, ids[:, -1:], config=config, tokenizer=tokenizer)


@pytest.mark.parametrize("decode", [SoftDecoder, partial(SearchDecoder, search=SoftBeam())])
def test_a_chat_template_that_leaves_the_prefix_out_is_named(decode):
    model, tokenizer = model_of(), tokenizer_of()
    tokenizer.chat_template = CHAT
    decoder = decode(model, tokenizer, SoftConfig(prompt_prefix="w7", max_new_tokens=2))
    with pytest.raises(ValueError, match="the chat template does not write prompt_prefix='w7'"):
        decoder.decode([[dict(role="user", content="w5 w6")]])


# -- training


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_nothing_but_the_rows_changes(tmp_path, tied, peft, optim):
    base = base_of(tmp_path / "base", tied=tied)
    adapter = TrainableTokensConfig() if peft else None
    trainer = trainer_of(tmp_path / "run", base, peft_config=adapter, optim=optim, max_steps=3)
    model = trainer.accelerator.unwrap_model(trainer.model)
    before = flat(copy.deepcopy(model))
    trainer.train()
    after = flat(copy.deepcopy(trainer.model))
    for name, w in before.items():
        is_table = name.endswith(TABLES)
        keep = 64 if is_table else len(w)
        assert torch.equal(after[name][:keep], w[:keep]), name
        assert not is_table or (after[name][64:] != w[64:]).any(1).all(), name
    theirs = model_of(tie_word_embeddings=tied).state_dict()
    assert all(torch.equal(after[name][: len(w)], w) for name, w in theirs.items())


@pytest.mark.parametrize("spare", [0, 16], ids=["grown", "rows to spare"])
@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_what_is_saved_opens_again(tmp_path, tied, peft, spare):
    base, run = base_of(tmp_path / "base", tied=tied, spare=spare), tmp_path / "run"
    trainer = trained(run, base, peft_config=TrainableTokensConfig() if peft else None)
    trainer.save_model()
    if peft:  # the rows and nothing else
        with safe_open(run / "adapter_model.safetensors", "pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]
        assert shapes == [[2, tiny.WIDTH]] * 2
    model, tokenizer = softar.load(run)
    assert SoftConfig.load(run).prompt_prefix == WORDS
    ids = encode(tokenizer, ["<bos> w5 w6"], WORDS)["input_ids"]
    assert ids.tolist() == [[64, 65, 1, 5, 6]]
    with torch.no_grad():
        wanted = trainer.model.eval()(ids).logits
        assert torch.equal(model(ids).logits, wanted)
        if peft:
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged(ids).logits, wanted)
            merged.save_pretrained(tmp_path / "merged")
            tokenizer.save_pretrained(tmp_path / "merged")
            torch.testing.assert_close(softar.load(tmp_path / "merged")[0](ids).logits, wanted)
    out = softar.generate(model, ids)  # as its soft_config.json says
    assert out.config.prompt_prefix == WORDS and out.config.budget == 2


@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
def test_a_resumed_run_goes_on_exactly(tmp_path, peft):
    base = base_of(tmp_path / "base")
    kw = dict(max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="cosine")
    runs = []
    for name, resume in (("a", None), ("b", str(tmp_path / "a" / "checkpoint-2"))):
        adapter = TrainableTokensConfig() if peft else None
        runs.append(trained(tmp_path / name, base, peft_config=adapter, resume=resume, **kw))
    logs = [
        [(e["loss"], e["grad_norm"]) for e in run.state.log_history if "loss" in e] for run in runs
    ]
    assert logs[0] == logs[1] and len({*logs[0]}) == 4
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(w, states[1][name]) for name, w in states[0].items())


def test_new_tags_are_trained_and_end_the_thought(tmp_path):
    base, words = tmp_path / "base", [f"w{i}" for i in range(64)]
    model_of().save_pretrained(base)
    word_tokenizer(["<pad>", "<bos>", "<eos>", *words[3:]]).save_pretrained(base)
    rows = [{"prompt": "<bos> w5", "completion": " <think> w6 w7 </think> w8"}] * 4
    tags = dict(think_steps=None, think_tags=True, think_start="<think>", think_end="</think>")
    trainer = trained(tmp_path / "run", base, Dataset.from_list(rows), **tags)
    assert trainer.train_dataset["input_ids"][0] == [64, 65, 1, 5, 66, 6, 7, 67, 8, 2]
    trainer.save_model()
    config = SoftConfig.load(tmp_path / "run").resolve(trainer.processing_class)
    assert (config.think_start, config.think_end) == ((66,), (67,))
    theirs, ours = model_of().state_dict(), trainer.model.state_dict()
    assert all(torch.equal(ours[name][: len(w)], w) for name, w in theirs.items())
    assert "</think>" in trainer.processing_class.decode([67], skip_special_tokens=True)


def test_a_later_training_keeps_the_prefix(tmp_path):
    trained(tmp_path / "run", base_of(tmp_path / "base")).save_model()
    trainer = trained(tmp_path / "later", tmp_path / "run", think_tokens=0, weight_decay=0.0)
    assert trainer.train_dataset["input_ids"][0][:3] == [64, 65, 1]
    trainer.save_model()
    assert SoftConfig.load(tmp_path / "later").prompt_prefix == WORDS
    assert all(p.requires_grad for p in trainer.model.parameters())


RL = dict(
    soft_k=2,
    think_steps=2,
    max_completion_length=4,
    num_generations=2,
    per_device_train_batch_size=4,
    max_steps=1,
    **QUIET,
)


def rl_of(folder, opened, rows=ROWS, trainer=SoftGRPOTrainer, options=SoftGRPOConfig, **settings):
    """On a model as softar.load opens it. trainer.asked: the prompts that its rewards have seen."""
    asked, (model, tokenizer) = [], opened

    def reward(completions, prompts, **columns):
        asked.extend(prompts)
        return [float(len(text) % 3) for text in completions]

    args = options(output_dir=str(folder), **RL | settings)
    made = trainer(model, reward, args, rows, {"held": rows}, tokenizer)
    made.asked = asked
    return made


@pytest.mark.parametrize(
    ("peft", "kind"),
    [
        (True, (SoftGRPOTrainer, SoftGRPOConfig)),
        (False, (SoftGRPOTrainer, SoftGRPOConfig)),
        (False, (SoftPPOTrainer, SoftPPOConfig)),
    ],
    ids=["adapter", "whole", "ppo"],
)
def test_rl_goes_on_behind_the_prefix(tmp_path, peft, kind):
    """Of a merged adapter too, whose name_or_path is its base's; rows that hold it keep it."""
    adapter = TrainableTokensConfig() if peft else None
    trained(
        tmp_path / "run", base_of(tmp_path / "base", tied=peft), peft_config=adapter
    ).save_model()
    model, tokenizer = softar.load(tmp_path / "run")
    if peft:
        with pytest.raises(ValueError, match=r"model='.*run': its adapter.*merge_and_unload"):
            rl_of(tmp_path / "rl", (model, tokenizer))
        model = model.merge_and_unload().requires_grad_()
    rows = Dataset.from_list([{"prompt": f"{WORDS}<bos> w4"}, *ROWS.select_columns("prompt")])
    saving = dict(save_strategy="steps", save_steps=1)
    trainer = rl_of(tmp_path / "rl", (copy.deepcopy(model), tokenizer), rows, *kind, **saving)
    trainer.train()
    trainer.evaluate()
    read = trainer.train_dataset  # rows that were read before are not read anew
    assert trainer._checked(read, "rows", tokenizer)[UNPREFIXED] == read[UNPREFIXED]
    assert trainer.asked and all(
        prompt.count(WORDS) == 1 and prompt.startswith(WORDS) for prompt in trainer.asked
    )
    trainer.save_model()
    for folder in (tmp_path / "rl", tmp_path / "rl" / "checkpoint-1"):
        config = SoftConfig.load(folder)
        assert config == trainer.policy and config.prompt_prefix == WORDS
        assert "prompt_prefix" in (folder / "README.md").read_text()
    saved, tokenizer = softar.load(tmp_path / "rl")
    ids = encode(tokenizer, ["<bos> w5"], WORDS)["input_ids"]
    assert softar.generate(saved, ids).config.prompt_prefix == WORDS
    resume = str(tmp_path / "rl" / "checkpoint-1")
    plain = rl_of(tmp_path / "x", softar.load(tmp_path / "base"), rows, *kind)
    with pytest.raises(
        ValueError, match=r"another policy: now prompt_prefix=None, not '<\|think_1"
    ):
        plain.train(resume_from_checkpoint=resume)
    again = rl_of(tmp_path / "rl", (model, tokenizer), rows, *kind, max_steps=2)
    again.train(resume_from_checkpoint=resume)
    assert again.state.global_step == 2


def test_rl_looks_at_each_prompt_for_the_prefix(tmp_path):
    """Chats get it from their template: one without it is named."""
    trained(tmp_path / "run", base_of(tmp_path / "base")).save_model()
    model, tokenizer = softar.load(tmp_path / "run")
    tokenizer.chat_template = CHAT
    chats = Dataset.from_list([{"prompt": [dict(role="user", content="w5")]}] * 4)
    with pytest.raises(ValueError, match=r"prompt_prefix='<\|think_1\|>.*stands nowhere in rows"):
        rl_of(tmp_path / "rl", (model, tokenizer), chats).train()


def test_an_adapters_own_folder_says_its_draws(tmp_path):
    adapter = TrainableTokensConfig()
    trained(
        tmp_path / "run", base_of(tmp_path / "base", tied=True), peft_config=adapter
    ).save_model()
    draws = dict(mixer="k-samples", mixer_args={"k": 5}, prompt_prefix=WORDS)
    SoftConfig(**draws).save(tmp_path / "run")
    model, tokenizer = softar.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"model='.*run' is the folder of an adapter: give softar"):
        rl_of(tmp_path / "rl", (str(tmp_path / "run"), tokenizer))
    with pytest.raises(ValueError, match=r"soft_k=2, but soft_config\.json in .*run says k=5"):
        rl_of(tmp_path / "rl", (model.merge_and_unload(), tokenizer))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(think_tokens=-1), "think_tokens=-1 must be at least 0"),
        (dict(think_tokens=1.5), "think_tokens=1.5"),
        (dict(freeze_embeddings=True), "freeze_embeddings=True.*think_tokens"),
        (dict(freeze_layers=1), "freeze_layers=1.*think_tokens"),
        (dict(think_tags=True), "think_tags=True.*think_end='</think>'"),
        (dict(think_tokens=0, think_tags=True), "think_tags=True.*without think_tokens"),
        (dict(chat_template_path="x.jinja"), "chat_template_path='x.jinja'"),
        (
            dict(peft_config=LoraConfig()),
            r"give peft_config=TrainableTokensConfig\(\), not LoraConfig",
        ),
        (dict(rows=Dataset.from_list([{"text": "w5 w6"}])), r"the rows have \['text'\]"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        trainer_of(tmp_path / "run", base_of(tmp_path / "base"), **settings)


def test_models_that_cannot_are_named(tmp_path):
    base_of(tmp_path / "base")
    trained(tmp_path / "run", tmp_path / "base").save_model()
    with pytest.raises(ValueError, match="already, of an earlier training"):
        trainer_of(tmp_path / "again", tmp_path / "run")
    args = SoftSFTConfig(output_dir=str(tmp_path / "x"), think_tokens=1)
    rest = dict(train_dataset=ROWS, processing_class=tokenizer_of())
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for model, says in (
        (str(tmp_path / "base"), "model is a str, give one as softar.load opens it"),
        (get_peft_model(model_of(), lora), "model is a PeftModelForCausalLM.*an adapter merged"),
    ):
        with pytest.raises(ValueError, match=says):
            SoftSFTTrainer(model, args, **rest)
    biased = model_of()
    biased.lm_head = torch.nn.Linear(tiny.WIDTH, tiny.VOCAB)
    with pytest.raises(ValueError, match=r"has a bias.*without PEFT"):
        SoftSFTTrainer(biased, args, peft_config=TrainableTokensConfig(), **rest)


@pytest.mark.rest
def test_a_frozen_model_reads_wide_mixtures_better_behind_the_tokens(tmp_path):
    """The discrete model of MNNS, read at temperature 5, which it has never seen; development rows."""
    task = load_task("mnns", size=3000)
    groups = sorted({*task.test["group"]})[::4]
    dev = task.test.filter(lambda group: group in groups, input_columns="group")
    wide = dict(soft_temperature=5.0, soft_top_k=None, soft_mode="sequential", think_steps=3)
    settings = dict(per_device_train_batch_size=64, max_steps=150, lr_scheduler_type="cosine")
    settings |= dict(think_tokens=4, weight_decay=0.0, eval_new_tokens=5, **wide)
    trainer = trained(tmp_path, "mnns-discrete-tiny", task.train, **settings)
    base, tokenizer = softar.load("mnns-discrete-tiny")
    config = trainer.decoding("soft")
    found = evaluate(trainer.model, trainer.processing_class, dev, task.score, config)
    plain = evaluate(base, tokenizer, dev, task.score, config.changed(prompt_prefix=None))
    assert found["accuracy"] > plain["accuracy"] + 0.15, (found, plain)
