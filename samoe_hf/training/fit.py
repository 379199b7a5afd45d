"""Settings with which a training run fits a GPU, by a formula of the device memory that a training step holds.

The constants were fitted to steps whose tensors were counted; docs/small_gpus.md says how near the formula is.
"""

import copy
import shutil
from contextlib import suppress
from typing import Any

from samoe_hf.data import ClipStream, SampleError
from samoe_hf.errors import InputError
from samoe_hf.model.adapters import plain_name
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.prompt_recipe import PromptRecipe
from samoe_hf.model.quantization import weight_bytes

from .arguments import SamoeTrainingArguments, parse_size
from .feature_cache import encoder_has_dropout, encoder_tensors

# What a GPU holds besides tensors: its context with the libraries' work space, and a share for fragments.
CONTEXT_BYTES, FRAGMENTS = 2**30, 1.1
# Bytes under 16-bit autocast by token and channel of the memory attention. Of an object: a tracked frame, a memory that
# it reads, a click, a decoder that is trained, the loss, what recomputation keeps of a frame. Of a clip: a frame.
TRACKED, MEMORY, CLICK, DECODER, LOSS, KEPT, FRAME = 350, 56, 70, 200, 210, 6, 44
# Bytes by token and channel of a trained image encoder's blocks, without and with recomputation.
ENCODER, ENCODER_RECOMPUTED = 37, 3
# Bytes by pixel of a frozen encoder at work, and of a frame's features; and how much more all is in float32.
ENCODING, FEATURES, FLOAT32 = 280, 8, 1.5


def step_bytes(
    model: SamoeModel,
    num_frames: int,
    num_objects: int,
    recipe: PromptRecipe,
    clips: int = 1,
    checkpointing: bool = False,
    float32: bool = False,
) -> int:
    """All bytes that a GPU holds in a training step: tensors, fragments and its context."""
    config = model.config
    trained = {plain_name(name): p.nbytes for name, p in model.named_parameters() if p.requires_grad}
    # Where only what reads memory is trained, nothing is kept of the first frame and its clicks.
    all_frames = any(not name.startswith("memory_attention.") for name in trained)
    clicked = min(recipe.max_corrected_frames, num_frames) if recipe.point_probability > 0 else 0
    of_object = LOSS + DECODER * all_frames
    height, width = config.memory_attention_rope_feat_sizes
    if checkpointing:
        of_object += TRACKED + KEPT * num_frames + CLICK * recipe.num_correction_clicks * min(clicked, 1)
    else:
        of_object += TRACKED * (num_frames - 1 + all_frames)
        latents = len(model.base.memory_places(model, 1)) / (height * width)  # of a memory, for each token of a map
        of_object += MEMORY * latents * sum(min(t, config.num_maskmem) for t in range(num_frames))
        of_object += CLICK * recipe.num_correction_clicks * max(clicked - 1 + all_frames, 0)
    clip = height * width * config.memory_attention_hidden_size * (num_objects * of_object + FRAME * num_frames)
    if any(name.startswith("vision_encoder.") for name in trained):
        clip += num_frames * _encoder_size(model) * (ENCODER_RECOMPUTED if checkpointing else ENCODER)
    # Weights, and of what is trained gradients and AdamW's two moments.
    tensors = weight_bytes(model) + 3 * sum(trained.values()) + clips * clip * (FLOAT32 if float32 else 1)
    return int(tensors * FRAGMENTS) + CONTEXT_BYTES


