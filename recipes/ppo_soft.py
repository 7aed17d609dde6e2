# /// script
# dependencies = ["softar[rewards]"]
# ///
r"""
PPO on a soft policy: it thinks in means of k sampled tokens, writes a discrete answer and learns from its reward.

Examples:

# The demo: MNNS from a briefly trained policy; before and after, soft (3 draws) against discrete (1) at equal forwards
softar ppo
softar ppo --rows soft,hard --num_seeds 3

# Other policies: SofT-GRPO's Gumbel noise, mixture of inputs, HRPO's token beside the belief
softar ppo --rows gumbel,mixture-of-inputs,hybrid,hard

# An instruct model of 1.5B on one GPU, with LoRA; SmolLM2-135M on a CPU for a few steps
softar ppo --config ppo_instruct_1b.yaml
softar grpo --config grpo_smollm2_cpu.yaml

# Rollouts by vLLM's engine in the place of the model's own loop (make vllm), in the same process, on the newest weights
softar ppo --rollout vllm

# Any causal LM on any dataset with a column 'prompt', rewarded by one of TRL's functions or one of yours
softar ppo \
    --model_name_or_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --dataset_name trl-lib/DeepMath-103K \
    --reward_funcs accuracy_reward --think_end '</think>' --think_steps 1024 --max_completion_length 1536 \
    --use_peft --learning_rate 1e-5 --output_dir runs/ppo-deepmath

# Go on where an interrupted run stopped; without this a run starts anew and moves old checkpoints into _earlier
softar ppo --resume_from_checkpoint true

From a checkout `accelerate launch recipes/ppo_soft.py` and `python recipes/ppo_soft.py` do the same.
"""

from dataclasses import dataclass

from softar import rl
from softar.recipe import run
from softar.rl.config import SoftPPOConfig
from softar.rl.recipe import rl_recipe
from softar.training import opt


@dataclass
class RecipeConfig(SoftPPOConfig):
    output_dir: str | None = opt("runs/ppo_soft", "Folder for checkpoints, results.json and plot.")


RECIPE = rl_recipe(__file__, __doc__, RecipeConfig, lambda: rl.SoftPPOTrainer, "mnns_ppo.yaml")

if __name__ == "__main__":
    run(RECIPE)
