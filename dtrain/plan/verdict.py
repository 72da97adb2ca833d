"""Should a recipe be taken at all, and why? Where none fits, or talking costs more than it brings, the answer is a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtrain import units
from dtrain.methods import RULES
from dtrain.plan.accelerators import ACCELERATORS
from dtrain.plan.order import FEWEST_ROUNDS, NEAR_BEST, ORDER, recommend
from dtrain.plan.plans import Planner, Row, Setting, baseline, said, speed_text


@dataclass(frozen=True, slots=True)
class Verdict:
    best: Row
    """Of those that may be recommended; of all, where none may."""
    taken: bool
    why: str


def verdict(planner: Planner, rows: Sequence[Row], steps: int) -> Verdict:
    """Of all rows of one number of islands, for a job of so many steps."""
    setting, n = planner.setting, rows[0].num_islands
    talking = [row for row in rows if row.recipe.payload != "none"]
    fitting = [row for row in talking if setting.fits(row.memory.total)]
    if not fitting:
        smallest = min(talking, key=lambda row: row.memory.total)
        return Verdict(smallest, False, f"{n} islands: take none: {_too_large(setting, smallest)}")
    best = recommend([row for row in fitting if enough_rounds(row, steps)] or fitting)
    alone = alone_tokens_per_s(setting)
    if best.tokens_per_s <= alone:
        why = (
            f"{n} islands: take none: the best that talks is {said(best.recipe)}, {speed_text(best.tokens_per_s)} tokens/s, "
            f"waiting {best.time.waits:.1%} of the time, and one island alone makes {speed_text(alone)}: run one island, or get "
            "a faster link (islands that never talk, sync.recipe=local, wait for none, and have a merge at the end, no more)"
        )
        return Verdict(best, False, why)
    return Verdict(best, True, _reason(best, rows))


def enough_rounds(row: Row, steps: int) -> bool:
    return row.recipe.payload == "none" or row.recipe.every * FEWEST_ROUNDS <= steps


def alone_tokens_per_s(setting: Setting) -> float:
    """One island without the others, by the optimizer that the job says."""
    return setting.tokens_per_step / (setting.island("identity").step_s * (2 if setting.sam_rho else 1))


def _reason(chosen: Row, rows: Sequence[Row]) -> str:
    plain = baseline(rows)
    against = "" if chosen is plain else f", {chosen.tokens_per_s / plain.tokens_per_s:.3g} times all-reduce's"
    return (
        f"{chosen.num_islands} islands: take {said(chosen.recipe)}: {speed_text(chosen.tokens_per_s)} tokens/s{against}, waiting "
        f"{chosen.time.waits:.1%} of the time; of all that may be taken and are within {NEAR_BEST:.0%} of the fastest of them it "
        f"is the first of this order: {ORDER}"
    )


def _too_large(setting: Setting, row: Row) -> str:
    """What does not fit, and what would help. Ranks of an island share its batch and the recipe's state; weights, gradients and
    moments each has whole."""
    assert setting.gpu_bytes is not None
    m, room = row.memory, setting.gpu_bytes
    parts = (
        f"{row.recipe.name} needs the least, {units.show_bytes(m.total)} a rank, and a {setting.gpu} has "
        f"{units.show_bytes(room)}: weights, gradients and moments are {units.show_bytes(m.model)}, activations "
        f"{units.show_bytes(m.activations)}, the recipe's state and wires {units.show_bytes(m.sync)}"
    )
    left = room - m.model - m.sync
    if setting.stages and left <= 0:
        of = "a part of " if setting.shards.weights > 1 else ""
        return f"{parts}. Each rank holds {of}a stage of the model: more of them, islands.ranks, or a larger GPU"
    if m.model >= room:
        larger = sorted(name for name, gpu in ACCELERATORS.items() if gpu.memory_bytes > m.total - m.activations)
        gpus = f"a GPU that leaves some for activations ({', '.join(larger)})" if larger else "a larger GPU than all known"
        if setting.shards.weights > 1:
            share = f"1 / {setting.shards.weights} of the model"
            return f"{parts}. Each rank holds {share}, whatever the batch: more shards, or {gpus}"
        return (
            f"{parts}. Each rank holds the whole model, whatever their number and the batch: islands.engine=fsdp, which shards "
            f"it, a smaller model, or {gpus}"
        )
    if left <= 0:
        moved = "outer_state" in RULES[row.recipe.algorithm].axes and not m.host
        host = ", sync.outer_state=host, which keeps it in the host's memory" if moved else ""
        return f"{parts}. Only the recipe's state is shared among the ranks of an island: more ranks{host}, or a smaller model"
    sequences = setting.work.tokens // setting.work.context
    interleaved = len(setting.stages) if setting.stages_per_rank > 1 else 1  # which wants a multiple of the ranks
    for micro_batches in range(setting.micro_batches + 1, sequences + 1):
        if (sequences % micro_batches, micro_batches % interleaved) != (0, 0):
            continue
        if m.activations * setting.micro_batches / micro_batches <= left:
            times = f"{micro_batches / setting.micro_batches:.3g} times"
            ranks = "" if setting.stages else f", or {times} the ranks for the same batch,"
            return (
                f"{parts}. Activations can shrink: train.accumulate={micro_batches} fits; a train.batch {times} "
                f"smaller{ranks} shrink{'s' if setting.stages else ''} them as much"
            )
    return f"{parts}. A single sequence's activations are too large: a shorter model.context, or a smaller model"