def _encoder_size(model: SamoeModel) -> int:
    """Tokens times channels, summed over the blocks of the image encoder and the levels of its neck."""
    vision: Any = model.config.vision_config  # of SAM 2 or SAM 3
    backbone, side = vision.backbone_config, model.config.image_size
    size = vision.fpn_hidden_size * sum(height * width for height, width in vision.backbone_feature_sizes)
    if hasattr(backbone, "num_hidden_layers"):
        return size + backbone.num_hidden_layers * backbone.hidden_size * (side // backbone.patch_size) ** 2
    if not hasattr(backbone, "blocks_per_stage"):
        raise InputError("`fit` does not know how much this base's image encoder holds; freeze it, or leave out `fit`.")
    stages = zip(backbone.blocks_per_stage, backbone.embed_dim_per_stage, strict=True)
    return size + sum(blocks * width * (side // 4 >> i) ** 2 for i, (blocks, width) in enumerate(stages))


def fit_arguments(
    model: SamoeModel, args: SamoeTrainingArguments, recipe: PromptRecipe, dataset: Any
) -> SamoeTrainingArguments:
    """A copy of a run's arguments, with the settings that cost the least time of those that fit; prints them."""
    token, args, memory = args.hub_token, copy.copy(args), parse_size(str(args.fit))
    args.hub_token = token  # which no copy has
    parts = list(getattr(dataset, "datasets", {"": dataset}).values())
    samplers = [getattr(part, "sampler", None) for part in parts]
    if None in samplers:
        raise InputError("`fit` needs a training dataset of clips, which tells how many frames and objects they have.")
    frames, objects = (max(getattr(one, name) for one in samplers) for name in ("num_frames", "max_objects"))
    float32, total = args.mixed_precision == "no", args.per_device_train_batch_size * args.gradient_accumulation_steps
    tried = [
        (clips, checkpointing, step_bytes(model, frames, objects, recipe, clips, checkpointing, float32))
        for checkpointing in ([True] if args.gradient_checkpointing else [False, True])
        for clips in range(args.per_device_train_batch_size, 0, -1)
        if total % clips == 0
    ]
    fitting = [one for one in tried if one[2] <= memory]
    if not fitting:
        raise InputError(
            f"`fit` {args.fit} is too little for clips of {frames} frames and {objects} objects: even one at a time "
            f"with `gradient_checkpointing` needs {tried[-1][2] / 1e9:.1f} GB. Fewer `num_frames`, `max_objects`, "
            "`num_correction_clicks` or a smaller model need less."
        )
    clips, args.gradient_checkpointing, needed = fitting[0]
    if hasattr(args, "activation_checkpointing"):  # its newer name, which Trainer then reads
        args.activation_checkpointing = args.gradient_checkpointing
    args.per_device_train_batch_size, args.gradient_accumulation_steps = clips, total // clips
    if not any(tensor.requires_grad for _, tensor in encoder_tensors(model)):
        pixels, scale = model.config.image_size**2, FLOAT32 if float32 else 1
        room = (memory - CONTEXT_BYTES) / FRAGMENTS - weight_bytes(model)
        at_once = max(1, int(room / (ENCODING * scale * pixels)))
        if args.encoder_batch_size is None and at_once < clips * frames:
            args.encoder_batch_size = at_once
        if args.feature_cache is None and _can_be_cached(model, args, parts, FEATURES * scale * pixels):
            args.feature_cache = str(args.folder / "features")
    if args.process_index == 0:
        names = "per_device_train_batch_size, gradient_accumulation_steps, gradient_checkpointing, encoder_batch_size"
        chosen = [f"{name} {getattr(args, name)}" for name in [*names.split(", "), "feature_cache"]]
        print(f"fit {args.fit}: {', '.join(chosen)}.\nExpected: {needed / 1e9:.1f} GB.")
    return args


def _can_be_cached(model: SamoeModel, args: SamoeTrainingArguments, datasets: list[Any], frame_bytes: float) -> bool:
    """Whether frames come again with the same features, which take at most half of what is free on the disk."""
    if encoder_has_dropout(model, None) or any(o.sampler.transforms or isinstance(o, ClipStream) for o in datasets):
        return False
    output = args.folder.absolute()
    free = shutil.disk_usage(next(folder for folder in (output, *output.parents) if folder.exists())).free
    count = 0
    for videos, index in ((one.videos, index) for one in datasets for index in range(len(one.videos))):
        with suppress(SampleError, OSError):  # training says so, or leaves it out
            count += len(videos[index].frames)
    return 2 * frame_bytes * count <= free
