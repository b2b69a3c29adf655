"""A stand-in for the Hub on the loopback interface: as much of its HTTP interface as pushing and loading use.

Repositories live in memory. ``faults`` make requests fail on purpose: each has a method, a pattern for the path, and a
status to answer with, ``cut`` to close the connection in the middle, or ``lost`` to do what is asked and close the
connection instead of answering; it is used up ``times`` times.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from processes import mmkd

TOKEN = "hf_writer_token"
PART_BYTES = 200_000  # larger files are uploaded in parts of this size


def hub_environment(hub, home, token=TOKEN):
    """What leads the Hub's client to the stand-in, and away from this machine's token and cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | own | ({"HF_TOKEN": token} if token else {})


def mmkd_at(hub, home, *arguments, token=TOKEN):
    """``mmkd ARGUMENTS``, with the stand-in as the Hub."""
    return mmkd(*arguments, env=hub_environment(hub, home, token), timeout=120)


@dataclass
class Fault:
    method: str
    pattern: str
    status: int | str
    times: int = 1
    headers: dict = field(default_factory=dict)


@dataclass
class Repository:
    private: bool
    gated: bool = False
    files: dict = field(default_factory=dict)  # path -> (bytes, whether by LFS)
    commits: list = field(default_factory=lambda: ["0" * 40])


class LoopbackHub:
    """Start it with ``with LoopbackHub() as hub``; ``hub.url`` is the endpoint."""

    def __init__(self):
        self.tokens = {TOKEN: ("user", True), "hf_reader_token": ("user", False)}
        self.repositories, self.objects, self.parts = {}, {}, {}
        self.faults, self.requests, self.lock = [], [], threading.Lock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"  # another host, as the Hub's storage is
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def repository(self, repo, kind="model"):
        return self.repositories[kind, repo]

    def fail(self, method, pattern, status, times=1, **headers):
        self.faults.append(Fault(method, pattern, status, times, headers))

    def count(self, method, pattern):
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


