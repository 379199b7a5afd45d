"""The backend for Label Studio, started, and called as Label Studio 1.23 calls it."""

import copy
import re

import numpy as np
import pytest
from PIL import Image

import label_studio_backend
from helpers.label_tools import call, corners, iou, serving
from label_studio_backend import Backend, Server
from samoe_hf import small_base
from samoe_hf.data.formats.label_studio import decode_brush
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.data.video_io import write_video
from samoe_hf.inference import load_tracker

VIDEO_CONFIG = """<View>
  <Labels name="videoLabels" toName="video"><Label value="Player"/></Labels>
  <Video name="video" value="$video" framerate="24.0"/>
  <VideoRectangle name="box" toName="video" smart="true"/>
</View>"""
IMAGE_CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="tag" toName="image"><Label value="Cell"/></BrushLabels>
  <KeyPointLabels name="point" toName="image" smart="true"><Label value="Cell"/></KeyPointLabels>
  <RectangleLabels name="frame" toName="image" smart="true"><Label value="Cell"/></RectangleLabels>
</View>"""
LATE = 6  # the frame on which the second object is drawn


@pytest.fixture(scope="module")
def video():
    return next(video for video in SyntheticVideos(8, 16, (96, 128), seed=4) if len(video.object_ids) > 1)


@pytest.fixture(scope="module")
def folder(video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "upload/1").mkdir(parents=True)
    write_video(folder / "upload/1/1a2b3c4d-a clip.mp4", video.frames)
    Image.fromarray(video.frames[0]).save(folder / "upload/1/cell.png")
    (folder.parent / "secret.png").write_bytes((folder / "upload/1/cell.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    return folder


@pytest.fixture(scope="module")
def backend(folder, small_folder):
    return Backend(*load_tracker(small_folder, "cpu"), "base", [folder], num_frames=6)


@pytest.fixture(scope="module")
def url(backend):
    with serving(Server(("127.0.0.1", 0), backend)) as url:
        yield url


def percent(mask):
    """The box around a mask as Label Studio has it."""
    (x0, y0, x1, y1), (height, width) = corners(mask), mask.shape
    box = {"x": x0 / width, "y": y0 / height, "width": (x1 - x0) / width, "height": (y1 - y0) / height}
    return {name: 100 * value for name, value in box.items()}


def key(video, object_id, frame):
    box = percent(video.masks(frame, [object_id])[0])
    return {"frame": frame + 1, "enabled": True, "rotation": 0, "time": (frame + 1) / 24, **box}


def region(video, object_id, frame):
    """A box that was drawn on a frame, as Label Studio sends it."""
    return {
        "id": f"region{object_id}",
        "type": "videorectangle",
        "from_name": "box",
        "to_name": "video",
        "origin": "manual",
        "original_length": len(video),
        "value": {
            "framesCount": len(video),
            "duration": len(video) / 24,
            "sequence": [key(video, object_id, frame)],
            "labels": ["Player"],
        },
    }


def request_of(results, config=VIDEO_CONFIG, address="/data/upload/1/1a2b3c4d-a%20clip.mp4"):
    """A request for a prediction, as `interactive-annotating` of Label Studio makes it."""
    name = "video" if config is VIDEO_CONFIG else "image"
    task = {"id": 7, "data": {name: address}, "project": 1, "drafts": [], "predictions": [], "annotations": []}
    context = None if results is None else {"result": results}
    params = {"login": None, "password": None, "context": context}
    return {"tasks": [task], "project": "1.1764403200", "label_config": config, "params": params}


def drawn(video, kind, is_positive=None, **value):
    """A click or a box on the image."""
    one = {
        "id": "k1",
        "type": kind,
        "from_name": "point",
        "to_name": "image",
        "original_width": 128,
        "original_height": 96,
        "image_rotation": 0,
        "value": {**value, kind: ["Cell"], "labels": ["Cell"]},
    }
    return one if is_positive is None else {**one, "is_positive": is_positive}


def click(mask, is_positive=True, kind="keypointlabels"):
    ys, xs = np.nonzero(mask)
    middle = len(ys) // 2
    x, y = 100 * (xs[middle] + 0.5) / mask.shape[1], 100 * (ys[middle] + 0.5) / mask.shape[0]
    return drawn(None, kind, is_positive, x=x, y=y, width=0.5)


def filled(box, size):
    mask, (height, width) = np.zeros(size, dtype=bool), size
    x, y, w, h = (box[name] / 100 for name in ("x", "y", "width", "height"))
    mask[round(y * height) : round((y + h) * height), round(x * width) : round((x + w) * width)] = True
    return mask


def test_it_is_there_and_tells_the_models_version(url):
    assert call(f"{url}/health")[:2] == (200, {"status": "UP", "model_class": "VideoSession"})
    setup = {
        "project": "1.1764403200",
        "schema": VIDEO_CONFIG,
        "hostname": "http://localhost:8080",
        "access_token": "0",
        "extra_params": None,
    }
    assert call(f"{url}/setup", setup)[:2] == (200, {"model_version": "base"})
    event = {"action": "ANNOTATION_CREATED", "project": {"id": 1}, "annotation": {}}
    assert call(f"{url}/webhook", event)[:2] == (200, {"status": "ignored"})
    assert call(f"{url}/versions")[0] == call(f"{url}/train", {})[0] == 404


def test_boxes_are_tracked_each_from_its_own_frame(url, video):
    first, second = video.object_ids[:2]
    regions = [region(video, first, 0), region(video, second, LATE)]
    status, answer, _ = call(f"{url}/predict", request_of(regions))
    assert status == 200
    (prediction,) = answer["results"]
    assert prediction["model_version"] == "base" and 0 < prediction["score"] <= 1
    for given, result, object_id, start in zip(regions, prediction["result"], (first, second), (0, LATE), strict=True):
        sequence = result["value"].pop("sequence")
        assert sequence[0] == given["value"].pop("sequence")[0]  # what was drawn stays
        assert {name: result[name] for name in given} == given
        frames = [one["frame"] - 1 for one in sequence]
        assert frames == list(range(start, start + 7))
        assert [one["enabled"] for one in sequence] == [True] * 6 + [False]  # the video goes on
        assert all(one["time"] == pytest.approx(one["frame"] / 24) for one in sequence)
        truth = [filled(percent(video.masks(t, [object_id])[0]), (96, 128)) for t in frames]
        overlap = [iou(filled(one, (96, 128)), true) for one, true in zip(sequence, truth, strict=True)]
        assert np.mean(overlap) > 0.7 and min(overlap) > 0.4


def test_keyframes_that_are_drawn_later_correct_a_track(url, video):
    one = region(video, video.object_ids[0], 0)
    one["value"]["sequence"].append(key(video, video.object_ids[0], 4))
    sequence = call(f"{url}/predict", request_of([one]))[1]["results"][0]["result"][0]["value"]["sequence"]
    assert [sequence[0], sequence[4]] == one["value"]["sequence"] and len(sequence) == 11
    one["value"]["sequence"][1]["enabled"] = False  # it leaves there
    sequence = call(f"{url}/predict", request_of([one]))[1]["results"][0]["result"][0]["value"]["sequence"]
    assert [one["frame"] for one in sequence] == [1, 2, 3, 4, 5] and not sequence[-1]["enabled"]


def test_where_an_object_is_not_seen_its_track_pauses():
    boxes = {0: None, 1: {"x": 1.0}, 2: None, 3: None, 4: {"x": 4.0}}
    sequence = label_studio_backend.sequence_of([{"frame": 1, "enabled": True}], boxes, 10, is_cut=False)
    assert [(one["frame"], one["enabled"]) for one in sequence] == [(1, True), (2, False), (5, True)]


@pytest.mark.parametrize("kind", ["keypointlabels", "rectanglelabels"])
def test_what_is_drawn_on_an_image_becomes_a_brush(url, video, kind):
    mask = video.masks(0, [video.object_ids[0]])[0]
    given = click(mask) if kind == "keypointlabels" else drawn(video, kind, rotation=0, **percent(mask))
    status, answer, _ = call(
        f"{url}/predict", request_of([given], IMAGE_CONFIG, "/data/local-files/?d=upload/1/cell.png")
    )
    assert status == 200
    (result,) = answer["results"][0]["result"]
    value = result.pop("value")
    assert result.pop("id") and 0 < result.pop("score") <= 1
    assert result == {
        "type": "brushlabels",
        "from_name": "tag",
        "to_name": "image",
        "original_width": 128,
        "original_height": 96,
        "image_rotation": 0,
    }
    assert value["format"] == "rle" and value["brushlabels"] == ["Cell"]
    brush = decode_brush(bytes(value["rle"]), 96 * 128 * 4).reshape(96, 128, 4)[..., 3] > 0
    assert iou(brush, mask) > 0.7


def test_all_that_is_drawn_of_an_object_counts_together(video):
    results = [
        drawn(video, "keypointlabels", True, x=50, y=25, width=0.5),
        drawn(video, "keypointlabels", False, x=100, y=100, width=0.5),
        drawn(video, "rectanglelabels", x=25, y=50, width=50, height=25, rotation=0),
    ]
    prompt = label_studio_backend.image_prompt(results, (96, 128))
    assert prompt.points == [(64, 24), (127, 95)] and prompt.labels == [1, 0] and prompt.box == (32, 48, 96, 72)


def test_nothing_is_predicted_where_nothing_is_drawn(url):
    assert call(f"{url}/predict", request_of(None))[:2] == (200, {"results": []})
    assert call(f"{url}/predict", request_of([]))[:2] == (200, {"results": []})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_config": "<View"}, "not one of Label Studio's"),
        ({"label_config": IMAGE_CONFIG}, "no <Image> or <Video> 'video'"),
        ({"label_config": VIDEO_CONFIG.replace('"24.0"', '"12"')}, 'needs framerate="24"'),
        ({"tasks": []}, "not one of Label Studio's"),
        ({"tasks__0__data__video": "/data/upload/1/none.mp4"}, "no file 'upload/1/none.mp4'"),
        ({"tasks__0__data__video": "/data/local-files/?d=../secret.png"}, "no path within a folder"),
        ({"tasks__0__data__video": "/data/upload/..%2F..%2Fsecret.png"}, "no path within a folder"),
        ({"tasks__0__data__video": "/data/local-files/?d=/etc/passwd"}, "no path within a folder"),
        ({"tasks__0__data__video": "/data/local-files/?d=link.png"}, "there is no file"),
        ({"tasks__0__data__video": "http://169.254.169.254/x.mp4"}, "is no upload"),
        ({"tasks__0__data__video": "s3://bucket/x.mp4"}, "is no upload"),
        ({"params__context__result__0__value__sequence": []}, "no keyframe|empty"),
        ({"params__context__result__0__value__sequence__0__rotation": 12}, "turned by 12"),
        ({"params__context__result__0__value__sequence__0__frame": 99}, "the frames 0 to 15"),
        ({"params__context__result__0__value__sequence__0__x": 300}, "outside of the video"),
        ({"params__context__result__0__value__sequence__0__x": float("nan")}, "finite"),
        ({"params__context__result__0__value__sequence__0__x": "left"}, "not one of Label Studio's"),
    ],
)
def test_a_bad_request_is_answered_with_its_reason(url, video, changes, message):
    request = request_of([region(video, video.object_ids[0], 0)])
    for path, value in changes.items():
        request = set_at(request, path.split("__"), value)
    status, answer, reason = call(f"{url}/predict", request)
    assert status == 400 and re.search(message, answer["error"])
    assert reason == " ".join(answer["error"].split()).replace("…", "?")


def set_at(value, path, new):
    """A copy in which the place of a path is another."""
    value = copy.copy(value)
    first = int(path[0]) if isinstance(value, list) else path[0]
    value[first] = new if len(path) == 1 else set_at(value[first], path[1:], new)
    return value


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([{"original_width": 640}], "labelled as"),
        ([{"image_rotation": 90}], "turned by 90"),
        ([{"value": {"x": 1, "y": 1}}], "no label"),
        ([{"value": {"x": 130, "y": 1, "keypointlabels": ["Cell"]}}, {"value": {"y": 1}}], "not one of"),
    ],
)
def test_a_bad_image_request_is_refused(url, video, results, message):
    clicks = [{**click(video.masks(0)[0]), **change} for change in results]
    status, answer, _ = call(f"{url}/predict", request_of(clicks, IMAGE_CONFIG, "/data/upload/1/cell.png"))
    assert status == 400 and message in answer["error"]


def test_what_is_not_json_is_refused(url):
    assert call(f"{url}/predict", b"{")[0] == 400


def test_a_model_that_is_not_there_and_a_port_that_is_taken_are_said_in_a_line(url, tmp_path, capsys):
    port = url.rpartition(":")[2]
    for model, message in ((str(tmp_path / "none"), "none"), (small_base(), f"--port {port}: ")):
        with pytest.raises(SystemExit):
            label_studio_backend.main([model, "--data", str(tmp_path), "--port", port])
        assert message in capsys.readouterr().err.splitlines()[-1]
