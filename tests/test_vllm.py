"""vLLM beside transformers: an engine in a script of its own, a real server on loopback, servers
that misbehave."""

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import tiny
import torch
from engine_script import FORKING
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoModelForCausalLM

import softar.vllm.export
import softar.vllm.server
from softar.decoders.card import describe
from softar.decoders.options import Common
from softar.decoders.registry import build
from softar.models import load
from softar.vllm.client import ServerDecoder
from softar.vllm.completions import MODES, Sampling
from softar.vllm.decoders import DECODERS
from softar.vllm.engine import VLLMDecoder
from softar.vllm.export import exported, served_dtype, widened
from softar.vllm.server import ServerError, serve

pytestmark = pytest.mark.slow
NEW = 6
PROMPTS = [
    "<bos> w11 w12 w13 w14",
    "<bos> w21",
    "<bos> w31 w32",
    *(f"<bos> w{i} w9" for i in range(40, 52)),
]
CHAT = [{"role": "user", "content": "<bos> w11 w12"}]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} <think>{% endif %}"
ALL = {
    "greedy": dict(mode="greedy", logprobs=2),
    "one": dict(mode="sampled", top_k=1, temperature=2.0),
    "sampled": dict(mode="sampled", temperature=1.5, top_p=0.9, top_k=20),
    "self-consistency": dict(mode="self-consistency", votes=5, temperature=1.2, top_k=4),
    "beam": dict(mode="beam", num_beams=3),
}
OFFLINE = """
import dataclasses, json, os, sys
import psutil
from softar.decoders.card import describe
from softar.decoders.options import Common
from softar.vllm import VLLMDecoder
from softar.vllm.decoders import DECODERS

def main(folder, out, prompts, chat, all, new):
    decoders = {key: VLLMDecoder(folder, max_new_tokens=new, seed=3, **how) for key, how in all.items()}
    for key, decoder in decoders.items():
        decoded = decoder.decode(prompts)
        again = decoder.decode(prompts)
        out[key] = [[dataclasses.asdict(row) for row in decoded], [row.tokens for row in again]]
        out[key + " completions"] = [[[c.tokens, c.logprobs] for c in row] for row in decoder.completions]
    greedy = decoders["greedy"]
    out["chat"] = greedy.decode([chat])[0].tokens
    out["nothing"] = greedy.decode([])
    out["engines"] = len({id(d._engine) for d in decoders.values()})
    out["environment"] = os.environ.get("TORCHDYNAMO_DISABLE")
    try:
        greedy.decode([prompts[0], "w5 " * 251])
    except ValueError as error:
        out["long"] = str(error)
    crowd = decoders["sampled"].decode(["w5 " * 200] * 80)  # more at once than the engine computes in a step
    out["crowd"] = [len(row.tokens) for row in crowd]
    traced = DECODERS["vllm-greedy"](describe(folder), Common(new, trace=True))
    out["trace"] = [step.token for step in traced.decode(prompts[:1])[0].trace.steps]
    tree = psutil.Process().children(recursive=True)
    others = [p for p in tree if "resource_tracker" not in str(p.cmdline())]
    out["others"] = len(others)
    for decoder in [*decoders.values(), traced]:
        decoder.close()
    # What the engine ran is gone; the tracker of multiprocessing stays with the program
    out["left"] = [p.pid for p in psutil.wait_procs(others, timeout=10)[1] if p.status() != "zombie"]
    return out

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    json.dump(main(out={}, **given), open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama, with heads that vLLM has to get widened, which ends some answers early."""
    place = tmp_path_factory.mktemp("model")
    model, tokenizer = tiny.model_of(head_dim=16), tiny.tokenizer_of()
    model.lm_head.weight.data[tiny.EOS] *= 1.5
    # of no concern to the decoders
    model.generation_config.top_k, model.generation_config.do_sample = 3, True
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def script(folder, tmp_path_factory):
    """The engine at work in a script of its own, meanwhile."""
    place = tmp_path_factory.mktemp("script")
    (place / "offline.py").write_text(OFFLINE)
    given = json.dumps(dict(folder=folder, prompts=PROMPTS, chat=CHAT, all=ALL, new=NEW))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    with subprocess.Popen(
        [sys.executable, "offline.py", given, "out.json"],
        cwd=place,
        env=os.environ | FORKING,
        **pipes,
    ) as process:
        yield process, place / "out.json"
        with contextlib.suppress(ProcessLookupError):  # where it hangs, its engine is not to stay
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(folder, script):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "PYTHONPATH", FORKING["PYTHONPATH"])
        with serve(folder) as running:
            patch.undo()
            yield running
    assert alive(running.process.pid) == []


