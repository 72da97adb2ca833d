"""How is ``dtrain run`` called where a scheduler starts the islands? With tables [[islands.each]] that leave them to it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from dtrain.config import Job, toml_value

MEET = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*):([0-9]{1,5})")
_OF_A_LAUNCHER = ("launcher", "host", "workdir", "python")
"""Keys of [[islands.each]] that say who starts an island."""


def tables_of(job: Job) -> list[dict[str, Any]]:
    """What [[islands.each]] says of each island, but for who starts it; empty tables where islands are alike."""
    return [{key: value for key, value in table.items() if key not in _OF_A_LAUNCHER} for table in _said(job)]


def each_override(job: Job, launcher: Literal["slurm", "manual"], others: Collection[int] = ()) -> str:
    """The tables with another launcher, but for ``others``, whose own tables stand as they are; as an override."""
    said = _said(job)
    tables = [said[k] if k in others else {**table, "launcher": launcher} for k, table in enumerate(tables_of(job))]
    return f"islands.each=[{', '.join(_inline(table) for table in tables)}]"


def nodes_of(island: int, ranks: int, nodes: int | None, gpus_per_node: int | None) -> int:
    """How many nodes an island has: as many as are said, else as its ranks need with a GPU for each.

    Raises ValueError where ranks and nodes do not divide."""
    if nodes is None:
        nodes = 1 if gpus_per_node is None or ranks <= gpus_per_node else -(-ranks // gpus_per_node)
    if ranks % nodes:
        raise ValueError(
            f"{ranks} ranks of island {island} do not divide by {nodes} nodes; use another islands.ranks, or other numbers of "
            "nodes and GPUs"
        )
    if gpus_per_node is not None and ranks // nodes > gpus_per_node:
        raise ValueError(
            f"{ranks // nodes} ranks a node of island {island} are more than --gpus-per-node {gpus_per_node}; use more "
            "--nodes-per-island"
        )
    return nodes


def _said(job: Job) -> list[dict[str, Any]]:
    return job.islands.model_dump(exclude_none=True).get("each") or [{}] * job.islands.count


def _inline(table: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{key} = {toml_value(value)}" for key, value in table.items()) + "}"
