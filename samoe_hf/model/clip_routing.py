"""What the routers put out over clips, by clip."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .domain_experts import module_domain


def all_router_logits(calls: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Router logits of all tokens: name of each layer that was run -> (tokens, experts)."""
    return {name: torch.cat([x.flatten(0, -2) for x in logits]) for name, logits in calls.items() if logits}


def router_logits_by_clip(
    calls: Mapping[str, Sequence[Tensor]], object_mask: Tensor, domains: Sequence[str | None]
) -> list[dict[str, Tensor]]:
    """Router logits of the tokens of each clip's real objects.

    Args:
        calls: name of each layer -> router logits (rows, ..., experts) of its calls, see
            [`~experts.record_router_logits`]. Rows are frames of the image encoder, videos or objects; where they are
            none of these, all clips share them.
        object_mask: (B, N) bool.
        domains: of each clip; the experts of a domain run for its clips alone.

    Returns:
        for each clip, name of each layer -> (tokens, experts); nothing for a clip without real objects.
    """
    by_clip: list[dict[str, Tensor]] = [{} for _ in domains]
    for name, logits in calls.items():
        owner = module_domain(name)
        clips = [clip for clip, domain in enumerate(domains) if owner is None or domain == owner]
        if not clips or not logits:
            continue
        # Frames of one clip may be encoded in several calls.
        merged = [torch.cat(list(logits))] if name.startswith("vision_encoder.") else logits
        for position, clip in enumerate(clips):
            if object_mask[clip].any():
                rows = [_rows_of_clip(name, call, position, len(clips), object_mask[clip]) for call in merged]
                by_clip[clip][name] = torch.cat([row.flatten(0, -2) for row in rows])
    return by_clip


def _rows_of_clip(name: str, call: Tensor, clip: int, num_clips: int, is_real: Tensor) -> Tensor:
    """What a call (rows, ...) of a layer holds of a clip's real objects (N,)."""
    shared = name.startswith("temporal_positional_encoding_projection_layer")
    if shared or len(call) % num_clips:
        return call
    own = call.chunk(num_clips)[clip]
    has_object_rows = not name.startswith("vision_encoder.") and len(own) == len(is_real)
    return own[is_real] if has_object_rows else own
