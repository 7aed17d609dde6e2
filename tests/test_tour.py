"""recipes/tour.py, as it is run and as a notebook would have it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.rest

TOUR = Path(__file__).resolve().parent.parent / "recipes" / "tour.py"


def test_it_runs_and_shows_what_it_promises(tmp_path):
    done = subprocess.run([sys.executable, TOUR], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr.strip(), done.stderr
    for part in (
        r"the belief after the prompt: S-?4 0\.5\d  S-?4 0\.[45]\d",
        r"k-samples: S",
        r"by hand: S-?4 .*S0",
        r"2  soft    S-?12 .* S-?12 0\.2\d  S-?12 0\.2\d  S-?4 0\.2\d  S-?4 0\.2\d",
        r"hard: \d+ of 100 squares.*\n *soft-mask: \d+ of 100",
        r"mnns, 128 rows",
    ):
        assert re.search(part, done.stdout), part
    hard, soft = map(int, re.findall(r"(\d+) of 100 squares", done.stdout))
    assert soft > hard
    lines = re.findall(r"->   (\d \d \d \d \d)$", done.stdout, re.MULTILINE)
    assert len(lines) == 5 and all(sorted(line.split()) == list("12345") for line in lines)


def test_each_cell_begins_with_a_word_or_two():
    text = TOUR.read_text()
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
    assert len(cells) >= 7
    for cell in cells:
        title, first = cell.splitlines()[:2]
        assert title.strip() and first.startswith(("# ", '"""')), cell[:80]
