"""
What soft decoding costs inside vLLM: tokens per second of paired runs, a table and a vllm.json.

# Two engines side by side, with the plug-in and without it, asked in turn
python recipes/bench_vllm.py --concurrency 16 --repeats 4

# On a busy machine: processor time
python recipes/bench_vllm.py --cpu_time

# Another model, on a GPU with CUDA graphs (--enforce_eager: without them)
python recipes/bench_vllm.py --model HuggingFaceTB/SmolLM2-1.7B-Instruct --dtype bfloat16 \\
    --concurrency 16 64 256

The modes: `none`, discrete requests to an engine without the plug-in and without prompt embeddings;
to the other engine `plugin`, discrete requests, `soft`, soft ones, `mixed`, every other one soft,
`record`, soft ones with their record. Both run the model runner that VLLM_USE_V2_MODEL_RUNNER
chooses.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from softar.recipes.bench_tools import console, parser_of, run_bench, show, spread, timed
from softar.vllm.export import exported
from softar.vllm.machine import on_cpu, require_vllm, settings

MODES = ("none", "plugin", "soft", "mixed", "record")
# what a mode is compared with
OVER = {"plugin": "none", "soft": "plugin", "mixed": "plugin", "record": "plugin"}


# --- an engine, in a process of its own ---


def serve(plugin: bool, model: str, top_k: int, tokens: int, prompt_tokens: int, **options) -> None:
    """A line of JSON in, one out. First the engine says what it is."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes there too

    def say(**answer):
        print(json.dumps(answer), file=answers, flush=True)

    try:
        from vllm import LLM, SamplingParams, __version__

        from softar.vllm.record import record_of

        llm = LLM(
            model,
            enable_prompt_embeds=plugin,
            enable_prefix_caching=False,
            max_logprobs=-1,
            seed=0,
            disable_log_stats=True,
            **options,
        )
        vocab = llm.llm_engine.model_config.get_vocab_size()

        def params(soft):
            extra = None if soft is None else {"soft": {"top_k": top_k, **soft}}
            return SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
            )

        def ask(wanted):
            draw = random.Random(0)
            prompts = [
                {"prompt_token_ids": draw.choices(range(vocab), k=prompt_tokens)} for _ in wanted
            ]
            return [
                out.outputs[0]
                for out in llm.generate(prompts, [params(soft) for soft in wanted], use_tqdm=False)
            ]

        (first,) = ask([{"record": True}])
        # softar.Kind.SOFT
        thinks = first.logprobs is not None and {step.kind for step in record_of(first)} == {1}
        runner = 2 if llm.llm_engine.vllm_config.use_v2_model_runner else 1
        say(thinks=thinks, vllm=__version__, runner=runner)
        for line in sys.stdin:
            say(tokens=sum(len(out.token_ids) for out in ask(json.loads(line))))
    except Exception as error:
        say(error=" ".join(str(error).split()) or type(error).__name__)
        raise


class Engine:
    """The other end: `ask` waits for the answer."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log = process, log
        self.about = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the engine ended"}
        if "error" in answer:
            raise RuntimeError(f"{answer['error']} (its log: {self.log})")
        return answer

    def ask(self, wanted: list) -> dict:
        """wanted: per request None, discrete, or fields of its `soft`."""
        with contextlib.suppress(BrokenPipeError):  # answer says why
            print(json.dumps(wanted), file=self.process.stdin, flush=True)
        return self.answer()

    def processor_time(self) -> float:
        """Seconds that the workers have computed; the others mostly wait for them, and spin."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        times = [p.cpu_times() for p in tree if p.name().startswith("VLLM::Worker")]
        return sum(t.user + t.system for t in times)


