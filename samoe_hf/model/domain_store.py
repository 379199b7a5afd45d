"""Tensors that stay in their files until they are needed. Nothing here knows of models."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import safe_open
from torch import Tensor

from .errors import InputError


class _OpenFile(NamedTuple):
    """A safetensors file. Once open it stays readable, whatever takes its place; `stamp` tells if it is written to."""

    path: str
    file: BinaryIO
    mapped: Any
    stamp: tuple[int, int]


class StoredTensors:
    """The tensors of safetensors files, which are mapped into memory and read one by one.

    A file that is removed or replaced, as `save_pretrained` does, can be read on.
    """

    def __init__(self, paths: Iterable[str | os.PathLike]):
        self._files: dict[str, _OpenFile] = {}
        for path in map(str, paths):
            file = Path(path).open("rb")
            opened = _OpenFile(path, file, safe_open(path, framework="pt"), _stamp(file))
            self._files |= dict.fromkeys(opened.mapped.keys(), opened)

    def read(self, name: str) -> Tensor:
        """A copy of a tensor, on the CPU.

        Raises:
            InputError: if its file was written to since it was opened, or values are NaN or infinite.
        """
        path, file, mapped, stamp = self._files[name]
        tensor = mapped.get_tensor(name).clone() if _stamp(file) == stamp else None
        if tensor is None or _stamp(file) != stamp:
            raise InputError(f"{path} was changed after the model was loaded from it; load the model again.")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: the tensor {name!r} has NaN or infinite values.")
        return tensor


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
