"""Rollouts on vLLM: an engine in the trainer's process, TRL's `VLLMGeneration`, that thinks by
softar's plug-in.

The engine is started with the trainer: later, optimiser and activations would be in the memory that
it wants, and what it cannot serve would show only after the first steps' work. It starts with
made-up weights: those of the policy go in before each rollout that they may have changed for.

Shapes: B rows, P prompt length, C completion steps, K draws of a step.
"""

import contextlib
import copy
import tempfile
import time
from itertools import chain

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForCausalLM
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import pad

from softar.decode import SoftOutput
from softar.models import plain
from softar.thought import Kind, Record, begin, check_finite, mk_rules, replay, warn_unopened
from softar.vllm.export import check_heads, is_narrow, widened
from softar.vllm.finite import check_ended
from softar.vllm.hooks import VERSIONS
from softar.vllm.machine import environment, on_cpu, settings
from softar.vllm.plugin import register
from softar.vllm.record import Read, record_of, to_record
from softar.vllm.request import fields_of

from .vllm_process import (
    as_torchrun,
    leaving_no_trace,
    naming_no_memory,
    repack_tied,
    without_compiling,
)

SPACE = "VLLM_CPU_KVCACHE_SPACE"
VALUE_HEAD = "v_head."  # PPO's, on the policy's module


