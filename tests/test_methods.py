"""softar/METHODS.md: each call that it names can be made, and no method, trainer or paper is missing."""

import ast
import re
from pathlib import Path

import pytest
import transformers
from datasets import Dataset

import softar
import softar.rl
from softar import diffusion
from softar.diffusion import duo, replay
from softar.diffusion.convert import convert
from softar.diffusion.remask import REMASKS
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.diffusion.stops import STOPS
from softar.evals.parallelism import aup
from softar.mixers import GUIDES
from softar.rl import actions

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "softar" / "METHODS.md").read_text(encoding="utf-8")
TABLES = re.findall(r"^\| (.+?) \| (.+?) \| (`.+`) \|$", PAGE, re.MULTILINE)
CALLS = [call for *_, calls in TABLES for call in re.findall("`([^`]+)`", calls)]


def evaluated(call):
    """What a call of METHODS.md gives, under the names that the page explains."""
    names = {name: getattr(softar, name) for name in softar.__all__} | {
        "softar": softar,
        "transformers": transformers,
        "duo": duo,
        "convert": convert,
        "actions": actions,
        "replay": replay,
        "aup": aup,
        "DenoiseConfig": diffusion.DenoiseConfig,
        "DiffusionSFTConfig": DiffusionSFTConfig,
        "DiffusionSFTTrainer": DiffusionSFTTrainer,
        "reward": lambda completions, **columns: [0.0 for _ in completions],
    }
    names |= {name: getattr(softar.rl, name) for name in softar.rl.__all__}
    if "tokenizer" in call:
        names["model"], names["tokenizer"] = softar.load("mnns-tiny")
        if "masked" in call:
            names["masked"], names["tokenizer"] = diffusion.load("mnns-diffusion-tiny", seed=0)
        row = {"prompt": "<bos> D1 D2 D3 D4 ->", "completion": " S1 S-1 S2 S-2"}
        names["rows"] = Dataset.from_list([row] * 4)
    return eval(call, names)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, marks=[pytest.mark.rest] if "smollm2" in call else [])
        for call in dict.fromkeys(CALLS)
    ],
)
def test_each_method_can_be_called_so(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "vllm" in call:
        pytest.importorskip("vllm")
    assert evaluated(call) is not None


def test_methods_are_complete():
    def values(name):
        return {value for call in CALLS for value in re.findall(rf"\b{name}=\"([\w-]+)\"", call)}

    assert values("mixer") == {*softar.MIXERS}
    assert values("guidance") == {*GUIDES}
    assert values("soften") == {*diffusion.SOFTENERS}
    assert values("schedule") == {*diffusion.SCHEDULES}
    assert values("select") == {*diffusion.SELECTORS}
    assert values("remask") == {*REMASKS}
    assert values("stop") == {*STOPS}
    assert values("parity") == {*diffusion.PARITY}
    text = "".join(CALLS)
    assert {*re.findall(r'replay\.METHODS\["([\w-]+)"\]', text)} == {*replay.METHODS}
    assert {*re.findall(r'ACTIONS\["([\w-]+)"\]', text)} == {*actions.ACTIONS}
    classes = {
        node.name
        for folder in ("softar", "diffusion", "rl")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and re.fullmatch(r"[A-Z]\w+Trainer", node.name)
    }
    assert classes == {c for call in CALLS for c in re.findall(r"^(\w+Trainer)\(", call)}


def test_the_papers_are_those_that_the_code_cites():
    cited = {
        number
        for folder in ("softar", "diffusion", "rl")
        for path in (ROOT / folder).rglob("*.py")
        for number in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text(encoding="utf-8"))
    }
    assert {*re.findall(r"\[(\d{4}\.\d{5})\](?!:)", PAGE)} == cited
    assert {
        *re.findall(r"^\[(\d{4}\.\d{5})\]: https://arxiv.org/abs/\1$", PAGE, re.MULTILINE)
    } == cited
