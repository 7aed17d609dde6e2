"""Options of TRL's and transformers' training arguments that do nothing in softar's trainers, or not
all that they say: each is refused where it is not what does nothing."""

from .checks import Idle

WHOLE = "thoughts, noise and rollouts are laid over whole rows, which context and sequence parallelism cut"
BY_CALL = "a trainer trains where train() is called, a program by its name"
# (option, neutral values, why), of every trainer
OF_ALL = (
    ("use_cache", (False,), "softar keeps caches where it reads from them"),
    ("label_names", (None,), "what is learnt stands in 'labels', or was drawn"),
    ("do_train", (False,), BY_CALL),
    ("do_predict", (False,), BY_CALL),
)
# of those that learn texts
OF_TEXTS = (
    *OF_ALL,
    ("padding_free", (False,), "it needs rows; packing=True fills them"),
    ("loss_type", ("nll",), "it has a loss of its own"),
    ("label_smoothing_factor", (0.0,), "it has a loss of its own"),
)
UNASKED = Idle(
    "do_eval",
    lambda c: c.eval_strategy == "no",
    "where nothing says when to evaluate",
    "give an eval_strategy",
)
IDLE_TEXTS = (
    UNASKED,
    Idle("packing_strategy", lambda c: not c.packing, "without packing", "set packing=True"),
    Idle(
        "eval_packing", lambda c: c.eval_packing, "here, where held-out rows stay apart", "drop it"
    ),
    Idle("pad_token", lambda c: True, "here", "set the tokenizer's"),
)
COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
PREPARED = "skip_prepare_dataset"  # all that TRL reads of dataset_kwargs


def check_neutral(args, options=OF_ALL, reasons: dict[str, str] | None = None) -> None:
    """Raise ValueError for an option that these arguments have no use for. reasons: that a kind of
    trainer has, and others have not."""
    for name, neutral, why in options:
        value = vars(args).get(name, neutral[0])  # older versions lack some
        if value not in neutral:
            raise ValueError(
                f"{name}={value!r} is not supported by this trainer: {(reasons or {}).get(name, why)}. Leave it at "
                f"{neutral[0]!r}"
            )


def check_before(args) -> None:
    """Raise ValueError for what transformers would act on while it reads its arguments: options that
    compile a model as a whole (the trainers run its parts one by one under the wrapper, so it would
    compile what is around them, anew in each step), and those that cut rows."""
    for name in COMPILE:
        if value := getattr(args, name):
            raise ValueError(
                f"{name}={value!r} makes this training slower: leave it out; in Python, hand over a model with "
                f"model.forward = torch.compile(model.forward)"
            )
    check_whole_rows(args.parallelism_config)


def check_whole_rows(parallelism) -> None:
    """Raise ValueError where processes would have parts of rows. parallelism: accelerate's
    ParallelismConfig, or None."""
    for name in ("cp", "sp"):
        if parallelism is not None and getattr(parallelism, f"{name}_enabled"):
            size = getattr(parallelism, f"{name}_size")
            raise ValueError(f"{name}_size={size}: {WHOLE}; leave it at 1")


def check_filter(args) -> None:
    """Raise ValueError for the option of transformers that hides NaN losses."""
    if args.logging_nan_inf_filter:
        raise ValueError(
            "logging_nan_inf_filter=True hides NaN losses, at which a training stops here: leave it at False"
        )


def check_prepares(args) -> None:
    """Raise ValueError for keys of dataset_kwargs that TRL does not read."""
    for name in (args.dataset_kwargs or {}).keys() - {PREPARED}:
        raise ValueError(
            f"dataset_kwargs has the key {name!r}, which does nothing: {PREPARED!r} is all that there is"
        )


def check_open(args, others: dict, names: tuple) -> None:
    """Raise ValueError for what is not asked where a trainer has its model, and a loss of its own.
    others: the arguments that go on to TRL's trainer. names: what it may open, the model among them."""
    if others.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func= is not called here, where losses are softar's: drop it"
        )
    if any(isinstance(each, str) for each in names):
        return
    given = {name: getattr(args, name) for name in ("model_init_kwargs", "trust_remote_code")}
    given["quantization_config"] = others.get("quantization_config")
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{name}={value!r} does nothing to a model that is open: open it so, and leave it out here"
            )
