"""TRL's options that a soft policy has no use for: each is refused where it is not what does
nothing."""

from softar.checks import Idle
from softar.inherited import OF_ALL

from .policies import KNOBS, LEFT_OUT, draws_of

SUPPORT = (
    "the replayed log-probabilities are of the whole vocabulary, so the gradient would be wrong"
)
MIXTURES = "its engine reads back tokens only, no mixtures"
OTHER_LOSS = "it belongs to a loss_type that is not there"
ONE_TURN = "a rollout is a single turn"
CONSTANT = "give a constant entropy_coef"
START = "the reference is the model that training started from"
WEIGHTS = (
    "the log-probabilities are the model's own replay, and those of vLLM's answers are not recorded, "
    "so there is no ratio to correct by; rollout='loop' decodes with the model itself and needs none"
)
IN_GROUPS = (
    "prompts come in groups, in the order of seed, or as they are with shuffle_dataset=False"
)
NO_LOGITS = "an evaluation keeps losses and rewards, and calls no compute_metrics"
# (option, neutral values, why)
NEUTRAL = (
    *OF_ALL,
    ("remove_unused_columns", (False,), "reward functions read columns, and no signature has them"),
    ("train_sampling_strategy", ("random",), IN_GROUPS),
    ("length_column_name", ("length",), IN_GROUPS),
    ("data_seed", (None,), IN_GROUPS),
    ("prediction_loss_only", (False,), NO_LOGITS),
    ("include_for_metrics", ([],), NO_LOGITS),
    ("batch_eval_metrics", (False,), NO_LOGITS),
    ("average_tokens_across_devices", (True,), "loss_type says how steps are averaged"),
    ("include_num_input_tokens_seen", ("no",), "num_tokens of the log has them"),
    ("liger_kernel_config", (None,), "its loss and kernels take token ids, no mixtures"),
    ("top_p", (1.0,), SUPPORT),
    ("top_k", (0, None), SUPPORT),
    ("min_p", (None, 0.0), SUPPORT),
    ("repetition_penalty", (1.0,), SUPPORT),
    ("generation_kwargs", (None, {}), "the rollout is softar's own and takes no other settings"),
    ("use_vllm", (False,), f"{MIXTURES}; rollout='vllm' decodes softly on vLLM"),
    ("use_transformers_continuous_batching", (False,), MIXTURES),
    ("transformers_continuous_batching_config", (None,), MIXTURES),
    (
        "ds3_gather_for_generation",
        (True,),
        "processes decode as many steps as their texts are long, so each has the weights whole",
    ),
    ("use_liger_kernel", (False,), "its loss and kernels take token ids, no mixtures"),
    ("cast_lm_head_to_fp32", (False,), "the reference would keep its own head"),
    ("importance_sampling_level", ("token",), "soft_ratio says how a soft step is weighted"),
    ("top_entropy_quantile", (1.0,), "entropies of soft and discrete steps do not rank together"),
    (
        "off_policy_mask_threshold",
        (None,),
        "it reads one log-probability a token, a soft step has several",
    ),
    ("use_bias_correction_kl", (True,), "the KL is exact in value and needs no estimator"),
    ("use_adaptive_entropy", (False,), CONSTANT),
    ("entropy_coef_min", (0.0,), CONSTANT),
    ("entropy_coef_max", (1.0,), CONSTANT),
    ("entropy_coef_delta", (0.005,), CONSTANT),
    ("entropy_target", (0.2,), CONSTANT),
    ("sync_ref_model", (False,), START),
    ("ref_model_mixup_alpha", (0.6,), START),
    ("ref_model_sync_steps", (512,), START),
    ("sapo_temperature_neg", (1.05,), OTHER_LOSS),
    ("sapo_temperature_pos", (1.0,), OTHER_LOSS),
    ("vespo_k_pos", (2.0,), OTHER_LOSS),
    ("vespo_lambda_pos", (3.0,), OTHER_LOSS),
    ("vespo_k_neg", (3.0,), OTHER_LOSS),
    ("vespo_lambda_neg", (2.0,), OTHER_LOSS),
    ("max_tool_calling_iterations", (None,), ONE_TURN),
    ("log_multimodal", (True,), "there are no images"),
    ("disable_dropout", (False,), "dropout is off in rollout and replay anyway"),
    ("neftune_noise_alpha", (None,), "the replay must score the policy that was rolled out"),
    ("label_smoothing_factor", (0.0,), "there are no labels"),
    ("vllm_importance_sampling_correction", (False,), WEIGHTS),
    ("vllm_importance_sampling_mode", ("sequence_mask",), WEIGHTS),
    ("vllm_importance_sampling_clip_max", (3.0,), WEIGHTS),
    ("vllm_importance_sampling_clip_min", (None,), WEIGHTS),
    ("vllm_mode", ("colocate",), "the engine runs in the trainer's process"),
    ("vllm_server_base_url", (None,), "the engine runs in the trainer's process"),
    ("vllm_server_host", ("0.0.0.0",), "the engine runs in the trainer's process"),
    ("vllm_server_port", (8000,), "the engine runs in the trainer's process"),
    ("vllm_server_timeout", (240.0,), "the engine runs in the trainer's process"),
    ("vllm_group_port", (51216,), "the engine runs in the trainer's process"),
    ("vllm_enable_sleep_mode", (False,), "the engine stays awake"),
    ("vllm_structured_outputs_regex", (None,), SUPPORT),
)


