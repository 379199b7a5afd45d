"""Files and folders that are written whole or not at all, and a hash of tensors."""

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import CONFIG_NAME

_WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`. What was written there becomes `path` when the block ends.

    If the block raises, `path` is as it was before. Missing folders are made. The temporary file has the same suffix,
    and several processes may write the same file at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, as a whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


@contextmanager
def new_folder(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` when the block ends, and is removed if the block raises.

    Args:
        overwrite: whether it takes the place of a folder that is not empty.

    Raises:
        FileExistsError: at once, if `folder` is a file, or a folder that is not empty, unless `overwrite`.
    """
    target = Path(folder).resolve()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise FileExistsError(f"{folder} exists and is not an empty folder; give another output.")
    temporary, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex}") for _ in range(2))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def updated_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder whose files are moved into `folder` when the block ends.

    If the block raises, `folder` is as it was before. Weights of an earlier save are removed when new ones come. The
    configuration, which names the other files, is moved last.

    Raises:
        OSError: if safetensors cannot be written, which safetensors reports by an exception of its own.
    """
    target = Path(folder)
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    # Inside the folder, to be on the same file system. Trainer does not upload names that begin with an underscore.
    temporary = Path(tempfile.mkdtemp(prefix="_", dir=target))
    try:
        yield temporary
        files = [file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()]
        names = {str(file) for file in files}
        if any(map(_WEIGHTS.fullmatch, names)):
            for old in target.iterdir():
                if _WEIGHTS.fullmatch(old.name) and old.name not in names:
                    old.unlink()
        for file in sorted(files, key=lambda file: str(file) == CONFIG_NAME):
            (target / file).parent.mkdir(exist_ok=True)
            os.replace(temporary / file, target / file)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and not any(target.iterdir()):
            target.rmdir()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, shapes and values, in the given order, as a hexadecimal number.

    Args:
        tensors: name and tensor, of any type and device.
        dtype: floating-point tensors are hashed as if they had this type; by default as they are.
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
