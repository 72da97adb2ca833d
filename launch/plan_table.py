"""How do the rows of ``dtrain plan`` become lines that a terminal does not break, and that a pipe can read?"""

from __future__ import annotations

from collections.abc import Sequence

from dtrain import units
from dtrain.launch.plan_rows import Planned
from dtrain.plan.order import recommend
from dtrain.plan.plans import Row, baseline, speed_text, time_text, where
from dtrain.recipes import RECIPES, Recipe

COLUMNS: tuple[str, ...] = (
    *("recipe", "topology", "codec", "H/delay", "step", "waits", "sent/step", "memory", "tokens/s", "lambda2"),
)
_LESSER = ("lambda2", "memory", "sent/step", "topology")
"""Left out in this order where a terminal is too narrow; a pipe gets all."""
_LEFT = ("recipe", "topology", "codec")
MARKS = {"*": "take this", "=": "the job's", "!": "too large for the GPU"}


def table_lines(plan: Planned, width: int | None, *, show_all: bool) -> list[str]:
    """A header and a line for each row of ``shown``, none longer than ``width``, where all columns but the lesser ones fit."""
    cells = [dict(zip(COLUMNS, _cells(row, plan), strict=True)) for row in shown(plan, show_all=show_all)]
    wide = {name: max(len(name), *(len(row[name]) for row in cells)) for name in COLUMNS}
    left_out = 0
    while width is not None and left_out < len(_LESSER) and _total(wide) > width:
        del wide[_LESSER[left_out]]
        left_out += 1
    lines = [_line({name: name for name in COLUMNS}, wide), *(_line(row, wide) for row in cells)]
    used = [f"{mark} {said}" for mark, said in MARKS.items() if any(mark in row["recipe"].split()[0] for row in cells)]
    used += ["memory +: the host's, not checked"] if any("+" in row["memory"] for row in cells) and "memory" in wide else []
    legend = ", ".join(used)
    hidden = f"{', '.join(_LESSER[:left_out])}: in a wider terminal, or a pipe" if left_out else ""
    return [*lines, *(text for text in (legend, hidden) if text)]


def foot(plans: Sequence[Planned], *, show_all: bool) -> list[str]:
    """What the rows of all tables are, their less plain columns, and whom to look for in vain."""
    rows = "" if show_all else "each row is the variant of its recipe that does best here; --all prints all"
    columns = (
        "H/delay: steps from round to round, and how many of them one may fly; memory: a rank's; lambda2: what a round leaves of "
        "the islands' disagreement, 0 nothing and 1 all of it"
    )
    looked_at = {row.recipe.name for plan in plans for row in plan.rows}
    absent = [name for name in RECIPES if name not in looked_at]
    hint = " (muloco is, with train.optimizer=muon)" if "muloco" in absent else ""
    why = "only simulated, of rounds at uneven distances, or not for a job as this one"
    return [*([rows] if rows else []), columns, *([f"not looked at: {', '.join(absent)}: {why}{hint}"] if absent else [])]


def shown(plan: Planned, *, show_all: bool) -> list[Row]:
    """Of each recipe the variant that would be recommended of it alone, all-reduce as it is, what the job asks for, and what is
    recommended."""
    of: dict[str, list[Row]] = {}
    for row in plan.rows:
        of.setdefault(row.recipe.name, []).append(row)
    some = [*(recommend(_fitting(rows, plan)) for rows in of.values()), plan.asked, plan.best, baseline(plan.rows)]
    return [row for row in plan.rows if show_all or any(row is one for one in some)]


def _fitting(rows: Sequence[Row], plan: Planned) -> Sequence[Row]:
    return [row for row in rows if plan.fits(row)] or rows


def _total(wide: dict[str, int]) -> int:
    return sum(wide.values()) + len(wide) - 1


def _line(row: dict[str, str], wide: dict[str, int]) -> str:
    return " ".join(f"{row[name]:<{w}}" if name in _LEFT else f"{row[name]:>{w}}" for name, w in wide.items()).rstrip()


def _path(r: Recipe) -> str:
    if r.reduce == "neighbours":
        return where(r)
    return r.reduce if r.reduce != "low_rank" else f"{r.reduce}:{r.rank}"


def _memory(row: Row) -> str:
    """``12.3GB``, or with what lies in the host's beside it ``8.2GB+4.1GB``."""
    parts = [row.memory.total] if not row.memory.host else [row.memory.total, row.memory.host]
    return "+".join(units.show_bytes(part).replace(" ", "") for part in parts)


def _cells(row: Row, plan: Planned) -> list[str]:
    r = row.recipe
    talks = r.payload != "none"
    marks = ("*" if row is plan.chosen else "") + ("=" if row is plan.asked else "") + ("" if plan.fits(row) else "!")
    return [
        f"{marks or '-'} {r.name}",
        _path(r) if talks else "-",
        r.codec if talks else "-",
        f"{r.every}/{r.delay_steps}" if talks else "-",
        time_text(row.time.step_s).replace(" ", ""),
        f"{row.time.waits:.1%}",
        units.show_bytes(row.bytes_per_step).replace(" ", ""),
        _memory(row),
        speed_text(row.tokens_per_s),
        "-" if row.lambda2 is None else f"{row.lambda2:.3f}",
    ]
