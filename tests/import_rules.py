"""Which module may import whom? The rules, and a walk over the syntax trees that finds who breaks them."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PURE = (
    *("topology", "events", "schedule", "matchmaker", "methods", "section", "sections", "sections_sync", "config", "codec_name"),
    *("own_name", "units", "sections_each", "sections_log", "lanes", "engine_fits"),
    *("contraction", "errors", "extras", "matrices", "stability", "chosen", "pair_momentum", "quorum", "slots", "bucket_bytes"),
)
IMPURE = ("torch", "triton", "numba", "time", "datetime", "os", "socket", "threading", "subprocess")

# A module imports from its own layer and those before it. What is not named here lies between the engine and the launcher.
LAYERS = (
    PURE,
    ("kernels", "transport", "spans", "staging", "shards"),
    (
        *("bucket", "payload", "wire", "codec", "reduce", "combine", "outer", "link", "algorithm", "algorithms", "optim"),
        *("low_rank", "codebook", "dct", "torch_codec", "hierarchical", "on_host", "same_products"),
    ),
    (
        *("recipe", "recipe_rows", "outer_rows", "recipes", "recipe_fits", "codec_fits", "landing_fits", "own", "own_codec"),
        *("own_topology", "levels"),
    ),
    ("membership", "words", "island", "buffers"),
    (
        *("engine", "assemble", "connect", "core", "corrected", "exact", "exchange", "fused", "gradients", "held"),
        *("hooks", "loop_fits", "meetings", "moments", "roll_call", "rounds", "traffic", "wait", "waves"),
    ),
    (),
    ("launch",),
)
UNNAMED_LAYER = 6

# An algorithm is mathematics: it sees the axes, never a process group, a kernel or the engine.
ALGORITHMS_SEE = (
    *("algorithms", "algorithm", "bucket", "codec", "combine", "errors", "events", "link", "outer", "payload", "reduce"),
    "topology",
)
KERNEL_USERS = (
    *("kernels", "wire", "codec", "reduce", "combine", "outer", "link", "optim", "fused", "engine", "launch.checks"),
    "launch.doctor_torch",
)

# checkpoint needs it for torch's distributed checkpoints, shards for DTensors, train to start torchrun's group; the launcher owns
# the store that the islands meet at (meeting) and calls torchrun (agent), and the doctor asks what is built into it.
DISTRIBUTED_USERS = (
    *("transport.c10d", "transport.gloo", "transport.ordered", "connect", "island", "membership", "words", "engine"),
    *("checkpoint", "shards", "train"),
    *("launch.meeting", "launch.agent", "launch.local", "launch.doctor_torch"),
)
STREAM_USERS = ("transport", "engine", "traffic")
STREAM_NAMES = ("Stream", "stream", "current_stream", "default_stream", "set_stream", "ExternalStream", "StreamContext")
STREAM_METHODS = {"wait_stream", "record_stream"}
LAUNCH_ONLY = ("typer", "click", "rich")
KERNELS_NEED = {
    "kernels": {"torch"},
    "kernels._triton": {"torch", "triton"},
    "kernels._numba": {"torch", "numba", "llvmlite", "numpy"},
    # What a benchmark compares with is imported where it is installed, inside the function that calls it; no other module may.
    "kernels.bench_baselines": {"torch", "bitsandbytes", "deepspeed"},
}
# The command that runs the kernels' benchmark sees that benchmark, and no operation.
BENCH_USERS = {"launch.cli_bench": "dtrain.kernels.bench"}


@dataclass(frozen=True, slots=True)
class Module:
    """What one file names: ``uses`` are dotted names rooted in an import, ``attributes`` whatever follows a dot."""

    name: str
    uses: frozenset[str]
    attributes: frozenset[str]


def under(name: str, *parents: str) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def short(name: str) -> str:
    """``dtrain.launch.cli`` -> ``launch.cli``; ``dtrain`` -> the empty string."""
    return name.removeprefix("dtrain").removeprefix(".")


def python_files(folder: Path) -> Iterator[Path]:
    """Every Python file below, through symlinks too (Path.rglob would pass them by)."""
    for parent, _, files in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in sorted(files) if name.endswith(".py"))


def read_package(root: Path) -> list[Module]:
    sources: dict[str, tuple[str, bool]] = {}
    for path in python_files(root / "dtrain"):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        sources[".".join(parts[:-1] if is_package else parts)] = (path.read_text(encoding="utf-8"), is_package)
    return [read_module(name, source, is_package=is_package) for name, (source, is_package) in sources.items()]


def read_module(name: str, source: str, *, is_package: bool = False) -> Module:
    nodes = list(ast.walk(ast.parse(source)))
    imports = [found for node in nodes for found in _imports(node, name, is_package=is_package)]
    bound = {found.name: found.meaning for found in imports}
    uses = {found.target for found in imports} | {dotted for node in nodes if (dotted := _resolve(node, bound))}
    return Module(name, frozenset(uses), frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute)))


class Import(NamedTuple):
    target: str  # what is imported
    name: str  # the name that is bound
    meaning: str  # what that name stands for: `import torch.distributed` binds torch


def _imports(node: ast.AST, module: str, *, is_package: bool) -> Iterator[Import]:
    match node:
        case ast.Import(names=names):
            for alias in names:
                top = alias.name.partition(".")[0]
                yield Import(alias.name, alias.asname, alias.name) if alias.asname else Import(alias.name, top, top)
        case ast.ImportFrom(module=target, names=names, level=level):
            parents = module.split(".")
            origin = parents[: len(parents) - level + is_package] if level else []
            for alias in names:
                dotted = ".".join([*origin, *([target] if target else []), alias.name])
                yield Import(dotted, alias.asname or alias.name, dotted)
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(target)), *_]):
            if called in ("import_module", "__import__"):
                yield Import(target, target, target)


def _resolve(node: ast.AST, bound: dict[str, str]) -> str | None:
    """``dist.new_group`` -> ``torch.distributed.new_group``, when dist was imported so; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not (parts and isinstance(node, ast.Name) and node.id in bound):
        return None
    return ".".join([bound[node.id], *reversed(parts)])


