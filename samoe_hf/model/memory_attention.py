"""Memory attention: a frame in the light of what has been seen of each object (arXiv:2408.00714, section 4).

It computes what the modules of [`~transformers.Sam2VideoModel`] do, with less work where many objects share a frame:
the first self-attention sees nothing of the objects yet and runs once for all of them, memories get their positions
once for all layers, and rotary encodings are products of complex numbers.
"""

import torch
from torch import Tensor
from transformers.models.sam2_video.modeling_sam2_video import (
    ALL_ATTENTION_FUNCTIONS,
    Sam2VideoMemoryAttention,
    Sam2VideoRoPEAttention,
    eager_attention_forward,
)


def attend_to_memory(
    attention: Sam2VideoMemoryAttention,
    image: Tensor,
    position: Tensor,
    memory: Tensor,
    memory_position: Tensor,
    num_pointer_tokens: int,
) -> Tensor:
    """Conditions a frame on memories.

    Args:
        image: (objects, tokens, hidden), or one row for all objects.
        position: encoding of the image's positions, (1, tokens, hidden).
        memory: (objects, memory tokens, channels): whole maps first, object pointers last.
        memory_position: (1, memory tokens, channels).
        num_pointer_tokens: how many of the memory tokens belong to pointers, which have no place in the image.

    Returns:
        (objects, tokens, hidden).
    """
    hidden = image + 0.1 * position
    if attention.training:
        # Dropout is drawn for each object.
        hidden = hidden.expand(len(memory), -1, -1)
    num_maps = (memory.shape[1] - num_pointer_tokens) // hidden.shape[1]
    rotation = attention.rotary_emb.rotations(attention.position_ids)
    key_rotation = attention.rotary_emb.rotations(attention.position_ids, num_maps, num_pointer_tokens)
    keys = memory + memory_position
    for layer in attention.layers:
        normed = layer.layer_norm1(hidden)
        attended = _attend(layer.self_attn, normed, normed, normed, rotation, rotation)
        hidden = hidden + layer.dropout1(attended)
        normed = layer.layer_norm2(hidden).expand(len(memory), -1, -1)
        attended = _attend(layer.cross_attn_image, normed, keys, memory, rotation, key_rotation)
        hidden = hidden + layer.dropout2(attended)
        normed = layer.layer_norm3(hidden)
        hidden = hidden + layer.dropout3(layer.linear2(layer.dropout(layer.activation(layer.linear1(normed)))))
    return attention.layer_norm(hidden)


def _attend(
    attention: Sam2VideoRoPEAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Tensor,
    key_rotation: Tensor,
) -> Tensor:
    """Attention of (objects, tokens, channels) to (objects, keys, channels), both rotated by where they are."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_attention_heads, attention.head_dim)).transpose(1, 2)

    query = _rotate(heads(attention.q_proj(query)), rotation)
    key = _rotate(heads(attention.k_proj(key)), key_rotation)
    value = heads(attention.v_proj(value))
    implementation = attention.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = attention.dropout_p if attention.training else 0.0
    attended, _ = attend(
        attention, query, key, value, attention_mask=None, dropout=dropout, scaling=attention.scaling, is_causal=False
    )
    return attention.o_proj(attended.flatten(-2))


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
