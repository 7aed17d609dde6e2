"""recipes/bench_block.py on a net of nothing: the same tokens with and without the cache, and by a loop
like SDAR's, and a table of what each took."""

import copy
import json
import sys

import pytest
import torch
from test_block_causal import block_model
from test_denoise import MASK
from test_renoised import gemma

from softar.recipes import bench_block

MASK_ID = torch.tensor([MASK])

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


FAST = '''
import a_package_that_is_not_here

class Fast_dLLM_QwenForCausalLM(a_package_that_is_not_here.Model):
    @a_package_that_is_not_here.decorated
    def generate(self, ids, max_new_tokens, mask_id, stop_token, block_size, small_block_size,
                 use_block_cache=False):
        """One token in each forward of a sub-block, as Fast-dLLM v2's does it."""
        b, sub, memory = block_size, small_block_size, None
        if (lo := ids.shape[1] // b * b):
            out = self.forward(input_ids=ids[:, :lo], use_cache=True, update_past_key_values=True,
                               block_size=b)
            memory = out.past_key_values
            if lo == ids.shape[1]:
                ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        for _ in range(max_new_tokens // b):
            more = ids.new_full((1, b - ids.shape[1] % b), mask_id)
            x, kept = torch.cat([ids, more], 1)[:, -b:], None
            for s in range(0, b, sub):
                while (x[0, s:s + sub] == mask_id).any():
                    how = dict(use_cache=True, past_key_values=memory, block_size=b)
                    if use_block_cache:
                        how |= dict(use_block_cache=True)
                    if use_block_cache and kept is not None and x[0, s] != mask_id:
                        how |= dict(block_past_key_values=kept, replace_position=s)
                        logits = self.forward(input_ids=x[:, s:s + sub], **how).logits
                        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
                    else:
                        out = self.forward(input_ids=x, **how)
                        kept = out.block_past_key_values
                        logits = torch.cat([out.logits[:, :1], out.logits[:, :-1]], 1)[:, s:s + sub]
                    top = self.sample_with_top_p(logits)
                    best = s + int(top.values.masked_fill(x[:, s:s + sub] != mask_id, -1).argmax())
                    x[0, best] = top.indices[0, best - s]
            out = self.forward(input_ids=x, use_cache=True, past_key_values=memory, block_size=b,
                               update_past_key_values=True)
            memory = out.past_key_values
            ids = torch.cat([torch.cat([ids, more], 1)[:, :-b], x, out.logits[:, -1:].argmax(-1)], 1)
        return ids

    def sample_with_top_p(self, logits):
        return F.softmax(logits.float(), -1).max(-1)
'''


def benched(monkeypatch, tmp_path, words, **families):
    """-> the rows of a run, over other models."""
    for name, build in families.items():
        family = bench_block.FAMILIES[name]._replace(
            build=lambda args, build=build: copy.deepcopy(build())
        )
        monkeypatch.setitem(bench_block.FAMILIES, name, family)
    words = f"--repeats 2 --output {tmp_path} {words}"
    monkeypatch.setattr(sys, "argv", ["bench_block.py", *words.split()])
    bench_block.main()
    rows = json.loads((tmp_path / "bench_block.json").read_text())["rows"]
    assert all(row["tokens_per_s"] > 0 and len(row["seconds"]) == 2 for row in rows)
    return {row["sampler"]: row["forwards"] for row in rows}


@pytest.mark.parametrize("loop", [LOOP, LOOP.replace("argmax()", "topk(2).indices[1]")])
def test_it_times_the_same_tokens(loop, tmp_path, monkeypatch):
    (tmp_path / "generate.py").write_text(loop)
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.arange(1, 8)[None])
    words = f"--prompt 7 --new_tokens 9 --soften hard soft-token --against {tmp_path}"
    if loop is not LOOP:
        with pytest.raises(SystemExit, match="public: other tokens than hard"):
            benched(monkeypatch, tmp_path, words, sdar=block_model)
        return
    forwards = benched(monkeypatch, tmp_path, words, sdar=block_model)
    with_cache = 1 + 2 + 9
    assert forwards == {
        "hard": with_cache, "soft-token": with_cache, "hard, no cache": 9, "public": with_cache + 1
    }  # fmt: skip


@pytest.mark.parametrize("prompt", [7, 8])
def test_it_times_fast_dllm_v2_with_both_caches(prompt, tmp_path, monkeypatch):
    (tmp_path / "modeling.py").write_text(FAST)
    ids = torch.arange(2, 2 + prompt)[None]
    monkeypatch.setattr(torch, "randint", lambda low, high, size: ids)
    words = "--family fast_dllm_v2 --block_length 4 --sub_block_length 2 --new_tokens 9"
    words += f" --soften hard --against {tmp_path}"
    forwards = benched(
        monkeypatch, tmp_path, words, fast_dllm_v2=lambda: no_masks(block_model(1, 4))
    )
    assert [*forwards] == [
        "hard", "hard, no cache", "public", "block cache", "block cache, parity",
        "public, block cache",
    ]  # fmt: skip
    assert forwards["public"] == forwards["public, block cache"] == forwards["block cache, parity"]


def no_masks(model):
    """It never proposes its mask, as if it had learnt that."""
    model = copy.deepcopy(model)
    model.lm_head.register_forward_hook(lambda module, args, z: z.index_fill(-1, MASK_ID, -1e4))
    return model


def test_it_times_diffusion_gemma_beside_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randint", given_ids(torch.tensor([[5, 6, 7]]), torch.randint))
    words = "--family diffusion_gemma --block_length 8 --new_tokens 16 --steps 3 --soften hard"
    forwards = benched(
        monkeypatch, tmp_path, words, diffusion_gemma=gemma.__wrapped__
    )  # of its own: it is frozen
    assert forwards == dict.fromkeys(["as trained", "hard", "parity", "public"], 2 * (1 + 3))


def given_ids(ids, randint):
    """The bench's draw, of ids up to 150,000, gives these."""
    return lambda *args, **how: ids if args[1:2] == (150_000,) else randint(*args, **how)
