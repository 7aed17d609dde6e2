"""What this machine needs of vLLM: its environment and engine settings, with or without a GPU."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch

KEY = "VLLM_API_KEY"  # of the environment: what a server asks for and its clients send


@contextlib.contextmanager
def environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set what is not set while the block runs: the processes that it starts inherit it."""
    new = {key: value for key, value in defaults.items() if key not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            os.environ.pop(key, None)


def on_cpu() -> bool:
    return not torch.cuda.is_available()


def settings(folder: str) -> dict[str, str]:
    """Environment variables for vLLM's processes; those that the user has set override them."""
    variables = {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if Path(folder).is_dir():  # nothing is to be fetched, so nothing is to be asked for
        variables["HF_HUB_OFFLINE"] = "1"
    if on_cpu():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
        variables |= {
            # GiB; vLLM would take nearly all of the memory
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, memory // 8)),
            "VLLM_CPU_CI_ENV": "1",  # no warm-up: it is for compiled code, and eager has none
            # the log-probabilities would still be compiled, at the first prompt
            "TORCHDYNAMO_DISABLE": "1",
        }
    return variables


def require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            'vLLM is not installed: `pip install "softar[vllm]"`, or `make vllm` in a checkout'
        )