class VLLMRollout(VLLMGeneration):
    """A colocated engine that decodes softly, one in each process, or one for `tensor_parallel_size`
    processes, each of which holds a part of its weights and computes for the prompts of all.

    Args:
        model, accelerator, processing_class, options: as for VLLMGeneration, whose `sync_weights`
            and generation of a batch are replaced; how it finds the weights under PEFT, DeepSpeed
            and FSDP is its own.
        decoding: the policy, with its texts resolved to ids. eos: ids that end a row.

    Raises:
        ValueError: a version of vLLM that the plug-in does not know, a quantised model, heads of a
            width that vLLM has no kernel for, or processes or heads that `tensor_parallel_size`
            does not divide.
    """

    def __init__(self, model, accelerator, processing_class, decoding, eos: list[int], **options):
        self.decoding, self.eos, self.pad = decoding, eos, processing_class.pad_token_id
        super().__init__(
            model,
            accelerator,
            processing_class,
            max_completion_length=decoding.max_new_tokens,
            temperature=decoding.answer_temperature,
            **options,
        )

    def _init_vllm(self):
        import vllm

        base = plain(self.model)
        check_policy(vllm.__version__, base)
        shares, processes = self.tensor_parallel_size, self.accelerator.num_processes
        check_shares(shares, processes, base.config)
        self.group = None  # of the processes that share the engine
        if shares > 1:
            ranks = torch.arange(processes).view(-1, shares).tolist()
            self.group, _ = torch.distributed.new_subgroups_by_enumeration(ranks)
        # Under autocast the policy computes in this, whatever its weights are kept in
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = mixed.get(self.accelerator.mixed_precision, base.dtype)
        self.stand_in = None  # of a Llama with heads that have to be widened
        if is_narrow(base.config):
            config = copy.deepcopy(base.config)
            self.stand_in = LlamaForCausalLM._from_config(config, dtype=base.dtype)
        register()  # vLLM does it too, unless VLLM_PLUGINS says otherwise
        with tempfile.TemporaryDirectory(prefix="softar-rollout-") as folder, leaving_no_trace():
            save_config(base if self.stand_in is None else widened(self.stand_in), dtype, folder)
            variables = settings(folder)
            if SPACE in variables:  # GiB of a CPU's memory
                share = int(variables[SPACE]) // processes
                variables[SPACE] = str(max(1, share))
            joins = torch.distributed.is_initialized()
            apart, joined = naming_no_memory(self.accelerator), as_torchrun(self.accelerator)
            with environment(variables), apart, joined:
                self.llm = vllm.LLM(
                    folder,
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    dtype=str(dtype).removeprefix("torch."),
                    enable_prompt_embeds=True,
                    enable_prefix_caching=False,
                    enforce_eager=on_cpu(),
                    distributed_executor_backend="external_launcher",
                    tensor_parallel_size=shares,
                    gpu_memory_utilization=self.gpu_memory_utilization,
                    max_model_len=self.max_model_length,
                    max_num_seqs=shares * self.max_num_seqs,
                    # vLLM 0.32 cannot take back a seeded draw on a CPU, and does where a prompt is
                    # not through
                    enable_chunked_prefill=False if on_cpu() else None,
                    model_impl=self.model_impl,
                    max_logprobs=-1,
                    disable_log_stats=True,
                    seed=0,
                )
        engine = self.llm.llm_engine
        self.limit, self.end = engine.model_config.max_model_len, engine.engine_core.shutdown
        # that would also end the group of the trainer's processes, which is not the engine's
        if joins:
            engine.engine_core._finalizer.detach()
            self.end = engine.model_executor.shutdown

    # -- weights

    @torch.no_grad()
    def sync_weights(self):
        """Copy the policy's weights into the engine. vLLM's own reload, as it repacks what its
        kernels want otherwise: on CPU a weight that is only copied is never read.

        Raises:
            ValueError: the engine's model has a parameter that the policy does not.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        with (
            self._whole(),
            contextlib.closing(self._iter_named_params()) as weights,
            without_compiling(),
        ):
            runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
            model = runner.get_model()
            names = {name for name, _ in model.named_parameters()}
            with set_current_vllm_config(runner.vllm_config):
                initialize_layerwise_reload(model)
                loaded = model.load_weights(weights)
                finalize_layerwise_reload(model, runner.model_config)
                if on_cpu():
                    repack_tied(model)
        if missing := sorted(names - loaded):
            raise ValueError(
                f"rollout='vllm': the policy has no weights for vLLM's {missing[:3]} ({len(missing)} in "
                f"all); give rollout='loop'"
            )
        self.llm.reset_prefix_cache()

    def _iter_named_params(self):
        """TRL's names and weights, less the value head; adapters leave their base as it was, to the
        bit."""
        base = {}
        if is_peft_model(self.model) and not (self._dist.is_fsdp or self._dist.is_zero3):
            # To merge and to unmerge again rounds: each rollout would move the frozen weights a
            # little
            base = {
                name: p.to("cpu", copy=True)
                for name, p in self.model.named_parameters()
                if ".base_layer." in name
            }
        # vLLM loads a layer when it has all its parts: what TRL gathers or merges for the moment
        # has to be copied
        lent = is_peft_model(self.model) or self._dist.is_fsdp or self._dist.is_zero3
        trls = (
            (name, p.detach())
            for name, p in super()._iter_named_params()
            if not name.startswith(VALUE_HEAD)
        )
        weights = ((name, p.clone() if lent else p) for name, p in trls)
        try:
            yield from weights if self.stand_in is None else self._widened(dict(weights))
        finally:  # an interruption leaves adapters merged
            if base and any(
                layer.merged for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)
            ):
                self.model.unmerge_adapter()
            for name, p in self.model.named_parameters() if base else ():
                if name in base:
                    p.copy_(base[name])

    def _widened(self, weights: dict[str, torch.Tensor]):
        keys = self.stand_in.load_state_dict(weights, strict=False)
        # a tied one is there once
        missing = [name for name in keys.missing_keys if name != "lm_head.weight"]
        if wrong := keys.unexpected_keys or missing:
            raise ValueError(
                f"rollout='vllm': the policy's weights {wrong[:3]} are not those of a plain Llama; give "
                f"rollout='loop'"
            )
        return ((name, p.detach()) for name, p in widened(self.stand_in).named_parameters())

    @contextlib.contextmanager
    def _whole(self):
        """What is interrupted leaves the engine with half of the weights, or with requests that go
        on: it ends."""
        if self.llm is None:
            raise RuntimeError(
                "rollout='vllm': the engine was ended, or interrupted at work; make another trainer"
            )
        try:
            yield
        except BaseException:
            self.close()
            raise

    # -- rollouts

    def decode(self, prompts: list[list[int]], seeds: list[int]) -> SoftOutput:
        """What softar.generate makes of these prompts with a generator of each seed; the answers'
        tokens are vLLM's own draws of those seeds. All on the accelerator's device.

        Raises:
            ValueError: a prompt is too long. FloatingPointError: NaN or infinite logits.
        """
        from vllm import SamplingParams

        began, most = time.perf_counter(), self.decoding.max_new_tokens
        first, count = 0, len(prompts)
        if self.group is not None:
            first, prompts, seeds = self._of_all(prompts, seeds)
        longest = max(map(len, prompts))
        if longest + most > self.limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_completion_length={most} are more than the {self.limit} of the "
                f"engine: shorten them, or give vllm_max_model_length={longest + most} if the model can"
            )
        soft = fields_of(self.decoding) | {"record": True}
        params = [
            SamplingParams(
                temperature=self.decoding.answer_temperature,
                seed=seed,
                max_tokens=most,
                stop_token_ids=self.eos,
                ignore_eos=True,  # stop_token_ids are all that there are
                detokenize=False,
                extra_args={"soft": soft},
            )
            for seed in seeds
        ]
        here = self.accelerator.device
        # vLLM draws for each row, and then anew for those that have seeds
        devices = [torch.cuda.current_device()] if here.type == "cuda" else []
        with self._whole(), without_compiling(), torch.random.fork_rng(devices):
            outs = self.llm.generate(
                [{"prompt_token_ids": row} for row in prompts], params, use_tqdm=False
            )
        for o in outs:
            check_ended(o.outputs[0])
        own = slice(first, first + count)
        read = [record_of(o.outputs[0]) for o in outs[own]]
        out = output_of(prompts[own], read, self.decoding, self.eos, self.pad)
        record = type(out.record)(*(x.to(here) for x in out.record))
        return SoftOutput(
            out.sequences.to(here),
            record,
            out.prompt_length,
            out.answer_start.to(here),
            out.num_forwards,
            out.token_forwards,
            time.perf_counter() - began,
            out.config,
            out.why,
        )

    def _of_all(self, prompts, seeds) -> tuple[int, list[list[int]], list[int]]:
        """The place of the first of these among the prompts and seeds of all processes that share
        the engine, which it has to be given in each of them; and those."""
        parts = [None] * self.tensor_parallel_size
        torch.distributed.all_gather_object(parts, (prompts, seeds), group=self.group)
        first = sum(len(rows) for rows, _ in parts[: torch.distributed.get_rank(self.group)])
        return first, *(list(chain.from_iterable(column)) for column in zip(*parts, strict=True))

    def close(self) -> None:
        """End the engine and let go of its memory."""
        if self.llm is not None:
            self.end()
            self.llm = self.end = None


def check_policy(version: str, model) -> None:
    """Raise ValueError for a vLLM or a model with which no rollout is possible."""
    if not any(version == v or version.startswith(f"{v}.") for v in VERSIONS):
        raise ValueError(
            f"rollout='vllm': vLLM {version} is not among the versions that softar thinks in, "
            f"{VERSIONS}: install one, or give rollout='loop'"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "rollout='vllm': the model is quantised; load it in bfloat16, or give rollout='loop'"
        )
    if not is_narrow(model.config):
        check_heads(model.name_or_path, model.config)


def check_shares(shares: int, processes: int, config) -> None:
    """Raise ValueError where processes or heads cannot be shared out so."""
    heads = config.num_attention_heads
    for what, number in (("processes", processes), ("attention heads", heads)):
        if number % shares:
            raise ValueError(
                f"vllm_tensor_parallel_size={shares} must divide the {number} {what}: give another"
            )


def save_config(model, dtype: torch.dtype, folder: str) -> None:
    """The model as an unquantised one of this dtype, without weights."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    if hasattr(config, "quantization_config"):  # of the GGUF that the weights were read from
        del config.quantization_config
    config.save_pretrained(folder)


