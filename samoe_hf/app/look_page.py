"""The page's second part: whose experts and which memories a video gets, what experts do on a frame, and two models
side by side."""

import time
from collections.abc import Iterator

import gradio as gr

from samoe_hf.errors import InputError
from samoe_hf.model.domain_choice import AUTO
from samoe_hf.model.memory_selection import MEMORY_SELECTIONS

from .comparison import Comparison, Side
from .experts_view import look_at_experts
from .page_parts import PREVIEW_SECONDS, QUICK, App, Part, Shown, button, frame_of, one_of, picture, shown_picture
from .people import Person
from .track_page import TrackPart, how_tracked

FIRST = "**First** track a video in *Track*; then look here at what happened."


class SideBySide(Part):
    """What came of a comparison: its pictures, and how well the two agree. Ids begin with `element`."""

    def __init__(self, app: App, key: gr.State, label: str, element: str):
        super().__init__(app, key)
        self.progress = gr.Markdown("", elem_id=f"{element}-progress")
        self.both = picture(label, f"{element}-both", visible=False)
        self.slider = gr.Slider(0, 1, 0, step=1, label="Frame", visible=False, elem_id=f"{element}-slider")
        self.table = gr.Dataframe(visible=False, interactive=False, elem_id=f"{element}-table")
        self.shown = {self.progress, self.both, self.slider, self.table}
        self.on(self.slider.input, self.show, [self.slider], {self.both}, trigger_mode="always_last", **QUICK)

    def run(self, person: Person, comparison: Comparison) -> Iterator[Shown]:
        """Runs a person's comparison and shows how far it is; then what came of it."""
        person.compare(comparison)
        shown_at = 0.0
        try:
            for step in comparison.run():
                if time.monotonic() - shown_at >= PREVIEW_SECONDS:
                    shown_at = time.monotonic()
                    yield {self.progress: f"Tracking with both: {step.done} of {step.total} frames"}
        except (InputError, OSError):
            if person.comparison is comparison:
                raise
        frames = comparison.frames if person.comparison is comparison else []  # else the files of this one are gone
        if not frames:
            yield {self.progress: "Stopped before both had tracked a frame."}
            return
        first, last = frames[0], frames[-1]
        left, right = (side.label for side in comparison.sides)
        label, is_movable = f"Frame, {first} to {last}", len(frames) > 1
        yield {
            self.progress: f"Left: {left}. Right: {right}. Memory selection: {comparison.memory_selection}.",
            self.both: shown_picture(comparison.picture(last)),
            self.slider: gr.Slider(first, max(last, first + 1), last, label=label, visible=is_movable),
            self.table: gr.Dataframe(comparison.table(), headers=comparison.headers(), visible=True),
        }

    def show(self, person: Person, frame: object) -> Shown:
        """Another frame of the comparison is looked at."""
        comparison = person.comparison
        if comparison is None:
            raise InputError("Nothing was compared yet.")
        return {self.both: comparison.picture(frame_of(person.the_session(), frame))}


