"""Two gloo processes with the weights split between them by FSDP2 train as one process with whole
weights: soft SFT whose thoughts and GRPO whose texts end sooner in one process than in the other, PPO,
accuracies. This file is also the program of the two.

accelerate gives FSDP to GPUs alone, so the program says to it that these are such: what runs is
torch's own FSDP2. What accelerate does with it here without that is refused by name.
"""

import contextlib
import functools
import os
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
)
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from test_rl_ddp import SGD
from test_rl_trainers import trainer
from test_sft import calm, data, trainer_of
from tiny import EOS, model_of
from torch import nn
from torch.distributed import HashStore
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from softar.split import GATHERS, WHOLE, check_split, is_split, with_whole_weights

FSDP2 = dict(
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_RESHARD_AFTER_FORWARD="true",
    FSDP_STATE_DICT_TYPE=WHOLE,
    ACCELERATE_USE_CPU="true",
    ACCELERATE_TORCH_DEVICE="cpu",
)


def ending():
    """A model whose texts end at unlike lengths."""
    model = model_of()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3
    return model


def sft(folder, rows, **options):
    graded = dict(score=lambda answer, row: float(len(answer) % 7), eval_new_tokens=9)
    return trainer_of(
        folder,
        eval_dataset=data(8, seed=3),
        **graded,
        eval_strategy="steps",
        eval_steps=1,
        model=calm(),
        alpha_schedule="constant",
        alpha_start=0.3,
        per_device_train_batch_size=rows,
        **SGD | dict(learning_rate=0.05) | options,
    )


def rl(kind, **options):
    def made(folder, rows):
        how = dict(per_device_train_batch_size=rows, max_completion_length=40, loss_type="dapo")
        return trainer(folder, kind, model=ending(), **how, **SGD | options)

    return made


CASES = {
    "sft": sft,
    "grpo": rl("grpo", num_iterations=2),
    "ppo": rl("ppo", kl_coef=0.0, num_ppo_epochs=2, vf_coef=1.0),
    # in the middle of what a rollout is used for
    "resumed": rl(
        "grpo", num_iterations=2, optim="adamw_torch", save_strategy="steps", save_steps=1
    ),
    "bf16": functools.partial(sft, bf16=True),
}


