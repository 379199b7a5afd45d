"""Evaluations of models on a set of videos that can be stopped, go on, and be shared by several processes."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

from samoe_hf import __version__
from samoe_hf.data.fingerprints import video_fingerprint
from samoe_hf.data.layouts import MaskFormat
from samoe_hf.data.predictions import MaskFiles
from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError, input_errors
from samoe_hf.inference import load_tracker
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.model.weights_io import hash_tensors
from samoe_hf.plots.evaluation import draw_object
from samoe_hf.together import Together, Work, choose_videos_at_once

from .evaluate import SURFACE_TOLERANCE, VideoResult, check_annotated, evaluate_masks, evaluation_steps, video_key
from .metrics import Protocol
from .run_folder import RunFolder
from .simulated_user import FIRST_SEED, PromptStrategy
from .statistics import BOOTSTRAP_SAMPLES, choose_highlights, combine_runs, compare_models, to_json

Pairs = Sequence[tuple[Video, int | None]]  # with a seed
LoadedRun = tuple[SamoeModel, VideoProcessor, "EvaluationRun"]

SEED_STEP = 1000  # with the first one, as in the original's evaluation


class EvaluationRun(RunFolder):
    """A folder of results, one file per video, written as they are finished; a stopped run goes on with what is left.

    `scores/<domain>/<video>.npz` holds a [`VideoResult`], `masks/<domain>/` its masks as [`MaskFiles`]. Where prompts
    depend on a seed, both are in `seed_<seed>/`. `predictions` are masks of something else, in place of those of the
    folder: of all videos, or in a folder for each domain.
    """

    kind = "an evaluation"
    parts = ("scores", "seed_*/scores", "masks", "seed_*/masks")

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], layout: MaskFormat = "davis", predictions: Path | None = None
    ):
        super().__init__(folder, identity)
        self.layout: MaskFormat = layout
        self.predictions = predictions

    def scores_path(self, video: Video, seed: int | None) -> Path:
        """The file of a video's result; ValueError for an id that leads out of the folder."""
        return self.inside(self._seed_folder(seed) / "scores", f"{video.domain}/{video.video_id}.npz")

    def begin(self, video: Video, seed: int | None) -> Callable[[VideoResult], Video]:
        """Removes a video's result; what this returns writes a new one, and returns the video."""
        path, made_from = self.scores_path(video, seed), video_fingerprint(video)
        path.unlink(missing_ok=True)

        def save(result: VideoResult) -> Video:
            replace(result, made_from=made_from).save(path)
            return video

        return save

    def masks(self, video: Video, seed: int | None) -> MaskFiles:
        """The files of a video's masks."""
        if self.predictions is not None:
            of_domain = self.predictions / video.domain
            return MaskFiles(of_domain if of_domain.is_dir() else self.predictions, self.layout)
        return MaskFiles(self.inside(self._seed_folder(seed) / "masks", video.domain), self.layout)

    def _seed_folder(self, seed: int | None) -> Path:
        return self.folder if seed is None else self.folder / f"seed_{seed}"

    def is_finished(self, video: Video, seed: int | None) -> bool:
        """Whether there are all masks of a video, and a result that was computed from its frames and masks of now."""
        path, files = self.scores_path(video, seed), self.masks(video, seed)
        if not path.is_file() or VideoResult.load(path).made_from != video_fingerprint(video):
            return False
        return all(path.is_file() for t in range(len(video)) for path in files.paths(video, t, video.object_ids))

    def load(self, videos: Iterable[Video], seed: int | None) -> list[VideoResult]:
        """The results of all videos, in their order.

        Raises:
            ValueError: if a file is damaged, or holds the result of another video, as where a file system does not tell
                upper from lower case.
        """
        results = []
        for video in videos:
            path = self.scores_path(video, seed)
            result = VideoResult.load(path)
            if (result.domain, result.video_id) != (video.domain, video.video_id):
                raise InputError(f"{path} holds the result of {result.key}, not of {video_key(video)}.")
            results.append(result)
        return results


