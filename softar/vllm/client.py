"""Decoding over HTTP: a decoder that asks a running `vllm serve`, for the discrete baselines or
softly."""

import contextlib
import json
import time
from collections import deque
from threading import Thread
from typing import Any

import httpx

from ..decoders.answer import Decoded
from .completions import Completion, CompletionDecoder, Sampling, split_options, token_ids
from .record import FIELD, from_json, to_record
from .server import ServerError


class ServerDecoder(CompletionDecoder):
    """Asks a running vLLM server over HTTP, several prompts at a time.

    Args:
        url: e.g. "http://127.0.0.1:8000". model: the name it has to serve; None takes the first
            that it names.
        tokenizer: turns prompts into ids and ids into text here, as other decoders do; needed for
            chat messages. None sends text as it is, and takes the server's.
        timeout: seconds without a sign from the server. connect: seconds until the server must
            accept a connection.
        retries: of connections that fail or break; an answer that is late or an error is not asked
            for again.
        concurrency: prompts at a time. api_key: sent as a bearer token.
        sampling: fields of Sampling, by name.

    Raises (start and decode): ServerError.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        tokenizer=None,
        timeout: float = 300,
        connect: float = 5,
        retries: int = 2,
        concurrency: int = 16,
        api_key: str | None = None,
        seed: int = 0,
        trace: bool = False,
        name: str | None = None,
        **sampling,
    ):
        for label, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{label}={value!r} must be a whole number, at least {least}")
        for label, value in (("timeout", timeout), ("connect", connect)):
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{label}={value!r} must be a number of seconds, more than 0")
        self.url, self.wanted, self.timeout, self.retries = (
            url.rstrip("/").removesuffix("/v1"),
            model,
            timeout,
            retries,
        )
        self.concurrency = concurrency
        super().__init__(
            model or self.url, Sampling(**split_options(sampling, ())[0]), name, seed, trace
        )
        self.tokenizer = tokenizer
        thinking = self.sampling.thinking
        if tokenizer is None and thinking is not None and thinking.has_answer:
            raise ValueError(
                "soft: the answer behind a thought is cut out of the tokens: give tokenizer="
            )
        try:
            address = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ValueError(
                f"url={url!r} is none ({error}): give e.g. 'http://127.0.0.1:8000'"
            ) from error
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"url={url!r} is none of a server: give e.g. 'http://127.0.0.1:8000'")
        self.client = httpx.Client(
            base_url=address,
            timeout=httpx.Timeout(timeout, connect=connect, pool=None),
            limits=httpx.Limits(max_connections=concurrency),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # no proxy leads to this machine
            trust_env=address.host not in ("127.0.0.1", "localhost", "::1"),
        )
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
                f"url={self.url!r} answers, but names no models: it is no OpenAI-compatible one"
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
        found: dict[int, tuple[list[int], list[Completion]]] = {}
        waiting = deque(range(len(bodies)))

        def ask() -> None:
            while waiting and not failed:  # nothing more is asked of a server that has failed
                with contextlib.suppress(IndexError):  # another thread took the last one
                    i = waiting.popleft()
                    try:
                        found[i] = self._complete(i, len(bodies), bodies[i])
                    except Exception as error:
                        failed.append(error)

        # Daemons: after Ctrl-C nothing waits for answers that may take minutes
        threads = [
            Thread(target=ask, daemon=True) for _ in range(min(self.concurrency, len(bodies)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            waiting.clear()
        found = dict(sorted(found.items()))
        share = (time.perf_counter() - began) / max(len(found), 1)
        ids, self.completions = [list(column) for column in zip(*found.values())] or ([], [])
        done = dict(
            zip(found, self.rows([prompts[i] for i in found], ids, self.completions, share))
        )
        if failed and isinstance(failed[0], ServerError):
            kept = f"{failed[0]}; {len(done)} of {len(prompts)} prompts were finished"
            raise ServerError(kept, failed[0].prompt, done) from failed[0]
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
            choices = self._ask("POST", "/v1/completions", what, self.retries, body)["choices"]
            found = [
                self._completion(choice) for choice in sorted(choices, key=lambda c: c["index"])
            ]
            return list(choices[0]["prompt_token_ids"]), found
        except ServerError as error:
            raise ServerError(str(error), i) from error
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ServerError(
                f"{what}: the answer is not vLLM's, it lacks token ids ({error!r})", i
            ) from error

    def _completion(self, choice: dict) -> Completion:
        tokens, logprobs = tuple(choice["token_ids"]), choice["logprobs"]
        kept = logprobs and tuple(
            {int(token.removeprefix("token_id:")): p for token, p in step.items()}
            for step in logprobs["top_logprobs"]
        )
        text = (
            self.tokenizer.decode(tokens, skip_special_tokens=True)
            if self.tokenizer
            else choice["text"]
        )
        record = None
        if self.sampling.soft is not None and self.soft["record"]:
            if FIELD not in choice:
                raise ServerError(
                    f"url={self.url!r}: no record in the answer: that server has no softar, or another one"
                )
            record = to_record(from_json(choice[FIELD]))
        return Completion(text, tokens, kept, record)

    def _ask(
        self, method: str, path: str, what: str, retries: int, body: dict | None = None
    ) -> Any:
        """The answer as JSON. Raises ServerError that begins with `what`."""
        for attempt in range(retries + 1):
            try:
                answer = self.client.request(method, path, json=body)
                break
            except httpx.TimeoutException as error:
                slow = (
                    "accept a connection" if isinstance(error, httpx.ConnectTimeout) else "answer"
                )
                limit = (
                    self.client.timeout.connect
                    if isinstance(error, httpx.ConnectTimeout)
                    else self.timeout
                )
                raise ServerError(
                    f"{what}: did not {slow} within {limit:g} s; more time: timeout="
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
            raise ServerError(f"{what}: the server says {answer.status_code}: {_message(answer)}")
        try:
            return answer.json()
        except ValueError as error:
            raise ServerError(f"{what}: the answer is no JSON: {answer.text[:200]!r}") from error


def _message(answer: httpx.Response) -> str:
    """What an error's answer says: OpenAI's form, FastAPI's, or the text."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = answer.json()
        return " ".join(
            str(said["error"]["message"] if "error" in said else said["detail"]).split()
        )
    return " ".join(answer.text.split())[:300] or answer.reason_phrase
