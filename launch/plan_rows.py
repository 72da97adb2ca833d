"""What does ``dtrain plan`` find out, and what does it say and write of that?"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dtrain import metrics, units
from dtrain.config import Job
from dtrain.plan.candidates import candidates
from dtrain.plan.ends import Ends, ends
from dtrain.plan.order import FEWEST_ROUNDS, rank
from dtrain.plan.plans import Planner, Row, Setting, adapting, as_json, factors, jitter_line, said, speed_text, topology_lines
from dtrain.plan.sent import model_flat
from dtrain.plan.unequal import unequal_lines
from dtrain.plan.verdict import Verdict, enough_rounds, verdict
from dtrain.recipes import Recipe, of_section

_FIRST_S, _LATER_S = 3.0, 10.0
"""How long nothing is said, at first and then."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One number of islands."""

    num_islands: int
    asked: Row
    rows: list[Row]
    """By speed."""
    verdict: Verdict
    setting: Setting
    ends: Ends
    steps: int
    lines: list[str]

    @property
    def best(self) -> Row:
        return self.verdict.best

    @property
    def chosen(self) -> Row | None:
        """None where no recipe should be taken."""
        return self.best if self.verdict.taken else None

    def fits(self, row: Row) -> bool:
        return self.setting.fits(row.memory.total)


def planned(setting: Setting, job: Job, num_islands: int) -> Planned:
    """Raises ValueError where the job's own recipe does not fit so many islands."""
    asked, steps = of_section(job.sync.model_dump(exclude_none=True), num_islands), job.train.steps
    planner = Planner(setting)
    # Refused before all is reckoned where patterns match nothing; stages share all that they have.
    shared = None if setting.stages else model_flat(setting.shapes, torch.device("meta"), asked).numel
    looked_at = candidates(
        asked, num_islands, per_host=setting.per_host, sam_rho=setting.sam_rho, steps=steps, shapes=setting.shapes,
        optimizer=setting.optimizer, num_ranks=setting.num_ranks, moments_every=setting.moments_every,
    )
    rows = [planner.row(recipe, num_islands) for recipe in _told(looked_at, num_islands)]
    found = verdict(planner, rows, steps)
    jitter_s = setting.island("identity").jitter_s
    lines = [*factors(planner, found.best), *topology_lines(rows, found.best)] if found.taken else []
    lines += [jitter_line(rows, found.best, jitter_s)] if jitter_s else []
    lines += unequal_lines(rows, found.best, setting)
    return Planned(num_islands, rows[0], rank(rows), found, setting, ends(setting, num_islands, shared), steps, lines)


def _told(recipes: Sequence[Recipe], num_islands: int) -> Iterator[Recipe]:
    """Says on stderr how far they are, where that takes longer than some seconds."""
    due_s = time.monotonic() + _FIRST_S
    for count, recipe in enumerate(recipes):
        if time.monotonic() > due_s:
            print(f"{num_islands} islands: {count} of {len(recipes)} variants reckoned", file=sys.stderr, flush=True)
            due_s = time.monotonic() + _LATER_S
        yield recipe


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


def as_sentences(plan: Planned) -> list[str]:
    n, asked = plan.num_islands, plan.asked
    own = f"{n} islands, the job's {said(asked.recipe)}: {speed_text(asked.tokens_per_s)} tokens/s"
    if not enough_rounds(asked, plan.steps):
        own += f"; {plan.steps} steps have fewer than the {FEWEST_ROUNDS} rounds that an outer loop needs to come into its own"
    how = [adapting(asked.recipe)] if asked.recipe.every_adapts else []
    return [own, *how, *plan.lines, _ends_line(plan), plan.verdict.why]


def _ends_line(plan: Planned) -> str:
    found = plan.ends
    run = ""
    if plan.chosen is not None:
        run = f": {units.show_seconds(plan.steps * plan.chosen.time.step_s)} with {plan.chosen.recipe.name}"
    return (
        f"{plan.num_islands} islands, {plan.steps} steps{run}; besides, {units.show_seconds(found.start_s)} at the start, whose "
        f"islands are equal, and {units.show_seconds(found.merge_s)} for the exact merge at the end, "
        f"{units.show_bytes(found.merge_bytes)} an island"
    )


def check_json(path: Path) -> None:
    """Raises ValueError where ``write_json`` could not write; asks before the long work, and leaves nothing there."""
    folder = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder; name a file, as {path / 'plan.json'}")
    if not folder.is_dir():
        raise ValueError(f"--json {path}: there is no folder {folder}; make it first, or name another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ValueError(f"--json {path}: no file can be made in {folder} ({e.strerror or e}); name another folder") from None


def write_json(path: Path, plans: Sequence[Planned], notes: Sequence[str]) -> None:
    metrics.write_json(path, {"from": list(notes), "plans": [_plan_json(plan) for plan in plans]})


def _plan_json(plan: Planned) -> Mapping[str, object]:
    rows = {id(row): {**as_json(row), "fits": plan.fits(row)} for row in plan.rows}
    return {
        "islands": plan.num_islands,
        "recommended": None if plan.chosen is None else rows[id(plan.chosen)],
        "why": plan.verdict.why,
        "steps": plan.steps,
        "start_s": plan.ends.start_s,
        "merge_s": plan.ends.merge_s,
        "merge_bytes": plan.ends.merge_bytes,
        "rows": list(rows.values()),
    }
