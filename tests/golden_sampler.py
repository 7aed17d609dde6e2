"""The checks of SDAR's samplers and LLaDA2.0's."""

import torch
from golden_folder import checkpoint, tensor
from tiny import left_padded

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.select import Selector, believed, filtered


def run(folder, family, case, config, ids, mask, **options):
    """The run of a case: the number of forwards and the first logits are as recorded. -> its
    output."""
    model = checkpoint(folder, case["checkpoint"])
    hidden = []
    hook = model.model.register_forward_hook(
        lambda module, args, output: hidden.append(output.last_hidden_state)
    )
    try:
        output = denoise(model, ids, mask, config=config, history=True, **options)
    finally:
        hook.remove()
    assert output.num_forwards == case["nfe"]
    want = tensor(folder, family, f"{case['id']}.logits0")
    if want is not None:
        got = model.lm_head(hidden[0]).detach()
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    return output


def decoded(folder, family, case, config, cut=None, **options):
    """The run of a case: every canvas is as recorded, too. cut: row of the last canvas -> what is
    recorded of it, where a row is shorter at the end or before. -> its output."""
    ids, mask = torch.tensor(case["prompt_ids"]), case.get("attention_mask")
    output = run(folder, family, case, config, ids, mask and torch.tensor(mask), **options)
    start = case["states_start"]
    states = [state[:, start:].tolist() for state in output.states]
    if cut is not None:  # columns that a canvas had not yet, or not any more, are recorded as masks
        width, mask_id = len(case["states"][0][0]), mask_of(folder, case)
        states[-1] = [cut(row) for row in states[-1]]
        states = [[row + [mask_id] * (width - len(row)) for row in state] for state in states]
        assert all(i == mask_id for state in states for row in state for i in row[width:])
        states = [[row[:width] for row in state] for state in states]
    assert states == case["states"]
    return output


def mask_of(folder, case):
    return checkpoint(folder, case["checkpoint"]).config.mask_token_id


def check_returned(folder, case, rows):
    """rows: what the public function would return."""
    assert rows == case["expected_ids"]
    if "leaves_mask" in case:
        assert any(mask_of(folder, case) in row for row in rows) == case["leaves_mask"]


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
        early_stop=p["eos_early_stop"] or None,  # None: after whole blocks only
    )
    rows = decoded(folder, family, case, config).sequences.tolist()
    if is_own:
        rows = answers(case, rows, length, end)
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


def check_fast_v2_batch(folder, family, case):
    """The public function pads rows on the right, softar prompts on the left: columns are those of
    a row's own canvas here. Of a row that has stopped, softar writes the stop token over all that
    is left, at once; the public function pads the rest of its block, then one token more, and
    returns the row as long as it was then. What a canvas did not hold yet is recorded as masks, a
    prompt's own tokens too."""
    rows, mask_id, stop = case["prompt_ids"], mask_of(folder, case), case["params"]["stop_token"]
    ids, real = left_padded(rows)
    config = fast_config(case, "fast_dllm_v2_batch")
    output = run(folder, family, case, config, ids, real)
    begin = (~real.bool()).sum(1).tolist()
    width = ids.shape[1] - max(begin) + output.completions.shape[1]
    pads, final = set(), case["expected_ids"]

    def own(sequences):
        """Each row's from its first token on."""
        rows = sequences.tolist()
        return [row[start : start + width] for row, start in zip(rows, begin, strict=True)]

    for state, recorded in zip(output.states, case["states"], strict=True):
        for row, got, want in zip(rows, own(state), recorded, strict=True):
            want = want + [mask_id] * (width - len(want))
            for c in (c for c in range(width) if got[c] != want[c]):
                if c < len(row):
                    assert want[c] in (mask_id, row[c])
                else:
                    assert got[c] == stop and stop in got[len(row) : c]
                    pads |= {want[c]} - {mask_id}
    assert len(pads) <= 1
    for row, got, want in zip(rows, own(output.sequences), final, strict=True):
        is_cut = stop in want[len(row) :] and want[-1] in pads
        end = want.index(stop, len(row)) + 1 if is_cut else len(want)
        assert got[:end] == want[:end] and {*want[end:]} <= pads
        assert {*got[len(want) :]} <= {stop}
    assert any(mask_id in row for row in final) == case["leaves_mask"]


def answers(case, rows, length, end):
    """What LLaDA2's own function returns of its canvas: answers up to their first end token."""
    width = len(case["prompt_ids"][0])
    rows = [row[: width + length] for row in rows]
    return [row[: row.index(end, width) + 1 if end in row[width:] else None] for row in rows]


SAMPLER_CHECKS = {
    "fastv2_batch": check_fast_v2_batch,
    "fastv2_generate": check_fast_v2,
    "llada2_generate": check_llada2,
    "sdar_eval": check_sdar,
    "sdar_generate": check_sdar,
    "sdar_generate_seeded": check_sdar,
}
