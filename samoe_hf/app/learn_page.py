"""The page's third part: corrected videos are collected, a domain is learned, and the video is tracked again."""

from collections.abc import Iterator

import gradio as gr

from samoe_hf.errors import InputError
from samoe_hf.model.domain_choice import AUTO

from .comparison import Comparison, Side
from .learning import MAX_STEPS, Learner, collect_video, collected, draw_curves
from .look_page import SideBySide
from .models import load_model
from .page_parts import App, Part, Shown, button, integer, picture, shown_picture
from .people import Person
from .track_page import TrackPart

DEFAULT_STEPS = 120
CLOSED = (
    "Nothing can be learned here: this app was started without a place for corrected videos. "
    "`samoe app MODEL --data DIR` has one."
)
CHANGED = (
    "You changed the domains of {}, and learning reads its files. In *Domains*, save it or take the changes back, and "
    "start your video anew with a model that is not changed."
)
OTHERS = "**Somebody else learns here now.** It can begin when that is done or stopped by who began it."
WON = (
    "**Learned.** J&F on the collected videos, which it learned from: {:.1f} before, {:.1f} after. Now track the video "
    "again with what was learned."
)
LOST = (
    "**Nothing was won.** J&F on the collected videos, which it learned from: {:.1f} before, {:.1f} after, at best. "
    "More videos, better masks or other steps may help. *Track again* shows both; the model stays as it is."
)
FORGOTTEN = (
    " The gate knew *{}* by {} videos before. What is learned knows it by those that are collected here alone; "
    "*Domains* can tell it of others."
)
WORDS = {
    "new": "",
    "running": "**Learning.** The curve grows with each checkpoint; you can stop and resume.",
    "stopped": "**Stopped.** *Resume* goes on from the last checkpoint.",
}


class LearnPart(Part):
    """Collect, learn, track again."""

    def __init__(self, app: App, key: gr.State, track: TrackPart):
        super().__init__(app, key)
        self.track = track
        gr.Markdown(CLOSED, visible=app.learner is None)
        with gr.Column(visible=app.learner is not None):
            gr.Markdown("**1. Collect.** Correct the masks in *Track*, then add the video. It stays on the server.")
            with gr.Row(elem_classes="middle"):
                collect = button("Add this video to the data set", "collect")
                self.count = gr.Markdown(self._count(), elem_id="count")
            gr.Markdown("**2. Learn.** New experts are trained on the collected videos; all else stays as it is.")
            with gr.Row():
                domain = gr.Textbox("mine", label="Name of the domain", elem_id="learn-domain", max_lines=1)
                steps = gr.Number(DEFAULT_STEPS, label="Steps of training", precision=0, elem_id="steps")
            with gr.Row():
                self.start = button("Learn", "learn", "primary", scale=2)
                self.stop = button("Stop", "stop-learning", "stop", interactive=False)
                self.resume = button("Resume", "resume", interactive=False)
            self.state = gr.Markdown("", elem_id="learn-state")
            self.curve = picture("Loss, and J&F on the collected videos", "curve", visible=False)
            gr.Markdown("**3. Track again.** The same first clicks, before and after, without your corrections.")
            self.again = button("Track again, before and after", "again", interactive=False)
            self.result = SideBySide(app, key, "Before and after", "again")
            self.timer = gr.Timer(2, active=False)
        self.shown = {self.state, self.curve, self.start, self.stop, self.resume, self.again, self.timer, self.count}

        self.on(collect.click, self.add_video, [], {self.count}, concurrency_limit=1)
        self.on(self.start.click, self.begin, [domain, steps], self.shown)
        self.on(self.stop.click, self.end, [], self.shown, queue=False)
        self.on(self.resume.click, self.go_on, [], self.shown)
        self.on(self.timer.tick, self.refresh, [], self.shown, show_progress="hidden")
        outputs, line = self.result.shown | track.shown, self.result.progress
        self.on_device(self.again.click, self.track_again, [], outputs, line)

    @property
    def learner(self) -> Learner:
        """The app's; InputError where nothing may be learned."""
        if self.app.learner is None:
            raise InputError(CLOSED)
        return self.app.learner

    def _count(self) -> str:
        number = len(collected(self.app.learner.data)) if self.app.learner else 0
        return f"Videos that are collected: {number}"

    def add_video(self, person: Person) -> Shown:
        """The corrected video is added to the data set."""
        collect_video(person.the_session(), self.learner.data)
        return {self.count: self._count()}

    def begin(self, person: Person, domain: object, steps: object) -> Shown:
        """Learning starts."""
        loaded = person.session.loaded if person.session else self.app.first
        if loaded.is_changed or loaded.name in person.changed:
            raise InputError(CHANGED.format(loaded.name))
        self.learner.start(person.secret, loaded, str(domain).strip()[:100], integer(steps, "steps", 1, MAX_STEPS))
        return self.refresh(person)

    def end(self, person: Person) -> Shown:
        """Learning is stopped."""
        self.learner.of(person.secret).stop()
        return self.refresh(person)

    def go_on(self, person: Person) -> Shown:
        """Learning goes on."""
        self.learner.resume(person.secret)
        return self.refresh(person)

    def refresh(self, person: Person) -> Shown:
        """The part is opened, or asks how far learning is."""
        learner = self.app.learner
        current = learner.current if learner else None
        learning = current if learner and learner.owner == person.secret else None
        is_others = current is not None and learning is None and current.state == "running"
        state, text, drawn = "new", OTHERS if is_others else "", None
        if learning is not None:
            state = learning.state
            if state == "failed":
                text = f"**It failed:** {learning.problem()}"
            elif scores := learning.scores():
                text = (WON if learning.has_won else LOST).format(*(100 * score for score in scores))
            else:
                text = WORDS[state]
            if state in ("running", "done") and learning.known_before:
                text += FORGOTTEN.format(learning.domain, learning.known_before)
            curves = learning.curves()
            drawn = draw_curves(curves) if any(curves.values()) else None
        return {
            self.state: text,
            self.curve: shown_picture(drawn),
            self.start: gr.Button(interactive=state != "running" and not is_others),
            self.stop: gr.Button(interactive=state == "running"),
            self.resume: gr.Button(interactive=state in ("stopped", "failed")),
            self.again: gr.Button(interactive=state == "done", variant="primary" if state == "done" else "secondary"),
            self.timer: gr.Timer(active=state == "running" or is_others),
            self.count: self._count(),
        }

    def track_again(self, person: Person) -> Iterator[Shown]:
        """The model is switched to what was learned; the video is tracked before and after."""
        learning, session = self.learner.of(person.secret), person.the_session()
        if learning.state != "done":
            raise InputError("Learning is not done yet.")
        before = learning.loaded
        if learning.learned is None:
            # As the page was told to track.
            own = {"unknown": before.model.config.unknown, "memory_selection": before.model.memory_selection}
            device, dtype = before.model.device, before.model.dtype
            learning.learned = self.app.add(load_model(str(learning.output), device, dtype=dtype, **own))
        after = learning.learned
        known = session.domain in (None, AUTO, *before.domains)
        left = Side("before", before, session.domain if known else AUTO)
        sides = left, Side(f"after ({after.name})", after, learning.domain)
        comparison = Comparison(session, sides, person.folder, first_prompts_only=True)
        yield from self.result.run(person, comparison)
        words = "The model is as before. Left: before. Right: after."
        if learning.has_won:
            session.use(after, learning.domain, comparison.memory_selection)
            words = f"The model is now {after.name}. Left: before. Right: after."
        yield {self.result.progress: words, **self.track.view(person), self.track.slider: 0}
