"""A stand-in for the hub on this machine: the endpoints that a push meets, and what was pushed, in memory."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: int = 0


@dataclass
class Hub:
    """`role` is the token's, `fail` a path's part whose requests are refused."""

    role: str = "write"
    fail: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS: sha256 -> bytes
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.state.objects[hashlib.sha256(data).hexdigest()] = data
        self._send(200, {})

    def _answer(self, body: bytes) -> None:
        hub, path = self.state, self.path.partition("?")[0]
        hub.requests.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"})
        if hub.fail and hub.fail in path:
            return self._send(422, {"error": "broken"})
        if path == "/api/whoami-v2":
            auth = {"accessToken": {"role": hub.role}}
            return self._send(200, {"type": "user", "name": "me", "orgs": [{"name": "org"}], "auth": auth})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        name = "/".join(path.split("/")[3:5])
        if name not in hub.repositories:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if "/preupload/" in path:
            files = [self._mode(file) for file in json.loads(body)["files"]]
            return self._send(200, {"files": files})
        if "/commit/" in path:
            return self._commit(hub.repositories[name], body)
        if "/tree/" in path:
            files = hub.repositories[name].files
            return self._send(200, [_entry(file, data) for file, data in files.items()])
        return self._info(name)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.state.url}/{name}"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.state.repositories[name] = Repository(bool(private))
        return self._send(200, {"url": f"{self.state.url}/{name}"})

    def _info(self, name: str) -> None:
        repository = self.state.repositories[name]
        siblings = [{"rfilename": file} for file in repository.files]
        self._send(200, {"id": name, "sha": "0" * 40, "private": repository.private, "siblings": siblings, "tags": []})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.state.url}/objects/{wanted['oid']}"}}}
            for wanted in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, body: bytes) -> None:
        """All of its lines or none."""
        files = dict(repository.files)
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.files, repository.commits = files, repository.commits + 1
        url = f"{self.state.url}/me/mine/commit/{'1' * 40}"
        self._send(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url})

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
