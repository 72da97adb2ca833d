"""Do parameters that stay an island's own follow its own gradients, to the bit, while the others are averaged?"""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain.chosen import shared
from dtrain.config import dump_job, parse_job
from dtrain.connect import Connection, connect_local
from dtrain.errors import IslandsDiffer
from dtrain.launch.checks import resolved
from dtrain.optim import AccumAdamW
from dtrain.plan.candidates import candidates
from dtrain.plan.write import answers
from dtrain.recipes import of_section, resolve
from tests.islands import run_islands

LR, EVERY, STEPS, CUT, WIDTH = 0.125, 3, 11, 70, 153


class Two(nn.Module):
    """Both tensors have a loss of their own on each island, and begin elsewhere: ``body`` alike on island 0 and the others."""

    def __init__(self, node: int, head: int = WIDTH - CUT) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(node)
        self.body, self.head = nn.Parameter(torch.rand(CUT, generator=draw)), nn.Parameter(torch.rand(head, generator=draw))
        self._c = [torch.rand(p.shape, generator=draw) * 2 - 1 for p in (self.body, self.head)]

    def forward(self) -> Tensor:
        return torch.stack([(p - c).square().sum() for p, c in zip((self.body, self.head), self._c, strict=True)]).sum()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model().backward()
    optimizer.step()


def alone(node: int, *, steps: int = STEPS) -> Two:
    model = Two(node)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(steps):
        step(model, optimizer)
    return model


def fedavg() -> list[Tensor]:
    """Bodies from island 0's, with their mean after every third step; halves are exact."""
    models = [Two(node) for node in range(2)]
    models[1].body.data.copy_(models[0].body.data)
    for t in range(1, STEPS + 1):
        for model in models:
            step(model, torch.optim.SGD(model.parameters(), lr=LR))
        if t % EVERY == 0:
            anchor = (models[0].body.data / 2) + (models[1].body.data / 2)
            for model in models:
                model.body.data.copy_(anchor)
    return [model.body.data for model in models]


