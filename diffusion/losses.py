"""What masked-diffusion training minimises: the noise, the loss, and the likelihood that it bounds.

Shapes: B rows, T positions, V vocabulary; n masked positions, flat, row by row.
"""

import numpy as np
import torch
from torch import Tensor, nn

from softar.checks import check_choice, check_least
from softar.guard import check_ids, check_unpadded
from softar.models import room_of
from softar.placement import evaluating

from .doubled import apart, documents_of, forward_doubled, positions_of
from .inputs import check_width
from .masking import counts_by_unit, counts_of
from .net import Facts, check_has_mask, facts, parts

NORMALISATIONS = ("answer", "tokens", "masks")


def masked_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in float32, nats: logits [n, V] at the masked positions, targets [n] -> [n]."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def weights_of(rate: Tensor, maskable: Tensor, documents: Tensor, normalise: str) -> Tensor:
    """What the loss of a masked token weighs, the sum being divided by `divisor`: apart, so that
    batches can be added up.

    Args:
        rate: [B, T] probability of a mask; maskable: [B, T] bool; documents: [B, T], as `doubled`
            has them.
        normalise: "answer" weighs a token by 1 / rate and a document by 1 / length, and takes the
            mean of the documents (LLaDA's SFT, arXiv:2502.09992, eq. 5); "tokens" weighs by
            1 / rate and takes the mean of the maskable tokens (its pre-training, eq. 3); "masks" is
            the plain mean over masked tokens (BERT).

    Returns:
        [B, T] float32. Where masks are drawn by `mask_at_rate` alone, the expected ratio to the
            divisor bounds -log p(answer | prompt) per token for the first two.
    """
    if normalise == "masks":
        return torch.ones_like(rate)
    return 1 / (
        rate if normalise == "tokens" else rate * counts_of(maskable, documents.clamp_min(0))
    )


def divisor(maskable: Tensor, masked: Tensor, documents: Tensor, normalise: str) -> Tensor:
    """What a weighted sum is divided by: of several batches, the sum of theirs. maskable, masked:
    [B, T] bool -> [] int64."""
    if normalise == "answer":
        return (counts_by_unit(maskable, documents.clamp_min(0)) > 0).sum()
    return (maskable if normalise == "tokens" else masked).sum()


@torch.no_grad()
def log_likelihood(
    model: nn.Module,
    input_ids: Tensor,
    answer: Tensor,
    *,
    samples: int = 128,
    batch_size: int = 32,
    rng: torch.Generator | None = None,
    parity: str | None = None,
) -> float:
    """A lower bound of log p(answer | rest), nats, by Monte Carlo (arXiv:2502.09992, appendix B.4;
    LLaDA's get_log_likelihood). Its mean over the draws is the bound, for any number of samples;
    for one token it is exact.

    Args:
        input_ids: [T]; answer: [T] bool, the tokens whose likelihood is asked for.
        samples: draws of masks, `batch_size` of them in a forward: each masks k of the A tokens,
            with k spread evenly over 1..A within a batch.
        parity: "llada" rounds k as LLaDA's script does, which makes some k likelier than others: up
            to 5 % off at 16 tokens, at 3 no bound at all.

    Raises:
        ValueError: for an `answer` that marks no token, ids that look padded, as there is no mask to
            tell, and a sequence longer than the model's positions.
    """
    model_facts, net = check_has_mask(facts(model), "a bound by masks"), parts(model)
    _check_likelihood(model, model_facts, room_of(model, trained=True), input_ids, answer)
    check_least({"samples": samples, "batch_size": batch_size}, samples=1, batch_size=1)
    check_choice("parity", parity, (None, "llada"))
    if model_facts.uniform is not None:
        raise ValueError(
            "the model's diffusion_process is uniform: a bound by masks says nothing about it"
        )
    A, total, done = int(answer.sum()), 0.0, 0
    while done < samples:
        n = min(batch_size, samples - done)
        first = int(torch.randint(1, A + 1, (), generator=rng))
        k = mask_counts(A, n, first, parity)
        order = torch.rand(n, A, generator=rng).argsort(1).argsort(1)
        masked = torch.zeros(n, len(input_ids), dtype=torch.bool)
        masked[:, answer.cpu()] = order < k[:, None]
        masked = masked.to(input_ids.device)
        ids = input_ids.expand(n, -1)
        noisy = ids.masked_fill(masked, model_facts.mask_id)
        with evaluating(model):
            rows, logits = forward_masked(net, model_facts, net.embedding(noisy), None, masked, ids)
        ce = masked_ce(logits, ids[masked])
        total -= float((ce * (A / k.to(ce.device))[rows]).sum())
        done += n
    return total / samples


