"""Measurements of masked-diffusion decoding and training, most on random weights: a table each,
and a results.json.

# Tokens per second and ms per forward of every cache and softener
python recipes/bench_diffusion.py denoise

# Beside the public samplers on the same weights, after checking that the tokens are the same python
recipes/bench_diffusion.py denoise --against fast-dllm/llada --original llada/generate.py --soften
hard

# Time per inner step of the dual cache, by prompt length
python recipes/bench_diffusion.py prompt-length

# What softening adds to a forward
python recipes/bench_diffusion.py overhead --repeats 10

# Peak memory of softening, beside the dense form
python recipes/bench_diffusion.py memory

# What reading each row twice adds to a training step, on the Latin squares' net
python recipes/bench_diffusion.py training --repeats 7 --cpu_time --threads 1

# Soft masks without training: every softener and its knobs on a trained model and its task
python recipes/bench_diffusion.py softeners --model runs/sft_diffusion/hard-seed42 --task latin

# LLaDA's size, beside what reading the weights takes
python recipes/bench_diffusion.py denoise --size 8b --device cuda --cache dual --new_tokens 256

--against is the folder llada/ of github.com/NVlabs/Fast-dLLM at 24cc59e, as it is (it needs
einops); --original is generate.py of github.com/ML-GSAI/LLaDA at b7e6c35. Neither is part of
softar.
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from bench import console, interleaved, largest, show, synchronise, timed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from softar.diffusion import SOFTENERS, DenoiseConfig, denoise
from softar.diffusion.architectures import (
    LLADA_NEEDS,
    LladaConfig,
    LladaForMaskedDiffusion,
    llama_name,
)
from softar.diffusion.select import Belief
from softar.diffusion.soften import Slots, mk_softener
from softar.results import device, versions, write_results
from softar.soft import soft_embed

LLADA = dict(vocab_size=126_464, mask_token_id=126_336, eos_token_id=126_081, bos_token_id=126_080)
TINY = dict(vocab_size=512, mask_token_id=511, eos_token_id=510, bos_token_id=509)
SIZES = {  # vocabulary, width, inner width, layers, heads
    "tiny": TINY
    | dict(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
    "small": LLADA
    | dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8),
    "8b": LLADA
    | dict(
        hidden_size=4096, intermediate_size=12_288, num_hidden_layers=32, num_attention_heads=32
    ),
}
CACHES = {"none": None, "prefix": "prefix", "dual": "dual"}
PUBLIC = {
    "none": "generate",
    "prefix": "generate_with_prefix_cache",
    "dual": "generate_with_dual_cache",
}


def build(args) -> LladaForMaskedDiffusion:
    """Random weights, made where and in the dtype they are used."""
    size = SIZES[args.size]
    room = max(4096, max(args.prompts) + args.block_length, args.prompt + max(args.new_tokens))
    config = LladaConfig(
        **size,
        num_key_value_heads=size["num_attention_heads"],
        max_position_embeddings=room,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    torch.manual_seed(args.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(args.device):
            model = LladaForMaskedDiffusion(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def prompt_of(args, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    vocabulary = SIZES[args.size]["vocab_size"]
    return torch.randint(0, vocabulary - 200, (args.batch, length), generator=generator).to(
        args.device
    )


def denoising(args) -> list[dict]:
    """Caches x softeners, and the public samplers where given, taken in turn for each cache and
    number of tokens."""
    model = build(args)
    ids = prompt_of(args, args.prompt)
    theirs = public(Path(args.against), model) if args.against else None
    floor = floor_ms(model, args)
    console.print(
        f"reading the weights of a forward at the bandwidth of a copy takes {floor:.3g} ms"
    )
    rows = []
    for new in args.new_tokens:
        for cache in args.cache:
            runs = samplers(args, model, ids, new, cache, theirs)
            outputs = {name: run() for name, run in runs.items()}  # warms up
            for name in {"ours, parity", "LLaDA"} & outputs.keys():
                if not torch.equal(tokens(outputs[name]), tokens(outputs["Fast-dLLM"])):
                    raise SystemExit(
                        f"{name}: other tokens than Fast-dLLM's at {new} new ones, cache {cache}"
                    )
            seconds = interleaved(runs, args.repeats, warm_up=False, clock=args.clock)
            base = next(iter(runs))
            for name, took in seconds.items():
                ratios = [a / b for a, b in zip(seconds[base], took, strict=True)]
                forwards = getattr(outputs[name], "num_forwards", None)
                median = statistics.median(took)
                rows.append(
                    dict(
                        bench="denoise",
                        size=args.size,
                        batch=args.batch,
                        prompt=args.prompt,
                        new_tokens=new,
                        cache=cache,
                        sampler=name,
                        tokens_per_s=args.batch * new / median,
                        ms_per_forward=forwards and 1000 * median / forwards,
                        floor_ms=floor,
                        ratio_to=base,
                        ratio=statistics.median(ratios),
                        low=min(ratios),
                        high=max(ratios),
                        seconds=took,
                    )
                )
            done = [row for row in rows if (row["new_tokens"], row["cache"]) == (new, cache)]
            show(
                f"{args.size}, prompt {args.prompt}, one token a forward; ratio to {base}",
                done,
                COLUMNS,
            )
    return rows


def samplers(args, model, ids: Tensor, new: int, cache: str, theirs) -> dict:
    """What is to be timed, by name; the ratios are to the first."""
    how = dict(gen_length=new, block_length=args.block_length, cache=CACHES[cache])
    configs = {f"ours, {soften}": DenoiseConfig(**how, soften=soften) for soften in args.soften}
    runs = {}
    if theirs is not None:
        public_model, module = theirs
        quota = dict(
            steps=new,
            gen_length=new,
            block_length=args.block_length,
            mask_id=model.config.mask_token_id,
        )
        runs["Fast-dLLM"] = lambda: getattr(module, PUBLIC[cache])(public_model, ids, **quota)
        if args.original and cache == "none":
            original = module_of(Path(args.original))
            runs["LLaDA"] = lambda: original.generate(public_model, ids, **quota)
        configs["ours, parity"] = DenoiseConfig(**how, steps=new, parity="fast_dllm")
    return runs | {
        name: (lambda c=config: denoise(model, ids, config=c)) for name, config in configs.items()
    }


def tokens(output) -> Tensor:
    """Of a DenoiseOutput, of (tokens, forwards) or of tokens."""
    return output[0] if isinstance(output, tuple) else getattr(output, "sequences", output)


COLUMNS = (
    "new_tokens",
    "cache",
    "sampler",
    "tokens_per_s",
    "ms_per_forward",
    "ratio",
    "low",
    "high",
)


def public(folder: Path, model: LladaForMaskedDiffusion):
    """Fast-dLLM's model around the very tensors of ours, and its module of samplers."""
    sys.path.insert(0, str(folder.resolve()))
    module = importlib.import_module("generate")
    configuration = importlib.import_module("model.configuration_llada")
    ours = model.config.to_dict()
    fields = {
        name: ours[name]
        for name in (*model.config.attribute_map, "vocab_size", "rope_theta", "rms_norm_eps")
    }
    drops = dict(attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0)
    special = dict(mask_token_id=ours["mask_token_id"], eos_token_id=ours["eos_token_id"])
    rest = dict(
        rope_full_precision=True,
        embedding_size=ours["vocab_size"],
        pad_token_id=ours["eos_token_id"],
    )
    config = configuration.LLaDAConfig(**LLADA_NEEDS, **fields, **drops, **special, **rest)
    config.use_cache = False  # transformers 5 drops it
    theirs = module.LLaDAModelLM(config)
    weights = {}
    for name in theirs.state_dict():
        weights[name] = model.state_dict()[llama_name(name)]
    theirs.load_state_dict(weights, assign=True)
    return theirs.to(model.device).eval(), module


