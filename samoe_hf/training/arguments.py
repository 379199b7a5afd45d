"""Arguments of a training run, from its YAML and the command line."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from torch.utils.data import Subset
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from samoe_hf.data import ClipDataset, MixedDataset
from samoe_hf.data.clip_datasets import can_be_read
from samoe_hf.data.options import check_types
from samoe_hf.data.registry import dataset_entries, parse_yaml, read_yaml, videos_from_entry
from samoe_hf.data.schema import Video
from samoe_hf.data.transforms import transforms_from_options
from samoe_hf.errors import InputError, did_you_mean
from samoe_hf.model.configuration_samoe import EXPERT_SETTINGS, OLD_EXPERT_SETTINGS, SHARED_SETTINGS, SamoeConfig
from samoe_hf.model.losses import SegmentationLoss
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.model.prompt_recipe import PromptRecipe
from samoe_hf.surgery.domains import add_domain, find_domain, keep_former_experts, saved_with

from .keys import DataKeys, ModelKeys, TrainingKeys

DATASETS = ("train_data", "eval_data")
# Of so many videos some can be spared from training, to choose ranks by.
MANY_VIDEOS, SPARED_FRACTION, MOST_SPARED = 8, 0.2, 8

# Where the model comes from: one of them.
MODEL_KEYS = {"model_name_or_path", "model_config"}
# What SAM2-MoE's and Meta's trainers call keys, where another key is nearer by its letters.
THEIR_KEYS = OLD_EXPERT_SETTINGS | {
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_workers": "dataloader_num_workers", "use_amp": "bf16",
    "batch_size": "per_device_train_batch_size", "train_batch_size": "per_device_train_batch_size",
    "load_balance_weight": "router_aux_loss_coef", "checkpoint": "model_name_or_path", "moe_checkpoint": "experts",
    "num_train_workers": "dataloader_num_workers", "num_correction_pt_per_frame": "num_correction_clicks",
}  # fmt: skip


def check_at_least(arguments: Any, **limits: float) -> None:
    """Raises an `InputError` for a field that is below its limit or no finite number; None is left alone."""
    for name, limit in limits.items():
        value = getattr(arguments, name)
        if value is not None and (isinstance(value, str) or not (math.isfinite(value) and value >= limit)):
            raise InputError(f"`{name}` must be at least {limit}, got {value!r}.")


@dataclass
class ModelArguments(ModelKeys):
    """Which model is trained."""

    def load(self) -> SamoeModel:
        """The model in training mode."""
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise InputError("Exactly one of `model_name_or_path` and `model_config` must be given.")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in SamoeConfig.__dataclass_fields__}
        settings = {name: value for name, value in given.items() if value is not None}
        if self.domain_like is not None and self.domain is None:
            raise InputError("`domain_like` goes with `domain`, the name of the new domain.")
        of_domain = {}
        if self.domain is not None:
            of_domain = {name: settings.pop(name) for name in EXPERT_SETTINGS if name in settings}
        if self.model_config is not None:
            if self.quantization_config is not None:
                raise InputError("`quantization_config` goes with `model_name_or_path`, a base that was trained.")
            image_size = settings.pop("image_size", None)
            config = SamoeConfig(**{**read_yaml(self.model_config), **settings})
            if image_size is not None:
                config.resize(image_size)
            model = SamoeModel(config)
        else:
            loaded: Any = SamoeModel.from_pretrained(
                self.model_name_or_path,
                output_loading_info=self.domain is not None,  # then nothing is said of new experts, which give place
                experts=self.experts,
                original_config=self.config,
                ignore_mismatched_sizes=self.ignore_mismatched_sizes,
                quantization_config=self.quantization_config,
                **settings,
            )
            model = loaded if self.domain is None else loaded[0]
            if self.domain is not None and model.config.domains:
                self._check_others(SamoeConfig.from_pretrained(self.model_name_or_path), settings)
        if self.domain is not None:
            self._prepare_domain(model, self.domain, of_domain)
        return model.train()

    def _check_others(self, saved: SamoeConfig, settings: dict[str, Any]) -> None:
        """Refuses settings that all domains share, and so would change what the others of a model do."""
        others = ", ".join(name for name in saved.domain_names if name != self.domain)
        for name in SHARED_SETTINGS if others else ():
            value, known = settings.get(name), getattr(saved, name)
            if value not in (None, known):
                raise InputError(
                    f"`{name}` is {known!r} in the model, and with {value!r} its other domains ({others}) would track "
                    f"otherwise. If they are to, save it so before: {saved_with(name, value)}."
                )

    def _prepare_domain(self, model: SamoeModel, domain: str, settings: dict[str, Any]) -> None:
        """Adds the domain, if the model lacks it; else its experts must be as the settings say."""
        if model.config.domains is None and self.former == domain:
            raise InputError(f"`former` must be another name than `domain` {domain!r}, which is a new one.")
        keep_former_experts(model, self.former)
        is_new = domain not in model.config.domain_names
        if self.domain_like is not None and not is_new:
            raise InputError(f"`domain_like` is for a new domain, but the model has {domain!r}, whose experts go on.")
        described_by = self.domain_like if is_new else domain
        if described_by is None:
            add_domain(model, domain, **settings)
            return
        found = find_domain(model, described_by)
        for name, value in settings.items():
            if found[name] != value:
                raise InputError(f"`{name}` is {found[name]!r} in domain {described_by!r}, but {value!r} is given.")
        if is_new:
            add_domain(model, domain, like=self.domain_like)


@dataclass
class DataArguments(DataKeys):
    """The videos, and how clips are drawn from them."""

    def __post_init__(self) -> None:
        check_at_least(self, num_frames=1, stride=1, max_objects=1, clips_per_video=1, eval_fraction=0)
        if self.eval_fraction > 0.5:
            raise InputError(f"`eval_fraction` must be at most 0.5, got {self.eval_fraction}.")
        self.kept_aside: list[Video] = []
        self.spared: list[Video] = []
        if self.augmentation == "none":
            self.augmentation = None
        for name in DATASETS:
            entries = dataset_entries({name: getattr(self, name)}, name, "a run")
            setattr(self, name, [] if entries == ["none"] else entries)

    def train_dataset(self, processor: VideoProcessor, seed: int, spares: bool = False) -> MixedDataset:
        """All training clips, each dataset by its domain's name; fills `kept_aside`.

        With `spares`, also `spared`, with some of the other videos of each dataset that has many.
        """
        if not self.train_data:
            raise InputError("`train_data` must name at least one dataset.")
        clips, weights = {}, {}
        names = "num_frames, stride, max_objects, reverse_probability, clips_per_video, on_error"
        of_clips = {name: getattr(self, name) for name in names.split(", ")}
        skips = self.on_error == "skip"
        transforms = None if self.augmentation is None else transforms_from_options(self.augmentation)
        for index, entry in enumerate(self.train_data):
            options = dict(entry) if isinstance(entry, Mapping) else {}
            weight = options.pop("weight", None)
            videos: Any = videos_from_entry(options or entry, f"train_data[{index}]")
            if aside := set(() if self.eval_data else choose_aside(videos, self.eval_fraction, skips)):
                self.kept_aside += [videos[i] for i in sorted(aside)]
                videos = Subset(videos, [i for i in range(len(videos)) if i not in aside])
            if spares and len(videos) >= MANY_VIDEOS:
                spared = set(choose_aside(videos, min(SPARED_FRACTION, MOST_SPARED / len(videos)), skips))
                self.spared += [videos[i] for i in sorted(spared)]
                videos = Subset(videos, [i for i in range(len(videos)) if i not in spared])
            first = next((i for i in range(len(videos)) if can_be_read(videos, i)), 0) if skips else 0
            domain = options.get("domain") or videos[first].domain
            if domain in clips:
                raise InputError(f"Two datasets of `train_data` have the domain {domain!r}; give each its own.")
            clips[domain] = ClipDataset(videos, processor, seed=seed, transforms=transforms, **of_clips)
            weights[domain] = len(clips[domain]) if weight is None else weight
        return MixedDataset(clips, weights, seed=seed)

    def eval_videos(self) -> list[Video]:
        """Those of `eval_data`, or what `train_dataset` has kept aside."""
        parts = [videos_from_entry(entry, f"eval_data[{index}]") for index, entry in enumerate(self.eval_data)]
        return [video for part in [*parts, self.kept_aside] for video in part]


def choose_aside(videos: Sequence[Video], fraction: float, skips: bool = False) -> list[int]:
    """Positions of a share of some videos, evenly spread: at least one of three or more, and none of fewer.

    Only videos that can be scored are chosen; if `skips`, only those that can be read.
    """
    count = max(1, round(fraction * len(videos))) if fraction and len(videos) > 2 else 0
    chosen = []
    for part in range(count):
        stretch = range(part * len(videos) // count, (part + 1) * len(videos) // count)
        readable = (i for i in reversed(stretch) if not skips or can_be_read(videos, i))
        scored = (i for i in readable if can_be_scored(videos[i]))
        chosen += [i for i in [next(scored, None)] if i is not None]
    return chosen


def can_be_scored(video: Video) -> bool:
    """Whether there are an object and a later annotated frame to track it on."""
    return video.first_visible not in (None, *video.annotated_frames[-1:])


@contextmanager
def setting_errors() -> Iterator[None]:
    """Around what transformers makes of settings: those that do not go together, or that this machine or what is
    installed cannot have, become an [`InputError`] of the same message."""
    try:
        yield
    except (ValueError, ImportError, RuntimeError) as error:
        is_of_settings = not isinstance(error, RuntimeError) or "to be installed" in str(error)
        if isinstance(error, InputError) or not is_of_settings:
            raise
        raise InputError(f"Training settings cannot be used: {error}") from error


@dataclass
class SamoeTrainingArguments(TrainingKeys, TrainingArguments):
    """`TrainingArguments`, with what is trained at which learning rate."""

    remove_unused_columns: bool = False  # clips have more keys than the model has arguments

    def __post_init__(self) -> None:
        if isinstance(self.trainable, str):
            self.trainable = [self.trainable]
        by_metric = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        if (self.load_best_model_at_end or by_metric) and self.metric_for_best_model is None:
            self.metric_for_best_model = "J&F"  # evaluation tracks videos, and has no loss
        if self.label_names is None:
            self.label_names = ["labels"]
        if self.ddp_find_unused_parameters is None:
            # Which parameters a clip uses depends on its prompts; by default Trainer takes all as used if it
            # checkpoints.
            self.ddp_find_unused_parameters = True
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to copy to, and PyTorch warns
        for name in self._VALID_DICT_FIELDS:  # some of which may be files instead
            text = getattr(self, name)
            if isinstance(text, str) and (text.startswith("{") or name.endswith("_kwargs")):
                try:
                    dict(json.loads(text))
                except (ValueError, TypeError) as error:
                    raise InputError(f'`{name}` must be JSON, such as {{"KEY": 1e-6}}, got {text!r}.') from error
        with setting_errors():
            super().__post_init__()
        if by_metric:  # which PyTorch takes for a loss
            given: Any = self.lr_scheduler_kwargs or {}
            self.lr_scheduler_kwargs = {"mode": "max" if self.greater_is_better else "min", **given}
        accelerator = self.accelerator_config
        assert isinstance(accelerator, AcceleratorConfig)
        if accelerator.dispatch_batches is None:
            # Else, of a stream, one process reads the batches of all and joins them, whose objects differ in number.
            accelerator.dispatch_batches = False
        check_at_least(self, per_device_train_batch_size=1, per_device_eval_batch_size=1, gradient_accumulation_steps=1)
        check_at_least(self, learning_rate=0, weight_decay=0, max_grad_norm=0, warmup_steps=0, adam_epsilon=0, seed=0)
        check_at_least(self, encoder_batch_size=1, dataloader_num_workers=0)
        if self.seed >= 2**32:  # NumPy takes no more
            raise InputError(f"`seed` must be below 2**32, got {self.seed}.")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise InputError(f"`num_train_epochs` must be above 0, got {self.num_train_epochs}.")
        if self.mixed_precision == "fp16" and self.device.type == "cpu":  # where accelerate leaves it out
            raise InputError("`fp16` is not for training on a CPU; give `bf16: true` and `use_cpu: true`.")
        # For models of text, or for an evaluation by batches.
        defaults = {"label_smoothing_factor": 0, "neftune_noise_alpha": None, "use_liger_kernel": False}
        for name, unused in (defaults | {"bf16_full_eval": False, "fp16_full_eval": False}).items():
            if (value := getattr(self, name)) != unused:
                raise InputError(f"`{name}` must be {unused}, got {value}.")
        if (strategy := self.train_sampling_strategy) not in ("random", "sequential"):
            raise InputError(f"`train_sampling_strategy` must be random or sequential, got {strategy}.")
        if self.fit is not None:
            parse_size(self.fit)
        self.learning_rates = _check_rates(self.learning_rates, self.trainable)
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            options = getattr(self, name, None) or {}
            if options.get("use_reentrant") or options.get("offload"):
                raise InputError(f"`{name}` must have neither `use_reentrant` nor `offload`, got {options}.")

    def __getstate__(self) -> dict[str, Any]:
        """Without the Hub's token, which would be uploaded with `training_args.bin`."""
        return {**vars(self), "hub_token": None}

    @property
    def folder(self) -> Path:
        """`output_dir`."""
        return Path(self.output_dir or ".")


