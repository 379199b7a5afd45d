"""Small videos for the app, what a person sees of a session, and the same through the package's Python."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from samoe_hf import VideoSession
from samoe_hf.app.models import LoadedModel
from samoe_hf.app.session import TrackingSession
from samoe_hf.data import SyntheticVideos, write_video
from samoe_hf.data.frames import FrameSequence
from samoe_hf.inference import TrackedFrame, VideoPrompt
from samoe_hf.tracks import ObjectScores

SIZE, NUM_FRAMES = (64, 96), 8


def write_small_video(path: Path, num_frames: int = NUM_FRAMES, size: tuple[int, int] = SIZE, seed: int = 3) -> Path:
    """Writes a synthetic video, by default of 8 frames of 96 x 64."""
    video = SyntheticVideos(1, num_frames, size, max_objects=3, seed=seed)[0]
    write_video(path, (np.ascontiguousarray(frame) for frame in video.frames), fps=6)
    return path


def maps_of(session: TrackingSession) -> np.ndarray:
    """The maps of all frames, (T, H, W)."""
    return np.stack([session.id_map(frame) for frame in range(session.num_frames)])


def state_of(session: TrackingSession) -> SimpleNamespace:
    """All that a person sees of a session."""
    seen = {"maps": maps_of(session).tobytes(), "rows": session.all_rows()}
    return SimpleNamespace(objects=session.objects[:], prompts=dict(session.prompts), **seen)


def run_all(steps: Iterable) -> int:
    """Runs to the end; how many steps there were."""
    return sum(1 for _ in steps)


def track_by_hand(
    loaded: LoadedModel, frames: FrameSequence, steps: Iterable[VideoPrompt | tuple[int, bool]]
) -> np.ndarray:
    """Maps of all frames, (T, H, W), through processor and model: prompts, and (start, reverse) to track from."""
    session, maps = VideoSession(frames, loaded.processor, corrections_condition=True), {}

    def keep(output):
        logits = loaded.processor.post_process_masks([output.pred_masks], [frames.size], binarize=False)[0][:, 0]
        maps[output.frame_idx] = TrackedFrame(
            output.frame_idx, output.object_ids, logits, ObjectScores.of(output)
        ).id_map()

    for step in steps:
        if isinstance(step, VideoPrompt):
            loaded.processor.add_inputs_to_inference_session(session, step.frame_idx, step.object_id, **step.inputs())
            keep(loaded.model(inference_session=session, frame_idx=step.frame_idx))
        else:
            for output in loaded.model.propagate_from_prompts_iterator(session, *step):
                keep(output)
    return np.stack([maps[t] for t in range(len(frames))])
