"""The page of the evidence: one HTML file of tables and curves, and the curves as PNG beside it."""

import re
from pathlib import Path

from softar.checks import check_writable
from softar.recipes.evidence_figures import Figure, figures_of, png, svg
from softar.recipes.evidence_gains import Analysis
from softar.recipes.evidence_tables import about_of, choices_of, claims_table, grid_table, head_of
from softar.results import write_whole
from softar.show.page import escaped, filled

TITLE = "softar: does thinking in soft tokens help?"
FRAME = Path(__file__).with_suffix(".html")
RULES = (
    "Supported: the gain reaches its margin, 3 points where none is named, and its 95 % interval lies "
    "above 0. Refuted: the interval lies below the margin. Open: neither; also where Student's t over "
    "the seeds does not give the verdict of the bootstrap, and of fewer seeds than an experiment asks "
    "for. Equivalent: the 90 % interval lies within 2 points of 0."
)


def write_report(folder: Path, analyses: dict[str, Analysis]) -> Path:
    """page.html and a PNG for each figure -> the page."""
    check_writable(folder, "output")
    for analysis in analyses.values():
        for figure in figures_of(analysis):
            png(figure, folder)
    return write_whole(folder / "page.html", page_of(analyses))


def page_of(analyses: dict[str, Analysis]) -> str:
    contents = [
        f'<li><a href="#{name}">{name}. {escaped(each.evidence.title)}</a>: {summary_of(each)}</li>'
        for name, each in analyses.items()
    ]
    body = [
        f"<p>{escaped(RULES)}</p>",
        f'<nav aria-label="experiments"><ul>{"".join(contents)}</ul></nav>',
        *(section(name, each) for name, each in analyses.items()),
    ]
    frame = FRAME.read_text(encoding="utf-8")
    return filled(frame, title=escaped(TITLE), body="\n".join(body))


def summary_of(analysis: Analysis) -> str:
    return html(head_of(analysis)) if analysis.logs.whole else "no seed is whole yet"


def section(name: str, analysis: Analysis) -> str:
    evidence, logs = analysis.evidence, analysis.logs
    left_out = [
        f"Left out: seed {seed}, which lacks {', '.join(settings)}."
        for seed, settings in logs.missing.items()
    ]
    parts = [
        f'<section id="{name}"><h2>{name}. {escaped(evidence.title)}</h2>',
        f"<p>{summary_of(analysis)}</p>",
        *(f'<p class="muted">{escaped(line)}</p>' for line in left_out),
    ]
    if logs.whole:
        notes = "".join(f"<li>{html(note)}</li>" for note in evidence.notes)
        parts += [
            f'<p class="muted">{html(about_of(analysis))}</p>',
            table_of(claims_table(analysis), "claims", f"claims of {name}"),
            f"<p>{html(choices_of(analysis))}</p>" if analysis.choices else "",
            f'<ul class="notes">{notes}</ul>',
            *figures(figures_of(analysis)),
        ]
        for grid in evidence.grids:
            parts.append(f"<h3>Accuracy: {escaped(grid.corner)}</h3>")
            parts.append(table_of(grid_table(analysis, grid), "", f"{name}, {grid.name}"))
    return "\n".join([*parts, "</section>"])


def figures(every: list[Figure]) -> list[str]:
    """Those of one panel side by side, where there is room, then the others."""
    single = [figure_of(figure) for figure in every if len(figure.panels) == 1]
    more = [figure_of(figure) for figure in every if len(figure.panels) > 1]
    return [f'<div class="panels">{"".join(single)}</div>', *more]


def figure_of(figure: Figure) -> str:
    name, _, about = figure.title.partition(" (")
    panels = [
        f'<div role="img" aria-label="{escaped(f"{name}. {panel.title}. {panel.alt}")}">'
        f"{svg(panel, f'{figure.name}-{i}')}</div>"
        for i, panel in enumerate(figure.panels)
    ]
    return (
        f'<figure><h3>{escaped(name)}</h3><div class="panels">{"".join(panels)}</div>'
        f"<figcaption>{escaped(about.rstrip(')'))}</figcaption></figure>"
    )


def table_of(markdown: str, kind: str, label: str) -> str:
    """A table of Markdown as HTML; each cell knows its heading, for narrow windows."""
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()
    ]
    heads = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escaped(name)}">{coloured(html(cell))}</td>'
            for name, cell in zip(head, line, strict=True)
        )
        + "</tr>"
        for line in lines
    )
    table = f'<table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escaped(label)}">{table}</div>'
    )


def html(markdown: str) -> str:
    """Text with *words* and **words** in it."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped(markdown))
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", text)


def coloured(cell: str) -> str:
    return re.sub(r"^(supported|refuted|open)\b", r'<span class="\1">\1</span>', cell)
