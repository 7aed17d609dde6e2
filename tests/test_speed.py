"""recipes/speed.py on tiny nets: no limit counts more than is computed, its tables, its page, the part of
gpu.py, and what is refused."""

import json
import re
from argparse import Namespace

import pytest
import torch
from tiny import model_of
from torch.utils.flop_counter import FlopCounterMode

from softar.recipes import bench_vllm, gpu, speed
from softar.recipes.speed_limits import Rates, Work, size_of
from softar.recipes.speed_page import number, tables_of
from softar.recipes.speed_paths import TABLES, Table, Timed

CPU = torch.device("cpu")
TINY = ["--dry_run", "--devices", "cpu"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a whole dry run."""
    folder = tmp_path_factory.mktemp("speed")
    speed.main([*TINY, "--output", str(folder)])
    return folder


def rows_of(folder):
    return json.loads((folder / "speed.json").read_text())["rows"]


# -- limits


@pytest.mark.parametrize("kind", TABLES)
def test_a_limit_counts_what_is_computed_and_no_more(kind):
    """Products with weights are nearly all that a path computes; torch counts them in every product."""
    for table in TABLES[kind](speed.parse(TINY), CPU):
        for name, path in table.paths.items():
            with FlopCounterMode(display=False) as counter:
                path.run()
            counted = sum(work.operations * work.times for work in path.works)
            assert 0.8 < counted / counter.get_total_flops() <= 1, (table.title, name)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_step_reads_each_matrix_once(is_tied):
    model = model_of(tie_word_embeddings=is_tied)
    size, c = size_of(model), model.config
    every = sum(p.nbytes for p in model.parameters() if p.dim() > 1)
    embedding = 0 if is_tied else model.get_input_embeddings().weight.nbytes
    assert size.forward(1, 1).read == every - embedding
    keys = model(torch.zeros(3, 5, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in keys.layers)
    assert size.forward(3, 3, keys=15).read - size.forward(3, 3).read == held
    assert size.forward(1, 0).read == size.forward(1, 1).read - 4 * c.vocab_size * c.hidden_size


@pytest.mark.parametrize("seed", range(20))
def test_the_longer_of_reading_and_computing_is_the_limit(seed):
    drawn = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed)).tolist()
    works, rates = [Work(*some) for some in drawn], Rates(0.7, 1.3)
    least = rates.least(works)
    assert least == pytest.approx(sum(t * max(b / 0.7, o / 1.3) for b, o, t in drawn))
    assert Rates(1.4, 2.6).least(works) == pytest.approx(least / 2)
    assert rates.bound([work._replace(operations=0) for work in works]) == "reading"
    assert rates.bound([work._replace(read=0) for work in works]) == "computing"


# -- the run


def test_every_path_has_its_share_and_its_ratio(dry):
    content = json.loads((dry / "speed.json").read_text())
    assert content["versions"]["torch"] == torch.__version__
    tables = tables_of(content["rows"])
    assert [table[0]["kind"] for table in tables] == ["decode"] * 2 + ["denoise"] * 2 + ["train"]
    for rows in tables:
        paths = [row["path"] for row in rows]
        for row in rows:
            assert 0 < row["share_low"] <= row["share"] <= row["share_high"]
            assert 0 < row["tokens_per_s"] and 0 < row["limit"] and len(row["seconds"]) == 2
            assert (row["beside"] is None) == (row["ratio"] is None) == (row is rows[0])
            if row["is_soft"]:  # beside hard, with the same cache
                assert row["beside"] in paths and row["beside"].startswith("hard")
            if row["beside"]:
                base = rows[paths.index(row["beside"])]["seconds"]
                ratios = [a / b for a, b in zip(base, row["seconds"], strict=True)]
                assert (row["ratio_low"], row["ratio_high"]) == (min(ratios), max(ratios))
    ways = ["model.generate", "hard", "soft, top-k 10"]
    assert [row["path"] for row in tables[0]] == [w + c for c in ("", ", static") for w in ways]
    assert {row["path"] for row in tables[2]} == {
        f"{soften}, {cache}"
        for soften in ("hard", "soft-mask")
        for cache in ("no cache", "prefix", "dual")
    }


def test_a_share_is_of_the_rates_of_its_own_repeat():
    """A machine that is half as fast in one repeat is no path that is half as fast."""
    works = [Work(8.0, 0.0)]
    table = Table("decode", "", "", CPU, {"hard": Timed(print, 4, works, False)})
    args = Namespace(repeats=2, cpu_time=False)
    (row,) = speed.rows_of(args, table, {"hard": [4.0, 8.0]}, [Rates(4.0, 1.0), Rates(2.0, 1.0)])
    assert row["share_low"] == row["share"] == row["share_high"] == 0.5
    assert (row["bound"], row["beside"], row["read_per_s"]) == ("reading", None, 3.0)


def test_a_path_that_does_not_compile_is_left_out():
    def fails():
        raise RuntimeError("no compiler")

    paths = {"hard": Timed(fails, 4, [Work(1.0, 1.0)], False, None, True)}
    paths["soft"] = Timed(dict, 4, [Work(1.0, 1.0)], True, "hard")
    (row,) = speed.measured(speed.parse(TINY), Table("decode", "", "", CPU, paths))
    assert row["path"] == "soft" and row["beside"] is None
    paths = {"hard": Timed(fails, 4, [Work(1.0, 1.0)], False, None, True)}
    with pytest.raises(RuntimeError, match="batch 1: nothing compiles here") as error:
        speed.measured(speed.parse(TINY), Table("decode", "batch 1", "", CPU, paths))
    assert str(error.value.__cause__) == "no compiler"
    with pytest.raises(RuntimeError, match="no compiler"):
        paths = {"hard": Timed(fails, 4, [Work(1.0, 1.0)], False)}
        speed.measured(speed.parse(TINY), Table("decode", "", "", CPU, paths))


def test_vllm_has_the_limit_of_decoding(monkeypatch, tmp_path):
    def throughput(args):
        assert (args.concurrency, args.tokens, args.prompt_tokens) == ([8], 16, 32)
        assert (args.modes, args.repeats) == (["plugin", "soft", "record"], 2)
        over = {"plugin": "none", "soft": "plugin", "record": "plugin"}
        return [dict(mode=mode, over=over[mode], runs=[100.0, 80.0]) for mode in args.modes]

    monkeypatch.setattr(bench_vllm, "throughput", throughput)
    monkeypatch.setattr(bench_vllm, "require_vllm", lambda: None)
    monkeypatch.setattr(speed, "require_vllm", lambda: None)
    monkeypatch.setattr(speed, "on_cpu", lambda: True)
    monkeypatch.setattr(speed.speed_limits, "measured", lambda *_: Rates(1e10, 1e11))
    words = ["--paths", "vllm", "--devices", "cpu", "--repeats", "2", "--output", str(tmp_path)]
    rows = speed.speeds(speed.parse(words))
    assert [row["path"] for row in rows] == ["discrete", "soft", "soft, with record"]
    assert [row["beside"] for row in rows] == [None, "discrete", "discrete"]
    # 15 steps that read 135 million weights in float32 and up to 8 x 47 keys; 256 positions at once
    prompt = 2 * (256 * 106.2e6 + 8 * 28.3e6) / 1e11
    steps = 15 * (538e6 + 8 * 40 * 46080) / 1e10
    for row in rows:
        assert row["limit"] == pytest.approx(8 * 16 / (prompt + steps), rel=0.01)
        assert row["share_high"] == pytest.approx(100 / row["limit"])


def test_what_fails_leaves_the_tables_before(monkeypatch, tmp_path):
    def tables(args):
        yield [dict(path="hard")]
        raise RuntimeError("the engine ended")

    monkeypatch.setattr(speed, "tables", tables)
    with pytest.raises(RuntimeError, match="the engine ended"):
        speed.main([*TINY, "--output", str(tmp_path)])
    assert rows_of(tmp_path) == [dict(path="hard")]


def test_the_part_of_the_gpu_program(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows, about = [], gpu.PARTS["speed"]
    assert about.measure == "speed.part" and "speed" not in gpu.BY_DEFAULT
    speed.part(rows.append, True, lambda: -1.0)  # a table, then the time is over
    assert {row["table"] for row in rows} == {"Decoding, batch 1"}
    assert all(row["what"] == row["path"] and {*about.columns} <= {*row} for row in rows)
    assert not [*tmp_path.iterdir()]


def test_a_value_that_is_named_twice_is_taken_once():
    words = "--batch 8 1 8 --paths train decode train --devices cpu cpu --caches static static"
    args = speed.parse(words.split())
    assert (args.batch, args.paths) == ([8, 1], ["train", "decode"])
    assert (args.devices, args.caches) == (["cpu"], ["static"])


# -- the page


def test_the_page_asks_for_nothing_and_shows_every_path(dry):
    text, rows = (dry / "page.html").read_text(), rows_of(dry)
    assert not re.search(r"""(src|href)=["']?(https?:|//)|<script|@import|url\(["']?http""", text)
    assert text.count("<svg") == text.count('role="img"') == 5
    for row in rows:
        assert f">{row['path']}</td>" in text and f"{row['path']}: {row['share']:.2f} of" in text
    assert all(
        " ".join(each.__doc__.split()) in text.replace("&#x27;", "'") for each in TABLES.values()
    )
    assert (dry / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_one_page_of_several_machines(dry, tmp_path):
    content = json.loads((dry / "speed.json").read_text())
    content["rows"] = [row for row in content["rows"] if row["kind"] == "train"]
    some = tmp_path / "speed-of-training.json"
    some.write_text(json.dumps(content))
    for row in content["rows"]:
        row |= dict(device="another machine", what=row["path"])
    content["rows"].append(dict(what="outcome", device="another machine"))  # as gpu.py writes it
    other = tmp_path / "results.json"
    other.write_text(json.dumps(content))
    speed.main(["--rows", str(some), str(other), "--output", str(tmp_path)])
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 2 and "another machine: " in text
    assert not (tmp_path / "speed.json").exists()


@pytest.mark.parametrize("x, says", [(999.4, "999"), (999.7, "1,000"), (12345.6, "12,346")])
def test_a_number_has_no_exponent(x, says):
    assert number(x) == says


# -- what is refused


@pytest.mark.parametrize(
    "words, says",
    [
        (["--repeats", "0"], "repeats=0 must be at least 1"),
        (["--batch", "1", "0"], "batch=0 must be at least 1"),
        (["--new_tokens", "1"], "new_tokens=1 must be at least 2"),
        (["--new_tokens", "7"], "new_tokens=7 must be even"),
        (["--paths", "train", "--caches", "static"], "--caches is of decoding"),
        (["--paths", "vllm", "--threads", "1"], "--threads does nothing"),
        (["--paths", "vllm", "--cpu_time"], "--cpu_time does nothing"),
        (["--paths", "decode", "vllm", "--dry_run"], "--dry_run does nothing"),
        (["--rows", "empty.json", "--repeats", "9"], "--repeats does nothing beside --rows"),
        (["--devices", "cuda"], "there is no CUDA device here"),
        (["--rows", "nothing.json"], "nothing.json"),
        (["--rows", "empty.json"], "empty.json has no rows of speed"),
        (["--output", "empty.json"], "empty.json"),
    ],
)
def test_wrong_options_are_named(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty.json").write_text('{"rows": []}')
    with pytest.raises(SystemExit) as end:
        speed.main(words)
    err = capsys.readouterr().err
    assert end.value.code == 2 and says in err and len(err.splitlines()) == 1
