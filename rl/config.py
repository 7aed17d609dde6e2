"""The options of RL on a soft policy, on top of TRL's: each with its help, checked before anything
is loaded."""

import logging
from dataclasses import dataclass

import torch
from trl import GRPOConfig

from softar.caches import CACHES, STATIC, check_one_size
from softar.checks import (
    check_choice,
    check_finite,
    check_idle,
    check_least,
    check_types,
    check_value,
    fill,
    kinds_of,
)
from softar.config import SoftConfig
from softar.inherited import UNASKED, check_before, check_filter, check_neutral
from softar.training import opt
from softar.vllm.machine import require_vllm
from softar.vllm.request import LIMIT

from .discretise import WAYS
from .losses import LOSS_TYPES, RATIOS
from .neutral import IDLE, NEUTRAL, PPO_IDLE, RLOO_IDLE
from .policies import DRAWS, KNOBS, LEFT_OUT, NOT_ON_VLLM, check_policy, knobs_of

logger = logging.getLogger(__name__)
BACKENDS = ("loop", "vllm")
CHOICES = (
    ("loss_type", LOSS_TYPES),
    ("scale_rewards", ("group", "batch", "none")),
    ("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum")),
)  # of TRL's options, as its trainer knows them
COLDEST = 0.01  # vLLM samples at no lower temperature


# TRL takes less of these, and then trains on nothing and ends well (num_iterations=0), or fails behind
# the first rollout
LEAST = dict(
    num_iterations=1,
    generation_batch_size=1,
    steps_per_generation=1,
    gradient_accumulation_steps=1,
    per_device_train_batch_size=1,
    per_device_eval_batch_size=1,
    num_generations_eval=1,
    max_completion_length=1,
    epsilon=0,
    epsilon_high=0,
    beta=0,
)


@dataclass
class RolloutConfig(GRPOConfig):
    """TRL's GRPOConfig for rollouts of softar's own and their replay. Without an accelerator it
    trains on the CPU in float32 by itself."""

    _idle, _left_out, _choices, _reasons = (), {}, (), {}

    vllm_importance_sampling_correction: bool = opt(
        False, "Not there: the log-probabilities of vLLM's answers are not recorded."
    )
    logging_nan_inf_filter: bool = opt(
        False, "Not there: a NaN or infinite loss ends the training."
    )
    gradient_checkpointing: bool | None = opt(None, "Recompute activations to save memory.")

    def __post_init__(self):
        check_before(self)
        check_types(self, besides=GRPOConfig)
        left_out = fill(self, self._left_out)
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
        if self.num_generations is not None and self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} must be at least 2: TRL draws the completions of a prompt in "
                f"groups, and GRPO and RLOO compare within them"
            )
        check_numbers(self)
        super().__post_init__()
        check_filter(self)
        check_neutral(self, NEUTRAL, self._reasons)
        check_least(self, pad_to_multiple_of=1)
        for name, choices in (*self._choices, *CHOICES):
            check_choice(name, getattr(self, name), choices)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must be > 0 and finite: the policy has to be sampled"
            )
        check_idle(self, (UNASKED, *self._idle), left_out)
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta={self.delta} must be > 0, the bound of a ratio; None is none")


def check_numbers(config: GRPOConfig) -> None:
    """Raise ValueError for numbers of TRL's that would train nothing, or fail behind a rollout."""
    kinds = kinds_of(type(config))
    for name in (*LEAST, "entropy_coef", "reward_weights"):
        check_value(name, getattr(config, name), kinds[name])
    check_least(config, **LEAST)
    check_finite(config, "beta", "entropy_coef")
    for weight in config.reward_weights or ():
        check_value("reward_weights", weight, float)
        check_finite({"reward_weights": weight}, "reward_weights")


