"""The page as people use it, in a real browser."""

import gc
import json
import time
import zipfile

import numpy as np
import psutil
import pytest

from helpers.app import track_by_hand, write_small_video
from helpers.browser import Page
from helpers.processes import wait_until
from samoe_hf.app.uploads import Limits
from samoe_hf.data.images import read_label_png
from samoe_hf.data.video_io import read_video
from samoe_hf.inference import VideoPrompt


def masks_of_zip(path, folder) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return np.stack([read_label_png(file) for file in sorted(folder.rglob("*.png"))])


def test_click_undo_box_track_correct_and_take_away_as_the_python_api_does(page, small_video, two_domains, tmp_path):
    page.open(small_video)
    assert "click on an object" in page.text("hint")
    page.click(0.3, 0.5)
    first = page.frame_source()
    page.click(0.6, 0.5)
    page.undo()
    assert page.frame_source() == first
    page.mode("−")
    page.click(0.6, 0.2)
    page.page.click("#add")
    page.wait_for_text("objects", "object 2")
    page.mode("Box")
    page.click(0.55, 0.3)
    assert "opposite corner" in page.text("hint")
    page.click(0.9, 0.8)
    page.track()
    page.go_to(4)
    page.mode("+")
    page.click(0.7, 0.6)
    page.track("onward")
    masks = masks_of_zip(page.export("Masks, PNG in a zip", tmp_path), tmp_path / "masks")
    with zipfile.ZipFile(page.export("Project, to go on later", tmp_path)) as archive:
        first, boxed, last = json.loads(archive.read("project.json"))["prompts"]
    clicked = [*first["points"], last["points"][0], boxed["box"][:2], boxed["box"][2:]]
    meant = [(0.3, 0.5), (0.6, 0.2), (0.7, 0.6), (0.55, 0.3), (0.9, 0.8)]
    assert np.abs(np.array(clicked) - np.array(meant) * [96, 64]).max() < 1 and first["labels"] == [1, 0]
    steps = [
        VideoPrompt(1, 0, first["points"][:1], [1]),
        VideoPrompt(1, 0, first["points"], [1, 0]),
        VideoPrompt(2, 0, box=boxed["box"]),
        (0, False),
        VideoPrompt(last["object_id"], 4, last["points"], [1]),
        (4, False),
    ]
    expected = track_by_hand(two_domains, read_video(small_video), steps)
    assert expected.any() and (masks == expected).all()
    assert not page.errors


@pytest.mark.slow
def test_the_chosen_object_leaves_where_it_is_said_to_and_stays_after_all(page, small_video):
    page.open(small_video)
    page.click(0.3, 0.5)
    page.page.click("#add")
    page.wait_for_text("objects", "object 2")
    page.click(0.7, 0.5)
    page.track()
    page.page.locator("#objects label", has_text="object 1").click()
    page.go_to(5)
    page.page.click("#leaves")
    page.wait_for_text("hint", "Object 1 is gone from frame 5 on.")
    page.wait_for_text("objects", "object 1, gone from 5")
    page.page.click("#leaves")
    page.wait("() => !document.querySelector('#objects').innerText.includes('gone')")
    page.go_to(0)
    page.page.click("#leaves")
    page.page.get_by_text("The end of object 1 must be after all that is given of it").wait_for()
    assert not page.errors


@pytest.mark.slow
def test_the_timeline_and_its_list_lead_to_frames_by_mouse_and_by_keys(page, small_video):
    page.open(small_video)
    page.click(0.3, 0.5)
    assert not page.page.locator("#timeline").is_visible()
    assert "object 1 · score" in page.text("objects")
    page.track()
    image = page.page.locator("#timeline img")
    box, entries = image.bounding_box(), page.page.locator("#looks input")
    assert box["width"] > 800 and 40 < box["height"] < 90
    worst = int(entries.first.get_attribute("value"))
    for frame in (worst, (worst + 1) % 8):
        before = page.frame_source()
        image.click(position={"x": box["width"] * (0.01 + 0.98 * frame / 7), "y": 10})
        page.wait_for_change(before)
        page.wait("([f]) => document.querySelector('#slider input[type=number]').value == f", frame)
    before = page.frame_source()
    entries.first.focus()
    page.page.keyboard.press("Space")
    page.wait_for_change(before)
    page.wait("([f]) => document.querySelector('#slider input[type=number]').value == f", worst)
    assert entries.first.is_checked() and f"frame {worst}: object 1" in page.text("looks")
    assert not page.errors


