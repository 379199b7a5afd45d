"""Words of SAM2-MoE's and Meta's trainers, and what they are called in a run here."""

import difflib
import re
from collections.abc import Collection, Iterable

from samoe_hf.errors import InputError
from samoe_hf.model.configuration_samoe import OLD_EXPERT_SETTINGS

_NO_SECTIONS = "no section: keys stand side by side; docs/from_sam2_moe.md names them"
_PATHS = "`train_data` and `eval_data`, lists of datasets, in the YAML"
_OWN_LOGS = "`logging_steps`, with which the routing is logged as well"
_CHOSEN_DEVICE = "`use_cpu` for the CPU; otherwise CUDA_VISIBLE_DEVICES chooses the GPU"

# Old word -> what to give here. A name in backticks is a key of a run, and an option with two dashes before it.
OLD_NAMES = {
    **{old: f"`{new}`" for old, new in OLD_EXPERT_SETTINGS.items()},
    "use_dummy_data": "train_data: [{kind: synthetic}] in the YAML; `samoe train smoke` is such a run",
    # The model.
    "config_file": "`config`",
    "model_cfg": "`config`",
    "original_config": "`config`",
    "ckpt_path": "`model_name_or_path`",
    "checkpoint": "`model_name_or_path`; `experts` for the file of experts, `resume_from_checkpoint` to go on",
    "checkpoint_path": "`model_name_or_path`",
    "sam2_checkpoint": "`model_name_or_path`",
    "base_checkpoint": "`model_name_or_path`",
    "moe_checkpoint": "`experts`",
    "load_balance_weight": "`router_aux_loss_coef`",
    "load_balance_loss": "`router_aux_loss_coef`, 0 for none",
    "device": _CHOSEN_DEVICE,
    # The data.
    "data_dir": _PATHS,
    "train_data_dir": _PATHS,
    "val_data_dir": _PATHS,
    "dataset": _PATHS,
    "train_ratio": f"`split` of a dataset in {_PATHS}",
    "img_folder": f"`root` of a dataset in {_PATHS}",
    "gt_folder": f"`root` of a dataset in {_PATHS}",
    "frame_stride": "`stride`",
    "max_num_objects": "`max_objects`",
    "reverse_time_prob": "`reverse_probability`",
    "multiplier": "`clips_per_video`",
    "horizontal_flip": "augmentation: {flip: …} in the YAML",
    "color_jitter": "augmentation: {jitter: …} in the YAML",
    "random_crop": "augmentation: {} in the YAML, SAM 2's shifts and shears",
    "frame_size": "the image size of the model; `model_config` for a model of another",
    "image_size": "the image size of the model; `model_config` for a model of another",
    "resolution": "the image size of the model; `model_config` for a model of another",
    "num_workers": "`dataloader_num_workers`",
    "num_train_workers": "`dataloader_num_workers`",
    "pin_memory": "`dataloader_pin_memory`",
    "prefetch_factor": "`dataloader_prefetch_factor`",
    # Prompts.
    "prob_to_use_pt_input": "`point_probability`",
    "prob_to_use_pt_input_for_train": "`point_probability`",
    "prob_to_use_box_input": "`box_probability`",
    "prob_to_use_box_input_for_train": "`box_probability`",
    "num_init_cond_frames_for_train": "`max_initial_frames`",
    "num_frames_to_correct_for_train": "`max_corrected_frames`",
    "num_correction_pt_per_frame": "`num_correction_clicks`",
    "prob_to_sample_from_gt_for_train": "`click_from_mask_probability`",
    # The loss.
    "mask_loss_weight": "`focal_weight`",
    "loss_mask": "`focal_weight`",
    "focal_loss_weight": "`focal_weight`",
    "loss_dice": "`dice_weight`",
    "dice_loss_weight": "`dice_weight`",
    "loss_iou": "`iou_weight`",
    "iou_loss_weight": "`iou_weight`",
    "loss_class": "`object_score_weight`",
    # The optimizer and its schedule.
    "lr": "`learning_rate`",
    "base_lr": "`learning_rate`, or SET=LR in `trainable`",
    "vision_lr": r"SET=LR in `trainable`, such as vision_encoder\..*=3.0e-6",
    "epochs": "`num_train_epochs`",
    "num_epochs": "`num_train_epochs`",
    "max_epochs": "`num_train_epochs`",
    "batch_size": "`per_device_train_batch_size`",
    "train_batch_size": "`per_device_train_batch_size`",
    "eval_batch_size": "nothing: videos are tracked one by one",
    "effective_batch_size": "`per_device_train_batch_size` times `gradient_accumulation_steps`",
    "accumulation_steps": "`gradient_accumulation_steps`",
    "grad_clip": "`max_grad_norm`",
    "gradient_clip": "`max_grad_norm`",
    "max_norm": "`max_grad_norm`",
    "scheduler": "`lr_scheduler_type`",
    "warmup_ratio": "`warmup_steps`, a share of all steps if it is below 1",
    "min_lr_ratio": "lr_scheduler_type: cosine_with_min_lr and lr_scheduler_kwargs: {min_lr_rate: …} in the YAML",
    "use_amp": "`bf16` or `fp16`",
    "amp_dtype": "`bf16` or `fp16`",
    # Logs, checkpoints, the machine.
    "experiment_name": "`run_name`",
    "resume": "`resume_from_checkpoint`",
    "keep_last_n": "`save_total_limit`",
    "save_best": "`load_best_model_at_end`",
    "save_every": "`save_strategy` and `save_steps`",
    "save_freq": "`save_strategy` and `save_steps`",
    "metric": "`metric_for_best_model`",
    "early_stopping_patience": "a callback in Python, EarlyStoppingCallback of transformers",
    "early_stopping_min_delta": "a callback in Python, EarlyStoppingCallback of transformers",
    "log_expert_usage": _OWN_LOGS,
    "expert_usage_interval": _OWN_LOGS,
    "track_specialization": _OWN_LOGS,
    "specialization_interval": _OWN_LOGS,
    "wandb": "`report_to`",
    "use_wandb": "`report_to`",
    "tensorboard_dir": "`report_to`",
    "deterministic": "`full_determinism`",
    "seed_value": "`seed`",
    "gpus_per_node": "the number of processes that torchrun or accelerate starts",
    "empty_cache_interval": "`torch_empty_cache_steps`",
    # Sections of the YAML files.
    **dict.fromkeys(("model", "training", "data", "loss", "moe", "validation", "logging", "resources"), _NO_SECTIONS),
    **dict.fromkeys(("scratch", "trainer", "vos", "launcher", "submitit"), _NO_SECTIONS),
}


