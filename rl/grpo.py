"""GRPO on a soft policy: a think step's action is its K draws, so its log-probability is exact
(ar.md 2, option B).

A rollout is decoded by `softar.generate`, or on vLLM, and replayed in one parallel forward, from
the mixtures that it recorded: they are transitions of the environment, without gradient. With one
draw a step the loss is TRL's.

Shapes: B rows, P prompt length, C completion steps, K draws, J ratios of a step, V vocabulary.
"""

import copy
import logging
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import _ForwardRedirection, unwrap_model_for_generation
from trl.trainer.utils import create_model_from_path, pad, use_adapter

from softar.decode import SoftOutput, generate
from softar.soft import entropy
from softar.thought import Kind
from softar.training import check_writable, no_interrupt

from .actions import ACTIONS, replay
from .config import SoftGRPOConfig, check_origin, check_resume
from .discretise import discretise
from .losses import aggregate, surrogate
from .rewards import check_scored, checked
from .rollout import generators, load_rollouts, mixture, payload, save_rollouts, statistics, still

logger = logging.getLogger(__name__)
ROLLOUTS = "rollouts-{rank}.safetensors"
QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}


class SoftGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with soft rollouts and their replay.

    Takes the models, reward functions and datasets that TRL takes, text only. A reward function
    gets `completions` and `completion_ids` after `args.reward_sees`, not the raw stream. Dropout
    stays off, in rollout and replay: both must be the same policy. With beta > 0 the reference is
    the model as it was given (a frozen copy), or under PEFT the model without its new adapter. Each
    checkpoint holds soft_config.json, the policy as a way to decode. With args.rollout="vllm" an
    engine of vLLM runs in this process from here on; `close` ends it.
    """

    _tag_names = ["trl", "grpo", "softar"]
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
        if not isinstance(args, SoftGRPOConfig):
            raise ValueError(f"args={args!r}: {name} needs a SoftGRPOConfig")
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError(
                f"processing_class={processing_class!r}: {name} needs the model's tokenizer"
            )
        for key in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(key) is not None:
                raise ValueError(
                    f"{key}={kwargs[key]!r}: {name} rolls out a single soft turn, leave it out"
                )
        if not reward_funcs:
            raise ValueError(f"reward_funcs={reward_funcs!r}: give at least one")
        check_writable(args.output_dir)
        self._decoding = args.decoding().resolve(processing_class)
        check_origin(model, args)

        # TRL would load the reference again by the policy's name: an embedded model has none on the
        # hub, and one in memory need not be what the name says. The copy is made before TRL patches
        # the policy's forward.
        adapted = peft_config is not None or (isinstance(model, nn.Module) and is_peft_model(model))
        reference, args = None, copy.copy(args)
        beta, args.beta = args.beta, args.beta if adapted else 0.0
        if beta and not adapted:
            if isinstance(model, str):
                reference = create_model_from_path(model, **(args.model_init_kwargs or {}))
            else:
                reference = copy.deepcopy(model)
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
        if reference is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"beta={beta}: under FSDP or DeepSpeed a reference needs PEFT, give a peft_config"
                )
            reference.requires_grad_(False)
            self.ref_model = self.accelerator.prepare_model(reference.eval(), evaluation_mode=True)
        if self.aux_loss_enabled:
            given = f"router_aux_loss_coef={self.router_aux_loss_coef}"
            raise ValueError(
                f"{given}: {name} leaves out the experts' load-balancing loss, set it to 0 to agree"
            )
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            given = self.model.active_peft_config.peft_type.value
            raise ValueError(
                f"peft_type={given}: {name} replays mixtures, virtual tokens are not tried; use LoRA"
            )
        if rates := sorted(
            {m.p for m in self.model.modules() if isinstance(m, nn.Dropout) and m.p}
        ):
            logger.warning(
                "dropout %s stays off: the replay must score the policy that was rolled out", rates
            )
        pairs = zip(self.reward_func_names, self.reward_funcs, strict=True)
        self.reward_funcs = [
            f if isinstance(f, nn.Module) else checked(label, f) for label, f in pairs
        ]
        self._action = ACTIONS[args.soft_mixer]
        self._eval_rollouts = 0
        self._engine, self._engine_is_current = None, False
        if args.rollout == "vllm":
            from .vllm_rollout import VLLMRollout

            self._engine = VLLMRollout(
                self.model,
                self.accelerator,
                self._tokenizer,
                self._decoding,
                self.eos_token_ids,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_length=args.vllm_max_model_length,
                max_num_seqs=max(
                    args.per_device_train_batch_size * args.steps_per_generation,
                    args.per_device_eval_batch_size,
                ),
                model_impl=args.vllm_model_impl,
            )

    # -- rollout

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ):
        """Decode softly. -> the recorded tokens of each row, which give TRL its lengths; the rest
        is in `_out`."""
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
        self._out = (
            self._loop(ids, mask, rng)
            if self._engine is None
            else self._ask_engine(prompt_ids, rng)
        )
        rows = zip(
            self._out.completions.tolist(),
            (self._out.record.kind != Kind.PAD).sum(1).tolist(),
            strict=True,
        )
        return [row[:n] for row, n in rows], None

    def _loop(self, ids: Tensor, mask: Tensor, rng: list[torch.Generator]) -> SoftOutput:
        training = self.model.training
        settings = GenerationConfig(
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self.eos_token_ids,
            cache_implementation=self.args.cache_implementation,
        )
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as unwrapped,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            # The model's own settings would fill what these leave open: a repetition penalty,
            # suppressed tokens
            base = unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped
            kept, base.generation_config = base.generation_config, settings
            unwrapped.eval()
            try:
                return generate(
                    unwrapped, ids, mask, config=self._decoding, rng=rng, generation_config=settings
                )
            finally:
                unwrapped.train(training)
                base.generation_config = kept

    def _ask_engine(self, prompts: list[list[int]], rng: list[torch.Generator]) -> SoftOutput:
        """The same on vLLM. Every training rollout follows an update, so the engine gets the
        weights anew; those of an evaluation share them."""
        if self.model.training or not self._engine_is_current:
            self._engine.model = self.model
            self._engine.sync_weights()
        self._engine_is_current = not self.model.training
        return self._engine.decode(prompts, [g.initial_seed() for g in rng])

    def _generate_and_score_completions(self, inputs):
        self._old_values = None
        batch = super()._generate_and_score_completions(inputs)
        batch |= payload(self._out.record, batch["completion_ids"].shape[1])
        # TRL's mask is 0 where mask_truncated_completions leaves a row out, and on padding
        batch["loss_mask"] = (batch["soft_action"] & batch["completion_mask"].bool()).float()
        batch["num_items_in_batch"] = self.accelerator.gather(batch["loss_mask"].sum()).sum()
        self._note_rollout()
        return batch

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **vision,
    ):
        """The rollout's log-probabilities [B, C, J] by replay, asked for where they will be
        needed."""
        batch = payload(self._out.record, logits_to_keep)
        length = input_ids.shape[1] - logits_to_keep
        batch["prompt_ids"], batch["prompt_mask"] = (
            input_ids[:, :length],
            attention_mask[:, :length],
        )
        logps, self._old_values = self._replay_rows(model, batch, batch_size or len(input_ids))
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
        ids = discretise(self._out.record, self._out.answer_start, self.args.reward_sees)
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
        # [rows of all processes]
        self._rewards = total.masked_fill(rewards.isnan().all(1), torch.nan)
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

    def _note_rollout(self) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        found = statistics(
            self._out, self._decoding.think_end is not None or self._decoding.budget is not None
        )
        sums = torch.stack(
            [torch.stack([part.float() for part in pair]) for pair in found.values()]
        )
        for name, (total, count) in zip(found, self.accelerator.reduce(sums).tolist(), strict=True):
            if count:
                metrics[f"soft/{name}"].append(total / count)
        for name, at in QUANTILES.items():
            metrics[f"reward/{name}"].append(self._rewards.nanquantile(at).item())

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
            still(unwrapped)

        def forward(prompt_ids: Tensor) -> tuple[Tensor, Tensor | None]:
            with self.accelerator.autocast():
                return (
                    self._forward(unwrapped, batch)
                    if policy
                    else (self._logits(unwrapped, batch), None)
                )

        logits, values = _ForwardRedirection()(model, unwrapped, forward, batch["prompt_ids"])
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
        """The clipped surrogate, plus beta times the exact KL, minus entropy_coef times the
        entropy."""
        args, mask, soft = self.args, inputs["loss_mask"], mixture(inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        new = self._action.logp(logits, soft)  # [B, C, J]
        old = inputs.get("old_per_token_logps", new.detach())
        advantages = inputs["advantages"]
        drawn = soft.weights[..., : new.shape[-1]] > 0
        per_step = surrogate(
            new,
            old,
            advantages,
            self.epsilon_low,
            self.epsilon_high,
            ratio=args.soft_ratio,
            draws=drawn,
        )
        if reference is not None:
            kl = self._action.kl(logits, reference, soft)
            per_step = per_step + args.beta * kl
            metrics["kl"].append(self._mean(kl, mask))
        loss = self._normalised(per_step, mask, inputs["num_items_in_batch"])
        with torch.set_grad_enabled(bool(args.entropy_coef) and torch.is_grad_enabled()):
            h = entropy(logits)
        if args.entropy_coef:
            loss = (
                loss
                - args.entropy_coef
                * (h * mask).sum()
                / mask.sum().clamp(min=1)
                / self._accumulation
            )
        metrics["entropy"].append(self._mean(h.detach(), mask))
        self._note_ratios(new.detach(), old, advantages, mask, drawn, metrics)
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

    def _note_ratios(self, new, old, advantages, mask, drawn, metrics) -> None:
        """Share of draws that the clip holds, and how far a ratio is from 1: on the first pass it
        is not."""
        if self.args.soft_ratio == "joint":
            new, old, drawn = new.sum(-1, keepdim=True), old.sum(-1, keepdim=True), drawn[..., :1]
        ratio = (new - old).exp()
        sign = advantages.view(len(ratio), -1, 1)
        mask = mask[..., None] * drawn
        low = (ratio < 1 - self.epsilon_low) & (sign < 0)
        high = (ratio > 1 + self.epsilon_high) & (sign > 0)
        for name, clipped in (("low_mean", low), ("high_mean", high), ("region_mean", low | high)):
            metrics[f"clip_ratio/{name}"].append(self._mean(clipped.float(), mask))
        furthest = ((ratio - 1).abs() * mask).amax()
        metrics["ratio/max_deviation"].append(self.accelerator.gather(furthest).amax().item())

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
        check_resume(resume_from_checkpoint, self.args)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, ROLLOUTS.format(rank=self.accelerator.process_index))
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} holds no {path.name}: resume with as many "
                f"processes as wrote it, or start a new run from its weights"
            )
        self._step, rest = load_rollouts(path, self.accelerator.device)
        self._buffered_inputs = rest or None
