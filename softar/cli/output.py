"""What the commands of softar.cli.app read and print: stdin, results on stdout, remarks on stderr,
tables, JSON."""

import contextlib
import importlib.util
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..decoders.answer import Decoded
    from ..evals.compare import Comparison

FAILURES = 5  # that are named on stderr
TABLE_WIDTH = 84  # below, the columns of a comparison are cut


def read_text(given: str | None) -> str:
    """The argument; for none and for "-" what comes through the pipe, without the line end."""
    if given is None and sys.stdin.isatty():
        raise ValueError("no text: give it as an argument, or through a pipe")
    text = sys.stdin.read().rstrip("\r\n") if given in (None, "-") else given
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
            kept = os.dup(out)
            os.dup2(err, out)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, out)
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
    return Console(
        file=stream,
        highlight=False,
        width=None if stream.isatty() or "COLUMNS" in os.environ else 200,
    )


def say(text: str) -> None:
    """A remark, on stderr."""
    console(stderr=True).print(text, style="dim", markup=False, soft_wrap=True)


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


def answer_json(decoder, tokenizer, prompt: str, found: "Decoded") -> dict:
    """An answer as one JSON document."""
    return {
        "model": decoder.columns["model"],
        "decoder": decoder.columns["decoder"],
        "setting": decoder.columns["setting"],
        "prompt": prompt,
        "text": found.text,
        # Of an autoregressive model with its thought, special tokens included
        "completion": tokenizer.decode(list(found.tokens)),
        "tokens": list(found.tokens),
        "num_forwards": found.num_forwards,
        "token_forwards": found.token_forwards,
        "seconds": found.seconds,
        "entropy": found.entropy,
    }


def status(decoder, found: "Decoded") -> str:
    """An answer's cost in a line."""
    sure = "" if found.entropy is None else f", mean entropy {found.entropy:.2f} nats"
    name = (
        decoder.name
        if "=" in decoder.name.split(" ")[0]
        else f"{decoder.columns['model']}, {decoder.name}"
    )
    rate = len(found.tokens) / max(found.seconds, 1e-9)
    return (
        f"{name}: {len(found.tokens)} tokens in {found.num_forwards:g} forwards, {found.seconds:.2f} s, "
        f"{rate:.1f} tokens/s{sure}"
    )


class Printer:
    """A callback of `softar.generate` for one row: prints its tokens, a thought dim and the answer
    plain."""

    def __init__(self, tokenizer, config):
        self.tokenizer, self.console = tokenizer, console()
        # Without an end of the thought its steps are the answer
        self.thinks = config.has_answer
        self.ids, self.shown = [], ""

    def __call__(self, seen: dict) -> None:
        from ..thought import Kind

        self.ids.append(int(seen["record"].token[0]))
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # part of a character: the next token has the rest
            return
        is_thought = self.thinks and int(seen["record"].kind[0]) == Kind.SOFT
        self.console.out(
            text[len(self.shown) :],
            style="dim italic" if is_thought else None,
            highlight=False,
            end="",
        )
        self.console.file.flush()
        self.shown = text

    def end(self) -> None:
        self.console.out("")


def report(comparison: "Comparison", as_json: bool) -> int:
    """Print a comparison -> exit code: 0, 1 where a decoder or a row failed, 130 after Ctrl-C."""
    c = comparison
    if as_json:
        failures = [failure._asdict() for failure in c.failures]
        print_json(
            {
                "task": c.rows[0]["task"] if c.rows else None,
                "baseline": c.baseline,
                "rows": c.rows,
                "failures": failures,
                "left_out": c.left_out,
                "interrupted": c.interrupted,
                "overhead": c.overhead,
            }
        )
    else:
        print_table(c)
    # `compare` has told of these
    firsts = {failure.decoder: failure for failure in reversed(c.failures)}.values()
    others = [failure for failure in c.failures if failure not in firsts]
    for failure in others[:FAILURES]:
        say(f"failed: {failure}")
    if len(others) > FAILURES:
        say(f"failed: {len(others) - FAILURES} more; --output FOLDER lists all")
    return 130 if c.interrupted else 1 if c.failures else 0


def print_table(c: "Comparison") -> None:
    """The table where it fits, else a few short lines for each decoder."""
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
        screen.print(
            model + row["name"] + ("" if row["complete"] else " (cut short)"),
            style="bold",
            markup=False,
        )
        found = [
            f"{key} {row[key]:{sign}.3f} ({row[f'{key}_low']:{sign}.3f}…{row[f'{key}_high']:{sign}.3f})"
            for key, sign in (("accuracy", ""), ("gain", "+"))
            if row[key] is not None
        ]
        screen.print(f"  {', '.join(found) or 'no score'}")
        cost = f"{row['nfe']:.3g} forwards, {row['seconds_per_row'] * 1000:.3g} ms an answer"
        screen.print(f"  {row['n']} rows, {cost}")
    if notes := c.notes():
        screen.print("; ".join(notes), style="italic", markup=False)


def how_to_ask(server, soft: bool = False) -> str:
    """Where a server listens, and commands that ask it."""
    prompt = "<bos> D4 D8 D1 D3 ->" if server.model.startswith("mnns") else "Once upon a time"
    body = json.dumps(
        {"model": server.model, "prompt": prompt, "max_tokens": 16}
        | (
            {"temperature": 0, "vllm_xargs": {"soft": json.dumps({"top_k": 10, "budget": 3})}}
            if soft
            else {}
        )
    )
    curl = f"curl {server.url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    spec = shlex.quote(f"{server.model}=vllm-{'soft' if soft else 'greedy'}:url={server.url}")
    return f"{server.url}\n{curl}\nsoftar generate {shlex.quote(prompt)} -d {spec}"
