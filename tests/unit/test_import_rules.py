"""Does every module import only what the architecture lets it, and would the check see one that does not?"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

from tests.import_rules import Module, python_files, read_module, read_package, violations

ROOT = Path(__file__).parents[2]
MOST_LINES = 400


@pytest.fixture(scope="module")
def package() -> list[Module]:
    return read_package(ROOT)


def test_the_rules_hold(package: list[Module]) -> None:
    found = violations(package, {module.name for module in package})
    assert not found, "\n" + "\n".join(found)


def test_the_walk_sees_every_file(package: list[Module]) -> None:
    names = {module.name for module in package}
    assert {"dtrain", "dtrain.engine", "dtrain.kernels.reference", "dtrain.launch.__main__"} <= names
    files = sum(1 for folder in ("dtrain", "kernels", "launch") for _ in (ROOT / folder).rglob("*.py"))
    assert len(package) == files, "rglob passes symlinks by, so the three folders together are each file once"


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("topology", "import torch", "uses torch, and is pure"),
        ("schedule", "from time import monotonic", "uses time.monotonic, and is pure"),
        ("config", "import os\nhome = os.environ['HOME']", "uses os.environ, and is pure"),
        ("units", "from dtrain import codec", "imports dtrain.codec, which stands above it"),
        ("codec", "import torch\ntorch.distributed.barrier()", "uses torch.distributed"),
        ("codec", "import torch.distributed as dist", "uses torch.distributed"),
        ("outer", "from torch import distributed", "uses torch.distributed"),
        ("data", "def f():\n    from torch.distributed import barrier", "uses torch.distributed"),
        ("data", "from importlib import import_module\nd = import_module('torch.distributed')", "uses torch.distributed"),
        ("link", "from dtrain.engine import join", "imports dtrain.engine, which stands above it"),
        ("link", "from dtrain import join", "imports dtrain, which stands above it"),
        ("link", "import dtrain\ndtrain.engine.join()", "imports dtrain.engine, which stands above it"),
        ("link", "from . import engine", "imports dtrain.engine, which stands above it"),
        ("train", "from dtrain.launch import islands", "imports dtrain.launch.islands, which stands above it"),
        ("algorithms.mine", "from dtrain.kernels import operations", "imports dtrain.kernels, which an algorithm never sees"),
        ("algorithms.mine", "from dtrain.transport.base import Tag", "imports dtrain.transport.base, which an algorithm never"),
        ("algorithms.mine", "from ..transport.base import Tag", "imports dtrain.transport.base, which an algorithm never"),
        ("codec", "from dtrain.kernels.reference import cast_bf16", "the public operations are in dtrain.kernels"),
        ("train", "from dtrain.kernels import operations", "call kernels"),
        ("kernels.fast", "from dtrain import units", "imports dtrain.units; kernels know nothing of dtrain"),
        ("kernels.fast", "import numpy as np", "uses numpy; dtrain.kernels.fast may use torch"),
        ("kernels._triton.fast", "import numba", "uses numba"),
        ("optim.adam", "import triton.language as tl", "uses triton.language; only kernels do"),
        ("report", "from rich.table import Table", "uses rich.table.Table; only launch talks to a terminal"),
        ("train", "import typer", "uses typer; only launch talks to a terminal"),
        ("optim.adam", "import torch\ns = torch.cuda.Stream()", "names torch.cuda.Stream"),
        ("train", "from torch.cuda import current_stream", "names torch.cuda.current_stream"),
        ("train", "def f(t, s):\n    t.record_stream(s)", "names record_stream"),
    ],
)
def test_a_planted_violation_is_seen(package: list[Module], name: str, source: str, complaint: str) -> None:
    found = violations([read_module(f"dtrain.{name}", source)], {module.name for module in package})
    assert any(complaint in line for line in found), found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("schedule", "import math\nfrom dtrain import topology, units"),
        ("transport.c10d", "import torch.distributed as dist"),
        ("transport.nccl", "import torch\ns = torch.cuda.Stream()\nwith torch.cuda.stream(s): pass"),
        ("island.fsdp", "from torch.distributed import device_mesh"),
        ("codec", "import dtrain.kernels\nfrom dtrain.errors import WireError"),
        ("algorithms.mine", "from dtrain import payload\nfrom dtrain.reduce import all_to_all"),
        ("kernels._triton.fast", "import torch\nimport triton\nfrom dtrain.kernels import reference"),
        ("launch.cli", "import typer\nfrom rich.table import Table\nfrom dtrain.train import run"),
        ("data", "class Reader:\n    stream = open\ndef f(r): return r.stream.current"),
    ],
)
def test_what_is_allowed_is_let_through(package: list[Module], name: str, source: str) -> None:
    assert violations([read_module(f"dtrain.{name}", source)], {module.name for module in package}) == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert read_module("dtrain.island", "from .ddp import Ddp", is_package=True).uses == {"dtrain.island.ddp.Ddp"}
    assert read_module("dtrain.island.ddp", "from .fsdp import Fsdp").uses == {"dtrain.island.fsdp.Fsdp"}


def test_kernels_need_torch_and_nothing_else() -> None:
    blocked = set(packages_distributions()) - _tops(_closure("torch")) - {"dtrain"}
    assert {"pydantic", "numba", "triton", "numpy", "rich"} <= blocked
    code = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(blocked)!r}:
            raise ModuleNotFoundError(f"{{name}} is hidden", name=name)
sys.meta_path.insert(0, Absent())
import dtrain.kernels
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _closure(distribution: str) -> set[str]:
    """The distribution and all that it needs, by normalized name."""
    todo, seen = [distribution], set[str]()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue  # a need of another platform
        seen.add(name)
        todo += [re.split(r"[^A-Za-z0-9._-]", need)[0] for need in needs if "extra ==" not in need]
    return seen


def _tops(distributions: set[str]) -> set[str]:
    return {
        top
        for top, owners in packages_distributions().items()
        if distributions & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    }


def test_no_file_is_too_long() -> None:
    files = [path for folder in ("dtrain", "tests") for path in python_files(ROOT / folder)]
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}
