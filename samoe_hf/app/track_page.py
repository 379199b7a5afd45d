"""The page's first part: a video, its objects, clicks and boxes, tracking, and what is taken away."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from samoe_hf.data.video_io import IMAGE_SUFFIXES
from samoe_hf.errors import InputError

from .exports import export_coco, export_masks, export_overlay
from .page_parts import DEVICE, PREVIEW_SECONDS, PRIVATE, QUICK, Part, guarded, picture, position, whole
from .people import Person
from .pictures import draw_frame, to_video
from .project import is_project, open_project, save_project
from .session import Direction, TrackingSession
from .videos import EXAMPLES, VIDEO_SUFFIXES, OpenedVideo, open_kept, open_upload, write_example

POSITIVE, NEGATIVE, BOX = "+ is the object", "− is not", "Box: two corners"
EXPORTS: dict[str, Callable[[TrackingSession, Path], Path]] = {
    "Masks, PNG in a zip": export_masks,
    "Video with masks, mp4": export_overlay,
    "Masks, COCO JSON": export_coco,
    "Project, to go on later": save_project,
}


def next_step(person: Person) -> str:
    """What a person may do next, in a sentence or two."""
    session = person.session
    if session is None:
        return "**Start:** upload a video, or take an example."
    if person.corner is not None:
        return "**Box:** now click the opposite corner."
    if not session.prompts:
        return "**Next:** click on an object in the frame. Its mask appears at once."
    if len(session.masks.frames) <= len(session.prompted_frames):
        return (
            "**Next:** is the mask right? Then **track the whole video**. If not, click again: + where it lacks, "
            "− where it is too much."
        )
    return (
        "**Next:** move through the frames. Where a mask is wrong, click to correct it and track **from here on**. "
        "Or take the masks away."
    )


def whose_experts(session: TrackingSession | None) -> str:
    """Whose experts the video got, and how sure the gate was."""
    if session is None or not session.model.domains:
        return ""
    if not session.masks.frames:
        return "The gate decides on the first click."
    whose = "the base model, no domain's experts" if session.tracked_domain is None else session.tracked_domain
    if session.confidence is None:
        return f"Experts: **{whose}**, as you chose."
    return f"Experts: **{whose}**, chosen by the gate, {session.confidence:.0%} sure."


class TrackPart(Part):
    """Upload, prompt, track, correct, take away."""

    def build(self) -> None:
        """Lays the components out."""
        self.hint = gr.Markdown(next_step(Person("", Path(), 0)), elem_id="hint")
        with gr.Row(elem_id="track-row"):
            with gr.Column(scale=3, min_width=320):
                self._build_start()
                self._build_frame()
            with gr.Column(scale=1, min_width=260, visible=False, elem_id="tools") as self.tools:
                self._build_tools()

    def _build_start(self) -> None:
        kinds = [".zip", *VIDEO_SUFFIXES, *IMAGE_SUFFIXES]
        with gr.Group(elem_id="start") as self.start:
            self.upload = gr.File(
                label="A video, frames, a zip of frames, or a project",
                file_count="multiple",
                file_types=kinds,
                height=150,
                elem_id="upload",
            )
            with gr.Row(elem_id="example-row"):
                self.example = gr.Dropdown(list(EXAMPLES), value="Shapes", label="Or an example", elem_id="example")
                self.take_example = gr.Button("Take the example", variant="primary", elem_id="take-example")

    def _build_frame(self) -> None:
        with gr.Column(visible=False) as self.stage:
            self.frame = picture("The frame", elem_id="frame")
            with gr.Row(elem_id="click-row"):
                modes = [POSITIVE, NEGATIVE, BOX]
                self.mode = gr.Radio(modes, value=POSITIVE, show_label=False, container=False, elem_id="mode", scale=4)
                self.undo = gr.Button("Undo", interactive=False, elem_id="undo", size="sm", min_width=60)
            self.slider = gr.Slider(0, 1, 0, step=1, label="Frame", elem_id="slider")
            size = {"size": "md", "min_width": 120}
            with gr.Row(elem_id="track-buttons"):
                self.back = gr.Button("◀ From here back", elem_id="back", **size)
                self.track = gr.Button(
                    "Track the whole video", variant="primary", elem_id="track", size="md", scale=2, min_width=170
                )
                self.onward = gr.Button("From here on ▶", elem_id="onward", **size)
                self.stop = gr.Button(
                    "Stop", variant="stop", interactive=False, elem_id="stop", size="md", min_width=60
                )
            self.progress = gr.Markdown("", elem_id="progress")

    def _build_tools(self) -> None:
        self.objects = gr.Radio([], label="Object", elem_id="objects")
        with gr.Row():
            self.add = gr.Button("Add object", size="sm", elem_id="add", min_width=80)
            self.remove = gr.Button("Remove object", size="sm", elem_id="remove", min_width=80, interactive=False)
        self.whose = gr.Markdown("", elem_id="whose")
        with gr.Accordion("Take away", open=False, elem_id="take-away"):
            self.kind = gr.Dropdown(list(EXPORTS), value=next(iter(EXPORTS)), label="What", elem_id="kind")
            self.export = gr.Button("Make the file", size="sm", elem_id="export")
            self.file = gr.File(label="Your file", visible=False, interactive=False, elem_id="file")
        self.another = gr.Button("Another video", size="sm", elem_id="another")

    def wire(self) -> None:
        """Connects the components with the handlers."""
        shown, here = self.shown(), [self.secret, self.slider]
        self.upload.upload(self.open_files, [self.secret, self.upload], shown, **PRIVATE)
        self.take_example.click(self.open_example, [self.secret, self.example], shown, **PRIVATE)
        self.another.click(self.ask_another, [self.secret], [self.start, self.upload], **QUICK, **PRIVATE)
        self.slider.input(self.show, here, shown, trigger_mode="always_last", **QUICK, **PRIVATE)
        inputs = [*here, self.objects, self.mode]
        self.frame.select(self.click, inputs, shown, trigger_mode="multiple", **QUICK, **PRIVATE)
        self.mode.change(self.forget_corner, here, shown, **QUICK, **PRIVATE)
        self.undo.click(self.take_back, here, shown, **QUICK, **PRIVATE)
        self.add.click(self.add_object, here, shown, **QUICK, **PRIVATE)
        self.remove.click(self.remove_object, [*here, self.objects], shown, **QUICK, **PRIVATE)
        for button, run in ((self.back, self.run_back), (self.track, self.run_whole), (self.onward, self.run_on)):
            button.click(
                run, here, shown, show_progress="minimal", show_progress_on=[self.progress], **DEVICE, **PRIVATE
            )
        self.stop.click(self.stop_tracking, [self.secret], None, queue=False, **PRIVATE)
        self.export.click(self.make_file, [self.secret, self.kind], [self.file], concurrency_limit=2, **PRIVATE)

    def shown(self) -> set[Any]:
        """The components that show where a person stands."""
        components = [self.hint, self.start, self.stage, self.tools, self.frame, self.slider, self.stop, self.progress]
        return {*components, self.undo, self.objects, self.remove, self.whose, self.file}

    def view(self, person: Person, frame: int | None = None, **changes: Any) -> dict[Any, Any]:
        """Updates of all that is shown of a person on a frame, by default on the first.

        Args:
            changes: of the slider: `new` for a video that was just opened; `object_id`: the object that is chosen.
        """
        session = person.session
        if session is None:
            return {self.hint: next_step(person)}
        frame = 0 if frame is None else frame
        corner = person.corner[2:] if person.corner and person.corner[1] == frame else None
        drawn = draw_frame(session.frame(frame), session.id_map(frame), session.prompts_on(frame), corner)
        chosen = changes.get("object_id") or (session.objects[-1] if session.objects else None)
        updates = {
            self.hint: next_step(person),
            self.frame: drawn,
            self.undo: gr.Button(interactive=session.can_undo),
            self.objects: gr.Radio([(f"object {i}", i) for i in session.objects], value=chosen),
            self.remove: gr.Button(interactive=bool(session.objects)),
            self.whose: whose_experts(session),
            self.stop: gr.Button(interactive=False),
        }
        if changes.get("new"):
            label = f"Frame, 0 to {session.num_frames - 1}"
            maximum = max(1, session.num_frames - 1)
            updates |= {self.start: gr.Group(visible=False), self.stage: gr.Column(visible=True)}
            updates |= {self.tools: gr.Column(visible=True), self.progress: "", self.file: gr.File(None, visible=False)}
            updates[self.slider] = gr.Slider(0, maximum, frame, label=label, interactive=session.num_frames > 1)
        return updates

    # --- Videos

    @guarded
    def open_files(self, secret: object, files: list[str] | None) -> dict[Any, Any]:
        """A video, frames, or a project were uploaded."""
        person, limits, models = self.person(secret), self.app.limits, self.app.models
        paths = [Path(file) for file in files or []]
        with person.opening() as folder:
            if [path.suffix.lower() for path in paths] == [".zip"] and is_project(paths[0], limits):
                person.take(open_project(paths[0], folder, models.first, models.device_lock, limits))
            else:
                self._begin(person, folder, open_upload(paths, folder, limits))
        return self.view(person, new=True)

    @guarded
    def open_example(self, secret: object, name: object) -> dict[Any, Any]:
        """An example was asked for."""
        person = self.person(secret)
        if not isinstance(name, str):
            raise InputError("`example` must be a name.")
        with person.opening() as folder:
            path = write_example(name, folder)
            self._begin(person, folder, open_kept(name.lower(), path, self.app.limits))
        return self.view(person, new=True)

    def _begin(self, person: Person, folder: Path, video: OpenedVideo) -> None:
        models = self.app.models
        person.take(TrackingSession(folder, video, models.first, models.device_lock, self.app.limits))

    @guarded
    def ask_another(self, secret: object) -> dict[Any, Any]:
        """Another video is wanted: the place to upload it comes back."""
        self.person(secret)
        return {self.start: gr.Group(visible=True), self.upload: gr.File(None)}

    # --- Prompts

    @guarded
    def show(self, secret: object, frame: object) -> dict[Any, Any]:
        """Another frame is looked at."""
        person = self.person(secret)
        return self.view(person, whole(frame, "frame"))

    @guarded
    def click(
        self, secret: object, frame: object, object_id: object, mode: object, event: gr.SelectData
    ) -> dict[Any, Any]:
        """The frame was clicked: a point, or a corner of a box."""
        person, frame = self.person(secret), whole(frame, "frame")
        session = person.the_session()
        session.frame(frame)  # checks its number
        x, y = to_video(*position(event.index), session.video.frames.size)
        object_id = self._object(session, object_id)
        if mode != BOX:
            session.click(object_id, frame, x, y, positive=mode != NEGATIVE)
        elif person.corner is None or person.corner[:2] != (object_id, frame):
            person.corner = (object_id, frame, x, y)
        else:
            (_, _, x0, y0), person.corner = person.corner, None
            session.draw_box(object_id, frame, (min(x0, x), min(y0, y), max(x0, x), max(y0, y)))
        return self.view(person, frame, object_id=object_id)

    def _object(self, session: TrackingSession, object_id: object) -> int:
        """The object that was chosen; the first one comes with the first click."""
        if object_id is None:
            return session.objects[-1] if session.objects else session.add_object()
        return whole(object_id, "object")

    @guarded
    def forget_corner(self, secret: object, frame: object) -> dict[Any, Any]:
        """A click means something else now."""
        person = self.person(secret)
        person.corner = None
        return self.view(person, whole(frame, "frame"))

    @guarded
    def take_back(self, secret: object, frame: object) -> dict[Any, Any]:
        """Undo was pressed: the corner of a box goes first."""
        person = self.person(secret)
        if person.corner is not None:
            person.corner = None
        else:
            person.the_session().undo()
        return self.view(person, whole(frame, "frame"))

    @guarded
    def add_object(self, secret: object, frame: object) -> dict[Any, Any]:
        """Another object is to be tracked; it is chosen."""
        person = self.person(secret)
        return self.view(person, whole(frame, "frame"), object_id=person.the_session().add_object())

    @guarded
    def remove_object(self, secret: object, frame: object, object_id: object) -> dict[Any, Any]:
        """The chosen object is not wanted any more."""
        person = self.person(secret)
        person.the_session().remove_object(whole(object_id, "object"))
        person.corner = None
        return self.view(person, whole(frame, "frame"))

    # --- Tracking

    def run_back(self, secret: object, frame: object) -> Iterator[dict[Any, Any]]:
        """From the shown frame to the first."""
        yield from self._run(secret, frame, "backward")

    def run_whole(self, secret: object, frame: object) -> Iterator[dict[Any, Any]]:
        """All frames."""
        yield from self._run(secret, frame, "whole")

    def run_on(self, secret: object, frame: object) -> Iterator[dict[Any, Any]]:
        """From the shown frame to the last."""
        yield from self._run(secret, frame, "forward")

    @guarded
    def _run(self, secret: object, frame: object, direction: Direction) -> Iterator[dict[Any, Any]]:
        person = self.person(secret)
        session, shown_at, last = person.the_session(), 0.0, None
        start = whole(frame, "frame")
        for step in session.propagate(direction, start):
            last = step
            if time.monotonic() - shown_at < PREVIEW_SECONDS:
                continue
            shown_at = time.monotonic()
            yield {
                self.frame: draw_frame(session.frame(step.frame), session.id_map(step.frame)),
                self.slider: step.frame,
                self.progress: f"Tracking: {step.done} of {step.total} frames",
                self.stop: gr.Button(interactive=True),
                self.hint: "**Tracking.** Stop it as soon as a mask goes wrong, and correct it there.",
            }
        stopped = last is not None and last.done < last.total
        where = last.frame if stopped and last else start
        done = f"Stopped after {last.done} of {last.total} frames." if stopped and last else "Tracked."
        yield {**self.view(person, where), self.slider: where, self.progress: done}

    @guarded
    def stop_tracking(self, secret: object) -> None:
        """Stop was pressed."""
        self.person(secret).the_session().stop()

    @guarded
    def make_file(self, secret: object, kind: object) -> dict[Any, Any]:
        """A file was asked for."""
        person = self.person(secret)
        if not isinstance(kind, str) or kind not in EXPORTS:
            raise InputError(f"What is taken away must be one of {', '.join(EXPORTS)}.")
        path = EXPORTS[kind](person.the_session(), person.fresh_folder("export"))
        return {self.file: gr.File(str(path), visible=True)}
