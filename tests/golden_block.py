"""The checks of the block-causal families and the others of 2026 (golden-block/README.md)."""

import torch
from golden_dllm import check_block_sample, check_num_transfer, check_sample
from golden_folder import checkpoint, tensor
from golden_revise import REVISE_CHECKS
from golden_sampler import SAMPLER_CHECKS
from transformers import DynamicCache

from softar.diffusion.doubled import doubled
from softar.diffusion.net import parts


def seen(length, block_length, real=None):
    """[1 or B, 1, L, L] bool: blocks see themselves and those before them; without a block length
    all. real: [B, L], what is no padding, which sees itself alone."""
    columns = torch.arange(length)
    blocks = columns // (block_length or length)
    mask = (blocks[None] <= blocks[:, None])[None]
    if real is not None:
        mask = mask & real[:, None].bool() | torch.eye(length, dtype=torch.bool)
    return mask[:, None]


def check_logits(folder, family, case):
    net, ids = parts(checkpoint(folder, case["checkpoint"])), torch.tensor(case["ids"])
    want = tensor(folder, family, f"{case['id']}.logits")
    real, positions = (
        None if case.get(name) is None else torch.tensor(case[name])
        for name in ("attention_mask", "position_ids")
    )
    block_length = case.get("block_length")
    seen_by = seen(ids.shape[1], block_length, real)
    keep = torch.ones(ids.shape, dtype=torch.bool) if real is None else real.bool()
    with torch.no_grad():
        embeds = net.embedding(ids)
        masks = [seen_by]
        if not block_length:  # then one of two dimensions, or none, says the same
            masks += [real, None] if real is None or real.all() else [real]
        for mask in masks:
            got = net.head(net.body(embeds, mask, positions, None))
            torch.testing.assert_close(got[keep], want[keep], atol=1e-3, rtol=0)
        if "cached_window" in case:
            lo, hi = case["cached_window"]
            memory, columns = DynamicCache(), torch.arange(hi)[None]
            net.body(embeds[:, :lo], seen_by[..., :lo, :lo], columns[:, :lo], memory)
            window = net.body(embeds[:, lo:hi], seen_by[..., lo:hi, :hi], columns[:, lo:], memory)
            torch.testing.assert_close(net.head(window), want[:, lo:hi], atol=1e-3, rtol=0)


def check_doubled(folder, family, case):
    """The public code of packed rows lays a document's two copies side by side; softar those of
    the row."""
    lengths = case.get("lengths") or [case["length"]]
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    positions, sees = doubled(documents[None], case["block_length"])
    order = (2 * documents.repeat(2) + torch.arange(2).repeat_interleave(len(documents))).argsort(
        stable=True
    )
    want = case.get("concat_position_ids", [case.get("position_ids")])
    assert positions[:, order].tolist() == want
    rows = sees[0, 0, order][:, order].int().tolist()
    assert ["".join(map(str, row)) for row in rows] == case["attention_rows"]
    if "concat_ids" in case:
        both = torch.tensor([case["noisy_ids"][0] + case["ids"][0]])
        assert both[:, order].tolist() == case["concat_ids"]


BLOCK_CHECKS = {
    "a2d_generate": check_sample,
    "a2d_logits": check_logits,
    "bd3lm_generate": check_block_sample,
    "fastv2_logits": check_logits,
    "llada2_logits": check_logits,
    "sdar_logits": check_logits,
    "unit_bd3lm_train_mask": check_doubled,
    "unit_sdar_train_inputs": check_doubled,
    "unit_dllm_num_transfer": check_num_transfer,
    **REVISE_CHECKS,
    **SAMPLER_CHECKS,
}
