"""recipes/sft_diffusion.py as its users run it: subprocesses of the real command line, a few steps
each."""

import re
import runpy
import shutil

import pytest
from datasets import Dataset
from launched import PYTHON, argv, assert_fails, recipe, results_of, run, run_here
from launched import losses_of as losses_at

from softar.diffusion import load
from softar.diffusion.evaluate import most_blocks
from softar.diffusion.head import HEAD_FILE, load_head
from softar.diffusion.net import facts
from softar.files import dataset_of
from softar.recipe import read

RECIPE = recipe("sft_diffusion")
QUICK = {
    "max_steps": 5,
    "task_size": 200,
    "eval_rows": 50,
    "logging_steps": 1,
    "save_steps": 2,
    "warmup_steps": 1,
    "per_device_train_batch_size": 32,
}


def options(folder, **changes):
    return argv({**QUICK, **changes, "output_dir": folder})


def train(command, folder, code=0, processes=1, **changes):
    arguments = options(folder, **changes)
    return run(*command, RECIPE, *arguments, code=code, processes=processes)


def losses_of(folder):
    """Up to the newest checkpoint."""
    return losses_at(folder, max(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")))


@pytest.mark.slow
def test_the_demo_ends_with_table_results_and_plot(tmp_path):
    out = train(PYTHON, tmp_path).stdout
    head, *lines = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in out.splitlines()
        if line[:1] in "│┃"
    ]
    assert head == ["training", "decoder", "4", "8", "12", "20"]
    assert [tuple(line[:2]) for line in lines] == [
        ("hard", "hard"),
        ("hard", "soft-token"),
        ("soft-mask", "hard"),
        ("soft-mask", "soft-mask"),
    ]
    results = results_of(tmp_path)
    assert results["schema"] == 1 and "--max_steps 5" in results["command"]
    assert {(r["training"], r["decoder"], r["budget"]) for r in results["rows"]} == {
        (t, d, b) for t, d in map(lambda line: line[:2], lines) for b in (4, 8, 12, 20)
    }
    for row in results["rows"]:
        assert row["nfe"] == row["budget"] and row["n"] == 50 and row["train_steps"] == 5
        assert row["task"] == "latin" and row["schedule"] == "uniform" and row["seed"] == 42
    assert (tmp_path / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # each row's folder is a model that decodes as it was trained
    soft, _ = load(tmp_path / "soft-mask-seed42")
    assert facts(soft).soft_mask == load_head(tmp_path / "soft-mask-seed42")
    hard, _ = load(tmp_path / "hard-seed42")
    assert facts(hard).soft_mask is None and not (tmp_path / "hard-seed42" / HEAD_FILE).exists()


@pytest.mark.slow
def test_mnns_schedules_and_the_row_of_equal_compute(tmp_path):
    train(
        PYTHON,
        tmp_path,
        task="mnns",
        rows="hard-long",
        schedules="pyramid,threshold",
        likelihood_samples=2,
    )
    rows = results_of(tmp_path)["rows"]
    (bound,) = {r["nll_bound"] for r in rows}
    assert 3.5 < bound < 5.0  # hardly trained: near the log of the 90 words
    assert {r["train_steps"] for r in rows} == {9} and {r["model"] for r in rows} == {
        "mnns-diffusion-tiny"
    }
    assert {r["schedule"] for r in rows} == {"pyramid", "threshold"} and all(
        1 <= r["nfe"] <= 5 for r in rows
    )


@pytest.mark.rest
def test_an_interrupted_run_goes_on_exactly(tmp_path):
    changes = dict(rows="soft-mask", task="latin", max_steps=6, save_total_limit=9)
    whole, half = (tmp_path / name / "soft-mask-seed42" for name in ("whole", "half"))
    train(PYTHON, whole.parent, **changes)
    train(PYTHON, half.parent, **changes)
    # as if it had been killed after the first checkpoint
    for gone in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(half / gone)
    (half / "row.json").unlink()
    train(PYTHON, half.parent, resume_from_checkpoint="true", **changes)
    assert losses_of(half) == losses_of(whole) and len(losses_of(half)) == 6
    for name in ("model.safetensors", HEAD_FILE):
        assert (half / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Every objective and normalisation: tests/test_diffusion_batches.py."""
    changes = dict(task="latin", rows="soft-mask", max_steps=4)
    train(PYTHON, tmp_path / "one", **changes)
    half = changes | {"per_device_train_batch_size": 16}
    train(PYTHON, tmp_path / "two", processes=2, **half)
    assert losses_of(tmp_path / "two/soft-mask-seed42") == pytest.approx(
        losses_of(tmp_path / "one/soft-mask-seed42"), abs=2e-4
    )
    heads = [load_head(tmp_path / name / "soft-mask-seed42") for name in ("one", "two")]
    assert heads[0]["scale"] == pytest.approx(heads[1]["scale"], abs=1e-4) != 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(likelihood_samples=-1), "likelihood_samples=-1"),
        (
            dict(likelihood_samples=2, rows="duo", task="mnns", schedules="uniform"),
            "likelihood_samples=2 bounds a likelihood by masks",
        ),
        (dict(eval_rows=0), "eval_rows=0 must be at least 1"),
        (dict(rows="soft"), "rows='soft': 'soft' is unknown"),
        (dict(schedules="uniform,cosine"), "'cosine' is unknown"),
        (
            dict(rows="hard,hard-long", softmasking_prob=0.3),
            "softmasking_prob=0.3 does nothing with",
        ),
        (dict(rows="hard", head_k=3), "head_k=3 does nothing with the rows hard"),
        (dict(rows="duo", objective="masked"), "objective='masked' does nothing with the rows duo"),
        (dict(block_length=4), "block_length=4 does nothing for 'latin-diffusion-tiny'"),
        (dict(shift=0), "shift=0 does nothing for 'latin-diffusion-tiny'"),
        (dict(kind="a2d"), "kind=a2d does nothing for 'latin-diffusion-tiny'"),
        (
            dict(model_name_or_path="mnns-tiny", task="mnns", from_causal="true", mask_token_id=3),
            "mask_token_id=3 is about diffusion models",
        ),
        (dict(task="latins"), "task='latins' is unknown"),
        (dict(time_low=0.9, time_high=0.1), "time_low=0.9, time_high=0.1"),
        (dict(rows="soft-mask", head_scale=1.5), "scale=1.5"),
        (dict(task="reasoning_gym:chain_sum"), "has no model of its own"),
        (dict(model_name_or_path="mnns-tiny", task="mnns"), "it reads from left to right"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, changes, says, monkeypatch, capsys):
    """In this process: to start another for each takes longer than all else."""
    if "reasoning_gym" in changes.get("task", ""):
        pytest.importorskip("reasoning_gym")
    assert_fails(monkeypatch, capsys, RECIPE, options(tmp_path, **changes), says)


@pytest.mark.slow
def test_bad_input_of_a_process_of_its_own(tmp_path):
    done = train(PYTHON, tmp_path, code=2, rows="soft")
    assert "rows='soft': 'soft' is unknown" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_causal_model_becomes_a_diffusion_model(tmp_path):
    train(
        PYTHON,
        tmp_path,
        task="mnns",
        model_name_or_path="mnns-tiny",
        from_causal="true",
        softmasking_prob=0.8,
    )
    model, tokenizer = load(tmp_path)
    assert facts(model).shift == 1 and facts(model).soft_mask is not None
    assert tokenizer.mask_token_id == facts(model).mask_id


def test_a_causal_model_becomes_block_causal_and_is_decoded(tmp_path, monkeypatch, capsys):
    changes = dict(max_steps=1, task_size=32, eval_rows=4, block_length=2, shift=0)
    changes |= dict(task="mnns", model_name_or_path="mnns-tiny", from_causal="true")
    run_here(monkeypatch, RECIPE, *options(tmp_path, **changes))
    model, _ = load(tmp_path)
    assert (facts(model).block_length, facts(model).shift) == (2, 0)
    budgets = {row["budget"] for row in results_of(tmp_path)["rows"]}
    assert min(budgets) >= 3, budgets


@pytest.mark.parametrize(
    ("folder", "said", "want"),
    [
        ("a2d_qwen3", dict(mask_token_id=300, block_length=8, shift=1), (300, 8, 1, "a2d")),
        ("opendcoder", dict(kind="open_dcoder", mask_token_id=300), (300, None, 1, "open_dcoder")),
        ("llada2_moe", dict(mask_token_id=300, eos_token_id=301), (300, 32, 0, "llada2")),
    ],
)
def test_what_a_folder_does_not_say_is_said_by_options(tmp_path, folder, said, want):
    """Open-dCoder's looks like a causal model's, once its generation_config.json is gone."""
    copy = shutil.copytree(f"tests/golden-block/checkpoints/{folder}", tmp_path / folder)
    (copy / "generation_config.json").unlink(missing_ok=True)
    recipe = runpy.run_path(RECIPE)
    inputs = read(recipe["RECIPE"], options(tmp_path, task="mnns", model_name_or_path=copy, **said))
    known = facts(recipe["open_model"](inputs, 0)[0])
    assert (known.mask_id, known.block_length, known.shift, known.family) == want
    assert known.eos_id == said.get("eos_token_id", known.eos_id)


def test_steps_below_the_blocks_are_left_out():
    tokenizer = load("mnns-diffusion-tiny")[1]
    for slots in range(1, 12):
        row = {"template": "<bos> D1 -> " + " ".join(["<mask>"] * slots) + " S0 <eos>"}
        for length in range(1, 8):
            spans = [range(at, at + slots) for at in range(length)]
            most = max(len({i // length for i in span}) for span in spans)
            assert most_blocks(row, tokenizer, length) == most


def test_of_a_conversation_the_last_message_is_learnt():
    talk = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    rows = runpy.run_path(RECIPE)["last_answers"](Dataset.from_list([{"messages": talk}] * 2))
    assert rows.column_names == ["prompt", "completion"]
    assert rows[0] == {"prompt": talk[:3], "completion": talk[3:]}


def test_what_later_messages_hold_is_kept(tmp_path):
    """`map` looks at a thousand rows to find what there is, and failed at another key."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    calls = [*talk, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    rows = [{"messages": talk}] * 1001 + [{"messages": calls}]
    read = dataset_of("rows.jsonl", rows)
    made = runpy.run_path(RECIPE)["last_answers"](read)
    assert made[0] == {"prompt": talk[:1], "completion": talk[1:]}
    assert made[1001] == {"prompt": talk, "completion": calls[2:]}


FOLDER = dict(model_name_or_path="mnns-diffusion-tiny", max_steps=1, save_strategy="no")


def folder_of(path, train, test):
    path.mkdir()
    for name, columns in (("train", train), ("test", test)):
        rows = [
            {"prompt": f"<bos> D{i} D2 D1 D3 ->", "completion": " S4 S-4 S-3 S0", "answer": "S0"}
            for i in range(4)
        ]
        rows[0]["completion"] = " S0"  # the longest counts, not the first
        rows = Dataset.from_list(rows)
        if "text" in columns:
            rows = rows.map(lambda row: {"text": row["prompt"] + row["completion"]})
        rows.select_columns(columns).to_json(path / f"{name}.jsonl")
    return path


def test_held_out_rows_without_completions_get_the_slots_of_the_longest_that_is_learnt(
    tmp_path, monkeypatch
):
    asked = ["prompt", "answer"]
    task = folder_of(tmp_path / "rows", [*asked, "completion"], asked)
    changes = dict(FOLDER, task=task, task_size=None, eval_rows=None)
    changes = {name: value for name, value in ({**QUICK} | changes).items() if value is not None}
    run_here(monkeypatch, RECIPE, *argv({**changes, "output_dir": tmp_path / "out"}))
    budgets = {line["budget"] for line in results_of(tmp_path / "out")["rows"]}
    assert budgets == {4, 5}  # four words and the end


def test_schedules_of_what_nobody_decodes_are_refused(tmp_path, monkeypatch, capsys):
    rows = folder_of(tmp_path / "rows", ["prompt", "completion"], ["prompt", "completion"])
    told = argv(dict(FOLDER, dataset_name=rows, schedules="pyramid", output_dir=tmp_path / "out"))
    says = "schedules='pyramid': nothing is decoded, as '.*rows' has no scorer"
    assert_fails(monkeypatch, capsys, RECIPE, told, says)


def test_no_completion_anywhere_is_named_before_a_model_is_opened(tmp_path, monkeypatch, capsys):
    asked = ["prompt", "answer"]
    task = folder_of(tmp_path / "rows", [*asked, "text"], asked)
    told = argv(dict(FOLDER, task=task, output_dir=tmp_path / "out"))
    assert_fails(monkeypatch, capsys, RECIPE, told, "no completion says how many tokens")
