"""What `mkdocs` needs to know of this repository: links out of the guides, and references in docstrings."""

import re
from typing import Any

import griffe

# [`Name`] and [`~module.Name`], of which the last part is shown.
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Files outside of docs/ are not part of the site: links to them become their texts."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


class References(griffe.Extension):
    """Names in docstrings become links, where the reference has an entry for them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = REFERENCE.sub(lambda match: _link(obj, *match.groups()), obj.docstring.value)


def _link(obj: griffe.Object, short: str, name: str) -> str:
    path = name
    for prefix in (obj.path, obj.module.path, obj.module.path.rpartition(".")[0]):
        try:
            path = obj.modules_collection[f"{prefix}.{name}"].canonical_path
            break
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            continue
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
