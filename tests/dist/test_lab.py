"""Does a lab hold links to their rates, cut and heal them, count what crosses them, and leave nothing behind?

Real namespaces and queues: needs root, ip and tc. Each test has a lab beside others (DTRAIN_LAB)."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.launch import lab, lab_link, lab_net
from dtrain.launch.cli import run_command
from dtrain.launch.lab import parse
from dtrain.launch.lab_link import Link
from tests.dist.job import until
from tests.dist.lab_sockets import a_lab_of_its_own, datagrams, flow, needs_root, stream
from tests.unit.small_run import write_job_file

UDP_BYTES = 14 + 20 + 8
"""Headers of a datagram: Ethernet, IP, UDP."""
LARGEST_PACKET = 64 * 1024 + UDP_BYTES


@pytest.fixture(autouse=True)
def own_lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with a_lab_of_its_own(monkeypatch):
        yield


def kernel() -> dict[str, object]:
    """What of this machine's network a lab could leave behind."""
    rules = subprocess.run(["iptables", "-S"], capture_output=True, text=True, check=False) if shutil.which("iptables") else None
    return {
        "links": lab_net.asked("ip", "link"),
        "routes": lab_net.asked("ip", "-4", "route", "show", "table", "all"),
        "queues": lab_net.asked("tc", "qdisc", "show"),
        "namespaces": lab_net.namespaces(rf"{lab.hub().removesuffix('-hub')}.*"),
        "rules": rules and rules.stdout,
        "files": sorted(path.name for path in Path("/run/dtrain").glob(f"{lab.hub().removesuffix('-hub')}*")),
    }


@needs_root
def test_twenty_labs_leave_nothing_behind() -> None:
    before = kernel()
    assert before["namespaces"] == []
    for _ in range(20):
        assert lab.up(parse(2, "100mbit")) == []
        lab.read()
        assert lab.down() == ["2 islands removed"]
    assert kernel() == before
    assert lab.down() == ["no lab was up"]


@needs_root
def test_a_lab_that_cannot_be_finished_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second island's queue is refused: nothing of the first is left."""
    before = kernel()
    shape = lab_link.shape
    monkeypatch.setattr(lab_link, "shape", lambda device, *a, **k: shape(device, *a, **k) if device != "port1" else ["nonsense"])
    with pytest.raises(ValueError, match=r"^tc nonsense in dtrain-test\d+-hub was refused: "):
        lab.up(parse(2, "100mbit"))
    assert kernel() == before


@needs_root
def test_what_a_crash_left_is_found_and_removed() -> None:
    lab.up(parse(3, "100mbit"))
    lab_net.told("ip", "netns", "del", lab.namespace(1))
    with pytest.raises(ValueError, match=r"only a part of a lab is there, without dtrain-test\d+-1; remove it: dtrain lab down$"):
        lab.read()
    assert lab.up(parse(2, "10mbit")) == ["a lab that was there is removed: 3 namespaces"]
    assert lab.read() == parse(2, "10mbit")
    lab_net.told("ip", "netns", "del", lab.hub())
    assert lab.down() == ["2 islands removed"]
    with pytest.raises(ValueError, match="no lab is up; make one"):
        lab.read()


@needs_root
def test_what_runs_in_a_lab_is_ended_by_down_and_keeps_up_away() -> None:
    lab.up(parse(2, "100mbit"))
    sleepers = [subprocess.Popen(["ip", "netns", "exec", lab.namespace(i), "sleep", "600"]) for i in (0, 1)]
    until(lambda: all(lab_net.processes(map(lab.namespace, (0, 1))).values()), "two processes in the lab")
    with pytest.raises(ValueError, match=r"a lab is up, and processes run in dtrain-test\d+-0; wait for their end"):
        lab.up(parse(2, "100mbit"))
    assert lab.kill(1) == 1
    assert sleepers[1].wait(timeout=30) == -signal.SIGKILL
    assert lab.kill(1) == 0
    assert lab.down() == ["2 islands removed", "1 processes in them ended"]
    assert sleepers[0].wait(timeout=30) == -signal.SIGTERM


