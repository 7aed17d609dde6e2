"""What a decode believed: traces against the record, the page as text and in a real browser, the
terminal view."""

import html
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import EOS, PROMPTS, Forced, left_padded, model_of, tokenizer_of

import softar.show.trace
from softar import Kind, SoftConfig
from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion import load as load_diffusion
from softar.diffusion.net import facts
from softar.diffusion.trace import Tracer
from softar.show.page import DIGITS, pack, page, write_page
from softar.show.terminal import bar, view, visible
from softar.show.trace import Canvas, Forward, Step, Trace, from_json, thought, to_json

NASTY = [
    "</script><script>document.title='broken'</script>",
    "<!-- <script>",
    "\"'`\\",
    "two\nlines\ttab\r",
    "\u2028\u2029",
    "\u202eright to left",
    "שלום",
    "\ufffd\ufffd",
    "\ud800",
    "\x00\x1b[31m",
    "x" * 3000,
    "",
    " ",
    "{{data}} {{title}}",
    "&lt;b&gt; &amp;",
    "[/INST] [red]",
]


def decoded(seed=0, **config):
    model, tokenizer = model_of(), tokenizer_of()
    ids, mask = left_padded(PROMPTS)
    forced = Forced(ids.shape[1], [[], [None, EOS], []])
    out = softar.generate(
        model,
        ids,
        mask,
        config=SoftConfig(**{"max_new_tokens": 6, "temperature": 3.0} | config),
        rng=torch.Generator().manual_seed(seed),
        logits_processor=[forced],
    )
    return out, tokenizer


# Traces


@pytest.mark.parametrize(
    "config",
    [
        dict(top_k=16, budget=3),
        dict(top_k=7),
        dict(mixer="k-samples", mixer_args={"k": 6}, top_k=3),  # draws a token more than once
        dict(mixer="gumbel", budget=2, think_end=(4,)),  # forces </think>
        dict(mixer="hard"),
    ],
)
@pytest.mark.parametrize("row", range(3))
def test_a_trace_is_the_record(config, row):
    out, tokenizer = decoded(**config)
    trace, record = thought(out, tokenizer, row, title="t"), out.record
    kinds = [Kind(k) for k in record.kind[row].tolist() if k != Kind.PAD]
    assert [step.kind for step in trace.steps] == [kind.name.lower() for kind in kinds]
    assert (
        trace.prompt == tokenizer.decode(out.sequences[row, : out.prompt_length])
        and trace.title == "t"
    )
    assert trace.answer_start == int(out.answer_start[row])
    for t, step in enumerate(trace.steps):
        dense = torch.zeros(64, dtype=torch.float64).scatter_add(
            0, record.ids[row, t], record.weights[row, t].double()
        )
        weights = dense.sort(descending=True).values
        kept = min(10, int((dense > 0).sum()))
        assert [weight for _, weight in step.mixture] == pytest.approx(weights[:kept].tolist())
        assert {text: weight for text, weight in step.mixture} == pytest.approx(
            {text: float(dense[tokenizer.convert_tokens_to_ids(text)]) for text, _ in step.mixture}
        )
        assert step.mixture[0][1] >= step.mixture[-1][1] and len(step.mixture) == kept
        assert step.rest == pytest.approx(float(weights[kept:].sum()), abs=1e-9)
        assert step.others == int((weights[kept:] > 0).sum())
        assert step.token == tokenizer.decode(record.token[row, t : t + 1])
        assert step.entropy == pytest.approx(float(record.entropy[row, t]))


def test_fewer_candidates_leave_more_to_the_rest():
    out, tokenizer = decoded(top_k=8)
    few, many = (thought(out, tokenizer, 0, top).steps[0] for top in (2, 10))
    assert (
        len(few.mixture) == 2
        and few.mixture == many.mixture[:2]
        and few.others == 6
        and many.others == 0
    )
    assert few.rest == pytest.approx(sum(weight for _, weight in many.mixture[2:]))


def test_a_wide_mixture_is_cut_before_it_is_listed(monkeypatch):
    out, tokenizer = decoded(top_k=None)
    whole = thought(out, tokenizer).steps[0]
    monkeypatch.setattr(softar.show.trace, "MANY", 16)
    cut = thought(out, tokenizer).steps[0]
    assert cut.mixture == whole.mixture and cut.others == whole.others == 54
    assert cut.rest == pytest.approx(whole.rest) and cut.rest + sum(
        w for _, w in cut.mixture
    ) == pytest.approx(1)


@pytest.fixture(scope="module")
def mnns():
    return load_diffusion("mnns-diffusion-tiny")