def module_of(file: Path):
    spec = importlib.util.spec_from_file_location("original_llada", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def floor_ms(model: LladaForMaskedDiffusion, args) -> float:
    """What reading the weights once takes; of the input embedding a forward reads only a few
    rows."""
    embedding = model.get_input_embeddings().weight
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)
    block = torch.zeros(min(size, 2**30), dtype=torch.uint8, device=args.device)
    copy = torch.empty_like(block)
    took = min(interleaved({"copy": lambda: copy.copy_(block)}, 10)["copy"])
    return 1000 * took * size / (2 * len(block))  # a copy reads and writes


def overhead(args) -> list[dict]:
    """Softeners beside hard decoding, forward by forward: the sum over a run's forwards of the
    least time that each took in the repeats. What disturbs a machine only ever adds, and here the
    disturbance is larger than the difference.
    """
    model, new = build(args), args.new_tokens[0]
    ids = prompt_of(args, args.prompt)
    rows = []
    for cache in args.cache:
        least = {}
        for repeat in range(args.repeats + 1):
            for soften in args.soften[:: 1 if repeat % 2 else -1]:
                config = DenoiseConfig(
                    gen_length=new,
                    block_length=args.block_length,
                    cache=CACHES[cache],
                    soften=soften,
                )
                took = torch.tensor(step_times(model, ids, config, args.clock))
                if repeat > 0:  # the first warms up
                    least[soften] = torch.minimum(took, least.get(soften, took))
        base = args.soften[0]
        for soften in args.soften:
            rows.append(
                dict(
                    bench="overhead",
                    size=args.size,
                    batch=args.batch,
                    prompt=args.prompt,
                    new_tokens=new,
                    cache=cache,
                    soften=soften,
                    ms_per_forward=1000 * least[soften].mean().item(),
                    ratio=(least[soften].mean() / least[base].mean()).item(),
                )
            )
    show(
        f"{args.size}, {new} new tokens, least of {args.repeats}; ratio to {args.soften[0]}",
        rows,
        ("cache", "soften", "ms_per_forward", "ratio"),
    )
    return rows


