"""What the logs of the evidence come to: gains and verdicts on made-up logs, the page, the regions of
README.md and RESULTS.md."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from softar.evals.seeds import Gain, bootstrap_gains
from softar.recipes import (
    evidence,
    evidence_diffusion_rl,
    evidence_latin,
    evidence_methods,
    evidence_mnns,
    evidence_reach,
    evidence_report,
    evidence_rl,
    evidence_smollm2,
)
from softar.recipes.evidence_claims import EVIDENCE
from softar.recipes.evidence_figures import SIZE, figures_of, legend
from softar.recipes.evidence_gains import (
    Analysis,
    Result,
    analyse,
    ranges,
    reads_of,
    seconds_of,
    verdicts_of,
)
from softar.recipes.evidence_kinds import Best, Claim, Evidence, Grid, Part
from softar.recipes.evidence_logs import Read, read_logs, read_rows_of, rows_from
from softar.recipes.evidence_page import page_of
from softar.recipes.evidence_readme import (
    bullet,
    first_screen,
    is_loss,
    line_of,
    losses,
    regions,
    update_readme,
)
from softar.recipes.evidence_tables import (
    BEGIN,
    END,
    about_of,
    claims_table,
    region_of,
    rewritten,
    without_regions,
)
from softar.recipes.evidence_units import read_rows
from softar.show.plots import plot

ROOT = Path(evidence.ROOT)
MODULES = {
    "X1": evidence_mnns,
    "X2": evidence_reach,
    "X2-smollm2": evidence_smollm2,
    "X3": evidence_latin,
    "X4": evidence_rl,
    "methods": evidence_methods,
    "diffusion-rl": evidence_diffusion_rl,
}
SIZES = {"X1": (12, 8, 9), "X2": (8, 10), "X2-smollm2": (6,), "X3": (14, 9), "X4": (12,)}
SIZES["methods"] = (12, 9)  # of which X1's logs are read too
SIZES["diffusion-rl"] = (14, 9)
CHOOSE, DEV_ROWS = ("X4", "methods", "diffusion-rl"), 4  # by development rows
DRAWS = 300


def facts(name):
    """Few rows for each name that the experiment's claims have."""
    names = dict.fromkeys(read.rows for read in reads_of(EVIDENCE[name]))
    return {
        rows: dict(n=n, groups=[i // 2 for i in range(n)])
        | (dict(dev=DEV_ROWS) if name in CHOOSE else {})
        if name in ("X3", "diffusion-rl")
        else dict(n=n, dev=DEV_ROWS, groups=[i % 3 for i in range(n)])
        if name in CHOOSE
        else dict(n=n, beside=[0, 2, 3], floor=0.25)
        for rows, n in zip(names, SIZES[name], strict=True)
    }


def write_log(folder, setting, seed, lines, **first):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(setting=setting, seed=seed, processor_seconds=9.0) | first, *lines]
    (folder / f"{setting}-seed{seed}.json").write_text(json.dumps({"rows": rows}))


def made_up(folder, name, seeds=2, share=0.6, **first):
    """Whole seeds of an experiment, drawn."""
    rng, evidence_of, module = np.random.default_rng(0), EVIDENCE[name], MODULES[name]
    for seed in module.SEEDS[:seeds]:
        for setting in module.SETTINGS:
            lines = [
                read_rows(read.readout, "dev", rng.random(DEV_ROWS) < share, 7)
                for read in reads_of(evidence_of)
                if read.setting == setting and name in CHOOSE
            ]
            lines += [
                read_rows(read.readout, "test", rng.random(facts(name)[read.rows]["n"]) < share, 7)
                for read in reads_of(evidence_of)
                if read.setting == setting
            ]
            write_log(folder / name, setting, seed, lines, **first)
    rows = {each: facts(each) for each in EVIDENCE}
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


# Two arms that answer four rows


A, B = Read("rows", "a", "soft"), Read("rows", "b", "soft")
FAR_A, FAR_B = Read("far", "a", "far"), Read("far", "b", "far")
ROWS = {"rows": rows_from(dict(n=4, beside=[0, 3])), "far": rows_from(dict(n=2), 1)}
NEAR, FAR = Part((A,), (B,)), Part((FAR_A,), (FAR_B,), -1.0)
SMALL = Evidence(
    "two arms",
    ("primary", "trend"),
    (Claim("primary", "a less b", (NEAR,)), Claim("trend", "near less far", (NEAR, FAR))),
    (Grid("grid", "arm", ("rows",), {"a": (A,), "b": (B,)}),),
    {},
    {"all rows": {"1": "a less b"}},
    "tick",
)


def small(folder, scores, seeds=range(2), **first):
    """Analysis of the answers {(setting, seed): (near, far)}."""
    for (setting, seed), (near, far) in scores.items():
        lines = [read_rows("soft", "test", near, None), read_rows("far", "test", far, None)]
        write_log(folder, setting, seed, lines, **first)
    return analyse("X", SMALL, read_logs(folder, ["a", "b"], seeds, ROWS), DRAWS)


def test_gains_are_those_computed_by_hand(tmp_path):
    scores = {
        ("a", 0): ([1, 1, 1, 0], [1, 0]),
        ("b", 0): ([1, 0, 0, 0], [0, 0]),
        ("a", 1): ([1, 1, 0, 1], [1, 1]),
        ("b", 1): ([0, 1, 0, 0], [1, 0]),
    }
    found = small(tmp_path, scores)
    primary, trend = found.results.values()
    assert primary.gain.mean == 0.5 and (primary.ours, primary.theirs) == (0.75, 0.25)
    # rows 0 and 3: 0 and 0, then 1 and 1
    assert primary.beside.mean == 0.5 and primary.beside.groups == 2
    assert trend.gain.mean == 0.0 and trend.beside is None  # 2 / 4 and 2 / 4, less 1 / 2 and 1 / 2
    assert primary.gain.t_low == primary.gain.t_high == 0.5  # both seeds gain 2 of 4
    assert found.cells[A].by_seed.tolist() == [0.75, 0.75]


def test_arms_that_are_the_same_are_equivalent(tmp_path):
    near, far = [1, 0, 1, 0], [1, 0]
    found = small(tmp_path, {(arm, seed): (near, far) for arm in "ab" for seed in (0, 1)})
    for result in found.results.values():
        assert result.gain[:7] == (0.0,) * 7
        assert verdicts_of(result) == "refuted, equivalent"
    assert found.verdict("primary") == "refuted"


def test_a_unit_that_failed_is_wrong_in_every_row(tmp_path):
    good = ([1, 1, 1, 1], [1, 1])
    scores = {(arm, seed): good for arm in "ab" for seed in (0, 1)}
    small(tmp_path, scores)
    write_log(tmp_path, "a", 1, [], failed="the loss is nan")
    found = small(tmp_path, {("a", 0): good})
    primary, _ = found.results.values()
    assert primary.gain.mean == -0.5 and found.cells[A].by_seed.tolist() == [1.0, 0.0]
    assert "Failed, and so wrong in every row: a-seed1." in " ".join(region_of(found).split())


@pytest.mark.parametrize(
    "ours, says",
    [(121.0, "open; ours took 21 % longer"), (105.0, "open"), (80.0, "open"), (None, "open")],
)
def test_seconds_of_both_are_said_and_more_of_ours_beside_the_verdict(ours, says, tmp_path):
    good = {(arm, 0): ([1, 1, 0, 0], [1, 0]) for arm in "ab"}
    small(tmp_path, good, processor_seconds=100.0)
    first = dict(failed="the loss is nan") if ours is None else {}
    write_log(tmp_path, "a", 0, [], processor_seconds=ours, **first)
    if ours is not None:
        small(tmp_path, {("a", 0): good["a", 0]}, processor_seconds=ours)
    found = analyse("X", SMALL, read_logs(tmp_path, ["a", "b"], range(1), ROWS), DRAWS)
    primary, trend = found.results.values()
    assert primary.seconds == (None if ours is None else (ours, 100.0)) and trend.seconds is None
    line = claims_table(found).splitlines()[2]
    seconds = "" if ours is None else f"{ours:.0f}, 100"
    assert [cell.strip() for cell in line.split("|")][-3:-1] == [seconds, says]
    (claim, _) = json.loads(evidence_report.as_json({"X": found}))["X"]["claims"]
    assert claim["seconds"] == (None if ours is None else [ours, 100.0])
    assert claim["longer"] == (None if ours is None else pytest.approx(ours / 100 - 1))
    beside = primary._replace(claim=primary.claim._replace(has_verdict=False))
    assert verdicts_of(beside) == says.removeprefix("open").removeprefix("; ")
    lost = primary._replace(gain=Gain(-0.1, *[-0.2, -0.05] * 3, 6, 900))
    more = {80.0: "theirs took 25 % longer"}.get(ours, says.removeprefix("open; "))
    assert verdicts_of(lost) == "; ".join(["refuted"] + [more] * (more != "open"))
    same_net = Part((A,), (A._replace(readout="far"),))
    assert seconds_of(found.logs, same_net) is None


@pytest.mark.parametrize("theirs, says", [(56.0, "forwards 7, 56"), (7.2, ""), (None, "")])
def test_forwards_of_both_are_said_where_they_differ(theirs, says, tmp_path):
    for arm, nfe in {"a": 7.0, "b": theirs}.items():
        lines = [read_rows(name, "test", [1] * n, nfe) for name, n in (("soft", 4), ("far", 2))]
        write_log(tmp_path, arm, 0, lines)
    found = analyse("X", SMALL, read_logs(tmp_path, ["a", "b"], range(1), ROWS), DRAWS)
    primary, trend = found.results.values()
    assert primary.forwards == (None if theirs is None else (7.0, theirs))
    assert trend.forwards is None  # of two parts
    assert verdicts_of(primary) == "; ".join(filter(None, ["open", says]))
    assert (says in claims_table(found)) and ("Forwards:" in about_of(found)) == bool(says)
    (claim, _) = json.loads(evidence_report.as_json({"X": found}))["X"]["claims"]
    assert claim["forwards"] == (None if theirs is None else [7.0, theirs])


def test_a_seed_that_is_not_whole_is_left_out_and_named(tmp_path):
    one, none = ([1, 1, 1, 1], [1, 1]), ([0, 0, 0, 0], [0, 0])
    found = small(tmp_path, {("a", 0): one, ("b", 0): one, ("a", 1): none}, range(3))
    assert found.logs.whole == [0] and found.logs.missing == {1: ["b"]}
    assert found.results["a less b"].gain.mean == 0.0
    assert region_of(found).startswith("**Interim, 1 of 3 seeds: 0.")
    # of one seed t tells nothing
    assert found.results["a less b"].by_t == "open" and "| a less b" not in region_of(found)
    empty = small(tmp_path / "none", {("a", 1): one}, range(3))
    assert region_of(empty) == "No seed is whole yet, of 3." and not empty.results
    assert "Left out: seed 1, which lacks b." in page_of({"X": empty})


def test_claims_of_several_parts_draw_their_rows_apart_and_their_seeds_together():
    rng = np.random.default_rng(0)
    same = np.repeat(rng.integers(-1, 2, size=(3, 1)), 8, axis=1)  # all of a gain is its seed's
    one, other = (bootstrap_gains(same, draws=50, rows=rows) for rows in (0, 1))
    assert np.array_equal(one, other)
    of_rows = np.repeat(rng.integers(-1, 2, size=(1, 8)), 3, axis=0)
    one, other = (bootstrap_gains(of_rows, draws=50, rows=rows) for rows in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("grouped", [False, True])
def test_many_gains_are_drawn_as_each_by_itself_row_by_row(grouped):
    rng, S, n = np.random.default_rng(1), 3, 10
    gains = rng.integers(-1, 2, size=(2, S, n)).astype(float)
    groups = np.arange(n) // 3 if grouped else np.arange(n)
    found = bootstrap_gains(gains, groups if grouped else None, draws=40, seed=5)
    of_seeds, of_groups = np.random.default_rng(5), np.random.default_rng([5, n, 0])
    for i in range(40):
        seeds = of_seeds.integers(S, size=S)
        some = of_groups.integers(groups.max() + 1, size=groups.max() + 1)
        rows = np.concatenate([np.flatnonzero(groups == group) for group in some])
        for k in range(2):
            assert found[k, i] == pytest.approx(gains[k][seeds][:, rows].mean())


@pytest.mark.parametrize("mean, verdict", [(0.16, "supported"), (0.14, "open")])
def test_a_claim_may_want_more(mean, verdict):
    gain = Gain(mean, *[0.1, 0.2] * 3, 3, 900)
    says = verdicts_of(Result(Claim("wanted", "w", (), margin=0.15), gain, None, None, None))
    assert says == f"{verdict}, margin 15"
    assert verdicts_of(Result(Claim("a", "a", ()), gain, None, None, None)) == "supported"


def test_readme_does_not_tell_of_rl_of_masked_diffusion(tmp_path):
    """Its claims are of RL, less before and less other training."""
    made_up(made_up(tmp_path, "X1"), "diffusion-rl", seeds=3)
    found = everything(tmp_path)
    alone = regions({name: each for name, each in found.items() if name != "diffusion-rl"})
    assert found["diffusion-rl"].logs.whole and regions(found) == alone
    assert "margin 15" in region_of(found["diffusion-rl"])


def test_readme_says_of_an_experiment_that_it_has_no_seed_until_it_has_one(tmp_path):
    made_up(tmp_path, "X1")
    before = regions(everything(tmp_path))
    assert "| RL, MNNS (X4) |  |  |  | no seed yet |" in before["does it help"].splitlines()
    assert "X4" not in before["first screen"]
    made_up(tmp_path, "X4")
    after = regions(everything(tmp_path))
    rows = [line for line in after["does it help"].splitlines() if line.startswith("| RL, MNNS")]
    assert len(rows) == 3 and not any("no seed" in row for row in rows)
    assert "X4, 2 of 6 seeds so far" in " ".join(after["first screen"].split())


def test_arms_of_rl_began_with_the_same_weights():
    """Of the logs of this checkout. Where this fails a start was trained anew, on another processor."""
    began: dict[tuple, set] = {}
    for file in (ROOT / evidence.LOGS / "X4").glob("*.json"):
        first = json.loads(file.read_text())["rows"][0]
        start = evidence_rl.SETTINGS[first["setting"]]["start"]
        began.setdefault((start, first["seed"]), set()).add(first.get("start_hash"))
    assert all(len(hashes - {None}) <= 1 for hashes in began.values()), began  # None: it failed


def test_several_claims_are_as_sure_as_the_least_sure(tmp_path):
    def result(mean, low, high):
        gain = Gain(mean, low, high, low, high, low, high, 8, 600)
        return Result(Claim("dose", f"{mean}", ()), gain, None, None, None)

    supported, open_, refuted = (
        result(0.1, 0.05, 0.2),
        result(0.1, -0.1, 0.2),
        result(-0.1, -0.2, 0),
    )
    for some, verdict in (
        ((supported, supported), "supported"),
        ((supported, open_), "open"),
        ((open_, refuted, supported), "refuted"),
    ):
        of = Analysis("X", SMALL, None, {str(i): each for i, each in enumerate(some)}, {}, {})
        assert of.verdict("dose") == verdict
    by_t = Result(supported.claim, supported.gain._replace(t_low=-1.0), None, None, None)
    assert verdicts_of(by_t) == "open (bootstrap: supported)"
    few = supported._replace(least_seeds=supported.gain.seeds + 1)
    assert few.verdict == few.by_t == "open"


def over(ours: str, theirs: str, mean=-0.1, high=-0.05, t_high=-0.05, **options) -> Result:
    """A net that is read in one way over one that is read in another."""
    part = Part((Read("rows", "a", ours),), (Read("rows", "b", theirs),))
    gain = Gain(mean, mean - 0.1, high, mean, high, mean - 0.2, t_high, 8, 600)
    return Result(Claim("beside", "a less b", (part,), **options), gain, None, None, None)


def test_where_soft_loses():
    """Soft thinking alone loses, and to a control: to single tokens or to other soft ways. Rows of
    which t is not sure are told apart."""
    named = over("soft", "discrete", brief="Graphs: ours over theirs")
    assert losses([named]).endswith(" Graphs: to theirs (-10.0).")
    worse = over("soft", "votes", -0.2, brief="Graphs: ours over votes")
    assert losses([named, worse]).endswith(" Graphs: to votes (-20.0), to theirs (-10.0).")
    unsure = over("soft", "hard", t_high=0.01, brief="Latin: ours over bare masks")
    says = "Graphs: to theirs (-10.0). By bootstrap alone: Latin: to bare masks (-10.0)."
    assert losses([named, unsure]).endswith(says)
    more = [over("soft, 12", "drawn hard"), over("swi", "1 draw"), over("soft", "3 draws")]
    assert losses(more).endswith("More in RESULTS.md: 2 to single tokens, 1 to other soft ways.")
    others = [
        over("soft", "discrete", high=0.0),
        over("discrete", "soft"),
        over("drawn hard", "discrete"),
        over("soft", "discrete", has_control=False),
    ]
    two = others[0]._replace(claim=named.claim._replace(parts=named.claim.parts * 2))
    assert losses([*others, two]).endswith("in none of these rows for certain.")


def test_losses_of_the_logs_are_of_soft_thinking():
    """Of this checkout: RL on single tokens that SFT is ahead of is none of them."""
    found = evidence_report.analyses_of(ROOT / evidence.LOGS, list(EVIDENCE))
    lost = [
        (name, result.claim.says)
        for name, each in found.items()
        for result in each.results.values()
        if is_loss(result)
    ]
    assert ("X1", "4 digits: less guided-soft, soft") in lost
    assert not [says for name, says in lost if name == "X4" and "best of RL" in says]
    assert not [
        says for name, says in lost if name == "methods" and "rl-hard, at its best, less" in says
    ]


def test_verdicts_of_an_experiment_without_a_row_are_counted(tmp_path):
    made_up(made_up(tmp_path, "X1", seeds=3), "methods", seeds=3)
    says = " ".join(regions(everything(tmp_path))["first screen"].split())
    counted = re.search(
        r"\(methods, 3 seeds\): of 11 verdicts (\d+) supported, (\d+) refuted, (\d+) open", says
    )
    assert counted and sum(map(int, counted.groups())) == 11


def test_the_first_screen_gives_each_gain_its_own_verdict_the_least_first(tmp_path):
    names = "Graphs: ours over all", "Graphs: ours over some", "Graphs: ours over mixtures"
    gains = Gain(0.11, *[0.08, 0.13] * 3, 6, 900), Gain(0.03, *[-0.01, 0.07] * 3, 6, 900)
    gains += (Gain(-0.04, *[-0.06, -0.02] * 3, 6, 900),)
    claims = [Claim("primary" if i == 0 else "beside", n, (), brief=n) for i, n in enumerate(names)]
    results = {c.says: Result(c, gain, None, 0.8, 0.7) for c, gain in zip(claims, gains)}
    small(tmp_path, {(arm, seed): ([1] * 4, [1] * 2) for arm in "ab" for seed in (0, 1)})
    logs = read_logs(tmp_path, ["a", "b"], range(2), ROWS)
    found = Analysis("X2", SMALL._replace(brief="a net"), logs, results, {}, {})
    gained = "+3.0 over some: *open*; +11.0 over all: *supported*"
    assert bullet("X2", found) == f"Graphs (X2, 2 seeds; a net): {gained}."
    says = " ".join(first_screen({"X2": found}).split())
    assert says.endswith("in none of these rows for certain.")  # of no net that is read softly
    same = {c.says: results[c.says]._replace(gain=gains[1]) for c in claims[:2]}
    both = "+3.0 over all; +3.0 over some: both *open*"
    assert bullet("X2", found._replace(results=same)) == f"Graphs (X2, 2 seeds; a net): {both}."


@pytest.mark.parametrize(
    "numbers, words", [([0], "0"), ([0, 1, 2, 4], "0 to 2, 4"), ([1, 3, 4], "1, 3 to 4"), ([], "")]
)
def test_ranges(numbers, words):
    assert ranges(numbers) == words


def test_a_question_is_answered_either_way():
    def verdict(low, high, seeds=8, t_low=None):
        gain = Gain(-0.2, low, high, low, high, low if t_low is None else t_low, high, seeds, 600)
        return verdicts_of(Result(Claim("q", "q", (), is_question=True), gain, None, None, None))

    assert verdict(-0.3, -0.1) == verdict(0.1, 0.3) == "there is one"
    assert verdict(-0.3, 0.1) == verdict(-0.3, -0.1, seeds=1) == "open"
    assert verdict(-0.01, 0.0) == "open, equivalent"
    assert verdict(0.1, 0.3, t_low=-0.1) == "open (bootstrap: there is one)"


def test_the_best_is_that_of_the_development_rows_over_all_seeds(tmp_path):
    """Not that of the test rows, nor that of the first seed; of equals the first."""
    test = {"one": [0, 0, 0, 1], "two": [1, 1, 1, 1], "three": [1, 1, 1, 1]}
    dev = {
        "one": ([0, 1, 1], [1, 1, 0]),
        "two": ([1, 1, 1], [0, 0, 1]),
        "three": ([1] * 3, [0] * 3),
    }
    for seed in (0, 1):
        for arm in "ab":
            lines = [read_rows(way, "test", test[way], None) for way in test]
            lines += [read_rows(way, "dev", dev[way][seed], None) for way in test]
            write_log(tmp_path, arm, seed, lines)
    best = Best("the best", tuple(Read("rows", "a", way) for way in test))
    part = Part((best,), (Read("rows", "b", "two"),))
    claims = (Claim("primary", "best less b", (part,)),)
    evidence_of = SMALL._replace(claims=claims, grids=(), verdicts=("primary",))
    rows = {"rows": rows_from(dict(n=4, dev=3))}
    logs = read_logs(tmp_path, ["a", "b"], range(2), rows)
    found = analyse("X", evidence_of, logs, DRAWS)
    assert found.choices == {best: best.of[0]}
    assert found.results["best less b"].gain.mean == -0.75
    assert "mean over seeds: the best: a, one." in " ".join(region_of(found).split())
    assert json.loads(evidence_report.as_json({"X": found}))["X"]["choices"] == {
        "the best": dict(rows="rows", setting="a", readout="one")
    }


def test_claims_of_rl_are_means_over_starts(tmp_path):
    """From self-fed draws-3 gains a fourth, from teacher-forced it loses one; sft knows half."""
    share = {"draws-1": 6, "sft": 6, "start": 3}  # of 12 rows
    for seed in (0, 1):
        for setting in evidence_rl.SETTINGS:
            how = setting.removeprefix("self-fed-").removeprefix("teacher-forced-")
            right = share.get(how) or (9 if setting.startswith("self-fed") else 3)
            lines = [
                read_rows(way, split, np.arange(n) < right * n / 12, 6)
                for way in ("1 draw", "3 draws", "votes", "soft", "discrete")
                for split, n in (("test", 12), ("dev", DEV_ROWS))
            ]
            write_log(tmp_path, setting, seed, lines)
    rows = {"all": rows_from(facts("X4")["all"])}
    logs = read_logs(tmp_path, evidence_rl.SETTINGS, range(2), rows)
    found = analyse("X4", EVIDENCE["X4"], logs, DRAWS)
    of = {result.claim.about: result for result in [*found.results.values()][:4]}
    means = {about: result.gain.mean for about, result in of.items()}
    assert means == {
        "primary": 0.0,
        "interaction": 0.5,
        "rl less sft": 0.125,
        "draws less chains": 0.0,
    }
    chosen = {best.name: (read.setting, read.readout) for best, read in found.choices.items()}
    assert chosen["self-fed, RL"] == ("self-fed-draws-3", "1 draw")
    assert chosen["teacher-forced, RL"] == ("teacher-forced-draws-1", "1 draw")
    assert of["primary"].seconds == (9.0, 9.0)
    assert all(r.seconds is None for r in found.results.values() if r.claim.about == "after")
    assert "Best on development rows" in page_of({"X4": found})


def test_the_table_of_methods_has_lines_of_others_what_was_chosen_and_costs(tmp_path):
    """X1's logs are lines of it, and a seed is whole where they are there too."""
    made_up(made_up(tmp_path, "X1", steps=1000), "methods", steps=20)
    found = everything(tmp_path)["methods"]
    assert found.logs.whole == [0, 1] and not found.logs.missing
    of_x1 = everything(tmp_path)["X1"].cells[Read("6 digits", "discrete-6", "discrete")]
    assert found.cells[Read("6 digits", "discrete-6", "discrete")].mean == of_x1.mean
    best = next(each for each in found.choices if each.name == "again-trace-soft, swi, 6 digits")
    right = {read: found.logs.scores(read, "dev").sum() for read in best.of}
    assert len(right) == 3 and right[found.choices[best]] == max(right.values())
    lines = {line.split(" | ")[0]: line for line in region_of(found).splitlines()}
    swi = lines["| again-trace-soft, swi"]
    assert f"| {found.cell(best).mean:.3f}".replace("0.", ".") in swi
    assert swi.endswith("| 7, 7 | 20, 20 | 9, 9 |")
    assert lines["| discrete, discrete"].endswith("| 7, 7 | 1000, 1000 | 9, 9 |")
    (tmp_path / "X1" / "discrete-6-seed1.json").unlink()
    found = everything(tmp_path)["methods"]
    assert found.logs.whole == [0] and found.logs.missing == {1: ["discrete-6"]}
    made_up(tmp_path / "rest", "X1")
    (tmp_path / "rest" / "X1").rename(tmp_path / "rest" / "methods")
    with pytest.raises(ValueError, match="the experiment has seeds 0 to 2"):
        everything(tmp_path / "rest")


def test_a_log_of_others_that_does_not_fit_is_named(tmp_path):
    made_up(made_up(tmp_path, "X1"), "methods")
    lines = [read_rows("discrete", "test", [1] * 11, 7)]
    write_log(tmp_path / "X1", "discrete-6", 0, lines)
    with pytest.raises(ValueError, match=r"X1/discrete-6-seed0.json: readout='discrete'"):
        evidence_report.analyses_of(tmp_path, ["methods"])


# Claims of the rules


def test_each_claim_reads_what_units_answer():
    rows = read_rows_of(ROOT / evidence.LOGS)
    for name, each in EVIDENCE.items():
        says = [claim.says for claim in each.claims]
        assert len({*says}) == len(says)
        for read in reads_of(each):
            borrowed = {s for settings in each.borrows.values() for s in settings}
            assert read.setting in {*MODULES[name].SETTINGS} | borrowed and read.rows in rows[name]
        assert {about for about in each.verdicts} <= {claim.about for claim in each.claims}
        assert {s for line in each.gaps.values() for s in line.values()} <= {*says}
        for claim in each.claims:  # README's lines are no longer than its width
            lost, unsure, won = (Gain(*[mean] * 7, 8, 600) for mean in (-0.1, 0.1, 0.1))
            for gain in (lost, unsure._replace(t_low=-0.1), won):
                line = line_of(Result(claim, gain, None, 0.5, 0.5))
                assert len(" | ".join(line)) + 4 <= 120, claim.brief
            assert not claim.brief or re.fullmatch(r"[^:]+: \S.* over \S.*", claim.brief)


@pytest.mark.rest
def test_what_is_known_of_the_rows_is_so(tmp_path):
    file = evidence_report.write_rows(tmp_path / "rows.json")
    there = json.loads((ROOT / evidence.LOGS / "rows.json").read_text())
    assert json.loads(file.read_text()) == there
    of = {name: facts["floor"] for name, facts in there["X1"].items()}
    assert of == {"6 digits": 0.305, "5 digits": 0.255, "4 digits": 0.225}
    assert there["X3"]["all"]["hash"] == "9be93be733fe4555"


# What is written


def everything(folder):
    return evidence_report.analyses_of(folder, [*EVIDENCE])


def test_the_pages_say_what_the_logs_come_to():
    """Of README.md and RESULTS.md of this checkout. Where this fails: `make report`."""
    found = everything(ROOT / evidence.LOGS)
    wrong = evidence_report.update_pages(ROOT, found, write=False)
    assert not wrong, f"{wrong} do not say what the logs come to: run make report"


def copy_of_pages(folder):
    """README.md and RESULTS.md as they are, with logs of two seeds of X1 and one of X3."""
    made_up(made_up(folder / "logs", "X1"), "X3", seeds=1)
    for page in evidence_report.PAGES:
        (folder / page).write_text((ROOT / page).read_text())
    return folder


@pytest.fixture
def checkout(tmp_path):
    return copy_of_pages(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The same, after a report."""
    folder = copy_of_pages(tmp_path_factory.mktemp("reported"))
    assert report(folder) == 0
    return folder


def report(folder, *options):
    paths = ["--logs", folder / "logs", "--pages", folder, "--output", folder / "out"]
    with pytest.raises(SystemExit) as end:
        evidence_report.main([*map(str, paths), *options])
    return end.value.code


def test_the_report_writes_pages_and_plots(reported):
    pages = {page: (reported / page).read_text() for page in evidence_report.PAGES}
    assert "Interim, 2 of 8 seeds: 0 to 1" in pages["RESULTS.md"]
    assert without_regions(pages["RESULTS.md"]) == without_regions(
        (ROOT / "RESULTS.md").read_text()
    )
    assert len(pages["README.md"].splitlines()) <= 120
    for page, limit in (("README.md", 120), ("RESULTS.md", 200)):
        assert max(map(len, pages[page].splitlines())) <= limit
    screen = " ".join(pages["README.md"].split("```bash")[0].split())
    assert "**Where soft loses:**" in screen and "X1, 2 of 8 seeds so far" in screen
    assert "X3, 1 of 16 seeds so far, intervals over rows alone" in screen  # before any command
    pngs = [file.read_bytes() for file in (reported / "out").glob("*.png")]
    assert len(pngs) == 6 and all(png.startswith(b"\x89PNG") for png in pngs)
    # and a second time it finds nothing to do
    assert evidence_report.update_pages(reported, everything(reported / "logs"), write=False) == []


def test_the_order_of_files_changes_nothing(tmp_path, checkout, monkeypatch):
    scores = {(arm, seed): ([1, seed, 1, 0], [1, 0]) for arm in "ab" for seed in (0, 1)}
    page = page_of({"X": small(tmp_path / "small", scores)})
    numbers = evidence_report.as_json(everything(checkout / "logs"))
    glob = Path.glob  # in the order of the disk
    monkeypatch.setattr(Path, "glob", lambda *a: iter(sorted(glob(*a), reverse=True)))
    assert evidence_report.as_json(everything(checkout / "logs")) == numbers
    assert page_of({"X": small(tmp_path / "small", scores)}) == page


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_and_says_what_its_curves_show(reported):
    found = everything(reported / "logs")
    text = (reported / "out" / "page.html").read_text()
    tags = Tags(text).found
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len({*ids}) == len(ids)
    assert not re.search(r"""(src|href)=["']?(https?:|//)|<script|@import|url\(["']?http""", text)
    assert {attrs["href"] for tag, attrs in tags if tag == "a"} <= {f"#{name}" for name in ids}
    pictures = [attrs["aria-label"] for _, attrs in tags if attrs.get("role") == "img"]
    assert len(pictures) == sum(tag == "svg" for tag, _ in tags) == 8
    own = found["X1"].cells[Read("6 digits", "trace-soft-6", "after own")].mean
    assert any(f"{own:.3f}".removeprefix("0") in alt for alt in pictures)
    # colours come from the scheme alone
    assert not re.findall("#[0-9a-f]{6}", "".join(re.findall("<svg.*?</svg>", text, re.DOTALL)))
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    for line in claims_table(found["X1"]).splitlines()[2:]:
        assert f">{line.split('|')[2].strip()}<" in text


def test_numbers_as_json(checkout, capsys):
    before = (checkout / "RESULTS.md").read_text()
    assert report(checkout, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["X1"]["whole"] == [0, 1] and found["X3"]["seeds"] == "interim, 1 of 16 seeds: 100"
    one = found["X3"]["claims"][0]
    assert one["about"] == "primary" and one["gain"]["t_low"] is None
    assert one["ours"] - one["theirs"] == pytest.approx(one["gain"]["mean"])
    assert (checkout / "RESULTS.md").read_text() == before and not (checkout / "out").exists()


def test_readme_without_regions_is_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# softar\n")
    assert update_readme(readme, {}, write=True) and readme.read_text() == "# softar\n"


def test_a_region_is_replaced_and_nothing_else():
    page = f"a\n{BEGIN.format('X1')}\nold\n{END.format('X1')}\nb\n"
    new = rewritten(page, "X1", "new", "RESULTS.md")
    assert new == page.replace("old", "new") and without_regions(new) == "a\n\nb\n"
    for wrong in ("a\n", page + page, page.replace(END.format("X1"), "")):
        with pytest.raises(ValueError, match=r"RESULTS.md has no region 'X1': put the lines"):
            rewritten(wrong, "X1", "new", "RESULTS.md")


def test_legends_are_as_wide_as_their_figure(tmp_path):
    """Those of two columns were cut off at both sides."""
    made_up(made_up(tmp_path, "X4"), "diffusion-rl", seeds=3)
    for name in ("X4", "diffusion-rl"):
        (gains,) = (f for f in figures_of(everything(tmp_path)[name]) if f.name == f"{name}-gains")
        with plot(tmp_path / "gains.png", figsize=SIZE) as (drawing, axes):
            gains.panels[0].draw(axes[0, 0])
            legend(drawing, axes[0, 0])
            (box,) = drawing.legends
            drawing.draw_without_rendering()
            extent = box.get_window_extent()
            assert 0 <= extent.x0 and extent.x1 <= drawing.bbox.width
            assert [text.get_text() for text in box.get_texts()].count("the margin") == 1


# Bad input


def damaged(folder, what):
    file = folder / "X1" / "trace-soft-6-seed0.json"
    log = json.loads(file.read_text())
    if what == "rows":
        log["rows"][1:] = [read_rows("soft", "test", [1] * 11, 7)]
    elif what == "hash":
        log["rows"][0]["test_rows_hash"] = "0123"
        rows = json.loads((folder / "rows.json").read_text())
        rows["X1"]["6 digits"]["hash"] = "4567"
        (folder / "rows.json").write_text(json.dumps(rows))
    elif what == "seed":
        log["rows"][0]["seed"] = 999
    elif what == "experiment":
        (folder / "X9").mkdir()
    elif what == "facts":
        (folder / "rows.json").unlink()
    file.write_text("{" if what == "half" else json.dumps(log))


@pytest.mark.parametrize(
    "what, message",
    [
        ("rows", r"trace-soft-6-seed0.json: readout='soft', split='test', rows=12: the log has 0"),
        ("hash", r"trace-soft-6-seed0.json: answers the rows 0123, the experiment has 4567"),
        ("seed", r"trace-soft-6-seed0.json says that it is 'trace-soft-6' with seed 999"),
        ("half", r"trace-soft-6-seed0.json is no log of a unit"),
        ("experiment", r"X9 is of no experiment that there is, \['X1'"),
        ("facts", r"there is no rows.json in it"),
    ],
)
def test_logs_that_do_not_fit_are_named(what, message, checkout, capsys):
    damaged(checkout / "logs", what)
    before = (checkout / "RESULTS.md").read_text()
    assert report(checkout) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert (checkout / "RESULTS.md").read_text() == before


def test_wrong_arguments_are_named(tmp_path, checkout, capsys):
    assert report(checkout, "--experiment", "X9") == 2
    assert "experiment='X9' is unknown" in capsys.readouterr().err
    assert report(tmp_path / "nowhere") == 2
    assert "there are no logs in it; make evidence writes them" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_the_same_plot_is_the_same_file(kind, tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    files = []
    for year in (2000, 2001):
        monkeypatch.setattr("time.time", lambda year=year: 1e9 + year)
        file = tmp_path / f"{year}.{kind}"
        with plot(file) as (_, axes):
            axes[0, 0].plot([1, 2], [3, 4], "o", label="line")
        files.append(file.read_bytes())
    assert files[0] == files[1]
    assert b"<dc:date>" not in files[0] and b"CreationDate" not in files[0]
