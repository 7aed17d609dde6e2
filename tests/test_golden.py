"""Conformance: every recorded case of the public samplers, one test each, through the public API.

    pytest tests/test_golden.py
    SOFTAR_GOLDEN=folder[:folder...] pytest tests/test_golden.py  # other data of the same schema

A folder holds cases/<family>.json, tensors/<family>.safetensors and checkpoints/ (its README
describes the fields). Nothing here knows these checkpoints: ids and sizes come from their
configurations.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from golden_block import BLOCK_CHECKS
from golden_folder import checkpoint, readme, tensor

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.net import facts, parts
from softar.diffusion.parity import PARITY, due, gumbel_scores
from softar.diffusion.reader import WindowCache
from softar.diffusion.schedules import Block, Step, share_out
from softar.diffusion.select import SELECTORS, Belief, Draws, believed, best, filtered, propose
from softar.diffusion.soften import Slots, evolving, soft_mask, soft_token
from softar.soft import Soft, dense, soft_embed

HERE = Path(__file__).parent
FOLDERS = [HERE / "golden", HERE / "golden-block"]
if "SOFTAR_GOLDEN" in os.environ:
    FOLDERS = [Path(p) for p in os.environ["SOFTAR_GOLDEN"].split(os.pathsep)]
SELECT = {
    "low_confidence": "confidence",
    "random": "random",
    "maskgit_plus": "confidence",
    "confidence_threshold": "confidence",
    "topk_margin": "margin",
    "entropy": "entropy",
}
FAST_CACHE = {
    "generate": None,
    "generate_with_prefix_cache": "prefix",
    "generate_with_dual_cache": "dual",
}
VERSIONS = {"0d6d48d": "fast_dllm", "24cc59e": "fast_dllm_2025_06", "a9b81e4": "fast_dllm_2026_05"}


def read_cases():
    for folder in FOLDERS:
        files = sorted((folder / "cases").glob("*.json"))
        if not files:
            raise FileNotFoundError(f"SOFTAR_GOLDEN: there are no cases/*.json in {folder}")
        for file in files:
            for case in json.loads(file.read_text()):
                yield pytest.param(folder, file.stem, case, id=f"{folder.name}-{case['id']}")


@pytest.mark.parametrize(("folder", "family", "case"), list(read_cases()))
def test_case(folder, family, case):
    assert family in CHECKS, f"no check for the family {family!r}"
    CHECKS[family](folder, family, case)


# -- whole runs


def run(folder, case, config, **options):
    """-> the output, and the raw logits of each forward (whatever it covered)."""
    model = checkpoint(folder, case["checkpoint"])
    mask = case.get("attention_mask")
    hidden = []
    hook = model.model.register_forward_hook(
        lambda module, args, output: hidden.append(output.last_hidden_state)
    )
    try:
        output = denoise(
            model,
            torch.tensor(case["prompt_ids"]),
            None if mask is None else torch.tensor(mask),
            config=config,
            history=True,
            **options,
        )
    finally:
        hook.remove()
    with torch.no_grad():
        return output, [model.lm_head(h) for h in hidden[:3]]


def check_run(folder, family, case, config, **options):
    output, logits = run(folder, case, config, **options)
    assert output.num_forwards == case["nfe"]
    start = case["states_start"]
    states = [state[:, start:].tolist() for state in output.states]
    ids = [case["expected_ids"], case.get("expected_ids_if_lowest_index_wins_ties")]
    assert output.sequences.tolist() in ids
    if output.sequences.tolist() == ids[0]:
        assert states == case["states"]
    if "leaves_mask" in case:
        mask_id = facts(checkpoint(folder, case["checkpoint"])).mask_id
        assert bool((output.sequences == mask_id).any()) == case["leaves_mask"]
    recorded = 0
    for i, got in enumerate(logits):
        want = tensor(folder, family, f"{case['id']}.logits{i}")
        if want is not None:
            keep = real_columns(case, want.shape[1], len(want))
            torch.testing.assert_close(got[keep], want[keep], atol=1e-3, rtol=0)
            recorded += 1
    return output, recorded


def real_columns(case, width, rows):
    """[rows, width] bool: not padding. Guided cases record both halves of a doubled batch."""
    keep = torch.ones(rows, width, dtype=torch.bool)
    mask = case.get("attention_mask")
    if mask is not None and width > len(mask[0]):
        mask = torch.tensor(mask).bool()
        keep[:, : mask.shape[1]] = mask.repeat(rows // len(mask), 1)
    return keep


def llada_config(folder, case, **changes):
    p = case["params"]
    config = checkpoint(folder, case["checkpoint"]).config
    settings = dict(
        gen_length=p["gen_length"],
        block_length=p["block_length"],
        steps=p.get("steps"),
        temperature=p.get("temperature", 0.0),
        cfg_scale=p.get("cfg_scale", 0.0),
        select=SELECT[p.get("remasking", "low_confidence")],
        ban_eos=p.get("logits_eos_inf", False),
        ends_last=p.get("confidence_eos_eot_inf", False),
        end_ids=(config.eos_token_id, end_of_turn(folder, config)),
    )
    return DenoiseConfig(**(settings | changes))


def end_of_turn(folder, config):
    """The one id that no checkpoint names: the folder's README does."""
    found = re.search(r"end-of-turn\W+(\d+)", readme(folder))
    return int(found[1]) if found else config.eos_token_id + 1


