"""Memories that objects read, as tokens of one batch: each with its place in the image and in time.

It follows `sam2/modeling/sam2_base.py`. Objects of a batch may read different memories, and differently many.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import groupby, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .base_model import SamoePreTrainedModel
from .batch_rows import use_shared
from .kept import keep
from .memory_bank import MemoryBank, read_memories
from .memory_selection import MemorySelection

# What an object reads where others of its batch read more.
NOTHING = (None, 0)


class MemoryTokens(NamedTuple):
    """What the memory attention reads, as its arguments.

    `memory` (objects, tokens, channels). `position`: theirs (objects or 1, tokens, channels). `rotation`: how places
    rotate keys (tokens, channels of keys / 2, 2). `is_read`: which of them are read (objects, tokens), or None for all.
    """

    memory: Tensor
    position: Tensor
    rotation: Tensor
    is_read: Tensor | None


def memory_tokens(
    model: SamoePreTrainedModel, banks: Sequence[MemoryBank], selections: Sequence[MemorySelection], like: Tensor
) -> MemoryTokens:
    """The memories that objects read, in the type of `like`."""
    model.base.check_pooling(model.config)  # which may be set at any time
    pooling, maps, pointers = _places(model, selections)
    times = tuple(tuple(_shared([index for _, index in place])) for place in maps)
    positions = keep(
        "map positions",
        [model.memory_temporal_positional_encoding],
        lambda: _map_positions(model, pooling, times, like),
        of=(pooling, times, like.dtype),
    )
    num_pointer_tokens = len(pointers) * model.hidden_dim // model.mem_dim
    if pointers:
        shares = [[t / one.max_distance for (_, t), one in zip(x, selections, strict=True)] for x in pointers]
        distances = _sent(torch.tensor(_shared([*zip(*shares, strict=True)]), dtype=torch.float32), like.device)
        positions = [*positions, pointer_positions(model, distances, num_pointer_tokens, like)]
    # Memories may be rounded to bfloat16, pointers are not; autocast to float16 cannot join them.
    with torch.autocast(like.device.type, enabled=False):
        read = [read_memories(banks, [t for t, _ in place], "features", like.device) for place in maps]
        features = [model.base.pool_memory(model, x, n) for x, n in zip(read, pooling, strict=True)]
        own = [read_memories(banks, [t for t, _ in place], "pointers", like.device) for place in pointers]
        # A pointer is cut into several tokens of the memory's width. Each type is joined by itself, then all at once.
        tokens = [*features, *(x.unflatten(1, (-1, model.mem_dim)) for x in own)]
        kinds = [torch.cat([*kind], dim=1) for _, kind in groupby(tokens, lambda x: x.dtype)]
        memory = (torch.cat(kinds, dim=1) if len(kinds) > 1 else kinds[0]).to(like.dtype)
    rows = max(map(len, positions))
    position = torch.cat([x.expand(rows, -1, -1) for x in positions], dim=1)
    places = partial(model.base.memory_places, model)
    rotation = model.memory_attention.rotary_emb.of_memories(places, pooling, num_pointer_tokens, like.device)
    is_read = None
    if any(t is None for place in (*maps, *pointers) for t, _ in place):
        is_read = torch.tensor([[t is not None for t, _ in place] for place in (*maps, *pointers)])
        lengths = [x.shape[1] for x in features] + [model.hidden_dim // model.mem_dim] * len(pointers)
        is_read = _sent(is_read.T.repeat_interleave(torch.tensor(lengths), dim=1), like.device)
    return MemoryTokens(memory, position, rotation, is_read)


def full_length(model: SamoePreTrainedModel, length: int) -> int:
    """How many tokens there are where memory is full: all memories with one conditioning frame, and object pointers.
    Where `length` is more, whole maps are added: 1, 2, 4, 8 ..."""
    config = model.config
    whole, recent, older = (
        len(model.base.memory_places(model, side))
        for side in (1, config.recent_memory_pooling, config.older_memory_pooling)
    )
    pointers = config.max_object_pointers_in_encoder * model.hidden_dim // model.mem_dim
    full = whole + recent + (model.num_maskmem - 2) * older + pointers
    more = -(-(length - full) // whole)
    return full if more <= 0 else full + whole * (1 << (more - 1).bit_length())


def fill_up(tokens: MemoryTokens, objects: int, length: int) -> MemoryTokens:
    """Adds so many objects, and so many tokens that nobody reads."""
    memory, position, rotation, is_read = tokens
    position = F.pad(position.expand_as(memory), (0, 0, 0, length, 0, objects))
    if length and is_read is None:
        is_read = memory.new_ones(memory.shape[:2], dtype=torch.bool)
    if is_read is not None:
        is_read = F.pad(F.pad(is_read, (0, length)), (0, 0, 0, objects), value=True)
    memory, rotation = F.pad(memory, (0, 0, 0, length, 0, objects)), F.pad(rotation, (0, 0, 0, 0, 0, length))
    return MemoryTokens(memory, position, rotation, is_read)


def _map_positions(
    model: SamoePreTrainedModel, pooling: Sequence[int], times: Sequence[Sequence[int]], like: Tensor
) -> list[Tensor]:
    """Positions of each map's tokens in the image and in time, (objects or 1, tokens, channels)."""
    pooled = {side: model.base.memory_positions(model, side, like) for side in set(pooling)}
    in_time = ([model.memory_temporal_positional_encoding[index].flatten(1) for index in own] for own in times)
    own = (x[0] if len(x) == 1 else torch.stack(x) for x in in_time)
    return [pooled[side] + x for side, x in zip(pooling, own, strict=True)]


