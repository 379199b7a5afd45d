"""What the server takes from strangers: requests of a bounded size, and no lasting memory of pages that are nobody's.

Gradio reads an event as a whole before a handler sees it, and remembers every page id that it is told.
"""

import shutil
from pathlib import Path

from gradio.state_holder import StateHolder
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .people import People

# Of an event. The longest ones name uploaded files, some 400 bytes for each.
EVENT_BYTES = 2**20
STRANGERS = 64  # pages of nobody that are remembered for a moment, such as those that are being loaded


class BoundedRequests:
    """Middleware that reads no more of a request than an event or an upload may have.

    Args:
        upload_bytes: of all files of one upload.
        folder: where uploads go. One that its disk has no room for is refused.
    """

    def __init__(self, app: ASGIApp, upload_bytes: int, folder: Path):
        self.app, self.upload_bytes, self.folder = app, upload_bytes, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it with status 413 or 507."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        most = EVENT_BYTES + (self.upload_bytes if is_upload else 0)
        told = dict(scope["headers"]).get(b"content-length", b"")
        declared, received, is_complete = int(told) if told.isdigit() else 0, 0, False
        problem, refused = f"This request exceeds the maximum allowed size of {most} bytes.", 0
        if declared > most:
            refused = 413
        elif is_upload and shutil.disk_usage(self.folder).free < 2 * declared:  # it is copied to the person's files
            refused, problem = 507, "The server's disk has no room for this upload."
        if refused:
            return await JSONResponse({"detail": problem}, refused)(scope, receive, send)

        async def bounded() -> Message:
            nonlocal received, is_complete
            message = await receive()
            received += len(message.get("body", b""))
            is_broken_off = message["type"] == "http.disconnect" and not is_complete
            is_complete = is_complete or not message.get("more_body", False)
            if is_upload and (received > most or is_broken_off):
                raise MultiPartException(problem)  # Gradio removes what it has written
            if received > most:
                raise HTTPException(413, problem)
            return message

        await self.app(scope, bounded, send)


class KnownPages(StateHolder):
    """Gradio's memory of pages. Those of people are kept for as long as the people are, however many others come."""

    def __init__(self, people: People):
        super().__init__()
        self.people = people

    def update(self, session_id: str) -> None:
        """A page was used; pages of nobody go, apart from the last ones."""
        known = {person.page for person in self.people}
        with self.lock:
            if session_id in self.session_data:
                self.session_data.move_to_end(session_id)
            for page in [page for page in self.session_data if page not in known][:-STRANGERS]:
                del self.session_data[page]
                self.time_last_used.pop(page, None)
