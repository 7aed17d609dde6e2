"""Options of soft SFT that do nothing beside its others: they are refused, at the edge."""

from ..checks import Idle
from ..models.think_tokens import TAGS

SOFT_INPUTS = "soft_mode soft_passes soft_grad_passes soft_window"
ALPHA = "alpha_schedule alpha_start alpha_end alpha_hold alpha_span"
MOVE = "alpha_end alpha_hold alpha_span"
MIXTURES = """soft_mixer soft_mixer_args soft_temperature soft_top_k soft_top_p soft_min_p guidance
    learn_temperature learn_step_temperature learn_min_p learn_top_k thought_loss entropy_coef"""
IDLE = (
    Idle(
        "latents_per_step latent_stage_steps latent_step_end latent_uniform_prob",
        lambda c: c.latent_stages is None,
        "without latent_stages",
        "give their number",
    ),
    Idle(
        f"{MIXTURES} {ALPHA}",
        lambda c: c.latent_stages is not None,
        "with latent_stages, where hidden states are read, not mixtures",
        "leave latent_stages out",
    ),
    Idle(
        "soft_passes soft_grad_passes",
        lambda c: c.soft_mode == "sequential",
        "with soft_mode='sequential'",
        "set soft_mode='parallel'",
    ),
    Idle(
        "soft_window",
        lambda c: c.soft_mode == "parallel",
        "with soft_mode='parallel'",
        "set soft_mode='sequential'",
    ),
    Idle(
        f"{SOFT_INPUTS} soft_mixer soft_mixer_args soft_temperature guidance",
        lambda c: c.targets == "oracle",
        "with targets='oracle', which reads the traces' mixtures",
        "choose other targets",
    ),
    Idle(
        ALPHA,
        lambda c: c.targets == "oracle" and c.thought_loss != "alpha",
        "with targets='oracle', which reads no gold token",
        "choose other targets",
    ),
    Idle(
        MOVE,
        lambda c: c.alpha_schedule == "constant",
        "with alpha_schedule='constant', where alpha stays at alpha_start",
        "choose another alpha_schedule",
    ),
    Idle(
        "alpha_hold alpha_span alpha_schedule alpha_end",
        lambda c: len(c.alphas) == 1 and c.alpha()(1.0) not in c.alphas,
        "where alpha would move behind the last step",
        "let it move sooner, or train for more steps",
    ),
    Idle(
        f"{SOFT_INPUTS} guidance alpha_start {MOVE} thought_loss entropy_coef",
        lambda c: c.think_steps == 0,
        "with think_steps=0, where nothing is thought",
        "raise it",
    ),
    Idle(
        f"{SOFT_INPUTS} guidance",
        lambda c: c.targets != "oracle" and c.alphas == {1.0},
        "where alpha stays 1, so that no mixture is ever read",
        "lower alpha_start, or choose another alpha_schedule",
    ),
    Idle(
        "guidance",
        lambda c: c.targets != "oracle" and c.alphas == {0.0},
        "where alpha stays 0, so that no gold token is read",
        "raise alpha_start",
    ),
    Idle(
        "thought_loss",
        lambda c: c.alphas == {1.0},
        "where alpha stays 1, which is the weight",
        "choose another alpha_schedule",
    ),
    Idle(
        "soft_grad_passes guidance",
        lambda c: c.soft_passes == 0,
        "with soft_passes=0, where one forward is all",
        "raise soft_passes",
    ),
    Idle(
        ALPHA,
        lambda c: c.soft_passes == 0 and c.thought_loss != "alpha",
        "with soft_passes=0, which reads gold tokens alone",
        "raise soft_passes",
    ),
    Idle(
        "temperature_learning_rate",
        lambda c: not (c.learn_temperature or c.learn_step_temperature),
        "without a temperature to learn",
        "set learn_temperature=True or learn_step_temperature=True",
    ),
    Idle(
        "filter_learning_rate gate_gradient gate_scale_start gate_scale_end",
        lambda c: not (c.learn_min_p or c.learn_top_k),
        "without a filter to learn",
        "set learn_min_p=True or learn_top_k=True",
    ),
    Idle(
        "freeze_embeddings freeze_layers",
        lambda c: c.think_tokens > 0,
        "with think_tokens, whose rows alone are trained",
        "leave think_tokens out",
    ),
    Idle(
        "completion_logits",
        lambda c: c.packing,
        "with packing, where prompts stand between the completions of a row",
        "leave packing out",
    ),
    Idle(
        "neftune_noise_alpha",
        lambda c: c.is_soft,
        "to the mixtures that are read in the place of tokens",
        "train on gold tokens alone, alpha_schedule='constant'",
    ),
    Idle(
        "think_tags",
        lambda c: c.think_tokens == 0 or c.think_end != TAGS[1],
        f"without think_tokens and think_end={TAGS[1]!r}, which stands in the data",
        "give both",
    ),
)
