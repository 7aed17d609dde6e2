"""What vLLM's server makes of answers with records, with the plug-in and without; no engine is
needed for that. Called by the script of test_vllm_soft.py."""

import asyncio
import json
import logging
import math
from types import SimpleNamespace

from softar.thought import Kind
from softar.vllm.http import teach

STEPS = [  # token, log-probability, kind, entropy, mixture
    (7, math.nan, Kind.SOFT, 1.5, {7: 0.6, 8: 0.3, 9: 0.1}),
    (4, math.nan, Kind.FORCED, 0.5, {4: 1.0}),
    (9, -0.25, Kind.HARD, 0.25, {9: 1.0}),
]
FIELD = {
    "token": [7, 4, 9],
    "kind": ["soft", "forced", "hard"],
    "entropy": [1.5, 0.5, 0.25],
    "logp": [None, None, -0.25],
    "ids": [[7, 8, 9], [4], [9]],
    "weights": [[0.6, 0.3, 0.1], [1.0], [1.0]],
}
RECORD = {"soft": json.dumps({"record": True})}


def over_http():
    """What the server makes of answers, with the plug-in and without; no engine is needed for
    that."""

    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion import serving as chats
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest
    from vllm.entrypoints.openai.completion import serving as completions
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    kinds = {"text": completions.OpenAIServingCompletion, "chat": chats.OpenAIServingChat}
    completions.time = chats.time = SimpleNamespace(time=lambda: 0)

    def flat(steps):
        found = FlatLogprobs()
        for token, logp, kind, entropy, mixture in steps:
            logs = [logp, entropy, *map(math.log, mixture.values())]
            found.append_fast(
                [token, token, *mixture], logs, [int(kind)] * len(logs), [""] * len(logs)
            )
        return found

    def output(steps, record, index=0, finished=True):
        kept, end = flat(steps) if record else None, "length" if finished else None
        text, tokens = "".join(f" w{step[0]}" for step in steps), [step[0] for step in steps]
        part = CompletionOutput(index, text, tokens, None, kept, finish_reason=end)
        return RequestOutput("r", "w1", [1], None, [part], finished)

    def lagging(record):
        """Two parts that were joined because nobody had fetched the first."""
        queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
        for steps in (STEPS[:1], STEPS[1:]):
            queue.put(output(steps, record))
        return queue.get_nowait()

    ended = []  # what an engine's stream said last: the request is over for it too

    async def stream(items):
        try:
            for item in items:
                yield item
        finally:
            ended.append(item)

    async def first(answer):
        """A client that goes away after the first chunk."""
        await anext(answer)
        await answer.aclose()
        await asyncio.sleep(0.1)
        return list(ended)

    def request(kind, **more):
        if kind == "text":
            return completions.CompletionRequest(model="m", prompt=[1], max_tokens=3, **more)
        return chats.ChatCompletionRequest(
            model="m", messages=[{"role": "user", "content": "w1"}], **more
        )

    def ask(kind, streams, parts, read=None, **more):
        self = object.__new__(kinds[kind])
        flags = (
            "auto_tools",
            "log_outputs",
            "force_include_usage",
            "prompt_tokens_details",
            "per_request_metrics",
        )
        no = (
            *(f"enable_{name}" for name in flags),
            "return_tokens_as_token_ids",
            "_include_reasoning_tokens_details",
        )
        none = dict.fromkeys(("parser_cls", "system_fingerprint", "request_logger"))
        self.__dict__ |= (
            dict.fromkeys(no, False) | none | {"response_role": "assistant"} | more.pop("own", {})
        )
        asked, meta = request(kind, **more), SimpleNamespace(final_usage_info=None)
        if kind == "text" and streams:
            answer = self.completion_stream_generator(
                asked, [None], stream((0, part) for part in parts), "r", 0, "m", 1, None, meta
            )
        elif kind == "text":
            answer = self.request_output_to_completion_response(
                parts, asked, "r", 0, "m", None, meta
            )
        elif streams:
            answer = self.chat_completion_stream_generator(
                asked, stream(parts), "r", "m", [], "tokenizer", meta
            )
        else:
            answer = self.chat_completion_full_generator(
                asked, stream(parts), "r", "m", [], "tokenizer", meta
            )

        async def whole(answer):
            if streams:
                return [chunk async for chunk in answer]
            return (answer if kind == "text" else await answer).model_dump_json()

        ended.clear()
        return asyncio.run((read or whole)(answer))

    parts = [output([step], True, finished=step is STEPS[-1]) for step in STEPS]
    plain = [output([step], False, finished=step is STEPS[-1]) for step in STEPS]

    def unasked():
        """What does not ask for a record, in both forms, whole and as a stream."""
        found = []
        for kind in kinds:
            for more in ({}, {"vllm_xargs": {"soft": "{}"}}, {"vllm_xargs": {"session_id": "a"}}):
                for streams in (False, True):
                    given = plain if streams else [output(STEPS, False)]
                    found.append(ask(kind, streams, given, n=1, **more))
        return found

    names = ("request_output_to_completion_response", "chat_completion_full_generator")
    before, said = unasked(), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("vllm.softar").addHandler(handler)
    lost = chats.OpenAIServingChat.chat_completion_full_generator
    del chats.OpenAIServingChat.chat_completion_full_generator
    teach()  # in a vLLM that has other names
    chats.OpenAIServingChat.chat_completion_full_generator = lost
    left = ["softar" in vars(getattr(cls, name)) for cls, name in zip(kinds.values(), names)]
    teach()
    teach()
    logging.getLogger("vllm.softar").removeHandler(handler)
    asks = dict(vllm_xargs=RECORD)
    late = SimpleNamespace(
        parse_delta=lambda delta_token_ids, **_: (
            chats.DeltaMessage() if 9 in delta_token_ids else None
        )
    )
    own = dict(parser_cls=object, _make_parser=lambda *_: late)

    def refused(act, *args, **more):
        try:
            act(*args, **more)
        except ValueError as error:
            return str(error)

    def anthropic(**more):
        server = object.__new__(AnthropicServingMessages)
        body = AnthropicMessagesRequest(model="m", max_tokens=3, messages=says, **more)
        return asyncio.run(server.create_messages(body))

    says = [{"role": "user", "content": "w1"}]
    as_object = dict(vllm_xargs={"soft": {"record": True}})
    batch = BatchChatCompletionRequest(model="m", messages=[says], **as_object)
    return {
        "said": said,
        "left": left,
        "unasked": [before, unasked()],
        "whole": [json.loads(ask(kind, False, [output(STEPS, True)], **asks)) for kind in kinds],
        "streams": [ask(kind, True, parts, **asks) for kind in kinds],
        "lagging": [ask(kind, True, [lagging(True)], **asks) for kind in kinds],
        # the parser is not ready for the first two
        "withheld": ask("chat", True, parts, own=own, **asks),
        "left early": [len(ask(kind, True, parts, read=first, **asks)) for kind in kinds],
        "refused": [
            *(refused(request(kind, **asks).to_beam_search_params, 3, {}) for kind in kinds),
            refused(ask, "chat", True, parts, include_reasoning=False, **asks),
            *(refused(request(kind, soft={}).to_sampling_params, 3, {}) for kind in kinds),
            refused(ResponsesRequest(input="w1", **as_object).to_sampling_params, 3),
            refused(batch.to_chat_completion_request, says),
            refused(anthropic, **as_object),
        ],
    }