@needs_root
@pytest.mark.parametrize("bits_per_s", [1_000_000, 10_000_000])
def test_no_more_bytes_come_than_the_rate_lets_through(bits_per_s: int) -> None:
    """htb lets through its burst, what the rate says since then, and one packet more (a frame, of links as slow as these): an
    upper bound on any machine."""
    lab.up(parse(2, f"{bits_per_s}bit"))
    begin, end = stream(0, 1)
    with begin, end:
        began, before = time.monotonic(), lab.counted(lab.read())
        flow(begin, end, bits_per_s // 8)  # a second of it
        after, seconds = lab.counted(lab.read()), time.monotonic() - began
    sent, received = after[0].sent - before[0].sent, after[1].received - before[1].received
    assert min(sent, received) >= bits_per_s // 8 * 1514 / 1448, "headers count, of 66 bytes a packet"
    assert max(sent, received) <= lab_link.burst_bytes(bits_per_s) + bits_per_s / 8 * seconds + lab_link.FRAME_BYTES


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("bits_per_s", [1_000_000, 10_000_000])
def test_a_slow_link_carries_what_was_asked(bits_per_s: int) -> None:
    """Within 5 % between two moments of a bulk transfer: no CPU is so slow that this limits it."""
    lab.up(parse(2, f"{bits_per_s}bit"))
    begin, end = stream(0, 1)
    with begin, end:
        flow(begin, end, bits_per_s // 16)  # half a second until the link is full
        began, before = time.monotonic(), lab.counted(lab.read())
        flow(begin, end, bits_per_s // 8 * 8)
        after, seconds = lab.counted(lab.read()), time.monotonic() - began
    assert (after[1].received - before[1].received) * 8 / seconds == pytest.approx(bits_per_s, rel=0.05)


@needs_root
def test_a_link_made_slower_is_slower_both_ways_and_the_near_one_as_before() -> None:
    lab.up(parse(4, "1gbit", near="2:2gbit"))
    lab.slow(1, "2mbit")
    assert lab_link.rates(lab.namespace(1), lab.DEVICE) == lab_link.rates(lab.hub(), "port1") == ["2mbit", "2gbit"]
    assert lab_link.rates(lab.namespace(0), lab.DEVICE) == ["1gbit", "2gbit"]
    for one, other in ((1, 2), (2, 1)):
        begin, end = stream(one, other)
        with begin, end:
            began, before = time.monotonic(), lab.counted(lab.read())
            flow(begin, end, 300_000)
            after, seconds = lab.counted(lab.read()), time.monotonic() - began
        assert after[other].received - before[other].received >= 300_000
        assert seconds >= (300_000 - lab_link.burst_bytes(2e6) - LARGEST_PACKET) * 8 / 2e6, f"{one} -> {other}"


def class_bytes(namespace: str, device: str) -> dict[str, int]:
    text = lab_net.told("tc", "-n", namespace, "-s", "class", "show", "dev", device)
    return {name: int(sent) for name, sent in re.findall(r"class htb (\S+) .*\n Sent (\d+) bytes", text)}


@needs_root
def test_near_islands_talk_by_the_near_link_and_others_by_the_far_one() -> None:
    """Islands in groups of 2 of 4: what 1 sends to 0 is counted as near, what it sends to 2 and 3 as far, at both ends."""
    lab.up(parse(4, "10mbit", near="2:1gbit"))
    sockets = [datagrams(i) for i in range(4)]
    for other, times in ((0, 5), (2, 3), (3, 2)):
        for _ in range(times):
            sockets[1].sendto(bytes(1000), sockets[other].getsockname())
            sockets[other].recv(2000)
    one = 1000 + UDP_BYTES
    leaving = class_bytes(lab.namespace(1), lab.DEVICE)
    assert leaving["1:2"] == 5 * one
    assert 0 <= leaving["1:1"] - 5 * one <= 1000, "five datagrams, and the questions for addresses"
    assert {i: class_bytes(lab.hub(), f"port{i}")["1:2"] for i in range(4)} == {0: 5 * one, 1: 0, 2: 0, 3: 0}
    assert [class_bytes(lab.hub(), f"port{i}")["1:1"] >= n * one for i, n in ((2, 3), (3, 2))] == [True, True]
    for each in sockets:
        each.close()


@needs_root
def test_a_cut_drops_what_two_islands_send_each_other_and_nothing_else() -> None:
    lab.up(parse(3, "100mbit"))
    a, b, c = (datagrams(i) for i in range(3))
    everyone = [(x, y) for x in (a, b, c) for y in (a, b, c) if x is not y]

    def heard() -> list[tuple[bool, ...]]:
        """By whom each island is heard: all send to all, in turns, and then to themselves."""
        for x, y in everyone:
            x.sendto(b"other", y.getsockname())
        came = []
        for each in (a, b, c):
            each.sendto(b"own", each.getsockname())  # not by the link
            seen = list[tuple[str, int]]()
            while (got := each.recvfrom(100))[0] != b"own":
                seen.append(got[1])
            came.append(tuple(x.getsockname() in seen for x in (a, b, c)))
        return came

    for x, y in everyone:  # by now each knows where the others are
        x.sendto(b"first", y.getsockname())
        assert y.recv(100) == b"first"
    whole = [(False, True, True), (True, False, True), (True, True, False)]
    assert heard() == whole
    lab.cut(1, 0)
    lab.cut(0, 1)  # once more makes no difference
    assert lab.cuts(lab.read()) == [(0, 1)]
    assert heard() == [(False, False, True), (False, False, True), (True, True, False)]
    lab.cut(1, 2)
    assert lab.cuts(lab.read()) == [(0, 1), (1, 2)]
    assert run_command(["lab", "heal", "0", "1"]) == 0
    assert lab.cuts(lab.read()) == [(1, 2)]
    assert heard() == [(False, True, True), (True, False, False), (True, False, False)]
    assert run_command(["lab", "heal"]) == 0
    assert heard() == whole
    for each in (a, b, c):
        each.close()


@needs_root
def test_a_round_trip_is_as_long_as_was_asked_or_refused_where_the_kernel_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    before = kernel()
    status = run_command(["lab", "up", "--islands", "2", "--rate", "100mbit", "--rtt", "80ms", "--loss", "0%"])
    said = capsys.readouterr()
    if status == 0:
        a, b = datagrams(0), datagrams(1)
        began = time.monotonic()
        a.sendto(b"there", b.getsockname())
        b.sendto(b"and back", b.recvfrom(100)[1])
        assert a.recv(100) == b"and back"
        assert time.monotonic() - began >= 0.080
        return
    assert status == 2
    assert said.err.startswith("dtrain: this kernel has no netem, so that a lab cannot shape --rtt or --loss here; leave them")
    assert "link.rtt in the job file throttles instead" in said.err
    assert said.err.count("\n") == 1
    assert kernel() == before


def test_a_far_link_that_is_late_and_loses_packets_is_so_at_the_bridge_alone() -> None:
    """What tc is told, for kernels that have netem: half of the round trip each way, far only."""
    link = Link(1e7, 1e9, rtt_s=0.04, loss=0.001)
    lines = lab_link.shape("port0", link, "src", ["10.77.0.3"], delay_s=0.02, loss=0.001)
    # 10 Mbit/s for 20 ms and a tenth of a second are 99 frames, and 32 besides.
    assert [x for x in lines if "netem" in x] == [
        "qdisc add dev port0 parent 1:1 handle 11: netem delay 20000us loss 0.1% limit 131"
    ]
    assert lab_link.segments(link) == 1, "a packet that is lost is one"
    assert [lab_link.segments(Link(rate)) for rate in (1e6, 1e7, 1e8, 1e9, 1e10)] == [1, 1, 8, 64, 64]
    assert not [x for x in lab_link.shape("lab0", link, "dst", ["10.77.0.3"]) if "netem" in x]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("up", "--islands", "1", "--rate", "1mbit"), "--islands 1: a lab joins 2 to 250"),
        (("up", "--islands", "251", "--rate", "1mbit"), "--islands 251: a lab joins 2 to 250"),
        (("up", "--islands", "2", "--rate", "10mbps"), '--rate 10mbps: name a rate from 10kbit to 1tbit, as "100mbit"'),
        (("up", "--islands", "2", "--rate", "none"), "--rate none: name a rate"),
        (("up", "--islands", "2", "--rate", "1mbit", "--rtt", "soon"), '--rtt soon: name a time up to 60s, as "40ms"'),
        (("up", "--islands", "2", "--rate", "1mbit", "--loss", "2"), "--loss 2: name a share of packets below 100%"),
        (("up", "--islands", "6", "--rate", "1mbit", "--near", "4:1gbit"), "--near 4:1gbit: 6 islands do not fall into two"),
        (("up", "--islands", "4", "--rate", "1mbit", "--near", "4:1gbit"), "--near 4:1gbit: 4 islands do not fall into"),
        (("up", "--islands", "5", "--rate", "1mbit", "--near", "2:1gbit"), "--near 2:1gbit: 5 islands do not fall into two"),
        (("up", "--islands", "4", "--rate", "1mbit", "--near", "fast"), "--near fast: say how many islands are a group"),
        (("up", "--islands", "4", "--rate", "1mbit", "--near", "2:fast"), "--near fast: name a rate from"),
        (("up", "--rate", "1mbit"), "Missing option '--islands'"),
        (("status",), "no lab is up; make one: dtrain lab up --islands 2 --rate 100mbit"),
        (("cut", "0", "1"), "no lab is up"),
        (("heal",), "no lab is up"),
        (("heal", "0"), "dtrain lab heal 0: name two islands, or none to heal all cuts"),
        (("slow", "0", "1mbit"), "no lab is up"),
        (("kill", "0"), "no lab is up"),
        (("run", "job.toml"), "no lab is up"),
    ],
)  # fmt: skip
@needs_root
def test_what_cannot_be_is_one_line_and_nothing_half_made(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = kernel()
    assert run_command(["lab", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"dtrain: {message}")
    assert printed.err.count("\n") == 1
    assert kernel() == before


@needs_root
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cut", "0", "2"), "the lab has no island 2; it has 0 to 1"),
        (("cut", "1", "1"), "island 1 has no link to itself; name two islands"),
        (("heal", "0", "7"), "the lab has no island 7; it has 0 to 1"),
        (("slow", "3", "1mbit"), "the lab has no island 3; it has 0 to 1"),
        (("slow", "0", "fast"), "slow fast: name a rate from 10kbit to 1tbit"),
        (("kill", "2"), "the lab has no island 2; it has 0 to 1"),
        (("run", "job.toml", "islands.count=3"), "job.toml: islands.count = 3, and the lab has 2; make a larger one"),
        (("run", "no.toml"), "no job file at no.toml"),
    ],
)
def test_what_a_lab_has_not_is_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job_file()
    lab.up(parse(2, "10mbit"))
    assert run_command(["lab", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"dtrain: {message}")
    assert printed.err.count("\n") == 1
    assert lab.cuts(lab.read()) == []


def test_without_the_tools_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["up", "--islands", "2", "--rate", "1mbit"], ["status"], ["down"], ["cut", "0", "1"]):
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
            assert run_command(["lab", *words]) == 2
        assert capsys.readouterr().err == "dtrain: a lab needs tc, which this machine lacks: install iproute2\n"


@needs_root
def test_status_shows_what_is_up(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run_command(["lab", "up", "--islands", "4", "--rate", "10mbit", "--near", "2:1gbit"]) == 0
    lab.cut(0, 3)
    capsys.readouterr()
    assert run_command(["lab", "status"]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == "4 islands, 10 Mbit/s each way, 1 Gbit/s within groups of 2"
    assert header.split() == ["island", "namespace", "rate", "cut", "from", "processes", "sent", "received"]
    shown = [row.split() for row in rows]
    assert [row[:5] for row in shown] == [[str(i), lab.namespace(i), "10mbit,", "near", "1gbit"] for i in range(4)]
    assert [row[5:-5] for row in shown] == [["3"], [], [], ["0"]]
    assert [row[-5] for row in shown] == ["0"] * 4, "processes"
