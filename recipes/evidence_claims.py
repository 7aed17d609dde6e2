"""What is claimed of each experiment of the evidence, and which numbers stand beside it: RESULTS.md,
"Evidence: rules", as tables. An experiment is added by an entry in EVIDENCE, a region in RESULTS.md
and `facts` in its module."""

from softar.recipes.evidence_claims_diffusion_rl import DIFFUSION_RL
from softar.recipes.evidence_claims_methods import METHODS
from softar.recipes.evidence_claims_reach import X2, X2_SMOLLM2
from softar.recipes.evidence_claims_rl import X4
from softar.recipes.evidence_kinds import Claim, Evidence, Grid, less
from softar.recipes.evidence_logs import Read

# X1

SIZES = (6, 5, 4)  # digits
DOSES = ("own", *(f"top {k}" for k in (16, 8, 4, 2, 1)), "another row's")
WAYS = {  # of reading each arm; the first is what it was trained for
    "no-cot": ("discrete",),
    "discrete": ("discrete", "soft"),
    "discrete-traces": ("discrete", "soft", "votes"),
    "scheduled-sampling": ("discrete", "soft"),
    "guided-soft": ("soft", "discrete"),
    "trace-soft": ("soft", "discrete"),
}


def mnns(arm: str, digits: int = 6, way: str = "") -> Read:
    return Read(f"{digits} digits", f"{arm}-{digits}", way or WAYS[arm][0])


def mnns_less(arm: str, digits: int = 6, way: str = "", about: str = "beside", **options) -> Claim:
    """trace-soft, read softly, less another arm."""
    ours, theirs = mnns("trace-soft", digits), mnns(arm, digits, way)
    return less(about, f"{digits} digits: less {arm}, {theirs.readout}", ours, theirs, **options)


def mnns_dose(dose: str, digits: int = 6) -> Claim:
    """With a verdict at the size of the primary gain."""
    ours, theirs = (mnns("trace-soft", digits, f"after {name}") for name in ("own", dose))
    says = f"{digits} digits: after own thought less after {dose}"
    if digits == 6:
        return less("dose", says, ours, theirs)
    return less("curve", says, ours, theirs, has_verdict=False)


def mnns_guided(digits: int) -> Claim:
    """guided-soft less what learns the gold path as it does."""
    ours, theirs = mnns("guided-soft", digits), mnns("discrete", digits)
    says = f"{digits} digits: guided-soft less discrete"
    return less("added later", says, ours, theirs, has_verdict=False)


SAME_PATHS = {
    6: mnns_less(
        "discrete-traces", about="primary", brief="MNNS, 6 digits: trace-soft over discrete-traces"
    ),
    5: mnns_less("discrete-traces", 5, about="curve", has_verdict=False),
    4: mnns_less(
        "discrete-traces",
        4,
        about="curve",
        has_verdict=False,
        brief="MNNS, 4 digits: trace-soft over discrete-traces",
    ),
}
LOST = {  # (arm, digits) -> what README calls it
    ("discrete", 4): "MNNS, 4 digits: trace-soft over discrete, correct paths",
    ("guided-soft", 4): "MNNS, 4 digits: trace-soft over guided-soft",
}
X1 = Evidence(
    title="MNNS with 4, 5 and 6 digits",
    verdicts=("primary", "trend", "dose"),
    claims=(
        SAME_PATHS[6],
        mnns_less(
            "discrete-traces",
            way="votes",
            brief="MNNS, 6 digits: trace-soft over discrete-traces, 8 votes",
        ),
        mnns_less("discrete-traces", way="soft"),
        mnns_less("discrete"),
        mnns_less("no-cot"),
        mnns_less("scheduled-sampling"),
        mnns_less("guided-soft"),
        SAME_PATHS[5],
        SAME_PATHS[4],
        *(
            mnns_less(
                arm, digits, about="curve", has_verdict=False, brief=LOST.get((arm, digits), "")
            )
            for digits in (5, 4)
            for arm in ("discrete", "guided-soft")
        ),
        Claim(
            "trend",
            "less discrete-traces, discrete: at 6 digits less at 4",
            (*SAME_PATHS[6].parts, SAME_PATHS[4].parts[0]._replace(weight=-1.0)),
        ),
        *(mnns_dose(dose, n) for n in SIZES for dose in ("another row's", "top 1")),
        *map(mnns_guided, SIZES),
    ),
    grids=(
        Grid(
            "accuracy",
            "trained as, read out",
            tuple(f"{digits} digits" for digits in SIZES),
            {
                f"{arm}, {way}": tuple(mnns(arm, digits, way) for digits in SIZES)
                for arm, ways in WAYS.items()
                for way in ways
            },
        ),
        Grid(
            "dose",
            "trace-soft, after a thought that is",
            DOSES,
            {
                f"{digits} digits": tuple(mnns("trace-soft", digits, f"after {d}") for d in DOSES)
                for digits in SIZES
            },
            x="what is left of each step of the thought",
            apart=1,
            floor="same answer by chance",
        ),
    ),
    seconds={
        f"{digits} digits": tuple(f"{arm}, {ways[0]}" for arm, ways in WAYS.items())
        for digits in SIZES
    },
    gaps={"all rows": {f"{digits}": SAME_PATHS[digits].says for digits in reversed(SIZES)}},
    gaps_x="digits; paths: 8, 16, 32",
    beside="rows whose answer is not the parity of the sum",
    notes=(
        "One bit, the parity of the digits' sum, answers .535, .623 and .717 of the rows at 4, 5 and "
        "6 digits, and 4 digits had fewer sequences and a third of the seconds: the trend is "
        "confounded. So all gains are printed for the other rows too; several do not hold there, that "
        "over discrete among them.",
        "A thought cut to one token a step is nothing that trace-soft was trained to read. Another "
        "row's thought comes with the same answer as often as the last column of the doses says.",
        "The rule on doses names no size: 6 digits, where the primary gain is, count, the others stand "
        "beside. guided-soft less discrete, both on gold paths, was added after seed 1.",
        "no-cot, discrete, scheduled-sampling and guided-soft run with rates that were chosen for "
        "others: a verdict on a gain over them is one on these settings.",
        "Logs are of four commits, some seeds of two: 1d24977 and a3f83db (0), 1d24977 and b16a12f (1), "
        "b16a12f and 4487d35 (2), 4487d35 (3 to 7). Of seed 4 11 units and of 5 to 7 all are of an AMD "
        "EPYC, the others of Intel Xeons: within seed 4 arms on different processors are compared.",
    ),
)

