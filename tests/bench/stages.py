"""What does each part of DiLoCoX buy? Two islands of two pipeline stages on slow links, with and without each part.

    python -m tests.bench.stages                  (about 20 minutes on 2 cores; goes on where it was stopped)
    python -m tests.bench.stages 1mbit            (this link only)
    python -m tests.bench.stages --quick          (does it run? dilocox and all-reduce for some steps; the numbers say nothing)

Each stage talks to the same stage of the other island, and the two share their island's uplink. H is that of the ``dilocox``
which ``dtrain plan`` would take for this job and link. In front of every run is one of ``local``, which never talks, as CPU
timings drift: a share of local's speed is that of its own pair. Tokens/s are the median over windows, from the step at which a
round lands to that at which the next one does, and waiting and bytes are of the same steps: the last rounds, by when ranks and H
have adapted. What is not compressed has no ranks to adapt: hold no-compression against no-adaptation. rtt is zero, so that the
link is its rate."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from dtrain import metrics
from dtrain.launch.checks import read_job
from dtrain.launch.plan_job import Said, setting_of
from dtrain.plan.candidates import candidates
from dtrain.plan.order import recommend
from dtrain.plan.plans import Planner
from dtrain.recipes import RECIPES, of_section
from tests.bench.runs import JOB, ROOT, hardware, run_job, save

RATES = ("10mbit", "1mbit")
ISLANDS, STAGES = 2, 2
FOLDER = ROOT / "runs" / "stages"
COMMON = (
    *(f"islands.count={ISLANDS}", f"islands.ranks={STAGES}", "islands.engine=pipeline", "islands.threads=1"),
    *("model.layers=4", "model.width=72", "model.heads=4", "train.batch=4", f"train.accumulate={STAGES}"),
    *("link.rtt=0ms", "train.checkpoint_every=0", "train.eval_every=0"),
)
"""286 thousand parameters, 143 thousand a stage."""
ROUNDS, COUNTED = 9, 3
"""Of a run, and the last ones, which are counted: the ranks of a sixth round and later ones have adapted."""
GRADIENT_STEPS, GRADIENT_COUNTED = 8, 6
"""All-reduce's; a step of it is a window."""
QUICK_EVERY, QUICK = 2, ("dilocox", "all-reduce")


@dataclass(frozen=True, slots=True)
class Variant:
    said: str
    sync: tuple[str, ...]
    """Where ``{}`` is H."""


_DILOCOX, _RANK = "sync.recipe=dilocox", RECIPES["dilocox"].rank
_ADAPTS = (_DILOCOX, f"sync.rank=adaptive:{_RANK}", "sync.every=adaptive:{}")
_PLAIN = ("sync.reduce=all_to_all", "sync.codec=identity", "sync.error_feedback=false")
ALL_REDUCE = "all-reduce"
VARIANTS = {
    "dilocox": Variant("whole, 4-bit products, rank and H adapt", _ADAPTS),
    "no-overlap": Variant("its rounds are waited for", (*_ADAPTS, "sync.delay=0", "sync.landing=keep")),
    "no-compression": Variant("its rounds are fp32, so that H stays", (_DILOCOX, *_PLAIN, "sync.every={}")),
    "no-adaptation": Variant("its rank and H stay", (_DILOCOX, f"sync.rank={_RANK}", "sync.every={}")),
    ALL_REDUCE: Variant("fp32 gradients every step", ("sync.recipe=allreduce",)),
}

Lines = dict[int, list[dict[str, Any]]]
"""Of each island, by step."""


def main(rates: list[str], *, quick: bool) -> None:
    links = [_link(rate, QUICK_EVERY if quick else planned_every(rate), quick=quick) for rate in rates]
    for link in links:
        print(f"{link['rate']}, H = {link['every']}")
        print("| variant | tokens/s | of local | waited | kB an island a step | times all-reduce | H at the end |")
        print("|---|---|---|---|---|---|---|")
        alone, gain = link["local_tokens_per_s"], link["local_gain"]
        print(f"| local: islands never talk | {alone:,.0f} | 100.0% | 0.0% | 0 | {gain:.3g} | - |")
        for r in link["rows"]:
            print(
                f"| {r['variant']}: {r['said']} | {r['tokens_per_s']:,.0f} | {r['of_local']:.1%} | {r['waited']:.1%} | "
                f"{r['bytes_per_step'] / 1e3:,.2f} | {r['gain']:.3g} | {r['last_every'] or '-'} |"
            )
    if not quick:
        content = {"command": "python -m tests.bench.stages", "hardware": hardware(), "job": list(COMMON), "links": links}
        print(f"written to {save('stages', content).relative_to(ROOT)}")


def planned_every(rate: str) -> int:
    """H of the ``dilocox`` that ``dtrain plan`` would take, were there no other recipe."""
    overrides = [*COMMON, _DILOCOX, f"link.rate={rate}"]
    job = read_job(JOB, overrides)
    setting, _ = setting_of(JOB, overrides, job, Said(), Console(stderr=True))
    asked, planner = of_section(job.sync.model_dump(exclude_none=True), ISLANDS), Planner(setting)
    looked_at = candidates(asked, ISLANDS, shapes=setting.shapes, num_ranks=STAGES)
    same = [planner.row(r, ISLANDS) for r in looked_at if (r.name, r.codec) == (asked.name, asked.codec)]
    return recommend(same).recipe.every


def _link(rate: str, every: int, *, quick: bool) -> dict[str, Any]:
    rows = []
    for name, variant in VARIANTS.items():
        if quick and name not in QUICK:
            continue
        local, _ = _run(f"local-{name}-{rate}-{every}", ["sync.recipe=local"], rate, 2 * every, quick=quick)
        local_speed = counted(local, lambda of: spread(of, every)).tokens_per_s
        rounds, steps = (GRADIENT_COUNTED, GRADIENT_STEPS) if name == ALL_REDUCE else (COUNTED, ROUNDS * every)
        sync = [text.format(every) for text in variant.sync]
        lines, summary = _run(f"{name}-{rate}-{every}", sync, rate, steps, quick=quick)
        found = counted(lines, lambda of, rounds=rounds: landed(of)[-rounds - 1 :])
        rows.append(
            {
                "variant": name,
                "said": variant.said,
                "parameters": summary["parameters"],
                "steps": steps,
                "tokens_per_s": found.tokens_per_s,
                "local_tokens_per_s": local_speed,
                "of_local": found.tokens_per_s / local_speed,
                "waited": found.waited,
                "bytes_per_step": found.bytes_per_step,
                "last_every": None if name == ALL_REDUCE else found.last_window,
            }
        )
    (slowest,) = (row["tokens_per_s"] for row in rows if row["variant"] == ALL_REDUCE)
    alone = median(row["local_tokens_per_s"] for row in rows)
    gains = [{**row, "gain": row["tokens_per_s"] / slowest} for row in rows]
    return {"rate": rate, "every": every, "local_tokens_per_s": alone, "local_gain": alone / slowest, "rows": gains}


def _run(name: str, sync: Sequence[str], rate: str, steps: int, *, quick: bool) -> tuple[Lines, dict[str, Any]]:
    folder = FOLDER.with_name(f"{FOLDER.name}-quick") if quick else FOLDER
    summary = run_job(folder, name, [*COMMON, *sync, f"link.rate={rate}", f"train.steps={steps}"])
    return lines_of(folder / name), summary


def lines_of(run: Path) -> Lines:
    found: Lines = {}
    for line in metrics.newest(metrics.read(run / "metrics.jsonl")):
        found.setdefault(line["island"], []).append(line)
    return {island: sorted(lines, key=lambda line: line["step"]) for island, lines in found.items()}


@dataclass(frozen=True, slots=True)
class Counted:
    tokens_per_s: float
    """Of all islands: of each the median over its windows."""
    waited: float
    """What part of the windows an island waited."""
    bytes_per_step: float
    """That an island sent."""
    last_window: int
    """Steps."""


def counted(lines: Lines, ends_of: Callable[[list[dict[str, Any]]], list[int]]) -> Counted:
    """``ends_of``: where in an island's lines a window ends and the next begins."""
    rates, waits, sent, last = [], [], [], []
    for of in lines.values():
        ends = [of[at] for at in ends_of(of)]
        spans = [(b["step"] - a["step"], b["time_s"] - a["time_s"]) for a, b in pairwise(ends)]
        rates.append(median(steps * ends[0]["tokens"] / time_s for steps, time_s in spans))
        waits.append((ends[-1]["wait_s"] - ends[0]["wait_s"]) / sum(time_s for _, time_s in spans))
        sent.append((ends[-1]["wire_bytes_sent"] - ends[0]["wire_bytes_sent"]) / sum(steps for steps, _ in spans))
        last.append(spans[-1][0])
    return Counted(sum(rates), mean(waits), mean(sent), last[0])


def landed(of: list[dict[str, Any]]) -> list[int]:
    """Where rounds landed: their bytes are counted there."""
    return [at for at in range(1, len(of)) if of[at]["wire_bytes_sent"] > of[at - 1]["wire_bytes_sent"]]


def spread(of: list[dict[str, Any]], steps: int) -> list[int]:
    """Of an island without rounds: five windows, or as many as it has steps, of the last so many steps."""
    window = max(1, steps // 5)
    return list(range(len(of) - 1, len(of) - 2 - steps, -window))[::-1]


def _asked() -> tuple[list[str], bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rates", nargs="*", metavar="RATE", help=f"of {', '.join(RATES)}; left out: all")
    parser.add_argument("--quick", action="store_true", help="some steps of two variants; no result is written")
    asked = parser.parse_args()
    if unknown := [rate for rate in asked.rates if rate not in RATES]:
        parser.error(f"{unknown[0]} is no rate that is measured; use {', '.join(RATES)}")
    return asked.rates or list(RATES[:1] if asked.quick else RATES), asked.quick


if __name__ == "__main__":
    rates, quick = _asked()
    main(rates, quick=quick)
