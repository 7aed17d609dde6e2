"""Decoding over HTTP: a decoder that asks a running `vllm serve`, for the discrete baselines or
softly."""

import json
import os
import time
from dataclasses import dataclass, fields

from ..decoders import link
from ..decoders.answer import Decoded
from ..decoders.link import Link, ServerError, key_of, raise_failure
from ..evaluate import prefixed
from .completions import Completion, CompletionDecoder, Sampling, split_options, token_ids
from .machine import KEY
from .record import FIELD, from_json, to_record


@dataclass(frozen=True)
class Connection(link.Connection):
    """How a vLLM server is asked."""

    # sent as a bearer token; "env" is VLLM_API_KEY of the environment, and None the same for a
    # server on this machine, but nothing for one elsewhere
    api_key: str | None = None

    def key(self, is_here: bool) -> str | None:
        if self.api_key == "env":
            return key_of(KEY, "api_key='env'")
        return os.environ.get(KEY) if self.api_key is None and is_here else self.api_key


CONNECTION = tuple(field.name for field in fields(Connection))
HINTS = {
    0: "start one, `softar serve MODEL`",
    401: f"{KEY} goes to it with api_key=env",
    503: "concurrency= says how many prompts are asked at a time",
}


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
        self.link = Link(self.url, f"{self.url}/v1", self.connection, hints=HINTS)
        self._ready = False

    def start(self) -> None:
        """Ask the server what it serves."""
        if self._ready:
            return
        served = self.link.models()
        if not served or self.wanted not in (None, *served):
            raise ServerError(f"url={self.url!r} serves {served}, not model={self.wanted!r}")
        self.model = self.columns["model"] = self.wanted or served[0]
        self._ready = True

    def close(self) -> None:
        self.link.client.close()

    def decode(self, prompts: list) -> list[Decoded]:
        """Raises ServerError that names the prompt and carries in `done` what the others gave until
        then."""
        self.start()
        began = time.perf_counter()
        bodies = [
            self._body(i, p, seed)
            for i, (p, seed) in enumerate(zip(prompts, self.seeds(len(prompts))))
        ]
        n = len(bodies)
        answers, failure = self.link.each(n, lambda i: self._complete(i, n, bodies[i]))
        share = (time.perf_counter() - began) / max(len(answers), 1)
        ids, self.completions = [list(column) for column in zip(*answers.values())] or ([], [])
        rows = self.rows([prompts[i] for i in answers], ids, self.completions, share)
        done = dict(zip(answers, rows))
        raise_failure(failure, done, n)
        return list(done.values())

    def _body(self, i: int, prompt, seed: int) -> dict:
        s = self.sampling
        if self.tokenizer is None and not isinstance(prompt, str):
            raise ValueError(
                f"prompt {i} is chat messages: give tokenizer=, whose chat template makes them a text"
            )
        prompt = prefixed(prompt, s.prompt_prefix)
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
        if self.stop_strings:
            body |= {"stop": self.stop_strings, "skip_special_tokens": False}
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
            choices = self.link.ask("POST", "/completions", what, body=body)["choices"]
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
