"""What a training says where there is no terminal, and the card that it leaves."""

import re
from io import StringIO
from itertools import pairwise
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging

import softar
from softar import progress
from softar.diffusion import load
from softar.models import CHECKPOINTS
from softar.progress import Bars, Lines, Pace, duration, last_step, step_line
from softar.training import ProgressLines, tell_progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("time.monotonic", lambda: now.seconds)
    return now


@pytest.mark.parametrize("step_seconds", [0.001, 0.5, 7.0, 45.0])
@pytest.mark.parametrize("steps", [1, 13, 1000])
def test_it_speaks_every_so_often_and_never_in_a_flood(clock, steps, step_seconds):
    pace, spoke = Pace(), []
    for step in range(1, steps + 1):
        clock.seconds += step_seconds
        if pace.is_due(step / steps):
            spoke.append((clock.seconds, step / steps))
    assert spoke[0][1] == 1 / steps  # the first sign of life at once
    for (before, part), (after, other) in pairwise(spoke):
        assert after - before >= 2.0
        # never silent for longer than half a minute and the step in which it ends
        assert after - before <= 30 + step_seconds or other - part >= 0.05
    assert len(spoke) <= 1 + max(20, steps * step_seconds / 30)


def test_a_line_is_read_back_by_the_parent():
    line = step_line(40, 400, {"loss": 1.23456, "reward": 0.5}, 121.0)
    assert line == "step 40/400, loss 1.235, reward 0.5, 2 min left"
    log = f"noise 3/4\na, seed 1: {step_line(1, 400, {}, 5)}\na, seed 1: {line}\n{{'loss': 1}}\n"
    assert last_step(log) == (40, 400, ", loss 1.235, reward 0.5, 2 min left")
    assert last_step("Loading 3/4 [") is None
    texts = [duration(s) for s in (0.4, 119, 120, 7199, 7200)]
    assert texts == ["0 s", "119 s", "2 min", "120 min", "2.0 h"]


def test_rows_trained_apart_are_told_of_in_lines(clock):
    out, row = StringIO(), ("soft", 42)
    with Lines(Console(file=out, width=40)) as display:
        display.start(row, "runs/mine/soft-seed42/train.log")
        for step in (0, 1, 2, 3, 50, 100):
            clock.seconds += 3
            line = step_line(step, 100, {"loss": 2.0}, 9) if step else "imports"
            display.update(row, f"soft, seed 42: {line}\n")
        clock.seconds += 31
        display.update(row, f"soft, seed 42: {line}\n")
        display.end(row)
    assert out.getvalue().splitlines() == [
        "soft, seed 42: starts, its log is runs/mine/soft-seed42/train.log",
        "soft, seed 42: step 1/100, loss 2, 9 s left",
        "soft, seed 42: step 50/100, loss 2, 9 s left",
        "soft, seed 42: step 100/100, loss 2, 9 s left",
        "soft, seed 42: still after step 100/100",
        "soft, seed 42: done",
    ]


def test_and_in_bars_on_a_terminal():
    out, row = StringIO(), ("soft", 42)
    with Bars(Console(file=out, width=80, force_terminal=True)) as display:
        display.start(row, "train.log")
        display.update(row, "soft, seed 42: step 30/100, 9 s left")
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", out.getvalue())
    assert "soft, seed 42" in text and "30/100" in text


def test_the_callback_says_step_loss_and_seconds_left(clock, capsys):
    lines = ProgressLines("soft, seed 42", Pace(share=0.25))
    state = SimpleNamespace(global_step=4, max_steps=12, is_world_process_zero=True)
    lines.on_train_begin(None, state, None)
    for step in range(5, 13):
        clock.seconds, state.global_step = clock.seconds + 10, step
        if step == 6:
            lines.on_log(None, state, None, logs={"loss": 0.5, "grad_norm": 1.0})
        if step == 8:
            lines.on_log(None, state, None, logs={"eval_loss": 0.25, "eval_steps_per_second": 3.0})
        lines.on_step_end(None, state, None)
    assert capsys.readouterr().out.splitlines() == [
        "soft, seed 42: starts at step 4 of 12",
        "soft, seed 42: step 5/12, 70 s left",
        "soft, seed 42: at step 8: eval_loss 0.25",
        "soft, seed 42: step 8/12, loss 0.5, 40 s left",
        "soft, seed 42: step 11/12, loss 0.5, 10 s left",
        "soft, seed 42: step 12/12, loss 0.5, 0 s left",
    ]
    state.is_world_process_zero = False
    lines.on_train_begin(None, state, None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("shown", [True, False])
def test_models_that_come_along_open_without_a_bar_and_leave_the_switch(shown, capfd):
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        softar.load("mnns-soft-tiny")
        load("mnns-diffusion-tiny")
        assert "Loading weights" not in capfd.readouterr().err
        assert logging.is_progress_bar_enabled() is shown
        softar.load(CHECKPOINTS / "mnns-soft-tiny")  # as any folder
        assert ("Loading weights" in capfd.readouterr().err) is shown
    finally:
        logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("terminal", "no_bar", "to_log", "kinds"),
    [
        (True, False, False, [ProgressCallback]),
        (True, True, False, [ProgressLines]),
        (False, False, False, [ProgressLines]),
        (False, False, True, [ProgressLines, PrinterCallback]),
        (True, False, True, [ProgressLines, PrinterCallback]),
    ],
)
def test_where_a_terminal_draws_it_the_bar_stays(monkeypatch, terminal, no_bar, to_log, kinds):
    class Trainer:
        args = SimpleNamespace(disable_tqdm=no_bar)
        callbacks = [PrinterCallback() if no_bar else ProgressCallback()]

        def remove_callback(self, kind):
            self.callbacks = [c for c in self.callbacks if type(c) is not kind]

        def add_callback(self, callback):
            self.callbacks.append(callback)

    trainer = Trainer()
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal))
    tell_progress(trainer, "soft, seed 42", to_log=to_log)
    assert [type(callback) for callback in trainer.callbacks] == kinds
    assert progress.LINE.search(step_line(1, 2, {}, 3))
