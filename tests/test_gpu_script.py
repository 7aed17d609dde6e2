"""recipes/gpu.py and gpu_wheels.py without a GPU: the dry run, what is recorded, what goes wrong."""

import json
import os
import signal
import time
import zipfile
from pathlib import Path

import pytest
import warm

from softar.diffusion import SOFTENERS

pytestmark = pytest.mark.rest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
GPU = RECIPES / "gpu.py"
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
PARTS = ["tests", "decode", "denoise", "train", "mnns"]


@pytest.fixture
def recipes(monkeypatch):
    """Recipes import each other by name, from their own folder."""
    monkeypatch.syspath_prepend(str(RECIPES))


def gpu(*arguments):
    return warm.run(GPU, arguments, ENV)


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def measured(rows, part):
    return [row for row in rows if row["part"] == part and row["what"] != "outcome"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """One whole dry run -> folder, what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    done = gpu("--dry_run", "--output", folder, "--minutes", 30, "--commit", "0123abc")
    assert done.returncode == 0, done.stdout[-3000:] + (folder / "log.txt").read_text()[-5000:]
    return folder, done.stdout


def test_a_dry_run_goes_through_every_part(dry):
    folder, printed = dry
    content = json.loads((folder / "results.json").read_text())
    assert content["schema"] == 1 and content["commit"] == "0123abc"
    assert {"torch", "transformers", "trl"} <= {*content["versions"]}
    rows = content["rows"]
    assert {row["commit"] for row in rows} == {"0123abc"} and all(row["device"] for row in rows)
    outcomes = {row["part"]: row["status"] for row in rows if row["what"] == "outcome"}
    assert outcomes == dict.fromkeys(PARTS, "done")
    assert [*dict.fromkeys(row["part"] for row in rows)] == PARTS
    for table in (printed, (folder / "table.md").read_text()):
        assert table.count("\n### ") == len(PARTS) and "commit 0123abc" in table
        assert "| soft GRPO | 2 |" in table


def test_its_rows_are_measurements(dry):
    rows = rows_of(dry[0])
    tests = measured(rows, "tests")
    assert len(tests) > 80 and {row["outcome"] for row in tests} == {"passed"}
    assert any("largest difference" in row["measured"] for row in tests)
    decode = [row for row in measured(rows, "decode") if "tokens_per_s" in row]
    whats = {row["what"] for row in decode}
    ways = ("model.generate", "softar hard", "softar soft, top-k 10")
    assert {name + how for name in ways for how in ("", ", compiled")} <= whats
    assert {(row["model"], row["batch"]) for row in decode} == {
        (model, batch) for model in ("Qwen3-8B", "Qwen3-0.6B") for batch in (1, 2)
    }
    denoise = [row for row in measured(rows, "denoise") if "tokens_per_s" in row]
    assert len(denoise) == len(SOFTENERS) * 3 + 2 * 3
    assert {row["cache"] for row in denoise} == {"none", "prefix", "dual"}
    for row in decode + denoise:
        assert 0 < row["low"] <= row["tokens_per_s"] <= row["high"] and row["repeats"] > 1
        assert 0 < row["of_floor"] <= 1
    train = measured(rows, "train")
    assert [row["what"] for row in train] == ["soft SFT", "soft GRPO", "diffusion SFT"]
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in train)
    mnns = measured(rows, "mnns")
    assert [(row["what"], row["readout"]) for row in mnns] == [
        ("trace-soft", "soft"),
        ("trace-soft", "discrete"),
    ]
    assert all(0 <= row["accuracy"] <= 1 and row["train_steps"] == 2 for row in mnns)


def test_a_second_call_leaves_out_what_has_rows(dry):
    folder, _ = dry
    before = rows_of(folder)
    done = gpu("--dry_run", "--output", folder)
    assert done.returncode == 0 and done.stdout.count("has rows in") == len(PARTS)
    assert rows_of(folder) == before


# -- parts that go wrong: scripts in place of the parts' own processes


PART = """
import subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {recipes!r})
from gpu import append
append(Path(sys.argv[1]), dict(part={part!r}, what="a row"), "c")
{code}
"""
HANG = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path({pid!r}).write_text(str(child.pid))
time.sleep(600)
"""
MAIN = """
import sys
sys.path.insert(0, {recipes!r})
from gpu import main
sys.exit(main(sys.argv[1:], lambda name, args, seconds:
              [sys.executable, {folder!r} + "/" + name + ".py", str(args.output)]))
"""


