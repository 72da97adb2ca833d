"""How does a test have a lab of its own, and talk over its links? By sockets that a thread opened in a namespace; a socket stays
where it was made."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from dtrain.launch import lab, lab_net

Made = TypeVar("Made")

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"),
    reason="needs root, and ip and tc (apt-get install iproute2)",
)


@contextmanager
def a_lab_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the block lays stands beside other labs, and is removed whatever happens."""
    monkeypatch.setenv(lab.NAME_VARIABLE, f"test{os.getpid()}")
    try:
        yield
    finally:
        if os.geteuid() == 0 and shutil.which("ip"):
            lab.down()


def there(island: int, make: Callable[[], Made]) -> Made:
    """What ``make`` returns in an island's namespace."""
    made: list[Made] = []

    def run() -> None:
        lab_net.enter(lab.namespace(island))  # this thread alone
        made.append(make())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert made, f"nothing could be made in {lab.namespace(island)}"
    return made[0]


def datagrams(island: int) -> socket.socket:
    """UDP, at a port of its own."""

    def make() -> socket.socket:
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        found.bind((lab.address(island), 0))
        found.settimeout(30)
        return found

    return there(island, make)


def stream(one: int, other: int) -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection between two islands."""
    listener = there(other, lambda: socket.create_server((lab.address(other), 0)))
    with listener:
        begin = there(one, lambda: socket.create_connection(listener.getsockname(), timeout=30))
        end, _ = listener.accept()
    end.settimeout(30)
    return begin, end


def flow(begin: socket.socket, end: socket.socket, num_bytes: int) -> None:
    """Send so many bytes from one end to the other; returns when they have arrived."""
    sender = threading.Thread(target=begin.sendall, args=(bytes(num_bytes),))
    sender.start()
    room = bytearray(1 << 20)
    left = num_bytes
    while left:
        got = end.recv_into(room, min(left, len(room)))
        assert got, f"the connection ended {left} bytes early"
        left -= got
    sender.join()
