"""Decoders that weigh several continuations before they go on, and read mixtures."""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

from transformers import BatchEncoding

from .. import guard
from ..caches import check_cache
from ..config import SoftConfig, renamed
from ..defaults import Default
from ..evaluate import evaluating, read_prompts, resolve
from ..models import plain
from . import beam_collapse, soft_beam
from .answer import Decoded
from .beam_collapse import BeamCollapse
from .card import check_of_kind, columns_of
from .options import check_options
from .read import read_out
from .soft_beam import SoftBeam
from .stop import stops_of


class SearchDecoder:
    """Answers by a search over softly read continuations.

    Args: as for SoftDecoder; config: where the thought is, and what shapes its mixtures; search: a
        SoftBeam or a BeamCollapse, which says how.
    """

    def __init__(
        self,
        model,
        tokenizer,
        config: SoftConfig,
        search: SoftBeam | BeamCollapse,
        *,
        name=None,
        trace=False,
        columns=None,
        stop: tuple[str, ...] = (),
    ):
        decoder = next(name for name, s in SEARCHES.items() if isinstance(search, s.options))
        check_of_kind(model, "autoregressive", name or decoder)
        guard.check_beams(model, search.num_beams)
        check_cache(model, plain(model).generation_config)
        self.model, self.tokenizer, self.trace = model, tokenizer, trace
        self.config, self.search = resolve(config.changed(**search.changes), tokenizer), search
        setting = f"num_beams={search.num_beams}"
        self.columns = columns_of(decoder, model, "autoregressive", setting) | (columns or {})
        self.stop = [*stop]
        self.name, self.run = name or f"{decoder} {setting}", SEARCHES[decoder].run

    def read(self, prompts: list) -> BatchEncoding:
        """input_ids and attention_mask [B, P] of the prompts."""
        return read_prompts(self.tokenizer, prompts, self.config.prompt_prefix)

    def decode(self, prompts: list) -> list[Decoded]:
        if not prompts:
            return []
        started = time.perf_counter()
        inputs = self.read(prompts).to(self.model.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        config = self.config.changed(prompt_prefix=None)  # the ids have it
        with evaluating(self.model):
            stops = stops_of(self.tokenizer, self.stop, ids.shape[1], config)
            of = self.model, ids, mask, config, self.search
            out, forwards = self.run(*of, stops, self.tokenizer)
        how = dict(started=started, forwards=forwards, title=self.name if self.trace else None)
        return read_out(out, self.tokenizer, inputs, **how)


def search_config(
    default: Default, decoder: str, options: dict
) -> tuple[SoftConfig, SoftBeam | BeamCollapse]:
    """The model's default as the search reads it, changed by the options; and the search. Raises
    ValueError for options that are unknown or do not fit."""
    search, options = SEARCHES[decoder], renamed(options)
    names = [field.name for field in dataclasses.fields(search.options)]
    asked = check_options(SoftConfig, decoder, options, also=names, fixed=search.fixed)
    own = {name: value for name, value in asked.items() if name in names}
    search = search.options(**check_options(search.options, decoder, own))
    others = {name: value for name, value in asked.items() if name not in names}
    config = default.changed(search.changes | others)
    guard.check_one_temperature(config, decoder)
    return config, search


class Search(NamedTuple):
    options: type
    run: Callable  # as soft_beam.soft_beam
    fixed: list[str]  # fields of SoftConfig that it sets itself


SEARCHES = {
    "soft-beam": Search(SoftBeam, soft_beam.soft_beam, soft_beam.FIXED),
    "beam-collapse": Search(BeamCollapse, beam_collapse.beam_collapse, beam_collapse.FIXED),
}