def train(folder, name, processes):
    """-> {what: tensor} after two steps: weights, and what was logged."""
    done = CASES[name](folder / name, 8 // processes)
    done.train()
    if name == "resumed":
        done = CASES[name](folder / "again", 8 // processes)
        done.train(resume_from_checkpoint=str(folder / name / "checkpoint-1"))
    seen = ("reward", "eval_soft_accuracy", "eval_discrete_accuracy")
    logged = [entry[key] for entry in done.state.log_history for key in seen if key in entry]
    weights = done.accelerator.get_state_dict(done.model)
    return {k: v.contiguous() for k, v in weights.items()} | {"logged": torch.tensor(logged)}


def main(folder):
    begin = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
    for name in CASES:
        found = train(folder, name, int(os.environ["WORLD_SIZE"]))
        if os.environ["RANK"] == "0":
            save_file(found, folder / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"soft_mode='sequential' under FSDP .* use 'parallel'"):
        trainer_of(folder / "sequential", soft_mode="sequential", **SGD)
    with pytest.raises(ValueError, match=r"learn_temperature=True under FSDP"):
        trainer_of(folder / "learnt", learn_temperature=True, **SGD)
    PartialState().wait_for_everyone()
    # a process that leaves while gloo's threads run may abort
    PartialState().destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    env = os.environ | FSDP2 | {"OMP_NUM_THREADS": "1"}
    done = warm.run(__file__, [folder], env, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_split_weights_train_as_whole_ones(two, tmp_path, name):
    theirs, ours = load_file(two / f"{name}.safetensors"), train(tmp_path, name, 1)
    assert theirs.keys() == ours.keys() and len(ours["logged"])
    for key in ours if name != "bf16" else ():
        torch.testing.assert_close(theirs[key], ours[key], atol=1e-5, rtol=1e-5, msg=key)
    if name == "bf16":  # split layers compute in it, whole ones under autocast
        start = calm().state_dict()
        apart, moved, dense = (
            sum((a[key] - b[key]).square().sum().item() for key in start)
            for a, b in (
                (theirs, ours),
                (ours, start),
                (theirs, load_file(two / "sft.safetensors")),
            )
        )
        assert 0 < apart < 0.03**2 * moved and dense > 1e-4**2 * moved


# -- all weights at hand


@pytest.fixture
def alone():
    """A process group of this process, for FSDP2."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def trainer_with(model, backend):
    backend.unwrap_model = lambda model: model
    args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    return SimpleNamespace(model_wrapped=model, accelerator=backend, args=args)


def whole_after_a_forward(model):
    """The modules of FSDP2 whose weights stay gathered after it."""
    model(torch.tensor([[5, 6, 7]]))
    parts = [(name, m) for name, m in model.named_modules() if isinstance(m, FSDPModule)]
    kept = {name for name, m in parts if not all(isinstance(p, DTensor) for p in m.parameters())}
    for _, part in parts:
        part.reshard()
    return kept


WRAPS = {  # kind of module -> does it let go of its weights after its forward?
    "layers": {LlamaDecoderLayer: True},
    "by size": {nn.Linear: True},
    "kept": {LlamaDecoderLayer: False, nn.Embedding: True},
    "nested": {LlamaMLP: True, LlamaDecoderLayer: False},
    "none": {},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("fails", [None, "function", "gathering"])
def test_weights_are_let_go_of_afterwards_as_before(alone, monkeypatch, wrap, fails):
    model = model_of()
    for kind, lets_go in WRAPS[wrap].items():
        for module in [m for m in model.modules() if isinstance(m, kind)]:
            fully_shard(module, mesh=alone, reshard_after_forward=lets_go)
    fully_shard(model, mesh=alone)
    before, seen = whole_after_a_forward(model), []

    def function(model):
        for _ in range(2):
            model(torch.tensor([[5, 6, 7]]))
            seen.extend(type(p) for p in model.parameters())
        if fails:
            raise KeyError("of an evaluation")

    def gather(part):
        """The last to be gathered finds no room."""
        if part is parts[-1][1]:
            raise KeyError("of memory")
        unshard(part)

    parts = [(name, m) for name, m in model.named_modules() if isinstance(m, FSDPModule)]
    unshard = FSDPModule.unshard
    if fails == "gathering":
        monkeypatch.setattr(FSDPModule, "unshard", gather)
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        with_whole_weights(trainer_with(model, split_by(fsdp())), function)
    assert {*seen} == (set() if fails == "gathering" else {nn.Parameter})
    assert whole_after_a_forward(model) == before
    assert wrap == "none" or before < {name for name, _ in parts}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_layers_are_recomputed_after_an_evaluation_that_fails(error):
    model = model_of().train()
    model.gradient_checkpointing_enable()

    def function(model):
        assert not model.is_gradient_checkpointing
        raise error("of an evaluation")

    with pytest.raises(error, match="of an evaluation"):
        with_whole_weights(trainer_with(model, split_by()), function)
    assert model.is_gradient_checkpointing


def test_what_an_evaluation_that_fails_held_is_let_go_of():
    held = []

    def function(model):
        cache = nn.Linear(2, 2)
        held.append(weakref.ref(cache))
        raise ValueError("of an evaluation")

    with contextlib.suppress(ValueError):
        with_whole_weights(trainer_with(model_of(), split_by()), function)
    assert held[0]() is None


# -- what is refused


def test_where_accelerate_would_not_split_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for make in (trainer_of, trainer):
        with pytest.raises(ValueError, match=r"FSDP splits .* --num_processes N alone"):
            make(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed splits weights over GPUs"):
        check_split(SimpleNamespace(accelerator=split_by()))


def split_by(fsdp=None, zero=None):
    """What a trainer's accelerator says of itself."""
    kind = DistributedType.FSDP if fsdp else DistributedType.DEEPSPEED if zero else "NO"
    return SimpleNamespace(
        distributed_type=DistributedType(kind),
        state=SimpleNamespace(deepspeed_plugin=zero, fsdp_plugin=fsdp),
        parallelism_config=None,
    )


def zero(stage, gathers=True):
    config = {"zero_optimization": {GATHERS: gathers}}
    return SimpleNamespace(zero_stage=stage, deepspeed_config=config)


def fsdp(version=2, form=WHOLE):
    return SimpleNamespace(fsdp_version=version, state_dict_type=SimpleNamespace(name=form))


def training(**changes):
    common = dict(
        optim="adamw_torch", optim_args=None, save_strategy="steps", save_only_model=False
    )
    return SimpleNamespace(**common | changes)


@pytest.mark.parametrize(
    "found, options, says",
    [
        (split_by(fsdp(1)), {}, "fsdp_version=1: SimpleNamespace trains under FSDP2"),
        (split_by(fsdp(form="SHARDED_STATE_DICT")), {}, "fsdp_state_dict_type=SHARDED_STATE_DICT"),
        (split_by(zero=zero(3, gathers=False)), {}, f"{GATHERS} is off"),
        (split_by(fsdp()), dict(a=(7, "leave it out")), "a=7 under FSDP or ZeRO-3: leave it out"),
        (split_by(fsdp()), dict(a=(False, "leave it out")), None),
        (split_by(zero=zero(2, gathers=False)), dict(a=(7, "no")), None),
        (split_by(), dict(a=(7, "no")), None),
    ],
)
def test_ways_to_split_that_cannot_be_trained_under(found, options, says):
    trainer = SimpleNamespace(accelerator=found, args=training())
    if says is None:
        check_split(trainer, **options)
    else:
        with pytest.raises(ValueError, match=says):
            check_split(trainer, **options)


def test_an_optimiser_without_a_state_is_refused_where_it_could_not_go_on(alone):
    sgd = functools.partial(training, optim="sgd")
    with pytest.raises(ValueError, match=r"optim='sgd' under FSDP2: .*momentum=0.9"):
        check_split(SimpleNamespace(accelerator=split_by(fsdp()), args=sgd()))
    for found, args in (
        (fsdp(), sgd(save_strategy="no")),
        (fsdp(), sgd(save_only_model=True)),
        (fsdp(), sgd(optim_args="momentum=0.9")),
        (None, sgd()),
    ):
        check_split(SimpleNamespace(accelerator=split_by(found), args=args))
    # with a torch that goes on, the rule goes
    model, how = fully_shard(nn.Linear(2, 2), mesh=alone), StateDictOptions(full_state_dict=True)
    for momentum, goes_on in (
        (0.9, contextlib.nullcontext()),
        (0.0, pytest.raises(AssertionError)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with goes_on:
            state = get_optimizer_state_dict(model, optimizer, options=how)
            set_optimizer_state_dict(model, optimizer, state, options=how)


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_configurations_for_eight_gpus(name, monkeypatch):
    """accelerate reads them, makes of them what it tells the processes, and that is trained under."""
    file = str(Path(__file__).parent.parent / "recipes" / "configs" / f"accelerate_{name}.yaml")
    args = launch_command_parser().parse_args(["--config_file", file, "recipe.py"])
    args, defaults, _ = _validate_launch_command(args)
    assert (args.num_processes, args.mixed_precision, args.use_cpu) == (8, "bf16", False)
    if name == "zero3":
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, told = prepare_deepspeed_cmd_env(args)
    else:
        told = prepare_multi_gpu_env(args)
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    if name == "fsdp2":
        found = split_by(FullyShardedDataParallelPlugin())
    else:
        gathers = told["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
        found = split_by(zero=zero(int(told["ACCELERATE_DEEPSPEED_ZERO_STAGE"]), gathers))
    check_split(SimpleNamespace(accelerator=found, args=training()))
    assert is_split(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
