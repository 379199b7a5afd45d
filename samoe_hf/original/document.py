"""YAML files of the original as plain data: read within bounds, and written."""

import os
from pathlib import Path
from typing import Any

import yaml

from samoe_hf.errors import InputError
from samoe_hf.model.weights_io import write_text

# Meta's largest file has 4 kB in 7 levels.
MAX_BYTES, MAX_DEPTH = 100_000, 32


class _Loader(yaml.SafeLoader):
    """Reads plain data without aliases, which let a small file describe a huge value."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", self.peek_event().start_mark)
        if self.depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, and no anchors for values that occur twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def read_document(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a file whose architecture is under `model`; nothing that it names is imported or called.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is too large, not YAML, or has no `model`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the original's YAML.")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES:,d} bytes; expected the original's YAML.")
    try:
        document = _Loader(content.decode()).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for numbers, dates and characters that are none
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict) or "model" not in document:
        raise InputError(f"{path} has no `model`; expected the original's YAML, with the architecture under `model`.")
    return document


def write_document(path: str | os.PathLike, document: dict[str, Any]) -> None:
    """Writes a document as a global configuration of Hydra."""
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False)
    write_text(path, f"# @package _global_\n\n{text}")
