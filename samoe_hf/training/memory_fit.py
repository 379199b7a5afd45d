"""How much memory a training run needs, and the settings with which it fits a GPU.

The number comes from the model's own code: a training step runs on tensors without data, and the bytes of all tensors
that are alive at once are counted. So it holds for every configuration, and needs neither the memory nor a GPU.
"""

import copy
import os
import re
import shutil
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samoe_hf.errors import InputError
from samoe_hf.model.clip import ClipPrompts, clip_forward
from samoe_hf.model.domain_experts import PREFIX
from samoe_hf.model.frame_step import ImageFeatures, image_features, sine_periods
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.prompts import PromptRecipe, sample_prompt
from samoe_hf.model.quantization import in_full, quantized_modules, spared_bytes, weight_bytes

from .feature_cache import encoder_tensors

# What a GPU holds besides tensors: its context with the libraries' work space, and a share for fragments.
CONTEXT_BYTES, FRAGMENTS = 2**30, 0.1
# Allocators of GPUs hand out multiples of this.
BLOCK_BYTES = 512
# Of a feature cache, at most this share of the disk's free space.
CACHE_SHARE = 0.5
# The settings whose product is the batch that a run asks for.
BATCH_KEYS = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
UNITS = {"": 10**9, "G": 10**9, "GB": 10**9, "GIB": 2**30, "M": 10**6, "MB": 10**6, "MIB": 2**20}


