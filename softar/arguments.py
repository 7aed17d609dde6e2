"""The options of a training recipe, and its --help: softar's own first, those of TRL and of
transformers on demand."""

import argparse
import json
import shutil
import textwrap
from typing import get_args, get_origin, get_type_hints

from trl import DatasetMixtureConfig, ModelConfig, TrlParser

from .checks import did_you_mean

ALL = "--help_all"
RUN = "The run"
# Where an option comes from, in the order of the help -> the title of its group
TITLES = {
    "run": RUN,
    "softar": "How it trains and decodes",
    "trl": "Of TRL",
    "transformers": "Of transformers",
}
# What nearly every run is told, whoever brings it
COMMON = (
    "model_name_or_path",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "output_dir",
    "resume_from_checkpoint",
    "report_to",
    "seed",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "max_length",
    "use_peft",
)
HELP = {
    "model_name_or_path": "A name of `softar models`, a folder, a .gguf file or a hub id.",
    "dataset_name": "Your data, instead of a task: a .jsonl, .json, .csv or .parquet file, a folder with train and "
    "test files, or a hub id.",
    "dataset_config": "Configuration of a dataset of the hub.",
    "dataset_train_split": "Name of the rows to train on.",
    "dataset_test_split": "Name of the held-out rows.",
    "report_to": "Where the numbers go beside the terminal: tensorboard (files in OUTPUT_DIR/runs), wandb or trackio, "
    "each a package of its own, or all that are installed: loss, gradient norm, learning rate, and the trainer's own, "
    "such as alpha, thought_entropy and accuracies.",
    "resume_from_checkpoint": "true goes on from the newest whole checkpoint of the output folder, a path from that "
    "one. Default: start anew.",
}
PROCESSES = {
    "--config FILE": "YAML with any of these options; of those in recipes/configs the name is enough.",
    "--num_processes N": "Processes to train in, one for each GPU or share of the CPU. Default: 1.",
    "--accelerate_config FILE": "What `accelerate config` wrote. Default: its default file, where there is one.",
    "--help, --help_all": "This help; the same with all options of TRL and of transformers.",
}


class RecipeParser(TrlParser):
    """TRL's parser of dataclasses. Errors are ValueErrors of one line."""

    def __init__(self, arguments: type, config: type):
        types = arguments, config, ModelConfig, DatasetMixtureConfig
        super().__init__(types, add_help=False, allow_abbrev=False)
        bring = {}  # each option -> the class that brings it, not one with another default
        for each in (base for one in types for base in reversed(one.__mro__)):
            for name in vars(each).get("__annotations__", {}):
                bring.setdefault(name, each)
        self.groups = {group: [] for group in TITLES}
        for action in self._actions:
            package = bring[action.dest].__module__.partition(".")[0]
            own = package not in TITLES or bring[action.dest] in arguments.__mro__
            is_common = action.dest in COMMON or (own and package != "trl")
            self.groups["run" if is_common else package].append(action)
        for action in self.groups["softar"]:
            if action.type is str and action.default is None:
                action.type = text_or_none
            hint = get_type_hints(bring[action.dest])[action.dest]
            if dict in map(get_origin, get_args(hint) or [hint]):
                action.type = knobs_or_none

    def error(self, message: str):
        raise ValueError(message)

    def check_names(self, argv: list[str]) -> None:
        """Raise ValueError for an option that there is not."""
        known = {"--config", *(name for action in self._actions for name in action.option_strings)}
        for name in (word.partition("=")[0] for word in argv if word.startswith("--")):
            if name not in known:
                raise ValueError(
                    f"option {name!r} is unknown{did_you_mean(name, known)}: {ALL} lists them"
                )

    def help(self, everything: bool = False) -> str:
        """The text of --help, or of --help_all."""
        width = min(120, shutil.get_terminal_size((100, 24)).columns)
        lines = []
        for group, actions in self.groups.items():
            if group in ("run", "softar") or everything:
                lines += ["", f"{TITLES[group]}:"]
                options = dict(PROCESSES) if group == "run" else {}
                for option, text in (options | dict(map(describe, actions))).items():
                    lines += [f"  {option}"]
                    lines += textwrap.wrap(
                        text, width, initial_indent=" " * 6, subsequent_indent=" " * 6
                    )
        if not everything:
            rest = len(self.groups["trl"]) + len(self.groups["transformers"])
            lines += [
                "",
                f"{ALL} lists {rest} more, of TRL and of transformers; idle ones are refused.",
            ]
        return "\n".join(lines)


def text_or_none(text: str) -> str | None:
    """None as a word, for a row that leaves out what others are told; of numbers TRL does it."""
    return None if text == "None" else text


def knobs_or_none(text: str) -> dict | None:
    """A JSON object, or None as a word."""
    try:
        value = None if text == "None" else json.loads(text)
    except json.JSONDecodeError:
        value = text
    if value is not None and not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"k": 5}}')
    return value


def describe(action) -> tuple[str, str]:
    """An option as it is typed, and what it does."""
    text = HELP.get(action.dest, action.help or "").strip()
    if action.default not in (None, "", []) and "Default" not in text:
        text = f"{text} Default: {action.default}."
    choices = ("true", "false") if isinstance(action.default, bool) else action.choices or ()
    values = "|".join(map(str, choices)) or action.dest.rpartition("_")[2].upper()
    return f"--{action.dest} {values}", text
