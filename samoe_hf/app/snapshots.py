"""What a session of tracking knows, kept so that a click can be taken back to the bit."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from samoe_hf.model.session import VideoSession

# Of a session: objects, prompts, outputs, memories, and what the gate has decided. Cached features are not among them,
# since they depend on the frame alone.
KEPT = (
    "obj_ids",
    "_obj_id_to_idx",
    "_obj_idx_to_id",
    "point_inputs_per_obj",
    "mask_inputs_per_obj",
    "output_dict_per_obj",
    "frames_tracked_per_obj",
    "obj_with_new_inputs",
    "domain_decision",
)


def take_snapshot(session: VideoSession) -> dict[str, Any]:
    """All that prompts and tracking change in a session. Tensors are shared, since nobody writes into them."""
    state = {name: getattr(session, name) for name in KEPT}
    return copy.deepcopy(state, {id(tensor): tensor for tensor in _tensors(state)})


def restore_snapshot(session: VideoSession, snapshot: Mapping[str, Any]) -> None:
    """Puts a session back to where it was; a snapshot can be used once."""
    for name in KEPT:
        setattr(session, name, snapshot[name])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for one in fields(value):
            yield from _tensors(getattr(value, one.name))
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
