"""What the commands read and print: text from stdin, results on stdout, remarks on stderr."""

import contextlib
import importlib.util
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..decoders.answer import Decoded
    from ..evals.compare import Comparison

FAILURES = 5  # so many are named on stderr


def read_text(argument: str | None) -> str:
    """The argument; for None and for "-" what comes through the pipe, without the line end."""
    if argument is None and sys.stdin.isatty():
        raise ValueError("no text: give it as an argument, or through a pipe")
    text = sys.stdin.read().rstrip("\r\n") if argument in (None, "-") else argument
    if not text.strip():
        raise ValueError("the text is empty")
    return text


@contextlib.contextmanager
def only_results() -> Iterator[None]:
    """Whatever libraries and their children print to stdout meanwhile goes to stderr: stdout is for
    results."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # streams that are no files: under test, in a notebook
            out, err = sys.stdout.fileno(), sys.stderr.fileno()
            sys.stdout.flush()
            stdout = os.dup(out)
            os.dup2(err, out)
            stack.callback(os.close, stdout)
            stack.callback(os.dup2, stdout, out)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def print_json(value: Any) -> None:
    """One line. What JSON has no number for is null."""
    print(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def console(*, stderr: bool = False):
    """rich's. A file or a pipe has no width of its own, so that nothing is folded there."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    has_width = stream.isatty() or "COLUMNS" in os.environ
    return Console(file=stream, highlight=False, width=None if has_width else 200)


def shown(text: str, stream=None) -> str:
    """What may stand on a terminal, see softar.show.terminal.harmless; for a file or a pipe the
    text itself. stream: None is stdout."""
    from ..show.terminal import harmless

    return harmless(text) if (stream or sys.stdout).isatty() else text


def say(text: str) -> None:
    """A remark, on stderr."""
    text = shown(text, sys.stderr)
    console(stderr=True).print(text, style="dim", markup=False, soft_wrap=True)


@contextlib.contextmanager
def warnings_as_remarks() -> Iterator[None]:
    """What softar warns of meanwhile is a remark, without a line of its code."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message, category, filename, *args, **kwargs):
            ours = [each for name, each in sys.modules.items() if name.startswith("softar.")]
            if any(getattr(each, "__file__", None) == filename for each in ours):
                say(f"warning: {message}")
            else:
                usual(message, category, filename, *args, **kwargs)

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """A sign of life on stderr meanwhile, if that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(text):
        yield


def print_names(rows: list[tuple[str, ...]]) -> None:
    """In columns on a terminal; elsewhere a line each, with tabs between."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    for _ in rows[0][1:]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def answer_json(decoder, tokenizer, prompt: str, answer: "Decoded") -> dict:
    """An answer as one JSON document."""
    return {
        "model": decoder.columns["model"],
        "decoder": decoder.columns["decoder"],
        "setting": decoder.columns["setting"],
        "prompt": prompt,
        "text": answer.text,
        # Of an autoregressive model with its thought, special tokens included
        "completion": None if tokenizer is None else tokenizer.decode(list(answer.tokens)),
        "tokens": None if answer.tokens is None else list(answer.tokens),
        "num_forwards": answer.num_forwards,
        "token_forwards": answer.token_forwards,
        "seconds": answer.seconds,
        "entropy": answer.entropy,
        "soft_steps": answer.soft_steps,
    }


def status(decoder, answer: "Decoded") -> str:
    """An answer's cost in a line."""
    name, n = decoder.name, answer.num_tokens
    if "=" not in name.split(" ")[0]:  # without its model
        name = f"{decoder.columns['model']}, {name}"
    soft = "" if answer.soft_steps is None else f" ({answer.soft_steps} soft)"
    entropy = "" if answer.entropy is None else f", mean entropy {answer.entropy:.2f} nats"
    parts = [f"{answer.seconds:.2f} s"]
    if answer.num_forwards is not None:
        parts = [f"in {answer.num_forwards:g} forwards", *parts]
    if n is not None:
        parts = [f"{n} tokens{soft}", *parts, f"{n / max(answer.seconds, 1e-9):.1f} tokens/s"]
    cost = f"{name}: {', '.join(parts).replace(', in', ' in')}{entropy}"
    if answer.soft_steps and not answer.text.strip():
        cost += "\nthe answer is empty: a thought that goes on too long is ended by --budget N"
    return cost