def _own_modules(module: Module, known: Set[str]) -> set[str]:
    """The modules of dtrain that a module names: ``dtrain.units.seconds`` is ``dtrain.units``."""
    found: set[str] = set()
    for use in module.uses:
        if under(use, "dtrain"):
            while use not in known and "." in use:
                use = use.rpartition(".")[0]
            found.add(use)
    return found - {module.name}


def _layer(name: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if under(short(name), *names)), UNNAMED_LAYER)


def _layers(module: Module, own: set[str]) -> Iterator[str]:
    for target in sorted(own):
        if _layer(target) > _layer(module.name):
            yield f"imports {target}, which stands above it"


def _pure(module: Module, own: set[str]) -> Iterator[str]:
    if under(short(module.name), *PURE):
        yield from (f"uses {use}, and is pure" for use in sorted(module.uses) if under(use, *IMPURE))


def _algorithms(module: Module, own: set[str]) -> Iterator[str]:
    if under(short(module.name), "algorithms"):
        unseen = sorted(target for target in own if not under(short(target), *ALGORITHMS_SEE))
        yield from (f"imports {target}, which an algorithm never sees" for target in unseen)


def _kernel_users(module: Module, own: set[str]) -> Iterator[str]:
    for target in sorted(t for t in own if under(t, "dtrain.kernels") and t != BENCH_USERS.get(short(module.name))):
        if not under(short(module.name), *KERNEL_USERS):
            yield f"imports {target}; only {', '.join(KERNEL_USERS[1:])} call kernels"
        elif target != "dtrain.kernels" and not under(module.name, "dtrain.kernels"):
            yield f"imports {target}; the public operations are in dtrain.kernels"


def _kernels(module: Module, own: set[str]) -> Iterator[str]:
    if not under(module.name, "dtrain.kernels"):
        return
    outside = sorted(target for target in own if not under(target, "dtrain.kernels"))
    yield from (f"imports {target}; kernels know nothing of dtrain" for target in outside)
    allowed = set().union(*(needs for part, needs in KERNELS_NEED.items() if under(short(module.name), part)))
    packages = {use.partition(".")[0] for use in module.uses} - sys.stdlib_module_names - {"dtrain"}
    yield from (f"uses {package}; {module.name} may use {', '.join(sorted(allowed))}" for package in sorted(packages - allowed))


def _owners(module: Module, own: set[str]) -> Iterator[str]:
    name = short(module.name)
    if not under(name, *DISTRIBUTED_USERS) and any(under(use, "torch.distributed") for use in module.uses):
        yield f"uses torch.distributed, which belongs to {', '.join(DISTRIBUTED_USERS)}"
    for use in sorted(module.uses):
        if under(use, *LAUNCH_ONLY) and not under(name, "launch"):
            yield f"uses {use}; only launch talks to a terminal"
        if under(use, "triton", "numba") and not under(name, "kernels"):
            yield f"uses {use}; only kernels do"


def _streams(module: Module, own: set[str]) -> Iterator[str]:
    if under(short(module.name), *STREAM_USERS):
        return
    cuda = tuple(f"{owner}.{name}" for owner in ("torch", "torch.cuda", "torch.accelerator") for name in STREAM_NAMES)
    named = {use for use in module.uses if under(use, *cuda)} | (module.attributes & STREAM_METHODS)
    yield from (f"names {name}; streams belong to transport and engine" for name in sorted(named))


RULES: tuple[Callable[[Module, set[str]], Iterator[str]], ...] = (
    *(_layers, _pure, _algorithms, _kernel_users, _kernels, _owners, _streams),
)


def violations(modules: Iterable[Module], known: Set[str]) -> list[str]:
    """One line for every broken rule; ``known`` are the names of all modules that there are."""
    return [f"{m.name} {text}" for m in modules for rule in RULES for text in rule(m, _own_modules(m, known))]
