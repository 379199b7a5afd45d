"""What the server takes from strangers: requests of a bounded size, and no lasting memory of pages that are nobody's.

Gradio reads an event as a whole before a handler sees it, and remembers every page id that it is told.
"""

import shutil
from pathlib import Path

from gradio.state_holder import StateHolder
from python_multipart.multipart import MultipartParser, parse_options_header
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
        fields, received, is_complete = _Fields(headers.get("content-type", "")), 0, False

        async def bounded() -> Message:
            nonlocal received, is_complete
            message = await receive()
            body, is_broken_off = message.get("body", b""), message["type"] == "http.disconnect" and not is_complete
            received, is_complete = received + len(body), not message.get("more_body", False)
            if is_upload:
                fields.write(body)
                if received > most or fields.received > EVENT_BYTES or is_broken_off:
                    raise MultiPartException(too_large)  # Gradio removes what it has written
            elif received > most:
                raise HTTPException(413, too_large)
            return message

        await self.app(scope, bounded, send)


class _Fields:
    """Counts the bytes of an upload that are of no file: Gradio keeps them in RAM, however many."""

    def __init__(self, content_type: str):
        self.received, self._is_file, self._name, self._value = 0, False, b"", b""
        boundary = parse_options_header(content_type)[1].get(b"boundary") or b"-"
        self.write = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._read_name,
                "on_header_value": self._read_value,
                "on_header_end": self._end_header,
                "on_part_data": self._count,
            },
        ).write

    def _begin(self) -> None:
        self._is_file = False

    def _read_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _read_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._is_file = b"filename" in parse_options_header(self._value)[1]
        self._name = self._value = b""

    def _count(self, data: bytes, start: int, end: int) -> None:
        self.received += 0 if self._is_file else end - start


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