DENOISE = {
    "hard": dict(soften="hard"),
    "soft-token": dict(soften="soft-token", steps=2),
    "evolving": dict(soften="evolving"),
    "remask": dict(soften="hard", remask="conf", steps=9, temperature=1.0),
    "early stop": dict(soften="soft-mask", block_length=2, early_stop=True),
}


@pytest.mark.parametrize("name", DENOISE)
def test_a_canvas_is_what_denoise_gave(mnns, name):
    model, tokenizer = mnns
    inputs = tokenizer(
        ["<bos> D1 D1 D1 D2 ->", "<bos> D3 D2 -> <mask> S2 <mask>"],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    # whatever comes first ends
    ends = tuple(i for i in range(model.config.vocab_size) if i != tokenizer.mask_token_id)
    config = DenoiseConfig(**{"gen_length": 6, "end_ids": ends} | DENOISE[name])
    tracer = Tracer(tokenizer, facts(model), inputs.input_ids, inputs.attention_mask, gen_length=6)
    seen, rng = [], torch.Generator().manual_seed(3)

    def callback(told):
        tracer(told)
        seen.append({key: told[key] for key in ("where", "soft")})

    out = denoise(
        model,
        inputs.input_ids,
        inputs.attention_mask,
        config=config,
        rng=rng,
        callback=callback,
        history=True,
    )
    for row in range(2):
        first = int((inputs.attention_mask[row] == 0).sum())
        canvas = tracer.canvas(row, out, "c")
        assert (
            canvas.mask == "<mask>"
            and canvas.title == "c"
            and len(canvas.forwards) == out.num_forwards
        )
        states = list(canvas.states())
        texts = [
            [
                None if i == tokenizer.mask_token_id else tokenizer.decode([i])
                for i in state[row, first:].tolist()
            ]
            for state in out.states
        ]
        assert [[text for text, _ in state] for state in states] == texts
        at = [-1] * len(canvas.cells)
        for f, forward in enumerate(canvas.forwards):
            for column, (_, p) in forward.committed.items():
                at[column] = f if p is not None else at[column]
        assert at == out.committed_at[row, first:].tolist()
        sure = [torch.nan if p is None else p for _, p in states[-1]]
        filled = torch.tensor([p is None for _, p in states[-1]])
        theirs = out.confidence[row, first:].masked_fill(filled, torch.nan)
        torch.testing.assert_close(torch.tensor(sure), theirs, equal_nan=True, rtol=0, atol=0)
        for told, forward in zip(seen, canvas.forwards, strict=True):
            expected = {}
            if told["soft"] is not None:
                for (r, column), ids, weights in zip(
                    told["where"].nonzero().tolist(), *told["soft"], strict=True
                ):
                    if r == row:
                        dense = torch.zeros(model.config.vocab_size).scatter_add(0, ids, weights)
                        expected[column - first] = {
                            tokenizer.decode([i]): float(dense[i])
                            for i in dense.nonzero()[:, 0].tolist()
                        }
            assert forward.soft.keys() == expected.keys()
            for column, mixture in forward.soft.items():
                assert dict(mixture) == pytest.approx(expected[column])
                assert [w for _, w in mixture] == sorted((w for _, w in mixture), reverse=True)
    if name == "remask":
        assert any(forward.dropped for row in range(2) for forward in tracer.canvas(row).forwards)
    if name == "early stop":
        assert any(
            p is None for f in tracer.canvas(0, out).forwards for _, p in f.committed.values()
        )


def test_of_a_wide_mixture_only_the_heaviest_are_kept_meanwhile(mnns, monkeypatch):
    model, tokenizer = mnns
    ids = tokenizer("<bos> D1 D1 D1 D2 ->", return_tensors="pt").input_ids
    config = DenoiseConfig(
        gen_length=4, soften="soft-mask", soften_args={"algorithm": "temperature"}
    )

    def traced():
        tracer = Tracer(tokenizer, facts(model), ids, gen_length=4, top=5)
        out = denoise(model, ids, config=config, callback=tracer)
        return tracer.canvas(0, out), {
            seen["soft"].ids.shape[-1] for seen in tracer.seen if seen["soft"].ids.numel()
        }

    whole, widths = traced()
    assert min(widths) > 16
    monkeypatch.setattr("softar.diffusion.trace.MANY", 16)
    assert traced() == (whole, {5})
    assert all(len(mixture) == 5 for forward in whole.forwards for mixture in forward.soft.values())


# JSON and the page

texts = st.one_of(st.sampled_from(NASTY), st.text(st.characters(codec=None), max_size=8))
floats = st.floats(0, 1)
mixtures = st.lists(st.tuples(texts, floats), min_size=1, max_size=10)
steps = st.builds(
    Step,
    st.sampled_from(["soft", "hard", "forced"]),
    texts,
    st.none() | floats,
    mixtures,
    floats,
    st.integers(0, 9),
)
chains = st.builds(Trace, texts, st.lists(steps, max_size=4), texts, st.integers(0, 4))
columns = st.integers(0, 3)
forwards = st.builds(
    Forward,
    st.dictionaries(columns, st.tuples(texts, st.none() | floats), max_size=3),
    st.dictionaries(columns, mixtures, max_size=3),
    st.lists(columns, max_size=2),
)
canvases = st.builds(
    Canvas,
    st.lists(st.none() | texts, min_size=4, max_size=4),
    st.lists(forwards, max_size=3),
    texts,
    texts,
)
traces = st.one_of(chains, canvases)


def embedded(text):
    """The data as a browser finds it: up to the first end of a script."""
    (data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL | re.IGNORECASE
    )
    return data


@settings(max_examples=60, deadline=None)
@given(traces)
def test_a_trace_comes_back_from_json(trace):
    text = to_json(trace)
    assert from_json(text) == trace and text.isascii() and "\n" not in text


PLACE = {digit: i for i, digit in enumerate(DIGITS)}


def number(digits):
    value = 0
    for digit in digits:
        value = 90 * value + PLACE[digit]
    return value


def unpacked(item):
    """What the page's script makes of a packed canvas."""
    words, wide, last = item.pop("words"), item.pop("wide"), {}
    for forward in item["forwards"]:
        for column, packed in forward["soft"].items():
            if packed != 0:
                pairs = [packed[at : at + wide + 2] for at in range(0, len(packed), wide + 2)]
                last[column] = [
                    (words[number(pair[:wide])], number(pair[wide:]) / 1000 or 0.0004)
                    for pair in pairs
                ]
            forward["soft"][column] = last[column]
    return item


def rounded(trace):
    """A canvas as a page holds it: weights in thousandths, and what would be 0 of them as a
    little."""
    if isinstance(trace, Trace):
        return trace
    forwards = [
        replace(
            f,
            soft={
                c: [(t, round(1000 * w) / 1000 or 0.0004) for t, w in m] for c, m in f.soft.items()
            },
        )
        for f in trace.forwards
    ]
    return replace(trace, forwards=forwards)


@settings(max_examples=40, deadline=None)
@given(st.lists(traces, min_size=1, max_size=3), texts)
def test_a_page_holds_its_traces(given_traces, title):
    text = page(given_traces, title)
    data = embedded(text)
    items = [unpacked(item) if item["family"] == "diffusion" else item for item in json.loads(data)]
    assert [from_json(json.dumps(item)) for item in items] == list(map(rounded, given_traces))
    assert "<" not in data and data.isascii()
    assert text.encode("utf-8") and text.count("<script") == page([Trace("", [])]).count("<script")
    assert text.count("<title") == 1 and text.count("</title>") == 1


@pytest.mark.parametrize("title", ["</title><script>", "a & b", "{{data}}", "größer 中 \u202e"])
def test_a_title_is_text(title):
    text = page([Trace("", [])], title)
    assert {html.unescape(shown) for shown in re.findall(r"<(?:title|h1)>(.*?)</", text)} == {title}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no trace"),
        ("[", "no trace"),
        ("3", "no trace"),
        ('{"family": "gan"}', "'gan' is unknown"),
        ('{"family": "autoregressive", "steps": []}', "no trace"),
        ('{"family": "diffusion", "cells": [], "forwards": [{"more": 1}]}', "no trace"),
    ],
)
def test_what_is_no_trace_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text)


