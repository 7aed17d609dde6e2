"""What the training recipes share, without any training."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from softar import rows as softar_rows
from softar.launch import LAUNCHED, Processes, Program, launch, split_processes
from softar.recipe import interruptible, named_model, one_line_errors
from softar.recipe_config import with_default_config, with_found_config
from softar.resume import checkpoint_of, last_checkpoint, resumes
from softar.rows import APART, CUSTOM, anew, check_resume, parse_rows, saved_row, train_rows

ROWS = {"a": {}, "b": {}, "c": {}}
GROUPS = {"demo": ["a", "c"], "all": list(ROWS)}


def training_of(**changes):
    common = dict(resume_from_checkpoint=None, max_steps=4, seed=42, output_dir="runs/x")
    return SimpleNamespace(**common | changes)


def checkpoint_at(folder, step, is_whole=True):
    (checkpoint := folder / f"checkpoint-{step}").mkdir(parents=True)
    header = b"{}"  # of no tensors
    weights = len(header).to_bytes(8, "little") + header
    (checkpoint / "model.safetensors").write_bytes(weights)
    if is_whole:
        (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def test_the_module_is_light():
    code = "import sys, softar.recipe; print({'torch', 'transformers', 'trl', 'numpy', 'rich'} & {*sys.modules})"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "set()\n"
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, [CUSTOM]),
        (CUSTOM, [CUSTOM]),
        ("b", ["b"]),
        ("demo", ["a", "c"]),
        ("b,demo,a", ["b", "a", "c"]),
    ],
)
def test_rows_are_names_and_groups_each_once(text, names):
    assert parse_rows(text, ROWS, GROUPS) == names


@pytest.mark.parametrize(("text", "bad"), [("", ""), ("demo,", ""), ("a,dem", "dem"), ("A", "A")])
def test_an_unknown_row_is_named_with_what_there_is(text, bad):
    with pytest.raises(
        ValueError,
        match=f"^rows='{text}': '{bad}' is unknown; choose demo, all, or out of a, b, c$",
    ):
        parse_rows(text, ROWS, GROUPS)


@pytest.mark.parametrize(
    ("value", "does"),
    [(None, False), ("false", False), (False, False), ("true", True), ("x", True)],
)
def test_what_resumes(value, does):
    assert resumes(training_of(resume_from_checkpoint=value)) is does


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    checkpoint_at(tmp_path, 9)
    newest = checkpoint_at(tmp_path, 10)
    checkpoint_at(tmp_path, 11, is_whole=False)
    assert last_checkpoint(tmp_path) == str(newest)
    for value, expected in ((None, None), ("true", str(newest)), (str(newest), str(newest))):
        assert (
            checkpoint_of(training_of(resume_from_checkpoint=value, output_dir=tmp_path))
            == expected
        )


def test_earlier_checkpoints_are_set_apart_in_place_of_still_earlier_ones(tmp_path, capsys):
    with anew([tmp_path]):
        pass
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out
    (tmp_path / "rows.json").write_text("[]")  # somebody's own
    for step in (2, 4):
        checkpoint_at(tmp_path, step)
        (tmp_path / "row.json").write_text("[]")
        (tmp_path / "model.safetensors").write_text("")
        with anew([tmp_path]):
            assert not (tmp_path / "row.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["_earlier", "rows.json"]
    left = sorted(p.name for p in (tmp_path / "_earlier").iterdir())
    assert left == ["checkpoint-4", "model.safetensors", "row.json"]
    assert capsys.readouterr().out.count(f"now in {tmp_path / '_earlier'}") == 2


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.*") if p.is_file()
    }


@pytest.mark.parametrize("runs", [0, 1, 2])
@pytest.mark.parametrize(
    ("code", "trained", "is_back"),
    [
        (2, None, True),
        (2, "checkpoint", False),
        (2, "row", False),
        (1, None, False),
        (0, None, False),
    ],
)
def test_an_error_before_anything_is_trained_leaves_the_folders_as_they_were(
    tmp_path, runs, code, trained, is_back
):
    """Checkpoints, what was set apart earlier, and the lines of a row that was finished."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
        for run in range(runs):
            with anew([folder]):
                checkpoint_at(folder, run)
        (folder / "row.json").write_text('["old"]')
    before = tree(tmp_path)
    with pytest.raises(SystemExit), anew(folders):
        assert not (folders[1] / "row.json").exists()
        if trained == "checkpoint":
            checkpoint_at(folders[0], 9)
        elif trained == "row":
            (folders[0] / "row.json").write_text('["new"]')
        sys.exit(code)
    assert (tree(tmp_path) == before) is is_back
    assert is_back or not any(p.exists() for p in folders[1].glob("[!_]*-[0-9]"))
    assert not [*tmp_path.rglob("_earlier/_earlier")]


