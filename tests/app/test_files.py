"""What is taken away, and projects: written, opened again, and refused where they were made by hand."""

import json
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pycocotools import mask as coco_mask

from helpers.app import maps_of, run_all
from samoe_hf.app.exports import export_coco, export_format, export_masks, export_overlay, export_tracks
from samoe_hf.app.project import open_project, save_project
from samoe_hf.app.uploads import Limits
from samoe_hf.data import load_videos
from samoe_hf.data.frames import SampleError
from samoe_hf.data.images import read_label_png
from samoe_hf.data.layouts import WRITTEN
from samoe_hf.errors import InputError
from samoe_hf.tracks import read_tracks


@pytest.fixture(scope="module")
def tracked(make_session):
    session = make_session()
    session.click(session.add_object(), 2, 20, 30)
    session.click(1, 2, 30, 30, positive=False)
    session.draw_box(session.add_object(), 2, (50, 10, 90, 50))
    run_all(session.propagate())
    session.remove_object(session.add_object())
    session.end_object(2, 6)
    return session


@pytest.fixture(scope="module")
def project(tracked, tmp_path_factory) -> Path:
    return save_project(tracked, tmp_path_factory.mktemp("project"))


def open_again(path, folder, model, limits=None):
    (folder / "opened").mkdir(exist_ok=True)
    return open_project(path, folder / "opened", model, limits or Limits())


def test_masks_are_palette_pngs_of_every_frame(tracked, tmp_path):
    with zipfile.ZipFile(export_masks(tracked, tmp_path)) as archive:
        archive.extractall(tmp_path / "out")
    files = sorted((tmp_path / "out" / "small").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(8)]
    assert Image.open(files[0]).mode == "P"
    assert (np.stack([read_label_png(file) for file in files]) == maps_of(tracked)).all()
    assert (
        read_tracks(tmp_path / "out" / "tracks.csv")
        == tracked.all_rows()
        == read_tracks(export_tracks(tracked, tmp_path))
    )
    assert {(row.object, row.frame) for row in tracked.all_rows()} == {
        (i, t) for i in (1, 2) for t in range((8, 6)[i - 1])
    }


def test_coco_holds_the_same_masks(tracked, tmp_path):
    document = json.loads(export_coco(tracked, tmp_path).read_text())
    maps = np.zeros((8, 64, 96), np.uint8)
    for one in document["annotations"]:
        mask = coco_mask.decode(one["segmentation"]).astype(bool)
        assert mask.sum() == one["area"] > 0 and not maps[one["image_id"]][mask].any()
        (row,) = (row for row in tracked.rows(one["image_id"]) if row.object == one["track_id"])
        assert (one["score"], one["iou"], one["area"]) == (row.score, row.iou, row.area)
        maps[one["image_id"]][mask] = one["track_id"]
    assert maps.any() and (maps == maps_of(tracked)).all()
    assert [image["frame_index"] for image in document["images"]] == list(range(8))


@pytest.mark.parametrize("kind", WRITTEN)
def test_label_tools_get_the_same_masks_and_the_frames(tracked, tmp_path, kind):
    with zipfile.ZipFile(export_format[kind](tracked, tmp_path)) as archive:
        archive.extractall(tmp_path / "out")
    (video,) = load_videos(tmp_path / "out")
    assert (video.video_id, len(video), video.annotated_frames) == ("small", 8, list(range(8)))
    assert (np.stack([video.id_map(t) for t in range(8)]) == maps_of(tracked)).all()
    assert (video.frames[3] == tracked.frame(3)).all() and len(list(tmp_path.iterdir())) == 2


