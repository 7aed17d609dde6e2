"""Models stay open for as long as their files stay the same; a sweep knows its rows and weights."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model

import softar
from softar import make_decoder
from softar.diffusion import load as load_diffusion
from softar.evals.sweep import Grid, sweep
from softar.models.stamp import stamp_of

PROMPT = "<bos> D4 D8 D1 D3 ->"


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shake(model, std=0.5):
    for parameter in model.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=RNG)


RNG = torch.Generator().manual_seed(0)
KINDS = {
    "autoregressive": ("mnns-soft-tiny", softar.load, "discrete"),
    "diffusion": ("mnns-diffusion-tiny", load_diffusion, "hard"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_has_the_weights_that_the_folder_has_now(kind, tmp_path):
    name, load, decoder = KINDS[kind]
    model, tokenizer = load(name)
    for _ in range(3):  # training goes on, into the same folder
        save(model, tokenizer, tmp_path)
        made = make_decoder(f"{tmp_path}={decoder}", max_new_tokens=4)
        opened = dict(made.model.named_parameters())
        assert all(torch.equal(opened[key], value) for key, value in model.named_parameters())
        assert make_decoder(f"{tmp_path}={decoder}", max_new_tokens=4).model is made.model
        shake(model)


def test_the_base_of_an_adapter_counts_too(tmp_path):
    base, tokenizer = softar.load("mnns-soft-tiny")
    save(base, tokenizer, tmp_path / "base")
    adapter = get_peft_model(
        softar.load(tmp_path / "base")[0], LoraConfig(target_modules=["q_proj"])
    )
    adapter.save_pretrained(tmp_path / "adapter")
    before = stamp_of(tmp_path / "adapter")
    assert before == stamp_of(tmp_path / "adapter")
    shake(base)
    save(base, tokenizer, tmp_path / "base")
    assert stamp_of(tmp_path / "adapter") != before
    assert stamp_of("owner/name") == stamp_of("mnns-tiny") == ()


@pytest.fixture
def grid(tmp_path):
    """Of four rows and a model in a folder."""
    write(tmp_path / "rows.jsonl", 4)
    save(*softar.load("mnns-soft-tiny"), tmp_path / "model")
    task = str(tmp_path / "rows.jsonl")
    return Grid(
        tasks=[task], soft=["soft"], models={task: str(tmp_path / "model")}, max_new_tokens=5
    )


def write(file, n, answer="S0"):
    rows = [{"prompt": PROMPT, "answer": answer}] * n
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_sweep_reads_the_rows_anew_and_mixes_no_others_in(grid, tmp_path):
    folder = tmp_path / "sweep"
    assert sweep(grid, folder)[0]["n"] == 4 and len(sweep(grid, folder)) == 1
    for n, answer in ((6, "S0"), (4, "S1")):
        write(tmp_path / "rows.jsonl", n, answer)
        with pytest.raises(
            ValueError, match=r"the rows of task='.*rows\.jsonl' have changed since"
        ):
            sweep(grid, folder)
        assert sweep(grid, tmp_path / f"of {n}")[0]["n"] == n
    write(tmp_path / "rows.jsonl", 4)
    assert len(sweep(grid, folder)) == 1


def test_a_sweep_mixes_no_other_weights_in(grid, tmp_path, monkeypatch):
    folder, weights = tmp_path / "sweep", tmp_path / "model" / "model.safetensors"
    sweep(grid, folder)
    os.utime(weights, ns=(0, 0))
    with pytest.raises(ValueError, match=r"the files of model='.*model' have changed since"):
        sweep(grid, folder)
    # a folder of an earlier version, which did not note them
    known = json.loads((folder / "grid.json").read_text())
    (folder / "grid.json").write_text(
        json.dumps({k: v for k, v in known.items() if k not in ("rows", "weights")})
    )
    assert len(sweep(grid, folder)) == 1
    perform = softar.evals.sweep._perform

    def trained_meanwhile(*args):
        perform(*args)
        os.utime(weights, ns=(1, 1))

    monkeypatch.setattr(softar.evals.sweep, "_perform", trained_meanwhile)
    with pytest.raises(ValueError, match="have changed since"):
        sweep(grid, tmp_path / "other")
