"""What a user gives of objects on a frame: points, boxes or masks, checked and put together for a frame step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

POSITIVE, NEGATIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 1, 0, 2, 3
POINT_LABELS = (POSITIVE, NEGATIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)
# The label of points that are there to make up the number of points, and stand for nothing.
NO_POINT = -1
# The label of points that transformers' processor adds where objects of one call have different numbers of points.
PADDING = -10
# Points may lie this far outside of the frame, in parts of its size; of a box, a part must lie inside.
OUTSIDE_LIMIT = 0.1
LARGEST = torch.finfo(torch.float32).max
# `sam2` clamps the logits of the previous mask when clicks refine it.
PREVIOUS_MASK_LIMIT = 32.0


@dataclass
class Prompt:
    """What is given of each object on a frame, in pixels of the model's input: either points or a mask.

    Attributes:
        points: (objects, points, 2) as (x, y).
        labels: (objects, points): 1 positive, 0 negative, 2 and 3 the corners of a box (which come first), -1 padding.
        mask: (objects, 1, S, S), 0 or 1.
        previous_mask: (objects, 1, S / 4, S / 4), logits of the mask that the points refine.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None
    previous_mask: Tensor | None = None

    def rows(self, indices: Tensor) -> "Prompt":
        """The prompts of some of the objects."""
        tensors = (self.points, self.labels, self.mask, self.previous_mask)
        return Prompt(*(None if x is None else x[indices] for x in tensors))


def prompt_from_inputs(
    input_points: Tensor | None,
    input_labels: Tensor | None,
    input_boxes: Tensor | None,
    input_masks: Tensor | None,
    num_videos: int,
    image_size: int,
) -> tuple[Prompt, int]:
    """The prompt of all objects on a clip's first frame, and the number of objects of each video.

    Args:
        input_points: (B, N, P, 2) as (x, y) in pixels of the model's input, with `input_labels` (B, N, P).
        input_boxes: (B, N, 4) as (x0, y0, x1, y1), whichever corners come first.
        input_masks: (B, N, S, S), instead of the others; see [`read_mask`].
        num_videos, image_size: B and S.

    Raises:
        InputError: if none is given, some that do not go together, or values that cannot be a prompt's.
    """
    lead: tuple[int, ...] = (num_videos,)
    shapes = {
        "input_points": (input_points, (..., ..., ..., 2)),
        "input_labels": (input_labels, (..., ..., ...)),
        "input_boxes": (input_boxes, (..., ..., 4)),
        "input_masks": (input_masks, (..., ..., image_size, image_size)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            check_tensor(name, tensor, (*lead, *shape[len(lead) :]))
            lead = lead if len(lead) > 1 else tuple(tensor.shape[:2])  # as many objects in each
    if input_masks is not None:
        if input_points is not None or input_boxes is not None:
            raise InputError("`input_masks` cannot be given together with `input_points` or `input_boxes`.")
        return Prompt(mask=read_mask(input_masks).flatten(0, 1).unsqueeze(1)), input_masks.shape[1]
    if input_points is None and input_boxes is None:
        raise InputError("Without `labels` one of `input_points`, `input_boxes` or `input_masks` must be given.")
    if (input_points is None) != (input_labels is None):
        raise InputError("`input_points` and `input_labels` must be given together.")
    if input_labels is not None and input_points is not None and input_labels.shape != input_points.shape[:-1]:
        raise InputError(
            f"`input_labels` must have a label for each of the {input_points.shape[2]} points of `input_points`, got "
            f"{input_labels.shape[2]}."
        )
    points, labels = [], []
    if input_boxes is not None:
        corners = ordered_corners(input_boxes.unflatten(-1, (2, 2)))
        kinds = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], device=corners.device)
        points.append(corners)
        labels.append(kinds.expand(corners.shape[:-1]))
    if input_points is not None:
        points.append(input_points)
        labels.append(input_labels)
    joined, kinds = torch.cat(points, dim=2).float(), torch.cat(labels, dim=2).to(torch.int32)
    num_objects = joined.shape[1]
    joined, kinds = joined.flatten(0, 1), kinds.flatten(0, 1)
    size = (image_size, image_size)
    for one, labels_of_one in zip(joined, kinds, strict=True):
        is_given = labels_of_one != NO_POINT
        if problem := points_problem(one[is_given], labels_of_one[is_given], image_size, size):
            raise InputError(problem)
    return Prompt(points=joined, labels=kinds), num_objects


