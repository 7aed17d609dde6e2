"""A grid of runs: shared, restarted, refused, summed up and drawn."""

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from trl import TrlParser

from softar.decoders.answer import Decoded
from softar.evals import sweep as module
from softar.evals.sweep import Grid, read_grid, sweep
from softar.evals.sweep_summary import aggregate, plot_sweep, read_sweep, sweep_table
from softar.specs import json_or_text

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "sweep.py"
SMALL = dict(
    tasks=["latin", "mnns"],
    soft=["soft-mask"],
    baseline=["hard:temperature=0.5"],
    vary={"threshold": [0.5, 0.9]},
    seeds=[0, 1],
    limit=8,
)
TIMES = ("seconds", "seconds_per_row", "seconds_sd", "tokens_per_s")


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing interrupted: folder, rows, what it said."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    rows = sweep(read_grid(SMALL), folder, console=console)
    return folder, rows, console.export_text()


def results(folder):
    return sorted(folder.glob("runs/*/results.json"))


def test_runs_are_the_product_of_the_grid():
    runs = read_grid(SMALL).runs()
    assert len(runs) == 2 * 2 * 2 * 2 and len({run.name for run in runs}) == 16
    assert [run.seed for run in runs[:2]] == [0, 1] and runs[0].role == "soft"
    assert runs[0].spec == "soft-mask:threshold=0.5"
    assert runs[4].spec == "hard:temperature=0.5,threshold=0.5"
    assert runs[0].name == "latin-soft-soft-mask-threshold=0.5-seed0"
    assert {run.task for run in runs[:8]} == {"latin"}
    twice = Grid(tasks=["mnns"], soft=["a/b=soft-mask", "a/b=soft-mask"], seeds=[3, 3])
    assert len(twice.runs()) == 1 and "/" not in twice.runs()[0].name
    varied = Grid(
        tasks=["latin"], soft=["hard"], vary={"select": ["margin", "entropy"], "steps": [4, 8]}
    ).runs()
    assert varied[1].spec == "hard:select=margin,steps=8"


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=300), st.sampled_from([1, 40]), st.integers(0, 2**32))
def test_a_run_has_a_name_that_a_folder_can_have(task, times, seed):
    """As long ones as paths make, too: cut, and told from each other; all others stay as they were."""
    runs = [
        module.Run(f"{task * times}{end}", "soft", "discrete", (), each)
        for end in ("a", "b")
        for each in (seed, seed + 1)
    ]
    names = [run.name for run in runs]
    for run, name in zip(runs, names):
        whole = re.sub(r"[^\w.=+-]+", "-", f"{run.task}-soft-discrete-seed{run.seed}")
        assert len(name.encode()) <= 255 and "/" not in name
        assert (name == whole) == (len(whole.encode()) <= 255) and name.endswith(f"-seed{run.seed}")
    assert len({*names}) == 4
    if len(str(seed)) == len(str(seed + 1)):  # the seeds of a setting are one point of a plot
        assert len({name.rsplit("-seed", 1)[0] for name in names}) == 2


def test_a_sweep_of_long_paths(tmp_path):
    deep = tmp_path.joinpath(*["a_project_of_a_long_name"] * 8)
    deep.mkdir(parents=True)
    (deep / "rows.jsonl").write_text('{"prompt": "<bos> D4 D8 D1 D3 ->", "answer": "S0"}\n')
    grid = dict(tasks=[f"{deep}/rows.jsonl"], soft=["mnns-tiny=discrete"], max_new_tokens=4)
    quiet = Console(file=open(os.devnull, "w"))
    rows = sweep(read_grid(grid), tmp_path / "out", console=quiet)
    assert rows == sweep(read_grid(grid), tmp_path / "out", console=quiet) and len(rows) == 1