def test_a_finished_row_counts_if_the_run_goes_on_from_it(tmp_path):
    go_on = training_of(resume_from_checkpoint="true")
    assert saved_row(tmp_path, go_on) is None
    lines = [{"train_steps": 4}, {"train_steps": 4}]
    (tmp_path / "row.json").write_text(json.dumps(lines))
    assert saved_row(tmp_path, go_on) == lines
    assert saved_row(tmp_path, training_of(resume_from_checkpoint="true", max_steps=-1)) == lines
    assert saved_row(tmp_path, training_of(resume_from_checkpoint="true", max_steps=8)) is None
    assert saved_row(tmp_path, training_of()) is None


def test_a_checkpoint_to_go_on_from_is_whole_and_of_a_single_run(tmp_path):
    whole, broken = checkpoint_at(tmp_path, 2), checkpoint_at(tmp_path, 4, is_whole=False)
    for value in (None, "false", "true", "whole"):
        check_resume(training_of(resume_from_checkpoint=value), is_single=False)
    check_resume(training_of(resume_from_checkpoint=str(whole)), is_single=True)
    with pytest.raises(ValueError, match=r"checkpoint-2'.*several rows or seeds give true"):
        check_resume(training_of(resume_from_checkpoint=str(whole)), is_single=False)
    with pytest.raises(ValueError, match="checkpoint-4' holds no whole checkpoint"):
        check_resume(training_of(resume_from_checkpoint=str(broken)), is_single=True)


def test_the_demos_configuration_stands_in_where_nothing_is_named(tmp_path):
    (config_file := tmp_path / "mine.yaml").write_text("")
    demos = "demo.yaml", {"latin": "latin.yaml"}
    for argv, config in (
        (["--seed", "1"], "demo.yaml"),
        (["--task", "latin", "--seed", "1"], "latin.yaml"),
        (["--task", "mnns"], None),
        (["--task", "latin", "--model_name_or_path=x"], None),
        (["--model_name_or_path=x"], None),
        (["--config", str(config_file)], None),
    ):
        before = [] if config is None else ["--config", config]
        assert with_default_config(argv, *demos) == [*before, *argv]


def test_a_configuration_of_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (ours := tmp_path / "configs").mkdir()
    (ours / "mnns.yaml").write_text("")
    (mine := tmp_path / "mine.yaml").write_text("")
    for file, expected in (
        ("mnns.yaml", str(ours / "mnns.yaml")),
        ("recipes/configs/mnns.yaml", str(ours / "mnns.yaml")),
        ("mine.yaml", "mine.yaml"),
        (str(mine), str(mine)),
    ):
        for argv in (["--config", file, "--seed", "1"], [f"--config={file}", "--seed", "1"]):
            assert with_found_config(argv, ours) == ["--config", expected, "--seed", "1"]
    assert with_found_config(["--seed=1"], ours) == ["--seed=1"]
    for file in ("nnns.yaml", "elsewhere/mnns.yaml"):
        with pytest.raises(ValueError, match=f"config='{file}': there is no such file.*mnns.yaml"):
            with_found_config(["--config", file], ours)


# -- processes


def test_options_about_processes_are_split_from_the_others(tmp_path):
    (file := tmp_path / "a.yaml").write_text("")
    argv = ["--rows", "all", "--num_processes=3", "--accelerate_config", str(file), "--seed", "1"]
    processes, others = split_processes(argv)
    assert processes == (3, str(file)) and others == ["--rows", "all", "--seed", "1"]
    assert split_processes(others)[0] == (None, None)
    for argv, says in (
        (["--num_processes", "two"], "--num_processes: invalid int value: 'two'"),
        (["--num_processes", "0"], "num_processes=0 must be at least 1"),
        (["--accelerate_config", "/no/such"], "accelerate_config='/no/such': there is no such"),
    ):
        with pytest.raises(ValueError, match=says):
            split_processes(argv)


