"""
Collect what a GPU machine without network lacks to run recipes/gpu.py, as wheels in build/gpu-wheels.

# `make gpu-wheels` is this; then carry the folder, see gpu.py
python recipes/gpu_wheels.py --python_version 3.12

The machine is taken to have PRESENT. Whatever softar, or a package collected here, needs beyond that is an error, and
so is a total over --limit_mb.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# in the versions of constraints.txt; all but multiprocess are the same for every Python
CARRIED = ("trl", "datasets", "fastcore", "gguf", "dill", "multiprocess", "pytest")
# what is there beside torch, transformers, accelerate and peft, of what these ask for
PRESENT = """
    torch transformers accelerate peft huggingface-hub numpy pandas pyarrow pyyaml jinja2 packaging psutil
    safetensors tokenizers filelock tqdm xxhash fsspec requests httpx matplotlib rich typer iniconfig pluggy pygments
""".split()


def collect(folder: Path, python_version: str, pip_args: list[str]) -> list[Path]:
    """Download the wheels into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python_version, "--platform", "manylinux_2_28_x86_64"]
    command += ["-c", str(ROOT / "constraints.txt"), "-d", str(folder)]
    subprocess.run([*command, *pip_args, *CARRIED], check=True)
    return sorted(folder.glob("*.whl"))


def missing(wheels: list[Path], python_version: str) -> list[str]:
    """What softar or a wheel needs and neither PRESENT nor the wheels have, with who needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [("softar", text) for text in project["dependencies"]]
    for wheel in wheels:
        needs += [(wheel.name.split("-")[0], text) for text in requirements(wheel)]
    there = {canonicalize_name(wheel.name.split("-")[0]) for wheel in wheels} | {*PRESENT}
    system = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    system |= {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    found = []
    for who, text in needs:
        need = Requirement(text)
        applies = need.marker is None or need.marker.evaluate(system)
        if applies and canonicalize_name(need.name) not in there:
            found.append(f"{need.name} (for {who})")
    return found


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-wheels")
    parser.add_argument("--python_version", default="3.12", help="Of the machine with the GPU.")
    parser.add_argument("--limit_mb", type=float, default=50.0, help="Largest total, in MiB.")
    parser.add_argument("--pip_args", default="", help="More for pip, such as an index.")
    args = parser.parse_args(argv)
    wheels = collect(args.output, args.python_version, shlex.split(args.pip_args))
    total = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}")
    print(f"{total:8.2f} MiB  in {args.output}")
    if lacking := missing(wheels, args.python_version):
        sys.exit(f"gpu_wheels.py: error: not collected: {', '.join(lacking)}; add to CARRIED")
    if total > args.limit_mb:
        sys.exit(f"gpu_wheels.py: error: {total:.2f} MiB are over --limit_mb {args.limit_mb:g}")


if __name__ == "__main__":
    main()
