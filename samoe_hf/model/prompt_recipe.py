"""Simulated prompts and correction clicks, as SAM 2 draws them in training.

arXiv:2408.00714, appendix D; `prepare_prompt_inputs` and `_iter_correct_pt_sampling` in `training/model/sam2.py`. All
draws are of torch's global generators: what is common to a batch on the CPU, points on the device of the masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NO_POINT, PADDING, Prompt
from .recipes import PromptSettings


class Corrections(NamedTuple):
    """Clicks to be drawn where a prediction is wrong, each after seeing the one before.

    Attributes:
        masks: (objects, S, S) bool, the true masks.
        num_clicks: clicks for each object.
        from_mask_probability: of drawing a click from the true mask instead of from the error.
        of_absent_objects: whether objects that are not seen get clicks.
    """

    masks: Tensor
    num_clicks: int
    from_mask_probability: float
    of_absent_objects: bool = False

    def draw(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Draws a click for each object, of predictions (objects, S, S) bool: points (objects, 1, 2) and labels
        (objects, 1)."""
        from_mask = _chance(self.from_mask_probability)
        clicks = sample_point_from_errors(self.masks, None if from_mask else predictions)
        return clicks if self.of_absent_objects else _of_seen_objects(self.masks, *clicks)


@dataclass(frozen=True)
class PromptPlan:
    """What is given on which frames of a clip, for all its objects alike.

    `kinds`: initial conditioning frame -> "mask", "point" or "box". `corrected`: frames that receive correction clicks.
    """

    kinds: dict[int, str]
    corrected: tuple[int, ...] = ()


class PromptRecipe(PromptSettings):
    """How a clip's prompts are drawn, by the settings."""

    def draw(self, num_frames: int, shown: Tensor | None = None) -> PromptPlan:
        """Draws the plan of a clip.

        `shown` (objects, num_frames) bool says where each object is seen, so that it is prompted there alone; objects
        that are never seen do not count. None, or with `prompt_absent_objects`, for any frames.
        """
        firsts, candidates = [0], [*range(num_frames)]
        if shown is not None and not self.prompt_absent_objects:
            rows = [row for row in shown.tolist() if any(row)]
            candidates = [t for t in candidates if all(row[t] for row in rows)]
            # Where no frame shows all objects, each is prompted on the first that shows it.
            firsts = candidates[:1] or sorted({row.index(True) for row in rows})[: max(num_frames - 1, 1)]
        single = num_frames == 1
        use_points = _chance(self.point_probability) or (single and self.point_probability > 0)
        num_initial = _uniform_integer(1, min(self.max_initial_frames, max(num_frames - 1, 1)))
        others = [t for t in candidates if t not in firsts]
        initial = sorted([*firsts, *_choose(others, max(num_initial - len(firsts), 0))])
        if not use_points:
            return PromptPlan(dict.fromkeys(initial, "mask"))
        kinds = {t: "box" if _chance(self.box_probability) else "point" for t in initial}
        if self.max_corrected_frames == 0:
            return PromptPlan(kinds)
        num_corrected = num_initial
        if self.max_corrected_frames > num_initial and not single:
            num_corrected = _uniform_integer(num_initial, min(self.max_corrected_frames, num_frames))
        others = [t for t in candidates if t not in initial]
        return PromptPlan(kinds, (*initial, *_choose(others, num_corrected - num_initial)))

    def corrections(self, masks: Tensor) -> Corrections:
        """The clicks that a corrected frame receives, given the objects' true masks (objects, S, S) bool on it."""
        settings = self.num_correction_clicks, self.click_from_mask_probability, self.prompt_absent_objects
        return Corrections(masks, *settings)

    def prompt(self, masks: Tensor, kind: str) -> Prompt:
        """The prompt of that kind that an initial frame receives, given the same."""
        return sample_prompt(masks, kind, self.prompt_absent_objects)


# Prompts on the first frame alone, without corrections; and the whole recipe.
PROMPT_RECIPES = {
    "mask": PromptRecipe(point_probability=0, max_initial_frames=1, max_corrected_frames=0),
    "point": PromptRecipe(point_probability=1, box_probability=0, max_initial_frames=1, max_corrected_frames=0),
    "box": PromptRecipe(point_probability=1, box_probability=1, max_initial_frames=1, max_corrected_frames=0),
    "mixed": PromptRecipe(max_initial_frames=1, max_corrected_frames=0),
    "sam2": PromptRecipe(),
}


def resolve_recipe(prompts: "str | PromptRecipe") -> PromptRecipe:
    """The recipe of that name, or the given one.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(prompts, PromptRecipe):
        return prompts
    if prompts not in PROMPT_RECIPES:
        names = ", ".join(map(repr, PROMPT_RECIPES))
        raise InputError(f"`prompts` must be one of {names}, or a PromptRecipe, got {prompts!r}.")
    return PROMPT_RECIPES[prompts]


def sample_prompt(masks: Tensor, kind: str, of_absent_objects: bool = False) -> Prompt:
    """Draws a "mask", "point" or "box" prompt for each object from its true mask (objects, S, S) bool.

    An object that is not seen gets no points, and an empty mask; with `of_absent_objects` a box in the corner, or a
    click on the background.
    """
    if kind == "mask":
        return Prompt(mask=masks.unsqueeze(1))
    drawn = sample_box(masks) if kind == "box" else sample_point_from_errors(masks)
    points, labels = drawn if of_absent_objects else _of_seen_objects(masks, *drawn)
    return Prompt(points=points, labels=labels)


def _of_seen_objects(masks: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The points (objects, P, 2) and labels (objects, P), which stand for nothing where an object is not seen."""
    absent = ~masks.flatten(1).any(dim=1)[:, None]
    return points.masked_fill(absent[..., None], PADDING), labels.masked_fill(absent, NO_POINT)


def sample_point_from_errors(masks: Tensor, predictions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draws a click for each object, uniformly from where its prediction is wrong; masks are (objects, H, W) bool.

    Without predictions all of the mask is missed. Where nothing is wrong the click is a negative one on the background.

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
    """The bounding box of each mask (objects, H, W), each side shifted by up to `noise` of its size and some pixels.

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


def _chance(probability: float) -> bool:
    return torch.rand(()).item() < probability


def _uniform_integer(low: int, high: int) -> int:
    """Drawn from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))


def _choose(values: Sequence[int], count: int) -> list[int]:
    """`count` different ones of `values`, in order."""
    return sorted(values[i] for i in torch.randperm(len(values))[:count].tolist())
