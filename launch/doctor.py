"""What of this machine will stop a job? Each thing that is looked at is one finding, with the one command that mends it.

Nothing here needs torch, numba or triton: each is imported in a process of its own, so that one that is missing or broken,
or that takes its process with it, is a finding too. Folders and limits are in ``doctor_room.py``, islands in
``doctor_islands.py``, the network in ``doctor_net.py``, another machine in ``doctor_meet.py``."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any, Literal

from dtrain import units

if TYPE_CHECKING:
    from dtrain.config import Job
    from dtrain.sections_each import IslandPlan

State = Literal["ok", "warn", "fail"]
PYTHON, TORCH, PYDANTIC = "3.11", "2.11", "2"
"""The oldest that dtrain runs with, as pyproject.toml has them."""
OTHERS = ("numpy", "typer", "rich", "networkx", "matplotlib", "safetensors", "pyyaml")
"""What else dtrain needs; whether they are there is enough."""
_MODULES = {"pyyaml": "yaml"}
"""Of packages whose modules have another name."""
EXTRAS = (
    ("sim", "rates", "sdp", "cvxpy"),
    ("model", "hf", "", "transformers"),
    ("data", "source", "hf:", "datasets"),
    ("log", "tensorboard", "True", "tensorboard"),
    ("log", "wandb", "", "wandb"),
)
"""Section, key, how an answer that is not empty begins where it asks for it, and the package."""
_ASK_S = 120.0
_OLDEST_GPU = (8, 0)
"""The compute capability from which dtrain's kernels are compiled and compared."""


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: State
    """fail: it will stop the job; warn: it may, or slows it down."""
    what: str
    remedy: str = ""
    """One command; none where all is well."""

    def __post_init__(self) -> None:
        assert (self.state == "ok") == (self.remedy == ""), self.name


@dataclass(frozen=True, slots=True)
class Asked:
    """A job, and how it was named on the command line."""

    job: Job
    words: tuple[str, ...]

    def again(self, *changes: str) -> str:
        """The command that runs it with other answers, in the place of those that were typed."""
        keys = {change.partition("=")[0] for change in changes}
        return shlex.join(["dtrain", "run", *(word for word in self.words if word.partition("=")[0] not in keys), *changes])

    @property
    def ranks(self) -> int:
        """Of all islands."""
        return self.job.ranks

    @property
    def here(self) -> dict[int, IslandPlan]:
        """The islands that this machine would start itself, by their numbers."""
        plans = {k: self.job.island(k) for k in range(self.job.islands.count)}
        return {k: plan for k, plan in plans.items() if plan.here}

    @property
    def ranks_here(self) -> int:
        return sum(plan.ranks for plan in self.here.values())

    @property
    def several(self) -> bool:
        """Whether an island has several ranks here."""
        return any(plan.ranks > 1 for plan in self.here.values())

    def key(self, k: int, name: str) -> str:
        """That says so of island k: its table's, where there are tables."""
        return f"islands.{name}" if self.job.islands.each is None else f"islands.each.{k}.{name}"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch says of itself and of the machine (``doctor_torch.py``)."""

    cuda: str | None
    gloo: bool
    nccl: str | None
    gpus: tuple[Gpu, ...]
    gpu_error: str
    cache: str
    """The folder of the compiled CPU kernels."""
    compiled: bool


@dataclass(frozen=True, slots=True)
class Size:
    """Of one island of a job, in bytes."""

    parameters: int
    state_bytes: int
    """What the recipe keeps."""
    checkpoint_bytes: int
    frozen: int = 0
    """Of the parameters."""


@dataclass(frozen=True, slots=True)
class Said:
    """What ``doctor_torch.py`` found, as far as it came."""

    version: str = ""
    torch: Torch | None = None
    size: Size | None = None
    refused: str = ""
    """Why the job's answers do not fit together."""
    no_text: str = ""
    """Why there is nothing to train on."""
    error: str = ""
    """Why it ended early."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a process printed, as JSON lines, or why it did not."""

    lines: tuple[Any, ...]
    error: str = ""


