"""What lies beside a model's weights and says how it is decoded: in its folder, or on the hub."""

import json
import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import cached_file

from ..names import CONFIG_FILE, STEP_TEMPERATURE_FILE
from .embedded import MODELS, folder_of
from .source import cached_if_offline

# what of `load`'s keywords says where in the hub, and how to get there
WHERE = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


def is_hub_id(name: str) -> bool:
    """Has it the form owner/name, and is it nothing of this machine?"""
    is_path = name.startswith(".") or name.endswith(".gguf") or Path(name).is_absolute()
    return name.count("/") == 1 and not is_path and name not in MODELS and folder_of(name) is None


def file_of(name: str | os.PathLike, file: str, **where) -> Path | None:
    """A file of a model in a folder, or of a hub id as far as it is in the cache; None where there
    is none. Nobody is asked."""
    found = folder_of(name)
    found = None if found is None else found / file
    if found is None:
        found = _cached(os.fspath(name), file, **where)
    return Path(found) if isinstance(found, (str, Path)) and Path(found).is_file() else None


def fetch_config(name: str, *, fresh: bool = False, **where) -> Path | None:
    """The folder, in the hub's cache, of a hub id's soft_config.json and of the file that this
    names; None where it has none, and where the hub cannot be reached.

    where: the keywords of WHERE. fresh: ask the hub whether there is a newer one. Else what the
    cache holds counts, which knows of the revision that was opened last also what it lacks.
    """
    if not is_hub_id(name):
        return None
    config = _fetch(name, CONFIG_FILE, fresh, where)
    if config is None:
        return None
    try:
        if json.loads(config.read_text()).get("step_temperature") is not None:
            _fetch(name, STEP_TEMPERATURE_FILE, fresh, where)
    except (ValueError, AttributeError):
        pass  # for who reads it to say
    return config.parent


def _fetch(name: str, file: str, fresh: bool, where: dict) -> Path | None:
    places = ("cache_dir", "revision", "subfolder")
    found = _cached(name, file, **{k: where[k] for k in places if k in where})
    if found is None or fresh:
        try:
            found = cached_file(
                name,
                file,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **cached_if_offline(name, where),
            )
        except OSError:  # no such repository, say: `load` says what is wrong with the model
            return None
    return Path(found) if isinstance(found, str) else None


def _cached(name: str, file: str, *, cache_dir=None, revision=None, subfolder="") -> object:
    """Path (str) of a hub id's file in the cache, None where that does not hold it, and something
    else where it knows that there is none."""
    try:
        return try_to_load_from_cache(
            name, f"{subfolder}/{file}" if subfolder else file, cache_dir, revision
        )
    except HFValidationError:  # no hub id
        return None
