"""What can a person type after ``dtrain status``, and what do they see of a run that another process drives?"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from dtrain.launch.status import Reader, State, newest_run
from dtrain.launch.view import picture, plain
from dtrain.units import show_bytes, show_seconds

_READ_EVERY_S = 1.0
_QUIET_S = 10.0
"""So long without a word is worth a word."""


def status(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="left out: the newest in runs that goes on", show_default=False)
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="one page, and no more; as where the output is no terminal")] = False,
    web: Annotated[bool, typer.Option("--web", help="as a page of this machine for a browser, and for Prometheus")] = False,
    port: Annotated[
        int | None, typer.Option("--port", help="of --web; left out: a free one", min=0, max=65535, show_default=False)
    ] = None,
) -> None:
    """Show how a run stands, from beside it.

    Until the run has ended, or Ctrl-C. It only reads what the islands write.

    Example: dtrain status runs/quickstart --web --port 8080
    """
    if once and web:
        raise ValueError("--once and --web exclude each other; give one of them")
    if port is not None and not web:
        raise ValueError(f"--port {port} has no effect without --web; add it, or leave --port out")
    reader, console = Reader(run_folder or newest_run(Path("runs"))), Console()
    try:
        if web:
            from dtrain.launch.status_web import serve

            serve(reader, port or 0, lambda text: console.print(Text(text), soft_wrap=True))
        elif once or not console.is_terminal:
            _once(reader.read(), console)
        else:
            watch(reader, console, time.sleep)
    except KeyboardInterrupt:  # the way to end it
        return


def _once(state: State, console: Console) -> None:
    if console.is_terminal:
        console.print(page(state, console.width))
        return
    for line in (*heads(state), *(plain(island.view) for island in state.seen)):
        console.print(Text(line), soft_wrap=True)


def watch(reader: Reader, console: Console, sleep: Callable[[float], None]) -> None:
    """Draw it anew each second, until the run has ended."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            state = reader.read()
            live.update(page(state, console.width, console.height), refresh=True)
            if state.phase == "ended":
                return
            sleep(_READ_EVERY_S)


def page(state: State, columns: int, rows: int | None = None) -> RenderableType:
    """How the run stands in few lines, and below them what ``dtrain run`` shows, in at most ``rows`` lines."""
    lines = heads(state)
    texts = [Text(line, style="" if k else "bold", no_wrap=True, overflow="ellipsis") for k, line in enumerate(lines)]
    return Group(*texts, picture([island.view for island in state.seen], columns, rows and max(rows - len(lines), 1)))


def heads(state: State) -> list[str]:
    """What there is to say of the run as a whole."""
    count = len(state.islands)
    of = f"{count} island{'s' * (count != 1)}, {state.recipe}"
    time_s = max((island.time_s for island in state.islands), default=0.0)
    rates = [island.view.wire_bytes_per_s for island in state.islands if island.view.wire_bytes_per_s is not None]
    facts = [
        *([f"in training for {show_seconds(round(time_s, 1))}"] if time_s else []),
        *([f"{'all' if state.part is None else 'its'} links carry {show_bytes(sum(rates))}/s"] if rates else []),
        "nothing committed yet" if state.committed_step is None else f"last commit at step {state.committed_step}",
    ]
    merged = [f"the merged model's loss is {loss:.3f} at step {step}" for step, loss in state.merged[-1:]]
    restarts = [(k, island.restarts) for k, island in enumerate(state.islands) if island.restarts]
    again = ", ".join(f"island {k} {times}x" for k, times in restarts)
    quiet = state.phase == "running" and state.quiet_s >= _QUIET_S
    return [
        f"{state.run}: {state.how or 'running'}; {of}",
        "; ".join(facts),
        *merged,
        *([state.unseen] if state.unseen else []),
        *([f"lost and started again: {again}"] if again else []),
        *([f"nothing was written for {show_seconds(int(state.quiet_s))}"] if quiet else []),
    ]
