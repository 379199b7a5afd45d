"""The processor that is built for a model, and what it refuses."""

import numpy as np
import pytest
import torch

from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.video_session import VideoSession


@pytest.mark.parametrize("make", [torch.as_tensor, np.asarray], ids=["torch", "numpy"])
@pytest.mark.parametrize("kind", ["plain", "video"])
def test_masks_are_bool_or_of_two_values_and_others_are_refused(nano, make, kind):
    processor = build_processor(nano.model.config)
    frames = np.zeros((2, 96, 128, 3), np.uint8)
    start = {
        "plain": lambda: processor.init_video_session(video=frames),
        "video": lambda: VideoSession(frames, processor),
    }
    mask = np.zeros((96, 128), bool)
    mask[20:50, 30:90] = True

    def area(values):
        session = start[kind]()
        processor.add_inputs_to_inference_session(session, 0, 1, input_masks=make(values))
        return int((nano.model(session, 0).pred_masks > 0).sum())

    expected = area(mask)
    for values in (mask.astype(np.uint8), 255 * mask.astype(np.uint8), mask.astype(np.float32)):
        assert area(values) == expected > 0
    for values in (np.where(mask, 8.0, -8.0), np.where(mask, 0.9, 0.1), np.full(mask.shape, np.nan), mask.T, mask * 2):
        with pytest.raises(ValueError, match="input_masks"):
            area(values)


@pytest.mark.parametrize("ids", [torch.tensor([3, 5]), np.array([3, 5]), [np.int64(3), torch.tensor(5)]], ids=str)
def test_ids_of_objects_become_numbers(nano, ids):
    processor = build_processor(nano.model.config)
    session = VideoSession(np.zeros((1, 96, 128, 3), np.uint8), processor)
    for _ in range(2):  # again they are the same objects
        boxes = [[[90, 70, 10, 20], [40, 70, 90, 10]]]
        processor.add_inputs_to_inference_session(session, torch.tensor(0), ids, input_boxes=boxes)
    assert session.obj_ids == [3, 5] and all(type(one) is int for one in session.obj_ids)
    points = session.point_inputs_per_obj[0][0]["point_coords"][0, 0]
    assert (points[0] < points[1]).all()
    nano.model.remove_object(session, torch.tensor(3), strict=True)
    assert session.obj_ids == [5]
    for wrong, message in ((2.5, "integers"), ([5, 5], r"different, got \[5, 5\]; .* object's points in one")):
        with pytest.raises(ValueError, match=f"`obj_ids` must be {message}"):
            processor.add_inputs_to_inference_session(session, 0, wrong, input_boxes=boxes)


@pytest.mark.parametrize("ids", [[1, 2], 1])
def test_masks_of_several_objects_may_be_one_array(nano, ids):
    masks = np.zeros((np.size(ids), 96, 128), bool)
    masks[0, :50, :60], masks[-1, 30:, 20:] = True, True
    given = [build_processor(nano.model.config).init_video_session(video=np.zeros((1, 96, 128, 3))) for _ in "ab"]
    for session, inputs in zip(given, (masks, [*masks]), strict=True):
        build_processor(nano.model.config).add_inputs_to_inference_session(session, 0, ids, input_masks=inputs)
    one, other = ([own[0] for own in session.mask_inputs_per_obj.values()] for session in given)
    assert all(map(torch.equal, one, other)) and len(one) == np.size(ids)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_boxes": [[[10, 10, 10, 40]]]}, "must have an area, got an empty box"),
        (
            {"input_points": [[[[10, 10], [20, 20]]]], "input_labels": [[[1]]]},
            "label for each of the 2|inconsistent dimensions",
        ),
        ({"input_points": [[[[10, 10]]]], "input_labels": [[[5]]]}, "must be 1 .* or 0 .*got 5"),
    ],
)
def test_prompts_that_cannot_be_meant_get_a_sentence(nano, inputs, message):
    processor = build_processor(nano.model.config)
    session = VideoSession(np.zeros((1, 96, 128, 3), np.uint8), processor)
    with pytest.raises(ValueError, match=message):
        processor.add_inputs_to_inference_session(session, 0, 1, **inputs)
    assert not session.obj_ids
