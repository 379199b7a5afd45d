"""What a training run says of itself in the model card."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from .arguments import SamoeTrainingArguments

SETTINGS = (
    "trainable, learning_rate, learning_rates, lr_scheduler_type, warmup_steps, weight_decay, max_grad_norm, "
    "per_device_train_batch_size, gradient_accumulation_steps, world_size, optim, bf16, fp16, seed"
)


def card_settings(args: SamoeTrainingArguments) -> dict[str, Any]:
    """The arguments that a model card lists."""
    return {name: getattr(args, name) for name in SETTINGS.split(", ")}


def evaluation_results(log_history: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """J, F and J&F of the last evaluation in a Trainer's log history, in all and by domain."""
    last = next((entry for entry in reversed(log_history) if "eval_J&F" in entry), {})
    matches = [(re.fullmatch(r"eval_(?:(.+)_)?(J&F|J|F)", key), value) for key, value in last.items()]
    return [score_entry(match[2], value, match[1]) for match, value in matches if match]


def score_entry(metric: str, value: float, domain: str | None = None) -> EvalResult:
    """A score of tracking from masks, 0 to 1, for the table of a model card; of all domains by default."""
    return EvalResult(
        task_type="mask-generation",
        task_name="Video object segmentation, from the mask of the first frame",
        dataset_type=domain or "all",
        dataset_name=domain or "all domains",
        metric_type=metric,
        metric_name=metric,
        metric_value=round(value, 4),
    )
