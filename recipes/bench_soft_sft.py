"""What a step of soft SFT takes, and how near its gradient is to the exact one, by length of the thought.

# Sequential steps with a cache beside parallel refreshes, whole vocabulary beside the most likely tokens
python recipes/bench_soft_sft.py --lengths 8 32 128 512 --seeds 0 1 2

# What a long prompt costs
python recipes/bench_soft_sft.py --prompt 300 --lengths 16 128 --batch 8 --vocab 512

# A sequential step on prompts of 20 to 300 tokens, beside prompts that all have 300
python recipes/bench_soft_sft.py --ragged --lengths 8 --batch 16

# Examples of 20 to 200 tokens padded to the longest, beside packed rows of 200 and 400
python recipes/bench_soft_sft.py --packed 200 400 --batch 12
"""

import argparse
import statistics
import time

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from softar.mixers import guide
from softar.sft.data import PackedCollator, packed, thought_mask
from softar.sft.forward import soft_forward
from softar.sft.loss import soft_loss
from softar.soft import mk_proba_dist

WAYS = {
    "sequential": dict(mode="sequential"),
    **{f"parallel, {r} passes": dict(mode="parallel", passes=r) for r in (1, 2, 4)},
}
ANSWER = 8
PAIRS = 5


def net(args, seed: int):
    """Wide enough that its beliefs are neither flat nor certain."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=args.width, intermediate_size=3 * args.width)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=args.layers)
    config = LlamaConfig(
        vocab_size=args.vocab, max_position_embeddings=2048, initializer_range=0.1, **shape, **heads
    )
    return LlamaForCausalLM(config).train()


def gradient(model, ids, thought, alpha: float, top_k: int | None, way: dict):
    """-> the gradient of all weights, as one vector, and the processor seconds of forward and
    backward."""
    model.zero_grad()
    prompt = int(thought[0].int().argmax())

    def feed(logits, gold):
        return guide(mk_proba_dist(logits, top_k=top_k), gold, alpha, "mix")

    began = time.process_time()
    last = ids.shape[1] - prompt + 1
    logits = soft_forward(model, ids, None, thought, feed, last=last, **way)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, prompt:])
    loss.backward()
    seconds = time.process_time() - began
    return torch.cat([p.grad.flatten() for p in model.parameters()]), seconds


def measure(args, length: int, top_k: int | None) -> None:
    """A line for each way: seconds of a step, and cosine and relative error against the exact
    gradient, sequential over the whole vocabulary; each lowest to highest over the seeds."""
    rows = {name: [] for name in WAYS}
    for seed in args.seeds:
        model = net(args, seed)
        generator = torch.Generator().manual_seed(seed)
        shape = (args.batch, args.prompt + length + ANSWER)
        ids = torch.randint(args.vocab, shape, generator=generator)
        thought = torch.zeros(shape, dtype=torch.bool)
        thought[:, args.prompt : args.prompt + length] = True
        exact = gradient(model, ids, thought, args.alpha, None, WAYS["sequential"])[0]
        for name, way in WAYS.items():
            found, seconds = gradient(model, ids, thought, args.alpha, top_k, way)
            cosine = torch.cosine_similarity(found, exact, 0).item()
            rows[name].append((seconds, cosine, ((found - exact).norm() / exact.norm()).item()))
    for name, found in rows.items():
        seconds, cosines, errors = (sorted(column) for column in zip(*found, strict=True))
        print(
            f"| {length} | {top_k or 'all'} | {name} | {seconds[len(seconds) // 2]:.2f} "
            f"({seconds[0]:.2f} to {seconds[-1]:.2f}) | {cosines[0]:.4f} to {cosines[-1]:.4f} "
            f"| {errors[0]:.2g} to {errors[-1]:.2g} |",
            flush=True,
        )


def ragged(args, length: int) -> None:
    """A line: processor seconds of a sequential step on prompts of different lengths, padded on the
    right, and on prompts of one length, medians and the ratio of pairs."""
    model, generator = net(args, args.seeds[0]), torch.Generator().manual_seed(args.seeds[0])
    longest, T = 300, 300 + length + ANSWER
    ids = torch.randint(args.vocab, (args.batch, T), generator=generator)
    drawn = torch.randint(20, longest + 1, (args.batch, 1), generator=generator)
    at, took = torch.arange(T), {"ragged": [], "equal": []}

    def feed(logits, gold):
        return guide(mk_proba_dist(logits, top_k=10), gold, args.alpha, "mix")

    for _ in range(PAIRS + 1):  # the first warms up
        for name, prompts in (("ragged", drawn), ("equal", torch.full_like(drawn, longest))):
            thought = (at >= prompts) & (at < prompts + length)
            mask = (at < prompts + length + ANSWER).long()
            model.zero_grad()
            began = time.process_time()
            logits = soft_forward(model, ids, mask, thought, feed, mode="sequential")
            (logits * mask[..., None]).square().mean().backward()
            took[name].append(time.process_time() - began)
    ratios = [a / b for a, b in zip(took["ragged"][1:], took["equal"][1:], strict=True)]
    medians = [statistics.median(seconds[1:]) for seconds in took.values()]
    print(
        f"| {length} | {medians[0]:.2f} | {medians[1]:.2f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


SPAN = dict(start=(), end=(), steps=None)  # the whole completion is thought
MIXTURES = {  # lengths of examples, of numbers in [0, 1)
    "20 to 200": lambda where: 20 + 180 * where,
    "20 to 200, most short": lambda where: 20 * 10**where,
    "13, as MNNS": lambda where: torch.full((8 * len(where),), 13),
}
CASES = [  # and how much of each is thought, passes
    *((name, share, 2) for name in [*MIXTURES][:2] for share in (0.8, 0.4, 0.1)),
    ("20 to 200", 0.8, 0),
    ("13, as MNNS", 0.4, 2),
]


def drawn(args, name: str, share: float) -> list[dict]:
    generator = torch.Generator().manual_seed(args.seeds[0])
    where = torch.rand(args.batch, generator=generator)
    rows = []
    for n in MIXTURES[name](where).long().tolist():
        ids = torch.randint(args.vocab, (n,), generator=generator).tolist()
        prompt = max(1, round((1 - share) * n))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def in_packs(args, name: str, share: float, passes: int) -> None:
    """A line for each length of rows: processor seconds of a step on padded rows and on packed ones,
    medians, and the ratio of pairs."""
    model, examples = net(args, args.seeds[0]), drawn(args, name, share)
    collate = PackedCollator(0)
    batches = {"padded": collate(examples)}
    for length in args.packed:
        rows = packed(Dataset.from_list(examples), length, SPAN)
        batches[length] = collate([*rows])

    def feed(logits, gold):
        return guide(mk_proba_dist(logits, top_k=10), gold, args.alpha, "mix")

    def step(batch) -> float:
        model.zero_grad()
        began = time.process_time()
        labels, mask = batch["labels"], batch["attention_mask"]
        thought = batch.get("thought", thought_mask(batch["input_ids"], labels, **SPAN))
        how = dict(passes=passes, position_ids=batch.get("position_ids"))
        logits = soft_forward(model, batch["input_ids"], mask, thought, feed, **how)
        soft_loss(logits, labels, thought)[0].backward()
        return time.process_time() - began

    took = [{key: step(batch) for key, batch in batches.items()} for _ in range(PAIRS + 1)][1:]
    for length in args.packed:
        batch, gains = batches[length], [times["padded"] / times[length] for times in took]
        medians = [statistics.median(times[key] for times in took) for key in ("padded", length)]
        sizes = ["{} x {}".format(*b["input_ids"].shape) for b in (batches["padded"], batch)]
        print(
            f"| {name} | {share} | {passes} | {sizes[0]}, {medians[0]:.2f} s | "
            f"{sizes[1]}, {medians[1]:.2f} s | {statistics.median(gains):.2f} "
            f"({min(gains):.2f} to {max(gains):.2f}) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, default in (
        ("batch", 4),
        ("prompt", 8),
        ("layers", 3),
        ("width", 64),
        ("vocab", 2048),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--alpha", type=float, default=0.3, help="share of the gold token")
    parser.add_argument("--ragged", action="store_true", help="time prompts of different lengths")
    parser.add_argument("--packed", type=int, nargs="+", help="time packed rows of these lengths")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.packed:
        print(
            "| lengths | thought | passes | padded | packed | times faster |\n|---|---|---|---|---|---|"
        )
        for case in CASES:
            in_packs(args, *case)
        return
    if args.ragged:
        print("| thought | ragged, s | equal, s | ratio |\n|---|---|---|---|")
        for length in args.lengths:
            ragged(args, length)
        return
    print(
        "| thought | top_k | way | s per step | cosine | relative error |\n|---|---|---|---|---|---|"
    )
    for length in args.lengths:
        for top_k in (None, 10, 50):
            measure(args, length, top_k)


if __name__ == "__main__":
    main()
