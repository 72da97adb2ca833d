"""How does a run look? Loss against steps, against time, and, for several runs, against bytes on the link.

Draws on matplotlib's Figure directly: no pyplot, no window, no global state.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dtrain import units
from dtrain.metrics import RunRecord, write_whole

Array = NDArray[np.float64]

DPI = 150
# Okabe and Ito's colours, which the colour-blind tell apart; the darkest first, since lines are thin.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_INK, _GRID, _STAR = "#333333", "#E3E3E3", "#F0C000"
# Up to here each island has a legend entry and its raw loss; with more the raw lines are one smear.
_FEW = 4
# Of metrics.jsonl, in the order of a Curve's fields.
_COLUMNS = ("step", "time_s", "wire_bytes_sent", "loss", "eval_loss", "eval_loss_merged")
_LOSS = "training loss (nats a token)"


@dataclass(frozen=True)
class Curve:
    """One line's worth of metrics, by step."""

    step: Array
    time_s: Array
    sent_bytes: Array
    loss: Array
    eval_loss: Array
    eval_loss_merged: Array


def plot_run(metrics: Sequence[dict[str, Any]], summary: dict[str, Any], out: Path) -> None:
    """``loss.png``: every island's loss against steps and against time, held-out losses, the merged model."""
    islands = sorted({line["island"] for line in metrics})
    curves = {island: _curve([line for line in metrics if line["island"] == island]) for island in islands}
    few = len(islands) <= _FEW
    time_unit, seconds = _time_unit(curves.values())
    figure, (by_step, by_time) = _panels(2)
    for panel, x_of in ((by_step, _step), (by_time, _time(seconds))):
        for index, (island, curve) in enumerate(curves.items()):
            _draw(
                panel,
                x_of(curve),
                curve,
                _colour(index, len(islands)),
                _island_name(island, index, len(islands)),
                raw=few,
            )
            _stars_on_the_way(panel, x_of(curve), curve)
        _star(panel, max((_last(x_of(curve)) for curve in curves.values()), default=0.0), summary)
    _label(by_step, "step", _LOSS)
    _label(by_time, f"training time ({time_unit})", None)
    by_time.tick_params(labelleft=False)
    _frame_loss(by_step, curves.values(), [summary])
    _bits_axis(by_time, summary)
    _legend(by_step, _run_key(summary))
    figure.suptitle(_title(summary), x=0.012, ha="left", fontsize=12, fontweight="bold", color=_INK)
    _save(figure, out)


def plot_compare(runs: Sequence[RunRecord], out: Path) -> None:
    """Runs in one picture: the islands' mean loss against steps, time, and bytes that an island sent."""
    curves = [_mean_curve(run.lines) for run in runs]
    time_unit, seconds = _time_unit(curves)
    figure, (by_step, by_time, by_bytes) = _panels(3)
    for panel, x_of in ((by_step, _step), (by_time, _time(seconds))):
        for index, (run, curve) in enumerate(zip(runs, curves, strict=True)):
            _draw(panel, x_of(curve), curve, _colour(index, len(runs)), run.name, raw=False)
            _stars_on_the_way(panel, x_of(curve), curve, _colour(index, len(runs)))
            _star(panel, _last(x_of(curve)), run.summary, colour=_colour(index, len(runs)))
    for index, run in enumerate(runs):
        _cost(by_bytes, run, _colour(index, len(runs)))
    _label(by_step, "step", _LOSS + ", mean of the islands")
    _label(by_time, f"training time ({time_unit})", None)
    _label(by_bytes, "bytes an island sent while training", "merged model (bits per byte)")
    _bytes_axis(by_bytes, [run.summary["wire_bytes_sent"] for run in runs])
    _frame_loss(by_step, curves, [run.summary for run in runs])
    _legend(by_step, [("o", "held out", "white", _INK), ("*", "merged model, held out", "white", _INK)])
    figure.suptitle("Runs compared", x=0.008, ha="left", fontsize=12, fontweight="bold", color=_INK)
    _save(figure, out)


