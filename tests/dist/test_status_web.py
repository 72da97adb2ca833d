"""Does a browser show of a run what its islands wrote? A real one, without a screen, asks the real command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dtrain.launch.status import Reader, State
from dtrain.launch.status_web import StatusServer
from tests.dist.job import ROOT
from tests.unit.watched import make_run, record, status_file, training_run, write_lines

NONE = "\u2013"  # a dash, where nothing is known
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_NEVER_CLOSED = {"meta", "link"}


class Element:
    """One of a page, with all that is in it."""

    def __init__(self, name: str, attributes: dict[str, str]) -> None:
        self.name, self.attributes = name, attributes
        self.children: list[Element] = []
        self.text = ""

    def all(self, name: str, **attributes: str) -> list[Element]:
        """Those within that are called so; of ``class_`` one word is enough."""
        found = [one for child in self.children for one in child.all(name, **attributes)]
        class_ = attributes.pop("class_", None)
        fits = class_ is None or class_ in self.attributes.get("class", "").split()
        fits = fits and all(self.attributes.get(key.replace("_", "-")) == value for key, value in attributes.items())
        return [self, *found] if self.name == name and fits else found

    def one(self, name: str, **attributes: str) -> Element:
        (found,) = self.all(name, **attributes)
        return found

    def words(self) -> str:
        return self.text + "".join(child.words() for child in self.children if child.name != "title")


class Page(HTMLParser):
    """The tree that a browser writes out."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = Element(tag, {key: value or "" for key, value in attrs})
        self._open[-1].children.append(made)
        if tag not in _NEVER_CLOSED:
            self._open.append(made)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _NEVER_CLOSED:
            assert self._open.pop().name == tag

    def handle_data(self, data: str) -> None:
        text = Element("#text", {})
        text.text = data
        self._open[-1].children.append(text)


@contextmanager
def command(run: Path) -> Iterator[str]:
    """``dtrain status RUN --web``: the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dtrain.launch", "status", str(run), "--web"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        address, _, rest = process.stdout.readline().partition(" ")
        assert rest == f"shows {run}, and /metrics tells Prometheus; Ctrl-C ends it\n"
        assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/", address)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def browse(address: str, profile: Path) -> Element:
    """The page after 3.5 s of the page's own clock, which stands still while it waits for an answer."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        pytest.skip("there is no browser: apt-get install chromium")
    quiet = ("--disable-background-networking", "--disable-component-update", "--no-first-run", "--enable-logging=stderr")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}", *quiet)
    line = [browser, *options, "--virtual-time-budget=3500", "--dump-dom", address]
    env = {**os.environ, "HOME": str(profile)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False, env=env)
    assert done.returncode == 0, done.stderr
    said = [text for text in done.stderr.splitlines() if "CONSOLE" in text]
    assert said == [], "an error of the page, or something that its own policy refused"
    return Page(done.stdout).root


def rows(page: Element) -> list[list[str]]:
    return [[cell.words() for cell in row.all("td")] for row in page.one("tbody", id="rows").all("tr")]


def facts(page: Element) -> dict[str, str]:
    list_ = page.one("dl", id="facts")
    return dict(zip((dt.words() for dt in list_.all("dt")), (dd.words() for dd in list_.all("dd")), strict=True))


def points(path: Element) -> list[tuple[float, float]]:
    found = re.findall(r"[ML]([-0-9.]+) ([-0-9.]+)", path.attributes["d"])
    return [(float(x), float(y)) for x, y in found]


