"""In how many processes a recipe runs: in this one, or in several that torchrun or accelerate
starts."""

import argparse
import logging
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from .checks import check_least

# set for the processes that are started here, so that they start no others
LAUNCHED = "SOFTAR_LAUNCHED"


class Program(NamedTuple):
    name: str  # for errors
    start: list[str]  # what Python starts it again with: a file, or -m and a module


class Processes(NamedTuple):
    """What a command line says of them."""

    number: int | None
    accelerate_config: str | None  # the file that `accelerate config` wrote

    @property
    def launches(self) -> bool:
        return (self.number or 1) > 1 or self.accelerate_config is not None


def split_processes(argv: list[str]) -> tuple[Processes, list[str]]:
    """The options about processes, and all others. Raises ValueError for one that is no number, or
    no file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--accelerate_config")
    try:
        options, others = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from error
    check_least(options, num_processes=1)
    file = options.accelerate_config
    if file is not None and not Path(file).is_file():
        raise ValueError(f"accelerate_config={file!r}: there is no such file")
    return Processes(options.num_processes, file), others


def is_launched() -> bool:
    """Is this one of the processes that a launcher has started?"""
    return LAUNCHED in os.environ or "LOCAL_RANK" in os.environ


def launch(program: Program, processes: Processes, argv: list[str]) -> int:
    """Run the program in processes of their own -> its exit code. Under a configuration of
    accelerate that launches, else torchrun, which needs none."""
    os.environ[LAUNCHED] = "1"
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the program has said it
    start = _accelerate if processes.accelerate_config else _torchrun
    return start(program, processes, argv)


def _torchrun(program: Program, processes: Processes, argv: list[str]) -> int:
    from torch.distributed.run import get_args_parser, run

    number = processes.number or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    options = ["--standalone", "--nproc_per_node", str(number), *program.start, *argv]
    return _code_of(lambda: run(get_args_parser().parse_args(options)))


def _accelerate(program: Program, processes: Processes, argv: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = ["--config_file", processes.accelerate_config]
    if processes.number is not None:
        options += ["--num_processes", str(processes.number)]
    args = launch_command_parser().parse_args([*options, *program.start, *argv])
    return _code_of(lambda: launch_command(args))


def _code_of(run) -> int:
    """The exit code of what the launcher runs; its own traceback says nothing about the program."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run()
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    except (KeyboardInterrupt, SignalException):
        return 130
    return 0


def default_accelerate_config() -> str | None:
    """The file that `accelerate config` writes, where it has been run."""
    from accelerate.commands.config.config_args import default_config_file

    return default_config_file if os.path.isfile(default_config_file) else None
