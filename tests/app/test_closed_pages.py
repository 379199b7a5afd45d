"""What a closed page held is freed: its video, its files, and its memory."""

import gc
import time
from dataclasses import replace

import psutil
import pytest

from helpers.app import write_small_video
from samoe_hf.app.limits import Limits


@pytest.fixture(scope="module")
def short_lived(two_domains):
    """An app that frees at once what belonged to a closed page."""
    pytest.importorskip("gradio", reason="needs the `app` extra")
    from samoe_hf.app.server import serving

    with serving([two_domains], replace(Limits(), grace_seconds=0.0)) as running:
        yield running


def wait_until_free(people) -> None:
    end = time.monotonic() + 30
    while people.free_unused() or len(people):
        assert time.monotonic() < end
        time.sleep(0.1)


def visit(open_page, url, video) -> None:
    """Opens a page, tracks a video in it, and closes it."""
    page = open_page(url)
    page.open(video)
    page.click(0.3, 0.5)
    page.track()
    page.context.close()


def test_pages_that_are_closed_leave_no_files(open_page, short_lived, small_video):
    people = short_lived.app.people
    visit(open_page, short_lived.url, small_video)
    assert list(people.folder.iterdir())
    wait_until_free(people)
    assert not list(people.folder.iterdir())


@pytest.mark.slow
def test_twenty_pages_leave_the_memory_where_it_was(open_page, short_lived, tmp_path):
    people = short_lived.app.people
    video = write_small_video(tmp_path / "video.mp4", num_frames=60, size=(240, 320))

    def memory() -> float:
        wait_until_free(people)
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20

    for _ in range(4):  # what is loaded and cached once
        visit(open_page, short_lived.url, video)
    before = memory()
    for _ in range(20):
        visit(open_page, short_lived.url, video)
    after = memory()
    print(f"{before:.0f} MB before 20 pages, {after:.0f} MB after")
    assert after <= 1.1 * before
