"""A small model, a video, and sessions of the app's core. Slow imports are in functions, as in the folder above."""

from itertools import count
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_model(nano, model_folder):
    """A model with woken experts; tests must leave it as it is."""
    from samoe_hf.app.models import LoadedModel
    from samoe_hf.model.processing_samoe import build_processor

    return LoadedModel("nano", str(model_folder), nano.model.eval(), build_processor(nano.model.config))


@pytest.fixture(scope="session")
def small_video(tmp_path_factory) -> Path:
    from helpers.app import write_small_video

    return write_small_video(tmp_path_factory.mktemp("videos") / "some video.mp4")


@pytest.fixture(scope="session")
def make_session(small_model, small_video, tmp_path_factory):
    """Makes a session of a video in a new folder."""
    from samoe_hf.app.session import TrackingSession
    from samoe_hf.app.uploads import Limits, open_kept

    folders, numbers = tmp_path_factory.mktemp("sessions"), count()

    def make(path: Path = small_video, limits=None, model=small_model) -> TrackingSession:
        limits, folder = limits or Limits(), folders / str(next(numbers))
        folder.mkdir()
        return TrackingSession(folder, open_kept("small", path, limits), model, limits)

    return make


@pytest.fixture
def session(make_session):
    return make_session()


@pytest.fixture(scope="session")
def two_domains(small_model, tmp_path_factory):
    """A saved copy of the model with a gate and two domains, of which the second changes what is put out."""
    from helpers.domains import with_second_domain
    from samoe_hf.app.models import LoadedModel
    from samoe_hf.continual.fit_gate import fit_gate
    from samoe_hf.data import SyntheticVideos

    model, folder = with_second_domain(small_model.model), tmp_path_factory.mktemp("domains")
    for domain, look in (("first", "stripes"), ("second", "shapes")):
        fit_gate(model, small_model.processor, domain, SyntheticVideos(8, 2, (64, 96), domain=look, seed=3), False)
    model.save_pretrained(folder, processor=small_model.processor)
    return LoadedModel("domains", str(folder), model.eval(), small_model.processor)


@pytest.fixture(scope="session")
def serve():
    """What serves an app to this machine."""
    pytest.importorskip("gradio", reason="needs the `app` extra")
    from samoe_hf.app.server import serving

    return serving


@pytest.fixture(scope="session")
def served(serve, two_domains, small_model, tmp_path_factory):
    """An app that is served. Its people leave nothing to each other, so tests may share it."""
    from samoe_hf.app.uploads import Limits

    folder, limits = tmp_path_factory.mktemp("served"), Limits(upload_bytes=8 * 2**20, sessions=200)
    with serve([two_domains, small_model], limits, folder / "data", folder / "models") as running:
        yield running


@pytest.fixture(scope="session")
def browser():
    """Chromium; tests that need it are skipped, with the reason, where it or Playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright, of the `dev` extra")
    from helpers.browser import find_chromium

    with playwright.sync_playwright() as running:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        yield running.chromium.launch(executable_path=find_chromium(), args=options)


@pytest.fixture
def open_page(browser, served):
    """Opens pages, each in a browser profile of its own; all are closed in the end."""
    from helpers.browser import Page

    contexts = []

    def open_one(url: str | None = None):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce"))
        return Page(contexts[-1], url or served.url)

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page):
    return open_page()