def smooth(values: Array) -> Array:
    """Running median, then mean, over a fiftieth of the curve: it neither lags nor follows a spike."""
    half = max(1, len(values) // 100)
    # At the start windows shrink, or the first fall would be drawn flat; at the end they lose their right half only.
    windows = [slice(i - min(half, i), i + min(half, i) + 1) for i in range(len(values))]
    medians = np.array([np.median(values[window]) for window in windows])
    return np.array([medians[window].mean() for window in windows], dtype=np.float64)


def _thin(x: Array, y: Array, most: int = 1500) -> tuple[Array, Array]:
    """Means of neighbours, so that a line has no more points than the picture has columns."""
    block = -(-len(x) // most)
    if block <= 1:
        return x, y
    starts = np.arange(0, len(x), block)
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _curve(lines: Sequence[dict[str, Any]]) -> Curve:
    def column(name: str) -> Array:
        return np.array([line.get(name) for line in lines], dtype=np.float64)  # None becomes NaN

    return Curve(*map(column, _COLUMNS))


def _mean_curve(lines: Sequence[dict[str, Any]]) -> Curve:
    by_step: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line)
    return _curve(
        [{name: _mean(line.get(name) for line in by_step[step]) for name in _COLUMNS} for step in sorted(by_step)]
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _step(curve: Curve) -> Array:
    return curve.step


def _time(seconds: float) -> Callable[[Curve], Array]:
    return lambda curve: curve.time_s / seconds


def _time_unit(curves: Iterable[Curve]) -> tuple[str, float]:
    longest_s = max((curve.time_s[-1] for curve in curves if len(curve.time_s)), default=0.0)
    if longest_s < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest_s < 3 * 3600 else ("hours", 3600.0)


def _island_name(island: int, index: int, count: int) -> str | None:
    if count <= _FEW or index == 0:
        return f"island {island}"
    return f"to island {island}" if index == count - 1 else None


def _colour(index: int, count: int) -> str:
    if count <= len(_COLOURS):
        return _COLOURS[index]
    return to_hex(colormaps["viridis"](0.9 * index / (count - 1)))


def _draw(panel: Axes, x: Array, curve: Curve, colour: str, label: str | None, raw: bool) -> None:
    finite = np.isfinite(curve.loss)
    x_finite, loss = x[finite], curve.loss[finite]
    if raw:
        panel.plot(x_finite, loss, color=colour, alpha=0.16, linewidth=0.6, zorder=1)
    x_thin, thin = _thin(x_finite, loss)
    panel.plot(x_thin, smooth(thin), color=colour, alpha=0.9, linewidth=1.7 if raw else 1.3, label=label, zorder=2)
    held_out = np.isfinite(curve.eval_loss)
    style = {"markersize": 6, "markeredgewidth": 1.4, "markerfacecolor": "white", "markeredgecolor": colour}
    panel.plot(x[held_out], curve.eval_loss[held_out], "o", zorder=3, **style)


def _last(x: Array) -> float:
    """Where a curve ends; one without a line, which a metrics.jsonl that was emptied leaves, ends where it would begin."""
    return float(x[-1]) if len(x) else 0.0


def _star(panel: Axes, x: float, summary: dict[str, Any], colour: str = _STAR) -> None:
    if summary["eval_loss"] is not None:
        panel.scatter(
            [x], [summary["eval_loss"]], s=150, marker="*", color=colour, edgecolors=_INK, linewidths=0.9, zorder=5
        )


def _stars_on_the_way(panel: Axes, x: Array, curve: Curve, colour: str = _STAR) -> None:
    """What a merge would have given there."""
    merged = np.isfinite(curve.eval_loss_merged)
    style = {"markersize": 8, "markeredgewidth": 0.7, "markerfacecolor": colour, "markeredgecolor": _INK}
    panel.plot(x[merged], curve.eval_loss_merged[merged], "*", zorder=4, **style)


def _cost(panel: Axes, run: RunRecord, colour: str) -> None:
    """Where the run ended: what it sent, and how good its merged model is. Down and left is better."""
    bits = run.summary["eval_bits_per_byte"]
    if bits is None:
        return
    sent = run.summary["wire_bytes_sent"]
    panel.scatter([sent], [bits], s=190, marker="*", color=colour, edgecolors=_INK, linewidths=0.9, zorder=5)
    place = {"xytext": (0, 11), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    panel.annotate(run.name, (sent, bits), color=_INK, **place)


def _bytes_axis(panel: Axes, sent: Sequence[float]) -> None:
    """Logarithmic, with a place at the left for runs that sent nothing."""
    decades = [int(np.floor(np.log10(count))) for count in sent if count > 0]
    if decades:
        first, last = min(decades), max(decades) + 1
        silent = min(sent) == 0
        panel.set_xscale("symlog", linthresh=10.0**first)
        # Ticks that nobody can tell apart help nobody: eight at most.
        ticks = [10.0**power for power in range(first, last + 1, 1 + (last - first) // 8)]
        panel.set_xticks([0.0, *ticks] if silent else ticks)
        panel.set_xlim(-0.5 * 10.0**first if silent else 0.7 * 10.0**first, 1.6 * 10.0**last)
    panel.xaxis.set_major_formatter(lambda count, _: "none" if count == 0 else units.show_bytes(count))
    panel.margins(y=0.25)


def _panels(count: int) -> tuple[Figure, tuple[Axes, ...]]:
    figure = Figure(figsize=(5.5 * count, 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels: list[Axes] = []
    for index in range(count):
        shared = panels[0] if index == 1 else None
        panels.append(figure.add_subplot(1, count, index + 1, sharey=shared))
    for panel in panels:
        panel.grid(True, color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=_INK, labelsize=9)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            panel.spines[side].set_color("#999999")
    return figure, tuple(panels)


def _label(panel: Axes, x: str, y: str | None) -> None:
    panel.set_xlabel(x, color=_INK, fontsize=10)
    if y is not None:
        panel.set_ylabel(y, color=_INK, fontsize=10)


def _frame_loss(panel: Axes, curves: Iterable[Curve], summaries: Iterable[dict[str, Any]]) -> None:
    """Leave the first fall out of sight: it takes 5 % of a run and would take half of the picture."""
    seen = [part for curve in curves for part in _worth_seeing(curve)]
    values = np.concatenate([*seen, [s["eval_loss"] for s in summaries if s["eval_loss"] is not None]])
    if len(values):
        low, high = float(values.min()), float(values.max())
        room = 0.06 * (high - low) or 0.1
        panel.set_ylim(low - room, high + room)


def _worth_seeing(curve: Curve) -> Iterator[Array]:
    loss = curve.loss[np.isfinite(curve.loss)]
    settled = loss[min(len(loss) // 20, len(loss) - 1) :] if len(loss) else loss
    if len(settled):
        yield np.percentile(settled, [0.2, 99.8])
    for held_out in (curve.eval_loss, curve.eval_loss_merged):
        yield held_out[np.isfinite(held_out)]


def _bits_axis(panel: Axes, summary: dict[str, Any]) -> None:
    if summary["eval_loss"] and summary["eval_bits_per_byte"]:
        factor = summary["eval_bits_per_byte"] / summary["eval_loss"]
        axis = panel.secondary_yaxis("right", functions=(lambda loss: loss * factor, lambda bits: bits / factor))
        axis.set_ylabel("bits per byte", color=_INK, fontsize=10)
        axis.tick_params(colors=_INK, labelsize=9)
        axis.spines["right"].set_color("#999999")


def _run_key(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    key = [("o", "held out, island's own model", "white", _INK)]
    if summary["eval_loss"] is not None:
        key.append(("*", f"held out, merged model: {summary['eval_loss']:.3f}", _STAR, _INK))
    return key


def _legend(panel: Axes, key: Sequence[tuple[str, str, str, str]]) -> None:
    for marker, label, face, edge in key:
        size = 12 if marker == "*" else 6
        style = {"markersize": size, "markerfacecolor": face, "markeredgecolor": edge, "linestyle": "none"}
        panel.plot([], [], marker=marker, label=label, **style)
    panel.legend(loc="upper right", frameon=True, framealpha=0.92, edgecolor="none", fontsize=9, labelcolor=_INK)


def _title(summary: dict[str, Any]) -> str:
    count = summary["islands"]
    islands = "1 island" if count == 1 else f"{count} islands"
    sent = f"each sent {units.show_bytes(summary['wire_bytes_sent'])}" if summary["wire_bytes_sent"] else "nothing sent"
    if count > 1:
        sent += f" (all-reduce: {units.show_bytes(summary['allreduce_wire_bytes'])})"
    return f"{summary['recipe']}: {islands}, {summary['steps']:,} steps, {sent}"


def _save(figure: Figure, out: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    write_whole(out, drawn.getvalue())
