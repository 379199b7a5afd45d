"""Model cards: what a model knows of itself and what its maker adds, in the template `model_card.md`."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, metadata_save

from samoe_hf.model.base import base_of
from samoe_hf.model.base_model import SamoePreTrainedModel
from samoe_hf.model.expert_layer import is_expert_parameter

# Beside this file in the source tree and in an installed package; the repository's `model_card.md` is a link to it.
TEMPLATE = Path(__file__).with_name("model_card.md")
USAGE_PICTURE = "expert_usage"
TRAINING_SETTINGS = (
    "trainable, learning_rate, learning_rates, lr_scheduler_type, warmup_steps, weight_decay, max_grad_norm, "
    "per_device_train_batch_size, gradient_accumulation_steps, world_size, optim, bf16, fp16, seed"
)
# What holds for every model of this kind; nothing is claimed of how good one is.
LIMITS = (
    "It tracks what it is shown by points, boxes or masks; it does not find or name objects by itself.",
    "Outside the domains above it has not been measured here, and the experts may do harm there.",
    "Masks are no basis for medical, legal or safety decisions without a person's check.",
)


@dataclass(frozen=True)
class CardContent:
    """What a maker can say in a card beside what the model knows; what is not given is not stated.

    Args:
        usage_picture: an image file of how often each expert is used; the card expects it beside itself.
        training: setting -> value, for the table.
        domains: what was trained on, in words.
        datasets: the same as ids of data sets on the Hub, for the metadata.
        license: an identifier of the Hub such as "apache-2.0".
        limits: further ones than hold for every model.
    """

    eval_results: Sequence[EvalResult] | None = None
    usage_picture: str | os.PathLike | None = None
    training: Mapping[str, Any] | None = None
    domains: Sequence[str] | None = None
    datasets: Sequence[str] | str | None = None
    license: str | None = None
    language: str | None = None
    tags: Sequence[str] | str | None = None
    limits: Sequence[str] = ()


def build_model_card(
    model: SamoePreTrainedModel,
    model_id: str,
    content: CardContent | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    experts_only: bool = False,
    branch: str | None = None,
) -> ModelCard:
    """The card of a model, in the repository `model_id`.

    `base` is what it was loaded from, by default `model.origin.source`; with `experts_only` the repository holds only
    what was trained. `branch` is the one that it is pushed to, the main one by default.
    """
    content, base, kind = content or CardContent(), base or model.origin.source or {}, base_of(model.config)
    name = base.get("name_or_path")
    is_public = name is not None and not os.path.isabs(name)
    datasets = _listed(content.datasets)
    data = ModelCardData(
        base_model=name if is_public else None,
        base_model_relation=("adapter" if experts_only else "finetune") if is_public else None,
        datasets=datasets or None,
        eval_results=list(content.eval_results or []) or None,
        language=content.language,
        library_name="transformers",
        license=content.license,
        model_name=model_id.split("/")[-1],
        pipeline_tag="mask-generation",
        tags=sorted({"samoe", kind.tag, "video-object-segmentation", *card_tags(model, content.tags, base)}),
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = sorted(name for name in trained | model.origin.changed if not is_expert_parameter(name))
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        base={"name": Path(name).name if name and not is_public else name, "is_public": is_public},
        revision=base.get("revision"),
        kind=kind,
        model=model,
        config=model.config,
        model_id=model_id,
        branch=None if branch in (None, "main") or branch.startswith("refs/pr/") else branch,  # pulls are to be merged
        experts_only=experts_only,
        content=content,
        datasets=datasets,
        usage_picture=_picture_name(content),
        limits=[*LIMITS, *content.limits],
        num_expert_parameters=sum(p.numel() for n, p in model.named_parameters() if is_expert_parameter(n)),
        also_trained=f"{len(others)} tensors, such as `{others[0]}`" if others else "nothing",
    )


def card_tags(model: SamoePreTrainedModel, tags: Sequence[str] | str | None, base: Mapping[str, Any]) -> list[str]:
    """The given tags, and the one by which others find a model with domains on a base of the Hub."""
    name = base.get("name_or_path")
    if not model.config.domains or name is None or os.path.isabs(name):
        return _listed(tags)
    return [*_listed(tags), domains_tag(name)]


def add_tags(card: str | Path, directory: str | os.PathLike, tags: Sequence[str]) -> None:
    """Writes `README.md` with the tags that a card lacks, and nothing else changed; nothing if it has them all."""
    data = metadata_load(card) or {}
    known = _listed(data.get("tags"))
    if not set(tags) <= set(known):
        target = shutil.copyfile(card, Path(directory, "README.md"))
        metadata_save(target, {**data, "tags": [*known, *sorted(set(tags) - set(known))]})


def _listed(value: Sequence[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def domains_tag(base: str) -> str:
    """The tag of repositories with domains on a base of the Hub, by which others find them."""
    return f"samoe-domains-on-{base.replace('/', '--')}"


def _picture_name(content: CardContent) -> str | None:
    """The picture's file name beside the card."""
    return None if content.usage_picture is None else USAGE_PICTURE + Path(content.usage_picture).suffix.lower()


def write_model_card(
    model: SamoePreTrainedModel,
    directory: str | os.PathLike,
    model_id: str,
    content: CardContent | None = None,
    **kwargs: Any,
) -> None:
    """Writes `README.md` and the picture beside it; arguments as in [`build_model_card`]."""
    content = content or CardContent()
    card = build_model_card(model, model_id, content, **kwargs)
    if name := _picture_name(content):
        shutil.copyfile(str(content.usage_picture), Path(directory, name))
    card.save(Path(directory, "README.md"))


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
