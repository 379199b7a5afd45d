"""A Hub on the loopback interface: what `huggingface_hub` asks of one to push, list and pull, over real HTTP.

Everything is kept in memory. Faults can be switched on while it runs: connections cut in the middle of an upload or a
download, and refusals.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_test"
USER = "tester"
# Smaller than the Hub's, so that files of a few megabytes are uploaded in parts.
PART_SIZE = 2_000_000
LFS_FROM = 50_000


@dataclass
class Repository:
    """Commits, oldest first, each as path -> content; and branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        text = f"{len(self.commits)} {sorted(files)} {branch}".encode()
        digest = hashlib.sha1(text).hexdigest()
        self.commits[digest] = dict(files)
        self.branches[branch] = digest
        return digest

    def resolve(self, revision: str) -> str | None:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class HubServer(ThreadingHTTPServer):
    """The server; use it as a context, which starts and stops it.

    Attributes:
        repositories: id -> [`Repository`].
        cut_uploads, cut_downloads: after how many bytes of a file the connection is closed; None for never.
        requests: (method, path) of all requests.
        bytes_sent: of files, by path in their repository.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bytes_sent: dict[str, int] = {}
        self.cut_uploads: int | None = None
        self.cut_downloads: int | None = None
        self.lock = threading.RLock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Connections that clients close are no news."""


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def _handle(self):
        split = urlsplit(self.path)
        self.query, self.is_body_read = parse_qs(split.query), False
        path = unquote(split.path)
        self.server.requests.append((self.command, path))
        try:
            for method, pattern, action in _ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    # Bodies of files are read by their action, piece by piece.
                    with self.server.lock:
                        return action(self, **match.groupdict())
            raise _Refused(404, "NotImplemented", f"the test server has no {self.command} {path}")
        except _Refused as refused:
            if not self.is_body_read:
                self._read_body()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, kind="application/json"):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content, status: int = 200):
        self._send(status, json.dumps(content).encode())

    def _read_body(self, cut: int | None = None) -> bytes:
        """The request's body; with `cut`, so many bytes of it, and then the connection is closed."""
        self.is_body_read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        length = int(self.headers.get("Content-Length", 0))
        if cut is not None and cut < length:
            self.rfile.read(cut)
            self._hang_up()
        return self.rfile.read(length)

    def _hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)
        raise ConnectionAbortedError

    def _json_body(self):
        return json.loads(self._read_body())

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
        commit = repository.resolve(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    # Accounts and repositories

    def whoami(self):
        self._check_user()
        self._send_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self):
        body = self._json_body()
        self._check_user()
        repo_id = f"{body.get('organization') or USER}/{body['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repositories:
            return self._send_json({"url": url, "error": "You already created this model repo"}, 409)
        self.server.repositories[repo_id] = repository = Repository()
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._send_json({"url": url, "name": repo_id, "id": repo_id})

    def create_branch(self, repo_id: str, branch: str):
        self._read_body()
        self._check_user()
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise _Refused(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._send_json({})

    def repository_info(self, repo_id: str, revision: str | None = None):
        commit, files = self._commit(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self._send_json(
            {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
        )

    def tree(self, repo_id: str, revision: str, folder: str | None = None):
        _, files = self._commit(repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        entries = []
        is_recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        for path, content in inside.items():
            if not is_recursive and "/" in path.removeprefix(prefix):
                directory = prefix + path.removeprefix(prefix).split("/")[0]
                if all(entry["path"] != directory for entry in entries):
                    entries.append({"type": "directory", "path": directory, "oid": _git_oid(directory.encode())})
            else:
                entries.append(_entry(path, content))
        self._send_json(entries)

    def paths_info(self, repo_id: str, revision: str):
        body = self._read_body().decode()
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body)["paths"]
        _, files = self._commit(repo_id, revision)
        self._send_json([_entry(path, files[path]) for path in paths if path in files])

    # Uploads

    def preupload(self, repo_id: str, revision: str):
        body = self._json_body()
        self._check_user()
        _, files = self._commit(repo_id, revision)
        answers = []
        for file in body["files"]:
            mode = "lfs" if file["size"] >= LFS_FROM or file["path"].endswith(".safetensors") else "regular"
            known = files.get(file["path"])
            oid = None if known is None else (_sha256(known) if mode == "lfs" else _git_oid(known))
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answers})

    def lfs_batch(self, repo_id: str):
        body = self._json_body()
        self._check_user()
        self._repository(repo_id)
        answers = []
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.server.objects:
                upload = {"href": f"{self.server.url}/objects/{oid}", "header": {}}
                if size > PART_SIZE and "multipart" in body["transfers"]:
                    count = -(-size // PART_SIZE)
                    urls = {f"{i:05d}": f"{self.server.url}/objects/{oid}/{i}" for i in range(1, count + 1)}
                    upload["href"] += "/complete"
                    upload["header"] = {"chunk_size": str(PART_SIZE), **urls}
                verify = {"href": f"{self.server.url}/objects/{oid}/verify", "header": {}}
                answer |= {"actions": {"upload": upload, "verify": verify}}
            answers.append(answer)
        self._send_json({"transfer": "basic", "objects": answers})

    def upload(self, oid: str):
        content = self._read_body(self.server.cut_uploads)
        if _sha256(content) != oid:
            raise _Refused(400, "", "content does not have the announced SHA-256")
        self.server.objects[oid] = content
        self._send(200)

    def upload_part(self, oid: str, part: str):
        content = self._read_body(self.server.cut_uploads)
        self.server.parts[oid, int(part)] = content
        self._send(200, headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def complete_upload(self, oid: str):
        parts = [self.server.parts[oid, part["partNumber"]] for part in self._json_body()["parts"]]
        if _sha256(b"".join(parts)) != oid:
            raise _Refused(400, "", "content does not have the announced SHA-256")
        self.server.objects[oid] = b"".join(parts)
        self._send_json({"success": True})

    def verify_upload(self, oid: str):
        body = self._json_body()
        self._check_user()
        if len(self.server.objects.get(oid, b"")) != body["size"]:
            raise _Refused(404, "", "no such object")
        self._send_json({})

    def commit(self, repo_id: str, revision: str):
        lines = [json.loads(line) for line in self._read_body().splitlines() if line.strip()]
        self._check_user()
        _, files = self._commit(repo_id, revision)
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise _Refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] != "header":
                raise _Refused(400, "", f"the test server knows no {line['key']}")
        commit = self.server.repositories[repo_id].commit(files, revision)
        url = f"{self.server.url}/{repo_id}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    # Downloads

    def resolve(self, repo_id: str, revision: str, path: str):
        commit, files = self._commit(repo_id, revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._send(404, b"Entry not found", headers)
        content = files[path]
        is_lfs = path.endswith(".safetensors") or len(content) >= LFS_FROM
        headers["ETag"] = f'"{_sha256(content) if is_lfs else _git_oid(content)}"'
        if is_lfs:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            if start >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        cut = self.server.cut_downloads
        if self.command == "GET" and cut is not None and path.endswith(".safetensors") and cut < start + len(content):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: max(cut - start, 0)])
            self._hang_up()
        if self.command == "GET":
            self.server.bytes_sent[path] = self.server.bytes_sent.get(path, 0) + len(content)
        self._send(status, content, headers, kind="application/octet-stream")

    # Cards

    def validate_card(self):
        body = self._json_body()
        errors = card_errors(body["content"]) if body["repoType"] == "model" else ["only models are known here"]
        self._send_json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)


