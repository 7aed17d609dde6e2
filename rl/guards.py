"""What a trainer of soft policies refuses before it starts: arguments, rows, models, folders."""

import logging
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from softar.config import CONFIG_FILE, SoftConfig
from softar.defaults import config_of, own_config
from softar.files import TOLD
from softar.mixers import SHARE, mk_mixer
from softar.models import check_autoregressive, origin_of
from softar.texts import check_cells, check_no_list, is_blank, is_chat
from softar.training import prepare_trained

from .config import SoftGRPOConfig
from .policies import KNOBS
from .rewards import BY_TRAINER, NOT_TOLD

logger = logging.getLogger(__name__)


def check_turn(trainer: str, reward_funcs, others: dict) -> None:
    """Raise ValueError for what goes beyond a rewarded turn. others: the arguments that go on to
    TRL's trainer."""
    for key in ("tools", "rollout_func", "environment_factory"):
        if others.get(key) is not None:
            raise ValueError(
                f"{key}={others[key]!r}: {trainer} rolls out a single soft turn, leave it out"
            )
    if not reward_funcs:
        raise ValueError(f"reward_funcs={reward_funcs!r}: give at least one")


def parts_of(rows, name: str) -> list[tuple[str, Dataset]]:
    """Data sets with their names: of one, or of several by name. Streams, which are not looked at, and
    None are left out. Raises ValueError for a list of rows."""
    parts = {name: rows}
    if isinstance(rows, dict):
        parts = {f"{name}[{key!r}]": part for key, part in rows.items()}
    for where, part in parts.items():
        check_no_list(part, where)
    return [(where, part) for where, part in parts.items() if isinstance(part, Dataset)]


def check_prompts(trainer: str, rows, name: str) -> None:
    """Raise ValueError for rows without prompts, or no rows, where TRL would end without a step. rows and
    name here and below: as for `parts_of`."""
    for where, part in parts_of(rows, name):
        if "prompt" not in part.column_names:
            raise ValueError(
                f"{where} has the columns {part.column_names}: {trainer} needs 'prompt', rename yours"
            )
        if len(part) == 0:
            raise ValueError(f"{where} is empty: give at least one row")
        if taken := sorted(BY_TRAINER.intersection(part.column_names) - {*NOT_TOLD}):
            raise ValueError(
                f"{where} has columns {taken}, by which reward functions get what the trainer says: rename them"
            )
        check_cells(part, ["prompt"], where)


def check_template_options(rows, name: str, options: dict) -> None:
    """Raise ValueError for chats with tools, or template options other than the configuration's, which
    SFT and evaluations hear of a row and rollouts do not."""
    for where, part in parts_of(rows, name):
        columns = [each for each in TOLD if each in part.column_names]
        for column in columns if is_chat(part[0]["prompt"]) else ():
            for number, cell in enumerate(part[column]):
                own = cell if isinstance(cell, dict) else {column: cell or None}
                if any(each is not None and options.get(key) != each for key, each in own.items()):
                    raise ValueError(
                        f"row {number} of {where} has {column}={cell}, which the chats of rollouts do not hear: set "
                        "chat_template_kwargs= of the configuration for all, or give prompts of text"
                    )


def check_asked(tokenizer, rows, name: str) -> None:
    """Raise ValueError for a prompt without a token, which no policy could go on from, and for chats
    without a template; of other prompts that say nothing, as a BOS token alone, print how many there
    are."""
    for where, part in parts_of(rows, name):
        blank = [(i, prompt) for i, prompt in enumerate(part["prompt"]) if is_blank(prompt)]
        for number, prompt in blank:
            if not (prompt if isinstance(prompt, list) else tokenizer(prompt)["input_ids"]):
                raise ValueError(
                    f"row {number} of {where} has an empty prompt: begin it with a BOS token, or drop such rows"
                )
        if blank:
            PartialState().print(f"{len(blank)} of {len(part)} prompts in {where} say nothing")
        if is_chat(part[0]["prompt"]) and tokenizer.chat_template is None:
            raise ValueError(
                f"{where} holds chats, and the tokenizer has no chat template: set tokenizer.chat_template, or give "
                "texts"
            )


def check_prompt_room(trainer, option: str, longest: int | None, rows, name: str) -> None:
    """Raise ValueError for a prompt that leaves no room for the steps of a rollout, the option of this
    name: one of more than `longest` tokens, None for any number."""
    most = getattr(trainer.args, option)
    for where, part in parts_of(rows, name) if longest is not None else ():
        for number, length in enumerate(_lengths(trainer, part["prompt"][:])):
            if length > longest:
                raise ValueError(
                    f"prompt {number} of {where} has {length} tokens, and with {option}={most} the model's "
                    f"positions have room for {longest}: shorten one of them"
                )


