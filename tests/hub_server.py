# SPDX-License-Identifier: Apache-2.0
"""A Hub in a thread: the routes that huggingface_hub asks for, over commits that tests make."""

import contextlib
import hashlib
import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories in memory.

    Attributes:
      requests: (method, path) of everything that was asked.
      gated, private: ids that are answered 401, as the Hub does without a login.
      delay_s: before each answer.
      cut: file -> bytes after which its content ends, and the connection too.
    """

    def __init__(self):
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.branches: dict[tuple[str, str], dict[str, str]] = {}
        self.cards: dict[str, dict] = {}
        self.requests: list[tuple[str, str]] = []
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.cut: dict[str, int] = {}
        self.delay_s = 0.0
        self.lock = threading.Lock()

    def commit(self, kind: str, repo: str, files: dict, branch: str = "main") -> str:
        """Moves a branch on; files are bytes or text. Returns the commit."""
        content = {n: c.encode() if isinstance(c, str) else c for n, c in files.items()}
        history = self.commits.setdefault((kind, repo), {})
        made = hashlib.sha1(f"{kind}{repo}{len(history)}{branch}".encode()).hexdigest()
        history[made] = content
        self.branches.setdefault((kind, repo), {})[branch] = made
        return made

    def answer(self, method: str, path: str, wanted: str | None) -> tuple[int, dict, bytes]:
        """(status, headers, body)."""
        time.sleep(self.delay_s)
        with self.lock:
            self.requests.append((method, path))
        parts = [urllib.parse.unquote(p) for p in path.partition("?")[0].strip("/").split("/")]
        is_api = parts[0] == "api"
        if is_api:
            kind, parts = parts[1].removesuffix("s"), parts[2:]
        else:
            kind = "dataset" if parts[0] == "datasets" else "model"
            parts = parts[1:] if kind == "dataset" else parts
        repo, route, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3:]
        if repo in self.gated:
            told = {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}
            return 401, told, b"restricted"
        if (kind, repo) not in self.commits or repo in self.private:
            told = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return 401, told, b"Invalid username or password."
        revision = rest[0] if rest else "main"
        commit = self.branches[kind, repo].get(revision, revision)
        if commit not in self.commits[kind, repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"Invalid rev id"
        files = self.commits[kind, repo][commit]
        if is_api and route == "tree":
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in files.items()
            ]
            return 200, {}, json.dumps(listed).encode()
        if is_api:
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
            return 200, {}, json.dumps(info | {"cardData": self.cards.get(repo)}).encode()
        name = "/".join(rest[1:])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found"
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        content = files[name]
        told = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            told["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return 206 if start else 200, told, content[start:]


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serving(hub: Hub):
    """The address of a running server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            status, headers, body = hub.answer(self.command, self.path, self.headers["Range"])
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            if "/api/" in self.path:
                self.send_header("Content-Type", "application/json")
            self.end_headers()
            if self.command == "GET":
                limit = hub.cut.get(self.path.rpartition("/")[2])
                started = int((self.headers["Range"] or "bytes=0-")[6:].split("-")[0])
                self.wfile.write(body if limit is None else body[: max(0, limit - started)])
                self.close_connection = limit is not None

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
