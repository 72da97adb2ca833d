"""Which rank of an island talks to which rank of another? They meet on lanes, each of which ends at one rank of every island.

Where all islands have as many ranks there are as many lanes, and rank r has lane r. Else there are as many as the largest
island has ranks, and on a smaller one neighbouring lanes end at one rank. A bucket's wires take one lane, whose rank is its
owner. Pure."""

from __future__ import annotations


def rank_of_lane(lane: int, num_lanes: int, num_ranks: int) -> int:
    """Where a lane ends on an island of so many ranks."""
    return lane * num_ranks // num_lanes


def lanes_of(rank: int, num_lanes: int, num_ranks: int) -> tuple[int, ...]:
    """Those that end at a rank; raises ValueError where there are fewer lanes than ranks, and so none at some."""
    if num_lanes < num_ranks:
        raise ValueError(f"{num_lanes} lanes join the islands, and this one has {num_ranks} ranks; there must be as many lanes")
    return tuple(lane for lane in range(num_lanes) if rank_of_lane(lane, num_lanes, num_ranks) == rank)
