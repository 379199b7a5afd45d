"""Which experts the routers choose while videos are tracked: for each frame, object and position of the image."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samoe_hf.data.schema import Video
from samoe_hf.data.video_io import write_video
from samoe_hf.errors import InputError
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.batch_rows import BatchRow, batch_rows
from samoe_hf.model.domain_experts import module_domain, module_layer
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.model.expert_router import open_hooks, router_outputs
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor, build_processor
from samoe_hf.plots.experts import plot_routing, routing_video
from samoe_hf.whole_files import whole_file

# Projections whose tokens are the image's positions; keys and values of the cross attention are of the memory.
IMAGE_PROJECTIONS = re.compile(r"memory_attention\.layers\.\d+\.(self_attn\.[qkvo]|cross_attn_image\.[qo])_proj")
IMAGE_LAYERS = re.compile(r"vision_encoder\.backbone\.(blocks|layers)\.\d+\.mlp\..*")


@contextmanager
def observe_routers(model: SamoeModel, observe: Callable[[str, Sequence[BatchRow], Tensor], None]) -> Iterator[None]:
    """While the context is open, the model is in evaluation mode and `observe` gets what each router puts out.

    It is called with the module's name, what each row belongs to, and router logits (rows, tokens, experts); for each
    row alone where rows have differently many tokens. Where a module runs once for all objects, there is one row, with
    None as its object. Compiled parts run uncompiled.
    """

    def hook(name: str) -> Callable:
        def pass_on(_, __, logits: Tensor) -> None:
            batch = batch_rows()
            rows = batch.frames() if batch.shared else batch.rows
            if rows:
                # Rows of the image encoder may be cut into windows.
                by_row = logits.reshape(len(rows), -1, logits.shape[-1])
                if batch.is_own is None:
                    observe(name, rows, by_row)
                    return
                for row, tokens, is_own in zip(rows, by_row, batch.is_own, strict=True):
                    observe(name, [row], tokens[is_own][None])

        return pass_on

    hooks = (module.router_logits.register_forward_hook(hook(name)) for name, module in expert_modules(model))
    with evaluation_mode(model), open_hooks(hooks):
        yield


@contextmanager
def route_all_to(model: SamoeModel, expert: int) -> Iterator[None]:
    """While the context is open, each token of each layer goes to one expert alone, with a gate of 1."""

    def force(_, __, logits: Tensor) -> Tensor:
        # float16 holds it, and beside 0 its softmax is 0.
        forced = torch.full_like(logits, -1e4)
        forced[..., expert] = 0
        return forced

    with open_hooks(output.register_forward_hook(force) for _, output in router_outputs(model)):
        yield


def image_modules(modules: Iterable[str]) -> list[str]:
    """The layers among modules with experts whose tokens are image positions; the last is the best one to look at.

    That is the last cross attention's queries, which ask the memory for each position.
    """
    layers = dict.fromkeys(map(module_layer, modules))
    found = [name for name in layers if IMAGE_PROJECTIONS.fullmatch(name) or IMAGE_LAYERS.fullmatch(name)]
    return sorted(found, key=lambda name: name.endswith("cross_attn_image.q_proj"))


def short_name(module: str) -> str:
    """A module's name for pictures: "layer 0 cross q" for the memory attention's, else its own; and its domain."""
    layer, domain = module_layer(module), module_domain(module)
    match = re.fullmatch(r"memory_attention\.layers\.(\d+)\.(self|cross)_attn(?:_image)?\.([qkvo])_proj", layer)
    name = "layer {} {} {}".format(*match.groups()) if match else layer
    return name if domain is None else f"{name} ({domain})"


def routing_module(model: SamoeModel, module: str | None = None) -> str | None:
    """The module to draw maps of: the given one of [`image_modules`], or else their last, or None if there is none."""
    allowed = image_modules(name for name, _ in expert_modules(model))
    if module is not None and module not in allowed:
        raise InputError(
            f"`module` must be a layer with experts whose tokens are image positions, one of {allowed}, got {module!r}."
        )
    return module or (allowed[-1] if allowed else None)


@dataclass
class RoutingMaps:
    """Which expert has the largest gate at each image position of a video.

    Attributes:
        object_ids: of the objects, or [None] where the layer runs once for all of them.
        experts: (T, objects, h, w) int16, -1 on frames where the router did not run: before an object is seen and on
            the frame that it is prompted on.
        masks: what was tracked meanwhile, (T, objects of the video, H, W) bool.
    """

    video: Video
    module: str
    num_experts: int
    object_ids: list[int | None]
    experts: np.ndarray
    masks: np.ndarray

    def save(self, path: str | Path, object_id: int | None = None) -> list[Path]:
        """Draws the maps of an object, by default the first: a strip of frames as `.png`, the whole video as `.mp4`.
        `path` has no suffix."""
        ids = self.object_ids
        if object_id is not None and ids != [None] and object_id not in ids:
            raise InputError(f"`object_id` must be one of {ids}, got {object_id!r}.")
        column = ids.index(object_id) if object_id in ids else 0
        shown = ids[column]
        own = slice(None) if shown is None else [self.video.object_ids.index(shown)]
        name = "whole frame" if shown is None else f"object {shown}"
        video = " ".join(dict.fromkeys((self.video.domain, self.video.video_id)))
        title = f"Expert of largest weight in {short_name(self.module)}: {video}, {name}"
        arguments = (self.video.frames, np.any(self.masks[:, own], axis=1), self.experts[:, column], self.num_experts)
        png, mp4 = (Path(f"{path}{suffix}") for suffix in (".png", ".mp4"))
        with whole_file(png) as picture, whole_file(mp4) as video_file:
            plot_routing(*arguments, picture, title)
            write_video(video_file, routing_video(*arguments, title), self.video.frames.fps or 6)
        return [png, mp4]


def routing_maps(
    model: SamoeModel, video: Video, processor: VideoProcessor | None = None, module: str | None = None
) -> RoutingMaps:
    """Tracks a video as [`expert_usage`] does and keeps the expert of each image position.

    `module` is one of [`image_modules`], by default the last: the last cross attention's `q_proj`, where there is one.
    """
    module = routing_module(model, module)
    if module is None:
        raise InputError("`model` has no layer with experts whose tokens are image positions.")
    maps: dict[BatchRow, np.ndarray] = {}
    ran: set[str] = set()  # the module's name with the domain that the video was given

    def keep_best(name: str, rows: Sequence[BatchRow], logits: Tensor) -> None:
        if module_layer(name) == module:
            ran.add(name)
            side = math.isqrt(logits.shape[1])
            experts = logits.argmax(dim=-1).view(len(rows), side, side)
            maps.update(zip(rows, experts.to(torch.int16).cpu().numpy(), strict=True))

    with observe_routers(model, keep_best):
        masks, _ = segment_video(model, processor or build_processor(model.config), video)
    if not maps:
        raise InputError(
            f"No router ran: video {video.video_id!r} has no objects, or no frames after the prompted ones, or belongs "
            "to no domain of the model."
        )
    observed = {row.object_id for row in maps}
    object_ids = [i for i in (*video.object_ids, None) if i in observed]
    experts = np.full((len(video), len(object_ids), *next(iter(maps.values())).shape), -1, dtype=np.int16)
    for (_, frame_idx, object_id), best in maps.items():
        experts[frame_idx, object_ids.index(object_id)] = best
    (name,) = ran
    return RoutingMaps(video, name, dict(expert_modules(model))[name].num_experts, object_ids, experts, masks)
