"""What is a lab? Islands in network namespaces of this machine, joined by links that the kernel holds to a rate.

Each island's namespace has one interface, ``lab0``. Its other end is a port of a bridge, ``lab0`` too, in a namespace of its
own, which nothing joins to the machine's network: so addresses collide with none, and no rule or interface of the machine is
touched. An island's uplink is shaped where it leaves the island, its downlink where it leaves the bridge. The launcher lives in
the bridge's namespace.

What is there is asked of the kernel each time. Only what was asked for lies in a file, and it is written last: namespaces
without it are a lab that was half made.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from dtrain import units
from dtrain.launch import lab_link, lab_net
from dtrain.launch.lab_link import Link

DEVICE = "lab0"
MOST_ISLANDS = 250
NAME_VARIABLE = "DTRAIN_LAB"
NONE_UP = "no lab is up; make one: dtrain lab up --islands 2 --rate 100mbit"
_NETWORK = "10.77.0"
_STATES = Path("/run/dtrain")
_GRACE_S = 6.0
"""A launcher that is told to end gives its islands two seconds."""


@dataclass(frozen=True, slots=True)
class Lab:
    """What was asked for."""

    islands: int
    link: Link
    group: int = 1  # neighbouring islands whose links among themselves are near

    def near(self, island: int) -> range:
        """The other islands of its group are in it, and itself."""
        first = island - island % self.group
        return range(first, first + self.group)

    @property
    def title(self) -> str:
        link = self.link
        parts = [f"{_rate(link.bits_per_s)} each way"]
        if link.near_bits_per_s is not None:
            parts.append(f"{_rate(link.near_bits_per_s)} within groups of {self.group}")
        if link.rtt_s:
            parts.append(f"a round trip of {units.show_seconds(link.rtt_s)}")
        if link.loss:
            parts.append(f"{100 * link.loss:g} % of packets lost")
        return f"{self.islands} islands, {', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes at one island's interface since the lab is up, headers included."""

    sent: int
    received: int


def parse(islands: int, rate: str, near: str | None = None, rtt: str = "0ms", loss: str = "0%") -> Lab:
    """Raises ValueError where a lab cannot be like that."""
    if not 2 <= islands <= MOST_ISLANDS:
        raise ValueError(f"--islands {islands}: a lab joins 2 to {MOST_ISLANDS}")
    group, near_bits_per_s = (1, None) if near is None else _near(islands, near)
    return Lab(islands, Link(_bits_per_s("--rate", rate), near_bits_per_s, _seconds(rtt), _share(loss)), group)


def up(lab: Lab) -> list[str]:
    """Make a lab, whole or not at all; returns what else was done."""
    with _alone():
        notes = _clear_leftover()
        with ExitStack() as undo:
            undo.callback(_remove)
            lab_net.told("ip", lines=[f"netns add {hub()}"])
            if lab.link.rtt_s or lab.link.loss:
                lab_link.check_netem(hub())
            _make(lab)
            _state().write_text(json.dumps(asdict(lab)), encoding="utf-8")
            undo.pop_all()
    return notes


def down() -> list[str]:
    """End all processes of a lab and remove it, however much of it there is; returns what was found."""
    with _alone():
        found = _found()
        ended = lab_net.end(found, grace_s=_GRACE_S) if found else 0
        _remove()
    said = [f"{len(found) - (hub() in found)} islands removed"] if found else ["no lab was up"]
    return said + ([f"{ended} processes in them ended"] if ended else [])


def read() -> Lab:
    """The lab that is up; raises ValueError where there is none, or not a whole one, or where there can be none."""
    _check_machine()
    found, state = set(_found()), _state()
    if not found:
        raise ValueError(NONE_UP)
    content = json.loads(state.read_text(encoding="utf-8")) if state.exists() else None
    lab = None if content is None else Lab(**{**content, "link": Link(**content["link"])})
    missing = {"what was asked for"} if lab is None else {hub(), *map(namespace, range(lab.islands))} - found
    if lab is None or missing:
        raise ValueError(f"only a part of a lab is there, without {min(missing)}; remove it: dtrain lab down")
    return lab


