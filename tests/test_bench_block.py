"""recipes/bench_block.py on a net of nothing: the same tokens with and without the cache, and by a loop
like SDAR's, and a table of what each took."""

import json
import sys

import pytest
import torch
from test_block_causal import block_model

from softar.recipes import bench_block

LOOP = '''
import torch
from transformers import DynamicCache

def block_diffusion_generate(model, prompt, mask_id, gen_length, block_length, **how):
    """One token in each forward, from left to right, as SDAR's does it."""
    assert how == dict(denoising_steps=block_length, top_k=1, remasking_strategy="sequential")
    ids = prompt["input_ids"]
    P = ids.shape[1]
    blocks = -(-(P + gen_length) // block_length)
    x = torch.full((1, blocks * block_length), mask_id)
    x[:, :P] = ids
    b = torch.arange(x.shape[1]) // block_length
    mask, cache = (b <= b[:, None]).float()[None], DynamicCache()

    def run(lo, hi, store):
        return model(x[:, lo:hi], attention_mask=mask[:, lo:hi, :hi], use_cache=True,
                     position_ids=torch.arange(lo, hi)[None], past_key_values=cache, store_kv=store)

    lo = P // block_length * block_length
    if lo:
        run(0, lo, True)
    for lo in range(lo, x.shape[1], block_length):
        while (masked := x[0, lo:lo + block_length] == mask_id).any():
            i = int(masked.nonzero()[0])
            logits = run(lo, lo + block_length, False).logits[0, i]
            logits[mask_id] = -torch.inf
            x[0, lo + i] = logits.argmax()
        run(lo, lo + block_length, True)
    return x
'''


@pytest.mark.parametrize("loop", [LOOP, LOOP.replace("argmax()", "topk(2).indices[1]")])
def test_it_times_the_same_tokens(loop, tmp_path, monkeypatch):
    (tmp_path / "generate.py").write_text(loop)
    monkeypatch.setitem(
        bench_block.FAMILIES, "sdar", (lambda b: block_model(), bench_block.sdar_loop, 4)
    )
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.arange(1, 8)[None])
    words = "--prompt 7 --new_tokens 9 --repeats 2 --soften hard soft-token"
    out = ["--against", str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_block.py", *words.split(), *out])
    if loop is not LOOP:
        with pytest.raises(SystemExit, match="public: other tokens than hard decoding's"):
            bench_block.main()
        return
    bench_block.main()
    rows = json.loads((tmp_path / "bench_block.json").read_text())["rows"]
    assert [row["sampler"] for row in rows] == ["hard", "soft-token", "hard, no cache", "public"]
    assert rows[0]["forwards"] == 1 + 2 + 9 and rows[2]["forwards"] == 9
    assert all(row["tokens_per_s"] > 0 and len(row["seconds"]) == 2 for row in rows)
