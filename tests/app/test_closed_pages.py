"""What a closed page held is freed: its video, its files, and its RAM."""

import gc
import time

import psutil
import pytest

from helpers.app import write_small_video
from samoe_hf.app.uploads import Limits


@pytest.mark.slow
def test_pages_that_are_closed_leave_no_files_and_no_ram(open_page, two_domains, tmp_path):
    pytest.importorskip("gradio", reason="needs the `app` extra")
    from samoe_hf.app.server import serving

    video = write_small_video(tmp_path / "video.mp4", num_frames=60, size=(240, 320))
    with serving([two_domains], Limits(grace_seconds=0.0)) as running:
        people = running.people

        def megabytes_after(visits: int) -> float:
            for _ in range(visits):
                page = open_page(running.url)
                page.open(video)
                page.click(0.3, 0.5)
                page.track()
                assert list(people.folder.iterdir())
                page.context.close()
            end = time.monotonic() + 30
            while people.free_unused() or len(people):
                assert time.monotonic() < end
                time.sleep(0.1)
            assert not list(people.folder.iterdir())
            gc.collect()
            return psutil.Process().memory_info().rss / 2**20

        before, after = megabytes_after(4), megabytes_after(20)  # what is loaded and cached once comes before
    print(f"{before:.0f} MB before 20 pages, {after:.0f} MB after")
    assert after <= 1.1 * before
