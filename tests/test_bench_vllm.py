"""The measurements of soft decoding inside vLLM as they are run, at the smallest size."""

import importlib.util
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import warm
from engine_script import FORKING, model_of
from test_vllm import alive

pytestmark = pytest.mark.rest
ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "bench_vllm.py"
ENV = os.environ | FORKING | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
QUICK = ["--concurrency", "4", "--tokens", "6", "--prompt_tokens", "5", "--pause", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    model_of("llama").save_pretrained(place)
    tiny.tokenizer_of().save_pretrained(place)
    return place


def start(folder, output, *more):
    return warm.Program(RECIPE, ["--model", folder, *QUICK, "--output", output, *more], ENV)


def test_every_mode_is_timed_beside_its_own_base(folder, tmp_path):
    with start(folder, tmp_path, "--repeats", "2") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    rows = {row["mode"]: row for row in json.loads((tmp_path / "vllm.json").read_text())["rows"]}
    bases = dict(none=None, plugin="none", soft="plugin", mixed="plugin", record="plugin")
    assert {mode: row["over"] for mode, row in rows.items()} == bases
    for mode, row in rows.items():
        assert (
            mode in out
            and row["concurrent"] == 4
            and min(row["runs"]) > 0
            and len(row["runs"]) == 2
        )
        assert row["tokens_per_s"] == pytest.approx(sum(row["runs"]) / 2)
        if mode == "none":
            assert row["ratio"] is None
        else:
            low, high = sorted(a / b for a, b in zip(row["runs"], rows[bases[mode]]["runs"]))
            wanted = [low, (low + high) / 2, high]
            assert [row["ratio_low"], row["ratio"], row["ratio_high"]] == pytest.approx(wanted)


def test_ctrl_c_leaves_no_processes(folder, tmp_path):
    with start(folder, tmp_path, "--modes", "soft", "--repeats", "1000") as process:
        end = time.monotonic() + 120
        tree = []
        while not any(p.name().startswith("VLLM::Worker") for p in tree):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
            tree = psutil.Process(process.pid).children(recursive=True)
        group = os.getpgid(tree[-1].pid)
        assert group != os.getpgid(process.pid) and len(alive(group)) > 1
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert alive(group) == [] and not (tmp_path / "vllm.json").exists()


def test_what_vllm_refuses_is_said_in_one_line(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Nothing"]}))
    with start(tmp_path, tmp_path, "--modes", "soft") as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 2 and err.count("\n") == 1
    assert err.startswith("bench_vllm.py: error: ") and "Nothing" in err
    assert err.endswith(f"(its log: {tmp_path / 'vllm-plugin.log'})\n")


@pytest.mark.parametrize(
    "options, says",
    [
        (["--concurrency", "0"], "--concurrency: '0' must be a whole number from 1 on"),
        (["--modes", "hard"], "invalid choice: 'hard'"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_bad_options(options, says, tmp_path, monkeypatch, capsys):
    assert says in refused(monkeypatch, capsys, "--output", str(tmp_path), *options)


def test_without_vllm(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name)
    )
    assert "error: vLLM is not installed: `pip install" in refused(
        monkeypatch, capsys, "--output", str(tmp_path)
    )


def refused(monkeypatch, capsys, *options):
    """The last line of what it says, having started nothing."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *options])
    monkeypatch.syspath_prepend(str(RECIPE.parent))
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
