"""What all parts of the page share: the app's state, pictures, checks of what a page sends, and errors as messages."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from samoe_hf.errors import InputError

from .learning import Learner
from .limits import Limits
from .models import Models
from .page_picture import Picture
from .people import People, Person
from .videos import hide_paths

# Events that keep the device for long, one of which runs at a time; those who wait are told their place.
DEVICE = {"concurrency_id": "device", "concurrency_limit": 1}
# Events of a frame. They wait for the device themselves, between two frames of what runs there.
QUICK = {"concurrency_limit": 8, "show_progress": "hidden"}
# No event is part of a public API.
PRIVATE = {"api_visibility": "private"}
# A preview is sent at most so often, in seconds.
PREVIEW_SECONDS = 0.25


@dataclass
class App:
    """What the app's pages share. `learner` is None where nothing may be learned."""

    models: Models
    people: People
    limits: Limits
    learner: Learner | None = None


def picture(label: str, **kwargs: Any) -> Picture:
    """A picture that cannot be uploaded to."""
    return Picture(label=label, interactive=False, show_label=False, container=False, **{"buttons": []} | kwargs)


def shown_picture(value: np.ndarray | None) -> Picture:
    """An update that shows a picture (H, W, 3) uint8, or hides it where there is none."""
    return Picture(value, visible=value is not None)


def guarded(method: Callable) -> Callable:
    """Wraps a handler, or one that yields: what a person can mend becomes a message on the page, without paths."""

    @functools.wraps(method)
    def handle(self, *args: Any) -> Any:
        with _Messages(self.app):
            return method(self, *args)

    @functools.wraps(method)
    def handle_steps(self, *args: Any) -> Iterator[Any]:
        with _Messages(self.app):
            yield from method(self, *args)

    return handle_steps if inspect.isgeneratorfunction(method) else handle


class _Messages:
    def __init__(self, app: App):
        self.app = app

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, ValueError | OSError) and not isinstance(error, gr.Error):
            message = hide_paths(str(error), self.app.people.folder)
            raise gr.Error(message, print_exception=False) from error


class Part:
    """A part of the page: its components, and the handlers of what happens there."""

    def __init__(self, app: App, secret: gr.State):
        self.app, self.secret = app, secret

    def person(self, secret: object) -> Person:
        """Whose page it is; ValueError if what belonged to it was freed."""
        return self.app.people[secret]


def whole(value: object, name: str) -> int:
    """A number that a page sent, as an integer.

    Raises:
        ValueError: anything else than a finite number without a fraction.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value % 1:
        raise InputError(f"`{name}` must be an integer, got {str(value)[:60]!r}.")
    return int(value)


def position(value: object) -> tuple[float, float]:
    """Where a picture was clicked, (x, y) in its pixels; ValueError for anything but two finite numbers."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError("A click must have a position in the frame.")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise InputError(f"A click must have a position in the frame, got {str(value)[:60]}.")
    return float(value[0]), float(value[1])