@pytest.mark.parametrize("config", [None, "a.yaml"])
@pytest.mark.parametrize("code", [0, 2])
def test_a_launch_ends_with_the_programs_code(monkeypatch, tmp_path, config, code):
    """With what accelerate would otherwise guess and warn of; the launchers' tracebacks say nothing
    about the program."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    started = []

    def torchrun(args):
        started.append((args.nproc_per_node, args.training_script, args.training_script_args))
        failure = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="")
        if code:
            raise ChildFailedError("some", {1: failure})

    def accelerate(args):
        assert args.config_file == config
        started.append((str(args.num_processes), args.training_script, args.training_script_args))
        if code:
            raise subprocess.CalledProcessError(code, "some")

    monkeypatch.setattr("torch.distributed.run.run", torchrun)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", accelerate)
    monkeypatch.setenv(LAUNCHED, "")  # so that it is taken back
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = Program("softar sft", ["-m", "softar.cli.app", "sft"])
    assert launch(program, Processes(2, config), ["--seed", "1"]) == code
    assert started == [("2", "softar.cli.app", ["sft", "--seed", "1"])]


def test_of_several_processes_the_first_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr("softar.checks.PATIENCE", 0.3)
    for rank, least in (("0", 0.0), ("1", 0.3)):
        monkeypatch.setenv("RANK", rank)
        started = time.monotonic()
        with pytest.raises(SystemExit), one_line_errors("some.py"):
            raise ValueError("wrong")
        assert least <= time.monotonic() - started < least + 0.3


def test_an_input_error_is_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors("some.py"):
        raise ValueError("x=1 must be 2")
    assert end.value.code == 2 and capsys.readouterr().err == "some.py: error: x=1 must be 2\n"
    with pytest.raises(TypeError), one_line_errors("some.py"):
        raise TypeError("a bug")


@pytest.mark.parametrize("kept", ["checkpoint-2", "row.json"])
def test_an_interruption_says_how_to_go_on(tmp_path, capsys, kept):
    (tmp_path / "soft-seed0" / kept).mkdir(parents=True)
    with pytest.raises(SystemExit) as end, interruptible() as folders:
        folders += [tmp_path / "hard-seed0", tmp_path / "soft-seed0"]
        raise KeyboardInterrupt
    assert end.value.code == 130 and "--resume_from_checkpoint true" in capsys.readouterr().err


def test_an_interruption_before_the_first_checkpoint_says_so(tmp_path, capsys):
    (tmp_path / "_earlier" / "checkpoint-2").mkdir(parents=True)  # of a run before
    (tmp_path / "hard-seed0" / "checkpoint-2").mkdir(parents=True)  # of another row
    for outputs in ([], [tmp_path], [tmp_path / "soft-seed0"]):
        with pytest.raises(SystemExit), interruptible() as folders:
            folders += outputs
            raise KeyboardInterrupt
        assert "interrupted; nothing was kept" in capsys.readouterr().err


class Trained:
    """Stands for a recipe: counts what is trained; a row `long` takes more steps than the
    others."""

    def __init__(self, folder, **changes):
        self.training, self.done = training_of(output_dir=str(folder), **changes), []

    def configure(self, name, seed, folder):
        steps = 2 * self.training.max_steps if name == "long" else self.training.max_steps
        return training_of(
            **vars(self.training) | dict(seed=seed, output_dir=str(folder), max_steps=steps)
        )

    def train(self, name, args):
        self.done.append((name, args.seed))
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        steps = 4 if args.max_steps == -1 else args.max_steps
        return [dict(row=name, seed=args.seed, train_steps=steps)]

    def run(self, names, num_seeds=1, jobs=1):
        return train_rows(
            names,
            self.training,
            num_seeds=num_seeds,
            jobs=jobs,
            configure=self.configure,
            train=self.train,
            console=None,
            program=Program("some.py", ["some.py"]),
        )


def test_each_row_has_a_run_of_its_own_in_wandb(tmp_path, monkeypatch):
    """Its callback goes on with a run that is open."""
    wandb = SimpleNamespace(run=None, finish=lambda: vars(wandb).update(run=None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    drawn = []

    class Logged(Trained):
        def train(self, name, args):
            wandb.run = wandb.run or [name]
            drawn.append((name, wandb.run))
            return super().train(name, args)

    Logged(tmp_path).run(["a", "b"])
    assert drawn == [("a", ["a"]), ("b", ["b"])] and wandb.run is None


def test_rows_and_seeds_are_trained_in_folders_of_their_own_and_once(tmp_path, capsys):
    first = Trained(tmp_path)
    results, folders = first.run(["a", "long"], num_seeds=2)
    rows = [("a", 42), ("long", 42), ("a", 43), ("long", 43)]
    assert first.done == rows and [(line["row"], line["seed"]) for line in results] == rows
    assert folders == {(name, seed): tmp_path / f"{name}-seed{seed}" for name, seed in rows}
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results
    (folders["a", 43] / "row.json").unlink()
    later = Trained(tmp_path, resume_from_checkpoint="true")
    capsys.readouterr()
    assert later.run(["a", "long"], num_seeds=2)[0] == results and later.done == [("a", 43)]
    kept = [line for line in capsys.readouterr().out.splitlines() if "trained already" in line]
    assert [line.split(":")[0] for line in kept] == ["a, seed 42", "long, seed 42", "long, seed 43"]
    anew = Trained(tmp_path)
    assert anew.run(["a"])[0] == results[:1] and anew.done == [("a", 42)]


@pytest.mark.parametrize(
    ("now", "trains", "says"),
    [
        ({}, False, "kept as it is\n"),
        (dict(num_train_epochs=3.0), True, None),  # in the place of 1.0
        (dict(num_train_epochs=3.0, max_steps=4), False, "kept as it is\n"),
        (dict(max_steps=9), True, None),
        (
            dict(weight_decay=0.5),
            False,
            "error: weight_decay=0.5 does nothing.*trained already, with 0.1",
        ),
        (dict(learning_rate=1.0), False, "error: learning_rate=1.0 does nothing.*give the same"),
        (dict(seed=3), False, "kept as it is, trained with seed=42, not 3\n"),
        (
            dict(made_with=dict(sft_steps=4)),
            False,
            "error: sft_steps=4, but .*with 3: give the same",
        ),
        (dict(made_with=dict(eval_rows=9)), False, "as it is, trained with eval_rows=8, not 9\n"),
    ],
)
def test_a_finished_row_is_resumed_as_it_was_trained(tmp_path, capsys, now, trains, says):
    """Other options were left out without a word, more epochs too."""
    before = dict(learning_rate=0.1, weight_decay=0.1, num_train_epochs=1.0, max_steps=-1)
    before |= dict(made_with=dict(sft_steps=3, eval_rows=8))
    Trained(tmp_path, **before).run([CUSTOM])
    capsys.readouterr()
    later = Trained(tmp_path, **before | now, resume_from_checkpoint="true")
    if says is not None and says.startswith("error"):
        with pytest.raises(SystemExit):
            later.run([CUSTOM])
    else:
        later.run([CUSTOM])
    assert bool(later.done) == trains
    if says is not None:
        assert re.search(says, "".join(capsys.readouterr()))


def test_a_single_custom_run_lies_in_the_output_folder_itself(tmp_path):
    assert Trained(tmp_path).run([CUSTOM])[1] == {(CUSTOM, 42): tmp_path}


def test_a_child_trains_its_row_and_leaves_the_report_to_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv(APART, "1")
    checkpoint_at(tmp_path / "a-seed42", 2)
    child = Trained(tmp_path)
    results, folders = child.run(["a"], jobs=2)
    assert results == [] and child.done == [("a", 42)]
    assert (folders["a", 42] / "row.json").exists() and (folders["a", 42] / "checkpoint-2").exists()
    assert not (tmp_path / "results.json").exists()


def test_a_child_ends_by_its_parents_signal_where_the_shell_ignores_it(tmp_path, monkeypatch):
    monkeypatch.setenv(APART, "1")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in `nohup` and a script's background
    child = Trained(tmp_path)
    child.train = lambda *row: signal.raise_signal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.run(["a"])
    finally:
        signal.signal(signal.SIGINT, before)


def test_several_jobs_train_what_is_left_apart(tmp_path, monkeypatch):
    started = []

    def apart(folders, jobs, console, program):
        started.append(([*folders], jobs, program.name))
        for (name, seed), folder in folders.items():
            folder.mkdir(parents=True)
            (folder / "row.json").write_text(json.dumps([dict(row=name, seed=seed, train_steps=4)]))

    monkeypatch.setattr(softar_rows, "train_apart", apart)
    parent = Trained(tmp_path)
    results, _ = parent.run(["a", "b"], jobs=2)
    assert started == [([("a", 42), ("b", 42)], 2, "some.py")] and parent.done == []
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results
    assert [line["row"] for line in results] == ["a", "b"]


def test_a_model_by_name_brings_what_its_loading_takes():
    task = SimpleNamespace(name="sums")
    model_args = SimpleNamespace(
        model_name_or_path=None, attn_implementation=None, model_revision="main", dtype="float32"
    )
    assert named_model(model_args, task, "tiny") == ("tiny", {"dtype": "float32"})
    with pytest.raises(
        ValueError, match=r"'sums' has no model of its own: give --model_name_or_path"
    ):
        named_model(model_args, task, None)
    vars(model_args).update(
        model_name_or_path="owner/name", attn_implementation="eager", model_revision="v2"
    )
    expected = {"dtype": "float32", "attn_implementation": "eager", "revision": "v2"}
    assert named_model(model_args, task, "tiny") == ("owner/name", expected)
