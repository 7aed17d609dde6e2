"""Soft thoughts as actions: exact log-probabilities and divergences of what a mixer drew, and the
replay they need.

Each family has `logp(logits, soft, **knobs) -> [..., J]`, J components whose importance ratio may
be clipped one by one (their sum is the step's log-probability), and `kl(logits, ref_logits, soft,
**knobs) -> [...]`. `logits` are divided by the policy's temperature before they come here; the old,
the new and the reference policy need the same temperature and the same support, or the ratios mean
nothing. The entropy is `softar.soft.entropy` of the same logits.

Results are float32 (float64 for float64 logits) also for bfloat16 logits, which are widened a chunk
at a time. Weights are never differentiated: a soft input is a transition of the environment.

Shapes: ... any leading dims, B batch, P prompt length, C completion steps, V vocabulary, K slots of
a mixture.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softar.soft import Soft, entropy, soft_inputs, token_inputs

CHUNK = 1 << 24  # elements of [..., V] widened to float32 at a time


class Action(NamedTuple):
    """How one mixer's draw is scored."""

    logp: Callable[..., Tensor]  # (logits [..., V], Soft [..., K], **knobs) -> [..., J]
    # (logits [..., V], ref_logits [..., V], Soft [..., K], **knobs) -> [...], nats
    kl: Callable[..., Tensor]
    # (logits [..., V], Soft [..., K]) -> [...], nats, of what was drawn; None: of no use here
    entropy: Callable[..., Tensor] | None = None


def k_samples_logp(logits: Tensor, soft: Soft) -> Tensor:
    """Log-probability of each of K independent draws (Multiplex Thinking, arXiv:2601.08808, eq. 5),
    [..., K].

    The sum over K is the joint log-probability. A slot of weight 0 is no draw and has 0: a hard
    token recorded with weights (1, 0, 0) is scored as one token.
    """
    return _log_prob(logits, soft.ids).masked_fill(soft.weights == 0, 0.0)


def k_samples_kl(logits: Tensor, ref_logits: Tensor, soft: Soft) -> Tensor:
    """Divergence of the joint distributions of the draws, [...] nats: number of draws x KL(softmax
    || ref softmax)."""
    return (soft.weights > 0).sum(-1) * _categorical_kl(logits, ref_logits)


def k_samples_entropy(logits: Tensor, soft: Soft) -> Tensor:
    """Joint entropy of the draws, [...] nats: number of draws x the categorical entropy."""
    return (soft.weights > 0).sum(-1) * entropy(logits)


def token_logp(logits: Tensor, soft: Soft) -> Tensor:
    """Log-probability of the one token that was drawn, `soft.ids[..., :1]`, [..., 1].

    For hard tokens, and where the action is a token and the rest of the mixture a transition (HRPO,
    arXiv:2505.18454; mixture of inputs, arXiv:2505.14827). A recorded mixture does not start with
    its token: pass `softar.soft.hard(record.token)`.
    """
    return _log_prob(logits, soft.ids[..., :1])


def token_kl(logits: Tensor, ref_logits: Tensor, soft: Soft | None = None) -> Tensor:
    """KL(softmax(logits) || softmax(ref_logits)), [...] nats. inf where only the reference excludes
    a token."""
    return _categorical_kl(logits, ref_logits)


def gumbel_logp(
    logits: Tensor, soft: Soft, *, perturbed: Tensor, is_soft: Tensor | None = None
) -> Tensor:
    """Log-density of each perturbed log-probability g' = log p + Gumbel noise (SofT-GRPO,
    arXiv:2511.06411), [..., K].

    With u = g' - log p, p the policy renormalised over the recorded ids, it is -u - exp(-u). The
    support counts as given: nothing here scores which ids were kept. The density does not flatten
    as the policy becomes certain.

    Args:
        logits: [..., V]. soft: ids [..., K], the support; its weights are not read.
        perturbed: [..., K] g' as drawn, -inf in slots that are no part of the support: there the
            result is 0. Weights softmax(g' / tau) do not give it back, as they forget a shift:
            record it (or use `concrete_logp`).
        is_soft: [...] bool; a step where it is False is the single token in slot 0, scored as
            `token_logp`, in slot 0.
    """
    logp, on = _on_support(logits, soft.ids, perturbed, is_soft, "perturbed")
    u = perturbed.to(logp.dtype).masked_fill(~on, 0.0) - logp
    return _with_hard(logits, soft, (-u - torch.exp(-u)).masked_fill(~on, 0.0), is_soft)


