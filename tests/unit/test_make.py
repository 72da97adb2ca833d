"""Does `make` install once, say in one line what is missing, and take the interpreter and the torch that it is given?

The interpreter is a shell script in front of the real one, which plays a machine that lacks something; pip is never reached.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = ROOT / ".ci" / "constraints.txt"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make` reads, in a folder of its own."""
    target = tmp_path / "checkout"
    (target / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", ".ci/install", ".ci/constraints.txt"):
        shutil.copy2(ROOT / name, target / name)
    return target


def interpreter(folder: Path, *, refuses: str = "", version: str = "") -> Path:
    """A python that fails on code that holds a word, or gives itself out for another version."""
    path = folder / "python-of-the-test"
    lines = ["#!/bin/sh"]
    if refuses:
        lines.append(f'case "$*" in *"{refuses}"*) exit 1;; esac')
    if version:
        lines.append('case "$*" in *sys.version_info*) exit 1;; *platform.python_version*) echo ' + version + "; exit 0;; esac")
    path.write_text("\n".join([*lines, f'exec {sys.executable} "$@"', ""]))
    path.chmod(0o755)
    return path


def make(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VENV", "TORCH_INDEX", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *words], cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.startswith("make")]


def test_a_python_without_venv_is_one_line_with_the_remedy(checkout: Path, tmp_path: Path) -> None:
    done = make(checkout, "train", f"PYTHON={interpreter(tmp_path, refuses='import venv')}")
    assert done.returncode != 0
    (line,) = said(done)
    assert "has no venv module; on Debian or Ubuntu: apt-get install python3." in line
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_too_old_or_not_there_is_one_line(checkout: Path, tmp_path: Path) -> None:
    (old,) = said(make(checkout, "test", f"PYTHON={interpreter(tmp_path, version='3.9.1')}"))
    assert "dtrain needs Python >= 3.11" in old
    assert "is 3.9.1" in old
    (gone,) = said(make(checkout, "lint", "PYTHON=no-such-python"))
    assert "no-such-python cannot be run" in gone


@pytest.mark.parametrize("target", ["train", "test", "test-all", "lint"])
def test_nothing_is_installed_again_until_the_requirements_change(checkout: Path, target: str) -> None:
    stamp = checkout / ".venv" / "installed"
    assert ".ci/install" in make(checkout, "-n", target).stdout
    stamp.parent.mkdir()
    stamp.touch()
    assert ".ci/install" not in make(checkout, "-n", target).stdout
    for name in ("pyproject.toml", ".ci/constraints.txt"):
        assert ".ci/install" in make(checkout, "-n", "-W", name, target).stdout, name


def test_the_choices_of_the_command_line_reach_the_installer(checkout: Path) -> None:
    shown = make(checkout, "-n", "test", "PYTHON=python3.12", "VENV=elsewhere", "TORCH_INDEX=https://example.org/cu130").stdout
    assert "PYTHON='python3.12' VENV='elsewhere' TORCH_INDEX='https://example.org/cu130' .ci/install" in shown
    assert "elsewhere/bin/python -m pytest" in shown


def test_a_torch_that_is_already_there_is_kept(checkout: Path, tmp_path: Path) -> None:
    """An environment with a torch but nothing else: what is asked of pip pins that torch, and never downloads another."""
    venv = tmp_path / "theirs"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "ruff").touch(mode=0o755)
    python = venv / "bin" / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'case "$*" in "-m pip install"*) echo "$@" >>{tmp_path}/asked; exit 0;; "-m pip"*) exit 0;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "VENV": str(venv)}
    done = subprocess.run(
        [".ci/install"], cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked, "dtrain itself is installed"
    assert not any("torch==" in line for line in asked)
    import torch

    pins = (venv / "constraints.txt").read_text().splitlines()
    assert f"torch=={torch.__version__}" in pins
    others = {pin for pin in PINS.read_text().splitlines() if pin and not pin.startswith(("#", "torch==", "triton=="))}
    assert others <= set(pins)
