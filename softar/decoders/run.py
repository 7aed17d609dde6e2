"""How a search begins and ends.

Shapes: N prompts, P prompt length, T steps.
"""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .. import guard
from ..caches import check_cache
from ..config import SoftConfig
from ..decode import SoftOutput
from ..loops import run_loop
from ..models import plain
from ..models.reading import check_ragged
from ..thought import Progress, Record, warn_unopened


def check_search(model, input_ids: Tensor, attention_mask: Tensor, num_beams: int) -> None:
    """Raise ValueError for a model, prompts or beams that cannot be searched with."""
    guard.check_causal(model)
    guard.check_prompts(input_ids, attention_mask)
    check_ragged(model, attention_mask)
    guard.check_beams(model, num_beams)


# Wide because it passes on what a search is called with.
def run_search(
    loop: Callable,
    model,
    input_ids: Tensor,
    attention_mask: Tensor,
    config: SoftConfig,
    search,
    settings: dict[str, Any],
    stops: Sequence[StoppingCriteria],
    tokenizer,
) -> tuple[SoftOutput, list[float]]:
    """loop: gets config and search, too. settings: in place of the model's own, which says the cache.
    Nothing is compiled, whatever the model's compile_config: rows come and go."""
    guard.check_one_temperature(config, "a search")
    own = copy.deepcopy(plain(model).generation_config)
    own.update(**settings, max_new_tokens=config.max_new_tokens, disable_compile=True)
    check_cache(model, own)
    loop = functools.partial(loop, config=config, search=search)
    return run_loop(model, loop, input_ids, attention_mask, own, tokenizer=tokenizer, stops=stops)


def search_output(
    prompts: Tensor,
    progress: Progress,
    record: Record,
    cost: tuple[int, int],
    started: float,
    config: SoftConfig,
    search,
) -> SoftOutput:
    """prompts: [N, P]. cost: forwards and positions. started: by time.perf_counter."""
    if config.think_start is not None:
        warn_unopened(config, progress)
    return SoftOutput(
        torch.cat([prompts, record.token], 1),
        record,
        prompts.shape[1],
        progress.answer_start,
        *cost,
        time.perf_counter() - started,
        config,
        f"by {search}",
    )
