"""RLOO on a soft policy: each completion is compared with the mean of the others to its prompt (arXiv:2402.14740)."""

from .grpo import SoftGRPOTrainer
from .losses import leave_one_out
from .rollout import check_scored


class SoftRLOOTrainer(SoftGRPOTrainer):
    """SoftGRPOTrainer with leave-one-out advantages, neither scaled nor normalised.

    `scale_rewards` has no part in it. Every completion needs a reward, a number from at least one function.
    """

    _tag_names = ["trl", "rloo", "softar"]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        check_scored(rewards, self.reward_func_names, self.reward_funcs, each_row=True)
        return rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        group = self.num_generations if self.model.training else self.num_generations_eval
        advantages = leave_one_out(self._rewards, group)
        self._relog_advantages(advantages)
        batch["advantages"] = self._local(advantages)
        return batch