def check_llada(folder, family, case):
    check_run(folder, family, case, llada_config(folder, case, parity="llada"))


def check_llada_seeded(folder, family, case):
    rng = torch.Generator().manual_seed(case["params"]["seed"])
    check_run(folder, family, case, llada_config(folder, case, parity="llada"), rng=rng)


def check_pyramidal(folder, family, case):
    check_run(
        folder,
        family,
        case,
        llada_config(
            folder, case, parity="pyramid", schedule_args={"dilation": case["params"]["factor"]}
        ),
    )


def check_fast(folder, family, case):
    p = case["params"]
    rule = (
        dict(factor=p["factor"])
        if p.get("factor") is not None
        else dict(threshold=p.get("threshold"))
    )
    config = dict(cache=FAST_CACHE[case["call"]], **rule)
    own = "fast_dllm_2026_05" if family == "fast_batch" else "fast_dllm"
    check_run(folder, family, case, llada_config(folder, case, parity=own, **config))
    for version, nfe in case.get("nfe_by_version", {}).items():
        output, _ = run(
            folder, case, llada_config(folder, case, parity=VERSIONS[version], **config)
        )
        assert output.num_forwards == nfe, version
        ids = case.get("expected_ids_by_version", {}).get(version, case["expected_ids"])
        assert output.sequences.tolist() == ids, version


def check_soft_dual(folder, family, case):
    p = case["params"]
    knobs = dict(
        k=p["k_soft"], bias=0.5 if p["bias"] is None else p["bias"], renormalise=p["renormalize"]
    )
    config = dict(
        parity="soft_token",
        cache="dual",
        threshold=p["threshold"],
        soften="soft-token",
        soften_args=knobs,
    )
    check_run(folder, family, case, llada_config(folder, case, **config))


def check_evo_plain(folder, family, case):
    check_run(
        folder,
        family,
        case,
        llada_config(folder, case, parity="evotoken", threshold=case["params"]["threshold"]),
    )


def check_evo_soft(folder, family, case):
    p = case["params"]
    knobs = dict(k=p["k_soft"], alpha=p["alpha_soft_mask"])
    config = dict(parity="evotoken", threshold=p["threshold"], soften="evolving", soften_args=knobs)
    check_run(folder, family, case, llada_config(folder, case, **config))


def dream_config(case, **changes):
    p = case["params"]
    settings = dict(
        gen_length=p["max_new_tokens"],
        steps=p["steps"],
        temperature=p["temperature"],
        top_p=p.get("top_p"),
        top_k=p.get("top_k"),
        select=SELECT.get(p["alg"], "confidence"),
        alg_temp=p.get("alg_temp") or 0.0,
        schedule_args={"eps": p.get("eps", 1e-3)},
        parity="dream",
    )
    return DenoiseConfig(**(settings | changes))


def check_dream(folder, family, case):
    check_run(folder, family, case, dream_config(case))


def check_dream_conf(folder, family, case):
    check_run(
        folder,
        family,
        case,
        dream_config(
            case, parity="dream_threshold", threshold=case["params"]["threshold"], schedule_args={}
        ),
    )


def check_dream_block(folder, family, case):
    p = case["params"]
    threshold = p["threshold"] if p["alg"] == "confidence_threshold" else None
    cache = "dual" if p["dual_cache"] else "prefix"
    config = dict(
        parity="dream_block", block_length=p["block_length"], cache=cache, threshold=threshold
    )
    check_run(folder, family, case, dream_config(case, **config))


