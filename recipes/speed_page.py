"""The page of speed: one HTML file of bars and tables out of what speed.py and gpu.py wrote, and the
bars as PNG beside it."""

import json
from itertools import groupby
from pathlib import Path

from softar.checks import check_writable
from softar.recipes.evidence_figures import INK, LOOK, MUTED, SERIES, Panel, legend, svg
from softar.recipes.evidence_page import FRAME, html, table_of
from softar.results import write_whole
from softar.show.page import escaped, filled
from softar.show.plots import plot

TITLE = "softar: how far each path is from what the machine allows"
ABOUT = (
    "Bars: tokens per second over their limit, which is 1, the median of the repeats; lines go from the lowest to "
    "the highest. *Bound by*: what most of the limit's time goes into, reading weights or computing. *Ratio*: tokens "
    "per second over those of the path beside it, of runs taken in turn. What stays in a processor's cache is read "
    "faster than it is copied, and memory up to 1.5 times faster where a copy also reads what it writes over: such a "
    "share may be above 1."
)
SIZE = (6.2, 3.4)  # inches of a panel of the PNG


def write_page(files: list[str | Path], folder: Path, says: dict[str, str]) -> Path:
    """page.html and speed.png in the folder -> the page.

    files: JSON of speed.py or gpu.py. says: of each kind of paths, what their limit counts. Raises
    ValueError for a file without such rows.
    """
    check_writable(folder, "output")
    contents = [content_of(Path(file)) for file in files]
    every = [table for content in contents for table in tables_of(content["rows"])]
    png(every, folder / "speed.png")
    body = [f"<p>{html(ABOUT)}</p>", verdicts(every), *map(made_with, contents)]
    for i, rows in enumerate(every):
        kind = rows[0]["kind"]
        is_first = kind not in {other[0]["kind"] for other in every[:i]}
        body.append(section(i, rows, says[kind] if is_first else ""))
    frame = FRAME.read_text(encoding="utf-8")
    return write_whole(
        folder / "page.html", filled(frame, title=escaped(TITLE), body="\n".join(body))
    )


def content_of(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in content["rows"] if row.get("bench") == "speed"]
    except (json.JSONDecodeError, KeyError, TypeError):
        rows = []
    if not rows:
        raise ValueError(
            f"{file} has no rows of speed: give a speed.json of speed.py, or a results.json of "
            "gpu.py --parts speed"
        )
    return content | {"rows": rows}


def tables_of(rows: list[dict]) -> list[list[dict]]:
    return [list(some) for _, some in groupby(rows, lambda row: (row["device"], row["table"]))]


def heading(row: dict) -> str:
    return f"{row['table']}: {row['model']}, {row['dtype']}"


def rates_of(row: dict) -> str:
    return (
        f"{row['device']}: {row['read_per_s'] / 1e9:.3g} GB/s of a copy, {row['operations_per_s'] / 1e9:.3g} GFLOP/s "
        f"of a product in {row['dtype']}; {row['clock']} time, {row['repeats']} repeats, load {row['load']:.1f}"
    )


def made_with(content: dict) -> str:
    versions = ", ".join(
        f"{name} {v}" for name, v in content["versions"].items() if v[:1].isdigit()
    )
    text = f"{content['command']}, at commit {content['commit']}; {versions}."
    return f'<p class="muted">{escaped(text)}</p>'


# -- what is written


def verdicts(every: list[list[dict]]) -> str:
    """A line for each table: the fastest of its soft paths, beside the limit and its hard path."""
    lines = []
    for i, rows in enumerate(every):
        row = max(rows, key=lambda row: (row["is_soft"], row["tokens_per_s"]))
        beside = f"; {with_range(row, 'ratio')} times <em>{escaped(row['beside'] or '')}</em>"
        lines.append(
            f'<li><a href="#table-{i}">{escaped(row["table"])}</a>, {escaped(row["device"])}: '
            f"<em>{escaped(row['path'])}</em> reaches {with_range(row, 'share')} of the limit"
            f"{beside if row['beside'] else ''}.</li>"
        )
    return f'<nav aria-label="tables"><ul>{"".join(lines)}</ul></nav>'


