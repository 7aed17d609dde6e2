"""Diffusion SFT on TRL's trainer: LLaDA's, Dream's and BERT's objectives, hard or with soft masks,
and Duo's.

Soft-mask training (arXiv:2510.17206, section 4.2) reads a noisy row twice: once without gradient,
for the model's belief about each mask, and once more with the masks showing that belief. The
uniform objective (arXiv:2506.10892) replaces tokens by random ones instead, and every token of the
answer is predicted: the right ones do not show.

Shapes: B rows, T positions, V vocabulary, D width; n masked positions, flat, row by row.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer

from softar.checks import check_writable
from softar.model_card import OwnCard, changes_of, decode_command
from softar.sft.data import SoftCollator
from softar.soft import soft_embed
from softar.training import MicroBatches, WatchedLosses, inside_forward, no_interrupt

from .architectures import LladaForMaskedDiffusion, llama_name
from .config import DenoiseConfig
from .duo import tau_at
from .evaluate import evaluate
from .head import HEAD_FILE, learn_head, save_head
from .losses import forward_masked, masked_ce, normal_rows, uniform_rows, weighted_sum
from .net import facts, parts, plain
from .noise import NOISE_FILE, UniformNoise, save_noise
from .select import Belief
from .sft_config import NOISES, DiffusionSFTConfig
from .soften import Slots
from .uniform import Noisy, alphabet, draw_hard, draw_soft, uniform_loss

RAW_HEAD = "soft_mask_head.safetensors"
REPLACEMENT, GAUSSIAN = 1, 2  # streams of random numbers


class DiffusionSFTTrainer(WatchedLosses, OwnCard, MicroBatches, SFTTrainer):
    """TRL's SFTTrainer with a diffusion loss in `compute_loss`.

    Takes the datasets that TRL takes, prompt-completion or language modelling; prompts are never
    masked. The model comes from `softar.diffusion.load`. With `softmasking_prob` a SoftMaskHead is
    trained along; each checkpoint holds its values in transparency_config.json, from where `load`
    and `denoise` take them. With objective="uniform" the checkpoint says so in its config.json, an
    adapter in diffusion_process.json. With `score(answer, row)` every evaluation also decodes
    held-out rows.
    """

    _tag_names = ["trl", "sft", "softar", "masked-diffusion"]
    card_method = "that fills masks, trained by masked diffusion"
    loss_is_scaled_for_ga = False  # each row weighs the same, whatever its length

    def __init__(
        self,
        model,
        args: DiffusionSFTConfig,
        *,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        score: Callable[[str, dict], float] | None = None,
        **kwargs,
    ):
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError(
                f"processing_class={processing_class!r}: DiffusionSFTTrainer needs the model's tokenizer"
            )
        check_writable(args.output_dir)
        self._facts = facts(model)
        self._score, self._decode_rows = score, eval_dataset
        self._fill = self._facts.eos_id if args.train_padding else processing_class.pad_token_id
        if self._fill is None:
            raise ValueError(
                f"train_padding={args.train_padding}: the model has no such token to pad with"
            )
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=SoftCollator(self._fill),
            **kwargs,
        )
        self.head = None
        # what an earlier training taught it; set again when this one is saved
        plain(self.model).config.soft_mask = None
        if args.softmasking_prob:
            self.head = args.head().to(self.model.device)
            plain(self.model).add_module(
                "soft_mask_head", self.head
            )  # so that DDP, the optimiser and checkpoints see it
        self._was_uniform = self._facts.uniform is not None
        self.uniform = self._uniform_noise() if args.objective == "uniform" else None
        plain(self.model).config.diffusion_process = (
            None if self.uniform is None else self.uniform.settings()
        )
        if self.uniform is not None:
            self._letters = alphabet(self.uniform, self._facts.vocab_size, self.accelerator.device)

    def _uniform_noise(self) -> UniformNoise:
        """The noise of this training. It leaves out the mask, padding, and rows of the embedding that
        belong to no token."""
        facts, tokenizer = self._facts, self.processing_class
        left_out = {facts.mask_id, *range(len(tokenizer), facts.vocab_size)}
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in facts.end_ids:
            left_out.add(tokenizer.pad_token_id)
        if facts.vocab_size - len(left_out) < 2:
            raise ValueError(
                f"objective='uniform' needs 2 tokens or more beside {sorted(left_out)}, mask and padding"
            )
        return UniformNoise(self.args.noise_eps, tuple(sorted(left_out)))

    # -- loss

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
        compute = self._masked_loss if self.uniform is None else self._uniform_loss
        each, rows, rate, changed, logits, nothing = compute(model, unwrapped, ids, mask, maskable)
        total, divisor = weighted_sum(each, rows, rate, maskable.sum(1), args.normalise)
        # DDP takes the mean of the processes' losses
        if training and self.accelerator.num_processes > 1:
            divisor = self.accelerator.reduce(divisor, "mean")
        loss = total / divisor + nothing
        self._note(training, changed.float().mean() if training else None)
        return (loss, CausalLMOutput(logits=logits)) if return_outputs else loss

    def _masked_loss(
        self, model, unwrapped, ids: Tensor, mask: Tensor | None, maskable: Tensor
    ) -> tuple:
        """-> losses [n] and their rows [n], rate [B], the masks [B, T], logits [n, V], 0."""
        rate, noise, twice = self._draw(maskable)
        masked = NOISES[self.args.noise](maskable, rate, noise)
        noisy = ids.masked_fill(masked, self._facts.mask_id)

        # PEFT hands its argument on by the name that a model has for it, with others beside.
        def forward(input_ids: Tensor, **_) -> tuple[Tensor, Tensor, Tensor | float]:
            """Inside the wrapper's forward, where DDP and FSDP have the parameters at hand."""
            net = parts(unwrapped)
            embeds = net.embedding(input_ids)
            if twice:
                embeds = embeds.masked_scatter(
                    masked[..., None], self._mix(net, embeds, mask, masked).to(embeds.dtype)
                )
            rows, logits = forward_masked(net, self._facts, embeds, mask, masked)
            # DDP wants each parameter in what the forward returns, the head's in a hard step too.
            nothing = 0.0 if self.head is None else sum(0.0 * p for p in self.head.parameters())
            return rows, logits, nothing

        rows, logits, nothing = inside_forward(model, unwrapped, forward, noisy)
        return masked_ce(logits, ids[masked]), rows, rate, masked, logits, nothing

    def _uniform_loss(
        self, model, unwrapped, ids: Tensor, mask: Tensor | None, maskable: Tensor
    ) -> tuple:
        """As `_masked_loss`, about every maskable position, each of weight 1."""
        letters = self._letters
        if bool((wrong := letters.number[ids].lt(0) & maskable).any()):
            raise ValueError(
                f"a completion holds token {int(ids[wrong][0])}, which objective='uniform' leaves out (the mask, or "
                f"padding): take it out of the data, or pad with another token"
            )
        noisy = self._corrupt(ids, maskable, letters)

        def forward(input_ids: Tensor, **_) -> tuple[Tensor, Tensor]:
            net = parts(unwrapped)
            embeds = net.embedding(input_ids)
            if noisy.soft is not None:
                mixed = soft_embed(noisy.soft, net.embedding).to(embeds.dtype)
                embeds = embeds.masked_scatter(maskable[..., None], mixed)
            return forward_masked(net, self._facts, embeds, mask, maskable)

        rows, logits = inside_forward(model, unwrapped, forward, noisy.ids)
        each = uniform_loss(
            self.args.uniform_loss,
            logits,
            ids[maskable],
            noisy.ids[maskable],
            noisy.alpha[rows],
            noisy.dalpha[rows],
            letters,
        )
        return each, rows, torch.ones_like(noisy.alpha), noisy.ids != ids, logits, 0.0

    def _corrupt(self, ids: Tensor, maskable: Tensor, letters) -> Noisy:
        """An evaluation is always about hard tokens: its losses can be compared over the
        training."""
        args = self.args
        step, _, rows = self._place(len(ids))
        numbers = uniform_rows(args.seed, step, rows, ids.shape[1] + 1).to(ids.device)
        t = args.time_low + (args.time_high - args.time_low) * numbers[:, 0]
        tau = 0.0
        if self.model.training and args.curriculum:
            tau = tau_at(
                min(1.0, step / self.state.max_steps), args.tau_start, args.tau_end, args.curriculum
            )
        if tau:
            U = len(letters.ids)
            noise = normal_rows(args.seed, step, rows, maskable, U, stream=GAUSSIAN).to(ids.device)
            return draw_soft(ids, maskable, t, noise, tau, args.gaussian(U), letters)
        tokens = uniform_rows(args.seed, step, rows, ids.shape[1], stream=REPLACEMENT).to(
            ids.device
        )
        return draw_hard(ids, maskable, t, numbers[:, 1:], tokens, letters, self.uniform.eps)

    def _mix(self, net, embeds: Tensor, mask: Tensor | None, masked: Tensor) -> Tensor:
        """[n, D] what the masked slots show: the belief of a pass without gradient, mixed by the
        head with one."""
        with torch.no_grad():
            rows, logits = forward_masked(net, self._facts, embeds, mask, masked)
            logits = logits.float()
            logits[:, self._facts.mask_id] = torch.finfo(logits.dtype).min
            belief = Belief(logits, with_entropy=True)
        n = len(rows)
        ids = torch.full((n,), self._facts.mask_id, device=logits.device)
        slots = Slots(
            belief,
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            torch.ones(n, device=logits.device),
            self._facts.mask_id,
            net.embedding,
        )
        return soft_embed(self.head(slots), net.embedding)

    def _draw(self, maskable: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Rates [B], uniform numbers [B, T], and whether this step reads twice. They depend on the
        seed, the step and the row's place in the global batch: a resumed run or another number of
        processes draws the same."""
        args = self.args
        step, micro, rows = self._place(len(maskable))
        numbers = uniform_rows(args.seed, step, rows, maskable.shape[1] + 1).to(maskable.device)
        time = args.time_low + (args.time_high - args.time_low) * numbers[:, 0]
        twice = self.head is not None
        if self.model.training and twice:
            twice = (
                float(uniform_rows(args.seed, step, [2**31 - 1 - micro], 1)) < args.softmasking_prob
            )
        return (1 - args.noise_eps) * time + args.noise_eps, numbers[:, 1:], twice

    def _place(self, B: int) -> tuple[int, int, list[int]]:
        """The step, the number of the micro-batch in it, and where the micro-batch's rows lie in
        the step's global batch."""
        args, training, micro = self.args, self.model.training, self.next_micro()
        rows = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        first = (micro * self.accelerator.num_processes + self.accelerator.process_index) * rows
        # An evaluation always sees the same noise.
        step = self.state.global_step if training else 2**31
        return step, micro, list(range(first, first + B))

    def _note(self, training: bool, share: Tensor | None) -> None:
        if not training or (self.state.global_step + 1) % max(1, int(self.state.logging_steps)):
            return  # a step that is not logged need not wait for the device
        metrics = self._metrics["train"]
        metrics["masked" if self.uniform is None else "replaced"].append(share.item())
        if self.head is not None:
            for name, value in self.head.values().items():
                metrics[f"head_{name}"].append(value.item())

    # -- optimiser, evaluation, checkpoints

    def create_optimizer(self, *args, **kwargs):
        made = super().create_optimizer(*args, **kwargs)
        if self.head is not None:
            of_head = {id(p) for p in self.head.parameters()}
            for group in self.optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in of_head]
            learnt = [p for p in self.head.parameters() if p.requires_grad]
            self.optimizer.add_param_group(
                {"params": learnt, "lr": self.args.head_learning_rate, "weight_decay": 0.0}
            )
        return made

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        n = self.args.eval_decode_rows
        if self._score is not None and self._decode_rows is not None and n:
            rows = self._decode_rows.select(range(min(len(self._decode_rows), n)))
            scores = evaluate(
                self.accelerator.unwrap_model(self.model),
                self.processing_class,
                rows,
                self._score,
                self.decoding(steps=self.args.eval_steps_decoded),
                seed=self.args.seed,
            )
            metrics[f"{metric_key_prefix}_accuracy"] = scores["accuracy"]
            self.log({f"{metric_key_prefix}_accuracy": scores["accuracy"]})
        return metrics

    def decoding(self, **changes) -> DenoiseConfig:
        """How the model is decoded as it was trained: hard, or with the head's soft masks."""
        if self.head is None:
            return DenoiseConfig(**({"soften": "hard"} | changes))
        return DenoiseConfig(
            **({"soften": "soft-mask", "soften_args": self.head.settings()} | changes)
        )

    def card_command(self, folder: str | Path) -> str:
        template = bool(mask := self.processing_class.mask_token) and mask in self.origin.prompt
        length = "" if template else f" --gen-length {self.origin.new_tokens or 32}"
        return decode_command("fill", folder, self.origin, length)

    def card_config(self) -> tuple[str | None, dict]:
        file = None if self.head is None else HEAD_FILE
        return file, changes_of(self.decoding())

    def _save(self, output_dir: str | None = None, state_dict=None):
        if self.head is not None:
            learn_head(self.model, self.head.settings())
            # The raw numbers belong to the decoding, not to the model.
            state_dict = (
                self.accelerator.get_state_dict(self.model) if state_dict is None else state_dict
            )
            state_dict = {k: v for k, v in state_dict.items() if "soft_mask_head." not in k}
        super()._save(output_dir, state_dict)
        if self.head is not None:
            folder = Path(output_dir or self.args.output_dir)
            save_head(self.head.settings(), folder)
            # a resumed training goes on from these, to the bit
            save_file(self.head.state_dict(), folder / RAW_HEAD)
        if plain(self.model) is not self.model and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / NOISE_FILE).unlink(missing_ok=True)
            # without the file the adapter would have the noise of its base
            if self.uniform is not None or self._was_uniform:
                save_noise(self.uniform, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        inner = plain(self.model)
        if inner is self.model and isinstance(inner, LladaForMaskedDiffusion):
            # The trainer would take the original names for unknown ones, and go on with the weights
            # it has.
            saved = {}
            for file in sorted(Path(resume_from_checkpoint).glob("model*.safetensors")):
                saved |= {llama_name(name): value for name, value in load_file(file).items()}
            keys = inner.load_state_dict(saved, strict=False)
            elsewhere = (
                "soft_mask_head.",
                *(["lm_head."] if inner.config.tie_word_embeddings else []),
            )
            missing = [name for name in keys.missing_keys if not name.startswith(elsewhere)]
            if keys.unexpected_keys or missing:
                raise ValueError(
                    f"resume_from_checkpoint={str(resume_from_checkpoint)!r} does not fit the model: "
                    f"missing {missing[:3]}, unexpected {keys.unexpected_keys[:3]}"
                )
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.head is not None:
            file = Path(resume_from_checkpoint, RAW_HEAD)
            if not file.is_file():
                raise ValueError(
                    f"resume_from_checkpoint={resume_from_checkpoint!r} holds no {RAW_HEAD}: it was hard"
                )
            self.head.load_state_dict(load_file(file))

    def _save_checkpoint(self, model, trial):
        with no_interrupt():
            super()._save_checkpoint(model, trial)
