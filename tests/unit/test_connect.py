"""Does what a job file and the launcher say of the link and the recipe reach the island that joins?"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._C._distributed_c10d import TCPStore

import dtrain
from dtrain import connect as connecting
from dtrain.config import Job, parse_job
from dtrain.connect import Connection, LinkSettings, connect, connect_local, settings_of
from dtrain.errors import PeerLost, Regroup
from dtrain.launch import islands, local, meeting
from dtrain.launch.islands import Launch
from dtrain.launch.processes import TAG_VARIABLE
from dtrain.membership import OnWait, Place, place_from_env
from dtrain.recipes import DEFAULT_RECIPE, RECIPES
from dtrain.sections import LinkSection
from dtrain.transport.base import Transport
from dtrain.transport.throttle import Throttle, Uplink

TORCHRUNS = ("RANK", "WORLD_SIZE")
LAUNCHERS = (
    *("DTRAIN_ISLAND", "DTRAIN_NUM_ISLANDS", "DTRAIN_MEET", "DTRAIN_EPOCH", "DTRAIN_RESUME_STEP", "DTRAIN_RUN", "DTRAIN_JOB"),
    "GLOO_SOCKET_IFNAME",
)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell that no launcher and no torchrun has prepared."""
    for name in (*LAUNCHERS, *TORCHRUNS):
        monkeypatch.delenv(name, raising=False)


def joined(**said: str | float) -> dtrain.Sync:
    """The engine as join leaves it, closed again."""
    model = nn.Linear(3, 2)
    with dtrain.join(model, torch.optim.SGD(model.parameters(), lr=0.1), **said) as sync:  # pyright: ignore[reportArgumentType]
        return sync