def step_times(model, ids: Tensor, config: DenoiseConfig, clock) -> list[float]:
    """Seconds of each forward with what belongs to it, but the first."""
    stamps = []

    def stamp(step):
        synchronise()
        stamps.append(clock())

    denoise(model, ids, config=config, callback=stamp)
    return [b - a for a, b in pairwise(stamps)]


@torch.no_grad()
def prompt_length(args) -> list[dict]:
    """Inner steps of one block at the end of prompts of different lengths, and attention alone over
    as many keys."""
    model = build(args)
    c = model.config
    width = args.block_length
    config = DenoiseConfig(
        gen_length=width, block_length=width, cache="dual", soften=args.soften[0]
    )
    ids, attention = {}, {}
    for length in args.prompts:
        ids[length] = prompt_of(args, length)
        q = torch.randn(
            args.batch,
            c.num_attention_heads,
            width,
            c.head_dim,
            dtype=model.dtype,
            device=args.device,
        )
        k = torch.randn(
            args.batch,
            c.num_attention_heads,
            length + width,
            c.head_dim,
            dtype=q.dtype,
            device=q.device,
        )
        attention[length] = lambda q=q, k=k: [sdpa(q, k, k) for _ in range(c.num_hidden_layers)]

    inner, alone = {length: [] for length in args.prompts}, {length: [] for length in args.prompts}
    for repeat in range(args.repeats + 1):
        for length in args.prompts[:: 1 if repeat % 2 else -1]:
            steps = step_times(model, ids[length], config, args.clock)
            took = [timed(attention[length], args.clock) for _ in range(10)]
            if repeat > 0:  # the first warms up
                inner[length].append([1000 * t for t in steps])
                alone[length] += [1000 * t for t in took]
    rows = []
    for length in args.prompts:
        medians = [statistics.median(run) for run in inner[length]]
        step, share = statistics.median(medians), statistics.median(alone[length])
        rows.append(
            dict(
                bench="prompt-length",
                size=args.size,
                batch=args.batch,
                prompt=length,
                block=width,
                ms_per_inner_step=step,
                low=min(medians),
                high=max(medians),
                attention_ms=share,
                rest_ms=step - share,
            )
        )
    show(
        f"{args.size}, dual cache, inner steps of a block of {width}",
        rows,
        ("prompt", "ms_per_inner_step", "low", "high", "attention_ms", "rest_ms"),
    )
    return rows


