"""Safetensors files: those that a model is loaded from, and those that are read when their tensors are needed. Nothing
here knows of models."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from .errors import InputError

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A file begins with the length of its header, a number of so many bytes.
LENGTH_BYTES = 8


class StoredTensors:
    """The tensors of safetensors files, of which each is read by itself.

    `headers` are names, shapes and types of the tensors, which are on the meta device; all types but floating-point
    ones are taken as int64. A damaged file is an `InputError`.
    """

    def __init__(self, paths: Iterable[str | os.PathLike]):
        self.headers: dict[str, Tensor] = {}
        self._files = {}
        for path in map(str, paths):
            try:
                mapped = safe_open(path, framework="pt")
                slices = {name: mapped.get_slice(name) for name in mapped.keys()}  # noqa: SIM118
                for name, stored in slices.items():
                    dtype = FLOAT_TYPES.get(stored.get_dtype(), torch.int64)
                    self.headers[name] = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
            except (SafetensorError, RuntimeError) as error:
                raise _damaged(path, error) from error
            self._files |= dict.fromkeys(slices, (path, mapped))

    def read(self, name: str) -> Tensor:
        """A copy of a tensor, on the CPU; InputError if values are NaN or infinite."""
        path, mapped = self._files[name]
        return _finite(path, name, mapped.get_tensor(name).clone())


class LateFile:
    """A safetensors file that is read when one of its tensors is needed, and then as a whole.

    It may be removed or replaced before, as by `save_pretrained`. No open file is held, of which a process has few.
    `data_bytes` are of all tensors together.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self._stamp = _stamp(path)
        self._tensors: dict[str, Tensor] = {}
        size = self._stamp[1]
        if size < LENGTH_BYTES:
            raise _damaged(path, f"it has {size} bytes")
        with Path(path).open("rb") as file:  # what is mapped and looked at counts as memory of the process
            self.data_bytes = size - LENGTH_BYTES - int.from_bytes(file.read(LENGTH_BYTES), "little")
        if self.data_bytes < 0:
            raise _damaged(path, f"it has {size} bytes, fewer than its header should have")
        if sys.platform == "win32":  # where a file that is mapped cannot be removed or replaced
            self._bytes = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
        else:
            self._bytes = torch.from_file(self.path, shared=False, size=size, dtype=torch.uint8)

    def headers(self) -> dict[str, Tensor]:
        """See [`StoredTensors`]."""
        return StoredTensors([self.path]).headers

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU.

        An `InputError` if the file was written to since it was found, lacks the tensor, or has values that are not
        finite.
        """
        if name not in self._tensors:
            self._tensors = self._read_all()
        if name not in self._tensors:
            raise InputError(f"{self.path} has no tensor {name!r}; expected it of the experts that are described.")
        return _finite(self.path, name, self._taken(name).clone())

    def _taken(self, name: str) -> Tensor:
        """A tensor of those that were read. Whoever reads one reads the others as well, so none is kept."""
        return self._tensors.pop(name)

    def _read_all(self) -> dict[str, Tensor]:
        changed = f"{self.path} was changed after the model was loaded from it; load the model again."
        if self._is_written():
            raise InputError(changed)
        content = self._bytes.numpy().tobytes()
        if self._is_written():
            raise InputError(changed)
        try:
            return load(content)
        except SafetensorError as error:
            raise _damaged(self.path, error) from error

    def _is_written(self) -> bool:
        """Whether the file itself was written to; another one may have taken its name."""
        try:
            stamp = _stamp(self.path)
        except FileNotFoundError:
            return False
        return stamp[0] == self._stamp[0] and stamp != self._stamp


class ReadFile(LateFile):
    """Tensors that were read already, in the place of a file that is read late; `path` is where they are from."""

    def __init__(self, path: str | os.PathLike, tensors: dict[str, Tensor]):
        self.path, self._tensors = str(path), tensors
        self.data_bytes = sum(tensor.nbytes for tensor in tensors.values())

    def headers(self) -> dict[str, Tensor]:
        return {name: tensor.to("meta") for name, tensor in self._tensors.items()}

    def _read_all(self) -> dict[str, Tensor]:
        return self._tensors

    def _taken(self, name: str) -> Tensor:
        return self._tensors[name]


def _stamp(path: str | os.PathLike) -> tuple[int, int, int]:
    """The file's number, its size and when it was written to."""
    status = Path(path).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _damaged(path: str | os.PathLike, reason: object) -> InputError:
    return InputError(f"{path} is truncated, damaged or no safetensors file: {reason}")


def _finite(path: str, name: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise InputError(f"{path}: the tensor {name!r} has NaN or infinite values.")
    return tensor