@dataclass(frozen=True)
class Settings:
    """What `fit` may choose: names and meanings are those of the run's keys."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    encoder_batch_size: int | None


@dataclass(frozen=True)
class Workload:
    """What a training step computes: clips of so many frames and objects, prompts, bfloat16 or float32 by autocast."""

    num_frames: int
    num_objects: int
    recipe: PromptRecipe
    dtype: torch.dtype = torch.float32


def parse_memory(text: str | int | float) -> int:
    """Bytes of a size of memory such as "16GB", "24 GiB" or "16" (gigabytes).

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise InputError(f"`fit` must be a size of memory such as 16GB, 24GiB or 16 (gigabytes), got {text!r}.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def format_bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


class LiveBytes(TorchDispatchMode):
    """While it is active: how many bytes of tensors are alive (`live`), and the most there were (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
                self._sizes[storage._cdata] = size
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # half of all calls, and slow otherwise
        if func is torch.ops.aten._local_scalar_dense.default:
            # Tensors without data have no values. The one that is asked for here is a chance: no click from the truth.
            return False if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        self.add(x for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


class _KnownFeatures:
    """Stands for a frozen encoder, whose memory is counted apart."""

    def __init__(self, features: ImageFeatures):
        self.features = features

    def image_features(self, model: SamoeModel, pixel_values: Tensor, batch_size: int | None) -> ImageFeatures:
        return self.features


def _copy_without_data(model: SamoeModel, mode: FakeTensorMode, dtype: torch.dtype) -> SamoeModel:
    """A copy for counting, whose layers keep on a CPU what they keep on a GPU."""
    with FakeCopyMode(mode):
        # Of quantized layers in full, which is what each call makes of them for a moment.
        full = {id(layer): copy.deepcopy(in_full(layer)) for layer in quantized_modules(model)}
        model = copy.deepcopy(model, full)
    model.may_have_sleeping_experts = False
    model.feature_cache = None
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = partial(_dropout, module.p)
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.0  # fused attention draws it anew in the backward pass
        if isinstance(module, nn.LayerNorm) and dtype != torch.float32:
            module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))  # as GPUs' autocast does
    return model


def _dropout(p: float, x: Tensor) -> Tensor:
    return torch.native_dropout(x, p, True)[0]


class RunMemory:
    """What a run's training steps need, in bytes of tensors; what is counted once is remembered.

    Args:
        model: in training mode, with what is trained set; it is left as it is.
        processes: of several, each holds the gradients once more, to exchange them.
    """

    def __init__(self, model: SamoeModel, work: Workload, processes: int = 1):
        self.model, self.work = model, work
        self.trains_encoder = any(tensor.requires_grad for _, tensor in encoder_tensors(model))
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self.weights = weight_bytes(model)
        self.spared = spared_bytes(model)
        self.exchanged = trained if processes > 1 else 0
        # Gradients, and AdamW's two moments.
        self.of_training = 3 * trained + self.exchanged
        self._steps: dict[tuple[int, bool], int] = {}
        self._encoding: dict[int, int] = {}

    def total(self, settings: Settings) -> int:
        """All that the GPU holds: tensors, fragments and its context."""
        clips, checkpointing = settings.per_device_train_batch_size, settings.gradient_checkpointing
        tensors = self.step(clips, checkpointing)
        if not self.trains_encoder:
            frames = clips * self.work.num_frames
            tensors = max(tensors, self.encoding(frames, settings.encoder_batch_size or frames))
        return int(tensors * (1 + FRAGMENTS)) + CONTEXT_BYTES

    def step(self, clips: int, checkpointing: bool) -> int:
        """The most bytes in a training step, without the work of a frozen encoder.

        The clips have the most that the recipe can draw: a prompt on the first frame, clicks on it and on others.
        """
        if (clips, checkpointing) not in self._steps:
            with self._without_data() as (mode, counter, model):
                self._count_step(mode, counter, model, clips, checkpointing)
            self._steps[clips, checkpointing] = counter.peak - self.spared + self.exchanged
        return self._steps[clips, checkpointing]

    def _count_step(
        self, mode: FakeTensorMode, counter: LiveBytes, model: SamoeModel, clips: int, checkpointing: bool
    ) -> None:
        work, size = self.work, self.model.config.image_size
        if checkpointing:
            model._set_gradient_checkpointing(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        with mode, counter, self._autocast():
            moments = [torch.empty_like(p) for p in trained for _ in range(2)]
            pixels = torch.empty(clips, work.num_frames, 3, size, size)
            labels = torch.empty(clips, work.num_objects, work.num_frames, size, size, dtype=torch.bool)
            object_mask = torch.ones(clips, work.num_objects, dtype=torch.bool)
            if not self.trains_encoder:
                with torch.no_grad():
                    one = image_features(model, pixels[0, :1])
                known = (x.new_empty(clips * work.num_frames, *x.shape[1:]) for x in one[:3])
                model.feature_cache = _KnownFeatures(ImageFeatures(*known, *one[3:]))
                del one
            counter.peak = counter.live
            prompts = _largest_prompts(work.recipe, labels)
            loss = clip_forward(
                model, pixels, prompts, work.num_objects, labels, object_mask, domain=self._domain()
            ).loss
        with mode, counter:
            torch.autograd.backward(loss)
        del moments

    def encoding(self, frames: int, at_once: int) -> int:
        """The most bytes while a frozen encoder encodes some of the frames, before the step."""
        size = self.model.config.image_size
        at_once = min(frames, at_once)
        if at_once not in self._encoding:
            with self._without_data() as (mode, counter, model), mode, counter, torch.no_grad(), self._autocast():
                image_features(model, torch.empty(at_once, 3, size, size))
            self._encoding[at_once] = counter.peak - self.spared
        masks = frames * self.work.num_objects * size**2
        others = (frames - at_once) * self.frame_bytes() + frames * 3 * size**2 * 4 + masks
        return self._encoding[at_once] + others + 2 * (self.of_training - self.exchanged) // 3 + self.exchanged

    def frame_bytes(self) -> int:
        """Bytes of a frame's features, in memory and in a feature cache."""
        size = self.model.config.image_size
        with self._without_data() as (mode, counter, model), mode, counter, torch.no_grad(), self._autocast():
            return sum(x.nbytes for x in image_features(model, torch.empty(1, 3, size, size))[:3])

    @contextmanager
    def _without_data(self) -> Iterator[tuple[FakeTensorMode, LiveBytes, SamoeModel]]:
        """A copy of the model, and what counts while it runs."""
        mode, counter = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
        model = _copy_without_data(self.model, mode, self.work.dtype)
        counter.add([*model.parameters(), *model.buffers()])
        try:
            yield mode, counter, model
        finally:
            # Or the next real step would be given tensors without data: what is the same for all models is computed
            # once, and transformers keeps the encoding of positions that it computed last.
            sine_periods.cache_clear()
            for owner in (self.model.vision_encoder.neck, self.model.memory_encoder):
                owner.position_encoding.encoding(torch.Size((1, 1, 1, 1)), torch.device("cpu"), torch.float32)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.work.dtype != torch.float32)

    def _domain(self) -> str | None:
        """The domain that is trained, of a model with domains."""
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        domains = (d for d in self.model.config.domain_names if any(f".{PREFIX}{d}." in name for name in trained))
        return next(domains, None)


