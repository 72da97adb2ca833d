"""How does an island get its link? From the launcher's environment, or by hand for islands of one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch._C._distributed_c10d import Store

from dtrain import units
from dtrain.errors import PeerLost
from dtrain.island.replicas import Alone, Island, Replicas
from dtrain.membership import (
    SAY_EVERY_S,
    Hub,
    Membership,
    MemoryMembership,
    OnWait,
    Place,
    StoreMembership,
    meeting_store,
    place_from_env,
)
from dtrain.transport.base import Inbox, Transport
from dtrain.transport.gloo import reason
from dtrain.transport.lanes import Lanes
from dtrain.transport.local import LocalHub
from dtrain.transport.throttle import Hop, MemoryUplink, SharedUplink, Throttle, Uplink

if TYPE_CHECKING:
    from dtrain.sections import LinkSection
    from dtrain.sections_sync import Level


_POLL_S = 0.25


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
    num_lanes: int = 1
    """That join the islands (``lanes.py``)."""
    lanes: dict[int, int] = field(default_factory=dict)
    """Each bucket's, which the transport looks up; filled in once buckets are cut."""


@dataclass(frozen=True, slots=True)
class NearLink:
    """What a group of neighbouring islands has among themselves."""

    islands: int
    bits_per_s: float | None
    rtt_s: float


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """The job file's [link], as numbers."""

    transport: str = "c10d"
    bits_per_s: float | None = None
    rtt_s: float = 0.0
    timeout_s: float = 300.0
    near: NearLink | None = None
    """Within groups, where there are levels; the other numbers are then those between groups."""

    @property
    def is_slow(self) -> bool:
        """Whether wires are held back anywhere."""
        near = (self.near.bits_per_s, self.near.rtt_s) if self.near is not None else ()
        return any((self.bits_per_s, self.rtt_s, *near))


def connect(
    place: Place | None = None,
    settings: LinkSettings | None = None,
    *,
    device: torch.device | None = None,
    epoch: int | None = None,
    on_wait: OnWait = _log_wait,
    inside: Callable[[torch.device], Island] = Replicas,
) -> Connection:
    """Join the link as the launcher's environment says; without a launcher, an island of its own. ``inside``: what the ranks of
    an island are to each other, where there are several."""
    place = place or place_from_env()
    device = device or torch.device("cpu")
    recipe, axes = None, {}
    if settings is None:
        settings, recipe, axes = _settings_of_job(place.job)
    ranks = _ranks(place, device, inside)
    if place.num_islands == 1 or not place.meet:
        if place.num_islands > 1:
            raise ValueError(
                f"DTRAIN_NUM_ISLANDS = {place.num_islands} without DTRAIN_MEET; start the job with `dtrain run`"
            )
        hub = LocalHub(1)
        return Connection(
            0, 1, hub.transport(0), MemoryMembership(Hub(), 0), ranks, settings.timeout_s, on_wait, recipe, axes, place.num_ranks
        )
    now = place.epoch if epoch is None else epoch
    store = meeting_store(place.meet, settings.timeout_s)
    membership = StoreMembership(store, node=place.island, num_nodes=place.num_islands, lanes=place.lanes, epoch=now)
    membership.gather(settings.timeout_s, on_wait)
    # A connection to the meeting point of its own: who waits in one keeps everybody else out of it.
    own = meeting_store(place.meet, settings.timeout_s)
    lanes = dict[int, int]()
    transport = _linked(
        lambda: _transport(place, settings, own, now, device, lanes), place, membership, settings.timeout_s, on_wait
    )
    return Connection(
        place.island, place.num_islands, transport, membership, ranks, settings.timeout_s, on_wait, recipe, axes,
        place.num_lanes or place.num_ranks, lanes,
    )  # fmt: skip


def _linked(
    make: Callable[[], Transport], place: Place, membership: Membership, timeout_s: float, on_wait: OnWait
) -> Transport:
    """Make the transport, which all islands do at once, without waiting blindly for one that was lost just now.

    Raises Regroup where it has come back, and PeerLost after timeout_s. The thread that is left behind then ends by the
    same limit."""
    made: list[Transport] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            made.append(make())
        except Exception as e:  # noqa: BLE001  (raised again below, on the caller's thread)
            failed.append(e)

    thread = threading.Thread(target=run, name="dtrain-connect", daemon=True)
    thread.start()
    others = tuple(n for n in range(place.num_islands) if n != place.island)
    begun, say_at_s = time.monotonic(), SAY_EVERY_S
    while thread.is_alive():
        thread.join(timeout=_POLL_S)
        membership.check_regroup()
        waited_s = time.monotonic() - begun
        if thread.is_alive() and waited_s > say_at_s:
            on_wait(others, waited_s, timeout_s)
            say_at_s = waited_s + SAY_EVERY_S
    if not failed:
        return made[0]
    if isinstance(failed[0], RuntimeError):  # gloo's way to say that somebody did not come
        raise PeerLost(others, f"no link to all of them within {timeout_s:g} s ({reason(failed[0])})") from failed[0]
    raise failed[0]


