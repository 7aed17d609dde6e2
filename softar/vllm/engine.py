"""Decoding on vLLM, in this process or over HTTP: greedy, sampled, self-consistency and beam
search, the discrete baselines; and softly inside its engine, by the plug-in of softar.vllm.plugin.

`VLLMDecoder` runs an engine here, `ServerDecoder` asks a running `vllm serve` (`softar.vllm.serve`,
`softar serve`). Both are decoders for `softar.compare`, and draw the same for the same seed.

What a row costs: num_forwards counts generated tokens, those of every vote or beam; token_forwards
the positions computed for them, with nothing shared between the votes (the cache of prefixes is
off, here and in `softar serve`). vLLM's beam search sends every beam anew for each token, so it
computes the prompt again each time and goes on to max_new_tokens whatever has ended: both are
counted as they happen.
"""

import ast
import atexit
import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..decoders.answer import Decoded
from ..names import is_code
from .completions import Completion, CompletionDecoder, Sampling, split_options, token_ids
from .export import exported, served_dtype
from .finite import check_ended
from .machine import environment, on_cpu, require_vllm, settings
from .record import record_of, to_record
from .switches import Switches

# Options of an engine, by vLLM's own names
ENGINE = (
    "max_model_len",
    "max_num_seqs",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "tensor_parallel_size",
    "enable_prompt_embeds",
)


class VLLMDecoder(CompletionDecoder):
    """Decodes with vLLM's engine, which runs in processes of its own and is shared by all decoders
    that ask for the same model, dtype and options; it starts at the first decode (some 20 s) or by
    `start`, and ends when the last of them is closed, at the latest with the program.

    Args:
        model: as for softar.load. sampling: fields of Sampling, by name.
        seed: of the draws; a second decode draws other numbers.
        trace: each row gets a softar.show.trace.Trace: of mode soft what was fed back, of the
            others the tokens.
        engine: options of vllm.LLM, out of ENGINE.
    """

    def __init__(
        self,
        model,
        *,
        seed: int = 0,
        trace: bool = False,
        dtype: str = "auto",
        name=None,
        columns=None,
        **options,
    ):
        sampling, engine = split_options(options, ENGINE)
        super().__init__(
            os.fspath(model),
            Sampling(**sampling),
            seed=seed,
            trace=trace,
            name=name,
            columns=columns,
        )
        if is_code(mixer := (self.sampling.soft or {}).get("mixer", "soft")):
            engine["mixers"] = (mixer,)  # its requests name what this program has named
        self.key = (self.model, dtype, tuple(sorted(engine.items())))
        self._engine: _Engine | None = None

    def start(self) -> None:
        """Raises ImportError where vLLM is not installed, RuntimeError outside `if __name__ ==
        "__main__":`."""
        if self._engine is None:
            engine = _ENGINES.get(self.key) or _Engine(*self.key)
            _ENGINES[self.key] = self._engine = engine
            engine.users += 1
        self.tokenizer = self._engine.tokenizer

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.users -= 1
            if engine.users == 0:
                engine.stop()

    def decode(self, prompts: list) -> list[Decoded]:
        self.start()
        llm, tokenizer, limit = self._engine.llm, self.tokenizer, self._engine.max_model_len
        began = time.perf_counter()
        prefix = self.sampling.prompt_prefix
        ids = [token_ids(tokenizer, prompt, prefix) for prompt in prompts]
        for i, row in enumerate(ids):
            if not 0 < len(row) <= limit - self.sampling.max_new_tokens:
                raise ValueError(
                    f"prompt {i} has {len(row)} tokens: with max_new_tokens={self.sampling.max_new_tokens} the model "
                    f"takes 1 to {limit - self.sampling.max_new_tokens} (max_model_len={limit})"
                )
        try:
            self.completions = (
                self._beams(llm, ids) if self.sampling.mode == "beam" else self._samples(llm, ids)
            )
        except Exception:
            if llm.llm_engine.engine_core.resources.engine_dead:  # the next decode starts another
                self._engine.stop()
                self._engine = None
            raise
        share = (time.perf_counter() - began) / max(len(ids), 1)
        return self.rows(prompts, ids, self.completions, share)

    def _samples(self, llm, ids) -> list[list[Completion]]:
        from vllm import SamplingParams

        s = self.sampling
        params = [
            SamplingParams(
                n=s.count,
                **s.choice,
                seed=seed if s.draws or s.soft is not None else None,
                extra_args=None if s.soft is None else {"soft": self.soft},
                max_tokens=s.max_new_tokens,
                logprobs=s.logprobs,
                stop=self.stop_strings,
                skip_special_tokens=False,  # an end of chats may be such a string
                detokenize=bool(self.stop_strings),
            )
            for seed in self.seeds(len(ids))
        ]
        outs = llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        for output in (output for out in outs for output in out.outputs):
            check_ended(output)
        if s.soft is not None and self.soft["record"]:
            return [[self._recorded(out.outputs[0])] for out in outs]
        return [[self._completion(o.token_ids, o.logprobs) for o in out.outputs] for out in outs]

    def _beams(self, llm, ids) -> list[list[Completion]]:
        from vllm.sampling_params import BeamSearchParams

        params = BeamSearchParams(
            beam_width=self.sampling.num_beams, max_tokens=self.sampling.max_new_tokens
        )
        outs = llm.beam_search([{"prompt_token_ids": row} for row in ids], params)
        return [
            [self._completion(s.tokens[len(row) :], s.logprobs) for s in out.sequences]
            for row, out in zip(ids, outs)
        ]

    def _completion(self, tokens, logprobs) -> Completion:
        steps = logprobs and tuple({i: p.logprob for i, p in step.items()} for step in logprobs)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Completion(text, tuple(tokens), steps)

    def _recorded(self, output) -> Completion:
        completion = self._completion(output.token_ids, None)
        return replace(completion, record=to_record(record_of(output)))


