"""Evaluations of models on a set of videos that can be stopped, go on, and be shared by several processes."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

from samoe_hf import __version__
from samoe_hf.data.predictions import Layout, MaskFiles
from samoe_hf.data.schema import Video
from samoe_hf.model.files import hash_tensors, write_text
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processor import load_processor
from samoe_hf.plots.evaluation import draw_object

from .evaluate import SURFACE_TOLERANCE, VideoResult, evaluate_masks, evaluate_video
from .metrics import Protocol
from .simulated_user import PromptStrategy
from .statistics import BOOTSTRAP_SAMPLES, choose_highlights, compare_models, summarize_model, to_json

FIRST_SEED, SEED_STEP = 42, 1000  # those of the original's evaluation


class EvaluationRun:
    """A folder of results, one file per video, written as they are finished; a stopped run goes on with what is left.

    `run.json` says what is evaluated, `scores/<domain>/<video>.npz` holds a [`VideoResult`], `masks/<domain>/` its
    masks as [`MaskFiles`]. Where prompts depend on a seed, the last two are in `seed_<seed>/`.

    Args:
        folder: made if it is not there.
        identity: what results depend on, as JSON holds it; a run goes on only with the same.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]):
        self.folder, self.identity = Path(folder), json.loads(json.dumps(identity))

    def start(self, overwrite: bool = False) -> None:
        """Makes the folder, or checks that it holds the same run.

        Args:
            overwrite: whether to take the place of another run.

        Raises:
            ValueError: if it holds another run (names what differs), or something else.
        """
        path = self.folder / "run.json"
        if path.is_file():
            there = json.loads(path.read_text())
            names = sorted({*there, *self.identity})
            differing = [name for name in names if there.get(name) != self.identity.get(name)]
            if differing and not overwrite:
                told = "; ".join(f"`{n}` is {there.get(n)!r}, not {self.identity.get(n)!r}" for n in differing)
                raise ValueError(
                    f"{self.folder} holds the results of another evaluation: {told}. Choose another `--output`, or "
                    "replace them with `--overwrite`."
                )
            if overwrite:
                self._clear()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty, and not the folder of an evaluation.")
        write_text(path, json.dumps(self.identity, indent=2))

    def _clear(self) -> None:
        for folder in (self.folder, *self.folder.glob("seed_*")):
            for name in ("scores", "masks"):
                shutil.rmtree(folder / name, ignore_errors=True)

    def scores_path(self, video: Video, seed: int | None) -> Path:
        """The file of a video's result; ValueError for an id that leads out of the folder."""
        return self._inside(self._of_seed(seed) / "scores", f"{video.domain}/{video.video_id}.npz")

    def masks(self, video: Video, seed: int | None, layout: str) -> MaskFiles:
        """The files of a video's masks."""
        folder = self._inside(self._of_seed(seed) / "masks", video.domain)
        self._inside(folder, video.video_id)
        return MaskFiles(folder, layout)

    def _of_seed(self, seed: int | None) -> Path:
        return self.folder if seed is None else self.folder / f"seed_{seed}"

    @staticmethod
    def _inside(folder: Path, name: str) -> Path:
        path = Path(os.path.normpath(folder / name))
        if not path.is_relative_to(folder) or path == folder:
            raise ValueError(f"the domain and id of a video must name a file within a folder, got {name!r}")
        return path

    def left(self, videos: Sequence[Video], seed: int | None) -> list[Video]:
        """The videos without a result."""
        return [video for video in videos if not self.scores_path(video, seed).is_file()]

    def load(self, videos: Sequence[Video], seed: int | None) -> list[VideoResult]:
        """The results of all videos, in their order."""
        return [VideoResult.load(self.scores_path(video, seed)) for video in videos]


def choose_seeds(prompt: PromptStrategy, count: int) -> list[int | None]:
    """The seeds of `count` runs: 42, 1042, … as in the original; [None], one run, for a prompt that draws nothing.

    Raises:
        ValueError: if `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"`seeds` must be at least 1, got {count}.")
    return [FIRST_SEED + SEED_STEP * i for i in range(count)] if prompt.is_random else [None]


def model_fingerprint(model: torch.nn.Module) -> str:
    """A short hash of all of a model's tensors and of their names."""
    return hash_tensors(sorted(model.state_dict().items()))[:16]