def _lengths(trainer, prompts: list[str] | list[list[dict]]) -> Iterator[int]:
    """How many tokens TRL's trainer reads of each prompt."""
    how = dict(chat_template=trainer.chat_template, add_generation_prompt=True, return_dict=True)
    how |= trainer.chat_template_kwargs
    for at in range(0, len(prompts), 1000):
        some, tokenizer = prompts[at : at + 1000], trainer.processing_class
        is_text = isinstance(some[0], str)
        read = tokenizer(some) if is_text else tokenizer.apply_chat_template(some, **how)
        yield from map(len, read["input_ids"])


def check_trainable(
    trainer: str, model: nn.Module, aux_loss_coef: float | None, opened: dict | None = None
) -> None:
    """Make a saved adapter trainable. Raises ValueError for a model that the trainer of this name
    cannot train.

    Args:
        aux_loss_coef: of a mixture of experts whose load-balancing loss is asked for.
        opened: keywords of the model's loading, where the trainer has opened it.
    """
    if aux_loss_coef is not None:
        raise ValueError(
            f"router_aux_loss_coef={aux_loss_coef}: {trainer} leaves out the experts' load-balancing "
            f"loss, set it to 0 to agree"
        )
    prepare_trained(trainer, model, opened=opened)
    dropouts = (m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p)
    if rates := sorted({*dropouts}):
        logger.warning(
            "dropout %s stays off: the replay must score the policy that was rolled out", rates
        )


def check_causal(model: nn.Module) -> None:
    """Raise ValueError for a model of masks."""
    check_autoregressive(model, "use DiffusionGRPOTrainer or DiffusionRLOOTrainer")


def check_candidates(model: nn.Module, args: SoftGRPOConfig) -> None:
    """Raise ValueError where candidates leave no token out of the mixture."""
    most = model.config.get_text_config(decoder=True).vocab_size - 2
    if args.soft_candidates is not None and args.soft_candidates > most:
        raise ValueError(
            f"soft_candidates={args.soft_candidates} must be at most {most}, the model's vocabulary "
            f"less two"
        )


def policy_of(model, args: SoftGRPOConfig) -> SoftConfig:
    """The policy as a configuration, which soft_config.json records: as `args` say, behind the prefix
    that the model, an adapter too, has been trained with. Raises ValueError where its folder says
    that its mixer has other knobs."""
    is_named = isinstance(model, str)
    if is_named and Path(model, "adapter_config.json").is_file():
        raise ValueError(
            f"model={model!r} is the folder of an adapter: give softar.load's model of it, merged, "
            "model.merge_and_unload().requires_grad_()"
        )
    adapted = not is_named and is_peft_model(model)
    if adapted and isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"model={origin_of(model).name!r}: its adapter has rows of the output layer, which RL does not train on: "
            "merge it, model.merge_and_unload().requires_grad_()"
        )
    name = model if is_named else origin_of(model).name
    theirs, ours = (own_config if is_named else config_of)(model), args.decoding()
    if theirs is None:
        return ours
    if theirs.step_temperature is not None:
        raise ValueError(
            f"step_temperature in {CONFIG_FILE} of {name}: RL trains at one temperature, its own option; "
            "take that field out of the file to train so"
        )
    knobs = mk_mixer(ours.mixer, **ours.mixer_args).knobs
    options = {knob: option for option, knob in KNOBS[ours.mixer].items()}
    for knob, value in knobs_said(theirs).items() if theirs.mixer == ours.mixer else ():
        if knobs[knob] != value:
            raise ValueError(
                f"{options.get(knob, knob)}={knobs[knob]!r}, but {CONFIG_FILE} in {name} says {knob}={value!r}: give "
                f"the same, or remove the file to train on as another policy"
            )
    return ours.changed(prompt_prefix=theirs.prompt_prefix)


def knobs_said(theirs: SoftConfig) -> dict:
    """The knobs that a model's configuration decides, also by leaving them out. It does not where it
    reads all candidates, which RL cannot, and where it takes the likeliest token, as it may of any
    model."""
    knobs = mk_mixer(theirs.mixer, **theirs.mixer_args).knobs
    if "share" in knobs and (knobs["share"], knobs["gate"]) == (None, None):
        knobs["share"] = SHARE
    open_ones = ("candidates", None), ("share", None), ("sample", False)
    return {knob: value for knob, value in knobs.items() if (knob, value) not in open_ones}


def check_same_policy(folder: str, policy: SoftConfig) -> None:
    """Raise ValueError where the checkpoint was trained as another policy: its optimiser would go
    on elsewhere."""
    if not Path(folder, CONFIG_FILE).is_file():
        raise ValueError(
            f"resume_from_checkpoint={folder!r} holds no {CONFIG_FILE}: it is of another trainer"
        )
    theirs, ours = vars(SoftConfig.load(folder)), vars(policy)
    if other := [f"{k}={ours[k]!r}, not {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]:
        raise ValueError(
            f"resume_from_checkpoint={folder!r} was trained as another policy: now {'; '.join(other)}. Give the same "
            f"options, or start a new run from its weights"
        )
