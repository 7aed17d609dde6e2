"""What the Markdown pages print runs, and what they claim stands in RESULTS.md.

Every block of code is checked by its language, every command by its first word; a block or a command
without a check fails.
"""

import argparse
import functools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import tiny
import typer
import yaml

import softar
import softar.cli.app as cli
from softar.cli.inputs import MODELS
from softar.cli.programs import PROGRAMS, run_program
from softar.decoders.registry import parse_spec
from softar.launch import LAUNCHED
from softar.recipes.evidence_tables import without_regions

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "softar", "softar/vllm", "diffusion", "rl", "recipes")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.md"))
    if path.name not in ("RESULTS.md", "CHANGELOG.md")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


BLOCKS = [
    Block(page, text[: m.start()].count("\n") + 1, m[1], m[2])
    for page, text in PAGES.items()
    for m in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]


def blocks(*languages):
    return [
        pytest.param(block, id=f"{block.page}:{block.line}", marks=marks_of(block.text))
        for block in BLOCKS
        if block.language in languages
    ]


def commands():
    """Every command of every shell block, with the lines that a backslash or a quote goes on in."""
    for block in BLOCKS:
        if block.language == "bash":
            pending = ""
            for line in re.sub(r"\\\n", " ", block.text).splitlines():
                pending = f"{pending} {line.strip()}".strip()
                try:
                    words = shlex.split(pending, comments=True)
                except ValueError:  # an open quote
                    continue
                if words:
                    yield block, pending
                pending = ""
            assert not pending, pending


def marks_of(text):
    if "vllm import" in text:  # an engine of its own
        return [pytest.mark.rest]
    return [pytest.mark.slow] if re.search("smollm2|8000", text) else []


def test_every_block_has_a_check():
    assert not [b for b in BLOCKS if b.language not in ("python", "bash", "text", "bibtex")]
    assert sum(text.count("```") for text in PAGES.values()) == 2 * len(BLOCKS)
    assert {page for page, text in PAGES.items() if "```python" in text} >= {"README.md"}