def start(*arguments: str) -> subprocess.Popen[str]:
    """A Python of the same kind; it writes no bytecode."""
    command = [sys.executable, "-B", "-W", "ignore", *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def version_of(package: str) -> subprocess.Popen[str]:
    return start("-c", f"import json, {package}; print(json.dumps({package}.__version__))")


def answer(process: subprocess.Popen[str]) -> Answer:
    """Waits for the process; all that it printed before it failed counts."""
    try:
        out, err = process.communicate(timeout=_ASK_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Answer((), f"no answer within {_ASK_S:g} s")
    lines = tuple(json.loads(line) for line in out.splitlines() if line.startswith(("{", '"')))
    if process.returncode == 0:
        return Answer(lines)
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "it said nothing")
    return Answer(lines, Signals(-process.returncode).name if process.returncode < 0 else last)


def of_torch(told: Answer) -> Said:
    """torch's version comes first, then what it says of itself, then what there is to say of the job."""
    version, itself, job = (*told.lines, *(None,) * 3)[:3]
    job = job or {}
    gpus = () if itself is None else tuple(Gpu(**gpu | {"capability": tuple(gpu["capability"])}) for gpu in itself["gpus"])
    return Said(
        version=version or "",
        torch=None if itself is None else Torch(**itself | {"gpus": gpus}),
        size=Size(**job) if "parameters" in job else None,
        refused=job.get("refused", ""),
        no_text=job.get("no_text", ""),
        error=told.error,
    )


def pip(*requirements: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])


# ---- versions


def python_and_dtrain() -> Iterator[Finding]:
    here = f"{platform.python_version()}, {sys.executable}"
    new = _numbers(platform.python_version()) >= _numbers(PYTHON)
    yield Finding("python", "ok" if new else "fail", here, "" if new else f"make PYTHON=python{PYTHON}")
    try:
        number = version("dtrain")
    except PackageNotFoundError:
        number = "not installed, a checkout"
    yield Finding("dtrain", "ok", f"{number}, in {Path(__file__).resolve().parents[1]}")


def torch_itself(said: Said) -> Iterator[Finding]:
    found = package("torch", Answer((said.version,) if said.version else (), said.error), oldest=TORCH)
    yield found
    if found.state == "ok" and said.torch is None:
        again = pip("--force-reinstall", f"torch>={TORCH}")
        yield Finding("dtrain with torch", "fail", f"cannot be imported: {said.error}", again)


def package(name: str, said: Answer, *, oldest: str = "", needed: bool = True, why: str = "") -> Finding:
    """Of one that a process has imported, which then said its version. ``why``: what it is needed for, or not."""
    requirement = f"{name}>={oldest}" if oldest else name
    because = f" ({why})" if why else ""
    if not said.lines:
        gone = re.search(r"No module named '([\w.]+)'", said.error)
        what = "not installed" if gone and gone[1] == name else f"cannot be imported: {said.error}"
        remedy = pip(requirement) if gone and gone[1] == name else pip("--force-reinstall", requirement)
        return Finding(name, "fail" if needed else "warn", f"{what}{because}", remedy)
    number = said.lines[0]
    if oldest and _numbers(number) < _numbers(oldest):
        return Finding(name, "fail", f"{number}, and dtrain needs {oldest} or newer", pip(requirement))
    return Finding(name, "ok", f"{number}{because}")


def other_packages() -> Finding:
    gone = [name for name in OTHERS if find_spec(_MODULES.get(name, name)) is None]
    if gone:
        return Finding("packages", "fail", f"not installed: {', '.join(gone)}", pip(*gone))
    return Finding("packages", "ok", ", ".join(OTHERS))


def of_job(asked: Asked, said: Said) -> Iterator[Finding]:
    """Its text, its recipe's code, and the packages that its answers ask for beyond what dtrain needs."""
    if said.no_text:
        yield Finding("data", "fail", said.no_text, asked.again("data.source=stdlib"))
    elif said.torch is not None and said.size is None:
        from dtrain.recipes import DEFAULT_RECIPE

        check = shlex.join(["dtrain", "check", asked.job.sync.recipe or DEFAULT_RECIPE])
        yield Finding("recipe", "warn", f"the job's size cannot be reckoned: {said.error}", check)
    for section, key, begins, name in EXTRAS:
        chosen = str(getattr(getattr(asked.job, section), key))
        if chosen and chosen.startswith(begins):
            there, key = find_spec(name) is not None, f'{section}.{key} = "{chosen}"'
            yield Finding(name, "ok", f"there, for {key}") if there else Finding(
                name, "fail", f"not installed, and {key} needs it", pip(name)
            )


