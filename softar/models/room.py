"""How many positions a model has room for, and which layers read them."""

import re

from torch import nn

from .kind import plain

LEARNT = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed")
# How tables of positions are called, learnt or computed once
TABLES = re.compile("wpe|pos_encoding|(?!.*relative).*position.*")
SIZES = ("max_position_embeddings", "max_target_positions")


def room_of(model: nn.Module, *, trained: bool = False) -> int | None:
    """Positions of a model, plain or wrapped by PEFT, that has a table of them: RoBERTa's 512 of a
    table of 514. None for one that computes any number of them, as with a rotation.

    Looked for where the input embedding is, so that the positions of a picture do not count.

    trained: of one without a table those that it was made for, as its configuration says.
    """
    model = plain(model)
    config = model.config.get_text_config(decoder=True)
    names = [config.attribute_map.get(name, name) for name in SIZES]  # GPT-2 has n_positions
    rooms = [getattr(config, name) for name in names if name in config][:1]
    named, home = {**dict(model.named_modules()), **dict(model.named_buffers())}, _home(model)
    tables = {
        name.rpartition(".")[2]: each
        for name, each in named.items()
        if name.startswith(home)
        and (isinstance(each, nn.Embedding) or not isinstance(each, nn.Module))
    }
    tables = {name: each for name, each in tables.items() if TABLES.fullmatch(name)}
    if not tables and not trained:
        return None
    for name in LEARNT:
        if isinstance(table := tables.get(name), nn.Embedding):
            # RoBERTa counts from behind its padding
            behind = 0 if table.padding_idx is None else table.padding_idx + 1
            rooms.append(table.num_embeddings - behind)
    return min(rooms, default=None)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, plain or wrapped by PEFT, that read text, from the first on; [] where it
    has no list of them. Looked for where the input embedding is, and around that (BERT's), among
    those of a picture as many as the configuration says."""
    model = plain(model)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {name: m for name, m in lists.items() if len(m) == count} or lists
    home = _home(model)
    while home and not any(name.startswith(home) for name in lists):
        home = home[: home.rfind(".", 0, -1) + 1]
    return list(next((m for name, m in lists.items() if name.startswith(home)), []))


def _home(model: nn.Module) -> str:
    """The name, with a dot behind it, of the module that holds the input embedding of a plain model;
    empty for the model itself."""
    embedding = model.get_input_embeddings()
    place = next((name for name, each in model.named_modules() if each is embedding), "")
    return place[: place.rfind(".") + 1]
