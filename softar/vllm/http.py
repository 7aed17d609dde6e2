"""The record of a soft request over HTTP, in the answers of vLLM's /v1/completions and
/v1/chat/completions.

A request says "soft" in its vllm_xargs, as an object or as its JSON text. One that says `"record":
true` there finds in each of its choices the field "soft", lists with an entry per token, named as
in softar's Record:

    {"token": [9, ...], "kind": ["soft", ...], "entropy": [1.2, ...], "logp": [null, ...],
     "ids": [[9, 4, 7], ...], "weights": [[0.5, 0.3, 0.2], ...]}

In a stream each chunk brings the lists of its own tokens; put together they are those of the whole.
`to_record(from_json(field))` makes tensors of them. Nothing here imports vLLM's server before one runs.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any

from pydantic import BeforeValidator

from .hooks import patch, refusing
from .record import FIELD, as_json, record_of
from .switches import switches_of

# --- the server ---


def init_processor(method, self, *args, **kwargs):
    """Of vLLM's InputProcessor, which only a process that takes requests makes: there the server is
    taught."""
    method(self, *args, **kwargs)
    teach()


def teach() -> None:
    """Patch all that is needed or, where this vLLM lacks some of it, nothing."""
    from vllm.logger import init_logger

    try:
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
        from vllm.entrypoints.openai.chat_completion.protocol import (
            BatchChatCompletionRequest,
            ChatCompletionRequest,
        )
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
        from vllm.logprobs import FlatLogprobs
        from vllm.v1.engine.async_llm import AsyncLLM

        requests = (CompletionRequest, ChatCompletionRequest)
        others = (ResponsesRequest, AnthropicMessagesRequest)
        fields = {each: each.model_fields["vllm_xargs"] for each in (*requests, *others)}
        patches = (
            *((request, "to_sampling_params", sampling) for request in requests),
            *((request, "to_beam_search_params", beams) for request in requests),
            (ResponsesRequest, "to_sampling_params", unrecorded),
            (AnthropicServingMessages, "create_messages", messages),
            (BatchChatCompletionRequest, "to_chat_completion_request", part_of_batch),
            (AsyncLLM, "generate", generate),
            (OpenAIServingCompletion, "request_output_to_completion_response", completion),
            (OpenAIServingCompletion, "completion_stream_generator", completion_stream),
            (OpenAIServingChat, "chat_completion_full_generator", chat),
            (OpenAIServingChat, "chat_completion_stream_generator", chat_stream),
            (FlatLogprobs, "extend", extend),
        )
        for owner, name, _ in patches:
            getattr(owner, name)
    except (ImportError, AttributeError, KeyError) as error:
        init_logger("vllm.softar").warning(
            "softar: no records over HTTP and no limit there, this vLLM differs (%s)", error
        )
        return
    for owner, name, around in patches:
        patch(owner, name, around)
    AsyncLLM.softar_count = 0  # answers to soft requests that are under way
    for request, field in fields.items():
        if TAKES_OBJECTS not in field.metadata:
            field.metadata.append(TAKES_OBJECTS)
            request.model_rebuild(force=True)


def as_text(extra_args: Any) -> Any:
    """vllm_xargs with "soft" as vLLM's schema has it, text; parse says what is wrong with others."""
    if isinstance(extra_args, dict) and not isinstance(extra_args.get("soft", ""), str):
        return {**extra_args, "soft": json.dumps(extra_args["soft"])}
    return extra_args


TAKES_OBJECTS = BeforeValidator(as_text)


def generate(method, self, prompt, sampling_params, *args, **kwargs):
    """Of AsyncLLM: the answer to a soft request counts while it is under way."""
    outs = method(self, prompt, sampling_params, *args, **kwargs)
    most = switches_of(self.vllm_config).max_soft
    is_soft = "soft" in (sampling_params.extra_args or {})
    return outs if most is None or not is_soft else _counted(self, outs, sampling_params.n, most)


async def _counted(engine, outs: AsyncIterator, n: int, most: int) -> AsyncIterator:
    from vllm.exceptions import GracefulHTTPError

    if engine.softar_count + n > most:
        message = (
            f"soft: {engine.softar_count} answers to soft requests are under way, and this server "
            f"takes at most {most} (--max-soft): ask for {n} later, or for fewer at a time"
        )
        raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)
    engine.softar_count += n
    try:
        async with contextlib.aclosing(outs):
            async for out in outs:
                yield out
    finally:
        engine.softar_count -= n


# --- what would do nothing is refused before any work ---


def sampling(method, self, *args, **kwargs):
    """Of a request, as all below: vLLM ignores fields that it does not know."""
    with refusing():
        if FIELD in self.model_extra:
            raise ValueError(
                'soft: not as a field of the request: say {"vllm_xargs": {"soft": {...}}}'
            )
    return method(self, *args, **kwargs)


