"""What a run can set of its prompts and its loss. Imports no PyTorch, so that a help text is there at once."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from .errors import InputError


@dataclass(frozen=True)
class PromptSettings:
    """How a clip's prompts are drawn; the defaults are those of SAM 2's training.

    Args:
        point_probability: of points (or boxes) instead of masks. Clips of one frame always get points.
        box_probability: of a box instead of a point, on each initial frame.
        max_initial_frames: 1 to this many initial conditioning frames, the first frame among them. Of clips of several
            frames one is left over, since memory is read on others alone (in SAM 2's own training, clips of two frames
            may have both prompted).
        max_corrected_frames: with points, up to this many frames receive correction clicks (the initial ones first);
            they become conditioning frames. 0 turns corrections off.
        num_correction_clicks: clicks on each such frame, one after the other.
        click_from_mask_probability: of drawing a click from the true mask instead of from the error.
        prompt_absent_objects: whether objects are prompted on frames that do not show them, as in SAM 2's own training,
            by an empty mask, a click on the background or a box in the corner. By default the frames are chosen among
            those that show all objects of the clips; an object that the first frame does not show is prompted on the
            first that does.
    """

    _argument_group_name: ClassVar[str] = "prompts"  # of `HfArgumentParser`

    point_probability: float = 0.5
    box_probability: float = 0.5
    max_initial_frames: int = 2
    max_corrected_frames: int = 2
    num_correction_clicks: int = 7
    click_from_mask_probability: float = 0.1
    prompt_absent_objects: bool = False

    def __post_init__(self) -> None:
        for name in ("point_probability", "box_probability", "click_from_mask_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"`{name}` must be from 0 to 1, got {getattr(self, name)}.")
        for name, least in (("max_initial_frames", 1), ("max_corrected_frames", 0), ("num_correction_clicks", 0)):
            if getattr(self, name) < least:
                raise InputError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True)
class LossSettings:
    """How the four parts of the loss are weighted; the defaults are those of SAM 2's training.

    Args:
        focal_weight, dice_weight, iou_weight, object_score_weight: weights of the four parts in the total.
        focal_alpha, focal_gamma: of the focal loss (arXiv:1708.02002).
    """

    _argument_group_name: ClassVar[str] = "loss"  # of `HfArgumentParser`

    focal_weight: float = 20.0
    dice_weight: float = 1.0
    iou_weight: float = 1.0
    object_score_weight: float = 1.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"`{field.name}` must be a number from 0 on, got {value}.")