@pytest.fixture
def program(tmp_path):
    """A program that is gpu.py but for what its parts do: each writes a row, then runs its code."""

    def make(**code):
        values = dict(recipes=str(RECIPES), folder=str(tmp_path))
        for name in PARTS:
            part = PART.format(part=name, code=code.get(name, ""), **values)
            (tmp_path / f"{name}.py").write_text(part)
        file = tmp_path / "main.py"
        file.write_text(MAIN.format(**values))
        return file

    return make


def test_a_part_that_hangs_or_fails_costs_only_itself(program, tmp_path):
    pid = tmp_path / "pid"
    file = program(decode=HANG.format(pid=str(pid)), denoise="sys.exit(3)")
    # decode has 150 of 420 shares: its limit is a third of what is left of these minutes
    options = ["--dry_run", "--minutes", "0.4", "--output", tmp_path / "out", "--commit", "c"]
    done = warm.run(file, options, ENV)
    assert done.returncode == 1
    rows = rows_of(tmp_path / "out")
    outcomes = {row["part"]: row["status"] for row in rows if row["what"] == "outcome"}
    assert outcomes == {
        **dict.fromkeys(PARTS, "done"),
        "decode": "out of time",
        "denoise": "failed (3)",
    }
    assert [row["part"] for row in rows if row["what"] == "a row"] == PARTS
    assert not alive(int(pid.read_text())), "what a part started must end with it"
    assert "out of time" in done.stdout


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_resuming_and_starting_anew(program, tmp_path):
    folder, file = tmp_path / "out", program()

    def run(*options):
        warm.run(file, ["--dry_run", "--output", folder, "--commit", "c", *options], ENV)
        return [(row["part"], row["what"]) for row in rows_of(folder)]

    pair = [("train", "a row"), ("train", "outcome")]
    assert run("--parts", "train") == pair
    both = [*pair, ("mnns", "a row"), ("mnns", "outcome")]
    assert run("--parts", "train,mnns") == both
    assert run("--parts", "train,mnns") == both
    assert run("--parts", "train", "--anew") == both[2:] + pair


def test_an_interrupted_run_keeps_what_was_measured(program, tmp_path):
    """As Ctrl-C, and as a machine that ends a command which ran too long."""
    for number in (signal.SIGINT, signal.SIGTERM):
        folder, pid = tmp_path / number.name, tmp_path / f"{number.name}.pid"
        file = program(train=HANG.format(pid=str(pid)))
        options = ["--dry_run", "--parts", "train", "--output", folder]
        deadline = time.monotonic() + 120
        with warm.Program(file, options, ENV) as child:
            while not (pid.is_file() and pid.read_text()):
                assert time.monotonic() < deadline and child.poll() is None
                time.sleep(0.1)
            child.send_signal(number)
            printed, _ = child.communicate(timeout=60)
        assert child.returncode == 130 and "interrupted" in printed
        assert [row["what"] for row in rows_of(folder)] == ["a row"]
        assert "a row" in (folder / "table.md").read_text()
        assert not alive(int(pid.read_text()))


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--parts", "decode,tset"], "'tset' is unknown"), (["--minutes", "0"], "must be above 0")],
)
def test_wrong_options_are_named(recipes, options, says, capsys):
    from gpu import main

    with pytest.raises(SystemExit) as error:
        main(["--dry_run", *options])
    assert error.value.code == 2 and says in capsys.readouterr().err


def test_without_a_gpu_it_says_so(recipes, capsys, monkeypatch, tmp_path):
    import torch
    from gpu import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--output", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


# -- the wheels


def wheel(folder, name, *needs):
    file = folder / f"{name}-1.0-py3-none-any.whl"
    metadata = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\n{metadata}\nA text.\n")
    return file


def test_what_the_wheels_lack_is_named(recipes, tmp_path):
    from gpu_wheels import CARRIED, missing

    wheels = [wheel(tmp_path, name) for name in CARRIED]
    assert missing(wheels, "3.12") == []  # softar itself needs nothing else
    assert missing(wheels[1:], "3.12") == ["trl (for softar)"]
    odd = wheel(tmp_path, "odd_one", 'x; python_version < "3.12"', 'y; extra == "z"', "un-there>=2")
    assert missing([*wheels, odd], "3.12") == ["un-there (for odd_one)"]
    assert missing([*wheels, odd], "3.11") == ["x (for odd_one)", "un-there (for odd_one)"]


def test_too_many_megabytes_are_an_error(recipes, tmp_path, monkeypatch, capsys):
    import gpu_wheels

    wheels = [wheel(tmp_path, name) for name in gpu_wheels.CARRIED]
    monkeypatch.setattr(gpu_wheels, "collect", lambda *args: wheels)
    gpu_wheels.main([])
    assert "trl-1.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"over --limit_mb 0\.0001"):
        gpu_wheels.main(["--limit_mb", "0.0001"])
