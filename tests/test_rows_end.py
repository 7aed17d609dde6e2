"""A model remembers which token ended the rows of its training, and texts without it are warned of."""

import warnings

import pytest
from datasets import Dataset
from peft import LoraConfig
from test_held_out import SECOND, diffusion_trainer, mnns
from tiny import QUIET

import softar
from softar.diffusion import denoise, label_probs
from softar.diffusion.convert import convert
from softar.diffusion.models import load
from softar.diffusion.net import facts
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.evaluate import encode

OPEN = "<bos> D4 D8 D1 D3 -> <mask> <mask> S3 S0"
SAID = "ends in 'S0' .row 0 of input_ids., .* trained on end in '<eos>'"


def told(model, tokenizer, *texts, **options):
    """What `denoise` says of how texts end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        denoise(model, **encode(tokenizer, [*texts]), **{"gen_length": 0} | options)
    said = [w for w in caught if "text with masks ends" in str(w.message)]
    assert all(w.filename == __file__ for w in said)
    return [str(w.message) for w in said]


def tokens(tokenizer, end):
    """Rows that are tokens already, with an end of their own."""
    texts = [row["prompt"] + row["completion"] + end for row in mnns(SECOND)]
    return Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(softmasking_prob=0.5),
        dict(objective="uniform", normalise="tokens"),
        dict(packing=True, max_length=32),
    ],
)
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])])
def test_a_text_that_ends_otherwise_than_what_was_trained_on_is_warned_of(tmp_path, options, lora):
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    assert not told(model, tokenizer, OPEN)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = DiffusionSFTTrainer(
        load(tmp_path / "base")[0],
        DiffusionSFTConfig(output_dir=str(tmp_path / "out"), **QUIET | {"max_steps": 1} | options),
        train_dataset=mnns(SECOND),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    trainer.save_model()
    model, tokenizer = load(tmp_path / "out")
    assert facts(model).rows_end == tokenizer.eos_token_id
    (said,) = told(model, tokenizer, OPEN, f"{OPEN} <eos>")
    with pytest.raises(ValueError, match=SAID):
        raise ValueError(said)
    # an end, a mask that may become one, masks behind the text
    for text, more in ((f"{OPEN} <eos>", {}), (f"{OPEN} <mask>", {}), (OPEN, dict(gen_length=1))):
        assert not told(model, tokenizer, text, **more)
    # the second row, shorter, is padded on the left
    (said,) = told(model, tokenizer, f"{OPEN} <eos>", "<bos> <mask> S0")
    assert "row 1 of input_ids" in said
    # nor of what is not filled, beside what is
    assert not told(model, tokenizer, f"{OPEN} <eos>", "<bos> S0")


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_a_text_without_its_end_are_warned_of(side):
    model, tokenizer = load("mnns-diffusion-tiny")
    texts = [f"{OPEN} <eos>", "<bos> <mask> S0"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
    with pytest.warns(UserWarning, match=SAID.replace("row 0", "row 1")) as told:
        label_probs(model, labels=[5, 6], **inputs)
    assert [each.filename for each in told] == [__file__]
    texts[1] += " <eos>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label_probs(model, labels=[5, 6], **tokenizer(texts, return_tensors="pt", padding=True))


def test_nothing_is_said_of_models_of_which_nothing_is_known(tmp_path):
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    closed = tokens(tokenizer, " <eos>")
    for rows in (
        tokens(tokenizer, ""),
        closed.map(lambda row, i: {"input_ids": row["input_ids"][: -1 - i % 2]}, with_indices=True),
    ):
        diffusion_trainer(tmp_path, model, tokenizer, None, None, train=rows)
        assert facts(model).rows_end is None
        assert not told(model, tokenizer, OPEN)
    diffusion_trainer(tmp_path, model, tokenizer, None, None, train=closed)
    assert facts(model).rows_end == tokenizer.eos_token_id
    # a later training on other rows takes its place
    diffusion_trainer(tmp_path, model, tokenizer, None, None, train=tokens(tokenizer, ""))
    assert facts(model).rows_end is None
    # block by block, a text need not be whole
    model, tokenizer = convert(*softar.load("mnns-tiny", seed=0), block_length=4)
    diffusion_trainer(tmp_path, model, tokenizer, None, None, train=mnns(SECOND))
    assert facts(model).rows_end is None


@pytest.mark.parametrize("end", [-1, 90, 1.0, True, "2"])
def test_an_end_outside_the_vocabulary_is_named(end):
    model, _ = load("mnns-diffusion-tiny", seed=0)
    model.config.diffusion_process = {"kind": "masked", "rows_end": end}
    with pytest.raises(ValueError, match=r"diffusion_process=.*rows_end must be an id below 90"):
        facts(model)
