"""Soft thoughts as actions: exact log-probabilities and divergences of what a mixer drew, and the
replay they need.

Each has `logp(logits, soft, **more) -> [..., J]`, J components whose importance ratio may be clipped
one by one (their sum is the step's log-probability), and `kl(logits, ref_logits, soft, **more) ->
[...]`. `logits` are divided by the policy's temperature before they come here; the old, the new and
the reference policy need the same temperature, or the ratios mean nothing. All probabilities are of
the whole vocabulary: what narrows a mixture comes after the draw (`candidates` of the mixers), so
that no filter, other under other weights, decides what can be drawn.

Results are float32 (float64 for float64 logits) also for bfloat16 logits. Weights are never
differentiated: a soft input is a transition of the environment. Of `k-samples` and `gumbel` it is a
function of the draws alone, so that nothing is left out; of `mixture-of-inputs` and `hybrid` it
depends on the belief too, and that dependence on the weights gets no gradient (as in HRPO).

Shapes: ... any leading dims, B batch, P prompt length, C completion steps, V vocabulary, K slots of
a mixture.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softar.soft import NEVER, Soft, entropy, hard, soft_inputs, token_inputs

from .chunked import categorical_kl, log_prob, log_rest, wide

FAR = 80.0  # its exp is still a float32


class Action(NamedTuple):
    """What one mixer draws, and how that is scored."""

    logp: Callable[..., Tensor]  # (logits [..., V], Soft [..., J], **more) -> [..., J]
    # (logits [..., V], ref_logits [..., V], Soft [..., J], **more) -> [...], nats
    kl: Callable[..., Tensor]
    entropy: Callable[..., Tensor]  # (logits [..., V], Soft [..., J]) -> [...], nats
    # of a rollout's tensors (softar.rl.rollout.payload): the draws of each step, with weight 0 in
    # slots without one. What a step reads beside them is a transition of the environment
    drawn: Callable[[dict[str, Tensor]], Soft]
    more: tuple[str, ...] = ()  # tensors of a rollout, soft_NAME, that logp and kl take as NAME=

    def of(self, batch: dict[str, Tensor]) -> tuple[Soft, dict[str, Tensor]]:
        """What logp and kl take of a rollout's tensors, after the logits."""
        return self.drawn(batch), {name: batch[f"soft_{name}"] for name in self.more}


def k_samples_logp(logits: Tensor, soft: Soft) -> Tensor:
    """Log-probability of each of K independent draws (Multiplex Thinking, arXiv:2601.08808, eq. 5),
    [..., K].

    The sum over K is the joint log-probability. A slot of weight 0 is no draw and has 0: a hard
    token recorded with weights (1, 0, 0) is scored as one token.
    """
    return log_prob(logits, soft.ids).masked_fill(soft.weights == 0, 0.0)


def k_samples_kl(logits: Tensor, ref_logits: Tensor, soft: Soft) -> Tensor:
    """Divergence of the joint distributions of the draws, [...] nats: number of draws x KL(softmax
    || ref softmax)."""
    return (soft.weights > 0).sum(-1) * categorical_kl(logits, ref_logits)


def k_samples_entropy(logits: Tensor, soft: Soft) -> Tensor:
    """Joint entropy of the draws, [...] nats: number of draws x the categorical entropy."""
    return (soft.weights > 0).sum(-1) * entropy(logits)


def token_logp(logits: Tensor, soft: Soft) -> Tensor:
    """Log-probability of the one token that was drawn, `soft.ids[..., :1]`, [..., 1].

    For hard tokens, and where the action is a token and the rest of the mixture a transition (HRPO,
    arXiv:2505.18454; mixture of inputs, arXiv:2505.14827): given the state, that is a function of
    the token and of the belief as it was in the rollout, so the state that follows is known and has
    no probability of its own. A recorded mixture does not start with its token: pass
    `softar.soft.hard(record.token)`.
    """
    return log_prob(logits, soft.ids[..., :1])


def token_kl(logits: Tensor, ref_logits: Tensor, soft: Soft | None = None) -> Tensor:
    """KL(softmax(logits) || softmax(ref_logits)), [...] nats. inf where only the reference excludes
    a token."""
    return categorical_kl(logits, ref_logits)


def gumbel_logp(logits: Tensor, soft: Soft, *, perturbed: Tensor) -> Tensor:
    """Log-density of the K largest perturbed log-probabilities g = log p + Gumbel noise, one
    component for each, [..., K].

    SofT-GRPO's action (arXiv:2511.06411) without a filter before the noise. There the policy is
    renormalised over a few likely tokens, others under the new weights than under the old, and no
    ratio accounts for that. Here all V tokens are perturbed and the K largest are read (Gumbel-top-k,
    arXiv:1903.06059): which tokens they are is part of the action, whose density is known under any
    weights. With t = exp(-g) the K are the first arrivals of independent
    exponential clocks with rates p: the j-th comes after t_j - t_(j-1) at the rate R_j = 1 - the
    p of those before it, and is token i with probability p_i / R_j. So

        component j = log p_i(j) - R_j (t_j - t_(j-1)),    R_1 = 1,

    without the waiting time of the first, which has the same law under every policy, and without the
    Jacobian of t. The first component is the log-probability of the token that stands for the step:
    K = 1 is sampling, and a single token its first component. For K = V the sum is SofT-GRPO's
    sum of -u - exp(-u), u = g - log p, up to what no policy changes. The density does not flatten as
    the policy becomes certain.

    Args:
        logits: [..., V]. soft: ids [..., K]; its weights are not read.
        perturbed: [..., K] g as drawn, from the largest down (`softar.Mixed.perturbed`), -inf in
            slots without a draw: there the result is 0. Weights softmax(g / tau) do not give it
            back, as they forget a shift.
    """
    logp, left, _ = _picked(logits, soft.ids, perturbed)
    gap = perturbed.diff(dim=-1)
    waited = (-torch.expm1(gap)).log() - perturbed[..., 1:]  # log(t_j - t_(j-1))
    waited = waited.masked_fill(perturbed[..., 1:] == -torch.inf, -torch.inf).to(logp.dtype)
    # past this the density is 0 in any float, and the gradient of what is infinite NaN
    cost = (left[..., 1:-1] + waited).clamp_max(FAR).exp()
    density = torch.cat([logp[..., :1], logp[..., 1:] - cost], -1)
    return density.masked_fill(perturbed == -torch.inf, 0.0)


