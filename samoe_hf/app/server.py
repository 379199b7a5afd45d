"""Serves the page until it is interrupted."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from gradio.themes import Default

from samoe_hf.errors import InputError

from .learning import Learner
from .models import LoadedModel
from .page import CSS, build_page
from .page_parts import App
from .people import People, freeing_unused
from .uploads import Limits

GRADIO_FOLDER = "GRADIO_TEMP_DIR"


@contextmanager
def serving(
    loaded: Sequence[LoadedModel],
    limits: Limits,
    data: Path | None = None,
    models: Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
) -> Iterator[App]:
    """Serves the page while the context is open, in threads of its own; all files of its people go in the end.

    Args:
        loaded: the models, the first of which a new page gets.
        data: the folder of corrected videos; None where nothing may be learned.
        models: the folder of what is learned; needed with `data`.
        port: a free one by default.
    """
    models_by_name = {one.name: one for one in loaded}
    if len(models_by_name) < len(loaded):
        raise InputError(f"Each model needs a name of its own, got {', '.join(one.name for one in loaded)}.")
    learner = None if data is None or models is None else Learner(data.resolve(), models.resolve())
    with tempfile.TemporaryDirectory(prefix="samoe-app-") as name, _gradio_folder(Path(name, "gradio")):
        people = People(Path(name, "people"), limits)
        app = App(Path(name), models_by_name, people, limits, learner)
        with freeing_unused(people):
            page = build_page(app)
            try:
                _, app.url, _ = page.launch(
                    server_name=host,
                    server_port=port,
                    share=share,
                    prevent_thread_lock=True,
                    quiet=True,
                    max_file_size=limits.upload_bytes,
                    enable_monitoring=False,
                    ssr_mode=False,
                    state_session_capacity=4 * limits.sessions,
                    css=CSS,
                    theme=Default(primary_hue="orange", neutral_hue="slate"),
                )
                yield app
            finally:
                page.close(verbose=False)
                if learner is not None and learner.current is not None:
                    learner.current.stop()


def until_stopped(page: AbstractContextManager[App]) -> None:
    """Keeps a page, see [`serving`], until the process is interrupted or told to end."""
    done = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: done.set())
    with page:
        done.wait()


@contextmanager
def _gradio_folder(folder: Path) -> Iterator[None]:
    """Where Gradio keeps uploads and downloads meanwhile, instead of one folder for all apps of the machine."""
    before = os.environ.get(GRADIO_FOLDER)
    os.environ[GRADIO_FOLDER] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[GRADIO_FOLDER]
        else:
            os.environ[GRADIO_FOLDER] = before
