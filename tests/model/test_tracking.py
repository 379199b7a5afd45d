"""Sessions: what works with Sam2VideoModel works here, and objects, prompts and directions mix freely."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModel, AutoProcessor, Sam2VideoModel
from transformers.utils import logging as transformers_logging

from samoe_hf import SamoeModel
from samoe_hf.model.frame_step import fill_holes
from samoe_hf.model.tracking import TrackingStep

POINT_1 = {"input_points": [[[[40, 60]]]], "input_labels": [[[1]]]}
POINT_2 = {"input_points": [[[[100, 30], [20, 80]]]], "input_labels": [[[1, 0]]]}
BOX = {"input_boxes": [[[20, 20, 90, 70]]]}
NOTHING = {"input_masks": np.zeros((90, 160), bool)}


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).integers(0, 255, (6, 90, 160, 3), dtype=np.uint8)


def start(processor, video, *prompts):
    """A session with prompts (object, frame, inputs), added one by one."""
    session = processor.init_video_session(video=video)
    for obj_id, frame_idx, inputs in prompts:
        processor.add_inputs_to_inference_session(session, frame_idx, obj_id, **inputs)
    return session


def masks(outputs):
    return torch.stack([output.pred_masks for output in outputs])


def test_a_sam2_folder_gets_experts_without_effect(base_folder, processor, video, tmp_path):
    model = SamoeModel.from_pretrained(base_folder)
    base = Sam2VideoModel.from_pretrained(base_folder)

    def run(model):
        session = processor.init_video_session(video=video)
        points = [[[[40, 60], [60, 70]], [[100, 30], [20, 80]]]]
        processor.add_inputs_to_inference_session(
            session, 0, [1, 2], input_points=points, input_labels=[[[1, 1], [1, 0]]]
        )
        model(session, frame_idx=0)
        processor.add_inputs_to_inference_session(session, 2, 3, **BOX)
        model(session, frame_idx=2)
        return masks(model.propagate_in_video_iterator(session, start_frame_idx=0))

    torch.testing.assert_close(run(model), run(base), atol=1e-4, rtol=0)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).__class__ is SamoeModel
    saved = AutoModel.from_pretrained(tmp_path)
    assert saved.config.model_type == "samoe" and saved.config.architectures == ["SamoeModel"]
    torch.testing.assert_close(run(saved), run(model), atol=0, rtol=0)
    session = AutoProcessor.from_pretrained(tmp_path).init_video_session(video=video)
    torch.testing.assert_close(session.get_frame(3), processor.init_video_session(video=video).get_frame(3))


def test_reverse_propagation_mirrors_forward_propagation(nano, processor, video):
    forward = list(nano.model.propagate_in_video_iterator(start(processor, video, (1, 0, BOX))))
    session = start(processor, video[::-1].copy(), (1, 5, BOX))
    backward = list(nano.model.propagate_in_video_iterator(session, start_frame_idx=5, reverse=True))
    assert [output.frame_idx for output in backward] == [5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(masks(backward), masks(forward), atol=1e-4, rtol=0)


def test_tracking_in_training_mode_is_told_of(model, processor, video, caplog):
    transformers_logging.warning_once.cache_clear()
    for is_training in (False, True):
        list(model.train(is_training).propagate_in_video_iterator(start(processor, video[:2], (1, 0, BOX))))
        assert ("call `model.eval()` before" in caplog.text) == is_training


CORRECTION = {"input_points": [[[[120, 70]]]], "input_labels": [[[1]]]}


def propagate(model, session, *args):
    return {output.frame_idx: output.pred_masks for output in model.propagate_in_video_iterator(session, *args)}


def test_a_correction_changes_what_follows_until_its_frame_is_tracked_anew(nano, processor, video, caplog):
    transformers_logging.warning_once.cache_clear()
    session = start(processor, video, (1, 0, POINT_1), (2, 0, BOX))
    before = propagate(nano.model, session)
    processor.add_inputs_to_inference_session(session, 3, 1, **CORRECTION)
    corrected = nano.model(session, frame_idx=3).pred_masks
    assert (corrected[0] - before[3][0]).abs().mean() > 1e-3
    torch.testing.assert_close(corrected[1], before[3][1], atol=0, rtol=0)
    after = propagate(nano.model, session, 4)
    assert (after[4][0] - before[4][0]).abs().mean() > 1e-4
    torch.testing.assert_close(after[4][1], before[4][1], atol=1e-4, rtol=0)
    assert not caplog.text
    anew = propagate(nano.model, session, 0)
    assert "A corrected frame is tracked anew, without its correction" in caplog.text
    for frame_idx, expected in before.items():
        torch.testing.assert_close(anew[frame_idx], expected, atol=1e-4, rtol=0)


def test_the_first_prompted_frame_keeps_its_mask_after_a_click_on_the_tracked_video(nano, processor, video):
    """As in `sam2`, which shows what the click gives, but does not use it; so with an empty mask."""
    before = propagate(nano.model, start(processor, video, (1, 0, POINT_1)))
    for correction in (CORRECTION, NOTHING):
        session = start(processor, video, (1, 0, POINT_1))
        propagate(nano.model, session, 0, 3)
        processor.add_inputs_to_inference_session(session, 0, 1, **correction)
        assert (nano.model(session, frame_idx=0).pred_masks - before[0]).abs().mean() > 1e-3
        for frame_idx, masks in propagate(nano.model, session, 0).items():
            torch.testing.assert_close(masks, before[frame_idx], atol=1e-4, rtol=0)


def test_an_object_is_absent_once_an_empty_mask_is_in_place_of_what_showed_it(nano, processor, video):
    session = start(processor, video, (1, 0, POINT_1))
    session.corrections_condition = True
    assert all((masks > 0).any() for masks in propagate(nano.model, session).values())
    processor.add_inputs_to_inference_session(session, 0, 1, **NOTHING)
    assert all((masks < 0).all() for masks in propagate(nano.model, session, 0).values())
    processor.add_inputs_to_inference_session(session, 3, 1, **POINT_1)
    nano.model(session, frame_idx=3)
    shown = start(processor, video, (1, 0, NOTHING), (1, 3, POINT_1))
    expected = propagate(nano.model, shown, 0)
    for frame_idx, masks in propagate(nano.model, session, 0).items():
        torch.testing.assert_close(masks, expected[frame_idx], atol=1e-4, rtol=0)


def test_cleared_prompts_count_no_more(nano, processor, video):
    """Cleared by the model, or by transformers' session, which the model notices later."""
    expected = propagate(nano.model, start(processor, video, (1, 0, POINT_1)))
    for clear in (
        lambda session: nano.model.clear_prompts(session, 3, 1),
        lambda session: session.remove_mask_inputs(0, 3) or session.remove_point_inputs(0, 3),
    ):
        for track_before in (False, True):
            session = start(processor, video, (1, 0, POINT_1), (1, 3, BOX))
            if track_before:
                propagate(nano.model, session)
            clear(session)
            for frame_idx, masks in propagate(nano.model, session).items():
                torch.testing.assert_close(masks, expected[frame_idx], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"`obj_id`.*\[1\], got 5"):
        nano.model.clear_prompts(session, 3, 5)