def parse_size(text: str, name: str = "fit", of: str = "of device memory such as 16GB or 24GiB") -> int:
    """Bytes of a size, such as "16GB" or "24GiB"; `name` and `of` are for the error's message."""
    try:
        size = convert_file_size_to_int(text.upper())
    except (ValueError, OverflowError):
        size = 0
    if size == 0:
        raise InputError(f"`{name}` must be a size {of}, got {text!r}.")
    return size


def _check_rates(rates: Any, trainable: Sequence[str]) -> dict[str, float]:
    """The rates as numbers; YAML takes 1e-4, without a point, for text."""
    if not isinstance(rates, Mapping) or not set(rates) <= set(trainable):
        raise InputError(
            f"`learning_rates` must map sets of `trainable` ({', '.join(trainable)}) to rates, got {rates!r}."
        )
    try:
        numbers = {chosen: float(rate) for chosen, rate in rates.items()}
    except (TypeError, ValueError):
        numbers = {"": math.nan}
    if not all(math.isfinite(rate) and rate >= 0 for rate in numbers.values()):
        raise InputError(f"Rates of `learning_rates` must be numbers from 0 on, got {rates!r}.")
    return numbers


class RunParser(HfArgumentParser):
    """What is wrong with an option is an `InputError`, whoever gives it."""

    def error(self, message: str) -> NoReturn:
        """As in the base class, but does not end the process."""
        raise InputError(f"{message}.")


