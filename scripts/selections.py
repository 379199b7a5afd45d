"""Which memory selection helps on which videos: each beside "recent", on synthetic videos of hard kinds and your own.

python scripts/selections.py --output outputs/selections
python scripts/selections.py --model facebook/sam2.1-hiera-tiny --dataset DAVIS --output outputs/selections

Each kind is evaluated by `samoe evaluate`, so a run that was stopped goes on. The table, `selections.md`, has the mean
of each selection and how much it has over "recent", with paired 95 % intervals. Pictures show the first video of a kind
on which "recent" and "distractor" differ, or, with late objects, `sam2`'s order and each object's own time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from samoe_hf import SamoeModel, VideoSession, small_base
from samoe_hf.cli import main as samoe
from samoe_hf.data import SYNTHETIC_KINDS, SyntheticVideos, Video
from samoe_hf.evaluation.report import format_table
from samoe_hf.evaluation.simulated_user import prompt_from_mask
from samoe_hf.evaluation.statistics import read_results
from samoe_hf.inference import track_video
from samoe_hf.model.memory_selection import MEMORY_SELECTIONS
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.plots.masks import overlay_masks, plot_sheet

METRICS = {"J&F_mean": "J&F", "J&F_mose": "J&Ḟ", "J&F_reappear": "J&Ḟ_r"}
EASY = "easy"
SHOWN = 6  # frames of a picture


def synthetic(kind: str, num_videos: int, num_frames: int, seed: int) -> dict[str, Any]:
    """The arguments of [`SyntheticVideos`], as a run's YAML has them."""
    kinds = {} if kind == EASY else {"kinds": [kind]}
    return {"num_videos": num_videos, "num_frames": num_frames, "domain": "shapes", "seed": seed, **kinds}


def evaluate(model: str, name: str, data: str, output: Path) -> dict[str, Any]:
    """Evaluates a model with each selection, and returns the results."""
    options = [option for kind in MEMORY_SELECTIONS for option in ("--memory-selection", kind)]
    samoe(["evaluate", model, *options, "--dataset", data, "--output", str(output / name)])
    return read_results(output / name / "results.json")


def said(over: dict[str, float | None]) -> str:
    """A difference, with its interval where there are enough videos for one."""
    interval = "" if over["low"] is None else " ({low:+.3f} to {high:+.3f})".format(**over)
    return f"{over['difference']:+.3f}{interval}"


def rows_of(name: str, results: dict[str, Any]) -> list[list[str]]:
    """A row of the table for each selection."""
    rows = []
    for index, (model, selection) in enumerate(zip(results["models"], MEMORY_SELECTIONS, strict=True)):
        row = [name, selection]
        for metric in METRICS:
            value = model["summary"].get(metric)
            over = results["comparisons"][index - 1]["metrics"].get(metric) if index else None
            row.append("" if value is None else f"{value:.3f}")
            row.append(said(over) if over else "")
        rows.append(row)
    return rows


def masks_of(model: SamoeModel, video: Video, selection: str) -> np.ndarray:
    """Maps of ids (T, H, W) of a video whose objects are prompted where they come."""
    firsts = {}
    for t in range(len(video)):
        for object_id in video.visible(t):
            firsts.setdefault(object_id, t)
    prompts = [prompt_from_mask("mask", i, t, video.masks(t, [i])[0]) for i, t in firsts.items()]
    processor = build_processor(model.config)
    tracked = track_video(model, processor, video.frames, prompts, memory_selection=selection)
    return np.stack([one.id_map() for one in sorted(tracked, key=lambda one: one.frame_idx)])


def masks_in_sam2s_order(model: SamoeModel, video: Video) -> np.ndarray:
    """The same, all objects from the first prompt of any of them on."""
    processor = build_processor(model.config)
    session = VideoSession(video.frames, processor)
    seen = set()
    for t in range(len(video)):
        for object_id in set(video.visible(t)) - seen:
            prompt_from_mask("mask", object_id, t, video.masks(t, [object_id])[0]).add_to(session, processor)
            seen.add(object_id)
    maps = np.zeros((len(video), *video.size), np.uint8)
    for output in model.propagate_in_video_iterator(session, 0):
        logits = processor.post_process_masks([output.pred_masks], [video.size], binarize=False)[0][:, 0]
        best, row = logits.max(dim=0)
        maps[output.frame_idx] = np.where(best > 0, np.array(output.object_ids)[row], 0)
    return maps


def draw(video: Video, maps: dict[str, np.ndarray], path: Path, title: str) -> None:
    """Frames of a video with what each way of tracking found, under the truth."""
    shown = np.linspace(0, len(video) - 1, SHOWN).round().astype(int)
    truth = np.zeros((len(video), *video.size), np.uint8)
    for t in range(len(video)):
        for object_id, mask in zip(video.object_ids, video.masks(t), strict=True):
            truth[t][mask] = object_id
    rows = {"truth": truth, **maps}
    plot_sheet(
        {n: [overlay_masks(video.frames[t], one[t], 192) for t in shown] for n, one in rows.items()}, path, title
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=small_base(), help="by default the small model that comes with the package")
    parser.add_argument("--dataset", action="append", default=[], metavar="FOLDER", help="also these videos")
    parser.add_argument("--videos", type=int, default=7, metavar="N", help="of each kind and seed (%(default)s)")
    parser.add_argument("--frames", type=int, default=32, metavar="N", help="of each video (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102], help="of videos (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/selections"), metavar="DIR", help="(%(default)s)")
    parsed = parser.parse_args(arguments)
    parsed.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in (*SYNTHETIC_KINDS, EASY):
        own = [synthetic(kind, parsed.videos, parsed.frames, seed) for seed in parsed.seeds]
        run = parsed.output / f"{kind}.yaml"
        run.write_text(yaml.safe_dump({"eval_data": [{"kind": "synthetic", **one} for one in own]}), encoding="utf-8")
        rows += rows_of(kind, evaluate(parsed.model, kind, str(run), parsed.output))
    for folder in parsed.dataset:
        rows += rows_of(Path(folder).name, evaluate(parsed.model, Path(folder).name, folder, parsed.output))
    header = ["videos", "selection", *(cell for title in METRICS.values() for cell in (title, "over recent"))]
    (parsed.output / "selections.md").write_text(format_table(header, rows, markdown=True) + "\n", encoding="utf-8")
    model = SamoeModel.from_pretrained(parsed.model).eval()
    for kind in ("double", "occlusion", "return", "late"):
        for video in SyntheticVideos(**synthetic(kind, parsed.videos, parsed.frames, parsed.seeds[0])):
            maps = {"recent": masks_of(model, video, "recent")}
            if kind == "late":
                maps = {"sam2's order": masks_in_sam2s_order(model, video), "in its own time": maps["recent"]}
            else:
                maps["distractor"] = masks_of(model, video, "distractor")
            first, second = maps.values()
            if (first != second).mean() > 0.01:
                draw(video, maps, parsed.output / f"{kind}.jpg", video.video_id)
                break
    print(f"Written: selections.md and pictures in {parsed.output}")


if __name__ == "__main__":
    main()
