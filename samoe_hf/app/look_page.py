"""The page's second part: whose experts a video gets, what they do on a frame, and two models side by side."""

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from samoe_hf.errors import InputError

from .comparison import Comparison, Side
from .experts_view import look_at_experts
from .page_parts import DEVICE, PREVIEW_SECONDS, PRIVATE, Part, guarded, picture, shown_picture, whole
from .people import Person
from .track_page import TrackPart, whose_experts


def figure_picture(figure: Figure) -> np.ndarray:
    """A figure as a picture (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


MEDIUM = {"size": "md", "min_width": 120}
FIRST = "**First** track a video in *Track*; then look here at what happened."


class LookPart(Part):
    """Domains, experts, comparisons."""

    def build(self, track: TrackPart) -> None:
        """Lays the components out."""
        self.track = track
        self.note = gr.Markdown(FIRST, elem_id="look-note")
        with gr.Accordion("Whose experts", open=True):
            with gr.Row():
                self.model = gr.Dropdown(self.app.models.names, value=self.app.models.first.name, label="Model")
                self.domain = gr.Dropdown([], label="Experts of", elem_id="domain", interactive=True)
                self.use = gr.Button("Start anew with these", elem_id="use", **MEDIUM)
            self.whose = gr.Markdown("", elem_id="look-whose")
        with gr.Accordion("Where the experts work", open=True):
            with gr.Row():
                self.look = gr.Button("Look at the frame shown in Track", variant="primary", elem_id="look", **MEDIUM)
                self.layer = gr.Dropdown([], label="Layer", elem_id="layer", interactive=True)
                self.object = gr.Dropdown([], label="Object", elem_id="look-object", interactive=True)
            with gr.Row():
                self.map = picture("Chosen experts", elem_id="map", visible=False)
                self.usage = picture("Use of experts by object", elem_id="usage", visible=False)
        with gr.Accordion("Two side by side", open=True):
            self._build_comparison()

    def _build_comparison(self) -> None:
        with gr.Row():
            self.first = gr.Dropdown([], label="Left", elem_id="first", interactive=True)
            self.second = gr.Dropdown([], label="Right", elem_id="second", interactive=True)
        self.only_first = gr.Checkbox(False, label="Without corrections: each object's first prompt only")
        with gr.Row():
            self.compare = gr.Button("Track with both", variant="primary", elem_id="compare", scale=2, **MEDIUM)
            self.stop = gr.Button("Stop", elem_id="stop-compare", **MEDIUM)
        self.progress = gr.Markdown("", elem_id="compare-progress")
        self.both = picture("Left and right", elem_id="both", visible=False)
        self.slider = gr.Slider(0, 1, 0, step=1, label="Frame", visible=False, elem_id="both-slider")
        self.table = gr.Dataframe(visible=False, interactive=False, elem_id="both-table")

    def wire(self) -> None:
        """Connects the components with the handlers."""
        shown, compared = self.shown(), self.compared()
        self.model.input(self.choose_model, [self.secret, self.model], [self.domain], **PRIVATE)
        inputs = [self.secret, self.model, self.domain, self.track.slider]
        self.use.click(self.use_experts, inputs, shown | self.track.shown(), **DEVICE, **PRIVATE)
        self.look.click(self.look_at, [self.secret, self.track.slider], self.mapped(), **DEVICE, **PRIVATE)
        chosen = [self.secret, self.layer, self.object]
        for menu in (self.layer, self.object):
            menu.input(self.show_layer, chosen, self.mapped(), show_progress="hidden", **PRIVATE)
        inputs = [self.secret, self.first, self.second, self.only_first]
        progress = {"show_progress": "minimal", "show_progress_on": [self.progress]}
        self.compare.click(self.run_comparison, inputs, compared, **progress, **DEVICE, **PRIVATE)
        self.stop.click(self.stop_comparison, [self.secret], None, queue=False, **PRIVATE)
        moved = {"trigger_mode": "always_last", "show_progress": "hidden"}
        self.slider.input(self.show_both, [self.secret, self.slider], [self.both], **moved, **PRIVATE)

    def shown(self) -> set[Any]:
        """Components that say what can be chosen."""
        return {self.note, self.model, self.domain, self.whose, self.first, self.second}

    def mapped(self) -> set[Any]:
        """Components that show what experts do."""
        return {self.layer, self.object, self.map, self.usage}

    def compared(self) -> set[Any]:
        """Components of a comparison."""
        return {self.progress, self.both, self.slider, self.table}

    # --- Whose experts

    def sides(self) -> dict[str, Side]:
        """What can be compared, by what it is called."""
        sides = {}
        for name in self.app.models.names:
            model = self.app.models[name]
            for choice, domain in (model.domain_choices or {"": None}).items():
                label = f"{name}: {choice}" if choice else name
                sides[label] = Side(label, model, domain)
        return sides

    @guarded
    def refresh(self, secret: object, first: object, second: object) -> dict[Any, Any]:
        """The part is opened: menus show what there is, and keep what was chosen."""
        return self.menus(self.person(secret), first, second)

    def menus(self, person: Person, first: object = None, second: object = None) -> dict[Any, Any]:
        """Updates of all menus, as a person's session stands. `first` and `second` are what is compared, if known."""
        session, names = person.session, list(self.sides())
        model = session.model if session else self.app.models.first
        choices = model.domain_choices
        current = next((c for c, domain in choices.items() if session and domain == session.domain), None)
        note = "" if session and session.prompts else FIRST
        if session and session.prompts and not choices:
            note = f"{model.name} has no domains: all its videos get the same experts. *Learn* adds a domain."
        first = first if first in names else names[0]
        second = second if second in names and second != first else names[-1]
        return {
            self.note: note,
            self.model: gr.Dropdown(self.app.models.names, value=model.name),
            self.domain: gr.Dropdown(list(choices), value=current, visible=bool(choices)),
            self.whose: whose_experts(session),
            self.first: gr.Dropdown(names, value=first),
            self.second: gr.Dropdown(names, value=second),
        }

    @guarded
    def choose_model(self, secret: object, name: object) -> dict[Any, Any]:
        """Another model was chosen in the menu: its domains are shown."""
        self.person(secret)
        choices = list(self.app.models[name].domain_choices)
        return {self.domain: gr.Dropdown(choices, value=choices[0] if choices else None, visible=bool(choices))}

    @guarded
    def use_experts(self, secret: object, name: object, choice: object, frame: object) -> dict[Any, Any]:
        """The video starts anew with another model, or another domain's experts."""
        person = self.person(secret)
        session, model = person.the_session(), self.app.models[name]
        choices = model.domain_choices
        if choices and choice not in choices:
            raise InputError(f"The experts must be one of {', '.join(choices)}.")
        session.use(model, choices[choice] if choices else "auto")
        gr.Info("Started anew with the same clicks. Track the video again.")
        return self.menus(person) | self.track.view(person, whole(frame, "frame"))

    # --- Where the experts work

    @guarded
    def look_at(self, secret: object, frame: object) -> dict[Any, Any]:
        """What the experts do on the frame that is shown in *Track*."""
        person = self.person(secret)
        person.experts = look_at_experts(person.the_session(), whole(frame, "frame"))
        return self._draw(person, next(iter(person.experts.layers)), None)

    @guarded
    def show_layer(self, secret: object, layer: object, object_id: object) -> dict[Any, Any]:
        """Another layer or object was chosen."""
        return self._draw(self.person(secret), layer, object_id)

    def _draw(self, person: Person, layer: Any, object_id: Any) -> dict[Any, Any]:
        view = person.experts
        if view is None:
            raise InputError("Look at a frame first.")
        usage = figure_picture(view.draw_usage(layer))
        ids = [one for one in view.layers[layer].maps if one is not None]
        object_id = object_id if object_id in ids else next(iter(ids), None)
        has_map = bool(view.layers[layer].maps)
        drawn = view.draw_map(person.the_session(), layer, object_id) if has_map else None
        return {
            self.layer: gr.Dropdown(list(view.layers), value=layer),
            self.object: gr.Dropdown([(f"object {i}", i) for i in ids], value=object_id, visible=bool(ids)),
            self.map: shown_picture(drawn),
            self.usage: shown_picture(usage),
        }

    # --- Two side by side

    @guarded
    def run_comparison(
        self, secret: object, first: object, second: object, only_first: object
    ) -> Iterator[dict[Any, Any]]:
        """The video is tracked with both sides."""
        person, sides = self.person(secret), self.sides()
        session = person.the_session()
        for name in (first, second):
            if not isinstance(name, str) or name not in sides:
                raise InputError(f"What is compared must be one of {', '.join(sides)}.")
        if person.comparison is not None:
            person.comparison.stop()
        pair = [sides[first], sides[second]]
        comparison = Comparison(session, pair, person.fresh_folder("comparison"), only_first is True)
        person.comparison = comparison
        yield from self.steps_of(person, comparison)

    def steps_of(self, person: Person, comparison: Comparison) -> Iterator[dict[Any, Any]]:
        """Runs a comparison and shows how far it is; then what came of it."""
        shown_at = 0.0
        for step in comparison.run():
            if time.monotonic() - shown_at >= PREVIEW_SECONDS:
                shown_at = time.monotonic()
                yield {self.progress: f"Tracking with both: {step.done} of {step.total} frames"}
        frames = comparison.frames
        if not frames:
            yield {self.progress: "Stopped before both had tracked a frame."}
            return
        label = f"Frame, {frames[0]} to {frames[-1]}"
        yield {
            self.progress: "Left: " + comparison.sides[0].label + ". Right: " + comparison.sides[1].label + ".",
            self.both: shown_picture(comparison.picture(frames[-1])),
            self.slider: gr.Slider(
                frames[0], max(frames[-1], frames[0] + 1), frames[-1], label=label, visible=len(frames) > 1
            ),
            self.table: gr.Dataframe(comparison.table(), headers=comparison.headers(), visible=True),
        }

    @guarded
    def show_both(self, secret: object, frame: object) -> dict[Any, Any]:
        """Another frame of the comparison is looked at."""
        comparison, frame = self.person(secret).comparison, whole(frame, "frame")
        if comparison is None:
            raise InputError("Nothing was compared yet.")
        return {self.both: comparison.picture(frame)}

    @guarded
    def stop_comparison(self, secret: object) -> None:
        """Stop was pressed."""
        comparison = self.person(secret).comparison
        if comparison is not None:
            comparison.stop()
