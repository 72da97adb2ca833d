"""Are decent_adam and accum_adam what the authors of arXiv 2410.11998 run? Held to their package, in processes of torchrun.

Its step t is ours: an update at the un-mixed parameters, then an exchange, which lands before update t + 1. What differs:
* Its first exchange is waited for on the spot. Ours flies; it lands at the same place, so nothing that is computed differs.
* Its edges are numbered from the step, and it starts at 1 and never uses number 2 (its counter has moved on between its first
  exchange, which ``forward`` starts, and the second, which the backward hook starts). Our rounds are numbered 0, 1, 2, ...; here
  they are given its numbers: 1, 3, 4, 5, ...
* Its one-peer exponential graph pairs j with j + 2^r both ways, which takes n = 2^k: a hypercube's edges, in turns. Ours sends to
  node + 2^r and hears node - 2^r (Ying et al. 2021), and is the same for two; for four, ours of that kind is "coloured" over
  "hypercube". Its other two are ours by other names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.connect import Connection
from dtrain.launch.processes import PARENT_VARIABLE
from dtrain.optim import AccumAdamW
from tests.dist.decent_dp_rank import BETAS, EPS, LR, STEPS, S, flat, loss_of, make_model
from tests.dist.harness import ROOT
from tests.dist.job import kill_tree
from tests.islands import run_islands

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 14), reason="decent-dp says that it is for Python below 3.14")

TOLERANCE = 1e-5
"""A hundredth of one step's lr. Both sides round each of 50 steps and Adam's quotients in their own order, at 2^-24 each."""
RECIPES = {"adamw": ("decent_adam", 1), "accum": ("accum_adam", S)}
OURS: dict[str, dict[str, Any]] = {
    "complete": {"topology": "complete"},
    "ring": {"topology": "one_peer_ring"},
    "one-peer-exp": {"topology": "one_peer_exponential"},
}
HYPERCUBE = {"topology": "coloured", "graph": "hypercube"}


def theirs(n: int, runs: list[str], folder: Path) -> None:
    """Let ``n`` ranks of their package do ``runs``; whatever happens, none of them outlives the call."""
    folder.mkdir()
    # The agent's port is a free one on loopback.
    agent = [sys.executable, "-m", "dtrain.launch.agent", f"--nproc-per-node={n}", "-m", "tests.dist.decent_dp_rank"]
    env = child_environment()
    pipe = subprocess.PIPE
    process = subprocess.Popen([*agent, str(folder), *runs], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)
    try:
        out, err = process.communicate(timeout=100)
    finally:
        kill_tree(process)
    assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{err}"


def child_environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DTRAIN_")}
    # Without a GPU: their package moves any model to one that it sees, and the processes here are gloo's.
    return kept | {
        PARENT_VARIABLE: str(os.getpid()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "LOGURU_LEVEL": "WARNING",
    }


def ours(n: int, optimizer: str, axes: dict[str, Any]) -> Tensor:
    """(n, parameters) after STEPS steps, with a round in flight."""
    recipe, every = RECIPES[optimizer]

    def island(connection: Connection) -> Tensor:
        model = make_model()
        adam = AccumAdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, every=every)
        with dtrain.join(model, adam, recipe=recipe, bucket_bytes=4096, link=connection, **axes) as sync:
            assert len(sync.core.lanes) == 2
            for step in range(STEPS):
                for lane in sync.core.lanes:
                    lane.round = step + 1 if step == 0 else step + 2
                adam.zero_grad()
                loss_of(model, connection.node, step).backward()
                adam.step()
            return flat(model)

    return torch.stack(run_islands(n, island))


def apart(n: int, run: str, folder: Path, axes: dict[str, Any]) -> float:
    topology, _, optimizer = run.partition("/")
    want = torch.stack([torch.load(folder / f"{topology}-{optimizer}-{rank}.pt") for rank in range(n)])
    return float((ours(n, optimizer, axes) - want).abs().max())


def test_two_islands_are_their_two_ranks(tmp_path: Path) -> None:
    runs = ["ring/adamw", "one-peer-exp/accum"]
    theirs(2, runs, tmp_path / "theirs")
    for run in runs:
        assert apart(2, run, tmp_path / "theirs", OURS[run.partition("/")[0]]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_every_topology_and_optimizer_is_theirs(n: int, tmp_path: Path) -> None:
    runs = [f"{topology}/{optimizer}" for topology in OURS for optimizer in RECIPES]
    theirs(n, runs, tmp_path / "theirs")
    found: dict[str, float] = {}
    for run in runs:
        topology = run.partition("/")[0]
        axes = HYPERCUBE if (topology, n) == ("one-peer-exp", 4) else OURS[topology]
        found[run] = apart(n, run, tmp_path / "theirs", axes)
    assert max(found.values()) < TOLERANCE, found
    if n == 4:  # another graph, or another order of rounds, is seen
        assert apart(n, "one-peer-exp/adamw", tmp_path / "theirs", OURS["one-peer-exp"]) > 10 * TOLERANCE
