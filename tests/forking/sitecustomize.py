"""Python imports this first in every program that is started with this folder in PYTHONPATH.

vLLM on CPU then forks its engine and its workers, as it does on a GPU, where it would spawn them: each
would import torch and vLLM again, which takes most of an engine's start.
"""

import multiprocessing
import sys

get_context = multiprocessing.get_context


def forking(method=None):
    caller = sys._getframe(1).f_globals.get("__name__")
    return get_context("fork" if caller == "vllm.utils.system_utils" else method)


multiprocessing.get_context = forking
