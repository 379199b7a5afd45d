"""How a SamoeModel is loaded, saved and pushed: `from_pretrained`, `save_pretrained` and `push_to_hub`."""

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import PROCESSOR_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapters import active_adapters, adapters_aside, load_adapters, save_adapters, without_adapters
from .base import SAM3, base_of, is_combined
from .configuration_samoe import SamoeConfig, check_old_names
from .errors import InputError
from .expert_layer import EXPERT_TENSORS
from .processing_samoe import VideoProcessor, build_processor
from .quantization import check_not_quantized, quantize_base, without_load_report
from .weights_files import read_headers, read_tracker, tracker_headers
from .weights_io import updated_folder
from .weights_trained import (
    HUB_ARGUMENTS,
    check_finite,
    check_not_its_base,
    check_weights,
    is_original_checkpoint,
    load_trained,
    resolve_commit,
    save_trained,
)

# As loud as transformers is told to be.
logger = transformers_logging.get_logger(f"transformers.{__name__}")

# Arguments of `save_pretrained` that are meant for `push_to_hub`.
PUSH_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)
_NEW_EXPERTS = "%d expert tensors are not in %s: they are new, and have no effect until they are trained."
# What SAM2-MoE's builder calls arguments of `from_pretrained`.
OLD_ARGUMENTS = {"ckpt_path": "pretrained_model_name_or_path", "config_file": "original_config"}
# What `output_loading_info` tells of.
LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


