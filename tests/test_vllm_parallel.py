"""Soft decoding inside vLLM with the model split over two processes, beside softar.generate.

This file is also the script that the engine runs in: `python tests/test_vllm_parallel.py FOLDER`.
"""

import json
import sys
from pathlib import Path

import pytest
import tiny
from engine_script import ENGINE, FORKING, answers, cases, expected, model_of, run_script, same

pytestmark = pytest.mark.rest

NUMBER = 24
RANKS = 2


def main(folder):
    from vllm import LLM

    llm = LLM(str(folder), **ENGINE, tensor_parallel_size=RANKS, distributed_executor_backend="mp")
    (folder / "out.json").write_text(json.dumps(answers(llm, cases(NUMBER))))
    llm.llm_engine.engine_core.shutdown()


def test_split_over_two_processes_requests_of_all_kinds_equal_the_loop(tmp_path):
    """Each holds half of the vocabulary's rows, so that a mixture is read from both."""
    model, requests = model_of("llama"), cases(NUMBER)
    model.save_pretrained(tmp_path)
    tiny.tokenizer_of().save_pretrained(tmp_path)
    rows = run_script(__file__, tmp_path, **FORKING, VLLM_CPU_OMP_THREADS_BIND="nobind")
    loop = expected(model, requests)
    assert [tokens for tokens, _ in rows] == [tokens for tokens, _ in loop]
    records = [(steps, record) for (_, steps), (_, record) in zip(rows, loop) if steps is not None]
    for steps, record in records:
        same(steps, record)
    kinds = [soft is None for _, soft, *_ in requests]
    assert len(records) > 5 and any(kinds) and len({soft for _, soft, *_ in requests}) >= 10


if __name__ == "__main__":
    main(Path(sys.argv[1]))
