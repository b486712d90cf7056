"""A file server on this machine. It also answers as Hugging Face's hub, and in every wrong way."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTENT = bytes(range(256)) * 5000  # more than one read of the socket
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Answers by path, and keeps what it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.content = CONTENT
        self.hub: dict[str, bytes | str] = {}  # path below resolve/: content, or an error's code

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        if body:
            self.server.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if "/resolve/" in self.path:
            self.hub_file(body)
        elif name.startswith("to-"):
            target = {"to-good": "/weights.npz", "to-itself": "/to-itself"}.get(name)
            self.answer(302, headers={"Location": target or "file:///etc/passwd"})
        elif name == "page":
            self.answer(200, b"<html>", type="text/html; charset=utf-8")
        elif name in ("gone", "secret", "broken"):
            self.answer({"gone": 404, "secret": 403, "broken": 500}[name])
        elif name == "short":
            self.answer(200, self.server.content[:-1000], length=len(self.server.content))
        elif name == "empty":
            self.answer(200)
        elif name == "silent":
            self.close_connection = True  # no answer at all
        else:
            self.answer(200, self.server.content)

    def hub_file(self, body):
        found = self.server.hub.get(self.path.lstrip("/"), "EntryNotFound")
        if isinstance(found, str):
            code = 403 if found == "GatedRepo" else 404
            self.answer(code, headers={"X-Error-Code": found, "X-Repo-Commit": COMMIT})
            return
        tag = f'"{hashlib.sha256(found).hexdigest()}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": tag}
        self.answer(200, found if body else b"", length=len(found), headers=headers)

    def answer(self, code, content=b"", type="application/x", length=None, headers=None):
        self.send_response(code)
        self.send_header("Content-Type", type)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server that answers until the block ends."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


def files_in(folder: Path) -> list[str]:
    """Names of all files below a folder."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())