def test_a_page_asks_for_nothing():
    text = page([Trace("p", [])])
    frame = text.replace(embedded(text), "")
    assert not re.search(
        r"https?:|//[a-z]|src=|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", frame
    )
    assert "default-src 'none'" in frame
    with pytest.raises(ValueError, match="no traces"):
        page([])


def long_trace():
    mixture = [(f" candidate{i}", 0.1) for i in range(10)]
    return Trace("p", [Step("soft", " candidate0", 2.302585092994046, mixture)] * 256, "long", 200)


def test_256_steps_of_10_candidates_are_small(tmp_path):
    file = write_page(tmp_path / "page.html", [long_trace()])
    assert file.stat().st_size < 1_000_000 and os.listdir(tmp_path) == ["page.html"]


def wide_canvas(words):
    """256 forwards that fill 256 masks one by one; each mask left has a mixture of 10 tokens of so
    many, never twice the same: 32640 mixtures."""
    rng = random.Random(0)
    known = [f" {rng.randrange(10**9):x}" for _ in range(words)]
    forwards = []
    for f in range(256):
        weights = {
            column: sorted((rng.random() for _ in range(10)), reverse=True)
            for column in range(f + 1, 256)
        }
        soft = {
            c: [(t, w / sum(ws)) for t, w in zip(["<mask>", *rng.sample(known, 9)], ws)]
            for c, ws in weights.items()
        }
        forwards.append(Forward({f: (known[f], rng.random())}, soft, []))
    return Canvas([None] * 256, forwards, "wide")


