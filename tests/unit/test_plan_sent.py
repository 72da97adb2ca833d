"""Does the planner count exactly the bytes that islands really send? Beside islands that train, for every recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.bucket import make_buckets
from dtrain.connect import Connection
from dtrain.contract import steppers
from dtrain.engine import join
from dtrain.methods import RULES
from dtrain.optim import SAM, AccumAdamW
from dtrain.plan.sent import Sent, model_flat, sent
from dtrain.recipes import RECIPES, Recipe, resolve
from dtrain.wire import HEADER_BYTES
from tests.islands import run_islands

ISLANDS = 4
SHAPES = {"left": (37, 11), "right": (130,), "last": (4100,)}
BUCKET_BYTES = 8192
"""Three buckets, none of which ends with a tensor."""



def small(row: Recipe) -> dict[str, object]:
    """Few steps, and a rank that the one matrix is sent by."""
    few = {"every": 2 * row.fragments, "delay": min(row.delay_steps, 1 + (row.fragments == 1))}
    rare: dict[str, object] = {**few} if row.every > 4 else {}
    return rare if row.rank is None else {**rare, "rank": 3}


OVERRIDES: list[tuple[str, dict[str, object]]] = [
    *(
        (name, small(row))
        for name, row in RECIPES.items()
        if name not in ("dadao", "single_merge")  # which cannot be planned
    ),
    ("allreduce", {"reduce": "gather"}),
    ("choco", {"codec": "topk:64/4096:2", "gamma": 0.02}),
    ("dpsgd", {"codec": "int4:64:stochastic"}),
    ("dpsgd", {"topology": "complete", "reduce": "all_to_all"}),
    ("dpsgd", {"topology": "star", "codec": "sign:64"}),
    ("dpsgd", {"topology": "coloured", "graph": "path"}),
    ("dpsgd", {"topology": "alternating_exp_ring:2"}),
    ("push_sum", {"graph": "random_out:2", "codec": "lut4:64"}),
    ("diloco", {"every": 2, "reduce": "low_rank", "rank": 8, "fragments": 2}),
    ("dilocox", {"every": 2, "delay": 2, "rank": "adaptive:3"}),
    ("dilocox", {"every": "adaptive:2", "rank": "adaptive:3"}),
    ("diloco", {"every": 6, "fragments": 2, "codec": "e3m0:64", "delay": 3, "landing": "eager", "outer_lr": 0.4}),
    ("diloco", {"every": 2, "delay": "round", "landing": "pure", "outer_lr": 0.2}),
    ("diloco", {"every": 4, "fragments": 2, "delay": 1, "landing": "blend"}),
    ("delayed_diloco", {"every": 2, "delay": 1, "exclude": ["last"]}),
    ("dpsgd", {"include": ["l*"], "exclude": ["left"]}),
    ("desloc", {"every": 2, "delay": 2, "moments": "2:1"}),
    ("fedavg", {"every": 2, "reduce": "gather", "participants": 2}),
    ("fedavg", {"every": 2, "reduce": "gather", "participants": 1, "codec": "int8:64"}),
]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))

    def forward(self) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in self.parameters()]).sum()


def trained_bytes(recipe: str, overrides: dict[str, object], steps: int) -> list[int]:
    """What each island sent in rounds, by its own count."""

    def island(connection: Connection) -> int:
        model = _Model()
        row = resolve(recipe, {}, ISLANDS)
        inner: list[torch.optim.Optimizer] = [AccumAdamW(model.parameters(), lr=1e-3, every=row.moments_every or 1)]
        if row.optimizer is not None or RULES[row.algorithm].signs:
            inner = steppers(model, row, 1e-3)
        sam = None if row.sam_rho is None else SAM(inner, rho=row.sam_rho)

        def loss() -> None:
            model.zero_grad()
            model().backward()

        axes: dict[str, object] = {**overrides, "bucket_bytes": BUCKET_BYTES}
        with join(model, sam or inner, recipe=recipe, link=connection, **axes) as sync:  # pyright: ignore[reportArgumentType]
            for _ in range(steps):
                loss() if sam is None else sam.gradient(loss)
                for optimizer in inner:
                    optimizer.step()
            sync.settle()
            return sync.stats().wire_bytes_sent

    return run_islands(ISLANDS, island, timeout_s=60)


def counted(recipe: str, overrides: dict[str, object]) -> tuple[Recipe, Sent]:
    row = resolve(recipe, {**overrides, "bucket_bytes": BUCKET_BYTES}, ISLANDS)
    return row, sent(row, SHAPES, ISLANDS)


LEAST_ROUNDS = 4


@pytest.mark.parametrize(("recipe", "overrides"), OVERRIDES)
def test_bytes_are_those_that_islands_count(recipe: str, overrides: dict[str, object]) -> None:
    row, found = counted(recipe, overrides)
    period = len(found.period)
    rounds = period * -(-LEAST_ROUNDS // period)
    each = trained_bytes(recipe, overrides, row.every * rounds)
    assert sum(each) == round(found.mean_round_bytes * rounds * ISLANDS), "whole bytes, up to a third's last digit"
    followed = sum(each) / ISLANDS if row.draws is not None else max(each)
    assert followed * period == sum(e.sent_bytes for e in found.period) * rounds, "the busiest island, and of drawn ones the mean"


def test_a_row_of_ones_own_needs_no_rule(tmp_path: Path) -> None:
    """It posts half of its bucket, and the rest a phase later."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from dtrain.algorithm import Algorithm\n"
        "from dtrain.recipes import Recipe\n"
        "def method(recipe, mixing):\n"
        "    def bind(layout, peers):\n"
        "        def send(b, state, link):\n"
        "            half = b.x.numel() // 2\n"
        "            for part in (b.x[:half], b.x[half:]):\n"
        "                for peer in link.row.sends: link.post(peer, part.clone().view(torch.uint8))\n"
        "                for peer, _ in link.row.recvs: link.expect(peer, 4 * part.numel())\n"
        "                yield\n"
        "                for peer, _ in link.row.recvs: assert float(link.received(peer).float().sum()) >= 0\n"
        "        return Algorithm(lambda b: {'kept': torch.zeros(3)}, send, lambda b, state: None)\n"
        "    return bind\n"
        "row = Recipe('mine', 's', 'p', 'own', 'parameters', every=2, reduce='neighbours', topology='ring', combine='gossip', "
        "method=method)\n"
    )
    row, found = counted(f"{tmp_path}/mine.py:row", {})
    numel = 37 * 11 + 130 + 4100
    assert found.mean_round_bytes == 2 * 4 * numel
    assert found.state_bytes == 3 * 12
    assert [len(f.phases) for f in found.period[0].rounds] == [2, 2, 2]
    assert sum(trained_bytes(f"{tmp_path}/mine.py:row", {}, 3 * row.every)) == 3 * ISLANDS * found.mean_round_bytes


