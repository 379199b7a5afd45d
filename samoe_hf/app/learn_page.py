"""The page's third part: corrected videos are collected, a domain is learned, and the video is tracked again."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from samoe_hf.errors import InputError
from samoe_hf.model.domain_choice import AUTO

from .collecting import collect_video, collected
from .comparison import Comparison, Side
from .learning import Learning
from .look_page import LookPart, figure_picture
from .models import load_model
from .page_parts import DEVICE, PRIVATE, Part, guarded, picture, shown_picture, whole
from .people import Person
from .track_page import TrackPart

DEFAULT_STEPS = 120
CLOSED = (
    "Nothing can be learned here: this app was started without a place for corrected videos. "
    "`samoe app MODEL --data DIR` has one."
)
WORDS = {
    "new": "",
    "running": "**Learning.** The curve grows with each checkpoint; you can stop and resume.",
    "stopped": "**Stopped.** *Resume* goes on from the last checkpoint.",
    "done": "**Learned.** Now track the video again with what was learned.",
}


class LearnPart(Part):
    """Collect, learn, track again."""

    def build(self, track: TrackPart, look: LookPart) -> None:
        """Lays the components out."""
        self.track, self.look = track, look
        is_open = self.app.learner is not None
        gr.Markdown(CLOSED, visible=not is_open)
        with gr.Column(visible=is_open):
            gr.Markdown("**1. Collect.** Correct the masks in *Track*, then add the video. It stays on the server.")
            with gr.Row():
                self.collect = gr.Button("Add this video to the data set", elem_id="collect", size="md")
                self.count = gr.Markdown(self._count(), elem_id="count")
            gr.Markdown("**2. Learn.** New experts are trained on the collected videos; all else stays as it is.")
            with gr.Row():
                self.domain = gr.Textbox("mine", label="Name of the domain", elem_id="learn-domain", max_lines=1)
                self.steps = gr.Number(DEFAULT_STEPS, label="Steps of training", precision=0, elem_id="steps")
            with gr.Row():
                self.start = gr.Button("Learn", variant="primary", elem_id="learn", size="md", scale=2, min_width=90)
                self.stop = gr.Button(
                    "Stop", variant="stop", elem_id="stop-learning", size="md", min_width=60, interactive=False
                )
                self.resume = gr.Button("Resume", elem_id="resume", size="md", min_width=60, interactive=False)
            self.state = gr.Markdown("", elem_id="learn-state")
            self.curve = picture("Loss, and J&F on the collected videos", elem_id="curve", visible=False)
            gr.Markdown("**3. Track again.** The same first clicks, before and after, without your corrections.")
            self.again = gr.Button("Track again, before and after", elem_id="again", size="md", interactive=False)
            self._build_result()
            self.timer = gr.Timer(2, active=False)

    def _build_result(self) -> None:
        self.progress = gr.Markdown("", elem_id="again-progress")
        self.both = picture("Before and after", elem_id="before-after", visible=False)
        self.slider = gr.Slider(0, 1, 0, step=1, label="Frame", visible=False, elem_id="again-slider")
        self.table = gr.Dataframe(visible=False, interactive=False, elem_id="again-table")

    def wire(self) -> None:
        """Connects the components with the handlers."""
        shown, secret = self.shown(), [self.secret]
        self.collect.click(self.add_video, secret, [self.count], concurrency_limit=1, **PRIVATE)
        self.start.click(self.begin, [self.secret, self.domain, self.steps], shown, **PRIVATE)
        self.stop.click(self.end, secret, shown, queue=False, **PRIVATE)
        self.resume.click(self.go_on, secret, shown, **PRIVATE)
        self.timer.tick(self.watch, secret, shown, show_progress="hidden", **PRIVATE)
        outputs = {self.progress, self.both, self.slider, self.table} | self.track.shown()
        progress = {"show_progress": "minimal", "show_progress_on": [self.progress]}
        self.again.click(self.track_again, secret, outputs, **progress, **DEVICE, **PRIVATE)
        moved = {"trigger_mode": "always_last", "show_progress": "hidden"}
        self.slider.input(self.show_both, [self.secret, self.slider], [self.both], **moved, **PRIVATE)

    def shown(self) -> set[Any]:
        """Components that show how far learning is."""
        return {self.state, self.curve, self.start, self.stop, self.resume, self.again, self.timer, self.count}

    def _count(self) -> str:
        if self.app.learner is None:
            return ""
        number = len(collected(self.app.learner.data))
        return {0: "No video is collected yet.", 1: "1 video is collected."}.get(
            number, f"{number} videos are collected."
        )

    def _learner(self):
        if self.app.learner is None:
            raise InputError(CLOSED)
        return self.app.learner

    @guarded
    def refresh(self, secret: object) -> dict[Any, Any]:
        """The part is opened."""
        return self._view(self.person(secret))

    @guarded
    def add_video(self, secret: object) -> dict[Any, Any]:
        """The corrected video is added to the data set."""
        person, learner = self.person(secret), self._learner()
        collect_video(person.the_session(), learner.data)
        return {self.count: self._count()}

    @guarded
    def begin(self, secret: object, domain: object, steps: object) -> dict[Any, Any]:
        """Learning starts."""
        person, learner = self.person(secret), self._learner()
        model = person.session.model if person.session else self.app.models.first
        learner.start(person.secret, model, domain, whole(steps, "steps"))
        return self._view(person)

    @guarded
    def end(self, secret: object) -> dict[Any, Any]:
        """Learning is stopped."""
        person = self.person(secret)
        self._learner().of(person.secret).stop()
        return self._view(person)

    @guarded
    def go_on(self, secret: object) -> dict[Any, Any]:
        """Learning goes on."""
        person = self.person(secret)
        self._learner().of(person.secret).start()
        return self._view(person)

    @guarded
    def watch(self, secret: object) -> dict[Any, Any]:
        """The page asks how far it is."""
        return self._view(self.person(secret))

    def _own(self, person: Person) -> Learning | None:
        learner = self.app.learner
        return learner.current if learner and learner.owner == person.secret else None

    def _view(self, person: Person) -> dict[Any, Any]:
        learning = self._own(person)
        state = learning.state if learning else "new"
        text = f"**It failed:** {learning.problem()}" if learning and state == "failed" else WORDS.get(state, "")
        if learning and (scores := learning.scores()):
            before, after = (100 * score for score in scores)
            text += f" J&F on the collected videos: {before:.0f} before, {after:.0f} after."
        curve = learning.curve() if learning else None
        drawn = figure_picture(curve.draw()) if curve and (curve.loss or curve.score) else None
        return {
            self.state: text,
            self.curve: shown_picture(drawn),
            self.start: gr.Button(interactive=state != "running"),
            self.stop: gr.Button(interactive=state == "running"),
            self.resume: gr.Button(interactive=state in ("stopped", "failed")),
            self.again: gr.Button(interactive=state == "done", variant="primary" if state == "done" else "secondary"),
            self.timer: gr.Timer(active=state == "running"),
            self.count: self._count(),
        }

    @guarded
    def track_again(self, secret: object) -> Iterator[dict[Any, Any]]:
        """The model is switched to what was learned; the video is tracked before and after."""
        person = self.person(secret)
        learning, session = self._learner().of(person.secret), person.the_session()
        if learning.state != "done":
            raise InputError("Learning is not done yet.")
        name, before = learning.output.name, Side("before", learning.model, session_domain(learning.model, session))
        if name not in self.app.models.names:
            device = learning.model.model.device
            self.app.models.add(load_model(learning.output, device, name))
        after = Side(f"after ({name})", self.app.models[name], learning.domain)
        comparison = Comparison(session, [before, after], person.fresh_folder("comparison"), first_prompts_only=True)
        person.comparison = comparison
        for step in self.look.steps_of(person, comparison):
            shown = {"progress": self.progress, "both": self.both, "slider": self.slider, "table": self.table}
            yield {
                component: step[getattr(self.look, key)]
                for key, component in shown.items()
                if getattr(self.look, key) in step
            }
        session.use(after.model, learning.domain)
        yield {self.progress: f"The model is now {name}. Left: before. Right: after.", **self.track.view(person, 0)}

    @guarded
    def show_both(self, secret: object, frame: object) -> dict[Any, Any]:
        """Another frame of before and after is looked at."""
        comparison, frame = self.person(secret).comparison, whole(frame, "frame")
        if comparison is None:
            raise InputError("Nothing was tracked again yet.")
        return {self.both: comparison.picture(frame)}


def session_domain(model: Any, session: Any) -> str | None:
    """Whose experts a session ran with a model, as far as the model has them."""
    return session.domain if session.domain in (None, AUTO, *model.domains) else AUTO
