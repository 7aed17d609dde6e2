"""The decoding parts of gpu.py, and how all parts measure.

Each part is `part(record, is_dry, left)`: `record(row)` writes a measurement down at once, `left()`
is what remains of the part's time in seconds; what would not fit is left out.

Floors say how fast a part could be at best here, by speed_limits.py: bytes that have to be read over
the bandwidth of a large copy, operations over the rate of a large matrix product, both measured first.
"""

import copy
import gc
import shutil
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import softar
from softar.recipes import speed_limits
from softar.recipes.speed_limits import Rates, size_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Record, Left = Callable[[dict], None], Callable[[], float]

# As published; rope_theta stands under its present name.
QWEN3 = dict(
    vocab_size=151_936,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
QWEN3_06B = QWEN3 | dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    tie_word_embeddings=True,
)
QWEN3_8B = QWEN3 | dict(
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=36,
    num_attention_heads=32,
    tie_word_embeddings=False,
)
LLADA = dict(vocab_size=126_464, mask_token_id=126_336, eos_token_id=126_081, bos_token_id=126_080)
LLADA_8B = LLADA | dict(
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    tie_word_embeddings=False,
)
SMALL = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SMALL_LLADA = SMALL | dict(mask_token_id=511, eos_token_id=510, bos_token_id=509)


# -- measuring


def timed(run: Callable) -> float:
    """Seconds of one call, between two events of the GPU."""
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def taken_in_turn(runs: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run. Forwards, then backwards, so that a drift hits all alike; the caller has
    warmed up."""
    seconds = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            seconds[name].append(timed(runs[name]))
    return seconds


def spread(amount: float, seconds: list[float]) -> dict:
    """Amount per second: median, and the extremes of the repeats."""
    return dict(
        tokens_per_s=amount / statistics.median(seconds),
        low=amount / max(seconds),
        high=amount / min(seconds),
        repeats=len(seconds),
    )


def reset_peak() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    """Largest memory of tensors since the reset, the weights included; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None


def build(
    make: Callable, config, dtype: torch.dtype = torch.bfloat16, device: torch.device = DEVICE
) -> torch.nn.Module:
    """A model with random weights, drawn where they are used, that never ends a text by itself."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with device:
            model = make(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def prompt(batch: int, length: int, vocab_size: int, device: torch.device = DEVICE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocab_size - 200, (batch, length), generator=generator).to(device)


# -- autoregressive decoding


def decoding(record: Record, is_dry: bool, left: Left) -> None:
    """softar.generate hard and soft beside model.generate, eager, then compiled."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shapes = {"Qwen3-8B": QWEN3_8B, "Qwen3-0.6B": QWEN3_06B}
    batches, length, new, repeats = (1, 8, 64), 128, 48, 3
    if is_dry:
        shapes = {name: SMALL | dict(head_dim=8) for name in shapes}
        batches, length, new, repeats = (1, 2), 8, 4, 2
    rates = speed_limits.measured(DEVICE, torch.bfloat16, is_dry)
    record(dict(what=speed_limits.said(rates)))
    models = {name: build(Qwen3ForCausalLM, Qwen3Config(**shape)) for name, shape in shapes.items()}
    for name, model in models.items():
        for batch in batches:
            ids = prompt(batch, length, model.config.vocab_size)
            about = shape_of(name, model, batch, length, new, rates)
            runs = decoders(model, ids)
            for run in runs.values():
                run(4)
            reset_peak()
            calls = {what: (lambda run=run: run(new)) for what, run in runs.items()}
            for what, seconds in taken_in_turn(calls, repeats).items():
                row = about | dict(what=what) | spread(batch * new, seconds)
                record(
                    row
                    | dict(
                        of_floor=row["tokens_per_s"] / row["floor_tokens_per_s"], peak_gb=peak_gb()
                    )
                )
    for name, batch in [(n, b) for n in reversed(models) for b in batches]:
        model = models[name]
        about = shape_of(name, model, batch, length, new, rates)
        compiled(record, model, about, repeats, is_dry, left)


def shape_of(name: str, model, batch: int, length: int, new: int, rates: Rates) -> dict:
    """What is decoded, and how fast that could be at best."""
    about = dict(model=name, batch=batch, prompt=length, new_tokens=new)
    least = rates.least(speed_limits.decoding(size_of(model), batch, length, new))
    return about | dict(floor_tokens_per_s=batch * new / least)


def decoders(model, ids: Tensor) -> dict[str, Callable[[int], object]]:
    """What is to be timed, by name: number of new tokens -> a run."""

    def soft(**fields):
        def run(new):
            return softar.generate(
                model, ids, config=softar.SoftConfig(max_new_tokens=new, **fields)
            )

        return run

    def eager(new):
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new)

    return {
        "model.generate": eager,
        "softar hard": soft(mixer="hard", top_k=None),
        "softar soft, top-k 10": soft(top_k=10),
        "softar k-samples": soft(mixer="k-samples", top_k=None),
    }


