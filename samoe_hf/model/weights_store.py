"""Safetensors files whose tensors are read one by one, when they are needed. Nothing here knows of models."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _OpenFile(NamedTuple):
    """A file that is mapped into memory. `stamp` is another once it is written to."""

    path: str
    file: BinaryIO
    mapped: Any
    stamp: tuple[int, int]


class StoredTensors:
    """The tensors of safetensors files. A file that is removed or replaced, as by `save_pretrained`, can be read on.

    Attributes:
        headers: names, shapes and types of the tensors, which are on the meta device. All types but floating-point ones
            are taken as int64.

    Raises:
        InputError: if a file is damaged.
    """

    def __init__(self, paths: Iterable[str | os.PathLike]):
        self.headers: dict[str, Tensor] = {}
        self._files: dict[str, _OpenFile] = {}
        for path in map(str, paths):
            file = Path(path).open("rb")  # noqa: SIM115  # as long as the tensors may be read
            try:
                opened = _OpenFile(path, file, safe_open(path, framework="pt"), _stamp(file))
                slices = {name: opened.mapped.get_slice(name) for name in opened.mapped.keys()}  # noqa: SIM118
                self.headers |= {name: _header(tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
            except (SafetensorError, RuntimeError) as error:
                raise InputError(f"{path} is truncated, damaged or no safetensors file: {error}") from error
            self._files |= dict.fromkeys(slices, opened)

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


@functools.lru_cache(maxsize=1024)  # experts of many domains have few shapes
def _header(shape: tuple[int, ...], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=FLOAT_TYPES.get(dtype, torch.int64), device="meta")


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