def test_prompts_are_chats_where_the_model_has_a_template(tmp_path, monkeypatch):
    """As `softar compare` decodes them: a chat model read bare texts in a sweep."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 + 2", "answer": "4"}\n')

    class Chatty:
        name, columns, tokenizer = "chatty", {"model": "m"}, SimpleNamespace(chat_template="{{ }}")
        read = []

        def decode(self, prompts):
            self.read += prompts
            return [Decoded("4", (1,), 1.0, 1.0, 0.1) for _ in prompts]

    monkeypatch.setattr(module, "_decoder", lambda grid, run: Chatty())
    task = str(tmp_path / "rows.jsonl")
    for chat, prompt in ((None, [{"role": "user", "content": "2 + 2"}]), (False, "2 + 2")):
        Chatty.read.clear()
        grid = Grid(tasks=[task], soft=["m=soft"], max_new_tokens=4, chat=chat)
        assert module.measure(grid, grid.runs()[0])["accuracy"] == 1
        assert Chatty.read and all(read == prompt for read in Chatty.read)
    with pytest.raises(ValueError, match="chat='yes' must be true, false or null"):
        Grid(tasks=[task], soft=["m=soft"], chat="yes")


def test_summary(whole):
    folder, rows, said = whole
    names = [run.name for run in read_grid(SMALL).runs()]
    assert [row["run"] for row in rows] == names
    assert {file.parent.name for file in results(folder)} == set(names)
    for row in rows:
        (own,) = json.loads((folder / "runs" / row["run"] / "results.json").read_text())["rows"]
        assert own == row
        assert row["n"] == 8 and 0 <= row["accuracy"] <= 1
        assert row["nfe"] >= 1 and row["tokens_per_s"] > 0 and row["threshold"] in (0.5, 0.9)
        assert row["model"] == f"{row['task']}-diffusion-tiny"
        assert (row["role"], row["decoder"]) in (("soft", "soft-mask"), ("baseline", "hard"))
        assert row["run"] in said
    # A higher threshold takes more forwards
    nfe = {(r["task"], r["role"], r["threshold"], r["seed"]): r["nfe"] for r in rows}
    assert all(nfe[t, role, 0.9, s] > nfe[t, role, 0.5, s] for t, role, _, s in nfe)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rows"] == rows and summary["schema"] == 1 and summary["versions"]["torch"]
    with open(folder / "summary.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(line["accuracy"]) for line in table] == [row["accuracy"] for row in rows]
    assert {"nfe", "tokens_per_s", "threshold", "role", "seed"} <= set(table[0])
    # Seeds are those of what is drawn: the baseline here draws, soft masks do not
    accuracy = {
        (r["task"], r["role"], r["threshold"], r["seed"]): (r["accuracy"], r["nfe"]) for r in rows
    }
    pairs = [
        (value, accuracy[t, role, h, 1], role)
        for (t, role, h, s), value in accuracy.items()
        if s == 0
    ]
    assert all(a == b for a, b, role in pairs if role == "soft")
    assert any(a != b for a, b, role in pairs if role == "baseline")


def test_goes_on_where_it_stopped(whole, tmp_path, monkeypatch):
    """Finished runs are not run again, a half-written one is, and Ctrl-C says how to go on."""
    _, rows, _ = whole
    grid, done = read_grid(SMALL), []

    def counted(grid, run, console):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run.name)
        return measure(grid, run)

    measure = module.measure
    monkeypatch.setattr(module, "measure", counted)
    console = Console(record=True, width=300, file=open(os.devnull, "w"))
    with pytest.raises(KeyboardInterrupt):
        sweep(grid, tmp_path, console=console)
    assert (
        f"3 of 16 runs are whole in {tmp_path}: the same command resumes" in console.export_text()
    )
    assert not (tmp_path / "summary.json").exists() and len(results(tmp_path)) == 3
    kept = [file.stat().st_mtime_ns for file in results(tmp_path)]
    broken = tmp_path / "runs" / done[1] / "results.json"
    broken.write_text(broken.read_text()[:-50])
    first, done = done[:], [None] * 4  # never 3
    again = sweep(grid, tmp_path)
    assert timeless(again) == timeless(rows)
    assert done[4:] == [first[1], *(run.name for run in grid.runs() if run.name not in first)]
    assert [
        file.stat().st_mtime_ns for file in results(tmp_path) if file.parent.name in first
    ].count(kept[0]) == 1
    done = [None] * 4
    assert sweep(grid, tmp_path) == again and done == [None] * 4


def test_ctrl_c_inside_a_decoder_is_no_failure(tmp_path, monkeypatch):
    class Interrupted:
        name, columns = "interrupted", {}

        def decode(self, prompts):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_decoder", lambda grid, run: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        sweep(read_grid(SMALL), tmp_path)
    assert not results(tmp_path)


def test_a_task_with_other_arguments_is_another_task(tmp_path):
    """The lines of three went through one panel; and a filler of masks finds its model."""
    tasks = ["mnns:digits=2", "mnns:digits=3", "mnns"]
    rows = sweep(Grid(tasks=tasks, soft=["hard"], limit=2), tmp_path, console=Console(quiet=True))
    assert [row["task"] for row in rows] == tasks == [p["task"] for p in aggregate(rows)]
    assert {row["model"] for row in rows} == {"mnns-diffusion-tiny"}


def test_votes_are_on_what_the_task_reads():
    grid = read_grid(dict(tasks=["mnns"], soft=["mnns-tiny=self-consistency:votes=2"], limit=2))
    decoder = module._decoder(grid, grid.runs()[0])
    assert decoder.normalise("S1 S4") == decoder.normalise("S2 S4") == "S4"


def test_length_is_that_of_the_tasks_completions():
    """A diffusion model fills a template and adds nothing to it."""
    lengths = {
        run.task: module._length(grid, run) for grid in [read_grid(SMALL)] for run in grid.runs()
    }
    assert lengths == {"latin": 0, "mnns": 5}
    grid = read_grid(SMALL | dict(max_new_tokens=7))
    assert {run.task: module._length(grid, run) for run in grid.runs()} == {"latin": 0, "mnns": 7}


def test_a_run_that_fails_leaves_the_others(tmp_path, monkeypatch):
    grid = read_grid(SMALL | dict(tasks=["mnns"], seeds=[0]))
    measure = module.measure

    def some(grid, run, console):
        if run.role == "baseline" and run.setting[0][1] == 0.5:
            raise RuntimeError("out of\nmemory [1]")
        return measure(grid, run)

    monkeypatch.setattr(module, "measure", some)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    with pytest.raises(
        ValueError, match=r"1 of 4 runs failed, \['mnns-baseline.*the same command tries them again"
    ):
        sweep(grid, tmp_path, console=console)
    assert "failed: out of memory [1]" in console.export_text()
    assert len(json.loads((tmp_path / "summary.json").read_text())["rows"]) == 3
    monkeypatch.setattr(module, "measure", measure)
    assert len(sweep(grid, tmp_path)) == 4


def test_what_a_decoder_failed_of_is_said_once(tmp_path, monkeypatch):
    class Broken:
        name, columns = "broken", {}

        def decode(self, prompts):
            raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "_decoder", lambda grid, run: Broken())
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    with pytest.raises(ValueError, match="1 of 1 runs failed"):
        sweep(Grid(tasks=["mnns"], soft=["soft-mask"], limit=4), tmp_path, console=console)
    said = console.export_text()
    assert said.count("out of memory") == 1 and "failed: its decoder failed, as said above" in said


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(seeds=[0, 2]), r"seeds=\[0, 1\] and not \[0, 2\]: take another folder, or delete"),
        (
            dict(vary={"threshold": [0.5]}),
            r"vary=\{'threshold': \[0.5, 0.9\]\} and not \{'threshold': \[0.5\]\}",
        ),
        # the first difference
        (dict(tasks=["latin"], limit=9), r"tasks=\['latin', 'mnns'\] and not \['latin'\]"),
        (dict(limit=None), "limit=8 and not None"),
    ],
)
def test_another_grid_is_refused(whole, change, message):
    folder, rows, _ = whole
    with pytest.raises(ValueError, match=message) as caught:
        sweep(read_grid(SMALL | change), folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert json.loads((folder / "summary.json").read_text())["rows"] == rows


def test_a_folder_without_a_readable_grid_is_refused(whole, tmp_path):
    file = tmp_path / "runs" / "other" / "results.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(ValueError, match="of an unknown grid"):
        sweep(read_grid(SMALL), tmp_path)
    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(ValueError, match=r"grid\.json cannot be read"):
        sweep(read_grid(SMALL), tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(thresholds=[1]), r"does not have \['thresholds'\]; known: \['baseline'"),
        (dict(tasks=[]), "tasks: the grid needs at least one value"),
        (dict(tasks="latin"), "tasks='latin' must be a list"),
        (dict(seeds=[]), "seeds: the grid needs at least one value"),
        (dict(soft=[], baseline=[]), "soft and baseline are empty"),
        (
            dict(vary={"threshold": []}),
            "vary threshold|threshold: the grid needs at least one value",
        ),
        (dict(vary={"threshold": 0.5}), "vary threshold=0.5 must be a list"),
        (dict(vary=["threshold"]), "give mappings"),
        (dict(limit=0), "limit=0 must be at least 1"),
        (dict(limit="3"), "limit='3' must be a whole number"),
        (dict(batch_size=0), "batch_size=0 must be"),
        (dict(models={"sudoku": "x"}), r"models names \['sudoku'\]"),
        (dict(tasks=["sudoku"]), "task='sudoku' is unknown"),
        (dict(soft=["soft-musk"]), "'soft-musk' is unknown"),
        (
            dict(soft=["gumbel"], tasks=["mnns"]),
            "decoder 'gumbel' on task 'mnns' has no model: say MODEL=gumbel",
        ),
        (
            dict(soft=["hard:threshold=0.7"]),
            r"'hard:threshold=0.7' sets \['threshold'\], which the grid varies",
        ),
        (dict(soft=["hard:seed=3"]), r"'hard:seed=3' sets \['seed'\], which the grid varies"),
        (dict(soft=["a-b=hard", "a/b=hard"]), "would share the folder"),
        (dict(vary={"treshold": [0.5]}), "takes no 'treshold'"),
        (dict(vary={"threshold": [2]}), r"threshold=2 must lie in \(0, 1\]"),
    ],
)
def test_bad_grids(change, message, tmp_path):
    """Nothing is decoded."""
    with pytest.raises(ValueError, match=message):
        sweep(read_grid(SMALL | change), tmp_path)
    assert not results(tmp_path)


def test_autoregressive_decoders_and_models_by_task(tmp_path):
    grid = Grid(
        tasks=["mnns"],
        soft=["gumbel:budget=3"],
        baseline=["mnns-tiny=discrete"],
        models={"mnns": "mnns-tiny"},
        limit=6,
    )
    soft, hard = sweep(grid, tmp_path)
    assert (soft["model"], soft["decoder"], hard["decoder"]) == ("mnns-tiny", "gumbel", "discrete")
    assert soft["nfe"] <= 5  # as many tokens as a completion has, and one


# Aggregation


def rows_of(role, spec, setting, *values):
    return [
        dict(
            task="t",
            role=role,
            spec=spec,
            model="m",
            varied=setting,
            seed=seed,
            run=f"t-{role}-{spec}-{setting}-seed{seed}",
            accuracy=a,
            nfe=n,
            seconds_per_row=n / 10,
            tokens_per_s=100 * n,
        )
        for seed, (a, n) in enumerate(values)
    ]


def test_aggregate():
    rows = rows_of("soft", "s", "k=1", (0.2, 4), (0.4, 6)) + rows_of(
        "baseline", "s", "k=1", (0.9, 1)
    )
    first, second = aggregate(rows[::-1])[::-1]
    assert (first["role"], first["n_seeds"], second["n_seeds"]) == ("soft", 2, 1)
    assert first["accuracy"] == pytest.approx(0.3) and first["accuracy_sd"] == pytest.approx(
        0.2 / 2**0.5
    )
    assert (first["nfe"], first["seconds_per_row"], first["tokens_per_s"]) == (5, 0.5, 500)
    assert second["accuracy_sd"] == 0


def test_plot(whole, tmp_path, monkeypatch):
    """Each decoder is one line over its settings, in both panels of each task."""
    from matplotlib.axes import Axes

    folder, rows, _ = whole
    drawn = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(
        Axes,
        "errorbar",
        lambda axes, x, y, *a, **kw: (
            drawn.append((axes.get_xscale(), x, y, kw)),
            errorbar(axes, x, y, *a, **kw),
        )[1],
    )
    file = plot_sweep(folder)
    assert file == folder / "sweep.png" and file.read_bytes().startswith(b"\x89PNG")
    assert len(drawn) == 2 * 2 * 2 and all(len(x) == 2 for _, x, _, _ in drawn)
    assert all(list(x) == sorted(x) for _, x, _, _ in drawn if min(x) >= 1)  # forwards
    points = {(p["task"], p["role"], p["nfe"]): p["accuracy"] for p in aggregate(rows)}
    assert {point for _, x, y, _ in drawn for point in zip(x, y)} >= {
        (nfe, a) for (_, _, nfe), a in points.items()
    }
    styles = {kw["label"]: kw["linestyle"] for *_, kw in drawn}
    assert styles == {"soft-mask (soft)": "-", "hard:temperature=0.5 (baseline)": "--"}
    # While it is not finished: the runs that are
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / rows[0]["run"]).symlink_to(folder / "runs" / rows[0]["run"])
    assert plot_sweep(tmp_path).stat().st_size > 1000
    with pytest.raises(ValueError, match="holds no sweep"):
        plot_sweep(tmp_path / "nothing")


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError('rows')"),
        ('{"rows": []}', "no rows"),
        ('{"rows": "text"}', "TypeError"),
        # a comparison's
        ('{"rows": [{"task": "mnns", "name": "soft", "accuracy": 0.5}]}', "KeyError('run')"),
        (
            json.dumps({"rows": [rows_of("soft", "s", "", (0.5, 4))[0] | dict(accuracy="high")]}),
            "TypeError",
        ),
    ],
)
@pytest.mark.parametrize("place", ["summary.json", "runs/some/results.json"])
def test_a_file_that_no_sweep_wrote(tmp_path, place, text, why):
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    for read in (read_sweep, plot_sweep):
        with pytest.raises(
            ValueError, match=r"is no results file of a sweep \(.*\): delete it and run"
        ) as caught:
            read(tmp_path)
        said = str(caught.value)
        assert said.startswith(str(file)) and why in said and "\n" not in said


def test_a_table_says_what_failed(tmp_path, monkeypatch):
    """Of a scorer that fails where an answer is wrong, too: it counts 0, so that no run is better."""

    class Half:
        name, columns = "half", dict(decoder="half", model="m", setting="", family="f")

        def decode(self, prompts):
            return [Decoded(str(i % 2), (1,), 1.0, 1.0, 0.001) for i in range(len(prompts))]

    task = SimpleNamespace(
        name="t", test=Dataset.from_list([{"prompt": "p"}] * 8), stop=(), extract=str.strip
    )
    task.score, task.max_new_tokens = lambda text, row: 1 / int(text), 4
    monkeypatch.setattr(module, "load_task", lambda name: task)
    monkeypatch.setattr(module, "_decoder", lambda grid, run: Half())
    grid = read_grid(dict(tasks=["t"], soft=["mnns-tiny=discrete"], seeds=[0, 1]))
    rows = sweep(grid, tmp_path / "s", console=Console(file=open(os.devnull, "w")))
    assert [(row["accuracy"], row["n"], row["scorer_failures"]) for row in rows] == [
        (0.5, 8, 4)
    ] * 2
    console = Console(record=True, width=120, file=open(os.devnull, "w"))
    console.print(sweep_table(points := aggregate(rows)))
    assert (points[0]["n"], points[0]["scorer_failures"], points[0]["failures"]) == (8, 8, 0)
    text = console.export_text()
    assert (
        "scorer failed" in text and " n " in text and " failed" not in text.replace("r failed", "")
    )


def test_a_table_of_a_sweep():
    rows = rows_of("soft", "m=s[k]", "k=1", (0.2, 4), (0.4, 6)) + rows_of(
        "baseline", "s" * 90, "k=1", (0.9, 1)
    )
    console = Console(record=True, width=80, file=open(os.devnull, "w"))
    console.print(sweep_table(aggregate(rows)))
    text = console.export_text()
    assert "m=s[k]" in text and "0.300 ± 0.141" in text and max(map(len, text.splitlines())) <= 80
    for head in ("task", "role", "decoder", "setting", "accuracy", "NFE", "s/row", "tokens/s"):
        assert head in text
    console.print(sweep_table([row | dict(task="d/" * 120) for row in aggregate(rows)]))
    text_of_paths = console.export_text()
    assert "decoder" in text_of_paths and "0.300 ± 0.141" in text_of_paths
    assert text_of_paths.count("d/") == 240 and "m=s[k]" in text_of_paths.replace("\n", "")
    assert text.count("s") >= 90 and "0.900" in text and "…" not in text


# The recipe


def recipe():
    spec = importlib.util.spec_from_file_location("sweep_recipe", RECIPE)
    loaded = sys.modules["sweep_recipe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_recipe_reads_command_line_and_yaml(tmp_path):
    sweep_recipe = recipe()
    assert sweep_recipe.with_demo(["--limit", "3"])[-2:] == ["--limit", "3"]
    assert sweep_recipe.with_demo([])[:3] == ["--tasks", "latin", "mnns"]
    assert sweep_recipe.with_demo(["--soft", "hard"]) == ["--soft", "hard"]
    with pytest.raises(ValueError, match="there is no such file"):
        sweep_recipe.with_demo(["--config", "nowhere.yaml"])
    (args,) = TrlParser(sweep_recipe.SweepArguments).parse_args_and_config(
        ["--config", str(ROOT / "recipes" / "configs" / "sweep_mnns.yaml"), "--seeds", "7"]
    )
    assert sweep_recipe.mapping("vary", args.vary) == {
        "temperature": [0.3, 0.6, 1.0]
    } and args.seeds == [7]
    assert sweep_recipe.mapping("vary", ["a=1,x", "b=c"]) == {"a": ["1", "x"], "b": ["c"]}
    with pytest.raises(ValueError, match="vary='a' must be key=value"):
        sweep_recipe.mapping("vary", ["a"])
    assert [json_or_text(v) for v in ("0.5", "null", "soft", 3)] == [0.5, None, "soft", 3]
    with pytest.raises(ValueError, match="begins with a quote"):
        json_or_text(r'"\d"')


@pytest.mark.rest
def test_two_processes_interrupted_and_resumed(whole, tmp_path, capsys):
    """Interrupted in the middle, the sweep ends with the rows of the uninterrupted one; another
    grid is refused."""
    folder = tmp_path / "sweep"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(RECIPE),
        "--tasks",
        "latin",
        "mnns",
        "--soft",
        "soft-mask",
        "--baseline",
        "hard:temperature=0.5",
        "--vary",
        "threshold=0.5,0.9",
        "--seeds",
        "0",
        "1",
        "--limit",
        "8",
        "--batch_size",
        "64",
        "--output_dir",
        str(folder),
    ]
    log = open(tmp_path / "log", "w")
    child = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while len(results(folder)) < 2 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)  # the launcher hands it on
    child.wait(timeout=60)
    assert (
        f"of 16 runs are whole in {folder}: the same command resumes"
        in (tmp_path / "log").read_text()
    )
    early = {file.parent.name: file.stat().st_mtime_ns for file in results(folder)}
    assert 2 <= len(early) < 16, (tmp_path / "log").read_text()[-2000:]
    assert not (folder / "summary.json").exists()
    victim, *others = early
    broken = folder / "runs" / victim / "results.json"
    broken.write_text(broken.read_text()[:100])  # as if it had been killed while it wrote
    done = warm.run(RECIPE, command[7:], os.environ | {"COLUMNS": "200"}, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert timeless(rows) == timeless(whole[1])
    assert all(
        (folder / "runs" / n / "results.json").stat().st_mtime_ns == early[n] for n in others
    )
    # each run by one process
    assert done.stderr.count("] latin-") + done.stderr.count("] mnns-") == 16 - len(others)
    assert done.stdout.count("threshold=0.9") == 4 and (folder / "sweep.png").is_file()
    (args,) = TrlParser(recipe().SweepArguments).parse_args_and_config(
        [*command[7:], "--repeats", "2"]
    )
    with pytest.raises(SystemExit) as stopped:
        sys.modules["sweep_recipe"].main(args)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"sweep.py: error: {folder} is of another grid, with repeats=1 and not 2: take "
        "another folder, or delete this one\n"
    )