def choose_seeds(prompt: PromptStrategy, count: int) -> list[int | None]:
    """The seeds of `count` runs: 42, 1042, … as in the original; [None], one run, for a prompt that draws nothing.

    Raises:
        ValueError: if `count` is below 1.
    """
    if count < 1:
        raise InputError(f"`seeds` must be at least 1, got {count}.")
    return [FIRST_SEED + SEED_STEP * i for i in range(count)] if prompt.is_random else [None]


def identity_of(model: SamoeModel, processor: VideoProcessor, source: str) -> dict[str, Any]:
    """All that what a model says of a video depends on beside the video, as JSON holds it; see [`describe_model`]."""
    adapters: Any = getattr(model, "peft_config", {})
    return {
        "model": describe_model(model, source),
        "config": model.config.to_diff_dict(),
        "processor": json.loads(processor.video_processor.to_json_string()),
        "adapters": {name: json.loads(json.dumps(one.to_dict(), default=sorted)) for name, one in adapters.items()},
    }


def describe_model(model: SamoeModel, source: str) -> dict[str, Any]:
    """What identifies a model that was loaded from `source`, a hash of its tensors among it, and its size.

    A model of which `source` holds only what was trained has the base that it was loaded with as `base_model`.
    """
    config, loaded = model.config, model.origin.source
    assert loaded is not None, "the model was not loaded"
    source = os.path.abspath(source) if os.path.exists(source) else source
    has_base = loaded["name_or_path"] != source
    return {
        "source": source,
        "revision": None if has_base else loaded["revision"],
        "commit": model.origin.commit,
        **({"base_model": {name: loaded[name] for name in ("name_or_path", "revision")}} if has_base else {}),
        "fingerprint": hash_tensors(sorted(model.state_dict().items()))[:16],
        "num_parameters": model.num_parameters(),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "lora_rank": config.lora_rank,
        **({} if config.domains is None else {"domains": config.domain_names}),
        "image_size": config.image_size,
        "memory_selection": model.memory_selection,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class Evaluation:
    """Models and masks of other methods on the same videos, under the same conditions.

    Each gets a folder `runs/<label>/`, an [`EvaluationRun`], in the output. Processes started by `accelerate launch` or
    `torchrun` share the videos; all must see the output folder.

    Args:
        videos: told apart by domain and id, each with an annotated frame.
        dataset: where they come from, as JSON holds it.
        output: folder of the results.
        prompt: what objects are prompted with.
        seeds: see [`choose_seeds`].
        protocol: which frames count, see `counted_frames`.
        layout: of the masks, see [`MaskFiles`].
        surface_tolerance: in mm, for volumes.
        groups: group of every (video id, object id), see `summarize`.

    Raises:
        ValueError: if there are no videos, two have the same domain and id, one has no annotated frame, an object has
            no group, or the tolerance is no length.
    """

    videos: Sequence[Video]
    dataset: Mapping[str, Any]
    output: Path
    prompt: PromptStrategy
    seeds: Sequence[int | None] = (None,)
    protocol: Protocol = "davis"
    layout: MaskFormat = "davis"
    surface_tolerance: float = SURFACE_TOLERANCE
    groups: Mapping[tuple[str, int], str] | None = None

    def __post_init__(self) -> None:
        if not len(self.videos):
            raise InputError("The dataset has no videos to evaluate.")
        if not 0 <= self.surface_tolerance < math.inf:
            raise InputError(f"`surface_tolerance` must be a length in mm, got {self.surface_tolerance}.")
        keys = set()
        for video in self.videos:
            check_annotated(video)
            if video_key(video) in keys:
                raise InputError(f"Two videos are called {video_key(video)}; give their datasets different domains.")
            keys.add(video_key(video))
            objects = [(video.video_id, object_id) for object_id in video.object_ids]
            if self.groups and (missing := [one for one in objects if one not in self.groups]):
                raise InputError(f"`groups` has none for the objects {missing} of {video_key(video)}.")

    def load_model(
        self, source: str, label: str, state: PartialState, overwrite: bool = False, **options: Any
    ) -> LoadedRun:
        """Loads a model, its processor and the folder of its results, and raises what is wrong with them.

        Args:
            source: what `SamoeModel.from_pretrained` takes.
            label: a short name.
            state: the processes, and this one's device.
            overwrite: see [`EvaluationRun.start`].
            options: further arguments of [`~samoe_hf.inference.load_tracker`].
        """
        assert state.device is not None
        with input_errors(source):
            model, processor = load_tracker(source, state.device, **options)
        identity: dict[str, Any] = identity_of(model, processor, source) | {"prompt": str(self.prompt)}
        run = self._folder(label, identity)
        run.check(overwrite)
        return model, processor, run

    def run_model(
        self, loaded: LoadedRun, state: PartialState, overwrite: bool = False, videos_at_once: int | None = 1
    ) -> dict[str, Any] | None:
        """Tracks the videos that have no result yet.

        Args:
            loaded: see [`load_model`](Evaluation.load_model), and there also for `state` and `overwrite`.
            videos_at_once: so many are tracked in one batch, see [`~samoe_hf.together.choose_videos_at_once`].

        Returns:
            The model's entry in the results; None in processes other than the main one.
        """
        model, processor, run = loaded
        together = Together(model, choose_videos_at_once(model, videos_at_once))

        def work(video: Video, seed: int | None) -> Work[Video]:
            save, files = run.begin(video, seed), run.masks(video, seed)
            for earlier in files.files(video.video_id):  # of frames of other names
                earlier.unlink()
            scored = yield from evaluation_steps(
                together,
                processor,
                video,
                self.prompt,
                FIRST_SEED if seed is None else seed,
                files.overlapping,
                self.surface_tolerance,
                files.write,
            )
            return together.writer()(lambda: save(scored.result()))

        def evaluate(unfinished: Pairs) -> Iterator[Video]:
            with together:
                yield from together.run(work(*pair) for pair in unfinished)

        return self._run(run, run.identity["model"], self.seeds, evaluate, state, overwrite)

    def run_masks(
        self, folder: Path, label: str, state: PartialState, overwrite: bool = False
    ) -> dict[str, Any] | None:
        """Scores masks that were written before, always anew; see [`run_model`](Evaluation.run_model).

        Args:
            folder: masks in this layout; those of several domains in a folder for each.
            label, state: see [`load_model`](Evaluation.load_model).
            overwrite: whether results of a model under this label give way.

        Raises:
            InputError: if the folder is missing, or where the results are to be written, or those are of a model.
            FileNotFoundError: if predictions are missing; names them.
        """
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder of predictions")
        source = folder.resolve()
        if source.is_relative_to((self.output / "runs" / label).resolve()):
            raise InputError(f"{folder}: these predictions would be overwritten; choose another `--output`.")

        run = self._folder(label, {"predictions": str(source)}, folder)
        earlier = run.folder / "run.json"
        if earlier.is_file() and '"predictions":' not in earlier.read_text(encoding="utf-8"):
            run.check(overwrite)

        def evaluate(unfinished: Pairs) -> Iterator[Video]:
            for video, seed in unfinished:
                save = run.begin(video, seed)
                yield save(evaluate_masks(video, run.masks(video, seed), self.surface_tolerance))

        return self._run(run, {"source": str(source)}, [None], evaluate, state, overwrite=True)

    def predicted(self, label: str) -> list[Video]:
        """The videos with the masks of a model's run, of the first seed."""
        run, seed = self._folder(label, {}), self.seeds[0]
        return [replace(video, annotations=run.masks(video, seed).annotations(video)) for video in self.videos]

    def results(self, models: Sequence[Mapping[str, Any]], state: PartialState) -> dict[str, Any]:
        """What `results.json` holds of these entries; all but the first are compared with the first.

        Raises:
            ValueError: if two have the same label.
        """
        labels = [model["label"] for model in models]
        if len(set(labels)) < len(labels):
            raise InputError(f"Labels of models must differ, got {', '.join(labels)}.")
        device = torch.device(str(state.device))
        results = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "samoe_hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "num_processes": state.num_processes,
            "dataset": {**self.dataset, "num_videos": len(self.videos)},
            "prompt": str(self.prompt) if any("fingerprint" in model for model in models) else None,
            "seeds": None if list(self.seeds) == [None] else list(self.seeds),
            "protocol": self.protocol,
            "layout": self.layout,
            "surface_tolerance": self.surface_tolerance if any(video.spacing for video in self.videos) else None,
            "bootstrap_samples": BOOTSTRAP_SAMPLES,
            "models": models,
            "comparisons": [compare_models(model, models[0]) for model in models[1:]],
        }
        return json.loads(to_json(results))

    def _folder(self, label: str, identity: dict[str, Any], predictions: Path | None = None) -> EvaluationRun:
        common = {"dataset": self.dataset, "layout": self.layout, "surface_tolerance": self.surface_tolerance}
        return EvaluationRun(self.output / "runs" / label, identity | common, self.layout, predictions)

    def _run(
        self,
        run: EvaluationRun,
        about: Mapping[str, Any],
        seeds: Sequence[int | None],
        evaluate: Callable[[Pairs], Iterator[Video]],
        state: PartialState,
        overwrite: bool,
    ) -> dict[str, Any] | None:
        """Evaluates this process' share of the videos without a result, and waits for the other processes.

        `evaluate` yields each video when its result is written.

        Returns:
            The entry of the finished runs in the results, with pictures of the best and worst objects of the first;
            None in processes other than the main one.
        """
        label = run.folder.name
        with run.writer:
            if state.is_main_process:
                run.start(overwrite)
            state.wait_for_everyone()
            own = [self.videos[i] for i in range(state.process_index, len(self.videos), state.num_processes)]
            pairs = [(video, seed) for seed in seeds for video in own]
            unfinished = [pair for pair in pairs if not run.is_finished(*pair)]
            replaced = sum(run.scores_path(*pair).is_file() for pair in unfinished)
            if len(unfinished) < len(pairs) and state.is_main_process:
                print(f"{label}: {len(pairs) - len(unfinished)} of {len(pairs)} results are there already")
            if replaced and state.is_main_process:
                why = "were of other frames or masks, or have lost theirs; they are replaced."
                print(f"{label}: {replaced} results {why}")
            num_frames = sum(len(video) for video, _ in unfinished)
            is_shown = state.is_local_main_process and num_frames > 0
            with tqdm(total=num_frames, desc=label, unit="frame", disable=not is_shown) as progress:
                for video in evaluate(unfinished):
                    progress.set_postfix_str(video.video_id)
                    progress.update(len(video))
            state.wait_for_everyone()
            if not state.is_main_process:
                return None
            runs = {seed: run.load(self.videos, seed) for seed in seeds}
        first = {result.key: (video, result) for video, result in zip(self.videos, runs[seeds[0]], strict=True)}
        highlights = choose_highlights(combine_runs({None: runs[seeds[0]]}, self.protocol)["objects"])
        for highlight in highlights:
            video, result = first[f"{highlight['domain']}/{highlight['video']}"]
            highlight |= self._draw(run, seeds[0], highlight, video, result)
        figures = combine_runs(runs, self.protocol, self.groups)
        return {"label": label, **about, "expert_domains": about.get("domains"), **figures, "highlights": highlights}

    def _draw(
        self, run: EvaluationRun, seed: int | None, highlight: Mapping[str, Any], video: Video, result: VideoResult
    ) -> dict[str, str]:
        """Draws an object, and returns the paths of the picture and the video."""
        object_id, rank, scores = highlight["object_id"], highlight["rank"], result.scores
        label, files = run.folder.name, run.masks(video, seed)
        name = " ".join(dict.fromkeys((video.domain, video.video_id)))
        title = f"{label}, {rank.replace('_', ' ')}: {name}, object {object_id}, J&F {highlight['J&F_mean']:.3f}"
        path = Path("pictures") / label / rank
        column = scores.object_ids.index(object_id)
        occupied = [t for t, union in zip(result.frames, scores.union[:, column], strict=True) if union]
        draw_object(
            video,
            object_id,
            lambda frame: files.read(video, frame, [object_id])[0],
            range(len(video)) if run.predictions is None else video.annotated_frames,
            scores.j[:, column].tolist(),
            occupied or result.frames,
            title,
            self.output / path,
        )
        return {"picture": f"{path.as_posix()}.png", "video_file": f"{path.as_posix()}.mp4"}
