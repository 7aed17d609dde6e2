"""What a model without a mask decodes with: its encoder and decoder by turns, and mixtures in the
form that its self-conditioning reads.

Shapes: B rows, P prompt length, L columns, T of them at a time, C columns of a canvas, V
vocabulary, D width; n slots, flat; K tokens of a mixture.
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from softar.models.reading import cache_name
from softar.soft import Soft

from .net import Parts

FEW = 64  # tokens of a mixture that are looked at in pairs


class CanvasReader:
    """Runs the encoder over finished text, whose keys and values it keeps, and the decoder over the
    canvas behind it, which leaves none."""

    def __init__(self, net: Parts, real: Tensor, L: int, *, by_column: bool):
        """real: [B, P] bool, what is not padding; L: columns in all. by_column: positions are
        columns, else padding does not count."""
        self.net, self.encoder, self.decoder = net, net.body.encoder, net.body.decoder
        self.real = torch.nn.functional.pad(real, (0, L - real.shape[1]), value=True)  # [B, L]
        places = torch.arange(L, device=real.device).expand_as(self.real)
        self.positions_of = places if by_column else (self.real.cumsum(1) - 1).clamp_min(0)
        self.cache = DynamicCache(config=net.body.config.get_text_config(decoder=True))
        self.cache_name = cache_name(self.encoder)
        self.stored = 0  # columns
        self.rows = torch.arange(len(real), device=real.device)  # those that it still reads
        self.forwards = self.positions = 0  # of both
        self.stores: list[int] = []  # the encoder's forwards, from 0

    def drop(self, ended: Tensor) -> None:
        """Read the rows `ended` [B] bool no more."""
        stays = ~ended[self.rows]
        if not bool(stays.all()):
            self.cache.batch_select_indices(stays.nonzero()[:, 0])
            self.rows = self.rows[stays]

    def store(self, ids: Tensor, end: int) -> None:
        """Keep keys and values of the columns before `end` that it has not yet. ids: [B, L]."""
        ids = ids[self.rows, self.stored : end]
        at = self.positions_of[self.rows, self.stored : end]
        masks = self.encoder.create_masks_for_generate(
            config=self.net.body.config,
            inputs_embeds=torch.empty(
                (*ids.shape, 0), dtype=self.net.body.dtype, device=ids.device
            ),
            attention_mask=self.real[self.rows, :end],
            **{self.cache_name: self.cache},
            position_ids=at,
        )
        self.encoder(
            input_ids=ids, attention_mask=masks, **{self.cache_name: self.cache}, position_ids=at
        )
        self.stored = end
        self.stores.append(self.forwards)
        self.forwards, self.positions = self.forwards + 1, self.positions + ids.numel()

    def open(self, end: int) -> None:
        """The canvas ends there from now on, and begins right behind what is stored."""
        real = self.real[self.rows, :end]
        self.at = self.positions_of[self.rows, self.stored : end]
        self.mask = self.decoder.create_diffusion_decoder_attention_mask(
            config=self.net.body.config,
            # only its shape is looked at, and its dtype
            inputs_embeds=real[:, self.stored :, None],
            **{self.cache_name: self.cache},
            decoder_attention_mask=real,
        )

    def __call__(
        self, noisy: Tensor, conditioning: Tensor | None, rows: Tensor, told: Tensor | None = None
    ) -> Tensor:
        """noisy: [B, C] token ids; conditioning: of the rows that it still reads [., C, V] logits
        whose softmax is the mixture, None for none; told: [.] bool, the rows that see it, None for
        all -> [n, V] float32, what it believes of the slots of the `rows` [B] bool, which are among
        those."""
        noisy = noisy[self.rows]
        hidden = self.decoder(
            decoder_input_ids=noisy,
            **{self.cache_name: self.cache},
            self_conditioning_logits=conditioning,
            self_conditioning_mask=told,
            decoder_attention_mask=self.mask,
            decoder_position_ids=self.at,
        ).last_hidden_state
        self.forwards, self.positions = self.forwards + 1, self.positions + noisy.numel()
        return self.net.head(hidden[rows[self.rows]].flatten(0, 1))


class Nothing(nn.Module):
    """The embedding of a model without a mask, with one id more, V: what stands for a mask in a
    softener's mixtures. It is the mean of all tokens, no belief at all."""

    def __init__(self, embedding: nn.Module, vocab_size: int):
        super().__init__()
        self.embedding, self.id = embedding, vocab_size
        self.mean: Tensor | None = None  # [D]

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.embedding(ids.clamp_max(self.id - 1))
        if self.mean is None:
            every = torch.arange(self.id, device=ids.device).split(8192)
            self.mean = sum(self.embedding(some).float().sum(0) for some in every) / self.id
        return torch.where((ids == self.id)[..., None], self.mean.to(vectors.dtype), vectors)


def to_logits(soft: Soft, vocab_size: int) -> Tensor:
    """Mixtures [n, K] of tokens and the id V of `Nothing` -> [n, V] float32 whose softmax they are,
    at weights that sum to 1."""
    ids, weights, V = soft.ids, soft.weights.float(), vocab_size
    if ids.shape[-1] > FEW:
        each = weights.new_zeros(len(ids), V + 1).scatter_add(-1, ids, weights)
        return (each[:, :V] + each[:, V:] / V).log()
    # weights of equal ids count together
    mass = (weights[:, None, :] * (ids[:, :, None] == ids[:, None, :])).sum(-1)
    rest = (weights * (ids == V)).sum(-1, keepdim=True) / V
    # V is no column: it writes what the first column holds in any case
    first = ids == 0
    held = torch.where(first, mass, 0).amax(-1, keepdim=True)
    to, total = torch.where(ids == V, 0, ids), torch.where(ids == V, held, mass) + rest
    return rest.log().expand(-1, V).scatter(-1, to, total.log())
