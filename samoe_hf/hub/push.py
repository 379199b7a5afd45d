"""Uploads a model, a processor and a model card to the Hub."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processor import build_processor

from .model_card import CardContent, write_model_card


def check_base_is_public(model: SamoeModel) -> None:
    """Raises a `ValueError` if what was trained refers to files that only this machine has."""
    source = model.base_model_source
    if source is not None and os.path.isabs(source["name_or_path"]):
        raise ValueError(
            f"The base model is {source['name_or_path']}, which nobody else can fetch. Name the same model on the Hub "
            "as `base_model`, load it from there before training, or push the whole model (`experts_only=False`; in "
            "training, `save_only_trained=False`)."
        )


def push(
    model: SamoeModel,
    repo_id: str,
    *,
    experts_only: bool,
    base_model: str | None,
    processor: Any,
    card: Mapping[str, Any] | None,
    tags: list[str] | None,
    max_shard_size: int | str,
    commit: Mapping[str, Any],
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
) -> CommitInfo:
    """Saves a model in a temporary folder and uploads it in one commit; see `SamoeModel.push_to_hub`."""
    if experts_only and base_model is None:
        check_base_is_public(model)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(
            folder,
            experts_only=experts_only,
            base_model=base_model,
            processor=processor or build_processor(model.config),
            max_shard_size=max_shard_size,
        )
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # As with other models, a card that was written by hand stays.
        if card is not None or not api.file_exists(repo_id, "README.md", revision=revision):
            base = json.loads((Path(folder) / CONFIG_NAME).read_text())["base_model"] or model.base_model_source
            content = CardContent(**{"tags": tags, **(card or {})})
            write_model_card(model, folder, repo_id, content, base=base, experts_only=experts_only)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            delete_patterns=["model*.safetensors", SAFE_WEIGHTS_INDEX_NAME, "pytorch_model*.bin*"],
            **commit,
        )
