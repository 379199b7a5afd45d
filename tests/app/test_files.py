"""What is taken away, and projects: written, opened again, and refused where they were made by hand."""

import json
import threading
import zipfile
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from helpers.app import run_all, state_of
from samoe_hf.app.exports import export_coco, export_masks, export_overlay
from samoe_hf.app.limits import Limits
from samoe_hf.app.project import open_project, save_project
from samoe_hf.data.video_io import SampleError, read_label_png

LIMITS = Limits()


@pytest.fixture
def tracked(session):
    session.click(session.add_object(), 2, 20, 30)
    session.click(1, 2, 30, 30, positive=False)
    session.draw_box(session.add_object(), 2, (50, 10, 90, 50))
    run_all(session.propagate())
    return session


def open_again(path, tmp_path, model, limits=LIMITS, name="opened"):
    folder = tmp_path / name
    folder.mkdir()
    return open_project(path, folder, model, threading.Lock(), limits)


def test_masks_are_palette_pngs_of_every_frame(tracked, tmp_path):
    with zipfile.ZipFile(export_masks(tracked, tmp_path)) as archive:
        archive.extractall(tmp_path / "out")
    files = sorted((tmp_path / "out" / "small").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(8)]
    assert Image.open(files[0]).mode == "P"
    assert (np.stack([read_label_png(file) for file in files]) == state_of(tracked).maps).all()


def test_coco_holds_the_same_masks(tracked, tmp_path):
    document = json.loads(export_coco(tracked, tmp_path).read_text())
    maps = np.zeros((8, 64, 96), np.uint8)
    for one in document["annotations"]:
        mask = coco_mask.decode(one["segmentation"]).astype(bool)
        assert mask.sum() == one["area"] > 0 and not maps[one["image_id"]][mask].any()
        maps[one["image_id"]][mask] = one["track_id"]
    assert maps.any() and (maps == state_of(tracked).maps).all()
    assert [image["frame_index"] for image in document["images"]] == list(range(8))


