"""results.json: the rows of a run with what they were made on."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("softar", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def write_results(
    file: str | Path, rows: list[dict], *, command: str | None = None, made_at: str | None = None
) -> Path:
    """Write the rows with what they were made with: command, commit (`made_at`, where given),
    device, versions. Whole or not at all."""
    file = Path(file)
    content = {
        "schema": 1,
        "command": " ".join(sys.argv) if command is None else command,
        "commit": commit() if made_at is None else made_at,
        "device": device(),
        "versions": versions(),
        "rows": rows,
    }
    draft = file.with_suffix(".partial")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(file)
    return file


def commit() -> str | None:
    """The commit of the working tree that this file lies in, with "+" where it has changes; None
    outside one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
