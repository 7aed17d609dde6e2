"""TRL's GRPOTrainer with rollouts of softar's own and their replay: what the trainers of soft and of
masked-diffusion policies share.

Shapes: B rows, P prompt length, C steps of a completion or columns of a canvas.
"""

import copy
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl.data_utils import is_conversational
from trl.trainer.utils import pad

from softar.model_card import OwnCard
from softar.split import check_split
from softar.training import WatchedLosses, check_arguments, no_interrupt

from . import guards
from .config import RolloutConfig
from .losses import aggregate, is_level, leave_one_out
from .metrics import reward_metrics
from .rewards import check_scored, with_checks, with_rows
from .rollout import frozen_copy, generators, load_rollouts, save_rollouts
from .trl_trainer import GRPOTrainer

ROLLOUTS = "rollouts-{rank}.safetensors"


class RolloutGRPO(WatchedLosses, OwnCard, GRPOTrainer):
    """Rollouts, advantages and checkpoints; the kinds of policy say how they decode, what of a
    rollout trains, and what its loss is.

    TRL's hooks are called one after the other and carry token ids only, so the rollout that they
    are at work on is kept beside them.
    """

    _config = RolloutConfig
    _scores_each_row = False  # or may the reward functions leave a completion without a score?

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: RolloutConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        peft_config=None,
        **kwargs,
    ):
        name = type(self).__name__
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        check_arguments(name, model, self._config, args, processing_class, kwargs, *rewards)
        guards.check_turn(name, reward_funcs, kwargs)
        self._check_policy(model, args, processing_class)
        train_dataset = self._checked(train_dataset, "train_dataset", processing_class)
        eval_dataset = self._checked(eval_dataset, "eval_dataset", processing_class)
        adapted = peft_config is not None or (isinstance(model, nn.Module) and is_peft_model(model))
        args = copy.copy(args)
        beta, args.beta = args.beta, args.beta if adapted else 0.0
        reference = None if adapted or not beta else frozen_copy(model, args.model_init_kwargs)
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        check_split(self)
        args.beta = beta
        # TRL would replay the reference on token ids, `_compute_loss` does it on what was read
        self.beta = 0.0
        self._check_model(self.router_aux_loss_coef if self.aux_loss_enabled else None)
        self._check_read(self.train_dataset, "train_dataset")
        self._check_read(self.eval_dataset, "eval_dataset")
        if reference is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"beta={beta}: under FSDP or DeepSpeed a reference needs PEFT, give a peft_config"
                )
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        pairs = zip(self.reward_func_names, self.reward_funcs, strict=True)
        self.reward_funcs = [
            f if isinstance(f, nn.Module) else with_checks(name, f) for name, f in pairs
        ]
        self._rollout = None  # the one that TRL's hooks are at work on
        self._eval_rollouts = 0

    # -- what a kind of policy says

    def _check_policy(self, model, args, tokenizer) -> None:
        """Note how rollouts are decoded, and refuse what doesn't fit; before anything is made."""
        raise NotImplementedError

    def _as_read(self, rows):
        """A data set, several by name, or None, with its prompts as the policy reads them."""
        return rows

    def _check_model(self, aux_loss_coef: float | None) -> None:
        """Refuse a model that cannot be trained, when there is one."""
        raise NotImplementedError

    def _check_room(self, rows, name: str) -> None:
        """Refuse prompts, as read, that this model cannot go on from. name: of the rows."""
        raise NotImplementedError

    def _decode(self, prompts: list[list[int]], ids: Tensor, mask: Tensor, rng: list):
        """Prompts, also padded on the left as ids and mask [B, P] -> a rollout."""
        raise NotImplementedError

    def _completions(self, rollout) -> list[list[int]]:
        """The tokens of each row, which give TRL its lengths; at least one."""
        raise NotImplementedError

    def _payload(self, rollout, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a rollout adds to TRL's batch: tensors of rows, loss_mask [B, C] among them."""
        raise NotImplementedError

    def _rollout_metrics(self, rollout) -> dict[str, float]:
        raise NotImplementedError

    def _seen_by_rewards(self, rollout) -> tuple[list[list[int]], list[str]]:
        """The tokens that the reward functions get, and their texts."""
        raise NotImplementedError

    def _check_same_policy(self, folder: str) -> None:
        """Refuse a checkpoint that was trained as another policy."""
        raise NotImplementedError

    # -- rollout

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ):
        if images is not None or multimodal_fields:
            raise ValueError(
                f"{type(self).__name__} reads text only: leave out the columns image and images"
            )
        device, training = self.accelerator.device, self.model.training
        ids = [torch.tensor(row, device=device) for row in prompt_ids]
        mask = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="left")
        ids = pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        step = self._step if training else self._eval_rollouts
        self._eval_rollouts += not training
        first = self.accelerator.process_index * len(ids)
        rng = generators(self.args.seed, not training, step, first, len(ids))
        self._rollout = self._decode(prompt_ids, ids, mask, rng)
        return self._completions(self._rollout), None

    def _generate_and_score_completions(self, inputs):
        self._rollout = None
        batch = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = self._rollout, None
        batch |= self._payload(rollout, batch)
        batch["num_items_in_batch"] = self.accelerator.gather(batch["loss_mask"].sum()).sum()
        self._note(self._rollout_metrics(rollout) | reward_metrics(rollout.rewards))
        return self._with_advantages(batch, rollout)

    def _with_advantages(self, batch: dict[str, Tensor], rollout) -> dict[str, Tensor]:
        """The batch with the advantages of this method; GRPO's are those that TRL put there, but 0
        where nothing tells the answers to a prompt apart."""
        level = is_level(rollout.compared, self._group)
        advantages = self.accelerator.gather(batch["advantages"]).masked_fill(level, 0.0)
        self._relog_advantages(advantages)
        return batch | {"advantages": self._local(advantages)}

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's, on what the rewards may see, and the rows."""
        ids, texts = self._seen_by_rewards(self._rollout)
        self._log_completion_extra("reward_saw", texts)
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        else:
            completions = texts
        rewards = super()._calculate_rewards(with_rows(inputs), prompts, completions, ids)
        check_scored(
            rewards, self.reward_func_names, self.reward_funcs, each_row=self._scores_each_row
        )
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        total = total.masked_fill(rewards.isnan().all(1), torch.nan)
        each = self.multi_objective_aggregation == "normalize_then_sum"
        self._rollout.rewards, self._rollout.compared = total, rewards if each else total[:, None]
        return rewards

    @property
    def _group(self) -> int:
        """Answers to a prompt."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _local(self, rows: Tensor) -> Tensor:
        """This process's part of a tensor with the rows of all."""
        n = len(rows) // self.accelerator.num_processes
        return rows[self.accelerator.process_index * n :][:n]

    def _relog_advantages(self, advantages: Tensor) -> None:
        """Show these [rows of all processes] in the table of completions, where TRL put its own."""
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    def _note(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    # -- loss

    def _normalised(self, per_step: Tensor, mask: Tensor, items: Tensor) -> Tensor:
        """As TRL normalises this loss_type. `items`: steps in the loss of the whole rollout, over
        all processes."""
        return aggregate(
            per_step,
            mask,
            self.args.loss_type,
            accumulation=self._accumulation,
            max_length=self.max_completion_length,
            num_items=items,
            num_processes=self.accelerator.num_processes,
            steps_per_generation=self.args.steps_per_generation if self.model.training else 1,
        )

    @property
    def _accumulation(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _mean(self, values: Tensor, mask: Tensor) -> float:
        """Over the marked steps of all processes."""
        sums = torch.stack([(values * mask).sum(), mask.sum()])
        total, count = self.accelerator.reduce(sums).tolist()
        return total / max(count, 1)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """Of the constructor's rows, or of others, which are checked and read as these."""
        self._eval_rollouts = 0  # every evaluation draws the same numbers
        if not isinstance(eval_dataset, (str, dict, type(None))):  # of several each comes by itself
            eval_dataset = self._checked(eval_dataset, "eval_dataset", self.processing_class)
            self._check_read(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _checked(self, rows, name: str, tokenizer):
        """A data set, several by name, or None, with its prompts as the policy reads them. Raises
        ValueError for rows that cannot be rolled out."""
        guards.check_prompts(type(self).__name__, rows, name)
        rows = self._as_read(rows)
        guards.check_asked(tokenizer, rows, name)
        return rows

    def _check_read(self, rows, name: str) -> None:
        """Raise ValueError for prompts, as read, that rollouts would read otherwise or not go on from."""
        guards.check_template_options(rows, name, self.chat_template_kwargs)
        self._check_room(rows, name)

    # -- checkpoints

    def _save_checkpoint(self, model, trial):
        with no_interrupt():
            # First: trainer_state.json, which comes last in what follows, is what says that a
            # checkpoint is whole
            every = self.args.steps_per_generation * self.num_iterations
            # rollouts that later steps still read
            rest = self._buffered_inputs if self._step % every else []
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            save_rollouts(
                folder / ROLLOUTS.format(rank=self.accelerator.process_index), self._step, rest
            )
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._check_same_policy(resume_from_checkpoint)
        self._load_weights(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, ROLLOUTS.format(rank=self.accelerator.process_index))
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} holds no {path.name}: resume with as many "
                f"processes as wrote it, or start a new run from its weights"
            )
        self._step, rest = load_rollouts(path, self.accelerator.device)
        self._buffered_inputs = rest or None

    def _load_weights(self, folder: str, model) -> None:
        super()._load_from_checkpoint(folder, model)


class LeaveOneOut:
    """Mixin of a trainer, before it among its bases: advantages against the mean of the others to a
    prompt (arXiv:2402.14740), neither scaled nor normalised. Every completion needs a reward."""

    _scores_each_row = True

    def _with_advantages(self, batch, rollout):
        advantages = leave_one_out(rollout.rewards, self._group)
        self._relog_advantages(advantages)
        return batch | {"advantages": self._local(advantages)}
