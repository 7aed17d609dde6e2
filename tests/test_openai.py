"""Decoders that ask an OpenAI-compatible server: what is sent, what is read, and what is said when
it fails. The server is a stand-in in this process."""

import contextlib
import http.server
import io
import json
import socket
import sys
import threading
import time

import pytest

from softar import compare, make_decoder
from softar.cli import app as cli
from softar.decoders.link import ServerError
from softar.decoders.openai import OpenAIDecoder, Request
from softar.evals.sweep import read_grid, sweep
from softar.evals.sweep_summary import aggregate, plot_sweep, sweep_table

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def chat(text, usage=USAGE):
    message = {"role": "assistant", "content": text}
    return 200, {"choices": [{"index": 0, "message": message}], "usage": usage}


@contextlib.contextmanager
def fake(answer, models=("m",)):
    """Serves `answer(n, path, body)`, (status, JSON or bytes, headers), to the n-th request ->
    its address, and what was asked: (path, body, headers)."""
    asked, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send(self, status, body, headers=()):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def do_GET(self):
            asked.append((self.path, None, dict(self.headers)))
            self.send(200, {"data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append((self.path, body, dict(self.headers)))
                n = sum(body is not None for _, body, _ in asked) - 1
            self.send(*answer(n, self.path, body))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def echo(n, path, body):
    """The prompt again."""
    if path.endswith("/chat/completions"):
        return chat(body["messages"][-1]["content"])
    return 200, {"choices": [{"index": 0, "text": body["prompt"]}], "usage": USAGE}


def decoder_of(url, model="m", **options):
    text = "".join(f",{key}={json.dumps(value)}" for key, value in options.items())
    return make_decoder(f"{model}=openai:url={url}{text}", max_new_tokens=7)


@pytest.fixture
def softar(capsys, monkeypatch):
    def run(*argv):
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in argv])
        return left.value.code, *capsys.readouterr()

    return run


# -- what is sent


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_answers_come_in_the_order_of_the_prompts(api):
    """Whatever order the server takes them in."""

    def slow(n, path, body):
        time.sleep(0.03 if n == 0 else 0)
        return echo(n, path, body)

    with fake(slow) as (url, asked):
        rows = decoder_of(url, api=api).decode([f"w{i}" for i in range(9)])
    assert [row.text for row in rows] == [f"w{i}" for i in range(9)] and len(asked) == 9
    assert all((row.tokens, row.num_tokens) == (None, 3) for row in rows)
    assert all(row.num_forwards is row.token_forwards is row.entropy is None for row in rows)
    assert {path for path, *_ in asked} == {
        "/v1/chat/completions" if api == "chat" else "/v1/completions"
    }


