"""What does one island do while ``tests.bench.lab`` measures? It sends, receives, and says how many bits a second came.

    python -m tests.bench.lab_island one_way|socket|gloo NODE BYTES ADDRESS_0 ADDRESS_1

A sixth of the bytes comes first, so that the connection is under way when the clock starts."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable

from dtrain.launch import lab

_PORT = 4711  # in a namespace of its own
_WIRES = 24
_WARM_WIRES = 4


def one_way(node: int, num_bytes: int, addresses: list[str]) -> float | None:
    """Counted by the kernel at island 1's interface, headers included; None of island 0, which sends."""
    with _connection(node, addresses) as link:
        if node == 0:
            link.sendall(bytes(num_bytes * 7 // 6))
            link.shutdown(socket.SHUT_WR)
            link.recv(1)  # until all has come
            return None
        _receive(link, num_bytes // 6)
        began, before = time.monotonic(), _counted()
        _receive(link, num_bytes)
        seconds, after = time.monotonic() - began, _counted()
        return (after - before) * 8 / seconds


def both_by_socket(node: int, num_bytes: int, addresses: list[str]) -> float:
    """Payload that came, while as much went."""
    with _connection(node, addresses) as link:
        sender = threading.Thread(target=link.sendall, args=(bytes(num_bytes * 7 // 6),))
        sender.start()
        _receive(link, num_bytes // 6)
        began = time.monotonic()
        _receive(link, num_bytes)
        seconds = time.monotonic() - began
        sender.join()
        link.shutdown(socket.SHUT_WR)
        link.recv(1)
        return num_bytes * 8 / seconds


def both_by_gloo(node: int, num_bytes: int, addresses: list[str]) -> float:
    """The same by dtrain's transport: wires of one bucket after the other."""
    import torch
    from torch._C._distributed_c10d import TCPStore

    from dtrain.transport.base import ROUND, Tag
    from dtrain.transport.c10d import GlooTransport

    store = TCPStore(addresses[0], _PORT, world_size=2, is_master=node == 0)
    transport = GlooTransport(store, "bench", node, 2, interface=lab.DEVICE, connect_s=30)
    wire_bytes = num_bytes // (_WIRES - _WARM_WIRES)
    tags = [Tag(ROUND, 0, bucket, 0) for bucket in range(_WIRES)]
    for tag in tags:
        transport.expect(1 - node, tag, wire_bytes)
    wire = torch.zeros(wire_bytes, dtype=torch.uint8)
    for tag in tags:
        transport.post(1 - node, tag, wire)
    moments = list[float]()
    for tag in tags:
        with transport.inbox.changed:
            came = transport.inbox.changed.wait_for(lambda tag=tag: transport.inbox.has(1 - node, tag), timeout=100)
        assert came, transport.inbox.lost()
        moments.append(time.monotonic())
    store.set(f"done{node}", "1")
    store.wait([f"done{1 - node}"])
    transport.close(drain_s=10)
    return (_WIRES - _WARM_WIRES) * wire_bytes * 8 / (moments[-1] - moments[_WARM_WIRES - 1])


def _connection(node: int, addresses: list[str]) -> socket.socket:
    if node == 1:
        with socket.create_server((addresses[1], _PORT)) as listener:
            return listener.accept()[0]
    until = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection((addresses[1], _PORT))
        except ConnectionRefusedError:  # it imports Python still
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _receive(link: socket.socket, num_bytes: int) -> None:
    room = bytearray(1 << 20)
    while num_bytes:
        got = link.recv_into(room, min(num_bytes, len(room)))
        if not got:
            raise EOFError(f"{num_bytes} bytes did not come")
        num_bytes -= got


def _counted() -> int:
    return lab.counted(lab.read())[1].received


def main() -> None:
    what, node, num_bytes, *addresses = sys.argv[1:]
    do: dict[str, Callable[[int, int, list[str]], float | None]]
    do = {"one_way": one_way, "socket": both_by_socket, "gloo": both_by_gloo}
    print(json.dumps(do[what](int(node), int(num_bytes), addresses)))


if __name__ == "__main__":
    main()
