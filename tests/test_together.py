"""Videos that are tracked at once are tracked as each is alone, and none is lost by what happens to another."""

import json
import threading
import time

import numpy as np
import pytest

from helpers.edgetam import over_bases, slow_over_bases
from samoe_hf.data import SyntheticVideos, Video, write_video
from samoe_hf.data.annotations import Shapes
from samoe_hf.data.frames import ArrayFrames, SampleError
from samoe_hf.data.video_io import read_video
from samoe_hf.errors import InputError
from samoe_hf.evaluation.evaluate import evaluate_videos
from samoe_hf.inference import VideoPrompt, track_video, tracking_steps
from samoe_hf.labelling import LabelRun, PromptedVideo, label_videos
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.model.tracking import TrackingStep
from samoe_hf.together import Together, choose_videos_at_once, through

SIZES = ((64, 80), (96, 64), (48, 48))
KINDS = [*enumerate(("shapes", "blobs", "stripes"))]
BOX = (10, 8, 40, 40)


@pytest.fixture(autouse=True)
def no_threads_are_left():
    before = {*threading.enumerate()}
    yield
    left = {*threading.enumerate()} - before
    assert not [thread for thread in left if "ThreadPoolExecutor" in thread.name]


def frames_of(number, num_frames=5):
    return SyntheticVideos(1, num_frames, SIZES[number % 3], seed=number)[0].frames


def prompts_of(number, num_frames):
    """A box at the start; in some videos objects that come late, leave, or are corrected."""
    prompts = [VideoPrompt(1, 0, box=BOX)]
    if number % 2:
        prompts += [VideoPrompt(3, 2, points=[(20, 20)], labels=[1]), VideoPrompt(3, num_frames - 1, end=True)]
    if number % 3 == 1:
        prompts += [VideoPrompt(1, 3, points=[(20, 20), (3, 3)], labels=[1, 0])]
    return prompts


def together_with(model, at_once, videos, processor, watched=None):
    """Logits and domain by frame of each video, given as frames and prompts."""

    def work(frames, prompts):
        if watched is not None:
            watched.append(frames)
        found, writer = {}, together.writer()
        steps = tracking_steps(model, processor, together.read_ahead(frames), prompts)
        yield from through(steps, lambda one: writer(found.update, {one.frame_idx: (one.logits.numpy(), one.domain)}))
        return writer(lambda: found)

    with Together(model, at_once) as together:
        return list(together.run(work(*pair) for pair in videos))


@over_bases
def test_videos_of_any_size_length_and_prompts_are_tracked_as_alone(nano, processor):
    lengths = (2, 6, 3, 5, 4)
    videos = [(frames_of(n, length), prompts_of(n, length)) for n, length in enumerate(lengths)]
    rows, begun = [], []
    handle = nano.model.memory_attention.register_forward_pre_hook(lambda _, args: rows.append(len(args[2])))
    found = together_with(nano.model, 3, videos, processor, begun)
    handle.remove()
    assert max(rows) > 3 and len(begun) == 5
    by_length = {len(one): one for one in found}
    for frames, prompts in videos:
        expected = {one.frame_idx: one.logits for one in track_video(nano.model, processor, frames, prompts)}
        own = by_length[len(frames)]
        assert own.keys() == expected.keys()
        for t, logits in expected.items():
            assert np.abs(own[t][0] - logits.numpy()).mean() < 1e-3
            assert ((own[t][0] > 0) != (logits.numpy() > 0)).sum() <= 2


def test_videos_of_different_domains_have_their_own_experts(gated, domain_videos):
    processor = build_processor(gated.config)
    videos = [domain_videos[kind][23] for kind in ("blobs", "stripes", "shapes")]
    pairs = []
    for video in videos:
        ids = video.visible(0)
        masks = zip(ids, video.masks(0, ids), strict=True)
        pairs.append((video.frames, [VideoPrompt(object_id, mask=mask) for object_id, mask in masks]))
    for own, (frames, given) in zip(together_with(gated, 3, pairs, processor), pairs, strict=True):
        for one in track_video(gated, processor, frames, given):
            assert own[one.frame_idx][1] == one.domain
            assert ((own[one.frame_idx][0] > 0) == (one.logits.numpy() > 0)).mean() > 0.999


@slow_over_bases
@pytest.mark.parametrize("prompt", ["clicks:2@3", "clicks:1@2:offline", "box@2:even"])
def test_evaluated_videos_are_scored_as_alone(nano, processor, prompt):
    videos = [SyntheticVideos(1, 6 - n, SIZES[n], seed=n, domain=kind)[0] for n, kind in KINDS]  # the last ends first
    one_by_one, at_once = (
        evaluate_videos(nano.model, processor, videos, False, prompt, videos_at_once=n) for n in (1, 3)
    )
    assert list(at_once) == list(one_by_one)
    for key, result in one_by_one.items():
        assert at_once[key].prompts == result.prompts and at_once[key].seconds > 0
        np.testing.assert_allclose(at_once[key].scores.j, result.scores.j, atol=0.01)


def prompted(name, frames, prompts):
    video = Video(name, frames, Shapes({}, {1}), "d")
    return PromptedVideo("d", name, lambda: video, lambda _: prompts, lambda: name)