def _places(
    model: SamoePreTrainedModel, selections: Sequence[MemorySelection]
) -> tuple[tuple[int, ...], list[tuple], list[tuple]]:
    """Where in a batch each object's memories go: for each map the side of its pooling, and for each map and pointer
    what every object reads there, (frame index or None, time)."""
    by_row = [[(_pooling(model, index), (t, index)) for t, index in one.spatial] for one in selections]
    sides = {tuple(side for side, _ in row) for row in by_row}
    if len(sides) == 1:
        (pooling,) = sides
        maps = list(zip(*([read for _, read in row] for row in by_row), strict=True))
    else:
        pooling, maps = (), []
        for side in sorted({side for row in sides for side in row}):
            own = [[read for other, read in row if other == side] for row in by_row]
            columns = list(zip_longest(*own, fillvalue=NOTHING))
            pooling, maps = (*pooling, *[side] * len(columns)), maps + columns
    return pooling, maps, list(zip_longest(*(one.pointers for one in selections), fillvalue=NOTHING))


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device. A GPU is not waited for, which may have a frame's encoder to finish."""
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)


def _shared(rows: list) -> list:
    """One row for all where they are equal."""
    return rows[:1] if all(row == rows[0] for row in rows) else rows


def _pooling(model: SamoePreTrainedModel, temporal_index: int) -> int:
    """The side of the squares over which a map is averaged; conditioning frames' maps stay as they are."""
    if temporal_index == model.num_maskmem - 1:
        return 1
    return model.config.recent_memory_pooling if temporal_index == 0 else model.config.older_memory_pooling


def pointer_positions(model: SamoePreTrainedModel, distances: Tensor, num_tokens: int, like: Tensor) -> Tensor:
    """Encodes distances in time (objects or 1, pointers), in units of the largest: (objects or 1, tokens, channels)."""
    if not model.config.enable_temporal_pos_encoding_for_object_pointers:
        return like.new_zeros(1, num_tokens, model.mem_dim)
    angles = distances.flatten().unsqueeze(1) / sine_periods(model.hidden_dim, like.device)
    sine = torch.cat([angles.sin(), angles.cos()], dim=1)
    with use_shared():
        position = model.temporal_positional_encoding_projection_layer(sine.to(like.dtype))
    return position.unflatten(0, distances.shape).repeat_interleave(num_tokens // distances.shape[1], dim=1)


def sine_periods(dim: int, device: torch.device) -> Tensor:
    """Periods / 2 pi of a sine encoding of `dim` channels (arXiv:1706.03762), half of them sines."""
    # What exporting computes is no number.
    return (_periods.__wrapped__ if torch.compiler.is_compiling() else _periods)(dim, device)


@lru_cache
def _periods(dim: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        pair = torch.arange(dim // 2, dtype=torch.float32, device=device) // 2
        return 10000 ** (2 * pair / (dim // 2))