def gumbel_kl(logits: Tensor, ref_logits: Tensor, soft: Soft, *, perturbed: Tensor) -> Tensor:
    """Divergence of the two densities of `gumbel_logp`, [...] nats: of each draw given those before
    it, which is exact, summed over the draws.

    Before draw j it is (sum of p_i D_i + q_i - p_i over the tokens that are left) / R_j, with D =
    log p - log q and q the reference: of the token as of the waiting time. The first is KL(p || q).
    For K = V its mean is the sum over V of D + exp(-D) - 1. It grows like exp(-D) where the reference
    expects what the policy has given up, as such tokens keep it waiting. Arguments as in
    `gumbel_logp`.
    """
    (logp, left, drawn), (ref_logp, ref_left, _) = (
        _picked(x, soft.ids, perturbed) for x in (logits, ref_logits)
    )
    # the draws put out of the way; where nothing else is left, any other numbers do
    gone = torch.where(left[..., -1:] > NEVER, -torch.inf, 0.0).expand(drawn.shape)
    rest, ref_rest = (x.scatter(-1, drawn, gone.to(x)) for x in (logits, ref_logits))
    # from the last draw back, in shares of what was left: nothing is subtracted from nearly itself
    difference = (left - ref_left)[..., -1]
    here = categorical_kl(rest, ref_rest) + _bent(torch.zeros_like(difference), difference)
    kl = torch.zeros_like(here)
    for j in reversed(range(perturbed.shape[-1])):
        exists = perturbed[..., j] > -torch.inf
        difference = (logp - ref_logp)[..., j].masked_fill(~exists, 0.0)
        share = (logp[..., j] - left[..., j]).masked_fill(~exists, NEVER)
        here = (left[..., j + 1] - left[..., j]).exp() * here + _bent(share, difference)
        kl = kl + here.masked_fill(~exists, 0.0)
    return kl


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
    that of the density of g' averaged over the shift that the weights forget, so its variance is
    lower. The divergence has no closed form.

    Args:
        logits: [..., V]. soft: ids and weights [..., K]. tau: > 0, the mixer's.
        log_weights: [..., K] log y, -inf in slots that are no part of the support. None takes the
            logarithm of the weights: wrong where a small tau let a weight underflow to 0, which
            then counts as no part.
        is_soft: [...] bool; a step where it is False is the single token in slot 0, scored as
            `token_logp`, in slot 0.
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


def _picked(logits: Tensor, ids: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each draw [..., K], log of what was left before each and after the last [..., K + 1],
    and the ids that were drawn [..., K], the first in slots without a draw."""
    if perturbed.shape != ids.shape or ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"perturbed {tuple(perturbed.shape)}, ids {tuple(ids.shape)} and logits {tuple(logits.shape)} must be "
            f"[..., K], [..., K] and [..., V] with the same leading dims"
        )
    exists = perturbed > -torch.inf
    drawn = torch.where(exists, ids, ids[..., :1])
    logp = log_prob(logits, drawn)
    left = [log_rest(logits, drawn).clamp_min(NEVER)]
    for j in reversed(range(ids.shape[-1])):  # added up from behind, where it may be tiny
        more = torch.logaddexp(left[-1], logp[..., j])
        left.append(torch.where(exists[..., j], more, left[-1]))
    return logp, torch.stack(left[::-1], -1), drawn


def _bent(log_weight: Tensor, d: Tensor) -> Tensor:
    """exp(log_weight) (d + exp(-d) - 1), exact for small d and finite for one far below 0."""
    weight = log_weight.exp()
    near = weight * (d + torch.expm1(-d.clamp(-1, 1)))
    return torch.where(d.abs() < 1, near, weight * (d - 1) + (log_weight - d).clamp_max(FAR).exp())


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
    scores = wide(logits.gather(-1, ids)).masked_fill(~on, -torch.inf)
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


def mixture(batch: dict[str, Tensor]) -> Soft:
    """Of a rollout's tensors, what each step read back."""
    return Soft(batch["soft_ids"], batch["soft_weights"])


def token_entropy(logits: Tensor, soft: Soft) -> Tensor:
    """Entropy of the token that stands for a step, [...] nats."""
    return entropy(logits)


def _token(batch: dict[str, Tensor]) -> Soft:
    return hard(batch["soft_token"])


def _candidates(batch: dict[str, Tensor]) -> Soft:
    perturbed = batch["soft_perturbed"]
    ids = batch["soft_ids"][..., : perturbed.shape[-1]]
    return Soft(ids, (perturbed > -torch.inf).float())


TOKEN = Action(token_logp, token_kl, token_entropy, _token)
ACTIONS: dict[str, Action] = {
    "hard": TOKEN._replace(drawn=mixture),  # which is the token
    "k-samples": Action(k_samples_logp, k_samples_kl, k_samples_entropy, mixture),
    "mixture-of-inputs": TOKEN,
    "hybrid": TOKEN,
    "gumbel": Action(gumbel_logp, gumbel_kl, token_entropy, _candidates, ("perturbed",)),
}
