"""What `run.py` of an exported folder gives, beside what PyTorch gives."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import Sam2VideoInferenceSession

from samoe_hf import SamoeModel, VideoSession
from samoe_hf.data import SyntheticVideos
from samoe_hf.export import run, write
from samoe_hf.export.parts import SIGNATURES
from samoe_hf.inference import VideoPrompt, track_video
from samoe_hf.model.domain_experts import use_domain


def load_run(folder: Path) -> ModuleType:
    """The program that was copied into an exported folder."""
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tracker(folder: Path):
    """The tracker of an exported folder, with one thread."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return load_run(folder).Tracker(folder, sess_options=options)


def drawn_video(num_frames: int, size: tuple[int, int] = (96, 128)) -> tuple[list[np.ndarray], dict[int, np.ndarray]]:
    """Frames, and the masks of the objects on the first one by their ids."""
    video = SyntheticVideos(1, num_frames, size, seed=3)[0]
    ids = video.annotations.object_ids
    masks = dict(zip(ids, np.asarray(video.annotations.masks(0, ids)), strict=True))
    return [np.asarray(frame) for frame in video.frames], {i: mask for i, mask in masks.items() if mask.any()}


class EagerTracker(run.Tracker):
    """The tracker of a model that was not exported: its parts run in PyTorch."""

    def __init__(self, model: SamoeModel, processor, domain: str | None = None):
        self.image, self.rules = write.image_settings(model, processor), write.rules_of(model)
        self.no_mask = np.zeros((1, self.image["mask_side"], self.image["mask_side"]), np.float32)
        self.parts, self.domain = {name: one.part(model) for name, one in SIGNATURES.items()}, domain

    @torch.inference_mode()
    def run(self, part: str, **inputs: np.ndarray) -> list[np.ndarray]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in inputs.items()}
        assert tensors.keys() == SIGNATURES[part].inputs.keys()
        with use_domain(self.domain):
            output = self.parts[part](**tensors)
        return [x.numpy() for x in (output if isinstance(output, tuple) else (output,))]


class Difference(NamedTuple):
    """Of logits on average, and IoU of all masks together."""

    mean: float
    iou: float


def difference(theirs: dict[int, np.ndarray], ours: dict[int, np.ndarray]) -> Difference:
    """Between logits (objects, H, W) of the same frames; masks must not be empty."""
    assert theirs.keys() == ours.keys()
    a, b = (np.stack([logits[t] for t in sorted(logits)]) for logits in (theirs, ours))
    assert (a > 0).any()
    return Difference(float(abs(a - b).mean()), float(((a > 0) & (b > 0)).sum() / ((a > 0) | (b > 0)).sum()))


def as_prompts(prompts: Sequence[dict]) -> list[VideoPrompt]:
    """Prompts of prompts.json as the package has them."""
    names = {"object": "object_id", "frame": "frame_idx"}
    given = ({names.get(key, key): x for key, x in prompt.items() if key != "correction"} for prompt in prompts)
    return [VideoPrompt(**prompt) for prompt in given]


def tracked(model: SamoeModel, processor, frames, prompts: list[dict], **options) -> dict[int, np.ndarray]:
    """Logits of each frame by PyTorch; `options` are of `track_video`."""
    given = track_video(model, processor, frames, as_prompts(prompts), **options)
    return {frame.frame_idx: frame.logits.numpy() for frame in given}


def compare(model: SamoeModel, processor, tracker, frames, prompts: list[dict], **options) -> Difference:
    """Tracks a video with PyTorch and without."""
    ours = {t: logits for t, _, logits in tracker.track(frames, prompts)}
    return difference(tracked(model, processor, frames, prompts, **options), ours)


def tracked_with_corrections(model: SamoeModel, processor, frames, prompts: list[dict]) -> dict[int, np.ndarray]:
    """Logits by PyTorch from the first prompted frame on, which is that of all objects; later prompts are corrections.

    In a session whose corrections condition, each is given when its frame was tracked, and tracking goes on from there.
    """
    session = VideoSession(frames, processor, corrections_condition=True)
    first, *later = sorted({prompt["frame"] for prompt in prompts})
    theirs, start = {}, first
    for t in [first, *later, len(frames)]:
        if t > first:  # up to the frame of the next correction, with it
            for output in model.propagate_from_prompts_iterator(session, start_frame_idx=start):
                theirs[output.frame_idx] = masks_of(processor, output, session)
                if output.frame_idx == t:
                    break
        if t < len(frames):
            for prompt in as_prompts([prompt for prompt in prompts if prompt["frame"] == t]):
                prompt.add_to(session, processor)
            theirs[t] = masks_of(processor, model(session, t), session)
            start = t
    return theirs


def masks_of(processor, output, session: Sam2VideoInferenceSession) -> np.ndarray:
    size = (session.video_height, session.video_width)
    return processor.post_process_masks([output.pred_masks], [size], binarize=False)[0][:, 0].numpy()
