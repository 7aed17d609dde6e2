"""What a run leaves behind: results.json, a table, a plot, and a look at one thought."""

import statistics
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..decode import SoftOutput
from .plots import plot
from .trace import thought


def results_table(rows: list[dict], title: str | None = None) -> Table:
    """One line per decoder, the read-outs side by side; over several seeds mean and standard
    deviation."""
    readouts = list(dict.fromkeys(row["readout"] for row in rows))
    table = Table(title=title)
    table.add_column("decoder", no_wrap=True)
    for readout in readouts:
        table.add_column(readout, justify="right")
    for column in ("forwards", "train steps", "train s", "decode s"):
        table.add_column(column, justify="right")
    for decoder in dict.fromkeys(row["decoder"] for row in rows):
        of_decoder = [row for row in rows if row["decoder"] == decoder]
        accuracies = [
            [row["accuracy"] for row in of_decoder if row["readout"] == readout]
            for readout in readouts
        ]
        # its training is the same for all read-outs
        first = [row for row in of_decoder if row["readout"] == of_decoder[0]["readout"]]
        digits = {"nfe": 0, "train_steps": 0, "train_seconds": 0, "seconds": 2}
        costs = [  # seconds may be unknown
            _spread([row[key] for row in first if row[key] is not None], n)
            for key, n in digits.items()
        ]
        table.add_row(decoder, *(_spread(values, 3) for values in accuracies), *costs)
    return table


def gain_table(rows: list[dict], title: str | None = None) -> Table:
    """RL: one line per policy, its accuracy before and after and the difference, which is taken
    seed by seed; over several seeds mean and standard deviation."""
    table = Table(title=title)
    table.add_column("policy", no_wrap=True)
    for column in ("before", "after", "gain", "forwards"):
        table.add_column(column, justify="right", no_wrap=True)
    for decoder in dict.fromkeys(row["decoder"] for row in rows):
        before, after = (
            {row["seed"]: row for row in rows if (row["decoder"], row["stage"]) == (decoder, stage)}
            for stage in ("before", "after")
        )
        table.add_row(
            decoder,
            _spread([row["accuracy"] for row in before.values()], 3),
            _spread([row["accuracy"] for row in after.values()], 3),
            _spread([after[seed]["accuracy"] - before[seed]["accuracy"] for seed in after], 3, "+"),
            _spread([row["nfe"] for row in after.values()], 0),
        )
    return table


def plot_rewards(rows: list[dict], file: str | Path, title: str = "") -> Path:
    """The reward of the rollouts over the training steps: a thin line per seed, the mean thick, a
    colour per policy."""
    with plot(file, figsize=(5.6, 3.6)) as (_, panels):
        axes = panels[0, 0]
        for i, decoder in enumerate(dict.fromkeys(row["decoder"] for row in rows)):
            curves = [
                dict(row["rewards"])
                for row in rows
                if row["decoder"] == decoder and "rewards" in row
            ]
            for curve in curves if len(curves) > 1 else []:
                steps, rewards = list(curve), list(curve.values())
                axes.plot(steps, rewards, color=f"C{i}", linewidth=0.6, alpha=0.5)
            steps = sorted(set.intersection(*map(set, curves)))  # logged by every seed
            mean = [statistics.mean(curve[step] for curve in curves) for step in steps]
            axes.plot(steps, mean, color=f"C{i}", linewidth=1.8, label=decoder)
        axes.set(xlabel="training step", ylabel="mean reward of the rollouts", title=title)
        axes.legend(title="policy", frameon=False)
    return Path(file)


