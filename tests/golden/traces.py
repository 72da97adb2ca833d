"""Where does every recipe take four small islands, to the bit? traces.json has it, ``python -m tests.golden.traces`` writes it
anew and says what has changed.

The loss is 1/2 sum_k a_k (x_k - c_k)^2 over a matrix and a vector, another on every island: its gradients, SGD and AdamW are
element by element, and so are the mixes and the codes. Such operations give the same bits on every CPU that fuses multiply-adds
(AVX2 and later), and in every backend of the kernels. What sums up products is held to a tolerance."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dtrain
from dtrain.connect import Connection
from dtrain.methods import RULES
from dtrain.optim import SAM, AccumAdamW, muon_adamw
from dtrain.recipes import RECIPES, resolve
from tests.islands import run_islands

FILE = Path(__file__).with_name("traces.json")
ISLANDS, STEPS, EVERY = 4, 13, 3
LR, RHO = 0.0625, 0.05
ROWS, COLUMNS, REST = 24, 40, 37
U, M = 2.0**-24, 4.0
"""fp32's unit roundoff, and more than any |x| or |c| that is seen."""

SCALED: dict[str, dict[str, Any]] = {
    "delayed_diloco": {"every": EVERY, "delay": 2},
    "streaming_diloco": {"every": 4, "fragments": 2, "delay": 1},
    "dilocox": {"every": EVERY, "rank": 4, "codec": "identity"},  # a code that flips would be a step of its own
    "decoupled_diloco": {"every": EVERY, "delay": 2, "quorum": "100%"},  # whoever comes late would be left out
    "desloc": {"every": 2, "moments": "2:3"},
    "single_merge": {"schedule": "budget:5", "total_steps": STEPS},
    "semi_s2s": {"server": "sampled:2:2"},
    "semi_s2a": {"server": "all:2:2"},
}
"""Beside ``every``, of which a row has 4 or fewer steps here."""

_MIX = 4 * (ISLANDS + 1) * STEPS * U * M
"""A weight or norm that differs in its last bit moves a mix of n terms by (n + 1) u M at most, four of them a step."""
ROUGH = {
    "chebyshev": _MIX,  # eigenvalues of the graph
    "a2cid2": _MIX,
    "dfedsam": _MIX,  # the gradient's norm: it moves the place of the next one by rho times its relative error, less than a mix
    "dfedsam_mgs": _MIX,
    "demo": _MIX,  # cosines, in fp64
    "dilocox": 100 * _MIX,  # factors of a matrix of deltas, whose singular values are within 100 of each other
    "muloco": STEPS * 0.2 * LR * 485 * 16 * U,  # N raises what a product's last bits differ in by 3.4445^5 = 485
}
"""Recipes whose arithmetic differs between CPUs, and by how much each element may."""

Trace = dict[str, str]
"""By "step 3" and "merged": the digest of all islands' parameters ("about" of a rough one), then each island's first and last."""


class Block(nn.Module):
    """Parts of a quadratic loss, without a product of matrices."""

    def __init__(self, node: int) -> None:
        super().__init__()
        start, own = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6 + node)
        self.matrix = nn.Parameter(torch.randn((ROWS, COLUMNS), generator=start))
        self.rest = nn.Parameter(torch.randn(REST, generator=start))
        self._a = [0.5 + torch.rand(p.shape, generator=own) for p in (self.matrix, self.rest)]
        self._c = [torch.randn(p.shape, generator=own) for p in (self.matrix, self.rest)]

    def loss(self) -> Tensor:
        parts = zip((self.matrix, self.rest), self._a, self._c, strict=True)
        return torch.stack([(0.5 * a * (p - c).square()).sum() for p, a, c in parts]).sum()


def islands_of(recipe: str) -> dict[str, Tensor]:
    """(islands, elements) after every third step, and of the merged model."""
    axes: dict[str, Any] = {"every": min(RECIPES[recipe].every, EVERY)} if RECIPES[recipe].every > 4 else {}
    if axes and isinstance(delay := RECIPES[recipe].delay, int):
        axes["delay"] = min(delay, axes["every"])
    axes |= SCALED.get(recipe, {})
    row = resolve(recipe, {axis: value for axis, value in axes.items() if axis != "total_steps"}, ISLANDS)

    def island(connection: Connection) -> dict[str, Tensor]:
        block = Block(connection.node)
        model = nn.ModuleList([block])
        optimizers: list[Optimizer] = [torch.optim.SGD(model.parameters(), lr=LR)]
        if row.optimizer == "muon":
            optimizers = muon_adamw(model, lr=LR, weight_decay=0.1)
        elif row.moments_every is not None:
            optimizers = [AccumAdamW(model.parameters(), lr=LR, every=row.moments_every)]
        elif row.moments is not None:
            optimizers = [torch.optim.AdamW(model.parameters(), lr=LR)]
        sam = SAM(optimizers, rho=RHO) if row.sam_rho is not None else None

        def closure() -> Tensor:
            model.zero_grad()
            loss = block.loss()
            loss.backward()
            return loss

        step: Callable[[], object] = lambda: [closure(), *(o.step() for o in optimizers)]  # noqa: E731
        if sam is not None:
            step = lambda: sam.step(closure)  # noqa: E731
        seen = {}
        with dtrain.join(model, sam or optimizers, recipe=recipe, link=connection, **axes) as sync:
            for t in range(1, STEPS + 1):
                step()
                if t % EVERY == 0:
                    seen[f"step {t}"] = _flat(model)
            sync.merge()
        return seen | {"merged": _flat(model)}

    each = run_islands(ISLANDS, island)
    return {name: torch.stack([seen[name] for seen in each]) for name in each[0]}


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def trace_of(recipe: str, islands: Mapping[str, Tensor]) -> Trace:
    def line(x: Tensor) -> str:
        return " ".join(["about" if recipe in ROUGH else _digest(x), *(float(v).hex() for v in x[:, (0, -1)].reshape(-1))])

    return {name: line(x) for name, x in islands.items()}


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]


def differences(recipe: str, want: Trace, got: Trace) -> list[str]:
    """A line for each place at which they are apart by more than the recipe may."""
    if want.keys() != got.keys():
        return [f"{recipe}: there is {', '.join(got)}, and recorded {', '.join(want)}"]
    if recipe not in ROUGH:
        return [f"{recipe}, {at}: {got[at]}, recorded {want[at]}" for at in want if want[at] != got[at]]
    found = []
    for at in want:
        apart = max(abs(a - b) for a, b in zip(_numbers(want[at]), _numbers(got[at]), strict=True))
        if not apart <= ROUGH[recipe]:
            found.append(f"{recipe}, {at}: {apart:.3g} apart, {ROUGH[recipe]:.3g} is allowed")
    return found


def _numbers(line: str) -> list[float]:
    return [float.fromhex(word) for word in line.split()[1:]]


def trains() -> list[str]:
    """The recipes that are not simulated only."""
    return [name for name, row in RECIPES.items() if RULES[row.algorithm].simulated is None]


def recorded() -> dict[str, Trace]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main() -> None:
    """Write the file again; where nothing is said nothing has changed."""
    before, now = recorded(), {recipe: trace_of(recipe, islands_of(recipe)) for recipe in trains()}
    for recipe in sorted(before.keys() | now.keys()):
        if recipe in before and recipe in now:
            sys.stdout.writelines(f"{line}\n" for line in differences(recipe, before[recipe], now[recipe]))
        else:
            sys.stdout.write(f"{recipe}: {'new' if recipe in now else 'gone'}\n")
    FILE.write_text(json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    main()
