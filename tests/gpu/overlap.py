"""Does a round fly while its island computes? A trace says so: compute kernels run between the round's posts and its arrivals.

Two islands, threads of this process that share the device, talk over gloo through host memory, on a link whose delay is set to
a few steps of the model. A round flies from when both have posted until the first wire arrives, by the system's clock, which the
trace keeps too. The same job with rounds that are waited for is the counter-proof: there nothing computes in flight."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

import dtrain
from dtrain.connect import Connection
from dtrain.errors import PeerLost
from dtrain.island.replicas import Alone
from dtrain.membership import Hub, MemoryMembership
from dtrain.transport.base import ROUND, Left, Tag, Transport, nobody
from dtrain.transport.c10d import GlooTransport
from dtrain.transport.throttle import Throttle
from tests.gpu.checks import Found

Interval = tuple[float, float]
"""Seconds of the system's clock."""

STEPS, EVERY, DELAY, FLIGHT_STEPS = 24, 8, 6, 2
COMPUTE = ("gemm", "sgemm", "cutlass", "ampere_", "sm80_", "sm90_", "sm100_", "aten::mm", "aten::addmm")
"""What the names of a matrix multiply's kernels hold, and its operations on a CPU."""


class Problem(NamedTuple):
    width: int
    batch: int
    layers: int
    least: float
    """The share of the flights' time that matrix multiplies must cover; on a CPU much of a step is something else."""


GPU = Problem(2048, 8192, 6, least=0.5)
CPU = Problem(128, 256, 2, least=0.05)


class Run(NamedTuple):
    flights: list[Interval]
    computes: list[Interval]
    copies: list[str]
    """Names of the copies between device and host, as the trace has them: pinned or pageable."""
    wait_s: float


def rounds_overlap_compute(device: torch.device) -> Found:
    return overlap(device, GPU if device.type == "cuda" else CPU)


def overlap(device: torch.device, problem: Problem) -> Found:
    step_s = _step_s(device, problem)
    flying, waiting = (_run(device, problem, delay, rtt_s=2 * FLIGHT_STEPS * step_s) for delay in (DELAY, 0))
    fraction, control = (covered(run.flights, run.computes) for run in (flying, waiting))
    inside = sum(any(a <= begin and end <= b for a, b in flying.flights) for begin, end in flying.computes)
    data = {
        "step_s": step_s,
        "flights": len(flying.flights),
        "flight_s": [b - a for a, b in flying.flights],
        "fraction": fraction,
        "fraction_when_waited_for": control,
        "kernels_inside": inside,
        "wait_s": flying.wait_s,
        "wait_s_when_waited_for": waiting.wait_s,
        "copies": sorted(set(flying.copies)),
    }
    said = f"compute kernels ({inside}) cover {fraction:.0%} of the flights' time, and {control:.0%} where rounds are waited for"
    assert flying.flights, "no round flew"
    assert inside, f"no compute kernel ran while a round flew: {said}"
    assert fraction > problem.least, said
    assert control < problem.least / 2, said
    return Found(said, data)


def covered(flights: Sequence[Interval], computes: Sequence[Interval]) -> float:
    """The share of the flights' time in which at least one of the others runs."""
    ours, others = _merged(flights), _merged(computes)
    total = sum(b - a for a, b in ours)
    shared = sum(max(0.0, min(b, d) - max(a, c)) for a, b in ours for c, d in others)
    return shared / total if total else 0.0


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    out: list[Interval] = []
    for a, b in sorted(intervals):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return out


def read_trace(trace: dict[str, Any], *, cuda: bool) -> tuple[list[Interval], list[str]]:
    """Compute kernels (on a CPU the operations) by the system's clock, in seconds; the names of copies to and from the host."""
    base_s = trace.get("baseTimeNanoseconds", 0) / 1e9
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    computes = [
        (base_s + e["ts"] / 1e6, base_s + (e["ts"] + e["dur"]) / 1e6)
        for e in events
        if e.get("cat") == ("kernel" if cuda else "cpu_op") and any(word in e["name"] for word in COMPUTE)
    ]
    return computes, [e["name"] for e in events if e.get("cat") == "gpu_memcpy" and "DtoD" not in e["name"]]