def cut(one: int, other: int) -> None:
    """Drop the packets of two islands to each other, at the bridge; a cut is made once."""
    _change_pair(read(), one, other, severed=False)


def heal(one: int, other: int) -> None:
    _change_pair(read(), one, other, severed=True)


def cuts(lab: Lab) -> list[tuple[int, int]]:
    """Pairs of islands that are cut from each other."""
    from_whom = {island: lab_link.cut_off(hub(), _port(island)) for island in range(lab.islands)}
    return [(a, b) for b, severed in from_whom.items() for a in severed if a < b]


def slow(island: int, rate: str) -> None:
    """Hold an island's far link to another rate, up and down."""
    lab = read()
    check_island(lab, island)
    bits_per_s = _bits_per_s("slow", rate)
    arriving = lab_link.change(_port(island), bits_per_s, delay_s=lab.link.rtt_s / 2, loss=lab.link.loss)
    with _alone():
        lab_net.told("tc", "-n", namespace(island), lines=lab_link.change(DEVICE, bits_per_s))
        lab_net.told("tc", "-n", hub(), lines=arriving)


def kill(island: int) -> int:
    """SIGKILL to all processes of an island; returns how many there were."""
    check_island(read(), island)
    return lab_net.end([namespace(island)], grace_s=0.0)


def counted(lab: Lab) -> list[Counted]:
    """Of each island."""
    arriving = lab_link.sent_bytes(hub())
    return [Counted(lab_link.sent_bytes(namespace(i))[DEVICE], arriving[_port(i)]) for i in range(lab.islands)]


def check_island(lab: Lab, island: int) -> None:
    if not 0 <= island < lab.islands:
        raise ValueError(f"the lab has no island {island}; it has 0 to {lab.islands - 1}")


def label() -> str:
    """What the names of a lab begin with."""
    name = os.environ.get(NAME_VARIABLE, "lab")
    if not re.fullmatch(r"[a-z0-9]{1,32}", name):
        raise ValueError(f"{NAME_VARIABLE} = {name!r} names no lab; use up to 32 small letters and digits")
    return f"dtrain-{name}"


def namespace(island: int) -> str:
    return f"{label()}-{island}"


def hub() -> str:
    """The bridge's namespace."""
    return f"{label()}-hub"


def hub_address() -> str:
    """Where the launcher and the meeting point are."""
    return f"{_NETWORK}.1"


def address(island: int) -> str:
    return f"{_NETWORK}.{island + 2}"


def _port(island: int) -> str:
    return f"port{island}"


def _state() -> Path:
    return _STATES / f"{label()}.json"


def _found() -> list[str]:
    return lab_net.namespaces(rf"{label()}-(hub|\d+)")


def _make(lab: Lab) -> None:
    islands, per_packet = range(lab.islands), lab_link.segments(lab.link)
    lab_net.told("ip", lines=[f"netns add {namespace(i)}" for i in islands])
    bridge = f"link add {DEVICE} type bridge forward_delay 0 mcast_snooping 0"
    ends = (f"link add {_port(i)} type veth peer name {DEVICE} netns {namespace(i)}" for i in islands)
    ports = (f"link set {_port(i)} master {DEVICE} addrgenmode none up" for i in islands)
    home = (f"addr add {hub_address()}/24 dev {DEVICE}", "link set lo up", f"link set {DEVICE} addrgenmode none up")
    lab_net.told("ip", "-n", hub(), lines=[bridge, *ends, *home, *ports])
    shapes = list[str]()
    for i in islands:
        near = [address(j) for j in lab.near(i) if j != i]
        shapes += lab_link.shape(_port(i), lab.link, "src", near, delay_s=lab.link.rtt_s / 2, loss=lab.link.loss)
        lines = [f"addr add {address(i)}/24 dev {DEVICE}", "link set lo up"]
        lines.append(f"link set {DEVICE} addrgenmode none gso_max_segs {per_packet} up")
        lab_net.told("tc", "-n", namespace(i), lines=lab_link.shape(DEVICE, lab.link, "dst", near))
        lab_net.told("ip", "-n", namespace(i), lines=lines)
    lab_net.told("tc", "-n", hub(), lines=shapes)


