"""What the rows of a batch belong to while a model runs, for those who watch its modules, such as its routers.

The model declares its rows where it makes a batch: frames in the image encoder, objects in a frame step.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class BatchRow(NamedTuple):
    """One row of a batch: an object on a frame of a video, or the whole frame where `object_id` is None.

    `video` is the number of a clip, or of a session among those that are tracked together.
    """

    video: int
    frame_idx: int
    object_id: int | None = None


class BatchRows(NamedTuple):
    """The rows of a batch. With `shared`, a tensor has no rows of its own: it is computed once for all of them.

    `is_own` (rows, tokens): which tokens are a row's own, and do not only fill it up to the others' length; None: all.
    """

    rows: tuple[BatchRow, ...] = ()
    shared: bool = False
    is_own: Tensor | None = None

    def frames(self) -> tuple[BatchRow, ...]:
        """The frames that the rows are of, each once."""
        return tuple(dict.fromkeys(row._replace(object_id=None) for row in self.rows))


NO_ROWS = BatchRows()
_current: ContextVar[BatchRows] = ContextVar("batch_rows", default=NO_ROWS)


def batch_rows() -> BatchRows:
    """The rows of the batch that is being computed in this thread. There are none where nothing declares them."""
    return _current.get()


@contextmanager
def use_rows(rows: Iterable[BatchRow], shared: bool = False, is_own: Tensor | None = None) -> Iterator[None]:
    """While the context is open, in this thread, batches have these rows."""
    token = _current.set(BatchRows(tuple(rows), shared, is_own))
    try:
        yield
    finally:
        _current.reset(token)


def use_frames(num_rows: int) -> AbstractContextManager[None]:
    """While the context is open, rows are frames instead of objects, if there are as many."""
    if torch.compiler.is_compiling():
        return nullcontext()
    frames = batch_rows().frames()
    return use_rows(frames) if len(frames) == num_rows else nullcontext()


def use_shared() -> AbstractContextManager[None]:
    """While the context is open, tensors are shared by all rows of the batch."""
    return use_rows(batch_rows().rows, shared=True)


def use_own_tokens(is_own: Tensor | None) -> AbstractContextManager[None]:
    """While the context is open, only these tokens (rows, tokens) are the rows' own; None: all."""
    if is_own is None or torch.compiler.is_compiling():
        return nullcontext()
    return use_rows(batch_rows().rows, is_own=is_own)
