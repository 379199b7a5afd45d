"""On a GPU, which is pretended here, tracking gives the same, and no frame waits for it."""

import copy

import numpy as np
import pytest
import torch

from helpers.pretended_gpu import GPU, pretended_gpu
from samoe_hf import VideoSession

NUM_FRAMES = 8
POINT = {"input_points": [[[[40, 50]]]], "input_labels": [[[1]]]}
BOX = {"input_boxes": [[[30, 20, 90, 100]]]}


@pytest.fixture(scope="module")
def video():
    """Frames of the model's size, which both devices take as they are."""
    return np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 128, 128, 3), dtype=np.uint8)


def track(model, processor, video, prompts, gpu=None):
    """The masks of all frames, and for what each frame waited for the GPU."""
    session = VideoSession(list(video), processor, inference_device=model.device, dtype=model.dtype)
    for frame_idx, object_id, prompt in prompts:
        processor.add_inputs_to_inference_session(session, frame_idx, object_id, **prompt)
    masks, waits = [], []
    for output in model.propagate_in_video_iterator(session, 0):
        waits.append([*gpu.waits] if gpu else [])
        masks.append(output.pred_masks.cpu())
        if gpu:
            gpu.waits.clear()
    return masks, waits


def test_tracking_is_the_same_and_waits_for_nothing_that_is_kept(model, processor, video):
    """Frames are sent there ahead, and objects that come later share them."""
    model, prompts = model.eval().double(), [(0, 1, POINT), (3, 2, BOX)]
    expected, _ = track(model, processor, video, prompts)
    model = copy.deepcopy(model)
    with pretended_gpu(model) as gpu:
        assert model.device == GPU
        masks, waits = track(model, processor, video, prompts, gpu)
    for one, other in zip(masks, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert waits[0] and waits[-1] == []
