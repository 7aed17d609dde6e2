"""The `softar` command, as it is typed: examples, JSON, exit codes, one-line errors, pipes."""

import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from softar import tasks
from softar.arguments import PROCESSES, TITLES, RecipeParser
from softar.cli import app as cli
from softar.cli import inputs, streams
from softar.cli.programs import PACKAGE, PROGRAMS, TRAINING
from softar.decoders.answer import Decoded
from softar.decoders.card import describe
from softar.decoders.registry import own_decoder
from softar.model_card import Origin, decode_command

ROOT = Path(__file__).resolve().parent.parent
GROUP = typer.main.get_command(cli.app)
PROMPT = "<bos> D4 D8 D1 D3 ->"
HOLES = "<bos> D4 D8 _ D3 -> _ _ _ S0"
SOFT = ["-m", "mnns-soft-tiny"]


class Pipe(io.StringIO):
    """Text that comes through a pipe."""


@pytest.fixture
def softar(capsys, monkeypatch):
    """Runs the command in this process -> exit code, stdout, stderr."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", Pipe(stdin))
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in argv])
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return run


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What `main` sets for its process does not outlive a test; no colours, no width but the tests'
    own."""
    for name, value in (cli.QUIET | cli.NO_BARS).items():
        monkeypatch.setenv(name, value)
    for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", None)  # typer has read them


def process(*argv, **kwargs):
    kwargs.setdefault("capture_output", True)
    command = [sys.executable, "-m", "softar.cli.app", *argv]
    return subprocess.run(command, cwd=ROOT, text=True, timeout=120, **kwargs)


def examples():
    """(command, its words) of each example in a help text."""
    for name, command in [("", GROUP), *GROUP.commands.items()]:
        for line in (command.help or "").splitlines():
            if found := re.match(r"  .*\bsoftar (\w.*)", line):
                yield pytest.param(name, shlex.split(found[1]), id=found[0])


# -- help and examples


def test_the_commands():
    assert [*GROUP.commands] == [
        "generate",
        "fill",
        "compare",
        "trace",
        "serve",
        "sweep",
        "models",
        "tasks",
        "tour",
        "sft",
        "diffusion-sft",
        "grpo",
        "diffusion-grpo",
        "ppo",
        "rloo",
        "demo",
        "bench",
        "speed",
        "estimate",
    ]
    assert {e.values[0] for e in examples()} == {"", *GROUP.commands}  # each has some


@pytest.mark.parametrize("name, words", [*examples()])
def test_examples_parse(name, words):
    command = GROUP.commands[words[0]]
    context = command.make_context(words[0], words[1:])
    assert name in ("", words[0])
    for spec in [
        s for key in ("decoder", "soft", "baseline") for s in listed(context.params.get(key))
    ]:
        assert inputs.family(spec)
    others = ("answerdotai/ModernBERT-base", "./my-sdar")
    assert context.params.get("model") in (None, *inputs.MODELS, *others)
    assert context.params.get("config") is None or (ROOT / context.params["config"]).is_file()


def listed(value):
    return [value] if isinstance(value, str) else value if isinstance(value, list) else []


@pytest.mark.parametrize("name", ["", *GROUP.commands])
def test_help(softar, name):
    code, out, err = softar(*filter(None, [name]), "--help")
    assert (code, err) == (0, "") and "Examples:" in out and "\x1b" not in out
    assert softar(*filter(None, [name]), "-h")[1] == out


def test_no_words_of_a_help_are_taken_for_markup(softar, monkeypatch):
    """Defaults in brackets vanished: `[default: a free one]` is a style to Rich."""
    from rich.text import Text

    monkeypatch.setenv("COLUMNS", "250")
    for command in [GROUP, *GROUP.commands.values()]:
        shown = None
        for param in command.params:
            text = getattr(param, "help", None) or ""
            assert Text.from_markup(text).plain == text, f"{command.name}, {param.name}: {text}"
            if isinstance(default := getattr(param, "show_default", None), str):
                shown = shown or softar(command.name, "--help")[1]
                assert f"[default: ({default})]" in shown, (command.name, param.name)
        text = (command.help or "").replace("\b", "")
        assert Text.from_markup(text).plain == text, f"{command.name}: {text}"


def test_which_commands_have_json():
    """As softar/README.md says."""
    has = {n for n, c in GROUP.commands.items() if any("--json" in p.opts for p in c.params)}
    assert has == {*GROUP.commands} - {"tour", *PROGRAMS}


@pytest.mark.parametrize("name", TRAINING)
def test_the_help_of_a_training_begins_with_its_own_options(softar, name):
    recipe = import_module(f"{PACKAGE}.{TRAINING[name].module}").RECIPE
    parser = RecipeParser(recipe.arguments, recipe.config)
    short, everything = (softar(name, word)[1] for word in ("--help", "--help_all"))
    for text, titles in ((short, [*TITLES.values()][:2]), (everything, [*TITLES.values()])):
        assert [line[:-1] for line in text.splitlines() if line[:-1] in TITLES.values()] == titles
        assert f"usage: softar {name} " in text and f"softar {name}\n" in text
    own, listed = (
        re.findall(r"^  (--\w+)[, ]", text, re.MULTILINE) for text in (short, everything)
    )
    options = {f"--{action.dest}" for action in parser._actions}  # a --no_x is said with its --x
    assert sorted(listed) == sorted([*options, *(re.match(r"--\w+", w)[0] for w in PROCESSES)])
    assert {f"--{field}" for field in recipe.arguments.__annotations__} < {*own} < {*listed}
    assert len(short.splitlines()) < 250 < len(everything.splitlines())


