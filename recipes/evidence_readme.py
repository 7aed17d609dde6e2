"""What README.md says of the evidence: its first screen and "Does it help?", whichever way it went."""

import re
from pathlib import Path

from softar.recipes.evidence_gains import Analysis, Result, of_both, points, share, span
from softar.recipes.evidence_tables import BEGIN, END, has_region, rewritten, table, wrapped
from softar.results import write_whole

FIRST, TABLE = "first screen", "does it help"  # regions
WIDTH = 119
LEAST = {"X1": 2}  # whole seeds, without which README keeps its old table
SECTION = """\
## Does it help?

By rules set before the runs but where [RESULTS.md](RESULTS.md#evidence-rules) says otherwise; there are all arms, the
seconds of both sides, and gains on rows that a shortcut does not answer (`make report`):

{table}

*Supported*: at least 3 points, the 95 % interval above 0 by bootstrap (shown) and t; *refuted*: below 3; else, and with
few seeds, *open*; blank: beside the claims. *trace-soft* learns from random search paths and reads its own mixtures;
*discrete-traces* learns the same paths and reads single tokens. 8 votes take 8 times the *forwards* (runs of the net).
A net never trained to read mixtures gains little by it or loses (X1, X2; RESULTS.md 12); RL (X4) has not been run.
"""


def regions(analyses: dict[str, Analysis]) -> dict[str, str]:
    """Region of README -> what stands in it."""
    counted = {name: each for name, each in analyses.items() if each.logs.whole}
    results = [result for each in counted.values() for result in each.results.values()]
    brief = [result for result in results if result.claim.brief]
    return {FIRST: first_screen(counted, brief), TABLE: table_of(brief)}


def table_of(results: list[Result]) -> str:
    head = ["accuracy, one way over another", "soft", "control", "points (95 %)", "verdict"]
    return table(head, [line_of(result) for result in results])


def line_of(result: Result) -> list[str]:
    both = ["" if value is None else share(value) for value in (result.ours, result.theirs)]
    gain = f"{points(result.gain.mean)} ({span(result.gain.low, result.gain.high)})"
    return [result.claim.brief, *both, gain, of_both(result.verdict, result.by_t)]


def losses(results: list[Result], others: int) -> str:
    """Where the control is ahead, with an interval that says so. others: such gains without a row."""
    lost = [result for result in results if result.gain.high < 0]
    said = [f"{each.claim.brief} ({points(each.gain.mean)})" for each in lost]
    said += [f"{others} more gains in RESULTS.md"] * (others > 0)
    return f"**Where soft loses:** {'; '.join(said) or 'in none of these rows for certain'}."


def first_screen(analyses: dict[str, Analysis], results: list[Result]) -> str:
    """Of each primary gain all that README has against other controls there, and the verdict on it."""
    primary = []
    for each in (result for result in results if result.claim.about == "primary"):
        where = each.claim.brief.partition(":")[0]
        gains = [r.gain.mean for r in results if r.claim.brief.startswith(f"{where}:")]
        over = f" over {len(gains)} controls" if len(gains) > 1 else ""
        least = f"{points(min(gains))} to " if len(gains) > 1 else ""
        said = of_both(each.verdict, each.by_t)
        span_of = f"{least}{points(max(gains))} points{over}"
        primary.append(f"{where}, {span_of} (primary: {said})")
    interim = [
        f"{name}: {len(each.logs.whole)} of {len(each.logs.planned)} seeds"
        for name, each in analyses.items()
        if each.logs.whole != each.logs.planned
    ]
    every = [result for each in analyses.values() for result in each.results.values()]
    others = sum(each.gain.high < 0 and not each.claim.brief for each in every)
    so_far = f" So far ({', '.join(interim)}):" if interim else ""
    head = f"**[Does it help?](#does-it-help)**{so_far}"
    return wrapped(f"{head} {'; '.join(primary)}. {losses(results, others)}", WIDTH)


def switched(text: str, analyses: dict[str, Analysis]) -> str:
    """README with the regions in place of the table that it had; as it is where it has them.

    Raises:
        ValueError: while too few seeds are whole.
    """
    for name, least in LEAST.items():
        whole = len(analyses[name].logs.whole) if name in analyses else 0
        if whole < least:
            raise ValueError(
                f"readme=True: {name} has {whole} whole seeds, README's table needs {least}: "
                "run make evidence on"
            )
    if has_region(text, TABLE):
        return text
    empty = {name: f"{BEGIN.format(name)}\n{END.format(name)}" for name in (FIRST, TABLE)}
    body = SECTION.format(table=empty[TABLE])
    text, found = re.subn(
        r"^## Does it help\?\n.*?(?=^## )", lambda _: f"{body}\n", text, flags=re.M | re.S
    )
    if found != 1:
        raise ValueError("README.md has no section '## Does it help?': write its heading")
    return text.replace("```bash\n", f"{empty[FIRST]}\n\n```bash\n", 1)


def update_readme(
    file: Path, analyses: dict[str, Analysis], *, write: bool, switch: bool = False
) -> bool:
    """Are its regions what they should be? With `write` they are, afterwards. A page without them
    is left alone, unless `switch` puts them there."""
    old = new = file.read_text(encoding="utf-8")
    if switch:
        new = switched(new, analyses)
    if has_region(new, TABLE):
        for name, body in regions(analyses).items():
            new = rewritten(new, name, body, file.name)
    if write and new != old:
        write_whole(file, new)
    return new == old
