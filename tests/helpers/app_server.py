"""Requests to a served app as they are written by hand, without a browser."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

API = "/gradio_api"


@dataclass
class Answer:
    """What an event ended with: whether it succeeded, its output, and all that was sent on the way."""

    success: bool
    output: Any
    text: str


class Visitor:
    """A page without a browser. `endpoints`: name of each handler -> its number."""

    def __init__(self, url: str):
        # The server has no certificate; to read the known authorities takes longer than a request.
        self.client = httpx.Client(base_url=url.rstrip("/"), timeout=60, trust_env=False, verify=False)
        self.session_hash = secrets.token_hex(6)
        self.config = self.client.get("/config").json()
        self.components = {one["id"]: one for one in self.config["components"]}
        self.endpoints = {one["id"]: one for one in self.config["dependencies"]}

    def inputs(self, endpoint: int) -> list[str]:
        """The types of an endpoint's inputs."""
        return [self.components[i]["type"] for i in self.endpoints[endpoint]["inputs"]]

    def targets(self, endpoint: int) -> list[tuple[str, str]]:
        """What starts an endpoint on the page: (element's id or label, event)."""
        found = []
        for component, event in self.endpoints[endpoint]["targets"]:
            props = self.components.get(component, {}).get("props", {})
            found.append((props.get("elem_id") or props.get("label") or props.get("value") or "", event))
        return found

    def endpoint(self, element: str, event: str) -> int:
        """The endpoint of an event of an element."""
        return next(one for one in self.endpoints if (element, event) in self.targets(one))

    def load(self, secret: Any = "") -> Answer:
        """Loads the page; its person is made."""
        (endpoint,) = [i for i, one in self.endpoints.items() if any(event == "load" for _, event in one["targets"])]
        return self.send(endpoint, [secret])

    def send(self, endpoint: int, data: Any, event_data: Any = None, session_hash: Any = None) -> Answer:
        """Sends an event and waits for its end."""
        session_hash = self.session_hash if session_hash is None else session_hash
        body = {"data": data, "fn_index": endpoint, "session_hash": session_hash, "event_data": event_data}
        joined = self.client.post(f"{API}/queue/join", content=json.dumps(body), headers=JSON)
        if joined.status_code != 200:
            return Answer(False, None, joined.text)
        text = ""
        with self.client.stream("GET", f"{API}/queue/data", params={"session_hash": session_hash}) as stream:
            for line in stream.iter_lines():
                text += line
                message = json.loads(line[6:]) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed" and message.get("event_id") == joined.json()["event_id"]:
                    return Answer(message["success"], message.get("output"), text)
                if message.get("msg") in ("unexpected_error", "close_stream"):
                    return Answer(False, None, text)
        return Answer(False, None, text)

    def act(self, element: str, event: str, *values: Any, event_data: Any = None) -> Answer:
        """Does what a page does, with the values of its inputs."""
        return self.send(self.endpoint(element, event), [None, *values], event_data)

    def person(self, app: Any) -> Any:
        """Who this page is on the server."""
        return next(person for person in app.people if person.page == self.session_hash)

    def open(self, path: Path) -> str:
        """Uploads a video, and clicks on its first frame; gives what the server calls the file."""
        (stored,) = self.upload(path.name, path.read_bytes())
        click = {"index": [100, 100], "value": None}
        assert self.act("upload", "upload", [file_data(stored)]).success
        assert self.act("frame", "select", 0, None, "+ is the object", event_data=click).success
        return stored

    def upload(self, name: str, content: bytes) -> list[str]:
        """Uploads a file; gives what the server calls it."""
        answer = self.client.post(f"{API}/upload", files={"files": (name, content)})
        answer.raise_for_status()
        return answer.json()


JSON = {"content-type": "application/json"}


def file_data(path: str, **others: Any) -> dict[str, Any]:
    """A file as a page names it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **others}
