"""GRPO on a soft policy: a think step's action is its K draws, so its log-probability is exact.

A rollout is decoded by `softar.generate`, or on vLLM, and replayed in one parallel forward, from
the mixtures that it recorded: they are transitions of the environment, without gradient. With one
draw a step the loss is TRL's.

Shapes: B rows, P prompt length, C completion steps, K draws, J ratios of a step, V vocabulary.
"""

import copy
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl.data_utils import is_conversational
from trl.trainer.utils import pad, use_adapter

from softar.decode import SoftOutput
from softar.model_card import OwnCard
from softar.models import plain
from softar.thought import Kind
from softar.training import WatchedLosses, check_arguments, inside_forward, no_interrupt

from . import guards
from .actions import ACTIONS, replay
from .config import SoftGRPOConfig
from .discretise import discretise
from .losses import aggregate, surrogate
from .metrics import ratio_metrics, rollout_metrics
from .rewards import check_scored, with_checks
from .rollout import (
    Rollout,
    decode_by_loop,
    frozen_copy,
    generators,
    load_rollouts,
    mixture,
    save_rollouts,
    switch_off_dropout,
)
from .trl_trainer import GRPOTrainer

ROLLOUTS = "rollouts-{rank}.safetensors"


class SoftGRPOTrainer(WatchedLosses, OwnCard, GRPOTrainer):
    """TRL's GRPOTrainer with soft rollouts and their replay.

    Takes the models, reward functions and datasets that TRL takes, text only. A reward function
    gets `completions`, without special tokens, and `completion_ids`, with them, after
    `args.reward_sees`, not the raw stream. Dropout
    stays off, in rollout and replay: both must be the same policy. With beta > 0 the reference is
    the model as it was given (a frozen copy), or under PEFT the model without its new adapter. Each
    checkpoint holds soft_config.json, the policy as a way to decode. With args.rollout="vllm" an
    engine of vLLM runs in this process from here on; `close` ends it.
    """

    _tag_names = ["trl", "grpo", "softar"]
    _config = SoftGRPOConfig
    _scores_each_row = False  # or may the reward functions leave a completion without a score?

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: SoftGRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        peft_config=None,
        **kwargs,
    ):
        name = type(self).__name__
        check_arguments(name, model, self._config, args, processing_class)
        guards.check_turn(name, reward_funcs, kwargs)
        guards.check_prompts(name, train_dataset, "train_dataset")
        self.decoding = args.decoding().resolve(processing_class)
        guards.check_origin(model, args)
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
        args.beta = beta
        # TRL would replay the reference on token ids, `_compute_loss` does it on the mixtures
        self.beta = 0.0
        aux_coef = self.router_aux_loss_coef if self.aux_loss_enabled else None
        guards.check_trainable(name, self.model, aux_coef)
        guards.check_prompt_room(
            plain(self.model), processing_class, self.train_dataset, args.max_completion_length
        )
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
        self._action = ACTIONS[args.soft_mixer]
        self._rollout: Rollout | None = None  # the one that TRL's hooks are at work on
        self._eval_rollouts = 0
        self._engine = self._start_engine() if args.rollout == "vllm" else None
        self._engine_is_current = False

    def _start_engine(self):
        from .vllm_rollout import VLLMRollout

        args = self.args
        train_rows = args.per_device_train_batch_size * args.steps_per_generation
        return VLLMRollout(
            self.model,
            self.accelerator,
            self._tokenizer,
            self.decoding,
            self.eos_token_ids,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=max(train_rows, args.per_device_eval_batch_size),
            model_impl=args.vllm_model_impl,
        )

    # -- rollout

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ):
        """Decode softly. -> the recorded tokens of each row, which give TRL its lengths."""
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
        if self._engine is None:
            out = decode_by_loop(self, ids, mask, rng)
        else:
            out = self._ask_engine(prompt_ids, rng)
        self._rollout = Rollout(out)
        lengths = (out.record.kind != Kind.PAD).sum(1).tolist()
        return [row[:n] for row, n in zip(out.completions.tolist(), lengths, strict=True)], None

    def _ask_engine(self, prompts: list[list[int]], rng: list[torch.Generator]) -> SoftOutput:
        """The same on vLLM. Every training rollout follows an update, so the engine gets the
        weights anew; those of an evaluation share them."""
        if self.model.training or not self._engine_is_current:
            self._engine.model = self.model
            self._engine.sync_weights()
        self._engine_is_current = not self.model.training
        return self._engine.decode(prompts, [g.initial_seed() for g in rng])

    def _generate_and_score_completions(self, inputs):
        self._rollout = None
        batch = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = self._rollout, None
        batch |= rollout.payload(batch["completion_ids"].shape[1])
        # TRL's mask is 0 where mask_truncated_completions leaves a row out, and on padding
        batch["loss_mask"] = (batch["soft_action"] & batch["completion_mask"].bool()).float()
        batch["num_items_in_batch"] = self.accelerator.gather(batch["loss_mask"].sum()).sum()
        has_answer = self.decoding.has_answer
        self._note(rollout_metrics(rollout, has_answer, self.accelerator.reduce))
        return self._with_advantages(batch, rollout)

    def _with_advantages(self, batch: dict[str, Tensor], rollout: Rollout) -> dict[str, Tensor]:
        """The batch with the advantages of this method; GRPO's are those that TRL put there."""
        return batch

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **options
    ):
        """The rollout's log-probabilities [B, C, J] by replay, asked for where they will be
        needed."""
        length = input_ids.shape[1] - logits_to_keep
        batch = self._rollout.payload(logits_to_keep) | {
            "prompt_ids": input_ids[:, :length],
            "prompt_mask": attention_mask[:, :length],
        }
        size = batch_size or len(input_ids)
        logps, self._rollout.values = self._replay_rows(model, batch, size)
        return logps, None, None

    @torch.no_grad()
    def _replay_rows(
        self, model, batch: dict[str, Tensor], size: int
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [B, C, J] and, with a value head, values [B, C], `size` rows at a
        time."""
        logps, values = [], []
        for start in range(0, len(batch["prompt_ids"]), size):
            piece = {
                key: value[start : start + size] for key, value in batch.items() if value.dim()
            }
            logits, value = self._replay(model, piece)
            logps.append(self._action.logp(logits, mixture(piece)))
            values.append(value)
        return torch.cat(logps), None if values[0] is None else torch.cat(values)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's, on what the rewards may see of a soft completion."""
        out = self._rollout.out
        ids = discretise(out.record, out.answer_start, self.args.reward_sees)
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        self._log_completion_extra("reward_saw", texts)
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        else:
            completions = texts
        rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
        check_scored(
            rewards, self.reward_func_names, self.reward_funcs, each_row=self._scores_each_row
        )
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._rollout.rewards = total.masked_fill(rewards.isnan().all(1), torch.nan)
        return rewards

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

    # -- replay and loss

    def _replay(
        self, model, batch: dict[str, Tensor], *, policy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C, V] float32 over the temperature, and the values [B, C] of a policy that has
        them.

        Runs inside the wrapper's forward, where DDP and FSDP have the parameters at hand.
        """
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if unwrapped.training:
            switch_off_dropout(unwrapped)

        def forward(prompt_ids: Tensor) -> tuple[Tensor, Tensor | None]:
            with self.accelerator.autocast():
                if policy:
                    return self._forward(unwrapped, batch)
                return self._logits(unwrapped, batch), None

        logits, values = inside_forward(model, unwrapped, forward, batch["prompt_ids"])
        return logits.float() / self.temperature, values

    def _forward(self, model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return self._logits(model, batch), None

    def _logits(self, model, batch: dict[str, Tensor]) -> Tensor:
        return replay(
            model,
            batch["prompt_ids"],
            batch["prompt_mask"],
            mixture(batch),
            batch["soft_alive"],
            embedding_grad=self.args.embedding_grad,
        )

    @torch.no_grad()
    def _reference(self, model, batch: dict[str, Tensor]) -> Tensor:
        """The reference's logits [B, C, V] on the same recorded inputs, over the same
        temperature."""
        if self.ref_model is not None:
            return self._replay(self.ref_model, batch, policy=False)[0]
        adapted = self.accelerator.unwrap_model(model)
        with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
            return self._replay(model, batch, policy=False)[0]

    def _compute_loss(self, model, inputs):
        reference = self._reference(model, inputs) if self.args.beta else None
        logits, _ = self._replay(model, inputs)
        return self._policy_loss(logits, reference, inputs)

    def _policy_loss(
        self, logits: Tensor, reference: Tensor | None, inputs: dict[str, Tensor]
    ) -> Tensor:
        """The clipped surrogate, plus beta times the KL, minus entropy_coef times the entropy, both
        exact in value and of all draws of a step."""
        args, mask, soft = self.args, inputs["loss_mask"], mixture(inputs)
        new = self._action.logp(logits, soft)  # [B, C, J]
        old = inputs.get("old_per_token_logps", new.detach())
        drawn = soft.weights[..., : new.shape[-1]] > 0
        clip = inputs["advantages"], self.epsilon_low, self.epsilon_high
        per_step = surrogate(new, old, *clip, ratio=args.soft_ratio, draws=drawn, delta=args.delta)
        if reference is not None:
            kl = self._action.kl(logits, reference, soft)
            per_step = per_step + args.beta * kl
            self._note({"kl": self._mean(kl, mask)})
        loss = self._normalised(per_step, mask, inputs["num_items_in_batch"])
        with torch.set_grad_enabled(bool(args.entropy_coef) and torch.is_grad_enabled()):
            h = self._action.entropy(logits, soft)
        if args.entropy_coef:
            mean = (h * mask).sum() / mask.sum().clamp(min=1)
            loss = loss - args.entropy_coef * mean / self._accumulation
        self._note({"entropy": self._mean(h.detach(), mask)})
        if args.soft_ratio == "joint":
            new, old, drawn = new.sum(-1, True), old.sum(-1, True), drawn[..., :1]
        mask = mask[..., None] * drawn
        self._note(
            ratio_metrics(new.detach(), old, clip, mask, self._mean, self.accelerator.gather)
        )
        return loss

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

    def evaluate(self, *args, **kwargs):
        self._eval_rollouts = 0  # every evaluation draws the same numbers
        return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        self._engine_is_current = False  # whatever happened to the weights since
        return super().evaluation_loop(*args, **kwargs)

    def close(self) -> None:
        """End vLLM's engine, if there is one, and let go of its memory: no rollouts after this."""
        if self._engine is not None:
            self._engine.close()

    # -- checkpoints

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        self.args.decoding().save(output_dir or self.args.output_dir)

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
        guards.check_same_policy(resume_from_checkpoint, self.args)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, ROLLOUTS.format(rank=self.accelerator.process_index))
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} holds no {path.name}: resume with as many "
                f"processes as wrote it, or start a new run from its weights"
            )
        self._step, rest = load_rollouts(path, self.accelerator.device)
        self._buffered_inputs = rest or None
