"""Say how good models are on a dataset: a table, results.json, report.md with pictures, and masks.

    python scripts/evaluate.py MODEL --dataset davis --root DAVIS --split val --output outputs/davis
    python scripts/evaluate.py MODEL --dataset npz --root CT --prompt point:5 --seeds 10 --output outputs/ct
    python scripts/evaluate.py --model A --model B --dataset davis --root DAVIS --prompt clicks:3@8 --output outputs/a_b
    python scripts/evaluate.py --predictions MASKS --dataset davis --root DAVIS --output outputs/masks
    accelerate launch --num_processes 8 scripts/evaluate.py MODEL --dataset sa_v_val --root SA-V --output outputs/sa_v

A prompt is given on the first annotated frame that shows an object: its `mask`, a `box`, a `point` drawn from the mask or
several (`point:N`), or N clicks, each in the middle of the largest error so far (`clicks:N`). `clicks:N@M` goes on
clicking, online, where the IoU falls below 0.75, on up to M frames of each object; `clicks:N@M:offline` does so in M
passes, on the frames of the lowest IoU.

Each video's result is kept when it is finished: the same command again goes on with what is left.
"""

import argparse
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

import samoe_hf
from samoe_hf import SamoeModel
from samoe_hf.data import Video
from samoe_hf.data.predictions import Layout, MaskFiles, layout_of
from samoe_hf.data.registry import add_dataset_arguments, videos_from_arguments
from samoe_hf.evaluation import (
    SURFACE_TOLERANCE,
    EvaluationRun,
    VideoResult,
    evaluate_masks,
    evaluate_video,
    model_fingerprint,
    run_videos,
    write_text,
)
from samoe_hf.inference import load_processor
from samoe_hf.interaction import EvaluationPrompt
from samoe_hf.metrics import Protocol
from samoe_hf.report_pictures import draw_object
from samoe_hf.reporting import comparison_table, summary_table, write_report
from samoe_hf.results import (
    BOOTSTRAP_SAMPLES,
    choose_highlights,
    compare_models,
    protocol_of,
    seen_and_unseen,
    summarize_model,
    to_json,
)