def check_dream_sm(folder, family, case):
    check_run(
        folder,
        family,
        case,
        dream_config(case, soften="soft-mask", soften_args=soft_mask_knobs(case["params"])),
    )


def check_open_dcoder(folder, family, case):
    p = case["params"]
    rule = {"origin": "open_dcoder_origin", "p2": "open_dcoder_p2"}.get(p["alg"], "open_dcoder")
    knobs = {} if p["alg"] == "p2" else {"eps": p["eps"]}
    rng = torch.Generator().manual_seed(p["seed"]) if "seed" in p else None
    config = dream_config(case, parity=rule, schedule_args=knobs)
    check_run(folder, family, case, config, rng=rng)


def soft_mask_knobs(p):
    return dict(
        k=p["mixinputs_k"],
        scale=p["transparency_scale"],
        centre=p["transparency_centre"],
        steepness=p["transparency_steepness"],
        algorithm={"mixinputs_with_topk": "top-k", "mixinputs_with_temp": "temperature"}[
            p["transparency_alg"]
        ],
        temperature=p["mixture_temp"],
        scheduling=p["transparency_scheduling"],
    )


# -- forwards


def check_logits(folder, family, case):
    model = checkpoint(folder, case["checkpoint"])
    net, ids, call = parts(model), torch.tensor(case["ids"]), case["call"]
    mask = torch.tensor(case["attention_mask"]) if case.get("attention_mask") is not None else None
    positions = torch.tensor(case["position_ids"]) if case.get("position_ids") is not None else None
    memory, lo, hi = None, 0, ids.shape[1]
    with torch.no_grad():
        if "cache" in call:
            memory = WindowCache()
            net.body(net.embedding(torch.tensor(case["ids_cached"])), None, None, memory)
            lo, hi = memory.window = tuple(case["window"])
            positions = torch.arange(lo, hi)[None]
        embeds = net.embedding(ids[:, lo:hi])
        if "soft" in call:
            weights = tensor(folder, family, f"{case['id']}.prob")
            if case["renormalize"]:
                weights = weights.clamp_min(0) / weights.clamp_min(0).sum(
                    -1, keepdim=True
                ).clamp_min(1e-12)
            mixed = soft_embed(Soft(torch.tensor(case["soft_ids"]), weights), net.embedding)
            embeds = torch.where((ids[:, lo:hi] == facts(model).mask_id)[..., None], mixed, embeds)
        if call == "forward_from_mixture":
            mixture = tensor(folder, family, f"{case['id']}.mixture")
            every = torch.arange(mixture.shape[-1]).expand(mixture.shape)
            embeds = soft_embed(Soft(every, mixture), net.embedding)
        got = net.head(net.body(embeds, mask, positions, memory))
    want = tensor(folder, family, f"{case['id']}.logits")
    keep = torch.ones(want.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert got.shape == want.shape
    torch.testing.assert_close(got[keep], want[keep], atol=1e-3, rtol=0)


# -- single functions


def tensors_of(folder, family, case):
    return {name: tensor(folder, family, f"{case['id']}.{name}") for name in case["tensors"]}


def no_draw():
    raise AssertionError("nothing is drawn at temperature 0")


def believe(logits, where):
    """The loop on logits [B, L, V] at temperature 0 -> proposals and probabilities [B, L], -inf off
    `where`."""
    belief = Belief(logits[where])
    token = propose(belief, None, no_draw)
    prob = torch.full(where.shape, -torch.inf)
    prob[where] = SELECTORS["confidence"](belief, token, no_draw)
    return torch.zeros(where.shape, dtype=torch.long).masked_scatter(where, token), prob


def rule_for(parity, where, *, quota=None, **options):
    """A public sampler's rule for one step, which a block of these masks begins; with a quota it
    has that many."""
    count = where.sum(-1) if quota is None else torch.as_tensor(quota).expand(len(where))
    config = DenoiseConfig(parity=parity, **options)
    block = Block(0, where.shape[1], count, torch.ones_like(count))
    return PARITY[parity].rule(block, config, Draws(None, len(where), where.device))


def step_of(score, where, index=0):
    return Step(index, score, where, torch.zeros_like(where), torch.full(score.shape, torch.nan))


def columns(mask):
    return [row.nonzero()[:, 0].tolist() for row in mask]


def check_gumbel(folder, family, case):
    """The loop's own noise: argmax of the logits plus noise of these uniform numbers."""
    t, temperature = tensors_of(folder, family, case), case["params"]["temperature"]
    if temperature == 0:
        assert (
            propose(Belief(t["logits"].flatten(0, 1)), None, no_draw).tolist()
            == torch.tensor(case["argmax"]).flatten().tolist()
        )
        return
    scores = gumbel_scores(t["logits"], t["uniform"], temperature)
    assert scores.argmax(-1).tolist() == case["argmax"]
    # the public form is not in logarithms
    torch.testing.assert_close(scores.exp(), t["output"], rtol=1e-9, atol=0)


def check_num_transfer(folder, family, case):
    p = case["params"]
    got = [share_out(torch.tensor(p["mask_counts"]), p["steps"], i) for i in range(p["steps"])]
    assert torch.stack(got, -1).tolist() == case["expected"]


def check_transfer(folder, family, case):
    t, p = tensors_of(folder, family, case), case["params"]
    token, prob = believe(t["logits"], t["mask_index"])
    rule = rule_for(
        "fast_dllm", t["mask_index"], quota=p["num_transfer_tokens"], threshold=p["threshold"]
    )
    commit, _ = rule(step_of(prob, t["mask_index"]))
    assert columns(commit) == case["transfer_index"]
    for row, got in enumerate(torch.where(t["mask_index"], token, t["x"]).tolist()):
        assert got == case["x0"][row]


def check_dynamic(folder, family, case):
    t = tensors_of(folder, family, case)
    token, prob = believe(t["logits"], t["mask_index"])
    commit, _ = rule_for("fast_dllm", t["mask_index"], factor=case["params"]["factor"])(
        step_of(prob, t["mask_index"])
    )
    assert columns(commit) == case["transfer_index"]
    assert torch.where(t["mask_index"], token, t["x"]).tolist() == case["x0"]
    assert int(commit.sum()) == case["num_transferred"]
    if "confidences" in case:
        ranked = prob[t["mask_index"]].sort(descending=True).values
        torch.testing.assert_close(ranked, torch.tensor(case["confidences"]), atol=1e-5, rtol=0)


def check_soft(folder, family, case):
    t, p = tensors_of(folder, family, case), case["params"]
    model = checkpoint(folder, case["checkpoint"])
    net, ids, mask_id = parts(model), torch.tensor(case["ids"]), facts(model).mask_id
    masked = ids == mask_id
    _, prob = believe(t["logits"], masked)
    assert (
        columns(best(prob, masked, torch.tensor(p["num_transfer_tokens"])))
        == case["transfer_index"]
    )
    slots = Slots(
        Belief(t["logits"].flatten(0, 1)),
        ids.flatten(),
        masked.flatten(),
        None,
        mask_id,
        net.embedding,
    )
    bias = 0.5 if p["bias"] is None else p["bias"]
    for name, renormalise in (("raw", False), ("normalized", True)):
        soft = soft_token(slots, k=p["k_soft"], bias=bias, renormalise=renormalise)
        assert soft.ids.view(*ids.shape, -1).tolist() == case["soft_ids"]
        if not renormalise:
            torch.testing.assert_close(
                soft.weights.view_as(t["prob"]), t["prob"].clamp_min(0), atol=1e-6, rtol=0
            )
        with torch.no_grad():
            mixed = soft_embed(soft, net.embedding).view(*ids.shape, -1)
            embeds = torch.where(masked[..., None], mixed, net.embedding(ids))
            torch.testing.assert_close(embeds, t[f"embed_{name}"], atol=1e-4, rtol=0)
            logits = net.head(net.body(embeds, None, None, None))
        torch.testing.assert_close(logits, t[f"logits_{name}"], atol=1e-3, rtol=0)


def check_sm_mixing(folder, family, case):
    t, p = tensors_of(folder, family, case), case["params"]
    ids, mask_id, logits = torch.tensor(case["ids"]), p["mask_token_id"], t["logits"]
    masked = ids == mask_id
    share = torch.full(ids.shape, case["num_mask"] / p["max_gen_length"]).flatten()
    slots = Slots(
        Belief(logits.flatten(0, 1)), ids.flatten(), masked.flatten(), share, mask_id, None
    )
    got = dense(soft_mask(slots, **soft_mask_knobs(p)), logits.shape[-1])
    torch.testing.assert_close(got.view_as(t["output"]), t["output"], atol=1e-5, rtol=0)
    given = got.view_as(t["output"])[masked].gather(-1, torch.full((int(masked.sum()), 1), mask_id))
    # the belief may hold the mask too
    if "lambda_max" in case and p["transparency_alg"] == "mixinputs_with_topk":
        assert (1 - given).max() <= max(case["lambda_max"], 0) + 1e-5


def check_dream_confidence(folder, family, case):
    t, p = tensors_of(folder, family, case), case["params"]
    logits = t["logits"]
    if p["top_p"] is not None or p["top_k"] is not None:
        dist = filtered(logits, p["temperature"] or 1.0, p["top_k"], p["top_p"], top_p_first=True)
        belief = believed(dist, logits.shape[-1])
    else:
        belief = Belief(logits)
    token = propose(belief, None, no_draw)
    assert token.tolist() == case["x0"]
    got = SELECTORS[SELECT[p["alg"]]](belief, token, no_draw)
    torch.testing.assert_close(got, t["confidence"], atol=1e-5, rtol=0)


def check_dream_schedule(folder, family, case):
    p, left, got = case["params"], case["params"]["num_mask"], []
    for i in range(p["steps"]):
        got.append(due(left, i, p["steps"], p["eps"]))
        left -= got[-1]
    assert got == case["expected"]


def check_evo_step(folder, family, case):
    t, p = tensors_of(folder, family, case), case["params"]
    before = torch.tensor(case["ids_before"])
    masked, columns_in = t["mask_index"], torch.arange(before.shape[1])
    logits = t["logits"].index_fill(-1, torch.tensor(p["mask_id"]), -torch.inf)
    token, prob = believe(logits, torch.ones_like(masked))
    rule = rule_for("evotoken", masked, quota=p["num_transfer_tokens"], threshold=p["threshold"])
    commit, _ = rule(step_of(prob.masked_fill(~masked, -torch.inf), masked))
    assert columns(commit) == case["transfer_index"]
    revised = ~masked & (columns_in >= p["block_start"]) & (prob > t["confidence_before"])
    assert columns(revised) == [case["revised"]]
    after = torch.where(commit | revised, token, before)
    assert after.tolist() == case["ids_after"]
    kept = torch.where(commit | revised, prob.double(), t["confidence_before"])
    torch.testing.assert_close(kept, t["confidence_after"], atol=1e-6, rtol=0)
    slots = Slots(
        Belief(logits.flatten(0, 1)),
        after.flatten(),
        (after == p["mask_id"]).flatten(),
        None,
        0,
        None,
    )
    soft = evolving(slots, k=p["k_soft"], alpha=p["alpha_soft_mask"])
    got = dense(soft, logits.shape[-1]).view(logits.shape)
    want = dense(Soft(torch.tensor(case["soft_ids"]), t["prob"]), logits.shape[-1])
    # what is left of it is one token of weight 1, which the loop never mixes
    inside = columns_in >= p["block_start"]
    torch.testing.assert_close(got[:, inside], want[:, inside], atol=1e-6, rtol=0)


CHECKS = BLOCK_CHECKS | {
    "dream_block": check_dream_block,
    "dream_conf": check_dream_conf,
    "dream_generate": check_dream,
    "dream_logits": check_logits,
    "dream_sm": check_dream_sm,
    "evo_plain": check_evo_plain,
    "evo_soft": check_evo_soft,
    "fast_batch": check_fast,
    "fast_dual": check_fast,
    "fast_generate": check_fast,
    "fast_prefix": check_fast,
    "llada_generate": check_llada,
    "llada_generate_seeded": check_llada_seeded,
    "llada_logits": check_logits,
    "llada_pyramidal": check_pyramidal,
    "opendcoder_generate": check_open_dcoder,
    "soft_dual_norm": check_soft_dual,
    "soft_dual_raw": check_soft_dual,
    "unit_dream_confidence": check_dream_confidence,
    "unit_dream_schedule": check_dream_schedule,
    "unit_dynamic": check_dynamic,
    "unit_evo_step": check_evo_step,
    "unit_gumbel": check_gumbel,
    "unit_num_transfer": check_num_transfer,
    "unit_sm_mixing": check_sm_mixing,
    "unit_soft": check_soft,
    "unit_transfer": check_transfer,
}
