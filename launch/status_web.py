"""How is a run shown in a browser? A page of one file each of HTML, JavaScript and CSS, which asks for /state.json every second.

Only this machine can ask, and only by the machine's own name: a page of somebody else's whose host name was made to point here
(DNS rebinding) is refused by the Host header. Routes are fixed; no path of a request becomes a path of a file.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dtrain.launch import prometheus
from dtrain.launch.status import IslandState, Reader, State
from dtrain.launch.view import now

_PAGE = Path(__file__).parent / "status_page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_OUR_NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]+)?", re.IGNORECASE)  # of any port: a tunnel's is another
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # Nothing from elsewhere, and nothing that was written into the page.
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
MOST_CURVES = 16
"""More cannot be told apart, and would be a megabyte a second."""


def serve(reader: Reader, port: int, say: Callable[[str], None]) -> None:
    """Until KeyboardInterrupt; raises ValueError where the port is taken."""
    with StatusServer(reader, port) as server:
        say(f"http://127.0.0.1:{server.server_port}/ shows {reader.run}, and /metrics tells Prometheus; Ctrl-C ends it")
        server.serve_forever()


class StatusServer(ThreadingHTTPServer):
    """Answers on 127.0.0.1 what a reader reads."""

    daemon_threads = True

    def __init__(self, reader: Reader, port: int) -> None:
        self._reader, self._one_reads = reader, threading.Lock()
        self.files = {route: ((_PAGE / name).read_bytes(), kind) for route, (name, kind) in _FILES.items()}
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as e:
            remedy = "use another, or 0 (a free one)"
            raise ValueError(f"--port {port} cannot be opened on 127.0.0.1: {e.strerror}; {remedy}") from None

    def state(self) -> State:
        with self._one_reads:
            return self._reader.read()


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "dtrain", ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, its name in the base class
        """A line a second is nothing that anybody would read."""

    def _answer(self, *, with_body: bool) -> None:
        status, body, kind = self._content()
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _content(self) -> tuple[HTTPStatus, bytes, str]:
        if not _OUR_NAMES.fullmatch(self.headers.get("Host", "")):
            return _refusal(HTTPStatus.FORBIDDEN, "ask for 127.0.0.1 or localhost")
        assert isinstance(self.server, StatusServer)
        route = self.path.partition("?")[0]
        if route in self.server.files:
            return HTTPStatus.OK, *self.server.files[route]
        if route not in ("/state.json", "/metrics"):
            return _refusal(HTTPStatus.NOT_FOUND, "there are /, /state.json and /metrics")
        try:
            state = self.server.state()
        except (ValueError, OSError) as e:  # the run was removed, or is being replaced
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, str(e))
        if route == "/metrics":
            return HTTPStatus.OK, prometheus.text(state).encode(), prometheus.CONTENT_TYPE
        return HTTPStatus.OK, json.dumps(as_json(state), allow_nan=False).encode(), "application/json"


def _refusal(status: HTTPStatus, why: str) -> tuple[HTTPStatus, bytes, str]:
    return status, f"{why}\n".encode(), "text/plain; charset=utf-8"


def as_json(state: State) -> dict[str, Any]:
    """What the page needs of a state. Curves are of the first islands, where there are more than MOST_CURVES."""
    return {
        "run": str(state.run),
        "name": state.name,
        "recipe": state.recipe,
        "phase": state.phase,
        "how": state.how,
        "unseen": state.unseen,
        "epoch": state.epoch,
        "committed_step": state.committed_step,
        "quiet_s": state.quiet_s,
        "islands": [_island(island, with_curve=k < MOST_CURVES) for k, island in enumerate(state.islands)],
        "merged": state.merged,
        "links": state.links
        and [{"sender": link.sender, "receiver": link.receiver, "bytes_per_s": state.bytes_per_s(link)} for link in state.links],
    }


def _island(island: IslandState, *, with_curve: bool) -> dict[str, Any]:
    view = island.view
    return {
        "island": view.island,
        "looks": "lost" if island.lost else "stopped" if view.note else view.state,
        "doing": now(view),
        "step": view.step,
        "steps": view.steps,
        "loss": view.loss,
        "eval_loss": island.eval_loss,
        "tokens": island.tokens,
        "tokens_per_s": view.tokens_per_s,
        "wire_bytes_sent": view.wire_bytes_sent,
        "wire_bytes_per_s": view.wire_bytes_per_s,
        "wait_s": view.wait_s,
        "time_s": island.time_s,
        "waiting_for": view.waiting_for,
        "waited_s": view.waited_s,
        "timeout_s": view.timeout_s,
        "restarts": island.restarts,
        "curve": island.curve if with_curve else (),
    }
