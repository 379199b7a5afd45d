"""SAM 2's training loss: focal, dice, IoU and object score (arXiv:2408.00714, D.2.2; `training/loss_fns.py`)."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .recipes import LossSettings

# Label of padded objects, which Trainer neither counts nor takes for a mask.
PADDING_LABEL = -100
# Focal, dice, IoU and object score, by these names.
LossParts = dict[str, Tensor]


class SegmentationLoss(LossSettings):
    """The loss of a frame's candidates against the true masks.

    Focal and dice are taken of the candidate with the smallest weighted sum of both; the IoU loss is taken of all
    candidates. All three count only where the object is present.
    """

    def __call__(
        self,
        mask_logits: Tensor,
        iou_scores: Tensor,
        object_score_logits: Tensor,
        targets: Tensor,
        object_mask: Tensor | None = None,
    ) -> LossParts:
        """Sums each part over the objects, without weights: `focal`, `dice`, `iou` and `object_score`, scalars.

        Args:
            mask_logits: (objects, M, H, W), the candidates.
            iou_scores: (objects, M), their estimated IoU.
            object_score_logits: (objects, 1).
            targets: (objects, H, W), the true masks; logits of another size are resized to theirs.
            object_mask: (objects,), False for padded objects, which do not count.
        """
        counts = mask_logits.new_ones(len(targets)) if object_mask is None else object_mask.to(mask_logits.dtype)
        targets = targets.to(mask_logits.dtype).unsqueeze(1)
        present = targets.flatten(1).any(dim=1).to(mask_logits.dtype)
        with torch.no_grad():
            # Gradients flow through the chosen candidate alone, so that what they need is kept for that one alone.
            resized = _resize(mask_logits, targets)
            true_iou = mask_iou(resized, targets)
            best = torch.zeros(len(targets), dtype=torch.long, device=targets.device)
            if mask_logits.shape[1] > 1:
                focal, dice = focal_and_dice(resized, targets, self.focal_alpha, self.focal_gamma)
                best = (self.focal_weight * focal + self.dice_weight * dice).argmin(dim=1)
        resized = _resize(mask_logits[torch.arange(len(best), device=best.device), best].unsqueeze(1), targets)
        focal, dice = focal_and_dice(resized, targets, self.focal_alpha, self.focal_gamma)
        iou = (iou_scores - true_iou).abs().mean(dim=1)
        object_score = F.binary_cross_entropy_with_logits(object_score_logits[:, 0], present, reduction="none")
        return {
            "focal": (focal[:, 0] * present * counts).sum(),
            "dice": (dice[:, 0] * present * counts).sum(),
            "iou": (iou * present * counts).sum(),
            "object_score": (object_score * counts).sum(),
        }

    def total(self, parts: LossParts) -> Tensor:
        """The weighted sum of the four parts."""
        return (
            self.focal_weight * parts["focal"]
            + self.dice_weight * parts["dice"]
            + self.iou_weight * parts["iou"]
            + self.object_score_weight * parts["object_score"]
        )


def _resize(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits at the size of the true masks."""
    if logits.shape[-2:] == targets.shape[-2:]:
        return logits
    return F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)


def focal_and_dice(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss (arXiv:1708.02002) averaged over pixels, and soft dice loss smoothed by 1: (objects, M) each.

    Of logits (objects, M, H, W) and targets (objects, 1, H, W), 0 or 1. Both are made of how probable the wrong class
    is, which is computed once.
    """
    wrong_logits = logits * (1 - 2 * targets)
    miss = wrong_logits.sigmoid()
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    focal = (miss**gamma * F.softplus(wrong_logits)).mul_(balance).flatten(-2).mean(dim=-1)
    true = targets.flatten(-2).sum(dim=-1)
    missed = (miss * targets).flatten(-2).sum(dim=-1)  # of the true mask
    predicted = true - 2 * missed + miss.flatten(-2).sum(dim=-1)
    return focal, 1 - (2 * (true - missed) + 1) / (predicted + true + 1)


def mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of the masks `logits > 0` with the true ones: (..., H, W) -> (...); 0 where both are empty."""
    # Sums of bool would be made of integers, eight bytes each.
    predicted, true = ((x > 0).to(logits.dtype).flatten(-2) for x in (logits, targets))
    intersection = (predicted * true).sum(dim=-1)
    union = predicted.sum(dim=-1) + true.sum(dim=-1) - intersection
    return intersection / union.clamp(min=1)


def mean_num_objects(object_mask: Tensor, over_processes: bool = True) -> Tensor:
    """Number of real objects in `object_mask`, at least 1, by which the loss is divided.

    It is averaged `over_processes`, so that their mean gradient is that of all clips in one process.
    """
    count = object_mask.sum().float()
    if over_processes and dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1)


def num_labelled_objects(num_items_in_batch: Tensor | int, labels: Tensor) -> Tensor:
    """Number of objects, at least 1, from Trainer's number of elements of labels (B, N, T, S, S)."""
    count = torch.as_tensor(num_items_in_batch, device=labels.device).float().mean()
    return (count / labels[0, 0].numel()).clamp(min=1)
