"""What travels to the Hub: the files of a model's repository, uploaded in one commit.

- `config.json` and `model*.safetensors`: a whole model, or only what was trained; adapters of PEFT beside them.
- `domains/NAME.safetensors`: the experts of each domain.
- The processor: `processor_config.json` and what belongs to it.
- After `SamoeModel.register_for_auto_class()`, the code: the files of `samoe_hf/model/`.
- `README.md`, the model card, and the picture that it shows.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants

# It comes from another package by the version of huggingface_hub.
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from samoe_hf.errors import InputError
from samoe_hf.model.base_model import SamoePreTrainedModel
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.domain_files import domain_file
from samoe_hf.model.processing_samoe import build_processor

from .model_card import CardContent, add_tags, card_tags, domains_tag, write_model_card

MAX_FOUND = 50


def check_base_is_public(model: SamoePreTrainedModel) -> None:
    """Refuses what was trained on files that only this machine has."""
    name = (model.origin.source or {}).get("name_or_path")
    if name is not None and os.path.isabs(name):
        raise InputError(
            f"The base model is {name}, which nobody else can fetch. Name the same model on the Hub as `base_model`, "
            "load it from there before training, or push the whole model (`experts_only=False`; in training, "
            "`save_only_trained=False`)."
        )


def push(
    model: SamoePreTrainedModel,
    repo_id: str,
    *,
    card: Mapping[str, Any] | None,
    tags: list[str] | None,
    commit: Mapping[str, Any],
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    **options: Any,
) -> CommitInfo:
    """Saves a model in a temporary folder and uploads it in one commit; see `SamoeModel.push_to_hub`.

    `commit` has arguments of `HfApi.upload_folder`, `options` those of `SamoeModel.save_pretrained`.
    """
    experts_only, loaded = options["experts_only"], model.origin.source or {}
    if experts_only and options["base_model"] is None:
        check_base_is_public(model)
    content = CardContent(**{"tags": tags, **(card or {})})
    if content.usage_picture is not None:
        os.stat(content.usage_picture)  # what is not there is an error before a repository is made
    options["processor"] = options["processor"] or build_processor(model.config)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder, _connection_errors(repo_id):
        model.save_pretrained(folder, **options)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        base_name = options["base_model"] or loaded.get("name_or_path")
        if experts_only and repo_id == base_name and revision in (None, "main") and not commit.get("create_pr"):
            raise InputError(
                f"{repo_id} holds the base model, which what was trained would replace; push it to another repository, "
                "or the whole model with `experts_only=False`."
            )
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        base = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))["base_model"] or loaded
        if card is not None or not api.file_exists(repo_id, "README.md", revision=revision):
            write_model_card(model, folder, repo_id, content, base=base, experts_only=experts_only, branch=revision)
        else:  # as with other models, a card that was written by hand stays
            add_tags(api.hf_hub_download(repo_id, "README.md", revision=revision), folder, card_tags(model, tags, base))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            delete_patterns=["model*.safetensors", SAFE_WEIGHTS_INDEX_NAME, "pytorch_model*.bin*", domain_file("*")],
            **commit,
        )


def find_domains(base: str) -> dict[str, list[str]]:
    """Repositories of the Hub with domains on a base of the Hub, most downloaded first: id -> names of the domains.

    Nobody vouches for them. The names of one whose configuration cannot be read are empty; of very many, the first
    [`MAX_FOUND`] are given.
    """
    found = {}
    with _connection_errors(base, "searched"):
        models = HfApi().list_models(filter=domains_tag(base), sort="downloads", limit=MAX_FOUND)
        for repository in (model.id for model in models):
            try:
                found[repository] = SamoeConfig.from_pretrained(repository).domain_names
            except (OSError, ValueError):
                found[repository] = []
    return found


@contextmanager
def _connection_errors(repo_id: str, what: str = "uploaded") -> Iterator[None]:
    """Makes errors of the HTTP client, which are of no common class, an `OSError` that names the repository."""
    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):  # an answer of the Hub
            raise
        raise OSError(f"{repo_id} was not {what}: {constants.ENDPOINT} cannot be reached ({error}).") from error
