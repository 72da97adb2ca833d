"""What happens when the islands' loops do not end together: loaders of 100 and 97 batches, and an exception in one loop?"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from tests.dist import endings
from tests.dist.harness import Result, run_islands, show, values

LOST_S = 6.0
TIMEOUT_S = 300.0
"""Of a link that no job file says anything about; run_islands gives up long before."""
DEADLINE_S = LOST_S / 2
"""For a failed loop to be left; it must not wait for anyone."""

_diloco = functools.partial(endings.unequal, recipe="diloco", every=endings.EVERY)
SCENARIOS = {
    "diloco": functools.partial(_diloco, delay=0, short=1, merge=False),
    "diloco merged": functools.partial(_diloco, delay=0, short=1, merge=True),
    "diloco a round late": functools.partial(_diloco, delay="round", short=1, merge=False),
    "diloco a round late merged": functools.partial(_diloco, delay="round", short=1, merge=True),
    "island 0 is shorter": functools.partial(_diloco, delay=0, short=0, merge=True),
    "dpsgd": functools.partial(endings.unequal, recipe="dpsgd", every=1, delay=1, short=1, merge=False),
    "dpsgd merged": functools.partial(endings.unequal, recipe="dpsgd", every=1, delay=1, short=1, merge=True),
    "choco merged": functools.partial(endings.unequal, recipe="choco", every=1, delay=1, short=1, merge=True),
    "allreduce": functools.partial(endings.unequal, recipe="allreduce", every=1, delay=0, short=1, merge=False),
    "allreduce merged": functools.partial(endings.unequal, recipe="allreduce", every=1, delay=0, short=1, merge=True),
    "local merged": functools.partial(endings.unequal, recipe="local", every=1, delay=0, short=1, merge=True),
    "epochs": functools.partial(endings.looking, short=1),
    "merging alone": functools.partial(endings.merging_alone, leaves=1),
    # The last: the shorter island's process ends here while the other one still trains.
    "gone": functools.partial(_diloco, delay=0, short=1, merge=False),
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return run_islands(SCENARIOS, 2, run=tmp_path_factory.mktemp("endings"), timeout_s=100)


def test_every_process_ends_well(launch: list[Result]) -> None:
    assert [r.status for r in launch] == [0, 0], show(launch)


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in ("epochs", "merging alone")])
def test_loaders_of_100_and_97_batches(launch: list[Result], scenario: str) -> None:
    results = values(launch, scenario)
    short = 0 if scenario == "island 0 is shorter" else 1
    assert [v["step"] for v in results] == [97 if i == short else 100 for i in range(2)]
    if results[short]["merged"]:
        assert results[0]["model"] == results[1]["model"], "all bits equal after sync.merge()"
    said = [r.stderr_of(scenario) for r in launch]
    assert said[short] == [], "nothing to say for the island that others wait for"
    if scenario == "local merged":
        assert said[1 - short] == [], "islands that never talk lose nothing"
        return
    (line,) = said[1 - short]
    did = "averages its model" if results[short]["merged"] else "ended its loop"
    assert line.startswith(f"island {short} {did} after 97 steps"), "one line, which names the island and its steps"


def test_epochs_of_unequal_length_are_named_on_both_islands(launch: list[Result]) -> None:
    for v in values(launch, "epochs"):
        assert "after different numbers of steps (island 0 after 10, island 1 after 8)" in v["said"]
        assert v["took_s"] < TIMEOUT_S, "at once, not when link.timeout_s has passed"


def test_a_merge_without_the_other_island_is_refused_at_once(launch: list[Result]) -> None:
    waiting, left = values(launch, "merging alone")
    assert waiting["said"] == "lost island 1: it left the job after step 5, and this island averages models with it"
    assert waiting["took_s"] < TIMEOUT_S
    assert left["said"] == ""


@pytest.mark.slow
def test_islands_of_two_ranks_end_apart_too(tmp_path: Path) -> None:
    """One bucket, so one rank of each island carries it: both ranks must agree that the other island has ended."""
    ended = functools.partial(endings.unequal_ranks, recipe="fedavg", every=10, short=1)
    results = run_islands({"ranks": ended}, 2, 2, run=tmp_path, timeout_s=100)
    assert [r.status for r in results] == [0] * 4, show(results)
    steps, models = zip(*((v["step"], v["model"]) for v in values(results, "ranks")), strict=True)
    assert steps == (40, 40, 15, 15)
    assert models[0] == models[1]
    assert models[2] == models[3]


def test_an_exception_in_one_loop(tmp_path: Path) -> None:
    """Island 1 ends at once with its own traceback; island 0 waits for it, visibly, and ends with PeerLost."""
    left, failed = run_islands(endings.failing, 2, run=tmp_path, lost_s=LOST_S)
    assert failed.status == 1, show([failed])
    assert failed.stderr.splitlines()[-1] == "ZeroDivisionError: the user's own mistake"
    assert "PeerLost" not in failed.stderr
    assert failed.values["left the block at"] - failed.values["failed at"] < DEADLINE_S, "no drain of the round in flight"
    assert failed.ended_at < left.values["left the block at"], "gone before the other one gave up"
    assert left.status == 1, show([left])
    assert re.fullmatch(r"dtrain\.errors\.PeerLost: lost island 1: .*6 s.*", left.stderr.splitlines()[-1])
    # the round after step 10 lands before the update of step 15, unless island 1 had sent all of it; then the next is missed
    assert left.values["last step"] in (14, 24)
    waited = [line for line in left.stdout.splitlines() if line.startswith("waiting")]
    assert waited, show([left])
    assert all(re.fullmatch(r"waiting for island 1, [1-6] s of 6", line) for line in waited)
    assert waited == sorted(waited)
    assert len(waited) <= LOST_S, "about once a second"
