"""`softar estimate`: its bytes are those of the tensors of small models, and the table of
recipes/README.md is what it prints."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, model_of
from transformers import (
    FalconH1Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Starcoder2Config,
)

import softar
from softar.recipes import estimate
from softar.recipes.estimate import Job, shape_of

SHAPES = [
    {},
    dict(hidden_size=64, num_attention_heads=8, head_dim=16),
    dict(num_hidden_layers=3, intermediate_size=80, num_key_value_heads=4),
    dict(tie_word_embeddings=True, vocab_size=96),
]
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
README = Path(__file__).parent.parent / "recipes" / "README.md"


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma"])
def test_states_are_what_a_step_of_adamw_leaves(arch, lora):
    model = model_of(arch)
    shape = shape_of(model.config, rank=4)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    optimizer.step()
    moments = [m for s in optimizer.state.values() for m in (s["exp_avg"], s["exp_avg_sq"])]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    found = size([*model.parameters(), *gradients, *moments])
    assert found == estimate.states(shape, Job(lora, bytes=4), gpus=1)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_cache_and_what_a_token_meets(changes, dtype):
    job, ids = Job(False, bytes=dtype.itemsize), torch.randint(VOCAB, (2, 7))
    model = model_of(dtype=dtype, **changes)
    shape = shape_of(model.config)
    deeper = model_of(dtype=dtype, **changes | dict(num_hidden_layers=shape.layers + 1)).train()
    more = kept_backward(deeper.model, ids) - kept_backward(model.train().model, ids)
    assert more == ids.numel() * estimate.layer_activations(shape, dtype.itemsize)
    layers = model(ids, use_cache=True).past_key_values.layers
    assert size(t for x in layers for t in (x.keys, x.values)) == estimate.cache(shape, job, 2, 7)
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    assert shape.read == sum(p.numel() for p in model.parameters() if tied or p is not embedding)


def kept_backward(model, ids):
    """Bytes that a forward keeps for the backward pass, its weights left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(ids, use_cache=False)
    return sum(n for place, (n, _) in kept.items() if place not in weights)


@pytest.mark.parametrize("k", [1, 3])
def test_the_record(k):
    config = softar.SoftConfig(mixer="k-samples", mixer_args={"k": k}, top_k=None, max_new_tokens=6)
    out = softar.generate(model_of(), torch.randint(5, VOCAB, (3, 4)), config=config, rng=seeded())
    job = Job(False, new=out.record.token.shape[1], kept=k)
    assert size(out.record) == estimate.record(job, rows=3)


def seeded():
    return torch.Generator().manual_seed(0)


def test_the_formulas_of_the_page_by_hand():
    """LoRA of an 8B on eight GPUs."""
    shape = shape_of(LlamaConfig(**estimate.MODELS["8b"]))
    n, layer, d, inner, v = 8_030_261_248, 218_112_000, 4096, 14_336, 128_256
    adapter = 16 * 32 * (2 * 2 * d + 2 * (d + 1024) + 3 * (d + inner))
    rows, length, new = 4, 1024, 512
    kept = (16 * adapter + 2 * n) / 8 + 2 * (n - 30 * layer)
    a = 16 * d + 8 * inner + 4 * (d + 1024) + 4 * 32 + 8
    sft = rows * length * (3 * 32 * 2 * d + a) + 10 * rows * length * v
    update = rows * length * (32 * 2 * d + a) + 12 * rows * new * v
    cache = 2 * 32 * 1024 * 2 * 64
    rollout = 2 * n + cache * length + 12 * 64 * v + 64 * new * (36 + 17) + 6 * 64 * 512 * inner
    found = estimate.memory(shape, Job(True), gpus=8)
    states = (16 * adapter + 2 * n) / 8
    assert found == pytest.approx(
        dict(SFT=kept + sft, update=kept + update, rollout=states + rollout)
    )
    machine = estimate.GPUS["h100"]._replace(step=0.5, train=0.25)
    token = 2 * (n - v * d) + 2 * 32 * d * length
    end = 28 * adapter / 8 / 3.35e12 / 0.25
    passes, trained, prompts = (k * token / 989e12 / 0.25 for k in (9 * 4096, 3 * 65_536, 32_768))
    step = (2 * (n - v * d) + cache * 768) / 3.35e12
    took = estimate.seconds(shape, Job(True), machine)
    rollout = 512 * step / 0.5 + prompts
    expected = dict(sft=passes + end, rollout=rollout, grpo=rollout + trained + end)
    assert took == pytest.approx(expected)
    slow = machine._replace(link=1e9)
    sent = 2 * (6 * n + adapter) * 7 / 8 / 1e9
    assert estimate.seconds(shape, Job(True), slow)["sft"] == pytest.approx(sent + end)


