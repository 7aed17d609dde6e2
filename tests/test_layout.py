"""What is installed is what is in the tree, and imports point one way."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import softar

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "softar": "softar",
    "diffusion": "softar.diffusion",
    "rl": "softar.rl",
    "recipes": "softar.recipes",
}
# that stand on softar, which names them in strings only
ABOVE = {"diffusion", "rl", "recipes"}
WHERE = (
    f"import importlib.util as u; print(*(u.find_spec(n).origin for n in {[*PACKAGES.values()]}))"
)


def files(folder):
    return [
        p
        for p in sorted((ROOT / folder).rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    ]


def python(*arguments, cwd, **env):
    """What a fresh interpreter prints; PYTHONPATH only if given."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder of the checkout gets in or is left behind."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in [*PACKAGES, "tests"]:
        if (ROOT / folder).is_dir():
            shutil.copytree(
                ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__")
            )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree), cwd=tree)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    python(
        "-m",
        "pip",
        "-qq",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
        cwd=target,
    )
    return target


@pytest.mark.rest
def test_wheel_is_the_tree(wheel):
    def inside(path, folder, package):
        return f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"

    tree = {
        inside(path, folder, package)
        for folder, package in PACKAGES.items()
        for path in files(folder)
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.startswith(f"softar-{softar.__version__}.dist-info/")}
    assert names - info == tree
    assert any(name.endswith("/LICENSE") for name in info)


@pytest.mark.rest
def test_regular_install(site, tmp_path):
    """-S: without the site-packages of this interpreter, where an editable softar would help
    out."""
    places = python("-S", "-c", WHERE, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert places == [
        str(site / package.replace(".", "/") / "__init__.py") for package in PACKAGES.values()
    ]


@pytest.mark.slow
def test_regular_install_from_the_root_of_a_checkout(site):
    places = python("-S", "-c", WHERE, cwd=ROOT, PYTHONPATH=str(site)).split()
    assert places == [str(ROOT / p / "__init__.py") for p in PACKAGES]


@pytest.mark.slow
def test_somebody_elses_pyproject_is_not_a_checkout(site, tmp_path):
    shutil.copytree(site / "softar", tmp_path / "softar")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    code = "import softar; print(len(softar.__path__))"
    assert python("-S", "-c", code, cwd=tmp_path) == "1"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "softar"\n')
    assert python("-S", "-c", code, cwd=tmp_path) == "2"


def test_installed_softar_is_this_tree(tmp_path):
    """From a folder that is not the checkout: the editable install has the mapped packages too."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("softar")
    except PackageNotFoundError:
        pytest.skip("softar is not installed here: `make setup` does it")
    places = python("-c", WHERE, cwd=tmp_path).split()
    assert places == [str(ROOT / p / "__init__.py") for p in PACKAGES]


def imports(path, package):
    """Every module that a file may import, at its top or inside a function."""
    parents = package.split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*parents[: len(parents) - node.level + 1], *filter(None, [node.module])]
            )
            base = base if node.level else node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# The folders' own names, recipes and tests are importable from the checkout root only, so nobody
# imports them.
NOBODY = ["diffusion", "rl", "recipes", "tests"]
FORBIDDEN = {
    "softar": ["softar.diffusion", "softar.rl", "softar.recipes", *NOBODY],
    "diffusion": ["softar.rl", "softar.recipes", *NOBODY],
    "rl": ["softar.recipes", *NOBODY],
    "recipes": NOBODY,
}


@pytest.mark.parametrize("folder", PACKAGES)
def test_imports_point_one_way(folder):
    for path in files(folder):
        if path.suffix == ".py":
            package = ".".join([PACKAGES[folder], *path.relative_to(ROOT / folder).parts[:-1]])
            against = [name for name in imports(path, package) if inside(name, FORBIDDEN[folder])]
            assert not against, f"{path.relative_to(ROOT)} imports {against}"


# softar/ from the ground up: a module or room may import, inside a function too, only what stands
# on a lower floor.
FLOORS = [
    ("largest",),
    (
        "_lazy",
        "checks",
        "noise",
        "placement",
        "processors",
        "progress",
        "resume",
        "soft",
        "specs",
        "tags",
    ),
    ("feedback", "files", "inherited", "names", "relaxed"),
    ("mixers", "models", "tasks", "results"),
    ("caches", "draws", "idle"),
    ("config", "texts", "training"),
    ("held_out", "switch", "split"),
    ("thought", "defaults", "guard", "loops", "model_card"),
    ("looks",),
    ("step",),
    ("decode",),
    ("evaluate", "show"),
    ("sft", "decoders"),
    ("evals", "vllm"),
    ("cli",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# what the recipes share stands on no floor
BESIDE = {
    "recipe": {
        "checks",
        "tasks",
        "resume",
        "rows",
        "launch",
        "progress",
        "arguments",
        "training",
        "split",
    }
    | {"model_card", "recipe_config", "recipe_data", "recipe_model"},
    "recipe_data": {"files", "recipe_config", "tasks"},
    "recipe_config": {"checks", "rows"},
    "recipe_model": {"decoders", "models", "resume", "rows", "tasks"},
    "rows": {"checks", "launch", "progress", "resume", "results"},
    "launch": {"checks"},
    "arguments": {"checks"},
}


def modules():
    """Every module of the project's packages: name -> (file, package that its relative imports
    count from)."""
    for folder, package in PACKAGES.items():
        for path in files(folder):
            if path.suffix == ".py":
                parts = [
                    *package.split("."),
                    *path.relative_to(ROOT / folder).with_suffix("").parts,
                ]
                is_package = parts[-1] == "__init__"
                name = ".".join(parts[:-1] if is_package else parts)
                yield name, path, name if is_package else name.rpartition(".")[0]


@functools.cache
def arrows():
    """module -> the modules of softar that it imports anywhere, under TYPE_CHECKING too."""
    names = {name for name, *_ in modules()}

    def module_of(name):
        while name not in names:
            name = name.rpartition(".")[0]
        return name

    return {
        name: {module_of(target) for target in imports(path, package) if inside(target, ["softar"])}
        - {name}
        for name, path, package in modules()
    }


def test_every_room_stands_on_a_floor():
    rooms = {name.split(".")[1] for name in arrows() if name.startswith("softar.")} - ABOVE
    assert rooms == {*FLOOR, *BESIDE}


def test_imports_go_down():
    wrong = []
    for name, targets in arrows().items():
        room = name.split(".")[1] if "." in name else None
        if room in {None, *ABOVE}:
            continue
        for target in targets - {"softar"}:
            other = target.split(".")[1]
            allowed = (
                other in BESIDE[room]
                if room in BESIDE
                else other == room or FLOOR.get(other, 99) < FLOOR[room]
            )
            if not allowed and not (room == "cli" and other in BESIDE):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_no_import_circle():
    left = {name: {*targets} for name, targets in arrows().items()}
    # a folder of names, each loaded when it is first used; nothing of it is needed to load a module
    left.pop("softar")
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"each of these needs another of them: {left}"


MOST_LINES, MOST_STATEMENT_LINES, MOST_PARAMETERS = 400, 60, 8


def functions(tree):
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def lines_of(function):
    """How long it is, its docstring left out."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def parameters_of(function):
    """How many it has, self and cls left out."""
    arguments = function.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def reason_above(function, lines):
    """The comments that end right above its `def` and above its decorators, as one text."""
    comment = []
    for line in {function.lineno, *(d.lineno for d in function.decorator_list)}:
        at = line - 2
        while lines[at].strip().startswith("#"):
            comment.insert(0, lines[at].strip(" #"))
            at -= 1
    return " ".join(comment)


