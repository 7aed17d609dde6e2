"""results.json: the rows of a run with what they were made on. And files that are whole or not
there."""

import csv
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

PACKAGES = ("softar", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
LONGEST = 255  # bytes of a name that file systems take


def write_results(
    file: str | Path, rows: list[dict], *, command: str | None = None, made_at: str | None = None
) -> Path:
    """Write the rows with what they were made with: command, commit (`made_at`, where given),
    device, versions."""
    content = {
        "schema": 1,
        "command": " ".join(sys.argv) if command is None else command,
        "commit": commit() if made_at is None else made_at,
        "device": device(),
        "versions": versions(),
        "rows": rows,
    }
    return write_whole(file, json.dumps(content, indent=1) + "\n")


def write_csv(file: str | Path, rows: list[dict]) -> Path:
    """Every key of any row is a column."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return write_whole(file, out.getvalue())


def write_whole(file: str | Path, text: str) -> Path:
    """Write a file whole or not at all, though the program is ended in the middle or another
    process writes the same file meanwhile. -> the file."""
    file = Path(file)
    draft = file.with_name(f"{file.name}.{os.getpid()}.partial")
    draft.write_text(text, encoding="utf-8", newline="")
    return draft.replace(file)


def counts(rows: list[dict]) -> str:
    """On how many held-out rows they were measured, for a title: one number, or each."""
    return " and ".join(map(str, sorted({row["n"] for row in rows if "n" in row})))


def as_name(text: str, end: str = "") -> str:
    """A text as the name of a file or folder, for instance a task that is a path: what is no letter,
    digit or one of _.=+- is a "-". Of one that is too long to be a name, `end` left out, the
    beginning and a hash of the text."""
    name = re.sub(r"[^\w.=+-]+", "-", text)
    if len(f"{name}{end}".encode()) > LONGEST:
        short = f"-{hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()[:10]}{end}"
        return name.encode()[: LONGEST - len(short.encode())].decode(errors="ignore") + short
    return name + end


def commit(besides: str | None = None) -> str | None:
    """The commit of the working tree that this file lies in, with "+" where it has changes, those
    below the folder `besides` left out; None outside one."""
    but = [] if besides is None else ["--", ":(top)", f":(top,exclude){besides}"]
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", *but], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def device(kind: str | None = None) -> str:
    """Name of this machine's "cuda" or "cpu"; by default of its GPU, where it has one."""
    import torch  # here, so that what only writes a file does without it

    if kind != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    numbers = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            numbers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers
