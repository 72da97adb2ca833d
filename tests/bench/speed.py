"""Does ``dtrain plan`` say how long a step takes? Measured beside predicted, four islands of the quickstart on throttled links.

    python -m tests.bench.speed                   (about 20 minutes on 2 cores; goes on where it was stopped)
    python -m tests.bench.speed 10mbit 1gbit      (these links only)

For each link the planner first measures a step and the link, as ``dtrain plan`` does; then each recipe runs for as many
steps as fit into a minute. A step's time is the median over steps and islands, after the first ones. rtt is zero, so that the
link is its rate."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from dtrain import metrics
from dtrain.launch.checks import read_job
from dtrain.launch.plan_job import Said, setting_of
from dtrain.plan.plans import Planner, Row
from dtrain.recipes import resolve
from tests.bench.runs import JOB, ROOT, arguments, hardware, run_job, save

RATES = ("1mbit", "10mbit", "100mbit", "1gbit")
RECIPES: dict[str, tuple[str, dict[str, object]]] = {
    "all-reduce fp32": ("allreduce", {}),
    "dpsgd fp32": ("dpsgd", {}),
    "choco int8": ("choco", {}),
    "dpsgd int8": ("dpsgd", {"codec": "int8:64"}),
}
ISLANDS = 4
FOLDER = ROOT / "runs" / "speed"
COMMON = (f"islands.count={ISLANDS}", "link.rtt=0ms", "train.checkpoint_every=0", "train.eval_every=0")
_CELL_S, _FEWEST, _MOST, _WARM = 50.0, 10, 200, 4
"""Seconds of a cell, steps of it, and those at its start that are not counted."""
NOISE = 0.1
"""A recipe that is slower than the fastest by no more than this is as fast: two runs of one cell differ by so much."""


def main(rates: list[str]) -> None:
    cells = [cell for rate in rates for cell in _link(rate)]
    verdicts = [_verdict(rate, [c for c in cells if c["rate"] == rate]) for rate in rates]
    within = sum(abs(c["error"]) <= 0.15 for c in cells)
    content = {
        "command": "python -m tests.bench.speed",
        "hardware": hardware(),
        "islands": ISLANDS,
        "within_15_percent": within,
        "fastest": verdicts,
        "cells": cells,
    }
    path = save("speed", content)
    print("| link | recipe | measured, ms a step | predicted | error | waited | predicted |\n|---|---|---|---|---|---|---|")
    for c in cells:
        print(
            f"| {c['rate']} | {c['recipe']} | {c['measured_ms']:.1f} | {c['predicted_ms']:.1f} | {c['error']:+.1%} | "
            f"{c['waited_ms']:.1f} | {c['predicted_waits_ms']:.1f} |"
        )
    print(f"{within} of {len(cells)} within 15 %")
    for v in verdicts:
        print(f"{v['rate']}: predicted fastest {v['predicted']}, measured {v['measured']}: {'right' if v['right'] else 'WRONG'}")
    print(f"written to {path.relative_to(ROOT)}")


def _link(rate: str) -> list[dict[str, Any]]:
    planned = _planned(rate)
    cells = []
    for name, (recipe, overrides) in RECIPES.items():
        row = planned[name]
        steps = _WARM + min(_MOST, max(_FEWEST, round(_CELL_S / row["step_s"])))
        folder = f"{name.replace(' ', '-')}-{rate}"
        axes = [f"sync.{key}={value}" for key, value in overrides.items()]
        run_job(FOLDER, folder, [*COMMON, f"sync.recipe={recipe}", *axes, f"link.rate={rate}", f"train.steps={steps}"])
        step_ms, waited_ms = _measured(FOLDER / folder)
        predicted_ms = row["step_s"] * 1e3
        cells.append(
            {
                "rate": rate,
                "recipe": name,
                "steps": steps,
                "measured_ms": step_ms,
                "predicted_ms": predicted_ms,
                "error": predicted_ms / step_ms - 1,
                "waited_ms": waited_ms,
                "predicted_waits_ms": (row["link_s"] + row["late_s"]) * 1e3,
                "predicted_work_ms": row["work_s"] * 1e3,
                "planned_from": planned["from"],
            }
        )
    return cells


def _planned(rate: str) -> dict[str, Any]:
    """The planner's rows, kept beside the runs: a machine that was measured again in the middle would not be the same."""
    kept = FOLDER / f"plan-{rate}.json"
    if not kept.exists():
        overrides = [*COMMON, f"link.rate={rate}"]
        setting, notes = setting_of(JOB, overrides, read_job(JOB, overrides), Said(), Console(stderr=True))
        planner = Planner(setting)
        rows: dict[str, Row] = {
            name: planner.row(resolve(recipe, axes, ISLANDS), ISLANDS) for name, (recipe, axes) in RECIPES.items()
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        content = {"from": notes, **{name: asdict(row.time) for name, row in rows.items()}}
        kept.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def _measured(run: Path) -> tuple[float, float]:
    """Milliseconds of a step, and of its waiting."""
    by_island: dict[int, list[tuple[int, float, float]]] = {}
    for line in metrics.newest(metrics.read(run / "metrics.jsonl")):
        by_island.setdefault(line["island"], []).append((line["step"], line["time_s"], line["wait_s"]))
    steps, waits = [], []
    for lines in by_island.values():
        later = sorted(lines)[_WARM - 1 :]
        steps += [b[1] - a[1] for a, b in pairwise(later)]
        waits += [b[2] - a[2] for a, b in pairwise(later)]
    return median(steps) * 1e3, median(waits) * 1e3


def _verdict(rate: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    named = min(cells, key=lambda c: c["predicted_ms"])
    fastest = min(cells, key=lambda c: c["measured_ms"])
    right = named["measured_ms"] <= fastest["measured_ms"] * (1 + NOISE)
    return {"rate": rate, "predicted": named["recipe"], "measured": fastest["recipe"], "right": right}


if __name__ == "__main__":
    main(arguments(__doc__, RATES))