def test_clicks_refine_the_previous_mask_if_wanted(nano, processor, video):
    def click_twice(model):
        session = start(processor, video, (1, 0, POINT_1))
        model(session, frame_idx=0)
        more = {"input_points": [[[[120, 70]]]], "input_labels": [[[0]]], "clear_old_inputs": False}
        processor.add_inputs_to_inference_session(session, 0, 1, **more)
        return model(session, frame_idx=0).pred_masks

    at_once = {"input_points": [[[[40, 60], [120, 70]]]], "input_labels": [[[1, 0]]]}
    expected = nano.model(start(processor, video, (1, 0, at_once)), frame_idx=0).pred_masks
    assert (click_twice(nano.model) - expected).abs().max() > 1e-3
    nano.model.config.previous_mask_with_clicks = False
    try:
        torch.testing.assert_close(click_twice(nano.model), expected, atol=1e-5, rtol=0)
    finally:
        nano.model.config.previous_mask_with_clicks = True


def test_what_cannot_be_tracked_is_refused(nano, processor, video):
    empty = processor.init_video_session(video=video)
    with pytest.raises(ValueError, match="No objects"):
        nano.model(empty, frame_idx=0)
    with pytest.raises(ValueError, match=r"`frame_idx`.*6 frames.*got 6"):
        nano.model(start(processor, video, (1, 0, POINT_1)), frame_idx=6)
    unprompted = start(processor, video, (1, 0, POINT_1))
    unprompted.obj_id_to_idx(4)
    output = nano.model(unprompted, frame_idx=0)  # the prompt of object 1 is shown
    assert (output.pred_masks[1] == -1024).all() and output.object_score_logits[1] == -1024
    with pytest.raises(ValueError, match="Object 4 was never prompted"):
        nano.model(unprompted, frame_idx=1)
    with pytest.raises(ValueError, match="Object 4 was never prompted"):
        propagate(nano.model, unprompted)
    nano.model.remove_object(unprompted, 99)
    with pytest.raises(ValueError, match=r"`obj_id`.*\[1, 4\], got 99"):
        nano.model.remove_object(unprompted, 99, strict=True)
    with pytest.raises(ValueError, match=r"`frame_idx`.*6 frames.*got 9"):
        propagate(nano.model, start(processor, video, (1, 0, POINT_1)), 9)


