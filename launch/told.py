"""What does the launcher tell an island whose torchruns a scheduler starts? The epoch and the step that it begins with.

``python -m dtrain.launch.told TIMEOUT_S NODE_RANK COMMAND ARGS`` asks at DTRAIN_MEET, waits there until the launcher has come, and
becomes COMMAND, with DTRAIN_EPOCH and DTRAIN_RESUME_STEP set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dtrain.launch.islands import NEWS, folder
from dtrain.membership import meeting_store, place_from_env


def ask(meet: str, timeout_s: float) -> tuple[int, int]:
    """(epoch, step), as the launcher at ``host:port`` says; raises RuntimeError of torch when none has come in time."""
    epoch, step = meeting_store(meet, timeout_s).get("regroup").decode().split(":")
    return int(epoch), int(step)


def forget_news(run: Path, island: int) -> None:
    """Drop what an earlier start of the island left, and what would pass for word of this one."""
    logs = folder(run, island)
    logs.mkdir(parents=True, exist_ok=True)
    for name in NEWS:
        (logs / name).unlink(missing_ok=True)


def main(timeout_s: str, node_rank: str, *command: str) -> None:
    place = place_from_env()
    assert place.run is not None
    epoch, step = ask(place.meet, float(timeout_s))
    if int(node_rank) == 0:  # the other nodes come together at this one, after it did so
        forget_news(place.run, place.island)
    os.environ |= {"DTRAIN_EPOCH": str(epoch), "DTRAIN_RESUME_STEP": str(step)}
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