def test_files_and_functions_are_of_a_size_to_read():
    """A longer or wider function says why in the comment above it: `# Long because ...`."""
    wrong = []
    for folder in PACKAGES:
        for path in files(folder):
            if path.suffix != ".py":
                continue
            text = path.read_text(encoding="utf-8")
            lines, where = text.splitlines(), path.relative_to(ROOT)
            if len(lines) > MOST_LINES:
                wrong.append(f"{where} has {len(lines)} lines, more than {MOST_LINES}")
            for function in functions(ast.parse(text)):
                reason = reason_above(function, lines)
                for count, most, word, what in (
                    (lines_of(function), MOST_STATEMENT_LINES, "Long( and wide)? because", "lines"),
                    (
                        parameters_of(function),
                        MOST_PARAMETERS,
                        "(Wide|Long and wide) because",
                        "parameters",
                    ),
                ):
                    if count > most and not re.search(word, reason):
                        wrong.append(f"{where}: {function.name} has {count} {what}, over {most}")
    assert not wrong, "\n".join(wrong)


def test_no_module_takes_anothers_private_name():
    wrong = []
    for folder in [*PACKAGES, "tests"]:
        for path in files(folder):
            if path.suffix != ".py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (
                    node.level or (node.module or "").startswith("softar")
                ):
                    names = [
                        a.name
                        for a in node.names
                        if a.name.startswith("_") and not a.name.startswith("__")
                    ]
                    wrong += [
                        f"{path.relative_to(ROOT)}: from {node.module} import {name}"
                        for name in names
                    ]
    assert not wrong


def test_softar_names_diffusion_in_three_strings():
    """By name, as imports point the other way: the families, the models of the other kind,
    lm-eval's second model."""
    homes = {
        "softar/decoders/registry.py": "softar.diffusion.decoders",
        "softar/decoders/card.py": "softar.diffusion.models",
        "softar/evals/lm_eval.py": "softar.diffusion.lm_eval",
    }
    named = {}
    for path in files("softar"):
        if path.suffix == ".py":
            strings = [
                n.value
                for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
            modules_named = [
                s for s in strings if re.fullmatch(r"softar\.(diffusion|rl)(\.\w+)*", s)
            ]
            if modules_named:
                named[path.relative_to(ROOT).as_posix()] = modules_named
    assert named == {file: [name] for file, name in homes.items()}


def test_import_is_light(tmp_path):
    code = "import sys, softar; dir(softar); print({'torch', 'transformers', 'trl', 'numpy'} & {*sys.modules})"
    assert python("-c", code, cwd=ROOT) == "set()"


def test_public_names():
    """Each resolves, also after its submodule was imported, and none is hidden by a submodule of
    the same name."""
    for module in set(softar._HOME.values()):
        import_module(module)
    for name in softar.__all__:
        assert not isinstance(getattr(softar, name), types.ModuleType), name
    assert {*softar.__all__} <= {*dir(softar)}
    for package in (
        softar,
        import_module("softar.vllm"),
        import_module("softar.diffusion"),
        import_module("softar.rl"),
    ):
        inside = {path.stem for path in Path(package.__file__).parent.iterdir()}
        assert not {*package.__all__} & inside, package.__name__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = softar.nothing


def test_tree_names_no_machine():
    """No path of the machine it was written on, no host of a registry."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the tree is not known")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(
        command, cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    hosts = ["pypi" + ".org", "python" + "hosted", "registry.npm" + "js", "deb.debian" + ".org"]
    pattern = r"(?<![\w.])/(?:opt|work)/|file:" + "//|" + "|".join(map(re.escape, hosts))
    found = [
        (name, match.group())
        for name in names
        if name and (ROOT / name).is_file()
        for match in [re.search(pattern.encode(), (ROOT / name).read_bytes())]
        if match
    ]
    assert not found