class _Engine:
    """vllm.LLM and what it needs around it."""

    def __init__(self, model: str, dtype: str, options: tuple):
        require_vllm()
        _check_guarded()
        self.key, self.users = (model, dtype, options), 0
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(exported(model, dtype))
            quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
            with environment(settings(folder) | quiet):
                from vllm import LLM

                plain = dict(enable_prefix_caching=False, max_logprobs=-1, seed=0)
                # see server.py
                plain |= dict(enforce_eager=True, enable_chunked_prefill=False) if on_cpu() else {}
                given = dict(options)
                if mixers := given.pop("mixers", ()):
                    plain["additional_config"] = Switches(soft=True, mixers=mixers).entry
                self.llm = LLM(
                    folder,
                    dtype=served_dtype(folder, dtype),
                    disable_log_stats=True,
                    **{**plain, **given},
                )
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self.max_model_len = self.llm.llm_engine.model_config.max_model_len
            self._files = stack.pop_all()
        # before the interpreter takes itself apart, which vLLM would complain of
        atexit.register(self.stop)

    def stop(self) -> None:
        if _ENGINES.get(self.key) is self:
            del _ENGINES[self.key]
        atexit.unregister(self.stop)
        self.llm.llm_engine.engine_core.shutdown()
        self._files.close()


_ENGINES: dict[tuple, _Engine] = {}


def _check_guarded() -> None:
    """vLLM starts processes by spawn, and they run the program's file again up to `if __name__ ==
    "__main__":`."""
    file = vars(sys.modules["__main__"]).get("__file__")
    # a notebook, python -c; a fork
    if file is None or not (on_cpu() or torch.cuda.is_initialized()):
        return
    frame = sys._getframe()
    while frame and not (
        frame.f_globals.get("__name__") == "__main__" and frame.f_code.co_name == "<module>"
    ):
        frame = frame.f_back
    if (
        frame is None
        or not Path(file).is_file()
        or not Path(file).samefile(frame.f_code.co_filename)
    ):
        return
    guards = [
        node
        for node in ast.parse(Path(file).read_bytes()).body
        if isinstance(node, ast.If)
        and any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))
    ]
    if not any(node.lineno <= frame.f_lineno <= node.end_lineno for node in guards):
        raise RuntimeError(
            f'{file}, line {frame.f_lineno}: put it under `if __name__ == "__main__":`, as vLLM\'s engine starts '
            f"processes that run this file again; or give a url= of `softar serve`"
        )
