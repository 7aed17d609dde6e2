"""Soft decoding inside vLLM with the model split over two processes, beside softar.generate.

This file is also the script that the engine runs in: `python tests/test_vllm_parallel.py FOLDER`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from test_vllm_soft import ENGINE, SETTINGS, answers, cases, expected, model_of, same

WANTED = 24
RANKS = 2


def main(place):
    from vllm import LLM

    llm = LLM(str(place), **ENGINE, tensor_parallel_size=RANKS, distributed_executor_backend="mp")
    (place / "out.json").write_text(json.dumps(answers(llm, cases(WANTED))))
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.slow
def test_split_over_two_processes_requests_of_all_kinds_equal_the_loop(tmp_path):
    """Each holds half of the vocabulary's rows, so that a mixture is read from both."""
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    tiny.tokenizer_of().save_pretrained(tmp_path)
    settings = SETTINGS | dict(VLLM_CPU_OMP_THREADS_BIND="nobind")
    command = [sys.executable, __file__, str(tmp_path)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    with subprocess.Popen(command, env={**os.environ, **settings}, **pipes) as process:
        try:
            said, _ = process.communicate(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said.decode()[-4000:]
    wanted, found = cases(WANTED), json.loads((tmp_path / "out.json").read_text())
    own = expected(model, wanted)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in own]
    read = [(record, own[i][1]) for i, (_, record) in enumerate(found) if record is not None]
    for record, loop in read:
        same(record, loop)
    kinds = [soft is None for _, soft, *_ in wanted]
    assert len(read) > 5 and any(kinds) and len({soft for _, soft, *_ in wanted}) >= 10


if __name__ == "__main__":
    main(Path(sys.argv[1]))
