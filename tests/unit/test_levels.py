"""What can two levels of a job say, is what they cannot say refused with one line, and is each link as slow as is said?"""

from __future__ import annotations

import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain import launch
from dtrain.build import build_recipe
from dtrain.config import Job, dump_job, load_job, parse_job, runs_a_script
from dtrain.connect import LinkSettings, NearLink, connect_local, settings_of
from dtrain.launch.checks import check_answers, resolved, with_absolute_paths
from dtrain.launch.cli import run_command
from dtrain.launch.keys import key_rows
from dtrain.launch.resume import resumed_job
from dtrain.recipes import RECIPES, of_section
from dtrain.sections_sync import Level
from dtrain.transport.base import ROUND, Tag
from dtrain.transport.local import LocalHub
from dtrain.transport.throttle import Hop, Throttle

SHIPPED = Path(launch.__file__).parent / "jobs" / "two_levels.toml"
NEAR: dict[str, Any] = {"recipe": "dpsgd", "islands": 2}
FAR: dict[str, Any] = {"recipe": "diloco"}


def shipped(*overrides: str) -> Job:
    return load_job(SHIPPED, overrides)


def test_the_far_levels_recipe_has_the_near_ones_in_it_and_what_loops_need_of_both() -> None:
    recipe = build_recipe(shipped())
    assert recipe.near is not None
    near = recipe.near.recipe
    assert (recipe.name, recipe.title, recipe.near.islands) == ("dilocox", "accum_adam + dilocox", 2)
    assert (near.codec, near.every, recipe.every, recipe.rank) == ("int8:64", 1, 8, 16)
    assert recipe.levels == (near, recipe)
    assert (recipe.moments_every, RECIPES["dilocox"].moments_every) == (4, None)
    assert of_section({"recipe": "diloco"}, 4).levels == (RECIPES["diloco"],)


def test_a_job_with_levels_comes_back_from_its_own_toml_with_every_answer() -> None:
    job = with_absolute_paths(resolved(shipped()))
    again = parse_job(tomllib.loads(dump_job(job)))
    assert again == job
    assert build_recipe(again) == build_recipe(shipped())
    assert (runs_a_script(again), runs_a_script(shipped())) == (False, True)
    check_answers(again, "run")
    check_answers(again, "sim")


def both(job: Job) -> tuple[Level, Level]:
    near, far = job.sync.level or []
    return near, far


