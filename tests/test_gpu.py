"""What only a GPU shows, decoding: other kernels, bfloat16, synchronisation, memory.

Skipped without one; with SOFTAR_GPU_DRY=1 they run on the CPU, as `recipes/gpu.py --dry_run` does.
Tolerances are stated where they are asserted: in float32 on what was fed back, over all steps; in
bfloat16, whose rounding feedback soon amplifies, on the belief of the first. Nets and the seed are
those at which the assertions survive relative perturbations of the weights by 1e-5 (float32) and
4e-3 (bfloat16, an ulp): no draw lies that close to a boundary.
"""

import contextlib
import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny import EOS, PROMPTS, Forced, left_padded, model_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

import softar
from softar import MIXERS, SoftConfig, mk_proba_dist, soft_embed
from softar.diffusion import SOFTENERS, DenoiseConfig, denoise
from softar.diffusion import load as load_denoiser
from softar.diffusion.architectures import LladaConfig, LladaForMaskedDiffusion
from softar.recipes.bench_tools import largest
from softar.soft import Soft, dense

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = {name: (name, {}) for name in MIXERS} | {"sample": ("hard", {"sample": True})}
NO_MIXTURE = ("hidden", "hybrid")  # which reads weights that do not sum to 1
STEPS = 6
ROOT = Path(__file__).resolve().parent.parent
ROOMS = [ROOT / name for name in ("softar", "diffusion")]
CACHES = (None, "prefix", "dual")
SEED = 200
WIDTHS = {torch.float32: 0.1, torch.bfloat16: 0.3}  # of the initial weights
# the beginnings of Latin squares, of unequal length, for a net that is trained on them
SQUARE = [1, 4, 7, 5, 6, 3, 6, 4, 7, 3, 5, 3, 6, 4, 5, 7, 5, 3, 6, 7, 4, 7, 5, 3, 4, 6]
SQUARES = (SQUARE[:18], SQUARE[:13], SQUARE[:16])


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def causal(dtype, device=DEVICE):
    return model_of("llama", dtype=dtype, initializer_range=WIDTHS[dtype]).to(device)


def inputs():
    return (x.to(DEVICE) for x in left_padded(PROMPTS))


def seeded(seed):
    """A CPU generator draws the same numbers whatever the device."""
    return torch.Generator().manual_seed(seed)


