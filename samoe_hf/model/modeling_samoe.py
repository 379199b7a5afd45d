"""SamoeModel: SAM 2 video with a mixture of LoRA experts. It tracks in a session and learns from clips."""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from huggingface_hub import CommitInfo
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoSegmentationOutput
from transformers.processing_utils import Unpack
from transformers.utils import PROCESSOR_NAME, requires_backends
from transformers.utils import logging as transformers_logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapters import (
    active_adapters,
    adapter_names,
    adapters_aside,
    check_adapters_on_experts,
    is_adapter_parameter,
    load_adapter,
    plain_name,
    put_adapter,
    save_adapters,
    suitable_adapter,
    to_wrapped_names,
    train_adapter,
    without_adapters,
)
from .base import InferenceSession
from .base_model import SamoePreTrainedModel
from .clip import SamoeClipOutput, checkpoint_frames, clip_forward, non_reentrant, read_clips
from .configuration_samoe import SamoeConfig
from .domain_choice import AUTO, check_domain
from .domain_files import domain_of_tensor, split_domains, write_domain_files
from .errors import InputError
from .expert_layer import has_effect
from .expert_sleep import wake_experts
from .kept import keep_between
from .loading import LoadRequest, load_model
from .processing_samoe import VideoProcessor, build_processor
from .prompt_recipe import PromptRecipe
from .session import clear_prompts, end_object, remove_object
from .summary import ModelSummary, summarize_model
from .tracking import (
    Steps,
    TrackingStep,
    encoding_ahead,
    frame_steps,
    propagate_from_prompts,
    run_alone,
    run_steps,
    start_propagation,
    track_frame,
)
from .trainable import parameter_names, set_trainable, train_experts
from .weights_check import check_described
from .weights_io import updated_folder
from .weights_trained import check_not_its_base, save_trained

# As loud as transformers is told to be.
logger = transformers_logging.get_logger(f"transformers.{__name__}")

if TYPE_CHECKING:
    try:  # noqa: SIM105  # what remote code imports elsewhere, transformers asks for
        from peft import PeftConfig
    except ImportError:
        pass


class ForwardOptions(TypedDict, total=False):
    """Further arguments of [`SamoeModel.forward`].

    `input_labels` is among them because Trainer takes every named argument with "label" in its name for labels.
    """

    input_labels: Tensor
    steps: Sequence[TrackingStep]
    return_dict: bool


