"""Video segmentation data: readers for dataset layouts, one schema for all of them, and clips for training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clip_datasets import ClipDataset, ClipStream, MixedDataset
    from .clips import ClipCollator, ClipSampler
    from .hub_datasets import videos_from_dataset
    from .items import video_from_item, videos_from_items
    from .registry import load_videos
    from .schema import FEATURES, Video, VideoList, to_datasets, video_from_row
    from .synthetic import SYNTHETIC_DOMAINS, SyntheticVideos
    from .transforms import training_transforms
    from .video_io import (
        FrameSequence,
        SampleError,
        read_label_png,
        read_video,
        voc_palette,
        write_palette_png,
        write_video,
    )

__all__ = [
    "FEATURES",
    "SYNTHETIC_DOMAINS",
    "ClipCollator",
    "ClipDataset",
    "ClipSampler",
    "ClipStream",
    "FrameSequence",
    "MixedDataset",
    "SampleError",
    "SyntheticVideos",
    "Video",
    "VideoList",
    "load_videos",
    "read_label_png",
    "read_video",
    "to_datasets",
    "training_transforms",
    "video_from_item",
    "video_from_row",
    "videos_from_dataset",
    "videos_from_items",
    "voc_palette",
    "write_palette_png",
    "write_video",
]
# Each name is imported at its first use: name -> module.
_MODULES = {
    "ClipCollator": "clips",
    "ClipDataset": "clip_datasets",
    "ClipSampler": "clips",
    "ClipStream": "clip_datasets",
    "FEATURES": "schema",
    "FrameSequence": "video_io",
    "MixedDataset": "clip_datasets",
    "SYNTHETIC_DOMAINS": "synthetic",
    "SampleError": "video_io",
    "SyntheticVideos": "synthetic",
    "Video": "schema",
    "VideoList": "schema",
    "load_videos": "registry",
    "read_label_png": "video_io",
    "read_video": "video_io",
    "to_datasets": "schema",
    "training_transforms": "transforms",
    "video_from_item": "items",
    "video_from_row": "schema",
    "videos_from_dataset": "hub_datasets",
    "videos_from_items": "items",
    "voc_palette": "video_io",
    "write_palette_png": "video_io",
    "write_video": "video_io",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
