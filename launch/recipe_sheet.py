"""What does a recipe answer to the eight questions, where are its equations, and what does it send and keep?"""

from __future__ import annotations

from pathlib import Path

import dtrain
from dtrain import schedule
from dtrain.assemble import assemble
from dtrain.config import Job, toml_value
from dtrain.methods import RULES
from dtrain.plan.sent import sent
from dtrain.recipe_fits import idle_axes, used_axes
from dtrain.recipes import Recipe, answer_of, resolve, with_steps

ISLANDS = 4
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("who talks to whom?", ("topology", "graph", "server", "participants")),
    ("when?", ("every", "fragments", "schedule", "moments")),
    ("what?", ("algorithm", "payload", "include", "exclude")),
    ("how is it encoded?", ("codec", "error_feedback", "feedback_decay")),
    ("by what path?", ("reduce", "rank")),
    ("how is it combined?", ("combine",)),
    ("how is it applied?", ("outer", "outer_lr", "outer_momentum", "outer_state", "gamma", "gossip_steps")),
    ("how late does it land?", ("delay", "landing", "alpha", "quorum", "grace")),
)
"""And what answers each: keys of [sync], and two words that follow from the algorithm."""
_FOLLOWS = ("payload", "combine")
_PEERS = {"complete": "all islands", "random_pairs": "pairs drawn for each round"}
"""Where nothing else is possible, so that no key says it."""
_BESIDE = {"noloco": "pseudo-gradients", "desloc": "AdamW's moments", "gradient_tracking": "gradients"}
"""What an algorithm sends besides its payload."""
_SIDE = 1024
"""Of the square matrix that is sent: many numbers a wire's header, and blocks that are full."""


def sheet(name: str) -> list[list[str]]:
    """A title and its text a row. Raises ValueError where there is no such recipe."""
    r = resolve(name, {}, ISLANDS)
    steps = Job().train.steps
    if r.schedule not in (schedule.EVERY, schedule.READY):
        r = with_steps(r, steps)
    simulated = RULES[r.algorithm].simulated is not None
    return [
        ["what islands do", r.summary],
        ["from", r.paper],
        ["equations", f"dtrain/events/{r.algorithm}.py" if simulated else _file_of(r)],
        *([question, _answer(r, keys)] for question, keys in QUESTIONS),
        *([["optimizer", wants]] if (wants := _optimizer(r)) else []),
        *([] if simulated else _costs(r, steps)),
    ]


def _answer(r: Recipe, keys: tuple[str, ...]) -> str:
    silent = r.payload == "none"
    said = [key for key in keys if key in _FOLLOWS or (key in used_axes(r) and key not in idle_axes(r))]
    shown = [f"{key} = {toml_value(value)}" for key in said if (value := answer_of(r, key)) is not None]
    if silent and keys == ("combine",):
        return "-"
    if "payload" in keys and r.algorithm in _BESIDE:
        shown[-1] += f", and {_BESIDE[r.algorithm]}"
    if not shown and "topology" in keys and not silent:
        return _PEERS.get(r.topology, "-")
    return ", ".join(shown) or "-"


def _file_of(r: Recipe) -> str:
    file = Path(assemble(r, 0, ISLANDS).methods[0].__code__.co_filename)
    root = Path(dtrain.__file__).parent.parent
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _optimizer(r: Recipe) -> str:
    if r.sam_rho is not None:
        return f"SAM, train.sam_rho = {r.sam_rho}"
    if r.moments_every is not None:
        return f"AccumAdamW, train.moments_every = {r.moments_every}"
    if r.optimizer == "muon":
        return 'Muon, train.optimizer = "muon"'
    return "SGD without momentum" if RULES[r.algorithm].signs else "AdamW" if r.moments is not None else ""


def _costs(r: Recipe, steps: int) -> list[list[str]]:
    if r.schedule == schedule.READY:
        return []
    found, numel = sent(r, {"matrix": (_SIDE, _SIDE)}, ISLANDS), _SIDE * _SIDE
    budget = schedule.parse(r.schedule)
    rounds_a_step = 1 / r.every if budget is None else budget.rounds(steps) / steps
    sent_bytes = found.mean_round_bytes * rounds_a_step / numel
    kept, wires = found.kept_bytes / numel, found.wire_bytes / numel
    return [
        ["bytes a parameter a step", f"{sent_bytes:.3g}, sent by each of {ISLANDS} islands, of a {_SIDE} x {_SIDE} matrix"],
        ["memory", f"{kept:.3g} bytes a parameter kept between steps, beside the optimizer's; {wires:.3g} for wires under way"],
    ]
