"""BERT-like models without chat template or end token learn from chats and from plain text, as they
are asked later."""

import json

import pytest
from datasets import Dataset, IterableDataset
from launched import recipe, run_here
from test_diffusion_models import BERT_SPECIALS, BERTS, ROBERTA_SPECIALS
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForMaskedLM

from softar.diffusion.evaluate import nll_bound
from softar.diffusion.loop import denoise
from softar.diffusion.models import load
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.evaluate import encode

CHAT = [{"role": "user", "content": " why? "}, {"role": "assistant", "content": "so it is"}]
KINDS = {
    "chat": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "text": {"prompt": "why?", "completion": " so it is"},
    "closed text": {"prompt": "why?", "completion": " so it is<END>"},
}


def write(folder, arch):
    """A tiny model and a tokenizer of bytes, which ends texts as BERT's do and has no template."""
    specials = ROBERTA_SPECIALS if arch == "roberta" else BERT_SPECIALS
    vocab = [*specials, *sorted(ByteLevel.alphabet())]
    config = BERTS[arch]().config
    config.vocab_size, config.max_position_embeddings = len(vocab), 80
    if arch == "bert":
        config.eos_token_id = None
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    core = Tokenizer(BPE({token: i for i, token in enumerate(vocab)}, []))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), Bytes()
    first, last = ("<s>", "</s>") if arch == "roberta" else ("[CLS]", "[SEP]")
    core.add_special_tokens(specials)
    core.post_processor = TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(token, specials.index(token)) for token in (first, last)],
    )
    names = dict(cls_token=first, sep_token=last, mask_token=specials[4])
    names |= dict(pad_token=specials[1 if arch == "roberta" else 0])
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    return first, last


def trainer_of(folder, row, **options):
    model, tokenizer = load(folder)
    args = DiffusionSFTConfig(output_dir=str(folder / "out"), report_to="none", **options)
    rows = Dataset.from_list([row] * 2)
    return DiffusionSFTTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    ), tokenizer


@pytest.mark.parametrize("arch", BERTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_what_is_asked_and_what_follows(tmp_path, arch, kind):
    first, last = write(tmp_path, arch)
    row = json.loads(json.dumps(KINDS[kind]).replace("<END>", last))
    trainer, tokenizer = trainer_of(tmp_path, row)
    assert tokenizer.eos_token == last
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        ids, labels = rows[0]["input_ids"], rows[0]["labels"]
        length = labels.count(-100)
        asked = f"User: why? {last} Assistant:" if kind == "chat" else f"why?{last}"
        assert tokenizer.decode(ids[:length]) == first + asked
        assert tokenizer.decode(ids[length:]) == f" so it is{last}"
        assert labels == [-100] * length + ids[length:]
        # the context that decoding sees is that of the training
        assert encode(tokenizer, [row["prompt"]])["input_ids"][0].tolist() == ids[:length]
    if kind == "text":
        assert nll_bound(trainer.model, tokenizer, Dataset.from_list([row]), samples=2) > 0


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_data_without_a_row_is_named(tmp_path, name):
    write(tmp_path, "bert")
    model, tokenizer = load(tmp_path)
    args = DiffusionSFTConfig(output_dir=str(tmp_path / "out"), report_to="none")
    rows, none = (
        Dataset.from_list([KINDS["text"]]),
        Dataset.from_dict({k: [] for k in KINDS["text"]}),
    )
    for empty in (none, IterableDataset.from_generator(list), {"held": none}):
        data = {"train_dataset": rows, name: empty}
        with pytest.raises(ValueError, match=rf"^{name}.* is empty: give at least one row"):
            DiffusionSFTTrainer(model, args, **data, processing_class=tokenizer)


@pytest.mark.parametrize("arch", BERTS)
def test_a_text_is_closed_once(tmp_path, arch):
    first, last = write(tmp_path, arch)
    for text in ("so it is", f"so it is{last}"):
        trainer, tokenizer = trainer_of(tmp_path, {"text": text})
        ids = trainer.train_dataset[0]["input_ids"]
        assert tokenizer.decode(ids) == f"{first}so it is{last}"


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_the_recipe_for_modernbert_runs_on_a_bare_model(tmp_path, monkeypatch, kind):
    write(tmp_path / "model", "modernbert")
    rows = Dataset.from_list([{"messages": CHAT} if kind == "messages" else KINDS[kind]] * 8)
    rows.to_json(tmp_path / "data" / "train.jsonl")
    quick = "--bf16 false --max_steps 2 --per_device_train_batch_size 2 --save_strategy no"
    config = recipe("sft_diffusion").replace("sft_diffusion.py", "configs/modernbert_sft.yaml")
    told = ["--config", config, "--model_name_or_path", str(tmp_path / "model")]
    told += ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    run_here(monkeypatch, recipe("sft_diffusion"), *told, *quick.split(), "--report_to", "none")
    model, tokenizer = load(tmp_path / "out")
    prompt = CHAT[:1] if kind == "messages" else "why?"
    out = denoise(model, **encode(tokenizer, [prompt]), gen_length=4)
    assert not (out.sequences == tokenizer.mask_token_id).any()


def test_the_template_keeps_the_turns_of_a_chat(tmp_path):
    write(tmp_path, "bert")
    turns = [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": "b"}]
    text = load(tmp_path)[1].apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "[CLS]System: Be brief. [SEP] User: why? [SEP] Assistant: so it is[SEP] User: b [SEP] "
        "Assistant:"
    )
