"""A server that takes every request and answers nonsense, which no real one does on demand."""

from __future__ import annotations

import itertools
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

ANSWERS = (
    (500, b"<html>Internal Server Error</html>"),
    (200, b"<html>a proxy's login page</html>"),
    (503, b""),
    (200, b'{"runs": "none", "experiment": 3}'),
    (200, b"[]"),
    (200, b'{"experiment": {"experiment_id"'),
)


class Misbehaving:
    """Context in which the server listens on a port of this machine; `asked` counts the requests.

    Another handler of requests may give other answers.
    """

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        self.asked = 0
        answers = itertools.cycle(ANSWERS)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked += 1
                status, body = next(answers)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler or Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
