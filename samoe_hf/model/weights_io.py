"""A model's folder, which is written whole or not at all, and a hash of tensors."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import CONFIG_NAME

from .errors import InputError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# The folder of files with experts of domains.
DOMAINS = "domains"
_WEIGHTS = re.compile(
    rf"(pytorch_)?model(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)(\.index\.json)?|{DOMAINS}/[\w-]+\.safetensors"
)
# In a folder: a save that is being written, and one that is written, until its files are in their places.
# Trainer does not upload names that begin with an underscore.
UNSAVED, _SAVED, _FILES, _LOCK = "_unsaved_", "_saved", "_files.json", "_lock"


def sync(path: str | os.PathLike, below: bool = False) -> None:
    """Waits until a file, or a folder's list of names, is on the disk; with `below` also all that is in the folder.

    Weights get the permissions of other new files: safetensors writes them for their owner alone from 0.8 on.
    """
    for folder, folders, files in os.walk(path) if below else ():
        for name in [*folders, *files]:
            sync(os.path.join(folder, name))
    if os.name == "nt":
        return  # Windows opens no folder, and syncs only what was opened for writing
    if Path(path).suffix == ".safetensors":
        new = Path(path).with_name(f".new.{uuid.uuid4().hex}")
        with suppress(OSError):  # some file systems know no permissions
            new.touch()
            shutil.copymode(new, path)
        new.unlink(missing_ok=True)
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(number)


@contextmanager
def updated_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder whose files are moved into `folder` when the block ends.

    If the block raises, `folder` is as it was before. Weights of an earlier save are removed when new ones come. All
    files become valid by one renaming, see [`finish_save`]. Of several processes, the last one's files are there.
    """
    target = Path(folder)
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    finish_save(target)
    # Inside the folder, to be on the same file system.
    temporary = Path(tempfile.mkdtemp(prefix=UNSAVED, dir=target))
    try:
        yield temporary
        files = sorted(file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if file.is_file())
        if files:
            (temporary / _FILES).write_text(json.dumps(files), encoding="utf-8")
            sync(temporary, below=True)
            with _locked(target):
                _finish(target)
                temporary.rename(target / _SAVED)
                _finish(target)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and not any(target.iterdir()):
            target.rmdir()


def finish_save(folder: str | os.PathLike) -> None:
    """Moves the files of a save to their places; also of one that was written, and killed before they were there.

    Until all are there, the folder has no configuration, which names the others. So no reader takes a mixture of two
    saves for a model.
    """
    if Path(folder, _SAVED).is_dir():
        with _locked(folder):
            _finish(Path(folder))


@contextmanager
def _locked(folder: str | os.PathLike) -> Iterator[None]:
    """One process at a time, where folders can be locked: not on Windows and some network file systems."""
    number = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None and number is not None:
            with suppress(OSError):
                locks: Any = fcntl  # whose names no type checker knows on Windows
                locks.flock(number, locks.LOCK_EX)
        yield
    finally:
        if number is not None:
            os.close(number)


def can_lock(path: str | os.PathLike) -> bool:
    """Whether a file, which is made if need be, can be locked: some file systems, as of clusters, know no locks."""
    with open(path, "ab") as file:
        try:
            if fcntl is not None:
                locks: Any = fcntl
                locks.flock(file, locks.LOCK_SH | locks.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)  # another process has locked it
    return True


def _finish(target: Path) -> None:
    saved = target / _SAVED
    if not saved.is_dir():
        return
    # Where the folder is not locked, another process may move them as well, and have finished when this one goes on.
    with suppress(FileNotFoundError), WeakFileLock(saved / _LOCK) if can_lock(saved / _LOCK) else nullcontext():
        names = json.loads((saved / _FILES).read_text(encoding="utf-8"))
        if (saved / CONFIG_NAME).exists():
            (target / CONFIG_NAME).unlink(missing_ok=True)
        if any(map(_WEIGHTS.fullmatch, names)):
            for old in [*target.iterdir(), *target.glob(f"{DOMAINS}/*")]:
                name = old.relative_to(target).as_posix()
                if _WEIGHTS.fullmatch(name) and name not in names:
                    old.unlink()
            with suppress(OSError):  # of other files, or not there
                (target / DOMAINS).rmdir()
        for name in sorted(names, key=lambda name: name == CONFIG_NAME):
            if (saved / name).exists():
                (target / name).parent.mkdir(exist_ok=True)
                os.replace(saved / name, target / name)
        sync(target)
        (saved / _FILES).unlink()
    shutil.rmtree(saved, ignore_errors=True)


@contextmanager
def unchanged_model(folder: str | os.PathLike) -> Iterator[None]:
    """Around what loads a model of a folder: raises an `InputError` if it was saved anew meanwhile."""
    try:
        finish_save(folder)
    except OSError as error:
        raise InputError(f"{folder} holds a save that was stopped, and cannot be written: {error}") from error
    before, failure = _stamps(folder), None
    try:
        yield
    except Exception as error:
        failure = error
    if _stamps(folder) != before or _SAVED in before:
        raise InputError(f"{folder} was saved anew while it was loaded; load it again.") from failure
    if failure is not None:
        raise failure


def _stamps(folder: str | os.PathLike) -> dict[str, tuple[int, int]]:
    """What tells a save of a model from another: which files its names stand for."""
    found = {}
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        if entry.name in (CONFIG_NAME, _SAVED) or _WEIGHTS.fullmatch(entry.name):
            with suppress(FileNotFoundError):
                status = os.stat(entry.path)
                found[entry.name] = (status.st_ino, status.st_mtime_ns)
    return found


def hash_tensors(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, shapes and values, in the given order, as a hexadecimal number.

    Floating-point tensors are hashed as if they had the type `dtype`; by default as they are.
    """
    digest = hashlib.sha256()
    for name, tensor in plain_tensors(tensors):
        tensor = tensor.detach().cpu()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same, and of tensors that hold others, as quantizing libraries make them, those that they hold."""
    for name, tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            held, _ = tensor.__tensor_flatten__()
            yield from plain_tensors((f"{name}.{inner}", getattr(tensor, inner)) for inner in held)
        else:
            yield name, tensor
