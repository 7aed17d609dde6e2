"""Scripts run as `python FILE ...` runs them, but in processes forked from one that has imported
torch, transformers and trl already: to import them takes longer than a few steps of training.

That process computes nothing, so that no thread is lost in a fork. What concerns the start of a
program itself, launchers and Ctrl-C is tested on programs of their own.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "softar.sft.trainer",
        "softar.diffusion.sft",
        "softar.rl.grpo",
        "softar.rl.ppo",
        "softar.evals.sweep",
        "softar.show.figures",
    ]
)


def run(file, arguments, env, cwd="/", processes=1, timeout=600):
    """A CompletedProcess of the script: its first process' output, and the exit code of the first
    that failed.

    processes: so many, which find each other as those that torchrun starts do.
    """
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"out{rank}" for rank in range(processes)]
        errs = [Path(folder) / f"err{rank}" for rank in range(processes)]
        running = []
        for rank, more in enumerate(ranks(processes)):
            arguments = [str(x) for x in arguments]
            job = (str(file), arguments, dict(env) | more, cwd, str(outs[rank]), str(errs[rank]))
            running.append(SERVER.Process(target=work, args=job))
            running[-1].start()
        try:
            for process in running:
                process.join(timeout)
            codes = [process.exitcode for process in running]
        finally:
            for process in running:
                process.kill()
        code = next((code for code in codes if code != 0), 0)
        out, err = outs[0].read_text(), "".join(file.read_text() for file in errs)
    return subprocess.CompletedProcess([file, *arguments], code, out, err)


def ranks(processes):
    """What torchrun adds to the environment of each."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
    shared["LOCAL_WORLD_SIZE"] = shared["WORLD_SIZE"]
    return [shared | dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(processes)]


def work(file, arguments, env, cwd, out, err):
    gc.freeze()  # as in conftest.py
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = [file, *arguments]
    sys.path.insert(0, os.path.dirname(file))
    runpy.run_path(file, run_name="__main__")