def _largest_prompts(recipe: PromptRecipe, labels: Tensor) -> ClipPrompts:
    frames = labels.shape[2]
    masks = [labels[:, :, t].flatten(0, 1) for t in range(frames)]
    if recipe.point_probability == 0:
        return ClipPrompts({0: sample_prompt(masks[0], "mask")})
    kind = "box" if recipe.box_probability > 0 else "point"
    corrected = range(min(recipe.max_corrected_frames, frames))
    return ClipPrompts({0: sample_prompt(masks[0], kind)}, {t: recipe.corrections(masks[t]) for t in corrected})


def choose_settings(memory: int, counted: RunMemory, asked: Settings, kept: Collection[str]) -> Settings:
    """The settings that cost the least time of those that fit, with as many clips in a step as `asked` has.

    They are tried in this order: as asked; with fewer clips at once, and more steps of accumulation; with gradient
    checkpointing. Frames of a frozen encoder are encoded in as many pieces as it takes.

    Args:
        memory: of the GPU, in bytes.
        asked: what the run says, or its defaults.
        kept: names of settings that must stay as asked.

    Raises:
        ValueError: if nothing fits; it says what would.
    """
    clips = asked.per_device_train_batch_size * asked.gradient_accumulation_steps
    batches = [n for n in range(asked.per_device_train_batch_size, 0, -1) if clips % n == 0]
    if BATCH_KEYS & set(kept):
        batches = batches[:1]
    checkpointing = [asked.gradient_checkpointing]
    if "gradient_checkpointing" not in kept:
        checkpointing = [False, True]
    for on in checkpointing:
        tried = batches
        if len(batches) > 1 and not _fits(memory, counted, replace(asked, gradient_checkpointing=on), kept):
            # Memory of one clip more is at most that of the first, so that few sizes need to be counted.
            base, one = counted.weights + counted.of_training, counted.step(1, on)
            room = (memory - CONTEXT_BYTES) / (1 + FRAGMENTS) - base
            most = max(1, int(room / max(one - base, 1)))
            tried = [n for n in batches[1:] if n <= most]
        for batch in tried:
            candidate = replace(
                asked,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=clips // batch,
                gradient_checkpointing=on,
            )
            if (found := _fits(memory, counted, candidate, kept)) is not None:
                return found
    raise InputError(_what_would_fit(memory, counted, asked, kept))


def _fits(memory: int, counted: RunMemory, settings: Settings, kept: Collection[str]) -> Settings | None:
    """The settings, with the most frames encoded at once that fit; None if they do not fit."""
    frames = settings.per_device_train_batch_size * counted.work.num_frames
    pieces: list[int | None] = [settings.encoder_batch_size]
    if "encoder_batch_size" not in kept and not counted.trains_encoder:
        pieces = [None, *(n for n in (8, 4, 2, 1) if n < frames)]
    for at_once in pieces:
        candidate = replace(settings, encoder_batch_size=at_once)
        if counted.total(candidate) <= memory:
            return candidate
    return None


