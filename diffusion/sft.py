"""Masked-diffusion SFT on TRL's trainer: LLaDA's, Dream's and BERT's objectives, hard or with soft masks.

Soft-mask training (arXiv:2510.17206, section 4.2) reads a noisy row twice: once without gradient, for the model's
belief about each mask, and once more with the masks showing that belief.

Shapes: B rows, T positions, V vocabulary, D width; n masked positions, flat, row by row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer
from trl.models.utils import _ForwardRedirection

from softar.sft import check_writable, no_interrupt
from softar.sft_config import PlainSFTConfig, opt
from softar.sft_data import SoftCollator
from softar.soft import soft_embed

from .config import DenoiseConfig
from .evaluate import evaluate
from .head import ALGORITHMS, SoftMaskHead, save_head
from .losses import (
    NORMALISATIONS,
    forward_masked,
    mask_at_rate,
    mask_share,
    masked_ce,
    uniform_rows,
    weighted_sum,
)
from .models import LladaForMaskedDiffusion, facts, learn_head, llama_name, parts, plain
from .select import Belief
from .soften import Slots

RAW_HEAD = "soft_mask_head.safetensors"
NOISES = {"rate": mask_at_rate, "share": mask_share}


@dataclass
class DiffusionSFTConfig(PlainSFTConfig):
    """TRL's SFTConfig plus the noise and the head. Without an accelerator it trains on the CPU in float32 by itself."""

    gradient_checkpointing: bool = opt(False, "Recompute activations to save memory.")
    noise: str = opt("rate", "'rate': each token masked with probability t (LLaDA). 'share': t of the tokens (BERT).")
    time_low: float = opt(0.0, "Least t.")
    time_high: float = opt(1.0, "Largest t.")
    noise_eps: float = opt(1e-3, "The rate is (1 - eps) t + eps.")
    normalise: str = opt("answer", "Weights of the loss: 'answer' (LLaDA's SFT), 'tokens' (pre-training), 'masks'.")
    train_padding: bool = opt(False, "Pad with end-of-text and train it as part of the answer, as LLaDA does.")
    softmasking_prob: float = opt(0.0, "Share of the steps that read the row twice; 0 is hard training.")
    head_k: int = opt(3, "Soft masks: tokens in a mixture.")
    head_algorithm: str = opt("top-k", "Soft masks: 'top-k', or 'temperature' over the whole vocabulary.")
    head_scale: float = opt(1e-6, "Soft masks: scale at the start, in (0, 1).")
    head_centre: float = opt(-0.75, "Soft masks: centre at the start, nats below 0.")
    head_steepness: float = opt(20 / 3, "Soft masks: steepness at the start.")
    head_temperature: float = opt(1.0, "Soft masks: temperature at the start, of 'temperature'.")
    head_learning_rate: float = opt(1e-2, "Soft masks: learning rate of the head, without weight decay.")
    eval_decode_rows: int = opt(256, "Held-out rows decoded for the accuracy of an evaluation; 0 for none.")
    eval_steps_decoded: int = opt(8, "Forwards in which an evaluation decodes a row.")

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("noise", tuple(NOISES)), ("normalise", NORMALISATIONS),
                            ("head_algorithm", tuple(ALGORITHMS))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {known}")
        if not 0 <= self.time_low <= self.time_high <= 1:
            raise ValueError(f"time_low={self.time_low}, time_high={self.time_high}: need 0 <= low <= high <= 1")
        if not 0 < self.noise_eps < 1:
            raise ValueError(f"noise_eps={self.noise_eps} must lie in (0, 1)")
        if not 0 <= self.softmasking_prob <= 1:
            raise ValueError(f"softmasking_prob={self.softmasking_prob} must lie in [0, 1]")
        if not self.head_learning_rate >= 0:
            raise ValueError(f"head_learning_rate={self.head_learning_rate} must be >= 0")
        for name, least in (("eval_decode_rows", 0), ("eval_steps_decoded", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.softmasking_prob:
            self.head()

    def head(self) -> SoftMaskHead:
        return SoftMaskHead(k=self.head_k, scale=self.head_scale, centre=self.head_centre,
                            steepness=self.head_steepness, temperature=self.head_temperature,
                            algorithm=self.head_algorithm)  # fmt: skip


class DiffusionSFTTrainer(SFTTrainer):
    """TRL's SFTTrainer with a masked-diffusion loss in `compute_loss`.

    Takes the datasets that TRL takes, prompt-completion or language modelling; prompts are never masked. The model
    comes from `softar.diffusion.load`. With `softmasking_prob` a SoftMaskHead is trained along; each checkpoint holds
    its values in transparency_config.json, from where `load` and `denoise` take them. With `score(answer, row)` every
    evaluation also decodes held-out rows.
    """

    _tag_names = ["trl", "sft", "softar", "masked-diffusion"]
    loss_is_scaled_for_ga = False  # each row weighs the same, whatever its length

    def __init__(self, model, args: DiffusionSFTConfig, *, train_dataset, eval_dataset=None, processing_class=None,
                 score: Callable[[str, dict], float] | None = None, **kwargs):  # fmt: skip
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError(f"processing_class={processing_class!r}: DiffusionSFTTrainer needs the model's tokenizer")
        check_writable(args.output_dir)
        known = facts(model)
        self._score, self._decode_rows = score, eval_dataset
        self._fill = known.eos_id if args.train_padding else processing_class.pad_token_id
        if self._fill is None:
            raise ValueError(f"train_padding={args.train_padding}: the model has no such token to pad with")
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=SoftCollator(self._fill),
            **kwargs,
        )
        self._known = known
        self.head = None
        plain(self.model).config.soft_mask = None  # what an earlier training taught it; told anew when it is saved
        if args.softmasking_prob:
            self.head = args.head().to(self.model.device)
            plain(self.model).add_module(
                "soft_mask_head", self.head
            )  # so that DDP, the optimiser and checkpoints see it
        self._micro = 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._micro = 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # -- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, training = self.args, self.model.training
        unwrapped = plain(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        maskable = inputs["labels"] != -100
        if args.train_padding:
            maskable, mask = maskable | (mask == 0), None
        elif bool(mask.all()):
            mask = None
        if not maskable.any(1).all():
            raise ValueError(
                f"row {int((~maskable.any(1)).nonzero()[0])} of the batch has no token to mask: no completion"
            )
        rate, noise, twice = self._draw(maskable)
        masked = NOISES[args.noise](maskable, rate, noise)
        noisy = ids.masked_fill(masked, self._known.mask_id)

        # PEFT hands its argument on by the name that a model has for it, with others beside.
        def forward(input_ids: Tensor, **_) -> tuple[Tensor, Tensor, Tensor | float]:
            """Inside the wrapper's forward, where DDP and FSDP have the parameters at hand."""
            net = parts(unwrapped)
            embeds = net.embedding(input_ids)
            if twice:
                embeds = embeds.masked_scatter(masked[..., None], self._mix(net, embeds, mask, masked).to(embeds.dtype))
            rows, logits = forward_masked(net, self._known, embeds, mask, masked)
            # DDP wants each parameter in what the forward returns, the head's in a hard step too.
            nothing = 0.0 if self.head is None else sum(0.0 * p for p in self.head.parameters())
            return rows, logits, nothing

        rows, logits, nothing = _ForwardRedirection()(model, unwrapped, forward, noisy)
        ce = masked_ce(logits, ids[masked])
        total, divisor = weighted_sum(ce, rows, rate, maskable.sum(1), args.normalise)
        if training and self.accelerator.num_processes > 1:  # DDP takes the mean of the processes' losses
            divisor = self.accelerator.reduce(divisor, "mean")
        loss = total / divisor + nothing
        self._note(training, masked.float().mean() if training else None)
        return (loss, CausalLMOutput(logits=logits)) if return_outputs else loss

    def _mix(self, net, embeds: Tensor, mask: Tensor | None, masked: Tensor) -> Tensor:
        """[n, D] what the masked slots show: the belief of a pass without gradient, mixed by the head with one."""
        with torch.no_grad():
            rows, logits = forward_masked(net, self._known, embeds, mask, masked)
            logits = logits.float()
            logits[:, self._known.mask_id] = torch.finfo(logits.dtype).min
            belief = Belief(logits, with_entropy=True)
        n = len(rows)
        ids = torch.full((n,), self._known.mask_id, device=logits.device)
        slots = Slots(belief, ids, torch.ones_like(ids, dtype=torch.bool), torch.ones(n, device=logits.device),
                      self._known.mask_id, net.embedding)  # fmt: skip
        return soft_embed(self.head(slots), net.embedding)

    def _draw(self, maskable: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Rates [B], uniform numbers [B, T], and whether this step reads twice. They depend on the seed, the step and
        the row's place in the global batch: a resumed run or another number of processes draws the same."""
        args, micro = self.args, self._micro
        self._micro += 1
        B, T = maskable.shape
        training = self.model.training
        rows = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = (micro * world + rank) * rows
        step = self.state.global_step if training else 2**31  # an evaluation always sees the same noise
        numbers = uniform_rows(args.seed, step, list(range(first, first + B)), T + 1).to(maskable.device)
        time = args.time_low + (args.time_high - args.time_low) * numbers[:, 0]
        twice = self.head is not None
        if training and twice:
            twice = float(uniform_rows(args.seed, step, [2**31 - 1 - micro], 1)) < args.softmasking_prob
        return (1 - args.noise_eps) * time + args.noise_eps, numbers[:, 1:], twice

    def _note(self, training: bool, share: Tensor | None) -> None:
        if not training or (self.state.global_step + 1) % max(1, int(self.state.logging_steps)):
            return  # a step that is not logged need not wait for the device
        metrics = self._metrics["train"]
        metrics["masked"].append(share.item())
        if self.head is not None:
            for name, value in self.head.values().items():
                metrics[f"head_{name}"].append(value.item())

    # -- optimiser, evaluation, checkpoints ---------------------------------------------------------------------------

    def create_optimizer(self, *args, **kwargs):
        made = super().create_optimizer(*args, **kwargs)
        if self.head is not None:
            own = {id(p) for p in self.head.parameters()}
            for group in self.optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            learnt = [p for p in self.head.parameters() if p.requires_grad]
            self.optimizer.add_param_group({"params": learnt, "lr": self.args.head_learning_rate, "weight_decay": 0.0})
        return made

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self._micro = 0
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        n = self.args.eval_decode_rows
        if self._score is not None and self._decode_rows is not None and n:
            rows = self._decode_rows.select(range(min(len(self._decode_rows), n)))
            found = evaluate(self.accelerator.unwrap_model(self.model), self.processing_class, rows, self._score,
                             self.decoding(steps=self.args.eval_steps_decoded), seed=self.args.seed)  # fmt: skip
            metrics[f"{metric_key_prefix}_accuracy"] = found["accuracy"]
            self.log({f"{metric_key_prefix}_accuracy": found["accuracy"]})
        return metrics

    def decoding(self, **changes) -> DenoiseConfig:
        """How the model is decoded as it was trained: hard, or with the head's soft masks."""
        if self.head is None:
            return DenoiseConfig(**({"soften": "hard"} | changes))
        return DenoiseConfig(**({"soften": "soft-mask", "soften_args": self.head.settings()} | changes))

    def _save(self, output_dir: str | None = None, state_dict=None):
        if self.head is not None:
            learn_head(self.model, self.head.settings())
            # The raw numbers belong to the decoding, not to the model.
            state_dict = self.accelerator.get_state_dict(self.model) if state_dict is None else state_dict
            state_dict = {k: v for k, v in state_dict.items() if "soft_mask_head." not in k}
        super()._save(output_dir, state_dict)
        if self.head is not None:
            folder = Path(output_dir or self.args.output_dir)
            save_head(self.head.settings(), folder)
            save_file(self.head.state_dict(), folder / RAW_HEAD)  # what resuming goes on from, to the bit

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        inner = plain(self.model)
        if inner is self.model and isinstance(inner, LladaForMaskedDiffusion):
            # The trainer would take the original names for unknown ones, and go on with the weights it has.
            saved = {}
            for file in sorted(Path(resume_from_checkpoint).glob("model*.safetensors")):
                saved |= {llama_name(name): value for name, value in load_file(file).items()}
            found = inner.load_state_dict(saved, strict=False)
            elsewhere = ("soft_mask_head.", *(["lm_head."] if inner.config.tie_word_embeddings else []))
            missing = [name for name in found.missing_keys if not name.startswith(elsewhere)]
            if found.unexpected_keys or missing:
                raise ValueError(f"resume_from_checkpoint={str(resume_from_checkpoint)!r} does not fit the model: "
                                 f"missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}")  # fmt: skip
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.head is not None:
            file = Path(resume_from_checkpoint, RAW_HEAD)
            if not file.is_file():
                raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint!r} holds no {RAW_HEAD}: it was hard")
            self.head.load_state_dict(load_file(file))

    def _save_checkpoint(self, model, trial):
        with no_interrupt():
            super()._save_checkpoint(model, trial)
