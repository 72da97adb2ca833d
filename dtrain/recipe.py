"""What is a recipe? The answers to the eight questions, in words that a job file can override."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dtrain.methods import AlgorithmName
from dtrain.topology import of_every_round


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    summary: str
    paper: str
    algorithm: AlgorithmName
    payload: Literal["none", "gradients", "parameters", "differences", "pseudo_gradients"]
    every: int
    """H: optimizer steps between two rounds; where it adapts, those at first, the most."""
    reduce: Literal["none", "neighbours", "gather", "all_to_all", "low_rank"] = "all_to_all"
    topology: str = "complete"
    graph: str | None = None
    server: str | None = None
    participants: int | None = None
    """K of the islands, drawn anew for each round, whose progress counts; None: that of all."""
    codec: str = "identity"
    error_feedback: bool = False
    feedback_decay: float = 1.0
    """beta of error feedback, e <- beta e + x (``codec.ErrorFeedback``)."""
    combine: Literal["mean", "gossip", "push", "sampled", "radial"] = "mean"
    """push: gossip whose weights keep another mean than the plain one; sampled: gossip that keeps none, as all take the mean of a
    few at times. ``resolve`` corrects it where a server is added or changed (``recipe_fits.combine_of``)."""
    outer: Literal["copy", "sgd", "nesterov", "delayed_nesterov"] = "copy"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    outer_state: Literal["device", "host"] = "device"
    """Where the anchor, the outer momentum, residuals and all other state of an outer loop lie: beside the parameters, or in CPU
    memory (``on_host.py``)."""
    gamma: float = 1.0
    gossip_steps: int = 1
    delay: int | Literal["round"] = 0
    landing: Literal["keep", "eager", "pure", "blend"] = "keep"
    alpha: float = 0.5
    """Of landing = "blend": the share of the island's own parameters."""
    quorum: int | str | None = None
    """Islands that a round needs, or "60%" of them (``quorum.py``); None: all."""
    grace: str = "0s"
    """How long after a quorum's wires are here the others' are still waited for, where a round is needed before."""
    fragments: int = 1
    schedule: str = "every"
    moments: str | None = None
    """Rounds that take AdamW's moments along (``schedule.multiples``); None: none do."""
    bucket_bytes: int | None = None
    rank: int | str | None = None
    """r of reduce = "low_rank", columns of a matrix's factors, or "adaptive:R" (``matrices``); None without."""
    include: tuple[str, ...] | None = None
    """Patterns of the names of parameters that islands share; None: all (``chosen.py``)."""
    exclude: tuple[str, ...] | None = None
    """And of those that they do not share."""
    method: Callable[..., Any] | None = None
    """Of algorithm = "own" (``own.py``): (recipe, mixing) -> ``dtrain.algorithm.Method``."""
    moments_every: int | None = None
    """s of AccumAdamW, which the method is defined with; None: any optimizer."""
    sam_rho: float | None = None
    """rho of SAM, by which the method takes its gradients; None: as the loop likes."""
    optimizer: Literal["muon"] | None = None
    """The inner optimizer that the method is defined with; None: any."""
    start: Literal["same", "own"] = "same"
    """Whether all islands start from island 0's parameters; never said in a row."""
    total_steps: int | None = None
    """Of the run, where the schedule has to know; never said in a row."""
    every_adapts: bool = False
    """Whether H falls as the rank does: sync.every = "adaptive:H"."""
    speeds: tuple[float, ...] | None = None
    """Of each island beside the fastest's 1 (``slots.py``); None: all alike. Never said in a row."""
    near: Near | None = None
    """Beneath these rounds, which then are those of groups of islands; never said in a row (``levels.py``)."""

    @property
    def draws(self) -> str | None:
        """Who is drawn, as a server's word: the server's own, or participants, which are those of a server in every round."""
        return self.server if self.participants is None else of_every_round(self.participants)

    @property
    def delay_steps(self) -> int:
        return self.every if self.delay == "round" else self.delay

    @property
    def least_every(self) -> int:
        """H at least: a round lands before the next starts, and where it flies for all of its period, that is one step."""
        if not self.every_adapts:
            return self.every
        return 1 if self.delay == "round" else self.delay + 1

    @property
    def levels(self) -> tuple[Recipe, ...]:
        """The nearest first; of a job without levels this one alone."""
        return (self,) if self.near is None else (self.near.recipe, self)

    @property
    def title(self) -> str:
        """The names of all levels' rows."""
        return " + ".join(level.name for level in self.levels)


@dataclass(frozen=True, slots=True)
class Near:
    """What neighbouring islands do among themselves."""

    islands: int
    """Of a group."""
    recipe: Recipe
