"""A server that decoders ask over HTTP: the connection, retries, errors of one line, and several
requests at a time."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any

import httpx

from ..checks import shorten
from .answer import Unfinished

HERE = ("127.0.0.1", "localhost", "::1")
LONGEST_WAIT = 30.0  # seconds before the next try, whatever the server asks for


class ServerError(Unfinished):
    """A server that does not start, does not answer, or answers with an error.

    prompt: index of the prompt it happened at, None where it was none. done: {index: Decoded} of
    the prompts that were finished before. status: of its answer, where that was an error.
    """

    def __init__(
        self,
        message: str,
        prompt: int | None = None,
        done: dict | None = None,
        status: int | None = None,
    ):
        super().__init__(message, done)
        self.prompt, self.status = prompt, status


@dataclass(frozen=True)
class Connection:
    """How a server is asked."""

    timeout: float = 300  # seconds without a sign from the server
    connect: float = 5  # seconds until it must accept a connection
    # of connections that fail or break; an answer that is late or an error is not asked for again
    retries: int = 2
    concurrency: int = 16  # prompts at a time

    def __post_init__(self):
        for name, least in (("concurrency", 1), ("retries", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
        for name in ("timeout", "connect"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}={value!r} must be a number of seconds, more than 0")

    def key(self, is_here: bool) -> str | None:
        """What is sent as a bearer token to a server on this machine, or elsewhere."""
        return None

    def client(self, url: str) -> httpx.Client:
        """Raises ValueError for what is not the address of a server."""
        example = "give e.g. 'http://127.0.0.1:8000'"
        try:
            address = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            raise ValueError(f"url={url!r} is not a URL ({error}): {example}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"url={url!r} is not the URL of a server: {example}")
        is_here = address.host in HERE
        key = self.key(is_here)
        return httpx.Client(
            base_url=address,
            timeout=httpx.Timeout(self.timeout, connect=self.connect, pool=None),
            limits=httpx.Limits(max_connections=self.concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # no proxy leads to this machine
            trust_env=not is_here,
        )


class Link:
    """One server.

    Args:
        url: of it, for messages.   base: what paths stand behind.
        busy: statuses that are asked again.
        hints: what to do about a status, where more is known than the server says; under 0 about a
            server that does not answer.
    """

    def __init__(
        self,
        url: str,
        base: str,
        connection: Connection,
        *,
        busy: tuple[int, ...] = (),
        hints: dict[int, str] | None = None,
    ):
        self.url, self.connection, self.busy, self.hints = url, connection, busy, hints or {}
        self.client = connection.client(base)
        self.has_answered = False

    def models(self) -> list[str]:
        """The names of what it serves. Raises ServerError."""
        answer = self.ask("GET", "/models", f"url={self.url!r}", retries=0)
        try:
            return [model["id"] for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ServerError(
                f"url={self.url!r} answers, but names no models: it is not an OpenAI-compatible one"
            ) from error

    def ask(
        self, method: str, path: str, what: str, *, retries: int | None = None, body=None
    ) -> Any:
        """The answer as JSON. Raises ServerError that begins with `what`."""
        retries = self.connection.retries if retries is None else retries
        for attempt in range(retries + 1):
            wait = 0.25 * 2**attempt
            try:
                answer = self.client.request(method, path, json=body)
                self.has_answered = True
            except httpx.TimeoutException as error:
                action, limit = "answer", self.connection.timeout
                if isinstance(error, httpx.ConnectTimeout):
                    action, limit = "accept a connection", self.connection.connect
                raise ServerError(
                    f"{what}: did not {action} within {limit:g} s; more time: timeout="
                ) from error
            except httpx.TransportError as error:
                if attempt == retries:
                    raise self._unreachable(what, error) from error
            else:
                if answer.status_code not in self.busy or attempt == retries:
                    break
                asked = answer.headers.get("Retry-After", "")
                wait = min(max(wait, float(asked) if asked.isdigit() else 0.0), LONGEST_WAIT)
            time.sleep(wait)
        if answer.status_code >= 300:
            hint = self.hints.get(answer.status_code)
            raise ServerError(
                f"{what}: the server says {answer.status_code}: {_message(answer)}"
                + (f"; {hint}" if hint else ""),
                status=answer.status_code,
            )
        try:
            return answer.json()
        except ValueError as error:
            raise ServerError(
                f"{what}: the answer is not JSON: {shorten(answer.text, 200)!r}"
            ) from error

    def _unreachable(self, what: str, error: Exception) -> ServerError:
        if self.has_answered:
            return ServerError(f"{what}: the server went away ({error})")
        hint = f": {self.hints[0]}" if 0 in self.hints else ""
        return ServerError(f"{what}: no server answers ({error}){hint}")

    def each(self, n: int, ask: Callable[[int], Any]) -> tuple[dict[int, Any], Exception | None]:
        """`ask(i)` for i from 0 to n - 1, several at a time -> what it returned, by i and in order,
        and the first failure, after which nothing more was asked."""
        failed: list[Exception] = []
        answers: dict[int, Any] = {}
        waiting = deque(range(n))

        def work() -> None:
            while waiting and not failed:
                with contextlib.suppress(IndexError):  # another thread took the last one
                    i = waiting.popleft()
                    try:
                        answers[i] = ask(i)
                    except Exception as error:
                        failed.append(error)

        # Daemons: after Ctrl-C nothing waits for answers that may take minutes
        count = min(self.connection.concurrency, n)
        threads = [Thread(target=work, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            waiting.clear()
        return dict(sorted(answers.items())), failed[0] if failed else None


def raise_failure(failure: Exception | None, done: dict, n: int) -> None:
    """Raise a failure of `each`, where there was one, with what was done of n prompts until then."""
    if isinstance(failure, ServerError):
        message = f"{failure}; {len(done)} of {n} prompts were finished"
        raise ServerError(message, failure.prompt, done) from failure
    if failure is not None:
        raise failure


def key_of(name: str, option: str) -> str:
    """An environment variable's value. Raises ValueError where it is not set."""
    if not os.environ.get(name):
        raise ValueError(f"{option}: {name} is not in the environment, set it")
    return os.environ[name]


def _message(answer: httpx.Response) -> str:
    """What an error's answer says: OpenAI's form, FastAPI's, or the text."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        body = answer.json()
        said = body["error"]["message"] if "error" in body else body["detail"]
        return shorten(" ".join(str(said).split()))
    return shorten(answer.text) or answer.reason_phrase