def beams(method, self, *args, **kwargs):
    """Its search has no place for other arguments."""
    with refusing():
        if FIELD in (self.vllm_xargs or {}):
            raise ValueError("soft: not together with use_beam_search")
    return sampling(method, self, *args, **kwargs)


def unrecorded(method, self, *args, **kwargs):
    """Of requests whose answers have no place for a record."""
    _check_unrecorded(self)
    return sampling(method, self, *args, **kwargs)


async def messages(method, self, request, *args, **kwargs):
    _check_unrecorded(request)
    return await method(self, request, *args, **kwargs)


def part_of_batch(method, self, *args, **kwargs):
    request = method(self, *args, **kwargs)
    _check_unrecorded(request)
    return request


def _check_unrecorded(request) -> None:
    if asks(request):
        with refusing():
            raise ValueError(
                'soft: "record" is in answers of /v1/completions and /v1/chat/completions alone: ask '
                "one of these, or leave it out"
            )


# --- answers with records ---


def completion(method, self, results, request, *args, **kwargs):
    with_record = asks(request)
    response = method(self, results, request, *args, **kwargs)
    if with_record:
        _fill(response, results)
    return response


def completion_stream(method, self, request, inputs, results, *args, **kwargs):
    if not asks(request):
        return method(self, request, inputs, results, *args, **kwargs)
    waiting = {}
    seen = _seen(results, lambda item: _wait(waiting, item[1], item[0] * (request.n or 1)))
    return _filled(method(self, request, inputs, seen, *args, **kwargs), waiting)


async def chat(method, self, request, results, *args, **kwargs):
    if not asks(request):
        return await method(self, request, results, *args, **kwargs)
    whole = []
    response = await method(self, request, _seen(results, whole.append), *args, **kwargs)
    _fill(response, whole[-1:])
    return response


def chat_stream(method, self, request, results, *args, **kwargs):
    if not asks(request):
        return method(self, request, results, *args, **kwargs)
    waiting = {}
    seen = _seen(results, lambda item: _wait(waiting, item, 0))
    return _filled(method(self, request, seen, *args, **kwargs), waiting)


def extend(method, self, more) -> None:
    """A stream that lags behind joins its parts. vLLM goes by dicts of tokens, and a record's step
    has one twice."""
    if not isinstance(more, type(self)):
        return method(self, more)
    shift = len(self.logprobs)
    self.start_indices.extend([i + shift for i in more.start_indices])
    self.end_indices.extend([i + shift for i in more.end_indices])
    for name in ("token_ids", "logprobs", "ranks", "decoded_tokens"):
        getattr(self, name).extend(getattr(more, name))


def asks(request) -> bool:
    """Does it ask for a record? What is wrong in "soft" itself the engine refuses."""
    extra_args = request.vllm_xargs or {}
    if "soft" not in extra_args:
        return False
    try:
        record = json.loads(extra_args["soft"])["record"] is True
    except (TypeError, KeyError, ValueError, RecursionError):
        return False
    with refusing():
        if (
            record
            and "include_reasoning" in type(request).model_fields
            and not request.include_reasoning
        ):
            raise ValueError(
                'soft: "record" not together with include_reasoning=false, which hides what it shows'
            )
    return record


def _fill(response, results) -> None:
    """Each choice of a whole answer gets its field; an error's answer has none."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if not isinstance(response, ErrorResponse):
        outputs = [output for result in results for output in result.outputs]
        for choice, output in zip(response.choices, outputs, strict=True):
            setattr(choice, FIELD, as_json(record_of(output)))


def _wait(waiting: dict[int, list], result, first: int) -> None:
    """Keep what came for choices, by their index, until a chunk goes there."""
    for output in result.outputs:
        waiting.setdefault(first + output.index, []).extend(record_of(output))


async def _seen(items: AsyncIterator, look: Callable[[Any], None]) -> AsyncIterator:
    async with contextlib.aclosing(items):
        async for item in items:
            look(item)
            yield item


async def _filled(chunks: AsyncIterator[str], waiting: dict[int, list]) -> AsyncIterator[str]:
    """The chunks of a stream; those that bring tokens, unlike a chat's first, name token_ids, if
    only as null."""
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            body = json.loads(chunk.removeprefix("data: ")) if chunk.startswith("data: {") else {}
            choices = [choice for choice in body.get("choices", ()) if "token_ids" in choice]
            for choice in choices:
                choice[FIELD] = as_json(waiting.pop(choice["index"], ()))
            if choices:
                text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
                chunk = f"data: {text}\n\n"
            yield chunk