def _what_would_fit(memory: int, counted: RunMemory, asked: Settings, kept: Collection[str]) -> str:
    """A message for a run that does not fit: what is kept, what the least would be, and what else would help."""
    least = Settings(1, asked.per_device_train_batch_size * asked.gradient_accumulation_steps, True, 1)
    as_kept = replace(least, **{name: getattr(asked, name) for name in kept if hasattr(asked, name)})
    if BATCH_KEYS & set(kept):
        as_kept = replace(as_kept, per_device_train_batch_size=asked.per_device_train_batch_size)
    needed, work = counted.total(least), counted.work
    given = ", ".join(f"`{name}` {getattr(asked, name)}" for name in sorted(kept) if hasattr(asked, name))
    clip = f"{work.num_frames} frames and {work.num_objects} objects"
    message = f"`fit` {format_bytes(memory)} is too little for clips of {clip}"
    if given and needed <= memory:
        smallest = ", ".join(
            f"`{name}` {getattr(least, name)}" for name in least.__dataclass_fields__ if name in kept or "batch" in name
        )
        return (
            f"{message} with {given}, which need {format_bytes(counted.total(as_kept))}. The smallest that would fit "
            f"is {smallest} with `gradient_checkpointing`, which needs {format_bytes(needed)}; leave these out to "
            "have them chosen."
        )
    fixed = counted.weights + counted.of_training
    return (
        f"{message}: even one at a time with `gradient_checkpointing` and `encoder_batch_size` 1 needs "
        f"{format_bytes(needed)}, of which {format_bytes(counted.weights)} are weights, "
        f"{format_bytes(fixed - counted.weights)} gradients and optimizer, "
        f"{format_bytes(CONTEXT_BYTES + (needed - CONTEXT_BYTES) * FRAGMENTS / (1 + FRAGMENTS))} margin. Fewer "
        "`num_frames`, `max_objects`, `num_correction_clicks` or a smaller model need less."
    )


def fit_arguments(model: SamoeModel, args: Any, recipe: PromptRecipe, dataset: Any) -> str:
    """Sets what `args.fit` chooses, for a run on `dataset`, and says what that is.

    Args:
        model: in training mode, with what is trained set.
        args: [`~arguments.SamoeTrainingArguments`]; names in its `given` stay as they are.
        dataset: a [`~samoe_hf.data.ClipDataset`], a stream of clips or a mixture of several.

    Raises:
        ValueError: if `args.fit` is no size, the dataset does not tell how large its clips are, or nothing fits.
    """
    memory = parse_memory(args.fit)
    parts = list(getattr(dataset, "datasets", {"": dataset}).values())
    if not all(hasattr(part, "sampler") for part in parts):
        raise InputError("`fit` needs a training dataset of clips, which tells how many frames and objects they have.")
    samplers = [part.sampler for part in parts]
    work = Workload(
        max(sampler.num_frames for sampler in samplers),
        max(sampler.max_objects for sampler in samplers),
        recipe,
        torch.bfloat16 if args.bf16 or args.fp16 else torch.float32,
    )
    counted = RunMemory(model, work, args.world_size)
    asked = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    kept = set(args.given) | ({"gradient_checkpointing"} if "activation_checkpointing" in args.given else set())
    chosen = choose_settings(memory, counted, asked, kept & set(Settings.__dataclass_fields__))
    for name in Settings.__dataclass_fields__:
        setattr(args, name, getattr(chosen, name))
    if hasattr(args, "activation_checkpointing"):  # the newer name, which Trainer then reads
        args.activation_checkpointing = chosen.gradient_checkpointing
    values = ", ".join(f"{name} {getattr(args, name)}" for name in Settings.__dataclass_fields__)
    cache = ""
    augmented = any(sampler.transforms is not None for sampler in samplers)
    if "feature_cache" not in args.given and not augmented and not counted.trains_encoder:
        args.feature_cache = _choose_cache(counted, args.output_dir, parts)
        cache = "" if args.feature_cache is None else f", feature_cache {args.feature_cache}"
    return f"fit {format_bytes(memory)}: {values}{cache}.\nExpected: {format_bytes(counted.total(chosen))}."


def _choose_cache(counted: RunMemory, output_dir: str | os.PathLike, datasets: Iterable[Any]) -> str | None:
    """A folder for the image features of all frames, unless they would take too much of the disk."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in counted.model.vision_encoder.modules()):
        return None  # features are drawn anew each time
    videos = [getattr(dataset, "videos", None) for dataset in datasets]
    if not all(hasattr(one, "__len__") for one in videos):
        return None  # a stream
    frames = sum(len(video.frames) for one in videos for video in one)
    folder = Path(output_dir).absolute()
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())
    fits = frames * counted.frame_bytes() <= CACHE_SHARE * shutil.disk_usage(disk).free
    return str(Path(output_dir, "features")) if fits else None
