"""What README.md says of the evidence: its first screen and "Does it help?", whichever way it went."""

from pathlib import Path

from softar.recipes.evidence_gains import Analysis, Result, of_both, points, share, span
from softar.recipes.evidence_kinds import Best, Claim
from softar.recipes.evidence_tables import has_region, table, update, wrapped

FIRST, TABLE = "first screen", "does it help"  # regions
WIDTH = 119
NETS = "All nets are tiny and trained here, but for SmolLM2-135M. "
ARMS = (
    "*trace-soft* trains on random search paths and reads its own mixtures, *discrete-traces* on the "
    "same paths and reads single tokens; *discrete* and *guided-soft*, which reads mixtures too, train "
    "on correct paths. Points of accuracy:"
)


def regions(analyses: dict[str, Analysis]) -> dict[str, str]:
    """Region of README -> what stands in it."""
    shown = {name: each for name, each in analyses.items() if each.evidence.in_readme}
    counted = {name: each for name, each in shown.items() if each.logs.whole}
    return {FIRST: first_screen(counted), TABLE: table_of(shown)}


def table_of(analyses: dict[str, Analysis]) -> str:
    head = ["accuracy, one way over another", "soft", "control", "points (95 %)", "verdict"]
    return table(head, [line for name, each in analyses.items() for line in lines_of(name, each)])


def lines_of(name: str, analysis: Analysis) -> list[list[str]]:
    """Of the claims that README has; one that says so while no seed is whole."""
    if analysis.logs.whole:
        return [line_of(result) for result in analysis.results.values() if result.claim.brief]
    where = primary_place(analysis.evidence.claims)
    return [[f"{where} ({name})", "", "", "", "no seed yet"]] if where else []


def line_of(result: Result) -> list[str]:
    both = ["" if value is None else share(value) for value in (result.ours, result.theirs)]
    gain = f"{points(result.gain.mean)} ({span(result.gain.low, result.gain.high)})"
    return [result.claim.brief, *both, gain, of_both(result.verdict, result.by_t)]


def losses(results: list[Result]) -> str:
    """Where the control is ahead, with an interval that says so; those without a row are counted."""
    lost = [result for result in results if result.claim.has_control and result.gain.high < 0]
    rows, more = ([r for r in lost if bool(r.claim.brief) is shown] for shown in (True, False))
    to: dict[str, list[str]] = {}
    for each in rows:
        where, control = place_of(each.claim), control_of(each.claim)
        to.setdefault(where, []).append(f"to {control} ({points(each.gain.mean)})")
    said = [f"{where}: {', '.join(some)}" for where, some in to.items()]
    said = said or ["in none of these rows for certain"]
    if more:
        guided = sum(is_over_guided(each.claim) for each in more)
        said.append(f"{len(more)} more in RESULTS.md" + f", {guided} to guided-soft" * (guided > 0))
    return f"**Where soft loses:** {'; '.join(said)}."


def place_of(claim: Claim) -> str:
    return claim.brief.partition(": ")[0]


def primary_place(claims: tuple[Claim, ...]) -> str:
    """Where the primary gain of an experiment is; empty where README has none."""
    return next((place_of(c) for c in claims if c.brief and c.about == "primary"), "")


def control_of(claim: Claim) -> str:
    return claim.brief.partition(" over ")[2]


def is_over_guided(claim: Claim) -> bool:
    theirs = [each for part in claim.parts for each in part.theirs]
    reads = [read for each in theirs for read in (each.of if isinstance(each, Best) else (each,))]
    return any(read.setting.startswith("guided-soft") for read in reads)


def first_screen(analyses: dict[str, Analysis]) -> str:
    """Of each experiment the gains beside its primary one, and all losses."""
    every = [result for each in analyses.values() for result in each.results.values()]
    head = wrapped(f"**[Does it help?](#does-it-help)** {NETS}{ARMS}", WIDTH)
    bullets = filter(None, (bullet(name, each) for name, each in analyses.items()))
    items = (wrapped(f"- {line}", WIDTH - 2) for line in (*bullets, losses(every)))
    return "\n".join([head, *(item.replace("\n", "\n  ") for item in items)])


def bullet(name: str, analysis: Analysis) -> str:
    """Where the primary gain of an experiment is: all gains that README has there, the least first,
    each with its verdict. Nothing where README has no primary gain."""
    rows = [result for result in analysis.results.values() if result.claim.brief]
    where = primary_place(tuple(result.claim for result in rows))
    if not where:
        return ""
    there = [r for r in rows if place_of(r.claim) == where and r.gain.high >= 0]
    gains = [gain_of(result) for result in sorted(there, key=lambda r: r.gain.mean)]
    whole, planned = (len(seeds) for seeds in (analysis.logs.whole, analysis.logs.planned))
    seeds = f"{whole} seeds" if whole == planned else f"{whole} of {planned} seeds so far"
    seeds += ", intervals over rows alone" * (whole == 1)
    about = "; ".join(filter(None, [f"{name}, {seeds}", analysis.evidence.brief]))
    return f"{where} ({about}): {'; '.join(gains) or 'no gain'}."


def gain_of(result: Result) -> str:
    """ "+3.4 points over discrete, correct paths: *open*" """
    said = of_both(result.verdict, result.by_t)
    return f"{points(result.gain.mean)} over {control_of(result.claim)}" + f": *{said}*" * bool(
        said
    )


def update_readme(file: Path, analyses: dict[str, Analysis], *, write: bool) -> bool:
    """Are its regions what they should be? With `write` they are, afterwards. A page without them
    is left alone."""
    has_regions = has_region(file.read_text(encoding="utf-8"), TABLE)
    return not has_regions or update(file, regions(analyses), write)
