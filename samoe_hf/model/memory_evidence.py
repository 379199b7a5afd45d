"""How well each object was seen on a frame, for memories that are chosen by it; see `memory_selection.py`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .memory_bank import Evidence
from .memory_selection import MIN_IOU

# How many steps of a search are begun before the device is asked whether they were enough; more change nothing.
STEPS_PER_WAIT = {"cpu": 1}


def judge(
    masks: Tensor, candidates: Tensor, iou_scores: Tensor, object_score_logits: Tensor, find_doubles: bool
) -> list[Evidence]:
    """Judges what a frame gave for a batch of objects.

    Args:
        masks: the chosen masks' logits (objects, 1, h, w).
        candidates: those of all masks that the decoder gave (objects, M, h, w).
        iou_scores: their estimated IoU (objects, M).
        object_score_logits: (objects, 1), positive where the object is seen.
        find_doubles: whether to look for what else was nearly taken for the object, where its mask is good.
    """
    best = iou_scores.float().amax(dim=1)
    logits = object_score_logits[:, 0].float()
    scores = torch.where(logits > 0, logits.sigmoid() * 2 - 1, 0) * best
    areas = (masks[:, 0] > 0).sum(dim=(1, 2))
    box_ious = torch.ones_like(best)
    is_sure = best > MIN_IOU
    if find_doubles and candidates.shape[1] > 1 and is_sure.any():
        box_ious[is_sure] = _box_ious(masks[is_sure] > 0, candidates[is_sure] > 0)
    rows = torch.stack([scores, best, areas.float(), box_ious], dim=1).tolist()
    return [Evidence(score, iou, int(area), box_iou) for score, iou, area, box_iou in rows]


def _box_ious(masks: Tensor, candidates: Tensor) -> Tensor:
    """IoU of the box of each mask (objects, 1, h, w) with the largest box of itself and one other candidate's largest
    region outside of it (objects, M, h, w): (objects,)."""
    others = _largest_regions(candidates & ~masks)
    own, joined = _box_areas(masks), _box_areas(masks | others)
    return (own / joined.clamp(min=1)).amin(dim=1)


def _box_areas(masks: Tensor) -> Tensor:
    """Pixels of the boxes around masks (objects, M, h, w): (objects, M)."""
    sides = []
    for dim in (-1, -2):
        is_used = masks.any(dim=dim)
        places = torch.arange(is_used.shape[-1], device=masks.device)
        last = torch.where(is_used, places, -1).amax(dim=-1)
        first = torch.where(is_used, places, is_used.shape[-1]).amin(dim=-1)
        sides.append((last - first + 1).clamp(min=0))
    return (sides[0] * sides[1]).float()


def _largest_regions(masks: Tensor) -> Tensor:
    """The largest region (8-connected) of each mask (objects, M, h, w)."""
    height, width = masks.shape[-2:]
    index = torch.arange(1, height * width + 1, device=masks.device, dtype=torch.float32).view(height, width)
    labels, before = index * masks, None
    while before is None or not torch.equal(labels, before):  # until the largest index has spread over each region
        before = labels
        for _ in range(STEPS_PER_WAIT.get(masks.device.type, 32)):
            labels = F.max_pool2d(labels, 3, stride=1, padding=1) * masks
    flat = labels.long().flatten(2)
    areas = torch.zeros(*flat.shape[:2], height * width + 1, device=masks.device)
    areas.scatter_add_(2, flat, torch.ones_like(flat, dtype=areas.dtype))
    areas[..., 0] = 0
    return (flat == areas.argmax(dim=2, keepdim=True)).view_as(masks) & masks
