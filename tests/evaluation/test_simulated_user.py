"""The simulated user prompts what is asked for, where and when it is asked for."""

import numpy as np
import pytest
import torch

from helpers.interaction import run_rows_one_by_one
from samoe_hf import SamoeModel
from samoe_hf.data import SyntheticVideos, Video
from samoe_hf.evaluation.simulated_user import PromptStrategy, SimulatedUser, click_on_error, sample_points
from samoe_hf.model import tracking
from samoe_hf.model.batch_rows import batch_rows
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.model.tracking import SamoeTrackingOutput


@pytest.mark.parametrize(
    "text",
    ["mask", "box", "point:1", "point:5", "mask@3:look", "box@2:even", "clicks:3", "clicks:3@8"]
    + [f"clicks:1@2:{x}" for x in ("offline", "look", "even")],
)
def test_prompts_are_written_as_they_are_read(text):
    prompt = PromptStrategy.parse(text)
    assert str(prompt) == text and prompt.is_random == text.startswith("point")
    assert PromptStrategy.parse("point") == PromptStrategy("point", 1)
    assert str(PromptStrategy.parse("clicks:4@1:offline")) == "clicks:4"
    odd = "masks clicks clicks:0 clicks:3@0 clicks:3@ mask:2 box@3 mask@3:offline point:2@3:look"
    for wrong in ("", *odd.split(), f"{text}:online"):
        with pytest.raises(ValueError, match=r"`prompt` must be mask, box, point.*got"):
            PromptStrategy.parse(wrong)


def deepest_point(mask):
    """The pixel farthest from all that is outside of the mask or of the image, by looking at each pair."""
    padded = np.pad(mask, 1)
    inside, outside = np.argwhere(padded), np.argwhere(~padded)
    distance = ((inside[:, None] - outside) ** 2).sum(axis=-1).min(axis=1)
    return distance.max(), {(float(x - 1), float(y - 1)) for y, x in inside[distance == distance.max()]}


def test_clicks_are_on_the_point_farthest_from_the_border_of_the_largest_error():
    rng = np.random.default_rng(0)
    labels = set()
    for _ in range(30):
        height, width = rng.integers(3, 24, 2)
        rows, columns = np.mgrid[:height, :width]
        blobs = [
            ((rows - rng.uniform(0, height)) ** 2 + (columns - rng.uniform(0, width)) ** 2 < rng.uniform(2, 60))
            for _ in range(4)
        ]
        target, prediction = blobs[0] | blobs[1], blobs[2] | blobs[3]
        missed, added = target & ~prediction, prediction & ~target
        if not (missed | added).any():
            assert click_on_error(target, prediction) is None
            continue
        depth = [deepest_point(region) if region.any() else (0, set()) for region in (missed, added)]
        point, label = click_on_error(target, prediction)
        assert label == (depth[0][0] > depth[1][0]) and point in depth[1 - label][1]
        labels.add(label)
    assert labels == {0, 1}
    mask = np.zeros((20, 30), dtype=bool)
    mask[:, :11] = True  # the left third, which goes on beyond the image for all one can see
    assert click_on_error(mask, np.zeros_like(mask)) == ((5.0, 5.0), 1)
    assert click_on_error(np.zeros_like(mask), mask) == ((5.0, 5.0), 0)


