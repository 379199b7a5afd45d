"""The YAML files of a run, a model or a study: the user's own, or those that come with the package, by their names."""

import difflib
import os
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "configs"


def shipped_configs() -> dict[str, Path]:
    """The package's configurations: name -> file."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """The file of a configuration.

    Args:
        name: a file, which comes first; or one of the package's configurations, such as "smoke" or "smoke.yaml".

    Raises:
        FileNotFoundError: if there is neither; names the nearest configurations of the package, and all of them.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    wanted = Path(name).stem if Path(name).suffix in (".yaml", ".yml") else Path(name).name
    if wanted in shipped and Path(name).name == str(name):
        return shipped[wanted]
    nearest = difflib.get_close_matches(wanted, shipped, n=2)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    raise FileNotFoundError(
        f"{name} is no file, and no configuration of the package.{hint} The package has {', '.join(shipped)}."
    )


def names_config(text: str) -> bool:
    """Whether a text is meant as a configuration rather than as a folder or a kind: a YAML, or a name that has one."""
    return not os.path.isdir(text) and (Path(text).suffix in (".yaml", ".yml") or text in shipped_configs())
