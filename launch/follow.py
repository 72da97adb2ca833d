"""What does another node of an island do? Starts its torchrun whenever the first one does, which joins the launcher for all.

``python -m dtrain.launch.follow JOB.toml RUN ISLAND HOST:PORT``, with DTRAIN_TORCHRUN as on the first node but for the node's
rank. Of each start the launcher tells the epoch and the step at the meeting point.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

from torch._C._distributed_c10d import Store

from dtrain.config import load_job
from dtrain.errors import PeerLost
from dtrain.launch import islands, processes
from dtrain.launch.closing import EXIT_RESUMABLE
from dtrain.launch.local import Stopped, stop_signals_raise
from dtrain.launch.part_words import started
from dtrain.launch.timed_store import TimedStore

_POLL_S = 0.2


def follow(launch: islands.Launch, island: int, store: Store) -> int:
    """The exit status of the torchruns: 0 when one has ended well. When this returns or raises, no process of them is left.

    There is no clock between two starts: the launcher waits with the next until all other islands stand still. Raises PeerLost
    where the store says that the launcher is gone, or silent, and the torchrun that is there does not end well without it."""
    torchrun, epoch = None, -1
    try:
        while True:
            told = started(store, island)
            if told is not None and told[0] > epoch:
                if torchrun is not None:
                    print(f"the island starts anew: its torchrun of epoch {epoch} is ended here", flush=True)
                _end(launch, torchrun)
                epoch, step = told
                torchrun = _start(launch, island, epoch, step)
            elif torchrun is not None and (status := torchrun.poll()) is not None:
                if status == 0:
                    return 0
                print(f"the torchrun of epoch {epoch} has failed here; waiting for the next", flush=True)
                torchrun = None
            time.sleep(_POLL_S)
    except PeerLost:
        if torchrun is not None and _ends_well(torchrun, launch.job.link.timeout_s):
            return 0
        raise
    finally:
        _end(launch, torchrun)


def _start(launch: islands.Launch, island: int, epoch: int, step: int) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C in a terminal reaches the one that ends it."""
    return subprocess.Popen(
        islands.command(launch, island, epoch),
        env={**os.environ, **islands.environment(launch, island, epoch, step)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end(launch: islands.Launch, torchrun: subprocess.Popen[bytes] | None) -> None:
    """And its ranks, also those that outlived it."""
    processes.end(launch.tag, [] if torchrun is None else [torchrun])


def _ends_well(torchrun: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """At the end of a run the launcher may be gone first; at any other its ranks find that out too."""
    try:
        return torchrun.wait(timeout_s) == 0
    except subprocess.TimeoutExpired:
        return False


def reach(meet: str, timeout_s: float) -> TimedStore:
    """The meeting point, which may be late, and its name with it; raises PeerLost where it is not there in time."""
    host, _, port = meet.rpartition(":")
    gives_up = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=timeout_s).close()
            return TimedStore(meet, timeout_s)
        except OSError as e:
            if time.monotonic() > gives_up:
                raise PeerLost((), f"no launcher at {meet} within {timeout_s:g} s ({e.strerror or e})") from None
            time.sleep(_POLL_S)


def main(job_file: str, run: str, island: str, meet: str) -> int:
    job = load_job(Path(job_file))
    tag, torchruns = secrets.token_hex(8), islands.take_torchruns()
    launch = islands.Launch(job, Path(run), meet, tag=tag, torchruns=torchruns)
    try:
        with stop_signals_raise():
            return follow(launch, int(island), reach(meet, job.link.timeout_s))
    except PeerLost as e:
        print(f"dtrain: {e}", file=sys.stderr)
        return EXIT_RESUMABLE
    except Stopped as stop:
        return 128 + stop.number


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