class ScriptedModel:
    """Its mask of an object is what `predict` makes of the frame, the object and what was given on that frame."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, predict):
        self.predict, self.calls = predict, []

    def __call__(self, session, frame_idx):
        self.calls.append(frame_idx)
        ids = list(session.prompts)
        masks = [self.predict(frame_idx, i, session.prompts[i].get(frame_idx, [])) for i in ids]
        logits = torch.from_numpy(np.stack(masks)).float()[:, None] * 20 - 10
        return SamoeTrackingOutput(
            frame_idx=frame_idx,
            object_ids=ids,
            pred_masks=logits,
            object_score_logits=torch.ones(len(ids), 1),
            iou_scores=torch.ones(len(ids), 1),
        )

    def frame_steps(self, session, frame_idx):
        yield self(session, frame_idx)

    def steps_from_prompts(self, session, start):
        return (self(session, frame_idx) for frame_idx in range(start, session.num_frames))


class ScriptedProcessor:
    """Keeps what is given in the session as `prompts`, object -> frame -> inputs."""

    def __init__(self):
        self.clear = []

    def add_inputs_to_inference_session(self, session, frame_idx, object_id, clear_old_inputs=True, **inputs):
        vars(session).setdefault("prompts", {})
        session.prompts.setdefault(object_id, {}).setdefault(frame_idx, []).append(inputs)
        self.clear.append(clear_old_inputs)

    def post_process_masks(self, masks, sizes, binarize):
        assert not binarize
        return masks


def squares(num_frames, absent=()):
    """Object 3 stands still; object 7 appears on frame 2 and is away on the frames `absent`."""
    masks = np.zeros((num_frames, 2, 32, 48), dtype=bool)
    masks[:, 0, 4:20, 4:20] = True
    masks[2:, 1, 10:21, 30:41] = True
    masks[list(absent), 1] = False
    return Video.from_arrays("squares", np.zeros((num_frames, 32, 48, 3), np.uint8), masks, [3, 7])


def track(video, prompt, predict, seed=42, overlapping=False):
    model = ScriptedModel(predict)
    user = SimulatedUser(model, ScriptedProcessor(), video, PromptStrategy.parse(prompt), seed)
    return user, list(user.track(overlapping))


def truth(video):
    return lambda t, i, given: video.masks(t, [i])[0]


@pytest.mark.parametrize(
    "prompt", ["mask", "box", "point", "clicks:1", *(f"clicks:1@3{x}" for x in ("", ":offline", ":look", ":even"))]
)
def test_objects_are_prompted_on_the_first_frame_that_shows_them(prompt):
    video = squares(5)
    user, frames = track(video, prompt, truth(video))
    assert [(given.object_id, given.frame_idx) for given in user.given] == [(3, 0), (7, 2)]
    first, second = user.given
    if prompt == "mask":
        np.testing.assert_array_equal(second.mask, video.masks(2, [7])[0])
    elif prompt == "box":
        assert first.box == (4, 4, 19, 19) and second.box == (30, 10, 40, 20)
    elif prompt == "point":
        (x, y), label = second.points[0], second.labels
        assert video.masks(2, [7])[0][int(y), int(x)] and label == [1]
    else:
        assert (second.points, second.labels) == ([(35.0, 15.0)], [1])
    assert [frame.frame_idx for frame in frames] == [0, 1, 2, 3, 4]
    assert not frames[1].masks[1].any() and frames[1].scores.tolist() == [1, -np.inf]
    for frame in frames:
        np.testing.assert_array_equal(frame.masks, video.masks(frame.frame_idx))


def test_drawn_points_depend_on_the_seed_and_the_object_alone():
    def points(video, seed):
        return {given.object_id: given.points for given in track(video, "point:3", truth(video), seed)[0].given}

    first = points(squares(4), 42)
    assert len(set(first[7])) == 3 and first == points(squares(6), 42) != points(squares(4), 1042)
    assert len(sample_points(squares(4).masks(0, [3])[0], 500, np.random.default_rng(0))) == 16 * 16


def test_clicks_follow_the_error_until_nothing_is_wrong():
    video = squares(3)

    def predict(t, object_id, given):
        """Finds the left half at first, the whole with the second click."""
        mask = video.masks(t, [object_id])[0].copy()
        if object_id == 3 and t == 0 and len(given) < 2:
            mask[:, 12:] = False
        return mask

    user, frames = track(video, "clicks:5", predict)
    of_3 = [given for given in user.given if given.object_id == 3]
    # In the middle of the whole first, then of the missed half, and then no more.
    assert [given.points[0] for given in of_3] == [(11.0, 11.0), (15.0, 7.0)]
    assert video.masks(0, [3])[0][7, 15] and not predict(0, 3, [1])[7, 15]
    assert len(user.given) == 3 and set(user.processor.clear) == {False}
    np.testing.assert_array_equal(frames[0].masks[0], video.masks(0, [3])[0])


def test_online_the_user_pauses_where_the_iou_is_below_three_quarters():
    video = squares(8, absent=[6])

    def predict(t, object_id, given):
        mask = video.masks(t, [object_id])[0].copy()
        if object_id == 3 and not given:
            height = {1: 4, 3: 5, 4: 3, 5: 8}.get(t, 0)  # rows that are missed: IoU 0.75, 0.69, 0.81, 0.5
            mask[4 : 4 + height] = False
        if object_id == 7 and t == 6 and not given:
            mask[10:20, 30:40] = True
        return mask

    user, _ = track(video, "clicks:1@3", predict)
    assert [(given.object_id, given.frame_idx) for given in user.given] == [(3, 0), (7, 2), (3, 3), (3, 5), (7, 6)]
    in_missed, on_absent = user.given[2], user.given[4]
    assert 4 <= in_missed.points[0][1] < 9 and in_missed.labels == [1] and on_absent.labels == [0]
    # Two frames of each object only.
    user, _ = track(video, "clicks:1@2", predict)
    assert [(given.object_id, given.frame_idx) for given in user.given] == [(3, 0), (7, 2), (3, 3), (7, 6)]
    # Without further frames none.
    assert len(track(video, "clicks:1", predict)[0].given) == 2


def test_offline_the_user_corrects_the_worst_frame_of_each_pass():
    video = squares(6)

    def predict(t, object_id, given):
        mask = video.masks(t, [object_id])[0].copy()
        if object_id == 3 and not given:
            mask[4 : 4 + {1: 2, 3: 3, 4: 6}.get(t, 0)] = False
        return mask

    user, frames = track(video, "clicks:2@3:offline", predict)
    assert [(given.object_id, given.frame_idx) for given in user.given] == [(3, 0), (7, 2), (3, 4), (3, 3)]
    assert [frame.frame_idx for frame in frames] == list(range(6))
    assert not frames[1].masks[1].any()  # object 7 stays unknown before its first frame in every pass


def test_after_a_pass_the_user_corrects_what_is_worth_a_look_or_even_frames():
    video = squares(12)

    def predict(t, object_id, given):
        mask = video.masks(t, [object_id])[0].copy()
        if object_id == 3 and 6 <= t < 9 and not given:
            mask[4:12] = False
        return mask

    prompts = {
        f"{kind}@3:{order}": t for kind in ("clicks:2", "mask", "box") for order, t in (("look", 6), ("even", 7))
    }
    for prompt, corrected in prompts.items():
        user, frames = track(video, prompt, predict)
        given = [(given.object_id, given.frame_idx) for given in user.given]
        assert given[:2] == [(3, 0), (7, 2)] and given[2:] == [(3, corrected)]
        assert [(row.frame, row.object, row.prompted) for frame in frames for row in frame.rows] == [
            (t, i, (i, t) in given) for t in range(12) for i in (3, 7) if t >= 2 or i == 3
        ]


def test_a_pixel_belongs_to_one_object_unless_objects_may_overlap_and_logits_are_numbers():
    video, everything = squares(3), np.ones((32, 48), dtype=bool)
    for overlapping, share in ((False, 1), (True, 2)):
        _, frames = track(video, "mask", lambda *_: everything, overlapping=overlapping)
        assert frames[2].masks.sum() == share * everything.size
    # A mask would be empty where its logits are NaN, and its score 0.
    with pytest.raises(ValueError, match=r"the model predicts NaN on frame 1, in torch\.float32"):
        track(video, "mask", lambda frame_idx, *_: everything * (np.nan if frame_idx else 1.0))


def test_clicks_reach_the_model_all_together_with_its_mask(nano, monkeypatch):
    video, sessions = SyntheticVideos(1, 4, (96, 128), seed=3)[0], []

    def steps(session, frame_idx):
        sessions.append(session)
        return SamoeModel.frame_steps(nano.model, session, frame_idx)

    monkeypatch.setattr(nano.model, "frame_steps", steps)
    user = SimulatedUser(nano.model, build_processor(nano.model.config), video, PromptStrategy.parse("clicks:3@2"))
    frames = list(user.track())
    assert frames[3].masks.shape == (len(video.object_ids), 96, 128) and np.isfinite(frames[3].scores).all()
    for object_id in video.object_ids:
        given, session = [prompt for prompt in user.given if prompt.object_id == object_id], sessions[0]
        inputs = session.point_inputs_per_obj[session.obj_id_to_idx(object_id)]
        assert len(inputs) <= 2
        for frame_idx, points in inputs.items():
            clicks = [prompt for prompt in given if prompt.frame_idx == frame_idx]
            assert points["point_labels"].flatten().tolist() == [prompt.labels[0] for prompt in clicks]
            expected = torch.tensor([prompt.points[0] for prompt in clicks]) * nano.model.config.image_size
            torch.testing.assert_close(points["point_coords"][0, 0], expected / torch.tensor([128.0, 96.0]))


def late_video(seed):
    """A video of 12 frames, whose three objects are shown from frames on that are drawn at random."""
    shown, starts = SyntheticVideos(1, 12, (64, 64), seed=3)[0], np.random.default_rng(seed).integers(0, 10, 3)
    masks = np.zeros((12, 3, 64, 64), bool)
    for row, start in enumerate(starts):
        for t in range(start, 12):
            masks[t, row, 8 * row + t : 8 * row + t + 20, 20 + 6 * row : 40] = True
    return Video.from_arrays("late", np.stack(list(shown.frames)), masks), starts


def alone(video, object_id):
    masks = np.stack([video.masks(t, [object_id]) for t in range(len(video))])
    return Video.from_arrays("late", np.stack(list(video.frames)), masks, [object_id])


def run(model, video, prompt):
    user = SimulatedUser(model, build_processor(model.config), video, PromptStrategy.parse(prompt))
    frames = list(user.track(overlapping=True))
    return user.given, np.stack([frame.masks for frame in frames]), np.stack([frame.scores for frame in frames])


@pytest.mark.parametrize(("seed", "prompt"), [(2, "clicks:1@3"), (3, "clicks:2@2:offline")])
def test_objects_that_come_late_are_to_the_bit_what_each_is_alone(nano, seed, prompt, monkeypatch):
    run_rows_one_by_one(monkeypatch)
    video, starts = late_video(seed)
    given, masks, scores = run(nano.model, video, prompt)
    for row, start in enumerate(starts):
        own_given, own_masks, own_scores = run(nano.model, alone(video, row + 1), prompt)
        assert [one for one in given if one.object_id == row + 1] == own_given
        np.testing.assert_array_equal(masks[:, row], own_masks[:, 0])
        np.testing.assert_array_equal(scores[:, row], own_scores[:, 0])
        assert not masks[:start, row].any() and np.isneginf(scores[:start, row]).all()
        assert np.isfinite(scores[start:, row]).all()


def test_corrections_track_no_object_before_its_first_prompt(nano, monkeypatch):
    (video, starts), step, rows = late_video(0), tracking.frame_step, []
    monkeypatch.setattr(tracking, "frame_step", lambda *x, **y: rows.extend(batch_rows().rows) or step(*x, **y))
    run(nano.model, video, "mask@3:even")
    assert {row.object_id for row in rows} == {1, 2, 3}
    assert all(row.frame_idx >= starts[row.object_id - 1] for row in rows)


@pytest.mark.parametrize("prompt, passes", [("mask", 1), ("clicks:3@2", 1), ("clicks:1@2:offline", 2)])
def test_a_pass_encodes_each_frame_once(nano, monkeypatch, prompt, passes):
    (video, starts), encode, encoded = late_video(0), tracking.encode_frames, []

    def count(model, frames):
        encoded.append(len(frames))
        return encode(model, frames)

    monkeypatch.setattr(tracking, "encode_frames", count)
    run(nano.model, video, prompt)
    corrected = 3 if passes == 2 else 0  # between two passes, a frame for each object
    assert 0 <= sum(encoded) - passes * (12 - min(starts)) <= corrected
