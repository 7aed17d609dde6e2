"""What is claimed of each method in the table of methods: RESULTS.md, "Evidence: rules"."""

from softar.recipes.evidence_kinds import Best, Claim, Evidence, Grid, Part
from softar.recipes.evidence_logs import Read
from softar.recipes.evidence_methods import (
    AGAIN,
    AHEAD,
    ANCHORS,
    ARMS,
    BEAMS,
    DIGITS,
    DRAWS,
    REINFORCED,
    SWITCHES,
)

OF_X1 = {  # arms of X1 that are lines as they are, and how each is read out
    "no-cot": "discrete",
    "discrete": "discrete",
    "discrete-traces": "discrete",
    "guided-soft": "soft",
    "trace-soft": "soft",
}
TRAINED = {  # the same of those trained here
    "coconut": ("soft",),
    "pause": ("discrete",),
    "prefix-soft": ("soft", "discrete"),
    "prefix-hard": ("discrete", "soft"),
    "learn-min-p": ("soft",),
    "learn-top-k": ("soft",),
    "learn-step": ("soft",),
    "learn-one": ("soft",),
    "fixed-min-p": ("soft",),
    "fixed-top-k": ("soft",),
    **dict.fromkeys(REINFORCED, ("drawn", "soft", "discrete")),
}
CHOSEN = {  # of these settings the one that is best on development rows
    "swi": (*SWITCHES,),
    "hidden": ("hidden", "hidden, norm"),
    "soft-beam": (*ANCHORS,),
    "beam-collapse": (*AHEAD,),
}
ONE_SIZE = tuple(arm for arm, each in ARMS.items() if each.digits == (4,))
RL_HARD, *SOFT_POLICIES = REINFORCED
WAYS = (
    *("discrete", "soft", "swi", "hidden", "sampled", *DRAWS),
    *("beam", "votes", "soft-beam", "beam-collapse"),
)
HARD, SOFT = AGAIN  # nets
BEST = "at its best"  # of an arm's read-outs, on development rows


def read(arm: str, way: str, digits: int) -> Read | Best:
    def one(name: str) -> Read:
        return Read(f"{digits} digits", f"{arm}-{digits}", name)

    some = CHOSEN.get(way) if arm in AGAIN else TRAINED[arm] if way == BEST else None
    if some is not None:
        return Best(f"{arm}, {way}, {digits} digits", tuple(map(one, some)))
    return one(way)


def gains(about: str, ours: tuple[str, str], controls: dict, digits: tuple = DIGITS, **options):
    """A claim for each control, arm and read-out, and number of digits."""
    return [
        Claim(
            about,
            f"{n} digits: {', '.join(ours)}, less {', '.join(theirs)}",
            (Part((read(*ours, n),), (read(*theirs, n),)),),
            **options,
            has_seconds=has_seconds,
        )
        for n in digits
        for theirs, has_seconds in controls.items()
    ]


def of_beams(name: str) -> list[Claim]:
    """Beside the same net's soft read-out, what takes as many forwards, of the net that they suit."""
    controls = {(SOFT, "soft"): True, (HARD, "beam"): True, (HARD, "votes"): True}
    return gains(f"{name}s", (SOFT, name), controls)


