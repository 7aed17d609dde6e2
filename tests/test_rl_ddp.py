"""Two gloo processes train a soft policy and agree with one: rollouts, rewards, first updates. This
file is also their program."""

import os
import sys
from pathlib import Path

import pytest
import torch
import warm
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_rl_diffusion import SOFT
from test_rl_diffusion import trainer as diffusion
from test_rl_trainers import logged, trainer, words

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
# Plain gradient descent: Adam's first update is the sign of a gradient that may be rounding noise,
# and clipping would hide a gradient of the wrong size.
SGD = dict(
    optim="sgd", learning_rate=0.01, max_grad_norm=0.0, max_steps=2, lr_scheduler_type="constant"
)
CASES = {
    "dapo": ("grpo", dict(loss_type="dapo", beta=0.1)),
    "grpo": ("grpo", dict(loss_type="grpo", peft=LORA, beta=0.1, num_iterations=2)),
    "rloo": (
        "rloo",
        dict(loss_type="dr_grpo", gradient_accumulation_steps=2, gradient_checkpointing=True),
    ),
    "ppo": ("ppo", dict(loss_type="dapo", peft=LORA, num_ppo_epochs=2, vf_coef=1.0)),
    "diffusion": ("diffusion", dict(beta=0.1, num_iterations=2, ratio="trajectory", **SOFT)),
}


def train(folder, name, processes):
    """-> {what: tensor} of a run on 8 rows a step: weights after two updates, and the losses."""
    kind, options = CASES[name]
    seen = []

    def reward(completions, completion_ids, **columns):
        seen.extend(completion_ids)
        return words(completions)

    mk = diffusion if kind == "diffusion" else trainer
    done = mk(
        folder / name,
        "grpo" if kind == "diffusion" else kind,
        reward=reward,
        per_device_train_batch_size=8 // processes,
        **SGD,
        **options,
    )
    done.train()
    found = {
        key: value.detach() for key, value in done.model.named_parameters() if value.requires_grad
    }
    rewards = torch.tensor(logged(done, "reward"))
    return {
        **found,
        "log/reward": rewards,
        "log/median": torch.tensor(logged(done, "reward/median")),
    }


def stop(folder):
    """A loss is NaN in one process, its gradient is not: all stop."""
    done, rank = trainer(folder / "nan", **SGD), int(os.environ["RANK"])
    compute = done.compute_loss

    def poisoned(*args, **kwargs):
        return compute(*args, **kwargs) + (
            float("nan") if rank == done.state.global_step == 1 else 0.0
        )

    done.compute_loss = poisoned
    try:
        done.train()
    except FloatingPointError as error:
        (folder / f"stopped-{rank}").write_text(str(error))


def main(folder):
    for name in CASES:
        found = train(folder, name, int(os.environ["WORLD_SIZE"]))
        if os.environ["RANK"] == "0":
            save_file(
                {key: value.contiguous() for key, value in found.items()},
                folder / f"{name}.safetensors",
            )
    stop(folder)
    PartialState().wait_for_everyone()
    # a process that leaves while gloo's threads run may abort
    PartialState().destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = warm.run(__file__, [folder], env, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(two, tmp_path, name):
    theirs, ours = load_file(two / f"{name}.safetensors"), train(tmp_path, name, 1)
    assert theirs.keys() == ours.keys()
    for key in ours:
        assert torch.allclose(theirs[key], ours[key], atol=1e-5), key


@pytest.mark.slow
def test_both_stop_where_one_has_a_bad_loss(two):
    for rank in (0, 1):
        assert (two / f"stopped-{rank}").read_text().startswith("step 2: the loss is nan and")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
