"""RLOO on a soft policy: each completion is compared with the mean of the others to its prompt
(arXiv:2402.14740)."""

from .base import LeaveOneOut
from .config import SoftRLOOConfig
from .grpo import SoftGRPOTrainer


class SoftRLOOTrainer(LeaveOneOut, SoftGRPOTrainer):
    """SoftGRPOTrainer with leave-one-out advantages, neither scaled nor normalised.

    Exact in expectation, with the KL in the loss: TRL's RLOOTrainer has it in the reward, and the
    ratio of a whole row in place of each step's. Every completion needs a reward, a number from at
    least one function.
    """

    _tag_names = ["trl", "rloo", "softar"]
    _config = SoftRLOOConfig
