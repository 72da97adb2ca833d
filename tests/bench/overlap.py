"""Does the link cost time? Tokens/s of the default recipe beside ``local``, with and without delay, at three link
rates.

    python -m tests.bench.overlap                 (about 20 minutes on 2 cores; goes on where it was stopped)

The recipes are interleaved and medians are taken, because CPU timings drift. rtt is zero here, so that a round
without delay should take just wire bytes x 8 / rate. An island waits for a slower one too; what the link alone costs
is the time from when the last island comes to a round until the last island has it."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from dtrain import metrics, units
from dtrain.recipes import DEFAULT_RECIPE
from tests.bench.runs import ROOT, arguments, hardware, run_job, save

RATES = ("100mbit", "10mbit", "1mbit")
REPEATS = 5
STEPS = 450
FOLDER = ROOT / "runs" / "overlap"
COMMON = (f"train.steps={STEPS}", "link.rtt=0ms", "train.checkpoint_every=0", "train.eval_every=0")
VARIANTS = {
    "local": ["sync.recipe=local"],
    "overlapped": [f"sync.recipe={DEFAULT_RECIPE}"],
    "waiting": [f"sync.recipe={DEFAULT_RECIPE}", "sync.delay=0"],
}


def main() -> None:
    rows = []
    for rate in RATES:
        runs: dict[str, list[tuple[dict[str, Any], float]]] = {name: [] for name in VARIANTS}
        for repeat in range(REPEATS):
            for name, overrides in VARIANTS.items():
                folder = f"{name}-{rate}-{repeat}"
                summary = run_job(FOLDER, folder, [*overrides, *COMMON, f"link.rate={rate}"])
                runs[name].append((summary, link_wait_s(FOLDER / folder)))
        rows.append(_row(rate, runs))
    path = save(
        "overlap", {"command": "python -m tests.bench.overlap", "hardware": hardware(), "steps": STEPS, "rows": rows}
    )
    print(
        "| link | local, tokens/s | overlapped | of local | waiting (delay 0) | wait, delay 0 | bytes x 8 / rate | wait hidden |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['rate']} | {r['local']:.0f} | {r['overlapped']:.0f} | {r['of_local']:.1%} | {r['waiting']:.0f} | "
            f"{r['waited_s']:.2f} s, {r['waited_share']:.0%} | {r['wire_s']:.2f} s | {r['hidden']:.0%} |"
        )
    print(f"written to {path.relative_to(ROOT)}")


def link_wait_s(run: Path) -> float:
    """Over all steps: from when the last island began to wait until the last one ended. A step's ``time_s`` is taken right
    behind its wait, and the islands' clocks start together, when their weights have been compared."""
    ended: dict[int, list[float]] = {}
    began: dict[int, list[float]] = {}
    waited: dict[int, float] = {}
    for line in metrics.newest(metrics.read(run / "metrics.jsonl")):
        wait_s = line["wait_s"] - waited.get(line["island"], 0.0)
        waited[line["island"]] = line["wait_s"]
        ended.setdefault(line["step"], []).append(line["time_s"])
        began.setdefault(line["step"], []).append(line["time_s"] - wait_s)
    return sum(max(ended[step]) - max(began[step]) for step in ended)


def _row(rate: str, runs: dict[str, list[tuple[dict[str, Any], float]]]) -> dict[str, Any]:
    speed = {name: median(s["tokens_per_s"] for s, _ in of) for name, of in runs.items()}
    waited_s = median(wait for _, wait in runs["waiting"])
    flown_s = median(wait for _, wait in runs["overlapped"])
    bits_per_s = units.bits_per_s(rate)
    assert bits_per_s is not None
    return {
        "rate": rate,
        **speed,
        "of_local": median(
            o["tokens_per_s"] / b["tokens_per_s"]
            for (o, _), (b, _) in zip(runs["overlapped"], runs["local"], strict=True)
        ),
        "waited_s": waited_s,
        "waited_share": waited_s / median(s["train_s"] for s, _ in runs["waiting"]),
        "wire_s": runs["waiting"][0][0]["wire_bytes_sent"] * 8 / bits_per_s,
        "overlapped_wait_s": flown_s,
        "hidden": 1 - flown_s / waited_s,
    }


if __name__ == "__main__":
    arguments(__doc__)
    main()
