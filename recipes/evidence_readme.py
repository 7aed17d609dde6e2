"""What README.md says of the evidence: its first screen and "Does it help?", whichever way it went."""

from pathlib import Path

from softar.recipes.evidence_gains import Analysis, Result, of_both, points, share, span
from softar.recipes.evidence_kinds import Claim, is_soft
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
    counted = {name: each for name, each in analyses.items() if each.logs.whole}
    return {FIRST: first_screen(counted), TABLE: table_of(analyses)}


def table_of(analyses: dict[str, Analysis]) -> str:
    head = ["accuracy, one way over another", "one", "the other", "points (95 %)", "verdict"]
    return table(head, [line for name, each in analyses.items() for line in lines_of(name, each)])


def lines_of(name: str, analysis: Analysis) -> list[list[str]]:
    """Of the claims that README has; one that says so while no seed is whole."""
    if analysis.logs.whole:
        return [line_of(result) for result in analysis.results.values() if result.claim.brief]
    where = primary_place(analysis.evidence.claims)
    return [[f"{where} ({name})", "", "", "", "no seed yet"]] if where else []


def line_of(result: Result) -> list[str]:
    """A row; what bootstrap or t alone say of an open claim has no room there."""
    both = ["" if value is None else share(value) for value in (result.ours, result.theirs)]
    gain = f"{points(result.gain.mean)} ({span(result.gain.low, result.gain.high)})"
    verdict = of_both(result.verdict, result.by_t).partition(" (")[0]
    return [result.claim.brief, *both, gain, verdict]


def losses(results: list[Result]) -> str:
    """Where soft thinking is behind, with an interval that says so: rows by both intervals, then those
    of which t is not sure; those without a row are counted."""
    lost = [result for result in results if is_loss(result)]
    rows, more = ([r for r in lost if bool(r.claim.brief) is shown] for shown in (True, False))
    sure, unsure = ([r for r in rows if (r.gain.t_high < 0) is both] for both in (True, False))
    said = [f"**Where soft loses:** {listed(sure) or 'in none of these rows for certain'}."]
    if unsure:
        said.append(f"By bootstrap alone: {listed(unsure)}.")
    if more:
        to_soft = sum(any(map(is_soft, each.claim.parts[0].theirs)) for each in more)
        counts = {"to single tokens": len(more) - to_soft, "to other soft ways": to_soft}
        counted = ", ".join(f"{n} {whom}" for whom, n in counts.items() if n)
        said.append(f"More in RESULTS.md: {counted}.")
    return " ".join(said)


def is_loss(result: Result) -> bool:
    """Does soft thinking lose to a control? One net less itself and gains of gains say nothing of that."""
    claim = result.claim
    if not claim.has_control or len(claim.parts) != 1 or result.gain.high >= 0:
        return False
    return all(map(is_soft, claim.parts[0].ours))


def listed(lost: list[Result]) -> str:
    to: dict[str, list[str]] = {}
    for each in sorted(lost, key=lambda r: r.gain.mean):
        where, control = place_of(each.claim), control_of(each.claim)
        to.setdefault(where, []).append(f"to {control} ({points(each.gain.mean)})")
    return "; ".join(f"{where}: {', '.join(some)}" for where, some in to.items())


def place_of(claim: Claim) -> str:
    return claim.brief.partition(": ")[0]


def primary_place(claims: tuple[Claim, ...]) -> str:
    """Where the primary gain of an experiment is; empty where README has none."""
    return next((place_of(c) for c in claims if c.brief and c.about == "primary"), "")


def control_of(claim: Claim) -> str:
    return claim.brief.partition(" over ")[2]


def first_screen(analyses: dict[str, Analysis]) -> str:
    """Of each experiment the gains beside its primary one, and all losses."""
    every = [result for each in analyses.values() for result in each.results.values()]
    head = wrapped(f"**[Does it help?](#does-it-help)** {NETS}{ARMS}", WIDTH)
    bullets = filter(None, (bullet(name, each) for name, each in analyses.items()))
    items = (wrapped(f"- {line}", WIDTH - 2) for line in (*bullets, losses(every)))
    return "\n".join([head, *(item.replace("\n", "\n  ") for item in items)])


def bullet(name: str, analysis: Analysis) -> str:
    """Where the primary gain of an experiment is: all gains that README has there, the least first,
    each with its verdict. Of one without a row there that has a brief, how its verdicts fell."""
    rows = [result for result in analysis.results.values() if result.claim.brief]
    where, brief = primary_place(tuple(r.claim for r in rows)), analysis.evidence.brief
    whole, planned = (len(seeds) for seeds in (analysis.logs.whole, analysis.logs.planned))
    seeds = f"{whole} seeds" if whole == planned else f"{whole} of {planned} seeds so far"
    if not where:
        return brief and f"{brief} ({name}, {seeds}): {tally(analysis)}."
    there = [r for r in rows if place_of(r.claim) == where and r.gain.high >= 0]
    seeds += ", intervals over rows alone" * (whole == 1)
    about = "; ".join(filter(None, [f"{name}, {seeds}", brief]))
    return f"{where} ({about}): {gains_of(there) or 'no gain'}."


def tally(analysis: Analysis) -> str:
    """ "of 11 verdicts 0 supported, 7 refuted, 4 open" """
    pairs = ((analysis.verdict(a), analysis.verdict(a, True)) for a in analysis.evidence.verdicts)
    verdicts = [of_both(*pair).partition(" ")[0] for pair in pairs]
    counts = (f"{verdicts.count(each)} {each}" for each in ("supported", "refuted", "open"))
    return f"of {len(verdicts)} verdicts {', '.join(counts)}"


def gains_of(results: list[Result]) -> str:
    """ "+3.4 over discrete: *open*; +9.0 over votes: *supported*"; a verdict that all have said once."""
    results = sorted(results, key=lambda r: r.gain.mean)
    gains = [f"{points(r.gain.mean)} over {control_of(r.claim)}" for r in results]
    verdicts = [of_both(r.verdict, r.by_t) for r in results]
    if len(gains) > 1 and len({*verdicts}) == 1 and verdicts[0]:
        return f"{'; '.join(gains)}: {'both' if len(gains) == 2 else 'all'} *{verdicts[0]}*"
    return "; ".join(g + f": *{v}*" * bool(v) for g, v in zip(gains, verdicts, strict=True))


def update_readme(file: Path, analyses: dict[str, Analysis], *, write: bool) -> bool:
    """Are its regions what they should be? With `write` they are, afterwards. A page without them
    is left alone."""
    has_regions = has_region(file.read_text(encoding="utf-8"), TABLE)
    return not has_regions or update(file, regions(analyses), write)
