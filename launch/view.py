"""What does a person see while a run works? One live picture on a terminal, plain lines elsewhere.

The functions are pure (islands -> what is shown); LiveView owns the screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dtrain.launch.progress import IslandView
from dtrain.units import show_bytes, show_seconds

PLAIN_EVERY_S = 10.0


def picture(islands: Sequence[IslandView]) -> RenderableType:
    """A progress bar an island, with what it learns, sends and waits for."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("island")
    table.add_column("progress", min_width=10, ratio=1)
    for name in ("step", "loss", "tokens/s", "sent", "waited for link"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("now", no_wrap=True)
    for view in islands:
        bar = ProgressBar(total=max(view.steps, 1), completed=view.step, width=None)
        lost = bool(view.note) or view.state == "waiting"
        table.add_row(str(view.island), bar, _steps(view), *_numbers(view), Text(now(view), style="yellow" if lost else "green"))
    return table


def plain_line(islands: Sequence[IslandView]) -> str:
    """All islands in one line of a log."""
    return " | ".join(_plain(view) for view in islands)


def now(view: IslandView) -> str:
    """What an island does, in words: "training", "waiting for island 1, 12 s of 300"."""
    if view.note:
        return view.note
    if not view.waiting_for:
        return view.state
    names = ", ".join(str(island) for island in view.waiting_for)
    return f"waiting for island{'s' if len(view.waiting_for) > 1 else ''} {names}, {view.waited_s:.0f} s of {view.timeout_s:.0f}"


class LiveView:
    """The screen of one run, from the first island's start to the end of the last."""

    def __init__(self, console: Console, *, bars: bool = True) -> None:
        """``bars`` off: plain lines on a terminal too."""
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if bars and console.is_terminal else None
        self._said_at: float | None = None
        self._said = ""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, islands: Sequence[IslandView], now_s: float) -> None:
        """Redraw; where the output is no terminal, one line every 10 s at most, and none that repeats the last."""
        if self._live is not None:
            self._live.update(picture(islands), refresh=True)
            return
        if self._said_at is not None and now_s - self._said_at < PLAIN_EVERY_S:
            return
        line = plain_line(islands)
        if line != self._said:
            self.line(line)
            self._said_at, self._said = now_s, line

    def line(self, text: str) -> None:
        """One line of text, above the bars."""
        self._console.print(Text(text), soft_wrap=True)


def _plain(view: IslandView) -> str:
    words = f"island {view.island}: {now(view)}"
    if view.loss is None:
        return words
    loss, speed, sent, waited = _numbers(view)
    return f"{words}, step {_steps(view)}, loss {loss}, {speed} tokens/s, sent {sent}, waited {waited}"


def _steps(view: IslandView) -> str:
    return f"{view.step}/{view.steps}"


def _numbers(view: IslandView) -> tuple[str, str, str, str]:
    if view.loss is None:
        return "-", "-", "-", "-"
    speed = "-" if view.tokens_per_s is None else f"{view.tokens_per_s:,.0f}"
    return f"{view.loss:.3f}", speed, show_bytes(view.wire_bytes_sent), show_seconds(round(view.wait_s, 1))
