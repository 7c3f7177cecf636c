"""A Hub on loopback: enough of its API for huggingface_hub to create, fill and read repositories of models and of data
sets."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, TOKEN, READ_TOKEN = "me", "hf_writes", "hf_reads"
LICENSES = {"apache-2.0", "mit"}


class Hub(ThreadingHTTPServer):
    """The Hub of one user, `me`, whose tokens are TOKEN (write) and READ_TOKEN. Everybody may read.

    Attributes:
        url: its address, for HF_ENDPOINT.
        commits: repository -> its commits, the oldest first: {path: bytes}.
        messages: repository -> the messages of its commits.
        private: repository -> as it was asked for.
        requests: (method, path) of all requests.
        faults: (part of a path, status) of requests that will fail, each once, in this order.
        gate: lists of files, with which an upload begins, wait until it is set.
        dies_at: part of the path of the request at which the server dies.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.messages: dict[str, list[str]] = {}
        self.private: dict[str, bool | None] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.dies_at: str | None = None
        self._closed = False

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        if not self._closed:
            self.die()

    def die(self) -> None:
        self._closed = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that has gone

    def make(self, name: str) -> None:
        self.commits[name], self.messages[name] = [{".gitattributes": b""}], ["initial commit"]


def commit_id(name: str, number: int) -> str:
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


def blob_id(data: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def _do(self):
        if self.server._closed:  # a connection from before
            self.close_connection = True
            return
        self.body = self._read_body()
        self.server.requests.append((self.command, self.path))
        if self.server.dies_at is not None and self.server.dies_at in self.path:
            self.server.die()
            self.close_connection = True
            return
        for fault in self.server.faults:
            if fault[0] in self.path:
                self.server.faults.remove(fault)
                self._answer(fault[1], {"error": "so it was told"})
                return
        path = self.path.split("?")[0]
        for method, pattern, answer in _ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                answer(self, *match.groups())
                return
        self._answer(404, {"error": f"no such route: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _do

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, content=None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self, name: str) -> bool:
        if self.token == TOKEN and name.startswith(f"{USER}/"):
            return True
        why = "You don't have the rights to write here"
        self._answer(403, {"error": why}, {"X-Error-Message": why})
        return False

    def _files(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        commits = self.server.commits.get(name, [])
        for number, files in reversed(list(enumerate(commits))):
            if revision in ("main", commit_id(name, number)):
                return commit_id(name, number), files
        self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return None

    # routes

    def whoami(self):
        if self.token not in (TOKEN, READ_TOKEN):
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        else:
            role = "write" if self.token == TOKEN else "read"
            self._answer(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self):
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not self._may_write(name):
            return
        address = {"url": f"{self.server.url}/{name}"}
        if name in self.server.commits:
            self._answer(409, {"error": "You already created this model repo", **address})
        else:
            self.server.make(name)
            self.server.private[name] = wanted.get("visibility", wanted.get("private"))
            self._answer(200, address)

    def may_write(self, name):
        if self._may_write(name):
            self._answer(200, {})

    def validate(self):
        wanted = re.search(r"^license: (.*)$", json.loads(self.body)["content"].split("\n---")[0], re.MULTILINE)
        if wanted and wanted[1] not in LICENSES:
            self._answer(400, {"errors": [{"message": '"license" must be one of the list'}], "warnings": []})
        else:
            self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, name, revision):
        found = self._files(name, revision) if self._may_write(name) else None
        if found is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".npy")) else "regular",
                    "shouldIgnore": False,
                    **({"oid": blob_id(found[1][file["path"]])} if file["path"] in found[1] else {}),
                }
                for file in json.loads(self.body)["files"]
            ]
            self._answer(200, {"files": files})

    def lfs_batch(self, name):
        if not self._may_write(name):
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/large/{wanted['oid']}"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.server.large else {"actions": upload})})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        self._answer(200, {})

    def commit(self, name, revision):
        found = self._files(name, revision) if self._may_write(name) else None
        if found is None:
            return
        files, message = dict(found[1]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(entry["key"])
        self.server.commits[name].append(files)
        self.server.messages[name].append(message)
        oid = commit_id(name, len(self.server.commits[name]) - 1)
        self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def info(self, name, revision="main"):
        found = self._files(name, revision)
        if found is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self._answer(200, {"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "tags": []})

    def tree(self, name, revision):
        self.server.gate.wait()
        found = self._files(name, revision)
        if found is not None:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
                for path, data in found[1].items()
            ]
            self._answer(200, entries)

    def resolve(self, name, revision, path):
        found = self._files(name, revision)
        if found is None:
            return
        commit, files = found
        if path not in files:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            headers = {"ETag": f'"{blob_id(files[path])}"', "X-Repo-Commit": commit}
            self._answer(200, files[path], headers)


_NAME = r"([\w.-]+/[\w.-]+)"
_API = rf"/api/(?:models|datasets)/{_NAME}"
_REPOSITORY = rf"/(?:datasets/)?{_NAME}"
_ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"{_API}/auth-check/write", _Handler.may_write),
    ("POST", rf"{_API}/preupload/(\w+)", _Handler.preupload),
    ("POST", rf"{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/large/(\w+)", _Handler.lfs_put),
    ("POST", rf"{_API}/commit/(\w+)", _Handler.commit),
    ("GET", rf"{_API}(?:/revision/(\w+))?", lambda self, name, rev: self.info(name, rev or "main")),
    ("GET", rf"{_API}/tree/(\w+)", _Handler.tree),
    (("GET", "HEAD"), rf"{_REPOSITORY}/resolve/(\w+)/(.+)", _Handler.resolve),
)
