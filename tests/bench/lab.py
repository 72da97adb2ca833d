"""Do the links of ``dtrain lab`` carry what was asked, and does dtrain's transport use what they carry?

    python -m tests.bench.lab                     (about six minutes, as root; nothing else should use the cores)
    python -m tests.bench.lab readme              (writes what was measured last into the README)

Two islands. First one plain TCP connection, from island 0 to island 1: bytes that the kernel counted at island 1's interface
between two moments, headers and all, over the seconds between them. Then both send to each other at once, by one plain TCP
connection and by dtrain's gloo transport: payload of a second, and how the two compare. Median of three. Last a job, the
quickstart: bytes at an island's interface beside those that the run says it sent, and of what those are that it does not say."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from dtrain.launch import lab, lab_run
from dtrain.launch.islands import folder as part_folder
from dtrain.metrics import read_part
from tests.bench.runs import JOB, RESULTS, ROOT, arguments, hardware, save

RATES = {"1mbit": 1e6, "10mbit": 1e7, "100mbit": 1e8, "1gbit": 1e9}
EXCHANGED = ("10mbit", "100mbit")
SECONDS, TIMES = 5.0, 3
WITH_A_JOB = "10mbit"
_CAPTION = "What a lab's links carry"
_COLUMNS = {
    "counted at the interface, of what was asked": "of_asked",
    "gloo both ways, of a plain socket": "gloo_of_socket",
    "sent at the interface by the quickstart, of what it says": "sent_of_said",
}


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


def readme(measured: dict[str, Any]) -> list[str]:
    """What the README says of it: a line with the place and the day, and the table."""
    at = measured["hardware"]
    day = datetime.date.fromisoformat(at["date"])
    file = "tests/bench/results/lab.json"
    lines = [
        f"{_CAPTION} (`{measured['command']}`, six minutes as root, [`{file}`]({file});",
        f"{at['cores']} cores of an {at['cpu']}, {day.day} {day:%B %Y}):",
        "",
    ]
    columns = {name: key for name, key in _COLUMNS.items() if any(key in row for row in measured["rates"])}
    rows = [[_shown(row["rate"]), *(_percent(row.get(key)) for key in columns.values())] for row in measured["rates"]]
    header = f"| link of a lab | {' | '.join(columns)} |"
    return [*lines, header, f"|{'---|' * (1 + len(columns))}", *(f"| {' | '.join(cells)} |" for cells in rows)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _shown(rate: str) -> str:
    """``"10mbit"`` -> "10 Mbit/s"."""
    return re.sub(r"(\d+)(\w)(bit)", lambda found: f"{found[1]} {found[2].upper()}{found[3]}/s", rate)


def write_readme() -> None:
    path = ROOT / "README.md"
    measured = json.loads((RESULTS / "lab.json").read_text(encoding="utf-8"))
    block = re.compile(rf"^{_CAPTION} .*\n(?:.+\n)*\n(?:\|.*\n)+", flags=re.MULTILINE)  # to the end of the table
    text, found = block.subn("\n".join([*readme(measured), ""]), path.read_text(encoding="utf-8"))
    assert found == 1, "the README says it once"
    path.write_text(text, encoding="utf-8")


def _row(rate: str) -> dict[str, Any]:
    one_way = median(_pair("one_way", RATES[rate]) for _ in range(TIMES))
    row = {"rate": rate, "counted_bits_per_s": one_way, "of_asked": one_way / RATES[rate]}
    if rate in EXCHANGED:
        socket, gloo = zip(*((_pair("socket", RATES[rate]), _pair("gloo", RATES[rate])) for _ in range(TIMES)), strict=True)
        row |= {"socket_bits_per_s": median(socket), "gloo_bits_per_s": median(gloo)}
        row["gloo_of_socket"] = row["gloo_bits_per_s"] / row["socket_bits_per_s"]
    if rate == WITH_A_JOB:
        row |= _job()
    return row


def _job() -> dict[str, Any]:
    """Of the island with more bytes at its interface, as ``dtrain lab run`` shows them, and as the frames there were counted."""
    with tempfile.TemporaryDirectory() as folder, _frames_counted() as counted:
        words = ["lab", "run", str(JOB), f"job.dir={folder}", "job.name=counted", "islands.threads=1"]
        command = [sys.executable, "-m", "dtrain.launch", *words]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
        says = [lab_run.posted(read_part(part_folder(Path(folder, "counted"), island))) for island in (0, 1)]
    shown = [float(line.split()[-1]) for line in done.stdout.splitlines()[-2:]]
    island = shown.index(max(shown))
    sent = counted[island]
    assert not sent.pop("lost_frames"), "too busy cores: measure again"
    sent["gloo's words"] = sent.pop("payload") - says[island]
    return {"sent_of_said": shown[island], "beside_what_is_said": {name: bytes_ / says[island] for name, bytes_ in sent.items()}}


@contextmanager
def _frames_counted() -> Iterator[list[dict[str, int]]]:
    """By island, at the end; empty until then."""
    command, counted = (sys.executable, "-m", "tests.bench.lab_frames"), list[dict[str, int]]()
    children = [
        subprocess.Popen(
            ["ip", "netns", "exec", lab.namespace(island), *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for island in (0, 1)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "counts\n"
        yield counted
    finally:
        for child in children:
            child.terminate()
        counted += [json.loads(child.communicate(timeout=60)[0]) for child in children]


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
    if "sent_of_said" in row:
        beside = ", ".join(f"{name} {share:.2%}" for name, share in row["beside_what_is_said"].items())
        line += f"; a job's bytes at the interface, {row['sent_of_said']:.1%} of what it says: beside it {beside}"
    return line


if __name__ == "__main__":
    write_readme() if sys.argv[1:] == ["readme"] else main(arguments(__doc__, tuple(RATES)))
