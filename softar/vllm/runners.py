"""Soft requests in vLLM's second model runner, by the hook it has: a model names the class of its ModelState.

Nothing here imports vLLM. The mixtures go into the state's own buffer of input embeddings, which CUDA graphs read.
"""

from typing import Any

from .plugin import admit
from .rows import Rows


def soft_state(base: type) -> type:
    """A ModelState that is `base` and thinks."""

    class SoftModelState(base):
        softar: Rows | None = None  # from the first soft request on

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.softar = admit(self.softar, new_req_data, self)

        def forget(self, finished: set[str]) -> None:
            """`remove_request` will not do: it is called for requests too that were only thrown out of the cache."""
            if self.softar is not None:
                self.softar.drop(finished)

        def prepare_inputs_embeds(self, scheduled_encoder_inputs, input_batch, req_states):
            embeds = super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)
            if self.softar is not None and self.softar.rows:
                computed, counts = input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens
                self.softar.feed(embeds, input_batch.req_ids, computed.tolist(), counts.tolist())
            return embeds

        def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
            custom = super().custom_sampler(sampler)
            config = self.vllm_config  # what refuses a sampler that is not its own; soft requests are refused there
            if custom is None and config.speculative_config is None and config.watermark_config is None:
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
        turns = rows.think(logits, input_batch.req_ids, ends.tolist(), skipped.tolist())
        out = self.sampler(logits, input_batch)
        rows.choose(turns, out.sampled_token_ids)
        for turn in turns:
            if turn.rows[0].wants_record:
                out.logprobs_tensors = rows.write(turn, out.logprobs_tensors)
        return out
