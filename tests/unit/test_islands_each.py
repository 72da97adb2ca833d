"""What can tables [[islands.each]] say of islands that are not alike, or not here, and what can they not?"""

from __future__ import annotations

import re
import tomllib

import pytest

from dtrain.config import dump_job, parse_job
from dtrain.launch.elsewhere import check_hosts


def test_a_table_an_island_says_what_is_its_own_and_the_rest_is_of_all() -> None:
    raw = {
        "islands": {
            "ranks": 2, "engine": "pipeline",
            "each": [{}, {"ranks": 1, "engine": "ddp", "launcher": "ssh", "host": "far", "interface": "eth1"}],
        },
        "train": {"accumulate": 2, "batch": 4},
        "link": {"interface": "eth0"},
    }  # fmt: skip
    job = parse_job(raw)
    assert job.islands.count == 2, "the number of the tables"
    first, second = job.island(0), job.island(1)
    assert (first.ranks, first.engine, first.launcher, first.interface) == (2, "pipeline", "local", "eth0")
    assert (second.ranks, second.engine, second.host, second.interface) == (1, "ddp", "far", "eth1")
    assert (job.ranks, job.elsewhere) == (3, [1])
    changed = parse_job(raw, ["islands.each.1.host=farther", 'islands.each.0.launcher="manual"'])
    assert (changed.island(1).host, changed.elsewhere) == ("farther", [0, 1])
    assert raw["islands"]["each"][1]["host"] == "far", "the file's own tables stay"
    alike = parse_job({"islands": {"count": 3, "ranks": 2}})
    assert ([alike.island(k).ranks for k in range(3)], alike.ranks, alike.elsewhere) == ([2, 2, 2], 6, [])
    assert parse_job(tomllib.loads(dump_job(job))) == job


def test_an_island_sees_a_job_of_islands_like_itself() -> None:
    raw = {"islands": {"each": [{"ranks": 2, "engine": "fsdp"}, {}]}}
    job = parse_job(raw)
    assert job.uneven
    assert [(job.seen_by(k).islands.ranks, job.seen_by(k).islands.engine) for k in range(2)] == [(2, "fsdp"), (1, "ddp")]
    assert job.seen_by(1).islands.count == 2
    assert not parse_job({"islands": {"count": 2, "ranks": 2, "each": [{}, {"ranks": 2}]}}).uneven


@pytest.mark.parametrize(
    ("raw", "overrides", "words"),
    [
        ({"count": 3, "each": [{}, {}]}, [], "islands.count = 3 with 2 tables [[islands.each]]; write a table for each island"),
        ({"each": [{}, {"rank": 2}]}, [], "unknown key islands.each.1.rank; did you mean 'ranks'?"),
        ({"each": [{}, {"ranks": 0}]}, [], "islands.each.1.ranks = 0 is not allowed; use 1 or more"),
        ({"each": [{}, {"launcher": "rsh"}]}, [], "islands.each.1.launcher = 'rsh' is not allowed; use 'local', 'ssh', 'slurm'"),
        ({"each": [{}, {"host": "b"}]}, [], "islands.each.1.host = 'b' has no effect with launcher = \"local\"; leave it out"),
        ({"each": [{"launcher": "ssh", "host": "-oUser=x"}]}, [], "islands.each.0.host = '-oUser=x' is not allowed"),
        ({"each": [{}, {}]}, ["islands.each.2.ranks=1"], "names no key of an island's table; the job has each.0 to each.1"),
        ({}, ["islands.each.0.ranks=1"], "the job has no [[islands.each]], and islands.each.0.host is a key of the first"),
        ({"each": [{}, {"ranks": 3}]}, [], "train.batch = 4 does not divide by islands.each.1.ranks x train.accumulate = 3"),
        (
            {"each": [{}, {"ranks": 2, "engine": "pipeline"}]},
            [],
            "train.accumulate = 1 micro-batches leave some of islands.each.1.ranks = 2 stages",
        ),
        (
            {"shards": 2, "each": [{}, {"ranks": 3, "engine": "fsdp"}]},
            ["train.batch=3"],
            "islands.shards = 2 does not divide islands.each.1.ranks = 3",
        ),
        ({"each": [{}, {"engine": "pipeline"}]}, [], 'islands.each.1.engine = "pipeline" with islands.each.1.ranks = 1 is one'),
    ],
)
def test_what_tables_cannot_say_is_one_line(raw: dict[str, object], overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        parse_job({"islands": raw}, overrides)
    assert "\n" not in str(refusal.value)


def test_a_job_of_several_hosts_says_where_they_are_and_how_they_reach_each_other() -> None:
    by_site = {"each": [{}, {"launcher": "manual"}]}
    with pytest.raises(ValueError, match=r"each\.1\.launcher = \"ssh\" without a host; say islands\.each\.1\.host, or --hosts"):
        check_hosts(parse_job({"islands": {"each": [{}, {"launcher": "ssh"}]}}))
    with pytest.raises(ValueError, match=r"island 1 is not started here, and the meeting point listens on loopback only; .*eth0"):
        check_hosts(parse_job({"islands": by_site}))
    check_hosts(parse_job({"islands": by_site, "link": {"interface": "lo"}}))
    check_hosts(parse_job({"islands": {"count": 2}}))