@dataclass
class SoftGRPOConfig(RolloutConfig):
    """TRL's GRPOConfig plus the soft policy.

    `temperature` is one for thought, answer, replay and reference; top_p, top_k and min_p have to
    stay neutral. KL and entropy are of all draws of a step (the entropy of `gumbel` of the first), in
    nats: beta and entropy_coef weigh the same units. The KL of a step is exact in value and needs no
    estimator; its gradient leaves out that the states depend on the policy too.

    The thought ends at `think_end` or after `think_steps`, when think_end is put in, outside the
    loss. A row that never closes its thought has no answer: with reward_sees="answer" its reward
    sees an empty text. Without think_end and think_steps the whole completion is soft, and is the
    answer.
    """

    _idle, _left_out = IDLE, LEFT_OUT
    _choices = (
        ("soft_mixer", KNOBS),
        ("soft_ratio", RATIOS),
        ("reward_sees", WAYS),
        ("rollout", BACKENDS),
    )

    soft_mixer: str = opt(
        "k-samples",
        "What a think step reads back: the mean of 'k-samples', 'hard' (its one drawn token), 'gumbel' (SofT-GRPO: the "
        "tokens that are likeliest after noise), 'mixture-of-inputs' or 'hybrid' (a drawn token and the belief).",
    )
    soft_k: int | None = opt(
        None, "Draws of a think step of 'k-samples'; 1 is ordinary sampling. Default: 3."
    )
    soft_candidates: int | None = opt(
        None,
        "Tokens in a mixture of 'gumbel', each a draw, and in the belief of 'mixture-of-inputs' and 'hybrid'. "
        "Default: 10.",
    )
    soft_tau: float | None = opt(
        None,
        "Temperature of the weights of 'gumbel'; towards 0 its first token alone. Default: .1.",
    )
    soft_beta: float | None = opt(
        None, "Weight of the drawn token in 'mixture-of-inputs'; inf: it alone. Default: 1."
    )
    soft_share: float | None = opt(
        None, "Share of the drawn token in 'hybrid'; 1: it alone. Default: .5."
    )
    think_start: str | None = opt(
        None, "Text that opens the thought. Default: the completion starts inside it."
    )
    think_end: str | None = opt(None, "Text that closes the thought.")
    think_steps: int | None = opt(
        None, "Think steps at most; then think_end is put in, or the answer just starts."
    )
    soft_ratio: str = opt(
        "per_draw", "'per_draw' clips the ratio of each draw, 'joint' that of all draws of a step."
    )
    embedding_grad: bool = opt(
        True, "Do the input embeddings get gradient through the replayed mixtures?"
    )
    reward_sees: str = opt(
        "answer", "'answer', the whole 'stream' of first draws, or the 'argmax' of each mixture."
    )
    rollout: str = opt(
        "loop",
        "What decodes the rollouts: 'loop', softar.generate on the model itself, or 'vllm', an engine of vLLM 0.32 in "
        "each process, which gets the policy's weights before each rollout (`make vllm`, or pip install softar[vllm]). "
        "Same seeds, same thoughts up to rounding; the answers are other draws. The log-probabilities are the model's "
        "own replay either way. See vllm_gpu_memory_utilization, vllm_max_model_length, vllm_model_impl and "
        "vllm_tensor_parallel_size: so many processes share an engine, each with a part of the weights.",
    )
    compile_rollout: bool = opt(
        False,
        "Compile the steps of rollout='loop', over cache_implementation='static'. It takes a minute, once for each "
        "size of the cache.",
    )

    def __post_init__(self):
        check_policy(self.soft_mixer)
        super().__post_init__()
        check_least(self, soft_k=1, soft_candidates=1, soft_beta=0)
        if self.soft_tau is not None and not self.soft_tau > 0:
            raise ValueError(
                f"soft_tau={self.soft_tau} must be > 0; soft_candidates=1 is its limit"
            )
        if self.soft_share is not None and not 0 <= self.soft_share <= 1:
            raise ValueError(
                f"soft_share={self.soft_share} must lie in [0, 1]: 1 is the token alone"
            )
        if self.max_completion_length is None:
            raise ValueError("max_completion_length=None: give the longest completion in steps")
        if self.think_steps is not None and not 0 <= self.think_steps < self.max_completion_length:
            raise ValueError(
                f"think_steps={self.think_steps} must lie in 0..{self.max_completion_length - 1}, below "
                f"max_completion_length={self.max_completion_length}, so that an answer fits"
            )
        check_choice("cache_implementation", self.cache_implementation, (None, *CACHES))
        if self.compile_rollout:
            check_one_size("compile_rollout=True", self.cache_implementation in STATIC)
        if self.rollout == "vllm":
            self._check_vllm()
        self.decoding()

    def _check_vllm(self) -> None:
        try:
            require_vllm()
        except ImportError as error:
            raise ValueError(f"rollout='vllm': {error}; or give rollout='loop'") from None
        check_least(self, vllm_tensor_parallel_size=1)
        if self.temperature < COLDEST:
            raise ValueError(
                f"temperature={self.temperature} must be at least {COLDEST} with rollout='vllm', which "
                f"samples answers no colder; or give rollout='loop'"
            )
        if self.soft_mixer in NOT_ON_VLLM:
            raise ValueError(
                f"soft_mixer={self.soft_mixer!r} is not there with rollout='vllm': "
                f"{NOT_ON_VLLM[self.soft_mixer]}; give rollout='loop'"
            )
        if (over := self.decoding().width - LIMIT) > 0:
            name = DRAWS.get(self.soft_mixer, "soft_candidates")
            value = getattr(self, name)
            raise ValueError(
                f"{name}={value} must be at most {value - over} with rollout='vllm'; or give rollout='loop'"
            )

    def decoding(self) -> SoftConfig:
        """The policy as a configuration: how rollouts are decoded, and what soft_config.json
        records."""
        has_answer = (self.think_end, self.think_steps) != (None, None)
        return SoftConfig(
            mixer=self.soft_mixer,
            mixer_args=knobs_of(self),
            temperature=self.temperature,
            top_k=None,
            max_new_tokens=self.max_completion_length,
            think_start=self.think_start,
            think_end=self.think_end,
            budget=self.think_steps,
            answer_temperature=self.temperature if has_answer else 0.0,
        )


