"""The options of soft SFT, on top of TRL's: each with its help, checked before work starts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from trl import SFTConfig

from ..checks import check_choice, check_idle, check_least, check_types, fill
from ..config import SoftConfig
from ..mixers import GUIDES, mk_mixer
from ..relaxed import GRADIENTS
from ..soft import check_dist
from ..training import PlainSFTConfig, opt
from .forward import MODES
from .guidance import mk_alpha
from .idle import IDLE
from .learnt import learnt_of
from .preflight import check_learnable

TARGETS = ("gold", "traces", "oracle")
THOUGHT_LOSSES = ("constant", "alpha")
PACKED = {  # what goes with packed rows alone, and why nothing else does
    "soft_mode": (
        "parallel",
        "its steps go by columns, where packed thoughts do not begin together",
    ),
    "targets": ("gold", "traces have other lengths than the completions that are packed"),
    "latent_stages": (None, "its rows change their lengths from stage to stage"),
}
# What goes with gold targets alone, as TRL does it to the rows that it makes and traces are not among
# them; and what does nothing
OF_GOLD = {
    "truncation_mode": "keep_start",
    "eos_token": None,
    "chat_template_path": None,
    "assistant_only_loss": False,
}
# What options that act in some modes only are where they are left out
LEFT_OUT = dict(
    latents_per_step=1,
    soft_passes=2,
    alpha_end=0.0,
    alpha_hold=0.0,
    alpha_span=0.6,
    temperature_learning_rate=1e-2,
    filter_learning_rate=1e-2,
    gate_gradient="straight",
    gate_scale_start=1.0,
    gate_scale_end=0.05,
)


@dataclass
class SoftSFTConfig(PlainSFTConfig):
    """TRL's SFTConfig plus what makes it soft. Without an accelerator it trains on the CPU in
    float32 by itself. With `packing` several examples stand in a row of `max_length` and do not see
    each other; losses and gradients are those of rows of their own."""

    idle: ClassVar = IDLE  # which options do nothing beside which others
    # JSON on the command line
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "soft_mixer_args"]

    gradient_checkpointing: bool | None = opt(
        None, "Recompute activations to save memory. Not with soft_mode='sequential'."
    )
    soft_mode: str = opt(
        "parallel",
        "How the soft inputs are computed: 'parallel' refreshes of all, or 'sequential' steps: exact, and as many "
        "forwards as the thought is long.",
    )
    soft_passes: int | None = opt(
        None,
        "Parallel: refreshes of the soft inputs; the first n of a thought are exact after n, and more "
        "than it is long are not made. Default: 2; with latent_stages as many as there are latents.",
    )
    soft_grad_passes: int | None = opt(
        None, "Parallel: how many of the last forwards carry gradient. Default: all."
    )
    soft_window: int | None = opt(
        None, "Sequential: cut the gradient through time every so many steps."
    )
    soft_mixer: str = opt(
        "soft", "What is fed back: a name in softar.MIXERS, or module:function of your own."
    )
    soft_mixer_args: dict | str | None = opt(None, "The mixer's knobs, e.g. {'tau': 0.5}.")
    soft_temperature: float = opt(1.0, "Temperature of the mixtures.")
    soft_top_k: int | None = opt(
        10,
        "Tokens kept in a mixture, in training and decoding; 0 or None keeps the whole vocabulary.",
    )
    soft_top_p: float | None = opt(None, "Nucleus of a mixture.")
    soft_min_p: float | None = opt(None, "Least probability in a mixture, relative to its largest.")
    learn_temperature: bool = opt(False, "Train the mixtures' temperature with the model.")
    temperature_learning_rate: float | None = opt(
        None,
        "Learning rate of a learnt temperature (of its logarithm), without weight decay. Default: 0.01.",
    )
    learn_step_temperature: bool = opt(
        False,
        "Train what makes each step's own temperature of its last hidden state: soft_temperature times a factor "
        "between 1/8 and 8, which begins as 1.",
    )
    learn_min_p: bool = opt(
        False, "Train soft_min_p with the model, from there on: it filters by a gate."
    )
    learn_top_k: bool = opt(
        False, "Train soft_top_k with the model, from there on, to at most twice as many."
    )
    filter_learning_rate: float | None = opt(
        None, "Learning rate of learnt filters (their logits), no weight decay. Default: 0.01."
    )
    gate_gradient: str | None = opt(
        None,
        "How a learnt filter mixes: 'straight' as decoding will, with the gates' gradient; 'soft' by its gates. "
        "Default: straight.",
    )
    gate_scale_start: float | None = opt(
        None, "How wide a gate is at first (nats for min-p, ranks for top-k). Default: 1."
    )
    gate_scale_end: float | None = opt(
        None, "How wide it is at the end; it narrows by a constant factor. Default: 0.05."
    )
    guidance: str = opt(
        "mix", "How the gold token enters a mixture: 'mix', 'clamp' or 'coin' (scheduled sampling)."
    )
    alpha_schedule: str = opt(
        "linear", "Share of the gold token over the training: constant, linear, cosine, step."
    )
    alpha_start: float = opt(1.0, "Share of the gold token at the start; 1 is teacher forcing.")
    alpha_end: float | None = opt(
        None, "Share of the gold token at the end. Default: 0, which is what decoding meets."
    )
    alpha_hold: float | None = opt(
        None, "Fraction of the training before alpha starts to move. Default: 0."
    )
    alpha_span: float | None = opt(
        None, "Fraction of the training in which alpha goes from start to end. Default: 0.6."
    )
    thought_loss: str = opt(
        "constant", "Weight of the thought's tokens in the loss: 'constant' 1, or 'alpha'."
    )
    targets: str = opt(
        "gold",
        "Whose tokens are the labels: the 'gold' completion, one of the row's 'traces' drawn afresh at each step, or "
        "'oracle', the distribution of the traces at each position as input and label.",
    )
    latent_stages: int | None = opt(
        None,
        "Coconut's curriculum: stages after the first, which is the text as it is. Stage s replaces the first s steps "
        "by hidden states, the last the whole thought (in the paper one stage more); each begins with a new optimiser.",
    )
    latents_per_step: int | None = opt(
        None, "Coconut: hidden states in the place of a step of the thought. Default: 1."
    )
    latent_step_end: str | None = opt(
        None, "Coconut: text that ends a step of the thought. Default: every token is a step."
    )
    latent_stage_steps: int | None = opt(
        None,
        "Coconut: optimiser steps of each stage but the last, which goes on to the end. Default: equal shares.",
    )
    latent_uniform_prob: float = opt(
        0.0, "Coconut: probability that a row is read at a stage drawn uniformly instead."
    )
    entropy_coef: float = opt(
        0.0, "Adds this times the entropy of the soft steps (nats) to the loss; > 0 sharpens."
    )
    think_start: str | None = opt(
        None, "Text that opens the thought. Default: it starts with the completion."
    )
    think_end: str | None = opt(None, "Text that closes the thought.")
    think_steps: int | None = opt(None, "Length of the thought in tokens, where no text closes it.")
    think_tokens: int = opt(
        0,
        "Prompt tuning: so many new tokens stand before each prompt (of a chat: each user's message), and their rows "
        "of the embeddings alone are trained; with --use_peft the adapter holds nothing else. Default: 0, none.",
    )
    think_tags: bool = opt(
        False, "With think_tokens: <think> and </think> are new tokens with rows of their own, too."
    )
    freeze_embeddings: bool = opt(False, "Keep the input embeddings as they are.")
    freeze_layers: int = opt(0, "Keep the first n layers as they are.")
    completion_logits: bool = opt(
        False,
        "Compute the logits of the completions alone, not of the prompts before them: saves memory and time where the "
        "vocabulary is large. The model takes logits_to_keep, as most of transformers do.",
    )
    eval_decode_rows: int = opt(
        256, "Held-out rows decoded for the accuracies of an evaluation; 0 for none."
    )
    eval_new_tokens: int | None = opt(
        None,
        "Most tokens of thought and answer that an evaluation decodes, saved in soft_config.json as what decodes of "
        "the folder take: longer answers are cut. Default: those of the longest completion that is trained on.",
    )

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.soft_mixer, str):
            raise ValueError(
                f"soft_mixer={self.soft_mixer!r} must be a name: give yours as 'module:function'"
            )
        check_types(self, besides=SFTConfig)
        exact = (self.latent_stages or 0) * (self.latents_per_step or 1)  # passes
        left_out = fill(self, LEFT_OUT | ({"soft_passes": exact} if exact else {}))
        if isinstance(self.soft_mixer_args, str):
            raise ValueError(f"soft_mixer_args={self.soft_mixer_args!r} is no JSON object")
        check_choice("soft_mode", self.soft_mode, MODES)
        check_choice("guidance", self.guidance, GUIDES)
        check_choice("targets", self.targets, TARGETS)
        check_choice("thought_loss", self.thought_loss, THOUGHT_LOSSES)
        check_least(self, soft_top_k=0, temperature_learning_rate=0, filter_learning_rate=0)
        check_choice("gate_gradient", self.gate_gradient, GRADIENTS)
        for name in ("gate_scale_start", "gate_scale_end"):
            if not 0 < (scale := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={scale} must be > 0 and finite; near 0 gates are filters")
        check_least(self, soft_passes=0, soft_grad_passes=1, soft_window=1, think_steps=0)
        check_least(self, latent_stages=1, latents_per_step=1, latent_stage_steps=1)
        self._check_stages()
        self._check_texts()
        for name, (value, why) in PACKED.items():
            if self.packing and (given := getattr(self, name)) != value:
                raise ValueError(
                    f"{name}={given!r} does not go with packing=True: {why}; set it to False"
                )
        check_least(self, think_tokens=0, freeze_layers=0, eval_decode_rows=0, eval_new_tokens=1)
        if self.soft_mode == "sequential" and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing=True drops the cache of soft_mode='sequential': use 'parallel'"
            )
        if self.think_end is not None and self.think_steps is not None:
            raise ValueError(
                f"think_end={self.think_end!r} and think_steps={self.think_steps}: give one of them"
            )
        if self.think_start is not None and self.think_end is None:
            raise ValueError(
                f"think_start={self.think_start!r} needs a think_end that closes the thought"
            )
        check_dist(None, **self.filters, prefix="soft_")
        if mk_mixer(self.soft_mixer, **(self.soft_mixer_args or {})).hidden:
            raise ValueError(
                f"soft_mixer={self.soft_mixer!r} asks for hidden states, which training does not hand "
                "out: decode with it, or train with latent_stages"
            )
        if mk_mixer(self.soft_mixer).gated and (self.soft_mixer_args or {}).get("gate") is not None:
            raise ValueError(
                f"soft_mixer_args={self.soft_mixer_args}: a gate is for decoding, soft SFT reads mixtures "
                "of tokens: leave it out"
            )
        self.alpha()
        self.check_best()
        check_idle(self, self.idle, left_out)
        for name in learnt_of(self):
            check_learnable(self, name)

    def check_best(self) -> None:
        """Raise ValueError where models are told apart by a loss of inputs that change meanwhile."""
        metric = self.metric_for_best_model or ""  # transformers takes "loss" where it needs one
        if not metric.endswith("loss") or metric.endswith("gold_loss"):
            return
        alphas = self.alphas | {self.alpha()(1.0)}  # an evaluation may follow the last step
        moves = self.latent_stages is None and self.targets != "oracle" and len(alphas) > 1
        if moves or self.latent_stages is not None:
            what = "alpha" if moves else "the latent stage"
            raise ValueError(
                f"metric_for_best_model={metric!r} changes with {what}, whatever the model is worth: give "
                "'eval_gold_loss', or with a score 'eval_soft_accuracy'"
            )

    def _check_stages(self) -> None:
        if not 0 <= self.latent_uniform_prob <= 1:
            raise ValueError(f"latent_uniform_prob={self.latent_uniform_prob} must lie in [0, 1]")
        if self.latent_stages is None:
            return
        if self.targets == "oracle":
            raise ValueError(
                "targets='oracle' reads the traces' mixtures, and latent_stages hidden states: choose other targets"
            )
        if self.completion_logits:
            raise ValueError("completion_logits=True is not for latent_stages: set it to False")
        if self.max_steps > 0:
            self.stage_steps(self.max_steps)

    def _check_texts(self) -> None:
        if self.completion_only_loss is False:
            raise ValueError(
                "completion_only_loss=False: prompts would be thought, too, which decoding reads as they are; leave "
                "it out, texts without prompts are learnt whole"
            )
        for name, left_out in OF_GOLD.items() if self.targets != "gold" else ():
            if (value := getattr(self, name)) != left_out:
                raise ValueError(
                    f"{name}={value!r} says nothing to traces, with targets={self.targets!r}: leave it at "
                    f"{left_out!r}, and give rows and a tokenizer that are so already"
                )

    def alpha(self) -> Callable[[float], float]:
        """The guidance schedule, progress in [0, 1] -> alpha."""
        move = dict(end=self.alpha_end, hold=self.alpha_hold, span=self.alpha_span)
        move = {name: value for name, value in move.items() if value is not None}  # does not move
        return mk_alpha(self.alpha_schedule, start=self.alpha_start, **move)

    def gate_scale(self, progress: float) -> float:
        """How wide the gates of learnt filters are, progress in [0, 1]."""
        return self.gate_scale_start ** (1 - progress) * self.gate_scale_end**progress

    def stage_steps(self, max_steps: int) -> int:
        """Steps of each of Coconut's stages but the last, which goes on to the end. Raises ValueError
        where a training of so many does not reach it."""
        length = self.latent_stage_steps or max(1, max_steps // (self.latent_stages + 1))
        if length * self.latent_stages >= max_steps:
            raise ValueError(
                f"latent_stages={self.latent_stages}: after stages of {length} steps the last is not reached in "
                f"{max_steps}: raise max_steps, or lower latent_stage_steps or latent_stages"
            )
        return length

    @property
    def alphas(self) -> set[float]:
        """Its values at the first and at the last step of the training."""
        # one step alone tries whether all works; how many there are in num_train_epochs the data says
        steps = max(2, self.max_steps) if self.max_steps > 0 else 10**6
        schedule = self.alpha()
        return {schedule(0.0), schedule(1 - 1 / steps)}

    @property
    def filters(self) -> dict[str, Any]:
        """What shapes the mixtures, as mk_proba_dist and check_dist take it."""
        names = ("temperature", "top_k", "top_p", "min_p")
        filters = {name: getattr(self, f"soft_{name}") for name in names}
        return filters | {"top_k": self.soft_top_k or None}

    @property
    def is_soft(self) -> bool:
        """Does the training ever show the model a mixture, or a hidden state?"""
        if self.think_steps == 0:
            return False
        if self.latent_stages is not None:
            return True
        is_single = mk_mixer(self.soft_mixer).single
        return self.targets == "oracle" or (not is_single and min(self.alphas) < 1)

    def decoding(self, readout: str = "soft", learnt: dict[str, Any] | None = None) -> SoftConfig:
        """How the trained model is decoded: 'soft' as it was trained, with these filters in place of
        those it began with, or 'discrete', greedy over the same spans."""
        span = dict(think_start=self.think_start, think_end=self.think_end, budget=self.think_steps)
        if self.eval_new_tokens is not None:  # else the trainer, which sees the rows, says it
            span["max_new_tokens"] = self.eval_new_tokens
        if readout == "discrete":
            return SoftConfig(mixer="hard", top_k=None, **span)
        if self.latent_stages is not None:
            latents = self.latent_stages * self.latents_per_step
            span |= dict(budget=latents, token_budget=self.think_steps)
            return SoftConfig(mixer="hidden", **span)
        # trained on its own single tokens; read out softly it gets its belief
        single = mk_mixer(self.soft_mixer).single
        return SoftConfig(
            mixer="soft" if single else self.soft_mixer,
            mixer_args={} if single else self.soft_mixer_args or {},
            **(self.filters | (learnt or {})),
            **span,
        )
