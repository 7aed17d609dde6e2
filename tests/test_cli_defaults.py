"""What the commands say of defaults, refuse before work, and let through to a terminal."""

import io
import json
import sys
import unicodedata

import pytest
import torch
from transformers import PreTrainedConfig

from softar import SoftConfig, load, make_decoder
from softar.cli import app as cli
from softar.cli import streams
from softar.decoders.answer import Decoded
from softar.decoders.soft import SoftDecoder
from softar.models.source import cached_if_offline
from softar.models.there import check_there
from softar.show.terminal import harmless

PROMPT = "<bos> D4 D8 D1 D3 ->"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        cli.main([*map(str, argv)])
    return left.value.code, *capsys.readouterr()


def test_the_default_that_was_taken_is_said(capsys):
    code, out, err = run(capsys, "generate", PROMPT, "-m", "mnns-soft-tiny")
    assert code == 0 and out.startswith("S")
    assert "mnns-soft-tiny is decoded as its soft_config.json says" in err and "(3 soft)" in err
    code, out, err = run(capsys, "generate", PROMPT, "-m", "mnns-tiny", "--max-new-tokens", 4)
    assert code == 0 and "mnns-tiny is decoded in narrow, noisy mixtures, then discretely" in err
    assert "is decoded" not in run(capsys, "generate", PROMPT, "-m", "mnns-tiny", "-d", "soft")[2]


@pytest.mark.parametrize(
    "argv, told",
    [
        (["generate", PROMPT, "-m", "mnns-diffusion-tiny"], "`softar fill` is for it"),
        (["fill", PROMPT, "-m", "mnns-soft-tiny"], "`softar generate` is for it"),
        (["generate", "D1 " * 40_000, "-m", "mnns-soft-tiny"], "more than the 64 positions"),
        (["trace", "D1 " * 40_000, "-m", "mnns-soft-tiny"], "the prompt has 40000 tokens"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(capsys, argv, told):
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out and told in err and err.count("\n") == 1


def test_no_control_reaches_a_terminal():
    every = "".join(map(chr, [*range(0x3000), *range(0xFE00, 0xFF00)]))
    shown = harmless(every)
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert not {*"\x1b\x9b\r\x07\u202e\u2066\u2028"} & {*shown}
    for text in ("naïve café\n\t1", "日本\u3000語", "👩\u200d🚀"):
        assert harmless(text) == text
    assert harmless("\x1b]52;c;aGk=\x07") == "⟨1B⟩]52;c;aGk=⟨7⟩"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_controls_are_shown_on_a_terminal_and_written_to_a_pipe(monkeypatch, stream):
    evil, out, err = "a\x1b]0;title\x07b", stream(), stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    printer = streams.Printer(type("T", (), {"decode": lambda *a, **k: evil}), SoftConfig())
    record = type("R", (), {"token": torch.tensor([3]), "kind": torch.tensor([2])})
    printer({"record": record})
    streams.say(evil)
    with pytest.raises(SystemExit):
        cli._fail(evil)
    texts = out.getvalue(), *err.getvalue().splitlines()
    assert len(texts) == 3
    for text in texts:
        assert ("\x1b]0" in text) == (stream is io.StringIO), text


def test_offline_a_hub_id_is_looked_for_in_the_cache_at_once(monkeypatch, tmp_path):
    def no_address(*args):
        raise OSError("Name or service not known")

    monkeypatch.setattr("softar.models.source.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", no_address)
    assert cached_if_offline("owner/name", {"dtype": 1}) == {"dtype": 1, "local_files_only": True}
    assert cached_if_offline(tmp_path, {}) == {}
    # what a recipe asks before it reads its data
    asked = []
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda *_, **kw: asked.append(kw))
    check_there("owner/name", [], revision="main")
    assert asked == [{"revision": "main", "local_files_only": True}]
    monkeypatch.setattr("socket.getaddrinfo", lambda *args: [])
    assert cached_if_offline("owner/name", {}) == {}


def test_the_shell_completes(monkeypatch, capsys):
    monkeypatch.setenv("_SOFTAR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "softar gen")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, out, _ = run(capsys)
    assert code == 0 and out.split() == ["generate"]


def test_every_command_decodes_as_long_as_the_model_says(capsys, tmp_path, monkeypatch):
    """`compare` cut all at 128 tokens, so that a longer thought had no answer; `sweep` asked."""
    for part in load("mnns-tiny"):
        part.save_pretrained(tmp_path)
    SoftConfig(budget=130, max_new_tokens=140).save(tmp_path)
    rows, lengths = tmp_path / "rows.jsonl", []
    rows.write_text(json.dumps({"prompt": PROMPT, "answer": "S0"}) + "\n")

    def decode(decoder, prompts):
        lengths.append(decoder.config.max_new_tokens)
        return [Decoded("S0", (1,), 1.0, 1.0, 0.1) for _ in prompts]

    monkeypatch.setattr(SoftDecoder, "decode", decode)
    for command in (
        ["generate", PROMPT, "-m", tmp_path],
        ["compare", "-t", rows, "-m", tmp_path, "-d", "soft", "-d", "discrete"],
        ["sweep", "-t", rows, "--soft", f"{tmp_path}=soft", "-o", tmp_path / "sweep"],
    ):
        code, _, err = run(capsys, *command)
        assert code == 0 and {*lengths} == {140}, err
        lengths.clear()
    make_decoder(f"{tmp_path}=soft").decode([PROMPT])
    assert lengths == [140]
