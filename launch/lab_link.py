"""How is an interface held to a link's rate? By tc's htb, whose classes are the links: far, near, and one that drops everything.

htb counts a packet as it would be on the wire: a packet that stands for many segments counts the headers of each, which the
interface's own counter does not. So rates are with headers, and so are the bytes that a lab counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.launch.lab_net import asked, told

FRAME_BYTES = 1514
"""An Ethernet frame of 1,500 bytes."""

_FAR, _NEAR, _CUT = "1:1", "1:2", "1:3"
_NEAR_PREF = 1000
"""Filters are asked by rising preference; below it are those that cut, one an island."""
_AT_ONCE_S = 0.001
_BURST_S = 0.002
_QUEUE_S = 0.1
_FEWEST_FRAMES = 32


@dataclass(frozen=True, slots=True)
class Link:
    """What an island's link is like, each way."""

    bits_per_s: float
    near_bits_per_s: float | None = None
    rtt_s: float = 0.0
    loss: float = 0.0  # share of packets


def burst_bytes(bits_per_s: float) -> int:
    """What may leave at once after a pause: in t seconds no more leaves than this and bits_per_s * t / 8."""
    return max(2 * FRAME_BYTES, int(bits_per_s / 8 * _BURST_S))


def segments(link: Link) -> int:
    """How many segments may leave as one packet: what the faster link carries in a millisecond. More at once would be a burst;
    fewer cost more CPU than a fast link has. One where packets are lost, so that one is lost at a time."""
    fastest = max(link.bits_per_s, link.near_bits_per_s or 0.0)
    return 1 if link.loss else min(64, max(1, int(fastest / 8 * _AT_ONCE_S / FRAME_BYTES)))


def shape(device: str, link: Link, end: str, near: Sequence[str], *, delay_s: float = 0.0, loss: float = 0.0) -> list[str]:
    """tc's commands for a bare interface. ``near``: addresses that are near where they are a packet's ``end``, src or dst."""
    root = f"qdisc add dev {device} root handle 1: htb default {_FAR[2:]}"
    lines = [root, *_far(device, "add", link.bits_per_s, delay_s, loss)]
    if link.near_bits_per_s is not None:
        lines += [_class(device, "add", _NEAR, link.near_bits_per_s), _queue(device, "add", _NEAR, link.near_bits_per_s)]
        lines += [
            f"filter add dev {device} parent 1: protocol ip pref {_NEAR_PREF} u32 match ip {end} {address}/32 flowid {_NEAR}"
            for address in near
        ]
    # What it gets is thrown away, so its rate is of no account.
    dropping = _class(device, "add", _CUT, link.bits_per_s), f"qdisc add dev {device} parent {_CUT} handle 13: blackhole"
    return [*lines, *dropping]


def check_netem(namespace: str) -> None:
    """Raises ValueError where the kernel cannot delay or lose packets; tried in a namespace that is given up if it cannot."""
    try:
        told("tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except ValueError:
        raise ValueError(
            "this kernel has no netem, so that a lab cannot shape --rtt or --loss here; leave them out: link.rtt in the job file "
            "throttles instead"
        ) from None
    told("tc", "-n", namespace, "qdisc", "del", "dev", "lo", "root")


def change(device: str, bits_per_s: float, *, delay_s: float = 0.0, loss: float = 0.0) -> list[str]:
    """Another rate for the far link; the rest as ``shape`` was told."""
    return _far(device, "change", bits_per_s, delay_s, loss)


def cut(device: str, island: int, address: str) -> str:
    """Drop what comes from an island."""
    return f"filter add dev {device} parent 1: protocol ip pref {island + 1} u32 match ip src {address}/32 flowid {_CUT}"


def heal(device: str, island: int) -> str:
    return f"filter del dev {device} parent 1: protocol ip pref {island + 1}"


def cut_off(namespace: str, device: str) -> list[int]:
    """The islands whose packets are dropped."""
    filters = asked("tc", "-n", namespace, "filter", "show", "dev", device, "parent", "1:")
    return sorted({each["pref"] - 1 for each in filters if each["pref"] < _NEAR_PREF})


def rates(namespace: str, device: str) -> list[str]:
    """Of the far and, where there is one, the near link, as tc writes them."""
    lines = told("tc", "-n", namespace, "class", "show", "dev", device)
    found = dict(re.findall(r"^class htb (\S+) .*? rate (\S+)", lines, flags=re.MULTILINE))
    return [found[name].lower() for name in (_FAR, _NEAR) if name in found]


def sent_bytes(namespace: str) -> dict[str, int]:
    """What left by each shaped interface of a namespace, headers counted."""
    queues = asked("tc", "-n", namespace, "-s", "qdisc", "show")
    return {each["dev"]: each["bytes"] for each in queues if each["kind"] == "htb"}


def _far(device: str, do: str, bits_per_s: float, delay_s: float, loss: float) -> list[str]:
    queue = _queue(device, do, _FAR, bits_per_s)
    if delay_s or loss:
        frames = int(bits_per_s / 8 * (delay_s + _QUEUE_S) / FRAME_BYTES) + _FEWEST_FRAMES
        queue = f"qdisc {do} dev {device} parent {_FAR} handle 11: {_netem(delay_s, loss)} limit {frames}"
    return [_class(device, do, _FAR, bits_per_s), queue]


def _class(device: str, do: str, name: str, bits_per_s: float) -> str:
    rate, burst = f"{bits_per_s:.0f}bit", burst_bytes(bits_per_s)
    return (
        f"class {do} dev {device} parent 1: classid {name} htb rate {rate} ceil {rate} burst {burst} cburst {burst} "
        f"quantum {2 * FRAME_BYTES}"
    )


def _queue(device: str, do: str, name: str, bits_per_s: float) -> str:
    """What waits for its turn: as much as leaves in a tenth of a second. The rest is lost, as in a router."""
    room = max(_FEWEST_FRAMES * FRAME_BYTES, int(bits_per_s / 8 * _QUEUE_S))
    return f"qdisc {do} dev {device} parent {name} handle 1{name[2:]}: bfifo limit {room}"


def _netem(delay_s: float, loss: float) -> str:
    delay, lost = f" delay {delay_s * 1e6:.0f}us" if delay_s else "", f" loss {100 * loss:g}%" if loss else ""
    return f"netem{delay}{lost}"
