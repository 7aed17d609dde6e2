"""Guided soft SFT: supervised fine-tuning in which the thought's inputs are the model's own
mixtures, on TRL's trainer.

Shapes: B batch, T positions, M traces per row, V vocabulary, K tokens kept, N target tokens of a
batch.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerState
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from ..config import CONFIG_FILE, SoftConfig
from ..evaluate import evaluate
from ..held_out import EvaluatedRows
from ..mixers import guide, mk_mixer
from ..model_card import OwnCard, changes_of
from ..models import room_of
from ..soft import Soft, check_dist
from ..split import check_split, with_whole_weights
from ..texts import check_data, check_rows
from ..training import (
    MicroBatches,
    WatchedLosses,
    check_arguments,
    give_own_rate,
    inside_forward,
    no_interrupt,
    unpacked,
)
from .config import SoftSFTConfig
from .data import (
    PackedCollator,
    SoftCollator,
    add_trace_ids,
    check_thoughts,
    frontier,
    longest_completion,
    packed,
    span_of,
    thought_mask,
)
from .forward import mixed_forward, soft_forward
from .latent import LatentStages, mk_curriculum
from .learnt import LearntFilters, begins_from
from .loss import soft_loss
from .preflight import (
    check_columns,
    check_held_out,
    check_mixer,
    check_model,
    check_packed,
    check_tokens,
    eval_length,
    forecast,
    freeze,
    say_cut,
    whole_weights_for,
)
from .think_tokens import prefix_of


class SoftSFTTrainer(EvaluatedRows, LatentStages, WatchedLosses, OwnCard, MicroBatches, SFTTrainer):
    """TRL's SFTTrainer with soft teacher forcing in `compute_loss`.

    Takes the datasets that TRL takes, prompt-completion or language modelling, and a column
    `traces` (texts, each an alternative to the completion) for targets="traces" and "oracle". With
    `score(answer, row) -> float` every evaluation also decodes its rows and logs their accuracy,
    read out softly and discretely. Each checkpoint holds soft_config.json, the way it
    wants to be decoded.
    """

    _tag_names = ["trl", "sft", "softar"]
    # the loss below is divided by the target tokens of the whole accumulated batch
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model,
        args: SoftSFTConfig,
        *,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        score: Callable[[str, dict], float] | None = None,
        **kwargs,
    ):
        check_arguments(type(self).__name__, model, SoftSFTConfig, args, processing_class, kwargs)
        check_data(args, processing_class, train_dataset, eval_dataset)
        self._score, self._held_out = score, eval_dataset
        check_columns(model, args, train_dataset)
        check_held_out(args, eval_dataset, score)
        theirs = begins_from(model, args)
        self._prefix = prefix_of(model, processing_class, args, kwargs)
        # `prepared` asks for them before TRL has them
        self.args, self.processing_class = args, processing_class
        train_dataset = self.prepared(train_dataset, traced=("traces", "oracle"))
        eval_dataset = self.prepared(eval_dataset)
        if (pad := processing_class.pad_token_id) is None:
            raise ValueError(
                "the tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token"
            )
        collator = PackedCollator if args.packing else SoftCollator
        super().__init__(
            model,
            unpacked(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=collator(pad, pad_to_multiple_of=args.pad_to_multiple_of),
            **kwargs,
        )
        check_model(self)
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        rows = {"train": self.train_dataset, "eval": self.eval_dataset}
        check_tokens(rows, args, room_of(self.model), vocab)
        say_cut(self, train_dataset)
        check_dist(vocab, **args.filters, prefix="soft_")
        check_mixer(args, vocab, self.accelerator.device)
        check_split(self, **whole_weights_for(args))
        freeze(self.accelerator.unwrap_model(self.model), args)
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.model, self._tables = self._prefix.adapted(self.model, split)
        self.model_wrapped = self.model
        self._learnt = LearntFilters(self.model, args, vocab, theirs)
        self._alpha, self._rng, self._most = args.alpha(), torch.Generator(), eval_length(self)
        # entropies of a thought's steps, and of how many
        self._thought = torch.zeros(2, device=self.accelerator.device)
        self._mixer = mk_mixer(args.soft_mixer, **(args.soft_mixer_args or {}))
        self._span = span_of(args, processing_class)
        for name, each in rows.items():
            check_thoughts(each, args, processing_class, self._span, f"{name}_dataset")
        self._curriculum = mk_curriculum(self.model, processing_class, rows, args, self._span)
        if args.packing:
            self._pack()

    def train(self, *args, **kwargs):
        """Says first what a step will cost."""
        if line := forecast(self.args, self.train_dataset, self._span):
            self.accelerator.print(line)
        with self._prefix.alone(self.model), self._learnt.on_model():
            return super().train(*args, **kwargs)

    # -- data

    def check_held_out(self, rows) -> None:
        check_rows(rows, "eval_dataset", self.args, self.processing_class)
        check_held_out(self.args, rows, self._score)

    def check_tokenised(self, rows) -> None:
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        check_tokens(rows, self.args, room_of(self.model), vocab)
        check_thoughts(rows, self.args, self.processing_class, self._span, "eval_dataset")

    def prepared(self, rows, traced=("oracle",)):
        """Rows as TRL is to tokenise them. traced: the targets that are made of the rows' traces."""
        rows, args = self._prefix.before(rows, self.args.dataset_num_proc), self.args
        if args.targets not in traced:
            return rows
        return add_trace_ids(rows, self.processing_class, args.max_length, args.dataset_num_proc)

    def _pack(self) -> None:
        self.args.packing, examples = True, len(self.train_dataset)
        args = self.args
        rows = packed(self.train_dataset, args.max_length, self._span, args.dataset_num_proc)
        # the longest stand first
        shuffles, seed = self.args.shuffle_dataset, self.args.seed
        self.train_dataset = rows.shuffle(seed=seed) if shuffles else rows
        check_packed(self, examples)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        more = {"trace_ids", "thought"} - {*self._signature_columns}
        self._signature_columns += sorted(more)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Draw each row's trace here, before the target tokens are counted, over all processes where
        tokens are averaged over them; transformers counts for models that take the count alone."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.targets == "traces":
            self._draw_traces(batches)
        if self._curriculum is not None:
            self.stage_batches(batches)
        count = torch.zeros((), dtype=torch.long, device=device)
        for batch in batches:
            count += (batch["labels"][:, 1:] != -100).sum().to(device)
        averages = self.args.average_tokens_across_devices
        return batches, self.accelerator.reduce(count) if averages else count

    def _draw_traces(self, batches: list[dict[str, Tensor]]) -> None:
        # One number per row of the global batch, each process takes its own: the draw depends on
        # the seed, the step and the row alone, so a resumed run, another number of processes or
        # another gradient accumulation draws the same traces.
        args, rank = self.args, self.accelerator.process_index
        world = self.accelerator.num_processes
        shape = (args.gradient_accumulation_steps, world, args.per_device_train_batch_size)
        uniform = torch.rand(shape, generator=self._seeded(0, shared=True))[:, rank]
        for batch, numbers in zip(batches, uniform, strict=False):
            traces, mask = batch.pop("trace_ids"), batch.pop("trace_mask")
            rows = torch.arange(len(traces), device=traces.device)
            choice = (numbers[: len(rows)].to(rows.device) * mask.any(-1).sum(-1)).long()
            batch["input_ids"], batch["attention_mask"] = traces[rows, choice], mask[rows, choice]
            # a trace may be longer than the gold completion
            completion = (batch["labels"] != -100).cumsum(1) > 0
            batch["labels"] = torch.where(
                completion & batch["attention_mask"].bool(), batch["input_ids"], -100
            )

    def _seeded(self, micro: int, *, shared: bool) -> torch.Generator:
        rank = 0 if shared else 1 + self.accelerator.process_index
        # an evaluation always sees the same noise; between two steps the model may be in either mode
        step = self.state.global_step if shared or self.model.training else 2**31
        seed = np.random.SeedSequence([self.args.seed, step, micro, rank])
        return self._rng.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        for parameter, rate in self._learnt.rates():
            # decay would pull each to where its free form is 0
            give_own_rate(self, [parameter], rate)
        if self._tables:  # decay would move the rows that stay
            give_own_rate(self, self._tables, self.args.learning_rate)
        return optimizer

    # -- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """At the current alpha, in an evaluation too: there the loss on gold inputs is a metric of
        its own, gold_loss."""
        training, alpha = self.model.training, self._alpha(self._progress())
        given, inputs = inputs, self.staged(inputs)
        labels = inputs["labels"]
        if "thought" in inputs:
            thought = inputs["thought"]
        elif self._curriculum is None:
            thought = thought_mask(inputs["input_ids"], labels, **self._span)
            # a text without a prompt: its first token has no belief before it
            thought[:, 0] = False
        else:
            thought, alpha = inputs["latent_mask"], 0.0
        oracle = None
        if self.args.targets == "oracle":
            oracle = frontier(inputs["trace_ids"], inputs["trace_mask"], inputs["input_ids"])
        logits, nothing = self._logits(model, inputs, thought, alpha, oracle)
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=logits.device).clamp(min=1)
        weight = alpha if self.args.thought_loss == "alpha" and training else 1.0
        loss, h = soft_loss(logits, labels, thought, thought_weight=weight, soft_labels=oracle)
        whole = loss + self.args.entropy_coef * h.sum()
        loss = whole / count + nothing
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages, the count is of all
        self._note(training, alpha, h)
        if not training:
            gold = logits
            if alpha < 1 or oracle is not None:
                gold, _ = self._logits(model, given, thought, 1.0, None)
            total, _ = soft_loss(gold, given["labels"], torch.zeros_like(given["labels"]).bool())
            self.note_evaluated("loss", whole, (labels[:, 1:] != -100).sum())
            self.note_evaluated("gold_loss", total, (given["labels"][:, 1:] != -100).sum())
        return (loss, CausalLMOutput(logits=logits)) if return_outputs else loss

    def _logits(self, model, inputs, thought: Tensor, alpha: float, oracle: Soft | None) -> tuple:
        """[B, T, V] at this share of the gold tokens, or reading the oracle's mixtures, with
        completion_logits of the last positions only; and a 0 with the temperature in its graph, as
        DDP wants each parameter in what the forward returns."""
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        args, mask = self.args, inputs["attention_mask"]
        marked = thought if alpha < 1 else torch.zeros_like(inputs["input_ids"]).bool()
        micro = self.next_micro()
        feed = self._mk_feed(alpha, micro) if self._curriculum is None else None
        last = longest_completion(inputs["labels"]) if args.completion_logits else None

        def forward(ids: Tensor) -> tuple[Tensor, Tensor | float]:
            """Inside the wrapper's forward, where DDP and FSDP have the parameters at hand."""
            nothing = self._learnt.nothing()
            if oracle is not None:
                return mixed_forward(unwrapped, ids, mask, thought, oracle, last=last), nothing
            soft = dict(
                mode=args.soft_mode,
                passes=args.soft_passes,
                grad_passes=args.soft_grad_passes,
                window=args.soft_window,
                last=last,
                hidden=args.learn_step_temperature,
                position_ids=inputs.get("position_ids"),
            )
            return soft_forward(unwrapped, ids, mask, marked, feed, **soft), nothing

        return inside_forward(model, unwrapped, forward, inputs["input_ids"])

    def _mk_feed(self, alpha: float, micro: int):
        args, rng = self.args, self._seeded(micro, shared=False)
        state = rng.get_state()
        progress = self._progress()

        def feed(logits: Tensor, gold: Tensor, hidden: Tensor | None = None) -> Soft:
            if args.soft_mode == "parallel":
                # the noise belongs to the position: every refresh sees the same
                rng.set_state(state)
            dist = self._learnt.mixture(logits, progress, hidden)
            return guide(self._mixer(dist, rng=rng).soft, gold, alpha, args.guidance, rng=rng)

        return feed

    def _progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps)

    def _note(self, training: bool, alpha: float, h: Tensor) -> None:
        if training and not self.is_logged:
            return
        mode = "train" if training else "eval"
        metrics = self._metrics[mode]
        if self._curriculum is None:
            metrics["alpha"].append(alpha)
        else:
            metrics["latent_stage"].append(self.stage)
        entropy = h.detach().sum(), h.new_tensor(len(h))
        if training:
            self._thought += self.accelerator.reduce(torch.stack(entropy))
        else:
            self.note_evaluated("thought_entropy", *entropy)
        for name, value in self._learnt.logged().items():
            metrics[f"soft_{name}"].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The entropy is a mean over the steps of thoughts, whatever micro-batches they stood in."""
        if self.model.training:
            total, count = self._thought.tolist()
            self._thought.zero_()
            if count:
                self._metrics["train"]["thought_entropy"] = [total / count]
        super().log(logs, start_time)

    # -- evaluation and checkpoints

    def scored(self, rows: Dataset) -> dict[str, float]:
        return {f"{r}_accuracy": self.accuracy(rows, r) for r in ("soft", "discrete")}

    def accuracy(self, rows: Dataset, readout: str) -> float:
        """Mean score of the answers to `rows`, read out 'soft' or 'discrete'."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        # never empty: fewer rows are counted twice
        share = rows.select(range(rank % len(rows), len(rows), processes))
        how = (self.processing_class, share, self._score, self.decoding(readout))
        sizes = dict(batch_size=self.args.per_device_eval_batch_size, seed=self.args.seed)
        result = with_whole_weights(self, lambda model: evaluate(model, *how, **sizes))
        n, device = len(share), self.accelerator.device
        sums = torch.tensor([result["accuracy"] * n, n], device=device)
        points, n = self.accelerator.reduce(sums).tolist()
        return points / n

    def decoding(self, readout: str | None = None) -> SoftConfig:
        """How to decode the model: 'soft', 'discrete', or (None) as it was trained, which
        soft_config.json records."""
        if readout is None:
            readout = "soft" if self.args.is_soft else "discrete"
        config = self.args.decoding(readout, self._learnt.plain())
        return config.changed(prompt_prefix=self._prefix.text, max_new_tokens=self._most)

    def card_config(self):
        return CONFIG_FILE, changes_of(self.decoding())

    def _save(self, output_dir: str | None = None, state_dict=None):
        if self._learnt:
            if state_dict is None:
                state_dict = self.accelerator.get_state_dict(self.model)
            state_dict = self._learnt.without(state_dict)
        super()._save(output_dir, state_dict)
        self.decoding().save(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        if self._learnt:
            self.state.stateful_callbacks[FILTERS] = self._learnt.state()
        with no_interrupt():
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore_learnt(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._restore_learnt(self.state.best_model_checkpoint)

    def _restore_learnt(self, folder: str) -> None:
        if self._learnt:
            state = TrainerState.load_from_json(Path(folder, TRAINER_STATE_NAME))
            config = vars(SoftConfig.load(folder))
            self._learnt.restore(state.stateful_callbacks.get(FILTERS, {}), config)


FILTERS = "softar_filters"  # in trainer_state.json