def connect_local(
    num_islands: int, *, timeout_s: float = 60.0, settings: LinkSettings | None = None
) -> list[Connection]:
    """Connections of islands that live in one process, one thread each."""
    hub, exits = LocalHub(num_islands), Hub()
    out = []
    for node in range(num_islands):
        transport: Transport = hub.transport(node)
        if settings and settings.is_slow:
            transport = _throttled(transport, settings, node, lambda name, bits_per_s: MemoryUplink(bits_per_s))
        out.append(Connection(node, num_islands, transport, MemoryMembership(exits, node), Alone(), timeout_s))
    return out


def settings_of(link: LinkSection, levels: Sequence[Level] | None = None) -> LinkSettings:
    """``levels``: those of the job's [sync]; what one does not say of its link is [link]'s."""
    settings = LinkSettings(link.transport, units.bits_per_s(link.rate), units.seconds(link.rtt), link.timeout_s)
    if levels is None or len(levels) != 2 or levels[0].islands is None:  # none that ``levels.of_levels`` lets pass
        return settings
    (near_bits_per_s, near_rtt_s), (bits_per_s, rtt_s) = (
        (units.bits_per_s(level.rate or link.rate), units.seconds(level.rtt or link.rtt)) for level in levels
    )
    return replace(settings, bits_per_s=bits_per_s, rtt_s=rtt_s, near=NearLink(levels[0].islands, near_bits_per_s, near_rtt_s))


def _settings_of_job(path: Path | None) -> tuple[LinkSettings, str | None, dict[str, object]]:
    if path is None:
        return LinkSettings(), None, {}
    from dtrain.config import load_job  # pydantic is not needed by a loop that has no job file

    job = load_job(path)
    axes = job.sync.model_dump(exclude_none=True)
    recipe = axes.pop("recipe", None)
    return settings_of(job.link, job.sync.level), recipe, axes


def _ranks(place: Place, device: torch.device, inside: Callable[[torch.device], Island]) -> Island:
    if place.num_ranks == 1:
        return Alone()
    if not torch.distributed.is_initialized():
        raise ValueError(
            f"this island has {place.num_ranks} ranks and no process group; "
            "call torch.distributed.init_process_group() before dtrain.join"
        )
    return inside(device)


Maker = Callable[[Place, "LinkSettings", Store, str, torch.device, Inbox], Transport]


def _transport(
    place: Place, settings: LinkSettings, store: Store, epoch: int, device: torch.device, lane_of: Mapping[int, int]
) -> Transport:
    makers: dict[str, Maker] = {"c10d": _gloo, "nccl": _nccl}
    make, inbox = makers[settings.transport], Inbox()
    each = {lane: make(place, settings, store, f"link/{epoch}/{lane}", device, inbox) for lane in place.lanes}
    transport = Lanes(each, lane_of, inbox) if len(each) > 1 else each[place.lanes[0]]
    if not settings.is_slow:
        return transport

    def shared(name: str, bits_per_s: float) -> Uplink:
        if place.run is None:
            raise ValueError("link.rate needs DTRAIN_RUN, a folder where the ranks of an island share their uplink's clock")
        return SharedUplink(place.run / "logs" / f"island{place.island}" / f"{name}.clock", bits_per_s)

    return _throttled(transport, settings, place.island, shared)


def _throttled(inner: Transport, settings: LinkSettings, node: int, uplink: Callable[[str, float], Uplink]) -> Throttle:
    far = Hop(uplink("uplink", settings.bits_per_s) if settings.bits_per_s else None, settings.rtt_s)
    if settings.near is None:
        return Throttle(inner, uplink=far.uplink, rtt_s=far.rtt_s)
    near = settings.near
    first = node - node % near.islands
    hop = Hop(uplink("uplink.near", near.bits_per_s) if near.bits_per_s else None, near.rtt_s)
    return Throttle(inner, uplink=far.uplink, rtt_s=far.rtt_s, near=hop, group=range(first, first + near.islands))


def _gloo(
    place: Place, settings: LinkSettings, store: Store, prefix: str, device: torch.device, inbox: Inbox
) -> Transport:
    from dtrain.transport.c10d import GlooTransport  # torch.distributed's gloo is not built everywhere

    return GlooTransport(
        store,
        prefix,
        place.island,
        place.num_islands,
        interface=place.interface,
        connect_s=settings.timeout_s,
        inbox=inbox,
    )


def _nccl(
    place: Place, settings: LinkSettings, store: Store, prefix: str, device: torch.device, inbox: Inbox
) -> Transport:
    from dtrain.transport.ordered import OrderedTransport, nccl_group  # needs a GPU

    return OrderedTransport(
        store,
        prefix,
        place.island,
        place.num_islands,
        make_group=nccl_group(device),
        interface=place.interface,
        device=device,
        connect_s=settings.timeout_s,
        inbox=inbox,
    )
