"""Serves the page until it is interrupted."""

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

from gradio import route_utils
from gradio.themes import Default
from starlette.middleware import Middleware

from samoe_hf.errors import InputError, input_errors

from .learning import Learner
from .models import LoadedModel
from .page import CSS, build_page
from .page_parts import App
from .page_requests import BoundedRequests, FilesAlone, KnownPages
from .people import People, freeing_unused
from .uploads import Limits


@contextmanager
def serving(
    loaded: Sequence[LoadedModel],
    limits: Limits,
    data: Path | None = None,
    models: Path | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    share: bool | None = None,
) -> Iterator[App]:
    """Serves the page while the context is open, in threads of its own; all files of its people go in the end.

    Args:
        loaded: the models, the first of which a new page gets.
        data: the folder of corrected videos; None where nothing may be learned.
        models: the folder of models that are learned or saved; needed with `data`. None where none may be.
        host, port, share: by default as Gradio's environment variables say (`GRADIO_SERVER_NAME`, …), else this machine
            alone, and the first free port from 7860 on.
    """
    store = None if models is None else models.resolve()
    learner = None if data is None or store is None else Learner(data.resolve(), store)
    host = host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    _check_address(host.strip("[]"), port)
    parent = os.path.realpath(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())  # a link on macOS
    Path(parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="samoe-app-", dir=parent) as name, _environment(Path(name), host):
        people = People(Path(name, "people"), limits)
        app = App(Path(name), {}, people, limits, learner, store)
        for one in loaded:
            app.add(one)
        bounds = Middleware(BoundedRequests, upload_bytes=limits.upload_bytes, folder=Path(name))
        with freeing_unused(people), patch.object(route_utils, "GradioMultiPartParser", FilesAlone):
            page = build_page(app)
            try:
                with input_errors():
                    _, app.url, _ = page.launch(
                        server_name=host,
                        server_port=port,
                        share=share,
                        app_kwargs={"middleware": [bounds]},
                        prevent_thread_lock=True,
                        quiet=True,
                        max_file_size=limits.upload_bytes,
                        enable_monitoring=False,
                        ssr_mode=False,
                        css=CSS,
                        theme=Default(primary_hue="orange", neutral_hue="slate"),
                    )
                page.app.state_holder = KnownPages(people)
                page.app.state_holder.set_blocks(page)
                yield app
            finally:
                page.close(verbose=False)
                if learner is not None and learner.current is not None:
                    learner.current.stop()


def until_stopped(page: AbstractContextManager[App]) -> None:
    """Keeps a page, see [`serving`], until the process is interrupted or told to end, or its terminal is closed; says
    where it is served."""
    done, closed = threading.Event(), getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    for name in (signal.SIGINT, signal.SIGTERM, closed):
        if name != closed or signal.getsignal(closed) != signal.SIG_IGN:  # by `nohup`
            signal.signal(name, lambda *_: done.set())
    with page as app:
        print(f"The page is served at {app.url} until Ctrl+C", file=sys.stderr, flush=True)
        while not done.wait(1):  # without a limit, Windows would not see Ctrl+C
            pass


def _check_address(host: str, port: int | None) -> None:
    """InputError where the page cannot be served: Gradio would try such a host for minutes."""
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port or 0))
    except (OSError, OverflowError) as error:
        place = f"host {host!r}" if port is None else f"host {host!r}, port {port}"
        help_text = "give a name or address of this machine, and leave out the port for the next free one"
        raise InputError(f"The page cannot be served at {place} ({error}); {help_text}.") from error


def _environment(folder: Path, host: str) -> AbstractContextManager:
    """Gradio keeps uploads and downloads of this app alone in `folder`, asks no proxy for its own page, and does not
    compute statistics of all events at each of them, which nobody can see here."""
    itself = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", host]))
    variables = {"GRADIO_TEMP_DIR": str(folder / "gradio"), "NO_PROXY": itself, "no_proxy": itself}
    return patch.dict(os.environ, variables, GRADIO_ANALYTICS_CACHE_FREQUENCY="1000000000")
