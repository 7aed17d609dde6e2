"""What the tests of the recipes share: the real command line, in processes of its own or in this
one."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CI": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
PYTHON = [sys.executable]
ALONE = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
ACCELERATE = [BIN / "accelerate", "launch", *ALONE.split()]


def recipe(name):
    return str(ROOT / "recipes" / f"{name}.py")


def argv(options):
    """{"a": 1, "b": None} -> ["--a", "1"]"""
    return [
        str(x) for name, value in options.items() if value is not None for x in (f"--{name}", value)
    ]


def run(*command, code=0, processes=1):
    """`python FILE ...` in processes forked from one with the imports behind it, all else as it
    stands."""
    command = [*map(str, command)]
    if command[:1] == PYTHON:
        done = warm.run(command[1], command[2:], ENV, processes=processes)
    else:
        done = subprocess.run(command, env=ENV, cwd="/", capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def run_here(monkeypatch, recipe, *args):
    """In this process, to save the imports."""
    monkeypatch.setattr(sys, "argv", [recipe, *args])
    return runpy.run_path(recipe, run_name="__main__")


def assert_fails(monkeypatch, capsys, recipe, args, says):
    """It ends with code 2 and one line, before any training."""
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **kw: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, recipe, *args)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith(f"{Path(recipe).name}: error: "), error
    assert re.search(says, error), error


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def losses_of(folder, step):
    history = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())[
        "log_history"
    ]
    return [entry["loss"] for entry in history if "loss" in entry]