FIRST_SEED, SEED_STEP = 42, 1000  # those of the original's evaluation


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a SamoeModel, a SAM 2 video model or an original .pt")
    parser.add_argument("--model", action="append", default=[], dest="models", metavar="MODEL", help="one more")
    parser.add_argument(
        "--predictions", action="append", default=[], type=Path, metavar="DIR", help="score these masks as well"
    )
    add_dataset_arguments(parser)
    parser.add_argument("--prompt", default="mask", help="mask, box, point[:N] or clicks:N[@M[:offline]]")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of drawn points: 42, 1042, … for N runs")
    parser.add_argument("--protocol", choices=get_args(Protocol), help="which frames count; by default the dataset's")
    parser.add_argument("--layout", choices=get_args(Layout), help="of the masks; by default the dataset's")
    parser.add_argument("--surface-tolerance", type=float, default=SURFACE_TOLERANCE, metavar="MM", help="for volumes")
    parser.add_argument(
        "--seen-unseen",
        nargs=2,
        type=Path,
        metavar=("META", "TRAIN_META"),
        help="YouTube-VOS' meta.json of the split and of training",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of another evaluation there")
    parser.add_argument("--device", help="such as cuda or cpu; by default the best there is")
    parsed = parser.parse_args(arguments)
    parsed.models = [*([parsed.model] if parsed.model else []), *parsed.models]
    if not parsed.models and not parsed.predictions:
        parser.error("at least one MODEL or --predictions is needed")
    return parsed


def choose_seeds(prompt: EvaluationPrompt, count: int) -> list[int | None]:
    """The seeds of the runs; [None] for a prompt that draws nothing."""
    if count < 1:
        raise ValueError(f"`--seeds` must be at least 1, got {count}.")
    return [FIRST_SEED + SEED_STEP * i for i in range(count)] if prompt.is_random else [None]


def label_sources(sources: Sequence[str | Path]) -> list[str]:
    """A short name for each model, all different."""
    labels: list[str] = []
    for source in sources:
        path = Path(source)
        stem = path.stem if path.suffix in (".pt", ".pth") else path.resolve().name if path.exists() else path.name
        name = re.sub(r"[^\w.+-]", "_", stem) or "model"
        count = sum(label == name or re.fullmatch(re.escape(name) + r"_\d+", label) is not None for label in labels)
        labels.append(f"{name}_{count + 1}" if count else name)
    return labels


def describe_dataset(arguments: argparse.Namespace) -> dict[str, Any]:
    root = None if arguments.root is None else str(arguments.root.resolve() if arguments.root.exists() else arguments.root)
    return {
        "kind": arguments.dataset,
        "root": root,
        "split": arguments.split,
        "domain": arguments.domain,
        "option": arguments.option,
    }


def describe_model(model: SamoeModel) -> dict[str, Any]:
    config = model.config
    return {
        "source": model.base_model_source["name_or_path"],
        "revision": model.base_model_source["revision"],
        "commit": getattr(config, "_commit_hash", None),
        "fingerprint": model_fingerprint(model),
        "num_parameters": model.num_parameters(),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "lora_rank": config.lora_rank,
        "image_size": config.image_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


class Evaluation:
    """What all models of one command have in common."""

    def __init__(self, arguments: argparse.Namespace, videos: Sequence[Video], state: PartialState):
        self.arguments, self.videos, self.state = arguments, videos, state
        self.prompt = EvaluationPrompt.parse(arguments.prompt)
        self.layout = arguments.layout or layout_of(arguments.dataset)
        self.protocol = arguments.protocol or protocol_of(arguments.dataset)
        self.tolerance = arguments.surface_tolerance

    def start(self, label: str, identity: dict[str, Any], overwrite: bool) -> EvaluationRun:
        common = {
            "dataset": describe_dataset(self.arguments),
            "layout": self.layout,
            "surface_tolerance": self.tolerance,
        }
        run = EvaluationRun(self.arguments.output / "runs" / label, identity | common)
        if self.state.is_main_process:
            run.start(overwrite)
        self.state.wait_for_everyone()
        return run

    def evaluate(
        self,
        run: EvaluationRun,
        label: str,
        seeds: Sequence[int | None],
        evaluate: Callable[[int | None], Callable[[Video, int], VideoResult]],
    ) -> None:
        """Evaluates this process' share of the videos, and waits for the others."""
        own = self.videos[self.state.process_index :: self.state.num_processes]
        total = sum(len(video) for seed in seeds for video in run.left(own, seed))
        done = sum(len(own) - len(run.left(own, seed)) for seed in seeds)
        if done and self.state.is_main_process:
            print(f"{label}: {done} of {len(own) * len(seeds)} results are there already")
        with tqdm(total=total, desc=label, unit="frame", disable=not self.state.is_local_main_process) as progress:
            for seed in seeds:
                run_videos(run, own, evaluate(seed), seed, progress)
        self.state.wait_for_everyone()

    def model(self, source: str, label: str, seeds: Sequence[int | None]) -> tuple[dict, EvaluationRun]:
        model = SamoeModel.from_pretrained(source).to(self.state.device)
        processor = load_processor(source, model)
        about = describe_model(model)
        identity = {
            "model": about,
            "config": model.config.to_diff_dict(),
            "processor": json.loads(processor.video_processor.to_json_string()),
            "prompt": str(self.prompt),
        }
        run = self.start(label, identity, self.arguments.overwrite)

        def evaluate(seed: int | None) -> Callable[[Video, int], VideoResult]:
            def of_video(video: Video, drawn: int) -> VideoResult:
                files = run.masks(video, seed, self.layout)
                return evaluate_video(
                    model, processor, video, self.prompt, drawn, files.overlapping, self.tolerance, files.write
                )

            return of_video

        self.evaluate(run, label, seeds, evaluate)
        return about, run

    def predictions(self, folder: Path, label: str) -> tuple[dict, EvaluationRun]:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of predictions")
        about = {"source": str(folder.resolve())}
        run = self.start(label, {"predictions": about["source"]}, True)  # files may have changed: score them anew

        def of_video(video: Video, _: int) -> VideoResult:
            return evaluate_masks(video, self.given_files(folder, video), self.tolerance)

        self.evaluate(run, label, [None], lambda seed: of_video)
        return about, run

    def given_files(self, folder: Path, video: Video) -> MaskFiles:
        """Predictions of several domains are in a folder for each."""
        return MaskFiles(folder / video.domain if (folder / video.domain).is_dir() else folder, self.layout)

    def draw(self, label: str, highlights: list[dict], results: list[VideoResult], files_of: Callable, all_frames: bool):
        """Adds its picture and video to each highlight."""
        for entry in highlights:
            video = next(v for v in self.videos if (v.domain, v.video_id) == (entry["domain"], entry["video"]))
            result = next(r for r in results if (r.domain, r.video_id) == (entry["domain"], entry["video"]))
            object_id, files = entry["object_id"], files_of(video)
            j = result.scores.j[:, result.scores.object_ids.index(object_id)]
            place = entry["rank"].replace("_", " ")
            title = f"{label}, {place}: {video.video_id}, object {object_id}, J&F {entry['J&F_mean']:.3f}"
            path = Path("pictures") / label / entry["rank"]
            draw_object(
                video,
                object_id,
                lambda frame, files=files, video=video, i=object_id: files.read(video, frame, [i])[0],
                range(len(video)) if all_frames else video.annotated_frames,
                j.tolist(),
                title,
                self.arguments.output / path,
            )
            entry |= {"picture": f"{path.as_posix()}.png", "video_file": f"{path.as_posix()}.mp4"}


def evaluate(arguments: argparse.Namespace) -> None:
    state = PartialState(cpu=arguments.device == "cpu")
    if arguments.device is not None:
        state.device = torch.device(arguments.device)
    videos = videos_from_arguments(arguments)
    keys = [(video.domain, video.video_id) for video in videos]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"Two videos are called {'/'.join(twice)}; give their datasets different domains.")
    evaluation = Evaluation(arguments, videos, state)
    seeds = choose_seeds(evaluation.prompt, arguments.seeds) if arguments.models else [None]
    if arguments.seeds > 1 and seeds == [None] and state.is_main_process:
        print(f"The prompt {evaluation.prompt} draws nothing at random: one run instead of {arguments.seeds}.")
    groups = None
    if arguments.seen_unseen:
        groups = seen_and_unseen(*(json.loads(path.read_text()) for path in arguments.seen_unseen))

    labels = label_sources([*arguments.models, *arguments.predictions])
    finished = [evaluation.model(source, label, seeds) for source, label in zip(arguments.models, labels, strict=False)]
    rest = labels[len(arguments.models) :]
    finished += [
        evaluation.predictions(folder, label) for folder, label in zip(arguments.predictions, rest, strict=True)
    ]
    if not state.is_main_process:
        return

    models = []
    for number, (label, (about, run)) in enumerate(zip(labels, finished, strict=True)):
        is_model = number < len(arguments.models)
        runs = {seed: run.load(videos, seed) for seed in (seeds if is_model else [None])}
        figures = summarize_model(runs, evaluation.protocol, groups)
        first = next(iter(runs))
        # Masks of the first run are shown, so they are chosen by its figures.
        highlights = choose_highlights(summarize_model({first: runs[first]}, evaluation.protocol)["objects"])
        if is_model:
            files_of = partial(run.masks, seed=first, layout=evaluation.layout)
        else:
            files_of = partial(evaluation.given_files, Path(about["source"]))
        evaluation.draw(label, highlights, runs[first], files_of, is_model)
        models.append({"label": label, **about, **figures, "highlights": highlights})

    results = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "samoe_hf": samoe_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else str(state.device),
        "num_processes": state.num_processes,
        "dataset": describe_dataset(arguments) | {"num_videos": len(videos)},
        "prompt": str(evaluation.prompt) if arguments.models else None,
        "seeds": None if seeds == [None] else seeds,
        "protocol": evaluation.protocol,
        "layout": evaluation.layout,
        "surface_tolerance": evaluation.tolerance if any(video.spacing for video in videos) else None,
        "bootstrap_samples": BOOTSTRAP_SAMPLES,
        "models": models,
        "comparisons": [compare_models(model, models[0]) for model in models[1:]],
    }
    text = to_json(results)
    write_text(arguments.output / "results.json", text)
    results = json.loads(text)
    report = write_report(results, arguments.output)
    print(f"\n{summary_table(results)}")
    for comparison in results["comparisons"]:
        print(f"\n{comparison['model']} less {comparison['baseline']}\n{comparison_table(comparison)}")
    for model in results["models"]:
        if not math.isnan(model["speed"]["fps"] or math.nan):
            print(f"{model['label']}: {model['speed']['fps']:.1f} frames per second")
    print(f"Written: {arguments.output / 'results.json'}, {report}, masks in {arguments.output / 'runs'}")


if __name__ == "__main__":
    try:
        evaluate(parse_arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
