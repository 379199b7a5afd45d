"""Corrected videos are collected, and learned from in another process."""

import time

import numpy as np
import pytest

from helpers.app import run_all, state_of
from samoe_hf import SamoeModel, load_videos
from samoe_hf.app.collecting import collect_video, collected
from samoe_hf.app.learning import Learner, Learning, check_domain_name
from samoe_hf.app.models import LoadedModel
from samoe_hf.data.configs import names_config
from samoe_hf.training.arguments import parse_run


@pytest.fixture(scope="session")
def saved(model_folder) -> LoadedModel:
    model = SamoeModel.from_pretrained(model_folder).eval()
    from samoe_hf.model.processing_samoe import load_processor

    return LoadedModel("nano", str(model_folder), model, load_processor(model_folder, model))


@pytest.fixture
def corrected(session):
    """A tracked video whose masks are boxes that move, as if they had been corrected until they were right."""
    session.click(session.add_object(), 0, 30, 30)
    run_all(session.propagate())
    for frame in range(session.num_frames):
        ids = np.zeros((64, 96), np.uint8)
        ids[20:40, 10 + 4 * frame : 30 + 4 * frame] = 1
        session.masks.write(frame, ids)
    return session


def wait(learning: Learning, until=lambda learning: learning.state != "running", seconds=120) -> None:
    end = time.monotonic() + seconds
    while not until(learning):
        assert time.monotonic() < end, learning.problem()
        time.sleep(0.2)


def test_collected_videos_are_what_load_videos_reads(corrected, tmp_path):
    first, second = collect_video(corrected, tmp_path / "data"), collect_video(corrected, tmp_path / "data")
    assert [path.name for path in collected(tmp_path / "data")] == ["small", "small-2"] == [first.name, second.name]
    videos = load_videos(tmp_path / "data")
    assert len(videos) == 2
    for video in videos:
        assert len(video) == 8 and video.object_ids == [1] and video.annotated_frames == list(range(8))
        assert (np.stack([video.id_map(t) for t in range(8)]) == state_of(corrected).maps).all()
        assert (video.frames[3] == corrected.frame(3)).all()


def test_only_frames_with_masks_are_collected(session, tmp_path):
    session.click(session.add_object(), 2, 30, 30)
    with pytest.raises(ValueError, match="Track the video first"):
        collect_video(session, tmp_path / "data")
    run_all(session.propagate("forward", 2))
    collect_video(session, tmp_path / "data")
    (video,) = load_videos(tmp_path / "data")
    assert video.frames.names == [f"{t:05d}" for t in range(2, 8)]


def test_masks_without_an_object_are_not_collected(session, tmp_path):
    session.click(session.add_object(), 0, 30, 30)
    run_all(session.propagate())
    session.remove_object(1)
    with pytest.raises(ValueError, match="all empty"):
        collect_video(session, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "1x", "auto", "none", "Base", "x" * 41, None, 3, "é", "x\n"])
def test_names_that_are_no_domains(name):
    with pytest.raises(ValueError, match="`domain` must be a name"):
        check_domain_name(name)


@pytest.mark.parametrize("steps", [0, -1, 20_001, 1.5, True, "10", None])
def test_steps_that_are_no_number_of_steps(saved, corrected, tmp_path, steps):
    collect_video(corrected, tmp_path / "data")
    with pytest.raises(ValueError, match="`steps` must be an integer from 1 to 20000"):
        Learning(saved, "mine", steps, tmp_path / "data", tmp_path / "out")


def test_without_videos_nothing_is_learned(saved, tmp_path):
    with pytest.raises(ValueError, match="No video was collected yet"):
        Learning(saved, "mine", 3, tmp_path / "data", tmp_path / "out")


def test_the_run_is_one_that_samoe_adapt_takes(saved, corrected, tmp_path):
    import yaml

    collect_video(corrected, tmp_path / "data")
    learning = Learning(saved, "mine", 24, tmp_path / "data", tmp_path / "out")
    assert learning.state == "new" and names_config("adapt")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(learning.run()))
    words = ["--model_name_or_path", saved.source, "--output_dir", str(tmp_path / "x")]
    model, data, _, _, arguments = parse_run([str(tmp_path / "run.yaml"), *words])
    assert arguments.max_steps == 24 and arguments.save_steps == 2 and data.num_frames == 4
    assert model.expert_modules == learning.run()["expert_modules"]


def test_a_domain_is_learned_in_another_process(saved, corrected, tmp_path):
    collect_video(corrected, tmp_path / "data")
    learner = Learner(tmp_path / "data", tmp_path / "models")
    learning = learner.start("me", saved, "mine", 3)
    with pytest.raises(ValueError, match="one thing at a time"):
        learner.start("you", saved, "other", 3)
    with pytest.raises(ValueError, match="You have not started"):
        learner.of("you")
    with pytest.raises(ValueError, match="runs already"):
        learning.start()
    wait(learning)
    assert learning.state == "done", learning.problem()
    curve = learning.curve()
    assert [step for step, _ in curve.loss] == [1, 2, 3] == [step for step, _ in curve.score] and curve.draw().axes
    assert all(0 <= score <= 1 for score in learning.scores())
    model = SamoeModel.from_pretrained(learning.output)
    assert model.config.domain_names == ["former", "mine"]  # its experts had an effect, and belonged to no domain
    again = Learner(tmp_path / "data", tmp_path / "models")
    assert learner.of("me") is learning and again.current is None


@pytest.mark.slow
def test_a_run_that_fails_says_why(saved, corrected, tmp_path):
    video = collect_video(corrected, tmp_path / "data")
    learning = Learning(saved, "mine", 3, tmp_path / "data", tmp_path / "out")
    for path in (video / "frames").iterdir():
        path.write_bytes(b"broken")
    learning.start()
    wait(learning)
    assert learning.state == "failed" and learning.problem().startswith("error: ")
    assert str(tmp_path) not in learning.problem() and learning.scores() is None


@pytest.mark.slow
def test_learning_is_stopped_and_resumed(saved, corrected, tmp_path):
    collect_video(corrected, tmp_path / "data")
    learning = Learning(saved, "mine", 120, tmp_path / "data", tmp_path / "out")
    learning.start()
    wait(learning, lambda learning: len(learning.curve().score) >= 2)
    learning.stop()
    assert learning.state == "stopped"
    reached = learning.curve().score[-1][0]
    assert 20 <= reached < 120
    learning.start()
    wait(learning, lambda learning: len(learning.curve().score) > reached // 10 or learning.state != "running")
    wait(learning)
    assert learning.state == "done", learning.problem()
    steps = [step for step, _ in learning.curve().score]
    assert steps == list(range(10, 121, 10))


@pytest.mark.slow
def test_what_stopped_before_its_first_checkpoint_starts_anew(saved, corrected, tmp_path):
    collect_video(corrected, tmp_path / "data")
    learning = Learning(saved, "mine", 2, tmp_path / "data", tmp_path / "out")
    learning.start()
    learning.stop()
    assert learning.state == "stopped"
    learning.start()
    wait(learning)
    assert learning.state == "done", learning.problem()