def test_what_is_wrong_with_a_trainings_options_is_one_line(softar):
    for words, says in (
        (["--max_stepz", "3"], "option '--max_stepz' is unknown, did you mean '--max_steps'?"),
        (["--num_seeds=two"], "argument --num_seeds/--num-seeds: invalid int value: 'two'"),
        (["--rows", "demoo"], "'demoo' is unknown; choose demo, all"),
        (["--config", "mnnns.yaml"], "there is no such file, did you mean 'mnns.yaml'?"),
    ):
        code, out, err = softar("sft", *words)
        assert (code, out) == (2, "") and err.startswith("softar sft: error: "), err
        assert says in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("softar ge", "generate"),
        ("softar diffusion-s", "diffusion-sft"),
        ("softar compare --ta", "--task"),
        ("softar generate -m mnns-so", "mnns-soft-tiny"),
    ],
)
def test_the_shell_completes(softar, monkeypatch, typed, offered):
    monkeypatch.setenv("_SOFTAR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    code, out, _ = softar()
    assert code == 0 and out.split() == [offered]


def test_a_model_that_is_nowhere_fills_no_holes_and_is_named(softar, tmp_path):
    for model in (tmp_path, "no/such"):
        code, _, err = softar("fill", "a _ b", "-m", model)
        assert code == 2 and f"model={str(model)!r} could not be loaded" in err, err


def test_without_a_command_it_helps(softar):
    code, out, err = softar()
    assert (code, err) == (0, "") and out.strip() == softar("--help")[1].strip()


def test_a_full_disk_is_one_line(softar, monkeypatch, tmp_path):
    import errno

    from softar.evals import sweep

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sweep, "write_whole", full)
    words = ["-t", "latin", "--soft", "soft-mask", "--limit", 2, "--output", tmp_path / "sweep"]
    code, out, err = softar("sweep", *words)
    assert (code, out) == (2, "") and err.strip().splitlines()[-1].startswith("softar: error: ")
    assert "No space left on device" in err and "Traceback" not in err


def test_compare_lists_all_decoders():
    from softar.decoders.registry import FAMILIES, decoders_of

    said = GROUP.commands["compare"].help
    for name in [name for family in FAMILIES for name in decoders_of(family)]:
        assert re.search(rf"[\s:]{name}[,.\s]", said), name


def test_version(softar):
    from softar import __version__

    assert softar("--version") == (0, f"softar {__version__}\n", "")


def test_no_torch_for_help():
    code = (
        "import sys; sys.argv = ['softar', {!r}]; from softar.cli.app import main\n"
        "try: main()\n"
        "finally: print({{'torch', 'transformers', 'numpy', 'matplotlib', 'datasets'}} & {{*sys.modules}},\n"
        "               file=sys.stderr)"
    )
    for word in ("--help", "models", "tasks"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(word)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "set()\n")


# -- models and tasks


def test_models_are_all_there_are(softar):
    from softar.diffusion.models import MODELS as fillers
    from softar.models import MODELS

    found = {m["name"]: m["kind"] for m in json.loads(softar("models", "--json")[1])}
    assert found == {
        **dict.fromkeys(MODELS, "autoregressive"),
        **dict.fromkeys(fillers, "diffusion"),
    }
    lines = softar("models")[1].splitlines()
    assert [line.split("\t")[0] for line in lines] == [*found] and all(
        line.count("\t") == 2 for line in lines
    )


def test_models_say_what_is_not_installed(softar, monkeypatch):
    monkeypatch.setattr(streams, "is_installed", lambda package: False)
    found = {m["name"]: m["installed"] for m in json.loads(softar("models", "--json")[1])}
    missing = [name for name, installed in found.items() if not installed]
    assert missing == [*inputs.CARRIED] == ["smollm2-135m", "gemma3-270m"]
    assert softar("models")[1].count("not installed: pip install") == 2
    assert softar("tasks")[1].count("not installed") == 2
    installed = [t["installed"] for t in json.loads(softar("tasks", "--json")[1])]
    assert installed == [True] * 5 + [False] * 2


def test_tasks_are_all_there_are(softar):
    from softar.tasks import GYM, HARNESS, TASKS, load_task

    found = json.loads(softar("tasks", "--json")[1])
    others = ["FILE[:score=NAME]", f"{GYM}NAME", f"{HARNESS}NAME"]
    assert [task["name"] for task in found] == [*TASKS, *others]
    for task in found[: len(TASKS)]:
        assert f"{len(load_task(task['name']).test)} held-out rows" in task["description"]


def test_default_models_and_decoders(monkeypatch):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    assert inputs.default_model(None) == "mnns-soft-tiny"
    assert inputs.default_model("soft-token") == "mnns-diffusion-tiny"
    specs = {
        name: own_decoder(describe(name), "float32", None, {})
        for name in inputs.MODELS
        if name not in inputs.CARRIED
    }
    assert specs == {
        "mnns-soft-tiny": "soft",
        "mnns-discrete-tiny": "discrete",
        "mnns-tiny": "gumbel",
        "latin-tiny": "gumbel",
        "mnns-diffusion-tiny": "soft-mask",
        "latin-diffusion-tiny": "soft-mask",
        "latin-block-tiny": "soft-mask",
    }


# -- generate


@pytest.mark.parametrize("length", [2, 3, 6])
def test_an_answer_that_never_began_is_told(softar, length):
    """A thought is hidden, so a text that is nothing else prints as an empty line."""
    code, out, err = softar("generate", PROMPT, *SOFT, "--max-new-tokens", length)
    assert code == 0 and (not out.strip()) == ("the answer is empty" in err) == (length <= 3)


def test_generate(softar):
    inputs.quiet()
    from softar.decoders.registry import make_decoder

    (found,) = make_decoder("soft", model="mnns-soft-tiny", max_new_tokens=6).decode([PROMPT])
    code, out, err = softar("generate", PROMPT, *SOFT)
    assert (code, out) == (0, f"{found.text.strip()}\n") and err.startswith(
        "mnns-soft-tiny is decoded as its soft_config.json says\n"
        "mnns-soft-tiny, soft: 5 tokens (3 soft) in 5 "
    )
    for words in (["generate"], ["generate", "-"]):
        assert softar(*words, *SOFT, stdin=PROMPT + "\n")[1] == out
    code, out, err = softar("generate", PROMPT, *SOFT, "--json")
    answer = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (answer["text"], tuple(answer["tokens"])) == (found.text, found.tokens)
    assert (answer["decoder"], answer["num_forwards"]) == ("soft", found.num_forwards)
    assert answer["entropy"] == pytest.approx(found.entropy)
    assert (
        answer["completion"].endswith(f"{found.text} <eos>")
        and len(answer["completion"].split()) == 5
    )