@pytest.mark.rest
@pytest.mark.parametrize("words, most", [(3000, 1.75e6), (20000, 2.25e6)])
def test_256_forwards_of_256_soft_slots_are_small(tmp_path, words, most):
    canvas = wide_canvas(words)
    file = write_page(tmp_path / "page.html", [canvas])
    assert file.stat().st_size < most
    (item,) = json.loads(embedded(file.read_text()))
    found = unpacked(item)["forwards"]
    assert [{int(c): m for c, m in f["soft"].items()} for f in found] == [
        f.soft for f in rounded(canvas).forwards
    ]


def test_a_mixture_that_stays_is_written_once():
    slot = [("a", 0.75), ("<mask>", 0.25)]
    almost = [("a", 0.7501), ("<mask>", 0.2499)]
    other = [("<mask>", 8.5), ("a", 0.0001)]
    forwards = [
        Forward({}, {1: slot}),
        Forward({}, {1: almost, 2: slot}),
        Forward({}, {}),
        Forward({}, {1: slot, 2: other}),
    ]
    item = json.loads(pack(Canvas([None] * 3, forwards)))
    assert [forward["soft"] for forward in item["forwards"]] == [
        {"1": "##+B#$%k"},
        {"1": 0, "2": "##+B#$%k"},
        {},
        {"1": 0, "2": "#$~~####"},
    ]
    assert unpacked(item)["forwards"][3]["soft"] == {
        "1": slot,
        "2": [("<mask>", 8.099), ("a", 0.0004)],
    }


def test_traces_and_pages_need_no_torch():
    code = "import sys, softar.show.page, softar.show.trace; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "False\n"
    )


# The terminal


def printed(trace, width=120):
    console = Console(width=width, file=open(os.devnull, "w"), record=True)
    console.print(view(trace))
    return console.export_text()


def test_a_bar_is_filled_by_shares():
    assert (
        str(bar([("a", 0.5), ("b", 0.25), ("c", 0.125)], 0.125))
        == "█" * 12 + "▓" * 6 + "▒" * 3 + "·" * 3
    )
    # they need not sum to 1
    assert str(bar([("<mask>", 1.5), ("a", 0.5)], mask="<mask>")) == "█" * 6 + "·" * 18
    assert len(str(bar([(str(i), 0.1) for i in range(10)]))) == 24


def test_a_thought_in_the_terminal():
    out, tokenizer = decoded(top_k=16, budget=3)
    trace = thought(out, tokenizer)
    lines = printed(trace).splitlines()
    rows = [line for line in lines if re.match(r" +\d+  (soft|hard)", line)]
    assert len(rows) == 6 and [row.split()[2] for row in rows] == [
        step.token for step in trace.steps
    ]
    assert all(len(re.findall("[█▓▒░·]", row)) == (24 if " soft " in row else 0) for row in rows)
    assert all(f"{step.entropy:.2f}" in row for step, row in zip(trace.steps, rows))
    assert (
        lines.index(rows[3]) - lines.index(rows[2]) == 2
        and "answer" in lines[lines.index(rows[3]) - 1]
    )
    assert f"{trace.steps[0].mixture[1][0]} {trace.steps[0].mixture[1][1]:.2f}" in rows[0]


def test_a_canvas_in_the_terminal():
    slot = [("<mask>", 0.6), ("warm", 0.3), ("cold", 0.1)]
    canvas = Canvas(
        ["the", None, None],
        [Forward({1: ("sea", 0.9)}, {2: slot}), Forward({2: ("is", None)}, {}, [1])],
        "c",
    )
    lines = printed(canvas).splitlines()
    assert (
        lines[0] == "c"
        and lines[2].split() == ["the", "·", "·"]
        and lines[3].split() == ["1", "the", "sea", "warm"]
    )
    assert (
        lines[4].split()[:2] == ["2", "█" * 7 + "▓" * 3 + "·" * 14]
        and "warm 0.30  cold 0.10  mask 0.60" in lines[4]
    )
    assert lines[5].split() == ["2", "the", "↺", "is"]