class Printer:
    """A callback of `softar.generate` for one row: prints its tokens, a thought dim and the answer
    plain."""

    def __init__(self, tokenizer, config):
        self.tokenizer, self.console = tokenizer, console()
        # Without an end of the thought its steps are the answer
        self.thinks = config.has_answer
        self.ids, self.printed = [], ""

    def __call__(self, step: dict) -> None:
        from ..thought import Kind

        kind = int(step["record"].kind[0])
        if kind == Kind.LATENT:  # no token stands for it
            return
        self.ids.append(int(step["record"].token[0]))
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # part of a character: the next token has the rest
            return
        is_thought = self.thinks and kind == Kind.SOFT
        style = "dim italic" if is_thought else None
        piece = shown(text[len(self.printed) :], self.console.file)
        self.console.out(piece, style=style, highlight=False, end="")
        self.console.file.flush()
        self.printed = text

    def end(self) -> None:
        self.console.out("")


def report(comparison: "Comparison", as_json: bool) -> int:
    """Print a comparison -> exit code: 0, 1 where a decoder failed or an answer could not be
    read, 130 after Ctrl-C."""
    c = comparison
    if as_json:
        print_json(
            {
                "task": c.rows[0]["task"] if c.rows else None,
                "baseline": c.baseline,
                "rows": c.rows,
                "failures": [failure._asdict() for failure in c.failures],
                "scorer_failures": [failure._asdict() for failure in c.scorer_failures],
                "left_out": c.left_out,
                "interrupted": c.interrupted,
                "overhead": c.overhead,
            }
        )
    else:
        print_table(c)
    # `compare` has printed the first of each decoder
    firsts = {failure.decoder: failure for failure in reversed(c.failures)}.values()
    others = [failure for failure in c.failures if failure not in firsts]
    for failure in others[:FAILURES]:
        say(f"failed: {failure}")
    if len(others) > FAILURES:
        say(f"failed: {len(others) - FAILURES} more; --output FOLDER lists all")
    return 130 if c.interrupted else 1 if c.failures else 0


def print_table(c: "Comparison") -> None:
    """The table where it fits, else a few short lines for each decoder."""
    from ..evals.chart import TABLE_WIDTH

    screen = console()
    if screen.width >= TABLE_WIDTH:
        screen.print(c.table())
        return
    rows = c.shown()
    several = len({row["model"] for row in rows}) > 1
    if rows:
        screen.print(rows[0]["task"], style="italic", markup=False)
    for row in rows:
        model = f"{row['model']}, " if several and row["model"] else ""
        name = model + row["name"] + ("" if row["complete"] else " (cut short)")
        screen.print(name, style="bold", markup=False)
        scores = [_with_interval(row, "accuracy", ""), _with_interval(row, "gain", "+")]
        screen.print(f"  {', '.join(filter(None, scores)) or 'no score'}")
        cost = f"{row['seconds_per_row'] * 1000:.3g} ms an answer"
        cost = cost if row["nfe"] is None else f"{row['nfe']:.3g} forwards, {cost}"
        screen.print(f"  {row['n']} rows, {cost}")
    if notes := c.notes():
        screen.print("; ".join(notes), style="italic", markup=False)


def _with_interval(row: dict, key: str, sign: str) -> str:
    if row[key] is None:
        return ""
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return f"{key} {row[key]:{sign}.3f} ({low:{sign}.3f}…{high:{sign}.3f})"


def how_to_ask(server, soft: bool = False, needs_key: bool = False) -> str:
    """Where a server listens, and commands that ask it; with a prompt that the model knows, where
    its folder or name tells one."""
    from ..defaults import own_config
    from ..evaluate import prefixed
    from ..model_card import prompt_of

    ours = "<bos> D4 D8 D1 D3 ->" if server.model.startswith("mnns") else "Once upon a time"
    prompt = prompt_of(server.model) or ours
    theirs = own_config(server.model, "soft")  # whatever code it names
    text = prefixed(prompt, theirs and theirs.prompt_prefix)  # `softar generate` puts it itself
    request = {"model": server.model, "prompt": text, "max_tokens": 16}
    if soft:
        request |= {"temperature": 0, "vllm_xargs": {"soft": {"top_k": 10, "budget": 3}}}
    body = shlex.quote(json.dumps(request))
    headers = "-H 'Content-Type: application/json'"
    if needs_key:
        headers += ' -H "Authorization: Bearer $VLLM_API_KEY"'
    curl = f"curl {server.url}/v1/completions {headers} -d {body}"
    spec = shlex.quote(f"{server.model}=vllm-{'soft' if soft else 'greedy'}:url={server.url}")
    return f"{server.url}\n{curl}\nsoftar generate {shlex.quote(prompt)} -d {spec}"