def test_generate_options_reach_the_decoder(softar, monkeypatch):
    made = []
    plain = inputs.answer
    monkeypatch.setattr(
        inputs, "answer", lambda decoder, *rest: made.append(decoder) or plain(decoder, *rest)
    )
    words = "--temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.01 --softness 0.25 --answer-temperature 0.7"
    words += " --max-new-tokens 4 --budget 2 --seed 7 --think-end ->"
    assert softar("generate", PROMPT, *SOFT, "-d", "gumbel:tau=0.5", *words.split())[0] == 0
    c = made[0].config
    assert (c.temperature, c.top_k, c.top_p, c.min_p, c.softness, c.budget) == (
        0.5,
        3,
        0.9,
        0.01,
        0.25,
        2,
    )
    assert (c.mixer, c.mixer_args, c.answer_temperature, c.max_new_tokens) == (
        "gumbel",
        {"tau": 0.5},
        0.7,
        4,
    )
    assert made[0].tokenizer.decode(c.think_end) == "->" and made[0].rng.initial_seed() == 7
    assert softar("generate", PROMPT, *SOFT, "-d", 'soft:think_end="->",top_k=null')[0] == 0
    assert (
        made[1].config.top_k is None and made[1].tokenizer.decode(made[1].config.think_end) == "->"
    )


