"""Stands in for Hugging Face's hub: as much of its HTTP interface as sending and fetching a model asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_stand_in"


@dataclass
class Hub:
    """Holds what was sent. What starts with a path in `refused` is answered with its status."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any, dict[str, str]]:
        """Answer a request: status, what is sent (bytes or JSON), headers."""
        self.asked.append(f"{method} {path}")
        for start, status in self.refused.items():
            if path.startswith(start):
                return status, {"error": f"said {status}"}, {}
        if method == "PUT":
            self.stored[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if sent := re.fullmatch(r"/api/models/(\w+/[\w-]+)/(preupload|commit)/main", path):
            return self._take(sent[1], sent[2], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [{**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}} for one in wanted]
            return 200, {"transfer": "basic", "objects": actions}, {}
        named = re.match(r"(?:/api/models)?/(\w+/[\w-]+)", path)
        if named is None or named[1] not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if found := re.fullmatch(r"/api/models/(\w+/[\w-]+)(/revision/main)?", path):
            files = [{"rfilename": name} for name in self.repositories[found[1]]]
            facts = {"id": found[1], "private": self.private[found[1]], "sha": "0" * 40, "siblings": files}
            return 200, facts, {}
        if found := re.fullmatch(r"/api/models/(\w+/[\w-]+)/tree/\w+", path):
            entries = [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                       for path, content in self.repositories[found[1]].items()]  # fmt: skip
            return 200, entries, {}
        if found := re.fullmatch(r"/(\w+/[\w-]+)/resolve/\w+/(.+)", path):
            content = self.repositories[found[1]].get(found[2])
            if content is None:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        return 404, {"error": "Not Found"}, {}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        there = name in self.repositories
        if not there:
            self.repositories[name], self.private[name] = {}, wanted.get("visibility") == "private"
        return 409 if there else 200, {"url": f"{self.address}/{name}", "name": name}, {}

    def _take(self, name: str, what: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False, "oid": None} for one in files]  # fmt: skip
            return 200, {"files": modes}, {}
        files = self.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}, {}


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub on this machine while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *values: object) -> None:
            """Print nothing."""

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            path, token = self.path.partition("?")[0], self.headers.get("Authorization", "")
            status, what, headers = hub.answer(self.command, path, body, token)
            content = what if isinstance(what, bytes) else json.dumps(what).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_one

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
