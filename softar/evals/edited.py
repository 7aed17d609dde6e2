"""What an answer owes to the thought before it: the same prompt, answered after thoughts that were
cut or taken from elsewhere.

Shapes: B prompts, P their length, n steps of thought, K tokens of a mixture, V vocabulary.
"""

import copy

import torch
from torch import Tensor

from ..checks import check_least
from ..config import SoftConfig
from ..decode import generate
from ..placement import evaluating
from ..sft.forward import mixed_forward
from ..soft import Soft


def thoughts_of(model, input_ids: Tensor, config: SoftConfig) -> Soft:
    """What each step of the thoughts reads, of prompts [B, P] of one length: ids and weights
    [B, n, K]. config: with a budget of n steps, which all rows think: an end token ends none.

    Raises:
        ValueError: without a budget, with other ends of a thought, for a length that leaves no answer,
            and for what reads more than a mean of embeddings by these weights.
    """
    n, length = config.budget, config.max_new_tokens
    if not n or length <= n:
        raise ValueError(
            f"budget={n}, max_new_tokens={length}: say how many steps a thought has, at least 1 and fewer "
            "than tokens"
        )
    if config.cold_stop_entropy is not None or config.think_end is not None:
        raise ValueError(
            f"cold_stop_entropy={config.cold_stop_entropy}, think_end={config.think_end!r} end thoughts at "
            "lengths of their own: leave them out"
        )
    if config.is_latent or config.rescale is not None or config.gate is not None:
        raise ValueError(
            f"mixer={config.mixer!r}, mixer_args={config.mixer_args}, rescale={config.rescale!r} read more than "
            "tokens and their weights, which are edited: take a mixer of tokens, no gate and rescale=None"
        )
    endless = copy.deepcopy(model.generation_config)
    # None would be the model's own
    endless.eos_token_id = model.get_input_embeddings().num_embeddings
    out = generate(model, input_ids, config=config, generation_config=endless)
    return Soft(out.record.ids[:, :n], out.record.weights[:, :n])


def cut(thought: Soft, k: int) -> Soft:
    """The k likeliest tokens of each mixture, their weights divided by their sum."""
    check_least({"k": k}, k=1)
    weights, at = thought.weights.topk(min(k, thought.weights.shape[-1]), -1)
    return Soft(thought.ids.gather(-1, at), weights / weights.sum(-1, keepdim=True))


def of_another(thought: Soft) -> Soft:
    """To each row the thought of the row after it, to the last that of the first."""
    return Soft(*(part.roll(-1, 0) for part in thought))


def answers_after(model, input_ids: Tensor, thought: Soft) -> Tensor:
    """The likeliest first token of the answer after each prompt and thought: [B, P], [B, n, K] ->
    [B]. Prompts are not padded."""
    (B, P), n = input_ids.shape, thought.ids.shape[1]
    ids = torch.cat([input_ids, thought.ids[..., 0]], 1)
    is_thought = (torch.arange(P + n, device=ids.device) >= P).expand(B, -1)
    mixtures = Soft(*(torch.nn.functional.pad(part, (0, 0, P, 0)) for part in thought))
    with evaluating(model), torch.no_grad():
        return mixed_forward(model, ids, None, is_thought, mixtures)[:, -1].argmax(-1)