class _Noted:
    """A transport that notes when a round's wire is posted, and when the one it waits for is taken from the inbox."""

    def __init__(self, inner: Transport) -> None:
        self.inbox, self.wires_on = inner.inbox, inner.wires_on
        self._inner = inner
        self.posted: dict[Tag, float] = {}
        self.arrived: dict[Tag, float] = {}
        deliver = self.inbox.deliver

        def note(peer: int, tag: Tag, wire: Tensor) -> None:
            self.arrived[tag] = time.time()
            deliver(peer, tag, wire)

        self.inbox.deliver = note

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        self.posted[tag] = time.time()
        self._inner.post(peer, tag, wire)

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        self._inner.expect(peer, tag, wire_bytes)

    def forget(self, peer: int, tag: Tag) -> None:
        self._inner.forget(peer, tag)

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        self._inner.close(drain_s=drain_s, left=left)


def _flights(noted: Sequence[_Noted]) -> list[Interval]:
    tags = [tag for tag in noted[0].posted if tag.kind == ROUND and all(tag in n.posted and tag in n.arrived for n in noted)]
    both = [(max(n.posted[tag] for n in noted), min(n.arrived[tag] for n in noted)) for tag in tags]
    return [(a, b) for a, b in both if a < b]


def _connections(rtt_s: float) -> tuple[list[Connection], list[_Noted]]:
    """Two islands over gloo and loopback; each transport is made on a thread, as it waits for the other."""
    store, exits, made = HashStore(), Hub(), dict[int, GlooTransport]()

    def make(node: int) -> None:
        made[node] = GlooTransport(store, "overlap", node, 2, interface="lo", connect_s=60.0)

    _in_threads(make)
    noted = [_Noted(Throttle(made[node], uplink=None, rtt_s=rtt_s)) for node in range(2)]
    return [Connection(node, 2, noted[node], MemoryMembership(exits, node), Alone(), 60.0) for node in range(2)], noted


def _in_threads(target: Any) -> None:
    failed: list[Exception] = []

    def run(node: int) -> None:
        try:
            target(node)
        except (RuntimeError, ValueError, PeerLost) as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(node,), daemon=True) for node in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failed, f"an island ended with {failed[0]!r}"
    assert not any(thread.is_alive() for thread in threads), "an island did not end within 120 s"


def _model(device: torch.device, problem: Problem) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(problem.width, problem.width, bias=False) for _ in range(problem.layers))).to(device)


def _step(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    if x.is_cuda:
        torch.cuda.current_stream().synchronize()  # else the host would run rounds ahead of the device


def _step_s(device: torch.device, problem: Problem) -> float:
    """The least time of a step when two islands share the device."""
    took: list[float] = []

    def island(node: int) -> None:
        model, x = _model(device, problem), torch.randn(problem.batch, problem.width, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
            times: list[float] = []
            for _ in range(8):
                began = time.perf_counter()
                _step(model, optimizer, x)
                times.append(time.perf_counter() - began)
        took.append(min(times))

    _in_threads(island)
    return max(took)


def _run(device: torch.device, problem: Problem, delay: int, *, rtt_s: float) -> Run:
    connections, noted = _connections(rtt_s)
    waited: list[float] = []
    together = threading.Barrier(2, timeout=60)  # else one island is a round ahead on a busy machine, and none flies for both

    def island(node: int) -> None:
        model, x = _model(device, problem), torch.randn(problem.batch, problem.width, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        # The traffic thread works on the stream that its island launched on; each island has its own.
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
            link = connections[node]
            with dtrain.join(model, optimizer, recipe="fedavg", every=EVERY, delay=delay, codec="int8:64", link=link) as sync:
                for _ in range(STEPS + DELAY + 1):
                    together.wait()
                    _step(model, optimizer, x)
                waited.append(sync.stats().wait_s)

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True)) as profiler:
        _in_threads(island)
        if cuda:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        computes, copies = read_trace(json.loads(path.read_text(encoding="utf-8")), cuda=cuda)
    assert len(waited) == 2, "an island ended before its last step"
    return Run(_flights(noted), computes, copies, max(waited))
