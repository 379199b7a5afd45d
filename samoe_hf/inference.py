"""From a video and prompts to masks at the video's size, with any processor and session of transformers."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file
from transformers.utils import logging as transformers_logging

from samoe_hf.errors import InputError
from samoe_hf.model.base import base_of, mask_size
from samoe_hf.model.domain_choice import AUTO, check_domain
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import OWN_CLASSES, VideoProcessor, build_processor
from samoe_hf.model.session import end_object
from samoe_hf.model.tracking import SamoeTrackingOutput, Steps, TrackingStep, run_alone
from samoe_hf.model.weights_files import fetch_file
from samoe_hf.tracks import ObjectScores, TrackRow, track_rows
from samoe_hf.video_session import VideoSession

# As loud as transformers is told to be.
logger = transformers_logging.get_logger(f"transformers.{__name__}")

# Any of them means that a processor was saved.
PROCESSOR_FILES = (PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
# How far apart black and white lie at least in normalized frames, and the largest value there.
LEAST_CONTRAST, LARGEST_VALUE = 0.5, 50
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_tracker(
    source: str | os.PathLike,
    device: torch.device | str,
    dtype: str | torch.dtype | None = "auto",
    compiled: bool = False,
    **options: Any,
) -> tuple[SamoeModel, VideoProcessor]:
    """Loads a model that is ready to track, and its processor.

    Args:
        source: what `SamoeModel.from_pretrained` takes, and `options` with it.
        dtype: of the weights, and of what is computed with them: a type of PyTorch or its name, or "auto" for bfloat16
            on a GPU that computes with it, and float32 elsewhere, whatever the type of the file is; None for that.
        compiled: see [`SamoeModel.compile_for_tracking`].

    Raises:
        InputError: for an unknown type, or if nothing can be compiled here.
    """
    device, name = torch.device(device), str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if name == "auto":
        name = "bfloat16" if _has_bfloat16(device) else "float32"
    if dtype is not None:
        options["dtype"] = getattr(torch, name)
    model = SamoeModel.from_pretrained(source, **options).to(device)
    if compiled:
        model.compile_for_tracking()
    return model, load_processor(source, model)


def load_processor(source: str | os.PathLike, model: SamoeModel) -> VideoProcessor:
    """The processor saved with a model; `build_processor`'s for an original checkpoint, or where none was saved.

    Of a model that was loaded for another `image_size`, it prepares frames of that size.

    Args:
        source: the file, folder or Hub id that `model` was loaded from.

    Raises:
        ValueError: if the saved processor is of another kind, or prepares frames of another size than the model takes.
    """
    if Path(source).is_file() or not any(
        cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES
    ):
        if not Path(source).exists():
            try:
                fetch_file(source, PROCESSOR_NAME, {})
            except OSError as error:
                logger.warning(f"{error} Frames are prepared as its base's are, as if it had none.")
        return build_processor(model.config)
    base = base_of(model.config)
    expected = base.processor_class
    loader: Any = expected if base.loads_own_processor else AutoProcessor
    try:
        processor = loader.from_pretrained(source, trust_remote_code=False)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{source}: its processor cannot be read: {error}") from error
    if not isinstance(processor, expected):
        raise InputError(f"{source}: its processor is a {type(processor).__name__}, expected a {expected.__name__}.")
    assert isinstance(processor, VideoProcessor)
    parts = (processor.image_processor, processor.video_processor)
    sizes = [dict(part.size) for part in parts]
    # That of coordinates.
    sizes.append({"height": processor.target_size, "width": processor.target_size})
    side = model.config.image_size
    saved_side = model.origin.image_size or side
    for size in sizes:
        height, width = size.get("height"), size.get("width")
        if (height, width) != (saved_side, saved_side):
            raise InputError(
                f"{source}: its processor makes frames of {height} x {width} pixels, but the model takes "
                f"{saved_side} x {saved_side}."
            )
    for part in parts:
        part.size = type(part.size)(height=side, width=side)
    processor.image_processor.mask_size = {"height": mask_size(model.config), "width": mask_size(model.config)}
    _check_prepared_frames(source, processor, side)
    return OWN_CLASSES[expected](*parts, side, processor.point_pad_value)


def _check_prepared_frames(source: Any, processor: VideoProcessor, side: int) -> None:
    """Prepares a black and a white frame, and refuses a processor that makes of them what no model can use."""
    frames = np.stack([np.zeros((24, 32, 3), np.uint8), np.full((24, 32, 3), 255, np.uint8)])
    try:
        videos = processor.video_processor(videos=frames, return_tensors="pt").pixel_values_videos[0]
        images = processor.image_processor(images=[*frames], return_tensors="pt").pixel_values
        prepared = [torch.as_tensor(videos), torch.as_tensor(images)]
    except Exception as error:  # whatever its settings lead to
        raise InputError(f"{source}: its processor cannot prepare a frame: {error}") from error
    for black, white in prepared:
        is_fit = black.shape == white.shape == (3, side, side) and black.isfinite().all() and white.isfinite().all()
        contrast = (white - black).flatten(1) if is_fit else torch.zeros(1, 1)
        largest = max(black.abs().max(), white.abs().max())
        if not (is_fit and contrast.min() >= LEAST_CONTRAST and largest <= LARGEST_VALUE):
            raise InputError(
                f"{source}: its processor makes of a black and a white frame values from {black.min():g} to "
                f"{white.max():g} of shape {tuple(black.shape)}; expected normalized frames of {(3, side, side)}. "
                "Its `do_resize`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean` and `image_std` say how."
            )


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device is a GPU that computes in bfloat16 itself."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def check_masks(output: SamoeTrackingOutput, dtype: torch.dtype, subject: str = "") -> None:
    """Raises an `InputError` if a model of this type gave NaN, which would look like an empty mask."""
    assert output.pred_masks is not None
    if output.pred_masks.isnan().any():
        raise InputError(
            f"{subject}the model predicts NaN on frame {output.frame_idx}, in {dtype}; its weights may be damaged, or "
            "the type too narrow for them."
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While the context is open, the model is in evaluation mode. Each module's own mode is restored at the end."""
    modes = {module: module.training for module in _present_modules(model)}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.training = training


