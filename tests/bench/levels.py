"""Two levels of rounds beside all-reduce: how good is the model, and what does each link carry?

    python -m tests.bench.levels                  (about 80 minutes of one core; goes on where it was stopped)

``launch/jobs/two_levels.toml``: two groups of two islands, gossip with AccumAdam every step within a group, DiLoCoX between
them. Paired seeds, five at the job's 1,000 steps and three at four times as many; both at the learning rate of three that is
all-reduce's best of 1,000 steps, so the baseline is the one that was tuned. In one process, as links change the time and never
the arithmetic; one run is over real links of the job's rates, for what islands waited."""

from __future__ import annotations

from statistics import mean
from typing import Any

from dtrain.comparison import Behind, t975
from dtrain.config import Job, load_job
from tests.bench.runs import JOB, ROOT, arguments, hardware, run_job, save

LEVELS = ROOT / "launch" / "jobs" / "two_levels.toml"
SEEDS = {1: (0, 1, 2, 3, 4), 4: (0, 1, 2)}
"""By budget, in times of the job's own steps."""
LRS = ("8e-3", "1.2e-2", "2.4e-2")
NAMES = ("levels", "allreduce")
FOLDER = ROOT / "runs" / "levels"
COMMON = ("train.checkpoint_every=0", "train.eval_every=0", "islands.threads=1")


def main() -> None:
    job = load_job(LEVELS)
    by_lr = {name: {lr: _bits(_run(job, name, SEEDS[1][0], lr, 1)) for lr in LRS} for name in NAMES}
    lr = min(LRS, key=lambda lr: by_lr["allreduce"][lr])
    budgets = {
        str(budget): _compare(*([_run(job, name, seed, lr, budget) for seed in seeds] for name in NAMES))
        for budget, seeds in SEEDS.items()
    }
    live = run_job(FOLDER, "live", (*COMMON, f"train.lr={lr}"), job=LEVELS)
    result = {"lr": lr, "seeds": SEEDS, "by_lr": by_lr, "budgets": budgets, "live": _waits(live)}
    path = save("levels", {"command": "python -m tests.bench.levels", "hardware": hardware(), **result})
    for line in _table(job, result):
        print(line)
    print(f"written to {path.relative_to(ROOT)}")


def _run(job: Job, name: str, seed: int, lr: str, budget: int) -> dict[str, Any]:
    train = (f"train.steps={budget * job.train.steps}", f"train.warmup={budget * job.train.warmup}", f"train.lr={lr}")
    said = (*train, f"job.seed={seed}", *COMMON)
    run = f"{name}-{budget}x-lr{lr}-seed{seed}"
    if name == "levels":
        return run_job(FOLDER, run, said, job=LEVELS, how="sim")
    alike = [f"{part}.{key}={value}" for part, key, value in _alike(job)]
    return run_job(FOLDER, run, ("sync.recipe=allreduce", *alike, *said), job=JOB, how="sim")


def _alike(job: Job) -> list[tuple[str, str, object]]:
    """What both train on."""
    model, train = job.model, job.train
    return [
        *(("model", key, getattr(model, key)) for key in ("layers", "width", "heads", "context")),
        ("train", "batch", train.batch),
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


def _table(job: Job, result: dict[str, Any]) -> list[str]:
    return [
        *(line for budget, of in result["budgets"].items() for line in _of_budget(int(budget) * job.train.steps, of)),
        f"over real links {result['live']['wait_s']:.2f} s of {result['live']['train_s']:.1f} s were spent waiting",
    ]


def _of_budget(num_steps: int, of: dict[str, Any]) -> list[str]:
    bits, fewer, steps = of["bits_per_byte"], of["allreduce_bytes"] / of["far_bytes"], f"{num_steps:,} steps"
    return [
        *(f"{steps}, {name}: {', '.join(f'{b:.4f}' for b in each)}, {mean(each):.4f}" for name, each in bits.items()),
        f"{steps}, two levels: {of['behind_percent']:+.2f} % +- {of['half_width_percent']:.2f} of all-reduce",
        f"{steps}, far: an island sends {of['far_bytes'] / 1e6:.2f} MB, {fewer:,.0f} times fewer than all-reduce",
        f"{steps}, near: it sends {of['near_bytes'] / 1e6:.1f} MB",
    ]


if __name__ == "__main__":
    arguments(__doc__)
    main()
