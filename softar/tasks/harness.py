"""A task of lm-evaluation-harness that is generated, by its name there: "lm_eval:gsm8k", or with
options "lm_eval:gsm8k:num_fewshot=5,filter=flexible-extract".

Its prompts, filters and metric are the harness's own, so that a sweep scores as `softar-eval` does.
"""

import functools
import importlib.util
import logging
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from datasets import Dataset

from ..checks import did_you_mean
from ..specs import parse_options
from .task import Task

HARNESS = "lm_eval:"
FEWSHOT_SEED = 1234  # lm-eval's default
INVALID = "[invalid]"  # what its filters say of a text in which they find nothing
MAX_TOKENS = 256  # lm-eval's own, for a task that says nothing


@dataclass(frozen=True)
class Options:
    """What may stand behind the colon."""

    num_fewshot: int | None = None  # None: as the task says
    metric: str | None = None  # None: the task's first
    filter: str | None = None  # None: the task's first
    include: str | None = None  # a folder with task files of your own, looked in instead
    unsafe_code: bool = False  # let a task that runs the model's code run it


def is_known(name: str) -> bool:
    """Does the harness, where it is installed, bring a file of that name? Its whole list of tasks
    takes a quarter of a minute to read."""
    found = importlib.util.find_spec("lm_eval")
    file = f"{name.partition(':')[0]}.yaml"
    if found is None or not re.fullmatch(r"[\w.-]+", file):
        return False
    return any(
        next((Path(place) / "tasks").rglob(file), None)
        for place in found.submodule_search_locations
    )


def harness_task(spec: str) -> Task:
    """spec: NAME[:key=value,...], the options those of Options.

    Raises:
        ValueError: for a name or an option that is unknown, and a task of multiple choice.
        ImportError: where lm-eval is not installed.
    """
    name, _, text = spec.partition(":")
    options = _options(spec, text)
    task = _load(name, options)
    gen = dict(task.config.generation_kwargs or {})
    until = gen.get("until") or ()
    stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    names = [f.name for f in task._filters]
    filter_name = _one_of(spec, "filter", options.filter, names)
    metric = _one_of(spec, "metric", options.metric, [*task._metric_fn_list], strict=False)
    compared = _compared(task, metric)
    # no copies: a document may hold what a Dataset cannot
    documents = {i: doc for i, doc in task.doc_iterator(rank=0, world_size=1)}
    rows = [
        {
            "prompt": task.fewshot_context(doc, task.config.num_fewshot or 0),
            "answer": str(task.doc_to_target(doc)),
            "document": i,
        }
        for i, doc in documents.items()
    ]

    def cut(text: str) -> str:
        """What stands before a stop string."""
        ends = [at for s in stop if (at := text.find(s)) >= 0]
        return text[: min(ends)] if ends else text

    def filtered(text: str, doc: dict, prompt: str = ""):
        """What the filter makes of it."""
        from lm_eval.api.instance import Instance

        instance = Instance("generate_until", doc, (prompt, gen), 0, resps=[cut(text)])
        next(each for each in task._filters if each.name == filter_name).apply([instance])
        return instance.filtered_resps[filter_name]

    def extract(text: str) -> str:
        """What the filter reads, "" for nothing; the text where the filter asks for the row, as those
        of multiple choice do. Without what the metric ignores."""
        try:
            return compared(_text(filtered(text, {})))
        except Exception:
            return compared(cut(text).strip())

    def score(text: str, row: dict) -> float:
        doc = documents[row["document"]]
        found = task.process_results(doc, [filtered(text, doc, row["prompt"])])
        if metric not in found:
            raise ValueError(f"task={spec!r} has no metric={metric!r}: it has {[*found]}")
        return float(found[metric])

    return Task(
        name=HARNESS + spec,
        train=None,
        test=Dataset.from_list(rows),
        score=score,
        think_steps=None,
        extract=extract,
        max_new_tokens=int(gen.get("max_gen_toks") or MAX_TOKENS),
        stop=stop,
    )


def _compared(task, metric: str) -> Callable[[str], str]:
    """Text -> what exact_match compares of it (lm_eval.api.metrics.exact_match_hf_evaluate), so that
    answers that are the same to the metric are one. What others compare is not known: all of it."""
    is_known = metric == "exact_match" and task.config.process_results is None
    told = task._metric_fn_kwargs[metric] if is_known else {}
    ignored = string.punctuation if told.get("ignore_punctuation") else ""
    ignored += string.digits if told.get("ignore_numbers") else ""

    def compared(text: str) -> str:
        for regex in told.get("regexes_to_ignore") or ():
            text = re.sub(regex, "", text)
        text = text.lower() if told.get("ignore_case") else text
        return text.translate(str.maketrans("", "", ignored)).strip()

    return compared


def _text(found) -> str:
    """Of what a filter gives."""
    found = found[0] if isinstance(found, (list, tuple)) and len(found) == 1 else found
    return "" if found == INVALID else str(found).strip()


def _options(spec: str, text: str) -> Options:
    options, known = parse_options(text), {f.name: f.type for f in fields(Options)}
    for name, value in options.items():
        if name not in known:
            names = [*known]
            raise ValueError(
                f"task={spec!r} takes no {name!r}{did_you_mean(name, names)}: it takes {names}"
            )
        if not isinstance(value, known[name]):
            raise ValueError(f"task={spec!r}: {name}={value!r} must be {known[name]}")
    return Options(**options)


def _load(name: str, options: Options):
    """lm-eval's Task, set up as its own command does."""
    try:
        manager = _manager(options.include)
    except ImportError as error:
        raise ImportError(
            f"task='{HARNESS}{name}' needs lm-eval: pip install softar[eval]"
        ) from error
    if name not in manager.all_tasks:
        close = did_you_mean(name, manager.all_tasks)
        raise ValueError(
            f"task='{HARNESS}{name}' is unknown to lm-eval{close}: `softar-eval ls tasks` lists all, "
            "include=FOLDER adds files of your own"
        )
    loaded = manager.load([name])["tasks"]
    if [*loaded] != [name]:
        raise ValueError(f"task='{HARNESS}{name}' is a group: name one of {sorted(loaded)}")
    task = loaded[name]
    if task.OUTPUT_TYPE != "generate_until":
        raise ValueError(
            f"task='{HARNESS}{name}' is scored by likelihoods ({task.OUTPUT_TYPE}), and decoders "
            "generate: `softar-eval` is for it"
        )
    if task.config.unsafe_code and not options.unsafe_code:
        raise ValueError(
            f"task='{HARNESS}{name}' runs code that the model writes: where that is safe, say "
            f"{HARNESS}{name}:unsafe_code=true"
        )
    if options.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task


def _one_of(
    spec: str, option: str, value: str | None, names: list[str], strict: bool = True
) -> str:
    if value is None:
        return names[0]
    if strict and value not in names:
        raise ValueError(
            f"task={spec!r}: {option}={value!r} is unknown{did_you_mean(value, names)}: it has {names}"
        )
    return value


@functools.cache
def _manager(include: str | None):
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include, include_defaults=include is None)