@contextlib.contextmanager
def started(args, folder: str, plugin: bool):
    """An engine that answers, gone with all its processes after the block."""
    log = Path(args.output, f"vllm-{'plugin' if plugin else 'none'}.log")
    options = dict(
        plugin=plugin,
        model=folder,
        top_k=args.top_k,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
        dtype=args.dtype,
        max_num_seqs=max(args.concurrency),
        enforce_eager=args.eager,
    )
    if not on_cpu():
        options["gpu_memory_utilization"] = args.gpu_memory_utilization
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    env = {**settings(folder), **quiet, **os.environ, "VLLM_PLUGINS": "softar" if plugin else ""}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with open(log, "w") as errors:
        command = [sys.executable, __file__, "--engine", json.dumps(options)]
        process = subprocess.Popen(command, env=env, stderr=errors, **pipes)
    try:
        engine = Engine(process, log)
        if engine.about["thinks"] != plugin:
            raise RuntimeError(
                "softar's plug-in is not at work in vLLM: install softar where vLLM is, pip install -e ."
            )
        yield engine
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """End its whole group: kindly, so that shared memory is given back, then by force, after a
    second Ctrl-C too."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(process.pid, signal.SIGTERM)
            for _ in range(100):
                process.poll()
                os.killpg(process.pid, 0)  # until nobody is left
                time.sleep(0.1)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- the measurement ---


def throughput(args) -> list[dict]:
    rows = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(exported(args.model, args.dtype))
        # One after the other: each looks how much memory is free
        engines = {
            on: stack.enter_context(started(args, folder, on))
            for on in sorted({mode != "none" for mode in args.modes})
        }
        about = next(iter(engines.values())).about
        console.print(
            f"vLLM {about['vllm']}, model runner {about['runner']}, load {os.getloadavg()[0]:.2f}"
        )
        for n in args.concurrency:
            rows += rows_of(args, n, paired_runs(args, engines, n), about)
    unit = "tokens per second of the workers" if args.cpu_time else "tokens/s"
    title = f"{unit}, {args.tokens} tokens a request, k = {args.top_k}, {args.repeats} paired runs"
    columns = ("concurrent", "mode", "tokens_per_s", "over", "ratio", "ratio_low", "ratio_high")
    show(title, rows, columns)
    return rows


def paired_runs(args, engines: dict[bool, Engine], n: int) -> dict[str, list[float]]:
    """Seconds of each mode with n requests at a time, taken in turn, forwards and backwards."""

    def run(mode):
        soft = {"soft": {}, "record": {"record": True}}
        wanted = [{} if mode == "mixed" and i % 2 else soft.get(mode) for i in range(n)]
        made = engines[mode != "none"].ask(wanted)["tokens"]
        assert made == n * args.tokens, f"{mode}: {made} tokens in place of {n * args.tokens}"

    seconds = {mode: [] for mode in args.modes}
    for repeat in range(-1, args.repeats):  # the first does not count
        for mode in list(seconds)[:: 1 if repeat % 2 == 0 else -1]:
            time.sleep(args.pause)
            engine = engines[mode != "none"]
            clock = engine.processor_time if args.cpu_time else time.perf_counter
            took = timed(lambda mode=mode: run(mode), clock)
            if repeat >= 0:
                seconds[mode].append(took)
    return seconds


def rows_of(args, n: int, seconds: dict[str, list[float]], about: dict) -> list[dict]:
    rows = []
    for mode, took in seconds.items():
        speeds = [n * args.tokens / s for s in took]
        ratio = low = high = None
        if OVER.get(mode) in seconds:
            base = seconds[OVER[mode]]
            ratio, low, high = spread(a / b for a, b in zip(base, took, strict=True))
        rows.append(
            dict(
                bench="vllm",
                model=args.model,
                dtype=args.dtype,
                eager=args.eager,
                tokens=args.tokens,
                prompt_tokens=args.prompt_tokens,
                top_k=args.top_k,
                concurrent=n,
                mode=mode,
                clock="processor" if args.cpu_time else "wall",
                tokens_per_s=spread(speeds)[0],
                runs=speeds,
                over=OVER.get(mode),
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                vllm=about["vllm"],
                runner=about["runner"],
            )
        )
    return rows


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a model that softar.load opens")
    parser.add_argument("--dtype", default="float32", help="type of the weights")
    parser.add_argument(
        "--concurrency",
        type=positive,
        nargs="+",
        default=[16, 64],
        help="numbers of requests at a time",
    )
    parser.add_argument(
        "--modes", choices=MODES, nargs="+", default=list(MODES), help="what to compare"
    )
    parser.add_argument("--tokens", type=positive, default=64, help="tokens of each answer")
    parser.add_argument(
        "--prompt_tokens", type=positive, default=32, help="tokens of each prompt, drawn at random"
    )
    parser.add_argument("--top_k", type=positive, default=10, help="tokens in a mixture")
    parser.add_argument(
        "--enforce_eager", action="store_true", help="run without CUDA graphs; on a CPU always so"
    )
    parser.add_argument(
        "--gpu_memory_utilization",
        type=float,
        default=0.4,
        help="share of the memory for each of the two engines",
    )
    parser.add_argument("--repeats", type=positive, default=3, help="how often each is timed")
    # For a second after its last step an engine's workers spin, beside whoever is next
    parser.add_argument(
        "--pause",
        type=float,
        default=1.5,
        help="seconds to wait before each run, for the other engine to rest",
    )
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="measure the workers' processor time, for a busy machine; CPU only",
    )
    args = parser.parse_args(argv)
    require_vllm()
    if args.cpu_time and not on_cpu():
        parser.error("--cpu_time is for engines on CPU: a GPU computes on while its worker waits")
    args.eager = args.enforce_eager or on_cpu()
    return args


def main() -> None:
    run_bench("vllm", throughput, parse())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        serve(**json.loads(sys.argv[2]))
        sys.exit()
    try:
        main()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"bench_vllm.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
