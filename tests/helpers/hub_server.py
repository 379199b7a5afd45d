"""A Hub on the loopback interface: what `huggingface_hub` asks of one to push, list and pull, over real HTTP.

Everything is kept in memory. Weights (`.safetensors`) are uploaded apart, as the Hub's large files; all else is in the
commit.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
from huggingface_hub import ModelCard

TOKEN = "hf_test"
USER = "tester"


@dataclass
class Repository:
    """Commits, oldest first, each as path -> content; and branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(f"{len(self.commits)} {sorted(files)} {branch}".encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.branches[branch] = digest
        return digest

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class HubServer(ThreadingHTTPServer):
    """The server; use it as a context, which starts and stops it.

    Attributes:
        repositories: id -> [`Repository`].
        bytes_sent: of files, by path in their repository.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.bytes_sent: dict[str, int] = {}
        self.lock = threading.RLock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Connections that clients close are no news."""


def use_hub(server: HubServer, monkeypatch, cache) -> None:
    """Makes the server the Hub of this process, whose constants are read at import, and `cache` its cache."""
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # its own, made at first use


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def _handle(self):
        path, self.body = unquote(urlsplit(self.path).path), self._read_body()
        try:
            for method, pattern, action in _ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    with self.server.lock:
                        return action(self, **match.groupdict())
            raise _Refused(404, "NotImplemented", f"the test server has no {self.command} {path}")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, kind="application/json"):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content, status: int = 200):
        self._send(status, json.dumps(content).encode())

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _is_user(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _check_user(self):
        if not self._is_user():
            raise _Refused(401, "", "Invalid username or password.")

    def _repository(self, repo_id: str) -> Repository:
        if repo_id not in self.server.repositories:
            # As the Hub, which does not tell strangers what exists.
            raise _Refused(404 if self._is_user() else 401, "RepoNotFound", "Repository not found")
        return self.server.repositories[repo_id]

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(repo_id)
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def whoami(self):
        self._check_user()
        self._send_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self):
        body = json.loads(self.body)
        self._check_user()
        repo_id = f"{body.get('organization') or USER}/{body['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repositories:
            return self._send_json({"url": url, "error": "You already created this model repo"}, 409)
        self.server.repositories[repo_id] = repository = Repository()
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._send_json({"url": url, "name": repo_id, "id": repo_id})

    def create_branch(self, repo_id: str, branch: str):
        self._check_user()
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise _Refused(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._send_json({})

    def repository_info(self, repo_id: str, revision: str | None = None):
        commit, files = self._commit(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        names = {"_id": "0", "id": repo_id, "modelId": repo_id}
        self._send_json({**names, "sha": commit, "siblings": siblings, "tags": []})

    def list_models(self):
        """Those whose cards have all tags that are asked for."""
        wanted = set(parse_qs(urlsplit(self.path).query).get("filter", []))
        cards = {
            name: ModelCard(one.files.get("README.md", b"").decode()) for name, one in self.server.repositories.items()
        }
        self._send_json(
            [{"_id": "0", "id": name} for name, card in cards.items() if wanted <= set(card.data.tags or [])]
        )

    def tree(self, repo_id: str, revision: str, folder: str | None = None):
        _, files = self._commit(repo_id, revision)
        inside = [path for path in files if path.startswith(f"{folder}/" if folder else "")]
        if not inside:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        self._send_json([_entry(path, files[path]) for path in inside])

    def paths_info(self, repo_id: str, revision: str):
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode())["paths"]
        _, files = self._commit(repo_id, revision)
        self._send_json([_entry(path, files[path]) for path in paths if path in files])

    def preupload(self, repo_id: str, revision: str):
        self._check_user()
        _, files = self._commit(repo_id, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        oids = {path: _entry(path, files[path])["oid"] if path in files else None for path in paths}
        answers = [
            {"path": path, "uploadMode": modes[path], "shouldIgnore": False, "oid": oids[path]} for path in paths
        ]
        self._send_json({"files": answers})

    def lfs_batch(self, repo_id: str):
        self._check_user()
        self._repository(repo_id)
        answers = json.loads(self.body)["objects"]
        for answer in answers:
            if answer["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.url}/objects/{answer['oid']}", "header": {}}
                answer["actions"] = {"upload": upload}
        self._send_json({"transfer": "basic", "objects": answers})

    def upload(self, oid: str):
        if _sha256(self.body) != oid:
            raise _Refused(400, "", "content does not have the announced SHA-256")
        self.server.objects[oid] = self.body
        self._send(200)

    def commit(self, repo_id: str, revision: str):
        self._check_user()
        files = dict(self._commit(repo_id, revision)[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.server.repositories[repo_id].commit(files, revision)
        url = f"{self.server.url}/{repo_id}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo_id: str, revision: str, path: str):
        commit, files = self._commit(repo_id, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._send(404, b"Entry not found", headers)
        content = files[path]
        if self.command == "GET":
            self.server.bytes_sent[path] = self.server.bytes_sent.get(path, 0) + len(content)
        self._send(200, content, headers | {"ETag": f'"{_sha256(content)}"'}, kind="application/octet-stream")

    def validate_card(self):
        self._send_json({"errors": [], "warnings": []})


def _entry(path: str, content: bytes) -> dict:
    if not path.endswith(".safetensors"):
        oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}
    lfs = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return {"type": "file", "path": path, "size": len(content), "oid": lfs["oid"], "lfs": lfs}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repository),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("POST", rf"/api/models/{_ID}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/api/models/{_ID}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("GET", r"/api/models", _Handler.list_models),
    ("GET", rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_ID}(/revision/(?P<revision>.+))?", _Handler.repository_info),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("GET", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
