"""SamoeModel: SAM 2 video with a mixture of LoRA experts. It tracks in a session and learns from clips."""

import copy
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, ProcessorMixin, Sam2VideoInferenceSession, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoSegmentationOutput
from transformers.utils import PROCESSOR_NAME

from .adapters import (
    AdapterMixin,
    active_adapters,
    adapters_aside,
    base_name,
    is_adapter_parameter,
    load_adapters,
    save_adapters,
    to_wrapped_names,
    without_adapters,
)
from .checkpoints import HUB_ARGUMENTS, check_weights, load_trained, resolve_commit, save_trained
from .clip import ClipPrompts, SamoeClipOutput, check_clip, clip_forward, prompt_from_inputs
from .configuration_samoe import SamoeConfig
from .expert_surgery import freeze_experts, grow_experts, merge_experts, prune_experts, reset_expert, wake_experts
from .experts import EXPERT_TENSORS, ExpertLinear, add_experts, is_expert_parameter
from .files import updated_folder
from .interaction import clear_prompts, remove_object
from .lora_exchange import add_expert, export_expert
from .losses import SegmentationLoss
from .memory_attention import attend_to_memory
from .processor import build_processor
from .prompts import PromptRecipe, resolve_recipe
from .sam2_modules import make_lean
from .tracking import encoding_ahead, start_propagation, track_frame

logger = logging.getLogger(__name__)

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

# What `output_loading_info` tells of; nothing of it is tolerated in folders that hold only what was trained.
LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
# Parameters of the model itself that are tokens or encodings, and the position encodings of its backbone.
TOKEN_PARAMETERS = re.compile(
    r"no_\w+|memory_temporal_positional_encoding|occlusion_spatial_embedding_parameter|vision_encoder\..*pos_embed\w*"
)
# Of `torch.compile`; see `compile_for_tracking`.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
TRAINABLE_SETS = {
    "experts": is_expert_parameter,
    "adapters": is_adapter_parameter,
    "memory": re.compile(
        r"(memory_attention|memory_encoder|object_pointer_proj|mask_downsample)\..*"
        r"|temporal_positional_encoding_projection_layer\..*"
        r"|memory_temporal_positional_encoding|occlusion_spatial_embedding_parameter"
        r"|no_memory_embedding|no_memory_positional_encoding|no_object_pointer"
    ).fullmatch,
    "decoder": re.compile(r"mask_decoder\..*").fullmatch,
    "all": lambda name: True,
}


