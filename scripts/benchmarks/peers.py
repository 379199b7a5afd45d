"""Video models of others with the weights of one of ours, each as a tracker of points on the first frame."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from transformers import Sam2VideoInferenceSession, Sam2VideoModel, Sam3TrackerVideoModel

from measure import synchronize
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.original.config import write_yaml
from samoe_hf.original.names import state_dict_to_original, without_base_layer
from samoe_hf.surgery.merge import merge_into_base

Tracked = tuple[float, Tensor]


class TransformersTracker:
    """[`~transformers.Sam2VideoModel`], or ours, which is used in the same way."""

    def __init__(self, model: Sam2VideoModel, config: SamoeConfig):
        self.model, self.processor = model, build_processor(config)

    def session(self, frames: Tensor, points: Tensor) -> Sam2VideoInferenceSession:
        """A session for frames and points as of [`track`]."""
        device, size = self.model.device, frames.shape[-1]
        session = Sam2VideoInferenceSession(
            frames,
            video_height=size,
            video_width=size,
            inference_device=device,
            inference_state_device=device,
            video_storage_device=device,
            dtype=frames.dtype,
        )
        ids = list(range(1, len(points) + 1))
        self.processor.add_inputs_to_inference_session(
            session, 0, ids, input_points=points[None, :, None].tolist(), input_labels=[[[1]] * len(ids)]
        )
        return session

    def track(self, frames: Tensor, points: Tensor) -> Iterator[Tracked]:
        """Tracks objects (N, 2), given by a point each on the first of the frames (T, 3, S, S).

        Yields:
            for each frame the seconds it took, and the masks (N, 1, S / 4, S / 4).
        """
        device, size = self.model.device, frames.shape[-1]
        session = self.session(frames, points)
        synchronize(device)
        start = time.perf_counter()
        for output in self.model.propagate_in_video_iterator(session, start_frame_idx=0):
            self.processor.post_process_masks([output.pred_masks], [(size, size)])
            synchronize(device)
            yield time.perf_counter() - start, output.pred_masks
            start = time.perf_counter()


class Sam2Tracker:
    """`sam2`'s video predictor, which tracks objects one by one."""

    def __init__(self, model: nn.Module):
        self.model = model

    def track(self, frames: Tensor, points: Tensor) -> Iterator[Tracked]:
        """As [`TransformersTracker.track`]."""
        device = frames.device
        with tempfile.TemporaryDirectory() as folder:
            for index in range(len(frames)):
                Image.new("RGB", tuple(frames.shape[-2:])).save(Path(folder, f"{index:05d}.jpg"))
            state = self.model.init_state(folder)
        state["images"] = frames  # not those of the files, which only tell how many and how large they are
        state["cached_features"].clear()
        start = time.perf_counter()
        for obj_id, point in enumerate(points.tolist(), start=1):
            self.model.add_new_points_or_box(state, 0, obj_id=obj_id, points=[point], labels=[1])
        for frame_idx, _, _ in self.model.propagate_in_video(state):
            synchronize(device)
            seconds = time.perf_counter() - start
            masks = []
            for outputs in state["output_dict_per_obj"].values():
                by_frame = outputs["cond_frame_outputs"] | outputs["non_cond_frame_outputs"]
                masks.append(by_frame[frame_idx]["pred_masks"])
            yield seconds, torch.cat(masks)
            start = time.perf_counter()


def base_of(model: SamoeModel) -> Sam2VideoModel | Sam3TrackerVideoModel:
    """transformers' model with the base's weights."""
    return merge_into_base(model, "base")


def sam2_of(model: SamoeModel, compiled: bool = False) -> nn.Module:
    """`sam2`'s predictor with the base's weights, set as its `build_sam2_video_predictor` sets it, but without filling
    of holes; or its compiled predictor for video object segmentation.

    Raises:
        ModuleNotFoundError: if the `bench` extra is not installed.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sam2.yaml")
        write_yaml(model.config, [], path)
        config = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
    predictor = "SAM2VideoPredictorVOS" if compiled else "SAM2VideoPredictor"
    config._target_ = f"sam2.sam2_video_predictor.{predictor}"
    if compiled:
        config.compile_image_encoder = True
    built = instantiate(config)
    tensors = state_dict_to_original({n: x for n, x in model.state_dict().items() if not is_expert_parameter(n)})
    built.load_state_dict({without_base_layer(name): tensor for name, tensor in tensors.items()})
    return built.to(model.device, model.dtype).eval()
