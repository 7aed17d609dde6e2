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

# Peak memory of a soft step against the batch, the kept tokens and the vocabulary
softar bench memory
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import softar
from softar.checks import check_choice
from softar.mixers import guide
from softar.results import device, versions, write_results
from softar.sft.forward import soft_forward
from softar.soft import Soft, dense, mk_proba_dist, soft_embed

console = Console()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run, clock=time.perf_counter) -> float:
    """Seconds of one call."""
    synchronise()
    started = clock()
    run()
    synchronise()
    return clock() - started


def clock_of(args) -> Callable[[], float]:
    return time.process_time if args.cpu_time else time.perf_counter


def interleaved(
    runs: dict, repeats: int, *, warm_up: bool = True, clock=time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn (forwards, then backwards) so that a drift of the machine
    hits all alike."""
    for run in runs.values() if warm_up else ():
        run()
    seconds = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            seconds[name].append(timed(runs[name], clock))
    return seconds


def decode(args) -> list[dict]:
    """Decoding overhead: tokens/s of softar.generate over those of
    model.generate(do_sample=False)."""
    model, tokenizer = softar.load(args.model, dtype=args.dtype)
    chat = [{"role": "user", "content": "Tell me a long story about a fox and a crane."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    new = args.new_tokens
    rows = []
    for batch in args.batch:
        inputs = tokenizer([text] * batch, return_tensors="pt").to(model.device)

        def hf(inputs=inputs):
            return model.generate(**inputs, do_sample=False, max_new_tokens=new)

        def ours(config, inputs=inputs):
            return softar.generate(model, **inputs, config=config)

        configs = {
            "hard": softar.SoftConfig(mixer="hard", top_k=None, max_new_tokens=new),
            "soft, top-k 10": softar.SoftConfig(top_k=10, max_new_tokens=new),
            "gumbel, top-k 10": softar.SoftConfig(mixer="gumbel", top_k=10, max_new_tokens=new),
            "switching": softar.SoftConfig(switch="block", switch_dwell=4, max_new_tokens=new),
            "3 samples": softar.SoftConfig(mixer="k-samples", top_k=None, max_new_tokens=new),
            "hybrid, top-k 10": softar.SoftConfig(mixer="hybrid", top_k=10, max_new_tokens=new),
            "hidden states": softar.SoftConfig(mixer="hidden", budget=new, max_new_tokens=new),
        }
        configs = {
            name: config
            for name, config in configs.items()
            if args.decoders is None or name in args.decoders
        }
        assert torch.equal(hf(), ours(configs["hard"]).sequences), "not model.generate's tokens"
        # a row that ended early would be compared at another length
        for name, config in configs.items():
            assert ours(config).num_forwards == new, f"{name} ended early: take fewer tokens"
        runs = {"model.generate": hf} | {name: (lambda c=c: ours(c)) for name, c in configs.items()}
        check_choice("beside", args.beside, runs)
        rows += compared("decode", {args.beside: runs[args.beside]} | runs, batch, args)
    show(
        f"decoding: tokens/s, and their ratio to {args.beside}",
        rows,
        ("batch", "decoder", "tokens_per_s", "ratio", "ratio_low", "ratio_high"),
    )
    return rows


def compared(bench: str, runs: dict, batch: int, args) -> list[dict]:
    """Tokens per second of each run, and their ratio to those of the first."""
    seconds = interleaved(runs, args.repeats, clock=clock_of(args))
    base, rows = seconds[next(iter(runs))], []
    for name, took in seconds.items():
        ratio, low, high = spread(a / b for a, b in zip(base, took, strict=True))
        rows.append(
            dict(
                bench=bench,
                model=args.model,
                batch=batch,
                new_tokens=args.new_tokens,
                decoder=name,
                tokens_per_s=batch * args.new_tokens / spread(took)[0],
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                repeats=args.repeats,
                clock="processor" if args.cpu_time else "wall",
            )
        )
    return rows


def beams(args) -> list[dict]:
    """Search overhead: tokens/s of soft beams over those of beam search of the same width."""
    from softar.decoders.beam import BeamDecoder, BeamOptions
    from softar.decoders.beam_collapse import BeamCollapse
    from softar.decoders.search import SearchDecoder
    from softar.decoders.soft_beam import SoftBeam

    model, tokenizer = softar.load(args.model, dtype=args.dtype)
    model.generation_config.eos_token_id = None  # a search that ended early would be shorter
    chat = [{"role": "user", "content": "Tell me a long story about a fox and a crane."}]
    config, B = softar.SoftConfig(max_new_tokens=args.new_tokens), args.num_beams
    searches = {"soft-beam": SoftBeam(B), "beam-collapse": BeamCollapse(B)}
    decoders = {"beam": BeamDecoder(model, tokenizer, BeamOptions(args.new_tokens, B))}
    for name, search in searches.items():
        decoders[name] = SearchDecoder(model, tokenizer, config, search)
    rows = []
    for batch in args.batch:
        runs = {
            name: (lambda decoder=decoder, batch=batch: decoder.decode([chat] * batch))
            for name, decoder in decoders.items()
            if args.decoders is None or name in ("beam", *args.decoders)
        }
        rows += compared("beams", runs, batch, args)
    show(
        f"{B} beams: tokens/s, and their ratio to beam search",
        rows,
        ("batch", "decoder", "tokens_per_s", "ratio", "ratio_low", "ratio_high"),
    )
    return rows


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
    soft_mask = thought_mask(labels, steps=task.think_steps)

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


def largest(run) -> int:
    """Peak bytes allocated beyond what was there before, from the profiler's allocation events."""
    from torch.profiler import ProfilerActivity, profile

    with (
        torch.no_grad(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def show(title: str, rows: list[dict], columns: tuple[str, ...]) -> None:
    table = Table(title=title, caption=f"{device()}, torch {torch.__version__}")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        cells = [row[c] for c in columns]
        table.add_row(
            *[f"{c:.4g}" if isinstance(c, float) else str("-" if c is None else c) for c in cells]
        )
    console.print(table)


def spread(values) -> tuple[float, float, float]:
    """-> median, least, greatest."""
    values = list(values)
    return statistics.median(values), min(values), max(values)


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser that prints the description as it stands, with the option that `run_bench` reads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", default="runs/bench", help="folder that the results are written to"
    )
    return parser


def run_bench(name: str, measure: Callable, args) -> None:
    """Print the conditions, measure, and write the rows to NAME.json in the folder
    `args.output`."""
    conditions = f"{device()}, {torch.get_num_threads()} threads, {versions()}"
    console.print(f"{name} on {conditions}", soft_wrap=True)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"written: {write_results(folder / f'{name}.json', measure(args))}")


BENCHES = {"decode": decode, "beams": beams, "sft": sft, "agreement": agreement, "memory": memory}


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
        "--decoders",
        nargs="+",
        help="decode, beams: only these decoders, 'hard' or 'beam' among them",
    )
    parser.add_argument("--beside", default="model.generate", help="decode: what ratios are to")
    parser.add_argument(
        "--new_tokens", type=int, default=64, help="decode, beams: tokens to generate"
    )
    parser.add_argument("--num_beams", type=int, default=4, help="beams: hypotheses of a prompt")
    parser.add_argument(
        "--cpu_time", action="store_true", help="measure processor time, for a busy machine"
    )
    parser.add_argument("--length", type=int, default=128, help="sft: number of soft positions, T")
    parser.add_argument("--model_path", help="agreement: a folder with a model trained on MNNS")
    parser.add_argument("--repeats", type=int, default=7, help="how often each is timed")
    args = parser.parse_args()
    if args.bench == "agreement" and args.model_path is None:
        parser.error("agreement needs --model_path, a folder with a model trained on MNNS")
    run_bench(args.bench, BENCHES[args.bench], args)


if __name__ == "__main__":
    main()
