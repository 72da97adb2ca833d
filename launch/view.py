"""What does a person see while a run works? One live picture on a terminal, plain lines elsewhere.

The functions are pure (islands -> what is shown); LiveView owns the screen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dtrain.launch.progress import IslandView, slowest_step
from dtrain.units import show_bytes, show_seconds

PLAIN_EVERY_S, TROUBLE_EVERY_S = 10.0, 2.0

# Two lines for each of more islands would not fit on a screen.
_MOST_WITH_TWO_LINES = 8
_NAMED = 3  # islands waited for that are named one by one
_BAR_COLUMNS = (3, 40)  # the shortest that still shows something, and the longest
_GAP = 2
_WORDS_COLUMNS = 36  # kept free for "waiting for island 1, 12 s of 300", so that bars do not jump when an island begins to wait


def picture(islands: Sequence[IslandView], columns: int, rows: int | None = None) -> RenderableType:
    """A progress bar an island, what it does, and what it learns, sends and waits for, in at most ``rows`` lines.

    It is laid out by hand: a table of rich's gives up the columns that are hard to do without, the bar first."""
    fit = len(islands) if rows is None or len(islands) < rows else max(rows - 2, 1)
    shown, left = islands[:fit], islands[fit:]
    two_lines = len(islands) <= _MOST_WITH_TWO_LINES and (rows is None or 2 * len(islands) < rows)
    heads, steps = [f"island {view.island}" for view in shown], [_steps(view) for view in shown]
    name, counted = _longest(heads), _longest(steps)
    least, most = _BAR_COLUMNS
    room = columns - name - counted - 3 * _GAP  # for the bar and the words
    words = [now(view) if two_lines else _with_loss(view, room - least) for view in shown]
    bar = min(max(room - max(_longest(words), _WORDS_COLUMNS), least), most)
    lines: list[RenderableType] = []
    for view, head, count, word in zip(shown, heads, steps, words, strict=True):
        row = Table.grid(padding=(0, _GAP))
        for width in (name, bar, counted, len(word)):
            row.add_column(width=width, no_wrap=True)
        done = ProgressBar(total=max(view.steps, 1), completed=view.step, width=bar)
        row.add_row(head, done, Text(count, justify="right"), Text(word, style="yellow" if _troubled(view) else "green"))
        lines.append(row)
        if two_lines and view.loss is not None:
            lines.append(Text(f"    {'  '.join(_fitting(view, columns - 4))}", style="dim", no_wrap=True))
    if left:
        lines.append(Text(f"and {len(left)} more, at step {slowest_step(left)} or later", style="dim"))
    return Group(*lines)


def plain_line(islands: Sequence[IslandView]) -> str:
    """All islands in one line of a log; of many only those in trouble are named."""
    if len(islands) <= _MOST_WITH_TWO_LINES:
        return " | ".join(plain(view) for view in islands)
    steps = [view.step for view in islands]
    troubled = [f"island {view.island}: {now(view)}" for view in islands if _troubled(view)][:_NAMED]
    return " | ".join([f"{len(islands)} islands, steps {min(steps)} to {max(steps)} of {islands[0].steps}", *troubled])


def plain(view: IslandView) -> str:
    """One island in one line of a log."""
    words = f"island {view.island}: {now(view)}"
    return words if view.loss is None else ", ".join((words, f"step {_steps(view)}", *_numbers(view), *_of_rounds(view)))


def now(view: IslandView) -> str:
    """What an island does, in words: "training", "waiting for island 1, 12 s of 300"."""
    if view.note:
        return view.note
    if not view.waiting_for:
        return "compiling the CPU kernels, once, about half a minute" if view.state == "compiling" else view.state
    return f"waiting for {_names(view.waiting_for)}, {view.waited_s:.0f} s of {view.timeout_s:.0f}"


class LiveView:
    """The screen of one run, from the first island's start to the end of the last."""

    def __init__(self, console: Console, *, bars: bool = True) -> None:
        """``bars`` off: plain lines on a terminal too."""
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if bars and console.is_terminal else None
        self._said_at: float | None = None
        self._said = ""
        self._troubled: set[int] = set()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, islands: Sequence[IslandView], now_s: float) -> None:
        """Redraw; where the output is no terminal, one line every 10 s at most (2 s where an island has begun to wait or was
        lost), and none that repeats the last."""
        if self._live is not None:
            self._live.update(picture(islands, self._console.width, self._console.height), refresh=True)
            return
        troubled = {view.island for view in islands if _troubled(view)}
        pause_s = TROUBLE_EVERY_S if troubled - self._troubled else PLAIN_EVERY_S
        if self._said_at is not None and now_s - self._said_at < pause_s:
            return
        line = plain_line(islands)
        if line != self._said:
            self.line(line)
            self._said_at, self._said, self._troubled = now_s, line, troubled

    def line(self, text: str) -> None:
        """One line of text, above the bars."""
        self._console.print(Text(text), soft_wrap=True)


def _names(islands: Sequence[int]) -> str:
    if len(islands) == 1:
        return f"island {islands[0]}"
    if len(islands) <= _NAMED:
        return f"islands {', '.join(map(str, islands))}"
    return f"island {islands[0]} and {len(islands) - 1} more"


def _with_loss(view: IslandView, columns: int) -> str:
    """Where there is no second line the loss stands here, unless the words take all the room."""
    words = now(view)
    both = words if view.loss is None else f"loss {view.loss:.3f}  {words}"
    return both if len(both) <= columns else words


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


def _troubled(view: IslandView) -> bool:
    return bool(view.note) or view.state == "waiting"


def _steps(view: IslandView) -> str:
    return f"{view.step}/{view.steps}"


def _fitting(view: IslandView, columns: int) -> tuple[str, ...]:
    """Of rounds what there is room for."""
    said = _numbers(view)
    for more in _of_rounds(view):
        said = (*said, more) if len("  ".join((*said, more))) <= columns else said
    return said


def _of_rounds(view: IslandView) -> Iterator[str]:
    """What only jobs have whose rounds need a quorum, or adapt."""
    if view.rounds_left_out is not None:
        yield f"left out of {view.rounds_left_out} of {view.rounds_left_out + (view.rounds_joined or 0)} rounds"
    if view.every_steps is not None:
        yield f"H {view.every_steps}"
    if view.rank_mean is not None:
        yield f"mean rank {view.rank_mean:.1f}"


def _numbers(view: IslandView) -> tuple[str, ...]:
    assert view.loss is not None
    waited, sent = show_seconds(round(view.wait_s, 1)), show_bytes(view.wire_bytes_sent)
    speed = () if view.tokens_per_s is None else (f"{view.tokens_per_s:,.0f} tokens/s",)
    if view.wire_bytes_per_s is not None:  # "for link" would not fit beside it
        return (f"loss {view.loss:.3f}", *speed, f"sent {sent} at {show_bytes(view.wire_bytes_per_s)}/s", f"waited {waited}")
    return (f"loss {view.loss:.3f}", *speed, f"sent {sent}", f"waited for link {waited}")
