"""Each family of diffusion models in each place where a model is named: the command, the pages,
lm-eval, the recipe. Their decodes are compared in test_golden.py."""

import io
import json
import math
import shutil
import sys
from importlib import import_module

import pytest
import torch
from lm_eval.api.instance import Instance
from test_families import FOLDERS, MASK
from test_families import tokenizer_of as words_of
from test_renoised import gemma
from tiny import model_of, seeded, tokenizer_of
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from softar.cli import app as cli
from softar.cli import inputs
from softar.diffusion import DenoiseConfig, denoise, load
from softar.diffusion.convert import convert
from softar.diffusion.decoders import DiffusionDecoder
from softar.diffusion.folder import STATED, split_stated
from softar.diffusion.lm_eval import SoftarDiffusionLM
from softar.diffusion.net import facts
from softar.evals.lm_eval import BadArgument
from softar.show.trace import Canvas, from_json

# name -> the checkpoint, how its tokenizer spells the mask, what has to be said of the folder
ORIGINALS = {
    "sdar": ("sdar_b4", "<|MASK|>", {}),
    "fast_dllm_v2": ("fastv2_tied", "|<MASK>|", {}),
    "llada2": ("llada2_moe", "<|mask|>", {}),
    "a2d": ("a2d_qwen3", "<|mask|>", {}),
    "bd3lm": ("a2d_qwen3", "<|mask|>", {"model_block_length": 4}),
    "open_dcoder": ("opendcoder", "[MASK]", {}),
    "open_dcoder_by_kind": ("opendcoder", "[MASK]", {"kind": "open_dcoder"}),
}
NAMES = [*ORIGINALS, "diffusion_gemma", "converted"]
SAID = {name: ORIGINALS[name][2] if name in ORIGINALS else {} for name in NAMES}
LENGTH = ("--gen-length", 4)
every_family = pytest.mark.parametrize("name", NAMES)
recipe = import_module("softar.recipes.denoise")


def original(name, folder):
    checkpoint, mask, said = ORIGINALS[name]
    shutil.copytree(FOLDERS / checkpoint, folder)
    for file in ("tokenizer_config.json", "added_tokens.json"):
        (folder / file).unlink(missing_ok=True)
    if "kind" in said:
        (folder / "generation_config.json").unlink()
    (qwen(mask) if checkpoint == "opendcoder" else words_of(310, MASK, mask)).save_pretrained(
        folder
    )


def qwen(mask):
    """Bytes: AutoTokenizer makes Qwen2's of any tokenizer in a folder of its model."""
    pieces = [*bytes_to_unicode().values(), *(f"u{i}" for i in range(256, 310))]
    pieces[MASK], pieces[309] = mask, "<eos>"
    names = dict(eos_token="<eos>", pad_token="<eos>", unk_token=None, mask_token=mask)
    return Qwen2Tokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], **names)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("families")
    for name in ORIGINALS:
        original(name, place / name)
    models = {"diffusion_gemma": (gemma(), tokenizer_of())}
    models["converted"] = convert(model_of("qwen3"), tokenizer_of(), block_length=4)
    for name, parts in models.items():
        for part in parts:
            part.save_pretrained(place / name)
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i + 2}"} for i in (5, 6)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


@pytest.fixture
def softar(capsys, monkeypatch):
    """Runs the command in this process -> what it prints."""
    for name, value in (cli.QUIET | cli.NO_BARS).items():
        monkeypatch.setenv(name, value)

    def run(*argv):
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in argv])
        printed = capsys.readouterr()
        assert left.value.code == 0, printed.err
        return printed.out

    return run


def spec_of(decoder, said, **options):
    options = {**said, **options}
    text = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{decoder}:{text}" if text else decoder


def flags(said):
    return [word for k, v in said.items() for word in (f"--{k.replace('_', '-')}", v)]