def needs(torch: Torch | None) -> Sequence[tuple[str, bool, str]]:
    """Of numba and triton: whether a job would miss it, and why (not)."""
    forced, gpu = os.environ.get("DTRAIN_KERNELS", ""), torch is not None and bool(torch.gpus)
    return (
        ("numba", forced == "numba" or not (forced or gpu), "the kernels of a GPU are Triton's" if gpu else "the CPU's kernels"),
        ("triton", forced == "triton" or (gpu and not forced), "the GPU's kernels" if gpu else "only a GPU needs it"),
    )


def _numbers(text: str) -> tuple[int, ...]:
    """``"2.13.0+cpu"`` -> (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part)  # pyright: ignore[reportOptionalSubscript]


# ---- what computes


def gpus(torch: Torch, asked: Asked | None, driver: str) -> Iterator[Finding]:
    """``driver``: NVIDIA's, where the kernel has one."""
    nccl = asked is not None and asked.job.link.transport == "nccl"
    if not torch.gpus:
        if torch.gpu_error:
            yield Finding("gpu", "fail", f"torch cannot use it: {torch.gpu_error}", "nvidia-smi")
        elif driver and torch.cuda is None:
            index = "https://download.pytorch.org/whl/cu130"
            what = f"NVIDIA driver {driver} is here, and this torch was built for CPUs"
            yield Finding("gpu", "warn", what, pip("--force-reinstall", f"torch>={TORCH}", "--index-url", index))
        elif nccl and asked is not None:
            yield Finding("gpu", "fail", 'none, and link.transport = "nccl" needs one', asked.again("link.transport=c10d"))
        else:
            yield Finding("gpu", "ok", "none: CPU only")
        return
    for k, gpu in enumerate(torch.gpus):
        of = ".".join(map(str, gpu.capability))
        room = f"{units.show_bytes(gpu.free_bytes)} of {units.show_bytes(gpu.total_bytes)} free"
        what = f"{gpu.name}, compute capability {of}, {room}"
        if gpu.capability < _OLDEST_GPU:
            what += "; dtrain's kernels are for 8.0 and newer"
            yield Finding(f"gpu {k}", "warn", what, "export DTRAIN_KERNELS=reference")
        else:
            yield Finding(f"gpu {k}", "ok", f"{what}, CUDA {torch.cuda}, driver {driver or 'not said'}")
    if asked is not None:
        yield _gpus_each(len(torch.gpus), asked)


def _gpus_each(count: int, asked: Asked) -> Finding:
    name, here = "gpus", asked.ranks_here
    for k, plan in asked.here.items():
        if plan.ranks > count:
            what = f"an island's {plan.ranks} ranks would share {count}, which NCCL refuses"
            return Finding(name, "fail", what, asked.again(f"{asked.key(k, 'ranks')}={count}"))
    if here > count:
        what = f"{here} ranks of all islands here share {count}"
        return Finding(name, "warn", what, shlex.join(["dtrain", "sim", *asked.words]))
    return Finding(name, "ok", f"one for each of {here} ranks")


def backends(torch: Torch, asked: Asked | None) -> Iterator[Finding]:
    again = pip("--force-reinstall", f"torch>={TORCH}")
    yield Finding("gloo", "ok", "built into torch") if torch.gloo else Finding(
        "gloo", "fail", "not built into this torch, and the link needs it", again
    )
    if torch.nccl is not None:
        yield Finding("nccl", "ok", torch.nccl)
    elif torch.gpus:
        needed = asked is not None and (asked.job.link.transport == "nccl" or asked.several)
        what = "not built into this torch" + (", and the job's ranks need it" if needed else "")
        yield Finding("nccl", "fail" if needed else "warn", what, again)
    else:
        yield Finding("nccl", "ok", "not built into this torch, and not needed without GPUs")


def nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", file.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1] if found else "of an unknown version"
