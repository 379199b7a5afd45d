"""Memory attention: conditions a frame's features on the memories of each object (arXiv:2408.00714, section 4).

It computes what transformers' `Sam2VideoMemoryAttention` does, with less work where many objects share a frame: the
first self-attention and the first queries see nothing of the objects yet and are computed once for all objects of a
video, memories get their positions once for all layers, and rotary encodings are products of complex numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.sam2_video.modeling_sam2_video import (
    ALL_ATTENTION_FUNCTIONS,
    Sam2VideoRoPEAttention,
    eager_attention_forward,
)

from .base_modules import KeepsTypes
from .batch_rows import use_frames, use_own_tokens
from .joint_linear import joint_layers, run_jointly
from .kept import keep, keeps


class MemoryAttention(nn.Module):
    """The layers of a base's memory attention, for a batch of objects."""

    layers: nn.ModuleList
    layer_norm: nn.LayerNorm

    def __init__(self, parts: Any):
        super().__init__()
        self.layers, self.layer_norm = parts.layers, parts.layer_norm
        self.rotary_emb = RotaryEmbedding(parts.rotary_emb)
        self.position_ids = nn.Buffer(parts.position_ids, persistent=False)

    def forward(
        self,
        image: Tensor,
        position: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        memory_rotation: Tensor,
        is_read: Tensor | None = None,
        together: tuple[slice, Tensor] | None = None,
    ) -> Tensor:
        """Conditions a frame on memories.

        Args:
            image: (objects, tokens, hidden), or one row for each video, with as many objects in each.
            position: encoding of the image's positions, (1, tokens, hidden).
            memory: (objects, memory tokens, channels).
            memory_position: (objects or 1, memory tokens, channels).
            memory_rotation: cosine and sine by which a memory's place in the image rotates keys,
                (memory tokens, channels of keys / 2, 2). Object pointers have no place.
            is_read: (objects, memory tokens) bool, false where an object has fewer memories than others; None if all
                have as many.
            together: which of some frames `image` is, and all of them (frames, tokens, hidden). What does not depend on
                memories is computed for all of them at once, where it can be kept.

        Returns:
            (objects, tokens, hidden).
        """
        hidden, query = self._begin_together(position, together) or self._begin(image, position, memory.shape[0])
        rotation = self.rotary_emb.of_map(self.position_ids)
        keys, mask = memory + memory_position, None
        if is_read is not None:
            mask = torch.zeros_like(is_read, dtype=image.dtype).masked_fill(~is_read, -torch.inf)[:, None, None]
        # Of all layers at once, unless several objects would take much memory for nothing.
        is_small = not torch.compiler.is_compiling() and (torch.is_grad_enabled() or memory.shape[0] == 1)
        at_once = len(self.layers) if is_small else 1
        projected: list[tuple[Tensor, Tensor]] = []
        layer: Any  # as transformers' Sam2VideoMemoryAttentionLayer
        for index, layer in enumerate(self.layers):
            cross = layer.cross_attn_image
            if index > 0:
                hidden, query = self._attend_to_itself(layer, hidden)
            if not projected:
                following: list[Any] = [other.cross_attn_image for other in self.layers[index : index + at_once]]
                with use_own_tokens(is_read):
                    of_keys = run_jointly([other.k_proj for other in following], keys)
                    of_values = run_jointly([other.v_proj for other in following], memory)
                projected = list(zip(of_keys, of_values, strict=True))
            attended = _attend(cross, query, *projected.pop(0), rotation, memory_rotation, mask)
            attended = run_jointly((cross.o_proj,), attended)[0]
            hidden = _for_rows(hidden, memory.shape[0]) + layer.dropout2(attended)
            normed = layer.layer_norm3(hidden)
            hidden = hidden + layer.dropout3(layer.linear2(layer.dropout(layer.activation(layer.linear1(normed)))))
        return self.layer_norm(hidden)

    def _begin(self, image: Tensor, position: Tensor, num_objects: int) -> tuple[Tensor, Tensor]:
        """What a frame is up to the first queries for memories, and these: nothing of the objects is known yet."""
        hidden = image + 0.1 * position
        if self.training and self._draws_dropout():
            hidden = _for_rows(hidden, num_objects)  # dropout is drawn for each object
        with use_frames(len(hidden)):
            return self._attend_to_itself(self.layers[0], hidden)

    def _begin_together(self, position: Tensor, together: tuple[slice, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The same, kept from the first of some frames for the others, or None where it cannot be."""
        if together is None or len(together[1]) == 1 or (self.training and self._draws_dropout()):
            return None
        rows, frames = together
        layer: Any = self.layers[0]
        joint = [joint_layers(group, frames) for group in self._groups(layer)]
        norms = [*layer.layer_norm1.parameters(), *layer.layer_norm2.parameters()]
        if not keeps(norms) or any(one is None or one.is_watched() for one in joint):
            return None
        # While they are held, no others have their ids.
        known: dict[str, Any] = keep((self, "begun"), norms, lambda: {"joint": joint}, of=(*map(id, joint),))
        if known.get("frames") is not frames:
            known |= {"frames": frames, "begun": self._attend_to_itself(layer, frames + 0.1 * position)}
        hidden, query = known["begun"]
        return hidden[rows], query[rows]

    def _attend_to_itself(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Self-attention of (rows, tokens, hidden); its output, and the queries for memories."""
        projections, output, queries = self._groups(layer)
        rotation = self.rotary_emb.of_map(self.position_ids)
        query, key, value = run_jointly(projections, layer.layer_norm1(hidden))
        attended = _attend(layer.self_attn, query, key, value, rotation, rotation)
        hidden = hidden + layer.dropout1(*run_jointly(output, attended))
        return hidden, run_jointly(queries, layer.layer_norm2(hidden))[0]

    @staticmethod
    def _groups(layer: Any) -> tuple[tuple, tuple, tuple]:
        """Linear layers of one input each: of the self-attention, of its output, and for queries for memories."""
        own = layer.self_attn
        return (own.q_proj, own.k_proj, own.v_proj), (own.o_proj,), (layer.cross_attn_image.q_proj,)

    def _draws_dropout(self) -> bool:
        """Whether there is dropout up to the first queries for memories."""
        layer: Any = self.layers[0]
        shared = (layer.dropout1, layer.self_attn, layer.cross_attn_image.q_proj)
        dropouts = (module for part in shared for module in part.modules() if isinstance(module, nn.Dropout))
        return layer.self_attn.dropout_p > 0 or any(module.p > 0 for module in dropouts)


class RotaryEmbedding(KeepsTypes):
    """A rotary embedding of positions that never change: it is computed once, and kept; of frequencies that are not
    rounded with the model's weights."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding
        self._known: dict[str, tuple[tuple, Tensor]] = {}

    def of_map(self, position_ids: Tensor) -> Tensor:
        """Cosine and sine for each pair of channels of a frame's own map, (tokens, channels / 2, 2), at places (tokens,
        2).

        They are kept until there are others, or another device; so are those of memories.
        """
        return self._keep("map", (position_ids.device,), lambda: self._compute(position_ids))

    def of_memories(
        self, places: Callable[[int], Tensor], pooling: tuple[int, ...], num_pointer_tokens: int, device: torch.device
    ) -> Tensor:
        """The same for the tokens of some memories, and then of object pointers, which have no place.

        `places` gives those of the tokens of a memory that is pooled over squares of so many a side: `pooling`, for
        each.
        """

        def compute() -> Tensor:
            by_side = {side: self._compute(places(side).to(device)) for side in set(pooling)}
            pointers = self._compute(torch.zeros(num_pointer_tokens, 2, dtype=torch.float32, device=device))
            return torch.cat([*(by_side[side] for side in pooling), pointers])

        # Most frames read as many as the frame before.
        return self._keep("memories", (device, pooling, num_pointer_tokens), compute)

    def _keep(self, slot: str, key: tuple, compute: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_compiling():
            return compute()
        known = self._known.get(slot)  # which other threads may change, that track other videos
        if known is None or known[0] != key:
            with torch.inference_mode(False):
                known = self._known[slot] = key, compute()
        return known[1]

    def _compute(self, places: Tensor) -> Tensor:
        cos, sin = (x[0, :, ::2] for x in self.embedding(places, places))
        return torch.stack([cos, sin], dim=-1)


def _for_rows(x: Tensor, num_rows: int) -> Tensor:
    """(rows, ...) with each row repeated for its objects: (num_rows, ...)."""
    if x.shape[0] == 1:
        return x.expand(num_rows, *x.shape[1:])
    return x if x.shape[0] == num_rows else x.repeat_interleave(num_rows // x.shape[0], dim=0)


def _attend(
    attention: Sam2VideoRoPEAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Tensor,
    key_rotation: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of projected queries (objects or videos, tokens, channels) to projected keys and values (objects, keys,
    channels), rotated by where they are; `mask` (objects, 1, 1, keys) is added to the logits. The output is not
    projected yet."""
    query = _for_rows(_rotate(_heads(attention, query), rotation), key.shape[0])
    key, value = _rotate(_heads(attention, key), key_rotation), _heads(attention, value)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation or "eager", eager_attention_forward
    )
    dropout = attention.dropout_p if attention.training else 0.0
    attended, _ = attend(
        attention, query, key, value, attention_mask=mask, dropout=dropout, scaling=attention.scaling, is_causal=False
    )
    return attended.flatten(-2)


def _heads(attention: Sam2VideoRoPEAttention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.num_attention_heads, attention.head_dim)).transpose(1, 2)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates pairs of channels of (..., tokens, channels) by `rotation` (tokens, channels / 2, 2): cosine and sine."""
    # In float32 at least, as the original does.
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Compilers fuse real numbers, and leave complex ones to kernels of their own.
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)
