"""What can a person type after ``dtrain topology``?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from dtrain.launch.tables import check_picture, table


def topology(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="left out: a list of them", show_default=False)] = None,
    num_islands: Annotated[int, typer.Option("--islands", help="how many", min=1)] = 8,
    graph: Annotated[str | None, typer.Option("--graph", metavar="GRAPH", help="sync.graph, where there is one")] = None,
    server: Annotated[str | None, typer.Option("--server", metavar="SERVER", help="sync.server, with its rounds")] = None,
    codec: Annotated[str, typer.Option("--codec", help="of a wire")] = "identity",
    numel: Annotated[int, typer.Option("--numel", help="parameters of the model", min=1)] = 1_000_000,
    seed: Annotated[int, typer.Option("--seed", help="of graphs and rounds that are drawn")] = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.png", help="draw it")] = None,
) -> None:
    """Show how quickly a topology brings islands together.

    And what a round costs, and whom each island talks to.

    Example: dtrain topology coloured --graph barabasi_albert:3 --islands 16
    """
    from dtrain.launch.topology_rows import MOST_ISLANDS, drawing, listed, rows

    if out is not None:
        check_picture(out)
    if name is None:
        Console().print(table(["topology", "what it is"], listed()))
        return
    from dtrain.bucket import Layout, Span
    from dtrain.codec import by_name
    from dtrain.own_topology import check_topology, mixing_of
    from dtrain.wire import HEADER_BYTES

    if num_islands > MOST_ISLANDS:
        raise ValueError(f"--islands {num_islands}: its matrix takes too long to look at; use at most {MOST_ISLANDS}")
    check_topology(name, graph, num_islands, seed, server)
    mixed = mixing_of(name, graph, seed, server)
    layout = Layout((Span("x", (numel,), 0, 0, numel),))
    wire_bytes = by_name(codec, error_feedback=False).bind(layout).wire_bytes - HEADER_BYTES
    wire = f"{numel:,} parameters as {codec}"
    console = Console()
    console.print(table(["", "", "what this means"], rows(mixed, num_islands, wire_bytes=wire_bytes, wire=wire)))
    console.print()
    for line in drawing(mixed, num_islands):
        console.print(Text(line), soft_wrap=True)
    if out is not None:
        from dtrain.topology_plot import plot_topology

        plot_topology(mixed, num_islands, f"{name}{f', {graph}' if graph else ''}: {num_islands} islands", out)
        console.print(Text(f"drawn: {out}"), soft_wrap=True)
