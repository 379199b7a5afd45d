"""The safetensors of a model's folder or Hub repository, and the tensors of a base among others.

Nobody vouches for what they say. So headers are read first, and compared with what a configuration describes.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .base_interface import Base
from .errors import InputError
from .weights_store import StoredTensors

# Arguments of `from_pretrained` that say where and how files are fetched.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def resolve_commit(source: str | os.PathLike, hub: Mapping[str, Any]) -> str | None:
    """The commit of a Hub repository that `revision` stands for; None for a folder."""
    path = fetch_file(source, CONFIG_NAME, hub, is_needed=True)
    if path is None:
        place = "/".join(filter(None, (str(source), hub.get("subfolder"))))
        raise OSError(f"{place} has no {CONFIG_NAME}; expected a model of SAMoE or SAM 2 video.")
    return None if os.path.isdir(source) else extract_commit_hash(path, None)


def open_weights(source: str | os.PathLike, hub: Mapping[str, Any], variant: str | None) -> StoredTensors:
    """A model's safetensors, of which nothing but the headers is read yet; refuses a PEFT adapter beside the model."""
    if _find(source, ADAPTER_CONFIG_NAME, hub) is not None:
        # From there transformers would take the name of another model, and load that one's weights.
        raise InputError(
            f"{source} holds a model and a PEFT adapter at once; load the adapter from a place of its own."
        )
    return StoredTensors(_weight_files(source, hub, variant))


def own_names(base: Base, source: Any, found: Iterable[str]) -> dict[str, str]:
    """The tensors of a checkpoint that are a base model's: their names in the model -> those in the checkpoint."""
    names = {}
    for name in found:
        own = base.own_name(name)
        if own in names:
            raise InputError(f"{source}: {names[own]!r} and {name!r} are the same tensor of {base.title}.")
        if own is not None:
            names[own] = name
    return names


def _find(source: str | os.PathLike, name: str, hub: Mapping[str, Any]) -> str | None:
    """A file of a folder or repository; None if there is no such file."""
    return cached_file(source, name, **hub, _raise_exceptions_for_missing_entries=False)


def fetch_file(source: str | os.PathLike, name: str, hub: Mapping[str, Any], is_needed: bool = False) -> str | None:
    """A file of a folder or repository; None if there is none, unless `is_needed`, and an OSError if nobody knows."""
    try:
        return cached_file(source, name, **hub)
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise OSError(
                f"{source}: {name} is not in the cache, and the Hub is not reached; nor is there a folder of this name."
            ) from error
        if isinstance(error.__cause__, HFValidationError):
            raise OSError(
                f"{str(source)!r} is neither a folder or file here, nor an id of the Hub, as NAME or OWNER/NAME."
            ) from error
        if is_needed or error.__cause__ is not None:
            raise
        return None


def _weight_files(source: str | os.PathLike, hub: Mapping[str, Any], variant: str | None) -> list[str]:
    part = f".{variant}." if variant else "."
    name, index_name = SAFE_WEIGHTS_NAME.replace(".", part), SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{part}json")
    if (path := _find(source, name, hub)) is not None:
        return [path]
    if (index := _find(source, index_name, hub)) is None:
        fetch_file(source, name, hub)  # says so where that is not known
        raise OSError(f"{source} has no {name}; other formats than safetensors are not read.")
    try:
        content = json.loads(Path(index).read_text(encoding="utf-8"))
        shards, metadata = set(content["weight_map"].values()), content.get("metadata")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{source}: {index_name} has no `weight_map` from tensors to files ({error!r}).") from error
    if not isinstance(metadata, dict):
        raise InputError(f"{source}: {index_name} must have a mapping `metadata`, got {metadata!r}.")
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise InputError(f"{source}: {index_name} names {shard!r}, which is no safetensors file of its folder.")
    paths = [fetch_file(source, shard, hub, is_needed=True) for shard in sorted(shards)]
    return [path for path in paths if path is not None]
