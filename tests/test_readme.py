"""What the README prints runs, and what it claims stands in RESULTS.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_block(number):
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_the_diffusion_example_runs():
    lines = run_block(1).stdout.strip().splitlines()
    assert re.fullmatch(r"\['.*', '.*'\] \d+", lines[-1]) and "<mask>" not in lines[-1]


def test_the_comparison_runs():
    done = run_block(2)
    assert (
        "mnns-soft-tiny=soft" in done.stdout
        and "self-consistency" not in done.stdout.splitlines()[-1]
    )


@pytest.mark.slow
def test_the_python_example_runs():
    done = run_block(0)
    text, *mixtures = done.stdout.strip().splitlines()[-4:]
    assert "sky" in done.stdout and text
    for line in mixtures:
        weights = re.findall(r": ([\d.]+)", line)
        assert weights and 0.5 < sum(map(float, weights)) <= 1.01


def test_every_figure_stands_in_the_results():
    results = (ROOT / "RESULTS.md").read_text()
    figures = set(
        re.findall(
            r"(?<!\d)(?:0)?(\.\d{3})(?!\d)", re.sub(r"```.*?```", "", README, flags=re.DOTALL)
        )
    )
    assert figures and not [f for f in figures if f not in results]


def test_the_files_it_names_exist():
    for name in re.findall(r"recipes/[\w./]+\.(?:py|yaml)|`(?:softar|diffusion)/\w+\.py`", README):
        assert (ROOT / name.strip("`")).is_file(), name
    for target in re.findall(r"`?make (\w+)", README):
        if target not in ("and",):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
