"""recipes/bench_latin.py without its trainings: what it decodes, what it leaves, how it goes on."""

import itertools
import json
from pathlib import Path

import pytest

import softar
from softar.diffusion import load
from softar.diffusion.convert import convert
from softar.diffusion.head import save_head
from softar.diffusion.net import facts
from softar.recipes import bench_latin


@pytest.fixture
def trainings(monkeypatch):
    """In place of the recipe: models as drawn, and what it would have been called with."""
    calls = []

    def run(command, check):
        words = dict(itertools.pairwise(command))
        folder, shipped = Path(words["--output_dir"]), load("latin-block-tiny")[0]
        last = int(words["--seed"]) + int(words["--num_seeds"]) - 1
        calls.append((folder.name, last, command[-2:]))
        for row in words["--rows"].split(","):
            if "--from_causal" in words:
                causal = softar.load(words["--model_name_or_path"], seed=last)
                model, tokenizer = convert(*causal, shift=int(words["--shift"]))
                assert facts(model).block_length is None
            else:
                task = words.get("--task", "latin-prompt")
                net = {"latin": "latin-diffusion-tiny", "latin-prompt": "latin-block-tiny"}[task]
                model, tokenizer = load(net, seed=last)
            for part in (model, tokenizer):
                part.save_pretrained(folder / f"{row}-seed{last}")
            if row == "soft-mask":
                save_head(facts(shipped).soft_mask, folder / f"{row}-seed{last}")

    monkeypatch.setattr(bench_latin.subprocess, "run", run)
    return calls


def run(folder, *words):
    bench_latin.main(bench_latin.parse(["--output_dir", str(folder), *words]))
    return json.loads((folder / "decoded.json").read_text())


def test_each_model_is_trained_and_decoded_once(trainings, tmp_path, capsys, monkeypatch):
    steps, threshold = bench_latin.BUDGETS[1], bench_latin.BUDGETS[-1]
    assert "steps" in steps and "threshold" in threshold
    monkeypatch.setattr(bench_latin, "BUDGETS", [steps, threshold])
    first = run(tmp_path, "--num_seeds", "1", "--limit", "4", "--", "--max_steps", "2")
    ways = len(bench_latin.BUDGETS)
    assert len(first) == 3 * 3 * ways and {line["seed"] for line in first} == {42}
    assert trainings == [(kind, 42, ["--max_steps", "2"]) for kind in bench_latin.KINDS]
    both = run(tmp_path, "--num_seeds", "2", "--limit", "4")
    assert both[: len(first)] == first and len(both) == 2 * len(first)
    assert [call[:2] for call in trainings[3:]] == [(kind, 43) for kind in bench_latin.KINDS]
    table = (tmp_path / "table.md").read_text()
    assert len(table.splitlines()) == 2 + 3 * 3 * ways and table in capsys.readouterr().out
    forwards = {(line["kind"], line["budget"]): line["nfe"] for line in both}
    # a row that says an end token needs none of the blocks behind it
    assert 10 < forwards["blocks", "steps 10"] <= 15 and forwards["whole", "steps 10"] == 10
    assert forwards["place", "steps 10"] == 10


@pytest.mark.parametrize(
    "words", [["--num_seeds", "0"], ["--kinds", "block"], ["--limit", "0"], ["--seed", "-1"]]
)
def test_bad_numbers(words, capsys):
    with pytest.raises(SystemExit):
        bench_latin.parse(words)
    assert words[0].strip("-") in capsys.readouterr().err


def test_the_table_has_mean_and_spread():
    line = dict(kind="blocks", training="hard", decoding="hard", budget="steps 5", n=10)
    line |= dict(nfe=10.0, token_forwards=50.0, seconds=0.02)
    lines = [line | dict(seed=s, accuracy=a) for s, a in enumerate((0.25, 0.5, 0.75))]
    cells = bench_latin.table(lines).splitlines()[-1].strip("| ").split(" | ")
    place = bench_latin.table([line | dict(kind="place", seed=0, accuracy=0.5)])
    assert place.splitlines()[-1].split(" | ")[7] == "2.00", "20 open cells"
    assert cells == "blocks,hard,hard,steps 5,3,0.500 ± 0.250,10.0,2.50,50,2.00".split(",")