@every_family
def test_fill(softar, folders, name):
    said = SAID[name]
    ask = ["fill", "w5 w6", "-m", folders / name, *LENGTH, "--steps", 4, *flags(said), "--json"]
    out = json.loads(softar(*ask))
    assert 0 < len(out["tokens"]) <= 4 and out["num_forwards"] >= 1
    assert out["decoder"] == ("denoise" if name == "diffusion_gemma" else "hard")
    soft = json.loads(softar(*ask, "-d", "soft-token"))
    assert soft["decoder"] == "soft-token" and 0 < len(soft["tokens"]) <= 4
    if name != "diffusion_gemma":  # which has no mask that a hole could be
        ask = ["fill", "w5 _ w6", "-m", folders / name, *flags(said), "--steps", 4, "--json"]
        assert len(json.loads(softar(*ask))["tokens"]) == 1


@every_family
def test_compare(softar, folders, name):
    own = ["denoise", "hard"] if name == "diffusion_gemma" else ["hard", "soft-mask"]
    if not SAID[name]:
        assert inputs.compared("rows", str(folders / name), "auto", None) == own
    specs = [word for each in own for word in ("-d", spec_of(each, SAID[name], steps=4))]
    ask = ["compare", "-t", folders / "rows.jsonl", "-m", folders / name, "--max-new-tokens", 4]
    rows = json.loads(softar(*ask, *specs, "--json"))["rows"]
    assert [row["decoder"] for row in rows] == own
    assert all(row["n"] == 2 and row["nfe"] >= 1 and row["tpf"] > 0 for row in rows)
    assert all(0 <= row["entropy"] < math.log(320) for row in rows)


@every_family
def test_trace_and_page(softar, folders, name, tmp_path):
    spec = f"{folders / name}={spec_of('soft-token', SAID[name], steps=4)}"
    ask = ["trace", "w5 w6", "-d", spec, "--max-new-tokens", 4]
    trace = from_json(softar(*ask, "--json"))
    assert isinstance(trace, Canvas)
    *_, last = trace.states()
    assert len(last) >= 6 and all(text is not None for text, _ in last)
    softar(*ask, "--html", tmp_path / "page.html")
    assert "soft-token" in (tmp_path / "page.html").read_text()


def test_sweep(softar, folders, tmp_path):
    """One grid over all of them."""
    specs = [f"{folders / name}={spec_of('hard', SAID[name], steps=4)}" for name in NAMES]
    decoders = [word for spec in specs for word in ("--baseline", spec)]
    ask = ["sweep", "-t", folders / "rows.jsonl", "--soft", f"{folders / 'sdar'}=soft-token"]
    ask += [*decoders, "--max-new-tokens", 4, "-o", tmp_path, "--json"]
    points = json.loads(softar(*ask))["points"]
    assert len(points) == len(NAMES) + 1 and all(point["nfe"] >= 1 for point in points)
    assert (tmp_path / "sweep.png").is_file()


@every_family
def test_lm_eval(folders, name):
    how = dict(steps=4, samples=2, samples_batch=2, check_greedy=False)
    lm = SoftarDiffusionLM(str(folders / name), **how, **SAID[name])
    settings = {"until": ["w49"], "max_gen_toks": 4}
    asked = [Instance("generate_until", {}, ("w5 w6", settings), 0, ("task", 0, 1))]
    (text,) = lm.generate_until(asked, disable_tqdm=True)
    own = lm.get_model_info()["softar"]
    assert isinstance(text, str) and own["costs"]["task"]["nfe"] >= 1
    assert SAID[name].items() <= own["settings"].items()
    asked = [Instance("loglikelihood", {}, ("w5 w6", " w7 w8"), 0)]
    if name == "diffusion_gemma":
        with pytest.raises(BadArgument, match=r"diffusion_gemma has no mask token.*that generate"):
            lm.loglikelihood(asked, disable_tqdm=True)
        return
    ((value, _),) = lm.loglikelihood(asked, disable_tqdm=True)
    assert value < 0


