"""The checks of SDAR's samplers and LLaDA2.0's."""

import torch
from golden_folder import checkpoint, tensor

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.select import Selector, believed, filtered


def decoded(folder, family, case, config, cut=None, **options):
    """The run of a case: every canvas, the number of forwards and the first logits are as recorded.
    cut: row of the last canvas -> what is recorded of it, where a row is shorter at the end or
    before. -> its output."""
    model = checkpoint(folder, case["checkpoint"])
    mask = case.get("attention_mask")
    hidden = []
    hook = model.model.register_forward_hook(
        lambda module, args, output: hidden.append(output.last_hidden_state)
    )
    try:
        ids, mask = torch.tensor(case["prompt_ids"]), mask and torch.tensor(mask)
        output = denoise(model, ids, mask, config=config, history=True, **options)
    finally:
        hook.remove()
    start = case["states_start"]
    assert output.num_forwards == case["nfe"]
    states = [state[:, start:].tolist() for state in output.states]
    if cut is not None:  # columns that a canvas had not yet, or not any more, are recorded as masks
        width, mask_id = len(case["states"][0][0]), model.config.mask_token_id
        states[-1] = [cut(row) for row in states[-1]]
        states = [[row + [mask_id] * (width - len(row)) for row in state] for state in states]
        assert all(i == mask_id for state in states for row in state for i in row[width:])
        states = [[row[:width] for row in state] for state in states]
    assert states == case["states"]
    want = tensor(folder, family, f"{case['id']}.logits0")
    if want is not None:
        got = model.lm_head(hidden[0]).detach()
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    return output


def check_returned(folder, case, rows):
    """rows: what the public function would return."""
    assert rows == case["expected_ids"]
    if "leaves_mask" in case:
        mask_id = checkpoint(folder, case["checkpoint"]).config.mask_token_id
        assert any(mask_id in row for row in rows) == case["leaves_mask"]


def cut(temperature, top_k=None, top_p=None):
    """Confidence in the tempered and cut distribution, though the proposal is its best token."""

    def score(belief, token, uniform):
        dist = filtered(belief.logits, temperature, top_k, top_p)
        return believed(dist, belief.logits.shape[-1]).prob(token[:, None])[:, 0]

    return Selector(score, is_probability=True)


def blocks_of(case):
    """How many blocks hold a part of the answer."""
    p, width = case["params"], len(case["prompt_ids"][0])
    b = p.get("block_length", p.get("block_size"))
    return -(-(width + p.get("gen_length", p.get("max_new_tokens"))) // b) - width // b


def check_sdar(folder, family, case):
    p = case["params"]
    how = p.get("remasking_strategy")
    if how is None:  # the evaluation copy, which is static at a threshold of 1
        how = "static" if p["threshold"] == 1 else "dynamic"
    dynamic = how.endswith("dynamic")
    filters = dict(top_k=p["top_k"] or None, top_p=None if p["top_p"] == 1 else p["top_p"])
    config = dict(
        parity="sdar",
        gen_length=p["gen_length"],
        block_length=p["block_length"],
        steps=p["denoising_steps"] * blocks_of(case),
        threshold=p.get("confidence_threshold", p.get("threshold")) if dynamic else None,
        end_ids=tuple(p.get("stopping_criteria_idx") or ()),
    )
    rng = None
    if p["sampling"] == "seeded":
        config |= dict(temperature=p["temperature"], **filters)
        rng = torch.Generator().manual_seed(p["seed"])
    elif family == "sdar_eval":
        config |= dict(select=cut(p["temperature"]))
    else:
        config |= dict(select=cut(p["temperature"], **filters))
    if how == "sequential":
        config |= dict(select="leftmost")
    output = decoded(folder, family, case, DenoiseConfig(**config), rng=rng)
    check_returned(folder, case, output.sequences.tolist())


def check_llada2(folder, family, case):
    p = case["params"]
    is_own = case["call"] == "generate"
    length = p.get("gen_length", p.get("max_new_tokens"))
    b = p.get("block_length", p.get("block_size"))
    rounds = p.get("steps_per_block") or p["steps"]
    if p.get("minimal_topk"):
        rounds = min(rounds, length // p["minimal_topk"])
    end = p.get("eos_id", checkpoint(folder, case["checkpoint"]).config.eos_token_id)
    config = DenoiseConfig(
        parity="llada2" if is_own else "llada2_dllm",
        cache="off",
        gen_length=length,
        block_length=b,
        steps=rounds * blocks_of(case),
        threshold=p["threshold"],
        end_ids=(end,),
        early_stop=p["eos_early_stop"],
    )
    rows = decoded(folder, family, case, config).sequences.tolist()
    width = len(case["prompt_ids"][0])
    if is_own:  # which returns the answer up to its first end token
        rows = [row[: width + length] for row in rows]
        rows = [row[: row.index(end, width) + 1 if end in row[width:] else None] for row in rows]
    check_returned(folder, case, rows)


def fast_config(case, parity):
    p = case["params"]
    return DenoiseConfig(
        parity=parity,
        gen_length=p["max_new_tokens"],
        block_length=p["block_size"],
        sub_block_length=p["small_block_size"],
        threshold=p["threshold"],
        temperature=p["temperature"],
        cache="dual" if p["use_block_cache"] else None,
        end_ids=(p["stop_token"],),
    )


def check_fast_v2(folder, family, case):
    """The public function returns what stands up to the first stop token, and the last state is
    that."""
    stop, width = case["params"]["stop_token"], len(case["prompt_ids"][0])

    def cut(answer):
        return answer[: answer.index(stop) + 1 if stop in answer else None]

    output = decoded(folder, family, case, fast_config(case, "fast_dllm_v2"), cut)
    rows = output.sequences.tolist()
    check_returned(folder, case, [row[:width] + cut(row[width:]) for row in rows])


SAMPLER_CHECKS = {
    "fastv2_generate": check_fast_v2,
    "llada2_generate": check_llada2,
    "sdar_eval": check_sdar,
    "sdar_generate": check_sdar,
    "sdar_generate_seeded": check_sdar,
}
