"""Corrected videos are collected, and learned from in another process."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml

from helpers.app import maps_of, run_all
from helpers.processes import wait_until
from samoe_hf import SamoeModel, load_videos, small_base
from samoe_hf.app.learning import Learner, Learning, collect_video, collected, draw_curves
from samoe_hf.app.models import load_model
from samoe_hf.continual.adapt import adapt
from samoe_hf.training.arguments import parse_run


@pytest.fixture(scope="module")
def corrected(make_session):
    """A tracked video whose masks are boxes that move, as if they had been corrected until they were right."""
    session = make_session()
    session.click(session.add_object(), 0, 30, 30)
    for frame in range(session.num_frames):
        ids = np.zeros((64, 96), np.uint8)
        ids[20:40, 10 + 4 * frame : 30 + 4 * frame] = 1
        session.masks.write(frame, ids)
    return session


@pytest.fixture
def data(corrected, tmp_path):
    collect_video(corrected, tmp_path / "data")
    return tmp_path / "data"


def wait(learning: Learning, until=lambda learning: learning.state != "running") -> None:
    wait_until(lambda: until(learning), 120, learning.problem)


def test_collected_videos_are_what_load_videos_reads(corrected, tmp_path):
    first, second = collect_video(corrected, tmp_path / "data"), collect_video(corrected, tmp_path / "data")
    assert [path.name for path in collected(tmp_path / "data")] == ["small", "small-2"] == [first.name, second.name]
    videos = load_videos(tmp_path / "data")
    assert len(videos) == 2
    for video in videos:
        assert len(video) == 8 and video.object_ids == [1] and video.annotated_frames == list(range(8))
        assert (np.stack([video.id_map(t) for t in range(8)]) == maps_of(corrected)).all()
        assert (video.frames[3] == corrected.frame(3)).all()


def test_only_frames_with_masks_of_an_object_are_collected(session, tmp_path):
    session.click(session.add_object(), 2, 30, 30)
    with pytest.raises(ValueError, match="Track the video first"):
        collect_video(session, tmp_path / "data")
    run_all(session.propagate("forward", 2))
    collect_video(session, tmp_path / "data")
    (video,) = load_videos(tmp_path / "data")
    assert video.frames.names == [f"{t:05d}" for t in range(2, 8)]
    session.remove_object(1)
    with pytest.raises(ValueError, match="all empty"):
        collect_video(session, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["", "../x", "auto", "x" * 65, "x\n"])
def test_names_that_are_no_domains(small_model, data, tmp_path, name):
    learner = Learner(data, tmp_path / "models")
    with pytest.raises(ValueError, match="A domain's name must be"):
        learner.start("me", small_model, name, 3)
    assert learner.current is None and not (tmp_path / "models").exists()


@pytest.fixture
def learn_part():
    """The class, whose file imports Gradio."""
    pytest.importorskip("gradio", reason="needs the `app` extra")
    from samoe_hf.app.learn_page import LearnPart

    return LearnPart


def test_spaces_around_a_name_do_not_count(learn_part):
    part, person = Mock(), Mock(changed={})
    person.session.loaded.is_changed = False
    learn_part.begin(part, person, " mine ", 3)
    assert part.learner.start.call_args.args[2:] == ("mine", 3)


def test_without_videos_nothing_is_learned(small_model, tmp_path):
    with pytest.raises(ValueError, match="No video was collected yet"):
        Learning(small_model, "mine", 3, tmp_path / "data", tmp_path / "out")


def test_the_run_is_one_that_samoe_adapt_takes(small_model, data, tmp_path):
    learning = Learning(small_model, "mine", 24, data, tmp_path / "out")
    assert learning.state == "new"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(learning.run()))
    words = ["--model_name_or_path", small_model.source, "--output_dir", str(tmp_path / "x")]
    model, data, _, _, arguments = parse_run([str(tmp_path / "run.yaml"), *words])
    assert arguments.max_steps == 24 and arguments.save_steps == 2 and data.num_frames == 4
    assert model.expert_modules == learning.run()["expert_modules"]
    original = replace(small_model, source="moe.pt", original={"experts": "experts.pt", "config": "sizes.yaml"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(Learning(original, "mine", 24, learning.data, tmp_path).run()))
    model, *_ = parse_run([str(tmp_path / "run.yaml"), "--model_name_or_path", "moe.pt", *words[2:]])
    assert (model.experts, model.config) == ("experts.pt", "sizes.yaml")


def test_of_all_checkpoints_the_best_is_kept(corrected, tmp_path):
    collect_video(corrected, tmp_path / "data")
    loaded = load_model(small_base(), "cpu", image_size=64)
    settings = Learning(loaded, "mine", 3, tmp_path / "data", tmp_path / "x").run()
    spoiling = {"learning_rate": 100.0, "warmup_steps": 3, "num_correction_clicks": 1}
    spoiling["lr_scheduler_type"] = "constant_with_warmup"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | spoiling))  # everything but the first step
    result = adapt(loaded.source, "mine", [str(tmp_path / "run.yaml")], tmp_path / "out")
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    scores = [log["eval_J&F"] for log in history if "eval_J&F" in log]
    assert scores[-1] < max(scores) == result.after["eval_J&F"]


def test_it_is_learned_at_the_size_that_the_page_tracks_at(data, tmp_path):
    learning = Learning(load_model(small_base(), "cpu", image_size=64), "mine", 3, data, tmp_path / "out")
    assert learning.run()["image_size"] == 64


def test_what_a_run_has_logged_is_drawn(small_model, data, tmp_path):
    learning = Learning(small_model, "mine", 24, data, tmp_path / "out")
    assert learning.curves() == {"loss": [], "J&F": []} and learning.scores() is None
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_J&F": 0.5}]
    for step, content in ((2, json.dumps({"log_history": history})), (4, "{")):  # the last one is being written
        (learning.output / f"checkpoint-{step}").mkdir(parents=True)
        (learning.output / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    curves = learning.curves()
    assert curves == {"loss": [(1, 2.0), (2, 1.0)], "J&F": [(2, 0.5)]} and draw_curves(curves).axes


def test_what_is_half_collected_is_no_video(corrected, data, monkeypatch):
    """Such as where the app was killed, or the disk is full."""
    (data / ".small-2.0123abcd" / "frames").mkdir(parents=True)
    (data / ".small-2.0123abcd" / "masks").mkdir()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("samoe_hf.app.learning.write_palette_png", lambda *_: (_ for _ in ()).throw(OSError("No space")))
        collect_video(corrected, data)
    assert [path.name for path in collected(data)] == ["small"] and len(load_videos(data)) == 1


class Process:
    """Stands for `samoe adapt`."""

    started: ClassVar[list[list[str]]]

    def __init__(self, command, **_):
        Process.started.append(command)
        self.code = None
        time.sleep(0.05)

    def poll(self):
        return self.code

    def wait(self, timeout=None):
        return self.code

    def terminate(self):
        self.code = 1


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr("samoe_hf.app.learning.subprocess.Popen", Process)
    monkeypatch.setattr(Process, "started", [], raising=False)
    return Process.started


def at_once(*calls) -> list[str]:
    """Runs all in threads of their own; gives what was refused."""
    refused = []

    def run(call):
        try:
            call()
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return refused


def test_of_several_clicks_at_once_one_starts_and_one_resumes(small_model, data, tmp_path, processes):
    learner = Learner(data, tmp_path / "models")
    assert len(at_once(*[lambda: learner.start("me", small_model, "mine", 5)] * 3)) == 2 and len(processes) == 1
    learner.of("me").stop()
    assert at_once(*[lambda: learner.resume("me")] * 2) == ["Learning runs already."] and len(processes) == 2
    learner.of("me").stop()
    again = [lambda: learner.resume("me"), lambda: learner.start("you", small_model, "other", 5)]
    assert len(at_once(*again)) == 1 and len(processes) == 3


def test_what_a_run_left_beside_its_folder_is_not_the_next_ones(small_model, two_domains, data, tmp_path, processes):
    for loaded in (small_model, two_domains, small_model):
        learner = Learner(data, tmp_path / "models")  # the app was started anew
        learner.start("me", loaded, "mine", 5).stop()
    assert [Path(command[command.index("--output") + 1]).name for command in processes] == [
        "mine-1",
        "mine-2",
        "mine-3",
    ]
    sources = [command[command.index("adapt") + 1] for command in processes]
    assert sources == [small_model.source, two_domains.source, small_model.source]


@pytest.mark.parametrize("after, said", [(0.7, "Nothing was won.** "), (0.71, "Learned.** ")])
def test_the_page_goes_on_with_what_was_learned_where_that_is_better(
    small_model, data, tmp_path, processes, monkeypatch, learn_part, after, said
):
    learner, person = Learner(data, tmp_path / "models"), Mock(secret="me")
    learning = learner.start("me", small_model, "mine", 5)
    learning.output.mkdir()
    learning._process.code = 0
    scores = {"before": {"eval_J&F": 0.7}, "after": {"eval_J&F": after}}
    (learning.output / "adaptation.json").write_text(json.dumps(scores))
    part = Mock(learner=learner)
    part.app.learner, part.result.run, part.track.view = learner, lambda *_: [], lambda _: {}
    assert said in learn_part.refresh(part, person)[part.state]
    assert "The gate knew" not in learn_part.refresh(part, person)[part.state]
    load = Mock()
    monkeypatch.setattr("samoe_hf.app.learn_page.load_model", load)
    monkeypatch.setattr("samoe_hf.app.learn_page.Comparison", Mock())
    (shown,) = learn_part.track_again(part, person)
    assert shown[part.track.slider] == 0  # as the frame that is shown
    options = {"dtype": torch.float32, "unknown": "base", "memory_selection": "recent"}
    load.assert_called_once_with(str(learning.output), torch.device("cpu"), **options)
    assert person.the_session().use.called == (after > 0.7)


def test_a_domain_that_goes_on_is_told_to_be_known_anew(two_domains, data, tmp_path, processes, learn_part):
    learner = Learner(data, tmp_path / "models")
    learner.start("me", two_domains, "first", 5)
    part = Mock(learner=learner)
    part.app.learner = learner
    assert "The gate knew *first* by 8 videos before." in learn_part.refresh(part, Mock(secret="me"))[part.state]


@pytest.mark.slow
def test_a_run_that_fails_says_why(small_model, data, tmp_path):
    learning = Learning(small_model, "mine", 3, data, tmp_path / "out")
    for path in data.glob("*/frames/*"):
        path.write_bytes(b"broken")
    learning.start()
    wait(learning)
    assert learning.state == "failed" and learning.problem().startswith("error: ")
    assert str(tmp_path) not in learning.problem() and learning.scores() is None


@pytest.mark.slow
def test_learning_is_stopped_and_resumed(small_model, data, tmp_path):
    learner = Learner(data, tmp_path / "models")
    learning = learner.start("me", small_model, "mine", 120)
    with pytest.raises(ValueError, match="one thing at a time"):
        learner.start("you", small_model, "other", 3)
    with pytest.raises(ValueError, match="You have not started"):
        learner.of("you")
    learning.stop()  # before its first checkpoint, so that it starts anew
    assert learning.state == "stopped"
    learning.start()
    wait(learning, lambda learning: len(learning.curves()["J&F"]) >= 2)
    learning.stop()
    assert learning.state == "stopped"
    reached = learning.curves()["J&F"][-1][0]
    assert 20 <= reached < 120
    learning.start()
    wait(learning, lambda learning: len(learning.curves()["J&F"]) > reached // 10 or learning.state != "running")
    wait(learning)
    assert learning.state == "done", learning.problem()
    assert [step for step, _ in learning.curves()["J&F"]] == list(range(10, 121, 10))
    assert all(0 <= score <= 1 for score in learning.scores())
    assert SamoeModel.from_pretrained(learning.output).config.domain_names == ["former", "mine"]