def describe_model(model: SamoeModel) -> dict[str, Any]:
    """What identifies a model that was loaded, and its size."""
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


@dataclass(frozen=True)
class Evaluation:
    """Models and masks of other methods on the same videos, under the same conditions.

    Each gets a folder `runs/<label>/`, an [`EvaluationRun`], in the output. Processes started by `accelerate launch` or
    `torchrun` share the videos; all must see the output folder.

    Args:
        videos: told apart by domain and id.
        dataset: where they come from, as JSON holds it.
        output: folder of the results.
        prompt: what objects are prompted with.
        seeds: see [`choose_seeds`].
        protocol: which frames count, see `counted_frames`.
        layout: of the masks, see [`MaskFiles`].
        surface_tolerance: in mm, for volumes.
        groups: group of every (video id, object id), see `summarize`.

    Raises:
        ValueError: if two videos have the same domain and id.
    """

    videos: Sequence[Video]
    dataset: Mapping[str, Any]
    output: Path
    prompt: PromptStrategy
    seeds: Sequence[int | None] = (None,)
    protocol: Protocol = "davis"
    layout: Layout = "davis"
    surface_tolerance: float = SURFACE_TOLERANCE
    groups: Mapping[tuple[str, int], str] | None = None

    def __post_init__(self) -> None:
        keys = [f"{video.domain}/{video.video_id}" for video in self.videos]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"Two videos are called {twice}; give their datasets different domains.")

    def run_model(self, source: str, label: str, state: PartialState, overwrite: bool = False) -> dict[str, Any] | None:
        """Tracks the videos that have no result yet.

        Args:
            source: what `SamoeModel.from_pretrained` takes.
            label: a short name.
            state: the processes, and this one's device.
            overwrite: see [`EvaluationRun.start`].

        Returns:
            The model's entry in the results; None in processes other than the main one.
        """
        model = SamoeModel.from_pretrained(source).to(state.device)
        processor = load_processor(source, model)
        about = describe_model(model)
        identity = {
            "model": about,
            "config": model.config.to_diff_dict(),
            "processor": json.loads(processor.video_processor.to_json_string()),
            "prompt": str(self.prompt),
        }
        run = self._start(label, identity, state, overwrite)

        def evaluate(video: Video, seed: int | None) -> VideoResult:
            files = run.masks(video, seed, self.layout)
            given = {} if seed is None else {"seed": seed}
            return evaluate_video(
                model,
                processor,
                video,
                self.prompt,
                overlapping=files.overlapping,
                surface_tolerance=self.surface_tolerance,
                write=files.write,
                **given,
            )

        self._run(run, label, self.seeds, evaluate, state)
        if not state.is_main_process:
            return None

        def files_of(video: Video) -> MaskFiles:
            return run.masks(video, self.seeds[0], self.layout)

        return self._summarize(label, about, run, self.seeds, files_of, lambda video: range(len(video)))

    def run_masks(self, folder: Path, label: str, state: PartialState) -> dict[str, Any] | None:
        """Scores masks that were written before, always anew.

        Args:
            folder: masks in this layout; those of several domains in a folder for each.
            label, state: see [`run_model`](Evaluation.run_model), and also for what is returned.

        Raises:
            FileNotFoundError: if the folder or predictions are missing; names them.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of predictions")
        about = {"source": str(folder.resolve())}
        run = self._start(label, {"predictions": about["source"]}, state, overwrite=True)

        def files_of(video: Video) -> MaskFiles:
            return MaskFiles(folder / video.domain if (folder / video.domain).is_dir() else folder, self.layout)

        def evaluate(video: Video, _: int | None) -> VideoResult:
            return evaluate_masks(video, files_of(video), self.surface_tolerance)

        self._run(run, label, [None], evaluate, state)
        if not state.is_main_process:
            return None
        return self._summarize(label, about, run, [None], files_of, lambda video: video.annotated_frames)

    def results(self, models: Sequence[Mapping[str, Any]], state: PartialState) -> dict[str, Any]:
        """What `results.json` holds of these entries; all but the first are compared with the first."""
        is_gpu = state.device.type == "cuda"
        has_model = any("fingerprint" in model for model in models)
        results = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {
                "samoe_hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "device": torch.cuda.get_device_name(state.device) if is_gpu else state.device.type,
            "num_processes": state.num_processes,
            "dataset": {**self.dataset, "num_videos": len(self.videos)},
            "prompt": str(self.prompt) if has_model else None,
            "seeds": None if list(self.seeds) == [None] else list(self.seeds),
            "protocol": self.protocol,
            "layout": self.layout,
            "surface_tolerance": self.surface_tolerance if any(video.spacing for video in self.videos) else None,
            "bootstrap_samples": BOOTSTRAP_SAMPLES,
            "models": models,
            "comparisons": [compare_models(model, models[0]) for model in models[1:]],
        }
        return json.loads(to_json(results))

    def _start(self, label: str, identity: dict[str, Any], state: PartialState, overwrite: bool) -> EvaluationRun:
        common = {"dataset": self.dataset, "layout": self.layout, "surface_tolerance": self.surface_tolerance}
        run = EvaluationRun(self.output / "runs" / label, identity | common)
        if state.is_main_process:
            run.start(overwrite)
        state.wait_for_everyone()
        return run

    def _run(
        self,
        run: EvaluationRun,
        label: str,
        seeds: Sequence[int | None],
        evaluate: Callable[[Video, int | None], VideoResult],
        state: PartialState,
    ) -> None:
        """Evaluates what is left of this process' share of the videos, and waits for the others."""
        own = self.videos[state.process_index :: state.num_processes]
        left = [(video, seed) for seed in seeds for video in run.left(own, seed)]
        done = len(own) * len(seeds) - len(left)
        if done and state.is_main_process:
            print(f"{label}: {done} of {len(own) * len(seeds)} results are there already")
        total = sum(len(video) for video, _ in left)
        with tqdm(total=total, desc=label, unit="frame", disable=not state.is_local_main_process) as progress:
            for video, seed in left:
                progress.set_postfix_str(video.video_id)
                evaluate(video, seed).save(run.scores_path(video, seed))
                progress.update(len(video))
        state.wait_for_everyone()

    def _summarize(
        self,
        label: str,
        about: Mapping[str, Any],
        run: EvaluationRun,
        seeds: Sequence[int | None],
        files_of: Callable[[Video], MaskFiles],
        frames_of: Callable[[Video], Sequence[int]],
    ) -> dict[str, Any]:
        """The figures of finished runs, and pictures of the best and worst objects of the first run."""
        runs = {seed: run.load(self.videos, seed) for seed in seeds}
        first = runs[seeds[0]]
        figures = summarize_model(runs, self.protocol, self.groups)
        highlights = choose_highlights(summarize_model({None: first}, self.protocol)["objects"])
        by_key = {result.key: (video, result) for video, result in zip(self.videos, first, strict=True)}
        for entry in highlights:
            video, result = by_key[f"{entry['domain']}/{entry['video']}"]
            self._draw(label, entry, video, result, files_of(video), frames_of(video))
        return {"label": label, **about, **figures, "highlights": highlights}

    def _draw(
        self,
        label: str,
        entry: dict[str, Any],
        video: Video,
        result: VideoResult,
        files: MaskFiles,
        frames: Sequence[int],
    ) -> None:
        """Draws an object, and adds to its entry where the picture and the video are."""
        object_id = entry["object_id"]
        place = entry["rank"].replace("_", " ")
        title = f"{label}, {place}: {video.video_id}, object {object_id}, J&F {entry['J&F_mean']:.3f}"
        path = Path("pictures") / label / entry["rank"]
        column = result.scores.object_ids.index(object_id)
        j = result.scores.j[:, column].tolist()
        occupied = [t for t, union in zip(result.frames, result.scores.union[:, column], strict=True) if union]

        def read(frame: int) -> np.ndarray:
            return files.read(video, frame, [object_id])[0]

        draw_object(video, object_id, read, frames, j, occupied or result.frames, title, self.output / path)
        entry |= {"picture": f"{path.as_posix()}.png", "video_file": f"{path.as_posix()}.mp4"}
