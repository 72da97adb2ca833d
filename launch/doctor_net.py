"""Which ports of this machine can others reach, and what of another machine can this one? Found by connecting, nothing is sent.

A port that drops what comes is told from a machine that is away by trying other ports of it: whoever is there refuses some of
them. A rule for one interface alone is not seen from the same machine, where all goes over loopback; ``doctor_meet.py`` asks the
other side."""

from __future__ import annotations

import errno
import os
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtrain.launch.doctor import Asked, Finding, State
from dtrain.launch.meeting import address_of, interface_address

CONNECT_S = 3.0
"""A connection that was not answered by then was asked for three times: after 0, 1 and 3 s."""
_OTHER_PORTS = (1, 22, 80, 443)
"""Of which a machine that is there has some open or refuses them."""
_LOOPBACK = "127.0.0.1"
_USUAL_PORT = 29400
"""torchrun's own for a meeting point, 0 of a job being any."""

How = Literal["open", "refused", "blocked", "silent", "unknown"]
"""refused: the machine answers, and says that nobody listens; blocked: it is there, and its firewall (or one between) keeps us
from this port; silent: nothing of it answers; unknown: no such name."""


@dataclass(frozen=True, slots=True)
class Reached:
    """What came of connecting to a port."""

    how: How
    detail: str = ""
    connection: socket.socket | None = None
    """Open where ``how`` is."""


@dataclass(frozen=True, slots=True)
class Route:
    """Somebody who must reach a port, and what for."""

    source: str
    target: str
    ports: str
    purpose: str


def reach(host: str, port: int, timeout_s: float = CONNECT_S) -> Reached:
    try:
        return Reached("open", connection=socket.create_connection((host, port), timeout=timeout_s))
    except socket.gaierror as e:
        return Reached("unknown", e.strerror or str(e))
    except ConnectionRefusedError:
        return Reached("refused")
    except OSError as e:  # a time-out too, which has no number
        detail = "no answer" if isinstance(e, TimeoutError) else e.strerror or str(e)
        return Reached("blocked" if _is_there(host, port, timeout_s) else "silent", detail)


def closed(reached: Reached) -> How:
    if reached.connection is not None:
        reached.connection.close()
    return reached.how


def _is_there(host: str, port: int, timeout_s: float) -> bool:
    """Whether any other port answers, be it by refusing."""

    def answers(other: int) -> bool:
        try:
            socket.create_connection((host, other), timeout=timeout_s).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True

    others = [other for other in (*_OTHER_PORTS, port - 1) if other != port and other > 0]
    with ThreadPoolExecutor(len(others)) as pool:
        return any(list(pool.map(answers, others)))


# ---- this machine


def interfaces() -> Mapping[str, str | None]:
    """Their IPv4 addresses by name; None of one that has none."""
    found: dict[str, str | None] = {}
    for _, name in socket.if_nameindex():
        try:
            found[name] = interface_address(name)
        except ValueError:
            found[name] = None
    return found


def outward(known: Mapping[str, str | None]) -> str | None:
    """The first interface that other machines may see."""
    return next((name for name, address in known.items() if address and not address.startswith("127.")), None)


def ephemeral_ports(file: Path = Path("/proc/sys/net/ipv4/ip_local_port_range")) -> tuple[int, int]:
    """The kernel's range for ports that nobody named, as gloo's are."""
    try:
        first, last = map(int, file.read_text(encoding="ascii").split())
    except OSError:
        return 32768, 60999  # Linux's own
    return first, last


def let_in(ports: str) -> str:
    """``ports``: "29400", or "32768:60999"."""
    return f"iptables -I INPUT -p tcp --dport {ports} -j ACCEPT"


def local_network(asked: Asked | None) -> Iterator[Finding]:
    known = interfaces()
    with_address = ", ".join(f"{name} {address}" for name, address in known.items() if address)
    bare = [name for name, address in known.items() if not address]
    yield Finding("interfaces", "ok", with_address + (f"; without an IPv4 address: {', '.join(bare)}" if bare else ""))
    trouble = None if asked is None else _link_interface(asked, known)
    if trouble is not None:
        yield trouble
        return
    if asked is None:
        yield _gloo_ports(_LOOPBACK)
        return
    address = address_of(asked.job.link)
    if asked.job.link.advertise:
        yield _advertise(asked, known)
    yield from _meeting_port(asked, address)
    yield _gloo_ports(address if asked.job.link.interface else _LOOPBACK)
    if address != _LOOPBACK and not asked.job.link.interface:
        yield gloo_on_loopback(asked, "warn")


def gloo_on_loopback(asked: Asked, state: State) -> Finding:
    """Of a job that names no interface, whose islands are to be on several machines."""
    what = "empty: gloo stays on loopback, where no other machine reaches it"
    return Finding("link.interface", state, what, asked.again(f"link.interface={outward(interfaces()) or 'lo'}"))


def _link_interface(asked: Asked, known: Mapping[str, str | None]) -> Finding | None:
    name = asked.job.link.interface
    if not name or known.get(name):
        return None
    other = asked.again(f"link.interface={outward(known) or 'lo'}")
    what = "has no IPv4 address" if name in known else "is no interface of this machine"
    return Finding("link.interface", "fail", f"{name} {what}", other)


