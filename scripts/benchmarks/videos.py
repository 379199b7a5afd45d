"""Videos that `samoe label` or `samoe evaluate` tracks in an hour, one by one and several at once.

    python scripts/benchmarks/videos.py --at-once 1 2 4 8 --repeats 5

Each run labels all videos anew, from files of H.264, or scores them (`--evaluate`). The ways take turns, and the
fastest run of each counts. Masks are compared with those of the first way.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import PartialState

from samoe_hf import small_base
from samoe_hf.data.annotations import MaskArrays, Shapes
from samoe_hf.data.images import read_label_png
from samoe_hf.data.schema import Video
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.data.video_io import read_video, write_video
from samoe_hf.evaluation.evaluate import evaluate_videos
from samoe_hf.evaluation.simulated_user import prompt_from_mask
from samoe_hf.inference import load_tracker
from samoe_hf.labelling import LabelRun, PromptedVideo, label_videos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_base()))
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--objects", type=int, default=1, help="at most, in each video")
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("H", "W"))
    parser.add_argument("--even", action="store_true", help="equally long videos; else half to all of `--frames`")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    model, processor = load_tracker(parsed.model, parsed.device)
    with TemporaryDirectory() as place:
        videos = make_videos(Path(place), parsed)
        seconds, masks = {n: [] for n in parsed.at_once}, {}
        for _ in range(parsed.repeats):
            for at_once in parsed.at_once:
                if parsed.evaluate:
                    run = partial(evaluate_videos, model, processor, videos, False, videos_at_once=at_once)
                    seconds[at_once].append(timed(run))
                    continue
                with TemporaryDirectory() as folder:
                    labels = LabelRun(folder, {}, "davis")
                    labels.start()
                    own, state = [prompted(video) for video in videos], PartialState(cpu=parsed.device == "cpu")
                    run = partial(label_videos, model, processor, own, labels, state, False, at_once)
                    seconds[at_once].append(timed(run))
                    masks[at_once] = read_masks(Path(folder))
    num_frames, first = sum(len(video) for video in videos), parsed.at_once[0]
    print("| at once | videos an hour | frames a second | CPU seconds | times as fast | pixels that differ |")
    print("| --- | --- | --- | --- | --- | --- |")
    for at_once in parsed.at_once:
        (wall, cpu), (wall_first, _) = min(seconds[at_once]), min(seconds[first])
        cpu = min(one for _, one in seconds[at_once])
        figures = f"{len(videos) / wall * 3600:.0f} | {num_frames / wall:.1f} | {cpu:.2f} | {wall_first / wall:.2f}"
        print(f"| {at_once} | {figures} | {differing(masks.get(at_once, {}), masks.get(first, {}))} |")


def make_videos(place: Path, parsed: argparse.Namespace) -> list[Video]:
    """Videos in files, each with the masks of a synthetic one."""
    made = SyntheticVideos(parsed.videos, parsed.frames, tuple(parsed.size), max_objects=parsed.objects, seed=3)
    rng, videos = np.random.default_rng(0), []
    for video in made:
        count = parsed.frames if parsed.even else int(rng.integers(parsed.frames // 2, parsed.frames + 1))
        path = place / f"{video.video_id}.mp4"
        write_video(path, [video.frames[t] for t in range(count)])
        masks = MaskArrays(np.stack([video.masks(t) for t in range(count)]), video.object_ids)
        videos.append(Video(video.video_id, read_video(path), masks, video.domain))
    return videos


def prompted(video: Video) -> PromptedVideo:
    ids = video.visible(0)
    prompts = [prompt_from_mask("box", i, 0, m) for i, m in zip(ids, video.masks(0, ids), strict=True)]
    only = Video(video.video_id, read_video(video.frames.path), Shapes({}, set(ids)), video.domain)
    return PromptedVideo(video.domain, video.video_id, lambda: only, lambda _: prompts, lambda: video.video_id)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU time, in seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): read_label_png(path) for path in sorted(folder.rglob("*.png"))}


def differing(masks: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> str:
    """How many pixels of how many differ."""
    if not masks:
        return ""
    assert masks.keys() == others.keys()
    count = sum(int((mask != others[name]).sum()) for name, mask in masks.items())
    return f"{count} of {sum(mask.size for mask in masks.values())}"


if __name__ == "__main__":
    main()
