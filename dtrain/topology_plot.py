"""What does a topology look like? Islands on a circle, and an arrow or a line for whom each talks to in any round of a period."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import networkx as nx

from dtrain.topology import Mixing
from dtrain.topology.consensus import edges


def plot_topology(mixing: Mixing, num_islands: int, title: str, out: Path) -> None:
    """Write a PNG of 1000 x 1000 pixels."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    graph: nx.Graph[int] | nx.DiGraph[int] = edges(mixing, num_islands)
    if all(graph.has_edge(b, a) for a, b in graph.edges):
        graph = graph.to_undirected()
    figure, axes = pyplot.subplots(figsize=(10, 10), dpi=100)
    size = min(600.0, 12000 / num_islands)
    nx.draw_networkx(
        *(graph, nx.circular_layout(graph)),
        ax=axes,
        node_size=size,
        with_labels=num_islands <= 64,
        node_color="#cfe3f5",
        edgecolors="#1f4e79",
        edge_color="#7f7f7f",
        font_size=max(6, min(14, round(300 / num_islands))),
    )
    axes.set_title(title)
    axes.set_axis_off()
    figure.savefig(out)
    pyplot.close(figure)