def output_of(
    prompts: list[list[int]], read: list[list[Read]], decoding, eos: list[int], pad_id: int
) -> SoftOutput:
    """The steps that each row read, as what softar.generate returns of a decode. The loop's own
    rules go through them again, so that padding, kinds and the answer's start are theirs."""
    ids = pad([torch.tensor(row) for row in prompts], padding_value=pad_id, padding_side="left")
    width, steps = int(decoding.width), max(map(len, read))
    slots = one_draw_a_slot if decoding.mixer == "k-samples" else widened_to
    padding = Read(pad_id, (pad_id,), (1.0,), int(Kind.PAD), float("nan"), 0.0)
    rows = [
        to_record([slots(step, width) for step in [*row, *[padding] * (steps - len(row))]])
        for row in read
    ]
    record = Record(*(torch.cat(column) for column in zip(*rows, strict=True)))
    rules = mk_rules(
        decoding, ids.device, torch.tensor(pad_id), torch.tensor(eos, dtype=torch.long)
    )
    ended = torch.isin(record.token, rules.eos).cumsum(1) > 0
    before = torch.nn.functional.pad(ended, (1, -1))  # by an earlier step
    progress, again = replay(rules, begin(decoding, ids), record, before)
    if decoding.think_start is not None:
        warn_unopened(decoding, progress)
    for t in range(steps):
        check_finite(Record(*(column[:, t] for column in again)), t)
    differs = ((again.kind != record.kind) | (again.token != record.token)).any(0)
    if differs.any():
        raise RuntimeError(
            f"rollout='vllm': at step {int(differs.int().argmax())} vLLM followed other rules than "
            f"softar.generate; report it"
        )
    sequences = torch.cat([ids, record.token], 1)
    positions = ids.numel() + len(ids) * (steps - 1)
    costs, start = (steps, positions, 0.0), progress.answer_start
    return SoftOutput(sequences, again, ids.shape[1], start, *costs, decoding, "of the policy")


def widened_to(step: Read, width: int) -> Read:
    """A step in so many slots, those that are added without weight."""
    more = width - len(step.ids)
    ids, weights = (*step.ids, *(step.token,) * more), (*step.weights, *(0.0,) * more)
    return step._replace(ids=ids, weights=weights)


def one_draw_a_slot(step: Read, count: int) -> Read:
    """The draws of a step, one a slot, the one that stands for it first; the token alone where
    nothing was mixed."""
    ids = [step.token] * count
    if step.kind == Kind.SOFT:
        pairs = zip(step.ids, step.weights, strict=True)
        ids = [i for i, weight in pairs for _ in range(round(weight * count))]
        ids.sort(key=lambda i: i != step.token)
    if len(ids) != count:
        raise RuntimeError(
            f"rollout='vllm': weights {step.weights} are not those of {count} draws; report it"
        )
    return step._replace(ids=tuple(ids), weights=(1 / count,) * count)
