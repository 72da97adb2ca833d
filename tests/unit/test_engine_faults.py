"""What does an island say when something goes wrong inside the engine? At once, as itself, and with nothing left running."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain import connect
from dtrain.algorithm import Algorithm
from dtrain.assemble import Plan, assemble
from dtrain.bucket import Bucket, Layout
from dtrain.codec import State
from dtrain.connect import Connection
from dtrain.errors import IslandsDiffer, NonFinite, PeerLost
from dtrain.link import Link, Peers
from dtrain.recipes import Recipe
from dtrain.transport.throttle import Throttle
from tests.islands import run_islands


def pair(seed: int = 0) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()


def alone() -> Connection:
    return connect.connect_local(1)[0]


def test_what_fails_in_the_background_is_raised_where_the_round_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the second phase of a round, say: an error of no type of ours, on the traffic thread."""

    def failing(layout: Layout, peers: Peers) -> Algorithm:
        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            link.post(1 - link.node, torch.zeros(1, dtype=torch.uint8))
            link.expect(1 - link.node, 1)
            yield
            if link.node == 0:
                raise RuntimeError("no memory left for phase 2")

        return Algorithm(init=lambda b: {}, send=send, land=lambda b, state: None)

    def planned(recipe: Recipe, seed: int, num_islands: int) -> Plan:
        plan = assemble(recipe, seed, num_islands)
        return dataclasses.replace(plan, methods=(failing,), delay_steps=1, rewrites_gradients=False, sends=True)

    monkeypatch.setattr("dtrain.assemble.assemble", planned)

    def island(connection: Connection) -> str:
        model, optimizer = pair()
        try:
            with dtrain.join(model, optimizer, recipe="dpsgd", link=connection):
                for _ in range(5):
                    step(model, optimizer)
        except RuntimeError as e:
            return f"{type(e).__name__}: {e}"
        return "nothing"

    first, second = run_islands(2, island, timeout_s=20)
    assert first == "RuntimeError: no memory left for phase 2"
    assert second == "PeerLost: lost island 0: it failed after step 1"


@pytest.mark.parametrize(
    ("name", "island_1"),
    [
        ("recipe", {"recipe": "fedavg", "every": 4}),
        ("model", {"recipe": "fedavg", "every": 5, "width": 7}),
        ("seed", {"recipe": "fedavg", "every": 5, "seed": 1}),
    ],
)
def test_islands_that_do_not_fit_together_are_refused_at_join(name: str, island_1: dict[str, object]) -> None:
    def island(connection: Connection) -> str:
        said = {"recipe": "fedavg", "every": 5, "width": 3, "seed": 0} | (island_1 if connection.node else {})
        model = nn.Linear(4, int(str(said["width"])))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="island 1 has another") as caught:
            dtrain.join(
                model,
                optimizer,
                recipe=str(said["recipe"]),
                every=int(str(said["every"])),
                seed=int(str(said["seed"])),
                link=connection,
            )
        return str(caught.value)

    first, second = run_islands(2, island)
    assert first == second
    assert first.startswith(f"island 1 has another {name} than island 0; ")
    assert "\n" not in first


def late(connection: Connection, rtt_s: float) -> Connection:
    """What this island sends arrives later than what it gets."""
    return dataclasses.replace(connection, transport=Throttle(connection.transport, uplink=None, rtt_s=rtt_s))


def test_who_refuses_first_lets_the_others_know_why_at_join() -> None:
    """Island 1 has island 0's notes half a second before its own leave, and island 0 can only refuse by those."""

    def island(connection: Connection) -> str:
        model, optimizer = pair()
        link = late(connection, 1.0) if connection.node else connection
        with pytest.raises(IslandsDiffer, match="island 1 has another seed") as caught:
            dtrain.join(model, optimizer, recipe="fedavg", every=5, seed=connection.node, link=link)
        return str(caught.value)

    first, second = run_islands(2, island)
    assert first == second


def test_who_refuses_first_lets_the_others_know_why_after_an_average() -> None:
    def island(connection: Connection) -> str:
        model, optimizer = pair()
        link = late(connection, 1.0) if connection.node else connection
        said = ""
        try:
            with dtrain.join(model, optimizer, recipe="fedavg", every=5, link=link) as sync:
                for _ in range(3 - connection.node):
                    step(model, optimizer)
                with sync.merged():
                    pass
        except IslandsDiffer as e:
            said = str(e)
        return said

    first, second = run_islands(2, island)
    assert first == second
    assert "island 0 after 3, island 1 after 2" in first