@pytest.fixture(scope="module")
def offline(script, server):
    process, file = script
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()[-3000:]
    assert said == b"", "a program's own output stays clean"
    return json.loads(file.read_text())


def alive(group):
    """The processes of a group that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def ids_of(prompt):
    return tiny.tokenizer_of()(prompt)["input_ids"]


@torch.no_grad()
def greedy(model, ids):
    """transformers' own greedy tokens, and their log-probabilities [T, V]."""
    x = torch.tensor([ids])
    out = model.generate(x, do_sample=False, top_k=None, max_new_tokens=NEW)[0].tolist()
    return out[len(ids) :], model(torch.tensor([out])).logits[0, len(ids) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def beams(model, ids, width):
    """Beam search as vLLM defines it: by mean log-probability, the prompt's tokens counted in."""
    live, ended = [(0.0, [])], []

    def rank(beam):
        score, tokens = beam
        return score / (len(ids) + len(tokens) - (tokens[-1] == tiny.EOS))

    for _ in range(NEW):
        more = []
        for score, tokens in live:
            logp = model(torch.tensor([ids + tokens])).logits[0, -1].log_softmax(-1)
            more += [
                (score + logp[t].item(), [*tokens, t])
                for t in logp.topk(2 * width).indices.tolist()
            ]
        ended += [beam for beam in more if beam[1][-1] == tiny.EOS]
        live = sorted((b for b in more if b[1][-1] != tiny.EOS), key=rank, reverse=True)[:width]
    return [tokens for _, tokens in sorted(ended + live, key=rank, reverse=True)[:width]]


def ask(server, mode, **options):
    tokenizer = tiny.tokenizer_of()
    tokenizer.chat_template = TEMPLATE
    given = dict(tokenizer=tokenizer, max_new_tokens=NEW, seed=3) | ALL.get(mode, {}) | options
    return ServerDecoder(server.url, server.model, **given)


# ---- the engine, and the server


def test_greedy_is_that_of_transformers(offline, server, model):
    wanted = [greedy(model, ids_of(p))[0] for p in PROMPTS]
    assert {len(tokens) for tokens in wanted} > {NEW}, "some answers end early, some do not"
    online = ask(server, "greedy").decode(PROMPTS)
    assert [list(row.tokens) for row in online] == wanted
    rows, again = offline["greedy"]
    assert [row["tokens"] for row in rows] == again == wanted
    for row, other, tokens in zip(rows, online, wanted):
        assert (
            row["text"]
            == other.text
            == tiny.tokenizer_of().decode(tokens, skip_special_tokens=True)
        )
        assert "<eos>" not in row["text"]


def test_what_a_row_costs(offline, server):
    online = ask(server, "greedy").decode(PROMPTS)
    for row, other, prompt in zip(offline["greedy"][0], online, PROMPTS):
        t, p = len(row["tokens"]), len(ids_of(prompt))
        assert row["num_forwards"] == other.num_forwards == t
        assert row["token_forwards"] == other.token_forwards == p + t - 1
    votes = offline["self-consistency"]
    lengths = [
        [len(tokens) for tokens, _ in row] for row in offline["self-consistency completions"]
    ]
    assert sum(map(sum, lengths)) > 0 and {len(row) for row in lengths} == {5}
    online = ask(server, "self-consistency")
    for row, prompt, made in zip(online.decode(PROMPTS), PROMPTS, online.completions):
        assert row.num_forwards == sum(len(c.tokens) for c in made)
        assert row.token_forwards == sum(len(ids_of(prompt)) + len(c.tokens) - 1 for c in made)
    assert all(row["seconds"] > 0 for row in votes[0])
    # 1 + 3 + 3 ... beams, each with its whole prefix
    assert offline["beam"][0][1]["num_forwards"] == 3 * NEW
    assert offline["beam"][0][1]["token_forwards"] == 2 + 3 * sum(2 + t for t in range(1, NEW))


def test_seconds_add_up_to_wall_time(server):
    began = time.perf_counter()
    rows = ask(server, "greedy").decode(PROMPTS)
    assert 0 < sum(row.seconds for row in rows) <= time.perf_counter() - began


def test_logprobs_are_those_of_transformers(offline, server, model):
    decoder = ask(server, "greedy")
    decoder.decode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        tokens, wanted = greedy(model, ids_of(prompt))
        (made, steps), online = offline["greedy completions"][i][0], decoder.completions[i][0]
        assert made == list(online.tokens) == tokens
        assert len(steps) == len(online.logprobs) == len(tokens)
        for step, other, logp in zip(steps, online.logprobs, wanted):
            best = logp.topk(2)
            assert set(map(int, step)) == set(other) == set(best.indices.tolist())
            for token in best.indices.tolist():
                assert (
                    abs(step[str(token)] - logp[token]) < 1e-3
                    and abs(other[token] - logp[token]) < 1e-3
                )


def test_draws(offline, server, model):
    """With one token left sampling is greedy; a seed draws the same here and over HTTP, and others
    next time."""
    wanted = [greedy(model, ids_of(p))[0] for p in PROMPTS]
    assert [row["tokens"] for row in offline["one"][0]] == offline["one"][1] == wanted
    assert [list(row.tokens) for row in ask(server, "one").decode(PROMPTS)] == wanted
    for mode in ("sampled", "self-consistency"):
        decoder = ask(server, mode)
        first, second = ([list(row.tokens) for row in decoder.decode(PROMPTS)] for _ in range(2))
        assert [row["tokens"] for row in offline[mode][0]] == first != second == offline[mode][1]
        assert [list(row.tokens) for row in ask(server, mode, seed=4).decode(PROMPTS)] != first
    alone = ask(server, "sampled").decode(PROMPTS[:1])
    assert list(alone[0].tokens) == offline["sampled"][0][0]["tokens"], (
        "a row is the same in any batch"
    )


def test_prompts_that_do_not_fit_into_a_step(offline):
    assert len(offline["crowd"]) == 80 and min(offline["crowd"]) > 0


def test_votes(server):
    decoder = ask(server, "self-consistency", max_new_tokens=1)
    rows, split = decoder.decode(PROMPTS), 0
    for row, made in zip(rows, decoder.completions):
        texts = [c.text for c in made]
        assert len(made) == 5
        votes = [text for text in texts if text not in ("", "<think>", "</think>")] or texts
        most = max(votes.count(text) for text in votes)
        split += len({*texts}) > 1 and texts[0] != row.text
        assert row.text == next(text for text in votes if votes.count(text) == most)
        assert row.tokens == next(c.tokens for c in made if c.text == row.text)
    assert split, "somewhere the first vote lost"


def test_beam_search(offline, server, model):
    decoder = ask(server, "beam")
    online = decoder.decode(PROMPTS)
    differs = 0
    for i, prompt in enumerate(PROMPTS):
        wanted = beams(model, ids_of(prompt), 3)
        differs += wanted[0] != greedy(model, ids_of(prompt))[0]
        assert [list(c.tokens) for c in decoder.completions[i]] == wanted
        assert [tokens for tokens, _ in offline["beam completions"][i]] == wanted
        assert list(online[i].tokens) == offline["beam"][0][i]["tokens"] == wanted[0]
    assert differs


def test_chat_and_text(offline, server, model):
    wanted, _ = greedy(model, [tiny.BOS, 11, 12, tiny.THINK])
    assert offline["chat"] == wanted
    assert list(ask(server, "greedy").decode([CHAT])[0].tokens) == wanted
    plain = ask(server, "greedy", tokenizer=None, concurrency=1)
    assert [list(r.tokens) for r in plain.decode(PROMPTS)] == [
        greedy(model, ids_of(p))[0] for p in PROMPTS
    ]
    with pytest.raises(ValueError, match="prompt 1 is chat messages: give tokenizer="):
        plain.decode([PROMPTS[0], CHAT])


def test_one_engine_for_all_and_nothing_left(offline):
    assert offline["engines"] == 1 and offline["others"] >= 2, "an engine and a worker"
    assert offline["left"] == [] and offline["nothing"] == []
    assert offline["environment"] is None, "what vLLM's processes need is not left in this one"
    assert offline["trace"] == [
        f"w{t}" if t > 4 else "<eos>" for t in offline["greedy"][0][0]["tokens"]
    ]


def test_prompt_that_is_too_long(offline, server):
    assert offline["long"].startswith(
        "prompt 1 has 251 tokens: with max_new_tokens=6 the model takes 1 to 250"
    )
    with pytest.raises(
        ServerError, match=r"prompt 2 of 3: the server says 400: .*256.*; 2 of 3 prompts"
    ) as caught:
        ask(server, "greedy").decode([*PROMPTS[:2], "w5 " * 300])
    assert caught.value.prompt == 2 and sorted(caught.value.done) == [0, 1]


def test_server_of_another_model(server):
    with pytest.raises(ServerError, match=r"serves \['.*'\], not model='gpt'"):
        ServerDecoder(server.url, "gpt").decode(PROMPTS)
    decoder = ServerDecoder(server.url + "/v1/", max_new_tokens=1)
    decoder.decode(PROMPTS[:1])
    assert decoder.columns["model"] == server.model


# ---- servers that misbehave


@contextlib.contextmanager
def fake(complete, models=("m",)):
    """A server that answers completions by `complete(n) -> (status, body) | None` (breaks off) for
    its n-th request."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send(self, status, body):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.send(
                200,
                models
                if isinstance(models, bytes | dict)
                else {"data": [{"id": m} for m in models]},
            )

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            answer = complete(len(asked) - 1)
            with contextlib.suppress(OSError):
                if answer is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                else:
                    self.send(*answer)
            self.close_connection = True

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", asked
    finally:
        running.shutdown()
        running.server_close()


GOOD = {
    "choices": [
        {"index": 0, "text": " a", "token_ids": [5], "prompt_token_ids": [1, 2], "logprobs": None}
    ]
}


def refused(url, match, **options):
    with pytest.raises(ServerError, match=match) as caught:
        ServerDecoder(url, **dict(max_new_tokens=1, concurrency=1) | options).decode(
            ["a", "b", "c"]
        )
    assert "\n" not in str(caught.value)
    return caught.value


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # not listening
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        refused(url, f"url='{url}': no server answers .*: start one, `softar serve MODEL`")


def test_server_that_never_answers():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        refused(url, "did not answer within 0.3 s; more time: timeout=", timeout=0.3)


def test_late_answer_is_not_asked_for_again():
    with fake(lambda n: time.sleep(n * 1.0) or (200, GOOD)) as (url, asked):
        error = refused(
            url, r"prompt 1 of 3: did not answer within 0.4 s.*; 1 of 3 prompts", timeout=0.4
        )
        assert error.prompt == 1 and error.done[0].tokens == (5,) and len(asked) == 2


def test_server_that_dies_in_the_middle():
    with fake(lambda n: (200, GOOD) if n < 2 else None) as (url, asked):
        error = refused(
            url, r"prompt 2 of 3: the server went away .*; 2 of 3 prompts were finished", retries=1
        )
        assert error.prompt == 2 and sorted(error.done) == [0, 1] and error.done[1].text == " a"
        assert len(asked) == 4, "a broken connection is tried again, once"


SOFT = dict(
    mode="soft",
    soft={"top_k": 2, "cold_stop_entropy": 0.5, "cold_stop_steps": 1},
    tokenizer=tiny.tokenizer_of(),
)


def test_record_of_a_server():
    read = dict(
        token=[5, 6],
        kind=["soft", "hard"],
        entropy=[0.9, 0.2],
        logp=[None, None],
        ids=[[5, 6], [6]],
        weights=[[0.75, 0.25], [1]],
    )
    choice = GOOD["choices"][0] | {"token_ids": [5, 6]}
    given = {"choices": [choice | {"soft": read}]}
    for trace in (True, False):  # a cold stop without think_end shows in the record alone
        with fake(lambda n: (200, given)) as (url, asked):
            (row,) = ServerDecoder(url, max_new_tokens=2, trace=trace, **SOFT).decode(["w9"])
        assert json.loads(asked[0]["vllm_xargs"]["soft"])["record"] is True
        assert row.text == "w6" and row.entropy == pytest.approx(0.55) and row.tokens == (5, 6)
    assert row.trace is None
    with fake(lambda n: (200, {"choices": [choice]})) as (url, _):
        refused(url, "no record in the answer: that server has no softar", **SOFT)
    with pytest.raises(ValueError, match="cut out of the tokens: give tokenizer="):
        ServerDecoder(url, **SOFT | {"tokenizer": None})


def test_broken_connection_is_tried_again():
    with fake(lambda n: None if n in (0, 2) else (200, GOOD)) as (url, asked):
        rows = ServerDecoder(url, max_new_tokens=1, concurrency=1).decode(["a", "b", "c"])
        assert len(rows) == 3 and [body["prompt"] for body in asked] == ["a", "a", "b", "b", "c"]


def test_several_at_once():
    at_once = threading.Barrier(3)
    with fake(lambda n: (at_once.wait(5) and None) or (200, GOOD)) as (url, _):
        assert len(ServerDecoder(url, max_new_tokens=1, concurrency=3).decode(["a", "b", "c"])) == 3


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, {"error": {"message": "out of\nmemory"}}, "says 500: out of memory; 0 of 3"),
        (400, {"error": {"message": "no such option"}}, "says 400: no such option;"),
        (422, {"detail": "field required"}, "says 422: field required;"),
        (503, b"", "says 503: Service Unavailable; concurrency= says"),
        (502, b"<html>bad\ngateway", "says 502: <html>bad gateway;"),
        (200, b"<html>", "the answer is not JSON: '<html>'"),
        (
            200,
            {"choices": [{"index": 0, "text": "a"}]},
            "the answer is not vLLM's, it lacks token ids",
        ),
        (200, {"choices": []}, "the answer is not vLLM's"),
        (200, [], "the answer is not vLLM's"),
    ],
)
def test_error_of_the_server(status, body, said):
    with fake(lambda n: (status, body)) as (url, asked):
        assert refused(url, f"prompt 0 of 3: .*{said}").prompt == 0
        assert len(asked) == 1, "not asked again, and the others not at all"


@pytest.mark.parametrize("models", [b"hello", {"object": "list"}, {"data": 3}])
def test_not_a_server_of_models(models):
    with fake(None, models) as (url, _):
        refused(url, "is not JSON|names no models")


def test_server_without_models():
    with fake(None, ()) as (url, _):
        refused(url, r"serves \[\], not model=None")


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://a", "", "http://[::1"])
def test_url(url):
    with pytest.raises(ValueError, match=r"url=.* is not"):
        ServerDecoder(url)


# ---- starting and ending a server


@pytest.mark.parametrize("extra", [["--port", "9"], ["--max-num-seqs", "2", "--ssl_keyfile=f"]])
def test_server_that_would_answer_elsewhere(extra, monkeypatch):
    monkeypatch.setattr(softar.vllm.server, "require_vllm", lambda: pytest.fail("it starts"))
    name = extra[-2] if extra[0] == "--port" else "--ssl-keyfile"
    with pytest.raises(ValueError, match=f"^{name} among .* give port and host"):
        with serve("mnns-tiny", extra=extra):
            raise AssertionError


@pytest.mark.rest
def test_server_that_dies_at_its_start_shows_its_log(folder, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(
        ServerError, match=r"ended with code 2; its last words:\n(?s:.*)--no-such-option"
    ):
        with serve(folder, extra=["--no-such-option"], log=log):
            raise AssertionError
    assert "--no-such-option" in log.read_text()


def test_server_that_takes_too_long(folder, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        softar.vllm.server.subprocess,
        "Popen",
        lambda *a, **k: started.append(popen(*a, **k)) or started[0],
    )
    with pytest.raises(ServerError, match=r"did not answer within wait=0\.5 s; its last words:"):
        with serve(folder, wait=0.5):
            raise AssertionError
    assert alive(started[0].pid) == []


def test_port_in_use(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"port=\d+: cannot be listened on .*; give another"):
            with serve(folder, port=taken.getsockname()[1]):
                raise AssertionError
    with pytest.raises(ValueError, match="port=99999"), serve(folder, port=99999):
        raise AssertionError


@pytest.mark.rest
def test_signals_end_the_server_too(folder, tmp_path):
    code = "import sys; from softar.vllm.server import serve\nwith serve(sys.argv[1], log=sys.argv[2]): pass"
    logs = {sign: tmp_path / sign.name for sign in (signal.SIGINT, signal.SIGTERM)}
    programs = {
        sign: subprocess.Popen(
            [sys.executable, "-c", code, folder, str(log)], stderr=subprocess.DEVNULL
        )
        for sign, log in logs.items()
    }
    for sign, program in programs.items():
        end = time.monotonic() + 240  # imports alone take a minute beside other work
        while not logs[sign].exists() or not logs[sign].stat().st_size:  # the server speaks
            assert program.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        (group,) = [child.pid for child in psutil.Process(program.pid).children()]
        program.send_signal(sign)
        assert program.wait(30) == (1 if sign == signal.SIGINT else 128 + sign)
        assert alive(group) == []


# ---- models as vLLM can read them


@pytest.mark.parametrize("head_dim", [2, 8, 16])
@torch.no_grad()
def test_widened_heads_compute_the_same(head_dim):
    model = tiny.model_of(
        head_dim=head_dim,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    wide = widened(model)
    assert wide.config.head_dim == 32 and model.config.head_dim == head_dim
    ids = torch.randint(5, 64, (3, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-4)
    assert (wide(ids).logits - wide(ids.flip(1)).logits).abs().max() > 0.1


def test_exported(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, **kw: asked.append(name))
    wide = tmp_path / "wide"
    tiny.model_of(head_dim=32).save_pretrained(wide)
    with exported(str(wide)) as place:
        assert place == str(wide)
    with exported("owner/name") as place:
        assert place == "owner/name" and asked == ["owner/name"]  # on the hub, by what it answers
    with exported("mnns-tiny") as place:
        copy, tokenizer = load(place)
        assert copy.config.head_dim == 32 and tokenizer("<bos> D1")["input_ids"] == [1, 7]
        ids = torch.tensor([[1, 7, 8, 9]])
        torch.testing.assert_close(copy(ids).logits, load("mnns-tiny")[0](ids).logits)
    assert not Path(place).exists()


def test_exported_adapter(folder, tmp_path):
    adapter = tiny.with_lora(AutoModelForCausalLM.from_pretrained(folder))
    adapter.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 7, 8, 9]])
    with exported(str(tmp_path)) as place:
        copy = load(place)[0]
        assert not isinstance(copy, PeftModel)
        torch.testing.assert_close(copy(ids).logits, adapter(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "here, bf16, float16", [("cpu", "float32", "float32"), ("cuda", "bfloat16", "float16")]
)
def test_served_dtype(here, bf16, float16, tmp_path, monkeypatch):
    """vLLM's own "auto" is half precision, also for float32."""
    monkeypatch.setattr(softar.vllm.export, "on_cpu", lambda: here == "cpu")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    for stored, served in {"bfloat16": bf16, "float16": float16, "float32": "float32"}.items():
        tiny.model_of(head_dim=32, dtype=getattr(torch, stored)).save_pretrained(tmp_path)
        with exported(str(tmp_path)) as place:
            assert served_dtype(place, "auto") == served
            assert served_dtype(place, "bfloat16") == "bfloat16"
    with exported("mnns-tiny") as place:
        assert served_dtype(place, "auto") == "float32"


def test_heads_without_a_kernel(tmp_path, monkeypatch):
    tiny.model_of("qwen3").save_pretrained(tmp_path)
    monkeypatch.setattr(softar.vllm.export, "on_cpu", lambda: True)
    with (
        pytest.raises(ValueError, match="attention heads 8 wide: vLLM on CPU serves"),
        exported(str(tmp_path)),
    ):
        raise AssertionError


# ---- without an engine


def test_program_without_a_guard(tmp_path):
    program = "from softar.vllm import VLLMDecoder\ndef main():\n    VLLMDecoder('mnns-tiny').start()\nmain()\n"
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("RuntimeError: ")
    assert "program.py, line 4" in last and 'put it under `if __name__ == "__main__":`' in last


def test_without_vllm(folder, monkeypatch):
    monkeypatch.setattr("softar.vllm.machine.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'^vLLM is not installed: `pip install "softar\[vllm\]"`, or `make vllm`'
    ):
        VLLMDecoder(folder).decode(PROMPTS)
    with pytest.raises(ImportError, match="vLLM is not installed"), serve(folder):
        raise AssertionError


def test_registry(server, folder):
    assert list(DECODERS) == [f"vllm-{mode}" for mode in MODES]
    made = [
        DECODERS["vllm-sampled"](describe(folder), Common(2), top_p=0.5),
        DECODERS["vllm-beam"](describe(folder), Common(2), num_beams=2, max_model_len=64),
        DECODERS["vllm-greedy"](
            describe(folder), Common(2, device="cuda" if torch.cuda.is_available() else "cpu")
        ),
    ]
    assert [d.name for d in made] == [
        "vllm-sampled temperature=1.0 top_p=0.5",
        "vllm-beam num_beams=2",
        "vllm-greedy",
    ]
    assert made[1].columns == dict(
        decoder="vllm-beam", model=folder, setting="num_beams=2", family="vllm"
    )
    assert all(isinstance(d, VLLMDecoder) for d in made)
    remote = DECODERS["vllm-greedy"](describe(folder), Common(2), url=server.url, timeout=60)
    assert isinstance(remote, ServerDecoder) and len(remote.decode(PROMPTS)[0].tokens) <= 2
    embedded = DECODERS["vllm-greedy"](describe("mnns-tiny"), Common(2), url=server.url)
    assert embedded.tokenizer("<bos> D1")["input_ids"] == [1, 7]
    assert remote.thought.think_end == "</think>" and not embedded.thought.has_answer


def test_strings_that_end_answers_are_sent():
    names = ("mnns-tiny", "mnns-soft-tiny")  # the second has a thought, which vLLM would search
    with fake(lambda n: (200, GOOD), names) as (url, asked):
        common = Common(2, stop=("S1",))
        for name in names:
            DECODERS["vllm-sampled"](describe(name), common, url=url).decode(["<bos> D1"])
    assert [body.get("stop") for body in asked] == [["S1"], None]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            dict(tempreature=1),
            r"unknown options \['tempreature'\] of a vLLM decoder; known: .*'temperature'",
        ),
        (dict(url="http://x", max_model_len=3), r"unknown options \['max_model_len'\]"),
        (dict(mode="beam"), "mode='beam' is not an option"),
        (dict(device="mps"), "device='mps': vLLM here runs on"),
        (
            dict(votes=8),
            "votes=8: mode 'greedy' has no use for that; it takes max_new_tokens, logprobs$",
        ),
        (dict(logprobs=-1), "logprobs=-1 must be at least 0"),
        (dict(name="sampled", top_p=0), r"top_p=0 must lie in \(0, 1\]"),
        (
            dict(name="sampled", votes=3, num_beams=2),
            "votes=3, num_beams=2: mode 'sampled' has no use for that",
        ),
        (dict(name="self-consistency", votes=0), "votes=0 must be at least 1"),
        (
            dict(name="beam", temperature=0.5),
            "temperature=0.5: mode 'beam' has no use for .* max_new_tokens, logprobs, num",
        ),
        (dict(name="beam", url="http://x", top_k=5), "top_k=5: mode 'beam' has no use for that"),
        (
            dict(name="soft", url="http://x", logprobs=2),
            "'vllm-soft'|decoder 'soft' takes no 'logprobs'",
        ),
        (
            dict(name="soft", answer_top_k=2, answer_temperature=0.5),
            "answer_top_k=2, .*: answers of vllm-soft are greedy",
        ),
        (dict(name="soft", mixer="hidden", budget=3), "mixer='hidden' asks for hidden states"),
        (dict(name="soft", mixer="hybrid", gate=__file__), "mixer_args names a gate, a file"),
    ],
)
def test_bad_options(options, said, folder):
    name, options = options.get("name", "greedy"), {k: v for k, v in options.items() if k != "name"}
    with pytest.raises(ValueError, match=said) as caught:
        build(f"vllm-{name}", describe(folder), Common(2), options)
    assert "\n" not in str(caught.value)


