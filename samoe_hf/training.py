"""Training runs: their arguments, from YAML and the command line, and what `transformers.Trainer` needs for them."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset
from transformers import HfArgumentParser, TrainingArguments

from .configuration_samoe import SamoeConfig
from .data import ClipCollator, ClipDataset, MixedDataset, load_videos
from .data.schema import Video
from .modeling_samoe import SamoeModel


@dataclass
class ModelArguments:
    """Which model is trained, and what of it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder, Hub id or original checkpoint, as SamoeModel.from_pretrained takes it."},
    )
    model_config: str | None = field(
        default=None, metadata={"help": "YAML of a SamoeConfig, to start from random weights instead."}
    )
    experts: str | None = field(default=None, metadata={"help": "Experts of an original checkpoint."})
    original_config: str | None = field(default=None, metadata={"help": "YAML of an original checkpoint."})
    trainable: list[str] = field(
        default_factory=lambda: ["experts"], metadata={"help": "Among experts, memory, decoder, all."}
    )

    def load(self) -> SamoeModel:
        """The model in training mode, with what is to be trained trainable."""
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise ValueError("Exactly one of `model_name_or_path` and `model_config` must be given.")
        if self.model_config is not None:
            model = SamoeModel(SamoeConfig(**read_yaml(self.model_config)))
        else:
            model = SamoeModel.from_pretrained(
                self.model_name_or_path, experts=self.experts, original_config=self.original_config
            )
        model.set_trainable(*self.trainable)
        return model.train()


@dataclass
class DataArguments:
    """The videos, and how clips are drawn from them."""

    train_data: list[dict] = field(
        default_factory=list, metadata={"help": "Datasets, each with the arguments of `load_videos`."}
    )
    eval_data: list[dict] = field(default_factory=list, metadata={"help": "As train_data; tracked after training."})
    num_frames: int = field(default=8, metadata={"help": "Frames of a clip."})
    max_objects: int = field(default=3, metadata={"help": "Objects of a clip."})
    reverse_probability: float = field(default=0.5, metadata={"help": "Share of clips that run backward."})
    clips_per_video: int = field(default=1, metadata={"help": "Clips drawn of each video in an epoch."})
    prompts: str = field(default="mixed", metadata={"help": "On the first frame: mask, point, box or mixed."})

    def train_dataset(self, image_size: int, seed: int) -> Dataset:
        """All training clips, resized to `image_size`."""
        if not self.train_data:
            raise ValueError("`train_data` must name at least one dataset.")
        clips = {}
        for source in self.train_data:
            videos = load_videos(**source)
            clips[videos[0].domain] = ClipDataset(
                videos,
                seed=seed,
                clips_per_video=self.clips_per_video,
                num_frames=self.num_frames,
                max_objects=self.max_objects,
                image_size=image_size,
                reverse_probability=self.reverse_probability,
            )
        return MixedDataset(clips, seed=seed)

    def eval_videos(self) -> list[Video]:
        return [video for source in self.eval_data for video in load_videos(**source)]


@dataclass(frozen=True)
class PromptedCollator:
    """Collates clips and tells the model which prompts to simulate for them."""

    prompts: str
    collate: ClipCollator = field(default_factory=ClipCollator)

    def __call__(self, clips: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor | str]:
        return {**self.collate(clips), "prompts": self.prompts}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file as data.

    Raises:
        ValueError: if it is no YAML or holds no mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}.")
    return content


def parse_run(arguments: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parses `CONFIG [--key value]...`: a YAML of a run, and values that take the place of its.

    Raises:
        ValueError: for a key in the YAML that is not known, naming the nearest that is.
    """
    config, *overrides = sys.argv[1:] if arguments is None else arguments
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    parser = HfArgumentParser(kinds)
    run = read_yaml(config)
    known = [f.name for kind in kinds for f in fields(kind) if f.init]
    for key in run:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{config} has an unknown key {key!r}.{hint}")
    parser.set_defaults(**run)
    return parser.parse_args_into_dataclasses(args=overrides)