def _spread(values: list[float], digits: int, sign: str = "") -> str:
    if not values:
        return ""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def plot_accuracy(rows: list[dict], file: str | Path, title: str = "") -> Path:
    """Bars of accuracy per decoder and read-out, with one dot per seed."""
    decoders = list(dict.fromkeys(row["decoder"] for row in rows))
    readouts = list(dict.fromkeys(row["readout"] for row in rows))
    width = 0.8 / len(readouts)
    with plot(file, figsize=(1.6 + 1.4 * len(decoders), 3.6)) as (_, panels):
        axes = panels[0, 0]
        for i, readout in enumerate(readouts):
            label = readout
            for x, decoder in enumerate(decoders):
                seeds = [
                    row["accuracy"]
                    for row in rows
                    if (row["decoder"], row["readout"]) == (decoder, readout)
                ]
                if not seeds:
                    continue
                at, mean = x + (i - (len(readouts) - 1) / 2) * width, statistics.mean(seeds)
                axes.bar(at, mean, width * 0.92, color=f"C{i}", label=label)
                label = None  # one entry of the legend
                axes.text(at, mean + 0.01, f"{mean:.2f}", ha="center", fontsize=8)
                if len(seeds) > 1:
                    axes.plot([at] * len(seeds), seeds, "k.", markersize=3)
        axes.set_xticks(range(len(decoders)), decoders)
        axes.set(ylabel="held-out accuracy", ylim=(0, 1.08), title=title)
        axes.legend(title="read-out", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return Path(file)


def nfe_table(rows: list[dict], title: str | None = None) -> Table:
    """Accuracy: one line per training and decoder (and schedule and stage, if there are several), one
    column per budget of forward passes; over several seeds mean and standard deviation."""
    keys = ["training", "decoder"]
    if len({row.get("stage") for row in rows}) > 1:
        keys.append("stage")
    if len({row["schedule"] for row in rows}) > 1:
        keys.append("schedule")
    budgets = sorted({row["budget"] for row in rows})
    table = Table(title=title)
    for key in keys:
        table.add_column(key, no_wrap=True)
    for budget in budgets:
        table.add_column(f"{budget:g}", justify="right", no_wrap=True)
    for line in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        accuracies = {budget: [] for budget in budgets}
        for row in rows:
            if tuple(row[key] for key in keys) == line:
                accuracies[row["budget"]].append(row["accuracy"])
        table.add_row(*line, *(_spread(values, 3) for values in accuracies.values()))
    return table


def plot_nfe(rows: list[dict], file: str | Path, title: str = "") -> Path:
    """Accuracy over measured forward passes, a line per training and decoder (pale, before RL) with
    one standard deviation over the seeds; a panel per schedule."""
    schedules = list(dict.fromkeys(row["schedule"] for row in rows))
    trainings = list(dict.fromkeys(row["training"] for row in rows))
    decoders = list(dict.fromkeys(row["decoder"] for row in rows))
    size = (2 + 3.6 * len(schedules), 3.6)
    lines = {}  # by label: a panel need not hold all of them
    with plot(file, 1, len(schedules), figsize=size, sharex=True, sharey=True) as (figure, panels):
        for axes, schedule in zip(panels[0], schedules, strict=True):
            groups: dict[tuple, list[dict]] = {}
            for row in rows:
                if row["schedule"] == schedule:
                    key = row["training"], row["decoder"], row.get("stage")
                    groups.setdefault(key, []).append(row)
            for (training, decoder, stage), group in groups.items():
                label = ", ".join(filter(None, (training, decoder, stage)))
                lines[label] = axes.errorbar(
                    *_nfe_points(group),
                    label=label,
                    color=f"C{trainings.index(training)}",
                    alpha=0.4 if stage == "before" else 1.0,
                    **_NFE_LOOKS[decoders.index(decoder) % len(_NFE_LOOKS)],
                    capsize=2,
                    markersize=4,
                    linewidth=1.2,
                )
            _nfe_axes(axes, schedule if len(schedules) > 1 else title)
        panels[0, 0].set_ylabel("held-out accuracy")
        if len(schedules) > 1:
            figure.suptitle(title)
        legend = dict(title="training, decoder", frameon=False, loc="outside right upper")
        figure.legend(lines.values(), lines, **legend)
    return Path(file)


def _nfe_axes(axes, title: str) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="forward passes (mean NFE)", ylim=(0, 1.08), title=title)


def _nfe_points(rows: list[dict]) -> tuple[list[float], list[float], list[float]]:
    """Per budget the mean NFE, the mean accuracy and its standard deviation over the seeds, by
    increasing NFE."""
    points = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        seeds = [row for row in rows if row["budget"] == budget]
        accuracies = [row["accuracy"] for row in seeds]
        spread = statistics.stdev(accuracies) if len(seeds) > 1 else 0.0
        nfe = statistics.mean(row["nfe"] for row in seeds)
        points.append((nfe, statistics.mean(accuracies), spread))
    x, y, error = zip(*sorted(points), strict=True)
    return list(x), list(y), list(error)


def thought_table(out: SoftOutput, tokenizer, row: int = 0, top: int = 5) -> Table:
    """The belief of one row, step by step: the likeliest tokens of each mixture, its entropy, what
    stands for it."""
    # all that are drawn: no more than 200 weigh over 0.005
    trace = thought(out, tokenizer, row, top=200)
    # Text, since rich would read tokens such as [/INST] as its own markup
    table = Table(title=Text(trace.prompt))
    for name in ("step", "kind", "token", "entropy / nats", "fed back"):
        table.add_column(name, no_wrap=name != "fed back")
    for number, step in enumerate(trace.steps, 1):
        pairs = [(text, weight) for text, weight in step.mixture if weight > 0.005]
        mixture = "  ".join(f"{text} {weight:.2f}" for text, weight in pairs[:top])
        if len(pairs) > top:
            mixture += f"  (+{len(pairs) - top})"
        table.add_row(
            str(number), step.kind, Text(step.token), f"{step.entropy:.2f}", Text(mixture)
        )
    return table


_NFE_LOOKS = [
    dict(fmt="o", linestyle="-"),
    dict(fmt="s", linestyle="--"),
    dict(fmt="^", linestyle=":"),
    dict(fmt="D", linestyle="-."),
]