METHODS = Evidence(
    title="Every method, on MNNS with 4 and 6 digits",
    brief="Every method, on MNNS with 4 and 6 digits",
    verdicts=(
        *("switching", "hidden states", "soft-beams", "beam-collapses"),
        *("prefix", "learnt min-p", "learnt top-k", "learnt temperature"),
        *(f"RL, {REINFORCED[arm]}" for arm in SOFT_POLICIES),
    ),
    claims=(
        *gains("switching", (SOFT, "swi"), {(SOFT, "soft"): True, (SOFT, "discrete"): True}),
        *gains(
            "hidden states",
            ("coconut", "soft"),
            {("pause", "discrete"): True, ("no-cot", "discrete"): True},
        ),
        *of_beams("soft-beam"),
        *of_beams("beam-collapse"),
        *gains(
            "prefix",
            ("prefix-soft", "soft"),
            # the seconds of the frozen net are none of the prefix
            {(HARD, "soft"): False, ("prefix-hard", "discrete"): True},
        ),
        *gains("learnt min-p", ("learn-min-p", "soft"), {(SOFT, "soft"): True}),
        *gains("learnt min-p", ("learn-min-p", "soft"), {("fixed-min-p", "soft"): True}, (4,)),
        *gains("learnt top-k", ("learn-top-k", "soft"), {(SOFT, "soft"): True}),
        *gains("learnt top-k", ("learn-top-k", "soft"), {("fixed-top-k", "soft"): True}, (4,)),
        *gains("learnt temperature", ("learn-step", "soft"), {(SOFT, "soft"): True}),
        *gains("learnt temperature", ("learn-step", "soft"), {("learn-one", "soft"): True}, (4,)),
        *(
            claim
            for arm in SOFT_POLICIES
            for claim in gains(
                f"RL, {REINFORCED[arm]}",
                (arm, BEST),
                # the seconds of the net that RL begins with are none of its own
                {(RL_HARD, BEST): True, (SOFT, "soft"): False, (HARD, "discrete"): False},
            )
        ),
        *gains("beside", (RL_HARD, BEST), {(SOFT, "soft"): False}, has_verdict=False),
        *gains("beside", (HARD, "swi"), {(HARD, "discrete"): True}, has_verdict=False),
        *gains("beside", (HARD, "soft-beam"), {(HARD, "beam"): True}, has_verdict=False),
        *(
            claim
            for mixer in DRAWS
            for claim in gains(
                "beside", (HARD, mixer), {(HARD, "sampled"): True}, has_verdict=False
            )
        ),
    ),
    grids=(
        Grid(
            "accuracy",
            "trained as, read out",
            tuple(f"{n} digits" for n in DIGITS),
            {
                f"{arm}, {way}": tuple(read(arm, way, n) for n in DIGITS)
                for arm, ways in {
                    **{arm: (way,) for arm, way in OF_X1.items()},
                    **dict.fromkeys(AGAIN, WAYS),
                    **{arm: ways for arm, ways in TRAINED.items() if arm not in ONE_SIZE},
                }.items()
                for way in ways
            },
            costs=True,
        ),
        Grid(
            "fixed",
            "controls at one size, read out",
            ("4 digits",),
            {f"{arm}, {way}": (read(arm, way, 4),) for arm in ONE_SIZE for way in TRAINED[arm]},
            costs=True,
        ),
    ),
    seconds={
        f"{n} digits": tuple(
            f"{arm}, {way}"
            for arm, way in (
                *(("discrete-traces", "discrete"), ("trace-soft", "soft"), ("guided-soft", "soft")),
                *(("coconut", "soft"), ("pause", "discrete"), ("learn-min-p", "soft")),
            )
        )
        for n in DIGITS
    },
    gaps={
        f"{n} digits": {
            "swi": f"{n} digits: {SOFT}, swi, less {SOFT}, soft",
            "coconut": f"{n} digits: coconut, soft, less pause, discrete",
            "soft-beam": f"{n} digits: {SOFT}, soft-beam, less {SOFT}, soft",
            "prefix": f"{n} digits: prefix-soft, soft, less {HARD}, soft",
            "min-p": f"{n} digits: learn-min-p, soft, less {SOFT}, soft",
            "temperature": f"{n} digits: learn-step, soft, less {SOFT}, soft",
            "top-k": f"{n} digits: learn-top-k, soft, less {SOFT}, soft",
            **{
                f"RL, {REINFORCED[arm]}": f"{n} digits: {arm}, {BEST}, less {RL_HARD}, {BEST}"
                for arm in SOFT_POLICIES
            },
        }
        for n in DIGITS
    },
    gaps_x="method, over its first control",
    notes=(
        "The first five lines are X1's own logs; `again` are two of its arms trained once more, as X1 "
        "keeps no weights: on one processor they are the same nets, bit for bit.",
        f"votes: the commonest of {BEAMS} thoughts drawn at temperature .7. beam, votes and soft-beam "
        f"take {BEAMS} times the forwards of soft; beam-collapse less than that.",
        "The steps and seconds of a prefix are its own: those of the net that it stands before come on "
        "top.",
        "RL begins with the net of trace-soft, whose steps and seconds come on top of its own. "
        "More supervised training for as long is no line here; X4 has it. "
        f"{BEST}: as the policy draws, softly or discretely, whichever is best on development rows.",
        "Of seed 1 8 units and of seed 2 22 are of an AMD EPYC, the other 57 of Intel Xeons, all of "
        "c381924: within these two seeds arms on different processors are compared.",
    ),
    borrows={"X1": tuple(f"{arm}-{n}" for n in DIGITS for arm in OF_X1)},
)