def hint_for(name: str, known: Collection[str]) -> str:
    """What to give instead of an unknown key: by its old name, else the nearest key that is known, else nothing."""
    if name in OLD_NAMES:
        return f"Here it is {OLD_NAMES[name]}."
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {nearest[0]!r}?" if nearest else ""


def check_names(names: Iterable[str], known: Collection[str], source: str) -> None:
    """Raises a `ValueError` for the first of some keys that is not known, with a hint. `source`: what has the keys."""
    for name in names:
        if name not in known:
            raise InputError(f"{source} has an unknown key {name!r}. {hint_for(name, known)}".rstrip())


def check_options(arguments: Iterable[str], known: Collection[str]) -> None:
    """Raises a `ValueError` for the first option (`--name`) that is not known, with a hint in options.

    Args:
        known: options, with their dashes.
    """
    for argument in arguments:
        option = argument.partition("=")[0]
        if not option.startswith("--") or option in known:
            continue
        name = option.removeprefix("--").replace("-", "_")
        names = [one.removeprefix("--") for one in known if one.startswith("--")]
        hint = re.sub(r"`(\w+)`", r"--\1", hint_for(name, names))
        hint = re.sub(r"'([\w-]+)'", r"--\1", hint)
        raise InputError(f"There is no option {option}. {hint}".rstrip())


def check_arguments(given: Iterable[str], called: str) -> None:
    """Raises a `TypeError` for an old name among the arguments of a call in Python."""
    for name in given:
        if name in OLD_NAMES:
            raise TypeError(f"{called} has no argument {name!r}. {hint_for(name, ())}")
