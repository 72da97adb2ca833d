"""How does an island get its link? From the launcher's environment, or by hand for islands of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch._C._distributed_c10d import Store

from dtrain import units
from dtrain.island.replicas import Alone, Island, Replicas
from dtrain.membership import (
    Hub,
    Membership,
    MemoryMembership,
    OnWait,
    Place,
    StoreMembership,
    meeting_store,
    place_from_env,
)
from dtrain.transport.base import Transport
from dtrain.transport.local import LocalHub
from dtrain.transport.throttle import MemoryUplink, SharedUplink, Throttle

if TYPE_CHECKING:
    from dtrain.config import LinkSection


def _log_wait(missing: tuple[int, ...], waited_s: float, limit_s: float) -> None:
    names = ", ".join(str(n) for n in missing)
    print(f"waiting for island {names}, {waited_s:.0f} s of {limit_s:.0f}", flush=True)


@dataclass(frozen=True, slots=True)
class Connection:
    """An island's link, ready for use."""

    node: int
    num_nodes: int
    transport: Transport
    membership: Membership
    ranks: Island
    timeout_s: float
    on_wait: OnWait = _log_wait
    job_recipe: str | None = None
    job_axes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """The job file's [link], as numbers."""

    transport: str = "c10d"
    bits_per_s: float | None = None
    rtt_s: float = 0.0
    timeout_s: float = 300.0


def connect(
    place: Place | None = None,
    settings: LinkSettings | None = None,
    *,
    device: torch.device | None = None,
    epoch: int | None = None,
    on_wait: OnWait = _log_wait,
) -> Connection:
    """Join the link as the launcher's environment says; without a launcher, an island of its own."""
    place = place or place_from_env()
    device = device or torch.device("cpu")
    recipe, axes = None, {}
    if settings is None:
        settings, recipe, axes = _settings_of_job(place.job)
    ranks = _ranks(place, device)
    if place.num_islands == 1 or not place.meet:
        if place.num_islands > 1:
            raise ValueError(
                f"DTRAIN_NUM_ISLANDS = {place.num_islands} without DTRAIN_MEET; start the job with `dtrain run`"
            )
        hub = LocalHub(1)
        return Connection(
            0, 1, hub.transport(0), MemoryMembership(Hub(), 0), ranks, settings.timeout_s, on_wait, recipe, axes
        )
    now = place.epoch if epoch is None else epoch
    store = meeting_store(place.meet, settings.timeout_s)
    membership = StoreMembership(store, node=place.island, num_nodes=place.num_islands, rank=place.rank, epoch=now)
    membership.gather(settings.timeout_s, on_wait)
    transport = _transport(place, settings, store, now, device)
    return Connection(
        place.island, place.num_islands, transport, membership, ranks, settings.timeout_s, on_wait, recipe, axes
    )


def connect_local(
    num_islands: int, *, timeout_s: float = 60.0, settings: LinkSettings | None = None
) -> list[Connection]:
    """Connections of islands that live in one process, one thread each."""
    hub, exits = LocalHub(num_islands), Hub()
    out = []
    for node in range(num_islands):
        transport: Transport = hub.transport(node)
        if settings and (settings.bits_per_s or settings.rtt_s):
            uplink = MemoryUplink(settings.bits_per_s) if settings.bits_per_s else None
            transport = Throttle(transport, uplink=uplink, rtt_s=settings.rtt_s)
        out.append(Connection(node, num_islands, transport, MemoryMembership(exits, node), Alone(), timeout_s))
    return out


def settings_of(link: LinkSection) -> LinkSettings:
    return LinkSettings(link.transport, units.bits_per_s(link.rate), units.seconds(link.rtt), link.timeout_s)


def _settings_of_job(path: Path | None) -> tuple[LinkSettings, str | None, dict[str, object]]:
    if path is None:
        return LinkSettings(), None, {}
    from dtrain.config import load_job  # pydantic is not needed by a loop that has no job file

    job = load_job(path)
    axes = job.sync.model_dump(exclude_none=True)
    recipe = axes.pop("recipe", None)
    return settings_of(job.link), recipe, axes


def _ranks(place: Place, device: torch.device) -> Island:
    if place.num_ranks == 1:
        return Alone()
    if not torch.distributed.is_initialized():
        raise ValueError(
            f"this island has {place.num_ranks} ranks and no process group; "
            "call torch.distributed.init_process_group() before dtrain.join"
        )
    return Replicas(device)


Maker = Callable[[Place, "LinkSettings", Store, int, torch.device], Transport]


def _transport(place: Place, settings: LinkSettings, store: Store, epoch: int, device: torch.device) -> Transport:
    makers: dict[str, Maker] = {"c10d": _gloo, "nccl": _nccl}
    transport = makers[settings.transport](place, settings, store, epoch, device)
    if settings.bits_per_s is None and settings.rtt_s == 0:
        return transport
    uplink = None
    if settings.bits_per_s is not None:
        if place.run is None:
            raise ValueError("link.rate needs DTRAIN_RUN, a folder where the ranks of an island share their uplink's clock")
        uplink = SharedUplink(place.run / "logs" / f"island{place.island}" / "uplink.clock", settings.bits_per_s)
    return Throttle(transport, uplink=uplink, rtt_s=settings.rtt_s)


def _gloo(place: Place, settings: LinkSettings, store: Store, epoch: int, device: torch.device) -> Transport:
    from dtrain.transport.c10d import GlooTransport  # torch.distributed's gloo is not built everywhere

    return GlooTransport(
        store, f"link/{epoch}/{place.rank}", place.island, place.num_islands, interface=place.interface
    )


def _nccl(place: Place, settings: LinkSettings, store: Store, epoch: int, device: torch.device) -> Transport:
    from dtrain.transport.ordered import OrderedTransport, nccl_group  # needs a GPU

    return OrderedTransport(
        store,
        f"link/{epoch}/{place.rank}",
        place.island,
        place.num_islands,
        make_group=nccl_group(device),
        interface=place.interface,
        device=device,
    )