def gumbel_kl(
    logits: Tensor,
    ref_logits: Tensor,
    soft: Soft,
    *,
    perturbed: Tensor,
    is_soft: Tensor | None = None,
) -> Tensor:
    """Divergence of the two densities of `gumbel_logp`, [...] nats: the sum over the support of D +
    exp(-D) - 1 with D = log p - log p_ref, each renormalised there. Arguments as there; where
    is_soft is False the categorical one."""
    logp = _on_support(logits, soft.ids, perturbed, is_soft, "perturbed")[0]
    difference = logp - _on_support(ref_logits, soft.ids, perturbed, is_soft, "perturbed")[0]
    kl = (difference + torch.expm1(-difference)).sum(-1)  # 0 in the slots that are off
    return kl if is_soft is None else torch.where(is_soft, kl, _categorical_kl(logits, ref_logits))


def concrete_logp(
    logits: Tensor,
    soft: Soft,
    *,
    tau: float,
    log_weights: Tensor | None = None,
    is_soft: Tensor | None = None,
) -> Tensor:
    """Log-density of the weights y = softmax(g' / tau) themselves (Concrete, arXiv:1611.00712, eq.
    1), [..., 1].

    With respect to n - 1 of the n coordinates on the support, p renormalised there: log Gamma(n) +
    (n - 1) log tau + sum(log p - (tau + 1) log y) - n logsumexp(log p - tau log y). Its score is
    that of `gumbel_logp` averaged over the shift that the weights forget, so its variance is lower.
    The divergence has no closed form.

    Args:
        logits: [..., V]. soft: ids and weights [..., K]. tau: > 0, the mixer's.
        log_weights: [..., K] log y, -inf in slots that are no part of the support. None takes the
            logarithm of the weights: wrong where a small tau let a weight underflow to 0, which
            then counts as no part.
        is_soft: as in `gumbel_logp`.
    """
    if not tau > 0:
        raise ValueError(
            f"tau={tau} must be > 0: it is the temperature that the mixer 'gumbel' drew with"
        )
    log_y = soft.weights.log() if log_weights is None else log_weights
    logp, on = _on_support(logits, soft.ids, log_y, is_soft, "log_weights")
    n = on.sum(-1)
    log_y = log_y.to(logp.dtype).masked_fill(~on, 0.0)
    rows = n > 0
    shifted = (logp - tau * log_y).masked_fill(~on & rows[..., None], -torch.inf)
    size = n.clamp_min(1).to(logp.dtype)
    density = torch.lgamma(size) + (size - 1) * math.log(tau) + (logp - (tau + 1) * log_y).sum(-1)
    density = (density - size * shifted.logsumexp(-1)).masked_fill(~rows, 0.0)
    return _with_hard(logits, soft, density[..., None], is_soft)