def _reads_token(c) -> bool:
    """Is every step of a thought read as its drawn token alone?"""
    endless = c.soft_mixer == "mixture-of-inputs" and c.soft_beta == float("inf")
    whole = c.soft_mixer == "hybrid" and c.soft_share == 1
    return (
        endless or whole or (c.soft_mixer in ("k-samples", "hard", "gumbel") and draws_of(c) == 1)
    )


def _of_mixers(option: str) -> Idle:
    """An option that some mixers alone have."""
    mixers = [mixer for mixer, knobs in KNOBS.items() if option in knobs]
    instead = " or ".join(map(repr, mixers))
    return Idle(
        option, lambda c: c.soft_mixer not in mixers, "with this mixer", f"set soft_mixer={instead}"
    )


SHOWN = Idle(
    "num_completions_to_print log_unique_prompts",
    lambda c: not c.log_completions,
    "where no completions are shown",
    "set log_completions=True",
)
# what a row of the recipes decides on, by the mixer that it sets
OF_POLICY = (
    *map(_of_mixers, LEFT_OUT),
    Idle(
        "soft_ratio",
        lambda c: draws_of(c) == 1,
        "with one draw a step",
        "set soft_mixer='k-samples' and soft_k above 1",
    ),
    Idle(
        "soft_tau", _reads_token, "with one draw a step, whose weight is 1", "raise soft_candidates"
    ),
    Idle(
        "soft_candidates",
        lambda c: c.soft_mixer in ("mixture-of-inputs", "hybrid") and _reads_token(c),
        "where the drawn token is all that is read",
        "lower soft_beta or soft_share",
    ),
    Idle(
        "embedding_grad",
        _reads_token,
        "with one draw a step, and nothing beside it",
        "set soft_mixer='k-samples' and soft_k above 1",
    ),
)
IDLE = (
    Idle(
        "vllm_gpu_memory_utilization vllm_max_model_length vllm_model_impl vllm_tensor_parallel_size",
        lambda c: c.rollout != "vllm",
        "without an engine",
        "set rollout='vllm'",
    ),
    *OF_POLICY,
    Idle(
        "cache_implementation compile_rollout",
        lambda c: c.rollout == "vllm",
        "where vLLM decodes, which has a cache of its own",
        "set rollout='loop'",
    ),
    Idle(
        "reward_sees",
        lambda c: (c.think_end, c.think_steps) == (None, None) and c.reward_sees == "stream",
        "where nothing ends the thought, so that the whole stream is the answer",
        "give think_end or think_steps",
    ),
    SHOWN,
)


def group_options(where: str, instead: str) -> Idle:
    """The options of GRPO's advantages alone. instead: the configuration that has them."""
    remedy = f"rewards are weighted and summed as they are; use {instead}"
    return Idle("scale_rewards multi_objective_aggregation", lambda c: True, where, remedy)


RLOO_IDLE = (*IDLE, group_options("with leave-one-out advantages", "SoftGRPOConfig"))
PPO_IDLE = (
    *IDLE,
    group_options("with a value function", "SoftGRPOConfig"),
    Idle(
        "value_learning_rate cliprange_value",
        lambda c: c.vf_coef == 0,
        "with vf_coef=0",
        "give the value loss a weight",
    ),
)