@pytest.mark.parametrize(
    "config, says",
    [
        (GPT2Config(), "gpt2 has no hidden_size"),
        *[
            (kind(**SMALL), f"{kind.model_type} has not in each layer the seven matrices")
            for kind in (MixtralConfig, GPTNeoXConfig, PhiConfig, Starcoder2Config, FalconH1Config)
        ],
    ],
)
def test_what_is_not_estimated_is_named(config, says):
    with pytest.raises(ValueError, match=says):
        shape_of(config)


def run(monkeypatch, capsys, folder, *options):
    monkeypatch.setattr("sys.argv", ["estimate", "--output", str(folder), *options])
    estimate.main()
    return capsys.readouterr().out


def test_the_table_of_the_page(monkeypatch, capsys, tmp_path):
    printed = run(monkeypatch, capsys, tmp_path)
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 6 and "\n".join(table) in README.read_text()


def test_it_times_a_model_beside_its_limits(monkeypatch, capsys, tmp_path):
    """Whatever tokens are drawn: pads, too, at the rows' ends."""

    def pads(_, shape, **how):
        return torch.zeros(shape, **dict(dtype=int) | how)  # mnns-tiny's pad token is 0

    monkeypatch.setattr(torch, "randint", pads)
    printed = run(monkeypatch, capsys, tmp_path, "--measure", "mnns-tiny", "--repeats", "1")
    assert re.search(r"GB/s.*decode 8.*sft.*grpo", printed, re.DOTALL)


@pytest.mark.parametrize(
    "options, says",
    [
        ("--measure mnns-tiny --repeats 0", "repeats=0 must be at least 1"),
        ("--measure mnns-tiny --batch 2", "batch=2 does nothing beside --measure"),
        ("--measure mnns-tiny --gpu a100", "gpu=a100 does nothing beside --measure"),
        ("--repeats 2", "repeats=2 does nothing without --measure"),
        ("--step_share 0", "step_share=0.0 must be above 0"),
        ("--train_share 1.5", "train_share=1.5 must be above 0 and at most 1"),
        ("--train_share nan", "train_share=nan must be"),
        ("--model mnns-sfot-tiny", "model='mnns-sfot-tiny' is not there, did you mean"),
        ("--model mnns-diffusion-tiny", "model='mnns-diffusion-tiny' fills masks"),
        ("--measure mnns-sfot-tiny", "mnns-sfot-tiny"),
        ("--model 8b --output /dev/null/out", "/dev/null"),
    ],
)
def test_options_that_are_refused(monkeypatch, capsys, tmp_path, options, says):
    check_refused(monkeypatch, capsys, tmp_path, *options.split(), says=says)


def check_refused(monkeypatch, capsys, folder, *options, says):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, folder, *options)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("estimate: error: ") and says in err
    assert len(err.splitlines()) == 1


def test_names_of_models_are_those_of_softar(monkeypatch, capsys, tmp_path):
    """A tiny one is nothing in GB: two lines of it, all weights and LoRA."""
    folder = softar.models.folder_of("mnns-soft-tiny")
    names = ["mnns-tiny", "mnns-soft-tiny", str(folder)]
    printed = run(monkeypatch, capsys, tmp_path, "--gpus", "1", "--model", *names)
    lines = [line.split(" | ")[1:] for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6 and lines[2:4] == lines[4:6] == lines[6:8]


@pytest.mark.parametrize(
    "job, gpus, forwards",
    [
        (dict(recompute=False), 1, 1 + 2 / 2),
        (dict(recompute=False), 8, 3),
        (dict(), 1, 3),
        (dict(recompute=False, prompt=100, new=300), 1, 3),  # saves less than a fifth
    ],
)
def test_what_is_before_the_thoughts_is_read_once_where_soft_sft_does(job, gpus, forwards):
    shape, job = shape_of(LlamaConfig(**estimate.MODELS["8b"])), Job(False, **job)
    machine = estimate.GPUS["h100"]._replace(gpus=gpus, link=1e30)
    tokens = job.batch * (job.prompt + job.new)
    trained = estimate.training_seconds(shape, job, machine, tokens, forwards=forwards)
    end = estimate.update_seconds(shape, job, machine)
    assert estimate.seconds(shape, job, machine)["sft"] == pytest.approx(trained + end)


@pytest.mark.parametrize("option", ["--gpus", "--new_tokens", "--batch"])
def test_counts_below_one(monkeypatch, capsys, tmp_path, option):
    check_refused(monkeypatch, capsys, tmp_path, option, "0", says="=0 must be at least 1")