def compiled(record: Record, model, about: dict, repeats: int, is_dry: bool, left: Left) -> None:
    """Steps compiled over a static cache, transformers' and softar's; that needs a C compiler."""
    if DEVICE.type == "cuda" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        record(about | dict(what="compiled", note="no C compiler here"))
        return
    torch._dynamo.reset()
    runs, took = over_static_cache(model, about, is_dry), {}
    warnings.filterwarnings("error", message=".*does not compile")
    for what, run in [*runs.items()]:
        began = time.perf_counter()
        try:
            if left() < (0 if is_dry else 50):
                raise TimeoutError("no time left")
            for _ in range(2):
                run()
            took[what] = time.perf_counter() - began
        except Exception as error:  # of a compiler's many: the measurements beside it go on
            record(about | dict(what=what, note=f"{type(error).__name__}: {str(error)[:200]}"))
            del runs[what]
    reset_peak()
    for what, seconds in taken_in_turn(runs, repeats).items():
        row = about | dict(what=what, note=f"{took[what]:.0f} s until compiled")
        row |= spread(about["batch"] * about["new_tokens"], seconds)
        of_floor = row["tokens_per_s"] / row["floor_tokens_per_s"]
        record(row | dict(of_floor=of_floor, peak_gb=peak_gb()))


def over_static_cache(model, about: dict, is_dry: bool) -> dict[str, Callable[[], object]]:
    """What is timed compiled, by name; softar's with its default of looks, and with one each step."""
    from transformers import CompileConfig

    ids, new = prompt(about["batch"], about["prompt"], model.config.vocab_size), about["new_tokens"]
    how = CompileConfig(fullgraph=True)
    if is_dry:
        how = CompileConfig(fullgraph=True, backend="eager", mode="default")
    how._compile_all_devices = is_dry
    static = dict(cache_implementation="static", compile_config=how)

    def theirs():
        mask = torch.ones_like(ids)
        asked = dict(attention_mask=mask, do_sample=False, max_new_tokens=new)
        return model.generate(ids, **asked, **static)

    def ours(look_every=None, **fields):
        settings = copy.deepcopy(model.generation_config)
        settings.update(**static)
        config = softar.SoftConfig(max_new_tokens=new, **fields)
        how = dict(generation_config=settings, look_every=look_every)
        return lambda: softar.generate(model, ids, config=config, **how)

    return {
        "model.generate, compiled": theirs,
        "softar hard, compiled": ours(mixer="hard", top_k=None),
        "softar soft, top-k 10, compiled": ours(top_k=10),
        "softar soft, top-k 10, compiled, each step looked at": ours(look_every=1, top_k=10),
    }


# -- masked diffusion


def denoising(record: Record, is_dry: bool, left: Left) -> None:
    """Caches x softeners; one token a forward in each row."""
    from softar.diffusion import SOFTENERS, DenoiseConfig, denoise
    from softar.diffusion.architectures import LladaConfig, LladaForMaskedDiffusion

    length, new, block, repeats = (8, 8, 4, 2) if is_dry else (256, 64, 32, 3)
    rates = speed_limits.measured(DEVICE, torch.bfloat16, is_dry)
    record(dict(what=speed_limits.said(rates)))
    model = build(LladaForMaskedDiffusion, LladaConfig(**(SMALL_LLADA if is_dry else LLADA_8B)))
    size = size_of(model)
    caches = (None, "prefix", "dual")
    # alone first, then many rows, hard first: the most wanted numbers come first
    plan = [(1, soften, cache) for soften in SOFTENERS for cache in caches]
    plan += [(8, soften, cache) for soften in ("hard", "soft-mask") for cache in caches]
    for batch, soften, cache in plan:
        if left() < (0 if is_dry else 6 * repeats):
            break
        ids = prompt(batch, length, model.config.vocab_size)
        config = DenoiseConfig(gen_length=new, block_length=block, cache=cache, soften=soften)
        short = DenoiseConfig(gen_length=block, block_length=block, cache=cache, soften=soften)
        denoise(model, ids, config=short)
        reset_peak()
        out = []
        seconds = taken_in_turn(
            {
                "": lambda ids=ids, config=config, out=out: out.append(
                    denoise(model, ids, config=config)
                )
            },
            repeats,
        )[""]
        forwards = out[0].num_forwards
        least = rates.least(speed_limits.denoising(size, out[0], block, new))
        row = dict(what=soften, cache=cache or "none", batch=batch, prompt=length, new_tokens=new)
        row |= spread(batch * new, seconds)
        median = statistics.median(seconds)
        row |= dict(ms_per_forward=1000 * median / forwards, floor_ms=1000 * least / forwards)
        record(row | dict(of_floor=least / median, num_forwards=forwards, peak_gb=peak_gb()))