def section(i: int, rows: list[dict], says: str) -> str:
    first, panel = rows[0], panel_of(rows)
    return "\n".join(
        [
            f'<section id="table-{i}"><h2>{escaped(heading(first))}</h2>',
            f"<p>{escaped(' '.join(says.split()))}</p>" if says else "",
            f'<p class="muted">{escaped(rates_of(first))}</p>',
            f'<div class="panels"><div role="img" aria-label="{escaped(panel.alt)}">',
            f"{svg(panel, f'speed-{i}')}</div></div>",
            table_of(markdown(rows), "", first["table"]),
            "</section>",
        ]
    )


def cells_of(rows: list[dict]) -> list[dict[str, str]]:
    """What a table says of its rows, by headings; of those that say something of any."""
    every = [
        {
            "path": row["path"],
            "tokens/s": number(row["tokens_per_s"]),
            "limit": number(row["limit"]),
            "bound by": row["bound"],
            "of the limit": with_range(row, "share"),
            "beside": row["beside"] or "",
            "ratio": with_range(row, "ratio") if row["beside"] else "",
            "first run": f"{row['first_s']:.3g} s" if row["first_s"] else "",
        }
        for row in rows
    ]
    heads = [head for head in every[0] if any(cells[head] for cells in every)]
    return [{head: cells[head] for head in heads} for cells in every]


def number(x: float) -> str:
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def with_range(row: dict, name: str) -> str:
    return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"


def markdown(rows: list[dict]) -> str:
    """A table of Markdown."""
    lines = cells_of(rows)
    every = [lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


# -- what is drawn


def panel_of(rows: list[dict]) -> Panel:
    right = 1.25 * max(1.0, *(row["share_high"] for row in rows))
    said = [
        f"{row['path']}: {row['share']:.2f} of the limit, {number(row['tokens_per_s'])} tokens/s"
        for row in rows
    ]

    def draw(axes) -> None:
        drawn = set()
        for at, row in enumerate(rows):
            kind = "soft" if row["is_soft"] else "hard"
            colour, label = COLOURS[kind], None if kind in drawn else kind
            drawn.add(kind)
            axes.barh(at, row["share"], color=colour, height=0.62, label=label)
            axes.plot([row["share_low"], row["share_high"]], [at, at], color=INK, linewidth=1.5)
            beside = max(row["share"], row["share_high"]) + 0.015 * right
            axes.text(beside, at, f"{number(row['tokens_per_s'])}/s", va="center", fontsize=8)
        axes.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [row["path"] for row in rows])
        axes.set(xlim=(0, right), ylim=(max(6, len(rows)) - 0.4, -0.6))
        axes.set_xlabel("tokens per second over their limit")

    return Panel(rows[0]["table"], draw, "; ".join(said))


def png(every: list[list[dict]], file: Path) -> Path:
    """All panels, two side by side."""
    import matplotlib

    wide = min(2, len(every))
    high = -(-len(every) // wide)
    with (
        matplotlib.rc_context(LOOK),
        plot(file, high, wide, figsize=(wide * SIZE[0], high * SIZE[1])) as made,
    ):
        drawing, axes = made
        for rows, each in zip(every, axes.flat):
            panel = panel_of(rows)
            panel.draw(each)
            made = f"{rows[0]['model']}, {rows[0]['dtype']}"
            each.set_title(f"{panel.title}\n{made}\n{rows[0]['device']}", fontsize=9)
        for each in axes.flat[len(every) :]:
            each.set_axis_off()
        legend(drawing, axes[0, 0])
    return file


COLOURS = dict(zip(("soft", "hard"), SERIES))
