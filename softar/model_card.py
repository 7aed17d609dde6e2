"""The README.md of a trained folder: what it was trained from, on what, and how it is decoded."""

import dataclasses
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from .config import CONFIG_FILE, STEP_TEMPERATURE_FILE
from .models import plain
from .names import is_code
from .results import versions, write_whole
from .resume import EARLIER, set_adapter_apart

PROMPT = "your prompt"


@dataclass(frozen=True)
class Origin:
    """What a trainer does not know of its data: whoever makes it may set `trainer.origin`."""

    data: str | None = None  # name of the task, file or hub id
    prompt: str = PROMPT  # an example, for the command
    new_tokens: int | None = None  # of a completion: masks that a diffusion model is given
    chat: bool | None = None  # its rows are chats; None where the tokenizer has no template
    rows: int | None = None  # before they are packed


class OwnCard:
    """Mixin of a trainer, before TRL's among its bases: a model card of its own, in checkpoints and
    in the output folder. TRL's shows a pipeline, which would decode it as any other model."""

    origin = Origin()
    card_method = "trained to think in mixtures of tokens"
    # files beside the weights that say more of how they are decoded
    beside: tuple[str, ...] = (STEP_TEMPERATURE_FILE,)

    def card_command(self, folder: str | Path) -> str:
        """The command that decodes what lies in the folder. A mixer of one's own is named there, as
        a file may not say what is run."""
        mixer = self.card_config()[1].get("mixer", "")
        spec = f" -d soft:mixer={mixer}" if is_code(mixer) else ""
        return decode_command("generate", folder, self.origin, spec)

    def card_config(self) -> tuple[str | None, dict]:
        """The file of the folder that says how it is decoded, and what it says."""
        return CONFIG_FILE, changes_of(self.args.decoding())

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "README.md", model_card(self, folder, dataset_name, tags))

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if plain(model) is model and set_adapter_apart(folder):
            print(
                f"{folder} held an adapter of an earlier training: it is now in {folder / EARLIER}"
            )
        # over the one that PEFT writes beside an adapter
        write_whole(folder / "README.md", model_card(self, folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """With what says how it is decoded, of which transformers does not know."""
        job, args = self.push_in_progress, self.args
        is_pushed = args.hub_always_push or job is None or job.is_done()
        if is_pushed and self.is_world_process_zero() and args.hub_strategy != "end":
            for name in {self.card_config()[0], *self.beside} - {None}:
                Path(args.output_dir, name).unlink(missing_ok=True)  # of an earlier training
                if Path(checkpoint_folder, name).is_file():
                    shutil.copy(Path(checkpoint_folder, name), Path(args.output_dir, name))
        super()._push_from_checkpoint(checkpoint_folder)


def model_card(trainer, folder: Path, data: str | None = None, tags=None) -> str:
    """The text of it, with the front matter that the hub reads."""
    args, state, model = (
        trainer.args,
        trainer.state,
        trainer.accelerator.unwrap_model(trainer.model),
    )
    base, adapter = plain(model).name_or_path or "", plain(model) is not model
    data = data or trainer.origin.data
    file, settings = trainer.card_config()
    name = trainer.hub_model_id or folder
    method = type(trainer).__name__.removesuffix("Trainer")
    step, best = step_of(trainer)
    log = [entry for entry in state.log_history if entry.get("step", 0) <= step]
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts = {
        "trained from": base or "weights without a name",
        "what was trained": "an adapter (PEFT)" if adapter else "the whole model",
        "data": f"{data or 'without a name'}, {rows_of(trainer)}",
        "by": f"softar {__version__}, {method}, step {step} of {state.max_steps}{best}, {batch} rows a step",
        "learning rate, seed": f"{args.learning_rate:g}, {args.seed}",
    } | {key: f"{value:.4g}" for key, value in last_numbers(log).items()}
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    front = {
        "library_name": "peft" if adapter else "transformers",
        "tags": sorted({*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])}),
    } | ({"base_model": base} if base.count("/") == 1 and not Path(base).is_dir() else {})
    told = f"`{file}` says how, and the" if file else "The"
    how = json.dumps(settings, default=repr) if settings else "all defaults"
    follows = f"{told} `softar` command follows it: {how}."
    if is_code(str(settings.get("mixer", ""))):
        follows = f"`{file}` says how: {how}. Its mixer is code, to be named as above: a folder's is not run unasked."
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            "",
            f"# {Path(name).name}",
            "",
            f"A language model {trainer.card_method}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
            "",
            "## Decode",
            "",
            "```bash",
            trainer.card_command(name),
            "```",
            "",
            follows,
            "",
            f"Made with {packages}.",
            "",
        ]
    )


