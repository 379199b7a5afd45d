"""Simulated prompts, as SAM 2 draws them in training (arXiv:2408.00714, appendix D; `training/model/sam2.py`)."""

import torch
from torch import Tensor

from .frame_step import Prompt

PROMPT_KINDS = ("mask", "point", "box", "mixed")
POSITIVE, NEGATIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 1, 0, 2, 3


def sample_prompt(masks: Tensor, kind: str) -> Prompt:
    """Draws one prompt of the same kind for each object from its true mask, with torch's global generator.

    Args:
        masks: (objects, S, S) bool.
        kind: "mask"; "point", one click uniformly from the mask; "box", its bounding box with noise; or "mixed": a
            mask with p = 0.5, else a box or a click with p = 0.5 each.
    """
    if kind not in PROMPT_KINDS:
        raise ValueError(f"`prompts` must be one of {', '.join(map(repr, PROMPT_KINDS))}, got {kind!r}.")
    if kind == "mixed":
        first, second = torch.rand(2).tolist()
        kind = "mask" if first < 0.5 else "box" if second < 0.5 else "point"
    if kind == "mask":
        return Prompt(mask=masks.unsqueeze(1))
    points, labels = sample_box(masks) if kind == "box" else sample_point_from_errors(masks)
    return Prompt(points=points, labels=labels)


def sample_point_from_errors(masks: Tensor, predictions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draws a click for each object, uniformly from where its prediction is wrong.

    Without predictions all of the mask is missed. Where nothing is wrong the click is a negative one on the background.

    Args:
        masks: (objects, H, W) bool, true masks.
        predictions: (objects, H, W) bool.

    Returns:
        points (objects, 1, 2) as (x, y), and labels (objects, 1): 1 on missed pixels, 0 elsewhere.
    """
    predictions = torch.zeros_like(masks) if predictions is None else predictions
    wrong = masks ^ predictions
    candidates = torch.where(wrong.flatten(1).any(dim=1)[:, None, None], wrong, ~masks)
    draw = torch.rand(masks.shape, device=masks.device) * candidates
    chosen = draw.flatten(1).argmax(dim=1)
    points = torch.stack([chosen % masks.shape[-1], chosen // masks.shape[-1]], dim=-1).float()
    labels = (masks & ~predictions).flatten(1).gather(1, chosen.unsqueeze(1)).to(torch.int32)
    return points.unsqueeze(1), labels


def sample_box(masks: Tensor, noise: float = 0.1, noise_bound: float = 20.0) -> tuple[Tensor, Tensor]:
    """The bounding box of each mask, each side shifted by up to `noise` of its size and `noise_bound` pixels.

    Args:
        masks: (objects, H, W) bool.

    Returns:
        corners (objects, 2, 2) as (x, y), and their labels (objects, 2).
    """
    height, width = masks.shape[-2:]
    boxes = bounding_boxes(masks)
    size = boxes[:, 2:] - boxes[:, :2]
    limit = (size * noise).clamp(max=noise_bound).repeat(1, 2)
    boxes = boxes + (2 * torch.rand(boxes.shape, device=masks.device) - 1) * limit
    bounds = torch.tensor([width - 1, height - 1] * 2, device=masks.device)
    corners = boxes.clamp(min=0).minimum(bounds).unflatten(1, (2, 2))
    labels = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], dtype=torch.int32, device=masks.device)
    return corners, labels.expand(len(masks), 2)


def bounding_boxes(masks: Tensor) -> Tensor:
    """Bounding boxes (objects, 4) as (x0, y0, x1, y1) of masks (objects, H, W) bool; zeros for an empty mask."""
    boxes = []
    for along in (masks.any(dim=1), masks.any(dim=2)):
        length = along.shape[1]
        first = along.int().argmax(dim=1)
        last = length - 1 - along.flip(1).int().argmax(dim=1)
        empty = ~along.any(dim=1)
        boxes.append((first.masked_fill(empty, 0), last.masked_fill(empty, 0)))
    (x0, x1), (y0, y1) = boxes
    return torch.stack([x0, y0, x1, y1], dim=1).float()
