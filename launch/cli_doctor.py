"""What can a person type after ``dtrain doctor``?"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from dtrain.launch.tables import table

if TYPE_CHECKING:
    from dtrain.launch.doctor import Asked, Finding, Said

SERVE_S, MOST_SERVE_S = "300s", 86400.0


def doctor(
    job_file: Annotated[Path | None, typer.Argument(metavar="[JOB.toml]", help="the job file", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value ...]", help="keys that differ from the file", show_default=False),
    ] = None,
    meet: Annotated[
        str | None, typer.Option("--meet", metavar="HOST:PORT", help="look at the way to another machine too", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, a line each")] = False,
    serve: Annotated[
        int | None,
        typer.Option("--serve", metavar="PORT", help="answer a doctor with --meet instead", min=0, max=65535, show_default=False),
    ] = None,
    for_time: Annotated[
        str | None, typer.Option("--for", help=f'how long --serve answers; "{SERVE_S}"', show_default=False)
    ] = None,
) -> None:
    """Say what of this machine will stop a job, and the command that mends it.

    Status 1 where something will. With --meet also the clock there, the link's round
    trip and rate, and whether gloo's ports are let in; there dtrain doctor --serve PORT
    must answer, or a job's launcher.

    Example: dtrain doctor JOB.toml --meet 10.0.0.2:29400
    """
    if serve is not None and meet is not None:
        raise ValueError("--serve answers and --meet asks: give one of them on each machine")
    if serve is None and for_time is not None:
        raise ValueError(f"--for {for_time} is how long --serve answers; give --serve PORT, or leave it out")
    asked = _asked(job_file, overrides or [])
    if serve is not None:
        _serve(serve, for_time or SERVE_S, asked)
        return
    place = None if meet is None else _place(meet)
    console, failed = Console(), 0
    for finding in _findings(asked, place):
        failed += finding.state == "fail"
        if as_json:
            print(json.dumps(asdict(finding)), flush=True)
        else:
            _show(console, finding)
    _show_routes(console, asked, place, as_json=as_json)
    if not as_json:
        things = "1 thing" if failed == 1 else f"{failed} things"
        console.print(Text(f"\n{things} will stop a job" if failed else "\nnothing will stop a job"), soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _asked(job_file: Path | None, overrides: list[str]) -> Asked | None:
    """Read as it is written: ``checks.read_job`` would import torch where DTRAIN_KERNELS names a backend."""
    if job_file is None:
        return None
    from dtrain.config import load_job
    from dtrain.launch.doctor import Asked

    try:
        return Asked(load_job(job_file, overrides), (str(job_file), *overrides))
    except OSError as e:
        raise ValueError(f"{job_file} cannot be read: {e.strerror or e}; name a job file that can") from None


def _findings(asked: Asked | None, place: tuple[str, int] | None) -> Iterator[Finding]:
    """Raises ValueError for a job whose answers do not fit together, before the first is shown."""
    from dtrain.launch import doctor as looks
    from dtrain.launch import doctor_islands, doctor_net

    process = looks.start("-m", "dtrain.launch.doctor_torch", *(() if asked is None else asked.words))
    packages = {name: looks.version_of(name) for name in ("pydantic", "numba", "triton")}
    zero = looks.version_of("deepspeed") if asked is not None and doctor_islands.needs_deepspeed(asked) else None
    said = looks.of_torch(looks.answer(process))
    versions = {name: looks.answer(package) for name, package in packages.items()}
    deepspeed = None if zero is None else looks.answer(zero)
    if said.refused:
        raise ValueError(said.refused)
    yield from looks.python_and_dtrain()
    yield from looks.torch_itself(said)
    yield looks.package("pydantic", versions["pydantic"], oldest=looks.PYDANTIC)
    for name, needed, why in looks.needs(said.torch):
        yield looks.package(name, versions[name], needed=needed, why=why)
    yield looks.other_packages()
    if asked is not None:
        yield from looks.of_job(asked, said)
        yield from doctor_islands.of_islands(asked, deepspeed)
    if said.torch is not None:
        yield from looks.gpus(said.torch, asked, looks.nvidia_driver())
        yield from looks.backends(said.torch, asked)
    yield from _room(asked, said)
    yield from doctor_net.local_network(asked)
    if place is not None:
        from dtrain.launch.doctor_meet import meet

        yield from meet(*place, asked)


def _room(asked: Asked | None, said: Said) -> Iterator[Finding]:
    from dtrain.launch import doctor_room as room

    torch = said.torch
    if torch is not None:
        yield room.numba_cache(torch)
    yield room.triton_cache(torch)
    yield room.disk(Path() if asked is None else Path(asked.job.job.dir, asked.job.job.name), asked, said.size)
    yield room.shared_memory(torch, asked)
    yield room.open_files(asked, *resource.getrlimit(resource.RLIMIT_NOFILE))
    yield room.memory(torch, asked, said.size, room.free_memory())
    yield room.cores(torch, asked, room.usable_cores())


def _show(console: Console, finding: Finding) -> None:
    word = {"ok": "ok", "warn": "warn", "fail": "FAIL"}[finding.state]
    console.print(Text(f"{word:<5} {finding.name}: {finding.what}"), soft_wrap=True)
    if finding.remedy:
        console.print(Text(f"      -> {finding.remedy}"), soft_wrap=True)


def _show_routes(console: Console, asked: Asked | None, place: tuple[str, int] | None, *, as_json: bool) -> None:
    from dtrain.launch.doctor_net import let_in, routes

    found = routes(asked, place)
    if as_json:
        for route in found:
            print(json.dumps(asdict(route)), flush=True)
        return
    console.print()
    console.print(table(["who must reach", "whom", "TCP ports", "for"], [list(asdict(route).values()) for route in found]))
    remote = [route.ports for route in found if route.ports[0].isdecimal()]
    for ports in remote:
        console.print(Text(f"a firewall on that host lets them in by: {let_in(ports.replace('-', ':'))}"), soft_wrap=True)


def _place(meet: str) -> tuple[str, int]:
    host, _, port = meet.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--meet {meet}: write HOST:PORT with a port from 1 to 65535, as 10.0.0.2:29400")
    return host.strip("[]"), int(port)  # brackets: an address of IPv6


def _serve(port: int, for_text: str, asked: Asked | None) -> None:
    """On the address that the job's meeting point would have; without a job on all."""
    import socket

    from dtrain import units
    from dtrain.launch.doctor_meet import here, serve
    from dtrain.launch.meeting import address_of

    for_s = units.seconds(for_text)
    if not 0 < for_s <= MOST_SERVE_S:
        raise ValueError(f"--for {for_text}: say how long to answer, from 1s to {MOST_SERVE_S:.0f}s")
    address = "0.0.0.0" if asked is None else address_of(asked.job.link)
    try:
        listener = socket.create_server((address, port))
    except OSError as e:
        raise ValueError(f"--serve {port} cannot be opened on {address}: {e.strerror}; use another, or 0 (a free one)") from None
    host = here() if address == "0.0.0.0" else address
    place = f"{host}:{listener.getsockname()[1]}"
    print(f"answering for {units.show_seconds(for_s)}; on the other machine: dtrain doctor --meet {place}", flush=True)
    serve(listener, for_s, say=lambda line: print(line, flush=True))
