"""Does ``dtrain doctor`` find real trouble? A full disk, caches that cannot be written and ports that a firewall drops are made
in namespaces of their own: of mounts by unshare, of networks by ip and iptables. Needs root."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from dtrain.launch import doctor_meet
from dtrain.launch.doctor import Finding
from dtrain.launch.doctor_meet import meet
from dtrain.launch.doctor_net import closed, ephemeral_ports, reach
from dtrain.launch.meeting import serve as serve_store
from tests.dist.job import QUICKSTART, ROOT

T = TypeVar("T")
Found = Mapping[str, Mapping[str, str]]
HERE, THERE = "10.213.7.1", "10.213.7.2"
PORT = 29400
"""Of namespaces that nobody else is in."""


def needs(*tools: str) -> None:
    gone = [tool for tool in tools if shutil.which(tool) is None]
    if gone:
        pytest.skip(f"needs {', '.join(gone)}: apt-get install iproute2 iptables util-linux")
    if os.geteuid() != 0 or subprocess.run(["unshare", "-mn", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs root, and a kernel that lets it make namespaces")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def drop(namespace: str, *rule: str) -> None:
    ip("netns", "exec", namespace, "iptables", "-A", "INPUT", "-p", "tcp", "--syn", *rule, "-j", "DROP")


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[str, str]]:
    """Two namespaces with a link between them."""
    needs("ip", "iptables", "unshare")
    names = f"dtrain-doc-{os.getpid()}-a", f"dtrain-doc-{os.getpid()}-b"
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, (HERE, THERE), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def sick(network: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What is found on a machine of which everything is wrong at once."""
    folder = tmp_path_factory.mktemp("sick")
    full, caches = folder / "full", folder / "caches"
    full.mkdir()
    caches.mkdir()
    mounted = (
        f"mount -t tmpfs -o size=1m tmpfs {full}; dd if=/dev/zero of={full}/much bs=64k 2>/dev/null; "
        f'mount -t tmpfs -o ro tmpfs {caches}; exec "$@"'
    )
    drop(network[0], "--dport", str(PORT))
    try:
        done = subprocess.run(
            [
                *("ip", "netns", "exec", network[0], "unshare", "-m", "sh", "-c", mounted, "sh"),
                *(sys.executable, "-m", "dtrain.launch", "doctor", str(QUICKSTART), f"job.dir={full}", f"link.port={PORT}"),
                *("--meet", f"{HERE}:{PORT}", "--json"),
            ],
            cwd=ROOT,
            env={**os.environ, "NUMBA_CACHE_DIR": str(caches), "TRITON_CACHE_DIR": str(caches), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=110, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        ip("netns", "exec", network[0], "iptables", "-F")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(bool(line["remedy"]) == (line["state"] != "ok") for line in lines if "name" in line)
    return {line["name"]: line for line in lines if "name" in line}


def test_a_machine_without_a_gpu_is_well(sick: Found) -> None:
    assert (sick["gpu"]["state"], sick["gpu"]["what"]) == ("ok", "none: CPU only")
    assert {sick[name]["state"] for name in ("python", "torch", "numba", "triton", "gloo", "nccl", "memory")} == {"ok"}


def test_a_full_disk_fails_with_a_folder_that_has_room(sick: Found) -> None:
    disk = sick["disk"]
    assert disk["state"] == "fail"
    assert "the disk is full; 0 B free in" in disk["what"]
    assert "a checkpoint of all islands takes 12.3 MB" in disk["what"]
    words = disk["remedy"].split()
    assert words[:3] == ["dtrain", "run", str(QUICKSTART)]
    assert words[-1].startswith("job.dir=")
    assert words[-1] != words[3], "another one"


def test_caches_that_cannot_be_written_are_named_with_where_they_can(sick: Found) -> None:
    for name in ("numba", "triton"):
        found = sick[f"{name} cache"]
        assert (found["state"], "cannot be written: Read-only file system" in found["what"]) == ("warn", True)
        assert found["remedy"].startswith(f"export {name.upper()}_CACHE_DIR=/")


def test_a_port_that_a_firewall_here_drops_can_be_opened_and_not_reached(sick: Found) -> None:
    assert sick["link.port"]["state"] == "fail"
    assert sick["link.port"]["what"] == f"{PORT} is open on 127.0.0.1 and cannot be reached: a firewall here drops it"
    assert sick["link.port"]["remedy"] == f"iptables -I INPUT -p tcp --dport {PORT} -j ACCEPT"
    assert sick["gloo ports"]["state"] == "ok"
    assert (sick["meeting"]["state"], "is blocked (no answer)" in sick["meeting"]["what"]) == ("fail", True)


# ---- two machines


def inside(namespace: str, call: Callable[[], T]) -> T:
    """Call from a thread of its own that has entered a network namespace, and so have the threads that it starts."""

    def entered() -> T:
        with Path("/run/netns", namespace).open() as there:
            if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")
        return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(entered).result()


def met(namespace: str, port: int = PORT) -> dict[str, Finding]:
    return inside(namespace, lambda: {finding.name: finding for finding in meet(THERE, port, None)})


@pytest.fixture
def answered(network: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """``dtrain doctor --serve`` on the second machine, as a person starts it."""
    command = [sys.executable, "-m", "dtrain.launch", "doctor", "--serve", str(PORT), "--for", "60s"]
    process = subprocess.Popen(
        ["ip", "netns", "exec", network[1], *command],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == (
            f"answering for 1 min 0 s; on the other machine: dtrain doctor --meet {THERE}:{PORT}\n"
        )
        yield network
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()
        ip("netns", "exec", network[1], "iptables", "-F")


def test_the_way_to_another_machine_is_looked_over_and_what_is_shut_is_told_apart(answered: tuple[str, str]) -> None:
    here, there = answered
    well = met(here)
    assert {name: finding.state for name, finding in well.items()} == dict.fromkeys(
        ("meeting", "clock", "link", "gloo there", "gloo back"), "ok"
    )
    first, last = ephemeral_ports()
    drop(there, "--dport", f"{first}:{last}")
    shut = met(here)
    assert (shut["gloo there"].state, shut["gloo back"].state) == ("fail", "ok")
    assert shut["gloo there"].remedy == f"iptables -I INPUT -p tcp --dport {first}:{last} -j ACCEPT  # on {THERE}"
    drop(there, "--dport", str(PORT))
    blocked, nobody = met(here)["meeting"], met(here, PORT + 1)["meeting"]
    assert (blocked.state, blocked.remedy) == ("fail", f"iptables -I INPUT -p tcp --dport {PORT} -j ACCEPT  # on {THERE}")
    assert (nobody.state, nobody.remedy) == ("fail", f"dtrain doctor --serve {PORT + 1}  # on {THERE}")
    drop(there)
    away = met(here)["meeting"]
    assert (away.state, away.remedy) == ("fail", f"ping -c 3 {THERE}")
    assert away.what == f"{THERE}:{PORT} timed out: no port of that host answers"


def test_a_jobs_meeting_point_is_known_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_meet, "_GREETING_S", 0.05)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = serve_store(listener)
    (found,) = meet("127.0.0.1", port, None)
    assert (found.state, f"a job's meeting point answers at 127.0.0.1:{port}" in found.what) == ("ok", True)
    store.set("still", "here")
    assert store.get("still") == b"here"
    assert closed(reach("127.0.0.1", port)) == "open"
