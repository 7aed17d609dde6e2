"""What every test runs under, and the subprocesses that it starts: no network, no chatter, few
threads."""

import os
import signal

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# on models this small more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `nohup make test`, or a background job of a script, ignores Ctrl-C, and so would every program
# started here: those whose end by Ctrl-C is tested too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Begun first, the longest ahead, so that no worker is left alone with one at the end
# (--no-loadscope-reorder keeps it).
LONGEST = (
    "recipe_diffusion",
    "vllm",
    "recipes",
    "recipe_rl",
    "vllm_soft",
    "diffusion_sft",
    "sweep",
    "embedded_diffusion",
    "bench_diffusion",
    "lm_eval",
    "rl_vllm",
    "vllm_state",
    "bench_vllm",
    "vllm_parallel",
)


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not os.environ.get("SOFTAR_GPU_DRY"):
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
