"""Corrected videos become a folder of data, and `samoe adapt` learns from it in a process of its own."""

import json
import os
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from transformers.trainer import TRAINER_STATE_NAME

from samoe_hf.continual.adapt import RESULTS_FILE, SMALL_MODEL_EXPERTS
from samoe_hf.data.configs import shipped_configs
from samoe_hf.data.images import write_palette_png
from samoe_hf.data.registry import read_yaml
from samoe_hf.errors import InputError
from samoe_hf.model.configuration_samoe import check_domain_name
from samoe_hf.training.checkpoints import list_checkpoints
from samoe_hf.whole_files import new_folder, write_text

from .models import LoadedModel, free_name
from .session import TrackingSession
from .uploads import hide_paths

State = Literal["new", "running", "stopped", "failed", "done"]
MAX_COLLECTED_FRAMES, LEAST_FRAMES = 300, 2
# Small frames are kept as they are, since little is lost in them; larger ones as JPEGs.
LOSSLESS_PIXELS, QUALITY = 512 * 512, 95
MAX_STEPS = 20_000
POINTS = 12  # of the curve
SMALL_IMAGE_SIZE = 256
# What a small model learns a domain with within minutes on a CPU; others as `adapt.yaml` says.
SMALL_MODEL = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, **SMALL_MODEL_EXPERTS}
# Beginnings of keys that a known domain has already.
OF_NEW_EXPERTS = ("expert_modules", "exclude_modules", "num_experts", "lora_")


def collect_video(session: TrackingSession, data: Path) -> Path:
    """Adds a session's video with its masks to a folder that `load_videos` reads; nothing that is there is changed.

    Frames without masks are left out; of very many, the first 300 are taken. Gives the new folder of the video, named
    after it, with a number if there is one. Fewer than two frames with masks, and masks without objects, are an
    InputError.
    """
    with session.exclusive():
        frames = sorted(session.masks.frames)[:MAX_COLLECTED_FRAMES]
        if len(frames) < LEAST_FRAMES:
            raise InputError("Track the video first: only what was tracked, and corrected, can be learned from.")
        if not any(session.id_map(frame).any() for frame in frames):
            raise InputError("The masks of this video are all empty: there is nothing to learn from them.")
        target = data / free_name(session.video.name, lambda name: (data / name).exists())
        suffix = "png" if np.prod(session.video.frames.size) <= LOSSLESS_PIXELS else "jpg"
        with new_folder(target) as folder:
            (folder / "frames").mkdir()
            (folder / "masks").mkdir()
            for frame in frames:
                image = Image.fromarray(np.ascontiguousarray(session.frame(frame)))
                image.save(folder / "frames" / f"{frame:05d}.{suffix}", quality=QUALITY)
                write_palette_png(folder / "masks" / f"{frame:05d}.png", session.id_map(frame))
    return target


def collected(data: Path) -> list[Path]:
    """The folders of the videos of a data set, none if it is not there; hidden ones are still being written."""
    return sorted(path.parent for path in data.glob("[!.]*/masks") if (path.parent / "frames").is_dir())


