"""What all parts of the page share: the app's state, events, checks of what a page sends, and pictures.

Requests can be written by hand. What a page sends is checked here, or in the handler that gets it, and nowhere else.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import numpy as np
from gradio.components import Component
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from samoe_hf.errors import InputError

from .learning import Learner
from .models import LoadedModel, free_name
from .page_picture import Picture
from .people import People, Person
from .pictures import shown_size, to_video
from .session import TrackingSession
from .uploads import Limits, hide_paths

# New values of components, by component.
Shown = dict[Any, Any]
# Of events about a frame: they wait for the device themselves, between two frames of what runs there.
QUICK: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 8}
# A preview is sent at most so often, in seconds.
PREVIEW_SECONDS = 0.25


@dataclass
class App:
    """What the app's pages share.

    Attributes:
        folder: of all that the app keeps for its people; no message names it.
        models: by their names; a new page gets the first.
        learner: None where nothing may be learned.
        store: the folder of models that are saved; None where there is none.
    """

    folder: Path
    models: dict[str, LoadedModel]
    people: People
    limits: Limits
    learner: Learner | None = None
    store: Path | None = None
    url: str = ""

    @property
    def first(self) -> LoadedModel:
        """The model that a new page gets."""
        return next(iter(self.models.values()))

    def models_of(self, person: Person) -> dict[str, LoadedModel]:
        """The models as a person has them, who may have changed domains of some."""
        return self.models | person.changed

    def first_of(self, person: Person) -> LoadedModel:
        """The model that a person's next video gets."""
        return person.changed.get(self.first.name, self.first)

    def add(self, loaded: LoadedModel) -> LoadedModel:
        """Takes in a model, under its name with a number behind it if another one has it."""
        name = free_name(loaded.name, self.models.__contains__)
        self.models[name] = replace(loaded, name=name)
        return self.models[name]


class Part:
    """A part of the page: its components, and the handlers of what happens there.

    `key` says whose a page is. The server keeps it, so a page's own value counts for nothing.
    """

    def __init__(self, app: App, key: gr.State):
        self.app, self.key = app, key

    def on(
        self,
        trigger: Callable[..., Any],
        handler: Callable[..., Any],
        inputs: Sequence[Component] = (),
        outputs: Set[Any] = frozenset(),
        **options: Any,
    ) -> None:
        """Connects an event of a component with a handler; `options` are of `gradio.on`.

        The handler gets the page's person and the values of `inputs`, and gives, or yields, new values of `outputs`.
        """
        data = [self.key, *inputs]
        gr.on([trigger], self._for_person(handler), data, outputs or None, api_visibility="private", **options)

    def on_device(
        self,
        trigger: Callable[..., Any],
        handler: Callable[..., Any],
        inputs: Sequence[Component],
        outputs: Set[Any],
        line: Component | None = None,
    ) -> None:
        """As [`on`], of what keeps the device for long: one runs at a time. Who waits is told so in `line`."""
        progress = "minimal" if line is not None else "full"
        device = {"concurrency_id": "device", "concurrency_limit": 1}
        self.on(trigger, handler, inputs, outputs, show_progress=progress, show_progress_on=line, **device)

    def _for_person(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def handle(key: tuple[str, str], *values: Any) -> Any:
            with messages(self.app):
                return handler(self.app.people[key], *values)

        @functools.wraps(handler)
        def handle_steps(key: tuple[str, str], *values: Any) -> Iterator[Any]:
            with messages(self.app):
                yield from handler(self.app.people[key], *values)

        return handle_steps if inspect.isgeneratorfunction(handler) else handle


@contextmanager
def messages(app: App) -> Iterator[None]:
    """What a person can mend becomes a message on the page, without paths of the app's folders."""
    try:
        yield
    except (InputError, OSError) as error:
        text = hide_paths(str(error), app.folder)
        raise gr.Error(hide_paths(text, app.store) if app.store else text, print_exception=False) from error


# --- What a page sends


def integer(value: object, name: str, least: int, most: int) -> int:
    """A number that a page sent; InputError for anything else than an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most or value % 1:
        raise InputError(f"`{name}` must be an integer from {least} to {most}, got {str(value)[:60]!r}.")
    return int(value)


def frame_of(session: TrackingSession, value: object) -> int:
    """The frame that a page sent; InputError for anything but the number of one of the video's."""
    return integer(value, "frame", 0, session.num_frames - 1)


def object_of(session: TrackingSession, value: object) -> int:
    """The object that a page sent; InputError for anything but one of the video's."""
    if type(value) is not int or value not in session.objects:
        known = ", ".join(map(str, session.objects)) or "none yet: add one first"
        raise InputError(f"`object` must be one of the video's objects ({known}), got {str(value)[:60]!r}.")
    return value


def place_of(value: object, size: tuple[int, int]) -> tuple[float, float]:
    """Where a picture of (height, width) was clicked, (x, y); InputError for anything but a place in it."""
    height, width = size
    match value:
        case [int() | float() as x, int() | float() as y] if 0 <= x <= width - 1 and 0 <= y <= height - 1:
            return x, y
    raise InputError(f"A click must have a position in the frame, got {str(value)[:60]}.")


def point_of(session: TrackingSession, value: object) -> tuple[float, float]:
    """Where the shown frame was clicked, (x, y) in pixels of the video; InputError for anything but a place in it."""
    size = session.video.frames.size
    return to_video(*place_of(value, shown_size(size)), size)


def one_of(value: object, choices: Iterable[str], name: str) -> str:
    """What was chosen in a menu; InputError for anything but one of its choices."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"`{name}` must be one of {', '.join(choices)}, got {str(value)[:60]!r}.")
    return value


# --- Components


def button(
    words: str,
    element: str,
    variant: Literal["primary", "secondary", "stop"] = "secondary",
    size: Literal["sm", "md"] = "md",
    **options: Any,
) -> gr.Button:
    """A button that is as narrow as a phone needs it."""
    return gr.Button(words, variant=variant, elem_id=element, size=size, min_width=80, **options)


def picture(label: str, element: str, visible: bool = True) -> Picture:
    """A picture that cannot be uploaded to."""
    plain = {"interactive": False, "show_label": False, "container": False, "buttons": []}
    return Picture(label=label, elem_id=element, visible=visible, **plain)


def shown_picture(value: np.ndarray | Figure | None) -> Picture:
    """An update that shows a picture (H, W, 3) uint8 or a figure, or hides it where there is none."""
    if isinstance(value, Figure):
        canvas = FigureCanvasAgg(value)
        canvas.draw()
        value = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return Picture(value, visible=value is not None)
