# /// script
# dependencies = ["softar"]
# ///
"""
The evidence: from its logs to tables, verdicts and a page, and into README.md and RESULTS.md.

# All of it, in a checkout: prints the tables, rewrites the pages, draws to runs/evidence
python recipes/evidence_report.py

# Other logs, which leaves the pages alone; and the numbers as JSON
python recipes/evidence_report.py --logs runs/evidence-gpu --output runs/gpu-report
python recipes/evidence_report.py --json

# After rows were changed, or an experiment added: what the analysis knows of the test rows
python recipes/evidence_report.py --rows

Only whole seeds count, those of which every arm is there; the others are named.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from softar.checks import check_choice, one_line_errors
from softar.recipes.evidence import EXPERIMENTS, LOGS, ROOT
from softar.recipes.evidence_claims import EVIDENCE
from softar.recipes.evidence_gains import Analysis, analyse, seeds_of
from softar.recipes.evidence_logs import ROWS_FILE, read_logs, read_rows_of
from softar.recipes.evidence_page import write_report
from softar.recipes.evidence_readme import update_readme
from softar.recipes.evidence_tables import region_of, update
from softar.results import write_whole

PROGRAM = Path(sys.argv[0]).name
PAGES = ("README.md", "RESULTS.md")


def analyses_of(folder: Path, names: list[str]) -> dict[str, Analysis]:
    """The experiments by name, those without logs too.

    Raises:
        ValueError: for a folder without logs, or with some of no experiment.
    """
    if not any(folder.glob("*/*.json")):
        raise ValueError(
            f"logs={str(folder)!r}: there are no logs in it; make evidence writes them"
        )
    for each in sorted(path for path in folder.iterdir() if path.is_dir()):
        if each.name not in EXPERIMENTS:
            raise ValueError(
                f"{each} is of no experiment that there is, {[*EXPERIMENTS]}: take it away"
            )
    rows, found = read_rows_of(folder), {}
    for name in names:
        if name not in rows:
            raise ValueError(f"{folder / ROWS_FILE} lacks {name}: run with --rows")
        module = importlib.import_module(EXPERIMENTS[name].module)
        borrowed = {
            setting: folder / other
            for other, settings in EVIDENCE[name].borrows.items()
            for setting in settings
        }
        logs = read_logs(folder / name, module.SETTINGS, module.SEEDS, rows[name], borrowed)
        found[name] = analyse(name, EVIDENCE[name], logs)
    return found


def say(name: str, analysis: Analysis) -> None:
    print(f"## {name}. {analysis.evidence.title}\n\n{region_of(analysis)}\n")
    for seed, settings in analysis.logs.missing.items():
        print(f"Left out: seed {seed}, which lacks {', '.join(settings)}.")
    if analysis.logs.missing:
        print()


def as_json(analyses: dict[str, Analysis]) -> str:
    """Every gain and accuracy of the experiments."""
    found = {}
    for name, each in analyses.items():
        logs = each.logs
        found[name] = dict(
            seeds=seeds_of(logs),
            whole=logs.whole,
            missing=logs.missing,
            failed=logs.failed,
            verdicts={about: each.verdict(about) for about in each.evidence.verdicts}
            if logs.whole
            else {},
            claims=[
                dict(
                    about=result.claim.about,
                    says=says,
                    gain=numbers(result.gain),
                    beside=result.beside and numbers(result.beside),
                    ours=result.ours,
                    theirs=result.theirs,
                    seconds=result.seconds,
                    longer=result.longer,
                    forwards=result.forwards,
                    verdict=result.verdict,
                    verdict_by_t=result.by_t,
                    equivalent=result.is_equivalent,
                )
                for says, result in each.results.items()
            ],
            choices={best.name: read._asdict() for best, read in each.choices.items()},
            accuracies=[
                read._asdict() | dict(mean=cell.mean, by_seed=cell.by_seed.tolist())
                for read, cell in each.cells.items()
            ],
        )
    return json.dumps(found, indent=1)


def numbers(gain) -> dict:
    """Of a gain, null in place of what one seed does not tell."""
    return {
        key: None if value in (float("inf"), float("-inf")) else value
        for key, value in gain._asdict().items()
    }


def write_rows(file: Path) -> Path:
    """What the analysis knows of the test rows, of every experiment."""
    found = {
        name: importlib.import_module(EXPERIMENTS[name].module).facts()
        for name in EVIDENCE
        if name in EXPERIMENTS
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in found.items()]
    return write_whole(file, "{" + ",\n".join(lines) + "}\n")


def run(args) -> int:
    with one_line_errors(PROGRAM):
        names = [name for name in EVIDENCE if name in EXPERIMENTS]
        if args.experiment is not None:
            check_choice("experiment", args.experiment, names)
            names = [args.experiment]
        if args.rows:
            print(f"wrote {write_rows(Path(args.logs) / ROWS_FILE)}")
            return 0
        analyses = analyses_of(Path(args.logs), names)
        if args.json:
            print(as_json(analyses))
            return 0
        for name, analysis in analyses.items():
            say(name, analysis)
        for name in sorted(EXPERIMENTS.keys() - EVIDENCE.keys()):
            print(f"{name}: no claims yet, in recipes/evidence_claims.py")
        if args.experiment is None:
            if args.pages is not None:
                folder = Path(args.pages)
                update_pages(folder, analyses)
            print(f"page: {write_report(Path(args.output), analyses)}")
    return 0


def update_pages(folder: Path, analyses: dict[str, Analysis], *, write: bool = True) -> list[str]:
    """Put the tables into README.md and RESULTS.md -> those that had others."""
    regions = {name: region_of(each) for name, each in analyses.items()}
    readme, results = (folder / page for page in PAGES)
    same = {
        readme: update_readme(readme, analyses, write=write),
        results: update(results, regions, write),
    }
    return [file.name for file, is_same in same.items() if not is_same]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", help="print one alone, and write nothing")
    parser.add_argument("--logs", default=str(ROOT / LOGS), help="folder of the logs")
    parser.add_argument("--output", default="runs/evidence", help="folder of page and plots")
    parser.add_argument("--pages", help="folder of README.md and RESULTS.md to rewrite")
    parser.add_argument("--json", action="store_true", help="print every number, write nothing")
    parser.add_argument("--rows", action="store_true", help=f"write {ROWS_FILE} of the logs anew")
    args = parser.parse_args(argv)
    if args.pages is None and args.logs == str(ROOT / LOGS):
        args.pages = str(ROOT)
    sys.exit(run(args))


if __name__ == "__main__":
    main()
