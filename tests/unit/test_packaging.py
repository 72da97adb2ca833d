"""Is the project what its installers, its makefile and a bare GPU machine take it for?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def needs(project: dict[str, Any]) -> dict[str, Requirement]:
    return {need.name: need for need in map(Requirement, project["dependencies"])}


@pytest.mark.parametrize("name", ["kernels", "launch"])
def test_a_top_level_folder_is_a_package_by_a_relative_symlink(name: str) -> None:
    link = ROOT / "dtrain" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}", "an absolute one would point into the checkout of whoever made it"
    assert link.resolve() == (ROOT / name).resolve()
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


def test_git_keeps_the_symlinks_as_symlinks() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("an unpacked archive has no index")
    git = ["git", "-c", "safe.directory=*", "ls-files", "--stage", "dtrain/kernels", "dtrain/launch"]
    staged = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in staged] == [("120000", "dtrain/kernels"), ("120000", "dtrain/launch")]


def test_torch_has_a_lower_bound_and_no_upper_one(needs: dict[str, Requirement]) -> None:
    allowed = needs["torch"].specifier
    versions = ("2.10.9", "2.11.0", "2.13.0", "3.0", "99.0")
    assert [allowed.contains(version) for version in versions] == [False, True, True, True, True]
    assert needs["torch"].marker is None


def test_triton_is_asked_for_on_linux_only(needs: dict[str, Requirement]) -> None:
    marker = needs["triton"].marker
    assert marker is not None
    assert [marker.evaluate({"sys_platform": name}) for name in ("linux", "darwin", "win32")] == [True, False, False]
    assert [name for name, need in needs.items() if need.marker is not None] == ["triton"]


def test_what_the_library_needs_is_named_and_no_version_shuts_the_future_out(
    project: dict[str, Any], needs: dict[str, Requirement]
) -> None:
    assert {"torch", "numpy", "triton", "numba", "pydantic", "typer", "rich", "networkx", "matplotlib"} <= set(needs)
    assert {specifier.operator for need in needs.values() for specifier in need.specifier} == {">="}
    assert {"test", "deepspeed", "hf", "log", "sdp", "dev"} == set(project["optional-dependencies"])
    pythons = SpecifierSet(project["requires-python"])
    assert [pythons.contains(version) for version in ("3.10.14", "3.11.0", "3.14.0")] == [False, True, True]
    assert project["license"] == "Apache-2.0"


def test_the_tested_torch_is_pinned_and_every_pin_is_exact() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {pin.name.lower(): str(pin.specifier) for pin in pins}
    assert versions["torch"] == "==2.13.0"
    assert len(versions) == len(pins), "a package is pinned twice"
    assert {len(pin.specifier) for pin in pins} == {1}
    assert {specifier.operator for pin in pins for specifier in pin.specifier} == {"=="}


def test_every_pin_is_allowed_by_what_the_project_asks_for(project: dict[str, Any], needs: dict[str, Requirement]) -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"]
    wanted = [*needs.values(), *map(Requirement, extras["test"]), *map(Requirement, extras["dev"])]
    for need in (need for need in wanted if need.name != "dtrain"):
        assert need.specifier.contains(pins[need.name.lower()]), need


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the makefile and nothing that was installed."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy2(ROOT / "Makefile", folder)
    return folder


def _make(folder: Path, *words: str) -> str:
    ours = ("PYTHON", "VENV", "TORCH_INDEX", "MAKEFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_train_runs_the_quickstart_under_a_fresh_name() -> None:
    lines = _make(ROOT, "-n", "train").splitlines()
    assert lines[-1] == ".venv/bin/dtrain run launch/jobs/quickstart.toml --fresh-name"
    assert (ROOT / "launch" / "jobs" / "quickstart.toml").is_file()


def test_make_gpu_installs_nothing(bare: Path, tmp_path: Path) -> None:
    """All that it asks of its interpreter: whether four packages are there, and to run the checks."""
    python, asked = tmp_path / "python-of-the-test", tmp_path / "asked"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$1 $2 PYTHONPATH=$PYTHONPATH" >>{asked}\n')
    python.chmod(0o755)
    _make(bare, "gpu", f"PYTHON={python}")
    calls = asked.read_text(encoding="utf-8")
    assert calls.startswith("-c import importlib.util")
    assert '("torch", "triton", "numba", "numpy")' in calls
    assert calls.endswith("-m tests.gpu PYTHONPATH=.\n")
    assert calls.count("PYTHONPATH=") == 2, "two calls, no third"
    assert [path.name for path in bare.iterdir()] == ["Makefile"]
    assert "install" not in _make(bare, "-n", "gpu")


ONLY_FOUR = """
import importlib.metadata, re, sys

def with_needs(*names):
    out, left = set(), list(names)
    while left:
        name = re.sub("[-_.]+", "_", left.pop()).lower()
        if name in out:
            continue
        out.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # named for another platform
        left += [re.match("[A-Za-z0-9_.-]+", need)[0] for need in needs if "extra ==" not in need]
    return out

# A package's name and its module's differ here and there; what a distribution of the four needs counts by both.
packages = with_needs("torch", "triton", "numba", "numpy")
modules = {m for m, names in importlib.metadata.packages_distributions().items()
           if any(re.sub("[-_.]+", "_", n).lower() in packages for n in names)}
BEYOND = {"pydantic", "typer", "rich", "networkx", "matplotlib", "safetensors", "pytest"}  # torch's networkx is for compilers
ALLOWED = (sys.stdlib_module_names | modules | {"dtrain", "tests"}) - BEYOND

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        there = name.partition(".")[0] in ALLOWED or name.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if there else None

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Bare, sys.meta_path)
for name in BEYOND:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not kept out")

import torch
import tests.gpu.__main__
from dtrain.kernels import reference
from dtrain.kernels.bench import Options
from tests.gpu import islands, kernels, speed

for check in tests.gpu.__main__.CHECKS:
    print(check.__name__)
islands.NUMEL = 1_001
cpu = torch.device("cpu")
print(kernels.compare(reference, cpu, (65,)))
print(islands.two_islands_equal_cpu(cpu))
print(speed.timed((Options(cpu, ("scale",), numels=(1_000,), compile=False, least_s=0.001),), cpu, 60.0).detail)
print(sorted({name.partition(".")[0] for name in sys.modules} & BEYOND))
"""


def test_the_gpu_checks_need_four_packages_and_no_other() -> None:
    """They are imported, and run on the CPU, where a finder hides every package that is not of torch, triton, numba or numpy."""
    command, environment = [sys.executable, "-c", ONLY_FOUR], {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    *names, compared, trained, timed, beyond = done.stdout.splitlines()
    equal, islands, *measured, numba = names
    assert (equal, islands, numba) == ("same_bytes_as_cpu", "two_islands_equal_cpu", "numba_same_bytes")
    assert measured == ["outer_state_leaves_the_gpu", "rounds_overlap_compute", "kernels_timed"]
    assert "all bytes equal" in compared
    assert "bit-equal" in trained
    assert "rows in 60 s" in timed
    assert beyond == "[]"