def _advertise(asked: Asked, known: Mapping[str, str | None]) -> Finding:
    name, found = asked.job.link.advertise, outward(known)
    try:
        address = socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0]
    except OSError as e:
        mine = (known[found] if found else None) or _LOOPBACK
        return Finding("link.advertise", "fail", f"{name}: {e.strerror}", asked.again(f"link.advertise={mine}"))
    return Finding("link.advertise", "ok", f"{name}, {address}")


def _meeting_port(asked: Asked, address: str) -> Iterator[Finding]:
    """Whether link.port can be opened, and be reached."""
    port = asked.job.link.port
    if port == 0:
        if address == _LOOPBACK:
            yield Finding("link.port", "ok", "0, a free one of loopback")
        else:
            what = f"0, any free one of {address}: no firewall can be told to let it in"
            yield Finding("link.port", "warn", what, asked.again(f"link.port={_USUAL_PORT}"))
        return
    try:
        listener = socket.create_server((address, port))
    except OSError as e:
        yield Finding("link.port", "fail", f"{port} {_why_not_opened(e, port)}", asked.again(f"link.port={free_port(address)}"))
        return
    with listener:
        yield _from_here("link.port", address, port, str(port), f"{port}, free on {address}")


def _gloo_ports(address: str) -> Finding:
    first, last = ephemeral_ports()
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        return _from_here("gloo ports", address, port, f"{first}:{last}", f"{first} to {last}, {port} tried on {address}")


def _from_here(name: str, address: str, port: int, ports: str, well: str) -> Finding:
    """Of a port that is open: nobody can reach it whom this machine's own firewall keeps out."""
    host = _LOOPBACK if address == "0.0.0.0" else address
    how = closed(reach(host, port))
    if how == "open":
        return Finding(name, "ok", well)
    return Finding(name, "fail", f"{port} is open on {address} and cannot be reached: a firewall here drops it", let_in(ports))


def _why_not_opened(e: OSError, port: int) -> str:
    match e.errno:
        case errno.EADDRINUSE:
            return f"is in use{holder(port)}"
        case errno.EACCES | errno.EPERM:
            return "is for root alone"
        case _:
            return f"cannot be opened: {e.strerror}"


def holder(port: int, proc: Path = Path("/proc")) -> str:
    """" by NAME, process 123", as far as that is told."""
    sockets = {
        cells[9]
        for table in ("net/tcp", "net/tcp6") if (proc / table).exists()
        for line in (proc / table).read_text(encoding="ascii").splitlines()[1:]
        if (cells := line.split())[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port  # 0A: it listens
    }  # fmt: skip
    for link in proc.glob("[0-9]*/fd/*"):
        try:
            held = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
            if held and held[1] in sockets:
                owner = link.parents[1]
                return f" by {(owner / 'comm').read_text(encoding='utf-8').strip()}, process {owner.name}"
        except OSError:  # it ended just now, or belongs to somebody else
            continue
    return ""


def free_port(address: str) -> int:
    """The usual one for a meeting point, or the next that is free; it is not kept."""
    for port in range(_USUAL_PORT, _USUAL_PORT + 100):
        try:
            socket.create_server((address, port)).close()
        except OSError:
            continue
        return port
    return 0


# ---- from here to there


def refusal(name: str, host: str, port: int, reached: Reached) -> Finding:
    """Why a port of another machine was not reached."""
    place = f"{host}:{port}"
    match reached.how:
        case "unknown":
            return Finding(name, "fail", f"{host} is no host that is known here: {reached.detail}", "hostname -I  # on that host")
        case "refused":
            what = f"{place} refuses: the host is there, and nothing listens on that port"
            return Finding(name, "fail", what, f"dtrain doctor --serve {port}  # on {host}")
        case "blocked":
            what = f"{place} is blocked ({reached.detail}): the host answers on other ports, a firewall keeps this one"
            return Finding(name, "fail", what, f"{let_in(str(port))}  # on {host}")
        case _:
            what = f"{place} timed out: no port of that host answers" if reached.detail == "no answer" else (
                f"{place} cannot be reached, nor another port of that host: {reached.detail}"
            )
            return Finding(name, "fail", what, f"ping -c 3 {shlex.quote(host)}")


def routes(asked: Asked | None, meet: tuple[str, int] | None) -> list[Route]:
    """What must be let in, where."""
    first, last = ephemeral_ports()
    link = None if asked is None else asked.job.link
    near = link is not None and not link.interface and address_of(link) == _LOOPBACK
    if meet is None and (link is None or near):
        return [
            Route("every island", "the launcher, 127.0.0.1", "any", "the meeting point"),
            Route("every island", "every other, 127.0.0.1", "any", "gloo; other machines reach none of it"),
        ]
    host, port = meet or (link.advertise if link is not None and link.advertise else "the launcher", link.port if link else 0)
    on = f" on {link.interface}" if link is not None and link.interface else ""
    return [
        Route("every island", host, str(port) if port else f"any of {first}-{last}", "the meeting point"),
        Route("every island", f"every other island{on}", f"{first}-{last}", "gloo, as the kernel gives it ports; both ways"),
    ]
