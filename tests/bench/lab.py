"""Do the links of ``dtrain lab`` carry what was asked, and does dtrain's transport use what they carry?

    python -m tests.bench.lab                     (about three minutes, as root; nothing else should use the cores)

Two islands. First one plain TCP connection, from island 0 to island 1: bytes that the kernel counted at island 1's interface
between two moments, headers and all, over the seconds between them. Then both send to each other at once, by one plain TCP
connection and by dtrain's gloo transport: payload of a second, and how the two compare. Median of three."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

from dtrain.launch import lab
from tests.bench.runs import ROOT, arguments, hardware, save

RATES = {"1mbit": 1e6, "10mbit": 1e7, "100mbit": 1e8, "1gbit": 1e9}
EXCHANGED = ("10mbit", "100mbit")
SECONDS, TIMES = 5.0, 3


def main(rates: list[str]) -> None:
    rows = list[dict[str, Any]]()
    for rate in rates:
        lab.up(lab.parse(2, rate))
        try:
            rows.append(_row(rate))
        finally:
            lab.down()
        print(_line(rows[-1]), flush=True)
    if rates == list(RATES):
        path = save("lab", {"command": "python -m tests.bench.lab", "hardware": hardware(), "rates": rows})
        print(f"written to {path.relative_to(ROOT)}")


def _row(rate: str) -> dict[str, Any]:
    one_way = median(_pair("one_way", RATES[rate]) for _ in range(TIMES))
    row = {"rate": rate, "counted_bits_per_s": one_way, "of_asked": one_way / RATES[rate]}
    if rate in EXCHANGED:
        socket, gloo = zip(*((_pair("socket", RATES[rate]), _pair("gloo", RATES[rate])) for _ in range(TIMES)), strict=True)
        row |= {"socket_bits_per_s": median(socket), "gloo_bits_per_s": median(gloo)}
        row["gloo_of_socket"] = row["gloo_bits_per_s"] / row["socket_bits_per_s"]
    return row


def _pair(what: str, bits_per_s: float) -> float:
    """Bits a second, as the slower island of the two saw them."""
    num_bytes, island = int(bits_per_s / 8 * SECONDS), (sys.executable, "-m", "tests.bench.lab_island")
    children = [
        subprocess.Popen(
            ["ip", "netns", "exec", lab.namespace(node), *island, what, str(node), str(num_bytes), *map(lab.address, (0, 1))],
            cwd=ROOT,
            env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},  # it warns of each address that has no name
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    seen = [json.loads(child.communicate(timeout=120)[0]) for child in children]
    return min(each for each in seen if each is not None)


def _line(row: dict[str, Any]) -> str:
    line = f"{row['rate']:>8}  one way {row['counted_bits_per_s'] / 1e6:9.3f} Mbit/s, {row['of_asked']:.2%} of what was asked"
    if "gloo_of_socket" in row:
        socket, gloo = row["socket_bits_per_s"] / 1e6, row["gloo_bits_per_s"] / 1e6
        line += f"; both ways, payload: socket {socket:.3f}, gloo {gloo:.3f} Mbit/s, {row['gloo_of_socket']:.2%}"
    return line


if __name__ == "__main__":
    main(arguments(__doc__, tuple(RATES)))
