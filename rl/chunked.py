"""Log-probabilities and divergences of logits [..., V] that keep nothing of that size for the
backward pass but the logits themselves, also where these are bfloat16: they are widened a chunk at a
time.

Shapes: ... any leading dims, N of them as one, V vocabulary, J ids.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 24  # elements of [..., V] widened to float32 at a time


def wide(x: Tensor) -> Tensor:
    """As float32, float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def log_prob(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits) at a few ids: [..., V], [..., J] -> [..., J]."""
    if ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"ids {tuple(ids.shape)} and logits {tuple(logits.shape)} must have the same leading dims: one row of "
            f"logits per step"
        )
    flat = _LogProb.apply(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1]))
    return flat.view(ids.shape)


def categorical_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(ref_logits)), [...] nats; inf where only the reference excludes
    a token."""
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must have the same shape: replay "
            f"both policies on the same record"
        )
    V = logits.shape[-1]
    return _KL.apply(logits.reshape(-1, V), ref_logits.reshape(-1, V)).view(logits.shape[:-1])


def log_rest(logits: Tensor, ids: Tensor) -> Tensor:
    """log of what all but a few ids have of softmax(logits): [..., V], [..., J] -> [...]; -inf for
    nothing."""
    flat = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1])
    return _LogRest.apply(*flat).view(logits.shape[:-1])


class _LogProb(torch.autograd.Function):
    """`log_prob`, [N, V], [N, J] -> [N, J]."""

    @staticmethod
    def forward(ctx, logits, ids):
        rows = _rows(logits)
        top = wide(logits.detach().amax(-1, keepdim=True))
        log_sum = torch.cat(
            [
                (wide(x) - m).exp_().sum(-1, keepdim=True).log_()
                for x, m in zip(logits.split(rows), top.split(rows))
            ]
        )
        ctx.save_for_backward(logits, ids, top, log_sum)
        # In this order a large common offset of the logits costs no precision.
        return wide(logits.gather(-1, ids)) - top - log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, ids, top, log_sum = ctx.saved_tensors
        rows, out = _rows(logits), torch.empty_like(logits)
        for o, x, i, m, s, g in zip(
            *(t.split(rows) for t in (out, logits, ids, top, log_sum, grad))
        ):
            probs = (wide(x) - m - s).exp_()
            o.copy_(probs.mul_(-g.sum(-1, keepdim=True)).scatter_add_(-1, i, g))
        return out, None


class _LogRest(torch.autograd.Function):
    """`log_rest`, [N, V], [N, J] -> [N]."""

    @staticmethod
    def forward(ctx, logits, ids):
        ctx.save_for_backward(logits, ids)
        rows, out = _rows(logits), []
        for x, i in zip(logits.split(rows), ids.split(rows)):
            x = wide(x) - wide(x.amax(-1, keepdim=True))
            out.append(x.scatter(-1, i, -torch.inf).logsumexp(-1) - x.logsumexp(-1))
        return torch.cat(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, ids = ctx.saved_tensors
        rows, out = _rows(logits), torch.empty_like(logits)
        for o, x, i, g in zip(*(t.split(rows) for t in (out, logits, ids, grad[:, None]))):
            rest = wide(x).scatter(-1, i, -torch.inf)
            total = rest.logsumexp(-1, keepdim=True).clamp_min(torch.finfo(rest.dtype).min)
            o.copy_(g * ((rest - total).exp() - wide(x).softmax(-1)))
        return out, None


class _KL(torch.autograd.Function):
    """`categorical_kl`, [N, V] twice -> [N]."""

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
    log_p, log_q = wide(a).log_softmax(-1), wide(b).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    d = (log_p - log_q).masked_fill(p == 0, 0.0)
    # p d + q - p: the same sum, but no term is negative, so that nearly equal policies do not drown
    # in rounding.
    terms = torch.where((d.abs() < 1) & (p > 0), p * (d + torch.expm1(-d)), p * d + (q - p))
    return p, q, d, terms.sum(-1)


def _rows(x: Tensor) -> int:
    return max(1, CHUNK // x.shape[-1])
