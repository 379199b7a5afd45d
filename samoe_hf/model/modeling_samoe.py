"""SamoeModel: SAM 2 video with a mixture of LoRA experts. It tracks in a session and learns from clips."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Sam2VideoModel
from transformers import initialization as init
from transformers.models.sam2_video.modeling_sam2_video import (
    Sam2VideoMemoryFuserCXBlock,
    Sam2VideoSegmentationOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils.generic import can_return_tuple

from .adapters import AdapterMixin, is_adapter_parameter, plain_name, to_wrapped_names
from .base import InferenceSession, base_of
from .base_modules import compile_parts, make_lean
from .clip import (
    ClipPrompts,
    SamoeClipOutput,
    check_clip,
    checkpoint_frames,
    clip_forward,
    non_reentrant,
    prompt_from_inputs,
    split_labels,
)
from .configuration_samoe import SamoeConfig
from .domain_choice import AUTO, check_domain
from .domain_experts import PREFIX as DOMAIN_PREFIX
from .domain_experts import add_configured_experts
from .domain_gate import add_domain_gate
from .errors import InputError
from .expert_layer import DOMAIN_GATE, ExpertMixture, is_expert_parameter
from .expert_sleep import wake_experts
from .interaction import clear_prompts, remove_object
from .loading import PretrainedMixin
from .losses import SegmentationLoss
from .memory_attention import attend_to_memory
from .prompts import PromptRecipe, resolve_recipe
from .quantization import check_can_be_trained
from .summary import ModelSummary, summarize_model
from .tracking import encoding_ahead, start_propagation, track_frame

# Parameters that are tokens or encodings of positions, of the model itself and of its backbone.
TOKEN_PARAMETERS = re.compile(
    r"no_\w+|memory_temporal_positional_encoding|occlusion_spatial_embedding_parameter|pos_embed\w*|position_embeddings"
)
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


class ForwardOptions(TypedDict, total=False):
    """Further arguments of [`SamoeModel.forward`].

    `input_labels` is among them because Trainer takes every named argument with "label" in its name for labels.
    """

    input_labels: Tensor
    return_dict: bool
    output_attentions: bool
    output_hidden_states: bool


class SamoeModel(AdapterMixin, PretrainedMixin, Sam2VideoModel):
    """SAM 2 video whose linear layers, by default the projections of its memory attention, have LoRA experts.

    It takes the place of [`~transformers.Sam2VideoModel`] in tracking, and can be trained on clips. After construction
    only experts and routers are trainable; see [`set_trainable`].
    """

    config_class = SamoeConfig
    config: SamoeConfig
    supports_gradient_checkpointing = True
    # Trainer passes `num_items_in_batch`.
    accepts_loss_kwargs = True
    # Statistics of features, whatever the type of the features is.
    _keep_in_fp32_modules_strict: ClassVar = [DOMAIN_GATE]

    def __init__(self, config: SamoeConfig):
        config.check_experts()
        super().__init__(config)
        make_lean(self)
        # What FSDP shards one by one, and what is never split over devices. Layers of the memory attention are not
        # called as modules (see memory_attention.py), and belong to the rest.
        self._no_split_modules = set(base_of(config).no_split_modules)
        self.expert_module_names = add_configured_experts(self, config)
        add_domain_gate(self)
        # SAM 2's image model has patterns for tensors of the video model, which here are expected or an error.
        self._keys_to_ignore_on_load_unexpected = set()
        # Layers whose weights are quantized, and fingerprints of the full base; see quantization.py and checkpoints.py.
        self.quantized_layers: frozenset[str] = frozenset()
        self.full_fingerprints: dict[frozenset[str], str] = {}
        self.set_trainable("experts")
        self.register_load_state_dict_pre_hook(to_wrapped_names)
        self.register_load_state_dict_post_hook(_expect_sleeping_experts)
        # What this model was loaded from, for folders that hold only what was trained; see weights_trained.py.
        self.base_model_source: dict[str, str | None] | None = None
        # Other tensors than the experts' that are not the base's, whether or not they are trainable now.
        self.differs_from_base: set[str] = set()
        # Compiled in its place by `compile_for_tracking`.
        self.attend_to_memory = attend_to_memory
        # Of training on clips: the loss, whether frames are recomputed, frames encoded at once (None for all), and
        # where a frozen encoder's features are kept.
        self.segmentation_loss = SegmentationLoss()
        self.gradient_checkpointing = False
        self.checkpoint_every_n_frames = 1
        self.encoder_batch_size: int | None = None
        self.feature_cache: Any = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws a module's parameters as `sam2` does. From transformers' narrower draw the model hardly learns."""
        super()._init_weights(module)  # for buffers
        if module is self:
            # A model of its own, whose modules transformers gives to its own `_init_weights`.
            for part in self.vision_encoder.modules():
                self._draw(part)
        self._draw(module)

    def _draw(self, module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, ExpertMixture) and not getattr(module.lora_A, "_is_hf_initialized", False):
            module.reset_experts()
        if isinstance(module, Sam2VideoMemoryFuserCXBlock):
            init.constant_(module.scale, self.config.memory_fuser_layer_scale_init_value)
        for name, parameter in module.named_parameters(recurse=False):
            if TOKEN_PARAMETERS.fullmatch(name):
                init.trunc_normal_(parameter, std=0.02)
        if module is self:
            # Points and image positions are encoded with one matrix.
            image, points = self.shared_image_embedding, self.prompt_encoder.shared_embedding
            init.copy_(points.positional_embedding, image.positional_embedding)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """As in the base class; `every_n_layers` also counts frames, each of which is checkpointed as a whole."""
        options = {} if every_n_layers == 1 else {"every_n_layers": every_n_layers}
        super()._set_gradient_checkpointing(enable, non_reentrant(gradient_checkpointing_func), **options)
        if enable:
            checkpoint_frames(self, every_n_layers)

    def set_trainable(self, *sets: str) -> None:
        """Makes exactly the parameters of the named sets trainable.

        Args:
            sets: any of "experts" (all experts and routers), "domain:NAME" (those of one domain), "adapters" (those of
                PEFT), "memory" (memory attention with its experts, memory encoder and what belongs to them), "decoder"
                (mask decoder), "all"; or regular expressions for whole names of parameters.

        Raises:
            ValueError: if a set is empty, or a parameter is quantized.
        """
        names = {name for chosen in sets for name in self.parameter_names(chosen)}
        check_can_be_trained(self, names)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)
        # Also after loading, surgery and freezing, which tell by this that `wake_experts` has to look.
        self.may_have_sleeping_experts = True

    def parameter_names(self, chosen: str) -> list[str]:
        """Names of the parameters of a set, see [`set_trainable`]."""
        if chosen.startswith("domain:"):
            check_domain(self, chosen.removeprefix("domain:"))
            chosen = rf".*\.{DOMAIN_PREFIX}{chosen.removeprefix('domain:')}\..*"
        try:
            matches = TRAINABLE_SETS[chosen] if chosen in TRAINABLE_SETS else re.compile(chosen).fullmatch
        except re.error as error:
            raise InputError(f"`sets` has {chosen!r}, which is no regular expression: {error}.") from error
        names = [name for name, _ in self.named_parameters() if matches(plain_name(name))]
        if not names:
            known = ", ".join(map(repr, TRAINABLE_SETS))
            raise InputError(f"`sets` must be among {known} or expressions that match parameters, got {chosen!r}.")
        return names

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trainable, as PEFT does."""
        trainable, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def summary(self) -> ModelSummary:
        """All parameters, the trainable and the frozen ones, and the experts of each domain; it can be printed."""
        return summarize_model(self)

    def compile_for_tracking(self, **kwargs) -> None:
        """Compiles the four parts of a frame's work, in place: the encoders, memory attention and the mask decoder.

        The first frames are slow. Nothing is compiled again as memory fills or the number of objects changes, except
        between one object and several. Training runs the same parts, and gains as well.

        Args:
            kwargs: of [`torch.compile`], such as `mode="reduce-overhead"`. In modes with CUDA graphs, a graph is
                recorded for each size that occurs, and what a part puts out is copied, since its graph's next run
                overwrites it.
        """
        compile_parts(self, ("vision_encoder",), **kwargs)
        compile_parts(self, ("mask_decoder", "memory_encoder", "attend_to_memory"), dynamic=True, **kwargs)

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

        A session: `model(inference_session, frame_idx)` as with [`~transformers.Sam2VideoModel`].

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
            options: `input_labels`; `return_dict=False` for a tuple; of a clip, `output_hidden_states` and
                `output_attentions` of the vision encoder, by default as the configuration says.
        """
        if unknown := sorted(set(options) - ForwardOptions.__annotations__.keys()):
            raise TypeError(f"`forward` has no argument {unknown[0]!r}.")
        self.check_new_adapters()
        if isinstance(pixel_values, InferenceSession):
            # Positional arguments in Sam2VideoModel's order: the session, then the frame's index, then the frame.
            inference_session = pixel_values
            frame_idx = frame_idx if labels is None else labels
            frame = frame if object_mask is None else object_mask
        if inference_session is not None:
            return self._session_forward(inference_session, frame_idx, frame, reverse, run_mem_encoder, domain)
        check_clip(pixel_values, labels, object_mask, self.image_size)
        if labels is not None:
            labels, object_mask = split_labels(labels, object_mask)
        given = (input_points, options.get("input_labels"), input_boxes, input_masks)
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
        with _recorded_vision_outputs(self, options) as recorded:
            output = clip_forward(
                self, pixel_values, clip_prompts, num_objects, labels, object_mask, output_router_logits,
                num_items_in_batch, domain,
            )  # fmt: skip
        output.vision_hidden_states, output.vision_attentions = recorded["hidden_states"], recorded["attentions"]
        return output

    @torch.inference_mode()
    def _session_forward(
        self,
        session: InferenceSession,
        frame_idx: int | None,
        frame: Tensor | None,
        reverse: bool,
        run_mem_encoder: bool,
        domain: str | None,
    ) -> Sam2VideoSegmentationOutput:
        if domain != AUTO:
            check_domain(self, domain)
            session.domain = domain
        if frame is not None:
            frame_idx = session.add_new_frame(frame, frame_idx)
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
        start_propagation(self, inference_session, start_frame_idx)
        with encoding_ahead(self, inference_session):
            yield from super().propagate_in_video_iterator(
                inference_session, start_frame_idx, max_frame_num_to_track, reverse, show_progress_bar
            )

    def wake_experts(self) -> None:
        """Lets new experts compete where routers are trainable; the first training step calls it.

        Raises:
            ValueError: if the weights are sharded (FSDP), so that there are no whole rows. Wake them before.
        """
        if self.may_have_sleeping_experts:  # looking at the biases would wait for the GPU in each training step
            wake_experts(self)
            self.may_have_sleeping_experts = False

    def clear_prompts(self, inference_session: InferenceSession, frame_idx: int, obj_id: int) -> None:
        """Removes the points, box or mask of an object on a frame, as `sam2`'s `clear_all_prompts_in_frame` does.

        Raises:
            ValueError: if there is no such object.
        """
        clear_prompts(inference_session, frame_idx, obj_id)

    def remove_object(self, inference_session: InferenceSession, obj_id: int, strict: bool = False) -> None:
        """Removes an object from a session, with all that is known of it; the others go on as before.

        Raises:
            ValueError: if `strict` and there is no such object.
        """
        remove_object(inference_session, obj_id, strict)


def _expect_sleeping_experts(model: SamoeModel, _: Any) -> None:
    """After tensors were loaded, `wake_experts` has to look again."""
    model.may_have_sleeping_experts = True


@contextmanager
def _recorded_vision_outputs(model: SamoeModel, options: ForwardOptions) -> Iterator[dict[str, tuple | None]]:
    """While the context is open, the vision encoder also gives the outputs that are asked for, which are yielded."""
    recorded: dict[str, tuple | None] = {"hidden_states": None, "attentions": None}
    flags = {
        name: options.get(name, getattr(model.config, name, False))
        for name in ("output_hidden_states", "output_attentions")
    }
    if not any(flags.values()):
        yield recorded
        return

    def record(_, __, ___, outputs: Any) -> None:
        for name in recorded:
            parts = getattr(outputs, name, None)
            if parts is not None:
                before = recorded[name]
                recorded[name] = parts if before is None else tuple(map(torch.cat, zip(before, parts, strict=True)))

    handles = [
        model.vision_encoder.register_forward_pre_hook(lambda _, a, k: (a, {**k, **flags}), with_kwargs=True),
        model.vision_encoder.register_forward_hook(record, with_kwargs=True),
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