def check_tensor(name: str, value: Any, shape: Sequence[Any]) -> None:
    """Raises an `InputError` if a value is no tensor of a shape, in which `...` stands for any length above 0."""
    expected = f"({', '.join('*' if size is ... else str(size) for size in shape)})"
    if not isinstance(value, Tensor):
        raise InputError(f"`{name}` must be a torch.Tensor of shape {expected}, got {type(value).__name__}.")
    is_fit = [size > 0 if wanted is ... else size == wanted for size, wanted in zip(value.shape, shape, strict=False)]
    if value.dim() != len(shape) or not all(is_fit):
        raise InputError(f"`{name}` must be of shape {expected}, got {tuple(value.shape)}.")


def read_mask(mask: Any) -> Tensor:
    """A mask, or several, bool or of 0 and 1 or of 0 and 255, as a bool tensor of the same shape.

    Other values, such as logits, which do not say where the object begins, are an `InputError`.
    """
    tensor = mask if isinstance(mask, Tensor) else torch.from_numpy(np.ascontiguousarray(mask))
    if tensor.dtype == torch.bool:
        return tensor
    is_set = (tensor == 1) if not (tensor == 255).any() else (tensor == 255)
    if not ((tensor == 0) | is_set).all():
        got = "NaN or infinity" if not tensor.isfinite().all() else f"values from {tensor.min():g} to {tensor.max():g}"
        raise InputError(f"`input_masks` must be bool, or of 0 and 1, or of 0 and 255, got {got}.")
    return is_set


def ordered_corners(corners: Tensor) -> Tensor:
    """Corners of boxes (..., 2, 2), the upper left first, whichever way they were drawn."""
    return torch.stack([corners.amin(dim=-2), corners.amax(dim=-2)], dim=-2)


def order_box(prompt: dict[str, Tensor]) -> None:
    """Puts the corners of a session's prompt in order, if it has a box; they come first."""
    points, labels = prompt["point_coords"], prompt["point_labels"]
    if labels.shape[-1] > 1 and labels[0, 0, :2].tolist() == [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]:
        prompt["point_coords"] = torch.cat([ordered_corners(points[..., :2, :]), points[..., 2:, :]], dim=-2)


def fit_mask(mask: Tensor, size: int) -> Tensor:
    """A mask (N, M, H, W) of 0 and 1 at (size, size), as floats: a pixel is of it where half of it is.

    Of one that is too small for that, those stay of which it covers most, since an empty mask says something else.
    """
    if mask.shape[-2:] == (size, size):
        return mask.float()
    share = F.interpolate(mask.float(), (size, size), mode="bilinear", antialias=True)
    return ((share >= share.amax((-2, -1), keepdim=True).clamp(max=0.5)) & (share > 0)).float()


# What a session holds of one object on a frame, as transformers' processor gives it: a mask (1, 1, H, W), or points
# (1, 1, P, 2) and labels (1, 1, P) as "point_coords" and "point_labels".
SessionPrompt = Tensor | dict[str, Tensor]


