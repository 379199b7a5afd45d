"""The page of `samoe app`, put together: who comes, who leaves, and its parts."""

import gradio as gr

from .domains_page import DomainsPart
from .learn_page import LearnPart
from .look_page import LookPart
from .page_parts import App, Part, Shown, messages
from .track_page import TrackPart

TITLE = "samoe: track, correct, learn"
SMALL = (
    "This small model knows drawn videos, such as the examples other than *Stripes*. For videos of your own, "
    "start the page with a real one: `samoe app facebook/sam2.1-hiera-tiny`"
)
# The page keeps its secret for as long as its tab is open, so that a refresh finds everything again, and the secret of
# who began to learn for longer, so that learning can be stopped after the browser was closed. It sends both, with a
# space between. Where the browser allows no storage, a refresh begins anew.
RECALL = """() => { try { return [[sessionStorage, localStorage].map((kept) => kept.getItem('samoe') || '').join(' ')] }
    catch { return [''] } }"""
KEEP = "(secret) => { try { sessionStorage.setItem('samoe', secret) } catch { } }"
KEEP_LONG = "(secret) => { try { localStorage.setItem('samoe', secret) } catch { } }"
CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: auto; padding: 0 12px !important; }
.gradio-container main { width: 100%; padding: 8px 0 !important; }
.gradio-container .app, .gradio-container main { padding-left: 4px !important; padding-right: 4px !important; }
.middle { align-items: center; }
#domains-map :has(> img) { justify-content: start; overflow-x: auto; }
#domains-map img { min-width: 720px; }
#example-row { align-items: center; padding: 0 12px 12px 0; background: var(--block-background-fill); }
#take-example { min-height: 44px; }
#frame img { cursor: crosshair; width: 100%; object-fit: contain; max-height: 62vh; }
#hint { padding: 10px 14px; border-left: 4px solid var(--primary-500); background: var(--background-fill-secondary);
        border-radius: 4px; }
#title { margin: 0; }
#title p { margin: 0; }
#progress { min-height: 1.5em; }
#timeline img { cursor: pointer; width: 100%; }
#looks .wrap, #objects .wrap { flex-direction: column; }
@media (max-width: 500px) {
    #track { order: -1; flex-basis: 100%; }
    #back, #onward, #stop { flex: 1 1 90px; padding: 8px 4px; }
}
footer { display: none !important; }
"""


class Page(Part):
    """All parts of the page, and who comes and leaves; made within `gr.Blocks`."""

    def __init__(self, app: App, blocks: gr.Blocks):
        super().__init__(app, gr.State(("", "")))
        self.kept = gr.Textbox(visible=False)
        names = ", ".join(app.models)
        gr.Markdown(
            f"**samoe** — track objects in videos, correct them, learn from it. Model: {names}", elem_id="title"
        )
        if app.first.is_small:
            gr.Markdown(SMALL, elem_id="small")
        with gr.Tabs():
            with gr.Tab("Track"):
                self.track = TrackPart(app, self.key)
            with gr.Tab("Look inside", elem_id="look-tab") as look_tab:
                look = LookPart(app, self.key, self.track)
            with gr.Tab("Learn", elem_id="learn-tab") as learn_tab:
                learn = LearnPart(app, self.key, self.track)
            with gr.Tab("Domains", elem_id="domains-tab") as domains_tab:
                domains = DomainsPart(app, self.key)
        self.on(look_tab.select, look.refresh, [look.first, look.second], look.shown, show_progress="hidden")
        self.on(learn_tab.select, learn.refresh, [], learn.shown, show_progress="hidden")
        self.on(domains_tab.select, domains.view, [domains.model], domains.shown, show_progress="hidden")
        loaded = blocks.load(
            self.enter,
            [self.kept],
            [self.key, self.kept, *self.track.shown],
            js=RECALL,
            show_progress="hidden",
            api_visibility="private",
        )
        loaded.then(None, [self.kept], None, js=KEEP)
        learn.start.click(None, [self.kept], None, js=KEEP_LONG)
        blocks.unload(self.leave)

    def enter(self, kept: object, request: gr.Request) -> Shown:
        """Gives a page that was loaded its secret, which the browser keeps, and shows what it had before a refresh."""
        people, page = self.app.people, request.session_hash or ""
        secret, _, learner = kept.partition(" ") if isinstance(kept, str) else ("", "", "")
        with messages(self.app):
            person = people.enter(secret or (learner if people.is_away(learner) else ""), page)
            return {self.key: (person.secret, page), self.kept: person.secret, **self.track.opened(person)}

    def leave(self, request: gr.Request) -> None:
        """The page is closed, or is being refreshed."""
        self.app.people.leave(request.session_hash or "")


def build_page(app: App) -> gr.Blocks:
    """The page of an app, ready to be launched."""
    # Uploads and files for download, which Gradio keeps, are removed after a while.
    age = max(60, int(app.limits.idle_seconds))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, age)) as blocks:
        Page(app, blocks)
    return blocks.queue(max_size=app.limits.waiting, default_concurrency_limit=4, api_open=False)
