"""results.json, the tables and the plot."""

import io
import json
import sys

import pytest
from rich.console import Console
from tiny import EOS, Forced, model_of, tokenizer_of

import softar
from softar.config import SoftConfig
from softar.results import PACKAGES, commit, counts, device, write_results
from softar.show.figures import (
    gain_table,
    nfe_table,
    plot_accuracy,
    plot_nfe,
    plot_rewards,
    results_table,
    thought_table,
)


def row(decoder, readout, accuracy, **changes):
    common = dict(nfe=5.0, train_steps=300, train_seconds=12.4, seconds=0.512, seed=0)
    return {**common, "decoder": decoder, "readout": readout, "accuracy": accuracy, **changes}


def text_of(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def cells_of(table):
    return [column.header for column in table.columns], list(
        zip(*(column.cells for column in table.columns))
    )


ROWS = [
    row("discrete", "soft", 0.25),
    row("discrete", "discrete", 0.5),
    row("trace-soft", "soft", 0.875, nfe=6.0),
]


def test_a_title_says_on_how_many_rows_each_was_measured():
    lines = [row("a", "soft", 0.5, n=n) for n in (16, 8, 8)]
    assert counts(lines) == "8 and 16" and counts(lines[1:]) == "8"


def test_a_table_has_one_line_per_decoder_and_the_readouts_side_by_side():
    head, lines = cells_of(results_table([*ROWS, row("trace-soft", "discrete", 0.0)], title="mnns"))
    assert head == ["decoder", "soft", "discrete", "forwards", "train steps", "train s", "decode s"]
    assert lines == [
        ("discrete", "0.250", "0.500", "5", "300", "12", "0.51"),
        ("trace-soft", "0.875", "0.000", "6", "300", "12", "0.51"),
    ]
    assert "mnns" in text_of(results_table(ROWS, title="mnns"))


def test_several_seeds_become_mean_and_standard_deviation():
    seeds = [
        row("soft", "soft", a, seed=i, train_seconds=10.0 + i)
        for i, a in enumerate((0.5, 0.6, 0.7))
    ]
    _, lines = cells_of(results_table(seeds))
    assert lines == [("soft", "0.600 ± 0.100", "5 ± 0", "300 ± 0", "11 ± 1", "0.51 ± 0.00")]


def test_a_decoder_without_one_of_the_readouts_leaves_a_gap(tmp_path):
    _, lines = cells_of(results_table(ROWS))
    assert lines[1][:3] == ("trace-soft", "0.875", "")
    assert plot_accuracy(ROWS, tmp_path / "a.png").stat().st_size > 3000


def test_the_plot_shows_each_bar_its_height_and_the_seeds(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    bars, dots, plain_bar, plain_plot = [], [], Axes.bar, Axes.plot
    monkeypatch.setattr(
        Axes,
        "bar",
        lambda self, x, h, *a, **kw: (
            bars.append((h, kw["label"])) or plain_bar(self, x, h, *a, **kw)
        ),
    )
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *a, **kw: dots.append(list(y)) or plain_plot(self, x, y, *a, **kw),
    )
    rows = [
        row("a", "soft", 0.2),
        row("a", "soft", 0.4),
        row("a", "discrete", 0.5),
        row("b", "discrete", 0.6),
    ]
    file = plot_accuracy(rows, tmp_path / "plot.png", title="title")
    assert file == tmp_path / "plot.png" and file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [(pytest.approx(h), label) for h, label in bars] == [
        (0.3, "soft"),
        (0.5, "discrete"),
        (0.6, None),
    ]
    assert dots == [[0.2, 0.4]]


def nfe_row(training, decoder, budget, accuracy, **changes):
    common = dict(schedule="confidence", seed=0, nfe=float(budget), n=64)
    return {
        **common,
        "training": training,
        "decoder": decoder,
        "budget": budget,
        "accuracy": accuracy,
        **changes,
    }


NFE_ROWS = [
    nfe_row("duo", "soft-mask", 8, 0.5),
    nfe_row("duo", "soft-mask", 4, 0.2),
    nfe_row("duo", "soft-mask", 4, 0.4, seed=1, nfe=5.0),
    nfe_row("hard", "hard", 8, 0.25),
]


def test_budgets_stand_side_by_side():
    head, lines = cells_of(nfe_table(NFE_ROWS, title="sudoku"))
    assert head == ["training", "decoder", "4", "8"]
    assert lines == [("duo", "soft-mask", "0.300 ± 0.141", "0.500"), ("hard", "hard", "", "0.250")]
    assert "sudoku" in text_of(nfe_table(NFE_ROWS, title="sudoku"))


def test_schedules_are_told_apart_where_there_are_several():
    head, lines = cells_of(
        nfe_table([*NFE_ROWS, nfe_row("hard", "hard", 0.9, 0.75, schedule="threshold")])
    )
    assert head == ["training", "decoder", "schedule", "0.9", "4", "8"]
    assert lines[1:] == [
        ("hard", "hard", "confidence", "", "", "0.250"),
        ("hard", "hard", "threshold", "0.750", "", ""),
    ]


def test_before_and_after_are_told_apart(tmp_path, monkeypatch):
    stages = ("before", "after")
    rows = [row | {"stage": stage} for row in NFE_ROWS for stage in stages]
    head, lines = cells_of(nfe_table(rows))
    assert head[:3] == ["training", "decoder", "stage"] and len(lines) == 4
    assert {line[2] for line in lines} == {*stages}
    from matplotlib.axes import Axes

    looks, plain = {}, Axes.errorbar

    def errorbar(self, *args, **kw):
        looks[kw["label"]] = kw["alpha"]
        return plain(self, *args, **kw)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    plot_nfe(rows, tmp_path / "nfe.png")
    assert len(looks) == 4 and looks["hard, hard, before"] < looks["hard, hard, after"] == 1


def test_accuracy_is_drawn_over_the_measured_forwards(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plain = [], Axes.errorbar

    def errorbar(self, x, y, error, **kw):
        drawn.append((kw["label"], x, y, error, self))
        return plain(self, x, y, error, **kw)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    rows = [*NFE_ROWS, nfe_row("hard", "hard", 0.9, 0.75, schedule="threshold", nfe=6.5)]
    file = plot_nfe(rows, tmp_path / "nfe.png", title="title")
    assert file == tmp_path / "nfe.png" and file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    labels, x, y, errors, panels = zip(*drawn)
    assert labels == ("duo, soft-mask", "hard, hard", "hard, hard")
    assert x == ([4.5, 8.0], [8.0], [6.5])
    assert y == ([pytest.approx(0.3), 0.5], [0.25], [0.75])
    assert errors == ([pytest.approx(0.1414, abs=1e-4), 0.0], [0.0], [0.0])
    assert panels[0] is panels[1] and panels[1] is not panels[2]
    assert [axes.get_title() for axes in panels] == ["confidence", "confidence", "threshold"]


def rl_rows(decoder, seed, before, after, **changes):
    lines = [
        row(decoder, None, a, stage=s, seed=seed, **changes)
        for s, a in (("before", before), ("after", after))
    ]
    lines[1]["rewards"] = [[10, before], [20 + seed, 0.5], [30, after]]
    return lines


def test_a_gain_is_that_of_each_seed():
    """Its spread is not that of the two columns: here every seed gains the same."""
    rows = [
        *rl_rows("k-samples", 0, 0.4, 0.6),
        *rl_rows("k-samples", 1, 0.6, 0.8),
        *rl_rows("discrete", 0, 0.5, 0.25),
    ]
    head, lines = cells_of(gain_table(rows, title="mnns"))
    assert head == ["policy", "before", "after", "gain", "forwards"]
    assert lines == [
        ("k-samples", "0.500 ± 0.141", "0.700 ± 0.141", "+0.200 ± 0.000", "5 ± 0"),
        ("discrete", "0.500", "0.250", "-0.250", "5"),
    ]
    console = Console(file=io.StringIO(), width=80)  # of a plain terminal
    console.print(gain_table(rows))
    assert "+0.200 ± 0.000" in console.file.getvalue() and "…" not in console.file.getvalue()


def test_reward_curves_show_each_seed_and_the_mean_of_the_steps_that_all_have(
    tmp_path, monkeypatch
):
    import matplotlib.axes

    drawn = []
    plain = matplotlib.axes.Axes.plot

    def plot(axes, x, y, **look):
        drawn.append((list(x), list(y), look.get("label"), look["color"]))
        return plain(axes, x, y, **look)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", plot)
    rows = [
        *rl_rows("k-samples", 0, 0.4, 0.6),
        *rl_rows("k-samples", 1, 0.6, 0.8),
        *rl_rows("discrete", 0, 0.5, 0.25),
    ]
    file = plot_rewards(rows, tmp_path / "rewards.png", title="mnns")
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [(x, label, color) for x, _, label, color in drawn] == [
        ([10, 20, 30], None, "C0"),
        ([10, 21, 30], None, "C0"),
        ([10, 30], "k-samples", "C0"),
        ([10, 20, 30], "discrete", "C1"),
    ]
    assert drawn[2][1] == pytest.approx([0.5, 0.7]) and drawn[3][1] == [0.5, 0.5, 0.25]


def test_results_hold_where_they_come_from(tmp_path):
    file = write_results(tmp_path / "results.json", ROWS, command="softar x --seed 1")
    found = json.loads(file.read_text())
    assert set(found) == {"schema", "command", "commit", "device", "versions", "rows"}
    assert (found["schema"], found["command"], found["rows"]) == (1, "softar x --seed 1", ROWS)
    assert (found["commit"], found["device"]) == (commit(), device())
    assert set(found["versions"]) == {"python", *PACKAGES}
    assert json.loads(write_results(file, []).read_text())["command"] == " ".join(sys.argv)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = write_results(tmp_path / "results.json", ROWS)
    before = file.read_text()
    with pytest.raises(TypeError):
        write_results(file, [{"accuracy": object()}])
    assert file.read_text() == before
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        write_results(file, [])
    assert file.read_text() == before


@pytest.fixture(scope="module")
def thought():
    model, tokenizer = model_of(), tokenizer_of()
    config = SoftConfig(top_k=8, budget=2, max_new_tokens=4, temperature=3.0)
    out = softar.generate(
        model, **tokenizer(["<bos> w7", "<bos> w9"], return_tensors="pt"), config=config
    )
    return out, tokenizer


def test_a_thought_is_shown_step_by_step(thought):
    out, tokenizer = thought
    table = thought_table(out, tokenizer, row=1, top=3)
    head, lines = cells_of(table)
    assert head == ["step", "kind", "token", "entropy / nats", "fed back"]
    assert str(table.title) == "<bos> w9" and [line[1] for line in lines[:3]] == [
        "soft",
        "soft",
        "hard",
    ]
    record = out.record
    for t, line in enumerate(lines):
        assert line[0] == str(t + 1) and str(line[2]) == tokenizer.decode(
            record.token[1, t : t + 1]
        )
        assert line[3] == f"{record.entropy[1, t]:.2f}"
        weights = record.weights[1, t]
        shown = str(line[4]).split("  ")
        likely = int((weights > 0.005).sum())
        assert len(shown) == min(3, likely) + (likely > 3)
        best = weights.argmax()
        assert shown[0] == f"{tokenizer.decode([int(record.ids[1, t, best])])} {weights[best]:.2f}"
        if likely > 3:
            assert shown[-1] == f"(+{likely - 3})"
    assert str(lines[2][4]).endswith(" 1.00")  # a single token after the thought


def test_a_thought_ends_where_its_row_ends():
    model, tokenizer = model_of(), tokenizer_of()
    config = SoftConfig(mixer="hard", max_new_tokens=5)
    inputs = tokenizer(["<bos> w7", "<bos> w9"], return_tensors="pt")
    forced = Forced(2, [[7, EOS], [7] * 5])
    out = softar.generate(model, **inputs, config=config, logits_processor=[forced])
    assert [thought_table(out, tokenizer, row=r).row_count for r in (0, 1)] == [2, 5]


def test_tokens_that_look_like_markup_are_shown_as_they_are(thought):
    out, tokenizer = thought
    plain = tokenizer.decode

    class Odd:
        def decode(self, ids, **kw):
            return "[/INST]" if len(ids) == 1 else "[red]" + plain(ids, **kw)

    shown = text_of(thought_table(out, Odd()))
    assert shown.count("[/INST]") >= 4 and "[red]" in shown


def test_the_commit_is_none_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