@pytest.fixture
def job_file(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "job.toml"
    path.write_text('[sync]\nrecipe = "diloco"\nevery = 7\nouter_lr = 0.5\n\n[link]\ntimeout_s = 12\n', encoding="utf-8")
    monkeypatch.setenv("DTRAIN_JOB", str(path))


@pytest.mark.usefixtures("job_file")
def test_a_script_gets_the_recipe_and_the_axes_of_its_job() -> None:
    assert joined().recipe == replace(RECIPES["diloco"], every=7, outer_lr=0.5)
    assert connect().timeout_s == 12


@pytest.mark.usefixtures("job_file")
def test_what_join_is_told_wins_over_the_job() -> None:
    assert joined(every=3).recipe == replace(RECIPES["diloco"], every=3, outer_lr=0.5)
    assert joined(codec="bf16", outer_lr=0.9).recipe == replace(RECIPES["diloco"], every=7, codec="bf16", outer_lr=0.9)


@pytest.mark.usefixtures("job_file")
def test_a_recipe_that_join_is_told_drops_the_jobs_axes() -> None:
    assert joined(recipe="diloco").recipe == RECIPES["diloco"]
    assert joined(recipe="fedavg", every=5).recipe == replace(RECIPES["fedavg"], every=5)


@pytest.mark.usefixtures("alone")
def test_without_a_recipe_it_is_the_default_with_the_axes_that_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert joined().recipe == RECIPES[DEFAULT_RECIPE]
    (tmp_path / "job.toml").write_text("[sync]\nevery = 9\n", encoding="utf-8")
    monkeypatch.setenv("DTRAIN_JOB", str(tmp_path / "job.toml"))
    assert joined().recipe == replace(RECIPES[DEFAULT_RECIPE], every=9)


def test_every_variable_of_the_launcher_is_read() -> None:
    env = {
        "DTRAIN_ISLAND": "3",
        "DTRAIN_NUM_ISLANDS": "5",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "DTRAIN_MEET": "head:4711",
        "DTRAIN_EPOCH": "4",
        "DTRAIN_RESUME_STEP": "600",
        "DTRAIN_RUN": "/runs/a",
        "DTRAIN_JOB": "/runs/a/job.toml",
        "GLOO_SOCKET_IFNAME": "eth7",
    }
    whole = Place(3, 5, 1, 2, "head:4711", 4, 600, Path("/runs/a"), Path("/runs/a/job.toml"), "eth7")
    nothing = Place(0, 1, 0, 1, "", 0, 0, None, None, "lo")
    assert place_from_env(env) == whole
    assert place_from_env({}) == nothing
    for name in env:
        without = place_from_env({key: value for key, value in env.items() if key != name})
        changed = [field for field in Place.__slots__ if getattr(without, field) != getattr(whole, field)]
        assert len(changed) == 1, name
        assert getattr(without, changed[0]) == getattr(nothing, changed[0])


@pytest.mark.parametrize(("link", "interface"), [({}, "lo"), ({"interface": "eth7"}, "eth7")])
def test_an_island_stands_where_the_launcher_puts_it(tmp_path: Path, link: dict[str, str], interface: str) -> None:
    launch = Launch(parse_job({"islands": {"count": 4}, "link": link}), tmp_path, "10.0.0.1:4711", "tag")
    env = islands.environment(launch, 2, 6, 500)
    assert env["GLOO_SOCKET_IFNAME"] == interface
    expected = Place(2, 4, 0, 1, "10.0.0.1:4711", 6, 500, tmp_path, tmp_path / "job.toml", interface)
    assert place_from_env(env) == expected
    assert set(LAUNCHERS) <= set(env)
    assert env[TAG_VARIABLE] == "tag"


def _link_of(*link: str) -> Job:
    return parse_job({}, link)


@pytest.mark.parametrize(
    ("link", "bits_per_s", "rtt_s"),
    [
        (("link.rate=none", "link.rtt=0ms"), None, 0.0),
        (("link.rate=10mbit", "link.rtt=20ms"), 1e7, 0.02),
        (("link.rate=2gbit",), 2e9, 0.0),
        (("link.rtt=1s",), None, 1.0),
    ],
)
def test_the_jobs_link_in_numbers(link: tuple[str, ...], bits_per_s: float | None, rtt_s: float) -> None:
    settings = settings_of(_link_of(*link, "link.timeout_s=7").link)
    assert (settings.transport, settings.bits_per_s, settings.rtt_s, settings.timeout_s) == ("c10d", bits_per_s, rtt_s, 7.0)


class Noted(Throttle):
    """A throttle that can say what it was made with."""

    def __init__(self, inner: Transport, *, uplink: Uplink | None, rtt_s: float) -> None:
        self.uplink, self.rtt_s = uplink, rtt_s
        super().__init__(inner, uplink=uplink, rtt_s=rtt_s)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Connection]]:
    """Connections that are closed at the end of the test; their throttles can be asked."""
    monkeypatch.setattr(connecting, "Throttle", Noted)
    connections: list[Connection] = []
    yield connections
    for connection in connections:
        connection.transport.close(drain_s=0.0)


@pytest.fixture
def store() -> tuple[TCPStore, str]:
    """The meeting point of a launch, and where it is."""
    listener, meet = meeting.listen(Job().link)
    return meeting.serve(listener), meet


def two_islands(job: Job, meet: str, run: Path, epoch: int) -> list[Connection]:
    """Both islands of a job in this process, over gloo."""
    places = [replace(place_from_env({}), island=i, num_islands=2, meet=meet, run=run, epoch=epoch) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda place: connect(place, settings_of(job.link)), places))


def throttles(connections: list[Connection]) -> list[Noted]:
    return [connection.transport for connection in connections if isinstance(connection.transport, Noted)]


def reserve_at_one_mbit(uplink: Uplink | None) -> float:
    """When 25 MB will have left an uplink that was idle: in 200 s, 200 million bits at a million a second."""
    assert uplink is not None
    before = time.monotonic()
    leaves = uplink.reserve(25_000_000)
    assert before + 200 <= leaves <= time.monotonic() + 200
    return leaves


def test_rate_and_rtt_of_the_job_slow_its_link(opened: list[Connection], store: tuple[TCPStore, str], tmp_path: Path) -> None:
    opened += two_islands(_link_of("link.rate=1mbit", "link.rtt=20ms"), store[1], tmp_path, epoch=0)
    assert [(c.node, c.num_nodes) for c in opened] == [(0, 2), (1, 2)]
    assert [throttle.rtt_s for throttle in throttles(opened)] == [0.02, 0.02]
    busy_until = [reserve_at_one_mbit(throttle.uplink) for throttle in throttles(opened)]  # one is idle though the other is not
    opened += two_islands(_link_of("link.rate=1mbit"), store[1], tmp_path, epoch=1)
    again = throttles(opened)[2:]
    assert [throttle.rtt_s for throttle in again] == [0.0, 0.0]
    for throttle, until in zip(again, busy_until, strict=True):
        assert throttle.uplink is not None
        assert throttle.uplink.reserve(125_000) == pytest.approx(until + 1, abs=1e-6), "behind what the island sends already"