def _remove() -> None:
    """Interfaces go with their namespaces."""
    if found := _found():
        lab_net.told("ip", lines=[f"netns del {name}" for name in found])
    _state().unlink(missing_ok=True)


def _clear_leftover() -> list[str]:
    """Remove what is there, unless somebody works in it."""
    found = _found()
    busy = [name for name, pids in lab_net.processes(found).items() if pids]
    if busy:
        raise ValueError(f"a lab is up, and processes run in {busy[0]}; wait for their end, or end them: dtrain lab down")
    _remove()
    return [f"a lab that was there is removed: {len(found)} namespaces"] if found else []


def _change_pair(lab: Lab, one: int, other: int, *, severed: bool) -> None:
    """Cut or heal both ways, where it is not so already."""
    for island in (one, other):
        check_island(lab, island)
    if one == other:
        raise ValueError(f"island {one} has no link to itself; name two islands")
    ways = [(a, b) for a, b in ((one, other), (other, one)) if (a in lab_link.cut_off(hub(), _port(b))) == severed]
    lines = [lab_link.heal(_port(b), a) if severed else lab_link.cut(_port(b), a, address(a)) for a, b in ways]
    with _alone():
        lab_net.told("tc", "-n", hub(), lines=lines)


@contextmanager
def _alone() -> Iterator[None]:
    """No two commands change a lab at once."""
    _check_machine()
    _STATES.mkdir(mode=0o755, exist_ok=True)
    held = os.open(_STATES, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)  # and with it the lock


def _check_machine() -> None:
    lab_net.check_tools()
    if os.geteuid() != 0:
        raise ValueError("a lab needs root, which lays network namespaces and links; use sudo")


def _near(islands: int, text: str) -> tuple[int, float]:
    number, colon, rate = text.partition(":")
    if not (colon and number.isdecimal()):
        raise ValueError(f"--near {text}: say how many islands are a group, and their rate, as 2:1gbit")
    if int(number) < 2 or int(number) >= islands or islands % int(number):
        fits = [str(n) for n in range(2, islands) if islands % n == 0]
        use = f"use {' or '.join(fits)}" if fits else "leave it out"
        raise ValueError(f"--near {text}: {islands} islands do not fall into two or more groups of {int(number)}; {use}")
    return int(number), _bits_per_s("--near", rate)


def _bits_per_s(option: str, text: str) -> float:
    try:
        rate = units.bits_per_s(text)
    except ValueError:
        rate = None
    if rate is None or not 1e4 <= rate <= 1e12:
        raise ValueError(f'{option} {text}: name a rate from 10kbit to 1tbit, as "100mbit"')
    return rate


def _seconds(text: str) -> float:
    try:
        rtt_s = units.seconds(text)
    except ValueError:
        rtt_s = -1.0
    if not 0 <= rtt_s <= 60:
        raise ValueError(f'--rtt {text}: name a time up to 60s, as "40ms"')
    return rtt_s


def _share(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text)
    if match is None or not float(match[1]) < 100:
        raise ValueError(f'--loss {text}: name a share of packets below 100%, as "0.1%"')
    return float(match[1]) / 100


def _rate(bits_per_s: float) -> str:
    names: Sequence[tuple[float, str]] = ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"))
    size, name = next(each for each in names if bits_per_s >= each[0])
    return f"{bits_per_s / size:g} {name}"
