"""The checks of dllm's samplers, MDLMSampler and BD3LMSampler, and of its schedules."""

from contextlib import contextmanager

import torch
from golden_folder import checkpoint, tensor
from tiny import left_padded
from transformers import SuppressTokensLogitsProcessor

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.schedules import MASKED, plan

SELECT = {"low_confidence": "confidence", "random": "random"}


def check_num_transfer(folder, family, case):
    p = case["params"]
    count = torch.tensor(p["mask_counts"])
    got = plan(count, torch.full_like(count, p["steps"]), MASKED[p["scheduler"]], "even")
    assert got.tolist() == case["expected"]


def check_sample(folder, family, case):
    """dllm pads rows on the right, behind each one's own canvas, with a token that nobody reads;
    softar pads prompts on the left. So columns are those of a row's own canvas here, and all of
    them are compared, in every state."""
    p, rows = case["params"], case["prompt_ids"]
    model = checkpoint(folder, case["checkpoint"], shift=int(p["right_shift_logits"]))
    with body_outputs(model) as outputs:
        out = denoise(model, *left_padded(rows), config=config_of(case), history=True)
    assert out.num_forwards == case["nfe"] and len(out.states) == len(case["states"])
    width = out.sequences.shape[1]
    for r, row in enumerate(rows):
        length = len(row) + p.get("max_new_tokens", 0)
        for got, want in zip(out.states, case["states"], strict=True):
            own = got[r, width - length :].tolist()
            assert own[case["states_start"] :] == want[r][: length - case["states_start"]]
        assert own == case["expected_ids"][r][:length]
        assert (model.config.mask_token_id in own) <= case["leaves_mask"]
    want = tensor(folder, family, f"{case['id']}.logits0")
    if want is None:
        return
    with torch.no_grad():
        got = model.lm_head(outputs[0].last_hidden_state)
    assert got.shape == want.shape
    for r in range(len(want)):  # guided ones twice
        length = len(rows[r % len(rows)]) + p.get("max_new_tokens", 0)
        own = got[r, width - length :]
        torch.testing.assert_close(own, want[r, :length], atol=1e-3, rtol=0)


def check_block_sample(folder, family, case):
    """dllm pads prompts to whole blocks, and makes two forwards where softar reads with and without
    the prompt in one. Columns are those behind the prompts here."""
    p, rows = case["params"], case["prompt_ids"]
    model = checkpoint(folder, case["checkpoint"], shift=int(p["right_shift_logits"]))
    with body_outputs(model) as outputs:
        out = denoise(model, *left_padded(rows), config=block_config_of(case), history=True)
    width = out.prompt_length
    got = [state[:, width:].tolist() for state in out.states]
    times = 2 if p["cfg_scale"] else 1
    assert out.num_forwards * times == case["nfe"]
    got = [state for state in got[:-1] for _ in range(times)] + got[-1:]
    made = len(case["states"][0][0])  # columns, of which the blocks behind an early end are none
    assert [[row[:made] for row in state] for state in got] == case["states"]
    for row, ids, want in zip(rows, out.sequences.tolist(), case["expected_ids"], strict=True):
        length = len(want) - case["states_start"]  # later blocks were never made
        assert ids[width - len(row) : width + length] == want[case["states_start"] - len(row) :]
    mask_id = model.config.mask_token_id
    assert any(mask_id in row for row in case["expected_ids"]) == case["leaves_mask"]
    want = tensor(folder, family, f"{case['id']}.logits0")
    if want is None:
        return
    with torch.no_grad():
        logits = model.lm_head(outputs[0].last_hidden_state)
    assert logits.shape[1:] == want.shape[1:]
    for r, row in enumerate(rows):
        torch.testing.assert_close(logits[r, -len(row) :], want[r, -len(row) :], atol=1e-3, rtol=0)


def block_config_of(case):
    p = case["params"]
    blocks = -(-p["max_new_tokens"] // p["block_size"])
    return DenoiseConfig(
        parity="dllm_bd3lm",
        gen_length=p["max_new_tokens"],
        block_length=p["block_size"],
        steps=blocks * (p.get("steps_per_block") or -(-p["steps"] // blocks)),
        schedule=p["scheduler"],
        temperature=p["temperature"],
        select=SELECT[p["remasking"]],
        cfg_scale=p["cfg_scale"],
        end_ids=(p["eos_id"],),
    )


@contextmanager
def body_outputs(model):
    """What each forward of the model's body gives."""
    outputs = []
    hook = model.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def config_of(case):
    p = case["params"]
    fills = case["call"].endswith(".infill")
    options = {}
    if p.get("suppress_tokens"):
        options["logits_processor"] = SuppressTokensLogitsProcessor(p["suppress_tokens"])
    if p.get("begin_suppress_tokens"):
        options |= dict(ends_last=True, end_ids=tuple(p["begin_suppress_tokens"]))
    return DenoiseConfig(
        parity="dllm_infill" if fills else "dllm",
        gen_length=0 if fills else p["max_new_tokens"],
        block_length=p["block_size"],
        steps=p["steps"],
        schedule=p["scheduler"],
        temperature=p["temperature"],
        select=SELECT[p["remasking"]],
        cfg_scale=p["cfg_scale"],
        cfg_keep_ids=tuple(p.get("cfg_keep_tokens") or ()) or None,
        **options,
    )
