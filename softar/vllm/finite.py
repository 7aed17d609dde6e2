"""Numbers that are not finite: no request brings any, and one that comes to such numbers ends alone.

A NaN in the cache of keys and values outlives its request. Whoever gets its block next reads the
stale positions with weight 0, and 0 times NaN is NaN: one request would spoil the answers of all
others. So embeddings that a client sends are checked; a request whose logits are not finite ends
with an error; and its blocks are taken out of the cache of prefixes and set to zero before anybody
else gets them. All of it in engines that think (see switches.py); others are left as they are.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..mixers import Mixed, Rng
from ..processors import leaves_none
from .hooks import patch
from .switches import thinks


def check_embeds(embeds: Tensor | None, model_config) -> None:
    """Raise ValueError unless a client's embeddings, [tokens, D], fit the model and are finite in
    its dtype."""
    if embeds is None:
        return
    width, dtype = model_config.get_hidden_size(), model_config.dtype
    if embeds.ndim != 2 or embeds.shape[1] != width or not embeds.is_floating_point():
        raise ValueError(
            f"prompt_embeds of shape {tuple(embeds.shape)} and {embeds.dtype} must be numbers of "
            f"shape (tokens, {width})"
        )
    if not embeds.to(dtype).isfinite().all():
        raise ValueError(f"prompt_embeds must be finite in {dtype}: it holds NaN or infinity")


def check_ended(output) -> None:
    """Raise FloatingPointError where `update_from_output` ended a request; output: vLLM's
    CompletionOutput."""
    if output.finish_reason == "error":
        raise FloatingPointError(
            f"the engine ended a request after {len(output.token_ids)} tokens, its logits were not "
            "finite: NaN or infinity in the weights, or too large for their dtype (try float32)"
        )


def without(banned: Sequence[int], mix: Callable[..., Mixed], device: torch.device):
    """A function of logits [G, V] and random numbers: what `mix` makes of them without the banned ids. A
    row of which they leave nothing reads weights that are no numbers, so that its request ends at its
    next step; its draws must not end the engine before."""
    if not banned:
        return mix
    ids = torch.tensor(banned).to(device)

    def mixed(logits: Tensor, rng: Rng) -> Mixed:
        logits = logits.index_fill(-1, ids, -torch.inf)
        lost = leaves_none(logits)[:, None]
        made = mix(logits.masked_fill(lost, 0), rng)
        weights = made.soft.weights.masked_fill(lost, torch.nan)
        return made._replace(soft=made.soft._replace(weights=weights))

    return mixed


# --- the engine's core ---


def schedule(method, self, *args, **kwargs):
    """Of vLLM's Scheduler: the blocks to be set to zero travel with what the workers do next."""
    out = method(self, *args, **kwargs)
    out.softar_blocks, self.softar_blocks = self.softar_blocks, ()
    return out


def update_from_output(method, self, scheduled, out):
    """End the requests whose logits were not finite, before their tokens count."""
    counts = out.num_nans_in_logits or {}
    names = [name for name, count in counts.items() if count and name in self.requests]
    if not names or not thinks(self.vllm_config):
        return method(self, scheduled, out)
    from vllm.logger import init_logger
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import RequestStatus

    say = init_logger("vllm.softar").warning
    say("softar: not finite, NaN or infinity, were the logits of %s: ended", ", ".join(names))
    manager = self.kv_cache_manager
    own = [blk for name in names for part in manager.get_blocks(name).blocks for blk in part]
    holders = Counter(blk.block_id for blk in own)
    manager.evict_blocks({*holders})
    if not self.needs_kv_cache_zeroing:  # or vLLM does it, whenever a block is taken
        # a block that somebody else reads too was finite when it was written
        alone = {b.block_id for b in own if not b.is_null and b.ref_cnt == holders[b.block_id]}
        self.softar_blocks = (*self.softar_blocks, *alone)
    ended = self.finish_requests(names, RequestStatus.FINISHED_ERROR)
    outputs = method(self, scheduled, out)
    for request in ended:
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
        )
    return outputs


# --- the workers ---


def watch(use_v2: bool) -> None:
    """Have this worker count in each request's logits what is not finite."""
    os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"
    if use_v2:
        from vllm.v1.worker.gpu.sample import sampler

        patch(sampler, "get_num_nans", count_broken)
    else:
        from vllm.v1.worker import gpu_model_runner

        patch(gpu_model_runner, "count_nans_per_row", count_broken)


def count_broken(method, logits: Tensor) -> Tensor:
    """[R, V] -> [R]: 1 where the largest logit is NaN or infinite, else 0. vLLM's own counts NaN
    alone."""
    return (~logits.amax(-1).isfinite()).to(torch.int32)


def zero_blocks(runner, scheduled) -> None:
    """Set to zero, in all layers, the blocks that `schedule` sent along."""
    blocks = vars(scheduled).get("softar_blocks", ())  # what vLLM warms up with has none
    if not blocks:
        return
    total = runner.kv_cache_config.num_blocks
    for layer in runner.compilation_config.static_forward_context.values():
        cache = vars(layer).get("kv_cache")
        for part in cache if isinstance(cache, (list, tuple)) else [cache]:
            if isinstance(part, Tensor) and part.numel():
                rows = part.shape[0] // total  # of a block
                for block in blocks:
                    part[block * rows : (block + 1) * rows].zero_()
