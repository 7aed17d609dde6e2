"""What a step of soft SFT takes, and how near its gradient is to the exact one, by length of the thought.

# Sequential steps with a cache beside parallel refreshes, whole vocabulary beside the most likely tokens
python recipes/bench_soft_sft.py --lengths 8 32 128 512 --seeds 0 1 2

# What a long prompt costs
python recipes/bench_soft_sft.py --prompt 300 --lengths 16 128 --batch 8 --vocab 512

# A sequential step on prompts of 20 to 300 tokens, beside prompts that all have 300
python recipes/bench_soft_sft.py --ragged --lengths 8 --batch 16
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softar.mixers import guide
from softar.sft.forward import soft_forward
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
    args = parser.parse_args()
    torch.set_num_threads(1)
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
