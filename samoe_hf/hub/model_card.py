"""Model cards: what a model knows of itself and what its maker adds, in the template `model_card.md`."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from samoe_hf.model.experts import is_expert_parameter
from samoe_hf.model.modeling_samoe import SamoeModel

# Beside this file in the source tree and in an installed package; the repository's `model_card.md` is a link to it.
TEMPLATE = Path(__file__).with_name("model_card.md")
USAGE_PICTURE = "expert_usage"
# What holds for every model of this kind; nothing is claimed of how good one is.
LIMITS = (
    "It tracks what it is shown by points, boxes or masks; it does not find or name objects by itself.",
    "Outside the domains above it has not been measured here, and the experts may do harm there.",
    "Masks are no basis for medical, legal or safety decisions without a person's check.",
)


def build_model_card(
    model: SamoeModel,
    model_id: str,
    *,
    base: Mapping[str, Any] | None = None,
    experts_only: bool = False,
    eval_results: Sequence[EvalResult] | None = None,
    usage_picture: str | os.PathLike | None = None,
    training: Mapping[str, Any] | None = None,
    domains: Sequence[str] | None = None,
    datasets: Sequence[str] | str | None = None,
    license: str | None = None,
    language: str | None = None,
    tags: Sequence[str] | None = None,
    limits: Sequence[str] = (),
) -> ModelCard:
    """A card that says what is known, and of the rest that it is not stated.

    Args:
        model_id: its repository, or a name.
        base: what it was loaded from, as `model.base_model_source`, which is the default.
        experts_only: whether the repository holds only what was trained.
        eval_results: for the table of results and the metadata (`model-index`).
        usage_picture: an image file, which the card expects beside itself; see [`write_model_card`].
        training: setting -> value, for the table.
        domains: what was trained on, in words.
        datasets: the same as ids of data sets on the Hub, for the metadata.
        license: an identifier of the Hub such as "apache-2.0".
        language, tags: for the metadata.
        limits: further ones than hold for every model.

    Returns:
        The card; `card.save(path)` writes it.
    """
    base = base or model.base_model_source
    datasets = [datasets] if isinstance(datasets, str) else list(datasets or [])
    base_name = None if base is None else base["name_or_path"]
    is_public = base_name is not None and not os.path.isabs(base_name)
    model_name = model_id.split("/")[-1]
    data = ModelCardData(
        base_model=base_name if is_public else None,
        base_model_relation=("adapter" if experts_only else "finetune") if is_public else None,
        datasets=datasets or None,
        eval_results=list(eval_results or []) or None,
        language=language,
        library_name="transformers",
        license=license,
        model_name=model_name,
        pipeline_tag="mask-generation",
        tags=sorted({"samoe", "sam2", "video-object-segmentation", *([tags] if isinstance(tags, str) else tags or [])}),
    )
    if not TEMPLATE.exists():
        # This code came with a model's repository, without the template.
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {model_name}\n", ignore_metadata_errors=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = sorted(name for name in trained | model.differs_from_base if not is_expert_parameter(name))
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        base={
            "name": base_name if is_public or base_name is None else Path(base_name).name,
            "is_public": is_public,
            "revision": (base or {}).get("revision"),
        },
        model_id=model_id,
        model_name=model_name,
        config=model.config,
        experts_only=experts_only,
        has_code=type(model)._auto_class is not None,
        num_layers=len(model.expert_names),
        num_parameters=model.num_parameters(),
        num_expert_parameters=sum(p.numel() for name, p in model.named_parameters() if is_expert_parameter(name)),
        also_trained=f"{len(others)} tensors, such as `{others[0]}`" if others else "nothing",
        domains=list(domains or []),
        datasets=datasets,
        training=training,
        results=list(eval_results or []),
        usage_picture=None if usage_picture is None else _picture_name(usage_picture),
        limits=[*LIMITS, *limits],
        licence=license,
    )


def write_model_card(model: SamoeModel, directory: str | os.PathLike, model_id: str, **arguments: Any) -> None:
    """Writes `README.md` and the picture beside it; arguments as in [`build_model_card`].

    Raises:
        FileNotFoundError: if there is no such picture.
    """
    card = build_model_card(model, model_id, **arguments)
    if (picture := arguments.get("usage_picture")) is not None:
        shutil.copyfile(picture, Path(directory) / _picture_name(picture))
    card.save(Path(directory) / "README.md")


def _picture_name(picture: str | os.PathLike) -> str:
    return USAGE_PICTURE + Path(picture).suffix.lower()
