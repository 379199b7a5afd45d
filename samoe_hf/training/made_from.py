"""What a training run is made from, which its checkpoints remember: a run goes on from its own checkpoints alone."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from samoe_hf.data.clip_datasets import ClipDataset, MixedDataset
from samoe_hf.data.fingerprints import fingerprint, video_fingerprint
from samoe_hf.data.frames import SampleError
from samoe_hf.data.schema import evenly_chosen
from samoe_hf.errors import InputError
from samoe_hf.evaluation.run_folder import differences
from samoe_hf.model.losses import SegmentationLoss
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.prompt_recipe import PromptRecipe
from samoe_hf.model.weights_io import hash_tensors

from .arguments import SamoeTrainingArguments

FILE = "run.json"  # in each checkpoint
OPTIONS = (
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "optim optim_args seed data_seed dataloader_drop_last train_sampling_strategy"
)
# How long the run is: a run may be made longer.
LENGTH = ("max_steps", "num_train_epochs")
# Of a large dataset so many videos are looked at, and annotated frames in all.
VIDEOS, FRAMES = 256, 1024
# Not of how a model computes.
NAMES = ("base_model", "adapters", "architectures", "transformers_version", "_name_or_path", "auto_map")


def made_from(
    model: SamoeModel,
    args: SamoeTrainingArguments,
    learning_rates: Mapping[str, float],
    recipe: PromptRecipe,
    loss: SegmentationLoss,
    domain: str | None,
    clips: Any,
) -> dict[str, Any]:
    """All that the result of a training depends on, as JSON holds it, by the names of a run's keys.

    Of the model, what is not trained is hashed; the gate is not, which `adapt` lets learn before it trains. Of the
    videos, some masks and the names, sizes and ends of some files are.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {n: t for n, t in model.state_dict().items() if n not in trained and "domain_gate." not in n}
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    about = {
        "model": hash_tensors(sorted(frozen.items()))[:16],
        "model_name_or_path": (model.origin.source or {}).get("name_or_path"),
        "config": {n: v for n, v in model.config.to_diff_dict().items() if n not in NAMES},
        "domain": domain,
        "learning_rates": dict(learning_rates),
        "clips of a step": batch,
        "train_data": _describe_clips(clips),
        **{name: getattr(args, name) for name in [*OPTIONS.split(), *LENGTH]},
        **{name: args.mixed_precision == name for name in ("bf16", "fp16")},  # also by `accelerate launch`
        **asdict(recipe),
        **asdict(loss),
    }
    return json.loads(json.dumps(about, default=str))


def _describe_clips(clips: Any) -> dict[str, Any]:
    if isinstance(clips, MixedDataset):
        return {name: _describe_clips(one) for name, one in clips.datasets.items()} | {"shares": clips.counts}
    if not isinstance(clips, ClipDataset):
        return {"kind": type(clips).__name__}
    sampler = clips.sampler
    transforms = re.sub(r" at 0x[0-9a-f]+", "", repr(sampler.transforms))  # where it is in RAM
    names = ("num_frames", "stride", "max_objects", "reverse_probability")
    settings = {name: getattr(sampler, name) for name in names} | {"augmentation": transforms}
    return settings | {"seed": clips.seed, "clips": len(clips), "videos": _videos_fingerprint(clips.videos)}


def _videos_fingerprint(videos: Any) -> str:
    chosen, found = evenly_chosen(range(len(videos)), VIDEOS), []
    for number in chosen:
        try:
            video = videos[number]
            found.append(video_fingerprint(video, evenly_chosen(video.annotated_frames, max(1, FRAMES // len(chosen)))))
        except (SampleError, OSError) as error:  # training says so, or leaves it out
            found.append(type(error).__name__)
    return fingerprint(found)


def check_goes_on(checkpoint: Path, now: dict[str, Any]) -> list[str]:
    """Refuses a checkpoint of another run; returns sentences about one that is made longer."""
    steps = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    unit, done = ("max_steps", steps["global_step"]) if now["max_steps"] > 0 else ("num_train_epochs", steps["epoch"])
    if math.ceil(now[unit]) < done:
        raise InputError(f"`{unit}` is {now[unit]}, but {checkpoint} was trained for {done} already.")
    if not (checkpoint / FILE).is_file():
        return []
    then = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
    then = {"train_sampling_strategy": "random"} | then  # which runs of earlier versions do not name
    found = differences(then, now)
    found.pop("model_name_or_path", None)  # the same model may lie elsewhere now
    if "model" in found:
        names = [one.get("model_name_or_path") for one in (then, now)]
        found["model"] = f"the model was {names[0]}, which differs from {names[1]} as it is now"
    longer = [f"{checkpoint}: {found.pop(name)} any more." for name in LENGTH if name in found]
    if found:
        raise InputError(
            f"{checkpoint} is of another run: {'; '.join(found.values())}. Give the same as then, or "
            "start anew in another folder or with `overwrite_output_dir: true`."
        )
    return longer
