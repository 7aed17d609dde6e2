"""`make docs`: the API reference, by the modules' installed names."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_it_is_asked_for_every_module():
    """Those of a room without `__all__` come with the room."""
    command = ["make", "-n", "docs", "VENV=.venv"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = printed.splitlines()[-1].split()
    asked = {word for word in words if re.fullmatch(r"softar[\w.]*", word)}
    assert len(asked) == len([word for word in words if word.startswith("softar")])
    for folder, package in (
        ("softar", "softar"),
        ("diffusion", "softar.diffusion"),
        ("rl", "softar.rl"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            room = path.parent / "__init__.py"
            whole_room = "__all__" not in room.read_text(encoding="utf-8")
            assert name in asked or (whole_room and name.rpartition(".")[0] in asked), name


@pytest.mark.filterwarnings("error:.*softar.*")
def test_pages_of_the_core_and_of_both_mapped_packages(tmp_path):
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(docformat="google", show_source=False)
    modules = {
        "softar.mixers": "gumbel",
        "softar.diffusion.loop": "denoise",
        "softar.rl.losses": "surrogate",
    }
    pdoc.pdoc(*modules, output_directory=tmp_path)
    for module, function in modules.items():
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")
        assert f'id="{function}"' in page and "arXiv:" in page, module
