"""Which model a recipe trains."""

from pathlib import Path
from typing import TYPE_CHECKING

from .resume import resumes
from .rows import Row, left_in

if TYPE_CHECKING:
    from .tasks import Task


def named_model(model_args, task: "Task", default: str | None) -> tuple[str, dict]:
    """The model to open, `default` where none is named, and what its loading takes from TRL's
    ModelConfig."""
    name = model_args.model_name_or_path or default
    if name is None:
        raise ValueError(f"task {task.name!r} has no model of its own: give --model_name_or_path")
    options = {"dtype": model_args.dtype}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    if model_args.model_revision not in (None, "main"):
        options["revision"] = model_args.model_revision
    return name, options


def check_named_model(name: str, kind: str, script, options: dict) -> None:
    """Raise ValueError for a model that is nowhere, or of the wrong kind, before anything else is
    touched."""
    from .decoders.card import describe
    from .models import check_there

    check_there(name, sorted(embedded()), **{k: v for k, v in options.items() if k == "revision"})
    has = describe(name).kind
    is_diffusion = kind == "diffusion" and not script.from_causal
    needs = "diffusion" if is_diffusion else "autoregressive"
    is_said = is_diffusion and script.kind is not None  # of a folder that looks like another's
    if has not in (None, needs) and not is_said:
        raise ValueError(f"model={name!r}: {OTHER_KIND[has]}")


def adapter_of(model, model_args):
    """PEFT's configuration of the options, for this model; None where they want none. Raises ValueError
    where no new adapter can be made so."""
    from accelerate.utils import is_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
    from trl import get_peft_config

    if model_args.use_peft and is_peft_model(model):
        raise ValueError(
            "use_peft=True: the model is an adapter already, which is trained on without that option"
        )
    targets = model_args.lora_target_modules or model_args.lora_target_parameters
    if model_args.use_peft and not targets and (kind := model.config.model_type) not in KNOWN:
        raise ValueError(
            f"lora_target_modules=None: PEFT knows none by itself for a model of type {kind!r}, give all-linear, or "
            "names of its layers"
        )
    return get_peft_config(model_args)


OTHER_KIND = {
    "diffusion": "it fills masks: `softar diffusion-sft` trains it, without --from_causal, and by RL "
    "`softar diffusion-grpo`",
    "autoregressive": "it reads from left to right: `softar sft` and `softar grpo` train it; `softar diffusion-sft "
    "--from_causal true` makes a diffusion model of a causal LM (Llama, Qwen, ...) first",
}


def embedded() -> set[str]:
    """The names of models that the package brings; they take precedence over folders."""
    from .models import MODELS
    from .tasks import MODELS as OF_TASKS

    return {*MODELS, *(name for models in OF_TASKS.values() for name in models.values())}


def check_stays(name: str, training, folders: dict[Row, Path]) -> None:
    """Raise ValueError for a model that a run from the start would set apart before it is opened."""
    if resumes(training) or name in embedded() or not Path(name).exists():
        return
    model = Path(name).resolve()
    for folder in folders.values():
        left = {path.resolve() for path in left_in(folder)}
        if left and (model == folder.resolve() or left & {model, *model.parents}):
            raise ValueError(
                f"model_name_or_path={name!r} lies in the folder {str(folder)!r}, which a run from the start "
                "empties into _earlier: give another output_dir, or resume_from_checkpoint"
            )
