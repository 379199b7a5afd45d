"""How well a model segments videos: semi-supervised tracking, from the first frame each object is seen on."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from tqdm import tqdm
from transformers import Sam2VideoProcessor

from .data.schema import Video
from .metrics import VideoScores, score_video
from .modeling_samoe import SamoeModel


@torch.inference_mode()
def segment_video(model: SamoeModel, processor: Sam2VideoProcessor, video: Video) -> tuple[np.ndarray, np.ndarray]:
    """Tracks all objects of a video, each prompted with its mask on the first annotated frame that shows it.

    Returns:
        masks (T, N, H, W) bool, in the order of `video.object_ids`, empty before an object was prompted and possibly
        overlapping; and object score logits (T, N), -inf before.
    """
    session = processor.init_video_session(
        video=np.stack(list(video.frames)), inference_device=model.device, video_storage_device="cpu", dtype=model.dtype
    )
    object_ids = video.object_ids
    masks = np.zeros((len(video), len(object_ids), *video.size), dtype=bool)
    scores = np.full((len(video), len(object_ids)), -np.inf, dtype=np.float32)
    known: set[int] = set()
    for frame_idx in range(len(video)):
        seen = video.visible(frame_idx) if video.is_annotated(frame_idx) else []
        new = [object_id for object_id in seen if object_id not in known]
        if new:
            given = list(video.masks(frame_idx, new))
            processor.add_inputs_to_inference_session(session, frame_idx, new, input_masks=given)
            known.update(new)
        if known:
            output = model(session, frame_idx=frame_idx)
            columns = [object_ids.index(object_id) for object_id in output.object_ids]
            predicted = processor.post_process_masks([output.pred_masks], [video.size])[0][:, 0]
            masks[frame_idx, columns] = predicted.cpu().numpy()
            scores[frame_idx, columns] = output.object_score_logits[:, 0].float().cpu().numpy()
    return masks, scores


def evaluate_videos(
    model: SamoeModel, processor: Sam2VideoProcessor, videos: Iterable[Video], show_progress_bar: bool = True
) -> dict[str, VideoScores]:
    """Scores [`segment_video`] against each video's masks: video id -> scores, see [`metrics.summarize`].

    Only annotated frames are scored.
    """
    was_training = model.training
    model.eval()
    results = {}
    for video in tqdm(videos, desc="evaluate", disable=not show_progress_bar):
        masks, scores = segment_video(model, processor, video)
        frames = video.annotated_frames
        target = np.stack([video.masks(t) for t in frames])
        results[video.video_id] = score_video(masks[frames], target, video.object_ids, scores[frames])
    model.train(was_training)
    return results


def mean_iou(results: Mapping[str, VideoScores]) -> float:
    """IoU averaged over all objects and the frames after the one that each was prompted on, 0 to 1."""
    values = []
    for scores in results.values():
        first_seen = (scores.target_area > 0).argmax(axis=0)
        values += [scores.j[first + 1 :, column] for column, first in enumerate(first_seen)]
    return float(np.concatenate(values).mean())
