"""The soft token, the one datum of this library: a few token ids and their weights.

A model's belief over the next token becomes an input by mixing the embeddings of its likely tokens.
A hard token is the special case of one id with weight 1. Everything here works on any leading shape
and keeps probabilities in float32.

Shapes: ... any leading dims, V vocabulary, K tokens kept, D embedding width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .largest import Largest

RESCALES = (None, "l2", "norm")
# A log-probability that stands for that of what cannot come: its exp is 0 in float64 too, and no
# loss that multiplies it overflows.
NEVER = -1e4
TILE = 65536  # logits that stay in a processor's cache, and what is made of them


class Soft(NamedTuple):
    """A mixture of tokens. Weights are >= 0 and rows sum to 1 unless whoever made them says
    otherwise."""

    # [..., K] int64, may repeat; an id of weight 0 stands in the mixture without effect
    ids: Tensor
    weights: Tensor  # [..., K] float32


def hard(token: Tensor) -> Soft:
    """The mixture that is exactly one token. token: [...] int64 -> K = 1, weight 1."""
    return Soft(token[..., None], torch.ones_like(token[..., None], dtype=torch.float32))


def mk_proba_dist(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    keep: int | None = None,
    banned: Sequence[int] = (),
    temperature_last: bool = False,
) -> Soft:
    """Turn logits into a mixture: temperature, then top-k, top-p and min-p, each on the
    renormalised rest.

    The order is that of transformers' warpers and of Soft Thinking (arXiv:2505.15778, section 3).
    The filters select, so they pass no gradient to what they drop; logits that stay and the
    temperature get theirs.

    Args:
        logits: [..., V], any float dtype; never written to. -inf is a banned token.
        temperature: >= 0; 0 is the argmax (K = 1). A tensor (learnable, or one value per row:
            broadcastable to [..., 1]) may hold zeros too: such rows put weight 1 on their argmax.
        top_k: keep the k most likely, sorted by weight. None or V keeps all, in vocabulary order.
        top_p: keep the smallest set whose mass reaches p, at least one token.
        min_p: keep tokens of at least min_p times the largest probability (arXiv:2407.01082).
        keep: after the filters keep the largest `keep` weights and renormalise (Soft Thinking's
            max_topk).
        banned: ids that never enter the mixture (pad, BOS, unused rows, image tokens).
        temperature_last: filter at temperature 1 and apply the temperature to what is left
            (llama.cpp's order).

    Returns:
        Soft with K = keep or top_k or V. Ids that a filter dropped keep their place with weight 0.
        Weights of rows in which no token is left are NaN.

    Raises:
        ValueError: for a value out of its range.
    """
    V = logits.shape[-1]
    check_dist(V, temperature, top_k, top_p, min_p, keep, banned)
    x = logits.float()
    if len(banned):
        x = x.index_fill(-1, torch.as_tensor(banned, device=x.device), -torch.inf)
    if not torch.is_tensor(temperature) and temperature == 0:
        ids = Largest(x).id[..., None]
        most = x.detach().gather(-1, ids)
        return Soft(ids, torch.ones_like(most).masked_fill(most == -torch.inf, torch.nan))

    ids = None  # vocabulary order
    if top_k is not None and top_k < V:
        # exact before the temperature too: dividing by T > 0 keeps the order
        ids = Largest(x).ids(top_k)  # slot 0 is the greedy token
        x = x.gather(-1, ids)
    scaled = tempered(x, temperature)
    if top_p is not None or min_p is not None:
        probs = (x if temperature_last else scaled).softmax(-1)
        if top_p is not None and top_p < 1:
            scaled = scaled.masked_fill(
                _outside_nucleus(probs, top_p, is_sorted=ids is not None), -torch.inf
            )
        if min_p is not None and min_p > 0:
            scaled = scaled.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    weights = scaled.softmax(-1)

    if ids is None:
        # a view: no [..., V] of ids is written
        ids = torch.arange(V, device=x.device).expand(x.shape)
    return likeliest(Soft(ids, weights), keep)


def likeliest(soft: Soft, keep: int | None) -> Soft:
    """The `keep` heaviest slots of a mixture, heaviest first, renormalised: [..., K] -> [..., keep].
    None, or no fewer than there are, leaves it."""
    if keep is None or keep >= soft.weights.shape[-1]:
        return soft
    weights, order = soft.weights.topk(keep, -1)
    return Soft(soft.ids.gather(-1, order), weights / weights.sum(-1, keepdim=True))


def soft_embed(soft: Soft, embedding: nn.Module, *, rescale: str | None = None) -> Tensor:
    """The input that a mixture stands for: the weighted sum of its tokens' embeddings.

    Calls `embedding` on the ids, so that whatever the module does (Gemma's scale, LoRA, sharding,
    hooks) is in the result; memory is O(... x K x D). Only for K >= V it is one dense product with
    the table. The sum is taken in float32, or in float64 where weights or table are, and returned
    in the table's dtype; weights and table both get gradients, the latter but for the row that is
    its padding index, as in any lookup. One id of weight 1 gives that token's embedding bit for bit.

    Args:
        soft: ids and weights [..., K].
        embedding: the model's input embedding, ids [...] -> [..., D].
        rescale: a mixture is shorter than the embeddings it mixes. "l2" divides by ||weights||_2
            (HRPO, arXiv:2505.18454, eq. 3); "norm" gives it the mean length of its embeddings; None
            leaves it.

    Returns:
        [..., D] in the embedding's dtype.
    """
    if rescale not in RESCALES:
        raise ValueError(f"rescale={rescale!r} is unknown: choose one of {[*RESCALES]}")
    ids, weights = soft
    # PEFT wraps it
    table = next((m for m in embedding.modules() if isinstance(m, nn.Embedding)), None)
    is_dense = table is not None and weights.shape[-1] >= table.num_embeddings
    vectors = embedding(torch.arange(table.num_embeddings, device=ids.device) if is_dense else ids)
    wide = torch.float64 if torch.float64 in (weights.dtype, vectors.dtype) else torch.float32
    dtype, vectors, weights = vectors.dtype, vectors.to(wide), weights.to(wide)
    if is_dense:
        weights = dense(Soft(ids, weights), table.num_embeddings)
        mixed = weights @ vectors
    else:
        mixed = (weights.unsqueeze(-2) @ vectors).squeeze(-2)
    if rescale is None:
        return mixed.to(dtype)
    if rescale == "l2":
        if is_dense:
            square = weights.square().sum(-1)
        else:  # weights of one id are one entry of the vector
            same = ids[..., :, None] == ids[..., None, :]
            square = (weights[..., :, None] * weights[..., None, :] * same).sum((-2, -1))
        return (mixed / square.sqrt()[..., None]).to(dtype)
    lengths = vectors.norm(dim=-1)
    target = weights @ lengths if lengths.dim() == 1 else (weights * lengths).sum(-1)
    target = target / weights.sum(-1).clamp_min(1e-12)  # those of `hybrid` sum to more than 1
    return (mixed * (target / mixed.norm(dim=-1).clamp_min(1e-12))[..., None]).to(dtype)


def soft_inputs(model, soft: Soft, *, rescale: str | None = None) -> dict[str, Tensor]:
    """What a causal LM is given to read mixtures: arguments of its forward.

    Gemma 3n and 4 embed a token once more for every layer. What they read there is the mixture of
    those embeddings, by the same weights; `rescale` concerns the first embedding only.

    Args:
        model: of transformers, plain or wrapped by PEFT.
        soft: ids and weights [..., K].

    Returns:
        inputs_embeds [..., D], and per_layer_inputs [..., layers, width of each] where the model
        has them.
    """
    inputs = {"inputs_embeds": soft_embed(soft, model.get_input_embeddings(), rescale=rescale)}
    if sizes := per_layer_sizes(model):
        rows, *shape = sizes
        ids = soft.ids.where(soft.ids < rows, 0)  # as for tokens
        mixed = soft_embed(Soft(ids, soft.weights), model.get_per_layer_input_embeddings())
        inputs["per_layer_inputs"] = mixed.unflatten(-1, shape)
    return inputs


def token_inputs(model, ids: Tensor) -> dict[str, Tensor]:
    """`soft_inputs` of tokens, ids [...]: what the model makes of input_ids itself."""
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    if sizes := per_layer_sizes(model):
        rows, *shape = sizes
        # tokens of images and sounds have no row there
        vectors = model.get_per_layer_input_embeddings()(ids.where(ids < rows, 0))
        inputs["per_layer_inputs"] = vectors.unflatten(-1, shape)
    return inputs


def per_layer_sizes(model) -> tuple[int, int, int] | None:
    """Tokens, layers and width of embeddings that a model has for each layer; None where it has
    none."""
    config = model.config.get_text_config(decoder=True)
    width = config.hidden_size_per_layer_input if "hidden_size_per_layer_input" in config else 0
    if not width:
        return None
    return config.vocab_size_per_layer_input, config.num_hidden_layers, width


def dense(soft: Soft, vocab_size: int) -> Tensor:
    """The mixture as a distribution over the vocabulary, [..., V] float32; repeated ids add up."""
    zeros = soft.weights.new_zeros(*soft.weights.shape[:-1], vocab_size)
    return zeros.scatter_add(-1, soft.ids, soft.weights)


def entropy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), unfiltered: [..., V] -> [...] float32.

    -inf logits count as probability 0, with a clean gradient. A row holding NaN or +inf, or nothing
    but -inf, gives NaN: the decoding loop uses that as its check.
    """
    x = tempered(logits.float(), temperature)
    is_large = x.device.type == "cpu" and x.dim() > 1 and x.numel() > TILE
    # a compiler makes tiles of its own
    if is_large and not x.requires_grad and not torch.compiler.is_compiling():
        # a row is one thread's
        height = max(TILE // x.shape[-1], 1) * torch.get_num_threads()
        rows = x.flatten(0, -2).split(height)
        return torch.cat([_entropy(some) for some in rows]).view(x.shape[:-1])
    return _entropy(x)


def _entropy(x: Tensor) -> Tensor:
    logp = x.log_softmax(-1)
    probs = logp.exp()
    # Every term is >= 0, so nothing cancels; the clamp makes 0 log 0 a 0 whose gradient is 0, and
    # lets NaN through.
    if probs.requires_grad:
        return -(probs * logp.clamp_min(NEVER)).sum(-1)
    # in a decode, [B, V] at every step, allocating costs most
    return -probs.mul_(logp.clamp_min_(NEVER)).sum(-1)


def check_dist(
    vocab_size: int | None,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    keep=None,
    banned=(),
    *,
    prefix: str = "",
) -> None:
    """Raise ValueError for a knob of `mk_proba_dist` out of its range; with vocab_size None as far
    as can be told. prefix: of the knobs' names where they are fields of a configuration."""
    V = float("inf") if vocab_size is None else vocab_size
    if torch.is_tensor(temperature):
        # Looking into a tensor on an accelerator would cost every step a synchronisation.
        if temperature.device.type == "cpu" and not (temperature >= 0).all():
            raise ValueError(
                f"{prefix}temperature={temperature.tolist()} must be >= 0 and finite; 0 is the argmax"
            )
    elif not 0 <= temperature < float("inf"):
        raise ValueError(
            f"{prefix}temperature={temperature} must be >= 0 and finite; 0 is the argmax"
        )
    for name, k in (("top_k", top_k), ("keep", keep)):
        if k is not None and not 1 <= k <= V:
            raise ValueError(
                f"{prefix}{name}={k} must lie in 1..{vocab_size or 'V'}, V the vocabulary; None keeps every token"
            )
    for name, p in (("top_p", top_p), ("min_p", min_p)):
        if torch.is_tensor(p) and p.requires_grad:
            raise ValueError(
                f"{prefix}{name}={p.tolist()} wants a gradient, and a filter only selects, so it would get "
                f"none: pass a number"
            )
        if p is not None and not 0 <= p <= 1:
            raise ValueError(f"{prefix}{name}={p} must lie in [0, 1]; None switches the filter off")
    if any(not 0 <= i < V for i in banned) or len(set(banned)) >= V:
        raise ValueError(
            f"{prefix}banned={tuple(banned)} must be ids below {vocab_size or 'V'} and leave at least one token"
        )


def tempered(x: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits [..., V] / T up to a constant of each row; rows with T = 0 become 0 at their argmax
    and -inf elsewhere. Finite gradients for logits and T, also where a logit is -inf or the least
    number."""
    if not torch.is_tensor(temperature):
        if temperature == 1:
            return x
        # The shift keeps a tiny T from overflowing to inf, the floor one below float32's range from
        # 0 / 0.
        return (x - x.amax(-1, keepdim=True)) / max(temperature, torch.finfo(x.dtype).tiny)
    zero = temperature == 0
    peak = x.detach().amax(-1, keepdim=True)
    # 0, or NaN where there is no number to choose
    hot = torch.full_like(x, -torch.inf).scatter(-1, x.argmax(-1, keepdim=True), peak - peak)
    # kept out of the division: its gradient for T would be 0 x inf
    gone = x <= torch.finfo(x.dtype).min
    shifted = (x - x.amax(-1, keepdim=True)).masked_fill(gone, 0.0)
    return torch.where(
        zero, hot, (shifted / temperature.masked_fill(zero, 1.0)).masked_fill(gone, -torch.inf)
    )


def _outside_nucleus(probs: Tensor, top_p: float, *, is_sorted: bool) -> Tensor:
    """True where the mass of strictly more likely tokens already reaches top_p; never true for the
    first."""
    order = None
    if not is_sorted:
        # equal ones as argmax sees them
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
    outside = probs.cumsum(-1) - probs >= top_p
    outside[..., 0] = False
    return outside if order is None else torch.zeros_like(outside).scatter(-1, order, outside)