def test_the_command_line_changes_keys_of_a_level_and_a_recipe_drops_its_other_answers() -> None:
    near, far = both(shipped("sync.level.0.codec=bf16", "sync.level.1.outer_lr=0.3", "sync.level.1.rate=1mbit"))
    assert (near.codec, far.outer_lr, far.rate, far.rank) == ("bf16", 0.3, "1mbit", 16)
    near, far = both(shipped("sync.level.0.every=2", "sync.level.0.recipe=choco", "sync.level.1.outer_lr=1"))
    assert near.model_dump(exclude_none=True) == {"recipe": "choco", "every": 2, "islands": 2, "rate": "1gbit", "rtt": "1ms"}
    assert far.outer_lr == 1.0
    assert shipped("sync.recipe=diloco").sync.model_dump(exclude_none=True) == {"recipe": "diloco"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sync.level.2.every=2"], "sync.level.2.every names no key of a level; the job has level.0 to level.1"),
        (["sync.level.every=2"], "sync.level.every names no key of a level"),
        (["sync.level.0.evry=2"], "unknown key sync.level.0.evry; did you mean 'every'?"),
        (["sync.level.1.every=0"], "sync.level.1.every = 0 is not allowed"),
        (["sync.level.0.rate=fast"], "'fast' is not a rate"),
        (["sync.level.0.islands=1"], "sync.level.0.islands = 1 is not allowed"),
        (["sync.every=5"], "sync.every = 5 beside [[sync.level]]: of which level?"),
        (["islands.count=5"], "sync.level.0.islands = 2 of islands.count = 5: the islands are two groups or more"),
        (["islands.count=2"], "use a multiple of 2 from 4 on as islands.count"),
        (["sync.level.1.islands=2"], "sync.level.1.islands = 2: the far level joins all groups of the near one; leave it out"),
        (["sync.level.0.recipe=diloco"], 'beneath an outer loop only dpsgd, choco, deepsqueeze, multi_gossip'),
        (["sync.level.0.recipe=push_sum", "sync.level.0.graph=arcs"], "sync.level.0: "),
        (["sync.level.0.recipe=demo"], 'recipe = "demo" is of algorithm "demo", and beneath an outer loop only'),
        (["sync.level.1.recipe=dpsgd"], 'groups are joined by an outer loop with one anchor, "diloco"; use recipe = "diloco"'),
        (["sync.level.1.recipe=noloco"], 'recipe = "noloco" is of algorithm "noloco"'),
        (["sync.level.1.recipe=streaming_diloco"], 'landing = "blend" takes a share of the parameters\' place'),
        (["sync.level.1.recipe=single_merge"], "sync.level.1: "),
        (["sync.level.1.recipe=muloco"], "moments that accumulate are AdamW's, and one of them is defined with Muon"),
        (["sync.level.1.exclude=['head.*']"], "give both the same include and exclude"),
        (["sync.level.1.outer_lr=2.1"], "sync.level.1: sync.outer_lr = 2.1 is not stable with sync.landing"),
        (
            ["sync.level.1.landing=eager", "sync.level.1.outer_lr=0.4", "sync.level.0.every=3", "sync.level.0.delay=2"],
            'use delay = 1 in sync.level.0, or landing = "keep"',
        ),
        (["sync.level.1.recipe=fedavg", "sync.level.0.every=3", "sync.level.0.delay=2"], "with delay = 0 a far round takes"),
        (["sync.level.1.delay=round"], "land 8 later, and no round of sync.level.0 mixes between that and the next, so that"),
        (["sync.level.1.delay=round"], "islands of a group would drift apart; use delay = 7 or less in sync.level.1"),
        (["sync.level.1.delay=5", "sync.level.0.every=4"], "use delay = 4 or less in sync.level.1"),
        (["sync.level.1.delay=1", "sync.level.0.every=8"], "use every = 9 or more in sync.level.1"),
        (["islands.ranks=2"], "islands.ranks = 2 with [[sync.level]]: the near level is what an island's ranks would do"),
        (["islands.start=own"], "diloco keeps an anchor that all islands share"),
        (["link.rate=5mbit"], "link.rate = '5mbit' has no effect where each level has its rate; change sync.level.1.rate"),
        (["link.rtt=9ms"], "link.rtt = '9ms' has no effect where each level has its rtt; change sync.level.1.rtt"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        check_answers(resolved(shipped(*overrides)), "run")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rounds_that_are_late_by_more_than_a_step_may_fly_where_a_far_one_starts_with_them() -> None:
    """Every 5th far step is one of a near round too, and that has landed."""
    check_answers(resolved(shipped("sync.level.0.every=5", "sync.level.0.delay=5")), "run")
    check_answers(resolved(shipped("sync.level.0.every=3", "sync.level.0.delay=0")), "run")


@pytest.mark.parametrize(
    "overrides", [("delay=7",), ("delay=round", "0.delay=0"), ("delay=4", "0.every=4"), ("delay=6", "0.every=3"), ("delay=0",)]
)
def test_where_a_near_round_mixes_what_landed_before_the_next_far_one_it_is_allowed(overrides: tuple[str, ...]) -> None:
    said = [f"sync.level.{'' if '.' in word else '1.'}{word}" for word in overrides]
    check_answers(resolved(shipped(*said)), "run")


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ([NEAR], "[[sync.level]] stands there 1 time, and a job has two levels, near and far, or none; write its keys"),
        ([NEAR, FAR, FAR], "[[sync.level]] stands there 3 times, and a job has two levels, near and far, or none; leave"),
        ([{"islands": 2}, FAR], 'sync.level.0 names no recipe; say one, recipe = "accum_adam" for instance'),
        ([NEAR, {}], 'sync.level.1 names no recipe; say one, recipe = "dilocox" for instance'),
        ([{"recipe": "dpsgd"}, FAR], "sync.level.0.islands = None: say how many neighbouring islands are a group, 2 or more"),
    ],
)
def test_levels_are_two_with_a_recipe_each(levels: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        of_section({"level": levels}, 4)
    assert said in str(caught.value)


@pytest.mark.parametrize("arguments", [["plan", str(SHIPPED)], ["sim", str(SHIPPED), "sim.step_s=0.1"]])
def test_what_is_of_one_level_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    said = capsys.readouterr().err
    assert "[[sync.level]]" in said
    assert len(said.strip().splitlines()) == 1


def test_a_resumed_run_keeps_its_levels_and_may_have_other_links(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(dump_job(resolved(shipped())))
    levels = resumed_job(tmp_path, ["sync.level.1.rate=5mbit", "islands.count=6"]).sync.level or []
    assert [level.rate for level in levels] == ["1gbit", "5mbit"]
    with pytest.raises(ValueError, match=r"sync\.level\.0\.codec = 'bf16' differs from the run's 'int8:64'"):
        resumed_job(tmp_path, ["sync.level.0.codec=bf16"])
    with pytest.raises(ValueError, match=r"sync\.recipe = 'diloco' differs from the run's None"):
        resumed_job(tmp_path, ["sync.recipe=diloco"])


def test_the_keys_of_a_levels_link_are_listed() -> None:
    rows = {key: default for key, default, _ in key_rows("sync")}
    assert (rows["sync.level"], rows["sync.level.0.islands"]) == ("(none)", "(none)")
    assert (rows["sync.level.N.rate"], rows["sync.level.N.rtt"]) == ("link.rate", "link.rtt")


def test_a_levels_link_is_the_jobs_where_it_says_nothing() -> None:
    job = shipped()
    assert settings_of(job.link, job.sync.level) == LinkSettings("c10d", 1e7, 0.04, 300.0, NearLink(2, 1e9, 0.001))
    raw = {"islands": {"count": 4}, "link": {"rate": "2mbit", "rtt": "8ms"}, "sync": {"level": [NEAR, {**FAR, "rtt": "16ms"}]}}
    job = parse_job(raw)
    assert settings_of(job.link, job.sync.level) == LinkSettings("c10d", 2e6, 0.016, 300.0, NearLink(2, 2e6, 0.008))
    assert settings_of(job.link, None) == settings_of(job.link) == LinkSettings("c10d", 2e6, 0.008, 300.0)


class Counted:
    """An uplink without a limit that knows what it carried."""

    def __init__(self) -> None:
        self.wire_bytes: list[int] = []

    def reserve(self, wire_bytes: int) -> float:
        self.wire_bytes.append(wire_bytes)
        return 0.0


def arrived(hub: LocalHub, node: int, peer: int, tag: Tag) -> Tensor:
    inbox = hub.transport(node).inbox
    with inbox.changed:
        assert inbox.changed.wait_for(lambda: inbox.has(peer, tag), timeout=20)
    return inbox.pop(peer, tag)


def test_wires_take_the_link_that_their_peer_is_on() -> None:
    hub, near, far = LocalHub(4), Counted(), Counted()
    link = Throttle(hub.transport(2), uplink=far, rtt_s=0.0, near=Hop(near, 0.0), group=range(2, 4))
    for peer in (0, 1, 3):
        link.post(peer, Tag(ROUND, 0, 0, 0), torch.full((10 + peer,), peer, dtype=torch.uint8))
    assert [int(arrived(hub, peer, 2, Tag(ROUND, 0, 0, 0))[0]) for peer in (0, 1, 3)] == [0, 1, 3]
    assert (far.wire_bytes, near.wire_bytes) == ([10, 11], [13])
    link.close(drain_s=20.0)
    assert not any(thread.name == "dtrain-throttle" for thread in threading.enumerate())


def test_a_slow_far_link_holds_no_near_wire_back() -> None:
    """Over a year for the far wire, which is let go of at the end."""
    slow = LinkSettings(bits_per_s=1e-6, near=NearLink(2, None, 0.0))
    connections = connect_local(4, settings=slow)
    tag, wire = Tag(ROUND, 0, 0, 0), torch.zeros(4, dtype=torch.uint8)
    for peer in (2, 1):
        connections[0].transport.post(peer, tag, wire)
    inbox = connections[1].transport.inbox
    with inbox.changed:
        assert inbox.changed.wait_for(lambda: inbox.has(0, tag), timeout=20)
    assert not connections[2].transport.inbox.has(0, tag)
    for connection in connections:
        connection.transport.close(drain_s=0.0)