def _check_likelihood(
    model: nn.Module, facts: Facts, room: int | None, ids: Tensor, answer: Tensor
) -> None:
    check_ids("input_ids", ids, 1, facts.vocab_size, "log_likelihood")
    is_mask = torch.is_tensor(answer) and answer.dtype == torch.bool
    if not is_mask or answer.shape != ids.shape or not answer.any():
        what = f"shape {tuple(answer.shape)}, {answer.dtype}" if torch.is_tensor(answer) else "none"
        raise ValueError(
            f"answer of {what} must mark tokens of input_ids, {tuple(ids.shape)}: give torch.bool of that shape"
        )
    check_width(ids[None], room)
    check_unpadded(model, ids[None], takes_mask=False)


def mask_counts(A: int, n: int, first: int, parity: str | None = None) -> Tensor:
    """[n] int64, how many of A tokens each of n draws masks, from `first` in 1..A on. Over the A
    values of `first` each count comes n times."""
    if parity == "llada":  # half to even
        return ((first + torch.arange(n) * A / n).round().long() - 1) % A + 1
    return (first - 1 + torch.arange(n) * A // n) % A + 1


def forward_masked(
    net,
    facts,
    embeds: Tensor,
    attention_mask: Tensor | None,
    asked: Tensor,
    clean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits about the positions `asked` and no others: [B, T, D], [B, T] bool -> their rows [n],
    logits [n, V].

    attention_mask: [B, T], 0 at padding and else the number of the document, from 1 on, of those
    that are packed into a row and do not see each other; None: a row is one, without padding.
    clean: [B, T] the ids behind the noise, which a block-causal model sees of the blocks before.
    """
    mask = torch.ones_like(asked) if attention_mask is None else attention_mask
    documents = documents_of(mask)
    if facts.block_length is not None:
        assert clean is not None
        return forward_doubled(net, facts, embeds, net.embedding(clean), documents, asked)
    rows, cols = asked.nonzero(as_tuple=True)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    if attention_mask is None:
        hidden = net.body(embeds, None, None)
    elif bool((documents > 0).any()):
        positions = positions_of(documents)
        hidden = net.body(embeds, apart(documents), positions)
    else:
        hidden = net.body(embeds, attention_mask, positions)
    # with shifted logits nothing is about a document's first token, whose own output stands in
    source = torch.where(positions[rows, cols] < facts.shift, cols, cols - facts.shift)
    return rows, net.head(hidden[rows, source])


@torch.no_grad()
def own_guesses(
    net, facts, embeds: Tensor, attention_mask: Tensor | None, masked: Tensor, clean: Tensor
) -> Tensor:
    """The most likely token of each mask, never the mask itself: as `forward_masked` -> [n]."""
    _, logits = forward_masked(net, facts, embeds, attention_mask, masked, clean)
    logits[:, facts.mask_id] = torch.finfo(logits.dtype).min
    return logits.argmax(-1)


def uniform_rows(seed: int, step: int, rows: list[int], columns: int, *, stream: int = 0) -> Tensor:
    """Uniform numbers [len(rows), columns] float32 that depend on the seed, the step, the row's
    place in the global batch and the column alone: padding, the number of processes and gradient
    accumulation change nothing. Another `stream` gives others."""
    draws = [_numbers(seed, step, row, stream).random(columns, dtype=np.float32) for row in rows]
    return torch.from_numpy(np.stack(draws))


def normal_rows(
    seed: int, step: int, rows: list[int], asked: Tensor, width: int, *, stream: int
) -> Tensor:
    """Standard normal numbers [n, width] float32 for the positions `asked` [len(rows), T] bool, n
    of them, that depend on the same as those of `uniform_rows`."""
    asked = asked.cpu()
    draws = [
        _numbers(seed, step, row, stream).standard_normal((len(here), width), dtype=np.float32)
        for row, here in zip(rows, asked, strict=True)
    ]
    return torch.from_numpy(np.stack(draws))[asked]


def _numbers(seed: int, step: int, row: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, row, stream] if stream else [seed, step, row])
