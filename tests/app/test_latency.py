"""The mask after a click: from the browser's side, beside the model's own time. Prints what docs/app.md says."""

import time

import numpy as np
import pytest

from helpers.app import write_small_video
from samoe_hf import SamoeConfig, SamoeModel, small_base
from samoe_hf.app.models import LoadedModel, load_model
from samoe_hf.app.session import TrackingSession
from samoe_hf.app.uploads import Limits, open_kept
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.processing_samoe import build_processor

CLICKS, SIZE = 40, (480, 640)
# Waits for the picture that a click brings, and gives the milliseconds from the click to its being there.
MEASURE = """() => {
    const image = () => document.querySelector('#frame img');
    const before = image().src;
    window.waited = new Promise((done) => {
        document.addEventListener('click', () => {
            const start = performance.now();
            const look = () => {
                const now = image();
                if (now.src !== before && now.complete) done(performance.now() - start);
                else requestAnimationFrame(look);
            };
            look();
        }, {once: true, capture: true});
    });
}"""


def load(name: str) -> LoadedModel:
    if name == "small":
        return load_model(small_base(), "cpu", name)
    model = SamoeModel(SamoeConfig(**read_yaml("model_tiny"))).eval()
    return LoadedModel(name, name, model, build_processor(model.config))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "tiny"])
def test_the_mask_comes_soon_after_the_model_has_it(serve, open_page, name, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs the `app` extra")
    loaded, positions = load(name), np.random.default_rng(0).uniform(0.1, 0.9, (CLICKS, 2)).tolist()
    video, seen = write_small_video(tmp_path / "video.mp4", num_frames=4, size=SIZE), []
    with serve([loaded], Limits(grace_seconds=0)) as running:
        page = open_page(running.url)
        page.open(video)
        for x, y in positions:
            page.page.evaluate(MEASURE)
            page.click(x, y)
            seen.append(page.page.evaluate("window.waited"))
            page.undo()
    session = TrackingSession(tmp_path, open_kept("video", video, Limits()), loaded, Limits())
    forward, own = loaded.model.forward, []

    def timed(*args, **kwargs):
        start = time.perf_counter()
        output = forward(*args, **kwargs)
        own.append(1000 * (time.perf_counter() - start))
        return output

    monkeypatch.setattr(loaded.model, "forward", timed)
    session.add_object()
    for x, y in positions:
        session.click(1, 0, x * SIZE[1], y * SIZE[0])
        session.undo()
    for what, times in (("browser", seen[1:]), ("model", own[1:])):
        print(f"{name}, {what}: median {np.median(times):.0f} ms, 95 % {np.percentile(times, 95):.0f} ms")
    assert np.median(seen[1:]) < np.median(own[1:]) + 250