class Broken(ArrayFrames):
    def _read(self, index):
        if index == 2:
            raise SampleError("the third frame is damaged")
        return super()._read(index)


def label(nano, processor, folder, videos, at_once):
    from accelerate import PartialState

    run = LabelRun(folder, {}, "davis")
    run.start()
    try:
        return label_videos(nano.model, processor, videos, run, PartialState(cpu=True), False, at_once)
    finally:
        assert not [*(folder / ".unfinished").glob("*")]


def finished(folder):
    return sorted(path.stem for path in (folder / "finished").rglob("*.json"))


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_video_that_fails_takes_no_other_with_it(nano, processor, tmp_path, at_once, capsys):
    frames, box = frames_of(0), [VideoPrompt(1, 0, box=BOX)]
    broken = Broken(np.stack(list(frames)))
    videos = [prompted(name, broken if name == "b" else frames, box) for name in "bacd"]
    with pytest.raises(InputError, match=r"1 of 4 videos are not labelled;.* b: the third frame is damaged"):
        label(nano, processor, tmp_path, videos, at_once)
    assert finished(tmp_path) == [*"acd"]
    assert "b: the third frame is damaged\nThis video is left out." in capsys.readouterr().err
    summary = json.loads((tmp_path / "labels.json").read_text())
    assert summary["failed"].keys() == {"d/b"} and summary["videos"].keys() == {"d/a", "d/c", "d/d"}
    assert summary["labelled_now"] == 3
    videos[0] = prompted("b", frames, box)
    summary = label(nano, processor, tmp_path, videos, at_once)
    assert summary["labelled_now"] == 1 and not summary["failed"]
    assert finished(tmp_path) == [*"abcd"] and len([*tmp_path.rglob("*.png")]) == 20


def test_what_cannot_be_written_stops_its_video_alone(nano, processor, tmp_path, monkeypatch):
    from samoe_hf.data.predictions import MaskFiles

    write = MaskFiles.write

    def full(self, video, frame, masks):
        if video.video_id == "a" and frame == 1:
            raise OSError(28, "No space left on device")
        write(self, video, frame, masks)

    monkeypatch.setattr(MaskFiles, "write", full)
    videos = [prompted(name, frames_of(0), [VideoPrompt(1, 0, box=BOX)]) for name in "ab"]
    with pytest.raises(OSError, match="No space left"):
        label(nano, processor, tmp_path, videos, 2)
    assert finished(tmp_path) == ["b"]


def test_a_stopped_run_leaves_no_thread_and_nothing_half_written(nano, processor, tmp_path):
    class Stopping(ArrayFrames):
        def __getitem__(self, index):
            if threading.current_thread() is threading.main_thread():
                return super().__getitem__(index)
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    frames = frames_of(0, 8)
    videos = [prompted(name, frames, [VideoPrompt(1, 0, box=BOX)]) for name in "ab"]
    videos.append(prompted("c", Stopping(np.stack(list(frames))), [VideoPrompt(1, 0, box=BOX)]))
    with pytest.raises(KeyboardInterrupt):
        label(nano, processor, tmp_path, videos, 3)
    assert not finished(tmp_path) and not [*tmp_path.rglob("*.png")]


def test_frames_are_read_ahead_in_either_direction_and_their_errors_come_with_them():
    read = []

    class Watched(Broken):
        def _read(self, index):
            read.append(index)
            return super()._read(index)

    frames = Watched(np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8))
    with Together(None) as together:
        ahead = together.read_ahead(frames)
        for index, known in ((4, 8), (5, 9), (5, 9), (4, 0), (3, 0)):
            assert ahead[index][0, 0, 0] == index
            while known not in read:
                time.sleep(0.001)
        assert sorted(read) == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
        with pytest.raises(SampleError, match="third frame is damaged"):
            ahead[2]
        assert (ahead.names, ahead.size, len(ahead)) == (frames.names, frames.size, 20)


def test_files_that_are_read_in_turns_stay_open(tmp_path, monkeypatch):
    from samoe_hf.data import containers

    scene, opened, decoder = list(frames_of(0, 6)), [], containers.Decoder
    for n in range(6):
        write_video(tmp_path / f"{n}.mp4", scene)
    monkeypatch.setattr(containers, "Decoder", lambda *x, **y: opened.append(x) or decoder(*x, **y))
    readers = [read_video(tmp_path / f"{n}.mp4") for n in range(6)]
    opened.clear()
    with Together(None, 6) as together:
        ahead = [together.read_ahead(reader) for reader in readers]
        for t in range(6):
            assert all(frames[t].shape == (64, 80, 3) for frames in ahead)
    assert len(opened) == 6


def test_the_time_of_a_step_is_shared():
    step = TrackingStep([], None, seconds=0.0)

    def work():
        time.sleep(0.02)
        yield step
        yield "what came of it"

    took = []
    steps = through(work(), took.append)
    assert next(steps) is step
    step.seconds = 3.0
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert took == ["what came of it"] and 3.02 <= end.value.value < 3.5


def test_how_many_videos_pay_is_chosen_by_the_size_of_images(nano):
    assert choose_videos_at_once(nano.model, None) == 8 and choose_videos_at_once(nano.model, 3) == 3
    with pytest.raises(InputError, match="`videos_at_once` must be at least 1, got 0"):
        choose_videos_at_once(nano.model, 0)
