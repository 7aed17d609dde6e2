"""Diffusion SFT on TRL's trainer: batches and their noise, the objectives' losses added up,
evaluation and checkpoints. What is minimised stands in `objectives`.

Shapes: B rows, T positions.
"""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer

from softar.held_out import EvaluatedRows
from softar.model_card import OwnCard, changes_of, decode_command
from softar.models import room_of
from softar.sft.data import SoftCollator
from softar.sft.preflight import check_tokens, say_cut
from softar.split import check_split, is_split, with_whole_weights
from softar.texts import check_data, check_rows
from softar.training import (
    MicroBatches,
    WatchedLosses,
    check_arguments,
    give_own_rate,
    no_interrupt,
    prepare_trained,
    unpacked,
    without_task,
)

from .config import DenoiseConfig
from .doubled import documents_of
from .evaluate import check_decoded, check_ends, evaluate, steps_for, with_end
from .head import HEAD_FILE, learn_head, save_reading
from .inputs import check_reads_none, check_width
from .models import load_original
from .net import facts, plain
from .noise import NOISE_FILE, process_of
from .objectives import Canvases, Masked, Place, Rows, Uniform
from .rows import PackedCollator, close_rows, end_of, filled, packed
from .sft_config import DiffusionSFTConfig, check_fits
from .uniform import noise_for

RAW_HEAD = "soft_mask_head.safetensors"