@pytest.mark.parametrize("text", NASTY)
def test_nasty_tokens_stay_on_their_line(text):
    shown = visible(text)
    assert shown.isprintable() and 0 < len(shown) <= 20
    step = Step("soft", text, 0.5, [(text, 0.9), ("b", 0.1)])
    first, second = (printed(Trace("p", [step] * n, "t")).count("\n") for n in (1, 2))
    assert second == first + 1
    printed(Canvas([text, None], [Forward({1: (text, 0.5)})], text))


# A real browser

# Presses keys and leaves what is then focused in the body's attributes.
KEYS = """<script>
const press = (where, ...keys) => {
  document.querySelector(where).focus();
  for (const key of keys)
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  return document.activeElement.getAttribute("aria-label");
};
if (document.querySelector(".step")) {
  document.body.dataset.step = press(".step", "ArrowDown", "ArrowDown", "ArrowUp", "PageDown");
} else {
  document.body.dataset.cell = press(".picked[role=gridcell]", "ArrowUp", "ArrowUp", "ArrowLeft", "ArrowDown");
  const slider = document.querySelector("input");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  document.body.dataset.told = document.querySelector("output").textContent;
}
press("[role=tab]", "ArrowRight");
document.body.dataset.tab = document.activeElement.id;
</script>"""

CHROMIUM = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])),
    None,
)


def opened(file, profile):
    """The document as a browser leaves it, after the keys."""
    file.write_text(
        file.read_text(encoding="utf-8").replace("</body>", KEYS + "</body>"), encoding="utf-8"
    )
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH to open the page in"
)


@pytest.mark.rest
@needs_browser
def test_a_browser_shows_a_wide_canvas(tmp_path):
    """Mixtures come out of their packing: with more words than two digits count, and as in an
    earlier forward."""
    canvas = wide_canvas(20000)
    still = canvas.forwards[0].soft[255]
    for forward in canvas.forwards[1:255]:
        forward.soft[255] = still
    dom = opened(write_page(tmp_path / "page.html", [canvas]), tmp_path / "profile")
    assert dom.count('role="row"') == 258
    # from the first mask after forward 1: up, up, left, down
    cell = dom.partition("data-cell=")[2][:60]
    assert "position 0, forward 1, decided" in cell
    assert 'data-told="forward 0 of 256, 0 new, 256 left"' in dom
    slots = re.findall(r'aria-label="position 255, forward (\d+), soft slot ([^"]*)"', dom)
    assert len(slots) >= 19 and {text for _, text in slots} == {"␣" + still[1][0][1:]}
    assert "0.0004" not in dom


@needs_browser
def test_a_browser_shows_every_step(tmp_path):
    steps = [Step("soft", text, 1.0, [("other", 0.6), (text, 0.4)]) for text in NASTY]
    likeliest = Step("soft", "first", None, [("first", 0.6), ("second", 0.4)])
    chain = Trace(NASTY[0], [*steps, likeliest], NASTY[0], 3)
    canvas = Canvas([*NASTY, None], [Forward({16: (NASTY[0], 0.25)}, {}, [])], "canvas")
    doms = []
    for number, shown in enumerate([[chain, canvas], [canvas, chain]]):
        file = write_page(tmp_path / f"{number}.html", shown, "a page")
        doms.append(opened(file, tmp_path / "profile"))
    for dom in doms:
        assert "<title>a page</title>" in dom  # a script in a token would have changed it
        assert dom.count('role="tab"') == 2 and dom.count('role="tabpanel"') == 2
    assert doms[0].count('role="option"') == len(NASTY) + 1
    assert "step 12, soft" in doms[0].partition("data-step=")[2][:50]
    assert doms[0].count('class="c1 stands"') == len(NASTY) + 1  # the legend's, too
    # where the likeliest stands for the step it needs no mark
    assert 'class="c0 stands"' not in doms[0]
    assert (
        doms[1].count('role="row"') == 3
        and len(re.findall(r'class="cell set new[^"]*" [^>]*role="gridcell"', doms[1])) == 1
    )
    assert "25 % sure, new" in doms[1] and 'aria-label="13 given cells, not shown"' in doms[1]
    assert "position 15, forward 1, given" in doms[1].partition("data-cell=")[2][:50]
    assert 'data-told="forward 0 of 1, 0 new, 1 left"' in doms[1]
    assert all('data-tab="tab1"' in dom for dom in doms)