def points_and_labels(prompt: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Points (1, P, 2) of one object as (x, y), and their labels (1, P), without padding."""
    points, labels = prompt["point_coords"][:, 0], prompt["point_labels"][:, 0]
    is_given = labels[0] != PADDING
    return points[:, is_given], labels[:, is_given]


def num_points(prompt: SessionPrompt) -> int:
    """The number of points of a prompt; 0 for a mask."""
    return 0 if isinstance(prompt, Tensor) else points_and_labels(prompt)[1].shape[1]


def join_prompts(
    prompts: Sequence[SessionPrompt], image_size: int, previous_masks: Sequence[Tensor] | None = None
) -> Prompt:
    """One prompt for a batch of objects, from those that a session holds; all are masks, or all have as many points.

    `previous_masks`: of each object (1, 1, S / 4, S / 4), logits of the mask that its points refine.
    """
    masks = [prompt for prompt in prompts if isinstance(prompt, Tensor)]
    if masks:
        return Prompt(mask=fit_mask(torch.cat(masks), image_size))
    pairs = [points_and_labels(prompt) for prompt in prompts if isinstance(prompt, dict)]
    points, labels = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    previous = None
    if previous_masks is not None:
        previous = torch.cat([mask.to(points.device) for mask in previous_masks])
        previous = previous.clamp(-PREVIOUS_MASK_LIMIT, PREVIOUS_MASK_LIMIT)
    return Prompt(points=points, labels=labels, previous_mask=previous)


def prompt_problem(prompt: Any, image_size: int, video_size: tuple[int, int]) -> str | None:
    """What is wrong with a prompt of one object, in pixels of the video; None if nothing is.

    A mask must be of shape (1, 1, H, W) and hold 0 and 1; for points see [`points_problem`].
    """
    if isinstance(prompt, Tensor):
        if prompt.dim() != 4 or prompt.shape[:2] != (1, 1):
            return f"`input_masks` must hold a mask (H, W) for each object, got shape {tuple(prompt.shape)}."
        try:
            read_mask(prompt)
        except InputError as error:
            return str(error)
        return None
    counts = [prompt[name].shape[2] for name in ("point_coords", "point_labels")]
    if counts[0] != counts[1]:
        return f"`input_labels` must have a label for each of the {counts[0]} points, got {counts[1]}."
    points, labels = (tensor[0] for tensor in points_and_labels(prompt))
    return points_problem(points, labels, image_size, video_size)


def points_problem(points: Tensor, labels: Tensor, image_size: int, video_size: tuple[int, int]) -> str | None:
    """What is wrong with points (P, 2) and their labels (P,); None if nothing is.

    There must be at least one. They must be finite, lie in the frame or near it, and have known labels; a box must have
    an area.

    Args:
        image_size, video_size: as in [`prompt_problem`].
    """
    if len(labels) == 0:
        return "`input_points` must hold at least one point for each object, got none."
    if unknown := [label for label in labels.tolist() if label not in POINT_LABELS]:
        return f"`input_labels` must be 1 (on the object) or 0 (on the background), got {unknown[0]}."
    margin = image_size * OUTSIDE_LIMIT
    lowest, highest = torch.full_like(points, -margin), torch.full_like(points, image_size + margin)
    lowest[labels == BOX_TOP_LEFT], highest[labels == BOX_TOP_LEFT] = -LARGEST, image_size
    lowest[labels == BOX_BOTTOM_RIGHT], highest[labels == BOX_BOTTOM_RIGHT] = 0, LARGEST
    is_inside = (points >= lowest) & (points <= highest)  # false for NaN
    height, width = video_size
    if not is_inside.all():
        x, y = points[~is_inside.all(dim=-1)][0].tolist()
        x, y = x * width / image_size, y * height / image_size
        return (
            f"`input_points` and `input_boxes` must lie in the frame of {width} x {height} pixels, got ({x:g}, {y:g})."
        )
    first, last = points[labels == BOX_TOP_LEFT], points[labels == BOX_BOTTOM_RIGHT]
    if len(first) != len(last):
        return "`input_labels` of a box's corners, 2 and 3, must come together."
    if not (first < last).all():
        x, y = first[0].tolist()
        x, y = x * width / image_size, y * height / image_size
        return f"`input_boxes` must have an area, got an empty box at ({x:g}, {y:g})."
    return None
