"""What is claimed of X4, RL on soft policies from two starts: RESULTS.md, "Evidence: rules"."""

from softar.recipes.evidence_kinds import Best, Claim, Evidence, Grid, Part, less
from softar.recipes.evidence_logs import Read

STARTS = ("self-fed", "teacher-forced")
HOWS = ("start", "draws-1", "draws-3", "sft")
SIX_FORWARDS = ("1 draw", "3 draws", "soft", "discrete")
WAYS = ("1 draw", "3 draws", "votes", "soft", "discrete")
OF_ONE_NET = dict(has_verdict=False, has_seconds=False, has_control=False)  # after less before


def rl(start: str, how: str, way: str) -> Read:
    return Read("all", f"{start}-{how}", way)


def best(start: str, name: str, hows: tuple[str, ...]) -> Best:
    of = tuple(rl(start, how, way) for how in hows for way in SIX_FORWARDS)
    return Best(f"{start}, {name}", of)


PAIRS = {  # what is compared, in words -> ours and theirs from a start
    "draws-3, 3 draws, less draws-1, 1 draw": lambda start: (
        rl(start, "draws-3", "3 draws"),
        rl(start, "draws-1", "1 draw"),
    ),
    "the best of RL less the best of sft": lambda start: (
        best(start, "RL", ("draws-1", "draws-3")),
        best(start, "sft", ("sft",)),
    ),
    "draws-3, 3 draws, less draws-1, votes (6 forwards, 18)": lambda start: (
        rl(start, "draws-3", "3 draws"),
        rl(start, "draws-1", "votes"),
    ),
    "draws-3 less draws-1, both 3 draws": lambda start: (
        rl(start, "draws-3", "3 draws"),
        rl(start, "draws-1", "3 draws"),
    ),
}
POLICIES, BEST, CHAINS, TRAINING = PAIRS


def over_starts(about: str, what: str, **options) -> Claim:
    """The mean of the gains from both starts."""
    ours, theirs = zip(*(PAIRS[what](start) for start in STARTS))
    return Claim(about, f"{what}: mean over starts", (Part(ours, theirs),), **options)


def from_start(start: str, what: str) -> Claim:
    ours, theirs = PAIRS[what](start)
    return less("by start", f"{what}: {start}", ours, theirs, has_verdict=False)


def after_less_before(start: str, how: str, way: str) -> Claim:
    """has_seconds: those of an arm leave out its start's, so that nothing is to be compared."""
    says = f"{how} less its start, both {way}: {start}"
    return less("after", says, rl(start, how, way), rl(start, "start", way), **OF_ONE_NET)


OF_POLICIES = {start: from_start(start, POLICIES) for start in STARTS}
SELF_FED, TEACHER_FORCED = (claim.parts[0] for claim in OF_POLICIES.values())
X4 = Evidence(
    title="Soft RL on MNNS, 2 x 2",
    brief="3 draws a step",
    verdicts=("primary", "interaction", "rl less sft", "draws less chains"),
    claims=(
        over_starts("primary", POLICIES, brief="RL, MNNS: thoughts of 3 draws over 1 draw"),
        Claim(
            "interaction",
            "the primary gain: from self-fed less from teacher-forced",
            (SELF_FED, TEACHER_FORCED._replace(weight=-1.0)),
            is_question=True,
            has_control=False,
        ),
        over_starts(
            "rl less sft", BEST, brief="RL, MNNS: the best policy, a hard one, over longer SFT"
        ),
        over_starts(
            "draws less chains", CHAINS, brief="RL, MNNS: thoughts of 3 draws over 1 draw, 3 votes"
        ),
        over_starts("beside", TRAINING, has_verdict=False),
        *OF_POLICIES.values(),
        *(from_start(start, what) for what in (BEST, CHAINS, TRAINING) for start in STARTS),
        *(
            after_less_before(start, how, way)
            for how, way in (("draws-1", "1 draw"), ("draws-3", "3 draws"))
            for start in STARTS
        ),
        *(
            after_less_before(start, "draws-3", way)._replace(about="added later")
            for way in ("discrete", "votes")
            for start in STARTS
        ),
        less(
            "after",
            "draws-3, 3 draws, less its start, soft: self-fed",
            rl("self-fed", "draws-3", "3 draws"),
            rl("self-fed", "start", "soft"),
            **OF_ONE_NET,
        ),
    ),
    grids=(
        Grid(
            "accuracy",
            "trained as, read out with",
            WAYS,
            {
                f"{start}, {how}": tuple(rl(start, how, way) for way in WAYS)
                for start in STARTS
                for how in HOWS
            },
        ),
    ),
    seconds={
        way: tuple(f"{start}, {how}" for start in STARTS for how in HOWS[1:])
        for way in ("1 draw", "3 draws")
    },
    gaps={
        what: {start: f"{what}: {start}" for start in STARTS}
        for what in (POLICIES, BEST, CHAINS, TRAINING)
    },
    gaps_x="start",
    notes=(
        "Interaction: there is one where its 95 % interval leaves out 0, either way; else it is open. "
        "Is there one, the primary gain is to be read by start.",
        "The seconds of an arm leave out those of its start, which all arms from it share; a claim "
        "over both starts has the mean of theirs. Each read-out takes 6 forwards an answer, votes 18.",
        "Each row is answered four times, as thoughts are drawn: one group of the bootstrap.",
        "The starts differ in what the thought reads while it is trained, and in the rate.",
        "draws-3 less its start, both read discretely or with votes, was added when all seeds were logged.",
    ),
)
