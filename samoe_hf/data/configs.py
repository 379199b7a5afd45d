"""The YAML files of a run, a model or a study: the user's own, or those that come with the package, by their names."""

import os
import re
from pathlib import Path
from typing import Any, TypeVar

from samoe_hf.errors import did_you_mean

Value = TypeVar("Value")
SHIPPED = Path(__file__).parents[1] / "configs"


def shipped_configs() -> dict[str, Path]:
    """The package's configurations: name -> file."""
    # In a clone it is a link, for which git on Windows writes a file of where it leads.
    folder = SHIPPED.parent / SHIPPED.read_text(encoding="utf-8") if SHIPPED.is_file() else SHIPPED
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """The file of a configuration: an own one, or one of the package's by its name, such as "smoke" or "smoke.yaml"."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    wanted = Path(name).stem if Path(name).suffix in (".yaml", ".yml") else Path(name).name
    if wanted in shipped and Path(name).name == str(name):
        return own if (own := Path(f"{wanted}.yaml")).is_file() else shipped[wanted]
    raise FileNotFoundError(f"{name} is no file, and no configuration of the package{did_you_mean(wanted, shipped)}")


def names_config(text: str) -> bool:
    """Whether a text is meant as a configuration rather than as a folder or a kind: a YAML, or a name that has one."""
    return not os.path.isdir(text) and (Path(text).suffix in (".yaml", ".yml") or text in shipped_configs())


def expand_home(value: Value) -> Value:
    """Words, or what a YAML holds, with the home folder for `~/` or `~\\`, also behind `=`, where a shell leaves it."""
    found: Any = value
    if isinstance(found, list):
        found = [expand_home(one) for one in found]
    elif isinstance(found, dict):
        found = {key: expand_home(one) for key, one in found.items()}
    elif isinstance(found, str):
        home = os.path.expanduser("~")
        found = re.sub(r"(?<![^=])~(?=[/\\])", lambda _: home, found)
    return found
