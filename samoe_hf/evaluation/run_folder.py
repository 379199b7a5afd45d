"""A folder that is filled step by step, by a run that can be stopped and go on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samoe_hf.data.frames import check_inside
from samoe_hf.errors import InputError
from samoe_hf.one_writer import OneWriter
from samoe_hf.whole_files import remove, write_text

LONG = 300  # characters in which two values are shown
# What the commands have options for, by its name in a run's identity.
OPTIONS = {
    f"config.{key}": f"--{key.replace('_', '-')}" for key in ("dtype", "image_size", "memory_selection", "unknown")
}


class RunFolder:
    """A folder in which a stopped run goes on, as long as its identity in `run.json`, all that it depends on, is the
    same."""

    kind: str
    parts: tuple[str, ...]  # patterns of what it writes, in the order to remove it: first what says that it is finished

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]):
        self.folder, self.identity = Path(folder), json.loads(json.dumps(identity))
        self.writer = OneWriter(folder)

    def start(self, overwrite: bool = False) -> None:
        """Makes the folder, or checks that it holds the same run; with `overwrite`, another run gives way."""
        path = self.folder / "run.json"
        with self.writer:
            self.check(overwrite)
            for pattern in self.parts if path.is_file() and overwrite else ():
                for part in self.folder.glob(pattern):
                    remove(part)
            write_text(path, json.dumps(self.identity, indent=2))

    def check(self, overwrite: bool = False) -> None:
        """Raises an `InputError` where [`start`](RunFolder.start) would, and changes nothing."""
        if (self.folder / "run.json").is_file():
            return None if overwrite else self.check_same()
        if self.folder.is_dir() and any(not file.name.startswith("_writer.") for file in self.folder.iterdir()):
            raise InputError(f"{self.folder} is not empty, and not the folder of {self.kind}.")

    def check_same(self) -> None:
        """Raises an `InputError`, which names what differs, if the folder holds another run."""
        path = self.folder / "run.json"
        advice = "Choose another `--output`, or replace the results with `--overwrite`."
        try:
            earlier = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} does not say what was done ({error}). {advice}") from error
        found = differences(earlier, self.identity)
        # What else differs of the configuration comes of these.
        options = [found[name].replace(name, option) for name, option in OPTIONS.items() if name in found]
        follows = ("config.", "model.dtype", "model.memory_selection") if options else ()
        if words := options + [words for name, words in found.items() if not name.startswith(follows)]:
            raise InputError(f"{self.folder} holds the results of another run: {'; '.join(words)}. {advice}")

    @staticmethod
    def inside(folder: Path, name: str) -> Path:
        """A path within a folder; refuses a name, made of a video's domain and id, that leads out of it."""
        check_inside(name, "the domain and id of a video")
        return folder / name


def differences(earlier: Any, now: Any, name: str = "") -> dict[str, str]:
    """What differs, by its name, with a dot between the names of dictionaries in each other -> in words."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = sorted({*earlier, *now})
        parts = (differences(earlier.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return {name: words for part in parts for name, words in part.items()}
    words = f"is {earlier!r}, not {now!r}"
    if isinstance(earlier, dict) or isinstance(now, dict) or len(words) > LONG:
        words = "is missing now" if now is None else "is new" if earlier is None else "is another"
    return {} if earlier == now else {name: f"`{name}` {words}"}
