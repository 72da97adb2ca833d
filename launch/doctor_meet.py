"""What is the way to another machine like, and how far apart are the clocks? One doctor answers, the other one asks.

    greeting     who answers speaks first, so that nothing is ever written to a stranger's port
    T            -> when that was received and answered, in ns of the clock there
    D n          -> n bytes
    U n, n bytes -> 1 byte
    P            -> a port of any number that is open as long as this connection, as gloo's are
    C port       -> 1 byte: whether the asker's own such port was reached from there

Numbers are big-endian. A connection moves ``MOST_BYTES`` and lasts ``MOST_S`` at most, and whoever answers stops after a time. It
holds ``_AT_ONCE`` bytes of what it moves, for any number of askers.

The clock: with theta the clock there less the one here, d1 and d2 the seconds that a question and its answer travel, a question
that left at t0 was received at t1 = t0 + theta + d1, and the answer left at t2 and came at t3 = t2 - theta + d2. So
((t1 - t0) + (t2 - t3)) / 2 = theta + (d1 - d2) / 2, off by at most half of d1 + d2 = (t3 - t0) - (t2 - t1), the round trip (RFC
5905, section 8). Of several questions that of the shortest round trip is taken."""

from __future__ import annotations

import math
import shlex
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from dtrain import units
from dtrain.launch.doctor import Asked, Finding, answer, start
from dtrain.launch.doctor_net import (
    Reached,
    closed,
    ephemeral_ports,
    gloo_on_loopback,
    interfaces,
    let_in,
    outward,
    reach,
    refusal,
)

Clock = Callable[[], int]
"""Nanoseconds since 1970."""

GREETING = b"dtrain doctor 1\n"
MOST_BYTES, MOST_S = 2**25, 60.0
"""Of a connection."""
_MOST_ASKERS = 64
_AT_ONCE = 2**16
_NOTHING = memoryview(bytes(_AT_ONCE))
"""What is sent to find a rate; all connections send the same."""
_QUESTIONS = 16
_FIRST_BYTES, _LAST_BYTES = 2**16, 2**22
"""A rate is found with the first number of bytes, and with four times as many until ``_ENOUGH_S`` have gone by, or the last."""
_ENOUGH_S = 0.3
_ANSWER_S = 30.0
_GREETING_S = 3.0
_SKEW_S = 0.1
"""Clocks that are farther apart make logs of two machines hard to compare; no job stops for it."""
_SLOWER = 0.8
"""Of the job's link.rate, below which a link is not what the job takes it for."""
_HOW = ("open", "refused", "blocked", "silent", "unknown")


@dataclass(frozen=True, slots=True)
class Clocks:
    """``skew_s``: the other clock less this one's."""

    skew_s: float
    within_s: float
    rtt_s: float


@dataclass(frozen=True, slots=True)
class Way:
    """Of the link to another machine."""

    clocks: Clocks
    up_bits_per_s: float
    down_bits_per_s: float
    there: Reached
    """A port of theirs that nobody named, from here."""
    back: str
    """One of ours, from there."""


# ---- who answers


