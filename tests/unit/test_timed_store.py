"""Does a word at the meeting point end when the launcher answers no more, and is a person heard meanwhile?"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
from torch._C._distributed_c10d import TCPStore

from dtrain.config import load_job
from dtrain.errors import PeerLost
from dtrain.launch import part, part_words
from dtrain.launch.checks import resolved
from dtrain.launch.cli import run_command
from dtrain.launch.local import Stopped, stop_signals_raise
from dtrain.launch.timed_store import TimedStore

_AT_MOST_S = 30.0
"""A word that nothing else ends is cut off here, and the test fails in place of hanging."""


class Launcher:
    """A store, and before it what passes words on until one of them is to be the last: as a suspended launcher takes them."""

    def __init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.meet = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_off = False
        self._last: bytes | None = None
        self._then: Callable[[], None] = lambda: None
        Thread(target=self._take, daemon=True).start()

    def falls_silent_at(self, word: str, then: Callable[[], None] = lambda: None) -> None:
        """At any word, where this is the empty one."""
        self._last, self._then = word.encode(), then

    def close(self) -> None:
        self._listener.close()

    def _take(self) -> None:
        with suppress(OSError):  # closed
            while True:
                site = self._listener.accept()[0]
                site.settimeout(_AT_MOST_S)
                server = socket.create_connection(("127.0.0.1", self.store.port))
                Thread(target=self._pass, args=(site, server), daemon=True).start()
                Thread(target=_pass_all, args=(server, site), daemon=True).start()

    def _pass(self, site: socket.socket, server: socket.socket) -> None:
        silent = False
        with suppress(OSError), site, server:
            while words := self._words(site):
                if self._last is not None and self._last in words:
                    silent = True
                    self._then()
                elif not silent:
                    server.sendall(words)

    def _words(self, site: socket.socket) -> bytes:
        try:
            return site.recv(65536)
        except TimeoutError:
            self.cut_off = True
            return b""


def _pass_all(server: socket.socket, site: socket.socket) -> None:
    with suppress(OSError):
        while words := server.recv(65536):
            site.sendall(words)


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    found = Launcher()
    yield found
    found.close()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_words_are_those_of_the_store(launcher: Launcher) -> None:
    there = TimedStore(launcher.meet, 30.0)
    there.set("a", "1")
    assert (launcher.store.get("a"), there.get("a")) == (b"1", b"1")
    assert (there.check(["a"]), there.check(["a", "b"])) == (True, False)
    assert (there.compare_set("b", "", "2"), there.compare_set("b", "", "3"), launcher.store.get("b")) == (b"2", b"2", b"2")
    assert (there.delete_key("a"), launcher.store.check(["a"])) == (True, False)


# Not set, which the store takes no answer for.
WORDS: dict[str, Callable[[TimedStore], object]] = {
    "get": lambda store: store.get("x"),
    "check": lambda store: store.check(["x"]),
    "compare_set": lambda store: store.compare_set("x", "", "1"),
    "delete_key": lambda store: store.delete_key("x"),
}


@pytest.mark.parametrize("word", WORDS.values(), ids=list(WORDS))
def test_a_silent_launcher_is_lost_after_a_time(launcher: Launcher, word: Callable[[TimedStore], object]) -> None:
    there = TimedStore(launcher.meet, 30.0)
    there.set_timeout(timedelta(seconds=0.2))
    launcher.falls_silent_at("x")
    with pytest.raises(PeerLost, match=rf"the launcher at {launcher.meet} has not answered for 0\.2 s; start it again with "):
        word(there)


@pytest.mark.parametrize("word", WORDS.values(), ids=list(WORDS))
def test_signals_are_heard_while_it_is_silent(launcher: Launcher, word: Callable[[TimedStore], object]) -> None:
    there = TimedStore(launcher.meet, 30.0)
    launcher.falls_silent_at("x", interrupt)
    with stop_signals_raise(), pytest.raises(Stopped, match="SIGINT"):
        word(there)
    assert not launcher.cut_off


def test_one_that_is_gone_is_lost_at_once() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meet = f"127.0.0.1:{server.port}"
    there = TimedStore(meet, 600.0)
    del server
    with pytest.raises(PeerLost, match=f"the launcher at {meet} is gone; start it again with --resume, and then this"):
        there.check(["a"])


# ---- the part of a launcher


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    each = '[[islands.each]]\n[[islands.each]]\nlauncher = "manual"\n'
    Path("job.toml").write_text(f'[job]\nname = "small"\n{each}[link]\ninterface = "lo"\n')


@pytest.mark.usefixtures("in_a_folder")
def test_a_part_whose_launcher_answers_nothing_ends_with_one_line(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.falls_silent_at("")
    assert run_command(["run", "job.toml", "link.timeout_s=0.3", "--island", "1", "--meet", launcher.meet]) == 75
    err = capsys.readouterr().err
    assert err.startswith(f"dtrain: the launcher at {launcher.meet} has not answered for 0.3 s; start it again with --resume")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("in_a_folder")
def test_a_part_is_stopped_though_its_launcher_is_silent(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "_GOODBYE", timedelta(seconds=0.2))
    part_words.say_job(launcher.store, resolved(load_job(Path("job.toml"))))
    launcher.falls_silent_at("/order", interrupt)  # what a part asks for when it has joined
    assert run_command(["run", "job.toml", "--island", "1", "--meet", launcher.meet]) == 128 + signal.SIGINT
    assert not launcher.cut_off