def oid(data, is_lfs):
    """The name of a file's content: SHA-256, or as git names blobs."""
    return hashlib.sha256(data).hexdigest() if is_lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve("GET")

    def do_HEAD(self):
        self._serve("HEAD")

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def _serve(self, method):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, path))
        fault = self.hub.fault(method, path)
        if fault is not None and fault.status == "cut" and method in ("POST", "PUT"):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self._cut()
        body = self._body()
        self.lose_answer = fault is not None and fault.status == "lost"
        if fault is not None and fault.status not in ("cut", "lost"):
            return self._json(fault.status, {"error": f"planned {fault.status}"}, fault.headers)
        self.cut_answer = fault is not None and fault.status == "cut"
        for route, action in ROUTES:
            match = re.fullmatch(route, path)
            if match and action in ACTIONS.get(method, ()):
                return getattr(self, action)(body, **match.groupdict())
        return self._json(404, {"error": f"no route {method} {path}"})

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _cut(self):
        self.close_connection = True
        self.connection.shutdown(2)

    def _send(self, status, data, headers=None):
        if getattr(self, "lose_answer", False):
            self._cut()
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if getattr(self, "cut_answer", False) else data)
        if getattr(self, "cut_answer", False):
            self.wfile.flush()
            self._cut()

    def _json(self, status, value, headers=None):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.tokens.get(token)

    def _repository(self, kind, repo, write=False):
        """The repository, or None after an answer that says why not, as the Hub words it."""
        found, user = self.hub.repositories.get((kind, repo)), self._user()
        hidden = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        if self.headers.get("Authorization") and user is None:
            return self._json(401, {"error": "Invalid credentials in Authorization header"})
        if found is None or (found.private and user is None):
            return self._json(401 if user is None else 404, {"error": "Repository not found"}, hidden)
        if write and not (user and user[1]):
            return self._json(403, {"error": "You don't have the rights to write here"})
        return found

    # ---- the interface ----

    def whoami(self, body):
        user = self._user()
        if user is None:
            return self._json(401, {"error": "Invalid credentials in Authorization header"})
        return self._json(200, {"name": user[0], "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body):
        asked, user = json.loads(body), self._user()
        kind, owner = asked.get("type") or "model", asked["organization"] or (user and user[0])
        repo = f"{owner}/{asked['name']}"
        if user is None or not user[1] or owner != user[0]:
            return self._json(401 if user is None else 403, {"error": f"You don't have the rights under {owner}"})
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        if (kind, repo) in self.hub.repositories:
            return self._json(409, {"error": "You already created this repo", "url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[kind, repo] = Repository(private)
        return self._json(200, {"url": url, "name": repo, "id": repo})

    def validate(self, body):
        return self._json(200, {"errors": [], "warnings": []})

    def preupload(self, body, kind, repo, revision):
        found = self._repository(kind, repo, write=True)
        if found is None:
            return None
        answers = []
        for file in json.loads(body)["files"]:
            is_lfs = file["path"].endswith((".safetensors", ".bin", ".png")) or file["size"] > 10**7
            known = found.files.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": oid(*known) if known else None,
                }
            )
        return self._json(200, {"files": answers})

    def lfs_batch(self, body, repo, prefix=""):
        if self._repository("dataset" if prefix else "model", repo, write=True) is None:
            return None
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.hub.objects:
                name = entry["oid"]
                upload = {"href": f"{self.hub.url}/lfs/put/{name}"}
                if entry["size"] > PART_BYTES:
                    count = -(-entry["size"] // PART_BYTES)
                    parts = {str(k + 1): f"{self.hub.url}/lfs/part/{name}/{k + 1}" for k in range(count)}
                    upload = {"href": f"{self.hub.url}/lfs/complete/{name}"}
                    upload["header"] = {"chunk_size": str(PART_BYTES), **parts}
                entry |= {"actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}}
            objects.append(entry)
        return self._json(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body, name):
        if hashlib.sha256(body).hexdigest() != name:
            return self._json(400, {"error": "content does not fit its name"})
        self.hub.objects[name] = body
        return self._send(200, b"")

    def lfs_part(self, body, name, number):
        self.hub.parts[name, int(number)] = body
        return self._send(200, b"", {"ETag": f'"part-{number}"'})

    def lfs_complete(self, body, name):
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        return self.lfs_put(b"".join(self.hub.parts[name, number] for number in numbers), name)

    def lfs_verify(self, body):
        asked = json.loads(body)
        whole = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        return self._json(200 if whole else 404, {})

    def commit(self, body, kind, repo, revision):
        found = self._repository(kind, repo, write=True)
        if found is None:
            return None
        files = dict(found.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._json(400, {"error": f"no such object {value['oid']}"})
                files[value["path"]] = (self.hub.objects[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        found.files = files
        found.commits.append(hashlib.sha1(body + found.commits[-1].encode()).hexdigest())
        sha = found.commits[-1]
        return self._json(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def info(self, body, kind, repo, revision=None):
        found = self._repository(kind, repo)
        if found is None:
            return None
        siblings = [{"rfilename": path} for path in sorted(found.files)]
        facts = {"id": repo, "sha": found.commits[-1], "private": found.private, "siblings": siblings, "tags": []}
        return self._json(200, facts | {"downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def commits(self, body, kind, repo, revision):
        found = self._repository(kind, repo)
        if found is None:
            return None
        facts = {"title": "", "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
        return self._json(200, [{"id": sha, **facts} for sha in reversed(found.commits)])

    def auth_check(self, body, kind, repo):
        found = self._repository(kind, repo)
        if found is not None:
            gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {repo} is restricted"}
            self._json(403 if found.gated else 200, {}, gated if found.gated else None)

    def tree(self, body, kind, repo, revision):
        found = self._repository(kind, repo)
        return None if found is None else self._json(200, [_entry(path, *f) for path, f in sorted(found.files.items())])

    def paths_info(self, body, kind, repo, revision):
        found = self._repository(kind, repo)
        if found is None:
            return None
        wanted = json.loads(body)["paths"]
        return self._json(200, [_entry(path, *found.files[path]) for path in wanted if path in found.files])

    def resolve(self, body, repo, revision, path, prefix=""):
        found = self._repository("dataset" if prefix else "model", repo)
        if found is None:
            return None
        commit = {"X-Repo-Commit": found.commits[-1]}
        if path not in found.files:
            return self._json(404, {"error": "Entry not found"}, commit | {"X-Error-Code": "EntryNotFound"})
        data, is_lfs = found.files[path]
        name = oid(data, is_lfs)
        if is_lfs:
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{name}"'}
            self.hub.objects[name] = data
            return self._send(302, b"", commit | linked | {"Location": f"{self.hub.storage}/cdn/{name}"})
        return self._file(data, commit | {"ETag": f'"{name}"'})

    def cdn(self, body, name):
        return self._file(self.hub.objects[name], {"ETag": f'"{name}"'})

    def _file(self, data, headers):
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and int(start[1]):
            whole, data = len(data), data[int(start[1]) :]
            headers |= {"Content-Range": f"bytes {start[1]}-{whole - 1}/{whole}"}
            return self._send(206, data, headers)
        return self._send(200, data, headers | {"Content-Length": str(len(data))})


def _entry(path, data, is_lfs):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid(data, True)}\nsize {len(data)}\n".encode()
    entry = {"type": "file", "path": path, "size": len(data), "oid": oid(pointer if is_lfs else data, False)}
    return entry | ({"lfs": {"oid": oid(data, True), "size": len(data), "pointerSize": len(pointer)}} if is_lfs else {})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset)s/{_REPO}"
ROUTES = [
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
    (rf"{_API}/commits/(?P<revision>[^/]+)", "commits"),
    (rf"{_API}/tree/(?P<revision>[^/]+)(?:/.*)?", "tree"),
    (rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (rf"{_API}/revision/(?P<revision>[^/]+)", "info"),
    (rf"{_API}/auth-check", "auth_check"),
    (_API, "info"),
    (rf"/(?P<prefix>datasets/)?{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/lfs/put/(?P<name>\w+)", "lfs_put"),
    (r"/lfs/part/(?P<name>\w+)/(?P<number>\d+)", "lfs_part"),
    (r"/lfs/complete/(?P<name>\w+)", "lfs_complete"),
    (r"/lfs/verify", "lfs_verify"),
    (r"/cdn/(?P<name>\w+)", "cdn"),
    (rf"/(?P<prefix>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
ACTIONS = {
    "GET": {"whoami", "auth_check", "tree", "info", "commits", "cdn", "resolve"},
    "HEAD": {"cdn", "resolve"},
    "POST": {"create", "validate", "preupload", "commit", "paths_info", "lfs_batch", "lfs_complete", "lfs_verify"},
    "PUT": {"lfs_put", "lfs_part"},
}