@torch.no_grad()
def memory(args) -> list[dict]:
    """Bytes allocated at the peak: by softening one step of a block, beside the dense [B, L, V]
    form; and by whole denoising runs, hard and soft."""
    size = SIZES[args.size]
    V, D, mask_id = size["vocab_size"], size["hidden_size"], size["mask_token_id"]
    embedding = torch.nn.Embedding(V, D).requires_grad_(False)
    B, n, L = args.batch, args.batch * args.block_length, args.prompt + min(args.new_tokens)
    logits = torch.randn(B, L, V)
    block = logits[:, : args.block_length].reshape(n, V)
    rows = []

    def sparse(name):
        belief = Belief(block, with_entropy=name == "soft-mask")
        belief.prob(belief.top_token[:, None])  # what hard decoding asks for is there already

        def run():
            ids = torch.full((n,), mask_id)
            slots = Slots(belief, ids, ids == mask_id, torch.ones(n), mask_id, embedding)
            return soft_embed(mk_softener(name).fn(slots), embedding)

        return run

    def dense():
        """Soft masking as a mixture over the vocabulary: (1 - lambda) one-hot + lambda top-3
        probabilities."""
        log_p = logits.log_softmax(-1)
        strength = 0.25 * torch.sigmoid(5 * ((log_p.exp() * log_p).sum(-1, keepdim=True) + 1))
        values, ids = logits.topk(3, -1)
        mixture = torch.nn.functional.one_hot(torch.full((B, L), mask_id), V).to(logits.dtype) * (
            1 - strength
        )
        return mixture.scatter_add_(-1, ids, strength * values.softmax(-1)) @ embedding.weight

    def row(what, peak):
        rows.append(
            dict(bench="memory", size=args.size, V=V, B=B, L=L, what=what, peak_mb=peak / 1e6)
        )

    row(f"the logits of a block, [{n}, V]", block.numel() * 4)
    for name in args.soften:
        if name != "hard":
            row(f"softening a block, {name}", largest(sparse(name)))
    row("soft masking, dense [B, L, V]", largest(dense))
    if args.size != "8b":
        model, ids = build(args), prompt_of(args, args.prompt)
        for name in args.soften:
            config = DenoiseConfig(gen_length=args.block_length, soften=name, steps=4)
            row(
                f"4 forwards of denoise, {name}",
                largest(lambda c=config: denoise(model, ids, config=c)),
            )
    show("peak beyond what was there", rows, ("V", "B", "L", "what", "peak_mb"))
    return rows


def training(args) -> list[dict]:
    """A step of DiffusionSFTTrainer, hard and two-pass: time, and memory at its peak and held for
    the backward pass."""
    from tempfile import TemporaryDirectory

    from softar.diffusion import load
    from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
    from softar.tasks import load_task

    data, steps = load_task("latin", size=512).train, 20
    with TemporaryDirectory() as folder:

        def trainer_of(twice):
            model, tokenizer = load("latin-diffusion-tiny", seed=0)
            options = dict(
                per_device_train_batch_size=128,
                max_steps=steps,
                save_strategy="no",
                disable_tqdm=True,
            )
            options |= dict(
                report_to="none", logging_steps=1000, softmasking_prob=twice, head_scale=0.5
            )
            config = DiffusionSFTConfig(output_dir=folder, **options)
            return DiffusionSFTTrainer(
                model, config, train_dataset=data, processing_class=tokenizer
            )

        def seconds(twice):
            trainer = trainer_of(twice)
            start = args.clock()
            trainer.train()
            return (args.clock() - start) / steps

        def memory_of(twice):
            trainer = trainer_of(twice)
            trainer.model.train()
            batch = next(iter(trainer.get_train_dataloader()))
            kept = {}

            def keep(tensor):  # views of one storage count once
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            def step():
                trainer._micro = 0
                with torch.enable_grad():
                    trainer.compute_loss(trainer.model, batch).backward()

            parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                trainer._micro = 0
                # alive, so that no storage is used again
                loss = trainer.compute_loss(trainer.model, batch)
            held = sum(size for pointer, size in kept.items() if pointer not in parameters)
            del loss
            return dict(held_mb=held / 1e6, peak_mb=largest(step) / 1e6)

        ways = {"hard": 0.0, "two passes in .8 of the steps": 0.8, "two passes always": 1.0}
        memory = {way: memory_of(ways[way]) for way in ("hard", "two passes always")}
        seconds(0.0)  # warm-up
        taken = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, twice in ways.items():
                taken[way].append(seconds(twice))
    rows = []
    for way in ways:
        ratios = [t / h for t, h in zip(taken[way], taken["hard"])]
        found = dict(ms=1000 * statistics.median(taken[way]), ratio=statistics.median(ratios))
        found |= dict(lowest=min(ratios), highest=max(ratios)) | memory.get(
            way, dict(held_mb=None, peak_mb=None)
        )
        rows.append(dict(bench="training", way=way) | found)
    columns = ("way", "ms", "ratio", "lowest", "highest", "held_mb", "peak_mb")
    show("a training step, 128 rows of 26 tokens", rows, columns)
    return rows


