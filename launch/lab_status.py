"""What is up in a lab now? All of it asked of the kernel."""

from __future__ import annotations

from dtrain import units
from dtrain.launch import lab, lab_link, lab_net
from dtrain.launch.lab import Lab

HEADER = ["island", "namespace", "rate", "cut from", "processes", "sent", "received"]


def rows(there: Lab) -> list[list[str]]:
    """One of each island. Its rate is that of its uplink; with --near, the far one and the near one."""
    counted, cuts = lab.counted(there), lab.cuts(there)
    running = lab_net.processes(map(lab.namespace, range(there.islands)))
    found = list[list[str]]()
    for island, count in enumerate(counted):
        name = lab.namespace(island)
        rate = ", near ".join(lab_link.rates(name, lab.DEVICE))
        severed = [str(b if a == island else a) for a, b in cuts if island in (a, b)]
        sent, received = units.show_bytes(count.sent), units.show_bytes(count.received)
        found.append([str(island), name, rate, " ".join(severed), str(len(running[name])), sent, received])
    return found