def _present_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all below it, without those that `modules()` would read from a file."""
    yield module
    for child in module.children():
        yield from _present_modules(child)


@dataclass
class VideoPrompt:
    """What is given of one object on one frame, in pixels of the video: points and a box, a mask, or that it leaves.

    `points` holds (x, y) and `labels` 1 (positive) or 0 (negative) for each; `box` is (x0, y0, x1, y1); `mask` is
    (H, W) bool. With `end` the object is gone from the frame on.
    """

    object_id: int
    frame_idx: int = 0
    points: Sequence[tuple[float, float]] = ()
    labels: Sequence[int] = ()
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None
    end: bool = False

    def inputs(self) -> dict:
        """The prompt as arguments of `processor.add_inputs_to_inference_session`."""
        if self.mask is not None:
            return {"input_masks": self.mask}
        inputs = {}
        if len(self.points):
            inputs["input_points"] = [[[[float(x), float(y)] for x, y in self.points]]]
            inputs["input_labels"] = [[[int(label) for label in self.labels]]]
        if self.box is not None:
            inputs["input_boxes"] = [[[float(value) for value in self.box]]]
        return inputs

    def check(self, num_frames: int, size: tuple[int, int]) -> None:
        """Checks the prompt against a video of `num_frames` frames of `size` (height, width).

        Raises:
            InputError: if the frame is not one of the video's, nothing or too much is given, a point lies outside of
                the frame, a box has no area in it, or the mask has another size.
        """
        subject = f"object {self.object_id} on frame {self.frame_idx}"
        if not 0 <= self.frame_idx < num_frames:
            raise InputError(f"A prompt is of {subject}, but the video has the frames 0 to {num_frames - 1}.")
        if self.end:
            if self.inputs():
                raise InputError(f"A prompt is given of {subject}, where it is said to be gone.")
        elif self.mask is not None:
            if len(self.points) or self.box is not None:
                raise InputError(f"A mask and points or a box are given of {subject}.")
            if self.mask.shape != size:
                raise InputError(f"The mask of {subject} has the size {self.mask.shape}, but the video has {size}.")
        elif not len(self.points) and self.box is None:
            raise InputError(f"Neither points nor a box nor a mask is given of {subject}.")
        if len(self.points) != len(self.labels) or not set(self.labels) <= {0, 1}:
            raise InputError(
                f"Each point of {subject} needs a label, 0 or 1, got {len(self.points)} points and {list(self.labels)}."
            )
        height, width = size
        outside = f"lies outside of the video of {width} x {height} pixels"
        for x, y in self.points:
            if not (0 <= x < width and 0 <= y < height):  # true for NaN
                raise InputError(f"The point ({x}, {y}) of {subject} {outside}.")
        if self.box is not None:
            sides = sorted(self.box[::2]), sorted(self.box[1::2])
            if len(self.box) != 4 or not all(-math.inf < low < high < math.inf for low, high in sides):
                raise InputError(f"The box {self.box} of {subject} must be (x0, y0, x1, y1), finite and with an area.")
            (x0, x1), (y0, y1) = sides
            if x0 >= width or y0 >= height or x1 < 0 or y1 < 0:
                raise InputError(f"The box {self.box} of {subject} {outside}.")

    def add_to(self, session: VideoSession, processor: VideoProcessor, **options: Any) -> None:
        """Adds the prompt to a session; `options` are of the processor, such as `clear_old_inputs`."""
        if self.end:
            end_object(session, self.frame_idx, self.object_id)
            return
        processor.add_inputs_to_inference_session(
            session,  # pyright: ignore[reportArgumentType]  # either base's processor takes any session
            self.frame_idx,
            self.object_id,
            **self.inputs(),
            **options,
        )


def check_prompts(prompts: Sequence[VideoPrompt], num_frames: int, size: tuple[int, int]) -> None:
    """Checks prompts against each other and against a video, see [`VideoPrompt.check`].

    Raises:
        InputError: for no prompts, two prompts for one object on one frame, an end that is not after all other prompts
            of its object, an object with negative points alone, or a prompt that does not fit the video.
    """
    if not prompts:
        raise InputError("`prompts` is empty; at least one point, box or mask is needed.")
    seen = set()
    for prompt in prompts:
        prompt.check(num_frames, size)
        if prompt.end:
            others = [one.frame_idx for one in prompts if one.object_id == prompt.object_id and one is not prompt]
            if prompt.frame_idx <= max(others, default=-1):
                raise InputError(
                    f"The end of object {prompt.object_id} must be after all that is given of it (on the frames "
                    f"{sorted(others)}), got frame {prompt.frame_idx}."
                )
        if (prompt.object_id, prompt.frame_idx) in seen:
            raise InputError(
                f"Object {prompt.object_id} has two prompts on frame {prompt.frame_idx}; give all its points and its "
                "box in one."
            )
        seen.add((prompt.object_id, prompt.frame_idx))
    shown = {one.object_id for one in prompts if 1 in one.labels or one.box is not None or one.mask is not None}
    if hidden := {one.object_id for one in prompts} - shown:
        raise InputError(f"Object {min(hidden)} must have a positive point, a box or a mask, which say where it is.")


def masks_of(logits: np.ndarray, overlapping: bool = False) -> np.ndarray:
    """Masks (objects, H, W) bool of logits (objects, H, W).

    Args:
        overlapping: whether a pixel may belong to several objects, and not only to that of the largest logit.
    """
    masks = logits > 0
    if not overlapping and len(masks) > 1:
        masks &= logits.argmax(axis=0) == np.arange(len(masks))[:, None, None]
    return masks


class TrackedFrame(NamedTuple):
    """Masks of one frame at the video's size: `logits` (objects, H, W), rows in the order of `object_ids`.

    `scores`: how sure the model is of each object. `domain`, `domain_confidence`, `domain_rivals`, `domain_unknown`:
    see [`~samoe_hf.model.tracking.SamoeTrackingOutput`].
    """

    frame_idx: int
    object_ids: list[int]
    logits: Tensor
    scores: ObjectScores
    domain: str | None = None
    domain_confidence: float | None = None
    domain_rivals: dict[str, float] | None = None
    domain_unknown: str | None = None

    def id_map(self) -> np.ndarray:
        """Each pixel's object, that of the largest positive logit, or 0: (H, W), of the smallest type for the ids.

        Raises:
            InputError: if an object's id is below 1, since 0 is the background.
        """
        if min(self.object_ids) < 1:
            raise InputError(f"A map of ids needs ids above 0, which is the background, got {self.object_ids}.")
        best, row = self.logits.max(dim=0)
        rows = torch.where(best > 0, row + 1, 0).cpu().numpy()
        return np.array([0, *self.object_ids], dtype=np.min_scalar_type(max(self.object_ids)))[rows]

    def rows(self, masks: Iterable[np.ndarray], time: float | None, prompts: Iterable[VideoPrompt]) -> list[TrackRow]:
        """The frame's rows of a table of tracks.

        Args:
            masks: (H, W) bool each, in the order of `object_ids`.
            time: in seconds, see [`~samoe_hf.data.frames.FrameSequence.time`].
            prompts: all of the video.
        """
        given = {prompt.object_id for prompt in prompts if prompt.frame_idx == self.frame_idx}
        return track_rows(self.frame_idx, self.object_ids, self.scores, masks, time, given)


def track_video(
    model: SamoeModel,
    processor: VideoProcessor,
    frames: Sequence[np.ndarray],
    prompts: Sequence[VideoPrompt],
    show_progress_bar: bool = False,
    domain: str | None = AUTO,
    memory_selection: str | None = None,
    unknown: str | None = None,
) -> Iterator[TrackedFrame]:
    """Tracks prompted objects through a whole video, each onward from its first prompt, then back from it to the start.

    Each frame is given once, with all objects: those from the last of the first prompts on, and then those before it,
    backward. An object that is gone has logits of -1024. See [`SamoeModel.propagate_from_prompts_iterator`].

    Args:
        frames: as in [`VideoSession`], each read when it is tracked.
        prompts: at least one, and at most one for each object on each frame.
        domain: of a model with domains, whose experts are run; see [`VideoSession`].
        memory_selection: which memories a frame reads; see [`VideoSession`].
        unknown: what a video of no known domain gets; see [`VideoSession`].

    Raises:
        InputError: for no frames, prompts that do not fit the video, see [`check_prompts`], or a domain that the model
            does not have.
    """
    choices = {"domain": domain, "memory_selection": memory_selection, "unknown": unknown}
    return run_alone(model, tracking_steps(model, processor, frames, prompts, show_progress_bar, **choices))


def tracking_steps(
    model: SamoeModel,
    processor: VideoProcessor,
    frames: Sequence[np.ndarray],
    prompts: Sequence[VideoPrompt],
    show_progress_bar: bool = False,
    **choices: Any,
) -> Steps[TrackedFrame]:
    """What [`track_video`] does, in steps that run with those of other videos; see [`SamoeModel.frame_steps`]."""
    check_domain(model, choices.get("domain", AUTO))
    session = VideoSession(frames, processor, **choices, inference_device=model.device, dtype=model.dtype)
    height, width = session.video_height, session.video_width
    assert height is not None and width is not None
    size = (height, width)
    check_prompts(prompts, len(frames), size)
    for prompt in sorted(prompts, key=lambda prompt: prompt.end):
        prompt.add_to(session, processor)
    for output in model.steps_from_prompts(session, show_progress_bar=show_progress_bar):
        if isinstance(output, TrackingStep):
            yield output
            continue
        assert isinstance(output, SamoeTrackingOutput)
        assert output.frame_idx is not None and output.object_ids is not None
        if len(output.object_ids) < session.get_obj_num():
            continue  # it comes again with all objects
        check_masks(output, model.dtype)
        logits = processor.post_process_masks([output.pred_masks], [size], binarize=False)[0][:, 0]
        scores = ObjectScores.of(output)
        experts = output.domain, output.domain_confidence, output.domain_rivals, output.domain_unknown
        yield TrackedFrame(output.frame_idx, output.object_ids, logits, scores, *experts)