# -- Python


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Local models in the place of those that would have to be downloaded."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.tokenizer_of()
    for name, sizes in {"Qwen/Qwen3-0.6B": {}, "your/model": dict(head_dim=32)}.items():
        tiny.model_of(**sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {f'"{name}"': repr(str(folder / name)) for name in ("Qwen/Qwen3-0.6B", "your/model")}


@pytest.fixture(scope="module")
def server():
    """What `softar serve mnns-soft-tiny --soft --port 8000 ...` starts, at a free port."""
    pytest.importorskip("vllm")
    from softar.vllm import serve

    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with serve("mnns-soft-tiny", soft=True, extra=["--chat-template", template]) as running:
        yield running.url


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block, stand_ins, request, tmp_path, monkeypatch, capsys):
    code = block.text
    for name, stand_in in stand_ins.items():
        code = code.replace(name, stand_in)
    monkeypatch.chdir(tmp_path)
    if "8000" in code:
        code = code.replace("http://127.0.0.1:8000", request.getfixturevalue("server"))
    if "vllm import" in code:  # an engine needs a program of its own
        pytest.importorskip("vllm")
        from softar.vllm.machine import settings

        smaller = {"max_tokens=512": "max_tokens=8", "_embeds=True": f"_embeds=True, {EAGER}"}
        for words, fewer in smaller.items():
            code = code.replace(words, fewer)
        (tmp_path / "program.py").write_text(code)
        done = subprocess.run(
            [sys.executable, "program.py"],
            env=os.environ | settings(str(tmp_path)),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        output = done.stdout
    else:
        exec(compile(code, f"{block.page}:{block.line}", "exec"), {"__name__": "__main__"})
        output = capsys.readouterr().out
    expected = EXPECTED.get(next((key for key in EXPECTED if key in block.text), None), "")
    assert re.search(expected, output, re.DOTALL), output
    assert bool(output) == bool(re.search(r"print\(|train\(", code)), output


# as in the tests of the plug-in: no compiler is needed, and little memory
EAGER = 'enforce_eager=True, max_model_len=128, dtype="float32"'
EXPECTED = {  # what a block with these words prints
    "the second step read": r"\['SOFT', 'SOFT', 'SOFT', 'HARD', 'HARD'\]\nanswer: S0\n.*S-?12 with weight 0.2",
    "Why is the sky blue? Answer": r"[Ss]ky.*\d forwards",
    "def always": r"always\s+1\.000",
    "def best": r"^2 forwards",
    "def flat": r"tensor\(\[\[0.2500, 0.2500",
    "softar.compare(decoders, rows, lambda": r"discrete\s+1\.000",
    "result.matched": r"within 6 forwards: \[.*soft-tiny=soft.*\]",
    "soften=": r"\['S4 S-4 S-3 S0'\] 3 forwards",
    "S0 <eos>": r"^D4 D8 D1 D3 -> S-?\d+ S-?\d+ S-?\d+ S0$",
    "client.chat": r"S0$",
    "OpenAI": r"S0\n\[\[",
    "record_of": r"Read\(token=",
}


# -- shell


class Parsed(BaseException):
    """The program has read its options: no further."""


def check_options(run, words, monkeypatch):
    """What `run` starts reads the command's options with its own parser, and is stopped there."""
    from trl import TrlParser

    def then_stop(method):
        def stopping(self, *args, **kwargs):
            method(self, *args, **kwargs)
            raise Parsed

        return stopping

    for owner, name in ((argparse.ArgumentParser, "parse_args"), (TrlParser, READ)):
        monkeypatch.setattr(owner, name, then_stop(getattr(owner, name)))
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        run()


READ = "parse_args_and_config"


def check_recipe(program, options, monkeypatch):
    """Configuration files and defaults included."""
    assert (ROOT / program).is_file(), program
    if program != "recipes/tour.py":  # which takes none, and tests/test_tour.py runs it
        monkeypatch.syspath_prepend(ROOT / "recipes")
        run = functools.partial(runpy.run_path, str(ROOT / program), run_name="__main__")
        check_options(run, [program, *options], monkeypatch)


def python(words, monkeypatch, **_):
    if words[1] == "-m":
        from build.__main__ import main_parser

        assert words[2] == "build"
        main_parser().parse_args(words[3:])
    else:
        check_recipe(words[1], words[2:], monkeypatch)


def accelerate(words, monkeypatch, **_):
    from accelerate.commands.launch import launch_command_parser

    assert words[1] == "launch"
    args = launch_command_parser().parse_args(words[2:])
    check_recipe(args.training_script, args.training_script_args, monkeypatch)


def torchrun(words, monkeypatch, **_):
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words[1:])
    check_recipe(args.training_script, args.training_script_args, monkeypatch)


SMALLEST = {"compare": ["--limit", "2"], "sweep": ["--limit", "2"]}
SHIPPED = "mnns|latin"


def softar_command(words, request, monkeypatch, capsys, **_):
    """Parsed by the command itself and, where it needs no model that does not come along, run."""
    name, options = words[1], [*words[2:], *SMALLEST.get(words[1], [])]
    if name in PROGRAMS:
        monkeypatch.setenv(LAUNCHED, "1")  # so that none is started in its place
        check_options(functools.partial(run_program, name, options), words, monkeypatch)
        return
    command = typer.main.get_command(cli.app).commands[name]
    context = command.make_context(name, list(options))
    specs = context.params.get("decoder") or []
    for spec in [specs] if isinstance(specs, str) else specs:
        parse_spec(spec)
    if name == "serve":  # the fixture `server` runs it
        assert context.params["model"] in MODELS
        return
    if name not in ("models", "tasks") and not re.search(SHIPPED, " ".join(options)):
        return
    options = [re.sub("http://127.0.0.1:8000", lambda _: server_of(request), o) for o in options]
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    with pytest.raises(SystemExit) as end:
        cli.main([name, *options])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    assert printed.out.strip() or "wrote" in printed.err


def server_of(request):
    return request.getfixturevalue("server")


def softar_eval(words, monkeypatch, **_):
    from softar.evals.lm_eval import main

    check_options(main, words, monkeypatch)


