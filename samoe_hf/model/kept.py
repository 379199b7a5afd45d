"""What is computed of a model's weights alone, once for a propagated video or a clip instead of on each frame."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class _Known(NamedTuple):
    """A value, and the state of what it was computed of. While `sources` are held, no others can lie where they are."""

    state: list[Any]
    sources: list[Tensor]
    value: Any


Kept = dict[Hashable, _Known]
_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)
_during_clip: ContextVar[dict[Hashable, Any] | None] = ContextVar("during_clip", default=None)


@contextmanager
def keep_for_clip() -> Iterator[None]:
    """While the context is open, values are kept though gradients flow through them: all of it in one backward pass.

    Weights, hooks and settings must not be changed meanwhile.
    """
    tokens = _kept.set({}), _during_clip.set({})
    try:
        yield
    finally:
        _kept.reset(tokens[0])
        _during_clip.reset(tokens[1])


def once_for_clip(name: Callable[[], Hashable], compute: Callable[[], T]) -> T:
    """What `compute` gives: in [`keep_for_clip`] that of the first call with a name, unless a graph is compiled."""
    # PyTorch 2.11 compiles no context variable, such as `name` reads as well.
    if torch.compiler.is_compiling() or (known := _during_clip.get()) is None:
        return compute()
    key = name(), torch.is_grad_enabled()
    if key not in known:
        known[key] = compute()
    return known[key]


def keep_between(steps: Iterator[T]) -> Iterator[T]:
    """Runs an iterator whose steps keep values for those after them. With its end all are forgotten.

    PyTorch does not count changes through `tensor.data`, nor those of fused optimizers. So weights must not be changed
    in these ways between two steps.
    """
    kept: Kept = {}
    while True:
        token = _kept.set(kept)  # not while the caller has its turn
        try:
            value = next(steps)
        except StopIteration:
            return
        finally:
            _kept.reset(token)
        yield value


def keeps(sources: Sequence[Tensor]) -> bool:
    """Whether what is computed of some tensors is kept at the moment.

    Nothing is where gradients are computed, but in [`keep_for_clip`], in a graph that is compiled or exported, or of
    tensors that are sharded, quantized, or were made in inference mode.
    """
    if torch.compiler.is_compiling() or _kept.get() is None:
        return False
    if torch.is_grad_enabled() and _during_clip.get() is None:
        return False
    return all(type(x) in (Tensor, nn.Parameter) and not x.is_inference() for x in sources)


def keep(name: Hashable, sources: Sequence[Tensor], compute: Callable[[], T], of: Hashable = None) -> T:
    """What `compute` gives: kept until a source is another, is elsewhere or has other values, or `of` is another.

    Args:
        name: one value is kept under each name, the last.
        sources: all tensors that the value depends on.
        compute: depends on `name`, `sources`, `of`, autocast and gradients alone. Nobody may write to its value.
    """
    kept = _kept.get()
    if kept is None or not keeps(sources):
        return compute()
    device = sources[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    state = [of, autocast, torch.is_grad_enabled(), *((x.data_ptr(), x._version) for x in sources)]
    known = kept.get(name)
    if known is None or known.state != state:
        known = kept[name] = _Known(state, [x.detach() for x in sources], compute())
    return known.value
