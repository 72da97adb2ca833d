"""Islands ended: does the launcher wait, start them again, or end the run? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Islands that fail together (a script that cannot be imported) end within a second of each other; they are judged together.
TOGETHER_S = 1.5


@dataclass(frozen=True, slots=True)
class Seen:
    """What the launcher knows of one island."""

    island: int
    state: Literal["running", "done", "failed"]
    kind: str = ""  # of a failed island: "user", "resumable" or "bug"
    message: str = ""
    failed_for_s: float = 0.0
    restarts_left: int = 0
    waiting_for: tuple[int, ...] = ()  # of a running island
    says_state: bool = False  # it writes a status.json, so it will say when it waits


@dataclass(frozen=True, slots=True)
class Done:
    pass


@dataclass(frozen=True, slots=True)
class Restart:
    islands: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run; ``show`` names the island whose log a person needs to see."""

    exit_status: Literal[1, 2, 75]
    message: str
    show: int | None = None


def decide(islands: Sequence[Seen], *, trained: bool, script: bool = False) -> Done | Restart | Stop | None:
    """None: nothing to do.

    ``trained``: a step was made in this launch, so that going on later makes sense. ``script``: somebody's own runs, and one line
    says too little of where it failed."""
    failed = [seen for seen in islands if seen.state == "failed"]
    running = [seen for seen in islands if seen.state == "running"]
    if not failed:
        return None if running else Done()
    bug = next((seen.island for seen in failed if seen.kind == "bug"), None)
    for seen in sorted(failed, key=lambda seen: seen.kind != "user"):
        if seen.kind == "user":
            return Stop(2, f"island {seen.island}: {seen.message}", show=seen.island if script else None)
        if seen.kind == "resumable":
            return Stop(75, f"island {seen.island}: {seen.message}", show=bug)
    if min(seen.failed_for_s for seen in failed) < TOGETHER_S:
        return None
    if not running and not trained:
        return Stop(1, f"{_names(failed)} failed before the first step", show=failed[0].island)
    if len(failed) + len(running) < len(islands):
        return Stop(75, f"{_names(failed)} failed after another island had finished", show=failed[0].island)
    if any(seen.restarts_left == 0 for seen in failed):
        return None if running else Stop(75, f"{_names(failed)} failed and no restarts are left", show=failed[0].island)
    return Restart(tuple(seen.island for seen in failed)) if _others_wait(failed, running) else None


def _others_wait(failed: Sequence[Seen], running: Sequence[Seen]) -> bool:
    """The rest must stand still before the run is set back under them: until then they write metrics and checkpoints.

    An island may stand still behind another one, as in a ring. One that talks rarely notices late, and one that never talks at
    the final merge: no clock is a reason to take away the steps that it makes until then."""
    stuck = {seen.island for seen in failed}
    moving = [seen for seen in running if seen.says_state]
    while behind := [seen for seen in moving if stuck & set(seen.waiting_for)]:
        stuck |= {seen.island for seen in behind}
        moving = [seen for seen in moving if seen.island not in stuck]
    return not moving


def _names(islands: Sequence[Seen]) -> str:
    numbers = ", ".join(str(seen.island) for seen in islands)
    return f"island {numbers}" if len(islands) == 1 else f"islands {numbers}"
