"""RLOO on a soft policy: each completion is compared with the mean of the others to its prompt
(arXiv:2402.14740)."""

from .grpo import SoftGRPOTrainer
from .losses import leave_one_out


class SoftRLOOTrainer(SoftGRPOTrainer):
    """SoftGRPOTrainer with leave-one-out advantages, neither scaled nor normalised.

    `scale_rewards` has no part in it. Every completion needs a reward, a number from at least one
    function.
    """

    _tag_names = ["trl", "rloo", "softar"]
    _scores_each_row = True

    def _with_advantages(self, batch, rollout):
        group = self.num_generations if self.model.training else self.num_generations_eval
        advantages = leave_one_out(rollout.rewards, group)
        self._relog_advantages(advantages)
        return batch | {"advantages": self._local(advantages)}