def test_what_a_request_holds(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    options = dict(temperature=0.5, top_p=0.9, stop=["\n", "Q:"], key_env="MY_KEY")
    options |= dict(extra={"max_tokens": None, "max_completion_tokens": 9, "top_k": 5})
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    with fake(echo) as (url, asked):
        decoder_of(url, **options).decode([messages])
        decoder_of(url).decode(["q"])
    (_, body, headers), (_, plain, bare) = asked
    seed = body.pop("seed")
    assert isinstance(seed, int) and headers["Authorization"] == "Bearer secret"
    assert body == dict(
        model="m",
        messages=messages,
        temperature=0.5,
        top_p=0.9,
        stop=["\n", "Q:"],
        max_completion_tokens=9,
        top_k=5,
    )
    user = [{"role": "user", "content": "q"}]
    assert plain == dict(model="m", messages=user, max_tokens=7, temperature=0.0)
    assert "Authorization" not in bare, "no key goes anywhere unasked"


def test_a_chat_says_what_its_template_hears():
    messages, tools = [{"role": "user", "content": "q"}], [{"type": "function"}]
    rows = [
        {"prompt": messages, "answer": "a"}
        | {"tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": messages, "answer": "a", "tools": None, "chat_template_kwargs": None},
        {"prompt": "text", "answer": "a", "tools": tools},
    ]
    with fake(echo) as (url, asked):
        compare([decoder_of(url, concurrency=1)], rows, lambda *_: 1.0, warmup=0)
    told = [
        {name: body.get(name) for name in ("tools", "chat_template_kwargs")} for _, body, _ in asked
    ]
    assert told == [
        dict(tools=tools, chat_template_kwargs={"enable_thinking": False}),
        *[dict(tools=None, chat_template_kwargs=None)] * 2,
    ]


def test_draws_are_seeded():
    with fake(echo) as (url, asked):
        for seed in (0, 0, 1):
            spec = f"m=openai:url={url},temperature=1.0,concurrency=1"
            make_decoder(spec, max_new_tokens=4, seed=seed).decode(["a", "b"])
    seeds = [body["seed"] for _, body, _ in asked]
    assert seeds[:2] == seeds[2:4] != seeds[4:] and len({*seeds}) == 4


@pytest.mark.parametrize(
    ("tail", "path"),
    [("", "/v1/"), ("/", "/v1/"), ("/v1", "/v1/"), ("/v1/", "/v1/"), ("/beta/api", "/beta/api/")],
)
def test_a_path_of_its_own(tail, path):
    with fake(echo) as (url, asked):
        decoder_of(url + tail).decode(["q"])
    assert asked[0][0] == f"{path}chat/completions"


def test_the_first_model_where_none_is_named():
    with fake(echo, models=("one", "two")) as (url, asked):
        decoder = make_decoder(f"openai:url={url}", max_new_tokens=4)
        decoder.decode(["a"])
        decoder.decode(["b"])
    assert [path for path, *_ in asked] == ["/v1/models", *["/v1/chat/completions"] * 2]
    assert asked[1][1]["model"] == decoder.columns["model"] == "one"
    assert decoder.name == f"openai url={url}"


# -- what is read


@pytest.mark.parametrize(("text", "usage", "count"), [(None, None, None), ("", USAGE, 3)])
def test_no_answer_and_no_usage(text, usage, count):
    with fake(lambda *_: chat(text, usage)) as (url, _):
        (row,) = decoder_of(url).decode(["q"])
    assert (row.text, row.num_tokens) == ("", count)
    assert decoder_of(url).decode([]) == []


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, {"error": {"message": "no\nkey"}}, "says 401: no key; key_env=NAME sends the key"),
        (404, {"error": {"message": "no model m"}}, "says 404: no model m; it serves ['m']"),
        (400, {"error": "too long"}, "says 400: "),
        (500, b"<html>", "says 500: <html>"),
        (200, b"<html>", "the answer is not JSON"),
        (200, {"choices": []}, "not OpenAI's, it lacks a text"),
        (200, {"choices": [{"text": "a"}]}, "not OpenAI's, it lacks a text"),
        (200, {"choices": [{"message": {"content": [1]}}]}, "the answer is not OpenAI's: [1]"),
        (200, [], "not OpenAI's, it lacks a text"),
        (302, b"", "says 302"),
    ],
)
def test_errors_are_one_line(status, body, says):
    """They name the server, the model and the prompt; what was done until then is kept."""
    with fake(lambda n, *_: chat("fine") if n == 0 else (status, body)) as (url, asked):
        with pytest.raises(ServerError) as caught:
            decoder_of(url, concurrency=1).decode(["a", "b", "c"])
    said = str(caught.value)
    assert f"url='{url}', model='m', prompt 1 of 3: " in said and says in said and "\n" not in said
    assert said.endswith("; 1 of 3 prompts were finished")
    assert caught.value.done[0].text == "fine" and caught.value.prompt == 1
    assert sum(body is not None for _, body, _ in asked) == 2, "nothing more is asked"


