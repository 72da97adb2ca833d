"""Does the loop that the README shows run as it stands there, in two real islands?"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from dtrain.recipes import DEFAULT_RECIPE
from tests.dist.harness import ROOT, run_islands, show, values

README = ROOT / "README.md"
BATCHES = 45
"""More than a round of the default recipe, its flight included."""

BEFORE = """
import os

import torch

torch.manual_seed(int(os.environ["DTRAIN_ISLAND"]))

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def forward(self, batch):
        return self.layer(batch).square().mean()

def evaluate(model):
    return float(model(torch.ones(1, 8)))

model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loader = [torch.randn(4, 8) for _ in range({batches})]
"""

AFTER = """
from tests.dist.child import model_digest, report

stats = sync.stats()
report("script", {"step": stats.step, "sent": stats.wire_bytes_sent, "model": model_digest(model), "recipe": sync.recipe.name})
"""


def _snippet() -> str:
    """The first Python block of the README that joins."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return next(block for block in blocks if "dtrain.join" in block)


def test_the_loop_of_the_readme_runs(tmp_path: Path) -> None:
    """Islands that start apart and see other data end with the same bits, after rounds of the default recipe."""
    results = run_islands(BEFORE.format(batches=BATCHES) + _snippet() + AFTER, 2, run=tmp_path, timeout_s=100)
    assert [r.status for r in results] == [0, 0], show(results)
    a, b = values(results, "script")
    assert a["step"] == b["step"] == BATCHES
    assert a["recipe"] == DEFAULT_RECIPE
    assert a["sent"] == b["sent"] > 0
    assert a["model"] == b["model"]


def test_joining_is_one_line_around_the_loop() -> None:
    """Without the import and the lines that speak to ``sync``, what stands in the block is an ordinary loop of five lines."""
    tree = ast.parse(_snippet())
    (block,) = [node for node in tree.body if isinstance(node, ast.With)]
    lines = [line for line in ast.unparse(block).splitlines() if not line.strip().startswith("sync.")]
    assert len(lines) == 5, "\n".join(lines)