class LookPart(Part):
    """Domains, experts, comparisons."""

    def __init__(self, app: App, key: gr.State, track: TrackPart):
        super().__init__(app, key)
        self.track = track
        self.note = gr.Markdown(FIRST, elem_id="look-note")
        with gr.Accordion("Whose experts, and which memories", open=True):
            with gr.Row(elem_classes="middle"):
                self.model = gr.Dropdown(list(app.models), value=app.first.name, label="Model")
                self.domain = gr.Dropdown([], label="Experts of", elem_id="domain", interactive=True)
                choices, value = list(MEMORY_SELECTIONS), app.first.model.memory_selection
                self.memories = gr.Dropdown(choices, value=value, label="Memory selection", elem_id="memories")
                use = button("Start anew with these", "use")
            self.whose = gr.Markdown("", elem_id="look-whose")
        with gr.Accordion("Where the experts work", open=True):
            with gr.Row(elem_classes="middle"):
                look = button("Look at the frame shown in Track", "look", "primary")
                self.layer = gr.Dropdown([], label="Layer", elem_id="layer", interactive=True)
                self.object = gr.Dropdown([], label="Object", elem_id="look-object", interactive=True)
            self.looked = gr.Markdown("", elem_id="looked")
            with gr.Row():
                self.map = picture("Chosen experts", "map", visible=False)
                self.usage = picture("Use of experts by object", "usage", visible=False)
        with gr.Accordion("Two side by side", open=True):
            with gr.Row():
                self.first = gr.Dropdown([], label="Left", elem_id="first", interactive=True)
                self.second = gr.Dropdown([], label="Right", elem_id="second", interactive=True)
            only_first = gr.Checkbox(False, label="Without corrections: each object's first prompt only")
            with gr.Row():
                compare = button("Track with both", "compare", "primary", scale=2)
                stop = button("Stop", "stop-compare")
            self.result = SideBySide(app, key, "Left and right", "compare")
        self.shown = {self.note, self.model, self.domain, self.memories, self.whose, self.first, self.second}
        drawn = {self.layer, self.object, self.looked, self.map, self.usage}

        self.on(self.model.input, self.choose_model, [self.model], {self.domain, self.memories})
        here = [track.slider]
        inputs = [self.model, self.domain, self.memories, *here]
        self.on_device(use.click, self.start_anew, inputs, self.shown | track.shown)
        self.on_device(look.click, self.look_at, here, drawn, self.looked)
        for menu in (self.layer, self.object):
            self.on(menu.input, self.draw, [self.layer, self.object], drawn, **QUICK)
        inputs, result = [self.first, self.second, only_first], self.result
        self.on_device(compare.click, self.compare, inputs, result.shown, result.progress)
        self.on(stop.click, self.stop_comparison, queue=False)

    # --- Whose experts

    def sides(self, person: Person) -> dict[str, Side]:
        """What can be compared, by what it is called."""
        sides = {}
        for name, loaded in self.app.models_of(person).items():
            for choice, domain in (loaded.domain_choices or {"": None}).items():
                label = f"{name}: {choice}" if choice else name
                sides[label] = Side(label, loaded, domain)
        return sides

    def refresh(self, person: Person, first: object = None, second: object = None) -> Shown:
        """The part is opened: menus show what there is, and keep what was chosen to be compared."""
        session, names, models = person.session, list(self.sides(person)), self.app.models_of(person)
        loaded = models[session.loaded.name if session else self.app.first.name]
        choices = loaded.domain_choices
        current = next((c for c, domain in choices.items() if session and domain == session.domain), None)
        note = "" if session and session.prompts else FIRST
        if session and session.prompts and not choices:
            note = f"{loaded.name} has no domains: all its videos get the same experts. *Learn* adds a domain."
        left = first if isinstance(first, str) and first in names else names[0]
        right = second if isinstance(second, str) and second in names and second != left else names[-1]
        return {
            self.note: note,
            self.model: gr.Dropdown(list(models), value=loaded.name),
            self.domain: gr.Dropdown(list(choices), value=current, visible=bool(choices)),
            self.memories: session.memory_selection if session else loaded.model.memory_selection,
            self.whose: how_tracked(session),
            self.first: gr.Dropdown(names, value=left),
            self.second: gr.Dropdown(names, value=right),
        }

    def choose_model(self, person: Person, name: object) -> Shown:
        """Another model was chosen in the menu: its domains and its selection of memories are shown."""
        models = self.app.models_of(person)
        loaded = models[one_of(name, models, "model")]
        choices = list(loaded.domain_choices)
        domain = gr.Dropdown(choices, value=choices[0] if choices else None, visible=bool(choices))
        return {self.domain: domain, self.memories: loaded.model.memory_selection}

    def start_anew(self, person: Person, name: object, choice: object, memories: object, frame: object) -> Shown:
        """The video starts anew with another model, another domain's experts, or another selection of memories."""
        session, models = person.the_session(), self.app.models_of(person)
        loaded = models[one_of(name, models, "model")]
        frame, choices = frame_of(session, frame), loaded.domain_choices
        domain = choices[one_of(choice, choices, "experts")] if choices else AUTO
        session.use(loaded, domain, one_of(memories, MEMORY_SELECTIONS, "memory selection"))
        gr.Info("Started anew with the same clicks. Track the video again.")
        return self.refresh(person) | self.track.view(person, frame)

    # --- Where the experts work

    def look_at(self, person: Person, frame: object) -> Shown:
        """What the experts do on the frame that is shown in *Track*."""
        session = person.the_session()
        person.experts = look_at_experts(session, frame_of(session, frame))
        return self.draw(person, next(iter(person.experts.layers)), None)

    def draw(self, person: Person, layer: object, object_id: object) -> Shown:
        """Draws the frame that was looked at; a layer or an object was chosen."""
        view = person.experts
        if view is None:
            raise InputError("Look at a frame first.")
        layer = one_of(layer, view.layers, "layer")
        maps = view.layers[layer].maps
        ids = [one for one in maps if one is not None]
        chosen = next((one for one in ids if one == object_id), next(iter(maps), None))
        return {
            self.layer: gr.Dropdown(list(view.layers), value=layer),
            self.object: gr.Dropdown([(f"object {i}", i) for i in ids], value=chosen, visible=bool(ids)),
            self.map: shown_picture(view.draw_map(person.the_session(), layer, chosen) if maps else None),
            self.usage: shown_picture(view.draw_usage(layer)),
        }

    # --- Two side by side

    def compare(self, person: Person, first: object, second: object, only_first: object) -> Iterator[Shown]:
        """The video is tracked with both sides."""
        session, sides = person.the_session(), self.sides(person)
        pair = sides[one_of(first, sides, "left")], sides[one_of(second, sides, "right")]
        comparison = Comparison(session, pair, person.folder, only_first is True)
        yield from self.result.run(person, comparison)

    def stop_comparison(self, person: Person) -> None:
        """Stop was pressed."""
        if person.comparison is not None:
            person.comparison.stop()