def test_a_busy_server_is_asked_again():
    busy = (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
    with fake(lambda n, *_: busy if n < 2 else chat("yes")) as (url, asked):
        (row,) = decoder_of(url).decode(["q"])
        assert row.text == "yes" and len(asked) == 3
        with fake(lambda *_: busy) as (other, again):
            with pytest.raises(ServerError, match="says 429: slow down"):
                decoder_of(other, retries=0).decode(["q"])
        assert len(again) == 1


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        for model in ("m=", ""):
            decoder = make_decoder(f"{model}openai:url={url},retries=0", max_new_tokens=4)
            with pytest.raises(ServerError, match=r"no server answers .*: is one running there\?"):
                decoder.decode(["q"])


def test_a_late_answer():
    with fake(lambda *_: time.sleep(0.5) or chat("late")) as (url, _):
        with pytest.raises(ServerError, match=r"did not answer within 0\.1 s; more time: timeout="):
            decoder_of(url, timeout=0.1).decode(["q"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "needs the server: openai:url="),
        ({"url": "localhost:8000"}, "is not the URL of a server"),
        ({"api": "chats"}, "api='chats' is unknown"),
        ({"temperature": -1}, "temperature=-1 must be at least 0"),
        ({"top_p": 0}, "top_p=0 must lie in"),
        ({"concurrency": 0}, "concurrency=0 must be"),
        ({"tempreature": 1}, "takes no 'tempreature', did you mean 'temperature'"),
        ({"key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not in the environment"),
        ({"api_key": "secret"}, "takes no 'api_key'"),
        ({"extra": [1]}, "extra=(1,) must be an object"),
    ],
)
def test_bad_options(options, says, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    options = options and {"url": "http://127.0.0.1:1"} | options
    spec = "m=openai" + ":" * bool(options)
    spec += ",".join(f"{k}={json.dumps(v)}" for k, v in options.items())
    with pytest.raises(ValueError) as caught:
        make_decoder(spec, max_new_tokens=4)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_it_cannot_do():
    with pytest.raises(ValueError, match="has no trace"):
        make_decoder("m=openai:url=http://127.0.0.1:1", max_new_tokens=4, trace=True)
    with pytest.raises(ValueError, match="takes text, and a prompt is chat messages"):
        Request(api="completions").body("m", [{"role": "user", "content": "q"}], 0)


# -- beside softar's own


def test_a_row_beside_others(tmp_path):
    """Its forwards are not known: no cell, no point, and it fits no budget of forwards."""
    rows = [{"prompt": "<bos> D1 D2 D3 D4 ->", "answer": "x"}] * 2
    with fake(echo) as (url, _):
        decoders = [make_decoder("mnns-discrete-tiny=discrete", max_new_tokens=2), decoder_of(url)]
        told = compare(decoders, rows, lambda text, row: float("D1" in text), warmup=0)
    ours, theirs = told.rows
    assert theirs["accuracy"] == 1.0 and theirs["family"] == "openai" and theirs["tokens_per_s"] > 0
    assert theirs["nfe"] is theirs["tpf"] is theirs["token_forwards"] is theirs["aup"] is None
    assert "openai" in str(told) and told.plot(tmp_path / "a.png").is_file()
    told.save(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["num_forwards"] for line in lines[2:]] == [None, None]
    cheap = told.matched("nfe", 100)
    assert [row["name"] for row in cheap.rows] == [ours["name"]]
    assert cheap.left_out == ["m=openai"]


def test_a_sweep(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "a"}\n')
    with fake(echo) as (url, asked):
        grid = dict(tasks=[str(tmp_path / "rows.jsonl")], soft=[f"openai:url={url}"])
        grid |= dict(vary={"temperature": [0.5, 1.0]}, max_new_tokens=4)
        points = aggregate(sweep(read_grid(grid), tmp_path / "out"))
    assert [p["accuracy"] for p in points] == [1.0, 1.0] and points[0]["nfe"] is None
    assert {body["temperature"] for _, body, _ in asked if body} == {0.5, 1.0}
    assert sweep_table(points).row_count == 2 and plot_sweep(tmp_path / "out").is_file()


def test_the_command(softar, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "a"}\n')
    with fake(echo) as (url, asked):
        code, out, err = softar("generate", "Hi", "-d", f"openai:url={url}")
        assert (code, out) == (0, "Hi\n") and "m, openai" in err and "3 tokens, 0" in err
        code, out, _ = softar(
            "generate", "Hi", "-d", f"openai:url={url}", "--system", "Be brief.", "--json"
        )
        told = json.loads(out)
        assert told["text"] == "Hi" and told["tokens"] is told["num_forwards"] is None
        assert asked[-1][1]["messages"][0] == {"role": "system", "content": "Be brief."}
        code, out, _ = softar(
            "generate", "Hi", "-d", f"openai:url={url},api=completions", "--no-chat"
        )
        assert out == "Hi\n" and asked[-1][1]["prompt"] == "Hi"
        code, _, err = softar(
            "generate", "Hi", "-d", f"openai:url={url},api=completions", "--system", "x"
        )
        assert code == 2 and "--system: the prompt is no chat here" in err
        code, out, _ = softar(
            "compare", "-t", tmp_path / "rows.jsonl", "-d", f"openai:url={url}", "--json"
        )
        assert code == 0 and json.loads(out)["rows"][0]["accuracy"] == 1.0
        assert asked[-1][1]["messages"] == [{"role": "user", "content": "a"}]
    code, _, err = softar("fill", "Hi _", "-d", "openai:url=http://127.0.0.1:1")
    assert code == 2 and "fills no holes" in err


def test_a_decoder_of_ones_own_by_the_command(softar):
    """It has no tokenizer here either."""
    spec = "test_names:parrot"
    code, out, _ = softar("generate", "Hi", "-d", spec, "--max-new-tokens", 4)
    assert (code, out) == (0, "S0\n")
    code, _, err = softar("trace", "Hi", "-d", spec, "--max-new-tokens", 4)
    assert code == 2 and "keeps no trace" in err
    code, _, err = softar("generate", "Hi", "-d", spec, "--chat")
    assert code == 2 and "no chat template" in err


def test_in_python():
    with fake(echo) as (url, _):
        (row,) = OpenAIDecoder(url).decode(["Hi"])
    assert row.text == "Hi"