def test_the_overlay_is_an_mp4_of_all_frames(tracked, session, tmp_path):
    with av.open(str(export_overlay(tracked, tmp_path))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8 and frames[0].shape == (64, 96, 3)
    assert np.abs(frames[2].astype(int) - tracked.frame(2)).max() > 50
    with pytest.raises(ValueError, match="no masks yet"):
        export_overlay(session, tmp_path)


def test_a_project_opens_as_it_was_and_goes_on(tracked, project, tmp_path, small_model):
    opened = open_again(project, tmp_path, small_model)
    assert tracked.objects == opened.objects == [1, 2] and (maps_of(tracked) == maps_of(opened)).all()
    assert tracked.all_rows() == opened.all_rows() and tracked.looks == opened.looks
    given = [{key: prompt.inputs() for key, prompt in one.prompts.items()} for one in (tracked, opened)]
    assert given[0] == given[1] and len(given[0]) == 3 and opened.ends == {2: 6}
    run_all(opened.propagate("forward", 0))  # nothing new is known of frames before the first prompt
    assert maps_of(tracked)[:2].any() and (maps_of(opened)[:2] == maps_of(tracked)[:2]).all()
    assert [opened.rows(t) for t in (0, 1)] == [tracked.rows(t) for t in (0, 1)]
    assert opened.add_object() == 4
    run_all(opened.propagate())
    opened.click(1, 4, 40, 40)


def changed(path, target, document=None, files=None, leave_out=()):
    """A project with another document, or other files."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        contents = {name: archive.read(name) for name in archive.namelist() if name not in leave_out}
        if document is not None:
            contents["project.json"] = json.dumps(document)
        for name, content in {**contents, **(files or {})}.items():
            new.writestr(name, content)
    return target


WRONG = {
    "format": ["other"],
    "version": [2],
    "files": [["00000.mp4"] * 2, [], ["../../x.mp4"], ["/etc/passwd"], [3], "video.mp4", None],
    "objects": [[1, 1], [0], [10**9], ["x"], [None, 2], list(range(1, 200))],
    "last_id": [1, None, 10**9],
    "prompts": [{"a": 1}, [3], None],
    "prompts/0/object_id": [9, None, "x"],
    "prompts/0/frame_idx": [8, -1, 1e300, float("inf"), "x"],
    "prompts/0/points": [[one, [3, 3]] for one in ([1], [1e9, 1], ["x", 1], [10**400, 1])],
    "prompts/0/labels": [[1], [7, 1], 3],
    "prompts/0/end": [True],
    "prompts/2/frame_idx": [2, 8],
    "prompts/1/box": [[5, 5, 5, 1], [float("nan"), 5, 1, 1], [1], 3],
    "masks": [[99], ["x"], [-1], None],
}


@pytest.mark.parametrize("keys", WRONG)
def test_projects_with_a_wrong_document_are_refused(project, tmp_path, small_model, keys):
    with zipfile.ZipFile(project) as archive:
        content = archive.read("project.json")
    for value in WRONG[keys]:
        document = json.loads(content)
        *parents, last = keys.split("/")
        part = document
        for key in parents:
            part = part[int(key) if key.isdecimal() else key]
        part[last] = value
        with pytest.raises(InputError):
            open_again(changed(project, tmp_path / "wrong.zip", document), tmp_path, small_model)


@pytest.mark.parametrize(
    "files",
    [
        {"project.json": "[" * 100_000},
        {"project.json": b"\xff\xfe\x00"},
        {"project.json": json.dumps([1])},
        {"project.json": "{}"},
        {"project.json": " " * (5 * 2**20)},
        {"masks/00002.png": b"junk"},
        {"masks/00002.png": bytes(10**6)},
        {"video/some video.mp4": b"junk"},
        {"../outside.png": b"x"},
    ],
)
def test_projects_with_wrong_files_are_refused(project, tmp_path, small_model, files):
    with pytest.raises(SampleError):
        open_again(changed(project, tmp_path / "wrong.zip", files=files), tmp_path, small_model)
    assert not (tmp_path / "outside.png").exists() and not (tmp_path.parent / "outside.png").exists()


def test_a_project_of_as_many_frames_as_a_video_may_have_can_be_opened(
    tmp_path, make_session, small_model, monkeypatch
):
    monkeypatch.setattr("samoe_hf.app.uploads.MAX_OTHER_FILES", 10)
    (tmp_path / "frames").mkdir()
    for i in range(30):
        Image.new("L", (8, 8)).save(tmp_path / "frames" / f"{i}.png")
    session = make_session(tmp_path / "frames")
    for i in range(30):
        session.masks.write(i, np.zeros((8, 8), np.uint8))
    opened = open_again(save_project(session, tmp_path), tmp_path, small_model, Limits(frames=30))
    assert len(opened.masks.frames) == 30


def mask_png(path, size, value):
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return {"masks/00002.png": path.read_bytes()}


def test_masks_of_a_project_must_fit_its_video(project, tmp_path, small_model):
    small, foreign = mask_png(tmp_path / "1.png", (8, 8), 0), mask_png(tmp_path / "2.png", (64, 96), 77)
    with pytest.raises(SampleError, match="no map of ids of the video's size"):
        open_again(changed(project, tmp_path / "wrong.zip", files=small), tmp_path, small_model)
    with pytest.raises(SampleError, match="no file"):
        open_again(changed(project, tmp_path / "less.zip", leave_out=["masks/00002.png"]), tmp_path, small_model)
    opened = open_again(changed(project, tmp_path / "foreign.zip", files=foreign), tmp_path, small_model)
    assert not opened.id_map(2).any() and not opened.rows(2)  # 77 is no object


def with_rows(path, text):
    """A mask of object 1 with rows that say something else."""
    info = PngInfo()
    info.add_text("rows", text)
    Image.fromarray(np.eye(64, 96, dtype=np.uint8)).save(path, pnginfo=info)
    return {"masks/00002.png": path.read_bytes()}


ROW = [99, -1, 1, 0.5, 0.5, 1, 10**9, None, "x", 0, 0, 0, 0, True]  # of which the scores alone are taken


@pytest.mark.parametrize("object_id,known", [(1, [1]), (2, [2]), (3, []), ("1", []), (None, [])])
def test_scores_of_a_project_are_those_of_its_objects(project, tmp_path, small_model, object_id, known):
    files = with_rows(tmp_path / "1.png", json.dumps([[*ROW[:2], object_id, *ROW[3:]]]))
    rows = open_again(changed(project, tmp_path / "other.zip", files=files), tmp_path, small_model).rows(2)
    assert [(row.object, row.score, row.area) for row in rows] == [(one, 0.5, 64 * (one == 1)) for one in known]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "3", "[3]", "[[1]]", "[" * 10**4, json.dumps([[*ROW[:2], [], *ROW[3:]]])),
        *(json.dumps([[*ROW[:3], x, *ROW[4:]]]) for x in (2, -1, None, [], "x")),
        *(json.dumps([[*ROW[:3], x, *ROW[4:]]]) for x in (float("nan"), float("inf"), 10**400)),
    ],
)
def test_scores_of_a_project_that_are_none_are_refused(project, tmp_path, small_model, text):
    files = with_rows(tmp_path / "1.png", text)
    with pytest.raises(SampleError, match=r"00002\.png: has wrong scores"):
        open_again(changed(project, tmp_path / "wrong.zip", files=files), tmp_path, small_model)


@pytest.mark.parametrize(
    "limits", [Limits(frames=5), Limits(pixels=100), Limits(objects=1), Limits(prompts=2), Limits(upload_bytes=1000)]
)
def test_a_project_must_fit_the_limits(project, tmp_path, small_model, limits):
    with pytest.raises(SampleError):
        open_again(project, tmp_path, small_model, limits)