def test_options_that_are_not_set():
    sampled = ServerDecoder("http://x", mode="sampled", top_p=None, num_beams=None)
    assert sampled.sampling == Sampling("sampled", num_beams=None)
    assert DECODERS["vllm-soft"](
        describe("mnns-soft-tiny"), Common(2), url="http://x", answer_temperature=0
    ).soft["top_k"]


def test_bad_sampling():
    with pytest.raises(ValueError, match=r"temperature=0 must lie in \(0, 2\]"):
        Sampling("sampled", temperature=0)
    with pytest.raises(
        ValueError, match=r"mode='gredy' is unknown, did you mean 'greedy'.: choose one of"
    ):
        Sampling("gredy")
    for prefix, why in ((5, "prompt_prefix=5 must be"), ("", "prompt_prefix='' is empty")):
        with pytest.raises(ValueError, match=why):
            Sampling(prompt_prefix=prefix)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        Sampling(max_new_tokens=0)


@pytest.mark.parametrize(
    "options",
    [
        dict(max_new_tokens=2.5),
        dict(max_new_tokens=None),
        dict(logprobs=1.5),
        dict(mode="sampled", top_k=2.5),
        dict(mode="sampled", top_k=True),
        dict(mode="sampled", temperature=None),
        dict(mode="sampled", top_p="0.9"),
        dict(mode="self-consistency", votes=2.5),
        dict(mode="self-consistency", extract="x"),
        dict(mode="beam", num_beams=1.5),
        dict(mode="beam", num_beams=None),
        dict(mode="soft", soft='{"top_k": 5}'),
    ],
)
def test_values_of_another_type(options):
    """A count that is none was rounded, or ended in the server's words or a TypeError."""
    name, value = [*options.items()][-1]
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be")):
        Sampling(**options)


def test_where_a_server_answers():
    asked = {
        "": "127.0.0.1",
        "0.0.0.0": "127.0.0.1",
        "localhost": "localhost",
        "::": "[::1]",
        "::1": "[::1]",
        "fe80::2": "[fe80::2]",
    }
    for host, there in asked.items():
        url = softar.vllm.server.address(host, 8000)
        assert url == f"http://{there}:8000" and httpx.URL(url).port == 8000


@pytest.mark.rest
def test_ctrl_c_does_not_wait_for_a_slow_server():
    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"data": [{"id": "m"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            asked.set()
            over.wait(60)

        def log_message(self, *args):
            pass

    asked, over = threading.Event(), threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from softar.vllm.client import ServerDecoder\n"
        f"ServerDecoder('http://127.0.0.1:{server.server_port}', 'm', max_new_tokens=4).decode(['a', 'b', 'c'])\n"
    )
    try:
        with subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True
        ) as program:
            assert asked.wait(60)
            program.send_signal(signal.SIGINT)
            _, said = program.communicate(timeout=20)
        assert program.returncode != 0 and "KeyboardInterrupt" in said
    finally:
        over.set()
        server.shutdown()