def replay(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    soft: Soft,
    mask: Tensor,
    *,
    embedding_grad: bool = True,
    rescale: str | None = None,
) -> Tensor:
    """Logits about every step of a recorded completion, in one forward of the recorded inputs.

    The forward is without cache, so gradient checkpointing is safe. Under DDP, FSDP or ZeRO-3 call
    this inside the wrapper's forward, with the unwrapped model:
    `softar.training.inside_forward(wrapped, model, replay, model, ...)`. Whether dropout is
    on is the model's mode: in eval mode the same weights give the same logits bit for bit.

    Args:
        model: a causal LM of transformers, plain or wrapped by PEFT.
        prompt_ids, prompt_mask: [B, P], padded on the left.
        soft: ids and weights [B, C, K] as recorded: what was fed back at each step.
        mask: [B, C], 1 for steps that happened, 0 for padding on the right. Forced steps happened:
            the loss leaves them out, this mask may not.
        embedding_grad: whether the embedding table gets gradient from mixtures. Single tokens give
            it theirs.
        rescale: what the rollout's SoftConfig had.

    Returns:
        [B, C, V] raw logits in the model's dtype; [:, t] chose step t. The last step was chosen but
            is never read, so
        the forward is over P + C - 1 positions, and the last C hidden states belong to the C
            logits.

    Raises:
        ValueError: shapes that do not fit, or a mask with holes.
    """
    steps = soft.ids.shape[1] if soft.ids.dim() == 3 else 0
    if steps == 0 or soft.weights.shape != soft.ids.shape or mask.shape != soft.ids.shape[:2]:
        raise ValueError(
            f"soft ids {tuple(soft.ids.shape)}, weights {tuple(soft.weights.shape)} and mask {tuple(mask.shape)} must "
            f"be [B, C, K], [B, C, K] and [B, C] with at least one step: pass the record's fields as they are"
        )
    if (
        prompt_ids.shape != prompt_mask.shape
        or len(prompt_ids) != len(mask)
        or prompt_ids.shape[1] == 0
    ):
        raise ValueError(
            f"prompt_ids {tuple(prompt_ids.shape)} and prompt_mask {tuple(prompt_mask.shape)} must both be [B, P] with "
            f"P >= 1 and B = {len(mask)}, the rows of the record"
        )
    if (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
        raise ValueError(
            "mask has a hole: pass which steps happened (kind != PAD), not which ones the loss counts"
        )
    fed = Soft(soft.ids[:, :-1], soft.weights[:, :-1].detach())
    mixed = soft_inputs(model, fed, rescale=rescale)
    if not embedding_grad:
        is_mixture = (fed.weights > 0).sum(-1) > 1
        for name, values in mixed.items():
            over = is_mixture[(...,) + (None,) * (values.dim() - 2)]
            mixed[name] = torch.where(over, values.detach(), values)
    attention_mask = torch.cat([prompt_mask, mask[:, :-1].to(prompt_mask.dtype)], 1)
    outputs = model(
        **{
            name: torch.cat([tokens, mixed[name]], 1)
            for name, tokens in token_inputs(model, prompt_ids).items()
        },
        attention_mask=attention_mask,
        position_ids=(attention_mask.long().cumsum(1) - 1).clamp_min(0),
        use_cache=False,
        logits_to_keep=steps,
    )
    return outputs.logits[:, -steps:]


def _on_support(logits: Tensor, ids: Tensor, values: Tensor, is_soft: Tensor | None, name: str):
    """Log-probabilities renormalised over the ids whose value is not -inf (0 elsewhere), and which
    those are."""
    if values.shape != ids.shape or ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"{name} {tuple(values.shape)}, ids {tuple(ids.shape)} and logits {tuple(logits.shape)} must be [..., K], "
            f"[..., K] and [..., V] with the same leading dims"
        )
    on = values != -torch.inf
    if is_soft is not None:
        on = on & is_soft[..., None]
    scores = _wide(logits.gather(-1, ids)).masked_fill(~on, -torch.inf)
    # A row without support would be nothing but -inf, and its gradient NaN.
    scores = scores.masked_fill(~on.any(-1, keepdim=True), 0.0)
    return scores.log_softmax(-1).masked_fill(~on, 0.0), on