def test_a_running_run_is_shown(tmp_path: Path) -> None:
    training_run(tmp_path / "run")
    with command(tmp_path / "run") as address:
        page = browse(address, tmp_path / "profile")
    assert page.one("h1", id="name").words() == "run"
    assert page.one("span", id="phase").words() == "running"
    assert page.one("span", id="about").words() == "3 islands, choco"
    assert page.one("head").one("title").children[0].text == "19/3000 run"
    assert rows(page) == [
        ["0", "waiting for island 2, 10 s of 300", "20 / 3,000", "5.980", NONE, "64", "375 B/s", "20 kB", "10 s", "0"],
        ["1", "training", "19 / 3,000", "4.981", NONE, "64", "500 B/s", "19 kB", "9.5 s", "1"],
        ["2", "training", "20 / 3,000", "3.500", "3.250", "64", "500 B/s", "20 kB", "10 s", "0"],
    ]
    assert facts(page) == {
        "step": "19 of 3,000",
        "loss, mean": "4.820 merged 4.125",
        "tokens/s, all": "192",
        "links carry": "1.38 kB/s",
        "waited for links": "25.0 % of 40 s",
        "last commit": "10 1 restart",
    }
    graph = page.one("svg", id="graph")
    nodes = {node.attributes["data-island"]: node for node in graph.all("g", class_="node")}
    assert [node.attributes["class"] for node in nodes.values()] == ["node waiting", "node training", "node training"]
    assert "waits for 2, 10 s" in nodes["0"].words()
    assert "step 19" in nodes["1"].words()
    assert {line.attributes["data-link"] for line in graph.all("line", class_="link")} == {"0-1", "0-2", "1-2"}
    # Both ways: 187.5 + 250 from and to island 0, 250 + 250 between the others.
    assert [text.words() for text in graph.all("text", class_="rate")] == ["438 B/s", "438 B/s", "500 B/s"]
    assert len(graph.all("line", class_="wait")) == 1
    curves = page.one("svg", id="curves")
    assert [len(points(path)) for path in curves.all("path", class_="curve")] == [20, 19, 20]
    assert [len(points(path)) for path in curves.all("path", class_="trend")] == [20, 19, 20]
    # Island 1's loss falls by a thousandth a step, and its curve is a straight line; island 2's lies a nat below.
    first, *_, last = line = points(curves.one("path", class_="curve", data_island="1"))
    for k, (x, y) in enumerate(line):
        assert x == pytest.approx(first[0] + (last[0] - first[0]) * k / 18, abs=0.11)
        assert y == pytest.approx(first[1] + (last[1] - first[1]) * k / 18, abs=0.11)
    starts = [points(path)[0][1] for path in curves.all("path", class_="curve")]
    assert starts[1] - starts[0] == pytest.approx(starts[2] - starts[1], abs=0.21), "a nat apart, the lower loss below"
    assert starts[0] < starts[1]
    (merged,) = curves.all("circle", class_="merged")
    at = [float(merged.attributes[key]) for key in ("cx", "cy")]
    below = (5.999 - 4.125) * (starts[1] - starts[0])
    assert at == pytest.approx([line[9][0], starts[0] + below], abs=0.3), "at step 10"
    assert len(curves.all("line", class_="commit")) == 1


def test_an_ended_run_with_a_long_curve_is_shown(tmp_path: Path) -> None:
    word = make_run(tmp_path / "run", "islands.count=2", "sync.recipe=local")
    write_lines(tmp_path / "run", (record(i, t) for t in range(1, 1301) for i in range(2)))
    status_file(tmp_path / "run", 0).update("done", 1300)
    word.end(75, 'island 1: <b>it</b> is "gone"')
    with command(tmp_path / "run") as address:
        page = browse(address, tmp_path / "profile")
    assert page.one("span", id="phase").words() == "ended"
    assert page.one("p", id="trouble").words() == 'ended with exit status 75: island 1: <b>it</b> is "gone"'
    assert [row[1] for row in rows(page)] == ["done", "stopped"]
    assert [len(points(path)) for path in page.one("svg", id="curves").all("path", class_="curve")] == [325, 325]
    assert page.one("p", id="links-note").words() == "These islands do not talk on the way."
    assert page.one("svg", id="graph").all("line", class_="link") == []


def test_the_page_follows_the_run_until_it_is_gone(tmp_path: Path) -> None:
    """At each look there is a step more; at the third the folder is gone, and what stood there still stands."""
    training_run(tmp_path / "run")
    looks: list[int] = []

    class Moving(Reader):
        def read(self) -> State:
            looks.append(len(looks))
            if len(looks) == 3:
                (tmp_path / "run").rename(tmp_path / "old")
            elif len(looks) < 3:
                write_lines(tmp_path / "run", [record(1, 19 + len(looks))])
            return super().read()

    with StatusServer(Moving(tmp_path / "run"), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        page = browse(f"http://localhost:{server.server_port}/", tmp_path / "profile")
        server.shutdown()
        thread.join()
    assert len(looks) >= 3
    assert rows(page)[1][2] == "21 / 3,000"
    trouble = page.one("p", id="trouble")
    assert trouble.words() == f"{tmp_path / 'run'} holds no run any more"
    assert "hidden" not in trouble.attributes
