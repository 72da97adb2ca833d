"""Does a run write down in which rounds an island was, and what of its rounds adapts?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.by_hand import job_of, lines_of, part_of, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rounds_of_a_quorum_are_counted_in_every_line_and_at_the_end(texts: Path, tmp_path: Path) -> None:
    """Of three islands two are enough, and the grace is so long that all are in each round; the third round flies at the end."""
    quorum = ("sync.recipe=decoupled_diloco", "islands.count=3", "sync.quorum=2", 'sync.grace="60s"')
    run = train(job_of(texts, *quorum, "sync.every=2", "sync.delay=1"), tmp_path / "run")
    for island in range(3):
        assert [line["rounds_joined"] for line in lines_of(run, island)] == [0, 0, 1, 1, 2, 2]
        assert [line["rounds_left_out"] for line in lines_of(run, island)] == [0] * 6
        part = part_of(run, island)
        assert (part.rounds_joined, part.rounds_left_out, part.every_steps, part.rank_mean) == (3, 0, None, None)


def test_what_adapts_is_in_the_lines_of_steps_where_rounds_land_and_at_the_end(texts: Path, tmp_path: Path) -> None:
    """Ranks begin at the fewest columns that there are, and so H stays."""
    low_rank = ("sync.recipe=dilocox", 'sync.every="adaptive:2"', 'sync.rank="adaptive:8"', "sync.delay=1", "sync.landing=keep")
    run = train(job_of(texts, *low_rank), tmp_path / "run")
    for island in range(2):
        lines = lines_of(run, island)
        assert {line["step"]: (line["every_steps"], line["rank_mean"]) for line in lines if "rank_mean" in line} == {
            3: (2, 8.0),
            5: (2, 8.0),
        }
        assert not [line for line in lines if "every_steps" in line and "rank_mean" not in line]
        part = part_of(run, island)
        assert (part.every_steps, part.rank_mean, part.rounds_joined, part.rounds_left_out) == (2, 8.0, None, None)
