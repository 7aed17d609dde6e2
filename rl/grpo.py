"""GRPO on a soft policy: a think step's action is what it drew, so its log-probability is exact.

A rollout is decoded by `softar.generate`, or on vLLM, and replayed in one parallel forward, from
the mixtures that it recorded: they are transitions of the environment, without gradient. With one
draw a step the loss is TRL's.

Shapes: B rows, P prompt length, C completion steps, K draws, J ratios of a step, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig
from trl.trainer.utils import use_adapter

from softar.caches import set_cache
from softar.config import CONFIG_FILE
from softar.decode import SoftOutput
from softar.evaluate import prefixed_rows
from softar.guard import check_prefix
from softar.model_card import changes_of
from softar.models import plain, room_of
from softar.split import check_split
from softar.thought import Kind
from softar.training import inside_forward

from . import guards
from .actions import ACTIONS, mixture, replay
from .base import RolloutGRPO
from .config import SoftGRPOConfig
from .discretise import seen
from .losses import surrogate
from .metrics import ratio_metrics, rollout_metrics
from .rewards import UNPREFIXED
from .rollout import Rollout, decode_by_loop, switch_off_dropout


class SoftGRPOTrainer(RolloutGRPO):
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

    def __init__(
        self, model, reward_funcs=None, args: SoftGRPOConfig | None = None, *rest, **kwargs
    ):
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._action = ACTIONS[self.args.soft_mixer]
        self._engine = self._start_engine() if self.args.rollout == "vllm" else None
        self._engine_is_current = False

    def _check_policy(self, model, args, tokenizer):
        self.policy = guards.policy_of(model, args)
        # of ids, which have the prefix
        self.decoding = self.policy.changed(prompt_prefix=None).resolve(tokenizer)

    def _as_read(self, rows):
        columns = getattr(rows, "column_names", None) or ()
        if UNPREFIXED in columns:  # the constructor's rows, or some of them
            return rows
        return prefixed_rows(rows, self.policy.prompt_prefix, UNPREFIXED)

    def _check_model(self, aux_loss_coef):
        opened = self.args.model_init_kwargs
        guards.check_trainable(type(self).__name__, self.model, aux_loss_coef, opened)
        guards.check_causal(self.model)
        why = "what is compiled does not gather weights, leave it out"
        check_split(self, compile_rollout=(self.args.compile_rollout, why))
        how = self.args.cache_implementation, self.args.compile_rollout
        set_cache(
            self.model, GenerationConfig(), *how
        )  # it says what rollouts are not decoded with
        guards.check_candidates(plain(self.model), self.args)

    def _check_room(self, rows, name):
        room, most = room_of(self.model), self.args.max_completion_length
        longest = room and room - most
        guards.check_prompt_room(self, "max_completion_length", longest, rows, name)

    def _check_same_policy(self, folder):
        guards.check_same_policy(folder, self.policy)

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
            tensor_parallel_size=args.vllm_tensor_parallel_size,
        )

    # -- rollout

    def _decode(self, prompts, ids, mask, rng):
        """Softly, by the loop or on vLLM."""
        check_prefix(ids, self.policy, self._tokenizer)
        if self._engine is None:
            return Rollout(decode_by_loop(self, ids, mask, rng))
        return Rollout(self._ask_engine(prompts, rng))

    def _completions(self, rollout):
        """As recorded."""
        lengths = (rollout.out.record.kind != Kind.PAD).sum(1).tolist()
        return [row[:n] for row, n in zip(rollout.out.completions.tolist(), lengths, strict=True)]

    def _ask_engine(self, prompts: list[list[int]], rng: list[torch.Generator]) -> SoftOutput:
        """The same on vLLM. Every training rollout follows an update, so the engine gets the
        weights anew; those of an evaluation share them."""
        if self.model.training or not self._engine_is_current:
            self._engine.model = self.model
            self._engine.sync_weights()
        self._engine_is_current = not self.model.training
        return self._engine.decode(prompts, [g.initial_seed() for g in rng])

    def _payload(self, rollout, batch):
        tensors = rollout.payload(batch["completion_ids"].shape[1])
        # TRL's mask is 0 where mask_truncated_completions leaves a row out, and on padding
        counts = tensors["soft_action"] & batch["completion_mask"].bool()
        return tensors | {"loss_mask": counts.float()}

    def _rollout_metrics(self, rollout):
        return rollout_metrics(rollout, self.decoding, self.accelerator.reduce)

    def _seen_by_rewards(self, rollout):
        return seen(rollout.out, self._tokenizer, self.args.reward_sees)

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
            drawn, more = self._action.of(piece)
            logps.append(self._action.logp(logits, drawn, **more))
            values.append(value)
        return torch.cat(logps), None if values[0] is None else torch.cat(values)

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
        exact in value and of all draws of a step, the entropy of `gumbel` of the first."""
        args, mask, (soft, more) = self.args, inputs["loss_mask"], self._action.of(inputs)
        new = self._action.logp(logits, soft, **more)  # [B, C, J]
        old = inputs.get("old_per_token_logps", new.detach())
        drawn = soft.weights > 0
        clip = inputs["advantages"], self.epsilon_low, self.epsilon_high
        per_step = surrogate(new, old, *clip, ratio=args.soft_ratio, draws=drawn, delta=args.delta)
        if reference is not None:
            kl = self._action.kl(logits, reference, soft, **more)
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

    def evaluation_loop(self, *args, **kwargs):
        self._engine_is_current = False  # whatever happened to the weights since
        return super().evaluation_loop(*args, **kwargs)

    def close(self) -> None:
        """End vLLM's engine, if there is one, and let go of its memory: no rollouts after this."""
        if self._engine is not None:
            self._engine.close()

    # -- checkpoints

    def card_config(self):
        return CONFIG_FILE, changes_of(self.policy)

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        self.policy.save(output_dir or self.args.output_dir)