def test_holes_are_filled_up_to_the_area_also_in_what_is_put_out(nano, processor, video):
    logits = torch.ones(2, 1, 12, 12)
    logits[0, 0, 2:4, 2:4] = logits[0, 0, 4, 4] = -1  # 4 pixels, and a fifth by its corner
    logits[0, 0, 8:11, 8:11] = logits[1, 0, 0, :] = -1  # 9 pixels, and 12 in a line
    filled = fill_holes(logits, 5)
    assert (filled[0, 0, :6, :6] > 0).all() and filled[0, 0, 2, 2] == pytest.approx(0.1)
    torch.testing.assert_close(filled[0, 0, 7:, 7:], logits[0, 0, 7:, 7:])
    torch.testing.assert_close(filled[1], logits[1])
    torch.testing.assert_close(fill_holes(logits, 4)[0, 0, :6, :6], logits[0, 0, :6, :6])

    def first_mask():
        return nano.model(start(processor, video, (1, 0, POINT_1)), frame_idx=0).pred_masks

    plain = first_mask()
    nano.model.config.fill_hole_area = 8
    try:
        torch.testing.assert_close(first_mask(), fill_holes(plain, 8), atol=1e-5, rtol=0)
    finally:
        nano.model.config.fill_hole_area = 0


class CudaAutocast(TorchFunctionMode):
    """Has these functions compute in float32, as CUDA's autocast does and the CPU's does not."""

    NAMES = (
        *("softmax", "log_softmax", "layer_norm", "group_norm", "sum", "prod", "cumsum", "pow", "exp", "log", "norm"),
        *("rsqrt", "reciprocal", "mse_loss", "l1_loss", "smooth_l1_loss", "cosine_similarity", "expm1", "log1p"),
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.NAMES:
            halves = (torch.bfloat16, torch.float16)
            args, kwargs = tree_map_only(
                torch.Tensor, lambda x: x.float() if x.dtype in halves else x, (args, kwargs or {})
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_autocast_gives_nearly_the_same_masks_and_finite_gradients(nano, processor, video, dtype):
    """Long enough for memories and pointers of several frames."""
    prompts = [(1, 0, POINT_1), (2, 0, BOX), (3, 2, POINT_2)]
    expected = masks(nano.model.propagate_in_video_iterator(start(processor, video, *prompts)))
    for cuda in (nullcontext(), CudaAutocast()):
        with torch.autocast("cpu", dtype), cuda:
            rounded = masks(nano.model.propagate_in_video_iterator(start(processor, video, *prompts)))
        assert ((rounded > 0) == (expected > 0)).float().mean() > 0.95
    model = copy.deepcopy(nano.model).train()
    labels = torch.zeros(1, 2, 3, 128, 128, dtype=torch.bool)
    labels[:, 0, :, 20:60, 30:70] = labels[:, 1, :, 70:100, 50:90] = True
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype), CudaAutocast():
        output = model(torch.randn(1, 3, 3, 128, 128), labels, prompts="sam2")
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def until_step(steps, outputs):
    """The next step to be run, if there is one; outputs before it are appended."""
    for step in steps:
        if isinstance(step, TrackingStep):
            return [step]
        outputs.append(step)
    return []


def test_several_videos_are_tracked_at_once(nano, processor, video):
    """Two videos of different sizes and lengths, with different objects, one of which joins later."""
    other = np.random.default_rng(5).integers(0, 255, (5, 64, 80, 3), dtype=np.uint8)
    prompts = ([(1, 0, POINT_1), (2, 0, BOX), (3, 2, BOX)], [(7, 0, POINT_1)])
    alone = []
    for frames, given in zip((video, other), prompts, strict=True):
        session = start(processor, frames, *given)
        alone.append([nano.model(session, frame_idx=t).pred_masks for t in range(5)])
    encoded = []
    handle = nano.model.vision_encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    sessions = [start(processor, frames, *given) for frames, given in zip((video, other), prompts, strict=True)]
    together = [nano.model.track_together(sessions, t) for t in range(5)]
    handle.remove()
    assert encoded.count(2) == 5
    for outputs in zip(*together, strict=True):
        assert [output.frame_idx for output in outputs] == list(range(5))
    assert [output.object_ids for output in together[0]] == [[1, 2, 3], [7]]
    for t, outputs in enumerate(together):
        for output, expected in zip(outputs, alone, strict=True):
            assert (output.pred_masks - expected[t]).abs().mean() < 1e-4
    # On frames of their own, with prompts that the other has not.
    videos = ((video, [(1, 2, POINT_1), (2, 0, BOX)]), (other, [(7, 1, POINT_1), (9, 1, BOX)]))
    alone = [list(nano.model.propagate_from_prompts_iterator(start(processor, x, *own))) for x, own in videos]
    running = [nano.model.steps_from_prompts(start(processor, x, *own)) for x, own in videos]
    together = [[] for _ in running]
    while steps := [x for outputs, own in zip(together, running, strict=True) for x in until_step(own, outputs)]:
        nano.model(steps=steps)
    for outputs, expected in zip(together, alone, strict=True):
        assert [output.frame_idx for output in outputs] == [output.frame_idx for output in expected]
        for output, wanted in zip(outputs, expected, strict=True):
            assert output.object_ids == wanted.object_ids
            assert (output.pred_masks - wanted.pred_masks).abs().mean() < 1e-4
    assert type(nano.model(sessions[0], torch.tensor(1)).frame_idx) is int
    sessions[1].dtype = torch.bfloat16
    with pytest.raises(ValueError, match="`sessions` must be of one"):
        nano.model.track_together(sessions, 0)
