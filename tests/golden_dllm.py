"""The checks of dllm's masked sampler, MDLMSampler, and of its schedules."""

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
    outputs = []
    hook = model.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        out = denoise(model, *left_padded(rows), config=config_of(case), history=True)
    finally:
        hook.remove()
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
