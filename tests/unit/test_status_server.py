"""Does the page's server answer what it should, this machine alone, and nothing else? Asked by plain HTTP, without a browser."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.launch.cli import run_command
from dtrain.launch.status import Reader
from dtrain.launch.status_web import MOST_CURVES, StatusServer, as_json
from tests.unit.watched import make_run, record, training_run, write_lines


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StatusServer]:
    training_run(tmp_path / "run")
    with StatusServer(Reader(tmp_path / "run"), 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(server: StatusServer, path: str, host: str | None = None, method: str = "GET") -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest(method, path, skip_host=host is not None)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer, answer.read().decode()


def test_each_route_answers_with_its_type(server: StatusServer) -> None:
    types = {
        "/": "text/html; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8",
        "/page.css": "text/css; charset=utf-8",
        "/state.json": "application/json",
        "/state.json?now": "application/json",
        "/metrics": "text/plain; version=0.0.4; charset=utf-8",
    }
    for path, kind in types.items():
        answer, body = ask(server, path)
        assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
        assert body
        head, nothing = ask(server, path, method="HEAD")
        assert (head.status, nothing) == (200, "")
        assert (answer.headers["X-Content-Type-Options"], answer.headers["Cache-Control"]) == ("nosniff", "no-store")
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]


def test_the_state_is_what_the_reader_reads(server: StatusServer) -> None:
    said = json.loads(ask(server, "/state.json")[1])
    assert [island["step"] for island in said["islands"]] == [20, 19, 20]
    assert [island["looks"] for island in said["islands"]] == ["waiting", "training", "training"]
    assert said["islands"][0]["doing"] == "waiting for island 2, 10 s of 300"
    assert said["islands"][2]["curve"][-1] == [20, 3.5]
    assert said["links"][0] == {"sender": 0, "receiver": 1, "bytes_per_s": 187.5}
    assert 'dtrain_step{island="1"} 19\n' in ask(server, "/metrics")[1]


@pytest.mark.parametrize(
    "path",
    [
        *("/index.html", "/page.js/", "/status.py", "/state", "/favicon.ico", "/metrics/x"),
        *("/../cli.py", "/page.js/../../cli.py", "/%2e%2e/cli.py", "/..%2fcli.py", "/job.toml", "/etc/passwd", "page.js"),
    ],
)
def test_there_are_no_other_paths(server: StatusServer, path: str) -> None:
    answer, body = ask(server, path)
    assert (answer.status, body) == (404, "there are /, /state.json and /metrics\n")


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.", "127.0.0.1:x", "[::1]"]
)
def test_a_host_that_is_not_this_machines_name_is_refused(server: StatusServer, host: str) -> None:
    for path in ("/", "/state.json", "/metrics", "/nothing"):
        answer, body = ask(server, path, host)
        assert (answer.status, body) == (403, "ask for 127.0.0.1 or localhost\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost:8080", "127.0.0.1:1"])
def test_through_a_tunnel_the_port_is_another(server: StatusServer, host: str) -> None:
    assert ask(server, "/", host)[0].status == 200


def test_nothing_can_be_changed(server: StatusServer) -> None:
    assert [ask(server, "/", method=method)[0].status for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [501] * 4


def test_it_listens_on_the_loopback_interface_alone(server: StatusServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_a_run_that_is_gone_is_said(server: StatusServer, tmp_path: Path) -> None:
    (tmp_path / "run").rename(tmp_path / "old")
    for path in ("/state.json", "/metrics"):
        answer, body = ask(server, path)
        assert (answer.status, body) == (503, f"{tmp_path / 'run'} holds no run any more\n")
    assert ask(server, "/")[0].status == 200


def test_curves_of_many_islands_are_not_all_sent(tmp_path: Path) -> None:
    make_run(tmp_path / "many", f"islands.count={MOST_CURVES + 2}")
    write_lines(tmp_path / "many", (record(i, 1) for i in range(MOST_CURVES + 2)))
    said = as_json(Reader(tmp_path / "many").read())
    assert [len(island["curve"]) for island in said["islands"]] == [1] * MOST_CURVES + [0, 0]
    assert [island["loss"] for island in said["islands"]][-1] == 6 - 1 / 1000 - MOST_CURVES - 1


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training_run(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_command(["status", str(tmp_path / "run"), "--web", "--port", str(port)]) == 2
    said = f"dtrain: --port {port} cannot be opened on 127.0.0.1: Address already in use; use another, or 0 (a free one)\n"
    assert capsys.readouterr().err == said
