"""
Measurements behind RESULTS.md; each prints its conditions and a table, and writes its rows to a JSON file.

Examples:

# Tokens per second, softar.generate beside model.generate, interleaved in one run
softar bench decode

# Soft SFT: parallel refreshes beside sequential steps, at T = 128
softar bench sft

# How far R refreshes are from the sequential pass, on a trained model
softar bench agreement --model_path runs/demo/guided-soft-seed0

# What switching, hidden states and soft beams add to single tokens, in processor time
OMP_NUM_THREADS=1 softar bench decode --batch 1 --cpu_time --beside hard --decoders hard switching "hidden states"
OMP_NUM_THREADS=1 softar bench beams --batch 1 --new_tokens 32 --cpu_time

# What soft requests add to a step of vLLM's, which it does not start
OMP_NUM_THREADS=1 softar bench rows --cpu_time

# Peak memory of a soft step against the batch, the kept tokens and the vocabulary
softar bench memory
"""

import sys
from pathlib import Path

import torch

import softar
from softar.checks import check_least, one_line_errors
from softar.mixers import guide
from softar.models import MODELS, check_there
from softar.recipes.bench_decode import beams, check_names, decode
from softar.recipes.bench_rows import rows
from softar.recipes.bench_tools import (
    clock_of,
    interleaved,
    largest,
    parser_of,
    run_bench,
    show,
    spread,
)
from softar.sft.forward import soft_forward
from softar.soft import Soft, dense, mk_proba_dist, soft_embed

PROGRAM = Path(sys.argv[0]).name


