"""The files of a model's folder or Hub repository with experts of domains: for each domain, `domains/NAME.safetensors`.

So a model of many domains is loaded as fast as one of few, and what changes with a domain is one small file.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_files

from .domain_experts import PREFIX, count_domain_values
from .errors import InputError
from .expert_layer import EXPERT_TENSORS
from .weights_files import fetch_file
from .weights_io import DOMAINS
from .weights_store import LateFile, ReadFile, StoredTensors

_TENSORS = "|".join(map(re.escape, EXPERT_TENSORS))
_OF_DOMAIN = re.compile(rf".+\.{PREFIX}([\w-]+)\.({_TENSORS})", re.ASCII)


def domain_file(name: str, variant: str | None = None) -> str:
    """The file of a domain, from the model's folder."""
    return f"{DOMAINS}/{name}.{variant}.safetensors" if variant else f"{DOMAINS}/{name}.safetensors"


def domain_of_tensor(name: str) -> str | None:
    """The domain that a tensor of this name, as in a state dict, is of experts of, if any."""
    match = _OF_DOMAIN.fullmatch(name)
    return None if match is None else match[1]


def split_domains(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A state dict without the experts of domains, and those of each domain."""
    parts: dict[str | None, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parts[domain_of_tensor(name)][name] = tensor
    return parts.pop(None, {}), {domain: own for domain, own in parts.items() if domain is not None}


def write_domain_files(
    directory: str | os.PathLike, domains: Mapping[str, Mapping[str, Tensor]], variant: str | None = None
) -> None:
    """Writes experts of domains, as [`split_domains`] gives them."""
    for name, tensors in domains.items():
        path = Path(directory, domain_file(name, variant))
        path.parent.mkdir(exist_ok=True)
        kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(kept, path, metadata={"format": "pt"})


def find_domain_files(
    source: str | os.PathLike, hub: Mapping[str, Any], domains: Sequence[Mapping[str, Any]], variant: str | None = None
) -> dict[str, str]:
    """The files of those domains that have experts: name of the domain -> path. Those of a repository are fetched."""
    files = {domain["name"]: domain_file(domain["name"], variant) for domain in domains if domain["num_experts"]}
    fetched = (
        cached_files(source, [*files.values()], **hub, _raise_exceptions_for_missing_entries=False) if files else ()
    )
    paths = {"/".join(Path(path).parts[-2:]): path for path in fetched or ()}
    for name, file in files.items():
        if file not in paths:
            fetch_file(source, file, hub)  # says so where that is not known
            raise OSError(f"{source} has no {file}; expected the experts of the domain {name!r} there.")
    return {name: paths[file] for name, file in files.items()}


def open_domain_files(
    source: str | os.PathLike,
    hub: Mapping[str, Any],
    domains: Sequence[Mapping[str, Any]],
    stored: StoredTensors,
    variant: str | None = None,
) -> dict[str, LateFile]:
    """[`find_domain_files`], opened; InputError if one is no safetensors file.

    Folders of early versions have the experts of domains among the model's other tensors, `stored`: they are taken from
    there, and its `headers` are without them then.
    """
    early: dict[str, dict[str, Tensor]] = {domain["name"]: {} for domain in domains if domain["num_experts"]}
    for name in [*stored.headers]:
        if (domain := domain_of_tensor(name)) in early:
            early[domain][name] = stored.read(name)
            del stored.headers[name]
    late = [domain for domain in domains if not early.get(domain["name"])]
    files: dict[str, LateFile] = {name: ReadFile(source, tensors) for name, tensors in early.items() if tensors}
    return files | {name: LateFile(path) for name, path in find_domain_files(source, hub, late, variant).items()}


def check_domain_sizes(model: Any, files: Mapping[str, LateFile], domains: Sequence[Mapping[str, Any]]) -> None:
    """Refuses files of another size than a configuration describes, of which nothing else is read yet.

    `model` is without the experts of these domains, and may be on the meta device.
    """
    counts = count_domain_values(model, domains) if files else {}
    for name, file in files.items():
        count = counts.get(name, 0)
        if file.data_bytes not in (2 * count, 4 * count, 8 * count):
            raise InputError(
                f"{file.path} holds tensors of {file.data_bytes:,d} bytes, but the configuration describes {count:,d} "
                f"values of 2, 4 or 8 bytes for the domain {name!r}."
            )