def softeners(args) -> list[dict]:
    """Accuracy of a trained model under soft masks that it may not have been trained for."""
    from softar.diffusion import load
    from softar.diffusion.evaluate import evaluate
    from softar.tasks import load_task

    model, tokenizer = load(args.model)
    task = load_task(args.task)
    flat = dict(centre=-100.0, steepness=1.0, k=5)  # lambda = scale, whatever the entropy
    ways = [("hard", {})]
    ways += [("soft-token", dict(bias=bias)) for bias in (0.5, 5.0, 50.0)]
    ways += [("soft-mask", flat | dict(scale=scale)) for scale in (0.3, 0.1, 0.03, 0.01)]
    ways += [
        ("soft-mask", flat | dict(scale=0.3, k=1)),
        ("soft-mask", dict(scale=0.3, centre=-0.3, steepness=20.0, k=5)),
    ]
    ways += [("slerp", dict(strength=strength)) for strength in (0.3, 0.1, 0.03)]
    rows = []
    for name, knobs in ways:
        found = dict(
            bench="softeners", model=args.model, task=args.task, soften=name, knobs=str(knobs)
        )
        for steps in (8, 12):
            config = DenoiseConfig(steps=steps, soften=name, soften_args=knobs)
            found[f"nfe {steps}"] = evaluate(model, tokenizer, task.test, task.score, config)[
                "accuracy"
            ]
        rows.append(found)
    table = model.get_input_embeddings().weight.detach()
    mask = table[tokenizer.mask_token_id]
    tokens = (
        table[tokenizer.convert_tokens_to_ids(["1", "2", "3", "4", "5"])]
        if args.task == "latin"
        else table
    )
    found = dict(
        mask=mask.norm(), token=tokens.norm(dim=-1).mean(), mean_of_tokens=tokens.mean(0).norm()
    )
    rows.append(
        dict(
            bench="softeners",
            soften="norms",
            knobs=str({k: round(float(v), 2) for k, v in found.items()}),
        )
    )
    show("accuracy", rows[:-1], ("soften", "knobs", "nfe 8", "nfe 12"))
    console.print("norms of embeddings:", rows[-1]["knobs"])
    return rows


BENCHES = {
    "training": training,
    "softeners": softeners,
    "denoise": denoising,
    "overhead": overhead,
    "prompt-length": prompt_length,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32, on CUDA bfloat16")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument(
        "--cpu_time", action="store_true", help="not the clock's, for a busy machine; 1 thread"
    )
    parser.add_argument(
        "--model",
        default="latin-diffusion-tiny",
        help="softeners: what softar.diffusion.load takes",
    )
    parser.add_argument("--task", default="latin", help="softeners: whose held-out rows it answers")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="prompt-length"
    )
    parser.add_argument("--new_tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--block_length", type=int, default=32)
    parser.add_argument("--cache", choices=CACHES, nargs="+", default=list(CACHES))
    parser.add_argument("--soften", choices=SOFTENERS, nargs="+", default=list(SOFTENERS))
    parser.add_argument("--against", help="denoise: folder of the public samplers (above)")
    parser.add_argument("--original", help="denoise: with --against, LLaDA's own generate.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/bench", help="folder of the results")
    args = parser.parse_args()
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    if args.original and not args.against:
        parser.error("--original needs --against, whose model it runs")
    if args.threads:
        torch.set_num_threads(args.threads)
    console.print(f"{args.bench} on {device()}, {versions()}", soft_wrap=True)
    rows = BENCHES[args.bench](args)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"written: {write_results(folder / f'{args.bench}.json', rows)}")


if __name__ == "__main__":
    main()