def decode_command(tool: str, folder: str | Path, origin: Origin, options: str = "") -> str:
    """For prompts like those of the training: `generate` makes a chat of a text where there is a
    template, `fill` does not."""
    form = {("generate", False): " --no-chat", ("fill", True): " --chat"}.get(
        (tool, origin.chat), ""
    )
    prompt, model = shlex.quote(origin.prompt), shlex.quote(str(folder))
    return f"softar {tool} {prompt} -m {model}{form}{options}"


def changes_of(config) -> dict:
    """The fields of a configuration that are not its defaults."""
    default = type(config)()
    fields = (field.name for field in dataclasses.fields(config))
    return {f: v for f in fields if (v := getattr(config, f)) != getattr(default, f)}


def last_numbers(log: list[dict]) -> dict[str, float]:
    """The last loss, reward and evaluation that a trainer has logged."""
    numbers = {}
    for entry in log:
        shown = {k: v for k, v in entry.items() if k in ("loss", "reward") or k.startswith("eval_")}
        numbers |= {k: v for k, v in shown.items() if "_per_second" not in k and "runtime" not in k}
    return numbers


def step_of(trainer) -> tuple[int, str]:
    """The step that the weights are of, and a remark: the best one's are back after the training, where
    its arguments ask for them."""
    args, state = trainer.args, trainer.state
    is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
    if trainer.is_in_train or not is_best:
        return state.global_step, ""
    return state.best_global_step, f" (the best by {args.metric_for_best_model})"


def rows_of(trainer) -> str:
    packed = vars(trainer.args).get("packing", False)
    if packed and trainer.origin.rows is not None:
        return f"{trainer.origin.rows} rows, packed"
    try:
        return f"{len(trainer.train_dataset)} {'packed ' if packed else ''}rows"
    except TypeError:  # a stream
        return "a stream"


def command_of(folder: Path) -> str | None:
    """The command in a trained folder's card."""
    file = folder / "README.md"
    found = re.search(r"```bash\n(.*)\n", file.read_text()) if file.is_file() else None
    return found and found[1]


def prompt_of(folder: str | Path) -> str | None:
    """The prompt in that command, where its training knew one."""
    command = command_of(Path(folder)) or ""
    prompt = shlex.split(command)[2] if command.startswith("softar generate ") else PROMPT
    return None if prompt == PROMPT else prompt


def example_of(task, tokenizer) -> Origin:
    """What the rows of a task say: a prompt that stands on a line, the length of a completion,
    whether they are chats."""
    rows = task.train if task.test is None else task.test
    row = next(iter(rows.take(1) if hasattr(rows, "take") else rows), {})
    prompt = row.get("template", row.get("prompt", PROMPT))
    chat = isinstance(prompt, list) or "messages" in row or "conversations" in row
    if isinstance(prompt, list):
        prompt = prompt[-1].get("content") or PROMPT
    prompt = prompt.strip() if isinstance(prompt, str) else PROMPT
    most = 400 if "template" in row else 120  # its masks are shown as underscores
    is_short = "\n" not in prompt and 0 < len(prompt) <= most
    answer = row.get("completion")
    length = len(tokenizer(answer)["input_ids"]) + 1 if isinstance(answer, str) else None
    return Origin(
        task.name,
        prompt if is_short else PROMPT,
        length,
        chat if tokenizer.chat_template is not None else None,
        len(task.train) if hasattr(task.train, "__len__") else None,
    )
