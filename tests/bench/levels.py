"""Two levels of rounds beside all-reduce: how good is the model, and what does each link carry?

    python -m tests.bench.levels                  (about 25 minutes of one core; goes on where it was stopped)

``launch/jobs/two_levels.toml``: two groups of two islands, gossip with AccumAdam every step within a group, DiLoCoX between
them. Paired seeds, and of both the best of three learning rates; in one process, as links change the time and never the
arithmetic. One run is over real links of the job's rates, for what islands waited."""

from __future__ import annotations

from statistics import mean
from typing import Any

from dtrain.comparison import Behind, t975
from dtrain.config import Job, load_job
from tests.bench.runs import JOB, ROOT, arguments, hardware, run_job, save

LEVELS = ROOT / "launch" / "jobs" / "two_levels.toml"
SEEDS = (0, 1, 2, 3, 4)
LRS = ("8e-3", "1.2e-2", "2.4e-2")
FOLDER = ROOT / "runs" / "levels"
COMMON = ("train.checkpoint_every=0", "train.eval_every=0", "islands.threads=1")


def main() -> None:
    job = load_job(LEVELS)
    by_lr = {name: {lr: _run(job, name, SEEDS[0], lr) for lr in LRS} for name in ("levels", "allreduce")}
    best = {name: min(runs, key=lambda lr: runs[lr]["eval_bits_per_byte"]) for name, runs in by_lr.items()}
    runs = {name: [_run(job, name, seed, lr) for seed in SEEDS] for name, lr in best.items()}
    live = run_job(FOLDER, "live", (*COMMON, f"train.lr={best['levels']}"), job=LEVELS)
    result = {"lr": best, "seeds": list(SEEDS), "by_lr": {n: {lr: _bits(s) for lr, s in of.items()} for n, of in by_lr.items()}}
    result |= _compare(runs["levels"], runs["allreduce"]) | {"live": _waits(live)}
    path = save("levels", {"command": "python -m tests.bench.levels", "hardware": hardware(), **result})
    for line in _table(result):
        print(line)
    print(f"written to {path.relative_to(ROOT)}")


def _run(job: Job, name: str, seed: int, lr: str) -> dict[str, Any]:
    said = (f"job.seed={seed}", f"train.lr={lr}", *COMMON)
    if name == "levels":
        return run_job(FOLDER, f"levels-lr{lr}-seed{seed}", said, job=LEVELS, how="sim")
    alike = [f"{part}.{key}={value}" for part, key, value in _alike(job)]
    return run_job(FOLDER, f"allreduce-lr{lr}-seed{seed}", ("sync.recipe=allreduce", *alike, *said), job=JOB, how="sim")


def _alike(job: Job) -> list[tuple[str, str, object]]:
    """What both train on."""
    model, train = job.model, job.train
    return [
        *(("model", key, getattr(model, key)) for key in ("layers", "width", "heads", "context")),
        *(("train", key, getattr(train, key)) for key in ("steps", "batch", "warmup")),
        ("islands", "count", job.islands.count),
    ]


def _bits(summary: dict[str, Any]) -> float:
    return summary["eval_bits_per_byte"]


def _compare(levels: list[dict[str, Any]], allreduce: list[dict[str, Any]]) -> dict[str, Any]:
    percents = [100 * (_bits(a) / _bits(b) - 1) for a, b in zip(levels, allreduce, strict=True)]
    spread = (sum((p - mean(percents)) ** 2 for p in percents) / (len(percents) - 1)) ** 0.5
    behind = Behind(len(percents), mean(percents), t975(len(percents) - 1) * spread / len(percents) ** 0.5)
    return {
        "bits_per_byte": {"levels": [_bits(s) for s in levels], "allreduce": [_bits(s) for s in allreduce]},
        "behind_percent": behind.percent,
        "half_width_percent": behind.half_width,
        "far_bytes": levels[0]["wire_bytes_sent_far"],
        "near_bytes": levels[0]["wire_bytes_sent_near"],
        "allreduce_bytes": allreduce[0]["wire_bytes_sent"],
    }


def _waits(summary: dict[str, Any]) -> dict[str, float]:
    return {"bits_per_byte": _bits(summary), "wait_s": summary["wait_s"], "train_s": summary["train_s"]}


def _table(result: dict[str, Any]) -> list[str]:
    bits, live = result["bits_per_byte"], result["live"]
    fewer = result["allreduce_bytes"] / result["far_bytes"]
    return [
        *(f"{name} (lr {result['lr'][name]}): {', '.join(f'{b:.4f}' for b in of)}, {mean(of):.4f}" for name, of in bits.items()),
        f"two levels: {result['behind_percent']:+.2f} % +- {result['half_width_percent']:.2f} of all-reduce",
        f"far an island sends {result['far_bytes'] / 1e6:.2f} MB, {fewer:,.0f} times fewer than all-reduce",
        f"near it sends {result['near_bytes'] / 1e6:.1f} MB",
        f"over real links {live['wait_s']:.2f} s of {live['train_s']:.1f} s were spent waiting",
    ]


if __name__ == "__main__":
    arguments(__doc__)
    main()