def _with_hard(logits: Tensor, soft: Soft, scores: Tensor, is_soft: Tensor | None) -> Tensor:
    """Where a step is a single token its log-probability takes slot 0; the other slots are 0 there
    already."""
    if is_soft is None:
        return scores
    single = nn.functional.pad(token_logp(logits, soft), (0, scores.shape[-1] - 1))
    return torch.where(is_soft[..., None], scores, single.to(scores.dtype))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_prob(logits: Tensor, ids: Tensor) -> Tensor:
    if ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"ids {tuple(ids.shape)} and logits {tuple(logits.shape)} must have the same leading dims: one row of "
            f"logits per step"
        )
    flat = _LogProb.apply(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1]))
    return flat.view(ids.shape)


def _categorical_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must have the same shape: replay "
            f"both policies on the same record"
        )
    V = logits.shape[-1]
    return _KL.apply(logits.reshape(-1, V), ref_logits.reshape(-1, V)).view(logits.shape[:-1])


class _LogProb(torch.autograd.Function):
    """log softmax at a few ids: [N, V], [N, J] -> [N, J], keeping nothing of [N, V] but the logits
    themselves."""

    @staticmethod
    def forward(ctx, logits, ids):
        rows = _rows(logits)
        top = _wide(logits.detach().amax(-1, keepdim=True))
        log_sum = torch.cat(
            [
                (_wide(x) - m).exp_().sum(-1, keepdim=True).log_()
                for x, m in zip(logits.split(rows), top.split(rows))
            ]
        )
        ctx.save_for_backward(logits, ids, top, log_sum)
        # In this order a large common offset of the logits costs no precision.
        return _wide(logits.gather(-1, ids)) - top - log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, ids, top, log_sum = ctx.saved_tensors
        rows, out = _rows(logits), torch.empty_like(logits)
        for o, x, i, m, s, g in zip(
            *(t.split(rows) for t in (out, logits, ids, top, log_sum, grad))
        ):
            probs = (_wide(x) - m - s).exp_()
            o.copy_(probs.mul_(-g.sum(-1, keepdim=True)).scatter_add_(-1, i, g))
        return out, None


class _KL(torch.autograd.Function):
    """KL(softmax(a) || softmax(b)), [N, V] twice -> [N]; keeps the logits only."""

    @staticmethod
    def forward(ctx, a, b):
        kl = torch.cat([_terms(x, y)[-1] for x, y in zip(a.split(_rows(a)), b.split(_rows(a)))])
        ctx.save_for_backward(a, b, kl)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b, kl = ctx.saved_tensors
        to_a = torch.empty_like(a) if ctx.needs_input_grad[0] else None
        to_b = torch.empty_like(b) if ctx.needs_input_grad[1] else None
        rows = _rows(a)
        for n, (x, y, k, g) in enumerate(zip(*(t.split(rows) for t in (a, b, kl, grad[:, None])))):
            p, q, d, _ = _terms(x, y)
            if to_a is not None:
                to_a.narrow(0, n * rows, len(x)).copy_(g * p * (d - k[:, None]))
            if to_b is not None:
                to_b.narrow(0, n * rows, len(x)).copy_(g * (q - p))
        return to_a, to_b


def _terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, log p - log q (0 where p = 0) [n, V] and the divergence [n], of a chunk of logits."""
    log_p, log_q = _wide(a).log_softmax(-1), _wide(b).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    d = (log_p - log_q).masked_fill(p == 0, 0.0)
    # p d + q - p: the same sum, but no term is negative, so that nearly equal policies do not drown
    # in rounding.
    terms = torch.where((d.abs() < 1) & (p > 0), p * (d + torch.expm1(-d)), p * d + (q - p))
    return p, q, d, terms.sum(-1)


def _rows(x: Tensor) -> int:
    return max(1, CHUNK // x.shape[-1])


ACTIONS: dict[str, Action] = {
    "hard": Action(token_logp, token_kl, lambda logits, soft: entropy(logits)),
    "k-samples": Action(k_samples_logp, k_samples_kl, k_samples_entropy),
    "mixture-of-inputs": Action(token_logp, token_kl),
    "gumbel": Action(gumbel_logp, gumbel_kl),
}