class DiffusionSFTTrainer(EvaluatedRows, WatchedLosses, OwnCard, MicroBatches, SFTTrainer):
    """TRL's SFTTrainer with a diffusion loss in `compute_loss`.

    Takes the datasets that TRL takes, prompt-completion or language modelling; prompts are never
    masked. The model comes from `softar.diffusion.load`: block-causal ones train on doubled rows,
    DiffusionGemma with objective="canvas". With `softmasking_prob` a SoftMaskHead is
    trained along, from the numbers on that the model knows of an earlier training; each checkpoint
    holds its values in transparency_config.json, from where `load` and `denoise` take them. With
    objective="uniform" the checkpoint says so in its config.json, an adapter in
    diffusion_process.json; that of a hard model of masks says that in both files. They say, too,
    which token ended the rows of a model that reads them whole, as `denoise` warns of texts without
    it. With `score(answer, row)` every evaluation also decodes its rows.
    """

    _tag_names = ["trl", "sft", "softar", "masked-diffusion"]
    card_method = "that fills masks, trained by masked diffusion"
    beside = (HEAD_FILE, NOISE_FILE)
    # the loss is divided by what is counted over the whole accumulated batch
    loss_is_scaled_for_ga = True

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
        name = type(self).__name__
        check_arguments(name, model, DiffusionSFTConfig, args, processing_class, kwargs)
        check_data(args, processing_class, train_dataset, eval_dataset)
        if args.idle_head:
            warnings.warn(
                f"{', '.join(args.idle_head)} do nothing with softmasking_prob=0", stacklevel=2
            )
        self._facts = check_fits(args, facts(model))
        self._score, self._held_out = score, eval_dataset
        check_decoded(args, eval_dataset, score, processing_class)
        self._fill = self._facts.eos_id if args.train_padding else processing_class.pad_token_id
        if self._fill is None:
            raise ValueError(
                f"train_padding={args.train_padding}: the model has no such token to pad with"
            )
        # `prepared` asks for them before TRL has them
        self.args, self.processing_class = args, processing_class
        train_dataset, eval_dataset = map(self.prepared, (train_dataset, eval_dataset))
        if args.objective == "canvas":
            kwargs["peft_config"] = without_task(kwargs.get("peft_config"))
        collator = PackedCollator if args.packing else SoftCollator
        super().__init__(
            model,
            unpacked(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=collator(self._fill, pad_to_multiple_of=args.pad_to_multiple_of),
            **kwargs,
        )
        why = "the head's numbers cannot be split; leave it at 0, or train under DDP"
        check_split(self, softmasking_prob=(args.softmasking_prob, why))
        prepare_trained(name, self.model, beside=args.softmasking_prob > 0)
        say_cut(self, train_dataset)
        self._room = room_of(self.model, trained=True)
        self.train_dataset, self.eval_dataset = map(
            self._filled, (self.train_dataset, self.eval_dataset)
        )
        rows = {"train": self.train_dataset, "eval": self.eval_dataset}
        check_tokens(rows, args, self._room, self._facts.vocab_size)
        self._rows_end = None  # block by block, a text need not be whole
        if self._facts.block_length is None:
            self._rows_end = end_of(self.train_dataset, processing_class)
        self._check_ends(self._held_out)
        self.args.packing = args.packing
        if args.packing:
            self.train_dataset = packed(self.train_dataset, args)
        self.head = self.uniform = None
        self.objective = self._make_objective()

    def _make_objective(self) -> Masked | Uniform | Canvases:
        """The model's configuration says from now on with what noise it is trained, and on rows of which
        end, where it reads whole rows."""
        args, inner, device = self.args, plain(self.model), self.accelerator.device
        if args.objective == "canvas":
            return Canvases(args, self._facts)
        if args.softmasking_prob:
            self.head = args.head(learnt=self._facts.soft_mask).to(self.model.device)
        if args.objective == "uniform":
            self.uniform = noise_for(self._facts, self.processing_class, args.noise_eps)
        inner.config.diffusion_process = process_of(self.uniform, self._rows_end)
        if self.uniform is None:
            return Masked(args, self._facts, self.head)
        return Uniform(args, self._facts, self.uniform, device)

    def train(self, *args, **kwargs):
        """The model's configuration says from then on with which head it was trained last, or that it
        was trained hard."""
        inner = plain(self.model)
        if self.head is None:
            if self.args.objective != "canvas":
                inner.config.soft_mask = None
            return super().train(*args, **kwargs)
        # for DDP and the optimiser; and only meanwhile: what is made of the model later has its weights
        inner.add_module("soft_mask_head", self.head)
        try:
            output = super().train(*args, **kwargs)
        finally:
            del inner.soft_mask_head
        learn_head(self.model, self.head.settings())
        return output

    # -- data

    def check_held_out(self, rows) -> None:
        check_rows(rows, "eval_dataset", self.args, self.processing_class)
        check_decoded(self.args, rows, self._score, self.processing_class)
        self._check_ends(rows)

    def check_tokenised(self, rows) -> None:
        check_tokens(rows, self.args, self._room, self._facts.vocab_size)

    def _check_ends(self, rows) -> None:
        count, is_known = self.args.eval_decode_rows, self._rows_end is not None
        if rows is not None and self._score is not None and count and is_known:
            check_ends(rows, count, self.processing_class)

    def prepared(self, rows):
        """Rows as TRL is to tokenise them."""
        args = self.args
        return close_rows(
            rows, self.processing_class, args.dataset_text_field, args.dataset_num_proc
        )

    def _filled(self, rows):
        """Rows that TRL has tokenised, with the padding that is trained along."""
        args, length = self.args, self._facts.block_length
        if not args.train_padding or length is None:
            return rows
        return filled(rows, length, self._fill, args.max_length, args.dataset_num_proc)

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and not isinstance(eval_dataset, str):  # the constructor's are
            eval_dataset = self._filled(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    # -- loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Draw the noise of the whole accumulated batch here, so that what the loss is divided by
        is counted over it, in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.zeros((), dtype=torch.long, device=device)
        for batch in batches:
            rows = self._rows(batch)
            batch.update(self._draw(rows, training=True))
            count = count + self.objective.count(rows, batch)
        return batches, self.accelerator.reduce(count)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """num_items_in_batch: as `get_batch_samples` counts it; an evaluation has a sum of its
        own."""
        training = self.model.training
        unwrapped = plain(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        rows = self._rows(inputs)
        drawn = inputs if "numbers" in inputs else self._draw(rows, training=training)
        place = self._place(drawn["numbers"], training)
        loss = self.objective.loss(model, unwrapped, rows, drawn, place)
        total, count = loss.total, self.objective.count(rows, drawn)
        if training and num_items_in_batch is not None:
            # DDP takes the mean of the processes' losses
            total, count = total * self.accelerator.num_processes, num_items_in_batch
        mean = total / count + loss.nothing
        if not training:
            self.note_evaluated("loss", total, count)
        self._note(training, loss.share if training else None)
        return (mean, CausalLMOutput(logits=loss.logits)) if return_outputs else mean

    def _rows(self, inputs: dict[str, Tensor]) -> Rows:
        """The batch; its mask is None where there is no padding to hide."""
        maskable = inputs["labels"] != -100
        mask = inputs["documents" if self.args.packing else "attention_mask"]
        if not self.args.packing:  # else each document has been looked at
            check_width(maskable, self._room)
        if self.args.train_padding and self._facts.block_length is None:
            maskable, mask = maskable | (mask == 0), None
        elif bool((mask == 1).all()):
            mask = None
        else:
            check_reads_none(self.model, mask != 0)
        if not maskable.any(1).all():
            raise ValueError(
                f"row {int((~maskable.any(1)).nonzero()[0])} of the batch has no token to mask: no completion"
            )
        documents = torch.zeros_like(inputs["labels"]) if mask is None else documents_of(mask)
        return Rows(inputs["input_ids"], maskable, mask, documents)

    def _draw(self, rows: Rows, *, training: bool) -> dict:
        """The noise of the next micro-batch, and the `numbers` of its rows in the step's global
        batch."""
        args, micro, B = self.args, self.next_micro(), len(rows.ids)
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        first = (micro * self.accelerator.num_processes + self.accelerator.process_index) * size
        numbers = list(range(first, first + B))
        return self.objective.draw(rows, self._place(numbers, training)) | {"numbers": numbers}

    def _place(self, numbers: list[int], training: bool) -> Place:
        # An evaluation always sees the same noise.
        step, args = self.state.global_step if training else 2**31, self.args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        of, progress = size * self.accelerator.num_processes, step / max(1, self.state.max_steps)
        return Place(step, numbers, of, training, progress)

    def _note(self, training: bool, share: Tensor | None) -> None:
        if not training or not self.is_logged:
            return
        metrics = self._metrics["train"]
        metrics[self.objective.share].append(share.item())
        if self.head is not None:
            for name, value in self.head.values().items():
                metrics[f"head_{name}"].append(value.item())

    # -- optimiser, evaluation, checkpoints

    def create_optimizer(self, *args, **kwargs):
        made = super().create_optimizer(*args, **kwargs)
        if self.head is not None:
            give_own_rate(self, [*self.head.parameters()], self.args.head_learning_rate)
        return made

    def scored(self, rows: Dataset) -> dict[str, float]:
        steps = steps_for(self._facts, rows, self.processing_class, self.args.eval_steps_decoded)
        how = (self.processing_class, rows, self._score, self.decoding(steps=steps))
        sizes = dict(batch_size=self.args.per_device_eval_batch_size, seed=self.args.seed)
        found = with_whole_weights(self, lambda model: evaluate(model, *how, **sizes))
        return {"accuracy": found["accuracy"]}

    def decoding(self, **changes) -> DenoiseConfig:
        """How the model is decoded as it was trained: hard, or with the head's soft masks; a model
        of canvases with its belief."""
        if self.args.objective == "canvas":
            return DenoiseConfig(**changes)
        if self.head is None:
            return DenoiseConfig(**({"soften": "hard"} | changes))
        return DenoiseConfig(
            **({"soften": "soft-mask", "soften_args": self.head.settings()} | changes)
        )

    def card_command(self, folder: str | Path) -> str:
        mask, origin = self.processing_class.mask_token, self.origin
        if mask and mask in origin.prompt:
            prompt = origin.prompt
            if not origin.chat and facts(self.model).rows_end is not None:
                prompt = with_end(prompt, self.processing_class)
            origin = dataclasses.replace(origin, prompt=prompt.replace(mask, "_"))
            return decode_command("fill", folder, origin)
        length = f" --gen-length {origin.new_tokens or 32}"
        return decode_command("fill", folder, origin, length)

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
        folder = Path(output_dir or self.args.output_dir)
        save_reading(self.model, folder)
        (folder / RAW_HEAD).unlink(missing_ok=True)
        if self.head is not None:
            # a resumed training goes on from these, to the bit
            save_file(self.head.state_dict(), folder / RAW_HEAD)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._has_original_names():
            load_original(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(resume_from_checkpoint)

    def _load_best_model(self):
        if self._has_original_names():
            load_original(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
        self._load_head(self.state.best_model_checkpoint)

    def _has_original_names(self) -> bool:
        """Has a checkpoint's model.safetensors other names of weights than the model here?"""
        is_whole = plain(self.model) is self.model and not is_split(self.accelerator)
        return is_whole and self._facts.family != "masked_lm"

    def _load_head(self, folder: str) -> None:
        if self.head is not None:
            file = Path(folder, RAW_HEAD)
            if not file.is_file():
                raise ValueError(f"the checkpoint {folder!r} holds no {RAW_HEAD}: it was hard")
            self.head.load_state_dict(load_file(file))

    def _save_checkpoint(self, model, trial):
        with no_interrupt():
            super()._save_checkpoint(model, trial)