class SamoeModel(AdapterMixin, Sam2VideoModel):
    """SAM 2 video whose linear layers, by default the projections of its memory attention, have LoRA experts.

    It takes the place of [`~transformers.Sam2VideoModel`] in tracking, and can be trained on clips. After construction
    only experts and routers are trainable; see [`set_trainable`].
    """

    config_class = SamoeConfig
    config: SamoeConfig
    supports_gradient_checkpointing = True
    # What FSDP shards one by one, and what is never split over devices. Layers of the memory attention are not called
    # as modules (see memory_attention.py), and belong to the rest.
    _no_split_modules: ClassVar = ["Sam2MultiScaleBlock", "Sam2VideoTwoWayAttentionBlock"]

    def __init__(self, config: SamoeConfig):
        config.check_experts()
        super().__init__(config)
        make_lean(self)
        self.expert_names = add_experts(
            self,
            config.expert_modules,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
        )
        # SAM 2's image model has patterns for tensors of the video model, which here are expected or an error.
        self._keys_to_ignore_on_load_unexpected = set()
        if self.device.type != "meta":
            self.reset_parameters()
        self.set_trainable("experts")
        self.register_load_state_dict_pre_hook(to_wrapped_names)
        # What this model was loaded from, for folders that hold only what was trained; see hub.py.
        self.base_model_source: dict[str, str | None] | None = None
        # Other tensors than the experts' that are not the base's, whether or not they are trainable now.
        self.differs_from_base: set[str] = set()
        # Compiled in its place by `compile_for_tracking`.
        self.attend_to_memory = attend_to_memory
        # Of training on clips: the loss, whether frames are recomputed, frames encoded at once (None for all), and
        # where a frozen encoder's features are kept.
        self.segmentation_loss = SegmentationLoss()
        self.gradient_checkpointing = False
        self.encoder_batch_size: int | None = None
        self.feature_cache: Any = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all parameters anew, as `sam2` does; from transformers' narrower draw it hardly learns from scratch."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, ExpertLinear):
                module.reset_experts()
        for name, parameter in self.named_parameters():
            if TOKEN_PARAMETERS.fullmatch(name):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith(".scale"):
                nn.init.constant_(parameter, self.config.memory_fuser_layer_scale_init_value)
        # Points and image positions are encoded with one matrix.
        image_embedding, point_embedding = self.shared_image_embedding, self.prompt_encoder.shared_embedding
        point_embedding.positional_embedding.copy_(image_embedding.positional_embedding)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        experts: str | os.PathLike | None = None,
        original_config: str | os.PathLike | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ) -> "SamoeModel":
        """Loads a model in evaluation mode, with only its experts and routers trainable.

        Args:
            pretrained_model_name_or_path: one of
                - a folder or Hub id of a SamoeModel;
                - a folder or Hub id of a SAM 2 video model: experts without effect are added;
                - an original checkpoint, of SAM 2 or SAM2-MoE (a `.pt` file).
            experts: with an original checkpoint, a file of experts that SAM2-MoE's trainers saved.
            original_config: with an original checkpoint, its YAML; needed for sizes other than Meta's.
            kwargs: as in [`~transformers.PreTrainedModel.from_pretrained`]; values of [`SamoeConfig`] can be set too.
                Where `expert_modules` is set, layers without experts in the checkpoint get new ones, without effect.
                With `ignore_mismatched_sizes`, experts of another number or rank, or in other layers, than the
                configuration's are left out, and new ones take their place; other tensors must fit.

        Raises:
            FileNotFoundError: if there is no such `.pt` file.
            ValueError: if tensors other than the experts' are missing, or any is unexpected; for a file, see
                [`conversion.load_original`].
        """
        source = pretrained_model_name_or_path
        any_experts = kwargs.pop("ignore_mismatched_sizes", False)
        more_experts = any_experts or "expert_modules" in kwargs
        is_file = source is not None and (Path(source).is_file() or Path(source).suffix in (".pt", ".pth"))
        if not is_file and (experts is not None or original_config is not None):
            raise ValueError(
                f"`experts` and `original_config` go with an original checkpoint, but {str(source)!r} is not a file."
            )
        config = copy.deepcopy(config)
        settings = [name for name in kwargs if name in SamoeConfig.__dataclass_fields__ and name != "dtype"]
        if is_file:
            try:
                from samoe_hf.original.checkpoint import load_original
            except ImportError as error:
                raise ImportError(
                    f"{source} is an original checkpoint; reading it needs the package samoe_hf."
                ) from error
            original, kwargs["state_dict"] = load_original(source, experts, original_config)
            config = original if config is None else config
        elif source is not None:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            if (commit := resolve_commit(source, hub)) is not None:
                hub["revision"] = kwargs["revision"] = commit
            if not isinstance(config, SamoeConfig):
                config = SamoeConfig.from_pretrained(source if config is None else config, **hub)
        if settings and config is not None:
            for name in settings:
                setattr(config, name, kwargs.pop(name))
            config.check_experts()
        if source is not None and not is_file:
            if config.base_model is not None:
                others = {name: value for name, value in kwargs.items() if name not in hub}
                model = load_trained(cls, source, config, hub, others, more_experts)
                load_adapters(model, source, config.adapters, hub)
                return (model, {name: set() for name in LOADING_INFO}) if output_loading_info else model
            if "state_dict" not in kwargs:
                check_weights(source, config, hub, kwargs.get("variant"), any_experts)
        with _without_load_report():
            model, info = super().from_pretrained(
                None if is_file else source,
                *model_args,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # _check_loaded is stricter
                **kwargs,
            )
        _align_memory(model)
        if new := _check_loaded(source, model, info, more_experts, any_experts):
            # Left to transformers, those within the vision encoder would stay uninitialized memory.
            for name in new:
                model.get_submodule(name).reset_experts()
            logger.info("%s has no such experts for %d layers: they got new ones, without effect.", source, len(new))
        model.set_trainable("experts")
        if source is not None:
            model.base_model_source = _describe_source(source, kwargs, original_config)
        if source is not None and not is_file:
            load_adapters(model, source, config.adapters, hub)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        experts_only: bool = False,
        state_dict: dict | None = None,
        processor: ProcessorMixin | None = None,
        base_model: str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in the base class, with all adapters of PEFT; if anything fails, the folder is left as it was.

        Args:
            experts_only: writes only experts, routers and whatever else is trainable, and the name of the base model,
                which [`from_pretrained`] then fetches; and a processor, if there is none.
            processor: is saved as well.
            base_model: with `experts_only`, the Hub id to refer to, if the base was loaded from somewhere else. It is
                loaded, to see that it is the same.

        Raises:
            ValueError: with `experts_only`, if there is no base model or `base_model` is another one.
        """
        commit = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        self.config.adapters = active_adapters(self)
        if self.config.adapters:
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
        experts_only: bool = False,
        base_model: str | None = None,
        processor: ProcessorMixin | None = None,
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
            from samoe_hf.hub.push import push
        except ImportError as error:
            raise ImportError("`push_to_hub` of a SamoeModel needs the package samoe_hf.") from error
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

    def set_trainable(self, *sets: str) -> None:
        """Makes exactly the parameters of the named sets trainable.

        Args:
            sets: any of "experts" (all experts and routers), "adapters" (those of PEFT), "memory" (memory attention
                with its experts, memory encoder and what belongs to them), "decoder" (mask decoder), "all"; or regular
                expressions for whole names of parameters.

        Raises:
            ValueError: if a set is empty.
        """
        names = {name for chosen in sets for name in self.parameter_names(chosen)}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)

    def parameter_names(self, chosen: str) -> list[str]:
        """Names of the parameters of a set, see [`set_trainable`]."""
        matches = TRAINABLE_SETS[chosen] if chosen in TRAINABLE_SETS else re.compile(chosen).fullmatch
        names = [name for name, _ in self.named_parameters() if matches(base_name(name))]
        if not names:
            known = ", ".join(map(repr, TRAINABLE_SETS))
            raise ValueError(f"`sets` must be among {known} or expressions that match parameters, got {chosen!r}.")
        return names

    # Experts as parts: see lora_exchange.py and surgery.py.
    export_expert = export_expert
    add_expert = add_expert
    prune_experts = prune_experts
    merge_experts = merge_experts
    reset_expert = reset_expert
    grow_experts = grow_experts
    freeze_experts = freeze_experts
    wake_experts = wake_experts

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trainable, as PEFT does."""
        trainable, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def compile_for_tracking(self, **kwargs) -> None:
        """Compiles the four parts of a frame's work, in place: the encoders, memory attention and the mask decoder.

        The first frames are slow. Nothing is compiled again as memory fills or the number of objects changes, except
        between one object and several. Training runs the same parts, and gains as well.

        Args:
            kwargs: of [`torch.compile`], such as `mode="reduce-overhead"`. In modes with CUDA graphs, a graph is
                recorded for each size that occurs, and what a part puts out is copied, since its graph's next run
                overwrites it.
        """
        self.vision_encoder.compile(**kwargs)
        self.mask_decoder.compile(dynamic=True, **kwargs)
        self.memory_encoder.compile(dynamic=True, **kwargs)
        self.attend_to_memory = torch.compile(attend_to_memory, dynamic=True, **kwargs)
        graphs_by_option = (kwargs.get("options") or {}).get("triton.cudagraphs", False)
        if kwargs.get("mode") in CUDA_GRAPH_MODES or graphs_by_option:
            for module in (self.vision_encoder, self.mask_decoder, self.memory_encoder):
                module._compiled_call_impl = _with_copied_outputs(module._compiled_call_impl)
            self.attend_to_memory = _with_copied_outputs(self.attend_to_memory)

    def forward(
        self,
        pixel_values: Tensor | Sam2VideoInferenceSession | None = None,
        labels: Tensor | None = None,
        object_mask: Tensor | None = None,
        prompts: str | PromptRecipe = "mask",
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
        output_router_logits: bool | None = None,
        inference_session: Sam2VideoInferenceSession | None = None,
        frame_idx: int | None = None,
        frame: Tensor | None = None,
        reverse: bool = False,
        run_mem_encoder: bool = True,
    ) -> SamoeClipOutput | Sam2VideoSegmentationOutput:
        """Runs over clips, or over one frame of a session.

        A clip: `model(pixel_values, labels)` simulates prompts on the first frame from the labels and returns the loss;
        without `labels`, prompts for the first frame are given as `input_*`, in pixels of the model's input.

        A session: `model(inference_session, frame_idx)` as with [`~transformers.Sam2VideoModel`].

        Args:
            pixel_values: (B, T, 3, S, S), normalized frames; or a session, in the place that it has in Sam2VideoModel.
            labels: (B, N, T, S, S) bool, the objects' masks.
            object_mask: (B, N) bool, False for padded objects.
            prompts: "mask", "point", "box" or "mixed" on the first frame; "sam2" for SAM 2's whole recipe with
                correction clicks; or a [`~prompts.PromptRecipe`].
            input_points: (B, N, P, 2) as (x, y), with `input_labels` (B, N, P): 1 positive, 0 negative.
            input_boxes: (B, N, 4) as (x0, y0, x1, y1).
            input_masks: (B, N, S, S).
            output_router_logits: whether to return the routers' logits; the configuration's value if None.
            inference_session, frame_idx, frame, reverse, run_mem_encoder: as in Sam2VideoModel.
        """
        if isinstance(pixel_values, Sam2VideoInferenceSession):
            # Positional arguments in Sam2VideoModel's order: the session, then the frame's index, then the frame.
            inference_session = pixel_values
            frame_idx = frame_idx if labels is None else labels
            frame = frame if object_mask is None else object_mask
        if inference_session is not None:
            return self._session_forward(inference_session, frame_idx, frame, reverse, run_mem_encoder)
        check_clip(pixel_values, labels, object_mask, self.image_size)
        given = (input_points, input_labels, input_boxes, input_masks)
        if labels is not None and all(value is None for value in given):
            num_objects = labels.shape[1]
            clip_prompts = ClipPrompts.simulate(resolve_recipe(prompts), labels)
        else:
            prompt, num_objects = prompt_from_inputs(*given)
            clip_prompts = ClipPrompts({0: prompt})
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if self.training and torch.is_grad_enabled():
            self.wake_experts()
        return clip_forward(self, pixel_values, clip_prompts, num_objects, labels, object_mask, output_router_logits)

    @torch.inference_mode()
    def _session_forward(
        self,
        session: Sam2VideoInferenceSession,
        frame_idx: int | None,
        frame: Tensor | None,
        reverse: bool,
        run_mem_encoder: bool,
    ) -> Sam2VideoSegmentationOutput:
        if frame is not None:
            frame_idx = session.add_new_frame(frame, frame_idx)
        streaming = frame is not None
        (output,) = track_frame(
            self, [session], frame_idx, reverse=reverse, streaming=streaming, run_mem_encoder=run_mem_encoder
        )
        return output

    @torch.inference_mode()
    def track_together(
        self, inference_sessions: Sequence[Sam2VideoInferenceSession], frame_idx: int, reverse: bool = False
    ) -> list[Sam2VideoSegmentationOutput]:
        """Segments a frame of several videos at once, objects of equal memories in one batch.

        Args:
            inference_sessions: of any sizes and objects, on one device and of one type.
            frame_idx: a frame that all of them have.
            reverse: whether time runs backward.

        Returns:
            for each session what `model(session, frame_idx)` gives.
        """
        return track_frame(self, inference_sessions, frame_idx, reverse=reverse)

    @torch.inference_mode()
    def propagate_in_video_iterator(
        self,
        inference_session: Sam2VideoInferenceSession,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
    ) -> Iterator[Sam2VideoSegmentationOutput]:
        """As in Sam2VideoModel; it need not be called on the prompted frames first. Frames are encoded a few at a time
        where one alone would not fill the device."""
        start_propagation(self, inference_session, start_frame_idx)
        with encoding_ahead(self, inference_session):
            yield from super().propagate_in_video_iterator(
                inference_session, start_frame_idx, max_frame_num_to_track, reverse, show_progress_bar
            )

    def clear_prompts(self, inference_session: Sam2VideoInferenceSession, frame_idx: int, obj_id: int) -> None:
        """Removes the points, box or mask of an object on a frame, as `sam2`'s `clear_all_prompts_in_frame` does.

        Raises:
            ValueError: if there is no such object.
        """
        clear_prompts(inference_session, frame_idx, obj_id)

    def remove_object(self, inference_session: Sam2VideoInferenceSession, obj_id: int, strict: bool = False) -> None:
        """Removes an object from a session, with all that is known of it; the others go on as before.

        Raises:
            ValueError: if `strict` and there is no such object.
        """
        remove_object(inference_session, obj_id, strict)