def test_state_is_what_a_checkpoint_holds_of_a_round() -> None:
    """CHOCO on a ring: x_hat and s in fp32, one's own wire and two that came, two weights of 8 bytes a bucket."""
    _, found = counted("choco", {"codec": "int8:64"})
    numel = 37 * 11 + 130 + 4100
    runs = found.period[0].rounds
    wire = sum(f.phases[0].far_bytes // 2 for f in runs)
    assert found.state_bytes == 8 * numel + 3 * wire + 16 * len(runs)


def test_state_of_a_path_of_low_rank_is_what_a_checkpoint_holds() -> None:
    """Five vectors as long as the model (anchor, sent, delta, momentum, residual), and the last Q of a matrix of 37 x 11."""
    _, found = counted("dilocox", {"rank": 3})
    assert found.state_bytes == 4 * (5 * (37 * 11 + 130 + 4100) + 3 * 11)


def test_matrices_of_other_shapes_are_another_bucket() -> None:
    """Two buckets of as many numbers, in as many whole grains: 32 (64 + 512) and 32 (128 + 256) of them go."""
    row = resolve("dilocox", {"codec": "bf16", "bucket_bytes": 4 * 2**15}, 2)
    found = sent(row, {"a": (64, 512), "b": (128, 256)}, 2)
    assert found.mean_round_bytes - 4 * HEADER_BYTES == 2 * 32 * (64 + 512 + 128 + 256)


def test_islands_of_one_host_are_near() -> None:
    """alternating_exp_ring:2 of four islands: two rounds, one with the host's other island, one with the three others, of whom
    one shares the host."""
    row = resolve("dpsgd", {"topology": "alternating_exp_ring:2", "bucket_bytes": BUCKET_BYTES}, ISLANDS)
    found = sent(row, SHAPES, ISLANDS, per_host=2)
    near = [sum(p.near_bytes for f in e.rounds for p in f.phases) for e in found.period]
    far = [sum(p.far_bytes for f in e.rounds for p in f.phases) for e in found.period]
    wire = near[0]
    assert sorted(far) == [0, 2 * wire]
    assert near == [wire, wire]


def hears(found: Sent) -> float:
    """Islands that an island waits for in a round, on average."""
    company = found.company
    if company.rounds is None:
        return company.num_islands - 1
    return sum(len(heard.to) for heard in company.rounds) / (len(company.rounds) * company.num_islands)


@pytest.mark.parametrize(("name", "group"), [("dpsgd", 2.0), ("choco", 3.0), ("allreduce", 64.0), ("local", 1.0)])
def test_one_island_of_each_kind_stands_for_many(name: str, group: float) -> None:
    row = resolve(name, {}, 64)
    found = sent(row, SHAPES, 64)
    assert hears(found) == group - 1
    if name == "dpsgd":
        assert found.mean_round_bytes == sent(row, SHAPES, 4).mean_round_bytes, "one peer, however many there are"


def test_of_a_star_the_hub_is_the_one_that_is_followed() -> None:
    """Of n islands it sends n - 1 wires, and each of the others one: 2 (n - 1) / n on average."""
    row = resolve("dpsgd", {"topology": "star", "bucket_bytes": BUCKET_BYTES}, 16)
    found = sent(row, SHAPES, 16)
    hub = found.period[0].sent_bytes
    assert found.mean_round_bytes == pytest.approx(hub / 15 * 2 * 15 / 16)
    assert hears(found) == 1.875


@pytest.mark.parametrize(
    ("name", "axes", "num_islands", "wires"),
    [
        # A wire to whom one meets. Odd: one of five sits out. First of both: an edge of a ring meets with chance 1/3, and there
        # are as many as islands. In 64 rounds 768 edges may meet, of which neighbours never both do: the error of the islands'
        # 2/3 is below 2 sqrt(1/3 2/3 / 768) = 0.034, and 0.1 three of them.
        ("dpsgd", {"topology": "random_pairs"}, 5, 4 / 5),
        ("dpsgd", {"topology": "random_edges", "graph": "ring"}, 12, 2 / 3),
        # Five rounds with two neighbours, then K (K - 1) wires of n islands; or K (n - 1).
        ("semi_s2s", {"server": "sampled:4:5"}, 8, (5 * 2 + 4 * 3 / 8) / 6),
        ("semi_s2a", {"server": "all:3:5"}, 8, (5 * 2 + 3 * 7 / 8) / 6),
    ],
)
def test_drawn_rounds_are_the_mean_islands(name: str, axes: dict[str, object], num_islands: int, wires: float) -> None:
    """Its rounds stand in the period to half a round of each sort that is not the mean's."""
    found = sent(resolve(name, axes, num_islands), SHAPES, num_islands)
    single = sent(resolve("dpsgd", {}, num_islands), SHAPES, num_islands).mean_round_bytes
    drawn = 0.1 if axes.get("topology") == "random_edges" else 1e-12
    assert found.mean_round_bytes / single == pytest.approx(wires, abs=drawn)
    largest = max(e.sent_bytes for e in found.period)
    followed = sum(e.sent_bytes for e in found.period)
    assert abs(followed - found.mean_round_bytes * len(found.period)) <= largest


def test_the_hub_of_drawn_edges_is_still_the_one_that_is_followed() -> None:
    """Each edge of a star rings first as likely: the hub meets in every round, and each of 8 others in an eighth of them."""
    found = sent(resolve("dpsgd", {"topology": "random_edges", "graph": "star"}, 9), SHAPES, 9)
    assert all(e.sent_bytes for e in found.period)
    assert hears(found) == 2 / 9
    assert found.mean_round_bytes == pytest.approx(found.period[0].sent_bytes * 2 / 9)


def test_buckets_are_the_ranks_that_carry_them() -> None:
    """Three buckets of 4,637 numbers; the middle of the second is where the second of two ranks begins, at most."""
    row = resolve("dpsgd", {"bucket_bytes": BUCKET_BYTES}, ISLANDS)
    runs = sent(row, SHAPES, ISLANDS, num_ranks=2).period[0].rounds
    ranks = [bucket.owner for bucket in make_buckets(
        model_flat(SHAPES, torch.device("meta")), num_fragments=1, bucket_bytes=BUCKET_BYTES, num_ranks=2, with_grad=False
    )]  # fmt: skip
    assert [f.rank for f in runs] == ranks
    assert set(ranks) == {0, 1}
    assert sum(f.values_bytes for f in runs) == 4 * (37 * 11 + 130 + 4100)
