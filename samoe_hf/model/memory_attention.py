"""Memory attention: a frame in the light of what has been seen of each object (arXiv:2408.00714, section 4).

It computes what the modules of [`~transformers.Sam2VideoModel`] do, with less work where many objects share a frame:
the first self-attention and the first queries for memories see nothing of the objects yet and are computed once for
all objects of a video, memories get their positions once for all layers, and rotary encodings are products of complex
numbers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam2_video.modeling_sam2_video import (
    ALL_ATTENTION_FUNCTIONS,
    Sam2VideoMemoryAttention,
    Sam2VideoRoPEAttention,
    eager_attention_forward,
)

from .domain_experts import DomainLinear
from .expert_layer import ExpertLinear, LinearOfTokens

# Where a CPU computes attention in blocks, each so large that it stays near the core.
LARGE_ATTENTION, QUERIES_AT_ONCE, KEYS_AT_ONCE = 2**20, 256, 1024


def attend_to_memory(
    attention: Sam2VideoMemoryAttention,
    image: Tensor,
    position: Tensor,
    memory: Tensor,
    memory_position: Tensor,
    memory_rotation: Tensor,
) -> Tensor:
    """Conditions a frame on memories.

    Args:
        image: (objects, tokens, hidden), or one row for the objects of each video, of which there are as many in each.
        position: encoding of the image's positions, (1, tokens, hidden).
        memory: (objects, memory tokens, channels).
        memory_position: (1, memory tokens, channels).
        memory_rotation: how their places in the image rotate keys, (memory tokens, channels of keys / 2, 2): cosine and
            sine. Object pointers have no place.

    Returns:
        (objects, tokens, hidden).
    """
    hidden = image + 0.1 * position
    if attention.training and _draws_dropout(attention.layers[0]):
        # It is drawn for each object.
        hidden = _for_rows(hidden, len(memory))
    rotation = attention.rotary_emb.rotations(attention.position_ids)
    keys = memory + memory_position
    for layer in attention.layers:
        normed = layer.layer_norm1(hidden)
        attended = _attend(layer.self_attn, normed, normed, normed, rotation, rotation)
        hidden = hidden + layer.dropout1(attended)
        attended = _attend(layer.cross_attn_image, layer.layer_norm2(hidden), keys, memory, rotation, memory_rotation)
        hidden = _for_rows(hidden, len(memory)) + layer.dropout2(attended)
        normed = layer.layer_norm3(hidden)
        hidden = hidden + layer.dropout3(layer.linear2(layer.dropout(layer.activation(layer.linear1(normed)))))
    return attention.layer_norm(hidden)


def _draws_dropout(layer: nn.Module) -> bool:
    """Whether what sees nothing of the objects, up to the first queries for memories, differs for each of them."""
    shared = (layer.dropout1, layer.self_attn, layer.cross_attn_image.q_proj)
    dropouts = (module for part in shared for module in part.modules() if isinstance(module, nn.Dropout))
    return layer.self_attn.dropout_p > 0 or any(module.p > 0 for module in dropouts)


def _for_rows(x: Tensor, num_rows: int) -> Tensor:
    """(rows, ...) with each row repeated for what is of it: (num_rows, ...)."""
    if len(x) == 1:
        return x.expand(num_rows, *x.shape[1:])
    return x if len(x) == num_rows else x.repeat_interleave(num_rows // len(x), dim=0)


def _attend(
    attention: Sam2VideoRoPEAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Tensor,
    key_rotation: Tensor,
) -> Tensor:
    """Attention of (objects or videos, tokens, channels) to (objects, keys, channels), rotated by where they are."""
    query = _for_rows(_rotate(_heads(attention, attention.q_proj(query)), rotation), len(key))
    key = _rotate(_heads(attention, attention.k_proj(key)), key_rotation)
    late = _values_to_be_finished(attention, query, value)
    if late is not None:
        features, finish = late
        return attention.o_proj(
            finish(_mean_of_narrow(query, key, features.unsqueeze(1), attention.scaling).squeeze(1))
        )
    value = _heads(attention, attention.v_proj(value))
    implementation = attention.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = attention.dropout_p if attention.training else 0.0
    attended, _ = attend(
        attention, query, key, value, attention_mask=None, dropout=dropout, scaling=attention.scaling, is_causal=False
    )
    return attention.o_proj(attended.flatten(-2))


def _heads(attention: Sam2VideoRoPEAttention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.num_attention_heads, attention.head_dim)).transpose(1, 2)


def _values_to_be_finished(attention: Sam2VideoRoPEAttention, query: Tensor, value: Tensor) -> LinearOfTokens | None:
    """Values as memories hold them, with few channels, which their projection makes wide; where that is faster.

    The projection is linear in what it makes of each memory, so it may as well follow the mean. A GPU's kernels are for
    values as wide as keys.
    """
    projection = attention.v_proj
    if (
        attention.num_attention_heads > 1
        or query.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or attention.config._attn_implementation != "sdpa"
        or value.shape[-1] >= attention.head_dim
        or type(projection) not in (nn.Linear, ExpertLinear, DomainLinear)
        or projection._forward_hooks
        or projection._forward_pre_hooks
    ):
        return None
    if type(projection) is nn.Linear:
        return LinearOfTokens(value, projection)
    late = projection.linear_of_tokens(value)
    return late if late.features.shape[-1] <= attention.head_dim else None


def _mean_of_narrow(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention (objects, 1, tokens, channels) to values of fewer channels than the keys have."""
    num_tokens, num_keys = query.shape[-2], key.shape[-2]
    if num_tokens * num_keys < LARGE_ATTENTION:
        padded = F.pad(value, (0, key.shape[-1] - value.shape[-1]))  # PyTorch's kernel has one width for both
        return F.scaled_dot_product_attention(query, key, padded, scale=scaling)[..., : value.shape[-1]]
    outputs = torch.empty(*query.shape[:-1], value.shape[-1], dtype=value.dtype)
    for row in range(len(query)):
        for start in range(0, num_tokens, QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            outputs[row, 0, part] = _online_softmax_mean(query[row, 0, part] * scaling, key[row, 0], value[row, 0])
    return outputs


def _online_softmax_mean(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T) value, without ever holding the weights of all keys (arXiv:1805.02867)."""
    largest = query.new_full((len(query), 1), -torch.inf)
    total, mean = torch.zeros_like(largest), query.new_zeros(len(query), value.shape[-1])
    for keys, values in zip(key.split(KEYS_AT_ONCE), value.split(KEYS_AT_ONCE), strict=True):
        weights = query @ keys.mT
        before, largest = largest, torch.maximum(largest, weights.amax(dim=1, keepdim=True))
        weights.sub_(largest).exp_()
        kept = (before - largest).exp_()
        total = total * kept + weights.sum(dim=1, keepdim=True)
        mean = torch.addmm(mean * kept, weights, values)
    return mean / total


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
