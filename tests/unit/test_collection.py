"""Is every test file found? A folder's name can hide it: pytest passes over some by default."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    assert TESTS / "dist" in folders
    passed_over = pytestconfig.getini("norecursedirs")
    for folder in folders:
        names = folder.relative_to(TESTS).parts
        assert not [(name, pattern) for name in names for pattern in passed_over if fnmatch(name, pattern)], folder