@pytest.mark.parametrize(
    "spec", ["beam:num_beams=2", "self-consistency:votes=3", "mnns-diffusion-tiny=hard"]
)
def test_generate_by_other_decoders(softar, spec):
    code, out, _ = softar("generate", PROMPT, "-d", spec, "-m", "mnns-discrete-tiny", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["text"].split()[-1].startswith("S") and "S" in answer["completion"]
    assert answer["decoder"] == inputs.family(spec) or answer["decoder"] in spec


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_generate_streams_on_a_terminal(monkeypatch, capsys):
    """Token by token, the thought in other letters than the answer; and the same tokens as
    without."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made = inputs.open_decoder(
        None, "mnns-soft-tiny", {}, max_new_tokens=None, seed=0, dtype="float32", device=None
    )
    seen = []
    plain = streams.Printer.__call__
    monkeypatch.setattr(
        streams.Printer,
        "__call__",
        lambda self, step: (plain(self, step), seen.append(screen.getvalue()))[0],
    )
    inputs.answer(made, PROMPT, PROMPT, False)
    monkeypatch.undo()
    (found,) = made.decode([PROMPT])
    assert len(seen) == len(found.tokens) and all(a != b for a, b in itertools.pairwise(seen[:4]))
    lines = screen.getvalue()
    words = made.tokenizer.decode(list(found.tokens), skip_special_tokens=True).split()
    assert re.sub(r"\x1b\[[\d;]*m", "", lines).split() == words
    styled = re.findall(r"\x1b\[2;3m *([^\x1b]+)\x1b\[0m", lines)
    assert [word.strip() for word in styled] == words[:3] and words[3] == found.text.strip()


def test_stream_counts_as_decode_does(monkeypatch):
    made = inputs.open_decoder(
        "gumbel", "mnns-soft-tiny", {}, max_new_tokens=6, seed=3, dtype="float32", device=None
    )
    twin = inputs.open_decoder(
        "gumbel", "mnns-soft-tiny", {}, max_new_tokens=6, seed=3, dtype="float32", device=None
    )
    monkeypatch.setattr(sys, "stdout", Terminal())
    streamed = inputs.stream(made, PROMPT)
    monkeypatch.undo()
    (plain,) = twin.decode([PROMPT])
    assert (streamed.text, streamed.tokens) == (plain.text, plain.tokens)
    assert (streamed.num_forwards, streamed.token_forwards) == (
        plain.num_forwards,
        plain.token_forwards,
    )
    assert streamed.entropy == pytest.approx(plain.entropy)


def test_a_character_of_several_tokens_is_printed_whole(monkeypatch):
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    import torch

    from softar import SoftConfig
    from softar.thought import Record

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    printer = streams.Printer(Bytes(), SoftConfig())
    shown = []
    for byte in "aé!".encode():
        printer({"record": Record(None, None, torch.tensor([byte]), torch.tensor([1]), None, None)})
        shown.append(screen.getvalue())
    monkeypatch.undo()
    assert shown == ["a", "a", "aé", "aé!"]


class Chatty:
    chat_template = "{{ messages }}"

    def __call__(self, text):
        return {"input_ids": [1]}


class Plain(Chatty):
    chat_template = None


def test_chat_where_the_tokenizer_has_a_template():
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
    chatty, plain = SimpleNamespace(tokenizer=Chatty()), SimpleNamespace(tokenizer=Plain())
    assert inputs.as_prompt(chatty, "Hi", None) == [user] == inputs.as_prompt(chatty, "Hi", True)
    assert inputs.as_prompt(chatty, "Hi", None, "Be brief.") == [system, user]
    assert inputs.as_prompt(plain, "Hi", None) == "Hi" == inputs.as_prompt(chatty, "Hi", False)


# -- fill


def test_fill(softar):
    code, out, _ = softar("fill", HOLES)
    words, given = out.split(), HOLES.removeprefix("<bos> ").split()
    assert code == 0 and len(words) == len(given)
    assert all(g in (w, "_") for w, g in zip(words, given)) and "<mask>" not in out
    for text in (HOLES.replace("_", "<mask>"), HOLES.replace("_", "___")):
        assert softar("fill", text)[1] == out
    assert softar("fill", stdin=HOLES)[1] == out


def test_what_softar_warns_of_is_a_line(softar):
    """Without the code that warned; what others warn of looks as Python makes it."""
    remark = "warning: a text with masks ends in 'S0' (row 0 of input_ids), and all that"
    _, _, err = softar("fill", HOLES)
    assert [line for line in err.splitlines() if remark in line] and "UserWarning" not in err
    assert "warning" not in softar("fill", f"{HOLES} <eos>")[2]
    with pytest.warns(UserWarning, match="elsewhere"), streams.warnings_as_remarks():
        warnings.warn_explicit("elsewhere", UserWarning, str(ROOT / "tests" / "a.py"), 1)


def test_what_a_program_warns_of_is_a_line(softar, monkeypatch):
    def run(name, argv):
        warnings.warn_explicit("no thought began", UserWarning, streams.__file__, 1)

    monkeypatch.setattr(cli, "run_program", run)
    assert softar("grpo") == (0, "", "warning: no thought began\n")


def test_holes_are_shown_whatever_is_filled_behind_the_text(softar):
    """They were filled, and not printed."""
    given = HOLES.removeprefix("<bos> ").split()
    for behind in (0, 1, 2):
        words = softar("fill", HOLES, "--gen-length", behind)[1].split()
        assert all(g in (w, "_") for w, g in zip(words, given, strict=False)), words
        assert len(given) <= len(words) <= len(given) + behind and "_" not in words


def test_fill_behind_the_text(softar):
    answer = json.loads(softar("fill", PROMPT, "--gen-length", 5, "--steps", 2, "--json")[1])
    assert (answer["decoder"], answer["setting"], answer["num_forwards"]) == (
        "soft-mask",
        "steps=2",
        2,
    )
    assert len(answer["tokens"]) == 5
    answer = json.loads(
        softar(
            "fill",
            PROMPT,
            "--gen-length",
            4,
            "--block-length",
            2,
            "--temperature",
            0.3,
            "-d",
            "hard:threshold=0.01",
            "--json",
        )[1]
    )
    assert (answer["decoder"], answer["num_forwards"]) == ("hard", 2)


# -- compare

FEW = ["--limit", "12", "-m", "mnns-soft-tiny", "-d", "soft", "-d", "discrete"]


def test_compare(softar, tmp_path):
    code, out, err = softar("compare", *FEW, "--output", tmp_path, "--plot", "--json")
    found = json.loads(out)
    assert (code, out.count("\n"), found["baseline"], found["failures"]) == (0, 1, "soft", [])
    assert [(row["decoder"], row["n"], row["task"]) for row in found["rows"]] == [
        ("soft", 12, "mnns"),
        ("discrete", 12, "mnns"),
    ]
    assert all(row["nfe"] <= 5 for row in found["rows"])
    assert {"results.json", "results.csv", "rows.jsonl", "plot.png"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert str(tmp_path) in err
    code, out, _ = softar(
        "compare", *FEW, "--baseline", "discrete", "--repeats", 2, "--batch-size", 5
    )
    assert code == 0 and "gain over discrete" in out and "\x1b" not in out and "soft" in out


def test_compare_on_a_narrow_terminal(softar, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = softar("compare", *FEW)
    assert (
        code == 0
        and max(map(len, out.splitlines())) <= 60
        and "soft\n  accuracy" in out
        and "gain" in out
    )
    assert out.count("mnns-soft-tiny") == 1 and out.splitlines()[-1] == "gain over soft"


def test_compare_matches_budgets(softar):
    words = [
        "compare",
        "--task",
        "latin",
        "--limit",
        "6",
        "-m",
        "latin-diffusion-tiny",
        "--nfe",
        "5",
        "--json",
    ]
    specs = [
        "-d",
        "hard:steps=2",
        "-d",
        "hard:steps=4",
        "-d",
        "hard:steps=8",
        "-d",
        "soft-mask:steps=8",
    ]
    found = json.loads(softar(*words, *specs)[1])
    assert [row["nfe"] for row in found["rows"]] == [4]
    assert found["left_out"] == ["latin-diffusion-tiny=soft-mask"]
    words[words.index("--nfe")] = "--token-forwards"
    assert json.loads(softar(*words, *specs)[1])["rows"] == []


def test_a_plot_that_fails_hides_no_table(softar, monkeypatch, tmp_path):
    def plot(*_):
        raise ValueError("nothing to draw with")

    monkeypatch.setattr("softar.evals.compare.Comparison.plot", plot)
    code, out, err = softar("compare", *FEW, "--output", tmp_path, "--plot")
    assert code == 2 and "accuracy" in out and "nothing to draw with" in err


def test_compare_says_what_failed(softar):
    """A decoder that cannot read the rows: the other goes on, and the exit code is 1."""
    code, out, err = softar(
        "compare",
        "--task",
        "latin-prompt",
        "--limit",
        "4",
        "-d",
        "mnns-soft-tiny=soft",
        "-d",
        "latin-block-tiny=hard:steps=5",
        "--json",
    )
    found = json.loads(out)
    assert code == 1 and [row["decoder"] for row in found["rows"]] == ["hard"]
    assert (
        found["failures"][0]["decoder"].startswith("mnns-soft-tiny=soft") and "cannot read" in err
    )


@pytest.mark.parametrize("width", ["60", "120"])
def test_compare_says_of_a_failing_scorer_how_often_and_where_first(softar, monkeypatch, width):
    """Its answers count 0, which is no failure of the command."""
    from softar.tasks import embedded

    def picky(text, row):
        asked.append(row)
        if len(asked) < 4:
            raise RuntimeError(f"no score for <{len(asked)}>")
        return plain(text, row)

    asked, plain = [], embedded._score_mnns
    monkeypatch.setattr(embedded, "_score_mnns", picky)
    monkeypatch.setenv("COLUMNS", width)
    code, out, err = softar("compare", *FEW)
    said = "the scorer failed on 3 answers, which count 0"
    assert code == 0 and said in " ".join(out.split()) and err.count(f"{said}; first") == 1
    assert [(out + err).count(f"<{i}>") for i in (1, 2, 3)] == [1, 0, 0]
    found = json.loads(softar("compare", *FEW, "--json")[1])
    assert found["scorer_failures"] == found["failures"] == []
    monkeypatch.setattr(embedded, "_score_mnns", lambda *_: 1 / 0)
    code, out, err = softar("compare", *FEW)
    assert (code, out) == (2, "") and "the scorer failed on every row, first" in err


@pytest.mark.parametrize("width", ["60", "120"])
def test_compare_says_each_failure_once(softar, monkeypatch, width):
    """The first of a decoder when it happens, the others behind the table, which has their
    number."""
    from softar.tasks import embedded

    def picky(text):
        if len(asked) < 4:
            asked.append(text)
            raise RuntimeError(f"no sum in <{len(asked)}>")
        return plain(text)

    asked, plain = [], embedded._last_sum
    monkeypatch.setattr(embedded, "_score_mnns", lambda text, row: 1.0)
    monkeypatch.setattr(embedded, "_last_sum", picky)
    monkeypatch.setenv("COLUMNS", width)
    code, out, err = softar("compare", *FEW)
    assert code == 1 and "4 failures" in out
    assert [(out + err).count(f"<{i}>") for i in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_votes_of_a_comparison_are_on_what_the_task_reads(softar, monkeypatch):
    from softar.evals import compare

    made = []

    def taken(decoders, *_, **__):
        made.extend(decoders)
        raise ValueError("enough")

    monkeypatch.setattr(compare, "compare", taken)
    names = "self-consistency:votes=2", "vllm-self-consistency:votes=2"
    monkeypatch.setattr("softar.vllm.engine.VLLMDecoder.start", lambda self: None)
    softar("compare", "-m", "mnns-tiny", "--no-chat", *(word for d in names for word in ("-d", d)))
    here, vllm = made
    for read in (here.normalise, vllm.sampling.extract):
        assert read("S1 S4") == read("S2 S4") == "S4"


def test_the_default_comparison_names_each_model_beside_its_decoders(softar, monkeypatch):
    """Short names in a terminal of 120 columns and of 80, no two rows alike."""
    words = ["compare", "--limit", 2]
    monkeypatch.setenv("COLUMNS", "120")
    lines = softar(*words)[1].splitlines()
    names = [line[:26].strip() for line in lines]
    compared = [kind for kind, _ in inputs.COMPARED["mnns"]]
    assert "self-consistency votes=8" in names
    assert names.count("mnns-soft-tiny") == compared.count("soft")
    assert not any("tiny=" in line for line in lines if "gain over" not in line)
    monkeypatch.setenv("COLUMNS", "80")
    lines = softar(*words)[1].splitlines()
    assert (
        "mnns-soft-tiny, discrete" in lines
        and "mnns-discrete-tiny, discrete" in lines
        and lines[0] == "mnns"
    )
    heads = [line for line in lines if line.startswith("mnns-")]
    assert len(heads) == len(set(heads)) == len(compared) and max(map(len, lines)) <= 80


def test_ctrl_c_keeps_what_a_comparison_has_done(softar, monkeypatch, tmp_path):
    from softar.decoders.soft import SoftDecoder

    calls, plain = [], SoftDecoder.decode

    def decode(self, prompts):
        calls.append(self.name)
        # the first decoder's warm-up and only batch; the second has not even warmed up
        if len(calls) > 2:
            raise KeyboardInterrupt
        return plain(self, prompts)

    monkeypatch.setattr(SoftDecoder, "decode", decode)
    code, out, _ = softar("compare", *FEW, "--json", "--output", tmp_path)
    found = json.loads(out)
    assert (code, found["interrupted"], [row["name"] for row in found["rows"]]) == (
        130,
        True,
        ["soft"],
    )
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["n"] == 12


@pytest.mark.parametrize("task", ["mnns", "latin", "latin-prompt"])
def test_the_default_comparison(softar, task):
    code, out, _ = softar("compare", "--task", task, "--limit", 3, "--json")
    found = json.loads(out)["rows"]
    assert code == 0 and len(found) == len(inputs.COMPARED[task])
    families = {row["family"] for row in found}
    assert families == ({"autoregressive", "diffusion"} if task == "mnns" else {"diffusion"})
    with_arguments = inputs.compared(f"{task}:digits=3", None, "auto", None)
    assert with_arguments == inputs.compared(task, None, "auto", None)


@pytest.mark.parametrize("task", ["mnns", "latin", "latin-prompt"])
def test_a_diffusion_decoder_without_a_model_has_that_of_the_task(softar, task):
    """Of all tasks it had that of one, which could not read the others' prompts."""
    code, out, _ = softar(
        "compare", "--task", task, "--limit", 3, "--json", "-d", "hard", "-d", "soft-mask"
    )
    found = json.loads(out)["rows"]
    assert code == 0 and {row["model"] for row in found} == {tasks.MODELS[task]["diffusion"]}


def test_decoders_of_a_comparison_by_its_model():
    how = ("auto", "cpu")
    assert inputs.compared("mnns", "mnns-diffusion-tiny", *how) == ["hard", "soft-mask"]
    assert inputs.compared("mnns", "mnns-tiny", *how)[:2] == ["discrete", "soft"]
    assert inputs.compared("reasoning_gym:chain_sum", None, *how)[:2] == ["discrete", "soft"]


def test_chats_of_a_comparison():
    """Each decoder by its own template: one without ended the chats of all."""
    from softar.evals.chats import asked_as_chats
    from softar.evals.compare import compare

    class Decoder:
        def __init__(self, name, tokenizer):
            self.name, self.columns, self.tokenizer = name, {"model": "m"}, tokenizer
            self.asked = []

        def decode(self, prompts):
            self.asked += prompts
            return [Decoded("7", (7,), 1, 1, 0.1) for _ in prompts]

    class Own(Decoder):  # of the user's, without a tokenizer
        def __init__(self, name):
            super().__init__(name, None)

    chatty, plain, own = Decoder("chatty", Chatty()), Decoder("plain", Plain()), Own("own")
    every = [plain, chatty, own]
    text, chat = [{"prompt": "Hi"}], [{"prompt": [{"role": "user", "content": "Hi"}]}]
    assert asked_as_chats(text, every) == asked_as_chats(text, [chatty], True) == ["chatty"]
    assert asked_as_chats(text, every, False) == []
    for bare in (plain, own):
        with pytest.raises(ValueError, match=f"--chat: decoder '{bare.name}' has no chat template"):
            asked_as_chats(text, [chatty, bare], True)
    # rows whose prompts are chats already: they became the content of a message
    assert asked_as_chats(chat, [chatty, own]) == asked_as_chats(chat, [chatty], True) == []
    with pytest.raises(
        ValueError, match="decoder 'plain' has no chat template, and the prompts are"
    ):
        asked_as_chats(chat, every)
    with pytest.raises(ValueError, match="--no-chat, and the prompts are chats"):
        asked_as_chats(chat, [chatty], False)

    told = []
    compare(every, text, lambda answer, row: told.append(row["prompt"]) or 1, chats=["chatty"])
    assert {*map(str, chatty.asked)} == {str(chat[0]["prompt"])}
    assert {*plain.asked, *own.asked, *told} == {"Hi"}  # the scorer's row is the file's
    with pytest.raises(ValueError, match=r"chats='chatti'.*chatty"):
        compare(every, text, lambda answer, row: 1, chats=["chatti"])


def test_compare_says_who_reads_texts(softar, monkeypatch, tmp_path):
    (tmp_path / "plain_code.py").write_text(OWN_DECODER)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "<bos> D4 D8 D1 D3 ->", "answer": "7"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    monkeypatch.setattr("softar.evals.chats.takes_chat", lambda d: "soft" in d.name)
    monkeypatch.setattr(
        "softar.decoders.soft.SoftDecoder.decode",
        lambda self, prompts: seen.extend(prompts) or [Decoded("7", (7,), 1, 1, 0.1)],
    )
    words = "-t", tmp_path / "rows.jsonl", "-d", "mnns-soft-tiny=soft", "-d", "plain_code:deco"
    code, _, err = softar("compare", *words)
    assert code == 0 and "texts as they stand: plain_code:deco" in err, err
    assert seen[0] == [{"role": "user", "content": "<bos> D4 D8 D1 D3 ->"}]
    assert (
        "decoder 'plain_code:deco' has no chat template" in softar("compare", *words, "--chat")[2]
    )


OWN_DECODER = """
import softar
from softar.decoders.answer import FunctionDecoder

def deco(model, *, max_new_tokens, seed, **options):
    def decode(prompts):
        assert all(isinstance(prompt, str) for prompt in prompts)
        return [softar.Decoded("3", (3,), 1, 1, 0.1) for _ in prompts]
    return FunctionDecoder(decode)
"""


def test_length_of_an_answer():
    from softar.tasks import load_task

    tasks = {name: load_task(name, size=10) for name in ("mnns", "latin", "latin-prompt")}
    assert inputs.answer_length(tasks["mnns"], "soft", None) == 5
    assert inputs.answer_length(tasks["mnns"], "hard", 7) == 7
    assert inputs.answer_length(tasks["latin"], "hard", 7) == 0
    assert inputs.answer_length(tasks["latin-prompt"], "hard", None) == 25


# -- trace


def test_trace(softar, tmp_path):
    from softar.show.trace import from_json

    words = ["trace", PROMPT, "-d", "mnns-soft-tiny=soft", "-d", "mnns-diffusion-tiny=soft-mask"]
    code, out, err = softar(*words, "--json")
    assert (code, err) == (0, "")
    assert [from_json(line).family for line in out.splitlines()] == ["autoregressive", "diffusion"]
    code, out, err = softar(*words, "--html", tmp_path / "page.html")
    assert (code, out) == (0, "") and "page.html" in err
    assert "D4 D8 D1 D3" in (tmp_path / "page.html").read_text()
    code, out, _ = softar("trace", PROMPT, *SOFT)
    assert code == 0 and "nats" in out and "S12" in out and "\x1b" not in out
    code, out, _ = softar("trace", HOLES, "-m", "mnns-diffusion-tiny", "--max-new-tokens", 0)
    assert code == 0 and "forward" in out and "D4 D8" in out
    code, out, _ = softar("trace", "1 2 3 4 5 " + ". " * 20, "-m", "latin-block-tiny", "--json")
    assert code == 0 and from_json(out).cells[25:] == [None] * 25


# -- sweep


def test_sweep(softar, tmp_path):
    words = [
        "sweep",
        "-t",
        "latin",
        "--soft",
        "soft-mask",
        "--baseline",
        "hard",
        "--vary",
        "threshold=0.5,0.9",
        "--limit",
        "4",
        "--seed",
        "1",
        "-o",
        tmp_path,
    ]
    code, out, err = softar(*words, "--json")
    found = json.loads(out)
    assert (
        code == 0 and len(found["points"]) == 4 and Path(found["plot"]).is_file() and "[1/4]" in err
    )
    Path(found["plot"]).unlink()
    code, out, err = softar("sweep", "--plot", tmp_path)
    assert (
        code == 0
        and len(re.findall(r"^ *latin +baseline +hard", out, re.MULTILINE)) == 2
        and Path(found["plot"]).is_file()
        and "[1/4]" not in err
    )
    (tmp_path / "grid.yaml").write_text(
        "tasks: [latin]\nsoft: [soft-mask]\nlimit: 4\noutput_dir: elsewhere\n"
    )
    code, _, err = softar(
        "sweep", "--config", tmp_path / "grid.yaml", "-o", tmp_path, "--limit", "5"
    )
    assert code == 2 and "is of another grid" in err  # 5 rows, by the option


# -- serve


class Served:
    """Stands for a running vllm serve; tests/test_vllm.py has a real one."""

    url, model, seconds, log = "http://127.0.0.1:9", "mnns-tiny", 1.0, Path("log")

    def __init__(self, end):
        self.end, self.process, self.stopped = end, self, False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stopped = True

    def wait(self):
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end


@pytest.mark.parametrize(
    ("card", "prompt"),
    [
        (None, "Once upon a time"),
        ("pip install 'some", "Once upon a time"),  # not written here
        (decode_command("generate", "x", Origin()), "Once upon a time"),
        (decode_command("generate", "x", Origin(prompt="it's <bos> D4 ->")), "it's <bos> D4 ->"),
    ],
)
def test_a_server_is_asked_what_its_model_was_trained_on(tmp_path, card, prompt):
    if card is not None:
        (tmp_path / "README.md").write_text(f"```bash\n{card}\n```\n")
    server = SimpleNamespace(model=str(tmp_path), url="http://127.0.0.1:9")
    curl, again = streams.how_to_ask(server).splitlines()[1:]
    assert json.loads(shlex.split(curl)[-1])["prompt"] == shlex.split(again)[2] == prompt


@pytest.mark.parametrize("mixer", ["soft", "code:mixer"])
def test_a_server_is_asked_behind_the_prefix(tmp_path, mixer):
    """`softar generate` puts it there itself."""
    (tmp_path / "soft_config.json").write_text(
        json.dumps({"prompt_prefix": "<|think_1|>", "mixer": mixer})
    )
    server = SimpleNamespace(model=str(tmp_path), url="http://127.0.0.1:9")
    curl, again = streams.how_to_ask(server, soft=True).splitlines()[1:]
    body, prompt = json.loads(shlex.split(curl)[-1]), "Once upon a time"
    assert body["prompt"] == f"<|think_1|>{prompt}" and shlex.split(again)[2] == prompt


def test_serve(softar, monkeypatch):
    import_module("softar.vllm")
    asked = []
    server = Served(KeyboardInterrupt())
    monkeypatch.setattr("softar.vllm.serve", lambda *a, **k: asked.append((a, k)) or server)
    code, out, err = softar(
        "serve", "mnns-tiny", "--port", 9, "--json", "--", "--max-num-seqs", "16"
    )
    assert (
        code == 130 and json.loads(out)["url"] == server.url and server.stopped and "Ctrl-C" in err
    )
    (model,), options = asked[0]
    assert (model, options["port"], options["extra"]) == ("mnns-tiny", 9, ["--max-num-seqs", "16"])
    out = softar("serve", "mnns-tiny")[1]
    url, curl, again = out.splitlines()
    body = json.loads(shlex.split(curl)[-1])
    assert url == server.url and f"{url}/v1/completions" in curl and body["model"] == "mnns-tiny"
    words = shlex.split(again)
    assert words[:2] == ["softar", "generate"] and inputs.family(words[-1]) == "vllm"
    out = softar("serve", "mnns-tiny", "--soft")[1]
    assert [how["soft"] for _, how in asked] == [False, False, True] and "vllm_xargs" in out
    options = ["--soft", "--max-soft", 4, "--api-key", "secret", "--allow-mixer", "a:b"]
    out = softar("serve", "mnns-tiny", *options)[1]
    how = asked[-1][1]
    assert (how["max_soft"], how["api_key"], how["mixers"]) == (4, "secret", ["a:b"])
    assert "Bearer $VLLM_API_KEY" in out and "secret" not in out
    code, out, err = softar("serve", "mnns-diffusion-tiny")
    assert code == 2 and "starting" not in err and "masked-diffusion model" in err
    server.end = 3
    code, _, err = softar("serve", "mnns-tiny")
    assert code == 2 and "ended with code 3" in err

    def refuse(*args, **kwargs):
        raise import_module("softar.vllm").ServerError(
            "vllm serve ended with code 1; its last words:\nno\nmemory"
        )

    monkeypatch.setattr("softar.vllm.serve", refuse)
    code, out, err = softar("serve", "mnns-tiny")
    assert (code, out) == (2, "")
    assert err.splitlines()[1:] == [
        "no",
        "memory",
        "softar: error: vllm serve ended with code 1; its last words are above",
    ]


# -- errors

BAD = [
    (["nothing"], "No such command 'nothing'"),
    (["generate", "--nope"], "(softar generate --help)"),
    (["generate", PROMPT, "--temperature", "hot"], "Invalid value for '--temperature'"),
    (["serve"], "Missing argument 'model'"),
    (["generate", "hello world", *SOFT], "the model's tokenizer cannot read 'hello world'"),
    (["generate", "", *SOFT], "the text is empty"),
    (["generate", *SOFT], "the text is empty"),  # an empty pipe
    (["generate", PROMPT, "-m", "mnns-sfot-tiny"], "did you mean 'mnns-soft-tiny'?"),
    (["generate", PROMPT, "-m", "./nowhere"], "there is no such folder"),
    (["generate", PROMPT, *SOFT, "-d", "sof"], "did you mean 'soft'?"),
    (["generate", PROMPT, *SOFT, "-d", "soft:top_j=3"], "takes no 'top_j'"),
    (["generate", PROMPT, *SOFT, "-d", "soft:softness=2"], "softness=2 must lie in [0, 1]"),
    (
        ["generate", PROMPT, *SOFT, "-d", "soft:softness=0.5", "--softness", "0.7"],
        "--softness is in --decoder",
    ),
    (
        ["generate", PROMPT, *SOFT, "-d", "soft:max_new_tokens=3", "--max-new-tokens", "8"],
        "--max-new-tokens 8: --decoder soft:max_new_tokens=3 says it, too: leave one out",
    ),
    (["fill", HOLES, "-d", "hard:gen_length=3", "--gen-length", "2"], "--gen-length 2: --decoder"),
    (["fill", HOLES, "-d", "hard:max_new_tokens=3", "--gen-length", "2"], "says it, too"),
    (
        ["fill", HOLES, "-d", "hard:gen_length=3,max_new_tokens=2"],
        "max_new_tokens=2 and gen_length=3",
    ),
    (["trace", PROMPT, *SOFT, "-d", "soft:max_new_tokens=3", "--max-new-tokens", "8"], "leave one"),
    (
        ["generate", PROMPT, *SOFT, "-d", "sampled:seed=3", "--seed", "0"],
        "--seed 0: --decoder sampled:seed=3 says it, too: leave one out",
    ),
    (["fill", HOLES, "-d", "hard:seed=3", "--seed", "2"], "--seed 2: --decoder"),
    (["trace", PROMPT, *SOFT, "-d", "gumbel:seed=3", "--seed", "2"], "--seed 2: --decoder"),
    (
        ["compare", *SOFT, "-d", "discrete:max_new_tokens=3", "--max-new-tokens", "8"],
        "--max-new-tokens 8: --decoder",
    ),
    (["generate", PROMPT, *SOFT, "-d", "beam", "--top-k", "3"], "takes no 'top_k'"),
    (["generate", PROMPT, *SOFT, "-d", "hard"], "needs a masked-diffusion model"),
    (["generate", PROMPT, *SOFT, "--chat"], "has no chat template"),
    (["generate", PROMPT, *SOFT, "--system", "Be brief."], "--system"),
    (["generate", PROMPT, *SOFT, "--dtype", "float7"], "dtype='float7' is unknown"),
    (["generate", PROMPT, *SOFT, "--device", "abacus"], "device='abacus' is unknown"),
    (["generate", PROMPT, *SOFT, "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
    (["fill", PROMPT], "there is nothing to fill"),
    (["fill", HOLES, "-m", "mnns-soft-tiny"], "`softar generate` is for it"),
    (["fill", HOLES, "-d", "mnns-soft-tiny=soft"], "`softar generate` is for it"),
    (["fill", HOLES, "--threshold", "7"], "threshold=7.0 must lie in (0, 1]"),
    (["compare", "--task", "sudoku"], "task='sudoku' is unknown"),
    (["compare", "--limit", "0"], "--limit 0 must be at least 1"),
    (["compare", *FEW, "-d", "soft"], "--decoder soft is given twice"),
    (["compare", *FEW, "--baseline", "soft:softness=1"], "baseline='soft:softness=1'"),
    (["compare", *FEW, "--repeats", "0"], "repeats=0"),
    (["compare", *FEW, "--nfe", "0"], "must be > 0"),
    # before a model is opened
    (["trace", PROMPT, "-m", "./gone", "--html", "nowhere/page.html"], "is in no folder that is"),
    (["trace", PROMPT, "-m", "./gone", "--html", "."], "--html '.' is a folder"),
    (["sweep"], "the grid lacks"),
    (["sweep", "--plot", "nowhere"], "holds no sweep"),
    (
        ["sweep", "--plot", "foreign"],
        "foreign/summary.json is no results file of a sweep (KeyError('run')): delete",
    ),
    (["sweep", "--plot", "nowhere", "-t", "mnns"], "--plot FOLDER stands alone"),
    (["sweep", "--config", "nowhere.yaml"], "nowhere.yaml"),
    (
        ["sweep", "-t", "latin", "--soft", "hard", "--vary", "threshold"],
        "--vary 'threshold' must be key=value,value",
    ),
]


@pytest.mark.parametrize("words, says", BAD, ids=[" ".join(words) or "nothing" for words, _ in BAD])
def test_errors_are_one_line(softar, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("foreign").mkdir()
    Path("foreign/summary.json").write_text(
        '{"rows": [{"task": "mnns", "role": "soft", "accuracy": 1}]}'
    )
    code, out, err = softar(*words)
    assert (code, out) == (2, "")
    assert err.startswith("softar: error: ") and err.count("\n") == 1 and says in err
    assert [path.name for path in tmp_path.rglob("*")] == ["foreign", "summary.json"]


def test_an_error_that_nobody_expects_keeps_its_traceback(monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(inputs, "open_decoder", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", PROMPT])


def test_errors_of_several_lines_become_one(softar, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("one\n  two\n\nthree")

    monkeypatch.setattr(inputs, "open_decoder", broken)
    assert softar("generate", PROMPT) == (2, "", "softar: error: one two three\n")


def test_ctrl_c(softar, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "open_decoder", interrupted)
    assert softar("generate", PROMPT) == (130, "", "")
    monkeypatch.setattr(cli, "app", interrupted)  # outside of typer, too
    assert softar("generate", PROMPT) == (130, "", "")


# -- pipes


def test_only_json_on_stdout_whatever_libraries_print(softar, monkeypatch):
    plain = inputs.open_decoder

    def chatty(*args, **kwargs):
        print("loading...")
        return plain(*args, **kwargs)

    monkeypatch.setattr(inputs, "open_decoder", chatty)
    code, out, err = softar("generate", PROMPT, *SOFT, "--json")
    assert code == 0 and json.loads(out)["text"] and err == "loading...\n"


def test_only_results_holds_children_too():
    code = (
        "import os, subprocess; from softar.cli.streams import only_results\n"
        "print('before')\n"
        "with only_results(): print('python'); os.system('echo child'); subprocess.run(['echo', 'another'])\n"
        "print('after')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "before\nafter\n" and sorted(done.stderr.split()) == [
        "another",
        "child",
        "python",
    ]


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_leaves_is_no_error(buffered):
    """As `softar models | head -0`: nobody reads what is written, at once or at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | (
        {} if buffered else {"PYTHONUNBUFFERED": "1"}
    )
    done = process("models", stdout=writer, stderr=subprocess.PIPE, capture_output=False, env=env)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.rest
def test_a_whole_process():
    """From the words to the exit code, with another program's eyes: nothing but JSON, no
    warnings."""
    done = process("generate", *SOFT, "--json", input=PROMPT + "\n")
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)[
        "model"
    ] == "mnns-soft-tiny"


def test_json_has_no_nan():
    assert streams._plain(
        {"a": [float("nan"), 1.5, Path("x"), None, True], 2: (float("inf"),)}
    ) == {"a": [None, 1.5, "x", None, True], "2": [None]}


def test_masks_are_whole():
    assert inputs.with_masks("a ___ b _", "<mask>") == "a <mask> b <mask>"
    assert (
        inputs.with_masks("a <|mdm_mask|> b _", "<|mdm_mask|>") == "a <|mdm_mask|> b <|mdm_mask|>"
    )
