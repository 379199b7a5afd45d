"""The page's first part: a video, its objects, clicks and boxes, tracking, and what is taken away."""

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gradio as gr
import numpy as np

from samoe_hf.data.image_files import IMAGE_SUFFIXES
from samoe_hf.errors import InputError

from .exports import export_coco, export_format, export_masks, export_overlay, export_tracks
from .page_parts import (
    PREVIEW_SECONDS,
    QUICK,
    App,
    Part,
    Shown,
    button,
    frame_of,
    object_of,
    one_of,
    picture,
    place_of,
    point_of,
    shown_picture,
)
from .people import Person
from .pictures import draw_frame
from .project import is_project, open_project, save_project
from .session import Direction, TrackingSession
from .timeline import TIMELINE_SIZE, draw_timeline, frame_at
from .uploads import EXAMPLES, VIDEO_SUFFIXES, open_example, open_upload

LEGEND = "In the timeline, orange is doubt, and a dot is where you clicked; click on it to see a frame."
MARKED = f"The frames that are most worth a look, marked red. {LEGEND}"
NOTHING = f"No frame stands out. {LEGEND}"
POSITIVE, NEGATIVE, BOX = "+ is the object", "− is not", "Box: two corners"
TOOLS = {
    "cvat": "CVAT", "coco": "COCO's tools", "ytvis": "YouTube-VIS", "yolo": "YOLO", "labelme": "LabelMe",
    "labelstudio": "Label Studio", "davis": "DAVIS",
}  # fmt: skip
EXPORTS: dict[str, Callable[[TrackingSession, Path], Path]] = {
    "Masks, PNG in a zip": export_masks,
    "Video with masks, mp4": export_overlay,
    "Masks, COCO JSON": export_coco,
    "Scores and boxes, CSV": export_tracks,
    **{f"Frames and masks for {tool}, zip": export_format[kind] for kind, tool in TOOLS.items()},
    "Project, to go on later": save_project,
}


def next_step(person: Person | None) -> str:
    """What a person may do next, in a sentence or two; None: who has just come."""
    session = person and person.session
    if person is None or session is None:
        return "**Start:** upload a video, or take an example."
    if person.corner is not None:
        return "**Box:** now click the opposite corner."
    if not session.prompts:
        return "**Next:** click on an object in the frame. Its mask appears at once."
    if not session.was_tracked:
        return (
            "**Next:** is the mask right? Then **track the whole video**. If not, click again: + where it lacks, "
            "− where it is too much."
        )
    where = "look at the frames that the timeline marks" if session.looks else "move through the frames"
    return (
        f"**Next:** {where}. Where a mask is wrong, click to correct it and track **from here on**. Or take the masks "
        "away."
    )


def how_tracked(session: TrackingSession | None) -> str:
    """Which memories the video's frames read, whose experts it got, and how sure the gate was."""
    if session is None:
        return ""
    memories = f"Memory selection: **{session.memory_selection}**."
    if not session.loaded.domains:
        return memories
    if (decision := session.decision) is None:
        return f"{memories} The gate decides at the next click or tracked frame whose experts run."
    whose = decision.domain or "the base model, no domain's experts"
    if decision.confidence is None:
        return f"{memories} Experts: **{whose}**, as you chose."
    if decision.unknown is not None:
        half = "half of what they add, " if decision.unknown == "mix" else ""
        return f"{memories} Experts: **{whose}**, {half}as the nearest: the gate knows no such video."
    return f"{memories} Experts: **{whose}**, chosen by the gate, {decision.confidence:.0%} sure."


def named(session: TrackingSession, frame: int) -> list[tuple[str, int]]:
    """What each object is called on a frame, with how sure the model is of it, and its id."""
    rows, ends, names = {row.object: row for row in session.rows(frame)}, session.ends, []
    for object_id in session.objects:
        name = f"object {object_id}"
        if (row := rows.get(object_id)) is not None:
            iou = f"IoU {row.iou:.2f}" if row.seen else "not seen"
            name += f" · score {row.score:.2f} · {iou}"
        if object_id in ends:
            name += f", gone from {ends[object_id]}"
        names.append((name, object_id))
    return names