def moved(model: nn.Linear) -> None:
    model.to(torch.float64).to(torch.float32)


def assigned(model: nn.Linear) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [moved, assigned])
def test_a_parameter_that_left_the_flat_storage_is_named(change: Callable[[nn.Linear], None]) -> None:
    def island(connection: Connection) -> str:
        model, optimizer = pair()
        try:
            with dtrain.join(model, optimizer, recipe="fedavg", every=2, link=connection):
                step(model, optimizer)
                change(model)
                optimizer.param_groups[0]["params"] = list(model.parameters())
                for _ in range(3):
                    step(model, optimizer)
        except ValueError as e:
            return str(e)
        return "nothing"

    for said in run_islands(2, island):
        assert said.startswith("parameter weight was replaced after dtrain.join")


def test_a_model_on_two_devices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="parameters lie on cpu, meta; a rank synchronises one device"):
        dtrain.join(model, torch.optim.SGD(model[0].parameters(), lr=0.1), link=alone())


def test_clipping_gradients_that_are_still_scaled_is_refused() -> None:
    model, optimizer = pair()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"clip = 1\.0 with a GradScaler would clip gradients that are still scaled"):
        dtrain.join(model, optimizer, recipe="diloco", clip=1.0, scaler=scaler, link=alone())


def test_a_drain_that_fails_takes_the_hooks_off_and_says_so_to_the_others() -> None:
    """A payload that is not finite is found when the last round is waited for, in the block's own end."""

    def island(connection: Connection) -> tuple[str, int, int]:
        model, optimizer = pair()
        sync = dtrain.join(model, optimizer, recipe="fedavg", every=2, delay=2, link=connection)
        counted = 0
        try:
            with sync:
                step(model, optimizer)
                if connection.node == 0:
                    with torch.no_grad():
                        model.weight.fill_(float("nan"))
                step(model, optimizer)
                counted = sync.step
        except (NonFinite, PeerLost) as e:
            step(model, optimizer)  # the hooks are off: no round starts, nothing is waited for
            return type(e).__name__, counted, sync.step
        return "nothing", counted, sync.step

    assert run_islands(2, island, timeout_s=20) == [("NonFinite", 2, 2), ("PeerLost", 2, 2)]
    left = [t for t in threading.enumerate() if t.name.startswith("dtrain-traffic")]
    for thread in left:  # told to end; a failure does not wait for it
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in left)


def test_a_state_of_another_recipe_or_cut_is_refused_and_changes_nothing() -> None:
    model, optimizer = pair()
    with dtrain.join(model, optimizer, recipe="fedavg", every=2, link=alone()) as sync:
        step(model, optimizer)
        other = {k: v.clone() for k, v in sync.state_dict().items()}
    model, optimizer = pair()
    with dtrain.join(model, optimizer, recipe="diloco", every=2, link=alone()) as sync:
        before = {k: v.clone() for k, v in sync.state_dict().items()}
        for bad, key in ((other, "bucket0.momentum"), (before | {"bucket0.anchor": torch.zeros(3)}, "bucket0.anchor")):
            with pytest.raises(ValueError, match="another recipe, model or number of ranks: " + key):
                sync.load_state_dict(bad)
            after = {k: v for k, v in sync.state_dict().items() if not k.startswith("counts")}
            assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_all_that_an_average_changes_is_given_back_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = pair()
    norm = nn.BatchNorm1d(3)
    both = nn.Sequential(model, norm)

    def values() -> list[Tensor]:
        return [x.clone() for x in (*both.parameters(), *both.buffers())]

    with dtrain.join(both, optimizer, recipe="local", link=alone()) as sync:
        before = values()

        def broken(at: int) -> object:
            with torch.no_grad():
                for x in (*both.parameters(), norm.running_mean):
                    assert x is not None
                    x.fill_(7.0)
            raise PeerLost((1,), "the line was cut")

        monkeypatch.setattr(sync._exact, "average", broken)
        for look in (sync.consensus_distance, lambda: sync.merged().__enter__()):
            with pytest.raises(PeerLost):
                look()
            assert all(torch.equal(a, b) for a, b in zip(values(), before, strict=True))