@pytest.mark.slow
def test_a_refresh_in_the_middle_and_while_it_tracks(open_page, served, tmp_path):
    page = open_page()
    page.open(write_small_video(tmp_path / "long.mp4", num_frames=1500))
    page.click(0.3, 0.5)
    page.page.click("#add")
    page.wait_for_text("objects", "object 2")
    clicked = page.frame_source()
    page.page.reload()
    page.page.wait_for_selector("#frame img")
    assert page.frame_source() == clicked and "object 2" in page.text("objects")
    page.page.click("#track")
    page.wait_for_text("progress", "Tracking:")
    page.page.wait_for_selector("#stop:not([disabled])")
    page.page.click("#stop")
    page.wait_for_text("progress", "Stopped after")
    page.page.click("#onward")
    page.wait_for_text("progress", "Tracking:")
    page.page.reload()
    page.page.wait_for_selector("#frame img")
    (person,) = (person for person in served.people if person.session and person.session.num_frames == 1500)
    time.sleep(2)  # what was running before the refresh lets go of the video
    page.click(0.5, 0.5)
    page.context.close()
    wait_until(lambda: not person.is_open)  # it will be freed in a minute


@pytest.mark.slow
def test_it_learns_from_corrections_and_tracks_again(page, open_page, small_video):
    page.open(small_video)
    page.click(0.3, 0.5)
    page.track()
    page.tab("Learn")
    page.page.click("#collect")
    page.wait_for_text("count", "collected: 1")
    page.page.fill("#learn-domain input, #learn-domain textarea", "mine")
    page.page.fill("#steps input", "120")
    page.page.click("#learn")
    page.wait_for_text("learn-state", "Learning.")
    page.tab("Track")
    page.track()  # while it learns
    other, url = open_page(), page.page.url
    other.tab("Learn")
    other.wait_for_text("learn-state", "Somebody else learns here now.")
    assert other.page.locator("#learn").is_disabled() and other.page.locator("#stop-learning").is_disabled()
    page.page.close()  # the tab is gone, and with it what it has kept
    page = Page(page.context, url)
    assert page.page.locator("#frame img").is_visible()
    page.tab("Learn")
    page.page.wait_for_selector("#curve img", timeout=120_000)
    page.page.click("#stop-learning")
    page.wait_for_text("learn-state", "Stopped.")
    page.page.click("#resume")
    page.wait_for_text("learn-state", "J&F on the collected videos", seconds=180)
    has_won = "Learned." in page.page.inner_text("#learn-state")
    page.page.click("#again")
    page.page.wait_for_selector("#again-both img")
    page.wait_for_text("again-progress", "The model is now mine-1" if has_won else "The model is as before")
    page.tab("Track")
    if has_won:
        page.wait_for_text("whose", "mine")
    page.track()


@pytest.mark.slow
def test_pages_that_are_closed_leave_no_files_and_no_ram(serve, open_page, two_domains, tmp_path):
    video = write_small_video(tmp_path / "video.mp4", num_frames=60, size=(240, 320))
    with serve([two_domains], Limits(grace_seconds=0.0)) as running:
        people = running.people

        def megabytes_after(visits: int) -> float:
            for _ in range(visits):
                page = open_page(running.url)
                page.open(video)
                page.click(0.3, 0.5)
                page.track()
                assert list(people.folder.iterdir())
                page.context.close()
            wait_until(lambda: not people.free_unused() and not len(people))
            assert not list(people.folder.iterdir())
            gc.collect()
            return psutil.Process().memory_info().rss / 2**20

        before, after = megabytes_after(4), megabytes_after(20)  # what is loaded and cached once comes before
    print(f"{before:.0f} MB before 20 pages, {after:.0f} MB after")
    assert after <= 1.1 * before
