"""The options of RL on a masked-diffusion policy, on top of TRL's, checked before anything is
loaded."""

from dataclasses import dataclass
from typing import Any

from softar.checks import Idle, check_least
from softar.diffusion.config import DenoiseConfig
from softar.diffusion.replay import ESTIMATES, METHODS
from softar.training import opt

from .config import RolloutConfig, check_compared
from .neutral import NEUTRAL, SHOWN, group_options
from .pieces import RATIOS

OWN_LOOP = "the rollout is softar's own loop"
DIFFUSION_IDLE = (
    SHOWN,
    Idle(
        "embedding_grad",
        lambda c: c.soften == "hard" or c.replay in ("one-step", "left-to-right"),
        "where no mixtures are replayed",
        "give another soften or replay",
    ),
    Idle(
        "hide_prompt",
        lambda c: c.replay != "one-step",
        "where the replay reads what the rollout read",
        "set replay='one-step'",
    ),
    Idle(
        "vllm_gpu_memory_utilization vllm_max_model_length vllm_model_impl vllm_tensor_parallel_size "
        "cache_implementation",
        lambda c: True,
        f"where {OWN_LOOP}",
        "leave them out",
    ),
)
REASONS = {name: OWN_LOOP for name, *_ in NEUTRAL if name.startswith("vllm_")} | {
    "use_vllm": "it fills no masks",
    "use_transformers_continuous_batching": "it fills no masks",
    "transformers_continuous_batching_config": "it fills no masks",
    "importance_sampling_level": "ratio says whether tokens or trajectories are weighted",
    "off_policy_mask_threshold": "clip the ratio by epsilon and delta",
    "top_entropy_quantile": "every committed token is an action",
    "use_liger_kernel": "its loss and kernels read from left to right",
    "neftune_noise_alpha": "the replay must score the policy that was rolled out",
}
# fields of DenoiseConfig that are options of the trainer, too
DECODING = (
    "gen_length",
    "block_length",
    "sub_block_length",
    "steps",
    "schedule",
    "schedule_args",
    "threshold",
    "factor",
    "entropy_bound",
    "select",
    "alg_temp",
    "soften",
    "soften_args",
    "rescale",
    "grid",
    "ban_eos",
    "end_ids",
    "early_stop",
    "temperature",
)


