"""What the server takes from strangers: requests of a bounded size, and no lasting memory of pages that are nobody's.

Gradio reads an event as a whole before a handler sees it, and remembers every page id that it is told.
"""

import shutil
from pathlib import Path
from typing import Any

from gradio.route_utils import GradioMultiPartParser
from gradio.state_holder import StateHolder
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .people import People

# Of an event. The longest ones name uploaded files, some 400 bytes for each.
EVENT_BYTES = 2**20
STRANGERS = 64  # pages of nobody that are remembered for a moment, such as those that are being loaded


class BoundedRequests:
    """Middleware that reads no more of a request than an event or an upload may have, or the disk of `folder` has."""

    def __init__(self, app: ASGIApp, upload_bytes: int, folder: Path):
        self.app, self.upload_bytes, self.folder = app, upload_bytes, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it with status 413 or 507."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, is_upload = Headers(scope=scope), scope["path"].rstrip("/").endswith("/upload")
        most = EVENT_BYTES + (self.upload_bytes if is_upload else 0)
        too_large = f"This request exceeds the maximum allowed size of {most} bytes."
        declared = int(headers.get("content-length") or 0)  # anything but a number does not come this far
        if declared > most:
            return await JSONResponse({"detail": too_large}, 413)(scope, receive, send)
        # What is uploaded is copied to the person's files.
        if is_upload and shutil.disk_usage(self.folder).free < 2 * (declared or most):
            answer = JSONResponse({"detail": "The server's disk has no room for this upload."}, 507)
            return await answer(scope, receive, send)
        received, is_complete = 0, False

        async def bounded() -> Message:
            nonlocal received, is_complete
            message = await receive()
            is_broken_off = message["type"] == "http.disconnect" and not is_complete
            received, is_complete = received + len(message.get("body", b"")), not message.get("more_body", False)
            if is_upload and (received > most or is_broken_off):
                raise MultiPartException(too_large)  # Gradio removes what it has written
            if received > most:
                raise HTTPException(413, too_large)
            return message

        await self.app(scope, bounded, send)


class FilesAlone(GradioMultiPartParser):
    """Gradio's reader of uploads, which refuses all that is no file: that would be kept in RAM, however much it is."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"max_fields": 0})


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