@pytest.mark.parametrize("chosen", [{"exclude": ["head"]}, {"include": ["body"]}, {"include": ["*"], "exclude": ["h*"]}])
def test_what_is_excluded_trains_alone_and_the_rest_with_the_others(chosen: dict[str, Any]) -> None:
    """From the start, where bodies are made equal and heads are not, to the merge, which leaves heads alone too."""

    def island(connection: Connection) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = Two(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="fedavg", every=EVERY, **chosen, link=connection) as sync:
            for _ in range(STEPS):
                step(model, optimizer)
            body = model.body.detach().clone()
            with sync.merged():
                seen = model.body.detach().clone(), model.head.detach().clone()
            assert torch.equal(model.body, body)
            sync.merge()
        assert torch.equal(model.body, seen[0])
        assert torch.equal(model.head, seen[1])
        return body, model.body.detach(), model.head.detach(), seen[0]

    found, bodies = run_islands(2, island), fedavg()
    for node, (body, merged, head, _) in enumerate(found):
        # The anchor is moved by the mean progress: x - (x - m), where the rendering takes m itself.
        torch.testing.assert_close(body, bodies[node], rtol=0, atol=2.0**-24 * 8 * (STEPS // EVERY))
        assert torch.equal(merged, (found[0][0] / 2) + (found[1][0] / 2))
        assert torch.equal(head, alone(node).head)
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("recipe", ["allreduce", "dpsgd", "choco", "gradient_tracking", "push_sum", "a2cid2", "delayed_diloco"])
def test_every_way_of_talking_leaves_them_alone(recipe: str) -> None:
    axes: dict[str, Any] = {"every": 2, "delay": 1} if recipe == "delayed_diloco" else {}
    axes |= {"topology": "ring", "gamma": 0.5} if recipe == "choco" else {}

    def island(connection: Connection) -> tuple[Tensor, Tensor]:
        model = Two(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe=recipe, exclude=["head"], **axes, link=connection):
            for _ in range(STEPS):
                step(model, optimizer)
        return model.body.detach(), model.head.detach()

    for node, (body, head) in enumerate(run_islands(2, island)):
        assert torch.equal(head, alone(node).head)
        assert not torch.equal(body, alone(node).body)


def test_heads_may_have_another_size_on_every_island() -> None:
    def island(connection: Connection) -> tuple[int, Tensor]:
        model = Two(connection.node, head=5 + connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="fedavg", every=EVERY, exclude=["head"], link=connection) as sync:
            for _ in range(EVERY):
                step(model, optimizer)
            sync.merge()
        return model.head.numel(), model.body.detach()

    found = run_islands(2, island)
    assert [numel for numel, _ in found] == [5, 6]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("recipe", ["local", "decent_adam"])
def test_the_norm_that_clips_is_that_of_all(recipe: str) -> None:
    """Two islands that do the same, so that no mean moves them: by torch's clipping, and in the pass AccumAdamW shares, which
    sums the squares in fp64: one in fp32 of 153 numbers may miss by 153 u = 1e-5 of itself, and a step by as much of 0.01."""
    clip = 0.1

    def trained(connection: Connection | None) -> Two:
        model = Two(0)
        optimizer = AccumAdamW(model.parameters(), lr=0.01, eps=1e-2)  # so that the size of gradients counts
        if connection is None:
            for _ in range(STEPS):
                optimizer.zero_grad()
                model().backward()
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
            return model
        with dtrain.join(model, optimizer, recipe=recipe, exclude=["head"], clip=clip, link=connection):
            for _ in range(STEPS):
                step(model, optimizer)
        return model

    want = trained(None)
    for island in run_islands(2, trained):
        for ours, theirs in zip(island.parameters(), want.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if recipe == "local" else STEPS * 0.01 * 1e-4)


def test_a_resumed_island_goes_on_to_the_bit() -> None:
    """Saved after step 4, where a round flies, with a head that differs from the others'."""
    saved: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def run(connection: Connection, first: int, last: int) -> list[Tensor]:
        node, model = connection.node, Two(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(
            model, optimizer, recipe="delayed_diloco", every=EVERY, delay=2, exclude=["head"], link=connection
        ) as sync:
            if first:
                model.load_state_dict(saved[node][0])
                sync.load_state_dict(saved[node][1])
            for _ in range(first, last):
                step(model, optimizer)
            state = {k: v.clone() for k, v in sync.state_dict().items()}
            saved[node] = {k: v.clone() for k, v in model.state_dict().items()}, state
        return [p.detach().clone() for p in model.parameters()]

    whole = run_islands(2, lambda connection: run(connection, 0, STEPS))
    saved.clear()
    run_islands(2, lambda connection: run(connection, 0, 4))
    again = run_islands(2, lambda connection: run(connection, 4, STEPS))
    for ours, theirs in zip(again, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


NAMES = ("embedding.weight", "blocks.0.qkv.weight", "blocks.0.up.weight", "blocks.1.qkv.weight", "head.weight")
FEW = "embedding.weight, blocks.0.qkv.weight ... blocks.1.qkv.weight, head.weight (5)"


@pytest.mark.parametrize(
    ("include", "exclude", "want"),
    [
        (None, None, set(NAMES)),
        (["blocks.*"], None, set(NAMES[1:4])),
        (["blocks.*", "head.*"], ["*.qkv.weight"], {NAMES[2], NAMES[4]}),
        (None, ["embedding.weight", "head.*"], set(NAMES[1:4])),
    ],
)
@pytest.mark.parametrize("wrapped", ["", "module.", "module._orig_mod."])
def test_patterns_name_parameters_as_the_wrapped_model_does(
    include: list[str] | None, exclude: list[str] | None, want: set[str], wrapped: str
) -> None:
    assert shared([wrapped + name for name in NAMES], include, exclude) == {wrapped + name for name in want}
    assert shared(["module.x", "x"], None, ["module.x"]) == {"x"}


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        (["block.*"], None, f'sync.include: the pattern "block.*" matches none of the trained parameters, which are {FEW}; '),
        (["blocks.*"], ["head.*"], 'sync.exclude: the pattern "head.*" matches none of those that sync.include matches, which'),
        (["head.*"], ["*"], 'sync.exclude = ["*"] leaves nothing for the islands to share of embedding.weight'),
    ],
)
def test_patterns_without_effect_are_one_line(include: list[str] | None, exclude: list[str] | None, said: str) -> None:
    with pytest.raises(ValueError, match=r"^sync") as e:
        shared(NAMES, include, exclude)
    assert str(e.value).startswith(said)
    assert "\n" not in str(e.value)


def test_what_is_no_list_of_patterns_and_a_method_without_rounds_are_refused() -> None:
    for value in ("head.*", [], [""], [3]):
        with pytest.raises(ValueError, match=r"^exclude = .* is not allowed; use a list of patterns"):
            resolve("diloco", {"exclude": value}, 2)
    with pytest.raises(ValueError, match=r'^sync\.exclude = .* has no effect with sync\.algorithm = "dadao"'):
        resolve("dadao", {"exclude": ["x"]}, 2)
    with pytest.raises(ValueError, match=r'^sync\.exclude: the pattern "tail" matches none'):
        dtrain.join(Two(0), [], recipe="local", exclude=["tail"], link=connect_local(1)[0])


def test_islands_must_share_the_same() -> None:
    def island(connection: Connection) -> None:
        model = Two(connection.node)
        dtrain.join(model, [], recipe="fedavg", exclude=["head"] if connection.node else None, link=connection)

    with pytest.raises(IslandsDiffer, match="another recipe than island 0"):
        run_islands(2, island)


def test_a_job_keeps_what_it_chose() -> None:
    job = resolved(parse_job({"sync": {"recipe": "fedavg", "exclude": ["head.*", 'odd"name']}}))
    assert job.sync.exclude == ["head.*", 'odd"name']
    assert job.sync.include is None
    assert parse_job(tomllib.loads(dump_job(job))) == job
    asked = of_section(job.sync.model_dump(exclude_none=True), 2)
    assert asked.exclude == ("head.*", 'odd"name')
    assert {r.exclude for r in candidates(asked, 2)} == {asked.exclude}, "all that a plan looks at"
    assert answers(asked, 2) == {"recipe": "fedavg", "exclude": ["head.*", 'odd"name']}
