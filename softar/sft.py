"""Guided soft SFT: supervised fine-tuning in which the thought's inputs are the model's own mixtures, on TRL's trainer.

Shapes: B batch, T positions, M traces per row, V vocabulary, K tokens kept, N target tokens of a batch.
"""

import contextlib
import math
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTConfig, SFTTrainer
from trl.models.utils import _ForwardRedirection
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .config import SoftConfig
from .evaluate import evaluate
from .guidance import GUIDES, MODES, guide, mk_alpha, soft_forward
from .mixers import mk_mixer
from .soft import Soft, check_dist, entropy, mk_proba_dist, soft_embed

TARGETS = ("gold", "traces", "oracle")
THOUGHT_LOSSES = ("constant", "alpha")


def opt(default: Any, text: str, factory=None):
    if factory is not None:
        return field(default_factory=factory, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class SoftSFTConfig(SFTConfig):
    """TRL's SFTConfig plus what makes it soft. Without an accelerator it trains on the CPU in float32 by itself."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "soft_mixer_args"]  # JSON on the command line

    gradient_checkpointing: bool = opt(False, "Recompute activations to save memory. Not with soft_mode='sequential'.")
    soft_mode: str = opt("parallel", "How the soft inputs are computed: 'parallel' refreshes, or 'sequential' steps.")
    soft_passes: int | None = opt(None, "Parallel: refreshes of the soft inputs. Default: the longest thought (exact).")
    soft_grad_passes: int | None = opt(None, "Parallel: how many of the last forwards carry gradient. Default: all.")
    soft_window: int | None = opt(None, "Sequential: cut the gradient through time every so many steps.")
    soft_mixer: str = opt("soft", "What is fed back: a name in softar.MIXERS.")
    soft_mixer_args: dict | str | None = opt(None, "The mixer's knobs, e.g. {'tau': 0.5}.")
    soft_temperature: float = opt(1.0, "Temperature of the mixtures.")
    soft_top_k: int | None = opt(None, "Tokens kept in a mixture. Default: the whole vocabulary.")
    soft_top_p: float | None = opt(None, "Nucleus of a mixture.")
    soft_min_p: float | None = opt(None, "Least probability in a mixture, relative to its largest.")
    learn_temperature: bool = opt(False, "Train the mixtures' temperature with the model.")
    guidance: str = opt("mix", "How the gold token enters a mixture: 'mix', 'clamp' or 'coin' (scheduled sampling).")
    alpha_schedule: str = opt("linear", "Share of the gold token over the training: constant, linear, cosine, step.")
    alpha_start: float = opt(1.0, "Share of the gold token at the start; 1 is teacher forcing.")
    alpha_end: float = opt(0.0, "Share of the gold token at the end; 0 is what decoding meets.")
    alpha_hold: float = opt(0.0, "Fraction of the training before alpha starts to move.")
    alpha_span: float = opt(0.6, "Fraction of the training in which alpha goes from start to end.")
    thought_loss: str = opt("constant", "Weight of the thought's tokens in the loss: 'constant' 1, or 'alpha'.")
    targets: str = opt(
        "gold",
        "Whose tokens are the labels: the 'gold' completion, one of the row's 'traces' drawn afresh at each step, or "
        "'oracle', the distribution of the traces at each position as input and label.",
    )
    entropy_coef: float = opt(0.0, "Adds this times the entropy of the soft steps (nats) to the loss; > 0 sharpens.")
    think_start: str | None = opt(None, "Text that opens the thought. Default: it starts with the completion.")
    think_end: str | None = opt(None, "Text that closes the thought.")
    think_steps: int | None = opt(None, "Length of the thought in tokens, where no text closes it.")
    freeze_embeddings: bool = opt(False, "Keep the input embeddings as they are.")
    freeze_layers: int = opt(0, "Keep the first n layers as they are.")
    eval_decode_rows: int = opt(256, "Held-out rows decoded for the accuracies of an evaluation; 0 for none.")
    eval_new_tokens: int = opt(64, "Longest completion in an evaluation.")

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
        super().__post_init__()
        if self.packing or self.padding_free:
            raise ValueError(
                f"packing={self.packing}, padding_free={self.padding_free}: soft SFT needs an example a row"
            )
        if self.loss_type != "nll" or self.label_smoothing_factor:
            given = f"loss_type={self.loss_type!r}, label_smoothing_factor={self.label_smoothing_factor}"
            raise ValueError(f"{given}: soft SFT has a loss of its own, leave them at 'nll' and 0")
        if not isinstance(self.soft_mixer, str):
            raise ValueError(f"soft_mixer={self.soft_mixer!r} must be a name: register yours in softar.MIXERS")
        if isinstance(self.soft_mixer_args, str):
            raise ValueError(f"soft_mixer_args={self.soft_mixer_args!r} is no JSON object")
        for name, known in (
            ("soft_mode", MODES),
            ("guidance", tuple(GUIDES)),
            ("targets", TARGETS),
            ("thought_loss", THOUGHT_LOSSES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {known}")
        for name, least in (("soft_passes", 0), ("soft_grad_passes", 1), ("soft_window", 1), ("think_steps", 0),
                            ("freeze_layers", 0), ("eval_decode_rows", 0), ("eval_new_tokens", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.soft_mode == "sequential" and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing=True drops the cache of soft_mode='sequential': use 'parallel'")
        if self.think_end is not None and self.think_steps is not None:
            raise ValueError(f"think_end={self.think_end!r} and think_steps={self.think_steps}: give one of them")
        if self.think_start is not None and self.think_end is None:
            raise ValueError(f"think_start={self.think_start!r} needs a think_end that closes the thought")
        check_dist(None, self.soft_temperature, self.soft_top_k, self.soft_top_p, self.soft_min_p)
        mk_mixer(self.soft_mixer, **(self.soft_mixer_args or {}))
        self.alpha()
        if self.learn_temperature and self.soft_temperature == 0:
            raise ValueError(f"soft_temperature={self.soft_temperature} cannot be learnt from: start above 0")

    def alpha(self) -> Callable[[float], float]:
        """The guidance schedule, progress in [0, 1] -> alpha."""
        return mk_alpha(
            self.alpha_schedule,
            start=self.alpha_start,
            end=self.alpha_end,
            hold=self.alpha_hold,
            span=self.alpha_span,
        )

    @property
    def is_soft(self) -> bool:
        """Does the training ever show the model a mixture?"""
        schedule = self.alpha()
        return self.targets == "oracle" or (self.soft_mixer != "hard" and min(schedule(0.0), schedule(1.0)) < 1)

    def decoding(self, readout: str = "soft", temperature: float | None = None) -> SoftConfig:
        """How the trained model is decoded: 'soft' as it was trained, or 'discrete', greedy over the same spans."""
        span = dict(think_start=self.think_start, think_end=self.think_end, budget=self.think_steps,
                    max_new_tokens=self.eval_new_tokens)  # fmt: skip
        if readout == "discrete":
            return SoftConfig(mixer="hard", top_k=None, **span)
        hard = self.soft_mixer == "hard"  # trained on its own single tokens; read out softly it gets its belief
        return SoftConfig(
            mixer="soft" if hard else self.soft_mixer,
            mixer_args={} if hard else self.soft_mixer_args or {},
            temperature=self.soft_temperature if temperature is None else temperature,
            top_k=self.soft_top_k,
            top_p=self.soft_top_p,
            min_p=self.soft_min_p,
            **span,
        )


def thought_mask(labels: Tensor, *, start: list[int] = (), end: list[int] = (), steps: int | None = None) -> Tensor:
    """Which positions are thought, and so read mixtures: [B, T] labels (-100 off the completion) -> [B, T] bool.

    With `end` the completion's tokens before its first occurrence (a row without it is thought throughout) and, where
    the completion holds `start`, after that; with `steps` the first so many; with neither the whole completion.
    """
    inside = labels != -100
    if steps is not None:
        return inside & (inside.cumsum(1) <= steps)
    if len(end):
        inside = inside & (_starts(labels, end).cumsum(1) == 0)
    if len(start):
        opened = _starts(labels, start)
        behind = nn.functional.pad(opened, (len(start), 0))[:, : labels.shape[1]].cumsum(1) > 0
        inside = inside & (behind | ~opened.any(1, keepdim=True))  # a start tag in the prompt has no label
    return inside


def _starts(labels: Tensor, pattern: list[int]) -> Tensor:
    """[B, T] -> [B, T] bool: does the pattern start here?"""
    hit = torch.ones_like(labels, dtype=torch.bool)
    for shift, token in enumerate(pattern):
        ahead = torch.full_like(labels, -100)
        ahead[:, : labels.shape[1] - shift] = labels[:, shift:]
        hit = hit & (ahead == token)
    return hit


@dataclass
class SoftCollator(DataCollatorForLanguageModeling):
    """Pads on the right. Rows with `trace_ids` also give [B, M, T] of them, M the most of a row; the mask of the rows
    that have fewer is 0 there."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [e["input_ids"] for e in examples]
        labels = [e.get("labels", e["input_ids"]) for e in examples]
        traces = [e["trace_ids"] for e in examples] if "trace_ids" in examples[0] else []
        M = max(map(len, traces), default=0)
        flat = [row[m] if m < len(row) else [] for row in traces for m in range(M)]
        longest = max(map(len, ids + flat))
        longest += -longest % (self.pad_to_multiple_of or 1)
        input_ids, mask = _pad(ids, longest, self.pad_token_id)
        batch = {"input_ids": input_ids, "labels": _pad(labels, longest, -100)[0], "attention_mask": mask}
        if traces:
            trace_ids, trace_mask = _pad(flat, longest, self.pad_token_id)
            shape = (len(traces), M, longest)
            batch |= {"trace_ids": trace_ids.view(shape), "trace_mask": trace_mask.view(shape)}
        return batch


def _pad(rows: list[list[int]], length: int, value: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the right and their mask, each [len(rows), length] int64."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    mask = np.arange(length) < lengths[:, None]
    if mask.all():
        out = np.array(rows, dtype=np.int64)
    else:
        out = np.full(mask.shape, value, dtype=np.int64)
        out[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(out), torch.from_numpy(mask.astype(np.int64))


class SoftSFTTrainer(SFTTrainer):
    """TRL's SFTTrainer with soft teacher forcing in `compute_loss`.

    Takes the datasets that TRL takes, prompt-completion or language modelling, and a column `traces` (texts, each an
    alternative to the completion) for targets="traces" and "oracle". With `score(answer, row) -> float` every
    evaluation also decodes held-out rows and logs their accuracy, read out softly and discretely. Each checkpoint
    holds soft_config.json, the way it wants to be decoded.
    """

    _tag_names = ["trl", "sft", "softar"]
    loss_is_scaled_for_ga = True  # the loss below is divided by the target tokens of the whole accumulated batch

    def __init__(self, model, args: SoftSFTConfig, *, train_dataset, eval_dataset=None, processing_class=None,
                 score: Callable[[str, dict], float] | None = None, **kwargs):  # fmt: skip
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError(f"processing_class={processing_class!r}: SoftSFTTrainer needs the model's tokenizer")
        check_writable(args.output_dir)
        self._score, self._decode_rows = score, eval_dataset
        if score is not None and eval_dataset is not None and "prompt" not in eval_dataset.column_names:
            raise ValueError(f"score= needs a column 'prompt' in the held-out rows, not {eval_dataset.column_names}")
        if args.targets != "gold":
            check_traces(train_dataset, args.targets)
            train_dataset = add_trace_ids(train_dataset, processing_class, max_length=args.max_length)
        if args.targets == "oracle" and eval_dataset is not None:
            check_traces(eval_dataset, args.targets)
            eval_dataset = add_trace_ids(eval_dataset, processing_class, max_length=args.max_length)
        pad = processing_class.pad_token_id
        if pad is None:
            raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token")
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset,
                         processing_class=processing_class, data_collator=SoftCollator(pad), **kwargs)  # fmt: skip
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        check_dist(vocab, args.soft_temperature, args.soft_top_k, args.soft_top_p, args.soft_min_p)
        self._freeze(args.freeze_embeddings, args.freeze_layers)
        if args.learn_temperature:
            start = torch.tensor(math.log(args.soft_temperature), device=self.model.device)
            self.model.register_parameter("soft_log_temperature", nn.Parameter(start))
        self._alpha = args.alpha()
        self._mixer = mk_mixer(args.soft_mixer, **(args.soft_mixer_args or {}))
        start, end = (_encode(processing_class, text) for text in (args.think_start, args.think_end))
        self._span = dict(start=start, end=end, steps=args.think_steps)
        self._rng = torch.Generator()
        self._micro = 0

    # -- data -------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "trace_ids" not in self._signature_columns:
            self._signature_columns.append("trace_ids")

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Draw each row's trace here, before the target tokens are counted."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro = 0
        if self.args.targets == "traces":
            self._draw_traces(batches)
            count = self._get_num_items_in_batch(batches, device)
        return batches, count

    def _draw_traces(self, batches: list[dict[str, Tensor]]) -> None:
        # One number per row of the global batch, each process takes its own: the draw depends on the seed, the step
        # and the row alone, so a resumed run, another number of processes or another gradient accumulation draws the
        # same traces.
        args, world, rank = self.args, self.accelerator.num_processes, self.accelerator.process_index
        shape = (args.gradient_accumulation_steps, world, args.per_device_train_batch_size)
        uniform = torch.rand(shape, generator=self._seeded(0, shared=True))[:, rank]
        for batch, numbers in zip(batches, uniform, strict=False):
            traces, mask = batch.pop("trace_ids"), batch.pop("trace_mask")
            rows = torch.arange(len(traces), device=traces.device)
            choice = (numbers[: len(rows)].to(rows.device) * mask.any(-1).sum(-1)).long()
            batch["input_ids"], batch["attention_mask"] = traces[rows, choice], mask[rows, choice]
            completion = (batch["labels"] != -100).cumsum(1) > 0  # a trace may be longer than the gold completion
            batch["labels"] = torch.where(completion & batch["attention_mask"].bool(), batch["input_ids"], -100)

    def _seeded(self, micro: int, *, shared: bool) -> torch.Generator:
        rank = 0 if shared else 1 + self.accelerator.process_index
        seed = np.random.SeedSequence([self.args.seed, self.state.global_step, micro, rank])
        return self._rng.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

    # -- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = self.model.training
        alpha = self._alpha(self._progress() if training else 1.0)
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        ids, labels = inputs["input_ids"], inputs["labels"]
        thought = thought_mask(labels, **self._span)
        thought[:, 0] = False  # a text without a prompt: its first token has no belief before it
        micro, self._micro = self._micro, self._micro + 1

        oracle = None
        if self.args.targets == "oracle":
            oracle = _frontier(inputs["trace_ids"], inputs["trace_mask"], ids)

        def logits_of(ids: Tensor) -> Tensor:
            """-> [B, T, V]. Runs inside the wrapper's forward, where DDP and FSDP have the parameters at hand."""
            if oracle is not None:
                embedding = unwrapped.get_input_embeddings()
                mixed = soft_embed(Soft(oracle.ids[thought], oracle.weights[thought]), embedding)
                embeds = embedding(ids)
                embeds = embeds.masked_scatter(thought[..., None], mixed.to(embeds.dtype))
                return unwrapped(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=False).logits
            return soft_forward(
                unwrapped,
                ids,
                inputs["attention_mask"],
                thought if alpha < 1 else torch.zeros_like(thought),
                self._mk_feed(alpha, micro),
                mode=self.args.soft_mode,
                passes=self.args.soft_passes,
                grad_passes=self.args.soft_grad_passes,
                window=self.args.soft_window,
            )

        def forward(ids: Tensor) -> tuple[Tensor, Tensor | float]:
            # DDP wants each parameter in what the forward returns, the temperature at alpha = 1 too.
            return logits_of(ids), 0.0 * self._temperature()

        logits, nothing = _ForwardRedirection()(model, unwrapped, forward, ids)
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        weight = alpha if self.args.thought_loss == "alpha" and training else 1.0
        loss, h = soft_loss(logits, labels, thought, thought_weight=weight, soft_labels=oracle)
        loss = (loss + self.args.entropy_coef * h.sum()) / torch.as_tensor(count, device=loss.device).clamp(min=1)
        loss = loss + nothing
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages, the count is of all processes
        self._note(training, alpha, h)
        return (loss, CausalLMOutput(logits=logits)) if return_outputs else loss

    def _mk_feed(self, alpha: float, micro: int):
        args, rng = self.args, self._seeded(micro, shared=False)
        state = rng.get_state()
        temperature = self._temperature()

        def feed(logits: Tensor, gold: Tensor) -> Soft:
            if args.soft_mode == "parallel":
                rng.set_state(state)  # the noise belongs to the position: every refresh sees the same
            dist = mk_proba_dist(logits, temperature=temperature, top_k=args.soft_top_k, top_p=args.soft_top_p,
                                 min_p=args.soft_min_p)  # fmt: skip
            return guide(self._mixer(dist, rng=rng).soft, gold, alpha, args.guidance, rng=rng)

        return feed

    def _temperature(self) -> float | Tensor:
        return self.model.soft_log_temperature.exp() if self.args.learn_temperature else self.args.soft_temperature

    def _progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps)

    def _note(self, training: bool, alpha: float, h: Tensor) -> None:
        if training and (self.state.global_step + 1) % max(1, int(self.state.logging_steps)):
            return  # a step that is not logged need not wait for the device
        metrics = self._metrics["train" if training else "eval"]
        metrics["alpha"].append(alpha)
        if len(h):
            metrics["thought_entropy"].append(h.mean().item())
        if self.args.learn_temperature:
            metrics["soft_temperature"].append(self._temperature().item())

    # -- evaluation and checkpoints ---------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self._micro = 0
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self._score is not None and self._decode_rows is not None and self.args.eval_decode_rows:
            rows = self._decode_rows.select(range(min(len(self._decode_rows), self.args.eval_decode_rows)))
            found = {f"{metric_key_prefix}_{r}_accuracy": self.accuracy(rows, r) for r in ("soft", "discrete")}
            metrics.update(found)
            self.log(dict(found))
        return metrics

    def accuracy(self, rows: Dataset, readout: str) -> float:
        """Mean score of the answers to `rows`, read out 'soft' or 'discrete'."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = rows.select(range(rank % len(rows), len(rows), processes))  # never empty: fewer rows are counted twice
        model = self.accelerator.unwrap_model(self.model)
        found = evaluate(model, self.processing_class, mine, self._score, self.decoding(readout), seed=self.args.seed)
        sums = torch.tensor([found["accuracy"] * len(mine), len(mine)], device=self.accelerator.device)
        points, n = self.accelerator.reduce(sums).tolist()
        return points / n

    def decoding(self, readout: str | None = None) -> SoftConfig:
        """How to decode the model: 'soft', 'discrete', or (None) as it was trained, which soft_config.json records."""
        if readout is None:
            readout = "soft" if self.args.is_soft else "discrete"
        temperature = self._temperature()
        return self.args.decoding(readout, temperature.item() if torch.is_tensor(temperature) else temperature)

    def _save(self, output_dir: str | None = None, state_dict=None):
        if self.args.learn_temperature:  # belongs to the decoding, not to the model
            state_dict = self.accelerator.get_state_dict(self.model) if state_dict is None else state_dict
            state_dict = {k: v for k, v in state_dict.items() if not k.endswith("soft_log_temperature")}
        super()._save(output_dir, state_dict)
        self.decoding().save(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        with no_interrupt():
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.learn_temperature:
            temperature = SoftConfig.load(resume_from_checkpoint).temperature
            self.model.soft_log_temperature.data.fill_(math.log(temperature))

    def _freeze(self, embeddings: bool, layers: int) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if embeddings:
            model.get_input_embeddings().requires_grad_(False)
        if layers:
            stack = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), [])
            if layers > len(stack):
                raise ValueError(f"freeze_layers={layers} but {type(model).__name__} has {len(stack)} layers")
            for layer in list(stack)[:layers]:
                layer.requires_grad_(False)


def soft_loss(
    logits: Tensor, labels: Tensor, thought: Tensor, *, thought_weight: float = 1.0, soft_labels: Soft | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the raw logits, summed over the target tokens; and the entropies of the thought's steps.

    Raw: the filters and the temperature that shape the inputs have no part in the likelihood.

    Args:
        logits: [B, T, V]; labels: [B, T], -100 off the targets; thought: [B, T] bool.
        thought_weight: weight of the thought's tokens, the others have 1.
        soft_labels: ids and weights [B, T, M]: the target at each position is this distribution instead of the label.

    Returns:
        loss [] float32, a sum; entropies [n] float32 nats of the n steps that predict a thought token.
    """
    target = labels[:, 1:] != -100
    chosen = logits[:, :-1][target].float()  # [N, V]
    is_thought = thought[:, 1:][target]
    logp = chosen.log_softmax(-1)
    if soft_labels is None:
        ce = -logp.gather(-1, labels[:, 1:][target][:, None])[:, 0]
    else:
        ids, weights = (x[:, 1:][target] for x in soft_labels)
        ce = -(weights * logp.gather(-1, ids)).sum(-1)
    ce = torch.where(is_thought, thought_weight * ce, ce)
    return ce.sum(), entropy(chosen[is_thought])


def check_traces(dataset: Dataset, targets: str) -> None:
    """Raise ValueError for data that `targets` "traces" or "oracle" cannot be taken from."""
    if missing := sorted({"prompt", "traces"} - set(dataset.column_names)):
        raise ValueError(f"targets={targets!r} needs columns {missing}; the data has {dataset.column_names}")
    if not all(dataset["traces"]):
        raise ValueError(f"targets={targets!r}: row {list(map(bool, dataset['traces'])).index(False)} has no traces")


def add_trace_ids(dataset: Dataset, tokenizer, max_length: int | None = None) -> Dataset:
    """Tokenise the column `traces`, prompt included, as TRL tokenises prompt and completion."""

    def tokenise(row: dict) -> dict:
        if isinstance(row["prompt"], str):
            eos = tokenizer.eos_token
            texts = [row["prompt"] + t + ("" if t.endswith(eos) else eos) for t in row["traces"]]
            ids = tokenizer(texts)["input_ids"]
        else:
            chats = [row["prompt"] + trace for trace in row["traces"]]
            ids = [tokenizer.apply_chat_template(c, return_dict=True)["input_ids"] for c in chats]
        return {"trace_ids": [x[:max_length] for x in ids]}

    return dataset.map(tokenise, desc="Tokenizing traces")


def _frontier(trace_ids: Tensor, trace_mask: Tensor, ids: Tensor) -> Soft:
    """At each position the empirical distribution of the traces that reach it; past all of them the gold token.

    trace_ids, trace_mask: [B, M, T]; ids: [B, T] gold -> Soft [B, T, M].
    """
    here = trace_mask.transpose(1, 2).bool()  # [B, T, M]
    none = ~here.any(-1, keepdim=True)
    choices = trace_ids.transpose(1, 2).where(~none, ids[..., None])
    here = here | none
    return Soft(choices, here / here.sum(-1, keepdim=True))


def check_writable(folder: str | Path) -> None:
    """Raise ValueError before any work where checkpoints could not be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} cannot be written ({error}): choose another folder") from error


@contextlib.contextmanager
def no_interrupt():
    """Hold Ctrl-C back until the block is through, so that it cannot cut a checkpoint in half."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = []
    before = signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def _encode(tokenizer, text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # the class that a vocabulary without an unknown token raises
        ids = []
    if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
        raise ValueError(f"the tokenizer has no tokens for {text!r}: name a text that the data really contains")
    return ids
