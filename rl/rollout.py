"""From a soft decode to tensors that train: what a rollout keeps, its random numbers, its file, its
rewards' checks.

Shapes: B rows, P prompt length, C completion steps, K draws of a step.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_layers import GradientCheckpointingLayer

from softar.decode import SoftOutput
from softar.soft import Soft
from softar.thought import Kind, Record

from .discretise import heaviest

ACTIONS = (int(Kind.SOFT), int(Kind.HARD))  # what the policy chose itself


def generators(
    seed: int, is_eval: bool, step: int, first_row: int, rows: int
) -> list[torch.Generator]:
    """A CPU generator per row of the global batch, whoever decodes it: number of processes and
    resuming do not show."""
    seeds = (
        np.random.SeedSequence([seed, int(is_eval), step, first_row + row]) for row in range(rows)
    )
    return [
        torch.Generator().manual_seed(int(s.generate_state(1, np.uint64)[0] >> 1)) for s in seeds
    ]


def payload(record: Record, width: int) -> dict[str, Tensor]:
    """The tensors of a rollout, padded to `width` steps: what the replay reads and what the loss
    counts.

    soft_ids [B, C, K], soft_weights [B, C, K], soft_alive [B, C] bool (not padding), soft_action
    [B, C] bool (chosen by the policy: no padding, nothing forced).
    """
    kind = record.kind
    action = torch.isin(kind, torch.tensor(ACTIONS, dtype=kind.dtype, device=kind.device))
    more = width - kind.shape[1]
    return {
        "soft_ids": pad(record.ids, (0, 0, 0, more)),
        "soft_weights": pad(record.weights, (0, 0, 0, more)),
        "soft_alive": pad(kind != Kind.PAD, (0, more)),
        "soft_action": pad(action, (0, more)),
    }


def mixture(batch: dict[str, Tensor]) -> Soft:
    """What each step read back, and, a draw a slot, the action: a slot of weight 0 is no draw."""
    return Soft(batch["soft_ids"], batch["soft_weights"])


def statistics(out: SoftOutput, has_answer: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and count of each metric of a rollout, for a mean over all processes.

    thought_entropy, answer_entropy: nats a step, at the policy's temperature. thought_length:
    steps, with the closing token. draws_agree: share of mixtures whose draws are all one token,
    where soft and discrete thinking read the same. stream_is_argmax: share of rows whose recorded
    tokens are the heaviest of their mixtures. unclosed: share of rows whose thought never ended, so
    that they have no answer.
    """
    record = out.record
    soft, single = record.kind == Kind.SOFT, record.kind == Kind.HARD
    late = torch.arange(single.shape[1], device=single.device) >= out.answer_start[:, None]
    thought, answer = soft | (single & ~late), single & late
    drawn = record.weights > 0
    agree = ((record.ids == record.ids[..., :1]) | ~drawn).all(-1)
    same = (heaviest(record) == record.token) | ~soft
    rows = torch.ones(len(thought), device=thought.device)
    found = {
        "thought_entropy": (record.entropy[thought].sum(), thought.sum()),
        "answer_entropy": (record.entropy[answer].sum(), answer.sum()),
        "draws_agree": (agree[soft].sum(), soft.sum()),
        "stream_is_argmax": (same.all(1).sum(), rows.sum()),
        "thought_length": (thought.sum(), rows.sum()),
    }
    if has_answer:
        alive = (record.kind != Kind.PAD).sum(1)
        found["unclosed"] = ((out.answer_start >= alive).sum(), rows.sum())
    return found


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


def still(model: nn.Module) -> None:
    """Switch dropout off for one training step: the flags of the trainer and of gradient
    checkpointing stay. It cannot be undone after the loss, as checkpointed layers run again in the
    backward pass; Trainer calls `train` each step."""
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
    model.training = True
