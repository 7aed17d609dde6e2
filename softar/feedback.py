"""What a step reads where that is more than a mixture of tokens: the last hidden state (Coconut,
arXiv:2412.06769), and what HRPO's gate makes of a sampled token and the belief (arXiv:2505.18454).
And what the last hidden state says of how a mixture is made: its temperature.

Shapes: ... any leading dims, B batch, V vocabulary, K tokens kept, D embedding width.
"""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .soft import Soft, per_layer_sizes, soft_embed, token_inputs

SHARPNESS = 8.0  # c of the paper
REACH = 8.0  # a step's temperature is at most so many times the other, or so many times less
STACKED = ("gemma3n_text",)  # their last hidden states are [altup_num_inputs, B, T, D]
ROWS = 8192  # of the embedding table that are looked at together


class Gate(nn.Module):
    """How much of the token and how much of the belief is read, for each dimension of the embedding
    (arXiv:2505.18454, eq. 4): e = a E[token] + sqrt(1 - a^2) i s, with r = sigmoid(W_r E[token] +
    b_r), i = sigmoid(W_i E[token] + b_i) and a = exp(-c softplus(-Lambda) r).

    Args:
        width: D.
        least, most: at the start a is drawn between them where r = 1: nearly the token alone.
    """

    def __init__(self, width: int, *, least: float = 0.98, most: float = 0.999):
        super().__init__()
        self.recurrence, self.input = nn.Linear(width, width), nn.Linear(width, width)
        share = torch.empty(width).uniform_(least, most)
        self.strength = nn.Parameter(-torch.expm1(-share.log() / SHARPNESS).log())  # Lambda

    def forward(self, token: Tensor, mixture: Tensor) -> Tensor:
        """token: [..., D] its embedding; mixture: [..., D] s, of weights with l2 norm 1 -> [..., D]
        what is read, in the dtype of `token`."""
        own = token.to(self.strength.dtype)
        decay = SHARPNESS * nn.functional.softplus(-self.strength)
        a = (-decay * self.recurrence(own).sigmoid()).exp()
        # the root has no slope at 0
        rest = (1 - a.square()).clamp_min(torch.finfo(a.dtype).tiny).sqrt()
        mixed = self.input(own).sigmoid() * mixture.to(own.dtype)
        return (a * own + rest * mixed).to(token.dtype)

    def save(self, file: str | Path) -> None:
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, file)


def load_gate(file: str | Path, width: int, device: torch.device) -> Gate:
    """What `Gate.save` wrote, in float32. Raises ValueError for a file that is no gate of this
    width."""
    with torch.device("meta"):  # draws nothing
        gate = Gate(width)
    try:
        gate.load_state_dict(load_file(file), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"gate={str(file)!r} is no gate for embeddings of width {width} ({said}): give a file that "
            "softar.feedback.Gate.save wrote for this model"
        ) from error
    return gate.float().to(device).requires_grad_(False)


class StepTemperature:
    """How many times a configuration's temperature each step takes: exp(c tanh(u / c)) with
    c = log REACH and u the mean over the dimensions of weights * h / rms(h), h the last hidden state,
    after the final norm. Weights of 0 give 1; one step of Adam moves u by its learning rate at most,
    whatever the width and scale of h.

    Args:
        weights: [D].
    """

    def __init__(self, weights: Tensor):
        self.weights = weights

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., 1] float32, in [1 / REACH, REACH], on its device."""
        h, c = hidden.float(), math.log(REACH)
        scale = h.square().mean(-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny).rsqrt()
        u = (h * scale * self.weights.to(h.device)).mean(-1, keepdim=True)
        # of a model that gives no numbers the logits tell
        return (c * (u / c).tanh()).nan_to_num().exp()

    def __repr__(self) -> str:
        return f"StepTemperature of width {len(self.weights)}"

    def save(self, file: str | Path) -> None:
        save_file({"weights": self.weights.detach().contiguous()}, file)


def load_step_temperature(source: str | StepTemperature) -> StepTemperature:
    """What `StepTemperature.save` wrote, on the CPU, or the value itself. Raises ValueError for a file
    that is none."""
    if isinstance(source, StepTemperature):
        return source
    try:
        (weights,) = load_file(source).values()
        if weights.dim() != 1:
            raise ValueError(f"weights of shape {[*weights.shape]}")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"step_temperature={source!r} holds no weights [D] ({error}): give a file that "
            "softar.feedback.StepTemperature.save wrote"
        ) from error
    return StepTemperature(weights.float())


def step_temperature_of(config, model) -> StepTemperature | None:
    """A configuration's, on the device of the model's first part. Raises ValueError for one of another width."""
    if config.step_temperature is None:
        return None
    weights = load_step_temperature(config.step_temperature).weights
    if len(weights) != (width := hidden_size(model)):
        raise ValueError(
            f"step_temperature={config.step_temperature!r} is for hidden states of width {len(weights)}, and "
            f"{type(model).__name__} has them of {width}: give the one that was trained with it"
        )
    return StepTemperature(weights.to(model.device))


def hidden_size(model) -> int:
    """D, of the last hidden state. Raises ValueError for a model that has several in its place."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type in STACKED:
        raise ValueError(
            f"{type(model).__name__} ({config.model_type}) has several last hidden states side by side, of which no "
            "temperature is made and none is read: leave out step_temperature and learn_step_temperature, and take a "
            "mixer of tokens"
        )
    return config.word_embed_proj_dim if config.model_type == "opt" else config.hidden_size


