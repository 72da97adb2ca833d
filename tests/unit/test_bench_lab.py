"""Are a frame's bytes told apart as the protocols' own pages lay them out?"""

from __future__ import annotations

import struct

from tests.bench.lab_frames import payload_and_rest

ISLANDS, HUB = (bytes((10, 77, 0, 2)), bytes((10, 77, 0, 3))), bytes((10, 77, 0, 1))
PADDED = 12  # of TCP's options: a time stamp and two fillers


def frame(payload: int, to: bytes = ISLANDS[1], *, protocol: int = 6, options: int = PADDED) -> bytes:
    """RFC 791 and 9293, without what is not read."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + options + payload, 0, 0, 64, protocol, 0, ISLANDS[0], to)
    tcp = struct.pack("!HHIIBBHHH", 40407, 56486, 0, 0, (20 + options) // 4 << 4, 0x10, 0, 0, 0)
    return bytes(12) + b"\x08\x00" + ip + tcp + bytes(options + payload)


def test_a_frame_is_payload_headers_an_acknowledgement_or_of_the_meeting_point() -> None:
    for payload in (1, 48, 1448):
        assert payload_and_rest(frame(payload)[:128], HUB) == (payload, "headers")
    assert payload_and_rest(frame(1460, options=0)[:128], HUB) == (1460, "headers")
    assert payload_and_rest(frame(0)[:128], HUB) == (0, "acknowledgements")
    assert payload_and_rest(frame(48, HUB)[:128], HUB) == (0, "meeting point")
    assert payload_and_rest(frame(48, protocol=17)[:128], HUB) == (0, "meeting point")
    question = bytes(12) + b"\x08\x06" + bytes(28)  # RFC 826: who has this address
    assert payload_and_rest(question.ljust(128, b"\0"), HUB) == (0, "meeting point")
