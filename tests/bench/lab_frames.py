"""Of what are the bytes that an island of a lab sends? Runs in the island's namespace until SIGTERM, and then says it as JSON.

    python -m tests.bench.lab_frames

Frames to other islands that carry something: their payload and their headers (Ethernet 14, IP 20, TCP 32 bytes); frames that
acknowledge alone; all else, which is to the meeting point but for the question whose an address is."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator

from dtrain.launch import lab

_ETHERNET, _IPV4, _TCP = 14, 0x0800, 6
_EVERY_PROTOCOL = 3  # linux/if_ether.h
_RECEIVE_BUFFER_FORCE, _RECEIVE_BUFFER_BYTES = 33, 64 * 2**20  # SO_RCVBUFFORCE: busy cores leave frames to wait here
_LOST = 6  # linux/if_packet.h: PACKET_STATISTICS
_HEAD = 128


def payload_and_rest(head: bytes, meeting_point: bytes) -> tuple[int, str]:
    """Of a frame by its first bytes: how many bytes are payload, and what the others are."""
    ip = head[_ETHERNET:]
    if int.from_bytes(head[12:14]) != _IPV4 or ip[9] != _TCP or ip[16:20] == meeting_point:
        return 0, "meeting point"
    ip_bytes = (ip[0] & 15) * 4
    tcp_bytes = (ip[ip_bytes + 12] >> 4) * 4
    payload = int.from_bytes(ip[2:4]) - ip_bytes - tcp_bytes
    return payload, "headers" if payload else "acknowledgements"


def main() -> None:
    sent = {"payload": 0, "headers": 0, "acknowledgements": 0, "meeting point": 0}
    meeting_point = socket.inet_aton(lab.hub_address())
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL)) as tap:
        tap.setsockopt(socket.SOL_SOCKET, _RECEIVE_BUFFER_FORCE, _RECEIVE_BUFFER_BYTES)
        tap.bind((lab.DEVICE, _EVERY_PROTOCOL))
        print("counts", flush=True)
        for head, num_bytes in _frames(tap):
            payload, rest = payload_and_rest(head, meeting_point)
            sent["payload"] += payload
            sent[rest] += num_bytes - payload
        lost = int.from_bytes(tap.getsockopt(263, _LOST, 8)[4:], "little")  # SOL_PACKET: two numbers, all and lost
    print(json.dumps(sent | {"lost_frames": lost}))


def _frames(tap: socket.socket) -> Iterator[tuple[bytes, int]]:
    """The beginning of each frame that goes out, and how long it is, until SIGTERM and none is left."""
    ended = list[int]()
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    room = bytearray(_HEAD)
    tap.settimeout(0.2)
    while True:
        try:
            num_bytes, address = tap.recvfrom_into(room, _HEAD, socket.MSG_TRUNC)
        except TimeoutError:
            if ended:
                return
            continue
        if address[2] == socket.PACKET_OUTGOING:
            yield bytes(room), num_bytes


if __name__ == "__main__":
    main()
