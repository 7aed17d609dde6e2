"""RLOO on a soft policy: each completion is compared with the mean of the others to its prompt
(arXiv:2402.14740)."""

from .config import SoftRLOOConfig
from .grpo import SoftGRPOTrainer
from .losses import leave_one_out


class SoftRLOOTrainer(SoftGRPOTrainer):
    """SoftGRPOTrainer with leave-one-out advantages, neither scaled nor normalised.

    Exact in expectation, with the KL in the loss: TRL's RLOOTrainer has it in the reward, and the
    ratio of a whole row in place of each step's. Every completion needs a reward, a number from at
    least one function.
    """

    _tag_names = ["trl", "rloo", "softar"]
    _scores_each_row = True
    _config = SoftRLOOConfig

    def _with_advantages(self, batch, rollout):
        group = self.num_generations if self.model.training else self.num_generations_eval
        advantages = leave_one_out(rollout.rewards, group)
        self._relog_advantages(advantages)
        return batch | {"advantages": self._local(advantages)}
