"""A decoder that asks any OpenAI-compatible server (SGLang, vLLM, llama.cpp, a hosted one), so that
its rows stand beside softar's: `openai:url=http://127.0.0.1:30000`.

What the server does not tell is None: forwards and positions always, tokens where it sends no
usage. Seconds are the wall time of a batch, shared by its rows, the way there and back included.
"""

import contextlib
import random
import time
from dataclasses import dataclass, field, fields

from ..checks import check_choice, check_least
from ..specs import format_options
from . import link
from .answer import Decoded
from .card import Card
from .link import Link, ServerError, key_of, raise_failure
from .options import Common, check_options

FAMILY = "openai"
BUSY = (429, 502, 503, 504)  # too many requests, or a server that is not up yet
# by kind of request: where it goes, and what of a choice is the answer
APIS = {
    "chat": ("/chat/completions", lambda choice: choice["message"]["content"]),
    "completions": ("/completions", lambda choice: choice["text"]),
}


@dataclass(frozen=True)
class Connection(link.Connection):
    """How a server is asked; one that is busy is asked again, too."""

    # environment variable whose value is sent as a bearer token, to this server and no other
    key_env: str | None = None

    def key(self, is_here: bool) -> str | None:
        return self.key_env and key_of(self.key_env, f"key_env={self.key_env!r}")


@dataclass(frozen=True)
class Request:
    """What a server is asked for; None leaves it to the server."""

    api: str = "chat"  # a text is one message of a user; "completions" takes texts as they stand
    max_new_tokens: int | None = 128
    temperature: float | None = 0.0
    top_p: float | None = None
    stop: tuple[str, ...] = ()  # the answer ends before any of these
    # further fields of the request, which override all others; null takes one out
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        check_choice("api", self.api, APIS)
        check_least(self, max_new_tokens=1, temperature=0)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")

    def body(self, model: str, prompt, seed: int) -> dict:
        """The request's JSON, for a text or chat messages."""
        is_text = isinstance(prompt, str)
        if self.api == "chat":
            what = {"messages": [{"role": "user", "content": prompt}] if is_text else [*prompt]}
            told = dict(getattr(prompt, "template", {}))
            what["tools"] = told.pop("tools", None)
            what["chat_template_kwargs"] = told or None  # as vLLM and SGLang call it
        elif is_text:
            what = {"prompt": prompt}
        else:
            raise ValueError(
                "api='completions' takes text, and a prompt is chat messages: api=chat"
            )
        choice = {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": [*self.stop] or None,
            "seed": None if self.temperature == 0 else seed,
        }
        body = {"model": model} | what | choice | self.extra
        return {name: value for name, value in body.items() if value is not None}


CONNECTION = tuple(field.name for field in fields(Connection))


class OpenAIDecoder:
    """Answers by a server's. Several prompts are asked for at a time.

    Args:
        url: of the server, e.g. "http://127.0.0.1:8000"; "/v1" is added where it names no path.
        model: as the server calls it; None is the first that it names.
        seed: of what it draws, a seed for each request, which not every server heeds.
        connection, request: None are the defaults.
        name, columns: for tables.

    Raises (decode): ServerError that names the prompt and carries in `done` what the others gave
    until then.
    """

    tokenizer = None  # the server has it

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        connection: Connection | None = None,
        request: Request | None = None,
        seed: int = 0,
        name: str | None = None,
        columns: dict | None = None,
    ):
        self.url, self.model = url, model
        self.request, self.rng = request or Request(), random.Random(seed)
        hints = {
            0: "is one running there?",
            401: "key_env=NAME sends the key in that environment variable",
        }
        base = url.rstrip("/") if "/" in url.partition("://")[2].rstrip("/") else f"{url}/v1"
        how = dict(busy=BUSY, hints=hints)
        self.link = Link(url, base, connection or Connection(), **how)
        self.columns = {"decoder": FAMILY, "model": model, "setting": "", "family": FAMILY}
        self.columns |= columns or {}
        self.name = name or FAMILY

    def decode(self, prompts: list) -> list[Decoded]:
        self._name_model()
        n, began = len(prompts), time.perf_counter()
        seeds = [self.rng.randrange(2**31) for _ in prompts]
        bodies = [self.request.body(self.model, *pair) for pair in zip(prompts, seeds)]
        answers, failure = self.link.each(n, lambda i: self._complete(i, n, bodies[i]))
        share = (time.perf_counter() - began) / max(len(answers), 1)
        done = {
            i: Decoded(text, None, None, None, share, num_tokens=count)
            for i, (text, count) in answers.items()
        }
        raise_failure(failure, done, n)
        return [*done.values()]

    def _name_model(self) -> None:
        if self.model is not None:
            return
        served = self.link.models()
        if not served:
            raise ServerError(f"url={self.url!r} names no models: say MODEL=openai:url=...")
        self.model = self.columns["model"] = served[0]

    def _complete(self, i: int, n: int, body: dict) -> tuple[str, int | None]:
        """Text of the answer, and how many tokens it has."""
        what = f"url={self.url!r}, model={self.model!r}, prompt {i} of {n}"
        path, text_of = APIS[self.request.api]
        try:
            answer = self.link.ask("POST", path, what, body=body)
        except ServerError as error:
            raise ServerError(f"{error}{self._serves(error.status)}", i) from error
        try:
            text = text_of(answer["choices"][0]) or ""  # null: it thought, and came to no answer
            count = (answer.get("usage") or {}).get("completion_tokens")
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ServerError(
                f"{what}: the answer is not OpenAI's, it lacks a text ({error!r})", i
            ) from error
        if not isinstance(text, str) or not isinstance(count, int | None):
            raise ServerError(f"{what}: the answer is not OpenAI's: {text!r:.80}, {count!r:.80}", i)
        return text, count

    def _serves(self, status: int | None) -> str:
        """What to add where a model is not known, or the path."""
        if status != 404:
            return ""
        with contextlib.suppress(ServerError):
            return f"; it serves {self.link.models()}"
        return ""


def make(card: Card, common: Common, /, *, url: str | None = None, **options) -> OpenAIDecoder:
    """options: fields of Request and of Connection."""
    if url is None:
        raise ValueError("decoder 'openai' needs the server: openai:url=http://127.0.0.1:8000")
    if common.trace:
        raise ValueError("decoder 'openai' has no trace: a server does not tell its beliefs")
    options |= {"stop": (options["stop"],)} if isinstance(options.get("stop"), str) else {}
    also = [field.name for field in fields(Request)]
    connection = {name: options[name] for name in CONNECTION if name in options}
    asked = {name: value for name, value in options.items() if name not in CONNECTION}
    connection = check_options(Connection, FAMILY, connection, also=also)
    asked = check_options(Request, FAMILY, asked, also=CONNECTION, fixed=("max_new_tokens",))
    stop = tuple(dict.fromkeys([*common.stop, *asked.get("stop", ())]))
    asked |= {"max_new_tokens": common.max_new_tokens, "stop": stop}
    named = card.name or None
    setting = format_options(({} if named else {"url": url}) | options, " ")
    how = dict(connection=Connection(**connection), request=Request(**asked), seed=common.seed)
    return OpenAIDecoder(url, named, **how, **common.labels(FAMILY, named, setting))


def registered(name: str) -> None:
    """A method that a package registered is a decoder of another family."""
    return None


DECODERS = {FAMILY: make}