@every_family
def test_recipe(folders, name, capsys):
    words = [w if i % 2 else f"--{w}" for i, w in enumerate(flat(SAID[name]))]
    ask = ["--model", str(folders / name), "--prompt", "w5 w6", "--gen_length", "4", *words]
    ask += ["--steps", "4"]
    recipe.main(*recipe.parse(ask))
    assert "masks 0" in capsys.readouterr().out


def flat(said):
    return [str(word) for pair in said.items() for word in pair]


def test_of_a_model_and_of_a_decode():
    """block_length cuts a canvas into pieces; what a model was trained with has a name of its own."""
    options = dict(kind="a2d", model_block_length=4, block_length=8, shift=1, steps=2)
    stated, others = split_stated(options)
    assert stated == dict(kind="a2d", block_length=4, shift=1)
    assert others == dict(block_length=8, steps=2) and len(STATED) == 5


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hard:model_block_length=8", "8 by the argument, 4 by block_size"),
        ("hard:mask_token_id=word", "mask_token_id='word' must be a whole number"),
        ("hard:kind=[1]", "kind=[1] must be text"),
        ("hard:shift=1", "0 by the family sdar"),
    ],
)
def test_bad_statements_are_one_line(folders, spec, says):
    from softar import make_decoder

    with pytest.raises(ValueError) as caught:
        make_decoder(spec, model=str(folders / "sdar"), max_new_tokens=8)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_looks_like_its_base_is_sent_on(folders):
    """With what opens it, where it fills masks."""
    bare = str(folders / "open_dcoder_by_kind")
    common = dict(max_new_tokens=8, seed=0, dtype="auto", device="cpu")
    for spec in (None, "hard"):
        with pytest.raises(ValueError, match="kind=open_dcoder"):
            inputs.open_decoder(spec, bare, {}, fills=True, **common)
    with pytest.raises(BadArgument, match="kind=open_dcoder"):
        SoftarDiffusionLM(bare)


@every_family
def test_entropies_are_of_beliefs(folders, name):
    """Of what was committed, and of nothing else; the decoder's is their mean."""
    model, tokenizer = load(folders / name, **split_stated(SAID[name])[0])
    told = []
    ids, how = torch.tensor([[5, 6]]), dict(gen_length=4, steps=4, soften="hard", end_ids=())

    def look(seen):
        told.append((seen["committed"], seen["entropy"]()))

    out = denoise(model, ids, **how, callback=look, rng=seeded(0))
    last = torch.full(out.sequences.shape, torch.nan)
    for committed, nats in told:
        assert torch.equal(committed, ~nats.isnan())
        assert ((nats[committed] >= 0) & (nats[committed] < math.log(320))).all()
        last = torch.where(committed, nats, last)
    decoder = DiffusionDecoder(model, tokenizer, DenoiseConfig(**how))
    prompt = tokenizer.decode(ids[0])
    if tokenizer(prompt)["input_ids"] == ids[0].tolist():
        (answer,) = decoder.decode([prompt])
        assert answer.entropy == pytest.approx(float(last[0, 2:].mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["a2d", "open_dcoder"])
def test_entropies_computed_anew(folders, name):
    """On the canvas that each forward read; the mask is never proposed."""
    model, _ = load(folders / name)
    told, known = [], facts(model)
    ids, how = torch.tensor([[5, 6, 7]]), dict(gen_length=6, steps=3, soften="hard")
    out = denoise(model, ids, **how, history=True, callback=lambda s: told.append(s["entropy"]()))
    for canvas, nats in zip(out.states, told):
        with torch.no_grad():
            logits = model(canvas, use_cache=False).logits[0].double()
        logits[:, known.mask_id] = -torch.inf
        p = logits.softmax(-1)
        anew = -torch.special.xlogy(p, p).sum(-1)
        columns = (~nats[0].isnan()).nonzero()[:, 0]
        assert len(columns) == 2
        found = nats[0, columns].double()
        torch.testing.assert_close(found, anew[columns - known.shift], atol=1e-4, rtol=1e-4)