def test_a_link_that_is_only_far_has_no_rate_and_one_that_is_neither_has_no_throttle(
    opened: list[Connection], store: tuple[TCPStore, str], tmp_path: Path
) -> None:
    opened += two_islands(_link_of("link.rtt=40ms"), store[1], tmp_path, epoch=0)
    assert [(throttle.uplink, throttle.rtt_s) for throttle in throttles(opened)] == [(None, 0.04)] * 2
    opened += two_islands(_link_of("link.rate=none", "link.rtt=0ms"), store[1], tmp_path, epoch=1)
    assert len(opened) == 4
    assert len(throttles(opened)) == 2


def test_islands_of_one_process_are_slowed_alike(opened: list[Connection]) -> None:
    opened += connect_local(2, settings=settings_of(_link_of("link.rate=1mbit", "link.rtt=20ms").link))
    opened += connect_local(2, settings=settings_of(_link_of().link))
    assert [throttle.rtt_s for throttle in throttles(opened)] == [0.02, 0.02]
    for throttle in throttles(opened):
        reserve_at_one_mbit(throttle.uplink)


def lost_while_linking(store: tuple[TCPStore, str], timeout_s: float, on_wait: OnWait) -> Connection:
    """Island 0 links up with an island that came to the meeting point and was killed at once."""
    store[0].set("ready/0/0/1", "1")
    place = replace(place_from_env({}), num_islands=2, meet=store[1])
    return connect(place, LinkSettings(timeout_s=timeout_s), on_wait=on_wait)


def test_an_island_lost_while_linking_is_waited_for_visibly_and_not_for_ever(store: tuple[TCPStore, str]) -> None:
    said: list[tuple[int, ...]] = []
    with pytest.raises(PeerLost, match=r"^lost island 1: no link to all of them within 2 s"):
        lost_while_linking(store, 2.0, lambda missing, waited_s, limit_s: said.append(missing))
    assert said
    assert set(said) == {(1,)}


def test_an_island_that_comes_back_while_the_others_link_regroups_them(store: tuple[TCPStore, str]) -> None:
    def back(missing: tuple[int, ...], waited_s: float, limit_s: float) -> None:
        store[0].set("regroup", "1:40")  # the launcher, when it has started island 1 again

    with pytest.raises(Regroup) as again:
        lost_while_linking(store, 20.0, back)
    assert (again.value.epoch, again.value.step) == (1, 40)


def test_two_islands_without_a_launcher_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^DTRAIN_NUM_ISLANDS = 2 without DTRAIN_MEET; start the job with `dtrain run`$"):
        connect(place_from_env({"DTRAIN_NUM_ISLANDS": "2"}))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_the_meeting_point_is_at_the_jobs_port() -> None:
    port = free_port()
    listener, meet = meeting.listen(LinkSection.model_validate({"port": port}))
    with listener, closing(socket.create_connection(("127.0.0.1", port), timeout=10)):
        assert meet == f"127.0.0.1:{port}"
        assert listener.getsockname() == ("127.0.0.1", port)


def test_a_launch_meets_at_the_jobs_port_and_tells_its_islands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = free_port()
    told: list[str] = []

    def start(launch: Launch, island: int, epoch: int, step: int) -> Popen[bytes]:
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            told.append(islands.environment(launch, island, epoch, step)["DTRAIN_MEET"])
        raise FileNotFoundError("no torchrun in this test")

    monkeypatch.setattr(islands, "start", start)
    with pytest.raises(FileNotFoundError, match="no torchrun") as caught:
        local.run_local(_link_of(f"link.port={port}"), tmp_path, resume_step=0, script=(), console=Console(quiet=True))
    assert told == [f"127.0.0.1:{port}"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    assert caught.tb is not None, "its frames hold whatever the launch left open"