def card_errors(text: str) -> list[str]:
    """What the Hub would say of a model card's metadata: types of the fields, and the parts of `model-index`."""
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    if match is None:
        return ["no metadata"]
    data = yaml.safe_load(match[1]) or {}
    errors = []

    def check(where: str, value, kinds):
        if not isinstance(value, kinds):
            errors.append(f"{where} is {type(value).__name__}")

    for name in ("license", "library_name", "pipeline_tag", "base_model_relation"):
        if name in data:
            check(name, data[name], str)
    for name in ("tags", "datasets"):
        if name in data:
            check(name, data[name], list)
            errors += [f"{name} holds {item!r}" for item in data[name] if not isinstance(item, str)]
    if "base_model" in data and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data["base_model"])):
        errors.append(f"base_model {data['base_model']!r} is no Hub id")
    if data.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append(f"base_model_relation is {data['base_model_relation']!r}")
    for model in data.get("model-index", []):
        check("model-index name", model.get("name"), str)
        for result in model.get("results") or [{}]:
            check("task type", result.get("task", {}).get("type"), str)
            check("dataset type", result.get("dataset", {}).get("type"), str)
            check("dataset name", result.get("dataset", {}).get("name"), str)
            for metric in result.get("metrics") or [{}]:
                check("metric type", metric.get("type"), str)
                check("metric value", metric.get("value"), (int, float, str))
    return errors


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if path.endswith(".safetensors") or len(content) >= LFS_FROM:
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


_ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repository),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("POST", rf"/api/models/{_ID}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/api/models/{_ID}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("GET", rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_ID}/revision/(?P<revision>.+)", _Handler.repository_info),
    ("GET", rf"/api/models/{_ID}", _Handler.repository_info),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", _Handler.upload_part),
    ("POST", r"/objects/(?P<oid>[0-9a-f]{64})/complete", _Handler.complete_upload),
    ("POST", r"/objects/(?P<oid>[0-9a-f]{64})/verify", _Handler.verify_upload),
    ("GET", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
