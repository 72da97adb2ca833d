"""How does a researcher's own method get in? As a row in a file of theirs: ``sync.recipe = "mine.py:row"``.

The row is a ``dtrain.recipes.Recipe``. With ``algorithm = "own"`` its ``method`` makes the algorithm, (recipe, mixing) ->
``dtrain.algorithm.Method``; with another one it only gives that algorithm's answers a name. A topology and a codec of one's own
come as ``own_topology.py`` and ``own_codec.py`` say."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.own_name import OWN_AXES, is_own
from dtrain.topology import is_file

if TYPE_CHECKING:
    from dtrain.recipes import Recipe


_one_at_a_time = threading.Lock()
_digests: dict[str, str] = {}


def absolute(name: str, folder: Path | None = None) -> str:
    """The same row from any working directory; a relative name is one of ``folder``, or of the working directory."""
    file, _, row = name.rpartition(":")
    return f"{((folder or Path()) / file).absolute()}:{row}"


def load(name: str) -> Recipe:
    """The row of ``FILE.py:ROW``, under that name; raises ValueError where there is none. The file of an own topology
    or codec, or of a graph, that it names lies beside it, or where an absolute path says."""
    from dtrain.recipes import Recipe

    path, row, found = load_named(name, "recipe")
    if not isinstance(found, Recipe):
        raise ValueError(f"sync.recipe = {name!r}: {path.name} has no row {row}; define {row} = dtrain.recipes.Recipe(...) there")
    beside = {axis: absolute(value, path.parent) for axis in OWN_AXES[1:] if is_own(value := getattr(found, axis))}
    if isinstance(found.graph, str) and is_file(found.graph):
        beside["graph"] = str((path.parent / found.graph).absolute())
    return replace(found, name=f"{path}:{row}", **beside)


def load_named(name: str, axis: str, section: str = "sync") -> tuple[Path, str, object]:
    """The file of ``SECTION.AXIS = "FILE.py:NAME"``, the name, and what it is there, None where nothing is."""
    file, _, row = name.rpartition(":")
    path = Path(file).absolute()
    if not path.is_file():
        word = "ROW" if axis == "recipe" else "NAME"
        raise ValueError(f"{section}.{axis} = {name!r}: there is no file {path}; write FILE.py:{word}")
    return path, row, getattr(_module(path, f"{section}.{axis}"), row, None)


def _module(path: Path, key: str) -> object:
    """The file's module, run once a process. What goes wrong in it is said as it was, as for any import."""
    name = f"dtrain_own_{path.stem}_{abs(hash(str(path))):x}"
    with _one_at_a_time:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None, "a path that ends in .py has a loader"
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            with ExitStack() as undo:  # a module that failed is not there
                sys.modules[name] = module
                undo.callback(sys.modules.pop, name)
                text = path.read_bytes()
                _digests[str(path)] = hashlib.sha256(text).hexdigest()
                try:
                    # The bytes that the digest is of: a loader would read the file again, or run what is cached of an older one.
                    exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
                except SyntaxError as e:
                    raise ValueError(f"{e.filename or path}, line {e.lineno}: {e.msg}; mend the file of {key}") from e
                undo.pop_all()
        return sys.modules[name]


def digest(name: str) -> str:
    """Of the file of a row, or anything else, that was loaded, as it was then: islands must run the same."""
    return _digests[str(Path(name.rpartition(":")[0]).absolute())]
