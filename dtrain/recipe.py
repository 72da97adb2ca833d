"""What is a recipe? The answers to the eight questions, in words that a job file can override."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dtrain.methods import AlgorithmName


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    summary: str
    paper: str
    algorithm: AlgorithmName
    payload: Literal["none", "gradients", "parameters", "differences", "pseudo_gradients"]
    every: int
    reduce: Literal["none", "neighbours", "gather", "all_to_all"] = "all_to_all"
    topology: str = "complete"
    graph: str | None = None
    server: str | None = None
    codec: str = "identity"
    error_feedback: bool = False
    combine: Literal["mean", "gossip", "push", "sampled", "radial"] = "mean"
    """push: gossip whose weights keep another mean than the plain one; sampled: gossip that keeps none, as all take the mean of a
    few at times. ``resolve`` corrects it where a server is added or changed (``recipe_fits.combine_of``)."""
    outer: Literal["copy", "sgd", "nesterov"] = "copy"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    gamma: float = 1.0
    gossip_steps: int = 1
    delay: int | Literal["round"] = 0
    landing: Literal["keep", "eager"] = "keep"
    fragments: int = 1
    schedule: str = "every"
    moments: str | None = None
    bucket_bytes: int | None = None
    method: Callable[..., Any] | None = None
    """Of algorithm = "own" (``own.py``): (recipe, mixing) -> ``dtrain.algorithm.Method``."""
    moments_every: int | None = None
    """s of AccumAdamW, which the method is defined with; None: any optimizer."""
    sam_rho: float | None = None
    """rho of SAM, by which the method takes its gradients; None: as the loop likes."""
    start: Literal["same", "own"] = "same"
    """Whether all islands start from island 0's parameters; never said in a row."""
    total_steps: int | None = None
    """Of the run, where the schedule has to know; never said in a row."""

    @property
    def delay_steps(self) -> int:
        return self.every if self.delay == "round" else self.delay
