"""Files and folders that are written whole or not at all, and what killed processes left of them."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samoe_hf.model.weights_io import UNSAVED, finish_save, sync

_HEX = "[0-9a-f]{32}"
_MANY_BYTES = 200  # names of files have 255 at most, and temporary ones are longer


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`. What was written there becomes `path` when the block ends.

    If the block raises, `path` is as it was before. Missing folders are made. The temporary file has the same suffix,
    and several processes may write the same file at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{_short(path.stem)}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, as a whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` when the block ends, and is removed if the block raises.

    A file, and a folder that is not empty unless `overwrite`, are a `FileExistsError` at once, and one that others have
    made meanwhile when the block ends.
    """
    target = Path(folder).resolve()

    def check() -> None:
        if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
            raise FileExistsError(f"{folder} exists and is not an empty folder; give another output.")

    check()
    temporary = target.with_name(f".{_short(target.name)}.{uuid.uuid4().hex}")
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    try:
        yield temporary
        sync(temporary, below=True)
        check()
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)


def clear_unfinished(target: str | os.PathLike) -> list[str]:
    """Removes what killed processes left of a file or folder, beside it and within it, and returns the names.

    What one had put aside to replace it, it gets back. To be called where no other process writes it.
    """
    target = Path(os.path.abspath(target))
    finish_save(target)
    cleared = []
    name, stem, suffix = map(re.escape, (_short(target.name), _short(target.stem), target.suffix))
    beside = re.compile(rf"\.{name}\.{_HEX}(\.old)?|\.{stem}\.{_HEX}{suffix}")
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        if beside.fullmatch(path.name):
            cleared.append(path.name)
            if path.suffix == ".old" and not target.exists():
                path.rename(target)
            else:
                remove(path)
    within = re.compile(rf"\..+\.{_HEX}(\.\w+)?|{UNSAVED}.+")
    for folder, folders, files in os.walk(target):
        for name in [*folders, *files]:
            if within.fullmatch(name):
                cleared.append(name)
                remove(Path(folder, name))
        folders[:] = [name for name in folders if name not in cleared and name != "masks"]
    return cleared


def _short(name: str) -> str:
    """A name, or in place of a long one its hash."""
    return name if len(os.fsencode(name)) <= _MANY_BYTES else hashlib.sha256(os.fsencode(name)).hexdigest()


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
