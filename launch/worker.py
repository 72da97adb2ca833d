"""What does one rank of an island run, and how does it tell the launcher why it stopped?

torchrun turns every failure into exit status 1, so a rank that stops on an error leaves one line in error.json.
``python -m dtrain.launch.worker SCRIPT ARGS`` runs somebody's own training script.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from dtrain.config import load_job
from dtrain.errors import PeerLost, Regroup
from dtrain.launch.islands import say_stdout
from dtrain.launch.processes import die_with_parent
from dtrain.metrics import ErrorKind, write_error


def train(job_path: Path, window: str | None = None) -> None:
    """One rank of ``dtrain run JOB.toml``; of ``dtrain profile`` where a window of steps is named."""
    die_with_parent()
    with errors_left_for_the_launcher():
        from dtrain.membership import place_from_env
        from dtrain.profile_steps import Window
        from dtrain.train import run_island

        run_island(load_job(job_path), place_from_env(), None if window is None else Window.parse(window))


def run_script(script: str, arguments: list[str]) -> None:
    """Run a script as ``python SCRIPT ARGS`` would, in this process, which dies with its torchrun."""
    die_with_parent()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    run, island = os.environ.get("DTRAIN_RUN"), os.environ.get("DTRAIN_ISLAND")
    if run is not None and island is not None and os.environ.get("RANK") == "0":
        say_stdout(Path(run), int(island))
    with errors_left_for_the_launcher():
        try:
            runpy.run_path(script, run_name="__main__")
        except Regroup as again:
            _start_over(again)


def _start_over(again: Regroup) -> NoReturn:
    """A lost island has come back. A script's loop cannot be set back from outside, so it begins anew, as the lost one did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PeerLost((), "an island was started again; the ranks of this one cannot begin anew each by itself") from again
    print(f"an island was started again: so is this script, in epoch {again.epoch}", flush=True)
    os.environ |= {"DTRAIN_EPOCH": str(again.epoch), "DTRAIN_RESUME_STEP": str(again.step)}
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextmanager
def errors_left_for_the_launcher() -> Iterator[None]:
    try:
        yield
    except ValueError as e:  # NonFinite too: training that diverged would diverge again
        _leave("user", e)
        raise
    except PeerLost as e:
        _leave("resumable", e)
        raise


def _leave(kind: ErrorKind, error: Exception) -> None:
    run, island = os.environ.get("DTRAIN_RUN"), os.environ.get("DTRAIN_ISLAND")
    if run is not None and island is not None:  # else started by hand, and the error itself is seen
        write_error(Path(run, "logs", f"island{island}"), kind, str(error))


if __name__ == "__main__":
    run_script(sys.argv[1], sys.argv[2:])
