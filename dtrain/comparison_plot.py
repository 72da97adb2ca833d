"""How do recipes look side by side? Bits a byte against the bytes that an island sent, a point for each entry and budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dtrain.comparison import BASELINE, Row, points

# Okabe and Ito's colours, which the colour-blind tell apart, and a shape for each turn through them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X")
_NOTHING_SENT_BYTES = 1e4
"""Where an entry is drawn that sends nothing: the axis is logarithmic."""


def plot_rows(rows: Sequence[Row], entries: Sequence[str], out: Path, baseline: str = BASELINE) -> None:
    """Write a PNG of 1500 x 900 pixels; seeds are points, and their mean a line from budget to budget, without those
    budgets at which a seed did not end finite; the legend says how many did not."""
    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, entry in enumerate(entries):
        ours = [row for row in rows if row.entry == entry]
        finite = [row for row in ours if row.bits_per_byte is not None]
        if not ours:
            continue
        colour, shape = _COLOURS[index % len(_COLOURS)], _SHAPES[index // len(_COLOURS) % len(_SHAPES)]
        x, y = [_drawn_at(row.sent_bytes) for row in finite], [row.bits_per_byte or 0.0 for row in finite]
        axes.scatter(x, y, s=12, color=colour, alpha=0.4)
        means = points(ours)
        x, y = [_drawn_at(sent_bytes) for sent_bytes, _ in means], [bits for _, bits in means]
        label = entry if len(finite) == len(ours) else f"{entry}: {len(ours) - len(finite)} of {len(ours)} not finite"
        axes.plot(x, y, marker=shape, color=colour, lw=1, ms=8 if entry == baseline else 6, label=label)
    axes.set_xscale("log")
    axes.set_xlabel(f"bytes an island sent (at {_NOTHING_SENT_BYTES:g}: nothing)")
    axes.set_ylabel("bits a byte of the merged model, on text it never saw")
    axes.grid(visible=True, color="#E3E3E3", lw=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(out)


def _drawn_at(sent_bytes: float) -> float:
    return max(sent_bytes, _NOTHING_SENT_BYTES)