def sft(args) -> list[dict]:
    """One training step (forward and backward) of soft teacher forcing at T soft positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=512, num_key_value_heads=4, max_position_embeddings=1024, **shape)
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    prompt, T, batch = 8, args.length, 8
    ids = torch.randint(0, 512, (batch, prompt + T), device=model.device)
    soft_mask = torch.zeros_like(ids, dtype=torch.bool)
    soft_mask[:, prompt:] = True

    def feed(logits, gold):
        return guide(mk_proba_dist(logits, top_k=8), gold, 0.3)

    def step(**how):
        def run():
            model.zero_grad()
            logits = soft_forward(model, ids, None, soft_mask, feed, **how)
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            ).backward()

        return run

    runs = {"sequential": step(mode="sequential")}
    for passes, grad_passes in ((0, None), (1, None), (2, None), (2, 1), (4, None)):
        label = f"parallel, {passes} passes" + (
            "" if grad_passes is None else ", gradient in the last forward only"
        )
        runs[label] = step(passes=passes, grad_passes=grad_passes)
    seconds = interleaved(runs, args.repeats, clock=clock_of(args))
    rows = []
    for name, took in seconds.items():
        base = seconds["sequential"]
        ratio, low, high = spread(a / b for a, b in zip(base, took, strict=True))
        rows.append(
            dict(
                bench="sft",
                length=T,
                batch=batch,
                mode=name,
                seconds=spread(took)[0],
                times_faster=ratio,
                low=low,
                high=high,
            )
        )
    show(
        f"soft SFT step, T = {T}, batch {batch}, d = 128, 4 layers",
        rows,
        ("mode", "seconds", "times_faster", "low", "high"),
    )
    return rows


@torch.no_grad()
def agreement(args) -> list[dict]:
    """Parallel against sequential by number of passes, on held-out rows of MNNS."""
    from softar.evaluate import encode
    from softar.sft.trainer import thought_mask

    model, tokenizer = softar.load(args.model_path, device="cpu")
    task = softar.load_task("mnns")
    texts = [
        p + c + tokenizer.eos_token
        for p, c in zip(task.test["prompt"], task.test["completion"], strict=True)
    ]
    ids = encode(tokenizer, texts)["input_ids"]
    labels = ids.clone()
    labels[:, : len(tokenizer(task.test["prompt"][0])["input_ids"])] = -100
    soft_mask = thought_mask(ids, labels, steps=task.think_steps)

    def logits(alpha, **how):
        return soft_forward(
            model, ids, None, soft_mask, lambda x, g: guide(mk_proba_dist(x), g, alpha), **how
        )

    rows = []
    # the position that predicts the answer (the last two are answer and EOS)
    answer = soft_mask.shape[1] - 3
    for alpha in (0.0, 0.3, 0.7):
        exact = logits(alpha, mode="sequential").log_softmax(-1)
        for passes in range(5):
            ours = logits(alpha, passes=passes).log_softmax(-1)
            kl = (exact.exp() * (exact - ours)).sum(-1)[:, :-1][
                soft_mask[:, 1:] | (labels[:, 1:] != -100)
            ]
            same = (ours[:, answer].argmax(-1) == exact[:, answer].argmax(-1)).float().mean()
            far = (ours - exact).abs().max()
            found = dict(mean_kl_nats=kl.mean().item(), max_logp_difference=far.item())
            found |= dict(same_answer=same.item())
            rows.append(dict(bench="agreement", alpha=alpha, passes=passes) | found)
    show(
        f"parallel against sequential, {args.model_path}",
        rows,
        ("alpha", "passes", "mean_kl_nats", "max_logp_difference", "same_answer"),
    )
    return rows


def memory(args) -> list[dict]:
    """Bytes that one soft step allocates at its peak, beside the dense product that softar never
    forms."""
    rows = []
    for V, D, B, K in ((50_000, 512, 1, 10), (50_000, 512, 8, 10), (150_000, 1024, 8, 10)):
        logits, embedding = torch.randn(B, V), torch.nn.Embedding(V, D)

        def sparse(logits=logits, embedding=embedding, K=K):
            return soft_embed(mk_proba_dist(logits, top_k=K), embedding)

        def full(logits=logits, embedding=embedding, V=V):
            dist = mk_proba_dist(logits)
            return (dense(Soft(*dist), V)[..., None] * embedding.weight).sum(-2)

        peaks = {
            "softar, top-k 10": largest(sparse),
            "dense [B, V, D]": None if B * V * D > 3e8 else largest(full),
        }
        for name, peak in peaks.items():
            peak_mb = None if peak is None else peak / 1e6
            rows.append(dict(bench="memory", V=V, D=D, B=B, K=K, way=name, peak_mb=peak_mb))
    show("peak of one soft step", rows, ("V", "D", "B", "K", "way", "peak_mb"))
    return rows


BENCHES = {
    "decode": decode,
    "beams": beams,
    "rows": rows,
    "sft": sft,
    "agreement": agreement,
    "memory": memory,
}
READS = {  # options beside --output
    "decode": "model dtype batch decoders beside new_tokens cpu_time repeats",
    "beams": "model dtype batch decoders num_beams new_tokens cpu_time repeats",
    "rows": "new_tokens cpu_time repeats",
    "sft": "length cpu_time repeats",
    "agreement": "model_path",
    "memory": "",
}


def check(args, defaults: dict) -> None:
    """Raises ValueError for what cannot be measured here."""
    for name, value in vars(args).items():
        by = [bench for bench, read in READS.items() if name in read.split()]
        if by and args.bench not in by and value != defaults[name]:
            raise ValueError(
                f"--{name} does nothing for {args.bench}: it is of {' and '.join(by)}, leave it out"
            )
    if args.bench == "agreement" and args.model_path is None:
        raise ValueError("agreement needs --model_path, a folder with a model trained on MNNS")
    # a step goes from one forward after the prompt's to the next: with fewer tokens there is none
    check_least(args, new_tokens=3, num_beams=1, length=1, repeats=1)
    check_least(dict(batch=min(args.batch)), batch=1)
    check_names(args)
    if args.cpu_time and torch.cuda.is_available():
        raise ValueError("--cpu_time: a GPU computes on while its processor waits, leave it out")
    if args.bench in ("decode", "beams", "agreement"):
        check_there(args.model_path or args.model, MODELS)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "bench", choices=BENCHES, nargs="?", default="decode", help="what to measure"
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="decode, beams: a model that softar.load opens"
    )
    parser.add_argument("--dtype", default="auto", help="decode, beams: type of the weights")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], help="decode, beams: rows decoded together"
    )
    parser.add_argument(
        "--decoders", nargs="+", help="decode, beams: only these decoders, beside 'hard' or 'beam'"
    )
    parser.add_argument("--beside", default="model.generate", help="decode: what ratios are to")
    parser.add_argument(
        "--new_tokens", type=int, default=64, help="decode, beams, rows: tokens to generate"
    )
    parser.add_argument("--num_beams", type=int, default=4, help="beams: hypotheses of a prompt")
    parser.add_argument(
        "--cpu_time", action="store_true", help="measure processor time, for a busy machine"
    )
    parser.add_argument("--length", type=int, default=128, help="sft: number of soft positions, T")
    parser.add_argument("--model_path", help="agreement: a folder with a model trained on MNNS")
    parser.add_argument("--repeats", type=int, default=7, help="how often each is timed")
    args = parser.parse_args()
    with one_line_errors(PROGRAM):
        check(args, vars(parser.parse_args([])))
    with one_line_errors(PROGRAM, ImportError):  # of a model that another package carries
        run_bench(args.bench, BENCHES[args.bench], args)


if __name__ == "__main__":
    main()
