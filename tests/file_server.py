"""A server of files on this machine that does what servers do: sends parts or does not, breaks off, changes its files."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """What the server has, and how it behaves."""

    content: bytes = b""
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    """Whether it sends parts."""
    checks: bool = True
    """Whether it looks at If-Range, as it should."""
    shift: int = 0
    """By how many bytes it begins too late."""
    cuts: list[int] = field(default_factory=list)
    """After so many bytes of a body it breaks off, once for each number."""
    status: int = 200
    length: bool = True
    """Whether it says how many bytes come."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of each request."""
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    served: Served

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        served, asked = self.served, self.headers.get("Range")
        served.asked.append((self.path, asked))
        if served.status != 200:
            self.send_error(served.status)
            return
        same = self.headers.get("If-Range") in (served.etag, served.modified, None)
        begin = 0
        if asked and served.ranges and (same or not served.checks):
            begin = int(asked.removeprefix("bytes=").removesuffix("-")) + served.shift
            if begin >= len(served.content):
                self.send_error(416)
                return
        body = served.content[begin:]
        self.send_response(206 if begin else 200)
        if begin:
            last = len(served.content) - 1
            self.send_header("Content-Range", f"bytes {begin}-{last}/{len(served.content)}")
        for name, value in (("ETag", served.etag), ("Last-Modified", served.modified)):
            if value is not None:
                self.send_header(name, value)
        if served.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # It has heard enough.
            self.wfile.write(body[: served.cuts.pop(0)] if served.cuts else body)


@contextmanager
def serving(**what):
    """A server of one file, whatever it is called, for the length of a `with` block."""
    served = Served(**what)
    handler = type("Handler", (_Handler,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}/file.json"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
