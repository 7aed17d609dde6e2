"""From a soft decode to tensors that train: what a rollout keeps, its random numbers, its file.

Shapes: B rows, P prompt length, C completion steps, K draws of a step.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import create_model_from_path

from softar import draws
from softar.decode import SoftOutput, generate
from softar.models import plain
from softar.split import with_whole_weights
from softar.thought import Kind, Record

CHOSEN = (int(Kind.SOFT), int(Kind.HARD))  # kinds of steps that the policy chose itself


@dataclass
class Rollout:
    """One rollout, for the hooks that TRL calls one after the other and that carry token ids only."""

    out: SoftOutput
    tensors: dict[str, Tensor] | None = None  # see payload
    rewards: Tensor | None = None  # [rows of all processes], NaN for a row without a score
    # [rows of all processes, n], what advantages are made of: the rewards, or those of each function
    compared: Tensor | None = None
    values: Tensor | None = None  # [B, C] of a value head, where an update comes before their use

    def payload(self, width: int) -> dict[str, Tensor]:
        if self.tensors is None:
            self.tensors = payload(self.out.record, width, self.out.perturbed)
        return self.tensors


def generators(
    seed: int, is_eval: bool, step: int, first_row: int, rows: int
) -> list[torch.Generator]:
    """A CPU generator per row of the global batch, whoever decodes it: number of processes and
    resuming do not show."""
    return draws.generators(range(first_row, first_row + rows), seed, int(is_eval), step)


def payload(record: Record, width: int, perturbed: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a rollout, padded to `width` steps: what the replay reads, what was drawn and
    what the loss counts.

    soft_ids [B, C, K], soft_weights [B, C, K] float32, as they were read, so that a replay reads the
    same to the bit; soft_token [B, C]; soft_alive [B, C] bool (not padding), soft_action [B, C] bool
    (chosen by the policy: no padding, nothing forced); soft_perturbed [B, C, J], SoftOutput's, and
    of a step that read a single token that one draw alone.
    """
    kind = record.kind
    action = torch.isin(kind, torch.tensor(CHOSEN, dtype=kind.dtype, device=kind.device))
    more = width - kind.shape[1]
    if perturbed is None:
        perturbed = torch.zeros_like(record.logp)[..., None]
    single = torch.full_like(perturbed, -torch.inf)
    single[..., 0] = 0.0
    drawn = torch.where((kind == Kind.SOFT)[..., None], perturbed, single)
    return {
        "soft_ids": pad(record.ids, (0, 0, 0, more)),
        "soft_weights": pad(record.weights, (0, 0, 0, more)),
        "soft_token": pad(record.token, (0, more)),
        "soft_alive": pad(kind != Kind.PAD, (0, more)),
        "soft_action": pad(action, (0, more)),
        "soft_perturbed": pad(drawn, (0, 0, 0, more), value=-torch.inf),
    }


@torch.no_grad()
def decode_by_loop(trainer, ids: Tensor, mask: Tensor, rng: list[torch.Generator]) -> SoftOutput:
    """The policy of a trainer, decoded by `softar.generate`: no dropout, none of the settings that
    the model has for its own generation."""
    training, args = trainer.model.training, trainer.args
    settings = GenerationConfig(
        pad_token_id=trainer._tokenizer.pad_token_id, eos_token_id=trainer.eos_token_ids
    )

    def decode(model: nn.Module) -> SoftOutput:
        # The model's own settings would fill what these leave open: a repetition penalty, say
        base = plain(model)
        before, base.generation_config = base.generation_config, settings
        model.eval()
        try:
            return generate(
                model,
                ids,
                mask,
                config=trainer.decoding,
                rng=rng,
                generation_config=settings,
                cache_implementation=args.cache_implementation,
                compile=args.compile_rollout,
            )
        finally:
            model.train(training)
            base.generation_config = before

    return with_whole_weights(trainer, decode)


def save_rollouts(path: Path, micro: int, batches: list[dict[str, Tensor]]) -> None:
    """Keep the micro-step, and the rollouts that further steps will read, beside a checkpoint."""
    flat = {
        f"{i}.{key}": value.clone().contiguous()
        for i, batch in enumerate(batches)
        for key, value in batch.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(flat | {"micro": torch.tensor(micro)}, path)


def load_rollouts(path: Path, device: torch.device) -> tuple[int, list[dict[str, Tensor]]]:
    flat = load_file(path, device=str(device))
    micro = int(flat.pop("micro"))
    batches: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        index, key = name.split(".", 1)
        batches.setdefault(int(index), {})[key] = value
    return micro, [batches[i] for i in sorted(batches)]


def switch_off_dropout(model: nn.Module) -> None:
    """For one training step: the flags of the trainer and of gradient
    checkpointing stay. It cannot be undone after the loss, as checkpointed layers run again in the
    backward pass; Trainer calls `train` each step."""
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
    model.training = True


def frozen_copy(model, init_kwargs: dict | None) -> nn.Module:
    """The model as it is before training. TRL would load it again by the policy's name: an embedded
    model has none on the hub, and one in memory need not be what the name says. Made before TRL
    patches the policy's forward."""
    if isinstance(model, str):
        model = create_model_from_path(model, **(init_kwargs or {}))
    else:
        model = copy.deepcopy(model)
    return model.requires_grad_(False).eval()
