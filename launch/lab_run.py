"""How does a job run over a lab's links, and were its bytes those that it says?

Every island's torchrun runs in a namespace of its own. The launcher lives in the bridge's, so that the meeting point has an
address of the lab."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dtrain import units
from dtrain.config import Job
from dtrain.launch import lab, lab_net
from dtrain.launch.checks import read_job
from dtrain.launch.islands import Site, folder
from dtrain.launch.lab import Counted, Lab
from dtrain.launch.run_folder import Opened
from dtrain.metrics import Part, read_part

HEADER = ["at an island's interface", "sent", "received", "the run says it sent", "sent / said"]


def sites(num_islands: int) -> tuple[Site, ...]:
    """Where the islands run."""
    return tuple(Site(("ip", "netns", "exec", lab.namespace(island))) for island in range(num_islands))


def enter(there: Lab, job_file: Path, overrides: Sequence[str]) -> tuple[Job, list[str]]:
    """Move this process into the lab; returns the job and what of its link is another, before the overrides that were typed.

    Raises ValueError where the lab has too few islands."""
    job = read_job(job_file, overrides)
    if job.islands.count > there.islands:
        raise ValueError(
            f"{job_file}: islands.count = {job.islands.count}, and the lab has {there.islands}; make a larger one, or say "
            f"islands.count={there.islands}"
        )
    if job.elsewhere:
        raise ValueError(f"{job_file}: island {job.elsewhere[0]} runs elsewhere, and all of a lab's run here; use dtrain run")
    lab_net.enter(lab.hub())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of each address that has no name
    return job, link_keys(there, job)


def link_keys(there: Lab, job: Job) -> list[str]:
    """Overrides: rates are the lab's, so none is kept by the transport; so is the round trip where the lab has one."""
    keys = ["link.rate=none", f"link.interface={lab.DEVICE}", 'link.advertise=""']
    keys += [f"sync.level.{k}.rate=none" for k in range(len(job.sync.level or ()))]
    keys += [f"islands.each.{k}.interface={lab.DEVICE}" for k in range(len(job.islands.each or ()))]
    if there.link.rtt_s:
        keys += ["link.rtt=0ms", *(f"sync.level.{k}.rtt=0ms" for k in range(len(job.sync.level or ())))]
    return keys


def said(opened: Opened, *, scripted: bool) -> list[int | None]:
    """Payload that each island posted, by its own count. None where that is not of this launch alone, or a script's, which keeps
    its counts to itself."""
    if scripted or opened.finished or opened.resume_step:
        return [None] * opened.job.islands.count
    return [posted(read_part(folder(opened.run, island))) for island in range(opened.job.islands.count)]


def posted(part: Part) -> int:
    """Bytes of payload, of the rounds, the start, and all exact averages."""
    return part.wire_bytes_sent + part.wire_bytes_start + part.wire_bytes_merge + part.wire_bytes_consensus


def rows(before: Sequence[Counted], after: Sequence[Counted], said: Sequence[int | None]) -> list[list[str]]:
    """Of each island: what its interface counted beside what the run says."""
    found = list[list[str]]()
    for island, says in enumerate(said):
        sent, received = after[island].sent - before[island].sent, after[island].received - before[island].received
        shown = ["-", "-"] if not says else [units.show_bytes(says), f"{sent / says:.3f}"]
        found.append([str(island), units.show_bytes(sent), units.show_bytes(received), *shown])
    return found