def make(words, **_):
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pip(words, **_):
    assert words[1] == "install"
    extras = {*PROJECT["optional-dependencies"]}
    for word in words[2:]:
        form = re.fullmatch(r"-e|\.?(softar)?(\[([\w,-]+)\])?", word)
        assert form and {*filter(None, (form[3] or "").split(","))} <= extras, word


def pytest_command(words, **_):
    for word in words[1:]:
        assert word.startswith("-") or (ROOT / word.partition("::")[0]).is_file(), word


def curl(words, request, **_):
    address, options = words[1], dict(zip(words[2::2], words[3::2], strict=True))
    assert options.keys() == {"-H", "-d"}
    address = address.replace("http://127.0.0.1:8000", request.getfixturevalue("server"))
    answer = httpx.post(address, json=json.loads(options["-d"]), timeout=60)
    assert answer.json()["choices"][0]["text"].split()[-1] == "S0", answer.text


def source(words, **_):
    assert words[1:] == [".venv/bin/activate"]  # which `python -m venv` makes


def ruff(words, **_):
    command = [sys.executable, "-m", *words, "--help"]
    assert subprocess.run(command, capture_output=True).returncode == 0


HANDLERS = {
    "softar": softar_command,
    "softar-eval": softar_eval,
    "python": python,
    "accelerate": accelerate,
    "torchrun": torchrun,
    "make": make,
    "pip": pip,
    "pytest": pytest_command,
    "curl": curl,
    "source": source,
    "ruff": ruff,
}