def test_the_overlay_is_an_mp4_of_all_frames(tracked, tmp_path):
    with av.open(str(export_overlay(tracked, tmp_path))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8 and frames[0].shape == (64, 96, 3)
    assert np.abs(frames[2].astype(int) - tracked.frame(2)).max() > 50


@pytest.mark.parametrize("export", [export_masks, export_overlay, export_coco])
def test_without_masks_there_is_nothing_to_export(session, tmp_path, export):
    with pytest.raises(ValueError, match="no masks yet"):
        export(session, tmp_path)


def test_a_project_opens_as_it_was_and_goes_on(tracked, tmp_path, small_model):
    tracked.add_object(), tracked.remove_object(3)
    opened = open_again(save_project(tracked, tmp_path), tmp_path, small_model)
    first, second = state_of(tracked), state_of(opened)
    assert first.objects == second.objects == [1, 2] and (first.maps == second.maps).all() and first.maps.any()
    given = [{key: prompt.inputs() for key, prompt in one.prompts.items()} for one in (first, second)]
    assert given[0] == given[1] and len(given[0]) == 2
    assert opened.add_object() == 4
    run_all(opened.propagate())
    opened.click(1, 4, 40, 40)


def test_a_project_of_frames_opens(tmp_path, make_session, small_model):
    (tmp_path / "frames").mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(tmp_path / "frames" / f"{i}.png")
    session = make_session(tmp_path / "frames")
    session.click(session.add_object(), 0, 5, 5)
    opened = open_again(save_project(session, tmp_path), tmp_path, small_model)
    assert opened.num_frames == 3 and (opened.frame(2) == 80).all() and (1, 0) in opened.prompts


def changed(path, target, change=None, files=None, leave_out=()):
    """A project with another document, or other files."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "project.json" and change is not None:
                document = json.loads(content)
                change(document)
                content = json.dumps(document)
            if name not in (files or {}) and name not in leave_out:
                new.writestr(name, content)
        for name, content in (files or {}).items():
            new.writestr(name, content)
    return target


def setting(*keys, value):
    def change(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        setting("format", value="other"),
        setting("version", value=2),
        setting("files", value=[]),
        setting("files", value=["../../x.mp4"]),
        setting("files", value=["/etc/passwd"]),
        setting("files", value=[3]),
        setting("files", value="video.mp4"),
        setting("objects", value=[1, 1]),
        setting("objects", value=[0]),
        setting("objects", value=[10**9]),
        setting("objects", value=["1"]),
        setting("objects", value=[True, 2]),
        setting("objects", value=list(range(1, 200))),
        setting("last_id", value=1),
        setting("last_id", value=None),
        setting("prompts", value={}),
        setting("prompts", value=[3]),
        setting("prompts", 0, "object", value=9),
        setting("prompts", 0, "frame", value=8),
        setting("prompts", 0, "frame", value=-1),
        setting("prompts", 0, "frame", value=1e300),
        setting("prompts", 0, "points", value=[[1]]),
        setting("prompts", 0, "points", value=[[1e9, 1], [3, 3]]),
        setting("prompts", 0, "points", value=[["1", 1], [3, 3]]),
        setting("prompts", 0, "labels", value=[1]),
        setting("prompts", 0, "labels", value=[7, 1]),
        setting("prompts", 1, "box", value=[5, 5, 1, 1]),
        setting("prompts", 1, "box", value=[float("nan"), 5, 1, 1]),
        setting("masks", value=[99]),
        setting("masks", value=["0"]),
        setting("masks", value=[0] * 99),
        setting("is_video", value="yes"),
        lambda document: document["prompts"].append(document["prompts"][0]),
        lambda document: document.clear(),
    ],
)
def test_projects_with_a_wrong_document_are_refused(tracked, tmp_path, small_model, change):
    path = changed(save_project(tracked, tmp_path), tmp_path / "wrong.zip", change)
    with pytest.raises(SampleError) as error:
        open_again(path, tmp_path, small_model)
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize(
    "files",
    [
        {"project.json": "[" * 100_000},
        {"project.json": "nonsense"},
        {"project.json": b"\xff\xfe\x00"},
        {"project.json": json.dumps([1])},
        {"project.json": " " * (5 * 2**20)},
        {"masks/00002.png": b"junk"},
        {"masks/00002.png": bytes(10**6)},
        {"video/video.mp4": b"junk"},
        {"../outside.png": b"x"},
    ],
)
def test_projects_with_wrong_files_are_refused(tracked, tmp_path, small_model, files):
    path = save_project(tracked, tmp_path)
    with zipfile.ZipFile(path) as archive:
        video = next(name for name in archive.namelist() if name.startswith("video/"))
    files = {video if name.startswith("video/") else name: content for name, content in files.items()}
    with pytest.raises(SampleError):
        open_again(changed(path, tmp_path / "wrong.zip", files=files), tmp_path, small_model)
    assert not (tmp_path / "outside.png").exists() and not (tmp_path.parent / "outside.png").exists()


def test_a_mask_of_another_size_or_a_missing_one_is_refused(tracked, tmp_path, small_model):
    path, other = save_project(tracked, tmp_path), tmp_path / "other.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(other)
    wrong = changed(path, tmp_path / "wrong.zip", files={"masks/00002.png": other.read_bytes()})
    with pytest.raises(SampleError, match="no map of ids of the video's size"):
        open_again(wrong, tmp_path, small_model)
    wrong = changed(path, tmp_path / "missing.zip", leave_out=["masks/00002.png"])
    with pytest.raises(SampleError, match="no file"):
        open_again(wrong, tmp_path, small_model, name="second")


def test_ids_in_masks_that_are_no_objects_are_not_shown(tracked, tmp_path, small_model):
    path, other = save_project(tracked, tmp_path), tmp_path / "other.png"
    Image.fromarray(np.full((64, 96), 77, np.uint8)).save(other)
    opened = open_again(
        changed(path, tmp_path / "wrong.zip", files={"masks/00002.png": other.read_bytes()}), tmp_path, small_model
    )
    assert not opened.id_map(2).any()


def test_a_project_must_fit_the_limits(tracked, tmp_path, small_model):
    path = save_project(tracked, tmp_path)
    for number, limits in enumerate((Limits(frames=5), Limits(pixels=100), Limits(objects=1), Limits(prompts=2))):
        with pytest.raises(SampleError):
            open_again(path, tmp_path, small_model, limits, f"opened_{number}")
    with pytest.raises(SampleError, match="when it is unpacked"):
        open_again(path, tmp_path, small_model, replace(Limits(), upload_bytes=1000), "bytes")
