"""`samoe evaluate`: what it prints and writes, and how it goes on; scores and reports are in tests/evaluation."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.edgetam import slow_over_bases
from helpers.own_videos import save_videos
from helpers.processes import LAUNCH
from helpers.reference import ROOT
from samoe_hf import SamoeModel
from samoe_hf.data import SyntheticVideos, read_video
from samoe_hf.evaluation.report import eval_results
from samoe_hf.inference import load_tracker
from samoe_hf.model.processing_samoe import build_processor

NUM_FRAMES = 3
TIMES = ("created", "seconds", "fps", "speed", "num_processes")


@pytest.fixture
def run(samoe):
    return partial(samoe, "evaluate")


@pytest.fixture(scope="module")
def davis(tmp_path_factory) -> list:
    """The options of six short videos in the layout of DAVIS 2017, two of which are its split val."""
    videos = SyntheticVideos(6, NUM_FRAMES, (90, 120), seed=3)
    named = (replace(video, video_id=f"v{number}") for number, video in enumerate(videos))
    places = "JPEGImages/480p/{v}/{t:05d}.jpg", "Annotations/480p/{v}/{t:05d}.png"
    root = save_videos(tmp_path_factory.mktemp("davis"), named, *places)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("v0\nv1\n")
    return ["--dataset", "davis", "--root", root]


def read(folder):
    return json.loads((folder / "results.json").read_text())


def without_times(results):
    if isinstance(results, dict):
        return {name: without_times(value) for name, value in results.items() if name not in TIMES}
    return [without_times(value) for value in results] if isinstance(results, list) else results


def test_objects_that_are_not_scored_are_told(run, model_folder, leave_out_pictures, tmp_path):
    leave_out_pictures()
    words = ["--dataset", "synthetic", "--option", "num_videos=1", "--option", "num_frames=1"]
    said = run(model_folder, *words, "--option", "image_size=[64, 64]", "--output", tmp_path / "out")
    sentence = "objects and 1 of 1 videos have no frame that counts and are left out."
    assert sentence in said and sentence in (tmp_path / "out" / "report.md").read_text()


def test_scores_of_other_masks_are_not_taken_for_the_new_ones(run, model_folder, leave_out_pictures, tmp_path):
    leave_out_pictures()
    video = SyntheticVideos(1, 4, (64, 64), domain="shapes", seed=1)[0]
    for t in range(4):
        for kind, image in (("frames", video.frames[t]), ("masks", (video.id_map(t) == 1).astype(np.uint8))):
            (tmp_path / "data" / "a" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "data" / "a" / kind / f"{t}.png")

    def evaluate(*more):
        printed = run(model_folder, "--dataset", tmp_path / "data", "--output", tmp_path / "out", *more)
        return printed, read(tmp_path / "out")["models"][0]["objects"]

    first = evaluate()[1]
    path = tmp_path / "data" / "a" / "masks" / "2.png"
    path.write_bytes((tmp_path / "data" / "a" / "masks" / "0.png").read_bytes())
    printed, second = evaluate()
    assert "1 results were of other frames or masks" in printed and second != first
    assert second == evaluate("--overwrite")[1]
    (mask,) = (tmp_path / "out" / "runs").rglob("3.png")
    mask.unlink()
    assert evaluate()[1] == second and mask.exists()


@slow_over_bases
def test_a_model_on_a_dataset(run, model_folder, davis, leave_out_pictures, tmp_path):
    arguments = [model_folder, *davis, "--split", "val", "--seeds", 3, "--output", tmp_path]
    printed = run(*arguments)
    assert "draws nothing at random: one run instead of 3" in printed
    assert f"{2 * NUM_FRAMES}/{2 * NUM_FRAMES}" in printed and "frame/s" in printed and "frames per second" in printed
    results = read(tmp_path)
    model = results["models"][0]
    assert model["source"] == str(model_folder) and model["num_experts"] == 4 and len(model["fingerprint"]) == 16
    assert results["seeds"] is None and results["protocol"] == "davis" and results["dataset"]["num_videos"] == 2
    assert [video["video"] for video in model["videos"]] == ["v0", "v1"]
    assert f"{model['summary']['J&F_mean']:.3f}" in printed
    assert eval_results(results)[0].dataset_split == "val"

    masks = tmp_path / "runs" / model["label"] / "masks" / "davis"
    files = sorted(path.relative_to(masks).as_posix() for path in masks.rglob("*.png"))
    assert files == [f"v{n}/{t:05d}.png" for n in range(2) for t in range(NUM_FRAMES)]
    report = (tmp_path / "report.md").read_text()
    links = re.findall(r"\]\((.*?)\)", report)
    assert len(links) == 2 + 2 * len(model["highlights"]) and all((tmp_path / link).is_file() for link in links)
    assert len(read_video(tmp_path / model["highlights"][0]["video_file"])) == NUM_FRAMES
    leave_out_pictures()
    # The masks are what was scored: another evaluation of them gives the same figures.
    run("--predictions", masks, *davis, "--split", "val", "--output", tmp_path / "again")
    again = read(tmp_path / "again")["models"][0]["summary"]
    for name, value in model["summary"].items():
        assert name == "occlusion_accuracy" or again[name] == pytest.approx(value), name
    assert "frame/s" not in run(*arguments), "no bar where nothing is left to do"


@pytest.mark.slow
def test_drawn_points_of_several_seeds(run, model_folder, davis, tmp_path):
    arguments = [model_folder, *davis, "--video", "v0", "--output", tmp_path, "--prompt", "point:2"]
    run(*arguments)
    assert "1 of 2 results are there already" in run(*arguments, "--seeds", 2, "--protocol", "all")
    results = read(tmp_path)
    model = results["models"][0]
    assert results["seeds"] == [42, 1042] and [r["seed"] for r in model["runs"]] == [42, 1042]
    assert (tmp_path / "runs" / model["label"] / "seed_1042" / "masks" / "davis" / "v0" / "00000.png").is_file()
    message = run(*arguments, "--prompt", "box", fails=True)
    assert "`prompt` is 'point:2', not 'box'" in message and read(tmp_path)["prompt"] == "point:2"


def test_what_is_wrong_is_found_before_anything_is_tracked_or_removed(run, model_folder, davis, tmp_path):
    other, out = tmp_path / "other", tmp_path / "out"
    (out / "runs" / "other").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (out / "results.json").touch()
    data = [*davis, "--video", "v0", "--output", out]
    for words, message in (
        ([model_folder, "--model", other], f"{other}"),
        ([model_folder, "--model", tmp_path / "empty"], "empty"),
        ([model_folder, "--predictions", other], "no such folder of predictions"),
        ([model_folder, "--predictions", tmp_path / "empty"], "00001.png"),
        (["--model", other, "--overwrite"], f"{other}"),
    ):
        assert message in run(*words, *data, fails=True)
        assert not (out / "runs" / model_folder.name).exists() and (out / "results.json").exists()
    shutil.copytree(model_folder, other)
    (out / "runs" / "other" / "file").touch()
    assert "is not empty, and not the folder" in run(model_folder, "--model", other, *data, fails=True)
    assert not (out / "runs" / model_folder.name).exists()


def test_models_side_by_side_are_loaded_once(run, model_folder, davis, leave_out_pictures, monkeypatch, tmp_path):
    leave_out_pictures()
    load, model = Mock(wraps=load_tracker), SamoeModel.from_pretrained(model_folder)
    monkeypatch.setattr("samoe_hf.evaluation.run.load_tracker", load)
    with torch.no_grad():
        model.get_parameter("memory_attention.layer_norm.weight").mul_(0.5)
    model.save_pretrained(tmp_path / "other", processor=build_processor(model.config))
    data = ["--model", tmp_path / "other", *davis, "--split", "val", "--output", tmp_path / "out"]
    printed = run("--model", model_folder, *data)
    results = read(tmp_path / "out")
    first, second = results["models"]
    entry = results["comparisons"][0]["metrics"]["J&F_mean"]
    difference = second["summary"]["J&F_mean"] - first["summary"]["J&F_mean"]
    assert entry["difference"] == pytest.approx(difference) and difference != 0 and load.call_count == 2
    assert entry["low"] is entry["high"] is None and "An interval takes 6 videos, and there are 2." in printed
    assert f"{second['label']} less {first['label']}" in printed
    # The positional model is the same as one given by its option, and what it did is kept. Large ones are loaded again.
    monkeypatch.setattr("samoe_hf.commands.evaluate.WAITING_BYTES", 0)
    assert run(model_folder, *data).count("2 of 2 results are there already") == 2 and load.call_count == 2 + 3
    assert without_times(read(tmp_path / "out")) == without_times(results)


@pytest.mark.slow
def test_processes_share_the_videos(run, model_folder, davis, tmp_path):
    # Batches of other sizes round otherwise, so each process tracks its videos one by one.
    alone = "--videos-at-once", 1, "--output"
    arguments = [str(word) for word in (model_folder, *davis, "--prompt", "point", *alone)]
    # As `accelerate launch` does for GPUs; on a CPU it starts one process only.
    command = [*LAUNCH, "-m", "samoe_hf", "evaluate", *arguments, str(tmp_path / "two")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Written: ") == 1
    run(*arguments, tmp_path / "one")
    assert read(tmp_path / "two")["num_processes"] == 2
    assert without_times(read(tmp_path / "two")) == without_times(read(tmp_path / "one"))


@pytest.mark.parametrize("name", ["report.md", "results.json"])
def test_a_file_of_the_users_is_not_replaced(run, davis, tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert f"has a {name} that no evaluation wrote" in run("nowhere", *davis, "--output", tmp_path, fails=True)
    assert [path.read_text() for path in tmp_path.iterdir() if path.is_file()] == ["mine"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "`seeds` must be at least 1, got 0"),
        (["--video", "v9"], "`--video` names ['v9']"),
        (["--split", "train"], "no list for this split; there are: val"),
        (["--predictions", "nowhere"], "nowhere: no such folder of predictions"),
        (["--seen-unseen", "nowhere.json", "b.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_told_in_a_line(run, davis, tmp_path, arguments, message):
    given = [] if "--predictions" in arguments else ["nowhere"]
    assert message in run(*given, *davis, "--output", tmp_path / "out", *arguments, fails=True)
    assert not (tmp_path / "out").exists()
