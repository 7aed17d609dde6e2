"""What a claim of the evidence is made of, and what stands beside it."""

from typing import NamedTuple

from softar.recipes.evidence_logs import Read

MARGIN, EQUIVALENT = 0.03, 0.02
EQUAL_FORWARDS = 0.05  # as a share of ours; where theirs differ by more, both are said
EQUAL_SECONDS = 0.05  # more of them than the other side had, by this share, are said
SINGLE = ("discrete", "hard", "votes", "beam", "sampled", "1 draw")  # read-outs of single tokens


class Best(NamedTuple):
    """Of these the read-out that is right in most development rows, over all whole seeds; of equals
    the first."""

    name: str
    of: tuple[Read, ...]


class Part(NamedTuple):
    """Mean accuracy of `ours` less that of `theirs`, over the same rows."""

    ours: tuple[Read | Best, ...]
    theirs: tuple[Read | Best, ...]
    weight: float = 1.0


class Claim(NamedTuple):
    """A gain, which is the sum of its parts."""

    about: str  # what the rules call it; the verdict on that is the verdict on all such claims
    says: str  # ours less theirs, in words that no other claim of the experiment has
    parts: tuple[Part, ...]
    has_verdict: bool = True
    brief: str = ""  # what README calls it, where it stands there: "where: ours over theirs"
    is_question: bool = False  # is there a difference, either way? In place of a margin
    has_seconds: bool = True  # do those of both tell how long each was trained?
    has_control: bool = True  # is theirs one to which soft thinking can lose? Not a net before RL
    margin: float = MARGIN  # which a supported gain reaches


class Grid(NamedTuple):
    """Accuracies in a table, and as curves over its columns where `x` says what these are."""

    name: str
    corner: str
    columns: tuple[str, ...]
    lines: dict[str, tuple[Read | Best, ...]]
    x: str = ""
    drawn: tuple[str, ...] = ()  # of the lines, where not all are drawn
    apart: int = 0  # the last columns, up to which no line is drawn
    floor: str = ""  # the heading of one more column, the floor of each line's rows
    costs: bool = False  # forwards, steps and seconds too, of each column one


class Evidence(NamedTuple):
    title: str
    verdicts: tuple[str, ...]  # `about` of the claims that the experiment is there for
    claims: tuple[Claim, ...]
    grids: tuple[Grid, ...]
    seconds: dict[str, tuple[str, ...]]  # column of the first grid -> its lines, over seconds
    gaps: dict[str, dict[str, str]]  # legend -> tick -> `says` of the claim drawn there
    gaps_x: str
    beside: str = ""  # what the rows are that `Rows.beside` marks
    least_seeds: int = 2  # whole ones, below which nothing is said
    notes: tuple[str, ...] = ()  # what has to be known to read the tables
    borrows: dict[str, tuple[str, ...]] = {}  # experiment -> settings whose logs count here too
    # on README's first screen: task and net; of one without a row there what it is, or it is left out
    brief: str = ""


def is_soft(read: Read) -> bool:
    """Does the net think in mixtures, or in hidden states, as it is read out?"""
    way = read.readout.partition(",")[0].removeprefix("drawn ")
    if way == "drawn":  # as the policy draws
        return not read.setting.startswith("rl-hard")
    return way not in SINGLE


def less(about: str, says: str, ours: Read, theirs: Read, brief: str = "", **options) -> Claim:
    return Claim(about, says, (Part((ours,), (theirs,)),), brief=brief, **options)