# Trainer takes each argument with "label" in its name for one that evaluation needs, and `input_labels` is none.
_signature = inspect.signature(SamoeModel.forward)
SamoeModel.forward.__signature__ = _signature.replace(
    parameters=[parameter for name, parameter in _signature.parameters.items() if name != "input_labels"]
)


def _with_copied_outputs(compiled: Callable) -> Callable:
    """What a compiled function returns, in memory of its own."""

    def run(*args, **kwargs):
        return tree_map_only(Tensor, torch.clone, compiled(*args, **kwargs))

    return run


def _check_loaded(
    source: str | os.PathLike | None, model: SamoeModel, info: dict[str, Any], more_experts: bool, any_experts: bool
) -> list[str]:
    """Names of the layers whose experts a checkpoint lacks: none or all; or any, if it is to get `more_experts`.

    With `any_experts`, those of another number or rank than the configuration's count as lacking.

    Raises:
        ValueError: if other tensors are missing, any is unexpected or of another shape.
    """
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    missing, unexpected = set(info["missing_keys"]) - mismatched, set(info["unexpected_keys"])
    tensors = {name: {f"{name}.{tensor}" for tensor in EXPERT_TENSORS} for name in model.expert_names}
    if any_experts:
        unexpected = {name for name in unexpected if not is_expert_parameter(name)}
        for of_layer in tensors.values():
            if of_layer & mismatched:
                missing |= of_layer
                mismatched -= of_layer
    new = [name for name in tensors if tensors[name] <= missing]
    if more_experts or len(new) == len(tensors):
        missing -= set().union(*(tensors[name] for name in new))
    problems = [
        f"{len(names)} tensors are {what}, such as {min(names)!r}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", mismatched),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}.")
    return new


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


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Holds back transformers' warning about missing tensors, which [`_check_loaded`] judges more strictly."""
    library_logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    library_logger.addFilter(keep)
    try:
        yield
    finally:
        library_logger.removeFilter(keep)
