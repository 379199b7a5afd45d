"""Video segmentation data: readers for dataset layouts, one schema for all of them, and clips for training."""

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
