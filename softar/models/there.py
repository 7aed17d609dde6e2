"""Is there such a model? Asked before work that takes it for granted."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedConfig

from ..checks import did_you_mean, shorten
from .source import cached_if_offline


def check_there(name: str, known: Iterable[str], **fetch) -> None:
    """Raise ValueError for a model that cannot be opened because it is nowhere: a check before
    work that takes no more than a config.json. known: the names of embedded models."""
    path, known = Path(name), [*known]
    if name in known:
        return
    if name.endswith(".gguf") and not path.is_file():
        raise ValueError(f"model={name!r}: there is no such file")
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"model={name!r}: the folder holds no config.json, so no model")
    elif not path.is_file():
        close = did_you_mean(name, known)
        try:
            if "/" not in name and close:  # offline, the hub's retries take most of a minute
                raise OSError("it is no folder")
            PreTrainedConfig.get_config_dict(name, **cached_if_offline(name, fetch))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={name!r} is not there{close}: {shorten(str(error))} -- give one of {known}, a "
                f"folder, a .gguf file or a hub id that can be reached"
            ) from error