class PretrainedMixin:
    """The methods of a SamoeModel that load it, save it and push it, in place of those of transformers."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        experts: str | os.PathLike | None = None,
        original_config: str | os.PathLike | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        quantization_config: QuantizationConfigMixin | dict[str, Any] | None = None,
        **kwargs,
    ) -> "PretrainedMixin":
        """Loads a model in evaluation mode, with only its experts and routers trainable.

        Args:
            pretrained_model_name_or_path: one of
                - a folder or Hub id of a SamoeModel;
                - a folder or Hub id of a SAM 2 video model, or of SAM 3, whose tracker is taken: experts without effect
                  are added;
                - an original checkpoint, of SAM 2 or SAM2-MoE (a `.pt` file).
            experts: with an original checkpoint, a file of experts that SAM2-MoE's trainers saved.
            original_config: with an original checkpoint, its YAML; needed for sizes other than Meta's.
            output_loading_info: whether to return what was missing and the like as well. Without it, one line is logged
                if experts are new.
            ignore_mismatched_sizes: whether experts of another number or rank, or in other layers, than the
                configuration's are left out, and new ones take their place. Other tensors must fit.
            quantization_config: of transformers, such as [`~transformers.BitsAndBytesConfig`], to hold the frozen base
                in 8 or 4 bits. Experts, routers, the gate and adapters are not quantized. See docs/quantization.md.
            kwargs: as in [`~transformers.PreTrainedModel.from_pretrained`]; values of [`SamoeConfig`] can be set too.
                Where `expert_modules` is set, layers without experts in the checkpoint get new ones, without effect.

        Raises:
            FileNotFoundError: if there is no such `.pt` file.
            ValueError: if tensors other than the experts' are missing, any is unexpected, or one is not finite.
        """
        source = pretrained_model_name_or_path
        _check_given(source, config, (experts, original_config), quantization_config, kwargs)
        settings = {n: kwargs.pop(n) for n in [*kwargs] if n in SamoeConfig.__dataclass_fields__ and n != "dtype"}
        more_experts = ignore_mismatched_sizes or "expert_modules" in settings
        device_map = None if quantization_config is None else kwargs.pop("device_map", None)
        is_original = is_original_checkpoint(source)
        hub: dict[str, Any] = {}
        config = copy.deepcopy(config)
        if is_original:
            stored_config, kwargs["state_dict"] = _read_original(source, experts, original_config)
            config = stored_config if config is None else config
        elif source is not None:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            if (commit := resolve_commit(source, hub)) is not None:
                hub["revision"] = kwargs["revision"] = commit
            config = _read_config(source if config is None else config, hub)
        for name, value in settings.items():
            setattr(config, name, value)
        config.check_experts()
        check_not_quantized(source, config)
        if config.base_model is not None and source is not None and not is_original:
            others = {name: value for name, value in kwargs.items() if name not in hub}
            model, new = load_trained(cls, source, config, hub, others, more_experts)
            info = {name: set() for name in LOADING_INFO} | {"missing_keys": new}
        else:
            new_layers = _check_stored(source, config, hub, kwargs, more_experts, ignore_mismatched_sizes)
            model, info = cls._load_checked(source, new_layers, *model_args, config=config, **kwargs)
            new = {f"{layer}.{tensor}" for layer in new_layers for tensor in EXPERT_TENSORS}
            if source is not None:
                model.base_model_source = _describe_source(source, kwargs, original_config)
        if quantization_config is not None:
            quantize_base(model, quantization_config, device_map)
        if source is not None and not is_original:
            load_adapters(model, source, config.adapters, hub)
        if new and not output_loading_info:
            logger.warning(_NEW_EXPERTS, len(new), source or "the given tensors")
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_checked(
        cls, source: str | os.PathLike | None, new_layers: Sequence[str], *model_args, **kwargs
    ) -> tuple["PretrainedMixin", dict[str, Any]]:
        """Loads weights that [`check_weights`] has found to fit, and gives some layers new experts."""
        with without_load_report():
            # What does not fit are experts that give place to new ones.
            # Tensors of an original checkpoint and of SAM 3's combined one are `state_dict`.
            folder = None if "state_dict" in kwargs else source
            options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
            model, info = super().from_pretrained(folder, *model_args, **options, **kwargs)
        _align_memory(model)
        for name in new_layers:
            # Within the vision encoder, transformers leaves them uninitialized.
            model.get_submodule(name).reset_experts()
        check_finite(source, model)
        model.set_trainable("experts")
        return model, info

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        experts_only: bool | None = None,
        state_dict: dict | None = None,
        processor: VideoProcessor | None = None,
        base_model: str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in the base class, with all adapters of PEFT. If anything fails, the folder is left as it was.

        Args:
            experts_only: writes only experts, routers and whatever else is trainable, and the name of the base model,
                which [`from_pretrained`] then fetches; and a processor, if there is none. By default so where the base
                is quantized, and else not.
            processor: is saved as well.
            base_model: with `experts_only`, the Hub id to refer to, if the base was loaded from somewhere else. It is
                loaded, to see that it is the same.
            kwargs: other arguments of the base class, and with `push_to_hub` those of [`push_to_hub`].

        Raises:
            ValueError: with `experts_only`, if there is no base model, `base_model` is another one, or `save_directory`
                holds the base model; if it is False and the base is quantized.
            TypeError: for an argument that is none of these.
        """
        known = {*PUSH_ARGUMENTS, *inspect.signature(PreTrainedModel.save_pretrained).parameters} - {"self", "kwargs"}
        if unknown := sorted(set(kwargs) - known):
            raise TypeError(f"`save_pretrained` has no argument {unknown[0]!r}.")
        experts_only = _saves_experts_only(self, experts_only)
        if experts_only:
            check_not_its_base(self, save_directory)
        commit = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        self.config.adapters = active_adapters(self)
        state_dict = without_adapters(self.state_dict() if state_dict is None else state_dict)
        is_main_process = kwargs.get("is_main_process", True)
        if is_main_process or not experts_only:
            with updated_folder(save_directory) as folder:
                if experts_only:
                    save_trained(self, folder, state_dict, base_model)
                    if processor is None and not Path(save_directory, PROCESSOR_NAME).exists():
                        processor = build_processor(self.config)
                else:
                    with adapters_aside(self):
                        super().save_pretrained(folder, state_dict=state_dict, **kwargs)
                if is_main_process:
                    save_adapters(self, folder)
                if processor is not None:
                    processor.save_pretrained(folder)
        if push_to_hub:
            repo_id = commit.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, experts_only=experts_only, processor=processor, base_model=base_model, **commit)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        experts_only: bool | None = None,
        base_model: str | None = None,
        processor: VideoProcessor | None = None,
        card: dict[str, Any] | None = None,
        commit_message: str = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Uploads the model, a processor and a model card in one commit, which replaces weights of earlier ones.

        Args:
            repo_id: the repository; it is made if need be.
            experts_only, base_model: as in [`save_pretrained`].
            processor: by default the one that prepares videos as `sam2` does.
            card: what the card is to say beside what the model knows, arguments of
                [`model_card.build_model_card`]. A card that the repository has stays if this is None.
            commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags: as in the
                base class.

        Raises:
            ValueError: with `experts_only`, if others could not fetch the base model, or `base_model` is another one.
            OSError: if the Hub refuses or cannot be reached (`huggingface_hub.errors.HfHubHTTPError` with the reason).
        """
        try:
            from samoe_hf.hub.repository import push
        except ImportError as error:
            raise ImportError("`push_to_hub` of a SamoeModel needs the package samoe_hf.") from error
        experts_only = _saves_experts_only(self, experts_only)
        commit = {"commit_message": commit_message, "commit_description": commit_description, "create_pr": create_pr}
        return push(
            self,
            repo_id,
            experts_only=experts_only,
            base_model=base_model,
            processor=processor,
            card=card,
            tags=tags,
            max_shard_size=max_shard_size,
            commit=commit,
            private=private,
            token=token,
            revision=revision,
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """From now on this package's code is saved with models, for `AutoModel.from_pretrained(…,
        trust_remote_code=True)` where the package is not installed."""
        super().register_for_auto_class(auto_class)
        cls.config_class.register_for_auto_class()


def _saves_experts_only(model: PreTrainedModel, experts_only: bool | None) -> bool:
    is_quantized = bool(model.quantized_layers)
    if experts_only is False and is_quantized:
        raise InputError("`experts_only` must be True where the base is quantized: what was trained is saved alone.")
    return is_quantized if experts_only is None else experts_only


def _read_config(config: PreTrainedConfig | str | os.PathLike, hub: dict[str, Any]) -> SamoeConfig:
    """The configuration of a folder or Hub id, or one that was read already."""
    if isinstance(config, SamoeConfig):
        return config
    if isinstance(config, PreTrainedConfig):
        # A base's own, or the same class of a folder's own code, which transformers loads once more.
        return SamoeConfig.from_dict(config.to_dict())
    return SamoeConfig.from_pretrained(config, **hub)


def _check_stored(
    source: str | os.PathLike | None,
    config: SamoeConfig,
    hub: dict[str, Any],
    arguments: dict[str, Any],
    more_experts: bool,
    any_experts: bool,
) -> list[str]:
    """Compares the tensors that are to be loaded with a configuration, see [`check_weights`].

    Those of SAM 3's tracker that lie among the detector's are then read, as `state_dict` of the `arguments`.
    """
    variant, found = arguments.get("variant"), arguments.get("state_dict")
    if found is None:
        found = read_headers(source, hub, variant)
    has_detector = base_of(config) is SAM3 and is_combined(found)
    own = tracker_headers(source, found) if has_detector else found
    new_layers = check_weights(source, own, config, more_experts, any_experts)
    if has_detector:
        arguments["state_dict"] = read_tracker(source, hub, variant)
    return new_layers


def _check_given(
    source: Any, config: Any, of_original: tuple, quantization_config: Any, others: Mapping[str, Any]
) -> None:
    """Raises a `ValueError` for an argument of `from_pretrained` with its name elsewhere, or if nothing is given."""
    for name in OLD_ARGUMENTS.keys() & others:
        raise InputError(f"`{name}` is called `{OLD_ARGUMENTS[name]}` here.")
    check_old_names(others)
    if source is None and config is None:
        raise InputError("`pretrained_model_name_or_path` must be given: a folder, a Hub id or an original `.pt`.")
    if source is None and quantization_config is not None:
        raise InputError("`quantization_config` needs `pretrained_model_name_or_path`, where the full base is.")
    if of_original != (None, None) and not is_original_checkpoint(source):
        raise InputError(
            f"`experts` and `original_config` go with an original checkpoint, but {str(source)!r} is not a file."
        )


def _read_original(
    source: str | os.PathLike, experts: str | os.PathLike | None, original_config: str | os.PathLike | None
) -> tuple[SamoeConfig, dict[str, Tensor]]:
    try:
        from samoe_hf.original.checkpoint import load_original
    except ImportError as error:
        raise ImportError(f"{source} is an original checkpoint, which only the package samoe_hf reads.") from error
    return load_original(source, experts, original_config)


def _describe_source(
    source: str | os.PathLike, arguments: dict[str, Any], original_config: str | os.PathLike | None
) -> dict[str, str | None]:
    """What to load a model from again: a Hub id with its commit, local files by their absolute paths."""
    return {
        "name_or_path": os.path.abspath(source) if os.path.exists(source) else str(source),
        "revision": arguments.get("revision"),
        "subfolder": arguments.get("subfolder") or None,
        "original_config": None if original_config is None else os.path.abspath(original_config),
    }


def _align_memory(model: nn.Module) -> None:
    """Moves weights on the CPU that were mapped from a file at odd addresses, where kernels add up in another order.

    So a model that was saved and loaded gives the same output to the bit.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