@dataclass
class SoftRLOOConfig(SoftGRPOConfig):
    """SoftGRPOConfig for leave-one-out advantages. The default loss_type is the one whose expected
    gradient is the policy gradient times a constant: the others divide by the number of steps, which
    the policy has a part in."""

    _idle = RLOO_IDLE

    loss_type: str = opt("dr_grpo", "Normalisation of the loss; 'dr_grpo' is RLOO's own.")

    def __post_init__(self):
        super().__post_init__()
        check_compared(self)


def check_compared(config: GRPOConfig) -> None:
    """Raise ValueError where an evaluation of leave-one-out advantages has nothing to leave out."""
    if config.num_generations_eval is not None and config.num_generations_eval < 2:
        raise ValueError(
            f"num_generations_eval={config.num_generations_eval} must be at least 2: evaluations compare the answers "
            "to a prompt, too"
        )


# PPO's name, TRL's name of the same thing, and PPO's default (None: TRL's own way to a default).
ALIASES = (
    ("num_ppo_epochs", "num_iterations", 4),
    ("num_mini_batches", "steps_per_generation", None),
    ("cliprange", "epsilon", 0.2),
    ("kl_coef", "beta", 0.05),
)


@dataclass
class SoftPPOConfig(SoftGRPOConfig):
    """SoftGRPOConfig with a value function, under PPO's familiar names or TRL's: give one of the
    two.

    The KL to the reference is exact in value and part of the loss, not of the reward.
    """

    _idle, _left_out = PPO_IDLE, LEFT_OUT | {"cliprange_value": 0.2}

    loss_type: str = opt(
        "bnpo", "Normalisation of the policy loss; PPO's is the mean over steps, 'bnpo'."
    )
    num_iterations: int | None = opt(None, "See num_ppo_epochs.")
    epsilon: float | None = opt(None, "See cliprange.")
    beta: float | None = opt(None, "See kl_coef.")
    num_ppo_epochs: int | None = opt(None, "Passes over a rollout; = num_iterations. Default 4.")
    num_mini_batches: int | None = opt(
        None, "Pieces a rollout is cut into; = steps_per_generation."
    )
    cliprange: float | None = opt(None, "Clip of the ratio; = epsilon. Default 0.2.")
    kl_coef: float | None = opt(None, "Weight of the KL to the reference; = beta. Default 0.05.")
    gamma: float = opt(1.0, "Discount per step.")
    lam: float = opt(0.95, "Lambda of generalised advantage estimation (arXiv:1506.02438).")
    vf_coef: float = opt(0.1, "Weight of the value loss.")
    cliprange_value: float | None = opt(
        None, "Clip of the value's move away from the rollout's. Default: 0.2."
    )
    value_learning_rate: float | None = opt(
        None, "Learning rate of the value head. Default: learning_rate."
    )
    whiten_advantages: bool = opt(True, "Shift and scale the advantages to mean 0, variance 1.")

    def __post_init__(self):
        check_types(self, besides=GRPOConfig)
        for familiar, name, default in ALIASES:
            ours, theirs = getattr(self, familiar), getattr(self, name)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"{familiar}={ours} and {name}={theirs} are two names of one thing: give one of them"
                )
            value = next((v for v in (ours, theirs, default) if v is not None), None)
            setattr(self, familiar, value)
            setattr(self, name, value)
        check_least(self, num_ppo_epochs=1, num_mini_batches=1, cliprange=0, kl_coef=0)
        super().__post_init__()
        self.num_mini_batches = self.steps_per_generation
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        check_least(self, vf_coef=0, value_learning_rate=0)
        check_finite(self, "vf_coef", "value_learning_rate")
        if self.cliprange_value is not None and not self.cliprange_value > 0:
            raise ValueError(
                f"cliprange_value={self.cliprange_value} must be > 0; inf does not clip"
            )
