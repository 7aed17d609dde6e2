"""The measurements of diffusion as they are run, at the smallest size."""

import json
import os
import runpy
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
TINY = [
    "--size",
    "tiny",
    "--prompt",
    "8",
    "--prompts",
    "8",
    "16",
    "--new_tokens",
    "8",
    "--block_length",
    "4",
    "--repeats",
    "2",
    "--soften",
    "hard",
    "soft-mask",
]


def rows(bench, folder, *more):
    done = warm.run(
        ROOT / "recipes" / "bench_diffusion.py", [bench, *TINY, *more, "--output", folder], ENV
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{bench}.json").read_text())["rows"]


@pytest.mark.slow
def test_denoise_times_every_cache_and_softener(tmp_path):
    lines = rows("denoise", tmp_path)
    assert [(row["cache"], row["sampler"]) for row in lines] == [
        (cache, f"ours, {soften}")
        for cache in ("none", "prefix", "dual")
        for soften in ("hard", "soft-mask")
    ]
    for row in lines:
        assert len(row["seconds"]) == 2 and row["floor_ms"] > 0
        assert row["low"] <= row["ratio"] <= row["high"]
        # one token a forward
        assert row["ms_per_forward"] == pytest.approx(1000 / row["tokens_per_s"])
        assert row["ratio"] == 1 or row["sampler"] != "ours, hard"


@pytest.mark.slow
def test_overhead_is_that_of_the_softeners_over_hard(tmp_path):
    lines = rows("overhead", tmp_path)
    assert [(row["cache"], row["soften"]) for row in lines][:2] == [
        ("none", "hard"),
        ("none", "soft-mask"),
    ]
    assert [row["ratio"] == 1 for row in lines] == [True, False] * 3


@pytest.mark.slow
def test_prompt_length_times_the_inner_steps(tmp_path):
    lines = rows("prompt-length", tmp_path)
    assert [row["prompt"] for row in lines] == [8, 16]
    for row in lines:
        assert row["low"] <= row["ms_per_inner_step"] <= row["high"]
        assert row["rest_ms"] + row["attention_ms"] == pytest.approx(row["ms_per_inner_step"])


@pytest.mark.slow
def test_memory_of_softening_stands_beside_the_dense_form(tmp_path):
    peak = {row["what"]: row["peak_mb"] for row in rows("memory", tmp_path)}
    assert 0 < 5 * peak["softening a block, soft-mask"] < peak["soft masking, dense [B, L, V]"]


@pytest.mark.rest
def test_the_mask_of_a_doubled_row_is_most_of_what_making_it_takes(tmp_path):
    for row in rows("doubled-row", tmp_path):
        assert row["mask_mb"] == 4 * row["T"] ** 2 / 1e6
        assert row["making_it_mb"] < 2 * row["mask_mb"]
        assert row["no mask, float32"] < row["mask, float32"]


@pytest.mark.rest
def test_the_first_of_two_passes_keeps_no_graph(tmp_path):
    held = {row["way"]: row["held_mb"] for row in rows("training", tmp_path, "--repeats", "1")}
    # a graph of its own would make it 2
    assert 0 < held["hard"] < held["two passes always"] < 1.2 * held["hard"]


@pytest.mark.parametrize(
    "options, says",
    [
        (["--against", "FOLDER"], "--against FOLDER: no generate.py is in it"),
        (
            ["--against", "LLADA", "--original", "LLADA/gone.py"],
            "--original LLADA/gone.py: no such",
        ),
        (["--original", "gone.py"], "--original needs --against"),
    ],
)
def test_public_code_that_is_not_there_is_named(tmp_path, monkeypatch, capsys, options, says):
    for name in ("FOLDER", "LLADA"):
        (tmp_path / name).mkdir()
    (tmp_path / "LLADA" / "generate.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bench_diffusion.py", "denoise", *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "recipes" / "bench_diffusion.py"), run_name="__main__")
    assert end.value.code == 2 and says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FOLDER", "LLADA"]
