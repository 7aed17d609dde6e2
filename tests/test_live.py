"""recipes/denoise.py as a user runs it, and what its picture says."""

import importlib.util
import os
import runpy
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
import warm
from rich.console import Console

from softar.diffusion import DenoiseConfig, denoise, load

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("denoise_recipe", ROOT / "recipes" / "denoise.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


def run(*args):
    return warm.run("recipes/denoise.py", args, os.environ, cwd=ROOT)


@pytest.mark.rest
def test_demo():
    """In a program of its own."""
    done = subprocess.run(
        [sys.executable, "recipes/denoise.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "masks 0" in done.stdout and "5 tokens in 5 forwards" in done.stdout


def test_infilling():
    done = run(
        "--gen_length", "0", "--prompt", "<bos> D1 D2 D3 D4 -> _ S7 _ S1 <eos>", "--soften", "slerp"
    )
    assert done.returncode == 0, done.stderr
    assert "2 tokens in 2 forwards" in done.stdout and " S7 " in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--block_length", "3"], "block_length=3 does not divide gen_length=5"),
        (["--model", "no-such-folder/at/all"], "no-such-folder"),
        (["--gen_length", "0", "--prompt", "<bos> D1"], "no mask in input_ids"),
        (["--soften_args", '{"k": 0}'], "k=0"),
    ],
)
def test_bad_input(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["denoise.py", *args])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(recipe.__file__, run_name="__main__")
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def frames(config, prompt="<bos> D1 D1 D1 D2 ->"):
    """Every picture of a run, as text with its colours."""
    model, tokenizer = load("mnns-diffusion-tiny")
    inputs = tokenizer(prompt, return_tensors="pt")
    view = recipe.View(tokenizer, model.config.mask_token_id, inputs.input_ids, config, 0.0)
    shown = [view.frame()]
    denoise(
        model, inputs.input_ids, config=config, callback=lambda seen: shown.append(view.frame(seen))
    )
    out = []
    for frame in shown:
        console = Console(width=100, record=True, force_terminal=True, file=open("/dev/null", "w"))
        console.print(frame)
        out.append(console.export_text())
    return view, out


def test_masks_turn_into_tokens_one_by_one():
    _, shown = frames(DenoiseConfig(gen_length=4, soften="hard"))
    assert [frame.count("·") for frame in shown] == [4, 3, 2, 1, 0]
    assert "masks 4" in shown[0] and "masks 0" in shown[-1]


def test_a_soft_slot_shows_its_belief():
    view, shown = frames(DenoiseConfig(gen_length=4, soften="soft-token"))
    assert [frame.count("·") for frame in shown] == [4, 0, 0, 0, 0]
    assert "mask 0." in shown[1] and "slot" not in shown[-1]
    assert int((view.confidence > 0).sum()) == 4


def test_colour_is_the_confidence():
    view, _ = frames(DenoiseConfig(gen_length=4))
    view.confidence[-1], view.confidence[-2] = 1.0, 0.0
    styles = [str(span.style) for span in view.text({}).spans]
    assert styles[-1] == "rgb(20,230,60)" and styles[-2] == "rgb(250,40,60)"
    assert styles[:6] == ["bold"] * 6


def test_words_of_a_subword_tokenizer():
    class Pieces:
        backend_tokenizer = type("B", (), {"decoder": object()})

        def convert_ids_to_tokens(self, i):
            return ["▁Hello", "ing", "Ġthe", "\x1b]52;c;aGk=\x07", "[/b]"][i]

        def convert_tokens_to_string(self, pieces):
            return pieces[0].replace("▁", "").replace("Ġ", " ")

    view = recipe.View(Pieces(), 9, torch.tensor([[0]]), DenoiseConfig(gen_length=0), 0.0)
    assert [view.word(i) for i in range(3)] == [" Hello", "ing", " the"]
    assert view.word(3) == "⟨1B⟩]52;c;aGk=⟨7⟩"  # a terminal would write it into the clipboard
    console = Console(width=100, record=True, file=StringIO())
    console.print(view.mixtures({0: ([3, 4], [0.5, 0.5])}))
    text = console.export_text()
    assert "⟨1B⟩" in text and "[/b] 0.50" in text


UNDERSCORES = "{% for m in messages %}<bos> {{ m['content'] }}{% endfor %} -><|eot_id|>"


def test_the_special_tokens_of_a_template_stay_whole(monkeypatch):
    """An underscore of the prompt is a mask, one of a template is its own."""
    model, tokenizer = load("mnns-diffusion-tiny")
    tokenizer.chat_template = UNDERSCORES
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    seen = []

    def stop(model, ids, *args, **options):
        seen.append(tokenizer.decode(ids[0]))
        raise SystemExit

    monkeypatch.setattr(recipe, "load", lambda *args, **options: (model, tokenizer))
    monkeypatch.setattr(recipe, "denoise", stop)
    with pytest.raises(SystemExit):
        recipe.main(*recipe.parse(["--chat", "--prompt", "D1 _ D2", "--gen_length", "5"]))
    assert seen == [f"<bos> D1 {tokenizer.mask_token} D2 -> <|eot_id|>"]


def test_a_canvas_of_whole_blocks_is_shown(capsys):
    """It is wider than gen_length asks."""
    how = "--model latin-block-tiny --parity sdar --block_length 5 --gen_length 7 --threshold 0.9".split()
    recipe.main(
        *recipe.parse([*how, "--prompt", ". . 5 . 3 . . . 4 . . . . . . . . . 3 . . . . . 5"])
    )
    assert "masks 0" in capsys.readouterr().out
