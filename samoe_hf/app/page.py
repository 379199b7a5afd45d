"""The page of `samoe app`, put together: who comes, who leaves, and its parts."""

from typing import Any

import gradio as gr

from .learn_page import LearnPart
from .look_page import LookPart
from .page_parts import PRIVATE, App, Part, guarded
from .track_page import TrackPart

TITLE = "samoe: track, correct, learn"
# The page keeps its secret for as long as its tab is open, so that a refresh finds everything again. Where the browser
# allows no storage, a refresh begins anew.
RECALL = "() => { try { return [sessionStorage.getItem('samoe') || ''] } catch { return [''] } }"
KEEP = "(secret) => { try { sessionStorage.setItem('samoe', secret) } catch { } }"
CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: auto; padding: 0 12px !important; }
.gradio-container main { width: 100%; padding: 8px 0 !important; }
.gradio-container .app, .gradio-container main { padding-left: 4px !important; padding-right: 4px !important; }
#click-row { align-items: center; }
#example-row { align-items: center; padding: 0 12px 12px 0; background: var(--block-background-fill); }
#take-example { min-height: 44px; }
#frame img { cursor: crosshair; width: 100%; object-fit: contain; max-height: 62vh; }
#hint { padding: 10px 14px; border-left: 4px solid var(--primary-500); background: var(--background-fill-secondary);
        border-radius: 4px; }
#title { margin: 0; }
#title p { margin: 0; }
#progress { min-height: 1.5em; }
footer { display: none !important; }
"""


class EntryPart(Part):
    """A page is loaded, refreshed or closed."""

    def __init__(self, app: App, secret: gr.State, parts: "Parts"):
        super().__init__(app, secret)
        self.parts = parts

    @guarded
    def enter(self, kept: object, request: gr.Request) -> dict[Any, Any]:
        """Gives the page its secret, and shows what it had before a refresh."""
        person = self.app.people.enter(kept, request.session_hash or "")
        updates = {self.secret: person.secret, self.parts.kept: person.secret}
        return updates | self.parts.track.view(person, new=True)

    def leave(self, request: gr.Request) -> None:
        """The page is gone."""
        self.app.people.leave(request.session_hash or "")


class Parts:
    """All parts of a page, laid out and connected; made within `gr.Blocks`."""

    def __init__(self, app: App, blocks: gr.Blocks):
        secret = gr.State("")
        self.kept = gr.Textbox(visible=False)
        names = ", ".join(app.models.names)
        gr.Markdown(
            f"**samoe** — track objects in videos, correct them, learn from it. Model: {names}", elem_id="title"
        )
        self.track, self.look, self.learn = TrackPart(app, secret), LookPart(app, secret), LearnPart(app, secret)
        with gr.Tabs():
            with gr.Tab("Track"):
                self.track.build()
            with gr.Tab("Look inside", elem_id="look-tab") as look:
                self.look.build(self.track)
            with gr.Tab("Learn", elem_id="learn-tab") as learn:
                self.learn.build(self.track, self.look)
        for part in (self.track, self.look, self.learn):
            part.wire()
        look.select(
            self.look.refresh,
            [secret, self.look.first, self.look.second],
            self.look.shown(),
            show_progress="hidden",
            **PRIVATE,
        )
        learn.select(self.learn.refresh, [secret], self.learn.shown(), show_progress="hidden", **PRIVATE)
        entry = EntryPart(app, secret, self)
        outputs = {secret, self.kept, *self.track.shown()}
        loaded = blocks.load(entry.enter, [self.kept], outputs, js=RECALL, show_progress="hidden", **PRIVATE)
        loaded.then(None, [self.kept], None, js=KEEP)
        blocks.unload(entry.leave)


def build_page(app: App) -> gr.Blocks:
    """The page of an app, ready to be launched, see [`launch_options`]."""
    # Uploads and files for download, which Gradio keeps, are removed after a while.
    age = max(60, int(app.limits.idle_seconds))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, age)) as blocks:
        Parts(app, blocks)
    blocks.queue(max_size=app.limits.waiting, default_concurrency_limit=4, api_open=False)
    return blocks


def launch_options(app: App) -> dict[str, Any]:
    """Options of `launch` that keep an app's pages apart from its server's files and from each other."""
    return {
        "allowed_paths": [],
        "max_file_size": app.limits.upload_bytes,
        "show_error": False,
        "enable_monitoring": False,
        "footer_links": [],
        "ssr_mode": False,
        "mcp_server": False,
        "state_session_capacity": 4 * app.limits.sessions,
        "css": CSS,
        "theme": gr.themes.Default(primary_hue="orange", neutral_hue="slate"),
    }
