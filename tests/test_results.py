"""RESULTS.md: its commands are understood by the programs that there are, its commits are of this
history, and whoever refers to one of its sections finds it."""

import re
import shlex
import subprocess

import pytest
from test_readme import HANDLERS, PAGES, RESULTS, ROOT, check

CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
OTHERS = {"24cc59e", "189fa7a", "c2041a8", "ca17675"}  # commits of other repositories
COMMIT = r"(?<![\w/.,])[0-9a-f]{7}(?!\w)"
SETTING = re.compile(r"[A-Z_]+=\S*")  # of the environment, before a command


def commands():
    """Those of the indented blocks and those between backticks, without what is set before them."""
    for block in re.findall(r"(?:^    .*\n)+", RESULTS, re.MULTILINE):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if words := of_command(shlex.split(line, comments=True)):
                assert words[0] in HANDLERS, line
                yield shlex.join(words)
    for text in re.findall(r"`([^`]+)`", RESULTS):
        words = of_command(text.split())
        if words and words[0] in HANDLERS and len(words) > 1:
            yield " ".join(words)


def of_command(words):
    while words and SETTING.fullmatch(words[0]):
        words = words[1:]
    return words


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_command_is_right(line, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT if "recipes/" in line or "make " in line else tmp_path)
    check(line, request=request, monkeypatch=monkeypatch, capsys=capsys)


def test_every_section_names_a_commit_and_all_are_of_this_history():
    """One that went when its branch was rebased tells nobody what was measured."""
    for section in re.split(r"^## (?=\d)", RESULTS.split("## Evidence")[0], flags=re.MULTILINE)[1:]:
        assert re.search(COMMIT, section), section.splitlines()[0]
    log = ["git", "rev-list", "HEAD"]
    shallow = ["git", "rev-parse", "--is-shallow-repository"]
    whole = subprocess.run(shallow, cwd=ROOT, capture_output=True, text=True)
    if whole.stdout.strip() != "false":
        pytest.skip("no history here, or not all of it")
    history = subprocess.run(log, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    there = {line[:7] for line in history.split()}
    named = re.findall(COMMIT, RESULTS)
    assert len({*named}) > 50 and {*named} & OTHERS == OTHERS
    assert not {*named} - OTHERS - there
    logs = [file.read_text() for file in (ROOT / "tests/evidence").glob("*/*.json")]
    of_logs = [re.search(r'"commit": "(\w{7})', text)[1] for text in logs]
    assert not {*of_logs} - there


def test_every_section_that_is_named_is_there():
    numbers = {*re.findall(r"^## (\d+)\. ", RESULTS, re.MULTILINE)}
    studies = {*re.findall(r"^### (X\d)\. ", RESULTS, re.MULTILINE)}
    rooms = [
        path
        for room in ("softar", "diffusion", "rl", "recipes")
        for path in (ROOT / room).rglob("*.py")
    ]
    named, asked = [], set()
    for text in (*PAGES.values(), RESULTS, CHANGES):
        prose = " ".join(text.split())
        named += re.findall(
            r"(?:\b[Ss]ections?|RESULTS\.md\)?,?) (\d+(?:(?:, | and )\d\d?\b)*)", prose
        )
        asked.update(re.findall(r"\bX\d\b", prose))
    for path in rooms:  # where "section 3" alone is of a paper
        named += re.findall(r"RESULTS\.md,? (?:section )?(\d+)", path.read_text(encoding="utf-8"))
    found = {number for some in named for number in re.findall(r"\d+", some)}
    assert len(found) > 10 and found <= numbers, found - numbers
    assert asked == studies