class Learning:
    """A run of `samoe adapt` on the folder of videos `data`; InputError if it has none.

    The domain is a new one, or one of the model, whose training goes on. `learned` is the new model, once it is loaded.
    """

    def __init__(self, loaded: LoadedModel, domain: str, steps: int, data: Path, output: Path):
        if not collected(data):
            raise InputError("No video was collected yet: correct one, and add it to the data set.")
        self.loaded, self.domain, self.steps, self.data, self.output = loaded, domain, steps, data, output
        self.learned: LoadedModel | None = None
        self._process: subprocess.Popen | None = None
        self._was_stopped, self._starts = False, threading.Lock()

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(f"{self.output.name}{ending}")

    @property
    def state(self) -> State:
        """Where the run stands; "done" once the model is there as a whole."""
        if self._process is None:
            return "new"
        code = self._process.poll()
        if code is None:
            return "running"
        if code == 0:
            return "done"
        return "stopped" if self._was_stopped else "failed"

    def start(self) -> None:
        """Starts the run, or resumes it from its last checkpoint; InputError if it runs, or is done."""
        with self._starts:
            if self.state in ("running", "done"):
                raise InputError("Learning runs already." if self.state == "running" else "Learning is done already.")
            again = []
            if self.output.exists():
                resumes = bool(list_checkpoints(self.output))
                again = ["--resume_from_checkpoint", "last"] if resumes else ["--overwrite_output_dir", "true"]
            self._was_stopped = False
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._beside(".yaml"), yaml.safe_dump(self.run(), sort_keys=False))
            given = ["--domain", self.domain, "--dataset", str(self._beside(".yaml")), "--output", str(self.output)]
            with self._beside(".log").open("w", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "samoe_hf", "adapt", self.loaded.source, *given, *again],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONIOENCODING": "utf-8"},
                )

    def stop(self) -> None:
        """Ends the process, if it runs; it can be resumed."""
        with self._starts:
            if self._process is None or self.state != "running":
                return
            self._was_stopped = True
            self._process.terminate()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def run(self) -> dict[str, Any]:
        """The run that the other process trains, as its YAML says."""
        every = max(1, self.steps // POINTS)
        settings = {
            **read_yaml(shipped_configs()["adapt"]),
            "train_data": [str(self.data)],
            "eval_data": [str(self.data)],
            "max_steps": self.steps,
            "warmup_steps": max(1, self.steps // 10),
            "num_frames": min(4, *(len(list((video / "frames").iterdir())) for video in collected(self.data))),
            "logging_steps": max(1, every // 2),
            "eval_strategy": "steps",
            "eval_steps": every,
            "save_strategy": "steps",
            "save_steps": every,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "disable_tqdm": True,
            **self.loaded.original,
        }
        del settings["model_name_or_path"], settings["output_dir"]
        image_size = settings["image_size"] = self.loaded.model.config.image_size  # that of the page
        if isinstance(image_size, int) and image_size <= SMALL_IMAGE_SIZE:
            is_new = self.domain not in self.loaded.domains
            settings |= {name: v for name, v in SMALL_MODEL.items() if is_new or not name.startswith(OF_NEW_EXPERTS)}
        return settings

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """What was logged until the last checkpoint: (step, value) of "loss", and of "J&F" from 0 to 1."""
        for checkpoint in list_checkpoints(self.output) if self.output.is_dir() else []:
            try:
                history = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
            except (OSError, ValueError):  # it is being written; the one before is whole
                continue
            keys = {"loss": "loss", "J&F": "eval_J&F"}
            return {name: [(log["step"], log[key]) for log in history if key in log] for name, key in keys.items()}
        return {"loss": [], "J&F": []}

    def scores(self) -> tuple[float, float] | None:
        """J&F of the collected videos before and after, from 0 to 1, once it is done."""
        if self.state != "done":
            return None
        results = json.loads((self.output / RESULTS_FILE).read_text(encoding="utf-8"))
        return results["before"]["eval_J&F"], results["after"]["eval_J&F"]

    @property
    def known_before(self) -> int:
        """By how many videos the gate of `loaded` knows the domain."""
        gate = self.loaded.model.domain_gate
        known = {} if gate is None else dict(zip(gate.domains, gate.counts.tolist(), strict=True))
        return known.get(self.domain, 0)

    @property
    def has_won(self) -> bool:
        """Whether what was learned tracks the collected videos better than the model did before."""
        scores = self.scores()
        return scores is not None and scores[1] > scores[0]

    def problem(self) -> str:
        """The last line of what a failed run has printed."""
        printed = self._beside(".log").read_text(errors="replace", encoding="utf-8").strip()
        text = printed.rpartition("\n")[2] or "the process ended without a word"
        return hide_paths(hide_paths(text, self.data.parent), self.output.parent)


def draw_curves(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """[`Learning.curves`] over the steps, side by side."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    loss, score = figure.subplots(1, 2)
    for axes, (name, points), color in zip((loss, score), curves.items(), ("#D55E00", "#0072B2"), strict=True):
        axes.plot([step for step, _ in points], [value for _, value in points], "o-", markersize=3, color=color)
        axes.set(xlabel="step", title=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    score.set_ylim(0, 1.03)
    return figure


class Learner:
    """Who learns in an app, one run at a time: from the folder of videos `data`, into the folder `models`."""

    def __init__(self, data: Path, models: Path):
        self.data, self.models = data, models
        self.current: Learning | None = None
        self.owner: str | None = None
        self._lock = threading.Lock()

    def start(self, owner: str, loaded: LoadedModel, domain: str, steps: int) -> Learning:
        """Starts a new run for a person; InputError if one runs, or `domain` cannot be a domain's name."""
        with self._lock:
            if self.current is not None and self.current.state == "running":
                raise InputError("The app learns already, one thing at a time. Wait until it is done, or stop it.")
            check_domain_name(domain)
            # What a run has left beside its folder, such as where it failed, is not the next one's either.
            taken = {path.name.partition(".")[0] for path in self.models.glob(f"{domain}-*")}
            name = next(name for n in count(1) if (name := f"{domain}-{n}") not in taken)
            learning = Learning(loaded, domain, steps, self.data, self.models / name)
            learning.start()
            self.current, self.owner = learning, owner
            return learning

    def resume(self, owner: str) -> None:
        """Goes on with the run that a person has started; InputError if there is none, or something runs."""
        with self._lock:
            self.of(owner).start()

    def of(self, owner: str) -> Learning:
        """The run that a person has started; InputError if there is none."""
        if self.current is None or self.owner != owner:
            raise InputError("You have not started to learn.")
        return self.current
