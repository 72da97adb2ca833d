"""What does ``dtrain plan`` print and write?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain import metrics, units
from dtrain.config import Job
from dtrain.plan.candidates import candidates
from dtrain.plan.plans import (
    Planner,
    Row,
    Setting,
    as_json,
    baseline,
    factors,
    jitter_line,
    rank,
    reason,
    recommend,
    said,
    topology_lines,
    where,
)
from dtrain.plan.unequal import unequal_lines
from dtrain.recipes import of_section


@dataclass(frozen=True, slots=True)
class Planned:
    """One number of islands."""

    num_islands: int
    asked: Row
    rows: list[Row]
    """By speed."""
    chosen: Row
    lines: list[str]


def planned(setting: Setting, job: Job, num_islands: int) -> Planned:
    """Raises ValueError where the job's own recipe does not fit so many islands."""
    asked = of_section(job.sync.model_dump(exclude_none=True), num_islands)
    planner = Planner(setting)
    looked_at = candidates(asked, num_islands, per_host=setting.per_host, sam_rho=setting.sam_rho)
    rows = [planner.row(recipe, num_islands) for recipe in looked_at]
    chosen = recommend(rows)
    jitter_s = setting.island("identity").jitter_s
    lines = [*factors(planner, chosen), *topology_lines(rows, chosen)]
    lines += [jitter_line(rows, chosen, jitter_s)] if jitter_s else []
    lines += unequal_lines(rows, chosen, setting)
    return Planned(num_islands, rows[0], rank(rows), chosen, lines)


def other_sizes(sizes: Sequence[int], own: int, *, measured: bool) -> list[str]:
    """A line where a step was measured with another number of islands than is planned for."""
    others = [size for size in sizes if size != own]
    if not measured or not others:
        return []
    line = (
        f"{', '.join(map(str, others))} islands are taken to step as fast as the {own} that were measured on this machine, as if "
        "each had hardware of its own; --step-time says otherwise"
    )
    return [line]


def table_rows(plan: Planned, *, show_all: bool) -> list[list[str]]:
    """Of each recipe the variant that would be recommended of it alone, all-reduce as it is, what the job asks for, and what is
    recommended."""
    of: dict[str, list[Row]] = {}
    for row in plan.rows:
        of.setdefault(row.recipe.name, []).append(row)
    shown = [*(recommend(rows) for rows in of.values()), plan.asked, plan.chosen, baseline(plan.rows)]
    return [_cells(row, _mark(row, plan)) for row in plan.rows if show_all or any(row is one for one in shown)]


def _mark(row: Row, plan: Planned) -> str:
    return " <- take this" if row is plan.chosen else " (the job's)" if row is plan.asked else ""


def _cells(row: Row, mark: str) -> list[str]:
    r = row.recipe
    talks = r.payload != "none"
    return [
        r.name + mark,
        where(r) if r.reduce == "neighbours" else r.reduce if talks else "-",
        r.codec if talks else "-",
        f"{r.every}/{r.delay_steps}" if talks else "-",
        f"{row.time.step_s * 1e3:.4g}",
        f"{row.time.waits:.1%}",
        f"{row.bytes_per_step / 1e6:.3g}",
        units.show_bytes(row.memory.total),
        f"{row.tokens_per_s:,.0f}",
        "-" if row.lambda2 is None else f"{row.lambda2:.3f}",
    ]


def as_sentences(plan: Planned) -> list[str]:
    own = f"{plan.num_islands} islands, the job's {said(plan.asked.recipe)}: {plan.asked.tokens_per_s:,.0f} tokens/s"
    return [own, *plan.lines, reason(plan.chosen, plan.rows)]


def write_json(path: Path, plans: Sequence[Planned], notes: Sequence[str]) -> None:
    content = [
        {"islands": p.num_islands, "recommended": as_json(p.chosen), "rows": [as_json(row) for row in p.rows]} for p in plans
    ]
    metrics.write_json(path, {"from": list(notes), "plans": content})
