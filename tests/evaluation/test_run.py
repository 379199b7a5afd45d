"""Stopped evaluations go on with what is left, and only with the same."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState

from helpers.results import assert_same_scores, perturbed, random_video
from samoe_hf import SamoeModel
from samoe_hf.data import Video
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.fingerprints import video_fingerprint
from samoe_hf.data.predictions import MaskFiles
from samoe_hf.evaluation.evaluate import score_predictions
from samoe_hf.evaluation.run import Evaluation, EvaluationRun, choose_seeds, describe_model
from samoe_hf.evaluation.simulated_user import PromptStrategy


def scored(video, seed=42):
    return score_predictions(video, perturbed(video, seed))


def finish(run, videos, seed=None):
    """Evaluates what is left, and says what that was."""
    left = [video for video in videos if not run.is_finished(video, seed)]
    for video in left:
        for t in range(len(video)):
            run.masks(video, seed).write(video, t, video.masks(t))
        result = replace(scored(video, 42 if seed is None else seed), made_from=video_fingerprint(video))
        result.save(run.scores_path(video, seed))
    return [video.video_id for video in left]


def test_a_stopped_run_goes_on_with_what_is_left(tmp_path):
    videos = [random_video(i, domain="a") for i in range(4)]
    run = EvaluationRun(tmp_path / "run", {"prompt": "mask", "seeds": (1, 2)})
    run.start()
    assert finish(run, videos[:2]) == ["video 0", "video 1"]
    # One that was killed while it wrote.
    run.scores_path(videos[2], None).with_name("video 2.npz.17.partial").write_bytes(b"PK")
    again = EvaluationRun(tmp_path / "run", {"prompt": "mask", "seeds": (1, 2)})
    again.start()
    assert finish(again, videos) == ["video 2", "video 3"] and finish(again, videos) == []
    for video, result in zip(videos, again.load(videos, None), strict=True):
        assert_same_scores(result.scores, scored(video).scores)
    assert len(finish(again, videos, seed=7)) == 4  # another seed's results are apart
    assert again.masks(videos[0], 7).folder != again.masks(videos[0], None).folder


def test_another_evaluation_in_the_same_folder_is_refused_by_what_differs(tmp_path):
    identity = {"prompt": "mask", "dataset": {"kind": "davis", "split": None}}
    video, run = random_video(), EvaluationRun(tmp_path, identity)
    run.start()
    finish(run, [video])
    other = EvaluationRun(tmp_path, identity | {"prompt": "box"})
    with pytest.raises(ValueError, match=r"`prompt` is 'mask', not 'box'.*--overwrite"):
        other.start()
    assert json.loads((tmp_path / "run.json").read_text()) == identity and run.is_finished(video, None)
    for damaged in ("{", "[1]", "3"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"run\.json does not say what was done.*--overwrite"):
            other.start()
    other.start(overwrite=True)
    assert not other.is_finished(video, None) and not (tmp_path / "masks").exists()
    (tmp_path / "run.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not empty, and not the folder of an evaluation"):
            other.start(overwrite)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("video_id, domain", [("../../../x", "a"), ("/x", "a"), ("x", ".."), ("..", "a")])
def test_videos_cannot_lead_out_of_the_folder(tmp_path, video_id, domain):
    run = EvaluationRun(tmp_path, {})
    video = Video(video_id, random_video().frames, random_video().annotations, domain)
    with pytest.raises(ValueError, match="no path within a folder"):
        run.scores_path(video, None)
        run.masks(video, None).files(video_id)


def test_seeds_are_those_of_the_original():
    point, mask = PromptStrategy.parse("point:5"), PromptStrategy.parse("mask")
    assert choose_seeds(point, 10) == [42, 1042, 2042, 3042, 4042, 5042, 6042, 7042, 8042, 9042]
    assert choose_seeds(mask, 10) == [None]
    with pytest.raises(ValueError, match="`seeds` must be at least 1, got 0"):
        choose_seeds(point, 0)


def test_a_model_of_experts_alone_is_reported_beside_its_base(model_folder, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "mine", experts_only=True)
    whole, parts = (
        describe_model(SamoeModel.from_pretrained(path), str(path)) for path in (model_folder, tmp_path / "mine")
    )
    assert whole["source"] == str(model_folder) and "base_model" not in whole
    assert parts["source"] == str(tmp_path / "mine")
    assert parts["base_model"] == {"name_or_path": str(model_folder), "revision": None}
    assert parts["fingerprint"] == whole["fingerprint"]
    with torch.no_grad():
        model.get_parameter("memory_attention.layer_norm.bias")[0] += 1e-3
    assert describe_model(model, str(model_folder))["fingerprint"] != whole["fingerprint"]


def test_results_that_are_damaged_or_of_another_video_are_named(tmp_path):
    videos, run = [random_video(0, domain="a"), random_video(1, domain="a")], EvaluationRun(tmp_path, {})
    run.start()
    finish(run, videos)
    first, second = (run.scores_path(video, None) for video in videos)
    content = first.read_bytes()
    # As where a file system does not tell upper from lower case.
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"video 0\.npz holds the result of a/video 1, not of a/video 0"):
        run.load(videos, None)
    np.savez(first, described=json.dumps({"video_id": "video 0"}), object_ids=[1])
    for damaged in (first.read_bytes(), content[:100], b"", b"PK", content[:-300] + bytes(300)):
        first.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"video 0\.npz holds no result of this version"):
            run.load(videos, None)


def test_what_cannot_be_evaluated_is_refused_before_anything_is_tracked(tmp_path):
    video, prompt = random_video(0, domain="a"), PromptStrategy("mask")
    bare = Video("bare", video.frames, MaskArrays(np.zeros((0, 1, 24, 32), bool), [1], frames=[]))
    groups = r"`groups` has none for the objects \[\('video 0', 300\)\]"
    for videos, options, message in [
        ([], {}, "no videos"),
        ([video, bare], {}, "bare: no frame is annotated"),
        ([video, random_video(0, domain="b"), video], {}, "Two videos are called a/video 0"),
        ([video], {"groups": {("video 0", 2): "seen"}}, groups),
        *(([video], {"surface_tolerance": x}, "must be a length in mm") for x in (-1, math.nan, math.inf)),
    ]:
        with pytest.raises(ValueError, match=message):
            Evaluation(videos, {}, tmp_path, prompt, **options)


def test_masks_that_lie_where_their_results_go_are_not_overwritten(tmp_path):
    video = random_video(0, domain="a")
    masks = MaskFiles(tmp_path / "runs" / "mine" / "masks" / "a")
    for t in range(len(video)):
        masks.write(video, t, video.masks(t))
    evaluation = Evaluation([video], {}, tmp_path, PromptStrategy("mask"))
    for folder in ("runs/mine", "runs/mine/masks"):
        with pytest.raises(ValueError, match="these predictions would be overwritten"):
            evaluation.run_masks(tmp_path / folder, "mine", PartialState(cpu=True))
    assert len(list(masks.folder.rglob("*.png"))) == 5
    state = PartialState(cpu=True)
    entry = evaluation.run_masks(tmp_path / "runs" / "mine" / "masks", "other", state)
    assert entry["summary"]["J_mean"] == 1
    shutil.copytree(masks.folder, tmp_path / "elsewhere")
    (tmp_path / "runs" / "mine" / "run.json").write_text(json.dumps({"model": "tracked these for hours"}))
    with pytest.raises(ValueError, match=r"mine holds the results of another run: .*`model` is 'tracked these"):
        evaluation.run_masks(tmp_path / "elsewhere", "mine", state)
    assert len(list(masks.folder.rglob("*.png"))) == 5
    for label, overwrite in (("other", False), ("mine", True)):
        assert evaluation.run_masks(tmp_path / "elsewhere", label, state, overwrite)["summary"]["J_mean"] == 1
    with pytest.raises(ValueError, match="Labels of models must differ, got other, other"):
        evaluation.results([entry, entry], state)


def test_of_another_run_long_values_are_named_and_not_shown(tmp_path):
    EvaluationRun(tmp_path, {"domains": [{"name": "one", "layers": ["q_proj"] * 99}], "seed": 1}).start()
    with pytest.raises(ValueError, match=r"another run: `domains` is another; `seed` is 1, not 2\. Choose"):
        EvaluationRun(tmp_path, {"domains": [{"name": "two", "layers": ["q_proj"] * 99}], "seed": 2}).start()
