"""Where do the islands of a run find each other? At a store that the launcher owns.

It is plain TCP and asks nobody who he is, so it listens on loopback unless the job names a network: one you trust, or a VPN.

The socket is opened first and the store is made on it later: the islands start while this process still imports torch, and
their first words wait in the socket's queue.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import TYPE_CHECKING

from dtrain.sections import LinkSection

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def listen(link: LinkSection) -> tuple[socket.socket, str]:
    """The listening socket, and "host:port" as islands see it; loopback unless the job names an interface or an address."""
    address = _address(link)
    try:
        listener = socket.create_server((address, link.port), backlog=1024)
    except (OSError, OverflowError) as e:
        raise ValueError(f"link.port = {link.port} cannot be opened on {address}: {e}; use another, or 0 (a free one)") from None
    host = link.advertise or ("127.0.0.1" if address == "0.0.0.0" else address)
    return listener, f"{host}:{listener.getsockname()[1]}"


def serve(listener: socket.socket) -> TCPStore:
    """Start the store on the socket, which it owns from here on."""
    from torch._C._distributed_c10d import TCPStore

    address, port = listener.getsockname()
    host = "127.0.0.1" if address == "0.0.0.0" else address
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _address(link: LinkSection) -> str:
    if link.interface:
        return interface_address(link.interface)
    if not link.advertise or link.advertise == "localhost":
        return "127.0.0.1"
    try:
        return "127.0.0.1" if ipaddress.ip_address(link.advertise).is_loopback else "0.0.0.0"
    except ValueError:  # a host name
        return "0.0.0.0"


def interface_address(name: str) -> str:
    """Its IPv4 address; raises ValueError where there is no such interface, or none."""
    import fcntl

    known = [interface for _, interface in socket.if_nameindex()]
    if name not in known:
        raise ValueError(f"link.interface = {name!r} is not an interface of this machine; it has {', '.join(known)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as e:
            raise ValueError(f"link.interface = {name!r} has no IPv4 address: {e.strerror}; name another interface") from None
    return socket.inet_ntoa(answer[20:24])
