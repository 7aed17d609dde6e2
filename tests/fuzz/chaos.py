"""Clients that ask a server of soft answers all at once, and many of which go away: nothing they do
may change what others are answered, and nothing may be lost.

    softar serve mnns-soft-tiny --soft --port 8000
    python tests/fuzz/chaos.py http://127.0.0.1:8000 --clients 50 --seconds 180 --pid PID

asks the answers of all requests once, alone; then each client, at random, wants the same answer
again, whole or as a stream, leaves a stream or a request half-way, or sends nonsense. It prints
counts, and with the server's process id the memory of its whole tree; exit code 1 where anything
was wrong or lost.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter

import httpx
import psutil

SOFTS = [
    None,
    {"top_k": 10, "budget": 3},
    {"mixer": "gumbel", "temperature": 0.8, "top_k": 5, "budget": 4, "record": True},
    {"mixer": "k-samples", "mixer_args": {"k": 3}, "budget": 6, "record": True},
    {"mixer": "dirichlet", "top_k": 7, "budget": 2},
    {"mixer": "mixture-of-inputs", "think_end": 3, "budget": 5},
]
NONSENSE = ["{", '{"top_k": -1}', '{"temperature": NaN}', {"mixer": "x"}, None, {"a": {"b": []}}]
DIGITS = ["D4 D8 D1 D3", "D1 D2 D3 D4", "D9 D9 D1 D0", "D7 D7 D7 D7", "D0 D5 D6 D2"]
PROMPTS = [f"<bos> {digits} ->" for digits in DIGITS]
TRIES = 2  # a server may close a kept connection just as it is asked for more


class Chaos:
    """What is asked of one server, and what came of it."""

    def __init__(self, url: str, model: str, prompts=PROMPTS, max_tokens: int = 40, key=None):
        self.url, self.model = f"{url}/v1/completions", model
        self.health = f"{url}/health"
        self.prompts, self.max_tokens = prompts, max_tokens
        self.options = dict(timeout=120, trust_env=False)
        self.options |= {"headers": {"Authorization": f"Bearer {key}"}} if key else {}
        self.answers: dict[tuple[int, int], str] = {}  # by prompt and soft
        self.counts, self.wrong = Counter(), []

    def body(self, prompt: int, soft: int, **more) -> dict:
        body = {"model": self.model, "prompt": self.prompts[prompt], "seed": 7, "temperature": 0}
        body |= {"max_tokens": self.max_tokens}
        if SOFTS[soft] is not None:
            body["vllm_xargs"] = {"soft": SOFTS[soft]}
        return body | more

    async def run(self, clients: int, seconds: float, pid: int | None = None) -> dict:
        """Counts of what happened; "wrong" and "lost" ought to be 0."""
        async with httpx.AsyncClient(**self.options) as client:
            cases = [(p, s) for p in range(len(self.prompts)) for s in range(len(SOFTS))]
            for case in cases:
                self.answers[case] = await self.whole(client, *case)
            memory = [memory_of(pid)]
            end = time.monotonic() + seconds
            tasks = [asyncio.create_task(self.client(i, end)) for i in range(clients)]
            while (left := end - time.monotonic()) > 0:
                await asyncio.sleep(min(20, left))
                memory.append(memory_of(pid))
            await asyncio.gather(*tasks)
            for case in cases:  # what they left behind
                await self.check(case, await self.whole(client, *case))
            self.counts["healthy"] = int((await client.get(self.health)).status_code == 200)
        return {"wrong": len(self.wrong), "lost": 0, **self.counts, "memory": memory}

    async def client(self, number: int, end: float) -> None:
        draw = random.Random(number)
        actions = [self.ask, self.ask, self.stream, self.leave_stream, self.leave, self.nonsense]
        async with httpx.AsyncClient(**self.options) as client:
            while time.monotonic() < end:
                case = draw.randrange(len(self.prompts)), draw.randrange(len(SOFTS))
                action = draw.choice(actions)
                for attempt in range(1, TRIES + 1):
                    try:
                        await action(client, case, draw)
                        break
                    except Exception as error:
                        what = "again" if attempt < TRIES else "lost"
                        self.counts[what] += 1
                        self.counts[f"{what} ({type(error).__name__})"] += 1

    async def whole(self, client, prompt: int, soft: int) -> str:
        answer = await client.post(self.url, json=self.body(prompt, soft))
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"]

    async def check(self, case, text: str) -> None:
        if text != self.answers[case]:
            self.wrong.append((case, text))

    async def ask(self, client, case, draw) -> None:
        await self.check(case, await self.whole(client, *case))
        self.counts["answers"] += 1

    async def stream(self, client, case, draw) -> None:
        body = self.body(*case, stream=True)
        async with client.stream("POST", self.url, json=body) as answer:
            lines = [line async for line in answer.aiter_lines()]
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "data: [DONE]" in lines
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        await self.check(case, text)
        self.counts["streams"] += 1

    async def leave_stream(self, client, case, draw) -> None:
        lines = draw.randrange(6)
        body = self.body(*case, stream=True)
        async with client.stream("POST", self.url, json=body) as answer:
            async for _ in answer.aiter_lines():
                lines -= 1
                if lines < 0:
                    break
        self.counts["streams left"] += 1

    async def leave(self, client, case, draw) -> None:
        more = draw.choice([{}, {"n": 3, "temperature": 0.7}])
        task = asyncio.create_task(client.post(self.url, json=self.body(*case, **more)))
        await asyncio.sleep(draw.random() * 0.15)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.counts["requests left"] += 1

    async def nonsense(self, client, case, draw) -> None:
        body = self.body(*case, vllm_xargs={"soft": draw.choice(NONSENSE)})
        answer = await client.post(self.url, json=body)
        assert answer.status_code == 400, answer.text
        self.counts["refused"] += 1


def memory_of(pid: int | None) -> int | None:
    """MB of a process and all its children."""
    if pid is None:
        return None
    process = psutil.Process(pid)
    tree = [process, *process.children(recursive=True)]
    return sum(p.memory_info().rss for p in tree) // 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", default="mnns-soft-tiny")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--pid", type=int, help="the server's, to see its memory")
    args = parser.parse_args()
    chaos = Chaos(args.url, args.model, key=os.environ.get("VLLM_API_KEY"))
    found = asyncio.run(chaos.run(args.clients, args.seconds, args.pid))
    print(json.dumps(found))
    print(*chaos.wrong[:5], sep="\n")
    sys.exit(bool(found["wrong"] or found["lost"] or not found["healthy"]))


if __name__ == "__main__":
    main()