def decode(model, ids, mask, way, *, rng, steps=STEPS):
    mixer, knobs = WAYS[way]
    span = {"budget": steps // 2} if way == "hidden" else {}
    config = SoftConfig(mixer=mixer, mixer_args=knobs, top_k=10, max_new_tokens=steps, **span)
    return softar.generate(model, ids, mask, config=config, rng=rng)


def mixtures(record, row):
    """[T, V] what the steps of a row fed back."""
    return dense(Soft(record.ids[row], record.weights[row]), 64).cpu()


# -- autoregressive


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_hard_equals_generate(dtype, cache):
    model = model_of("llama", dtype=dtype).to(DEVICE)
    model.generation_config.cache_implementation = cache
    ids, mask = inputs()
    settings = dict(max_new_tokens=12, do_sample=False, disable_compile=True)
    expected = model.generate(input_ids=ids, attention_mask=mask, **settings)
    out = softar.generate(model, ids, mask, config=SoftConfig(mixer="hard", max_new_tokens=12))
    assert torch.equal(out.sequences, expected)


@pytest.mark.filterwarnings("error:.*does not compile")
@pytest.mark.parametrize("look_every", [1, 8])
def test_a_compiled_step_is_the_models(look_every, record_property):
    """One step after the prompt's: of more, each that is fed back would add to the rounding. The rows
    end there, long before the length, so that a late look drops steps."""
    model, (ids, mask) = causal(torch.float32), inputs()
    settings = copy.deepcopy(model.generation_config)
    how = (
        dict(mode="reduce-overhead")
        if DEVICE.type == "cuda"
        else dict(backend="eager", mode="default")
    )
    compile_config = CompileConfig(fullgraph=True, **how)
    settings.update(cache_implementation="static", compile_config=compile_config)
    ends, steps = Forced(ids.shape[1], [[None, EOS]] * len(ids)), []
    config = SoftConfig(mixer="soft", top_k=10, max_new_tokens=12)
    how = dict(config=config, logits_processor=[lambda *step: steps.append(step) or ends(*step)])
    plain = softar.generate(model, ids, mask, look_every=1, **how)
    steps.clear()
    settings = dict(generation_config=settings, look_every=look_every)
    out = softar.generate(model, ids, mask, **how, **settings)
    assert out.completions.shape[1] == out.num_forwards == 2
    assert len(steps) == max(look_every, 2)
    far = (out.record.entropy - plain.record.entropy).abs().max().item()
    record_property("largest difference", far)
    assert far <= 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_every_mixer_draws_as_on_a_cpu(way, record_property):
    ids, mask = left_padded(PROMPTS)
    here = decode(causal(torch.float32, "cpu"), ids, mask, way, rng=seeded(SEED))
    model = causal(torch.float32)
    there = decode(model, ids.to(DEVICE), mask.to(DEVICE), way, rng=seeded(SEED))
    assert torch.equal(there.sequences.cpu(), here.sequences)
    far = max(
        (mixtures(there.record, row) - mixtures(here.record, row)).abs().max().item()
        for row in range(len(PROMPTS))
    )
    record_property("largest difference", far)
    assert far <= 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_a_row_decodes_alone_as_in_the_batch(way, dtype, record_property):
    far, first = apart(causal(dtype), way)
    record_property("largest difference", far if dtype == torch.float32 else first)
    assert far <= 2e-4 if dtype == torch.float32 else first <= 0.1


def apart(model, way, other=None):
    """How far rows alone, without padding, are from those in the batch: their mixtures over all
    steps, and the entropy, in nats, of their belief at the first."""
    ids, mask = inputs()
    seeds = [SEED + row for row in range(len(ids))]
    batch = decode(model, ids, mask, way, rng=[seeded(seed) for seed in seeds])
    fed_back, first = [], []
    for row, seed in enumerate(seeds):
        own = ids[row : row + 1, -int(mask[row].sum()) :]
        alone = decode(other or model, own, None, way, rng=[seeded(seed)])
        pair = mixtures(batch.record, row), mixtures(alone.record, 0)
        steps = min(map(len, pair))
        fed_back.append((pair[0][:steps] - pair[1][:steps]).abs().max().item())
        first.append((batch.record.entropy[row, 0] - alone.record.entropy[0, 0]).abs().item())
    return max(fed_back), max(first)


@pytest.mark.parametrize("way", WAYS)
def test_a_decode_with_a_thought_and_an_answer(way, dtype):
    """On the device's own generator: whatever is drawn, the record is whole."""
    model = model_of("llama", dtype=dtype).to(DEVICE)
    ids, mask = inputs()
    mixer, knobs = WAYS[way]
    config = SoftConfig(mixer=mixer, mixer_args=knobs, budget=4, think_end=4, max_new_tokens=8)
    out = softar.generate(
        model, ids, mask, config=config, rng=torch.Generator(DEVICE).manual_seed(0)
    )
    weights = out.record.weights
    assert weights.device.type == DEVICE.type and weights.dtype == torch.float32
    if way not in NO_MIXTURE:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (out.vectors is not None) == (way == "hidden")
    assert out.record.entropy.isfinite().all() and (out.sequences >= 0).all()
    assert (out.sequences < 64).all() and (out.answer_start <= 5).all()


# -- masked diffusion


def denoiser(dtype, device=DEVICE):
    return load_denoiser("latin-diffusion-tiny", dtype=dtype, device=device)[0]


def fill(model, rows, config):
    """-> output, confidences [B, 8] of the first forward."""
    ids, mask = (x.to(model.device) for x in left_padded(rows))
    seen = []
    out = denoise(model, ids, mask, config=config, callback=seen.append)
    return out, seen[0]["confidence"][:, -8:]


def canvas_config(soften, cache):
    return DenoiseConfig(gen_length=8, block_length=4, cache=cache, soften=soften)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("soften", SOFTENERS)
def test_every_cache_and_softener(soften, cache, dtype, record_property):
    """Fills all masks, one a forward; a row alone as in the batch; in float32 the tokens that a CPU
    finds."""
    model, config = denoiser(dtype), canvas_config(soften, cache)
    out, _ = fill(model, SQUARES, config)
    assert out.num_forwards == config.gen_length
    assert out.sequences.device.type == DEVICE.type
    assert not (out.sequences == model.config.mask_token_id).any()
    whole, first = gaps(model, config)
    record_property("largest difference", whole if dtype == torch.float32 else first)
    assert whole <= 0.01 if dtype == torch.float32 else first <= 0.1
    if dtype == torch.float32:
        here, _ = fill(denoiser(dtype, "cpu"), SQUARES, config)
        assert torch.equal(out.sequences.cpu(), here.sequences)


def gaps(model, config, other=None):
    """How far the confidences of rows alone are from those in the batch: when the tokens were
    decided (1 where these are others), and in the first forward."""
    out, first = fill(model, SQUARES, config)
    decided, at_first = [], []
    for row, prompt in enumerate(SQUARES):
        alone, belief = fill(other or model, [prompt], config)
        gap = (alone.confidence[0, -8:] - out.confidence[row, -8:]).abs()
        gap = gap.masked_fill(alone.completions[0] != out.completions[row], 1.0)
        decided.append(gap.max().item())
        at_first.append((belief[0] - first[row]).abs().nan_to_num().max().item())
    return max(decided), max(at_first)


# -- synchronisation


@pytest.mark.parametrize("budget", [None, 2])
def test_a_step_looks_once(budget, record_property):
    """Anything beyond the one look at the flags, a copy, would stall the launch of the next
    forward."""
    model = model_of("llama").to(DEVICE)
    model.generation_config.eos_token_id = None
    ids, mask = inputs()
    config = SoftConfig(max_new_tokens=8, budget=budget)

    def run(callback):
        softar.generate(model, ids, mask, config=config, callback=callback)

    ours, theirs = looks_a_step(run)
    record_property("a step, ours", ours)
    record_property("transformers'", theirs)
    assert ours == (1 if DEVICE.type == "cuda" else 0)  # a CPU has nothing to copy


@pytest.mark.parametrize("soften", SOFTENERS)
def test_a_forward_of_denoising_looks_seldom(soften, record_property):
    """The look, finding the slots that are asked, and picking those that soften: as often however
    many rows and tokens there are."""
    model = denoiser(torch.float32)
    ids, mask = (x.to(DEVICE) for x in left_padded(SQUARES))
    config = DenoiseConfig(gen_length=8, soften=soften)
    ours, theirs = looks_a_step(lambda f: denoise(model, ids, mask, config=config, callback=f))
    record_property("a forward, ours", ours)
    record_property("transformers'", theirs)
    assert ours <= (2 if soften == "hard" else 9)


def looks_a_step(run):
    """Synchronisations in softar's files and in others' from one callback to the next, on average;
    run(callback) decodes."""
    run(lambda seen: None)  # warms up
    marks = []
    with synchronisations() as files:
        run(lambda seen: marks.append(len(files())))
        between = files()[marks[0] : marks[-1]]
    ours = sum(Path(file).parent in ROOMS for file in between)
    return ours / (len(marks) - 1), (len(between) - ours) / (len(marks) - 1)


@contextlib.contextmanager
def synchronisations():
    """A function -> the files whose lines have waited for the device so far. torch warns of each on
    CUDA, at the innermost line of Python; on a CPU the operations are noted that would wait
    there."""
    if DEVICE.type == "cpu":
        with Waits() as waits:
            yield lambda: waits.files
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lambda: [w.filename for w in caught if "synchronizing CUDA" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waits(TorchDispatchMode):
    """Notes the operations whose result has a size or a value that Python must know."""

    def __init__(self):
        super().__init__()
        self.files = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        picks = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if picks or name in ("nonzero", "_local_scalar_dense"):
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.files.append(frame.f_code.co_filename)
        return func(*args, **(kwargs or {}))


# -- memory


def peak_bytes(run):
    """Most bytes of tensors at one time beyond what was there before; the second call counts, as
    libraries take their workspace in the first."""
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    return largest(run)


B, V, D, K = (8, 150_000, 1024, 10) if DEVICE.type == "cuda" else (8, 6000, 64, 10)
LOGITS = 4 * B * V  # bytes in float32


@torch.no_grad()
def test_a_soft_step_takes_a_few_times_its_logits(record_property):
    """At most 12 B V floats, the workspace of a sort included, and 4 B K D: never [B, V, D]."""
    logits = torch.randn(B, V, device=DEVICE)
    embedding = torch.nn.Embedding(V, D, device=DEVICE)
    peak = peak_bytes(lambda: soft_embed(mk_proba_dist(logits, top_k=K), embedding))
    record_property("times the logits", peak / LOGITS)
    assert peak <= 12 * LOGITS + 4 * 4 * B * K * D


def test_a_decode_takes_a_few_times_its_logits(record_property):
    """Beside the weights: at most 16 B V floats, and as much again as keys and values, K and V of a
    layer being grown one at a time."""
    model = model_of("llama", vocab_size=V).to(DEVICE)
    ids = torch.randint(5, V, (B, 16)).to(DEVICE)
    config = SoftConfig(top_k=K, max_new_tokens=8)
    cache = 4 * 2 * 2 * B * 24 * 16  # floats, keys and values, layers, rows, positions, width
    peak = peak_bytes(lambda: softar.generate(model, ids, config=config, rng=seeded(0)))
    record_property("times the logits", peak / LOGITS)
    assert peak <= 16 * LOGITS + 2 * cache


@pytest.mark.parametrize("soften", SOFTENERS)
def test_denoising_takes_a_few_times_the_logits_of_a_block(soften, record_property):
    """Beside the weights: at most 16 n V floats for the n masks of a block, not L V."""
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, mask_token_id=3, eos_token_id=2)
    model = LladaForMaskedDiffusion(LladaConfig(**shape, **heads)).to(DEVICE).eval()
    ids = torch.randint(5, V, (2, 64)).to(DEVICE)
    config = DenoiseConfig(gen_length=32, block_length=8, steps=8, soften=soften)
    peak = peak_bytes(lambda: denoise(model, ids, config=config))
    logits = 4 * 2 * 8 * V
    record_property("times the logits", peak / logits)
    assert peak <= 16 * logits + 2**20
