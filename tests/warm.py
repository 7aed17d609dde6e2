"""Programs run as `python FILE ...` runs them, but in processes forked from one that has imported
torch, transformers, trl and vLLM already: to import them takes longer than a few steps of training.
What such a program itself starts as `python FILE ...` is forked from it, and is otherwise as
subprocess makes it: a process of its own, with its group, signals and pipes.

The first process computes nothing, so that no thread is lost in a fork. What concerns the start of
a program itself, and launchers, is tested on programs of their own.
"""

import atexit
import contextlib
import gc
import inspect
import logging
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from operator import attrgetter
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
        "matplotlib.pyplot",
        "matplotlib.backends.backend_agg",
        "softar.vllm.engine",
        "vllm",
        "setproctitle",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
    ]
)
FORKING = Path(__file__).with_name("forking") / "sitecustomize.py"


class Program:
    """A running program, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, file, arguments, env, cwd="/"):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("out", "err")]
        self.args = [str(file), *map(str, arguments)]
        job = (self.args, dict(env), str(cwd), self.files)
        self.process = SERVER.Process(target=begin, args=job)
        self.process.start()
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Nothing that it started is to stay."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()
        self.folder.cleanup()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(file.read_text() for file in self.files)


def run(file, arguments, env, cwd="/", processes=1, timeout=600):
    """A CompletedProcess of the program: its first process' output, and the exit code of the first
    that failed.

    processes: so many, which find each other as those that torchrun starts do.
    """
    programs = [Program(file, arguments, env | more, cwd) for more in ranks(processes)]
    end = time.monotonic() + timeout
    try:
        said = [program.communicate(end - time.monotonic()) for program in programs]
        code = next((p.returncode for p in programs if p.returncode != 0), 0)
    finally:
        for program in programs:
            program.__exit__()
    return subprocess.CompletedProcess(
        programs[0].args, code, said[0][0], "".join(err for _, err in said)
    )


def cold(file, arguments, env, timeout=600):
    """The same with imports of its own, where the environment decides what they do."""
    command = [sys.executable, str(file), *map(str, arguments)]
    with subprocess.Popen(
        command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            said = process.communicate(timeout=timeout)[0].decode()
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started is not to stay
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, said, "")


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


def begin(args, env, cwd, files):
    """In the fork of the first process."""
    gc.freeze()  # as in conftest.py
    os.setsid()
    for stream, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    subprocess.Popen._execute_child = fork
    become(args, env, cwd)


def become(args, env, cwd):
    """This process is `python *args` from now on."""
    if "setproctitle" in sys.modules:  # vLLM's processes have names; it looks at the environment
        sys.modules["setproctitle"].setproctitle(" ".join(["python", *args]))
    weakref.finalize._registry.clear()  # temporary folders and the like are the parent's
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    # What is read from the environment by an import
    if env.get("TORCHDYNAMO_DISABLE") == "1":
        sys.modules["torch._dynamo.config"].disable = True
    if str(FORKING.parent) in env.get("PYTHONPATH", "").split(os.pathsep):
        runpy.run_path(str(FORKING))
    if stream := env.get("VLLM_LOGGING_STREAM"):
        for handler in logging.getLogger("vllm").handlers:
            handler.setStream(attrgetter(stream.removeprefix("ext://sys."))(sys))
    sys.stdin = open(0, closefd=False)  # multiprocessing has closed it
    sys.argv = args
    sys.path.insert(0, os.path.dirname(args[0]))
    try:
        runpy.run_path(args[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


# --- programs that a program starts ---

EXECUTE = subprocess.Popen._execute_child
SIGNATURE = inspect.signature(EXECUTE)


def fork(popen, *given):
    """In place of Popen._execute_child."""
    call = SIGNATURE.bind(popen, *given).arguments
    args = [os.fsdecode(arg) for arg in call["args"]]
    if args[0] != sys.executable or not Path(args[1]).is_file():
        return EXECUTE(popen, *given)
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    read, write, out_read, out, err_read, err = ends = [call[name] for name in pipes]
    sys.stdout.flush()
    popen.pid = os.fork()
    if popen.pid == 0:
        child = multiprocessing.Process(
            target=become, args=(args[1:], call["env"] or dict(os.environ), call["cwd"] or ".")
        )
        if call["start_new_session"]:
            os.setsid()
        for stream, file in enumerate((read, out, err)):
            if file != -1:
                os.dup2(file, stream)
        for file in {write, out_read, err_read} - {-1}:
            os.close(file)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(child._bootstrap())
    popen._child_created = True
    popen._close_pipe_fds(*ends)
