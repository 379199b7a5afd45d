"""Small videos for the app, and what a person sees of a session."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from samoe_hf.app.session import TrackingSession
from samoe_hf.data import SyntheticVideos, write_video

SIZE, NUM_FRAMES = (64, 96), 8


def write_small_video(path: Path, num_frames: int = NUM_FRAMES, size: tuple[int, int] = SIZE, seed: int = 3) -> Path:
    """Writes a synthetic video, by default of 8 frames of 96 x 64."""
    video = SyntheticVideos(1, num_frames, size, max_objects=3, seed=seed)[0]
    write_video(path, (np.ascontiguousarray(frame) for frame in video.frames), fps=6)
    return path


def state_of(session: TrackingSession) -> SimpleNamespace:
    """All that a person sees of a session."""
    maps = [session.id_map(frame) for frame in range(session.num_frames)]
    return SimpleNamespace(objects=list(session.objects), prompts=dict(session.prompts), maps=np.stack(maps))


def run_all(steps: Iterable) -> int:
    """Runs to the end; how many steps there were."""
    return sum(1 for _ in steps)
