"""Soft requests in vLLM's second model runner, by the hook it has: a model names the class of its
ModelState.

Nothing here imports vLLM. The mixtures go into the state's own buffer of input embeddings, which
CUDA graphs read.
"""

from copy import copy
from typing import Any

from ..config import SoftConfig
from .finite import watch, zero_blocks
from .hooks import patch
from .request import soft_of
from .rows import Rows
from .switches import thinks


def soft_state(base: type) -> type:
    """A ModelState that is `base` and thinks."""

    class SoftModelState(base):
        softar: Rows | None = None  # from the first soft request on

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.softar = admit(self.softar, new_req_data, self)

        def forget(self, finished: set[str]) -> None:
            """`remove_request` will not do: it is called for requests too that were only thrown out
            of the cache."""
            if self.softar is not None:
                self.softar.drop(finished)

        def prepare_inputs_embeds(self, scheduled_encoder_inputs, input_batch, req_states):
            embeds = super().prepare_inputs_embeds(
                scheduled_encoder_inputs, input_batch, req_states
            )
            if self.softar is not None and self.softar.rows:
                computed, counts = (
                    input_batch.num_computed_tokens_np,
                    input_batch.num_scheduled_tokens,
                )
                self.softar.feed(embeds, input_batch.req_ids, computed.tolist(), counts.tolist())
            return embeds

        def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
            custom = super().custom_sampler(sampler)
            # what refuses a sampler that is not its own; soft requests are refused there
            config = self.vllm_config
            if (
                custom is None
                and config.speculative_config is None
                and config.watermark_config is None
            ):
                return SoftSampler(sampler, self), None
            return custom

    return SoftModelState


class SoftSampler:
    """vLLM's sampler, whose answers for those who think are replaced."""

    def __init__(self, sampler: Any, state: Any):
        self.sampler, self.state = sampler, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __call__(self, logits, input_batch):
        rows = self.state.softar
        if rows is None or not rows.rows:
            return self.sampler(logits, input_batch)
        ends = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        skipped = ends < input_batch.prefill_len_np
        batch = logits, input_batch.req_ids, ends.tolist(), skipped.tolist()
        return rows.step(*batch, lambda: self.sampler(logits, input_batch))


def init_device(method, self):
    if thinks(self.vllm_config):
        # here, and not where requests come in: mixtures need the room, clients get none of it
        self.vllm_config.model_config.enable_prompt_embeds = True
        watch(self.vllm_config.use_v2_model_runner)
    method(self)  # before the runners are imported: on CPU it makes the second one fit for that
    if self.vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu import model_runner

        patch(model_runner, "init_model_state", init_model_state)
        patch(model_runner.GPUModelRunner, "finish_requests", finish_requests)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        GPUModelRunner.softar = None  # its Rows, from the first soft request on
        patch(GPUModelRunner, "_update_states", update_states)
        patch(GPUModelRunner, "_preprocess", preprocess)
        patch(GPUModelRunner, "_sample", sample)


def admit(rows, new, owner):
    """Take up a request if it is soft: a new one, or one that had been thrown out of the cache.

    Args: rows: Rows or None. owner: has the model, its device and its configuration. Returns rows,
    by then not None.
    """
    soft = soft_of(new.sampling_params)
    if soft is None:
        return rows
    if soft["record"]:
        # The record takes the place of log-probabilities: of this runner's copy alone, or its sampler
        # would rank the whole vocabulary for what is then written over.
        new.sampling_params = copy(new.sampling_params)
        new.sampling_params.logprobs = None
    if rows is None:
        rows = Rows(
            lambda ids: owner.model.embed_input_ids(ids), owner.device, owner.model_config.seed
        )
    if new.req_id not in rows.rows:
        params = new.sampling_params
        eos = {params.eos_token_id, *(params.stop_token_ids or ())} - {None}
        config = SoftConfig(**soft["config"])
        rows.add(new.req_id, config, new.prompt_token_ids, params.seed, sorted(eos), soft["record"])
    return rows


def init_model_state(method, vllm_config, model, *args, **kwargs):
    if vllm_config.model_config.enable_prompt_embeds:
        from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

        base = resolve_model_state_cls(vllm_config, model)
        model.get_model_state_cls = lambda: soft_state(base)
    return method(vllm_config, model, *args, **kwargs)


def finish_requests(method, self, scheduler_output):
    zero_blocks(self, scheduler_output)
    if forget := getattr(self.model_state, "forget", None):
        forget(scheduler_output.finished_req_ids)
    return method(self, scheduler_output)


def update_states(method, self, scheduler_output):
    zero_blocks(self, scheduler_output)
    if self.softar is not None:
        self.softar.drop(scheduler_output.finished_req_ids)
    for new in scheduler_output.scheduled_new_reqs:
        self.softar = admit(self.softar, new, self)
    return method(self, scheduler_output)


def preprocess(method, self, scheduler_output, *args, **kwargs):
    inputs = method(self, scheduler_output, *args, **kwargs)
    if self.softar is not None and self.softar.rows:
        batch = self.input_batch
        counts = [scheduler_output.num_scheduled_tokens[name] for name in batch.req_ids]
        computed = batch.num_computed_tokens_cpu[: len(counts)].tolist()
        self.softar.feed(inputs[1], batch.req_ids, computed, counts)
    return inputs


def sample(method, self, logits, *args, **kwargs):
    if self.softar is None or not self.softar.rows or logits is None:
        return method(self, logits, *args, **kwargs)
    names = self.input_batch.req_ids
    ends = self.optimistic_seq_lens_cpu[: len(names)].tolist()
    skipped = self.discard_request_mask.np[: len(names)].tolist()
    return self.softar.step(
        logits, names, ends, skipped, lambda: method(self, logits, *args, **kwargs)
    )
