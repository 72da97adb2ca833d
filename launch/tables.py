"""How are a command's rows printed, and may its picture be written where it was asked for?"""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text


def check_picture(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: pictures are drawn as PNG; name a file that ends in .png")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first, or name another")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it")


def table(header: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