def serve(listener: socket.socket, for_s: float, *, clock: Clock = time.time_ns, say: Callable[[str], object] = print) -> None:
    """Answer whoever connects, for so long; closes the listener. ``say`` is told of each who came."""
    ends, places = time.monotonic() + for_s, threading.BoundedSemaphore(_MOST_ASKERS)
    with listener:
        while (left := ends - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                connection, address = listener.accept()
            except TimeoutError:
                return
            if not places.acquire(blocking=False):
                connection.close()
                continue
            say(f"{address[0]} asks")
            run = threading.Thread(target=_answer, args=(connection, places, clock), name="dtrain-doctor", daemon=True)
            run.start()


def _answer(connection: socket.socket, places: threading.BoundedSemaphore, clock: Clock) -> None:
    try:
        with connection, suppress(OSError, EOFError):  # whoever asks may go away at any time
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _Answers(connection, clock).until_the_end()
    finally:
        places.release()


class _Answers:
    def __init__(self, connection: socket.socket, clock: Clock) -> None:
        self._connection, self._clock = connection, clock
        self._left, self._ends = MOST_BYTES, time.monotonic() + MOST_S
        self._open: socket.socket | None = None

    def until_the_end(self) -> None:
        """Raises OSError and EOFError where time is up, or the other side goes away."""
        try:
            self._say(GREETING)
            while self._one(_some(self._connection, 1, self._ends)):
                pass
        finally:
            if self._open is not None:
                self._open.close()

    def _one(self, word: bytes) -> bool:
        """Whether the connection goes on."""
        received = self._clock()
        match word:
            case b"T":
                self._say(struct.pack("!qq", received, self._clock()))
            case b"D":
                _send(self._connection, self._allowed(), self._ends)
            case b"U":
                _skip(self._connection, self._allowed(), self._ends)
                self._say(b"\x01")
            case b"P" if self._open is None:
                self._open = socket.create_server((self._connection.getsockname()[0], 0))
                self._say(struct.pack("!H", self._open.getsockname()[1]))
            case b"C":
                (port,) = struct.unpack("!H", _read(self._connection, 2, self._ends))
                how = closed(reach(self._connection.getpeername()[0], port))
                self._say(bytes([_HOW.index(how)]))
            case _:
                return False
        return True

    def _allowed(self) -> int:
        """The number of bytes that is asked for. Raises EOFError where it is too many."""
        (count,) = struct.unpack("!I", _read(self._connection, 4, self._ends))
        self._left -= count
        if self._left < 0:
            raise EOFError
        return count

    def _say(self, data: bytes) -> None:
        _say(self._connection, data, self._ends)


# ---- all that is sent and received, until ``ends`` of time.monotonic(); EOFError past it, or where the other side has closed


def _lasts(connection: socket.socket, ends: float) -> None:
    """How long the next call may: without this before each, many short ones would outlast any end."""
    left_s = ends - time.monotonic()
    if left_s <= 0:
        raise EOFError("time is up")
    connection.settimeout(min(_ANSWER_S, left_s))


def _say(connection: socket.socket, data: bytes | memoryview, ends: float) -> None:
    _lasts(connection, ends)
    connection.sendall(data)


def _some(connection: socket.socket, most: int, ends: float) -> bytes:
    """Nothing where the other side has closed."""
    _lasts(connection, ends)
    return connection.recv(most)


def _read(connection: socket.socket, count: int, ends: float) -> bytes:
    got = b""
    while len(got) < count:
        part = _some(connection, count - len(got), ends)
        if not part:
            raise EOFError("closed")
        got += part
    return got


def _send(connection: socket.socket, count: int, ends: float) -> None:
    while count:
        part = _NOTHING[: min(count, _AT_ONCE)]
        _say(connection, part, ends)
        count -= len(part)


def _skip(connection: socket.socket, count: int, ends: float) -> None:
    while count:
        part = len(_some(connection, min(count, _AT_ONCE), ends))
        if not part:
            raise EOFError("closed")
        count -= part


# ---- who asks


def greeted(connection: socket.socket) -> bool:
    """Whether a doctor answers; a store, say, waits for others to speak first."""
    try:
        return _read(connection, len(GREETING), time.monotonic() + _GREETING_S) == GREETING
    except (OSError, EOFError):
        return False


def compare_clocks(
    connection: socket.socket, *, clock: Clock = time.time_ns, questions: int = _QUESTIONS, ends: float = math.inf
) -> Clocks:
    asked = [_ask_time(connection, clock, ends) for _ in range(questions)]
    return min(asked, key=lambda clocks: clocks.rtt_s)


def _ask_time(connection: socket.socket, clock: Clock, ends: float) -> Clocks:
    t0 = clock()
    _say(connection, b"T", ends)
    t1, t2 = struct.unpack("!qq", _read(connection, 16, ends))
    t3 = clock()
    rtt_ns = max(0, (t3 - t0) - (t2 - t1))
    return Clocks(((t1 - t0) + (t2 - t3)) / 2e9, rtt_ns / 2e9, rtt_ns / 1e9)


def look_over(connection: socket.socket) -> Way:
    """All that there is to ask. Raises OSError and EOFError where time is up, or the other side goes away."""
    ends = time.monotonic() + MOST_S
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    clocks = compare_clocks(connection, ends=ends)
    up = _rate(lambda count: _up(connection, count, ends), clocks.rtt_s)
    down = _rate(lambda count: _down(connection, count, ends), clocks.rtt_s)
    _say(connection, b"P", ends)
    (port,) = struct.unpack("!H", _read(connection, 2, ends))
    there = reach(connection.getpeername()[0], port)
    closed(there)
    with socket.create_server((connection.getsockname()[0], 0)) as listener:
        _say(connection, b"C" + struct.pack("!H", listener.getsockname()[1]), ends)
        back = _HOW[_read(connection, 1, ends)[0]]
    return Way(clocks, up, down, there, back)


def _up(connection: socket.socket, count: int, ends: float) -> None:
    _say(connection, b"U" + struct.pack("!I", count), ends)
    _send(connection, count, ends)
    _read(connection, 1, ends)


def _down(connection: socket.socket, count: int, ends: float) -> None:
    _say(connection, b"D" + struct.pack("!I", count), ends)
    _skip(connection, count, ends)


def _rate(move: Callable[[int], None], rtt_s: float) -> float:
    """Bits a second, the round trip that every move takes left out."""
    count = _FIRST_BYTES
    while True:
        begun = time.monotonic()
        move(count)
        took_s = time.monotonic() - begun
        if took_s >= _ENOUGH_S or count >= _LAST_BYTES:
            return 8 * count / max(took_s - rtt_s, 1e-6)
        count *= 4


# ---- what was found


def meet(host: str, port: int, asked: Asked | None) -> Iterator[Finding]:
    reached = reach(host, port)
    if reached.connection is None:
        yield refusal("meeting", host, port, reached)
        return
    place, serve_there = f"{host}:{port}", f"dtrain doctor --serve {port}  # on {host}"
    with reached.connection as connection:
        if not greeted(connection):
            connection.close()
            yield _no_doctor(place, serve_there)
        else:
            yield Finding("meeting", "ok", f"a doctor answers at {place}")
            try:
                way = look_over(connection)
            except (OSError, EOFError) as e:
                yield Finding("link", "fail", f"{place} broke off: {e}", serve_there)
            else:
                yield from _of_way(way, host, asked)
    if asked is not None and not host.startswith(("127.", "localhost")) and not asked.job.link.interface:
        yield gloo_on_loopback(asked, "fail")


def _no_doctor(place: str, serve_there: str) -> Finding:
    said = answer(start("-m", "dtrain.launch.doctor_torch", "--store", place))
    if "store" in said.lines:
        return Finding("meeting", "ok", f"a job's meeting point answers at {place}, which says no time and shows no rate")
    return Finding("meeting", "fail", f"{place} is open, and neither a meeting point nor a doctor: {said.error}", serve_there)


def _of_way(way: Way, host: str, asked: Asked | None) -> Iterator[Finding]:
    clocks = way.clocks
    side = "ahead" if clocks.skew_s > 0 else "behind"
    what = f"that of {host} is {_ms(abs(clocks.skew_s))} {side}, +- {_ms(clocks.within_s)}"
    apart = abs(clocks.skew_s) - clocks.within_s > _SKEW_S
    yield Finding("clock", "warn", what, "timedatectl set-ntp true") if apart else Finding("clock", "ok", what)
    yield _link(way, asked)
    yield from _gloo(way, host)


def _link(way: Way, asked: Asked | None) -> Finding:
    slower = min(way.up_bits_per_s, way.down_bits_per_s)
    rates = f"{_rate_text(way.up_bits_per_s)} up, {_rate_text(way.down_bits_per_s)} down"
    what = f"round trip {_ms(way.clocks.rtt_s)}, about {rates}"
    said = None if asked is None else units.bits_per_s(asked.job.link.rate)
    if asked is None or said is None or slower >= _SLOWER * said:
        return Finding("link", "ok", what)
    measured = ["--link", f"{slower / 1e6:.3g}mbit", "--rtt", f"{way.clocks.rtt_s * 1e3:.3g}ms"]
    plan = shlex.join(["dtrain", "plan", *asked.words, *measured])
    return Finding("link", "warn", f"{what}; the job takes it for link.rate = {asked.job.link.rate}", plan)


def _gloo(way: Way, host: str) -> Iterator[Finding]:
    first, last = ephemeral_ports()
    opened = let_in(f"{first}:{last}")
    if way.there.how == "open":
        yield Finding("gloo there", "ok", f"a port that nobody named is reached on {host}")
    else:
        what = f"a port that nobody named is {way.there.how} on {host}: gloo's are such"
        yield Finding("gloo there", "fail", what, f"{opened}  # on {host}")
    if way.back == "open":
        yield Finding("gloo back", "ok", f"{host} reaches such a port here")
    else:
        yield Finding("gloo back", "fail", f"such a port here is {way.back} for {host}: gloo's are such", opened)


def here() -> str:
    """This machine's address, as others may see it."""
    known = interfaces()
    found = outward(known)
    return (known[found] if found else None) or "127.0.0.1"


def _ms(value_s: float) -> str:
    return f"{1e3 * value_s:.3g} ms" if value_s < 1 else units.show_seconds(value_s)


def _rate_text(bits_per_s: float) -> str:
    return f"{bits_per_s / 1e6:.3g} Mbit/s"