def check(line, **fixtures):
    words = shlex.split(line, comments=True)
    assert words[0] in HANDLERS, f"nothing checks {words[0]!r}"
    HANDLERS[words[0]](words, **fixtures)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=f"{block.page}: {line[:70]}", marks=marks_of(line))
        for block, line in commands()
    ],
)
def test_command_is_right(line, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT if "recipes/" in line or "make " in line else tmp_path)
    check(line, request=request, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize(
    "line",
    [
        "softar compare --tsk mnns",
        "softar compare -d mnns-soft-tiny=gumble",
        "softar trace 'Why is the sky blue?' -m mnns-soft-tiny",
        "make everything",
        "pip install 'softar[gpu]'",
        "python recipes/denoise.py --delai 0.3",
        "python recipes/bench.py decode --repeats many",
        "python recipes/none.py",
        "accelerate launch recipes/sft_soft.py --max_stepz 3",
        "accelerate launch recipes/sft_soft.py --config recipes/configs/none.yaml",
        "accelerate launch recipes/grpo_soft.py --soft_mixer dirichlet",
        "accelerate lunch recipes/sft_soft.py",
        "softar sft --max_stepz 3",
        "softar grpo --soft_mixer dirichlet",
        "softar demo --limits 3",
        "torchrun --nproc 2 recipes/sft_soft.py --rows",
        "softar-eval --modle softar --tasks gsm8k",
        "pytest tests/test_none.py",
        "rm -rf runs",
    ],
)
def test_a_wrong_command_is_noticed(line, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT if "recipes/" in line else tmp_path)
    with pytest.raises((Exception, SystemExit)):
        check(line, request=request, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize("block", blocks("text"))
def test_output_is_what_the_command_prints(block, monkeypatch, capsys):
    """Word by word; numbers to the last digit shown, as kernels differ."""
    (line,) = [
        line for other, line in commands() if other.page == block.page and other.line < block.line
    ][-1:]
    monkeypatch.setenv("COLUMNS", "120")  # nothing of a line is cut, whatever the terminal's width
    with pytest.raises(SystemExit):
        cli.main(shlex.split(line)[1:])
    printed = capsys.readouterr().out.splitlines()
    rows = [row.split() for row in printed if row.split()][-len(block.text.splitlines()) :]
    for theirs, ours in zip(rows, block.text.splitlines(), strict=True):
        assert len(theirs) == len(ours.split()), (theirs, ours)
        for a, b in zip(theirs, ours.split(), strict=True):
            if re.fullmatch(r"\d+\.\d+", a):
                assert abs(float(a) - float(b)) < 0.02, (theirs, ours)
            elif not re.match("[█▓▒░·]", a):
                assert a == b, (theirs, ours)


# -- claims


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_stands_in_the_results(page):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    figures = set(re.findall(r"(?<![\d.])0?(\.\d{2,3})(?!\d)", prose))
    assert not [figure for figure in figures if figure not in RESULTS]


def test_the_first_page_claims_nothing_by_hand():
    by_hand = without_regions(PAGES["README.md"])  # the others: tests/test_evidence_report.py
    assert not re.findall(r"(?<!\d)\.\d{3}(?!\d)", by_hand)


def anchors_of(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_exist(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", PAGES[page]):
        assert (folder / target).exists(), target
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", PAGES[page]):
        assert anchor in anchors_of(folder / target if target else ROOT / page), anchor
    for name in re.findall(r"(?:recipes|tests)/[\w./]+\.(?:py|yaml)", PAGES[page]):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"`make (\w+)", PAGES[page]):
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_the_map_of_a_folder_is_whole(folder):
    """Each file of the folder and each room in it stands in a table of its README, no other does."""
    rows = re.findall(r"^\| (`[^|]*) \|", PAGES[f"{folder}/README.md"], re.MULTILINE)
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([\w.]+/?)`", row)}
    there = {p.name for p in (ROOT / folder).iterdir() if p.suffix == ".py"} - {"__init__.py"}
    rooms = {p.name for p in (ROOT / folder).iterdir() if p.is_dir()} - {"__pycache__", "configs"}
    configs = {p.name for p in (ROOT / folder).glob("configs/*")}
    assert {
        n for n in named if n.endswith((".py", ".yaml")) or n in rooms
    } == there | rooms | configs


def test_the_ranges_are_those_of_the_package():
    (install,) = re.findall(r"^## Install$(.*?)^## ", PAGES["README.md"], re.DOTALL | re.MULTILINE)
    numbers = {*re.findall(r"\d+\.\d+", install)}
    required = [r for r in PROJECT["dependencies"] if re.match(r"(torch|transformers|trl)\b", r)]
    required += [*PROJECT["optional-dependencies"]["vllm"], PROJECT["requires-python"]]
    assert numbers == {number for r in required for number in re.findall(r"\d+\.\d+", r)}


@pytest.mark.parametrize(
    ("option", "module", "table"),
    [
        ("schedule", "schedules", "SCHEDULES"),
        ("select", "select", "SELECTORS"),
        ("soften", "soften", "SOFTENERS"),
    ],
)
def test_the_choices_of_diffusion_are_those_of_the_code(option, module, table):
    """A schedule that takes `steps` stood nowhere on the page."""
    (listed,) = re.findall(rf"`{option}` \((.*?)\)", PAGES["diffusion/README.md"], re.DOTALL)
    known = getattr(import_module(f"softar.diffusion.{module}"), table)
    assert {*re.findall(r"`([\w-]+)`", listed)} == {*known}


def test_the_schedules_that_take_steps_at_most():
    page = " ".join(PAGES["diffusion/README.md"].split())
    (said,) = re.findall(r"the most that (.*?) take\.", page)
    schedules = import_module("softar.diffusion.schedules").SCHEDULES
    most = {name for name, schedule in schedules.items() if schedule.takes_steps is None}
    assert {*re.findall(r"`([\w-]+)`", said)} == most


def test_length_and_width():
    assert len(PAGES["README.md"].splitlines()) <= 120
    for page, text in [*PAGES.items(), ("RESULTS.md", RESULTS)]:
        for line in text.splitlines():
            limit = 120 if page == "README.md" or not line.startswith("|") else 210
            assert len(line) <= limit, f"{page}: {line}"


def test_the_citation():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0" and cff["message"] and cff["type"] == "software"
    assert cff["version"] == softar.__version__ and cff["license"] == PROJECT["license"]
    (block,) = [b for b in BLOCKS if b.language == "bibtex"]
    entry = dict(re.findall(r"(\w+) = \{+([^}]*)\}+", block.text))
    assert entry == {
        "author": cff["authors"][0]["name"],
        "title": cff["title"],
        "year": str(cff["date-released"].year),
        "version": cff["version"],
    }
