"""What every test runs under, and the subprocesses that it starts: no network, no chatter, few
threads."""

import atexit
import gc
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

gc.disable()  # until all is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# on models this small more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `make test` hands its own flags on, and a make that a test starts would print their messages too
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)
# `nohup make test`, or a background job of a script, ignores Ctrl-C, and so would every program
# started here: those whose end by Ctrl-C is tested too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How long each file takes. The longest are begun first, so that no worker is left alone with one at
# the end (--no-loadscope-reorder keeps this order).
SECONDS = Path(__file__).with_name("seconds.json")
UNKNOWN = 10.0  # of a new file


def pytest_addoption(parser):
    parser.addoption(
        "--record-seconds",
        action="store_true",
        help="write what each file took to tests/seconds.json; later runs begin with the longest",
    )
    parser.addoption(
        "--fuzz-seconds",
        type=float,
        help="so long each test of tests/fuzz looks for a failure, in other cases every time",
    )


@pytest.fixture
def fuzz_seconds(request):
    return request.config.getoption("--fuzz-seconds")


def pytest_configure(config):
    if config.getoption("--record-seconds") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


class Recorder:
    """Sums the seconds of each file's tests; under xdist in the process that hears of all."""

    def __init__(self):
        self.seconds = Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[Path(report.location[0]).name] += report.duration

    def pytest_sessionfinish(self):
        before = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
        seconds = before | {name: round(value, 1) for name, value in self.seconds.items()}
        here = [name for name in seconds if SECONDS.with_name(name).exists()]
        longest = sorted(here, key=lambda name: -seconds[name])
        SECONDS.write_text(json.dumps({name: seconds[name] for name in longest}, indent=1) + "\n")


def pytest_collection_finish():
    """The imports stay to the end. Taken out of the garbage collector's sight they are not walked at
    each of its rounds, of which every run of a trainer asks for one: half of its time."""
    gc.enable()
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries complain of what they left


def pytest_collection_modifyitems(items):
    seconds = json.loads(SECONDS.read_text())
    items.sort(key=lambda item: -seconds.get(item.path.name, UNKNOWN))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not os.environ.get("SOFTAR_GPU_DRY"):
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