@dataclass
class DiffusionGRPOConfig(RolloutConfig):
    """TRL's GRPOConfig for a masked-diffusion policy: how rollouts are decoded, and how they are
    replayed. The options of decoding are those of DenoiseConfig.

    Every committed token is an action, those behind an end token too, and with alg_temp > 0 the draw of
    its slot. KL and entropy are of each committed token and this draw, exact in value, in nats.
    """

    _idle, _left_out, _reasons = DIFFUSION_IDLE, {}, REASONS
    _choices = (("replay", METHODS), ("ratio", RATIOS))

    max_completion_length: int | None = opt(
        None,
        "TRL's name of gen_length: give one of the two. With gen_length=0 the most masks of a template, for "
        "'dr_grpo' alone, which divides by it.",
    )
    gen_length: int | None = opt(
        None,
        "Masks behind each prompt, the length of answers; 0 fills those of templates. Default: "
        f"max_completion_length, else {DenoiseConfig.gen_length}.",
    )
    block_length: int | None = opt(None, "Blocks are decoded from left to right; None is one.")
    sub_block_length: int | None = opt(None, "Of block-causal models: what is decoded together.")
    steps: int | None = opt(None, "Forwards in all; None is one for each mask.")
    schedule: str | None = opt(None, "How many slots commit in a forward. Default: 'uniform'.")
    schedule_args: dict[str, Any] | None = opt(None, "Knobs of the schedule.")
    threshold: float | None = opt(None, "Of schedule 'threshold', in (0, 1].")
    factor: float | None = opt(None, "Of schedule 'factor', > 0.")
    entropy_bound: float | None = opt(None, "Of schedule 'entropy-bound', nats.")
    select: str = opt(
        "max-prob", "How slots are scored: by the belief alone, never by the tokens drawn."
    )
    alg_temp: float = opt(
        0.0,
        "Above 0 the slots of a forward are drawn from softmax(score / alg_temp), and are actions, too; the replay "
        "then has logits of all open slots in memory, not of those that committed.",
    )
    soften: str | None = opt(None, "What a mask shows. Default: as the model was trained.")
    soften_args: dict[str, Any] | None = opt(None, "Knobs of the softener.")
    rescale: str | None = opt(None, "Length of mixtures: None, 'l2' or 'norm'.")
    grid: str = opt("start", "Where a block-causal model's blocks are counted from.")
    ban_eos: bool = opt(False, "Never propose the end-of-text token.")
    end_ids: list[int] | None = opt(None, "End tokens. Default: the model's own.")
    early_stop: bool | None = opt(None, "Is a row over when a block holds an end token?")
    replay: str = opt(
        "exact",
        "'exact', a forward for each of the decode's; 'grouped', the same for block-causal models, "
        "several in one; or the estimates 'one-step' (diffu-GRPO) and 'left-to-right' (JustGRPO).",
    )
    replay_chunk: int = opt(16, "Canvases of a replay that are in memory at a time.")
    hide_prompt: float = opt(
        0.0,
        "Share of the prompt's tokens that 'one-step' masks, drawn once for each rollout: all passes over it see the "
        "same. d1 has 0.15, and draws anew in each.",
    )
    ratio: str = opt(
        "token",
        "'token' clips the ratio of each committed token, 'trajectory' that of all of a row.",
    )
    embedding_grad: bool = opt(
        True, "Do the input embeddings get gradient through the replayed mixtures?"
    )

    def __post_init__(self):
        if self.alg_temp > 0 and self.replay in ESTIMATES:
            raise ValueError(
                f"alg_temp={self.alg_temp} draws the slots, and replay={self.replay!r} knows no order: give 'exact', "
                f"or alg_temp=0"
            )
        if str(self.pad_to_multiple_of).lower() not in ("auto", "none", "null"):
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of!r} does nothing to canvases, which are as wide as their "
                f"prompts and gen_length make them: leave it out"
            )
        super().__post_init__()
        check_least(self, replay_chunk=1, max_completion_length=1)
        if not 0 <= self.hide_prompt < 1:
            raise ValueError(f"hide_prompt={self.hide_prompt} must lie in [0, 1): a share")
        if self.fp16:
            raise ValueError(
                "fp16=True: the gradients of pieces are taken before the loss is scaled, give bf16=True or neither"
            )
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            raise ValueError(
                f"gradient_checkpointing_kwargs={self.gradient_checkpointing_kwargs}: the gradients of pieces are "
                f"taken by torch.autograd.grad, which reentrant checkpoints refuse, leave use_reentrant at False"
            )
        if self.mask_truncated_completions:
            raise ValueError(
                "mask_truncated_completions=True: every answer has as many slots, leave it out"
            )
        self._agree_on_length()
        self.decoding()

    def _agree_on_length(self) -> None:
        most = self.max_completion_length
        if self.gen_length is None:
            self.gen_length = DenoiseConfig.gen_length if most is None else most
        if self.gen_length and most not in (None, self.gen_length):
            raise ValueError(
                f"max_completion_length={most}, but gen_length={self.gen_length}, which is the length of answers: give "
                f"one of the two"
            )
        if most and not self.gen_length and self.loss_type != "dr_grpo":
            raise ValueError(
                f"max_completion_length={most} does nothing with gen_length=0, where templates say how many masks they "
                f"have: leave it out, or give loss_type='dr_grpo', which divides by it"
            )
        self.max_completion_length = most or self.gen_length or None
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(
                "loss_type='dr_grpo' divides by max_completion_length=: with gen_length=0 give the most masks that "
                "a template has"
            )

    def decoding(self) -> DenoiseConfig:
        """How rollouts are decoded; what denoise_config.json records."""
        named = {name: getattr(self, name) for name in DECODING}
        named |= {name: named[name] or {} for name in ("schedule_args", "soften_args")}
        return DenoiseConfig(**named)


@dataclass
class DiffusionRLOOConfig(DiffusionGRPOConfig):
    """DiffusionGRPOConfig for leave-one-out advantages, with the loss_type whose expected gradient is
    the policy gradient times a constant."""

    _idle = (*DIFFUSION_IDLE, group_options("with leave-one-out advantages", "DiffusionGRPOConfig"))

    loss_type: str = opt("dr_grpo", "Normalisation of the loss; 'dr_grpo' is RLOO's own.")

    def __post_init__(self):
        super().__post_init__()
        check_compared(self)
