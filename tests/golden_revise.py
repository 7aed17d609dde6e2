"""The checks of the samplers that write over decoded tokens: LLaDA2.1's editing and DMax's soft
parallel decoding."""

import torch
from golden_folder import checkpoint, tensor
from golden_sampler import answers, check_returned, decoded

from softar.diffusion import DenoiseConfig
from softar.diffusion.net import facts, parts
from softar.diffusion.rules import Block, Step
from softar.diffusion.select import Belief, Draws
from softar.diffusion.soften import Slots, mk_softener
from softar.soft import soft_embed


def check_llada21(folder, family, case):
    p = case["params"]
    end = p.get("eos_id", checkpoint(folder, case["checkpoint"]).config.eos_token_id)
    knobs = ("editing_threshold", "max_post_steps", "num_to_transfer")
    config = DenoiseConfig(
        parity="llada21",
        cache="off",
        gen_length=p["gen_length"],
        block_length=p["block_length"],
        threshold=p["threshold"],
        schedule_args={knob: p[knob] for knob in knobs},
        temperature=p["temperature"],
        end_ids=(end,),
        early_stop=p["eos_early_stop"],
    )
    rows = decoded(folder, family, case, config).sequences.tolist()
    check_returned(folder, case, answers(case, rows, p["gen_length"], end))


def check_dmax(folder, family, case):
    p = case["params"]
    config = DenoiseConfig(
        parity="dmax",
        soften="soft-decoded",
        soften_args={"k": p["top_k"]},
        rescale="norm",
        gen_length=p["gen_length"],
        block_length=p["block_length"],
        threshold=p["threshold"],
        temperature=p["temperature"],
        end_ids=(p["eos_id"],),
        early_stop=p["early_stop"],
    )
    check_returned(folder, case, decoded(folder, family, case, config).sequences.tolist())


def check_dmax_step(folder, family, case):
    """One step of the rule, and what its softener makes of the block."""
    p, model = case["params"], checkpoint(folder, case["checkpoint"])
    mask_id, embedding = facts(model).mask_id, parts(model).embedding
    logits, before, want = (
        tensor(folder, family, f"{case['id']}.{name}")
        for name in ("logits", "prev_embeddings", "embeddings")
    )
    block = slice(*p["block"])
    ids, active = torch.tensor(case["ids"])[:, block], torch.tensor(case["active"]).bool()
    belief = Belief(logits.flatten(0, 1))
    token = belief.top_token.view_as(ids)
    prob = belief.prob(token.view(-1, 1)).view_as(ids).masked_fill(~active, -torch.inf)
    config = DenoiseConfig(parity="dmax", threshold=p["threshold"])
    count = (ids == mask_id).sum(1)
    rule = config.scheduler(Block(*p["block"], count, count), config, Draws(None, 1, ids.device))
    is_open = active & (ids == mask_id)
    step = Step(0, prob, is_open, active & ~is_open, prob, prob, prob, active & (token != ids))
    commit, drop = rule(step)
    after = torch.where(commit, token, ids)
    assert after.tolist() == [row[block] for row in case["expected_ids"]] and drop is None
    assert rule.more(1, bool((after == mask_id).any())) != case["stop"]
    if want is None:
        return
    shows = active & (after != mask_id)
    masked = (after == mask_id).flatten()
    slots = Slots(belief, after.flatten(), masked, None, mask_id, embedding)
    soft = mk_softener("soft-decoded", k=p["top_k"]).fn(slots)
    with torch.no_grad():
        mixed = soft_embed(soft, embedding, rescale="norm").view_as(want)
        tokens = embedding(after)
        stands = (
            tokens if before is None else torch.where((after != ids)[..., None], tokens, before)
        )
    torch.testing.assert_close(
        torch.where(shows[..., None], mixed, stands), want, atol=1e-4, rtol=0
    )


REVISE_CHECKS = {
    "dmax_generate": check_dmax,
    "llada21_generate": check_llada21,
    "unit_dmax_step": check_dmax_step,
}
