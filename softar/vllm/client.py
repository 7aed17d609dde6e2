"""Decoding over HTTP: a decoder that asks a running `vllm serve`, for the discrete baselines or
softly."""

import contextlib
import json
import os
import time
from collections import deque
from dataclasses import dataclass, fields
from threading import Thread
from typing import Any

import httpx

from ..checks import shorten
from ..decoders.answer import Decoded
from .completions import Completion, CompletionDecoder, Sampling, split_options, token_ids
from .machine import KEY
from .record import FIELD, from_json, to_record
from .server import ServerError

HERE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Connection:
    """How a server is asked."""

    timeout: float = 300  # seconds without a sign from the server
    connect: float = 5  # seconds until it must accept a connection
    # of connections that fail or break; an answer that is late or an error is not asked for again
    retries: int = 2
    concurrency: int = 16  # prompts at a time
    # sent as a bearer token; "env" is VLLM_API_KEY of the environment, and None the same for a
    # server on this machine, but nothing for one elsewhere
    api_key: str | None = None

    def __post_init__(self):
        for name, least in (("concurrency", 1), ("retries", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
        for name in ("timeout", "connect"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}={value!r} must be a number of seconds, more than 0")

    def client(self, url: str) -> httpx.Client:
        """Raises ValueError for what is not the address of a server."""
        example = "give e.g. 'http://127.0.0.1:8000'"
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"url={url!r} is not a URL ({error}): {example}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"url={url!r} is not the URL of a server: {example}")
        key, is_here = self.api_key, address.host in HERE
        if key == "env" and not os.environ.get(KEY):
            raise ValueError(f"api_key='env': {KEY} is not in the environment, set it")
        if key == "env" or (key is None and is_here):
            key = os.environ.get(KEY)
        return httpx.Client(
            base_url=address,
            timeout=httpx.Timeout(self.timeout, connect=self.connect, pool=None),
            limits=httpx.Limits(max_connections=self.concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # no proxy leads to this machine
            trust_env=not is_here,
        )


CONNECTION = tuple(field.name for field in fields(Connection))


class ServerDecoder(CompletionDecoder):
    """Asks a running vLLM server over HTTP, several prompts at a time.

    Args:
        url: e.g. "http://127.0.0.1:8000". model: the name it has to serve; None takes the first
            that it names.
        tokenizer: turns prompts into ids and ids into text here, as other decoders do; needed for
            chat messages. None sends text as it is, and takes the server's.
        options: fields of Connection and of Sampling, by name.

    Raises (start and decode): ServerError.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        tokenizer=None,
        seed: int = 0,
        trace: bool = False,
        name: str | None = None,
        columns: dict | None = None,
        **options,
    ):
        sampling, connection = split_options(options, CONNECTION)
        self.connection = Connection(**connection)
        self.url, self.wanted = url.rstrip("/").removesuffix("/v1"), model
        super().__init__(
            model or self.url,
            Sampling(**sampling),
            seed=seed,
            trace=trace,
            name=name,
            columns=columns,
        )
        self.tokenizer = tokenizer
        thinking = self.sampling.thinking
        if tokenizer is None and thinking is not None and thinking.has_answer:
            raise ValueError(
                "soft: the answer behind a thought is cut out of the tokens: give tokenizer="
            )
        self.client = self.connection.client(self.url)
        self._ready = False

    def start(self) -> None:
        """Ask the server what it serves."""
        if self._ready:
            return
        answer = self._ask("GET", "/v1/models", f"url={self.url!r}", retries=0)
        try:
            served = [model["id"] for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ServerError(
                f"url={self.url!r} answers, but names no models: it is not an OpenAI-compatible one"
            ) from error
        if not served or self.wanted not in (None, *served):
            raise ServerError(f"url={self.url!r} serves {served}, not model={self.wanted!r}")
        self.model = self.columns["model"] = self.wanted or served[0]
        self._ready = True

    def close(self) -> None:
        self.client.close()

    def decode(self, prompts: list) -> list[Decoded]:
        """Raises ServerError that names the prompt and carries in `done` what the others gave until
        then."""
        self.start()
        began = time.perf_counter()
        bodies = [
            self._body(i, p, seed)
            for i, (p, seed) in enumerate(zip(prompts, self.seeds(len(prompts))))
        ]
        failed: list[Exception] = []
        answers: dict[int, tuple[list[int], list[Completion]]] = {}
        waiting = deque(range(len(bodies)))

        def ask() -> None:
            while waiting and not failed:  # nothing more is asked of a server that has failed
                with contextlib.suppress(IndexError):  # another thread took the last one
                    i = waiting.popleft()
                    try:
                        answers[i] = self._complete(i, len(bodies), bodies[i])
                    except Exception as error:
                        failed.append(error)

        # Daemons: after Ctrl-C nothing waits for answers that may take minutes
        count = min(self.connection.concurrency, len(bodies))
        threads = [Thread(target=ask, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            waiting.clear()
        answers = dict(sorted(answers.items()))
        share = (time.perf_counter() - began) / max(len(answers), 1)
        ids, self.completions = [list(column) for column in zip(*answers.values())] or ([], [])
        rows = self.rows([prompts[i] for i in answers], ids, self.completions, share)
        done = dict(zip(answers, rows))
        if failed and isinstance(failed[0], ServerError):
            message = f"{failed[0]}; {len(done)} of {len(prompts)} prompts were finished"
            raise ServerError(message, failed[0].prompt, done) from failed[0]
        if failed:
            raise failed[0]
        return list(done.values())

    def _body(self, i: int, prompt, seed: int) -> dict:
        s = self.sampling
        if self.tokenizer is None and not isinstance(prompt, str):
            raise ValueError(
                f"prompt {i} is chat messages: give tokenizer=, whose chat template makes them a text"
            )
        body = {
            "model": self.model,
            "prompt": prompt if self.tokenizer is None else token_ids(self.tokenizer, prompt),
            "max_tokens": s.max_new_tokens,
            "n": s.count,
            "logprobs": s.logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            # What is not said here the server takes from the model's generation_config.json
            **s.choice,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        if s.draws or s.soft is not None:
            body["seed"] = seed
        if s.soft is not None:
            body["vllm_xargs"] = {"soft": json.dumps(self.soft)}
        if s.mode == "beam":
            body |= {"use_beam_search": True, "include_stop_str_in_output": True}
        return body

    def _complete(self, i: int, n: int, body: dict) -> tuple[list[int], list[Completion]]:
        """The prompt's token ids, and its completions."""
        what = f"url={self.url!r}, prompt {i} of {n}"
        try:
            retries = self.connection.retries
            choices = self._ask("POST", "/v1/completions", what, retries, body)["choices"]
            ordered = sorted(choices, key=lambda choice: choice["index"])
            completions = [self._completion(choice) for choice in ordered]
            return list(choices[0]["prompt_token_ids"]), completions
        except ServerError as error:
            raise ServerError(str(error), i) from error
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ServerError(
                f"{what}: the answer is not vLLM's, it lacks token ids ({error!r})", i
            ) from error

    def _completion(self, choice: dict) -> Completion:
        tokens, logprobs = tuple(choice["token_ids"]), choice["logprobs"]
        steps = logprobs and tuple(
            {int(token.removeprefix("token_id:")): p for token, p in step.items()}
            for step in logprobs["top_logprobs"]
        )
        text = choice["text"]
        if self.tokenizer:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        record = None
        if self.sampling.soft is not None and self.soft["record"]:
            if FIELD not in choice:
                raise ServerError(
                    f"url={self.url!r}: no record in the answer: that server has no softar, or another one"
                )
            record = to_record(from_json(choice[FIELD]))
        return Completion(text, tokens, steps, record)

    def _ask(
        self, method: str, path: str, what: str, retries: int, body: dict | None = None
    ) -> Any:
        """The answer as JSON. Raises ServerError that begins with `what`."""
        for attempt in range(retries + 1):
            try:
                answer = self.client.request(method, path, json=body)
                break
            except httpx.TimeoutException as error:
                action, limit = "answer", self.connection.timeout
                if isinstance(error, httpx.ConnectTimeout):
                    action, limit = "accept a connection", self.connection.connect
                raise ServerError(
                    f"{what}: did not {action} within {limit:g} s; more time: timeout="
                ) from error
            except httpx.TransportError as error:
                if attempt < retries:
                    time.sleep(0.25 * 2**attempt)
                    continue
                if self._ready:
                    raise ServerError(f"{what}: the server went away ({error})") from error
                raise ServerError(
                    f"{what}: no server answers ({error}): start one, `softar serve MODEL`"
                ) from error
        if answer.status_code >= 400:
            hint = f"; {KEY} goes to it with api_key=env" if answer.status_code == 401 else ""
            raise ServerError(
                f"{what}: the server says {answer.status_code}: {_message(answer)}{hint}"
            )
        try:
            return answer.json()
        except ValueError as error:
            raise ServerError(
                f"{what}: the answer is not JSON: {shorten(answer.text, 200)!r}"
            ) from error


def _message(answer: httpx.Response) -> str:
    """What an error's answer says: OpenAI's form, FastAPI's, or the text."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        body = answer.json()
        return " ".join(
            str(body["error"]["message"] if "error" in body else body["detail"]).split()
        )
    return shorten(answer.text) or answer.reason_phrase
