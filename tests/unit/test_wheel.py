"""Does the wheel hold all of dtrain, and does it work outside the checkout?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.import_rules import python_files

ROOT = Path(__file__).parents[2]


def _checkout(target: Path) -> Path:
    """The files that a clone would have: what git ignores is left behind, symlinks stay symlinks."""
    if not (ROOT / ".git").exists():  # an unpacked archive holds nothing that git would ignore, but for what was run in it
        ignored = shutil.ignore_patterns(".venv", "runs", "build", "*.egg-info", "__pycache__")
        return shutil.copytree(ROOT, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in listed:
        source, copy = ROOT / name, target / name
        if name and (source.is_symlink() or source.exists()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = _checkout(tmp_path_factory.mktemp("checkout"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("dtrain-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return target


def _outside(installed: Path, *arguments: str) -> str:
    """Runs Python where no checkout is near: an empty folder, the wheel first on the path."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    elsewhere = installed.with_name(installed.name + "-elsewhere")
    elsewhere.mkdir(exist_ok=True)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_and_job_is_in_it(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in python_files(ROOT / "dtrain")}
    data = {f"dtrain/launch/jobs/{path.name}" for path in (ROOT / "launch" / "jobs").glob("*.toml")} | {"dtrain/py.typed"}
    data |= {f"dtrain/launch/status_page/{name}" for name in ("index.html", "page.js", "page.css")}
    assert "dtrain/kernels/reference.py" in modules
    assert "dtrain/launch/jobs/quickstart.toml" in data
    assert (modules | data) - packed == set()


def test_nothing_else_is_in_it(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in names} == {"dtrain"}, "a top-level kernels or launch would be a second copy"
    assert [name for name in names if not name.endswith((".py", ".toml", ".md", "py.typed", ".html", ".js", ".css"))] == []


def test_it_imports_outside_the_checkout(installed: Path) -> None:
    modules = ("dtrain", "dtrain.kernels", "dtrain.launch", "dtrain.engine")
    code = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {modules}))"
    files = _outside(installed, "-c", code).split()
    assert [Path(file).is_relative_to(installed) for file in files] == [True] * len(modules), files


def test_the_command_line_and_its_jobs_work_outside_the_checkout(installed: Path) -> None:
    assert "run" in _outside(installed, "-m", "dtrain.launch", "--help")
    code = (
        "import dtrain.launch, pathlib; from dtrain.config import load_job; "
        "print(load_job(pathlib.Path(dtrain.launch.__file__).parent / 'jobs' / 'quickstart.toml').islands.count)"
    )
    assert int(_outside(installed, "-c", code)) >= 2


def test_the_licence_and_the_command_come_along(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "dtrain = dtrain.launch.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_pins_cover_every_requirement() -> None:
    """An unpinned requirement would be whatever is newest on the day: pins are of use only when whole."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"], *project["optional-dependencies"]["dev"]]
    names = {need.split(";")[0].split(">")[0].split("[")[0].strip().lower() for need in wanted} - {"dtrain"}
    pins = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert names - {pin.partition("==")[0].lower() for pin in pins} == set()