# X3

FORWARDS = (4, 8, 12, 20)
SOFT_ARMS = ("soft-mask", "soft-mask-1", "shuffled")
DRAWN = (
    "hard, hard",
    "hard-long, hard",
    "soft-mask, soft",
    "soft-mask, hard",
    "soft-mask-1, soft",
    "shuffled, soft",
)


def latin(arm: str, way: str, forwards: int = 12) -> Read:
    return Read("all" if forwards == 12 else "first 1000", arm, f"{way}, {forwards}")


def latin_less(arm: str, way: str, words: str, forwards: int = 12, **options) -> Claim:
    """soft-mask with k = 5, read softly, less another arm."""
    options = dict(about="beside" if forwards == 12 else "curve") | options
    return less(
        says=f"{forwards} forwards: less {words}",
        ours=latin("soft-mask", "soft", forwards),
        theirs=latin(arm, way, forwards),
        has_verdict=forwards == 12,
        **options,
    )


CONTROLS = {  # of the curves
    "k = 1": ("soft-mask-1", "soft", "k = 1"),
    "hard-long": ("hard-long", "hard", "hard-long, hard"),
    "the same, hard": ("soft-mask", "hard", "the same weights, hard"),
    "shuffled": ("shuffled", "soft", "shuffled"),
}
BRIEFS = {  # (control, forwards) -> what README calls it
    ("k = 1", 12): "Latin, 12 forwards: soft masks over masks of 1 token",
    ("hard-long", 12): "Latin, 12 forwards: soft masks over longer hard training",
    ("the same, hard", 12): "Latin, 12 forwards: soft masks over bare masks, same net",
    ("shuffled", 20): "Latin, 20 forwards: soft masks over another row's beliefs",
    ("hard-long", 20): "Latin, 20 forwards: soft masks over longer hard training",
}


def latin_control(name: str, forwards: int) -> Claim:
    options = {"about": "primary"} if (name, forwards) == ("k = 1", 12) else {}
    brief = BRIEFS.get((name, forwards), "")
    return latin_less(*CONTROLS[name], forwards, brief=brief, **options)


X3 = Evidence(
    title="Latin squares by masked diffusion",
    brief="squares by masked diffusion",
    verdicts=("primary",),
    claims=(
        *(latin_control(name, 12) for name in CONTROLS),
        *(latin_control(name, n) for n in FORWARDS if n != 12 for name in CONTROLS),
    ),
    grids=(
        Grid(
            "forwards",
            "trained as, read out",
            tuple(f"{n} forwards" for n in FORWARDS),
            {
                f"{arm}, {way}": tuple(latin(arm, way, n) for n in FORWARDS)
                for arm in ("hard", "hard-long", *SOFT_ARMS)
                for way in (("soft", "hard") if arm in SOFT_ARMS else ("hard",))
            },
            x="forwards for 20 open cells",
            drawn=DRAWN,
        ),
    ),
    seconds={"12 forwards": tuple(name for name in DRAWN if name != "soft-mask, hard")},
    gaps={
        f"less {name}": {f"{n}": latin_control(name, n).says for n in FORWARDS} for name in CONTROLS
    },
    gaps_x="forwards for 20 open cells",
    notes=(
        "soft-mask mixes k = 5 tokens into each mask, soft-mask-1 the likeliest alone, shuffled the "
        "belief about another row's slot. Where k = 1 is below hard, read hard, part of the gain over "
        "it is harm that k = 1 does. shuffled learns how strongly it reads its mixtures, and learns "
        "to ignore them (a weight of .03 to .08, of k = 5 .48 to .63): it is nearly bare masks. 12 "
        "forwards are read on all rows, the others on the first 1000.",
        "All units are of dbe663f, on AMD EPYCs.",
    ),
)
EVIDENCE = {
    "X1": X1,
    "X2": X2,
    "X2-smollm2": X2_SMOLLM2,
    "X3": X3,
    "X4": X4,
    "methods": METHODS,
    "diffusion-rl": DIFFUSION_RL,
}
