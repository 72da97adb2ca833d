"""How many processes does a simulation pay, and which of them has which islands?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count as numbers

from dtrain.assemble import assemble
from dtrain.build import build_recipe
from dtrain.config import Job
from dtrain.sim import cores
from dtrain.topology import Topology
from dtrain.train import cpu_threads
from dtrain.virtual_job import link_model

_START_S = 3.0
"""That a process takes to import torch and this package (2 cores of 2.5 GHz); it may gain as much again before it pays."""
_ROUND_S, _ELEMENT_S = 60e-6, 7e-9
"""Of an island's step with a round of gossip, and of each of its parameters: 130 us for 10,000."""
_WINDOW_S = 2e-3
"""Work of one process in a window that is worth two shares' waking each other, which takes 0.1 ms."""
_COUNTED_WIRES = 20_000


def owners_of(job: Job, numel: int) -> list[int]:
    """Island -> its share, from 0 on."""
    count = job.islands.count
    shares = job.sim.processes or _that_pay(job, numel)
    if shares == 1:
        return [0] * count
    return split(assemble(build_recipe(job), job.job.seed, count).topology, count, shares)


def _that_pay(job: Job, numel: int) -> int:
    """As many as there are cores, unless a start costs more than it saves, or windows have too little in them."""
    sim, count = job.sim, job.islands.count
    round_s = _ROUND_S + _ELEMENT_S * numel
    if count * job.train.steps * round_s < 4 * _START_S:
        return 1
    together = 1.0
    """Of the islands, how many do something in one window: all where they are alike."""
    if sim.step_noise or sim.loss or link_model(job).jitter_s:
        least_s = link_model(job).least_s
        together = min(1.0, least_s / sim.step_s) if sim.step_s else float(least_s > 0)
    full = int(count * round_s * together / _WINDOW_S)
    return max(1, min(cores() // cpu_threads(job), count, full))


def split(topology: Topology, num_islands: int, shares: int) -> list[int]:
    """Neighbours in blocks, or those that are ``shares`` apart: whichever fewer wires leave. On a ring of 1,000 and 2 shares 4
    wires a round leave blocks and all 2,000 the other; of one-peer exponential's rounds 200 in the mean and 100, all of those of
    hop 1."""
    blocks = [node * shares // num_islands for node in range(num_islands)]
    apart = [node % shares for node in range(num_islands)]
    crossing = _crossing(topology, num_islands, (blocks, apart))
    return blocks if crossing[0] <= crossing[1] else apart


def _crossing(topology: Topology, num_islands: int, splits: Sequence[Sequence[int]]) -> list[int]:
    """Wires of the first rounds that leave a share, of each split: two walks of doubling hops, or as many as are counted soon."""
    found, seen = [0] * len(splits), 0
    for index in numbers():
        for node in range(num_islands):
            sends = topology(index, node, num_islands).sends
            seen += len(sends)
            for i, owners in enumerate(splits):
                found[i] += sum(owners[peer] != owners[node] for peer in sends)
        if seen >= _COUNTED_WIRES or index + 1 >= 2 * num_islands.bit_length():
            return found
    raise AssertionError("numbers() do not end")
