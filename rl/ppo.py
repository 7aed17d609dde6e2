"""PPO on a soft policy: GRPO's rollouts and replay, with a value head in the place of the group's
mean.

TRL removed its PPOTrainer in 1.13: this is PPO on TRL's online-RL base. The value head reads the
hidden states of the replay, so that policy and value see the same soft inputs.

Shapes: B rows, P prompt length, C completion steps, J ratios of a step, V vocabulary, D width.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from softar.split import is_split
from softar.training import give_own_rate

from .config import SoftPPOConfig
from .grpo import SoftGRPOTrainer
from .losses import gae, value_loss, whiten

VALUE_HEAD = "v_head.safetensors"


class SoftPPOTrainer(SoftGRPOTrainer):
    """SoftGRPOTrainer with a value head, generalised advantages (arXiv:1506.02438) and the clipped
    value loss.

    The head is a linear map of the last hidden state, zero at the start and trained in full, under
    LoRA too. A checkpoint holds it in v_head.safetensors: the model beside it stays a plain
    language model. The reward comes with a row's last step; forced steps have a value but no part
    in the policy's loss. Every completion needs a reward.
    """

    _tag_names = ["trl", "ppo", "softar"]
    _scores_each_row = True
    _config = SoftPPOConfig

    def __init__(
        self, model, reward_funcs=None, args: SoftPPOConfig | None = None, *rest, **kwargs
    ):
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        # On the outermost module: DDP and the optimiser find it there, and PEFT does not freeze it.
        width = self.model.get_output_embeddings().in_features
        head = nn.Linear(width, 1, device=self.accelerator.device, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.model.register_module("v_head", head)

    # -- rollout

    def _with_advantages(self, batch, rollout):
        args, alive, values = self.args, batch["soft_alive"].float(), rollout.values
        # TRL asks for log-probabilities only where an update comes before their use
        if values is None:
            train, evaluation = args.per_device_train_batch_size, args.per_device_eval_batch_size
            size = train if self.model.training else evaluation
            _, values = self._replay_rows(self.model, batch, size)
        rewards = torch.zeros_like(values)
        rows, last = torch.arange(len(rewards), device=values.device), alive.sum(1).long() - 1
        rewards[rows, last] = self._local(rollout.rewards).float()
        advantages, returns = gae(rewards, values, alive, args.gamma, args.lam)
        if args.whiten_advantages:
            advantages = whiten(advantages, batch["loss_mask"], self.accelerator.reduce)
        per_row = (advantages * batch["loss_mask"]).sum(1) / batch["loss_mask"].sum(1).clamp(min=1)
        self._relog_advantages(self.accelerator.gather(per_row))
        return batch | {"advantages": advantages, "old_values": values, "returns": returns}

    # -- replay and loss

    def _forward(self, model, batch):
        seen = []
        # What enters the output layer: the hidden states of just the positions whose logits are
        # made
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0])
        )
        try:
            logits = self._logits(model, batch)
        finally:
            hook.remove()
        # a model that makes all logits has the replay's last ones here too
        hidden = seen[0][:, -logits.shape[1] :]
        # float32, but for DeepSpeed and FSDP in half precision
        return logits, model.v_head(hidden.to(model.v_head.weight.dtype)).float()[..., 0]

    def _compute_loss(self, model, inputs):
        reference = self._reference(model, inputs) if self.args.beta else None
        logits, values = self._replay(model, inputs)
        # where mask_truncated_completions leaves a row out, the value learns nothing of it either
        alive = (inputs["soft_alive"] & inputs["completion_mask"].bool()).float()
        lost = value_loss(
            values, inputs["old_values"], inputs["returns"], alive, self.args.cliprange_value
        )
        # a mean over all processes' steps
        steps = self.accelerator.reduce(alive.sum(), "mean")
        lost = lost * alive.sum() / steps.clamp(min=1 / self.accelerator.num_processes)
        mean_loss = self.accelerator.reduce(lost.detach(), "mean").item()
        self._note({"value_loss": mean_loss, "value": self._mean(values.detach(), alive)})
        return (
            self._policy_loss(logits, reference, inputs)
            + self.args.vf_coef * lost / self._accumulation
        )

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.value_learning_rate
        if rate is not None and rate != self.args.learning_rate:
            give_own_rate(self, [*self.model.v_head.parameters()], rate)
        return optimizer

    # -- checkpoints

    def _save(self, output_dir: str | None = None, state_dict=None):
        state_dict = (
            self.accelerator.get_state_dict(self.model) if state_dict is None else state_dict
        )
        head = {
            k.removeprefix("v_head."): v.contiguous()
            for k, v in state_dict.items()
            if k.startswith("v_head.")
        }
        super()._save(
            output_dir, {k: v for k, v in state_dict.items() if not k.startswith("v_head.")}
        )
        save_file(head, Path(output_dir or self.args.output_dir, VALUE_HEAD))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        path = Path(resume_from_checkpoint, VALUE_HEAD)
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} holds no {VALUE_HEAD}: it was not PPO"
            )
        if is_split(self.accelerator):
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: the value head does not go back into a split "
                f"model; resume under DDP, or start a new run from its weights"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.model.v_head.load_state_dict(load_file(path))

    def _load_best_model(self):
        super()._load_best_model()
        if not is_split(self.accelerator):
            path = Path(self.state.best_model_checkpoint, VALUE_HEAD)
            self.model.v_head.load_state_dict(load_file(path))
