# /// script
# dependencies = ["softar[rewards]"]
# ///
r"""
RLOO on a soft policy: each completion's reward beside the mean of the others to its prompt (arXiv:2402.14740).

Examples:

# The demo: MNNS from a briefly trained policy; before and after, soft (3 draws) against discrete (1) at equal forwards
softar rloo
softar rloo --rows soft,hard --num_seeds 3

# Other policies: SofT-GRPO's Gumbel noise, mixture of inputs, HRPO's token beside the belief
softar rloo --rows gumbel,mixture-of-inputs,hybrid,hard

# Any model, data and reward: the options of `softar grpo`, and its configurations
softar rloo --config grpo_smollm2_cpu.yaml --output_dir runs/rloo_smollm2

# Go on where an interrupted run stopped; without this a run starts anew and moves old checkpoints into _earlier
softar rloo --resume_from_checkpoint true

From a checkout `accelerate launch recipes/rloo_soft.py` and `python recipes/rloo_soft.py` do the same.
"""

from dataclasses import dataclass

from softar import rl
from softar.recipe import run
from softar.rl.config import SoftRLOOConfig
from softar.rl.recipe import rl_recipe
from softar.training import opt


@dataclass
class RecipeConfig(SoftRLOOConfig):
    output_dir: str | None = opt("runs/rloo_soft", "Folder for checkpoints, results.json and plot.")


RECIPE = rl_recipe(__file__, __doc__, RecipeConfig, lambda: rl.SoftRLOOTrainer, "mnns_rloo.yaml")

if __name__ == "__main__":
    run(RECIPE)