def run_parser(**kwargs: Any) -> RunParser:
    """A parser with all keys of a run as options, in groups; `kwargs` of [`~transformers.HfArgumentParser`]."""
    kinds: Any = (ModelArguments, DataArguments, PromptRecipe, SegmentationLoss, SamoeTrainingArguments)
    usage = {"prog": "samoe train", "usage": "samoe train RUN.yaml|NAME [--KEY VALUE ...]"}
    parser = RunParser(kinds, **usage | kwargs)
    for action in parser._actions:
        if action.dest in (*DATASETS, "augmentation", "quantization_config", "learning_rates"):
            action.type = _mapping_or_text
        if action.dest == "lora_rank":
            action.type = _rank
    return parser


def _rank(text: str) -> int:
    if text == "auto":
        raise argparse.ArgumentTypeError("auto is chosen by `samoe adapt … --lora_rank auto` alone")
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}") from None


def _mapping_or_text(text: str) -> dict[str, Any] | str:
    """The value of an option: a mapping in YAML, such as `{kind: davis}`, and any other text as it is."""
    try:
        value = parse_yaml(text, text) if text.startswith("{") else None
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value if isinstance(value, dict) else text


def parse_run(
    arguments: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, PromptRecipe, SegmentationLoss, SamoeTrainingArguments]:
    """Parses `CONFIG [--key value]...`: a run, a YAML or one of the package's names, and values in place of its."""
    config, *overrides = sys.argv[1:] if arguments is None else arguments
    parser = run_parser()
    run = read_yaml(config)
    known = {f.name for kind in parser.dataclass_types for f in fields(kind) if f.init}
    options = {option for action in parser._actions for option in action.option_strings}
    given = [text.partition("=")[0] for text in overrides if text.startswith("--")]
    for key in run.keys() - known:
        raise InputError(f"{config} has an unknown key {key!r}{did_you_mean(THEIR_KEYS.get(key, key), known)}")
    for option in set(given) - options:
        name = option.removeprefix("--").replace("-", "_")
        raise InputError(f"There is no option {option}{did_you_mean(f'--{THEIR_KEYS.get(name, name)}', options)}")
    # A model that is given as an option takes the place of the run's, of either kind.
    if models := {option.removeprefix("--").replace("-", "_") for option in given} & MODEL_KEYS:
        run = {key: value for key, value in run.items() if key not in MODEL_KEYS - models}
    # Text is left to the parser, which converts it as on the command line.
    typed = {key: run[key] for key in run.keys() - set(DATASETS) if not isinstance(run[key], str | None)}
    for kind in parser.dataclass_types:
        check_types(kind, typed, str(config))
    parser.set_defaults(**run)
    parsed: Any = parser.parse_args_into_dataclasses(args=overrides)
    return parsed