class SamoeModel(SamoePreTrainedModel):
    """SAM 2 video whose linear layers, by default the projections of its memory attention, have LoRA experts.

    It takes the place of [`~transformers.Sam2VideoModel`] in tracking, and can be trained on clips. After construction
    only experts and routers are trainable; see [`set_trainable`]. What changes a model, such as a further domain, is in
    `samoe_hf.surgery`.
    """

    supports_gradient_checkpointing = True
    # Trainer passes `num_items_in_batch`.
    accepts_loss_kwargs = True

    def __init__(self, config: SamoeConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(to_wrapped_names)
        self.register_load_state_dict_post_hook(_take_loaded)
        train_experts(self)
        self._checked_adapters: list[str] = []
        # Whether whoever loads a checkpoint's own tensors then reads what lies in files beside them.
        self.reads_files_beside = False

    # What is trained

    def set_trainable(self, *sets: str) -> None:
        """Makes exactly the parameters of the named sets trainable.

        Args:
            sets: any of "experts" (all experts and routers), "domain:NAME" (those of one domain), "adapters" (those of
                PEFT), "memory" (memory attention with its experts, memory encoder and what belongs to them), "decoder"
                (mask decoder), the last two without adapters, "all"; or regular expressions for whole names of
                parameters.

        Raises:
            ValueError: if a set is empty, or a parameter is quantized.
        """
        set_trainable(self, *sets)

    def parameter_names(self, chosen: str) -> list[str]:
        """Names of the parameters of a set, see [`set_trainable`]."""
        return parameter_names(self, chosen)

    def wake_experts(self) -> None:
        """Lets new experts compete where routers are trainable; the first training step calls it.

        Raises:
            InputError: if the weights are sharded (FSDP), so that there are no whole rows. Wake them before.
        """
        if self.may_have_sleeping_experts:  # looking at the biases would wait for the GPU in each training step
            wake_experts(self)
            self.may_have_sleeping_experts = False

    def summary(self) -> ModelSummary:
        """All parameters, the trainable and the frozen ones, and the experts of each domain; it can be printed."""
        return summarize_model(self)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """As in the base class; `every_n_layers` also counts frames, each of which is checkpointed as a whole."""
        options = {} if every_n_layers == 1 else {"every_n_layers": every_n_layers}
        super()._set_gradient_checkpointing(enable, non_reentrant(gradient_checkpointing_func), **options)
        if enable:
            checkpoint_frames(self, every_n_layers)

    def enable_input_require_grads(self) -> None:
        """Does nothing: what is recomputed here needs no gradients of its inputs, and a frozen image encoder with some
        would be run backward. transformers and PEFT ask for them where a model has adapters and checkpoints."""

    # The forward pass

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | InferenceSession | None = None,
        labels: Tensor | None = None,
        object_mask: Tensor | None = None,
        prompts: str | PromptRecipe = "mask",
        input_points: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
        output_router_logits: bool | None = None,
        inference_session: InferenceSession | None = None,
        frame_idx: int | None = None,
        frame: Tensor | None = None,
        reverse: bool = False,
        run_mem_encoder: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        domain: str | Sequence[str | None] | None = AUTO,
        **options: Unpack[ForwardOptions],
    ) -> SamoeClipOutput | Sam2VideoSegmentationOutput:
        """Runs over clips, or over one frame of a session.

        A clip: `model(pixel_values, labels)` simulates prompts on the first frame from the labels and returns the loss;
        without `labels`, prompts for the first frame are given as `input_*`, in pixels of the model's input.

        A session: `model(inference_session, frame_idx)` as with [`~transformers.Sam2VideoModel`]. Several sessions:
        `model(steps=…)`, see [`frame_steps`].

        Args:
            pixel_values: (B, T, 3, S, S), normalized frames; or a session, in the place that it has in Sam2VideoModel.
            labels: (B, N, T, S, S), the objects' masks: bool, or integers with -100 for padded objects.
            object_mask: (B, N) bool, False for padded objects.
            prompts: "mask", "point", "box" or "mixed" on the first frame; "sam2" for SAM 2's whole recipe with
                correction clicks; or a [`~prompts.PromptRecipe`].
            input_points: (B, N, P, 2) as (x, y), with `input_labels` (B, N, P): 1 positive, 0 negative.
            input_boxes: (B, N, 4) as (x0, y0, x1, y1).
            input_masks: (B, N, S, S).
            output_router_logits: whether to return the routers' logits; the configuration's value if None.
            inference_session, frame_idx, frame, reverse, run_mem_encoder: as in Sam2VideoModel.
            num_items_in_batch: elements of the labels of all objects that the loss is averaged over, as
                [`~transformers.Trainer`] counts them; by default those of this batch, averaged over processes.
            domain: of a model with domains, whose experts are run: a domain's name, None for the base model, or "auto"
                for what the gate decides; of clips, also one for each. A session keeps it as its `domain`.
            options: `input_labels`; `return_dict=False` for a tuple.
        """
        if unknown := sorted(set(options) - ForwardOptions.__annotations__.keys()):
            raise TypeError(f"`forward` has no argument {unknown[0]!r}.")
        if (adapters := adapter_names(self)) != self._checked_adapters:
            check_adapters_on_experts(self)  # those that PEFT has put into the model behind its first
            self._checked_adapters = adapters
        if (steps := options.pop("steps", None)) is not None:
            with torch.inference_mode():
                return run_steps(self, steps)  # pyright: ignore[reportReturnType]  # what comes of them is the sessions'
        if isinstance(pixel_values, InferenceSession):
            # Positional arguments in Sam2VideoModel's order: the session, then the frame's index, then the frame.
            inference_session = pixel_values
            frame_idx = frame_idx if labels is None else int(labels)
            frame = frame if object_mask is None else object_mask
        if inference_session is not None:
            return self._session_forward(inference_session, frame_idx, frame, reverse, run_mem_encoder, domain)
        given = (input_points, options.get("input_labels"), input_boxes, input_masks)
        clips = read_clips(pixel_values, labels, object_mask, prompts, given, self.config.image_size)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if self.training and torch.is_grad_enabled():
            self.wake_experts()
        return clip_forward(self, clips, domain, output_router_logits, num_items_in_batch)

    @torch.inference_mode()
    def _session_forward(
        self,
        session: InferenceSession,
        frame_idx: int | None,
        frame: Tensor | None,
        reverse: bool,
        run_mem_encoder: bool,
        domain: Any,
    ) -> Sam2VideoSegmentationOutput:
        if domain != AUTO:
            check_domain(self, domain)
            setattr(session, "domain", domain)  # noqa: B010  # transformers' sessions have none of their own
        if frame is not None:
            frame_idx = session.add_new_frame(frame, frame_idx)
        if frame_idx is None:
            raise InputError("With a session, `frame_idx` or `frame` must be given.")
        streaming = frame is not None
        (output,) = track_frame(
            self, [session], frame_idx, reverse=reverse, streaming=streaming, run_mem_encoder=run_mem_encoder
        )
        return output

    @torch.inference_mode()
    def track_together(
        self, inference_sessions: Sequence[InferenceSession], frame_idx: int, reverse: bool = False
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
    def frame_steps(self, inference_session: InferenceSession, frame_idx: int) -> Steps[Sam2VideoSegmentationOutput]:
        """What `model(inference_session, frame_idx)` does, in steps that can be run with those of other sessions.

        Each [`~tracking.TrackingStep`] must have been run, by `model(steps=[step, …])` with at most one of each
        session, when the iterator goes on. The sessions must be of one device and one type. The output comes last.

        Raises:
            ValueError: as `model(inference_session, frame_idx)`.
        """
        yield from frame_steps(self, inference_session, frame_idx)

    @torch.inference_mode()
    def steps_from_prompts(
        self,
        inference_session: InferenceSession,
        start_frame_idx: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
    ) -> Steps[Sam2VideoSegmentationOutput]:
        """What [`propagate_from_prompts_iterator`] does, in steps as those of [`frame_steps`]."""
        yield from propagate_from_prompts(self, inference_session, start_frame_idx, reverse, show_progress_bar)

    @torch.inference_mode()
    def propagate_in_video_iterator(
        self,
        inference_session: InferenceSession,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
    ) -> Iterator[Sam2VideoSegmentationOutput]:
        """As in Sam2VideoModel; it need not be called on the prompted frames first. Frames are encoded a few at a time
        where one alone would not fill the device."""
        for step in start_propagation(self, inference_session, start_frame_idx):
            run_steps(self, [step])
        with encoding_ahead(self, inference_session):
            outputs = super().propagate_in_video_iterator(
                inference_session,  # pyright: ignore[reportArgumentType]  # sessions of all bases have what it reads
                start_frame_idx,
                max_frame_num_to_track,
                reverse,
                show_progress_bar,
            )
            yield from keep_between(outputs)

    @torch.inference_mode()
    def propagate_from_prompts_iterator(
        self,
        inference_session: InferenceSession,
        start_frame_idx: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
    ) -> Iterator[Sam2VideoSegmentationOutput]:
        """Tracks each object as if it were alone: onward from its first prompt, then back from it to the start. An
        empty mask says where it is not, and is no first prompt. What an earlier call has found of an object before its
        first prompt is not read onward.

        `propagate_in_video_iterator` starts all objects on one frame instead, as `sam2` does. So it would track an
        object before its first prompt from its own future, and read these guesses later.

        Args:
            start_frame_idx: only onward from this frame, or back from it if `reverse`. An object whose first prompt
                lies farther on is tracked from there. By default the whole video is tracked.

        Returns:
            the outputs of each frame, with all objects. Of the whole video, a frame between first prompts comes twice:
            on the way onward with the objects that have begun (`object_ids`), on the way back with all.

        Raises:
            ValueError: if there is no object, a prompt cannot be used, or objects are added or removed meanwhile.
        """
        yield from run_alone(
            self, self.steps_from_prompts(inference_session, start_frame_idx, reverse, show_progress_bar)
        )

    def clear_prompts(self, inference_session: InferenceSession, frame_idx: int, obj_id: int) -> None:
        """Removes the points, box or mask of an object on a frame, as `sam2`'s `clear_all_prompts_in_frame` does.

        Raises:
            ValueError: if there is no such object.
        """
        clear_prompts(inference_session, frame_idx, obj_id)

    def end_object(self, inference_session: InferenceSession, frame_idx: int | None, obj_id: int) -> None:
        """Says that an object is gone from a frame on: it has a mask of -1024 there, and leaves no memory.

        Args:
            frame_idx: after all of its prompts, in place of an earlier end; None takes the end back. Prompts on it, and
                after it, are refused.

        Raises:
            ValueError: if there is no such object, or no such frame.
        """
        end_object(inference_session, frame_idx, obj_id)

    def remove_object(self, inference_session: InferenceSession, obj_id: int, strict: bool = False) -> None:
        """Removes an object from a session, with all that is known of it; the others go on as before.

        Raises:
            ValueError: if `strict` and there is no such object.
        """
        remove_object(inference_session, obj_id, strict)

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        experts: str | os.PathLike | None = None,
        original_config: str | os.PathLike | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        quantization_config: QuantizationConfigMixin | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a model in evaluation mode, with only its experts and routers trainable.

        Args:
            pretrained_model_name_or_path: one of
                - a folder or Hub id of a SamoeModel;
                - a folder or Hub id of a SAM 2 video model, of EdgeTAM, or of SAM 3, whose tracker is taken: experts
                  without effect are added;
                - an original checkpoint, of SAM 2, SAM2-MoE, EdgeTAM or SAM 3 (a `.pt` file, or one of safetensors).
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
        given = (config, experts, original_config, output_loading_info, ignore_mismatched_sizes, quantization_config)
        request = LoadRequest(super().from_pretrained, pretrained_model_name_or_path, *given, kwargs)
        model, info = load_model(cls, request)
        return (model, info) if output_loading_info else model

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
            experts_only: writes only experts, routers and whatever else is trainable or not as in the base, and the
                name of the base model, which [`from_pretrained`] then fetches; and a processor, if there is none. By
                default so where the base is quantized, and else not.
            processor: is saved as well.
            base_model: with `experts_only`, the Hub id to refer to, if the base was loaded from somewhere else. It is
                loaded, to see that it is the same.
            kwargs: other arguments of the base class, and with `push_to_hub` those of [`push_to_hub`].

        Raises:
            ValueError: with `experts_only`, if there is no base model, `base_model` is another one, or `save_directory`
                holds the base model; if it is False and the base is quantized.
            TypeError: for an argument that is none of these.
        """
        kwargs.pop("save_function", None)  # accelerate's examples give one, which transformers does not use either
        of_saving = inspect.signature(PreTrainedModel.save_pretrained).parameters.keys()
        of_pushing = inspect.signature(SamoeModel.push_to_hub).parameters.keys() - of_saving
        if unknown := sorted(kwargs.keys() - of_saving - of_pushing):
            raise TypeError(f"`save_pretrained` has no argument {unknown[0]!r}.")
        commit = {name: kwargs.pop(name) for name in [*kwargs] if name in of_pushing or name == "token"}
        experts_only = self._saves_experts_only(experts_only)
        check_described(self, self.config)
        if experts_only:
            check_not_its_base(self, save_directory)
            if (variant := kwargs.get("variant")) is not None:
                raise InputError(f"`variant` does not go with `experts_only`, got {variant!r}.")
        is_main_process = kwargs.get("is_main_process", True)
        self.config.adapters = active_adapters(self)
        self.config.base_model = None  # a model that was built of the configuration of what was trained is whole
        tensors, of_domains = split_domains(without_adapters(self.state_dict() if state_dict is None else state_dict))
        if is_main_process or not experts_only:
            with updated_folder(save_directory) as folder:
                own_processor: VideoProcessor | None = processor
                if experts_only:
                    save_trained(self, folder, tensors, base_model)
                    if processor is None and not Path(save_directory, PROCESSOR_NAME).exists():
                        own_processor = build_processor(self.config)
                else:
                    with adapters_aside(self):
                        super().save_pretrained(folder, state_dict=tensors, **kwargs)
                if is_main_process:
                    write_domain_files(folder, of_domains, kwargs.get("variant"))
                    save_adapters(self, folder)
                if own_processor is not None:
                    own_processor.save_pretrained(folder)
        if push_to_hub:
            commit.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(experts_only=experts_only, processor=processor, base_model=base_model, **commit)

    def _saves_experts_only(self, experts_only: bool | None) -> bool:
        is_quantized = bool(self.origin.quantized)
        if experts_only is False and is_quantized:
            raise InputError("`experts_only` must be True where the base is quantized: only what was trained is saved.")
        return is_quantized if experts_only is None else experts_only

    def push_to_hub(  # pyright: ignore[reportIncompatibleVariableOverride]  # transformers wraps its own
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
            card: arguments of [`model_card.build_model_card`]. With None, a card that is there stays but for `tags`.
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
        return push(
            self,
            repo_id,
            experts_only=self._saves_experts_only(experts_only),
            base_model=base_model,
            processor=processor,
            card=card,
            tags=tags,
            max_shard_size=max_shard_size,
            commit={"commit_message": commit_message, "commit_description": commit_description, "create_pr": create_pr},
            private=private,
            token=token,
            revision=revision,
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """From now on this package's code is saved with models, for `AutoModel.from_pretrained(…,
        trust_remote_code=True)` where the package is not installed."""
        super().register_for_auto_class(auto_class)
        SamoeConfig.register_for_auto_class()

    # Adapters of PEFT

    def __setattr__(self, name: str, value: Any) -> None:
        """As any module's. PEFT sets `peft_config` when it has put an adapter into the model.

        Raises:
            ValueError: if that adapter would drop the experts of a layer.
        """
        if name == "peft_config":
            check_adapters_on_experts(self)
            if not self._hf_peft_config_loaded and has_effect(self):  # by `get_peft_model`, and not by `add_adapter`
                logger.warning(
                    "`get_peft_model` has frozen the experts, and `PeftModel.save_pretrained` leaves them out. Save "
                    "the SamoeModel itself, `get_base_model()`, to keep them."
                )
        super().__setattr__(name, value)

    def add_adapter(self, adapter_config: "PeftConfig", adapter_name: str | None = None) -> None:
        """Adds a LoRA of PEFT, trainable and active. Experts and whatever else is trainable stay so.

        Raises:
            ValueError: if it is no LoRA or changes the base's tensors, there is one of that name, or no layer matches.
        """
        requires_backends(self, "peft")
        adapter_config = suitable_adapter(self, adapter_config, adapter_name or "default")
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            super().add_adapter(adapter_config, adapter_name)
        finally:
            self._hf_peft_config_loaded = bool(adapter_names(self))
            for parameter in trainable:
                parameter.requires_grad_(True)
        self.train(self.training)

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike | None = None,
        adapter_name: str | None = None,
        peft_config: "PeftConfig | dict[str, Any] | None" = None,
        adapter_state_dict: dict[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        hotswap: bool | Literal["auto"] = "auto",
        local_files_only: bool = False,
        adapter_kwargs: dict[str, Any] | None = None,
        **hub,
    ) -> None:
        """Loads a LoRA of PEFT, and makes it active. Its tensors are compared with the model before they are loaded.

        Args:
            peft_model_id: folder or Hub id.
            adapter_name: "default" if not given.
            peft_config, adapter_state_dict: instead of `peft_model_id`, what it would hold.
            low_cpu_mem_usage: has no effect here, since adapters are small.
            is_trainable: whether it is to be trained.
            hotswap: whether to take the place of the adapter of that name, which must be there; False if it must not be
                there. By default it is replaced if it is there.
            local_files_only, adapter_kwargs, hub: how it is fetched, such as `revision`, `token`, `subfolder`.

        Raises:
            ValueError: if it does not fit the model, or `hotswap` does not.
        """
        requires_backends(self, "peft")
        name = adapter_name or "default"
        is_there = name in adapter_names(self)
        if hotswap != "auto" and bool(hotswap) != is_there:
            state = "has an adapter" if is_there else "has no adapter"
            raise InputError(f"`hotswap` is {hotswap}, but the model {state} of the name {name!r}.")
        hub |= {"local_files_only": True} if local_files_only else {}
        hub |= adapter_kwargs or {}
        if peft_model_id is not None:
            load_adapter(self, peft_model_id, name, hub)
        elif peft_config is None or adapter_state_dict is None:
            raise InputError("Either `peft_model_id`, or `peft_config` and `adapter_state_dict` must be given.")
        else:
            put_adapter(self, "`adapter_state_dict`", name, peft_config, adapter_state_dict)
        train_adapter(self, name, is_trainable)


def _take_loaded(model: SamoeModel, loaded: Any) -> None:
    """After tensors were loaded, `wake_experts` has to look again. An `InputError` if these were a folder's own alone,
    without trainable ones in files beside them: transformers' Trainer would go on from others."""
    model.may_have_sleeping_experts = True
    missing = set(loaded.missing_keys)
    beside = {n: p for n, p in model.named_parameters() if is_adapter_parameter(n) or domain_of_tensor(plain_name(n))}
    if model.reads_files_beside or missing != beside.keys():
        return
    if trained := sorted(name for name, parameter in beside.items() if parameter.requires_grad):
        raise InputError(
            "`state_dict` has all tensors but those that `save_pretrained` writes to their own files, of domains and "
            f"adapters, as {trained[0]!r}. `from_pretrained` reads them, and SamoeTrainer when it goes on or takes "
            "the best model; transformers' Trainer does not."
        )
