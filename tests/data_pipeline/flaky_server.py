"""A real HTTP server for the tests: ranges, ETags, and on demand all that servers and networks do wrong."""

import hashlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FlakyServer:
    """Serves the files of a folder. `faults[name]`: what goes wrong with the next requests for a file, one each.

    500 · 404 · "cut N": the connection is cut after N bytes · "stall N": nothing more comes after N bytes for a while
    · "long": more bytes are announced than come · "other": another content of another length · "" nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.ranges, self.bytes_a_second = True, 0
        self.requests: list[tuple[str, str | None]] = []
        """(file, Range) of every request."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self, name: str) -> int:
        return sum(1 for requested, _ in self.requests if requested == name)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        wanted = request.headers.get("Range")
        self.requests.append((name, wanted))
        fault = str(self.faults[name].pop(0)) if self.faults[name] else ""
        path = self.folder / name
        if fault.isdigit() or not path.is_file():
            request.send_error(int(fault) if fault.isdigit() else 404)
            return
        content = path.read_bytes()
        if fault == "other":
            content = content[: len(content) // 2]
        tag = f'"{hashlib.sha256(content).hexdigest()[:12]}"'
        start = 0
        if wanted and self.ranges and request.headers.get("If-Range", tag) == tag:
            found = re.fullmatch(r"bytes=(\d+)-", wanted)
            assert found is not None
            start = int(found[1])
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            request.send_response(200)
        request.send_header("ETag", tag)
        body = content[start:]
        request.send_header("Content-Length", str(len(body) + (1000 if fault == "long" else 0)))
        request.end_headers()
        kind, _, number = fault.partition(" ")
        if kind in ("cut", "stall"):
            body = body[: int(number)]
        try:
            for at in range(0, len(body), 4096):
                request.wfile.write(body[at : at + 4096])
                if self.bytes_a_second:
                    time.sleep(4096 / self.bytes_a_second)
            request.wfile.flush()
            if kind == "stall":
                time.sleep(1)
        except OSError:
            pass  # the client has gone
        request.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[FlakyServer]:
    """Serve a folder for the length of a test."""
    server = FlakyServer(folder)
    try:
        yield server
    finally:
        server.close()