def check_feedback(config, mixer) -> None:
    """Raise ValueError for a configuration whose vectors nothing would end, or whose gate is not
    there. mixer: its own, a softar.mixers.Mixer."""
    if mixer.latent and (config.budget, config.cold_stop_entropy) == (None, None):
        raise ValueError(
            f"mixer={config.mixer!r} feeds back vectors that no token stands for, so none can end the "
            "thought: give budget, the number of steps"
        )
    if mixer.latent and config.rescale == "l2":
        raise ValueError(
            f"rescale='l2' divides by the norm of weights, and mixer={config.mixer!r} has none: give 'norm'"
        )
    gate, step = config.gate, config.step_temperature
    if gate is not None and not (isinstance(gate, str | Path) and Path(gate).is_file()):
        raise ValueError(f"gate={config.gate!r} is no file: give one that Gate.save wrote")
    if isinstance(step, str) and not Path(step).is_file():
        raise ValueError(
            f"step_temperature={step!r} is no file: give one that StepTemperature.save wrote"
        )


def width_of(model) -> int:
    """D, of the input embedding."""
    embedding = model.get_input_embeddings()  # PEFT wraps it
    table = next((m for m in embedding.modules() if isinstance(m, nn.Embedding)), None)
    return hidden_size(model) if table is None else table.embedding_dim


def check_reads_vectors(model) -> None:
    """Raise ValueError for a model whose hidden states cannot stand in for its embeddings."""
    name, hidden = type(model).__name__, hidden_size(model)
    if hidden != (width := width_of(model)):
        raise ValueError(
            f"{name} has hidden states of width {hidden} and embeddings of {width}, so it cannot read the "
            "former: take a mixer of tokens"
        )
    if per_layer_sizes(model):
        raise ValueError(
            f"{name} embeds a token once more for every layer, and a hidden state is none: take a mixer "
            "of tokens"
        )


@torch.no_grad()
def mean_length(embedding: nn.Module, vocab_size: int, device: torch.device) -> float:
    """Mean l2 norm of a model's input embeddings."""
    if type(embedding) is nn.Embedding:  # which looks rows up, and does nothing else to them
        table = embedding.weight[:vocab_size]
        wide = torch.promote_types(table.dtype, torch.float32)
        return float(table.norm(dim=-1, dtype=wide).mean())
    ids = torch.arange(vocab_size, device=device)
    parts = [embedding(some).float().norm(dim=-1).sum() for some in ids.split(ROWS)]
    return float(sum(parts)) / vocab_size


def stretched(vector: Tensor, length: float | None) -> Tensor:
    """Vectors [..., D] of this l2 norm; None leaves them."""
    if length is None:
        return vector
    return vector * (length / vector.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)).to(vector)


def to_host(vector: Tensor | None, reads: Tensor) -> Tensor | None:
    """[B, D] float16 on the host, 0 in rows that do not read theirs."""
    if vector is None:
        return None
    most = torch.finfo(torch.float16).max
    return vector.where(reads[:, None], 0).clamp(-most, most).to("cpu", torch.float16)


def where_read(perturbed: Tensor | None, reads: Tensor) -> Tensor | None:
    """softar.Mixed.perturbed [B, K], -inf in rows that do not read their mixture, [B] bool."""
    return None if perturbed is None else perturbed.masked_fill(~reads[:, None], -torch.inf)


def stack_vectors(steps: list[Tensor | None], empty: float = 0.0) -> Tensor | None:
    """Steps [B, D], None where nobody reads one -> [B, T, D], `empty` there; None for none at
    all."""
    some = next((step for step in steps if step is not None), None)
    if some is None:
        return None
    return torch.stack([torch.full_like(some, empty) if x is None else x for x in steps], 1)


def feed_vectors(model, token: Tensor, vector: Tensor, reads: Tensor) -> dict[str, Tensor]:
    """Arguments of a forward [B, 1, ...] of vectors [B, D] in the rows that read them, [B] bool, and
    of tokens [B] in the others."""
    tokens = token_inputs(model, token[:, None])["inputs_embeds"]
    return {"inputs_embeds": torch.where(reads[:, None, None], vector[:, None].to(tokens), tokens)}


def feed_gated(model, soft: Soft, token: Tensor, gate: Gate, reads: Tensor) -> dict[str, Tensor]:
    """The same of what the gate makes of the mixture, ids and weights [B, K], and of the token."""
    embedding = model.get_input_embeddings()
    mixture = soft_embed(soft, embedding, rescale="l2")
    return feed_vectors(model, token, gate(embedding(token), mixture), reads)
