"""How good is the default recipe's model beside all-reduce's and beside islands that never talk?

    python -m tests.bench.quality                 (about 20 minutes on 2 cores; goes on where it was stopped)

Paired seeds: a seed fixes the initial weights and every batch, whatever the recipe. All-reduce gets the best of three
learning rates. The link is not shaped, because a rate changes the time and never the arithmetic."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from dtrain.recipes import DEFAULT_RECIPE
from tests.bench.runs import ROOT, arguments, hardware, run_job, save

SEEDS = (0, 1, 2)
ALLREDUCE_LRS = ("3e-3", "6e-3", "1.2e-2")
FOLDER = ROOT / "runs" / "quality"
COMMON = ("link.rate=none", "link.rtt=0ms", "train.checkpoint_every=0", "train.eval_every=0")


def main() -> None:
    by_lr = {lr: _run(FOLDER, "allreduce", SEEDS[0], lr) for lr in ALLREDUCE_LRS}
    best_lr = min(by_lr, key=lambda lr: _merged(by_lr[lr]))
    local = [_run(FOLDER, "local", seed, None) for seed in SEEDS]
    ours = [_run(FOLDER, DEFAULT_RECIPE, seed, None) for seed in SEEDS]
    allreduce = [_run(FOLDER, "allreduce", seed, best_lr) for seed in SEEDS]
    result = _compare(allreduce, ours, local)
    result |= {"allreduce_lr": best_lr, "allreduce_by_lr": {lr: _merged(summary) for lr, summary in by_lr.items()}}
    path = save("quality", {"command": "python -m tests.bench.quality", "hardware": hardware(), **result})
    for line in _table(result):
        print(line)
    print(f"written to {path.relative_to(ROOT)}")


def _run(folder: Path, recipe: str, seed: int, lr: str | None) -> dict[str, Any]:
    name = f"{recipe}{f'-lr{lr}' if lr else ''}-seed{seed}"
    overrides = [f"sync.recipe={recipe}", f"job.seed={seed}", *COMMON, *([f"train.lr={lr}"] if lr else [])]
    return run_job(folder, name, overrides)


def _merged(summary: dict[str, Any]) -> float:
    return summary["eval_bits_per_byte"]


def _alone(summary: dict[str, Any]) -> float:
    """An island that never talks is used as it is: merging models that went separate ways gives a worse one."""
    return mean(summary["eval_bits_per_byte_islands"])


def _compare(
    allreduce: list[dict[str, Any]], ours: list[dict[str, Any]], local: list[dict[str, Any]]
) -> dict[str, Any]:
    behind = [100 * (_merged(o) / _merged(a) - 1) for o, a in zip(ours, allreduce, strict=True)]
    best_local = [min(_alone(s), _merged(s)) for s in local]
    gap_closed = [(b - _merged(o)) / (b - _merged(a)) for o, a, b in zip(ours, allreduce, best_local, strict=True)]
    return {
        "recipe": DEFAULT_RECIPE,
        "parameters": ours[0]["parameters"],
        "steps": ours[0]["steps"],
        "seeds": list(SEEDS),
        "bits_per_byte": {
            "allreduce": [_merged(s) for s in allreduce],
            DEFAULT_RECIPE: [_merged(s) for s in ours],
            "local, single": [_alone(s) for s in local],
            "local, merged": [_merged(s) for s in local],
        },
        "behind_allreduce_percent": behind,
        "gap_closed": gap_closed,
        "wire_reduction": ours[0]["wire_reduction"],
    }


def _table(result: dict[str, Any]) -> list[str]:
    rows = ["| recipe | merged bits/byte, seeds 0, 1, 2 | mean |", "|---|---|---|"]
    for name, values in result["bits_per_byte"].items():
        rows.append(f"| {name} | {', '.join(f'{v:.4f}' for v in values)} | {mean(values):.4f} |")
    rows.append("")
    rows.append(
        f"{result['recipe']}: {mean(result['behind_allreduce_percent']):+.2f} % against all-reduce "
        f"(lr {result['allreduce_lr']}), {mean(result['gap_closed']):.0%} of the gap to islands that never talk closed, "
        f"{result['wire_reduction']:.0f}x fewer bytes"
    )
    return rows


if __name__ == "__main__":
    arguments(__doc__)
    main()