class TrackPart(Part):
    """Upload, prompt, track, correct, take away."""

    def __init__(self, app: App, key: gr.State):
        super().__init__(app, key)
        self.hint = gr.Markdown(next_step(None), elem_id="hint")
        with gr.Row(elem_id="track-row"):
            with gr.Column(scale=3, min_width=320):
                self._build_start()
                self._build_frame()
            with gr.Column(scale=1, min_width=260, visible=False, elem_id="tools") as self.tools:
                self._build_tools()

    def _build_start(self) -> None:
        with gr.Group(elem_id="start") as self.start:
            self.upload = gr.File(
                label="A video, frames, a zip of frames, or a project",
                file_count="multiple",
                file_types=[".zip", *VIDEO_SUFFIXES, *IMAGE_SUFFIXES],
                height=150,
                elem_id="upload",
            )
            with gr.Row(elem_id="example-row"):
                self.example = gr.Dropdown(list(EXAMPLES), value="Shapes", label="Or an example", elem_id="example")
                self.take_example = gr.Button("Take the example", variant="primary", elem_id="take-example")

    def _build_frame(self) -> None:
        with gr.Column(visible=False) as self.stage:
            self.frame = picture("The frame", "frame")
            with gr.Row(elem_classes="middle"):
                modes = [POSITIVE, NEGATIVE, BOX]
                self.mode = gr.Radio(modes, value=POSITIVE, show_label=False, container=False, elem_id="mode", scale=4)
                self.undo = button("Undo", "undo", size="sm", interactive=False)
            self.slider = gr.Slider(0, 1, 0, step=1, label="Frame", elem_id="slider")
            self.timeline = picture("The timeline", "timeline", visible=False)
            with gr.Row(elem_id="track-buttons"):
                self.back = button("◀ From here back", "back")
                self.track = button("Track the whole video", "track", "primary", scale=2)
                self.onward = button("From here on ▶", "onward")
                self.stop = button("Stop", "stop", "stop", interactive=False)
            self.progress = gr.Markdown("", elem_id="progress")
            self.looks = gr.Radio([], label="Where to look", visible=False, elem_id="looks")

    def _build_tools(self) -> None:
        self.objects = gr.Radio([], label="Object", elem_id="objects")
        with gr.Row():
            self.add = button("Add object", "add", size="sm")
            self.remove = button("Remove object", "remove", size="sm", interactive=False)
            self.leaves = button("It leaves here", "leaves", size="sm", interactive=False)
        self.whose = gr.Markdown("", elem_id="whose")
        with gr.Accordion("Take away", open=False, elem_id="take-away"):
            self.kind = gr.Dropdown(list(EXPORTS), value=next(iter(EXPORTS)), label="What", elem_id="kind")
            self.export = button("Make the file", "export", size="sm")
            self.file = gr.File(label="Your file", visible=False, interactive=False, elem_id="file")
        self.another = button("Another video", "another", size="sm")
        self._connect()

    def _connect(self) -> None:
        self.shown = {
            *(self.hint, self.start, self.stage, self.tools, self.frame, self.slider, self.stop, self.progress),
            *(self.undo, self.objects, self.remove, self.leaves, self.whose, self.file, self.timeline, self.looks),
        }
        shown, here = self.shown, [self.slider]
        self.on(self.upload.upload, self.open_files, [self.upload], shown)
        self.on(self.take_example.click, self.open_example, [self.example], shown)
        self.on(self.another.click, self.ask_another, [], {self.start, self.upload}, **QUICK)
        self.on(self.slider.input, self.view, here, shown, trigger_mode="always_last", **QUICK)
        self.on(self.timeline.select, self.go_along, [], shown, **QUICK)
        self.on(self.looks.input, self.go_to, [self.looks], shown, **QUICK)
        inputs = [self.slider, self.objects, self.mode]
        self.on(self.frame.select, self.click, inputs, shown, trigger_mode="multiple", **QUICK)
        self.on(self.mode.change, self.forget_corner, here, shown, **QUICK)
        self.on(self.undo.click, self.take_back, here, shown, **QUICK)
        self.on(self.add.click, self.add_object, here, shown, **QUICK)
        self.on(self.remove.click, self.remove_object, [self.slider, self.objects], shown, **QUICK)
        self.on(self.leaves.click, self.end_object, [self.slider, self.objects], shown, **QUICK)
        directions: dict[gr.Button, Direction] = {self.back: "backward", self.track: "whole", self.onward: "forward"}
        for one, direction in directions.items():
            self.on_device(one.click, partial(self.run, direction), here, shown, self.progress)
        self.on(self.stop.click, self.stop_tracking, queue=False)
        self.on(self.export.click, self.make_file, [self.kind], {self.file}, concurrency_limit=2)

    # --- What is shown

    def view(
        self, person: Person, shown: object = 0, chosen: int | None = None, id_map: np.ndarray | None = None
    ) -> Shown:
        """What is shown of a person on a frame, with an object `chosen`; by default the page's choice stays."""
        session = person.session
        if session is None:
            return {self.hint: next_step(None)}
        frame = frame_of(session, shown)
        corner = person.corner[2:] if person.corner and person.corner[1] == frame else None
        prompts = [prompt for _, prompt in sorted(session.prompts.items()) if prompt.frame_idx == frame]
        id_map = session.id_map(frame) if id_map is None else id_map
        objects, looks, timeline = named(session, frame), [], None
        if session.was_tracked:
            looks, timeline = session.looks, draw_timeline(session, frame)
        marked = frame if frame in [look.frame for look in looks] else None
        listed = [(f"frame {look.frame}: {look.reason}", look.frame) for look in looks]
        return {
            self.hint: next_step(person),
            self.frame: draw_frame(session.frame(frame), id_map, prompts, corner),
            self.undo: gr.Button(interactive=session.can_undo),
            self.objects: gr.Radio(objects) if objects and chosen is None else gr.Radio(objects, value=chosen),
            self.remove: gr.Button(interactive=bool(objects)),
            self.leaves: gr.Button(interactive=bool(objects)),
            self.whose: how_tracked(session),
            self.timeline: shown_picture(timeline),
            self.looks: gr.Radio(listed, value=marked, info=MARKED if looks else NOTHING, visible=session.was_tracked),
            self.stop: gr.Button(interactive=False),
        }

    def opened(self, person: Person) -> Shown:
        """What is shown when a video was opened, or a page was loaded."""
        updates, session = self.view(person, chosen=self.last(person)), person.session
        if session is not None:
            last = session.num_frames - 1
            label = f"Frame, 0 to {last}"
            updates |= {
                self.start: gr.Group(visible=False),
                self.stage: gr.Column(visible=True),
                self.tools: gr.Column(visible=True),
                self.progress: "",
                self.file: gr.File(None, visible=False),
                self.slider: gr.Slider(0, max(1, last), 0, label=label, interactive=last > 0),
            }
        return updates

    # --- Where to look

    def go_along(self, person: Person, event: gr.SelectData) -> Shown:
        """The timeline was clicked: the frame there is shown, or a marked one beside it."""
        session, (x, _) = person.the_session(), place_of(event.index, TIMELINE_SIZE)
        return self.go_to(person, frame_at(session, x))

    def go_to(self, person: Person, frame: object) -> Shown:
        """A frame that is worth a look was chosen."""
        frame = frame_of(person.the_session(), frame)
        return self.view(person, frame) | {self.slider: frame}

    # --- Videos

    def open_files(self, person: Person, files: list[str] | None) -> Shown:
        """A video, frames, or a project were uploaded."""
        model, limits, paths = self.app.first_of(person), self.app.limits, [Path(file) for file in files or []]
        with person.opening() as folder:
            if [path.suffix.lower() for path in paths] == [".zip"] and is_project(paths[0], limits):
                person.take(open_project(paths[0], folder, model, limits))
            else:
                person.take(TrackingSession(folder, open_upload(paths, folder, limits), model, limits))
        return self.opened(person)

    def open_example(self, person: Person, name: object) -> Shown:
        """An example was asked for."""
        name, limits = one_of(name, EXAMPLES, "example"), self.app.limits
        with person.opening() as folder:
            person.take(TrackingSession(folder, open_example(name, folder, limits), self.app.first_of(person), limits))
        return self.opened(person)

    def ask_another(self, person: Person) -> Shown:
        """Another video is wanted: the place to upload it comes back."""
        return {self.start: gr.Group(visible=True), self.upload: gr.File(None)}

    # --- Prompts

    def click(self, person: Person, frame: object, object_id: object, mode: object, event: gr.SelectData) -> Shown:
        """The frame was clicked: a point, or a corner of a box. The first object comes with the first click."""
        session = person.the_session()
        frame, (x, y) = frame_of(session, frame), point_of(session, event.index)
        chosen = self.last(person) if object_id is None else object_of(session, object_id)
        chosen = chosen or session.add_object()
        id_map = None
        if mode != BOX:
            id_map = session.click(chosen, frame, x, y, positive=mode != NEGATIVE)
        elif person.corner is None or person.corner[:2] != (chosen, frame):
            person.corner = (chosen, frame, x, y)
        else:
            (_, _, x0, y0), person.corner = person.corner, None
            id_map = session.draw_box(chosen, frame, (min(x0, x), min(y0, y), max(x0, x), max(y0, y)))
        return self.view(person, frame, chosen, id_map)

    @staticmethod
    def last(person: Person) -> int | None:
        """The object that came last."""
        return person.session.objects[-1] if person.session and person.session.objects else None

    def forget_corner(self, person: Person, frame: object) -> Shown:
        """A click means something else now."""
        person.corner = None
        return self.view(person, frame)

    def take_back(self, person: Person, frame: object) -> Shown:
        """Undo was pressed: the corner of a box goes first."""
        if person.corner is not None:
            person.corner = None
        else:
            person.the_session().undo()
        return self.view(person, frame, self.last(person))

    def add_object(self, person: Person, frame: object) -> Shown:
        """Another object is to be tracked; it is chosen."""
        session = person.the_session()
        return self.view(person, frame_of(session, frame), session.add_object())

    def remove_object(self, person: Person, frame: object, object_id: object) -> Shown:
        """The chosen object is not wanted any more."""
        session = person.the_session()
        session.remove_object(object_of(session, object_id))
        person.corner = None
        return self.view(person, frame, self.last(person))

    def end_object(self, person: Person, frame: object, object_id: object) -> Shown:
        """The chosen object leaves on the shown frame, or stays after all."""
        session = person.the_session()
        chosen, frame = object_of(session, object_id), frame_of(session, frame)
        session.end_object(chosen, frame)
        is_gone = f"**Object {chosen} is gone from frame {frame} on.** If not, press again on this frame."
        shown = self.view(person, frame, chosen)
        return shown | {self.hint: is_gone} if chosen in session.ends else shown

    # --- Tracking

    def run(self, direction: Direction, person: Person, frame: object) -> Iterator[Shown]:
        """All frames are tracked, or those from the shown one on or back."""
        session, shown_at, last = person.the_session(), 0.0, None
        where = frame_of(session, frame)
        try:
            for last in session.propagate(direction, where):
                if time.monotonic() - shown_at >= PREVIEW_SECONDS:
                    shown_at = time.monotonic()
                    yield {
                        self.frame: draw_frame(session.frame(last.frame), last.id_map),
                        self.slider: last.frame,
                        self.progress: f"Tracking: {last.done} of {last.total} frames",
                        self.stop: gr.Button(interactive=True),
                        self.hint: "**Tracking.** Stop it as soon as a mask goes wrong, and correct it there.",
                    }
        except (InputError, OSError):
            if person.session is session:
                raise
        if person.session is not session:  # another video was opened, and the files of this one are gone
            yield {self.progress: ""}
            return
        words = "Tracked."
        if last is not None and last.done < last.total:
            where, words = last.frame, f"Stopped after {last.done} of {last.total} frames."
        yield {**self.view(person, where), self.slider: where, self.progress: words}
        yield {self.progress: words}  # Gradio sends the last step again, when the slider may have been moved already

    def stop_tracking(self, person: Person) -> None:
        """Stop was pressed."""
        person.the_session().stop()

    def make_file(self, person: Person, kind: object) -> Shown:
        """A file was asked for."""
        export, session, folder = EXPORTS[one_of(kind, EXPORTS, "what")], person.the_session(), person.folder / "export"
        with session.exclusive():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            path = export(session, folder)
        most = self.app.limits.upload_bytes
        if export is save_project and path.stat().st_size > most:
            gr.Warning(f"This app takes uploads of {most / 2**20:.0f} MB, so it cannot open this project again.")
        return {self.file: gr.File(str(path), visible=True)}
