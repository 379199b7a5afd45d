"""Video segmentation data: readers for dataset layouts, one schema for all of them, and clips for training."""
# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clip_datasets import ClipDataset, ClipStream, MixedDataset
    from .clips import ClipCollator, ClipSampler
    from .frames import FrameSequence, SampleError
    from .hub_datasets import videos_from_dataset
    from .images import read_label_png, voc_palette, write_palette_png
    from .items import video_from_item, videos_from_items
    from .registry import load_videos
    from .schema import FEATURES, Video, VideoList, to_datasets, video_from_row
    from .synthetic import SYNTHETIC_DOMAINS, SYNTHETIC_KINDS, SyntheticVideos
    from .transforms import training_transforms
    from .video_io import read_video, write_video

# Each name is imported at its first use: module -> names.
_MODULES = {
    "clip_datasets": "ClipDataset ClipStream MixedDataset",
    "clips": "ClipCollator ClipSampler",
    "frames": "FrameSequence SampleError",
    "hub_datasets": "videos_from_dataset",
    "images": "read_label_png voc_palette write_palette_png",
    "items": "video_from_item videos_from_items",
    "registry": "load_videos",
    "schema": "FEATURES Video VideoList to_datasets video_from_row",
    "synthetic": "SYNTHETIC_DOMAINS SYNTHETIC_KINDS SyntheticVideos",
    "transforms": "training_transforms",
    "video_io": "read_video write_video",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
