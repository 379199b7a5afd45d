"""Functions that are compiled once for any number of objects, memories and points."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental import _config
from torch.utils._pytree import tree_map_only

# Modes of `torch.compile` that record CUDA graphs.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")

T = TypeVar("T")

_lock, _stance, _in_use = Lock(), ExitStack(), 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """While the context is open, compiled functions run uncompiled. PyTorch knows one stance of all threads, and which
    was there before: with threads whose contexts overlap, the first takes it and the last puts it back."""
    global _in_use
    with _lock:
        _in_use += 1
        if _in_use == 1:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            _in_use -= 1
            if _in_use == 0:
                _stance.close()


def varying(x: Tensor, *dims: int) -> Tensor:
    """A tensor, contiguous, whose sizes in these dimensions may be others in later runs; 1 and more are two kinds."""
    x = x.flatten().view(x.shape)  # where a size is 1, its stride may be anything
    torch._dynamo.maybe_mark_dynamic(x, [dim for dim in dims if x.shape[dim] > 1])
    return x


class Graphs:
    """Compiles functions as they are called first, by `options` of [`torch.compile`]. Copies of it compile anew.

    `are_recorded`: whether CUDA graphs are recorded, one for each size that occurs.
    """

    def __init__(self, options: dict[str, Any]):
        by_option = (options.get("options") or {}).get("triton.cudagraphs", False)
        self.are_recorded = options.get("mode") in CUDA_GRAPH_MODES or by_option
        self.options = options
        self._compiled: dict[Callable, Callable] = {}

    def __reduce__(self) -> tuple:
        return Graphs, (self.options,)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """What `function` gives."""
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, **self.options)
        config: Any = _config
        with config.patch(use_duck_shape=False):  # sizes that are equal by chance remain two
            return self._compiled[function](*args)

    def outlive(self, output: T) -> T:
        """What a compiled function puts out, copied where the next run of its CUDA graph would overwrite it."""
        return tree_map_only(Tensor, torch.clone, output) if self.are_recorded else output
