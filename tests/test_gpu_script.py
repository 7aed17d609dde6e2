"""recipes/gpu.py and gpu_wheels.py without a GPU: the dry run, what is recorded, what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
GPU = RECIPES / "gpu.py"
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
PARTS = ["tests", "decode", "denoise", "train", "mnns"]


@pytest.fixture
def recipes(monkeypatch):
    """Recipes import each other by name, from their own folder."""
    monkeypatch.syspath_prepend(str(RECIPES))


def gpu(*arguments, **options):
    command = [sys.executable, str(GPU), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=ENV, **options)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_its_rows_are_measurements(dry):
    rows = rows_of(dry[0])
    tests = measured(rows, "tests")
    assert len(tests) > 80 and {row["outcome"] for row in tests} == {"passed"}
    assert any("largest difference" in row["measured"] for row in tests)
    decode = [row for row in measured(rows, "decode") if "tokens_per_s" in row]
    whats = {row["what"] for row in decode}
    assert {"model.generate", "softar hard", "model.generate, compiled"} <= whats
    assert {(row["model"], row["batch"]) for row in decode} == {
        (model, batch) for model in ("Qwen3-8B", "Qwen3-0.6B") for batch in (1, 2)
    }
    denoise = [row for row in measured(rows, "denoise") if "tokens_per_s" in row]
    assert len(denoise) == 5 * 3 + 2 * 3
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


@pytest.mark.slow
def test_a_second_call_leaves_out_what_has_rows(dry):
    folder, _ = dry
    before = rows_of(folder)
    done = gpu("--dry_run", "--output", folder)
    assert done.returncode == 0 and done.stdout.count("has rows in") == len(PARTS)
    assert rows_of(folder) == before


# -- parts that go wrong: scripts in place of the parts' own processes


def script(code):
    return [sys.executable, "-c", code]


ROW = (
    "import sys; from pathlib import Path; sys.path.insert(0, {recipes!r}); from gpu import append;"
    "append(Path({folder!r}), dict(part={part!r}, what='a row'), 'c');"
)
HANG = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "open({pid!r}, 'w').write(str(child.pid)); time.sleep(600)"
)


@pytest.fixture
def commands(tmp_path):
    """command_of for gpu.main: `code` by part; each writes a row first."""

    def make(**code):
        def command_of(name, args, seconds):
            values = dict(recipes=str(RECIPES), folder=str(args.output), part=name)
            return script(ROW.format(**values) + code.get(name, ""))

        return command_of

    return make


def test_a_part_that_hangs_or_fails_costs_only_itself(recipes, commands, tmp_path, capsys):
    from gpu import main

    pid = tmp_path / "pid"
    code = commands(decode=HANG.format(pid=str(pid)), denoise="sys.exit(3)")
    # decode has 150 of 420 shares: its limit is a third of what is left of these minutes
    options = ["--dry_run", "--minutes", "1.2", "--output", str(tmp_path / "out"), "--commit", "c"]
    assert main(options, code) == 1
    rows = rows_of(tmp_path / "out")
    outcomes = {row["part"]: row["status"] for row in rows if row["what"] == "outcome"}
    assert outcomes == {
        **dict.fromkeys(PARTS, "done"),
        "decode": "out of time",
        "denoise": "failed (3)",
    }
    assert [row["part"] for row in rows if row["what"] == "a row"] == PARTS
    assert not alive(int(pid.read_text())), "what a part started must end with it"
    assert "out of time" in capsys.readouterr().out


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_resuming_and_starting_anew(recipes, commands, tmp_path):
    from gpu import main

    folder = tmp_path / "out"

    def run(*options, **code):
        main(["--dry_run", "--output", str(folder), "--commit", "c", *options], commands(**code))
        return [(row["part"], row["what"]) for row in rows_of(folder)]

    pair = [("train", "a row"), ("train", "outcome")]
    assert run("--parts", "train") == pair
    both = [*pair, ("mnns", "a row"), ("mnns", "outcome")]
    assert run("--parts", "train,mnns") == both
    assert run("--parts", "train,mnns") == both
    assert run("--parts", "train", "--anew") == both[2:] + pair


def test_an_interrupted_run_keeps_what_was_measured(tmp_path):
    """As Ctrl-C, and as a machine that ends a command which ran too long."""
    for number in (signal.SIGINT, signal.SIGTERM):
        folder, pid = tmp_path / number.name, tmp_path / f"{number.name}.pid"
        code = ROW.format(recipes=str(RECIPES), folder=str(folder), part="train")
        code += HANG.format(pid=str(pid))
        program = (
            f"import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
            f"sys.path.insert(0, {str(RECIPES)!r}); import gpu;"
            f"sys.exit(gpu.main(['--dry_run', '--parts', 'train', '--output', {str(folder)!r}],"
            f" lambda *a: [sys.executable, '-c', {code!r}]))"
        )
        child = subprocess.Popen(script(program), stdout=subprocess.PIPE, text=True, env=ENV)
        deadline = time.monotonic() + 120
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
